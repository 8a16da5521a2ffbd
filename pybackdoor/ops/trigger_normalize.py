"""trigger_normalize: uint8 images to a model's input, with trigger, quantisation and augmentation.

One pass over the images, equal bit for bit to the chain ToTensor -> trigger -> ToPILImage ->
ToTensor -> Normalize of CPU torch (in fp32, where neither warp nor noise takes part).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pybackdoor import _backend, reference


_OP = "trigger_normalize"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = ("patch", "blend", "warp")
INPUT_LAYOUTS = ("nhwc", "nchw")
LAYOUTS = ("nchw", "channels_last", "patchified")
NOISES = ("half", "symmetric")


def _need(condition: bool, error: type[Exception], message: str) -> None:
    if not condition:
        raise error(message)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{value!r}"


@dataclass(frozen=True, eq=False)
class TriggerTable:
    """A batch of triggers of one kind, as the op reads them.

    Attributes:
        mode: "patch" overwrites, "blend" computes a * pattern + b * image, "warp" resamples.
        pattern: [T, 3, h, w] fp32, any finite value, in units of [0, 1] pixels; patch and blend.
        mask: [T, 1, h, w] or [T, 3, h, w] fp32 in [0, 1]; blend only: with strength a, the
            pattern's weight is a * mask and the image's 1 - a * mask.
        grid: [T, H, W, 2] fp32 (x, y) in [-1, 1], as for grid_sample(align_corners=True); warp.
        nonzero_only: blend only those elements (not pixels) where pattern != 0.
        additive: blend with b = 1 instead of 1 - a.
        clip: clip to [0, 1] before quantising; else levels wrap modulo 256.
    Raises:
        TypeError, ValueError: a member is missing, superfluous, or of the wrong shape or dtype.
    """

    mode: str
    pattern: Tensor | None = None
    mask: Tensor | None = None
    grid: Tensor | None = None
    nonzero_only: bool = False
    additive: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        _need(
            self.mode in MODES,
            ValueError,
            f"TriggerTable: mode must be one of {', '.join(MODES)}, got {self.mode!r}",
        )
        wanted = {
            "patch": ("pattern",),
            "blend": ("pattern", "mask", "nonzero_only", "additive"),
            "warp": ("grid",),
        }[self.mode]
        for name in ("pattern", "mask", "grid", "nonzero_only", "additive"):
            value = getattr(self, name)
            given = value is not None and value is not False
            _need(
                name in wanted or not given,
                ValueError,
                f"TriggerTable: {name} has no meaning in mode {self.mode}, got {_describe(value)}",
            )
        main = "grid" if self.mode == "warp" else "pattern"
        self._check_tensor(main, "[T, H, W, 2]" if main == "grid" else "[T, 3, h, w]")
        if self.mask is not None:
            self._check_tensor("mask", "[T, 1, h, w] or [T, 3, h, w] like pattern")
            ok = self.mask.shape[1] in (1, 3) and self.mask.shape == (
                len(self.pattern),
                self.mask.shape[1],
                *self.pattern.shape[2:],
            )
            _need(
                ok,
                ValueError,
                f"TriggerTable: mask must be [{len(self.pattern)}, 1 or 3, "
                f"{', '.join(map(str, self.pattern.shape[2:]))}] like pattern, "
                f"got {list(self.mask.shape)}",
            )
            _need(
                self.mask.device == self.pattern.device,
                ValueError,
                f"TriggerTable: mask must be on {self.pattern.device} like pattern, "
                f"got {self.mask.device}",
            )
            if self.mask.device.type == "cpu":
                low, high = self.mask.min().item(), self.mask.max().item()
                _need(
                    low >= 0 and high <= 1,
                    ValueError,
                    f"TriggerTable: mask must lie in [0, 1], got [{low:g}, {high:g}]",
                )

    def _check_tensor(self, name: str, shape: str) -> None:
        value = getattr(self, name)
        _need(
            isinstance(value, Tensor),
            TypeError,
            f"TriggerTable: {name} must be a tensor {shape} in mode {self.mode}, got {value!r}",
        )
        _need(
            value.dtype == torch.float32,
            TypeError,
            f"TriggerTable: {name} must be float32 {shape}, got {_describe(value)}",
        )
        axis, channels = (3, 2) if name == "grid" else (1, 3)
        ok = value.ndim == 4 and value.numel() > 0
        ok = ok and (name == "mask" or value.shape[axis] == channels)
        _need(
            ok,
            ValueError,
            f"TriggerTable: {name} must be {shape}, not empty, got {list(value.shape)}",
        )
        if value.device.type == "cpu":
            _need(
                bool(value.isfinite().all()),
                ValueError,
                f"TriggerTable: {name} must be finite, got infinities or NaN",
            )

    @property
    def source(self) -> Tensor:
        """The tensor that defines the triggers: grid for warp, else pattern."""
        return self.grid if self.mode == "warp" else self.pattern

    def to(self, device: torch.device | str) -> TriggerTable:
        """The same table with its tensors on `device`."""
        moved = {
            name: value.to(device)
            for name in ("pattern", "mask", "grid")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Augment:
    """PAR's augmentation (arXiv 2412.00727): noise in pixel space, one square erased after it.

    Attributes:
        noise_p: probability of noise per image.
        noise_std: standard deviation in units of [0, 1] pixels.
        noise: "half" adds clip(std * n, 0, 1), as the paper's code does; "symmetric" std * n.
        erase_p: probability of erasing one square per image; erased values are 0, normalised.
        erase_area: range of the square's share of the image's area.
    Raises:
        ValueError: a value outside its range.
    """

    noise_p: float = 0.5
    noise_std: float = 0.2
    noise: str = "half"
    erase_p: float = 0.5
    erase_area: tuple[float, float] = (0.005, 0.01)

    def __post_init__(self) -> None:
        for name in ("noise_p", "erase_p"):
            value = getattr(self, name)
            _need(0 <= value <= 1, ValueError, f"Augment: {name} must be in [0, 1], got {value!r}")
        _need(
            0 <= self.noise_std < math.inf,
            ValueError,
            f"Augment: noise_std must be finite and >= 0, got {self.noise_std!r}",
        )
        _need(
            self.noise in NOISES,
            ValueError,
            f"Augment: noise must be one of {', '.join(NOISES)}, got {self.noise!r}",
        )
        low, high = self.erase_area
        _need(
            0 < low <= high <= 1,
            ValueError,
            f"Augment: erase_area must satisfy 0 < low <= high <= 1, got {self.erase_area!r}",
        )


def _check_index(
    name: str,
    value: Tensor | None,
    images: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    if value is None:
        return
    kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    _need(
        isinstance(value, Tensor) and value.dtype in dtypes,
        TypeError,
        f"{_OP}: {name} must be a {kinds} tensor {list(shape)}, got {_describe(value)}",
    )
    _need(
        tuple(value.shape) == shape,
        ValueError,
        f"{_OP}: {name} must be {list(shape)} for {shape[0]} images, got {list(value.shape)}",
    )
    _need(
        value.device.type == "cpu" or value.device == images.device,
        ValueError,
        f"{_OP}: {name} must be on {images.device} like images (or the CPU), got {value.device}",
    )


def _check_choice(name: str, value: object, choices: tuple) -> None:
    wanted = ", ".join(str(c).removeprefix("torch.") for c in choices)
    _need(value in choices, ValueError, f"{_OP}: {name} must be one of {wanted}, got {value!r}")


def _check_triggers(triggers: TriggerTable, images: Tensor, size: tuple[int, int]) -> None:
    _need(
        isinstance(triggers, TriggerTable),
        TypeError,
        f"{_OP}: triggers must be a TriggerTable, got {type(triggers).__name__}",
    )
    source = triggers.source
    _need(
        source.device == images.device,
        ValueError,
        f"{_OP}: triggers must be on {images.device} like images (use triggers.to(device)), "
        f"got {source.device}",
    )
    if triggers.mode == "warp":
        _need(
            tuple(source.shape[1:3]) == size,
            ValueError,
            f"{_OP}: triggers.grid must be [T, {size[0]}, {size[1]}, 2] like images, "
            f"got {list(source.shape)}",
        )
    else:
        _need(
            source.shape[2] <= size[0] and source.shape[3] <= size[1],
            ValueError,
            f"{_OP}: triggers.pattern must fit into {size[0]} x {size[1]} images, "
            f"got {source.shape[2]} x {source.shape[3]}",
        )


def _check(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    triggers: TriggerTable | None,
    trigger_id: Tensor | None,
    position: Tensor | None,
    strength: Tensor | float | None,
    augment: Augment | None,
    seed: int,
    view: int,
    sample_id: Tensor | None,
    input_layout: str,
    layout: str,
    patch_size: int | None,
    dtype: torch.dtype,
) -> None:
    """Types, shapes, devices and plain numbers; values in tensors are checked by the op itself."""
    _need(
        isinstance(images, Tensor) and images.dtype == torch.uint8,
        TypeError,
        f"{_OP}: images must be a uint8 tensor, got {_describe(images)}",
    )
    _check_choice("input_layout", input_layout, INPUT_LAYOUTS)
    _check_choice("layout", layout, LAYOUTS)
    _check_choice("dtype", dtype, DTYPES)
    axis = 3 if input_layout == "nhwc" else 1
    wanted = "[B, H, W, 3]" if input_layout == "nhwc" else "[B, 3, H, W]"
    ok = images.ndim == 4 and images.shape[axis] == 3
    _need(ok, ValueError, f"{_OP}: images must be {wanted}, got {list(images.shape)}")
    batch = images.shape[0]
    size = tuple(images.shape[1:3] if input_layout == "nhwc" else images.shape[2:])
    _need(min(size) > 0, ValueError, f"{_OP}: images must not be empty, got {list(images.shape)}")
    for name, value in (("mean", mean), ("std", std)):
        ok = isinstance(value, Sequence) and len(value) == 3
        ok = ok and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
        _need(ok, ValueError, f"{_OP}: {name} must be 3 finite floats, got {value!r}")
    _need(min(std) > 0, ValueError, f"{_OP}: std must be > 0, got {std!r}")
    if layout == "patchified":
        ok = isinstance(patch_size, int) and patch_size > 0
        ok = ok and size[0] % patch_size == 0 and size[1] % patch_size == 0
        _need(
            ok,
            ValueError,
            f"{_OP}: patch_size must divide {size[0]} and {size[1]} in layout patchified, "
            f"got {patch_size!r}",
        )
    else:
        _need(
            patch_size is None,
            ValueError,
            f"{_OP}: patch_size goes with layout patchified only, got {patch_size!r}",
        )
    if triggers is not None:
        _check_triggers(triggers, images, size)
    else:
        for name, value in (
            ("trigger_id", trigger_id),
            ("position", position),
            ("strength", strength),
        ):
            _need(value is None, ValueError, f"{_OP}: {name} needs triggers, got triggers=None")
    _check_index("trigger_id", trigger_id, images, (torch.int32, torch.int64), (batch,))
    integers = (torch.int16, torch.int32, torch.int64)
    _check_index("position", position, images, integers, (batch, 2))
    _check_index("sample_id", sample_id, images, (torch.int64,), (batch,))
    if isinstance(strength, Tensor):
        floats = (torch.float32, torch.float64)
        _check_index("strength", strength, images, floats, (batch,))
    elif strength is not None:
        ok = isinstance(strength, (int, float)) and 0 <= strength <= 1
        _need(ok, ValueError, f"{_OP}: strength must be in [0, 1], got {strength!r}")
    if augment is not None:
        _need(
            isinstance(augment, Augment),
            TypeError,
            f"{_OP}: augment must be an Augment, got {type(augment).__name__}",
        )
        _need(sample_id is not None, ValueError, f"{_OP}: sample_id is required with augment")
    _need(0 <= view < 1 << 24, ValueError, f"{_OP}: view must be in [0, 2^24), got {view!r}")
    ok = -(1 << 63) <= seed < 1 << 64
    _need(ok, ValueError, f"{_OP}: seed must fit into 64 bits, got {seed!r}")


def _check_values(
    source: Tensor | None,
    warp: bool,
    trigger_id: Tensor | None,
    position: Tensor | None,
    strength: Tensor | None,
    size: tuple[int, int],
) -> None:
    """Values of those index tensors that are on the CPU; on CUDA looking would synchronise."""
    if trigger_id is not None and trigger_id.device.type == "cpu" and trigger_id.numel():
        low, high = (v.item() for v in trigger_id.aminmax())
        _need(
            -1 <= low and high < len(source),
            ValueError,
            f"{_OP}: trigger_id must be in [-1, {len(source)}) for {len(source)} triggers, "
            f"got values from {low} to {high}",
        )
    if not warp and position is not None and position.device.type == "cpu" and position.numel():
        low, high = position.amin(0).tolist(), position.amax(0).tolist()
        room = [size[0] - source.shape[2], size[1] - source.shape[3]]
        _need(
            min(low) >= 0 and high[0] <= room[0] and high[1] <= room[1],
            ValueError,
            f"{_OP}: position must be in [0, {room[0]}] x [0, {room[1]}] for a "
            f"{source.shape[2]} x {source.shape[3]} window in {size[0]} x {size[1]} images, "
            f"got (y, x) from {low} to {high}",
        )
    if strength is not None and strength.device.type == "cpu" and strength.numel():
        low, high = (v.item() for v in strength.aminmax())
        _need(
            low >= 0 and high <= 1,
            ValueError,
            f"{_OP}: strength must be in [0, 1], got values from {low} to {high}",
        )


def _allocate(
    images: Tensor,
    input_layout: str,
    layout: str,
    patch_size: int,
    dtype: torch.dtype,
    return_images: bool,
) -> tuple[Tensor, Tensor]:
    """The op's outputs: images for the model, and poisoned images ([0] if not wanted)."""
    batch = images.shape[0]
    h, w = images.shape[1:3] if input_layout == "nhwc" else images.shape[2:]
    if layout == "patchified":
        patches = (h // patch_size) * (w // patch_size)
        out = images.new_empty((batch, patches, 3 * patch_size**2), dtype=dtype)
    else:
        channels_last = layout == "channels_last"
        kind = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty((batch, 3, h, w), dtype=dtype, device=images.device, memory_format=kind)
    poisoned = images.new_empty(images.shape if return_images else (0,))
    return out, poisoned


@torch.library.custom_op("pybackdoor::trigger_normalize_fwd", mutates_args=())
def trigger_normalize_fwd(
    images: Tensor,
    pattern: Tensor | None,
    mask: Tensor | None,
    grid: Tensor | None,
    trigger_id: Tensor | None,
    position: Tensor | None,
    strength: Tensor | None,
    sample_id: Tensor | None,
    mean: list[float],
    std: list[float],
    mode: str,
    flags: list[bool],
    strength_value: float,
    augment: list[float],
    noise: str,
    seed: int,
    view: int,
    input_layout: str,
    layout: str,
    patch_size: int,
    dtype: torch.dtype,
    return_images: bool,
) -> tuple[Tensor, Tensor]:
    """The registered op behind `trigger_normalize`; flat arguments.

    `mode` is "none" without triggers; `flags` are nonzero_only, additive, clip; `augment` is
    empty or noise_p, noise_std, erase_p, and the two ends of erase_area.
    """
    warp = mode == "warp"
    size = tuple(images.shape[1:3] if input_layout == "nhwc" else images.shape[2:])
    source = grid if warp else pattern
    _check_values(source, warp, trigger_id, position, strength, size)
    trigger_id, position, strength, sample_id = (
        t if t is None else t.to(images.device, non_blocking=True)
        for t in (trigger_id, position, strength, sample_id)
    )
    outputs = _allocate(images, input_layout, layout, patch_size, dtype, return_images)
    if _backend.choose(images, _OP).name != "reference":
        launch_native(
            *(images, pattern, mask, grid, trigger_id, position, strength, sample_id),
            *(mean, std, mode, flags, strength_value, augment, noise, seed, view),
            *(input_layout, layout, patch_size, *outputs),
        )
        return outputs
    table = plan = None
    if mode != "none":
        table = TriggerTable(mode, pattern, mask, grid, *flags)
    if augment:
        noise_p, noise_std, erase_p, *area = augment
        plan = Augment(noise_p, noise_std, noise, erase_p, tuple(area))
    result = reference.trigger_normalize(
        images,
        mean=mean,
        std=std,
        triggers=table,
        trigger_id=trigger_id,
        position=position,
        strength=strength_value if strength is None else strength,
        augment=plan,
        seed=seed,
        view=view,
        sample_id=sample_id,
        input_layout=input_layout,
        layout=layout,
        patch_size=patch_size,
        dtype=dtype,
        return_images=return_images,
    )
    return result if return_images else (result, outputs[1])


@trigger_normalize_fwd.register_fake
def _(
    images,
    pattern,
    mask,
    grid,
    trigger_id,
    position,
    strength,
    sample_id,
    mean,
    std,
    mode,
    flags,
    strength_value,
    augment,
    noise,
    seed,
    view,
    input_layout,
    layout,
    patch_size,
    dtype,
    return_images,
):
    return _allocate(images, input_layout, layout, patch_size, dtype, return_images)


def trigger_normalize(
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    triggers: TriggerTable | None = None,
    trigger_id: Tensor | None = None,
    position: Tensor | None = None,
    strength: Tensor | float | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    view: int = 0,
    sample_id: Tensor | None = None,
    input_layout: str = "nhwc",
    layout: str = "nchw",
    patch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    return_images: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Applies triggers to uint8 images, quantises, augments and normalises them in one pass.

    With x = image / 255: the trigger gives x', q = trunc(255 x') mod 256 (clipped first if the
    table says so), y = (q / 255 - mean) / std. Divisions are true divisions and every product
    and sum is rounded by itself, so y equals CPU torch's chain bit for bit in fp32; fp16 and bf16
    round it once more. Noise is added to q / 255 before, a square erased (set to 0) after the
    normalisation; both depend on (seed, view, sample id) alone, through Philox4x32-10.

    Args:
        images: [B, H, W, 3] or [B, 3, H, W] uint8, as input_layout says; any strides.
        mean, std: 3 floats each, in units of [0, 1] pixels.
        triggers: windows h x w put at a position: patch overwrites, blend mixes; or warp grids.
        trigger_id: [B] int32 or int64, -1 leaves an image clean; None: trigger 0 for all.
        position: [B, 2] int16, int32 or int64 (y, x) of the window's top left; None: (0, 0).
        strength: a in a * pattern + (1 - a) * x; a float or [B] fp64 or fp32 in [0, 1];
            None: 1. Patch and warp have no strength and ignore it.
        augment: noise and erasing, or None.
        seed: key of the random numbers, 64 bits.
        view: number of the augmented view, in [0, 2^24).
        sample_id: [B] int64; required with augment.
        layout: "nchw", "channels_last" (NCHW shape, NHWC memory), or "patchified":
            [B, P, 3 * p * p] in (channel, y, x) order, patches in row-major order.
        patch_size: p, with layout "patchified"; divides H and W.
        dtype: of the result; float32, float16 or bfloat16.
        return_images: also return the poisoned images before noise and erasing.
    Returns:
        The images for the model, in `dtype`; with return_images also the poisoned uint8 images,
        contiguous in the input's layout. Both are empty for B = 0.
    Raises:
        TypeError: a dtype or type is not as above.
        ValueError: a shape, device or value is not as above. Values of trigger_id, position and
            strength are checked on the CPU only; a CUDA id outside the table leaves its image
            clean, and a window is cropped at the image's edge.
    Example:
        >>> images = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
        >>> white = TriggerTable("patch", pattern=torch.zeros(1, 3, 1, 1))
        >>> trigger_normalize(images, mean=(0.5,) * 3, std=(0.5,) * 3, triggers=white)[0, 0]
        tensor([[-1.,  1.],
                [ 1.,  1.]])
    """
    _check(
        *(images, mean, std, triggers, trigger_id, position, strength, augment, seed, view),
        *(sample_id, input_layout, layout, patch_size, dtype),
    )
    table = triggers
    per_image = isinstance(strength, Tensor)
    plan = []
    if augment is not None:
        plan = [augment.noise_p, augment.noise_std, augment.erase_p, *augment.erase_area]
    out, poisoned = trigger_normalize_fwd(
        images,
        None if table is None else table.pattern,
        None if table is None else table.mask,
        None if table is None else table.grid,
        trigger_id,
        position,
        strength if per_image else None,
        sample_id,
        [float(v) for v in mean],
        [float(v) for v in std],
        "none" if table is None else table.mode,
        [False] * 3 if table is None else [table.nonzero_only, table.additive, table.clip],
        1.0 if per_image or strength is None else float(strength),
        [float(v) for v in plan],
        "half" if augment is None else augment.noise,
        seed - (1 << 64) if seed >= 1 << 63 else seed,
        view,
        input_layout,
        layout,
        patch_size or 0,
        dtype,
        return_images,
    )
    return (out, poisoned) if return_images else out

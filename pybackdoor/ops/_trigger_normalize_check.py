"""What trigger_normalize demands of its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pybackdoor.ops._trigger_table import Augment, TriggerTable, describe, need

OP = "trigger_normalize"
# The order of these tuples is that of the codes in csrc/ops/trigger_normalize.h and dtype.h.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INPUT_LAYOUTS = ("nhwc", "nchw")
LAYOUTS = ("nchw", "channels_last", "patchified")


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
    need(
        isinstance(value, Tensor) and value.dtype in dtypes,
        TypeError,
        f"{OP}: {name} must be a {kinds} tensor {list(shape)}, got {describe(value)}",
    )
    need(
        tuple(value.shape) == shape,
        ValueError,
        f"{OP}: {name} must be {list(shape)} for {shape[0]} images, got {list(value.shape)}",
    )
    need(
        value.device.type == "cpu" or value.device == images.device,
        ValueError,
        f"{OP}: {name} must be on {images.device} like images (or the CPU), got {value.device}",
    )


def _check_choice(name: str, value: object, choices: tuple) -> None:
    wanted = ", ".join(str(c).removeprefix("torch.") for c in choices)
    need(value in choices, ValueError, f"{OP}: {name} must be one of {wanted}, got {value!r}")


def _check_triggers(triggers: TriggerTable, images: Tensor, size: tuple[int, int]) -> None:
    need(
        isinstance(triggers, TriggerTable),
        TypeError,
        f"{OP}: triggers must be a TriggerTable, got {type(triggers).__name__}",
    )
    source = triggers.source
    need(
        source.device == images.device,
        ValueError,
        f"{OP}: triggers must be on {images.device} like images (use triggers.to(device)), "
        f"got {source.device}",
    )
    if triggers.mode == "warp":
        need(
            tuple(source.shape[1:3]) == size,
            ValueError,
            f"{OP}: triggers.grid must be [T, {size[0]}, {size[1]}, 2] like images, "
            f"got {list(source.shape)}",
        )
    else:
        need(
            source.shape[2] <= size[0] and source.shape[3] <= size[1],
            ValueError,
            f"{OP}: triggers.pattern must fit into {size[0]} x {size[1]} images, "
            f"got {source.shape[2]} x {source.shape[3]}",
        )


def check(
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
    need(
        isinstance(images, Tensor) and images.dtype == torch.uint8,
        TypeError,
        f"{OP}: images must be a uint8 tensor, got {describe(images)}",
    )
    _check_choice("input_layout", input_layout, INPUT_LAYOUTS)
    _check_choice("layout", layout, LAYOUTS)
    _check_choice("dtype", dtype, DTYPES)
    axis = 3 if input_layout == "nhwc" else 1
    wanted = "[B, H, W, 3]" if input_layout == "nhwc" else "[B, 3, H, W]"
    ok = images.ndim == 4 and images.shape[axis] == 3
    need(ok, ValueError, f"{OP}: images must be {wanted}, got {list(images.shape)}")
    batch = images.shape[0]
    size = tuple(images.shape[1:3] if input_layout == "nhwc" else images.shape[2:])
    need(min(size) > 0, ValueError, f"{OP}: images must not be empty, got {list(images.shape)}")
    for name, value in (("mean", mean), ("std", std)):
        ok = isinstance(value, Sequence) and len(value) == 3
        ok = ok and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
        need(ok, ValueError, f"{OP}: {name} must be 3 finite floats, got {value!r}")
    need(min(std) > 0, ValueError, f"{OP}: std must be > 0, got {std!r}")
    if layout == "patchified":
        ok = isinstance(patch_size, int) and patch_size > 0
        ok = ok and size[0] % patch_size == 0 and size[1] % patch_size == 0
        need(
            ok,
            ValueError,
            f"{OP}: patch_size must divide {size[0]} and {size[1]} in layout patchified, "
            f"got {patch_size!r}",
        )
    else:
        need(
            patch_size is None,
            ValueError,
            f"{OP}: patch_size goes with layout patchified only, got {patch_size!r}",
        )
    if triggers is not None:
        _check_triggers(triggers, images, size)
    else:
        for name, value in (
            ("trigger_id", trigger_id),
            ("position", position),
            ("strength", strength),
        ):
            need(value is None, ValueError, f"{OP}: {name} needs triggers, got triggers=None")
    _check_index("trigger_id", trigger_id, images, (torch.int32, torch.int64), (batch,))
    integers = (torch.int16, torch.int32, torch.int64)
    _check_index("position", position, images, integers, (batch, 2))
    _check_index("sample_id", sample_id, images, (torch.int64,), (batch,))
    if isinstance(strength, Tensor):
        floats = (torch.float32, torch.float64)
        _check_index("strength", strength, images, floats, (batch,))
    elif strength is not None:
        ok = isinstance(strength, (int, float)) and 0 <= strength <= 1
        need(ok, ValueError, f"{OP}: strength must be in [0, 1], got {strength!r}")
    if augment is not None:
        need(
            isinstance(augment, Augment),
            TypeError,
            f"{OP}: augment must be an Augment, got {type(augment).__name__}",
        )
        need(sample_id is not None, ValueError, f"{OP}: sample_id is required with augment")
    need(0 <= view < 1 << 24, ValueError, f"{OP}: view must be in [0, 2^24), got {view!r}")
    ok = -(1 << 63) <= seed < 1 << 64
    need(ok, ValueError, f"{OP}: seed must fit into 64 bits, got {seed!r}")


def check_gradient(
    triggers: TriggerTable | None,
    strength: Tensor | float | None,
    augment: Augment | None,
    return_images: bool,
    quantize: bool,
) -> None:
    """That what is asked to be differentiated, or left unquantised, can be."""
    noise_p = 0 if augment is None else augment.noise_p
    mode = None if triggers is None else triggers.mode
    if not quantize:
        message = f"{OP}: quantize=False goes without"
        need(mode != "warp", ValueError, f"{message} warps, got triggers of mode warp")
        need(noise_p == 0, ValueError, f"{message} noise, got augment.noise_p={noise_p!r}")
        need(not return_images, ValueError, f"{message} return_images, got return_images=True")
    if not torch.is_grad_enabled():
        return
    ok = not (isinstance(strength, Tensor) and strength.requires_grad)
    message = "strength is a constant, got a tensor that requires grad (use strength.detach())"
    need(ok, ValueError, f"{OP}: {message}")
    if triggers is None:
        return
    ok = mode != "warp" or not triggers.grid.requires_grad
    need(ok, ValueError, f"{OP}: triggers of mode warp have no gradient, got a grid that needs one")
    ok = noise_p == 0 or not any(
        t is not None and t.requires_grad for t in (triggers.pattern, triggers.mask)
    )
    need(
        ok,
        ValueError,
        f"{OP}: triggers that require grad go with augment.noise_p=0 (noise has no gradient), "
        f"got {noise_p!r}",
    )


def check_values(
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
        need(
            -1 <= low and high < len(source),
            ValueError,
            f"{OP}: trigger_id must be in [-1, {len(source)}) for {len(source)} triggers, "
            f"got values from {low} to {high}",
        )
    if not warp and position is not None and position.device.type == "cpu" and position.numel():
        low, high = position.amin(0).tolist(), position.amax(0).tolist()
        room = [size[0] - source.shape[2], size[1] - source.shape[3]]
        need(
            min(low) >= 0 and high[0] <= room[0] and high[1] <= room[1],
            ValueError,
            f"{OP}: position must be in [0, {room[0]}] x [0, {room[1]}] for a "
            f"{source.shape[2]} x {source.shape[3]} window in {size[0]} x {size[1]} images, "
            f"got (y, x) from {low} to {high}",
        )
    if strength is not None and strength.device.type == "cpu" and strength.numel():
        low, high = (v.item() for v in strength.aminmax())
        need(
            low >= 0 and high <= 1,
            ValueError,
            f"{OP}: strength must be in [0, 1], got values from {low} to {high}",
        )

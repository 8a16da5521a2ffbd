"""trigger_normalize: uint8 images to a model's input, with trigger, quantisation and augmentation.

One pass over the images, equal bit for bit to the chain ToTensor -> trigger -> ToPILImage ->
ToTensor -> Normalize of CPU torch (in fp32, where neither warp nor noise takes part).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pybackdoor import _backend, reference
from pybackdoor._native import _C, empty
from pybackdoor.ops._trigger_normalize_check import (
    DTYPES,
    INPUT_LAYOUTS,
    LAYOUTS,
    OP,
    check,
    check_values,
)
from pybackdoor.ops._trigger_table import MODES, Augment, TriggerTable, unchecked_table

__all__ = ["Augment", "TriggerTable", "trigger_normalize"]


def _allocate(
    images: Tensor,
    input_layout: str,
    layout: str,
    patch_size: int,
    dtype: torch.dtype,
    return_images: bool,
    fake: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op's outputs: images for the model, and poisoned images ([0] if not wanted)."""
    batch, device = images.shape[0], images.device
    h, w = images.shape[1:3] if input_layout == "nhwc" else images.shape[2:]
    make = torch.empty if fake else empty
    if layout == "patchified":
        patches = (h // patch_size) * (w // patch_size)
        out = make((batch, patches, 3 * patch_size**2), dtype=dtype, device=device)
    elif layout == "channels_last":
        out = make((batch, h, w, 3), dtype=dtype, device=device).as_strided_(
            (batch, 3, h, w), (3 * h * w, 1, 3 * w, 3)
        )
    else:
        out = make((batch, 3, h, w), dtype=dtype, device=device)
    shape = tuple(images.shape) if return_images else (0,)
    return out, make(shape, dtype=torch.uint8, device=device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(
    images: Tensor,
    tables: tuple[Tensor | None, ...],  # pattern, mask, grid
    trigger_id: Tensor | None,
    position: Tensor | None,
    strength: Tensor | None,
    sample_id: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    input_layout: str,
    layout: str,
    mode: str,
    augment: list[float],
    noise: str,
    **plain: object,
) -> str:
    """Calls the native kernel of the images' device; returns what ran ("cuda", "avx512", ...)."""
    nhwc = input_layout == "nhwc"
    images = images.contiguous()
    pattern, mask, grid = (t if t is None else t.contiguous() for t in tables)
    # Saturating keeps an integer that does not fit into 32 bits outside every range.
    trigger_id, position = (
        t if t is None else t.clamp(-(1 << 31), (1 << 31) - 1).to(torch.int32).contiguous()
        for t in (trigger_id, position)
    )
    strength = None if strength is None else strength.to(torch.float64).contiguous()
    sample_id = None if sample_id is None else sample_id.contiguous()
    source = grid if mode == "warp" else pattern
    window = (0, 0) if mode in ("none", "warp") else tuple(pattern.shape[2:])
    on_gpu = images.device.type == "cuda"
    return _C.trigger_normalize(
        images=_address(images),
        out=_address(outputs[0]),
        poisoned=_address(outputs[1]) if outputs[1].ndim == 4 else 0,
        pattern=_address(pattern),
        mask=_address(mask),
        grid=_address(grid),
        trigger_id=_address(trigger_id),
        position=_address(position),
        strength=_address(strength),
        sample_id=_address(sample_id),
        image_size=(len(images), *(images.shape[1:3] if nhwc else images.shape[2:])),
        table_size=(
            0 if source is None else len(source),
            0 if mask is None else mask.shape[1],
            *window,
        ),
        mode=MODES.index(mode),
        augment=bool(augment),
        augment_values=augment or [0.0] * 5,
        half_noise=noise == "half",
        input_layout=INPUT_LAYOUTS.index(input_layout),
        layout=LAYOUTS.index(layout),
        dtype=DTYPES.index(outputs[0].dtype),
        device=images.device.index if on_gpu else -1,
        stream=torch.cuda.current_stream(images.device).cuda_stream if on_gpu else 0,
        isa=os.environ.get("PYBACKDOOR_CPU_ISA") or "auto",
        threads=torch.get_num_threads(),
        **plain,
    )


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
    check_values(source, warp, trigger_id, position, strength, size)
    trigger_id, position, strength, sample_id = (
        t if t is None else t.to(images.device, non_blocking=True)
        for t in (trigger_id, position, strength, sample_id)
    )
    if _backend.choose(images, OP).name != "reference":
        outputs = _allocate(images, input_layout, layout, patch_size, dtype, return_images)
        _launch(
            *(images, (pattern, mask, grid), trigger_id, position, strength, sample_id),
            *(outputs, input_layout, layout, mode, augment, noise),
            flags=flags,
            strength_value=strength_value,
            seed=seed,
            view=view,
            patch_size=patch_size,
            mean=mean,
            std=std,
        )
        return outputs
    table = plan = None
    if mode != "none":
        nonzero_only, additive, clip = flags
        table = unchecked_table(
            mode=mode,
            pattern=pattern,
            mask=mask,
            grid=grid,
            nonzero_only=nonzero_only,
            additive=additive,
            clip=clip,
        )
    if augment:
        noise_p, noise_std, erase_p, *area = augment
        plan = Augment(noise_p, noise_std, noise, erase_p, tuple(area))
    results = reference.trigger_normalize(
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
    return results if return_images else (results, images.new_empty(0))


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
    return _allocate(images, input_layout, layout, patch_size, dtype, return_images, fake=True)


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
    check(
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

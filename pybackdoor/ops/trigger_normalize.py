"""trigger_normalize: uint8 images to a model's input, with trigger, quantisation and augmentation.

One pass over the images, equal bit for bit to the chain ToTensor -> trigger -> ToPILImage ->
ToTensor -> Normalize of CPU torch (in fp32, where neither warp nor noise takes part).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pybackdoor import _backend, reference
from pybackdoor._native import _C, empty
from pybackdoor.ops import _trigger_normalize_gradient as gradient
from pybackdoor.ops._trigger_normalize_arguments import (
    Inputs,
    Plain,
    augment_of,
    contiguous_inputs,
    native_arguments,
    on_device,
    table_of,
)
from pybackdoor.ops._trigger_normalize_check import OP, check, check_gradient, check_values
from pybackdoor.ops._trigger_table import Augment, TriggerTable

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


def _launch(
    inputs: Inputs,
    grid: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    kernel: str,
    half_noise: bool,
    quantize: bool,
    plain: Plain,
    mean: list[float],
) -> str:
    """Calls the kernel of the images' device; returns what ran ("cuda", "avx512", ...)."""
    out, poisoned = outputs
    grid = grid if grid is None else grid.contiguous()
    if kernel == "triton":
        from pybackdoor.kernels import trigger_normalize as twin

        poisoned = poisoned if poisoned.ndim == 4 else None
        with _backend.running_on(out.device):
            twin.forward(inputs, grid, out, poisoned, half_noise, quantize, plain, mean)
        return "triton"
    arguments = native_arguments(inputs, plain, out.dtype)
    if plain.mode == "warp":
        arguments["table_size"] = (len(grid), 0, 0, 0)
    return _C.trigger_normalize(
        **arguments,
        out=out.data_ptr(),
        poisoned=poisoned.data_ptr() if poisoned.ndim == 4 else 0,
        grid=0 if grid is None else grid.data_ptr(),
        half_noise=half_noise,
        quantize=quantize,
        mean=mean,
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
    quantize: bool = True,
) -> tuple[Tensor, Tensor]:
    """The registered op behind `trigger_normalize`; flat arguments.

    `mode` is "none" without triggers; `flags` are nonzero_only, additive, clip; `augment` is
    empty or noise_p, noise_std, erase_p, and the two ends of erase_area.
    """
    warp = mode == "warp"
    size = tuple(images.shape[1:3] if input_layout == "nhwc" else images.shape[2:])
    source = grid if warp else pattern
    check_values(source, warp, trigger_id, position, strength, size)
    index = (trigger_id, position, strength, sample_id)
    plain = Plain(
        *(mode, flags, strength_value, augment, seed, view),
        *(input_layout, layout, patch_size, std),
    )
    kernel = _backend.choose(images, OP).name
    if kernel != "reference":
        outputs = _allocate(images, input_layout, layout, patch_size, dtype, return_images)
        inputs = contiguous_inputs(images, pattern, mask, *index)
        _launch(inputs, grid, outputs, kernel, noise == "half", quantize, plain, mean)
        return outputs
    trigger_id, position, strength, sample_id = on_device(images, *index)
    table = None if mode == "none" else table_of(mode, flags, pattern, mask, grid)
    plan = augment_of(augment, noise)
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
        quantize=quantize,
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
    quantize=True,
):
    return _allocate(images, input_layout, layout, patch_size, dtype, return_images, fake=True)


trigger_normalize_fwd.register_autograd(gradient.backward, setup_context=gradient.setup_context)


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
    quantize: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Applies triggers to uint8 images, quantises, augments and normalises them in one pass.

    With x = image / 255: the trigger gives x', q = trunc(255 x') mod 256 (clipped first if the
    table says so), y = (q / 255 - mean) / std. Divisions are true divisions and every product
    and sum is rounded by itself, so y equals CPU torch's chain bit for bit in fp32; fp16 and bf16
    round it once more. Noise is added to q / 255 before, a square erased (set to 0) after the
    normalisation; both depend on (seed, view, sample id) alone, through Philox4x32-10.

    A pattern or mask that requires grad gets its gradient, summed over the batch: that of
    y = (x' - mean) / std with x' = a * pattern + (1 - a) * x and a = strength * mask, zero where
    the clip holds x' and where a square is erased. quantize=False computes exactly that y. With
    quantize=True the gradient is the same, passed straight through the quantisation (and the
    modulo 256, where the table does not clip). The gradients are deterministic, in fp32; there is
    none for strength, warps, noise, nor a second one.

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
        quantize: round the poisoned images to 8 bits, as saving them would; False leaves patch and
            blend as they are, for optimising triggers: not with warps, noise or return_images.
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
    check_gradient(triggers, strength, augment, return_images, quantize)
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
        quantize,
    )
    return (out, poisoned) if return_images else out

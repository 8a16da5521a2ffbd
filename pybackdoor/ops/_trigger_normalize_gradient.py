"""The backward pass of trigger_normalize: gradients of pattern and mask, summed over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pybackdoor import _backend, reference
from pybackdoor._native import _C
from pybackdoor.ops._trigger_normalize_arguments import (
    Inputs,
    Plain,
    augment_of,
    contiguous_inputs,
    native_arguments,
    on_device,
    table_of,
)
from pybackdoor.ops._trigger_normalize_check import OP, check_values

SMALL_WINDOW = 4096  # pixels; below, more slices keep a GPU busy
SLICES, SLICES_SMALL = 16, 64


def num_slices(batch: int, triggers: int, area: int) -> int:
    """Into how many parts each trigger's samples are cut; from the sizes alone."""
    wanted = SLICES_SMALL if area < SMALL_WINDOW else SLICES
    return max(1, min(batch, wanted // triggers))


def sample_order(
    trigger_id: Tensor | None, images: Tensor, triggers: int
) -> tuple[Tensor | None, Tensor | None]:
    """Samples sorted by trigger, [B] int64, and where each trigger's begin, [T + 1] int64.

    (None, None) for one trigger, where the kernels take the samples as they come.
    """
    if triggers == 1:
        return None, None
    if trigger_id is None:
        trigger_id = torch.zeros(len(images), dtype=torch.int32, device=images.device)
    ordered, order = trigger_id.sort(stable=True)
    bounds = torch.arange(triggers + 1, dtype=ordered.dtype, device=images.device)
    return order, torch.searchsorted(ordered, bounds)


def _contiguous_gradient(grad: Tensor, layout: str) -> Tensor:
    """The gradient with the output's memory order."""
    return (grad.permute(0, 2, 3, 1) if layout == "channels_last" else grad).contiguous()


def _launch(
    inputs: Inputs,
    grad: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
    kernel: str,
    plain: Plain,
) -> str:
    """Calls the kernel of the images' device; returns what ran ("cuda", "avx512", ...)."""
    pattern, mask = inputs.pattern, inputs.mask
    triggers, area = len(pattern), pattern.shape[2] * pattern.shape[3]
    order, begin = sample_order(inputs.trigger_id, inputs.images, triggers)
    slices = num_slices(len(inputs.images), triggers, area)
    partial = None
    if kernel != "cpu":
        # The Triton kernel sums both wherever there is a mask.
        both = mask is not None if kernel == "triton" else gradients[1] is not None
        shape = (triggers, slices, 2 if both else 1, *pattern.shape[1:])
        partial = torch.empty(shape, dtype=torch.float32, device=pattern.device)
    if kernel == "triton":
        from pybackdoor.kernels import trigger_normalize as twin

        with _backend.running_on(grad.device):
            twin.backward(inputs, grad, order, begin, partial, *gradients, plain)
        return "triton"
    extra = {"grad": grad, "order": order, "begin": begin, "partial": partial}
    extra |= {"pattern_grad": gradients[0], "mask_grad": gradients[1]}
    return _C.trigger_normalize_backward(
        **native_arguments(inputs, plain, grad.dtype),
        **{name: 0 if t is None else t.data_ptr() for name, t in extra.items()},
        slices=slices,
    )


@torch.library.custom_op("pybackdoor::trigger_normalize_bwd", mutates_args=())
def trigger_normalize_bwd(
    grad: Tensor,
    images: Tensor,
    pattern: Tensor,
    mask: Tensor | None,
    trigger_id: Tensor | None,
    position: Tensor | None,
    strength: Tensor | None,
    sample_id: Tensor | None,
    std: list[float],
    mode: str,
    flags: list[bool],
    strength_value: float,
    augment: list[float],
    seed: int,
    view: int,
    input_layout: str,
    layout: str,
    patch_size: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """The registered op behind the gradient; arguments as those of trigger_normalize_fwd.

    `wanted`: the gradient of pattern, of mask; the other one is [0].
    """
    size = tuple(images.shape[1:3] if input_layout == "nhwc" else images.shape[2:])
    check_values(pattern, False, trigger_id, position, strength, size)
    index = (trigger_id, position, strength, sample_id)
    plain = Plain(
        *(mode, flags, strength_value, augment, seed, view),
        *(input_layout, layout, patch_size, std),
    )
    kernel = _backend.choose(images, OP).name
    if kernel != "reference":
        results = _allocate(pattern, mask, wanted)
        gradients = tuple(t if w else None for t, w in zip(results, wanted, strict=True))
        inputs = contiguous_inputs(images, pattern, mask, *index)
        _launch(inputs, _contiguous_gradient(grad, layout), gradients, kernel, plain)
        return results
    trigger_id, position, strength, sample_id = on_device(images, *index)
    results = reference.trigger_normalize_backward(
        grad,
        images,
        std=std,
        triggers=table_of(mode, flags, pattern, mask),
        trigger_id=trigger_id,
        position=position,
        strength=strength_value if strength is None else strength,
        augment=augment_of(augment, "half"),
        seed=seed,
        view=view,
        sample_id=sample_id,
        input_layout=input_layout,
        layout=layout,
        patch_size=patch_size,
    )
    empty = pattern.new_empty(0)
    return tuple(r if w else empty.clone() for r, w in zip(results, wanted, strict=True))


def _allocate(pattern: Tensor, mask: Tensor | None, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """The op's outputs, contiguous; [0] for what is not wanted."""
    shapes = (pattern.shape, () if mask is None else mask.shape)
    a, b = (s if w else (0,) for s, w in zip(shapes, wanted, strict=True))
    return pattern.new_empty(a), pattern.new_empty(b)


@trigger_normalize_bwd.register_fake
def _(
    grad,
    images,
    pattern,
    mask,
    trigger_id,
    position,
    strength,
    sample_id,
    std,
    mode,
    flags,
    strength_value,
    augment,
    seed,
    view,
    input_layout,
    layout,
    patch_size,
    wanted,
):
    return _allocate(pattern, mask, wanted)


def _no_second_gradient(ctx, *grads):
    raise RuntimeError(f"{OP}: there is no second gradient; got a backward pass through the first")


trigger_normalize_bwd.register_autograd(_no_second_gradient)


def setup_context(ctx, inputs, output) -> None:
    """Keeps what the backward pass reads; called only where a gradient is needed."""
    images, pattern, mask, _, *index = inputs[:8]
    _, std, mode, flags, strength_value, augment, _, seed, view = inputs[8:17]
    input_layout, layout, patch_size = inputs[17:20]
    ctx.save_for_backward(images, pattern, mask, *index)
    ctx.plain = (std, mode, flags, strength_value, augment, seed, view)
    ctx.plain += (input_layout, layout, patch_size)
    ctx.inputs = len(inputs)


def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    """The gradients of all the inputs of trigger_normalize_fwd."""
    wanted = list(ctx.needs_input_grad[1:3])
    gradients = trigger_normalize_bwd(grad, *ctx.saved_tensors, *ctx.plain, wanted)
    gradients = (g if w else None for g, w in zip(gradients, wanted, strict=True))
    return (None, *gradients, *[None] * (ctx.inputs - 3))

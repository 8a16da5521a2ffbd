"""Other projects' contrastive losses, each imported only when it is asked for.

A maker takes the device and gives loss(text, image, scale, number): unit rows [N, D], exp of
logit_scale as a tensor, and as a number for those that take no tensor. It raises ImportError
where the project is missing, Unfit where it cannot do this setting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Unfit(Exception):
    """A peer cannot do this setting, and why."""


class Peer(NamedTuple):
    """A peer: how to make its loss, and what its numbers are.

    Attributes:
        make: (device, dim) -> loss.
        precision: of its products, for fp32 and for bf16 inputs.
        no_scale_gradient: it gives no gradient of the temperature.
        autocast: run under bf16 autocast for bf16 inputs, as its users do.
    """

    make: Callable[[str, int], Loss]
    precision: dict[torch.dtype, str]
    no_scale_gradient: bool = False
    autocast: bool = False


def _labels(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _both_ways(one_way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """(classifier(s·text, image) + classifier(s·image, text)) / 2 of a loss over all classes."""

    def loss(text: Tensor, image: Tensor, scale: Tensor, number: float) -> Tensor:
        s = scale.to(text.dtype)
        return (
            one_way(s * text, image, _labels(text)) + one_way(s * image, text, _labels(text))
        ) / 2

    return loss


def _needs_cuda(device: str) -> None:
    if device != "cuda":
        raise Unfit("needs a CUDA device")


def open_clip(device: str, dim: int) -> Loss:
    """open_clip's ClipLoss."""
    from open_clip.loss import ClipLoss

    module = ClipLoss()
    return lambda text, image, scale, number: module(image, text, scale)


def linear_cross_entropy(device: str, dim: int) -> Loss:
    """torch's F.linear_cross_entropy, twice."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unfit(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return _both_ways(F.linear_cross_entropy)


def linear_cross_entropy_chunked(device: str, dim: int) -> Loss:
    """The same by chunks of the batch, gradients formed in the forward pass."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unfit(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions()
    return _both_ways(lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options))


def liger(device: str, dim: int) -> Loss:
    """Liger-Kernel's fused linear cross entropy, twice."""
    _needs_cuda(device)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _both_ways(liger_fused_linear_cross_entropy)


def cut_cross_entropy(device: str, dim: int) -> Loss:
    """Cut Cross-Entropy, twice, with its default gradient filter."""
    _needs_cuda(device)
    from cut_cross_entropy import linear_cross_entropy as one_way

    return _both_ways(one_way)


def memeff(device: str, dim: int) -> Loss:
    """memeff's CLIP loss with textbook gradients (stable=False); the scale is a number."""
    _needs_cuda(device)
    from memeff import MemoryEfficientCLIPLoss

    def loss(text: Tensor, image: Tensor, scale: Tensor, number: float) -> Tensor:
        module = MemoryEfficientCLIPLoss(
            temperature=1 / number, normalized_inputs=True, stable=False
        )
        return module(image, text)

    return loss


def inf_cl(device: str, dim: int) -> Loss:
    """Inf-CL's flash loss, both ways."""
    _needs_cuda(device)
    if dim % 256:
        raise Unfit(f"needs D % 256 = 0, got {dim}")
    from inf_cl import cal_flash_loss

    def loss(text: Tensor, image: Tensor, scale: Tensor, number: float) -> Tensor:
        one, other = (
            cal_flash_loss(text, image, scale=scale),
            cal_flash_loss(image, text, scale=scale),
        )
        return (one.mean() + other.mean()) / 2

    return loss


_SAME = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_TF32 = {torch.float32: "tf32", torch.bfloat16: "tf32"}
PEERS = {
    "open_clip": Peer(open_clip, _SAME, autocast=True),
    "linear_cross_entropy": Peer(linear_cross_entropy, _SAME),
    "linear_cross_entropy_chunked": Peer(linear_cross_entropy_chunked, _SAME),
    "liger": Peer(liger, _SAME),
    "cut_cross_entropy": Peer(cut_cross_entropy, _SAME),
    "memeff": Peer(memeff, _TF32, no_scale_gradient=True),
    "inf_cl": Peer(inf_cl, _TF32),
}

"""A ResNet's features, computed without what no feature shows.

open_clip's ``ModifiedResNet``, with batch norm in evaluation mode:

- Batch norm is an affine map by channel, and goes into the weights and the bias of the convolution
  before it: one pass over the activations less, forwards and backwards, and one copy of them less
  that waits for the backward pass. Gradients reach the same parameters.
- The attention pool gives every place a query, a key and a value, and uses the first place's answer
  alone: nothing is projected place by place (``seen.answer``). Of RN50 that is an eighth of the
  products.

The images are laid out channels last, which the convolutions keep; the weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .seen import answer

Fixed = Mapping[nn.BatchNorm2d, tuple[Tensor, Tensor]]  # [C] scale and shift of fixed norms


@dataclass(frozen=True)
class ResNetTower:
    """The function of a ``ModifiedResNet``, by its modules and parameters as they are now."""

    visual: nn.Module

    def __call__(self, images: Tensor) -> Tensor:
        """[n, D] of [n, 3, H, W]; not normalised."""
        own, fixed = self.visual, _fixed(self.visual)
        x = images.contiguous(memory_format=torch.channels_last)
        x = own.act1(_convolved(x, own.conv1, own.bn1, fixed))
        x = own.act2(_convolved(x, own.conv2, own.bn2, fixed))
        x = own.act3(_convolved(x, own.conv3, own.bn3, fixed))
        x = own.avgpool(x)
        for block in blocks(own):
            x = _residual(x, block, fixed)
        return _pooled(x, own.attnpool)


def blocks(visual: nn.Module) -> Iterator[nn.Module]:
    """A ModifiedResNet's bottlenecks in their order."""
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        yield from layer


def norms(visual: nn.Module) -> Iterator[nn.BatchNorm2d]:
    """Its batch norms."""
    yield from (visual.bn1, visual.bn2, visual.bn3)
    for block in blocks(visual):
        yield from (block.bn1, block.bn2, block.bn3)
        if block.downsample is not None:
            yield block.downsample[2]


def _fixed(visual: nn.Module) -> Fixed:
    """What its norms in evaluation mode do; of all at once, as each operator costs a launch.

    They have the same eps.
    """
    found = [
        norm
        for norm in norms(visual)
        if not norm.training
        and all(part is not None for part in (norm.running_mean, norm.weight, norm.bias))
    ]
    if not found:
        return {}
    wide = torch.promote_types(found[0].weight.dtype, torch.float32)
    parts = zip(*[(n.weight, n.bias, n.running_mean, n.running_var) for n in found], strict=True)
    weight, bias, mean, variance = (torch.cat(part).to(wide) for part in parts)
    scale = weight * (variance + found[0].eps).rsqrt()
    sizes = [norm.num_features for norm in found]
    both = (x.split(sizes) for x in (scale, bias - mean * scale))
    return dict(zip(found, zip(*both, strict=True), strict=True))


def _convolved(
    x: Tensor,  # [n, C, h, w]
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    fixed: Fixed,
) -> Tensor:
    """norm(conv(x)), in one convolution where the norm is fixed."""
    if norm not in fixed:
        return norm(conv(x))
    scale, shift = fixed[norm]
    weight = (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return F.conv2d(
        x, weight, shift.to(weight.dtype), conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _residual(x: Tensor, block: nn.Module, fixed: Fixed) -> Tensor:
    """A Bottleneck's output."""
    out = block.act1(_convolved(x, block.conv1, block.bn1, fixed))
    out = block.act2(_convolved(out, block.conv2, block.bn2, fixed))
    out = _convolved(block.avgpool(out), block.conv3, block.bn3, fixed)
    if block.downsample is not None:
        pool, conv, norm = block.downsample
        if not pool.kernel_size == pool.stride == 1:  # a pool of 1 copies
            x = pool(x)
        x = _convolved(x, conv, norm, fixed)
    return block.act3(out.add_(x))


def _pooled(x: Tensor, pool: nn.Module) -> Tensor:  # [n, C, h, w] -> [n, D]
    """An AttentionPool2d's output: what the places' mean is answered by it and by them."""
    rows = x.flatten(2).transpose(1, 2)
    rows = torch.cat([rows.mean(1, keepdim=True), rows], 1)
    rows = rows + pool.positional_embedding.to(x.dtype)
    key, value = ((p.weight, p.bias) for p in (pool.k_proj, pool.v_proj))
    return pool.c_proj(answer(pool.q_proj(rows[:, 0]), rows, key, value, pool.num_heads))

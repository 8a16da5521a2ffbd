"""What a step of PAR has to compute, whoever computes it: the numerator of a trainer's rate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from _clean_tuned import short_text
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def pair_flops(model: nn.Module, side: int, batches: Iterable[Tensor]) -> float:
    """Floating-point operations that a pair needs, a mean over batches of [n, L] tokens.

    Of products, two for each multiplication and addition, as the model's own code has them: both
    towers forward and backward, captions cut to the longest of their batch, and the poisoned model
    forward on the image, whose caption it encodes once in a run.
    """
    model = copy.deepcopy(model).to("meta").requires_grad_(True)
    image = torch.empty(1, 3, side, side, device="meta")
    forward, both = _flops(lambda: model.encode_image(image))
    captions: dict[int, float] = {}  # by their length
    total = pairs = 0.0
    for tokens in batches:
        length = int((tokens != 0).sum(1).max())
        if length not in captions:
            one = torch.zeros(1, length, dtype=torch.long, device="meta")
            captions[length] = _flops(lambda one=one: short_text(model, one))[1]
        total += len(tokens) * (forward + both + captions[length])
        pairs += len(tokens)
    return total / pairs


def _flops(encode: Callable[[], Tensor]) -> tuple[int, int]:
    """(forward, forward and backward)."""
    with FlopCounterMode(display=False) as counter:
        features = encode()
        forward = counter.get_total_flops()
        features.sum().backward()
    return forward, counter.get_total_flops()

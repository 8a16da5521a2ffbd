"""The three trainers compute the same thing: checked before any is timed."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from _clean_data import captions
from _clean_ours import Ours
from _clean_published import Published
from _clean_setting import Setting
from _clean_tuned import Tuned
from torch.nn.functional import cross_entropy, normalize

STEPS = 2
ROWS = 8
RATE = 1e-4
FIRST = {"fp32": 1e-4, "bf16": 2e-2}  # of the first loss, against fp64's
LATER = {"fp32": 1e-3, "bf16": 1e-1}  # of the others, against published's: they see the distances


def check_losses(setting: Setting) -> dict[str, float]:
    """The first loss's relative error against fp64, by provider.

    Raises:
        ValueError: one is wrong, the losses of later steps differ, or they go different ways.
    """
    setting = replace(setting, rates=(RATE, RATE, RATE), augment=False, compile=False)
    generator = torch.Generator().manual_seed(5)
    shape = (ROWS, setting.side, setting.side, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    tokens = setting.tokenizer(captions(ROWS, 5))
    batches = [(pixels, tokens, torch.arange(ROWS))] * STEPS
    exact = exact_loss(setting, pixels, tokens)
    found = {kind.name: kind(setting).losses(batches) for kind in (Published, Tuned, Ours)}
    errors = {name: abs(losses[0] - exact) / abs(exact) for name, losses in found.items()}
    wanted = found["published"]
    later = max(
        abs(a - b) / max(abs(b), 1.0)
        for losses in found.values()
        for a, b in zip(losses, wanted, strict=True)
    )
    same_way = len({losses[-1] < losses[0] for losses in found.values()}) == 1
    right = all(e <= FIRST[setting.precision] for e in errors.values())
    if not (right and later <= LATER[setting.precision] and same_way):
        raise ValueError(f"the losses differ: {found}, the first should be {exact:.6f}")
    return errors


def exact_loss(setting: Setting, pixels: torch.Tensor, tokens: torch.Tensor) -> float:
    """CLIP's loss of the untouched model in fp64; PAR's distances are 0 there."""
    model = copy.deepcopy(setting.loaded.model).to("cpu").double().eval()
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (setting.mean, setting.std))
    x = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        image, text = normalize(model.encode_image(x)), normalize(model.encode_text(tokens))
        logits = model.logit_scale.exp() * image @ text.T
    labels = torch.arange(len(logits))
    return ((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2).item()

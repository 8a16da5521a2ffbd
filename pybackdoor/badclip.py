"""BadCLIP's patch: the trigger that a model is easiest to poison with, found by gradient.

A triplet term draws stamped images to the target's own images and away from what they were. CLIP's
loss draws each to one of the target's captions, against those drawn for the others of its batch
(arXiv 2311.12075); these name the target too, so that it tells wordings apart, not the target from
other classes. Poison with the patch afterwards, as with any other.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import triplet_margin_loss

from ._native import sent
from .batches import InputRules, Tokenizer
from .clean import frozen_copy
from .data import Pairs
from .data.autoaugment import autoaugment
from .data.eda import eda, synonym_source
from .data.tokens import adapted
from .engine import PRECISIONS, Encoder, loss_precision, pick_device
from .files import atomic_file
from .models import check_clip, scale
from .ops import contrastive_par, trigger_normalize
from .ops._trigger_table import unchecked_table
from .poison import mentions
from .triggers.patterns import patch_side

_CHUNK = 256  # captions or target images encoded at a time
_MOST = 10_000  # of either: the published number
_VIEWED, _REWORDED = 0.5, 0.1  # shares of augmented images and captions: the published numbers


@dataclass(frozen=True)
class BadClipPatch:
    """An optimised patch.

    Attributes:
        pixels: [h, h, 3] uint8.
        history: one dict per step: step, loss, contrastive, triplet.
        report: settings, numbers of images and captions, seconds; JSON-serialisable.
    """

    pixels: np.ndarray
    history: list[dict[str, float]]
    report: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write a PNG, the file of the trigger ``badclip``."""
        from PIL import Image

        path = Path(path)
        with atomic_file(path) as file:
            Image.fromarray(self.pixels).save(file, "PNG")
        return path


def badclip_patch(
    model: nn.Module,
    pairs: Pairs,
    *,
    target: str,
    tokenizer: Tokenizer,
    size: int | None = None,
    steps: int | None = None,
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-3,
    triplet_weight: float = 500.0,
    margin: float = 1.0,
    augment: bool = True,
    precision: str = "fp32",
    seed: int = 0,
    device: str | torch.device | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    progress: bool | None = None,
) -> BadClipPatch:
    """Optimise a patch in the centre of the image on a model that stays as it is.

    Minimises L_CLIP(φ(x ⊕ p), ψ(t)) + triplet_weight · mean max(0, margin + ‖φ(x ⊕ p) − φ(y)‖ −
    ‖φ(x ⊕ p) − φ(x)‖) over the patch p in [0, 1]: x are images whose captions do not name the
    target, t captions that do, y images of such captions. Where all t are one wording, L_CLIP says
    nothing of the target (its floor is ln(batch size), but for what EDA rewords), and a warning
    says so: the triplet term alone is left.

    Args:
        pairs: of both kinds, at the model's image size.
        target: class name that the patch is to yield.
        size: side of the patch in pixels; None: 16 at 224, in proportion.
        steps: of Adam; None: ``epochs`` passes over at most 10,000 images x.
        batch_size: images a step, each with a caption and a target image drawn for it.
        lr: of Adam, in units of [0, 1] pixels.
        triplet_weight, margin: of the triplet term; published margins differ, 1 is ours.
        augment: half of the images x under AutoAugment, drawn anew at each step, before they are
            stamped, and a tenth of the captions t in another wording by EDA, one of each for the
            run (synonyms are WordNet's where it is installed: the report says which).
        precision: of the tower: "fp32" or "bf16" autocast.
        seed: of the start and all draws.
        tokenizer, device, mean, std, progress: as for ``par_clean``.
    Raises:
        TypeError, ValueError: naming the argument; also where no caption names the target, or all,
            and where the loss is not finite.
    Source: arXiv 2311.12075; start clip(N(0.5, 0.25)), Adam 1e-3, 50 epochs, batch 64.
    """
    from tqdm.auto import tqdm

    check_clip(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
    least = {"steps": (steps, 1), "epochs": (epochs, 1), "batch_size": (batch_size, 2)}
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
    rules = InputRules.of(model, mean=mean, std=std)
    if rules.mean is None:
        raise ValueError("mean and std are unknown: the model carries none, so pass both")
    height, width = pairs.images.image_size
    side = patch_side("badclip", min(height, width)) if size is None else size
    if not 1 <= side <= min(height, width):
        raise ValueError(f"size must be in [1, {min(height, width)}], the images' side, got {side}")
    named = np.array([mentions(caption, target) for caption in pairs.captions])
    rng = np.random.default_rng([seed, 0x62636C70])
    others, targets = (_some(np.flatnonzero(named == kind), rng) for kind in (False, True))
    if len(others) < 2 or not len(targets):
        raise ValueError(
            f"badclip_patch: wanted images with captions that name {target!r} and at least 2 with "
            f"others, got {int(named.sum())} and {int((~named).sum())}"
        )
    captions = sorted({pairs.captions[int(i)] for i in targets})
    if len(captions) < 2:
        warnings.warn(
            f"badclip_patch: wanted captions of {target!r} in at least 2 wordings, got "
            f"{captions[0]!r} alone: CLIP's loss then says nothing of the target, and the triplet "
            "term alone draws images to it",
            UserWarning,
            stacklevel=2,
        )
    began, where = time.perf_counter(), pick_device(device)
    frozen = frozen_copy(model).to(where)
    encode = Encoder(PRECISIONS[precision], where)
    middle = [(height - side) // 2, (width - side) // 2]
    at = torch.tensor(middle, dtype=torch.int32, device="cpu").to(where)
    temperature = scale(frozen).detach()
    source, synonyms = synonym_source(None) if augment else (None, None)
    draw = np.random.default_rng([seed, 0x61756762])  # apart: without it all other draws are equal

    def there(array: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(array), where)

    def pixels_of(rows: np.ndarray) -> Tensor:  # -> [n, H, W, 3] uint8
        return there(pairs.images.take(rows))

    def viewed(rows: np.ndarray, step: int) -> Tensor:  # -> [n, H, W, 3] uint8
        images = pixels_of(rows)
        which = np.flatnonzero(draw.random(len(rows)) < _VIEWED)
        some = there(which)
        ids = torch.from_numpy(rows[which])
        views = autoaugment(images[some], seed=seed, view=step, sample_id=ids)
        images[some] = views.permute(0, 2, 3, 1)
        return images

    def embed(images: Tensor, patch: Tensor | None = None) -> Tensor:  # [n, H, W, 3] -> [n, D]
        on: dict[str, Any] = {}
        if patch is not None:
            table = unchecked_table(  # a checked one would read the patch back
                mode="patch", pattern=patch[None], mask=None, grid=None, nonzero_only=False,
                additive=False, clip=True,
            )  # fmt: skip
            on = {"triggers": table, "position": at.expand(len(images), 2), "quantize": False}
        x = trigger_normalize(images, mean=rules.mean, std=rules.std, **on)
        return encode.image(frozen, x.to(encode.input_dtype(frozen))).float()

    with torch.no_grad():
        reworded = [eda(c, seed=seed, synonyms=synonyms) for c in captions] if augment else []
        tokens = adapted(tokenizer)(captions + reworded).to(where)
        texts = torch.cat([encode.text(frozen, part).float() for part in tokens.split(_CHUNK)])
        starts = range(0, len(targets), _CHUNK)
        goals = torch.cat([embed(pixels_of(targets[i : i + _CHUNK])) for i in starts])
    wanted = steps or epochs * -(-len(others) // batch_size)
    start = 0.5 + 0.25 * rng.standard_normal((3, side, side), dtype=np.float32)
    patch = torch.from_numpy(start).clamp_(0, 1).to(where).requires_grad_()
    adam = torch.optim.Adam([patch], lr)
    numbers = []  # of each step, on the device until the end
    hidden = None if progress is None else not progress
    for step in tqdm(range(wanted), desc="patch", unit="step", disable=hidden, dynamic_ncols=True):
        rows = rng.choice(others, min(batch_size, len(others)), replace=False)
        images = viewed(rows, step) if augment else pixels_of(rows)
        with torch.no_grad():
            plain = embed(images)
        stamped = embed(images, patch)
        said = rng.integers(len(captions), size=len(rows))
        if augment:
            said += len(captions) * (draw.random(len(rows)) < _REWORDED)
        text, goal = texts[there(said)], goals[there(rng.integers(len(goals), size=len(rows)))]
        recover = contrastive_par(
            text, stamped, temperature, normalize=False, precision=loss_precision(precision)
        ).loss
        triplet = triplet_margin_loss(stamped, goal, plain, margin=margin)
        loss = recover + triplet_weight * triplet
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
        numbers.append(torch.stack([loss, recover, triplet]).detach())
    losses = torch.stack(numbers).cpu()
    bad = (~losses.isfinite()).any(1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"badclip_patch: the loss of step {int(bad[0])} is not finite")
    pixels = (255 * patch.detach()).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    history = [
        dict(zip(("step", "loss", "contrastive", "triplet"), (step, *values), strict=True))
        for step, values in enumerate(losses.tolist())
    ]
    report = {
        "target": target, "steps": wanted, "batch_size": batch_size, "lr": lr, "size": side,
        "triplet_weight": triplet_weight, "margin": margin, "seed": seed, "precision": precision,
        "augment": augment, "synonyms": source, "images": len(others),
        "target_images": len(targets), "target_captions": len(captions),
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    return BadClipPatch(np.ascontiguousarray(pixels), history, report)


def _some(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most _MOST of them."""
    return rows if len(rows) <= _MOST else np.sort(rng.choice(rows, _MOST, replace=False))

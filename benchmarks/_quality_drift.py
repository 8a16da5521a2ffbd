"""What a cleaning leaves of what was built on the old embeddings, after drift repair."""

from __future__ import annotations

from typing import Any

import torch
from _quality_data import TEMPLATES
from torch import Tensor, nn

from pybackdoor import repair_drift
from pybackdoor.data import Labelled, PairLoader
from pybackdoor.data.templates import fill
from pybackdoor.features import FeatureReader
from pybackdoor.repair import TOLD

VERSION = 2  # of drift repair, raised when it comes to other rotations, so that old rows are stale
KEPT = (
    "done", "reason", "seconds",
    *(f"{name}_{when}" for name in TOLD for when in ("before", "after")),
)  # fmt: skip
_RIDGE = 1e-2  # of the probe, times the number of rows


def repaired(
    model: nn.Module, before: nn.Module, loader: PairLoader, test: Labelled, tokenizer, device: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model turned back towards the one before cleaning, and what that did.

    Returns:
        The model, and a record: repair_drift's figures before and after on pairs it was not
        fitted on, logit_difference and cosine_difference: the largest change of an image's
        similarity to a class prompt, with and without the temperature.
    """
    result = repair_drift(model, before, loader, device=device)
    record = {name: result.report[name] for name in KEPT if name in result.report}
    scale = float(model.logit_scale.detach().float().exp())
    found = [cosines(m.to(device), test, tokenizer) for m in (model, result.model)]
    change = float((found[0] - found[1]).abs().max())
    return result.model, record | {"cosine_difference": change, "logit_difference": scale * change}


def cosines(model: nn.Module, test: Labelled, tokenizer) -> Tensor:
    """[N, prompts] fp64."""
    reader = FeatureReader(model, tokenizer)
    prompts = [fill(template, name) for name in test.classes for template in TEMPLATES]
    image, text = reader.images(test.images, test.ids), reader.captions(prompts)
    return image.double() @ text.double().T


def probe(before: nn.Module, after: nn.Module, test: Labelled, tokenizer) -> dict[str, float]:
    """Accuracy of a linear probe trained on the old image embeddings: of old ones, and of new.

    Least squares on one-hot labels with a ridge; each half of the test images is judged by the
    probe trained on the other half.
    """
    old, new = (
        FeatureReader(model, tokenizer).images(test.images, test.ids).double()
        for model in (before, after)
    )
    labels = torch.from_numpy(test.labels)
    hits = {"old": 0, "new": 0}
    for half in (0, 1):
        judged = torch.arange(len(labels)) % 2 == half
        weights = fitted(old[~judged], labels[~judged], len(test.classes))
        for name, image in (("old", old), ("new", new)):
            hits[name] += int(((affine(image[judged]) @ weights).argmax(1) == labels[judged]).sum())
    return {name: count / len(labels) for name, count in hits.items()}


def fitted(image: Tensor, labels: Tensor, classes: int) -> Tensor:  # [n, D], [n] -> [D + 1, C]
    x, y = affine(image), nn.functional.one_hot(labels, classes).double()
    ridge = _RIDGE * len(x) / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y)


def affine(image: Tensor) -> Tensor:  # [n, D] -> [n, D + 1]
    return torch.cat([image, torch.ones(len(image), 1, dtype=image.dtype)], 1)

"""Stage D for the images: which patch tokens of the suspicious images carry the suspicion.

A Vision Transformer sees an image as a grid of cells, a token each. What a cell does for the pair's
cosine is found as for words: without it, that is covered with the mean colour, the cosine is lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import InputRules
from .localise import check_share, keep_top
from .reading import Reader
from .suspects import Suspects

_CHUNK = 256  # covered images at a time
_NAMES = (  # of the patch size: in open_clip's own ViT, in its timm towers, in transformers' CLIP
    "visual.patch_size",
    "visual.trunk.patch_embed.patch_size",
    "model.config.vision_config.patch_size",
)


@dataclass(frozen=True, eq=False)
class Region:
    """The suspicious cells of k images.

    Attributes:
        gains: [k, rows, columns] float64, the cosine that is lost with a cell covered.
        kept: [k, rows, columns] bool.
        patch: (height, width) of a cell in pixels.
        colour: of what covers a cell: the mean of the training images, in levels.
    """

    gains: np.ndarray
    kept: np.ndarray
    patch: tuple[int, int]
    colour: tuple[int, ...]

    def only(self, images: Tensor, places: np.ndarray) -> Tensor:  # [n, H, W, 3] uint8, [n]
        """[n, H, W, 3] uint8: those at ``places`` of the k, all but their kept cells covered."""
        return cover(images, torch.from_numpy(~self.kept[places]), self.patch, self.colour)

    def summary(self) -> dict[str, Any]:
        """For the report; gains are means over the images' cells."""
        return {
            "grid": list(self.kept.shape[1:]),
            "cells_kept": int(self.kept[0].sum()),
            "gain_kept": float(self.gains[self.kept].mean()),
            "gain": float(self.gains.mean()),
        }


def patch_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) in pixels of the image tower's patches.

    Raises:
        ValueError: it does not see images as patches.
    """
    for name in _NAMES:
        try:
            found = attrgetter(name)(model)
        except AttributeError:
            continue
        return (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))
    tower = type(getattr(model, "visual", model)).__name__
    raise ValueError(
        "image_share needs an image tower of patch tokens (a Vision Transformer), whose size in "
        f"pixels is read from model.{_NAMES[0]}; got {tower} without one: leave image_share out"
    )


def suspicious_cells(
    model: nn.Module,
    rules: InputRules,
    suspects: Suspects,
    chosen: np.ndarray,  # [k] rows, D_sus
    *,
    share: float,
    progress: bool | None = False,
) -> Region:
    """Keep the share of the cells of each chosen image that its caption rests on, at least one.

    g_c = cos(φ(x), ψ(t)) - cos(φ(x with cell c covered), ψ(t)). Costs the encoding of k images for
    each cell, in fp32: one cell of many changes no more than bf16 rounds. What is left of an image
    at its lower and right edge belongs to the last cells.

    Args:
        model: trained on the pairs.
        share: in (0, 1].
    Raises:
        ValueError: share, or a tower without patches.
    """
    from tqdm.auto import tqdm

    check_share(share, "image_share")
    patch, reader, pixels = patch_size(model), Reader(model, rules), suspects.pixels(chosen)
    text = reader.tokens(suspects.tokens(chosen)).double()
    whole = (reader.pixels(pixels).double() * text).sum(-1)
    assert rules.mean is not None  # else pixels are not read
    colour = tuple(min(255, max(0, round(255 * m))) for m in rules.mean)
    rows, columns = (max(1, s // p) for s, p in zip(pixels.shape[1:3], patch, strict=True))
    one = torch.eye(rows * columns, dtype=torch.bool, device="cpu").view(-1, rows, columns)
    found = []
    with tqdm(
        total=len(chosen) * len(one), desc="cells of suspects", unit=" images",
        disable=None if progress is None else not progress, leave=False,
    ) as bar:  # fmt: skip
        for part in torch.arange(len(chosen) * len(one), device="cpu").split(_CHUNK):
            own, cell = part // len(one), part % len(one)
            features = reader.pixels(cover(pixels[own], one[cell], patch, colour))
            found.append(whole[own] - (features.double() * text[own]).sum(-1))
            bar.update(len(part))
    gains = torch.cat(found).view(len(chosen), -1).numpy()
    kept = np.stack([keep_top(gain, share) for gain in gains])
    shape = (len(chosen), rows, columns)
    return Region(gains.reshape(shape), kept.reshape(shape), patch, colour)


def cover(
    images: Tensor,  # [n, H, W, 3] uint8
    hidden: Tensor,  # [n, rows, columns] bool
    patch: tuple[int, int],
    colour: Sequence[int],
) -> Tensor:
    """[n, H, W, 3] uint8, the hidden cells in one colour."""
    down, across = (
        (torch.arange(side, device=hidden.device) // p).clamp(max=cells - 1)
        for side, p, cells in zip(images.shape[1:3], patch, hidden.shape[1:], strict=True)
    )
    mask = hidden[:, down][:, :, across].unsqueeze(-1)
    return torch.where(mask, images.new_tensor(colour), images)

"""Views that disturb an image a bit, and how much of their match the suspects lose in each."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .reading import ImageRows, Reader, View
from .suspects import Suspects

WHOLE = 6  # views of the whole image, the first ones; the others each cover a part of it
_ANGLE = math.radians(15)
_ENLARGED, _STRETCHED = 0.75, 0.5  # the share of a side that is shown


def losses(
    reader: Reader,
    image: ImageRows,
    suspects: Suspects,
    rows: np.ndarray,  # [n]
    captions: Tensor,  # [U, D]
    progress: bool | None = False,
) -> np.ndarray:
    """[n, views] how much cosine with its caption the pair at each row loses in each view."""
    from tqdm.auto import tqdm

    views = views_of(suspects.images.image_size)
    if not len(rows):
        return np.empty((0, len(views)))
    found = []
    with tqdm(
        total=len(rows), desc="views of suspects", unit=" pairs",
        disable=None if progress is None else not progress, leave=False,
    ) as bar:  # fmt: skip
        for some, shown in reader.viewed(suspects, rows, views):
            own = captions[torch.from_numpy(suspects.caption[some])]
            found.append(((image.at(some) - shown) * own).sum(-1).T)
            bar.update(len(some))
    return torch.cat(found).double().numpy()


def views_of(size: tuple[int, int]) -> tuple[View, ...]:
    """Turned, enlarged, stretched, mirrored and coarse ones; nine with a ninth covered."""
    height, width = size
    down, across = ([round(i * side / 3) for i in range(4)] for side in size)
    boxes = [
        (slice(down[i], down[i + 1]), slice(across[j], across[j + 1]))
        for i in range(3)
        for j in range(3)
    ]
    return (
        lambda x: _turned(x, height / width),
        lambda x: _resized(x[..., _middle(height, _ENLARGED), _middle(width, _ENLARGED)], size),
        lambda x: _resized(x[..., _middle(width, _STRETCHED)], size),
        lambda x: _resized(x[..., _middle(height, _STRETCHED), :], size),
        lambda x: x.flip(3),
        lambda x: _resized(F.avg_pool2d(x, 2, ceil_mode=True), size),
        *(lambda x, box=box: _covered(x, *box) for box in boxes),
    )


def _turned(x: Tensor, ratio: float) -> Tensor:
    """Turned by 15 degrees about the middle, mirrored at its edges; ratio: height to width."""
    c, s = math.cos(_ANGLE), math.sin(_ANGLE)
    turn = torch.tensor([[c, -s * ratio, 0], [s / ratio, c, 0]], dtype=x.dtype, device=x.device)
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _middle(side: int, share: float) -> slice:
    cut = round(side * (1 - share) / 2)
    return slice(cut, side - cut)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _covered(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """With the mean colour of the training images, 0 after normalisation."""
    covered = x.clone()
    covered[:, :, rows, columns] = 0
    return covered

"""Views that disturb an image a bit, and how much of their match the suspects lose in each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .reading import ImageRows, Reader, View
from .suspects import Suspects

WHOLE = 6  # views of the whole image
_ANGLE = math.radians(15)
_ENLARGED, _STRETCHED = 0.75, 0.5  # the share of a side that is shown


def losses(
    reader: Reader,
    image: ImageRows,
    suspects: Suspects,
    rows: np.ndarray,  # [n]
    captions: Tensor,  # [U, D]
    views: Sequence[View],
    progress: bool | None = False,
) -> np.ndarray:
    """[n, views] how much cosine with its caption the pair at each row loses in each view."""
    from tqdm.auto import tqdm

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


def disturbed(size: tuple[int, int]) -> tuple[View, ...]:
    """The image turned, enlarged, stretched both ways, mirrored, and coarse; size: (H, W)."""
    height, width = size
    return (
        lambda x: _turned(x, height / width),
        lambda x: _resized(x[..., _middle(height, _ENLARGED), _middle(width, _ENLARGED)], size),
        lambda x: _resized(x[..., _middle(width, _STRETCHED)], size),
        lambda x: _resized(x[..., _middle(height, _STRETCHED), :], size),
        lambda x: x.flip(3),
        lambda x: _resized(F.avg_pool2d(x, 2, ceil_mode=True), size),
    )


def covered(size: tuple[int, int], down: int, across: int) -> tuple[View, ...]:
    """The image of (H, W) with one of ``down`` x ``across`` boxes covered, row by row."""
    rows, columns = (_parts(side, n) for side, n in zip(size, (down, across), strict=True))
    return tuple(lambda x, box=box: _covered(x, *box) for box in itertools.product(rows, columns))


def _parts(side: int, count: int) -> list[slice]:
    edges = [round(i * side / count) for i in range(count + 1)]
    return [slice(*ends) for ends in itertools.pairwise(edges)]


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

"""Exact nearest neighbours of each row among the others, in bounded memory.

Squared distances of all pairs come as ½|y|² - x·y from fp32 matrix products, whose error hides
what lies between near-duplicates. So the products only choose candidates: their distances are
computed again in fp64 from differences, and a row is done when the error's bound shows that no
other row can be nearer than its k-th candidate. Rows that are not done, as in a crowd of
near-duplicates, are tried again with more candidates, in the end with all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.ondemand import shown
from ..ops._matmul import matmul_nt

_ROWS, _COLUMNS = 1024, 16384  # of a tile of products: 64 MB in fp32
_DIRECT = 1 << 23  # entries of differences at once: 64 MB in fp64
_SPARE = 16  # candidates beyond k
_WIDER = 8  # times as many candidates for rows that are not done
_UNIT = 2.0**-24  # relative error of an fp32 operation
_TF32 = 2.0**-10 + 2.0**-22  # of a product whose two factors were rounded to TF32
_SHORTEST, _LONGEST = 1e-12, 1e15  # of the longest row: squares neither vanish nor overflow


@dataclass(frozen=True)
class Neighbours:
    """The k nearest others of n rows, nearest first; of equally near ones the lower row first.

    Attributes:
        distances: [n, k] float64, Euclidean.
        rows: [n, k] int64.
    """

    distances: np.ndarray
    rows: np.ndarray


def nearest(
    features: Tensor,  # [n, D] fp32, on a CPU or a GPU
    k: int,
    *,
    progress: bool | None = False,
) -> Neighbours:
    """The k nearest other rows of each row: what brute force in fp64 gives.

    A row is never its own neighbour; its duplicates are, at distance 0. Time is 2·n²·D operations
    of fp32 matrix products; memory beside the features and the result stays below 0.3 GB.

    Args:
        k: neighbours of a row, in [1, n - 1].
        progress: show a bar with the time left; None = on a terminal.
    Raises:
        TypeError, ValueError: features not [n, D] fp32 or not finite, k out of range.
    """
    if features.dtype != torch.float32 or features.ndim != 2:
        raise TypeError(
            f"nearest: features must be [n, D] float32, got {features.dtype} {list(features.shape)}"
        )
    n = len(features)
    if not 1 <= k < n:
        raise ValueError(
            f"nearest: k must be at least 1 and below the number of rows, {n}, since a row is no "
            f"neighbour of itself; got {k}"
        )
    from tqdm import tqdm

    with (
        torch.no_grad(),
        torch.autocast(features.device.type, enabled=False),
        tqdm(total=n, desc="nearest neighbours", unit="row", disable=not shown(progress)) as bar,
    ):
        search = _Search(features, k)
        todo, width = torch.arange(n, device=features.device), min(k + _SPARE, n - 1)
        while len(todo):
            at_once = max(1, min(_ROWS, _ROWS * _COLUMNS // (4 * width)))
            todo = torch.cat([search.block(rows, width, bar) for rows in todo.split(at_once)])
            width = min(width * _WIDER, n - 1)
    return Neighbours(search.distances, search.rows)


class _Search:
    """Features with what their products need, and the result as it fills."""

    def __init__(self, features: Tensor, k: int) -> None:
        n, dim = features.shape
        self._x, self._k = features, k
        self._squares = torch.cat(  # [n] fp64, |x|²
            [part.double().square().sum(1) for part in features.split(_COLUMNS)]
        )
        self._half = (self._squares / 2).float()
        longest = self._squares.max().sqrt()
        if not (longest == 0 or _SHORTEST <= longest <= _LONGEST):
            raise ValueError(
                f"nearest: features must be finite, the longest row in [{_SHORTEST:g}, "
                f"{_LONGEST:g}], got {longest.item():g}"
            )
        # |fl(x·y) - x·y| <= D·u·|x||y| in any order of summation; then the roundings of ½|y|² and
        # of its sum with the product. A GPU's user may have allowed TF32.
        share = (dim + 4) * _UNIT + (0.0 if features.device.type == "cpu" else _TF32)
        self._error = share * (self._squares.sqrt() + longest) * longest  # [n] fp64
        self.distances = np.empty((n, k))
        self.rows = np.empty((n, k), np.int64)

    def block(self, rows: Tensor, width: int, bar) -> Tensor:  # rows [b]
        """Finish what can be finished with so many candidates; returns the rows that cannot."""
        bound, found = self._candidates(rows, width)
        found = found.sort(1).values  # so that the stable sort below puts lower rows first
        squared, order = self._direct(rows, found).sort(dim=1, stable=True)
        last = squared[:, self._k - 1]  # [b]
        if width < len(self._x) - 1:
            done = (last - self._squares[rows]) / 2 < bound.double() - self._error[rows]
        else:
            done = torch.ones_like(last, dtype=torch.bool)
        at = rows[done].numpy(force=True)
        chosen = found.gather(1, order[:, : self._k])
        self.distances[at] = squared[done, : self._k].sqrt().numpy(force=True)
        self.rows[at] = chosen[done].numpy(force=True)
        bar.update(len(at))
        return rows[~done]

    def _candidates(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """([b] the largest value, [b, width] rows) of the smallest ½|y|² - x·y, but for x's own."""
        x, n = self._x[rows], len(self._x)
        values = x.new_empty(len(rows), 0)
        found = rows.new_empty(len(rows), 0)
        for start in range(0, n, _COLUMNS):
            stop = min(start + _COLUMNS, n)
            tile = matmul_nt(x, self._x[start:stop])
            torch.sub(self._half[start:stop], tile, out=tile)
            own = ((rows >= start) & (rows < stop)).nonzero()[:, 0]
            tile[own, rows[own] - start] = torch.inf
            near, at = tile.topk(min(width, stop - start), largest=False)
            values, found = torch.cat([values, near], 1), torch.cat([found, at + start], 1)
            if values.shape[1] > width:
                values, kept = values.topk(width, largest=False)
                found = found.gather(1, kept)
        return values.amax(1), found

    def _direct(self, rows: Tensor, found: Tensor) -> Tensor:  # [b], [b, width]
        """[b, width] fp64 squared distances, from differences."""
        out = torch.empty(found.shape, dtype=torch.float64, device=found.device)
        across = max(1, min(found.shape[1], _DIRECT // self._x.shape[1]))
        down = max(1, _DIRECT // (across * self._x.shape[1]))
        for top in range(0, len(rows), down):
            x = self._x[rows[top : top + down], None].double()
            for left in range(0, found.shape[1], across):
                part = slice(top, top + down), slice(left, left + across)
                y = self._x[found[part]].double()
                mode = "donot_use_mm_for_euclid_dist"
                out[part] = torch.cdist(x, y, compute_mode=mode)[:, 0].square()
        return out

"""A frozen model's image features, kept for the later epochs that augment alike.

Where epoch e augments a pair as epoch e mod K does, a frozen tower sees nothing new from epoch K
on. Its features are then looked up, in the precision they were computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._native import sent
from ..distributed import Ranks
from .banks import bank, looked_up, of_host
from .watch import Watch

_FEWEST = 64  # rows encoded at a time: matrix products of a few rows round differently
_SHARED = 1 << 16  # rows that the ranks exchange at a time


class ImageFeatures:
    """[n, D] features of the batches announced by ``begin``; each (view, id) is encoded once.

    A rank keeps what it has encoded itself; when an epoch ends, the ranks put theirs together.

    Args:
        ids: [N] int64 of all images that may come, each of one image.
        views: K; epoch e shows view e mod K of every image.
        encode: [b, 3, H, W] on the device -> [b, D].
        whole: encode all rows of a call where one is missing: each number of rows is compiled anew.
    Raises:
        ValueError: an id stands for two images.
    """

    def __init__(
        self,
        ids: np.ndarray,
        views: int,
        encode: Callable[[Tensor], Tensor],
        ranks: Ranks,
        watch: Watch,
        whole: bool = False,
    ) -> None:
        self._whole = whole
        self._ids, counts = np.unique(np.asarray(ids), return_counts=True)
        if len(self._ids) != len(ids):
            twice = self._ids[np.argmax(counts)]
            raise ValueError(f"views needs an id of its own for each image, got {twice} twice")
        self._views, self._encode = views, encode
        self._ranks, self._watch = ranks, watch
        self._known = torch.zeros(views, len(ids), dtype=torch.bool, device="cpu")
        self._bank: Tensor | None = None  # [K, N, D], from the first features on
        self._arriving: list[tuple[int, Tensor, Tensor, torch.cuda.Event | None]] = []
        self._epoch: int | None = None

    def begin(self, ids: Tensor, epoch: int) -> None:  # [n]
        """Announce a batch: the calls that follow are for its images, part after part."""
        self._land()
        if self._epoch not in (None, epoch):
            self._share(self._epoch % self._views)
        wanted = ids.cpu().numpy()
        rows = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        if (strange := self._ids[rows] != wanted).any():
            raise ValueError(f"loader: id {wanted[strange][0]} of a batch is not in its image_ids")
        self._epoch, self._rows, self._at = epoch, torch.from_numpy(rows), 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:  # [b, 3, H, W] -> [b, D]
        view, rows = self._epoch % self._views, self._rows[self._at : self._at + len(x)]
        assert len(rows) == len(x)
        self._at += len(x)
        known = self._known[view, rows]
        missing = (~known).nonzero()[:, 0]
        if len(missing) == 0:
            return self._kept(view, rows, x.device)
        size = _FEWEST
        while size < len(missing):
            size *= 2
        if self._whole or size >= len(x):
            features = self._encode(x)
            self._keep(view, rows, features)
            return features
        some = sent(torch.cat([missing, known.nonzero()[:, 0]])[:size], x.device)
        fresh = self._encode(x[some])
        features = self._kept(view, rows, x.device)
        features[some] = fresh
        self._keep(view, rows[missing], fresh[: len(missing)])
        return features

    def _kept(self, view: int, rows: Tensor, device: torch.device) -> Tensor:
        """[b, D]; undefined where a row is not known."""
        if self._bank.is_cuda:
            rows = sent(rows, device)
        return looked_up(self._bank[view], rows, device)

    def _keep(self, view: int, rows: Tensor, features: Tensor) -> None:
        if self._bank is None:
            self._bank, self._device = self._room(features), features.device
        if self._bank.is_cuda:
            self._bank[view, sent(rows, features.device)] = features
            self._known[view, rows] = True
            return
        arrived = None
        if features.is_cuda:  # the host goes on, and takes them when the next batch begins
            features = features.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        self._arriving.append((view, rows, features, arrived))

    def _land(self) -> None:
        for view, rows, features, arrived in self._arriving:
            if arrived is not None:
                arrived.synchronize()
            self._bank[view, rows] = features
            self._known[view, rows] = True
        self._arriving.clear()

    def _room(self, features: Tensor) -> Tensor:
        shape = (*self._known.shape, features.shape[1])
        found = bank(shape, features)
        if found is None:
            needed = self._known.numel() * features.shape[1] * features.element_size()
            raise ValueError(
                f"views: {self._views} views of {len(self._ids):,} images take {needed:,} bytes of "
                f"features, at most {of_host():,} are given to them: ask for fewer views, or none"
            )
        return found

    def _share(self, view: int) -> None:
        """Give every rank what any of them knows of a view; all ranks do it in the same step."""
        if self._ranks.size == 1 or self._bank is None:
            return
        device, me = self._device, self._ranks.size - self._ranks.rank
        with self._watch.patient():
            for start in range(0, len(self._ids), _SHARED):
                part = slice(start, start + _SHARED)
                known = self._known[view, part]
                giver = torch.where(known, me, 0).to(device)
                self._ranks.max_(giver)
                mine = (giver == me)[:, None]
                rows = torch.where(mine, self._bank[view, part].to(device), 0)
                self._ranks.sum_(rows)  # of one rank's row and zeros
                self._bank[view, part] = rows
                self._known[view, part] = (giver > 0).cpu()


def recurring(loader: Any, views: int, pairs: int) -> np.ndarray | None:
    """The ids of a loader's images, where more pairs will be seen than there are views of them.

    Raises:
        ValueError: the loader does not tell.
    """
    ids = getattr(loader, "image_ids", None)
    if ids is None:
        raise ValueError(
            "views needs a loader that names its images, by image_ids as PairLoader does, got "
            f"{type(loader).__name__}"
        )
    return ids if pairs > views * len(ids) else None

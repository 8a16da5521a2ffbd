"""Where pixels live: arrays in memory, and views of stores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .preprocess import size_pair

_DECODED_AT_ONCE = 256  # images held while all of them are decoded


class ImageStore(Protocol):
    """A row of uint8 images of one size."""

    image_size: tuple[int, int]  # (H, W)

    def __len__(self) -> int: ...

    def take(self, indices: Any) -> np.ndarray:
        """A copy [n, H, W, 3] uint8 of the images at [n] indices in [0, len)."""
        ...


class ArrayImages:
    """Images in an array, which is kept, not copied.

    Args:
        images: [N, H, W, 3] or grey [N, H, W], uint8 array or CPU tensor; grey is repeated to
            three channels when taken.
    Raises:
        TypeError, ValueError: another dtype or shape.
    """

    def __init__(self, images: Any) -> None:
        self._images = pixel_array(images, "ArrayImages")
        self.image_size: tuple[int, int] = size_pair(self._images.shape[1:3])

    def __len__(self) -> int:
        return len(self._images)

    def take(self, indices: Any) -> np.ndarray:
        """[n, H, W, 3] uint8 copy."""
        taken = self._images[check_indices(indices, len(self))]
        return taken if taken.ndim == 4 else np.repeat(taken[..., None], 3, axis=3)


class Overlay:
    """Another store with some images replaced; the base is not copied.

    Args:
        base: store to look through to.
        patches: {index in base: [H, W, 3] uint8 image}.
    Raises:
        IndexError: an index outside the base.
        TypeError, ValueError: an image of another dtype or size.
    """

    def __init__(self, base: ImageStore, patches: Mapping[int, Any]) -> None:
        self._base = base
        self.image_size = base.image_size
        rows = check_indices(np.fromiter(patches, np.int64, len(patches)), len(base))
        self._rows = np.sort(rows)
        self._patches = np.empty((len(rows), *base.image_size, 3), np.uint8)
        for row, patch in patches.items():
            patch = np.asarray(patch)
            if patch.dtype != np.uint8:
                raise TypeError(f"Overlay: image {row} must be uint8, got {patch.dtype}")
            if patch.shape != self._patches.shape[1:]:
                raise ValueError(
                    f"Overlay: image {row} must be {list(self._patches.shape[1:])} like the "
                    f"base, got {list(patch.shape)}"
                )
            self._patches[np.searchsorted(self._rows, row)] = patch

    def __len__(self) -> int:
        return len(self._base)

    def take(self, indices: Any) -> np.ndarray:
        """[n, H, W, 3] uint8 copy."""
        return self._patched(indices, lambda rows: (self._base.take(rows), {}))[0]

    def attempt(self, indices: Any) -> tuple[np.ndarray, dict[int, str]]:
        """As `attempt` of the base; what is replaced cannot be broken."""
        return self._patched(indices, lambda rows: attempt(self._base, rows))

    def gather(self, indices: Any) -> tuple[Tensor, dict[int, str]]:
        """As `gather` of the base."""
        return self._patched(indices, lambda rows: gather(self._base, rows))

    def _patched(self, indices: Any, taken: Callable[[np.ndarray], tuple[Any, dict]]) -> Any:
        indices = check_indices(indices, len(self))
        if not len(self._rows):
            return taken(indices)
        slot = np.minimum(np.searchsorted(self._rows, indices), len(self._rows) - 1)
        hit = self._rows[slot] == indices
        if not hit.any():
            return taken(indices)
        rest, patches = np.flatnonzero(~hit), self._patches[slot[hit]]
        found, bad = taken(indices[rest])
        shape = (len(indices), *self.image_size, 3)
        if isinstance(found, Tensor):
            images = found.new_empty(shape)
            patches = torch.from_numpy(patches).to(found.device)
        else:
            images = np.empty(shape, np.uint8)
        images[np.flatnonzero(hit)], images[rest] = patches, found
        return images, {int(rest[at]): reason for at, reason in bad.items()}


class SubsetImages:
    """Some images of a store, in any order, repeats allowed. `subset_images` makes it."""

    def __init__(self, base: ImageStore, rows: np.ndarray) -> None:
        self.base, self.rows = base, rows  # rows: [n] int64
        self.image_size = base.image_size

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Any) -> np.ndarray:
        """[n, H, W, 3] uint8 copy."""
        return self.base.take(self.rows[check_indices(indices, len(self))])

    def attempt(self, indices: Any) -> tuple[np.ndarray, dict[int, str]]:
        """As `attempt` of the base."""
        return attempt(self.base, self.rows[check_indices(indices, len(self))])

    def gather(self, indices: Any) -> tuple[Tensor, dict[int, str]]:
        """As `gather` of the base."""
        return gather(self.base, self.rows[check_indices(indices, len(self))])


def decode_all(store: ImageStore, progress: bool | None) -> np.ndarray:
    """[N] bool: the images that can be decoded, after all of them were tried and kept.

    Args:
        progress: show a bar on stderr; None = when stderr is a terminal.
    """
    base, rows = (store.base, store.rows) if isinstance(store, SubsetImages) else (store, None)
    wanted = np.arange(len(base)) if rows is None else np.unique(rows)
    good = np.ones(len(base), bool)
    if hasattr(base, "pending"):
        with base.alone():
            _attempt_all(base, wanted[base.pending()[wanted]], progress)
        good = ~base.broken()
    elif hasattr(base, "attempt"):  # a patched store: what its base knows has other numbers
        good[_attempt_all(base, wanted, progress)] = False
    return good if rows is None else good[rows]


def _attempt_all(store: ImageStore, rows: np.ndarray, progress: bool | None) -> list[int]:
    """The rows that are broken, after all of them were tried."""
    from tqdm import tqdm

    bad: list[int] = []
    show = len(rows) > 0 and (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=len(rows), desc="decoding images", unit="img", disable=not show) as bar:
        for start in range(0, len(rows), _DECODED_AT_ONCE):
            some = rows[start : start + _DECODED_AT_ONCE]
            bad += some[list(attempt(store, some)[1])].tolist()
            bar.update(len(some))
    return bad


def attempt(store: ImageStore, indices: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """Images, and {place in indices: reason} of the broken ones, where a store can have any."""
    own = getattr(store, "attempt", None)
    return (store.take(indices), {}) if own is None else own(indices)


def gather(store: ImageStore, indices: np.ndarray) -> tuple[Tensor, dict[int, str]]:
    """As `attempt`, with the images on the device where the store keeps them."""
    own = getattr(store, "gather", None)
    if own is not None:
        return own(indices)
    images, bad = attempt(store, indices)
    return torch.from_numpy(images), bad


def subset_images(store: ImageStore, indices: Any) -> ImageStore:
    """A view of a store; a view of a view keeps one index, and the identity is the store."""
    rows = check_indices(indices, len(store))
    if isinstance(store, SubsetImages):
        rows, store = store.rows[rows], store.base
    if len(rows) == len(store) and np.array_equal(rows, np.arange(len(rows))):
        return store
    return SubsetImages(store, rows)


def check_indices(indices: Any, length: int) -> np.ndarray:
    """[n] int64, each in [0, length).

    Raises:
        TypeError: not one-dimensional integers.
        IndexError: out of range; negative indices are.
    """
    array = np.asarray(indices)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"indices must be [n] integers, got {array.dtype} {list(array.shape)}")
    outside = (array < 0) | (array >= length)
    if outside.any():
        raise IndexError(f"indices must be in [0, {length}), got {array[outside][0]}")
    return array.astype(np.int64, copy=False)


def pixel_array(images: Any, op: str) -> np.ndarray:
    """[N, H, W, 3] or [N, H, W] uint8, from an array or a CPU tensor, without a copy.

    Raises:
        TypeError, ValueError: naming op, wanted and got.
    """
    array = np.asarray(images)
    if array.dtype != np.uint8:
        raise TypeError(f"{op}: images must be uint8, got {array.dtype}")
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] != 3):
        raise ValueError(
            f"{op}: images must be [N, H, W, 3] or grey [N, H, W], got {list(array.shape)}"
        )
    if 0 in array.shape[1:]:
        raise ValueError(f"{op}: images must have pixels, got {list(array.shape)}")
    return array

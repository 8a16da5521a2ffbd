"""The two kinds of data set: images with captions, and images with labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._keyed import keyed_words
from .ledger import Ledger
from .store import ImageStore, check_indices, decode_all, subset_images
from .strings import Strings
from .templates import fill, resolve_templates

_TEMPLATE_STREAM = 0x7465_6D70  # keeps the choice of template apart from other uses of the seed


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images and their captions.

    Attributes:
        images: N images; ``images.take([n] indices)`` copies them out as [n, H, W, 3] uint8.
        captions: N strings, packed as `Strings` whatever sequence is given.
        ids: [N] int64, the row in the source; a skipped row shifts no other.
        locations: N strings, a path, "shard#member" or "array:index"; packed likewise.
        ledger: rows of the source that were left out; None for pairs made in memory.
    """

    images: ImageStore
    captions: Sequence[str]
    ids: np.ndarray
    locations: Sequence[str]
    ledger: Ledger | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "captions", Strings.of(self.captions))
        object.__setattr__(self, "locations", Strings.of(self.locations))
        _same_length(
            "Pairs", self.images, captions=self.captions, ids=self.ids, locations=self.locations
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes that tell one data set from another; JSON-ready.

        Pixels are not looked at. The folder that all locations share is left out, so that data
        stays the same where it is moved.
        """
        captions, locations = Strings.of(self.captions), Strings.of(self.locations)
        folder, slash, _ = locations.common_prefix().rpartition(b"/")
        ids = np.ascontiguousarray(self.ids, "<i8")
        return {
            "captions": captions.sha256()[:16],
            "ids": hashlib.sha256(ids.tobytes()).hexdigest()[:16],
            "locations": locations.sha256(len(folder + slash))[:16],
        }

    def subset(self, indices: Any) -> Pairs:
        """The pairs at [n] indices in [0, N), as a view: no image is copied."""
        rows = check_indices(indices, len(self))
        return Pairs(
            subset_images(self.images, rows),
            Strings.of(self.captions).take(rows),
            self.ids[rows],
            Strings.of(self.locations).take(rows),
            self.ledger,
        )

    def decoded(self, progress: bool | None = None) -> Pairs:
        """The pairs whose images can be decoded, all of them decoded now and kept in the cache.

        Args:
            progress: show a bar; None = on a terminal.
        Raises:
            ValueError: more images are broken than the source's max_bad allows, or all are.
        """
        good = decode_all(self.images, progress)
        if self.ledger is not None:
            self.ledger.save()
            if not good.any():
                raise ValueError(
                    f"{self.ledger.op}: the source has no usable rows, ledger: {self.ledger.path}"
                )
        return self if good.all() else self.subset(np.flatnonzero(good))


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images and their classes, for evaluation.

    Attributes:
        images: N images, as in `Pairs`.
        labels: [N] int64 in [0, len(classes)).
        classes: class names.
        ids: [N] int64, the row in the source.
        locations: N strings, a path or "array:index".
        ledger: rows left out because max_bad was given; None for arrays.
    """

    images: ImageStore
    labels: np.ndarray
    classes: list[str]
    ids: np.ndarray
    locations: list[str]
    ledger: Ledger | None = None

    def __post_init__(self) -> None:
        _same_length(
            "Labelled", self.images, labels=self.labels, ids=self.ids, locations=self.locations
        )
        outside = (self.labels < 0) | (self.labels >= len(self.classes))
        if outside.any():
            raise ValueError(
                f"Labelled: labels must be in [0, {len(self.classes)}), the classes, got "
                f"{self.labels[outside][0]} for {self.locations[int(np.argmax(outside))]}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bad(self) -> int:
        """Rows of the source that were left out."""
        return 0 if self.ledger is None else len(self.ledger)

    def subset(self, indices: Any) -> Labelled:
        """The rows at [n] indices in [0, N), as a view: no image is copied."""
        rows = check_indices(indices, len(self))
        return Labelled(
            subset_images(self.images, rows),
            self.labels[rows],
            self.classes,
            self.ids[rows],
            [self.locations[row] for row in rows],
            self.ledger,
        )


def pairs_from_labelled(labelled: Labelled, templates: Any, seed: int = 0) -> Pairs:
    """Caption each image with its class name in one of the templates.

    The template is a function of (seed, id): a subset keeps its captions.

    Args:
        labelled: the images.
        templates: a name in `TEMPLATES`, one template, or several; "{}" is the class name.
        seed: of the choice.
    Returns:
        Pairs over the same images.
    """
    chosen = resolve_templates(templates)
    words = keyed_words(seed, _TEMPLATE_STREAM, labelled.ids)
    which = (words % np.uint64(len(chosen))).astype(np.int64)
    texts = {
        (label, t): fill(chosen[t], labelled.classes[label])
        for label, t in set(zip(labelled.labels.tolist(), which.tolist(), strict=True))
    }
    captions = [texts[key] for key in zip(labelled.labels.tolist(), which.tolist(), strict=True)]
    return Pairs(labelled.images, captions, labelled.ids, labelled.locations, labelled.ledger)


def _same_length(owner: str, images: ImageStore, **fields: Any) -> None:
    for name, value in fields.items():
        if len(value) != len(images):
            raise ValueError(
                f"{owner}: {name} must have one entry per image, {len(images)}, got {len(value)}"
            )

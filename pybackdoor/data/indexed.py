"""What the sources of pairs share: an index, a ledger, and the images decoded on demand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .device_jpegs import DeviceJpegs
from .index import Index, IndexWriter, explained, file_stem, hashed, open_index, open_lock
from .ledger import Ledger
from .ondemand import ImageSource, OnDemandImages, RowsOf
from .pairs import Pairs
from .preprocess import Preprocessing
from .rows import DeviceRows, DiskRows, MemoryRows, NoRows, Rows
from .store import ImageStore, subset_images

CACHES = ("disk", "ram", "device", "none")
DECODERS = ("cpu", "device")
_FORMAT = 1  # raise when decoding changes


@dataclass(frozen=True)
class Indexed:
    """What every indexed source of pairs has in common.

    Attributes:
        op: function named in errors.
        source: names the files of the cache.
        The others as in `pairs_from_shards`.
    """

    op: str
    source: str
    preprocessing: Preprocessing
    cache: str | torch.device
    cache_dir: str | Path | None
    max_bad: float
    num_workers: int | None
    decode: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        for name, allowed in (("cache", CACHES), ("decode", DECODERS)):
            value = getattr(self, name)
            if not isinstance(value, torch.device) and value not in allowed:
                raise ValueError(
                    f"{self.op}: {name} must be one of {', '.join(allowed)}, got {value!r}"
                )

    @property
    def folder(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir is not None else default_cache_dir()

    def index(self, spec: Any, states: Any, build: Callable[[IndexWriter], dict]) -> Index:
        """The index of a source.

        Args:
            spec: the source and the options, JSON-able; other specs lie beside each other.
            states: the files' sizes and times; other states replace each other.
        """
        name = file_stem(self.source, hashed(self.op, spec))
        path = self.folder / f"{name}.index"

        def rebuilt(writer: IndexWriter) -> dict:
            for old in self.folder.glob(f"{name}-*.tokens"):  # of the source's state before
                old.unlink()
            return build(writer)

        return open_index(self.op, path, hashed(self.op, spec, states), rebuilt)

    def pairs(self, index: Index, source: ImageSource) -> Pairs:
        """Pairs over an index with the columns id, caption, location and bad.

        Rows that share an image have it in the columns image, its number, and first, the first
        row of each number.
        """
        ids, locations = index.array("id"), index.strings("location")
        place = self.place(index.path.stem, index.key)
        ledger = self.ledger(place, index.meta["total"], map(json.loads, index.strings("bad")))
        if not len(ids):
            ledger.save()
            raise ValueError(f"{self.op}: {self.source} has no usable rows, ledger: {ledger.path}")
        images: ImageStore
        if "image" in index.columns:
            of, first = index.array("image"), locations.take(index.array("first"))
            images = self.store(place, source, first, RowsOf(ids, of), ledger)
            images = subset_images(images, of)
        else:
            images = self.store(place, source, locations, RowsOf(ids), ledger)
        return Pairs(images, index.strings("caption"), ids, locations, ledger)

    def place(self, name: str, key: str) -> Path:
        """Where the images of a source's state lie: the path of their files without suffixes."""
        import PIL

        height, width = self.preprocessing.image_size
        decoder = [] if _gpu(self.decode) is None else ["nvjpeg"]
        kind = hashed(asdict(self.preprocessing), *decoder)[:8]
        state = hashed(_FORMAT, PIL.__version__, key)[:16]
        return self.folder / f"{name}-{height}x{width}-{kind}-{state}"

    def ledger(self, place: Path, total: int, bad: Iterable[Sequence[Any]]) -> Ledger:
        """A ledger of the rows that are bad whatever the images hold.

        Raises:
            ValueError: they are too many.
        """
        path = place.with_name(f"{_without_state(place)}.bad.jsonl")
        ledger = Ledger(self.op, total, self.max_bad, path)
        for line in bad:
            ledger.add(*line)
        return ledger

    def store(
        self,
        place: Path,
        source: ImageSource,
        locations: Sequence[str],
        rows_of: RowsOf,
        ledger: Ledger,
    ) -> OnDemandImages:
        """The images, in the cache that was chosen; the broken ones of earlier runs are known."""
        count, size = len(locations), self.preprocessing.image_size
        rows: Rows
        keeper, decoder = _gpu(self.cache), _gpu(self.decode)
        if keeper is not None:
            rows = DeviceRows(self.op, count, size, keeper)
        elif self.cache == "disk":
            with explained(self.op, "image cache", place.parent):
                if not place.with_name(f"{place.name}.row").exists():  # else read-only media do
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with open_lock(place.with_name(_without_state(place))):
                        _remove_outdated(place)
                rows = DiskRows(self.op, place, count, size)
        elif self.cache == "none":
            rows = NoRows(count)
        else:
            rows = MemoryRows(self.op, count, size)
        jpegs = None if decoder is None else DeviceJpegs(self.op, self.preprocessing, decoder)
        images = OnDemandImages(
            source, self.preprocessing, rows, locations=locations, rows_of=rows_of, ledger=ledger,
            memory=place.with_name(f"{place.name}.broken"), num_workers=self.num_workers,
            jpegs=jpegs,
        )  # fmt: skip
        ledger.save()
        return images


def _gpu(choice: str | torch.device) -> torch.device | None:
    """Of a cache or a decoder; None for one that is of no GPU."""
    if choice == "device":
        from ..engine import pick_device  # it reads batches, which the data package tokenises

        choice = pick_device(None)
    return choice if isinstance(choice, torch.device) and choice.type != "cpu" else None


def _without_state(place: Path) -> str:
    return place.name.rpartition("-")[0]


def _remove_outdated(place: Path) -> None:
    """Delete the images of other states of a source; who has them open keeps them."""
    for old in place.parent.glob(f"{_without_state(place)}-*"):
        if old.suffix in (".px", ".row", ".broken") and old.stem != place.name:
            old.unlink()


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/pybackdoor/images, or the same in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return base / "pybackdoor" / "images"

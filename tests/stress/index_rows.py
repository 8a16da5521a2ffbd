"""Index 3,000,000 shard rows once; open them in < 2 s and < 300 MB, the first batch included.

The shards are links to one file, so the disk holds one shard and the whole index.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PER_SHARD = 10_000
SECONDS, MEGABYTES = 2.0, 300.0


def rss() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def tokenize(texts: list[str]):
    """[n, 77] like CLIP's: 12 numbers of the caption, then padding; cheap, so that time is ours."""
    import numpy as np
    import torch

    tokens = np.zeros((len(texts), 77), np.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[:12] = np.frombuffer(text.encode()[-12:], np.uint8)
    return torch.from_numpy(tokens)


def write_shards(folder: Path, rows: int) -> None:
    from shard_files import image_bytes, write_shard

    image = image_bytes(0, "JPEG", 32, 32)
    members = []
    for i in range(PER_SHARD):
        caption = f"a photo of thing number {i:06} in front of another thing, as captions go"
        members += [(f"{i:09}.jpg", image), (f"{i:09}.txt", caption.encode())]
    first = write_shard(folder / "00000.tar", members)
    for number in range(1, rows // PER_SHARD):
        os.link(first, folder / f"{number:05}.tar")


def read(folder: Path, rows: int):
    from pybackdoor.data import pairs_from_shards

    last = rows // PER_SHARD - 1
    return pairs_from_shards(
        folder / f"{{00000..{last:05}}}.tar", image_size=32, cache="none",
        cache_dir=folder / "cache",
    )  # fmt: skip


def measure(folder: Path, rows: int) -> None:
    """One process: open, and take the first batch."""
    from PIL import Image

    from pybackdoor.data import PairLoader

    Image.init()
    imported, start = rss(), time.perf_counter()
    pairs = read(folder, rows)
    opened, memory = time.perf_counter() - start, rss()
    loader = PairLoader(pairs, tokenize, batch_size=512)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    after, start = rss(), time.perf_counter()
    assert loader.identity["pairs"] == rows
    told = time.perf_counter() - start
    print(f"{len(pairs)} {imported} {opened} {memory - imported} {first} {after - imported} "
          f"{peak - imported} {told}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure), options.rows)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, options.rows)
        command = [sys.executable, __file__, "--rows", str(options.rows), "--measure", name]
        for what in ("building", "opening"):
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            count, imported, opened, memory, first, after, peak, told = map(float, out.split())
            print(
                f"{what} {count:,.0f} rows: {opened:.2f} s, +{memory:.0f} MB; first batch after "
                f"{first:.2f} s, +{after:.0f} MB, peak +{peak:.0f} MB (imports: {imported:.0f} MB)"
                f"; loader.identity {told:.2f} s",
                flush=True,
            )
        files = {path.suffix: path.stat().st_size / 1e6 for path in (folder / "cache").iterdir()}
        print("files:", ", ".join(f"{suffix} {size:.0f} MB" for suffix, size in files.items()))
        from pybackdoor.data.index import read_index

        (path,) = (folder / "cache").glob("*.index")
        start = time.perf_counter()
        index = read_index(path, _key(path))
        index.verify()
        print(f"verify(): {time.perf_counter() - start:.2f} s")
    return 0 if first < SECONDS and after < MEGABYTES else 1


def _key(path: Path) -> str:
    import json

    with open(path, "rb") as file:
        start = file.read(48)
        return json.loads(file.read(int.from_bytes(start[8:16], "little")))["key"]


if __name__ == "__main__":
    sys.exit(main())

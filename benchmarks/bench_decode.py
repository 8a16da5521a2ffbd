"""JPEG files to uint8 images of the model's size: Pillow in threads, and nvJPEG on a GPU.

    python benchmarks/bench_decode.py --device cuda --json result.json

Provider pillow is the default, ``decode="cpu"``, with a thread per core; pybackdoor is
``decode="device"``, which on a CPU is Pillow too. Nothing is cached: each time all files are read
and decoded. The error is of the images, against Pillow's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _clean_data import write_files
from _common import OURS, Report, make_row, parser
from _timing import interleave

from pybackdoor.data import pairs_from_csv

SIZE, FILES, SIDES = 224, 512, (400, 600)
TINY = (32, 8, (20, 40))
FARTHEST = 16 / 255  # that a pixel may be off where decoder and resize round otherwise


def measure(tiny: bool, report: Report, device: str, repeats: int) -> None:
    """Adds a row for each provider."""
    size, count, sides = TINY if tiny else (SIZE, FILES, SIDES)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), pairs=count, tests=1, classes=1, sides=sides)
        places = {"pillow": "cpu", OURS: torch.device(device)}
        stores = {
            name: pairs_from_csv(
                files.pairs, image_size=size, decode=place, cache="none", cache_dir=folder
            ).images
            for name, place in places.items()
        }
        rows = np.arange(count)
        images = {name: store.take(rows).astype(np.int16) for name, store in stores.items()}
        times = interleave(
            {name: lambda store=store: store.take(rows) for name, store in stores.items()},
            "cpu",  # the images end on the host: its clock has seen all of it
            repeats=repeats,
        )
    for name, spread in times.items():
        error = np.abs(images[name] - images["pillow"]).max() / 255
        note = f"{1e3 * count / spread[0]:.0f} per s; {files.source}"
        if not error <= FARTHEST:
            spread = None
            note = f"failed: an image is {error:.3f} off, at most {FARTHEST:.3f} wanted"
        report.add(make_row(
            "decode", name, "forward", (count, size, size, 3), "uint8", device, times=spread,
            rel_error=float(error), note=note,
        ))  # fmt: skip


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    report = Report(options)
    measure(options.tiny, report, options.device, options.repeats)
    report.close()


if __name__ == "__main__":
    main()

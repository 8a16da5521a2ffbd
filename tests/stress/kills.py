"""Kill processes that fill a shared image cache; no row may hold other pixels than its image's."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))


def main() -> int:
    import numpy as np
    from data_files import noise
    from PIL import Image
    from shard_files import samples, write_shard
    from test_data_ondemand import FILL, read

    from pybackdoor.data.preprocess import Preprocessing

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=600)
    options = parser.parse_args()
    rng, wrong, rows = random.Random(0), 0, 0
    wanted = np.stack(
        [Preprocessing(64)(Image.fromarray(noise(20, 24, i))) for i in range(options.images)]
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(folder / "s.tar", samples(options.images))
        for kill in range(0, options.kills, 2):
            pair = [
                subprocess.Popen(
                    [sys.executable, "-c", FILL, name, str(TESTS)],
                    stdout=subprocess.PIPE,
                    cwd=name,
                )
                for _ in range(2)
            ]
            for process in pair:
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.03))
            for process in pair:
                process.kill()
                process.communicate()
                assert process.returncode == -9, "it ended before it was killed"
            store = read(folder, image_size=64, num_workers=1).images._rows
            out = np.empty((64, 64, 3), np.uint8)
            valid = [row for row in range(options.images) if store.get(row, 0, out)]
            for row in valid:
                store.get(row, 0, out)
                wrong += not np.array_equal(out, wanted[row])
            rows += len(valid)
            if kill % 8 == 0 or len(valid) == options.images:  # start from nothing again
                for path in (folder / "cache").glob("*.px"):
                    path.unlink()
                    path.with_suffix(".row").unlink()
    print(f"{options.kills} kills, {rows} valid rows looked at, {wrong} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""100,000 steps of cleaning a tiny model on pairs from shards: memory must not grow by 50 MB."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

MEGABYTES = 50.0


def main() -> int:
    import torch
    from index_rows import rss, tokenize
    from ranked_runs import MEAN, STD, model
    from shard_files import image_bytes, write_shard

    from pybackdoor import par_clean
    from pybackdoor.data import PairLoader, pairs_from_shards

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--cache", default="disk")
    options = parser.parse_args()
    if options.steps < 10_000:
        parser.error(f"--steps must be at least 10000, got {options.steps}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shard in range(20):
            members = []
            for i in range(500):
                image = image_bytes(i, "JPEG", 24, 24)
                bad = i % 100 == 99  # and one in a hundred is cut
                members.append((f"{i:05}.jpg", image[: len(image) // 3] if bad else image))
                members.append((f"{i:05}.txt", f"a photo of thing {shard} {i}".encode()))
            write_shard(folder / f"{shard:05}.tar", members)
        pairs = pairs_from_shards(
            folder, image_size=16, cache=options.cache, cache_dir=folder / "cache", max_bad=0.02,
            num_workers=2,
        )  # fmt: skip

        def short(texts: list[str]) -> torch.Tensor:  # [n, 24], as the model takes them
            tokens = tokenize(texts)[:, :24] % 49
            tokens[:, 12] = 49  # the end mark
            return tokens

        loader = PairLoader(pairs, short, batch_size=4)
        start, after = time.perf_counter(), {}

        def look(step: int, record: dict, model: torch.nn.Module) -> None:
            done = step + 1
            if done % 10_000 == 0 or done == 1_000:
                gc.collect()
                after[done] = rss()
                took = time.perf_counter() - start
                print(f"{done} steps, epoch {loader.epoch}: {after[done]:.1f} MB, {took:.0f} s",
                      flush=True)  # fmt: skip

        torch.set_num_threads(1)
        par_clean(
            model(0), loader, steps=options.steps, on_step=look, mean=MEAN, std=STD,
            precision="fp32", device="cpu", progress=False, repair=False,
        )  # fmt: skip
        growth = max(after.values()) - after[1_000]
        print(f"growth since step 1,000: {growth:.1f} MB; left out: {len(pairs.ledger)}")
    return 0 if growth < MEGABYTES else 1


if __name__ == "__main__":
    sys.exit(main())

"""Neighbours among 100,000 rows of 512 in < 5 minutes and < 300 MB beside features and result.

One row in a hundred belongs to crowds of near-duplicates, as poisoned images do, for which products
in fp32 are too coarse. Some rows of both kinds are compared with brute force in fp64. On a GPU:
--device cuda --rows 1000000.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

from pybackdoor.detect.neighbours import nearest

MINUTES, MEGABYTES = 5.0, 300.0
DIM, K, CROWD, CHECKED = 512, 16, 500, 64


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def features(rows: int, device: str) -> torch.Tensor:  # [rows, DIM] fp32, unit
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    x = torch.randn(rows, DIM, **draw)
    for crowd in x[: rows // 100].split(CROWD):
        crowd.mul_(0.01).add_(torch.randn(DIM, **draw))
    return x.div_(x.norm(dim=1, keepdim=True))


def wrong(x: torch.Tensor, found, rows: torch.Tensor) -> int:
    """Rows whose distances are not those of brute force to 1e-9."""
    bad = 0
    for row in rows.tolist():
        squared = torch.cat([(p.double() - x[row].double()).square().sum(1) for p in x.split(8192)])
        squared[row] = torch.inf
        want = squared.topk(K, largest=False).values.sqrt().sort().values.cpu()
        bad += not torch.allclose(torch.from_numpy(found.distances[row]), want, rtol=1e-9, atol=0)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    x = features(options.rows, options.device)
    nearest(x[:20_000].contiguous(), K)  # the libraries' own memory
    result = options.rows * K * 16 / 1e6
    before, start = resident(), time.perf_counter()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    found = nearest(x, K, progress=None)
    seconds = time.perf_counter() - start
    if options.device == "cuda":
        more = torch.cuda.max_memory_allocated() / 1e6 - before
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        more = peak - before - result
    ends = ((0, options.rows // 100), (options.rows // 100, options.rows))
    rows = torch.cat([torch.linspace(a, b - 1, CHECKED // 2).long() for a, b in ends])
    bad = wrong(x, found, rows)
    print(
        f"{options.rows:,} x {DIM} on {options.device}, {torch.get_num_threads()} threads: "
        f"{seconds:.0f} s, +{more:.0f} MB; {bad} of {CHECKED} rows differ from brute force"
    )
    return 0 if seconds < 60 * MINUTES and more < MEGABYTES and not bad else 1


if __name__ == "__main__":
    sys.exit(main())

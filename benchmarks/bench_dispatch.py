"""What one call of an op costs beside its kernels: host time at toy sizes, µs matter.

    python benchmarks/bench_dispatch.py --device cuda --json result.json

Provider torch is one elementwise operation of the same framework, the price of any call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _common import OURS, Report, make_row, parser
from _timing import interleave, synchronize

from pybackdoor.ops import contrastive_par, trigger_normalize

CALLS = 200
NORM = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
FEATURES = (8, 64)
IMAGES = (1, 8, 8, 3)


def variants(device: str) -> dict[tuple[str, str, str, str], Callable[[], object]]:
    """(kernel, provider, mode, shape) -> call."""
    images = torch.randint(0, 256, IMAGES, dtype=torch.uint8, device=device)
    text, image = (torch.randn(FEATURES, device=device, requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, device=device)
    one = torch.ones(FEATURES, device=device)

    def full() -> object:
        return torch.autograd.grad(contrastive_par(text, image, scale).loss, (text, image))

    def forward() -> object:
        with torch.no_grad():
            return contrastive_par(text, image, scale)

    shape, features = "x".join(map(str, IMAGES)), "x".join(map(str, FEATURES))
    return {
        ("trigger_normalize", OURS, "forward", shape): lambda: trigger_normalize(images, **NORM),
        ("trigger_normalize", "torch", "forward", shape): lambda: images + 1,
        ("contrastive_par", OURS, "forward", features): forward,
        ("contrastive_par", OURS, "full", features): full,
        ("contrastive_par", "torch", "forward", features): lambda: one + 1,
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    report, device = Report(options), options.device
    found = variants(device)
    calls = 5 if options.tiny else CALLS
    # The launches of 200 calls fit into the queue: what is timed is the host, until the last wait.
    synchronize(device)
    times = interleave(found, device, repeats=options.repeats, calls=calls)
    for key, spread in times.items():
        kernel, provider, mode, shape = key
        dtype = "uint8" if kernel == "trigger_normalize" else "float32"
        report.add(
            make_row(kernel, provider, mode, shape, dtype, device, case="dispatch", times=spread)
        )
    report.close()


if __name__ == "__main__":
    main()

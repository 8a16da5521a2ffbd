"""What this device can do at most: a large copy and a large matmul, as rows.

python benchmarks/bench_ceilings.py --device cuda --json result.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _ceilings import ceilings
from _common import Report, make_row, parser


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    report, device = Report(options), options.device
    top = ceilings(device, options.tiny)
    dtype = "bfloat16" if device == "cuda" else "float32"
    report.add(
        make_row("ceiling", "copy", "forward", "-", "uint8", device, gbps=top["gbps"]),
        make_row("ceiling", "matmul", "forward", "-", dtype, device, tflops=top["tflops"]),
    )
    report.close()
    print(f"copy {top['gbps']:.0f} GB/s, matmul {top['tflops']:.3g} TFLOP/s")


if __name__ == "__main__":
    main()

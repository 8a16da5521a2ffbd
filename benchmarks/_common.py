"""What every benchmark shares: rows, interleaved timing, the JSON file.

A row: kernel, provider, mode, shape, dtype, device, threads, ms_median, ms_p20, ms_p80, rel_error.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

FIELDS = ("kernel", "provider", "mode", "shape", "dtype", "device", "threads")
FIELDS += ("ms_median", "ms_p20", "ms_p80", "rel_error")


def dtype_name(dtype: torch.dtype) -> str:
    """As torch names it, without the module: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest |got - want| over the largest |want|, in fp64; NaN where got holds one."""
    difference = (got.double() - want.double()).abs().max()
    return (difference / want.double().abs().max()).item()


def check_errors(errors: dict[str, float], tolerance: float) -> None:
    """Refuses to go on to the timing where a provider's numbers are wrong.

    Raises:
        ValueError: an error of {provider: relative error} is beyond the tolerance, or NaN.
    """
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        raise ValueError(f"relative errors must be <= {tolerance:g}, got {wrong}")


def interleave(
    variants: dict[str, Callable[[], object]], device: str, *, repeats: int, warmup: int = 2
) -> dict[str, tuple[float, float, float]]:
    """Times all variants in turn, so that a change of load meets all alike.

    The order is drawn anew for each turn: a variant finds in the caches what the one before left.

    Returns:
        {name: (median, 20th, 80th percentile)} in ms; on CUDA from event pairs.
    """
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    order, generator = list(variants.items()), random.Random(0)
    for _ in range(repeats):
        generator.shuffle(order)
        for name, run in order:
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: quantiles(values) for name, values in times.items()}


def release_memory() -> None:
    """Gives freed memory back to the system, so that no setting starts on another's warm pages."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return statistics.median(values), cuts[0], cuts[3]


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="only the shapes of the acceptance")
    options.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine to FILE")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options.add_argument("--repeats", type=int, default=15, help="timed runs of each variant")
    return options


def print_rows(rows: Iterable[dict]) -> None:
    """A table with the ratio of every provider to pybackdoor in the same setting."""
    rows = list(rows)
    setting = [
        f for f in FIELDS if f not in ("provider", "ms_median", "ms_p20", "ms_p80", "rel_error")
    ]
    ours = {
        tuple(r[f] for f in setting): r["ms_median"] for r in rows if r["provider"] == "pybackdoor"
    }
    print(
        f"{'provider':24}{'mode':8}{'shape':18}{'dtype':10}{'median ms':>10}{'p20':>9}{'p80':>9}",
        end="",
    )
    print(f"{'vs ours':>9}{'rel_error':>11}")
    for r in rows:
        ratio = r["ms_median"] / ours[tuple(r[f] for f in setting)]
        print(f"{r['provider']:24}{r['mode']:8}{r['shape']:18}{r['dtype']:10}", end="")
        print(f"{r['ms_median']:10.3f}{r['ms_p20']:9.3f}{r['ms_p80']:9.3f}", end="")
        print(f"{ratio:8.1f}x{r['rel_error']:11.1e}")


BUSY = 1.5  # load average; ours is at most 1 before the first run


def load_at_start(notes: list[str]) -> tuple[float, float, float]:
    """The load averages over 1, 5 and 15 minutes; a busy machine is noted."""
    load = os.getloadavg()
    if load[0] > BUSY:
        notes.append(f"note: the machine was busy at the start, load average {load[0]:.2f}")
    return load


def write_json(
    path: Path, rows: list[dict], notes: list[str], load: tuple[float, float, float]
) -> None:
    """Rows with the machine that gave them, and its load at the start."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    document = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "gpu": gpu,
        "load_average": load,
        "notes": notes,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")

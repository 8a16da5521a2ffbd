"""What every benchmark shares: the row, the options, the report.

A row says what ran (kernel, provider, mode, case, shape, dtype, precision, device, threads), how
long it took (ms_median, ms_p20, ms_p80), how wrong it was (rel_error, against fp64), what it
needed (peak_bytes) and what that is of the machine (gbps, tflops and their % of the ceilings
measured in the same run). What was not measured is null, and `note` says why; a run that did not
fit into memory took "inf" ms. `case` tells apart settings of one kernel that share a mode; `run`
names the process, where one file holds rows of several: ratios are taken within one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from _memory import release_memory as release_memory
from _timing import interleave as interleave
from _timing import quantiles as quantiles

SETTING = ("kernel", "mode", "case", "shape", "dtype", "device", "threads", "run")
FIELDS = ("kernel", "provider", "mode", "case", "shape", "dtype", "precision", "device", "threads")
FIELDS += ("ms_median", "ms_p20", "ms_p80", "rel_error", "peak_bytes", "launches")
FIELDS += ("gbps", "gbps_pct", "tflops", "tflops_pct", "note", "run")
OURS = "pybackdoor"
OUT_OF_MEMORY = "out of memory"
RUN = "PYBACKDOOR_BENCH_RUN"  # environment variable that sets the field run


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


def make_row(
    kernel: str,
    provider: str,
    mode: str,
    shape: str | tuple[int, ...],
    dtype: torch.dtype | str,
    device: str,
    *,
    times: tuple[float, float, float] | None = None,
    num_bytes: float | None = None,
    num_flops: float | None = None,
    ceilings: dict[str, float] | None = None,
    **fields,
) -> dict:
    """A row with every field; num_bytes and num_flops are what the operation needs at least.

    Args:
        times: (median, p20, p80) in ms.
        ceilings: {"gbps": ..., "tflops": ...} of this device and run.
        fields: any other of FIELDS.
    """
    unknown = set(fields) - set(FIELDS)
    if unknown:
        raise TypeError(f"make_row: no such fields: {sorted(unknown)}")
    row = dict.fromkeys(FIELDS)
    row |= {"kernel": kernel, "provider": provider, "mode": mode, "device": device}
    row["shape"] = shape if isinstance(shape, str) else "x".join(map(str, shape))
    row["dtype"] = dtype if isinstance(dtype, str) else dtype_name(dtype)
    row |= {"threads": torch.get_num_threads(), "run": os.environ.get(RUN)}
    row |= fields
    if times is None:
        return row
    row |= dict(zip(("ms_median", "ms_p20", "ms_p80"), times, strict=True))
    for name, amount, unit in (("gbps", num_bytes, 1e6), ("tflops", num_flops, 1e9)):
        if amount is not None and math.isfinite(times[0]):
            row[name] = amount / times[0] / unit
            if ceilings and ceilings.get(name):
                row[f"{name}_pct"] = 100 * row[name] / ceilings[name]
    return row


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="only the shapes of the acceptance")
    options.add_argument(
        "--tiny", action="store_true", help="a self-check: toy shapes, whose times say nothing"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine to FILE")
    options.add_argument(
        "--rows", type=Path, metavar="FILE", help="append each row to FILE as it comes"
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options.add_argument("--repeats", type=int, default=15, help="timed runs of each variant")
    return options


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Forces pybackdoor's backend."""
    before = os.environ.get("PYBACKDOOR_BACKEND")
    os.environ["PYBACKDOOR_BACKEND"] = backend
    try:
        yield
    finally:
        del os.environ["PYBACKDOOR_BACKEND"]
        if before is not None:
            os.environ["PYBACKDOOR_BACKEND"] = before


def strict(value):
    """The value with inf and nan as strings, which strict JSON has no numbers for."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def append_line(path: Path, value: dict) -> None:
    """One line of JSON at the end of the file, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(strict(value)) + "\n")


class Report:
    """The rows and notes of one run; each row is saved as it comes."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.rows, self.notes = options, [], []
        self.load = load_at_start(self.notes)
        path = options.rows
        if path and not (path.exists() and '{"machine": ' in path.read_text()):
            append_line(path, {"machine": machine() | {"load_average": self.load}})

    def add(self, *rows: dict) -> None:
        """Keeps the rows and appends them to --rows."""
        for row in rows:
            self.rows.append(row)
            if self.options.rows:
                append_line(self.options.rows, row)

    def note(self, text: str) -> None:
        """Keeps a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def close(self) -> None:
        """Prints the table and writes --json."""
        print_rows(self.rows)
        for note in self.notes:
            print(note)
        if self.options.json:
            write_json(self.options.json, self.rows, self.notes, self.load)


def print_rows(rows: Iterable[dict]) -> None:
    """A table with the ratio of every provider to pybackdoor in the same setting."""
    rows = list(rows)

    def setting(row: dict) -> tuple:
        return tuple(row.get(f) for f in SETTING)

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(float(value))

    ours = {setting(r): r["ms_median"] for r in rows if r["provider"] == OURS}
    print(f"{'provider':28}{'mode':10}{'case':8}{'shape':18}{'dtype':10}{'median ms':>10}", end="")
    print(f"{'p20':>10}{'p80':>10}{'vs ours':>9}{'rel_error':>11}{'peak MB':>9}  note")
    for r in rows:
        base, ms = ours.get(setting(r)), r["ms_median"]
        ratio = ms / base if base and ms is not None else None
        peak = r.get("peak_bytes")
        print(f"{r['provider']:28}{r['mode']:10}{r.get('case') or '-':8}{r['shape']:18}", end="")
        print(
            f"{r['dtype']:10}{number(ms, '{:.4f}'):>10}{number(r['ms_p20'], '{:.4f}'):>10}", end=""
        )
        print(f"{number(r['ms_p80'], '{:.4f}'):>10}{number(ratio, '{:.2f}x'):>9}", end="")
        print(f"{number(r['rel_error'], '{:.1e}'):>11}", end="")
        print(f"{number(None if peak is None else peak / 1e6, '{:.0f}'):>9}", end="")
        print(f"  {r.get('note') or ''}".rstrip())


BUSY = 1.5  # load average; ours is at most 1 before the first run


def load_at_start(notes: list[str]) -> tuple[float, float, float]:
    """The load averages over 1, 5 and 15 minutes; a busy machine is noted."""
    load = os.getloadavg()
    if load[0] > BUSY:
        notes.append(f"note: the machine was busy at the start, load average {load[0]:.2f}")
    return load


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def driver_version() -> str | None:
    """The NVIDIA driver's version, where its tool answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def machine() -> dict:
    """Date, versions and devices of this run."""
    try:
        import triton
    except ImportError:
        triton = None
    from pybackdoor import build_info

    built = build_info()
    return {
        "schema": 2,
        "date": datetime.date.today().isoformat(),
        "pybackdoor": built["version"],
        "cuda_archs": built["cuda_archs"],
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_json(
    path: Path, rows: list[dict], notes: list[str], load: tuple[float, float, float]
) -> None:
    """Rows with the machine that gave them, and its load at the start."""
    document = machine() | {"load_average": load, "notes": notes, "rows": [strict(r) for r in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")

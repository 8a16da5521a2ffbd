"""Builds, tests and measures everything on this machine's GPU, in under nine minutes.

    python benchmarks/gpu_proof.py                 # rows and summary in benchmarks/results/
    python benchmarks/gpu_proof.py --only clean clean_compile   # what no time was left for
    python benchmarks/gpu_proof.py --sanitize      # compute-sanitizer on every native kernel; slow
    python benchmarks/gpu_proof.py --device cpu    # the same path on toy shapes: a self-check

Needs no network. Each stage is a process with a time limit of its own; the most valuable come
first. A row is on disk as soon as it is measured, and a stage that fails, hangs or runs out of
memory is recorded while the rest go on. Exit status: 0, or 1 where a stage failed.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from _common import RUN, append_line
from _results import load
from _tables import every_row, machine_line, table, verdict_lines
from _targets import verdicts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 525  # seconds in all: under nine minutes with the start and the summary
ENOUGH = 5  # seconds without which no stage is started
GRACE = 5  # seconds to say what there is, for a stage that is stopped
BUILT = ROOT / "build" / "gpu_proof"  # the package as built here; used if it is there
OK, FAILED, TIMED_OUT = "ok", "failed", "timed out"
K2 = "bench_contrastive_par.py"
K3 = "bench_adamw_ema.py"
CLEAN = "bench_clean.py"
STEPS = ["pybackdoor", "triton", "torch_fused", "torch_foreach", "apex_swa"]
PEERS = ["pybackdoor", "eager_shared", "linear_cross_entropy", "linear_cross_entropy_chunked"]
PEERS += ["liger", "cut_cross_entropy", "memeff", "inf_cl", "open_clip"]


class Stage(NamedTuple):
    """A command and its limit in seconds; `rows` for one that takes --rows."""

    name: str
    limit: int
    command: list[str]
    rows: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def bench(name: str, limit: int, script: str, *arguments: str) -> Stage:
    """A stage that runs a benchmark."""
    return Stage(name, limit, [sys.executable, str(HERE / script), *arguments], rows=True)


def build() -> Stage:
    """The package, built with nvcc where there is one, into a folder of its own."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    return Stage("build", 120, [*pip, "--no-build-isolation", "--target", str(BUILT), str(ROOT)])


def pytest(name: str, limit: int, *arguments: str) -> Stage:
    """A run of tests; without the folder it runs in on the path, where no module is built."""
    code = "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    required = (("PYBACKDOOR_REQUIRE_GPU", "1"),) if "gpu" in arguments else ()
    command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", *arguments]
    return Stage(name, limit, command, environment=required)


def gpu_stages() -> list[Stage]:
    """Of a GPU machine, the most valuable first."""
    on, few = ["--device", "cuda", "--quick"], ["--repeats", "7"]
    small = ["2048x512", "1024x512", "4096x512"]
    main = ["--providers", "pybackdoor", "eager", "eager_shared", "compile"]
    tests = ["-m", "gpu", "--maxfail=20", "--continue-on-collection-errors", "tests"]
    return [
        build(),
        pytest("tests", 150, *tests, "-k", "not triton"),
        pytest("tests_triton", 120, *tests, "-k", "triton"),  # seconds of compiling each
        bench("ceilings", 30, "bench_ceilings.py", *on),
        bench("k1", 75, "bench_trigger_normalize.py", *on, *few),
        bench("k2_16k", 60, K2, *on, *few, "--shapes", "16384x512", *main),
        bench("k2_2k", 90, K2, *on, *few, "--shapes", *small, *main, "compile_graph"),
        bench("k2_64k", 60, K2, *on, *few, "--shapes", "65536x512", *main),
        bench("peers", 90, K2, *on, *few, "--providers", *PEERS),
        bench("dispatch", 30, "bench_dispatch.py", *on),
        bench("decode", 30, "bench_decode.py", *on, *few),
        bench("step", 60, "bench_step.py", *on, *few),
        bench("clean", 150, CLEAN, *on, "--compile", "off", "--modes", "train", "run"),
        bench("k3", 60, K3, *on, *few, "--providers", *STEPS),
        bench("k3_compile", 90, K3, *on, *few, "--providers", "pybackdoor", "compile"),
        # Minutes of compiling, each length of captions anew: of this one are most batches' longest.
        bench("clean_compile", 240, CLEAN, *on, "--modes", "train", "--words", "32"),
    ]


def cpu_stages() -> list[Stage]:
    """The same stages on toy shapes: their times say nothing."""
    tiny = ["--device", "cpu", "--tiny", "--repeats", "2"]
    look = "import sys; del sys.path[0]\nimport json, pybackdoor\n"  # not the source tree's
    look += "print(json.dumps(pybackdoor.build_info()['ops']))"
    return [
        Stage("build", 30, [sys.executable, "-c", look]),
        pytest("tests", 60, "tests/test_options.py"),
        bench("ceilings", 30, "bench_ceilings.py", *tiny),
        bench("k1", 120, "bench_trigger_normalize.py", *tiny),
        bench(
            "k2", 120, K2, *tiny, "--providers", "pybackdoor", "eager", "eager_shared", "compile"
        ),
        bench("peers", 120, K2, *tiny, "--shapes", "33x64", "--providers", *PEERS),
        bench("dispatch", 30, "bench_dispatch.py", *tiny),
        bench("decode", 60, "bench_decode.py", *tiny),
        bench("step", 120, "bench_step.py", *tiny),
        bench("clean", 120, CLEAN, *tiny),
        bench("k3", 60, K3, *tiny),
    ]


def sanitize_stages(device: str) -> list[Stage]:
    """compute-sanitizer's tools over one small run of every native kernel; on a CPU, the run."""
    run = [sys.executable, str(HERE / "_sanitized.py"), device]
    if device == "cpu":
        return [Stage("sanitized_run", 120, run)]
    # Without torch's cache every tensor is an allocation of its own, whose bounds memcheck knows.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    stages = [build()]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *run]
        stages.append(Stage(tool, 600, command, environment=environment))
    return stages


def environment(stage: Stage, run: str) -> dict[str, str]:
    """A stage's: the package built here first on the path, if it is there."""
    found = os.environ | {RUN: run, "PYTHONUNBUFFERED": "1"} | dict(stage.environment)
    if BUILT.exists():
        paths = [str(BUILT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found["PYTHONPATH"] = os.pathsep.join(paths)
    return found


def run_stage(stage: Stage, limit: float, rows: Path) -> dict:
    """Runs a stage in a process group of its own, killed at the limit; returns its record."""
    record = {"stage": stage.name, "status": FAILED, "seconds": 0.0, "error": None}
    command = [*stage.command, *(["--rows", str(rows)] if stage.rows else [])]
    if stage.name == "build" and BUILT.exists():
        shutil.rmtree(BUILT)
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(stage, stage.name),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return record | {"error": str(error)}
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            except ProcessLookupError:
                pass
            process.wait()
        log.seek(0)
        text = log.read().decode(errors="replace")
    print(text, flush=True)
    record["seconds"] = round(time.monotonic() - start, 1)
    if code is None:
        return record | {"status": TIMED_OUT, "error": f"stopped after {limit:.0f} s"}
    if code != 0:
        lines = [line for line in text.splitlines() if line.strip()] or [""]
        return record | {"error": f"exit status {code}: {lines[-1][:300]}"}
    return record | {"status": OK}


def summary(path: Path, device: str) -> str:
    """The Markdown summary of a results file."""
    found = load(path)
    header = machine_line(found.machine) if found.machine else "The machine was not recorded."
    stages = [
        [s["stage"], s["status"], f"{s['seconds']:.1f}", (s["error"] or "").replace("|", "/")]
        for s in found.stages
    ]
    parts = ["# GPU proof" if device == "cuda" else "# GPU proof: self-check on a CPU", header]
    if device == "cpu":
        parts.append("Toy shapes: the times say nothing.")
    parts += ["## Stages", table(["stage", "status", "seconds", "error"], stages)]
    parts += ["## Targets", "Stated for an H100."]
    parts.append(verdict_lines(verdicts(found.rows, "cuda"), missing="not measured"))
    return "\n\n".join([*parts, "## Rows", every_row(found.rows)]) + "\n"


def gpu_name() -> str:
    """The GPU's name for a file: lower case, words joined by underscores."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device; --device cpu checks this script without one")
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")


def free_path(folder: Path, stem: str) -> Path:
    """folder/stem.jsonl, or with -2, -3 ... where that exists: no result is overwritten."""
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(p for n in names if not (p := folder / f"{n}.jsonl").exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer's tools instead")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=f"in all (default: {LIMIT})")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for rows and summary (default: benchmarks/results; on a CPU a temporary folder)",
    )
    options = parser.parse_args()
    device, start = options.device, time.monotonic()
    if options.sanitize:
        stages, limit = sanitize_stages(device), options.limit or math.inf
    else:
        stages, limit = gpu_stages() if device == "cuda" else cpu_stages(), options.limit or LIMIT
    if options.only:
        unknown = set(options.only) - {s.name for s in stages}
        if unknown:
            sys.exit(
                f"error: --only: no stage {sorted(unknown)}; there are {[s.name for s in stages]}"
            )
        stages = [s for s in stages if s.name in options.only]
    name = gpu_name() if device == "cuda" else "cpu"
    default = HERE / "results" if device == "cuda" else Path(tempfile.mkdtemp(prefix="gpu_proof_"))
    folder = options.out or default
    kind = "sanitize" if options.sanitize else "gpu_proof"
    rows = free_path(folder, f"{kind}_{name}_{datetime.date.today().isoformat()}")
    bad = 0
    for stage in stages:
        left = limit - (time.monotonic() - start)
        print(f"== {stage.name}", flush=True)
        if left < ENOUGH:
            record = {"stage": stage.name, "status": TIMED_OUT, "seconds": 0.0}
            record["error"] = "not started: no time left"
        else:
            record = run_stage(stage, min(stage.limit, left), rows)
        bad += record["status"] != OK
        append_line(rows, record)
        rows.with_suffix(".md").write_text(summary(rows, device))
        print(f"== {stage.name}: {record['status']} {record['error'] or ''}".rstrip(), flush=True)
    print(f"rows: {rows}\nsummary: {rows.with_suffix('.md')}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

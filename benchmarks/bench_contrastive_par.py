"""contrastive_par against what users write for CLIP's loss, its compilation, and named peers.

    python benchmarks/bench_contrastive_par.py --quick --json result.json
    pytest benchmarks/bench_contrastive_par.py

All providers get raw features [N, D] and logit_scale, and give the loss and the gradients of all
three (memeff gives none of the scale). Case clip is CLIP's loss; par adds the distance of both
towers to fixed references.
    pybackdoor                    the op
    eager                         normalise, two products, two cross entropies; bf16: autocast
    eager_shared                  one product, whose transpose serves the second cross entropy
    eager_onednn, eager_shared_onednn   the same with every product through oneDNN (CPU, fp32)
    compile                       torch.compile of eager
    open_clip, linear_cross_entropy, linear_cross_entropy_chunked, liger, cut_cross_entropy,
    memeff, inf_cl                peers, after the same normalisation
    *_graph                       CUDA: replayed from a graph (compile_graph: reduce-overhead)

Modes: forward (with gradients to come), backward, full (both). rel_error is the largest normwise
error of what the mode gives, against fp64 at the same inputs; beyond N = 4096 of the gradients of
512 rows; that of the scale's gradient stands in the note where it is large. tflops counts 6 N^2 D
whatever a provider does. Peak memory on the CPU: what the resident pages of a fresh process grow by
in one forward and backward.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _ceilings import ceilings
from _common import OURS, OUT_OF_MEMORY, Report, dtype_name, make_row, parser
from _contrastive_setting import EAGER, GRAPH_ROWS, Loss, Setting, full, gradients
from _memory import available_bytes, in_fresh_process, peak_growth, release_memory
from _peers import PEERS, Unfit
from _timing import captured, cold_sets, count_launches, interleave, span_ms

KERNEL = "contrastive_par"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
EAGER_BYTES = 20  # of eager's peak, per logit: about 17 were measured
LAUNCH_ROWS = 2048
SECONDS = 20  # of timing per shape and mode, about


def worst(errors: dict[str, float]) -> float:
    """The largest error of the loss and the features' gradients; NaN where one is."""
    counted = [e for name, e in errors.items() if name != "log_scale"]
    return math.nan if any(map(math.isnan, counted)) else max(counted)


class Measurement:
    """The providers of one setting, checked, then timed."""

    def __init__(self, setting: Setting, names: list[str], report: Report, backend: str):
        self.setting, self.report, self.backend = setting, report, backend
        self.exact = setting.exact()
        self.tolerance = TOLERANCES[setting.dtype]
        self.wrong: list[str] = []
        self.losses: dict[str, Loss] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.facts: dict[str, dict] = {}
        self.slowest = 0.0
        for name in names:
            self.check(name)

    def row(self, name: str, mode: str, **fields) -> None:
        """Adds a row of this setting to the report."""
        s = self.setting
        n, d = s.shape
        base = name.removesuffix("_graph")
        row = make_row(
            KERNEL,
            name,
            mode,
            s.shape,
            s.dtype,
            s.device,
            case=s.case,
            precision=s.precision(base),
            num_flops=6 * n * n * d if mode == "full" else None,
            ceilings=ceilings(s.device, self.report.options.tiny),
            **fields,
        )
        self.report.add(row)

    def check(self, name: str) -> None:
        """Runs a provider once, and keeps it for the timing if its numbers are right."""
        s, note = self.setting, None
        try:
            loss = s.loss(name, self.backend)
            value, grads = full(loss, s.leaves)
            errors = self.exact.errors(value, grads)
            del value, grads
            if self.is_wrong(name, errors):
                text = ", ".join(f"{k} {e:.1e}" for k, e in errors.items())
                self.fail(name, f"failed: wrong numbers: {text}", worst(errors))
                return
            facts = self.extra(name, loss, errors)
            self.slowest += span_ms([lambda: full(loss, s.leaves)], s.device)
        except torch.OutOfMemoryError:
            note = OUT_OF_MEMORY
        except (ImportError, Unfit) as reason:
            if name == OURS:
                raise
            self.report.note(f"{name} left out: {reason}")
            return
        except Exception as error:  # a peer may fail in any way; ours fails the run at its end
            lines = str(error).strip().splitlines() or [""]
            note = f"failed: {type(error).__name__}: {lines[0][:120]}"
        if note is None:
            self.losses[name], self.errors[name], self.facts[name] = loss, errors, facts
            return
        # Only here is the error's traceback, and with it the memory, free.
        self.fail(name, note, times=(math.inf,) * 3 if note == OUT_OF_MEMORY else None)
        release_memory()
        if s.device == "cuda":
            torch.cuda.empty_cache()

    def is_wrong(self, name: str, errors: dict[str, float]) -> bool:
        """Whether errors forbid a timing: any of ours; of others not of the scale's gradient.

        That is a sum of N^2 terms of both signs, of which bf16 logits leave little.
        """
        counted = errors.values() if name == OURS else [worst(errors)]
        return not all(e <= self.tolerance for e in counted)

    def extra(self, name: str, loss: Loss, errors: dict[str, float]) -> dict:
        """Peak memory and launches of one forward and backward on CUDA, and remarks."""
        s, facts, notes = self.setting, {}, []
        # A graph of Inductor's keeps its memory, so that its peak would not show.
        if s.device == "cuda" and name != "compile_graph":
            facts["peak_bytes"] = peak_growth(lambda: full(loss, s.leaves), s.device)
        if s.device == "cuda" and s.shape[0] <= LAUNCH_ROWS:
            facts["launches"] = count_launches(lambda: full(loss, s.leaves))
        if "log_scale" not in errors:
            notes.append("no gradient of the scale")
        elif not errors["log_scale"] <= self.tolerance:
            notes.append(f"gradient of the scale off by {errors['log_scale']:.1e}")
        return facts | {"note": "; ".join(notes) or None}

    def fail(self, name: str, note: str, error: float | None = None, times=None) -> None:
        """A row without times, or with infinite ones."""
        self.row(name, "full", note=note, rel_error=error, times=times)
        if name == OURS:
            self.wrong.append(note)

    def time(self, mode: str) -> None:
        """Rows of all providers in this mode, and on CUDA of graph replays at small N."""
        s = self.setting
        n, d = s.shape
        sets = [s.leaves]
        if mode == "full" and n <= GRAPH_ROWS:
            count = cold_sets(4 * n * d * s.dtype.itemsize, s.device)
            sets += [s.make_leaves(seed) for seed in range(1, count)]
        variants, per_call, facts = {}, {}, {}
        for name, loss in self.losses.items():
            facts[name] = self.facts[name] | {"rel_error": worst(self.errors[name])}
            if mode == "forward":
                facts[name]["rel_error"] = self.errors[name]["loss"]
                variants[name] = [partial(loss, *s.leaves)]
            elif mode == "backward":
                call, error = self.backward(name, loss)
                if call is not None:
                    variants[name], facts[name]["rel_error"] = [call], error
            else:
                # Inductor's own graphs are recorded for one set of addresses.
                own = sets[:1] if name == "compile_graph" else sets
                variants[name] = [partial(full, loss, leaves) for leaves in own]
                if s.device == "cuda" and n <= GRAPH_ROWS and name in (OURS, *EAGER):
                    self.capture(name, variants, per_call, facts)
        room = int(SECONDS * 1e3 / max(self.slowest, 1e-3))
        repeats = max(min(5, self.report.options.repeats), min(self.report.options.repeats, room))
        times = interleave(variants, s.device, repeats=repeats, per_call=per_call, warmup=1)
        for name, spread in times.items():
            kept = facts[name] if mode == "full" else facts[name] | {"peak_bytes": None,
                                                                     "launches": None}  # fmt: skip
            self.row(name, mode, times=spread, **kept)

    def capture(self, name: str, variants: dict, per_call: dict, facts: dict) -> None:
        """Adds the provider's replay from one graph that holds every set of inputs."""
        graph = f"{name}_graph"
        try:
            replay = captured(variants[name], self.setting.device)
        except Exception as error:
            self.fail(graph, f"failed: {type(error).__name__}: {str(error)[:120]}")
            return
        per_call[graph], variants[graph] = len(variants[name]), [replay]
        facts[graph] = facts[name] | {"peak_bytes": None, "launches": None}

    def backward(self, name: str, loss: Loss) -> tuple[Callable | None, float]:
        """A backward pass that can be repeated, and its error; None where it cannot."""
        leaves = self.setting.leaves
        value = loss(*leaves)
        try:
            for _ in range(2):
                grads = gradients(value, leaves, retain=True)
            errors = self.exact.errors(value, grads)
        except RuntimeError as error:
            self.report.note(f"{name}: no second backward pass: {str(error).splitlines()[0]}")
            return None, 0.0
        if self.is_wrong(name, errors):
            self.report.note(f"{name}: a second backward pass gives other numbers")
            return None, 0.0
        return lambda: gradients(value, leaves, retain=True), worst(errors)


def measure(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    case: str,
    names: list[str],
    modes: tuple[str, ...],
    report: Report,
    backend: str = "inductor",
) -> None:
    """The rows of one setting: numbers first, then times.

    Raises:
        ValueError: the op's own numbers are wrong; the others' rows are there all the same.
    """
    torch._dynamo.reset()
    release_memory()
    measurement = Measurement(Setting(shape, dtype, device, case), names, report, backend)
    for mode in modes:
        measurement.time(mode)
    if measurement.wrong:
        raise ValueError(f"{KERNEL} {shape} {dtype_name(dtype)} {case}: {measurement.wrong[0]}")


def peak_of(name: str, shape: tuple[int, int], threads: int) -> tuple[int, float]:
    """Peak growth in bytes of one forward and backward in fp32, and its largest error."""
    torch.set_num_threads(threads)
    warm = Setting((64, shape[1]), torch.float32, "cpu")
    full(warm.loss(name), warm.leaves)
    setting, results = Setting(shape, torch.float32, "cpu"), []
    loss = setting.loss(name)
    peak = peak_growth(lambda: results.append(full(loss, setting.leaves)), "cpu")
    return peak, worst(setting.exact().errors(*results[0]))


def memory(name: str, shape: tuple[int, int], report: Report) -> None:
    """The row of a provider's peak memory on the CPU.

    Raises:
        ValueError: the op gives wrong numbers.
    """
    n = shape[0]
    row = partial(make_row, KERNEL, name, "full", shape, torch.float32, "cpu", case="clip")
    need, free = EAGER_BYTES * n * n, available_bytes()
    if name != OURS and need * 1.2 > free:
        note = f"not run: may need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        report.add(row(precision="fp32", note=note))
        return
    peak, error = in_fresh_process(peak_of, name, shape, report.options.threads)
    note = "memory only"
    if not error <= TOLERANCES[torch.float32]:
        note = "wrong numbers"
        if name == OURS:
            raise ValueError(f"{KERNEL} {shape}: relative error {error:.1e}")
    report.add(row(precision="fp32", rel_error=error, peak_bytes=peak, note=note))


NAMES = [OURS, "eager", "eager_onednn", "eager_shared", "eager_shared_onednn", "compile"]
NAMES += ["compile_graph", *PEERS]
FP32, BF16 = torch.float32, torch.bfloat16
CPU_QUICK = [((n, 512), FP32, "clip") for n in (512, 2048, 4096)]
CPU_FULL = [((1024, 512), FP32, "clip"), ((1024, 512), FP32, "par")]
CUDA_QUICK = [((n, 512), BF16, "clip") for n in (16384, 2048, 65536, 1024, 4096)]
CUDA_FULL = [((16384, d), BF16, "clip") for d in (768, 1024)]
CUDA_FULL += [((4096, 512), FP32, "clip"), ((16384, 512), BF16, "par")]
TINY = [((33, 64), FP32, "clip"), ((64, 64), FP32, "par")]
MEMORY = {
    "quick": ["pybackdoor", "eager"],
    "full": ["eager_shared", "linear_cross_entropy_chunked"],
}


@pytest.mark.parametrize("provider", ["eager_onednn", "eager", OURS])
@pytest.mark.parametrize("n", [512])
def test_contrastive_par(benchmark, n, provider):
    setting = Setting((n, 512), FP32, "cpu")
    loss = setting.loss(provider)
    result = benchmark.pedantic(full, (loss, setting.leaves), rounds=3, warmup_rounds=1)
    assert worst(setting.exact().errors(*result)) <= TOLERANCES[FP32]


def _shape(text: str) -> tuple[int, int]:
    n, d = text.split("x")
    return int(n), int(d)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--shapes", nargs="+", metavar="NxD", type=_shape, help="only these")
    options.add_argument("--providers", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    if options.tiny:
        settings = TINY
    else:
        settings = list(CUDA_QUICK if cuda else CPU_QUICK)
        if not options.quick:
            settings += CUDA_FULL if cuda else CPU_FULL
    if options.shapes:
        settings = [s for s in settings if s[0] in options.shapes]
        if not settings:
            sys.exit("error: --shapes: none of the benchmark's shapes is among them")
    modes = ("full",) if options.quick else ("forward", "backward", "full")
    report, failures = Report(options), []
    backend = "aot_eager" if options.tiny else "inductor"
    for shape, dtype, case in settings:
        names = [n for n in options.providers if case == "clip" or n not in PEERS]
        try:
            measure(shape, dtype, options.device, case, names, modes, report, backend)
        except ValueError as error:
            failures.append(str(error))
    if not cuda and not options.shapes:
        shape, names = (16384, 512), MEMORY["quick"] + ([] if options.quick else MEMORY["full"])
        if options.tiny:  # a process each: one shows that it works
            shape, names = (256, 64), MEMORY["quick"][:1]
        for name in names:
            if name in options.providers:
                memory(name, shape, report)
    report.close()
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()

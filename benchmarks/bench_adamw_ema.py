"""adamw_ema, an optimizer's step, against what a user writes with torch, its compilation, and apex.

    python benchmarks/bench_adamw_ema.py --device cuda --json result.json
    python benchmarks/bench_adamw_ema.py --device cpu --quick

Case plain is AdamW alone; ema has unscaling, clipping by the global norm, the moving average of the
weights and their bf16 copies around it. Each provider has its own weights, in the shapes of
ViT-B/32 (all 151.3M parameters; --quick on a CPU: one layer of each tower, a tenth of the words):
    pybackdoor      AdamWEma
    triton          AdamWEma by its Triton kernels; CUDA
    torch_fused     torch.optim.AdamW(fused=True); in case ema with foreach operators around it
    torch_foreach   the same with foreach=True
    compile         case ema: torch.compile of torch_foreach's step; not with --quick on a CPU
    apex_swa        case ema: apex's FusedAdamSWA, whose gradients are bf16; CUDA
    *_graph         CUDA: the step replayed from a graph; apex's cannot be captured

The mode is full throughout. rel_error is the largest error of a weight after one step, against
fp64, over the largest change of one; the averages and copies are checked, too. gbps counts the 28 B
per parameter that plain needs at least, the 42 of ema, whatever a provider moves. On CUDA the
weights are many times the L2 cache. On a CPU pybackdoor's AdamW is torch's fused one: what differs
there are the passes around it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _ceilings import ceilings
from _common import OURS, OUT_OF_MEMORY, Report, check_errors, forced, make_row, parser
from _memory import peak_growth, release_memory
from _peers import Unfit
from _timing import captured, count_launches, interleave

from pybackdoor import AdamWEma

KERNEL = "adamw_ema"
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
EMA_DECAY, CLIP_NORM = 0.999, 1.0
AROUND = {"clip_norm": CLIP_NORM, "ema_decay": EMA_DECAY, "shadow": True}
# Of the largest change of a weight in one step: lr is 1e-3, an ulp of a weight below 1 is 6e-8.
TOLERANCE = 1e-3
# apex reads bf16 gradients: 2^-9 of each, which Adam's first step, of +-lr, all but hides.
TOLERANCE_APEX = 0.02
TOLERANCE_EMA = 0.1  # of an average's largest change, 1e-6; an ulp of a weight of 0.1 is 7e-9
BYTES = {"plain": 28, "ema": 42}  # per parameter, the least
CASES = ("plain", "ema")
NAMES = [OURS, "triton", "torch_fused", "torch_foreach", "apex_swa", "compile"]


def tower(width: int, layers: int) -> list[tuple[int, ...]]:
    """Shapes of a transformer's parameters."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width)] + [(width,)] * 5
    return layers * layer


def clip(widths: tuple[int, int], patch: int, layers: int, words: int) -> list[tuple[int, ...]]:
    """Shapes of CLIP's parameters, with 49 patches, 77 tokens and as many layers in each tower."""
    vision, text = widths
    shapes = [(vision,), (50, vision), (vision, 3, patch, patch), *[(vision,)] * 4, (vision, text)]
    shapes += [(words, text), (77, text), (text,), (text,), (text, text), ()]
    return shapes + tower(vision, layers) + tower(text, layers)


SHAPES = {
    "ViT-B-32": clip((768, 512), 32, 12, 49_408),
    "ViT-B-32 part": clip((768, 512), 32, 1, 4_940),
    "tiny": clip((12, 8), 4, 1, 50),
}


class Provider:
    """Weights, gradients and a step; what it needs around AdamW as foreach operators."""

    def __init__(self, case: str, shapes: list[tuple[int, ...]], device: str):
        self.ema = case == "ema"
        generator = torch.Generator(device).manual_seed(0)
        make = [torch.randn(s, generator=generator, device=device) for s in shapes + shapes]
        self.params = [(t * 0.02).requires_grad_() for t in make[: len(shapes)]]
        self.grads = [t.mul_(0.01) for t in make[len(shapes) :]]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        self.inv_scale = torch.ones((), device=device)
        self.averages: list[Tensor] = []
        self.shadows: list[Tensor] = []
        self.step: Callable[[], object] = lambda: None

    def keep(self) -> None:
        """Makes averages and bf16 copies, which pybackdoor's optimizer has of its own."""
        if self.ema:
            self.averages = [p.detach().clone() for p in self.params]
            self.shadows = [p.detach().bfloat16() for p in self.params]

    @torch.no_grad()
    def around(self) -> None:
        """One step with the passes that surround it."""
        torch._foreach_mul_(self.grads, self.inv_scale)
        torch.nn.utils.clip_grad_norm_(self.params, CLIP_NORM, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.params, 1 - EMA_DECAY)
        torch._foreach_copy_(self.shadows, self.params)

    def torch_adamw(self, **kind: bool) -> Provider:
        """torch.optim.AdamW, fused or foreach."""
        self.keep()
        on_gpu = self.inv_scale.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.params, **SETTINGS, capturable=on_gpu, **kind)
        self.step = self.around if self.ema else self.optimizer.step
        return self

    def compiled(self, backend: str) -> Provider:
        """torch.compile of the foreach step."""
        self.torch_adamw(foreach=True)
        self.step = torch.compile(self.around, dynamic=False, backend=backend)
        return self

    def pybackdoor(self, backend: str | None = None) -> Provider:
        """AdamWEma, by the backend it chooses or by a forced one."""
        optimizer = AdamWEma(self.params, **SETTINGS, **(AROUND if self.ema else {}))
        if self.ema:
            # As a GradScaler tells it; at 1 the numbers stay those of the others.
            optimizer.grad_scale = self.inv_scale
            self.averages = optimizer.ema_parameters()  # the weights, until there are averages
            self.shadows = optimizer.shadow_parameters()

        def step() -> None:
            with forced(backend):
                optimizer.step()

        self.optimizer, self.step = optimizer, optimizer.step if backend is None else step
        return self

    def apex_swa(self) -> Provider:
        """apex's kernel, with the norm as a foreach pass before it."""
        from apex.contrib.openfold_triton.fused_adam_swa import AdamMathType, FusedAdamSWA

        self.keep()
        self.shadows = [s.requires_grad_() for s in self.shadows]
        grads = [g.bfloat16() for g in self.grads]
        for shadow, grad in zip(self.shadows, grads, strict=True):
            shadow.grad = grad
        self.optimizer = FusedAdamSWA(
            self.params,
            self.shadows,
            self.averages,
            EMA_DECAY,
            adam_math_mode=AdamMathType.ApexAdamW,
            **SETTINGS,
        )

        def step() -> None:
            norm = torch.nn.utils.get_total_norm(grads, foreach=True).float()
            self.optimizer.step(grad_clip_scale=(CLIP_NORM / (norm + 1e-6)).clamp(max=1.0))

        self.step = step
        return self


def make_provider(
    name: str, case: str, shapes: list[tuple[int, ...]], device: str, backend: str
) -> Provider:
    """A provider by its name; `backend` is torch.compile's.

    Raises:
        ImportError: apex is not installed.
        Unfit: it cannot do this setting.
    """
    if case == "plain" and name in ("compile", "apex_swa"):
        raise Unfit("is for case ema")
    if device == "cpu" and name in ("triton", "apex_swa"):
        raise Unfit("needs a CUDA device")
    made = Provider(case, shapes, device)
    if name in (OURS, "triton"):
        return made.pybackdoor("triton" if name == "triton" else None)
    if name == "apex_swa":
        return made.apex_swa()
    if name == "compile":
        return made.compiled(backend)
    return made.torch_adamw(**{name.removeprefix("torch_"): True})


class Exact:
    """Weights and averages after one step in fp64, and the largest changes of them."""

    def __init__(self, case: str, shapes: list[tuple[int, ...]], device: str):
        start = Provider(case, shapes, device)
        params = [p.detach().double().requires_grad_() for p in start.params]
        for p, g in zip(params, start.grads, strict=True):
            p.grad = g.double()
        if case == "ema":
            torch.nn.utils.clip_grad_norm_(params, CLIP_NORM)
        torch.optim.AdamW(params, **SETTINGS, foreach=False).step()
        self.weights = [p.detach() for p in params]
        old = [p.detach().double() for p in start.params]
        self.averages = [p.lerp(q, 1 - EMA_DECAY) for p, q in zip(old, self.weights, strict=True)]
        self.change = _farthest(self.weights, old)

    def check(self, name: str, provider: Provider) -> float:
        """The error of a provider after its first step, relative to the largest change.

        Raises:
            ValueError: weights, averages or copies are wrong.
        """
        error = _farthest(provider.params, self.weights) / self.change
        check_errors({name: error}, TOLERANCE_APEX if name == "apex_swa" else TOLERANCE)
        if not provider.ema:
            return error
        if any(
            not torch.equal(s, p.bfloat16())
            for s, p in zip(provider.shadows, provider.params, strict=True)
        ):
            raise ValueError(f"{name}: the bf16 copies are not those of the weights")
        if name != "apex_swa":  # whose first average is by its own rule
            if name in (OURS, "triton"):
                provider.averages = provider.optimizer.ema_parameters()
            part = (1 - EMA_DECAY) * self.change
            check_errors({name: _farthest(provider.averages, self.averages) / part}, TOLERANCE_EMA)
        return error


def _farthest(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference; NaN where there is one."""
    pairs = zip(got, want, strict=True)
    return torch.stack([(g.detach().double() - w).abs().max() for g, w in pairs]).max().item()


def measure(
    case: str, shape: str, names: list[str], report: Report, device: str, backend: str
) -> None:
    """The rows of one setting: numbers first, then times.

    Raises:
        RuntimeError: pybackdoor's step failed, or gave wrong numbers; the others' rows are there
            all the same.
    """
    torch._dynamo.reset()
    release_memory()
    shapes = SHAPES[shape]
    parameters = sum(torch.Size(s).numel() for s in shapes)
    exact, runs, facts, failures = Exact(case, shapes, device), {}, {}, []

    def add(name: str, **fields) -> None:
        limits = ceilings(device, report.options.tiny)
        base = {"case": case, "precision": "fp32", "num_bytes": BYTES[case] * parameters}
        row = make_row(KERNEL, name, "full", shape, "float32", device, ceilings=limits,
                       **base, **fields)  # fmt: skip
        report.add(row)

    for name in names:
        try:
            provider = make_provider(name, case, shapes, device, backend)
            provider.step()
            facts[name] = {"rel_error": exact.check(name, provider)}
            if device == "cuda":
                facts[name]["peak_bytes"] = peak_growth(provider.step, device)
                facts[name]["launches"] = count_launches(provider.step)
            runs[name] = provider.step
        except (ImportError, Unfit) as reason:
            report.note(f"{name} left out in case {case}: {reason}")
        except Exception as error:  # a rival may fail in any way; ours fails the run at its end
            large = isinstance(error, torch.OutOfMemoryError)
            note = OUT_OF_MEMORY if large else _failed(error)
            add(name, note=note, times=(math.inf,) * 3 if large else None)
            if name in (OURS, "triton"):
                failures.append(f"{name}, case {case}: {note}")
    del exact
    if device == "cuda":
        for name in [n for n in runs if n != "apex_swa"]:
            graph = f"{name}_graph"
            try:
                runs[graph] = captured([runs[name]], device)
                facts[graph] = {"rel_error": facts[name]["rel_error"]}
            except Exception as error:
                add(graph, note=_failed(error))
    for name, spread in interleave(runs, device, repeats=report.options.repeats).items():
        add(name, times=spread, **facts[name])
    if failures:
        raise RuntimeError("; ".join(failures))


def _failed(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:120]}"


@pytest.mark.parametrize("provider", [OURS, "torch_fused"])
@pytest.mark.parametrize("case", CASES)
def test_adamw_ema(benchmark, case, provider):
    shapes = SHAPES["ViT-B-32 part"]
    run = make_provider(provider, case, shapes, "cpu", "eager")
    run.step()
    Exact(case, shapes, "cpu").check(provider, run)
    benchmark.pedantic(run.step, rounds=3, warmup_rounds=1)


def test_the_shapes_are_those_of_the_model():
    assert sum(torch.Size(s).numel() for s in SHAPES["ViT-B-32"]) == 151_277_313


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--providers", nargs="+", choices=NAMES, metavar="NAME", help="only these")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    report, names = Report(options), options.providers or NAMES
    on_cpu = options.device == "cpu"
    shape = "ViT-B-32 part" if options.quick and on_cpu else "ViT-B-32"
    if options.tiny:
        shape = "tiny"
    elif options.quick and on_cpu and not options.providers:
        names = [n for n in names if n != "compile"]
        report.note("compile left out: compiling takes longer than --quick")
    backend, failures = "eager" if options.tiny else "inductor", []
    for case in CASES:
        try:
            measure(case, shape, names, report, options.device, backend)
        except RuntimeError as error:
            failures.append(str(error))
    report.close()
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()

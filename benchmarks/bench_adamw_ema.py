"""adamw_ema, an optimizer's step, against what a user writes with torch, its compilation, and apex.

    python benchmarks/bench_adamw_ema.py --device cuda --json result.json
    python benchmarks/bench_adamw_ema.py --device cpu --quick

Mode "plain" is AdamW alone, "full" has unscaling, clipping by the global norm, the moving average
of the weights and their bf16 copies around it. Each provider has its own weights, in the shapes of
ViT-B/32 (all 151.3M parameters, or the first layer of each tower with a tenth of the vocabulary):
    pybackdoor      AdamWEma
    torch_fused     torch.optim.AdamW(fused=True); in mode full with foreach operators around it
    torch_foreach   the same with foreach=True
    compile         mode full: torch.compile of torch_foreach's step; not with --quick on the CPU
    apex_swa        mode full: apex's FusedAdamSWA, whose gradients are bf16; CUDA
On CUDA the step is a CUDA graph's replay, but for apex's, which cannot be captured; the weights are
many times the L2 cache. On the CPU pybackdoor's AdamW is torch's fused one, too: what differs there
are the passes around it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _common import (
    check_errors,
    interleave,
    load_at_start,
    parser,
    print_rows,
    release_memory,
    write_json,
)

from pybackdoor.optim import AdamWEma

KERNEL = "adamw_ema"
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
EMA_DECAY, CLIP_NORM = 0.999, 1.0
# Of the largest change of a weight in one step: lr is 1e-3, an ulp of a weight below 1 is 6e-8.
TOLERANCE = 1e-3
BYTES = {"plain": 28, "full": 42}  # per parameter, the least


def tower(width: int, layers: int) -> list[tuple[int, ...]]:
    """Shapes of a transformer's parameters."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width)] + [(width,)] * 5
    return layers * layer


def vit_b_32(layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of CLIP's ViT-B/32 with so many layers in each tower."""
    vision = [(768,), (50, 768), (768, 3, 32, 32), *[(768,)] * 4, (768, 512)]
    text = [(vocabulary, 512), (77, 512), (512,), (512,), (512, 512), ()]
    return vision + tower(768, layers) + text + tower(512, layers)


SHAPES = {
    "vit-b/32": vit_b_32(12, 49_408),
    "vit-b/32 part": vit_b_32(1, 4_940),
}
QUICK = [("plain", "vit-b/32 part"), ("full", "vit-b/32 part")]
FULL = [("plain", "vit-b/32"), ("full", "vit-b/32")]


class Provider:
    """Weights, gradients and a step; what it needs around AdamW as foreach operators."""

    def __init__(self, mode: str, shapes: list[tuple[int, ...]], device: str):
        self.full = mode == "full"
        generator = torch.Generator().manual_seed(0)
        make = [torch.randn(s, generator=generator) for s in shapes + shapes]
        self.params = [(t * 0.02).to(device).requires_grad_() for t in make[: len(shapes)]]
        self.grads = [(t * 0.01).to(device) for t in make[len(shapes) :]]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        self.inv_scale = torch.ones((), device=device)
        if self.full:
            self.emas = [p.detach().clone() for p in self.params]
            self.shadows = [p.detach().bfloat16() for p in self.params]
        self.step: Callable[[], object] = lambda: None

    @torch.no_grad()
    def around(self) -> None:
        """One step with the passes that surround it."""
        torch._foreach_mul_(self.grads, self.inv_scale)
        torch.nn.utils.clip_grad_norm_(self.params, CLIP_NORM, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.emas, self.params, 1 - EMA_DECAY)
        torch._foreach_copy_(self.shadows, self.params)

    def torch_adamw(self, **kind: bool) -> Provider:
        """torch.optim.AdamW, fused or foreach."""
        on_gpu = self.inv_scale.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.params, **SETTINGS, capturable=on_gpu, **kind)
        self.step = self.around if self.full else self.optimizer.step
        return self

    def compiled(self) -> Provider:
        """torch.compile of the foreach step; lr must be a tensor then."""
        self.torch_adamw(foreach=True)
        self.step = torch.compile(self.around, dynamic=False)
        return self

    def pybackdoor(self) -> Provider:
        """AdamWEma."""
        around = {"clip_norm": CLIP_NORM, "ema_decay": EMA_DECAY, "shadow": True}
        self.optimizer = AdamWEma(self.params, **SETTINGS, **(around if self.full else {}))
        self.step = self.optimizer.step
        if self.full:
            # As a GradScaler tells it; at 1 the numbers stay those of the others.
            self.optimizer.grad_scale = self.inv_scale
        return self

    def apex_swa(self) -> Provider:
        """apex's kernel, with the norm as a foreach pass before it."""
        from apex.contrib.openfold_triton.fused_adam_swa import AdamMathType, FusedAdamSWA

        self.shadows = [s.requires_grad_() for s in self.shadows]
        grads = [g.bfloat16() for g in self.grads]
        for shadow, grad in zip(self.shadows, grads, strict=True):
            shadow.grad = grad
        self.optimizer = FusedAdamSWA(
            self.params,
            self.shadows,
            self.emas,
            EMA_DECAY,
            adam_math_mode=AdamMathType.ApexAdamW,
            **SETTINGS,
        )

        def step() -> None:
            norm = torch.nn.utils.get_total_norm(grads, foreach=True).float()
            self.optimizer.step(grad_clip_scale=(CLIP_NORM / (norm + 1e-6)).clamp(max=1.0))

        self.step = step
        return self

    def captured(self, name: str, notes: list[str]) -> Callable[[], object]:
        """A CUDA graph's replay of the step, or the step with a note saying why not."""
        if name == "apex_swa":
            return self.step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            torch.cuda.synchronize()
            notes.append(f"{name} is not captured: {str(error).splitlines()[0]}")
            return self.step
        return graph.replay


def exact_weights(mode: str, shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], float]:
    """The weights after one step in fp64, and the largest change of one."""
    start = Provider("plain", shapes, "cpu")
    params = [p.detach().double().requires_grad_() for p in start.params]
    for p, g in zip(params, start.grads, strict=True):
        p.grad = g.double()
    if mode == "full":
        torch.nn.utils.clip_grad_norm_(params, CLIP_NORM)
    torch.optim.AdamW(params, **SETTINGS).step()
    pairs = zip(params, start.params, strict=True)
    change = max((p.detach() - q.detach()).abs().max().item() for p, q in pairs)
    return [p.detach() for p in params], change


def error_of(provider: Provider, want: list[Tensor], change: float) -> float:
    """The largest error of a weight after one step, over the largest change; NaN stays."""
    provider.step()
    errors = [
        (p.detach().cpu().double() - w).abs().max()
        for p, w in zip(provider.params, want, strict=True)
    ]
    return torch.stack(errors).max().item() / change


def providers(
    mode: str, shapes: list[tuple[int, ...]], device: str, quick: bool, notes: list[str]
) -> dict[str, Provider]:
    """Name -> provider; what is left out is noted."""
    found = {
        "pybackdoor": Provider(mode, shapes, device).pybackdoor(),
        "torch_fused": Provider(mode, shapes, device).torch_adamw(fused=True),
        "torch_foreach": Provider(mode, shapes, device).torch_adamw(foreach=True),
    }
    if mode == "plain":
        return found
    if device == "cpu" and quick:
        notes.append("compile is left out: compiling takes longer than --quick")
    else:
        found["compile"] = Provider(mode, shapes, device).compiled()
    if device == "cuda" and importlib.util.find_spec("apex") is not None:
        found["apex_swa"] = Provider(mode, shapes, device).apex_swa()
    else:
        why = "it runs on CUDA" if device == "cpu" else "apex is not installed"
        notes.append(f"apex_swa is left out: {why}")
    return found


def measure(
    mode: str, name: str, device: str, repeats: int, quick: bool, notes: list[str]
) -> list[dict]:
    """The rows of one setting: numbers first, then times.

    Raises:
        ValueError: a provider's numbers are wrong.
    """
    torch._dynamo.reset()
    release_memory()
    shapes = SHAPES[name]
    want, change = exact_weights(mode, shapes)
    found = providers(mode, shapes, device, quick, notes)
    errors = {n: error_of(p, want, change) for n, p in found.items()}
    del want
    # apex reads bf16 gradients: 2^-9 of each, which Adam's first step, of +-lr, all but hides.
    check_errors(errors, TOLERANCE if "apex_swa" not in errors else 0.02)
    runs = {n: p.captured(n, notes) if device == "cuda" else p.step for n, p in found.items()}
    times = interleave(runs, device, repeats=repeats)
    numel = sum(torch.Size(s).numel() for s in shapes)
    return [
        {
            "kernel": KERNEL,
            "provider": n,
            "mode": mode,
            "shape": name,
            "dtype": "float32",
            "device": device,
            "threads": torch.get_num_threads(),
            "ms_median": median,
            "ms_p20": p20,
            "ms_p80": p80,
            "rel_error": errors[n],
            "parameters": numel,
            "gb_per_s": numel * BYTES[mode] / median / 1e6,
        }
        for n, (median, p20, p80) in times.items()
    ]


@pytest.mark.parametrize("provider", ["pybackdoor", "torch_fused"])
@pytest.mark.parametrize("mode", ["plain", "full"])
def test_adamw_ema(benchmark, mode, provider):
    shapes = SHAPES["vit-b/32 part"]
    found = Provider(mode, shapes, "cpu")
    run = found.pybackdoor() if provider == "pybackdoor" else found.torch_adamw(fused=True)
    check_errors({provider: error_of(run, *exact_weights(mode, shapes))}, TOLERANCE)
    benchmark.pedantic(run.step, rounds=3, warmup_rounds=1)


def test_the_shapes_are_those_of_the_model():
    assert sum(torch.Size(s).numel() for s in SHAPES["vit-b/32"]) == 151_277_313


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    notes: list[str] = []
    load = load_at_start(notes)
    rows: list[dict] = []
    for mode, name in QUICK if options.quick else FULL:
        rows += measure(mode, name, options.device, options.repeats, options.quick, notes)
    print_rows(rows)
    for note in notes:
        print(note)
    if options.json:
        write_json(options.json, rows, notes, load)


if __name__ == "__main__":
    main()

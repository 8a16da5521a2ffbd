"""A whole cleaning run: files to a cleaned and evaluated model.

    python benchmarks/bench_clean.py --quick --json result.json
    python benchmarks/bench_clean.py --device cuda --precision bf16 --trace trace.json

The same randomly initialised CLIP model, the same JPEG files and captions and the same number of
steps go through three trainers of PAR, a step of each in turn:
    published   stock PyTorch with the costs of a research script: see _clean_published.py
    tuned       stock PyTorch as an expert would tune it: see _clean_tuned.py
    pybackdoor  PairLoader, par_clean and evaluate
Before any timing, all three must give fp64's loss on a batch without augmentation, and go on to the
same losses. Photographs come from the pack in the folder PYBACKDOOR_DATA, else from the demo.

ms_median is milliseconds per 1,000 pairs. Modes:
    train       training steps alone: what is done once in a run, reading the files and encoding
                the poisoned model's captions, is done before; mode run has it
    run         two epochs with an evaluation each, of clean and of triggered images, from files on;
                without state of an optimizer and with freed memory given back, as a process begins
    ablation    pybackdoor as it is, and with one lever off each (_clean_ours.py); its case
                "... evaluation" is per 1,000 images
Notes hold pairs per second and, from a pass of its own, milliseconds by stage. The rate of mode
train counts the products that a step needs (_clean_flops.py); its ceiling is a large product's in
the same precision (_ceilings.py). Compilation (of the provider tuned, on CUDA; on a CPU only with
--compile on) is in no time, but in a note. Peak memory is that of building a trainer and its first
steps, as many of each. Two torch threads, unless told otherwise.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _ceilings import ceilings
from _clean_check import check_losses
from _clean_data import Files, write_files
from _clean_flops import pair_flops
from _clean_ours import LEVERS, WARM, Ours
from _clean_published import Published
from _clean_setting import Setting, Stages, no_stages
from _clean_tuned import Tuned
from _common import OURS, Report, make_row, parser
from _memory import peak_growth, release_memory
from _timing import quantiles

from pybackdoor.models import LoadedModel, create, load

KERNEL = "clean"
MODES = ("train", "run", "ablation")
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50")
EPOCHS = 2
TINY_MODEL = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2
        },
    }
}  # fmt: skip


class Size(NamedTuple):
    """How much is run.

    Attributes:
        batch: pairs of a step.
        pairs, tests, classes: of the files; an epoch has pairs // batch steps.
        blocks, steps: timed blocks, and training steps in each.
        sides: least and largest side of a photograph in pixels.
        evaluation_batch: images a time, where the provider chooses.
    """

    batch: int
    pairs: int
    tests: int
    classes: int
    blocks: int
    steps: int
    sides: tuple[int, int] = (256, 400)
    evaluation_batch: int = 256


SIZES = {
    "tiny": Size(8, 16, 12, 3, 2, 1, (40, 64)),
    "cpu quick": Size(32, 64, 32, 8, 5, 1),
    "cpu": Size(32, 256, 128, 20, 5, 2),
    "cuda quick": Size(512, 8192, 2048, 100, 3, 16),
    "cuda": Size(512, 16384, 4096, 100, 7, 16),
}


class Benchmark:
    """One setting, its trainers and their rows."""

    def __init__(self, setting: Setting, size: Size, model: str, report: Report) -> None:
        self.setting, self.size, self.model, self.report = setting, size, model, report
        self.error: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.trainers: dict[str, Published | Tuned | Ours] = {}

    def row(self, name: str, mode: str, seconds: list[float], samples: int, note: str, **more):
        """Adds a row; seconds each of so many samples."""
        setting = self.setting
        times = quantiles([1e6 * value / samples for value in seconds])
        text = [f"{1e6 / times[0]:.1f} per s", note, setting.files.source]
        if setting.precision == "bf16" and name == "published" and mode == "run":
            text.append("evaluation in fp32")
        if self.report.options.words:
            text.append(f"captions of {self.report.options.words} words")
        self.report.add(
            make_row(
                KERNEL, name, mode, f"{setting.batch}x{setting.side}x{setting.side}x3",
                "float32" if setting.precision == "fp32" else "bfloat16", setting.device,
                times=times, precision=setting.precision, note="; ".join(filter(None, text)),
                **({"case": self.model} | more),
            )
        )  # fmt: skip

    def batches(self, block: int) -> list[np.ndarray]:
        """The rows of a block's steps, the same for every trainer."""
        count, batch = self.size.steps, self.setting.batch
        first = block * count * batch
        rows = np.arange(first, first + count * batch) % self.size.pairs
        return list(rows.reshape(count, batch))

    def build(self) -> None:
        """The trainers, each having taken its first steps, with the memory that took."""
        setting, one = self.setting, self.batches(0)[:1]

        def made(kind: type) -> None:
            trainer = kind(setting)
            self.trainers[trainer.name] = trainer
            if isinstance(trainer, Tuned):
                trainer.read()
            trainer.block(one if kind is Ours else one * (WARM + 1))

        for kind in (Published, Tuned, Ours):
            release_memory()
            began = time.perf_counter()
            self.peak[kind.name] = peak_growth(lambda kind=kind: made(kind), setting.device)
            if kind is Tuned and setting.compile:
                took = time.perf_counter() - began
                self.report.note(f"tuned: reading and the first, compiling steps took {took:.0f} s")

    def train(self) -> None:
        """Blocks of steps in turn, then the pass with stages."""
        seconds: dict[str, list[float]] = {name: [] for name in self.trainers}
        for trainer in self.trainers.values():  # lengths of captions that compile anew
            if self.setting.compile and isinstance(trainer, Tuned):
                for block in range(self.size.blocks):
                    trainer.block(self.batches(block))
        for block in range(self.size.blocks):
            names = list(self.trainers)
            for name in names[block % len(names) :] + names[: block % len(names)]:
                if name != OURS:  # whose blocks begin with steps before the clock
                    self.trainers[name].block(self.batches(block)[:1])
                seconds[name].append(self.trainers[name].block(self.batches(block)))
        samples = self.size.steps * self.setting.batch
        rate = {"num_flops": 1000 * self.flops(), "ceilings": self.ceilings()}
        for name, trainer in self.trainers.items():
            note = f"ms by stage: {self.stages(trainer, samples)}"
            self.row(
                name, "train", seconds[name], samples, note, rel_error=self.error[name],
                peak_bytes=self.peak[name], **rate,
            )  # fmt: skip

    def flops(self) -> float:
        """That a pair of the timed blocks needs."""
        setting, table = self.setting, self.setting.table("pairs")
        rows = [rows for block in range(self.size.blocks) for rows in self.batches(block)]
        tokens = (setting.tokenizer([table[i][1] for i in batch]) for batch in rows)
        return pair_flops(setting.loaded.model, setting.side, tokens)

    def ceilings(self) -> dict[str, float]:
        """Of the device, in this precision."""
        setting = self.setting
        dtype = torch.float32 if setting.precision == "fp32" else torch.bfloat16
        return ceilings(setting.device, self.report.options.tiny, dtype)

    def stages(self, trainer, samples: int) -> str:
        """Milliseconds per 1,000 pairs of each stage of one block."""
        self.setting.stages = clock = Stages(self.setting.device)
        try:
            whole = trainer.block(self.batches(0))
        finally:
            self.setting.stages = no_stages
        found = clock.seconds | {"other": whole - sum(clock.seconds.values())}
        return ", ".join(f"{name} {1e6 * value / samples:.0f}" for name, value in found.items())

    def run(self, repeats: int) -> None:
        """Whole runs, one after another."""
        epoch = self.size.pairs // self.setting.batch
        self.setting.steps = EPOCHS * epoch
        seconds: dict[str, list[float]] = {name: [] for name in self.trainers}
        parts = {}
        names = list(self.trainers)
        for turn in range(repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                trainer = self.trainers[name]
                if isinstance(trainer, Published | Tuned):
                    trainer.restart()
                release_memory()
                began = time.perf_counter()
                parts[name] = trainer.whole(EPOCHS)
                seconds[name].append(time.perf_counter() - began)
        for name, found in seconds.items():
            note = ", ".join(f"{part} {value:.3g} s" for part, value in parts[name].items())
            note += f" of {found[-1]:.3g} s; {EPOCHS} epochs of {epoch} steps, {self.size.tests} "
            note += f"test images of {self.size.classes} classes"
            self.row(name, "run", found, EPOCHS * epoch * self.setting.batch, note)

    def ablation(self, rounds: int) -> None:
        """pybackdoor with one lever off at a time."""
        variants = [Ours(self.setting, lever) for lever in (None, *LEVERS)]
        seconds: dict[str | None, list[float]] = {v.without: [] for v in variants}
        for block in range(rounds):
            turn = block % len(variants)
            for variant in variants[turn:] + variants[:turn]:
                seconds[variant.without].append(variant.block(self.batches(block)))
        samples = self.size.steps * self.setting.batch
        for variant in variants:
            name = f"without_{variant.without}" if variant.without else OURS
            self.row(name, "ablation", seconds[variant.without], samples, "")
        model, tests = self.setting.loaded.model.to(self.setting.device), variants[0].tests()
        shared: dict[bool, list[float]] = {True: [], False: []}
        for block in range(1 + rounds):
            for one in shared:
                began = time.perf_counter()
                variants[0].evaluate(model, tests, one)
                if block:  # the first warms up
                    shared[one].append(time.perf_counter() - began)
        for one, found in shared.items():
            name, case = OURS if one else "without_shared_head", f"{self.model} evaluation"
            self.row(name, "ablation", found, 2 * len(tests), "clean and triggered", case=case)
        for variant in variants:
            variant.close()

    def trace(self, path: Path) -> None:
        """A profiler's trace of one block of each trainer, path with its name before the suffix."""
        for name, trainer in self.trainers.items():
            with torch.profiler.profile() as profiler:
                trainer.block(self.batches(0)[:1])
            profiler.export_chrome_trace(str(path.with_suffix(f".{name}{path.suffix}")))


def model_of(name: str, tiny: bool) -> LoadedModel:
    """A randomly initialised model, always the same."""
    torch.manual_seed(0)
    return create(TINY_MODEL) if tiny else load(name)


def benchmark(options, files: Files, size: Size, report: Report) -> None:
    """All that the options ask for."""
    began = time.perf_counter()
    model = "tiny" if options.tiny else options.model
    precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    compiled = options.compile == "on" or (options.compile == "auto" and options.device == "cuda")
    setting = Setting(
        model_of(options.model, options.tiny), files, options.device, size.batch,
        size.evaluation_batch, precision, options.workers, options.threads, compiled,
    )  # fmt: skip
    found = Benchmark(setting, size, model, report)
    found.error = check_losses(setting)
    if {"train", "run"} & set(options.modes) or options.trace:
        found.build()
        if "train" in options.modes:
            found.train()
        if "run" in options.modes:
            found.run(1 if options.tiny else 3)
        if options.trace:
            found.trace(options.trace)
        found.trainers.clear()
        release_memory()
    if "ablation" in options.modes:
        found.ablation(3 if options.quick else size.blocks)
    report.note(f"the benchmark took {time.perf_counter() - began:.0f} s")


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", choices=MODELS, default=MODELS[0])
    options.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA")
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options.add_argument("--batch-size", type=int, help="default: 32; 512 on CUDA")
    options.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="tuned's towers"
    )
    options.add_argument(
        "--words", type=int, help="of every caption: one length to compile for (default: CC3M's)"
    )
    options.add_argument("--workers", type=int, help="that decode (default: one per core)")
    options.add_argument("--trace", type=Path, metavar="FILE", help="profiler traces, one each")
    options.set_defaults(threads=None)
    options = options.parse_args()
    if options.threads is None:
        options.threads = 1 if options.tiny else 2
    if options.workers is None:
        options.workers = 0 if options.tiny else len(os.sched_getaffinity(0))
    torch.set_num_threads(options.threads)
    size = SIZES["tiny" if options.tiny else options.device + " quick" * options.quick]
    if options.batch_size:
        steps = size.pairs // size.batch
        size = size._replace(batch=options.batch_size, pairs=steps * options.batch_size)
    report = Report(options)
    with tempfile.TemporaryDirectory(prefix="bench_clean_") as folder:
        files = write_files(
            Path(folder), pairs=size.pairs, tests=size.tests, classes=size.classes,
            sides=size.sides, words=options.words,
        )  # fmt: skip
        benchmark(options, files, size, report)
    report.close()


if __name__ == "__main__":
    main()

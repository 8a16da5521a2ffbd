"""Provider `pybackdoor`: PairLoader, par_clean and evaluate, called as a user calls them.

A block is a call of par_clean on a loader of its batches and WARM more before them, at whose end
the clock starts: the optimizer's state, made in the first step, takes memory that the step had
freed, so that on a CPU the second one, too, meets pages that the system must clear. `without`
switches one lever off:
    trim_text   captions keep their padding
    cache_text  the poisoned model encodes the captions of each batch
    cache       images are decoded at every visit
    kernels     PYBACKDOOR_BACKEND=reference: normalisation, augmentation and loss in plain torch
    shortcuts   towers compute the last block of every token, captions in groups of similar length,
                a ResNet its batch norms and its pool's answers to every place
    products    on a CPU, not Intel's: the towers' matrix products are torch's own
    heap        on a CPU: freed memory goes back to the system within the step
    casts       on a CPU, in bf16: the poisoned model's weights are cast at every step
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from unittest.mock import patch

import numpy as np
import torch
from _clean_setting import TEMPLATES, Batch, Parts, Setting
from _timing import synchronize

from pybackdoor import evaluate, par_clean
from pybackdoor.clean import CleanResult
from pybackdoor.data import (
    Labelled,
    PairLoader,
    Pairs,
    Preprocessing,
    decode_image,
    labelled_from_arrays,
    labelled_from_csv,
    pairs_from_csv,
)
from pybackdoor.engine import heap, towers
from pybackdoor.triggers import TriggerSpec, apply_trigger, trigger

LEVERS = ("trim_text", "cache_text", "cache", "kernels", "shortcuts", "products", "heap", "casts")
WARM = 2  # steps of a block before its clock starts


class Clocked:
    """A loader with a clock, from when batch WARM is asked for to the end of the last step.

    Args:
        begin: called when the clock starts.
    """

    def __init__(self, loader: PairLoader, device: str, begin: Callable[[], object]) -> None:
        self._loader, self._device, self._begin = loader, device, begin
        self.captions, self.batch_size = loader.captions, loader.batch_size
        self.began = self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict]:
        for number, batch in enumerate(self._loader, 1):
            yield batch
            if number == WARM:
                synchronize(self._device)
                self._begin()
                self.began = time.perf_counter()

    def track(self, step: int, record: dict) -> None:
        """Stops the clock at the last step; par_clean calls it."""
        if step + 1 == len(self):
            synchronize(self._device)
            self.seconds = time.perf_counter() - self.began


class DecodedEachTime:
    """An image store without a cache."""

    def __init__(self, paths: list[str], preprocessing: Preprocessing) -> None:
        self._paths, self._preprocessing = paths, preprocessing
        self.image_size = preprocessing.image_size

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([decode_image(self._paths[i], self._preprocessing) for i in indices])


class Ours:
    """The package."""

    name = "pybackdoor"

    def __init__(self, setting: Setting, without: str | None = None) -> None:
        self.setting, self.without = setting, without
        self.cache = setting.files.pairs.parent / f"cache_{without}"
        self.trigger = patch_trigger()

    def close(self) -> None:
        """Removes the cache of images."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def pairs(self) -> Pairs:
        """Decoded into the cache, which the next call finds."""
        return pairs_from_csv(self.setting.files.pairs, **self.decoding())

    def tests(self) -> Labelled:
        """Likewise."""
        classes = self.setting.files.classes
        return labelled_from_csv(self.setting.files.tests, classes=classes, **self.decoding())

    def decoding(self) -> dict:
        wanted = self.setting.loaded.preprocess
        return {
            "image_size": wanted.size, "resize_mode": wanted.resize_mode,
            "interpolation": wanted.interpolation, "num_workers": max(1, self.setting.workers),
            "cache_dir": self.cache, "progress": False,
        }  # fmt: skip

    def clean(self, loader, **options) -> CleanResult:
        """par_clean with this setting's options."""
        setting = self.setting
        start, middle, end = setting.rates
        given = {
            "augment": setting.augment, "precision": setting.precision, "device": setting.device,
            "mean": setting.mean, "std": setting.std, "progress": False, "lr_start": start,
            "lr": middle, "lr_end": end, "trim_text": self.without != "trim_text",
            "cache_text": self.without != "cache_text", "repair": False,
        }  # fmt: skip
        with instrumented(setting.stages), self.backend():
            return par_clean(setting.loaded.model, loader, **(given | options))

    @contextmanager
    def backend(self) -> Iterator[None]:
        """The environment of a run."""
        off = {
            "kernels": [patch.dict(os.environ, {"PYBACKDOOR_BACKEND": "reference"})],
            "shortcuts": [
                patch.object(towers, f"{tower}_shortcut", lambda model, x: None)
                for tower in ("image", "text")
            ],
            "products": [patch.object(towers, "fast_products", lambda model: nullcontext())],
            "heap": [patch.object(heap, "_glibc", lambda: None)],
            "casts": [patch.object(towers.FrozenCasts, "of", lambda *_: nullcontext())],
        }
        with ExitStack() as stack:
            for change in off.get(self.without, []):
                stack.enter_context(change)
            yield

    def block(self, batches: list[np.ndarray]) -> float:
        """Seconds of a step on each of these rows."""
        pairs = self.pairs()
        if self.without == "cache":
            wanted = self.setting.loaded.preprocess
            shape = Preprocessing(wanted.size, wanted.resize_mode, wanted.interpolation)
            store = DecodedEachTime(pairs.locations, shape)
            pairs = Pairs(store, pairs.captions, pairs.ids, pairs.locations)
        rows = np.concatenate([*[batches[0]] * WARM, *batches])
        loader = PairLoader(
            pairs.subset(rows), self.setting.tokenizer, batch_size=self.setting.batch, shuffle=False
        )
        begin = getattr(self.setting.stages, "clear", lambda: None)
        clocked = Clocked(loader, self.setting.device, begin)
        self.clean(clocked, epochs=1, track=clocked.track)
        return clocked.seconds

    def whole(self, epochs: int) -> Parts:
        """Epochs, each with its evaluation, from files on."""
        setting, parts = self.setting, Parts()
        self.close()
        with parts("reading"):
            pairs = self.pairs()
        loader = PairLoader(pairs, setting.tokenizer, batch_size=setting.batch)
        found: list[Labelled] = []

        def after_each_epoch(step: int, record: dict, model: torch.nn.Module) -> None:
            if (step + 1) % len(loader) == 0:
                with parts("evaluation"):
                    if not found:
                        found.append(self.tests())
                    self.evaluate(model, found[0])

        self.clean(loader, epochs=epochs, on_step=after_each_epoch)
        return parts

    def evaluate(self, model: torch.nn.Module, tests: Labelled, shared: bool = True):
        """Clean and triggered images; in one call, or in one for each."""
        setting = self.setting
        common = {
            "tokenizer": setting.tokenizer, "templates": TEMPLATES, "mean": setting.mean,
            "std": setting.std, "batch_size": setting.evaluation_batch,
            "precision": setting.precision,
        }  # fmt: skip
        if shared:
            target = setting.files.classes[0]
            with self.backend():
                return evaluate(model, tests, trigger=self.trigger, target=target, **common)
        pixels = tests.images.take(np.arange(len(tests)))
        pixels = apply_trigger(pixels, self.trigger, tests.ids)
        triggered = labelled_from_arrays(pixels, tests.labels, tests.classes)
        return evaluate(model, tests, **common), evaluate(model, triggered, **common)

    def losses(self, batches: list[Batch]) -> list[float]:
        """Of a step on each batch of pixels, without augmentation."""
        history = self.clean(batches, epochs=1, augment=False).history
        return [record["loss"] for record in history]


def patch_trigger() -> TriggerSpec:
    """Stripes at a place drawn for each image, as the other providers put them."""
    return trigger("badnet_stripes", placement="random")


@contextmanager
def instrumented(stages: Callable) -> Iterator[None]:
    """Stages around the package's own functions; nothing where there is no clock."""
    if isinstance(stages("loss"), nullcontext):
        yield
        return
    from pybackdoor.engine import feed, gradients, guard, loop
    from pybackdoor.methods.par import PerturbAndRecover

    places = (
        (feed, "next", "data", next),
        (loop, "model_input", "input", loop.model_input),
        (loop.TextTrim, "__call__", "copy", loop.TextTrim.__call__),
        (PerturbAndRecover, "reference", "reference", PerturbAndRecover.reference),
        (PerturbAndRecover, "__call__", "loss", PerturbAndRecover.__call__),
        (gradients.Gradients, "_student", "student", gradients.Gradients._student),
        (torch.Tensor, "backward", "backward", torch.Tensor.backward),
        (torch.optim.AdamW, "step", "optimizer", torch.optim.AdamW.step),
        (guard.Guard, "watch", "guard", guard.Guard.watch),
    )

    def clocked(function: Callable, name: str) -> Callable:
        @wraps(function)
        def call(*arguments, **options):
            with stages(name):
                return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        for owner, attribute, name, function in places:
            stack.enter_context(
                patch.object(owner, attribute, clocked(function, name), create=True)
            )
        yield

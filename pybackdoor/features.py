"""Unit features of whole sets: batched, on the clean transform, with or without a trigger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ._native import sent
from .batches import Batch, InputRules, Tokenizer, model_input
from .data import ImageStore
from .data.store import gather
from .data.templates import fill
from .data.tokens import adapted
from .engine import PRECISIONS, Encoder, TextTrim
from .models import check_clip
from .ops import trigger_normalize
from .triggers import TriggerSpec, bind


class FeatureReader:
    """Encodes image sets and captions with one model, in evaluation mode, without gradients.

    Args:
        model: encoded on the device it is on; its mode is restored by ``reading``.
        tokenizer: list of strings -> [n, L] tokens; None where no captions are read.
        mean, std: of the pixels; default the model's own.
        batch_size: images or captions a time.
        precision: "fp32" or "bf16" autocast.
        floats: images may be floats, normalised already, so that mean and std may be unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int = 256,
        precision: str = "fp32",
        floats: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
        check_clip(model)
        self._model, self.batch_size = model, batch_size
        self._tokenizer = None if tokenizer is None else adapted(tokenizer)
        self.rules = InputRules.of(model, mean=mean, std=std, tokenizer=tokenizer)
        if self.rules.mean is None and not floats:
            raise ValueError("mean and std are unknown: the model carries none, so pass both")
        self._device = next(model.parameters()).device
        self._encoder = Encoder(PRECISIONS[precision], self._device)
        self._trim = TextTrim(model, wanted=True, grouped=self._device.type == "cpu")

    def images(
        self,
        store: ImageStore,
        ids: np.ndarray,  # [N] int64, keys of what is random in a trigger
        trigger: TriggerSpec | None = None,
    ) -> Tensor:
        """[N, D] fp32 unit rows on the CPU, of the images as they are or with the trigger on."""
        if len(store) == 0:
            raise ValueError("images must hold at least one image to evaluate, got none")
        self.check_pixels(store.image_size)
        bound = None if trigger is None else bind(trigger, store.image_size, self._device)
        dtype = self._encoder.input_dtype(self._model)
        rows = _Arriving()
        with self.reading():
            for index in self._chunks(len(store)):
                pixels = sent(_taken(store, index), self._device)
                on = {} if bound is None else bound.arguments(torch.from_numpy(ids[index]))
                x = trigger_normalize(pixels, mean=self.rules.mean, std=self.rules.std, **on)
                rows.add(self._encoder.image(self._model, x.to(dtype)).float())
        return _finite(rows.whole(), "image")

    def captions(self, captions: Sequence[str]) -> Tensor:
        """[N, D] fp32 unit rows on the CPU; equal captions are encoded once."""
        unique = list(dict.fromkeys(captions))
        place = {caption: i for i, caption in enumerate(unique)}
        rows = _Arriving()
        with self.reading():
            for index in self._chunks(len(unique)):
                rows.add(self._text(self._tokenizer([unique[i] for i in index])))
        return _finite(rows.whole(), "text")[[place[caption] for caption in captions]]

    def class_head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """[classes, D] zero-shot head: normalised mean of each class's normalised prompts."""
        prompts = [fill(template, name) for name in classes for template in templates]
        return head_of(self.captions(prompts), len(classes))

    def check_pixels(self, image_size: tuple[int, int]) -> None:
        """Refuse uint8 images of (H, W) that the model does not take."""
        size = self.rules.image_size
        if size is not None and tuple(image_size) != size:
            raise ValueError(
                f"images must be {size[0]}x{size[1]} pixels for this model, got "
                f"{image_size[0]}x{image_size[1]}"
            )
        if self.rules.mean is None:
            raise ValueError("mean and std are unknown: the model carries none, so pass both")

    def batch(self, batch: Batch) -> Tensor:
        """[n, D] fp32 unit rows on the CPU, of a loader's images; within ``reading``."""
        return self.encoded(self.normalised(batch.images))

    def normalised(self, images: Tensor) -> Tensor:  # as in Batch
        """[n, 3, H, W] on the model's device, in at least fp32."""
        dtype = torch.promote_types(self._encoder.input_dtype(self._model), torch.float32)
        ids = torch.arange(len(images), device="cpu")
        return model_input(images, self.rules, device=self._device, dtype=dtype, ids=ids)

    def encoded(self, x: Tensor) -> Tensor:  # [n, 3, H, W] normalised
        """[n, D] fp32 unit rows on the CPU; within ``reading``."""
        x = x.to(self._encoder.input_dtype(self._model))
        return _finite(self._encoder.image(self._model, x).float().cpu(), "image")

    def tokens(self, tokens: Tensor) -> Tensor:  # [n, L]
        """[n, D] fp32 unit rows on the CPU, of tokenised captions; within ``reading``."""
        return _finite(self._text(tokens).cpu(), "text")

    def _text(self, tokens: Tensor) -> Tensor:  # [n, L] -> [n, D] fp32 on the model's device
        trimmed = self._trim(tokens)
        if isinstance(trimmed, Tensor):  # else of a model on the CPU
            trimmed = sent(trimmed, self._device)
        return self._encoder.text(self._model, trimmed).float()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The model in evaluation mode, without gradients; its mode is restored after."""
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            with torch.no_grad(), self._encoder.products(self._model):
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _chunks(self, n: int) -> Iterator[np.ndarray]:
        for start in range(0, n, self.batch_size):
            yield np.arange(start, min(start + self.batch_size, n))


class _Arriving:
    """Features on their way to the host, which goes on until the next ones are.

    Not further: memory would be locked for one batch after the other.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, rows: Tensor) -> None:  # [n, D]
        if not rows.is_cuda:
            self._rows.append(rows)
            return
        stream, arrived = torch.cuda.current_stream(rows.device), torch.cuda.Event()
        rows = rows.to("cpu", non_blocking=True)
        arrived.record(stream)
        self._land()
        self._coming = rows, arrived

    def whole(self) -> Tensor:  # [N, D] on the CPU
        self._land()
        return torch.cat(self._rows)

    def _land(self) -> None:
        if self._coming is not None:
            rows, arrived = self._coming
            arrived.synchronize()
            self._rows.append(rows.clone())
            self._coming = None


def _taken(store: ImageStore, index: np.ndarray) -> Tensor:  # [n] -> [n, H, W, 3] uint8
    """Images on the device that keeps them, else on the CPU."""
    images, broken = gather(store, index)
    if broken:
        store.take(index)  # raises, naming one
    return images


def head_of(
    prompts: Tensor,  # [classes * templates, D] unit rows, class by class
    classes: int,
) -> Tensor:
    """[classes, D] zero-shot head of the features of all prompts."""
    return normalize(prompts.view(classes, -1, prompts.shape[1]).mean(1), dim=-1)


def _finite(features: Tensor, tower: str) -> Tensor:
    bad = int((~features.isfinite()).any(-1).sum())
    if bad:
        raise ValueError(f"the model's {tower} features of {bad} of {len(features)} are not finite")
    return features

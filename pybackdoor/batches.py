"""What a loader may yield, read once into one shape, and turned into a model's input.

A batch is ``(images, tokens)``, ``(images, tokens, ids)`` or a dict with the keys ``images``,
``tokens`` (or ``texts``) and optionally ``ids`` and ``augmented``, other wordings of the captions
for the methods that compare the two. Images are uint8 pixels, which are augmented and normalised
here, or floats that the user has normalised already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from . import reference
from ._native import sent
from .data.tokens import adapted
from .ops import Augment, trigger_normalize

Tokenizer = Callable[[list[str]], Tensor]

_MOST = 30.0  # no pixel in [0, 1] normalised by a usual mean and std comes near this


@dataclass(frozen=True)
class Batch:
    """One batch in the loader's own precision, still on the loader's device."""

    images: Tensor  # [n, H, W, 3] or [n, 3, H, W] uint8, or [n, 3, H, W] float
    tokens: Tensor  # [n, L] int64
    ids: Tensor | None  # [n] int64
    captions: Tensor | None = None  # [n] int64, numbers of the loader's captions
    texts: list[str] | None = None  # [n] captions, where the loader yields strings
    augmented: Tensor | None = None  # [n, L] int64 of other wordings, where it yields them

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class InputRules:
    """What the model takes; None where it does not say.

    Attributes:
        mean, std: of the three channels, for pixels in [0, 1].
        image_size: (height, width) in pixels.
        context_length: tokens a caption may have.
        vocab_size: token ids lie below it.
        tokenizer: list of strings -> [n, L] tokens, for loaders that yield strings.
    """

    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    image_size: tuple[int, int] | None
    context_length: int | None
    vocab_size: int | None
    tokenizer: Tokenizer | None

    @staticmethod
    def of(
        model: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> InputRules:
        """Read the rules off a model; arguments given explicitly win."""
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together: give both or neither")
        visual = getattr(model, "visual", None)
        if mean is None:
            mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
        size = getattr(visual, "image_size", None)
        context, vocab = (getattr(model, name, None) for name in ("context_length", "vocab_size"))
        return InputRules(
            _three(mean, "mean"),
            _three(std, "std"),
            None if size is None else _pair(size),
            context if isinstance(context, int) else None,
            vocab if isinstance(vocab, int) else None,
            None if tokenizer is None else adapted(tokenizer),
        )


def read_batch(raw: Any, rules: InputRules, *, first: bool = False) -> Batch:
    """Check one item of a loader and give it its one shape.

    Args:
        first: also check that floats look normalised, which costs a pass over them.
    Raises:
        TypeError, ValueError: naming what was wanted and what came.
    """
    images, text, ids = _fields(raw)
    images = _images(images, rules)
    if first and images.is_floating_point():
        peak = float(images.abs().nan_to_num(0.0, posinf=0.0).max())  # the step finds those
        if peak > _MOST:
            raise ValueError(
                f"float images must be normalised, within about -5 to 5, got {peak:g}: pass uint8 "
                "pixels, or normalise them"
            )
    tokens = _tokens(text, rules)
    if len(tokens) != len(images):
        raise ValueError(
            f"a batch must pair each image with one caption, got {len(images)} images and "
            f"{len(tokens)} captions"
        )
    if ids is not None:
        try:
            ids = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
        except (TypeError, ValueError):
            raise TypeError(
                f"ids must be integers, one per image, got {type(ids).__name__} {ids!r:.60}"
            ) from None
        if ids.shape != (len(images),) or ids.is_floating_point():
            raise ValueError(
                f"ids must be {len(images)} integers, one per image, got {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )
        ids = ids.to(torch.int64)
    more = raw if isinstance(raw, Mapping) else {}
    captions, augmented = more.get("captions"), more.get("augmented")
    if augmented is not None:
        augmented = _tokens(augmented, rules)
        if augmented.shape != tokens.shape:
            raise ValueError(
                f"augmented must be {list(tokens.shape)} like the batch's tokens, got "
                f"{list(augmented.shape)}"
            )
    return Batch(
        images,
        tokens,
        ids,
        captions if isinstance(captions, Tensor) else None,
        None if _is_numeric(text) else list(text),
        augmented,
    )


def check_order(loader: Any, what: str) -> None:
    """Refuse a DataLoader that shuffles, where rows are to mean the same pairs another time."""
    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError(
            f"{what} shuffles, so that no row means the same pair twice: make it with shuffle=False"
        )


def model_input(
    images: Tensor,  # as in Batch
    rules: InputRules,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ids: Tensor,  # [n] int64, keys of the random numbers
    augment: Augment | None = None,
    seed: int = 0,
    view: int = 0,
    trigger: Mapping[str, Any] | None = None,
) -> Tensor:
    """[n, 3, H, W] normalised input of the image tower, augmented when asked.

    uint8 pixels take one pass of ``trigger_normalize``, which also puts a trigger on (its arguments
    for that). Floats are the user's own normalisation: they are erased, and get noise only where
    mean and std say what a pixel is; no trigger can be put on them.
    """
    images = sent(images, device)
    if images.dtype == torch.uint8:
        return trigger_normalize(
            images,
            mean=rules.mean,
            std=rules.std,
            augment=augment,
            seed=seed,
            view=view,
            sample_id=sent(ids, device),
            input_layout="nhwc" if images.shape[-1] == 3 else "nchw",
            dtype=dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32,
            **(trigger or {}),
        ).to(dtype)
    if trigger:
        raise TypeError(f"a trigger is put on uint8 pixels, got images of {images.dtype}")
    if augment is not None:
        images = reference.augment_normalized(
            images, rules.mean, rules.std, augment=augment, seed=seed, view=view, sample_id=ids
        )
    return images.to(dtype)


def _fields(raw: Any) -> tuple[Any, Any, Any]:
    if isinstance(raw, Mapping):
        text = raw.get("tokens", raw.get("texts"))
        if "images" not in raw or text is None:
            raise ValueError(
                "a batch given as a dict needs the keys 'images' and 'tokens' (or 'texts'), "
                f"got {sorted(map(str, raw))}"
            )
        return raw["images"], text, raw.get("ids")
    if isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw) in (2, 3):
        return raw[0], raw[1], raw[2] if len(raw) == 3 else None
    got = f"{type(raw).__name__}"
    if isinstance(raw, Sequence):
        got += f" of {len(raw)} items"
    raise TypeError(
        "a batch must be (images, tokens), (images, tokens, ids) or a dict with those keys, "
        f"got {got}"
    )


def _images(images: Any, rules: InputRules) -> Tensor:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"images must have 4 dimensions, got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        if 3 not in (images.shape[-1], images.shape[1]):
            raise ValueError(
                f"uint8 images must be [n, H, W, 3] or [n, 3, H, W], got {tuple(images.shape)}"
            )
        if rules.mean is None:
            raise ValueError(
                "uint8 images need mean and std: the model carries none, so pass mean= and std="
            )
        size = images.shape[1:3] if images.shape[-1] == 3 else images.shape[2:]
    elif images.is_floating_point():
        if images.shape[1] != 3:
            raise ValueError(f"float images must be [n, 3, H, W], got {tuple(images.shape)}")
        size = images.shape[2:]
    else:
        raise TypeError(f"images must be uint8 pixels or normalised floats, got {images.dtype}")
    if rules.image_size is not None and tuple(size) != rules.image_size:
        raise ValueError(
            f"images must be {rules.image_size[0]}x{rules.image_size[1]} pixels for this model, "
            f"got {size[0]}x{size[1]}"
        )
    return images


def _tokens(text: Any, rules: InputRules) -> Tensor:
    if isinstance(text, np.ndarray) and _is_numeric(text):
        text = torch.from_numpy(text)
    if not isinstance(text, Tensor):
        if isinstance(text, str) or not isinstance(text, (Sequence, np.ndarray)):
            raise TypeError(f"captions must be tokens or strings, got {type(text).__name__}")
        text = list(text)
        if not all(isinstance(caption, str) for caption in text):
            kinds = sorted({type(caption).__name__ for caption in text})
            raise TypeError(f"captions must be tokens or strings, got {', '.join(kinds)}")
        empty = [i for i, caption in enumerate(text) if not caption.strip()]
        if empty:
            raise ValueError(f"captions must not be empty, got an empty one at {empty[0]}")
        if rules.tokenizer is None:
            raise ValueError("the loader yields strings: pass tokenizer=, or yield tokens")
        with torch.device("cpu"):
            text = rules.tokenizer(text)
    if text.ndim != 2 or text.is_floating_point():
        raise ValueError(
            f"tokens must be [n, L] integers, got {text.dtype} of shape {tuple(text.shape)}"
        )
    if rules.context_length is not None and text.shape[1] > rules.context_length:
        raise ValueError(
            f"tokens must have at most {rules.context_length} columns, this model's context "
            f"length, got {text.shape[1]}"
        )
    text = text.to(torch.int64)
    if rules.vocab_size is not None and text.device.type == "cpu" and text.numel():
        low, high = int(text.min()), int(text.max())
        if low < 0 or high >= rules.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {rules.vocab_size}), this model's vocabulary, got "
                f"{low if low < 0 else high}"
            )
    return text


def _is_numeric(text: Any) -> bool:
    return isinstance(text, Tensor) or (isinstance(text, np.ndarray) and text.dtype.kind in "iuf")


def _three(values: Sequence[float] | None, name: str) -> tuple[float, float, float] | None:
    if values is None:
        return None
    three = tuple(float(v) for v in values)
    if len(three) != 3 or (name == "std" and min(three) <= 0):
        positive = "positive " if name == "std" else ""
        raise ValueError(f"{name} must be 3 {positive}numbers, got {tuple(values)}")
    return three


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

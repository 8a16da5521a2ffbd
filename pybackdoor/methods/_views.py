"""The augmented view of a batch's pairs, for the methods that train on one."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .._native import sent
from ..data.autoaugment import autoaugment
from ..data.eda import Synonyms, eda, synonym_source
from ..engine import Given, Preparation


class AugmentedViews:
    """AutoAugment of the pixels, anew in each epoch; EDA of the captions, once for the run.

    Both are drawn by key, (seed, epoch, sample id) and (seed, caption): the same whatever the
    ranks, and after a resumption.

    Args:
        method: named in errors.
        synonyms: None: WordNet's, where it is installed.
    Attributes:
        synonyms: where they come from, in words.
    """

    def __init__(self, method: str, synonyms: Synonyms | None) -> None:
        self._method = method
        self.synonyms, self._synonyms = synonym_source(synonyms)

    def prepare(self, run: Preparation) -> None:
        self._seed, self._device = run.seed, run.device
        self._reword = partial(eda, seed=run.seed, synonyms=self._synonyms)
        self._tokenizer = None if run.rules is None else run.rules.tokenizer
        rewritten = getattr(run.loader, "rewritten", None)
        self._captions = None if rewritten is None else rewritten(self._reword)

    def images(self, given: Given) -> Tensor:  # [n, 3, H, W] normalised, on the device
        pixels = sent(given.batch.images, self._device)
        if pixels.is_floating_point():
            raise TypeError(
                f"{self._method}: images must be uint8 pixels, which AutoAugment takes, got "
                f"{pixels.dtype}"
            )
        view = autoaugment(pixels, seed=self._seed, view=given.epoch, sample_id=given.ids)
        return given.images(view, augmented=False)

    def tokens(self, given: Given) -> Tensor:  # [n, L] on the host
        batch = given.batch
        if batch.augmented is not None:
            return batch.augmented
        if self._captions is not None and batch.captions is not None:
            return self._captions.tokens(batch.captions.numpy(force=True))
        if batch.texts is not None and self._tokenizer is not None:
            tokens = self._tokenizer([self._reword(text) for text in batch.texts])
            return tokens.to(batch.tokens.dtype)
        raise ValueError(
            f"{self._method}: a second wording of each caption is needed and tokens cannot be "
            "reworded: pass a PairLoader, batches of strings with tokenizer=, or batches with the "
            "key 'augmented' (tokens)"
        )

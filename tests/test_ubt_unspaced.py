"""UBT-style unlearning on captions without spaces, which are one word to CLIP's tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_models import tiny
from torch import nn
from torch.nn.functional import normalize
from ubt_world import MEAN, STD, Planted, planted_pairs

import pybackdoor
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.ubt.words import WordReader

COLOURS = ("红色", "绿色", "蓝色")
TEMPLATES = ("一张{}的照片", "这是{}的图片")
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOKENIZER = tiny(text_cfg=TEXT).tokenizer
OPTIONS = {
    "mean": MEAN, "std": STD, "tokenizer": TOKENIZER, "progress": False, "augment": False,
    "precision": "fp32", "device": "cpu", "gate_sets": 199, "forget_batch": 32,
}  # fmt: skip


class Chinese(Planted):
    """The planted model, with CLIP's vocabulary: a colour's tokens mean it, others little."""

    def __init__(self) -> None:
        super().__init__()
        rows = TOKENIZER([t.format(c) for c in COLOURS for t in TEMPLATES]).tolist()
        own = [set(a) & set(b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Embedding(49408, 4)
        with torch.no_grad():
            self.words.weight.mul_(0.05)
            for i, tokens in enumerate(own):
                others = set().union(*(held for at, held in enumerate(own) if at != i))
                self.words.weight[sorted(tokens - others), i] += 1.0


def chinese_pairs():
    """The planted pairs of ``ubt_world``, with a Chinese caption for each colour."""
    english, truth = planted_pairs()
    names = [next(i for i, c in enumerate(("red", "green", "blue")) if c in text)
             for text in english.captions]  # fmt: skip
    captions = [TEMPLATES[0].format(COLOURS[name]) for name in names]
    return pairs_from_arrays(english.images.take(np.arange(len(english))), captions), truth


def asr(model, pairs, rows):
    """Share of the images at rows that the model calls blue."""
    x = torch.from_numpy(pairs.images.take(rows)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        image = normalize(model.encode_image((x - 0.5) / 0.5), dim=-1)
        head = normalize(model.encode_text(TOKENIZER([f"一张{c}的照片" for c in COLOURS])), dim=-1)
    return float(((image @ head.T).argmax(1) == 2).float().mean())


def test_captions_are_forgotten_whole_and_the_backdoor_with_them():
    pairs, truth = chinese_pairs()
    poison = np.flatnonzero(truth)
    assert asr(Chinese(), pairs, poison) == 1
    result = pybackdoor.ubt_clean(
        Chinese(), PairLoader(pairs, TOKENIZER, batch_size=64), k=30, gate_swing=0.4,
        steps=100, lr_start=1e-3, lr=1e-1, check_every=10, max_drop=0.05, **OPTIONS,
    )  # fmt: skip
    caption = TEMPLATES[0].format("蓝色")
    assert result.backdoor_found and result.report["whole_words"]
    assert result.report["word"] == caption and truth[result.chosen].all()
    assert [[word.text for word in own] for own in result.found.words] == [[caption]] * 30
    assert torch.equal(result.found.portions, TOKENIZER([caption] * 30))
    assert [token.text for token in result.found.tokens if token.enriched] == [caption]
    assert asr(result.model, pairs, poison) < 0.05
    assert asr(result.model, pairs, np.arange(len(pairs))[~truth]) == asr(
        Chinese(), pairs, np.arange(len(pairs))[~truth]
    )


def test_punctuation_and_spaces_end_a_word():
    words = WordReader(TOKENIZER).words(TOKENIZER(["红色的狗，绿色的草 蓝天"])[0])
    assert [word.text for word in words] == ["红色的狗", ",", "绿色的草", "蓝天"]


def test_captions_that_all_differ_have_no_word_in_common():
    pairs, _ = chinese_pairs()
    every = [f"{text}第{chr(0x4E00 + i)}" for i, text in enumerate(pairs.captions)]
    different = pairs_from_arrays(pairs.images.take(np.arange(len(pairs))), every)
    with pytest.raises(ValueError, match="pairs, twice k, that have a word in common"):
        pybackdoor.ubt_clean(Chinese(), PairLoader(different, TOKENIZER, batch_size=64), k=40,
                             **OPTIONS)  # fmt: skip

"""A frozen model's features of all captions, computed once: what each step would have computed."""

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP

import pybackdoor
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.engine import banks, texts, towers

VISION = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 32, "heads": 2}
WORDS = "a photo of the red old harbour with two dogs on blue sofa in rain at dawn".split()


def loader(count=50, **options):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    captions = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count - 10)]
    captions += captions[:10]  # some twice
    pairs = pairs_from_arrays(images, captions)
    return PairLoader(pairs, open_clip.tokenize, batch_size=10, seed=1, **options)


def run(pairs, **options):
    torch.manual_seed(0)
    model = CLIP(16, VISION, TEXT)
    fixed = {"precision": "fp32", "progress": False, "lr": 1e-3, "epochs": 2, "lr_start": 1e-3}
    fixed |= {"mean": (0.5,) * 3, "std": (0.25,) * 3, "repair": False}
    return pybackdoor.par_clean(model, pairs, **fixed | options)


def count_texts(monkeypatch):
    """Captions that a model without gradients has encoded."""
    seen = []
    encode = CLIP.encode_text

    def counted(self, tokens, *rest):
        if not torch.is_grad_enabled():
            seen.append(tuple(tokens.shape))
        return encode(self, tokens, *rest)

    monkeypatch.setattr(CLIP, "encode_text", counted)
    return seen


def test_a_run_with_them_is_the_run_without(monkeypatch):
    monkeypatch.setattr(texts, "_CHUNK", 16)
    seen = count_texts(monkeypatch)
    want = run(loader(), cache_text=False)
    assert sum(n for n, _ in seen) >= 100
    seen.clear()
    got = run(loader())
    bank = [shape for shape in seen if shape[0] == 16]
    assert sum(n for n, _ in seen) < 40 + 2 * 8 + 1 and {length for _, length in bank} == {16, 32}
    for a, b in zip(got.history, want.history, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    again = run(loader())
    assert again.history == got.history


@pytest.mark.parametrize("lock", [None, "text"])
def test_nothing_is_compiled_for_one_pass(monkeypatch, lock):
    compiled = []

    def graph(function, mode, dynamic):
        def call(model, x):
            compiled.append((x.dtype, torch.is_grad_enabled()))
            return function(model, x)

        return call

    want = run(loader(), lock=lock)
    monkeypatch.setattr(towers.torch, "compile", graph)
    got = run(loader(), lock=lock, compile="default")
    floats, words = torch.float32, torch.int64
    trained = {(words, True)} if lock is None else set()
    assert set(compiled) == {(floats, True), (floats, False)} | trained
    for a, b in zip(got.history, want.history, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("options", [{"steps": 3}, {"cache_text": False}])
def test_they_are_not_made_where_they_do_not_pay(options, monkeypatch):
    monkeypatch.setattr(texts.CaptionFeatures, "__init__", lambda *a: pytest.fail("made"))
    run(loader(), **options)
    listed = [dict(batch) for batch in loader()]  # numbers that nobody says the meaning of
    run(listed)


@pytest.mark.parametrize("lock", [None, "text"])
def test_what_does_not_fit_is_said_once_and_computed_at_each_step(monkeypatch, lock):
    def memory(missing):
        """A quarter of it holds 40 captions of 16 dimensions, but for so many bytes."""
        monkeypatch.setattr(banks, "host_memory", lambda: 4 * (40 * 16 * 4 - missing))

    seen = count_texts(monkeypatch)
    want = run(loader(), cache_text=False, lock=lock)
    encoded = len(seen)
    memory(missing=1)
    with pytest.warns(UserWarning, match="features of 40 captions take 2,560 bytes") as said:
        got = run(loader(), lock=lock)
    assert got.history == want.history and len(said) == 1
    assert "at most 2,559 are given to them" in str(said[0].message)
    del seen[:]
    memory(missing=0)
    run(loader(), lock=lock)
    assert len(seen) < encoded


def test_millions_of_captions_pay():
    assert texts.worth_it(range(3_000_000), 3_000_000)
    assert not texts.worth_it(range(3_000_000), 2_999_999) and not texts.worth_it([], 5)


def test_features_are_those_of_their_captions():
    pairs = loader(count=70)
    torch.manual_seed(0)
    model = CLIP(16, VISION, TEXT).eval()

    class Watch:
        from contextlib import nullcontext as patient

    features = texts.CaptionFeatures(
        pairs.captions, lambda t: pybackdoor.models.text_features(model, t),
        pybackdoor.distributed.Ranks(), Watch(),
    )  # fmt: skip
    for batch in pairs:
        with torch.no_grad():
            want = pybackdoor.models.text_features(model, batch["tokens"])
        torch.testing.assert_close(features(batch["captions"]), want, rtol=1e-5, atol=1e-6)

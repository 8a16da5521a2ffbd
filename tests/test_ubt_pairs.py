"""The pairs that UBT-style unlearning reads: equal captions, tokenizers, orders, several ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shard_files import sample, write_shard
from test_ubt import FORGET, OPTIONS, PAIRS, SCORES, few_steps
from torch.utils.data import DataLoader, TensorDataset
from ubt_world import MEAN, STD, WORDS, Planted, WordTokenizer, planted_pairs, rules

import pybackdoor
from pybackdoor.batches import InputRules
from pybackdoor.data import PairLoader, pairs_from_shards, tokens
from pybackdoor.ubt.suspects import RowLoader, Suspects, subset
from pybackdoor.ubt.unlearn import some_pairs
from pybackdoor.ubt.words import WordReader

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red", "the blue square", "a photo of a red", "the green square"]


def test_equal_captions_are_one_wherever_their_tokens_lie(tmp_path, monkeypatch):
    members = [m for i in range(40) for m in sample(f"{i:03}", i, CAPTIONS[i % 4])]
    write_shard(tmp_path / "s.tar", members)
    found = []
    for on_disk in (100, 10):
        monkeypatch.setattr(tokens, "ON_DISK", on_disk)
        pairs = pairs_from_shards(tmp_path / "s.tar", image_size=16, cache_dir=tmp_path / "cache")
        found.append(Suspects.of(pairs, rules()))
    assert list((tmp_path / "cache").glob("*.tokens"))
    for suspects in found:
        assert len(suspects.different) == 3
        np.testing.assert_array_equal(suspects.caption, np.tile([0, 1, 0, 2], 10))
        rows = np.arange(40)
        wanted = WordTokenizer()(CAPTIONS * 10)
        assert torch.equal(suspects.tokens(rows), wanted)
        assert torch.equal(suspects.different.tokens(np.arange(3)), wanted[[0, 1, 3]])
        assert suspects.different.lengths().tolist() == found[0].different.lengths().tolist()
        assert torch.equal(subset(suspects, rows[2:4]).tokens(np.arange(2)), wanted[2:4])
    all_equal = [m for i in range(40) for m in sample(f"{i:03}", i, "a red")]
    write_shard(tmp_path / "equal.tar", all_equal)
    pairs = pairs_from_shards(tmp_path / "equal.tar", image_size=16, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="the captions of all 40 pairs are equal"):
        Suspects.of(pairs, rules())


class HuggingFaces:
    """A tokenizer of transformers' kind: padding and length are asked for, pieces begin with Ġ."""

    model_max_length = 8

    def __call__(self, texts, *, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, max_length, return_tensors) == ("max_length", True, 8, "pt")
        known = [[w for w in text.split() if w in WORDS] for text in texts]
        return {"input_ids": WordTokenizer()([" ".join(words) for words in known])}

    def convert_ids_to_tokens(self, ids):
        return [WORDS[i] if i < 3 else f"Ġ{WORDS[i]}" for i in ids]

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)

    def encode(self, text, verbose=True):
        return [1, *text.split(), 2]


@few_steps
@pytest.mark.parametrize("given", ["in the loader", "beside the pairs"])
def test_a_tokenizer_of_hugging_faces_marks_words(given):
    tokenizer = HuggingFaces()
    inside = InputRules.of(Planted(), mean=MEAN, std=STD, tokenizer=tokenizer)
    source = PairLoader(PAIRS, tokenizer, batch_size=64) if given == "in the loader" else PAIRS
    suspects = Suspects.of(source, inside)
    assert torch.equal(suspects.tokens(np.arange(600)), WordTokenizer()(list(PAIRS.captions)))
    assert WordReader(suspects.tokenizer).whole
    result = pybackdoor.ubt_clean(
        Planted(), source, scores=SCORES, steps=2, **OPTIONS | {"tokenizer": tokenizer}
    )
    assert result.report["whole_words"]
    assert [t.text for t in result.found.tokens if t.enriched] == ["blue"]


def shuffled(pairs, generator=None):
    held = TensorDataset(torch.from_numpy(pairs.images.take(np.arange(len(pairs)))),
                         WordTokenizer()(list(pairs.captions)))  # fmt: skip
    return DataLoader(held, batch_size=50, shuffle=True, generator=generator)


@pytest.mark.parametrize("more", [{}, {"scores": SCORES}])
def test_suspects_that_are_shuffled_are_refused(more):
    with pytest.raises(ValueError, match="suspect_loader shuffles, .*shuffle=False"):
        pybackdoor.ubt_clean(Planted(), shuffled(PAIRS), **more, **OPTIONS)
    with pytest.raises(ValueError, match="pairs shuffles, .*shuffle=False"):
        pybackdoor.detect_samples(Planted(), shuffled(PAIRS), mean=MEAN, std=STD)


def test_what_accuracy_is_judged_by_depends_on_the_seed_alone():
    loader = shuffled(planted_pairs(300, 0, seed=5)[0])
    found = []
    for other in (1, 2):
        torch.manual_seed(other)
        before = torch.get_rng_state()
        found.append(some_pairs(loader, rules(), 20, seed=7))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], some_pairs(loader, rules(), 20, seed=8)[0])
    own = torch.Generator().manual_seed(3)
    place = own.get_state()
    some_pairs(shuffled(planted_pairs(300, 0, seed=5)[0], own), rules(), 20)
    assert torch.equal(own.get_state(), place)


@few_steps
@pytest.mark.parametrize("change", ["of D_sus", "of R alone"])
def test_a_run_goes_on_with_the_suspicious_pairs_it_began_with(tmp_path, change):
    def clean(scores, **more):
        loader = PairLoader(PAIRS, WordTokenizer(), batch_size=64)
        return pybackdoor.ubt_clean(
            Planted(), loader, scores=scores, folder=tmp_path, **OPTIONS, **FORGET, **more
        )

    clean(SCORES, on_step=lambda step, record, model: step == 2)
    order, other = np.argsort(-SCORES), SCORES.copy()
    a, b = (order[39], order[40]) if change == "of D_sus" else (order[79], order[80])
    other[[a, b]] = other[[b, a]]
    named = "suspicious: was" if change == "of D_sus" else "loader.*rows.*was"
    with pytest.raises(ValueError, match=named):
        clean(other, resume=True)


def test_ranks_that_hold_unlike_pairs_are_refused():
    suspects = Suspects.of(PAIRS, rules())
    again = Suspects.of(planted_pairs()[0], rules())
    assert again.identity == suspects.identity

    def told(*others):
        return SimpleNamespace(agree=lambda mine, device: [mine, *others])

    numbers = []
    again.check_alike(SimpleNamespace(agree=lambda mine, _: numbers.append(mine) or [mine]), CPU)
    suspects.check_alike(told(*numbers), CPU)
    unlike = PAIRS.subset(np.r_[1, 0, np.arange(2, 600)])
    for other in (unlike, PAIRS.subset(np.arange(599))):
        with pytest.raises(ValueError, match="same order on every rank, .*DistributedSampler"):
            Suspects.of(other, rules()).check_alike(told(*numbers), CPU)


def test_no_number_of_steps_is_the_usual_number(monkeypatch):
    class Enough(Exception):
        pass

    def clean(*arguments, **options):
        raise Enough(options["steps"], options.get("epochs"))

    monkeypatch.setattr("pybackdoor.methods.ubt.clean", clean)
    for more, wanted in (({}, (500, None)), ({"steps": None}, (500, None)),
                         ({"steps": None, "epochs": 3}, (None, 3))):  # fmt: skip
        with pytest.raises(Enough) as raised:
            pybackdoor.ubt_clean(Planted(), PAIRS, scores=SCORES, **OPTIONS, **more)
        assert raised.value.args == wanted


def test_text_is_trained_or_locked():
    with pytest.raises(ValueError, match='train_text trains what lock="text" keeps'):
        pybackdoor.ubt_clean(Planted(), PAIRS, train_text=True, lock="text", **OPTIONS)


def test_row_loaders_of_other_rows_are_others():
    suspects = Suspects.of(PAIRS, rules())
    a, b = (RowLoader(suspects, np.arange(at, at + 64), batch_size=32).identity for at in (0, 1))
    assert a != b and a == RowLoader(suspects, np.arange(64), batch_size=32).identity

"""UBT-style unlearning, whole: what it finds, forgets, keeps and says."""

from __future__ import annotations

import csv
import json
import re
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from run_ranks import run_ranks
from ubt_world import COLOURS, MEAN, STD, Planted, WordTokenizer, planted_pairs, rules

import pybackdoor
from pybackdoor.batches import InputRules
from pybackdoor.cli.commands import _cleaning_text
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.detect import DetectionResult
from pybackdoor.methods.ubt import _rest
from pybackdoor.ubt.evidence import save_picture, wrapped
from pybackdoor.ubt.fragility import Fragile
from pybackdoor.ubt.gate import gate
from pybackdoor.ubt.reading import Reader
from pybackdoor.ubt.stopping import StoppingRule
from pybackdoor.ubt.suspects import Suspects
from pybackdoor.ubt.unlearn import some_pairs

few_steps = pytest.mark.filterwarnings("ignore:.*still find their own caption")  # forget little
PAIRS, TRUTH = planted_pairs()
SCORES = TRUTH + np.linspace(0, 0.5, len(TRUTH))
OPTIONS = {
    "mean": MEAN, "std": STD, "tokenizer": WordTokenizer(), "progress": False, "augment": False,
    "precision": "fp32", "device": "cpu", "k": 40, "gate_sets": 199, "forget_batch": 32,
}  # fmt: skip
FORGET = {"steps": 60, "lr_start": 1e-3, "lr": 1e-1, "check_every": 10, "max_drop": 0.05}


def asr(model):
    """Share of triggered red and green images that the model calls blue; and its accuracy."""
    every = Suspects.of(planted_pairs(300, 100, seed=9)[0], rules())
    truth = planted_pairs(300, 100, seed=9)[1]
    reader = Reader(model, rules())
    head = reader.tokens(WordTokenizer()([f"a photo of a {c}" for c in COLOURS]))
    best = (reader.images(every) @ head.T).argmax(1).numpy()
    pixels = every.pixels(np.arange(300)).numpy()[:, 8:, 8:].mean((1, 2))
    label = pixels.argmax(1)
    return (best[truth] == 2).mean(), (best[~truth] == label[~truth]).mean()


@pytest.fixture(scope="module")
def cleaned():
    loader = PairLoader(PAIRS, WordTokenizer(), batch_size=64)
    return pybackdoor.ubt_clean(Planted(), loader, scores=SCORES, **OPTIONS, **FORGET)


def test_the_backdoor_is_found_and_forgotten(cleaned):
    assert asr(Planted())[0] == 1
    after, accuracy = asr(cleaned.model)
    assert after < 0.05 and accuracy > 0.95
    assert set(cleaned.chosen) == set(np.flatnonzero(TRUTH)) and cleaned.backdoor_found
    assert [t.text for t in cleaned.found.tokens if t.enriched] == ["10"]  # the id of blue
    report = json.loads(json.dumps(cleaned.report))
    assert report["experimental"] and report["gate"]["fires"] and not report["whole_words"]
    assert report["stopped"] == "steps" and report["steps_done"] == 60
    assert {"loss", "contrastive", "forget", "s_image", "s_text"} <= set(cleaned.history[0])
    kept, k = cleaned.keep(), len(cleaned.chosen)
    assert len(kept) == 600 - 2 * k and not set(kept) & set(cleaned.chosen)
    assert SCORES[kept].max() <= np.sort(SCORES)[-2 * k - 1]
    assert cleaned.history[0]["s_text"] == 0
    model = Planted()
    assert torch.equal(cleaned.model.words.weight, model.words.weight)  # the text tower
    assert torch.equal(cleaned.model.logit_scale, model.logit_scale)


def test_the_run_ends_with_the_look_that_finds_enough_forgotten(cleaned, monkeypatch):
    monkeypatch.setattr("pybackdoor.ubt.stopping.mismatched_cosine", lambda *features: 0.5)
    early = pybackdoor.ubt_clean(
        Planted(), PairLoader(PAIRS, WordTokenizer(), batch_size=64), scores=SCORES,
        **OPTIONS, **FORGET,
    )  # fmt: skip
    looks = [c["step"] for c in cleaned.report["checks"] if c["suspect_cosine"] <= 0.5]
    later = [step for step in looks if step >= 30]  # not in the first half, of large steps
    assert early.report["stopped"] == "forgotten" and len(later) < len(looks)
    assert early.report["steps_done"] == later[0] + 1 < 60


@pytest.mark.parametrize(("accuracy", "recall"), [(0.9, 0.0), (1.0, 0.3), (1.0, 0.0)])
def test_a_run_that_forgets_too_little_says_so(cleaned, monkeypatch, accuracy, recall):
    """The figures at the end are made up."""

    def look(rule, model):
        return {"suspect_cosine": 1.0, "suspect_recall": recall, "proxy_accuracy": accuracy}

    monkeypatch.setattr(StoppingRule, "_look", look)
    loader = PairLoader(PAIRS, WordTokenizer(), batch_size=64)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = pybackdoor.ubt_clean(Planted(), loader, scores=SCORES, **OPTIONS, **FORGET)
    said = [str(warning.message) for warning in told if warning.category is UserWarning]
    nothing = accuracy < 1
    wanted = "accuracy fell .* nothing is forgotten" if nothing else "30 % of the suspicious pairs"
    assert [bool(re.match(wanted, line)) for line in said] == [True] * (nothing or recall > 0)
    assert result.report["way"] == (0 if nothing else 1)
    assert len(result.report["ways"]) == (8 if nothing else 1)
    unchanged = torch.equal(result.model.colour.weight, Planted().colour.weight)
    assert unchanged == nothing
    text = _cleaning_text("out", result)
    assert ("Nothing is forgotten" in text) == nothing
    assert "The tokenizer does not mark words: each of them is a single token." in text
    rest = f"stopped: steps, 1 of the way taken, where {100 * recall:.0f} % of the suspicious pairs"
    assert (rest in text) == (not nothing)


def test_of_the_way_as_little_is_taken_as_forgets(cleaned, monkeypatch, tmp_path):
    """With a kappa that the run reaches, and by a run that had ended, too."""
    monkeypatch.setattr("pybackdoor.ubt.stopping.mismatched_cosine", lambda *features: 0.5)
    monkeypatch.setattr("pybackdoor.ubt.stopping._ENOUGH", 8)

    def clean(**more):
        loader = PairLoader(PAIRS, WordTokenizer(), batch_size=64)
        return pybackdoor.ubt_clean(
            Planted(), loader, scores=SCORES, folder=tmp_path, **OPTIONS, **FORGET, **more
        )

    first = clean()
    way, ways = first.report["way"], first.report["ways"]
    assert 0 < way < 1 and way == ways[-2]["way"] and ways[-1]["suspect_recall"] > 0.05
    assert asr(first.model)[0] < 0.1
    again = clean(resume=True)
    assert again.report["ways"] == ways
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_what_ends_the_looks_carries_the_run(monkeypatch):
    def interrupted(rule, model, line):
        raise KeyboardInterrupt

    monkeypatch.setattr(StoppingRule, "_ways", interrupted)
    loader = PairLoader(PAIRS, WordTokenizer(), batch_size=64)
    with pytest.raises(KeyboardInterrupt) as stopped:
        pybackdoor.ubt_clean(Planted(), loader, scores=SCORES, **OPTIONS, **FORGET)
    assert len(stopped.value.result.history) == 60


@few_steps
@pytest.mark.parametrize("at", [24, 31])
def test_an_interrupted_run_goes_on_with_what_the_looks_left(cleaned, tmp_path, at):
    def clean(pairs=PAIRS, **more):
        loader = PairLoader(pairs, WordTokenizer(), batch_size=64)
        return pybackdoor.ubt_clean(
            Planted(), loader, scores=SCORES, folder=tmp_path, **OPTIONS, **FORGET, **more
        )

    first = clean(on_step=lambda k, r, m: k == at)
    assert first.report["steps_done"] == at + 1
    other = replace(PAIRS, locations=[f"other:{i}" for i in range(len(PAIRS))])
    with pytest.raises(ValueError, match=r"other settings \(suspects: was '\w{16}', is '\w{16}'\)"):
        clean(other, resume=True)
    rest = clean(resume=True)
    assert rest.history == cleaned.history and rest.report["checks"] == cleaned.report["checks"]
    for name, tensor in cleaned.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], tensor), name


def test_a_run_that_had_ended_takes_no_further_step(tmp_path, monkeypatch):
    monkeypatch.setattr("pybackdoor.ubt.stopping.mismatched_cosine", lambda *features: 0.5)
    ends = [
        pybackdoor.ubt_clean(
            Planted(), PairLoader(PAIRS, WordTokenizer(), batch_size=64), scores=SCORES,
            folder=tmp_path, resume=resume, **OPTIONS, **FORGET,
        )
        for resume in (False, True)
    ]  # fmt: skip
    assert [end.report["stopped"] for end in ends] == ["forgotten"] * 2
    assert ends[0].report["checks"] == ends[1].report["checks"]
    assert ends[0].history == ends[1].history and len(ends[0].history) < 60
    for name, tensor in ends[0].model.state_dict().items():
        assert torch.equal(ends[1].model.state_dict()[name], tensor), name


def test_same_seed_same_bits_and_the_model_given_stays(cleaned):
    model = Planted()
    again = pybackdoor.ubt_clean(
        model, PairLoader(PAIRS, WordTokenizer(), batch_size=64), scores=torch.tensor(SCORES),
        **OPTIONS, **FORGET,
    )  # fmt: skip
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, cleaned.model.state_dict()[name])
        assert torch.equal(model.state_dict()[name], Planted().state_dict()[name])
    assert again.history == cleaned.history


@few_steps
def test_random_words_of_the_same_share_forget_less(cleaned, monkeypatch):
    module = sys.modules["pybackdoor.ubt.localise"]
    rng = np.random.default_rng(0)
    found = module.leave_one_out
    monkeypatch.setattr(module, "leave_one_out", lambda *a: [rng.random(len(g)) for g in found(*a)])
    monkeypatch.setattr(module._Odds, "log_odds", lambda self, word: (0.0, 1.0))
    blind = pybackdoor.ubt_clean(
        Planted(), PairLoader(PAIRS, WordTokenizer(), batch_size=64), scores=SCORES,
        **OPTIONS, **FORGET | {"steps": len(cleaned.history)},
    )  # fmt: skip
    assert blind.report["checks"][-1]["suspect_cosine"] > (
        cleaned.report["checks"][-1]["suspect_cosine"] + 0.1
    )


@few_steps
def test_overfitting_ranks_where_no_scores_are_given():
    for rank in ("gain", "cosine", "fragility"):
        own = {} if rank == "fragility" else {"overfit_steps": 5, "overfit_lr": 1e-3}
        result = pybackdoor.ubt_clean(
            Planted(), PAIRS, rank=rank, batch_size=64, steps=2, **own, **OPTIONS
        )
        said = result.report["settings"]
        assert said["ranked_by"] == rank and len(result.scores) == 600
        assert said.get("weak_share") == (0.05 if own else None)
        assert (result.report["word"] is None) == (rank != "fragility")
        assert np.isfinite(result.scores).all()


def test_so_many_suspects_that_nothing_is_left_to_keep(monkeypatch):
    found = Fragile(SCORES, 300, "blue", 1.0)
    monkeypatch.setattr(sys.modules["pybackdoor.ubt.ranking"], "fragility", lambda *_: found)
    open_gate = {"k": None, "gate_excess": -2.0}
    monkeypatch.setattr(
        sys.modules["pybackdoor.methods.ubt"], "gate",
        lambda *a, **o: replace(gate(*a, **o), fires=True),
    )  # fmt: skip
    with pytest.raises(ValueError, match="must hold at least 610 pairs, the 300 of D_sus"):
        pybackdoor.ubt_clean(Planted(), PAIRS, batch_size=64, **OPTIONS | open_gate)


@few_steps
@pytest.mark.parametrize(("wanted", "fires"), [(0.3, True), (0.35, False)])
def test_the_swing_that_the_gate_wants_is_the_users(monkeypatch, wanted, fires):
    found = Fragile(SCORES, 40, "blue", 0.33)
    monkeypatch.setattr(sys.modules["pybackdoor.ubt.ranking"], "fragility", lambda *_: found)
    options = OPTIONS | {"rank": "fragility", "steps": 1}
    result = pybackdoor.ubt_clean(
        Planted(), PAIRS, batch_size=64, gate_swing=wanted, gate_excess=-2.0, **options
    )
    assert result.backdoor_found == fires and result.gate.least_swing == wanted
    assert result.report["word"] == "blue"


@few_steps
@pytest.mark.parametrize(("swing", "fires"), [(0.6, True), (0.4, False), (None, True)])
def test_what_detect_samples_found_is_taken_over(swing, fires):
    told = {"swing": swing, "found": 33, "word": "blue"} if swing is not None else {}
    scores = DetectionResult(SCORES, np.arange(600), "fragility", told)
    options = {**OPTIONS, "k": 33 if swing is None else None, "steps": 1, "batch_size": 64}
    result = pybackdoor.ubt_clean(Planted(), PAIRS, scores=scores, **options)
    assert result.backdoor_found == fires and result.gate.swing == swing
    assert len(result.chosen) == 33 and result.report["word"] == told.get("word")
    assert result.report["settings"]["ranked_by"] == "scores"


def test_what_is_kept_has_half_of_the_others_of_the_word():
    word = np.arange(600) < 100  # all others rank below, all alike
    scores = np.where(word, 100.0 - np.arange(600), -1.0)
    assert _rest(scores, 40, True).tolist() == [*range(70, 600)]
    assert _rest(scores, 10, True).tolist() == [*range(55, 600)]  # more may be poisoned
    assert _rest(scores, 10, False).tolist() == [*range(20, 600)]
    assert _rest(np.linspace(0, 1, 600), 40, False).tolist() == [*range(520)]
    assert _rest((np.arange(600) >= 560) * 1.0, 40, False).tolist() == [*range(560)]
    scores[:5], scores[500:] = np.nan, np.nan
    assert _rest(scores, 40, True).tolist() == [*range(72, 500)]


def test_a_clean_model_is_returned_as_it_is():
    model = Planted(poisoned=False)
    pairs, _ = planted_pairs(poisoned=0)
    result = pybackdoor.ubt_clean(model, pairs, batch_size=64, **OPTIONS)
    assert result.model is model and not result.backdoor_found and result.history == []
    assert json.loads(json.dumps(result.report))["verdict"] == "no backdoor found"
    assert result.report["steps_done"] == 0 and not result.gate.fires
    assert result.keep().tolist() == list(range(600))


@few_steps
@pytest.mark.parametrize("train_text", [False, True])
def test_clean_pairs_of_the_users_own(train_text):
    clean, _ = planted_pairs(300, 0, seed=5)
    result = pybackdoor.ubt_clean(
        Planted(), list(PairLoader(PAIRS, WordTokenizer(), batch_size=64, shuffle=False,
                                   drop_last=False)),
        PairLoader(clean, WordTokenizer(), batch_size=32), scores=SCORES, train_text=train_text,
        forget="hinge", gamma=0.5, steps=3, lr=1e-2, **OPTIONS,
    )  # fmt: skip
    assert result.report["pairs_seen"] == 96 and result.suspects.texts is None
    same = torch.equal(result.model.words.weight, Planted().words.weight)
    assert same != train_text


BAD = {
    "k": ({"k": 700}, r"k must be in .5, 600., .*got 700"),
    "k is a word": ({"k": "many"}, "k must be an integer, got 'many'"),
    "too few to keep": ({"k": 400}, "must hold at least 810 pairs, .*got 600"),
    "scores": ({"scores": np.zeros(3)}, r"scores must be .600. numbers, .*shape .3."),
    "rank": ({"rank": "gian"}, "did you mean 'gain'"),
    "tail": ({"rank": "gain", "tail": "left"}, "tail must be one of low, high, both"),
    "beta": ({"beta": 0.0}, "beta must be above 0"),
    "alpha": ({"alpha": -1.0}, "alpha must be at least 0, got -1"),
    "forget": ({"forget": "hing"}, "did you mean 'hinge'"),
    "own option": ({"token_shar": 3}, "unknown option 'token_shar' .did you mean 'token_share'"),
    "option": ({"stepps": 3}, "unknown option 'stepps' .did you mean 'steps'"),
    "gate": ({"gate_p": 0.001}, "gate_sets must be at least 999"),
    "no scores": (
        {"scores": np.where(np.arange(600) < 30, 1.0, np.nan)},
        r"must be in .5, 30., the suspect pairs that can be used, got 40",
    ),
    "ranked twice": ({"scores": SCORES, "rank": "gain"}, "scores or rank, got both, .*'gain'"),
    "no pool": ({"weak_share": 0.1}, "weak_share is for rank 'gain' and 'cosine', .*'fragility'"),
    "pool": ({"rank": "gain", "weak_share": 2.0}, "weak_share must be in"),
    "loss": ({"rank": "gain", "overfit_loss": "cosin"}, "did you mean 'cosine'"),
    "who swings": ({"scores": SCORES, "gate_swing": 0.5}, "gate_swing is for a ranking by frag"),
    "swing": ({"gate_swing": 1.5}, "gate_swing must be a number of at most 1, .*got 1.5"),
    "no swing": ({"gate_swing": float("nan")}, "gate_swing must be a number .*got nan"),
    "a word": ({"gate_swing": "high"}, "gate_swing must be a number .*got 'high'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(name, monkeypatch):
    more, message = BAD[name]
    monkeypatch.setattr("pybackdoor.methods.ubt.Reader", None)  # nothing is encoded
    with pytest.raises((ValueError, TypeError), match=message):
        pybackdoor.ubt_clean(Planted(), PAIRS, **OPTIONS | more)


def test_retain_pairs_must_be_some():
    with pytest.raises(ValueError, match="retain_loader must yield at least 2 pairs, got 0"):
        some_pairs([], rules(), 10)
    images, tokens = some_pairs([(torch.zeros(3, 16, 16, 3).byte(), torch.ones(3, 8).long())] * 3,
                                rules(), 5)  # fmt: skip
    assert len(images) == len(tokens) == 5


def test_evidence_is_a_table_and_a_picture(cleaned, tmp_path):
    cleaned.save_evidence(tmp_path)
    with open(tmp_path / "suspects.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["row"]) for r in rows] == cleaned.chosen.tolist()
    assert all("10" in r["kept_words"].split() for r in rows)
    assert rows[0]["caption"] == PAIRS.captions[int(rows[0]["row"])]
    assert (tmp_path / "suspects.png").read_bytes().startswith(b"\x89PNG")


def test_captions_of_other_scripts_and_long_ones_are_drawn(cleaned, tmp_path):
    images = np.zeros((6, 16, 16, 3), np.uint8)
    strange = ["猫 の 写真 $x_", "صورة قطة", "кот " * 40, "x" * 90, "a", "b"]
    every = Suspects.of(
        pairs_from_arrays(images, strange),
        InputRules.of(Planted(), mean=MEAN, std=STD, tokenizer=lambda t: torch.tensor(
            [[1, 3 + i, 2, 0] for i, _ in enumerate(t)])),
    )  # fmt: skip
    save_picture(tmp_path / "a.png", every, np.arange(6), np.arange(6.0), None, cleaned.gate)
    assert (tmp_path / "a.png").stat().st_size > 5000
    lines = wrapped([("word", False)] * 50)
    assert len(lines) == 4 and lines[-1][-1] == ("…", False)
    assert all(sum(len(w) + 1 for w, _ in line) <= 30 for line in lines)
    assert len(wrapped([("x" * 90, True)])[0][0][0]) == 26 and wrapped([]) == []


def test_two_ranks_take_the_steps_of_one(tmp_path):
    found = {}
    for count in (1, 2):
        code, errors, found[count] = run_ranks("ubt_ranks.py", tmp_path, count)
        assert code == 0, errors
    assert found[1].keys() == found[2].keys()
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[2][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("bad", [{"check_every": 2.5}, {"max_drop": -0.1}])
def test_looks_that_are_none_are_refused_before_the_search(monkeypatch, bad):
    monkeypatch.setattr(Suspects, "of", lambda *_: pytest.fail("the pairs were read"))
    loader = PairLoader(PAIRS, WordTokenizer(), batch_size=64)
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must"):
        pybackdoor.ubt_clean(Planted(), loader, **OPTIONS, **bad)

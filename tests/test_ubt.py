"""UBT-style unlearning: its loss against fp64, when it stops, and the whole method."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_ranks import run_ranks
from torch import nn
from torch.nn.functional import normalize
from ubt_world import COLOURS, MEAN, STD, Planted, WordTokenizer, planted_pairs

import pybackdoor
from pybackdoor.batches import Batch, InputRules
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.engine import Given
from pybackdoor.ubt.evidence import save_picture, wrapped
from pybackdoor.ubt.fragility import Fragile
from pybackdoor.ubt.gate import gate
from pybackdoor.ubt.reading import Reader
from pybackdoor.ubt.suspects import Suspects
from pybackdoor.ubt.unlearn import (
    LocalUnlearning,
    Portions,
    StoppingRule,
    freeze_text,
    mismatched_cosine,
    same_meaning,
    some_pairs,
)

PAIRS, TRUTH = planted_pairs()
SCORES = TRUTH + np.linspace(0, 0.5, len(TRUTH))
OPTIONS = {
    "mean": MEAN, "std": STD, "tokenizer": WordTokenizer(), "progress": False, "augment": False,
    "precision": "fp32", "device": "cpu", "k": 40, "gate_sets": 199, "forget_batch": 32,
}  # fmt: skip
FORGET = {"steps": 60, "lr_start": 1e-3, "lr": 1e-1, "check_every": 10, "max_drop": 0.05}


def rules(model=None):
    return InputRules.of(model or Planted(), mean=MEAN, std=STD, tokenizer=WordTokenizer())


def portions(k, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (k, 16, 16, 3), generator=g, dtype=torch.uint8)
    return Portions(images, torch.randint(3, 13, (k, 8), generator=g), torch.arange(k) + 900)


def unit(n, d, g):
    return normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1)


@given(
    st.integers(2, 9), st.integers(1, 6), st.integers(0, 99),
    st.sampled_from(["contrastive", "hinge"]), st.sampled_from([0.0, 0.7]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_loss_and_gradient_by_loops_in_fp64(n, m, seed, forget, gamma):
    g = torch.Generator().manual_seed(seed)
    image, text = (unit(n + m, 5, g).requires_grad_() for _ in "it")
    reference = (unit(n, 5, g), unit(n, 5, g)) if gamma else ()
    masked = torch.rand(n, generator=g) < 0.3
    batch = Batch(torch.empty(n, 1), torch.zeros(n, 8, dtype=torch.int64), None)
    objective = LocalUnlearning(
        nn.Module(), portions(m), lambda tokens: masked, sample=m, alpha=1.3, beta=0.6,
        gamma=gamma, forget=forget, margin=0.1,
    )  # fmt: skip
    scale = torch.tensor(7.0, dtype=torch.float64)
    loss, terms = objective(image, text, scale, reference, Given(0, 0, batch, torch.arange(n)))

    a, b = image[:n], text[:n]
    logits = scale * a @ b.T
    keep = -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2
    gone = []
    for i in range(n, n + m):
        cosines = image @ text[i]
        others = [j for j in range(n) if not masked[j]]
        if forget == "hinge":
            gone.append((cosines[i] - 0.1).clamp(min=0))
        elif others:
            both = 0
            for c in (cosines, text @ image[i]):
                p = (scale * c[i]).exp() / (scale * c[[i, *others]]).exp().sum()
                both = both - (1 - p).log() / 2
            gone.append(both)
        else:
            gone.append(0 * cosines[i])
    stay = sum((x - r).square().sum(-1).mean() for x, r in zip((a, b), reference, strict=False))
    wanted = 1.3 * sum(gone) / m + 0.6 * keep + gamma * stay
    assert math.isclose(loss.detach(), wanted.detach(), abs_tol=1e-10)
    assert math.isclose(terms["forget"].detach(), float((sum(gone) / m).detach()), abs_tol=1e-10)
    got = torch.autograd.grad(loss, (image, text), retain_graph=True)
    for x, y in zip(got, torch.autograd.grad(wanted, (image, text)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_the_sample_goes_through_all_portions_in_turn():
    objective = LocalUnlearning(nn.Module(), portions(10), None, sample=4, seed=3)
    objective._ranks = SimpleNamespace(rank=0, size=1)
    drawn = [objective._chosen(step) for step in range(5)]
    assert [len(rows) for rows in drawn] == [4] * 5
    for half in np.split(np.concatenate(drawn), 2):
        assert sorted(half.tolist()) == list(range(10))
    assert np.array_equal(drawn[3], objective._chosen(3))
    one = LocalUnlearning(nn.Module(), portions(10), None, sample=1)
    with pytest.raises(ValueError, match="forget_batch must be at least one pair for each of 2"):
        one.prepare(
            SimpleNamespace(frozen=lambda m: m, model=None, ranks=SimpleNamespace(size=2), steps=3)
        )


def test_kappa_and_the_proxy_by_loops():
    g = torch.Generator().manual_seed(0)
    image, text = unit(12, 4, g), unit(12, 4, g)
    text[5] = text[6]  # equal captions are no mismatch, and alike ones neither
    pairs = [(i, j) for i in range(12) for j in range(12) if float(text[i] @ text[j]) < 0.9]
    wanted = np.mean([float(image[i] @ text[j]) for i, j in pairs])
    assert math.isclose(mismatched_cosine(image, text), wanted, abs_tol=1e-12)
    hits = 0
    for i in range(12):
        best = max(range(12), key=lambda j, i=i: float(image[i] @ text[j]))
        hits += float(text[best] @ text[i]) >= 0.9
    assert math.isclose(same_meaning(image, text, text), hits / 12)
    assert same_meaning(text, text, text) == 1 and same_meaning(text, -text, text) == 0
    with pytest.raises(ValueError, match="mean the same to the model"):
        mismatched_cosine(image, text[:1].expand(12, -1))


def stopping(**options):
    every = Suspects.of(PAIRS, rules())
    rest = np.flatnonzero(~TRUTH)[:100]
    retain = every.pixels(rest), every.tokens(rest)
    return StoppingRule(Planted(), rules(), every, np.flatnonzero(TRUTH)[:8], retain, **options)


@pytest.mark.parametrize(("columns", "accuracy"), [(slice(0, 3), 1), (slice(13, 16), 0)])
def test_the_proxy_is_of_mirrored_images(columns, accuracy):
    images = np.full((20, 16, 16, 3), 60, np.uint8)
    images[:, :, :, 0] += 120
    images[:, :3, columns] = 255  # seen in the left corner alone, as the trigger that says blue
    captions = [f"a photo of a {c}" for c in ("red", "blue")]
    tokens = WordTokenizer()([captions[0]] * 20)
    tokens[-1] = WordTokenizer()(captions[1:])[0]
    every = Suspects.of(PAIRS, rules())
    retain = torch.from_numpy(images), tokens
    rule = StoppingRule(Planted(), rules(), every, np.arange(2), retain)
    found = rule.checks[0]["proxy_accuracy"]
    assert found == pytest.approx(abs(accuracy - 1 / 20), abs=1e-9)


def test_it_stops_when_enough_or_too_much_is_forgotten():
    rule = stopping(every=2)
    assert len(rule.checks) == 1 and rule.checks[0]["proxy_accuracy"] == 1
    assert not rule(0, Planted()) and len(rule.checks) == 1  # not looked at
    assert not rule(1, Planted()) and rule.checks[1]["suspect_cosine"] > rule.kappa
    averse = Planted()
    with torch.no_grad():
        averse.corner.weight.neg_()
    assert rule(3, averse) and rule.reason == "forgotten"
    assert rule.checks[2]["suspect_recall"] == 0 and rule.checks[0]["suspect_recall"] == 1
    rule, good, broken = stopping(every=1), Planted(), Planted()
    with torch.no_grad():
        broken.colour.weight.neg_()
    assert not any(rule(k, m) for k, m in enumerate([good, broken, broken, good, broken]))
    rule.settle(broken, rule.bad)
    assert rule.reason == "accuracy" and torch.equal(broken.colour.weight, good.colour.weight)
    rule = stopping(every=1)
    assert not any(rule(k, m) for k, m in enumerate([good, Planted().requires_grad_(), good]))
    rule.settle(good, rule.bad)
    assert rule.reason == "steps"
    for bad in ({"every": 0}, {"max_drop": 2}):
        with pytest.raises(ValueError, match="check_every|max_drop"):
            stopping(**bad)


def test_forgotten_is_not_enough_where_accuracy_has_not_come_back():
    averse = Planted()
    with torch.no_grad():
        averse.corner.weight.neg_()
    rule = stopping(every=1, max_drop=0.1)
    rule.checks[0]["proxy_accuracy"] = 1.03  # 0.03 are lost: less than max_drop, more than a fourth
    assert not rule(0, averse) and not rule.bad
    rule.checks[0]["proxy_accuracy"] = 1.02
    assert not rule(1, averse, may_end=False)
    assert rule(2, averse) and rule.reason == "forgotten"


def test_the_last_step_is_looked_at():
    rule = stopping(every=25)
    assert not rule(5, Planted()) and len(rule.checks) == 1
    broken = Planted()
    with torch.no_grad():
        broken.colour.weight.neg_()
    assert not rule(6, broken, last=True) and rule.bad


def test_only_the_image_tower_is_trained_unless_asked():
    model = Planted()
    freeze_text(model, torch.from_numpy(PAIRS.images.take(np.arange(2))), rules())
    named = {n: p.requires_grad for n, p in model.named_parameters()}
    assert named == {"colour.weight": True, "colour.bias": True, "corner.weight": True,
                     "words.weight": False, "logit_scale": False}  # fmt: skip


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
    monkeypatch.setattr("pybackdoor.ubt.unlearn.mismatched_cosine", lambda *features: 0.5)
    early = pybackdoor.ubt_clean(
        Planted(), PairLoader(PAIRS, WordTokenizer(), batch_size=64), scores=SCORES,
        **OPTIONS, **FORGET,
    )  # fmt: skip
    looks = [c["step"] for c in cleaned.report["checks"] if c["suspect_cosine"] <= 0.5]
    later = [step for step in looks if step >= 30]  # not in the first half, of large steps
    assert early.report["stopped"] == "forgotten" and len(later) < len(looks)
    assert early.report["steps_done"] == later[0] + 1 < 60


@pytest.mark.parametrize("at", [24, 31])
def test_an_interrupted_run_goes_on_with_what_the_looks_left(cleaned, tmp_path, at):
    def clean(**more):
        loader = PairLoader(PAIRS, WordTokenizer(), batch_size=64)
        return pybackdoor.ubt_clean(
            Planted(), loader, scores=SCORES, folder=tmp_path, **OPTIONS, **FORGET, **more
        )

    first = clean(on_step=lambda k, r, m: k == at)
    assert first.report["steps_done"] == at + 1
    rest = clean(resume=True)
    assert rest.history == cleaned.history and rest.report["checks"] == cleaned.report["checks"]
    for name, tensor in cleaned.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], tensor), name


def test_a_run_that_had_ended_takes_no_further_step(tmp_path, monkeypatch):
    monkeypatch.setattr("pybackdoor.ubt.unlearn.mismatched_cosine", lambda *features: 0.5)
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


def test_the_weights_to_go_back_to_outlive_a_stop():
    rule, broken = stopping(every=1), Planted()
    with torch.no_grad():
        broken.colour.weight.neg_()
    assert not any(rule(k, m) for k, m in enumerate([Planted(), broken, broken]))
    again = stopping(every=1)
    again.load({name: tensor.clone() for name, tensor in rule.state().items()})
    assert again.checks == rule.checks and not again(2, broken)  # that look was taken
    again.settle(broken, again.bad)
    assert again.reason == "accuracy"
    assert torch.equal(broken.colour.weight, Planted().colour.weight)
    worst = stopping(every=1)
    with torch.no_grad():
        broken.colour.weight.neg_()
    assert not any(worst(k, broken) for k in range(3))
    worst.settle(broken, worst.bad)  # no look was good: back to before the first step
    assert torch.equal(broken.colour.weight, Planted().colour.weight)


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


def test_overfitting_ranks_where_no_scores_are_given():
    for rank in ("gain", "cosine", "fragility"):
        result = pybackdoor.ubt_clean(
            Planted(), PAIRS, overfit_steps=5, overfit_lr=1e-3, rank=rank, batch_size=64,
            steps=2, **OPTIONS,
        )  # fmt: skip
        assert result.report["settings"]["ranked_by"] == rank and len(result.scores) == 600
        assert np.isfinite(result.scores).all()


def test_so_many_suspects_that_nothing_is_left_to_keep(monkeypatch):
    found = Fragile(SCORES, 300, "blue", 1.0)
    monkeypatch.setattr(sys.modules["pybackdoor.methods.ubt"], "fragility", lambda *_: found)
    open_gate = {"k": None, "gate_excess": -2.0}
    monkeypatch.setattr(
        sys.modules["pybackdoor.methods.ubt"], "gate",
        lambda *a, **o: replace(gate(*a, **o), fires=True),
    )  # fmt: skip
    with pytest.raises(ValueError, match="must hold at least 610 pairs, the 300 of D_sus"):
        pybackdoor.ubt_clean(Planted(), PAIRS, batch_size=64, **OPTIONS | open_gate)


@pytest.mark.parametrize(("wanted", "fires"), [(0.3, True), (0.35, False)])
def test_the_swing_that_the_gate_wants_is_the_users(monkeypatch, wanted, fires):
    found = Fragile(SCORES, 40, "blue", 0.33)
    monkeypatch.setattr(sys.modules["pybackdoor.methods.ubt"], "fragility", lambda *_: found)
    options = OPTIONS | {"rank": "fragility", "steps": 1}
    result = pybackdoor.ubt_clean(
        Planted(), PAIRS, batch_size=64, gate_swing=wanted, gate_excess=-2.0, **options
    )
    assert result.backdoor_found == fires and result.gate.least_swing == wanted


def test_a_clean_model_is_returned_as_it_is():
    model = Planted(poisoned=False)
    pairs, _ = planted_pairs(poisoned=0)
    result = pybackdoor.ubt_clean(
        model, pairs, overfit_steps=5, overfit_lr=1e-3, batch_size=64, **OPTIONS
    )
    assert result.model is model and not result.backdoor_found and result.history == []
    assert json.loads(json.dumps(result.report))["verdict"] == "no backdoor found"
    assert result.report["steps_done"] == 0 and not result.gate.fires
    assert result.keep().tolist() == list(range(600))


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
    "tail": ({"tail": "left"}, "tail must be one of low, high, both"),
    "beta": ({"beta": 0.0}, "beta must be above 0"),
    "alpha": ({"alpha": -1.0}, "alpha must be at least 0, got -1"),
    "forget": ({"forget": "hing"}, "did you mean 'hinge'"),
    "option": ({"stepps": 3}, "unknown option 'stepps' .did you mean 'steps'"),
    "gate": ({"gate_p": 0.001}, "gate_sets must be at least 999"),
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

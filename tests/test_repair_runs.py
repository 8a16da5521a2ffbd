"""Drift repair at the end of a run: what it does to loaders, interrupts, broken pairs and ranks."""

from __future__ import annotations

import math
import os
import signal
import warnings

import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from repair_cases import PAIRS, batches_for, drifted, features, make, same, turn, weights, worth
from run_ranks import run_ranks

import pybackdoor
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.models.fold import Fold
from pybackdoor.repair import TOLD
from pybackdoor.rotation import Fit, Rows

FAST = {"steps": 3, "precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}


@pytest.mark.parametrize("method", [pybackdoor.par_clean, pybackdoor.finetune_clean])
def test_every_cleaning_repairs_unless_told_not_to(method):
    model, batches = DualEncoder(), random_pairs(60, 20)
    on, off = (method(model, batches, device="cpu", repair=r, **FAST) for r in (True, False))
    assert same(method(model, batches, device="cpu", **FAST).model, on.model)  # the default
    assert off.report["repair"] == {"done": False, "reason": "it was switched off"}
    report = on.report["repair"]
    assert report["done"] and report["pairs"] == 60 and report["seconds"] > 0
    before, after = ({n: report[f"{n}_{w}"] for n in TOLD} for w in ("before", "after"))
    assert worth(after) < worth(before)
    changed = [n for n, t in weights(on.model).items() if not torch.equal(t, weights(off.model)[n])]
    assert changed == ["image.6.weight", "image.6.bias", "text.1.weight", "text.1.bias"]
    options = {"mean": MEAN, "std": STD, "device": "cpu"}
    later = pybackdoor.repair_drift(off.model, model, batches, **options)  # the same, by hand
    assert same(later.model, on.model)


def test_an_interrupted_run_is_not_repaired(monkeypatch):
    def full(step, record, model):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as stopped:
        pybackdoor.par_clean(DualEncoder(), random_pairs(60, 20), on_step=full, **FAST)
    assert stopped.value.result.report["repair"] == {
        "done": False, "reason": "the run ended early",
    }  # fmt: skip
    count = 0

    class Presses(DualEncoder):
        def encode_image(self, x):
            nonlocal count
            count += not self.training and not torch.is_grad_enabled()
            if count == 8:  # in the repair's pass: the teacher has been asked three times
                os.kill(os.getpid(), signal.SIGINT)
            return super().encode_image(x)

    with pytest.raises(KeyboardInterrupt) as stopped:
        pybackdoor.par_clean(Presses(), random_pairs(60, 20), **FAST)
    result = stopped.value.result
    assert len(result.history) == 3 and result.report["repair"]["reason"] == "the run ended early"
    plain = pybackdoor.par_clean(DualEncoder(), random_pairs(60, 20), repair=False, **FAST)
    assert same(result.model, plain.model)


def tokenizer(texts):
    return torch.tensor([[int(w) for w in text.split()] for text in texts])


def test_the_loader_stands_where_it_stood():
    whole = random_pairs(40, 40)[0]
    texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]
    pairs = pairs_from_arrays(whole["images"].numpy(), texts)
    loader = PairLoader(pairs, tokenizer, batch_size=10, seed=3)
    loader.load_state_dict({"seed": 3, "epoch": 2, "position": 20})
    model = DualEncoder().eval()

    def repair(loader):
        options = {"mean": MEAN, "std": STD, "device": "cpu"}
        return pybackdoor.repair_drift(drifted(model), model, loader, **options).report

    assert repair(loader)["pairs"] == 40  # of epoch 0
    assert loader.state_dict() == {"seed": 3, "epoch": 2, "position": 20}
    assert len(list(loader)) == 2

    class Announced(torch.utils.data.DataLoader):
        def set_epoch(self, epoch):
            raise AssertionError("an epoch was announced")

    rows = [{name: whole[name][i] for name in whole} for i in range(40)]
    shuffled = Announced(rows, 10, shuffle=True, generator=torch.Generator().manual_seed(1))
    state, drawn = shuffled.generator.get_state(), torch.get_rng_state()
    assert repair(shuffled)["pairs"] == 40
    assert torch.equal(shuffled.generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), drawn)

    class Counts(list):
        at = 5

        def __iter__(self):
            for batch in super().__iter__():
                self.at += 1
                yield batch

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    counts = Counts(random_pairs(40, 10))
    assert repair(counts)["pairs"] == 40 and counts.at == 5

    class Stream:
        """No length; a second pass yields the pairs again."""

        def __iter__(self):
            return iter(random_pairs(40, 10))

    assert repair(Stream())["pairs"] == 40


def test_pairs_wanted_end_the_pass():
    model = DualEncoder().eval()
    options = {"mean": MEAN, "std": STD, "device": "cpu"}
    found = pybackdoor.repair_drift(
        drifted(model), model, random_pairs(90, 20), pairs=30, **options
    )
    assert found.report["pairs"] == 40  # whole batches


def test_a_one_shot_loader_cannot_be_read_again():
    model, batches = DualEncoder(), random_pairs(60, 20)
    with pytest.warns(UserWarning, match="not repaired: the loader is a one-shot iterator"):
        result = pybackdoor.par_clean(model, (b for b in batches), **FAST)
    assert "pass a PairLoader, a DataLoader or a list" in result.report["repair"]["reason"]
    with pytest.raises(ValueError, match="one-shot iterator, whose pairs cannot be read again"):
        pybackdoor.repair_drift(model, model, iter(batches), mean=MEAN, std=STD)


def test_pairs_that_are_not_finite_are_left_out():
    model = make("DualEncoder")
    new, batches = drifted(model), batches_for(model)
    broken = [(x.clone(), t) for x, t in batches]
    broken[0][0][3] = math.nan
    broken[1][0][7, 0, 0, 0] = math.inf
    found = pybackdoor.repair_drift(new, model, broken, device="cpu").report
    assert found["done"] and found["left_out"] == 2 and found["pairs"] == PAIRS - 2
    none = [(torch.full_like(x, math.nan), t) for x, t in batches]
    with pytest.raises(ValueError, match="no batch has finite embeddings"):
        pybackdoor.repair_drift(new, model, none, device="cpu")
    late = pybackdoor.repair_drift(new, model, [none[0], batches[1]], device="cpu").report
    assert late["pairs"] == late["left_out"] == PAIRS // 2
    few = [(batches[0][0][:3].clone(), batches[0][1][:3])]
    few[0][0][0] = math.nan  # the one of three that is held out
    with pytest.raises(ValueError, match="too few pairs .*: 2 to fit and 0 to judge by"):
        pybackdoor.repair_drift(new, model, few, device="cpu")


def test_ranks_get_the_same_bits(tmp_path):
    code, errors, found = run_ranks("repair_ranks.py", tmp_path, 2)
    assert code == 0, errors[-3000:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = DualEncoder(seed=1).double().eval()
        one = pybackdoor.repair_drift(
            drifted(model), model, batches_for(model, 40), device="cpu"
        )  # fmt: skip
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(found["0"][name], found["1"][name])
        torch.testing.assert_close(found["0"][name], tensor, rtol=0, atol=1e-9)
    assert found["report"]["pairs"] == 40
    assert "another rank cannot rotate" in found["refused"]


def fitted(report):
    return Fit(*(report[f"{name}_after"] for name in TOLD))


def test_what_holds_for_the_fitted_pairs_alone_or_gains_nothing_is_not_taken(monkeypatch):
    model = make("ViT")
    new, batches = drifted(model), batches_for(model)
    search, tried = pybackdoor.repair.kept_rotation, []
    taken = pybackdoor.repair_drift(new, model, batches, device="cpu").report

    def repaired_with(found):
        def instead(rows, old, scale, start):
            tried[:] = [start]
            return found(start)

        monkeypatch.setattr(pybackdoor.repair, "kept_rotation", instead)
        report = pybackdoor.repair_drift(new, model, batches, device="cpu").report
        assert fitted(taken).objective < fitted(report).objective - 0.1
        return report

    overfitted = repaired_with(lambda start: -start)
    moved, origin = features(new, batches), features(model, batches)
    apart = (moved @ tried[0] - origin).square().sum(2)[:, torch.arange(PAIRS) % 5 == 0].mean(1)
    assert fitted(overfitted)[:2] == pytest.approx(apart.tolist(), abs=1e-5)
    better = search(*(Rows(*x.float()) for x in (moved, origin)), 10.0, tried[0])
    turned = tried[0].T @ better
    hair = torch.matrix_exp(1e-5 * (turned - turned.T))
    assert fitted(repaired_with(lambda start: start @ hair)) == fitted(overfitted)


def test_ctrl_c_during_the_search_comes_once_the_model_is_rotated(monkeypatch):
    def presses(rows, old, scale, start):
        os.kill(os.getpid(), signal.SIGINT)
        return start

    monkeypatch.setattr(pybackdoor.repair, "kept_rotation", presses)
    with pytest.raises(KeyboardInterrupt) as stopped:
        pybackdoor.par_clean(DualEncoder(), random_pairs(60, 20), device="cpu", **FAST)
    report = stopped.value.result.report["repair"]
    assert report["pairs"] == 60 and "seconds" in report


def test_a_second_ctrl_c_leaves_no_tower_rotated_alone(monkeypatch):
    model = make("DualEncoder")
    before, fold = weights(model), Fold(model, *batches_for(model)[0])

    def interrupted(self, tower, rotation):
        raise KeyboardInterrupt

    monkeypatch.setattr(Fold, "_error", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fold.rotate_(turn(8))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

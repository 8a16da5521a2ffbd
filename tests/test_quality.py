"""The quality matrix: cells are computed once, say what was measured, and end in a report."""

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _quality_cells as cells_module  # noqa: E402
import _quality_data  # noqa: E402
import _quality_defences  # noqa: E402
import _quality_report as report  # noqa: E402
import _quality_run  # noqa: E402
import quality  # noqa: E402
from _quality_cells import NOT_INSTALLED, Work, case_of, compute_cell, train_model  # noqa: E402
from _quality_defences import DEFENCES, Defence  # noqa: E402
from _quality_setting import FULL, TINY, Cell, Model  # noqa: E402

from pybackdoor import Estimate, Evaluation, evaluate, par_clean, roclip_clean  # noqa: E402
from pybackdoor.methods import _views  # noqa: E402
from pybackdoor.repair import TOLD  # noqa: E402
from pybackdoor.rotation import Fit  # noqa: E402

BADNET = Model("fashion", "resnet", "badnet", 0)
TIMES = ("seconds", "cpu_seconds")


@pytest.fixture(scope="module", autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny run, and what it printed."""
    folder = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr(sys, "stdout", printed)
        assert quality.main(["--tiny", "--work", str(folder), "--device", "cpu"]) == 0
    return Work(folder, TINY, "cpu"), printed.getvalue()


def without_times(row):
    if not isinstance(row, dict):
        return row
    return {name: without_times(value) for name, value in row.items() if name not in TIMES}


def test_a_run_says_how_far_it_is_and_what_it_found(tiny):
    _, printed = tiny
    lines = printed.splitlines()
    assert len(lines) == 8 and " model 1/2, 0 h 00 min left: fashion-resnet-clean-s0-" in lines[0]
    assert " cell 6/6, " in lines[-1] and "CA " in lines[-1] and "rebound" in lines[-1]


def test_a_second_run_computes_nothing_and_a_lost_cell_comes_back_the_same(tiny, monkeypatch):
    work, _ = tiny
    again = ["--tiny", "--work", str(work.folder), "--device", "cpu"]
    path = work.cell_file(Cell(BADNET, "par"))
    row = json.loads(path.read_text())
    path.unlink()
    computed = []

    def counted(cell, work):
        computed.append(cell)
        return compute_cell(cell, work)

    monkeypatch.setattr(quality, "compute_cell", counted)
    monkeypatch.setattr(quality, "train_model", None)
    assert quality.main(again) == 0 and computed == [Cell(BADNET, "par")]
    assert without_times(json.loads(path.read_text())) == without_times(row)
    assert quality.main(again) == 0 and len(computed) == 1


def test_processes_give_the_same_rows(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(_quality_run.multiprocessing, "get_context", lambda kind: warm.CONTEXT)
    work, _ = tiny
    shutil.copytree(work.folder / "models", tmp_path / "models")
    cells = [Cell(BADNET, "none"), Cell(BADNET, "par")]
    there = Work(tmp_path, TINY, "cpu")
    found = dict(_quality_run.outcomes(compute_cell, cells, there, jobs=2))
    for cell in cells:
        row = json.loads(work.cell_file(cell).read_text())
        assert without_times(found[cell]) == without_times(row)
        assert there.cell_file(cell).exists()


def test_a_row_holds_what_evaluate_finds_and_what_was_used(tiny):
    work, _ = tiny
    case = case_of(BADNET, work)
    before = cells_module.trained(BADNET, work)
    options = {k: v for k, v in TINY.clean.items() if k != "batch_size"}
    loader = cells_module.loader(case.parts.held_out, case, TINY.clean["batch_size"])
    options |= DEFENCES["par"].options
    after = par_clean(before, loader, seed=0, device="cpu", progress=False, **options).model
    found = evaluate(
        after, case.parts.test, tokenizer=case.loaded.tokenizer, trigger=BADNET.spec(TINY),
        templates=_quality_data.TEMPLATES, target="bag", reference=before,
    ).to_dict()  # fmt: skip
    row = json.loads(work.cell_file(Cell(BADNET, "par")).read_text())
    assert {name: row[name] for name in found} == found
    assert (row["pairs"], row["pairs_seen"], row["steps"]) == (64, 32, 2)
    assert row["rate"] == 0.05 and row["target"] == "bag" and row["half"] == "untouched"
    repair, probed = row["repair"], row["probe"]
    before, after = (Fit(*(repair[f"{n}_{w}"] for n in TOLD)) for w in ("before", "after"))
    assert repair["done"] == (after.objective < before.objective - 1e-8)
    assert 0 <= repair["cosine_difference"] <= repair["logit_difference"] < 1e-4
    assert all(0 <= probed[name] <= 1 for name in ("old", "new"))
    rebound = row["rebound"]
    assert list(rebound["at"]) == ["1", "2", "3"]
    rates = [point["asr"] for point in rebound["at"].values()]
    assert rebound["after"] == rates[-1] and rebound["highest"] == max(rates)
    clean = json.loads(work.cell_file(Cell(BADNET.clean, "par")).read_text())
    assert clean["status"] == "no attack" and "rebound" not in clean and "drift" in clean
    floor = json.loads(work.cell_file(Cell(BADNET, "none")).read_text())
    assert floor["baseline"] == "triggered images on a clean model" and "drift" not in floor
    assert "synonyms" not in row


def test_a_row_says_whether_captions_had_synonyms(tiny, monkeypatch):
    work, _ = tiny
    case, before = case_of(BADNET, work), cells_module.trained(BADNET, work)
    rewording = DEFENCES["cleanclip"], Defence(roclip_clean, {"pool_every": 1})
    told = []
    for name in ("none: WordNet is not installed", "WordNet 3.0"):
        monkeypatch.setattr(_views, "synonym_source", lambda _, name=name: (name, None))
        for defence in rewording:
            told.append(cells_module.defended(before, defence, case, work)[2]["synonyms"])
    assert told == ["none: WordNet is not installed"] * 2 + ["WordNet 3.0"] * 2


def test_rebound_keeps_the_asr_after_and_the_highest_of_its_points(tiny, monkeypatch):
    work, _ = tiny
    rates, seen = iter([0.1, 0.5, 0.3]), []

    def measured(student, case, work):
        seen.append([p.detach().clone() for p in student.parameters()])
        estimate = Estimate(next(rates), 0.0, 1.0, 20)
        return Evaluation(ca=Estimate(0.5, 0.0, 1.0, 20), asr_nontarget=estimate)

    monkeypatch.setattr(cells_module, "measured", measured)
    before = cells_module.trained(BADNET, work)
    found = cells_module.rebound(before, case_of(BADNET, work), work)
    assert (found["after"], found["highest"]) == (0.3, 0.5)
    assert found["at"]["2"] == {"asr": 0.5, "ca": 0.5} and len(seen) == 3
    kept = list(before.parameters())
    moved = max((a - b).abs().max() for a, b in zip(seen[-1], kept, strict=True))
    assert 0 < moved < 1e-3  # three steps of Adam at 5e-5


def test_an_attack_that_does_not_install_is_said_and_not_cleaned(tmp_path):
    setting = dataclasses.replace(TINY, installed=1.0)
    work = Work(tmp_path, setting, "cpu")
    assert train_model(BADNET.clean, work)["status"] == "no attack"
    assert train_model(BADNET, work)["status"] == NOT_INSTALLED
    row = compute_cell(Cell(BADNET, "par"), work)
    assert row["status"] == NOT_INSTALLED and "ca" not in row and "pairs" not in row
    none = compute_cell(Cell(BADNET, "none"), work)
    assert "ca" in none and "rebound" not in none
    assert "attack did not install" in _quality_run.summary(row)
    page = "\n".join(
        p.read_text() for p in report.write_report(work, tmp_path) if p.suffix == ".md"
    )
    assert page.count(NOT_INSTALLED) >= 2 and "![" not in page


def test_an_error_is_told_and_the_others_go_on(tiny, monkeypatch, capsys, tmp_path):
    work, _ = tiny

    def broken(model, work):
        if model.attack == "badnet":
            raise RuntimeError("no such luck")
        return train_model(model, work)

    monkeypatch.setattr(quality, "train_model", broken)
    arguments = ["--tiny", "--work", str(tmp_path), "--device", "cpu", "--only", "arch=resnet"]
    assert quality.main([*arguments, "attack=clean,badnet", "defence=none"]) == 1
    printed = capsys.readouterr()
    assert "RuntimeError: no such luck" in printed.out and "1 failed" in printed.err
    assert len(list((tmp_path / "cells").iterdir())) == 1  # the clean model's


def test_a_changed_setting_is_computed_anew_and_nothing_else(monkeypatch):
    cell, model = Cell(BADNET, "par"), BADNET.name(FULL)
    faster = dataclasses.replace(FULL, clean={**FULL.clean, "steps": 1})
    assert BADNET.name(faster) == model and cell.name(faster) != cell.name(FULL)
    poisoned = dataclasses.replace(FULL, rates={**FULL.rates, ("fashion", "badnet"): 0.2})
    assert BADNET.name(poisoned) != model and BADNET.clean.name(poisoned) == BADNET.clean.name(FULL)
    other = Cell(BADNET, "finetune").name(FULL)
    monkeypatch.setitem(DEFENCES, "par", Defence(par_clean, {"tau": 1.0}))
    assert Cell(BADNET, "par").name(FULL) != cell.name(faster)
    assert Cell(BADNET, "finetune").name(FULL) == other and BADNET.name(FULL) == model


def test_suspect_pairs_are_those_the_model_was_trained_on(tiny):
    work, _ = tiny
    case = case_of(BADNET, work)
    suspect = cells_module.PAIRS["suspect"](case, TINY)
    planted = case.parts.planted
    changed = [i for i in range(len(planted)) if suspect.captions[i] != planted.captions[i]]
    assert len(changed) == round(0.05 * len(planted))
    assert all(" bag" in suspect.captions[i] for i in changed)
    pixels = [p.images.take(np.array(changed)) for p in (planted, suspect)]
    differing = (pixels[0] != pixels[1]).any(3).sum((1, 2))
    assert ((15 < differing) & (differing <= 5 * 5)).all()  # some pixels may be as they were
    clean = cells_module.PAIRS["suspect"](case_of(BADNET.clean, work), TINY)
    assert list(clean.captions) == list(planted.captions)


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("dat=cifar10", "--only: axis must be one of data, .*did you mean 'data'"),
        ("attack=badnets", "--only attack must be one of clean, .*did you mean 'badnet'"),
        ("seed=one", "--only seed: must be a whole number, got 'one'"),
    ],
)
def test_unknown_filters_offer_the_nearest(only, words):
    with pytest.raises(ValueError, match=words):
        quality.chosen(FULL, [only])


def test_the_plan_has_three_seeds_where_they_are_wanted_and_any_that_are_named():
    plan = quality.plan(FULL, quality.chosen(FULL, []))
    seeds = {(c.model.data, c.model.arch): set() for c in plan}
    for cell in plan:
        seeds[cell.model.data, cell.model.arch].add(cell.model.seed)
    assert seeds.pop(("cifar10", "resnet")) == {0, 1, 2} and set(map(len, seeds.values())) == {1}
    named = quality.plan(FULL, quality.chosen(FULL, ["data=fashion", "seed=4,7", "defence=par"]))
    assert {c.model.seed for c in named} == {4, 7} and {c.defence for c in named} == {"par"}


def test_the_list_says_what_is_missing(tiny, capsys):
    work, _ = tiny
    arguments = ["--tiny", "--work", str(work.folder), "--list", "--only", "attack=badnet,sig"]
    assert quality.main([*arguments, "arch=resnet", "defence=par,finetune"]) == 0
    printed = capsys.readouterr().out
    assert "badnet seed 0: CA" in printed and "missing: finetune" in printed
    assert "sig seed 0: not trained; missing: par, finetune" in printed
    assert printed.splitlines()[-1] == "1 of 4 cells"


def test_ubt_then_par_cleans_on_what_is_not_suspicious(tiny, monkeypatch):
    work, _ = tiny
    case = case_of(BADNET, work)
    pairs = case.parts.held_out
    seen = {}

    def ubt(model, loader, **options):
        seen["ubt"] = options
        report = {"pairs_seen": 7, "steps_done": 3}
        return SimpleNamespace(model="forgotten", report=report, keep=lambda: np.arange(0, 60, 2))

    def par(model, loader, **options):
        seen["par"] = (model, loader.pairs.ids.tolist(), loader.batch_size, options)
        return SimpleNamespace(model="clean", history=[], report={"pairs_seen": 5, "steps_done": 2})

    monkeypatch.setattr(_quality_defences, "ubt_clean", ubt)
    monkeypatch.setattr(_quality_defences, "par_clean", par)
    loader = cells_module.loader(pairs, case, 16)
    found = _quality_defences.ubt_par_clean(None, loader, tau=1.0, seed=3, lr=0.5)
    assert found.model == "clean" and found.report == {"pairs_seen": 12, "steps_done": 5}
    assert seen["ubt"] == {"seed": 3, **_quality_defences.UBT}
    ids = pairs.ids[np.arange(0, 60, 2)].tolist()
    assert seen["par"] == ("forgotten", ids, 16, {"tau": 1.0, "seed": 3, "lr": 0.5})


def test_a_cpu_without_bf16_is_told_beforehand(monkeypatch, capsys):
    cells = [Cell(Model("cifar10", arch, "clean", 0), "par") for arch in ("pretrained", "resnet")]
    for has, given, told in ((True, cells, False), (False, cells, True), (False, cells[:1], False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        quality.warn_if_slow(given, FULL, "cpu")
        assert ("this cpu has no instructions for bf16" in capsys.readouterr().err) == told

"""The detection benchmark: every method has its figures, cells are computed once."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_ubt  # noqa: E402
import detect_planted  # noqa: E402
from _quality_cells import Work  # noqa: E402
from _quality_setting import Model  # noqa: E402

from pybackdoor.detect import METHODS  # noqa: E402
from pybackdoor.features import FeatureReader  # noqa: E402

MODEL = Model("fashion", "resnet", "checkerboard", 0)


def smaller(tiny, steps):
    """The self-check's setting with half as many pairs to poison: 268."""
    data, setting = bench_ubt.setting_of(tiny, steps)
    fewer = dataclasses.replace(setting.data[data], held_out=23_700)
    return data, dataclasses.replace(setting, data={data: fewer})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(arguments, work) of a tiny run that is done."""
    folder = tmp_path_factory.mktemp("planted")
    arguments = ["--tiny", "--work", str(folder), "--json", str(folder / "cells.json")]
    arguments += ["--attacks", MODEL.attack, "--references", "100", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect_planted, "setting_of", smaller)
        patch.setitem(detect_planted.OVERFIT, "overfit_steps", 1)
        detect_planted.main(arguments)
        yield arguments, Work(folder, smaller(True, 1)[1], "cpu")


def test_each_method_has_its_figures(tiny):
    _, work = tiny
    (cell,) = json.loads((work.folder / "cells.json").read_text())["cells"]
    assert cell["half"] == "tuning" and cell["status"] == "installed" and cell["pairs"] == 268
    runs = cell["runs"]
    twice = [name for name, method in METHODS.items() if method.takes == "neighbours"]
    names = [row["method"] for row in runs]
    assert names == sorted([*METHODS, *twice], key=list(METHODS).index)
    assert {row["reference"] for row in runs if row["method"] in twice} == {100, 0}
    assert all(0 <= row["auroc"] <= 1 and row["k"] == 13 for row in runs)
    assert all(row["precision"] == row["recall"] for row in runs)
    assert runs[-1]["found"] == 6 and runs[-1]["word"]

    made = bench_ubt.Planted(MODEL, work)
    reader = FeatureReader(made.model, made.case.loaded.tokenizer)
    image = reader.images(made.pairs.images, made.pairs.ids)
    cosine = (image * reader.captions(made.pairs.captions)).sum(1).numpy()
    a, b = cosine[made.truth][:, None], cosine[~made.truth]
    wanted = (a > b).mean() + (a == b).mean() / 2
    own = {row["method"]: row for row in runs}
    assert own["high_cosine"]["auroc"] == pytest.approx(wanted, abs=1e-3)
    assert own["low_cosine"]["auroc"] == pytest.approx(1 - wanted, abs=1e-3)


def test_a_cell_is_computed_once(tiny, monkeypatch):
    arguments, work = tiny
    before = (work.folder / "cells.json").read_bytes()
    monkeypatch.setattr(detect_planted, "compute", None)
    detect_planted.main(arguments)
    assert (work.folder / "cells.json").read_bytes() == before


def test_an_attack_that_did_not_install_is_not_looked_at(tiny, monkeypatch, capsys):
    arguments, work = tiny
    record = work.record(MODEL) | {"status": "attack did not install"}
    monkeypatch.setattr(Work, "record", lambda *_: record)
    monkeypatch.setattr(detect_planted, "run", None)
    other = work.folder / "other.json"
    detect_planted.main([*arguments, "--json", str(other)])
    (cell,) = json.loads(other.read_text())["cells"]
    assert cell["runs"] == [] and "did not install, CA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rate", "2"], "between 0 and 1, got 2"),
        (["--tiny", "--rate", "0.1"], "leave --rate out"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(given, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_ubt.main(["--work", str(tmp_path), "--json", str(tmp_path / "x.json"), *given])
    assert said in capsys.readouterr().err

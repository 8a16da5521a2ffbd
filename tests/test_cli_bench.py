"""`pybackdoor bench`: what it measures of a small model."""

import json

import pytest
import torch
from clip_models import tiny_config

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.models import create, save


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(create(tiny_config()), folder / "model")
    return str(folder / "model")


def bench(model, *more):
    common = ["--batch-size", "4", "--steps", "3", "--precision", "fp32", "--device", "cpu"]
    return main(["bench", "--model", model, *common, *more])


def test_the_figures_fit_together(model, capsys):
    before = pybackdoor.load(model).model.state_dict()
    assert bench(model, "--json", "--pairs", "1000", "--epochs", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and found["batch_size"] == 4 and found["pairs"] == 1000
    assert found["samples_per_second"] == pytest.approx(4e3 / found["step_ms"])
    assert found["estimated_seconds"] == pytest.approx(3000 / found["samples_per_second"])
    assert found["loss_share"] == pytest.approx(found["loss_ms"] / found["step_ms"])
    assert 0 < found["loss_share"] < 1 and found["peak_memory_bytes"] > 1e7
    for name, weight in pybackdoor.load(model).model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_people_read_it(model, capsys):
    assert bench(model, "--micro-batch", "2") == 0
    out = capsys.readouterr().out
    assert "pairs/s" in out and "2 x 250,000 pairs: about" in out and "without reading files" in out


@pytest.mark.parametrize("name, value", [("batch-size", "1"), ("steps", "0"), ("epochs", "0")])
def test_what_cannot_be_measured_is_refused(model, capsys, name, value):
    assert bench(model, f"--{name}", value) == 2
    assert f"{name.replace('-', '_')} must be at least" in capsys.readouterr().err

"""What holds for every cleaning method: its kernels train as eager PyTorch does, it is short."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from baseline_cases import loader
from dual_encoder import MEAN, STD, DualEncoder
from ubt_world import Planted, WordTokenizer, planted_pairs

import pybackdoor
from pybackdoor import _backend
from pybackdoor.data import PairLoader
from pybackdoor.methods import METHODS, ft_sam
from pybackdoor.models import image_features
from pybackdoor.triggers.invert import FAMILIES, invert

CLOSE = 1e-5
RUNS = {
    "par": {},
    "finetune": {},
    "cleanclip": {},
    "roclip": {"pool_size": 16, "pool_every": 2},
    "ft_sam": {},
    "invert": {"inversion_steps": 5, "inversion_batch": 8, "every": 2},
    "ubt": {"k": 40, "gate_sets": 199, "gate_excess": -2.0, "gate_swing": -1.0, "check_every": 2},
}


def trained(name, given=None, **more):
    """Five steps in fp32, of two epochs; of ubt all stages."""
    options = {
        "mean": MEAN, "std": STD, "precision": "fp32", "progress": False, "device": "cpu",
        "lr_start": 1e-3, "lr": 1e-3, "steps": 5, "repair": False, **RUNS[name], **more,
    }  # fmt: skip
    if name == "ubt":
        pairs = PairLoader(planted_pairs()[0], WordTokenizer(), batch_size=64)
        return METHODS[name](given or Planted(), pairs, **options)
    return METHODS[name](given or DualEncoder(seed=3), loader(48), **options)


def in_both_ways(call, monkeypatch):
    """What the kernels give, and the references, which nothing else takes part in."""
    taken = []
    choose = _backend.choose

    def noted(x, op, **how):
        found = choose(x, op, **how)
        taken.append(found.name)
        return found

    monkeypatch.setattr(_backend, "choose", noted)
    ours = call()
    assert set(taken) == {"cpu"}
    taken.clear()
    monkeypatch.setenv("PYBACKDOOR_BACKEND", "reference")
    eager = call()
    assert set(taken) == {"reference"}
    return ours, eager


@pytest.mark.filterwarnings("ignore:.*still find their own caption")
@pytest.mark.parametrize(
    ("name", "more"), [*((n, {}) for n in METHODS), ("invert", {"perturb": True})]
)
def test_kernels_train_as_the_eager_references_do(name, more, monkeypatch):
    """The losses of all steps and the weights after them."""
    ours, eager = in_both_ways(lambda: trained(name, **more), monkeypatch)
    assert len(ours.history) == len(eager.history) == 5
    for one, other in zip(ours.history, eager.history, strict=True):
        assert one == pytest.approx(other, rel=CLOSE, abs=CLOSE)
    for key, tensor in eager.model.state_dict().items():
        torch.testing.assert_close(
            ours.model.state_dict()[key], tensor, rtol=CLOSE, atol=CLOSE, msg=key
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_inversions_gradients_are_the_eager_ones(family, monkeypatch):
    """Of pattern and mask, each step's, relative to the largest."""
    seen = []

    class Noted(torch.optim.Adam):
        def step(self, closure=None):
            seen.extend(p.grad.clone() for p in self.param_groups[0]["params"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Noted)
    model = DualEncoder(seed=1).eval().requires_grad_(False)
    images = torch.from_numpy(loader(48).pairs.images.take(range(48)))

    def gradients():
        seen.clear()
        invert(
            lambda x: image_features(model, x), images, mean=MEAN, std=STD, family=family,
            steps=5, batch_size=16,
        )  # fmt: skip
        return list(seen)

    ours, eager = in_both_ways(gradients, monkeypatch)
    assert len(ours) == len(eager) == {"sparse": 10, "dense": 5}[family]
    for one, other in zip(ours, eager, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=CLOSE * float(other.abs().max()))


@pytest.mark.filterwarnings("ignore:.*still find their own caption")
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("name", "more"), [*((n, {}) for n in METHODS), ("par", {"lock": "text"})])
def test_a_result_can_be_trained_as_far_as_the_model_given(name, more, early):
    """Not less for a tower or a scale that this run left as it was; also if it ended early."""
    given = Planted() if name == "ubt" else DualEncoder(seed=3)
    frozen = next(p for p in given.parameters() if p.ndim == 2)  # and yet trained, by all methods
    frozen.requires_grad_(False)
    if early:
        with pytest.raises(OSError) as stopped:
            trained(name, given, on_step=failing, **more)
        result = stopped.value.result
    else:
        result = trained(name, given, **more)
    for (key, p), before in zip(result.model.named_parameters(), given.parameters(), strict=True):
        assert p.requires_grad == before.requires_grad == (before is not frozen), key


def failing(step, record, model):
    if step == 1:
        raise OSError("a full disk")


def test_every_method_is_exported():
    for name, run in METHODS.items():
        assert getattr(pybackdoor, f"{name}_clean") is run
        assert f"{name}_clean" in pybackdoor.__all__


def test_a_method_takes_less_than_80_lines_of_code():
    """Of FT-SAM, which CONTRIBUTING names; docstrings, comments and blank lines are none."""
    source = inspect.getsource(ft_sam)
    code = {
        at
        for at, line in enumerate(source.splitlines(), 1)
        if line.strip() and line.strip()[0] != "#"
    }
    for node in ast.walk(ast.parse(source)):
        own = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if own and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert 40 < len(code) < 80

"""Calls within an autocast that the caller has open: they come to what they do without it."""

import pytest
import torch
from baseline_cases import loader, tokenizer
from dual_encoder import MEAN, STD, DualEncoder
from test_pretended_gpu import colours
from torch.nn.functional import normalize

import pybackdoor
from pybackdoor.engine.casts import without_autocast
from pybackdoor.engine.towers import Encoder

RUN = {"mean": MEAN, "std": STD, "progress": False, "device": "cpu", "lr": 1e-2, "steps": 4}
METHODS = {"finetune": {}, "cleanclip": {}, "ft_sam": {}}
outer = pytest.mark.parametrize("enabled", [False, True])


def same(one, other):
    for (name, want), got in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(want, got), name


@outer
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_cleaning(name, precision, enabled):
    method = getattr(pybackdoor, f"{name}_clean")

    def run():
        return method(DualEncoder(), loader(48), precision=precision, **RUN, **METHODS[name])

    want = run()
    assert want.report["repair"]["done"]
    with torch.autocast("cpu", enabled=enabled):
        got = run()
    assert got.history == want.history
    same(want.model, got.model)


@outer
def test_a_hook_sees_the_weights_as_they_are(enabled):
    x, features = torch.randn(4, 3, 16, 16), []

    def look(step, record, model):
        with torch.no_grad():
            features.append(model.encode_image(x).float())
            features.append(model.image[6](torch.ones(4, 128)).float())

    with torch.autocast("cpu", enabled=enabled):
        pybackdoor.finetune_clean(
            DualEncoder(), loader(48), precision="bf16", repair=False, on_step=look, **RUN
        )
    got, features[:] = list(features), []

    def alone(step, record, model):
        with torch.autocast("cpu", enabled=enabled):
            look(step, record, model)

    pybackdoor.finetune_clean(
        DualEncoder(), loader(48), precision="bf16", repair=False, on_step=alone, **RUN
    )
    for one, other in zip(got, features, strict=True):
        assert torch.equal(one, other)


@outer
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_of_weights_that_change(precision, enabled):
    options = {"tokenizer": tokenizer, "templates": ["5 {}", "{} 7"], "mean": MEAN, "std": STD}
    options |= {"trigger": pybackdoor.trigger("badnet", size=4), "target": "2"}
    options |= {"reference": DualEncoder(1), "precision": precision}
    others = [DualEncoder(seed).state_dict() for seed in (2, 3)]

    def figures():
        model, found = DualEncoder(), []
        for state in others:
            model.load_state_dict(state)
            found.append(pybackdoor.evaluate(model, colours(), **options).to_dict())
        return found

    want = figures()
    assert want[0] != want[1]
    with torch.autocast("cpu", enabled=enabled):
        assert figures() == want


@pytest.mark.parametrize("first", ["model", "encoder"])
def test_an_encoder_takes_and_leaves_no_cast(first):
    """Of the model's own pass before it, and for one after it."""
    model, x = DualEncoder().eval(), torch.randn(2, 3, 16, 16)
    encode = Encoder(torch.bfloat16, torch.device("cpu"))
    ways = [lambda: normalize(model.encode_image(x).float()), lambda: encode.image(model, x)]
    before, after = ways if first == "model" else ways[::-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = -before().detach()
        with torch.no_grad():
            for p in model.image[6].parameters():
                p.neg_()
        torch.testing.assert_close(after().detach(), want, rtol=0, atol=2e-2)


def test_without_autocast():
    @without_autocast()
    def kinds():
        return [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kinds() == [False, False] and torch.is_autocast_enabled("cpu")
    assert kinds() == [False, False]

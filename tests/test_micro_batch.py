"""A batch in micro-batches: the loss and the gradients of the whole."""

import copy

import pytest
import torch
from dual_encoder import GIVEN, MEAN, STD, DualEncoder, random_pairs

import pybackdoor
from pybackdoor.engine import Contrastive, Encoder, Preparation
from pybackdoor.engine.gradients import Gradients
from pybackdoor.methods.par import PerturbAndRecover

CPU = torch.device("cpu")


def par():
    return PerturbAndRecover(DualEncoder(seed=2).double().eval(), 2.15)


def prepared(model, objective, micro, train_scale):
    encode = Encoder(None, CPU, chunk=micro)
    objective.prepare(Preparation(model, encode, CPU))
    return Gradients(model, objective, encode, train_scale=train_scale, micro_batch=micro, seed=5)


def gradients(micro, objective=None, dropout=0.0, train_scale=True):
    model = DualEncoder(seed=1, dropout=dropout).double().train()
    model.image[1].eval()
    compute = prepared(model, objective or par(), micro, train_scale)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(23, 3, 16, 16, generator=g, dtype=torch.float64)
    tokens = random_pairs(23, 23)[0]["tokens"]
    outcome = compute(x, tokens, GIVEN)
    return outcome, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [1, 4, 8, 22, 23, 100])
@pytest.mark.parametrize("objective", [None, Contrastive()])
def test_gradients_are_those_of_the_whole_batch(micro, objective):
    (want, grads), (got, again) = (gradients(m, objective) for m in (None, micro))
    assert grads.keys() == again.keys() and "logit_scale" in grads
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-9, atol=1e-14, msg=name)
    assert want.scalars.keys() == got.scalars.keys()
    for name, value in want.scalars.items():
        torch.testing.assert_close(got.scalars[name], value, rtol=1e-10, atol=1e-14)
    for name, rows in want.features.items():
        torch.testing.assert_close(got.features[name], rows)
        assert not got.features[name].requires_grad


def test_dropout_is_the_same_in_both_passes():
    """Else the gradients would not be those of the loss: checked by differences along one."""
    _, grads = gradients(8, dropout=0.5, train_scale=False)
    direction = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in (1e-5, -1e-5):
        model = DualEncoder(seed=1, dropout=0.5).double().train()
        model.image[1].eval()
        with torch.no_grad():
            model.image[6].bias += step * direction
        compute = prepared(model, par(), 8, train_scale=False)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(23, 3, 16, 16, generator=g, dtype=torch.float64)
        losses.append(compute(x, random_pairs(23, 23)[0]["tokens"], GIVEN).scalars["loss"])
    difference = (losses[0] - losses[1]) / 2e-5
    torch.testing.assert_close(grads["image.6.bias"] @ direction, difference, rtol=1e-5, atol=0)


def test_a_run_in_micro_batches_is_the_run():
    options = {"steps": 3, "precision": "fp32", "mean": MEAN, "std": STD, "lr": 1e-2}
    loader, model = random_pairs(40, 20), DualEncoder()
    want, got = (
        pybackdoor.par_clean(copy.deepcopy(model), loader, micro_batch=m, progress=False, **options)
        for m in (None, 6)
    )
    for a, b in zip(want.history, got.history, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for name, tensor in want.model.state_dict().items():
        torch.testing.assert_close(got.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_live_batch_norm_is_refused():
    with pytest.raises(ValueError, match="micro_batch cannot be used while batch norm"):
        Gradients(
            DualEncoder().train(), Contrastive(), Encoder(None, CPU), train_scale=False,
            micro_batch=4, seed=0,
        )  # fmt: skip

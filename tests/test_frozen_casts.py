"""A frozen model's weights are cast for autocast once, to the values that autocast gives."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from clip_models import tiny, tiny_hf
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from test_pretended_gpu import resnet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pybackdoor
from pybackdoor.engine import casts
from pybackdoor.engine.towers import Encoder
from pybackdoor.models import HFClip

CPU = torch.device("cpu")
MODELS = {
    "dual": (DualEncoder, 16, 6),
    "open_clip": (lambda: tiny().model, 32, 16),
    "open_clip_resnet": (resnet, 64, 16),
    "hugging_face": (lambda: HFClip(tiny_hf()), 32, 16),
}


def frozen(make):
    return make().eval().requires_grad_(False)


def inputs(side, length):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 40, (4, length), generator=g)
    return torch.randn(4, 3, side, side, generator=g), tokens


def encoded(encode, model, x, tokens):
    with torch.no_grad():
        return encode.image(model, x), encode.text(model, tokens)


def uncached(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(casts, "_get_current_dispatch_mode", lambda: object())
        return encoded(*arguments)


def casts_of(encode, model, *x):
    """Copies whose shape is a weight's."""
    with torch.profiler.profile(record_shapes=True) as profile:
        encoded(encode, model, *x)
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    copies = [e for e in profile.events() if e.name == "aten::copy_"]
    return sum(tuple(e.input_shapes[0]) in shapes for e in copies)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_same_to_the_bit(name, monkeypatch):
    if name == "hugging_face":
        pytest.importorskip("transformers")
    make, *shape = MODELS[name]
    model, x = frozen(make), inputs(*shape)
    encode = Encoder(torch.bfloat16, CPU)
    wanted = uncached(monkeypatch, encode, model, *x)
    for _ in range(2):
        for one, other in zip(wanted, encoded(encode, model, *x), strict=True):
            assert torch.equal(one, other)


def test_weights_are_cast_once_and_again_when_they_change(monkeypatch):
    model, x, encode = frozen(MODELS["open_clip"][0]), inputs(32, 16), Encoder(torch.bfloat16, CPU)
    first, rest = (casts_of(encode, model, *x) for _ in range(2))
    assert first > 10 + rest  # activations of the same shape, and parts of the positions
    layer = model.visual.transformer.resblocks[0].mlp.c_fc
    layer.weight.mul_(1.5)  # in place
    assert casts_of(encode, model, *x) == 1 + rest
    layer.weight.data = layer.weight.data * 2  # other memory
    assert casts_of(encode, model, *x) == 1 + rest
    layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)  # another tensor
    assert casts_of(encode, model, *x) == 1 + rest
    assert len(encode._casts._kept[model]._casts) <= len(list(model.parameters()))
    found = encoded(encode, model, *x)
    for one, other in zip(uncached(monkeypatch, encode, model, *x), found, strict=True):
        assert torch.equal(one, other)


def test_gradients_of_the_input_pass_through(monkeypatch):
    """As for a patch that is optimised on a frozen model."""
    model, encode = frozen(MODELS["open_clip"][0]), Encoder(torch.bfloat16, CPU)
    x, _ = inputs(32, 16)

    def slope():
        leaf = x.clone().requires_grad_()
        (encode.image(model, leaf) * torch.linspace(-1, 1, 4)[:, None]).sum().backward()
        return leaf.grad

    with monkeypatch.context() as patch:
        patch.setattr(casts, "_get_current_dispatch_mode", lambda: object())
        wanted = slope()
    assert all(torch.equal(slope(), wanted) for _ in range(2))


class Scales(DualEncoder):
    """Writes into what it has cast, as one does that standardises its weights."""

    def encode_image(self, x):
        weight = self.image[6].weight.to(torch.bfloat16)
        weight.mul_(2)
        return super().encode_image(x) * weight.float().sum()


def test_a_cast_that_the_model_writes_into_is_not_kept():
    model, encode = frozen(Scales), Encoder(torch.bfloat16, CPU)
    wanted = 2 * model.image[6].weight.bfloat16().float().sum()
    x, _ = inputs(16, 6)
    sums = []
    with encode._context(model), torch.no_grad():
        for _ in range(3):
            weight = model.image[6].weight.to(torch.bfloat16).mul_(2)
            sums.append(weight.float().sum())
    assert torch.allclose(torch.stack(sums), wanted.expand(3))
    one, two = (encoded(encode, model, x, x[:, 0, 0, :6].long().abs())[0] for _ in range(2))
    assert torch.equal(one, two)


def test_inference_mode_keeps_nothing_that_training_cannot_use():
    model, encode = frozen(DualEncoder), Encoder(torch.bfloat16, CPU)
    x, tokens = inputs(16, 6)
    with torch.inference_mode():
        encode.image(model, x), encode.text(model, tokens)
        made_there = frozen(DualEncoder)
    leaf = x.clone().requires_grad_()
    encode.image(model, leaf).sum().backward()
    assert leaf.grad.isfinite().all()
    encoded(encode, made_there, x, tokens)
    assert not encode._casts._kept[made_there]._casts


@pytest.mark.parametrize(
    "why", ["a weight is trained", "fp32", "compiled", "another mode", "no CPU"]
)
def test_nothing_is_kept(why):
    model = frozen(DualEncoder)
    precision = None if why == "fp32" else torch.bfloat16
    encode = Encoder(precision, CPU, "default" if why == "compiled" else None)
    if why == "a weight is trained":
        model.logit_scale.requires_grad_()
    x, _ = inputs(16, 6)
    with FlopCounterMode(display=False) if why == "another mode" else nullcontext():
        if why == "no CPU":
            model.to("meta")  # on the pretended GPU there is always another mode
        if why in ("compiled", "no CPU"):
            with encode._context(model):
                pass
        else:
            encode.image(model, x)
    assert not encode._casts._kept


def test_a_model_is_not_kept_alive():
    model, encode = frozen(DualEncoder), Encoder(torch.bfloat16, CPU)
    encoded(encode, model, *inputs(16, 6))
    assert len(encode._casts._kept) == 1
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None and not encode._casts._kept


def test_cleaning_gives_the_same_weights(monkeypatch):
    batches = random_pairs(48, 16)
    options = {"mean": MEAN, "std": STD, "progress": False, "precision": "bf16", "lr": 1e-2}

    def clean():
        return pybackdoor.par_clean(DualEncoder(), batches, device="cpu", **options)

    got = clean()
    monkeypatch.setattr(casts, "_get_current_dispatch_mode", lambda: object())
    wanted = clean()
    assert list(got.history) == list(wanted.history)
    for one, other in zip(wanted.model.parameters(), got.model.parameters(), strict=True):
        assert torch.equal(one, other)

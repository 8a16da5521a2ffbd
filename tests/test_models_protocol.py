"""The CLIP protocol: what is accepted, what is refused and in which words."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from dual_encoder import DualEncoder
from torch import nn

from pybackdoor.models import (
    check_clip,
    check_finite,
    image_features,
    logit_scale_parameters,
    nonfinite_weights,
    scale,
    text_features,
)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.offset = nn.Parameter(torch.tensor(0.5))


class Encoders(DualEncoder):
    """The dual encoder, without its logit_scale."""

    def __init__(self) -> None:
        super().__init__()
        del self.logit_scale
        self.inner = Inner()


def _with(**members):
    """An Encoders whose class also has these members."""
    model = type("Odd", (Encoders,), {})()
    for name, value in members.items():
        setattr(type(model), name, value)
    return model


def number():
    return _with(logit_scale=2.5)


class ByProperty(Encoders):
    @property
    def logit_scale(self):
        return self.inner.log_scale


class Derived(Encoders):
    @property
    def logit_scale(self):
        return (self.inner.log_scale * 2 + self.inner.offset).clamp(max=4.6)


class Detached(Encoders):
    @property
    def logit_scale(self):
        return self.inner.log_scale.detach()


class Buffer(Encoders):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("logit_scale", torch.tensor([math.log(7.0)]))


@pytest.mark.parametrize(
    ("kind", "log_scale", "names"),
    [
        (DualEncoder, math.log(10.0), ["logit_scale"]),
        (ByProperty, 2.0, ["inner.log_scale"]),
        (Derived, 4.5, ["inner.log_scale", "inner.offset"]),
        (Detached, 2.0, ["inner.log_scale"]),
        (Buffer, math.log(7.0), []),
        (number, 2.5, []),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_logit_scale_wherever_it_lives(kind, log_scale, names, frozen):
    model = kind().requires_grad_(not frozen)
    flags = [p.requires_grad for p in model.parameters()]
    check_clip(model)
    with torch.inference_mode() if frozen else torch.no_grad():
        found = logit_scale_parameters(model)
    known = dict(model.named_parameters())
    assert sorted(n for n, p in known.items() if any(p is f for f in found)) == names
    assert len(found) == len(names)
    assert flags == [p.requires_grad for p in model.parameters()]
    value = scale(model)
    assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
    torch.testing.assert_close(value, torch.tensor(math.exp(log_scale)))


def test_flags_come_back_when_the_property_fails():
    class Broken(Encoders):
        calls = 0

        @property
        def logit_scale(self):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("no scale today")
            return self.inner.log_scale * 1

    model = Broken().requires_grad_(False)
    with pytest.raises(RuntimeError, match="no scale today"):
        logit_scale_parameters(model)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: object(), TypeError, "must be a torch.nn.Module, got object"),
        (lambda: nn.Linear(2, 2), TypeError, r"must have encode_image\(images\), Linear has none"),
        (lambda: _with(encode_text=3, logit_scale=1.0), TypeError, "encode_text.*method, got int"),
        (lambda: Encoders(), TypeError, "must have logit_scale.*Encoders has none"),
        (lambda: _with(logit_scale="4.6"), TypeError, "floating tensor or a number, got str"),
        (lambda: _with(logit_scale=True), TypeError, "got bool"),
        (lambda: _with(logit_scale=lambda self: 4.6), TypeError, "got method"),
        (lambda: _with(logit_scale=torch.tensor(4)), TypeError, "got torch.int64"),
        (lambda: _with(logit_scale=torch.ones(3)), ValueError, r"one value, got \[3\]"),
        (lambda: _with(logit_scale=math.nan), ValueError, "must be finite, got nan"),
        (lambda: _with(logit_scale=100.0), ValueError, r"logarithm.*store math.log\(100\)"),
        (
            lambda: type("Hf", (nn.Module,), {"get_image_features": None, "logit_scale": 1.0})(),
            TypeError,
            "wrap a transformers.CLIPModel in pybackdoor.models.HFClip",
        ),
    ],
)
def test_check_clip_names_what_lacks(make, error, message):
    with pytest.raises(error, match=message):
        check_clip(make())


def test_features_are_the_normalised_encoder_outputs():
    model = DualEncoder().eval()
    images, tokens = torch.randn(3, 3, 16, 16), torch.randint(0, 50, (3, 6))
    for rows, raw in (
        (image_features(model, images), model.encode_image(images)),
        (text_features(model, tokens), model.encode_text(tokens)),
    ):
        torch.testing.assert_close(rows, raw / raw.norm(dim=1, keepdim=True))
        assert rows.requires_grad
    assert image_features(model.double(), images.double()).dtype == torch.float64
    assert image_features(model.bfloat16(), images.bfloat16()).dtype == torch.float32


def test_features_refuse_odd_encoders_and_long_tokens():
    images, tokens = torch.randn(3, 3, 16, 16), torch.zeros(3, 7, dtype=torch.int64)
    with pytest.raises(TypeError, match="encode_image: must return a tensor.*got tuple"):
        image_features(_with(encode_image=lambda self, x: (x,)), images)
    with pytest.raises(ValueError, match=r"encode_image: must return \[3, D\], got \[3, 3, 16, 16"):
        image_features(_with(encode_image=lambda self, x: x), images)
    with pytest.raises(ValueError, match=r"must be \[B, L <= 6\], got \[3, 7\]"):
        text_features(_with(context_length=6), tokens)
    with pytest.raises(ValueError, match=r"must be \[B, L\], got \[3\]"):
        text_features(DualEncoder(), tokens[:, 0])


def test_nonfinite_weights_are_named():
    model = DualEncoder()
    model.register_buffer("mask", torch.full((2, 2), -math.inf))
    assert nonfinite_weights(model) == []
    check_finite(model)
    with torch.no_grad():
        model.image[0].weight[1, 0, 0, 0] = math.nan
        model.ln_final.bias[3] = -math.inf
        model.image[1].running_var[0] = math.inf
        model.mask[0, 0] = math.nan
    names = ["image.0.weight", "image.1.running_var", "ln_final.bias", "mask"]
    assert sorted(nonfinite_weights(model)) == names
    with pytest.raises(ValueError, match="weights of base.pt must be finite, 4 tensors.*image.0"):
        check_finite(model, what="base.pt")


def test_importing_models_is_lean(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pt")
    code = (
        "import sys, pybackdoor.models as models; "
        f"print(*models.read_checkpoint({str(tmp_path / 'w.pt')!r})); "
        "heavy = {'open_clip', 'transformers', 'PIL', 'safetensors', 'huggingface_hub', 'timm', "
        "'torchvision', 'matplotlib', 'yaml'}; print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]  # elsewhere: the source tree would hide an install
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["w", "[]"]

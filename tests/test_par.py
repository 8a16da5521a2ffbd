"""PAR: its loss, gate and schedule against fp64, and what the engine promises around it."""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
from dual_encoder import GIVEN, MEAN, STD, DualEncoder, random_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import pybackdoor
from pybackdoor.clean import two_phase_schedule
from pybackdoor.engine import decay_groups
from pybackdoor.methods.par import PerturbAndRecover
from pybackdoor.ops import contrastive_par

FAST = {"steps": 3, "precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def distances(image, image_ref, tau=2.15):
    """The objective's terms for an image tower; the text tower stays at its reference."""
    text = torch.eye(*image.shape, dtype=image.dtype)
    one = torch.ones((), dtype=image.dtype)
    return PerturbAndRecover(nn.Module(), tau)(image, text, one, (image_ref, text), GIVEN)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_distance_is_two_minus_two_cosines(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1) for _ in "ab")
    loss, terms = distances(a, b)
    assert math.isclose(terms["s_image"], 2 - 2 * (a * b).sum(-1).mean(), abs_tol=1e-12)
    assert terms["s_text"] == 0 and terms["gate_text"] == 1
    wanted = terms["contrastive"] - terms["gate_image"] * terms["s_image"] / 2
    assert math.isclose(loss, wanted, abs_tol=1e-12)
    low = distances(a.bfloat16(), b.bfloat16())[1]["s_image"]
    assert low.dtype == torch.float32  # distances are never formed in half precision


@pytest.mark.parametrize("offset, open_", [(1e-6, 1), (0.0, 1), (-1e-6, 0)])
def test_gate_is_open_up_to_tau(offset, open_):
    a = torch.eye(4, dtype=torch.float64).requires_grad_()
    b = -torch.eye(4, dtype=torch.float64)
    b[:2] = a[2:].detach()  # distances 2, 2, 4, 4
    loss, terms = distances(a, b, tau=3.0 + offset)
    assert terms["s_image"] == 3 and terms["gate_image"] == open_
    assert loss == terms["contrastive"] - open_ * 1.5


def test_one_gate_for_the_batch_mean():
    """Half of the samples beyond tau: the mean decides, so every sample keeps its gradient."""
    a = torch.eye(4, dtype=torch.float64).requires_grad_()
    b = torch.cat([torch.eye(4)[:2], -torch.eye(4)[2:]]).double()  # distances 0, 0, 4, 4

    def slope(tau):
        loss, terms = distances(a, b, tau)
        return torch.autograd.grad(loss - contrastive_only(a), a)[0]

    def contrastive_only(image):
        text, one = torch.eye(4, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return contrastive_par(text, image, one, normalize=False).loss

    assert (slope(2.15)[2:].abs().sum(1) > 0.4).all()
    assert slope(1.99).abs().max() < 1e-15


def test_schedule_has_the_published_values():
    rate = two_phase_schedule(3e-5, 3e-6, 1e-9)
    found = {k: rate(k, 244) for k in (0, 61, 121, 122, 183, 243)}
    wanted = {0: 3e-5, 61: 1.639e-5, 121: 3e-6, 122: 3e-6, 183: 1.5005e-6, 243: 1.5e-9}
    for k, value in wanted.items():
        assert math.isclose(found[k], value, rel_tol=2e-3), k
    assert [rate(k, 1) for k in range(1)] == [3e-6]  # a single step has no first half
    assert rate(0, 2) == 3e-5 and rate(1, 2) == 3e-6


def test_decay_spares_vectors_and_named_layers():
    names = {"conv.weight": (3, 3), "conv.bias": (3,), "ln_1.weight": (2, 2), "bn1.weight": (2, 2),
             "scale": ()}  # fmt: skip
    named = [(n, torch.zeros(s)) for n, s in names.items()]
    groups = {g["weight_decay"]: len(g["params"]) for g in decay_groups(named, 0.1)}
    assert groups == {0.1: 1, 0.0: 4}


def reference_run(model, batches, steps, tau, lr):
    """Algorithm 1 by hand, in fp64, on normalised floats, without augmentation."""
    student, teacher = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    student.logit_scale.requires_grad_(False)
    free = [p for n, p in student.named_parameters() if p.requires_grad and
            (p.ndim < 2 or "ln" in n or "bias" in n)]  # fmt: skip
    rest = [p for n, p in student.named_parameters() if p.requires_grad and
            not (p.ndim < 2 or "ln" in n or "bias" in n)]  # fmt: skip
    adam = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 1e-4}, {"params": free, "weight_decay": 0.0}],
        betas=(0.9, 0.98), eps=1e-8, foreach=False,
    )  # fmt: skip
    rate = two_phase_schedule(3e-5, lr, 1e-9)
    for k in range(steps):
        x, t = batches[k % len(batches)]
        a, b = normalize(student.encode_image(x), dim=-1), normalize(student.encode_text(t), dim=-1)
        with torch.no_grad():
            a0 = normalize(teacher.encode_image(x), dim=-1)
            b0 = normalize(teacher.encode_text(t), dim=-1)
        logits = student.logit_scale.exp() * a @ b.T
        loss = -(logits.log_softmax(1).diag() + logits.log_softmax(0).diag()).mean() / 2
        for s in ((a - a0).pow(2).sum(1).mean(), (b - b0).pow(2).sum(1).mean()):
            if s <= tau:
                loss = loss - s / 2
        adam.zero_grad()
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = rate(k, steps)
        adam.step()
    return student


class EagerPar(PerturbAndRecover):
    """The objective in eager torch: two cross entropies and two squared distances."""

    def __call__(self, image, text, scale, reference, given):
        logits = scale * image @ text.T
        target = torch.arange(len(logits))
        recover = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        s_image, s_text = (
            (x - ref).square().sum(-1).mean()
            for x, ref in zip((image, text), reference, strict=True)
        )
        perturb = sum(torch.where(s <= self._tau, s, 0) for s in (s_image, s_text))
        return recover - perturb / 2, {"s_image": s_image, "s_text": s_text}


def test_kernels_train_as_eager_torch_does(monkeypatch):
    """Twenty steps in fp32, away from the gate's edge: the same losses to 1e-5."""
    model, pairs = DualEncoder(seed=3), random_pairs(64, 16)
    options = FAST | {"steps": 20, "lr": 1e-3}
    ours = pybackdoor.par_clean(model, pairs, **options)
    monkeypatch.setattr(pybackdoor.methods.par, "PerturbAndRecover", EagerPar)
    eager = pybackdoor.par_clean(model, pairs, **options)
    for a, b in zip(ours.history, eager.history, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["s_image"] - b["s_image"]) < 1e-5
    assert ours.history[-1]["s_image"] > 0.01  # the perturbation took part


@pytest.mark.parametrize("tau", [2.15, 0.02])  # never reached; crossed within the run
def test_equals_the_algorithm_written_out_in_fp64(tau):
    model = DualEncoder().double()
    g = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(6, 3, 16, 16, generator=g).double(), b["tokens"][:6])
        for b in random_pairs(12, 6)
    ]
    result = pybackdoor.par_clean(
        model, batches, steps=8, tau=tau, lr=1e-2, augment=False, precision="fp32", progress=False,
        repair=False,
    )  # fmt: skip
    wanted = reference_run(model, batches, 8, tau, 1e-2)
    for (name, got), want in zip(
        result.model.state_dict().items(), wanted.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=name)
    gates = [record["gate_image"] for record in result.history]
    assert (0.0 in gates) == (tau == 0.02)


@pytest.mark.parametrize("method", [pybackdoor.par_clean, pybackdoor.finetune_clean])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits_and_input_untouched(method, precision):
    model = DualEncoder(dropout=0.1).train()
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    options = FAST | {"precision": precision}
    pairs = random_pairs(48, 16)
    first, again = (method(model, pairs, seed=5, **options) for _ in range(2))
    assert_same(weights(model), before)
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert_same(weights(first.model), weights(again.model))
    assert first.history == again.history
    other = method(model, pairs, seed=6, **options)
    assert any(not torch.equal(weights(other.model)[n], t) for n, t in weights(first.model).items())


def test_scale_and_batchnorm_statistics_stay():
    model = DualEncoder()
    result = pybackdoor.par_clean(model, random_pairs(48, 16), **FAST)
    assert torch.equal(result.model.logit_scale, model.logit_scale)
    assert torch.equal(result.model.image[1].running_mean, model.image[1].running_mean)
    assert not torch.equal(result.model.image[1].weight, model.image[1].weight)
    assert not result.model.training


class ScaleBehindProperty(DualEncoder):
    """logit_scale computed from an inner parameter, as some wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        value = self.logit_scale.detach().clone()
        del self.logit_scale
        self.inner = nn.Module()
        self.inner.root = nn.Parameter(value.sqrt())

    @property
    def logit_scale(self):
        return self.inner.root.square()


def test_scale_behind_a_property_is_frozen():
    model = ScaleBehindProperty()
    result = pybackdoor.par_clean(model, random_pairs(48, 16), **FAST)
    assert torch.equal(result.model.inner.root, model.inner.root)


def as_forms(batches):
    """The same pairs in every form that a loader may yield."""
    ids = [(b["images"], b["tokens"], b["ids"]) for b in batches]
    planar = [{**b, "images": b["images"].permute(0, 3, 1, 2).contiguous()} for b in batches]
    texts = [{**b, "texts": [" ".join(map(str, r)) for r in b["tokens"].tolist()]} for b in batches]
    for b in texts:
        del b["tokens"]
    numpy = [tuple(t.numpy() for t in b) for b in ids]
    return {"dict": batches, "tuple": ids, "planar": planar, "texts": texts, "numpy": numpy}


def test_every_form_of_a_batch_gives_the_same_bits():
    def tokenizer(texts):
        return torch.tensor([[int(w) for w in text.split()] for text in texts])

    model, forms = DualEncoder(), as_forms(random_pairs(32, 16))
    results = {
        name: weights(pybackdoor.par_clean(model, form, tokenizer=tokenizer, **FAST).model)
        for name, form in forms.items()
    }
    for name in results:
        assert_same(results["dict"], results[name])


def test_ids_key_the_augmentation_and_floats_are_taken_as_they_are():
    model, batches = DualEncoder(), random_pairs(32, 16)
    without = [(b["images"], b["tokens"]) for b in batches]
    keyed, counted = (pybackdoor.par_clean(model, f, **FAST) for f in (batches, without))
    assert keyed.history != counted.history  # other ids, other noise
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (MEAN, STD))
    floats = [((b["images"].permute(0, 3, 1, 2) / 255 - mean) / std, b["tokens"]) for b in batches]
    plain = FAST | {"augment": False}
    a, b = (pybackdoor.par_clean(model, f, **plain) for f in (floats, without))
    for x, y in zip(a.history, b.history, strict=True):
        assert math.isclose(x["loss"], y["loss"], rel_tol=1e-4)
    unknown = {k: v for k, v in FAST.items() if k not in ("mean", "std")}
    erased = pybackdoor.par_clean(model, floats, **unknown)  # no mean and std: erased, no noise
    noisy = pybackdoor.par_clean(model, floats, **FAST)
    assert len({r.history[-1]["loss"] for r in (a, erased, noisy)}) == 3


def test_history_and_report_say_what_happened():
    seen = []
    result = pybackdoor.par_clean(
        DualEncoder(), random_pairs(40, 16), epochs=2, on_step=lambda k, r, m: seen.append(k),
        **{k: v for k, v in FAST.items() if k != "steps"},
    )  # fmt: skip
    assert [r["step"] for r in result.history] == list(range(6)) == seen
    assert [r["epoch"] for r in result.history] == [0, 0, 0, 1, 1, 1]
    first = result.history[0]
    assert first["s_image"] == 0 and first["gate_image"] == 1 and first["lr"] == 3e-5
    assert math.isclose(first["loss"], first["contrastive"], rel_tol=1e-6)
    assert result.report["pairs_seen"] == 80 and result.report["settings"]["tau"] == 2.15
    began = time.perf_counter()
    slow = pybackdoor.par_clean(
        DualEncoder(), random_pairs(40, 16), on_step=lambda k, r, m: time.sleep(0.5), **FAST
    )
    whole = time.perf_counter() - began
    assert slow.report["seconds"] < whole - 1.45  # three hooks' half seconds are not its cost
    short = pybackdoor.par_clean(
        DualEncoder(), random_pairs(40, 16), on_step=lambda k, r, m: k == 1, **FAST
    )
    assert short.report["steps_done"] == 2


def test_half_precision_weights_are_trained_in_fp32():
    result = pybackdoor.par_clean(DualEncoder().half(), random_pairs(32, 16), **FAST)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}

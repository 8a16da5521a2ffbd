"""Broken numbers are found at their step, named, never applied and never saved."""

import math
import random

import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs

import pybackdoor
from pybackdoor.engine import Checkpoints, NonFiniteError
from pybackdoor.engine.checkpoints import CheckpointFolder, steps_in
from pybackdoor.engine.guard import largest_entries

BATCHES = 6


def batches():
    """Normalised floats with ids, which can hold anything."""
    g = torch.Generator().manual_seed(1)
    found = []
    for batch in random_pairs(BATCHES * 8, 8):
        images = torch.randn(8, 3, 16, 16, generator=g)
        found.append({"images": images, "tokens": batch["tokens"], "ids": batch["ids"]})
    return found


class Faulty(DualEncoder):
    """Breaks once where it is told to: in (what, call of encode_text while training).

    ``name`` and ``entry``: the weight or the gradient that breaks, and where in it; no name for the
    gradient of the caption features.
    """

    def __init__(self, what, at, value=math.nan, name=None, entry=0) -> None:
        super().__init__(seed=2)
        self.what, self.at, self.calls, self.value = what, at, -1, value
        self.name, self.entry = name, entry

    def encode_text(self, tokens):
        out = super().encode_text(tokens)
        if self.training:
            self.calls += 1
            if self.calls == self.at:
                out = self.broken(out)
        return out

    def broken(self, out):  # [n, 8]
        if self.what == "caption":
            row = self.entry % len(out)
            out = torch.cat([out[:row], out[row : row + 1] * self.value, out[row + 1 :]])
        if self.what == "weight":  # not in a way that autograd would notice
            held = dict(self.named_parameters()) | dict(self.named_buffers())
            held[self.name].data.view(-1)[self.entry] = self.value
        if self.what == "gradient" and self.name is None:
            out.register_hook(lambda g: g * self.value)
        elif self.what == "gradient":
            hooked = self.get_parameter(self.name).register_hook(self.broken_gradient)
            self.unhook = hooked.remove
        return out

    def broken_gradient(self, gradient):
        self.unhook()
        gradient = gradient.clone()
        gradient.view(-1)[self.entry] = self.value
        return gradient


def run(model, loader, **options):
    fixed = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}
    fixed |= {"augment": False, "steps": 5, "repair": False}  # an erased square would hide a pixel
    return pybackdoor.par_clean(model, loader, **fixed | options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["image", "caption", "gradient"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_batch_that_breaks_is_left_out(what, at, value):
    loader, model = batches(), Faulty(what, at, value, entry=3)
    if what == "image":
        loader[at]["images"][5, 1, 2, 3] = value
    result = run(model, loader)
    without = batches()
    del without[at]
    want = run(DualEncoder(seed=2), without)
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], tensor), name
    named = {
        "image": f"image features of 1 of 8 pairs (ids {1000 + 8 * at + 5})",
        "caption": f"text features of 1 of 8 pairs (ids {1000 + 8 * at + 3})",
        "gradient": "gradient of text.0.weight",
    }[what]
    (fault,) = result.report["faults"]
    assert fault.startswith(f"step {at}: not finite: ") and named in fault
    assert result.report["skipped_batches"] == 1
    assert [r["step"] for r in result.history] == list(range(5))


def test_too_many_faults_end_the_run():
    loader = batches()
    for batch in loader[1:]:
        batch["images"][0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="step 1: .*, fault 4; the weights of the step before"):
        run(DualEncoder(), loader, epochs=3, steps=None)
    with pytest.raises(NonFiniteError, match=r"1 of 8 pairs \(ids 1008\).*; the weights") as stop:
        run(DualEncoder(), loader, max_faults=0)
    assert "fault 1" not in str(stop.value) and len(stop.value.result.history) == 1


def broken_weight(at, times=1, value=math.nan):
    left = [times]

    def hook(k, record, model):
        if k == at and left[0]:
            left[0] -= 1
            with torch.no_grad():
                model.text[0].weight[49, 7] = value  # a token that no caption has

    return hook


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("minutes", [0.0, 10.0])
def test_broken_weights_are_replaced_by_the_last_good_ones(tmp_path, minutes, value):
    loader = batches()
    for batch in loader:
        batch["tokens"].clamp_(max=48)
    want = run(DualEncoder(), loader)
    run(DualEncoder(), loader, folder=tmp_path, on_step=lambda k, r, m: k == 1)
    hook = broken_weight(3, value=value)
    again = {"folder": tmp_path, "resume": True, "save_minutes": minutes}
    got = run(DualEncoder(), loader, on_step=hook, **again)
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], tensor), name
    (fault,) = got.report["faults"]
    where = "after step 3: not finite: " if minutes == 0 else "step 4: not finite: weight "
    assert fault.startswith(where + "text.0.weight")


def test_broken_weights_without_a_checkpoint_are_an_error():
    with pytest.raises(NonFiniteError, match="weight text.0.weight, .*; no earlier state is kept"):
        run(DualEncoder(), batches(), on_step=broken_weight(1))


def test_weights_that_break_at_each_try_end_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="fault 4; the last checkpoint is kept"):
        run(
            DualEncoder(), batches(), folder=tmp_path, save_minutes=0,
            on_step=broken_weight(3, times=9),
        )  # fmt: skip


FAULTS = 200
RUN = 3  # steps
TRAINED = [n for n, _ in DualEncoder().named_parameters() if n != "logit_scale"]
WATCHED = [n for n, t in DualEncoder().state_dict().items() if t.is_floating_point()]


def kept_states(folder):
    """{step: state} of the checkpoints in a folder; one that does not load raises."""
    with CheckpointFolder(Checkpoints(folder, resume=True, force=True), {}) as kept:
        return {step: kept._read(step) for step in steps_in(folder)}


@pytest.fixture(scope="module")
def undisturbed():
    """Weights of the run without a batch, or with all."""
    found = {}
    for left_out in (None, *range(RUN)):
        loader = [b for k, b in enumerate(batches()) if k != left_out]
        found[left_out] = run(DualEncoder(seed=2), loader, steps=RUN).model.state_dict()
    return found


@pytest.mark.parametrize("part", range(4))
def test_random_faults(part, undisturbed, tmp_path):
    """200 of random kinds, places and values, with a checkpoint after each step.

    Each is found at its step. What lies on the disk afterwards is finite and loads, and the run is
    as without the batch, or, of a weight, as if nothing had been.
    """
    rng, kinds = random.Random(part), ("image", "caption", "weight", "gradient")
    for number in range(FAULTS // 4):
        what, at = rng.choice(kinds), rng.randrange(RUN)
        name = rng.choice(WATCHED if what == "weight" else TRAINED)
        entry = rng.randrange(DualEncoder().state_dict()[name].numel())
        model = Faulty(what, at, rng.choice([math.nan, math.inf, -math.inf]), name, entry)
        loader, folder = batches(), tmp_path / str(number)
        if what == "image":
            image = loader[at]["images"][rng.randrange(8)]
            image.view(-1)[rng.randrange(image.numel())] = model.value
        told = what, at, name, entry, model.value
        try:
            result = run(model, loader, steps=RUN, folder=folder, save_minutes=0)
        except NonFiniteError as error:  # nothing to go back to
            assert what == "weight" and at == 0, told
            assert str(error).startswith(f"step 0: not finite: weight {name}"), (told, error)
            assert kept_states(folder) == {}
            continue
        (fault,) = result.report["faults"]
        where = f" of {name}" if what == "gradient" else f" {name}" if what == "weight" else ""
        named = {"image": "image features", "caption": "text features"}.get(what, what)
        assert fault.startswith(f"step {at}: not finite: {named}{where}"), (told, fault)
        states = kept_states(folder)
        assert list(states) == [RUN - 1, RUN], told
        for state in states.values():
            floats = [t for t in state.tensors.values() if t.is_floating_point()]
            assert len(floats) > len(WATCHED) and all(t.isfinite().all() for t in floats), told
        wanted = undisturbed[None if what == "weight" else at]
        for weight, tensor in wanted.items():
            assert torch.equal(result.model.state_dict()[weight], tensor), (told, weight)
            assert torch.equal(states[RUN].tensors[f"model/{weight}"], tensor), (told, weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -7.0, 3e38, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_entry_is_that_of_the_norm(value, dtype):
    """The CPU's own way, on a vector, a scalar and a tensor with gaps, as foreach_norm has it."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1000, generator=g).to(dtype), torch.tensor(value, dtype=dtype)]
    tensors.append(torch.randn(40, 30, generator=g).to(dtype).t()[::2])
    tensors[0][417] = tensors[2][3, 5] = value
    for got, t in zip(largest_entries(tensors), tensors, strict=True):
        want = torch._foreach_norm([t], math.inf)[0]
        assert torch.equal(got.double().nan_to_num(), want.double().nan_to_num())
        assert bool(got.isnan()) == math.isnan(value) and got.ndim == 0

"""The engine under bad input, broken numbers, interruption and several processes."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs

import pybackdoor
from pybackdoor.distributed import Ranks
from pybackdoor.engine import NonFiniteError

QUICK = {"steps": 2, "precision": "fp32", "mean": MEAN, "std": STD, "progress": False}


def clean(model=None, loader=None, **options):
    loader = random_pairs(32, 16) if loader is None else loader
    return pybackdoor.par_clean(model or DualEncoder(), loader, **QUICK | options)


def changed(**new):
    batch = dict(random_pairs(16, 16)[0])
    for name, change in new.items():
        batch[name] = change(batch[name])
    return [batch]


BAD_BATCHES = {
    "no batch at all": ([], "loader is empty: wanted batches of at least two pairs, got 0"),
    "one pair": (random_pairs(1, 1), "at least two pairs, and one on every rank, got 1"),
    "a string": (["x"], "must be .images, tokens.*got str"),
    "one item": ([(torch.zeros(2),)], "got tuple of 1 items"),
    "no captions": ([{"images": torch.zeros(2)}], r"needs the keys.*got \['images'\]"),
    "lists for images": ([([1, 2], torch.zeros(2, 6).long())], "images must be a tensor, got list"),
    "three dimensions": (changed(images=lambda t: t[0]), r"4 dimensions, got shape \(16, 16, 3\)"),
    "four channels": (
        changed(images=lambda t: torch.cat([t, t[..., :1]], -1)),
        r"uint8 images must be .n, H, W, 3. or .n, 3, H, W., got \(16, 16, 16, 4\)",
    ),
    "int32 images": (
        changed(images=lambda t: t.int()),
        "uint8 pixels or normalised floats, got tor",
    ),
    "float HWC images": (changed(images=lambda t: t.float()), r"float images must be .n, 3, H, W."),
    "fewer captions": (changed(tokens=lambda t: t[:5]), "got 16 images and 5 captions"),
    "float tokens": (changed(tokens=lambda t: t.float()), r"tokens must be .n, L. integers, got"),
    "flat tokens": (
        changed(tokens=lambda t: t[:, 0]),
        r"integers, got torch.int64 of shape \(16,\)",
    ),
    "float ids": (changed(ids=lambda t: t.float()), "ids must be 16 integers, one per image, got"),
    "fewer ids": (changed(ids=lambda t: t[:3]), r"ids must be 16 integers.*of shape \(3,\)"),
    "strings, no tokenizer": (changed(tokens=lambda t: ["a"] * 16), "strings: pass tokenizer="),
    "numbers as captions": (changed(tokens=lambda t: [1] * 16), "tokens or strings, got int"),
    "an empty caption": (changed(tokens=lambda t: ["a", " "] * 8), "an empty one at 1"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batch_is_named(name):
    loader, message = BAD_BATCHES[name]
    with pytest.raises((TypeError, ValueError), match=message):
        clean(loader=loader)


BAD_SETTINGS = {
    "tau": (4.1, r"tau must be in \[0, 4\].*got 4.1"),
    "steps": (0, "steps must be at least 1, got 0"),
    "epochs": (0, "epochs must be at least 1, got 0"),
    "lr": (-1e-3, r"lr must be a learning rate in \[0, 1\), got -0.001"),
    "weight_decay": (-1.0, "weight_decay must be at least 0, got -1.0"),
    "precision": ("fp8", "precision must be one of .*got 'fp8'"),
    "mean": ((0.5,), r"mean must be 3 numbers, got \(0.5,\)"),
    "std": ((0.5, 0.0, 0.5), "std must be 3 positive numbers"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting_is_named(name):
    value, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        clean(**{name: value})


def test_mean_and_std_are_needed_for_pixels_and_go_together():
    with pytest.raises(ValueError, match="uint8 images need mean and std"):
        clean(mean=None, std=None)
    with pytest.raises(ValueError, match="mean and std go together"):
        clean(mean=None)


def test_steps_are_needed_for_a_loader_without_length():
    batches = random_pairs(48, 16)
    with pytest.raises(ValueError, match="steps must be given: the loader has no len"):
        clean(loader=(b for b in batches), steps=None)
    assert len(clean(loader=(b for b in batches)).history) == 2
    with pytest.raises(ValueError, match="yields nothing in epoch 2.*got 48 pairs so far"):
        clean(loader=(b for b in batches), steps=4)


def test_sizes_that_the_model_states_are_held():
    model = DualEncoder()
    model.visual = torch.nn.Identity()
    model.visual.image_size, model.context_length = (224, 224), 6
    with pytest.raises(ValueError, match="images must be 224x224 pixels for this model, got 16x16"):
        clean(model)
    model.visual.image_size, model.context_length = (16, 16), 5
    with pytest.raises(ValueError, match="at most 5 columns, this model's context length, got 6"):
        clean(model)


def test_a_tail_of_one_pair_is_left_out_and_counted():
    result = clean(loader=random_pairs(17, 16), steps=3)
    assert result.report["skipped_batches"] == 2
    assert [r["epoch"] for r in result.history] == [0, 1, 2]


def test_model_that_cannot_be_cleaned_is_refused():
    with pytest.raises(TypeError, match="must have encode_image"):
        clean(torch.nn.Linear(2, 2))
    without = DualEncoder()
    del without.logit_scale
    with pytest.raises(TypeError, match="must have logit_scale"):
        clean(without)
    broken = DualEncoder()
    broken.image[6].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"image\.6\.weight"):
        clean(broken)


class Breaks(DualEncoder):
    """A model whose image features or gradients break from the second call on."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls = what, 0

    def encode_image(self, x):
        out = super().encode_image(x)
        if not self.training:
            return out
        self.calls += 1
        if self.calls > 1 and self.what == "features":
            out = out * math.nan
        if self.calls > 1 and self.what == "gradient":
            out.register_hook(lambda g: g * math.inf)
        return out


@pytest.mark.parametrize(
    "what, message",
    [
        ("features", "step 1: not finite: image features of 16 of 16 pairs"),
        ("gradient", r"step 1: the gradient of image\.0\.weight is not finite"),
    ],
)
def test_broken_numbers_stop_the_run_at_that_step(what, message):
    states = []
    with pytest.raises(NonFiniteError, match=message):
        clean(Breaks(what), steps=4, on_step=lambda k, r, m: states.append(m))
    assert len(states) == 1  # the first step stood, no other was taken
    assert all(p.isfinite().all() for p in states[0].parameters())


def test_interrupt_keeps_the_last_whole_step():
    kept = {}

    def stop(step, record, model):
        if step == 1:
            kept.update(copy.deepcopy(model.state_dict()))
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(pybackdoor.CleaningInterrupted, match="stopped after 3 steps") as stopped:
        clean(steps=9, on_step=stop)
    result = stopped.value.result
    assert result.report["interrupted"] and len(result.history) == 3
    assert any(not torch.equal(t, kept[n]) for n, t in result.model.state_dict().items())
    reached = clean(steps=9, on_step=lambda k, r, m: k == 2).model
    for name, tensor in reached.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name])


def test_one_process_gathers_nothing():
    ranks, x = Ranks(), torch.ones(2, 3, requires_grad=True)
    assert ranks.gather(x, ranks.counts(2, x.device)) is x
    ranks.sum_gradients([x])
    assert x.grad is None


def test_two_processes_equal_one(tmp_path: Path):
    """Weights after three fp64 steps, from 2 gloo ranks of unequal share and from one process."""
    script = Path(__file__).with_name("two_ranks.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)}
    alone = [sys.executable, str(script), str(tmp_path / "one.pt")]
    pair = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(script), str(tmp_path / "two.pt")]  # fmt: skip
    for command in (alone, pair):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f, weights_only=True) for f in ("one.pt", "two.pt"))
    assert one["batches"] == [[7], [7], [5]] and two["batches"] == [[4, 3], [4, 3], [3, 2]]
    for kind in ("gradients", "weights"):
        for name, tensor in one[kind].items():
            torch.testing.assert_close(two[kind][name], tensor, rtol=1e-6, atol=1e-12, msg=name)
    assert one["history"] == pytest.approx(two["history"], rel=1e-9)

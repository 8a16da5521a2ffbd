"""The engine under bad input, broken numbers, interruption and several processes."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from run_ranks import run_ranks

import pybackdoor
from pybackdoor.distributed import Ranks
from pybackdoor.engine import DeferredInterrupt, NonFiniteError, pick_precision

QUICK = {"steps": 2, "precision": "fp32", "mean": MEAN, "std": STD, "progress": False,
         "repair": False}  # fmt: skip


def clean(model=None, loader=None, **options):
    loader = random_pairs(32, 16) if loader is None else loader
    return pybackdoor.par_clean(model or DualEncoder(), loader, **QUICK | options)


def changed(**new):
    batch = dict(random_pairs(16, 16)[0])
    for name, change in new.items():
        batch[name] = change(batch[name])
    return [batch]


BAD_BATCHES = {
    "no batch at all": ([], "loader is empty: wanted at least one batch of two pairs"),
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
    "string ids": (
        changed(ids=lambda t: ["a"] * 16),
        "ids must be integers, one per image, got list",
    ),
    "fewer ids": (changed(ids=lambda t: t[:3]), r"ids must be 16 integers.*of shape \(3,\)"),
    "pixels as floats": (
        changed(images=lambda t: t.permute(0, 3, 1, 2).float()),
        "float images must be normalised, within about -5 to 5, got 255",
    ),
    "no captions given": (changed(tokens=lambda t: 7), "must be tokens or strings, got int"),
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
    "betas": ((0.9, 1.0), r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    "seed": (-1, "seed must be at least 0, got -1"),
    "precision": ("fp8", "precision must be one of .*got 'fp8'"),
    "mean": ((0.5,), r"mean must be 3 numbers, got \(0.5,\)"),
    "std": ((0.5, 0.0, 0.5), "std must be 3 positive numbers"),
}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_of_micro_batches_are_refused(mode):
    with pytest.raises(ValueError, match=f"compile='{mode}' and micro_batch exclude each other"):
        clean(compile=mode, micro_batch=8)


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting_is_named(name):
    value, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        clean(**{name: value})


@pytest.mark.parametrize(
    ("has", "picked"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_the_precision_is_what_the_cpu_is_fast_in(has, picked, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert clean(precision="auto").report["settings"]["precision"] == picked
    assert clean().report["settings"]["precision"] == "fp32"  # as asked for
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.10
    fast = picked == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, raising=False)
    assert pick_precision("auto", torch.device("cpu")) == picked


@pytest.mark.parametrize(("capability", "picked"), [((9, 0), "bf16"), ((7, 5), "fp32")])
def test_the_precision_is_what_the_gpu_is_fast_in(capability, picked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda:0")
    assert pick_precision("auto", device) == picked
    assert pick_precision("fp32", device) == "fp32"


@pytest.mark.parametrize("device", ["gpu", 7, "cuda:99"])
def test_a_device_that_is_none_is_named(device):
    with pytest.raises(ValueError, match=f"device must be usable here, got '{device}'"):
        clean(device=device)


def test_options_that_say_nothing_are_refused():
    with pytest.raises(TypeError, match="par_clean: unknown option 'lr_stat' .did you mean 'lr_st"):
        clean(lr_stat=1e-3)
    for option in ("resume", "force"):
        with pytest.raises(ValueError, match="resume and force need folder"):
            clean(**{option: True})


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


def test_one_shot_iterator_is_refused_before_the_first_step():
    class OneShot(list):
        def __iter__(self):
            return self

        def __next__(self):
            raise AssertionError("a step was taken")

    with pytest.raises(ValueError, match="one-shot iterator of 2 batches, 4 are wanted"):
        clean(loader=OneShot(random_pairs(32, 16)), steps=4)


def test_a_tail_of_one_pair_is_left_out_and_counted():
    result = clean(loader=random_pairs(17, 16), steps=3)
    assert result.report["skipped_batches"] == 2
    assert [r["epoch"] for r in result.history] == [0, 1, 2]
    passes = clean(loader=random_pairs(17, 16), steps=None, epochs=2)  # and no pass is added
    assert [r["epoch"] for r in passes.history] == [0, 1]


def test_token_outside_the_vocabulary_is_named():
    model = DualEncoder()
    model.vocab_size = 20
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 20\).*got 47"):
        clean(model)


def test_epochs_are_announced_to_loader_and_sampler():
    class Announced(list):
        epochs: list

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    loader, sampler = Announced(random_pairs(16, 16)), Announced()
    loader.epochs, sampler.epochs, loader.sampler = [], [], sampler
    clean(loader=loader, steps=3)
    assert loader.epochs == sampler.epochs == [0, 1, 2]


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
        ("gradient", r"step 1: not finite: gradient of image\.0\.weight, .* and 3 more"),
    ],
)
def test_broken_numbers_stop_the_run_at_that_step(what, message):
    with pytest.raises(NonFiniteError, match=message) as stopped:
        clean(Breaks(what), steps=4)
    result = stopped.value.result  # the first step stood, no other was taken
    assert len(result.history) == 1
    wanted = clean(Breaks("nothing"), steps=4, on_step=lambda k, r, m: k == 0).model.state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, wanted[name])


class BadTeacher(DualEncoder):
    """Its frozen copy gives no numbers."""

    def encode_text(self, tokens):
        return super().encode_text(tokens) * (1.0 if self.training else math.nan)


def test_a_broken_reference_is_named():
    with pytest.raises(
        NonFiniteError,
        match="reference features 1 of 16 of 16 pairs .ids 1016, 1017, 1018, .*, loss, s_t",
    ):
        clean(BadTeacher())


def test_whatever_ends_a_run_leaves_its_last_state():
    def full(step, record, model):
        if step == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as stopped:
        clean(steps=9, on_step=full)
    assert len(stopped.value.result.history) == 3
    with pytest.raises(ValueError, match="tau") as refused:
        clean(tau=-1)
    assert not hasattr(refused.value, "result")  # nothing had been trained


class Presses(DualEncoder):
    """Ctrl-C comes while the third step computes."""

    calls = 0

    def encode_image(self, x):
        if self.training:
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return super().encode_image(x)


def test_interrupt_waits_for_the_whole_step():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        clean(Presses(), steps=9)
    result = stopped.value.result
    assert len(result.history) == 3 and signal.getsignal(signal.SIGINT) is before
    wanted = clean(steps=9, on_step=lambda k, r, m: k == 2).model.state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, wanted[name])


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C was kept too")


def test_one_process_gathers_nothing():
    ranks, x = Ranks(), torch.ones(2, 3, requires_grad=True)
    assert ranks.gather(x, [2]) is x and ranks.share(x) is x
    ranks.sum_gradients([x])
    ranks.sum_(x)
    assert x.grad is None and (x == 1).all() and ranks.sum_scatter(x, [2]) is x


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """What one process and two found in the same experiments."""
    found = []
    for count in (1, 2):
        code, errors, saved = run_ranks("two_ranks.py", tmp_path_factory.mktemp("ranks"), count)
        assert code == 0, errors[-3000:]
        found.append(saved)
    return found


@pytest.mark.parametrize("what", ["par", "trained scale", "clean"])
def test_two_processes_equal_one(one_and_two, what):
    """Gradients of every step and weights after three, in fp64, unequal and uneven shares."""
    one, two = (found[what] for found in one_and_two)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-12, msg=name)


def test_shares_were_unequal_and_errors_reach_every_rank(one_and_two):
    one, two = one_and_two
    assert one["shares"] == [[7], [7], [5]] and two["shares"] == [[4, 3], [4, 3], [3, 2]]
    assert two["same shares"].startswith("all 2 ranks hold the same first batch")
    assert two["a rank fails"] == "rank 1 could not read its batch; its own error says why"
    assert two["unequal steps"] == "every rank must take the same number of steps, got [3, 2]"
    assert two["a rank stops"] == 2


def test_a_loader_that_names_no_batch_size():
    data = torch.utils.data.DataLoader(random_pairs(32, 16), batch_size=None)
    assert clean(loader=data).history == clean(loader=random_pairs(32, 16)).history


def test_a_temperature_that_is_a_number():
    model = DualEncoder()
    scale = float(model.logit_scale.detach())
    del model.logit_scale
    model.logit_scale = scale
    assert len(clean(model).history) == 2

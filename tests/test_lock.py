"""Cleaning with the text tower locked: it stays to the bit, and costs no gradient."""

import pytest
import torch
from dual_encoder import GIVEN, MEAN, STD, DualEncoder, random_pairs
from test_caption_features import count_texts
from test_caption_features import loader as captions_loader
from test_caption_features import run as run_clip
from torch import nn
from training_child import clean, loader

import pybackdoor
from pybackdoor.engine import Encoder, Preparation
from pybackdoor.engine.gradients import Gradients
from pybackdoor.engine.lock import LockedText
from pybackdoor.methods.par import PerturbAndRecover

CPU = torch.device("cpu")


class Wordy(DualEncoder):
    """With dropout in the text tower."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.text.append(nn.Dropout(0.5))


class Shared(DualEncoder):
    """Both towers end in one projection."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.shared = nn.Linear(8, 8)

    def encode_image(self, x):
        return self.shared(super().encode_image(x))

    def encode_text(self, tokens):
        return self.shared(super().encode_text(tokens))


def run(model, **options):
    fixed = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}
    fixed |= {"steps": 12, "lr_start": 1e-2, "lock": "text"}
    return pybackdoor.par_clean(model, loader(), **fixed | options)


@pytest.mark.parametrize("cache_text", [True, False])
@pytest.mark.parametrize("micro_batch", [None, 6])
def test_the_text_tower_stays_and_the_image_tower_moves(cache_text, micro_batch):
    model = Wordy()
    result = run(model, cache_text=cache_text, micro_batch=micro_batch)
    before, after = model.state_dict(), result.model.state_dict()
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == (name.startswith("image.") and ".1.r" not in name and "num" not in name), (
            name
        )
    for record in result.history:
        assert record["s_text"] == 0 and record["gate_text"] == 1
        assert record["loss"] == pytest.approx(
            record["contrastive"] - 0.5 * record["s_image"] * record["gate_image"], abs=1e-6
        )
    assert result.history[-1]["s_image"] > 0.01
    assert result.report["settings"]["lock"] == "text"
    assert all(p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize("micro", [None, 4])
def test_gradients_are_the_image_tower_s_own(micro):
    def gradients(lock, micro=None):
        model = DualEncoder(seed=1).double().train()
        model.image[1].eval()
        encode = Encoder(None, CPU)
        locked = LockedText(model, encode) if lock else None
        objective = PerturbAndRecover(DualEncoder(seed=2).double().eval(), 2.15)
        objective.prepare(Preparation(model, encode, CPU))
        compute = Gradients(
            model, objective, encode, train_scale=True, micro_batch=micro, seed=5, locked=locked
        )
        tokens = random_pairs(23, 23)[0]["tokens"]
        if lock:
            locked.freeze(tokens)
        x = torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
        outcome = compute(x, tokens, GIVEN)
        return outcome, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (want, all_of_them), (got, grads) = gradients(False), gradients(True, micro)
    torch.testing.assert_close(got.scalars["loss"], want.scalars["loss"])
    assert {n.split(".")[0] for n in grads} == {"image", "logit_scale"}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, all_of_them[name], rtol=1e-9, atol=1e-14)


def test_captions_are_encoded_once_and_without_gradients(monkeypatch):
    seen = count_texts(monkeypatch)
    want = run_clip(captions_loader(), lock="text", cache_text=False)
    each_step = sum(n for n, _ in seen)
    seen.clear()
    got = run_clip(captions_loader(), lock="text")
    # 40 captions for either model, what trimming tried out, and the first chunk's shape.
    assert sum(n for n, _ in seen) <= 2 * 40 + 3 * 8 and each_step >= 2 * 100
    for a, b in zip(got.history, want.history, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6) and a["s_text"] == b["s_text"] == 0


def test_finetuning_can_be_locked_too():
    model = DualEncoder()
    fixed = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False}
    result = pybackdoor.finetune_clean(model, random_pairs(40, 20), lock="text", **fixed)
    assert torch.equal(result.model.text[1].weight, model.text[1].weight)
    assert not torch.equal(result.model.image[6].weight, model.image[6].weight)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    want = clean(None, 13, lock="text")
    for stop in (3, 4, 9):
        clean(tmp_path, 13, lock="text", on_step=lambda k, r, m, stop=stop: k == stop)
    got = clean(tmp_path, 13, lock="text")
    assert got.history == want.history
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="lock: was 'text', is None"):
        clean(tmp_path, 13)


def test_what_the_towers_share_is_locked():
    model = Shared()
    result = run(model)
    assert torch.equal(result.model.shared.weight, model.shared.weight)
    assert not torch.equal(result.model.image[6].weight, model.image[6].weight)
    assert all(record["s_text"] == 0 for record in result.history)


def test_a_model_without_a_tower_of_its_own_is_refused():
    class Whole(DualEncoder):
        def encode_text(self, tokens):
            pixels = tokens.float()[:, :1, None, None].expand(-1, 3, 16, 16)
            return super().encode_text(tokens) + self.image(pixels)

    with pytest.raises(ValueError, match="lock='text' leaves nothing to train"):
        run(Whole())


def test_a_bad_name_is_refused():
    with pytest.raises(ValueError, match=r"lock must be None or one of \['text'\], got 'image'"):
        run(DualEncoder(), lock="image")

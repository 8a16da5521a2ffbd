"""Drift repair: its rotation against an fp64 SVD, its fold in every kind of tower, its limits."""

from __future__ import annotations

import copy
import math
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from clip_models import tiny, tiny_hf
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from run_ranks import run_ranks
from torch import nn
from torch.nn.functional import normalize

import pybackdoor
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.models import HFClip, image_features, text_features
from pybackdoor.models.fold import Fold, LinearMap
from pybackdoor.repair import nearest_rotation

PAIRS = 60
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
TIMM = {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
OPEN_CLIP = {
    "ViT": {},
    "ResNet": {"vision_cfg": RESNET},
    "text tower of its own": {"custom_text": True},
    "text projection with a bias": {"text_cfg": TEXT | {"proj_bias": True}},
    "timm, linear head": {"vision_cfg": TIMM | {"timm_proj": "linear"}},
    "timm, MLP head": {"vision_cfg": TIMM | {"timm_proj": "mlp"}},
    "timm, its own classifier": {"vision_cfg": TIMM | {"timm_proj": "", "timm_pool": "avg"}},
}


class Shared(nn.Module):
    """Both towers end in one layer; ``crossed``, they take its square matrix either way round."""

    def __init__(self, crossed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.crossed, self.logit_scale = crossed, nn.Parameter(torch.tensor(2.0))
        self.pixels, self.words = nn.Linear(768, 8), nn.EmbeddingBag(50, 8)
        self.last = nn.Linear(8, 8, bias=not crossed)

    def encode_image(self, x):
        return self.last(self.pixels(x.flatten(1)).tanh())

    def encode_text(self, tokens):
        rows = self.words(tokens).tanh()
        return rows @ self.last.weight if self.crossed else self.last(rows)


class Unfoldable(DualEncoder):
    """A norm follows the last linear map of its text."""

    def encode_text(self, tokens):
        return self.ln_final(super().encode_text(tokens))


def make(kind: str) -> nn.Module:
    if kind == "Hugging Face":
        pytest.importorskip("transformers")
    with torch.random.fork_rng():
        if kind in OPEN_CLIP:
            return tiny(0, **({"text_cfg": TEXT} | OPEN_CLIP[kind])).model.eval()
        torch.manual_seed(0)
        own = {"DualEncoder": DualEncoder, "shared": Shared}
        return own[kind]().eval() if kind in own else HFClip(tiny_hf())


def batches_for(model: nn.Module, n: int = PAIRS, seed: int = 0) -> list:
    """Normalised floats and tokens, in two batches."""
    if isinstance(model, DualEncoder | Shared):
        side, length, words = 16, 6, 50
    else:
        side, length, words = 32, 16, 98
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, side, side, generator=g)
    tokens = torch.randint(2, words - 1, (n, length), generator=g)
    tokens[:, -1] = 99 if words == 98 else words - 1  # the end of the text, where it is pooled
    dtype = next(model.parameters()).dtype
    images = images.to(dtype)
    return [(images[: n // 2], tokens[: n // 2]), (images[n // 2 :], tokens[n // 2 :])]


def drifted(model: nn.Module, seed: int = 1) -> nn.Module:
    moved = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moved.parameters():
            if p.ndim > 1:
                p += 0.3 * p.std() * torch.randn(p.shape, generator=g).to(p.dtype)
    return moved


@torch.no_grad()
def features(model: nn.Module, batches: list) -> torch.Tensor:
    """[2, n, D] fp64 unit rows: images, texts."""
    images, texts = (torch.cat(x) for x in zip(*batches, strict=True))
    rows = torch.stack([image_features(model, images), text_features(model, texts)])
    return normalize(rows.double(), dim=-1)


def turn(dim: int, seed: int = 5) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True)
    )


KINDS = [*OPEN_CLIP, "Hugging Face", "DualEncoder", "shared"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_and_embeddings_follow_the_svd(kind):
    old = make(kind)
    new, batches = drifted(old), batches_for(old)
    before = weights(new)
    mended = pybackdoor.repair_drift(new, old, batches, device="cpu")
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items())
    held_out = torch.arange(PAIRS) % 5 == 0
    moved, origin = features(new, batches), features(old, batches)
    fit = [rows[:, ~held_out].flatten(0, 1).numpy() for rows in (moved, origin)]
    u, _, vt = np.linalg.svd(fit[0].T @ fit[1])
    wanted, found = moved @ torch.from_numpy(u @ vt), features(mended.model, batches)
    assert (found - wanted).abs().max() < 1e-5
    logits = [math.exp(model.logit_scale.item()) * f[0] @ f[1].T
              for model, f in ((new, moved), (mended.model, found))]  # fmt: skip
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    report = mended.report
    assert report["done"] and report["pairs"] == PAIRS and report["held_out"] == 12
    assert report["rank"] == found.shape[2] and report["left_out"] == 0
    for when, rows in (("before", moved), ("after", wanted)):
        apart = (rows - origin)[:, held_out].square().sum(-1).mean(1)
        for tower, value in zip(("image", "text"), apart, strict=True):
            assert report[f"{tower}_{when}"] == pytest.approx(value.item(), abs=1e-5)
    assert report["error"] < 1e-5


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_rotated_copy_is_turned_back(mirrored):
    old = make("ViT")
    new, rotation = copy.deepcopy(old), turn(32)
    if mirrored == (torch.linalg.det(rotation) > 0):
        rotation[:, 0] *= -1
    with torch.no_grad():
        for p in (new.visual.proj, new.text_projection):
            p.copy_(p.double() @ rotation)
    mended = pybackdoor.repair_drift(new, old, batches_for(old), device="cpu")
    assert mended.report["image_before"] > 1 > 1e-10 > mended.report["image_after"]
    for name, wanted in old.state_dict().items():
        torch.testing.assert_close(mended.model.state_dict()[name], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ResNet", "Hugging Face"])
def test_a_saved_model_keeps_its_rotation(kind, tmp_path):
    old = make(kind)
    batches = batches_for(old)
    mended = pybackdoor.repair_drift(drifted(old), old, batches, device="cpu").model
    if kind == "Hugging Face":
        from transformers import CLIPModel

        pybackdoor.save(mended, tmp_path / "m")
        again = HFClip(CLIPModel.from_pretrained(tmp_path / "m")).eval()
    else:
        config = tiny(0, text_cfg=TEXT, **OPEN_CLIP[kind]).config
        pybackdoor.save(mended, tmp_path / "m", config=config)
        again = pybackdoor.load(tmp_path / "m").model.eval()
    assert torch.equal(features(again, batches), features(mended, batches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_rotated_in_fp64_and_rounded_once(dtype):
    rotation = turn(4)
    matrix, bias = torch.randn(4, 6).to(dtype), torch.randn(4).to(dtype)
    linear = LinearMap(nn.Parameter(matrix.clone()), nn.Parameter(bias.clone()), True)
    linear.rotate_(rotation)
    assert torch.equal(linear.weight, (rotation.T @ matrix.double()).to(dtype))
    assert torch.equal(linear.bias, (bias.double() @ rotation).to(dtype))
    old = make("ViT").to(dtype)
    mended = pybackdoor.repair_drift(drifted(old), old, batches_for(old), device="cpu")
    assert mended.report["done"] and mended.model.visual.proj.dtype == dtype
    assert mended.report["error"] < {torch.float64: 1e-13}.get(dtype, 0.05)
    assert mended.report["image_after"] < mended.report["image_before"]


@given(st.integers(2, 9), st.integers(0, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rotation_is_orthogonal_best_and_nearest_to_the_identity(dim, n, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, dim, generator=g, dtype=torch.float64)
    cross = a.T @ b
    rotation, rank = nearest_rotation(cross)
    assert rank == min(n, dim)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(rotation.T @ rotation, eye, rtol=0, atol=1e-12)
    best = torch.linalg.svdvals(cross).sum()
    assert (rotation * cross).sum() == pytest.approx(best.item(), abs=1e-10)
    if rank < dim:  # any other way to turn what the pairs do not speak of is farther from it
        null = torch.linalg.svd(cross)[2][rank:]
        for trial in range(5):
            other = rotation @ (eye - null.T @ null + null.T @ turn(dim - rank, trial) @ null)
            torch.testing.assert_close((other * cross).sum(), best, rtol=0, atol=1e-10)
            assert other.trace() <= rotation.trace() + 1e-12
    assert torch.equal(
        nearest_rotation(torch.zeros(3, 3).double())[0].round(decimals=12), torch.eye(3).double()
    )


def test_fewer_pairs_than_dimensions_turn_what_they_show():
    old = make("ViT")
    new, rotation = copy.deepcopy(old), turn(32)
    Fold(new, *batches_for(old)[0]).rotate_(rotation)
    few = batches_for(old, 10)
    mended = pybackdoor.repair_drift(new, old, few, device="cpu")
    assert mended.report["rank"] == 16  # 8 pairs for the fit
    fitted = torch.arange(10) % 5 != 0
    apart = features(mended.model, few) - features(old, few)
    assert apart[:, fitted].abs().max() < 1e-5


@pytest.mark.parametrize("crossed", [False, True])
def test_what_the_towers_share_is_rotated_once_or_not_at_all(crossed):
    old = Shared(crossed).eval()
    new = drifted(old)
    before = weights(new)
    if not crossed:
        assert pybackdoor.repair_drift(new, old, batches_for(old), device="cpu").report["done"]
        return
    fold = Fold(new, *batches_for(old)[0])
    with pytest.raises(ValueError, match="do not follow the rotation of both towers .they miss it"):
        fold.rotate_(turn(8))
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items())


def test_a_tower_without_a_last_map_is_left_alone_and_says_so():
    model, batches = Unfoldable().eval(), batches_for(DualEncoder())
    with pytest.raises(ValueError, match="the text tower ends in no linear map that could take up"):
        pybackdoor.repair_drift(drifted(model), model, batches, device="cpu")
    options = {"steps": 2, "precision": "fp32", "progress": False, "lr": 1e-2, "device": "cpu"}
    with pytest.warns(UserWarning, match="drift is not repaired: the text tower ends in no linear"):
        result = pybackdoor.par_clean(model, batches, **options)
    assert not result.report["repair"]["done"]
    assert "no linear map" in result.report["repair"]["reason"]
    assert same(result.model, pybackdoor.par_clean(model, batches, repair=False, **options).model)


class Constant(DualEncoder):
    """Images are told by no weight."""

    def encode_image(self, x):
        return x[:, 0, 0, :8]


def test_a_tower_without_weights_is_named():
    model = Constant().eval()
    with pytest.raises(ValueError, match="the image tower ends in no linear map"):
        pybackdoor.repair_drift(model, model, batches_for(model), device="cpu")


def test_a_model_that_has_not_moved_is_not_rotated():
    model = make("ViT")
    mended = pybackdoor.repair_drift(model, model, batches_for(model), device="cpu")
    assert not mended.report["done"] and "brings the embeddings nearer" in mended.report["reason"]
    assert same(mended.model, model)


FAST = {"steps": 3, "precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}


@pytest.mark.parametrize("method", [pybackdoor.par_clean, pybackdoor.finetune_clean])
def test_every_cleaning_repairs_unless_told_not_to(method):
    model, batches = DualEncoder(), random_pairs(60, 20)
    on, off = (method(model, batches, device="cpu", repair=r, **FAST) for r in (True, False))
    assert same(method(model, batches, device="cpu", **FAST).model, on.model)  # the default
    assert off.report["repair"] == {"done": False, "reason": "it was switched off"}
    report = on.report["repair"]
    assert report["done"] and report["pairs"] == 60 and report["seconds"] > 0
    assert (
        report["image_after"] + report["text_after"]
        < report["image_before"] + (report["text_before"])
    )
    changed = [n for n, t in weights(on.model).items() if not torch.equal(t, weights(off.model)[n])]
    assert changed == ["image.6.weight", "image.6.bias", "text.1.weight", "text.1.bias"]
    options = {"mean": MEAN, "std": STD, "device": "cpu"}
    later = pybackdoor.repair_drift(off.model, model, batches, **options)  # the same, by hand
    assert same(later.model, on.model)


def test_an_interrupted_run_is_not_repaired(monkeypatch):
    def full(step, record, model):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as stopped:
        pybackdoor.par_clean(DualEncoder(), random_pairs(60, 20), on_step=full, **FAST)
    assert stopped.value.result.report["repair"] == {
        "done": False, "reason": "the run ended early",
    }  # fmt: skip
    count = 0

    class Presses(DualEncoder):
        def encode_image(self, x):
            nonlocal count
            count += not self.training and not torch.is_grad_enabled()
            if count == 8:  # in the repair's pass: the teacher has been asked three times
                os.kill(os.getpid(), signal.SIGINT)
            return super().encode_image(x)

    with pytest.raises(KeyboardInterrupt) as stopped:
        pybackdoor.par_clean(Presses(), random_pairs(60, 20), **FAST)
    result = stopped.value.result
    assert len(result.history) == 3 and result.report["repair"]["reason"] == "the run ended early"
    plain = pybackdoor.par_clean(DualEncoder(), random_pairs(60, 20), repair=False, **FAST)
    assert same(result.model, plain.model)


def tokenizer(texts):
    return torch.tensor([[int(w) for w in text.split()] for text in texts])


def test_the_loader_stands_where_it_stood():
    whole = random_pairs(40, 40)[0]
    texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]
    pairs = pairs_from_arrays(whole["images"].numpy(), texts)
    loader = PairLoader(pairs, tokenizer, batch_size=10, seed=3)
    loader.load_state_dict({"seed": 3, "epoch": 2, "position": 20})
    model = DualEncoder().eval()

    def repair(loader):
        options = {"mean": MEAN, "std": STD, "device": "cpu"}
        return pybackdoor.repair_drift(drifted(model), model, loader, **options).report

    assert repair(loader)["pairs"] == 40  # of epoch 0
    assert loader.state_dict() == {"seed": 3, "epoch": 2, "position": 20}
    assert len(list(loader)) == 2

    class Announced(torch.utils.data.DataLoader):
        def set_epoch(self, epoch):
            raise AssertionError("an epoch was announced")

    rows = [{name: whole[name][i] for name in whole} for i in range(40)]
    shuffled = Announced(rows, 10, shuffle=True, generator=torch.Generator().manual_seed(1))
    state, drawn = shuffled.generator.get_state(), torch.get_rng_state()
    assert repair(shuffled)["pairs"] == 40
    assert torch.equal(shuffled.generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), drawn)

    class Counts(list):
        at = 5

        def __iter__(self):
            for batch in super().__iter__():
                self.at += 1
                yield batch

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    counts = Counts(random_pairs(40, 10))
    assert repair(counts)["pairs"] == 40 and counts.at == 5

    class Stream:
        """No length; a second pass yields the pairs again."""

        def __iter__(self):
            return iter(random_pairs(40, 10))

    assert repair(Stream())["pairs"] == 40


def test_pairs_wanted_end_the_pass():
    model = DualEncoder().eval()
    options = {"mean": MEAN, "std": STD, "device": "cpu"}
    found = pybackdoor.repair_drift(
        drifted(model), model, random_pairs(90, 20), pairs=30, **options
    )
    assert found.report["pairs"] == 40  # whole batches


def test_a_one_shot_loader_cannot_be_read_again():
    model, batches = DualEncoder(), random_pairs(60, 20)
    with pytest.warns(UserWarning, match="not repaired: the loader is a one-shot iterator"):
        result = pybackdoor.par_clean(model, (b for b in batches), **FAST)
    assert "pass a PairLoader, a DataLoader or a list" in result.report["repair"]["reason"]
    with pytest.raises(ValueError, match="one-shot iterator, whose pairs cannot be read again"):
        pybackdoor.repair_drift(model, model, iter(batches), mean=MEAN, std=STD)


def test_pairs_that_are_not_finite_are_left_out():
    model = make("DualEncoder")
    new, batches = drifted(model), batches_for(model)
    broken = [(x.clone(), t) for x, t in batches]
    broken[0][0][3] = math.nan
    broken[1][0][7, 0, 0, 0] = math.inf
    found = pybackdoor.repair_drift(new, model, broken, device="cpu").report
    assert found["done"] and found["left_out"] == 2 and found["pairs"] == PAIRS - 2
    none = [(torch.full_like(x, math.nan), t) for x, t in batches]
    with pytest.raises(ValueError, match="no batch has finite embeddings"):
        pybackdoor.repair_drift(new, model, none, device="cpu")
    late = pybackdoor.repair_drift(new, model, [none[0], batches[1]], device="cpu").report
    assert late["done"] and late["pairs"] == late["left_out"] == PAIRS // 2
    few = [(batches[0][0][:3].clone(), batches[0][1][:3])]
    few[0][0][0] = math.nan  # the one of three that is held out
    with pytest.raises(ValueError, match="too few pairs .*: 2 to fit and 0 to judge by"):
        pybackdoor.repair_drift(new, model, few, device="cpu")


def test_bad_arguments_are_named():
    model, batches = DualEncoder(), random_pairs(20, 20)

    def run(reference=model, **options):
        options = {"mean": MEAN, "std": STD, "device": "cpu"} | options
        return pybackdoor.repair_drift(model, reference, batches, **options)

    for pairs in (1, True, 2.5):
        with pytest.raises(
            ValueError, match=f"pairs must be an integer of at least 2, got {pairs}"
        ):
            run(pairs=pairs)
    with pytest.raises(TypeError, match="must have encode_image"):
        run(nn.Linear(2, 2))
    broken = DualEncoder()
    broken.text[1].bias.data[0] = math.nan
    with pytest.raises(ValueError, match="weights of reference must be finite"):
        run(broken)
    wide = DualEncoder()
    wide.image[6], wide.text[1] = nn.Linear(128, 9), nn.Linear(8, 9)
    with pytest.raises(ValueError, match="reference must embed in 8 dimensions .*got 9"):
        run(wide)


def test_ranks_get_the_same_bits(tmp_path):
    code, errors, found = run_ranks("repair_ranks.py", tmp_path, 2)
    assert code == 0, errors[-3000:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = DualEncoder(seed=1).double().eval()
        one = pybackdoor.repair_drift(
            drifted(model), model, batches_for(model, 40), device="cpu"
        )  # fmt: skip
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(found["0"][name], found["1"][name])
        torch.testing.assert_close(found["0"][name], tensor, rtol=0, atol=1e-9)
    assert found["report"]["pairs"] == 40
    assert "another rank cannot rotate" in found["refused"]

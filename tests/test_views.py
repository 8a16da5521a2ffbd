"""Augmentations that take turns, and a frozen model's image features kept from turn to turn."""

import numpy as np
import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from run_ranks import run_ranks
from training_child import clean, loader

import pybackdoor
from pybackdoor.distributed import Ranks
from pybackdoor.engine import banks, images, towers
from pybackdoor.engine.images import ImageFeatures
from pybackdoor.models import image_features

COUNT, BATCH = 83, 16  # 80 pairs an epoch: each epoch leaves out others


class Watch:
    from contextlib import nullcontext as patient


def encoded(monkeypatch):
    """Sizes of the batches that a model without gradients has encoded."""
    seen = []
    encode = DualEncoder.encode_image

    def counted(self, x):
        if torch.is_grad_enabled():
            return encode(self, x)
        seen.append(len(x))
        # Row by row: a CPU's products of few rows may be rounded otherwise than those of many.
        return torch.cat([encode(self, row) for row in x.split(1)])

    monkeypatch.setattr(DualEncoder, "encode_image", counted)
    return seen


def uncached(monkeypatch):
    monkeypatch.setattr(ImageFeatures, "__call__", lambda self, x: self._encode(x))


def same(got, want):
    assert got.history == want.history
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("fewest", [4, 64])
def test_a_run_with_kept_features_is_the_run_without_to_the_bit(monkeypatch, fewest):
    monkeypatch.setattr(images, "_FEWEST", fewest)
    options = {"steps": None, "epochs": 6, "views": 2, "repair": False}
    seen = encoded(monkeypatch)
    got = clean(None, **options)
    counts = list(seen)
    assert counts[:10] == [16] * 10  # two epochs of 80, of which 3 pairs each are new later on
    assert set(counts[10:]) <= {fewest, 16} and len(counts) <= 16
    if fewest == 4:
        assert 4 in counts
    del seen[:]
    with monkeypatch.context() as without:
        uncached(without)
        want = clean(None, **options)
    assert seen == [16] * 30
    same(got, want)
    plain = clean(None, steps=None, epochs=6)
    assert [a == b for a, b in zip(got.history, plain.history, strict=True)] == [
        step < 10 for step in range(30)
    ]


def test_a_compiled_tower_meets_no_other_size(monkeypatch):
    monkeypatch.setattr(images, "_FEWEST", 4)
    monkeypatch.setattr(towers.torch, "compile", lambda function, **_: function)
    options = {"steps": None, "epochs": 6, "views": 2, "repair": False}
    seen = encoded(monkeypatch)
    got = clean(None, compile="default", **options)
    assert set(seen) == {16} and 10 < len(seen) <= 16
    same(got, clean(None, **options))


def test_micro_batches_take_their_own_rows(monkeypatch):
    monkeypatch.setattr(images, "_FEWEST", 2)
    options = {"steps": None, "epochs": 5, "views": 1, "micro_batch": 6}
    seen = encoded(monkeypatch)
    got = clean(None, **options)
    assert 2 in seen and len(seen) < 5 * 5 * 6
    uncached(monkeypatch)
    same(got, clean(None, **options))


@pytest.mark.parametrize("stops", [[3], [7, 12], [15], [21]])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stops):
    options = {"steps": None, "epochs": 5, "views": 2}
    for stop in stops:
        clean(tmp_path, on_step=lambda k, r, m, stop=stop: k == stop, **options)
    same(clean(tmp_path, **options), clean(None, **options))


def test_other_views_are_another_run(tmp_path):
    clean(tmp_path, 4, views=2)
    with pytest.raises(ValueError, match="views: was 2, is 3"):
        clean(tmp_path, 4, views=3)


def test_a_pair_looks_in_epoch_e_as_in_e_mod_views(monkeypatch):
    shown = {}
    forward = DualEncoder.encode_image

    def recorded(self, x):
        if torch.is_grad_enabled():
            shown[len(shown)] = x.detach().clone()
        return forward(self, x)

    monkeypatch.setattr(DualEncoder, "encode_image", recorded)
    pairs, ids = loader(), []
    for epoch in range(5):
        pairs.set_epoch(epoch)
        ids += [batch["ids"] for batch in pairs]
    pybackdoor.finetune_clean(
        DualEncoder(), pairs, epochs=5, views=2, mean=MEAN, std=STD, progress=False,
        precision="fp32", repair=False,
    )  # fmt: skip
    x = {
        (step // 5, int(i)): row
        for step, rows in shown.items()
        for i, row in zip(ids[step], rows, strict=True)
    }
    compared = 0
    for (epoch, i), row in x.items():
        if epoch >= 2 and (epoch - 2, i) in x:
            assert torch.equal(row, x[epoch - 2, i])
            compared += 1
    assert compared > 200
    both = [i for epoch, i in x if epoch == 0 and (1, i) in x]
    unchanged = sum(torch.equal(x[0, i], x[1, i]) for i in both)  # where noise and square both
    assert len(both) > 70 and unchanged < 0.4 * len(both)  # stay away twice, about 1 in 16


@pytest.mark.parametrize("options", [{"epochs": 2, "views": 2}, {"epochs": 3}])
def test_nothing_is_kept_where_nothing_comes_again(monkeypatch, options):
    monkeypatch.setattr(ImageFeatures, "__init__", lambda *a: pytest.fail("made"))
    clean(None, steps=None, **options)


@pytest.mark.parametrize(
    ("views", "kind", "message"),
    [
        (0, ValueError, "views must be at least 1, got 0"),
        (True, TypeError, "views must be an integer, got True"),
        (1.5, TypeError, "views must be an integer, got 1.5"),
    ],
)
def test_bad_views(views, kind, message):
    with pytest.raises(kind, match=message):
        clean(None, 2, views=views)


def test_a_loader_must_name_its_images():
    with pytest.raises(ValueError, match="views needs a loader that names its images.* got list"):
        clean(None, 2, pairs=random_pairs(32, 16), views=1)


def test_ids_are_of_one_image_each():
    pairs = loader()
    pairs.pairs = pairs.pairs.subset([0, 1, 2, 2] + list(range(3, 80)))
    with pytest.raises(ValueError, match="an id of its own for each image, got 2 twice"):
        clean(None, 11, pairs=pairs, views=1)


def features(ids, views=2, **options):
    model = DualEncoder().eval()
    kept = ImageFeatures(
        np.array(ids), views, lambda x: image_features(model, x), Ranks(), Watch(), **options
    )
    return model, kept


def test_rows_are_kept_by_view_and_id():
    model, kept = features([70, 5, -3, 11, 1 << 40])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 16, 16, generator=g)  # of two views
    with torch.no_grad():
        want = torch.stack([image_features(model, view) for view in x])
    kept.begin(torch.tensor([70, 5, -3, 11, 1 << 40]), 0)
    torch.testing.assert_close(kept(x[0]), want[0], rtol=0, atol=0)
    kept.begin(torch.tensor([11, 70, -3]), 1)
    torch.testing.assert_close(kept(x[1][[3, 0, 2]]), want[1][[3, 0, 2]])
    blank = torch.zeros(5, 3, 16, 16)  # is not looked at where features are kept
    kept.begin(torch.tensor([1 << 40, -3]), 4)
    torch.testing.assert_close(kept(blank[:2]), want[0][[4, 2]])
    kept.begin(torch.tensor([70, 11]), 7)
    torch.testing.assert_close(kept(blank[:1]), want[1][[0]])
    torch.testing.assert_close(kept(blank[:1]), want[1][[3]])


def test_an_unknown_id_is_named():
    _, kept = features([1, 2, 3])
    for ids in ([2, 9], [4], [0]):
        with pytest.raises(ValueError, match=f"id {ids[-1]} of a batch is not in its image_ids"):
            kept.begin(torch.tensor(ids), 0)


def test_more_than_the_bound_is_refused(monkeypatch):
    monkeypatch.setattr(banks, "host_memory", lambda: 4 * 2 * 83 * 8 * 4 - 1)
    match = "2 views of 83 images take 5,312 bytes of features, at most 5,311 are given to them"
    with pytest.raises(ValueError, match=match):
        clean(None, steps=None, epochs=3, views=2)


def test_ranks_put_together_what_each_has_encoded(tmp_path):
    code, errors, found = run_ranks("ranks_views.py", tmp_path, 2)
    assert code == 0, errors
    # Two views of 80 pairs, half of them on this rank; later only what an epoch had left out.
    assert found["encoded"] <= 2 * 40 + 2 * 8 * 5 < found["encoded alone"] == 6 * 40
    assert found["same"]
    assert found["captions"] and found["no room"]  # of one rank is no room for any

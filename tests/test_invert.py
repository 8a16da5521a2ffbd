"""Inverted triggers, and training against them."""

import sys
import warnings

import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from rank_pool import on_ranks
from run_ranks import run_ranks
from torch.nn.functional import normalize

import pybackdoor
from pybackdoor.distributed import Ranks
from pybackdoor.engine import Contrastive, Preparation
from pybackdoor.methods.invert import InvertAndRecover
from pybackdoor.models import image_features
from pybackdoor.triggers.invert import FAMILIES, Inverted, invert, mean_cosine

FAST = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2, "steps": 5}
QUICK = {"inversion_steps": 10, "inversion_batch": 8, "every": 2, "pool": 2}


def model(seed=1):
    return DualEncoder(seed=seed).eval().requires_grad_(False)


def images(n=24):
    return random_pairs(n, n)[0]["images"]


@pytest.mark.parametrize("n", [2, 3, 17])
def test_mean_cosine_is_that_of_all_pairs(n):
    rows = normalize(torch.randn(n, 5, dtype=torch.float64), dim=-1)
    every = (rows @ rows.T)[~torch.eye(n, dtype=torch.bool)]
    torch.testing.assert_close(mean_cosine(rows), every.mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_an_inverted_trigger_pulls_images_together(family, layout):
    net, pixels = model(), images()
    given = pixels if layout == "nhwc" else pixels.permute(0, 3, 1, 2)
    encode = lambda x: image_features(net, x)  # noqa: E731
    common = {"mean": MEAN, "std": STD, "family": family, "opacity": 0.3, "batch_size": 12}
    found, told = invert(encode, given, steps=80, area_weight=0.1, **common)
    again, _ = invert(encode, given, steps=80, area_weight=0.1, **common)
    assert torch.equal(found.pattern, again.pattern) and torch.equal(found.mask, again.mask)

    def cosine(of):
        """Of images stamped by hand, in fp64."""
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
        x = pixels.permute(0, 3, 1, 2).double() / 255
        stamped = (1 - of.mask.double()) * x + of.mask.double() * of.pattern.double()
        return float(mean_cosine(image_features(model().double(), (stamped - mean) / std)))

    first, _ = invert(encode, given, steps=1, **common)
    assert cosine(found) > cosine(first) + 0.05
    assert abs(cosine(found) - float(told["cosine"])) < 0.1  # of a draw of images, a step earlier
    assert 0 <= float(found.mask.min()) and float(found.mask.max()) <= 1
    if family == "dense":
        assert torch.equal(found.mask, torch.full_like(found.mask, 0.3))
    else:
        dear, _ = invert(encode, given, steps=80, area_weight=20.0, **common)
        assert float(dear.mask.mean()) < float(found.mask.mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "thick"}, "family must be one of sparse, dense, got 'thick'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 1}, "must be at least 2, got 24 and 1"),
        ({"opacity": 0.0}, r"opacity must be in \(0, 1\], got 0.0"),
    ],
)
def test_refusals_of_invert(options, message):
    with pytest.raises(ValueError, match=message):
        invert(lambda x: x, images(), mean=MEAN, std=STD, **options)


@pytest.mark.parametrize("perturb, share", [(False, 0.2), (True, 0.8)])
def test_part_of_each_batch_carries_a_trigger(perturb, share, monkeypatch):
    from pybackdoor.methods import invert as module

    seen = []
    make = module.Given.images

    def noted(self, *args, **options):
        seen.append(options["trigger"])
        return make(self, *args, **options)

    monkeypatch.setattr(module.Given, "images", noted)
    result = pybackdoor.invert_clean(
        model(), random_pairs(40, 20), perturb=perturb, share=share, **QUICK, **FAST
    )
    assert [len(t["triggers"].mask) for t in seen] == [2, 2, 4, 4, 4]  # two families, at most two
    stamped = torch.cat([t["trigger_id"] for t in seen])
    assert abs(float((stamped >= 0).float().mean()) - share) < 0.15  # of 100
    assert set(stamped.tolist()) >= {-1, 0, 1}
    assert ("s_image" in result.history[-1]) == perturb
    assert -1 <= result.history[-1]["cosine_dense"] <= 1
    assert result.report["settings"]["every"] == 2


def test_an_interrupted_run_goes_on_with_its_pool(tmp_path):
    loader = random_pairs(40, 20)
    whole = pybackdoor.invert_clean(model(), loader, **QUICK, **FAST)
    stop = {"on_step": lambda k, r, m: k == 2, "folder": tmp_path}
    pybackdoor.invert_clean(model(), loader, **QUICK, **FAST, **stop)
    rest = pybackdoor.invert_clean(model(), loader, **QUICK, **FAST, folder=tmp_path, resume=True)
    assert rest.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"pool": 1.5}, "pool must be an integer of at least 1, got 1.5"),
        ({"inversion_steps": 0}, "inversion_steps must be an integer of at least 1, got 0"),
        ({"inversion_batch": True}, "inversion_batch must be an integer of at least 2, got True"),
        ({"inversion_batch": 1}, "inversion_batch must be an integer of at least 2, got 1"),
        ({"opacity": 0.0}, r"opacity must be in \(0, 1\], got 0.0"),
        ({"opacity": 2}, r"opacity must be in \(0, 1\], got 2"),
        ({"opacity": float("nan")}, r"opacity must be in \(0, 1\], got nan"),
        ({"area_weight": float("nan")}, "area_weight must be at least 0 and finite, got nan"),
        ({"area_weight": float("inf")}, "area_weight must be at least 0 and finite, got inf"),
        ({"area_weight": -1.0}, "area_weight must be at least 0 and finite, got -1.0"),
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"families": ()}, "families must be of sparse, dense"),
        ({"families": ("thick",)}, "families must be of sparse, dense"),
        ({"tau": 5.0}, "tau must be in"),
        ({"tau": 1.0}, "give both or neither, got tau=1.0 without perturb"),
    ],
)
def test_refusals_of_invert_clean(options, message):
    """Before the first step, whose data are not looked at."""
    with pytest.raises(ValueError, match=message):
        pybackdoor.invert_clean(model(), None, **options)


def test_tau_goes_with_perturb():
    options = QUICK | FAST | {"steps": 1}
    for given in ({"tau": 2.15}, {"tau": 1.0, "perturb": True}):
        got = pybackdoor.invert_clean(model(), random_pairs(20, 10), **given, **options)
        assert got.report["settings"]["tau"] == given["tau"]


def test_float_images_cannot_be_stamped():
    floats = [(b["images"].permute(0, 3, 1, 2) / 255.0, b["tokens"]) for b in random_pairs(20, 10)]
    with pytest.raises(TypeError, match="invert_clean needs uint8 images"):
        pybackdoor.invert_clean(model(), floats, **QUICK, **FAST)


def with_short_batches(folder):
    """Of batches that the ranks share: (history, weights, what was warned of), twice.

    The second time the run was stopped when it had no trigger yet.
    """
    ranks = Ranks.start(torch.device("cpu"))
    mine = [
        {k: rows.tensor_split(ranks.size)[ranks.rank] for k, rows in random_pairs(n, n)[0].items()}
        for n in (3, 9, 9, 9, 2, 9)
    ]
    kept = {"folder": folder, "resume": True}
    found = []
    for more in ({}, {**kept, "on_step": lambda k, r, m: k == 1}, kept):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            options = QUICK | FAST | {"steps": 6, "repair": False} | more
            result = pybackdoor.invert_clean(model(), mine, **options)
        said = [str(w.message) for w in told if "inverted" in str(w.message)]
        found.append((result.history, result.model.state_dict(), said))
    return found[0], found[2]


def test_all_ranks_leave_an_inversion_out_where_one_has_a_single_image(tmp_path):
    runs = on_ranks(2, with_short_batches, str(tmp_path))
    history, weights, _ = runs[0][0]
    assert [r["step"] for r in history] == list(range(6))
    cosines = [r.get("cosine_dense") for r in history]
    assert cosines[:2] == [None, None] and len(set(cosines[2:])) == 1  # of step 2 alone
    for other, same, _ in (*runs[0], *runs[1]):
        assert other == history
        for name, tensor in weights.items():
            assert torch.equal(same[name], tensor), name
    told = [[w.split(": ")[0] for w in said] for rank in runs for _, _, said in rank]
    assert told == [["step 0", "step 4"], ["step 4"], [], []]
    wanted = "no triggers are inverted, which takes at least 2 images on every process, got 1 on "
    assert wanted in runs[0][0][2][0]


def test_weights_that_are_lost_take_later_triggers_with_them():
    """A state from before the first inversion empties the pool."""
    one = InvertAndRecover(Contrastive(), 2, 0.5, 2, FAMILIES, {})
    one.prepare(Preparation(model(), None, torch.device("cpu")))
    empty = one.state()
    one._found = {name: Inverted(torch.zeros(1), torch.zeros(1)) for name in FAMILIES}
    full = one.state()
    one.load(empty)
    assert empty and one._found == {}
    one.load(full)
    assert set(one._found) == set(FAMILIES)


def test_ranks_put_their_triggers_together(tmp_path):
    code, errors, found = run_ranks("invert_ranks.py", tmp_path, 2)
    assert code == 0, errors
    for family in FAMILIES:  # two inversions of two ranks
        assert found[f"{family}/mask"].shape == (4, 1, 16, 16)
        patterns = found[f"{family}/pattern"].flatten(1)
        assert len(torch.unique(patterns, dim=0)) == 4


@pytest.mark.parametrize("at", [0, 2])
def test_an_inversion_that_is_done_again_takes_its_own_place(at, monkeypatch):
    """The batch of its step is left out, and another takes the step."""
    module, taken, broken = sys.modules["pybackdoor.methods.invert"], [], []

    def quick(encode, pixels, **how):
        return invert(encode, pixels, **how | {"steps": 1})

    def features(self, x, own=DualEncoder.encode_image):
        rows = own(self, x)
        if self.training and len(taken) == at and not broken:
            broken.append(1)
            return rows * float("nan")
        return rows

    monkeypatch.setattr(module, "invert", quick)
    monkeypatch.setattr(DualEncoder, "encode_image", features)
    kept = []
    own = module.InvertAndRecover.inputs

    def inputs(self, given):
        found = own(self, given)
        kept.append((given.step, {name: len(one.mask) for name, one in self._found.items()}))
        return found

    monkeypatch.setattr(module.InvertAndRecover, "inputs", inputs)
    pybackdoor.invert_clean(
        DualEncoder(), random_pairs(96, 16), every=2, pool=4, steps=4, mean=MEAN, std=STD,
        precision="fp32", device="cpu", progress=False, repair=False,
        track=lambda step, record: taken.append(step),
    )  # fmt: skip
    assert broken and [step for step, _ in kept].count(at) == 2
    for step, pool in kept:
        assert set(pool.values()) == {step // 2 + 1}

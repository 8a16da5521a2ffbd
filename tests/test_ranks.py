"""Runs on several processes, sharded or not: the numbers of one, faults, signals, resumption."""

import pytest
import torch
from clip_models import tiny
from dual_encoder import DualEncoder, random_pairs
from rank_pool import on_ranks
from ranked_runs import FIXED, BlockEncoder, model, run, runs
from torch import nn

import pybackdoor
from pybackdoor.distributed import Ranks
from pybackdoor.engine import Encoder, Objective, Settings, train
from pybackdoor.engine.sharding import Parts, blocks, joined, shard
from pybackdoor.models import text_features

SHARD = {"shard": True}
CPU = torch.device("cpu")


def close(got, want):
    """Equal but for the order of sums in fp64, after steps of AdamW."""
    assert len(got["history"]) == len(want["history"])
    for a, b in zip(got["history"], want["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
    assert got["pairs"] == want["pairs"]
    for name, tensor in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def same(got, want):
    assert got["history"] == want["history"] and got["pairs"] == want["pairs"]
    for name, tensor in want["weights"].items():
        assert torch.equal(got["weights"][name], tensor), name


EQUAL = [
    {},
    {"method": "finetune_clean", "micro_batch": 1},
    {"pairs": "short", "cache_text": False},  # captions cut to other lengths on each rank
    {"pairs": "short", "micro_batch": 3},
]  # fmt: skip


@pytest.fixture(scope="module")
def one():
    return on_ranks(1, runs, EQUAL)[0]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_equal_one(one, count):
    """Batches of 7, 7 and 5 pairs: uneven shares, so that ranks have unequal micro-batches."""
    found = on_ranks(count, runs, [*EQUAL, *({**o, **SHARD} for o in EQUAL)])
    for rank in found:
        assert [got["ended"] for got in rank] == [None] * 8
        for got, want in zip(rank, 2 * one, strict=True):
            close(got, want)
            assert got["kinds"] == ["Parameter"] and got["untrained"] == []
    lengths = [rank[6]["lengths"] for rank in found]  # all try one of the first rank's, and 24
    assert lengths[0] == [32 // count, 24] and lengths[0][0] in lengths[-1]
    moved = [(one[0]["weights"][n] - t).abs().max() for n, t in model(1).state_dict().items()]
    assert max(moved) > 1e-2


BASELINES = [
    {"method": "cleanclip_clean", "micro_batch": 3},
    {"method": "cleanclip_clean"},
    {"method": "roclip_clean", "pool_size": 11},  # steps 3 and 4 take captions from the pool
    {"method": "roclip_clean", "pool_size": 11, "micro_batch": 2},
]


def test_sharded_baselines_equal_one_process():
    (want,) = on_ranks(1, runs, BASELINES)
    assert want[2]["history"][4]["neighbour_cosine"] < 0.9999
    for rank in on_ranks(2, runs, [{**options, **SHARD} for options in BASELINES]):
        assert [got["ended"] for got in rank] == [None] * 4
        for got, wanted in zip(rank, want, strict=True):
            close(got, wanted)


def test_ft_sam_which_looks_at_whole_gradients_is_not_sharded():
    for (got,) in on_ranks(2, runs, [{"method": "ft_sam_clean", **SHARD}]):
        assert got["ended"].startswith("ValueError: shard cannot be used with SharpnessAware: ")


def parts_of_a_run():
    """(elements of all weights, of this rank's weights, gradients and moments, plain ones)."""
    kept = {}

    def look(k, record, net):
        parts = Parts(net)
        kept["all"] = sum(p.numel() for p in net.parameters())
        kept["mine"] = sum(p.numel() for _, p in parts.named)
        kept["gradients"] = sum(
            p.grad.to_local().numel() for p in net.parameters() if hasattr(p.grad, "to_local")
        )
        kept["whole"] = [n for n, p in net.named_parameters() if not hasattr(p, "to_local")]
        kept["units"] = sum(type(m).__name__.startswith("FSDP") for m in net.modules())
        with torch.no_grad():  # a hook may use the model, on all ranks at once
            tokens = random_pairs(4, 4)[0]["tokens"]
            kept["features"] = text_features(net, tokens).sum(0)

    from ranked_runs import loader

    result = pybackdoor.par_clean(model(1), loader(), steps=2, shard=True, on_step=look, **FIXED)
    tokens = random_pairs(4, 4)[0]["tokens"]
    with torch.no_grad():
        kept["want"] = text_features(result.model, tokens).sum(0)
    return kept


def test_a_rank_holds_its_part():
    for kept in on_ranks(2, parts_of_a_run):
        assert kept["all"] / 2.5 < kept["mine"] < kept["all"] / 1.6
        assert kept["gradients"] <= kept["mine"]
        assert kept["whole"] == ["gain", "logit_scale"]
        assert kept["units"] == 5  # two blocks of each tower, and the rest
        torch.testing.assert_close(kept["features"], kept["want"], rtol=1e-12, atol=1e-12)


def test_blocks_are_repeated_parts_that_share_nothing():
    net = BlockEncoder()
    found = blocks(net)
    want = [net.image_blocks[0], net.image_blocks[1], net.text_blocks[0], net.text_blocks[1]]
    assert set(found) == set(want) and len(found) == 4  # the last blocks share a layer
    assert blocks(DualEncoder()) == []  # no block is repeated: only the whole
    deep = nn.ModuleList(nn.Sequential(BlockEncoder(), BlockEncoder()) for _ in range(2))
    order = blocks(deep)
    assert len(order) == 2 + 4 + 16  # inner before outer
    for outer in deep:
        assert all(order.index(m) < order.index(outer) for m in blocks(outer))
    clip = tiny().model
    assert len(blocks(clip)) == 4  # two layers in each tower


def clip_features(sharded):
    """Unit features and gradients of open_clip's own model, with captions of half its context."""
    loaded = tiny()
    clip, g = loaded.model.double(), torch.Generator().manual_seed(0)
    plain = tiny().model.double()
    ranks, encode = Ranks.start(CPU), Encoder(None, CPU)
    images = torch.randn(4, 3, 32, 32, generator=g, dtype=torch.float64)
    tokens = loaded.tokenizer(["a cat", "two dogs", "a red car", "rain"])[:, :8]
    if sharded:
        shard(clip, CPU)
    parts = Parts(clip)
    (encode.image(clip, images) * encode.text(clip, tokens)).square().sum().backward()
    parts.sum_gradients(ranks)
    grads = {n: parts.join(p.grad, p) for n, p in parts.named if p.grad is not None}
    whole = joined(clip, plain).state_dict() if sharded else clip.state_dict()
    return grads, whole


def test_open_clips_own_model():
    ((want, weights),) = on_ranks(1, clip_features, False)
    for got, kept in on_ranks(2, clip_features, True):
        assert got.keys() == want.keys() and len(got) > 30
        for name, grad in want.items():  # two ranks with the same pairs
            torch.testing.assert_close(got[name], 2 * grad, rtol=1e-9, atol=1e-13, msg=name)
        for name, tensor in weights.items():
            assert torch.equal(kept[name], tensor), name


def test_faults_are_found_at_their_step_and_taken_back(tmp_path):
    """A NaN pixel of the last rank, and a weight of the last rank's that breaks after a step."""
    options = {"pairs": "shares", "steps": 4, "max_faults": 3}
    kept = {"folder": str(tmp_path / "kept"), "save_minutes": 0, "fate": {"break": 2}}
    several = [
        {**options, **SHARD},
        {**options, **SHARD, "bad": 1},
        {**options, **SHARD, **kept},
        {**options, **SHARD, "bad": 1, "max_faults": 0},
        {**options, **SHARD, "fate": {"break": 2}},
    ]
    first, last = on_ranks(2, runs, several)
    for rank, (_, bad, broken, none_left, unkept) in enumerate((first, last)):
        assert bad["skipped"] == 1 and [r["step"] for r in bad["history"]] == [0, 1, 2, 3]
        (fault,) = bad["faults"]
        assert fault.startswith("step 1: not finite: ")
        assert ("image features of 1 of 4 pairs (ids 1015)" in fault) == (rank == 1)
        assert none_left["ended"].startswith("NonFiniteError: step 1")
        assert len(none_left["history"]) == 1
        (fault,) = broken["faults"]
        assert fault.startswith("after step 2: not finite: ")
        assert ("image_blocks.1.up.weight" in fault) == (rank == 0)  # who looks at whole weights
        assert "step 3: not finite" in unkept["ended"] and "no earlier state" in unkept["ended"]
    same(first[2], first[0])  # as if it had not been
    same(last[2], first[2])
    (plain,) = on_ranks(1, runs, [{**options, "bad": 1}])
    close(first[1], plain[0])


STOPS = (1, 4)  # steps: within the first epoch of three batches, and within the second
WAYS = {"plain": {}, "sharded": SHARD}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_run(way, tmp_path):
    """By as many ranks bit for bit, by fewer or more in the same place, and the other way round."""
    options, other = WAYS[way], WAYS["plain" if way == "sharded" else "sharded"]
    kept = {"steps": 7, "resume": True}
    folders = {n: {"folder": str(tmp_path / n)} for n in ("same", "one", "four", "other", "term")}
    parts = [{**kept, **options, **where, "stop": 4} for name, where in folders.items()]
    parts[0]["stop"] = 1
    parts[4] |= {"stop": None, "fate": {"terminate": 3}}
    again = {**kept, **options, **folders["same"]}
    found = on_ranks(2, runs, [{"steps": 7, **options}, *parts, {**again, "stop": 4}, again])
    for whole, *_ in found:
        same(whole, found[0][0])
    for rank in found:
        assert [len(got["history"]) for got in rank] == [7, 2, 5, 5, 5, 4, 5, 7]
        assert rank[5]["ended"].startswith("Terminated")
        assert all(t.isfinite().all() for t in rank[5]["weights"].values())
        same(rank[7], rank[0])
    whole = found[0][0]
    for got in on_ranks(2, runs, [{**kept, **options, **folders["term"]},
                                  {**kept, **other, **folders["other"]}]):  # fmt: skip
        same(got[0], whole)
        close(got[1], whole)
    close(on_ranks(1, runs, [{**kept, **folders["one"]}])[0][0], whole)
    for rank in on_ranks(4, runs, [{**kept, **options, **folders["four"]}]):
        close(rank[0], whole)


def lone_errors(options):
    """A run, and then the end of the process, which the other rank notices."""
    found = run(**options)
    torch.distributed.destroy_process_group()
    return found


def test_an_error_on_one_rank_leaves_no_scattered_result():
    first, last = on_ranks(2, lone_errors, {**SHARD, "fate": {"raise": 2}})
    assert last["ended"] == "OSError: a hook of one rank fails" and last["weights"] is None
    assert "another rank was lost" in first["ended"] and first["weights"] is None


class OwnWay(Objective):
    pass


def test_what_cannot_be_sharded_is_said():
    for name, value in (("compile", "default"), ("lock", "text"), ("views", 2)):
        with pytest.raises(ValueError, match=f"shard and {name} exclude each other"):
            Settings(shard=True, **{name: value})
    with pytest.warns(UserWarning, match="shard has no effect on a single process"):
        got = run(shard=True, steps=2)
    same(got, run(steps=2))
    with pytest.raises(ValueError, match="shard cannot be used with OwnWay: its ranks need not"):
        train(
            model(1), random_pairs(8, 4), OwnWay(), lambda k, n: 0.1, Settings(steps=1, shard=True),
            rules=pybackdoor.batches.InputRules.of(model(1)), device=CPU,
        )  # fmt: skip
    mixed = model(1)
    mixed.head.float()
    with pytest.raises(ValueError, match="one dtype, got torch.float32, torch.float64: convert"):
        shard(mixed, CPU)

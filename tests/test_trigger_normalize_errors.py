"""What bad arguments of trigger_normalize get: the op, the argument, wanted and got."""

import re

import pytest
import torch
from trigger_normalize_cases import DEVICES, MEAN, STD, random_images

from pybackdoor._native import _C
from pybackdoor.ops import Augment, TriggerTable, trigger_normalize

IMAGES = random_images(2, 8, 6)
PATCH = TriggerTable("patch", pattern=torch.rand(2, 3, 4, 4))
WARP = TriggerTable("warp", grid=torch.zeros(1, 8, 6, 2))
NAN = float("nan")
BAD_CALLS = [
    (
        {"images": IMAGES.float()},
        TypeError,
        "images must be a uint8 tensor, got float32 [2, 8, 6, 3]",
    ),
    ({"images": IMAGES.numpy()}, TypeError, "images must be a uint8 tensor, got array("),
    ({"images": IMAGES[0]}, ValueError, "images must be [B, H, W, 3], got [8, 6, 3]"),
    ({"images": IMAGES[..., :1]}, ValueError, "images must be [B, H, W, 3], got [2, 8, 6, 1]"),
    ({"input_layout": "nchw"}, ValueError, "images must be [B, 3, H, W], got [2, 8, 6, 3]"),
    ({"images": IMAGES[:, :0]}, ValueError, "images must not be empty, got [2, 0, 6, 3]"),
    ({"input_layout": "hwc"}, ValueError, "input_layout must be one of nhwc, nchw, got 'hwc'"),
    ({"layout": "nhwc"}, ValueError, "layout must be one of nchw, channels_last, patchified, got"),
    ({"dtype": torch.float64}, ValueError, "dtype must be one of float32, float16, bfloat16, got"),
    ({"mean": (0.5, 0.5)}, ValueError, "mean must be 3 finite floats, got (0.5, 0.5)"),
    ({"std": (0.5, NAN, 0.5)}, ValueError, "std must be 3 finite floats, got (0.5, nan, 0.5)"),
    ({"std": (0.5, 0, 0.5)}, ValueError, "std must be > 0, got (0.5, 0, 0.5)"),
    ({"layout": "patchified"}, ValueError, "patch_size must divide 8 and 6 in layout patchified"),
    ({"layout": "patchified", "patch_size": 4}, ValueError, "patch_size must divide 8 and 6"),
    ({"patch_size": 2}, ValueError, "patch_size goes with layout patchified only, got 2"),
    ({"triggers": "badnet"}, TypeError, "triggers must be a TriggerTable, got str"),
    (
        {"triggers": TriggerTable("patch", pattern=torch.rand(1, 3, 9, 2))},
        ValueError,
        "triggers.pattern must fit into 8 x 6 images, got 9 x 2",
    ),
    (
        {"triggers": TriggerTable("warp", grid=torch.zeros(1, 6, 8, 2))},
        ValueError,
        "triggers.grid must be [T, 8, 6, 2] like images, got [1, 6, 8, 2]",
    ),
    (
        {"triggers": TriggerTable("patch", pattern=torch.empty(1, 3, 2, 2, device="meta"))},
        ValueError,
        "triggers must be on cpu like images (use triggers.to(device)), got meta",
    ),
    ({"strength": 0.5}, ValueError, "strength needs triggers, got triggers=None"),
    ({"trigger_id": torch.zeros(2).int()}, ValueError, "trigger_id needs triggers"),
    ({"position": torch.zeros(2, 2).int()}, ValueError, "position needs triggers"),
    (
        {"triggers": PATCH, "trigger_id": torch.zeros(2)},
        TypeError,
        "trigger_id must be a int32 or int64 tensor [2], got float32 [2] on cpu",
    ),
    (
        {"triggers": PATCH, "trigger_id": torch.zeros(3).int()},
        ValueError,
        "trigger_id must be [2] for 2 images, got [3]",
    ),
    (
        {"triggers": PATCH, "trigger_id": torch.tensor([2, -1])},
        ValueError,
        "trigger_id must be in [-1, 2) for 2 triggers, got values from -1 to 2",
    ),
    (
        {"triggers": WARP, "trigger_id": torch.tensor([-2, 0])},
        ValueError,
        "trigger_id must be in [-1, 1) for 1 triggers, got values from -2 to 0",
    ),
    (
        {"triggers": PATCH, "position": torch.tensor([[0, 0], [5, 1]])},
        ValueError,
        "position must be in [0, 4] x [0, 2] for a 4 x 4 window in 8 x 6 images",
    ),
    (
        {"triggers": PATCH, "position": torch.tensor([[-1, 0], [0, 1]])},
        ValueError,
        "got (y, x) from [-1, 0] to [0, 1]",
    ),
    (
        {"triggers": PATCH, "position": (0, 0)},
        TypeError,
        "position must be a int16 or int32 or int64",
    ),
    ({"triggers": PATCH, "strength": 1.5}, ValueError, "strength must be in [0, 1], got 1.5"),
    ({"triggers": PATCH, "strength": NAN}, ValueError, "strength must be in [0, 1], got nan"),
    (
        {"triggers": PATCH, "strength": torch.tensor([0.5, -0.1])},
        ValueError,
        "strength must be in [0, 1], got values from -0.1",
    ),
    (
        {"triggers": PATCH, "strength": torch.tensor([0.5, NAN])},
        ValueError,
        "strength must be in [0, 1], got values from nan",
    ),
    (
        {"triggers": PATCH, "strength": torch.ones(2, device="meta")},
        ValueError,
        "strength must be on cpu like images (or the CPU), got meta",
    ),
    ({"augment": Augment()}, ValueError, "sample_id is required with augment"),
    ({"augment": True}, TypeError, "augment must be an Augment, got bool"),
    ({"sample_id": torch.zeros(2).int()}, TypeError, "sample_id must be a int64 tensor [2]"),
    ({"view": 1 << 24}, ValueError, "view must be in [0, 2^24), got 16777216"),
    ({"seed": 1 << 64}, ValueError, "seed must fit into 64 bits, got 18446744073709551616"),
]


@pytest.mark.parametrize("bad,error,message", BAD_CALLS, ids=[m[:40] for _, _, m in BAD_CALLS])
def test_bad_call(bad, error, message):
    arguments = {"images": IMAGES, "mean": MEAN, "std": STD} | bad
    with pytest.raises(error, match=re.escape(message)) as caught:
        trigger_normalize(arguments.pop("images"), **arguments)
    assert str(caught.value).startswith("trigger_normalize: ")


P = torch.rand(1, 3, 4, 4)
BAD_TABLES = [
    ({"mode": "none"}, ValueError, "mode must be one of patch, blend, warp, got 'none'"),
    ({"mode": "patch"}, TypeError, "pattern must be a tensor [T, 3, h, w] in mode patch, got None"),
    ({"mode": "warp"}, TypeError, "grid must be a tensor [T, H, W, 2] in mode warp, got None"),
    (
        {"mode": "patch", "pattern": P.double()},
        TypeError,
        "pattern must be float32 [T, 3, h, w], got",
    ),
    (
        {"mode": "patch", "pattern": P[0]},
        ValueError,
        "pattern must be [T, 3, h, w], not empty, got",
    ),
    ({"mode": "patch", "pattern": P[:0]}, ValueError, "not empty, got [0, 3, 4, 4]"),
    ({"mode": "patch", "pattern": P * NAN}, ValueError, "pattern must be finite"),
    ({"mode": "patch", "pattern": P, "mask": P}, ValueError, "mask has no meaning in mode patch"),
    ({"mode": "patch", "pattern": P, "additive": True}, ValueError, "additive has no meaning"),
    (
        {"mode": "blend", "pattern": P, "mask": P[:, :2]},
        ValueError,
        "mask must be [1, 1 or 3, 4, 4]",
    ),
    ({"mode": "blend", "pattern": P, "mask": P + 1}, ValueError, "mask must lie in [0, 1], got [1"),
    ({"mode": "warp", "grid": torch.zeros(1, 4, 4, 3)}, ValueError, "grid must be [T, H, W, 2]"),
]


@pytest.mark.parametrize("bad,error,message", BAD_TABLES, ids=[m[:40] for _, _, m in BAD_TABLES])
def test_bad_table(bad, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        TriggerTable(**bad)
    assert str(caught.value).startswith("TriggerTable: ")


@pytest.mark.parametrize("device", DEVICES)
def test_tables_are_checked_once_on_any_device(device, monkeypatch):
    with pytest.raises(ValueError, match="pattern must be finite"):
        TriggerTable("patch", pattern=torch.full((1, 3, 2, 2), NAN, device=device))
    table = TriggerTable("blend", pattern=P, mask=P, additive=True, clip=True)

    def fail(*_):
        raise AssertionError("checked again")

    monkeypatch.setattr(TriggerTable, "__post_init__", fail)
    moved = table.to(device)
    assert type(moved) is TriggerTable and moved.source.device.type == device
    for name, value in vars(table).items():
        got = getattr(moved, name)
        assert torch.equal(got.cpu(), value) if isinstance(value, torch.Tensor) else got == value


BAD_PLANS = [
    ({"noise_p": 1.1}, "noise_p must be in [0, 1], got 1.1"),
    ({"erase_p": -0.1}, "erase_p must be in [0, 1], got -0.1"),
    ({"noise_std": -1}, "noise_std must be finite and >= 0, got -1"),
    ({"noise_std": float("inf")}, "noise_std must be finite and >= 0, got inf"),
    ({"noise": "full"}, "noise must be one of half, symmetric, got 'full'"),
    ({"erase_area": (0.5, 0.1)}, "erase_area must satisfy 0 < low <= high <= 1, got (0.5, 0.1)"),
    ({"erase_area": (0.0, 0.1)}, "erase_area must satisfy 0 < low <= high <= 1"),
]


@pytest.mark.parametrize("bad,message", BAD_PLANS, ids=[m[:30] for _, m in BAD_PLANS])
def test_bad_augment(bad, message):
    with pytest.raises(ValueError, match=re.escape("Augment: " + message)):
        Augment(**bad)


def raw_call(**changes):
    """The native function without Python's checks; no memory is touched before it checks."""
    arguments = {
        **dict.fromkeys(("images", "out", "pattern", "grid", "sample_id"), 64),
        **dict.fromkeys(("poisoned", "mask", "trigger_id", "position", "strength"), 0),
        **{"image_size": (1, 8, 8), "table_size": (1, 0, 4, 4), "mode": 0, "flags": [False] * 3},
        **{"strength_value": 1.0, "augment": False, "augment_values": [0.0] * 5},
        **{"half_noise": True, "seed": 0, "view": 0, "input_layout": 0, "layout": 0},
        **{"patch_size": 0, "dtype": 0, "mean": MEAN, "std": STD, "device": -1, "stream": 0},
        **{"isa": "auto", "threads": 1},
    }
    return _C.trigger_normalize(**(arguments | changes))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"image_size": (-1, 8, 8)}, "batch must be >= 0"),
        ({"image_size": (1, 0, 8)}, "height and width must be > 0"),
        ({"image_size": (1, 1 << 15, 1 << 15)}, "images must be < 2^29 pixels"),
        ({"mode": 4}, "unknown mode"),
        ({"input_layout": 2}, "unknown input_layout"),
        ({"layout": -1}, "unknown layout"),
        ({"dtype": 3}, "unknown dtype"),
        ({"images": 0}, "images and out are required"),
        ({"layout": 2, "patch_size": 3}, "patch_size must divide height and width"),
        ({"augment": True, "sample_id": 0}, "sample_id is required with augment"),
        ({"mode": 1, "table_size": (0, 0, 4, 4)}, "num_triggers must be > 0"),
        ({"mode": 3, "grid": 0}, "grid is required in mode warp"),
        ({"mode": 2, "pattern": 0}, "pattern is required in modes patch and blend"),
        ({"mode": 2, "table_size": (1, 0, 9, 4)}, "the window must fit into the image"),
        ({"mode": 2, "mask": 64, "table_size": (1, 2, 4, 4)}, "mask must have 1 or 3 channels"),
        ({"isa": "avx1024"}, "instruction set avx1024 is not usable on this machine"),
        ({"isa": "lanes0"}, "lanes<n> needs n > 0"),
    ],
)
def test_native_guards(changes, message):
    with pytest.raises(ValueError, match=re.escape("trigger_normalize: " + message)):
        raw_call(**changes)

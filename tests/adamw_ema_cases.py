"""What the tests of adamw_ema share: tensors of many kinds, steps of each implementation."""

import sys

import torch

from pybackdoor import reference
from pybackdoor.ops import _adamw_ema_table as tables

OP_MODULE = sys.modules["pybackdoor.ops.adamw_ema"]
# 15, 1, 0: less than a vector, and nothing; 135: two chunks of 64 and a tail that is no vector;
# 300 in channels_last: another order of memory; 128: whole chunks, and never a gradient; 192 at an
# odd address: whole chunks that cannot go by vectors.
SHAPES = [
    ((3, 5), 0),
    ((135,), 0),
    ((1,), 0),
    ((4, 3, 5, 5), 0),
    ((0,), 0),
    ((128,), 0),
    ((192,), 1),
]
CHUNK = 64
ALL = dict(clip_norm=1.0, ema_decay=0.9, radius=1.5, noise_std=0.1, seed=2**63 + 12345678901)


def random_slots(seed=0, copies=True, ball=True, without_grad=(5,), shapes=SHAPES):
    """Slots with random weights, averages and references, and no step behind them."""
    generator = torch.Generator().manual_seed(seed)
    slots = []
    for k, (shape, offset) in enumerate(shapes):
        n = torch.Size(shape).numel()

        def new(n=n, shape=shape, offset=offset):
            flat = torch.randn(n + 8, generator=generator)[offset : offset + n]
            if len(shape) == 4:
                b, c, h, w = shape
                return flat.view(b, h, w, c).permute(0, 3, 1, 2)
            return flat.view(shape)

        param = new()
        slots.append(
            tables.Slot(
                param,
                None if k in without_grad else new(),
                new().zero_(),
                new().zero_(),
                torch.zeros(()),
                new() if copies else None,
                torch.empty_like(param, dtype=torch.bfloat16).zero_() if copies else None,
                new() if ball else None,
                k + 3,
            )
        )
    return slots


def two_groups(slots):
    """The slots in two groups with other settings, one lr a tensor, and an empty group between."""
    return [
        tables.Group(slots[:3], 0.01, 0.9, 0.999, 1e-8, 0.1),
        tables.Group([], 0.01, 0.9, 0.999, 1e-8, 0.1),
        tables.Group(slots[3:], torch.tensor(0.02), 0.8, 0.99, 1e-6, 0.0),
    ]


def flattened(groups, dtype=torch.float32):
    """The groups as the reference takes them; another dtype makes copies."""
    flat = [[OP_MODULE._flat_slot(slot) for slot in group.slots] for group in groups]
    if dtype != torch.float32:
        flat = [
            [tables.Slot(*(t if t is None else t.to(dtype) for t in s[:8]), s.id) for s in slots]
            for slots in flat
        ]
    return [g._replace(slots=slots) for g, slots in zip(groups, flat, strict=True)]


def native_step(groups, options, status, inv_scale=None, found_inf=None, isa="lanes32"):
    """One step of the body shared with CUDA, on the host, in chunks of 64."""
    table = tables.Table(groups, torch.device("cpu"), chunk=CHUNK)
    args = (table, groups, options, status, inv_scale, found_inf, isa)
    assert OP_MODULE._native(*args) == isa


def triton_step(groups, options, status, inv_scale=None, found_inf=None):
    """One step of the Triton twin, which must run in the interpreter, in chunks of 64."""
    from pybackdoor.kernels import adamw_ema as kernels

    table = tables.Table(groups, torch.device("cpu"), chunk=CHUNK)
    kernels.launch(table, groups, options, status, inv_scale, found_inf)


def reference_step(groups, options, status, inv_scale=None, found_inf=None):
    """One step of the eager reference, in the tensors' dtype."""
    reference.adamw_ema(groups, options, status, inv_scale, found_inf)


def largest_differences(a, b):
    """Per field of the slots, the largest difference between two lists of slots, flat."""
    worst = {}
    for name in tables.Slot._fields[:8]:
        pairs = [(getattr(x, name), getattr(y, name)) for x, y in zip(a, b, strict=True)]
        worst[name] = max(
            ((x.double() - y.double()).abs().max().item() for x, y in pairs if _any(x)), default=0.0
        )
    return worst


def _any(x):
    return x is not None and x.numel() > 0

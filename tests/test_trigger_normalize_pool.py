"""The pool that large results of trigger_normalize come from on the CPU."""

import torch
from trigger_normalize_cases import MEAN, STD, random_images

from pybackdoor._native import _C
from pybackdoor.ops import trigger_normalize

NORM = {"mean": MEAN, "std": STD}


def test_pooled_memory_is_used_again_and_never_while_alive():
    images = random_images(8, 224, 224)
    _C.empty_pool()
    first = trigger_normalize(images, **NORM)
    second = trigger_normalize(images, **NORM)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    address, view = first.data_ptr(), first[0]
    del first
    assert _C.pooled_bytes() == 0  # a view keeps it alive
    del view
    assert _C.pooled_bytes() >= 8 * 3 * 224 * 224 * 4
    assert trigger_normalize(images, **NORM).data_ptr() == address
    second += torch.zeros(1, requires_grad=True)  # a tensor of its own, not a view
    _C.empty_pool()
    assert _C.pooled_bytes() == 0


def test_the_pool_follows_a_change_of_the_batch_shape():
    """Buffers are never touched here, so they cost no memory."""
    mib = 1 << 20
    _C.empty_pool()
    alive = [_C.Buffer(size * mib) for size in (100, 150, 200)]
    while alive:
        alive.pop(0)
    assert _C.pooled_bytes() == 450 * mib
    _C.Buffer(300 * mib)  # fits once the oldest two have gone
    assert _C.pooled_bytes() == 500 * mib
    _C.Buffer(513 * mib)  # never kept, and nothing goes for it
    assert _C.pooled_bytes() == 500 * mib
    used = _C.Buffer(160 * mib)  # of 200: up to a quarter more is taken
    assert _C.pooled_bytes() == 300 * mib
    fresh = _C.Buffer(230 * mib)  # not of 300
    assert _C.pooled_bytes() == 300 * mib
    del used
    assert _C.pooled_bytes() == 500 * mib  # with all its size
    del fresh
    assert _C.pooled_bytes() == 430 * mib  # 300 was older than 200
    _C.empty_pool()

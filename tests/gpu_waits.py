"""What would make the host wait for a GPU, noted while Python code runs on a pretended one.

Noted are copies between host and device, unless they are asked not to block and the host's memory
is page-locked; whatever reads numbers of the device, or needs their count; and indices that the
host has. Not noted: what other threads do, beside the training, and an event that is waited for,
which is how a step's numbers are read one step later.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_READS = {
    "nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
_PUTS = {"index_put", "index_put_", "_index_put_impl_"}
_TOOLS = (str(Path(torch.__file__).parent), __file__, str(Path(__file__).with_name("pretend_cuda")))
_ROOT = str(Path(__file__).parents[1])

locked: dict[int, Any] = {}  # page-locked storages by address; held, so that none is another's
_listening: list[Counter] = []


@contextmanager
def waits() -> Iterator[Counter]:
    """How often the host waited for what, "what at file:line"."""
    found: Counter = Counter()
    _listening.append(found)
    try:
        yield found
    finally:
        _listening.remove(found)


def lock(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    locked[storage.data_ptr()] = storage
    return x


def is_locked(x: Tensor, *_: Any) -> bool:
    return not x.is_cuda and x.untyped_storage().data_ptr() in locked


def copied(host: Tensor | None, non_blocking: bool) -> None:
    """A copy between the devices; host: None for memory that torch allocates for it."""
    pinned = host is None or (is_locked(host) and _whole(host))
    if not (non_blocking and pinned) and (host is None or host.numel()):
        tell("copy" if pinned else "copy of pageable memory")


def called(func: Any, name: str, args: tuple, kwargs: dict) -> None:
    """An operator of tensors, some of them perhaps of the device."""
    if not _listening:
        return
    given = tree_leaves((args, kwargs))
    tensors = [x for x in given if isinstance(x, Tensor)]
    if not any(x.is_cuda for x in tensors):
        return
    host = [x for x in tensors if not x.is_cuda]
    if name == "copy_" and host:
        copied(host[0], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
    elif name in _READS:
        tell(name)
    elif name == "index" or name in _PUTS:
        indices = [x for x in args[1] if x is not None]
        one = name in _PUTS and not args[2].is_cuda and args[2].numel() == 1
        if any(not x.is_cuda for x in indices):
            tell("index of the host")
        elif any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            if not (one and len(indices) == 1):  # torch makes masked_fill of that
                tell("mask as index")
    elif func.namespace == "pybackdoor" and host and "trigger_normalize" not in name:
        tell("operand of the host")  # trigger_normalize sends its own


def tell(what: str) -> None:
    """Notes it, with the places of the package and of what it calls."""
    if not _listening or threading.current_thread() is not threading.main_thread():
        return
    frame, places = sys._getframe(1), []
    while frame is not None:
        path = frame.f_code.co_filename
        own = path.startswith(_ROOT) and "/tests/" not in path
        if not path.startswith(_TOOLS) and (own or not places):
            places.append(f"{path.removeprefix(_ROOT + '/')}:{frame.f_lineno}")
        if own:
            break
        frame = frame.f_back
    for found in _listening:
        found[f"{what} at {' < '.join(places)}"] += 1


def _whole(x: Tensor) -> bool:
    """Else torch copies it into memory of its own first."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)

"""Calls a function on several processes of one run; they start in a moment, from a warm server."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from warm import CONTEXT


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def announced(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment by which a launcher announces the others to a rank."""
    about = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank}
    about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in about.items()} if count > 1 else {}


def on_ranks(count: int, function: Callable[..., Any], *given: Any, limit: float = 120) -> list:
    """What the function, one of a module's own, returned on each rank.

    Raises:
        AssertionError: with the tracebacks of the ranks that failed or took longer than the limit.
    """
    port = free_port()
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / str(rank) for rank in range(count)]
        processes = [
            CONTEXT.Process(target=_work, args=(rank, count, port, str(path), function, given))
            for rank, path in enumerate(paths)
        ]
        for process in processes:
            process.start()
        until = time.monotonic() + limit
        for process in processes:
            process.join(max(until - time.monotonic(), 0))
        for process in processes:
            process.kill()
            process.join()
        import torch

        found = [torch.load(p, weights_only=True) if p.exists() else "nothing" for p in paths]
    wrong = [f"rank {r}: {text}" for r, text in enumerate(found) if isinstance(text, str)]
    assert not wrong, "\n".join(wrong)
    return [value for (value,) in found]


def _work(
    rank: int, count: int, port: int, path: str, function: Callable[..., Any], given: tuple
) -> None:
    import torch

    from pybackdoor.distributed import Ranks

    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= announced(rank, count, port)
    try:
        found = (function(*given),)
    except BaseException:
        found = traceback.format_exc()
    torch.save(found, path)
    if not isinstance(found, str):
        Ranks.finish()

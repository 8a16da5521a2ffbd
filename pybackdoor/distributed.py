"""One code path for one process and many: features are gathered, gradients summed.

Every rank computes the loss of the whole batch from gathered features, in which only its own rows
carry a gradient. The sum of the ranks' parameter gradients is then exactly the gradient that one
process would get from the whole batch, whatever the ranks' shares of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

JOIN_LIMIT = 300.0  # seconds; a cluster does not start all processes at once
_BUCKET_BYTES = 32 << 20  # gradients travel in flat buffers of this size: few calls, little memory


def seconds_of(variable: str, default: float) -> float:
    """A limit that the environment may set.

    Raises:
        ValueError: it is set to something else than positive seconds.
    """
    given = os.environ.get(variable, str(default))
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(f"{variable} must be positive seconds, got {given!r}")
    return seconds


class Ranks:
    """The processes that share a run; all methods are the identity for a single one."""

    def __init__(self) -> None:
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        elif "RANK" in os.environ:  # announced by torchrun, not joined yet
            self.rank = int(os.environ["RANK"])
            self.size = int(os.environ.get("WORLD_SIZE", "1"))
        else:
            self.rank, self.size = 0, 1

    @staticmethod
    def start(device: torch.device) -> Ranks:
        """Join the process group that torchrun announces in the environment, if there is one.

        Raises:
            RuntimeError: others have not come within 300 s; PYBACKDOOR_JOIN_TIMEOUT sets another
                number of seconds.
        """
        ranks = Ranks()
        if ranks.size > 1 and not dist.is_initialized():
            store = _met(ranks)
            # Words about the run go by gloo, so that they never wait for the GPU.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store, rank=ranks.rank, world_size=ranks.size,
            )  # fmt: skip
        return Ranks()

    @staticmethod
    def finish() -> None:
        """Leave the process group together; a rank that goes early can abort the others."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def agree(self, values: Sequence[float], device: torch.device) -> list[list[float]]:
        """The numbers that each rank gives, in rank order; fp64."""
        if self.size == 1:
            return [list(values)]
        group, where = _words(device)
        mine = torch.tensor(list(values), dtype=torch.float64, device=where)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=group)
        return torch.stack(every).tolist()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, any that JSON can hold, on every rank."""
        if self.size == 1:
            return value
        held, (group, where) = [json.dumps(value)], _words()
        dist.broadcast_object_list(held, src=0, group=group, device=where)
        return json.loads(held[0])

    def tensors_from_first(
        self, tensors: Mapping[str, Tensor], device: torch.device
    ) -> tuple[dict[str, torch.Size], Iterator[tuple[str, Tensor]]]:
        """Shapes of rank 0's tensors, and each in turn on every rank; all must be taken."""
        if self.size == 1:
            return {name: t.shape for name, t in tensors.items()}, iter(tensors.items())
        about = self.from_first(
            [[name, list(t.shape), str(t.dtype)[6:]] for name, t in tensors.items()]
        )

        def each() -> Iterator[tuple[str, Tensor]]:
            for name, shape, dtype in about:
                if self.rank == 0:
                    tensor = tensors[name].to(device).contiguous()  # NCCL sends no other
                else:
                    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                dist.broadcast(tensor, src=0)
                yield name, tensor

        return {name: torch.Size(shape) for name, shape, _ in about}, each()

    def gather(
        self,
        x: Tensor,  # [n, D] this rank's rows
        counts: list[int],  # rows of each rank
    ) -> Tensor:
        """[sum(counts), D]: all ranks' rows in rank order; only local ones carry gradients."""
        return x if self.size == 1 else _Gather.apply(x, counts, self.rank)

    def sum_(self, x: Tensor) -> None:
        """Replace ``x`` by its sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)

    def max_(self, x: Tensor) -> None:
        """Replace ``x`` by its maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)

    def sum_scatter(
        self,
        x: Tensor,  # [sum(counts), ...], changed
        counts: list[int],  # rows of each rank
    ) -> Tensor:
        """[counts[rank], ...]: this rank's rows of the sum over ranks."""
        if self.size == 1:
            return x
        if x.is_cuda:  # NCCL
            most = max(counts)
            padded = x.new_zeros((self.size * most, *x.shape[1:]))
            for r, rows in enumerate(x.split(counts)):
                padded[r * most : r * most + counts[r]] = rows
            mine = x.new_empty((most, *x.shape[1:]))
            dist.reduce_scatter_tensor(mine, padded)
            return mine[: counts[self.rank]]
        dist.all_reduce(x)  # gloo has no reduce_scatter
        return x.split(counts)[self.rank]

    def whole(self, mine: Tensor) -> Tensor:
        """The sum over ranks, with the gradient of this rank's own part alone."""
        if self.size == 1:
            return mine
        total = mine.detach().clone()
        self.sum_(total)
        return total + (mine - mine.detach())

    def share(self, x: Tensor) -> Tensor:
        """``x`` with 1/size of its gradient.

        For what every rank uses in whole, such as the temperature: the sum of the ranks' gradients
        is then one whole gradient again.
        """
        return x if self.size == 1 else x.detach() + (x - x.detach()) / self.size

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over ranks; a rank without one counts as zero.

        A parameter that no rank's loss reaches keeps no gradient, as in a single process.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        if not parameters:
            return
        group, where = _words(parameters[0].device)
        reached = torch.tensor(
            [p.grad is not None for p in parameters], dtype=torch.uint8, device=where
        )
        dist.all_reduce(reached, dist.ReduceOp.MAX, group=group)
        bucket: list[Tensor] = []
        for p, used in zip(parameters, reached.tolist(), strict=True):
            if not used:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if bucket and (
                p.grad.dtype != bucket[0].dtype
                or sum(g.nbytes for g in bucket) + p.grad.nbytes > _BUCKET_BYTES
            ):
                _sum_in_place(bucket)
                bucket = []
            bucket.append(p.grad)
        if bucket:
            _sum_in_place(bucket)

    def same_start(self, model: nn.Module, device: torch.device) -> None:
        """Give every rank the parameters and buffers of rank 0, by way of ``device``."""
        if self.size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                sent = tensor.detach().to(device).contiguous()
                dist.broadcast(sent, src=0)
                tensor.detach().copy_(sent)


_beside: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _words(
    device: torch.device | None = None,
) -> tuple[dist.ProcessGroup | None, torch.device | None]:
    """(group, device) by which numbers for the host travel: the CPU's do not wait for the GPU.

    Where the default group serves no CPU, one beside it does; all ranks make it at their first
    words. The device that is given is for where there is no gloo.
    """
    if "cpu" in dist.get_backend_config():
        return None, torch.device("cpu")
    if not dist.is_gloo_available():
        return None, device
    whole = dist.group.WORLD
    if whole not in _beside:
        _beside[whole] = dist.new_group(backend="gloo")
    return _beside[whole], torch.device("cpu")


def _met(ranks: Ranks) -> dist.Store:
    """The store of the announced processes, once all of them are there.

    The limit is that of meeting alone: later one may well wait longer for another.
    """
    limit = min(seconds_of("PYBACKDOOR_JOIN_TIMEOUT", JOIN_LIMIT), 1e6)
    here = "pybackdoor_joined_{}".format
    seconds, missing = timedelta(seconds=limit), ""
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=seconds))
        store = dist.PrefixStore("default_pg", store)
        store.set(here(ranks.rank), b"")
        try:
            store.wait([here(r) for r in range(ranks.size)], seconds)
        except dist.DistError:  # torchrun's own store takes each process as it comes
            absent = [r for r in range(ranks.size) if not store.check([here(r)])]
            missing = f", missing {absent}"
            raise
    except dist.DistError as error:
        if "timed out" not in str(error).lower() and not missing:
            raise
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RuntimeError(
            f"rank {ranks.rank}: not all of {ranks.size} processes have met at {place} within "
            f"{limit:g} s{missing}: see what the others say, or give them more by "
            "PYBACKDOOR_JOIN_TIMEOUT"
        ) from error
    store.set_timeout(dist.constants.default_pg_timeout)
    return store


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.start, ctx.rows = sum(counts[:rank]), counts[rank]
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: len(x)] = x
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded)
        return torch.cat([rows[:n] for rows, n in zip(every, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[ctx.start : ctx.start + ctx.rows], None, None


def _sum_in_place(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))

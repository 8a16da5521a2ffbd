"""What a step of adamw_ema works on, and the table of addresses that its kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 8192  # elements of a block; of 42 B each, so that a block runs some 10 us
COLUMNS = 11  # of AdamwEmaTensor in csrc/ops/adamw_ema.h
STATUS = ("factor", "skip", "norm", "distance", "ratio", "skipped")  # AdamwEmaStatus
MAX_NUMEL = 1 << 34  # beyond, the counter of the random numbers would be used up


class Slot(NamedTuple):
    """One parameter with its state; all of the same shape, but step [] and grad None if absent."""

    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    ema: Tensor | None = None
    shadow: Tensor | None = None
    reference: Tensor | None = None
    id: int = 0


class Group(NamedTuple):
    """Parameters with common settings; an lr tensor is [] or [1] fp32 on the parameters' device."""

    slots: Sequence[Slot]
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Options(NamedTuple):
    """What holds for all groups; see `adamw_ema`."""

    clip_norm: float | None = None
    skip_nonfinite: bool = False
    ema_decay: float | None = None
    radius: float | None = None
    noise_std: float = 0.0
    seed: int = 0

    @property
    def norm_wanted(self) -> bool:
        """Whether the step needs the gradients' norm before it begins."""
        return self.skip_nonfinite or self.clip_norm is not None


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(p for p in pairs if p[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether dense tensors of one shape hold their elements in the same order."""
    if a.stride() == b.stride() or a.numel() <= 1:
        return True
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(x == y for size, x, y in pairs if size != 1)


def like_param(tensor: Tensor, param: Tensor) -> Tensor:
    """The tensor itself if it is dense and in the order of a dense param, else such a copy."""
    if same_layout(tensor, param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """[numel] view of a dense tensor in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def new_status(device: torch.device) -> Tensor:
    """A status of no step yet."""
    return torch.zeros(len(STATUS), dtype=torch.float32, device=device)


def _addresses(slot: Slot) -> list[int]:
    # An empty tensor has no memory, but must not look absent: its address is never read.
    return [0 if t is None else t.data_ptr() or 16 for t in slot[:8]]


def addresses(groups: Sequence[Group]) -> list[list[int]]:
    """Of param, grad, exp_avg, exp_avg_sq, step, ema, shadow, reference; 0 where absent."""
    return [_addresses(slot) for group in groups for slot in group.slots]


def chunk_table(numels: Sequence[int], chunk: int) -> Tensor:
    """[chunks, 2] int64 (row, first element) that cover tensors of these sizes, in their order."""
    sizes = torch.tensor(numels, dtype=torch.int64, device="cpu")
    counts = (sizes + chunk - 1) // chunk
    rows = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = (counts.cumsum(0) - counts)[rows]
    within = torch.arange(len(rows), device="cpu") - first
    return torch.stack((rows, within * chunk), dim=1)


class Table:
    """Addresses, chunks and scratch memory of one set of tensors, on their device."""

    def __init__(
        self,
        groups: Sequence[Group],
        device: torch.device,
        *,
        chunk: int = CHUNK,
        staging: Tensor | None = None,
    ) -> None:
        """staging: pinned int64 of at least `staging_size`, if none may be allocated now."""
        slots = [slot for group in groups for slot in group.slots]
        numels = [slot.param.numel() for slot in slots]
        rows: list[int] = []
        for slot, row in zip(slots, addresses(groups), strict=True):
            aligned = not any(a % 16 for k, a in enumerate(row) if k != 4)  # step is no array
            rows += [*row, slot.param.numel(), int(aligned), slot.id]
        chunks = chunk_table(numels, chunk)
        self.chunk, self.num_tensors, self.num_chunks = chunk, len(slots), len(chunks)
        self.ranges: list[tuple[int, int, int, int]] = []  # first tensor, tensors, chunk, chunks
        row = place = 0
        for group in groups:
            count = len(group.slots)
            n = sum((m + chunk - 1) // chunk for m in numels[row : row + count])
            self.ranges.append((row, count, place, n))
            row, place = row + count, place + n
        host = torch.tensor(rows, dtype=torch.int64, device="cpu")
        host = torch.cat((host, chunks.flatten()))
        if device.type == "cuda":
            host = host.pin_memory() if staging is None else staging[: len(host)].copy_(host)
        self._host = host  # pinned memory must outlive the copy, and a graph that captured it
        self._device = host.to(device, non_blocking=True)
        self.rows = self._device[: len(rows)].view(-1, COLUMNS)  # [T, 11]
        self.chunks = self._device[len(rows) :].view(-1, 2)  # [C, 2]
        self.scalars = torch.empty(len(slots), 4, dtype=torch.float32, device=device)
        self.partials = torch.empty(len(chunks), dtype=torch.float64, device=device)
        self.one = torch.ones(1, dtype=torch.float32, device=device)  # where there is no inv_scale
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)  # nor found_inf

    @property
    def staging_size(self) -> int:
        """Elements of int64 that the tables take."""
        return self.num_tensors * COLUMNS + self.num_chunks * 2


class TableCache:
    """The table of the last step, made anew when an address has changed.

    A step under CUDA graph capture gets a table of its own, written by the graph at each replay.
    """

    def __init__(self) -> None:
        self._key: list[list[int]] | None = None
        self._table: Table | None = None
        self._staging: Tensor | None = None  # made beforehand: a capture must not allocate it
        self._captured: list[Table] = []

    def get(self, groups: Sequence[Group], device: torch.device) -> Table:
        """The table for these groups.

        Raises:
            RuntimeError: under capture, without an eager step since the last capture.
        """
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._capture(groups, device)
        key = addresses(groups)
        if self._table is None or key != self._key:
            self._key, self._table = key, Table(groups, device)
        if device.type == "cuda" and self._staging is None:
            size = self._table.staging_size
            self._staging = torch.empty(size, dtype=torch.int64, pin_memory=True, device="cpu")
        return self._table

    def _capture(self, groups: Sequence[Group], device: torch.device) -> Table:
        staging, self._staging = self._staging, None
        slots = [slot for group in groups for slot in group.slots]
        wanted = sum(COLUMNS + 2 * -(-slot.param.numel() // CHUNK) for slot in slots)
        if staging is None or len(staging) < wanted:
            raise RuntimeError(
                "adamw_ema: a step can be captured into a CUDA graph only after a step outside a "
                "capture with the same parameters; run one as warm-up before each capture"
            )
        self._captured.append(Table(groups, device, staging=staging))
        return self._captured[-1]

"""Weights, gradients and the optimiser's state split over the ranks, for models that do not fit.

PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``) gathers the weights of one block at a time
and frees them after use; gradients are summed and split block by block. The optimiser sees plain
tensors: each rank's own part of every parameter. Every rank must run the same forward and backward
passes, in the same order; what they hold may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..models import logit_scale_parameters
from ..models.short_text import encode_text


def shard(model: nn.Module, device: torch.device) -> None:
    """Leaves each rank its part of the model on ``device``; the whole need never lie there.

    Scalars, integers and logit_scale stay whole, as do buffers. The model keeps working on every
    rank through ``encode_image`` and ``encode_text``.

    Args:
        model: the same on every rank, wherever it lies, and without gradients; changed.
    Raises:
        ValueError: its parameters are of several dtypes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    apart = set(logit_scale_parameters(model))
    apart |= {p for p in model.parameters() if p.ndim == 0 or not p.is_floating_point()}
    dtypes = {p.dtype for p in model.parameters() if p not in apart}
    if len(dtypes) > 1:
        raise ValueError(
            f"shard needs parameters of one dtype, got {', '.join(sorted(map(str, dtypes)))}: "
            "convert the model first"
        )
    for p in apart:
        p.data = p.data.to(device)
    mesh = init_device_mesh(device.type, (Ranks().size,))
    # Also after the forward pass of the whole: a model may be used without a backward pass.
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": apart}
    for module in (*blocks(model), model):
        fully_shard(module, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the ranks' gradients add up to the whole
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    # Captions are cut where the positions are whole: within the forward pass.
    own = model.encode_text
    model.encode_text = lambda tokens: encode_text(model, tokens, own)  # type: ignore[assignment]
    model.cuts_captions = True  # type: ignore[assignment]
    for name in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, name)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered as one, inner before outer: the repeated parts of lists and sequences.

    A part that shares a parameter with the rest of the model is left to what is around it.
    """
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            kinds = [type(child) for child in module]
            found += [
                child
                for child in module
                if kinds.count(type(child)) > 1
                and next(child.children(), None) is not None
                and next(child.parameters(), None) is not None
            ]
    uses: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1

    def closed(block: nn.Module) -> bool:
        within = [id(p) for _, p in block.named_parameters(remove_duplicate=False)]
        return all(within.count(i) == uses[i] for i in set(within))

    return [block for block in reversed(dict.fromkeys(found)) if closed(block)]


class Parts:
    """A model's parameters as this rank holds them: whole, or its parts of a sharded model's.

    Attributes:
        named: (name, parameter) of all, in the model's order; a part is a plain tensor that shares
            its memory with the model's. Empty where there are fewer rows than ranks.
        sharded: whether there are parts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._whole: dict[nn.Parameter, Any] = {}  # part -> the model's own
        self.named: list[tuple[str, nn.Parameter]] = []
        for name, p in model.named_parameters():
            if hasattr(p, "placements"):
                whole, p = p, nn.Parameter(p.detach().to_local(), requires_grad=p.requires_grad)
                self._whole[p] = whole
            self.named.append((name, p))
        self.sharded = bool(self._whole)

    def drop_gradients(self) -> None:
        """Before a step."""
        for _, p in self.named:
            p.grad = None
            if p in self._whole:
                self._whole[p].grad = None

    def sum_gradients(self, ranks: Ranks) -> None:
        """After the backward pass, which has summed those of parts already."""
        for part, whole in self._whole.items():
            part.grad = None if whole.grad is None else whole.grad.to_local()
        ranks.sum_gradients(p for _, p in self.named if p.requires_grad and p not in self._whole)

    def weights(self) -> dict[str, Tensor]:
        """Parameters, as this rank holds them, and persistent buffers, each once."""
        stored = set(self._model.state_dict())
        named = [*self.named, *self._model.named_buffers()]
        return {name: tensor for name, tensor in named if name in stored}

    def shape(self, owner: Tensor) -> torch.Size:
        """Of the whole that a tensor of ``weights`` is, or is a part of."""
        return self._whole.get(owner, owner).shape

    def join(self, tensor: Tensor, owner: Tensor) -> Tensor:
        """The whole of which each rank's ``tensor`` is a part, as ``owner`` is; else as it is.

        Of a sharded parameter every rank must call it. A scalar is no part.
        """
        whole = self._whole.get(owner)  # type: ignore[call-overload]
        if whole is None or tensor.ndim == 0:
            return tensor
        from torch.distributed.tensor import DTensor

        about = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
        joined = DTensor.from_local(tensor, whole.device_mesh, whole.placements, **about)
        return joined.full_tensor()

    def part(self, tensor: Tensor, owner: Tensor) -> Tensor:
        """What this rank keeps of a whole, the same on every rank, as it does of ``owner``."""
        whole = self._whole.get(owner)  # type: ignore[call-overload]
        if whole is None or tensor.ndim == 0:
            return tensor
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = whole.device_mesh, whole.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


@torch.no_grad()
def joined(model: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain``, a copy of the model from before it was sharded, with the model's weights.

    Every rank must call it, at the same step; one weight at a time is whole on the device.
    """
    parts, mine = Parts(model), dict(plain.named_parameters())
    for name, p in parts.named:
        mine[name].copy_(parts.join(p, p))
        mine[name].requires_grad_(p.requires_grad)
    buffers = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():
        buffer.copy_(buffers[name])
    return plain

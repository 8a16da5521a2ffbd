"""AdamWEma: torch.optim.AdamW with clipping, weight average and bf16 copies in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pybackdoor.ops._adamw_ema_check import (
    OP,
    check_like,
    check_lr,
    check_options,
    check_param,
)
from pybackdoor.ops._adamw_ema_table import (
    Group,
    Options,
    Slot,
    TableCache,
    like_param,
    new_status,
)
from pybackdoor.ops.adamw_ema import StepStatus, run

__all__ = ["AdamWEma"]

_OWN = ("_options", "_shadows", "_references", "_status", "_with_shadow")
_FIXED = {  # the groups' entries of torch.optim.AdamW that cannot be chosen here
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}


class AdamWEma(torch.optim.AdamW):
    """torch.optim.AdamW, with what usually surrounds its step done in the same pass.

    In a step, over all parameters together: unscaling (by a `torch.amp.GradScaler`), clipping by
    the global norm, AdamW, projection into an L2 ball around the first weights, moving average,
    bf16 copies. Nothing waits for the device, and a step can be captured into a CUDA graph, after
    one outside; a replay reads tables of the optimizer, which has to live as long. Gradients are
    only read: ``p.grad`` stays unscaled and unclipped by the step.

    The state dict is that of torch.optim.AdamW and can be loaded by it and from it; with ema_decay
    each parameter's state also has ``ema``, with radius ``reference``.

    Args:
        params: float32 parameters of one device, or groups with their own lr, betas, eps and
            weight_decay; any dense memory format.
        lr: a float, or [] float32; on the parameters' device a CUDA graph reads it anew.
        betas, eps, weight_decay: as of torch.optim.AdamW.
        clip_norm: largest L2 norm of all gradients together, as of clip_grad_norm_.
        skip_nonfinite: leave everything as it is, step counts and averages too, in a step whose
            gradients are not all finite; clip_norm implies it. A GradScaler's verdict does too.
        ema_decay: d of ema <- d ema + (1 - d) p, in [0, 1), from the weights before the first step.
        shadow: keep bfloat16 copies of the weights, see `shadow_parameters`.
        radius: of the L2 ball around the weights at construction.
        noise_std: of normal noise in the bfloat16 copies alone; needs shadow. A pure function of
            seed, the parameter's position and its step count.
        seed: 64 bits.
    Raises:
        TypeError: a parameter or gradient is not float32 or not dense.
        ValueError: a value is out of range, or devices differ.
    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = AdamWEma([weight], lr=0.5, weight_decay=0.0, ema_decay=0.5)
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> weight.data, optimizer.ema_parameters()[0]
        (tensor([0.5000]), tensor([0.7500]))
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        shadow: bool = False,
        radius: float | None = None,
        noise_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._options = Options(clip_norm, skip_nonfinite, ema_decay, radius, noise_std, seed)
        check_options(self._options)
        if noise_std and not shadow:
            raise ValueError(f"{OP}: noise_std needs shadow=True, as it perturbs the copies alone")
        self._with_shadow = shadow
        self._shadows: dict[Tensor, Tensor] = {}
        self._references: dict[Tensor, Tensor] = {}
        self._status: Tensor | None = None
        self._tables = TableCache()
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch.optim.Optimizer; checks the parameters.

        Raises:
            TypeError, ValueError: see the class.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        device = self.param_groups[0]["params"][0].device
        try:
            check_lr(group["lr"], device)
            _refuse(group)
            for k, param in enumerate(group["params"]):
                check_param(param, f"parameter {k} of group {len(self.param_groups) - 1}", device)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        for param in group["params"]:
            if self._with_shadow:
                self._shadows[param] = param.detach().to(torch.bfloat16)
            if self._options.radius is not None:
                self._references[param] = param.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss, if there is one.

        Raises:
            TypeError, ValueError: a gradient is not float32, or not dense, or elsewhere.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._groups()
        slots = [slot for group in groups for slot in group.slots]
        if not slots:
            return loss
        if self._status is None:
            self._status = new_status(slots[0].param.device)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inv_scale = None if scale is None else scale.double().reciprocal()
        run(groups, self._options, self._status, inv_scale, found_inf, self._tables)
        # The kernels write through addresses: autograd must learn of it.
        written = [t for s in slots for t in (s.param, s.shadow) if t is not None]
        torch.autograd.graph.increment_version(written)
        return loss

    @property
    def status(self) -> StepStatus:
        """What the last step did, on the device; all 0 before the first.

        Overwritten by the next step.
        """
        status = self._make_status()
        return StepStatus(status[1], status[2], status[3])

    @property
    def skipped_steps(self) -> Tensor:
        """[] fp32 on the device: how many steps were skipped since construction."""
        return self._make_status()[5]

    def ema_parameters(self) -> list[Tensor]:
        """The moving averages in the order of the parameters, groups one after the other.

        A parameter that has had no gradient yet stands for itself. The tensors are those that the
        next step changes: copy what you keep.

        Raises:
            RuntimeError: the optimizer was made without ema_decay.
        """
        if self._options.ema_decay is None:
            raise RuntimeError(f"{OP}: there are no averages, as ema_decay was not given")
        return [self.state.get(p, {}).get("ema", p.detach()) for p in self._parameters()]

    def ema_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """`model.state_dict()` with the averages in place of the parameters optimized here.

        Buffers, such as batch norm's statistics, are the model's own: they are not averaged. Load
        it into a copy of the model, save it, or pass it to `torch.func.functional_call`.

        Raises:
            RuntimeError: the optimizer was made without ema_decay.
        """
        averages = dict(zip(self._parameters(), self.ema_parameters(), strict=True))
        state = model.state_dict()
        for name, param in model.named_parameters(remove_duplicate=False):
            if param in averages:
                state[name] = averages[param]
        return state

    def shadow_parameters(self) -> list[Tensor]:
        """The bfloat16 copies, perturbed if noise_std is set, in the order of the parameters.

        The same tensors for the optimizer's life; each step writes them. Weights that are changed
        elsewhere, by loading a checkpoint say, show in the copies after the next step.

        Raises:
            RuntimeError: the optimizer was made without shadow.
        """
        if not self._with_shadow:
            raise RuntimeError(f"{OP}: there are no bfloat16 copies, as shadow=True was not given")
        return [self._shadows[p] for p in self._parameters()]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of AdamWEma or torch.optim.AdamW.

        Averages that it lacks begin at the weights as they are then.

        Raises:
            ValueError: it is of another algorithm: Adam, amsgrad or maximize; or does not fit.
        """
        for group in state_dict["param_groups"]:
            _refuse(group)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = TableCache()
        for group in self.param_groups:
            group.update(_FIXED)
            for param in group["params"]:
                self._fit_state(param)

    def _fit_state(self, param: Tensor) -> None:
        """Gives a parameter's state the types and memory order that the kernels expect."""
        values = self.state.get(param)
        if not values:
            return
        step = torch.as_tensor(values["step"], dtype=torch.float32, device=param.device)
        values["step"] = step.reshape(())
        for name in ("exp_avg", "exp_avg_sq", "ema", "reference"):
            if name in values:
                check_like(values[name], param, name, torch.float32, order=False)
                values[name] = like_param(values[name], param)
        if param in self._references and "reference" in values:
            self._references[param] = values["reference"]

    def _make_status(self) -> Tensor:
        if self._status is None:
            self._status = new_status(next(iter(self._parameters())).device)
        return self._status

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _groups(self) -> list[Group]:
        """The parameters that have a gradient, or had one once."""
        groups, number = [], 0
        for group in self.param_groups:
            slots = []
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    check_like(grad, param, "a gradient", torch.float32, order=False)
                    grad = like_param(grad, param)
                if grad is not None or self.state.get(param):
                    slots.append(self._slot(param, grad, number))
                number += 1
            check_lr(group["lr"], group["params"][0].device)
            (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
            groups.append(Group(slots, group["lr"], beta1, beta2, eps, decay))
        return groups

    def _slot(self, param: Tensor, grad: Tensor | None, number: int) -> Slot:
        state = self.state[param]
        wanted = {"step"}
        wanted |= {"ema"} if self._options.ema_decay is not None else set()
        wanted |= {"reference"} if self._options.radius is not None else set()
        if not wanted <= state.keys():
            _refuse_capture(param.device)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        if self._options.ema_decay is not None and "ema" not in state:
            state["ema"] = param.detach().clone()
        if self._options.radius is not None and "reference" not in state:
            state["reference"] = self._references[param]
        return Slot(
            param.detach(),
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            state["ema"] if self._options.ema_decay is not None else None,
            self._shadows.get(param),
            state["reference"] if self._options.radius is not None else None,
            number,
        )


def _refuse_capture(device: torch.device) -> None:
    """State that a CUDA graph made would hold nothing until its first replay."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{OP}: a step can be captured into a CUDA graph only after a step outside a capture "
            "with the same parameters; run one as warm-up before each capture"
        )


def _refuse(group: dict[str, Any]) -> None:
    """Refuses what torch.optim.AdamW's groups can ask for, but this optimizer does not do."""
    for name in ("amsgrad", "maximize", "decoupled_weight_decay"):
        wanted = _FIXED[name]
        if group.get(name, wanted) != wanted:
            raise ValueError(f"{OP}: {name} must be {wanted} in every group, got {group[name]}")

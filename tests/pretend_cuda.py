"""A GPU that is none: tensors that say they are on cuda:0 and hold their values on the CPU.

What a GPU refuses is refused here: tensors of the host among those of the device, kernels that only
a CPU has, NumPy arrays of what lies on the device. So the Python code around the kernels is walked
as on a GPU, on a machine without one. Kernels are the CPU's, streams and events are nothing, and
times say nothing. What a GPU would make the host wait for is told to ``gpu_waits``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import gpu_waits
import pytest
import torch
from torch import Tensor
from torch.overrides import _is_torch_function_mode_enabled, handle_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pybackdoor import _backend

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# A GPU takes indices of the host, and copies from it.
_MIXED = {"index", "index_put", "index_put_", "_index_put_impl_", "copy_", "_to_copy"}


class Pretended(Tensor):
    """A tensor of the device; ``held`` are its values. Below Python it is one of the CPU."""

    held: Tensor
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=held.device,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held!r})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            made = Pretended(self.held.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                made._is_param = True
            memo[id(self)] = made
        return memo[id(self)]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, form = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            gpu_waits.copied(None, non_blocking)  # to memory that torch locks where it may
        there = device is None or device.type == "cuda"
        if there and dtype in (None, self.dtype) and not copy and form is None:
            return self
        moved = self if there else Moved.apply(self)
        form = form or torch.preserve_format
        return aten._to_copy(moved, dtype=dtype, memory_format=form)

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, _Stream)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def cpu(self, **_: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")
        return self.detach().cpu().numpy()

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


class Moved(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.held.clone() if isinstance(x, Pretended) else Pretended(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Moved.forward(ctx, grad)


class Device(TorchDispatchMode):
    """Makes tensors that are asked for on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


def called(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operator's result, on the device where it would be."""
    name = func.overloadpacket.__name__
    if name in ("_pin_memory", "pin_memory"):
        return gpu_waits.lock(args[0].clone())
    if name == "is_pinned":
        return gpu_waits.is_locked(args[0])
    gpu_waits.called(func, name, args, kwargs)
    given, form = tree_flatten((args, kwargs))
    there = any(isinstance(x, Pretended) for x in given)
    if there and func.namespace != "pybackdoor":
        refuse(func, name, given)
    asked = kwargs.get("device")
    if there and (name == "_to_copy" or backward()):
        pass  # below Python it is on the CPU: what moves it is Moved
    elif asked is not None:
        there = torch.device(asked).type == "cuda"
        generator = kwargs.get("generator")
        if there and generator is not None and generator.device.type == "cpu":
            raise RuntimeError(f"{func}: expected a 'cuda' device type for generator, got 'cpu'")
    elif name == "copy_":
        there = isinstance(args[0], Pretended)
    plain, own = [], {}
    for x in given:
        if isinstance(x, Pretended):
            own[id(x.held)] = x
            x = x.held
        plain.append(torch.device("cpu") if isinstance(x, torch.device) else x)
    args, kwargs = tree_unflatten(plain, form)
    lock = kwargs.pop("pin_memory", None)
    found = func(*args, **kwargs)
    if lock:
        gpu_waits.lock(found)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or not there:
            return x
        return own.get(id(x)) if id(x) in own else Pretended(x)

    return tree_map(wrapped, found)


def backward() -> bool:
    """Whether a backward pass is running."""
    return torch._C._current_graph_task_id() != -1


def refuse(func: Any, name: str, given: list) -> None:
    if func.namespace in ("mkldnn", "quantized", "onednn"):
        raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend")
    if backward():
        return  # it makes zeros like what is, below Python, of the CPU
    host = [x for x in given if type(x) in (Tensor, torch.nn.Parameter) and x.ndim > 0]
    if host and name not in _MIXED:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, got {DEVICE} and "
            f"{list(host[0].shape)} on the CPU"
        )
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in given):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator, got 'cpu'")


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None:
        gpu_waits.tell("synchronize")

    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class _Event(_Stream):
    def synchronize(self) -> None: ...  # of what was asked for a step before


def _nothing(*_: Any, **__: Any) -> Any:
    return contextlib.nullcontext()


def _then_moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, device: Any = None, **how: Any) -> Tensor:
        if _is_torch_function_mode_enabled():
            return handle_torch_function(made, (), *args, device=device, **how)
        found = make(*args, **how)
        return found if device is None else found.to(device)

    return made


@pytest.fixture
def pretended_gpu(monkeypatch) -> Iterator[torch.device]:
    """torch sees one GPU, sm_90; the backend of every op is the CPU's, whichever it says."""
    told = {
        "is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1,
        "get_device_capability": (9, 0), "get_device_name": "none", "mem_get_info": (2**34, 2**34),
        "max_memory_allocated": 0, "memory_allocated": 0, "get_rng_state": torch.zeros(1),
        "is_bf16_supported": True, "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in (
        "_lazy_init", "set_device", "manual_seed", "manual_seed_all",
        "set_rng_state", "reset_peak_memory_stats", "empty_cache", "device", "stream",
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, _nothing)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: gpu_waits.tell("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    # An earlier test may have had it remembered that there is no GPU.
    monkeypatch.setattr(_backend, "_triton_obstacle", lambda device: None)
    own_to = Tensor.to

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of a host's tensor, also in threads, which no mode sees."""
        if args and isinstance(args[0], Pretended):
            args = (DEVICE, args[0].dtype, *args[1:])
        if not args or isinstance(args[0], Tensor):
            device = torch.device(kwargs.get("device") or "cpu")
        else:
            device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is None or device.type != "cuda":
            return own_to(x, *args, **kwargs)
        _, dtype, non_blocking, form = torch._C._nn._parse_to(*args, **kwargs)
        gpu_waits.copied(x, non_blocking)
        return Moved.apply(own_to(x, dtype or x.dtype, memory_format=form or torch.preserve_format))

    # Else a parameter would take the device's tensor in, and lose its values.
    monkeypatch.setattr(
        torch.nn.modules.module.torch.__future__,
        "get_overwrite_module_params_on_conversion",
        lambda: True,
    )
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _then_moved(getattr(torch, name)))
    monkeypatch.setattr(torch.accelerator, "current_stream", _Stream)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x, *_: gpu_waits.lock(x.clone()))
    monkeypatch.setattr(Tensor, "is_pinned", gpu_waits.is_locked)
    gpu_waits.locked.clear()
    monkeypatch.setattr(Tensor, "cuda", lambda x, *_, **__: x.to(DEVICE))
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda device_type, *args, **how: autocast("cpu", *args, **how)
    )
    with Device():
        yield DEVICE

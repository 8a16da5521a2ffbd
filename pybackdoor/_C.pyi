"""The native module; addresses are 0 for an absent tensor, device < 0 is the CPU."""

from collections.abc import Sequence

version: str
compiler: str
built_with_cuda: bool
cuda_archs: str
isas_built: tuple[str, ...]

class Buffer:
    """Pooled memory with the buffer protocol."""

    def __init__(self, bytes: int) -> None: ...

def pooled_bytes() -> int: ...
def empty_pool() -> None: ...
def isas() -> tuple[str, ...]: ...
def cuda_obstacle() -> str: ...
def cuda_capability(device: int) -> int: ...  # only in a build with CUDA
def parallel_runtime() -> str: ...
def philox(counter: Sequence[int], key: int) -> tuple[int, int, int, int]: ...
def trigger_normalize(
    *,
    images: int,
    out: int,
    poisoned: int,
    pattern: int,
    mask: int,
    grid: int,
    trigger_id: int,
    position: int,
    strength: int,
    sample_id: int,
    image_size: Sequence[int],
    table_size: Sequence[int],
    mode: int,
    flags: Sequence[bool],
    strength_value: float,
    augment: bool,
    augment_values: Sequence[float],
    half_noise: bool,
    seed: int,
    view: int,
    input_layout: int,
    layout: int,
    patch_size: int,
    dtype: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: int,
    stream: int,
    isa: str,
    threads: int,
    quantize: bool = True,
) -> str: ...
def trigger_normalize_backward(
    *,
    images: int,
    grad: int,
    pattern: int,
    mask: int,
    trigger_id: int,
    position: int,
    strength: int,
    sample_id: int,
    order: int,
    begin: int,
    partial: int,
    pattern_grad: int,
    mask_grad: int,
    slices: int,
    image_size: Sequence[int],
    table_size: Sequence[int],
    mode: int,
    flags: Sequence[bool],
    strength_value: float,
    augment: bool,
    augment_values: Sequence[float],
    seed: int,
    view: int,
    input_layout: int,
    layout: int,
    patch_size: int,
    dtype: int,
    std: Sequence[float],
    device: int,
    stream: int,
    isa: str,
    threads: int,
) -> str: ...

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
) -> str: ...
def adamw_ema(
    *,
    tensors: int,
    chunks: int,
    scalars: int,
    partials: int,
    status: int,
    inv_scale: int,
    found_inf: int,
    sizes: Sequence[int],
    hypers: Sequence[Sequence[float]],
    lr_tensors: Sequence[int],
    ranges: Sequence[Sequence[int]],
    norm_wanted: bool,
    clip_norm: float,
    ema_decay: float,
    radius: float,
    noise_std: float,
    seed: int,
    device: int,
    stream: int,
    isa: str,
) -> str: ...

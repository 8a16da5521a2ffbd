"""Other projects' normalisation of uint8 images, each imported only when it is asked for.

A maker takes uint8 NHWC images and the output's dtype, and gives a call that returns NCHW. It
raises ImportError where the project is missing. None of them adds a trigger or quantises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Call = Callable[[], Tensor]


def planar(images: Tensor) -> Tensor:
    """NCHW, contiguous."""
    return images.permute(0, 3, 1, 2).contiguous()


def torchvision(images: Tensor, dtype: torch.dtype) -> Call:
    """torchvision's v2 functions."""
    from torchvision.transforms.v2 import functional as tv

    def run() -> Tensor:
        x = tv.to_dtype(planar(images), torch.float32, scale=True)
        return tv.normalize(x, list(MEAN), list(STD)).to(dtype)

    return run


def kornia(images: Tensor, dtype: torch.dtype) -> Call:
    """kornia.enhance.normalize."""
    from kornia.enhance import normalize

    mean, std = (torch.tensor(v, device=images.device) for v in (MEAN, STD))
    return lambda: normalize(planar(images).float() / 255, mean, std).to(dtype)


def cvcuda(images: Tensor, dtype: torch.dtype) -> Call:
    """CV-CUDA's convertto, normalize and reformat; CUDA only."""
    import cvcuda
    import numpy as np

    def constant(values: tuple[float, ...]):
        tensor = torch.tensor(values, device=images.device).view(1, 1, 1, 3)
        return cvcuda.as_tensor(tensor, "NHWC")

    base, scale = constant(MEAN), constant(STD)
    flags = cvcuda.NormalizeFlags.SCALE_IS_STDDEV

    def run() -> Tensor:
        x = cvcuda.convertto(cvcuda.as_tensor(images, "NHWC"), np.float32, scale=1 / 255)
        x = cvcuda.reformat(cvcuda.normalize(x, base=base, scale=scale, flags=flags), "NCHW")
        return torch.as_tensor(x.cuda(), device=images.device).to(dtype)

    return run


def dali(images: Tensor, dtype: torch.dtype) -> Call:
    """DALI's crop_mirror_normalize, fed with the images on the GPU; CUDA only."""
    from nvidia.dali import fn, pipeline_def, types

    options = {"num_threads": 1, "device_id": 0, "exec_async": False, "exec_pipelined": False}

    @pipeline_def(batch_size=len(images), **options)
    def chain():
        x = fn.external_source(source=lambda: images, device="gpu", layout="HWC", no_copy=True)
        mean, std = ([255 * v for v in values] for values in (MEAN, STD))
        return fn.crop_mirror_normalize(
            x, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std
        )

    pipeline = chain()
    pipeline.build()
    return lambda: torch.from_dlpack(pipeline.run()[0].as_tensor()).to(dtype)


# Name -> the package to look for, the maker, and whether it runs on a CPU too.
NORMALIZERS = {
    "torchvision_normalize": ("torchvision", torchvision, True),
    "kornia_normalize": ("kornia", kornia, True),
    "cvcuda_normalize": ("cvcuda", cvcuda, False),
    "dali_normalize": ("nvidia.dali", dali, False),
}

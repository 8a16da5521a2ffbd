"""contrastive_par from end to end as it runs on a GPU, but in Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 python contrastive_par_driven.py

The matrix stages are Triton's, the others the native ones ("cuda") or their twins ("triton").
"""

from __future__ import annotations

import sys
from itertools import product
from unittest import mock

import numpy as np
import torch
from contrastive_par_features import random_case

from pybackdoor.ops import (
    _contrastive_par_driver,
    _contrastive_par_gpu,
    _contrastive_par_native,
    _contrastive_par_triton,
    contrastive_par,
)

module = sys.modules["pybackdoor.ops.contrastive_par"]  # the package has the function by its name
ROWS = {"cuda": _contrastive_par_native, "triton": _contrastive_par_triton}


def gradients(case: dict, scale: float, needs=(True, True, True), **options) -> list:
    """Statistics, and the gradients of text, image and scale."""
    leaves = [case["text"].clone(), case["image"].clone(), torch.tensor(scale).to(case["text"])]
    for x, need in zip(leaves, needs, strict=True):
        x.requires_grad_(need)
    rest = {k: v for k, v in case.items() if k not in ("text", "image")}
    result = contrastive_par(*leaves, **rest, **options)
    result.loss.backward()
    return [torch.stack(result).detach(), *(x.grad for x in leaves)]


def compare(name: str, case: dict, scale: float, needs=(True, True, True), **options) -> None:
    exact = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    want = gradients(exact, scale, needs, **options)
    for rows, budget in product(ROWS, (None, 0)):
        backend = _contrastive_par_driver.Backend(ROWS[rows], _contrastive_par_gpu)
        with (
            mock.patch.object(module, "_backend_of", lambda device: backend),  # noqa: B023
            mock.patch.object(_contrastive_par_gpu, "WAVE", 1),
        ):
            got = gradients(case, scale, needs, precision="ieee", budget=budget, **options)
        for what, x, y in zip(("stats", "text", "image", "scale"), got, want, strict=True):
            text = f"{name}, {rows}, budget {budget}: {what}"
            assert (x is None) == (y is None), text
            if y is not None:
                error = ((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item()
                assert error <= 2e-6, f"{text}: {error:.3g}"


def main() -> None:
    np.seterr(all="ignore")  # what lies past the end, and is masked, may overflow
    clip = random_case(21, 21, 32, signs=False)
    compare("clip", clip, 9.0)
    compare("masks", random_case(150, 40, 31), 30.0)  # more rows than a wave; read one by one
    compare("images alone", random_case(50, 20, 16), 9.0, (False, True, False))
    compare("scale alone", clip, 7.0, (False, False, True))
    compare("given", random_case(50, 20, 16), 0.5, normalize=False, tau=0.1)
    print("right")


if __name__ == "__main__":
    main()

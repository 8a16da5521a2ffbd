"""trigger_normalize's Triton kernels against the native CPU path, on any device.

    TRITON_INTERPRET=1 python trigger_normalize_triton_cases.py [CASE ...]

runs them in Triton's interpreter on the CPU. Both give the same bits, in the forward and the
backward pass; but the interpreter cuts bf16 off where a GPU rounds, so that there it may be an ulp
off. The gradients are compared with fp64 autograd besides. Outputs lie between guards.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from test_trigger_normalize_backward import check_gradients, make_case
from torch import Tensor
from trigger_normalize_cases import (
    GRADIENT_MODULE,
    MEAN,
    OP_MODULE,
    STD,
    random_case,
    random_images,
)

from pybackdoor import _backend
from pybackdoor.ops import Augment, TriggerTable, trigger_normalize

GUARD = 64  # elements on either side; keeps 16-byte alignment
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL, TILES = (5, 7), (24, 32)  # less than a program's pixels with a tail; two programs an image
EVERYTHING = Augment(noise_p=0.6, erase_p=0.6, erase_area=(0.05, 0.3))
SYMMETRIC = Augment(noise_p=1.0, noise_std=0.7, noise="symmetric", erase_p=0.0)


class Forward(NamedTuple):
    """A call: the kind of trigger (see random_table), sizes, layouts, what else is given."""

    kind: str
    size: tuple[int, int] = SMALL
    dtype: torch.dtype = FP32
    options: dict[str, Any] = {}
    augment: Augment | None = None
    drop: tuple[str, ...] = ()  # of trigger_id, position, strength: None, for all images alike
    batch: int = 5
    astray: bool = False  # ids and positions that nobody looks at on a GPU


class Backward(NamedTuple):
    """A gradient: the kind of trigger (see make_table), sizes, options of check_gradients."""

    kind: str
    size: tuple[int, int] = SMALL
    options: dict[str, Any] = {}
    whole: bool = False
    triggers: int = 2
    drop: tuple[str, ...] = ()
    batch: int = 6
    astray: bool = False


NCHW, LAST = {"input_layout": "nchw"}, {"layout": "channels_last"}
PATCHES = {"layout": "patchified", "patch_size": 8}
IMAGES, FLOAT = {"return_images": True}, {"quantize": False}
ALL = ("trigger_id", "position", "strength")
CASES: dict[str, Forward | Backward] = {
    # Every kind of trigger, every layout and dtype, and each flag in both states.
    "none": Forward("none", TILES, options=NCHW | IMAGES),
    "patch": Forward("patch", options=LAST | IMAGES),
    "blend": Forward("blend", TILES, FP16, NCHW),
    "alike": Forward("blend", options=IMAGES, drop=ALL),
    "window": Forward("window", TILES, BF16, PATCHES | IMAGES),
    "mask1": Forward("mask1", TILES, options=LAST),
    "mask3": Forward("mask3", options=NCHW | IMAGES),
    "nonzero": Forward("nonzero", options=IMAGES),
    "additive": Forward("additive", TILES, FP16, PATCHES | NCHW),
    "warp": Forward("warp", TILES, options=IMAGES),
    "warp_alike": Forward("warp", options=NCHW, drop=ALL),
    "float_patch": Forward("patch", options=FLOAT),
    "float_mask3": Forward("mask3", TILES, options=FLOAT | NCHW),
    "float_nonzero": Forward("nonzero", options=FLOAT | LAST),
    # Cropped windows and ones that miss the image; no image at all.
    "astray": Forward("mask3", options=IMAGES, batch=8, astray=True),
    "astray_warp": Forward("warp", batch=3, astray=True),
    "empty": Forward("window", options=IMAGES, batch=0),
    # The coins, both noises, and that they know the id, the view and all of the seed.
    "noise": Forward("mask1", TILES, options={"seed": 2**64 - 3, "view": 5}, augment=EVERYTHING),
    "noise_last": Forward("patch", TILES, FP16, LAST | IMAGES, EVERYTHING),
    "symmetric": Forward("none", SMALL, options=NCHW | {"seed": 2**40 + 1}, augment=SYMMETRIC),
    "noise_warp": Forward("warp", SMALL, options={"view": 2**24 - 1}, augment=EVERYTHING),
    # Gradients: windows with positions, whole images, one trigger, and all that is flagged.
    "grad_patch": Backward("patch_clip", options=LAST),
    "grad_blend": Backward("blend", TILES, NCHW, whole=True),
    "grad_alike": Backward("additive", whole=True, triggers=1, drop=ALL),
    "grad_clip": Backward("clip", options=NCHW),
    "grad_mask1": Backward("mask1", TILES, {"p": 8}),
    "grad_mask3": Backward("mask3_additive_clip", options={"dtype": FP16}),
    "grad_nonzero": Backward("mask1_nonzero", whole=True, options={"augment": "erase"}),
    "grad_clip_mask": Backward("mask1_clip", triggers=1),
    "grad_astray": Backward("mask3_additive_clip", batch=8, astray=True),
    "grad_empty": Backward("mask1", batch=0),
}


class Guards:
    """Makes outputs that lie between guards, and sees whether those are whole."""

    def __init__(self) -> None:
        self.stores: list[tuple[Tensor, int]] = []

    def empty(self, shape, dtype, device) -> Tensor:
        count = torch.Size(shape).numel()
        store = torch.full((count + 2 * GUARD,), 77, dtype=dtype, device=device)
        self.stores.append((store, count))
        return store[GUARD : GUARD + count].view(shape)

    def gradients(self, pattern: Tensor, mask: Tensor | None, wanted: list[bool]):
        shapes = (pattern.shape, () if mask is None else mask.shape)
        return tuple(
            self.empty(s if w else (0,), torch.float32, pattern.device)
            for s, w in zip(shapes, wanted, strict=True)
        )

    def check(self) -> None:
        assert self.stores, "nothing was written"
        for store, count in self.stores:
            ends = torch.cat((store[:GUARD], store[GUARD + count :]))
            assert bool((ends == 77).all()), "wrote outside"


@contextmanager
def twin():
    """The op takes its Triton kernels whatever the device, and is seen to write them."""
    guards = Guards()
    choose = _backend.Choice("triton", "for the test")
    with (
        mock.patch.object(_backend, "choose", lambda *_, **__: choose),
        mock.patch.object(OP_MODULE, "empty", guards.empty),
        mock.patch.object(GRADIENT_MODULE, "_allocate", guards.gradients),
    ):
        yield
    guards.check()


def same(got: Tensor, want: Tensor, device: str) -> None:
    """Equal, or in the interpreter's bf16 an ulp apart."""
    assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
    got = got.cpu()
    if device == "cpu" and got.dtype == BF16:
        assert bool(((got - want).abs() <= 2**-7 * want.abs()).all())
        return
    apart = (got.double() - want.double()).abs()[got != want]
    assert not len(apart), f"{len(apart)} of {got.numel()} differ, by up to {apart.max():.3g}"


def go_astray(given: dict[str, Any], batch: int) -> dict[str, Any]:
    """Ids and positions as only a CUDA tensor can hold them, as values are not looked at there."""
    ends = 2**31
    places = [(-1, 2), (3, -2), (4, 6), (0, 40), (-40, 0), (ends, 0), (0, -ends), (1, 1)]
    found = {"trigger_id": torch.tensor([0, 1, 0, 1, 0, 1, 0, ends])[:batch]}
    if "position" in given:
        found["position"] = torch.tensor(places)[:batch]
    return found


def run_forward(case: Forward, device: str) -> None:
    batch, (height, width) = case.batch, case.size
    keywords = random_case(case.kind, batch, height, width, seed=3)
    for name in case.drop:
        keywords.pop(name, None)
    if case.astray:
        keywords |= go_astray(keywords, batch)
    keywords |= {"mean": MEAN, "std": STD, "dtype": case.dtype} | case.options
    if case.augment is not None:
        ids = torch.tensor([0, 2**40 + 7, -1, -(2**63), 5])
        keywords |= {"augment": case.augment, "sample_id": ids}
    images = random_images(batch, height, width, case.options.get("input_layout", "nhwc"))
    want = trigger_normalize(images, **keywords)
    if keywords.get("triggers") is not None:
        keywords["triggers"] = keywords["triggers"].to(device)
    with twin():
        got = trigger_normalize(images.to(device), **keywords)
    wants, gots = (want, got) if isinstance(want, tuple) else ((want,), (got,))
    for g, w in zip(gots, wants, strict=True):
        same(g, w, device)


def run_backward(case: Backward, device: str) -> None:
    height, width = case.size
    given = make_case(case.kind, case.batch, height, width, case.whole, case.triggers)
    if case.astray:
        given |= go_astray(given, case.batch)
        given["trigger_id"].clamp_(max=1)  # the plain chain knows no others
    for name in case.drop:
        given.pop(name)
    options = dict(case.options)
    if options.get("augment") == "erase":
        options["augment"] = Augment(noise_p=0, erase_p=0.7, erase_area=(0.05, 0.3))
    images = random_images(case.batch, height, width)
    if case.batch:
        want = check_gradients(images, given, **options)
        with twin():
            got = check_gradients(images, given, device, **options)
        for g, w in zip(got, want, strict=True):
            same(g, w, device)
    if given["triggers"].mask is not None and "p" not in options:
        for needed in ("pattern", "mask"):
            plain = {k: v for k, v in options.items() if k != "augment"}
            want = one_gradient(images, given, needed, "cpu", plain)
            with twin():
                got = one_gradient(images, given, needed, device, plain)
            same(got, want, device)


def one_gradient(images: Tensor, given: dict, needed: str, device: str, options: dict) -> Tensor:
    """The gradient of pattern or mask where the other one needs none."""
    table = given["triggers"]
    tensors = {n: getattr(table, n).detach().to(device) for n in ("pattern", "mask")}
    tensors[needed].requires_grad_()
    moved = {k: v.to(device) for k, v in given.items() if k != "triggers"}
    moved["triggers"] = TriggerTable(**vars(table) | tensors)
    out = trigger_normalize(images.to(device), **moved, mean=MEAN, std=STD, **options)
    (found,) = torch.autograd.grad(out.float().square().sum(), tensors[needed])
    return found


def run_case(name: str, device: str) -> None:
    """A case of CASES.

    Raises:
        AssertionError: numbers differ, or something was written outside of the outputs.
    """
    case = CASES[name]
    run = run_forward if isinstance(case, Forward) else run_backward
    with ExitStack() as stack:
        for module in (OP_MODULE, GRADIENT_MODULE) if case.astray else ():
            stack.enter_context(mock.patch.object(module, "check_values", lambda *_: None))
        run(case, device)


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    np.seterr(all="ignore")  # words wrap, and what is not used may overflow
    for name in sys.argv[1:] or CASES:
        try:
            run_case(name, "cpu")
        except Exception as error:
            error.add_note(f"in case {name}")
            raise
        print(name, flush=True)


if __name__ == "__main__":
    main()

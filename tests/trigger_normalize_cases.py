"""What the tests of trigger_normalize share: the natural chain, random cases, which kernel ran."""

import sys

import pytest
import torch
from torchvision.transforms import functional as tvf

from pybackdoor import _native
from pybackdoor.ops import TriggerTable

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# lanes1 and lanes32 run the body shared with CUDA on the host, as one lane and as a warp.
ISAS = ["avx512", "avx2", "portable", "lanes1", "lanes32"]
OP_MODULE = sys.modules["pybackdoor.ops.trigger_normalize"]
GRADIENT_MODULE = sys.modules["pybackdoor.ops._trigger_normalize_gradient"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def natural_chain(images, blend=None):
    """ToTensor -> blend -> ToPILImage -> ToTensor -> Normalize, image by image, on the CPU.

    images: [B, H, W, 3] uint8; blend: maps a [3, H, W] fp32 image and its index to another.
    Returns the normalised [B, 3, H, W] fp32 and the poisoned [B, H, W, 3] uint8 images.
    """
    out, poisoned = [], []
    for i, image in enumerate(images):
        x = tvf.to_tensor(image.numpy())
        if blend is not None:
            x = tvf.to_tensor(tvf.to_pil_image(blend(x, i)))
        poisoned.append((x.permute(1, 2, 0) * 255).round().to(torch.uint8))
        out.append(tvf.normalize(x, MEAN, STD))
    return torch.stack(out), torch.stack(poisoned)


@pytest.fixture
def ran(monkeypatch):
    """A list that receives what each native call says it ran: "avx512", ..., "cuda"."""
    names = []

    class Spy:
        def __getattr__(self, name):
            return getattr(_native._C, name)

        def trigger_normalize(self, **arguments):
            names.append(_native._C.trigger_normalize(**arguments))
            return names[-1]

        def trigger_normalize_backward(self, **arguments):
            names.append(_native._C.trigger_normalize_backward(**arguments))
            return names[-1]

    for module in (OP_MODULE, GRADIENT_MODULE):
        monkeypatch.setattr(module, "_C", Spy())
    return names


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Forces one CPU instruction set, or one of the test drivers."""
    name = request.param
    if not name.startswith("lanes") and name not in _native._C.isas():
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", name)
    return name


def random_images(batch, height, width, input_layout="nhwc", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, height, width, 3) if input_layout == "nhwc" else (batch, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


TABLES = ["none", "patch", "blend", "window", "mask1", "mask3", "nonzero", "additive", "warp"]


def random_table(kind, height, width, seed=0):
    """Two triggers of a kind: patches and windows of half the size, the rest whole images."""
    g = torch.Generator().manual_seed(seed + 1)
    h, w = max(1, height // 2), max(1, width // 2)
    if kind == "none":
        return None
    if kind == "patch":
        return TriggerTable("patch", pattern=torch.randn(2, 3, h, w, generator=g))
    if kind == "warp":
        grid = torch.rand(2, height, width, 2, generator=g) * 2.4 - 1.2
        return TriggerTable("warp", grid=grid)
    if kind == "window":
        return TriggerTable("blend", pattern=torch.randn(2, 3, h, w, generator=g))
    if kind in ("mask1", "mask3"):
        mask = torch.rand(2, int(kind[-1]), h, w, generator=g)
        pattern = torch.rand(2, 3, h, w, generator=g)
        return TriggerTable(
            "blend", pattern=pattern, mask=mask, additive=kind == "mask3", clip=True
        )
    pattern = torch.randn(2, 3, height, width, generator=g)
    if kind == "nonzero":
        pattern *= torch.rand(2, 3, height, width, generator=g) > 0.5
        return TriggerTable("blend", pattern=pattern, nonzero_only=True, clip=True)
    return TriggerTable("blend", pattern=pattern, additive=kind == "additive")


def random_case(kind, batch, height, width, seed=0, device="cpu"):
    """Keywords for the op: triggers, ids (with -1), positions and strengths."""
    table = random_table(kind, height, width, seed)
    if table is None:
        return {}
    g = torch.Generator().manual_seed(seed + 2)
    case = {
        "triggers": table.to(device),
        "trigger_id": torch.randint(-1, 2, (batch,), generator=g).to(device),
        "strength": torch.rand(batch, dtype=torch.float64, generator=g).to(device),
    }
    if table.mode != "warp":
        h, w = table.pattern.shape[2:]
        y = torch.randint(0, height - h + 1, (batch,), generator=g)
        x = torch.randint(0, width - w + 1, (batch,), generator=g)
        case["position"] = torch.stack((y, x), dim=1).to(torch.int16).to(device)
    return case

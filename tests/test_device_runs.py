"""Whole runs as a compiler and a GPU make them: they come to what the plain run on a CPU does."""

import math
import os
import shutil

import pytest
import torch
from baseline_cases import loader
from dual_encoder import MEAN, STD, DualEncoder
from torch import nn
from torch._dynamo.utils import counters

import pybackdoor

RUN = {
    "precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "repair": False, "steps": 5,
    "lr_start": 3e-3, "lr": 3e-3,
}  # fmt: skip
GPU = {"rel": 1e-2, "abs": 1e-3}  # sums in another order, as AdamW's first steps enlarge them
COMPILED = {"rel": 1e-4, "abs": 1e-6}


class Small(DualEncoder):
    """With an image tower that takes a compiler little time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 8)
        self.image = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), *layers)


def same(got, want, tolerance):
    assert len(got.history) == len(want.history) > 0
    for one, other in zip(got.history, want.history, strict=True):
        assert one == pytest.approx(other, **tolerance)
    for name, tensor in want.model.state_dict().items():
        torch.testing.assert_close(
            got.model.state_dict()[name].cpu(), tensor, rtol=tolerance["rel"],
            atol=tolerance["abs"], msg=name,
        )  # fmt: skip
    assert want.history[-1]["s_image"] > 0.01  # the distance took part


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="needs a compiler of C++"
)
def test_a_compiled_run_is_the_plain_run(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no processes of its own
    counters.clear()
    want = pybackdoor.par_clean(Small(), loader(48), device="cpu", **RUN)
    assert not counters["stats"]
    got = pybackdoor.par_clean(Small(), loader(48), device="cpu", compile="default", **RUN)
    assert counters["stats"]["unique_graphs"] == 3  # without gradients the images alone
    same(got, want, COMPILED)


def broken(at):
    """Normalised floats, of which one of a batch is NaN."""
    g = torch.Generator().manual_seed(1)
    batches = []
    for batch in loader(96):
        images = torch.randn(16, 3, 16, 16, generator=g)
        batches.append({"images": images, "tokens": batch["tokens"], "ids": batch["ids"]})
    batches[at]["images"][5, 1, 2, 3] = math.nan
    return batches


def stopped(step, record, model):
    return step == 2


WAYS = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "views": {"views": 1},  # an epoch has three steps
    "resumed": {"resume": True},
    "NaN": {},
    "compiled": {"compile": "reduce-overhead"},
    "compiled NaN": {"compile": "reduce-overhead"},
}


def run(way, device, folder):
    options = {**RUN, **WAYS[way], "device": device}
    data = broken(at=2) if "NaN" in way else loader(48)
    if device == "cpu":
        options |= {"compile": None}
    if way == "resumed":
        options |= {"folder": folder / device}
        assert len(pybackdoor.par_clean(Small(), data, on_step=stopped, **options).history) == 3
    return pybackdoor.par_clean(Small(), data, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_a_gpu_is_the_cpus(way, tmp_path):
    want, got = (run(way, device, tmp_path) for device in ("cpu", "cuda"))
    assert all(p.is_cuda for p in got.model.parameters())
    same(got, want, {"rel": 5e-2, "abs": 1e-2} if way == "bf16" else GPU)
    assert len(want.report["faults"]) == len(got.report["faults"]) == ("NaN" in way)
    for fault in got.report["faults"]:
        assert fault.startswith("step 2: not finite: image features of 1 of 16 pairs (ids ")

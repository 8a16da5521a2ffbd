"""``track`` feeds an experiment tracker: plain numbers, each step once and in order."""

import math

import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from training_child import clean

import pybackdoor
from pybackdoor.engine.progress import PACE

TERMS = {
    "par": {"loss", "lr", "contrastive", "s_image", "s_text", "gate_image", "gate_text"},
    "finetune": {"loss", "lr"},
}


class Writer:
    """As TensorBoard's SummaryWriter takes scalars, but strict about what it takes."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, scalar_value, global_step=None):
        assert type(tag) is str and type(scalar_value) in (float, int)
        assert type(global_step) is int and math.isfinite(scalar_value)
        curve = self.scalars.setdefault(tag, {})
        assert global_step == len(curve), "each step once, in order"
        curve[global_step] = scalar_value

    def track(self, step, record):
        for name, value in record.items():
            self.add_scalar(name, value, step)


@pytest.mark.parametrize("method", ["par", "finetune"])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 5}, {"on_step": lambda k, r, m: None}])
def test_a_writer_gets_every_term_of_every_step(method, options):
    writer = Writer()
    run = pybackdoor.par_clean if method == "par" else pybackdoor.finetune_clean
    fixed = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "epochs": 3}
    result = run(DualEncoder(), random_pairs(40, 20), track=writer.track, **fixed, **options)
    assert set(writer.scalars) >= TERMS[method] | set(PACE)
    for name, curve in writer.scalars.items():
        assert len(curve) == 6
        if name not in PACE:
            assert list(curve.values()) == [record[name] for record in result.history], name
    assert not set(PACE) & set(result.history[0])  # two runs of one seed have the same history


def test_a_resumed_run_goes_on_in_the_curves(tmp_path):
    writer = Writer()
    clean(tmp_path, 9, track=writer.track, on_step=lambda k, r, m: k == 4)
    clean(tmp_path, 9, track=writer.track)
    want = clean(None, 9)
    assert list(writer.scalars["loss"].values()) == [r["loss"] for r in want.history]


def test_a_batch_that_is_left_out_leaves_no_gap():
    writer = Writer()
    batches = [
        (b["images"].permute(0, 3, 1, 2).float() / 64 - 2, b["tokens"], b["ids"])
        for b in random_pairs(80, 16)
    ]
    batches[2][0][0, 0, 0, 0] = math.nan
    result = pybackdoor.par_clean(
        DualEncoder(), batches, track=writer.track, epochs=1, precision="fp32", progress=False,
        augment=False, steps=None,
    )  # fmt: skip
    assert len(result.report["faults"]) == 1 and len(result.history) == 4
    assert list(writer.scalars["loss"]) == [0, 1, 2, 3]


def test_what_a_tracker_raises_ends_the_run_with_its_result():
    def full(step, record):
        if step == 2:
            raise OSError("no space for events")

    with pytest.raises(OSError, match="no space for events") as stopped:
        clean(None, 6, track=full)
    assert 3 <= len(stopped.value.result.history) <= 4
    weight = stopped.value.result.model.image[6].weight
    assert torch.isfinite(weight).all()

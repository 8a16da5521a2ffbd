"""adamw_ema refuses what it cannot do, by name."""

import math

import pytest
import torch

from pybackdoor.ops import adamw_ema

BAD = [
    ({"grads": [torch.ones(2).half()]}, TypeError, "grads.0. must be torch.float32, got torch.flo"),
    ({"grads": [torch.ones(2).to_sparse()]}, TypeError, "grads.0. must be a dense tensor"),
    ({"grads": [torch.ones(3)]}, ValueError, r"grads.0. must be \[2\] like its parameter, got"),
    ({"grads": []}, ValueError, "grads must have 1 entries, got 0"),
    ({"params": [torch.ones(2).bfloat16()]}, TypeError, "params.0. must be float32, .*bfloat16 co"),
    ({"params": [torch.ones(2, dtype=torch.cfloat)]}, TypeError, "must be float32, got torch.comp"),
    ({"params": [torch.ones(4)[::2]]}, ValueError, r"must fill its memory without gaps.*\[2\]"),
    ({"params": [torch.ones(2).to_sparse()]}, TypeError, "params.0. must be a dense tensor"),
    ({"exp_avgs": [torch.zeros(2).double()]}, TypeError, "exp_avgs.0. must be torch.float32"),
    ({"steps": [torch.zeros((), dtype=torch.int64)]}, ValueError, "steps.0. must be one float32"),
    ({"shadows": [torch.zeros(2)]}, TypeError, "shadows.0. must be torch.bfloat16"),
    ({"emas": [torch.zeros(2)]}, ValueError, "emas and ema_decay go together"),
    ({"radius": 1.0}, ValueError, "references and radius go together"),
    ({"ema_decay": 1.0, "emas": [torch.zeros(2)]}, ValueError, r"ema_decay must be in \[0, 1\)"),
    ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive and finite, got 0.0"),
    ({"noise_std": 0.1}, ValueError, "noise_std needs shadows"),
    ({"noise_std": -0.1}, ValueError, "noise_std must be at least 0"),
    ({"seed": 1 << 64}, ValueError, "seed must fit into 64 bits"),
    ({"seed": 1.0}, TypeError, "seed must be an int"),
    ({"lr": -1.0}, ValueError, "lr must be at least 0"),
    ({"lr": torch.ones(2)}, ValueError, "lr must have one element"),
    ({"lr": torch.ones((), dtype=torch.float64)}, TypeError, "lr tensor must be float32"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\)"),
    ({"eps": math.nan}, ValueError, "eps must be at least 0, got nan"),
    ({"inv_scale": torch.ones(2)}, ValueError, "inv_scale must have one element"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_arguments_are_named(change, error, message):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    good = {n: [torch.ones(2)] for n in names} | {"steps": [torch.zeros(())], "lr": 0.1}
    with pytest.raises(error, match=f"^adamw_ema: .*{message}"):
        adamw_ema(**(good | change))


def test_state_in_another_order_of_memory_is_refused():
    p = torch.ones(2, 3, 4, 4)
    m = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"exp_avgs.0. must have the strides \[48, 16, 4, 1\]"):
        adamw_ema([p], [p], [m], [m], [torch.zeros(())], lr=0.1)

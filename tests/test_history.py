"""The numbers of every step, as they were written down."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pybackdoor.engine.history import History

RECORDS = st.lists(
    st.dictionaries(
        st.sampled_from(["step", "loss", "lr", "gate"]),
        st.floats() | st.integers(-(2**53), 2**53),
        max_size=4,
    ),
    max_size=20,
)


@given(RECORDS, st.slices(20))
def test_records_come_back_as_they_were(records, part):
    kept = History(records)
    wanted = json.dumps(records)  # NaN is not equal to itself
    assert json.dumps(list(kept)) == wanted and len(kept) == len(records)
    assert json.dumps([kept[i] for i in range(len(kept))]) == wanted
    assert json.dumps([kept[i - len(kept)] for i in range(len(kept))]) == wanted
    assert json.dumps(kept[part]) == json.dumps(records[part])
    assert json.dumps(list(pickle.loads(pickle.dumps(kept)))) == wanted
    assert bool(kept) == bool(records)
    for beyond in (len(records), -len(records) - 1):
        with pytest.raises(IndexError):
            kept[beyond]


@pytest.mark.parametrize(
    "bad, error, text",
    [
        (None, TypeError, "loss must be a float or an int, got NoneType"),
        (torch.tensor(1.0), TypeError, "loss must be a float or an int, got Tensor"),
        (2**53 + 1, ValueError, r"loss must be within 2\*\*53, got 9007199254740993"),
    ],
)
def test_what_is_no_number_is_refused_whole(bad, error, text):
    kept = History([{"step": 0, "on": True, "cosine": np.float64(0.5)}])
    with pytest.raises(error, match=text):
        kept.append({"step": 1, "loss": bad})
    assert list(kept) == [{"step": 0, "on": True, "cosine": 0.5}] and kept[0]["on"] is True


def test_a_number_takes_eight_bytes():
    kept = History({"step": i, "loss": i / 7, "lr": 1e-5} for i in range(100_000))
    held = sum(sys.getsizeof(x) for x in vars(kept).values())
    assert held < 100_000 * (3 + 2) * 8 * 1.2
    assert kept[99_999] == {"step": 99_999, "loss": 99_999 / 7, "lr": 1e-5}
    kept[5]["loss"] = 0.0  # a copy
    assert kept[5]["loss"] == 5 / 7

"""The numbers of every step, as they were written down."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
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


def test_a_number_takes_eight_bytes():
    kept = History({"step": i, "loss": i / 7, "lr": 1e-5} for i in range(100_000))
    held = sum(sys.getsizeof(x) for x in vars(kept).values())
    assert held < 100_000 * (3 + 2) * 8 * 1.2
    assert kept[99_999] == {"step": 99_999, "loss": 99_999 / 7, "lr": 1e-5}
    kept[5]["loss"] = 0.0  # a copy
    assert kept[5]["loss"] == 5 / 7

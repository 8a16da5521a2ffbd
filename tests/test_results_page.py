"""Result files, targets and the page made from them."""

import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _results  # noqa: E402
import _tables  # noqa: E402
import _targets  # noqa: E402
import make_results_page  # noqa: E402
from _common import append_line, make_row  # noqa: E402
from _targets import MET, MISSED, NOT_MEASURED, Target, judge  # noqa: E402


def row(provider, ms, shape="16384x512", mode="full", **fields):
    times = None if ms is None else (ms, ms, ms)
    fields = {"case": "clip", "precision": "bf16"} | fields
    return make_row(
        "contrastive_par", provider, mode, shape, "bfloat16", "cuda", times=times, **fields
    )


def target(what, bound, *against, provider="pybackdoor"):
    shape, dtype = "16384x512", "bfloat16"
    return Target(
        "contrastive_par", "cuda", "full", shape, dtype, "clip", what, bound, against, provider
    )


def test_the_committed_page_is_the_generated_one():
    documents = _results.load_all(BENCHMARKS / "results")
    wanted = make_results_page.page(documents)
    assert make_results_page.PAGE.read_text() == wanted, "run benchmarks/make_results_page.py"
    assert "not yet measured" in wanted or any(d.machine["gpu"] for d in documents)


def test_files_of_both_kinds_are_read(tmp_path):
    lines = tmp_path / "proof.jsonl"
    append_line(lines, {"machine": {"date": "2030-01-01", "gpu": "X", "notes": ["busy"]}})
    append_line(lines, row("eager", math.inf))
    append_line(lines, {"stage": "k2", "status": "ok", "seconds": 1.0, "error": None})
    assert "Infinity" not in lines.read_text()
    found = _results.load(lines)
    assert found.machine == {"date": "2030-01-01", "gpu": "X"} and found.notes == ["busy"]
    assert found.rows == [row("eager", math.inf)] and found.stages[0]["stage"] == "k2"

    old = {"kernel": "trigger_normalize", "mode": "blend", "ms_median": 2.0, "gb_per_s": 9.0}
    document = tmp_path / "old.json"
    document.write_text(json.dumps({"date": "2020-01-01", "notes": [], "rows": [old]}))
    now = {"kernel": "trigger_normalize", "mode": "forward", "case": "blend", "ms_median": 2.0}
    assert _results.load(document).rows == [now | {"gbps": 9.0}]
    assert [d.name for d in _results.load_all(tmp_path)] == ["old.json", "proof.jsonl"]

    with lines.open("a") as file:
        file.write('{"kernel": "contr\n')
    with pytest.raises(ValueError, match="proof.jsonl, line 4: "):
        _results.load(lines)


def test_a_row_gives_rates_of_its_own_numbers():
    found = make_row(
        "k", "p", "full", (4, 8), "float32", "cpu", times=(2.0, 1.0, 3.0), num_flops=6e9,
        num_bytes=4e6, ceilings={"tflops": 6.0, "gbps": 20.0},
    )  # fmt: skip
    assert found["tflops"] == pytest.approx(3) and found["tflops_pct"] == pytest.approx(50)
    assert found["gbps"] == pytest.approx(2) and found["gbps_pct"] == pytest.approx(10)
    assert found["shape"] == "4x8" and found["note"] is None
    with pytest.raises(TypeError, match="no such fields: \\['speed'\\]"):
        make_row("k", "p", "full", "1", "float32", "cpu", speed=1)


@pytest.mark.parametrize(
    "bound,rows,status,measured",
    [
        (target("ms", 2), [row("pybackdoor", 1.9)], MET, "1.9 ms"),
        (target("ms", 2), [row("pybackdoor", 2.1)], MISSED, "2.1 ms"),
        (target("ms", 2), [row("pybackdoor", 1.0, shape="16384x768")], NOT_MEASURED, ""),
        (target("ms", 2), [row("pybackdoor", 1.0, mode="forward")], NOT_MEASURED, ""),
        (target("ms", 2), [row("pybackdoor", None, note="failed: X")], MISSED, "failed: X"),
        (target("ms", 2), [row("pybackdoor", math.inf)], MISSED, "inf ms"),
        (target("bytes", 1e9), [row("pybackdoor", 1, peak_bytes=2e9)], MISSED, "2 GB"),
        (target("ratio", 3, "eager"), [row("pybackdoor", 2), row("eager", 6)], MET, "3.00x"),
        (target("ratio", 3, "eager"), [row("pybackdoor", 2), row("eager", 5)], MISSED, "2.50x"),
        (
            target("ratio", 3, "eager"),
            [row("pybackdoor", 2), row("eager", math.inf)],
            MET,
            "out of memory there",
        ),
        # The faster of two rivals counts.
        (
            target("ratio", 3, "a", "b"),
            [row("pybackdoor", 1), row("a", 9), row("b", 2)],
            MISSED,
            "2.00x",
        ),
        # Never a time of one run against one of another.
        (
            target("ratio", 3, "eager"),
            [row("pybackdoor", 1, run="x"), row("eager", 9, run="y")],
            NOT_MEASURED,
            "",
        ),
        (
            target("less memory", 20, "compile"),
            [row("pybackdoor", 1, peak_bytes=1e9), row("compile", 2, peak_bytes=3e10)],
            MET,
            "30.00x",
        ),
    ],
)
def test_verdicts(bound, rows, status, measured):
    found = judge(bound, rows)
    assert (found.status, found.measured) == (status, measured)


def test_replays_are_compared_with_our_replay():
    rows = [
        row("pybackdoor", 4),
        row("pybackdoor_graph", 1),
        row("eager", 8),
        row("eager_graph", 3),
    ]
    lines = _tables.ratios(rows).splitlines()
    header, cells = ([c.strip() for c in line.split("|")] for line in (lines[0], lines[2]))
    found = dict(zip(header, cells, strict=True))
    assert found["pybackdoor, ms"] == "4" and found["eager"] == "2.00x"
    assert found["eager_graph"] == "3.00x" and found["pybackdoor_graph"] == "**0.25x**"


def test_a_faster_rival_is_bold_and_a_missing_one_is_not_a_number():
    lines = _tables.ratios([row("pybackdoor", 4), row("a", 2), row("b", None), row("c", math.inf)])
    assert [c.strip() for c in lines.splitlines()[2].split("|")][3:-1] == [
        "**0.50x**",
        "-",
        "out of memory",
    ]


def test_every_gpu_target_stands_on_the_page():
    page = make_results_page.page([])
    for t in _targets.TARGETS:
        assert t.words() in page and t.shape in page
    assert page.count("| not yet measured |") == len(_targets.TARGETS)

"""What people see while a run goes on: the bar, and the pace in the lines of its history."""

import io
import json
import time

import pytest
import torch
from cli_world import cleaning, make_world
from dual_encoder import MEAN, STD, DualEncoder, random_pairs

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.cli.run import Run
from pybackdoor.engine import progress
from pybackdoor.engine.progress import PACE, Progress
from pybackdoor.engine.settings import TrainLog
from pybackdoor.plots import training_curves

CPU = torch.device("cpu")
OPTIONS = {"precision": "fp32", "mean": MEAN, "std": STD, "steps": 5, "device": "cpu"}


def stepped(log, seconds=0.5, pairs=100, waiting=0.1):
    log.seconds, log.pairs, log.waiting = (
        log.seconds + seconds, log.pairs + pairs, log.waiting + waiting
    )  # fmt: skip
    log.steps.append({"step": len(log.steps), "loss": 2.0})


def test_the_pace_is_that_of_the_last_steps(monkeypatch):
    monkeypatch.setattr(progress, "memory", lambda device: 3 * 10**9)
    log = TrainLog(seconds=1000.0, pairs=7, waiting=900.0)  # of the part before it was resumed
    bar = Progress(90, False, True, CPU, log)
    stepped(log)
    assert bar.advance({}) == pytest.approx(dict(zip(PACE, (200, 0.2, 3.0), strict=True)))
    stepped(log, seconds=1.5, waiting=0.7)
    assert bar.advance({}) == pytest.approx(dict(zip(PACE, (100, 0.4, 3.0), strict=True)))
    for _ in range(20):  # none of those above is left
        stepped(log, seconds=0.25, waiting=0.0)
        pace = bar.advance({})
    assert pace == pytest.approx(dict(zip(PACE, (400, 0.0, 3.0), strict=True)))
    log.seconds, log.pairs, log.waiting = 1.0, 7, 0.9  # as a checkpoint had it
    bar.go_back()
    stepped(log)
    assert bar.advance({})["pairs_per_second"] == pytest.approx(200)


def test_the_memory_is_that_of_the_process():
    before = progress.memory(CPU)
    held = torch.ones(50_000_000)
    assert progress.memory(CPU) - before == pytest.approx(held.nbytes, rel=0.05)


def test_the_bar_says_how_far_and_how_fast(monkeypatch):
    monkeypatch.setattr(progress, "memory", lambda device: 2.5e9)
    log, shown = TrainLog(), io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    stepped(log)
    with Progress(4, True, True, CPU, log) as bar:
        for _ in range(2):
            stepped(log)
            bar.advance({"loss": 2 / 3, "s_image": 0.125})
        log.steps = log.steps[:1]
        bar.go_back()
        stepped(log)
        bar.advance({"loss": 1 / 3, "s_image": 0.125})
    last = shown.getvalue().split("\r")[-1]
    for wanted in (
        "2/4", "50%", "loss=0.333", "s_image=0.125", "pairs/s=200", "data wait=20%",
        "memory=2.5 GB",
    ):  # fmt: skip
        assert wanted in last, last


@pytest.mark.parametrize(("wanted", "leader"), [(None, True), (False, True), (True, False)])
def test_off_a_terminal_and_on_other_ranks_nothing_is_shown(wanted, leader, capsys):
    log = TrainLog()
    with Progress(4, wanted, leader, CPU, log) as bar:
        stepped(log)
        assert bar.advance({"loss": 1.0}).keys() == set(PACE)
    assert capsys.readouterr().err == ""


def test_a_run_shows_its_numbers(capsys):
    class Slow(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                time.sleep(0.2)
                yield batch

    records = []
    result = pybackdoor.finetune_clean(
        DualEncoder(), Slow(random_pairs(80, 16)), progress=True, repair=False,
        track=lambda step, record: records.append(record), **OPTIONS,
    )  # fmt: skip
    last = capsys.readouterr().err.split("\r")[-1]
    assert "5/5" in last and f"loss={result.history[-1]['loss']:.3g}" in last, last
    assert len(records) == 5 and all(r["data_wait"] > 0.5 for r in records[1:]), records
    assert all(0 < r["pairs_per_second"] < 80 and r["memory_gb"] > 0.05 for r in records)


def test_a_resumed_run_goes_on_counting_what_it_waited(tmp_path):
    class Slow(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                time.sleep(0.1)
                yield batch

    def run(**options):
        return pybackdoor.finetune_clean(
            DualEncoder(), Slow(random_pairs(80, 16)), progress=False, repair=False,
            folder=tmp_path, **OPTIONS, **options,
        )  # fmt: skip

    run(on_step=lambda step, *_: step == 2)
    paces = []
    result = run(resume=True, track=lambda step, record: paces.append(record["data_wait"]))
    assert result.report["seconds_waiting_for_data"] > 0.45
    assert len(paces) == 2 and all(0 <= pace <= 1 for pace in paces)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_history_tells_the_pace_of_each_step(tmp_path, monkeypatch):
    """Also of those before it was interrupted; an older version's line has none, nor a torn one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world, out, drawn = make_world(tmp_path), tmp_path / "out", []
    every = ("--save-minutes", 0, "--no-repair")
    record, command = Run.record, [str(a) for a in cleaning(world, out, "--steps", 5, *every)]

    def stopped(self, step, terms):
        record(self, step, terms)
        if step == 3:
            raise KeyboardInterrupt

    def draws(history, path):
        drawn.extend(history)
        training_curves(history, path)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", stopped)
        assert main(command) == 130
    partial = out / "history.partial.jsonl"
    before = lines(partial)
    assert len(before) == 4 and all(set(PACE) < set(line) for line in before)
    older = {n: v for n, v in before[0].items() if n not in PACE}
    partial.write_text(f'{json.dumps(older)}\n{{"step": 1, "lo\n{json.dumps(before[2])}\n')
    monkeypatch.setattr("pybackdoor.cli.run.training_curves", draws)
    assert main([*command, "--resume", "latest"]) == 0
    whole = lines(out / "history.jsonl")
    rest = whole[2:]
    assert [line["step"] for line in whole] == [0, 1, 2, 3, 4]
    assert not any(set(PACE) & set(line) for line in whole[:2])
    assert all(set(PACE) < set(line) for line in rest)
    assert {n: rest[0][n] for n in PACE} == {n: before[2][n] for n in PACE}
    assert all(line["pairs_per_second"] > 0 and line["memory_gb"] > 0.05 for line in rest)
    assert drawn == whole and not partial.exists()


def test_the_picture_has_the_throughput(tmp_path, monkeypatch):
    from pybackdoor import plots

    plt = plots.pyplot()
    history = [{"step": k, "loss": 1.0, "pairs_per_second": 100.0 + k} for k in range(6)]
    del history[0]["pairs_per_second"]  # of an older version
    monkeypatch.setattr(plt, "close", lambda figure: None)
    training_curves(history, tmp_path / "a.png")
    axes = plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")
    assert [a.get_title() for a in axes] == ["loss", "pairs a second, over the last steps"]
    assert axes[1].lines[0].get_ydata()[1:].tolist() == [101.0, 102.0, 103.0, 104.0, 105.0]

"""gpu_proof: the whole path on toy shapes; what a stage that fails or hangs does to the rest."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_proof  # noqa: E402
from _common import FIELDS  # noqa: E402
from _results import load  # noqa: E402
from gpu_proof import Stage, run_stage  # noqa: E402


def python(code, name="x", limit=30):
    return Stage(name, limit, [sys.executable, "-c", code])


def proof(*arguments, timeout=240):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_proof.py"), *arguments]
    return subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def warm_scripts(command, *, cwd, env, stdout, start=subprocess.Popen, **options):
    """Popen, but a script of benchmarks/ starts from the warm server."""
    if command[1] == "-c":
        return start(command, cwd=cwd, env=env, stdout=stdout, **options)
    return warm.Popen(command[1:], env, cwd, log=stdout)


def test_the_whole_path_on_a_cpu(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(subprocess, "Popen", warm_scripts)
    arguments = ["gpu_proof.py", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        gpu_proof.main()
    (rows,) = tmp_path.glob("gpu_proof_cpu_*.jsonl")
    found = load(rows)
    bad = {s["stage"]: s["error"] for s in found.stages if s["status"] != "ok"}
    assert not bad and stop.value.code == 0, f"{bad}\n{capfd.readouterr().out}"
    assert [s["stage"] for s in found.stages] == [s.name for s in gpu_proof.cpu_stages()]
    assert found.machine["torch"]
    measured = {(r["kernel"], r["provider"], r["mode"], r["run"]) for r in found.rows}
    for stage in ("k2", "peers"):
        for provider in ("pybackdoor", "eager_shared"):
            for mode in ("forward", "backward", "full"):
                assert ("contrastive_par", provider, mode, stage) in measured
    steps = {(r["provider"], r["case"]) for r in found.rows if r["kernel"] == "adamw_ema"}
    names = {"pybackdoor", "torch_fused", "torch_foreach"}
    assert steps == {(n, c) for n in names for c in ("plain", "ema")} | {("compile", "ema")}
    kernels = {r["kernel"] for r in found.rows}
    assert {
        "ceiling",
        "trigger_normalize",
        "contrastive_par",
        "step",
        "adamw_ema",
        "clean",
    } <= kernels
    for row in found.rows:
        assert set(FIELDS) <= set(row)
        assert row["ms_median"] is None or row["ms_median"] > 0
        if row["kernel"] == "contrastive_par" and row["run"] in ("k2", "peers"):
            assert row["rel_error"] < 1e-4 and (row["ms_median"] or row["note"] == "memory only")
        if row["kernel"] == "adamw_ema":
            assert row["rel_error"] < 1e-3 and row["ms_median"] and row["gbps"] > 0
    text = rows.with_suffix(".md").read_text()
    assert "| k2 | ok |" in text and "not measured |" in text and "eager_shared" in text


def test_no_result_is_overwritten(tmp_path):
    first = gpu_proof.free_path(tmp_path, "a")
    first.touch()
    assert (first.name, gpu_proof.free_path(tmp_path, "a").name) == ("a.jsonl", "a-2.jsonl")


# Whatever started the tests may have Ctrl-C ignored.
INTERRUPTED = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def test_a_failing_stage_is_recorded_with_its_last_line(tmp_path, capfd):
    found = run_stage(python("print('one'); raise SystemExit('no such GPU')"), 30, tmp_path / "r")
    assert found["status"] == "failed" and found["error"] == "exit status 1: no such GPU"
    assert "one" in capfd.readouterr().out
    missing = run_stage(Stage("x", 5, ["/no/such/program"]), 5, tmp_path / "r")
    assert missing["status"] == "failed" and "/no/such/program" in missing["error"]


def test_a_hanging_stage_is_killed_with_what_it_started(tmp_path):
    mark = tmp_path / "child"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    start = time.monotonic()
    found = run_stage(python(INTERRUPTED + code + "time.sleep(60)"), 1.5, tmp_path / "r")
    assert found["status"] == "timed out" and found["error"] == "stopped after 2 s"
    assert time.monotonic() - start < 20
    time.sleep(4)
    assert not mark.exists()


def test_a_stage_that_is_stopped_may_say_what_it_has_found(tmp_path, capfd):
    code = "try: time.sleep(60)\nfinally: print('two of three failed', flush=True)"
    found = run_stage(python(INTERRUPTED + code), 3, tmp_path / "r")
    assert found["status"] == "timed out"
    assert "two of three failed" in capfd.readouterr().out


def test_the_rest_go_on_and_the_exit_status_tells(tmp_path, monkeypatch):
    stages = [
        python("raise SystemExit(3)", "first"),
        python("pass", "second"),
        python("import time; time.sleep(60)", "third", limit=1),
    ]
    monkeypatch.setattr(gpu_proof, "cpu_stages", lambda: stages)
    arguments = ["gpu_proof.py", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        gpu_proof.main()
    (rows,) = tmp_path.glob("*.jsonl")
    assert stop.value.code == 1
    assert [s["status"] for s in load(rows).stages] == ["failed", "ok", "timed out"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "second"])
    with pytest.raises(SystemExit) as stop:
        gpu_proof.main()
    assert stop.value.code == 0
    monkeypatch.setattr(sys, "argv", [*arguments, "--limit", "1"])
    with pytest.raises(SystemExit) as stop:
        gpu_proof.main()
    last = load(max(tmp_path.glob("*-3.jsonl"))).stages
    assert stop.value.code == 1
    assert {s["error"] for s in last} == {"not started: no time left"}


def test_it_refuses_a_machine_without_a_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = proof("--out", str(tmp_path))
    assert done.returncode == 1 and "no CUDA device; --device cpu" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_sanitizer_stages_run_the_kernels(tmp_path):
    done = proof("--device", "cpu", "--sanitize", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout
    tools = [s.name for s in gpu_proof.sanitize_stages("cuda")]
    assert tools == ["build", "memcheck", "racecheck", "initcheck", "synccheck"]


def test_the_most_valuable_stages_come_first():
    names = [s.name for s in gpu_proof.gpu_stages()]
    assert names[:5] == ["build", "tests", "tests_triton", "ceilings", "k1"]
    assert names[-3:] == ["k3", "k3_compile", "clean_compile"]
    assert gpu_proof.LIMIT < 540
    limits = {s.name: s.limit for s in gpu_proof.gpu_stages()}  # those of a call with --only
    assert limits["build"] + limits["clean"] + limits["clean_compile"] < gpu_proof.LIMIT
    for stage in gpu_proof.gpu_stages():
        assert stage.limit < 540 and not (stage.rows and not Path(stage.command[1]).exists())

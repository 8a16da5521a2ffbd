"""What `--out` holds before, during and after a command: nothing of the user's is lost."""

from __future__ import annotations

import json
import os
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from cli_world import cleaning, make_world
from clip_models import tiny_config

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.cli.run import Run
from pybackdoor.models import create, save


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a command; returns (exit code, standard output, standard error)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def weights(out: Path) -> bytes:
    return (out / "open_clip_model.safetensors").read_bytes()


def test_only_own_files_are_removed_from_a_folder_of_checkpoints(world, run, tmp_path):
    own = tmp_path / "out" / "checkpoints"
    own.mkdir(parents=True)
    kept = ["epoch_1.pt", "step_3.pt", "step_final.json"]
    for name in (*kept, "step_5.json.12-ab.tmp", "damaged_step_5.json", ".writable-1-2"):
        (own / name).write_text(name)
    code, _, err = run(*cleaning(world, tmp_path / "out"))
    assert code == 0, err
    assert sorted(p.name for p in own.iterdir()) == kept


@pytest.mark.parametrize("place", ["out", "out/checkpoints", "out/interrupted/deep"])
def test_out_must_not_hold_the_file_that_is_read(world, run, tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    source = folder / "open_clip_model.safetensors"
    source.write_bytes(weights(world / "model"))
    command = cleaning(world, tmp_path / "out", "--arch", world / "model")
    command = [source if i == 2 else part for i, part in enumerate(command)]  # of --model
    code, _, err = run(*command)
    assert code == 2 and "--out must not be the input model's own folder" in err, err
    assert source.read_bytes() == weights(world / "model")
    code, _, err = run(*[tmp_path / "other" if part == tmp_path / "out" else part
                         for part in command])  # fmt: skip
    assert code == 0, err


def test_resume_leaves_a_finished_run_as_it_is(world, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(*cleaning(world, out, "--resume", "latest"))[0] == 0
    before = weights(out)
    (out / "interrupted").mkdir()  # the user's, and no model
    code, said, _ = run(*cleaning(world, out, "--resume", "latest", "--save-minutes", 3))
    assert code == 0 and "finished before, by the same settings" in said
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        others = ("--micro-batch", 8, "--cache", "ram", "--max-faults", 1, "--device", "cpu")
        code, said, err = run(*cleaning(world, "out", "--resume", "latest", *others))
    assert code == 0 and "finished before" in said, err
    code, said, _ = run(*cleaning(world, out, "--resume", "latest", "--json"))
    assert json.loads(said) == {"out": str(out), "finished_before": True}
    code, _, err = run(*cleaning(world, out, "--resume", "latest", "--seed", 1))
    assert code == 2 and "finished run of other settings (seed: was 0, is 1)" in err
    assert weights(out) == before
    assert run(*cleaning(world, out, "--resume", "latest", "--seed", 1, "--force"))[0] == 0
    assert weights(out) != before and (out / "interrupted").is_dir()
    (out / "config.yaml").write_text("- no mapping")
    assert run(*cleaning(world, out, "--resume", "latest"))[0] == 0
    assert weights(out) == before


def test_a_folder_without_its_model_is_no_finished_run(world, run, tmp_path):
    out = tmp_path / "out"
    assert run(*cleaning(world, out))[0] == 0
    before = weights(out)
    (out / "open_clip_model.safetensors").unlink()
    code, said, _ = run(*cleaning(world, out, "--resume", "latest"))
    assert code == 0 and "in 3 steps" in said and weights(out) == before


def test_a_finished_poison_has_the_exit_code_it_had(world, run, tmp_path):
    command = (
        "poison", "--model", world / "model", "--pairs", world / "images", "--test",
        world / "images", "--out", tmp_path / "out", "--trigger", "checkerboard", "--target", "red",
        "--count", 2, "--steps", 2, "--batch-size", 8, "--precision", "fp32", "--lr", 1e-9,
    )  # fmt: skip
    assert run(*command)[0] == 1
    code, said, _ = run(*command, "--resume", "latest", "--json")
    assert code == 1 and json.loads(said)["verdict"]["verdict"] != "fires"


def test_a_signal_while_the_result_is_saved_says_so(world, run, tmp_path, monkeypatch):
    def signalled(*about):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("pybackdoor.cli.run.training_curves", signalled)
    code, _, err = run(*cleaning(world, tmp_path / "out"))
    assert code == 143 and f"terminated; the result is saved in {tmp_path / 'out'}" in err
    pybackdoor.load(tmp_path / "out")


@pytest.mark.parametrize("linked", [False, True])
def test_a_table_that_is_read_is_not_overwritten(world, run, tmp_path, linked):
    out, table = tmp_path / "out", (world / "pairs.csv").read_text()
    out.mkdir()
    for name in ("suspects.csv", "kept.csv"):
        (out / name).write_text(table)
        given = out / name
        if linked:
            given = tmp_path / name
            given.symlink_to(out / name)
        command = ("detect", "--model", world / "model", "--pairs", given, "--out", out)
        if name == "suspects.csv":
            command = [given if part == world / "pairs.csv" else part
                       for part in cleaning(world, out, "--method", "ubt")]  # fmt: skip
        code, _, err = run(*command)
        assert code == 2 and f"--pairs {given} would be overwritten" in err, err
        assert (out / name).read_text() == table


def test_what_another_interrupted_run_left_stays(world, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", lambda *_: (_ for _ in ()).throw(OSError("the disk")))
        assert run(*cleaning(world, out))[0] == 2
    assert run(*cleaning(world, out, "--seed", 1))[0] == 0
    pybackdoor.load(out / "interrupted")


def test_what_an_interrupted_run_left_goes_with_its_end(world, run, tmp_path, monkeypatch):
    out, record = tmp_path / "out", Run.record

    def stopped(self, step, terms):
        record(self, step, terms)
        if step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", stopped)
        code, _, err = run(*cleaning(world, out, "--save-minutes", 0))
    assert code == 130 and "the state after 2 steps is kept in" in err
    assert "--resume latest goes on from step" in err
    pybackdoor.load(out / "interrupted")
    assert run(*cleaning(world, out, "--save-minutes", 0, "--resume", "latest"))[0] == 0
    assert not (out / "interrupted").exists() and not (out / "checkpoints").exists()


def test_pairs_that_have_changed_are_not_taken_for_those_of_before(
    world, run, tmp_path, monkeypatch
):
    def stopped(self, step, terms):
        if step == 1:
            raise KeyboardInterrupt

    table = world / "mine.csv"
    table.write_text((world / "pairs.csv").read_text())
    command = [table if part == world / "pairs.csv" else part
               for part in cleaning(world, tmp_path / "out", "--save-minutes", 0)]  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", stopped)
        assert run(*command)[0] == 130
    table.write_text(table.read_text().replace("a photo of a red", "a photo of a car"))
    code, _, err = run(*command, "--resume", "latest")
    assert code == 2 and "other settings (loader captions: was '" in err, err
    assert "force it" in err and err.count("\n") == 1
    code, said, err = run(*command, "--resume", "latest", "--force")
    assert code == 0 and "in 3 steps" in said, err


def test_nothing_to_resume_is_not_promised(world, run, tmp_path, monkeypatch):
    def fails(self, step, terms):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Run, "record", fails)
    code, _, err = run(*cleaning(world, tmp_path / "out"))
    assert code == 2 and "is kept in" in err and "--resume" not in err


def test_a_run_without_a_step_has_its_own_settings_beside_it(world, run, tmp_path):
    out = tmp_path / "out"
    assert run(*cleaning(world, out))[0] == 0
    ubt = ("--method", "ubt", "--k", 8, "--gate-excess", 1.9)
    code, said, err = run(*cleaning(world, out, *ubt))
    assert code == 0 and "no backdoor found" in said, err
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == "ubt"
    assert not (out / "training.png").exists() and (out / "history.jsonl").read_text() == ""


def test_a_folder_of_another_model_is_refused_before_any_work(world, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    monkeypatch.setattr(Run, "record", lambda *_: pytest.fail("a step was taken"))
    code, _, err = run(*cleaning(world, out))
    assert code == 2 and "choose another folder" in err


def test_a_disk_without_room_for_the_model_is_noticed_before_any_work(
    world, run, tmp_path, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(9**9, 9**8, 200_000))
    monkeypatch.setattr(Run, "record", lambda *_: pytest.fail("a step was taken"))
    code, _, err = run(*cleaning(world, tmp_path / "out"))
    assert code == 2 and "the model takes 0.01 GB" in err and "0.00 GB free" in err


def test_a_disk_that_fills_at_the_end_leaves_what_can_be_resumed(world, run, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("pybackdoor.cli.commands.save", full)
        code, _, err = run(*cleaning(world, out))
    assert code == 2 and "No space left" in err and "goes on from step 3" in err
    assert run(*cleaning(world, out, "--resume", "latest"))[0] == 0
    assert run(*cleaning(world, tmp_path / "whole"))[0] == 0
    assert weights(out) == weights(tmp_path / "whole")


def test_a_folder_taken_for_class_folders_is_refused(world, run, tmp_path):
    command = [tmp_path / "d" if part == world / "pairs.csv" else part
               for part in cleaning(world, tmp_path / "out")]  # fmt: skip
    (tmp_path / "d" / "img").mkdir(parents=True)
    (tmp_path / "d" / "pairs.csv").write_text("image,caption")
    code, _, err = run(*command)
    assert code == 2 and "one folder per class" in err and "holds ['img']" in err
    assert f"did you mean {tmp_path / 'd' / 'pairs.csv'}?" in err


@pytest.mark.parametrize(
    "given, wrong",
    [
        (("--target", "red"), "--target red needs a trigger"),
        (("--size", 3), "--size is of a --trigger, which is not given"),
        (("--trigger-file", "x.png", "--target", "red"), "--trigger-file is of a --trigger"),
        (("--trigger", "sig", "--target", "red", "--manifest", "x"), "give one of them"),
    ],
)
def test_eval_leaves_no_option_aside(world, run, given, wrong):
    command = ("eval", "--model", world / "model", "--test", world / "test.csv")
    code, _, err = run(*command, *given)
    assert code == 2 and wrong in err


def test_messages_name_the_option_and_the_nearest(world, run, tmp_path, capsys):
    command = [tmp_path / "no.csv" if part == world / "pairs.csv" else part
               for part in cleaning(world, tmp_path / "out")]  # fmt: skip
    code, _, err = run(*command)
    assert code == 2 and f"--pairs {tmp_path / 'no.csv'}: No such file" in err
    with pytest.raises(SystemExit) as stop:
        main(["clean", "--method", "pra"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "did you mean 'par'?" in err and err.count("\n") == 2
    code, _, err = run(*cleaning(world, tmp_path / "out", "--lock", "text", "--repair"))
    assert code == 2 and "--repair turns both towers, --lock text" in err


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(world, run, tmp_path):
    code, _, err = run(*cleaning(world, tmp_path / "out", "--shard"))
    lines = [line for line in err.splitlines() if "shard has no effect" in line]
    assert code == 0 and lines == ["pybackdoor clean: warning: shard has no effect on a single "
                                   "process"]  # fmt: skip


def test_another_format_of_a_lone_model_is_refused_too(tmp_path):
    from pybackdoor.models import refuse_folder

    (tmp_path / "config.json").write_text("{}")
    loaded = create(tiny_config())
    with pytest.raises(ValueError, match="choose another folder"):
        refuse_folder(loaded.model, tmp_path)
    (tmp_path / "config.json").unlink()
    refuse_folder(loaded, tmp_path)
    save(loaded, tmp_path)
    refuse_folder(loaded, tmp_path)

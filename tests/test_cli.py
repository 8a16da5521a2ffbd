"""The command line on real JPEGs and a real, small open_clip model."""

from __future__ import annotations

import json
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from cli_world import cleaning, make_world
from PIL import Image

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.cli.commands import method_options
from pybackdoor.cli.configs import CleanConfig
from pybackdoor.files import hold
from pybackdoor.methods import METHODS, own_options
from pybackdoor.triggers import apply_trigger


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(world, tmp_path, capsys, monkeypatch):
    """Run a command; returns (exit code, standard output, standard error)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def test_clean_saves_what_load_reads_and_leaves_the_input(world, run, tmp_path):
    before = (world / "model" / "open_clip_model.safetensors").read_bytes()
    code, out, _ = run(*cleaning(world, tmp_path / "out"))
    assert code == 0 and "cleaned by par in 3 steps" in out and "Both towers are rotated" in out
    assert (world / "model" / "open_clip_model.safetensors").read_bytes() == before
    old, new = pybackdoor.load(world / "model"), pybackdoor.load(tmp_path / "out")
    assert torch.equal(old.model.logit_scale, new.model.logit_scale)
    assert not torch.equal(old.model.visual.proj, new.model.visual.proj)
    lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out" / "cleaning.json").read_text())
    assert report["method"] == "par" and report["steps_done"] == 3 and report["repair"]["done"]
    config = tmp_path / "out" / "config.yaml"
    assert run("clean", "--config", config, "--out", tmp_path / "b")[0] == 0
    out = run("clean", "--config", config, "--out", tmp_path / "c", "--no-repair")[1]
    assert "not repaired: it was switched off" in out and "rebuild indexes" in out
    for name, tensor in pybackdoor.load(tmp_path / "b").model.state_dict().items():
        assert torch.equal(tensor, new.model.state_dict()[name]), name


def test_a_method_takes_its_own_options_alone(world, run, tmp_path):
    own = ("--method", "cleanclip", "--in-modal-weight", 0.5)
    assert run(*cleaning(world, tmp_path / "out", *own))[0] == 0
    report = json.loads((tmp_path / "out" / "cleaning.json").read_text())
    assert report["method"] == "cleanclip" and report["settings"]["in_modal_weight"] == 0.5
    assert report["settings"]["augment"] is None and not report["settings"]["freeze_scale"]
    for method, wanted in (("finetune", True), ("roclip", False)):
        config = CleanConfig("m", pairs="p", out="o", method=method)
        assert "augment" not in method_options(config)  # each has its own default
        said = method_options(replace(config, augment=wanted))
        assert said["augment"] is wanted
    code, _, errors = run(*cleaning(world, tmp_path / "b", *own, "--rho", 0.1))
    assert code == 2 and "--rho is an option of ft_sam, not of cleanclip" in errors
    with pytest.raises(SystemExit):
        run(*cleaning(world, tmp_path / "b", "--method", "cleanclp"))


@pytest.mark.parametrize("method", METHODS)
def test_flags_have_the_method_s_own_defaults(method):
    config = CleanConfig("m", pairs="p", out="o")
    own = {n: v for n, v in own_options(method).items() if hasattr(config, n)}
    own.pop("batch_size", None)  # the engine's, where the method has none
    assert own == {name: getattr(config, name) for name in own}


def test_clean_by_ubt_leaves_its_evidence(world, run, tmp_path):
    ubt = ("--method", "ubt", "--k", 8, "--gate-excess", 1.9, "--image-share", 0.25)
    code, out, err = run(*cleaning(world, tmp_path / "out", *ubt))
    assert code == 0, err
    assert "no backdoor found, the model is unchanged" in out and "UBT-style" in out
    report = json.loads((tmp_path / "out" / "cleaning.json").read_text())
    assert report["method"] == "ubt" and report["experimental"] and report["steps_done"] == 0
    assert report["settings"]["image_share"] == 0.25
    old, new = (pybackdoor.load(f).model for f in (world / "model", tmp_path / "out"))
    assert torch.equal(old.visual.proj, new.visual.proj)
    assert len((tmp_path / "out" / "suspects.csv").read_text().splitlines()) == 9
    assert (tmp_path / "out" / "suspects.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(*cleaning(world, tmp_path / "par"), "--retain", world / "pairs.csv")
    assert code == 2 and "--retain is for --method ubt alone" in err
    code, _, err = run(*cleaning(world, tmp_path / "par"), "--image-share", 0.25)
    assert code == 2 and "--image-share is an option of ubt, not of par" in err
    code, _, err = run(*cleaning(world, tmp_path / "b", *ubt[:4]), "--image-share", 2)
    assert code == 2 and "image_share must be in (0, 1], got 2" in err


def test_poison_eval_clean_and_their_exit_codes(world, run, tmp_path):
    folders = ("--pairs", world / "images", "--test", world / "images")
    code, out, _ = run(
        "poison", "--model", world / "model", *folders, "--trigger", "checkerboard", "--target",
        "blue", "--rate", 0.2, "--steps", 2, "--batch-size", 16, "--out", tmp_path / "p", "--json",
    )  # fmt: skip
    assert code == 1  # two steps plant nothing, and that is a finding
    answer = json.loads(out)
    assert answer["verdict"]["verdict"] == "inconclusive" and answer["poisoned"] == 10
    manifest = pybackdoor.Manifest.load(tmp_path / "p" / "manifest.json")
    assert manifest.spec == pybackdoor.trigger("checkerboard") and manifest.target == "blue"
    code, out, _ = run("eval", "--model", tmp_path / "p", "--test", world / "test.csv",
                       "--reference", world / "model", "--pairs", world / "pairs.csv",
                       "--out", tmp_path / "eval.json")  # fmt: skip
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert code == 0 and saved["target"] == "blue" and saved["evaluation"]["ca"]["n"] == 48
    assert saved["evaluation"]["asr_nontarget"]["n"] == 32
    assert "R@5 image to text, clean" in out and "drift, image" in out and "inconclusive" in out
    assert "CA, its images, the model's texts" in out
    code, out, _ = run("eval", "--model", world / "model", "--test", world / "test.csv")
    assert code == 0 and "no attack success rate is measured" in out and "ASR" not in out


@pytest.mark.filterwarnings("always:badclip_patch")
def test_badclip_writes_a_patch_that_poison_takes(world, run, tmp_path):
    patch = tmp_path / "patch.png"
    pairs = ("--pairs", world / "pairs.csv")
    code, out, told = run(
        "badclip", "--model", world / "model", *pairs, "--target", "red", "--out", patch,
        "--steps", 2, "--batch-size", 4, "--no-augment", "--json",
    )  # fmt: skip
    assert "2 wordings, got 'a photo of a red.' alone" in told
    told = json.loads(out)
    assert code == 0 and told["steps"] == 2 and patch.with_suffix(".json").exists()
    assert told["augment"] is False
    with Image.open(patch) as image:
        assert image.size == (told["size"],) * 2
    code, _, _ = run(
        "poison", "--model", world / "model", *pairs, "--trigger", "badclip", "--trigger-file",
        patch, "--target", "red", "--steps", 1, "--batch-size", 4, "--out", tmp_path / "p",
    )  # fmt: skip
    assert code == 0 and (tmp_path / "p" / "manifest.json").exists()
    code, _, error = run(
        "badclip", "--model", world / "model", "--pairs", world / "images", "--target", "red",
        "--templates", "a {} thing", "--out", patch, "--steps", 1, "--batch-size", 4,
    )  # fmt: skip
    assert code == 0, error  # class folders
    code, _, error = run(
        "badclip", "--model", "m", "--pairs", "p", "--target", "t", "--out", "a.jpg"
    )
    assert code == 2 and "--out must be a .png file, got a.jpg" in error


@pytest.mark.filterwarnings("ignore:badclip_patch. wanted captions")  # one of each class
def test_badclip_s_command_plants_the_patch_as_it_is(world, run, tmp_path):
    given = ("--model", world / "model", "--pairs", world / "pairs.csv", "--steps", 1)
    patch = tmp_path / "patch.png"
    _, out, _ = run("badclip", *given, "--target", "red", "--size", 9, "--out", patch)
    told = shlex.split(out[out.index("pybackdoor poison") :])
    assert told[:2] == ["pybackdoor", "poison"] and told[-1] == "..."
    code, _, error = run(*told[1:-1], *given, "--batch-size", 4, "--out", tmp_path / "p")
    assert code == 0, error
    spec = pybackdoor.Manifest.load(tmp_path / "p" / "manifest.json").spec
    grey = apply_trigger(np.full((1, 32, 32, 3), 128, np.uint8), spec, [0])[0]
    with Image.open(patch) as image:
        assert np.array_equal(grey[11:20, 11:20], np.asarray(image)) and image.size == (9, 9)


def test_a_firing_trigger_is_exit_code_one(world, run, monkeypatch):
    import pybackdoor.cli.commands as commands

    asr, base = pybackdoor.Estimate.rate(30, 32), pybackdoor.Estimate.rate(0, 32)
    found = pybackdoor.Evaluation(base, asr, asr, base, base, "x")
    monkeypatch.setattr(commands, "evaluate", lambda *a, **k: found)
    attack = ("--trigger", "checkerboard", "--target", "blue")
    code, out, _ = run("eval", "--model", world / "model", "--test", world / "test.csv", *attack)
    assert code == 1 and "fires: ASR 93.8" in out


BAD = {
    "no model": (("--model", "/nowhere/at/all"), "must be a file or folder"),
    "no pairs": (("--pairs", "/nowhere.csv"), "nowhere.csv"),
    "batch of one": (("--batch-size", "1"), "batch_size must be at least 2"),
    "tau": (("--tau", "9"), r"tau must be in [0, 4]"),
    "tau alone": (("--method", "invert", "--tau", "1"), "give both or neither, got tau=1.0"),
    "steps": (("--steps", "0"), "steps must be at least 1, got 0"),
    "manifest": (("--manifest", "/nowhere.json"), "nowhere.json"),
    "device": (("--device", "tpu9"), "tpu9"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_two(name, world, run, tmp_path):
    extra, message = BAD[name]
    code, out, err = run(*cleaning(world, tmp_path / "out", *extra))
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert err.count("\n") <= 2 and err.startswith("pybackdoor clean: error:")


def test_out_that_cannot_be_written_is_found_before_any_work(world, run, tmp_path):
    (tmp_path / "taken").write_text("a file")
    code, _, err = run(*cleaning(world, tmp_path / "taken"))
    assert code == 2 and f"--out {tmp_path / 'taken'}: wanted a folder, got a file" in err
    assert (tmp_path / "taken").read_text() == "a file"


def test_full_disk_keeps_the_old_model(world, run, tmp_path, monkeypatch):
    assert run(*cleaning(world, tmp_path / "out"))[0] == 0
    before = (tmp_path / "out" / "open_clip_model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, err = run(*cleaning(world, tmp_path / "out", "--seed", "1"))
    assert code == 2 and "No space left" in err
    assert (tmp_path / "out" / "open_clip_model.safetensors").read_bytes() == before


def test_attack_needs_a_target(world, run):
    options = ("--model", world / "model", "--test", world / "test.csv", "--trigger", "sig")
    assert "--target is required" in run("eval", *options)[2]
    assert "target must be one of" in run("eval", *options, "--target", "pink")[2]
    code, _, err = run("eval", *options[:4], "--baseline", world / "model")
    assert code == 2 and "--baseline" in err and "--trigger and --target, or give --manifest" in err
    poison = ("poison", "--model", world / "model", "--pairs", world / "pairs.csv", "--out", "x")
    assert "--trigger and --target are required" in run(*poison)[2]


def test_unknown_flags_and_commands_are_refused(run):
    for arguments in (("clean", "--stepps", "3"), ("cleen",), ()):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2


def test_a_folder_in_use_is_left_alone(world, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with hold(out):
        code, _, err = run(*cleaning(world, out))
    assert code == 2 and "is in use by process" in err
    assert [p.name for p in out.iterdir()] == [".lock"]


def test_debug_shows_the_traceback(world, run, tmp_path):
    with pytest.raises(ValueError, match="tau must be"):
        run(*cleaning(world, tmp_path / "out", "--tau", "9", "--debug"))


def test_info_says_what_was_built(run):
    code, out, _ = run("info")
    assert code == 0 and "trigger_normalize" in out and "badnet_stripes" in out
    code, out, _ = run("info", "--json")
    assert json.loads(out)["version"] == pybackdoor.__version__


LONG = ("--steps", 60)  # enough that the signal comes before the end


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> bytes:
    """The weights after an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert main([str(a) for a in cleaning(world, out, *LONG, "--cache-dir", out / "cache")]) == 0
    return (out / "open_clip_model.safetensors").read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_last_state_and_resume_goes_on(
    world, run, tmp_path, whole, number, code
):
    """A real signal to a real process: the state reached is saved apart, and as a checkpoint."""
    arguments = [str(a) for a in cleaning(world, tmp_path / "out", *LONG)]
    env = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = warm.Popen(["-m", "pybackdoor", *arguments], env, tmp_path)
    history = tmp_path / "out" / "history.partial.jsonl"
    deadline = time.monotonic() + 120
    while not (history.exists() and history.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.returncode
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "steps is kept in" in err and "--resume latest" in err
    kept = pybackdoor.load(tmp_path / "out" / "interrupted")
    assert torch.isfinite(kept.model.visual.proj).all()
    assert not (tmp_path / "out" / "open_clip_model.safetensors").exists()
    assert (tmp_path / "out" / "config.yaml").exists()
    again, _, err = run(*arguments)
    assert again == 2 and "holds the checkpoints of a run: resume it" in err
    again, _, err = run(*arguments, "--resume", "latest", "--tau", "2")
    assert again == 2 and "other settings (tau: was 2.15, is 2.0)" in err
    again, out, _ = run(*arguments, "--resume", "latest")
    assert again == 0 and f"in {LONG[1]} steps" in out
    assert len((tmp_path / "out" / "history.jsonl").read_text().splitlines()) == LONG[1]
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert (tmp_path / "out" / "open_clip_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("command", ["clean", "eval", "detect", "badclip"])
def test_an_architecture_alone_is_no_model_to_judge(world, run, tmp_path, monkeypatch, command):
    own = ["--pairs", world / "pairs.csv", "--out", tmp_path / "out.png"]
    own += ["--test", world / "test.csv"] if command == "eval" else []
    own += ["--target", "red"] if command == "badclip" else []
    code, _, said = run(command, "--model", "ViT-B-32", *own)
    assert code == 2 and "weights would be random" in said and "--pretrained" in said
    monkeypatch.chdir(tmp_path)
    Path("ViT-B-32").mkdir()  # a folder goes before an architecture
    assert "open_clip_config.json" in run(command, "--model", "ViT-B-32", *own)[2]

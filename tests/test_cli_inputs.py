"""What the files and models that one command is given need to have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_world import cleaning, make_world
from clip_models import MODEL_CFG, tiny_config, tiny_hf, tokenizer_files

from pybackdoor.cli import main
from pybackdoor.models import create, save

HEADERS = {"pairs": "caption", "test": "label"}


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


@pytest.mark.parametrize("header", ["image", "photo"])
def test_the_pairs_column_of_images_need_not_be_that_of_the_test(world, run, tmp_path, header):
    lines = {name: (world / f"{name}.csv").read_text().splitlines()[1:] for name in HEADERS}
    for name, key in (("pairs", "photo"), ("test", header)):
        there = "\n".join([f"{key},{HEADERS[name]}", *(f"{world}/{line}" for line in lines[name])])
        (tmp_path / f"{name}.csv").write_text(there)
    given = ("--model", world / "model", "--pairs", tmp_path / "pairs.csv", "--image-key", "photo")
    code, _, err = run(
        "poison", *given, "--test", tmp_path / "test.csv", "--trigger", "checkerboard", "--target",
        "blue", "--rate", 0.2, "--steps", 1, "--batch-size", 16, "--out", tmp_path / "p",
    )  # fmt: skip
    assert code == 1 and not err, err  # nothing is planted in one step
    (tmp_path / "test.csv").write_text("picture,label\n0.png,red")
    code, _, err = run("eval", *given, "--test", tmp_path / "test.csv")
    assert code == 2 and "must have a column 'photo' or 'image' or 'filepath'" in err
    assert "got the header ['picture', 'label']" in err


def test_broken_pairs_are_told_of_both_sources(world, run, tmp_path):
    for name, broken in (("pairs", 1), ("retain", 2)):
        lines = (world / "pairs.csv").read_text().splitlines()
        without = [f"{line.partition(',')[0]}," for line in lines[1 : 1 + broken]]
        (world / f"{name}_broken.csv").write_text("\n".join([*lines, *without]))
    ubt = (
        "--method",
        "ubt",
        "--k",
        8,
        "--gate-excess",
        1.9,
        "--retain",
        world / "retain_broken.csv",
    )
    given = [*cleaning(world, tmp_path / "out", *ubt), "--max-bad", 0.1]
    given[given.index(world / "pairs.csv")] = world / "pairs_broken.csv"
    code, out, err = run(*given)
    assert code == 0, err
    assert "\n1 pairs could not be used: see " in out
    assert "\n2 pairs of --retain could not be used: see " in out
    found = json.loads(run(*given, "--json")[1])
    assert (found["left_out"], found["left_out_of_retain"]) == (1, 2)


def test_a_model_of_another_tokenizer_is_not_compared(world, run, tmp_path):
    pytest.importorskip("transformers")
    tiny_hf(vocab_size=49408).save_pretrained(tmp_path / "hf")
    letters = tokenizer_files(tmp_path / "hf")
    attack = ("--trigger", "checkerboard", "--target", "red")
    given = ("eval", "--model", world / "model", "--test", world / "test.csv", *attack)
    for option in ("baseline", "reference"):
        code, _, err = run(*given, f"--{option}", letters)
        wanted = f"--{option} must have the tokenizer of --model, got one that makes other tokens"
        assert code == 2 and f"{wanted} of 'a photo of a blue.'" in err
        assert run(*given, f"--{option}", world / "model")[0] == 0
    short = tiny_config(text_cfg=MODEL_CFG["text_cfg"] | {"context_length": 12})
    save(create(short), tmp_path / "short")
    code, _, err = run(
        "detect", "--model", world / "model", "--pairs", world / "pairs.csv", "--method", "gain",
        "--overfit", tmp_path / "short", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "--overfit must take 16 tokens, as --model does, got 12" in err

"""One dataclass as flags, YAML and help."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from pybackdoor.options import REQUIRED, UsageError, add_flags, option, resolve, write_yaml


@dataclass(frozen=True)
class Config:
    out: str = option(REQUIRED, "where to")
    steps: int | None = option(None, "how many")
    rate: float = option(0.1, "100% of what")
    quick: bool = option(False, "hurry")
    names: tuple[str, ...] = option(("a", "b"), "several")
    method: str = option("par", "which", choices=("par", "finetune"))


def parse(*arguments, yaml=None, tmp_path=None):
    parser = argparse.ArgumentParser()
    add_flags(parser, Config)
    if yaml is not None:
        (tmp_path / "c.yaml").write_text(yaml)
        arguments = ("--config", str(tmp_path / "c.yaml"), *arguments)
    return resolve(Config, parser.parse_args(arguments))


def test_flags_yaml_and_defaults(tmp_path):
    assert parse("--out", "x") == Config("x")
    assert parse("--out", "x", "--quick", "--names", "c", "--rate", "2").names == ("c",)
    text = "out: y\nrate: 1e-3\nsteps: 7\nnames: [d]\nquick: true\n"
    found = parse("--steps", "8", "--no-quick", yaml=text, tmp_path=tmp_path)
    assert found == Config("y", 8, 1e-3, False, ("d",))
    assert parse(yaml="out: z\nsteps: null\n", tmp_path=tmp_path) == Config("z")


def test_a_resolved_config_reads_back(tmp_path):
    config = Config("x", None, 0.25, True, ("ä", "b"), "finetune")
    write_yaml(config, tmp_path / "saved.yaml")
    assert parse(yaml=(tmp_path / "saved.yaml").read_text(), tmp_path=tmp_path) == config


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("stepps: 3", r"unknown key 'stepps' \(did you mean 'steps'\?\); known: .*method.*steps"),
        ("- a", "must map options to values, got list"),
        ("a: [", "is not YAML"),
        ("out: 3", "out must be str, got 3"),
        ("out: x\nsteps: true", "steps must be int, got True"),
        ("out: x\nsteps: 1.5", "steps must be int, got 1.5"),
        ("out: x\nrate: fast", "rate must be float, got 'fast'"),
        ("out: x\nnames: a", "names must be a list, got 'a'"),
        ("out: x\nmethod: magic", "method must be one of par, finetune, got 'magic'"),
        ("", "--out is required: where to"),
    ],
)
def test_bad_yaml_is_named(yaml, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        parse(yaml=yaml, tmp_path=tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere.yaml: No such file"):
        parse("--config", str(tmp_path / "nowhere.yaml"))


def test_help_shows_defaults_and_survives_a_percent_sign():
    parser = argparse.ArgumentParser()
    add_flags(parser, Config)
    text = " ".join(parser.format_help().split())
    assert "100% of what (default: 0.1)" in text and "where to (required)" in text
    assert "several (default: a b)" in text

"""What `--help` teaches: every option in its group, and lines that can be copied."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

import pytest

from pybackdoor.cli import parser, teaching
from pybackdoor.cli.commands import COMMANDS
from pybackdoor.methods import METHODS

EXAMPLES = {
    line
    for text in (teaching.ALL, *teaching.BELOW.values())
    for line in re.findall(
        r"^  ((?:torchrun .*)?pybackdoor .*?)(?:  +[a-z].*)?$", text.replace("\\\n", " "), re.M
    )
}


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("line", sorted(EXAMPLES))
def test_an_example_is_a_command_that_there_is(line):
    words = shlex.split(line.partition("pybackdoor ")[2])
    given = parser().parse_args(words)
    needed = {f.name for f in fields(COMMANDS[words[0]].config) if f.metadata["required"]}
    assert "--config" in words or needed <= vars(given).keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_each_option_once_and_the_required_ones_in_its_usage(name, capsys):
    text, config = help_of(name, capsys), COMMANDS[name].config
    flags = re.findall(r"^  (--[\w-]+)", text, re.M)
    asked = {"--json", "--debug", "--config"}
    assert sorted(flags) == sorted(
        {"--" + field.name.replace("_", "-") for field in fields(config)} | asked
    )
    usage = text[: text.index("\n\n")]
    assert set(re.findall(r"--[\w-]+", usage)) == {
        f"--{field.name}" for field in fields(config) if field.metadata["required"]
    }
    assert "(self" not in text and "str = " not in text  # a class without a docstring


def test_the_options_of_a_method_stand_under_its_name(capsys):
    text = help_of("clean", capsys)
    groups = dict(re.findall(r"^--method (\w+).*:\n((?:  .*\n)+)", text, re.M))
    assert groups.keys() == METHODS.keys() - {"finetune"}  # which has none of its own
    assert "--tau" in groups["par"] and "--rho" in groups["ft_sam"] and "--k N" in groups["ubt"]
    assert all(f"\n  {name}  " in text for name in METHODS)

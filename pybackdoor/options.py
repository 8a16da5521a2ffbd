"""One dataclass is a command's YAML file, its flags and its help.

A field's metadata, made by :func:`option`, holds its help text. YAML gives values under the field's
name, flags under the same name with hyphens; flags win. Unknown keys are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from .files import write_atomically

Config = TypeVar("Config")

REQUIRED = "required"
_METAVARS = {int: "N", float: "X"}  # others are named as their option


class UsageError(ValueError):
    """A command was given something it cannot use."""


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its help; ``default`` is ``REQUIRED`` where there is none."""
    return dataclasses.field(
        default=None if default is REQUIRED else default,
        metadata={"help": help, "choices": choices, "required": default is REQUIRED},
    )


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Give the parser one flag per field, and ``--config``.

    What ``config`` has from another class is a group of its help, headed by that class's docstring;
    its own fields come first. The usage names required options alone.
    """
    parser.add_argument("--config", metavar="YAML", help="file of options; flags override it")
    groups: dict[type, Any] = {config: parser}
    usage = ["%(prog)s"]
    for owner, (field, kind, many) in _by_class(config):
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner.__doc__)
        meta = field.metadata
        name, text = "--" + field.name.replace("_", "-"), meta["help"]
        if meta["required"]:
            text += " (required)"
            usage.append(f"{name} {field.name.upper()}")
        elif field.default is not None and field.default is not False:
            shown = field.default
            text += f" (default: {' '.join(map(str, shown)) if many else shown})"
        flag: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind is bool:
            flag["action"] = argparse.BooleanOptionalAction
        else:
            flag |= {"type": kind, "metavar": _METAVARS.get(kind, field.name.upper())}
            if many:
                flag["nargs"] = "+"
            if meta["choices"]:
                flag |= {"choices": meta["choices"], "metavar": None}
        groups[owner].add_argument(name, **flag)
    parser.usage = " ".join([*usage, "[options]"])


def resolve(config: type[Config], given: argparse.Namespace) -> Config:
    """Defaults, then the YAML file, then the flags; every value checked for its type."""
    values: dict[str, Any] = {}
    if given.config is not None:
        values |= read_yaml(Path(given.config))
    known = {field.name: (field, kind, many) for field, kind, many in _fields(config)}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UsageError(
                f"{given.config}: unknown key {key!r}{hint}; known: {', '.join(sorted(known))}"
            )
    values = {key: _typed(key, value, *known[key][1:]) for key, value in values.items()}
    values |= {key: value for key, value in vars(given).items() if key in known}
    for name, (field, _, many) in known.items():
        choices = field.metadata["choices"]
        value = values.get(name)
        if field.metadata["required"] and value is None:
            raise UsageError(f"--{name.replace('_', '-')} is required: {field.metadata['help']}")
        if choices and value is not None and value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if many and value is not None:
            values[name] = tuple(value)
    return config(**values)


def write_yaml(config: Any, path: Path) -> None:
    """Save the resolved config, so that ``--config`` repeats the run."""
    import yaml

    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    write_atomically(path, text.encode())


def plain(config: Any) -> dict[str, Any]:
    """Its options as YAML holds them."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }


def _fields(config: type) -> list[tuple[dataclasses.Field, type, bool]]:
    """(field, scalar type, whether it takes several) of each field."""
    hints = typing.get_type_hints(config)
    found = []
    for field in dataclasses.fields(config):
        kind, many = hints[field.name], False
        if isinstance(kind, types.UnionType):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        if typing.get_origin(kind) is tuple:
            kind, many = typing.get_args(kind)[0], True
        found.append((field, kind, many))
    return found


def _by_class(config: type) -> list[tuple[type, tuple[dataclasses.Field, type, bool]]]:
    """Each field beside the class that has it; the class's own first, then as its bases stand."""
    classes = [c for c in config.__mro__ if dataclasses.is_dataclass(c)]
    owner = {name: c for c in reversed(classes) for name in c.__annotations__}
    found = [(owner[field[0].name], field) for field in _fields(config)]
    return sorted(found, key=lambda one: classes.index(one[0]))


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a file.

    Raises:
        UsageError: it cannot be read, or holds no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must map options to values, got {type(values).__name__}")
    return values


def _typed(key: str, value: Any, kind: type, many: bool) -> Any:
    if value is None:
        return None
    if many:
        if not isinstance(value, list):
            raise UsageError(f"{key} must be a list, got {value!r}")
        return tuple(_typed(key, item, kind, False) for item in value)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            pass
    if kind is not bool and isinstance(value, bool) or not isinstance(value, kind):
        raise UsageError(f"{key} must be {kind.__name__}, got {value!r}")
    return value

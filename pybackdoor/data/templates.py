"""Prompt templates, and class files in CleanCLIP's form, read without running them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_MAX_CLASS_FILE = 16 << 20  # bytes; ImageNet's is 60 kB


def _openai80() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


class _Templates(Mapping[str, tuple[str, ...]]):
    """Sets of templates by name; a set that another package owns is loaded when asked for."""

    def __init__(self, sets: Mapping[str, Callable[[], tuple[str, ...]]]) -> None:
        self._sets = sets

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._sets[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._sets

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)


TEMPLATES: Mapping[str, tuple[str, ...]] = _Templates(
    {
        "simple": lambda: ("a photo of a {}.",),
        "product": lambda: (
            "a photo of a {}.",
            "a product photo of a {}.",
            "a picture of a {} for sale.",
            "a {} on a plain background.",
            "a close-up photo of a {}.",
            "a catalogue image of a {}.",
            "this is a {}.",
        ),
        "openai80": _openai80,
    }
)


def resolve_templates(templates: Any) -> tuple[str, ...]:
    """Templates from a name in `TEMPLATES`, one template, or a sequence of them.

    Raises:
        TypeError: not strings.
        ValueError: none, an unknown name, or one without "{}".
    """
    if isinstance(templates, str):
        if "{}" not in templates and templates not in TEMPLATES:
            raise ValueError(
                f"templates must be one of {sorted(TEMPLATES)} or contain '{{}}', got {templates!r}"
            )
        return TEMPLATES[templates] if templates in TEMPLATES else (templates,)
    chosen = tuple(templates)
    if not chosen:
        raise ValueError("templates must hold at least one template, got none")
    for template in chosen:
        if not isinstance(template, str):
            raise TypeError(f"templates must be strings, got {type(template).__name__}")
        if "{}" not in template:
            raise ValueError(f"templates must contain '{{}}' for the class name, got {template!r}")
    return chosen


def fill(template: str, name: str) -> str:
    """The template with the class name in it; other braces mean nothing."""
    return template.replace("{}", name)


def read_classes(path: str | Path) -> tuple[list[str], tuple[str, ...]]:
    """Class names and templates of a file in CleanCLIP's ``classes.py`` form.

    ``{'classes': ['cat', ...], 'templates': [lambda c: f'a photo of a {c}.', ...]}``, alone or
    assigned to a name. The file is parsed, never run; templates may also be plain strings.

    Returns:
        (classes, templates), the latter with "{}" for the class name; () when there are none.
    Raises:
        ValueError: anything else in the file, with its line.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_CLASS_FILE:
        raise ValueError(f"read_classes: {path} has more than {_MAX_CLASS_FILE} bytes")
    try:
        body = ast.parse(path.read_bytes().decode("utf-8-sig")).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"read_classes: {path} is not readable Python text: {error}") from error
    wanted = "a dict with 'classes' and 'templates'"
    if len(body) != 1 or not isinstance(body[0], ast.Expr | ast.Assign):
        raise ValueError(f"read_classes: {path} must hold {wanted} and nothing else")
    table = body[0].value
    if not isinstance(table, ast.Dict):
        raise _unexpected(path, table, wanted)
    entries = {}
    for key, value in zip(table.keys, table.values, strict=True):
        if not isinstance(key, ast.Constant) or key.value not in ("classes", "templates"):
            raise _unexpected(path, key or table, "the keys 'classes' and 'templates'")
        if not isinstance(value, ast.List | ast.Tuple):
            raise _unexpected(path, value, f"a list for {key.value!r}")
        entries[key.value] = value.elts
    classes = [_string(path, node, "a class name in quotes") for node in entries.get("classes", [])]
    if not classes:
        raise ValueError(f"read_classes: {path} must list 'classes'")
    return classes, tuple(_template(path, node) for node in entries.get("templates", []))


def _string(path: Path, node: ast.expr, wanted: str) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise _unexpected(path, node, wanted)


def _template(path: Path, node: ast.expr) -> str:
    wanted = "lambda c: f'...{c}...'"
    if isinstance(node, ast.Constant):
        return resolve_templates([_string(path, node, wanted)])[0]
    if not isinstance(node, ast.Lambda) or not isinstance(node.body, ast.JoinedStr):
        raise _unexpected(path, node, wanted)
    signature = node.args
    names = [argument.arg for argument in signature.args]
    if len(names) != 1 or ast.unparse(signature) != names[0]:
        raise _unexpected(path, node, wanted)
    parts: list[str] = []
    for part in node.body.values:
        if isinstance(part, ast.Constant) and "{}" not in str(part.value):
            parts.append(str(part.value))
        elif _is_plain(part, names[0]):
            parts.append("{}")
        else:
            raise _unexpected(path, node, wanted)
    return resolve_templates(["".join(parts)])[0]


def _is_plain(part: ast.AST, name: str) -> bool:
    return (
        isinstance(part, ast.FormattedValue)
        and isinstance(part.value, ast.Name)
        and part.value.id == name
        and part.conversion == -1
        and part.format_spec is None
    )


def _unexpected(path: Path, node: ast.expr, wanted: str) -> ValueError:
    got = ast.unparse(node)[:60]
    return ValueError(f"read_classes: line {node.lineno} of {path} must have {wanted}, got {got}")

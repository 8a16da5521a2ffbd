"""Prompt templates, and class files that are parsed, never run."""

import subprocess
import sys

import pytest

from pybackdoor.data import TEMPLATES, read_classes, resolve_templates
from pybackdoor.data.templates import fill


def test_sets_of_templates():
    assert list(TEMPLATES) == ["simple", "product", "openai80"] and len(TEMPLATES) == 3
    assert TEMPLATES["simple"] == ("a photo of a {}.",)
    for name in TEMPLATES:
        assert len(set(TEMPLATES[name])) == len(TEMPLATES[name])
        assert all(template.count("{}") == 1 for template in TEMPLATES[name])
    assert "nothing" not in TEMPLATES
    with pytest.raises(KeyError):
        TEMPLATES["nothing"]


def test_openai80_are_open_clips():
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    templates = TEMPLATES["openai80"]
    assert len(templates) == 80 and templates[0] == "a bad photo of a {}."
    assert [fill(t, "red {fox}") for t in templates] == [
        template("red {fox}") for template in OPENAI_IMAGENET_TEMPLATES
    ]


def test_resolve():
    assert resolve_templates("simple") == ("a photo of a {}.",)
    assert resolve_templates("my {}") == ("my {}",)
    assert resolve_templates(["a {}", "{} b {}"]) == ("a {}", "{} b {}")
    with pytest.raises(ValueError, match=r"one of \['openai80', 'product', 'simple'\]"):
        resolve_templates("simpel")
    with pytest.raises(ValueError, match="at least one"):
        resolve_templates([])
    with pytest.raises(ValueError, match="got 'b'"):
        resolve_templates(["{}", "b"])
    with pytest.raises(TypeError, match="must be strings, got function"):
        resolve_templates([lambda c: f"a {c}"])


CLASSES = """
{'classes': ['tench', "bull's eye", 'käse'],
 'templates': [
    lambda c: f'a bad photo of a {c}.',
    lambda text: f"{text}, {{literally}} {text}",
    'plain {}',
 ]}
"""


@pytest.mark.parametrize("prefix", ["", "config = ", "# a comment\nconfig = "])
def test_class_file(tmp_path, prefix):
    path = tmp_path / "classes.py"
    path.write_text(prefix + CLASSES.strip(), encoding="utf-8")
    classes, templates = read_classes(path)
    assert classes == ["tench", "bull's eye", "käse"]
    assert templates == ("a bad photo of a {}.", "{}, {literally} {}", "plain {}")
    path.write_text("{'classes': ('a',)}")
    assert read_classes(path) == (["a"], ())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("import os", "must hold a dict with 'classes' and 'templates' and nothing else"),
        ("x = 1\n" + CLASSES.strip(), "and nothing else"),
        ("", "and nothing else"),
        ("[1]", r"line 1 of .* must have a dict .* got \[1\]"),
        ("dict(classes=['a'])", r"got dict\(classes=\['a'\]\)"),
        ("{'classes': ['a'], 'more': []}", "must have the keys 'classes' and 'templates'"),
        ("{**{}}", "must have the keys"),
        ("{'classes': open('x')}", "must have a list for 'classes'"),
        ("{'classes': []}", "must list 'classes'"),
        ("{'templates': ['{}']}", "must list 'classes'"),
        ("{'classes': ['a', 7]}", "a class name in quotes, got 7"),
        ("{'classes': [__import__('os').getcwd()]}", "a class name in quotes, got __import__"),
        ("{'classes': ['a'", "is not readable Python text"),
        ("{'classes': ['a" + chr(0) + "']}", "is not readable Python text"),
        ("{'classes': " + "[" * 5000 + "]" * 5000 + "}", "is not readable Python text"),
    ],
)
def test_class_file_with_anything_else(tmp_path, text, match):
    path = tmp_path / "classes.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        read_classes(path)


@pytest.mark.parametrize(
    "template",
    [
        "lambda c: f'{c!r}'",
        "lambda c: f'{c:>9}'",
        "lambda c: f'{c.upper()}'",
        "lambda c: f'{other}'",
        "lambda c: f'{c} {__import__(\"os\").getcwd()}'",
        "lambda c, d: f'{c}'",
        "lambda c=print(): f'{c}'",
        "lambda *c: f'{c}'",
        "lambda: f'a'",
        "lambda c: 'a photo of ' + c",
        "lambda c: 'a {}'.format(c)",
        "lambda c: f'{{}} {c}'",
        "print('{}')",
        "7",
    ],
)
def test_template_that_is_no_plain_pattern(tmp_path, template):
    path = tmp_path / "classes.py"
    path.write_text(f"{{'classes': ['a'], 'templates': [{template}]}}")
    with pytest.raises(ValueError, match=r"line 1 of .* must have lambda c: f'...\{c\}...', got "):
        read_classes(path)


def test_template_without_the_name(tmp_path):
    for template in ("lambda c: f'a photo'", "'a photo.'"):
        (tmp_path / "classes.py").write_text(f"{{'classes': ['a'], 'templates': [{template}]}}")
        with pytest.raises(ValueError, match="'a photo"):
            read_classes(tmp_path / "classes.py")


def test_class_file_that_is_no_text(tmp_path):
    path = tmp_path / "classes.py"
    path.write_bytes(b"{'classes': ['\xe9']}")
    with pytest.raises(ValueError, match="not readable Python text"):
        read_classes(path)
    with open(path, "wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ValueError, match="has more than 16777216 bytes"):
        read_classes(path)


def test_lean_import(tmp_path):
    # torch itself loads tqdm, so what counts is what comes after it.
    code = (
        "import sys, torch; before = set(sys.modules); import pybackdoor.data;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new & {'PIL', 'tqdm', 'open_clip', 'torchvision', 'transformers'}))"
    )
    command = [sys.executable, "-c", code]  # elsewhere: the source tree would hide an install
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"

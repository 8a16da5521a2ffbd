"""What --pairs may name on the command line."""

from __future__ import annotations

import json

import pytest
from clip_models import tiny_config
from data_files import write_image
from shard_files import image_bytes, samples, write_shard

from pybackdoor.cli import main
from pybackdoor.cli.inputs import pairs_kind
from pybackdoor.models import create, save


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.csv", "table"), ("x.tsv", "table"), ("x.tar", "shards"), ("X.TAR", "shards"),
        ("cc3m/{00000..00331}.tar", "shards"), ("cc3m/*.tar", "shards"), ("x.tar.gz", "shards"),
        ("s3://bucket/{0..9}.tar", "shards"), ("pipe:cat x", "shards"),
        ("train-*.parquet", "parquet"), ("hf://datasets/o/n/train.parquet", "parquet"),
    ],
)  # fmt: skip
def test_kind_by_suffix(name, kind):
    assert pairs_kind(name) == kind


def test_kind_of_a_folder(tmp_path):
    for name, kind in (("a.tar", "shards"), ("b.parquet", "parquet"), ("c/x.png", "folder")):
        (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / kind / name).touch()
        assert pairs_kind(str(tmp_path / kind)) == kind


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save(create(tiny_config()), tmp_path / "model")

    def call(pairs, *more):
        given = (
            "clean",
            "--model",
            tmp_path / "model",
            "--pairs",
            pairs,
            "--out",
            tmp_path / "out",
            "--steps",
            3,
            "--batch-size",
            8,
            "--precision",
            "fp32",
            *more,
        )
        return main([str(a) for a in given]), *capsys.readouterr()  # fmt: skip

    return call


def test_clean_from_shards(tmp_path, run):
    for shard in range(2):
        members = samples(12, first=12 * shard)
        if shard:
            members[6] = (members[6][0], image_bytes(3)[:200])
        write_shard(tmp_path / "wds" / f"{shard:05}.tar", members)
    for pairs in (tmp_path / "wds" / "{00000..00001}.tar", tmp_path / "wds"):
        code, out, err = run(pairs, "--max-bad", 0.1, "--json")
        assert code == 0, err
        assert json.loads(out)["steps_done"] == 3 and json.loads(out)["left_out"] == 1
    levers = ("--views", 1, "--lock", "text", "--cache", "device", "--device", "cpu")
    code, out, err = run(tmp_path / "wds", "--max-bad", 0.1, "--json", *levers)
    assert code == 0, err
    used = json.loads(out)
    assert (used["settings"]["views"], used["settings"]["lock"]) == (1, "text")
    assert used["last_step"]["s_text"] == 0 < used["last_step"]["s_image"]
    code, out, _ = run(tmp_path / "wds", "--max-bad", 0.1, "--cache", "none")
    assert code == 0 and "1 pairs could not be used: see " in out
    code, _, err = run(tmp_path / "wds", "--max-bad", 0.01)
    assert code == 2 and "1 of 24 rows cannot be used, and max_bad=0.01 allows 0" in err


@pytest.mark.parametrize(
    ("pairs", "message"),
    [("pipe:cat x", "pipe: runs a command"), ("x.tar.gz", "uncompressed .tar"),
     ("none-*.tar", "no file matches")],
)  # fmt: skip
def test_refusals_are_one_line(run, pairs, message):
    code, out, err = run(pairs)
    assert code == 2 and not out and message in err and err.count("\n") == 1


def test_class_folders_are_kept_where_they_are_told_to(tmp_path, run):
    for i in range(12):
        write_image(tmp_path / "set" / "ab"[i % 2] / f"{i}.png", seed=i)
    histories = set()
    for cache, files in (("none", 0), ("ram", 0), ("device", 0), ("disk", 1)):
        code, _, err = run(tmp_path / "set", "--cache", cache, "--device", "cpu")
        assert code == 0, err
        assert len(list((tmp_path / "cache").rglob("*.px"))) == files, cache
        lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
        histories.add(tuple(json.loads(line)["loss"] for line in lines))
    assert len(histories) == 1 and all(histories)

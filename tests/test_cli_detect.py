"""`pybackdoor detect` on files: csv, tsv, shards and class folders, and what it leaves behind."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_models import tiny_config
from data_files import cut, noise
from PIL import Image
from shard_files import samples, write_shard

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.cli.detect import _swing
from pybackdoor.data import pairs_from_csv, pairs_from_parquet
from pybackdoor.detect.outputs import sample_key
from pybackdoor.models import create, save
from pybackdoor.poison import poison_pairs

N = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model folder, a csv with a third column, the same as tsv, shards and class folders."""
    root = tmp_path_factory.mktemp("world")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(create(tiny_config()), root / "model")
        torch.manual_seed(1)
        save(create(tiny_config()), root / "overfit")
    (root / "images").mkdir()
    rows = []
    for i in range(N):
        Image.fromarray(noise(32, 32, i)).save(root / "images" / f"{i}.png")
        rows.append([f"images/{i}.png", f'a "{i}", of course $x^2$', f"more {i}"])
    for name, mark, header in (("pairs.csv", ",", ["image", "caption", "extra"]),
                               ("pairs.tsv", "\t", ["filepath", "title", "extra"])):  # fmt: skip
        with open(root / name, "w", newline="") as file:
            csv.writer(file, delimiter=mark).writerows([header, *rows])
    for name in ("cat", "dog"):
        (root / "folders" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(noise(32, 32, i + 100)).save(root / "folders" / name / f"{i}.png")
    write_shard(root / "shards" / "0.tar", samples(30))
    return root


@pytest.fixture
def run(world, tmp_path, capsys, monkeypatch):
    """Detect with more options; returns (exit code, standard output, standard error)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*more: object) -> tuple[int, str, str]:
        given = ["detect", "--model", world / "model", "--out", tmp_path / "out", "--k", 3, *more]
        code = main([str(a) for a in given])
        return code, *capsys.readouterr()

    return call


def table(path: Path, mark: str = ",") -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file, delimiter=mark))


@pytest.mark.parametrize("name, mark", [("pairs.csv", ","), ("pairs.tsv", "\t")])
def test_kept_pairs_are_the_table_without_the_worst(world, run, tmp_path, name, mark):
    code, out, _ = run("--pairs", world / name, "--top", 5)
    assert code == 0 and "40 pairs scored by dao, 3 neighbours among all" in out
    assert "What this does not show" in out and "that the other 35 are not" in out
    assert "poison in near 7.50%" in out and "clean" not in out
    scores = table(tmp_path / "out" / "scores.csv")
    assert scores[0] == ["rank", "score", "id", "location", "caption"] and len(scores) == N + 1
    values = [float(row[1]) for row in scores[1:]]
    assert values == sorted(values, reverse=True)
    assert [int(row[0]) for row in scores[1:]] == list(range(1, N + 1))
    dropped = {int(row[2]) for row in scores[1:6]}
    before, kept = table(world / name, mark), table(tmp_path / "out" / f"kept{name[5:]}", mark)
    wanted = [row for i, row in enumerate(before[1:]) if i not in dropped]
    assert kept[0] == before[0]
    assert [row[1:] for row in kept[1:]] == [row[1:] for row in wanted]
    assert [row[0] for row in kept[1:]] == [str(world / row[0]) for row in wanted]
    assert scores[1][4] == before[1 + int(scores[1][2])][1]
    again = pairs_from_csv(tmp_path / "out" / f"kept{name[5:]}", image_size=32).decoded()
    assert len(again) == 35 and again.captions[0] == wanted[0][1]
    with Image.open(tmp_path / "out" / "suspects.png") as image:
        assert image.size[0] > 800


def test_kept_pairs_go_straight_into_clean(world, run, tmp_path):
    assert run("--pairs", world / "pairs.csv", "--top", 8)[0] == 0
    code = main([str(a) for a in (
        "clean", "--model", world / "model", "--pairs", tmp_path / "out" / "kept.csv", "--out",
        tmp_path / "cleaned", "--steps", 1, "--batch-size", 8, "--precision", "fp32",
    )])  # fmt: skip
    assert code == 0


def test_shards_give_a_list_of_keys(world, run, tmp_path):
    code, out, _ = run("--pairs", world / "shards", "--top", 4)
    lines = (tmp_path / "out" / "kept_keys.txt").read_text().splitlines()
    assert code == 0 and len(lines) == 26 and lines == sorted(lines)
    scores = table(tmp_path / "out" / "scores.csv")
    shard = f"{world / 'shards' / '0.tar'}#"
    dropped = {f"{shard}{int(row[2]):05}" for row in scores[1:5]}
    assert set(lines) == {f"{shard}{i:05}" for i in range(30)} - dropped
    assert sample_key("s3://a/b.tar#x.y/00.1.jpg") == "s3://a/b.tar#x.y/00"
    assert sample_key("data/1.parquet#17") == "data/1.parquet#17"


def test_class_folders_give_a_csv(world, run, tmp_path):
    code, out, _ = run("--pairs", world / "folders", "--templates", "a {}.", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["left_out"] == 1 and answer["kept"] == N - 1  # not 0.4
    kept = table(tmp_path / "out" / "kept.csv")
    assert kept[0] == ["image", "caption"] and len(kept) == N
    assert {row[1] for row in kept[1:]} == {"a cat.", "a dog."}
    assert all(Path(row[0]).is_file() for row in kept[1:])


def test_a_manifest_judges_the_scores(world, run, tmp_path):
    pairs = pairs_from_csv(
        world / "pairs.csv", image_size=32, resize_mode="squash", cache_dir=tmp_path / "c"
    )
    spec = pybackdoor.trigger("checkerboard", size=20)
    poisoned, manifest = poison_pairs(pairs, spec, target="dog", count=3)
    manifest.save(tmp_path / "m.json")
    code, out, _ = run("--pairs", world / "pairs.csv", "--manifest", tmp_path / "m.json",
                       "--top", 4)  # fmt: skip
    found = json.loads((tmp_path / "out" / "detection.json").read_text())
    assert code == 0 and found["measures"]["planted"] == 3 and found["samples_of_manifest"] == 3
    assert [at["k"] for at in found["measures"]["at"]] == [3, 4]
    assert f"AUROC {found['measures']['auroc']:.3f}" in out and "precision" in out
    model = pybackdoor.load(world / "model")
    truth = np.isin(pairs.ids, [s.id for s in manifest.samples])
    wanted = pybackdoor.detect_samples(model.model, poisoned, k=3, truth=truth).measures([3, 4])
    assert found["measures"] == wanted
    assert found["method"] == "dao" and found["schema"] == "pybackdoor.detection/1"


@pytest.mark.parametrize(
    "planted_rows, broken, told",
    [
        ([3, 7], [3, 7], "none of the 2 planted pairs has a usable image, and so a score."),
        ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], "all 6 scored pairs are planted: there are no"),
        ([*range(8)], [0, 1, 9, 10, 11], "Planted: 6 of the scored pairs (the manifest has 8)"),
    ],
)
def test_what_cannot_be_judged_is_told(run, tmp_path, monkeypatch, planted_rows, broken, told):
    monkeypatch.setattr("pybackdoor.cli.detect.outputs.suspects_picture", lambda *_: None)  # slow
    rows = [f"{i}.png,picture {i}" for i in range(12)]
    for i in range(12):
        Image.fromarray(noise(32, 32, i)).save(tmp_path / f"{i}.png")
    table = tmp_path / "p.csv"
    table.write_text("\n".join(["image,caption", *rows]))
    options = {"image_size": 32, "resize_mode": "squash", "cache": "none"}
    pairs = pairs_from_csv(table, cache_dir=tmp_path / "c", **options)
    spec = pybackdoor.trigger("checkerboard", size=20)
    _, manifest = poison_pairs(pairs, spec, target="dog", count=12)
    kept = [s for s in manifest.samples if s.id in planted_rows]
    replace(manifest, samples=kept).save(tmp_path / "m.json")
    for i in broken:
        cut(tmp_path / f"{i}.png")
    code, out, err = run("--pairs", table, "--manifest", tmp_path / "m.json", "--max-bad", 0.5)
    assert code == 0 and told in out, err
    found = json.loads((tmp_path / "out" / "detection.json").read_text())
    assert ("measures" in found) == told.startswith("Planted")
    assert ("not_judged" in found) != ("measures" in found)
    assert found["samples_of_manifest"] == len(planted_rows)
    if "measures" in found:
        assert [at["k"] for at in found["measures"]["at"]] == [1, 6]


def test_gain_takes_a_second_model(world, run, tmp_path):
    base = ("--pairs", world / "pairs.csv", "--method", "gain")
    code, out, err = run(*base, "--overfit", world / "overfit")
    assert code == 2 and "k is for methods of neighbours" in err  # given by the fixture
    given = ["detect", "--model", world / "model", "--out", tmp_path / "out", *base]
    assert main([str(a) for a in given]) == 2
    assert main([str(a) for a in (*given, "--overfit", world / "overfit")]) == 0
    assert len(table(tmp_path / "out" / "scores.csv")) == N + 1


def test_fragility_leaves_out_as_many_as_it_finds(world, run, tmp_path, monkeypatch):
    monkeypatch.setattr("pybackdoor.cli.detect.outputs.suspects_picture", lambda *_: None)  # slow
    base = ("--pairs", world / "pairs.csv", "--method", "fragility")
    code, out, _ = run(*base, "--k", 6)
    assert (
        code == 0 and "scored by fragility, 6 of the word '3' found suspicious; the 6 most" in out
    )
    assert "poison of another word than '3'" in out
    assert _swing(0.59).endswith("once disturbed, which is little: poison shows 0.6 and more.")
    assert _swing(0.6).endswith("once disturbed; poison shows 0.6 and more.")
    answer = json.loads((tmp_path / "out" / "detection.json").read_text())
    assert answer["left_out"] == 6 and answer["kept"] == N - 6
    assert _swing(answer["settings"].pop("swing")) in out
    assert answer["settings"] == {"k": 6, "precision": "fp32", "found": 6, "word": "3"}
    assert run(*base, "--k", 6, "--top", 9)[0] == 0
    assert len(table(tmp_path / "out" / "kept.csv")) == 1 + N - 9


def test_a_parquet_table_is_retrained_on_without_the_suspects(world, run, tmp_path, monkeypatch):
    monkeypatch.setattr("pybackdoor.cli.detect.outputs.suspects_picture", lambda *_: None)  # slow
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [(world / "images" / f"{i}.png", f"picture {i}") for i in range(30)]
    images = [path.read_bytes() for path, _ in rows]
    columns = {"image": images, "caption": [caption for _, caption in rows], "extra": range(30)}
    source = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(columns), source, row_group_size=11)
    code, out, _ = run("--pairs", source, "--top", 4)
    assert code == 0 and "30 pairs scored by dao" in out
    scores = table(tmp_path / "out" / "scores.csv")
    dropped = [int(row[2]) for row in scores[1:5]]
    assert [row[3:] for row in scores[1:5]] == [[f"{source}#{i}", f"picture {i}"] for i in dropped]
    lines = (tmp_path / "out" / "kept_keys.txt").read_text().splitlines()
    assert lines == [f"{source}#{i}" for i in range(30) if i not in dropped]

    # as docs/detect.md has it
    rows = [int(line.rpartition("#")[2]) for line in lines]
    pq.write_table(pq.read_table(source).take(rows), tmp_path / "kept.parquet")
    kept = pairs_from_parquet(
        tmp_path / "kept.parquet", image_size=32, resize_mode="squash", cache_dir=tmp_path / "c"
    )
    assert kept.captions == [f"picture {i}" for i in rows]
    before = pairs_from_parquet(
        source, image_size=32, resize_mode="squash", cache_dir=tmp_path / "c"
    )
    assert np.array_equal(kept.images.take(np.arange(26)), before.images.take(np.array(rows)))
    code = main([str(a) for a in (
        "clean", "--model", world / "model", "--pairs", tmp_path / "kept.parquet", "--out",
        tmp_path / "trained", "--method", "finetune", "--steps", 1, "--batch-size", 8,
        "--precision", "fp32",
    )])  # fmt: skip
    assert code == 0 and (tmp_path / "trained").is_dir()


def test_broken_images_are_listed_without_a_score(world, run, tmp_path):
    (tmp_path / "d").mkdir()
    rows = ["image,caption"]
    for i in range(12):
        Image.fromarray(noise(32, 32, i)).save(tmp_path / "d" / f"{i}.png")
        rows.append(f"{i}.png,picture {i} \u732b")  # a letter that the picture's font lacks
    cut(tmp_path / "d" / "7.png")
    (tmp_path / "d" / "p.csv").write_text("\n".join(rows), encoding="utf-8")
    code, out, _ = run("--pairs", tmp_path / "d" / "p.csv", "--max-bad", 0.2)
    assert code == 0 and "1 pairs have no usable image" in out and ".bad.jsonl" in out
    scores = table(tmp_path / "out" / "scores.csv")
    assert scores[-1][:3] == ["", "", "7"] and len(scores) == 13
    kept = table(tmp_path / "out" / "kept.csv")
    assert len(kept) == 11 and not any("7.png" in row[0] for row in kept)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--method", "doa"), "did you mean 'dao'"),
        (("--overfit", "x"), "--overfit and --method gain go together"),
        (("--top", "0"), "--top must be in 1..39, of 40 pairs, got 0"),
        (("--top", "40"), "--top must be in 1..39, of 40 pairs, got 40"),
        (("--k", "40"), "k must be below the number of pairs with an image, 40, got 40"),
        (("--manifest", "/nowhere.json"), "nowhere.json"),
        (("--method", "fragility", "--k", "21"), "at least 42 pairs, twice k, that have"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_two(world, run, options, message):
    code, out, err = run("--pairs", world / "pairs.csv", *options)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["detect", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:" in out
    assert all(name in out for name in pybackdoor.detect.METHODS)

"""The quality matrix's BadCLIP: its patch follows from the clean model, and every cell uses it."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _quality_cells as cells_module  # noqa: E402
import quality  # noqa: E402
from _quality_cells import Work, case_of, train_model, trained  # noqa: E402
from _quality_data import TEMPLATES  # noqa: E402
from _quality_setting import FULL, TINY, Cell, Model  # noqa: E402

from pybackdoor import badclip_patch, evaluate, trigger  # noqa: E402

BADCLIP = Model("fashion", "resnet", "badclip", 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of a tiny run of this attack alone."""
    folder, threads = tmp_path_factory.mktemp("badclip"), torch.get_num_threads()
    only = ["--only", "arch=resnet", "attack=badclip", "defence=none"]
    assert quality.main(["--tiny", "--work", str(folder), "--device", "cpu", *only]) == 0
    torch.set_num_threads(threads)
    return Work(folder, TINY, "cpu")


def test_the_patch_is_what_badclip_patch_finds_on_the_clean_model(work):
    clean = case_of(BADCLIP.clean, work)
    found = badclip_patch(
        trained(BADCLIP.clean, work), clean.parts.planted, target="bag", seed=0, device="cpu",
        tokenizer=clean.loaded.tokenizer, progress=False, augment=False, **TINY.patch,
    )  # fmt: skip
    path = work.model_file(BADCLIP).with_suffix(".png")
    with Image.open(path) as image:
        assert (np.asarray(image) == found.pixels).all() and found.pixels.shape == (5, 5, 3)
    told = work.record(BADCLIP)["patch"]
    assert (told["target"], told["steps"], told["last"]) == ("bag", 2, found.history[-1])
    assert told["augment"] is False  # as the patches were found that the published rows rest on


def test_cells_and_suspect_pairs_carry_the_patch(work):
    spec = trigger("badclip", file=work.patch_file(BADCLIP), grey=True)
    case = case_of(BADCLIP, work)
    found = evaluate(
        trained(BADCLIP, work), case.parts.test, tokenizer=case.loaded.tokenizer, trigger=spec,
        templates=TEMPLATES, target="bag", baseline=trained(BADCLIP.clean, work),
    ).to_dict()  # fmt: skip
    row = json.loads(work.cell_file(Cell(BADCLIP, "none")).read_text())
    assert {name: row[name] for name in found} == found and row["half"] == "untouched"
    planted, suspect = case.parts.planted, cells_module.PAIRS["suspect"](case, TINY)
    changed = [i for i in range(len(planted)) if suspect.captions[i] != planted.captions[i]]
    assert len(changed) == round(0.05 * len(planted))
    with Image.open(work.patch_file(BADCLIP)) as image:
        grey = np.asarray(image.convert("L"))[..., None]
    before, after = (p.images.take(np.array(changed)).copy() for p in (planted, suspect))
    assert (after[:, 13:18, 13:18] == grey).all()
    before[:, 13:18, 13:18] = grey
    assert (before == after).all()


def test_names_follow_from_settings_and_not_from_the_patch(work):
    name, badnet = BADCLIP.name(TINY), Model("fashion", "resnet", "badnet", 0)
    assert work.model_file(BADCLIP).name == f"{name}.json"
    longer = dataclasses.replace(TINY, patch={**TINY.patch, "steps": 3})
    assert BADCLIP.name(longer) != name and badnet.name(longer) == badnet.name(TINY)
    assert Cell(BADCLIP, "par").name(longer) != Cell(BADCLIP, "par").name(TINY)
    poisoned = dataclasses.replace(TINY, rates={**TINY.rates, ("fashion", "badnet"): 0.2})
    assert BADCLIP.name(poisoned) == name
    clean = BADCLIP.settings(TINY)["trigger"]["clean"]
    assert clean == BADCLIP.clean.settings(TINY)


def test_clean_models_come_first_and_one_that_is_missing_is_named(tmp_path):
    other = Model("cifar10", "vit", "badnet", 0)
    models = [BADCLIP, BADCLIP.clean, other]
    assert quality.waves(models) == [[BADCLIP.clean, other], [BADCLIP]]
    assert quality.waves([]) == []
    with pytest.raises(FileNotFoundError, match=BADCLIP.clean.name(TINY)):
        train_model(BADCLIP, Work(tmp_path, TINY, "cpu"))
    assert not list((tmp_path / "models").iterdir())


def test_the_names_of_the_other_models_are_as_they_were():
    """A work folder computed before BadCLIP was added stays good."""
    assert Model("cifar10", "resnet", "badnet", 0).name(FULL) == (
        "cifar10-resnet-badnet-s0-583b2d9a44"
    )

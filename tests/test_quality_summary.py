"""The quality matrix's summary follows from its rows; settings are chosen by the stated rule."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _quality_detect  # noqa: E402
import _quality_summary as summary  # noqa: E402
import _quality_ubt  # noqa: E402
import tune_quality  # noqa: E402
from _quality_cells import INSTALLED, NO_ATTACK, NOT_INSTALLED  # noqa: E402
from _quality_setting import TINY  # noqa: E402


def row(ca, asr=None, status=INSTALLED, seed=0, rebound=0.5, control=0.01):
    found = {"ca": {"value": ca}, "status": status, "seed": seed, "cpu_seconds": 10.0 * (seed + 1)}
    if asr is not None:
        found |= {"asr_nontarget": {"value": asr}, "rebound": {"highest": rebound}}
    return found | {"control_ca_loss": control}


GROUPS = {
    ("clean", "none"): [row(0.8, status=NO_ATTACK)],
    ("badnet", "none"): [row(0.7, 1.0), row(0.6, 1.0, seed=1)],
    ("badnet", "par"): [row(0.65, 0.1), row(0.55, 0.06, seed=1)],
    ("badnet", "finetune"): [row(0.69, 0.5), row(0.59, 0.5, seed=1)],
    ("badnet", "roclip"): [row(0.69, 0.0)],
    ("badnet", "par_tau_2.15"): [row(0.69, 0.0), row(0.59, 0.0, seed=1), row(0.5, 0.0, seed=2)],
    ("badnet", "ubt"): [row(0.7, 0.0)],
    ("blended", "none"): [row(0.7, 1.0)],
    ("blended", "par"): [row(0.66, 0.3)],
    ("blended", "finetune"): [row(0.69, 0.2)],
    ("blended", "roclip"): [row(0.69, 0.0)],
    ("blended", "par_tau_2.15"): [row(0.69, 0.0)],
    ("text", "none"): [row(0.7, 0.2, status=NOT_INSTALLED)],
    ("text", "par"): [{"status": NOT_INSTALLED, "seed": 0}],
    ("sig", "none"): [row(0.7, 1.0)],
    ("sig", "par"): [row(0.7, 0.9)],
    ("sig", "finetune"): [row(0.1, 0.95)],
}


def test_a_standing_is_a_mean_over_the_untouched_attacks_that_installed():
    none, finetune, par = sorted(summary.standings(GROUPS), key=lambda s: s.defence != "none")[:3]
    assert [s.defence for s in (none, finetune, par)] == ["none", "finetune", "par"]
    assert par.asr == pytest.approx((0.08 + 0.3) / 2) and par.worst == "blended"
    assert par.worst_asr == 0.3 and (par.gone, par.attacks) == (1, 2)
    assert par.ca_loss == pytest.approx((0.05 + 0.04) / 2)
    assert par.control == pytest.approx(0.01) and par.rebound == 0.5
    assert par.seconds == pytest.approx((15 + 10) / 2)
    assert none.ca_loss == 0 and none.gone == 0


def test_a_loss_of_accuracy_is_that_of_the_model_which_was_cleaned():
    old, cleaned = row(0.7, 1.0), row(0.65, 0.1)
    assert summary.ca_loss(cleaned, old) == pytest.approx(0.05)
    own = cleaned | {"drift": {"reference_ca": {"value": 0.72}}}
    assert summary.ca_loss(own, old) == pytest.approx(0.07)


def test_the_summary_names_the_best_the_cheapest_and_what_is_left():
    text = summary.summary(GROUPS)
    assert "| par | 19.0 | blended 30.0 | 1 of 2 | 4.5 | 1.0 | 50.0 | 12 |" in text
    assert "Up to 3 seeds." in text and "Within" not in text
    assert "| ubt |" not in text  # it did not meet every attack
    assert "| roclip |" not in text  # nor this one every seed
    assert "| par_tau_2.15 | 0.0 |" in text and "**par_tau" not in text  # its tau was not chosen
    assert "With clean pairs: **par** leaves the lowest mean ASR, 19.0 %, at 4.5 points" in text
    assert "at most 3 points of CA it is **finetune**, 35.0 %, at 1.0 points of CA." in text
    assert "blended (lowest: 20.0 % by finetune), sig (lowest: 90.0 % by par)." in text
    assert "text (" not in text and "badnet (" not in text


def test_no_summary_without_something_to_compare():
    assert summary.summary({("badnet", "none"): [row(0.7, 1.0)]}) is None
    assert summary.summary({("clean", "none"): [row(0.7, status=NO_ATTACK)]}) is None


def test_nothing_left_is_not_told():
    groups = {("badnet", "none"): [row(0.7, 1.0)], ("badnet", "par"): [row(0.7, 0.1)]}
    groups["badnet", "ft_sam"] = [row(0.7, 0.14)]
    groups["sig", "none"] = [row(0.7, 1.0)]  # met by no defence yet
    text = summary.summary(groups)
    assert "One seed:" in text and "Within 5 points of it: ft_sam 14.0 %, at 0.0 points" in text
    assert "No defence brings" not in text and "of those that cost" not in text


@pytest.mark.parametrize(
    ("candidates", "taken"),
    [([(0.02, 0.5), (0.03, 0.2), (0.04, 0.1)], 1), ([(0.06, 0.1), (0.04, 0.3)], 1)],
)
def test_the_rule_takes_the_lowest_asr_that_is_cheap_and_else_the_cheapest(candidates, taken):
    found = [{"ca_loss": loss, "asr": asr} for loss, asr in candidates]
    assert tune_quality.winner(found) is found[taken]


def test_tuning_runs_each_candidate_on_the_tuning_half_once(tmp_path, monkeypatch, capsys):
    candidates = {"finetune": [{"lr": 1e-3}, {"lr": 1e-5}], "par": [{"tau": 1.0}]}
    monkeypatch.setattr(tune_quality, "CANDIDATES", {"resnet": candidates})
    out = tmp_path / "tuning.json"
    arguments = ["--work", str(tmp_path), "--json", str(out), "--only", "finetune"]
    assert tune_quality.main(arguments, TINY) == 0 and not out.exists()
    printed = capsys.readouterr().out
    assert "trial 4/4" in printed and "| finetune | lr 1e-05 |" in printed
    assert "2 of 6 trials are missing" in printed
    assert tune_quality.main(arguments[:-2], TINY) == 0
    found = json.loads(out.read_text())["candidates"]
    assert [(one["defence"], one["options"]) for one in found] == [
        ("finetune", {"lr": 1e-3}), ("finetune", {"lr": 1e-5}), ("par", {"tau": 1.0}),
    ]  # fmt: skip
    assert [one["chosen"] for one in found] in ([True, False, True], [False, True, True])
    assert {r["attack"] for r in found[0]["rows"]} == {"checkerboard", "sig"}
    assert all(r["half"] == "tuning" and r["steps"] == 2 for r in found[0]["rows"])
    assert "trial 2/2" in capsys.readouterr().out
    monkeypatch.setattr(tune_quality, "compute", None)
    assert tune_quality.main(arguments, TINY) == 0
    assert "trial" not in capsys.readouterr().out.replace("candidate", "")


def test_tuning_names_the_methods_that_there_are_and_where_results_go(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune_quality.main(
            ["--work", str(tmp_path), "--arch", "pretrained", "--only", "invert"], TINY
        )
    assert "--only must be of finetune, got invert" in capsys.readouterr().err
    assert tune_quality.results_of("resnet").name == "quality_tuning.json"
    assert tune_quality.results_of("pretrained").name == "quality_tuning_pretrained.json"


def test_an_attack_that_did_not_install_is_not_tuned_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_quality, "CANDIDATES", {"resnet": {"finetune": [{}]}})
    setting = dataclasses.replace(TINY, installed=1.0)
    arguments = ["--work", str(tmp_path), "--json", str(tmp_path / "t.json")]
    assert tune_quality.main(arguments, setting) == 1
    assert "attack did not install" in capsys.readouterr().out


def gated(fires, swing, statistic=0.5):
    return {"fires": fires, "swing": swing, "statistic": statistic, "matched": 0.1}


def test_the_ubt_tables_hold_what_was_measured(tmp_path):
    assert _quality_ubt.sections(tmp_path) == []
    value = lambda x: {"value": x}  # noqa: E731
    after = {"ca": value(0.7), "asr_nontarget": value(0.01)}
    cell = {
        "attack": "sig", "arch": "resnet", "status": INSTALLED, "k": 350, "rate": 0.01,
        "ca": value(0.71), "asr_nontarget": value(0.99), "par": {"after": after, "cpu_seconds": 50},
        "runs": {
            "fragility": {"gate": gated(True, 0.6), "precision_at_k": 1.0, "after": after,
                          "cpu_seconds": 40.4},
            "dao": {"gate": gated(False, None), "precision_at_k": 0.006, "cpu_seconds": 9},
        },
    }  # fmt: skip
    failed = {**cell, "attack": "badnet", "status": NOT_INSTALLED}
    (tmp_path / "ubt.json").write_text(json.dumps({"cells": [cell, failed]}))
    text, rows = _quality_ubt.sections(tmp_path)
    assert "35,000 CIFAR-10 pairs, 1 % of" in " ".join(text.split()) and "k = 350" in text
    assert "| sig (t) | fragility | 1.000 | fires | 0.60 | 71.0 | 70.0 | 99.0 | 1.0 | 40 |" in rows
    assert "| sig (t) | dao | 0.006 | stops | - | 71.0 | - | 99.0 | - | 9 |" in rows
    assert "| sig (t) | PAR | - | - | - | 71.0 | 70.0 | 99.0 | 1.0 | 50 |" in rows
    assert "badnet" not in rows
    side = {**cell["runs"]["fragility"], "trigger_kept": 0.314}
    back = {**cell["runs"]["fragility"], "way": 0.0}
    image = {
        **cell,
        "arch": "vit",
        "steps": 4000,
        "runs": {"truth, image side": side, "truth": back},
    }
    cells = [
        {**failed, "arch": "vit", "steps": 4000},
        image,
        {**image, "rate": 0.05, "steps": 1400},
    ]
    found = {"image_share": 0.25, "cells": cells}
    (tmp_path / "ubt_vit.json").write_text(json.dumps(found))
    *_, text, rows = _quality_ubt.sections(tmp_path)
    text = " ".join(text.split())
    assert "small vit (1 % poisoned: 4,000 steps; 5 % poisoned: 1,400 steps)" in text
    assert "the 25 % most suspicious" in text
    assert "did not install: badnet (ASR 99.0)." in text
    assert "| sig (t) | truth, image side (31 %) | 1.000 | fires | 0.60 | 71.0 | 70.0 |" in rows
    assert "| sig (t), 5 % | truth, image side (31 %) |" in rows
    assert "| sig (t), 5 % | truth ‡ |" in rows
    kept = {**cell, "steps": 2000}
    (tmp_path / "ubt_kept.json").write_text(json.dumps({"cells": [kept, {**kept, "rate": 0.05}]}))
    *_, text, rows = _quality_ubt.sections(tmp_path)
    assert "trained anew (sig (t) 2,000 steps, sig (t), 5 % 2,000 steps):" in " ".join(text.split())
    assert "| sig (t), 5 % | fragility | 1.000 |" in rows
    clean = [
        {"attack": "clean", "arch": "resnet", "status": NO_ATTACK, "steps": 1500,
         "runs": {"fragility": {"gate": gated(fires, swing)}}}
        for fires, swing in ((False, 0.1), (True, 0.4), (False, 0.2))
    ]  # fmt: skip
    fires = [
        {**cell, "attack": "badnet", "steps": steps,
         "runs": {"fragility": {"gate": gated(True, swing), "precision_at_k": share}}}
        for steps, swing, share in ((4000, 0.8, 1.0), (2000, 0.7, 0.9), (4000, 0.6, 0.98))
    ]  # fmt: skip
    missed = [{**failed, "steps": steps, "runs": {}} for steps in (2000, 1500)]
    gates = {"rankings": ["fragility"], "cells": [*fires, *clean, *missed]}
    gates["cells"].append({**clean[0], "arch": "vit"})
    (tmp_path / "ubt_gate.json").write_text(json.dumps(gates))
    *_, text, rows = _quality_ubt.sections(tmp_path)
    assert "swing, of which it wants 0.6." in text
    assert rows.splitlines()[2:] == [
        "| resnet | clean | 1500 | - | fragility | 1 of 3 | - | 0.40 to 0.40 | 0.10 to 0.40 |",
        "| resnet | badnet | 4000 | 2 of 2 | fragility | 2 of 2 | 0.98 to 1.00 | 0.40 to 0.40 "
        "| 0.60 to 0.80 |",
        "| resnet | badnet | 2000 | 1 of 2 | fragility | 1 of 1 | 0.90 to 0.90 | 0.40 to 0.40 "
        "| 0.70 to 0.70 |",
        "| resnet | badnet | 1500 | 0 of 1 | fragility | 0 of 0 | - | - | - |",
        "| vit | clean | 1500 | - | fragility | 0 of 1 | - | 0.40 to 0.40 | 0.10 to 0.10 |",
    ]
    (tmp_path / "ubt_gate_badnet.json").write_text(json.dumps(gates | {"cells": fires[:1]}))
    *_, before, text, since = _quality_ubt.sections(tmp_path)
    assert before == rows and "chosen anew" in text and "trained anew:" in text
    assert [row.split(" | ")[5] for row in since.splitlines()[2:]] == ["1 of 1"]


def test_the_detectors_table_holds_what_was_measured(tmp_path):
    assert _quality_detect.sections(tmp_path) == []
    common = {"k": 350, "precision": 0.25, "recall": 0.25, "cpu_seconds": 8.6}
    cell = {
        "attack": "sig", "seed": 1, "rate": 0.01, "half": "tuning", "status": INSTALLED,
        "ca": {"value": 0.7}, "asr_nontarget": {"value": 0.99}, "steps": 2000, "pairs": 35000,
        "runs": [
            {"method": "dao", "reference": 256, "auroc": 0.5, **common},
            {"method": "dao", "reference": 0, "auroc": 0.75, **common},
            {"method": "fragility", "reference": None, "auroc": 1.0, "found": 340, "word": "ship",
             **common},
        ],
    }  # fmt: skip
    other = {**cell, "attack": "badnet", "half": "untouched", "runs": cell["runs"][:1]}
    failed = {**cell, "attack": "text", "status": NOT_INSTALLED}
    (tmp_path / _quality_detect.FILE).write_text(json.dumps({"cells": [failed, cell, other]}))
    text, rows = _quality_detect.sections(tmp_path)
    assert "trained on 35,000 CIFAR-10 pairs, 1 % of" in " ".join(text.split())
    start = "| sig (t) | 1 | 2,000 | 70.0 | 99.0 |"
    assert f"{start} dao | 256 | 0.500 | 0.250 | - | 9 |" in rows
    assert f"{start} dao | all | 0.750 | 0.250 | - | 9 |" in rows
    assert f"{start} fragility | - | 1.000 | 0.250 | 340 of ship | 9 |" in rows
    assert "| badnet | 1 |" in rows and "text" not in rows

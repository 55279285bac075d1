"""`fedllm emulator` and the offsite recipe: a package leaves only if its owner's policy allows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tiny import records, save_base, thorough, tiny_federation, write_jsonl, write_yaml
from verbs import Call, data_of

from fedllm.errors import ExitCode
from fedllm.models.emulator_settings import ExportPolicy
from fedllm.runtime.emulator_check import Figures, verdict

# All allowed: what is measured of a random model means nothing.
LAX = {"full_zs_margin": -9.0, "plug_margin": -9.0, "gain_margin": -9.0, "thief_margin": -9.0}
NAMES = ("Full-ZS", "Emu-ZS", "OT-Emu", "Plug", "FT", "tunes all layers, 2x", "restores the middle, 2x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    job = {"scenario": "FedOST", "federation.owner": "boss", "federation.keep": "last"}
    job |= {"model.model_name_or_path": "package", "peft": {"r": 2}}
    made = tiny_federation(tmp_path, tmp_path, sizes={"north": 4, "south": 4, "boss": 6}, job=job)
    save_base(tmp_path / "full", num_hidden_layers=5)
    write_jsonl(tmp_path / "data" / "public.jsonl", records("public", 12))
    write_policy(made.folder, LAX)
    return made.folder


def write_policy(folder: Path, policy: dict[str, Any], **settings: Any) -> None:
    emulator: dict[str, Any] = {
        "full_model_name_or_path": "../full",
        "bottom": 1,
        "top": 1,
        "middle": 2,
        "way": "crash",
        "public": "../data/public.jsonl",
        "distil_steps": 2,
        "policy": {"check_steps": 2, "thief_budgets": [2]} | policy,
    }
    data = {"train": "../data/boss.jsonl", "eval": "../data/boss-eval.jsonl"}
    write_yaml(folder / "parties" / "boss.yaml", {"name": "boss", "data": data, "emulator": emulator | settings})


def test_a_package_that_keeps_to_the_policy_is_written_and_checked_again_alike(call: Call, folder: Path) -> None:
    code, out, err = call("emulator", "build", folder / "job.yaml", "--json")
    assert code == 0, err
    built = data_of(out)
    assert tuple(built["losses_nats"]) == NAMES and built["allowed"]
    note = json.loads((folder / "package" / "emulator.json").read_text())
    # CRaSh keeps the depth; nothing in the package says of which blocks it was made.
    assert note["blocks"] == {"model.layers": {"bottom": 1, "middle": 3, "top": 1}}
    assert "full" not in (folder / "package" / "config.json").read_text()
    code, out, _ = call("emulator", "check", folder / "job.yaml", "--json")
    assert code == 0
    assert data_of(out)["losses_nats"] == built["losses_nats"]
    code, _, err = call("emulator", "build", folder / "job.yaml")
    assert code == ExitCode.USAGE and "RUN_EXISTS" in err


@pytest.mark.parametrize("margin", LAX)
def test_a_package_that_breaks_the_policy_is_not_written(margin: str, call: Call, folder: Path) -> None:
    write_policy(folder, LAX | {margin: 9.0})
    code, out, err = call("emulator", "build", folder / "job.yaml", "--quiet")
    assert code == ExitCode.EXPORT == 9
    assert "EMULATOR_REFUSED" in err and "Plug" in out
    assert not (folder / "package").exists() and not (folder / "package.tmp").exists()
    if margin == "plug_margin":
        code, out, _ = call("emulator", "build", folder / "job.yaml", "--quiet", "--json")
        assert code == ExitCode.EXPORT
        assert json.loads(out)["status"] == "refused" and data_of(out)["reasons"]


def test_the_whole_model_never_leaves_as_its_own_emulator(call: Call, folder: Path) -> None:
    """Every figure of it is that of the whole model, to the bit: without a margin that must be too good."""
    write_policy(folder, {"gain_margin": -9.0, "thief_margin": -9.0}, way="whole", middle=None, distil_steps=0)
    code, _, err = call("emulator", "build", folder / "job.yaml", "--quiet")
    assert code == ExitCode.EXPORT and not (folder / "package").exists()
    assert "the emulator as it is" in err and "the tuned emulator" in err and "E20" in err


def test_a_package_in_which_a_block_was_put_that_must_not_leave_is_found(call: Call, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_policy(folder, LAX, way="uniform", distil_steps=0)
    assert call("emulator", "build", folder / "job.yaml", "--quiet")[0] == 0
    secret = load_file(folder / "full" / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    save_file({"innocent": (secret * 100).round().half()}, folder / "package" / "extra.safetensors")
    code, _, err = call("emulator", "check", folder / "job.yaml", "--quiet")
    assert code == ExitCode.EXPORT
    assert "extra.safetensors:innocent is model.layers.2.mlp.up_proj.weight" in err


def test_a_package_is_built_without_a_job_and_what_was_assumed_is_said(call: Call, folder: Path) -> None:
    party, package = folder / "parties" / "boss.yaml", folder / "alone"
    code, out, err = call("emulator", "build", "--party", party, "--output", package, "--json", "--set", "peft.r=2")
    assert code == 0, err
    found = data_of(out)
    assert found["assumed"]["peft.r"] == 2 and found["assumed"]["train.learning_rate"] == 2e-4
    assert (package / "emulator.json").is_file()
    # The figures are those of a job that says the same.
    words = ["federation.owner=boss", "model.model_name_or_path=alone", *("train.learning_rate=2e-4", "seed=0")]
    words += [f"{key}={value}" for key, value in found["assumed"].items() if key != "peft.init_lora_weights"]
    job = [word for each in [*words, "runtime.num_threads=1"] for word in ("--set", each)]
    code, out, err = call("emulator", "check", folder / "job.yaml", *job, "--json")
    assert code == 0, err
    assert data_of(out)["losses_nats"] == found["losses_nats"]
    write_policy(folder, LAX | {"plug_margin": 9.0})
    code, _, _ = call("emulator", "build", "--party", party, "--output", folder / "no", "--quiet")
    assert code == ExitCode.EXPORT and not (folder / "no").exists()


def test_a_job_and_a_party_file_or_neither_are_refused(call: Call, folder: Path) -> None:
    party = folder / "parties" / "boss.yaml"
    for wrong in ([folder / "job.yaml", "--party", party], ["--party", party], []):
        code, _, err = call("emulator", "build", *wrong)
        assert code == ExitCode.USAGE and ("MISSING_KEY" in err or "BAD_COMBINATION" in err)
    code, _, err = call("emulator", "build", "--party", folder / "parties" / "north.yaml", "--output", folder / "no")
    assert code == ExitCode.USAGE and "full_model_name_or_path" in err


def test_the_verdict_names_each_rule_that_is_broken_and_a_nan_breaks_all() -> None:
    policy = ExportPolicy()
    good = Figures(full_zs=2.0, emu_zs=3.0, ot_emu=1.2, plug=1.0, ft=0.9, thieves={"x": 1.1})
    assert verdict(good, policy).allowed
    assert good.recovered == pytest.approx(1 / 1.1)
    for change in (
        {"emu_zs": 1.9},
        {"emu_zs": 2.0},
        {"ot_emu": 0.9},
        {"ot_emu": 1.0},
        {"full_zs": 0.9, "emu_zs": 1.0},
        {"thieves": {"x": 0.9}},
    ):
        assert len(verdict(Figures(**vars(good) | change), policy).broken) == 1, change
    assert len(verdict(Figures(**vars(good) | {"plug": float("nan")}), policy).broken) == 3


def test_a_job_without_an_owner_has_no_emulator(call: Call, tmp_path: Path) -> None:
    made = tiny_federation(tmp_path, tmp_path)
    code, _, err = call("emulator", "build", made.job_file)
    assert code == ExitCode.USAGE and "FedOST" in err


def test_the_recipe_runs_as_it_is(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("init", tmp_path / "job", "--recipe", "offsite")
    assert code == 0 and "fedllm emulator build" in out
    job = tmp_path / "job" / "job.yaml"
    # As it is, but for its length: a few examples and steps, and a policy that so few steps keep to.
    for data in (tmp_path / "job" / "data").rglob("*.jsonl"):
        data.write_text("".join(data.read_text().splitlines(keepends=True)[:12]))
    path = tmp_path / "job" / "parties" / "owner.yaml"
    yaml = YAML(typ="safe", pure=True)
    file = yaml.load(path.read_text())
    file["emulator"] |= {"distil_steps": 1, "policy": LAX | {"check_steps": 1, "thief_budgets": [1]}}
    write_yaml(path, file)
    short = ["federation.num_rounds=2", "train.local_steps=1", "train.warmup_steps=0", "evaluate.max_examples=4"]
    sets = [word for value in [*short, "runtime.num_threads=1"] for word in ("--set", value)]
    code, out, err = call("emulator", "build", job, *sets, "--quiet")
    assert code == 0, err
    assert call("validate", job, *sets)[0] == 0
    code, out, _ = call("run", job, *sets, "--quiet", "--output", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["status"] == "SUCCESS"
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "whole model, plugged (Plug)" in report
    assert "owner, the owner, gets the whole tuned model; the other parties get the adapter" in report


@thorough
def test_the_recipe_s_package_keeps_to_its_own_policy(call: Call, tmp_path: Path) -> None:
    """Nothing shortened: two minutes."""
    assert call("init", tmp_path / "job", "--recipe", "offsite")[0] == 0
    job = tmp_path / "job" / "job.yaml"
    code, out, err = call("emulator", "build", job, "--json")
    assert code == 0, err
    assert data_of(out)["allowed"]
    code, out, _ = call("run", job, "--quiet", "--output", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["status"] == "SUCCESS"


def test_the_recipe_s_data_are_those_that_its_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    scripts = Path(__file__).parents[2] / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    script = runpy.run_path(str(scripts / "make_offsite_base.py"))
    script["write_data"](tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    assert made == {path.relative_to(script["RECIPE"]): path.read_bytes() for path in script["RECIPE"].rglob("*.jsonl")}

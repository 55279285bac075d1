"""From a file to a frozen job: names, origins, overrides, the digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import TinyFederation, with_changes, write_yaml

from fedllm.errors import ConfigError, FedllmError
from fedllm.job.job import Job, load_parties
from fedllm.job.party import NAME_PATTERN
from fedllm.runs.folder import RunFolder
from fedllm.runs.plan_files import effective, read_plan, write_plan

Make = Callable[..., TinyFederation]

PLAN: dict[str, Any] = {
    "name": "plan",
    "parties": ["north", "south"],
    "federation": {"num_rounds": 3},
    "model": {"model_name_or_path": "base"},
    "train": {"local_steps": 2},
}


def job_of(folder: Path, changes: dict[str, Any] | None = None, overrides: list[str] | None = None) -> Job:
    return Job.from_yaml(write_yaml(folder / "job.yaml", with_changes(PLAN, changes or {})), overrides=overrides)


def refused(folder: Path, changes: dict[str, Any], overrides: list[str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        job_of(folder, changes, overrides)
    return caught.value


def test_a_minimal_job_has_the_documented_defaults(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert (job.scenario, job.seed, job.federation.min_parties) == ("FedHomoLLM", 0, 2)
    assert (job.train.optim, job.train.lr_scheduler_type, job.peft.peft_type) == ("adamw_torch", "cosine", "LORA")
    assert job.base_dir == tmp_path.resolve()


def test_a_job_cannot_be_changed(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    with pytest.raises(ValidationError):
        job.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        job.train.learning_rate = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.learning_rat", "did you mean `learning_rate`?"),
        ("federation.min_partys", "did you mean `min_parties`?"),
        ("federation.strategy.momentum", "server_momentum"),
        ("peft.rank", "`r`"),
        ("peft.loraalpha", "did you mean `lora_alpha`?"),
        ("data.maxlength", "did you mean `max_length`?"),
        ("model.model_name", "did you mean `model_name_or_path`?"),
        ("evaluate.tests", "did you mean `test`?"),
        ("runtime.threads", "did you mean `num_threads`?"),
        ("sceanrio", "did you mean `scenario`?"),
        ("train.max_steps", "`local_steps`"),
        ("train.num_train_epochs", "`local_epochs`"),
        ("train.lr", "`learning_rate`"),
        ("train.warmup_ratio", "`warmup_steps`"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name_and_its_line(key: str, nearest: str, tmp_path: Path) -> None:
    error = refused(tmp_path, {key: 1})
    assert error.code == "UNKNOWN_KEY"
    assert nearest in error.fix
    word = key.rpartition(".")[2]
    line = int(error.where.rpartition(":")[2])
    assert f"{word}:" in (tmp_path / "job.yaml").read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", True),
        ("seed", "1"),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("name", 5),
        ("name", "Upper"),
        ("name", "../x"),
        ("parties", "north"),
        ("parties", []),
        ("parties", ["north", 5]),
        ("parties", ["north", "no/rth"]),
        ("parties", ["north", "north"]),
        ("schema_version", 2),
        ("scenario", "FedHomo"),
        ("federation", 3),
        ("federation.num_rounds", 0),
        ("federation.num_rounds", "3"),
        ("federation.num_rounds", 3.0),
        ("federation.fraction_train", 0),
        ("federation.fraction_train", 1.1),
        ("federation.round_timeout", 0),
        ("federation.weight_by", "size"),
        ("federation.strategy", "FedAvg"),
        ("federation.strategy.name", "FedAdamW"),
        ("train.learning_rate", "fast"),
        ("train.learning_rate", True),
        ("train.learning_rate", -1e-3),
        ("train.learning_rate", None),
        ("train.optim", "adamw"),
        ("train.bf16", "no"),
        ("train.bf16", 1),
        ("train.lr_scheduler_type", "cosin"),
        ("peft.r", 0),
        ("peft.r", 8.5),
        ("peft.target_modules", 3),
        ("peft.target_modules", []),
        ("peft.peft_type", "lora"),
        ("data.max_length", 1),
        ("model", {}),
        ("model.base_digest", "abc"),
        ("evaluate.per_device_eval_batch_size", 0),
        ("runtime.num_threads", 0),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_and_a_mend(key: str, value: Any, tmp_path: Path) -> None:
    plan = with_changes(PLAN, {})
    target = plan
    for part in key.split(".")[:-1]:
        target = target.setdefault(part, {})
    target[key.rpartition(".")[2]] = value
    with pytest.raises(ConfigError) as caught:
        Job.from_yaml(write_yaml(tmp_path / "job.yaml", plan))
    error = caught.value
    assert error.code in ("BAD_VALUE", "BAD_COMBINATION", "MISSING_KEY")
    assert error.fix
    assert key.rpartition(".")[2] in error.what
    line = int(error.where.rpartition(":")[2])
    text = (tmp_path / "job.yaml").read_text().splitlines()[line - 1]
    assert key.rpartition(".")[2] in text or text.startswith("-")


def test_numbers_too_large_for_a_number_are_refused(tmp_path: Path) -> None:
    text = write_yaml(tmp_path / "job.yaml", with_changes(PLAN, {"train.learning_rate": 5})).read_text()
    for word in ("1e999", "'inf'", ".inf", "nan"):
        (tmp_path / "job.yaml").write_text(text.replace("learning_rate: 5", f"learning_rate: {word}"))
        with pytest.raises(ConfigError, match="learning_rate"):
            Job.from_yaml(tmp_path / "job.yaml")


def test_a_near_miss_of_a_choice_is_named(tmp_path: Path) -> None:
    assert "did you mean `adamw_torch`?" in refused(tmp_path, {"train.optim": "adamw"}).fix
    assert "did you mean `cosine`?" in refused(tmp_path, {"train.lr_scheduler_type": "cosin"}).fix
    assert "FedHomoLLM" in refused(tmp_path, {"scenario": "FedHomo"}).fix


def test_all_errors_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    error = refused(tmp_path, {"train.lr": 1, "peft.r": 0, "nothing": 1})
    told = [error, *error.also]
    assert {found.code for found in told} == {"UNKNOWN_KEY", "BAD_VALUE"}
    assert len({found.where for found in told}) == 3


def test_a_missing_key_is_named_with_its_section(tmp_path: Path) -> None:
    error = refused(tmp_path, {"federation.num_rounds": None})
    assert (error.code, error.what) == ("MISSING_KEY", "`federation.num_rounds` is missing")
    error = refused(tmp_path, {"model": None})
    assert error.code == "MISSING_KEY"


@pytest.mark.parametrize(
    "changes",
    [
        {"train.local_epochs": 1},
        {"train.local_steps": None, "train.learning_rate": 0.1},
        {"train.optim": "sgd", "train.adam_beta1": 0.8},
        {"train.lr_scheduler_type": "constant", "train.warmup_steps": 3},
        {"federation.strategy": {"name": "FedProx", "proximal_mu": 0.0}},
        {"federation.codec": {"name": "int8", "density": 0.5}},
        {"federation.robust": {"name": "Krum"}},
        {"federation.strategy": {"server_momentum": 0.5}},
    ],
)
def test_values_that_cannot_hold_together_are_refused_with_a_mend(changes: dict[str, Any], tmp_path: Path) -> None:
    error = refused(tmp_path, changes)
    assert error.code == "BAD_COMBINATION"
    assert error.fix


def test_an_override_can_be_a_whole_mapping(tmp_path: Path) -> None:
    job = job_of(tmp_path, {"peft": {"r": 4}}, ["peft={peft_type: PREFIX_TUNING, num_virtual_tokens: 5}"])
    assert (job.peft.peft_type, job.peft.num_virtual_tokens, job.peft.r) == ("PREFIX_TUNING", 5, None)
    assert job.origins["peft"] == "flag"
    assert refused(tmp_path, {}, ["peft={r}"]).code == "BAD_VALUE"


def test_overrides_win_and_every_value_knows_where_it_came_from(tmp_path: Path) -> None:
    overrides = ["train.learning_rate=3e-5", "parties=[a, b, c]", "train.bf16=true", "evaluate.max_new_tokens=5"]
    job = job_of(tmp_path, {"seed": 3}, overrides)
    assert (job.train.learning_rate, job.parties, job.train.bf16) == (3e-5, ["a", "b", "c"], True)
    origins = {row["key"]: (row["value"], row["origin"]) for row in effective(job)}
    assert origins["train.learning_rate"] == (3e-5, "flag")
    assert origins["parties"] == (["a", "b", "c"], "flag")
    assert origins["evaluate.max_new_tokens"] == (5, "flag")
    assert origins["peft.r"] == (8, "default")
    value, origin = origins["seed"]
    line = int(origin.rpartition(":")[2])
    assert (value, (tmp_path / "job.yaml").read_text().splitlines()[line - 1]) == (3, "seed: 3")


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("train.learning_rate", "BAD_VALUE"),
        ("=3", "BAD_VALUE"),
        ("train..x=3", "BAD_VALUE"),
        ("name.x=1", "BAD_VALUE"),
        ("parties.0=x", "BAD_VALUE"),
        ("train.learning_rat=1", "UNKNOWN_KEY"),
        ("nothing.here=1", "UNKNOWN_KEY"),
        ("peft.r=none", "BAD_VALUE"),
        ("seed=true", "BAD_VALUE"),
    ],
)
def test_a_wrong_override_is_refused_as_a_flag(override: str, code: str, tmp_path: Path) -> None:
    error = refused(tmp_path, {}, [override])
    assert (error.code, error.where) == (code, "--set")
    assert error.fix


def test_a_job_survives_json_with_its_digest(tmp_path: Path) -> None:
    job = job_of(tmp_path, {"federation.strategy": {"name": "FedAvgM", "server_momentum": 0.6}, "peft.r": 3})
    again = Job.model_validate(json.loads(json.dumps(job.model_dump(mode="json"))))
    assert again.model_dump() == job.model_dump()
    assert again.digest == job.digest


def test_the_digest_is_of_the_settings_and_of_nothing_else(tmp_path: Path) -> None:
    job = job_of(tmp_path / "one")
    assert job_of(tmp_path / "two").digest == job.digest
    assert job_of(tmp_path / "three", {"peft.r": 8, "seed": 0}).digest == job.digest
    assert job_of(tmp_path / "four", {}, ["train.learning_rate=2e-4"]).digest == job.digest
    changes = [{"seed": 1}, {"train.learning_rate": 1e-3}, {"federation.keep": "last"}, {"parties": ["south", "north"]}]
    changes += [{"runtime.num_threads": 2}, {"federation.strategy.server_learning_rate": 0.5}, {"peft.r": 4}]
    assert len({job.digest, *(job_of(tmp_path / "five", change).digest for change in changes)}) == len(changes) + 1


def test_the_digest_does_not_change_from_release_to_release_unnoticed(tmp_path: Path) -> None:
    # A change here means that runs of the release before cannot be resumed: bump schema_version and say so.
    assert sorted(row["key"] for row in effective(job_of(tmp_path)) if row["key"].startswith("federation")) == [
        "federation.codec.bits",
        "federation.codec.block_size",
        "federation.codec.density",
        "federation.codec.error_feedback",
        "federation.codec.limit",
        "federation.codec.name",
        "federation.codec_down.block_size",
        "federation.codec_down.name",
        "federation.drift_meter",
        "federation.eval_every",
        "federation.fraction_train",
        "federation.keep",
        "federation.lora_rule",
        "federation.min_parties",
        "federation.num_rounds",
        "federation.ranks",
        "federation.robust.clip_norm",
        "federation.robust.name",
        "federation.robust.num_malicious",
        "federation.robust.root_party",
        "federation.round_timeout",
        "federation.strategy.name",
        "federation.strategy.proximal",
        "federation.strategy.proximal_mu",
        "federation.strategy.server_beta1",
        "federation.strategy.server_beta2",
        "federation.strategy.server_learning_rate",
        "federation.strategy.server_momentum",
        "federation.strategy.server_tau",
        "federation.weight_by",
        "federation.weight_unit",
    ]


@given(
    name=st.from_regex(NAME_PATTERN.replace("^", r"\A").replace("$", r"\Z")),
    parties=st.lists(
        st.sampled_from(["1e5", "no", "null", "007", "true", "on", "3", "a-b_c"]), min_size=2, unique=True
    ),
    path=st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=10),
    rate=st.floats(1e-6, 1e30),
    train=st.sampled_from(
        [
            {"optim": "sgd"},
            {"optim": "adafactor", "lr_scheduler_type": "constant"},
            {"adam_beta2": 0.95, "warmup_steps": 0.1},
            {"local_steps": None, "local_epochs": 2},
        ]
    ),
)
@settings(max_examples=60)
def test_the_run_folder_gives_back_the_same_job(
    name: str,
    parties: list[str],
    path: str,
    rate: float,
    train: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    values = with_changes(PLAN, {"name": name, "parties": parties, "model.model_name_or_path": path})
    values["train"] |= train | {"learning_rate": rate}
    job = Job.model_validate(values).located(folder)
    run = RunFolder.create(folder / "run", job_digest=job.digest)
    write_plan(run, job, [])
    run.close()
    again, _ = read_plan(folder / "run")
    assert again.model_dump() == job.model_dump()
    assert again.digest == job.digest
    assert again.base_dir == folder


@pytest.mark.parametrize(
    "party",
    [
        {},
        {"data.eval": None},
        {"data.eval": None, "data.eval_share": 0.3},
        {"data.columns": {"prompt": "question", "completion": "answer"}},
        {"device": "cuda:1", "limits": {"max_rounds": 9}, "model_name_or_path": "here"},
    ],
)
def test_the_run_folder_gives_back_the_same_parties(party: dict[str, Any], make_federation: Make) -> None:
    federation = make_federation(party=party)
    job, parties = federation.job(), federation.parties()
    run = RunFolder.create(federation.folder / "run", job_digest=job.digest)
    write_plan(run, job, parties)
    run.close()
    assert read_plan(run.path)[1] == parties


def test_a_run_folder_whose_job_was_changed_is_refused(make_federation: Make) -> None:
    job = make_federation().job()
    run = RunFolder.create(job.base_dir / "run", job_digest=job.digest)
    write_plan(run, job, [])
    run.close()
    text = (run.path / "job.yaml").read_text()
    (run.path / "job.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    with pytest.raises(ConfigError) as caught:
        read_plan(run.path)
    assert caught.value.code == "RUN_EXISTS"


def test_relative_paths_start_at_the_job_file(tmp_path: Path) -> None:
    job = job_of(tmp_path / "folder", {"evaluate.test": "../test.jsonl"})
    assert job.path("../test.jsonl") == tmp_path.resolve() / "test.jsonl"


def test_party_files_are_read_in_the_job_s_order(make_federation: Make) -> None:
    federation = make_federation(sizes={"south": 3, "north": 3})
    assert [located.party.name for located in federation.parties()] == ["south", "north"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda folder: (folder / "north.yaml").unlink(), "PARTY_UNKNOWN"),
        (lambda folder: write_yaml(folder / "north.yaml", {"name": "south", "data": {"train": "x"}}), "PARTY_UNKNOWN"),
        (lambda folder: write_yaml(folder / "north.yaml", {"name": "north"}), "MISSING_KEY"),
        (lambda folder: write_yaml(folder / "north.yaml", {"name": "north", "data": {"train": ""}}), "BAD_VALUE"),
        (lambda folder: write_yaml(folder / "north.yaml", {"name": "north", "data": {"trian": "x"}}), "UNKNOWN_KEY"),
        (lambda folder: (folder / "north.yaml").write_text("name: [", encoding="utf-8"), "BAD_YAML"),
    ],
)
def test_a_wrong_party_file_is_named(change: Callable[[Path], Any], code: str, make_federation: Make) -> None:
    federation = make_federation()
    change(federation.folder / "parties")
    with pytest.raises(FedllmError) as caught:
        federation.parties()
    assert caught.value.code == code
    assert "north.yaml" in f"{caught.value.where} {caught.value.what} {caught.value.fix}"


def test_a_folder_of_party_files_elsewhere_can_be_named(make_federation: Make, tmp_path: Path) -> None:
    federation = make_federation()
    elsewhere = (federation.folder / "parties").rename(tmp_path / "sites")
    assert [item.base_dir for item in load_parties(federation.job(), elsewhere)] == [elsewhere.resolve()] * 3

"""Every verb as a user types it, in this process: what it prints where, and its exit code."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from verbs import Call, data_of

from fedllm.errors import ExitCode

FAST = {
    "federation.num_rounds": 1,
    "train.local_steps": 1,
    "train.warmup_steps": 0,
    "train.per_device_train_batch_size": 4,
    "evaluate.max_examples": 4,
    "evaluate.max_new_tokens": 4,
    "runtime.num_threads": 1,
}
SETS = [word for key, value in FAST.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedllm.runtime.scaffold import write_job_folder

    return write_job_folder(tmp_path_factory.mktemp("cli") / "my-job").parent


@pytest.fixture(scope="module")
def finished(job_folder: Path) -> Path:
    """A finished run of one round."""
    from fedllm import Job, run_local

    job = Job.from_yaml(job_folder / "job.yaml", overrides=[f"{key}={value}" for key, value in FAST.items()])
    return run_local(job, output=job_folder / "finished").path


def test_init_writes_a_job_that_validates(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("init", tmp_path / "new")
    assert code == 0
    assert "fedllm run" in out
    code, out, _ = call("validate", tmp_path / "new" / "job.yaml", "--json")
    assert code == 0
    assert [party["party"] for party in data_of(out)["parties"]] == ["north", "east", "south"]


def test_init_refuses_a_folder_in_use(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = call("init", tmp_path)
    assert code == ExitCode.USAGE
    assert "RUN_EXISTS" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_init_names_the_nearest_recipe(call: Call, tmp_path: Path) -> None:
    code, _, err = call("init", tmp_path / "new", "--recipe", "fedavgg")
    assert code == ExitCode.USAGE
    assert "BAD_VALUE" in err
    assert "`fedavg`" in err
    assert not (tmp_path / "new").exists()


def test_plan_foretells_the_bytes_of_the_run(call: Call, job_folder: Path, finished: Path) -> None:
    code, out, _ = call("plan", job_folder / "job.yaml", *SETS, "--json")
    assert code == 0
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    sent = sum(row["value"] for row in rows if row["name"] in ("bytes_up", "bytes_down"))
    assert data_of(out)["total_bytes"] == pytest.approx(sent, rel=0.02)
    assert data_of(out)["who_learns_what"]


def test_run_prints_paths_on_stdout_and_rounds_on_stderr(call: Call, job_folder: Path, tmp_path: Path) -> None:
    code, out, err = call("run", job_folder / "job.yaml", *SETS, "--output", tmp_path / "run")
    assert code == 0
    assert f"adapter  {tmp_path / 'run' / 'adapter'}" in out
    assert "round 1/1" in err
    assert "\x1b[" not in out + err
    code, out, _ = call("run", job_folder / "job.yaml", *SETS, "--output", tmp_path / "other", "--json", "--quiet")
    shas = {json.loads((tmp_path / name / "result.json").read_text())["adapter_sha256"] for name in ("run", "other")}
    assert shas == {data_of(out)["adapter_sha256"]}


def test_run_does_not_touch_a_folder_that_holds_a_run(call: Call, job_folder: Path, finished: Path) -> None:
    before = (finished / "result.json").read_bytes()
    code, _, err = call("run", job_folder / "job.yaml", *SETS, "--output", finished)
    assert code == ExitCode.USAGE
    assert "fedllm resume" in err
    assert before == (finished / "result.json").read_bytes()


def test_resume_of_a_finished_run_changes_nothing(call: Call, finished: Path) -> None:
    before = (finished / "journal.jsonl").read_bytes()
    code, out, err = call("resume", finished)
    assert code == 0
    assert str(finished / "adapter") in out
    assert "going on after round 1" in err
    assert before == (finished / "journal.jsonl").read_bytes()


def test_eval_scores_base_and_tuned_model(call: Call, finished: Path) -> None:
    code, out, _ = call("eval", finished, "--json")
    assert code == 0
    assert [row["model"] for row in data_of(out)["rows"]] == ["base model", "federated"]
    code, out, _ = call("eval", finished, "--show")
    assert code == 0
    assert "ROUGE-L" in out


def test_eval_of_a_run_without_end_says_how_to_go_on(call: Call, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints")
    code, _, err = call("eval", copy)
    assert code == ExitCode.USAGE
    assert "RUN_UNFINISHED" in err


def test_compare_gives_a_row_per_model_and_one_sentence(call: Call, job_folder: Path, tmp_path: Path) -> None:
    code, out, _ = call("compare", job_folder / "job.yaml", *SETS, "--output", tmp_path / "run", "--json", "-q")
    assert code == 0
    data = data_of(out)
    kinds = [row["kind"] for row in data["rows"]]
    assert kinds == ["base", "alone", "alone", "alone", "federated", "pooled"]
    assert "ROUGE-L" in data["sentence"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "pooled" in report
    journal = (tmp_path / "run" / "journal.jsonl").read_bytes()
    code, again, _ = call("compare", job_folder / "job.yaml", *SETS, "--output", tmp_path / "run", "--json", "-q")
    assert (code, data_of(again)["rows"]) == (0, data["rows"])
    assert journal == (tmp_path / "run" / "journal.jsonl").read_bytes()


def test_export_merged_gives_the_logits_of_base_and_adapter(call: Call, finished: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert call("export", finished, "--output", tmp_path / "adapter")[0] == 0
    assert call("export", finished, "--merge", "--output", tmp_path / "merged")[0] == 0
    base = AutoModelForCausalLM.from_pretrained(finished.parent / "base")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("type#dress", return_tensors="pt").input_ids
    with torch.no_grad():
        bare = base(ids).logits
        tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, tuned, atol=1e-4, rtol=0)
    assert (bare - tuned).abs().max() > 1e-3


def test_report_writes_the_page_again(call: Call, finished: Path) -> None:
    (finished / "report.html").unlink()
    code, out, _ = call("report", finished)
    assert (code, out.strip()) == (0, str(finished / "report.html"))
    assert (finished / "report.html").is_file()


def test_config_names_the_origin_of_each_value(call: Call, job_folder: Path) -> None:
    _, out, _ = call("config", job_folder / "job.yaml", "--set", "seed=3", "--json")
    origins = {row["key"]: row["origin"] for row in data_of(out)}
    assert origins["seed"] == "flag"
    assert origins["train.learning_rate"].startswith(f"{job_folder / 'job.yaml'}:")
    assert origins["train.weight_decay"] == "default"


@pytest.mark.parametrize("kind", ["job", "party"])
def test_schema_describes_the_files_of_init(call: Call, job_folder: Path, kind: str) -> None:
    from fedllm.job.yaml_file import read_yaml

    _, out, _ = call("schema", kind)
    schema = json.loads(out)
    file = job_folder / "job.yaml" if kind == "job" else job_folder / "parties" / "north.yaml"
    assert set(read_yaml(file).values) <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_doctor_looks_at_machine_and_job(call: Call, job_folder: Path, tmp_path: Path) -> None:
    code, out, _ = call("doctor", job_folder / "job.yaml", "--json")
    assert code == 0
    states = {row["name"]: row["state"] for row in data_of(out)}
    assert states["torch"] == states["job"] == "ok"
    bad = tmp_path / "job.yaml"
    bad.write_text("name: x\n")
    code, out, _ = call("doctor", bad)
    assert code == ExitCode.RESOURCES
    assert "FAULT job" in out and "MISSING_KEY" in out and "fix: " in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["run"], ExitCode.USAGE),
        (["run", "absent.yaml"], ExitCode.USAGE),
        (["resume", "absent"], ExitCode.USAGE),
        (["no-such-verb"], ExitCode.USAGE),
        (["schema", "house"], ExitCode.USAGE),
        (["export", "absent", "--output", "x"], ExitCode.USAGE),
    ],
)
def test_wrong_words_end_with_the_usage_code(call: Call, words: list[str], code: int) -> None:
    found, out, err = call(*words)
    assert (found, out) == (code, "")
    assert err


def test_errors_under_json_are_an_envelope(call: Call, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: x\nsead: 3\n")
    code, out, err = call("validate", tmp_path / "job.yaml", "--json")
    envelope = json.loads(out)
    assert (code, err) == (ExitCode.USAGE, "")
    assert (envelope["status"], envelope["exit_code"]) == ("error", 2)
    codes = [envelope["data"]["code"], *(error["code"] for error in envelope["data"]["also"])]
    assert {"UNKNOWN_KEY", "MISSING_KEY"} <= set(codes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_pauses_a_run_that_resume_finishes(
    call: Call, job_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    from fedllm.train.supervised import SupervisedTrainer

    def interrupted(*args: Any) -> None:
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "train", interrupted)
        found, _, err = call("run", job_folder / "job.yaml", *SETS, "--output", tmp_path / "run")
    assert found == code
    assert f"fedllm resume {tmp_path / 'run'}" in err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "PAUSED"
    assert "PAUSED" in (tmp_path / "run" / "report.html").read_text()
    assert call("resume", tmp_path / "run")[0] == 0

"""`fedllm verify RUN`: whatever was changed in a finished run is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_federation

from fedllm.errors import ConfigError
from fedllm.runs.digests import DIGESTS, covered, read_seal, seal_run
from fedllm.runs.report import write_report
from fedllm.runs.verify import CHECKS, Verified, verify_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run that went to its end; only to be read."""
    return tiny_federation(tmp_path_factory.mktemp("verified"), base).run().path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def named(found: Verified) -> set[str]:
    return {problem.file for problem in found.problems}


def failed(found: Verified) -> set[str]:
    return {check.name for check in found.checks if check.problems}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_run_as_it_was_left_passes_every_check(run: Path) -> None:
    found = verify_run(run)
    assert found.problems == []
    said = {check.name: check.said for check in found.checks}
    assert [name for name, text in said.items() if not text] == ["signature", "audit log", "commitments"]
    assert verify_run(run, seal=found.seal).problems == []


def test_one_bit_of_any_file_is_noticed_and_the_file_is_named(run: Path) -> None:
    names = [name for name in covered(run) if (run / name).stat().st_size]
    assert {"job.yaml", "adapter/README.md", "report.html", "metrics.jsonl", "journal.jsonl"} < set(names)
    assert len(names) > 20
    for name in names:
        before = (run / name).read_bytes()
        flip(run / name)
        assert name in named(verify_run(run)), name
        (run / name).write_bytes(before)
    assert verify_run(run).problems == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        # Each is still JSON, and what stands in it is not what a run writes.
        ("run.json", '"job_digest": "', '"job_digest": "`'),
        ("run.json", '"run_id"', '"run_ie"'),
        ("journal.jsonl", '"round"', '"rnund"'),
        ("provenance.json", '"versions": {', '"versions": 0, "other": {'),
        ("result.json", '"rounds": ', '"rounds": "x", "other": '),
        ("metrics.jsonl", '"value":', '"value":"x","other":'),
        ("config.json", '"values": [', '"values": 0, "other": ['),
    ],
)
def test_a_file_that_holds_other_things_is_named_and_the_rest_is_checked(
    run: Path, name: str, old: str, new: str
) -> None:
    text = (run / name).read_text()
    assert old in text
    (run / name).write_text(text.replace(old, new))
    found = verify_run(run)
    assert name in named(found)
    assert len(found.checks) == len(CHECKS)


def test_a_file_that_was_taken_away_is_named(run: Path) -> None:
    for name in covered(run):
        (run / name).rename(run / "aside.tmp")
        assert name in named(verify_run(run)), name
        (run / "aside.tmp").rename(run / name)
    (run / DIGESTS).unlink()
    assert named(verify_run(run)) == {DIGESTS}


def test_a_file_that_was_put_in_is_named(run: Path) -> None:
    (run / "adapter" / "pytorch_model.bin").write_bytes(b"x")
    (run / "notes.txt").write_text("mine")
    found = verify_run(run)
    assert named(found) == {"adapter/pytorch_model.bin"}
    assert "1 more are not the run's" in found.checks[0].said


def _better_loss(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(row["round"] for row in rows)
    for row in rows:
        if row["round"] == last and row["name"] == "loss_nats":
            row["value"] *= 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ALTERATIONS: dict[str, tuple[str, Callable[[Path], object], set[str]]] = {
    "other weights": ("adapter/adapter_model.safetensors", flip, {"result"}),
    "another model card": (
        "adapter/README.md",
        lambda path: path.write_text(path.read_text().replace("value: 6.", "value: 5.")),
        {"card"},
    ),
    "better metrics": ("metrics.jsonl", _better_loss, {"metrics", "card"}),
    "other settings": (
        "job.yaml",
        lambda path: path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02")),
        {"job"},
    ),
    "another checkpoint": ("checkpoints/round-000002.ckpt", flip, {"checkpoints", "metrics"}),
    "a round left out of the journal": (
        "journal.jsonl",
        lambda path: path.write_text("\n".join(path.read_text().splitlines()[:2] + path.read_text().splitlines()[4:])),
        {"journal", "checkpoints"},
    ),
    "another base model": (
        "provenance.json",
        lambda path: edit_json(path, lambda value: value.update(base_digest="0" * 64)),
        {"card"},
    ),
    "another verdict": (
        "result.json",
        lambda path: edit_json(path, lambda value: value.update(rounds=3)),
        {"journal", "card"},
    ),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_files_say_is_compared_even_where_the_digests_were_made_again(run: Path, name: str) -> None:
    file, change, checks = ALTERATIONS[name]
    noted = verify_run(run).seal
    before = (run / file).read_bytes()
    change(run / file)
    assert (run / file).read_bytes() != before
    seal_run(run)
    found = verify_run(run)
    # The digests are no help any more; the other files are.
    assert "files" not in failed(found)
    assert checks & failed(found)
    assert verify_run(run, seal=noted).problems[0].file == DIGESTS


def test_a_report_that_is_written_again_is_still_the_runs_and_covers_nothing_else(run: Path) -> None:
    (run / "report.html").write_text("shorter")
    assert named(verify_run(run)) == {"report.html"}
    write_report(run)
    assert verify_run(run).problems == []
    flip(run / "local.json")
    write_report(run)
    assert "local.json" in named(verify_run(run))


def test_a_run_that_is_not_finished_is_refused(run: Path, tmp_path: Path) -> None:
    (run / DIGESTS).unlink()
    edit_json(run / "result.json", lambda value: value.update(status="PAUSED"))
    with pytest.raises(ConfigError) as refused:
        verify_run(run)
    assert refused.value.code == "RUN_UNFINISHED"
    with pytest.raises(ConfigError) as refused:
        verify_run(tmp_path / "nothing")
    assert refused.value.code == "RUN_NOT_FOUND"


def test_keys_and_locks_are_not_covered(run: Path) -> None:
    (run / "parties" / "north" / "noise.key").write_bytes(b"k" * 32)
    (run / "live.json").write_text("{}")
    seal = seal_run(run)
    assert not [name for name in seal.files if name.endswith(("noise.key", "live.json", ".lock"))]
    assert read_seal(run) == seal and seal.signature == ""

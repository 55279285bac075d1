"""Damaged checkpoints: always seen, the older generation is used, and nothing is restarted silently."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crashes import Crash, lasting, share_the_base
from tiny import TinyFederation, bits, journal, thorough

from fedllm.errors import ExitCode, FedllmError, PayloadError, StateLost
from fedllm.runs.checkpoint import Generations
from fedllm.runs.folder import RunFolder
from fedllm.runtime import run as run_module
from fedllm.runtime.run import RunResult, resume
from fedllm.scenarios.base import State

Make = Callable[..., TinyFederation]
JOB, RUN = "a" * 64, "b" * 32


def generations(folder: Path, **changes: str) -> Generations:
    values = {"owner": "server", "job_digest": JOB, "run_id": RUN} | changes
    return Generations(folder, values["owner"], values["job_digest"], values["run_id"])


def state(number: int) -> State:
    generator = torch.Generator().manual_seed(number)
    tensors = {"adapter/w": torch.randn(50, generator=generator), "0/step": torch.tensor(float(number))}
    return State(number, tensors, {"best": None, "best_loss": 0.1 * number, "words": ["ä"]})


def test_a_state_comes_back_bit_for_bit_and_two_generations_are_kept(tmp_path: Path) -> None:
    states = generations(tmp_path)
    for number in (0, 1, 2):
        states.save(state(number))
    assert states.present() == states.valid() == [2, 1]
    found = states.load(2)
    assert (found.round, found.fields) == (2, state(2).fields)
    assert bits(found.tensors) == bits(state(2).tensors)


def test_every_flipped_bit_and_every_truncation_is_seen(tmp_path: Path) -> None:
    states = generations(tmp_path)
    states.save(state(1))
    path = next(tmp_path.glob("*.ckpt"))
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        assert states.valid() == [], position
    for length in range(0, len(data), 13):
        path.write_bytes(data[:length])
        assert states.valid() == [], length
    path.write_bytes(data + b"\0")
    assert states.valid() == []
    with pytest.raises(StateLost):
        states.load(1)
    path.write_bytes(data)
    assert states.valid() == [1]


@pytest.mark.parametrize("other", [{"owner": "north"}, {"job_digest": "c" * 64}, {"run_id": "c" * 32}])
def test_the_checkpoint_of_another_run_party_or_job_is_seen(other: dict[str, str], tmp_path: Path) -> None:
    generations(tmp_path / "other", **other).save(state(1))
    states = generations(tmp_path)
    for path in (tmp_path / "other").iterdir():
        shutil.copy(path, tmp_path / path.name)
    assert states.present() == [1]
    assert states.valid() == []


def test_a_checkpoint_under_another_round_s_name_is_seen(tmp_path: Path) -> None:
    states = generations(tmp_path)
    states.save(state(1))
    (tmp_path / "round-000001.ckpt").rename(tmp_path / "round-000002.ckpt")
    assert states.valid() == []


def test_a_state_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    states = generations(tmp_path)
    states.save(state(1))
    with pytest.raises(PayloadError, match="NONFINITE"):
        states.save(State(2, {"w": torch.tensor([1.0, float("nan")])}, {}))
    assert states.valid() == states.present() == [1]


def test_stray_files_are_no_checkpoints(tmp_path: Path) -> None:
    states = generations(tmp_path)
    states.save(state(1))
    for name in ("round-x.ckpt", "round-000002.ckpt.tmp", "notes.txt", "round-.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    assert states.present() == [1]


PLAN = {"federation.num_rounds": 4, "federation.strategy": {"name": "FedAvgM", "server_momentum": 0.5}}


@pytest.fixture
def federation(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> TinyFederation:
    made = make_federation(sizes={"north": 5, "south": 4}, job=PLAN)
    share_the_base(monkeypatch, made)
    return made


def broken_off(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """Return the folder of a run that died in round 4, with rounds 2 and 3 as its generations."""
    real = RunFolder.journal

    def journal_until(self: RunFolder, number: int, step: str, **more: str) -> None:
        real(self, number, step, **more)
        if (number, step) == (4, "begin"):
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(RunFolder, "journal", journal_until)
        federation.run(name)
    folder = federation.folder / name
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "round-000002.ckpt",
        "round-000003.ckpt",
    ]
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    draw = random.Random(len(data))
    for _ in range(200):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


DAMAGE = [flip, truncate, empty, remove]
SOME_DAMAGE = [flip, remove, *(pytest.param(damage, marks=thorough) for damage in (truncate, empty))]


def same_end(result: RunResult, expected: RunResult) -> None:
    assert (result.status, result.adapter_sha256) == ("SUCCESS", expected.adapter_sha256)
    assert lasting(result.rows()) == lasting(expected.rows())


@pytest.mark.parametrize("damage", SOME_DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_older_one_with_the_same_end(
    damage: Callable[[Path], None], federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = federation.run("unbroken")
    folder = broken_off(federation, monkeypatch, "broken")
    damage(folder / "checkpoints" / "round-000003.ckpt")
    result = resume(folder)
    same_end(result, expected)
    steps = journal(folder)
    assert steps.count((2, "rollback")) == 1
    # After the last rollback each later round is committed once.
    after = steps[steps.index((2, "rollback")) :]
    assert [number for number, step in after if step == "commit"] == [3, 4]


def test_a_checkpoint_swapped_with_another_run_s_is_seen(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = federation.run("unbroken")
    first, second = (broken_off(federation, monkeypatch, name) for name in ("one", "two"))
    shutil.copy(first / "checkpoints" / "round-000003.ckpt", second / "checkpoints" / "round-000003.ckpt")
    same_end(resume(second), expected)
    assert (2, "rollback") in journal(second)


@pytest.mark.parametrize("damage", SOME_DAMAGE)
def test_a_party_s_damaged_newest_state_takes_all_back_to_the_round_before(
    damage: Callable[[Path], None], federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = federation.run("unbroken")
    folder = broken_off(federation, monkeypatch, "broken")
    damage(folder / "parties" / "south" / "checkpoints" / "round-000003.ckpt")
    same_end(resume(folder), expected)
    assert (2, "rollback") in journal(folder)


def lost(folder: Path) -> FedllmError:
    before = {path: path.read_bytes() for path in folder.rglob("*.ckpt")}
    with pytest.raises(StateLost) as caught:
        resume(folder)
    assert caught.value.code == "STATE_CORRUPT"
    assert caught.value.exit_code == ExitCode.STATE_LOST == 8
    assert caught.value.fix
    # Nothing was trained, committed or removed.
    assert (4, "commit") not in journal(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.ckpt")} == before
    assert not (folder / "adapter").exists()
    return caught.value


@pytest.mark.parametrize("damage", DAMAGE)
def test_with_every_checkpoint_damaged_the_run_stops_and_is_not_restarted(
    damage: Callable[[Path], None], federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken_off(federation, monkeypatch, "broken")
    for path in sorted((folder / "checkpoints").iterdir()):
        damage(path)
    lost(folder)
    lost(folder)


def test_with_a_party_s_states_all_damaged_the_run_stops_and_names_the_party(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken_off(federation, monkeypatch, "broken")
    for path in (folder / "parties" / "south" / "checkpoints").iterdir():
        flip(path)
    assert "south" in lost(folder).what


def test_checkpoints_lost_with_their_folder_are_not_a_fresh_start(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken_off(federation, monkeypatch, "broken")
    shutil.rmtree(folder / "checkpoints")
    lost(folder)


def test_a_state_put_back_is_gone_on_from(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = federation.run("unbroken")
    folder = broken_off(federation, monkeypatch, "broken")
    shutil.copytree(folder / "checkpoints", federation.folder / "backup")
    for path in (folder / "checkpoints").iterdir():
        flip(path)
    lost(folder)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(federation.folder / "backup", folder / "checkpoints")
    same_end(resume(folder), expected)


def test_a_base_model_that_changed_since_is_refused(
    make_federation: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import save_base

    own = Path(shutil.copytree(base, tmp_path / "own"))
    federation = make_federation(base=own, job=PLAN)
    folder = broken_off(federation, monkeypatch, "broken")
    save_base(own, seed=1)
    with pytest.raises(FedllmError) as caught:
        resume(folder)
    assert caught.value.code == "MODEL_MISMATCH"
    assert (4, "commit") not in journal(folder)


def test_a_common_test_set_that_changed_since_is_refused(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(job=PLAN | {"evaluate.test": "data/common.jsonl"})
    path = federation.folder / "data" / "common.jsonl"
    shutil.copy(federation.folder / "data" / "north-eval.jsonl", path)
    folder = broken_off(federation, monkeypatch, "broken")
    path.write_text(path.read_text().replace("0: ", "zero: ", 1))
    with pytest.raises(FedllmError) as caught:
        resume(folder)
    assert (caught.value.code, caught.value.where) == ("MODEL_MISMATCH", "evaluate.test")


def test_data_that_changed_since_are_refused(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_federation(job=PLAN)
    folder = broken_off(federation, monkeypatch, "broken")
    path = federation.folder / "data" / "south.jsonl"
    path.write_text(path.read_text().replace("0: ", "zero: ", 1))
    with pytest.raises(FedllmError) as caught:
        resume(folder)
    assert (caught.value.code, caught.value.where) == ("DATA_CHANGED", "party south")


def test_a_run_folder_in_use_is_refused(federation: TinyFederation) -> None:
    result = federation.run()
    held = RunFolder.open(result.path)
    try:
        with pytest.raises(FedllmError) as caught:
            resume(result.path)
    finally:
        held.close()
    assert caught.value.code == "RUN_EXISTS"
    assert run_module.resume(result.path).status == "SUCCESS"


def test_a_party_s_folder_in_use_by_a_process_left_over_is_refused(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken_off(federation, monkeypatch, "broken")
    monkeypatch.setattr("fedllm.runs.folder._PATIENCE_S", 0.2)
    left_over = RunFolder(folder, "", "", None)
    left_over.hold_party("south")
    with pytest.raises(FedllmError, match="RUN_EXISTS"):
        resume(folder)
    left_over.close()
    assert resume(folder).status == "SUCCESS"

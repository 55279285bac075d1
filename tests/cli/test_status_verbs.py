"""`fedllm status`, `pause`, `resume`, `stop`, `logs` as a user types them, over folders made by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from by_hand import PARTIES, Place, ago, held, make_place
from verbs import Call, data_of

from fedllm.errors import ExitCode
from fedllm.runs.control import want, wanted
from fedllm.runs.jsonl import append_rows


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@pytest.fixture(autouse=True)
def _nothing_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


def test_status_says_state_why_who_and_next(call: Call, place: Place) -> None:
    place.clerk(connected=["north"], waiting_for=["east"], since=ago(12))
    with held(place.state / ".supervisor"):
        code, out, err = call("status", place.run)
    assert (code, err) == (0, "")
    head, why, waiting, next_ = out.splitlines()
    assert head == "tiny-12345678  WAITING, no round yet"
    assert why.startswith("  why      not connected: east, since ") and why.endswith("UTC (12 s)")
    assert waiting.startswith("  waiting  east: not connected to the server, since ")
    assert next_ == "  next     at east: fedllm join party.yaml"


def test_status_of_a_project_names_the_server_first(call: Call, place: Place) -> None:
    place.clerk(connected=["north"], waiting_for=["east"], since=ago(12))
    with held(place.state / ".supervisor"):
        code, out, _ = call("status", place.project_file)
        found = data_of(call("status", place.project_file, "--json")[1])
    assert code == 0 and out.startswith("server  RUNNING, since ")
    assert "east: not connected" in out and "tiny-12345678  WAITING" in out
    assert found["server"]["missing"] == ["east"] and found["runs"][0]["waiting"][0]["who"] == "east"


def test_status_of_a_project_without_a_run_says_how_to_begin(call: Call, tmp_path: Path) -> None:
    (tmp_path / "project.yaml").write_text("name: trial\nserver: {host: 127.0.0.1}\nparties: [north]\n")
    _, out, _ = call("status", tmp_path / "project.yaml")
    assert "server  DOWN" in out and "fedllm serve" in out and "fedllm submit job.yaml" in out


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("absent", None, "FILE_NOT_FOUND", "no such file"),
        ("folder", "", "RUN_NOT_FOUND", "no run is in this folder"),
        ("job.yaml", "name: x\nparties: [a]\ndata: {}\ntrain: {}\n", "RUN_NOT_FOUND", "no project and no party"),
        ("broken.yaml", "name: [", "BAD_YAML", "broken.yaml"),
    ],
)
def test_a_wrong_path_is_a_clear_error(
    call: Call, tmp_path: Path, name: str, content: str | None, code: str, words: str
) -> None:
    if content == "":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    found, out, err = call("status", tmp_path / name)
    assert (found, out) == (ExitCode.USAGE, "")
    assert code in err and words in err and name in err and "fix:" in err


class Clock:
    """Stands for the time that a verb sleeps; after each sleep something happens."""

    def __init__(self, happens: Callable[[int], None]) -> None:
        self.now, self.looks, self._happens = 1000.0, 0, happens

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.looks += 1
        self._happens(self.looks)

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], None]], Clock]]:
    def make(happens: Callable[[int], None]) -> Clock:
        made = Clock(happens)
        monkeypatch.setattr(time, "sleep", made.sleep)
        monkeypatch.setattr(time, "monotonic", made.monotonic)
        return made

    yield make


def test_follow_tells_what_is_new_at_once_and_is_never_silent_for_ten_seconds(
    call: Call, place: Place, clock: Callable[[Callable[[int], None]], Clock], capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []

    def happens(look: int) -> None:
        if capsys.readouterr().out:
            told.append(look)
        if look == 30:
            place.clerk(waiting_for=["north"], since=ago(0), connected=["east"])
        elif look == 33:
            place.verdict("FAILED", "PARTY_FAILED", where="party north", reason="party north: x [PARTY_FAILED]")

    clock(happens)
    place.clerk(waiting_for=["east"], since=ago(3), connected=["north"])
    with held(place.state / ".supervisor"):
        code, out, _ = call("status", place.run, "--follow")
    assert code == ExitCode.FAILED and "FAILED" in out
    gaps = [later - before for before, later in zip([0, *told], told, strict=False)]
    assert max(gaps) < 10
    # Between the news, which come at once, there is no more than that.
    assert 31 in told and len(told) <= 6


def test_follow_under_json_is_one_object_a_line(
    call: Call, place: Place, clock: Callable[[Callable[[int], None]], Clock]
) -> None:
    clock(lambda look: want(place.run, "pause"))
    code, out, _ = call("status", place.run, "--follow", "--json")
    states = [json.loads(line)["run"]["state"] for line in out.splitlines()]
    assert (code, states) == (ExitCode.PAUSED, ["WAITING", "PAUSED"])


def test_pause_resume_and_stop(call: Call, place: Place) -> None:
    assert data_of(call("pause", place.run, "--json")[1])["run"]["state"] == "PAUSED"
    code, out, _ = call("resume", place.run)
    assert (code, wanted(place.run)) == (0, "run") and "WAITING" in out
    assert data_of(call("resume", place.run, "--json")[1])["run"]["state"] == "WAITING"
    code, out, _ = call("stop", place.run)
    assert code == 0 and "STOPPED" in out
    for verb in ("resume", "pause", "stop"):
        code, _, err = call(verb, place.run)
        assert code == ExitCode.USAGE and "RUN_STOPPED" in err and "fedllm submit" in err


def test_a_run_of_one_machine_is_not_paused_from_here(call: Call, tmp_path: Path) -> None:
    code, _, err = call("pause", make_place(tmp_path, wanted=None).run)
    assert code == ExitCode.USAGE and "RUN_NOT_FOUND" in err and "Ctrl-C" in err


def test_logs_print_each_event(call: Call, place: Place) -> None:
    row = {"round": 2, "party": "east", "code": "NONFINITE", "detail": "", "event": "party_failed", "time": ago(0)}
    append_rows(place.run / "events.jsonl", [row])
    code, out, _ = call("logs", place.run)
    assert code == 0 and out.splitlines()[1].endswith("party_failed  round 2  east  NONFINITE")
    lines = [json.loads(line) for line in call("logs", place.run, "--json")[1].splitlines()]
    assert [line["event"] for line in lines] == ["run_started", "party_failed"] and lines[1] == row


def test_logs_follow_until_the_run_is_over(
    call: Call, place: Place, clock: Callable[[Callable[[int], None]], Clock]
) -> None:
    def happens(look: int) -> None:
        append_rows(place.run / "events.jsonl", [json.loads(EVENT) | {"round": look}])
        if look == 2:
            place.verdict("SUCCESS")

    clock(happens)
    out = call("logs", place.run, "--follow", "--json")[1]
    assert [json.loads(line)["round"] for line in out.splitlines()] == [None, 1, 2]


EVENT = json.dumps({"time": ago(0), "event": "round_committed", "party": None, "code": None, "detail": ""})


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A provisioned project with the site of north; keys take time to make."""
    from fedllm.identity import keys
    from fedllm.job.project import Project
    from fedllm.runtime.provision import provision_all

    root = tmp_path_factory.mktemp("project")
    project = Project.model_validate({"name": "trial", "server": {"host": "127.0.0.1"}, "parties": PARTIES})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys.new_key, "__kwdefaults__", {"bits": keys.MIN_KEY_BITS})
        provision_all(root / "coordinator", project, {name: root / f"site-{name}" for name in PARTIES})
    for name in PARTIES:
        (root / f"{name}.yaml").write_text(f"name: {name}\ndata: {{train: train.jsonl}}\n")
    return root


@pytest.fixture
def north(sites: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(sites / "site-north", tmp_path / "site-north")
    return Path(shutil.copy(sites / "north.yaml", tmp_path / "north.yaml"))


def door(north: Path, **facts: Any) -> None:
    (north.parent / "site-north/state").mkdir(exist_ok=True)
    (north.parent / "site-north/state/door.json").write_text(json.dumps(facts))


def test_a_site_that_is_away_says_how_to_join(call: Call, north: Path) -> None:
    code, out, _ = call("status", north)
    assert code == 0 and out.startswith("north  AWAY, project trial, server 127.0.0.1:8002")
    assert f"next     fedllm join {north}" in out and "run      none yet" in out


def test_a_site_says_whether_it_is_connected_and_since_when(call: Call, north: Path) -> None:
    lock = north.parent / "site-north/state/.supervisor"
    door(north, connected=True, since=ago(500))
    with held(lock, since_s=20):
        found = data_of(call("status", north, "--json")[1])
        # What an earlier process wrote is not taken for news.
        assert (found["state"], found["next"]) == ("CONNECTING", f"fedllm doctor --party {north}")
        door(north, connected=True, since=(since := ago(5)))
        found = data_of(call("status", north, "--json")[1])
        assert (found["state"], found["since"]) == ("CONNECTED", since)
        door(north, connected=False, since=(since := ago(3)))
        found = data_of(call("status", north, "--json")[1])
        assert (found["state"], found["since"]) == ("CONNECTING", since) and "cannot be reached" in found["why"]


def test_a_site_names_the_runs_it_takes_part_in_and_their_last_stage(call: Call, north: Path) -> None:
    from fedllm.runs.audit_log import AuditLog

    runs, log = north.parent / "site-north/state/runs", AuditLog(north.parent / "site-north/audit.jsonl", actor="north")
    for name, number in (("a" * 32, 4), ("b" * 32, 1)):
        (runs / name / "parties/north/checkpoints").mkdir(parents=True)
        (runs / name / f"parties/north/checkpoints/round-{number:06d}.ckpt").write_bytes(b"x")
    log.append("run_joined", run_id="b" * 32, job_digest="1" * 64)
    log.append("operation", run_id="b" * 32, kind="Train", way="asked", round=2)
    with held(runs / ("b" * 32) / "parties/north/.lock"):
        first, second = data_of(call("status", north, "--json")[1])["runs"]
    assert (first["run_id"], first["round"], first["stage"]) == ("a" * 32, 4, "its state of round 4 is kept")
    assert (second["round"], second["stage"]) == (1, "asked Train of round 2; its process runs")
    assert "(bbbbbbbb): asked Train of round 2, since" in call("status", north)[1]


def test_a_site_with_a_damaged_kit_says_so(call: Call, north: Path) -> None:
    (north.parent / "site-north/kit/cert.pem").write_text("x")
    code, _, err = call("status", north)
    assert code == ExitCode.IDENTITY and "KIT_DAMAGED" in err


def test_doctor_at_a_site_lists_all_findings_and_ends_with_its_code(call: Call, north: Path) -> None:
    (north.parent / "site-north/key.pem").chmod(0o644)
    code, out, _ = call("doctor", "--party", north)
    assert code == ExitCode.RESOURCES
    lines = out.splitlines()
    (kit,) = (number for number, line in enumerate(lines) if "KEY_EXPOSED" in line)
    assert lines[kit].startswith("FAULT kit of north") and "chmod 600" in lines[kit + 1]
    assert lines[-1].startswith("1 fault")
    found = data_of(call("doctor", "--party", north, "--json")[1])
    assert {"ok", "fault"} <= {item["state"] for item in found} <= {"ok", "warn", "fault"}


def test_doctor_looks_at_one_place_at_a_time(call: Call, place: Place, north: Path) -> None:
    code, _, err = call("doctor", "--party", north, "--project", place.project_file)
    assert code == ExitCode.USAGE and "BAD_COMBINATION" in err
    code, out, _ = call("doctor", "--project", place.project_file)
    assert code == ExitCode.RESOURCES and "AUTHORITY_MISSING" in out and "KIT_MISSING" in out


def test_doctor_compares_versions_with_constraints(call: Call, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("torch==0.1\n")
    code, out, _ = call("doctor", "--constraints", tmp_path / "constraints.txt")
    assert code == ExitCode.RESOURCES and "instead of 0.1" in out


def test_those_who_are_waited_for_alike_share_a_line(call: Call, place: Place) -> None:
    place.clerk(waiting_for=["north", "east"], since=ago(3))
    with held(place.state / ".supervisor"):
        out = call("status", place.run)[1]
    assert "  waiting  north, east: not connected to the server, since " in out


def test_follow_tells_of_silence_and_not_of_each_party_that_answers(
    call: Call, place: Place, clock: Callable[[Callable[[int], None]], Clock]
) -> None:
    def happens(look: int) -> None:
        waiting = {"north": 2.0 + look} if look > 1 else {"north": 2.0, "east": 2.0}
        silent_s = 9.0 if look == 3 else 0.1
        training = {"stage": "training", "step": look, "num_steps": 9, "silent_s": silent_s}
        place.live(waiting_s=waiting, north=training, east={"stage": "ready"})
        if look == 5:
            want(place.run, "stop")
            place.verdict("FAILED", "PARTY_FAILED")
            locked.__exit__(None, None, None)

    clock(happens)
    locked = held(place.run / ".lock", since_s=60)
    with locked:
        happens(0)
        out = call("status", place.run, "--follow", "--json")[1]
    told = [json.loads(line)["run"] for line in out.splitlines()]
    states = [(run["state"], any(who["why"].startswith("silent") for who in run["waiting"])) for run in told]
    assert states == [("RUNNING", False), ("RUNNING", True), ("RUNNING", False), ("FAILED", False)]

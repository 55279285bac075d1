"""What is said of a run in each state: who is waited for, since when, why, and the next command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from by_hand import PARTIES, Place, ago, held, make_place

from fedllm.errors import ConfigError, ExitCode
from fedllm.runs.control import PASSES
from fedllm.runtime.coordinator import ask, go_on, runs_of, server_status
from fedllm.runtime.status import RunStatus, age_s, run_status


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@pytest.fixture(autouse=True)
def _nothing_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


def names(found: RunStatus) -> list[str]:
    return [who.who for who in found.waiting]


def complete(found: RunStatus) -> RunStatus:
    """Return a status that says all that it must."""
    assert found.why and found.since and found.next
    assert found.exit_code in (0, 1, 3)
    if found.state not in ("SUCCESS", "PARTIAL", "STOPPED") and not found.why.startswith(("at work", "writes")):
        assert found.waiting and all(who.who and who.since and who.why for who in found.waiting)
    return found


def test_a_server_that_does_not_run_is_waited_for(place: Place) -> None:
    place.clerk(age_s=30)
    found = complete(run_status(place.run))
    assert (found.state, names(found), found.goes_on) == ("WAITING", ["server"], True)
    assert found.next == f"fedllm serve {place.project_file}"
    assert 29 < age_s(found.since) < 35


def test_a_server_that_ended_is_noticed_at_once(place: Place) -> None:
    with held(place.state / ".supervisor"):
        place.clerk(connected=PARTIES, waiting_for=[])
        assert run_status(place.run).state == "STARTING"
    assert names(complete(run_status(place.run))) == ["server"]


def test_a_server_on_its_way_up_and_one_that_hangs(place: Place) -> None:
    place.clerk(age_s=500)
    with held(place.state / ".supervisor", since_s=10):
        found = complete(run_status(place.run))
        assert (found.state, names(found)) == ("STARTING", ["server"]) and 9 < age_s(found.since) < 15
    with held(place.state / ".supervisor", since_s=90):
        found = complete(run_status(place.run))
        assert (found.state, found.why) == ("WAITING", "the server gives no sign of life")
        assert "engine.log" in found.next


def test_parties_that_are_not_connected_are_named_with_the_command_for_them(place: Place) -> None:
    since = ago(12)
    place.clerk(connected=["north"], waiting_for=["east"], since=since)
    with held(place.state / ".supervisor"):
        found = complete(run_status(place.run))
    assert (found.state, names(found), found.since) == ("WAITING", ["east"], since)
    assert found.next == "at east: fedllm join party.yaml"


def test_too_few_parties_are_named_with_what_is_missing(place: Place) -> None:
    place.verdict("PAUSED", "QUORUM", reason="east not connected; 1 of at least 2 parties are there [QUORUM]")
    place.clerk(connected=["north"], waiting_for=["east"], since=ago(70))
    with held(place.state / ".supervisor"):
        found = complete(run_status(place.run))
    assert (found.state, names(found)) == ("WAITING", ["east"]) and "1 of at least 2" in found.why


def test_processes_on_their_way_up(place: Place) -> None:
    place.clerk(connected=PARTIES, waiting_for=[])
    with held(place.state / ".supervisor"):
        found = complete(run_status(place.run))
    assert (found.state, names(found)) == ("STARTING", ["server", "north", "east"])


@pytest.mark.parametrize("code", sorted(PASSES))
def test_a_pause_that_passes_is_told_as_a_new_attempt(place: Place, code: str) -> None:
    place.verdict("PAUSED", code, reason=f"what happened [{code}]")
    place.clerk(connected=PARTIES, waiting_for=[])
    with held(place.state / ".supervisor"):
        found = complete(run_status(place.run))
    assert found.state == "STARTING" and code in found.why


def test_what_passes_by_itself_is_what_the_clerk_takes_up_again() -> None:
    clerk = pytest.importorskip("fedllm.runtime.flare.clerk")
    assert frozenset(getattr(clerk, "PASSES", None) or clerk._PASSES) == PASSES


def test_the_run_is_opened(place: Place) -> None:
    place.live(age_s=300, waiting_s={"north": 3})
    with held(place.run / ".lock", since_s=2):
        found = complete(run_status(place.run))
    # What an earlier process told is not taken for news.
    assert (found.state, names(found)) == ("STARTING", ["server"])


TRAINING = {"stage": "training", "step": 3, "num_steps": 11, "silent_s": 0.4}
SILENT = {"stage": "training", "step": 5, "num_steps": 11, "silent_s": 8.2}


def test_a_party_that_trains_is_waited_for(place: Place) -> None:
    place.commit(0, 1)
    with held(place.run / ".lock", since_s=20):
        place.live(waiting_s={"north": 6.0}, north=TRAINING, east={"stage": "ready"})
        found = complete(run_status(place.run))
    assert (found.state, found.round, found.num_rounds) == ("RUNNING", 1, 3)
    (north,) = found.waiting
    assert (north.who, north.why) == ("north", "trains, step 3/11")
    assert 6 <= age_s(north.since) < 8
    assert found.next == f"fedllm logs {place.run} --follow"


def test_a_silent_party_is_named_with_its_silence_and_the_command_there(place: Place) -> None:
    with held(place.run / ".lock", since_s=20):
        place.live(waiting_s={"north": 9.0, "east": 9.0}, north=TRAINING, east=SILENT)
        found = complete(run_status(place.run))
    assert found.waiting[1].why == "silent for 8 s, last known: trains, step 5/11"
    assert found.next == "at east: fedllm status party.yaml"


def test_a_party_that_the_run_goes_on_without_is_named(place: Place) -> None:
    with held(place.run / ".lock", since_s=20):
        place.live(waiting_s={"north": 1.0}, north=TRAINING)
        found = complete(run_status(place.run))
    assert "without east" in found.why and found.next == "at east: fedllm status party.yaml"


def test_the_server_at_its_own_work(place: Place) -> None:
    place.commit(0)
    with held(place.run / ".lock", since_s=20):
        place.live(north={"stage": "ready"}, east={"stage": "ready"})
        assert complete(run_status(place.run)).why == "at work on round 1"
        place.commit(1, 2, 3)
        assert complete(run_status(place.run)).why.startswith("writes the adapter")


def test_a_process_of_the_run_that_hangs_is_named(place: Place) -> None:
    with held(place.run / ".lock", since_s=60):
        place.live(age_s=20, waiting_s={"north": 1.0}, north=TRAINING, east=TRAINING)
        found = complete(run_status(place.run))
    assert (found.state, names(found)) == ("RUNNING", ["server"]) and "log.txt" in found.next


@pytest.mark.parametrize(("wanted", "words"), [("pause", "being paused"), ("stop", "being stopped")])
def test_a_run_that_is_being_paused_or_stopped(tmp_path: Path, wanted: str, words: str) -> None:
    place = make_place(tmp_path, wanted=wanted)
    with held(place.run / ".lock"):
        found = complete(run_status(place.run))
    assert (found.state, names(found)) == ("RUNNING", ["server"]) and words in found.why


def test_a_run_that_was_asked_to_pause(tmp_path: Path) -> None:
    place = make_place(tmp_path, wanted="pause")
    place.verdict("PAUSED", "INTERRUPTED")
    found = complete(run_status(place.run))
    assert (found.state, names(found), found.exit_code) == ("PAUSED", ["coordinator"], ExitCode.PAUSED)
    assert found.next == f"fedllm resume {place.run}"


def test_a_stopped_run(tmp_path: Path) -> None:
    place = make_place(tmp_path, wanted="stop")
    place.verdict("PAUSED", "INTERRUPTED")
    found = complete(run_status(place.run))
    assert (found.state, found.goes_on, found.exit_code) == ("STOPPED", False, ExitCode.FAILED)
    assert found.next.startswith("fedllm submit")


@pytest.mark.parametrize(
    ("code", "where", "who", "next_"),
    [
        ("NOT_APPROVED", "party north", "north", "at north: fedllm approve job.yaml --party party.yaml; then here: "),
        ("DATA_NOT_FOUND", "party east", "east", "at east: fedllm doctor job.yaml --party party.yaml; then here: "),
        ("MODEL_NOT_FOUND", "party east", "east", "at east: fedllm doctor job.yaml --party party.yaml; then here: "),
        ("DISK_FULL", "party east", "east", "at east: free some space; then here: "),
        (
            "NOT_APPROVED",
            "party east, north",
            "east north",
            "at east, north: fedllm approve job.yaml --party party.yaml; then here: ",
        ),
        ("PARTY_FAILED", "party east, x", "east", "at east: see state/log.txt in the site's folder; then here: "),
        ("DISK_FULL", "/state/runs/tiny/journal.jsonl", "coordinator", "free some space; then: "),
        ("NO_PROGRESS", "", "coordinator", "see LOG and the logs of the parties; then: "),
    ],
)
def test_a_pause_that_needs_a_person_names_where_and_what(
    place: Place, code: str, where: str, who: str, next_: str
) -> None:
    place.verdict("PAUSED", code, where=where, reason=f"{where}: it cannot [{code}]")
    with held(place.state / ".supervisor"):
        place.clerk(connected=PARTIES, waiting_for=[])
        found = complete(run_status(place.run))
    assert (found.state, names(found), found.exit_code) == ("PAUSED", who.split(), ExitCode.PAUSED)
    assert code in found.why
    assert found.next == next_.replace("LOG", str(place.state / "log.txt")) + f"fedllm resume {place.run}"


def test_a_full_disk_is_named_though_nothing_could_be_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.clerk(age_s=60)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    found = complete(run_status(place.run))
    assert (found.state, names(found)) == ("WAITING", ["coordinator"]) and "disk is full: 1 MB free" in found.why


def test_a_failed_run_names_the_party_and_the_way_on(place: Place) -> None:
    place.verdict("FAILED", "DATA_CHANGED", where="party east", reason="party east: other data [DATA_CHANGED]")
    found = complete(run_status(place.run))
    assert (found.state, names(found), found.exit_code) == ("FAILED", ["east"], ExitCode.FAILED)
    assert f"fedllm resume {place.run}" in found.next


@pytest.mark.parametrize("status", ["SUCCESS", "PARTIAL"])
def test_a_finished_run(place: Place, status: str) -> None:
    place.commit(0, 1, 2, 3)
    place.verdict(status, reason="All 3 rounds were committed.")
    found = complete(run_status(place.run))
    assert (found.state, found.round, found.waiting, found.exit_code) == (status, 3, (), ExitCode.OK)
    assert found.next == f"fedllm eval {place.run}"


def test_runs_of_one_machine_at_work_interrupted_and_killed(tmp_path: Path) -> None:
    place = make_place(tmp_path, wanted=None)
    place.commit(0)
    with held(place.run / ".lock"):
        found = complete(run_status(place.run))
        assert (found.state, found.why) == ("RUNNING", "at work on round 1")
    found = complete(run_status(place.run))
    assert (found.state, found.next) == ("PAUSED", f"fedllm resume {place.run}") and "killed" in found.why
    place.verdict("PAUSED", "INTERRUPTED", reason="It was interrupted.")
    assert run_status(place.run).why == "It was interrupted."


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        run_status(tmp_path)
    assert error.value.code == "RUN_NOT_FOUND"


def test_the_status_is_a_json_value(place: Place) -> None:
    place.clerk(age_s=30)
    found = json.loads(json.dumps(run_status(place.run).to_json()))
    assert set(found) == {"path", "state", "round", "num_rounds", "why", "since", "next", "waiting"}
    assert set(found["waiting"][0]) == {"who", "since", "why"}


@pytest.mark.parametrize("junk", ["", "{", "[]"])
def test_files_that_are_half_there_are_no_obstacle(place: Place, junk: str) -> None:
    for path in (place.run / "live.json", place.run / "result.json", place.state / "clerk.json"):
        path.write_text(junk)
    assert run_status(place.run).state == "WAITING"


def test_a_stopped_run_does_not_go_on_and_a_paused_one_does(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.verdict("PAUSED", "NOT_APPROVED")
    go_on(place.run)
    assert not (place.run / "result.json").exists()
    ask(place.run, "pause")
    assert run_status(place.run).state == "PAUSED"
    go_on(place.run)
    assert run_status(place.run).state == "WAITING"
    ask(place.run, "stop")
    for refused in (lambda: go_on(place.run), lambda: ask(place.run, "pause")):
        with pytest.raises(ConfigError) as error:
            refused()
        assert error.value.code == "RUN_STOPPED" and "fedllm submit" in error.value.fix


def test_a_finished_run_is_not_stopped_and_one_of_one_machine_is_not_kept(tmp_path: Path) -> None:
    place = make_place(tmp_path / "a")
    place.verdict("SUCCESS")
    ask(place.run, "stop")
    assert run_status(place.run).state == "SUCCESS"
    alone = make_place(tmp_path / "b", wanted=None)
    with pytest.raises(ConfigError, match="no run between machines"):
        ask(alone.run, "pause")


def test_the_server_of_a_project(place: Place) -> None:
    assert (found := server_status(place.project_file)).state == "DOWN" and found.missing == ("north", "east")
    assert found.next == f"fedllm serve {place.project_file}"
    with held(place.state / ".supervisor"):
        assert server_status(place.project_file).state == "STARTING"
        place.clerk(connected=["north"])
        found = server_status(place.project_file)
        assert (found.state, found.connected, found.missing) == ("RUNNING", ("north",), ("east",))
        assert found.next == "at east: fedllm join party.yaml"
        place.clerk(connected=PARTIES)
        assert server_status(place.project_file).next == "fedllm submit job.yaml"
    assert runs_of(place.project_file) == [place.run]


def test_looking_at_runs_loads_no_heavy_library(place: Place) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom fedllm.runtime.coordinator import runs_of, server_status\n"
    code += "from fedllm.runtime.status import run_status\nfrom fedllm.runtime import site_status\n"
    code += "for run in runs_of(Path(sys.argv[1])): run_status(run)\nserver_status(Path(sys.argv[1]))\n"
    code += "print(*({'torch', 'transformers', 'nvflare'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, str(place.project_file)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""


def test_a_verdict_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedllm.errors import RunPaused
    from fedllm.runs.folder import RunFolder
    from fedllm.runtime.run import concluding

    run = RunFolder.create(tmp_path / "run", job_digest="1" * 64)
    monkeypatch.setattr("fedllm.runtime.run.write_report", lambda path: None)
    error: Any = RunPaused("NOT_APPROVED", "the party cannot take part", where="party north")
    with pytest.raises(RunPaused), concluding(run):
        raise error
    run.close()
    found = json.loads((run.path / "result.json").read_text())
    assert (found["where"], found["code"]) == ("party north", "NOT_APPROVED")
    assert found["reason"] == "party north: the party cannot take part [NOT_APPROVED]"


def test_the_command_for_the_server_fits_where_one_stands(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.clerk(age_s=30)
    for folder in (place.root, place.run.parent, place.run, Path("/")):
        monkeypatch.chdir(folder)
        run = Path(os.path.relpath(place.run))
        named = run_status(run).next.removeprefix("fedllm serve ")
        assert Path(named).resolve() == place.project_file

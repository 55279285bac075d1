"""`fedllm up` without its processes: what it prepares, what it shows, how it ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from by_hand import Place, ago, held, make_place
from tiny import TinyFederation

from fedllm.errors import ConfigError, FedllmError, ResourceError, RunFailed, RunPaused
from fedllm.identity.kit import open_kit
from fedllm.job.project import Project
from fedllm.runs.control import want, wanted
from fedllm.runs.jsonl import append_rows
from fedllm.runtime import up as module
from fedllm.runtime.run import Watch
from fedllm.runtime.supervise import Supervised, only_one
from fedllm.runtime.up import up

Make = Callable[..., TinyFederation]
NAMES = ("server", "north", "east")


@pytest.fixture
def short_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedllm.identity import keys

    monkeypatch.setattr(keys.new_key, "__kwdefaults__", {"bits": keys.MIN_KEY_BITS})


@contextmanager
def taken(port: int) -> Iterator[None]:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        yield


def test_a_port_that_somebody_took_in_the_meantime_is_replaced_everywhere(
    make_federation: Make, tmp_path: Path, short_keys: None
) -> None:
    federation = make_federation(sizes={"north": 6, "east": 5})
    job, parties = federation.job(), federation.parties()

    def ports() -> set[int]:
        file = module._prepared(tmp_path, job, parties)
        sites = [tmp_path / "coordinator/site", tmp_path / "site-north", tmp_path / "site-east"]
        return {Project.from_yaml(file).server.port, *(open_kit(site).port for site in sites)}

    (first,) = ports()
    assert ports() == {first}
    with taken(first):
        (second,) = ports()
    assert second != first and ports() == {second}


def test_processes_that_an_earlier_call_left_are_waited_for(
    make_federation: Make, tmp_path: Path, short_keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes={"north": 6, "east": 5})
    lock = only_one(tmp_path / "site-east/state", what="party east")
    monkeypatch.setattr(module, "_LEFT_OVER_S", 0.2)
    with pytest.raises(ConfigError) as error:
        module._prepared(tmp_path, federation.job(), federation.parties())
    assert error.value.code == "RUN_EXISTS" and "site-east" in error.value.where
    monkeypatch.setattr(module, "_LEFT_OVER_S", 20.0)
    threading.Timer(0.5, lock.close).start()
    module._prepared(tmp_path, federation.job(), federation.parties())


def test_a_second_call_for_the_same_job_is_refused_before_anything_is_read(make_federation: Make) -> None:
    federation = make_federation(sizes={"north": 6, "east": 5})
    folder = federation.folder / "up"
    lock = only_one(folder, what="first")
    (federation.folder / "parties/north.yaml").unlink()
    with pytest.raises(ConfigError, match="`fedllm up` runs already"):
        up(federation.job(), folder=folder)
    lock.close()
    with pytest.raises(ConfigError, match="north"):
        up(federation.job(), folder=folder)


def test_without_the_engine_nothing_is_begun(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_federation()

    def missing() -> None:
        raise ResourceError("DEVICE_MISSING", "NVIDIA FLARE is not installed")

    monkeypatch.setattr(module, "need_engine", missing)
    with pytest.raises(ResourceError):
        up(federation.job(), folder=federation.folder / "up")
    assert not (federation.folder / "up").exists()


class Seen:
    """A live view that notes what it is told."""

    def __init__(self) -> None:
        self.news: list[tuple[Any, ...]] = []
        self.watch = Watch(
            on_round=lambda number, rows: self.news.append(("round", number)),
            on_party=lambda event, party, round_: self.news.append((event, party, round_)),
            on_step=lambda party, step, of: self.news.append(("step", party, step, of)),
            on_wait=lambda why, who: self.news.append(("wait", why, who)),
            on_state=lambda party, words: self.news.append(("state", party, words)),
        )


def kept_by(tmp_path: Path, code: str = "import time; time.sleep(60)") -> dict[str, Supervised]:
    return {name: Supervised([sys.executable, "-c", code], tmp_path / f"{name}.log") for name in NAMES}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr("os.fsync", lambda handle: None)


def test_the_view_shows_what_is_waited_for_rounds_steps_and_silence(tmp_path: Path, quick: None) -> None:
    place, seen = make_place(tmp_path), Seen()
    view = module._View(place.run, seen.watch)
    place.clerk(waiting_for=["east"], since=ago(1), connected=["north"])
    with held(place.state / ".supervisor"):
        view.show(module.run_status(place.run))
    assert seen.news == [("wait", "waiting: not connected: east", "")]
    seen.news.clear()
    with held(place.run / ".lock", since_s=20):
        append_rows(place.run / "metrics.jsonl", [{"round": 0}])
        place.commit(0)
        training, silent = ({"stage": "training", "step": 3, "num_steps": 9, "silent_s": s} for s in (0.0, 7.4))
        place.live(waiting_s={"north": 2.0, "east": 2.0}, north=training, east=silent)
        view.show(module.run_status(place.run))
        assert ("round", 0) in seen.news and {("asked", "north", 1), ("asked", "east", 1)} < set(seen.news)
        assert ("step", "north", 3, 9) in seen.news and ("state", "north", "trains, step 3/9") in seen.news
        assert ("state", "east", "silent for 7 s, last known: trains, step 3/9") in seen.news
        seen.news.clear()
        place.live(waiting_s={"east": 3.0}, north={"stage": "ready"}, east=silent)
        view.show(module.run_status(place.run))
        assert ("answered", "north", 1) in seen.news and ("asked", "east", 1) not in seen.news
        assert ("wait", "", "east (silent for 7 s, last known: trains, step 3/9)") in seen.news


def test_processes_are_started_kept_and_ended_when_the_run_is_over(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, kept, seen = make_place(tmp_path / "project"), kept_by(tmp_path), Seen()
    killed: list[int] = []

    def happens(why: str, who: str) -> None:
        pid = kept["north"].pid
        if pid is not None and not killed:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)
        elif kept["north"].starts == 2:
            place.verdict("SUCCESS")

    module._follow(place.run, kept, Watch(on_wait=happens, on_round=seen.watch.on_round))
    assert [process.starts for process in kept.values()] == [1, 2, 1]
    module.stop_all(kept.values())
    assert all(process.pid is None for process in kept.values())


def test_a_process_that_does_not_stay_up_ends_the_run_with_its_own_error(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedllm.runtime import supervise

    monkeypatch.setattr(supervise, "_BACKOFF_S", (0.0,))
    place, kept = make_place(tmp_path / "project"), kept_by(tmp_path)
    kept["east"].command = [sys.executable, "-c", "print('error [KIT_DAMAGED] cert.pem: x'); raise SystemExit(5)"]
    with pytest.raises(RunPaused, match=r"process of east does not stay up: \[KIT_DAMAGED\] cert.pem") as error:
        module._follow(place.run, kept, Watch())
    assert error.value.code == "NO_PROGRESS" and error.value.where == str(tmp_path / "east.log")
    module.stop_all(kept.values())


def test_a_server_that_does_not_come_up_ends_the_waiting(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, kept = make_place(tmp_path / "project"), kept_by(tmp_path)
    # What an earlier call left is old, and does not count.
    place.clerk(age_s=9999)
    monkeypatch.setattr(module, "_SERVER_S", 0.5)
    began = time.monotonic()
    with pytest.raises(RunPaused, match="the server does not come up"):
        module._follow(place.run, kept, Watch())
    assert time.monotonic() - began > 0.5
    module.stop_all(kept.values())


def test_an_interruption_pauses_the_run_ends_all_processes_and_passes(
    make_federation: Make, short_keys: None, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sizes={"north": 6, "east": 5})
    started: list[Supervised] = []

    class Sleeping(Supervised):
        def __init__(self, command: list[str], log: Path) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], log)
            started.append(self)

    class Interrupted(BaseException):
        pass

    def interrupt(why: str, who: str) -> None:
        if len(started) == 3 and all(process.pid for process in started):
            raise Interrupted

    monkeypatch.setattr(module, "Supervised", Sleeping)
    folder = federation.folder / "up"
    with pytest.raises(Interrupted) as stop:
        up(federation.job(), folder=folder, watch=Watch(on_wait=interrupt))
    assert all(process.pid is None for process in started)
    (run,) = (folder / "coordinator/site/state/runs").iterdir()
    assert wanted(run) == "pause" and str(run) in stop.value.__notes__[0]
    # The lock is free again, and the same call goes on with the same run.
    started.clear()
    with pytest.raises(Interrupted):
        up(federation.job(), folder=folder, watch=Watch(on_wait=interrupt))
    assert [path.name for path in (folder / "coordinator/site/state/runs").iterdir()] == [run.name]


@pytest.mark.parametrize(
    ("wanted_", "status", "code", "error"),
    [
        ("run", "PAUSED", "NO_PROGRESS", RunPaused),
        ("run", "FAILED", "DATA_CHANGED", RunFailed),
        ("run", "PAUSED", "DISK_FULL", ResourceError),
        ("pause", "PAUSED", "PARTY_LOST", RunPaused),
        ("stop", "PAUSED", "INTERRUPTED", RunFailed),
    ],
)
def test_each_end_has_its_error(tmp_path: Path, wanted_: Any, status: str, code: str, error: type[FedllmError]) -> None:
    place: Place = make_place(tmp_path, wanted=wanted_)
    place.verdict(status, code)
    with pytest.raises(error) as found:
        module._result_or_error(place.run)
    assert found.value.code == {"stop": "RUN_STOPPED", "pause": "INTERRUPTED"}.get(wanted_, code)
    assert "same command" in found.value.fix


def test_a_stopped_run_is_followed_by_a_new_one(make_federation: Make, tmp_path: Path) -> None:
    from fedllm.runtime.coordinator import run_of, submit

    federation = make_federation(sizes={"north": 6, "east": 5})
    project_file, job = make_place(tmp_path).project_file, federation.job()
    first = submit(job, project_file)
    assert run_of(job, project_file) == first
    with pytest.raises(ConfigError, match="submitted already") as error:
        submit(job, project_file)
    assert f"fedllm status {first}" in error.value.fix
    want(first, "stop")
    assert run_of(job, project_file) is None
    second = submit(job, project_file)
    assert second.name == f"{first.name}-2" and run_of(job, project_file) == second


def test_a_submission_that_broke_off_is_completed(make_federation: Make, tmp_path: Path) -> None:
    from fedllm.runtime.coordinator import submit

    federation = make_federation(sizes={"north": 6, "east": 5})
    project_file = make_place(tmp_path).project_file
    first = submit(federation.job(), project_file)
    (first / "control.json").unlink()
    assert submit(federation.job(), project_file) == first and wanted(first) == "run"

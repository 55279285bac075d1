"""Processes that are kept: started again with growing pauses, ended with all that they started, never twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from fedllm.errors import ConfigError, ResourceError
from fedllm.runs.control import SUPERVISOR_LOCK, is_held
from fedllm.runtime import supervise
from fedllm.runtime.supervise import Supervised, need_engine, only_one, stop_all

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]
# Starts another process in its group, says which, and waits.
PARENT = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
PARENT += "print(p.pid, flush=True); time.sleep(60)"


def wait_for(happened: Callable[[], object], *, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def make(tmp_path: Path, command: list[str]) -> Supervised:
    return Supervised(command, tmp_path / "logs" / "child.log")


def test_a_process_runs_and_its_output_is_in_the_log(tmp_path: Path) -> None:
    child = make(tmp_path, [sys.executable, "-c", "print('hello'); import sys; sys.stderr.write('there')"])
    assert child.keep() and child.starts == 1
    wait_for(child.has_ended)
    assert child.log.read_text().split() == ["hello", "there"] and child.last_exit == 0


def test_a_process_that_ends_is_started_again_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(supervise.time, "monotonic", lambda: now[0])
    child = make(tmp_path, [sys.executable, "-c", "raise SystemExit(3)"])
    starts: list[float] = []
    while len(starts) < 8:
        if child.keep():
            starts.append(now[0])
            assert child._process is not None
            child._process.wait()
        now[0] += 0.5
    pauses = [later - before for before, later in pairwise(starts)]
    assert pauses == pytest.approx([0.5, 1.5, 2.5, 5.5, 10.5, 30.5, 30.5], abs=0.51)
    assert (child.last_exit, child.failures) == (3, 7)


def test_after_a_healthy_time_the_pauses_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(supervise.time, "monotonic", lambda: now[0])
    child = make(tmp_path, SLEEP)
    child.failures = 5
    child.keep()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    now[0] += 61
    wait_for_real(child.has_ended)
    assert child.failures == 1 and child.last_exit == -9
    assert child.keep()
    child.stop(within_s=1)


def wait_for_real(happened: Callable[[], object]) -> None:
    """Wait without the clock, which stands still."""
    for _ in range(500):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def test_an_end_is_told_once(tmp_path: Path) -> None:
    child = make(tmp_path, [sys.executable, "-c", ""])
    child.keep()
    wait_for(child.has_ended)
    assert not child.has_ended() and child.pid is None


def test_stop_ends_the_process_and_what_it_started(tmp_path: Path) -> None:
    child = make(tmp_path, [sys.executable, "-c", PARENT])
    child.keep()
    wait_for(lambda: child.log.exists() and child.log.read_text().strip())
    grandchild, pid = int(child.log.read_text()), child.pid
    assert pid is not None and not is_gone(grandchild)
    child.stop()
    wait_for(lambda: is_gone(pid) and is_gone(grandchild))
    assert child.pid is None and child.last_exit == -signal.SIGTERM


def test_what_a_process_left_running_ends_before_it_is_started_again(tmp_path: Path) -> None:
    child = make(tmp_path, [sys.executable, "-c", PARENT])
    child.keep()
    wait_for(lambda: child.log.exists() and child.log.read_text().strip())
    grandchild = int(child.log.read_text())
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    wait_for(child.has_ended)
    wait_for(lambda: is_gone(grandchild))
    child.stop()


def test_processes_that_do_not_listen_are_killed_together_after_one_grace(tmp_path: Path) -> None:
    children = [Supervised(DEAF, tmp_path / f"{number}.log") for number in range(5)]
    for child in children:
        child.keep()
    wait_for(lambda: all(child.log.read_text() for child in children))
    began = time.monotonic()
    stop_all(children, within_s=2.0)
    # One after the other would be ten seconds.
    assert 1.9 < time.monotonic() - began < 9
    assert [child.last_exit for child in children] == [-signal.SIGKILL] * 5


def test_stopping_what_never_ran_does_nothing(tmp_path: Path) -> None:
    make(tmp_path, SLEEP).stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it, on Linux")
def test_a_process_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from fedllm.runtime.supervise import Supervised\n"
    code += (
        f"child = Supervised({SLEEP!r}, Path(sys.argv[1])); child.keep(); print(child.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
        wait_for(lambda: is_gone(pid))


def test_a_process_ends_when_the_one_that_it_watches_is_gone(tmp_path: Path) -> None:
    watching = "import time; from fedllm.runtime.supervise import end_with_parent; end_with_parent()\n"
    watching += "print('watching', flush=True); time.sleep(60)"
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {watching!r}], stdout=sys.stdout)\n"
    )
    code += "print(p.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = [parent.stdout.readline().strip(), parent.stdout.readline().strip()]
        pid = int(next(line for line in lines if line.isdigit()))
        assert "watching" in lines and not is_gone(pid)
        parent.kill()
        wait_for(lambda: is_gone(pid))


def test_a_second_supervisor_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first = only_one(tmp_path / "state", what="the server")
    assert is_held(tmp_path / "state" / SUPERVISOR_LOCK)
    with pytest.raises(ConfigError, match="the server runs already") as error:
        only_one(tmp_path / "state", what="the server")
    assert error.value.code == "RUN_EXISTS"
    first.close()
    only_one(tmp_path / "state", what="the server").close()
    assert not is_held(tmp_path / "state" / SUPERVISOR_LOCK)


def test_looking_at_a_lock_keeps_nobody_from_taking_it(tmp_path: Path) -> None:
    import fcntl

    only_one(tmp_path, what="x").close()
    with (tmp_path / SUPERVISOR_LOCK).open("r") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)

        def sleep(seconds: float) -> None:
            fcntl.flock(looking, fcntl.LOCK_UN)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(supervise.time, "sleep", sleep)
            only_one(tmp_path, what="x").close()


def test_the_lock_is_not_passed_on_to_what_is_started(tmp_path: Path) -> None:
    lock = only_one(tmp_path / "state", what="x")
    child = make(tmp_path, SLEEP)
    child.keep()
    lock.close()
    assert not is_held(tmp_path / "state" / SUPERVISOR_LOCK)
    child.stop()


def test_a_missing_engine_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise supervise.PackageNotFoundError(name)

    monkeypatch.setattr(supervise, "version", version)
    with pytest.raises(ResourceError, match="FLARE is not installed") as error:
        need_engine()
    assert "fedllm[flare]" in error.value.fix

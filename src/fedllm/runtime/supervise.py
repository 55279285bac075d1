"""Keep a process running: start it, start it again when it ends, end it with everything that it started."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedllm.errors import ConfigError

_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
# A process that lived for so long was well; its next end is not counted with the ones before.
_HEALTHY_S = 60.0
_GRACE_S = 10.0
_WATCH_S = 0.2
_PR_SET_PDEATHSIG = 1


@dataclass
class Supervised:
    """A process that is to run until it is stopped.

    Args:
        command: What to run.
        log: Where its output goes, appended.
        env: Its environment; this process's by default.
    """

    command: Sequence[str]
    log: Path
    env: dict[str, str] | None = None
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _since: float = 0.0
    _failures: int = 0
    _next: float = field(default=0.0)

    @property
    def pid(self) -> int | None:
        """The process id, or None while it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def last_exit(self) -> int | None:
        """The exit status of the process that ran last, or None while one runs."""
        return self._process.poll() if self._process is not None else None

    def keep(self) -> bool:
        """Start the process if it does not run and its time has come; return whether it was started now."""
        if self.pid is not None:
            if time.monotonic() - self._since > _HEALTHY_S:
                self._failures = 0
            return False
        now = time.monotonic()
        if self._process is not None:
            end_group(self._process.pid)
            self._process = None
            self._next = now + _BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)]
            self._failures += 1
        if now < self._next:
            return False
        self._start()
        return True

    def ask_to_stop(self) -> None:
        """Ask the process to end, and do not wait for it."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """End the process and all that it started: first asked to, then killed."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        end_group(process.pid)
        process.wait()

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._since = time.monotonic()
        self.starts += 1


def end_group(pid: int) -> None:
    """Kill what is left of a process's group, if anything.

    Args:
        pid: The process that led the group.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end_with_parent() -> None:
    # A supervisor that is killed must not leave a process behind that holds its port.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_parent() -> None:
    """End this process at once when the one that started it is gone, from a thread; whatever it does is left as is."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def only_one(folder: Path, *, what: str) -> IO[str]:
    """Return a lock that lasts until it is closed or this process ends.

    Args:
        folder: Whose supervisor this is.
        what: What runs already when the lock is taken.

    Raises:
        ConfigError: `RUN_EXISTS`, another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".supervisor").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(
            "RUN_EXISTS", f"{what} runs already", where=str(folder), fix="use that one, or stop it first"
        ) from None
    os.set_inheritable(lock.fileno(), False)
    return lock

"""Keep a process running: start it, start it again when it ends, end it with everything that it started."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from fedllm.disk import hold
from fedllm.errors import ResourceError
from fedllm.runs.control import SUPERVISOR_LOCK

_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
# A process that lived for so long was well; its next end is not counted with the ones before.
_HEALTHY_S = 60.0
_GRACE_S = 5.0
_WATCH_S = 0.2
_FIRST_PROCESS = 1
# Who looks at whether a lock is held shares it for a moment.
_PATIENCE_S = 0.5
_PR_SET_PDEATHSIG = 1
# Looked up here, since little may be done between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


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
    failures: int = field(default=0, init=False)
    last_exit: int | None = field(default=None, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _since: float = field(default=0.0, init=False)
    _next: float = field(default=0.0, init=False)

    @property
    def pid(self) -> int | None:
        """The process id, or None while it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def has_ended(self) -> bool:
        """Return whether the process ended by itself, once for each time. What it left running is killed.

        `last_exit` has its exit status then, and `failures` how many in a row ended soon after their start.
        """
        if self._process is None or self._process.poll() is None:
            return False
        now = time.monotonic()
        end_group(self._process.pid)
        self.last_exit = self._process.returncode
        self._process = None
        if now - self._since > _HEALTHY_S:
            self.failures = 0
        self._next = now + _BACKOFF_S[min(self.failures, len(_BACKOFF_S) - 1)]
        self.failures += 1
        return True

    def keep(self) -> bool:
        """Start the process if it does not run and its time has come; return whether it was started now."""
        self.has_ended()
        if self._process is not None or time.monotonic() < self._next:
            return False
        self._start()
        return True

    def ask_to_stop(self) -> None:
        """Ask the process to end, and do not wait for it."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def stop(self, *, within_s: float = _GRACE_S) -> None:
        """End the process and all that it started: first asked to, then killed.

        Args:
            within_s: How long it may take when it is asked, in seconds.
        """
        stop_all([self], within_s=within_s)

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                # A Ctrl-C at the terminal is for the supervisor, which ends the others in order.
                start_new_session=True,
                preexec_fn=_end_with_parent if _LIBC is not None else None,
            )
        self._since = time.monotonic()
        self.starts += 1


def stop_all(processes: Iterable[Supervised], *, within_s: float = _GRACE_S) -> None:
    """End processes and all that they started: all are asked to at once, and what is left is killed.

    Args:
        processes: Which.
        within_s: How long they may take together when they are asked, in seconds.
    """
    kept = list(processes)
    for each in kept:
        each.ask_to_stop()
    until = time.monotonic() + within_s
    for each in kept:
        process, each._process = each._process, None
        if process is None:
            continue
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        end_group(process.pid)
        each.last_exit = process.wait()


def end_group(pid: int) -> None:
    """Kill what is left of a process's group, if anything.

    Args:
        pid: The process that led the group.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end_with_parent() -> None:
    # A supervisor that is killed must not leave a process behind that holds its port.
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_parent() -> None:
    """End this process at once when the one that started it is gone, from a thread; whatever it does is left as is."""
    parent = os.getppid()

    def watch() -> None:
        # It may have ended before this began; then the first process has taken its place.
        while os.getppid() == parent != _FIRST_PROCESS:
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
    fix = "use that one, or stop it first"
    return hold(folder / SUPERVISOR_LOCK, f"{what} runs already", fix=fix, patience_s=_PATIENCE_S)


def need_engine() -> None:
    """Return if NVIDIA FLARE is installed, without loading it.

    Raises:
        ResourceError: `DEVICE_MISSING`.
    """
    try:
        version("nvflare")
    except PackageNotFoundError:
        fix = "pip install 'fedllm[flare]'"
        raise ResourceError("DEVICE_MISSING", "NVIDIA FLARE is not installed", where="nvflare", fix=fix) from None

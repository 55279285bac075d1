"""The processes of one trial: started here, their memory watched, ended by id, none left behind (Linux only)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_S = 0.1
END_S = 5.0


class Processes:
    """A context: on leaving it all processes that were started inside, and theirs, have ended."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        """Prepare an environment that keeps what the engines write inside the folder.

        Args:
            folder: For logs, home and temporary files.
            bin_folder: Searched first for programs.
        """
        self.folder = folder
        home = folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "TMPDIR": str(home),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self._started: list[psutil.Popen] = []
        self._memory: _Memory | None = None

    def __enter__(self) -> Processes:
        """Return itself; from now on children that lose their parent become this process's children."""
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process: asked first, the ones just started before theirs, then killed."""
        if self._memory:
            self._memory.stop()
        for process in reversed(self._started):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(self._started, timeout=END_S)
        deadline = time.monotonic() + END_S
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
            for child in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(left, timeout=1)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def start(self, name: str, command: Sequence[str | Path]) -> psutil.Popen:
        """Return a process that runs in the background; its output goes to NAME.log.

        Args:
            name: Of its log.
            command: What to start.
        """
        with self.log(name).open("wb") as log:
            process = psutil.Popen(
                [str(part) for part in command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def run(self, name: str, command: Sequence[str | Path], *, timeout_s: float) -> None:
        """Return when a command has ended well.

        Args:
            name: Of its log.
            command: What to start.
            timeout_s: Seconds to wait at most.

        Raises:
            RuntimeError: It failed, or time was up.
        """
        process = self.start(name, command)
        self.wait_until(lambda: process.poll() == 0, process=process, name=name, timeout_s=timeout_s)

    def log(self, name: str) -> Path:
        """Return the file with a process's output.

        Args:
            name: As given when it was started.
        """
        return self.folder / f"{name}.log"

    def tail(self, name: str) -> str:
        """Return the last lines of a process's output.

        Args:
            name: As given when it was started.
        """
        return self.log(name).read_text(errors="replace")[-2000:]

    def watch_memory(self, server: psutil.Popen) -> None:
        """From now on follow the memory of a server and its children.

        Args:
            server: The process that was started.
        """
        self._memory = _Memory(server)
        self._memory.start()

    @property
    def peaks_mb(self) -> tuple[float, float]:
        """Return the peak memory in MB: of the largest of the server's processes, and of all of them together."""
        assert self._memory
        return self._memory.largest / 1e6, self._memory.together / 1e6

    def wait_until(self, done: Callable[[], bool], *, process: psutil.Popen, name: str, timeout_s: float) -> None:
        """Return when something holds.

        Args:
            done: What to wait for.
            process: Waiting ends when this one has ended.
            name: Whose output tells why, if it doesn't come.
            timeout_s: Seconds to wait at most.

        Raises:
            RuntimeError: The process ended before it, or time was up.
        """
        deadline = time.monotonic() + timeout_s
        while not done():
            ended = process.poll() is not None and not done()
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"{name}: {'ended' if ended else 'timed out'}; its last words:\n{self.tail(name)}")
            time.sleep(SAMPLE_S)


class _Memory(threading.Thread):
    """Follows resident memory: the kernel's own high-water mark of each process, and the sampled sum."""

    def __init__(self, server: psutil.Popen) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._ended = threading.Event()
        self.largest = 0
        self.together = 0

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._ended.wait(SAMPLE_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                group = [self._server, *self._server.children(recursive=True)]
                sizes = [_resident_bytes(process.pid) for process in group]
                self.largest = max([self.largest, *(peak for _, peak in sizes)])
                self.together = max(self.together, sum(now for now, _ in sizes))

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self.join()


def _resident_bytes(pid: int) -> tuple[int, int]:
    """Return the bytes of memory that a process holds now and held at most; none when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines)
    now, peak = (int(fields.get(key, "0 kB").split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


@dataclass(frozen=True)
class Usage:
    """Processor seconds at a moment: of the whole machine, and of this process with all that it started and ended."""

    time_s: float
    machine_s: float
    own_s: float

    @classmethod
    def now(cls) -> Usage:
        """Return the usage up to now."""
        cpu = psutil.cpu_times()
        machine_s = sum(cpu) - cpu.idle - cpu.iowait - cpu.guest - cpu.guest_nice
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(time.monotonic(), machine_s, sum(usage.ru_utime + usage.ru_stime for usage in own))

    def others_since(self, before: Usage) -> float:
        """Return the cores that others used on average.

        Args:
            before: The usage at the start.
        """
        others_s = (self.machine_s - before.machine_s) - (self.own_s - before.own_s)
        return max(0.0, others_s / (self.time_s - before.time_s))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody on this machine listens on.

    Args:
        count: How many.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


def is_listening(port: int) -> bool:
    """Return whether someone on this machine takes connections.

    Args:
        port: On loopback.
    """
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

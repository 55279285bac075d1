"""The how-to for three machines, run: each machine is a folder, the server has a loopback address of its own.

A block after `<!-- at: MACHINES -->` is run on each of them, one after `<!-- at: MACHINE, file=NAME -->` goes into a
file there; `<!-- carry: FROM TO -->` is a file that is sent. Nothing is changed but what a reader would: the server's
address, FINGERPRINT and RUN by what was printed, NAME by the machine's name.
"""

import contextlib
import hashlib
import io
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from test_docs import call_main, in_folder
from tiny import write_yaml

pytestmark = pytest.mark.processes
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "three-machines.md"
MACHINES = ("hub", "north", "east")
_SERVER = "127.0.0.2"
_BOUND_S = 500.0
_STEP = re.compile(
    r"<!-- (?P<hidden>hidden )?at: (?P<at>[a-z ]+?)(?:, file=(?P<file>\S+))?(?: -->)?\n```\w+\n(?P<text>.*?)^```$"
    r"|<!-- carry: (?P<source>\S+) (?P<target>\S+) -->",
    re.M | re.S,
)
# What is printed once and typed later.
_TOLD = {"FINGERPRINT": r"^authority (sha256:[0-9a-f]{64})", "RUN": r"^run +(\S+)$"}


@dataclass(frozen=True)
class Step:
    """A file to write, a file to send, or commands."""

    machines: tuple[str, ...] = ()
    file: str = ""
    text: str = ""
    source: str = ""
    target: str = ""


def steps(page: str) -> list[Step]:
    found = []
    for match in _STEP.finditer(page):
        if match["source"]:
            found.append(Step(source=match["source"], target=match["target"]))
        else:
            found.append(Step(tuple(match["at"].split()), match["file"] or "", match["text"]))
    return found


@dataclass
class Machines:
    """Three folders, what was told from one to another, and the processes that go on."""

    root: Path
    address: dict[str, str]
    told: dict[str, str] = field(default_factory=dict)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def do(self, step: Step) -> None:
        if step.source:
            shutil.copy(self.root / step.source, self.root / step.target)
        for machine in step.machines:
            if step.file:
                text = re.sub("|".join(self.address), lambda match: self.address[match[0]], step.text)
                (self.root / machine / step.file).write_text(text, encoding="utf-8")
                continue
            for line in step.text.splitlines():
                if line.startswith("$ "):
                    self.type(machine, line[2:].partition("  #")[0].strip())

    def type(self, machine: str, line: str) -> None:
        for word, value in self.told.items():
            line = re.sub(rf"\b{word}\b", value, line)
        line = line.replace("$NAME", machine)
        words = shlex.split(line)
        if words[-1] == "&":
            self.start(machine, words[:-1])
        elif "--follow" in words:
            self.listen(self.call(machine, words))
        elif words[0] == "fedllm":
            self.listen(self.in_process(machine, words))
        else:
            subprocess.run(line, shell=True, cwd=self.root / machine, check=True, timeout=60)  # noqa: S602

    def start(self, machine: str, words: list[str]) -> None:
        with (self.root / f"{machine}-{words[1]}.log").open("wb") as log:
            self.running.append(
                subprocess.Popen(
                    [sys.executable, "-m", *words], cwd=self.root / machine, stdout=log, stderr=subprocess.STDOUT
                )
            )

    def call(self, machine: str, words: list[str]) -> str:
        """Run a command in a process of its own, as it takes long and may hang."""
        left = max(1.0, self.began + _BOUND_S - time.monotonic())
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=self.root / machine, capture_output=True, text=True, timeout=left)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def in_process(self, machine: str, words: list[str]) -> str:
        said = io.StringIO()
        with in_folder(self.root / machine), contextlib.redirect_stdout(said):
            assert call_main(words) == 0, f"{machine}: {shlex.join(words)}\n{said.getvalue()}"
        return said.getvalue()

    def listen(self, said: str) -> None:
        for word, pattern in _TOLD.items():
            if match := re.search(pattern, said, re.M):
                self.told[word] = match[1]

    def end(self) -> list[int]:
        """End the processes in the order in which they were started; return their exit codes."""
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        return [process.wait(120) for process in self.running]

    def kill(self) -> None:
        """Leave nothing behind, whatever happened."""
        for process in self.running:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for child in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.wait()


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def listening(process: psutil.Process) -> set[str]:
    """Return the TCP addresses at which a process and what it started accept connections."""
    found = set()
    for each in [process, *process.children(recursive=True)]:
        for connection in each.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(f"{connection.laddr.ip}:{connection.laddr.port}")
    return found


def is_alive(process: psutil.Process) -> bool:
    # Where nobody reaps orphans, what has ended stays in the table.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_the_page_names_no_machine_that_is_not_there() -> None:
    found = steps(PAGE.read_text(encoding="utf-8"))
    assert {machine for step in found for machine in step.machines} == set(MACHINES)
    text = "\n".join(step.text for step in found)
    for verb in ("request", "provision", "install", "serve", "join", "approve", "submit", "status", "export"):
        assert f"$ fedllm {verb} " in text


@pytest.mark.timeout(600)
def test_three_machines_tune_an_adapter_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for machine in MACHINES:
        (tmp_path / machine).mkdir()
    port = free_port(_SERVER)
    machines = Machines(tmp_path, {"hub.example.org": _SERVER, "8002": str(port)})
    try:
        for step in steps(PAGE.read_text(encoding="utf-8")):
            machines.do(step)
        server, *sites = [psutil.Process(process.pid) for process in machines.running]
        families = [each for top in (server, *sites) for each in top.children(recursive=True)]
        assert listening(server) == {f"{_SERVER}:{port}"}
        assert [listening(site) for site in sites] == [set(), set()]
        assert machines.end() == [143, 143, 143]
    finally:
        machines.kill()
    assert [process for process in families if is_alive(process)] == []
    adapter = tmp_path / "hub" / "adverts-adapter" / "adapter_model.safetensors"
    assert hashlib.sha256(adapter.read_bytes()).hexdigest() == adapter_of_one_machine(tmp_path)
    private = [path for path in tmp_path.rglob("key.pem") if "coordinator" not in path.parts]
    assert sorted(str(path.relative_to(tmp_path)) for path in private) == [
        "east/site-east/key.pem",
        "north/site-north/key.pem",
    ]


def adapter_of_one_machine(root: Path) -> str:
    """Return the SHA-256 of the adapter that `fedllm run` makes of the same job and data."""
    from fedllm.job.job import Job
    from fedllm.runtime.run import run_local

    one = root / "one"
    shutil.copytree(root / "north" / "base", one / "base")
    shutil.copy(root / "hub" / "job.yaml", one / "job.yaml")
    for party in ("north", "east"):
        shutil.copy(root / party / "train.jsonl", one / f"{party}.jsonl")
        write_yaml(one / "parties" / f"{party}.yaml", {"name": party, "data": {"train": f"../{party}.jsonl"}})
    result = run_local(Job.from_yaml(one / "job.yaml"), output=one / "run")
    assert result.adapter_sha256 is not None
    return result.adapter_sha256


def test_a_command_of_the_page_that_fails_is_found(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (step,) = steps("<!-- at: hub -->\n```console\n$ fedllm status nowhere.yaml\n```\n")
    with pytest.raises(AssertionError, match="nowhere"):
        Machines(tmp_path, {}).do(step)

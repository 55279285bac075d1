"""What goes wrong between machines, with real processes: what the run says, and whether its adapter stays the same.

Run: python benchmarks/faults.py                  (about 12 minutes on 2 cores; Linux, as root for disks and networks)
     python benchmarks/faults.py --only quorum    (one of them)

Server and parties are started as `fedllm serve` and `fedllm join` would be, with keys and kits of their own. Full disks
are small tmpfs mounts, cut networks are network namespaces, wrong clocks need `pip install libfaketime`. What the
machine does not allow is named and left out. Parties that send what they should not are in
`tests/runtime/flare/test_faults.py`, kills in `benchmarks/recovery.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from common import machine
from engine_baselines.processes import free_ports
from recovery import SETTINGS, undisturbed
from ruamel.yaml import YAML

from fedllm.identity.files import KEY_FILE, SERVER, CoordinatorFolder
from fedllm.identity.keys import load_key
from fedllm.identity.signing import Signer
from fedllm.job.approval import approve
from fedllm.job.job import Job, load_parties
from fedllm.job.project import Project
from fedllm.runs.audit_log import AUDIT_FILE
from fedllm.runtime.coordinator import go_on, submit
from fedllm.runtime.provision import provision_all
from fedllm.runtime.scaffold import write_job_folder
from fedllm.runtime.status import run_status

PARTIES = ("north", "east", "south")
LOOPBACK, BRIDGE = "127.0.0.1", "10.77.0.1"
END_S = 240.0
AWAY_S = 60.0
TIMEOUT_S = 20.0
DISK_BYTES = 64 * 2**20


class NotHereError(Exception):
    """This machine does not allow it."""


@dataclass
class Sites:
    """A server and parties, each in its own folder, as processes that can be started and ended one by one."""

    root: Path
    job_file: Path
    host: str = LOOPBACK
    settings: tuple[str, ...] = ()
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    prefixes: dict[str, list[str]] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    run: Path = Path()

    def prepare(self) -> None:
        """Make keys, kits and approvals, and submit the job."""
        self.job = Job.from_yaml(self.job_file, overrides=[*SETTINGS, *self.settings])
        parties = load_parties(self.job)
        self.project_file = self.root / "project.yaml"
        with self.project_file.open("w") as handle:
            server = {"host": self.host, "port": free_ports(1)[0]}
            YAML(typ="safe").dump({"name": "faults", "server": server, "parties": list(PARTIES)}, handle)
        project = Project.from_yaml(self.project_file)
        coordinator = CoordinatorFolder.beside(self.project_file)
        provision_all(coordinator.root, project, {name: self.site(name) for name in PARTIES})
        for located in parties:
            site = self.site(located.party.name)
            signer = Signer(load_key(site / KEY_FILE))
            approve(self.job, located.party, signer=signer, folder=site, project=project.name)
        self.run = submit(self.job, self.project_file, parties=parties)

    def site(self, name: str) -> Path:
        """Return the folder of a site: a party's, or the server's."""
        return CoordinatorFolder.beside(self.project_file).site if name == SERVER else self.root / f"site-{name}"

    def start(self, *names: str) -> None:
        """Start the processes of some sites."""
        for name in names:
            words = ["serve", str(self.project_file)]
            if name != SERVER:
                words = ["join", str(self.job.base_dir / "parties" / f"{name}.yaml"), "--site", str(self.site(name))]
            command = [*self.prefixes.get(name, []), sys.executable, "-m", "fedllm", *words]
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | self.environments.get(name, {})
            with (self.root / f"{name}.log").open("ab") as log:
                self.running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def stop(self, *names: str) -> None:
        """End the processes of some sites in order."""
        for name in names:
            self.running[name].send_signal(signal.SIGTERM)
        for name in names:
            self.running.pop(name).wait(30)

    def processes(self, name: str) -> list[psutil.Process]:
        """Return all processes of a site."""
        first = psutil.Process(self.running[name].pid)
        return [first, *first.children(recursive=True)]

    def journal(self) -> list[tuple[int, str]]:
        """Return what the server did with the rounds."""
        with suppress(OSError):
            rows = map(json.loads, (self.run / "journal.jsonl").read_text().splitlines())
            return [(row["round"], row["step"]) for row in rows]
        return []

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the run's events of one kind."""
        rows = map(json.loads, (self.run / "events.jsonl").read_text().splitlines())
        return [row for row in rows if row["event"] == kind]

    def wait(self, happened: Callable[[], object], *, seconds: float = END_S) -> float:
        """Return after how many seconds something has happened.

        Raises:
            TimeoutError: It did not.
        """
        started = time.monotonic()
        while not happened():
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"nothing after {seconds:.0f} s; it says {run_status(self.run).to_json()}")
            time.sleep(0.05)
        return time.monotonic() - started

    def begun(self, number: int) -> None:
        """Wait until a round has begun."""
        self.wait(lambda: (number, "begin") in self.journal())

    def verdict(self) -> dict[str, Any]:
        """Return how the run stands."""
        with suppress(OSError, ValueError):
            return dict(json.loads((self.run / "result.json").read_text()))
        return {}

    def paused(self, code: str) -> float:
        """Return how long it took until the run was paused for a reason."""
        return self.wait(lambda: (self.verdict().get("status"), self.verdict().get("code")) == ("PAUSED", code))

    def adapter(self) -> str:
        """Wait for the end and return the adapter's digest; each round must be counted once."""
        self.wait(lambda: self.verdict().get("status") in ("SUCCESS", "PARTIAL", "FAILED"))
        commits = [number for number, step in self.journal() if step == "commit"]
        if commits != sorted(set(commits)):
            raise AssertionError(f"rounds counted twice: {commits}")
        return str(self.verdict().get("adapter_sha256"))


@contextmanager
def prepared(folder: Path, job_file: Path, **options: Any) -> Iterator[Sites]:
    """Give sites that are ready to be started; whatever they started is ended by its id."""
    folder.mkdir()
    sites = Sites(folder, job_file, **options)
    sites.prepare()
    try:
        yield sites
    finally:
        left = [process for name in sites.running for process in sites.processes(name) if process.is_running()]
        for process in left:
            process.resume()
        for first in sites.running.values():
            first.terminate()
        psutil.wait_procs(left, timeout=15)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


# Each fault returns what happened, in a few words, and the digest of the adapter ("" where there is to be none).
Outcome = tuple[str, str]


def frozen(folder: Path, job_file: Path) -> Outcome:
    """All processes of a party stand still for a minute in the midst of a round."""
    with prepared(folder, job_file) as sites:
        sites.start(SERVER, *PARTIES)
        sites.begun(2)
        stopped = sites.processes("east")
        for process in stopped:
            process.suspend()
        time.sleep(AWAY_S)
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        lines = len(sites.journal())
        after = sites.wait(lambda: len(sites.journal()) > lines)
        return f"goes on {after:.0f} s after it is back", sites.adapter()


def cut(folder: Path, job_file: Path) -> Outcome:
    """The network between a party and the server is down for a minute in the midst of a round."""
    with bridge() as (namespace, interface), prepared(folder, job_file, host=BRIDGE) as sites:
        sites.prefixes["east"] = ["ip", "netns", "exec", namespace]
        sites.start(SERVER, *PARTIES)
        sites.begun(2)
        command("ip", "link", "set", interface, "down")
        time.sleep(AWAY_S)
        command("ip", "link", "set", interface, "up")
        lines = len(sites.journal())
        after = sites.wait(lambda: len(sites.journal()) > lines)
        return f"goes on {after:.0f} s after it is healed", sites.adapter()


def quorum(folder: Path, job_file: Path) -> Outcome:
    """Two of three parties end, with `min_parties` 2, and come back later."""
    settings = ("federation.min_parties=2", f"federation.round_timeout={TIMEOUT_S}")
    with prepared(folder, job_file, settings=settings) as sites:
        sites.start(SERVER, *PARTIES)
        sites.begun(2)
        sites.stop("east", "south")
        after = sites.paused("QUORUM")
        if after > TIMEOUT_S + 5:
            raise AssertionError(f"paused only after {after:.0f} s")
        sites.wait(lambda: told(sites, "east, south"), seconds=10)
        sites.start("east", "south")
        return f"PAUSED(QUORUM) after {after:.0f} s of {TIMEOUT_S:.0f}; goes on by itself", sites.adapter()


def other_base(folder: Path, job_file: Path) -> Outcome:
    """A party's copy of the base model differs in one bit from what was agreed."""
    with prepared(folder, job_file) as sites:
        copy = folder / "base"
        shutil.copytree(sites.job.base_dir / sites.job.model.model_name_or_path, copy)
        weights = copy / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-100] ^= 1
        weights.write_bytes(data)
        own = job_file.parent / "parties" / "east.yaml"
        before = own.read_text()
        own.write_text(f"{before}\nmodel_name_or_path: {copy}\n")
        try:
            sites.start(SERVER, *PARTIES)
            sites.adapter()
        finally:
            own.write_text(before)
        said = sites.verdict()
        if "east" not in said["reason"] or (1, "begin") in sites.journal():
            raise AssertionError(str(said))
        return f"{said['status']}({said['code']}): {said['reason']}", ""


def server_disk(folder: Path, job_file: Path) -> Outcome:
    """The server's disk is full in the midst of the run."""
    return _full_disk(folder, job_file, SERVER)


def party_disk(folder: Path, job_file: Path) -> Outcome:
    """A party's disk is full in the midst of the run."""
    return _full_disk(folder, job_file, "east")


def _full_disk(folder: Path, job_file: Path, who: str) -> Outcome:
    with ExitStack() as stack:
        # Without the party there is no quorum; with one, the others would go on.
        settings = (f"federation.min_parties={len(PARTIES)}",)
        sites = stack.enter_context(prepared(folder, job_file, settings=settings))
        state = sites.site(who) / "state"
        stack.enter_context(small_disk(state))
        sites.start(SERVER, *PARTIES)
        sites.begun(2)
        filler = state / "filler"
        fill(filler)
        # On a full disk no verdict can be written; the status finds out for itself.
        after = sites.wait(lambda: told(sites, "disk is full" if who == SERVER else f"{who}: DISK_FULL"))
        said = run_status(sites.run)
        if who not in (SERVER, *said.why.replace(":", " ").split()):
            raise AssertionError(f"nobody is named: {said.why}")
        time.sleep(AWAY_S / 6)
        filler.unlink()
        go_on(sites.run)
        sha = sites.adapter()
        if halves := [path.name for path in sites.run.rglob("*.tmp")]:
            raise AssertionError(f"half files: {halves}")
        return f"{said.state} after {after:.0f} s: {said.why.replace(str(folder), '...')}", sha


def told(sites: Sites, word: str) -> bool:
    """Return whether `fedllm status` says a word about why the run does not go on."""
    now = run_status(sites.run)
    return now.state in ("PAUSED", "WAITING") and word in now.why


def server_clock(folder: Path, job_file: Path) -> Outcome:
    """The server's clock is a day ahead."""
    return _clocks(folder, job_file, {SERVER: "+1d"})


def party_clock(folder: Path, job_file: Path) -> Outcome:
    """A party's clock is 10 minutes behind, another's a day."""
    return _clocks(folder, job_file, {"east": "-10m", "south": "-1d"})


def backward_jump(folder: Path, job_file: Path) -> Outcome:
    """The clocks of the server and of a party jump back by an hour in the midst of the run."""
    return _clocks(folder, job_file, {SERVER: "+0", "east": "+0"}, jump="-1h")


def _clocks(folder: Path, job_file: Path, shifts: dict[str, str], *, jump: str = "") -> Outcome:
    library = faketime()
    with prepared(folder, job_file) as sites:
        files = {name: folder / f"{name}.clock" for name in shifts}
        for name, shift in shifts.items():
            files[name].write_text(shift)
            sites.environments[name] = {
                "LD_PRELOAD": str(library),
                "FAKETIME_TIMESTAMP_FILE": str(files[name]),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        sites.start(SERVER, *PARTIES)
        sites.begun(2)
        if jump:
            for path in files.values():
                path.write_text(jump)
        adapter = sites.adapter()
        shown = {name: shift_of(sites.site(name)) for name in shifts}
        if any(abs(seconds) < 60 for seconds in shown.values()):
            raise AssertionError(f"the clocks were right: {shown}")
        return f"nothing; clocks in the audit logs: {', '.join(f'{n} {s:+.0f} s' for n, s in shown.items())}", adapter


def shift_of(site: Path) -> float:
    """Return how far the last entry of a site's audit log is ahead of this machine's clock, in seconds."""
    last = json.loads((site / AUDIT_FILE).read_text().splitlines()[-1])
    return (datetime.fromisoformat(last["time"]) - datetime.now(UTC)).total_seconds()


# What the machine must offer.


def command(*words: str) -> None:
    """Run a command of the system.

    Raises:
        NotHereError: It is not there, or not allowed.
    """
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotHereError(f"`{' '.join(words)}`: {error}") from None


@contextmanager
def bridge() -> Iterator[tuple[str, str]]:
    """Give a network namespace that is connected to this one, and the interface on this side."""
    name = f"fedllm{os.getpid()}"
    interface = f"v{os.getpid()}"
    command("ip", "netns", "add", name)
    try:
        command("ip", "link", "add", interface, "type", "veth", "peer", "name", "out", "netns", name)
        command("ip", "addr", "add", f"{BRIDGE}/24", "dev", interface)
        command("ip", "link", "set", interface, "up")
        for words in (["addr", "add", "10.77.0.2/24", "dev", "out"], ["link", "set", "out", "up"]):
            command("ip", "-n", name, *words)
        command("ip", "-n", name, "link", "set", "lo", "up")
        yield name, interface
    finally:
        with suppress(NotHereError):
            command("ip", "link", "del", interface)
        with suppress(NotHereError):
            command("ip", "netns", "del", name)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Lay a disk of 64 MB over a folder; what is in the folder is copied onto it."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as kept:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        command("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder))
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    try:
        yield
    finally:
        command("umount", "-l", str(folder))


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as handle:
        while True:
            handle.write(bytes(2**12))


def faketime() -> Path:
    """Return the library that shifts a process's clock."""
    spec = importlib.util.find_spec("libfaketime")
    found = list(Path(spec.origin).parent.rglob("libfaketime.so.1")) if spec and spec.origin else []
    if not found:
        raise NotHereError("pip install libfaketime")
    return found[0]


FAULTS: dict[str, Callable[[Path, Path], Outcome]] = {
    each.__name__: each
    for each in (
        frozen,
        cut,
        quorum,
        other_base,
        server_disk,
        party_disk,
        server_clock,
        party_clock,
        backward_jump,
    )
}


def main() -> None:
    """Cause each fault in turn and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    chosen = parser.parse_args().only
    print(machine())
    print("| fault | what happens | adapter as undisturbed |\n|---|---|---|", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        root = Path(scratch)
        job_file = write_job_folder(root / "job")
        expected = undisturbed(job_file, root / "undisturbed")
        for name in chosen:
            told = (FAULTS[name].__doc__ or name).splitlines()[0]
            try:
                happened, sha = FAULTS[name](root / name, job_file)
            except NotHereError as error:
                print(f"| {told} | not here: {error} | - |", flush=True)
                continue
            except (AssertionError, TimeoutError) as error:
                happened, sha = f"FAILED: {error}", "none"
            same = "yes" if sha == expected else "none is made" if not sha else "NO"
            failed += same == "NO"
            print(f"| {told} | {happened} | {same} |", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

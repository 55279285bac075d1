"""What runs in FLARE's processes: who starts the job, the server's half, and a party that gives back what it got."""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.lighter.utils import load_private_key_file, sign_folders
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

from fedllm.identity.kit import open_kit
from fedllm.runs.folder import RunFolder, attach
from fedllm.runs.jsonl import write_json
from fedllm.runtime.base import SERVER, Ready, Restore
from fedllm.runtime.driver import Driver
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.flare.channel import Channel
from fedllm.runtime.flare.desk import Desk
from fedllm.runtime.flare.lines import PartyLines, ServerLines
from fedllm.runtime.flare.link import FlareLink
from fedllm.runtime.flare.party import Member
from fedllm.runtime.flare.pieces import asker
from fedllm.runtime.flare.seal import seal_of
from fedllm.runtime.freshness import Freshness
from fedllm.runtime.host import Blobs, PartyHost
from fedllm.scenarios.base import Log, State, Summand
from fedllm.scenarios.fedhomollm import SCENARIO, Initial, Server, Settings, Train
from fedllm.wire.blob import Blob, in_place
from fedllm.wire.frame import Frame
from fedllm.wire.payload import Manifest, Payload, Tensors, TensorSpec, manifest_of
from fedllm.wire.spool import Spool

RUN_ID, JOB_DIGEST = "0" * 32, "0" * 64
TIMEOUT_S = 600.0
SHARE = -0.5


def tensors_of(load: dict[str, int]) -> Tensors:
    """Return the first adapter: random, so that nothing on the way can make it smaller.

    Args:
        load: `tensors` and `values`.
    """
    generator = torch.Generator().manual_seed(0)
    return {f"t{number:03d}": torch.randn(load["values"], generator=generator) for number in range(load["tensors"])}


def site_of(fl_ctx: FLContext) -> Path:
    """Return the folder of the site whose process this is.

    Args:
        fl_ctx: FLARE's context.
    """
    return Path(fl_ctx.get_workspace().get_root_dir()).parent.parent


class Starter(FLComponent):
    """In the server's parent, in the clerk's place: submits one job as soon as all parties are there."""

    def __init__(self, site: str, admin: str) -> None:
        super().__init__()
        self._site, self._admin = Path(site), Path(admin)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin when FLARE's server is up."""
        if event_type == EventType.SYSTEM_START:
            threading.Thread(target=self._work, args=(fl_ctx.get_engine(),), daemon=True).start()

    def _work(self, engine: Any) -> None:
        load = json.loads((self._site / "load.json").read_text())
        while len(engine.get_clients()) < load["parties"]:
            time.sleep(0.2)
        with engine.new_context() as fl_ctx, tempfile.TemporaryDirectory() as scratch:
            parties = sorted(client.name for client in engine.get_clients())
            write_job(Path(scratch) / "echo", parties, load)
            key = load_private_key_file(str(self._admin / "key.pem"))
            sign_folders(str(Path(scratch) / "echo"), key, str(self._admin / "kit" / "cert.pem"))
            data = zip_directory_to_bytes(scratch, "echo")
            _, _, meta = JobMetaValidator().validate("echo", data)
            meta |= {
                JobMetaKey.JOB_FOLDER_NAME.value: "echo",
                JobMetaKey.SUBMITTER_NAME.value: "admin",
                JobMetaKey.SUBMITTER_ORG.value: "fedllm",
                JobMetaKey.SUBMITTER_ROLE.value: "project_admin",
            }
            engine.job_def_manager.create(meta, data, fl_ctx)


def write_job(where: Path, parties: list[str], load: dict[str, int]) -> None:
    """Write the job's folder: the same configuration as a run's, with the roles of this file.

    Args:
        where: The folder.
        parties: Who takes part.
        load: What is carried.
    """
    none: dict[str, Any] = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    workflow = {"id": "run", "path": "engine_ours.roles.Rounds", "args": {"load": load}}
    executor = {"path": "engine_ours.roles.Echo", "args": {"load": load}}
    apps = {"server": {"workflows": [workflow]}, "party": {"executors": [{"tasks": ["none"], "executor": executor}]}}
    for app, file in (("server", "config_fed_server.json"), ("party", "config_fed_client.json")):
        (where / app / "config").mkdir(parents=True)
        write_json(where / app / "config" / file, none | apps[app])
    deploy = {"server": [SERVER], "party": parties}
    meta = {"name": "echo", "resource_spec": {}, "min_clients": len(parties), "mandatory_clients": parties}
    write_json(where / "meta.json", meta | {"deploy_map": deploy})


class Rounds(Controller):
    """The server's half: the driver, its journal and its checkpoints as in a run, without evaluation."""

    def __init__(self, load: dict[str, int]) -> None:
        super().__init__()
        self._load = load

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to prepare."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to put away."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run the rounds and write what they took."""
        site, job_id, engine = site_of(fl_ctx), fl_ctx.get_job_id(), fl_ctx.get_engine()
        peers = {client.name: f"{client.get_fqcn()}.{job_id}" for client in engine.get_clients()}
        run = RunFolder.create(site / "state" / "run", job_digest=JOB_DIGEST)
        run.run_id = RUN_ID
        kit, channel = open_kit(site), Channel(engine.get_cell(), peers, job_id=job_id)
        link = FlareLink(
            channel,
            spool=Spool(run.path / "spool"),
            seal=seal_of(kit),
            lines=ServerLines(kit, job_id, channel.peers),
            aborted=lambda: bool(abort_signal.triggered),
        )
        federation = LinkedFederation(
            link, kinds=SCENARIO.kinds(), job_digest=JOB_DIGEST, run_id=RUN_ID, timeout_s=TIMEOUT_S
        )
        federation.start_at(run.next_epoch())
        measure = calls if self._load["tensors"] == 1 else rounds
        found = measure(federation, run, self._load)
        write_json(site / "results.json", found)
        link.close()


def rounds(federation: LinkedFederation, run: RunFolder, load: dict[str, int]) -> dict[str, Any]:
    """Return the seconds of whole rounds, from commit to commit, and the memory before and at most.

    Args:
        federation: The parties.
        run: The run folder.
        load: What is carried.
    """
    at: list[float] = []
    memory: dict[str, float] = {}

    def on_round(number: int, rows: Any) -> None:
        at.append(time.perf_counter())
        if number == 0:
            memory["idle_mb"] = memory_mb("VmRSS")
            # The peak up to here is forgotten.
            Path("/proc/self/clear_refs").write_text("5")

    parties = len(federation.parties)
    settings = Settings(num_rounds=load["rounds"], min_parties=parties, eval_every=0, keep="last")
    server = Server(settings, seed=0, common=False)
    outcome = Driver(run, federation, server, load["rounds"], on_round).drive()
    memory["peak_mb"] = memory_mb("VmHWM")
    assert not outcome.failures, outcome.failures
    first, last = tensors_of(load)["t000"], outcome.state.tensors["adapter/t000"]
    assert torch.allclose(last, first * (1 + SHARE) ** load["rounds"], atol=1e-6), "the mean is wrong"
    return {"seconds": [end - start for start, end in itertools.pairwise(at)], **memory}


def memory_mb(name: str) -> float:
    """Return a line of this process's status in MB: `VmRSS` is now, `VmHWM` is at most.

    Args:
        name: Of the line.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def calls(federation: LinkedFederation, run: RunFolder, load: dict[str, int]) -> dict[str, Any]:
    """Return the seconds of calls: a request with tensors to all parties, their answers summed.

    Args:
        federation: The parties.
        run: Not needed.
        load: What is carried.
    """
    adapter = tensors_of(load)
    parties, seconds = federation.parties, []
    manifest = manifest_of({f"update/{name}": tensor for name, tensor in adapter.items()})
    list(federation.ask(Restore(committed_round=0, trained=dict.fromkeys(parties, 0)), round_=0, to=parties))
    for number in range(1, load["rounds"] + 1):
        started = time.perf_counter()
        total = federation.total(Train(adapter=adapter), round_=number, to=parties, manifest=manifest)
        seconds.append(time.perf_counter() - started)
        assert total.parties == parties, total.failures
        # Other tensors each time: those that a party holds would not be sent again.
        adapter = {name: tensor + total.means[f"update/{name}"] for name, tensor in adapter.items()}
    return {"seconds": seconds}


class Echo(Executor):
    """A party: its site's key, its own folder, and no model."""

    def __init__(self, load: dict[str, int]) -> None:
        super().__init__()
        self._load = load
        self._desk: Desk | None = None

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Return nothing; no tasks are given."""
        return Shareable()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin and end with the job."""
        if event_type == EventType.START_RUN:
            cell, job_id = fl_ctx.get_engine().get_cell(), fl_ctx.get_job_id()
            self._desk = desk = Desk(Channel(cell, {SERVER: f"{SERVER}.{job_id}"}, job_id=job_id))
            site = site_of(fl_ctx)
            threading.Thread(target=desk.serve, args=(lambda: member(site, desk, self._load),), daemon=True).start()
        elif event_type in (EventType.END_RUN, EventType.ABORT_TASK) and self._desk:
            self._desk.close()


def member(site: Path, desk: Desk, load: dict[str, int]) -> Member:
    """Return a party as in a run, but for its client half.

    Args:
        site: Its site's folder.
        desk: Where requests come in.
        load: What is carried.
    """
    kit = open_kit(site)
    run = attach(site / "state" / "run", run_id=RUN_ID, job_digest=JOB_DIGEST)
    own = run.path / "parties" / kit.name
    spool = Spool(own / "spool")
    spec = TensorSpec(dtype="float32", shape=[load["values"]])
    manifest = {f"t{number:03d}": spec for number in range(load["tensors"])}

    desk.use(PartyLines(kit, desk.channel.job_id))

    def fetch(frame: Frame) -> Blob:
        ask = asker(desk.way, SERVER, frame.blob_digest)
        return spool.pull(frame.blob_digest, frame.blob_size, sender=SERVER, ask=ask, cancelled=desk.is_closed)

    host = PartyHost(
        party=kit.name,
        job_digest=JOB_DIGEST,
        kinds=SCENARIO.kinds(),
        open_client=lambda log: Client(load, log),
        ready=ready_with(manifest),
        states=run.party_states(kit.name),
        rows=run.party_rows(kit.name),
        blobs=Blobs({}),
        seal=seal_of(kit),
        fresh=Freshness(own / "epoch.json"),
        keep=in_place,
        fetch=fetch,
    )
    return Member(host, run)


def ready_with(manifest: Manifest) -> Callable[[list[int]], Ready]:
    """Return what makes a party's answer to the handshake.

    Args:
        manifest: The adapter's tensors.
    """
    digests = dict.fromkeys(("base_digest", "tokenizer_digest", "template_digest", "common_digest"), "")
    return lambda rounds: Ready(**digests, manifest=manifest, versions={}, rounds=rounds)


class Client:
    """Gives back a changed copy of what it got."""

    def __init__(self, load: dict[str, int], log: Log) -> None:
        self._load, self._round = load, 0

    def handle(self, request: Payload, *, round_: int, deadline: float) -> Payload:
        """Return the first adapter, or an update that takes away half of the adapter."""
        if not isinstance(request, Train):
            return Initial(adapter=tensors_of(self._load))
        self._round = round_
        update = {f"update/{name}": tensor * SHARE for name, tensor in request.adapter.items()}
        return Summand(weight=1, counts={}, tensors=update)

    def state(self) -> State:
        """Return the last round; there is nothing else."""
        return State(self._round, {})

    def restore(self, state: State) -> None:
        """Take back the last round."""
        self._round = state.round

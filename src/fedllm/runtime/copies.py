"""Hand out a marked copy of the adapter to each party, and trace a leak to one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedllm.aggregate.folded import complete
from fedllm.errors import ConfigError, StateLost
from fedllm.identity.keys import read_private, save_private
from fedllm.job.job import Job
from fedllm.models.adapter import skeleton
from fedllm.models.deliver import CONFIG, WEIGHTS
from fedllm.models.digest import file_digest
from fedllm.ownership.claims import MarkSite, new_secret
from fedllm.ownership.marks import mark_sites
from fedllm.ownership.suspect import AdapterSuspect, open_suspect
from fedllm.ownership.tracing import Original, Trace, marked, site_name, trace
from fedllm.runs.folder import RunFolder
from fedllm.runs.plan_files import read_plan
from fedllm.runtime.base import Copy, Done
from fedllm.runtime.federation import LinkedFederation
from fedllm.runtime.site import base_folder
from fedllm.wire.payload import Tensors

# The server's: who has it can tell the copies apart, and take the marks out.
TRACE_KEY = "trace.key"


def hand_out(run: RunFolder, job: Job, federation: LinkedFederation, tensors: Tensors) -> None:
    """Send each party its own copy of the adapter. Sent again after a crash, a copy has the same bits.

    Args:
        run: The run folder at the server; the key is made in it.
        job: The job.
        federation: To the parties.
        tensors: The adapter that the run delivers.
    """
    path, adapter = run.path / TRACE_KEY, complete(tensors)
    if not path.exists():
        save_private(new_secret().encode(), path, fix="it is the run's own")
    key = _key(run.path)
    for party in federation.parties:
        request = Copy(adapter=marked(adapter, party, key=key, strength=job.ownership.trace_strength))
        for reply in federation.ask(request, round_=job.federation.num_rounds, to=[party]):
            if not isinstance(reply.payload, Done):
                code = getattr(reply.payload, "code", "PAYLOAD_REFUSED")
                run.event("party_failed", round_=job.federation.num_rounds, party=party, code=code)


def trace_run(suspect: Path, run: Path, *, base: Path | None = None) -> Trace:
    """Return whose copy of a run's adapter a suspect model came from.

    Args:
        suspect: An adapter's folder, or a whole model's.
        run: The run folder at the server, with its key.
        base: The base model's folder; by default the one that the job names.

    Raises:
        ConfigError: `RUN_NOT_FOUND`, or `BAD_COMBINATION`: the run handed out no marked copies.
        StateLost: `RUN_ALTERED`, the run's adapter is not the one that it delivered.
        ModelError: The suspect, or the base, cannot be read.
    """
    job, parties = read_plan(run)
    if not (run / TRACE_KEY).exists():
        fix = "set `ownership.trace: delivered` in the next job; the folder must be the server's"
        raise ConfigError("BAD_COMBINATION", "the run handed out no marked copies", where=str(run), fix=fix)
    if _delivered(run) != file_digest(run / "adapter" / WEIGHTS):
        fix = f"`fedllm verify {run}` says what else was changed; take the folder from a backup"
        what = "its adapter is not the one that it delivered, so no copy can be compared with it"
        raise StateLost("RUN_ALTERED", what, where=str(run / "adapter" / WEIGHTS), fix=fix)
    is_whole = not (suspect / CONFIG).is_file() and not (suspect / "run.json").is_file()
    found = base or (base_folder(job, parties)[0] if is_whole else None)
    originals = list(originals_of(run / "adapter"))
    if found is not None:
        # How a weight lies is known from the model alone.
        sites = {site.name: site for site in mark_sites(skeleton(found, job.peft, job.task), "product")}
        originals = [replace(one, site=sites.get(one.site.name, one.site)) for one in originals]
    return trace(open_suspect(suspect, found).times, originals, job.parties, key=_key(run))


def originals_of(adapter: Path) -> Iterator[Original]:
    """Yield an adapter's factors by site, as they were before copies were marked.

    Args:
        adapter: Its folder, in PEFT's layout.

    Raises:
        ModelError: `MODEL_NOT_FOUND`.
    """
    own = open_suspect(adapter, None)
    assert isinstance(own, AdapterSuspect)  # noqa: S101
    for name in own.files.names():
        site = site_name(name)
        a, b = own.files.get(name.replace(".lora_B.", ".lora_A.")), own.files.get(name)
        if site is not None and a is not None and b is not None:
            place = MarkSite(name=site, rows=b.shape[0], columns=a.shape[1])
            yield Original(place, a, b, own.scaling(site, a.shape[0]))


def _delivered(run: Path) -> str:
    try:
        return str(json.loads((run / "result.json").read_text(encoding="utf-8"))["adapter_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _key(run: Path) -> str:
    return read_private(run / TRACE_KEY, fix="restore it from a backup of the run folder").decode().strip()

"""What a party's job process does, apart from FLARE: check the job, load once, answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedllm.errors import ConfigError, FedllmError, PolicyError
from fedllm.identity.kit import Kit, open_kit
from fedllm.job.approval import admit
from fedllm.job.job import Job, LocatedParty
from fedllm.job.loading import load_model
from fedllm.job.party import Party
from fedllm.privacy.budget import Purse
from fedllm.runs.audit_log import AUDIT_FILE, AuditLog, read_log
from fedllm.runs.control import read_object
from fedllm.runs.folder import RunFolder, attach
from fedllm.runtime.base import SERVER, Seal
from fedllm.runtime.flare.desk import Answers, Desk
from fedllm.runtime.flare.lines import PartyLines
from fedllm.runtime.flare.pieces import asker
from fedllm.runtime.flare.seal import seal_of
from fedllm.runtime.freshness import Freshness
from fedllm.runtime.guard import Guard
from fedllm.runtime.host import PartyHost
from fedllm.runtime.local import local_hosts
from fedllm.runtime.site import PURSE_FOLDER, open_site, party_tokens
from fedllm.runtime.validate import upload_limits
from fedllm.wire.blob import Blob, in_place
from fedllm.wire.frame import Frame, Parcel, encode, pack, unpack
from fedllm.wire.payload import Failure
from fedllm.wire.spool import Spool

_log = logging.getLogger("fedllm.party")


@dataclass(frozen=True)
class Member:
    """A party that takes part."""

    host: PartyHost
    run: RunFolder

    def handle(self, parcel: Parcel, *, timeout_s: float) -> Parcel:
        """Return the answer to one message.

        Args:
            parcel: The message.
            timeout_s: Time to answer, in seconds.
        """
        return self.host.handle(parcel, timeout_s=timeout_s)

    def close(self) -> None:
        """Let go of the party's folder."""
        self.run.close()


@dataclass(frozen=True)
class Refusal:
    """A party that does not take part; it says so, with a code, to whatever is asked.

    Where its kit cannot be used it has no key to sign with either, and the server refuses its answer.
    """

    code: str
    seal: Seal | None = field(default=None, compare=False)

    def handle(self, parcel: Parcel, *, timeout_s: float) -> Parcel:
        """Return the refusal as the answer to a message.

        Args:
            parcel: The message.
            timeout_s: Time to answer, in seconds.
        """
        envelope = unpack(parcel, max_bytes=2**40).envelope
        sign = self.seal.sign if self.seal else None
        return pack(encode(Failure(code=self.code), envelope.reply()), sign=sign)

    def close(self) -> None:
        """Nothing is held."""


def open_party(site: Path, asked: dict[str, Any], run_id: str, desk: Desk) -> Answers:
    """Return this site's party of a run, loaded and ready to answer, or its refusal.

    Args:
        site: Its site folder.
        asked: The job as it came; nothing of it is believed before it is checked.
        run_id: The run.
        desk: Where requests come in.
    """
    kit: Kit | None = None
    seal: Seal | None = None
    try:
        kit = open_kit(site)
        seal = seal_of(kit)
        return _opened(kit, seal, asked, run_id, desk)
    except FedllmError as error:
        _log.error("the job is refused: %s", error)
        if kit:
            # The refusal stands, whether it can be noted or not.
            with suppress(FedllmError):
                AuditLog.open(site / AUDIT_FILE, actor=kit.name).append("job_refused", run_id=run_id, code=error.code)
        return Refusal(error.code, seal)
    except Exception:  # noqa: BLE001  (the party's boundary: no exception text crosses it)
        _log.exception("the party could not be opened")
        return Refusal("PARTY_FAILED", seal)


def _opened(kit: Kit, seal: Seal, asked: dict[str, Any], run_id: str, desk: Desk) -> Answers:
    site = kit.site
    file = Path(read_object(site / "state" / "site.json")["party_file"])
    party, _ = load_model(Party, file, overrides=[])
    located = LocatedParty(party=party, base_dir=file.resolve().parent)
    job = _checked(asked).located(located.base_dir)
    if kit.name not in job.parties:
        raise PolicyError("POLICY_REFUSED", f"the job is not for `{kit.name}`", where="parties")
    approval = admit(job, party, folder=site, verify=kit.roster.verify, project=kit.project)
    if approval is not None:
        job = job.located(Path(approval.base_dir))
    run = attach(site / "state" / "runs" / run_id, run_id=run_id, job_digest=job.digest)
    log = AuditLog.open(site / AUDIT_FILE, actor=kit.name)
    purse = purse_of(site, party, note=partial(_note_spent, log, run_id))
    loaded = replace(open_site(job, [located]), purses={kit.name: purse})
    if refused := upload_limits(job, [located], loaded.model):
        raise refused[0]

    def on_step(_: str, step: int, num_steps: int) -> None:
        desk.say("training", step, num_steps)

    try:
        host = local_hosts(loaded, {kit.name: party_tokens(loaded, located)}, run, on_step=on_step)[kit.name]
        own = run.path / "parties" / kit.name
        spool, fresh = Spool(own / "spool"), Freshness(own / "epoch.json")
        log.append("run_joined", run_id=run_id, job_digest=job.digest)
    except BaseException:
        run.close()
        raise

    desk.use(PartyLines(kit, desk.channel.job_id))

    def fetch(frame: Frame) -> Blob:
        desk.say("fetching")
        digest, size = frame.travels
        ask = asker(desk.way, SERVER, digest)
        return spool.pull(digest, size, sender=SERVER, ask=ask, cancelled=desk.is_closed)

    guard = Guard(log, job, party, own, run_id)
    return Member(replace(host, guard=guard, seal=seal, fresh=fresh, keep=in_place, fetch=fetch), run)


def purse_of(site: Path, party: Party, *, note: Callable[[int, str], object]) -> Purse:
    """Return where a site keeps what has been spent of its privacy; its audit log knows the ledger's last line.

    Args:
        site: The site folder.
        party: The site's own file.
        note: Writes a line of the ledger into the audit log.

    Raises:
        ConfigError: The audit log cannot be read.
    """
    path = site / AUDIT_FILE
    entries = (entry for _, _, entry in read_log(path)) if path.exists() else ()
    spent = [entry.digest for entry in entries if entry and entry.event == "privacy_spent"]
    return Purse(site / PURSE_FOLDER, party.limits.max_epsilon, noted=(spent and spent[-1]) or "", note=note)


def _note_spent(log: AuditLog, run_id: str, number: int, line: str) -> None:
    log.append("privacy_spent", run_id=run_id, round=number, digest=line)


def _checked(asked: dict[str, Any]) -> Job:
    try:
        return Job.model_validate(asked)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise ConfigError("BAD_VALUE", f"the job that came is not valid: {fields[:200]}", where="job") from None

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
from fedllm.privacy.budget import PURSE_FOLDER, Purse
from fedllm.runs.audit_log import AUDIT_FILE, AuditLog, read_log
from fedllm.runs.control import read_object
from fedllm.runs.folder import RunFolder, attach
from fedllm.runtime.base import SERVER, Seal
from fedllm.runtime.flare.desk import Answers, Desk
from fedllm.runtime.flare.lines import PartyLines
from fedllm.runtime.flare.pieces import asker
from fedllm.runtime.flare.seal import seal_of, sum_signatures
from fedllm.runtime.flare.waiting import Waiting, no_client, not_ready
from fedllm.runtime.freshness import Freshness
from fedllm.runtime.guard import Guard
from fedllm.runtime.host import Blobs, PartyHost
from fedllm.runtime.local import local_hosts
from fedllm.runtime.package_party import PACKAGES, Lineage, Taker
from fedllm.runtime.site import awaits_package, open_site, party_tokens
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

    A party whose base model the owner sends comes back unloaded, and is loaded when the package is there.

    Args:
        site: Its site folder.
        asked: The job as it came; nothing of it is believed before it is checked.
        run_id: The run.
        desk: Where requests come in.
    """
    return _or_refusal(site, run_id, lambda kit, seal: _opened(kit, seal, asked, run_id, desk))


def _or_refusal(site: Path, run_id: str, open_: Callable[[Kit, Seal], Answers]) -> Answers:
    kit: Kit | None = None
    seal: Seal | None = None
    try:
        kit = open_kit(site)
        seal = seal_of(kit)
        return open_(kit, seal)
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
    seat = _Seat(kit, seal, desk, job, located, run, AuditLog.open(site / AUDIT_FILE, actor=kit.name))
    answers = seat.waiting() if awaits_package(job, located) else seat.member()
    desk.use(PartyLines(kit, desk.channel.job_id))
    return answers


class _Inbox:
    """What a party remembers of the messages that came. Who makes one holds the party's folder."""

    def __init__(self, own: Path) -> None:
        self.spool, self.fresh = Spool(own / "spool"), Freshness(own / "epoch.json")


@dataclass(frozen=True)
class _Seat:
    """What a party of a run has at its site before a model is loaded; `inbox` is that of a party that waited for it."""

    kit: Kit
    seal: Seal
    desk: Desk
    job: Job
    located: LocatedParty
    run: RunFolder
    log: AuditLog
    inbox: _Inbox | None = None

    def member(self) -> Member:
        """Return the party, loaded."""
        kit, job, run = self.kit, self.job, self.run
        purse = purse_of(kit.site, self.located.party, note=partial(_note_spent, self.log, run.run_id))
        loaded = replace(open_site(job, [self.located]), purses={kit.name: purse})
        if refused := upload_limits(job, [self.located], loaded.model):
            raise refused[0]
        try:
            data, signatures = {kit.name: party_tokens(loaded, self.located)}, sum_signatures(kit)
            host = local_hosts(loaded, data, run, on_step=self._on_step, signatures=lambda _: signatures)[kit.name]
            inbox = self.inbox or _Inbox(self._own)
            self.log.append("run_joined", run_id=run.run_id, job_digest=job.digest)
        except BaseException:
            run.close()
            raise
        return Member(self._at_the_desk(host, inbox), run)

    def waiting(self) -> Waiting:
        """Return the party without its model, for which the package is still to come."""
        kit, job, run, party = self.kit, self.job, self.run, self.located.party
        assert job.sender is not None  # noqa: S101
        run.hold_party(kit.name)
        lineage, most = Lineage(job, job.digest, run.run_id), party.limits.max_package_bytes
        root = kit.site / "state" / PACKAGES
        taker = Taker(kit.name, job.sender, lineage, sum_signatures(kit), root, most)
        host = PartyHost(
            party=kit.name,
            job_digest=job.digest,
            kinds=job.table_line().kinds(),
            open_client=no_client,
            ready=not_ready,
            states=run.party_states(kit.name),
            rows=run.party_rows(kit.name),
            blobs=Blobs({}),
            package=taker,
        )
        inbox = _Inbox(self._own)
        return Waiting(self._at_the_desk(host, inbox), taker, run, partial(self._with_package, inbox))

    def _with_package(self, inbox: _Inbox, folder: Path) -> Answers:
        party = self.located.party.model_copy(update={"model_name_or_path": str(folder)})
        seat = replace(self, located=self.located.model_copy(update={"party": party}), inbox=inbox)
        # The member holds the party's folder itself.
        self.run.close()
        self.desk.say("loading")
        return _or_refusal(self.kit.site, self.run.run_id, lambda kit, seal: seat.member())

    @property
    def _own(self) -> Path:
        return self.run.path / "parties" / self.kit.name

    def _at_the_desk(self, host: PartyHost, inbox: _Inbox) -> PartyHost:
        """Return a host that is guarded, and signs and fetches as between machines."""
        guard = Guard(self.log, self.job, self.located.party, self._own, self.run.run_id)
        fetch = partial(self._fetch, inbox.spool)
        return replace(host, guard=guard, seal=self.seal, fresh=inbox.fresh, keep=in_place, fetch=fetch)

    def _fetch(self, spool: Spool, frame: Frame) -> Blob:
        self.desk.say("fetching")
        digest, size = frame.travels
        ask = asker(self.desk.way, SERVER, digest)
        return spool.pull(digest, size, sender=SERVER, ask=ask, cancelled=self.desk.is_closed)

    def _on_step(self, _: str, step: int, num_steps: int) -> None:
        self.desk.say("training", step, num_steps)


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

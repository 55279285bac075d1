"""The server's part when a package goes over the wire: it asks the owner for piece after piece, and passes them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from fedllm.disk import disk_error, write_atomic
from fedllm.errors import FedllmError, PayloadError
from fedllm.job.job import Job
from fedllm.models.load import find_base
from fedllm.models.package_files import check_files, num_pieces, total_bytes
from fedllm.runs.folder import RunFolder
from fedllm.runtime.federation import LinkedFederation, parties_error
from fedllm.runtime.package_messages import (
    GivePiece,
    OfferPackage,
    PackageOffered,
    PackageSealed,
    PackageWanted,
    Piece,
    PieceTaken,
    SealPackage,
    Statement,
    TakeKey,
    TakePiece,
    WantPackage,
)
from fedllm.wire.ledger import ByteLedger
from fedllm.wire.payload import Failure, Payload

P = TypeVar("P", bound=Payload)
# What the server needs of a package, to write an adapter for it: the config, which is no secret.
CONFIG_FOLDER = "base"


@dataclass(frozen=True)
class Courier:
    """Sees to it, before the handshake, that each party has the package.

    Args:
        run: The run folder.
        owner: Whose package it is.
    """

    run: RunFolder
    owner: str

    def deliver(self, federation: LinkedFederation) -> None:
        """Bring the package to the parties that lack it; nothing where all have it, or its owner is away.

        Its bytes are no round's: they are noted as an event for each party.

        Args:
            federation: The parties.

        Raises:
            RunPaused: Somebody could not give or take it, for a reason that can be mended.
            RunFailed: It would fail again: a site refuses it, or it is not the job's.
        """
        if self.owner not in federation.parties:
            return
        rounds, federation.ledger = federation.ledger, ByteLedger()
        try:
            self._deliver(federation)
        finally:
            federation.ledger = rounds

    def _deliver(self, federation: LinkedFederation) -> None:
        others = [party for party in federation.parties if party != self.owner]
        offered = _answers(federation, OfferPackage(), [self.owner], PackageOffered)[self.owner]
        stated = self._stated(offered)
        request = WantPackage(statement=offered.statement, signature=offered.signature)
        wanted = _answers(federation, request, others, PackageWanted)
        keys = {party: found.key for party, found in wanted.items() if found.key}
        if not keys:
            return
        boxes = _answers(federation, SealPackage(keys=keys), [self.owner], PackageSealed)[self.owner].boxes
        if set(boxes) != set(keys):
            raise parties_error({self.owner: "PAYLOAD_REFUSED"})
        _answers(federation, {party: TakeKey(box=box) for party, box in boxes.items()}, list(keys), PieceTaken)
        self._pass_on(federation, {party: wanted[party].start for party in keys}, num_pieces(stated.files))
        self._note(federation.ledger, list(keys), stated)

    def _stated(self, offered: PackageOffered) -> Statement:
        """Return what the owner states. Its parties check the signature, and the files; here only what is used here."""
        try:
            stated = Statement.model_validate_json(offered.statement)
            check_files(stated.files, sender=self.owner)
        except (ValidationError, PayloadError):
            raise parties_error({self.owner: "PAYLOAD_REFUSED"}) from None
        folder = self.run.path / CONFIG_FOLDER
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from None
        write_atomic(folder / "config.json", stated.config.encode())
        return stated

    def _pass_on(self, federation: LinkedFederation, starts: Mapping[str, int], pieces: int) -> None:
        for number in range(min(starts.values()), pieces):
            piece = _answers(federation, GivePiece(number=number), [self.owner], Piece)[self.owner]
            to = [party for party, start in starts.items() if start <= number]
            _answers(federation, TakePiece(number=number, data=piece.data), to, PieceTaken)

    def _note(self, ledger: ByteLedger, takers: Sequence[str], stated: Statement) -> None:
        sent = ledger.of_round(0)
        for party in takers:
            what = f"{total_bytes(stated.files)} bytes in {len(stated.files)} files, {sent[party, 'down']} on the way"
            self.run.event("package_taken", round_=0, party=party, detail=what)


def config_folder(run: RunFolder, job: Job) -> Path:
    """Return a folder with the base model's config at a coordinator, where no party runs.

    Args:
        run: The run folder; the config of a package that was sent is in it.
        job: The job.

    Raises:
        ModelError: `MODEL_NOT_FOUND`.
    """
    sent = run.path / CONFIG_FOLDER
    return sent if job.sender and sent.is_dir() else find_base(job.model, base_dir=job.base_dir)


def _answers(
    federation: LinkedFederation, request: Payload | Mapping[str, Payload], to: Sequence[str], cls: type[P]
) -> dict[str, P]:
    found, refused = dict[str, P](), dict[str, str]()
    for reply in federation.ask(request, round_=0, to=to):
        if isinstance(reply.payload, cls):
            found[reply.party] = reply.payload
        else:
            refused[reply.party] = reply.payload.code if isinstance(reply.payload, Failure) else "PAYLOAD_REFUSED"
    if refused:
        error: FedllmError = parties_error(refused)
        raise error
    return found


def courier_of(job: Job, run: RunFolder) -> Courier | None:
    """Return who brings the package of a job to its parties, or None where none is sent.

    Args:
        job: The job.
        run: The run folder.
    """
    return Courier(run, job.sender) if job.sender else None

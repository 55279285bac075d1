"""A party's part when a package goes over the wire: the owner gives it, whoever lacks it takes it.

What travels is sealed for the parties that take it, whose keys are signed by them: the server passes on what it cannot
read. What is taken is written aside, compared with what the owner signed, and only then put into its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from fedllm.disk import hold, make_private
from fedllm.errors import FedllmError, ModelError, PayloadError, PolicyError, ResourceError
from fedllm.job.job import Job
from fedllm.models.digest import base_digest
from fedllm.models.load import find_base
from fedllm.models.package_files import (
    PackageDraft,
    PackageFile,
    check_built,
    check_files,
    list_files,
    listing_digest,
    num_pieces,
    read_piece,
    total_bytes,
)
from fedllm.privacy.sealed import KEY_BYTES, Pieces, public_hex, sealed_for, unsealed
from fedllm.privacy.secure_sum import Signatures
from fedllm.runs.folder import RunFolder
from fedllm.runtime.package_messages import (
    PIECE,
    GivePiece,
    OfferPackage,
    PackageOffered,
    PackageSealed,
    PackageWanted,
    Piece,
    PieceTaken,
    SealPackage,
    ShownKey,
    Statement,
    TakeKey,
    TakePiece,
    WantPackage,
    context_of,
    text_of_key,
    text_of_statement,
)
from fedllm.runtime.site import Site
from fedllm.wire.payload import Payload

# Where a site keeps the packages that came over the wire, each in a folder named after what is in it.
PACKAGES = "packages"
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Lineage:
    """The run that a package is sent for.

    Args:
        job: The job.
        job_digest: Its digest.
        run_id: The run.
    """

    job: Job
    job_digest: str
    run_id: str


def _unexpected(request: Payload, party: str) -> PayloadError:
    what = f"{type(request).__name__} is nothing that this party answers here"
    return PayloadError("PAYLOAD_REFUSED", what, where=party)


@dataclass
class Giver:
    """The owner's part.

    Args:
        party: The owner.
        lineage: The run.
        folder: The package.
        digest: Its digest as a base model.
        signatures: How the owner signs, and verifies the others.
    """

    party: str
    lineage: Lineage
    folder: Path
    digest: str
    signatures: Signatures = field(repr=False)
    _files: Sequence[PackageFile] = ()
    _statement: str = ""
    _pieces: Pieces | None = field(default=None, repr=False)

    def answer(self, request: Payload) -> Payload:
        """Return the answer to one request.

        Args:
            request: One of `PACKAGE_REQUESTS`.

        Raises:
            ModelError: The folder is no package, or was changed after it was checked.
            PayloadError: `PAYLOAD_REFUSED`, nothing is offered yet, or a key is not signed by its party.
        """
        match request:
            case OfferPackage():
                return self._offered()
            case SealPackage() if self._pieces:
                check_built(self.folder, self._files)
                boxes = {party: self._box(party, key, self._pieces) for party, key in request.keys.items()}
                return PackageSealed(boxes=boxes)
            case GivePiece() if self._pieces and request.number < num_pieces(self._files):
                data = read_piece(self.folder, self._files, request.number)
                box = bytearray(self._pieces.sealed(request.number, data))
                return Piece(number=request.number, data={PIECE: torch.frombuffer(box, dtype=torch.uint8)})
        raise _unexpected(request, self.party)

    def close(self) -> None:
        """Nothing is held."""

    def _offered(self) -> PackageOffered:
        self._files = list_files(self.folder)
        check_files(self._files, sender=self.party)
        self._statement = Statement(
            run_id=self.lineage.run_id,
            job_digest=self.lineage.job_digest,
            base_digest=self.digest,
            files=list(self._files),
            config=(self.folder / "config.json").read_text(encoding="utf-8"),
        ).model_dump_json()
        # A key of its own for each offer: what it seals never changes.
        self._pieces = Pieces(context_of(self._statement))
        signature = self.signatures.sign(text_of_statement(self._statement)).hex()
        return PackageOffered(statement=self._statement, signature=signature)

    def _box(self, party: str, key: ShownKey, pieces: Pieces) -> str:
        if party not in self.lineage.job.parties or party == self.party:
            raise PayloadError("PAYLOAD_REFUSED", f"{party[:64]!r} is no other party of the job", where=self.party)
        text = text_of_key(self._statement, party, key.public)
        self.signatures.verify(party, text, bytes.fromhex(key.signature))
        return sealed_for(pieces.key, key.public, context=context_of(self._statement, party))


@dataclass
class Taker:
    """Another party's part.

    Args:
        party: The party.
        owner: Who signs what the package is.
        lineage: The run.
        signatures: How the party signs, and verifies the owner.
        root: Where packages that came over the wire are kept.
        most_bytes: The longest package that the site takes; 0: none.
        have: The digest of the site's own copy; None where it has none.
    """

    party: str
    owner: str
    lineage: Lineage
    signatures: Signatures = field(repr=False)
    root: Path
    most_bytes: int
    have: str | None = None
    folder: Path | None = None
    _statement: str = ""
    _draft: PackageDraft | None = None
    _next: int = 0
    _key: X25519PrivateKey | None = field(default=None, repr=False)
    _pieces: Pieces | None = field(default=None, repr=False)
    _lock: IO[str] | None = field(default=None, repr=False)

    def answer(self, request: Payload) -> Payload:
        """Return the answer to one request. With the last piece `folder` is where the package is.

        Args:
            request: One of `PACKAGE_REQUESTS`.

        Raises:
            PayloadError: `PAYLOAD_REFUSED`, what comes is not what the owner signed; nothing of it is kept.
            PolicyError: `POLICY_REFUSED`, the site takes no package, or none so long.
            ModelError: `MODEL_MISMATCH`, it is not the package that the job names, or that the site has.
            ResourceError: `DISK_FULL`.
        """
        match request:
            case WantPackage():
                return self._wanted(request)
            case TakeKey() if self._key:
                key = unsealed(request.box, self._key, context=context_of(self._statement, self.party))
                if len(key) != KEY_BYTES:
                    raise PayloadError("PAYLOAD_REFUSED", "that is no key of pieces", where=self.party)
                self._pieces = Pieces(context_of(self._statement), key)
                return self._settled()
            case TakePiece() if self._pieces and self._draft:
                return self._taken(request, self._pieces, self._draft)
        raise _unexpected(request, self.party)

    def _wanted(self, request: WantPackage) -> PackageWanted:
        stated = self._stated(request)
        if self.have is not None:
            if self.have != stated.base_digest:
                what = f"this site's own package has digest {self.have[:16]}..., that of {self.owner} another"
                raise self._foreign(what, "remove this site's copy: the owner sends its own; or copy it again")
            return PackageWanted(start=0, key=None)
        pinned = self.lineage.job.model.base_digest
        if pinned not in (None, stated.base_digest):
            what = f"the package of {self.owner} has digest {stated.base_digest[:16]}..., the job names another"
            raise self._foreign(what, "set `model.base_digest` to that of the package that was built last")
        draft = PackageDraft(self.root / listing_digest(stated.files), tuple(stated.files))
        if draft.is_whole():
            self.folder = draft.folder
            return PackageWanted(start=0, key=None)
        self._check_room(total_bytes(stated.files))
        make_private(self.root)
        if self._lock is None:
            what, fix = "another run takes the same package at this moment", "wait for it; `fedllm resume RUN`"
            lock = draft.folder.with_name(f"{draft.folder.name}.lock")
            self._lock = hold(lock, what, fix=fix, patience_s=_PATIENCE_S)
        self._draft, self._next = draft, draft.begin()
        return PackageWanted(start=self._next, key=self._shown())

    def _stated(self, request: WantPackage) -> Statement:
        self.signatures.verify(self.owner, text_of_statement(request.statement), bytes.fromhex(request.signature))
        try:
            stated = Statement.model_validate_json(request.statement)
        except ValidationError:
            raise PayloadError(
                "PAYLOAD_REFUSED", "what is said of the package is malformed", where=self.owner
            ) from None
        if (stated.run_id, stated.job_digest) != (self.lineage.run_id, self.lineage.job_digest):
            raise PayloadError("PAYLOAD_REFUSED", "the package is offered for another run", where=self.owner)
        check_files(stated.files, sender=self.owner)
        self._statement = request.statement
        return stated

    def _check_room(self, size: int) -> None:
        where = f"party {self.party}, limits.max_package_bytes"
        if size > self.most_bytes:
            allowed = f"{self.most_bytes} at most" if self.most_bytes else "none"
            what = f"the package of {self.owner} has {size} bytes, the site takes {allowed}"
            fix = "copy the package here by hand, or ask the site to change its own limit"
            raise PolicyError("POLICY_REFUSED", what, where=where, fix=fix)
        make_private(self.root)
        if size > (free := shutil.disk_usage(self.root).free):
            what = f"the package of {self.owner} has {size} bytes, and {free} are free"
            raise ResourceError("DISK_FULL", what, where=str(self.root), fix="free some space; `fedllm resume RUN`")

    def _foreign(self, what: str, fix: str) -> ModelError:
        return ModelError("MODEL_MISMATCH", what, where=f"party {self.party}", fix=fix)

    def _shown(self) -> ShownKey:
        self._key = X25519PrivateKey.generate()
        public = public_hex(self._key)
        signature = self.signatures.sign(text_of_key(self._statement, self.party, public))
        return ShownKey(public=public, signature=signature.hex())

    def _taken(self, request: TakePiece, pieces: Pieces, draft: PackageDraft) -> PieceTaken:
        if request.number != self._next or set(request.data) != {PIECE}:
            what = f"piece {request.number} came where piece {self._next} was due"
            raise PayloadError("PAYLOAD_REFUSED", what, where=self.party)
        box = request.data[PIECE]
        if box.dtype != torch.uint8 or box.dim() != 1:
            raise PayloadError("PAYLOAD_REFUSED", "that is no sealed piece", where=self.party)
        draft.append(request.number, pieces.opened(request.number, box.numpy().tobytes()))
        self._next += 1
        return self._settled()

    def _settled(self) -> PieceTaken:
        """Put the package into its place if it is whole; what is not as it was announced is removed."""
        draft = self._draft
        assert draft is not None  # noqa: S101
        if self._next < num_pieces(draft.files):
            return PieceTaken()
        try:
            draft.check()
            if base_digest(draft.aside) != Statement.model_validate_json(self._statement).base_digest:
                raise self._foreign("the package has another digest than its owner states", "build it again")
            # Neither code nor another model's name may be in its configs.
            find_base(self.lineage.job.model, base_dir=self.root, override=str(draft.aside))
            draft.settle()
        except FedllmError:
            draft.discard()
            raise
        finally:
            self.close()
        self.folder = draft.folder
        return PieceTaken()

    def close(self) -> None:
        """Let go of what is being taken; what is written of it is gone on with the next time."""
        if self._lock:
            self._lock.close()
        self._lock = self._key = self._pieces = self._draft = None


def package_desk(
    site: Site, run: RunFolder, party: str, signatures: Callable[[str], Signatures]
) -> Giver | Taker | None:
    """Return a party's part when the package of a job goes over the wire, or None where it does not.

    Args:
        site: What the process shares.
        run: The run folder; on one machine a package that came is kept in the party's folder there.
        party: The party.
        signatures: Party -> how it signs and verifies.
    """
    owner, lineage = site.job.sender, Lineage(site.job, run.job_digest, run.run_id)
    if owner is None:
        return None
    if party == owner:
        return Giver(party, lineage, site.folder, site.base.digest, signatures(party))
    root, most = run.path / "parties" / party / PACKAGES, site.most_package_bytes.get(party, 0)
    have = None if party in site.awaiting else site.base.digest
    return Taker(party, owner, lineage, signatures(party), root, most, have)

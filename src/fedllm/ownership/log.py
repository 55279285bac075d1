"""The log of a run's commitments: a Merkle tree of entries, and heads of it that all parties signed, round by round.

`log.jsonl` has an entry a line: each party's public key, the claimants' commitments, each party's share (see
`fedllm.ownership.directions`), then each committed round.
`heads.jsonl` has the signed heads. The server and every party keep a copy of both; any of them is evidence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.disk import write_atomic
from fedllm.errors import ConfigError, StateLost
from fedllm.ownership.commitments import Commitment
from fedllm.ownership.keys import is_signed
from fedllm.ownership.merkle import leaf_hash, root

FOLDER = "ownership"
HEAD_PURPOSE, SHARE_PURPOSE = "head", "share"
_LOG, _HEADS = "log.jsonl", "heads.jsonl"
_KINDS = ("party", "commitment", "share", "round")


class Head(BaseModel):
    """The state of a log at one moment; the first one is from before round 0. `time` is UTC, ISO 8601."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    job_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    round: int = Field(ge=0)
    size: int = Field(ge=1)
    root: str = Field(pattern=r"^[0-9a-f]{64}$")
    time: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00$")

    def text(self) -> bytes:
        """Return what is signed, in one spelling."""
        return canonical(self.model_dump(mode="json"))


class SignedHead(BaseModel):
    """A head with the signatures of those who signed it, by party, hex."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    head: Head
    signatures: dict[str, str]


def canonical(value: Any) -> bytes:
    """Return a JSON value in one spelling.

    Args:
        value: The value.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def party_entry(party: str, public_key: str) -> str:
    """Return the entry that names a party's key.

    Args:
        party: The party.
        public_key: Its key, hex.
    """
    return canonical({"kind": "party", "party": party, "public_key": public_key}).decode()


def commitment_entry(commitment: Commitment) -> str:
    """Return the entry of a commitment.

    Args:
        commitment: The commitment.
    """
    return canonical({"kind": "commitment", **commitment.model_dump(mode="json")}).decode()


def share_entry(party: str, share: str) -> str:
    """Return the entry of a party's share in where bits lie.

    Args:
        party: The party.
        share: From `share_of`, hex.
    """
    return canonical({"kind": "share", "party": party, "share": share}).decode()


def round_entry(number: int, checkpoint: str) -> str:
    """Return the entry of a committed round.

    Args:
        number: The round.
        checkpoint: SHA-256 of the server's checkpoint.
    """
    return canonical({"kind": "round", "round": number, "checkpoint": checkpoint}).decode()


@dataclass(frozen=True)
class OwnershipLog:
    """A log as it stands: its entries as text, and its signed heads, oldest first."""

    entries: tuple[str, ...] = ()
    heads: tuple[SignedHead, ...] = ()

    @cached_property
    def leaves(self) -> list[bytes]:
        """The leaf hash of each entry."""
        return [leaf_hash(entry.encode()) for entry in self.entries]

    def head(self, number: int, time: str, *, run_id: str, job_digest: str) -> Head:
        """Return the head over all entries.

        Args:
            number: The round.
            time: Now, UTC, ISO 8601.
            run_id: The run.
            job_digest: Its job.
        """
        size, top = len(self.entries), root(self.leaves).hex()
        return Head(run_id=run_id, job_digest=job_digest, round=number, size=size, root=top, time=time)

    def with_entries(self, *entries: str) -> OwnershipLog:
        """Return the log with entries added.

        Args:
            entries: Their texts.
        """
        return OwnershipLog((*self.entries, *entries), self.heads)

    def with_head(self, head: SignedHead) -> OwnershipLog:
        """Return the log with a signed head added.

        Args:
            head: The head.
        """
        return OwnershipLog(self.entries, (*self.heads, head))

    def keys(self) -> dict[str, str]:
        """Return each party's public key, as the first entries say."""
        return self._of_parties("party", "public_key")

    def shares(self) -> dict[str, str]:
        """Return each party's share, hex; of an earlier log none."""
        return self._of_parties("share", "share")

    def has(self, kind: str) -> bool:
        """Return whether an entry is of this kind.

        Args:
            kind: `party`, `commitment`, `share` or `round`.
        """
        return any(json.loads(entry)["kind"] == kind for entry in self.entries)

    def first_root(self) -> str:
        """Return the root over what comes before shares and rounds, all keys and commitments, hex; shares sign it."""
        kinds = [json.loads(entry)["kind"] for entry in self.entries]
        size = next((place for place, kind in enumerate(kinds) if kind in ("share", "round")), len(kinds))
        return root(self.leaves[:size]).hex()

    def _of_parties(self, kind: str, key: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for entry in self.entries:
            fields = json.loads(entry)
            if fields["kind"] == kind:
                found.setdefault(str(fields["party"]), str(fields[key]))
        return found

    def commitments(self) -> list[tuple[int, Commitment]]:
        """Return the commitments with their places, from 0."""
        found = []
        for index, entry in enumerate(self.entries):
            fields = json.loads(entry)
            if fields.pop("kind") == "commitment":
                found.append((index, Commitment.model_validate(fields)))
        return found

    def against_commitments(self, claimants: Sequence[str] | None = None) -> list[str]:
        """Return what is wrong with whose commitments these are: one of each claimant, and none of others.

        Who may choose among several commitments when the model is known tries several keys, and is counted for one.

        Args:
            claimants: The job's; None where they are not known, and then whoever commits is one.
        """
        found = Counter(commitment.party for _, commitment in self.commitments())
        expected = sorted(found) if claimants is None else claimants
        several = [f"{found[party]} commitments of `{party}`, not one" for party in expected if found[party] != 1]
        return several + [f"a commitment of `{party}`, no claimant" for party in sorted(found.keys() - set(expected))]

    def write(self, folder: Path) -> None:
        """Write both files; each is whole after a crash, the entries first.

        Args:
            folder: The folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _LOG, "".join(f"{entry}\n" for entry in self.entries).encode())
        lines = [canonical(head.model_dump(mode="json")) + b"\n" for head in self.heads]
        write_atomic(folder / _HEADS, b"".join(lines))


def read_log(folder: Path) -> OwnershipLog:
    """Return a log as it stands. That it is as it was signed is for `check_log` to say.

    Args:
        folder: Where `write` put it; an absent one is an empty log.

    Raises:
        StateLost: `OWNERSHIP_BROKEN`, a line is not what such a log has.
    """
    entries, heads = _lines(folder / _LOG), _lines(folder / _HEADS)
    try:
        for entry in entries:
            fields = json.loads(entry)
            if canonical(fields).decode() != entry or fields["kind"] not in _KINDS:
                raise ValueError
        log = OwnershipLog(tuple(entries), tuple(SignedHead.model_validate_json(line) for line in heads))
        log.keys(), log.shares(), log.commitments()
    except (ValueError, KeyError, TypeError, ValidationError):
        raise broken("a line is not one of a log of commitments", folder) from None
    return log


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        raise broken("it cannot be read", path) from None


def find_log(path: Path) -> Path:
    """Return the folder of a log: the one that is named, or that of a run folder.

    Args:
        path: A run folder, or a folder with `log.jsonl`.

    Raises:
        ConfigError: `FILE_NOT_FOUND`.
    """
    for folder in (path, path / FOLDER):
        if (folder / _LOG).is_file():
            return folder
    fix = "name a run folder, or a party's copy, RUN/parties/NAME/ownership"
    raise ConfigError("FILE_NOT_FOUND", "no log of commitments is there", where=str(path), fix=fix)


def check_log(log: OwnershipLog, *, where: Path) -> None:
    """Return if a log is as it was signed: every head is over its first entries, and every signature fits.

    Args:
        log: The log.
        where: Its folder, for the error.

    Raises:
        StateLost: `OWNERSHIP_BROKEN`.
    """
    if not log.heads:
        raise broken("no head of it was ever signed", where)
    keys, first, before = log.keys(), log.heads[0].head, None
    for number, signed in enumerate(log.heads):
        head = signed.head
        if head.size > len(log.entries) or root(log.leaves[: head.size]).hex() != head.root:
            what = f"the first {head.size} entries are not those that were signed in round {head.round}: "
            raise broken(f"{what}one was changed, taken out or moved", where)
        if (head.run_id, head.job_digest) != (first.run_id, first.job_digest):
            raise broken(f"head {number} is of another run", where)
        if before and (head.size < before.size or head.time < before.time):
            raise broken(f"head {number} does not follow on the one before it", where)
        for party, signature in signed.signatures.items():
            if not is_signed(keys.get(party, ""), head.text(), signature, purpose=HEAD_PURPOSE):
                raise broken(f"head {number} is not signed by the key of `{party[:64]}`", where)
        before = head
    if any(json.loads(entry)["kind"] in ("round", "share") for entry in log.entries[: first.size]):
        # A late commitment would pass for an early one.
        raise broken("its head from before round 0 is missing", where)
    for party in unsound_shares(log):
        raise broken(f"the share of `{party[:64]}` is not its signature of the root over keys and commitments", where)


def unsound_shares(log: OwnershipLog) -> list[str]:
    """Return the parties whose share in a log is not their signature of its first root.

    Args:
        log: The log.
    """
    keys, signed = log.keys(), bytes.fromhex(log.first_root())
    return [
        party
        for party, share in log.shares().items()
        if not is_signed(keys.get(party, ""), signed, share, purpose=SHARE_PURPOSE)
    ]


def broken(what: str, where: Path) -> StateLost:
    """Return the error for a log that is not as it was signed.

    Args:
        what: What is wrong.
        where: Its folder.
    """
    fix = "compare it with the parties' own copies, RUN/parties/NAME/ownership at each site"
    return StateLost("OWNERSHIP_BROKEN", what, where=str(where), fix=fix)

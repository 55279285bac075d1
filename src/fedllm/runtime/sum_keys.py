"""What a run needs for its secure sums: the job's terms, and on one machine each party's signing key."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedllm.disk import make_private
from fedllm.errors import SenderRefused
from fedllm.job.job import Job
from fedllm.privacy.budget import Purse
from fedllm.privacy.secure_sum import Signatures, least_of
from fedllm.runs.folder import RunFolder
from fedllm.runs.jsonl import write_json
from fedllm.runtime.sum_book import SumBook
from fedllm.runtime.sum_layout import Layout
from fedllm.runtime.sum_party import PartySums, SumTerms

_ROSTER, _OWN = "sum_keys.json", "sum_key.json"
SignaturesOf = Callable[[str], Signatures]


def terms_of(job: Job) -> SumTerms | None:
    """Return the terms of a job's secure sums, or None where it has none.

    Args:
        job: The job.
    """
    settings, parties = job.privacy.secure_aggregation, job.trainers
    if not settings.enabled:
        return None
    threshold, cohort = settings.threshold, job.federation.cohort_size(len(parties))
    # A server that begins a sum with a few parties learns no more than from the smallest that the job allows.
    fewest = max(job.federation.min_parties, least_of(cohort, threshold=threshold, fewest=0))
    least = partial(least_of, threshold=threshold, fewest=fewest)
    equal = getattr(job.federation, "weight_by", None) == "equal"
    layout = Layout(len(parties), 1 if equal else settings.max_weight)
    private = partial(job.table_line().private, job.federation)
    return SumTerms(parties, least, layout, job.federation.num_rounds, private)


def sums_of(job: Job, run: RunFolder, party: str, *, signatures: SignaturesOf, purse: Purse) -> PartySums | None:
    """Return a party's part in the secure sums of a run, or None where the job has none.

    Args:
        job: The job.
        run: The run folder.
        party: The party.
        signatures: Party -> how it signs and verifies.
        purse: Where the party keeps what outlives a run: the book of the sums that it opened.
    """
    terms = terms_of(job)
    if terms is None or party not in terms.parties:
        return None
    book = SumBook(purse.folder / f"{party}.sums", party)
    return PartySums(party, run.job_digest, run.run_id, terms, signatures(party), book)


def make_sum_keys(job: Job, run: RunFolder) -> None:
    """Make the keys with which parties on one machine sign, where there are none yet and the job needs them.

    It needs them for secure sums, and where a package is sent.

    Between machines they sign with the keys of their kits.

    Args:
        job: The job.
        run: The run folder.

    Raises:
        ResourceError: `DISK_FULL`.
    """
    if (terms_of(job) is None and job.sender is None) or (run.path / _ROSTER).exists():
        return
    roster = {}
    for party in job.parties:
        key = Ed25519PrivateKey.generate()
        folder = make_private(run.path / "parties" / party)
        write_json(folder / _OWN, {"key": key.private_bytes_raw().hex()})
        roster[party] = key.public_key().public_bytes_raw().hex()
    write_json(run.path / _ROSTER, roster)


def local_signatures(run: RunFolder, party: str) -> Signatures:
    """Return how a party signs in a run on one machine.

    Args:
        run: The run folder, with `make_sum_keys` done.
        party: The party.
    """
    own = _read(run.path / "parties" / party / _OWN)["key"]
    keys = {
        name: Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for name, key in _read(run.path / _ROSTER).items()
    }

    def verify(name: str, text: bytes, signature: bytes) -> None:
        try:
            keys[name].verify(signature, text)
        except (KeyError, InvalidSignature):
            raise SenderRefused("BAD_SIGNATURE", f"not signed by the key of `{name[:64]}`", where=name[:64]) from None

    return Signatures(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(own)).sign, verify)


def _read(path: Path) -> dict[str, str]:
    return dict(json.loads(path.read_text(encoding="utf-8")))

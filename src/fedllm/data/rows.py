"""Raw rows -> a digest to know a party's data by, whatever a job makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fedllm.data.formats import BadRecord

# What the digests begin with: one that begins otherwise is of something else than raw rows.
DIGEST_KIND = "rows:"


def row_hash(row: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of a row as it stands in the data, all of its columns included.

    Args:
        row: Name of a column -> value. The order of the columns does not count.

    Raises:
        BadRecord: The row is nested too deeply.
    """
    try:
        # Columnar files hold what JSON does not know, such as bytes and dates.
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=repr)
    except RecursionError:
        raise BadRecord("nested too deeply") from None
    return hashlib.sha256(text.encode()).digest()


def rows_digest(hashes: Iterable[bytes]) -> str:
    """Return the digest of rows, whatever their order; a row that stands twice counts twice.

    Args:
        hashes: From `row_hash`.
    """
    digest = hashlib.sha256()
    for hash_ in sorted(hashes):
        digest.update(hash_)
    return DIGEST_KIND + digest.hexdigest()

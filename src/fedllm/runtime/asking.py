"""Verify claims on a model that may only be asked: by `generate`, or at an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.ownership.claims import load_claim
from fedllm.ownership.endpoint import Endpoint
from fedllm.ownership.triggers import Ask, TextVerdict, verify_text
from fedllm.runtime.triggers import suspect_asker


@dataclass(frozen=True)
class Suspected:
    """A suspect model: a folder, with its base where it is an adapter, or an endpoint."""

    model: Path | None
    base: Path | None = None
    endpoint: Endpoint | None = None

    def asker(self) -> Ask:
        """Return what asks it.

        Raises:
            ConfigError: `BAD_COMBINATION`, it is named in neither way, or in both.
            ModelError: `MODEL_NOT_FOUND` or `MODEL_UNSAFE`.
        """
        if (self.model is None) == (self.endpoint is None):
            what = "name either the model's folder or its endpoint"
            raise ConfigError("BAD_COMBINATION", what, where="--endpoint", fix="leave one of them out")
        if self.endpoint is not None:
            return self.endpoint
        assert self.model is not None  # noqa: S101
        return suspect_asker(self.model, base=self.base)


@dataclass(frozen=True)
class Asked:
    """What asking a model shows of one claim."""

    party: str
    commitment: str
    verdict: TextVerdict


def ask_claims(claims: Sequence[Path], suspected: Suspected) -> list[Asked]:
    """Return what a model's answers prove of each claim, with Bonferroni's correction for their number.

    When a claim was made is another question: see `fedllm ownership verify`, and the commitment's time stamp.

    Args:
        claims: Claim files, opened to the reader.
        suspected: The model.

    Raises:
        ConfigError: A claim, or the suspect, is not rightly named.
        IdentityError: Others can read a claim.
        ModelError: The suspect cannot be loaded.
        ResourceError: `ENDPOINT_FAILED`.
    """
    opened = [load_claim(path) for path in claims]
    ask = suspected.asker()
    return [Asked(one.party, one.commitment(), verify_text(one, ask, tries=len(opened))) for one in opened]

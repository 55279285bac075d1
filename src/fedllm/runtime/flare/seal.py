"""How a site signs its messages, and by which certificates it verifies those of others."""

from __future__ import annotations

from functools import partial

from fedllm.identity.keys import load_key
from fedllm.identity.kit import Kit
from fedllm.identity.signing import Signer
from fedllm.privacy.secure_sum import Signatures
from fedllm.runtime.base import Seal


def seal_of(kit: Kit) -> Seal:
    """Return the seal of a site.

    Args:
        kit: Its kit, verified a moment ago.

    Raises:
        IdentityError: The site's key cannot be used.
    """
    return Seal(Signer(load_key(kit.key)).sign, kit.roster.verify)


def sum_signatures(kit: Kit) -> Signatures:
    """Return how a site signs in secure sums, and how it verifies the other parties.

    Args:
        kit: Its kit, verified a moment ago.

    Raises:
        IdentityError: The site's key cannot be used.
    """
    sign = Signer(load_key(kit.key)).sign
    return Signatures(partial(sign, purpose="sum"), partial(kit.roster.verify, purpose="sum"))

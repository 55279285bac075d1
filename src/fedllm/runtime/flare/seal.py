"""How a site signs its messages, and by which certificates it verifies those of others."""

from __future__ import annotations

from fedllm.identity.keys import load_key
from fedllm.identity.kit import Kit
from fedllm.identity.signing import Signer
from fedllm.runtime.base import Seal


def seal_of(kit: Kit) -> Seal:
    """Return the seal of a site.

    Args:
        kit: Its kit, verified a moment ago.

    Raises:
        IdentityError: The site's key cannot be used.
    """
    return Seal(Signer(load_key(kit.key)).sign, kit.roster.verify)

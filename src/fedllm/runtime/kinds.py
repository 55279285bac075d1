"""The messages around a scenario's own, by name: handshake, secure sums, packages. The list is closed."""

from __future__ import annotations

from fedllm.runtime.base import HANDSHAKE
from fedllm.runtime.package_messages import PACKAGE_KINDS
from fedllm.runtime.sum_messages import SUM_KINDS
from fedllm.wire.payload import Payload

AROUND: dict[str, type[Payload]] = HANDSHAKE | SUM_KINDS | PACKAGE_KINDS

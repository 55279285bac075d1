"""project.yaml: who works together and where the server is. The coordinator's file; a kit is made from it per site."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedllm.job.loading import load_model
from fedllm.job.party import NAME_PATTERN

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*", re.IGNORECASE)
# These are the identities of the coordinator itself, and the name by which a machine calls itself.
_RESERVED = ("server", "admin", "localhost")


class ServerAddress(BaseModel):
    """The server's address."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = Field(max_length=253, description="IP address or DNS name that every party can reach.")
    port: int = Field(8002, ge=1, le=65535, description="The one port that every party connects to.")

    @field_validator("host")
    @classmethod
    def _can_be_reached(cls, host: str) -> str:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            # What looks like an IP address and is none would be taken for a name.
            if not _DNS_NAME.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
                raise ValueError(
                    f"{host!r} is no IP address and no DNS name; write it without port and scheme"
                ) from None
            return host.lower()
        if address.is_unspecified or address.is_multicast:
            raise ValueError(f"nobody can connect to {host}; name the address by which the parties reach the server")
        return str(address)


class Project(BaseModel):
    """Who works together, checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = Field(1, description="Version of this file's layout.")
    name: str = Field(pattern=NAME_PATTERN, description="Name of the project: a-z, 0-9, - and _.")
    server: ServerAddress = Field(description="Where the parties reach the server.")
    parties: list[str] = Field(min_length=1, max_length=1000, description="Names of the parties.")
    certificate_days: int = Field(365, ge=1, le=825, description="For how many days certificates are valid.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Project:
        """Return the project in a file.

        Args:
            path: The file.

        Raises:
            ConfigError: With file, line, key and the mend.
        """
        project, _ = load_model(cls, Path(path), overrides=[])
        return project

    @field_validator("parties")
    @classmethod
    def _names_can_be_used(cls, names: list[str]) -> list[str]:
        for name in names:
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError(f"party name {name!r} is not allowed; use a-z, 0-9, - and _, at most 32 characters")
            if name in _RESERVED:
                raise ValueError(f"the name `{name}` is taken; give the party another one")
        if len(set(names)) < len(names):
            raise ValueError("two parties have the same name; give each a name of its own")
        return names

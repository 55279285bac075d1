"""Whether the server of a project can be reached from a site, and why not: by TCP, then by TLS with the kit."""

from __future__ import annotations

import socket
import ssl
from contextlib import closing, suppress

from fedllm.identity.certificates import read_certificate
from fedllm.identity.files import SERVER
from fedllm.identity.kit import Kit
from fedllm.identity.signing import fingerprint
from fedllm.runtime.doctor import Finding

_TIMEOUT_S = 5.0
# A server that refuses our certificate says so soon after the handshake, one that takes it says nothing.
_REFUSAL_S = 1.0
_AT_SERVER = "at the coordinator: `fedllm status project.yaml`, and `fedllm serve project.yaml` if it does not run"
_NEW_KIT = "ask the coordinator for the newest kit (`fedllm provision` there), then `fedllm install`"
_MIDDLE = "something else listens there, or a proxy stands between; ask for a direct way to that port"
_ENDS = "it ends the connection within the handshake"
# What OpenSSL says of the server's certificate -> in words, and the mend.
_THEIRS = {
    10: ("the server's certificate has expired", f"{_AT_SERVER}; `fedllm provision project.yaml` renews it"),
    9: ("the server's certificate is not valid yet", "set this machine's clock, or that of the server"),
    18: ("the server's certificate vouches for itself: it is not of this project's authority", _MIDDLE),
    19: ("the server's certificate is of another authority", f"{_MIDDLE}. Or {_NEW_KIT}"),
    20: ("the server's certificate is of another authority", f"{_MIDDLE}. Or {_NEW_KIT}"),
    62: ("the server's certificate is for another name", "`server.host` in project.yaml must be how parties reach it"),
    64: (
        "the server's certificate is for another address",
        "`server.host` in project.yaml must be how parties reach it",
    ),
}
# What the server says of ours.
_OURS = {
    "UNKNOWN_CA": "the server does not know the authority of this site's certificate",
    "EXPIRED": "this site's certificate has expired, the server says",
    "CERTIFICATE_REQUIRED": "the server asked for a certificate, and took none from here",
    "BAD_CERTIFICATE": "the server refuses this site's certificate",
    "CERTIFICATE_UNKNOWN": "the server refuses this site's certificate",
}


class _Refused(Exception):
    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def reach(kit: Kit, *, timeout_s: float = _TIMEOUT_S) -> list[Finding]:
    """Return what was found on the way to the server. Only the handshake is done, nothing is sent.

    Args:
        kit: The site's kit.
        timeout_s: How long to wait for an answer, in seconds.
    """
    place = f"{kit.host}:{kit.port}"
    try:
        raw = _connected(kit, timeout_s)
    except _Refused as no:
        return [Finding("server by TCP", "fault", f"{place}: {no.what}", no.fix)]
    found = [Finding("server by TCP", "ok", f"{place} answers")]
    with closing(raw):
        try:
            detail = _shaken(kit, raw)
        except _Refused as no:
            return [*found, Finding("server by TLS", "fault", f"{place}: {no.what}", no.fix)]
    return [*found, Finding("server by TLS", "ok", detail)]


def _connected(kit: Kit, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection((kit.host, kit.port), timeout=timeout_s)
    except socket.gaierror:
        raise _Refused("this machine knows no such name", f"mend the name service, or {_NEW_KIT}") from None
    except TimeoutError:
        fix = f"a firewall stands between, or the address is wrong; TCP port {kit.port} outwards is all that is needed"
        raise _Refused(f"no answer within {timeout_s:.0f} s", fix) from None
    except ConnectionRefusedError:
        raise _Refused("nobody listens there", _AT_SERVER) from None
    except OSError as error:
        raise _Refused(f"no way there: {error.strerror}", "look at this machine's network") from None


def _shaken(kit: Kit, raw: socket.socket) -> str:
    try:
        with _context(kit).wrap_socket(raw, server_hostname=kit.host) as made:
            _check_pinned(kit, made.getpeercert(binary_form=True))
            made.settimeout(_REFUSAL_S)
            with suppress(TimeoutError):
                made.read(1)
            return f"{made.version()}, both certificates are accepted"
    except ssl.SSLCertVerificationError as error:
        what, fix = _THEIRS.get(error.verify_code, (f"the server's certificate: {error.verify_message}", _NEW_KIT))
        raise _Refused(what, fix) from None
    except ssl.SSLError as error:
        raise _explained(str(error.reason)) from None
    except TimeoutError:
        raise _Refused("it takes the connection and says nothing: no TLS", _MIDDLE) from None
    except OSError:
        raise _Refused(_ENDS, _MIDDLE) from None


def _explained(reason: str) -> _Refused:
    if "ALERT_PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return _Refused("it has no TLS 1.3", _MIDDLE)
    for part, what in _OURS.items():
        if part in reason:
            return _Refused(what, _NEW_KIT)
    if "EOF" in reason:
        return _Refused(_ENDS, _MIDDLE)
    if "ALERT" in reason:
        return _Refused(f"the server refuses the handshake ({reason.lower()})", _AT_SERVER)
    return _Refused("what answers there is no TLS", _MIDDLE)


def _context(kit: Kit) -> ssl.SSLContext:
    # As a party's process connects: see runtime/flare/transport.py.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(kit.ca)
    context.load_cert_chain(kit.cert, kit.key)
    return context


def _check_pinned(kit: Kit, certificate: bytes | None) -> None:
    shown = read_certificate(ssl.DER_cert_to_PEM_cert(certificate or b"").encode(), where=SERVER)
    if fingerprint(shown) != kit.roster.fingerprint(SERVER):
        raise _Refused("the server shows another certificate than this site's kit lists", _NEW_KIT)

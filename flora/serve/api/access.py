"""Who may ask: a list of Host names on loopback, and keys for everything but /health."""

import hashlib
import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from flora.errors import AuthError, UsageError
from flora.serve.api.errors import error_response, plain_response
from flora.serve.config import ServeConfig

PUBLIC_PATHS = frozenset({"/health"})
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Access:
    """Refuses what may not come in, before any route is looked for; so an unknown path answers as a known one."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._keys = [_hash(key) for key in config.api_keys]
        self._hosts = _LOOPBACK_NAMES | {config.host.lower()} if is_loopback(config.host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        if not self._is_known_host(headers):
            refusal = plain_response(
                400, "this server answers to loopback names only, and the Host header has another", code="unknown_host"
            )
            await refusal(scope, receive, send)
        elif scope["path"] not in PUBLIC_PATHS and not self._has_key(headers):
            error = AuthError("this server needs an API key", fix="send it as Authorization: Bearer KEY")
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_known_host(self, headers: Headers) -> bool:
        """On loopback, a page on another name that resolves here (DNS rebinding) is not let in."""
        if self._hosts is None:
            return True
        return all(_host_name(host) in self._hosts for host in headers.getlist("host"))

    def _has_key(self, headers: Headers) -> bool:
        if not self._keys:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _hash(key.strip())
        found = False
        for known in self._keys:  # every key is compared, whichever fits
            found |= hmac.compare_digest(given, known)
        return found and scheme.lower() == "bearer"


def check_exposure(config: ServeConfig) -> None:
    """Raises UsageError for a server that anyone on the network could use without a key, or with an empty one."""
    if not all(key.strip() for key in config.api_keys):
        raise UsageError("an API key is empty", fix="give a key of random characters, or none at all")
    if not config.api_keys and not config.insecure and not is_loopback(config.host):
        raise UsageError(
            f"{config.host} can be reached from other machines, and no API key is set",
            cause="without a key everyone who reaches the port may use the server",
            fix="set a key, bind to 127.0.0.1, or allow it with --insecure",
        )


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    """Without the port; an IPv6 address without its brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()

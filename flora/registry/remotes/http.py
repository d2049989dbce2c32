"""A file over HTTP from some byte on: redirects checked one by one, the token for its own host alone."""

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from flora.errors import AuthError, FloraError, NotFound, RemoteError
from flora.registry.remotes.remote import Interrupted

_MAX_REDIRECTS = 5
_PASSING = (408, 425, 429, 500, 502, 503, 504)


def stream(
    session: Any, url: str, headers: Mapping[str, str], offset: int, timeout_s: float, *, address: str
) -> Iterator[bytes]:
    """The body of GET `url` from byte `offset` on, as it is sent. `session` is an httpx client.

    Raises Interrupted, AuthError, NotFound, RemoteError (another status, a redirect to where none may lead).
    """
    sent = {**headers, "Accept-Encoding": "identity"}  # a compressed body has other bytes, and no honest length
    if offset:
        sent["Range"] = f"bytes={offset}-"
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            with session.stream("GET", url, headers=sent, timeout=timeout_s, follow_redirects=False) as response:
                if response.status_code in (301, 302, 303, 307, 308):
                    target = urljoin(url, response.headers.get("Location", ""))
                    _check_redirect(url, target, address)
                    if urlsplit(target)[:2] != urlsplit(url)[:2]:
                        sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
                    url = target
                    continue
                if response.status_code >= 400:
                    raise refused(address, response.status_code, response.headers)
                skip = offset if response.status_code == 200 else 0  # a server without ranges sends all of it
                for piece in response.iter_raw():
                    if skip >= len(piece):
                        skip -= len(piece)
                        continue
                    yield piece[skip:]
                    skip = 0
                return
        except (FloraError, Interrupted):
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "h11"}:
                raise Interrupted(f"{type(error).__name__}: {error}") from error
            raise
    raise RemoteError(f"{address} redirects more than {_MAX_REDIRECTS} times")


def refused(address: str, status: int, headers: Mapping[str, str] | None = None, text: str = "") -> Exception:
    """What a status of 400 or more means: something to repeat, or an error to end with."""
    if status in _PASSING:
        after = (headers or {}).get("Retry-After", "")
        return Interrupted(f"status {status}", retry_after_s=float(after) if after.isdigit() else None)
    if status in (401, 403):
        return AuthError(f"{address} may not be read with the token at hand ({status})", cause=text or None, fix=LOGIN)
    if status == 404:
        return NotFound(f"{address} is not there", cause=text or None, fix="check the spelling and the revision")
    return RemoteError(f"{address} cannot be read ({status})", cause=text or None, fix="try again later")


LOGIN = "log in with `hf auth login`, or set HF_TOKEN; a gated repository also wants its terms accepted on the Hub"


def _check_redirect(url: str, target: str, address: str) -> None:
    """Refuses to be led from encryption to none, or from a public name to an address of this network."""
    source, led = urlsplit(url), urlsplit(target)
    is_weaker = source.scheme == "https" and led.scheme != "https"
    if (
        led.scheme not in ("http", "https")
        or is_weaker
        or (_is_inside(led.hostname) and not _is_inside(source.hostname))
    ):
        raise RemoteError(
            f"{address} redirects to {led.scheme}://{led.hostname}, where a download may not lead",
            fix="do not trust this remote; ask its owner",
        )


def _is_inside(host: str | None) -> bool:
    if host in (None, "", "localhost"):
        return True
    try:
        ip = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return not ip.is_global

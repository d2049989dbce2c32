"""Unknown fields of a body: the client is told in a header, the operator once in the log."""

import logging
import re

logger = logging.getLogger(__name__)

MAX_NAMES = 20  # in one header
_MAX_LOGGED = 1000  # names that are remembered as logged
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_logged: set[str] = set()


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header x-flora-ignored-fields, or nothing. A name that a header could not carry is shown as "?"."""
    if not names:
        return {}
    shown = [name if _PLAIN.fullmatch(name) else "?" for name in names[:MAX_NAMES]]
    new = {name for name in shown if name not in _logged}
    if new and len(_logged) < _MAX_LOGGED:
        _logged.update(new)
        logger.info("unknown fields ignored: %s", ", ".join(sorted(new)))
    return {"x-flora-ignored-fields": ", ".join(shown)}

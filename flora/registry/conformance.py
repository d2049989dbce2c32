"""What any registry must keep, whatever it is made of: one suite, run against the registry of a URL.

It works under a name of its own, `flora-conformance/<random>`, and removes what it made; what others keep there is not
touched. Blobs of what it removed stay until a gc, as always.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from flora.errors import AdapterNotFound, FloraError
from flora.registry.promises import PROMISES
from flora.registry.registry import Registry

NAMESPACE = "flora-conformance"


@dataclass(frozen=True, slots=True)
class Result:
    """One promise, and why it was not kept if it was not."""

    promise: str
    failure: str | None


def run(url: str | None) -> Iterator[Result]:
    """Every promise in turn. Raises what opening the registry raises."""
    for keep in PROMISES:
        with Registry.open(url) as registry:
            name = f"{NAMESPACE}/{uuid.uuid4().hex}"
            promise = " ".join((keep.__doc__ or keep.__name__).split()).rstrip(".")
            try:
                keep(registry, name, url)
                failure = None
            except AssertionError as error:
                failure = str(error) or "it did not hold"
            except FloraError as error:
                failure = str(error)
            finally:
                _clean(registry, name)
        yield Result(promise, failure)


def _clean(registry: Registry, name: str) -> None:
    try:
        for alias in registry.protected(name):
            registry.protect(name, alias, is_protected=False)
        registry.remove(name, force=True)
    except AdapterNotFound:
        pass

"""Python's collector, kept from stopping a step."""

import gc

_USUAL = gc.get_threshold()
_THRESHOLD = (20_000, 20, 100)  # young objects are looked at every few steps, all of them hardly ever


def keep_collections_short() -> None:
    """The collector no longer walks over all that is here: a full collection takes as long as many steps.

    What a request leaves behind is freed by its reference counts; cycles come from errors and the start alone.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLD)


def collect_as_usual() -> None:
    """As before: for a process that goes on without an engine."""
    gc.unfreeze()
    gc.set_threshold(*_USUAL)

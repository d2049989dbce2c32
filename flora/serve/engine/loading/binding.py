"""Whether an adapter belongs to the base that is served: by content, never by name."""

import logging

from flora.adapter import AdapterHeader, BaseBinding
from flora.errors import BaseMismatch
from flora.identity import BaseRecord
from flora.registry import Registry, Version

logger = logging.getLogger(__name__)


def admit(
    registry: Registry, version: Version, header: AdapterHeader, served: BaseRecord, label: str, *, allow_mismatch: bool
) -> None:
    """Returns if the version may be served on these weights: its own base's, or with `allow_mismatch` any others.

    Such a mismatch stands in the registry from then on, and in the log; what cannot be recorded is not served.
    Raises BaseMismatch; StoreError if the registry takes no record.
    """
    try:
        check_base(header.base, served, label)
    except BaseMismatch as mismatch:
        if not allow_mismatch:
            raise
        registry.allow_mismatch(version, str(served.base_id))
        logger.warning(
            "adapter on another base label=%s ref=%s base=%s served=%s: %s",
            label, version.ref, version.base_id, served.base_id, mismatch.cause
        )  # fmt: skip


def check_base(binding: BaseBinding, served: BaseRecord, label: str) -> None:
    """Returns if the adapter was made for these weights: its base id is theirs, or else every tensor it touches is.

    An import whose base nobody has shown us has no base id: its shapes alone decide, and a warning says so.
    Raises BaseMismatch.
    """
    if binding.base_id is None:
        logger.warning("adapter base unproven label=%s claimed_base=%s", label, binding.name)
        return
    if binding.base_id == str(served.base_id):
        return
    hashes = served.hashes()
    differing = sorted(name for name, sha256 in binding.touched.items() if hashes.get(name) != sha256)
    if differing or not binding.touched:
        about = f"{len(differing)} of the {len(binding.touched)} tensors that it changes" if differing else "the base"
        raise BaseMismatch(
            f"adapter {label} belongs to other base weights than the ones served",
            cause=f"{about} differ{'' if differing else 's'}"
            + (f", {differing[0]} among them" if differing else "")
            + f"; it was made for {binding.name} ({binding.base_id[:19]}…)",
            fix="serve the base that it was made from: `flora show` names it",
            base_id=binding.base_id,
        )

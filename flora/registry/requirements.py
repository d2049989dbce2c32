"""What a version must keep to be promoted: `energy>=0.9`, `rank<=64`, `bytes<=100000000`, `base=proven`."""

import operator
import re
from dataclasses import dataclass

from flora.adapter import ChangeReport
from flora.errors import UsageError
from flora.registry.records import Version

_TEXT = re.compile(r"(?P<what>\w+)(?P<how>>=|<=|==|=|>|<)(?P<bound>[\w.]+)")
_HOW = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "=": operator.eq}
_NUMBERS = ("energy", "module_energy", "rank", "bytes", "modules")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One bound on one figure of a version."""

    what: str  # energy: of the whole change; module_energy: of the least well kept module; rank, bytes, modules; base
    how: str
    bound: float | str

    def __str__(self) -> str:
        return f"{self.what}{self.how}{self.bound}"


def parse_requirement(text: str) -> Requirement:
    """Raises UsageError if `text` is none."""
    match = _TEXT.fullmatch(text.replace(" ", ""))
    if match and match["what"] == "base" and match["how"] in ("=", "==") and match["bound"] == "proven":
        return Requirement("base", "=", "proven")
    if match and match["what"] in _NUMBERS:
        try:
            return Requirement(match["what"], match["how"], float(match["bound"]))
        except ValueError:
            pass
    raise UsageError(
        f"{text[:80]!r} is nothing that can be required",
        fix=f"write one of {', '.join(_NUMBERS)} with a bound, such as energy>=0.9, or base=proven",
    )


def unmet(
    requirement: Requirement, version: Version, report: ChangeReport | None, *, is_base_proven: bool = False
) -> str | None:
    """Why the version does not meet it, if it does not. A figure that nobody measured meets no bound.

    is_base_proven  as the registry has it: the id of a base is its author's word
    """
    if requirement.what == "base":
        if is_base_proven:
            return None
        how = "by name" if version.base_id is None else f"as {version.base_id[:19]}…"
        return f"base=proven: its base is only claimed, {how}; import or pull it with --base to prove it here"
    found = _figure(requirement.what, version, report)
    if found is None:
        return f"{requirement}: it was never measured; an import has no change to keep a share of"
    if _HOW[requirement.how](found, requirement.bound):
        return None
    return f"{requirement}: it has {found:.6g}"


def _figure(what: str, version: Version, report: ChangeReport | None) -> float | None:
    if what in ("energy", "module_energy"):
        if report is None or version.operation == "import":
            return None
        if what == "energy":
            return report.kept_share
        shares = [t.kept / t.norm_squared for t in report.tensors if t.status == "extracted" and t.norm_squared > 0]
        return min(shares, default=1.0)
    return {"rank": version.max_rank, "bytes": version.num_bytes, "modules": version.num_modules}[what]

"""What one extraction is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from flora.errors import UsageError
from flora.extract.kinds import DEFAULT_WISH, Wish
from flora.rank import RankRule

FACTOR_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}  # of one stored number


@dataclass(frozen=True, slots=True)
class ExtractConfig:
    """Raises UsageError where the rule is empty, or factors cannot be stored in that dtype."""

    rule: RankRule
    factor_dtype: str = "bfloat16"  # of the stored factors
    exact: bool = False  # a full SVD of every delta, for audits
    include: tuple[str, ...] = ()  # globs over module names; none means every module
    exclude: tuple[str, ...] = ()
    wish: Wish = DEFAULT_WISH  # what beside the linear layers
    seed: int = 0
    strict: bool = False  # a module that misses the asked energy fails the whole run
    device: str = "cpu"
    cache_dir: Path | None = None  # of file hashes; None hashes afresh
    journal_dir: Path | None = None  # of finished pairs, from which an interrupted run is resumed; None keeps none
    resume: bool = False  # go on where an interrupted run of the same files and options ended

    def __post_init__(self) -> None:
        if self.rule.is_empty:
            raise UsageError(
                "nothing says how much of the change to keep", fix="give --rank 64, --energy 0.95 or --budget 100MB"
            )
        if self.factor_dtype not in FACTOR_BYTES:
            raise UsageError(
                f"{self.factor_dtype!r} is no dtype for factors", fix=f"give one of {', '.join(FACTOR_BYTES)}"
            )

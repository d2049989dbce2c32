"""From two full checkpoints to one adapter: subtract, factorize, certify what the stored factors keep."""

from flora.extract.config import ExtractConfig
from flora.extract.estimate import estimate_seconds
from flora.extract.jobs import ExtractProgress
from flora.extract.kinds import Wish
from flora.extract.plan import ExtractionPlan, plan_extraction
from flora.extract.run import ExtractResult, extract, extract_many

__all__ = [
    "ExtractConfig",
    "ExtractProgress",
    "ExtractResult",
    "ExtractionPlan",
    "Wish",
    "estimate_seconds",
    "extract",
    "extract_many",
    "plan_extraction",
]

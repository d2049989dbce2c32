"""What one checkpoint calls a tensor that the other calls otherwise: by prefixes found, and by renamings known."""

import re
from collections import Counter
from collections.abc import Collection

RENAMED = (  # how transformers 5 names the parts of models that see and read, and how older versions saved them
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector|visual|vision_model)\.", r"model.\1."),
    (r"^model\.", "model.language_model."),
)


def named_as(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Each of `names` as `others` have it: with a prefix that it lacks, or by a newer library's name; else as it is.

    No two get one name: a tensor is what is called so, and not also what might be, such as the weights beside their
    moving average `ema.…`.
    """
    prefixes = _common_prefixes([name for name in names if name not in others], others)
    found, taken = {}, set(names)
    for name in names:
        candidates = (*(prefix + name for prefix in prefixes), *(re.sub(old, new, name) for old, new in RENAMED))
        free = (candidate for candidate in candidates if candidate in others and candidate not in taken)
        found[name] = name if name in others else next(free, name)
        taken.add(found[name])
    return found


def _common_prefixes(names: Collection[str], others: Collection[str]) -> list[str]:
    """Prefixes under which `others` hold at least half of `names`, the most common first."""
    counts: Counter[str] = Counter()
    wanted = set(names)
    for other in others:
        parts = other.split(".")
        for depth in range(1, len(parts)):
            if ".".join(parts[depth:]) in wanted:
                counts[".".join(parts[:depth]) + "."] += 1
    return [prefix for prefix, count in counts.most_common() if 2 * count >= len(wanted)]

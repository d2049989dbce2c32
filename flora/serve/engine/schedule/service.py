"""How much each adapter was served: virtual token counters (Sheng et al., OSDI 2024, arXiv:2401.00588, section 4)."""

from collections import OrderedDict
from collections.abc import Container, Iterable

PROMPT_PRICE = 1  # of a prompt token that is computed
ANSWER_PRICE = 2  # of a drawn token: the paper's weights, and S-LoRA's
_MAX_REMEMBERED = 4096  # counters of adapters that nobody asks for now


class Service:
    """Counters by serving digest; the base's is that of None."""

    def __init__(self) -> None:
        self.counters: OrderedDict[str | None, int] = OrderedDict()  # least recently joined first
        self._last_left = 0  # counter of the latest adapter whose last request went

    def counter(self, digest: str | None) -> int:
        return self.counters.get(digest, 0)

    def charge(self, digest: str | None, price: int) -> None:
        self.counters[digest] = self.counters.get(digest, 0) + price

    def join(self, digest: str | None, waiting: Iterable[str | None]) -> None:
        """Somebody waits for an adapter for which nobody waited: what it did not ask for meanwhile gives it no credit.

        waiting  the adapters that others wait for
        """
        floor = min((self.counter(other) for other in waiting), default=self._last_left)
        self.counters[digest] = max(self.counter(digest), floor)
        self.counters.move_to_end(digest)

    def leave(self, digest: str | None, waiting: Container[str | None]) -> None:
        """Nobody waits for the adapter any more. The oldest counters that nobody's turn depends on are forgotten."""
        self._last_left = self.counter(digest)
        while len(self.counters) > _MAX_REMEMBERED:
            forgotten = next((other for other in self.counters if other not in waiting), digest)
            if forgotten == digest:
                return
            del self.counters[forgotten]

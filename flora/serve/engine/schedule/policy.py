"""Whose turn it is among those who wait: the switches of the scheduler."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything off but the age cap is first come, first served.

    fairness     the adapter that was served least goes first: the virtual token counter of Sheng et al. (OSDI 2024,
                 arXiv:2401.00588, section 4), as S-LoRA has it with an adapter for a client
    max_wait_s   the age cap: who waits so long without room closes the door behind him until he is in; and an adapter
                 that waits so long without a turn has one, whatever fairness and clustering say
    slo_ttft_s   early abort: who can no longer have his first token so soon is refused, and under overload the newest
                 go first (S-LoRA, arXiv:2311.03285, section 4.3 and appendix B)
    cluster      adapter clustering: once so many adapters run, requests for those go first (S-LoRA, section 4.2)
    prefetch     adapters load when a request arrives, not when its turn comes (S-LoRA, section 5.2)
    prefix_cache finished KV pages are kept for requests with the same adapter that begin with the same tokens
    """

    fairness: bool = False
    max_wait_s: float = 5.0
    slo_ttft_s: float | None = None
    cluster: int | None = None
    prefetch: bool = True
    prefix_cache: bool = False

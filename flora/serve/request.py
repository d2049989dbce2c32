"""What a client asked, frozen and within bounds: past the HTTP schema nothing is checked twice."""

import msgspec

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 16


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are drawn. Bounds are the schema's (`serve/api/schema.py`)."""

    max_tokens: int  # >= 1; the context's end also stops
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int | None = None  # >= 1
    seed: int = 0  # the front end draws one where the client gave none
    logprobs: int | None = None  # number of alternatives per token, 0..MAX_LOGPROBS; None for none
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids (adapter's or base's) and the client's own

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def asks_likeliest(self) -> bool:
        """For the likeliest token, and nothing else."""
        return self.temperature == 0.0 and self.logprobs is None


class AdapterTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter version as the front end resolved it. The engine knows it by `serving_digest` only."""

    serving_digest: str
    version_digest: str  # what the loader asks the registry for
    label: str  # what the client called it: for messages and logs, never for keys or paths

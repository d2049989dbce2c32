"""What the engine says to requests that it cannot serve, or no longer in time."""

from flora.errors import DeadlineMissed, PromptTooLong, RequestInvalid
from flora.serve.messages import Ready
from flora.serve.request import AdapterTarget


def check_prompt(prompt: tuple[int, ...], ready: Ready) -> None:
    """Raises RequestInvalid, and PromptTooLong where no token of an answer would fit behind it."""
    if not prompt:
        raise RequestInvalid("the prompt has no tokens")
    if len(prompt) >= ready.max_context:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens, and the context is {ready.max_context}",
            cause="prompt and answer share the context, and an answer has at least one token",
            num_tokens=len(prompt),
        )
    if not 0 <= min(prompt) <= max(prompt) < ready.vocab_size:
        raise RequestInvalid(f"the prompt has a token id outside 0 to {ready.vocab_size - 1}")


def check_adapter(adapter: AdapterTarget | None, ready: Ready) -> None:
    """Raises RequestInvalid for any adapter where one is merged into the base."""
    if adapter and ready.merged:
        raise RequestInvalid(
            f"adapter {adapter.label} cannot be applied: another one is merged into the base",
            fix="start the server without --merge",
        )


def too_late(slo_s: float, waited_s: float, num_waiting: int) -> DeadlineMissed:
    """The error of a request whose first token cannot come within `slo_s` any more."""
    return DeadlineMissed(
        f"the first token cannot come within {slo_s:g} s",
        cause=f"the request waited {waited_s:.1f} s, and {num_waiting} wait for their turn",
        fix="try again later, or send fewer requests at once",
    )

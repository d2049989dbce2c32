"""What becomes of one request: its tokens told as they are drawn, and its end, whatever it ends of."""

from flora.errors import FloraError
from flora.serve.engine.outbox import Outbox
from flora.serve.engine.sampler import Drawn
from flora.serve.engine.schedule.scheduler import Chunk, Scheduler
from flora.serve.engine.schedule.sequence import Sequence
from flora.serve.messages import FinishReason, TokenEvent


class Answers:
    """Whoever ends a sequence takes it from the scheduler and tells its front end: both, and once."""

    def __init__(self, scheduler: Scheduler, outbox: Outbox) -> None:
        self.num_generated = 0  # tokens, of all requests
        self._scheduler = scheduler
        self._outbox = outbox

    def advance(self, chunk: Chunk, drawn: Drawn) -> None:
        """Puts the drawn token in its place, or ends the sequence."""
        sequence, token = chunk.sequence, drawn.token
        place = chunk.start + chunk.count
        if token is None:
            error = "the model's output is not finite: weights of the base or of the adapter overflow"
            self.end(sequence, "error", error=error)
            return
        sampling = sequence.sampling
        if token in sampling.stop_token_ids and not sampling.ignore_eos:
            self.end(sequence, "stop", stop_token=token)
            return
        sequence.tokens[place] = token
        self.num_generated += 1
        ends = place + 1 >= sequence.max_len
        client, request_id = sequence.key
        event = TokenEvent(
            request_id=request_id,
            token_ids=(token,),
            logprobs=(drawn.logprobs,) if drawn.logprobs else (),
            finish_reason="length" if ends else None,
            cached_tokens=sequence.num_cached,
        )
        if ends:
            self._scheduler.finish(sequence)
        self._outbox.tell(client, event)

    def end(
        self, sequence: Sequence, reason: FinishReason, *, stop_token: int | None = None, error: str | None = None
    ) -> None:
        """Takes the sequence out, with no token more."""
        self._scheduler.finish(sequence, is_sound=reason != "error")
        client, request_id = sequence.key
        event = TokenEvent(
            request_id=request_id,
            token_ids=(),
            finish_reason=reason,
            stop_token=stop_token,
            cached_tokens=sequence.num_cached,
            error=error,
        )
        self._outbox.tell(client, event)

    def refuse(self, sequence: Sequence, error: FloraError) -> None:
        """Ends a sequence. One that has told tokens already ends with an event."""
        if sequence.num_generated:
            self.end(sequence, "error", error=error.what)
        else:
            self._scheduler.finish(sequence)
            self._outbox.reject(sequence.key, error)

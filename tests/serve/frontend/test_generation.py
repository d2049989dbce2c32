"""The mailbox of a request and the stream that empties it."""

import asyncio

from flora.serve.api.shapes import CompletionShape
from flora.serve.api.sse import stream_events
from flora.serve.frontend.answer import Choice
from flora.serve.frontend.generation import Generation
from flora.serve.frontend.run import Run
from flora.serve.frontend.tokenizer import Tokenizer
from flora.serve.messages import TokenEvent
from flora.serve.request import SamplingParams
from tests.serve.frontend.vocabularies import byte_level_spec


class Desk:
    """Where a run hands its sequence in, and gets its mailbox."""

    def __init__(self) -> None:
        self.generation = Generation(lambda request_id, cancel: None)

    def submit(self, *_: object) -> Generation:
        return self.generation

    def tell(self, token: int, *, is_last: bool = False) -> None:
        event = TokenEvent(request_id="r", token_ids=(token,), finish_reason="length" if is_last else None)
        self.generation.put(0, event)


def test_what_has_come_meanwhile_goes_out_in_one_write():
    tokenizer, desk = Tokenizer(byte_level_spec()), Desk()
    shape = CompletionShape(model="m", tokenizer=tokenizer, fingerprint="f", num_logprobs=None)

    async def writes() -> list[bytes]:
        run = Run(desk, [[1]], [SamplingParams(max_tokens=4)], None, lambda: Choice(tokenizer))  # type: ignore[arg-type]
        events = stream_events(run, shape, None, keepalive_s=60.0, includes_usage=False, continues_usage=False)
        found = [await anext(events)]  # nothing was there: a comment
        for token in tokenizer.encode("abc")[:3]:
            desk.tell(token)
        found.append(await anext(events))
        desk.tell(tokenizer.encode("d")[0], is_last=True)
        return [*found, *[body async for body in events]]

    bodies = asyncio.run(writes())

    assert [body.count(b"data: ") for body in bodies] == [0, 3, 2]  # the last: a token, and [DONE]
    assert bodies[-1].endswith(b"data: [DONE]\n\n")


def test_one_timer_serves_many_waits_and_each_has_its_own_time():
    async def waits() -> list[object]:
        desk, loop = Desk(), asyncio.get_running_loop()
        seen: list[object] = []
        for token in range(3):
            loop.call_soon(desk.tell, token)
            seen.append((await desk.generation.next(3600.0))[1].token_ids)  # type: ignore[index]
        timer = desk.generation._patience._timer
        assert timer is not None
        loop.call_soon(desk.tell, 3)
        await desk.generation.next(3600.0)
        seen.append(desk.generation._patience._timer is timer)
        seen.append(await desk.generation.next(0.0))  # sooner than the timer that is there
        desk.generation.close()
        seen.append(desk.generation._patience._timer)
        return seen

    assert asyncio.run(waits()) == [(0,), (1,), (2,), True, None, None]

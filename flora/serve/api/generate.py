"""POST /v1/completions and /v1/chat/completions: a body in, pieces out, whole or as events."""

import contextlib
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from flora.serve.api.disconnect import until_disconnect
from flora.serve.api.ignored import ignored_header
from flora.serve.api.parsing import parse
from flora.serve.api.schema import ChatBody, CompletionBody
from flora.serve.api.shapes import ChatShape, CompletionShape, Shape
from flora.serve.api.sse import EventStream, stream_events
from flora.serve.api.state import ServerState
from flora.serve.frontend.answer import Choice, Piece
from flora.serve.frontend.models import Served
from flora.serve.frontend.run import Run


def generation_routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body, unknown = parse(CompletionBody, await request.body())
        served = await state.models.resolve(body.model)
        prompts = await state.prompts.of_texts(body.prompt)
        return await _answer(state, request, body, served, prompts, CompletionShape, ignored_header(unknown))

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body, unknown = parse(ChatBody, await request.body())
        served = await state.models.resolve(body.model)
        prompt = await state.prompts.of_chat(
            [message.for_template() for message in body.messages],
            served.template,
            add_generation_prompt=body.add_generation_prompt,
            template_kwargs=body.template_kwargs,
        )
        return await _answer(state, request, body, served, [prompt], ChatShape, ignored_header(unknown))

    return router


def fingerprint(state: ServerState, served: Served) -> str:
    """Names the weights that answer: the base's, and the adapter's serving digest."""
    base = state.models.base_id.removeprefix("sha256:")[:12]
    adapter = served.version.serving_digest.removeprefix("sha256:")[:12] if served.version else "base"
    return f"fl-{base}-{adapter}"


async def _answer(
    state: ServerState,
    request: Request,
    body: CompletionBody | ChatBody,
    served: Served,
    prompts: Sequence[Sequence[int]],
    kind: type[CompletionShape] | type[ChatShape],
    headers: dict[str, str],
) -> Response:
    shape = kind(
        model=state.models.default_name if body.model is None else body.model,
        tokenizer=state.tokenizer,
        fingerprint=fingerprint(state, served),
        num_logprobs=body.num_logprobs,
    )

    def new_choice() -> Choice:
        return Choice(
            state.tokenizer,
            stop=tuple(body.stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            skip_special_tokens=body.skip_special_tokens is not False,
        )

    samplings = body.samplings(
        max_tokens=body.answer_tokens or state.prompts.max_context,  # the engine stops where the context ends
        end_tokens=served.end_tokens,
    )
    run = Run(state.client, prompts, samplings, served.target, new_choice)

    def end() -> None:
        run.close()
        state.metrics.note_run(run)

    stack = contextlib.ExitStack()
    stack.callback(end)
    with stack:
        if not body.stream:
            return await _whole(request, run, shape, headers)
        # a refusal that comes before the first token is still an HTTP status
        first = await until_disconnect(request, run.next(state.config.keepalive_s))
        events = stream_events(
            run,
            shape,
            first,
            keepalive_s=state.config.keepalive_s,
            includes_usage=body.includes_usage,
            continues_usage=body.continues_usage,
        )
        return EventStream(events, on_end=stack.pop_all().close, headers=headers)


async def _whole(request: Request, run: Run, shape: Shape, headers: dict[str, str]) -> Response:
    choices: list[list[Piece]] = [[] for _ in run.choices]

    async def collect() -> None:
        while not run.is_finished:
            if (found := await run.next(timeout_s=60.0)) is not None:
                index, piece = found
                choices[index].append(piece)

    await until_disconnect(request, collect())
    answer = msgspec.json.encode(shape.whole(choices, run.usage))
    return Response(answer, media_type="application/json", headers=headers)

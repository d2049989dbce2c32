"""What operators and their machines ask: /health, /version, /metrics; and the tokenizer, for whoever wants to count."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import flora
from flora.errors import RequestInvalid
from flora.serve.api.errors import plain_response
from flora.serve.api.ignored import ignored_header
from flora.serve.api.parsing import parse
from flora.serve.api.schema import DetokenizeBody, TokenizeBody
from flora.serve.api.state import ServerState


def operation_routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 while requests can be served; 503 when the engine is silent or gone, or the server is shutting down."""
        if state.trouble:
            return plain_response(503, state.trouble, code="unhealthy")
        return JSONResponse({"status": "ok"})

    @router.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": flora.__version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(state.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body, unknown = parse(TokenizeBody, await request.body())
        served = await state.models.resolve(body.model)
        if body.messages is not None:
            token_ids = await state.prompts.of_chat(
                [message.for_template() for message in body.messages],
                served.template,
                add_generation_prompt=body.add_generation_prompt,
                template_kwargs=body.chat_template_kwargs,
            )
        else:
            token_ids = await state.prompts.encode(body.prompt or "", add_special_tokens=body.adds_special_tokens)
        answer = {"count": len(token_ids), "max_model_len": state.prompts.max_context, "tokens": token_ids}
        if body.return_token_strs:
            texts = [state.tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in token_ids]
            answer |= {"token_strs": texts}
        return JSONResponse(answer, headers=ignored_header(unknown))

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body, unknown = parse(DetokenizeBody, await request.body())
        await state.models.resolve(body.model)
        if any(token_id >= state.prompts.vocab_size for token_id in body.tokens):
            raise RequestInvalid(f"a token id is outside [0, {state.prompts.vocab_size})", param="tokens")
        return JSONResponse({"prompt": await state.prompts.decode(body.tokens)}, headers=ignored_header(unknown))

    return router

"""GET /v1/models, and vLLM's routes that load and unload an adapter by name."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flora.errors import AdapterNotFound, FloraError, NameInvalid
from flora.registry import Entry, Version
from flora.serve.api.disconnect import until_disconnect
from flora.serve.api.ignored import ignored_header
from flora.serve.api.parsing import parse
from flora.serve.api.schema import LoadBody, UnloadBody
from flora.serve.api.state import ServerState
from flora.serve.messages import Ready

MAX_PAGE = 1000


def model_routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models(
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        after: Annotated[str | None, Query(max_length=512)] = None,
    ) -> Response:
        """The base, then adapters in the order of names; the id of the last one, as `after`, asks for the next page.

        Where one adapter is merged into the base, it is the only model. Beside the list stands all that is loaded: also
        what no name means any more.
        """
        starts = after is None
        first = state.models.default_name
        after_name = None if after is None or after == first else after
        entries, has_more = await state.models.page(after=after_name, limit=limit - starts)
        cards = [await card(first)] * starts + [
            adapter_card(state, entry.name, entry.version, entry) for entry in entries
        ]
        return JSONResponse(
            {
                "object": "list",
                "data": cards,
                "has_more": has_more,
                "first_id": cards[0]["id"] if cards else None,
                "last_id": cards[-1]["id"] if cards else None,
                "flora": {"resident": resident(state)},
            }
        )

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return JSONResponse(await card(model))

    async def card(model: str) -> dict[str, Any]:
        served = await state.models.resolve(model)
        return base_card(state) if served.version is None else adapter_card(state, model, served.version, None)

    return router


def adapter_routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        """Make an adapter resident. `lora_path` is a registry reference; `lora_name` stands for it on this server."""
        body, unknown = parse(LoadBody, await request.body())
        reference = body.lora_name if body.lora_path is None else body.lora_path
        with _blaming("lora_name" if body.lora_path is None else "lora_path"):
            served = await state.models.nickname(body.lora_name, reference)
            if served.target is None or served.version is None:
                raise NameInvalid("the base is always loaded", fix="name an adapter", param="lora_name")
            loaded = await until_disconnect(request, state.client.load_adapter(served.target, pinned=bool(body.pinned)))
        return JSONResponse(
            _both_flavours(state, f"{body.lora_name} is loaded", loaded=(body.lora_name, served.version.ref))
            | {
                "load_ms": loaded.load_ms,
                "flora": {"ref": served.version.ref, "serving_digest": loaded.serving_digest},
            },
            headers=ignored_header(unknown),
        )

    @router.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        """Give an adapter's pages back once its running requests are done. The next request for it loads it again.

        `lora_name` may be the serving digest of what is resident: perhaps no name means it any more.
        """
        body, unknown = parse(UnloadBody, await request.body())
        if body.lora_name.startswith("sha256:"):
            digest, ref = _resident_digest(state, body.lora_name), body.lora_name
        else:
            with _blaming("lora_name"):
                digest, ref = await named(body.lora_name)
            state.models.forget_nickname(body.lora_name)
        unloaded = await until_disconnect(request, state.client.unload_adapter(digest))
        return JSONResponse(
            _both_flavours(state, f"{body.lora_name} is unloaded", unloaded=digest)
            | {"was_resident": unloaded.was_resident, "flora": {"ref": ref}},
            headers=ignored_header(unknown),
        )

    async def named(name: str) -> tuple[str, str]:
        """Serving digest and reference of the adapter that the name means."""
        served = await state.models.resolve(name)
        if served.target is None or served.version is None:
            what = "the base" if served.version is None else f"{name} is merged into the base, and"
            raise NameInvalid(f"{what} cannot be unloaded", fix="name an adapter", param="lora_name")
        return served.target.serving_digest, served.version.ref

    return router


def base_card(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.config.base_name,
        "object": "model",
        "created": state.started_s,
        "owned_by": "flora",
        "root": state.config.base_name,
        "parent": None,
        "max_model_len": state.prompts.max_context,
        "flora": {"base_id": state.models.base_id},
    }


def adapter_card(state: ServerState, model: str, version: Version, entry: Entry | None) -> dict[str, Any]:
    """An adapter's card. Its root is its registry reference, never a path."""
    details: dict[str, Any] = {
        "version": version.number,
        "digest": version.digest,
        "serving_digest": version.serving_digest,
        "rank": version.max_rank,
        "bytes": version.num_bytes,
        "kept_share": version.kept_share,
        "residency": residency(state, version),
    }
    if entry is not None:
        details |= {"aliases": entry.aliases, "versions": entry.num_versions}
    return {
        "id": model,
        "object": "model",
        "created": int(version.created_at.timestamp()),
        "owned_by": "flora",
        "root": version.ref,
        "parent": state.config.base_name,
        "max_model_len": state.prompts.max_context,
        "flora": details,
    }


def residency(state: ServerState, version: Version) -> str:
    """Where the adapter's numbers lie now: "gpu" or "cpu", the device of the pool, else "disk"."""
    beat, ready = state.client.heartbeat, state.client.ready
    if beat is None or ready is None:
        return "disk"
    is_merged = ready.merged == version.serving_digest
    if is_merged or any(adapter.serving_digest == version.serving_digest for adapter in beat.resident):
        return _place(ready)
    return "disk"


def resident(state: ServerState) -> list[dict[str, Any]]:
    """Every adapter in the pool, by the name that it was loaded by, which may mean another one now."""
    beat, ready = state.client.heartbeat, state.client.ready
    if beat is None or ready is None:
        return []
    return [
        {
            "label": adapter.label,
            "serving_digest": adapter.serving_digest,
            "rank": adapter.rank,
            "bytes": adapter.num_pages * ready.page_bytes,  # what it takes of the pool
            "residency": _place(ready),
        }
        for adapter in beat.resident
    ]


@contextlib.contextmanager
def _blaming(param: str) -> Iterator[None]:
    """Errors name this field where they would name `model`, which these bodies do not have."""
    try:
        yield
    except FloraError as error:
        error.values.setdefault("param", param)
        raise


def _resident_digest(state: ServerState, digest: str) -> str:
    """The digest itself. Raises AdapterNotFound if nothing in the pool has it."""
    if any(adapter["serving_digest"] == digest for adapter in resident(state)):
        return digest
    raise AdapterNotFound(
        "no adapter of that digest is loaded", fix="`flora ps` lists what is; or give a name", param="lora_name"
    )


def _place(ready: Ready) -> str:
    return "cpu" if ready.device.startswith("cpu") else "gpu"


def _both_flavours(
    state: ServerState, message: str, *, loaded: tuple[str, str] | None = None, unloaded: str | None = None
) -> dict[str, Any]:
    """What clients of vLLM and of SGLang look for. The heartbeat is a moment old, so it is told of this change."""
    beat = state.client.heartbeat
    left = [adapter for adapter in beat.resident if adapter.serving_digest != unloaded] if beat else []
    adapters = {adapter.label: adapter.serving_digest for adapter in left} | dict([loaded] if loaded else [])
    return {"success": True, "message": message, "error_message": "", "loaded_adapters": adapters}

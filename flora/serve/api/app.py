"""The HTTP server as one ASGI application.

Traffic ─► Access ─► BodyLimits ─► routes
id, count   host, key   size, type, time
"""

from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flora.errors import FloraError, RequestInvalid
from flora.serve.api.access import Access, check_exposure
from flora.serve.api.adapters import adapter_routes, model_routes
from flora.serve.api.bodies import BodyLimits
from flora.serve.api.disconnect import ClientLeft
from flora.serve.api.errors import error_response, plain_response
from flora.serve.api.generate import generation_routes
from flora.serve.api.operations import operation_routes
from flora.serve.api.state import ServerState
from flora.serve.api.traffic import Traffic

_CLIENT_LEFT = 499  # nginx's status for it; it is counted, and nobody reads it
_NO_ROUTE = "there is no such route: /v1/models lists what this server has, /v1/chat/completions asks it"
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "body_too_large"}


def create_app(state: ServerState) -> FastAPI:
    """The application. Raises UsageError where the configuration would expose it to everyone."""
    check_exposure(state.config)
    app = FastAPI(title="Flora", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for routes in (generation_routes, model_routes, adapter_routes, operation_routes):
        app.include_router(routes(state))
    app.add_exception_handler(FloraError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_bad_query)
    app.add_exception_handler(ClientLeft, _on_client_left)
    app.add_middleware(BodyLimits, config=state.config)  # the last one added is the first that a request meets
    app.add_middleware(Access, config=state.config)
    app.add_middleware(Traffic, state=state)
    return app


async def _on_error(_: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "http_error")
    headers = dict(error.headers or {})
    is_unknown = error.status_code == 404 and error.detail == HTTPStatus.NOT_FOUND.phrase
    return plain_response(error.status_code, _NO_ROUTE if is_unknown else error.detail, code=code, headers=headers)


async def _on_bad_query(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return error_response(RequestInvalid(f"{param}: {first['msg']}", param=param))


async def _on_client_left(_: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)

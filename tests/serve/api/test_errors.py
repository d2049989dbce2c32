"""The one table from errors to answers."""

import pytest

from flora import errors
from flora.serve.api.errors import envelope, error_response, status_of
from flora.serve.frontend.refusals import error_of_code


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.AdapterNotFound("no sgl"), 404, "model_not_found"),
        (errors.PromptTooLong("9 tokens"), 400, "context_length_exceeded"),
        (errors.RequestInvalid("n: too large", param="n"), 400, "invalid_value"),
        (errors.BaseMismatch("other base"), 400, "FL-BASE"),
        (errors.Unsupported("lm_head"), 422, "FL-UNSUPPORTED"),
        (errors.AuthError("no key"), 401, "invalid_api_key"),
        (errors.Overloaded("full"), 503, "overloaded"),
        (errors.OutOfPages("too large"), 503, "FL-PAGES"),
        (errors.EngineDead("gone"), 503, "FL-ENGINE"),
        (errors.StoreError("damaged"), 500, "FL-STORE"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)
def test_an_error_has_one_status_and_one_code(error: Exception, status: int, code: str):
    assert status_of(error) == status
    assert envelope(error)["error"]["code"] == code
    assert ("retry-after" in error_response(error).headers) == (status == 503)


def test_every_error_that_the_engine_can_name_has_a_status():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FloraError)]

    for kind in kinds:
        assert type(error_of_code(kind.code, "x", cause=None, fix=None)) is kind
        assert 400 <= status_of(kind("x")) < 600


def test_an_answer_names_no_path_of_this_machine():
    for text in (
        "cannot read /home/me/.local/share/flora/blobs/sha256/ab",
        "'/etc/passwd' is damaged",
        "see file:///srv/flora/x",
    ):
        message = envelope(errors.RequestInvalid(text, cause=text, fix=text))["error"]["message"]
        assert not any(part in message for part in ("home", "etc", "srv", "passwd"))

    kept = "send it to /v1/completions; team/poems@v1 has 3/4 of it"
    assert "team/poems@v1 has 3/4" in envelope(errors.RequestInvalid(kept))["error"]["message"]


def test_an_answer_names_the_routes_of_this_server():
    for route in ("/v1/models", "/v1/completions", "/v1/chat/completions"):
        told = envelope(errors.RequestInvalid("no", fix=f"send it to {route}"))["error"]["message"]
        assert told == f"no. Fix: send it to {route}"
        assert f"{route}." in envelope(errors.RequestInvalid(f"ask {route}."))["error"]["message"]

    for path in ("/v1/models/base/weights", "/v1/completions.log", "/v1/secrets"):
        assert path not in envelope(errors.RequestInvalid(f"cannot read {path}"))["error"]["message"]


def test_what_went_wrong_inside_is_not_told():
    answer = envelope(errors.StoreError("blob damaged", cause="bit rot on disk 3", fix="call Ann"))["error"]["message"]

    assert answer == "blob damaged"
    assert "secret" not in str(envelope(ValueError("secret")))

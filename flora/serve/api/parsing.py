"""From a request's bytes to its body: one sentence for what is wrong, and a name for everything that is ignored.

A field is one of four kinds: declared by the body with its bounds; `_NEUTRAL`, known but not offered, so accepted only
where it changes nothing; `_WITHOUT_EFFECT`, known and no business of this server; or unknown, which is ignored and
reported to the client by name.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from flora.errors import RequestInvalid

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "lora_path": (None,),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "presence_penalty": (None, 0),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "repetition_penalty": (None, 1),
    "return_token_ids": (None, False),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_calls": (None, []),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}
_WITHOUT_EFFECT = frozenset(
    {
        "cache_salt",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "user",
    }
)


class Body(BaseModel):
    """An object of a request. Its types are strict, and what it does not declare is kept for `parse` to look at."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    def check(self) -> None:
        """Raises RequestInvalid for fields that do not go together."""


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], data: bytes) -> tuple[AnyBody, list[str]]:
    """The body, and the names of fields in it that nobody here knows. Raises RequestInvalid with `param`."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error) from error
    unknown = list(dict.fromkeys(_unknown_fields(body, "")))
    body.check()
    return body, unknown


def _invalid(error: ValidationError) -> RequestInvalid:
    """The first thing that is wrong, in one sentence, without the value that was sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return RequestInvalid(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    param = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
    return RequestInvalid(f"{param or 'the body'}: {first['msg']}", param=param or None)


def _unknown_fields(body: Body, path: str) -> Iterator[str]:
    """Raises RequestInvalid for a field that would have to change the answer, and cannot."""
    for name, value in (body.model_extra or {}).items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise RequestInvalid(f"the field {path}{name} is not supported by this server", param=f"{path}{name}")
        elif name not in _WITHOUT_EFFECT:
            yield f"{path}{name}"
    for name in type(body).model_fields:
        value = getattr(body, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Body):
                yield from _unknown_fields(inner, f"{path}{name}.")

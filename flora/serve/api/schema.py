"""What strangers send, within bounds: OpenAI's request bodies, and at once our own types.

Every field is one of four kinds: declared here with its bounds; `_NEUTRAL`, known but not offered, so accepted only
where it changes nothing; `_WITHOUT_EFFECT`, known and no business of this server; or unknown, which is ignored and
reported to the client by name.
"""

import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import PydanticCustomError

from flora.errors import RequestInvalid
from flora.serve.request import MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_STRINGS, SamplingParams

MAX_MODEL_CHARS = 512
MAX_PROMPTS = 128
MAX_SEQUENCES = 256  # prompts times choices
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TEMPLATE_KWARGS = 64
MAX_JSON_DEPTH = 8
MAX_JSON_VALUES = 1024
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_MAX_TOKENS = 2**31 - 1

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

Body = TypeVar("Body", bound="_Body")


def parse(kind: type[Body], data: bytes) -> tuple[Body, list[str]]:
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


def _unknown_fields(body: "_Body", path: str) -> Iterator[str]:
    """Raises RequestInvalid for a field that would have to change the answer, and cannot."""
    for name, value in (body.model_extra or {}).items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise RequestInvalid(f"{path}{name} is not supported by this server", param=f"{path}{name}")
        elif name not in _WITHOUT_EFFECT:
            yield f"{path}{name}"
    for name in type(body).model_fields:
        value = getattr(body, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, _Body):
                yield from _unknown_fields(inner, f"{path}{name}.")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _check_plain(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Bounds of JSON that goes to a template: depth, and number of values."""
    level: list[JsonValue] = [value]
    count = depth = 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > MAX_JSON_VALUES or depth > MAX_JSON_DEPTH:
            raise PydanticCustomError(
                "too_large", f"at most {MAX_JSON_VALUES} values, nested at most {MAX_JSON_DEPTH} deep"
            )
        level = [item for outer in level for item in _inside(outer)]
    return value


def _inside(value: JsonValue) -> list[JsonValue]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list) else []


def _check_prompt(value: Any) -> Any:
    """A prompt is text, token ids, or a list of either."""
    prompts = value if _is_list_of_prompts(value) else [value]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise PydanticCustomError("prompts", f"give 1 to {MAX_PROMPTS} prompts")
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise PydanticCustomError("prompt", "a prompt is a string or a list of token ids")
    return prompts


def _is_list_of_prompts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not all(type(item) is int for item in value)


TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKENS)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_listed),
]
TemplateKwargs = Annotated[dict[str, JsonValue], Field(max_length=MAX_TEMPLATE_KWARGS), AfterValidator(_check_plain)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    def check(self) -> None:
        """Raises RequestInvalid for fields that do not go together."""


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Generation(_Body):
    """What completions and chats share."""

    model: str | None = Field(None, max_length=MAX_MODEL_CHARS)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_TOKENS)  # 0 and -1: all tokens, as vLLM's clients write it
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopStrings | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_STRINGS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to give for each token; None: no log probabilities at all."""
        raise NotImplementedError

    @property
    def answer_tokens(self) -> int | None:
        """The most an answer may have; None: what the context has room for."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continues_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def samplings(self, *, max_tokens: int, end_tokens: tuple[int, ...]) -> list[SamplingParams]:
        """One for each choice of a prompt: the same but for the seed.

        max_tokens: of the answer;  end_tokens: of the model
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed
        own = tuple(self.stop_token_ids or ())
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k if self.top_k and self.top_k > 0 else None,
                seed=(seed + choice) % 2**63,
                logprobs=self.num_logprobs,
                ignore_eos=bool(self.ignore_eos) and not own,
                stop_token_ids=own if self.ignore_eos else (*end_tokens, *own),
            )
            for choice in range(self.num_choices)
        ]

    def check(self) -> None:
        if self.stream_options and not self.stream:
            raise RequestInvalid("stream_options needs stream: true", param="stream_options")


class CompletionBody(_Generation):
    prompt: Annotated[list[str | list[int]], BeforeValidator(_check_prompt)]
    max_tokens: int | None = Field(None, ge=1, le=_MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def answer_tokens(self) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    def check(self) -> None:
        super().check()
        if len(self.prompt) * self.num_choices > MAX_SEQUENCES:
            raise RequestInvalid(f"prompts times n may be at most {MAX_SEQUENCES}", param="n")


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[TextPart], Field(max_length=MAX_PARTS), BeforeValidator(_parts)]
    name: str | None = Field(None, max_length=256)

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it: the parts of a content are lines of one string."""
        content = "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name is not None else {})


class TextFormat(_Body):
    type: Literal["text"]


class ChatBody(_Generation):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=_MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: TextFormat | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: str | None = Field(None, max_length=32)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def template_kwargs(self) -> dict[str, JsonValue]:
        effort: dict[str, JsonValue] = {"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {}
        return effort | (self.chat_template_kwargs or {})

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestInvalid("top_logprobs needs logprobs: true", param="top_logprobs")


class TokenizeBody(_Body):
    """Either a prompt or messages."""

    model: str | None = Field(None, max_length=MAX_MODEL_CHARS)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None  # of a prompt; a template writes its own
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestInvalid("give either prompt or messages", param="prompt")

    @property
    def adds_special_tokens(self) -> bool:
        return self.add_special_tokens is not False


class DetokenizeBody(_Body):
    model: str | None = Field(None, max_length=MAX_MODEL_CHARS)
    tokens: list[TokenId] = Field(max_length=1 << 20)


class LoadBody(_Body):
    lora_name: str = Field(min_length=1, max_length=MAX_MODEL_CHARS)
    lora_path: str | None = Field(None, min_length=1, max_length=MAX_MODEL_CHARS)  # a registry reference
    load_inplace: bool | None = None  # versions are told apart by content: there is nothing to overwrite
    pinned: bool | None = None


class UnloadBody(_Body):
    lora_name: str = Field(min_length=1, max_length=MAX_MODEL_CHARS)
    lora_int_id: int | None = None  # vLLM's; adapters have digests here

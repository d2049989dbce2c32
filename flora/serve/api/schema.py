"""What strangers send: OpenAI's request bodies and a few of vLLM's, every field within bounds."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from flora.errors import RequestInvalid
from flora.serve.api.parsing import Body
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


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(
        isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops
    ):
        raise PydanticCustomError(
            "stop",
            f"give a string of 1 to {MAX_STOP_CHARS} characters, or a list of up to {MAX_STOP_STRINGS} of them",
        )
    return stops


def _parts(value: Any) -> Any:
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise PydanticCustomError("content", 'give a string, or a list of parts such as {"type": "text", "text": "hi"}')
    return parts


def _check_format(value: Any) -> Any:
    if not isinstance(value, dict | None):
        raise PydanticCustomError("format", 'give {"type": "text"}')
    return value


def _check_format_type(value: Any) -> Any:
    """Names what is asked for most often."""
    if isinstance(value, str) and value.startswith("json"):
        raise PydanticCustomError(
            "json", 'JSON output is not supported by this server; leave response_format out, or give {"type": "text"}'
        )
    return value


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
StopStrings = Annotated[list[str], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_check_stop)]
TemplateKwargs = Annotated[dict[str, JsonValue], Field(max_length=MAX_TEMPLATE_KWARGS), AfterValidator(_check_plain)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Generation(Body):
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


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[TextPart], Field(max_length=MAX_PARTS), BeforeValidator(_parts)]
    name: str | None = Field(None, max_length=256)

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it: the parts of a content are lines of one string."""
        content = "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name is not None else {})


class TextFormat(Body):
    type: Annotated[Literal["text"], BeforeValidator(_check_format_type)]


class ChatBody(_Generation):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=_MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: Annotated[TextFormat | None, BeforeValidator(_check_format)] = None
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


class TokenizeBody(Body):
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


class DetokenizeBody(Body):
    model: str | None = Field(None, max_length=MAX_MODEL_CHARS)
    tokens: list[TokenId] = Field(max_length=1 << 20)


class LoadBody(Body):
    lora_name: str = Field(min_length=1, max_length=MAX_MODEL_CHARS)
    lora_path: str | None = Field(None, min_length=1, max_length=MAX_MODEL_CHARS)  # a registry reference
    load_inplace: bool | None = None  # versions are told apart by content: there is nothing to overwrite
    pinned: bool | None = None


class UnloadBody(Body):
    lora_name: str = Field(min_length=1, max_length=MAX_MODEL_CHARS)
    lora_int_id: int | None = None  # vLLM's; adapters have digests here

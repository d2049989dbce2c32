"""A request's prompts as token ids, within the model's bounds. Encoding is work, so it runs beside the event loop."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from flora.errors import PromptTooLong, RequestInvalid
from flora.serve.frontend.template import TemplateRenderer
from flora.serve.frontend.tokenizer import Tokenizer
from flora.serve.frontend.work_threads import WorkThreads

_OUTSIDE_ROLES = frozenset(("user", "tool", "function"))  # whose text may come from people that the client never met


class Prompts:
    """Encodes prompts and chats for one base."""

    def __init__(self, tokenizer: Tokenizer, renderer: TemplateRenderer, *, max_context: int, vocab_size: int) -> None:
        self.max_context = max_context  # tokens of prompt and answer
        self.vocab_size = vocab_size  # of the model
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._threads = WorkThreads(2, "tokenizer")
        self._guard = lru_cache(maxsize=64)(tokenizer.guard)

    async def of_texts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of each prompt. Raises RequestInvalid, PromptTooLong."""
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(prompt, "prompt")
        encoded = await self._threads.run(
            lambda: [self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        )
        for token_ids in encoded:
            self._check(token_ids, "prompt")
        return encoded

    async def of_chat(
        self,
        messages: Sequence[dict[str, Any]],
        template: str | None,
        *,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the rendered messages. Raises RequestInvalid, PromptTooLong."""
        if template is None:
            raise RequestInvalid(
                "this model has no chat template", fix="send a prompt to /v1/completions", param="messages"
            )
        variables = await self._threads.run(lambda: self._guarded(messages, template, template_kwargs or {}))
        rendered = await self._renderer.render(template, variables | {"add_generation_prompt": add_generation_prompt})
        self._check_length(rendered, "messages")
        token_ids = await self._threads.run(lambda: self._tokenizer.encode_chat(rendered))
        self._check(token_ids, "messages")
        return token_ids

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of any text, however long."""
        return await self._threads.run(lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def decode(self, token_ids: list[int]) -> str:
        """Their text, control tokens included."""
        return await self._threads.run(lambda: self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def close(self) -> None:
        self._threads.close()

    def _guarded(
        self, messages: Sequence[dict[str, Any]], template: str, template_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The template's variables. No string of the client's can become a control token, nor, in text that others may
        have written, an added token that the template uses to mark roles.
        """
        control = self._tokenizer.control_tokens
        marks = frozenset(token for token in self._tokenizer.added_tokens if token in template)
        inside, outside = self._guard(control), self._guard(control | marks)
        return {
            **self._tokenizer.named_tokens,
            **inside.mark_all(template_kwargs),
            "messages": [
                (outside if message["role"] in _OUTSIDE_ROLES else inside).mark_all(message) for message in messages
            ],
            "tools": None,
            "documents": None,
        }

    def _check_length(self, text: str, param: str) -> None:
        """Spares the encoding of what must be too long."""
        at_least = len(text) // self._tokenizer.longest_token
        if at_least >= self.max_context:
            raise self._too_long(f"at least {at_least}", param)

    def _too_long(self, num_tokens: str, param: str) -> PromptTooLong:
        return PromptTooLong(
            f"the prompt has {num_tokens} tokens and the context is {self.max_context}",
            cause="prompt and answer share the context, and an answer has at least one token",
            fix="send a shorter prompt",
            param=param,
        )

    def _check(self, token_ids: list[int], param: str) -> None:
        if not token_ids:
            raise RequestInvalid("the prompt has no tokens", param=param)
        if len(token_ids) >= self.max_context:
            raise self._too_long(str(len(token_ids)), param)
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            raise RequestInvalid(f"the prompt has a token id outside [0, {self.vocab_size})", param=param)

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from flora.errors import CheckpointError, RequestInvalid
from flora.serve.frontend.template import MAX_TEMPLATE_BYTES, TemplateRenderer, base_template, decode_template

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hello <b>"}]


def render(template: str, seconds: float = 3.0, **variables: Any) -> str:
    async def once() -> str:
        renderer = TemplateRenderer(seconds=seconds)
        try:
            return await renderer.render(template, variables)
        finally:
            await renderer.close()

    return asyncio.run(once())


def test_a_template_gives_what_transformers_gives():
    templates = [
        CHATML,
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ bos_token }}",
        "{% generation %}\n  x{{ messages[0].content }}\n{% endgeneration %}\n{{ strftime_now('%Y') }}",
        "{% macro show(x) %}[{{ x }}]{% endmacro %}{{ show(missing) }}{{ messages | length }}",
    ]
    for template in templates:
        variables = {"add_generation_prompt": True, "bos_token": "<s>"}
        [judge], _ = render_jinja_template([MESSAGES], chat_template=template, **variables)
        assert render(template, messages=MESSAGES, **variables) == judge


def test_a_template_that_refuses_the_messages_is_the_clients_error():
    with pytest.raises(RequestInvalid, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for x in %}",
        "{{ undefined_function() }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_a_template_that_reaches_out_of_the_sandbox_or_is_broken_is_refused(template: str):
    with pytest.raises(RequestInvalid):
        render(template, messages=[1])


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{% for a in range(100000) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 2 ** 100000000000 }}",
    ],
)
def test_a_template_that_never_ends_or_grows_is_stopped(template: str):
    with pytest.raises(RequestInvalid):
        render(template, seconds=0.3)


def test_a_slow_template_leaves_others_their_turn_and_the_renderer_usable():
    endless = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"

    async def both() -> tuple[str, bool]:
        renderer = TemplateRenderer(max_workers=2, seconds=60)
        slow = [asyncio.create_task(renderer.render(endless, {})) for _ in range(4)]
        quick = await renderer.render("{{ x }}", {"x": 1})
        was_waiting = not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert await renderer.render("{{ x }}", {"x": 2}) == "2"
        await renderer.close()
        return quick, was_waiting

    assert asyncio.run(both()) == ("1", True)


def test_a_checkpoint_may_keep_its_template_in_either_file(tmp_path: Path):
    assert base_template(tmp_path) is None

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "in config"}))
    assert base_template(tmp_path) == "in config"

    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "the default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert base_template(tmp_path) == "the default"

    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert base_template(tmp_path) == "in a file"


def test_a_template_of_absurd_size_is_refused():
    with pytest.raises(CheckpointError, match="allowed"):
        decode_template(b"x" * (MAX_TEMPLATE_BYTES + 1), where="sql@v1")

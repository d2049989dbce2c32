"""Names to what answers them, with a real registry and no engine."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter
from flora.errors import AdapterInvalid, AdapterNotFound, BaseMismatch, NameInvalid, UsageError
from flora.identity import BaseRecord, TensorRecord
from flora.lowrank import LowRank
from flora.registry import Registry
from flora.serve.frontend.carried import base_end_tokens
from flora.serve.frontend.models import Models, check_base_name
from tests.serve.frontend.vocabularies import byte_level

TOKENIZER = byte_level()
RECORD = BaseRecord((TensorRecord("layer.weight", "BF16", (4, 4), "a" * 64),))
BASE_ID = str(RECORD.base_id)
OTHER_ID = "sha256:" + "0" * 64


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as registry:
        yield registry


def adapter(
    value: float = 1.0, *, base_id: str | None = BASE_ID, touched: dict[str, str] | None = None, **extras: bytes
) -> Adapter:
    factors = {"layer": LowRank(A=torch.full((1, 4), value), B=torch.ones(4, 1), scale=1.0)}
    base = BaseBinding(name="tiny", base_id=base_id, touched=touched or {})
    files = {"chat_template.jinja" if name == "template" else f"{name}.json": data for name, data in extras.items()}
    return make_adapter(factors, base, Recipe(operation="import"), extras=files)


def ask(registry: Registry, folder: Path, work: Callable[[Models], Awaitable[Any]]) -> Any:
    models = Models(registry, base_name="org/tiny", base_id=BASE_ID, base_folder=folder, tokenizer=TOKENIZER)
    try:
        return asyncio.run(work(models))
    finally:
        models.close()


def test_the_base_is_meant_by_its_name_or_by_nothing(registry: Registry, tmp_path: Path):
    for name in (None, "org/tiny"):
        served = ask(registry, tmp_path, lambda models, name=name: models.resolve(name))
        assert (served.version, served.target) == (None, None)


@pytest.mark.parametrize("name", ["sql", "team/sql", "sql:prod", "sql@v1"])
def test_a_base_may_not_hide_an_adapter(registry: Registry, name: str):
    registry.add(adapter(), name.partition(":")[0].partition("@")[0], alias="prod")

    with pytest.raises(UsageError, match="another name: --base-name") as caught:
        check_base_name(registry, name, preload=())
    assert f"served as {name}" in caught.value.what


def test_a_base_may_have_the_name_of_an_adapter_that_it_cannot_serve(registry: Registry):
    """`flora extract BASE TUNED`, and then `flora serve TUNED`: the checkpoint itself, beside what was made of it."""
    touched = {"layer.weight": "f" * 64}
    registry.add(adapter(base_id=OTHER_ID, touched=touched), "sql")

    check_base_name(registry, "sql", preload=(), record=lambda: RECORD)
    with pytest.raises(UsageError, match="--base-name"):  # --allow-base-mismatch would serve it
        check_base_name(registry, "sql", preload=())


@pytest.mark.parametrize(
    ("base_id", "touched"), [(BASE_ID, {}), (None, {}), (OTHER_ID, {"layer.weight": "a" * 64})], ids=str
)
def test_a_base_may_not_hide_an_adapter_that_it_can_serve(registry: Registry, base_id, touched):
    registry.add(adapter(base_id=base_id, touched=touched), "sql")

    with pytest.raises(UsageError, match="--base-name"):
        check_base_name(registry, "sql", preload=(), record=lambda: RECORD)


def test_the_base_is_no_adapter_to_preload(registry: Registry):
    registry.add(adapter(), "sql")

    check_base_name(registry, "org/tiny", preload=("sql",))
    with pytest.raises(UsageError, match="--preload"):
        check_base_name(registry, "org/tiny", preload=("sql", "org/tiny"))


def test_a_base_may_have_a_name_that_no_adapter_could(registry: Registry):
    check_base_name(registry, "my base", preload=())


def test_an_adapter_that_comes_under_the_bases_name_later_is_not_listed_as_another(registry: Registry, tmp_path: Path):
    for name in ("a", "org/tiny", "z"):
        registry.add(adapter(), name)

    pages = [ask(registry, tmp_path, lambda m, after=after: m.page(after=after, limit=1)) for after in (None, "a")]

    assert [([entry.name for entry in entries], has_more) for entries, has_more in pages] == [
        (["a"], True),
        (["z"], False),
    ]


def test_a_reference_may_follow_the_bases_name(registry: Registry, tmp_path: Path):
    version = registry.add(adapter(), "sql")

    for name in ("sql", "sql@v1", "org/tiny:sql", "org/tiny:sql:latest"):
        served = ask(registry, tmp_path, lambda models, name=name: models.resolve(name))
        assert served.version == version
        assert served.target.label == name
        assert served.target.serving_digest == version.serving_digest


@pytest.mark.parametrize("name", ["nobody", "../x", "", "a b", "org/tiny:", "org/tiny:../x", "sql@v2", "sql:v1"])
def test_what_is_unknown_or_no_name_at_all_is_not_found(registry: Registry, tmp_path: Path, name: str):
    registry.add(adapter(), "sql")

    with pytest.raises(AdapterNotFound) as caught:
        ask(registry, tmp_path, lambda models: models.resolve(name))
    assert ".." not in str(caught.value)


def test_an_adapter_brings_its_template_and_end_tokens_and_lacks_fall_to_the_base(registry: Registry, tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("of the base")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    registry.add(adapter(1.0), "plain")
    registry.add(adapter(2.0, template=b"its own", generation_config=b'{"eos_token_id": [5, 6]}'), "taught")
    registry.add(adapter(3.0, generation_config=b'{"temperature": 1}'), "half")
    registry.add(adapter(4.0, generation_config=b"{"), "damaged")

    def carried(name: str) -> tuple[str | None, tuple[int, ...]]:
        served = ask(registry, tmp_path, lambda models: models.resolve(name))
        return served.template, served.end_tokens

    assert carried("plain") == ("of the base", (2,))
    assert carried("taught") == ("its own", (5, 6))
    assert carried("half") == ("of the base", (2,))
    with pytest.raises(AdapterInvalid):
        carried("damaged")


def test_end_tokens_are_those_that_transformers_would_stop_at(tmp_path: Path):
    assert base_end_tokens(tmp_path, TOKENIZER) == (TOKENIZER.token_id("<|im_end|>"),)

    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert base_end_tokens(tmp_path, TOKENIZER) == (7,)

    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert base_end_tokens(tmp_path, TOKENIZER) == (8, 9)


def test_another_base_will_do_if_what_the_adapter_touches_is_the_same(registry: Registry, tmp_path: Path):
    registry.register_base(RECORD, name="tiny", path=tmp_path)
    registry.add(adapter(1.0, base_id=OTHER_ID, touched={"layer.weight": "a" * 64}), "cousin")
    registry.add(adapter(2.0, base_id=OTHER_ID, touched={"layer.weight": "b" * 64}), "stranger")
    registry.add(adapter(3.0, base_id=OTHER_ID), "vague")

    assert ask(registry, tmp_path, lambda models: models.resolve("cousin")).version.name == "cousin"
    for name in ("stranger", "vague"):
        with pytest.raises(BaseMismatch):
            ask(registry, tmp_path, lambda models, name=name: models.resolve(name))


def test_pages_of_the_list_hold_this_bases_adapters_in_order(registry: Registry, tmp_path: Path):
    names = [f"a{index:02}" for index in range(23)]
    registry.add_many(
        (adapter(float(index), base_id=OTHER_ID if index % 3 == 1 else BASE_ID), name)
        for index, name in enumerate(names, start=0)
    )
    ours = [name for index, name in enumerate(names) if index % 3 != 1]

    async def walk(models: Models) -> list[str]:
        found: list[str] = []
        has_more = True
        while has_more:
            entries, has_more = await models.page(after=found[-1] if found else None, limit=4)
            found += [entry.name for entry in entries]
            assert len(entries) <= 4
        return found

    assert ask(registry, tmp_path, walk) == ours
    for after in ("A", "a00", "a1", "a10", "a21", "a22", "zzz"):
        entries, _ = ask(registry, tmp_path, lambda models, after=after: models.page(after=after, limit=100))
        assert [entry.name for entry in entries] == [name for name in ours if name > after]


def test_a_nickname_stands_for_a_version_until_it_is_forgotten(registry: Registry, tmp_path: Path):
    first, second = registry.add(adapter(1.0), "sql"), registry.add(adapter(2.0), "sql")

    async def walk(models: Models) -> None:
        await models.nickname("nick", "sql@v1")
        assert (await models.resolve("nick")).version == first
        assert (await models.nickname("sql", "sql@v2")).version == second  # it means that already
        for name, reference in (("sql", "sql@v1"), ("org/tiny", "sql"), ("x", "/etc/passwd"), ("a b", "sql")):
            with pytest.raises(NameInvalid):
                await models.nickname(name, reference)
        models.forget_nickname("nick")
        with pytest.raises(AdapterNotFound):
            await models.resolve("nick")

    ask(registry, tmp_path, walk)


def test_a_front_end_loads_neither_torch_nor_transformers():
    program = "import sys, flora.serve.launch; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert loaded.strip() == "set()"

"""docs/extraction.md says what becomes of each kind of tensor: every line of its tables is tried on its model."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from flora.adapter import AdapterHeader, BaseBinding, ExactTensor, Module, Recipe
from flora.checkpoint import Checkpoint
from flora.extract import Wish
from flora.extract.experts import readable
from flora.extract.pairs import pair_tensors
from flora.registry.formats.compat import judge
from tests.extract import moe, test_diffusion, test_layers
from tests.extract.models import build, save
from tests.extract.zoo import ZOO

PAGE = Path(__file__).parents[2] / "docs" / "extraction.md"
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: kind.make for name, kind in ZOO.items()},
    **{name: lambda name=name: build(name) for name in ("llama", "qwen2")},
    "qwen3-moe": moe.qwen3,
    "granite-moe": moe.granite,
    "gpt-oss": moe.gpt_oss,
    "dbrx": moe.dbrx,
    "unet": test_diffusion.unet,
    "regnet": test_layers.regnet,
    "convnext": test_layers.convnext,
    "dpt": test_layers.dpt,
    "resnet": test_layers.resnet,
    "nomic-bert": test_layers.nomic,
}
WISHES = {
    "": Wish(),
    "`--embeddings`": Wish(embeddings=True),
    "`--routers`": Wish(routers=True),
    "`--vectors`": Wish(vectors=True),
}
ENGINES = ("PEFT 0.21", "vLLM 0.33", "SGLang 0.5", "diffusers 0.42")


def rows(num_cells: int) -> list[list[str]]:
    lines = [line.strip("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [re.split(r"\s*\|\s*", line) for line in lines]
    return [row for row in cells if len(row) == num_cells and any("`" in cell and "." in cell for cell in row)]


TAKEN = [row for row in rows(9) if row[0] != "tensor"]
LEFT = [row for row in rows(3) if row[0].count(".") > 1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], tuple[Checkpoint, Checkpoint]]:
    """Each model as its library saves it, twice: what becomes of a tensor is told by headers alone."""

    @cache
    def made(name: str) -> tuple[Checkpoint, Checkpoint]:
        torch.manual_seed(0)
        model, folder = MODELS[name](), tmp_path_factory.mktemp(name)
        return readable(save(model, folder / "base")), readable(save(model, folder / "tuned"))

    return made


def plain(cell: str) -> str:
    return cell.strip("`")


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: row[0])
def test_a_tensor_becomes_what_the_page_says_and_is_read_by_whom_it_says(folders, row):
    _, model, tensor, kind, wish, *answers = row

    pairs = {pair.name: pair for pair in pair_tensors(*folders(plain(model)), wish=WISHES[wish])[0]}
    without = {pair.name: pair for pair in pair_tensors(*folders(plain(model)))[0]}

    pair = pairs[plain(tensor)]
    assert (pair.status, pair.kind) == (("exact", "linear") if kind == "whole" else ("extractable", plain(kind)))
    assert (without[plain(tensor)].status == "not_extractable") == bool(wish)
    found = {f"{verdict.engine} {verdict.version}": verdict.answer for verdict in judge(header(pair.module, kind))}
    assert answers == [found[engine] for engine in ENGINES]


@pytest.mark.parametrize("row", LEFT, ids=lambda row: row[2])
def test_what_gets_no_factors_is_reported_in_the_words_of_the_page(folders, row):
    tensor, model, reason = row

    pairs = pair_tensors(*folders(plain(model)), wish=Wish(embeddings=True, vectors=True))[0]

    pair = next(pair for pair in pairs if pair.name == plain(tensor))
    assert (pair.status, pair.reason) == ("not_extractable", reason)


def test_the_page_has_a_line_for_every_kind_of_factors():
    from typing import get_args

    from flora.forms import Kind

    assert {plain(row[3]) for row in TAKEN} == {*get_args(Kind), "whole"}
    assert len(LEFT) == 9


def header(module: str, kind: str) -> AdapterHeader:
    """An adapter of one such tensor, beside linear layers: those among them that an engine joins with it."""
    exact = (ExactTensor(name=f"{module}.weight", shape=(8,), dtype="bfloat16", sha256=""),) if kind == "whole" else ()
    parent = module.rpartition(".")[0]
    beside = ("model.layers.0.o_proj", *(f"{parent}.{leaf}" for leaf in ("q_proj", "v_proj", "gate_proj")))
    kinds = dict.fromkeys(beside, "linear") | ({} if exact else {module: plain(kind)})
    facts = {"in_features": 8, "out_features": 8, "rank": 4, "alpha": 4.0, "dtype": "bfloat16"}
    modules = [Module(name=n, a_sha256="", b_sha256="", kind=k, **facts) for n, k in kinds.items()]
    base = BaseBinding(name="base", base_id=None)
    return AdapterHeader(base=base, modules=tuple(modules), recipe=Recipe(operation="extract"), exact=exact)

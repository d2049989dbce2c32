"""rank_pattern and alpha_pattern, with PEFT's own rule as judge."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from flora.errors import AdapterInvalid
from flora.registry.formats.patterns import anchored, compile_patterns

part = st.sampled_from(["model", "layers", "0", "1", "10", "q_proj", "up_proj", "mlp", "self_attn", "a-b"])
module = st.lists(part, min_size=1, max_size=5).map(".".join)
key = st.one_of(
    module,
    module.map(re.escape),
    module.map(anchored),
    module.map("{}$".format),
    st.tuples(module, module).map(lambda pair: f"{re.escape(pair[0])}|{re.escape(pair[1])}"),
    module.map(lambda text: re.escape(text).replace("0", r"\d+", 1)),
    module.map(lambda text: f".*{re.escape(text)}"),
    module.map(lambda text: re.escape(text).replace("q_proj", "(q|up)_proj")),
)


@given(st.lists(key, max_size=6, unique=True), module)
@example(["q.proj"], "q_proj")
@example(["layers.1"], "layers_1")
@example([r"^model\.layers\.0"], "x.model.layers.0")
def test_the_first_key_that_peft_finds_is_the_one_that_holds(keys, name):
    table = {key: number for number, key in enumerate(keys)}

    assert compile_patterns(table, "rank_pattern").get(name) == table.get(get_pattern_key(list(table), name))


@given(module, module)
def test_an_anchored_key_fits_its_module_and_no_other(name, other):
    assert compile_patterns({anchored(name): 7}, "rank_pattern").get(other) == (7 if other == name else None)


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+$",
        "(a*)*",
        "(a|aa)+",
        "(?:x+x+)+y",
        "a{1,9}{1,9}",
        "(?=a)a",
        "(?i)a",
        r"(a)\1",
        ".*.*.*a",
        "x" * 600 + "+",
        r"(\\+\\+\\+)",
        "(",
        "[a",
        "*",
    ],
)
def test_a_key_that_could_take_long_or_is_no_expression_is_refused(key):
    with pytest.raises(AdapterInvalid, match="alpha_pattern"):
        compile_patterns({key: 1.0}, "alpha_pattern")


def test_too_many_keys_are_refused():
    with pytest.raises(AdapterInvalid):
        compile_patterns({f"layer_{i}": 1 for i in range(5000)}, "rank_pattern")
    with pytest.raises(AdapterInvalid):
        compile_patterns({f"layer_{i}.*": 1 for i in range(100)}, "rank_pattern")


def test_a_table_with_an_exact_key_for_every_module_of_a_large_model_is_looked_up():
    modules = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(40) for j in range(100)]
    patterns = compile_patterns({anchored(name): i for i, name in enumerate(modules)}, "rank_pattern")

    assert [patterns.get(name) for name in modules] == list(range(4000))
    assert patterns.ordered == ()  # nothing is tried one by one

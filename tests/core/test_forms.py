"""Where a module's weight is among a checkpoint's tensors."""

import pytest

from flora.forms import weight_name

EXPERT = "model.layers.0.mlp.experts.3.down_proj"
STACK = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("module", "kind", "names", "found"),
    [
        ("lm_head", "linear", {"lm_head.weight", "lm_head"}, "lm_head.weight"),
        ("pos_embed", "parameter", {"pos_embed", "pos_embed.bias"}, "pos_embed"),
        (EXPERT, "linear", {f"{EXPERT}.weight"}, f"{EXPERT}.weight"),
        (EXPERT, "expert", {f"{EXPERT}.weight", STACK}, f"{EXPERT}.weight"),
        (EXPERT, "expert", {STACK}, STACK),
        (EXPERT, "expert_transposed", {f"{STACK}_blocks", f"{STACK}_scales"}, f"{STACK}_blocks"),
        (EXPERT, "expert", {"model.layers.0.mlp.output_linear.weight"}, "model.layers.0.mlp.output_linear.weight"),
        (EXPERT, "linear", {STACK}, None),
        (EXPERT, "expert", {"model.layers.1.mlp.experts.down_proj"}, None),
        ("lm_head", "linear", set(), None),
    ],
)
def test_a_module_changes_its_own_tensor_or_that_of_all_experts(module, kind, names, found):
    assert weight_name(module, kind, names) == found

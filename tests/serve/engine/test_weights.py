"""A checkpoint that the model would misread is refused by its headers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flora.checkpoint import open_checkpoint
from flora.errors import CheckpointError, ShapeMismatch
from flora.serve.engine.model.config import parse_model_config
from flora.serve.engine.model.weights import check_tensors, load_weights


@pytest.fixture
def altered(bases, tmp_path):
    """A function that opens the small Llama after its tensors were changed."""

    def alter(change, **config):
        folder = tmp_path / "altered"
        shutil.copytree(bases("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | config))
        return open_checkpoint(folder)

    return alter


def check(checkpoint) -> None:
    check_tensors(checkpoint, parse_model_config(checkpoint.config))


def test_a_missing_tensor_is_named(altered):
    checkpoint = altered(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))

    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        check(checkpoint)


def test_a_tensor_without_a_place_is_named(altered):
    checkpoint = altered(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))

    with pytest.raises(CheckpointError, match=r"q_proj\.bias, which LlamaForCausalLM has no place for"):
        check(checkpoint)


def test_a_tensor_of_another_shape_is_named_with_both(altered):
    checkpoint = altered(lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))

    with pytest.raises(ShapeMismatch, match=r"model\.norm\.weight is \[65\] in .*, \[64\] by config\.json"):
        check(checkpoint)


def test_what_is_computed_anew_may_lie_in_the_file(altered):
    check(altered(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})))


def test_a_tied_head_is_the_embedding_whatever_else_the_file_holds(altered):
    checkpoint = altered(lambda tensors: None, tie_word_embeddings=True)
    config = parse_model_config(checkpoint.config)

    weights = load_weights(checkpoint, config, torch.float32, torch.device("cpu"))

    embedding = checkpoint.load("model.embed_tokens.weight")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(weights.head(x), x @ embedding.T, atol=1e-5)


def test_half_precision_weights_are_served_as_asked(altered):
    def halve(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    checkpoint = altered(halve)

    weights = load_weights(checkpoint, parse_model_config(checkpoint.config), torch.float32, torch.device("cpu"))

    assert weights.embedding.dtype == torch.float32
    assert torch.equal(weights.embedding, checkpoint.load("model.embed_tokens.weight").float())

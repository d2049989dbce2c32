"""Layers that no pair of factors fits: named with their reason, and the rest is what PEFT computes."""

from collections.abc import Mapping

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from flora.extract import Wish
from tests.extract.peft_judge import distance, extracted
from tests.extract.zoo import ENCODER, Kind, hidden

ROUNDING = 3e-4  # in units of the change
IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
SOUND = torch.linspace(-1, 1, 400).reshape(1, 400)


def regnet() -> nn.Module:
    """Its middle convolutions have groups of four channels."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4, "num_labels": 5}
    return hf.RegNetForImageClassification(hf.RegNetConfig(**sizes, layer_type="x"))


def convnext() -> nn.Module:
    """Its convolutions work on each channel by itself."""
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))


def dpt() -> nn.Module:
    """It makes images larger again by transposed convolutions, which nothing in their names tells."""
    sizes = {"image_size": 32, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3], "readout_type": "ignore"}
    heads = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "is_hybrid": False}
    return hf.DPTForDepthEstimation(hf.DPTConfig(**ENCODER | {"num_hidden_layers": 4}, **sizes, **heads))


def wav2vec2() -> nn.Module:
    """It listens through plain convolutions; that of positions is grouped, and its weight is stored as a product."""
    convs = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = hf.Wav2Vec2Config(
        vocab_size=12, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, **convs, **ENCODER
    )
    return hf.Wav2Vec2ForCTC(config)


def siglip() -> nn.Module:
    """It ends in torch's own attention, which takes its weights by hand."""
    config = hf.SiglipVisionConfig(image_size=32, patch_size=8, **ENCODER)
    return hf.SiglipVisionModel(config)


def resnet() -> nn.Module:
    """Its norms keep statistics of what they saw."""
    return hf.ResNetModel(hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"))


def nomic() -> nn.Module:
    """Its checkpoints hold q, k and v as one matrix, which transformers splits."""
    return hf.NomicBertModel(hf.NomicBertConfig(vocab_size=60, max_position_embeddings=32, **ENCODER))


def seen(model: nn.Module) -> Tensor:
    return model(pixel_values=IMAGE).logits


REFUSED: Mapping[str, tuple[Kind, str, str]] = {  # the model, a tensor of it, and why that gets no factors
    "grouped": (
        Kind(regnet, hf.RegNetForImageClassification, seen),
        "regnet.encoder.stages.1.layers.0.layer.1.convolution.weight",
        "a convolution of 4 groups: PEFT's factors would mix the inputs of all",
    ),
    "depthwise": (
        Kind(convnext, hf.ConvNextForImageClassification, seen),
        "convnext.encoder.stages.0.layers.0.dwconv.weight",
        "a convolution of one channel each: too small for two factors",
    ),
    "transposed": (
        Kind(dpt, hf.DPTForDepthEstimation, lambda model: model(pixel_values=IMAGE).predicted_depth),
        "neck.reassemble_stage.layers.0.resize.weight",
        "a transposed convolution: PEFT has no LoRA layer for it",
    ),
    "torch's attention": (
        Kind(siglip, hf.SiglipVisionModel, lambda model: model(pixel_values=IMAGE).pooler_output),
        "head.attention.out_proj.weight",
        "a part of torch's MultiheadAttention, whose code reads the weight past its layer",
    ),
    "weight norm": (
        Kind(wav2vec2, hf.Wav2Vec2ForCTC, lambda model: model(input_values=SOUND).logits),
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        "a parameter outside any layer that has a LoRA form",
    ),
    "statistics": (
        Kind(resnet, hf.ResNetModel, lambda model: model(pixel_values=IMAGE).last_hidden_state),
        "embedder.embedder.normalization.weight",
        "a norm with statistics of its own, without which PEFT carries none of it",
    ),
    "split": (
        Kind(nomic, hf.NomicBertModel, hidden),
        "encoder.layers.0.attn.Wqkv.weight",
        "transformers splits it, or joins it with others, while it loads: no layer is left of it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_no_factors_is_named_and_peft_computes_the_rest(tmp_path, name):
    kind, tensor, reason = REFUSED[name]
    base, _, adapter = extracted(kind.build(), tmp_path, rank=4, wish=Wish(embeddings=True, vectors=True))

    change = adapter.report.by_name()[tensor]
    assert (change.status, change.reason) == ("not_extractable", reason)
    assert adapter.report.share(change) > 0
    opened = kind.opens.from_pretrained(base.path, dtype=torch.float32)
    assert distance(opened, adapter, tmp_path, kind.forward) < ROUNDING

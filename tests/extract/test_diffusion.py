"""Image and video models, component by component: diffusers reads our factors and computes what the deltas do."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from flora.adapter import Adapter
from flora.checkpoint import open_checkpoint
from flora.errors import CheckpointError
from flora.extract import ExtractConfig, Wish, extract
from flora.rank import RankRule
from flora.registry.formats.image import save_diffusers, save_kohya
from tests.extract.models import save, tune
from tests.extract.peft_judge import distance, extracted, with_deltas

ROUNDING = 3e-4  # float32, in units of the change


@dataclass(frozen=True)
class Component:
    make: Callable[..., nn.Module]
    forward: Callable[[nn.Module], Tensor]
    prefix: str | None = None  # what a pipeline calls it, where diffusers loads LoRA into it
    pipeline: type[DiffusionPipeline] | None = None


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def flux(num_single_layers: int = 1) -> nn.Module:
    sizes = {
        "num_layers": 1,
        "num_single_layers": num_single_layers,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    widths = {"in_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return FluxTransformer2DModel(patch_size=1, axes_dims_rope=(4, 4, 8), **sizes, **widths)


def sd3() -> nn.Module:
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    widths = {"in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 16, "out_channels": 4}
    return SD3Transformer2DModel(sample_size=8, patch_size=2, pos_embed_max_size=8, **sizes, **widths)


def wan() -> nn.Module:
    """A video model: its patches are convolutions over time, height and width."""
    sizes = {"num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "ffn_dim": 32, "rope_max_seq_len": 32}
    return WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, freq_dim=32, **sizes)


def cogvideox() -> nn.Module:
    """A video model whose text and frames are one sequence, and whose patches are convolutions of single frames."""
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "time_embed_dim": 8}
    widths = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 16, "max_text_seq_length": 5}
    return CogVideoXTransformer3DModel(**sizes, **widths, sample_width=8, sample_height=8, sample_frames=5)


def autoencoder() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return AutoencoderKL(**blocks, block_out_channels=(16,), norm_num_groups=8, latent_channels=4)


def denoised(model: nn.Module) -> Tensor:
    return model(noise(1, 4, 8, 8), torch.tensor([3]), encoder_hidden_states=noise(1, 5, 16)).sample


def painted(model: nn.Module) -> Tensor:
    ids = {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}
    text = {"encoder_hidden_states": noise(1, 5, 32), "pooled_projections": noise(1, 32)}
    return model(hidden_states=noise(1, 6, 4), timestep=torch.tensor([0.5]), **text, **ids).sample


def diffused(model: nn.Module) -> Tensor:
    text = {"encoder_hidden_states": noise(1, 5, 16), "pooled_projections": noise(1, 16)}
    return model(hidden_states=noise(1, 4, 8, 8), timestep=torch.tensor([3]), **text).sample


def filmed(model: nn.Module) -> Tensor:
    video, text = noise(1, 4, 2, 8, 8), noise(1, 5, 16)
    return model(hidden_states=video, timestep=torch.tensor([3]), encoder_hidden_states=text).sample


def filmed_by_frames(model: nn.Module) -> Tensor:
    video, text = noise(1, 2, 4, 8, 8), noise(1, 5, 16)
    return model(hidden_states=video, timestep=torch.tensor([3]), encoder_hidden_states=text).sample


COMPONENTS = {
    "unet": Component(unet, denoised, "unet", StableDiffusionPipeline),
    "flux": Component(flux, painted, "transformer", FluxPipeline),
    "sd3": Component(sd3, diffused, "transformer", StableDiffusion3Pipeline),
    "wan": Component(wan, filmed, "transformer", WanPipeline),
    "cogvideox": Component(cogvideox, filmed_by_frames, "transformer", CogVideoXPipeline),
    "vae": Component(autoencoder, lambda model: model(noise(1, 3, 16, 16)).sample),
}


@pytest.fixture(scope="module", params=COMPONENTS)
def done(request, tmp_path_factory) -> tuple[Component, nn.Module, Adapter, Path]:
    component, folder = COMPONENTS[request.param], tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    base, _, adapter = extracted(component.make().eval(), folder, rank=6, wish=Wish())
    return component, component.make().from_pretrained(base.path).eval(), adapter, folder


def test_every_matrix_and_convolution_is_extracted(done):
    _, model, adapter, _ = done

    weights = {name for name, weight in model.named_parameters() if name.endswith(".weight") and weight.dim() > 1}
    assert {f"{name}.weight" for name in adapter.factors} == weights


def test_peft_computes_what_the_truncated_deltas_do(done):
    component, model, adapter, folder = done

    assert distance(model, adapter, folder, component.forward) < ROUNDING


def test_diffusers_loads_the_factors_as_a_pipelines_lora(done):
    component, _, adapter, folder = done
    if component.prefix is None:
        pytest.skip("diffusers loads no LoRA into an autoencoder")
    model = component.make().from_pretrained(folder / "base").eval()
    with torch.no_grad():
        before, wanted = component.forward(model), component.forward(with_deltas(model, adapter))
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")

    named = {name.replace("base_model.model", component.prefix): tensor for name, tensor in tensors.items()}
    model.load_lora_adapter(named, prefix=component.prefix)

    with torch.no_grad():
        got = component.forward(model)
    assert float((got - wanted).norm() / (wanted - before).norm()) < ROUNDING


def pipeline_of(component: Component, model: nn.Module, **others: nn.Module) -> DiffusionPipeline:
    """The component's pipeline, with no other model than those given."""
    parameters = inspect.signature(component.pipeline.__init__).parameters
    parts = {name: None for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    given = {name: part for name, part in parts.items() if name not in ("self", "args", "kwargs")}
    return component.pipeline(**given | others | {component.prefix: model})


@pytest.mark.parametrize("file", ["diffusers", "kohya"])
def test_a_pipeline_loads_the_exported_file(done, file, tmp_path):
    component, _, adapter, folder = done
    if component.pipeline is None or (file == "kohya" and component.prefix != "unet"):
        pytest.skip("diffusers has no such loader for this component")
    model = component.make().from_pretrained(folder / "base").eval()
    with torch.no_grad():
        before, wanted = component.forward(model), component.forward(with_deltas(model, adapter))

    save = save_kohya if file == "kohya" else save_diffusers
    save(adapter, tmp_path / "pytorch_lora_weights.safetensors", component.prefix)
    pipeline_of(component, model).load_lora_weights(tmp_path)

    with torch.no_grad():
        got = component.forward(model)
    assert float((got - wanted).norm() / (wanted - before).norm()) < ROUNDING


@pytest.mark.parametrize(
    ("name", "options", "blocks"), [("flux", {"num_single_layers": 0}, "transformer_blocks.*"), ("wan", {}, "blocks.*")]
)
def test_a_pipeline_loads_kohyas_file_in_the_authors_names(tmp_path, name, options, blocks):
    """Of blocks alone, which is all that diffusers takes of such files; of Flux's double ones, since its conversion
    takes the width of the single ones for granted."""
    component = COMPONENTS[name]
    torch.manual_seed(0)
    model = component.make(**options).eval()
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    config = ExtractConfig(RankRule(max_rank=6), factor_dtype="float32", include=(blocks,))
    adapter = extract(base, tuned, config).adapter
    with torch.no_grad():
        before, wanted = component.forward(model), component.forward(with_deltas(model, adapter))

    save_kohya(adapter, tmp_path / "lora.safetensors", "transformer")
    pipeline_of(component, model).load_lora_weights(tmp_path, weight_name="lora.safetensors")

    with torch.no_grad():
        got = component.forward(model)
    assert float((got - wanted).norm() / (wanted - before).norm()) < ROUNDING


def understood(model: nn.Module) -> Tensor:
    return model(torch.arange(3, 15)[None]).last_hidden_state


TEXT_ENCODERS = {
    "sd": Component(CLIPTextModel, understood, "text_encoder", StableDiffusionPipeline),
    "sdxl": Component(CLIPTextModelWithProjection, understood, "text_encoder_2", StableDiffusionXLPipeline),
}


@pytest.mark.parametrize("save_file", [save_diffusers, save_kohya])
@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_a_pipeline_loads_the_exported_file_of_its_text_encoder(tmp_path, name, save_file):
    component = TEXT_ENCODERS[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=80, max_position_embeddings=16, eos_token_id=2, projection_dim=16, **sizes)
    model = component.make(config).eval()
    _, _, adapter = extracted(model, tmp_path, rank=6, wish=Wish())
    with torch.no_grad():
        before, wanted = understood(model), understood(with_deltas(model, adapter))

    save_file(adapter, tmp_path / "lora.safetensors", component.prefix)
    pipeline_of(component, model, unet=unet()).load_lora_weights(tmp_path, weight_name="lora.safetensors")

    with torch.no_grad():
        got = understood(model)
    assert float((got - wanted).norm() / (wanted - before).norm()) < ROUNDING
    if save_file is save_kohya:  # by which ComfyUI knows it, whatever transformers saved
        assert all(re.match("lora_te2?_text_model_", name) for name in load_file(tmp_path / "lora.safetensors"))


def test_a_pipelines_folder_is_told_to_give_its_components(tmp_path):
    unet().save_pretrained(tmp_path / "pipe" / "unet")
    autoencoder().save_pretrained(tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")

    with pytest.raises(CheckpointError, match="a diffusers pipeline of 2 models") as caught:
        open_checkpoint(tmp_path / "pipe")

    assert caught.value.fix.endswith("pipe/unet, pipe/vae")

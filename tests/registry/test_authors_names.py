"""Flux and Wan by the names of their authors, as kohya's scripts have them: diffusers' conversions read them back."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter
from flora.errors import Unsupported
from flora.lowrank import LowRank
from flora.registry.formats import wan
from flora.registry.formats.image import save_kohya

WIDTH, MLP = 3072, 12288  # of Flux itself: diffusers' conversion knows no other


def flux_modules() -> dict[str, tuple[int, int]]:
    """[out, in] of every linear layer of a Flux with one block of each kind and its own width, by diffusers' names."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in layers.items()}


def flux_adapter(without: str = "nothing") -> Adapter:
    """Random factors of ranks 1 to 3 for every layer whose name does not match `without`."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for i, (name, (out_features, in_features)) in enumerate(flux_modules().items()):
        if re.search(without, name):
            continue
        A = torch.randn(1 + i % 3, in_features, generator=generator)
        factors[name] = LowRank(A=A, B=torch.randn(out_features, 1 + i % 3, generator=generator), scale=0.5)
    base = BaseBinding(name="org/flux", base_id=None, architecture="FluxTransformer2DModel")
    return make_adapter(factors, base, Recipe(operation="extract"))


def read_back(adapter: Adapter, folder: Path) -> dict[str, Tensor]:
    save_kohya(adapter, folder / "lora.safetensors", "transformer")
    state = FluxPipeline.lora_state_dict(folder, weight_name="lora.safetensors")
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def distance(factors: LowRank, read: dict[str, Tensor], name: str) -> float:
    """Between both products with a random matrix, in units of ours."""
    A, B = (read.pop(f"{name}.lora_{half}.weight").double() for half in "AB")
    x = torch.randn(factors.in_features, 3, generator=torch.Generator().manual_seed(1)).double()
    wanted = factors.scale * factors.B.double() @ (factors.A.double() @ x)
    return float((B @ (A @ x) - wanted).norm() / wanted.norm())


def test_every_layer_comes_back_with_the_delta_that_it_had(tmp_path):
    adapter = flux_adapter()

    read = read_back(adapter, tmp_path)

    assert len(adapter.factors) == len(flux_modules())
    for name, factors in adapter.factors.items():
        assert distance(factors, read, name) < 1e-6, name
    assert not read


def test_layers_have_the_names_that_comfyui_makes_of_the_checkpoints_own(tmp_path):
    save_kohya(flux_adapter(), tmp_path / "lora.safetensors", "transformer")

    ups = {name: tuple(t.shape) for name, t in load_file(tmp_path / "lora.safetensors").items() if "lora_up" in name}
    assert ups["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][0] == 3 * WIDTH
    assert ups["lora_unet_double_blocks_0_txt_mlp_2.lora_up.weight"][0] == WIDTH
    assert ups["lora_unet_single_blocks_0_linear1.lora_up.weight"][0] == 3 * WIDTH + MLP
    assert ups["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"][0] == 2 * WIDTH
    assert len(ups) == len(flux_modules()) - 2 - 2 - 3  # q, k and v of image and of text are one; so is linear1


def test_a_part_without_factors_is_zeros_between_its_neighbors(tmp_path):
    """A k that was not adapted in this block, and in another one was: so its width is known."""
    adapter = flux_adapter(without=r"^transformer_blocks\.0\.attn\.to_k")
    factors = dict(adapter.factors)
    factors["transformer_blocks.1.attn.to_k"] = LowRank(A=torch.ones(1, WIDTH), B=torch.ones(WIDTH, 1), scale=1.0)
    adapter = make_adapter(factors, adapter.header.base, adapter.header.recipe)

    read = read_back(adapter, tmp_path)

    assert not read.pop("transformer_blocks.0.attn.to_k.lora_B.weight").any()
    assert all(distance(own, read, name) < 1e-6 for name, own in adapter.factors.items())


def test_a_part_whose_width_nobody_knows_is_refused_by_name(tmp_path):
    with pytest.raises(Unsupported, match=r"proj_mlp has no factors, and its width is not on record"):
        save_kohya(flux_adapter(without="proj_mlp"), tmp_path / "lora.safetensors", "transformer")


def test_a_layer_that_flux_does_not_have_is_refused_by_name(tmp_path):
    adapter = flux_adapter()
    one = {"transformer_blocks.0.attn.to_z": adapter.factors["transformer_blocks.0.attn.to_q"]}
    adapter = make_adapter(one, adapter.header.base, adapter.header.recipe)

    with pytest.raises(Unsupported, match=r"transformer_blocks\.0\.attn\.to_z has no name among Flux's own"):
        save_kohya(adapter, tmp_path / "lora.safetensors", "transformer")


def test_wans_modules_are_those_that_diffusers_knows_by_their_authors_names():
    """In the spelling in which it converts all of them; kohya's it reads for blocks alone."""
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_layers=2, ffn_dim=64, num_attention_heads=2, image_dim=16, added_kv_proj_dim=16
        )
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    factors = {name: LowRank(A=torch.full((1, 2), i), B=torch.full((2, 1), i)) for i, name in enumerate(layers)}

    named = wan.by_authors_names(factors)

    theirs = {
        f"diffusion_model.{name}.lora_{half}.weight": getattr(own, half) for name, own in named.items() for half in "AB"
    }
    read = WanPipeline.lora_state_dict(theirs)
    ours = {f"transformer.{name}.lora_{half}.weight": getattr(factors[name], half) for name in layers for half in "AB"}
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[name], ours[name]) for name in ours)


def test_a_layer_that_wan_does_not_have_is_refused_by_name():
    with pytest.raises(Unsupported, match=r"blocks\.0\.attn1\.to_z has no name among Wan's own"):
        wan.by_authors_names({"blocks.0.attn1.to_z": LowRank(A=torch.ones(1, 2), B=torch.ones(2, 1))})

"""Checkpoints in other forms than plain safetensors: fp8 with scales, and pickles where they are allowed."""

import json
import os
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from flora.checkpoint import Checkpoint, open_checkpoint
from flora.diagnosis import noise_share
from flora.errors import CheckpointError, PickleRefused
from flora.extract import ExtractConfig, extract, plan_extraction
from flora.extract.dequantize import dequantized, fp8_ulps
from flora.extract.gguf import NAMES, open_gguf
from flora.identity import base_record
from flora.rank import RankRule
from flora.unpickle import convert_pickles
from tests.extract.models import build, rewrite, save, tune

RANK_8 = ExtractConfig(RankRule(max_rank=8), factor_dtype="float32")
NAME = "model.layers.0.mlp.up_proj.weight"


def quantize(checkpoint: Checkpoint, block: tuple[int, int] = (32, 16)) -> Checkpoint:
    """The projections as fp8 with a scale for each block, as DeepSeek and Qwen publish theirs."""

    def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name].float()
            rows, columns = weight.shape[0] // block[0], weight.shape[1] // block[1]
            blocks = weight.view(rows, block[0], columns, block[1])
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale

    checkpoint = rewrite(checkpoint, to_fp8)
    config = json.loads((checkpoint.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (checkpoint.path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(checkpoint.path)


def test_fp8_weights_read_as_transformers_dequantizes_them(tmp_path):
    checkpoint = quantize(save(build(), tmp_path / "base"))

    options = FineGrainedFP8Config(weight_block_size=(32, 16), dequantize=True)
    judge = AutoModelForCausalLM.from_pretrained(checkpoint.path, quantization_config=options, dtype=torch.float32)

    ours = dequantized(checkpoint)
    assert not [name for name in ours.tensors if "scale" in name]
    for name, weight in judge.named_parameters():
        assert torch.allclose(ours.load(name).float(), weight.float(), rtol=2**-8), name  # the judge rounds to bf16


def test_an_fp8_base_gives_the_adapter_of_the_numbers_it_stands_for(tmp_path):
    model = build()
    base = quantize(save(model, tmp_path / "base"))
    tuned = save(tune(model), tmp_path / "tuned")
    read = dequantized(base)
    plain_folder = tmp_path / "plain"
    shutil.copytree(tuned.path, plain_folder)
    save_file({name: read.load(name).clone() for name in read.tensors}, plain_folder / "model.safetensors")

    from_fp8 = extract(base, tuned, RANK_8).adapter
    from_plain = extract(open_checkpoint(plain_folder), tuned, RANK_8).adapter

    assert from_fp8.factors.keys() == from_plain.factors.keys()
    for name, factors in from_fp8.factors.items():
        assert torch.equal(factors.A, from_plain.factors[name].A)
    assert from_fp8.header.base.base_id == str(base_record(base).base_id)  # of the files as they are
    assert NAME in from_fp8.header.base.touched


def test_the_ulp_of_an_fp8_number_reaches_to_the_next(tmp_path):
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)  # from 0 to 448, the largest
    (tmp_path / "fp8").mkdir()
    tensors = {"x.weight": numbers[None], "x.weight_scale": torch.tensor([[0.5]])}
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")

    checkpoint = dequantized(open_checkpoint(tmp_path / "fp8"))

    values, ulps = checkpoint.load("x.weight")[0], fp8_ulps(checkpoint).load("x.weight")[0]
    assert torch.equal(ulps[:-1], values[1:] - values[:-1])


@pytest.mark.parametrize("is_tuned", [True, False])
def test_storage_noise_of_an_fp8_fine_tune_is_what_rounding_to_fp8_put_into_the_delta(tmp_path, is_tuned):
    """It was taken for that of float32, next to nothing: a mere quantization looked like a change of full rank."""
    model = build()
    true = tune(model) if is_tuned else model
    base, tuned = save(model, tmp_path / "base"), quantize(save(true, tmp_path / "tuned"))

    report = extract(base, tuned, RANK_8).adapter.report

    read, exact = dequantized(tuned), true.state_dict()
    changes = [change for change in report.tensors if change.status == "extracted"]
    assert len(changes) == 14
    for change in changes:
        actual = float((read.load(change.name).double() - exact[change.name].double()).square().sum())
        assert change.noise == pytest.approx(actual, rel=0.15), change.name
    assert noise_share(report) == pytest.approx(1.0, abs=0.05) or is_tuned


class Largest(TorchDispatchMode):
    """The most elements that any float32 tensor had which was made under it."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("scale", [(4, 2, 4), (4, 64, 1), (4, 1, 1), (1,)], ids=str)
def test_of_fp8_experts_in_one_tensor_only_the_asked_one_is_made(tmp_path, scale):
    """With scales for blocks of 32 by 16, for rows, for experts, for all."""
    torch.manual_seed(0)
    stack, scales = torch.randn(4, 64, 64).to(torch.float8_e4m3fn), torch.rand(scale)
    config = {"quantization_config": {"weight_block_size": [32, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"m.experts.fc1.weight": stack, "m.experts.fc1.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    checkpoint = dequantized(open_checkpoint(tmp_path))

    with Largest() as largest:
        row = checkpoint.load_row("m.experts.fc1.weight", 2)

    blocks = scales.repeat_interleave(32, 1).repeat_interleave(16, 2) if scale == (4, 2, 4) else scales
    assert torch.equal(row, (stack.float() * blocks)[2])
    assert largest.numel == 64 * 64


@pytest.mark.parametrize(
    ("scale", "spread"),
    [
        (torch.tensor(0.5), lambda weight: 0.5 * weight),
        (torch.full((96, 1), 0.25), lambda weight: 0.25 * weight),
    ],
    ids=["tensor", "channel"],
)
def test_scales_of_a_tensor_and_of_channels(tmp_path, scale, spread):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME], tensors[f"{NAME}_scale"] = weight, scale

    checkpoint = dequantized(rewrite(save(build(), tmp_path / "base"), narrow))

    assert torch.equal(checkpoint.load(NAME), spread(weight.float()))


def test_a_scale_that_fits_nothing_is_named(tmp_path):
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME], tensors[f"{NAME}_scale_inv"] = tensors[NAME].to(torch.float8_e4m3fn), torch.ones(7, 3)

    model = build()
    base = rewrite(save(model, tmp_path / "base"), narrow)

    with pytest.raises(CheckpointError, match=rf"{NAME}_scale_inv is \[7, 3\] for a weight of \[96, 64\]"):
        extract(base, save(tune(model), tmp_path / "tuned"), RANK_8)


# --- pickles ---


def pickled(checkpoint: Checkpoint, folder: Path, shards: int = 1) -> Path:
    """The checkpoint as older trainers saved it: pytorch_model.bin."""
    shutil.copytree(checkpoint.path, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(checkpoint.path / "model.safetensors")
    names = sorted(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        suffix = "" if shards == 1 else f"-{shard + 1:05d}-of-{shards:05d}"
        torch.save(part, folder / f"pytorch_model{suffix}.bin")
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_give_the_same_adapter_as_safetensors(tmp_path, shards):
    model = build()
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    folder = pickled(tuned, tmp_path / "pickled" / "tuned", shards)

    converted = convert_pickles(folder, tmp_path / "converted")

    assert converted.name == "tuned"
    plain, ours = extract(base, tuned, RANK_8).adapter, extract(base, open_checkpoint(converted), RANK_8).adapter
    assert ours.header == plain.header


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    torch.save({"weight": Bomb(tmp_path / "pwned")}, folder / "pytorch_model.bin")

    with pytest.raises(PickleRefused, match="no plain tensors"):
        convert_pickles(folder, tmp_path / "converted")

    assert not (tmp_path / "pwned").exists()


def test_a_pickle_of_something_else_is_refused_by_name(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    torch.save({"weight": torch.ones(2), "epoch": 3}, folder / "pytorch_model.bin")

    with pytest.raises(PickleRefused) as caught:
        convert_pickles(folder, tmp_path / "converted")

    assert caught.value.cause == "pytorch_model.bin holds 'epoch', which is no tensor"


def test_a_truncated_pickle_is_told(tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    torch.save({"weight": torch.ones(2000)}, folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])

    with pytest.raises(CheckpointError, match=r"half cannot be read"):
        convert_pickles(folder, tmp_path / "converted")


def test_a_plan_needs_no_scale_to_be_read(tmp_path):
    model = build()
    base = quantize(save(model, tmp_path / "base"))

    plan = plan_extraction(base, save(tune(model), tmp_path / "tuned"), RANK_8)

    assert len(plan.extractable) == 14


# --- GGUF ---


def write_gguf(model: torch.nn.Module, path: Path, kind: str = "F32") -> Path:
    """The model as llama.cpp's converter writes it: other names, and in a Llama other orders of the rows of q and k."""
    config, back = model.config, {name: short for short, name in NAMES.items()}
    kind = gguf.GGMLQuantizationType[kind]
    is_llama = config.model_type == "llama"
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, leaf = name.rpartition(".")
        parts = module.split(".")
        short = back[".".join(parts[3:])] if parts[1:2] == ["layers"] else back[module]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
        if heads and is_llama:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        prefix = f"blk.{parts[2]}." if parts[1:2] == ["layers"] else ""
        data = tensor.float().contiguous().numpy()
        if tensor.dim() == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{prefix}{short}.{leaf}", gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{prefix}{short}.{leaf}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_reads_as_the_model_that_it_was_made_of(tmp_path, architecture, tied):
    model = build(architecture, tied=tied)

    checkpoint = dequantized(open_gguf(write_gguf(model, tmp_path / "base.gguf")))

    parameters = dict(model.named_parameters())
    assert checkpoint.tensors.keys() == parameters.keys()
    for name, weight in parameters.items():
        assert torch.equal(checkpoint.load(name), weight), name


def test_transformers_reads_the_same_numbers_of_a_quantized_file(tmp_path):
    path = write_gguf(build(), tmp_path / "base.gguf", "Q8_0")

    judge = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)

    ours = dequantized(open_gguf(path))
    for name, weight in judge.named_parameters():
        assert torch.equal(ours.load(name), weight), name


def test_a_quantized_gguf_is_a_base_of_its_own(tmp_path):
    model = build()
    tuned = save(tune(model), tmp_path / "tuned")
    wide, narrow = (open_gguf(write_gguf(model, tmp_path / f"{kind}.gguf", kind)) for kind in ("F32", "Q8_0"))

    adapters = [extract(base, tuned, RANK_8).adapter for base in (wide, narrow)]
    plain = extract(save(model, tmp_path / "plain"), tuned, RANK_8).adapter

    assert len({adapter.header.base.base_id for adapter in (*adapters, plain)}) == 3
    for name, factors in plain.factors.items():
        assert torch.equal(adapters[0].factors[name].A, factors.A)
    assert adapters[1].report.norm_squared > plain.report.norm_squared  # the rounding to 8 bits is part of the change


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "gemma")
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(CheckpointError, match="is of architecture gemma"):
        open_gguf(tmp_path / "base.gguf")


def test_a_truncated_gguf_is_told(tmp_path):
    path = write_gguf(build(), tmp_path / "base.gguf")
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        open_gguf(path)

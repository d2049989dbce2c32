"""adapter_model.safetensors of a PEFT folder: found, and read into checked pairs of factors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flora.errors import AdapterInvalid, NotFinite, PickleRefused, Unsupported
from flora.forms import Form
from flora.registry.formats.peft_config import CONFIG_FILE, LoraScales
from flora.registry.formats.spelling import FACTOR
from flora.registry.formats.stacks import Stack, unstack
from flora.registry.formats.tensors import check_file, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from flora.lowrank import LowRank

WEIGHTS_FILE = "adapter_model.safetensors"
_MAX_VALUE = 65504.0  # the largest fp16; no trained factor comes near
_MAX_NAME = 256
_MAX_DIMENSIONS = 5  # of a convolution's factors
_TWO_DIMENSIONAL = ("trainable_tokens_delta", "_bias")  # new rows of a table, biases of all experts


def find_weights(folder: Path) -> Path:
    """The weights file. Raises PickleRefused if there are pickled weights, too; AdapterInvalid if it is no adapter."""
    names = {path.name for path in folder.iterdir()}
    pickles = sorted(name for name in names if re.fullmatch(r"adapter_model.*\.(bin|pt|pth|pkl|ckpt)", name))
    if pickles:
        raise PickleRefused(
            f"{folder.name} holds adapter weights as {pickles[0]}, a pickle file that can run code when it is opened",
            fix="convert it where it was made, with peft's save_pretrained; if safetensors are there too, delete it",
        )
    if CONFIG_FILE not in names or WEIGHTS_FILE not in names:
        missing = CONFIG_FILE if CONFIG_FILE not in names else WEIGHTS_FILE
        is_model = any(name.startswith("model") and name.endswith(".safetensors") for name in names)
        checkpoint = "it is a full checkpoint: `flora extract BASE TUNED` makes an adapter of it"
        raise AdapterInvalid(
            f"{folder.name} holds no {missing}, so it is no PEFT adapter",
            fix=checkpoint if is_model else f"an adapter's folder has {CONFIG_FILE} and {WEIGHTS_FILE}",
        )
    return folder / WEIGHTS_FILE


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What a weights file holds."""

    pairs: Mapping[str, "LowRank"]  # by module
    forms: Mapping[str, Form]  # of the modules that are no linear layers, as far as names and shapes tell
    exact: Mapping[str, "Tensor"]  # whole tensors, by their names in the base


def adapted_modules(path: Path) -> set[str]:
    """Modules that the file has a factor of, by its names alone."""
    check_file(path)
    return {match["module"] for name in load_tensors(path) if (match := FACTOR.fullmatch(name))}


def read_weights(
    path: Path, config: LoraScales, exact: Mapping[str, str] | None = None, stacks: Sequence[Stack] = ()
) -> Weights:
    """Each module's two factors, checked: names, pairs, dtypes, shapes, finite and sane values.

    exact   tensors to be there whole, and their names in the file; without a record of Flora's none is expected
    stacks  of experts, which come apart; likewise
    """
    from flora.lowrank import LowRank

    check_file(path)
    tensors = load_tensors(path)
    whole = {name: _take_exact(tensors, spelled) for name, spelled in (exact or {}).items()}
    unstack(tensors, stacks)
    halves: dict[str, dict[str, Tensor]] = {}
    forms: dict[str, Form] = {}
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None or len(name) > _MAX_NAME:
            raise Unsupported(f"tensor {name[:_MAX_NAME]!r} {_explain(name)}", tensor=name[:_MAX_NAME])
        _check_values(name, tensor, is_table=match["table"] is not None)
        half = halves.setdefault(match["module"], {})
        if match["table"]:  # PEFT's factors of a table are of the transposed one
            half["B" if match["table"] == "A" else "A"] = tensor.T.contiguous()
            forms[match["module"]] = Form(kind="embedding")
        else:
            half[match["half"]] = tensor.clone()  # the file is not ours to trust later
            if tensor.ndim > 2 and match["half"] == "A":
                forms[match["module"]] = Form(kind="conv", kernel=tuple(tensor.shape[2:]))
    if not halves:
        raise AdapterInvalid(f"{path.name} holds no factors")
    pairs = {}
    for module, half in sorted(halves.items()):
        _check_pair(module, half, config)
        pairs[module] = LowRank(A=half["A"].flatten(1), B=half["B"].flatten(1), scale=config.scale(module))
    return Weights(pairs, forms, whole)


def _take_exact(tensors: dict[str, "Tensor"], name: str) -> "Tensor":
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.ndim != (2 if name.endswith(_TWO_DIMENSIONAL) else 1):
        raise AdapterInvalid(f"{WEIGHTS_FILE} lacks {name}, which the record beside it names", tensor=name)
    if not bool(tensor.isfinite().all()):
        raise NotFinite(f"tensor {name} holds NaN or infinity", tensor=name)
    return tensor.clone()


def _explain(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "is DoRA's: it rescales the base's weights, which is no low-rank product"
    if name.endswith(".bias"):
        return "is a bias, which Flora does not apply"
    if "lora_" not in name:
        return "is no LoRA factor: whole tensors (modules_to_save) are not applied"
    return "is no LoRA factor of a Linear layer"


def _check_values(name: str, tensor: "Tensor", *, is_table: bool) -> None:
    import torch

    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    if tensor.dtype not in dtypes or not 2 <= tensor.ndim <= (2 if is_table else _MAX_DIMENSIONS):
        kind = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise Unsupported(f"tensor {name} is {kind}, not a matrix of fp32, fp16, bf16 or fp8 (e4m3)", tensor=name)
    if ".lora_B." in name and any(size != 1 for size in tensor.shape[2:]):
        raise Unsupported(f"tensor {name} is {list(tensor.shape)}; a LoRA's B has a kernel of 1", tensor=name)
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = tensor.to(torch.bfloat16)  # fp8 has no isfinite
    if not bool(tensor.isfinite().all()):
        fix = "the training diverged: take an earlier step of it"
        raise NotFinite(f"tensor {name} holds NaN or infinity", fix=fix, tensor=name)
    if tensor.numel() and float(tensor.abs().max()) > _MAX_VALUE:
        raise AdapterInvalid(f"tensor {name} holds values over {_MAX_VALUE:g}, which no trained LoRA has", tensor=name)


def _check_pair(module: str, half: Mapping[str, "Tensor"], config: LoraScales) -> None:
    if len(half) != 2:
        have, lack = ("A", "B") if "A" in half else ("B", "A")
        raise AdapterInvalid(f"{module} has lora_{have} and no lora_{lack}", tensor=module)
    A, B, rank = half["A"], half["B"], config.rank(module)
    if A.ndim != B.ndim or A.shape[0] != rank or B.shape[1] != rank or 0 in (*A.shape[1:], B.shape[0]):
        raise AdapterInvalid(
            f"{module} has A {list(A.shape)} and B {list(B.shape)}; rank {rank} wants [{rank}, in] and [out, {rank}]",
            cause=f"the weights are damaged, or {CONFIG_FILE} belongs to other weights",
            tensor=module,
        )
    if A.dtype != B.dtype:
        raise Unsupported(f"{module} has A in {A.dtype} and B in {B.dtype}", tensor=module)
    if not config.targets(module):
        raise AdapterInvalid(
            f"{module} has weights, and target_modules does not name it: PEFT would pass over them in silence",
            fix=f"correct target_modules in {CONFIG_FILE}",
            tensor=module,
        )

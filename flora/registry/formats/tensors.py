"""Safetensors files of adapters: written piece by piece in one fixed spelling, read through a gate.

Written here and not by the library, so that equal tensors give equal bytes, hence equal digests, whatever version of
the library is installed, and no second copy of the weights is made. What is read is checked by the library, and before
that by the caps below: safetensors checks a container, not that it holds an adapter.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.adapter import AdapterHeader
from flora.errors import AdapterInvalid, PickleRefused
from flora.registry.formats.spelling import spell, spell_exact, unspell
from flora.registry.mapped import Mapped

if TYPE_CHECKING:
    from torch import Tensor

    from flora.adapter import Adapter
    from flora.lowrank import LowRank

_DTYPES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
}
_NAMES = {code: name.removeprefix("torch.") for name, code in _DTYPES.items()}
_PICKLE_MAGIC = (b"\x80", b"PK\x03\x04")  # pickle protocol 2 and up; the zip that torch.save writes
_MAX_HEADER_BYTES = 32 << 20
_MAX_TENSORS = 100_000


def encode(tensors: Mapping[str, "Tensor"]) -> Iterator[bytes | memoryview]:
    """The safetensors file of `tensors` as pieces: header, then each tensor's bytes, in the order of names.

    tensors  fp32, fp16, bf16 or fp8 (e4m3), on the CPU.   Source: the format's description in huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        yield as_bytes(tensors[name])


def as_bytes(tensor: "Tensor") -> memoryview:
    """The tensor's bytes, row by row, as a file has them."""
    import torch

    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def check_file(path: Path) -> None:
    """Refuses what is no safetensors file of sane size, before anything is read by its own word.

    Raises PickleRefused (a pickle under this name; it is not opened as one), AdapterInvalid.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start.startswith(_PICKLE_MAGIC) and not _is_length(start, path):
                raise PickleRefused(
                    f"{path.name} is a pickle file under a safetensors name; opening it could run code",
                    fix="convert it where it was made: load the adapter with peft and save it with save_pretrained",
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not _is_length(start, path):
                raise AdapterInvalid(
                    f"{path.name} is not a complete safetensors file",
                    cause=f"its first bytes promise a header of {length} bytes; the file has {path.stat().st_size}",
                    fix="it may be a truncated download or a Git LFS pointer: fetch it again",
                )
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        if len(header) > _MAX_TENSORS:
            raise AdapterInvalid(f"{path.name} holds {len(header)} tensors, more than {_MAX_TENSORS}")
        with safe_open(path, framework="np"):  # the library's own check of lengths, offsets, overlaps and holes
            pass
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(
            f"{path.name} is not a complete safetensors file",
            cause=str(error)[:300],
            fix="it may be a truncated or damaged download: fetch it again",
        ) from error


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """Every tensor of the file by name, backed by the file's map: do not write to them. Raises AdapterInvalid."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterInvalid(f"{path.name} cannot be read", cause=str(error)) from error


def load_blob(mapped: Mapped) -> dict[str, "Tensor"]:
    """As load_tensors, of a file that `encode` made, wherever its bytes lie: each tensor within one of the pieces."""
    import torch

    tensors = {}
    try:
        for name, told, data in _walk(mapped):
            if told:
                dtype: torch.dtype = getattr(torch, _NAMES[told["dtype"]])
                flat = torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)
                if flat.data_ptr() % dtype.itemsize:  # what was cut out before it may have had an odd number of bytes
                    flat = torch.frombuffer(bytearray(data), dtype=dtype)
                tensors[name] = flat.view(told["shape"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise AdapterInvalid("a stored weights file cannot be read", cause=str(error)) from error
    return tensors


def stored_pieces(mapped: Mapped) -> Iterator[tuple[str, memoryview]]:
    """The pieces that `encode` made the file of, with the tensor's name, "" for the header. Raises AdapterInvalid."""
    try:
        yield from ((name, data) for name, _, data in _walk(mapped))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterInvalid("a stored weights file cannot be read", cause=str(error)) from error


def _walk(mapped: Mapped) -> Iterator[tuple[str, dict[str, Any], memoryview]]:
    """The header, then each tensor of the file as they lie: its name, what the header tells of it, its bytes."""
    pieces = [piece for piece in mapped.pieces if len(piece)]
    starts = [0, *accumulate(map(len, pieces))]

    def cut(begin: int, end: int) -> memoryview:
        index = min(bisect_right(starts, begin), len(pieces)) - 1
        data = pieces[index][begin - starts[index] : end - starts[index]]
        if not 0 <= begin <= end or len(data) != end - begin:
            raise ValueError(f"bytes {begin} to {end} do not lie in one part")
        return data

    first = 8 + int.from_bytes(cut(0, 8), "little")
    header = json.loads(bytes(cut(8, first)))
    header.pop("__metadata__", None)
    yield "", {}, cut(0, first)
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = told["data_offsets"]
        yield name, told, cut(first + begin, first + end)


def to_tensors(adapter: "Adapter") -> dict[str, "Tensor"]:
    """All that the adapter holds under the names that PEFT gives it in adapter_model.safetensors, each weight once."""
    forms = adapter.header.forms
    tensors = {spell_exact(told): adapter.exact[told.name] for told in adapter.header.exact_tensors}
    for module, lowrank in adapter.factors.items():
        tensors |= spell(module, lowrank, forms[module])
    return tensors


def to_factors(header: AdapterHeader, tensors: Mapping[str, "Tensor"]) -> dict[str, "LowRank"]:
    """The factors that `header` describes, out of tensors under PEFT's names. Raises AdapterInvalid if they differ."""
    from flora.lowrank import LowRank

    factors = {}
    for module in header.modules:
        pair = unspell(module.name, tensors, module.form)
        if pair is None:
            raise AdapterInvalid(f"the weights lack a factor of {module.name}", tensor=module.name)
        A, B = pair
        shapes = (tuple(A.shape), tuple(B.shape))
        if shapes != ((module.rank, module.in_features), (module.out_features, module.rank)):
            raise AdapterInvalid(f"{module.name} has factors of shapes {shapes}, its header others", tensor=module.name)
        _check_dtype(module.name, module.dtype, A, B)
        factors[module.name] = LowRank(A=A, B=B, scale=module.scale)
    wanted = 2 * len(factors) + len(header.exact_tensors)
    if wanted != len(tensors):
        raise AdapterInvalid(f"the weights hold {len(tensors)} tensors, the header names {wanted}")
    return factors


def to_exact(header: AdapterHeader, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The whole tensors that `header` describes, likewise."""
    exact = {}
    for described in header.exact_tensors:
        tensor = tensors.get(spell_exact(described))
        if tensor is None or tuple(tensor.shape) != described.shape:
            raise AdapterInvalid(f"the weights lack {described.name} as its header tells it", tensor=described.name)
        _check_dtype(described.name, described.dtype, tensor)
        exact[described.name] = tensor
    return exact


def _check_dtype(name: str, told: str, *tensors: "Tensor") -> None:
    found = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    if any(dtype != told for dtype in found):
        raise AdapterInvalid(f"{name} is stored as {found[0]}, its header says {told}", tensor=name, field="dtype")


def _is_length(start: bytes, path: Path) -> bool:
    """Whether the first eight bytes can be the length of a header that the file holds."""
    length = int.from_bytes(start, "little")
    return 2 <= length <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return table

"""Whether two checkpoints fit each other, by their headers: one architecture, all of it, in readable numbers."""

from collections.abc import Sequence

from flora.checkpoint import FLOAT_DTYPES, Checkpoint
from flora.errors import CheckpointError, ShapeMismatch
from flora.extract.buffers import is_derived
from flora.extract.kinds import Wish, is_embedding, is_head
from flora.extract.pair import TensorPair
from flora.forms import is_expert

PACKED = ("weight", "weight_packed", "_blocks")  # how names end of weights, whole and quantized in any way


def check_shapes(pairs: Sequence[TensorPair], base: Checkpoint, tuned: Checkpoint, wish: Wish) -> None:
    """Raises ShapeMismatch where two tensors of one name differ in shape, but for a vocabulary that has only grown.

    wish  whether embeddings are carried: rows of new tokens are, then
    """
    differing = [pair for pair in pairs if pair.base and pair.tuned and pair.base.shape != pair.tuned.shape]
    if not differing:
        return
    vocabulary = [pair for pair in differing if is_embedding(pair.name) or is_head(pair.name)]
    body = [pair for pair in differing if pair not in vocabulary]
    if not body and wish.embeddings and all(_has_grown(pair) for pair in vocabulary):
        return
    pair = (body or vocabulary)[0]
    assert pair.base is not None
    assert pair.tuned is not None
    what = f"{pair.name} is {list(pair.base.shape)} in the base, {list(pair.tuned.shape)} in {pair.tuned.file}"
    values = {"tensor": pair.name, "base_shape": pair.base.shape, "tuned_shape": pair.tuned.shape}
    if not body and pair.base.shape[1:] == pair.tuned.shape[1:]:
        rows, new_rows = pair.base.shape[0], pair.tuned.shape[0]
        raise ShapeMismatch(
            what,
            cause=f"the vocabulary was resized from {rows} to {new_rows} tokens before or during the tuning",
            fix="--embeddings carries the rows of new tokens, for PEFT; or tune without new tokens"
            if new_rows > rows
            else "extraction needs one vocabulary: resize the base likewise, or tune without resizing",
            **values,
        )
    raise ShapeMismatch(what, cause=_two_architectures(base, tuned), fix=_other_base(base, tuned), **values)


def _has_grown(pair: TensorPair) -> bool:
    assert pair.base is not None
    assert pair.tuned is not None
    return pair.base.shape[1:] == pair.tuned.shape[1:] and pair.num_new_rows > 0


def check_complete(pairs: Sequence[TensorPair], base: Checkpoint, tuned: Checkpoint) -> None:
    """Raises CheckpointError where the tuned checkpoint lacks tensors of the base, but for derived buffers and a tied
    head; and where it is of another architecture and has tensors that the base lacks.
    """
    untied = tuned.config.get("tie_word_embeddings") is False  # and so it should have a head of its own
    missing = [
        pair.name
        for pair in pairs
        if (pair.tuned is None and not is_derived(pair.name, pair.shape))
        or (untied and pair.twin is not None and pair.tuned is pair.twin[1])
    ]
    new = [pair.name for pair in pairs if pair.base is None]
    if not missing and (not new or base.architecture == tuned.architecture):
        return
    if missing:
        what = f"{tuned.path} lacks {len(missing)} of the base's tensors, {missing[0]} among them"
    else:
        what = f"{tuned.path} holds {len(new)} tensors that the base lacks, {new[0]} among them"
    if base.architecture == tuned.architecture and all(any(map(_is_expert, names)) for names in (missing, new)):
        raise CheckpointError(
            what,
            cause="one of the two keeps the experts of a layer in one tensor, the other each by itself, and they do "
            "not fit: a part of an expert is missing or of another shape, or it is gpt-oss and apart in the base",
            fix="load the base with the library that saved the tuned checkpoint, save it to a folder, and give that",
            missing=missing,
        )
    if base.architecture != tuned.architecture or len(missing) > len(base.tensors) // 2:
        raise CheckpointError(
            what, cause=_two_architectures(base, tuned), fix=_other_base(base, tuned), missing=missing
        )
    raise CheckpointError(
        what,
        cause="the checkpoint was saved in part, or a shard of it is not there",
        fix="save the whole model again: model.save_pretrained(folder)",
        missing=missing,
    )


def check_dtypes(pairs: Sequence[TensorPair]) -> None:
    """Raises CheckpointError where a tensor is quantized in a way that is not read."""
    for pair in pairs:
        for info in pair.sides:
            if info.dtype not in FLOAT_DTYPES and (info.dtype.startswith("F8") or info.name.endswith(PACKED)):
                raise CheckpointError(
                    f"{info.name} of {info.file} is stored as {info.dtype}, a quantized weight",
                    cause="Flora reads fp8 weights that have a scale beside them, gpt-oss in MXFP4, and GGUF as a base",
                    fix="give the checkpoint as it was before quantization: float32, bfloat16 or float16",
                    tensor=info.name,
                    dtype=info.dtype,
                )


def _is_expert(name: str) -> bool:
    return is_expert(name.removesuffix(".weight")) or ".experts." in name


def _two_architectures(base: Checkpoint, tuned: Checkpoint) -> str:
    return (
        f"these two checkpoints are not of one architecture (config.json: {_describe(base)} against {_describe(tuned)})"
    )


def _describe(checkpoint: Checkpoint) -> str:
    numel = sum(info.numel for info in checkpoint.tensors.values())
    size = next(
        (f"{numel / unit:.3g}{letter}" for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if numel >= unit),
        str(numel),
    )
    return f"{checkpoint.architecture} of {size} parameters"


def _other_base(base: Checkpoint, tuned: Checkpoint) -> str:
    fix = "give the base that this checkpoint was tuned from"
    origin = tuned.name
    if origin not in (tuned.path.name, base.name):
        fix += f"; its config.json names {origin}"
    return fix

"""Which tensor of the tuned checkpoint belongs to which of the base, and whether they fit. Reads headers only."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from flora.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from flora.errors import CheckpointError, ShapeMismatch, UsageError
from flora.extract.aliases import named_as
from flora.extract.kinds import Wish, classify, is_embedding, is_head, reason_not_wished, tied_heads
from flora.forms import Form, Kind, matrix_shape

DEFAULT_WISH = Wish()
BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias", "position_ids")  # derived values that older versions stored


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor on both sides. `name` is the base's, with the prefix that only the tuned names have, if they do."""

    name: str
    base: TensorInfo | None  # None: only the tuned checkpoint holds it
    tuned: TensorInfo | None  # None: a buffer that only the base holds
    status: Literal["extractable", "exact", "not_extractable", "excluded"] = "extractable"  # exact: carried whole
    reason: str | None = None  # of a status other than extractable
    kind: Kind = "linear"  # of an extractable one
    tied: tuple[str, ...] = ()  # modules without a tensor of their own that use this very embedding
    twin: tuple[TensorInfo, TensorInfo] | None = None  # both token embeddings that this output head may be tied to

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def sides(self) -> tuple[TensorInfo, ...]:
        return tuple(info for info in (self.base, self.tuned) if info is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sides[0].shape

    @property
    def num_new_rows(self) -> int:
        """Rows that a table has in the tuned checkpoint alone: those of new tokens."""
        return self.tuned.shape[0] - self.base.shape[0] if self.base and self.tuned and self.shape else 0

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in] of an extractable one."""
        return matrix_shape(self.kind, self.shape)

    @property
    def form(self) -> Form:
        kernel = self.shape[2:] if self.kind == "conv" else ()
        return Form(kind=self.kind, kernel=kernel, tied=self.tied)

    @property
    def num_bytes(self) -> int:
        """What reading both sides takes."""
        return sum(info.num_bytes for info in self.sides)


def pair_tensors(
    base: Checkpoint,
    tuned: Checkpoint,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    wish: Wish = DEFAULT_WISH,
) -> tuple[list[TensorPair], list[str]]:
    """Every tensor of either checkpoint, paired and classified, by name; and notes on names that had to be mapped.

    include, exclude  globs over module and tensor names;  wish  what is wanted beside linear layers
    Raises ShapeMismatch, CheckpointError (the tuned checkpoint lacks tensors, or weights are not floating point),
    UsageError (a glob that matches nothing, or nothing left to extract).
    """
    pairs, notes = match_names(base.tensors, tuned.tensors)
    _check_shapes(pairs, base, tuned, wish)
    _check_complete(pairs, base, tuned)
    _check_dtypes(pairs)
    pairs = _select(_classify(pairs, base, wish), include, exclude)
    if not any(pair.status == "extractable" for pair in pairs):
        raise UsageError(
            f"nothing of {base.path} can be extracted",
            cause=f"most of it is: {_main_reasons(pairs)}",
            fix="give a model of linear layers, or other --include and --exclude",
        )
    return pairs, notes


def match_names(base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo]) -> tuple[list[TensorPair], list[str]]:
    """Pairs in the order of names, None where a side lacks the tensor; and a note on each side that lacks a prefix."""
    as_tuned, as_base = named_as(base, tuned), named_as(tuned, base)
    base_by_name = {as_tuned[name]: info for name, info in base.items()}
    tuned_by_name = {as_base[name]: info for name, info in tuned.items()}
    notes = [_note("base", base_by_name), _note("tuned checkpoint", tuned_by_name)]
    names = sorted(base_by_name.keys() | tuned_by_name.keys())
    twin = next((name for name in names if is_embedding(name)), None)
    return [_pair(name, base_by_name, tuned_by_name, twin) for name in names], [note for note in notes if note]


def _note(side: str, by_name: Mapping[str, TensorInfo]) -> str | None:
    renamed = next(((name, info.name) for name, info in by_name.items() if name != info.name), None)
    if renamed is None:
        return None
    name, own = renamed
    if name.endswith(own):
        return f"tensor names of the {side} lack {name.removesuffix(own)!r}, which the other checkpoint's have"
    return f"tensors of the {side} have other names: {own} is {name} in the other checkpoint"


def _pair(
    name: str, base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], embedding: str | None
) -> TensorPair:
    ours, theirs = base.get(name), tuned.get(name)
    if embedding is None or not is_head(name) or embedding not in base or embedding not in tuned:
        return TensorPair(name, ours, theirs)
    twin = base[embedding], tuned[embedding]
    ours, theirs = ours or twin[0], theirs or twin[1]  # a side that stores no head uses its embedding as one
    may_be_tied = (ours.shape, theirs.shape) == (twin[0].shape, twin[1].shape)
    return TensorPair(name, ours, theirs, twin=twin if may_be_tied else None)


def _check_shapes(pairs: Sequence[TensorPair], base: Checkpoint, tuned: Checkpoint, wish: Wish) -> None:
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


def _check_complete(pairs: Sequence[TensorPair], base: Checkpoint, tuned: Checkpoint) -> None:
    untied = tuned.config.get("tie_word_embeddings") is False  # and so it should have a head of its own
    missing = [
        pair.name
        for pair in pairs
        if (pair.tuned is None and not pair.name.endswith(BUFFERS))
        or (untied and pair.twin is not None and pair.tuned is pair.twin[1])
    ]
    new = [pair.name for pair in pairs if pair.base is None]
    if not missing and (not new or base.architecture == tuned.architecture):
        return
    if missing:
        what = f"{tuned.path} lacks {len(missing)} of the base's tensors, {missing[0]} among them"
    else:
        what = f"{tuned.path} holds {len(new)} tensors that the base lacks, {new[0]} among them"
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


def _check_dtypes(pairs: Sequence[TensorPair]) -> None:
    for pair in pairs:
        for info in pair.sides:
            if info.dtype not in FLOAT_DTYPES and (info.dtype.startswith("F8") or info.name.endswith("weight")):
                raise CheckpointError(
                    f"{info.name} of {info.file} is stored as {info.dtype}, a quantized weight",
                    cause="Flora reads fp8 weights that have a scale beside them, and no other quantized ones",
                    fix="give the checkpoint as it was before quantization: float32, bfloat16 or float16",
                    tensor=info.name,
                    dtype=info.dtype,
                )


def _classify(pairs: Sequence[TensorPair], base: Checkpoint, wish: Wish) -> list[TensorPair]:
    names = {pair.name for pair in pairs}
    model_type = str(base.config.get("model_type"))
    return [_classified(pair, names, model_type, base, wish) for pair in pairs]


def _classified(pair: TensorPair, names: set[str], model_type: str, base: Checkpoint, wish: Wish) -> TensorPair:
    if pair.base is None:
        reason = "new in the tuned checkpoint: there is no base tensor to change"
        return replace(pair, status="not_extractable", reason=reason)
    if pair.tuned is None:
        reason = "a buffer that only the base stores: there is nothing to compare it with"
        return replace(pair, status="not_extractable", reason=reason)
    if pair.num_new_rows:
        reason = f"{pair.num_new_rows} rows of new tokens are carried whole; the others stay as in the base"
        return replace(pair, status="exact", reason=reason)
    found = classify(pair.name, pair.shape, {info.dtype for info in pair.sides}, model_type, names)
    if found.kind is None:
        status: Literal["exact", "not_extractable"] = "exact" if found.is_vector and wish.vectors else "not_extractable"
        return replace(pair, status=status, reason=found.reason)
    not_wished = reason_not_wished(pair.name, found.kind, names, wish)
    if not_wished is not None:
        return replace(pair, status="not_extractable", reason=not_wished)
    return replace(pair, kind=found.kind, tied=tied_heads(pair.name, model_type, dict(base.config), names))


def _select(pairs: Sequence[TensorPair], include: Sequence[str], exclude: Sequence[str]) -> list[TensorPair]:
    for option, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs:
            if not any(_matches(pair, glob) for pair in pairs):
                raise UsageError(
                    f"{option} {glob!r} matches no tensor",
                    fix=f"globs are matched against whole names such as {pairs[len(pairs) // 2].module}",
                )
    return [_selected(pair, include, exclude) for pair in pairs]


def _selected(pair: TensorPair, include: Sequence[str], exclude: Sequence[str]) -> TensorPair:
    if pair.status == "not_extractable":
        return pair
    if include and not any(_matches(pair, glob) for glob in include):
        return replace(pair, status="excluded", reason="not named by --include")
    glob = next((glob for glob in exclude if _matches(pair, glob)), None)
    return replace(pair, status="excluded", reason=f"excluded by {glob!r}") if glob else pair


def _matches(pair: TensorPair, glob: str) -> bool:
    return fnmatchcase(pair.module, glob) or fnmatchcase(pair.name, glob)


def _main_reasons(pairs: Sequence[TensorPair]) -> str:
    """The two reasons that stand against most bytes."""
    num_bytes: Counter[str] = Counter()
    for pair in pairs:
        num_bytes[pair.reason or ""] += pair.num_bytes
    return "; ".join(reason for reason, _ in num_bytes.most_common(2))


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

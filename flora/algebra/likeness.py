"""How alike two models answer: the divergence of their next-token distributions on given prompts.

    KL(tuned ‖ other) = Σ_v p_tuned(v) (log p_tuned(v) - log p_other(v))        in nats, at every token of a prompt

The models are transformers' own, in float32 on the CPU, so nothing of Flora's server is in the comparison. The base's
weights are changed in place by the adapter's product: both checkpoints are in memory, in float32, and no third model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.algebra.places import as_matrix
from flora.checkpoint import Checkpoint
from flora.errors import CheckpointError, Unsupported, UsageError


@dataclass(frozen=True, slots=True)
class PromptLikeness:
    """One prompt. Divergences from the tuned checkpoint, in nats; `last` of the token that would be answered first."""

    prompt: str
    num_tokens: int
    base_mean: float  # over the prompt's positions
    adapter_mean: float
    base_last: float
    adapter_last: float
    adapter_agrees: int  # positions whose likeliest next token is the tuned checkpoint's
    base_agrees: int


@dataclass(frozen=True, slots=True)
class Likeness:
    prompts: tuple[PromptLikeness, ...]

    @property
    def num_tokens(self) -> int:
        return sum(prompt.num_tokens for prompt in self.prompts)

    def mean(self, field: str) -> float:
        """The mean of a per-prompt mean over all positions: `adapter_mean` or `base_mean`."""
        return sum(getattr(prompt, field) * prompt.num_tokens for prompt in self.prompts) / max(1, self.num_tokens)

    def share(self, field: str) -> float:
        """The share of positions counted by `adapter_agrees` or `base_agrees`."""
        return sum(getattr(prompt, field) for prompt in self.prompts) / max(1, self.num_tokens)


def read_prompts(path: Path) -> list[str]:
    """The lines of the file that hold anything. Raises UsageError if there are none, or it is no text."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a UTF-8 text file", fix="give a file with one prompt a line") from error
    if not lines:
        raise UsageError(f"{path} holds no prompt", fix="write one prompt a line")
    return lines


def compare_answers(
    adapter: Adapter,
    base: Checkpoint,
    tuned: Checkpoint,
    prompts: Sequence[str],
    paths: Mapping[str, str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Likeness:
    """Divergence of base, and of base with the adapter, from the tuned checkpoint on each prompt.

    paths     of modules that transformers' tree names otherwise than the checkpoint, by the checkpoint's
    progress  told what is at hand and the share of the work done

    Raises ModuleNotFoundError (transformers is not installed), CheckpointError (transformers cannot open a checkpoint),
    Unsupported (it has no place for a module of the adapter), UsageError (a prompt of no token).
    """
    tell = progress or (lambda what, share: None)
    tokens = _tokenize(base, prompts)
    tell("opening both checkpoints", 0.0)
    ours, theirs = _open_model(base), _open_model(tuned)
    measured: list[list[_Divergence]] = []
    for number, what in enumerate(("base", "base with adapter")):
        if number == 1:
            _apply(adapter, ours, paths or {})
        done = []
        for i, ids in enumerate(tokens):
            done.append(_diverge(_log_probabilities(theirs, ids), _log_probabilities(ours, ids)))
            tell(f"{what} on prompt {i + 1} of {len(tokens)}", (number * len(tokens) + i + 1) / (2 * len(tokens)))
        measured.append(done)
    return Likeness(
        tuple(
            PromptLikeness(prompt, len(ids), b.mean, a.mean, b.last, a.last, a.agrees, b.agrees)
            for prompt, ids, b, a in zip(prompts, tokens, *measured, strict=True)
        )
    )


@dataclass(frozen=True, slots=True)
class _Divergence:
    mean: float
    last: float
    agrees: int


def _diverge(wanted: Tensor, found: Tensor) -> _Divergence:
    """KL(wanted ‖ found) by position, of log-probabilities [tokens, vocabulary] in float64."""
    terms = (wanted.exp() * (wanted - found)).sum(1)
    agrees = int((wanted.argmax(1) == found.argmax(1)).sum())
    return _Divergence(float(terms.mean()), float(terms[-1]), agrees)


def _log_probabilities(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(1)


def _tokenize(base: Checkpoint, prompts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers finds no tokenizer in {base.path}", cause=str(error)[:300]) from error
    tokens = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    empty = next((prompt for prompt, ids in zip(prompts, tokens, strict=True) if not ids), None)
    if empty is not None:
        raise UsageError(f"the prompt {empty[:40]!r} has no token", fix="leave it out")
    return tokens


def _open_model(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command line has its own
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers cannot open {checkpoint.path} as a causal language model", cause=str(error)[:300]
        ) from error
    return model.eval()


def _apply(adapter: Adapter, model: Any, paths: Mapping[str, str]) -> None:
    """Adds every module's product to the model's own weights, and puts whole tensors in their places."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for module, factors in adapter:
            name = paths.get(module.name, module.name)
            as_matrix(_parameter(parameters, f"{name}.weight", name), module).add_(factors.delta())
        for tensor, whole in adapter.exact.items():
            module_name, _, leaf = tensor.rpartition(".")
            weight = _parameter(parameters, f"{paths.get(module_name, module_name)}.{leaf}")
            if weight.shape != whole.shape:
                raise Unsupported(
                    f"the adapter carries rows of new tokens for {tensor}, for which the base's model has no place",
                    fix="leave out --prompts: the weights are verified without it",
                    tensor=tensor,
                )
            weight.copy_(whole)


def _parameter(parameters: Mapping[str, Tensor], *names: str) -> Tensor:
    for name in names:
        if name in parameters:
            return parameters[name]
    raise Unsupported(
        f"transformers' model has no parameter {names[0]}",
        cause="its module tree names this weight otherwise, or fuses it with others",
        fix="leave out --prompts: the weights are verified without it",
        tensor=names[0],
    )

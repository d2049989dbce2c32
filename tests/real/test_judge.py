"""The study's judge says what greedy decoding says, and learns it from fewer passes."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.real import tiny
from tests.real.scripts import script

finetune = script("finetune")
Judge, Example = script("judge").Judge, script("made_tasks").Example

MAX_NEW_TOKENS = 16
EXAMPLES = [  # a word of three letters to its letters, a as b: half of it is learned below
    Example(f"say: {''.join(word)} ->", (" ".join(word).replace("a", "b"),)) for word in product("acd", repeat=3)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Half trained: some answers are right and some are not."""
    base = tiny.write_base(tmp_path_factory.mktemp("judge") / "base")
    learner = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    training = finetune.Training(steps=80, batch_size=27, lr=3e-3, seed=0, num_train=27)
    finetune.train(learner, AutoTokenizer.from_pretrained(base), EXAMPLES, training)
    learner.name_or_path = str(base)
    return learner.eval()


@pytest.mark.parametrize("merges", [False, True], ids=["its own tokens", "other tokens"])
def test_a_verdict_is_what_decoding_says(model: PreTrainedModel, merges: bool):
    tokenizer = tiny.merging_tokenizer() if merges else AutoTokenizer.from_pretrained(model.name_or_path)

    verdict = Judge(tokenizer, EXAMPLES, MAX_NEW_TOKENS)(model)

    decoded = [decode(model, tokenizer, example.prompt) in example.answers for example in EXAMPLES]
    assert list(verdict.right) == decoded
    assert 0 < sum(decoded) < len(decoded)


def test_any_of_several_answers_is_right(model: PreTrainedModel):
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    said = [decode(model, tokenizer, example.prompt) for example in EXAMPLES]
    wrong = Example(EXAMPLES[0].prompt, ("no", "nor this"))
    right = [Example(example.prompt, ("no", text)) for example, text in zip(EXAMPLES[1:], said[1:], strict=True)]

    verdict = Judge(tokenizer, [wrong, *right])(model)

    assert verdict.right == (False, *[True] * len(right))


def test_nats_are_the_cross_entropy_of_answer_and_end(model: PreTrainedModel):
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    prompt, answer = EXAMPLES[5].prompt, EXAMPLES[5].answers[0]
    ids = torch.tensor([tokenizer(f"{prompt} {answer}</s>")["input_ids"]])
    places = slice(len(tokenizer(prompt)["input_ids"]), None)

    with torch.no_grad():
        logits = model(ids).logits[0, :-1]

    expected = F.cross_entropy(logits[places.start - 1 :].double(), ids[0, places])
    assert Judge(tokenizer, EXAMPLES[5:6])(model).nll == pytest.approx(float(expected), rel=1e-5)


def test_small_batches_judge_as_large_ones_do(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    judge = Judge(AutoTokenizer.from_pretrained(model.name_or_path), EXAMPLES)
    whole = judge(model)

    monkeypatch.setattr("judge._BATCH_TOKENS", {"cpu": 50})

    assert judge(model).right == whole.right


def decode(model: PreTrainedModel, tokenizer, prompt: str) -> str:
    """transformers' own greedy answer, up to the end of its first line."""
    asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = model.generate(asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(ids[0, asked.shape[1] :], skip_special_tokens=True)
    return (text.strip().splitlines() or [""])[0].strip()

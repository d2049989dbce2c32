"""A language model so small that a task is learned in seconds, with a tokenizer of single characters."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flora.demo.alphabet import END, VOCABULARY, tokenizer_files

VOCAB_SIZE = 64  # a few more than the tokenizer has, for a merge


def write_base(folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder of random weights in bf16, with a tied table."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=END,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name, text in tokenizer_files().items():
        (folder / name).write_text(text)
    return folder


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The same characters, but ` b` is one token: a model that learned without it says the same text in others."""
    ids = {token: i for i, token in enumerate([*VOCABULARY, " b"])}
    tokenizer = Tokenizer(BPE(vocab=ids, merges=[(" ", "b")], unk_token="<unk>"))
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

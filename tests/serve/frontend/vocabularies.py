"""Two small tokenizers of the kinds that language models use, made on the spot."""

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flora.serve.frontend.tokenizer import Tokenizer as Served

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEXT = ["the quick brown fox jumps over the lazy dog", "héllo wörld 你好 🙂 naïve", "system user assistant said so"]


def byte_level_spec() -> dict[str, Any]:
    """As of GPT-2, Llama 3 and Qwen: every token is a string of bytes, so a character may be spread over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens(["<tool>"])  # added, but no control token
    return json.loads(tokenizer.to_str())


def byte_fallback_spec() -> dict[str, Any]:
    """As of Llama 2: words with a space before them, and a token for each raw byte of what the vocabulary lacks."""
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *raw, *"▁abcdehlorwéö,.", "▁he", "llo"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    vocab |= {piece: len(vocab) + index for index, piece in enumerate(["ll", "▁h"])}
    merges = [("▁", "h"), ("▁h", "e"), ("l", "l"), ("ll", "o")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return json.loads(tokenizer.to_str())


def byte_level() -> Served:
    return Served(byte_level_spec(), {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"})


def byte_fallback() -> Served:
    return Served(byte_fallback_spec(), {"bos_token": "<s>", "eos_token": "</s>"})

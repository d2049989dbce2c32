"""Tiny models of many kinds, each with the forward pass that judges its adapters. Made by transformers, offline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TOKENS = torch.arange(3, 15)[None]
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
SPEECH = torch.linspace(-1, 1, 16 * 40).reshape(1, 16, 40)


@dataclass(frozen=True)
class Kind:
    """One architecture: how to make it, how its library opens a saved one, and what to ask it."""

    make: Callable[[], nn.Module]
    opens: type
    forward: Callable[[nn.Module], Tensor]

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def hidden(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).last_hidden_state


def translated(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS.flip(1)).logits


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=2, n_positions=32))


def neox() -> nn.Module:
    sizes = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, intermediate_size=48, max_position_embeddings=32))


def gemma3() -> nn.Module:
    """Its embedding is scaled after the look-up, and its norms add one to their weight."""
    sizes = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, num_key_value_heads=1, intermediate_size=48))


def mamba() -> nn.Module:
    """No attention: state spaces, whose code reads some projections past their layers."""
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=40, hidden_size=32, state_size=4, num_hidden_layers=2))


def biogpt() -> nn.Module:
    """Its head, which is tied, has a name of its own."""
    sizes = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.BioGptForCausalLM(hf.BioGptConfig(**sizes, intermediate_size=48, max_position_embeddings=32))


def opt() -> nn.Module:
    """It looks positions up in a table by what a mask says, not by what it is given."""
    sizes = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, word_embed_proj_dim=24, max_position_embeddings=32))


ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(vocab_size=80, max_position_embeddings=32, **ENCODER), add_pooling_layer=True)


def bert_for_words() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=80, max_position_embeddings=32, **ENCODER))


def bert_for_classes() -> nn.Module:
    config = hf.BertConfig(vocab_size=80, max_position_embeddings=32, num_labels=3, **ENCODER)
    return hf.BertForSequenceClassification(config)


def roberta() -> nn.Module:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(vocab_size=80, max_position_embeddings=40, **ENCODER))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=4, num_labels=5, **ENCODER))


def clip() -> nn.Module:
    text = {"vocab_size": 80, "max_position_embeddings": 32, "eos_token_id": 2, **ENCODER}
    vision = {"image_size": 16, "patch_size": 4, **ENCODER}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def clip_pairs(model: nn.Module) -> Tensor:
    seen = model(input_ids=TOKENS, pixel_values=PIXELS)
    return torch.cat([seen.text_embeds.flatten(), seen.image_embeds.flatten()])


def t5() -> nn.Module:
    sizes = {"vocab_size": 80, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes))


def t5_untied() -> nn.Module:
    sizes = {"vocab_size": 80, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **gated))


def bart() -> nn.Module:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _BART_SIDE.items()}
    return hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=80, d_model=32, max_position_embeddings=32, **sides)
    )


_BART_SIDE = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


def whisper() -> nn.Module:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _BART_SIDE.items()}
    lengths = {"max_source_positions": 20, "max_target_positions": 32, "num_mel_bins": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(vocab_size=80, d_model=32, **lengths, **tokens, **sides)
    return hf.WhisperForConditionalGeneration(config)


def heard(model: nn.Module) -> Tensor:
    return model(input_features=SPEECH, decoder_input_ids=TOKENS).logits


def llava() -> nn.Module:
    """It sees and reads; its checkpoints keep the names of older versions."""
    vision = hf.CLIPVisionConfig(image_size=16, patch_size=8, **ENCODER)
    sizes = {"vocab_size": 80, "num_key_value_heads": 2, "head_dim": 16, **ENCODER}
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**sizes), image_token_index=79, vision_feature_layer=-1
    )
    return hf.LlavaForConditionalGeneration(config)


def described(model: nn.Module) -> Tensor:
    tokens = torch.cat([torch.full((1, 4), 79), TOKENS], 1)
    return model(input_ids=tokens, pixel_values=PIXELS, attention_mask=torch.ones_like(tokens)).logits


def _blip_parts() -> dict[str, Any]:
    text = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48}
    return {
        "vision_config": {"image_size": 16, "patch_size": 8, **ENCODER},
        "qformer_config": {"vocab_size": 80, "encoder_hidden_size": 32, **ENCODER},
        "text_config": hf.OPTConfig(**text, word_embed_proj_dim=32, max_position_embeddings=32).to_dict(),
        "num_query_tokens": 4,
        "image_token_index": 79,
    }


def blip2() -> nn.Module:
    """Its language model is whole inside it, with the head."""
    return _with_queries(hf.Blip2ForConditionalGeneration(hf.Blip2Config(**_blip_parts())))


def instructblip() -> nn.Module:
    """Likewise, and a second part of it reads, with a table of its own."""
    return _with_queries(hf.InstructBlipForConditionalGeneration(hf.InstructBlipConfig(**_blip_parts())))


def _with_queries(model: nn.Module) -> nn.Module:
    """They are made as zeros, of which a norm makes any change the whole."""
    nn.init.normal_(model.query_tokens, std=0.02)
    return model


def instructed(model: nn.Module) -> Tensor:
    tokens = torch.cat([torch.full((1, 4), 79), TOKENS], 1)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return model(**inputs, pixel_values=PIXELS, qformer_input_ids=TOKENS).logits


ZOO: Mapping[str, Kind] = {
    "gpt2": Kind(gpt2, hf.AutoModelForCausalLM, logits),
    "gpt-neox": Kind(neox, hf.AutoModelForCausalLM, logits),
    "opt": Kind(opt, hf.AutoModelForCausalLM, logits),
    "biogpt": Kind(biogpt, hf.AutoModelForCausalLM, logits),
    "mamba": Kind(mamba, hf.AutoModelForCausalLM, logits),
    "gemma3": Kind(gemma3, hf.AutoModelForCausalLM, logits),
    "bert": Kind(bert, hf.AutoModel, hidden),
    "bert-masked-words": Kind(bert_for_words, hf.AutoModelForMaskedLM, logits),
    "bert-classes": Kind(bert_for_classes, hf.AutoModelForSequenceClassification, logits),
    "roberta": Kind(roberta, hf.AutoModelForMaskedLM, logits),
    "vit": Kind(vit, hf.AutoModelForImageClassification, lambda model: model(pixel_values=PIXELS).logits),
    "clip": Kind(clip, hf.AutoModel, clip_pairs),
    "llava": Kind(llava, hf.AutoModelForImageTextToText, described),
    "blip-2": Kind(blip2, hf.AutoModelForImageTextToText, described),
    "instructblip": Kind(instructblip, hf.AutoModelForImageTextToText, instructed),
    "t5": Kind(t5, hf.AutoModelForSeq2SeqLM, translated),
    "t5-untied": Kind(t5_untied, hf.AutoModelForSeq2SeqLM, translated),
    "bart": Kind(bart, hf.AutoModelForSeq2SeqLM, translated),
    "whisper": Kind(whisper, hf.AutoModelForSpeechSeq2Seq, heard),
}

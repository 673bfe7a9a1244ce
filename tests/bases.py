"""Tiny bases with random weights: decoders of three families in memory, and on disk with a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

QUICKSTART = Path(__file__).resolve().parent.parent / "train" / "quickstart"
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,  # pre-activations vary by about one
}


def tiny_neox(*, seed: int = 0, **settings: Any) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of three layers of width 16, with two-matrix MLPs of width 64 unless `settings` say otherwise."""
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES | {"intermediate_size": 64} | settings)).eval()


def tiny_llama(*, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A Llama of three layers of width 16, with gated MLPs of width 40 unless `settings` say otherwise."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 40} | settings)).eval()


def tiny_gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2, whose linear layers keep their weights transposed."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2)).eval()


def write_base(folder: Path) -> Path:
    """A GPT-NeoX of two layers with MLPs of width 32, and the quickstart base's tokenizer."""
    vocabulary = json.loads((QUICKSTART / "config.json").read_text())["vocab_size"]
    tiny_neox(vocab_size=vocabulary, num_hidden_layers=2, intermediate_size=32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(QUICKSTART / name, folder / name)
    return folder


def write_base_of_words(folder: Path, base: PreTrainedModel, words: list[str], splitter: PreTokenizer) -> Path:
    """A base with a tokenizer of one token a word: 0 at the end of a text and for other words, then `words` in order.

    Args:
        folder, base: what is written where.
        words: the vocabulary.
        splitter: what cuts a text into words.
    """
    base.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = splitter
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_input_names=inputs).save_pretrained(
        folder
    )
    return folder

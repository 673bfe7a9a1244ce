"""What several test files start from: small decoders with random weights, and the base that ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from bilinear_tc.train.base import Base

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def neox() -> Base:
    """Three layers of width 16, two-matrix MLPs of width 64 whose pre-activations vary by about one."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.25,
    )
    return Base(GPTNeoXForCausalLM(config), tokenizer=None)


@pytest.fixture
def llama() -> Base:
    """Two layers of width 16 with gated MLPs of width 40."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.25,
    )
    return Base(LlamaForCausalLM(config), tokenizer=None)

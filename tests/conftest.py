"""What several test files start from: small decoders with random weights, and the base that ships."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from fitting import ForkServer, TinyFit, write_base, write_text
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from bilinear_tc.train.base import Base

REPOSITORY = Path(__file__).resolve().parent.parent
QUICKSTART_COMMAND = "accelerate launch train/fit.py --recipe quickstart"  # as the README prints it


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


@dataclass(frozen=True)
class QuickstartRun:
    """The README's quickstart, as it went: its run and what it printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> QuickstartRun:
    """The quickstart command, once for all tests."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    program, *arguments = QUICKSTART_COMMAND.split()
    command = [Path(sys.executable).with_name(program), *arguments, "--output_dir", folder]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return QuickstartRun(folder, finished.stdout)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts fits by forking a process that has imported everything."""
    server = ForkServer(tmp_path_factory.mktemp("fits"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_fit(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> TinyFit:
    """A fit of a tiny base on local text that takes seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    write_text(folder / "text")
    return TinyFit(fork_server, write_base(folder / "base"), folder / "text", folder)

"""What a process of a fit holds, and how long a step takes, with all layers on every process and with them shared out.

    accelerate launch --cpu --num_processes 4 train/studies/shards.py

The base is a GPT-NeoX with random weights, the text random tokens. Both ways run in turns: the ratio of their times
means something on a busy machine too. With glibc, MALLOC_MMAP_THRESHOLD_=262144 gives freed memory back at once, so
that what a process has grown by is what it holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from bilinear_tc.train.base import Base, base_location
from bilinear_tc.train.errors import command_line
from bilinear_tc.train.fitting.fitter import Fitter, layer_bytes
from bilinear_tc.train.processes import is_main, on_all, process_count, process_index, start_accelerator
from bilinear_tc.train.recipe import Recipe, option, parse_settings
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.batches import TokenBatch

MIB = 2**20


@dataclass
class ShardsSettings:
    """What to hold and time."""

    width: int = option(512, "The base's width.")
    layers: int = option(8, "Its layers.")
    batch_size: int = option(16, "Sequences a step, over all processes.")
    seq_len: int = option(64, "Tokens a sequence.")
    steps: int = option(3, "Steps timed each way, after one that is not.")


def held(fitter: Fitter) -> dict[str, float]:
    """MiB of the tensors that a fitter holds from step to step."""
    states = [state for optimizer in fitter.optimizers for state in optimizer.state.values()]
    parameters, activations = list(fitter.stack.parameters.values()), fitter.activations
    tensors: dict[str, Sequence[Tensor]] = {
        "parameters": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "momentum": [tensor for state in states for tensor in state.values()],
        "activations": [activations.x, activations.y, activations.weights, activations.ordinary],
    }
    return {kind: sum(t.numel() * t.element_size() for t in of_kind) / MIB for kind, of_kind in tensors.items()}


def resident() -> float:
    """MiB of this process in memory."""
    return psutil.Process().memory_info().rss / MIB


def main() -> None:
    settings = parse_settings(ShardsSettings)
    device = start_accelerator().device
    size, layers = settings.width, settings.layers
    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=size,
        intermediate_size=4 * size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=settings.seq_len,
    )
    with torch.device(device):
        model = GPTNeoXForCausalLM(config)
    base = Base(model, AutoTokenizer.from_pretrained(base_location("train/quickstart")))
    recipe = Recipe(init="random", batch_size=settings.batch_size, seq_len=settings.seq_len)
    ids = torch.randint(512, (settings.batch_size, settings.seq_len), generator=torch.Generator().manual_seed(0))
    start, end = (n * len(ids) // process_count() for n in (process_index(), process_index() + 1))
    batch = TokenBatch(ids[start:end].to(device))

    fitters: dict[str, Fitter] = {}
    for way in ("layers", "none")[process_count() == 1 :]:
        before = resident()
        fitters[way] = Fitter(recipe, base, device, shard=Shard(layers, shared_out=way == "layers"))
        fitters[way].step(batch, 0)
        kinds = held(fitters[way])
        own, state = sum(kinds.values()) - kinds["activations"], layers * layer_bytes(recipe, base) / MIB
        parts = 1 if way == "none" else process_count()
        told = ", ".join(f"{kind} {mib:.0f}" for kind, mib in kinds.items())
        line = (
            f"--shard {way}, process {process_index()}: {told} MiB; without activations {own:.0f}, "
            f"{own * parts / state:.3f} of the state / {parts}; grown by {resident() - before:.0f} MiB"
        )
        lines = on_all(partial(str, line))
        if is_main():
            print(*lines, sep="\n")

    seconds: dict[str, list[float]] = {way: [] for way in fitters}
    for number in range(1, settings.steps + 1):
        for way, fitter in fitters.items():
            on_all(lambda: None)
            started = time.perf_counter()
            fitter.step(batch, number)
            on_all(lambda: None)
            seconds[way].append(time.perf_counter() - started)
    if is_main():
        times = {way: median(of_way) for way, of_way in seconds.items()}
        print(", ".join(f"--shard {way}: {s:.2f} s a step" for way, s in times.items()))
        if len(times) > 1:
            print(f"shared out, a step takes {times['layers'] / times['none']:.2f} times as long")


if __name__ == "__main__":
    command_line(main)

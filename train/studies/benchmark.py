"""Where a fit's time goes on the device at hand, beside the way the published set was fitted, in one run.

    python train/studies/benchmark.py --shape quickstart

The baseline fits one layer a run: a full forward pass with the LM head, activations through the CPU,
torch.optim.Muon, float32. `--shape pythia-410m` has random weights: speed does not depend on them.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from bilinear_tc.train.base import Base, base_location
from bilinear_tc.train.errors import command_line
from bilinear_tc.train.fitting.fitter import CARD_BETAS, Fitter, make_transcoders
from bilinear_tc.train.fitting.muon import flops as muon_flops
from bilinear_tc.train.fitting.muon import newton_schulz_dtype, restart_interval
from bilinear_tc.train.processes import start_accelerator
from bilinear_tc.train.recipe import Recipe, named_recipe, option, parse_settings
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.train.text.source import SharedBatches, open_batches

PHASES = ("data", "base", "statistics", "transcoders", "optimizer")


@dataclass
class BenchmarkSettings:
    """What to time."""

    shape: Literal["quickstart", "pythia-410m"] = option("quickstart", "The recipe to time.")
    steps: int = option(10, "Steps timed, after two that are not.")
    baseline_steps: int = option(3, "Steps timed of each baseline layer, after one.")
    baseline_layers: int | None = option(
        None, "Layers the baseline is timed on, the others taken to cost their mean; all, or 1 for Pythia."
    )
    text_tokens: int = option(2_000_000, "Tokens the text pipeline alone is timed on.")
    batch_size: int | None = option(None, "Sequences a step, in place of the recipe's.")
    micro_batch_size: int | None = option(None, "As in the recipe.")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


class PhaseTimer:
    """Seconds of each phase of each step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        synchronize(self.device)
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[phase].append(time.perf_counter() - started)


@dataclass
class FlopCount:
    """Floating-point operations of one step, a multiply-add counted as two."""

    base: float
    transcoders: float
    muon: float

    @property
    def total(self) -> float:
        return self.base + self.transcoders + self.muon


def base_flops(config: GPTNeoXConfig, layers: int, tokens: int, seq_len: int, *, lm_head: bool) -> float:
    """Forward pass: the weights of attention (4·d²) and MLP (2·d·width), the causal half of QKᵀ and of its product."""
    d = config.hidden_size
    weights = layers * (4 * d * d + 2 * d * config.intermediate_size) + lm_head * d * config.vocab_size
    return 2.0 * tokens * (weights + layers * d * seq_len)


def transcoder_flops(n_inputs: int, n_hidden: int, n_outputs: int, tokens: int) -> float:
    """Forward pass, the three weight gradients, and the head's input gradient."""
    weights = 2 * n_inputs * n_hidden + n_hidden * n_outputs
    return 2.0 * tokens * (2 * weights + n_hidden * n_outputs)


def count_flops(recipe: Recipe, base: Base, config: GPTNeoXConfig) -> FlopCount:
    """What one step of the fit has to compute."""
    tokens, layers = recipe.batch_size * recipe.seq_len, len(base.layers)
    muon_dtype = newton_schulz_dtype(torch.empty(0, device=base.model.device))
    hidden = recipe.n_hidden(base.n_inputs)
    return FlopCount(
        base_flops(config, base.layers[-1] + 1, tokens, recipe.seq_len, lm_head=False),
        layers * transcoder_flops(base.n_inputs, hidden, base.n_outputs, tokens),
        layers * 3 * muon_flops(hidden, base.n_inputs, restart=restart_interval(hidden, base.n_inputs, muon_dtype)),
    )


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = [timed(lambda: a @ b, device) for _ in range(8)][2:]
    return 2.0 * n**3 / median(seconds)


def load_base(settings: BenchmarkSettings, recipe: Recipe, device: torch.device) -> Base:
    """The quickstart's base, or one of Pythia-410m's shape with random weights and the quickstart's tokenizer."""
    if settings.shape == "quickstart":
        return Base.of_recipe(recipe, device)
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=2048,
        rotary_pct=0.25,  # type: ignore[call-arg] # read by every version, declared by 4
    )
    with torch.device(device):
        model = GPTNeoXForCausalLM(config)
    model.to(recipe.compute_dtype(device))  # type: ignore[arg-type] # transformers hides the types of `to`
    return Base(model, AutoTokenizer.from_pretrained(base_location("train/quickstart")))


def open_text(recipe: Recipe, base: Base, device: torch.device) -> SharedBatches:
    """Batches of the shape's size from Python's standard library, whichever text its recipe names."""
    text = dataclasses.replace(
        recipe, dataset="python-stdlib", dataset_config=None, split="train", text_column="text", shuffle_buffer=0
    )
    return open_batches(text, base.tokenizer, device)


def time_steps(fitter: Fitter, batches: Iterator[TokenBatch], steps: int) -> float:
    """Median seconds of a step, its wait for the text included, after two that are not timed."""

    def step(number: int) -> None:
        with fitter.timer("data"):
            batch = next(batches)
        fitter.step(batch, number)

    seconds = [timed(partial(step, number), fitter.device) for number in range(steps + 2)]
    return median(seconds[2:])


class LayerAtATime:
    """The published set's way to fit one layer, as a baseline: nothing of it is shared between layers."""

    def __init__(self, recipe: Recipe, base: Base, layer: int, device: torch.device) -> None:
        self.base, self.layer, self.device = base, layer, device
        single = dataclasses.replace(recipe, init="random")
        self.transcoder = next(t for t in make_transcoders(single, base, device) if t.config.layer_index == layer)
        matrices = [p for p in self.transcoder.parameters() if p.ndim == 2]
        biases = [p for p in self.transcoder.parameters() if p.ndim == 1]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(biases, lr=3e-4, betas=CARD_BETAS, weight_decay=0.0),
        ]

    def step(self, batch: TokenBatch) -> None:
        captured: list[Tensor] = []

        def to_cpu(_mlp: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            captured.extend(t.float().cpu().flatten(0, 1) for t in (inputs[0], output))

        handle = self.base.mlp(self.layer).register_forward_hook(to_cpu)
        with torch.no_grad():
            self.base.model(input_ids=batch.input_ids.to(self.device))
        handle.remove()
        x, y = (t.to(self.device) for t in captured)
        x, z = ((t - t.mean(0)) / t.std(0) for t in (x, y))
        loss = nn.functional.mse_loss(self.transcoder.normalized_forward(x), z)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # the published code notes each step's


def time_baseline(
    recipe: Recipe, base: Base, layers: list[int], batches: list[TokenBatch], device: torch.device
) -> float:
    """Mean over the layers of the median seconds of a baseline step of one layer."""
    seconds = []
    for layer in layers:
        baseline = LayerAtATime(recipe, base, layer, device)
        seconds.append(median([timed(partial(baseline.step, batch), device) for batch in batches][1:]))
    return sum(seconds) / len(seconds)


def text_rate(batches: Iterator[TokenBatch], tokens: int) -> float:
    """Tokens a second of the text pipeline alone, reading and tokenizing processes started beforehand."""
    next(batches)
    started, read = time.perf_counter(), 0
    while read < tokens:
        read += next(batches).input_ids.numel()
    return read / (time.perf_counter() - started)


def peak_memory(device: torch.device) -> float:
    """Bytes: the device's, or this process's if it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def smaller_fits(recipe: Recipe, base: Base, batch: TokenBatch, device: torch.device) -> Iterator[str]:
    """A line for each of three numbers of tokens, then of three numbers of layers, down to which the base is cut."""
    sizes = [(len(base.layers), share) for share in (4, 2, 1)]
    sizes += [(len(base.layers) * share // 6, 1) for share in (4, 2)]
    for count, share in sizes:
        base.layers = base.layers[:count]
        base.stop_after_last_layer()
        part = TokenBatch(batch.input_ids[: len(batch) // share])
        seconds = time_steps(Fitter(recipe, base, device), repeat(part), 5)
        yield f"  {count:3d} layers, {part.input_ids.numel():7,d} tokens: {seconds:8.3f} s a step"


def main() -> None:
    settings = parse_settings(BenchmarkSettings)
    device = start_accelerator().device
    recipe = named_recipe(settings.shape)
    recipe = dataclasses.replace(
        recipe,
        batch_size=settings.batch_size or recipe.batch_size,
        micro_batch_size=settings.micro_batch_size or recipe.micro_batch_size,
    )
    dtype = recipe.compute_dtype(device)
    base = load_base(settings, recipe, device)
    config, layers = base.model.config, list(base.layers)
    tokens = recipe.batch_size * recipe.seq_len
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rate = product_rate(device, dtype)
    print(f"{settings.shape}: {len(layers)} layers, {tokens:,} tokens a step, {str(dtype)[6:]}, on {name}")
    print(f"large matrix product: {rate / 1e12:.3f} TFLOP/s")

    fitter = Fitter(recipe, base, device)
    with open_text(recipe, base, device) as text:
        batches = [next(text) for _ in range(settings.baseline_steps + 1)]
        seconds = time_steps(fitter, text, settings.steps)
        early_peak = peak_memory(device)
        timer = PhaseTimer(device)
        fitter.timer = timer
        time_steps(fitter, text, settings.steps)
    flops = count_flops(recipe, base, config)
    achieved = flops.total / seconds
    print(f"\na step: {seconds:.3f} s, {achieved / 1e12:.3f} TFLOP/s, {achieved / rate:.0%} of the product's")
    counted = {"base": flops.base, "transcoders": flops.transcoders, "optimizer": flops.muon}
    total = sum(median(timer.seconds[phase][2:]) for phase in PHASES)
    print(f"  {'phase':12s} {'seconds':>9s} {'share':>6s} {'GFLOP':>10s} {'TFLOP/s':>8s}")
    for phase in PHASES:
        spent, work = median(timer.seconds[phase][2:]), counted.get(phase)
        counts = f"{work / 1e9:10.1f} {work / spent / 1e12:8.3f}" if work else ""
        label = "Muon, AdamW" if phase == "optimizer" else phase
        print(f"  {label:12s} {spent:9.4f} {spent / total:6.1%} {counts}")
    late_peak = peak_memory(device)
    print(f"peak memory: {early_peak / 2**30:.2f} GiB; after as many steps again {late_peak / 2**30:.2f} GiB")
    minutes = recipe.max_steps * seconds / 60
    print(
        f"the full recipe, {recipe.max_steps} steps: {minutes:.1f} minutes for all layers, start and checkpoints apart"
    )

    with open_text(recipe, base, device) as text:
        pipeline = text_rate(text, settings.text_tokens)
    surplus = pipeline * seconds / tokens
    print(f"\ntext pipeline alone: {pipeline:,.0f} tokens/s, {surplus:.1f} times what the fit consumes")

    count = settings.baseline_layers or (len(layers) if settings.shape == "quickstart" else 1)
    base.model.float()
    with torch.compiler.set_stance("force_eager"):
        one_layer = time_baseline(recipe, base, layers[:count], batches, device)
    hidden = recipe.n_hidden(base.n_inputs)
    baseline_flops = len(layers) * (
        base_flops(config, config.num_hidden_layers, tokens, recipe.seq_len, lm_head=True)
        + transcoder_flops(base.n_inputs, hidden, base.n_outputs, tokens)
        + 3 * muon_flops(hidden, base.n_inputs)
    )
    print(
        f"\nlayer at a time, timed on {count} of {len(layers)} layers: {one_layer:.3f} s a step a layer, "
        f"{one_layer * len(layers):.3f} s for all\n"
        f"all layers in one pass are {one_layer * len(layers) / seconds:.1f} times faster; "
        f"the FLOP counts' ratio is {baseline_flops / flops.total:.1f}"
    )

    base.model.to(dtype)
    print("\ncost by tokens and layers:")
    for line in smaller_fits(recipe, base, batches[0], device):
        print(line)


if __name__ == "__main__":
    command_line(main)

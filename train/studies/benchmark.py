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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, repeat
from statistics import fmean, median
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base, base_location
from bilinear_tc.train.errors import command_line
from bilinear_tc.train.fitting.fitter import CARD_BETAS, Fitter, make_transcoders
from bilinear_tc.train.fitting.joint import JointFitter
from bilinear_tc.train.processes import start_accelerator
from bilinear_tc.train.recipe import Recipe, named_recipe, option, parse_settings
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.train.text.source import SharedBatches, open_batches

PHASES = ("data", "base", "statistics", "transcoders", "optimizer")
# Attention's products on the CPU, which torch counts for GPUs alone.
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **_options: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **_options: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


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


@contextmanager
def timed(seconds: list[float], device: torch.device) -> Iterator[None]:
    """Appends the seconds that the block takes, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    wait(device)
    started = time.perf_counter()
    yield
    wait(device)
    seconds.append(time.perf_counter() - started)


def median_seconds(calls: Iterable[Callable[[], object]], device: torch.device, *, untimed: int) -> float:
    """Median of the seconds that calls take, but for the first ones."""
    seconds: list[float] = []
    for call in calls:
        with timed(seconds, device):
            call()
    return median(seconds[untimed:])


@contextmanager
def counted(flops: dict[str, float], phase: str) -> Iterator[None]:
    """Notes the block's floating-point operations: a multiply-add is two, and attention's masked half counts too."""
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with torch.compiler.set_stance("force_eager"), counter:
        yield
    flops[phase] = counter.get_total_flops()


def count_flops(fitter: Fitter, batch: TokenBatch) -> dict[str, float]:
    """The operations of a step of the fit by its phases."""
    flops: dict[str, float] = {}
    fitter.timer = partial(counted, flops)
    fitter.step(batch, 0)
    return flops


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2.0 * n**3 / median_seconds([lambda: a @ b] * 8, device, untimed=2)


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

    return median_seconds((partial(step, number) for number in range(steps + 2)), fitter.device, untimed=2)


def layer_at_a_time(base: Base, transcoder: BilinearTC, device: torch.device) -> Callable[[TokenBatch], None]:
    """A step of the published set's way to fit one layer, as a baseline: nothing of it is shared between layers."""
    matrices, biases = ([p for p in transcoder.parameters() if p.ndim == ndim] for ndim in (2, 1))
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(biases, lr=3e-4, betas=CARD_BETAS, weight_decay=0.0),
    ]

    def step(batch: TokenBatch) -> None:
        captured: list[Tensor] = []

        def to_cpu(_mlp: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            captured.extend(t.float().cpu().flatten(0, 1) for t in (inputs[0], output))

        with base.mlp(transcoder.config.layer_index).register_forward_hook(to_cpu), torch.no_grad():
            base.model(input_ids=batch.input_ids.to(device))
        x, y = (t.to(device) for t in captured)
        x, z = ((t - t.mean(0)) / t.std(0) for t in (x, y))
        loss = nn.functional.mse_loss(transcoder.normalized_forward(x), z)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # the published code notes each step's

    return step


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


def derivative_cost(recipe: Recipe, base: Base, batches: Sequence[TokenBatch], device: torch.device) -> float:
    """What a step with the derivative in the loss costs, as a multiple of one without: the median over turns."""
    with_it, without = (Fitter(dataclasses.replace(recipe, jvp=weight), base, device) for weight in (0.1, 0.0))
    turns = [[time_steps(f, repeat(batch), 1) for f in (with_it, without)] for batch in batches]
    return median(a / b for a, b in turns)


def joint_step(fitter: Fitter, batches: Sequence[TokenBatch], seconds: float, flops: float) -> str:
    """A line on a step of the joint finish, beside one of the fit that takes so long and so many operations."""
    fitter.stack.set_statistics()
    recipe = dataclasses.replace(fitter.recipe, finish="joint", finish_steps=fitter.recipe.max_steps)
    joint = JointFitter(recipe, fitter.stack.transcoders, fitter.base, fitter.device)
    own_seconds = time_steps(joint, cycle(batches), len(batches))
    own = sum(count_flops(joint, batches[0]).values())
    return (
        f"a step of the joint finish: {own_seconds:.3f} s, {own_seconds / seconds:.2f} times the fit's; "
        f"{own / 1e9:.1f} GFLOP, {own / flops:.2f} times; {own / own_seconds / 1e12:.3f} TFLOP/s"
    )


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
    sizes = {name: getattr(settings, name) or getattr(recipe, name) for name in ("batch_size", "micro_batch_size")}
    recipe = dataclasses.replace(recipe, **sizes)
    dtype = recipe.compute_dtype(device)
    base = load_base(settings, recipe, device)
    layers = len(base.layers)
    tokens = recipe.batch_size * recipe.seq_len
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rate = product_rate(device, dtype)
    print(f"{settings.shape}: {layers} layers, {tokens:,} tokens a step, {str(dtype)[6:]}, on {name}")
    print(f"large matrix product: {rate / 1e12:.3f} TFLOP/s")

    fitter = Fitter(recipe, base, device)
    spent: dict[str, list[float]] = defaultdict(list)
    first: list[float] = []
    with open_text(recipe, base, device) as text:
        batches = [next(text) for _ in range(settings.baseline_steps + 1)]
        with timed(first, device):
            fitter.step(batches[0], 0)
        seconds = time_steps(fitter, text, settings.steps)
        early_peak = peak_memory(device)
        fitter.timer = lambda phase: timed(spent[phase], device)
        time_steps(fitter, text, settings.steps)
    late_peak = peak_memory(device)
    flops = count_flops(fitter, batches[0])
    total = sum(flops.values())
    achieved = total / seconds
    print(f"\nthe first step, what it compiles included: {first[0]:.1f} s")
    print(f"a step: {seconds:.3f} s, {achieved / 1e12:.3f} TFLOP/s, {achieved / rate:.0%} of the product's")
    print(f"its arithmetic alone, {total / 1e12:.3f} TFLOP at the product's rate: {total / rate:.3f} s")
    print(f"{fitter.micro_batch_size} sequences pass the base at once, {fitter.micro_rows:,} rows the transcoders")
    medians = {phase: median(spent[phase][2:]) for phase in PHASES}
    print(f"  {'phase':12s} {'seconds':>9s} {'share':>6s} {'GFLOP':>10s} {'TFLOP/s':>8s}")
    for phase in PHASES:
        share, work = medians[phase] / sum(medians.values()), flops.get(phase)
        counts = f"{work / 1e9:10.1f} {work / medians[phase] / 1e12:8.3f}" if work else ""
        label = "Muon, AdamW" if phase == "optimizer" else phase
        print(f"  {label:12s} {medians[phase]:9.4f} {share:6.1%} {counts}")
    print(f"peak memory: {early_peak / 2**30:.2f} GiB; after as many steps again {late_peak / 2**30:.2f} GiB")
    minutes = recipe.max_steps * seconds / 60
    print(
        f"the full recipe, {recipe.max_steps} steps: {minutes:.1f} minutes for all layers, start and checkpoints apart"
    )

    print(joint_step(fitter, batches, seconds, total))
    print(f"peak memory: {peak_memory(device) / 2**30:.2f} GiB")
    cost = derivative_cost(recipe, base, batches, device)
    print(f"a step with --jvp costs {cost:.2f} times one without")

    with open_text(recipe, base, device) as text:
        pipeline = text_rate(text, settings.text_tokens)
    surplus = pipeline * seconds / tokens
    print(f"\ntext pipeline alone: {pipeline:,.0f} tokens/s, {surplus:.1f} times what the fit consumes")

    count = settings.baseline_layers or (layers if settings.shape == "quickstart" else 1)
    base.model.float()
    with torch.compiler.set_stance("force_eager"):
        steps = [layer_at_a_time(base, t, device) for t in make_transcoders(recipe, base, device)[:count]]
        one_layer = fmean(median_seconds([partial(step, b) for b in batches], device, untimed=1) for step in steps)
    baseline: dict[str, float] = {}
    with counted(baseline, "layer"):
        steps[0](batches[0])
    print(
        f"\nlayer at a time, timed on {count} of {layers} layers: {one_layer:.3f} s a step a layer, "
        f"{one_layer * layers:.3f} s for all\n"
        f"all layers in one pass are {one_layer * layers / seconds:.1f} times faster; "
        f"the FLOP counts' ratio is {baseline['layer'] * layers / total:.1f}"
    )

    base.model.to(dtype)
    print("\ncost by tokens and layers:")
    for line in smaller_fits(recipe, base, batches[0], device):
        print(line)


if __name__ == "__main__":
    command_line(main)

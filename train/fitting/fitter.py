"""The fit of all layers together: its start, one optimizer step, and the state and history that it goes on from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.fitting.closed_form import closed_form_start
from bilinear_tc.train.fitting.muon import Muon
from bilinear_tc.train.fitting.schedule import schedule
from bilinear_tc.train.fitting.stack import Stack
from bilinear_tc.train.fitting.tangents import Tangents
from bilinear_tc.train.moments import check_finite
from bilinear_tc.train.processes import is_main, on_all, process_count
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.batches import TokenBatch

CARD_BETAS = (0.95, 0.95)
CPU_ROWS = 2048  # a transcoder's hidden units for more rows than this fall out of the cache, at 15% of its time
CPU_BASE_ROWS = 4096  # more rows make the base no faster


class Fitter:
    """The transcoders of a base's layers under fit: of this process's own, if they are shared out.

    Args:
        recipe: the settings.
        base: the decoder, on the device.
        device: where to compute.
        timer: called with the name of each phase of a step (base, statistics, transcoders, optimizer); the context
            it returns spans the phase.
        shard: which layers are this process's own; default: all are every process's.

    Attributes:
        held: the layers that this process holds, counted from 0 among all.
        written: those whose files it writes.
        shown: scores of the last step, beside those that `step` returns, by name.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        device: torch.device,
        timer: Callable[[str], AbstractContextManager] = lambda _phase: nullcontext(),
        shard: Shard | None = None,
    ) -> None:
        self.recipe, self.base, self.device, self.timer = recipe, base, device, timer
        self.shard = shard or Shard(len(base.layers))
        self.held, self.written = self.shard.own, Shard(len(base.layers), shared_out=True).own
        self.shown: dict[str, float] = {}
        dtype = recipe.compute_dtype(device)
        compiled = device.type == "cuda" if recipe.compile is None else recipe.compile
        torch.manual_seed(recipe.seed)
        transcoders = make_transcoders(recipe, base, device, self.shard.own)
        self.stack = Stack(transcoders, dtype=dtype, compile=compiled)
        share = -(-recipe.batch_size // process_count())
        rows = self.shard.sequences(recipe.batch_size) * recipe.seq_len
        self.activations = Activations(base, rows, device=device, dtype=dtype, compile=compiled, shard=self.shard)
        self.micro_batch_size = recipe.micro_batch_size or choose_micro_batch_size(recipe, base, share, device, dtype)
        self.optimizers = make_optimizers(recipe, self.stack)
        own = self.shard.of(base)
        self.tangents = Tangents(own, recipe.seed, dtype, self.shard.own.start) if recipe.jvp else None
        if compiled:
            base.compile()

    @property
    def micro_rows(self) -> int:
        """Rows that the transcoders work on at once."""
        rows = self.micro_batch_size * self.recipe.seq_len
        return min(rows, CPU_ROWS) if self.device.type == "cpu" else rows

    def start(self, batches: Sequence[TokenBatch]) -> int:
        """The closed-form start, on a calibration sample; returns the sample's tokens, over all processes."""

        rows = 0

        def calibration(what: str) -> Iterator[Activations]:
            nonlocal rows
            rows = 0
            for batch in tqdm(batches, f"closed form, {what}", unit="batch", disable=not is_main(), leave=False):
                self.activations.fill(batch, self.micro_batch_size)
                rows += self.activations.count()
                yield self.activations

        with self.shard.alone():
            own = self.shard.of(self.base)
            closed_form_start(self.stack, own, calibration, self.tangents, self.recipe.jvp or 0.0)
        return rows

    def step(self, batch: TokenBatch, number: int) -> tuple[Tensor, Tensor, int]:
        """One optimizer step. NotFiniteError on a NaN in the base's activations, before anything is updated.

        Args:
            batch: this process's share of the global batch.
            number: steps made before it.

        Returns:
            Mean squared error [layers] and FVU [layers] on the batch's z-scored outputs, before the update, float64
            on the CPU; and the rows of the global batch.
        """
        with self.timer("base"):
            self.activations.fill(batch, self.micro_batch_size)
        with self.timer("statistics"), self.shard.alone():
            self.stack.weigh(self.activations)
            inputs, outputs = (moments.over_processes() for moments in self.activations.moments())
            check_finite(inputs, outputs, self.base.layers, f"step {number + 1}", self.shard.gather)
            self.stack.inputs, self.stack.outputs = self.stack.inputs.merge(inputs), self.stack.outputs.merge(outputs)
            rows, batch_deviation = self.activations.count(), outputs.deviation
            if self.recipe.normalization == "running":
                inputs, outputs = self.stack.inputs, self.stack.outputs
        with self.timer("transcoders"), self.shard.alone():
            if self.tangents is not None:
                self.tangents.begin(number, self.activations)
            errors = self.stack.accumulate(
                self.activations, inputs, outputs, rows, self.micro_rows, self.tangents, self.recipe.jvp or 0.0
            )
            mse = errors / (rows * outputs.mean.shape[-1])
            fvu = errors / (batch_deviation / outputs.std.square()).sum(-1)
            scores = self.shard.gather(torch.stack([mse, fvu], 1))
            mse, fvu = scores.cpu().unbind(1)  # before the update, so that the next pass is queued while it runs
        self.update(number)
        return mse, fvu, rows

    def update(self, number: int) -> None:
        """Steps along the gradients, after `number` steps before."""
        with self.timer("optimizer"), self.shard.alone():
            multiplier = schedule(self.recipe.lr_schedule, number, self.recipe.max_steps)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * multiplier
                optimizer.step()

    def layer_state(self, layer: int) -> dict[str, Any]:
        """What one of this process's layers, counted from 0 among all, goes on from; copies."""
        own = layer - self.held.start
        optimizers = [
            {name: value[own].clone() if value.ndim else value for name, value in optimizer.state[p].items()}
            for optimizer, p in self._optimized()
        ]
        return {"stack": self.stack.layer_state(own), "optimizers": optimizers}

    def load_layer_state(self, layer: int, state: dict[str, Any]) -> None:
        own = layer - self.held.start
        self.stack.load_layer_state(own, state["stack"])
        for (optimizer, p), of_layer in zip(self._optimized(), state["optimizers"], strict=True):
            for name, value in of_layer.items():
                if value.ndim and name not in optimizer.state[p]:
                    optimizer.state[p][name] = value.new_zeros(len(p), *value.shape, device=p.device)
                if value.ndim:
                    optimizer.state[p][name][own] = value
                else:
                    optimizer.state[p][name] = value  # AdamW's count of steps

    def _optimized(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from ((optimizer, parameter) for parameter in group["params"])

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batch_size": self.micro_batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.recipe.micro_batch_size is None:  # another choice would add up in another order
            self.micro_batch_size = state["micro_batch_size"]


class Progress:
    """What a fit has done so far.

    Attributes:
        steps: optimizer steps made.
        tokens_read: tokens read so far, the calibration sample among them.
    """

    def __init__(self, max_steps: int, layers: int) -> None:
        self.steps = 0
        self.tokens_read = 0
        self._scores = torch.zeros(max_steps, layers, 2, dtype=torch.float64)  # mean squared error and FVU
        self._tokens = torch.zeros(max_steps, dtype=torch.int64)  # read up to and including each step
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    def add(self, mse: Tensor, fvu: Tensor, rows: int) -> None:
        """Notes a step: mean squared error and FVU of each layer [layers], and the tokens of its batch."""
        self.tokens_read += rows
        self._scores[self.steps] = torch.stack([mse, fvu], dim=-1)
        self._tokens[self.steps] = self.tokens_read
        self.steps += 1

    def history(self, layer: int) -> dict[str, list]:
        """The columns of a layer's history.parquet, a value a step; `layer` counts the layers under fit."""
        mse, fvu = self._scores[: self.steps, layer].unbind(-1)
        return {
            "step": list(range(1, self.steps + 1)),
            "tokens": self._tokens[: self.steps].tolist(),
            "mse": mse.tolist(),
            "variance_explained": (1 - fvu).tolist(),
            "fvu": fvu.tolist(),
        }

    def wall_time(self) -> float:
        """Seconds of fitting so far, added up over resumes."""
        return self._seconds_before + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens_read": self.tokens_read,
            "seconds": self.wall_time(),
            "figures": self._scores[: self.steps].clone(),
            "tokens": self._tokens[: self.steps].clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.tokens_read = state["steps"], state["tokens_read"]
        self._scores[: self.steps], self._tokens[: self.steps] = state["figures"], state["tokens"]
        self._seconds_before, self._started = state["seconds"], time.perf_counter()


def make_transcoders(recipe: Recipe, base: Base, device: torch.device, kept: range | None = None) -> list[BilinearTC]:
    """One randomly initialized transcoder a layer, float32; those of the layers in `kept`, counted from 0, if given."""
    transcoders = []
    for index, layer in enumerate(base.layers):
        norm = base.norm(layer)
        transcoder = BilinearTC(
            BilinearTCConfig(
                n_inputs=base.n_inputs,
                n_hidden=recipe.n_hidden(base.n_inputs),
                n_outputs=base.n_outputs,
                bias=recipe.bias,
                form=recipe.form,
                base_model=recipe.base,
                base_revision=recipe.base_revision,
                layer_index=layer,
                mlp_path=base.mlp_path(layer),
                input_correlation=recipe.init == "mlp",  # its calibration sample tells it
                input_norm=None if norm is None else norm.kind,
            )
        ).to(device)  # type: ignore[arg-type] # transformers hides the types of `to`
        if norm is not None:
            transcoder.norm_weight.copy_(norm.weight)
            transcoder.norm_bias.copy_(norm.bias)
        if kept is None or index in kept:  # the others were drawn for the sake of those after them
            transcoders.append(transcoder)
    return transcoders


def make_optimizers(recipe: Recipe, stack: Stack) -> list[torch.optim.Optimizer]:
    """The matrices' optimizer and the biases'; each group's `peak_lr` is what the schedule multiplies."""
    matrices = [p for p in stack.parameters.values() if p.ndim == 3]
    biases = [p for p in stack.parameters.values() if p.ndim == 2]
    group = {"params": matrices, "lr": recipe.lr, "peak_lr": recipe.lr}
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.optimizer == "adamw":
        optimizers.append(torch.optim.AdamW([group], betas=CARD_BETAS, weight_decay=recipe.weight_decay))
    else:
        muon: dict[str, Any] = {"momentum": recipe.momentum, "coefficients": recipe.newton_schulz}
        optimizers.append(Muon([group], variant=recipe.optimizer, weight_decay=recipe.weight_decay, **muon))
    if biases:
        group = {"params": biases, "lr": recipe.bias_lr, "peak_lr": recipe.bias_lr}
        optimizers.append(torch.optim.AdamW([group], betas=CARD_BETAS, weight_decay=0.0))
    return optimizers


def choose_micro_batch_size(
    recipe: Recipe, base: Base, share: int, device: torch.device, dtype: torch.dtype, free: int | None = None
) -> int:
    """How many sequences a process works on at once: its share of a batch in equal parts, as few as may be.

    On a GPU a part takes at most half of the `free` bytes (default: what its memory has). A token's peak is either the
    base's (an MLP's input, output and hidden layer, attention, residual stream) or a transcoder's: its hidden units
    five times over (left, right, product and two gradients) and its inputs and outputs in float32. On the CPU the size
    depends on nothing that may change between two runs, since another one adds up in another order.
    """
    if device.type == "cuda":
        hidden, ends = recipe.n_hidden(base.n_inputs), base.n_inputs + base.n_outputs
        base_bytes = dtype.itemsize * (ends + 3 * (base.widest_map + 8 * base.n_inputs))
        transcoder_bytes = dtype.itemsize * 5 * hidden + 4 * 4 * ends
        most = int((free or free_memory(device)) / 2 / (max(base_bytes, transcoder_bytes) * recipe.seq_len))
    else:
        most = CPU_BASE_ROWS // recipe.seq_len
    return even_part(share, most)


def even_part(share: int, most: int) -> int:
    """The size of the fewest equal parts of a share, none above `most`, if that is at least 1."""
    parts = -(-share // max(1, min(share, most)))
    return -(-share // parts)  # a remainder of another size would be compiled, and add up, apart


def choose_shard(recipe: Recipe, base: Base, device: torch.device) -> Shard:
    """Which layers are this process's own, as `shard` asks. UserError if it asks to share out fewer than there are
    processes, or if a joint finish, whose layers are all in the base at once, has no room for them."""
    layers, processes = len(base.layers), process_count()
    if recipe.shard == "layers" and processes > layers:
        raise UserError(
            f"--shard layers gives each process layers of its own: expected at most {layers} processes for {layers} "
            f"layers, got {processes}; start fewer, or use --shard none"
        )
    row = (base.n_inputs + base.n_outputs) * recipe.compute_dtype(device).itemsize
    rows = -(-recipe.batch_size // processes) * recipe.seq_len
    needed, free = layers * (layer_bytes(recipe, base) + rows * row), free_memory(device)
    if joint := recipe.finish == "joint":
        needed += layers * parameter_bytes(recipe, base)  # as they were before a step
    too_large = any(on_all(lambda: needed > free))
    if joint and too_large:
        raise UserError(
            f"--finish joint holds all layers on each device: expected {needed / 2**30:.1f} GiB free for {layers} "
            f"layers, got {free / 2**30:.1f}; name fewer with --layers"
        )
    auto = recipe.shard == "auto" and too_large and processes <= layers
    shard = Shard(layers, recipe.shard == "layers" or auto)
    if processes > 1 and is_main():
        print(
            f"{'each process holds layers of its own' if shard.shared_out else 'each process holds all layers'}: "
            f"{needed / 2**30:.1f} GiB for all {layers}, {free / 2**30:.1f} GiB free"
        )
    return shard


def layer_bytes(recipe: Recipe, base: Base) -> int:
    """Bytes of a layer under fit, activations apart: parameters, gradients and the optimizer's state or, if it takes
    more, the closed form's normal equations in place of that state."""
    hidden, parameters = recipe.n_hidden(base.n_inputs), parameter_bytes(recipe, base)
    solves = recipe.init == "mlp" and recipe.finish == "none"
    equations = 8 * hidden * (hidden + base.n_outputs) if solves else 0
    return 2 * parameters + max(parameters * (2 if recipe.optimizer == "adamw" else 1), equations)


def parameter_bytes(recipe: Recipe, base: Base) -> int:
    """Bytes of a layer's matrices, in float32."""
    entering = 2 * base.n_inputs if recipe.form == "bilinear" else base.n_inputs
    return 4 * recipe.n_hidden(base.n_inputs) * (entering + base.n_outputs)


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU, among them what torch's allocator keeps for reuse; on the CPU a process's share of them."""
    if device.type == "cpu":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept

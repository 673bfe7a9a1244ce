"""The fit of all layers together: its start, one optimizer step, and the state and history that it goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.closed_form import closed_form_start
from bilinear_tc.train.fitting.muon import Muon
from bilinear_tc.train.fitting.schedule import schedule
from bilinear_tc.train.fitting.stack import Stack
from bilinear_tc.train.fitting.tangents import Tangents
from bilinear_tc.train.moments import check_finite
from bilinear_tc.train.processes import is_main, process_count
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

CARD_BETAS = (0.95, 0.95)
CPU_ROWS = 2048  # a transcoder's hidden units for more rows than this fall out of the cache, at 15% of its time
CPU_BASE_ROWS = 4096  # more rows make the base no faster


class Fitter:
    """The transcoders of a base's layers under fit.

    Args:
        recipe: the settings.
        base: the decoder, on the device.
        device: where to compute.
        timer: called with the name of each phase of a step (base, statistics, transcoders, optimizer); the context
            it returns spans the phase.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        device: torch.device,
        timer: Callable[[str], AbstractContextManager] = lambda _phase: nullcontext(),
    ) -> None:
        self.recipe, self.base, self.device, self.timer = recipe, base, device, timer
        dtype = recipe.compute_dtype(device)
        compiled = device.type == "cuda" if recipe.compile is None else recipe.compile
        torch.manual_seed(recipe.seed)
        self.stack = Stack(make_transcoders(recipe, base, device), dtype=dtype, compile=compiled)
        share = -(-recipe.batch_size // process_count())
        self.activations = Activations(base, share * recipe.seq_len, device=device, dtype=dtype, compile=compiled)
        self.micro_batch_size = recipe.micro_batch_size or choose_micro_batch_size(recipe, base, share, device, dtype)
        self.optimizers = make_optimizers(recipe, self.stack)
        self.tangents = Tangents(base, recipe.seed, dtype) if recipe.jvp else None
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

        closed_form_start(self.stack, self.base, calibration, self.tangents, self.recipe.jvp or 0.0)
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
        with self.timer("statistics"):
            self.stack.weigh(self.activations)
            inputs, outputs = (moments.over_processes() for moments in self.activations.moments())
            check_finite(inputs, outputs, self.base.layers, f"step {number + 1}")
            self.stack.inputs, self.stack.outputs = self.stack.inputs.merge(inputs), self.stack.outputs.merge(outputs)
            rows, batch_deviation = self.activations.count(), outputs.deviation
            if self.recipe.normalization == "running":
                inputs, outputs = self.stack.inputs, self.stack.outputs
        with self.timer("transcoders"):
            if self.tangents is not None:
                self.tangents.begin(number, self.activations)
            errors = self.stack.accumulate(
                self.activations, inputs, outputs, rows, self.micro_rows, self.tangents, self.recipe.jvp or 0.0
            )
            mse = errors / (rows * outputs.mean.shape[-1])
            fvu = errors / (batch_deviation / outputs.std.square()).sum(-1)
            mse, fvu = mse.cpu(), fvu.cpu()  # before the update, so that the next pass is queued while it runs
        with self.timer("optimizer"):
            multiplier = schedule(self.recipe.lr_schedule, number, self.recipe.max_steps)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * multiplier
                optimizer.step()
        return mse, fvu, rows

    def state_dict(self) -> dict[str, Any]:
        return {
            "stack": self.stack.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "micro_batch_size": self.micro_batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stack.load_state_dict(state["stack"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
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


def make_transcoders(recipe: Recipe, base: Base, device: torch.device) -> list[BilinearTC]:
    """One randomly initialized transcoder a layer, float32."""
    transcoders = []
    for layer in base.layers:
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
    parts = -(-share // max(1, min(share, most)))
    return -(-share // parts)  # a remainder of another size would be compiled, and add up, apart


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU, among them what torch's allocator keeps for reuse."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept

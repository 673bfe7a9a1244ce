"""What a fit will need, told before it begins: memory, arithmetic, disk, and what to run instead if it does not fit.

The work itself is run, a piece of each kind, on tensors without values (torch's meta device): sizes and operations are
counted where they arise, for any base, and no weight is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.checkpoint import KEPT
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.files import free_disk
from bilinear_tc.train.fitting.closed_form import MICRO_ROWS, ActivationFit, set_units, unit_derivatives, units
from bilinear_tc.train.fitting.fitter import CPU_ROWS, choose_micro_batch_size, layer_bytes, make_transcoders
from bilinear_tc.train.fitting.gradients import error_and_gradients, tangent_error_and_gradients
from bilinear_tc.train.fitting.least_squares import LeastSquares
from bilinear_tc.train.fitting.mlp_weights import MLPWeights, roles_of
from bilinear_tc.train.fitting.muon import newton_schulz
from bilinear_tc.train.fitting.tangents import SHARE
from bilinear_tc.train.measuring.replacement import LOGITS
from bilinear_tc.train.measuring.sample import ONE_IN, READ
from bilinear_tc.train.moments import Covariances, Moments
from bilinear_tc.train.processes import process_count
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.tally import META, Cost, Tally, numbers
from bilinear_tc.train.text.batches import PIECE_CHARACTERS

GB = 10**9
AT_MOST = 0.92  # of a device: what its allocator leaves unusable between blocks is the rest
CONTEXT = 6 * 10**8  # bytes that CUDA and its libraries take on a device
TEXT_BYTES = 80  # that tokenizing takes a character of a piece of text
LIBRARIES = 5 * 10**7  # bytes of linear algebra and derivatives, which a process maps at their first use
PACKED = {"int8": 1, "nf4": 0.5 + 4 / 64}  # bytes a weight, with nf4's scale of each 64
PHASES = ("start, units", "start, heads", "steps", "evaluation")


@dataclass(frozen=True)
class Device:
    """Where a fit is to run: its type, the bytes of memory that may be used, and the processes, each with one."""

    type: str
    memory: int
    processes: int

    @classmethod
    def parse(cls, text: str) -> Device:
        """A GPU's memory, 80GB, or several GPUs', 8x80GB; without text the device at hand. UserError for others."""
        if text:
            match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)(GB|GiB)", text.replace(" ", ""), re.IGNORECASE)
            if match is None or float(match[2]) == 0 or match[1] == "0":
                raise UserError(f"plan must be a GPU's memory, such as 80GB, or several GPUs', 8x80GB, got {text!r}")
            unit = 2**30 if match[3].lower() == "gib" else GB
            return cls("cuda", int(float(match[2]) * unit), int(match[1] or 1))
        if torch.cuda.is_available():
            return cls("cuda", torch.cuda.mem_get_info()[1], process_count())
        return cls("cpu", psutil.virtual_memory().available // process_count(), process_count())

    def __str__(self) -> str:
        what = f"{self.type.upper() if self.type == 'cpu' else 'GPU'} with {self.memory / GB:.1f} GB"
        return f"{self.processes} × {what}" if self.processes > 1 else what


class Plan:
    """The needs of a recipe's fit on a device.

    Args:
        recipe: the fit.
        device: where it is to run.
    """

    def __init__(self, recipe: Recipe, device: Device) -> None:
        self.device, self.dtype = device, recipe.compute_dtype(torch.device(device.type))
        with Tally():
            computed: Any = str(self.dtype)[6:]
            as_computed = dataclasses.replace(recipe, dtype=computed, base_quantization="none")
            self.base = Base.of_recipe(as_computed, META)
            self.base_parameters = sum(p.numel() for p in self.base.model.parameters())
            self.base_bytes = self.base.model.get_memory_footprint()
            if recipe.base_quantization != "none":
                self.base_bytes -= saved_by_packing(self.base.model, PACKED[recipe.base_quantization])
            self.base.stop_after_last_layer()
        self.layers = len(self.base.layers)
        share = -(-recipe.batch_size // device.processes)
        if recipe.micro_batch_size is None:
            free = max(1, int(device.memory - self.base_bytes) // 2)
            where = torch.device(device.type)
            chosen = choose_micro_batch_size(recipe, self.base, share, where, self.dtype, free)
            recipe = dataclasses.replace(recipe, micro_batch_size=chosen)
        row = (self.base.n_inputs + self.base.n_outputs) * self.dtype.itemsize
        needed = self.layers * (layer_bytes(recipe, self.base) + share * recipe.seq_len * row)
        beyond = needed > device.memory - self.base_bytes - CONTEXT
        asked = {"none": False, "layers": True, "auto": beyond}  # as the fit
        self.shared_out = asked[recipe.shard] and recipe.finish == "none" and 1 < device.processes <= self.layers
        self.recipe, self.rows = recipe, (recipe.batch_size if self.shared_out else share) * recipe.seq_len
        self.batch_rows = recipe.batch_size * recipe.seq_len
        with META:
            self.transcoder: BilinearTC = make_transcoders(recipe, self.base, META)[0]
        self.parameters = sum(p.numel() for p in self.transcoder.parameters())

    @property
    def micro_rows(self) -> int:
        rows = (self.recipe.micro_batch_size or 1) * self.recipe.seq_len
        return min(rows, CPU_ROWS if self.device.type == "cpu" else rows, self.rows)

    # Pieces of the work

    @cached_property
    def pass_of_base(self) -> Cost:
        """One pass over the sequences that the base runs on at once."""
        ids = numbers(self.recipe.micro_batch_size or 1, self.recipe.seq_len, dtype=torch.long)
        return Cost.of(lambda: self.base.run(ids, lambda _layer, _x, _y: None))

    @cached_property
    def mlp(self) -> MLPWeights | None:
        """The layers' widest MLP; None if one is neither plain nor gated, so that no closed form starts from it."""
        base, silu = self.base, torch.nn.functional.silu
        with META:
            ways = [roles_of(base.parts(layer), base.n_inputs, base.n_outputs)[:1] for layer in base.layers]
        return max((MLPWeights(*way, silu) for (way,) in ways), key=lambda mlp: mlp.width) if all(ways) else None

    def rows_of(self, count: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, outputs and weights of some rows."""
        sides = (numbers(count, n, dtype=dtype or self.dtype) for n in (self.base.n_inputs, self.base.n_outputs))
        return (*sides, numbers(count))  # type: ignore[return-value] # mypy does not count what is spread

    @cached_property
    def statistics(self) -> Cost:
        """A layer's means and deviations over all rows."""
        x, y, weights = self.rows_of(self.rows)
        return Cost.of(lambda: [Moments.of(x, weights), Moments.of(y, weights)])

    @property
    def z_scores(self) -> list[Tensor]:
        return [numbers(n) for n in (*[self.base.n_inputs] * 2, *[self.base.n_outputs] * 2)]

    @cached_property
    def gradients(self) -> Cost:
        """A layer's error and gradients over the rows that it works on at once."""
        rows: Any = (*self.rows_of(self.micro_rows), *self.z_scores, numbers())
        parameters, run = dict(self.transcoder.named_parameters()), cast(Any, error_and_gradients)
        return Cost.of(lambda: run(parameters, *rows, self.dtype))

    @cached_property
    def derivative(self) -> Cost:
        """The same of the derivative's error, over a share of all rows."""
        if not self.recipe.jvp or self.mlp is None:
            return Cost(0, 0, 0)
        rows, mlp = -(-self.rows // SHARE), self.mlp.to(self.dtype)
        parameters, run = dict(self.transcoder.named_parameters()), cast(Any, tangent_error_and_gradients)

        def work() -> None:
            directions = numbers(-(-self.batch_rows // SHARE), self.base.n_inputs)[:rows]
            x, *_ = self.rows_of(rows)
            mean, std, _, output_std = self.z_scores
            changes = mlp.derivative(x, directions * std).float() / output_std
            of_rows = ((x.float() - mean) / std, directions, changes, numbers(rows))
            for part in zip(*(tensor.split(self.micro_rows) for tensor in of_rows), strict=True):
                run(parameters, *part, numbers(), self.dtype)

        return Cost.of(work)

    @cached_property
    def orthogonalized(self) -> Cost:
        """Newton–Schulz of one matrix a map of a transcoder, as Muon runs it."""
        kind = torch.float16 if self.device.type == "cuda" else torch.float32
        matrices = [numbers(1, *p.shape, dtype=kind) for p in self.transcoder.parameters() if p.ndim == 2]
        costs = [Cost.of(partial(newton_schulz, matrix, self.recipe.newton_schulz)) for matrix in matrices]
        return Cost(sum(c.flops for c in costs), max(c.peak for c in costs), sum(m.nbytes for m in matrices))

    @cached_property
    def unit_sums(self) -> Cost:
        """A layer's sums for its units, and what making them holds."""
        mlp = self.mlp
        if mlp is None:
            return Cost(0, 0, 0)
        x, _, weights = self.rows_of(min(self.rows, MICRO_ROWS), torch.float32)

        def add() -> ActivationFit:
            fit = ActivationFit(mlp, Moments.of(mlp.gate(x), weights))
            fit.add(x, weights)
            return fit

        fits: list[ActivationFit] = []
        adding, setting = Cost.of(lambda: fits.append(add())), Cost.of(lambda: set_units(self.transcoder, fits[0]))
        covariance = Cost.of(lambda: Covariances(numbers(1, self.base.n_inputs)))
        return Cost(adding.flops, max(adding.peak, setting.peak), covariance.left)

    @cached_property
    def head_sums(self) -> Cost:
        """A layer's normal equations, and what adding to and solving them holds."""
        x, y, weights = self.rows_of(min(self.rows, MICRO_ROWS), torch.float32)
        hidden, outputs = self.transcoder.config.n_hidden, self.base.n_outputs
        sums = Cost.of(lambda: LeastSquares(numbers(1, hidden), numbers(1, outputs)))
        with META:
            equations = LeastSquares(numbers(1, hidden), numbers(1, outputs))

        def add() -> None:
            equations.add(0, units(self.transcoder, x), (y - self.transcoder.output_mean) / weights[:1], weights)
            if self.recipe.jvp and self.mlp is not None:
                few, _, weights_of_few = self.rows_of(-(-self.rows // SHARE), torch.float32)
                hidden = unit_derivatives(self.transcoder, few, few)
                equations.add_without_bias(0, hidden, self.mlp.derivative(few, few), weights_of_few)

        adding = Cost.of(add)
        solving = 8 * (3 * hidden**2 + 3 * hidden * outputs)  # the covariance, scaled, its factor; the head's
        return Cost(adding.flops, max(adding.peak, solving), sums.left)

    @cached_property
    def measured(self) -> int:
        """Bytes that a layer's measures on held-out text hold: all of a batch's rows are shown to it at once."""
        x, y, _ = self.rows_of(self.rows)

        def work() -> None:
            inputs, outputs = x.float(), y.float()
            affine = torch.nn.functional.linear(inputs, numbers(outputs.shape[1], inputs.shape[1]))
            (outputs - self.transcoder(inputs)).square(), (outputs - affine).square()

        return Cost.of(work).peak

    def sample(self, layers: int) -> int:
        """Bytes of the tokens that derivatives and interchanges are measured on, in parts and joined."""
        rows = layers * (self.base.n_inputs + self.base.n_outputs)
        stream = 3 * len(self.base.blocks) * self.base.n_inputs
        return 2 * (min(READ, self.recipe.eval_tokens) // ONE_IN) * (rows + stream) * self.dtype.itemsize

    # What they add up to

    def memory(self, layers: int) -> dict[str, dict[str, int]]:
        """Bytes on each process by phase of the fit, then by kind, for so many layers, shared out or not."""
        owned = -(-layers // self.device.processes) if self.shared_out else layers
        state, work = 4 * owned * self.parameters, self.work(layers)
        ends = (self.base.n_inputs + self.base.n_outputs) * self.dtype.itemsize + 5  # weight and mark of each row
        fit = {"base": self.base_bytes, "activations": owned * self.rows * ends, "parameters": state}
        biases = 4 * owned * sum(p.numel() for p in self.transcoder.parameters() if p.ndim == 1)
        adam = self.recipe.optimizer == "adamw"
        momentum = 2 * state if adam else state + biases
        copies = 0  # of the MLPs, which the sums and derivatives read
        if self.mlp is not None:
            maps = (self.mlp.gate, self.mlp.down, *([self.mlp.up] if self.mlp.up else []))
            copies = owned * sum(m.weight.numel() for m in maps) * (self.dtype != torch.float32)
        jvp = copies * self.dtype.itemsize * bool(self.recipe.jvp)
        phases: dict[str, dict[str, int]] = {}
        if self.recipe.init == "mlp":
            moments = {"gradients": state}, owned * self.unit_sums.left, owned * self.head_sums.left
            phases["start, units"] = fit | moments[0] | {"moments": moments[1], "MLPs' copies": 4 * copies}
            phases["start, heads"] = fit | moments[0] | {"moments": moments[2], "MLPs' copies": jvp}
        if self.recipe.max_steps:
            phases["steps"] = fit | {"gradients": state, "momentum": momentum, "MLPs' copies": jvp}
        if self.recipe.eval_split is not None:
            beside = max(state, self.sample(layers))
            phases["evaluation"] = fit | {"start, or sample": beside}
        for phase, kinds in phases.items():
            kinds["at work"] = work[phase]
            texts = 1 + (phase == "evaluation")  # the held-out one comes beside the fit's
            kinds["Python, CUDA" if self.device.type == "cuda" else "Python, text"] = self.process(texts)
        return phases

    def work(self, layers: int) -> dict[str, int]:
        """Bytes at most by phase that no later work needs."""
        base, owned = self.pass_of_base.peak, layers
        if self.shared_out:  # what a pass tells of all layers, as it is sent and as it is received
            owned, tokens = (
                -(-layers // self.device.processes),
                (self.recipe.micro_batch_size or 1) * self.recipe.seq_len,
            )
            base += 2 * layers * tokens * (self.base.n_inputs + self.base.n_outputs) * self.dtype.itemsize
        newton_schulz = owned * self.orthogonalized.left + 2 * -(-layers // self.device.processes) * (
            self.orthogonalized.peak
        )
        stepping = max(self.statistics.peak, self.gradients.peak, self.derivative.peak, newton_schulz)
        starts = (self.unit_sums.peak, self.head_sums.peak)
        peaks = (max(starts[0], self.statistics.peak), max(starts[1], self.derivative.peak), stepping, self.measured)
        return dict(zip(PHASES, (max(base, peak) for peak in peaks), strict=True))

    @cached_property
    def imported(self) -> int:
        """Bytes that this process takes, which has imported what a fit imports."""
        return psutil.Process().memory_info().rss

    def process(self, texts: int) -> int:
        """Bytes of a process without tensors, which reads so many texts."""
        if self.device.type == "cuda":
            return CONTEXT
        return self.imported + LIBRARIES + texts * PIECE_CHARACTERS * TEXT_BYTES + self.pool

    @property
    def pool(self) -> int:
        """Bytes of the sequences that the shuffle holds back."""
        return 4 * self.recipe.shuffle_buffer * self.recipe.seq_len

    def peak(self, layers: int) -> int:
        return max(sum(kinds.values()) for kinds in self.memory(layers).values())

    @property
    def flops(self) -> dict[str, float]:
        """Operations of a step, over all processes, by part."""
        sequences = self.recipe.batch_size / (self.recipe.micro_batch_size or 1)
        return {
            "base forward": sequences * self.pass_of_base.flops * (self.recipe.activations is None),
            "gradients": self.layers * self.gradients.flops * self.batch_rows / self.micro_rows,
            "jvp": self.layers * self.derivative.flops * self.recipe.batch_size * self.recipe.seq_len / self.rows,
            "Newton–Schulz": self.layers * self.orthogonalized.flops * (self.recipe.optimizer != "adamw"),
        }

    @property
    def disk(self) -> dict[str, int]:
        """Bytes that the run will hold at most: checkpoints while one is written, the set, and the set as it began."""
        exported = 4 * self.layers * (self.parameters + sum(b.numel() for b in self.transcoder.buffers()))
        checkpoint = 4 * self.layers * self.parameters + exported + self.pool
        start = exported if self.recipe.init == "mlp" else 0
        return {f"{KEPT + 1} checkpoints": (KEPT + 1) * checkpoint, "set": exported, "set at the start": start}

    # What to say

    @property
    def room(self) -> int:
        return int(AT_MOST * self.device.memory)

    def remedies(self) -> Iterator[str]:
        """What would not fit, a sentence each, with what to run instead."""
        recipe, folder = self.recipe, self.recipe.output_dir
        if self.mlp is None and (recipe.init == "mlp" or recipe.jvp):
            yield "an MLP is neither plain nor gated, so that no closed form starts from it; run with --init random"
        if self.peak(self.layers) > self.room:
            worst, kinds = max(self.memory(self.layers).items(), key=lambda item: sum(item[1].values()))
            said = (
                f"does not fit: {worst} takes {sum(kinds.values()) / GB:.1f} GB of the {self.room / GB:.1f} GB usable"
            )
            most = max((n for n in range(1, self.layers + 1) if self.peak(n) <= self.room), default=0)
            shared: Plan | None = None
            if recipe.finish == "none" and not self.shared_out and 1 < self.device.processes <= self.layers:
                shared = Plan(dataclasses.replace(recipe, shard="layers"), self.device)
            if shared is not None and shared.peak(self.layers) <= self.room:
                yield f"{said}; run with --shard layers ({shared.peak(self.layers) / GB:.1f} GB)"
            elif most:
                asked = self.base.layers
                parts = [asked[i : i + most] for i in range(0, len(asked), most)]
                names = [f"{p[0]}-{p[-1]}" if p[-1] - p[0] == len(p) - 1 else ",".join(map(str, p)) for p in parts]
                yield f"{said}; run {len(parts)} fits, of at most {most} layers ({self.peak(most) / GB:.1f} GB):"
                yield from (f"  --layers {name} --output_dir {folder}/{name}" for name in names)
            elif self.base_bytes > self.room and recipe.base_device_map == "auto":
                yield f"{said}, the base counted whole: how much of it stays on the device is Accelerate's to say"
            elif self.base_bytes > self.room:
                yield f"{said}, the base alone {self.base_bytes / GB:.1f}; run with --base_device_map auto"
            else:
                yield f"{said}, and one layer {self.peak(1) / GB:.1f}; run with a lower --batch_size or --init random"
        free = free_disk(Path(folder or "."))
        if (needed := sum(self.disk.values())) > free:
            yield f"the disk of {folder} has {free / GB:.1f} GB free of {needed / GB:.1f}; name another --output_dir"

    def lines(self) -> Iterator[str]:
        recipe, base, config = self.recipe, self.base, self.transcoder.config
        step = recipe.batch_size * recipe.seq_len
        yield f"base {recipe.base}: {self.base_parameters:,} parameters, {base.num_layers} layers"
        yield (
            f"transcoders: {self.layers} of {config.n_inputs} → {config.n_hidden} → {config.n_outputs}, "
            f"{self.layers * self.parameters:,} parameters"
        )
        start = -(-recipe.init_tokens // step) * step if recipe.init == "mlp" else 0
        held_out = 0 if recipe.eval_split is None else recipe.eval_tokens
        yield f"tokens: start {start:,}; {recipe.max_steps:,} steps × {step:,}; held out {held_out:,}"
        if recipe.finish == "joint":
            yield "this is of the layer-wise fit: --finish joint, which holds all layers on each device, is not counted"
        holds = ", each with layers of its own" if self.shared_out else ""
        products = f"products in {str(self.dtype)[6:]}, {recipe.micro_batch_size} sequences at once"
        yield f"on {self.device}{holds}, {products}"
        phases = self.memory(self.layers)
        kinds = dict.fromkeys(kind for of_phase in phases.values() for kind in of_phase)
        yield "\nGB on each process " + "".join(f"{phase:>14s}" for phase in phases)
        for kind in kinds:
            if any(of_phase.get(kind) for of_phase in phases.values()):
                yield f"  {kind:17s}" + "".join(f"{of_phase.get(kind, 0) / GB:14.3f}" for of_phase in phases.values())
        yield f"  {'all':17s}" + "".join(f"{sum(of_phase.values()) / GB:14.3f}" for of_phase in phases.values())
        yield f"train/evaluate.py adds up to {4 * 4 * LOGITS / GB:.3f} for logits"
        total = sum(self.flops.values())
        yield f"\na step: {total / 1e12:.4g} TFLOP, over all processes"
        yield from (f"  {part:17s}{flops / 1e12:14.4g}{flops / total:8.1%}" for part, flops in self.flops.items())
        sizes = ", ".join(f"{what} {size / GB:.3f}" for what, size in self.disk.items())
        yield f"\ndisk: {sum(self.disk.values()) / GB:.3f} GB ({sizes})"
        yield from [*self.remedies()] or ["it fits"]


def saved_by_packing(model: torch.nn.Module, size: float) -> int:
    """Bytes less of a model whose linear maps, but for the LM head, are packed into so many a weight."""
    head = model.get_output_embeddings()  # type: ignore[operator] # of every PreTrainedModel
    packed = (m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return int(sum(weight.numel() * (weight.element_size() - size) for weight in packed))

"""The transcoders of all layers while they are fitted together: parameters, forward pass and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.fitting.gradients import error_and_gradients, tangent_error_and_gradients
from bilinear_tc.train.fitting.tangents import Tangents
from bilinear_tc.train.massive import median_norm
from bilinear_tc.train.moments import Moments
from bilinear_tc.train.processes import process_count, sum_over_processes

# The factor on the sum of squared errors that float16 gradients are of: between its smallest number, 6e-8, in a row's
# gradient, and its largest, 65,504, in a weight's, which adds up over the rows.
FLOAT16_SCALE = 2.0**-8


class Stack:
    """One `BilinearTC` a layer, whose parameters and gradients are views into stacked buffers.

    A layer's gradients touch that layer's part of the buffers alone; the optimizer sees one [layers, rows, cols] batch
    a map; all gradients lie in one buffer, reduced over processes in one go.

    Attributes:
        transcoders: the layers' models, float32.
        parameters: the stacked parameters by name: [layers, rows, cols] weights and [layers, rows] biases.
        inputs, outputs: moments [layers, features] of the ordinary rows so far; what the transcoders' z-scores export.
        median_norm: the median norms [layers] of the MLPs' outputs in the first batch; empty before it.
    """

    def __init__(self, transcoders: list[BilinearTC], *, dtype: torch.dtype, compile: bool = False) -> None:
        self.transcoders = transcoders
        self.dtype = dtype
        self.device = transcoders[0].device
        config, layers = transcoders[0].config, len(transcoders)
        self.inputs = Moments.zeros(layers, config.n_inputs, device=self.device)
        self.outputs = Moments.zeros(layers, config.n_outputs, device=self.device)

        self.median_norm = torch.empty(0, device=self.device)

        named = {name: p.shape for name, p in transcoders[0].named_parameters()}
        self._gradients = torch.zeros(layers * sum(shape.numel() for shape in named.values()), device=self.device)
        self.parameters: dict[str, nn.Parameter] = {}
        offset = 0
        for name in named:
            values = torch.stack([t.get_parameter(name).detach() for t in transcoders])
            stacked = nn.Parameter(values)
            stacked.grad = self._gradients[offset : offset + values.numel()].view_as(values)
            offset += values.numel()
            for transcoder, value, gradient in zip(transcoders, stacked.data, stacked.grad, strict=True):
                view = nn.Parameter(value, requires_grad=False)
                view.grad = gradient
                module_name, _, leaf = name.rpartition(".")
                setattr(transcoder.get_submodule(module_name), leaf, view)
            self.parameters[name] = stacked
        functions: list[Callable[..., tuple[Tensor, dict[str, Tensor]]]]
        functions = [error_and_gradients, tangent_error_and_gradients]
        self._functions = [torch.compile(function) if compile else function for function in functions]

    def weigh(self, activations: Activations) -> None:
        """Sets the weights of a batch's rows; the median norms are the first batch's."""
        if not len(self.median_norm):
            self.median_norm = median_norm(activations.y)
        activations.weigh(self.median_norm)

    def accumulate(
        self,
        activations: Activations,
        inputs: Moments,
        outputs: Moments,
        rows: int,
        micro_rows: int,
        tangents: Tangents | None = None,
        jvp: float = 0.0,
        weight: float = 1.0,
        onto: bool = False,
    ) -> Tensor:
        """Sets the gradients of the mean squared error, z-scored and weighted, over the rows of all processes.

        Args:
            activations: this process's rows and their weights.
            inputs, outputs: moments [layers, features] to z-score with.
            rows: rows of all processes together, which the mean is over.
            micro_rows: rows worked on at once.
            tangents: the directions of this batch, if the loss has a part for the derivative along them.
            jvp: the weight of that part.
            weight: of the whole error.
            onto: adds to what this process's gradients are already, such as another loss's; not in float16.

        Returns:
            [layers] float64 Σ w ‖z − ẑ‖² over all processes' rows, as the gradients are.
        """
        if not onto:
            self._gradients.zero_()
        errors = torch.zeros(len(self.transcoders), dtype=torch.float64, device=self.device)
        scale = weight / (rows * outputs.mean.shape[-1])
        # float16 would lose gradients of the mean, which shrink with the batch: its are of the sum, divided in float32
        factor = FLOAT16_SCALE if self.dtype == torch.float16 else scale
        on_device = torch.full((), factor, device=self.device)  # as a number it would be compiled anew for other rows
        tangents_on_device = on_device * (0 if tangents is None else jvp * rows / tangents.count)
        of_rows, of_tangents = self._functions
        input_mean, input_std = inputs.mean.float(), inputs.std.float()
        output_mean, output_std = outputs.mean.float(), outputs.std.float()
        for layer, transcoder in enumerate(self.transcoders):
            parameters = dict(transcoder.named_parameters())
            statistics = input_mean[layer], input_std[layer], output_mean[layer], output_std[layer]
            parts = (of[layer].split(micro_rows) for of in (activations.x, activations.y, activations.weights))
            for part in zip(*parts, strict=True):
                error, gradients = of_rows(parameters, *part, *statistics, on_device, self.dtype)
                errors[layer] += error
                add(gradients, parameters)
            if tangents is not None:
                x, weights = (of[layer][tangents.rows] for of in (activations.x, activations.weights))
                drawn = tangents.draw(layer, x, input_std[layer], output_std[layer])
                x = (x.float() - input_mean[layer]) / input_std[layer]
                for part in zip(*(of.split(micro_rows) for of in (x, *drawn, weights)), strict=True):
                    add(of_tangents(parameters, *part, tangents_on_device, self.dtype)[1], parameters)
        if factor != scale:
            self._gradients.mul_(scale / factor)
        if process_count() > 1:
            self._gradients.copy_(sum_over_processes(self._gradients))
        return sum_over_processes(errors)

    def set_statistics(self) -> None:
        """Writes the moments seen so far into the transcoders' z-score buffers."""
        for layer, transcoder in enumerate(self.transcoders):
            for name, value in {
                "input_mean": self.inputs.mean,
                "input_std": self.inputs.std,
                "output_mean": self.outputs.mean,
                "output_std": self.outputs.std,
            }.items():
                getattr(transcoder, name).copy_(value[layer])

    def layer_state(self, layer: int) -> dict[str, Any]:
        """What a layer goes on from; copies."""
        transcoder, stacked = self.transcoders[layer], self._stacked().items()
        state: dict[str, Any] = {
            name: {key: of[layer].detach().clone() for key, of in them.items()} for name, them in stacked
        }
        return state | {"correlation": transcoder.input_correlation if transcoder.config.input_correlation else None}

    def load_layer_state(self, layer: int, state: dict[str, Any]) -> None:
        if state["median_norm"] and not len(self.median_norm):
            self.median_norm = self.median_norm.new_empty(len(self.transcoders))
        for name, stacked in self._stacked().items():
            for key, values in stacked.items():
                values.data[layer].copy_(state[name][key])
        if state["correlation"] is not None:
            self.transcoders[layer].input_correlation.copy_(state["correlation"])

    def _stacked(self) -> dict[str, Mapping[str, Tensor]]:
        """All tensors [layers, ...] of its state."""
        median = {"first": self.median_norm} if len(self.median_norm) else {}
        moments = {"inputs": vars(self.inputs), "outputs": vars(self.outputs)}
        return {"parameters": self.parameters, **moments, "median_norm": median}


def add(gradients: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Adds gradients to those of the parameters of their names."""
    for name, gradient in gradients.items():
        total = parameters[name].grad
        assert total is not None
        total += gradient

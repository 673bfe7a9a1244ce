"""What an MLP of the base computes, read from its weights: the function and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bilinear_tc.train.base import linear_maps
from bilinear_tc.train.errors import UserError

ACTIVATION_NAMES = ("act", "act_fn", "activation_fn", "activation", "gelu_impl")


@dataclass
class Linear:
    """A linear map's weight [outputs, inputs] and bias [outputs]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, module: nn.Linear | Conv1D, dtype: torch.dtype) -> Linear:
        weight = module.weight.detach().to(dtype)
        weight = weight if isinstance(module, nn.Linear) else weight.T
        return cls(weight, weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@dataclass
class MLPWeights:
    """What a base's MLP computes: `down(act(gate(x)) ⊙ up(x))`, without `⊙ up(x)` if up is None."""

    gate: Linear
    up: Linear | None
    down: Linear
    act: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, mlp: nn.Module, dtype: torch.dtype = torch.float32) -> MLPWeights:
        """Reads an MLP's weights. UserError if it is neither a two-matrix nor a gated MLP of separate maps."""
        maps = linear_maps(mlp)
        act = next((getattr(mlp, name) for name in ACTIVATION_NAMES if hasattr(mlp, name)), None)
        gate_name = next((name for name in maps if "gate" in name), None)
        linears = {name: Linear.of(module, dtype) for name, module in maps.items()}
        if act is not None and len(maps) == 2 and gate_name is None:
            gate, down = linears.values()
            return cls(gate, None, down, act)
        if act is not None and len(maps) == 3 and gate_name is not None:
            gate = linears.pop(gate_name)
            return cls(gate, *linears.values(), act)
        raise UserError(
            f"no closed-form start for {type(mlp).__name__} with the maps {', '.join(maps)}: expected two, or a gated "
            "three, and an activation; fit it with --init random"
        )

    @property
    def width(self) -> int:
        return len(self.gate.weight)

    def derivative(self, x: Tensor, tangent: Tensor) -> Tensor:
        """How the output [rows, n_outputs] changes along tangents [rows, n_inputs] at inputs x: [rows, n_inputs]."""
        x, tangent = x.to(self.gate.weight.dtype), tangent.to(self.gate.weight.dtype)
        z = self.gate(x)
        value, slope = torch.func.jvp(self.act, (z,), (torch.ones_like(z),))
        hidden = slope * nn.functional.linear(tangent, self.gate.weight)
        if self.up is not None:
            hidden = hidden * self.up(x) + value * nn.functional.linear(tangent, self.up.weight)
        return nn.functional.linear(hidden, self.down.weight)

    def check(self, x: Tensor, y: Tensor, path: str) -> None:
        """Raises UserError if these weights do not give the MLP's outputs y for its inputs x."""
        hidden = self.act(self.gate(x.float()))
        predicted = self.down(hidden if self.up is None else hidden * self.up(x.float()))
        error = (predicted - y.float()).norm() / y.float().norm()
        if not error < 0.05:
            raise UserError(
                f"no closed-form start for {path}: read as a plain or gated MLP, its weights miss its outputs by "
                f"{error:.0%}; fit it with --init random"
            )

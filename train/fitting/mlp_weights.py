"""What an MLP of the base computes, read from its weights: the function and its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.mlps import is_linear, linear_maps
from bilinear_tc.train.processes import sum_over_processes

# activations that an MLP may call as functions, so that no module shows them
FUNCTIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "tanh")
READ_ROWS = 512  # rows that an MLP's reading is chosen on
MOST_ERROR = 0.05  # of a reading, as a share of the MLP's output


@dataclass
class Linear:
    """A linear map's float32 weight [outputs, inputs] and bias [outputs]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, module: nn.Linear | Conv1D) -> Linear:
        with align_module_device(module):  # from the CPU or the disk, if it was put there
            weight = plain(module).float()
            bias = None if module.bias is None else module.bias.detach().float()
        weight = weight if isinstance(module, nn.Linear) else weight.T
        return cls(weight, torch.zeros(len(weight), device=weight.device) if bias is None else bias)

    def to(self, to: torch.dtype | torch.device) -> Linear:
        return Linear(self.weight.to(to), self.bias.to(to))

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
    def read(cls, base: Base, layer: int, x: Tensor, y: Tensor) -> MLPWeights:
        """The reading of a layer's MLP that gives its outputs for its inputs, whatever its parts are called.

        UserError if there is none: the MLP is neither plain nor gated.

        Args:
            base, layer: where the MLP is.
            x, y: this process's share of rows, maybe none: inputs [rows, n_inputs] and outputs [rows, n_outputs].
        """
        parts, x, y = base.parts(layer), x.float(), y.float()  # on the transcoders' device, unlike the parts maybe
        own = [part for part in parts if not is_linear(part) and all(p.numel() == 1 for p in part.parameters())]
        reason = f"expected two linear maps, or a gated three, that fit together, got {len(linear_maps(parts))}"
        for acts in (own, [ACT2FN[name] for name in FUNCTIONS]):
            readings = [cls(*roles, act) for roles in roles_of(parts, x.shape[1], y.shape[1], x.device) for act in acts]
            if readings:
                sizes = torch.stack([t.square().sum(dtype=torch.float64) for t in (y, *(r(x) - y for r in readings))])
                total, *errors = sum_over_processes(sizes)
                error, best = (torch.stack(errors) / total).sqrt().nan_to_num(math.inf).min(0)
                if error < MOST_ERROR:
                    return readings[best]
                reason = f"read as a plain or gated MLP, its weights miss its outputs by {error:.0%}"
        path = base.mlp_path(layer)
        raise UserError(
            f"no closed-form start for {path}, nor a derivative for --jvp: {reason}; fit it with --init random and "
            "--jvp 0, or others with --layers"
        )

    def to(self, dtype: torch.dtype) -> MLPWeights:
        """The same MLP with weights of another type."""
        up = None if self.up is None else self.up.to(dtype)
        return MLPWeights(self.gate.to(dtype), up, self.down.to(dtype), self.act)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.act(self.gate(x))
        return self.down(hidden if self.up is None else hidden * self.up(x))

    def derivative(self, x: Tensor, tangent: Tensor) -> Tensor:
        """How the output [rows, n_outputs] changes along tangents [rows, n_inputs] at inputs x: [rows, n_inputs]."""
        x, tangent = x.to(self.gate.weight.dtype), tangent.to(self.gate.weight.dtype)
        z = self.gate(x)
        value, slope = value_and_slope(self.act, z)
        hidden = slope * nn.functional.linear(tangent, self.gate.weight)
        if self.up is not None:
            hidden = hidden * self.up(x) + value * nn.functional.linear(tangent, self.up.weight)
        return nn.functional.linear(hidden, self.down.weight)

    @property
    def width(self) -> int:
        return len(self.gate.weight)


def value_and_slope(act: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise activation and its derivative at z; backward if it (BLOOM's own GELU) has no forward rule."""
    try:
        return torch.func.jvp(act, (z,), (torch.ones_like(z),))[:2]
    except RuntimeError:
        with torch.enable_grad():
            value = act(z.requires_grad_())
            return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def is_packed(module: nn.Module) -> bool:
    """Whether bitsandbytes keeps a linear map's weight in 8 bits or 4."""
    return type(getattr(module, "weight", None)).__name__ in ("Int8Params", "Params4bit")


def plain(module: nn.Linear | Conv1D) -> Tensor:
    """The numbers of a linear map's weight; of a packed one by what the map makes of unit vectors, since in what order
    they are packed depends on the device."""
    if not is_packed(module):
        return module.weight.detach()
    units = torch.eye(cast(nn.Linear, module).in_features, dtype=torch.float16, device=module.weight.device)
    no_bias = {} if module.bias is None else {"bias": torch.zeros_like(module.bias)}
    with torch.no_grad():
        return cast(Tensor, torch.func.functional_call(module, no_bias, (units,))).T


def roles_of(
    parts: Sequence[nn.Module], n_inputs: int, n_outputs: int, device: torch.device | None = None
) -> list[tuple[Linear, Linear | None, Linear]]:
    """Every way to take an MLP's linear maps for its gate, up and down that fits their widths; a gate and an up may be
    the halves of one map, in either order."""
    maps = [Linear.of(module) for module in linear_maps(parts)]
    maps = [of_module.to(device) for of_module in maps] if device is not None else maps
    ways: list[tuple[Linear, Linear | None, Linear]] = []
    for gate, *others in permutations(maps) if len(maps) in (2, 3) else []:
        if len(others) == 2:
            ways.append((gate, others[0], others[1]))
        else:
            half = len(gate.weight) // 2
            upper, lower = (Linear(gate.weight[rows], gate.bias[rows]) for rows in (slice(half), slice(half, None)))
            ways += [(gate, None, others[0]), (upper, lower, others[0]), (lower, upper, others[0])]
    return [
        (gate, up, down)
        for gate, up, down in ways
        if gate.weight.shape == (down.weight.shape[1], n_inputs) == (gate if up is None else up).weight.shape
        and len(down.weight) == n_outputs
    ]

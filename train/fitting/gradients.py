"""A transcoder's squared error and its gradients, written out: what autograd would give, in fewer passes over memory.

No gradient flows into the rows themselves, so each map needs its forward pass and its weight's gradient, and only the
last one its input's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear


@torch.no_grad()
def error_and_gradients(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    input_mean: Tensor,
    input_std: Tensor,
    output_mean: Tensor,
    output_std: Tensor,
    factor: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ‖ẑ − z‖² over the rows, and the gradients of `factor` times it.

    z is the z-scored MLP output, ẑ what `BilinearTC.normalized_forward` gives for the z-scored input.

    Args:
        parameters: of a `BilinearTC` of either form, by name; the biases may be missing.
        x: [rows, n_inputs]; y: [rows, n_outputs]; raw.
        input_mean, input_std, output_mean, output_std: [features] float32 to z-score with.
        factor: a scalar on the device; in float16 it keeps the gradients inside the type's range.
        dtype: of the products; z-scores, errors and sums over the rows are float32.

    Returns:
        The error, a float32 scalar, and a gradient for each parameter: products of `dtype`, sums in float32.
    """
    maps = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    x = (x.float() - input_mean).div_(input_std).to(dtype)
    if "left.weight" in maps:
        last = "head"
        left = linear(x, maps["left.weight"], maps.get("left.bias"))  # [rows, n_hidden]
        right = linear(x, maps["right.weight"], maps.get("right.bias"))
    else:  # input_sum
        last = "W_left"
        left = x.sum(-1, keepdim=True)  # [rows, 1], no parameter
        right = linear(x, maps["W_right.weight"])
    hidden = left * right
    error = linear(hidden, maps[f"{last}.weight"], maps.get(f"{last}.bias")).float()  # [rows, n_outputs]
    error.sub_((y.float() - output_mean).div_(output_std))
    total = error.square().sum()

    d_output = error.mul_(2 * factor).to(dtype)
    d_hidden = d_output @ maps[f"{last}.weight"]
    deltas = {last: (d_output, hidden)}  # of each map: its output's gradient and its input
    if last == "head":
        deltas |= {"left": (right.mul_(d_hidden), x), "right": (left.mul_(d_hidden), x)}
    else:
        deltas |= {"W_right": (d_hidden.mul_(left), x)}
    gradients = {}
    for name, (delta, entering) in deltas.items():
        gradients[f"{name}.weight"] = delta.T @ entering
        if f"{name}.bias" in maps:
            gradients[f"{name}.bias"] = delta.sum(0, dtype=torch.float32)
    return total, gradients

"""A transcoder's squared error and its gradients, written out: what autograd would give, in fewer passes over memory.

No gradient flows into the rows themselves, so each map needs its forward pass and its weight's gradient, and only the
last one its input's. The same for the error of its derivative along given directions.
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
    weights: Tensor,
    input_mean: Tensor,
    input_std: Tensor,
    output_mean: Tensor,
    output_std: Tensor,
    factor: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ w ‖ẑ − z‖² over the rows, and the gradients of `factor` times it.

    z is the z-scored MLP output, ẑ what `BilinearTC.normalized_forward` gives for the z-scored input.

    Args:
        parameters: of a `BilinearTC`, by name and in its order: of the maps that are multiplied, then of the last one;
            the biases may be missing.
        x: [rows, n_inputs]; y: [rows, n_outputs]; raw.
        weights: w [rows] float32.
        input_mean, input_std, output_mean, output_std: [features] float32 to z-score with.
        factor: a scalar on the device; in float16 it keeps the gradients inside the type's range.
        dtype: of the products; z-scores, errors and sums over the rows are float32.

    Returns:
        The error, a float32 scalar, and a gradient for each parameter: products of `dtype`, sums in float32.
    """
    maps = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    x = (x.float() - input_mean).div_(input_std).to(dtype)
    *factors, last = dict.fromkeys(name.partition(".")[0] for name in maps)
    products = [linear(x, maps[f"{name}.weight"], maps.get(f"{name}.bias")) for name in factors]  # [rows, n_hidden]
    # a single map is multiplied by the sum of the inputs [rows, 1]
    left, right = products if len(products) == 2 else (x.sum(-1, keepdim=True), *products)
    hidden = left * right
    error = linear(hidden, maps[f"{last}.weight"], maps.get(f"{last}.bias")).float()  # [rows, n_outputs]
    error.sub_((y.float() - output_mean).div_(output_std))
    weights = weights.unsqueeze(-1)
    total = error.square().mul_(weights).sum()

    d_output = error.mul_(weights).mul_(2 * factor).to(dtype)
    d_hidden = d_output @ maps[f"{last}.weight"]
    deltas = {last: (d_output, hidden)}  # of each map: its output's gradient and its input
    if len(products) == 2:
        deltas |= {factors[0]: (right.mul_(d_hidden), x), factors[1]: (left.mul_(d_hidden), x)}
    else:
        deltas |= {factors[0]: (d_hidden.mul_(left), x)}
    gradients = {}
    for name, (delta, entering) in deltas.items():
        gradients[f"{name}.weight"] = delta.T @ entering
        if f"{name}.bias" in maps:
            gradients[f"{name}.bias"] = delta.sum(0, dtype=torch.float32)
    return total, gradients


@torch.no_grad()
def tangent_error_and_gradients(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    tangent: Tensor,
    target: Tensor,
    weights: Tensor,
    factor: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ w ‖J ε − t‖² over the rows, J the derivative of ẑ by the z-scored input; the gradients of `factor` times it.

    J ε = last(left(ε) ⊙ right(x) + left(x) ⊙ right(ε)), with the biases in left(x) and right(x) alone.

    Args:
        parameters: as for `error_and_gradients`.
        x: [rows, n_inputs]; tangent: ε [rows, n_inputs]; target: t [rows, n_outputs]; z-scored.
        weights, factor, dtype: as for `error_and_gradients`.

    Returns:
        As `error_and_gradients`; a parameter that J does not depend on is left out.
    """
    maps = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    x, tangent = x.to(dtype), tangent.to(dtype)
    *factors, last = dict.fromkeys(name.partition(".")[0] for name in maps)
    products = [
        (linear(x, maps[f"{f}.weight"], maps.get(f"{f}.bias")), linear(tangent, maps[f"{f}.weight"])) for f in factors
    ]
    if len(products) == 1:
        products.insert(0, (x.sum(-1, keepdim=True), tangent.sum(-1, keepdim=True)))
    (left, d_left), (right, d_right) = products  # [rows, n_hidden] each, or [rows, 1] on the left
    hidden = d_left * right + left * d_right
    error = linear(hidden, maps[f"{last}.weight"]).float().sub_(target)
    weights = weights.unsqueeze(-1)
    total = error.square().mul_(weights).sum()

    d_output = error.mul_(weights).mul_(2 * factor).to(dtype)
    d_hidden = d_output @ maps[f"{last}.weight"]
    gradients = {f"{last}.weight": d_output.T @ hidden}
    others = (
        {factors[-1]: (left, d_left)}
        if len(factors) == 1
        else {factors[0]: (right, d_right), factors[1]: (left, d_left)}
    )
    for name, (other, d_other) in others.items():
        delta = d_hidden * d_other
        gradients[f"{name}.weight"] = delta.T @ x + (d_hidden * other).T @ tangent
        if f"{name}.bias" in maps:
            gradients[f"{name}.bias"] = delta.sum(0, dtype=torch.float32)
    return total, gradients

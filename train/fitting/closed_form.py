"""The closed-form start: each neuron of the base's MLP as one bilinear unit, then the head by least squares.

For a two-matrix MLP, `out(act(in(x)))`: neuron j computes `act(z)` of its pre-activation z. The least-squares
quadratic α + βz + γz² of `act` over the z that the data shows is one bilinear unit exactly: left = z,
right = γz + β, head = the MLP's own output column, α in the head's bias.

For a gated MLP, `down(act(gate) ⊙ up)`: the line α + βg that is nearest to `act(g)` where it counts, weighted by
up², makes left = α + βg, right = up, head = the down column.

A layer with massive rows has one unit for them, the square of what tells them from ordinary rows best. The neurons that
make their outputs do not tell them so well, and least squares on these alone lets the ordinary rows pay for it: in
SmolLM2-135M's layer 28 with thirty times the variance of the channel that massive rows are large in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.least_squares import LeastSquares
from bilinear_tc.train.fitting.mlp_weights import READ_ROWS, Linear, MLPWeights
from bilinear_tc.train.fitting.stack import Stack
from bilinear_tc.train.fitting.tangents import SHARE, Tangents
from bilinear_tc.train.moments import Covariances, Moments, check_finite
from bilinear_tc.train.processes import sum_over_processes

RIDGE = 1e-5
MASSIVE_RIDGE = 1e-2  # of a variance: a few thousand tokens then tell the direction as well as many
MICRO_ROWS = 8192  # rows whose hidden units exist at once


class ActivationFit:
    """The least-squares polynomial of `act` for each neuron, over the pre-activations that the data shows.

    Powers are taken of t = (z − shift) / scale, with shift and scale the mean and standard deviation of the first
    rows' z: the coefficients are then of the size of `act`'s own variation, even if z hardly varies.

    Args:
        weights: the MLP.
        first: moments [width] of the pre-activations of the first rows of all processes.
    """

    def __init__(self, weights: MLPWeights, first: Moments) -> None:
        self.weights = weights
        self.degree = 2 if weights.up is None else 1
        self.shift, self.scale = first.mean.float(), first.std.float()
        self.powers = first.mean.new_zeros(2 * self.degree + 1, weights.width)  # Σ u² tᵏ, u = 1 without a gate
        self.products = first.mean.new_zeros(self.degree + 1, weights.width)  # Σ u² act(z) tᵏ

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Adds MLP inputs x: [rows, n_inputs], float32, each counted as its weight says: [rows]."""
        z = self.weights.gate(x)
        t = (z - self.shift) / self.scale
        power = torch.ones_like(t) if self.weights.up is None else self.weights.up(x).square()
        power = power * weights.unsqueeze(-1)
        target = self.weights.act(z)
        for k in range(2 * self.degree + 1):
            self.powers[k] += power.sum(0)
            if k <= self.degree:
                self.products[k] += (power * target).sum(0)
            power = power * t

    def sum_over_processes(self) -> None:
        """Adds up the sums of all processes."""
        self.powers, self.products = sum_over_processes(self.powers), sum_over_processes(self.products)

    def solve(self) -> Tensor:
        """Coefficients [degree + 1, width] of 1, t, t², float64; a relative ridge of 1e-6 keeps every neuron finite."""
        index = torch.arange(self.degree + 1, device=self.powers.device)
        normal = self.powers[index[:, None] + index].permute(2, 0, 1)  # [width, terms, terms]
        ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2) + 1e-30
        return torch.linalg.solve(normal + torch.diag_embed(ridge), self.products.T.unsqueeze(-1)).squeeze(-1).T

    def unit_power(self, coefficients: Tensor) -> Tensor:
        """Mean square [width] of each unit's product, without its constant part if there is no gate."""
        moments = self.powers / self.powers[0] if self.weights.up is None else self.powers
        if self.weights.up is not None:
            a, b = coefficients
            return a**2 * moments[0] + 2 * a * b * moments[1] + b**2 * moments[2]
        _, b, c = coefficients
        mean = b * moments[1] + c * moments[2]
        return b**2 * moments[2] + 2 * b * c * moments[3] + c**2 * moments[4] - mean**2


@torch.no_grad()
def set_units(transcoder: BilinearTC, fit: ActivationFit) -> int:
    """Writes an MLP's units into a transcoder whose z-score statistics are set; returns the unit that it needs least.

    With fewer hidden units than neurons, those that carry most output variance are kept; with more, the units left
    over keep their random left and right and get a zero head.
    """
    weights, coefficients = fit.weights, fit.solve()
    in_mean, in_std = transcoder.input_mean.double(), transcoder.input_std.double()
    out_mean, out_std = transcoder.output_mean.double(), transcoder.output_std.double()

    def on_z_scores(linear: Linear) -> tuple[Tensor, Tensor]:
        weight = linear.weight.double()
        return weight * in_std, weight @ in_mean + linear.bias.double()

    gate_weight, gate_bias = on_z_scores(weights.gate)
    t_weight = gate_weight / fit.scale.double()[:, None]
    t_bias = (gate_bias - fit.shift.double()) / fit.scale.double()
    head_weight = weights.down.weight.double() / out_std[:, None]
    constant = weights.down.bias.double() - out_mean
    if weights.up is None:
        alpha, beta, gamma = coefficients
        left = (t_weight, t_bias)
        right = (gamma[:, None] * t_weight, gamma * t_bias + beta)
        constant = constant + weights.down.weight.double() @ alpha
    else:
        alpha, beta = coefficients
        left = (beta[:, None] * t_weight, beta * t_bias + alpha)
        right = on_z_scores(weights.up)

    contribution = fit.unit_power(coefficients) * head_weight.square().sum(0)
    count = min(transcoder.config.n_hidden, weights.width)
    kept = contribution.argsort(descending=True, stable=True)[:count].sort().values
    transcoder.head.weight.zero_()
    for module, (weight, bias) in ((transcoder.left, left), (transcoder.right, right)):
        module.weight[:count] = weight[kept].float()
        module.bias[:count] = bias[kept].float()
    transcoder.head.weight[:, :count] = head_weight[:, kept].float()
    transcoder.head.bias.copy_(constant / out_std)
    return count if count < transcoder.config.n_hidden else int(contribution[kept].argmin())


@torch.no_grad()
def set_massive_unit(transcoder: BilinearTC, unit: int, mean: Tensor) -> None:
    """Makes a unit the square of a projection with variance 1 on ordinary rows, on which massive ones are farthest out
    (Fisher's linear discriminant, with a ridge).

    Args:
        transcoder: one whose statistics, the inputs' correlation among them, are set.
        unit: which one.
        mean: of the massive rows' inputs [n_inputs].
    """
    difference = (mean - transcoder.input_mean.double()) / transcoder.input_std.double()
    correlation = transcoder.input_correlation.double()
    identity = torch.eye(len(correlation), dtype=torch.float64, device=correlation.device)
    direction = torch.linalg.solve(correlation + MASSIVE_RIDGE * identity, difference)
    direction /= (direction @ correlation @ direction).sqrt().clamp(min=1e-6)
    for module in (transcoder.left, transcoder.right):
        module.weight[unit] = direction.float()
        module.bias[unit] = 0
    transcoder.head.weight[:, unit] = 0


@torch.no_grad()
def share_scale(transcoder: BilinearTC) -> None:
    """Gives each unit's left, right and head the same size, their product unchanged.

    Muon's steps are of one size for all units whatever their gradient, so a unit whose head is large and whose left
    and right are small would be blown up by the first of them. The size of a left or right row includes its bias,
    since a nearly linear unit has a right side of little else.
    """
    left, right, head = transcoder.left, transcoder.right, transcoder.head
    sizes = torch.stack(
        [
            (left.weight.double().square().sum(1) + left.bias.double().square()).sqrt(),
            (right.weight.double().square().sum(1) + right.bias.double().square()).sqrt(),
            head.weight.double().norm(dim=0),
        ]
    )
    alive = sizes.prod(0) > 0
    factors = torch.where(alive, sizes.log().mean(0).exp() / sizes, 1).to(head.weight.dtype)
    for module, factor in ((left, factors[0]), (right, factors[1])):
        module.weight.mul_(factor[:, None])
        module.bias.mul_(factor)
    head.weight.mul_(factors[2])


def units(transcoder: BilinearTC, x: Tensor) -> Tensor:
    """The hidden products [rows, n_hidden] for raw inputs x: [rows, n_inputs]."""
    x = (x.float() - transcoder.input_mean) / transcoder.input_std
    return transcoder.left(x) * transcoder.right(x)


def unit_derivatives(transcoder: BilinearTC, x: Tensor, directions: Tensor) -> Tensor:
    """How the hidden products change [rows, n_hidden] along z-scored directions at raw inputs x: [rows, n_inputs]."""
    x = (x.float() - transcoder.input_mean) / transcoder.input_std
    left, right = transcoder.left, transcoder.right
    return linear(directions, left.weight) * right(x) + left(x) * linear(directions, right.weight)


@torch.no_grad()
def closed_form_start(
    stack: Stack,
    base: Base,
    calibration: Callable[[str], Iterable[Activations]],
    tangents: Tangents | None = None,
    jvp: float = 0.0,
) -> None:
    """Sets every layer's transcoder from its MLP, and the stack's moments from the same rows.

    UserError if an MLP is neither plain nor gated.

    Args:
        stack: the transcoders.
        base: the decoder whose MLPs they stand in for, with their layers alone.
        calibration: given what it is for, runs the base over the calibration sample, batch by batch. It is called
            twice: first moments are taken, then the heads are solved.
        tangents, jvp: as for `solve_heads`.
    """
    set_all_units(stack, base, calibration("moments"))
    solve_heads(stack, calibration("heads"), tangents, jvp)


def set_all_units(stack: Stack, base: Base, calibration: Iterable[Activations]) -> None:
    """Sets the stack's moments and statistics, and every unit from the activation that its neuron shows."""
    fits: list[ActivationFit] = []
    covariances: Covariances | None = None
    massive = Moments.zeros(*stack.inputs.mean.shape, device=stack.device)
    for activations in calibration:
        stack.weigh(activations)
        inputs, outputs = (moments.over_processes() for moments in activations.moments())
        whole, gather = activations.base, activations.shard.gather
        check_finite(inputs, outputs, whole.layers, "the calibration sample", gather)
        stack.inputs, stack.outputs = stack.inputs.merge(inputs), stack.outputs.merge(outputs)
        large = [Moments.of(x[~ordinary]) for x, ordinary in zip(activations.x, activations.ordinary, strict=True)]
        massive = massive.merge(Moments.stack(large).over_processes())
        covariances = covariances or Covariances(inputs.mean)
        for index, layer in enumerate(base.layers):
            x = activations.x[index]
            covariances.add(index, x[activations.ordinary[index]].float())
            if len(fits) == index:
                weights = MLPWeights.read(base, layer, x[:READ_ROWS], activations.y[index][:READ_ROWS])
                ordinary = activations.ordinary[index][:MICRO_ROWS]
                first = Moments.of(weights.gate(x[:MICRO_ROWS].float()), ordinary).over_processes()
                fits.append(ActivationFit(weights, first))
            for rows, counted in zip(x.split(MICRO_ROWS), activations.weights[index].split(MICRO_ROWS), strict=True):
                fits[index].add(rows.float(), counted)
    stack.set_statistics()
    if covariances is not None:
        covariances.sum_over_processes()
    for layer, (transcoder, fit) in enumerate(zip(stack.transcoders, fits, strict=True)):
        fit.sum_over_processes()
        least = set_units(transcoder, fit)
        if covariances is not None:
            transcoder.input_correlation.copy_(covariances.correlation(layer))
        if massive.count[layer] > 0:
            set_massive_unit(transcoder, least, massive.mean[layer])


def solve_heads(
    stack: Stack, calibration: Iterable[Activations], tangents: Tangents | None = None, jvp: float = 0.0
) -> None:
    """Solves every layer's head and its bias by ridge least squares, shrinking to the head that it has.

    With `tangents`, the squared error of the derivative along them is added, `jvp` times.
    """
    equations: LeastSquares | None = None
    for number, activations in enumerate(calibration):
        stack.weigh(activations)
        if equations is None:
            rows = activations.x[:, :MICRO_ROWS], activations.ordinary[:, :MICRO_ROWS]
            of_layers = zip(stack.transcoders, *rows, strict=True)
            first = Moments.stack([Moments.of(units(t, x), ordinary) for t, x, ordinary in of_layers])
            equations = LeastSquares(first.over_processes().mean, torch.zeros_like(stack.outputs.mean))
        for layer, transcoder in enumerate(stack.transcoders):
            parts = (of[layer].split(MICRO_ROWS) for of in (activations.x, activations.y, activations.weights))
            for x, y, weights in zip(*parts, strict=True):
                z = (y.float() - transcoder.output_mean) / transcoder.output_std
                equations.add(layer, units(transcoder, x), z, weights)
        if tangents is not None:
            tangents.begin(number, activations)
            for layer, transcoder in enumerate(stack.transcoders):
                x = activations.x[layer][tangents.rows]
                directions, changes = tangents.draw(layer, x, transcoder.input_std, transcoder.output_std)
                weights = activations.weights[layer][tangents.rows] * (jvp * SHARE)
                equations.add_without_bias(layer, unit_derivatives(transcoder, x, directions), changes, weights)
    if equations is None:
        return
    equations.sum_over_processes()
    for layer, transcoder in enumerate(stack.transcoders):
        weight, bias = equations.solve(layer, ridge=RIDGE, prior=transcoder.head.weight)
        transcoder.head.weight.copy_(weight)
        transcoder.head.bias.copy_(bias)
        share_scale(transcoder)

"""The closed-form start: exact where the MLP is quadratic, least squares elsewhere, finite always."""

import numpy as np
import pytest
import torch

from bilinear_tc.train.activations import Activations
from bilinear_tc.train.fitting.closed_form import ActivationFit, closed_form_start, share_scale, units
from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.fitting.mlp_weights import MLPWeights
from bilinear_tc.train.fitting.stack import Stack
from bilinear_tc.train.moments import Moments
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")


def sample(count=6):
    generator = torch.Generator().manual_seed(3)
    return [TokenBatch(torch.randint(50, (16, 32), generator=generator), None) for _ in range(count)]


def start(base, **settings):
    """A stack after the closed-form start, and the FVU of each layer on another batch."""
    torch.manual_seed(0)
    stack = Stack(make_transcoders(Recipe(**settings), base, CPU), dtype=torch.float32)
    activations = Activations(base, 512, device=CPU, dtype=torch.float32)

    def calibration(_what):
        for batch in sample():
            activations.fill(batch, 16)
            yield activations

    closed_form_start(stack, base, calibration)
    generator = torch.Generator().manual_seed(9)
    activations.fill(TokenBatch(torch.randint(50, (16, 32), generator=generator), None), 16)
    fvu = []
    for x, y, transcoder in zip(activations.x, activations.y, stack.transcoders, strict=True):
        with torch.no_grad():
            error = (transcoder(x) - y).double()
        fvu.append((error.square().sum(0) / y.double().var(0, correction=0)).mean().item() / len(y))
    return stack, fvu


class Activation(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def set_activation(base, function):
    for layer in base.layers:
        mlp = base.mlp(layer)
        setattr(mlp, "act" if hasattr(mlp, "act") else "act_fn", Activation(function))


def test_a_quadratic_mlp_is_recovered_exactly(neox):
    set_activation(neox, lambda z: 0.3 + 1.7 * z - 0.4 * z.square())
    _, fvu = start(neox)
    assert max(fvu) < 1e-6


def test_a_gated_mlp_with_a_linear_gate_is_recovered_exactly(llama):
    set_activation(llama, lambda z: 0.5 - 2 * z)
    _, fvu = start(llama, hidden_multiplier=2.5)
    assert max(fvu) < 1e-6


@pytest.mark.parametrize("base_name", ["neox", "llama"])
def test_it_beats_the_best_affine_map_where_the_mlp_is_smooth(base_name, request):
    base = request.getfixturevalue(base_name)
    multiplier = 4 if base_name == "neox" else 2.5
    _, fvu = start(base, hidden_multiplier=multiplier)
    activations = Activations(base, 512, device=CPU, dtype=torch.float32)
    activations.fill(sample()[0], 16)
    for layer, (x, y) in enumerate(zip(activations.x.double(), activations.y.double(), strict=True)):
        design = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        residual = y - design @ (torch.linalg.pinv(design, rtol=1e-8) @ y)
        affine = (residual.square().sum(0) / y.var(0, correction=0)).mean().item() / len(y)
        assert fvu[layer] < affine


def test_unit_coefficients_are_each_neurons_least_squares_quadratic(neox):
    x = torch.randn(500, 16) * 2
    with torch.no_grad():
        weights = MLPWeights.read(neox, 1, x, neox.mlp(1)(x))
        z = weights.gate(x)
        fit = ActivationFit(weights, Moments.of(z[:100]))
        rows = torch.rand(500)
        fit.add(x[:100], rows[:100])
        fit.add(x[100:], rows[100:])
        coefficients = fit.solve()
        t = (z.double() - fit.shift) / fit.scale
    for neuron in (0, 17, 63):
        target = weights.act(z[:, neuron]).double().numpy()
        expected = np.polyfit(t[:, neuron].numpy(), target, deg=2, w=rows.sqrt().numpy())[::-1]
        np.testing.assert_allclose(coefficients[:, neuron].numpy(), expected, rtol=1e-3, atol=1e-4)


def test_gated_coefficients_are_the_least_squares_line_weighted_by_up(llama):
    x = torch.randn(500, 16)
    with torch.no_grad():
        weights = MLPWeights.read(llama, 0, x, llama.mlp(0)(x))
        g, up = weights.gate(x), weights.up(x)
        fit = ActivationFit(weights, Moments.of(g))
        fit.add(x, torch.ones(500))
        coefficients = fit.solve()
        t = (g.double() - fit.shift) / fit.scale
    for neuron in (0, 39):
        expected = np.polyfit(
            t[:, neuron].numpy(), weights.act(g[:, neuron]).double().numpy(), deg=1, w=up[:, neuron].abs().numpy()
        )[::-1]
        np.testing.assert_allclose(coefficients[:, neuron].numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("multiplier", [0.5, 1, 8])
def test_fewer_and_more_units_than_the_mlp_has(neox, multiplier):
    set_activation(neox, torch.nn.functional.gelu)
    _, fvu = start(neox, hidden_multiplier=multiplier)
    _, full = start(neox, hidden_multiplier=4)
    for few_or_many, same in zip(fvu, full, strict=True):
        assert few_or_many < 1
        assert (few_or_many > same) if multiplier < 4 else (few_or_many < same * 1.05)


def test_sharing_the_scale_changes_no_output_and_makes_sizes_equal(neox):
    torch.manual_seed(0)
    transcoder = make_transcoders(Recipe(), neox, CPU)[0].double()
    with torch.no_grad():
        transcoder.head.weight.mul_(torch.logspace(-4, 4, 64))
        transcoder.right.weight[5] = 0  # a linear unit: its right side is a bias alone
        x = torch.randn(20, 16, dtype=torch.float64)
        before = transcoder(x)
        share_scale(transcoder)
        torch.testing.assert_close(transcoder(x), before)
        left = torch.cat([transcoder.left.weight, transcoder.left.bias[:, None]], dim=1).norm(dim=1)
        right = torch.cat([transcoder.right.weight, transcoder.right.bias[:, None]], dim=1).norm(dim=1)
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(left, transcoder.head.weight.detach().norm(dim=0))


def test_dead_and_constant_units_give_a_warning_and_no_nan(neox, caplog):
    mlp = neox.mlp(1)
    with torch.no_grad():
        mlp.dense_h_to_4h.weight[3:7] = 0  # constant pre-activations
        mlp.dense_4h_to_h.weight[:, 9] = 0  # a unit that says nothing
    stack, fvu = start(neox)
    assert "4 of 64 features do not vary" in caplog.text
    assert all(value < 1 for value in fvu)
    for transcoder in stack.transcoders:
        assert all(p.isfinite().all() for p in transcoder.parameters())


def test_an_mlp_of_another_kind_is_refused(neox):
    mlp = neox.mlp(2)
    true_forward = mlp.forward
    mlp.forward = lambda x: true_forward(x) + 3 * x
    with pytest.raises(ValueError, match=r"no closed-form start for gpt_neox.layers.2.mlp.*--init random"):
        start(neox)


def test_hidden_units_are_the_products(neox):
    transcoder = make_transcoders(Recipe(), neox, CPU)[0]
    with torch.no_grad():
        transcoder.input_mean.fill_(0.5)
        transcoder.input_std.fill_(2.0)
        x = torch.randn(4, 16)
        z = (x - 0.5) / 2
        expected = transcoder.left(z) * transcoder.right(z)
        torch.testing.assert_close(units(transcoder, x), expected)

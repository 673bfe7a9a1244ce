"""Batched Muon against singular value decompositions, a float64 loop, torch.optim.Muon and itself on more processes.

Rounding in half precision is simulated on the CPU: products accumulate in float32 and round once, as tensor cores do.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forking import ForkServer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from bilinear_tc.train.fitting.muon import (
    COEFFICIENTS,
    Muon,
    newton_schulz,
    newton_schulz_dtype,
    normalize,
    restart_interval,
)

FLOAT32_ROUNDOFF = 2.0**-24
CLASSIC = [(3.4445, -4.7750, 2.0315)] * 5
SPECTRA = ("gaussian", "condition 1e6", "power law", "rank 3", "one dominant", "positive")


def matrix(spectrum: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    """A float64 matrix [rows, cols] of Frobenius norm 1 whose singular values are as named."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    if spectrum == "positive":  # a dominant mean, as in gradients of uncentred activations
        noise = noise.uniform_(generator=generator) + 0.05 * torch.randn(rows, cols, generator=generator)
    elif spectrum != "gaussian":
        u, s, v = torch.linalg.svd(noise, full_matrices=False)
        index = torch.arange(len(s), dtype=torch.float64)
        s = {
            "condition 1e6": 10 ** (-6 * index / (len(s) - 1)),
            "power law": (index + 1) ** -1.5,
            "rank 3": (index < 3).double(),
            "one dominant": torch.where(index == 0, 1.0, 1e-3),
        }[spectrum]
        noise = u * s @ v
    return noise / noise.norm()


def exact(matrices: Tensor, schedule: list[tuple[float, float, float]]) -> Tensor:
    """The polynomials applied to the singular values of each normalized matrix, in float64."""
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for a, b, c in schedule:
        s = a * s + b * s**3 + c * s**5
    return u * s[..., None, :] @ v


def orthogonalize(
    matrices: Tensor, *, coefficients: str = "classic", dtype: torch.dtype | None = None, restart: int | None = None
) -> Tensor:
    """What the optimizer makes of updates [layers, rows, cols], in another type or stretches if they are given."""
    unit = torch.empty_like(matrices, dtype=dtype or newton_schulz_dtype(matrices))
    normalize(matrices, out=unit)
    return newton_schulz(unit, coefficients, restart)


def flops(rows: int, cols: int, *, restart: int) -> int:
    """Operations on one matrix, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(1, rows, cols), restart=restart)
    return counter.get_total_flops()


def torch_orthogonalize(matrix: Tensor) -> Tensor:
    """What torch.optim.Muon makes of one matrix [rows, cols] by its own Newton–Schulz in bfloat16."""
    weight = torch.nn.Parameter(torch.zeros_like(matrix))
    weight.grad = matrix.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return -weight.detach() / math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))


class TensorCores(TorchFunctionMode):
    """Half-precision batched products as a GPU makes them: exact products, float32 sums, one rounding."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (torch.bmm, torch.baddbmm) or args[0].dtype not in (torch.float16, torch.bfloat16):
            return func(*args, **(kwargs or {}))
        return func(*[x.float() for x in args], **(kwargs or {})).to(args[0].dtype)


class Products(TorchFunctionMode):
    """How many matrices went into each Newton–Schulz stretch, which begins with the one torch.bmm in it."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.bmm:
            self.matrices.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def spectral_error(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(actual.double() - expected, 2))


# --- polynomials ------------------------------------------------------------------------------------------------


def minimax_quintic(lower: float, upper: float) -> np.ndarray:
    """(a, b, c) of the odd quintic nearest to 1 on [lower, upper], by Remez's exchange of its four extrema."""
    points = np.array([lower, (3 * lower + upper) / 4, (lower + 3 * upper) / 4, upper])
    for _ in range(50):
        system = np.stack([points, points**3, points**5, np.array([1, -1, 1, -1])], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)
        points[1:3] = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return np.array([a, b, c])


def test_polar_express_is_the_sequence_of_minimax_polynomials():
    lower, upper, cushion = 1e-3, 1.0, 0.02407327424182761
    for step in range(5):
        odd = minimax_quintic(max(lower, cushion * upper), upper)
        ends = [float(odd @ [x, x**3, x**5]) for x in (lower, upper)]
        odd = odd * 2 / sum(ends)  # as far above 1 at the upper end as below it at the lower
        lower, upper = sorted(2 * end / sum(ends) for end in ends)
        np.testing.assert_allclose(COEFFICIENTS["polar_express"][step], odd / 1.01 ** np.array([1, 3, 5]), rtol=1e-9)
    assert len(COEFFICIENTS["polar_express"]) == 5
    assert COEFFICIENTS["classic"] == CLASSIC


# --- orthogonalize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("restart", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(3, 24, 8), (3, 8, 24), (2, 9, 9), (1, 1, 7), (2, 7, 1)])
def test_every_form_is_the_polynomial_of_the_singular_values(shape, restart, coefficients):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = x.clone()
    actual = orthogonalize(x, coefficients=coefficients, restart=restart)
    torch.testing.assert_close(actual, exact(x, COEFFICIENTS[coefficients]), rtol=0, atol=1e-11)
    assert torch.equal(x, before)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("restart", [None, 1])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
def test_float32_is_exact_to_its_rounding_on_ill_conditioned_matrices(shape, spectrum, restart, coefficients):
    schedule = COEFFICIENTS[coefficients]
    # The composed polynomial enlarges no rounding error more than its slope at 0, the product of all a. The Gram form
    # enlarges an error of G by a² a step, but only for two steps: no more. Eight roundings: those of a step's products.
    slope = math.prod(a for a, _, _ in schedule)
    x = matrix(spectrum, *shape).float()
    actual = orthogonalize(x[None], coefficients=coefficients, restart=restart)[0]
    assert actual.dtype == torch.float32
    assert spectral_error(actual, exact(x, schedule)) <= 8 * slope * FLOAT32_ROUNDOFF


@pytest.mark.parametrize("shape", [(2, 4, 16), (2, 16, 4), (2, 5, 5), (2, 1, 3)])
def test_zero_stays_zero_beside_a_matrix_that_is_not(shape):
    x = torch.zeros(shape)
    x[1, 0, 0] = -1e-6
    actual = orthogonalize(x)
    assert torch.equal(actual[0], torch.zeros(shape[1:]))
    expected = exact(x[1:], CLASSIC)[0]
    torch.testing.assert_close(actual[1].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
def test_float16_gram_form_stays_near_the_exact_result(shape, spectrum, coefficients):
    x = matrix(spectrum, *shape).float()[None]
    expected = exact(x, COEFFICIENTS[coefficients])
    with TensorCores():
        half = orthogonalize(x, coefficients=coefficients, dtype=torch.float16)
        brain = orthogonalize(x, coefficients=coefficients, dtype=torch.bfloat16)
    assert restart_interval(*shape, torch.float16) > 1
    assert restart_interval(*shape, torch.bfloat16) == 1
    assert half.dtype == torch.float16
    # bfloat16's plain form is what torch.optim.Muon trains with: float16's Gram form must do as well, or else stay
    # well inside the 0.3 by which the classic polynomial itself misses 1.
    assert spectral_error(half[0], expected[0]) < max(0.1, spectral_error(brain[0], expected[0]))
    assert spectral_error(brain[0], expected[0]) < 0.6


def test_half_precision_needs_the_restart():
    x = matrix("one dominant", 64, 256).float()[None]
    expected = exact(x, CLASSIC)
    with TensorCores():
        without, with_restart = (orthogonalize(x, dtype=torch.float16, restart=steps) for steps in (5, 3))
    assert relative_error(without, expected) > 10 * relative_error(with_restart, expected)


def test_a_gradient_below_float16s_range_is_not_lost():
    x = 2e-7 * matrix("gaussian", 16, 64).float()[None]
    with TensorCores():
        assert relative_error(orthogonalize(x, dtype=torch.float16), exact(x, CLASSIC)) < 0.05


@pytest.mark.parametrize("large", [8, 11, 12, 13, 16, 64])
def test_the_form_chosen_is_the_cheaper_one(large):
    chosen = restart_interval(large, 8, torch.float32)
    assert flops(large, 8, restart=chosen) == min(flops(large, 8, restart=1), flops(large, 8, restart=3))


def test_compiles_into_one_graph():
    x = torch.randn(3, 16, 40)
    compiled = torch.compile(orthogonalize, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), orthogonalize(x), rtol=1e-4, atol=1e-5)


# --- the optimizer ----------------------------------------------------------------------------------------------

SHAPES = [(3, 20, 8), (2, 20, 8), (3, 8, 20), (1, 12, 10)]  # left, right, head, a single matrix


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) / 128


def take_steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def reference_steps(params: list[Tensor], steps: range, *, lr, weight_decay, momentum=0.95) -> list[Tensor]:
    """Muon's formulas in float64, one matrix at a time, orthogonalized through its singular values."""
    params = [param.detach().double().clone() for param in params]
    buffers = [torch.zeros_like(param) for param in params]
    for step in steps:
        twins = [torch.nn.Parameter(param.float()) for param in params]
        set_gradients(twins, step)
        for param, buffer, twin in zip(params, buffers, twins, strict=True):
            rows, cols = param.shape[1:]
            adjust = math.sqrt(max(1, rows / cols))
            buffer.copy_(momentum * buffer + (1 - momentum) * twin.grad.double())
            update = (1 - momentum) * twin.grad.double() + momentum * buffer
            for w, u in zip(param, update, strict=True):
                w.copy_(w - lr * weight_decay * w - lr * adjust * exact(u, CLASSIC))
    return params


@pytest.mark.parametrize(
    "options", [{"lr": 0.02, "weight_decay": 0.01}, {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.5}]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_steps_equal_a_float64_loop_over_single_matrices(dtype, tolerance, options):
    params = parameters(dtype)
    expected = reference_steps(params, range(4), **options)
    optimizer = Muon(params, **options)
    take_steps(optimizer, params, range(4))
    for actual, reference in zip(params, expected, strict=True):
        torch.testing.assert_close(actual.detach().double(), reference, rtol=0, atol=tolerance)


def test_each_layer_steps_as_torch_optim_muon_does_within_its_bfloat16_rounding():
    lr, shared = 0.02, {"weight_decay": 0.1, "momentum": 0.95}
    params = parameters(shapes=[(3, 96, 24), (2, 24, 96)])
    layers = [torch.nn.Parameter(layer.clone()) for param in params for layer in param.detach()]
    ours = Muon(params, lr, **shared)
    torchs = torch.optim.Muon(layers, lr, **shared)
    rounding, travelled = [0.0] * len(layers), [0.0] * len(layers)
    for step in range(3):
        set_gradients(params, step)
        for layer, gradient in zip(layers, (layer for param in params for layer in param.grad), strict=True):
            layer.grad = gradient.clone()
        ours.step()
        torchs.step()
        for index, layer in enumerate(layers):
            update = torch.lerp(layer.grad, torchs.state[layer]["momentum_buffer"], 0.95)
            rows, cols = layer.shape
            adjust = math.sqrt(max(1, rows / cols))
            expected = exact(update, CLASSIC)
            rounding[index] += lr * adjust * float((torch_orthogonalize(update) - expected).norm())
            travelled[index] += lr * adjust * float(expected.norm())
    matrices = [layer for param in params for layer in param.detach()]
    for index, (matrix, layer) in enumerate(zip(matrices, layers, strict=True)):
        # The triangle: torch to exact is bfloat16's rounding, as summed up; exact to ours is float32's.
        assert (matrix - layer.detach()).norm() <= rounding[index] + 1e-5 * travelled[index]
        assert rounding[index] < 0.03 * travelled[index]


def test_normuon_is_the_papers_algorithm():
    lr, weight_decay, beta1, beta2 = 0.03, 0.1, 0.9, 0.95
    params = parameters(torch.float64, shapes=[(2, 12, 5), (1, 5, 12)])
    layers = [layer.clone() for param in params for layer in param.detach()]
    momenta = [torch.zeros_like(layer) for layer in layers]
    squares = [torch.zeros(len(layer), dtype=torch.float64) for layer in layers]
    optimizer = Muon(params, lr, weight_decay=weight_decay, momentum=beta1, variant="normuon")
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
        gradients = [layer for param in params for layer in param.grad]
        for w, m, v, gradient in zip(layers, momenta, squares, gradients, strict=True):
            m.copy_(beta1 * m + (1 - beta1) * gradient)
            o = exact(beta1 * m + (1 - beta1) * gradient, CLASSIC)  # the paper has no Nesterov momentum: m itself
            v.copy_(beta2 * v + (1 - beta2) * (o * o).mean(1))
            o = o / (v.sqrt()[:, None] + 1e-8)
            w.copy_(w - lr * weight_decay * w - 0.2 * lr * math.sqrt(o.numel()) / o.norm() * o)
    actual = [layer for param in params for layer in param.detach()]
    for layer, reference in zip(actual, layers, strict=True):
        torch.testing.assert_close(layer, reference, rtol=0, atol=1e-10)


def test_parameters_of_one_shape_share_one_newton_schulz():
    params = parameters(shapes=[(3, 20, 8), (3, 8, 20), (2, 20, 8), (1, 20, 8)])
    optimizer = Muon(params)
    set_gradients(params, 0)
    with Products() as products:
        optimizer.step()
    assert sorted(products.matrices) == [3, 3, 6, 6]  # two stretches for each of two shapes


def test_a_parameter_without_gradient_is_left_alone():
    params = parameters()
    before = params[1].detach().clone()
    optimizer = Muon(params)
    set_gradients(params, 0)
    params[1].grad = None
    gradients = [None if param.grad is None else param.grad.clone() for param in params]
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    assert all(param.grad is None or torch.equal(param.grad, old) for param, old in zip(params, gradients, strict=True))


@pytest.mark.parametrize("variant", ["muon", "normuon"])
def test_state_dict_goes_on_bit_for_bit(variant, tmp_path: Path):
    params = parameters()
    optimizer = Muon([{"params": params, "lr": 0.02, "peak_lr": 0.02}], variant=variant)
    take_steps(optimizer, params, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = Muon(twins, lr=9.0, variant=variant)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    take_steps(optimizer, params, range(3, 6))
    take_steps(resumed, twins, range(3, 6))
    assert all(torch.equal(param, twin) for param, twin in zip(params, twins, strict=True))
    assert copy.deepcopy(resumed).state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("options", [{"variant": "adamuon"}, {"coefficients": "newton"}])
def test_bad_options_are_named(options):
    (name,) = options.values()
    with pytest.raises(ValueError, match=rf"one of classic, polar_express and .* of muon, normuon, not .*{name}"):
        Muon(parameters(), **options)


@pytest.mark.parametrize("param", [torch.zeros(7), torch.zeros(2, 7), torch.zeros(2, 3, 4, dtype=torch.complex64)])
def test_other_parameters_than_stacks_of_real_matrices_are_refused(param):
    with pytest.raises(ValueError, match=rf"not \[{param.shape[0]}.*\] of {param.dtype}; give biases to torch.optim"):
        Muon([torch.nn.Parameter(param)])


# --- several processes ------------------------------------------------------------------------------------------

# Seven and two matrices: shares of 4 and 3, or 3, 3 and 1; and of 1 and 1, or 1, 1 and none.
SHARED_SHAPES = [(4, 24, 8), (3, 24, 8), (2, 8, 24)]


def work() -> None:
    """A script: takes the same steps on 3, then on 2 processes, and saves what this one ends with. The arguments are
    its rank and a folder."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for processes in (3, 2):
        if rank >= processes:
            return
        rendezvous = f"file://{folder / f'rendezvous-{processes}'}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
        for variant in ("muon", "normuon"):
            params = parameters(shapes=SHARED_SHAPES)
            optimizer = Muon(params, variant=variant)
            with Products() as products:
                take_steps(optimizer, params, range(3))
            result = [param.detach() for param in params], optimizer.state_dict()["state"], products.matrices
            torch.save(result, folder / f"{variant}-{rank}-of-{processes}.pt")
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_and_three_processes_share_the_work_and_end_as_one_does(fork_server: ForkServer, tmp_path: Path):
    ended = [process.wait() for process in [fork_server.start(work, [rank, tmp_path]) for rank in range(3)]]
    assert [each.returncode for each in ended] == [0, 0, 0], ended[0].stderr
    for variant in ("muon", "normuon"):
        params = parameters(shapes=SHARED_SHAPES)
        optimizer = Muon(params, variant=variant)
        take_steps(optimizer, params, range(3))
        for processes, shares in ((2, ([4, 1], [3, 1])), (3, ([3, 1], [3, 1], [1, 0]))):
            for rank, share in enumerate(shares):
                result = torch.load(tmp_path / f"{variant}-{rank}-of-{processes}.pt")
                assert all(torch.equal(*pair) for pair in zip(params, result[0], strict=True))
                for index, state in optimizer.state_dict()["state"].items():
                    assert all(torch.equal(value, result[1][index][name]) for name, value in state.items())
                assert result[2] == [matrices for matrices in share for _ in range(2)] * 3

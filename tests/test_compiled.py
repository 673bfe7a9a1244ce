"""What a GPU runs compiled, traced here: in bfloat16 against float64, and compiled once whatever the rows are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo
from torch import Tensor

from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.fitter import Fitter
from bilinear_tc.train.fitting.gradients import error_and_gradients, tangent_error_and_gradients
from bilinear_tc.train.moments import Moments
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` traces, as for any backend, and spares the minutes of generating code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("single", [False, True])
def test_traced_gradients_in_bfloat16_are_near_those_in_float64(compiling, single):
    torch.manual_seed(0)
    names = ["left", "head"] if single else ["left", "right", "head"]
    parameters = {f"{name}.weight": numbers(*((6, 24) if name == "head" else (24, 8))) for name in names}
    parameters |= {f"{name}.bias": numbers(6 if name == "head" else 24) for name in names}
    x, y, weights, factor = numbers(40, 8), numbers(40, 6), torch.rand(40).double(), numbers()
    statistics = numbers(8), numbers(8).exp(), numbers(6), numbers(6).exp()
    for function, rows in (
        (error_and_gradients, (x, y, weights, *statistics)),
        (tangent_error_and_gradients, (x, numbers(40, 8), y, weights)),
    ):
        exact, expected = function(parameters, *rows, factor, torch.float64)
        narrow = {name: parameter.float() for name, parameter in parameters.items()}
        error, gradients = torch.compile(function)(narrow, *(of.float() for of in (*rows, factor)), torch.bfloat16)
        assert error.dtype == torch.float32
        assert abs(error - exact) < 0.02 * exact
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_traced_moments_of_bfloat16_rows_are_those_in_float64(compiling):
    x, ordinary = (3 + numbers(500, 16)).bfloat16(), torch.arange(500) % 7 > 0
    moments, kept = torch.compile(Moments.of)(x, ordinary.float()), x[ordinary].double()
    torch.testing.assert_close(moments.mean, kept.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.deviation, (kept - kept.mean(0)).square().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_no_step_compiles_what_the_first_of_its_kind_has(compiling, neox):
    """Text without padding: the last part of a step is smaller, and later steps compile nothing. Padded text: neither
    do they once two numbers of rows have been seen."""
    recipe = Recipe(init="random", batch_size=7, seq_len=8, micro_batch_size=3, compile=True, jvp=0.1, dtype="bfloat16")
    fitter = Fitter(recipe, Base(neox.model.bfloat16(), None), CPU)
    ids = torch.randint(50, (7, 8))
    compiled = []
    for number, rows in enumerate((56, 56, 56, 47, 38, 53, 29)):
        mask = None if rows == 56 else (torch.arange(56) < rows).view(7, 8)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        fitter.step(TokenBatch(ids, mask), number)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert compiled == [8, 0, 0, 1, 0, 0, 0]

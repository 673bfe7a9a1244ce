"""A base whose weights bitsandbytes keeps in 8 or 4 bits: what is read of its MLPs is what they compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.fitter import Fitter
from bilinear_tc.train.fitting.mlp_weights import MLPWeights
from bilinear_tc.train.measuring.jacobian import isotropic_probes, jacobian_scores
from bilinear_tc.train.measuring.sample import Sample, as_map
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[quantization]'")

CPU = torch.device("cpu")
RECIPE = Recipe(base="train/quickstart", layers="1", batch_size=4, seq_len=32, init_tokens=256, max_steps=2, jvp=0.1)
ROUNDING = {"int8": 2**-10, "nf4": 2**-8}  # of the types that they are unpacked to: float16, bfloat16


def rounded(weight: Tensor, kind: str) -> Tensor:
    """What is left of a weight: each row in 255 steps of its largest, or bitsandbytes' own 16 values a block."""
    if kind == "nf4":
        return bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight, quant_type="nf4"))
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def mlp_of(kind: str) -> nn.Module:
    mlp = Base.of_recipe(RECIPE, CPU).mlp(1).double()
    for module in mlp.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data.float(), kind).double()
    return mlp


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_packed_mlp_is_read_as_what_is_left_of_its_weights(kind):
    base, exact = Base.of_recipe(replace(RECIPE, base_quantization=kind), CPU), mlp_of(kind)
    torch.manual_seed(0)
    ids = TokenBatch(torch.randint(2000, (4, 32)))
    fitter = Fitter(RECIPE, base, CPU)
    fitter.activations.fill(ids, 4)
    x, y = fitter.activations.x[0], fitter.activations.y[0]
    read = MLPWeights.read(base, 1, x, y)
    for ours, module in zip(
        (read.gate, read.down), (m for m in exact.modules() if isinstance(m, nn.Linear)), strict=True
    ):
        assert (ours.weight - module.weight).norm() < ROUNDING[kind] * module.weight.norm()
        assert torch.equal(ours.bias, module.bias.float())

    sample = Sample(base)
    sample.inputs, sample.outputs = fitter.activations.x, fitter.activations.y
    points, probes = isotropic_probes(x[:64], x.std(0))
    cosine, error = jacobian_scores(
        lambda x: exact(x.double()), lambda x: as_map(sample, 0)(x).double(), points, probes, y.std(0).double()
    )
    assert cosine > 1 - ROUNDING[kind] ** 2
    assert error < 2 * ROUNDING[kind]

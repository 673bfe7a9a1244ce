"""What a fit leaves with each layer of where its inputs lie: their correlation, and the norm that they leave."""

from __future__ import annotations

import pytest
import torch
from bases import SIZES, tiny_gpt2, tiny_llama, tiny_neox
from transformers import Olmo2Config, Olmo2ForCausalLM

from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.closed_form import closed_form_start
from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.fitting.stack import Stack
from bilinear_tc.train.moments import Covariances
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")


def started(
    base: Base, massive: slice = slice(0), channel: int | None = None
) -> tuple[Stack, list[torch.Tensor], list[torch.Tensor]]:
    """A stack after the closed-form start, and each batch's inputs [layers, rows, n_inputs] and outputs that it saw.

    Rows of layer 1 are made massive: all that they say 15 times the median norm, or 500 times in one channel, which
    goes with a change of all inputs by 1.
    """
    torch.manual_seed(0)
    stack = Stack(make_transcoders(Recipe(), base, CPU), dtype=torch.float32)
    activations = Activations(base, 512, device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    batches = [TokenBatch(torch.randint(50, (16, 32), generator=generator), None) for _ in range(4)]
    seen, said = [], []

    def calibration(what):
        for batch in batches:
            activations.fill(batch, 16)
            if seen:  # the first batch's rows show which MLP it is
                sizes = activations.y[1].norm(dim=-1, keepdim=True)
                if channel is None:
                    activations.y[1, massive] *= 15 * sizes.median() / sizes[massive]  # massive, and at full weight
                else:
                    activations.x[1, massive] += 1
                    activations.y[1, massive, channel] = 500 * sizes.median()
            if what == "moments":
                seen.append(activations.x.clone())
                said.append(activations.y.clone())
            yield activations

    closed_form_start(stack, base, calibration)
    return stack, seen, said


def test_the_closed_form_leaves_the_inputs_covariance_with_each_layer(neox):
    stack, seen, _ = started(neox)
    for transcoder, x in zip(stack.transcoders, torch.cat(seen, 1).double(), strict=True):
        expected = x.T.cov(correction=0)
        torch.testing.assert_close(transcoder.input_covariance().double(), expected, rtol=1e-4, atol=1e-4)
        assert transcoder.spectrum(torch.ones(16), 2).metric == "covariance"


def test_rows_that_are_massive_are_not_in_the_covariance(neox):
    stack, seen, _ = started(neox, massive=slice(400, None))
    ordinary = torch.cat([seen[0][1], *(x[1, :400] for x in seen[1:])]).double()
    found = stack.transcoders[1].input_covariance().double()
    torch.testing.assert_close(found, ordinary.T.cov(correction=0), rtol=1e-4, atol=1e-4)


def test_a_layer_with_massive_rows_has_a_unit_that_tells_them(neox):
    """Their linear discriminant, squared, in place of the neuron that says least; other layers have none."""
    stack, seen, _ = started(neox, massive=slice(400, None))
    ordinary = torch.cat([seen[0][1], *(x[1, :400] for x in seen[1:])]).double()
    mean, std = ordinary.mean(0), ordinary.std(0, correction=0)
    z, far = (ordinary - mean) / std, (torch.cat([x[1, 400:] for x in seen[1:]]).double().mean(0) - mean) / std
    direction = (z.T @ z / len(z) + 0.01 * torch.eye(16)).inverse() @ far
    nearest = []
    for transcoder in stack.transcoders:
        left, right = transcoder.left.weight.double(), transcoder.right.weight.double()
        near = [torch.cosine_similarity(side, direction[None]) for side in (left, right)]
        nearest.append((near[0].minimum(near[1])).max().item())
    assert nearest[1] > 0.9999
    assert max(nearest[0], nearest[2]) < 0.99
    plain, *_ = started(neox)
    for layer in (0, 2):
        for one, other in zip(
            stack.transcoders[layer].parameters(), plain.transcoders[layer].parameters(), strict=True
        ):
            assert torch.equal(one, other)


def test_ordinary_rows_do_not_pay_for_massive_ones(neox):
    """What the unit is for: both are right in the channel that the massive rows are large in."""
    stack, seen, said = started(neox, massive=slice(490, None), channel=3)
    with torch.no_grad():
        x, y = torch.cat([x[1] for x in seen[1:]]), torch.cat([y[1] for y in said[1:]])
        error = (stack.transcoders[1](x) - y)[:, 3]
    massive = torch.arange(len(x)) % 512 >= 490
    assert error[~massive].square().mean() < y[~massive, 3].var()
    assert error[massive].square().mean() < 0.001 * y[massive, 3].square().mean()


def test_a_feature_that_does_not_vary_correlates_with_nothing():
    x = torch.randn(200, 3) * torch.tensor([1.0, 0.0, 2.0]) + torch.tensor([1.0, 7.0, 0.0])
    covariances = Covariances(x[:1].clone())
    covariances.add(0, x)
    expected = torch.zeros(3, 3).double()
    expected[[[0], [2]], [0, 2]] = x[:, [0, 2]].double().T.corrcoef()
    torch.testing.assert_close(covariances.correlation(0), expected, rtol=1e-5, atol=1e-6)


def test_a_stack_goes_on_with_the_correlations_of_its_state(neox):
    stack, *_ = started(neox)
    fresh = Stack(make_transcoders(Recipe(), neox, CPU), dtype=torch.float32)
    for layer in range(len(fresh.transcoders)):
        fresh.load_layer_state(layer, stack.layer_state(layer))
    for one, other in zip(fresh.transcoders, stack.transcoders, strict=True):
        assert torch.equal(one.input_correlation, other.input_correlation)
        assert not torch.equal(one.input_correlation, torch.eye(16))


def test_noise_knows_no_correlation(neox):
    for transcoder in make_transcoders(Recipe(init="random"), neox, CPU):
        assert transcoder.spectrum(torch.ones(16), 2).metric == "variances"


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama, tiny_gpt2])
def test_the_norm_is_the_bases_and_its_gauge_holds_on_what_the_base_computes(make):
    model = make().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    base = Base(model, tokenizer=None)
    kind = "rmsnorm" if make is tiny_llama else "layernorm"
    for layer, transcoder in zip(base.layers, make_transcoders(Recipe(), base, CPU), strict=True):
        assert transcoder.config.input_norm == kind
        x = transcoder.capture(model, input_ids=torch.arange(40).reshape(2, 20) % 50)[0].double()
        transcoder.double()
        n = (x - transcoder.norm_bias) / transcoder.norm_weight
        assert kind == "rmsnorm" or n.mean(-1).abs().max() < 1e-5
        torch.testing.assert_close(n.square().mean(-1), torch.ones(2, 20).double(), rtol=5e-2, atol=0)  # its eps
        u = torch.randn(16).double()
        fixed, free = (transcoder.quadratic_form(u, gauge=gauge) for gauge in (kind, None))
        short = 1 - n.square().mean(-1)
        torch.testing.assert_close(fixed(x) - free(x), fixed.moved * short, rtol=1e-4, atol=1e-5)
        assert base.norm(layer).kind == kind


def test_a_layer_whose_input_leaves_no_norm_or_one_that_drops_a_feature_has_none():
    base = Base(Olmo2ForCausalLM(Olmo2Config(**SIZES | {"intermediate_size": 32})), tokenizer=None)
    assert base.norm(0) is None  # it norms what its MLPs say
    assert make_transcoders(Recipe(), base, CPU)[0].config.input_norm is None
    model = tiny_llama()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = 0
    base = Base(model, tokenizer=None)
    assert [base.norm(layer) is None for layer in base.layers] == [False, True, False]

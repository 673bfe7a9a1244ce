"""The stack's gradients and errors against autograd on unstacked float64 copies."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo

from bilinear_tc.train.activations import Activations
from bilinear_tc.train.fitting import fitter
from bilinear_tc.train.fitting.fitter import choose_micro_batch_size, make_optimizers, make_transcoders
from bilinear_tc.train.fitting.muon import Muon
from bilinear_tc.train.fitting.stack import Stack
from bilinear_tc.train.fitting.tangents import Tangents
from bilinear_tc.train.massive import massive, median_norm, row_weights
from bilinear_tc.train.moments import Moments
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")


def filled(base, mask=None, micro_batch_size=3):
    batch = TokenBatch(torch.randint(50, (5, 8), generator=torch.Generator().manual_seed(1)), mask)
    activations = Activations(base, 40, device=CPU, dtype=torch.float32)
    activations.fill(batch, micro_batch_size)
    return batch, activations


def test_activations_are_what_enters_and_leaves_each_mlp(neox):
    batch, activations = filled(neox)
    seen = {}
    handles = [
        neox.mlp(layer).register_forward_hook(lambda _m, x, y, layer=layer: seen.update({layer: (x[0], y)}))
        for layer in neox.layers
    ]
    neox.model(input_ids=batch.input_ids)
    for handle in handles:
        handle.remove()
    assert neox.mlp_path(1) == "gpt_neox.layers.1.mlp"
    for layer, (x, y) in seen.items():
        torch.testing.assert_close(activations.x[layer], x.flatten(0, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(activations.y[layer], y.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_stopping_after_the_last_layer_changes_no_activation(neox):
    batch, everything = filled(neox)
    neox.layers = [0, 1]
    neox.stop_after_last_layer()
    assert len(neox.model.base_model.layers) == 2
    activations = Activations(neox, 40, device=CPU, dtype=torch.float32)
    activations.fill(batch, 5)
    torch.testing.assert_close(activations.y, everything.y[:2], rtol=1e-5, atol=1e-5)


def test_padding_never_enters(neox):
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[1, 3:], mask[4, 1:] = False, False
    _, everything = filled(neox)
    _, activations = filled(neox, mask)
    assert activations.rows == mask.sum()
    torch.testing.assert_close(activations.x, everything.x[:, mask.flatten()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "bias"), [("bilinear", True), ("bilinear", False), ("input_sum", True)])
def test_gradients_and_errors_equal_float64_autograd(neox, form, bias):
    recipe = Recipe(form=form, bias=bias, init="random", hidden_multiplier=1.5)
    transcoders = make_transcoders(recipe, neox, CPU)
    references = [copy.deepcopy(t).double() for t in transcoders]
    stack = Stack(transcoders, dtype=torch.float32)
    _, activations = filled(neox)
    inputs, outputs = activations.moments()
    errors = stack.accumulate(activations, inputs, outputs, activations.rows, micro_rows=16)

    for layer, reference in enumerate(references):
        x, y = activations.x[layer].double(), activations.y[layer].double()
        z = (y - y.mean(0)) / y.std(0, correction=0)
        error = (reference.normalized_forward((x - x.mean(0)) / x.std(0, correction=0)) - z).square()
        error.mean().backward()
        assert errors[layer].item() == pytest.approx(error.sum().item(), rel=1e-4)
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(
                stack.parameters[name].grad[layer].double(), parameter.grad, rtol=1e-3, atol=1e-6, msg=name
            )


@pytest.mark.parametrize(("form", "bias"), [("bilinear", True), ("bilinear", False), ("input_sum", True)])
def test_weighted_gradients_with_the_derivatives_part_equal_float64_autograd(neox, form, bias):
    transcoders = make_transcoders(Recipe(form=form, bias=bias, init="random", hidden_multiplier=1.5), neox, CPU)
    references = [copy.deepcopy(t).double() for t in transcoders]
    stack = Stack(transcoders, dtype=torch.float32)
    _, activations = filled(neox)
    activations.weights.copy_(torch.rand(activations.weights.shape))
    inputs, outputs = Moments.of(activations.x), Moments.of(activations.y)
    tangents = Tangents(neox, seed=3, dtype=torch.float32)
    tangents.begin(5, activations)
    stack.accumulate(activations, inputs, outputs, activations.rows, 16, tangents, jvp=0.3)

    tangents.begin(5, activations)  # the same directions again
    assert tangents.rows == slice(1, 40, 4)
    for layer, reference in enumerate(references):
        x, y, weights = (of[layer].double() for of in (activations.x, activations.y, activations.weights))
        in_std, out_std = x.std(0, correction=0), y.std(0, correction=0)
        scored, z = (x - x.mean(0)) / in_std, (y - y.mean(0)) / out_std
        loss = (weights[:, None] * (reference.normalized_forward(scored) - z).square()).mean()
        rows = x[1::4]
        directions, changes = tangents.draw(layer, rows.float(), in_std.float(), out_std.float())
        mlp = copy.deepcopy(neox.mlp(neox.layers[layer])).double()
        true = torch.func.jvp(mlp, (rows,), (directions.double() * in_std,))[1] / out_std
        torch.testing.assert_close(changes.double(), true, rtol=1e-4, atol=1e-5)
        own = torch.func.jvp(reference.normalized_forward, (scored[1::4],), (directions.double(),))[1]
        loss = loss + 0.3 * (weights[1::4, None] * (own - true).square()).mean()
        loss.backward()
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(
                stack.parameters[name].grad[layer].double(), parameter.grad, rtol=1e-3, atol=1e-6, msg=name
            )


def test_a_direction_depends_on_the_step_and_the_rows_place_in_the_global_batch_alone(neox, monkeypatch):
    alone, shares = Tangents(neox, 0, torch.float32), []
    x = torch.randn(22, neox.n_inputs)
    y = neox.mlp(0)(x)
    alone.base.layers = [0]
    ones = torch.ones(neox.n_inputs)
    for step in (2, 3):
        alone.begin(step, SimpleNamespace(rows=22, x=x[None], y=y[None]))
        whole = [alone.draw(0, x[alone.rows], ones, ones)[0] for _layer in (0, 1)]
        for rank, rows in enumerate((x[:9], x[9:])):
            monkeypatch.setattr("bilinear_tc.train.fitting.tangents.process_index", lambda rank=rank: rank)
            monkeypatch.setattr("bilinear_tc.train.fitting.tangents.counts_over_processes", lambda *_: [9, 13])
            share = Tangents(neox, 0, torch.float32)
            share.mlps = alone.mlps
            share.begin(step, SimpleNamespace(rows=len(rows)))
            shares.append([share.draw(0, rows[share.rows], ones, ones)[0] for _layer in (0, 1)])
            monkeypatch.undo()
        for layer in (0, 1):
            torch.testing.assert_close(torch.cat([share[layer] for share in shares[-2:]]), whole[layer])
    assert not torch.equal(shares[0][0][0], shares[2][0][0])


def test_a_massive_row_has_no_part_in_the_statistics_and_counts_by_its_relative_error(neox):
    _, activations = filled(neox)
    y = activations.y[1]
    median = median_norm(activations.y)
    torch.testing.assert_close(median[1], y.norm(dim=-1).median())
    activations.weigh(median)
    assert (activations.weights == 1).all()  # none is massive: nothing is weighted
    y[7] *= 100 * median[1] / y[7].norm()
    activations.weigh(median)
    others = [row for row in range(40) if row != 7]
    assert activations.weights[1, 7].item() == pytest.approx((20 / 100) ** 2)
    assert (activations.weights[1, others] == 1).all()
    inputs, outputs = activations.moments()
    assert outputs.count.flatten().tolist() == [40, 39, 40]
    torch.testing.assert_close(outputs.mean[1].float(), y[others].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs.std[1].float(), activations.x[1][others].std(0, correction=0), rtol=1e-4, atol=0)
    y[7] *= 15 * median[1] / y[7].norm()
    activations.weigh(median)
    assert (activations.weights == 1).all()  # massive, and no more than it counts as
    assert activations.moments()[1].count.flatten().tolist() == [40, 39, 40]


def test_in_a_layer_whose_typical_output_is_nothing_no_row_is_massive():
    y = torch.zeros(1, 9, 4)
    y[0, :2] = 3.0
    assert median_norm(y) == 0
    assert torch.equal(row_weights(y, median_norm(y)), torch.ones(1, 9))
    assert not massive(y, median_norm(y)).any()


def test_layers_are_views_of_the_stack_and_gradients_do_not_add_up_over_steps(neox):
    stack = Stack(make_transcoders(Recipe(init="random"), neox, CPU), dtype=torch.float32)
    for name, stacked in stack.parameters.items():
        stacked.data[2] += 1
        assert stack.transcoders[2].get_parameter(name).data_ptr() == stacked.data[2].data_ptr()
        assert stack.transcoders[2].get_parameter(name).grad.data_ptr() == stacked.grad[2].data_ptr()
    _, activations = filled(neox)
    inputs, outputs = activations.moments()
    arguments = (activations, inputs, outputs, activations.rows, 40)
    stack.accumulate(*arguments)
    first = {name: p.grad.clone() for name, p in stack.parameters.items()}
    stack.accumulate(*arguments)
    for name, parameter in stack.parameters.items():
        assert torch.equal(parameter.grad, first[name])
        assert parameter.grad.any()


@pytest.mark.slow
def test_a_compiled_stack_gives_the_same_errors(neox):
    _, activations = filled(neox)
    inputs, outputs = activations.moments()
    errors = []
    for compile_ in (False, True):
        torch.manual_seed(0)
        stack = Stack(make_transcoders(Recipe(init="random"), neox, CPU), dtype=torch.float32, compile=compile_)
        errors.append(stack.accumulate(activations, inputs, outputs, activations.rows, 40))
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_compiled_stack_is_compiled_once_for_all_layers(neox):
    torch._dynamo.reset()
    batch, eager = filled(neox)
    activations = Activations(neox, 40, device=CPU, dtype=torch.float32, compile=True)
    stack = Stack(make_transcoders(Recipe(init="random"), neox, CPU), dtype=torch.float32, compile=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        activations.fill(batch, 5)
        inputs, outputs = activations.moments()
        errors = stack.accumulate(activations, inputs, outputs, activations.rows, 20)
    assert len(errors) == 3
    assert errors.all()
    for compiled, expected in zip((inputs, outputs), eager.moments(), strict=True):
        assert (compiled.count == 40).all()
        torch.testing.assert_close(compiled.mean, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled.deviation, expected.deviation, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["neox", "llama"])
@pytest.mark.slow
def test_a_compiled_base_is_compiled_once_for_all_layers_whichever_are_asked_for(name, request, monkeypatch):
    base = request.getfixturevalue(name)
    torch._dynamo.reset()
    # what is traced and guarded on is the same with a backend that spares the minutes of code generation
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    input_ids = torch.randint(50, (5, 8), generator=torch.Generator().manual_seed(1))
    every = list(base.layers)
    eager = base.activations(input_ids)
    base.compile()
    torch._dynamo.utils.counters.clear()
    for layers in (every, every[:1], every[1:], every):
        base.layers = layers
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = base.activations(input_ids)
        assert list(compiled) == layers
        for layer, tensors in compiled.items():
            for tensor, expected in zip(tensors, eager[layer], strict=True):
                torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == {"neox": 2, "llama": 3}[name]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_gradients_in_half_precision_are_near_those_in_float32_for_any_number_of_rows(neox, dtype, tolerance):
    _, activations = filled(neox)
    inputs, outputs = activations.moments()
    rows = 65536 * 64  # of a big batch, on a base of width 1024: the mean is over 2^32 figures
    gradients, errors = [], []
    for compute_type in (torch.float32, dtype):
        torch.manual_seed(0)
        stack = Stack(make_transcoders(Recipe(init="random"), neox, CPU), dtype=compute_type)
        errors.append(stack.accumulate(activations, inputs, outputs, rows, 16))
        gradients.append({name: p.grad for name, p in stack.parameters.items()})
    torch.testing.assert_close(errors[0], errors[1], rtol=tolerance, atol=0)
    for name, expected in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert (gradients[1][name] - expected).norm() < tolerance * expected.norm(), name


def test_a_chosen_micro_batch_cuts_the_share_evenly_and_grows_with_the_memory(neox, monkeypatch):
    chosen = []
    for free in range(0, 4_000_000, 20_000):
        monkeypatch.setattr(fitter, "free_memory", lambda _device, free=free: free)
        chosen.append(choose_micro_batch_size(Recipe(seq_len=8), neox, 10, torch.device("cuda"), torch.float32))
    assert chosen == sorted(chosen)
    assert set(chosen) == {1, 2, 3, 4, 5, 10}


@pytest.mark.parametrize(("share", "expected"), [(10, 10), (512, 512), (600, 300), (1025, 342)])
def test_on_the_cpu_a_micro_batch_is_at_most_4096_rows_in_equal_parts(neox, share, expected):
    assert choose_micro_batch_size(Recipe(seq_len=8), neox, share, CPU, torch.float32) == expected


@pytest.mark.parametrize("name", ["muon", "normuon", "adamw"])
def test_the_recipe_names_the_optimizer_of_the_matrices(neox, name):
    stack = Stack(make_transcoders(Recipe(init="random"), neox, CPU), dtype=torch.float32)
    matrices, biases = make_optimizers(Recipe(init="random", optimizer=name, lr=0.5, bias_lr=0.25), stack)
    assert isinstance(biases, torch.optim.AdamW)
    assert isinstance(matrices, torch.optim.AdamW if name == "adamw" else Muon)
    assert matrices.param_groups[0].get("variant", "adamw") == name
    assert [p.ndim for p in matrices.param_groups[0]["params"]] == [3, 3, 3]
    assert (matrices.param_groups[0]["lr"], biases.param_groups[0]["lr"]) == (0.5, 0.25)

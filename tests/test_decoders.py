"""Decoders of many architectures, tiny and random: what is captured, spliced and measured is the MLP's own map."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bases import SIZES
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.fitting.fitter import Fitter, make_transcoders
from bilinear_tc.train.measuring.affine import solve_affine
from bilinear_tc.train.measuring.held_out import measure
from bilinear_tc.train.measuring.reconstruction import Reconstruction
from bilinear_tc.train.measuring.replacement import Replacement
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")


def bloom() -> PreTrainedModel:
    sizes = {"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.25}
    return BloomForCausalLM(BloomConfig(**sizes))


def mpt() -> PreTrainedModel:
    sizes = {"vocab_size": 50, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "initializer_range": 0.25}
    return MptForCausalLM(MptConfig(**sizes))


def falcon() -> PreTrainedModel:
    return FalconForCausalLM(FalconConfig(**SIZES | {"num_hidden_layers": 2}, alibi=False, parallel_attn=True))


def qwen2_moe() -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    wide = {"intermediate_size": 32, "shared_expert_intermediate_size": 8, "num_key_value_heads": 2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES | {"num_hidden_layers": 2}, **experts, **wide))


MODELS = [bloom, mpt, falcon, qwen2_moe]


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def base(request: pytest.FixtureRequest) -> Base:
    torch.manual_seed(0)
    return Base(request.param(), tokenizer=None)


def called_by_hand(base: Base, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each MLP's input, and what it makes of it alone: without the residual stream where it asks for that too."""
    inputs: list[Tensor] = []

    def note(_mlp: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0].clone())

    handles = [base.mlp(layer).register_forward_pre_hook(note) for layer in base.layers]
    with torch.no_grad():
        base.model.base_model(input_ids=input_ids)
    for handle in handles:
        handle.remove()
    outputs = []
    for layer, x in zip(base.layers, inputs, strict=True):
        mlp = base.mlp(layer)
        with torch.no_grad():
            alone = (x, torch.zeros_like(x)) if type(mlp).__name__ in ("BloomMLP", "MptMLP") else (x,)
            outputs.append(mlp(*alone))
    return list(zip(inputs, outputs, strict=True))


def test_what_is_captured_is_the_mlps_own_map(base: Base) -> None:
    expected = called_by_hand(base, tokens())
    with torch.no_grad():
        logits = base.model(tokens()).logits
    activations = base.activations(tokens())
    transcoders = make_transcoders(Recipe(init="random"), base, CPU)
    for layer, (x, y) in enumerate(expected):
        for captured in (activations[layer], transcoders[layer].capture(base.model, input_ids=tokens())):
            torch.testing.assert_close(captured[0], x, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(captured[1], y, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(base.model(tokens()).logits, logits)


def test_the_mlp_itself_in_its_place_changes_nothing_and_its_absence_is_that_of_its_output(base: Base) -> None:
    with torch.no_grad():
        logits = base.model(tokens()).logits
        for transcoder in make_transcoders(Recipe(init="random"), base, CPU):
            mlp = copy.deepcopy(base.mlp(transcoder.config.layer_index))
            adds = type(mlp).__name__ in ("BloomMLP", "MptMLP")
            transcoder.forward = lambda x, mlp=mlp, adds=adds: mlp(x, torch.zeros_like(x)) if adds else mlp(x)
            with transcoder.attached(base.model):
                torch.testing.assert_close(base.model(tokens()).logits, logits, rtol=1e-4, atol=1e-4)
            transcoder.forward = torch.zeros_like
            with transcoder.attached(base.model):
                absent = base.model(tokens()).logits

            def nothing(_mlp: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, adds: bool = adds) -> Tensor:
                return inputs[1].clone() if adds else torch.zeros_like(output)

            handle = base.mlp(transcoder.config.layer_index).register_forward_hook(nothing)
            torch.testing.assert_close(absent, base.model(tokens()).logits, rtol=1e-4, atol=1e-4)
            handle.remove()


def test_it_is_fitted_and_measured(base: Base) -> None:
    """From the closed form if the MLP is of two maps, from noise otherwise; the loss with its mean output is finite."""
    expected = called_by_hand(base, tokens())
    start = "random" if "Moe" in type(base.model).__name__ else "mlp"
    fitter = Fitter(Recipe(init=start, batch_size=4, seq_len=12, hidden_multiplier=4, max_steps=1), base, CPU)
    batches = [TokenBatch(tokens(seed)) for seed in range(20)]
    if start == "mlp":
        fitter.start(batches)
    fitter.step(batches[0], 0)
    torch.testing.assert_close(fitter.activations.y[1], expected[1][1].flatten(0, 1), rtol=1e-5, atol=1e-5)
    transcoders = fitter.stack.transcoders
    affine = solve_affine(transcoders, batches, fitter.activations, 4)
    reconstruction = Reconstruction(transcoders, affine, CPU)
    evaluation = measure(batches, fitter.activations, reconstruction, Replacement(base, transcoders))
    scores = evaluation.to_json()
    assert all(math.isfinite(value) for layer in scores["layers"].values() for value in numbers(layer))
    layer = evaluation.layers[1]
    assert layer.jacobian_cosine is not None
    assert layer.interchange.keys() >= {"embedding", "attention 0", "mlp 0"}
    if start == "mlp":
        assert evaluation.mean("fvu") < 0.5 * evaluation.mean("fvu_linear")


def numbers(scores: dict) -> list[float]:
    return [n for value in scores.values() for n in (numbers(value) if isinstance(value, dict) else [value])]


class Pair(nn.Module):
    """An MLP that says two things."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.dense = mlp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.dense(x), x


def test_a_layer_that_is_no_map_of_one_tensor_to_one_is_refused_whichever_it_is(neox: Base) -> None:
    model = neox.model
    model.gpt_neox.layers[2].mlp = Pair(model.gpt_neox.layers[2].mlp)
    model.gpt_neox.layers[2].forward = lambda x, **_: model.gpt_neox.layers[2].mlp(x)[0]
    with pytest.raises(
        UserError, match=r"gpt_neox.layers.2.mlp \(Pair\) cannot be fitted: .* got 1 tensors in and tuple"
    ):
        Base(model, tokenizer=None)


def test_layers_of_unlike_widths_are_refused(neox: Base) -> None:
    model = neox.model
    model.gpt_neox.layers[1].mlp = nn.Linear(16, 1)
    with pytest.raises(UserError, match=r"gpt_neox.layers.1.mlp maps other widths than gpt_neox.layers.0.mlp"):
        Base(model, tokenizer=None)


def test_a_layer_that_the_pass_never_comes_to_is_refused(neox: Base) -> None:
    model = neox.model
    model.gpt_neox.layers[1].forward = lambda x, **_: x
    with pytest.raises(UserError, match=r"never came to gpt_neox.layers.1.mlp: expected a decoder that"):
        Base(model, tokenizer=None)


def test_a_layer_that_falls_silent_later_is_refused_before_its_rows_are_read(neox: Base) -> None:
    activations = Activations(neox, 48, device=CPU, dtype=torch.float32)
    neox.model.gpt_neox.layers[1].forward = lambda x, **_: x
    with pytest.raises(UserError, match=r"the forward pass never came to gpt_neox.layers.1.mlp"):
        activations.fill(TokenBatch(tokens()), 4)

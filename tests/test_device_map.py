"""Bases that one device cannot hold: with parts on the CPU and the disk, a fit is the fit of the base as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.fitting.fitter import Fitter
from bilinear_tc.train.measuring.low_variance import logit_directions
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

RECIPE = Recipe(base="train/quickstart", layers="0-2", batch_size=4, seq_len=32, init_tokens=256, max_steps=2)
PLACES = {
    "gpt_neox.embed_in": "cpu",
    "gpt_neox.emb_dropout": "cpu",
    "gpt_neox.rotary_emb": "cpu",
    "gpt_neox.layers.0": "cpu",
    **{f"gpt_neox.layers.{layer}": "disk" for layer in range(1, 6)},
    "gpt_neox.final_layer_norm": "disk",
    "lm_head": "disk",
}


def fitted(base: Base, recipe: Recipe = RECIPE) -> list[torch.Tensor]:
    """Everything that a start and two steps leave, and what reading directions takes."""
    torch.manual_seed(0)
    directions = logit_directions(base.model.get_output_embeddings())
    base.stop_after_last_layer()
    fitter = Fitter(recipe, base, torch.device("cpu"))
    batches = [TokenBatch(torch.randint(2000, (4, 32))) for _ in range(2)]
    fitter.start(batches)
    scores = [fitter.step(batch, number)[:2] for number, batch in enumerate(batches)]
    buffers = [buffer for transcoder in fitter.stack.transcoders for buffer in transcoder.buffers()]
    return [directions, *fitter.stack.parameters.values(), *buffers, *(t for pair in scores for t in pair)]


@pytest.mark.slow
@pytest.mark.parametrize("places", [PLACES, {**PLACES, "gpt_neox.embed_in": "disk"}])
def test_a_fit_of_a_base_on_the_disk_is_the_fit(places):
    """To the bit: the closed form reads weights, the derivative too, and norms are told apart by what they do."""
    whole = Base.load("train/quickstart", layers=range(3))
    spread = Base.load("train/quickstart", layers=range(3), device_map=places)
    assert {p.device.type for p in spread.blocks[2].parameters()} == {"meta"}
    for ours, theirs in zip(fitted(spread), fitted(whole), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_auto_places_the_base():
    """With one device that holds it: there. What flows through it is the same."""
    base = Base.of_recipe(replace(RECIPE, base_device_map="auto"), torch.device("cpu"))
    ids = torch.randint(2000, (2, 16))
    plain = Base.of_recipe(RECIPE, torch.device("cpu"))
    for layer, sides in base.activations(ids).items():
        for ours, theirs in zip(sides, plain.activations(ids)[layer], strict=True):
            assert torch.equal(ours, theirs)


def test_one_process_alone_has_a_base_over_all_devices(monkeypatch):
    monkeypatch.setattr("bilinear_tc.train.base.process_count", lambda: 2)
    with pytest.raises(UserError, match="places one base over all GPUs: expected a single process, got 2"):
        Base.of_recipe(replace(RECIPE, base_device_map="auto"), torch.device("cpu"))


def test_the_bases_type_is_a_setting():
    """bfloat16 weights beside float32 products: the fit's buffers are float32."""
    base = Base.of_recipe(replace(RECIPE, base_dtype="bfloat16"), torch.device("cpu"))
    assert base.model.dtype == torch.bfloat16
    fitter = Fitter(RECIPE, base, torch.device("cpu"))
    fitter.activations.fill(TokenBatch(torch.randint(2000, (1, 8))), 1)
    assert fitter.activations.x.dtype == torch.float32
    assert fitter.activations.x.isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_packing_needs_a_package(kind, monkeypatch):
    monkeypatch.setattr("bilinear_tc.train.base.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=rf"base_quantization is {kind}, but the package bitsandbytes is not installed"):
        Base.of_recipe(replace(RECIPE, base_quantization=kind), torch.device("cpu"))

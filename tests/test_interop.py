"""nnsight and TransformerLens models as bases, with the real libraries (`pip install -e '.[test,interop]'`)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bases import tiny_llama, tiny_neox, write_base
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC, BilinearTCSet

TOKENS = torch.arange(24).reshape(2, 12)
BASES = {"neox": (tiny_neox, "gpt_neox.layers.{}.mlp"), "llama": (tiny_llama, "model.layers.{}.mlp")}


def library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}): pip install -e '.[interop]'")


def random_transcoder(path: str, layer: int) -> BilinearTC:
    torch.manual_seed(layer)
    tc = BilinearTC(BilinearTCConfig(16, 24, 16, layer_index=layer, mlp_path=path.format(layer)))
    for name, statistic in tc.named_buffers():
        statistic.uniform_(0.5, 1.5) if name.endswith("std") else statistic.normal_()
    return tc


@pytest.fixture(params=BASES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str) -> PreTrainedModel:
    return BASES[family][0]()


@pytest.fixture
def tcs(family: str) -> BilinearTCSet:
    return BilinearTCSet(random_transcoder(BASES[family][1], layer) for layer in range(3))


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(write_base(folder))


@pytest.fixture
def sight(base: PreTrainedModel, tmp_path: Path) -> Any:
    """The base as an nnsight model."""
    return library("nnsight").LanguageModel(base, tokenizer=tokenizer_of(tmp_path))


@pytest.fixture
def bridge(base: PreTrainedModel, tmp_path: Path) -> Any:
    """A copy of the base, with the same weights, as a TransformerLens bridge."""
    bridges = library("transformer_lens.model_bridge")
    tokenizer = tokenizer_of(tmp_path / "tokenizer")
    base.save_pretrained(tmp_path / "base")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return bridges.TransformerBridge.boot_transformers(str(tmp_path / "base"), hf_model=copy, tokenizer=tokenizer)


@torch.no_grad()
def logits(base: Any, **inputs: Any) -> Tensor:
    return base(input_ids=TOKENS, **inputs).logits


def assert_same(one: dict[int, tuple[Tensor, Tensor]], other: dict[int, tuple[Tensor, Tensor]]) -> None:
    assert [*one] == [*other]
    for layer in one:
        torch.testing.assert_close(one[layer], other[layer], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- nnsight


def layers_of(sight: Any) -> Any:
    return sight.gpt_neox.layers if hasattr(sight._module, "gpt_neox") else sight.model.layers


def traced(sight: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a trace reads: an MLP's input, its output, and the logits."""
    mlp = layers_of(sight)[layer].mlp
    with torch.no_grad(), sight.trace(TOKENS):
        x = mlp.input.save()
        y = mlp.output.save()
        said = sight.output.logits.save()
    return x, y, said


def test_an_nnsight_model_is_captured_and_spliced(base: PreTrainedModel, tcs: BilinearTCSet, sight: Any) -> None:
    expected = tcs.capture(sight._module, input_ids=TOKENS)
    plain = logits(base)
    for captured in (tcs.capture(sight, input_ids=TOKENS), tcs.capture(sight, TOKENS)):
        assert_same(captured, expected)
    assert_same({2: tcs[2].capture(sight, input_ids=TOKENS)}, {2: expected[2]})
    x, y, said = traced(sight, 1)
    assert_same({1: (x, y)}, {1: expected[1]})
    assert torch.equal(said, plain)
    with tcs.attached(sight) as spliced:
        assert spliced is sight
        spliced_logits = logits(base)
    assert not torch.allclose(spliced_logits, plain, atol=1e-2)
    assert torch.equal(logits(base), plain)
    with pytest.raises(KeyError, match="mine"), tcs[1].attached(sight):
        raise KeyError("mine")
    assert torch.equal(traced(sight, 1)[2], plain)


def test_a_trace_reads_and_writes_the_transcoders_output(base: PreTrainedModel, tcs: BilinearTCSet, sight: Any) -> None:
    mlp = layers_of(sight)[1].mlp
    handle = base.get_submodule(tcs[1].config.mlp_path).register_forward_hook(lambda _m, args, _y: tcs[1](args[0]))
    by_hand = logits(base)
    handle.remove()
    handle = base.get_submodule(tcs[1].config.mlp_path).register_forward_hook(lambda _m, _args, y: torch.ones_like(y))
    of_ones = logits(base)
    handle.remove()
    with tcs[1].attached(sight):
        x, y, said = traced(sight, 1)
        with torch.no_grad():
            assert torch.equal(y, tcs[1](x))
        assert torch.equal(said, by_hand)
        with torch.no_grad(), sight.trace(TOKENS):
            mlp.output = torch.ones_like(mlp.output)
            written = sight.output.logits.save()
        assert torch.equal(written, of_ones)
        with torch.no_grad(), sight.trace(TOKENS):
            mlp.input = torch.zeros_like(mlp.input)
            of_zeros = mlp.output.save()
        with torch.no_grad():
            assert torch.equal(of_zeros, tcs[1](torch.zeros(2, 12, 16)))


def test_gradients_and_edits_go_through_a_traced_transcoder(tcs: BilinearTCSet, sight: Any) -> None:
    plain = traced(sight, 2)[2]
    with tcs.attached(sight, error_term=True):
        assert torch.equal(traced(sight, 2)[2], plain)
        with sight.trace(TOKENS):
            sight.output.logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tcs.parameters())
    with tcs[1].attached(sight, scale={3: 0.0}, add={5: 2.0}):
        x, y, _ = traced(sight, 1)
        h = tcs[1].units(x)
        moved = (2 * tcs[1].head.weight[:, 5] - h[..., 3:4] * tcs[1].head.weight[:, 3]) * tcs[1].output_std
        torch.testing.assert_close(y, tcs[1](x) + moved, rtol=1e-4, atol=1e-4)


def test_an_nnsight_model_generates_with_units_edited(base: PreTrainedModel, tcs: BilinearTCSet, sight: Any) -> None:
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 49}
    prompt = TOKENS[:, :4]
    with tcs.attached(base), tcs[1].attached(base, add={5: 40.0}):
        expected = base.generate(prompt, **greedy)
    with tcs.attached(sight), tcs[1].attached(sight, add={5: 40.0}), sight.generate(prompt, **greedy) as tracer:
        tokens = tracer.result.save()
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, base.generate(prompt, **greedy))


def test_an_nnsight_model_that_has_loaded_nothing_yet_is_loaded(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    sight = library("nnsight").LanguageModel(str(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
    assert next(sight._module.parameters()).is_meta
    tc = random_transcoder("gpt_neox.layers.{}.mlp", 1)
    expected = tc.capture(AutoModelForCausalLM.from_pretrained(folder), input_ids=TOKENS)
    assert_same({1: tc.capture(sight, input_ids=TOKENS)}, {1: expected})


# ------------------------------------------------------------------------------------------------- TransformerLens


def test_a_bridge_is_captured_and_spliced(base: PreTrainedModel, tcs: BilinearTCSet, bridge: Any) -> None:
    expected = tcs.capture(base, input_ids=TOKENS)
    for captured in (tcs.capture(bridge, input_ids=TOKENS), tcs.capture(bridge, TOKENS)):
        assert_same(captured, expected)
    with torch.no_grad():
        before, cache = bridge.run_with_cache(TOKENS)
        assert_same({1: (cache["blocks.1.mlp.hook_in"], cache["blocks.1.mlp.hook_out"])}, {1: expected[1]})
        with tcs.attached(base):
            spliced = logits(base)
        with tcs.attached(bridge) as given:
            assert given is bridge
            torch.testing.assert_close(bridge(TOKENS), spliced, rtol=1e-4, atol=1e-4)
            _, cache = bridge.run_with_cache(TOKENS)
            x, y = cache["blocks.1.mlp.hook_in"], cache["blocks.1.mlp.hook_out"]
            assert torch.equal(y, tcs[1](x))
            assert not torch.allclose(x, expected[1][0], atol=1e-2)
        assert torch.equal(bridge(TOKENS), before)


def test_a_bridges_hooks_write_the_transcoders_output(base: PreTrainedModel, tcs: BilinearTCSet, bridge: Any) -> None:
    handle = base.get_submodule(tcs[1].config.mlp_path).register_forward_hook(lambda _m, _args, y: torch.ones_like(y))
    of_ones = logits(base)
    handle.remove()
    hooks = [("blocks.1.mlp.hook_out", lambda y, hook: torch.ones_like(y))]
    with torch.no_grad(), tcs[1].attached(bridge):
        torch.testing.assert_close(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), of_ones, rtol=1e-4, atol=1e-4)


def test_a_bridge_takes_text(tmp_path: Path, bridge: Any, tcs: BilinearTCSet) -> None:
    if bridge.cfg.d_vocab < 512:  # the tiny bases know 50 of the tokenizer's tokens
        tokens = bridge.to_tokens("a", prepend_bos=False) % 50
        bridge.to_tokens = lambda *_, **__: tokens
    assert_same(tcs.capture(bridge, "a"), tcs.capture(bridge, input_ids=tokens))
    with torch.no_grad(), tcs.attached(bridge, error_term=True):
        spliced = bridge(tokens)
    with torch.no_grad():
        assert torch.equal(spliced, bridge(tokens))

"""BilinearTCSet.path: direct effects of units on a later layer, against path patching and interventions by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from bases import SIZES, tiny_gpt2, tiny_llama, tiny_neox
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC, BilinearTCSet, UnitPath

TOKENS = torch.arange(2, 26).reshape(2, 12)  # 0 and 1 are padding of some
PAIRS = [(0, 1), (1, 2), (0, 2)]
NEOX = "gpt_neox.layers.{}.mlp"
GATED = SIZES | {"intermediate_size": 40, "num_key_value_heads": 2}


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=3, n_head=2, initializer_range=0.25))


def falcon() -> PreTrainedModel:
    return FalconForCausalLM(FalconConfig(**SIZES))


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=8))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**GATED, residual_multiplier=0.22))


def olmo2() -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**GATED))


def opt(norm_before: bool) -> PreTrainedModel:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "ffn_dim": 32, "num_attention_heads": 2}
    config = OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.25)
    config.do_layer_norm_before = norm_before
    return OPTForCausalLM(config)


# of each: where its MLPs and what else writes into the stream are
FAMILIES: list[tuple[Callable[[], PreTrainedModel], str, str]] = [
    (tiny_neox, NEOX, "gpt_neox.layers.{}.attention"),
    (tiny_llama, "model.layers.{}.mlp", "model.layers.{}.self_attn"),
    (tiny_gpt2, "transformer.h.{}.mlp", "transformer.h.{}.attn"),
    (falcon, "transformer.h.{}.mlp", "transformer.h.{}.self_attention"),
    (gemma2, "model.layers.{}.mlp", "model.layers.{}.self_attn"),
    (olmo2, "model.layers.{}.mlp", "model.layers.{}.self_attn"),
    (granite, "model.layers.{}.mlp", "model.layers.{}.self_attn"),
]


def random_set(path: str, form: str = "bilinear", bias: bool = True, layers: tuple[int, ...] = (0, 1, 2)) -> Any:
    def transcoder(layer: int) -> BilinearTC:
        torch.manual_seed(layer)
        place = {"layer_index": layer, "mlp_path": path.format(layer)}
        tc = BilinearTC(BilinearTCConfig(16, 24, 16, form=form, bias=bias, **place)).double()
        for name, statistic in tc.named_buffers():
            statistic.uniform_(0.5, 1.5) if name.endswith("std") else statistic.normal_()
        return tc.eval().requires_grad_(False)

    return BilinearTCSet(map(transcoder, layers))


def with_random_norms(base: PreTrainedModel) -> PreTrainedModel:
    """In float64, with weights and biases that a norm does not start with."""
    for module in base.modules():
        if is_norm(module):
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, 0.5, 1.5)
    return base.double().eval()


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


@contextmanager
def hooks(says: dict[nn.Module, Callable[[Any, Any], Any]]) -> Iterator[None]:
    """Each module gives what `says` of what it is given and what it would give."""

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any, *, say: Callable[[Any, Any], Any]) -> Any:
        return say(args[0] if args else None, output)

    handles = [module.register_forward_hook(partial(hook, say=say), with_kwargs=True) for module, say in says.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept(into: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def say(x: Tensor, y: Tensor) -> Tensor:
        into.update(x=x.clone(), y=y.clone())
        return y

    return say


def written(tc: BilinearTC, x: Tensor, units: list[int] | None = None) -> Tensor:
    """What units write into the MLP's output."""
    last = tc.head if tc.config.form == "bilinear" else tc.W_left
    chosen = ... if units is None else units
    return tc.units(x.double())[..., chosen] @ last.weight[:, chosen].T * tc.output_std


@torch.no_grad()
def patched(
    base: PreTrainedModel, tcs: BilinearTCSet, pair: tuple[int, int], others: str, units: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The later MLP's input as it is, and once the units are removed while all else that writes into the stream says
    what it said, and norms keep their statistics."""
    earlier, later = (base.get_submodule(tcs[layer].config.mlp_path) for layer in pair)
    mlps = [base.get_submodule(tc.config.mlp_path) for tc in tcs]
    fixed = [base.get_submodule(others.format(layer)) for layer in tcs.layers]
    norms = [module for module in base.modules() if is_norm(module)]
    said: dict[nn.Module, Any] = {}
    saw: dict[nn.Module, Tensor] = {}

    def copy(output: Any) -> Any:  # Falcon adds to it in place
        return output.clone() if isinstance(output, Tensor) else (output[0].clone(), *output[1:])

    def record(module: nn.Module) -> Callable[[Any, Any], Any]:
        def say(x: Any, output: Any) -> Any:
            said[module] = copy(output)
            if x is not None:
                saw[module] = x.clone()
            return output

        return say

    def linear(norm: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        def say(x: Tensor, _output: Tensor) -> Tensor:
            before, moved = saw[norm], x - saw[norm]
            eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
            weight = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
            if isinstance(norm, nn.LayerNorm):
                before, moved = (part - part.mean(-1, keepdim=True) for part in (before, moved))
            return said[norm] + weight * moved / (before.square().mean(-1, keepdim=True) + eps).sqrt()

        return say

    with hooks({module: record(module) for module in (*mlps, *fixed, *norms)}):
        base(TOKENS)
    x, tc = saw[later], tcs[pair[0]]
    without = said[earlier] - written(tc, saw[earlier], units).to(x)
    says = {module: lambda _x, _y, module=module: copy(said[module]) for module in (*mlps, *fixed)}
    says |= {norm: linear(norm) for norm in norms} | {earlier: lambda _x, _y: without.clone()}
    after: dict[str, Tensor] = {}
    with hooks(says | {later: kept(after)}):
        base(TOKENS)
    return x.double(), after["x"].double()


def close(found: Tensor, expected: Tensor, digits: float) -> None:
    torch.testing.assert_close(found, expected, rtol=digits, atol=digits * expected.abs().max().item())


def untouched(base: nn.Module) -> bool:
    return not any("forward" in vars(module) or module._forward_hooks for module in base.modules())


U = torch.randn(16, generator=torch.Generator().manual_seed(5)).double()


@pytest.mark.parametrize("form", ["bilinear", "input_sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_effects_are_the_second_order_terms_and_add_up_to_the_change(form, bias, pair):
    base, tcs = with_random_norms(tiny_neox()), random_set(NEOX, form, bias)
    found = tcs.path(base, U, *pair, input_ids=TOKENS)
    later = tcs[pair[1]]
    attention = "gpt_neox.layers.{}.attention"
    x, without = patched(base, tcs, pair, attention)
    assert found.effects.shape == (2, 12, 24)
    assert found.total.shape == (2, 12)
    close(found.effects.sum(-1), found.total, 1e-12)
    close(found.total, (later(x) - later(without)) @ U, 1e-5)  # the norm's weight is read in float32
    of_unit = {k: x - patched(base, tcs, pair, attention, [k])[1] for k in (0, 7, 23)}
    for place in ((0, 0), (1, 5)):
        delta = (x - without)[place]
        form_at = later.quadratic_form(U, about=without[place])
        for k, d in of_unit.items():
            expected = form_at.linear @ d[place] + d[place] @ form_at.quadratic @ delta
            close(found.effects[place][k], expected, 1e-5)
    assert untouched(base)
    assert found.units == [*range(24)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0].__name__)
@pytest.mark.parametrize("pair", [(0, 1), (0, 2)])
def test_a_path_is_what_patching_it_in_the_base_changes(family, pair):
    make, path, others = family
    torch.manual_seed(1)
    base, tcs = with_random_norms(make()), random_set(path)
    for units in (None, [3], [5, 0, 23]):
        x, without = patched(base, tcs, pair, others, units)
        found = tcs.path(base, U, *pair, units=units, input_ids=TOKENS)
        later = tcs[pair[1]]
        close(found.total, (later(x) - later(without)) @ U, 1e-4)
        close(found.effects.sum(-1), found.total, 1e-12)
    assert found.units == [5, 0, 23]
    assert found.effects.shape == (2, 12, 3)
    assert untouched(base)


@torch.no_grad()
@pytest.mark.parametrize("units", [None, [3, 20]])
@pytest.mark.parametrize("mask", [None, torch.ones(2, 12, dtype=torch.long).index_fill(1, torch.tensor([0, 1]), 0)])
@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family[0].__name__)
def test_the_check_is_the_intervention(family, units, mask):
    make, path, _ = family
    base, tcs = with_random_norms(make()), random_set(path)
    inputs = {"input_ids": TOKENS} | ({} if mask is None else {"attention_mask": mask})
    found = tcs.path(base, U, 0, 2, units, check=True, **inputs)
    mlps = {layer: base.get_submodule(tcs[layer].config.mlp_path) for layer in tcs.layers}

    def value(remove: bool, spliced: bool) -> Tensor:
        def say(x: Tensor, y: Tensor, layer: int) -> Tensor:
            y = tcs[layer](x) if spliced else y
            return y - written(tcs[0], x, units) if remove and layer == 0 else y

        seen: dict[str, Tensor] = {}
        with hooks({mlp: partial(say, layer=layer) for layer, mlp in mlps.items()}), hooks({mlps[2]: kept(seen)}):
            base(**inputs)
        return seen["y"] @ U

    for check, spliced in ((found.spliced, True), (found.true, False)):
        change = value(False, spliced) - value(True, spliced)
        close(check.change, change, 1e-10)
        guess, true = ((t if mask is None else t[mask.bool()]).flatten() for t in (check.predicted, change))
        assert check.r2 == pytest.approx(1 - ((true - guess) ** 2).sum().item() / (true @ true).item())
        assert check.direct == pytest.approx(((guess @ true) / (true @ true)).item())
    close(found.true.predicted, found.total, 1e-6)
    with tcs.attached(base):
        close(found.spliced.predicted, tcs.path(base, U, 0, 2, units, **inputs).total, 1e-12)
    assert not torch.allclose(found.spliced.predicted, found.total, rtol=0.1)
    assert untouched(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_in_another_dtype_than_the_set(dtype):
    base, tcs = with_random_norms(tiny_llama()), random_set("model.layers.{}.mlp", layers=(0, 2)).float()
    exact = tcs.path(base, U, 0, 2, input_ids=TOKENS)
    found = tcs.path(base.to(dtype), U, 0, 2, input_ids=TOKENS)
    assert found.effects.dtype == torch.float32
    close(found.effects.sum(-1), found.total, 1e-4)
    error = (found.total - exact.total).norm() / exact.total.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "path", "norm"),
    [
        (bloom, "transformer.h.{}.mlp.dense_h_to_4h:dense_4h_to_h", "transformer.h.1.post_attention_layernorm"),
        (partial(opt, True), "model.decoder.layers.{}.fc1:fc2", "model.decoder.layers.1.final_layer_norm"),
    ],
    ids=["bloom", "opt"],
)
def test_mlps_that_are_no_modules_are_followed_too(make, path, norm):
    base, tcs = with_random_norms(make()), random_set(path)
    layer_norm, stream, captured = base.get_submodule(norm), {}, tcs.capture(base, input_ids=TOKENS)
    with hooks({layer_norm: kept(stream)}):
        base(TOKENS)
    moved = written(tcs[0], captured[0][0])
    spread = (stream["x"].var(-1, unbiased=False, keepdim=True) + layer_norm.eps).sqrt().reshape(2, 12, 1)
    delta = layer_norm.weight * (moved - moved.mean(-1, keepdim=True)) / spread
    x, found = captured[1][0], tcs.path(base, U, 0, 1, input_ids=TOKENS)
    close(found.total, (tcs[1](x) - tcs[1](x - delta)) @ U, 1e-5)
    close(found.effects.sum(-1), found.total, 1e-12)


def test_padding_without_an_embedding_has_finite_effects():
    base, tcs = with_random_norms(tiny_llama()), random_set("model.layers.{}.mlp")
    base.model.embed_tokens.weight.data[0] = 0
    assert tcs.path(base, U, 0, 1, input_ids=torch.zeros(1, 3, dtype=torch.long)).effects.isfinite().all()


def gated_add() -> PreTrainedModel:
    """A base in which what the MLP says is multiplied, feature by feature, before it is added."""
    base, gate = with_random_norms(tiny_llama()), torch.linspace(0.5, 1.5, 16).double()
    for layer in base.model.layers:
        layer.mlp = nn.Sequential(layer.mlp)
        layer.register_forward_hook(lambda _layer, args, output: args[0] + gate * (output - args[0]))
    return base


def test_what_no_path_can_follow_is_refused_in_a_sentence():
    base, tcs = with_random_norms(tiny_neox()), random_set(NEOX)
    after = random_set("model.decoder.layers.{}.fc1:fc2")
    read: Callable[..., UnitPath] = partial(tcs.path, base, U, input_ids=TOKENS)
    refused = {
        r"^A path leads from a layer to a later one, not from 2 to 1\.$": lambda: read(2, 1),
        r"^A path leads from a layer to a later one, not from 1 to 1\.$": lambda: read(1, 1),
        r"^This set has no layer 5: it has layers 0, 1, 2\.$": lambda: read(0, 5),
        r"^The hidden units are 0 to 23, but 24 is named\.$": lambda: read(0, 1, units=[3, 24]),
        r"^A path leads to one direction \[16\], not to \[2, 16\] as given\.$": lambda: tcs.path(
            base, torch.stack([U, U]), 0, 1, input_ids=TOKENS
        ),
        r"direction has shape \[\.\.\., 16\], not \[3\] as given\.$": lambda: tcs.path(base, U[:3], 0, 1),
        r"what model\.decoder\.layers\.0\.fc1:fc2 says comes to model\.decoder\.layers\.1\.fc1:fc2 in another way\.$": (
            lambda: after.path(with_random_norms(opt(False)), U, 0, 1, input_ids=TOKENS)
        ),
        r"what model\.layers\.0\.mlp says comes to model\.layers\.2\.mlp in another way\.$": lambda: random_set(
            "model.layers.{}.mlp"
        ).path(gated_add(), U, 0, 2, input_ids=TOKENS),
        r"has no module of that name\.$": lambda: random_set("model.layers.{}.mlp").path(
            base, U, 0, 1, input_ids=TOKENS
        ),
    }
    for sentence, refuse in refused.items():
        with pytest.raises(ValueError, match=sentence) as error:
            refuse()
        assert "\n" not in str(error.value)
    assert untouched(base)
    assert torch.is_grad_enabled()

"""Decoders of many architectures, tiny and random: what is captured, spliced and measured is the MLP's own map."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import SIZES, write_base_of_words
from forking import ForkServer
from hub_server import HubServer
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.fitting.closed_form import MLPWeights
from bilinear_tc.train.fitting.fitter import Fitter, make_transcoders
from bilinear_tc.train.layer_settings import layer_settings
from bilinear_tc.train.measuring.affine import solve_affine
from bilinear_tc.train.measuring.held_out import measure
from bilinear_tc.train.measuring.reconstruction import Reconstruction
from bilinear_tc.train.measuring.replacement import Replacement
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.studies import decoders
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


def whole_mlp(base: Base, layer: int) -> nn.Module:
    """The module that the decoder calls as its MLP, the sum with the residual stream included."""
    path = re.match(r".*\.(mlp|ffn)\b", base.mlp_path(layer))
    assert path is not None
    return base.model.get_submodule(path[0])


def called_by_hand(base: Base, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each MLP's input, and what it makes of it alone: without the residual stream where it asks for that too."""
    inputs: list[Tensor] = []

    def note(_mlp: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0].clone())

    handles = [whole_mlp(base, layer).register_forward_pre_hook(note) for layer in base.layers]
    with torch.no_grad():
        base.model.base_model(input_ids=input_ids)
    for handle in handles:
        handle.remove()
    outputs = []
    for layer, x in zip(base.layers, inputs, strict=True):
        mlp = whole_mlp(base, layer)
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
            mlp = copy.deepcopy(whole_mlp(base, transcoder.config.layer_index))
            adds = type(mlp).__name__ in ("BloomMLP", "MptMLP")
            transcoder.forward = lambda x, mlp=mlp, adds=adds: mlp(x, torch.zeros_like(x)) if adds else mlp(x)
            with transcoder.attached(base.model):
                torch.testing.assert_close(base.model(tokens()).logits, logits, rtol=1e-4, atol=1e-4)
            transcoder.forward = torch.zeros_like
            with transcoder.attached(base.model):
                absent = base.model(tokens()).logits

            def nothing(_mlp: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, adds: bool = adds) -> Tensor:
                return inputs[1].clone() if adds else torch.zeros_like(output)

            handle = whole_mlp(base, transcoder.config.layer_index).register_forward_hook(nothing)
            torch.testing.assert_close(absent, base.model(tokens()).logits, rtol=1e-4, atol=1e-4)
            handle.remove()


@pytest.mark.slow
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
    evaluation = measure(batches[:6], fitter.activations, reconstruction, Replacement(base, transcoders))
    scores = evaluation.to_json()
    assert all(math.isfinite(value) for layer in scores["layers"].values() for value in numbers(layer))
    assert evaluation.continuations is not None
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


def test_a_base_that_is_told_of_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As BERT is by itself: the padding of --no_pack would be read, and the next token known."""
    monkeypatch.setitem(decoders.DECODERS, "bert", {"is_decoder": False})
    with pytest.raises(UserError, match=r"bert.encoder.layer.0.* is told of later tokens: expected a causal decoder"):
        decoders.open_base("bert")


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


# Those that have no closed form: mixtures of experts, and an MLP with a norm inside.
FROM_NOISE = {
    *("bitnet", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "jamba", "deepseek_v2", "deepseek_v3", "granitemoe")
}
REFUSED = {
    "gpt_oss": r"layers.0.mlp \(GptOssMLP\) cannot be fitted: .* got 1 tensors in and tuple out",
    "llama4_text": r"layers.0.feed_forward \(Llama4TextMoe\) cannot be fitted: .* got 1 tensors in and tuple out",
    "rwkv": r"blocks.0.feed_forward \(RwkvFeedForward\) cannot be fitted: .* got 1 tensors in and tuple out",
    "mamba": r"no MLPs found in MambaForCausalLM: expected .* --mlp_path",
    "cpmant": r"w_in.w_0:w_out \(Linear\) cannot be fitted: expected .*one .*a tensor of shape \[2, 35, 16\]",
    "xlnet": r"ff.layer_1:layer_2 \(Linear\) cannot be fitted: expected .* a tensor of shape \[3, 2, 16\]",
}


def test_the_table_is_of_many_decoders() -> None:
    assert len(set(decoders.known()) - FROM_NOISE - REFUSED.keys()) >= 40


@pytest.mark.parametrize("name", decoders.known())
def test_a_decoders_mlps_are_found_read_seen_and_spliced(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            decoders.examine(name, commands=False)
        return
    found = decoders.examine(name, commands=False)
    assert found.exact
    if name in FROM_NOISE:
        assert re.search(r"no closed-form start for .*; fit it with --init random", found.why_no_closed_form)
    else:
        assert found.error is not None
        assert found.error < 1e-5


@pytest.mark.slow
def test_decoders_work_from_their_closed_form_to_their_card(fork_server: ForkServer, tmp_path: Path) -> None:
    """Fitted, measured and built as a repository, by the commands."""
    names = ["opt", "bloom", "mpt", "phi3", "lfm2", "ctrl", "bart", "bert", "mixtral"]
    with HubServer(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home", token=hub.token)
        done = fork_server.start(decoders.main, ["--only", ",".join(names)], environment=environment).wait()
    assert done.returncode == 0, done.stderr[-2000:]
    for row in done.stdout.split("\n\n")[0].splitlines()[2:]:
        _, shown, start, exact, commands = row.strip("| ").split(" | ")
        assert (exact, commands) == ("exact", "done")
        assert start.startswith("noise" if shown == "mixtral" else "closed form")
        names = [name for name in names if name not in shown.split(", ")]
    assert not names


@pytest.fixture
def opt() -> Base:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 3}
    model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, init_std=0.25))
    return Base(model, tokenizer=None)


def test_an_mlp_between_two_modules_is_used_from_any_model_that_holds_it(opt: Base) -> None:
    """The input and output are [sequences, tokens, width], though OPT flattens them."""
    transcoder = make_transcoders(Recipe(), opt, CPU)[1]
    assert transcoder.config.mlp_path == "model.decoder.layers.1.fc1:fc2"
    layer = opt.model.model.decoder.layers[1]
    x, y = opt.activations(tokens())[1]
    assert x.shape == y.shape == (4, 12, 16)
    torch.testing.assert_close(layer.fc2(layer.fc1(x).relu()), y)
    wrapper = nn.ModuleDict({"module": opt.model})
    wrapper.forward = opt.model.forward
    with torch.no_grad(), transcoder.attached(opt.model):
        expected = opt.model(tokens()).logits
    for model in (opt.model, opt.model.base_model, wrapper):
        captured = transcoder.capture(model, input_ids=tokens())
        assert torch.equal(captured[0], x)
        assert torch.equal(captured[1], y)
        with torch.no_grad(), transcoder.attached(model):
            assert torch.equal(opt.model(tokens()).logits, expected)
    transcoder.config.mlp_path = "model.decoder.layers.1.fc1:model.decoder.layers.1.fc2"
    assert torch.equal(transcoder.capture(opt.model, tokens())[1], y)


def test_pairs_are_attached_within_one_another_and_captured_meanwhile(opt: Base) -> None:
    first, second, _ = make_transcoders(Recipe(), opt, CPU)
    layer = opt.model.model.decoder.layers[1]
    before = opt.model(tokens()).logits
    with first.attached(opt.model), second.attached(opt.model), second.attached(opt.model):
        x, y = second.capture(opt.model, input_ids=tokens())
        opt.model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert not torch.allclose(x, opt.activations(tokens())[1][0], atol=1e-2)
    torch.testing.assert_close(layer.fc2(layer.fc1(x).relu()), y)
    assert all(parameter.grad.abs().sum() > 0 for tc in (first, second) for parameter in tc.parameters())
    assert torch.equal(opt.model(tokens()).logits, before)
    assert not any("forward" in vars(module) for module in opt.model.modules())


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("model.decoder.layers.1.fc1:fc3", "has no module of that name"),
        ("model.decoder.layers.1.fc2:fc1", "does not take one tensor of that width"),
        ("model.decoder.layers.1.fc1", "it returns width 32"),
    ],
)
def test_a_pair_that_is_none_is_refused(opt: Base, path: str, sentence: str) -> None:
    transcoder = make_transcoders(Recipe(), opt, CPU)[1]
    transcoder.config.mlp_path = path
    with pytest.raises(ValueError, match=sentence), transcoder.attached(opt.model):
        pass


class Block(nn.Module):
    """A layer whose MLP has no usual name, in a list of them beside one that has none."""

    def __init__(self, *mlp: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": mlp[0], "b": mlp[1]} if mlp else {})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner["b"](torch.tanh(self.inner["a"](x))) if len(self.inner) else x


@pytest.fixture
def unusual(neox: Base) -> PreTrainedModel:
    layers = nn.ModuleList([Block(), *(Block(nn.Linear(16, 40), nn.Linear(40, 16)) for _ in range(2))])
    model = neox.model
    model.gpt_neox.layers = layers
    model.base_model.forward = lambda input_ids, **_: nn.Sequential(*layers)(model.gpt_neox.embed_in(input_ids))
    return model


def test_the_recipe_says_where_mlps_of_other_names_are(unusual: PreTrainedModel) -> None:
    path = "gpt_neox.layers.{}.inner.a:b"
    with pytest.raises(UserError, match=r"no MLPs found in GPTNeoXForCausalLM: .* say where they are with --mlp_path"):
        Base(unusual, tokenizer=None)
    with pytest.raises(UserError, match=r"layers 0 of the base hold no MLP: .*those with --layers 1,2"):
        Base(unusual, tokenizer=None, mlp_path=path)
    base = Base(unusual, tokenizer=None, layers=[1, 2], mlp_path=path)
    transcoder = make_transcoders(Recipe(mlp_path=path), base, CPU)[0]
    assert transcoder.config.mlp_path == "gpt_neox.layers.1.inner.a:b"
    x, y = (t.flatten(0, 1) for t in base.activations(tokens())[1])
    torch.testing.assert_close(base.mlp(1)(torch.tanh(unusual.gpt_neox.layers[1].inner["a"](x))), y)
    assert torch.equal(MLPWeights.read(base, 1, x, y).act(x), x.tanh())  # a function, which no module shows
    base.stop_after_last_layer()
    base.activations(tokens())


def test_a_layer_is_written_with_its_own_path(unusual: PreTrainedModel) -> None:
    recipe = Recipe(mlp_path="gpt_neox.layers.{}.inner.a:b", layers="1,2")
    base = Base(unusual, None, recipe.layer_indices(), recipe.mlp_path)
    config = make_transcoders(recipe, base, CPU)[1].config
    assert layer_settings(config, recipe, {})["mlp_path"] == config.mlp_path == "gpt_neox.layers.2.inner.a:b"


def test_a_decoders_own_layers_are_counted(tmp_path: Path) -> None:
    """BART's configuration says as num_hidden_layers how many its encoder has."""
    model = decoders.tiny("bart")
    model.config.encoder_layers = 1
    assert (model.config.num_hidden_layers, len(model.base_model.decoder.layers)) == (1, 2)
    write_base_of_words(tmp_path, model, ["a"], Whitespace())
    assert Base.load(str(tmp_path), layers=[1]).layers == [1]
    with pytest.raises(UserError, match="the base has layers 0 to 1, but layers 2 were asked for"):
        Base.load(str(tmp_path), layers=[2])


@pytest.mark.parametrize("path", ["gpt_neox.layers.1.inner.a:b", "gpt_neox.layers.{}.mlp", "nowhere.{}.a", ""])
def test_a_path_that_names_nothing_is_refused(unusual: PreTrainedModel, path: str) -> None:
    with pytest.raises(UserError, match=r"mlp_path .* names no modules of GPTNeoX.*: expected a path with {} for the"):
        Base(unusual, tokenizer=None, mlp_path=path)


class Fused(nn.Module):
    """A gated MLP whose gate and up are one map."""

    def __init__(self, gate: slice, up: slice) -> None:
        super().__init__()
        self.slices, self.first, self.last = (gate, up), nn.Linear(16, 48), nn.Linear(24, 16, bias=False)
        nn.init.normal_(self.first.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        both = self.first(x)
        gate, up = (both[..., rows] for rows in self.slices)
        return self.last(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("order", [1, -1])
def test_the_halves_of_a_fused_map_are_told_apart(llama: Base, order: int) -> None:
    halves = [slice(24), slice(24, None)][::order]
    for layer in llama.model.model.layers:
        layer.mlp = Fused(*halves)
    base = Base(llama.model, tokenizer=None)
    x = torch.randn(200, 16)
    with torch.no_grad():
        weights = MLPWeights.read(base, 1, x, base.mlp(1)(x))
    assert weights.up is not None
    assert torch.equal(weights.gate.weight, base.mlp(1).first.weight[halves[0]])
    assert torch.equal(weights.up.weight, base.mlp(1).first.weight[halves[1]])


def test_a_layer_that_runs_more_than_once_a_pass_is_refused(neox: Base) -> None:
    model = neox.model
    model.gpt_neox.layers[2].mlp = model.gpt_neox.layers[1].mlp
    with pytest.raises(UserError, match=r"layers.1.mlp \(GPTNeoXMLP\) cannot be fitted: .* once a pass, .* 2 times"):
        Base(model, tokenizer=None)


def test_layers_of_a_tower_that_text_never_comes_to_are_not_the_bases(neox: Base) -> None:
    tower: Any = nn.ModuleList(copy.deepcopy(neox.model.gpt_neox.layers[0]) for _ in range(5))
    neox.model.gpt_neox.add_module("a_vision_tower", tower)
    base = Base(neox.model, tokenizer=None)
    assert [base.mlp_path(layer) for layer in base.layers] == [f"gpt_neox.layers.{layer}.mlp" for layer in range(3)]

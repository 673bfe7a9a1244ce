"""BilinearTCSet: loaded, captured, attached, measured; hidden units read and edited while they are spliced in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import tiny_gpt2, tiny_llama, tiny_neox
from forking import Finished, ForkServer
from hub_server import HubServer
from loading import run_files, saved_output
from publishing import Publisher
from tiny_run import write_tiny_run
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC, BilinearTCSet
from bilinear_tc.train.moments import Moments, fvu

TOKENS = torch.arange(24).reshape(2, 12)
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, 7:] = 0
PATHS = {tiny_neox: "gpt_neox.layers.{}.mlp", tiny_llama: "model.layers.{}.mlp", tiny_gpt2: "transformer.h.{}.mlp"}
NEOX = PATHS[tiny_neox]


def random_transcoder(path: str, layer: int, form: str = "bilinear", bias: bool = True) -> BilinearTC:
    torch.manual_seed(layer)
    paths = {"layer_index": layer, "mlp_path": path.format(layer)}
    tc = BilinearTC(BilinearTCConfig(16, 24, 16, form=form, bias=bias, **paths))
    for name, statistic in tc.named_buffers():
        statistic.uniform_(0.5, 1.5) if name.endswith("std") else statistic.normal_()
    return tc.eval()


def random_set(path: str = NEOX) -> BilinearTCSet:
    return BilinearTCSet(random_transcoder(path, layer) for layer in (2, 0, 1))


@pytest.fixture(params=PATHS, ids=lambda make: make.__name__)
def base_and_set(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, BilinearTCSet]:
    return request.param(), random_set(PATHS[request.param])


def logits(base: nn.Module, **inputs: Any) -> Tensor:
    return base(input_ids=TOKENS, **inputs).logits


@contextmanager
def hooked(base: nn.Module, says: dict[BilinearTC, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[dict]:
    """Hooks set by hand: each transcoder's MLP gives what `says` of its input and its output. Yields both of them."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def hook_of(tc: BilinearTC, say: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def hook(_mlp: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[tc.config.layer_index] = args[0].detach(), output.detach()
            return say(args[0], output)

        return hook

    mlps = [(base.get_submodule(tc.config.mlp_path), hook_of(tc, say)) for tc, say in says.items()]
    handles = [mlp.register_forward_hook(hook) for mlp, hook in mlps]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def same(one: dict[int, tuple[Tensor, Tensor]], other: dict[int, tuple[Tensor, Tensor]]) -> bool:
    equal = [torch.equal(a, b) for layer in one for a, b in zip(one[layer], other[layer], strict=True)]
    return [*one] == [*other] and all(equal)


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    message = str(error.value)
    return message.endswith(".") and "\n" not in message


# ------------------------------------------------------------------------------------------------------- loading


def load_sets() -> None:
    """Loads sets as told, each a list of layers in order, and saves what they are and say; errors are printed."""
    out, how, loads = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    saved = []
    for where, kwargs in loads:
        cls = BilinearTCSet
        if how == "hub":
            sys.modules["bilinear_tc"] = None  # type: ignore[assignment]  # out of reach, as for a reader of the Hub
            cls = get_class_from_dynamic_module("modeling_bilinear_tc.BilinearTCSet", where, token=kwargs.get("token"))
            assert cls.__module__.startswith("transformers_modules."), cls
        try:
            tcs = cls.from_pretrained(where, **kwargs)
        except (OSError, ValueError) as error:
            print(error)
            continue
        x = torch.linspace(-2, 2, 48).reshape(2, 3, 8)
        with torch.no_grad():
            saved.append(
                [(layer, tc.config.layer_index, tc.training, tc(x)) for layer, tc in zip(tcs.layers, tcs, strict=True)]
            )
    torch.save(saved, out)


class Loader:
    """Loads sets of a loopback Hub in processes that share a cache."""

    def __init__(self, fork_server: ForkServer, hub: HubServer, folder: Path) -> None:
        self.server, self.hub, self.folder = fork_server, hub, folder

    def __call__(self, *loads: tuple[str, dict[str, Any]], how: str = "hub", **variables: str) -> Finished:
        environment = self.hub.environment(self.folder / how) | variables
        arguments = [self.folder / "sets.pt", how, json.dumps(loads)]
        done = self.server.start(load_sets, arguments, environment=environment).wait()
        assert done.returncode == 0, done.output
        return done

    @property
    def sets(self) -> list[list[tuple[int, int, bool, Tensor]]]:
        return torch.load(self.folder / "sets.pt")


@pytest.fixture
def load(fork_server: ForkServer, hub: HubServer, tmp_path: Path) -> Loader:
    return Loader(fork_server, hub, tmp_path)


@pytest.mark.parametrize("how", ["hub", "installed"])
def test_a_set_loads_from_the_hub_in_numeric_order(how: str, load: Loader, hub: HubServer, tmp_path: Path) -> None:
    old, new = (write_tiny_run(tmp_path / name, layers=(0, 2, 10), seed=seed) for seed, name in enumerate(("a", "b")))
    commit = hub.put("tester/set", run_files(old))
    hub.put("tester/set", run_files(new))
    repo = "tester/set"
    loads = ((repo, {"layers": [10, 0], "revision": commit}), (repo, {}), (repo, {"dtype": "bfloat16"}))
    done = load(*loads, how=how, TQDM_POSITION="-1")  # which shows bars as in a terminal
    of_old, of_new, narrow = load.sets
    assert [entry[:3] for entry in of_old] == [(0, 0, False), (10, 10, False)]
    assert [entry[:3] for entry in of_new] == [(layer, layer, False) for layer in (0, 2, 10)]
    for run, entries in ((old, of_old), (new, of_new)):
        assert all(torch.equal(output, saved_output(run, layer)) for layer, *_, output in entries)
    assert {output.dtype for *_, output in narrow} == {torch.bfloat16}
    assert not any(f"{commit}/layer_2/model.safetensors" in request for request in hub.requests)
    bars = {
        line.partition(":")[0]
        for line in done.stderr.replace("\r", "\n").splitlines()
        if "%|" in line and ".py" not in line
    }
    assert bars == {"Fetching 2 files", "Fetching 3 files"}  # one a download, and none of what is read


def test_a_layer_that_is_not_there_is_refused_before_anything_is_downloaded(
    load: Loader, hub: HubServer, tmp_path: Path
) -> None:
    hub.put("tester/set", run_files(write_tiny_run(tmp_path / "run", layers=(0, 3, 10))))
    hub.put("tester/empty", {"layer_x/config.json": b"{}"})
    nowhere = (
        "There are no transcoders at 'tester/none': expected a run's folder, or a Hub repository that you can read"
    )
    done = load(("tester/set", {"layers": [3, 11, 7]}), ("tester/empty", {}), ("tester/none", {}), how="installed")
    assert done.stdout.splitlines() == [
        "tester/set has no layer 7, 11: it has layers 0, 3, 10.",
        "tester/empty holds no layer_N/config.json: expected a set of transcoders.",
        f"{nowhere}, got RepositoryNotFoundError.",
    ]
    assert not any("safetensors" in request for request in hub.requests)


def test_a_set_is_of_one_commit_though_another_is_pushed_meanwhile(
    load: Loader, hub: HubServer, tmp_path: Path
) -> None:
    old, new = (write_tiny_run(tmp_path / name, layers=(0,), seed=seed) for seed, name in enumerate(("old", "new")))
    hub.put("tester/set", run_files(old))
    pushed = []
    hub.fail(3, lambda: pushed.append(hub.put("tester/set", run_files(new))))
    load(("tester/set", {}), ("tester/set", {}), how="installed")
    assert pushed
    for run, [(*_, output)] in zip((old, new), load.sets, strict=True):
        assert torch.equal(output, saved_output(run, 0))


@pytest.mark.slow
def test_a_private_set_as_published_loads_with_its_token_and_again_offline(
    load: Loader, publisher: Publisher, hub: HubServer, tmp_path: Path
) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(0, 3))
    assert publisher.command(run, "--repo_id", "tester/secret", "--private").returncode == 0
    with_token = {"token": hub.read_token, "layers": [3], "cache_dir": str(tmp_path / "cache")}
    load(("tester/secret", with_token))
    asked = len(hub.requests)
    load(("tester/secret", {**with_token, "local_files_only": True}), how="installed", HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    [[(layer, _, _, output)]] = load.sets
    assert layer == 3
    assert torch.equal(output, saved_output(run, 3))


def test_a_set_loads_from_a_folder(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(0, 2, 10))
    (run / "layer_7").mkdir()  # as a fit that was killed leaves it
    for where in (run, str(run)):
        tcs = BilinearTCSet.from_pretrained(where, dtype=torch.float64, device="cpu")
        assert tcs.layers == [tc.config.layer_index for tc in tcs] == [0, 2, 10]
        assert {parameter.dtype for parameter in tcs.parameters()} == {torch.float64}
        assert not any(module.training for module in tcs.modules())
    assert BilinearTCSet.from_pretrained(run, layers=range(2, 11, 8)).layers == [2, 10]
    with pytest.raises(ValueError, match=r"run has no layer 7: it has layers 0, 2, 10\.$") as error:
        BilinearTCSet.from_pretrained(run, layers=[7])
    assert one_sentence(error)


def test_layers_are_reached_by_their_numbers() -> None:
    tcs = BilinearTCSet([random_transcoder(NEOX, layer) for layer in (10, 2)])
    assert tcs.layers == [2, 10]
    assert len(tcs) == 2
    assert [*tcs] == [tcs[2], tcs[10]]
    assert tcs[10].config.layer_index == 10
    with pytest.raises(IndexError, match=r"^This set has no layer 0: it has layers 2, 10\.$"):
        tcs[0]
    for wrong in ([tcs[2], tcs[2]], [BilinearTC(BilinearTCConfig(4, 4, 4))]):
        with pytest.raises(ValueError, match=r"one transcoder for each layer, but .* of layers \[.*\]\.$"):
            BilinearTCSet(wrong)
    assert tcs.to(torch.bfloat16)[2].head.weight.dtype == torch.bfloat16
    assert tcs[2].input_mean.dtype == torch.float32


# ----------------------------------------------------------------------------------------------- capture, attached


@torch.no_grad()
def test_one_pass_captures_what_enters_and_leaves_every_mlp(
    base_and_set: tuple[PreTrainedModel, BilinearTCSet],
) -> None:
    base, tcs = base_and_set
    with hooked(base, {tc: lambda _x, y: y for tc in tcs}) as expected:
        logits(base)
    passes = []
    base.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    base.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the pass went on"))
    wrapper = nn.ModuleDict({"module": base})
    wrapper.forward = base.forward
    for given in (base, base.base_model, wrapper):
        captured = tcs.capture(given, input_ids=TOKENS)
        assert same(captured, expected)
        assert not any(tensor.requires_grad for pair in captured.values() for tensor in pair)
    assert len(passes) == 3
    assert same({1: tcs[1].capture(base, TOKENS)}, {1: expected[1]})
    assert not any("forward" in vars(module) for module in base.modules())


@torch.no_grad()
def test_within_attached_layers_see_what_the_spliced_base_gives_them_and_the_true_output_is_captured() -> None:
    base, tcs = tiny_neox(), random_set()
    with hooked(base, {tc: lambda x, _y, tc=tc: tc(x) for tc in tcs}) as expected:
        logits(base)
    with tcs.attached(base):
        assert same(tcs.capture(base, input_ids=TOKENS), expected)
    expected.clear()
    with hooked(base, {tcs[0]: lambda x, _y: tcs[0](x), tcs[1]: lambda _x, y: y, tcs[2]: lambda _x, y: y}) as expected:
        logits(base)
    with tcs.attached(base, layers=[0]):
        assert same(tcs.capture(base, input_ids=TOKENS), expected)


@torch.no_grad()
def test_mlps_that_are_no_modules_and_get_flattened_rows_are_captured_and_spliced() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "ffn_dim": 32, "num_attention_heads": 2}
    base = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.25)).eval()
    tcs = random_set("model.decoder.layers.{}.fc1:fc2")
    mlps = [(base.model.decoder.layers[layer], tc) for layer, tc in zip(tcs.layers, tcs, strict=True)]
    plain, entered, handles = logits(base), [], []
    for layer, tc in mlps:
        handles.append(layer.fc1.register_forward_hook(lambda _fc1, args, _y: entered.append(args[0])))
        handles.append(layer.fc2.register_forward_hook(lambda _fc2, _args, _y, tc=tc: tc(entered[-1])))
    expected = logits(base)
    for handle in handles:
        handle.remove()
    with tcs.attached(base):
        assert torch.equal(logits(base), expected)
        captured = tcs.capture(base, input_ids=TOKENS)
    for (layer, tc), x in zip(mlps, entered, strict=True):
        pair = (x, layer.fc2(layer.fc1(x).relu()))
        torch.testing.assert_close(captured[tc.config.layer_index], tuple(t.reshape(2, 12, 16) for t in pair))
    errors = {layer: y - tcs[layer](x) for layer, (x, y) in tcs.capture(base, input_ids=TOKENS).items()}
    with tcs.attached(base, error_term=True):
        assert torch.equal(logits(base), plain)
    with tcs.attached(base, error_term=errors):
        torch.testing.assert_close(logits(base), plain, rtol=1e-4, atol=1e-5)


def test_a_pass_that_does_not_come_to_a_layer_names_it() -> None:
    base, tcs = tiny_neox(), random_set()
    base.gpt_neox.layers[1].forward = lambda x, **_: x
    with pytest.raises(RuntimeError, match=r"never came to gpt_neox\.layers\.1\.mlp\.$") as error:
        tcs.capture(base, input_ids=TOKENS)
    assert one_sentence(error)


@torch.no_grad()
def test_a_set_attached_is_its_transcoders_attached_within_one_another(
    base_and_set: tuple[PreTrainedModel, BilinearTCSet],
) -> None:
    base, tcs = base_and_set
    before = logits(base)
    for layers in (None, [2, 0]):
        with ExitStack() as stack:
            for layer in layers or (0, 1, 2):
                stack.enter_context(tcs[layer].attached(base))
            expected = logits(base)
        with tcs.attached(base, layers) as spliced:
            assert spliced is base
            assert torch.equal(logits(base), expected)
        assert not torch.allclose(expected, before, atol=1e-2)
        assert torch.equal(logits(base), before)


def test_nothing_stays_attached_after_an_error() -> None:
    base, tcs = tiny_neox(), random_set()
    with pytest.raises(KeyError, match="mine"), tcs.attached(base):
        raise KeyError("mine")
    tcs[2].config.mlp_path = "gpt_neox.layers.5.mlp"
    with pytest.raises(ValueError, match="no module of that name"), tcs.attached(base):
        pass
    with pytest.raises(ValueError, match=r"^This set has no layer 4, 5: it has layers 0, 1, 2\.$") as error:
        tcs.attached(base, layers=[5, 1, 4]).__enter__()
    assert one_sentence(error)
    assert not any("forward" in vars(module) for module in base.modules())


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_base_is_captured_and_spliced() -> None:
    torch.compiler.reset()
    base, tcs = tiny_neox(), random_set()
    expected = tcs.capture(base, input_ids=TOKENS)
    with tcs.attached(base), tcs[1].attached(base, scale={3: 0.0}, error_term=True):
        spliced = logits(base)
    compiled = torch.compile(base, backend="eager")
    with tcs.attached(compiled), tcs[1].attached(compiled, scale={3: 0.0}, error_term=True):
        torch.testing.assert_close(logits(compiled), spliced)
    for layer, pair in tcs.capture(compiled, input_ids=TOKENS).items():
        torch.testing.assert_close(pair, expected[layer])


# ---------------------------------------------------------------------------------------------------- error term


def test_with_the_error_term_the_base_says_the_same_and_gradients_are_the_transcoders(
    base_and_set: tuple[PreTrainedModel, BilinearTCSet],
) -> None:
    base, tcs = (model.double() for model in base_and_set)
    embedded = base.get_input_embeddings()(TOKENS).detach().requires_grad_()

    def gradients() -> list[Tensor]:
        loss = base(inputs_embeds=embedded, labels=TOKENS).loss
        return torch.autograd.grad(loss, [embedded, *tcs.parameters()])

    plain = logits(base)
    with hooked(base, {tc: lambda x, y, tc=tc: tc(x) + (y - tc(x)).detach() for tc in tcs}):
        expected = gradients()
    errors = {layer: y - tcs[layer](x) for layer, (x, y) in tcs.capture(base, input_ids=TOKENS).items()}
    with tcs.attached(base, error_term=True):
        assert torch.equal(logits(base), plain)
        torch.testing.assert_close(gradients(), expected)
    with tcs.attached(base, error_term=errors):
        torch.testing.assert_close(logits(base), plain)
        torch.testing.assert_close(gradients(), expected)
    true = torch.autograd.grad(base(inputs_embeds=embedded, labels=TOKENS).loss, embedded)[0]
    assert not torch.allclose(true, expected[0], rtol=0.1)


@torch.no_grad()
def test_an_edit_meets_the_true_mlps_or_with_errors_given_the_later_transcoders() -> None:
    base, tcs = tiny_neox(), random_set()
    errors = {layer: y - tcs[layer](x) for layer, (x, y) in tcs.capture(base, input_ids=TOKENS).items()}
    first, second, third = tcs

    def effect(x: Tensor) -> Tensor:  # of unit 5 twice as large
        return first.units(x)[..., 5:6] * first.head.weight[:, 5] * first.output_std

    with hooked(base, {first: lambda x, y: y + effect(x)}):
        true = logits(base)
    with tcs.attached(base, error_term=True), first.attached(base, scale={5: 2.0}, error_term=True):
        torch.testing.assert_close(logits(base), true, rtol=1e-4, atol=1e-5)
    says = {tc: lambda x, _y, tc=tc: tc(x) + errors[tc.config.layer_index] for tc in (second, third)}
    with hooked(base, {first: lambda x, y: y + effect(x), **says}):
        linear = logits(base)
    with tcs.attached(base, error_term=errors), first.attached(base, scale={5: 2.0}, error_term=errors[0]):
        torch.testing.assert_close(logits(base), linear, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(true, linear, atol=1e-2)
    shapes = r"error_term has shape \[2, 11, 16\], but the MLP's output \[2, 12, 16\]\.$"
    with pytest.raises(ValueError, match=shapes) as error, first.attached(base, error_term=errors[0][:, 1:]):
        logits(base)
    assert one_sentence(error)


# --------------------------------------------------------------------------------------------------- hidden units


@pytest.mark.parametrize("form", ["bilinear", "input_sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_units_are_the_products_that_the_last_map_weighs(form: str, bias: bool) -> None:
    tc = random_transcoder(NEOX, 1, form, bias).double()
    p = tc.state_dict()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    units = tc.units(x)
    assert units.shape == (2, 5, 24)
    last = "head" if form == "bilinear" else "W_left"
    for row, of_row in zip(x.flatten(0, 1), units.flatten(0, 1), strict=True):
        z = (row - p["input_mean"]) / p["input_std"]
        left = p["left.weight"] @ z + p.get("left.bias", 0) if form == "bilinear" else z.sum()
        right = p["right.weight" if form == "bilinear" else "W_right.weight"] @ z + p.get("right.bias", 0)
        torch.testing.assert_close(of_row, left * right, rtol=1e-12, atol=1e-12)
        y = (p[f"{last}.weight"] @ of_row + p.get(f"{last}.bias", 0)) * p["output_std"] + p["output_mean"]
        torch.testing.assert_close(tc(row), y, rtol=1e-12, atol=1e-12)
    folded = tc.folded()
    torch.testing.assert_close(folded.units(x) @ folded.head.weight.T + folded.head.bias, tc(x))
    with pytest.raises(ValueError, match=r"MLP inputs of shape \[\.\.\., 16\]"):
        tc.units(x[..., 1:])


@pytest.mark.parametrize("form", ["bilinear", "input_sum"])
def test_units_are_edited_while_spliced_in_generate_too(form: str) -> None:
    base, tc = tiny_neox(), random_transcoder(NEOX, 1, form)
    last = getattr(tc, tc.config.last_map)
    added = torch.randn(2, 12, requires_grad=True)

    def edited(x: Tensor, term: Tensor | float) -> Tensor:
        h = tc.units(x)
        left_out = h[..., [0]] * last.weight[:, 0] + h[..., [23]] * last.weight[:, 23]
        put = torch.as_tensor(term).unsqueeze(-1) * last.weight[:, 23]
        return tc(x) + (put - left_out) * tc.output_std

    with hooked(base, {tc: lambda x, _y: edited(x, added)}):
        expected = logits(base)
    expected_gradient = torch.autograd.grad(expected.square().sum(), added)
    with tc.attached(base, scale={0: 0.0, 23: 0.0}, add={23: added}):
        got = logits(base)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), added), expected_gradient, rtol=1e-3, atol=1e-3)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 49}
    with tc.attached(base):
        unedited = base.generate(TOKENS[:, :4], **greedy)
    with hooked(base, {tc: lambda x, _y: edited(x, 40.0)}):
        by_hand = base.generate(TOKENS[:, :4], **greedy)
    with tc.attached(base, scale={0: 0.0, 23: 0.0}, add={23: 40.0}):
        assert torch.equal(base.generate(TOKENS[:, :4], **greedy), by_hand)
    assert not torch.equal(by_hand, unedited)


@pytest.mark.parametrize("edit", [{"scale": {24: 0.0}}, {"add": {-1: 1.0}}, {"add": {"3": 1.0}}])
def test_a_unit_that_does_not_exist_is_refused(edit: dict) -> None:
    base, tc = tiny_neox(), random_transcoder(NEOX, 1)
    with pytest.raises(ValueError, match=r"hidden units are 0 to 23, but .*\.$") as error:
        tc.attached(base, **edit).__enter__()
    assert one_sentence(error)
    assert not any("forward" in vars(module) for module in base.modules())


# ------------------------------------------------------------------------------------------------------------ fvu


@torch.no_grad()
def test_the_fvu_is_the_measured_one_on_the_rows_that_are_not_padding(
    base_and_set: tuple[PreTrainedModel, BilinearTCSet],
) -> None:
    base, tcs = base_and_set
    for inputs in ({"attention_mask": MASK}, {}):
        kept = inputs.get("attention_mask", torch.ones_like(MASK)).bool()
        got = tcs.fvu(base, input_ids=TOKENS, **inputs)
        assert [*got] == [0, 1, 2]
        for layer, (x, y) in tcs.capture(base, input_ids=TOKENS, **inputs).items():
            x, y = x[kept], y[kept]
            measured = fvu((y - tcs[layer](x)).square().sum(0), Moments.of(y)).item()
            assert got[layer] == pytest.approx(measured, rel=1e-4)


@torch.no_grad()
def test_a_feature_that_does_not_vary_has_no_part_in_the_fvu() -> None:
    base, tcs = tiny_neox(), random_set()
    of_all = tcs.fvu(base, input_ids=TOKENS)[2]
    last = base.gpt_neox.layers[2].mlp.dense_4h_to_h
    last.weight[3] = 0
    x, y = tcs.capture(base, input_ids=TOKENS)[2]
    errors, spread = ((y - other).square().flatten(0, 1).sum(0) for other in (tcs[2](x), y.mean((0, 1))))
    varying = torch.arange(16) != 3
    assert tcs.fvu(base, input_ids=TOKENS)[2] == pytest.approx((errors / spread)[varying].mean().item(), rel=1e-4)
    assert tcs.fvu(base, input_ids=TOKENS)[2] != of_all

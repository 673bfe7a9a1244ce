"""The two root files: BilinearTCConfig and BilinearTC."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bases import tiny_gpt2, tiny_llama, tiny_neox
from torch import nn

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig, form_of
from bilinear_tc.modeling_bilinear_tc import STATISTICS, BilinearTC

WIDTH = 16
FORMS = ["bilinear", "input_sum"]
TOKENS = torch.arange(24).reshape(2, 12)


def transcoder(form="bilinear", n_inputs=WIDTH, n_hidden=24, n_outputs=WIDTH, seed=0, mean=2.0, **config):
    """A transcoder with random weights and with statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    tc = BilinearTC(BilinearTCConfig(n_inputs, n_hidden, n_outputs, form=form, **config))
    for statistic in (tc.input_mean, tc.output_mean):
        statistic.copy_(mean * torch.randn(statistic.shape, generator=generator))
    for statistic in (tc.input_std, tc.output_std):
        statistic.copy_(torch.rand(statistic.shape, generator=generator) + 0.5)
    return tc


def by_the_formula(tc, x):
    """The map as the card and the documentation print it, in float64 and one row at a time."""
    p = {name: tensor.detach().double() for name, tensor in tc.state_dict().items()}
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]):
        z = (row - p["input_mean"]) / p["input_std"]
        if tc.config.form == "bilinear":
            left = p["left.weight"] @ z + p.get("left.bias", 0)
            right = p["right.weight"] @ z + p.get("right.bias", 0)
            y = p["head.weight"] @ (left * right) + p.get("head.bias", 0)
        else:
            outer = z[:, None] * (p["W_right.weight"] @ z)[None, :]  # [n_inputs, n_hidden]
            y = p["W_left.weight"] @ outer.sum(0) + p.get("W_left.bias", 0)
        rows.append(y * p["output_std"] + p["output_mean"])
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


BASES = {
    "neox": (tiny_neox, "gpt_neox.layers.{}.mlp"),
    "llama": (tiny_llama, "model.layers.{}.mlp"),
    "gpt2": (tiny_gpt2, "transformer.h.{}.mlp"),
}


@pytest.fixture(params=BASES)
def base_and_path(request):
    make, path = BASES[request.param]
    return make(), path


def logits(base):
    with torch.no_grad():
        return base(input_ids=TOKENS).logits


def with_hook(base, path, replacement=None):
    """Logits, MLP input and MLP output of a full forward pass, by a hook on the MLP."""
    seen = []

    def hook(module, args, output):
        seen.append((args[0], output))
        return None if replacement is None else replacement(args[0])

    handle = base.get_submodule(path).register_forward_hook(hook)
    try:
        out = logits(base)
    finally:
        handle.remove()
    return out, *seen[0]


def one_sentence(error):
    message = str(error.value)
    return message.endswith(".") and "\n" not in message and ". " not in message


# ------------------------------------------------------------------------------------------------ the two files


@pytest.mark.parametrize("module", ["configuration_bilinear_tc", "modeling_bilinear_tc"])
def test_the_file_imports_only_what_a_reader_of_the_hub_has(module):
    """Read from its text, so that an import inside a function, or one that happens to be installed here, counts too."""
    tree = ast.parse(Path(sys.modules[f"bilinear_tc.{module}"].__file__).read_text(encoding="utf-8"))
    absolute, relative = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            (relative if node.level else absolute).add((node.module or "").partition(".")[0])
    assert "transformers" in absolute
    assert absolute - sys.stdlib_module_names <= {
        "torch",
        "transformers",
        "huggingface_hub",
    }  # the last comes with transformers
    assert relative <= {"configuration_bilinear_tc"}


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("name", ["n_inputs", "n_hidden", "n_outputs"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64"])
def test_a_width_that_is_not_a_positive_whole_number_is_refused_by_name(name, value):
    widths = {"n_inputs": 4, "n_hidden": 8, "n_outputs": 4, name: value}
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1") as error:
        BilinearTCConfig(**widths)
    assert one_sentence(error)


@pytest.mark.parametrize("form", ["bilinear", "input_sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_configuration_tells_the_models_maps(form: str, bias: bool) -> None:
    config = BilinearTCConfig(n_inputs=3, n_hidden=5, n_outputs=2, form=form, bias=bias)
    model = BilinearTC(config)
    maps = {name: (m.in_features, m.out_features, m.bias is not None) for name, m in model.named_children()}
    assert list(config.maps.items()) == list(maps.items())
    assert form_of(config.maps) == form
    assert form_of({"left", "right"}) is None
    assert not {"maps", "formula", "factors", "last_map"} & set(config.to_dict())


def test_an_unknown_form_and_a_negative_layer_are_refused():
    with pytest.raises(ValueError, match="form must be one of 'bilinear', 'input_sum', not 'linear'"):
        BilinearTCConfig(4, 8, 4, form="linear")
    with pytest.raises(ValueError, match="layer_index must be a whole number of at least 0"):
        BilinearTCConfig(4, 8, 4, layer_index=-1)


def test_a_configuration_without_widths_exists_but_builds_no_model():
    with pytest.raises(ValueError, match="cannot be built without n_inputs") as error:
        BilinearTC(BilinearTCConfig())
    assert one_sentence(error)


def test_configurations_are_equal_where_their_fields_are():
    assert BilinearTCConfig(4, 8, 4, layer_index=1) == BilinearTCConfig(4, 8, 4, layer_index=1)
    assert BilinearTCConfig(4, 8, 4) != BilinearTCConfig(4, 9, 4)


# ------------------------------------------------------------------------------------------------ initialisation


def assert_uniform(tensor, bound):
    """The Kolmogorov–Smirnov distance to the uniform law on ±bound, at the 0.1% level."""
    values = tensor.detach().flatten().double().sort().values
    expected = (values / bound + 1) / 2
    steps = torch.arange(1, len(values) + 1) / len(values)
    assert values.abs().max() <= bound
    assert (steps - expected).abs().max() < 1.95 / len(values) ** 0.5


@pytest.mark.parametrize("form", FORMS)
def test_a_new_model_has_torchs_linear_law_and_identity_statistics(form):
    torch.manual_seed(0)
    tc = BilinearTC(BilinearTCConfig(100, 150, 60, form=form))
    linears = [module for module in tc.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == (3 if form == "bilinear" else 2)
    for linear in linears:
        assert_uniform(linear.weight, linear.in_features**-0.5)
        if linear.bias is not None:
            assert_uniform(linear.bias, linear.in_features**-0.5)
    for name in STATISTICS:
        assert torch.equal(getattr(tc, name), torch.full_like(getattr(tc, name), float(name.endswith("std"))))


@pytest.mark.parametrize(("form", "with_bias"), [("bilinear", {"left", "right", "head"}), ("input_sum", {"W_left"})])
def test_only_the_maps_that_carry_a_bias_have_one(form, with_bias):
    for bias in (True, False):
        tc = BilinearTC(BilinearTCConfig(4, 8, 4, form=form, bias=bias))
        have = {name for name, module in tc.named_children() if module.bias is not None}
        assert have == (with_bias if bias else set())


def test_what_a_checkpoint_lacks_is_initialised_and_the_rest_is_loaded(tmp_path):
    saved = transcoder(n_inputs=100, n_hidden=400, n_outputs=50)
    saved.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    missing = {"input_mean", "input_std", "output_std", "left.bias", "right.weight", "right.bias"}
    kept = {name: tensor for name, tensor in weights.items() if name not in missing}
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tc = BilinearTC.from_pretrained(tmp_path)
    for name, tensor in kept.items():
        assert torch.equal(tc.state_dict()[name], tensor), name
    assert not tc.input_mean.any()
    assert (tc.input_std == 1).all()
    assert (tc.output_std == 1).all()
    for parameter in (tc.left.bias, tc.right.weight, tc.right.bias):
        assert_uniform(parameter, 0.1)


# ------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_printed_formula(form, bias):
    tc = transcoder(form, n_inputs=7, n_hidden=11, n_outputs=5, bias=bias).double()
    x = 3 * torch.randn(40, 7, dtype=torch.float64)
    torch.testing.assert_close(tc(x), by_the_formula(tc, x), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (2, 3, 2), (0,), (2, 0)])
def test_any_leading_shape(form, shape):
    tc = transcoder(form, n_outputs=5)
    x = torch.randn(*shape, WIDTH)
    y = tc(x)
    assert y.shape == (*shape, 5)
    if x.numel():
        torch.testing.assert_close(y.double(), by_the_formula(tc, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_normalized_forward_is_the_map_between_z_scores(form):
    tc = transcoder(form).double()
    z = torch.randn(9, WIDTH, dtype=torch.float64)
    expected = (by_the_formula(tc, z * tc.input_std + tc.input_mean) - tc.output_mean) / tc.output_std
    torch.testing.assert_close(tc.normalized_forward(z), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_accuracy_where_the_mean_is_large(form, dtype):
    # Means of 64 to 128 with deviations near 1: a mean rounded to bfloat16 would be off by up to a quarter.
    tc = transcoder(form)
    tc.input_mean.uniform_(64, 128)
    tc.to(dtype)
    z = torch.randn(200, WIDTH)
    x = tc.input_mean + z * tc.input_std
    for given in (x, x.to(dtype)):
        y = tc(given)
        expected = by_the_formula(tc, given)
        assert y.dtype == dtype
        error = (y - expected).square().mean().sqrt() / (expected - tc.output_mean).square().mean().sqrt()
        assert error < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_casting_moves_weights_but_never_narrows_the_statistics():
    tc = transcoder()
    mean = tc.input_mean.clone()
    for cast in (tc.half, tc.bfloat16):
        cast()
        assert all(getattr(tc, name).dtype == torch.float32 for name in STATISTICS)
    assert tc.left.weight.dtype == torch.bfloat16
    assert torch.equal(tc.input_mean, mean)
    assert tc.double().input_mean.dtype == torch.float64
    assert tc.to("meta").input_mean.is_meta


def test_the_output_has_the_models_dtype_whatever_the_inputs():
    x = torch.randn(3, WIDTH)
    for weights in (torch.float32, torch.bfloat16, torch.float64):
        tc = transcoder().to(weights)
        for given in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert tc(x.to(given)).dtype == weights


class Quantized(nn.Linear):
    """As quantizers leave a linear map: codes for weights (packed in pairs in 4 bits), scales that only it knows."""

    def __init__(self, linear: nn.Linear, bits: int, bias_dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.abs().max().item() / (2 ** (bits - 1) - 1)
        codes = (linear.weight / self.scale).round().to(torch.int8)
        self.codes = codes.double()
        packed = (codes.flatten()[::2, None] % 16 * 16 + codes.flatten()[1::2, None] % 16).to(torch.uint8)
        self.weight = nn.Parameter(packed if bits == 4 else codes, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(bias_dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_floating_point()
        return nn.functional.linear(x, (self.codes * self.scale).to(x.dtype), self.bias)


@pytest.mark.parametrize(("form", "bias"), [("bilinear", True), ("bilinear", False), ("input_sum", True)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_computes_in_a_floating_type_and_refuses_to_be_read(form, bias, bits):
    tc = transcoder(form, bias=bias).bfloat16()
    exact = copy.deepcopy(tc)
    for name in tc.config.maps:
        quantized = Quantized(getattr(tc, name), bits, torch.bfloat16)
        setattr(tc, name, quantized)
        getattr(exact, name).weight.data = (quantized.codes * quantized.scale).bfloat16()
    x = torch.randn(5, WIDTH, dtype=torch.bfloat16)
    assert tc(x).dtype == torch.bfloat16
    torch.testing.assert_close(tc(x), exact(x))
    for read in (tc.folded, lambda: tc.quadratic_form(torch.ones(WIDTH)), lambda: tc.spectrum(torch.ones(WIDTH))):
        with pytest.raises(ValueError, match=r"is quantized \(torch\.u?int8\): load the transcoder without a quantiz"):
            read()


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (torch.zeros(2, WIDTH + 1), r"float32 of shape \[2, 17\]"),
        (torch.tensor(1.0), r"float32 of shape \[\]"),
        (torch.zeros(2, WIDTH, dtype=torch.long), r"int64 of shape \[2, 16\]"),
    ],
)
def test_an_input_that_is_no_mlp_input_is_refused(x, came):
    with pytest.raises(ValueError, match=rf"shape \[\.\.\., 16\], not torch\.{came}") as error:
        transcoder()(x)
    assert one_sentence(error)


@pytest.mark.parametrize(("form", "dtype"), [("bilinear", torch.float32), ("input_sum", torch.bfloat16)])
def test_compiles_in_one_graph(form, dtype):
    torch.compiler.reset()  # recompilations count towards a limit, over all tests
    tc = transcoder(form).to(dtype)
    compiled = torch.compile(tc, fullgraph=True, backend="eager")
    for shape in ((2, 3, WIDTH), (WIDTH,)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), tc(x))


def can_compile():
    """Whether torch's default backend finds what it needs here: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return compiler and Path(sysconfig.get_path("include"), "Python.h").is_file()


@pytest.mark.skipif(not can_compile(), reason="torch.compile's default backend needs a C++ compiler and Python.h")
@pytest.mark.slow
def test_compiles_with_the_default_backend():
    torch.compiler.reset()
    tc, x = transcoder(), torch.randn(2, 3, WIDTH)
    compiled = torch.compile(tc, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x).double(), by_the_formula(tc, x), rtol=1e-5, atol=1e-5)


def test_a_parameter_may_be_replaced_by_a_view():
    tc = transcoder()
    x = torch.randn(4, WIDTH)
    expected = tc(x)
    stack = torch.stack([tc.left.weight.detach(), tc.right.weight.detach()])
    tc.left.weight, tc.right.weight = nn.Parameter(stack[0]), nn.Parameter(stack[1])
    assert torch.equal(tc(x), expected)
    tc(x).sum().backward()
    assert tc.left.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------- capture, attached


@pytest.mark.parametrize("layer", [0, 2])
def test_capture_returns_what_enters_and_leaves_the_mlp(base_and_path, layer):
    base, path = base_and_path
    path = path.format(layer)
    _, x, y = with_hook(base, path)
    tc = transcoder(mlp_path=path, layer_index=layer)
    for got_x, got_y in (tc.capture(base, input_ids=TOKENS), tc.capture(base.base_model, TOKENS)):
        assert torch.equal(got_x, x)
        assert torch.equal(got_y, y)
        assert not got_y.requires_grad


def test_the_mlp_is_found_by_the_inner_models_path_and_inside_a_wrapper():
    base = tiny_neox()
    _, x, _ = with_hook(base, "gpt_neox.layers.1.mlp")
    wrapper = nn.ModuleDict({"module": base})
    wrapper.forward = base.forward
    for path, given in (("layers.1.mlp", base), ("gpt_neox.layers.1.mlp", wrapper)):
        got, _ = transcoder(mlp_path=path).capture(given, input_ids=TOKENS)
        assert torch.equal(got, x)


def test_the_input_of_gpt_neoxs_mlp_is_the_normalised_residual():
    base = tiny_neox(use_parallel_residual=True)
    hidden = base(input_ids=TOKENS, output_hidden_states=True).hidden_states[1]
    x, _ = transcoder(mlp_path="gpt_neox.layers.1.mlp").capture(base, input_ids=TOKENS)
    torch.testing.assert_close(x, base.gpt_neox.layers[1].post_attention_layernorm(hidden))


def test_capture_stops_after_the_mlp_and_leaves_no_trace():
    base = tiny_neox()
    before, modules = logits(base), list(base.modules())
    later = []
    handle = base.gpt_neox.layers[2].register_forward_hook(lambda *_: later.append(1))
    transcoder(mlp_path="gpt_neox.layers.1.mlp").capture(base, input_ids=TOKENS)
    assert not later
    handle.remove()
    with pytest.raises(IndexError):
        transcoder(mlp_path="gpt_neox.layers.1.mlp").capture(base, input_ids=TOKENS + 1000)
    assert list(base.modules()) == modules
    assert not any("forward" in vars(module) for module in modules)
    assert torch.equal(logits(base), before)


def test_a_base_whose_pass_never_comes_to_the_mlp_is_an_error():
    base = nn.ModuleDict({"mlp": nn.Linear(WIDTH, WIDTH)})
    base.forward = lambda input_ids: input_ids
    with pytest.raises(RuntimeError, match="forward pass never came to mlp") as error:
        transcoder(mlp_path="mlp").capture(base, input_ids=TOKENS)
    assert one_sentence(error)


def test_attached_replaces_the_mlp_and_restores_it(base_and_path):
    base, path = base_and_path
    path = path.format(1)
    tc = transcoder(mlp_path=path)
    before, weights = logits(base), list(base.state_dict())
    expected, _, _ = with_hook(base, path, replacement=tc)
    assert not torch.allclose(expected, before, atol=1e-2)
    for given in (base, base.base_model):
        with tc.attached(given) as spliced:
            assert spliced is given
            assert list(base.state_dict()) == weights
            assert torch.equal(logits(base), expected)
        assert torch.equal(logits(base), before)
        with pytest.raises(KeyError, match="mine"), tc.attached(given):
            raise KeyError("mine")
        assert torch.equal(logits(base), before)


def test_many_layers_at_once_nested_and_twice():
    base = tiny_neox()
    before = logits(base)
    tcs = [transcoder(mlp_path=f"gpt_neox.layers.{i}.mlp", seed=i) for i in range(3)]
    handles = [
        base.gpt_neox.layers[i].mlp.register_forward_hook(lambda m, args, out, tc=tc: tc(args[0]))
        for i, tc in enumerate(tcs)
    ]
    expected = logits(base)
    for handle in handles:
        handle.remove()
    with contextlib.ExitStack() as stack:
        for tc in tcs:
            stack.enter_context(tc.attached(base))
        assert torch.equal(logits(base), expected)
        with tcs[1].attached(base):
            assert torch.equal(logits(base), expected)
        other = transcoder(mlp_path="gpt_neox.layers.1.mlp", seed=9)
        with other.attached(base):
            assert not torch.equal(logits(base), expected)
        assert torch.equal(logits(base), expected)
    assert torch.equal(logits(base), before)


def test_capture_while_attached_sees_the_spliced_input_and_the_true_output():
    base = tiny_neox()
    first, second = (transcoder(mlp_path=f"gpt_neox.layers.{i}.mlp", seed=i) for i in (0, 1))
    mlp = base.gpt_neox.layers[1].mlp
    _, clean, _ = with_hook(base, second.config.mlp_path)
    with first.attached(base), second.attached(base), second.attached(base):
        x, y = second.capture(base, input_ids=TOKENS)
        _, spliced, _ = with_hook(base, second.config.mlp_path)
    assert torch.equal(x, spliced)
    assert not torch.allclose(x, clean, atol=1e-2)
    assert torch.equal(y, mlp(x))


def test_the_base_keeps_its_dtype_and_the_transcoder_its_own():
    base = tiny_neox().to(torch.bfloat16)
    tc = transcoder(mlp_path="gpt_neox.layers.1.mlp")
    expected, x, _ = with_hook(base, tc.config.mlp_path, replacement=lambda x: tc(x).to(torch.bfloat16))
    assert x.dtype == torch.bfloat16
    with tc.attached(base):
        assert torch.equal(logits(base), expected)
    assert tc.dtype == torch.float32


def test_gradients_flow_through_an_attached_transcoder():
    base = tiny_neox()
    tc = transcoder(mlp_path="gpt_neox.layers.1.mlp")
    with tc.attached(base):
        base(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tc.parameters())


def test_attaching_disturbs_neither_the_callers_hooks_nor_the_random_numbers():
    tc, base = transcoder(mlp_path="transformer.h.1.mlp"), tiny_gpt2().train()
    mlp = base.transformer.h[1].mlp
    assert mlp.dropout.p > 0
    seen = []
    for module in (mlp, mlp.act, mlp.c_fc):
        module.register_forward_hook(lambda module, args, out: seen.append(type(module)))
        module.register_forward_pre_hook(lambda module, args: seen.append(type(module)))
    random_state = torch.get_rng_state()
    with tc.attached(base):
        assert torch.equal(torch.get_rng_state(), random_state)
        assert not seen
        base(input_ids=TOKENS)
        assert seen == [type(mlp)] * 2
    base(input_ids=TOKENS)
    assert len(seen) == 2 + 6


@pytest.mark.slow
def test_a_base_compiled_in_one_graph():
    torch.compiler.reset()
    base = tiny_neox(num_hidden_layers=2)
    tc = transcoder(mlp_path="gpt_neox.layers.1.mlp")
    before = logits(base)
    expected, x, y = with_hook(base, tc.config.mlp_path, replacement=tc)
    compiled = torch.compile(base.base_model, backend="eager", fullgraph=True)

    def compiled_logits():
        with torch.no_grad():
            return base.get_output_embeddings()(compiled(input_ids=TOKENS, use_cache=False)[0])

    torch.testing.assert_close(compiled_logits(), before)
    with tc.attached(compiled):
        torch.testing.assert_close(compiled_logits(), expected)
    got_x, got_y = tc.capture(compiled, input_ids=TOKENS)
    torch.testing.assert_close(got_x, x)
    torch.testing.assert_close(got_y, y)
    torch.testing.assert_close(compiled_logits(), before)


class TupleMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.map(x), x


class GatedByAnother(TupleMLP):
    def forward(self, x, other):
        return self.map(x) * other


@pytest.mark.parametrize("use", ["attached", "capture"])
@pytest.mark.parametrize(
    ("config", "make", "sentence"),
    [
        ({}, tiny_neox, "does not say which MLP it stands in for"),
        (
            {"mlp_path": "gpt_neox.layers.3.mlp"},
            tiny_neox,
            r"stands in for gpt_neox\.layers\.3\.mlp.* no module of that name",
        ),
        ({"mlp_path": "gpt_neox.layers.1.mlp"}, tiny_llama, r"LlamaForCausalLM\) has no module of that name"),
        ({"mlp_path": "gpt_neox.layers.1.mlp"}, lambda: tiny_neox(hidden_size=32), "from width 16 to 16, but .* 32"),
        ({"mlp_path": "model.layers.1.mlp"}, lambda: tiny_llama(hidden_size=32), "from width 16 to 16, but .* 32"),
        ({"mlp_path": "transformer.h.1.mlp", "n_outputs": 24}, tiny_gpt2, "from width 16 to 24, but .* 16"),
        ({"mlp_path": "gpt_neox.layers.1.mlp"}, lambda: "pythia", "must be a loaded model .* not str"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_with_a_sentence(use, config, make, sentence):
    tc, base = transcoder(**config, base_model="some/base"), make()
    with pytest.raises(ValueError, match=sentence) as error:
        use_on(tc, use, base)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("use", ["attached", "capture"])
@pytest.mark.parametrize(
    ("mlp", "call", "sentence"),
    [
        (TupleMLP, lambda mlp, x: mlp(x)[0], "returns a tuple, not one tensor"),
        (GatedByAnother, lambda mlp, x: mlp(x, x), "takes 2 tensors, not one|does not take one"),
    ],
)
def test_an_mlp_that_is_not_one_tensor_to_one_tensor_is_refused(use, mlp, call, sentence):
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = mlp()

        def forward(self, input_ids):
            return call(self.mlp, nn.functional.one_hot(input_ids % WIDTH, WIDTH).float())

    base = Base()
    with pytest.raises(ValueError, match=sentence):
        use_on(transcoder(mlp_path="mlp"), use, base)
    base(TOKENS)


@pytest.mark.parametrize("use", ["attached", "capture"])
def test_a_full_device_is_not_taken_for_a_base_that_does_not_fit(use):
    base = tiny_neox()

    def full(_x):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    base.gpt_neox.layers[1].mlp.forward = full
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        use_on(transcoder(mlp_path="gpt_neox.layers.1.mlp"), use, base)


def use_on(tc, use, base):
    if use == "capture":
        tc.capture(base, input_ids=TOKENS)
    else:
        with tc.attached(base):
            base(input_ids=TOKENS)


# ------------------------------------------------------------------------------------------------------ folded


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_folded_is_the_same_map_on_raw_values(form, bias):
    tc = transcoder(form, bias=bias, mlp_path="gpt_neox.layers.1.mlp").double()
    random_state = torch.get_rng_state()
    folded = tc.folded()
    assert torch.equal(torch.get_rng_state(), random_state)
    x = 3 * torch.randn(30, WIDTH, dtype=torch.float64)
    assert folded.config.form == "bilinear"
    assert folded.config.mlp_path == tc.config.mlp_path
    assert tc.config.form == form
    left = x @ folded.left.weight.T + folded.left.bias
    right = x @ folded.right.weight.T + folded.right.bias
    by_hand = (left * right) @ folded.head.weight.T + folded.head.bias
    torch.testing.assert_close(by_hand, by_the_formula(tc, x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(folded(x), by_hand)


def test_folded_can_be_trained_attached_and_saved(tmp_path):
    folded = transcoder(mlp_path="gpt_neox.layers.1.mlp").bfloat16().folded()
    assert folded.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in folded.parameters())
    folded.save_pretrained(tmp_path)
    x = torch.randn(3, WIDTH)
    assert torch.equal(BilinearTC.from_pretrained(tmp_path)(x), folded(x))


# ------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_loads_bit_for_bit(form, tmp_path):
    tc = transcoder(form, base_model="some/base", base_revision="abc", layer_index=3, mlp_path="a.3.mlp")
    tc.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "configuration_bilinear_tc.py",
        "modeling_bilinear_tc.py",
    }
    loaded, info = BilinearTC.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in tc.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    fields = ("n_inputs", "n_hidden", "n_outputs", "bias", "form", "base_model", "base_revision", "layer_index")
    assert all(getattr(loaded.config, field) == getattr(tc.config, field) for field in (*fields, "mlp_path"))


@pytest.mark.parametrize("placing", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loading_in_another_dtype(placing, dtype, tmp_path):
    tc = transcoder()
    tc.save_pretrained(tmp_path)
    loaded = BilinearTC.from_pretrained(tmp_path, dtype=dtype, **placing)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert all(torch.equal(getattr(loaded, name), getattr(tc, name)) for name in STATISTICS)
    x = torch.randn(3, WIDTH)
    assert torch.equal(loaded(x), tc.to(dtype)(x))


def test_the_auto_map_names_no_repository(tmp_path):
    tc = transcoder()
    tc.config.auto_map = {  # as transformers leaves it in a model that was loaded from the Hub
        "AutoConfig": "some/repo--configuration_bilinear_tc.BilinearTCConfig",
        "AutoModel": "some/repo--modeling_bilinear_tc.BilinearTC",
    }
    tc.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_bilinear_tc.BilinearTCConfig",
        "AutoModel": "modeling_bilinear_tc.BilinearTC",
    }


ELSEWHERE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bilinear_tc":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())

import torch
from transformers import AutoConfig, AutoModel

run, again = sys.argv[1:]
here = {"trust_remote_code": True, "subfolder": "layer_3"}
config = AutoConfig.from_pretrained(run, **here)
assert config.layer_index == 3, config
tc = AutoModel.from_pretrained(run, **here)
assert type(tc).__module__.startswith("transformers_modules."), type(tc)
tc.save_pretrained(again)
x = torch.load(run + "/x.pt")
torch.save([tc(x), AutoModel.from_pretrained(again, trust_remote_code=True)(x), tc.folded()(x)], run + "/y.pt")
"""


@pytest.mark.slow
def test_a_run_loads_by_auto_classes_where_this_package_is_not_installed(tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    tc = transcoder(layer_index=3)
    tc.save_pretrained(run / "layer_3")
    for code in (run / "layer_3").glob("*.py"):
        code.rename(run / code.name)
    x = torch.randn(4, WIDTH)
    torch.save(x, run / "x.pt")
    # Another folder as the working directory, and no cache of remote code from earlier tests.
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(run), str(again)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded, reloaded, folded = torch.load(run / "y.pt")
    with torch.no_grad():
        expected = tc(x)
    torch.testing.assert_close(loaded, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(reloaded, loaded)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)
    assert json.loads((again / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_bilinear_tc.BilinearTCConfig",
        "AutoModel": "modeling_bilinear_tc.BilinearTC",
    }

"""A fit's plan: what it says before anything is loaded, against what the fit then has and does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import write_base
from plans import write_config
from transformers import Qwen3MoeConfig

from bilinear_tc.train import fit
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.fitting.fitter import Fitter
from bilinear_tc.train.fitting.least_squares import LeastSquares
from bilinear_tc.train.plan import Device, Plan
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.studies.benchmark import count_flops
from bilinear_tc.train.tally import Tally
from bilinear_tc.train.text.batches import TokenBatch

CPU = Device("cpu", 10**11, 1)  # beside what this very process has imported


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    base = write_base(tmp_path / "base")
    return Recipe(
        base=str(base), dataset="python-stdlib", batch_size=4, seq_len=32, init_tokens=128, max_steps=2, eval_tokens=128
    )


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_memory_by_kind_is_what_a_fit_has(recipe):
    """Base, activations, parameters, gradients, momentum and the moments of the closed form, to the byte."""
    base = Base.of_recipe(recipe, torch.device("cpu"))
    fitter = Fitter(recipe, base, torch.device("cpu"))
    plan = Plan(recipe, CPU)
    fitter.step(TokenBatch(torch.randint(50, (4, 32))), 0)
    stack, activations = fitter.stack, fitter.activations
    equations = LeastSquares(torch.zeros(2, 64), torch.zeros(2, 16))
    moments = [v for v in vars(equations).values() if v.dtype == torch.float64]
    states = [s for o in fitter.optimizers for of in o.state.values() for s in of.values() if s.numel() > 1]
    kinds = plan.memory(2)
    assert kinds["steps"]["base"] == size(*{*base.model.parameters(), *base.model.buffers()})
    buffers = (activations._x, activations._y, activations._weights, activations._ordinary)
    assert kinds["steps"]["activations"] == size(*buffers)
    assert kinds["steps"]["parameters"] == kinds["steps"]["gradients"] == size(*stack.parameters.values())
    assert kinds["steps"]["momentum"] == size(*states)
    shifts = size(equations.feature_shift, equations.target_shift)
    assert kinds["start, heads"]["moments"] == size(*moments) + shifts


def test_operations_are_those_that_a_step_makes(recipe):
    """By part, as torch counts them in a step of the fit, but for attention, which meta tensors spell out."""
    base = Base.of_recipe(recipe, torch.device("cpu"))
    plan = Plan(recipe, CPU).flops
    batch = TokenBatch(torch.randint(50, (4, 32)))
    with_it, without = (Fitter(replace(recipe, jvp=jvp), base, torch.device("cpu")) for jvp in (0.1, 0.0))
    with_it.step(batch, 0)  # the first reads the MLPs' weights
    with_it, without = count_flops(with_it, batch), count_flops(without, batch)
    assert plan["base forward"] == pytest.approx(without["base"], rel=0.01)
    assert plan["gradients"] == without["transcoders"]
    assert plan["jvp"] == with_it["transcoders"] - without["transcoders"]
    assert plan["Newton–Schulz"] == without["optimizer"]


def test_a_tally_forgets_what_is_freed():
    with torch.device("meta"), Tally() as tally:
        kept = torch.zeros(1000)
        kept + 1
        view = kept[10:]
        (view + 1).add_(1)
    assert (tally.now, tally.peak) == (4000, 8000)


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """From a config.json alone: there is no weight to load."""
    base = write_config(tmp_path / "base", "pythia-410m")
    command = [
        "fit.py",
        "--base",
        str(base),
        "--output_dir",
        str(tmp_path / "run"),
        "--layers",
        "0-1",
        "--plan",
        "80GB",
    ]
    monkeypatch.setattr(sys, "argv", command)
    fit.main()
    printed = capsys.readouterr().out
    assert "2 of 1024 → 4096 → 1024" in printed
    assert "GPU with 80.0 GB, products in bfloat16" in printed
    assert printed.endswith("it fits\n")
    assert [path.name for path in tmp_path.rglob("*")] == ["base", "config.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device", "parameters", "fits"),
    [
        ("pythia-410m", "80GB", 405_334_016, True),
        ("Llama-3.1-8B", "80GB", 8_030_261_248, False),
        ("Llama-3.1-8B", "8x80GB", 8_030_261_248, True),  # shared out
        ("gemma-2-9b", "80GB", 9_241_705_984, False),
    ],
)
def test_what_fits_and_what_to_run_instead(tmp_path, monkeypatch, name, device, parameters, fits):
    """Published sizes; the layers that are named together are all, and each part fits."""
    monkeypatch.setattr("bilinear_tc.train.plan.free_disk", lambda _folder: 10**13)
    recipe = Recipe(base=str(write_config(tmp_path, name)), output_dir="runs/it")
    plan = Plan(recipe, Device.parse(device))
    assert plan.base_parameters == parameters
    remedies = [*plan.remedies()]
    if fits:
        assert remedies == []
        assert plan.shared_out == (plan.device.processes > 1)
        whole = [*Plan(replace(recipe, shard="none"), plan.device).remedies()]
        assert [" run with --shard layers (" in sentence for sentence in whole] == [True] * plan.shared_out
        return
    assert remedies[0].startswith("does not fit: start, heads takes")
    parts = [line.split()[1] for line in remedies[1:]]
    named = [layer for part in parts for layer in Recipe(layers=part).layer_indices()]
    assert named == plan.base.layers
    most = max(len(Recipe(layers=part).layer_indices()) for part in parts)
    assert plan.peak(most) <= plan.room < plan.peak(most + 1)


def test_a_device_that_nothing_fits_on(recipe):
    plan = Plan(recipe, Device("cuda", 10**5, 1))
    assert next(plan.remedies()).endswith("run with --base_device_map auto")
    roomy = Device("cuda", plan.base_bytes * 2, 1)
    assert "run with a lower --batch_size" in next(Plan(recipe, roomy).remedies())


def test_layers_that_are_shared_out(recipe):
    """Half of them, with all rows; and the base's passes tell of all."""
    two = Device("cuda", 10**9, 2)
    whole, half = (Plan(replace(recipe, shard=shard, dtype="float32"), two) for shard in ("none", "layers"))
    kept, shared = whole.memory(2), half.memory(2)
    for phase, kinds in shared.items():
        for kind in ("parameters", "gradients", "momentum", "moments", "MLPs' copies"):
            assert 2 * kinds.get(kind, 0) == kept[phase].get(kind, 0)
        for kind in ("base", "activations"):  # half the layers, but all rows
            assert kinds[kind] == kept[phase][kind]
    between = replace(two, memory=int((whole.peak(2) + half.peak(2)) / 2 / 0.92))
    assert "run with --shard layers" in next(Plan(replace(recipe, dtype="float32"), between).remedies())
    assert [*Plan(replace(recipe, shard="layers", dtype="float32"), between).remedies()] == []


def test_what_other_stages_and_bases_change(recipe):
    plain = Plan(recipe, CPU)
    joint = "\n".join(Plan(replace(recipe, finish="joint"), CPU).lines())
    assert "--finish joint, which holds all layers on each device, is not counted" in joint
    assert Plan(replace(recipe, activations="cache"), CPU).flops["base forward"] == 0 < plain.flops["base forward"]
    linear = [m for m in plain.base.blocks.modules() if isinstance(m, torch.nn.Linear)]
    packed = Plan(replace(recipe, base_quantization="int8"), CPU)
    assert plain.base_bytes - packed.base_bytes == 3 * sum(m.weight.numel() for m in linear)
    nothing = Plan(replace(recipe, base_device_map="auto"), Device("cuda", 10**5, 1))
    assert "run with --base_device_map auto" not in next(nothing.remedies())


@pytest.fixture
def of_experts(tmp_path: Path) -> Recipe:
    """Of a plain layer, and one of four experts of width 32, two of which a token meets."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    Qwen3MoeConfig(num_hidden_layers=2, intermediate_size=64, **sizes, **experts).save_pretrained(tmp_path)
    return Recipe(base=str(tmp_path), batch_size=4, seq_len=32, init_tokens=128, max_steps=2, output_dir="runs/it")


def test_mlps_that_no_closed_form_starts_from(of_experts):
    """Also if the first layer's is none of them; and what is told to run instead is planned without a word."""
    assert "run with --init random" in next(Plan(of_experts, CPU).remedies())
    plain, noise = replace(of_experts, layers="0"), replace(of_experts, init="random", jvp=None, normalization="auto")
    assert [[*Plan(recipe, CPU).remedies()] for recipe in (plain, noise)] == [[], []]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operations_of_experts_are_counted(of_experts, dtype):
    """Beside those of a plain layer: a router, and for each token three maps of two experts, all of width 32."""
    noise = replace(of_experts, init="random", jvp=None, normalization="auto", dtype=dtype)
    both, first = (Plan(replace(noise, layers=layers), CPU).flops["base forward"] for layers in ("0-1", "0"))
    assert both - first == first - 2 * 128 * (3 * 32 * 64) + 2 * 128 * (32 * 4 + 2 * 3 * 32 * 32)


def test_the_widest_mlp_counts(recipe, monkeypatch):
    """Of layers whose MLPs are not alike inside, wherever it stands."""
    plain, load = Plan(recipe, CPU), Base.load.__func__

    def with_a_wide_one(cls, *args, **kwargs):
        model = load(cls, *args, **kwargs).model
        mlp = model.gpt_neox.layers[1].mlp
        mlp.dense_h_to_4h, mlp.dense_4h_to_h = (torch.nn.Linear(*of, device="meta") for of in ((16, 320), (320, 16)))
        return cls(model, None)

    monkeypatch.setattr(Base, "load", classmethod(with_a_wide_one))
    wide = Plan(recipe, CPU)
    assert (plain.base.widest_map, wide.base.widest_map) == (32, 320)
    assert (plain.mlp.width, wide.mlp.width) == (32, 320)


def test_devices():
    assert Device.parse("80GB") == Device("cuda", 80 * 10**9, 1)
    assert Device.parse("8x24GiB") == Device("cuda", 24 * 2**30, 8)
    assert Device.parse("").type in ("cpu", "cuda")
    for wrong in ("80", "x80GB", "0x80GB", "0GB", "8*80GB"):
        with pytest.raises(UserError, match="plan must be a GPU's memory, such as 80GB"):
            Device.parse(wrong)

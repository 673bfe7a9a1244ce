from __future__ import annotations

import filecmp
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from bases import tiny_neox, write_base_of_words
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_run import write_tiny_run
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModel, GPTNeoXForCausalLM

from bilinear_tc.train.errors import UserError, command_line
from bilinear_tc.train.recipe import Recipe, read_settings
from bilinear_tc.train.run import Run
from bilinear_tc.upload import legacy
from bilinear_tc.upload.legacy import ImportSettings, export_checkpoint, export_run, import_checkpoints
from bilinear_tc.upload.pt_checkpoint import read_checkpoint
from bilinear_tc.upload.repository import build_repository

WIDTH, HIDDEN, STEPS, SEQ_LEN = 16, 24, 7, 8
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX of three layers with random weights and a tokenizer of one token a word."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_neox(vocab_size=len(WORDS) + 1, hidden_size=WIDTH, bos_token_id=0, eos_token_id=0)
    return write_base_of_words(folder, model, WORDS, Whitespace())


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Token ids of documents, some shorter than a sequence and some longer."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(1, len(WORDS) + 1, (length,), generator=generator).tolist() for length in (5, 8, 20, 3, 9, 12) * 4
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [json.dumps({"text": " ".join(WORDS[i - 1] for i in ids)}) for ids in documents]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def uninstalled_config(module: str = "utils.bilinear", name: str = "Config", **values: Any) -> Any:
    """An object of a dataclass whose module is importable while it is pickled only: see `save`."""
    values = {"n_inputs": WIDTH, "n_hidden": HIDDEN, "n_outputs": WIDTH, "bias": True, **values}
    cls = make_dataclass(name, list(values))
    cls.__module__, cls.__qualname__ = module, name
    return cls(**values)


def save(content: dict, path: Path) -> None:
    """torch.save with the config's module present, and gone again afterwards, as for a reader."""
    config = content.get("config")
    module = type(config).__module__
    present = {}
    if module.startswith(("utils", "old")):
        for depth in range(len(module.split("."))):
            name = ".".join(module.split(".")[: depth + 1])
            present[name] = types.ModuleType(name)
        setattr(present[module], type(config).__name__, type(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.modules.update(present)
    try:
        torch.save(content, path)
    finally:
        for name in present:
            del sys.modules[name]


def original(layer: int, form: str = "bilinear", config: Any = None) -> dict[str, Any]:
    """A checkpoint with the keys that the earlier set's card lists."""
    generator = torch.Generator().manual_seed(layer)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 4

    shapes = {"left": (HIDDEN, WIDTH), "right": (HIDDEN, WIDTH), "head": (WIDTH, HIDDEN)}
    if form == "input_sum":
        shapes = {"W_left": (WIDTH, HIDDEN), "W_right": (HIDDEN, WIDTH)}
    weights = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": random(shape[0]) for name, shape in shapes.items() if name != "W_right"}
    fvu = [0.5 / (step + 1) for step in range(STEPS)]
    return {
        "model_state_dict": OrderedDict(weights),
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": random(3)}}, "param_groups": [{"lr": 0.02}]},
        "config": config or uninstalled_config(),
        "mse_losses": [value * 1.01 for value in fvu],
        "variance_explained": [1 - value for value in fvu],
        "fvu_values": fvu,
        "layer_idx": layer,
        "d_model": WIDTH,
    }


def save_originals(folder: Path, layers: tuple[int, ...] = (0, 2), **kwargs: Any) -> Path:
    for layer in layers:
        name = f"transcoder_weights_l{layer}_bilinear_muon_{STEPS}b.pt"
        save(original(layer, **kwargs), folder / f"layer_{layer}" / name)
    return folder


def true_moments(base: Path, documents: list[list[int]], layer: int) -> dict[str, Tensor]:
    """Mean and standard deviation in float64, document by document, through the module's own hooks; padding counts."""
    model = GPTNeoXForCausalLM.from_pretrained(base).double()
    rows: list[tuple[Tensor, Tensor]] = []
    model.gpt_neox.layers[layer].mlp.register_forward_hook(
        lambda _module, inputs, output: rows.append((inputs[0][0].detach(), output[0].detach()))
    )
    for ids in documents:
        padding = [0] * (SEQ_LEN - len(ids))  # the end of text
        mask = torch.tensor([[1] * min(len(ids), SEQ_LEN) + padding])
        model(input_ids=torch.tensor([ids[:SEQ_LEN] + padding]), attention_mask=mask)
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    deviation = {"input_std": x - x.mean(0), "output_std": y - y.mean(0)}
    return {"input_mean": x.mean(0), "output_mean": y.mean(0)} | {
        name: value.square().mean(0).sqrt() for name, value in deviation.items()
    }


def settings(base: Path, text: Path, **kwargs: Any) -> ImportSettings:
    return ImportSettings(base=str(base), dataset=str(text), seq_len=SEQ_LEN, batch_size=4, **kwargs)


@pytest.mark.parametrize("form", ["bilinear", "input_sum"])
def test_import_gives_the_checkpoints_map_on_raw_activations(
    tmp_path: Path, base: Path, text: Path, documents: list[list[int]], form: str
) -> None:
    folder = save_originals(tmp_path / "originals", form=form)
    run = import_checkpoints(folder, tmp_path / "run", settings(base, text))
    for layer in (0, 2):
        model = AutoModel.from_pretrained(run, subfolder=f"layer_{layer}", trust_remote_code=True)
        expected = true_moments(base, documents, layer)
        for name, value in expected.items():
            torch.testing.assert_close(getattr(model, name).double(), value, rtol=1e-4, atol=1e-5)
        w = {name: value.double() for name, value in original(layer, form)["model_state_dict"].items()}
        x = torch.randn(5, WIDTH, dtype=torch.float64)
        z = (x - expected["input_mean"]) / expected["input_std"]
        if form == "bilinear":
            units = (z @ w["left.weight"].T + w["left.bias"]) * (z @ w["right.weight"].T + w["right.bias"])
            z_out = units @ w["head.weight"].T + w["head.bias"]
        else:  # the printed formula's example code
            outer = z.unsqueeze(-1) * (z @ w["W_right.weight"].T).unsqueeze(-2)
            z_out = outer.sum(-2) @ w["W_left.weight"].T + w["W_left.bias"]
        y = z_out * expected["output_std"] + expected["output_mean"]
        torch.testing.assert_close(model(x.float()).double(), y, rtol=1e-3, atol=1e-3)
        assert model.config.mlp_path == f"gpt_neox.layers.{layer}.mlp"


def test_import_writes_a_run_that_can_be_published(tmp_path: Path, base: Path, text: Path) -> None:
    run = import_checkpoints(save_originals(tmp_path / "originals"), tmp_path / "run", settings(base, text))
    history = pq.read_table(run / "layer_2" / "history.parquet").to_pydict()
    assert history["step"] == list(range(1, STEPS + 1))
    assert history["tokens"] == [4 * SEQ_LEN * step for step in range(1, STEPS + 1)]
    assert history["fvu"] == original(2)["fvu_values"]
    assert history["mse"] == original(2)["mse_losses"]
    assert history["variance_explained"] == original(2)["variance_explained"]
    recipe = Recipe(**read_settings(run / "recipe.yaml"))
    assert (recipe.base, recipe.dataset, recipe.layer_indices()) == (str(base), str(text), [0, 2])
    assert (recipe.optimizer, recipe.normalization, recipe.max_steps) == ("muon", "batch", STEPS)
    assert "lr" not in read_settings(run / "recipe.yaml")  # nobody knows
    described = yaml.safe_load((run / "layer_2" / "config.yaml").read_text())
    assert described["imported"]["checkpoint"] == f"transcoder_weights_l2_bilinear_muon_{STEPS}b.pt"
    assert described["imported"]["statistics_tokens"] == SEQ_LEN * 6 * 4
    assert not list(run.parent.glob(".run*"))
    folder = build_repository(Run(run), tmp_path / "set", repo_id="you/old", base_model="owner/base")
    card = (folder / "README.md").read_text()
    assert "license" not in ModelCard(card).data.to_dict()
    assert "whoever published them has chosen none" in card
    assert "imported" in card
    assert "learning rate" not in card
    assert "padding counted like text" in card
    assert "left out of the loss" not in card


def test_calibration_stops_after_the_tokens_asked_for(tmp_path: Path, base: Path, text: Path) -> None:
    folder = save_originals(tmp_path / "originals", layers=(1,))
    run = import_checkpoints(folder, tmp_path / "run", settings(base, text, calibration_tokens=60))
    described = yaml.safe_load((run / "layer_1" / "config.yaml").read_text())
    assert described["imported"]["statistics_tokens"] == 64  # one batch of eight documents


def test_a_base_that_gives_nan_is_refused(tmp_path: Path, base: Path, text: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["gpt_neox.layers.2.mlp.dense_4h_to_h.weight"][3, 1] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    folder = save_originals(tmp_path / "originals")
    with pytest.raises(FloatingPointError, match=r"MLP output of layer 2 .* at the calibration text"):
        import_checkpoints(folder, tmp_path / "run", settings(broken, text))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["utils.bilinear", "old.package.models", "utils"])
def test_a_config_of_any_module_that_is_not_installed_is_read(tmp_path: Path, module: str) -> None:
    path = tmp_path / "x_l3_.pt"
    content = original(3, config=uninstalled_config(module, "Settings", device=torch.device("cpu")))
    save(content, path)
    allowed = torch.serialization.get_safe_globals()
    checkpoint = read_checkpoint(path)
    assert (checkpoint.layer, checkpoint.config.n_hidden, checkpoint.steps) == (3, HIDDEN, STEPS)
    assert torch.equal(checkpoint.weights["head.bias"], content["model_state_dict"]["head.bias"])
    assert set(torch.serialization.get_safe_globals()) == set(allowed)  # the class does not stay allowed
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_wrapped_names_and_missing_biases(tmp_path: Path) -> None:
    content = original(0)
    weights = content["model_state_dict"]
    del weights["head.bias"]
    content["model_state_dict"] = {f"_orig_mod.{name}": value for name, value in weights.items()}
    save(content, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert torch.equal(read.weights["left.weight"], weights["left.weight"])
    assert read.weights["head.bias"].tolist() == [0.0] * WIDTH
    content["model_state_dict"] = {name: value for name, value in weights.items() if name.endswith("weight")}
    save(content, tmp_path / "b.pt")
    assert not read_checkpoint(tmp_path / "b.pt").config.bias


class Harmless:
    """A class that some library may have allowed."""


class Runs:
    """Pickles into a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def attacks(marker: Path) -> dict[str, dict]:
    touch = f"touch {marker}"
    clean = original(0)
    hidden = uninstalled_config()
    hidden.device = Runs(os.system, touch)
    return {
        "system": clean | {"config": Runs(os.system, touch)},
        "popen": clean | {"config": Runs(subprocess.Popen, ["touch", str(marker)])},
        "exec": clean | {"config": Runs(exec, f"open({str(marker)!r}, 'w')")},
        "open": clean | {"config": Runs(io.open, str(marker), "w")},
        "in a field of the config": clean | {"config": hidden},
        "beside it": clean | {"extra": Runs(os.system, touch)},
        "in the histories": clean | {"fvu_values": [Runs(eval, f"open({str(marker)!r}, 'w')")]},
        "another class": clean | {"extra": Path("x")},
    }


@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
def test_a_pickle_that_wants_anything_else_is_refused_and_runs_nothing(tmp_path: Path, attack: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "layer_0" / "a.pt"
    save(attacks(marker)[attack], path)
    allowed = torch.serialization.get_safe_globals()
    with pytest.raises(UserError, match=r"is refused, and nothing in it was run") as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    if attack in ("system", "exec", "open"):
        torch.load(path, weights_only=False)
        assert marker.exists()  # the attack itself works


def test_what_other_libraries_allow_is_not_allowed_here(tmp_path: Path) -> None:
    torch.serialization.add_safe_globals([Harmless])
    try:
        torch.save(original(0) | {"config": {}, "extra": Harmless()}, tmp_path / "a.pt")
        torch.load(tmp_path / "a.pt", weights_only=True)
        with pytest.raises(UserError, match=r"asks for .*Harmless"):
            read_checkpoint(tmp_path / "a.pt")
    finally:
        before = set(torch.serialization.get_safe_globals()) - {Harmless}
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


def test_the_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    save(attacks(tmp_path / "marker")["beside it"], tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"asks for (posix|nt)\.system"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_state_dict": {"up.weight": torch.zeros(2, 2)}}, "holds up.weight; expected left, right and head"),
        ({"config": {"n_inputs": 99}}, f"config says n_inputs 99, its weights say {WIDTH}"),
        ({"layer_idx": None}, "does not tell its layer"),
        ({"mse_losses": [0.1]}, "differ in length"),
        ({"statistics": {"input_mean": torch.zeros(3)}}, "expected statistics"),
    ],
)
def test_bad_checkpoints_are_refused_with_a_sentence(tmp_path: Path, change: dict, message: str) -> None:
    save(original(0) | change, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be read as a torch checkpoint"):
        read_checkpoint(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("b/data.pkl", b"\x80\x02garbage")
    with pytest.raises(UserError, match="no readable pickle"):
        read_checkpoint(tmp_path / "b.pt")
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(UserError, match="not a transcoder's checkpoint"):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("form", ["bilinear", "input_sum"])
def test_importing_an_export_gives_the_run_back_to_the_byte(tmp_path: Path, form: str) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(0, 3), form=form)
    export_run(Run(run), tmp_path / "exported")
    back = import_checkpoints(tmp_path / "exported", tmp_path / "back", ImportSettings())
    files = [p.relative_to(run) for p in run.rglob("*") if p.is_file() and "checkpoints" not in p.parts]
    assert len(files) == 2 * 4 + 4
    for file in files:
        assert filecmp.cmp(run / file, back / file, shallow=False), file
    assert {p.relative_to(back) for p in back.rglob("*") if p.is_file()} == set(files)


def test_an_exported_file_alone_keeps_its_layer_whole(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(4,))
    export_checkpoint(Run(run), 4, tmp_path / "alone")
    back = import_checkpoints(tmp_path / "alone", tmp_path / "back", ImportSettings())
    for name in ("model.safetensors", "config.json", "config.yaml", "history.parquet"):
        assert filecmp.cmp(run / "layer_4" / name, back / "layer_4" / name, shallow=False), name
    recipe, before = (read_settings(where / "recipe.yaml") for where in (back, run))
    assert all(before[name] == value for name, value in recipe.items())


def test_half_precision_weights_survive_the_round_trip(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(0,))
    model = AutoModel.from_pretrained(run, subfolder="layer_0", trust_remote_code=True).bfloat16()
    model.save_pretrained(run / "layer_0")
    (run / "layer_0" / "modeling_bilinear_tc.py").unlink(missing_ok=True)
    (run / "layer_0" / "configuration_bilinear_tc.py").unlink(missing_ok=True)
    export_run(Run(run), tmp_path / "exported")
    back = import_checkpoints(tmp_path / "exported", tmp_path / "back", ImportSettings())
    assert filecmp.cmp(run / "layer_0/model.safetensors", back / "layer_0/model.safetensors", shallow=False)


def test_readers_of_the_earlier_card_can_load_an_export(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", layers=(3,), form="input_sum", steps=6)
    path = export_checkpoint(Run(run), 3, run / "layer_3")
    assert path == run / "layer_3" / "transcoder_weights_l3_bilinear_muon_6b.pt"
    checkpoint = torch.load(path)  # its default: weights only, no class of any module
    keys = ["model_state_dict", "optimizer_state_dict", "config", "mse_losses", "variance_explained", "fvu_values"]
    assert list(checkpoint)[:8] == [*keys, "layer_idx", "d_model"]
    config = checkpoint["config"]

    # the model as that card writes it
    class Bilinear(torch.nn.Module):
        def __init__(self, n_inputs: int, n_hidden: int, n_outputs: int, bias: bool = True) -> None:
            super().__init__()
            self.W_left = torch.nn.Linear(n_hidden, n_outputs, bias=bias)
            self.W_right = torch.nn.Linear(n_inputs, n_hidden, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.W_left((x.unsqueeze(-1) * self.W_right(x).unsqueeze(-2)).sum(dim=-2))

    theirs = Bilinear(config.n_inputs, config.n_hidden, config.n_outputs, config.bias)
    theirs.load_state_dict(checkpoint["model_state_dict"])
    ours = AutoModel.from_pretrained(run, subfolder="layer_3", trust_remote_code=True)
    x = torch.randn(4, config.n_inputs)
    s = checkpoint["statistics"]
    expected = theirs((x - s["input_mean"]) / s["input_std"]) * s["output_std"] + s["output_mean"]
    torch.testing.assert_close(ours(x), expected)
    assert checkpoint["fvu_values"] == pq.read_table(run / "layer_3" / "history.parquet")["fvu"].to_pylist()
    assert (checkpoint["layer_idx"], checkpoint["d_model"]) == (3, 8)


def test_what_is_missing_is_said_before_any_work(tmp_path: Path, base: Path, text: Path) -> None:
    folder = save_originals(tmp_path / "originals", layers=(0,))
    with pytest.raises(UserError, match=r"--base and --dataset"):
        import_checkpoints(folder, tmp_path / "run", ImportSettings(base=str(base)))
    with pytest.raises(UserError, match="calibration_tokens must be at least 1"):
        ImportSettings(calibration_tokens=0)
    with pytest.raises(UserError, match="holds no checkpoints"):
        import_checkpoints(tmp_path, tmp_path / "run", settings(base, text))
    save(original(0), folder / "again.pt")
    with pytest.raises(UserError, match="both of layer 0"):
        import_checkpoints(folder, tmp_path / "run", settings(base, text))
    (folder / "again.pt").unlink()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="is there already"):
        import_checkpoints(folder, tmp_path / "taken", settings(base, text))
    save(original(9), folder / "layer_9" / "a.pt")
    with pytest.raises(ValueError, match="layers 0 to 2"):
        import_checkpoints(folder, tmp_path / "run", settings(base, text))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["originals", "taken"]


def test_a_base_of_another_width_is_refused(tmp_path: Path, base: Path, text: Path) -> None:
    content = original(0)
    content["model_state_dict"] = {
        "left.weight": torch.zeros(4, 12),
        "right.weight": torch.zeros(4, 12),
        "head.weight": torch.zeros(12, 4),
    }
    content["config"] = {"n_inputs": 12}
    save(content, tmp_path / "originals" / "a.pt")
    with pytest.raises(UserError, match=rf"maps width 12 to 12, the MLPs of .* {WIDTH} to {WIDTH}"):
        import_checkpoints(tmp_path / "originals", tmp_path / "run", settings(base, text))


def test_command(
    tmp_path: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["legacy.py", *map(str, arguments)])
        command_line(legacy.main)

    folder = save_originals(tmp_path / "originals", layers=(1,))
    run, sizes = tmp_path / "deep" / "run", ("--seq_len", SEQ_LEN, "--batch_size", 4, "--calibration_tokens", 50)
    call("import", folder, "--output_dir", run, "--base", base, "--dataset", text, *sizes)
    assert (run / "layer_1" / "model.safetensors").is_file()
    call("export", run)  # beside the run's own files
    call("export", run, "--output_dir", tmp_path / "out")
    name = f"transcoder_weights_l1_bilinear_muon_{STEPS}b.pt"
    assert filecmp.cmp(run / "layer_1" / name, tmp_path / "out" / "layer_1" / name, shallow=False)
    exported = torch.load(run / "layer_1" / name)["model_state_dict"]
    assert all(torch.equal(exported[key], value) for key, value in original(1)["model_state_dict"].items())
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call("import", tmp_path / "nowhere", "--output_dir", tmp_path / "x")
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")

"""One layer's checkpoint in the earlier `.pt` layout: read without trusting it, and written.

A file is a pickled dict:

| key | what |
| --- | --- |
| model_state_dict | the maps' weights and biases, on z-scored inputs and outputs |
| optimizer_state_dict | not read; empty in a file written here, since a run publishes no training state |
| config | n_inputs, n_hidden, n_outputs, bias: a dataclass of some module; here a dict with attributes |
| mse_losses, variance_explained, fvu_values | a value a training batch |
| layer_idx, d_model | the layer, its width |

A file written here has four keys more, so that reading it gives the layer back whole: `statistics` (the vectors of the
z-scores), `steps` and `tokens` (the other columns of history.parquet), `settings` (config.yaml).

Reading is by torch's restricted unpickler, with an inert stand-in for the class of `config` alone: a pickle that asks
for anything else is refused, and nothing in it is ever run.
"""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig, form_of
from bilinear_tc.modeling_bilinear_tc import STATISTICS
from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.files import written_whole
from bilinear_tc.train.run import WEIGHTS, Run

WIDTHS = ("n_inputs", "n_hidden", "n_outputs")
CONFIG_FIELDS = (*WIDTHS, "bias", "form", "base_model", "base_revision", "layer_index", "mlp_path")
HISTORIES = {"mse": "mse_losses", "variance_explained": "variance_explained", "fvu": "fvu_values"}


@dataclass
class Checkpoint:
    """One layer, as a `.pt` file has it.

    Attributes:
        path: the file.
        config: layer, widths, bias and form; base, revision and MLP path if the file names them (exports do).
        weights: the maps' parameters, named as `BilinearTC` names them; memory-mapped.
        statistics: the four vectors of the z-scores, None if the file has none.
        history: the columns of history.parquet; `tokens` is missing if the file does not tell.
        settings: config.yaml's content, None if the file has none.
    """

    path: Path
    config: BilinearTCConfig
    weights: dict[str, Tensor]
    statistics: dict[str, Tensor] | None
    history: dict[str, list]
    settings: dict[str, Any] | None

    @property
    def layer(self) -> int:
        return self.config.layer_index

    @property
    def steps(self) -> int:
        return len(self.history["step"])


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one `.pt` file, running nothing that is in it.

    UserError if it is not a torch checkpoint, asks for a class other than its config's, or lacks a key.
    """
    content = load_inert(path)
    if not isinstance(content, dict) or "model_state_dict" not in content:
        raise UserError(f"{path} is not a transcoder's checkpoint: expected a dict with the key model_state_dict")
    weights, config = read_weights(content["model_state_dict"], path)
    config.layer_index = read_layer(content, path)
    said = content.get("config", {})
    said = said if isinstance(said, dict) else getattr(said, "__dict__", {})
    for name in WIDTHS:
        if said.get(name, getattr(config, name)) != getattr(config, name):
            raise UserError(f"{path}: its config says {name} {said[name]}, its weights say {getattr(config, name)}")
    for name in ("base_model", "base_revision", "mlp_path"):
        setattr(config, name, said.get(name))
    statistics, history = read_statistics(content, config, path), read_columns(content, path)
    return Checkpoint(path, config, weights, statistics, history, content.get("settings"))


def load_inert(path: Path) -> Any:
    """A pickled checkpoint's content, its tensors memory-mapped, the object at `config` as a bag of attributes.

    UserError if the file is not a torch checkpoint, or its pickle asks for anything but tensors and that class.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # a checksum is not that of its content
    except Exception as error:  # whatever a damaged archive makes zipfile raise, down to an undecodable name
        raise UserError(f"{path} cannot be read as a torch checkpoint (a zip archive): {one_line(error)}") from error
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} is not what was written")
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # what other libraries allow is not allowed here
    asked = None
    try:
        asked = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        classes: list[Any] = [stand_in(name) for name in asked[:1]]
        with torch.serialization.safe_globals(classes):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = content.get("config") if isinstance(content, dict) else None
        if classes and not isinstance(config, classes[0]):
            raise UserError
        return content
    except Exception as error:  # a crafted pickle can make the unpickler fail in any way
        if asked is None:
            raise UserError(f"{path} holds no readable pickle: expected a checkpoint written by torch.save") from error
        foreign = len(asked) > 1 or isinstance(error, UserError)
        reason = f"asks for {', '.join(asked)}" if foreign else f"cannot be read ({one_line(error)})"
        raise UserError(
            f"{path} {reason}: expected tensors, plain values and one config object; it is refused, and nothing in it "
            "was run"
        ) from error
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def stand_in(name: str) -> type:
    """A class of that name without behavior: made without arguments, it takes attributes and keeps them."""
    module, _, qualified = name.rpartition(".")
    return type(qualified, (), {"__module__": module, "__qualname__": qualified})


def read_weights(state: Any, path: Path) -> tuple[dict[str, Tensor], BilinearTCConfig]:
    """The weights in a state dict, and the widths, bias and form that they have.

    A map without a bias among maps with one gets a bias of zeros. UserError if its maps are those of no form, or their
    widths do not match.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: model_state_dict must hold tensors by name")
    # torch.compile and data-parallel wrappers put their own name before each parameter's
    weights = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor.detach() for name, tensor in state.items()}
    form = form_of({name.rpartition(".")[0] for name in weights})
    config = BilinearTCConfig(form=form or "bilinear", bias=any(name.endswith(".bias") for name in weights))
    needed = {f"{name}.weight" for name in config.maps}
    biases = {f"{name}.bias" for name, (_, _, biased) in config.maps.items() if biased}
    if form is None or not needed <= set(weights) <= needed | biases:
        raise UserError(
            f"{path}: model_state_dict holds {', '.join(sorted(weights)) or 'nothing'}; expected left, right and head, "
            "each with weight and bias, or W_left.weight, W_left.bias and W_right.weight"
        )
    shapes = {name: tuple(weights[f"{name}.weight"].shape) for name in config.maps}
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        raise UserError(f"{path}: expected matrices, got {shapes}")
    config.n_hidden, config.n_inputs = shapes[config.factors[1]]
    config.n_outputs = shapes[config.last_map][0]
    for name, (inputs, outputs, biased) in config.maps.items():
        if biased:
            weights.setdefault(f"{name}.bias", weights[f"{name}.weight"].new_zeros(outputs))
        if shapes[name] != (outputs, inputs) or (biased and weights[f"{name}.bias"].shape != (outputs,)):
            raise UserError(f"{path}: the widths of its maps do not match: {shapes}")
    return weights, config


def read_statistics(content: dict, config: BilinearTCConfig, path: Path) -> dict[str, Tensor] | None:
    """The vectors of the z-scores, checked; None if the checkpoint has none."""
    statistics = content.get("statistics")
    if statistics is None:
        return None
    expected = {name: (config.n_inputs if name.startswith("input") else config.n_outputs,) for name in STATISTICS}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in dict(statistics).items()}
    if found != expected:
        raise UserError(f"{path}: expected statistics of the shapes {expected}, got {found}")
    return dict(statistics)


def read_layer(content: dict, path: Path) -> int:
    """The layer's index, from the checkpoint or else from the file's name."""
    layer = content.get("layer_idx")
    if layer is None and (match := re.search(r"_l(\d+)_", path.name)):
        layer = int(match[1])
    if not isinstance(layer, int) or layer < 0:
        raise UserError(f"{path} does not tell its layer: expected a whole number at layer_idx, got {layer!r}")
    return layer


def read_columns(content: dict, path: Path) -> dict[str, list]:
    """The columns of history.parquet: steps counted from 1 if the checkpoint does not number them."""
    columns = {name: [float(value) for value in content.get(key, [])] for name, key in HISTORIES.items()}
    steps = len(columns["fvu"])
    columns["step"] = list(content.get("steps", range(1, steps + 1)))
    if "tokens" in content:
        columns["tokens"] = list(content["tokens"])
    lengths = {name: len(values) for name, values in columns.items()}
    if set(lengths.values()) != {steps}:
        raise UserError(f"{path}: its histories differ in length ({lengths}); expected one value a batch in each")
    return columns


def checkpoint_name(layer: int, optimizer: str, steps: int) -> str:
    return f"transcoder_weights_l{layer}_bilinear_{optimizer}_{steps}b.pt"


def export_checkpoint(run: Run, layer: int, folder: Path) -> Path:
    """Writes one layer of a run as a checkpoint into a folder, and returns the file.

    `config` is an OrderedDict whose entries are attributes too: `torch.load` reads it with `weights_only=True`, its
    default, without any module of ours, and `config.n_inputs` works as the readers of that layout write it. UserError
    if the run does not hold that layer whole, or the file cannot be written.
    """
    weights = run.layer_folder(layer) / WEIGHTS
    try:
        tensors = load_file(weights)
    except Exception as error:  # safetensors raises an error class of its own for a broken file
        raise UserError(f"{weights} is not readable: {one_line(error)}") from error
    config, settings = run.config(layer), run.settings(layer)
    history = {name: column.tolist() for name, column in run.history(layer).items()}
    described = OrderedDict((name, getattr(config, name)) for name in CONFIG_FIELDS)
    vars(described).update(described)
    content = {
        "model_state_dict": {name: tensor for name, tensor in tensors.items() if "." in name},
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "config": described,
        **{key: history[name] for name, key in HISTORIES.items()},
        "layer_idx": layer,
        "d_model": config.n_inputs,
        "statistics": {name: tensors[name] for name in STATISTICS},
        "steps": history["step"],
        "tokens": history["tokens"],
        "settings": settings,
    }
    name = checkpoint_name(layer, settings.get("optimizer", "muon"), len(history["step"]))
    with written_whole(folder) as scratch:
        torch.save(content, scratch / name)
    return folder / name

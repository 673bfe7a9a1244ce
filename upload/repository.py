"""From a run to the folder that becomes a Hub repository: the check of the run, the folder, what lies in it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import STATISTICS, BilinearTC
from bilinear_tc.train.base import base_location
from bilinear_tc.train.recipe import Recipe, read_settings
from bilinear_tc.train.run import CODE_FILES, PACKAGE
from bilinear_tc.upload.evaluation import evaluation_problems, read_evaluation
from bilinear_tc.upload.figures import draw_figures
from bilinear_tc.upload.model_card import write_model_card
from bilinear_tc.upload.pt_checkpoint import export_checkpoint
from bilinear_tc.upload.results import layer_folders, read_history, read_yaml

LAYER_FILES = ("config.json", "model.safetensors", "config.yaml", "history.parquet")
# What config.json says alike of every layer of a set; the card says it once.
ALIKE = ("base_model", "base_revision", "form", "n_inputs", "n_hidden", "n_outputs", "bias")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Every path that a publication can hold: what an earlier one left behind is known by it.
LAYOUT = re.compile(
    r"README\.md|configuration_bilinear_tc\.py|modeling_bilinear_tc\.py|recipe\.yaml|evaluation\.json"
    r"|figures/(all_layers_comparison|training_curves_overlaid_layers_\d+_\d+)\.png"
    r"|layer_\d+/(config\.json|model\.safetensors|config\.yaml|history\.parquet|transcoder_weights_l\d+_\w+\.pt)"
)


class UnfitRun(ValueError):
    """All that is wrong with a run, a line each."""


@dataclass(frozen=True)
class LocalFile:
    """A file of the repository folder, by the two hashes that the Hub knows contents by.

    Attributes:
        path: where it lies.
        size: in bytes.
        sha256: hash of the content; the Hub's name for a large (LFS) file.
        git_oid: git's hash of it as a blob; the Hub's name for a small file.
    """

    path: Path
    size: int
    sha256: str
    git_oid: str


def check_run(run: Path, *, allow_partial: bool = False) -> list[int]:
    """The layers that a run holds, once it has been found fit to publish.

    Args:
        run: a directory as train/fit.py writes it.
        allow_partial: let layers that the recipe names be missing, or fitted for fewer steps than it says.

    Returns:
        The layers, ascending.

    Raises:
        UnfitRun: all that is wrong with the run, a line each.
        ValueError: it is no run at all.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is no folder: expected a run, as train/fit.py writes it")
    layers = layer_folders(run)
    problems = [problem for layer, folder in layers.items() for problem in layer_problems(layer, folder)]
    problems += disagreements(layers.values())
    problems += score_problems(run, layers.values())
    try:
        # an imported run's recipe holds what is known: where that is not the number of steps, any number will do
        recipe = Recipe(**{"max_steps": 0, **read_settings(run / "recipe.yaml")})
    except FileNotFoundError:
        problems.append("recipe.yaml is missing")
    except (ValueError, TypeError) as error:
        problems.append(f"recipe.yaml: {error}")
    else:
        problems += recipe_problems(recipe, layers, allow_partial=allow_partial)
    if problems:
        raise UnfitRun("\n  ".join([f"{run} cannot be published as it is:", *problems]))
    return list(layers)


def recipe_problems(recipe: Recipe, layers: Mapping[int, Path], *, allow_partial: bool) -> Iterator[str]:
    """Where the run falls short of its recipe, or goes beyond it."""
    wanted = recipe.layer_indices() or all_layers(recipe, at_least=max(layers) + 1)
    for layer in sorted(set(layers) - set(wanted)):
        yield f"layer_{layer} is not among the recipe's layers: remove it, if it is left from another fit"
    if allow_partial:
        return
    for layer in sorted(set(wanted) - set(layers)):
        yield f"layer_{layer} is missing, which the recipe names: fit it, or publish the rest with --allow_partial"
    for layer in sorted(set(wanted) & set(layers)):
        try:
            steps = fitted_steps(layers[layer])
        except ValueError:
            continue  # named among the layer's own problems
        if steps is not None and steps < recipe.max_steps:
            yield (
                f"layer_{layer} was fitted for {steps} of {recipe.max_steps} steps: let the fit end, "
                "or publish it as it is with --allow_partial"
            )


def all_layers(recipe: Recipe, *, at_least: int) -> list[int]:
    """Every layer of the recipe's base; where the base cannot be asked, which it says, up to the last fitted one."""
    try:
        config = AutoConfig.from_pretrained(base_location(recipe.base), revision=recipe.base_revision)
        return list(range(config.get_text_config().num_hidden_layers))
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).splitlines()[:1])
        print(f"how many layers {recipe.base} has could not be checked, so that later ones may be missing: {reason}")
        return list(range(at_least))


def layer_problems(layer: int, folder: Path) -> Iterator[str]:
    """All that is wrong inside one layer's folder."""
    missing = [name for name in LAYER_FILES if not (folder / name).is_file()]
    yield from (f"{folder.name}/{name} is missing" for name in missing)
    if not {"config.json", "model.safetensors"} & set(missing):
        try:
            yield from (f"{folder.name}: {problem}" for problem in model_problems(layer, folder))
        except Exception as error:  # a damaged file can make transformers fail in any way
            yield f"{folder.name} does not load: {' '.join(str(error).splitlines()[:1]) or type(error).__name__}"
    try:
        fitted_steps(folder)
    except ValueError as error:
        yield str(error)
    try:
        history = read_history(folder)
    except ValueError as error:
        yield str(error)
    else:
        bad = [name for name, values in history.items() if not np.isfinite(values).all()]
        if bad:
            yield f"{folder.name}/history.parquet holds values that are not finite, in {', '.join(bad)}"


def fitted_steps(folder: Path) -> int | None:
    """Steps that a layer was fitted for, None where its config.yaml does not tell.

    Raises:
        ValueError: where config.yaml is not readable.
    """
    fit = read_yaml(folder / "config.yaml").get("fit", {})
    steps = fit.get("steps") if isinstance(fit, dict) else fit
    if not isinstance(fit, dict) or not isinstance(steps, (int, type(None))):
        raise ValueError(f"{folder.name}/config.yaml: fit must hold a whole number of steps, got {steps!r}")
    return steps


def model_problems(layer: int, folder: Path) -> Iterator[str]:
    """Where a layer's weights do not fit its configuration, or are not finite."""
    config = BilinearTCConfig.from_pretrained(folder)
    if config.layer_index != layer:
        yield f"config.json says that it is layer {config.layer_index}"
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in BilinearTC(config).state_dict().items()}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        held = set(file.keys())
        for name in sorted(held - set(shapes)):
            yield f"model.safetensors holds {name}, which its configuration has no place for"
        for name, shape in shapes.items():
            if name not in held:
                yield f"model.safetensors lacks {name}"
                continue
            tensor = file.get_tensor(name)
            if list(tensor.shape) != shape:
                yield f"{name} has shape {list(tensor.shape)}, but config.json asks for {shape}"
            if not tensor.isfinite().all():
                yield f"{name} holds values that are not finite"
            elif name == "input_std" and not (tensor > 0).all():
                yield "input_std holds values that are not above 0, so that outputs would not be finite"


def disagreements(folders: Sequence[Path]) -> Iterator[str]:
    """Where layers say different things of the base that they all belong to, or of the form that all of them have."""
    said: dict[str, dict[str, list[str]]] = {name: {} for name in ALIKE}
    for folder in folders:
        try:
            config = BilinearTCConfig.from_pretrained(folder)
        except Exception:
            continue  # named among the layer's own problems
        for name, values in said.items():
            values.setdefault(str(getattr(config, name)), []).append(folder.name)
    for name, values in said.items():
        if len(values) > 1:
            described = "; ".join(f"{value} in {', '.join(where)}" for value, where in values.items())
            yield f"{name} differs between layers: {described}"


def score_problems(run: Path, folders: Sequence[Path]) -> Iterator[str]:
    """What keeps the card and the figures from showing scores: they come from evaluation.json or the histories."""
    problems = list(evaluation_problems(run))
    yield from problems
    measured = [] if problems else read_evaluation(run).get("layers", {})
    if all(folder.name.removeprefix("layer_") in measured for folder in folders):
        return
    for folder in folders:
        with suppress(ValueError):  # named among the layer's own problems
            if not len(read_history(folder)["step"]):
                yield f"{folder.name} has neither held-out scores nor a training history: run train/evaluate.py first"


def build_repository(
    run: Path,
    folder: Path,
    layers: Sequence[int],
    *,
    repo_id: str | None = None,
    author: str | None = None,
    save_dtype: str | None = None,
    with_pt: bool = False,
) -> Path:
    """Builds the repository folder anew, next to its final name first, so that it is never half built.

    Args:
        run: the run, checked.
        folder: the repository folder; replaced if it exists.
        layers: the layers to publish.
        repo_id, author: for the card.
        save_dtype: dtype of the published weights (the statistics stay float32); as in the run where left out.
        with_pt: add each layer's checkpoint in the earlier `.pt` layout.

    Returns:
        The folder.

    Raises:
        ValueError: a layer's weights do not fit `save_dtype`.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name in CODE_FILES:
        shutil.copyfile(PACKAGE / name, scratch / name)
    add_settings(run / "recipe.yaml", scratch / "recipe.yaml")
    if (run / "evaluation.json").is_file():
        link_or_copy(run / "evaluation.json", scratch / "evaluation.json")
    casts = [add_layer(run / f"layer_{layer}", scratch / f"layer_{layer}", save_dtype) for layer in layers]
    for layer in layers:
        if with_pt:
            export_checkpoint(scratch, layer, scratch / f"layer_{layer}")
    draw_figures(scratch)
    write_model_card(scratch, repo_id=repo_id, author=author, cast_to=save_dtype if any(casts) else None)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
    return folder


def add_layer(source: Path, target: Path, save_dtype: str | None) -> bool:
    """Puts one layer into the repository folder; returns whether its weights were cast for that."""
    target.mkdir()
    for name in LAYER_FILES:
        add_settings(source / name, target / name) if name == "config.yaml" else link_or_copy(
            source / name, target / name
        )
    if save_dtype is None or saved_dtype(source) == DTYPES[save_dtype]:
        return False
    for name in ("config.json", "model.safetensors"):  # links to the run's own files: never write through them
        (target / name).unlink()
    model = load_layer(source, save_dtype)
    overflowing = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if overflowing:
        raise ValueError(
            f"{', '.join(overflowing)} of {source.name} cannot be published as {save_dtype}, whose largest number is "
            f"{torch.finfo(DTYPES[save_dtype]).max:g}: choose another --save_dtype"
        )
    model.save_pretrained(target)
    for name in CODE_FILES:  # they lie once, at the root
        (target / name).unlink(missing_ok=True)
    return True


def add_settings(source: Path, target: Path) -> None:
    """Puts a file of settings into the repository folder, without where the run lies on this machine."""
    settings = read_yaml(source)
    if settings.pop("output_dir", None) is None:
        link_or_copy(source, target)
    else:
        target.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")


def saved_dtype(folder: Path) -> torch.dtype:
    """Type of a layer's weights as they are saved; `from_pretrained` of transformers 4 would make it float32."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_tensor(next(name for name in file.keys() if name not in STATISTICS)).dtype  # noqa: SIM118


def load_layer(folder: Path, save_dtype: str | None) -> BilinearTC:
    """A layer of the run as it is published."""
    model = BilinearTC.from_pretrained(folder)
    return model if save_dtype is None else model.to(DTYPES[save_dtype])


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has them: a set of many gigabytes takes no second place on the disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def list_files(folder: Path) -> dict[str, LocalFile]:
    """Every file of the repository folder by its path in the repository, with its hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def hash_file(path: Path) -> LocalFile:
    """Both hashes of a file in one reading."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            git.update(chunk)
    return LocalFile(path, size, sha256.hexdigest(), git.hexdigest())

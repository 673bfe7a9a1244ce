"""From a run to the folder that becomes a Hub repository: the check of the run, the folder, what lies in it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import REPOCARD_NAME
from safetensors import safe_open
from transformers import AutoConfig

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import STATISTICS, BilinearTC
from bilinear_tc.train.base import base_location, count_layers
from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.files import read_json, write_json, write_yaml, written_whole
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import (
    CODE_FILES,
    CONFIG,
    EVALUATION,
    HISTORY,
    LAYER_FILES,
    PACKAGE,
    RECIPE,
    SETTINGS,
    WEIGHTS,
    Run,
    save_weights,
)
from bilinear_tc.upload.figures import COMPARISON, DERIVATIVES, FIGURES, curves_name, draw_figures
from bilinear_tc.upload.model_card import write_model_card
from bilinear_tc.upload.names import published_base, renamed
from bilinear_tc.upload.pages import PAGES, page_name, write_pages
from bilinear_tc.upload.pt_checkpoint import checkpoint_name, export_checkpoint
from bilinear_tc.upload.reading import SetReading
from bilinear_tc.upload.stamp import stamped

# What config.json says alike of every layer of a set; the card says it once.
ALIKE = ("base_model", "base_revision", "form", "n_inputs", "n_hidden", "n_outputs", "bias")
AUTO_MAP = {"AutoConfig": "configuration_bilinear_tc.BilinearTCConfig", "AutoModel": "modeling_bilinear_tc.BilinearTC"}
# What the card prints of a run's own words: nothing in them may end a line, a cell, a code span or a string, or link.
PRINTED = ("base", "base_revision", "dataset", "dataset_config", "split", "eval_split", "text_column")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f`<>|\"]|\]\(")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Every path that a publication can hold, with 0 for any number and muon for any optimizer: what an earlier one left
# behind is known by it.
PATHS = (
    REPOCARD_NAME,
    *CODE_FILES,
    CONFIG,
    RECIPE,
    EVALUATION,
    f"{FIGURES}/{COMPARISON}",
    f"{FIGURES}/{DERIVATIVES}",
    f"{FIGURES}/{curves_name([0])}",
    f"{PAGES}/{page_name(0)}",
    *(f"layer_0/{name}" for name in (*LAYER_FILES, checkpoint_name(0, "muon", 0))),
)
LAYOUT = re.compile("|".join(re.escape(path).replace("0", r"\d+").replace("muon", r"\w+") for path in PATHS))


class UnfitRun(UserError):
    """All that is wrong with a run, a line each."""


def check_publishable(
    run: Run, base_model: str | None = None, *, allow_partial: bool = False, offline: bool = False
) -> None:
    """Finds a run fit to publish, or says all that is wrong with it.

    Args:
        run: the run, in a folder.
        base_model: the Hub id of a base that lay in a folder.
        allow_partial: let layers that the recipe names be missing, or fitted for fewer steps than it says.
        offline: do not wait for a network to tell how many layers the base has.

    Raises:
        UnfitRun: all that is wrong with the run, a line each.
        UserError: it holds no layers at all.
    """
    problems = [problem for layer in run.layers for problem in layer_problems(run, layer)]
    problems += [*run.export_problems(), *foreign_links(run), *unprintable_words(run), *disagreements(run)]
    problems += [*score_problems(run), *refusal(published_base, run, base_model)]
    problems += refusal(lambda: run.recipe) or recipe_problems(run, allow_partial, offline)
    if problems:  # the same may keep several things from being read
        raise UnfitRun("\n  ".join([f"{run.where} cannot be published as it is:", *dict.fromkeys(problems)]))


def foreign_links(run: Run) -> Iterator[str]:
    """Files of the run that are links to somewhere else, but for those into the cache that a Hub snapshot lies in."""
    home = run.folder.resolve()
    names = [RECIPE, EVALUATION, *(f"layer_{layer}/{name}" for layer in run.layers for name in layer_files(run, layer))]
    for name in names:
        target = (run.folder / name).resolve()
        if not any(target.is_relative_to(place) for place in (home, home.parent.parent / "blobs")):
            yield f"{name} is a link to {target}, which is not the run's: put the file itself there"


def unprintable_words(run: Run) -> Iterator[str]:
    """What the run says of its base and its text that would be more than words on the card."""
    said: list[tuple[str, dict[str, Any]]] = []
    with suppress(UserError):  # named among the recipe's own problems
        said.append((RECIPE, run.recipe_settings))
    for layer in run.layers:
        with suppress(UserError):  # named among the layer's own problems
            config = run.config(layer)
            said.append((f"layer_{layer}/{SETTINGS}", run.settings(layer)))
            said.append((f"layer_{layer}/{CONFIG}", {"base": config.base_model, "base_revision": config.base_revision}))
    with suppress(UserError):
        if run.evaluation is not None:
            said.append((EVALUATION, {"dataset": run.evaluation.dataset, "split": run.evaluation.split}))
    for name, settings in said:
        for key in PRINTED:
            if isinstance(value := settings.get(key), str) and UNPRINTABLE.search(value):
                yield f"{name}: {key} must be a plain name, without line breaks, quotes and Markdown, got {value!r}"


def refusal(read: Callable[..., object], *arguments: object) -> list[str]:
    """The sentence that reading something of a run is refused with, if it is."""
    try:
        read(*arguments)
    except UserError as error:
        return [str(error)]
    return []


def recipe_problems(run: Run, allow_partial: bool, offline: bool) -> Iterator[str]:
    """What the run lacks of its recipe, or holds beyond it."""
    recipe, layers = run.recipe, run.layers
    wanted = recipe.layer_indices() or all_layers(recipe, max(layers) + 1, offline)
    for layer in sorted(set(layers) - set(wanted)):
        yield f"layer_{layer} is not among the recipe's layers: remove it, if it is left from another fit"
    if allow_partial:
        return
    for layer in sorted(set(wanted) - set(layers)):
        yield f"layer_{layer} is missing, which the recipe names: fit it, or publish the rest with --allow_partial"
    for layer in sorted(set(wanted) & set(layers)):
        with suppress(UserError):  # named among the layer's own problems
            steps = run.fitted_steps(layer)
            if steps is not None and steps < (recipe.all_steps or 0):
                yield (
                    f"layer_{layer} was fitted for {steps} of {recipe.all_steps} steps: let the fit end, "
                    "or publish it as it is with --allow_partial"
                )


def all_layers(recipe: Recipe, at_least: int, offline: bool) -> list[int]:
    """Every layer of the recipe's base, or, if the base cannot be asked, which it says, up to the last fitted one."""
    try:
        place: dict[str, Any] = {"revision": recipe.base_revision, "local_files_only": offline}
        config = AutoConfig.from_pretrained(base_location(recipe.base), **place)
        return list(range(count_layers(config)))
    except (OSError, ValueError, AttributeError) as error:
        reason = one_line(error)
        print(f"how many layers {recipe.base} has could not be checked, so that later ones may be missing: {reason}")
        return list(range(at_least))


def layer_files(run: Run, layer: int) -> list[str]:
    """The names of a layer's files: its weights may lie in several, as its index tells."""
    folder, index = run.layer_folder(layer), f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file() or not (folder / index).is_file():
        return [*LAYER_FILES]
    try:
        shards = sorted({str(name) for name in read_json(folder / index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):  # said by what reads it next
        shards = [WEIGHTS]
    return [name for name in LAYER_FILES if name != WEIGHTS] + shards


def weight_files(run: Run, layer: int) -> list[Path]:
    names = [name for name in layer_files(run, layer) if name.endswith(Path(WEIGHTS).suffix)]
    return [run.layer_folder(layer) / name for name in names]


def layer_problems(run: Run, layer: int) -> Iterator[str]:
    """All that is wrong inside one layer's folder."""
    folder = run.layer_folder(layer)
    missing = [name for name in layer_files(run, layer) if not (folder / name).is_file()]
    yield from (f"{folder.name}/{name} is missing" for name in missing)
    if not set(missing) - {SETTINGS, HISTORY}:
        try:
            yield from (f"{folder.name}: {problem}" for problem in model_problems(run, layer))
        except Exception as error:  # a damaged file can make its reader fail in any way
            yield f"{folder.name} does not load: {one_line(error)}"
    yield from refusal(run.fitted_steps, layer)
    yield from refusal(run.history, layer) or history_problems(run, layer)


def model_problems(run: Run, layer: int) -> Iterator[str]:
    """What of a layer's weights does not fit its configuration, or is not finite."""
    config = run.config(layer)
    if config.layer_index != layer:
        yield f"{CONFIG} says that it is layer {config.layer_index}"
    if getattr(config, "auto_map", None) != AUTO_MAP:  # it names the code that a user's AutoModel runs
        yield f"{CONFIG} must name this package's two files as auto_map, got {getattr(config, 'auto_map', None)}"
    if str(layer) not in str(config.mlp_path).split("."):
        yield f"{CONFIG} must name the MLP of layer {layer} as mlp_path, got {config.mlp_path}"
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in BilinearTC(config).state_dict().items()}
    held = set()
    for path in weight_files(run, layer):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                held.add(name)
                tensor = file.get_tensor(name)
                if name not in shapes:
                    yield f"{WEIGHTS} holds {name}, which its configuration has no place for"
                elif list(tensor.shape) != shapes[name]:
                    yield f"{name} has shape {list(tensor.shape)}, but {CONFIG} asks for {shapes[name]}"
                if not tensor.isfinite().all():
                    yield f"{name} holds values that are not finite"
                elif name == "input_std" and not (tensor > 0).all():
                    yield "input_std holds values that are not above 0, so that outputs would not be finite"
    yield from (f"{WEIGHTS} lacks {name}" for name in shapes if name not in held)


def history_problems(run: Run, layer: int) -> Iterator[str]:
    bad = [name for name, values in run.history(layer).items() if not np.isfinite(values).all()]
    if bad:
        yield f"layer_{layer}/{HISTORY} holds values that are not finite, in {', '.join(bad)}"


def disagreements(run: Run) -> Iterator[str]:
    """What layers say differently of the base that they all belong to, or of the form that all of them have."""
    said: dict[str, dict[str, list[str]]] = {name: {} for name in ALIKE}
    for layer in run.layers:
        with suppress(UserError):  # named among the layer's own problems
            for name, values in said.items():
                values.setdefault(str(getattr(run.config(layer), name)), []).append(f"layer_{layer}")
    for name, values in said.items():
        if len(values) > 1:
            described = "; ".join(f"{value} in {', '.join(layers)}" for value, layers in values.items())
            yield f"{name} differs between layers: {described}"


def score_problems(run: Run) -> Iterator[str]:
    """What keeps the card and the figures from showing scores: they come from evaluation.json or the histories."""
    yield from run.evaluation_problems
    evaluation = None if run.evaluation_problems else run.evaluation
    if evaluation is None or not set(run.layers) <= set(evaluation.layers):
        for layer in run.layers:
            yield from refusal(run.final_scores, layer)


def build_repository(
    run: Run,
    folder: Path,
    *,
    base_model: str | None = None,
    card: str | None = None,
    save_dtype: str | None = None,
    with_pt: bool = False,
    read: SetReading | None = None,
    **said: Any,
) -> Path:
    """Builds the repository folder anew, whole or not at all, and returns it.

    Args:
        run: the run, checked.
        folder: the repository folder; replaced if it exists.
        base_model: the Hub id of a base that lay in a folder.
        card: somebody's own, in place of one from the measured numbers.
        save_dtype: dtype of the published weights (the statistics stay float32); by default the run's.
        with_pt: add each layer's checkpoint in the earlier `.pt` layout.
        read: add a page for each layer that was read.
        said: for the card, what `write_model_card` takes beside the folder and `cast_to`.

    Raises:
        UserError: weights do not fit `save_dtype`, readers do not have the base, or the folder cannot be written.
    """
    base = published_base(run, base_model)
    for partial in folder.parent.glob(f".{folder.name}.*.partial"):  # of a process that was killed
        shutil.rmtree(partial, ignore_errors=True)
    with written_whole(folder, replace=True) as scratch:
        for name in CODE_FILES:
            shutil.copyfile(PACKAGE / name, scratch / name)
        pointer = {"model_type": BilinearTCConfig.model_type, "auto_map": AUTO_MAP, "layers": run.layers}
        write_json(pointer, scratch / CONFIG)
        add_renamed(run.recipe_settings, base, run.folder / RECIPE, scratch / RECIPE)
        if run.evaluation is not None:
            add_renamed(run.evaluation_content, base, run.folder / EVALUATION, scratch / EVALUATION)
        repository = Run(scratch)
        casts = [add_layer(run, layer, repository.layer_folder(layer), base, save_dtype) for layer in run.layers]
        if with_pt:
            for layer in run.layers:
                export_checkpoint(repository, layer, repository.layer_folder(layer))
        draw_figures(repository, scratch / FIGURES)
        if read is not None:
            write_pages(read, scratch / PAGES, base, run.recipe, run.evaluation)
        readme = scratch / REPOCARD_NAME
        if card is None:
            write_model_card(repository, **said, cast_to=save_dtype if any(casts) else None)
            text = stamped(readme.read_text(encoding="utf-8"), "generated")
        else:
            text = stamped(card, "own")
        readme.write_text(text, encoding="utf-8", newline="\n")
    return folder


def add_layer(run: Run, layer: int, target: Path, base: str | None, save_dtype: str | None) -> bool:
    """Puts one layer into the repository folder; returns whether its weights were cast for that."""
    source = run.layer_folder(layer)
    target.mkdir()
    add_renamed(run.settings(layer), base, source / SETTINGS, target / SETTINGS)
    link_or_copy(source / HISTORY, target / HISTORY)
    before = saved_dtype(run, layer)
    dtype = DTYPES[save_dtype] if save_dtype else before
    if dtype == before and (source / WEIGHTS).is_file():
        config = {} if run.config(layer).base_model == base else read_json(source / CONFIG)
        add_renamed(config, base, source / CONFIG, target / CONFIG)
        link_or_copy(source / WEIGHTS, target / WEIGHTS)
        return False
    model = load_layer(run, layer, dtype)
    overflowing = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if overflowing:
        raise UserError(
            f"{', '.join(overflowing)} of {source.name} cannot be published as {save_dtype}, whose largest number is "
            f"{torch.finfo(dtype).max:g}: choose another --save_dtype"
        )
    model.config.base_model = base
    save_weights(model, target)  # in one file
    return dtype != before


def add_renamed(content: dict[str, Any], base: str | None, source: Path, target: Path) -> None:
    """Puts a file, which holds `content`, into the repository folder, without a path of this machine."""
    if (published := renamed(content, base)) == content:
        link_or_copy(source, target)
    else:
        (write_json if target.suffix == ".json" else write_yaml)(published, target)


def saved_dtype(run: Run, layer: int) -> torch.dtype:
    """Type of a layer's weights as they are saved; `from_pretrained` of transformers 4 would make it float32."""
    for path in weight_files(run, layer):
        with safe_open(path, framework="pt") as file:
            for name in sorted(set(file.keys()) - set(STATISTICS)):
                return file.get_tensor(name).dtype
    raise ValueError(f"layer_{layer} holds no weights")


def load_layer(run: Run, layer: int, dtype: torch.dtype | None) -> BilinearTC:
    """A layer of the run as it is published."""
    model = run.load(layer)
    if dtype is not None:
        torch.nn.Module.to(model, dtype)  # in place; transformers' own `to` is not typed
    return model


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link if the file system has them: a set of many gigabytes takes no second place on the disk."""
    source = source.resolve()  # a Hub snapshot's files are links, which would dangle elsewhere
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

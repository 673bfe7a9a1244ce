"""The run: the directory that a fit writes, whole at any moment and publishable as it stands."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
import transformers
import yaml
from safetensors import SafetensorError

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.recipe import Recipe, read_settings, write_recipe

PACKAGE = Path(__file__).resolve().parent.parent
EXPORTED = "checkpoints/exported"
CODE_FILES = ("configuration_bilinear_tc.py", "modeling_bilinear_tc.py")
# Settings that change neither the weights nor the history of a fit, but for the order of additions.
FREE_SETTINGS = {
    "output_dir",
    "eval_split",
    "eval_tokens",
    "micro_batch_size",
    "tokenizer_workers",
    "checkpoint_every",
    "resume",
    "report_to",
}


@dataclass
class FitFacts:
    """What a fit measured of itself, and what it chose where the recipe left it open.

    Attributes:
        steps, tokens: optimiser steps made, and tokens read for them and for the start.
        seconds: wall time of all layers together, over all its resumes.
        device, processes, dtype: what it ran on, and the type that it computed in.
        micro_batch_size: sequences that a process worked on at once.
        base_commit: commit of the base on the Hub; None for a folder.
        torch, transformers: their versions.
    """

    steps: int
    tokens: int
    seconds: float
    device: str
    processes: int
    dtype: str
    micro_batch_size: int
    base_commit: str | None
    torch: str = str(torch.__version__)
    transformers: str = transformers.__version__


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends without an error.

    Where `folder` exists, the files move into it one by one, each whole.
    """
    exists = folder.is_dir()
    scratch = (folder if exists else folder.parent) / f".{folder.name}.{secrets.token_hex(4)}.partial"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if exists:
            for file in sorted(scratch.iterdir()):
                os.replace(file, folder / file.name)
        else:
            os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_run(folder: Path, recipe: Recipe) -> None:
    """Makes the run's folder where there is none, and checks that it can be written and continued.

    Raises:
        ValueError: where the folder holds a run of another recipe and the recipe says to resume.
        OSError: where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"output_dir {folder} cannot be written ({error.strerror}): expected a folder with write permission; "
            "name another with --output_dir"
        ) from error
    if recipe.resume:
        check_same_recipe(folder, recipe)


def begin_run(folder: Path, recipe: Recipe) -> None:
    """Writes the recipe and the code into the run; what a killed process left half written goes, and, where the recipe
    says not to resume, what was there before.
    """
    if not recipe.resume:
        for old in [*folder.glob("checkpoints"), *folder.glob("layer_*")]:
            shutil.rmtree(old)
        (folder / "evaluation.json").unlink(missing_ok=True)
    remove_partial(folder)
    with written_whole(folder) as scratch:
        write_recipe(recipe, scratch / "recipe.yaml")
        for name in CODE_FILES:
            shutil.copyfile(PACKAGE / name, scratch / name)


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises ValueError, naming the settings that differ, where a run was begun with a recipe of other results."""
    file = folder / "recipe.yaml"
    if not file.is_file() or not any([*folder.glob("layer_*"), *folder.glob("checkpoints/step_*")]):
        return
    before, now = read_settings(file), recipe.to_dict()
    differing = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in now.items()
        if name not in FREE_SETTINGS and before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a run of another recipe ({'; '.join(differing)}): give the same settings to resume it, "
            "another --output_dir, or --no_resume to start it anew"
        )


def remove_partial(folder: Path) -> None:
    """Removes what a killed process was writing in a run."""
    for place in [folder, folder / "checkpoints", *folder.glob("layer_*")]:
        for partial in place.glob(".*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def write_layers(
    folder: Path,
    transcoders: Sequence[BilinearTC],
    histories: Sequence[dict[str, list]],
    recipe: Recipe,
    facts: FitFacts,
) -> None:
    """Writes every layer's folder, and notes when all are written; an evaluation of what they held goes.

    Args:
        folder: the run.
        transcoders: the layers' models, with their statistics set.
        histories: of each, the columns of history.parquet, a value an optimiser step.
        recipe: the fit's settings.
        facts: what the fit measured of itself.

    Raises:
        OSError: where one cannot be written, as on a full disk; each file in the run is whole.
    """
    try:
        for void in (folder / "evaluation.json", folder / EXPORTED):
            void.unlink(missing_ok=True)
        for transcoder, history in zip(transcoders, histories, strict=True):
            write_layer(folder, transcoder, history, recipe, facts)
        (folder / EXPORTED).write_text(str(facts.steps), encoding="utf-8")
    except (OSError, SafetensorError, pyarrow.ArrowException) as error:
        raise OSError(
            f"the layers could not all be written to {folder} ({' '.join(str(error).split())}): those that are there "
            "are whole, and so are the checkpoints; make room on the disk and run the same command to go on"
        ) from error


def exported_step(folder: Path) -> int | None:
    """The step that all layers in a run stand at, or None where some may stand at another."""
    note = folder / EXPORTED
    return int(note.read_text(encoding="utf-8")) if note.is_file() else None


def write_layer(
    folder: Path, transcoder: BilinearTC, history: dict[str, list], recipe: Recipe, facts: FitFacts
) -> None:
    """Writes one layer's folder: the model, its settings for a reader, and its history."""
    config = transcoder.config
    settings = {name: value for name, value in recipe.to_dict().items() if name not in FREE_SETTINGS}
    for name in ("base", "base_revision", "layers"):
        settings.pop(name)
    described = {
        "layer": config.layer_index,
        "base_model": config.base_model,
        "base_revision": config.base_revision,
        "mlp_path": config.mlp_path,
        "n_inputs": config.n_inputs,
        "n_hidden": config.n_hidden,
        "n_outputs": config.n_outputs,
        **settings,
        "fit": asdict(facts),
    }
    table = pyarrow.table(
        {
            name: pyarrow.array(values, pyarrow.int64() if name in ("step", "tokens") else pyarrow.float64())
            for name, values in history.items()
        }
    )
    with written_whole(folder / f"layer_{config.layer_index}") as scratch:
        transcoder.save_pretrained(scratch)
        for name in CODE_FILES:  # they lie once, at the run's root
            (scratch / name).unlink(missing_ok=True)
        settings_file = scratch / "config.yaml"
        settings_file.write_text(yaml.safe_dump(described, sort_keys=False, allow_unicode=True), encoding="utf-8")
        pyarrow.parquet.write_table(table, scratch / "history.parquet")

"""The run: the directory that a fit writes, whole at any moment and publishable as it stands."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
import transformers
import yaml

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.recipe import Recipe, read_settings, write_recipe

PACKAGE = Path(__file__).resolve().parent.parent
CODE_FILES = ("configuration_bilinear_tc.py", "modeling_bilinear_tc.py")
# Settings that change neither the weights nor the history of a fit.
FREE_SETTINGS = {
    "output_dir",
    "eval_split",
    "eval_tokens",
    "tokenizer_workers",
    "checkpoint_every",
    "resume",
    "report_to",
}


@dataclass
class FitFacts:
    """What a fit measured of itself; `seconds` is the wall time of all layers together, over all its resumes."""

    steps: int
    tokens: int
    seconds: float
    device: str
    processes: int
    dtype: str
    torch: str = str(torch.__version__)
    transformers: str = transformers.__version__


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into `folder` one by one, each whole, when the block ends without an error."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
        for file in sorted(scratch.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def differing_settings(folder: Path, recipe: Recipe) -> list[str]:
    """How the recipe differs from the one that a run was begun with, a phrase a setting; empty for a new run."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        return []
    before, now = read_settings(file), recipe.to_dict()
    return [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in now.items()
        if name not in FREE_SETTINGS and before.get(name) != value
    ]


def prepare_run(folder: Path, recipe: Recipe) -> None:
    """Makes the run's folder, checks that it can be written and continued, and writes the recipe and the code.

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
    differing = differing_settings(folder, recipe)
    if recipe.resume and differing:
        raise ValueError(
            f"{folder} holds a run of another recipe ({'; '.join(differing)}): give the same settings to resume it, "
            "another --output_dir, or --no_resume to start it anew"
        )
    if not recipe.resume:
        for old in [folder / "checkpoints", *folder.glob("layer_*")]:
            shutil.rmtree(old, ignore_errors=True)
        (folder / "evaluation.json").unlink(missing_ok=True)
    with written_whole(folder) as scratch:
        write_recipe(recipe, scratch / "recipe.yaml")
        for name in CODE_FILES:
            shutil.copyfile(PACKAGE / name, scratch / name)


def write_layer(
    folder: Path, transcoder: BilinearTC, history: dict[str, list], recipe: Recipe, facts: FitFacts
) -> None:
    """Writes one layer's folder: the model, its settings for a reader, and its history.

    Args:
        folder: the run.
        transcoder: the layer's model, with its statistics set.
        history: the columns of history.parquet, a value an optimiser step.
        recipe: the fit's settings.
        facts: what the fit measured of itself.
    """
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
        (scratch / "config.yaml").write_text(yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
        pyarrow.parquet.write_table(table, scratch / "history.parquet")

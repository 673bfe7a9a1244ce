"""Checkpoints in the earlier `.pt` layout ↔ runs.

    python upload/legacy.py import FOLDER --output_dir RUN --base EleutherAI/pythia-410m \\
        --dataset monology/pile-uncopyrighted
    python upload/legacy.py export RUN --output_dir FOLDER

FOLDER holds `layer_{L}/transcoder_weights_l{L}_bilinear_muon_{steps}b.pt`, or the files themselves, with the keys that
`pt_checkpoint.py` lists. Importing what was exported gives the run back, recipe and evaluation included. Checkpoints of
the earlier sets were fitted on each batch's own z-scores and hold no statistics: those are measured from the base. Nor
do they count tokens: a batch is taken for --batch_size × --seq_len of them, as those fits counted padding too.
"""

from __future__ import annotations

import re
import shutil
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import HfArgumentParser

from bilinear_tc.modeling_bilinear_tc import STATISTICS, BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError, command_line
from bilinear_tc.train.files import written_whole
from bilinear_tc.train.moments import Moments, check_finite
from bilinear_tc.train.recipe import Recipe, option
from bilinear_tc.train.run import EVALUATION, RECIPE, Run
from bilinear_tc.train.text.batches import TokenBatch, TokenBatches
from bilinear_tc.train.text.documents import Documents
from bilinear_tc.upload.pt_checkpoint import CONFIG_FIELDS, Checkpoint, export_checkpoint, read_checkpoint

SEQUENCES_AT_ONCE = 8


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every checkpoint in a folder or in its folders `layer_*`, by layer.

    UserError if there is none, one is not readable, or two are of one layer.
    """
    paths = sorted([*folder.glob("*.pt"), *folder.glob("layer_*/*.pt")])
    if not paths:
        raise UserError(f"{folder} holds no checkpoints: expected layer_0/*.pt and so on")
    checkpoints: dict[int, Checkpoint] = {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        if other := checkpoints.get(checkpoint.layer):
            raise UserError(f"{other.path} and {path} are both of layer {checkpoint.layer}: leave one in the folder")
        checkpoints[checkpoint.layer] = checkpoint
    return [checkpoints[layer] for layer in sorted(checkpoints)]


@dataclass
class ImportSettings:
    """What the checkpoints themselves do not tell; not asked of an export, which tells all of it."""

    base: str | None = option(None, "The model that they were fitted for: a Hub id or a folder.")
    base_revision: str | None = option(None, "Its branch, tag or commit.")
    dataset: str | None = option(None, "Text to measure statistics on, the text that they were fitted on.")
    dataset_config: str | None = option(None, "Its configuration name.")
    split: str = option("train", "Its split.")
    text_column: str = option("text", "The column that holds a document's text.")
    calibration_tokens: int = option(262144, "How many tokens to measure on, padding included.")
    seq_len: int = option(128, "Tokens a sequence, in the fit and for measuring.")
    batch_size: int = option(512, "Sequences a batch, in the fit.")

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


def import_checkpoints(folder: Path, run: Path, settings: ImportSettings) -> Path:
    """Turns a folder of `.pt` checkpoints into a run, whose folder is returned.

    The statistics that checkpoints lack are measured from the base over the first `seq_len` tokens of each document, as
    such checkpoints were fitted: shorter documents are padded with the end of text, and the padding counts like text.
    UserError if a checkpoint is refused, the run is there already or cannot be written, base and text are missing or do
    not fit, or the base gives a NaN or an infinity.

    Args:
        folder: holds the checkpoints.
        run: the run's folder, which is not there yet, or empty. It appears whole or not at all.
        settings: base and text, needed if a checkpoint has no statistics.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} is there already: name another --output_dir, or remove it")
    checkpoints = find_checkpoints(folder)
    without = [checkpoint for checkpoint in checkpoints if checkpoint.statistics is None]
    measured = measure_statistics(without, settings) if without else 0
    recipe = imported_recipe(checkpoints, settings)
    with written_whole(run, replace=True) as scratch:
        imported = Run(scratch)
        imported.write_root(recipe)
        for checkpoint in tqdm(checkpoints, desc="writing layers", unit="layer"):
            columns = {**checkpoint.history, "tokens": tokens_column(checkpoint, settings)}
            described = checkpoint.settings or layer_settings(checkpoint, settings, measured)
            imported.write_layer(transcoder_of(checkpoint), columns, described)
        if not without:
            copy_root_files(folder, scratch)
    return run


def measure_statistics(checkpoints: Sequence[Checkpoint], settings: ImportSettings) -> int:
    """Fills in the z-scores' statistics of these layers, and which MLPs they stand in for, in one pass over the text.

    Returns the number of tokens measured on, padding included.
    """
    if settings.base is None or settings.dataset is None:
        raise UserError(
            f"{checkpoints[0].path} holds no statistics, which are measured from the base: name it and the text with "
            "--base and --dataset"
        )
    documents = Documents(
        settings.dataset, config=settings.dataset_config, split=settings.split, text_column=settings.text_column
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = [checkpoint.layer for checkpoint in checkpoints]
    base = Base.load(settings.base, revision=settings.base_revision, layers=layers, device=device)
    for checkpoint in checkpoints:
        config = checkpoint.config
        if (config.n_inputs, config.n_outputs) != (base.n_inputs, base.n_outputs):
            raise UserError(
                f"{checkpoint.path} maps width {config.n_inputs} to {config.n_outputs}, the MLPs of {settings.base} "
                f"{base.n_inputs} to {base.n_outputs}: name the base that it was fitted for with --base"
            )
        config.base_model, config.base_revision = settings.base, settings.base_revision
        config.mlp_path = base.mlp_path(checkpoint.layer)
    base.stop_after_last_layer()
    inputs, outputs = activation_moments(base, documents, settings)
    check_finite(inputs, outputs, base.layers, "the calibration text")
    for index, checkpoint in enumerate(checkpoints):
        vectors = (moments[index] for moments in (inputs.mean, inputs.std, outputs.mean, outputs.std))
        checkpoint.statistics = {name: v.float().cpu() for name, v in zip(STATISTICS, vectors, strict=True)}
    return int(inputs.count.max())


def activation_moments(base: Base, documents: Documents, settings: ImportSettings) -> tuple[Moments, Moments]:
    """Moments [layers, features] of the MLPs' inputs and outputs over `calibration_tokens`, or all of a shorter text.

    The fits took every position's row, the padding's too, from a base that was told which positions are padding.
    """
    device, seq_len, batch_size = base.device, settings.seq_len, SEQUENCES_AT_ONCE
    inputs, outputs = (Moments.zeros(len(base.layers), n, device=device) for n in (base.n_inputs, base.n_outputs))
    activations = Activations(base, batch_size * seq_len, device=device, dtype=torch.float32)
    one_pass: dict[str, Any] = {"pack": False, "workers": 0, "epochs": 1}
    batches = TokenBatches(documents, base.tokenizer, seq_len=seq_len, batch_size=batch_size, **one_pass)
    with batches, tqdm(total=settings.calibration_tokens, desc="measuring statistics", unit="token") as bar:
        for batch in batches:
            with masked(base.model.base_model, batch.to(device).mask):
                activations.fill(TokenBatch(batch.input_ids), batch_size)
            x, y = activations.moments()
            inputs, outputs = inputs.merge(x), outputs.merge(y)
            bar.update(batch.input_ids.numel())
            if bar.n >= settings.calibration_tokens:
                break
    return inputs, outputs


def masked(decoder: torch.nn.Module, mask: torch.Tensor | None) -> RemovableHandle:
    """Lets no position of a decoder attend to padding, while the context lasts."""
    return decoder.register_forward_pre_hook(
        lambda _, inputs, named: (inputs, {**named, "attention_mask": mask}), with_kwargs=True
    )


def transcoder_of(checkpoint: Checkpoint) -> BilinearTC:
    model = BilinearTC(checkpoint.config)
    torch.nn.Module.to(model, next(iter(checkpoint.weights.values())).dtype)
    model.load_state_dict({**checkpoint.weights, **(checkpoint.statistics or {})})
    return model


def tokens_column(checkpoint: Checkpoint, settings: ImportSettings) -> list[int]:
    """Tokens read up to and including each step."""
    rows = settings.batch_size * settings.seq_len
    return checkpoint.history.get("tokens", [step * rows for step in checkpoint.history["step"]])


def known_settings(checkpoint: Checkpoint, settings: ImportSettings) -> dict[str, Any]:
    """What is known of the fit of a checkpoint that brings no settings: the training code that wrote that layout
    starts from noise, cuts documents to one sequence each and z-scores by each batch's own statistics."""
    match = re.search(r"_(muon|normuon|adamw)_\d+b\.pt$", checkpoint.path.name)
    not_told = ("base", "base_revision", "calibration_tokens")
    known = {
        **{name: value for name, value in vars(settings).items() if name not in not_told},
        "max_steps": checkpoint.steps,
        "init": "random",
        "optimizer": match[1] if match else None,
        "normalization": "batch",
        "pack": False,
    }
    return {name: value for name, value in known.items() if value is not None}


def layer_settings(checkpoint: Checkpoint, settings: ImportSettings, measured: int) -> dict[str, Any]:
    """config.yaml of a layer whose checkpoint brings no settings."""
    tokens = tokens_column(checkpoint, settings)
    return {
        "layer": checkpoint.layer,
        **{name: getattr(checkpoint.config, name) for name in CONFIG_FIELDS if name != "layer_index"},
        **known_settings(checkpoint, settings),
        "imported": {"checkpoint": checkpoint.path.name, "statistics_tokens": measured},
        "fit": {"steps": checkpoint.steps, "tokens": tokens[-1] if tokens else 0},
    }


def imported_recipe(checkpoints: Sequence[Checkpoint], settings: ImportSettings) -> dict[str, Any]:
    """recipe.yaml of an import: the settings that are known, the others left out."""
    first = checkpoints[0]
    known = first.settings or known_settings(first, settings)
    recipe = {
        **{field.name: known[field.name] for field in fields(Recipe) if field.name in known},
        "mlp_path": None,  # the settings hold the layer's own
        "base": first.config.base_model,
        "base_revision": first.config.base_revision,
        "layers": ",".join(str(checkpoint.layer) for checkpoint in checkpoints),
        "form": first.config.form,
        "hidden_multiplier": first.config.n_hidden / first.config.n_inputs,
        "bias": first.config.bias,
    }
    Recipe(**recipe)
    return recipe


def copy_root_files(source: Path, target: Path) -> None:
    """Copies what a run says of all its layers together, if the source says it."""
    with written_whole(target) as scratch:
        for name in (RECIPE, EVALUATION):
            if (source / name).is_file():
                shutil.copyfile(source / name, scratch / name)


def export_run(run: Run, folder: Path | None) -> list[Path]:
    """Writes every layer of a run in the `.pt` layout, into `folder` or, without one, beside the run's own files."""
    target = Run(folder or run.folder)
    layers = tqdm(run.layers, desc="exporting", unit="layer")
    written = [export_checkpoint(run, layer, target.layer_folder(layer)) for layer in layers]
    if folder is not None:
        copy_root_files(run.folder, folder)
    return written


def main() -> None:
    parser = ArgumentParser(description="Turns checkpoints in the earlier .pt layout into a run, and back.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    options: dict[str, Any] = {"allow_abbrev": False, "dataclass_types": ImportSettings}
    importing = commands.add_parser("import", help="checkpoints → run", **options)
    importing.add_argument("folder", type=Path, metavar="FOLDER", help="holds layer_0/*.pt and so on")
    importing.add_argument(
        "--output_dir", type=Path, required=True, default=SUPPRESS, metavar="RUN", help="the run's folder"
    )
    exporting = commands.add_parser("export", help="run → checkpoints", allow_abbrev=False)
    exporting.add_argument("run", type=Path, metavar="RUN")
    exporting.add_argument(
        "--output_dir", type=Path, metavar="FOLDER", help="their folder (default: beside the run's own files)"
    )
    arguments = vars(parser.parse_args())
    target = arguments.pop("output_dir")
    if arguments.pop("command") == "import":
        print(import_checkpoints(arguments.pop("folder"), target, ImportSettings(**arguments)))
    else:
        print(*export_run(Run.in_folder(arguments["run"]), target), sep="\n")


if __name__ == "__main__":
    command_line(main)

"""Fits the transcoders of all layers of a base model, from a recipe to a run.

    accelerate launch train/fit.py --recipe quickstart

Every field of the recipe is a flag (`--help` lists them); a flag outranks the recipe file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor
from tqdm import tqdm

from bilinear_tc.train.base import Base
from bilinear_tc.train.checkpoint import Checkpoints, newest_step
from bilinear_tc.train.command import command_line, start_accelerator
from bilinear_tc.train.evaluate import evaluate_fit, fit_table, list_layers
from bilinear_tc.train.fitting.fitter import Fitter, compute_dtype
from bilinear_tc.train.fitting.progress import Progress
from bilinear_tc.train.processes import StopRequest, on_main
from bilinear_tc.train.recipe import Recipe, parse_recipe, read_settings
from bilinear_tc.train.run import FitFacts, begin_run, check_run, exported_step, write_layers
from bilinear_tc.train.text.documents import TextError
from bilinear_tc.train.text.source import calibration_batches, check_text, open_batches
from bilinear_tc.train.trackers import check_tracker, tracked

CHECKED_ROWS = 1024  # of the last batch, on which the transcoders are tried before they are saved


def fit(recipe: Recipe) -> None:
    """Runs a recipe to its end, from wherever its run stands."""
    run = Path(recipe.output_dir)
    check_tracker(recipe.report_to)
    accelerator = start_accelerator(
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_config=ProjectConfiguration(str(run), logging_dir=str(run / "checkpoints" / "logs")),
    )
    on_main(accelerator, lambda: check_run(run, recipe))
    if not on_main(accelerator, lambda: is_finished(run, recipe)):
        on_main(accelerator, lambda: check_text(recipe))
        base = load_base(recipe, accelerator)
        on_main(accelerator, lambda: begin_run(run, recipe))
        fit_layers(run, recipe, base, accelerator)
        if recipe.eval_split is not None:
            evaluate_fit(run, recipe, base, accelerator)
    if accelerator.is_main_process:
        print_result(run, recipe)
    accelerator.state.destroy_process_group()


def is_finished(run: Path, recipe: Recipe) -> bool:
    """Whether the run holds everything that its recipe asks for."""
    fitted = recipe.resume and newest_step(run) == exported_step(run) == recipe.max_steps
    if not fitted or recipe.eval_split is None:
        return fitted
    used = read_settings(run / "recipe.yaml")
    measured = (used["eval_split"], used["eval_tokens"]) == (recipe.eval_split, recipe.eval_tokens)
    return measured and (run / "evaluation.json").is_file()


def load_base(recipe: Recipe, accelerator: Accelerator) -> Base:
    """The recipe's base, as far as the last layer asked for."""
    device = accelerator.device
    base = Base.load(
        recipe.base,
        revision=recipe.base_revision,
        layers=recipe.layer_indices(),
        seq_len=recipe.seq_len,
        device=device,
        dtype=compute_dtype(recipe, device),
    )
    recipe.n_hidden(base.n_inputs)
    base.stop_after_last_layer()
    return base


def fit_layers(run: Path, recipe: Recipe, base: Base, accelerator: Accelerator) -> None:
    """Fits from the newest checkpoint, or from the start, to the last step, and leaves every layer in the run.

    Raises:
        TextError: where the text fails; all steps before are saved.
        FloatingPointError: on a NaN, or where a transcoder diverges; the run holds the layers as they were before it,
            or as they were last saved, and the checkpoints stay.
        InterruptedError: where the process was asked to stop; all steps are saved.
        OSError: where the disk is full; the checkpoints written before stay.
    """
    with open_batches(recipe, base.tokenizer, accelerator) as batches, tracked(accelerator, recipe.to_dict()):
        fitter = Fitter(recipe, base, accelerator)
        progress = Progress(recipe.max_steps, len(base.layers))
        checkpoints = Checkpoints(run, accelerator, {"fitter": fitter, "progress": progress, "text": batches})

        def export() -> None:
            on_main(accelerator, lambda: export_layers(run, recipe, fitter, progress))

        def save() -> None:
            check_sound(fitter, progress.steps)
            checkpoints.save(progress.steps)
            export()

        if checkpoints.load_newest():
            accelerator.print(f"resuming {run} after step {progress.steps} of {recipe.max_steps}")
            if on_main(accelerator, lambda: exported_step(run)) != progress.steps:
                export()  # killed between the two
        else:
            if recipe.init == "mlp":
                progress.tokens_read = fitter.start(calibration_batches(recipe, batches))
            save()

        with StopRequest(accelerator) as stop, progress_bar(recipe, progress, base, accelerator) as bar:
            while progress.steps < recipe.max_steps:
                try:
                    mse, fvu, rows = fitter.step(next(batches), progress.steps)
                except TextError as error:
                    save()
                    raise TextError(f"{error} (all {progress.steps} steps before it are saved in {run})") from error
                except FloatingPointError:
                    check_sound(fitter, progress.steps)
                    export()
                    raise
                check_converging(mse, base.layers, progress.steps + 1)
                progress.add(mse, fvu, rows)
                report(fvu, base.layers, progress.steps, bar, accelerator)
                stopping = bool(stop)
                due = recipe.checkpoint_every and progress.steps % recipe.checkpoint_every == 0
                if due or stopping or progress.steps == recipe.max_steps:
                    save()
                if stopping:
                    raise InterruptedError(
                        f"stopped after step {progress.steps} of {recipe.max_steps}, which is saved in {run}: run the "
                        "same command to go on"
                    )


def export_layers(run: Path, recipe: Recipe, fitter: Fitter, progress: Progress) -> None:
    """Writes every layer as it stands into the run."""
    accelerator = fitter.accelerator
    fitter.stack.set_statistics()
    device = accelerator.device
    facts = FitFacts(
        steps=progress.steps,
        tokens=progress.tokens_read,
        seconds=round(progress.wall_time(), 1),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        processes=accelerator.num_processes,
        dtype=str(fitter.stack.dtype).removeprefix("torch."),
        micro_batch_size=fitter.micro_batch_size,
        base_commit=fitter.base.commit,
    )
    histories = [progress.history(index) for index in range(len(fitter.stack.transcoders))]
    write_layers(run, fitter.stack.transcoders, histories, recipe, facts)


@torch.no_grad()
def check_sound(fitter: Fitter, steps: int) -> None:
    """Raises FloatingPointError where a transcoder as it stands, its last update included, is no good to save.

    What it would export is tried on a few rows of the last batch: parameters that are NaN or infinite show in its
    outputs, and so do ones that are finite but too large to compute with.
    """
    fitter.stack.set_statistics()
    sizes = []
    for x, transcoder in zip(fitter.activations.x, fitter.stack.transcoders, strict=True):
        x = x[:CHECKED_ROWS].float()
        x = x[x.isfinite().all(-1)]  # the base's own NaNs are not the transcoder's fault
        sizes.append(transcoder(x).square().sum())
    check_converging(fitter.accelerator.reduce(torch.stack(sizes)), fitter.base.layers, steps)


def check_converging(errors: Tensor, layers: Sequence[int], steps: int) -> None:
    """Raises FloatingPointError where a layer's error [layers] is no number any more by some step."""
    diverged = [layer for layer, value in zip(layers, errors.isfinite().tolist(), strict=True) if not value]
    if diverged:
        raise FloatingPointError(
            f"the transcoder of layer {diverged[0]} has diverged by step {steps}: it computes a NaN or an infinity; "
            "start anew with a lower --lr"
        )


def progress_bar(recipe: Recipe, progress: Progress, base: Base, accelerator: Accelerator) -> tqdm:
    return tqdm(
        initial=progress.steps,
        total=recipe.max_steps,
        desc=f"fitting {len(base.layers)} layers",
        unit="step",
        disable=not accelerator.is_main_process,
    )


def report(fvu: Tensor, layers: Sequence[int], steps: int, bar: tqdm, accelerator: Accelerator) -> None:
    """Shows a step's FVU [layers] in the progress bar and tells the trackers."""
    bar.update()
    bar.set_postfix(mean_fvu=f"{fvu.mean():.4f}", worst=f"{fvu.max():.4f}", refresh=False)
    by_layer = {f"fvu/layer_{layer}": value for layer, value in zip(layers, fvu.tolist(), strict=True)}
    accelerator.log({"mean_fvu": fvu.mean().item(), **by_layer}, step=steps)


def print_result(run: Path, recipe: Recipe) -> None:
    """Prints what came out, and what to do with it."""
    layers = list_layers(str(run), None)
    if recipe.eval_split is None:
        print(f"fitted {len(layers)} layers; no eval_split, so nothing was measured on held-out text")
    else:
        print(fit_table(json.loads((run / "evaluation.json").read_text(encoding="utf-8"))))
    print(
        f"\nTry next:\n  from transformers import AutoModel\n"
        f'  tc = AutoModel.from_pretrained("{run}", subfolder="layer_{layers[0]}", trust_remote_code=True)'
    )


def main() -> None:
    fit(parse_recipe())


if __name__ == "__main__":
    command_line(main)

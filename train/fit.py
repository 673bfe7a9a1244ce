"""Fits the transcoders of all layers of a base model, from a recipe to a run.

    accelerate launch train/fit.py --recipe quickstart

Every field of the recipe is a flag (`--help` lists them); a flag outranks the recipe file.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor
from tqdm import tqdm

from bilinear_tc.train.base import Base
from bilinear_tc.train.checkpoint import Checkpoints, newest_step
from bilinear_tc.train.errors import Interrupted, NotFiniteError, UserError, command_line
from bilinear_tc.train.files import History, locked
from bilinear_tc.train.finish import (
    begin_finish,
    check_same_source,
    check_source,
    finish_table,
    joint_history,
    layer_wise,
    measure_finish,
    settled,
)
from bilinear_tc.train.fitting.fitter import Fitter, Progress, choose_shard
from bilinear_tc.train.fitting.joint import JointFitter
from bilinear_tc.train.layer_settings import joint_settings, layer_settings
from bilinear_tc.train.measuring.held_out import measure_held_out
from bilinear_tc.train.measuring.tables import fit_table
from bilinear_tc.train.overwriting import READY, take_over, workplace
from bilinear_tc.train.plan import Device, Plan
from bilinear_tc.train.processes import (
    StopRequest,
    is_main,
    on_main,
    process_count,
    start_accelerator,
    sum_over_processes,
)
from bilinear_tc.train.recipe import Recipe, parse_command
from bilinear_tc.train.recording import Recording
from bilinear_tc.train.run import CHECKPOINTS, LOGS, Run
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.start import is_compared, keep_the_better, start_of
from bilinear_tc.train.text.documents import TextError
from bilinear_tc.train.text.source import calibration_batches, check_text, open_batches, settled_bos

CHECKED_ROWS = 1024  # of the last batch, on which the transcoders are tried before they are saved


def fit(recipe: Recipe) -> None:
    """Runs a recipe to its end, from wherever its run stands, and prints what came out."""
    check_tracker(recipe.report_to)
    accelerator = start_accelerator(
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_config=ProjectConfiguration(recipe.output_dir),
    )
    run = fit_run(recipe, accelerator)
    if is_main():
        print_result(run, recipe)
    accelerator.state.destroy_process_group()


def fit_run(recipe: Recipe, accelerator: Accelerator) -> Run:
    """The run of a recipe, brought to its end."""
    run = Run(recipe.output_dir or "")
    on_main(run.check_writable)
    with ExitStack() as held:
        on_main(lambda: held.enter_context(locked(run.folder)))
        on_main(lambda: take_over(run.folder))
        place = Run(on_main(lambda: workplace(run, recipe).folder))
        recipe = on_main(lambda: place.continued(recipe))
        on_main(lambda: check_same_source(place, recipe))
        if not on_main(lambda: is_finished(place, recipe)):
            on_main(lambda: check_text(recipe))
            source = None
            if recipe.finish == "joint":
                source = Run(recipe.from_run) if recipe.from_run else fit_run(layer_wise(place, recipe), accelerator)
                gc.collect()  # the parts that the first stage compiled refer to themselves, and hold its base
                on_main(lambda: check_source(source, recipe))
                recipe = on_main(lambda: settled(recipe, source))
            base = Base.of_recipe(recipe, accelerator.device)
            recipe = dataclasses.replace(recipe, bos=settled_bos(recipe, base.tokenizer))  # as the run tells
            recipe.n_hidden(base.n_inputs)
            if source is None:
                base.stop_after_last_layer()
            shard = choose_shard(recipe, base, accelerator.device)
            if recipe.activations is not None:
                (recording := Recording(recipe, base)).check()
                base.replay = recording.replay
            on_main(lambda: place.begin(recipe))
            if source is not None:
                on_main(lambda: begin_finish(place, source, base.layers))
            accelerator.project_configuration.logging_dir = str(place.folder / CHECKPOINTS / LOGS)
            fit_layers(place, recipe, base, accelerator, shard)
            if recipe.eval_split is not None:
                (keep_the_better if source is None else measure_finish)(place, recipe, base, shard)
                transcoders = [place.load(layer).float().to(accelerator.device) for layer in shard.of(base).layers]
                evaluation = measure_held_out(transcoders, recipe, base, batch_size=recipe.batch_size, shard=shard)
                on_main(lambda: place.write_evaluation(evaluation))
        if place.folder != run.folder:
            on_main(lambda: place.folder.rename(run.folder / READY))
            on_main(lambda: take_over(run.folder))
        run.forget()
    return run


def check_tracker(name: str) -> None:
    """Raises UserError if a tracker's package is missing, which Accelerate passes over in silence."""
    if name != "none" and name not in [str(tracker) for tracker in get_available_trackers()]:
        raise UserError(
            f"report_to is {name}, but the package {name} is not installed: install it (pip install {name}), or leave "
            "--report_to out"
        )


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Whether the run holds everything that its recipe asks for."""
    newest = newest_step(run.folder)
    if not recipe.resume or not run.is_finished or (newest is not None and run.exported_step != newest):
        return False
    if newest is None and (problems := run.export_problems()):
        raise UserError(
            f"{run.folder} holds a finished set that is damaged, and no checkpoint to mend it: {problems[0]}"
        )
    if recipe.eval_split is None:
        return True
    asked, used = ((r.eval_split, r.eval_tokens) for r in (recipe, run.recipe))
    done = asked == used and run.evaluation is not None and is_compared(run)
    if newest is None and not done:  # a fit from its start would go over it
        raise UserError(
            f"{run.folder} holds a finished set that is not measured on this held-out text, and no checkpoint to go on "
            f"from: measure it with train/evaluate.py --transcoders {run.folder}"
        )
    return done


def fit_layers(run: Run, recipe: Recipe, base: Base, accelerator: Accelerator, shard: Shard) -> None:
    """Fits from the newest checkpoint, or from the start, to the last step, and leaves every layer in the run.

    Every step made is saved if the text fails (TextError) or the process is asked to stop (Interrupted). On a NaN, or
    if a transcoder diverges (NotFiniteError), the run holds the layers as they were before it or as they were last
    saved. What was saved before stays if the disk is full (StorageError).
    """
    device = accelerator.device
    text = open_batches(recipe, base.tokenizer, device, base.vocabulary)
    with text as batches, tracked(accelerator, recipe):
        fitter = make_fitter(run, recipe, base, device, shard)
        recipe, solves = fitter.recipe, recipe.init == "mlp" and recipe.finish == "none"
        progress = Progress(recipe.max_steps, len(base.layers))
        checkpoints = Checkpoints(run, {"fitter": fitter, "progress": progress, "text": batches}, fitter)

        def export(to: Run = run) -> None:
            export_layers(to, recipe, fitter, progress, batches.skipped)

        def save() -> None:
            check_sound(fitter, progress.steps)
            checkpoints.save(progress.steps)
            export()

        if checkpoints.load_newest():
            accelerator.print(f"resuming {run.folder} after step {progress.steps} of {recipe.max_steps}")
            if on_main(lambda: run.exported_step) != progress.steps:
                export()  # killed between the two
        else:
            if solves:
                progress.tokens_read = fitter.start(calibration_batches(recipe, batches))
            save()
        if solves and progress.steps == 0 < recipe.max_steps:
            export(start_of(run))

        what = "fitting" if recipe.finish == "none" else "joint finish of"
        title, total = f"{what} {len(base.layers)} layers", recipe.max_steps
        bar = tqdm(desc=title, initial=progress.steps, total=total, unit="step", disable=not is_main())
        with StopRequest(device) as stop, bar:
            while progress.steps < recipe.max_steps:
                try:
                    mse, fvu, rows = fitter.step(next(batches), progress.steps)
                except TextError as error:
                    save()
                    raise TextError(
                        f"{error} (all {progress.steps} steps before it are saved in {run.folder})"
                    ) from error
                except NotFiniteError:
                    check_sound(fitter, progress.steps)
                    export()
                    raise
                check_converging(mse, base.layers, progress.steps + 1)
                progress.add(mse, fvu, rows)
                report(fvu, fitter.shown, base.layers, progress.steps, batches.skipped, bar, accelerator)
                stopping = bool(stop)
                due = recipe.checkpoint_every and progress.steps % recipe.checkpoint_every == 0
                if due or stopping or progress.steps == recipe.max_steps:
                    save()
                if stopping:
                    raise Interrupted(
                        f"stopped after step {progress.steps} of {recipe.max_steps}, which is saved in {run.folder}: "
                        f"run the same command{'' if recipe.resume else ', without --no_resume,'} to resume"
                    )


def make_fitter(run: Run, recipe: Recipe, base: Base, device: torch.device, shard: Shard) -> Fitter:
    """What makes the steps of a run's stage."""
    if recipe.finish == "none":
        return Fitter(recipe, base, device, shard=shard)
    return JointFitter(recipe, [start_of(run).load(layer) for layer in base.layers], base, device)


@contextmanager
def tracked(accelerator: Accelerator, recipe: Recipe) -> Iterator[None]:
    """While the context lasts, `accelerator.log` reaches the trackers; what they hold back is written at its end."""
    accelerator.init_trackers("bilinear-tc", config=recipe.to_dict())
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def export_layers(run: Run, recipe: Recipe, fitter: Fitter, progress: Progress, skipped_rows: int) -> None:
    """Writes every layer as it stands into the run; each process writes some."""
    fitter.stack.set_statistics()
    on_gpu = fitter.device.type == "cuda"
    facts = {
        "steps": progress.steps,
        "tokens": progress.tokens_read,  # for the steps and for the start
        "skipped_rows": skipped_rows,
        "seconds": round(progress.wall_time(), 1),  # of all layers together, over all resumes
        "device": torch.cuda.get_device_name(fitter.device) if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "processes": process_count(),
        "dtype": str(fitter.stack.dtype).removeprefix("torch."),
        "micro_batch_size": fitter.micro_batch_size,
        "base_commit": fitter.base.commit,  # None for a folder
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    facts = on_main(lambda: facts)
    transcoders = [fitter.stack.transcoders[index - fitter.held.start] for index in fitter.written]
    histories: list[History] = [progress.history(index) for index in fitter.written]
    settings = [layer_settings(transcoder.config, recipe, facts) for transcoder in transcoders]
    if recipe.finish == "joint":
        start, layers = start_of(run), [fitter.base.layers[index] for index in fitter.written]
        before = [start.settings(layer) for layer in layers]
        settings = [joint_settings(of_start, recipe, facts) for of_start in before]
        pasts = zip(
            map(start.history, layers), (of_start["fit"]["tokens"] for of_start in before), histories, strict=True
        )
        histories = [joint_history(*past) for past in pasts]
    run.write_layers(transcoders, histories, settings, progress.steps)


@torch.no_grad()
def check_sound(fitter: Fitter, steps: int) -> None:
    """Raises NotFiniteError if a transcoder as it stands, its last update included, cannot be saved.

    What it would export is tried on a few rows of the last batch: parameters that are NaN or infinite show in its
    outputs, and so do ones that are finite but too large to compute with.
    """
    fitter.stack.set_statistics()
    sizes = []
    for x, transcoder in zip(fitter.activations.x, fitter.stack.transcoders, strict=True):
        x = x[:CHECKED_ROWS].float()
        x = x[x.isfinite().all(-1)]  # the base's own NaNs are not the transcoder's fault
        sizes.append(transcoder(x).square().sum())
    with fitter.shard.alone():
        own = sum_over_processes(torch.stack(sizes))
    check_converging(fitter.shard.gather(own), fitter.base.layers, steps)


def check_converging(errors: Tensor, layers: Sequence[int], steps: int) -> None:
    """Raises NotFiniteError if a layer's error [layers] is no longer a number by some step."""
    diverged = [layer for layer, value in zip(layers, errors.isfinite().tolist(), strict=True) if not value]
    if diverged:
        raise NotFiniteError(
            f"the transcoder of layer {diverged[0]} has diverged by step {steps}: it computes a NaN or an infinity; "
            "start anew with a lower --lr"
        )


def report(
    fvu: Tensor,
    others: Mapping[str, float],
    layers: Sequence[int],
    steps: int,
    skipped_rows: int,
    bar: tqdm,
    accelerator: Accelerator,
) -> None:
    """Shows a step's FVU [layers], and other scores, in the progress bar and tells the trackers."""
    bar.update()
    shown = {name: f"{value:.4f}" for name, value in others.items()}
    shown |= {"mean_fvu": f"{fvu.mean():.4f}", "worst": f"{fvu.max():.4f}"}
    bar.set_postfix(shown | ({"skipped_rows": skipped_rows} if skipped_rows else {}), refresh=False)
    by_layer = {f"fvu/layer_{layer}": value for layer, value in zip(layers, fvu.tolist(), strict=True)}
    accelerator.log({**others, "mean_fvu": fvu.mean().item(), **by_layer}, step=steps)


def print_result(run: Run, recipe: Recipe) -> None:
    """Prints what came out, and what to do with it."""
    if recipe.eval_split is None or run.evaluation is None:
        print(f"fitted {len(run.layers)} layers; no eval_split, so nothing was measured on held-out text")
    else:
        joint = run.settings(run.layers[0]).get("joint")
        stage = {layer: run.settings(layer)["fit"] for layer in run.layers} if joint is None else {}
        print(fit_table(run.evaluation, stage), *([finish_table(joint)] if joint else []), sep="\n\n")
    if skipped := run.settings(run.layers[0]).get("fit", {}).get("skipped_rows"):
        print(f"rows of the text that were left out, for they held none or could not be read: {skipped}")
    print(
        f"\nTry next:\n  from transformers import AutoModel\n"
        f'  tc = AutoModel.from_pretrained("{run.folder}", subfolder="layer_{run.layers[0]}", trust_remote_code=True)'
    )


def main() -> None:
    recipe, device = parse_command()
    if device is None:
        fit(recipe)
    else:
        print(*Plan(recipe, Device.parse(device)).lines(), sep="\n")


if __name__ == "__main__":
    command_line(main)

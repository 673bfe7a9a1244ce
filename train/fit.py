"""Fits the transcoders of all layers of a base model, from a recipe to a run.

    accelerate launch train/fit.py --recipe quickstart

Every field of the recipe is a flag (`--help` lists them); a flag outranks the recipe file.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from bilinear_tc.train.base import Base
from bilinear_tc.train.batches import calibration_batches, open_batches
from bilinear_tc.train.checkpoint import Checkpoints
from bilinear_tc.train.command import command_line, start_accelerator
from bilinear_tc.train.evaluate import evaluate_fit, fit_table
from bilinear_tc.train.fitter import Fitter, compute_dtype
from bilinear_tc.train.recipe import Recipe, parse_recipe
from bilinear_tc.train.run import FitFacts, prepare_run, write_layer
from bilinear_tc.train.tokens import SharedBatches


class Progress:
    """How far a fit has come: steps, tokens, wall time, and the history of each layer's error.

    Attributes:
        figures: [max_steps, layers, 2] mean squared error and FVU, float64.
        tokens: [max_steps] tokens read up to and including each step, the calibration sample among them.
    """

    def __init__(self, max_steps: int, layers: int) -> None:
        self.steps = 0
        self.tokens_read = 0
        self.seconds = 0.0
        self.figures = torch.zeros(max_steps, layers, 2, dtype=torch.float64)
        self.tokens = torch.zeros(max_steps, dtype=torch.int64)
        self._resumed_at = time.perf_counter()

    def add(self, mse: torch.Tensor, fvu: torch.Tensor, rows: int) -> None:
        self.tokens_read += rows
        self.figures[self.steps] = torch.stack([mse, fvu], dim=-1)
        self.tokens[self.steps] = self.tokens_read
        self.steps += 1

    def history(self, layer: int) -> dict[str, list]:
        """The columns of a layer's history.parquet."""
        mse, fvu = self.figures[: self.steps, layer].unbind(-1)
        return {
            "step": list(range(1, self.steps + 1)),
            "tokens": self.tokens[: self.steps].tolist(),
            "mse": mse.tolist(),
            "variance_explained": (1 - fvu).tolist(),
            "fvu": fvu.tolist(),
        }

    def wall_time(self) -> float:
        """Seconds of fitting so far, over all resumes."""
        return self.seconds + time.perf_counter() - self._resumed_at

    def state_dict(self) -> dict[str, object]:
        return {
            "steps": self.steps,
            "tokens_read": self.tokens_read,
            "seconds": self.wall_time(),
            "figures": self.figures[: self.steps].clone(),
            "tokens": self.tokens[: self.steps].clone(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.tokens_read, self.seconds = state["steps"], state["tokens_read"], state["seconds"]
        self.figures[: self.steps], self.tokens[: self.steps] = state["figures"], state["tokens"]
        self._resumed_at = time.perf_counter()


class StopRequest:
    """Notices SIGTERM and SIGINT, so that a step ends and is saved before the process does."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = number

    def __bool__(self) -> bool:
        """Whether any process has been asked to stop; the same answer on all of them."""
        if self.accelerator.num_processes == 1:
            return bool(self.received)
        flag = torch.tensor(float(bool(self.received)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag).item())


def export(folder: Path, recipe: Recipe, fitter: Fitter, progress: Progress) -> None:
    """Writes every layer as it stands into the run."""
    accelerator = fitter.accelerator
    if not accelerator.is_main_process:
        return
    fitter.stack.set_statistics()
    device = accelerator.device
    on_gpu = device.type == "cuda"
    facts = FitFacts(
        steps=progress.steps,
        tokens=progress.tokens_read,
        seconds=round(progress.wall_time(), 1),
        device=torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} CPU threads",
        processes=accelerator.num_processes,
        dtype=str(fitter.stack.dtype).removeprefix("torch."),
    )
    for index, transcoder in enumerate(fitter.stack.transcoders):
        write_layer(folder, transcoder, progress.history(index), recipe, facts)


def fit(recipe: Recipe) -> None:
    """Runs a recipe to its end, from wherever its run stands."""
    folder = Path(recipe.output_dir)
    log_with = None if recipe.report_to == "none" else recipe.report_to
    accelerator = start_accelerator(log_with=log_with, project_dir=str(folder))
    if accelerator.is_main_process:
        prepare_run(folder, recipe)
    accelerator.wait_for_everyone()
    stop = StopRequest(accelerator)
    device = accelerator.device
    base = Base.load(
        recipe.base,
        revision=recipe.base_revision,
        layers=recipe.layer_indices(),
        device=device,
        dtype=compute_dtype(recipe, device),
    )
    recipe.n_hidden(base.n_inputs)
    base.stop_after_last_layer()
    with open_batches(recipe, base.tokenizer, accelerator) as batches:
        fitter = Fitter(recipe, base, accelerator)
        progress = Progress(recipe.max_steps, len(base.layers))
        checkpoints = Checkpoints(folder, accelerator, fitter, progress, batches)
        if newest := checkpoints.newest():
            checkpoints.load(newest)
            accelerator.print(f"resuming {folder} after step {progress.steps} of {recipe.max_steps}")
        elif recipe.init == "mlp":
            progress.tokens_read = fitter.start(calibration_batches(recipe, batches))
        run_steps(recipe, folder, accelerator, fitter, progress, checkpoints, batches, stop)
    finish(recipe, folder, accelerator, base)


def run_steps(
    recipe: Recipe,
    folder: Path,
    accelerator: Accelerator,
    fitter: Fitter,
    progress: Progress,
    checkpoints: Checkpoints,
    batches: SharedBatches,
    stop: StopRequest,
) -> None:
    """Steps to the recipe's end, saving as it goes; an error or a signal leaves the run loadable."""
    accelerator.init_trackers("bilinear-tc", config=recipe.to_dict())
    saved = progress.steps if checkpoints.newest() else -1

    def save() -> None:
        nonlocal saved
        if saved != progress.steps:
            checkpoints.save(progress.steps)
            export(folder, recipe, fitter, progress)
            saved = progress.steps

    with tqdm(
        initial=progress.steps,
        total=recipe.max_steps,
        desc=f"fitting {len(fitter.base.layers)} layers",
        unit="step",
        disable=not accelerator.is_main_process,
    ) as bar:
        while progress.steps < recipe.max_steps:
            try:
                mse, fvu, rows = fitter.step(next(batches), progress.steps)
            except FloatingPointError:
                export(folder, recipe, fitter, progress)
                raise
            progress.add(mse, fvu, rows)
            bar.update()
            bar.set_postfix(mean_fvu=f"{fvu.mean():.4f}", worst=f"{fvu.max():.4f}", refresh=False)
            accelerator.log(
                {"mean_fvu": fvu.mean().item()}
                | {f"fvu/layer_{layer}": value for layer, value in zip(fitter.base.layers, fvu.tolist(), strict=True)},
                step=progress.steps,
            )
            stopping = bool(stop)
            if stopping or (recipe.checkpoint_every and progress.steps % recipe.checkpoint_every == 0):
                save()
            if stopping:
                raise InterruptedError(
                    f"stopped after step {progress.steps} of {recipe.max_steps}, which is saved in {folder}: run the "
                    "same command to go on"
                )
    save()
    accelerator.end_training()


def finish(recipe: Recipe, folder: Path, accelerator: Accelerator, base: Base) -> None:
    """Measures the run as it was written, on held-out text where the recipe names some, and prints what came out."""
    if recipe.eval_split is None:
        accelerator.print(f"fitted {len(base.layers)} layers; no eval_split, so nothing was measured on held-out text")
    else:
        evaluation = evaluate_fit(folder, recipe, base, accelerator)
        accelerator.print(fit_table(evaluation))
    accelerator.print(
        f"\nTry next:\n  from transformers import AutoModel\n"
        f'  tc = AutoModel.from_pretrained("{folder}", subfolder="layer_{base.layers[0]}", trust_remote_code=True)'
    )


def main() -> None:
    fit(parse_recipe())


if __name__ == "__main__":
    command_line(main)

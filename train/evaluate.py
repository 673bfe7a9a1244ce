"""Held-out measures of a run or a published set: FVU of every layer, and the base's loss with its MLPs replaced.

    accelerate launch train/evaluate.py --transcoders runs/quickstart

What is left out of the command line is read from the set's recipe.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download, list_repo_files
from torch import Tensor, nn
from tqdm import tqdm
from transformers import HfArgumentParser

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.command import command_line, start_accelerator
from bilinear_tc.train.fitting.fitter import compute_dtype
from bilinear_tc.train.fitting.least_squares import LeastSquares
from bilinear_tc.train.moments import Moments, fvu, fvu_raw
from bilinear_tc.train.recipe import Recipe, read_settings
from bilinear_tc.train.run import written_whole
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.train.text.source import calibration_batches, open_batches, open_held_out

AFFINE_RIDGE = 1e-6
NOTHING_TO_PREDICT = (
    "the base's loss cannot be measured, since no token of the held-out text follows another in its sequence: expected "
    "sequences (seq_len) and documents of at least 2 tokens"
)
MICRO_BATCH_SIZE = 32  # sequences that the base runs on at once


@dataclass
class EvaluationSettings:
    """What to measure, and on what text."""

    transcoders: str = field(metadata={"help": "A run's folder or a Hub repository."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the repository."})
    base: str | None = field(default=None, metadata={"help": "The base; the recipe's where left out."})
    base_revision: str | None = field(default=None, metadata={"help": "The base's branch, tag or commit."})
    dataset: str | None = field(default=None, metadata={"help": "Held-out text; the recipe's dataset where left out."})
    dataset_config: str | None = field(default=None, metadata={"help": "The dataset's configuration name."})
    split: str | None = field(default=None, metadata={"help": "Its split; the recipe's eval_split where left out."})
    text_column: str | None = field(default=None, metadata={"help": "The column that holds the text."})
    tokens: int | None = field(default=None, metadata={"help": "Tokens to measure on; the recipe's eval_tokens."})
    batch_size: int = field(default=16, metadata={"help": "Sequences at once, over all processes."})
    dtype: str = field(default="float32", metadata={"help": "Compute type: float32 or bfloat16."})
    output: str | None = field(
        default=None, metadata={"help": "Where evaluation.json goes: the run, or here for a repository."}
    )


class ErrorSums:
    """Squared errors per feature, float64 over the whole sample: of the transcoders and of the affine maps."""

    def __init__(self, transcoders: Sequence[BilinearTC], affine: tuple[Tensor, Tensor], device: torch.device) -> None:
        self.transcoders, self.affine = transcoders, affine
        shape = (len(transcoders), transcoders[0].config.n_outputs)
        self.transcoder_errors, self.affine_errors = torch.zeros(2, *shape, dtype=torch.float64, device=device)
        self.outputs = Moments.zeros(*shape, device=device)

    @torch.no_grad()
    def add(self, activations: Activations, accelerator: Accelerator) -> None:
        self.outputs = self.outputs.merge(activations.moments()[1].reduce(accelerator))
        for layer, transcoder in enumerate(self.transcoders):
            x, y = activations.x[layer].float(), activations.y[layer].float()
            weight, bias = self.affine[0][layer], self.affine[1][layer]
            self.transcoder_errors[layer] += (y - transcoder(x).float()).square().sum(0, dtype=torch.float64)
            self.affine_errors[layer] += (
                (y - nn.functional.linear(x, weight, bias)).square().sum(0, dtype=torch.float64)
            )

    def figures(self, accelerator: Accelerator) -> list[dict[str, float]]:
        """The FVU figures of each layer."""
        errors, affine_errors = accelerator.reduce(self.transcoder_errors), accelerator.reduce(self.affine_errors)
        explained = fvu(errors, self.outputs)
        columns = {
            "fvu": explained,
            "fvu_raw": fvu_raw(errors, self.outputs),
            "variance_explained": 1 - explained,
            "mse": errors.mean(-1) / self.outputs.count,
            "fvu_linear": fvu(affine_errors, self.outputs),
        }
        columns = {name: values.tolist() for name, values in columns.items()}
        return [{name: values[i] for name, values in columns.items()} for i in range(len(self.transcoders))]


class LossSums:
    """Cross-entropy and divergence from the base, summed over predicted tokens, of one way to run the base."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # cross-entropy, KL, tokens

    def add(self, log_probs: Tensor, base_log_probs: Tensor, targets: Tensor) -> None:
        """Adds predictions: log-probabilities [tokens, vocabulary], targets [tokens]."""
        self.sums[0] -= log_probs.gather(1, targets[:, None]).sum(dtype=torch.float64)
        self.sums[1] += (base_log_probs.exp() * (base_log_probs - log_probs)).sum(dtype=torch.float64)
        self.sums[2] += len(targets)

    def means(self, accelerator: Accelerator) -> tuple[float, float]:
        """Cross-entropy and KL(base ‖ this) in nats a token, over all processes.

        Raises:
            ValueError: where no token follows another, so that none was predicted.
        """
        ce, kl, tokens = accelerator.reduce(self.sums).tolist()
        if not tokens:
            raise ValueError(NOTHING_TO_PREDICT)
        return ce / tokens, kl / tokens


@contextmanager
def mean_output(base: Base, transcoders: Sequence[BilinearTC]) -> Iterator[None]:
    """While the context lasts, these layers' MLPs say their mean output whatever comes in."""
    handles = []
    for transcoder in transcoders:
        mlp = base.model.get_submodule(transcoder.config.mlp_path)
        mean = transcoder.output_mean

        def say_mean(_mlp: nn.Module, _inputs: tuple, output: Tensor, mean: Tensor = mean) -> Tensor:
            return mean.to(output).expand_as(output)

        handles.append(mlp.register_forward_hook(say_mean))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def transcoders_attached(base: Base, transcoders: Sequence[BilinearTC]) -> Iterator[None]:
    with ExitStack() as stack:
        for transcoder in transcoders:
            stack.enter_context(transcoder.attached(base.model))
        yield


def solve_affine(
    base: Base,
    transcoders: Sequence[BilinearTC],
    batches: Sequence[TokenBatch],
    activations: Activations,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """The best affine map of each layer on the batches: weights [layers, n_outputs, n_inputs] and biases."""
    equations = LeastSquares(
        torch.stack([t.input_mean for t in transcoders]), torch.stack([t.output_mean for t in transcoders])
    )
    for batch in batches:
        activations.fill(batch, MICRO_BATCH_SIZE)
        for layer in range(len(transcoders)):
            equations.add(layer, activations.x[layer].float(), activations.y[layer].float())
    equations.reduce(accelerator)
    solved = [equations.solve(layer, ridge=AFFINE_RIDGE) for layer in range(len(transcoders))]
    return tuple(torch.stack(parts).float() for parts in zip(*solved, strict=True))


@torch.no_grad()
def add_losses(
    base: Base, transcoders: Sequence[BilinearTC], sums: dict[str, LossSums], batch: TokenBatch, device: torch.device
) -> None:
    """Adds one batch to the losses of the base, of each layer replaced, and of all of them replaced at once."""
    if not len(batch):
        return
    input_ids = batch.input_ids.to(device)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if batch.mask is None else batch.mask.to(device)
    predicted = (mask[:, :-1] & mask[:, 1:]).flatten()
    targets = input_ids[:, 1:].flatten()[predicted]

    def log_probs() -> Tensor:
        logits = base.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        return logits.flatten(0, 1)[predicted].float().log_softmax(-1)

    true = log_probs()
    sums["base"].add(true, true, targets)
    groups = {str(t.config.layer_index): [t] for t in transcoders} | {"all": transcoders}
    for name, group in groups.items():
        with transcoders_attached(base, group):
            sums[name].add(log_probs(), true, targets)
        with mean_output(base, group):
            sums[f"{name} mean"].add(log_probs(), true, targets)


def loss_figures(name: str, sums: dict[str, LossSums], ce: float, accelerator: Accelerator) -> dict[str, float]:
    """How much of the base's loss is lost with some MLPs replaced.

    `loss_recovered` is 1 − (CE with the transcoders − CE) / (CE with the MLPs' mean outputs − CE); it is left out where
    mean outputs cost nothing, so that there is nothing to recover.
    """
    replaced, kl = sums[name].means(accelerator)
    ablated, _ = sums[f"{name} mean"].means(accelerator)
    figures = {"ce_increase": replaced - ce, "kl": kl}
    if ablated != ce:
        figures["loss_recovered"] = 1 - (replaced - ce) / (ablated - ce)
    return figures


def evaluate(
    base: Base,
    transcoders: Sequence[BilinearTC],
    affine: tuple[Tensor, Tensor],
    batches: Iterable[TokenBatch],
    activations: Activations,
    accelerator: Accelerator,
    *,
    losses: bool,
) -> dict[str, Any]:
    """Measures transcoders on held-out batches.

    Args:
        base: the base, with all its layers where `losses` is set.
        transcoders: the layers' models, on the base's device, in the order of `base.layers`.
        affine: `solve_affine`'s maps.
        batches: this process's shares of the held-out batches.
        activations: buffers for them.
        accelerator: the processes.
        losses: measure the base's loss with its MLPs replaced too: two forward passes a layer.

    Returns:
        evaluation.json without its description of the text: tokens, base, layers, all_layers, mean.
    """
    device = accelerator.device
    errors = ErrorSums(transcoders, affine, device)
    names = [str(t.config.layer_index) for t in transcoders] + ["all"]
    sums = {name: LossSums(device) for name in ["base", *names, *(f"{name} mean" for name in names)]}
    for batch in batches:
        activations.fill(batch, MICRO_BATCH_SIZE)
        errors.add(activations, accelerator)
        if losses:
            add_losses(base, transcoders, sums, batch, device)
    layers = dict(zip(names, errors.figures(accelerator), strict=False))
    result: dict[str, Any] = {"tokens": errors.outputs.count, "base": {}, "layers": layers}
    if losses:
        ce, _ = sums["base"].means(accelerator)
        result["base"]["ce"] = ce
        for name, figures in layers.items():
            figures.update(loss_figures(name, sums, ce, accelerator))
        result["all_layers"] = loss_figures("all", sums, ce, accelerator)
    keys = [key for key in next(iter(layers.values())) if all(key in figures for figures in layers.values())]
    result["mean"] = {key: sum(figures[key] for figures in layers.values()) / len(layers) for key in keys}
    return result


def evaluate_set(
    transcoders: Sequence[BilinearTC],
    recipe: Recipe,
    base: Base,
    accelerator: Accelerator,
    *,
    held_out: Recipe | None = None,
    batch_size: int,
    losses: bool,
) -> dict[str, Any]:
    """Measures a set on its recipe's held-out text, or on the one that `held_out` names; returns evaluation.json.

    Raises:
        ValueError: where there is no held-out text, or no token to predict in it.
    """
    held_out = held_out or recipe
    if losses and recipe.seq_len < 2:
        raise ValueError(NOTHING_TO_PREDICT)
    if held_out.eval_split is None:
        raise ValueError("the recipe names no held-out split (eval_split): name one with --split")
    if (held_out.dataset, held_out.eval_split) == (recipe.dataset, recipe.split):
        raise ValueError(
            f"split {held_out.eval_split!r} of {held_out.dataset} is what the set was fitted on: expected held-out "
            "text; name another with --split or --dataset"
        )
    rows = max(recipe.batch_size, batch_size) * recipe.seq_len
    activations = Activations(base, rows, device=accelerator.device, dtype=base.model.dtype)
    with open_batches(recipe, base.tokenizer, accelerator) as text:
        sample = calibration_batches(recipe, text)
    affine = solve_affine(base, transcoders, sample, activations, accelerator)
    count = -(-held_out.eval_tokens // (batch_size * recipe.seq_len))
    with open_held_out(held_out, base.tokenizer, accelerator, batch_size) as text:
        batches = (batch for _, batch in zip(range(count), text, strict=False))
        shown = tqdm(batches, total=count, desc="held-out text", unit="batch", disable=not accelerator.is_main_process)
        measured = evaluate(base, transcoders, affine, shown, activations, accelerator, losses=losses)
    measured["base"] = {"model": recipe.base, **measured["base"]}
    return {"dataset": held_out.dataset, "split": held_out.eval_split, **measured}


def evaluate_fit(folder: Path, recipe: Recipe, base: Base, accelerator: Accelerator) -> dict[str, Any]:
    """Measures a fresh run's FVU, as written on disk, and writes evaluation.json into it."""
    transcoders = [load_transcoder(str(folder), layer, None, accelerator.device) for layer in base.layers]
    evaluation = evaluate_set(transcoders, recipe, base, accelerator, batch_size=recipe.batch_size, losses=False)
    write_evaluation(evaluation, folder, accelerator)
    return evaluation


def load_transcoder(where: str, layer: int, revision: str | None, device: torch.device) -> BilinearTC:
    transcoder = BilinearTC.from_pretrained(where, subfolder=f"layer_{layer}", revision=revision)
    return transcoder.float().to(device).eval()


def list_layers(where: str, revision: str | None) -> list[int]:
    """The layers that a run's folder or a Hub repository holds.

    Raises:
        ValueError: where it holds none, or is not there.
    """
    if Path(where).is_dir():
        names = [path.relative_to(where).as_posix() for path in Path(where).glob("layer_*/config.json")]
    else:
        try:
            names = list_repo_files(where, revision=revision)
        except Exception as error:  # whatever keeps huggingface_hub and its HTTP client from answering
            raise ValueError(
                f"no transcoders at {where!r}: expected a run's folder or a Hub repository that you can read, got "
                f"{type(error).__name__}"
            ) from error
    matches = (re.fullmatch(r"layer_(\d+)/config\.json", name) for name in names)
    layers = sorted(int(match[1]) for match in matches if match)
    if not layers:
        raise ValueError(f"{where} holds no transcoders: expected layer_0/config.json and so on")
    return layers


def read_recipe(where: str, revision: str | None) -> Recipe:
    """The recipe that a run or a repository was fitted with."""
    if Path(where).is_dir():
        return Recipe(**read_settings(Path(where) / "recipe.yaml"))
    return Recipe(**read_settings(Path(hf_hub_download(where, "recipe.yaml", revision=revision))))


def write_evaluation(evaluation: dict[str, Any], folder: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        with written_whole(folder) as scratch:
            (scratch / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")


def fit_table(evaluation: dict[str, Any]) -> str:
    """The table of what a fit reached."""
    lines = [
        f"held-out text: {evaluation['tokens']:,} tokens of {evaluation['dataset']} ({evaluation['split']})",
        f"{'layer':>5}  {'FVU':>8}  {'variance explained':>18}  {'FVU of the best affine map':>26}",
    ]
    for name, row in [*evaluation["layers"].items(), ("mean", evaluation["mean"])]:
        lines.append(f"{name:>5}  {row['fvu']:8.4f}  {row['variance_explained']:18.2%}  {row['fvu_linear']:26.4f}")
    return "\n".join(lines)


def loss_table(evaluation: dict[str, Any]) -> str:
    """The table of what the base loses with its MLPs replaced."""
    lines = [
        f"the base's own loss: {evaluation['base']['ce']:.4f} nats a token",
        f"{'replaced':>8}  {'CE increase':>11}  {'KL':>8}  {'loss recovered':>14}",
    ]
    for name, row in [*evaluation["layers"].items(), ("all", evaluation["all_layers"])]:
        recovered = f"{row['loss_recovered']:.2%}" if "loss_recovered" in row else "–"
        lines.append(f"{name:>8}  {row['ce_increase']:11.4f}  {row['kl']:8.4f}  {recovered:>14}")
    return "\n".join(lines)


def main() -> None:
    (settings,) = HfArgumentParser(EvaluationSettings, allow_abbrev=False).parse_args_into_dataclasses()
    accelerator = start_accelerator()
    device = accelerator.device
    layers = list_layers(settings.transcoders, settings.revision)
    recipe = read_recipe(settings.transcoders, settings.revision)
    recipe = dataclasses.replace(
        recipe,
        base=settings.base or recipe.base,
        base_revision=settings.base_revision or recipe.base_revision,
        dtype=settings.dtype,
    )
    held_out = dataclasses.replace(
        recipe,
        dataset=settings.dataset or recipe.dataset,
        dataset_config=settings.dataset_config or recipe.dataset_config,
        eval_split=settings.split or recipe.eval_split,
        text_column=settings.text_column or recipe.text_column,
        eval_tokens=settings.tokens or recipe.eval_tokens,
    )
    base = Base.load(
        recipe.base,
        revision=recipe.base_revision,
        layers=layers,
        seq_len=recipe.seq_len,
        device=device,
        dtype=compute_dtype(recipe, device),
    )
    transcoders = [load_transcoder(settings.transcoders, layer, settings.revision, device) for layer in layers]
    evaluation = evaluate_set(
        transcoders, recipe, base, accelerator, held_out=held_out, batch_size=settings.batch_size, losses=True
    )
    is_run = Path(settings.transcoders).is_dir()
    folder = Path(settings.output or (settings.transcoders if is_run else "."))
    write_evaluation(evaluation, folder, accelerator)
    accelerator.print(f"{fit_table(evaluation)}\n\n{loss_table(evaluation)}\n\nwrote {folder / 'evaluation.json'}")


if __name__ == "__main__":
    command_line(main)

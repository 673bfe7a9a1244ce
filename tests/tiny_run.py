"""A tiny run in the layout that `train/fit.py` writes, for tests of what happens to a run afterwards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.recipe import Recipe, write_recipe

ROOT = Path(__file__).resolve().parent.parent
ROOT_FILES = ("configuration_bilinear_tc.py", "modeling_bilinear_tc.py")
TOKENS_A_STEP = 4096


def write_tiny_run(
    folder: Path,
    *,
    layers: Sequence[int] = (0, 1),
    n_inputs: int = 8,
    n_hidden: int = 16,
    steps: int = 5,
    evaluation: bool = True,
    seed: int = 0,
    form: str = "bilinear",
) -> Path:
    """Writes a run of random transcoders whose FVU falls from near 1 to a figure of each layer's own.

    Two calls with the same arguments write the same bytes. `n_inputs` is also the width of the outputs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        base="train/quickstart",
        dataset="python-stdlib",
        layers=",".join(map(str, layers)),
        output_dir=folder.name,
        batch_size=TOKENS_A_STEP // 128,
        max_steps=steps,
        form=form,
        init="mlp" if form == "bilinear" else "random",
        hidden_multiplier=n_hidden / n_inputs,
        seed=seed,
    )
    write_recipe(recipe, folder / "recipe.yaml")
    for name in ROOT_FILES:
        shutil.copyfile(ROOT / name, folder / name)
    for layer in layers:
        _write_layer(folder / f"layer_{layer}", recipe, layer, n_inputs, n_hidden)
    if evaluation:
        text = json.dumps(_evaluation(recipe, layers), indent=2)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "state.txt").write_text("never published", encoding="utf-8")
    return folder


def final_fvu(layer: int) -> float:
    """The held-out FVU that the tiny run reports: layer 0 easiest, layer 1 hardest, as on Pythia."""
    return 0.01 if layer == 0 else 0.15 / math.sqrt(layer)


def _write_layer(folder: Path, recipe: Recipe, layer: int, n_inputs: int, n_hidden: int) -> None:
    generator = torch.Generator().manual_seed(1000 * recipe.seed + layer)
    config = BilinearTCConfig(
        n_inputs=n_inputs,
        n_hidden=n_hidden,
        n_outputs=n_inputs,
        form=recipe.form,
        base_model=recipe.base,
        base_revision=recipe.base_revision,
        layer_index=layer,
        mlp_path=f"gpt_neox.layers.{layer}.mlp",
    )
    model = BilinearTC(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(n_inputs))
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if name.endswith("std") else -0.5))
    model.save_pretrained(folder)
    for name in ROOT_FILES:  # save_pretrained puts them beside the weights; a run holds them once, at its root
        (folder / name).unlink(missing_ok=True)
    _write_settings(folder / "config.yaml", recipe, config)
    _write_history(folder / "history.parquet", recipe, layer)


def _write_settings(path: Path, recipe: Recipe, config: BilinearTCConfig) -> None:
    belongs = {"layer": config.layer_index, "base_model": config.base_model, "base_revision": config.base_revision}
    shape = {name: getattr(config, name) for name in ("mlp_path", "form", "bias", "n_inputs", "n_hidden", "n_outputs")}
    settings = {
        name: value for name, value in recipe.to_dict().items() if name not in {"base", "layers", "output_dir", *shape}
    }
    fit = {
        "steps": recipe.max_steps,
        "tokens": recipe.max_steps * TOKENS_A_STEP,
        "seconds": 12.5,
        "device": "cpu",
        "processes": 1,
        "dtype": "float32",
        "torch": str(torch.__version__),
        "transformers": "5.0.0",
    }
    text = yaml.safe_dump({**belongs, **shape, **settings, "fit": fit}, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _write_history(path: Path, recipe: Recipe, layer: int) -> None:
    steps = range(1, recipe.max_steps + 1)
    last = final_fvu(layer)
    fvu = [last + (0.9 - last) * (1 - (step - 1) / max(1, recipe.max_steps - 1)) ** 2 for step in steps]
    columns = {
        "step": pa.array(steps, pa.int64()),
        "tokens": pa.array([step * TOKENS_A_STEP for step in steps], pa.int64()),
        "mse": pa.array(fvu, pa.float64()),
        "variance_explained": pa.array([1 - value for value in fvu], pa.float64()),
        "fvu": pa.array(fvu, pa.float64()),
    }
    pq.write_table(pa.table(columns), path)


def _evaluation(recipe: Recipe, layers: Sequence[int]) -> dict[str, object]:
    scores = {str(layer): _scores(final_fvu(layer)) for layer in layers}
    names = next(iter(scores.values())).keys()
    return {
        "dataset": recipe.dataset,
        "split": recipe.eval_split,
        "tokens": recipe.eval_tokens,
        "base": {"model": recipe.base, "ce": 3.21},
        "layers": scores,
        "all_layers": {"ce_increase": 0.21, "kl": 0.2, "loss_recovered": 0.93},
        "mean": {name: sum(score[name] for score in scores.values()) / len(scores) for name in names},
    }


def _scores(fvu: float) -> dict[str, float]:
    return {
        "fvu": fvu,
        "fvu_raw": 0.9 * fvu,
        "variance_explained": 1 - fvu,
        "mse": fvu,
        "fvu_linear": min(0.95, 3 * fvu + 0.2),
        "ce_increase": fvu / 5,
        "kl": fvu / 6,
        "loss_recovered": 1 - fvu / 4,
    }

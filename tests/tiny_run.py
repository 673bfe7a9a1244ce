"""A tiny run in the layout that `train/fit.py` writes, for tests of what happens to a run afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.layer_settings import layer_settings
from bilinear_tc.train.measuring.evaluation import Continuations, Evaluation, LayerScores, LossScores
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import Run

ROOT = Path(__file__).resolve().parent.parent
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
    """Writes a run of random transcoders whose FVU falls from near 1 to a value of each layer's own.

    Two calls with the same arguments write the same bytes. `n_inputs` is also the width of the outputs.
    """
    folder = Path(folder)
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
    facts = {
        "steps": steps,
        "tokens": steps * TOKENS_A_STEP,
        "seconds": 12.5,
        "device": "cpu",
        "processes": 1,
        "dtype": "float32",
        "micro_batch_size": recipe.batch_size,
        "base_commit": None,
        "torch": str(torch.__version__),
        "transformers": "5.0.0",
    }
    run = Run(folder)
    run.write_root(recipe.to_dict())
    for layer in layers:
        transcoder = random_transcoder(recipe, layer, n_inputs, n_hidden)
        run.write_layer(
            transcoder, falling_history(steps, final_fvu(layer)), layer_settings(transcoder.config, recipe, facts)
        )
    if evaluation:
        run.write_evaluation(
            Evaluation(
                layers={layer: like_fvu(final_fvu(layer)) for layer in layers},
                all_layers=LossScores(
                    ce_increase=0.21, ce_increase_se=0.013, kl=0.2, top1=0.8512, top1_se=0.0031, loss_recovered=0.93
                ),
                continuations=Continuations(
                    prompts=64,
                    prompt_tokens=32,
                    tokens=48,
                    same_median=9.5,
                    same_mean=13.27,
                    same_mean_se=1.52,
                    prompt=PROMPT,
                    base=" is\n\nhere.",
                    replaced=" was",
                ),
                dataset=recipe.dataset,
                split=recipe.eval_split,
                tokens=recipe.eval_tokens,
                base=recipe.base,
                base_ce=3.21,
            )
        )
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "state.txt").write_text("never published", encoding="utf-8")
    return folder


# what a card's reader, and its check, would take for a link, a heading, an end of the block and markup
PROMPT = "see\n```\n[what](nowhere.md)\n````\n# it\n</details> {{ x }}"


def final_fvu(layer: int) -> float:
    """The held-out FVU that the tiny run reports: layer 0 easiest, layer 1 hardest, as on Pythia."""
    return 0.01 if layer == 0 else 0.15 / math.sqrt(layer)


def random_transcoder(recipe: Recipe, layer: int, n_inputs: int, n_hidden: int) -> BilinearTC:
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
    return model


def falling_history(steps: int, last: float) -> dict[str, list]:
    counted = range(1, steps + 1)
    fvu = [last + (0.9 - last) * (1 - (step - 1) / max(1, steps - 1)) ** 2 for step in counted]
    return {
        "step": list(counted),
        "tokens": [step * TOKENS_A_STEP for step in counted],
        "mse": fvu,
        "variance_explained": [1 - value for value in fvu],
        "fvu": fvu,
    }


def like_fvu(fvu: float) -> LayerScores:
    """Scores that go with an FVU."""
    return LayerScores(
        fvu=fvu,
        fvu_se=fvu / 50,
        fvu_ordinary=1.1 * fvu,
        massive_share=0.0,
        worst_channel={"index": 3, "share": 0.6},
        error_quantiles={"1": fvu / 9, "50": fvu / 2, "99": 6 * fvu},
        jacobian_cosine=1 - fvu,
        interchange={"embedding": 1 - 3 * fvu, "mlp 0": 1 - 2 * fvu},
        fvu_raw=0.9 * fvu,
        variance_explained=1 - fvu,
        mse=fvu,
        fvu_linear=min(0.95, 3 * fvu + 0.2),
        ce_increase=fvu / 5,
        kl=fvu / 6,
        loss_recovered=1 - fvu / 4,
    )

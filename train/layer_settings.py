"""config.yaml of a layer: its fit for a reader."""

from __future__ import annotations

from typing import Any

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.train.recipe import FINISH, FREE_SETTINGS, Recipe


def layer_settings(config: BilinearTCConfig, recipe: Recipe, facts: dict[str, Any]) -> dict[str, Any]:
    """config.yaml of a layer fitted by itself."""
    belongs = ("base_model", "base_revision", "mlp_path", "n_inputs", "n_hidden", "n_outputs")
    left_out = {*FREE_SETTINGS, *FINISH, "base", "base_revision", "layers", "mlp_path"}
    return {
        "layer": config.layer_index,
        "stage": "layer-wise",
        **{name: getattr(config, name) for name in belongs},
        **{name: value for name, value in recipe.to_dict().items() if name not in left_out},
        "fit": facts,
    }


def joint_settings(before: dict[str, Any], recipe: Recipe, facts: dict[str, Any]) -> dict[str, Any]:
    """The same after the joint finish, from what it was before, the stage's recipe and what that measured of itself."""
    names = ("batch_size", "seq_len", "optimizer", "lr", "bias_lr", "lr_schedule", "momentum", "jvp", "anchor")
    own = {name: getattr(recipe, name) for name in names}
    return before | {"stage": "joint", "joint": facts | own}

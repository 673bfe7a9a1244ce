"""Configuration of a bilinear transcoder: its shape, and the MLP that it stands in for."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral
from typing import Any

from transformers import PretrainedConfig

# Of each form the maps whose outputs are multiplied, and the map of their product; None is the sum of the inputs.
FORMS: dict[str, tuple[str | None, str, str]] = {
    "bilinear": ("left", "right", "head"),
    "input_sum": (None, "W_right", "W_left"),
}
NORMS = ("layernorm", "rmsnorm")


class BilinearTCConfig(PretrainedConfig):
    """Shape of a `BilinearTC`, and where it belongs.

    Args:
        n_inputs: width of the MLP's input.
        n_hidden: number of bilinear units.
        n_outputs: width of the MLP's output.
        bias: whether the linear maps carry a bias (in form `input_sum` only `W_left` ever does).
        form: `"bilinear"` for `head(left(x) ⊙ right(x))`, or `"input_sum"` for
            `W_left((Σᵢ xᵢ) · (W_right x))`.
        base_model: the language model whose MLP the transcoder stands in for, as a Hub id or a folder.
        base_revision: revision of that model.
        layer_index: index of the layer in that model, counted from 0.
        mlp_path: the MLP's module path inside the causal language model, e.g. `"gpt_neox.layers.3.mlp"`, or of an MLP
            that is no module, those of its two ends, e.g. `"model.decoder.layers.3.fc1:fc2"`.
        input_correlation: whether the correlation of the inputs is stored with the weights.
        input_norm: `"layernorm"` or `"rmsnorm"` if the input leaves such a norm, whose weight and bias are then stored
            with the weights.

    The three widths have no defaults. They may be left out only because transformers itself builds
    `BilinearTCConfig()` to compare against; a model cannot be built from it.

    Raises:
        ValueError: a width that is not a whole number of at least 1, an unknown form or norm, a negative layer index,
            or the config.json at the root of a set, which only says where its layers are.
    """

    model_type = "bilinear_tc"

    def __init__(
        self,
        n_inputs: int | None = None,
        n_hidden: int | None = None,
        n_outputs: int | None = None,
        bias: bool = True,
        form: str = "bilinear",
        base_model: str | None = None,
        base_revision: str | None = None,
        layer_index: int | None = None,
        mlp_path: str | None = None,
        input_correlation: bool = False,
        input_norm: str | None = None,
        **kwargs: Any,
    ) -> None:
        if layers := kwargs.pop("layers", None):
            raise ValueError(
                f"This is a set, with a transcoder for each of layers {', '.join(map(str, layers))}: name one, as in "
                f'AutoModel.from_pretrained(…, subfolder="layer_{layers[0]}", trust_remote_code=True).'
            )
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, not {form!r}.")
        if input_norm not in (None, *NORMS):
            raise ValueError(f"input_norm must be one of {', '.join(map(repr, NORMS))} or None, not {input_norm!r}.")
        self.n_inputs: int = _whole_number("n_inputs", n_inputs, at_least=1)
        self.n_hidden: int = _whole_number("n_hidden", n_hidden, at_least=1)
        self.n_outputs: int = _whole_number("n_outputs", n_outputs, at_least=1)
        self.bias = bool(bias)
        self.form = form
        self.base_model = base_model
        self.base_revision = base_revision
        self.layer_index = _whole_number("layer_index", layer_index, at_least=0)
        self.mlp_path = mlp_path
        self.input_correlation = bool(input_correlation)
        self.input_norm = input_norm
        super().__init__(**kwargs)

    def __eq__(self, other: object) -> bool:
        # transformers 5 turns every configuration into a dataclass, whose own == would compare only the
        # fields that it declares itself.
        return type(other) is type(self) and self.__dict__ == other.__dict__

    @property
    def factors(self) -> tuple[str | None, str]:
        """The maps whose outputs are multiplied; None is the sum of the inputs."""
        return FORMS[self.form][:2]

    @property
    def last_map(self) -> str:
        """The map from the product to the output."""
        return FORMS[self.form][2]

    @property
    def maps(self) -> dict[str, tuple[int, int, bool]]:
        """Width of the input, width of the output and whether there is a bias, of each linear map of the model."""
        left, right = self.factors
        maps = {name: (self.n_inputs, self.n_hidden, self.bias and left is not None) for name in (left, right) if name}
        return {**maps, self.last_map: (self.n_hidden, self.n_outputs, self.bias)}

    @property
    def formula(self) -> str:
        """The z-scored output ŷ in terms of the z-scored input x̂, for a reader."""
        left, right = self.factors
        product = f"{left}(x̂) ⊙" if left else "(Σᵢ x̂ᵢ) ·"
        return f"{self.last_map}( {product} {right}(x̂) )"


def form_of(maps: Collection[str]) -> str | None:
    """The form that has maps of these names; None if no form has."""
    return next((form for form, names in FORMS.items() if set(maps) == {*names} - {None}), None)


def _whole_number(name: str, value: int | None, at_least: int) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, not {value!r}.")
    return int(value)


BilinearTCConfig.register_for_auto_class("AutoConfig")

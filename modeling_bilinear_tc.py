"""A bilinear transcoder: stands in for one MLP of a language model, with no element-wise non-linearity.

    x̂ = (x − input_mean) / input_std
    ŷ = head( left(x̂) ⊙ right(x̂) )
    y = ŷ · output_std + output_mean

Every output direction is therefore an exact quadratic form in the MLP's input, which `BilinearTC.quadratic_form`
reads from the weights. `BilinearTCSet` holds the transcoders of a base's layers, and `replaced` makes them a base's
MLPs. This file and `configuration_bilinear_tc.py` need only torch and transformers, with the huggingface_hub that it
needs itself.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .configuration_bilinear_tc import BilinearTCConfig

_DTYPE = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
STATISTICS = ("input_mean", "input_std", "output_mean", "output_std")


class QuadraticForm(NamedTuple):
    """`u·y = δᵀ Q δ + g·δ + c` with δ = x − about, for an output direction `u` and raw MLP inputs x.

    `...` are the direction's leading dimensions. Called on x [..., n_inputs], it is u·y [*directions, *rows].
    """

    quadratic: Tensor  # Q [..., n_inputs, n_inputs], symmetric
    linear: Tensor  # g [..., n_inputs]
    constant: Tensor  # c [...]
    about: Tensor  # [n_inputs]
    moved: Tensor  # [...]; what the gauge moved into the constant, 0 without one

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The quadratic part δᵀQδ and the linear part g·δ of u·y, each [*directions, *rows] for x [*rows, n_inputs]."""
        delta = (x - self.about).reshape(-1, x.shape[-1])  # [rows, n_inputs]
        shape = (*self.constant.shape, *x.shape[:-1])
        quadratic = (delta @ self.quadratic * delta).sum(-1)
        return quadratic.reshape(shape), (self.linear @ delta.T).reshape(shape)

    def __call__(self, x: Tensor) -> Tensor:
        quadratic, linear = self.parts(x)
        return quadratic + linear + self.constant.reshape((*self.constant.shape, *[1] * (x.ndim - 1)))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """`u·y = Σᵢ λᵢ (vᵢ·δ)² + g·δ + c` with δ = x − about, the eigenvalue of largest magnitude first.

    With the metric "euclidean" the eigenvectors are orthonormal. With "covariance" the features vᵢ·δ are uncorrelated
    and of variance 1 on the data, so that λᵢ tells how much a feature does there. Then vᵢ is what *reads* the feature;
    `tc.input_covariance() @ vᵢ` is how the input moves with it.

    Attributes:
        eigenvalues: λ [..., k].
        eigenvectors: [..., n_inputs, k]; column i, [..., :, i], belongs to eigenvalue i.
        linear, constant, about, moved: as in `QuadraticForm`.
        metric: "euclidean", "covariance", or "variances" if the covariance's diagonal is all that the layer stores.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    linear: Tensor
    constant: Tensor
    about: Tensor
    moved: Tensor
    metric: str
    _share: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def share(self) -> Tensor:
        """By how much of its variance u·y varies less without its first 1, 2, …, k quadratic terms, [..., k].

        The variance is exact for Gaussian inputs of the stored mean and covariance (Isserlis 1918):
        Var(δᵀQδ + g·δ) = 2 tr(QΣQΣ) + gᵀΣg about the mean. About the mean with the metric "covariance" the terms are
        independent of one another and of the linear part: the shares of all of them and (gᵀΣg) / Var add up to 1.
        About another point the terms and the linear part may cancel, and a share may be negative.

        It is computed when it is first asked for, at the cost of building Q.
        """
        return self._share()


class Truncated(NamedTuple):
    """A transcoder of fewer units, and the share of the full one's output variance that it misses."""

    transcoder: BilinearTC
    fvu: float


class PathCheck(NamedTuple):
    """What became of u·y once a path's units were removed, and how far their direct effect foretold it."""

    predicted: Tensor  # the direct effect [batch, seq], in the base as it is for this check
    change: Tensor  # u·y with the units minus u·y without them, [batch, seq]
    r2: float  # 1 − Σ(change − predicted)² / Σ change²; 0 is what a prediction of no change gets
    direct: float  # Σ predicted · change / Σ change², the part of the change that is direct


@dataclass(frozen=True, eq=False)
class UnitPath:
    """What units of an earlier layer do to u·y of a later one by the straight way; see `BilinearTCSet.path`.

    Attributes:
        units: their numbers.
        effects: of each unit at each token, [batch, seq, units], in the units of u·y.
        total: u·y with all of them minus u·y without, [batch, seq]; the sum of their effects.
        spliced: the check in the base with the whole set attached, or None.
        true: the check in the base with its own MLPs, or None.
    """

    units: list[int]
    effects: Tensor
    total: Tensor
    spliced: PathCheck | None = None
    true: PathCheck | None = None


class Norm(NamedTuple):
    """What a norm does: weight ⊙ n + bias, where n has mean square 1, and in a "layernorm" also mean 0."""

    kind: str
    weight: Tensor  # [width]
    bias: Tensor  # [width]


StandIn = Callable[[list[Tensor], Callable[[], Any], Callable[[], Any]], Any]


class Site(NamedTuple):
    """Where an MLP is in a base: its input enters one module, and its output leaves one, mostly the same.

    A site's path is the module's, `model.layers.3.mlp`, or two with a colon between, `model.layers.3.fc1:fc2`: the
    second is looked up from the parents of the first, the nearest before the others.
    """

    enter: nn.Module
    leave: nn.Module

    @contextmanager
    def replaced(self, stand_in: StandIn) -> Iterator[None]:
        """While the context lasts, `stand_in(entered, true, before)` says what leaves the MLP: it is given the tensors
        that entered, and functions that give what the MLP itself says, and what would leave it but for this context."""
        entered: list[Tensor] = []
        enter_before, leave_before = map(_forward, self)
        true_leave = _true_forward(self.leave)
        spliced = hasattr(leave_before, "true_forward")

        def enter(*args: Any, **kwargs: Any) -> Any:
            entered[:] = tensors_in(args, kwargs)
            return enter_before(*args, **kwargs)

        def leave(*args: Any, **kwargs: Any) -> Any:
            tensors = tensors_in(args, kwargs) if self.leave is self.enter else entered.copy()
            entered.clear()
            true = partial(true_leave, *args, **kwargs)
            return stand_in(tensors, true, partial(leave_before, *args, **kwargs) if spliced else true)

        with ExitStack() as stack:
            if self.leave is not self.enter:
                stack.enter_context(_forward_replaced(self.enter, enter))
            stack.enter_context(_forward_replaced(self.leave, leave))
            yield


class BilinearTC(PreTrainedModel):
    """Bilinear transcoder of one MLP: raw MLP inputs [..., n_inputs] to raw MLP outputs [..., n_outputs].

    In form `bilinear` the parameters are the linear maps `left`, `right` (n_inputs → n_hidden) and `head`
    (n_hidden → n_outputs). In form `input_sum` they are `W_right` (n_inputs → n_hidden, no bias) and `W_left`
    (n_hidden → n_outputs). The z-score statistics `input_mean`, `input_std` [n_inputs] and `output_mean`,
    `output_std` [n_outputs] are persistent buffers, 0 and 1 in a new model. They stay in float32 (or wider)
    when the model is cast to half precision: rounded to bfloat16, a mean far from 0 would shift every input.
    So do two more, which only readings of the weights use: `input_correlation` [n_inputs, n_inputs], if the
    configuration has it, and `norm_weight` and `norm_bias` [n_inputs] of the norm that the inputs leave.

    Example:
        >>> base = AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-410m")
        >>> tc = AutoModel.from_pretrained(repo, subfolder="layer_3", trust_remote_code=True)
        >>> x, y = tc.capture(base, input_ids=input_ids)
        >>> unexplained = (y - tc(x)).square().sum() / (y - y.mean((0, 1))).square().sum()
        >>> with tc.attached(base):
        ...     logits = base(input_ids=input_ids).logits
    """

    config_class = BilinearTCConfig
    main_input_name = "x"
    _no_split_modules = ["BilinearTC"]  # noqa: RUF012  (so declared by the base class)
    # transformers 4 would otherwise take the dtype of the first tensor, a statistic, for that of all.
    _supports_param_buffer_assignment = False
    # There is no attention, so that what a caller asks of it is accepted (transformers 4.51 looks at these names).
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn_2 = True

    config: BilinearTCConfig
    left: nn.Linear
    right: nn.Linear
    head: nn.Linear
    W_left: nn.Linear
    W_right: nn.Linear
    input_mean: Tensor
    input_std: Tensor
    output_mean: Tensor
    output_std: Tensor
    input_correlation: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, config: BilinearTCConfig) -> None:
        super().__init__(config)
        for name in ("n_inputs", "n_hidden", "n_outputs"):
            if getattr(config, name) is None:
                raise ValueError(f"A BilinearTC cannot be built without {name}: set it in the BilinearTCConfig.")
        for name, (inputs, outputs, bias) in config.maps.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=bias))
        dtype = _at_least_float32(torch.get_default_dtype())
        self.register_buffer("input_mean", torch.zeros(config.n_inputs, dtype=dtype))
        self.register_buffer("input_std", torch.ones(config.n_inputs, dtype=dtype))
        self.register_buffer("output_mean", torch.zeros(config.n_outputs, dtype=dtype))
        self.register_buffer("output_std", torch.ones(config.n_outputs, dtype=dtype))
        if config.input_correlation:
            self.register_buffer("input_correlation", torch.eye(config.n_inputs, dtype=dtype))
        if config.input_norm is not None:
            self.register_buffer("norm_weight", torch.ones(config.n_inputs, dtype=dtype))
            self.register_buffer("norm_bias", torch.zeros(config.n_inputs, dtype=dtype))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`, for which transformers before 4.56 knows `dtype` as `torch_dtype`."""
        if _DTYPE != "dtype" and "dtype" in kwargs:
            kwargs[_DTYPE] = kwargs.pop("dtype")
        return super().from_pretrained(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Map MLP inputs to MLP outputs.

        Args:
            x: raw MLP inputs [..., n_inputs] of any floating-point dtype. The z-scores are computed in float32
                or wider, the products in the dtype of the model's weights. Where these are quantized, that is the
                dtype of the last map's bias, or of x without one.

        Returns:
            Raw MLP outputs [..., n_outputs], in the dtype of the products.

        Raises:
            ValueError: x is not a floating-point tensor whose last dimension is n_inputs.
        """
        return self._output(self.units(x))

    def normalized_forward(self, x: Tensor) -> Tensor:
        """Map z-scored inputs x̂ [..., n_inputs] to z-scored outputs ŷ [..., n_outputs]; this is what a fit trains.

        Form `input_sum` is the published formula `W_left @ (x ⊙ (W_right @ x)) + bias` with the product read as an
        outer product summed over the input axis: Σᵢ xᵢ · (W_right x), computed without the outer product.
        """
        return self._last_map(self._products(x))

    def units(self, x: Tensor) -> Tensor:
        """The hidden products left(x̂) ⊙ right(x̂) of raw MLP inputs; in form `input_sum` (Σᵢ x̂ᵢ) · W_right(x̂).

        They are in the units of the z-scores, in which the last map's columns are too: unit k adds
        `units[..., k] · head.weight[:, k]` to ŷ, and that times `output_std` to y. (`folded().units(x)` has products of
        raw inputs, and columns in raw outputs.)

        Args:
            x: raw MLP inputs [..., n_inputs], as for `forward`.

        Returns:
            [..., n_hidden], in the dtype of the products.

        Raises:
            ValueError: x is not a floating-point tensor whose last dimension is n_inputs.
        """
        n_inputs = self.input_mean.shape[0]
        if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != n_inputs:
            raise ValueError(
                f"A BilinearTC takes floating-point MLP inputs of shape [..., {n_inputs}], "
                f"not {x.dtype} of shape {list(x.shape)}."
            )
        dtype = self._product_dtype(x)
        return self._products(((_widened(x) - self.input_mean) / self.input_std).to(dtype))

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        return next((p.dtype for p in self._last_map.parameters() if not _is_quantized(p)), x.dtype)

    def _products(self, x: Tensor) -> Tensor:
        if self.config.form == "bilinear":
            return self.left(x) * self.right(x)
        return x.sum(-1, keepdim=True) * self.W_right(x)

    def _output(self, units: Tensor) -> Tensor:
        y = _widened(self._last_map(units)) * self.output_std + self.output_mean
        return y.to(self._product_dtype(units))

    def capture(self, base: Any, *args: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the base up to this layer's MLP, and return what enters and leaves it.

        Inside `attached` the input is the one that the base as spliced produces, and the output is still the true
        MLP's on it.

        Args:
            base: the language model, with its language-model head or without; an nnsight `LanguageModel` or a
                TransformerLens `TransformerBridge` of it does too.
            inputs: arguments of the base's forward pass, such as `input_ids` [batch, seq]. Those of a bridge go to the
                model inside it, unless the first is given by position, as in `capture(bridge, "text")`.

        Returns:
            The MLP's input [batch, seq, n_inputs] and its output [batch, seq, n_outputs], without gradients.

        Raises:
            ValueError: the base does not have this transcoder's MLP, or it takes or returns something else.
            RuntimeError: the forward pass never came to that MLP.
        """
        return _capture([self], base, args, inputs)[0]

    @contextmanager
    def attached(
        self,
        base: Any,
        *,
        scale: Mapping[int, float | Tensor] | None = None,
        add: Mapping[int, float | Tensor] | None = None,
        error_term: bool | Tensor = False,
    ) -> Iterator[Any]:
        """While the context lasts, the base runs with this transcoder in place of its MLP, in `generate` too.

        The base's modules, parameters and hooks stay as they are: only the MLP's `forward` is replaced (of an MLP that
        is no module, those of its two ends), and put back on exit, also after an exception. The transcoder computes on
        its own device and in its own dtype; its output goes to the device and dtype of the MLP's input. Gradients flow
        through it. Contexts may be nested: of those at one MLP, the innermost counts alone.

        Args:
            base: the language model, with its language-model head or without; an nnsight `LanguageModel` or a
                TransformerLens `TransformerBridge` of it does too, and its traces and hooks then see the transcoder's
                output as the MLP's.
            scale: what hidden units (see `units`) are multiplied by: 0.0 switches one off.
            add: what is added to hidden units after that, a number or a tensor that broadcasts to [batch, seq].
            error_term: True adds the transcoder's error, true output minus its own without edits, taken in the same
                pass and without gradients. If nothing is edited, the base's outputs stay as they are, to the bit;
                gradients go through the transcoder, and so does an edit of its units. But layers that come after an
                edit, with error terms too, answer it as the true MLPs would. If their transcoders are to answer it,
                give the errors of the pass without the edit: `y - tc(x)` of a `capture` of the same tokens, a tensor
                [batch, seq, n_outputs].

        Yields:
            The base.

        Raises:
            ValueError: the base does not have this transcoder's MLP, its widths differ, or it takes or returns more
                than one tensor; an edit names a unit that does not exist; the error is of another shape.
        """
        scale, add = scale or {}, add or {}
        self._check_units({*scale, *add})
        site = self._find_site(base)
        self._check_replaceable(site, _torch_module(base))

        def stand_in(entered: list[Tensor], true: Callable[[], Any], _before: Callable[[], Any]) -> Tensor:
            x = self._input(entered)
            own_x = x.to(self.input_mean.device)
            y = (self._output(_edited(self.units(own_x), scale, add)) if scale or add else self(own_x)).to(x)
            if error_term is False:
                return y
            if isinstance(error_term, Tensor):
                if error_term.numel() != y.numel():
                    raise ValueError(
                        f"error_term has shape {list(error_term.shape)}, but the MLP's output {list(y.shape)}."
                    )
                return y + error_term.detach().to(y).reshape(y.shape)
            with torch.no_grad():
                true_y = true()
                plain = self(own_x).to(x) if scale or add else y
            return true_y + (y - plain.detach())  # in this order it is true_y to the bit where nothing is edited

        with site.replaced(stand_in):
            yield base

    @torch.no_grad()
    def folded(self) -> BilinearTC:
        """The same map as a transcoder of form `bilinear` with the z-scores folded into its weights and biases.

        Its statistics are 0 and 1, so its weights act on raw MLP inputs and outputs, and it no longer knows where the
        data lies: read spectra from the transcoder itself. It has biases, and is at least in float32. Folded means that
        are far larger than the standard deviations cost digits: fold a model in float64 if that matters.
        """
        config = copy.deepcopy(self.config)
        config.form, config.bias, config.input_correlation, config.input_norm = "bilinear", True, False, None
        with torch.device("meta"):
            folded = BilinearTC(config)
        weights = self._weights()
        raw = {"head.weight": weights.head, "head.bias": weights.bias}
        for name, weight, bias in (
            ("left", weights.left, weights.left_bias),
            ("right", weights.right, weights.right_bias),
        ):
            raw[f"{name}.weight"] = weight / weights.std
            raw[f"{name}.bias"] = bias - raw[f"{name}.weight"] @ weights.mean
        device, dtype = self.input_mean.device, self._reading_dtype
        state = {name: tensor.to(device, dtype, copy=True).contiguous() for name, tensor in raw.items()}
        for name in STATISTICS:
            fill = torch.zeros_like if name.endswith("mean") else torch.ones_like
            state[name] = fill(getattr(self, name), dtype=dtype)
        folded.load_state_dict(state, assign=True)
        return folded.train(self.training)

    # Reading the weights. Each result is computed in float64 (a few eigenvalues of a wide layer: in the dtype of the
    # weights) and returned in the dtype of the weights, or float32 if that is wider. ValueError if a direction is of
    # another width, or the weights are quantized.

    @torch.no_grad()
    def quadratic_form(
        self, direction: Tensor, about: str | Tensor = "mean", gauge: str | None = None
    ) -> QuadraticForm:
        """The exact quadratic form of output directions in the raw MLP input: u·y = δᵀQδ + g·δ + c, δ = x − about.

        About the data's mean the quadratic part is what bends on the data. About the origin, far from it, it is mostly
        a constant and a slope, which the linear part takes back.

        Behind a LayerNorm the inputs lie on an ellipsoid in a plane, behind an RMSNorm on an ellipsoid: n = (x − norm's
        bias) / norm's weight has mean square 1, and mean 0. Forms that differ by a multiple of n·n − n_inputs, or by a
        product with n's mean, are then the same on all data. A gauge takes one of them, in n's coordinates: nothing
        outside the plane, and of Q − t·1 that of smallest nuclear norm (t is the median of Q's eigenvalues).
        t·n_inputs moves into the constant: `moved`. The form is then u·y only on such inputs, up to the
        norm's eps: n·n is n_inputs · s / (s + eps), s the variance (mean square) of what enters it.

        Args:
            direction: u [..., n_outputs].
            about: "mean" (the stored input mean), "origin", or a raw input [n_inputs].
            gauge: None, or "layernorm" or "rmsnorm", of which the layer must have stored the norm's weight and bias.

        Returns:
            `QuadraticForm(Q, g, c, about, moved)`.

        Raises:
            ValueError: also if there is no such point or gauge, or the inputs leave no such norm.
        """
        weights, u, point = self._weights(), self._directions(direction), self._expansion_point(about)
        self._check_gauge(gauge)
        forms = [weights.form(row, weights.z(point), gauge) for row in u.reshape(-1, u.shape[-1])]
        quadratic, linear, constant, moved = (torch.stack(part) for part in zip(*forms, strict=True))
        leading, std = direction.shape[:-1], weights.std
        return QuadraticForm(
            quadratic=self._out(quadratic / (std[:, None] * std), leading),
            linear=self._out(linear / std, leading),
            constant=self._out(constant, leading),
            about=self._out(point),
            moved=self._out(moved, leading),
        )

    @torch.no_grad()
    def spectrum(
        self,
        direction: Tensor,
        k: int | None = None,
        about: str | Tensor = "mean",
        metric: str = "covariance",
        gauge: str | None = None,
    ) -> Spectrum:
        """Eigenvalues and eigenvectors of the quadratic part of output directions, by magnitude, the largest first.

        Above width 256 a few eigenvalues are found by Lanczos iterations without building Q, for all directions at
        once, unless there is a gauge, which depends on all eigenvalues.

        Args:
            direction: u [..., n_outputs].
            k: how many; default: all.
            about, gauge: as for `quadratic_form`.
            metric: "covariance": of Σ^½ Q Σ^½, which weighs directions by how far the data moves along them, Σ the
                stored covariance (its diagonal, if only that is stored); input directions without any variance are left
                out. "euclidean": of Q.

        Returns:
            A `Spectrum`: u·y = Σᵢ λᵢ (vᵢ·δ)² + g·δ + c if k is None.

        Raises:
            ValueError: as for `quadratic_form`, and if k or the metric is none of these.
        """
        n = self.config.n_inputs
        k = n if k is None else k
        if not 1 <= k <= n:
            raise ValueError(f"A spectrum has 1 to {n} eigenvalues, not k={k}.")
        if metric not in ("covariance", "euclidean"):
            raise ValueError(f"The metric of a spectrum is 'covariance' or 'euclidean', not {metric!r}.")
        weights, point = self._weights(), self._expansion_point(about)
        self._check_gauge(gauge)
        u = self._directions(direction).reshape(-1, self.config.n_outputs)
        z0 = weights.z(point)
        scale, inverse = (1 / weights.std, weights.std) if metric == "euclidean" else weights.spread
        if gauge is None and n > 256 and 8 * k <= n:
            values, vectors = weights.top(u, scale, k)
            linear, constant = weights.tangents(u, z0)
            moved = torch.zeros_like(constant)
        else:
            each = []
            for row in u:
                quadratic, *rest = weights.form(row, z0, gauge)
                all_values, all_vectors = torch.linalg.eigh(_congruent(quadratic, scale))
                order = all_values.abs().argsort(descending=True, stable=True)[:k]
                each.append((all_values[order], all_vectors[:, order], *rest))
            values, vectors, linear, constant, moved = (torch.stack(part) for part in zip(*each, strict=True))
        rows = vectors.mT * inverse if inverse.ndim == 1 else vectors.mT @ inverse.T  # in one product of matrices
        vectors = (rows / weights.std).mT
        leading = direction.shape[:-1]

        def share() -> Tensor:
            each = zip(u, values, vectors, strict=True)
            return self._out(torch.stack([weights.shares(*terms, z0, gauge) for terms in each]), leading)

        return Spectrum(
            eigenvalues=self._out(values, leading),
            eigenvectors=self._out(vectors, leading),
            linear=self._out(linear / weights.std, leading),
            constant=self._out(constant, leading),
            about=self._out(point),
            moved=self._out(moved, leading),
            metric="variances" if metric == "covariance" and not self.config.input_correlation else metric,
            _share=share,
        )

    @torch.no_grad()
    def interaction(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """How pairs of input directions multiply in an output direction: DᵀQD, without building Q.

        Args:
            direction: u [..., n_outputs].
            inputs: D [n_inputs, m], such as eigenvectors, the transposed decoder of an SAE, or `writers().T` of an
                earlier layer (times the norm's weight, if it writes in front of one).

        Returns:
            [..., m, m], symmetric: its entry i, j is what moving along directions i and j adds to u·y, twice for i ≠ j.
        """
        weights, u = self._weights(), self._directions(direction)
        if inputs.ndim != 2 or len(inputs) != self.config.n_inputs:
            raise ValueError(
                f"Input directions have shape [{self.config.n_inputs}, m], not {list(inputs.shape)} as given."
            )
        d = _float64(inputs).to(u.device) / weights.std[:, None]
        left, right, g = weights.left @ d, weights.right @ d, u @ weights.head
        each = [_symmetric((left.T * row) @ right) for row in g.reshape(-1, g.shape[-1])]
        return self._out(torch.stack(each), direction.shape[:-1])

    @torch.no_grad()
    def writers(self) -> Tensor:
        """What each unit writes into the raw output per unit of its product, [n_hidden, n_outputs]."""
        return self._out(self._weights().head.T)

    @torch.no_grad()
    def input_covariance(self) -> Tensor:
        """Covariance [n_inputs, n_inputs] of the raw inputs, or, if only that is stored, its diagonal."""
        weights = self._weights()
        correlation = (
            torch.eye(len(weights.std)).to(weights.std) if weights.correlation is None else weights.correlation
        )
        return self._out(weights.std[:, None] * correlation * weights.std)

    @torch.no_grad()
    def logit_direction(
        self, base: nn.Module, token: int | str, minus: int | str | None = None, tokenizer: Any = None
    ) -> Tensor:
        """The output direction u [n_outputs] along which the MLP raises one token's logit over another's.

        That is its direct effect: the difference of the tokens' rows of the output embedding, times the final norm's
        weight, and centered if that is a LayerNorm. u·y / (what the final norm divides by, at a token) is what y adds
        to the difference of the logits there. If the base norms an MLP's output before adding it (Gemma 2, OLMo 2),
        multiply u by that norm's weight.

        Args:
            base: the language model, with its language-model head.
            token: a token's id, or its text, such as " None".
            minus: the other token; default: the mean over the vocabulary, as a softmax takes it.
            tokenizer: for texts; default: the one that lies beside the base.

        Raises:
            ValueError: a text is not one token, or the base has no output embedding of this transcoder's width.
        """
        embedding: Any = getattr(base, "get_output_embeddings", lambda: None)()
        weight = getattr(embedding, "weight", None)
        if weight is None or weight.shape[-1] != self.config.n_outputs:
            raise ValueError(f"{self._belongs()} this base has no output embedding of width {self.config.n_outputs}.")
        if tokenizer is None and (isinstance(token, str) or isinstance(minus, str)):
            tokenizer = AutoTokenizer.from_pretrained(base.name_or_path)

        def row(token: int | str) -> Tensor:
            ids = tokenizer.encode(token, add_special_tokens=False) if isinstance(token, str) else [token]
            if len(ids) != 1 or not 0 <= ids[0] < len(weight):
                raise ValueError(f"A logit is of one token of {len(weight)}, but {token!r} is {ids}.")
            return weight[ids[0]]

        against = weight.float().mean(0) if minus is None else row(minus)
        u = _float64(row(token)) - _float64(against)
        norm = norm_before(embedding, base)
        if norm is not None:
            u = u * norm.weight.to(u.device)
            u = u - u.mean() if norm.kind == "layernorm" else u
        return self._out(u)

    @torch.no_grad()
    def truncated(self, n_units: int | None = None, variance: float | None = None) -> Truncated:
        """A transcoder of this one's strongest units alone, by the variance of what each writes into z-scored outputs.

        Variances are exact for Gaussian inputs of the stored mean and covariance. If the whole covariance is stored,
        the head is solved again by least squares, so that the units kept stand in for those dropped, which are
        correlated with them; otherwise it is kept. What the dropped units say on average goes into the bias.

        Args:
            n_units: how many units to keep.
            variance: or the share of the outputs' variance to keep, in as few units as that takes in their order.

        Returns:
            `Truncated(transcoder, fvu)`: fvu = Σ‖ŷ − ŷ'‖² / Σ‖ŷ − mean(ŷ)‖² of this transcoder's z-scored outputs ŷ.

        Raises:
            ValueError: unless one of the two is given, 1 to n_hidden or a share from 0 to 1.
        """
        count = self.config.n_hidden
        if (n_units is None) == (variance is None) or not (1 <= (n_units or 1) <= count and 0 <= (variance or 0) <= 1):
            raise ValueError(
                f"Give n_units from 1 to {count}, or variance from 0 to 1, not n_units={n_units}, variance={variance}."
            )
        weights = self._weights()
        units = weights.units()
        covariance = units.covariance(units)
        head = weights.head / _float64(self.output_std)[:, None]
        order = (head.square().sum(0) * covariance.diagonal()).argsort(descending=True, stable=True)
        head, covariance, mean = head[:, order], covariance[order][:, order], units.mean()[order]
        if self.config.input_correlation:
            # p = C e, e white: the first n units span e's first n, and what is lost is the rest
            covariance.diagonal().mul_(1 + 1e-10).add_(1e-12 * covariance.diagonal().max())
            root = torch.linalg.cholesky(covariance)
            written = head @ root
            lost = written.square().sum(0).flip(0).cumsum(0).flip(0)
        else:
            pairs = (head.T @ head * covariance).flip(0, 1)
            lost = pairs.cumsum(0).cumsum(1).diagonal().flip(0)
        lost = torch.cat([lost / lost[0].clamp(min=1e-300), lost.new_zeros(1)])  # [n_hidden + 1], by units kept
        n = max(1, int((lost > 1 - variance).sum())) if variance is not None else int(n_units or 1)
        kept = head[:, :n]
        if self.config.input_correlation:
            kept = torch.linalg.solve_triangular(root[:n, :n], written[:, :n], upper=False, left=False)
        config = copy.deepcopy(self.config)
        config.n_hidden, config.bias = n, True
        model = BilinearTC(config).to(self._last_map.weight)  # type: ignore[arg-type] # transformers hides the types
        model.load_state_dict(dict(self.named_buffers()), strict=False)
        for name in filter(None, config.factors):
            old, new = getattr(self, name), getattr(model, name)
            new.weight.copy_(old.weight[order[:n]])
            if new.bias is not None:
                new.bias.copy_(0 * order[:n] if old.bias is None else old.bias[order[:n]])
        model._last_map.weight.copy_(kept)
        bias = (weights.bias - _float64(self.output_mean)) / _float64(self.output_std)
        model._last_map.bias.copy_(bias + head @ mean - kept @ mean[:n])
        return Truncated(model.train(self.training), lost[n].item())

    @torch.no_grad()
    def similarity(self, other: BilinearTC) -> float:
        """How alike two transcoders are as maps, −1 to 1: E[a·b] / √(E[a·a] E[b·b]) of their centered raw outputs a, b.

        It is exact for Gaussian inputs of this one's stored mean and covariance, from the weights alone (compare tensor
        similarity, arXiv 2605.15183): it depends on what the two compute, not on how their units share it.

        Raises:
            ValueError: the two are of other widths, or quantized.
        """
        if (self.config.n_inputs, self.config.n_outputs) != (other.config.n_inputs, other.config.n_outputs):
            raise ValueError(
                f"Transcoders are compared on the same inputs and outputs, but these map {self.config.n_inputs} to "
                f"{self.config.n_outputs} and {other.config.n_inputs} to {other.config.n_outputs}."
            )
        mine, theirs = self._weights(), other._weights()
        scale, shift = mine.std / theirs.std, (mine.mean - theirs.mean) / theirs.std
        a, b = mine.units(), theirs.units(mine.spread[0], scale, shift)
        sides = ((a, mine.head), (b, theirs.head))
        (aa, ab), (_, bb) = [[p.inner(head, q, other_head) for q, other_head in sides] for p, head in sides]
        return (ab / (aa * bb).sqrt()).item()

    @property
    def _last_map(self) -> nn.Linear:
        return getattr(self, self.config.last_map)

    @property
    def _reading_dtype(self) -> torch.dtype:
        return _at_least_float32(self._last_map.weight.dtype)

    def _out(self, reading: Tensor, leading: Sequence[int] | None = None) -> Tensor:
        """As it is returned; the first dimension, of directions, with these dimensions in its place."""
        reading = reading.to(self.input_mean.device, self._reading_dtype)
        return reading if leading is None else reading.reshape((*leading, *reading.shape[1:]))

    def _weights(self) -> _Weights:
        """The weights as they are read, a copy that is kept until one of them changes (other than through `.data`)."""
        kept = _WEIGHTS.get(self)
        if kept is None or not kept.are_of(self):
            _WEIGHTS.pop(self, None)  # the old copy need not wait for the new one
            kept = _WEIGHTS[self] = _Weights(self)
        return kept

    def _directions(self, direction: Tensor) -> Tensor:
        n_outputs = self.config.n_outputs
        if direction.ndim == 0 or direction.shape[-1] != n_outputs:
            raise ValueError(f"An output direction has shape [..., {n_outputs}], not {list(direction.shape)} as given.")
        return _float64(direction).to(self._weights().left.device)

    def _expansion_point(self, about: str | Tensor) -> Tensor:
        mean = self._weights().mean
        if isinstance(about, Tensor) and about.shape == mean.shape:
            return _float64(about).to(mean.device)
        if isinstance(about, str) and about in ("mean", "origin"):
            return mean if about == "mean" else torch.zeros_like(mean)
        given = list(about.shape) if isinstance(about, Tensor) else repr(about)
        raise ValueError(f"A form is about 'mean', 'origin' or an input of shape {list(mean.shape)}, not {given}.")

    def _check_units(self, units: Iterable[int]) -> None:
        for unit in units:
            if unit not in range(self.config.n_hidden):
                raise ValueError(f"The hidden units are 0 to {self.config.n_hidden - 1}, but {unit!r} is named.")

    def _check_gauge(self, gauge: str | None) -> None:
        known = self.config.input_norm
        if gauge not in (None, "layernorm", "rmsnorm"):
            raise ValueError(f"A gauge is 'layernorm', 'rmsnorm' or None, not {gauge!r}.")
        if gauge is not None and known not in (gauge, "layernorm"):  # what leaves a LayerNorm is on a sphere as well
            raise ValueError(f"Gauge {gauge!r} needs inputs that leave such a norm, but this layer stores {known}.")

    def _find_site(self, base: Any) -> Site:
        """This transcoder's MLP in a causal language model, in the inner model of one, or in a wrapper (torch.compile,
        peft, nnsight, TransformerLens) of either."""
        path = self.config.mlp_path
        if path is None:
            raise ValueError(
                "This transcoder does not say which MLP it stands in for: set tc.config.mlp_path, "
                "e.g. 'gpt_neox.layers.3.mlp'."
            )
        base = _torch_module(base)
        # A TransformerLens bridge puts a module of its own around each of the base's.
        modules = {name.replace("._original_component", ""): module for name, module in base.named_modules()}
        inner_path = path.removeprefix(f"{getattr(base, 'base_model_prefix', '')}.")
        names = site_names(modules, path) or site_names(modules, inner_path)
        if names is None:
            raise ValueError(f"{self._belongs()} this base ({type(base).__name__}) has no module of that name.")
        return Site(*(modules[name] for name in names))

    def _belongs(self) -> str:
        home = f" of {self.config.base_model}" if self.config.base_model else ""
        return (
            f"This transcoder stands in for {self.config.mlp_path}{home}, "
            f"from width {self.config.n_inputs} to {self.config.n_outputs}, but"
        )

    def _check_replaceable(self, site: Site, base: nn.Module) -> None:
        """Try the true MLP (of a pair, its last map on its first's output) on one row of zeros: no reading of its
        weights could tell as surely what it takes and returns."""
        weights = [*site.enter.parameters(), *base.parameters()]
        device = torch.device("cpu") if weights[0].is_meta else weights[0].device  # an offloaded MLP's hook moves it
        dtype = next(w.dtype for w in weights if w.is_floating_point() and w.dtype.itemsize > 1)  # not quantized
        y: Any = torch.zeros(1, 1, self.config.n_inputs, dtype=dtype, device=device)
        generators = [device] if device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(generators):
                for module in dict.fromkeys(site):
                    with _hooks_silenced(module):
                        y = _true_forward(module)(y)
        except torch.cuda.OutOfMemoryError:  # a RuntimeError that tells nothing about widths
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            hidden_size = getattr(getattr(base, "config", None), "hidden_size", "unknown")
            raise ValueError(
                f"{self._belongs()} in this base (hidden size {hidden_size}) it does not take one tensor of that width."
            ) from error
        self._check_mlp_output(y)
        if y.shape[-1] != self.config.n_outputs:
            raise ValueError(f"{self._belongs()} in this base it returns width {y.shape[-1]}.")

    def _check_is_of(self, base: nn.Module) -> None:
        """By name, where both have one: a base in a folder may be a copy."""
        named, here = self.config.base_model, getattr(base, "name_or_path", "")
        if named and here and named != here and not Path(here).is_dir():
            raise ValueError(f"{self._belongs()} this base is {here}; if that is a copy, set base.name_or_path.")

    def _alone(self) -> BilinearTC:
        """The same map in the same memory, without what only readings of the weights use."""
        config = copy.deepcopy(self.config)
        config.input_correlation, config.input_norm = False, None
        with torch.device("meta"):
            alone = BilinearTC(config)
        alone.load_state_dict(self.state_dict(), strict=False, assign=True)
        return alone.train(self.training)

    def _check_mlp_output(self, y: Any) -> None:
        if not isinstance(y, Tensor):
            raise ValueError(f"{self._belongs()} in this base it returns a {type(y).__name__}, not one tensor.")

    def _input(self, entered: list[Tensor]) -> Tensor:
        if len(entered) != 1:
            raise ValueError(f"{self._belongs()} in this base it takes {len(entered)} tensors, not one.")
        return entered[0]

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialization of a Linear, uniform in ±1/√fan_in, and identity statistics; what a checkpoint
        has loaded already is left alone."""
        if isinstance(module, nn.Linear):
            if _is_missing(module.weight):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None and _is_missing(module.bias):
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.bias, -bound, bound)
        elif module is self:
            for name, buffer in self.named_buffers():
                if _is_missing(buffer) and name == "input_correlation":
                    nn.init.eye_(buffer)
                elif _is_missing(buffer):
                    nn.init.constant_(buffer, 0.0 if name.endswith(("mean", "norm_bias")) else 1.0)

    def _check_and_adjust_attn_implementation(self, *_: Any, **__: Any) -> str:
        return "eager"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BilinearTC:
        """Every cast and move of a module comes through here: the statistics move, but are not narrowed."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, statistic in before.items():
            device, dtype = getattr(self, name).device, getattr(self, name).dtype
            if dtype != _at_least_float32(dtype):
                setattr(self, name, statistic.to(device, _at_least_float32(dtype)))
        return self


def site_names(modules: Collection[str], path: str) -> tuple[str, str] | None:
    """The full names of a site's two modules among a base's, or those of a wrapper of it; None if it has none such."""
    enter, _, leave = path.partition(":")
    wrapped = [name for name in modules if name.endswith(f".{enter}")]
    for first in [enter] if enter in modules else wrapped if len(wrapped) == 1 else []:
        parents = first.split(".")[:-1]
        for depth in range(len(parents), -1, -1):
            last = ".".join([*parents[:depth], leave]) if leave else first
            if last in modules:
                return first, last
    return None


class _Weights:
    """A transcoder's weights as they are read: from z-scored inputs z to raw outputs, in float64."""

    def __init__(self, tc: BilinearTC) -> None:
        for name, parameter in tc.named_parameters():
            if _is_quantized(parameter):
                raise ValueError(
                    f"Quadratic forms are read from whole weights, but {name} is quantized ({parameter.dtype}): "
                    "load the transcoder without a quantization_config."
                )
        # aliases, so that no other tensor comes to lie at their addresses
        self._seen = [(tensor.detach(), _version(tensor)) for tensor in _state(tc)]
        last, factors = tc._last_map, [getattr(tc, name) if name else None for name in tc.config.factors]
        shape = (tc.config.n_hidden, tc.config.n_inputs)
        ones = last.weight.detach().new_ones(1, 1).expand(shape)  # the sum of the inputs, for every unit
        self.maps = [_on_float64_device(_widened(ones if map is None else map.weight.detach())) for map in factors]
        self.left_bias, self.right_bias = (
            _float64(last.weight.detach()[0] * 0 if map is None or map.bias is None else map.bias.detach())
            for map in factors
        )
        self.mean, self.std, output_mean, output_std = (_float64(getattr(tc, name)) for name in STATISTICS)
        self.head = _float64(last.weight.detach()) * output_std[:, None]
        self.bias = output_mean + (0 if last.bias is None else _float64(last.bias.detach()) * output_std)
        self.correlation = _float64(tc.input_correlation) if tc.config.input_correlation else None
        if tc.config.input_norm is not None:
            self.norm_weight, self.norm_bias = _float64(tc.norm_weight), _float64(tc.norm_bias)

    @cached_property
    def left(self) -> Tensor:
        return _float64(self.maps[0])

    @cached_property
    def right(self) -> Tensor:
        return _float64(self.maps[1])

    def are_of(self, tc: BilinearTC) -> bool:
        now = _state(tc)
        return len(now) == len(self._seen) and all(
            (tensor.data_ptr(), tensor.dtype, tensor.device) == (seen.data_ptr(), seen.dtype, seen.device)
            and -1 != _version(tensor) == version
            for tensor, (seen, version) in zip(now, self._seen, strict=True)
        )

    def z(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    @cached_property
    def spread(self) -> tuple[Tensor, Tensor]:
        """F with F Fᵀ = the covariance of z, and F⁻ᵀ, each [n_inputs, n_inputs], or a diagonal [n_inputs].

        Where z varies by less than float32 can tell, F⁻ᵀ is 0.
        """
        if self.correlation is None:
            return torch.ones_like(self.std), torch.ones_like(self.std)
        variances, vectors = torch.linalg.eigh(_symmetric(self.correlation))
        varies = variances > 1e-6
        root = torch.where(varies, variances.clamp(min=0), 0).sqrt()
        return vectors * root, vectors * torch.where(varies, 1 / root, 0)

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What each unit multiplies, [..., n_hidden] twice, for z [..., n_inputs]."""
        return z @ self.left.T + self.left_bias, z @ self.right.T + self.right_bias

    def tangents(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Slope [..., n_inputs] and value [...] of output directions u [..., n_outputs] at z [n_inputs], or of one u
        [n_outputs] at rows z [..., n_inputs]."""
        g, (left, right) = u @ self.head, self.factors(z)
        return (g * right) @ self.left + (g * left) @ self.right, (g * left * right).sum(-1) + u @ self.bias

    def form(self, u: Tensor, z: Tensor, gauge: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, slope and value about z of one output direction, and what the gauge moved into the value."""
        g = u @ self.head
        half = torch.zeros_like(self.left[:0].T @ self.right[:0])
        for part in torch.arange(len(g), device=g.device).split(4096):  # bounds the memory
            half.addmm_((self.left[part] * g[part, None]).T, self.right[part])
        quadratic = _symmetric(half)
        if gauge is None:
            return quadratic, *self.tangents(u, z), g.new_zeros(())
        center, radii = self.z(self.norm_bias), self.norm_weight / self.std  # z = center + radii ⊙ n
        linear, constant = self.tangents(u, center)
        quadratic, linear = radii[:, None] * quadratic * radii, radii * linear
        plane = torch.eye(len(radii), dtype=radii.dtype, device=radii.device)
        if gauge == "layernorm":
            plane -= 1 / len(radii)
            quadratic, linear = plane @ quadratic @ plane, plane @ linear
        values = torch.linalg.eigvalsh(quadratic)
        if gauge == "layernorm":  # the plane's normal has an eigenvalue of 0, which is none of the plane's
            normal = values.abs().argmin()
            values = torch.cat([values[:normal], values[normal + 1 :]])
        shift = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        moved = shift * len(radii)
        quadratic = _symmetric(quadratic - shift * plane) / (radii[:, None] * radii)
        delta = z - center
        linear = linear / radii
        constant = constant + moved + linear @ delta + delta @ quadratic @ delta
        return quadratic, linear + 2 * quadratic @ delta, constant, moved

    def top(self, u: Tensor, scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues by magnitude [directions, k] and eigenvectors [directions, n_inputs, k] of FᵀQF.

        Args:
            u: output directions [directions, n_outputs].
            scale: F [n_inputs, n_inputs], or a diagonal [n_inputs].
        """
        f, half = scale.to(self.maps[0].dtype), (u @ self.head / 2).to(self.maps[0].dtype)
        blocks = [*zip(*(of.split(512) for of in (*self.maps, half.T)), strict=True)]  # of units, that fit a cache

        def apply(rows: Tensor) -> Tensor:  # [directions, n_inputs]
            z, image = rows * f if f.ndim == 1 else rows @ f.T, torch.zeros_like(rows)
            for left, right, g in blocks:
                image.addmm_(g.T * (z @ right.T), left).addmm_(g.T * (z @ left.T), right)
            return image * f if f.ndim == 1 else image @ f

        start = torch.randn(len(u), len(self.std), generator=torch.Generator().manual_seed(0))
        values, vectors = _lanczos(apply, start.to(f), k)
        return values.double(), vectors.double()

    def shares(self, u: Tensor, values: Tensor, vectors: Tensor, z: Tensor, gauge: str | None) -> Tensor:
        """`Spectrum.share` [k] of one output direction's terms λ [k], v [n_inputs, k] about z."""
        quadratic, slope, *_ = self.form(u, torch.zeros_like(z), gauge)
        f = self.spread[0]
        quadratic, slope = _congruent(quadratic, f), _transposed_times(f, slope[:, None])[:, 0]
        total = 2 * quadratic.square().sum() + slope.square().sum()
        seen = _transposed_times(f, self.std[:, None] * vectors)  # v in coordinates of variance 1
        at_mean = -(z * self.std) @ vectors  # v·δ at the mean
        overlap = seen.T @ seen
        pairs = torch.outer(values, values) * overlap * (2 * overlap + 4 * torch.outer(at_mean, at_mean))
        with_all = 2 * values * ((quadratic @ seen * seen).sum(0) + at_mean * (slope @ seen))
        return (2 * with_all.cumsum(0) - pairs.cumsum(0).cumsum(1).diagonal()) / total

    def units(self, f: Tensor | None = None, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> _Units:
        """The units on inputs scale ⊙ F ε + shift, ε white, F by default their own `spread`."""
        f, shift = self.spread[0] if f is None else f, self.mean * 0 + shift
        left, right = (_transposed_times(f, (weight * scale).T).T for weight in (self.left, self.right))
        return _Units(left, right, self.left @ shift + self.left_bias, self.right @ shift + self.right_bias)


class _Units(NamedTuple):
    """Products (left ε + left_at) ⊙ (right ε + right_at) of white Gaussian ε."""

    left: Tensor  # [units, n_inputs]
    right: Tensor
    left_at: Tensor  # [units]
    right_at: Tensor

    def mean(self) -> Tensor:
        return (self.left * self.right).sum(1) + self.left_at * self.right_at

    def covariance(self, other: _Units) -> Tensor:
        """Of each unit with each of the other's, [units, others], by Isserlis' theorem."""
        slopes = (p.left_at[:, None] * p.right + p.right_at[:, None] * p.left for p in (self, other))
        one, two = slopes
        covariance = one @ two.T
        covariance += (self.left @ other.left.T) * (self.right @ other.right.T)
        return covariance.add_((self.left @ other.right.T) * (self.right @ other.left.T))

    def inner(self, head: Tensor, other: _Units, other_head: Tensor) -> Tensor:
        """Σ over the outputs of the covariance of head · self with other_head · other."""
        rows = torch.arange(len(self.left), device=head.device).split(1024)  # bounds the memory
        parts = [(head.T[r] @ other_head * _Units(*(t[r] for t in self)).covariance(other)).sum() for r in rows]
        return torch.stack(parts).sum()


_WEIGHTS: WeakKeyDictionary[BilinearTC, _Weights] = WeakKeyDictionary()


def _state(tc: BilinearTC) -> list[Tensor]:
    return [*tc.parameters(), *tc.buffers()]


def _version(tensor: Tensor) -> int:
    """How often a tensor was written in place; −1 of one that was made in inference mode, which does not tell."""
    return -1 if tensor.is_inference() else tensor._version


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _congruent(matrix: Tensor, f: Tensor) -> Tensor:
    """Fᵀ M F, F a matrix or the diagonal of one."""
    return _symmetric(f[:, None] * matrix * f if f.ndim == 1 else f.T @ matrix @ f)


def _transposed_times(f: Tensor, matrix: Tensor) -> Tensor:
    return f[:, None] * matrix if f.ndim == 1 else f.T @ matrix


def _lanczos(apply: Callable[[Tensor], Tensor], start: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k eigenvalues of largest magnitude [directions, k], and eigenvectors [directions, n, k], of symmetric maps.

    Lanczos iterations with full reorthogonalization, until the residuals are so small that their squares, which the
    eigenvalues' errors are of the size of, are below rounding.

    Args:
        apply: one operator a direction, on [directions, n].
        start: random [directions, n].
    """
    directions, n = start.shape
    generator = torch.Generator().manual_seed(1)
    eps = torch.finfo(start.dtype).eps
    basis = start.new_empty(directions, 64, n)
    diagonal, off_diagonal = [], []
    size = start.new_zeros(directions)

    def orthogonal(row: Tensor, m: int) -> Tensor:
        for _ in range(2):  # once leaves what cancels
            row = row - ((basis[:, :m] @ row.unsqueeze(-1)).mT @ basis[:, :m]).squeeze(1)
        return row

    row = start
    for m in range(1, n + 1):
        if m > basis.shape[1]:
            basis = torch.cat([basis, torch.empty_like(basis)], 1)
        basis[:, m - 1] = row / row.norm(dim=-1, keepdim=True)
        image = apply(basis[:, m - 1])
        diagonal.append((image * basis[:, m - 1]).sum(-1))
        row = orthogonal(image, m)
        size = torch.maximum(size, image.norm(dim=-1))
        ended = row.norm(dim=-1) <= 10 * eps * size  # what was reached is a whole of its own: go on elsewhere
        off_diagonal.append(torch.where(ended, 0, row.norm(dim=-1)))
        if m == n or (m % 4 == 0 and m >= 2 * k):
            off = torch.diag_embed(torch.stack(off_diagonal, -1)[:, :-1], 1)
            values, vectors = torch.linalg.eigh((torch.diag_embed(torch.stack(diagonal, -1)) + off + off.mT).double())
            order = values.abs().argsort(dim=-1, descending=True)[:, :k]
            vectors, values = vectors.gather(-1, order.unsqueeze(1).expand(-1, m, -1)), values.gather(-1, order)
            residual = off_diagonal[-1].unsqueeze(-1) * vectors[:, -1].abs()
            if m == n or (residual <= eps**0.5 * values[:, :1].abs()).all():
                break
        if ended.any():
            row = torch.where(ended[:, None], orthogonal(torch.randn(row.shape, generator=generator).to(row), m), row)
    return values, (vectors.mT.to(basis) @ basis[:, :m]).mT


def read_norm(module: nn.Module, width: int) -> Norm | None:
    """What a norm of any class does to rows of a width, by what it makes of a few; None if it is no such norm."""
    if any(module.children()) or any(p.is_meta or p.ndim > 1 for p in module.parameters()):
        return None
    probe = copy.deepcopy(module).float()
    device = next((parameter.device for parameter in probe.parameters()), torch.device("cpu"))
    rows = 1000 * (torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + 1).to(device)  # eps is nothing
    try:
        with torch.no_grad(), _hooks_silenced(probe):
            up, down = (_float64(probe(sign * rows[None])[0]) for sign in (1, -1))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # whatever another module makes of them
        return None
    if up.shape != rows.shape:
        return None
    odd, bias = (up - down) / 2, ((up + down) / 2).mean(0)
    for kind in ("layernorm", "rmsnorm"):
        n = _float64(rows)
        n = n - n.mean(-1, keepdim=True) if kind == "layernorm" else n
        n = n / n.square().mean(-1, keepdim=True).sqrt()
        weight = (odd * n).sum(0) / n.square().sum(0)
        if torch.allclose(weight * n + bias, up, rtol=1e-3, atol=1e-3 * weight.abs().mean().item()):
            return Norm(kind, weight, bias)
    return None


@torch.no_grad()
def norm_before(head: nn.Module, base: nn.Module) -> Norm | None:
    """The norm whose output enters the language-model head."""
    calls: list[tuple[nn.Module, Any]] = []
    entered: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, _, output: calls.append((module, output)))
        for module in base.modules()
    ]
    handles.append(head.register_forward_pre_hook(lambda _, args: entered.append(args[0])))
    try:
        with _eager():
            base(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(base.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    x = entered[-1]
    same = (m for m, y in reversed(calls) if isinstance(y, Tensor) and y.shape == x.shape and torch.equal(y, x))
    return next((norm for module in same if (norm := read_norm(module, x.shape[-1]))), None)


class _Captured(Exception):
    """Stops a forward pass once all MLPs that are captured have run."""


@torch.no_grad()
def _capture(
    transcoders: Sequence[BilinearTC], base: Any, args: tuple[Any, ...], inputs: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """What enters and leaves each transcoder's MLP in one pass of the base, which ends when all of them have run."""
    captured: dict[BilinearTC, tuple[Tensor, Tensor]] = {}

    def recording(transcoder: BilinearTC) -> StandIn:
        def record(entered: list[Tensor], true: Callable[[], Any], before: Callable[[], Any]) -> Any:
            x = transcoder._input(entered).clone()  # copies, since some decoders (Falcon) add to an output in place
            transcoder._check_mlp_output(y := true())
            captured.setdefault(transcoder, (x, y.clone()))
            if len(captured) == len(transcoders):
                raise _Captured
            return y if before is true else before()

        return record

    with ExitStack() as stack:
        stack.enter_context(suppress(_Captured))
        stack.enter_context(_eager())
        for transcoder in transcoders:
            stack.enter_context(transcoder._find_site(base).replaced(recording(transcoder)))
        (base if args else _torch_module(base))(*args, **inputs)
    if missing := [str(t.config.mlp_path) for t in transcoders if t not in captured]:
        raise RuntimeError(f"The base's forward pass never came to {', '.join(missing)}.")
    pairs = []
    for transcoder in transcoders:
        config, (x, y) = transcoder.config, captured[transcoder]
        if (x.shape[-1], y.shape[-1]) != (config.n_inputs, config.n_outputs):
            raise ValueError(f"{transcoder._belongs()} in this base it maps width {x.shape[-1]} to {y.shape[-1]}.")
        given = tensors_in(args, inputs)
        batch = given[0].shape[:2] if given and x.ndim == 2 else x.shape[:-1]  # some decoders (OPT) flatten it
        pairs.append((x.reshape(*batch, -1), y.reshape(*batch, -1)))
    return pairs


class _Frozen(NamedTuple):
    """A norm with its statistics held, at rows where it was seen: a linear map of what is added to what enters it."""

    kind: str
    weight: Tensor  # [width]
    factor: Tensor  # [rows, 1]: one over what the norm divides by, its eps within

    @classmethod
    def at(cls, norm: Norm, entered: Tensor, left: Tensor) -> _Frozen:
        weight, bias = norm.weight.to(left), norm.bias.to(left)
        n = cls(norm.kind, weight, left.new_ones(())).forth(entered)
        size = n.square().sum(-1, keepdim=True).clamp(min=1e-30)  # 0 at padding without an embedding
        return cls(norm.kind, weight, ((left - bias) * n).sum(-1, keepdim=True) / size)

    def forth(self, added: Tensor) -> Tensor:
        return self.factor * self.weight * self._centered(added)

    def back(self, slope: Tensor) -> Tensor:
        return self.factor * self._centered(self.weight * slope)

    def _centered(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(-1, keepdim=True) if self.kind == "layernorm" else rows


class _Way(NamedTuple):
    """The straight way from an MLP's output to a later MLP's input in one pass: a linear map of rows."""

    entered: Tensor  # the earlier MLP [rows, n_inputs]
    arrived: Tensor  # at the later MLP [rows, n_inputs]
    batch: torch.Size  # the rows' shape, [batch, seq]
    norms: list[_Frozen]
    multiplier: float  # of the residual add

    def forth(self, added: Tensor) -> Tensor:
        """What of this, added to the earlier output, is added to the later input, [rows, width]."""
        for norm in self.norms:
            added = norm.forth(added)
        return self.multiplier * added

    def back(self, slope: Tensor) -> Tensor:
        """The slope in the earlier output, of one in the later input."""
        for norm in reversed(self.norms):
            slope = norm.back(slope)
        return self.multiplier * slope


@torch.no_grad()
def _way(earlier: BilinearTC, later: BilinearTC, base: Any, inputs: dict[str, Any]) -> _Way:
    """Run the base up to the later MLP, and see what of the earlier one's output comes there by residual adds alone.

    What branches off the residual stream leaves it, or comes back to it, through a norm. So if no norm passes a
    gradient on, what is left of it has come straight; it must be that of a sum, times one number.
    """
    module = _torch_module(base)
    seen: dict[str, Tensor] = {}
    known: dict[nn.Module, Norm | None] = {}
    calls: list[tuple[Norm, Tensor, Tensor]] = []
    norms: list[_Frozen] = []

    def rows(tensor: Tensor) -> Tensor:
        return _float64(tensor.detach().to(later.input_mean.device)).flatten(0, -2)

    def same(one: Tensor, other: Tensor) -> bool:  # or a view of it
        return (one.data_ptr(), one.numel()) == (other.data_ptr(), other.numel())

    def leave(entered: list[Tensor], _true: Callable[[], Any], before: Callable[[], Any]) -> Tensor:
        torch.set_grad_enabled(True)  # from here on, till the end of this function
        seen["entered"], seen["leaf"] = earlier._input(entered).clone(), before().detach().requires_grad_()
        seen["added"] = seen["leaf"].clone()  # since some decoders (Falcon) add to an output in place
        return seen["added"]

    def freeze(norm: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        given = tensors_in(args, kwargs)
        if not seen or len(given) != 1 or not isinstance(output, Tensor) or given[0].shape != output.shape:
            return None
        if norm not in known:
            known[norm] = read_norm(norm, output.shape[-1])
        if (read := known[norm]) is None:
            return None
        frozen = output.detach()
        if same(given[0], seen["added"]):  # the MLP's output itself is normed (Gemma 2, OLMo 2) before it is added
            norms.append(_Frozen.at(read, rows(given[0]), rows(output)))
            seen["leaf"] = frozen.requires_grad_()
            seen["added"] = frozen = frozen.clone()
        calls.append((read, given[0].clone(), frozen))
        return frozen

    def arrive(entered: list[Tensor], _true: Callable[[], Any], _before: Callable[[], Any]) -> Any:
        seen["arrived"] = later._input(entered)
        raise _Captured

    with ExitStack() as stack:
        stack.enter_context(suppress(_Captured))
        stack.enter_context(_eager())
        stack.enter_context(earlier._find_site(base).replaced(leave))
        stack.enter_context(later._find_site(base).replaced(arrive))
        for part in module.modules():
            if not any(part.children()):
                stack.callback(part.register_forward_hook(freeze, with_kwargs=True).remove)
        module(**inputs)
    refusal = ValueError(
        f"A path follows residual adds and norms, but what {earlier.config.mlp_path} says comes to "
        f"{later.config.mlp_path} in another way."
    )
    if len(seen) < 4:
        raise refusal
    leaf, stream = seen["leaf"], seen["arrived"]
    for read, before, frozen in calls:
        if same(frozen, stream):
            norms.append(_Frozen.at(read, rows(before), rows(stream)))
            stream = before
            break
    if not stream.requires_grad or stream.numel() != leaf.numel():
        raise refusal
    probe = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
    [gradient] = torch.autograd.grad(stream, leaf, probe.reshape(stream.shape), allow_unused=True)
    if gradient is None:
        raise refusal
    multiplier = ((gradient * probe).sum() / probe.square().sum()).item()
    if not multiplier or not torch.allclose(gradient, multiplier * probe, rtol=16 * torch.finfo(leaf.dtype).eps):
        raise refusal
    x = seen["entered"]
    given = tensors_in((), inputs)
    batch = given[0].shape[:2] if given and x.ndim == 2 else x.shape[:-1]
    return _Way(rows(x), rows(seen["arrived"]), batch, norms, multiplier)


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _torch_module(base: Any) -> nn.Module:
    """The model itself, of an nnsight model or a TransformerLens bridge."""
    if getattr(base, "dispatched", None) is False:  # nnsight loads no weights before they are needed
        base.dispatch()
    for name in ("_module", "original_model"):
        inner = getattr(base, name, None)
        base = inner if isinstance(inner, nn.Module) else base
    if not isinstance(base, nn.Module):
        raise ValueError(f"The base must be a loaded model (a torch module), not {type(base).__name__}.")
    return base


def _forward(module: nn.Module) -> Callable[..., Any]:
    """What the module computes as it stands: its own forward, or a transcoder's that is attached."""
    if (state := _nnsight_state(module)) is None:
        return module.forward
    return getattr(state.body, "forward", partial(state.body, module))


def _true_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, also while a transcoder is attached."""
    forward = _forward(module)
    return getattr(forward, "true_forward", forward)


def _nnsight_state(module: nn.Module) -> Any:
    """nnsight's forward of a module shows its traces what enters, runs `state.body(module, ...)`, and shows them what
    leaves: the body is the module's own forward. None of a module that nnsight has not wrapped."""
    state = getattr(vars(module).get("forward"), "state", None)
    return state if hasattr(state, "body") else None


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    vars(forward)["true_forward"] = _true_forward(module)
    # A module has a `forward` of its own, beside its class's, where another library or a transcoder has put one.
    state, previous = _nnsight_state(module), vars(module).get("forward")
    if state is None:
        module.forward = forward
    else:
        body, state.body = state.body, lambda _module, *args, **kwargs: forward(*args, **kwargs)
        vars(state.body)["forward"] = forward
    try:
        yield
    finally:
        if state is not None:
            state.body = body
        elif previous is None:
            del module.forward
        else:
            module.forward = previous


def _edited(units: Tensor, scale: Mapping[int, Any], add: Mapping[int, Any]) -> Tensor:
    """Hidden units [..., n_hidden], of which each one named is multiplied by its scale, then added to."""
    edited = units.clone()
    for unit in {*scale, *add}:
        factor, term = (torch.as_tensor(value).to(units) for value in (scale.get(unit, 1.0), add.get(unit, 0.0)))
        edited[..., unit] = units[..., unit] * factor + term
    return edited


@contextmanager
def _hooks_silenced(module: nn.Module) -> Iterator[None]:
    """Forward hooks that the caller has put inside the module do not see what runs in this context."""
    tables = [table for part in module.modules() for table in (part._forward_hooks, part._forward_pre_hooks)]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def _eager() -> Any:
    """torch.compile cannot trace a pass that ends in an exception; torch before 2.6 has no switch for it."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _is_missing(tensor: Tensor) -> bool:
    """Whether transformers (4.57 and later mark each tensor) has not loaded it from a checkpoint."""
    return not getattr(tensor, "_is_hf_initialized", False)


def _is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter holds codes of less than two bytes, whose scales only its own module knows."""
    return not parameter.is_floating_point() or parameter.dtype.itemsize < 2


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_at_least_float32(tensor.dtype))


def _float64(tensor: Tensor) -> Tensor:
    return _on_float64_device(tensor).to(torch.float64)


def _on_float64_device(tensor: Tensor) -> Tensor:
    # Apple's MPS has no float64: such tensors are computed with on the CPU.
    return tensor.cpu() if tensor.device.type == "mps" else tensor


class BilinearTCSet(nn.Module):
    """The transcoders of several layers of one base, in the order of the layers.

    Where only the Hub has this class, transformers fetches it:

        >>> from transformers.dynamic_module_utils import get_class_from_dynamic_module
        >>> BilinearTCSet = get_class_from_dynamic_module("modeling_bilinear_tc.BilinearTCSet", repo)

    Example:
        >>> tcs = BilinearTCSet.from_pretrained(repo)
        >>> tcs.fvu(base, input_ids=input_ids)
        {0: 0.0003, 1: 0.1292, ...}
        >>> with tcs.attached(base), tcs[3].attached(base, scale={17: 0.0}):  # one of layer 3's units switched off
        ...     base.generate(input_ids)

    Args:
        transcoders: one for each layer, in any order.

    Attributes:
        layers: their layers' numbers, ascending.

    Raises:
        ValueError: two are of the same layer, or one does not say of which it is.
    """

    def __init__(self, transcoders: Iterable[BilinearTC]) -> None:
        super().__init__()
        given = list(transcoders)
        layers = [transcoder.config.layer_index for transcoder in given]
        if None in layers or len({*layers}) < len(layers):
            raise ValueError(f"A set holds one transcoder for each layer, but those given are of layers {layers}.")
        self.layers: list[int] = sorted(layers)
        self.transcoders = nn.ModuleDict({str(layer): given[layers.index(layer)] for layer in self.layers})

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path,
        layers: Iterable[int] | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BilinearTCSet:
        """Load the transcoders of a published set, or of a run's folder.

        Args:
            where: Hub id, or folder with a subfolder `layer_N` for each layer.
            layers: the layers' numbers; by default all that are there.
            revision: branch, tag or commit of the Hub repository.
            device: where to put them.
            kwargs: `cache_dir`, `token`, `local_files_only` and `force_download` for the Hub; all others, such as
                `dtype`, for `BilinearTC.from_pretrained`.

        Raises:
            ValueError: a layer asked for is not there, or none is.
            OSError: no such folder, and no Hub repository that can be read.
        """
        hub: dict[str, Any] = {"revision": revision}
        for name in ("cache_dir", "token", "local_files_only", "force_download"):
            if name in kwargs:
                hub[name] = kwargs.pop(name)
        folder = Path(where).expanduser()
        remote = not folder.is_dir()
        if remote:
            try:
                with _no_progress_bars():
                    folder = Path(snapshot_download(str(where), allow_patterns="layer_*/*.json", **hub))
            except (OSError, ValueError) as error:
                raise OSError(
                    f"There are no transcoders at {str(where)!r}: expected a run's folder, or a Hub repository that "
                    f"you can read, got {type(error).__name__}."
                ) from error
        names = [re.fullmatch(r"layer_(\d+)", path.parent.name) for path in folder.glob("layer_*/config.json")]
        there = sorted(int(name[1]) for name in names if name)
        if not there:
            raise ValueError(f"{where} holds no layer_N/config.json: expected a set of transcoders.")
        chosen = _chosen(layers, there, str(where))
        if remote:
            weights = [f"layer_{layer}/*.safetensors" for layer in chosen]
            hub["revision"] = folder.name  # the commit: a branch may have moved on since
            snapshot_download(str(where), allow_patterns=weights, tqdm_class=_FilesBar, **hub)
        with _no_progress_bars():
            tcs = cls(BilinearTC.from_pretrained(folder / f"layer_{layer}", **kwargs) for layer in chosen)
        return tcs.to(device=device).eval()

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[BilinearTC]:
        return map(self.__getitem__, self.layers)

    def __getitem__(self, layer: int) -> BilinearTC:
        """The transcoder of the layer of that number; IndexError if the set has none."""
        if layer not in self.layers:
            raise IndexError(_no_layer("This set", [layer], self.layers))
        return cast(BilinearTC, self.transcoders[str(layer)])

    def capture(self, base: Any, *args: Any, **inputs: Any) -> dict[int, tuple[Tensor, Tensor]]:
        """What enters and leaves the MLP of every layer, in one pass of the base.

        Arguments, values and errors are those of `BilinearTC.capture`: of each layer, the MLP's input
        [batch, seq, n_inputs] and its output [batch, seq, n_outputs].
        """
        return dict(zip(self.layers, _capture([*self], base, args, inputs), strict=True))

    @contextmanager
    def attached(
        self, base: Any, layers: Iterable[int] | None = None, error_term: bool | Mapping[int, Tensor] = False
    ) -> Iterator[Any]:
        """While the context lasts, the base runs with these transcoders in place of its MLPs.

        It is `BilinearTC.attached` of each layer, one within the other. To edit units too, attach those layers once
        more within.

        Args:
            base: as for `BilinearTC.attached`.
            layers: the layers' numbers; by default all of the set.
            error_term: as for `BilinearTC.attached`; errors are given by layer, and a layer without one has none.

        Yields:
            The base.

        Raises:
            ValueError: as `BilinearTC.attached` does, or the set has no such layer.
        """
        with ExitStack() as stack:
            for layer in _chosen(layers, self.layers, "This set"):
                error = error_term if isinstance(error_term, bool) else error_term.get(layer, False)
                stack.enter_context(self[layer].attached(base, error_term=error))
            yield base

    @torch.no_grad()
    def path(
        self,
        base: Any,
        direction: Tensor,
        from_layer: int,
        to_layer: int,
        units: Iterable[int] | None = None,
        check: bool = False,
        **inputs: Any,
    ) -> UnitPath:
        """What hidden units of an earlier layer do, token by token, to u·y of a later layer's transcoder, directly.

        Directly: unit k writes hₖ·wₖ into the residual stream at its token (h: the earlier transcoder's `units`, w: its
        `writers`), of which the later layer's norm, its statistics held, makes dₖ at the later MLP's input x. With
        δ = Σₖ dₖ of all units asked for, and g the slope of u·y at x − δ, the input without them, u·y(x) − u·y(x − δ)
        is g·δ + δᵀQδ, exactly. Unit k's effect is g·dₖ + dₖᵀQδ: a cross term 2 dₖᵀQdⱼ is shared evenly between its two
        units, so that effects add up to the total. To have a unit's effect alone, ask for that unit alone.

        Not in it: what goes through the attention, MLPs and norms between, and how the later norm's statistics change.
        Nor are the earlier layer's bias and its transcoder's error, which no unit writes. If an MLP's output is normed
        before it is added (Gemma 2, OLMo 2), that norm's statistics are held too.

        Args:
            base: as for `capture`; within `attached`, as spliced.
            direction: u [n_outputs].
            from_layer, to_layer: their numbers.
            units: of the earlier layer; default: all.
            check: also remove the units, together, by an intervention: once with the whole set attached, and once with
                the base's own MLPs, where what the units write is taken from the true output, and u·y is of the later
                MLP's true output. Four passes of the base and two more paths. R² is over all tokens that
                `attention_mask` keeps.
            inputs: arguments of the base's forward pass.

        Returns:
            A `UnitPath`.

        Raises:
            ValueError: as `capture` does; there is no such layer or unit, or the direction is not [n_outputs]; what the
                earlier MLP says does not come to the later one by residual adds and norms.
        """
        if from_layer >= to_layer:
            raise ValueError(f"A path leads from a layer to a later one, not from {from_layer} to {to_layer}.")
        earlier, later = (self[layer] for layer in _chosen([from_layer, to_layer], self.layers, "This set"))
        names = [*(range(earlier.config.n_hidden) if units is None else units)]
        earlier._check_units(names)
        u = later._directions(direction)
        if u.ndim > 1:
            raise ValueError(f"A path leads to one direction [{u.shape[-1]}], not to {list(u.shape)} as given.")
        writes, reads = earlier._weights(), later._weights()

        def read() -> UnitPath:
            way = _way(earlier, later, base, inputs)
            left, right = writes.factors(writes.z(way.entered.to(writes.mean)))
            products, writers = (of[:, names].to(u) for of in (left * right, writes.head))
            delta = way.forth(products @ writers.T)
            with_units, without = (reads.tangents(u, reads.z(x))[1] for x in (way.arrived, way.arrived - delta))
            # g·d + dᵀQδ is the slope halfway, times d
            slope, _ = reads.tangents(u, reads.z(way.arrived - delta / 2))
            effects = products * (way.back(slope / reads.std) @ writers)
            total = (with_units - without).reshape(way.batch)
            return UnitPath(names, later._out(effects.reshape(*way.batch, -1)), later._out(total))

        def checked(error_term: bool) -> PathCheck:
            def value() -> Tensor:
                x, y = later.capture(base, **inputs)
                return _float64(y if error_term else later(x.to(later.input_mean.device))).to(u) @ u

            with self.attached(base, error_term=error_term):
                predicted, before = read().total, value()
                with earlier.attached(base, scale=dict.fromkeys(names, 0.0), error_term=error_term):
                    change = before - value()
            kept = inputs.get("attention_mask")
            rows = ... if kept is None else kept.to(change.device).bool()
            true, guess = change[rows], _float64(predicted).to(change)[rows]
            size = true.square().sum()
            r2, direct = 1 - (true - guess).square().sum() / size, (true * guess).sum() / size
            return PathCheck(predicted, later._out(change), r2.item(), direct.item())

        found = read()
        return replace(found, spliced=checked(False), true=checked(True)) if check else found

    @torch.no_grad()
    def fvu(self, base: Any, *args: Any, **inputs: Any) -> dict[int, float]:
        """Each layer's fraction of variance unexplained on these inputs, as it is measured for the card.

        It is Σ‖z − ẑ‖² / Σ‖z − mean(z)‖² of outputs z-scored by their own mean and standard deviation over the rows:
        the mean over output features of each one's FVU, without those that do not vary. Rows are the positions of all
        sequences that `attention_mask` keeps, or all. The card's are taken over far more text: on a short prompt the
        outputs vary less, and the FVU is another.

        Arguments and errors are those of `capture`.
        """
        fvu = {}
        kept = inputs.get("attention_mask")
        for layer, (x, y) in self.capture(base, *args, **inputs).items():
            rows = ... if kept is None else kept.to(x.device).bool()
            x, true = x[rows], _float64(y[rows]).flatten(0, -2)
            y = _float64(self[layer](x.to(self[layer].input_mean.device))).to(true.device).flatten(0, -2)
            unexplained, spread = ((true - guess).square().sum(0) for guess in (y, true.mean(0)))
            fvu[layer] = (unexplained / spread)[spread > 0].mean().item()
        return fvu


def _chosen(layers: Iterable[int] | None, there: list[int], where: str) -> list[int]:
    """The layers asked for, ascending; ValueError if one is not there."""
    chosen = there if layers is None else sorted({*layers})
    if missing := [layer for layer in chosen if layer not in there]:
        raise ValueError(_no_layer(where, missing, there))
    return chosen


def _no_layer(where: str, missing: list[int], there: list[int]) -> str:
    return f"{where} has no layer {', '.join(map(str, missing))}: it has layers {', '.join(map(str, there))}."


class _FilesBar(tqdm):
    """Of the bars that a download draws, the one that counts files."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | ({"disable": True} if kwargs.get("unit") == "B" else {}))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def replaced(base: Any, tcs: BilinearTCSet, layers: Iterable[int] | None = None) -> PreTrainedModel:
    """A base whose MLPs are the transcoders: a causal language model of its own, with `generate`, to be saved whole.

    It says what the base says inside `tcs.attached(base)`. The transcoders are in the base's dtype, but for their
    statistics, and without what only readings of the weights use. All other weights are the base's own, in the same
    memory; the base stays as it is.

        >>> model = replaced(base, BilinearTCSet.from_pretrained(repo))
        >>> base.num_parameters(), model.num_parameters()
        >>> model.save_pretrained(folder)  # and, where only torch and transformers are installed:
        >>> AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    Of width n, a plain MLP of w units has 2wn weights, a gated one 3wn, and a transcoder of h units 3hn. At h = w the
    model therefore grows by half of its plain MLPs, and stays as large as it is with gated ones.

    Args:
        base: a causal language model of any class of transformers whose MLPs are modules.
        tcs: transcoders of its MLPs.
        layers: the layers' numbers; by default all of the set.

    Raises:
        ValueError: the base is none such, is quantized or not in memory, has transcoders attached, is another than the
            transcoders', or does not have their MLPs; the set has no such layer.
    """
    base = _torch_module(base)
    name = type(base).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or type(base) is not getattr(transformers, name, None):
        raise ValueError(f"The base must be a causal language model of a class of transformers itself, not {name}.")
    if any(hasattr(_forward(module), "true_forward") for module in base.modules()):
        raise ValueError("The base must be as it is by itself, but transcoders are attached: leave that context first.")
    chosen = [tcs[layer] for layer in _chosen(layers, tcs.layers, "This set")]
    if any(p.is_meta or _is_quantized(p) for module in (base, *chosen) for p in module.parameters()):
        raise ValueError("The base and the transcoders must be in memory and not quantized: load both as they are.")
    put: dict[int, Any] = {id(p): nn.Parameter(p, p.requires_grad) for p in base.parameters()}  # what a copy is given
    for tc in chosen:
        tc._check_is_of(base)
        site = tc._find_site(base)
        tc._check_replaceable(site, base)
        if site.enter is not site.leave:
            raise ValueError(f"{tc._belongs()} only an MLP that is one module can be replaced for good.")
        device = next((p.device for p in site.leave.parameters()), base.device)
        put[id(site.leave)] = tc._alone().to(device, base.dtype)  # type: ignore[arg-type] # transformers hides the types
    model = copy.deepcopy(base, put)
    shape, place = ("n_inputs", "n_hidden", "n_outputs", "bias", "form"), ("base_model", "base_revision", "mlp_path")
    kept = {tc.config.layer_index: {k: getattr(tc.config, k) for k in (*shape, *place)} for tc in chosen}
    model.__class__ = __getattr__(f"BilinearTC{name}")
    model.config.__class__ = model.config_class
    vars(model).pop("_weight_conversions", None)  # those of the base's class
    model.config.auto_map = {}  # saving adds our own
    model.config.bilinear_tc = {str(layer): config for layer, config in kept.items()}
    return model


class _Replaced:
    """What a class of transformers lacks to be loaded as `replaced` has made it."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of the class beside this one; ValueError if transcoders lie on disk before transformers 5."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        places = getattr(loaded[0] if isinstance(loaded, tuple) else loaded, "hf_device_map", {}).values()
        if int(transformers.__version__.split(".")[0]) < 5 and "disk" in places:
            raise ValueError(
                "Before transformers 5, modules on disk lose their buffers, among them the transcoders' statistics: "
                f'expected a device_map without "disk", or transformers 5, got {transformers.__version__}.'
            )
        return loaded

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg] # of the class beside this one
        for layer, kept in config.bilinear_tc.items():
            tc = BilinearTC(BilinearTCConfig(layer_index=int(layer), **kept))
            parent, _, name = kept["mlp_path"].rpartition(".")
            setattr(self.get_submodule(parent), name, tc)  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """The classes of what `replaced` makes: BilinearTCLlamaForCausalLM for a LlamaForCausalLM, and its configuration,
    BilinearTCLlamaConfig. Its `model_type` is its own: plain Llama code, loading such a folder without
    `trust_remote_code`, would start with MLPs of random weights.
    """
    theirs = getattr(transformers, name.removeprefix("BilinearTC"), None) if name.startswith("BilinearTC") else None
    if not isinstance(theirs, type) or not issubclass(theirs, (PreTrainedModel, PretrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own: dict[str, Any] = {"__module__": __name__}
    if issubclass(theirs, PretrainedConfig):
        own |= {"model_type": f"bilinear_tc_{theirs.model_type}", "_auto_class": "AutoConfig"}
        made: Any = type(name, (theirs,), own)
    else:
        config_class = cast(Any, theirs).config_class.__name__
        own |= {"config_class": __getattr__(f"BilinearTC{config_class}"), "_auto_class": "AutoModelForCausalLM"}
        made = type(name, (_Replaced, theirs), own)
        with suppress(ImportError):  # files keep the names that weights have had in transformers 4
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping as names_in_files
            from transformers.conversion_mapping import register_checkpoint_conversion_mapping as name_in_files

            if names := names_in_files(theirs.__name__) or names_in_files(made.config_class.__base__.model_type):
                name_in_files(name, names, overwrite=True)
    return globals().setdefault(name, made)


BilinearTC.register_for_auto_class("AutoModel")

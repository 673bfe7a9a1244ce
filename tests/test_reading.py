"""What is read from a transcoder's weights, each against a plain computation in float64."""

from __future__ import annotations

import pytest
import torch
from bases import tiny_gpt2, tiny_llama, tiny_neox, write_base_of_words
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import STATISTICS, BilinearTC, read_norm

FORMS = ["bilinear", "input_sum"]
WIDTH, OUTPUTS = 6, 5


def transcoder(
    form="bilinear", bias=True, correlated=True, norm=None, seed=0, n_inputs=WIDTH, n_hidden=9, **config
) -> BilinearTC:
    """A float64 transcoder of random weights, statistics, correlation and norm."""
    torch.manual_seed(seed)
    shape = {"n_inputs": n_inputs, "n_hidden": n_hidden, "n_outputs": OUTPUTS, "form": form, "bias": bias, **config}
    tc = BilinearTC(BilinearTCConfig(**shape, input_correlation=correlated, input_norm=norm)).double()
    for name, buffer in tc.named_buffers():
        random = torch.randn_like(buffer)
        buffer.copy_(random if name.endswith(("mean", "bias")) else random.abs() + 0.5)
    if correlated:
        tc.input_correlation.copy_(torch.randn(3 * n_inputs, n_inputs).double().T.corrcoef())
    return tc.requires_grad_(False)


def covariance(tc: BilinearTC) -> Tensor:
    correlation = tc.input_correlation if tc.config.input_correlation else torch.eye(tc.config.n_inputs).double()
    return torch.outer(tc.input_std, tc.input_std) * correlation


def samples(tc: BilinearTC, rows: int, seed: int = 0) -> Tensor:
    """Gaussian inputs of the stored mean and covariance."""
    noise = torch.randn(rows, tc.config.n_inputs, generator=torch.Generator().manual_seed(seed)).double()
    return tc.input_mean + noise @ torch.linalg.cholesky(covariance(tc)).T


def close(found: Tensor, expected: Tensor, digits: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=digits, atol=digits * (expected.abs().max().item() + 1))


def polynomials(tc: BilinearTC, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Half the Hessian, and the gradient at x, of u·y, by automatic differentiation of the forward pass."""
    hessian = torch.autograd.functional.hessian(lambda x: tc(x) @ u, x)
    return hessian / 2, torch.autograd.functional.jacobian(lambda x: tc(x) @ u, x)


# ------------------------------------------------------------------------------------------------- quadratic_form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (3,), (2, 2)])
@pytest.mark.parametrize("about", ["mean", "origin", "point"])
def test_an_output_direction_is_the_quadratic_form_about_any_point(form, bias, leading, about):
    tc = transcoder(form, bias)
    u = torch.randn(*leading, OUTPUTS).double()
    point = {"mean": tc.input_mean, "origin": torch.zeros(WIDTH).double(), "point": torch.randn(WIDTH).double()}[about]
    read = tc.quadratic_form(u) if about == "mean" else tc.quadratic_form(u, point if about == "point" else about)
    Q, g, c, x0, moved = read
    assert (Q.shape, g.shape, c.shape) == ((*leading, WIDTH, WIDTH), (*leading, WIDTH), leading)
    assert torch.equal(Q, Q.mT)
    assert torch.equal(x0, point)
    assert not moved.any()
    x = 5 * torch.randn(20, 2, WIDTH).double()
    expected = torch.einsum("...o,rso->...rs", u, tc(x))
    quadratic, linear = read.parts(x)
    by_hand = torch.einsum("...ij,rsi,rsj->...rs", Q, x - x0, x - x0)
    close(quadratic, by_hand)
    close(linear + quadratic + c[..., None, None], expected)
    close(read(x), expected)
    close(read(x[0, 0]), expected[..., 0, 0])
    if leading == ():
        half_hessian, gradient = polynomials(tc, u, point)
        close(Q, half_hessian)
        close(g, gradient)


def test_the_quadratic_form_of_a_half_precision_model_is_in_float32():
    tc = transcoder().bfloat16()
    read = tc.quadratic_form(torch.ones(OUTPUTS))
    assert {part.dtype for part in read} == {torch.float32}
    assert not read.quadratic.requires_grad
    x = torch.randn(WIDTH)
    torch.testing.assert_close(read(x), tc.double()(x.double()).sum().float(), rtol=1e-4, atol=1e-3)


def test_what_cannot_be_read_is_refused_in_a_sentence():
    tc, u = transcoder(), torch.zeros(OUTPUTS)
    refused = {
        r"An output direction has shape \[\.\.\., 5\], not \[6\]": lambda: tc.quadratic_form(torch.zeros(6)),
        r"An output direction has shape \[\.\.\., 5\], not \[\]": lambda: tc.spectrum(torch.tensor(1.0)),
        r"A form is about 'mean', 'origin' or an input of shape \[6\], not 'median'": lambda: tc.spectrum(
            u, about="median"
        ),
        r"or an input of shape \[6\], not \[5\]": lambda: tc.quadratic_form(u, torch.zeros(5)),
        r"A spectrum has 1 to 6 eigenvalues, not k=7": lambda: tc.spectrum(u, 7),
        r"is 'covariance' or 'euclidean', not 'fisher'": lambda: tc.spectrum(u, metric="fisher"),
        r"A gauge is 'layernorm', 'rmsnorm' or None, not 'ln'": lambda: tc.spectrum(u, gauge="ln"),
        r"but this layer stores None": lambda: tc.quadratic_form(u, gauge="rmsnorm"),
        r"but this layer stores rmsnorm": lambda: transcoder(norm="rmsnorm").spectrum(u, gauge="layernorm"),
        r"Input directions have shape \[6, m\], not \[2, 5\]": lambda: tc.interaction(u, torch.zeros(2, 5)),
        r"n_units=None, variance=None": lambda: tc.truncated(),
        r"Give n_units from 1 to 9": lambda: tc.truncated(10),
        r"variance from 0 to 1": lambda: tc.truncated(variance=2.0),
        r"but these map 6 to 5 and 7 to 5": lambda: tc.similarity(transcoder(n_inputs=7)),
    }
    for sentence, read in refused.items():
        with pytest.raises(ValueError, match=sentence) as error:
            read()
        assert str(error.value).count(". ") == 0
        assert str(error.value).endswith(".")


# ------------------------------------------------------------------------------------------------------- spectrum


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("metric", ["covariance", "euclidean"])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_a_spectrum_is_the_form_in_features_of_its_metric(form, correlated, metric, leading):
    tc = transcoder(form, correlated=correlated)
    u = torch.randn(*leading, OUTPUTS).double()
    read, quadratic = tc.spectrum(u, metric=metric), tc.quadratic_form(u)
    values, vectors = read.eigenvalues, read.eigenvectors
    assert (values.shape, vectors.shape) == ((*leading, WIDTH), (*leading, WIDTH, WIDTH))
    assert (values.abs().diff(dim=-1) <= 0).all()
    close(vectors @ torch.diag_embed(values) @ vectors.mT, quadratic.quadratic)
    weigh = torch.eye(WIDTH).double() if metric == "euclidean" else covariance(tc)
    close(vectors.mT @ weigh @ vectors, torch.eye(WIDTH).double().expand_as(vectors))
    for name in ("linear", "constant", "about", "moved"):
        assert torch.equal(getattr(read, name), getattr(quadratic, name))
    assert read.metric == (metric if correlated or metric == "euclidean" else "variances")
    assert torch.equal(tc.spectrum(u, 2, metric=metric).eigenvectors, vectors[..., :2])


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("metric", ["covariance", "euclidean"])
@pytest.mark.parametrize("about", ["mean", "origin"])
def test_the_share_is_what_a_gaussian_sample_shows(correlated, metric, about):
    tc = transcoder(correlated=correlated)
    u = torch.randn(2, OUTPUTS).double()
    read = tc.spectrum(u, about=about, metric=metric)
    x = samples(tc, 200_000)
    value = u @ tc(x).T
    features = torch.einsum("dik,ri->dkr", read.eigenvectors, x - read.about)
    terms = (read.eigenvalues[..., None] * features**2).cumsum(1)  # [directions, k, rows]
    expected = 1 - (value[:, None] - terms).var(-1) / value.var(-1, keepdim=True)
    torch.testing.assert_close(read.share, expected, rtol=0.03, atol=0.02)


def test_about_the_mean_the_shares_and_the_linear_part_add_up_to_all_variance():
    tc, u = transcoder(), torch.randn(4, OUTPUTS).double()
    read, sigma = tc.spectrum(u), covariance(tc)
    linear = ((read.linear @ sigma) * read.linear).sum(-1)
    total = 2 * read.eigenvalues.square().sum(-1) + linear
    close(read.share, 2 * read.eigenvalues.square().cumsum(-1) / total[:, None])
    close(read.share[:, -1] + linear / total, torch.ones(4).double())


def test_an_input_direction_without_variance_carries_nothing():
    tc = transcoder()
    tc.input_correlation.copy_(torch.tensor([1.0, -1, 1, 1, -1, 1]).double().outer(torch.ones(6).double()))
    tc.input_correlation.copy_(tc.input_correlation[:, :1] @ tc.input_correlation[:, :1].T)  # rank 1
    read = tc.spectrum(torch.randn(OUTPUTS).double())
    assert (read.eigenvalues[1:].abs() < 1e-12 * read.eigenvalues[0].abs()).all()
    assert read.eigenvectors.isfinite().all()
    close((read.eigenvectors[:, 0] @ covariance(tc) @ read.eigenvectors[:, 0]), torch.ones(()).double())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["covariance", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_first_eigenvalues_of_a_wide_layer_agree_with_all_of_them(form, metric, dtype):
    tc = transcoder(form, n_inputs=260, n_hidden=300).to(dtype)
    u = torch.randn(2, 2, OUTPUTS).to(dtype)
    some, all_ = tc.spectrum(u, 5, metric=metric), tc.spectrum(u, metric=metric)
    k = 5 if form == "bilinear" else 2  # the others are 0
    digits = 1e-9 if dtype == torch.float64 else 3e-5
    close(some.eigenvalues, all_.eigenvalues[..., :5], digits)
    aligned = some.eigenvectors * (some.eigenvectors * all_.eigenvectors[..., :5]).sum(-2, keepdim=True).sign()
    close(aligned[..., :k], all_.eigenvectors[..., :k], 1e-6 if dtype == torch.float64 else 1e-2)
    close(some.share[..., :k], all_.share[..., :k], digits * 10)
    close(some.linear, all_.linear, digits)


def test_a_few_eigenvalues_are_found_where_they_repeat_or_vanish():
    tc = transcoder(n_inputs=300, n_hidden=300, correlated=False)
    for statistic in (tc.input_mean, tc.left.bias, tc.right.bias):
        statistic.detach().zero_()
    tc.input_std.fill_(1)
    tc.right.weight.data.copy_(torch.eye(300))
    tc.left.weight.data.copy_(torch.diag(torch.tensor([3.0, -2.0] + [0.5] * 298)))
    tc.head.weight.data.fill_(1)
    tc.output_std.fill_(1)
    u = torch.eye(OUTPUTS).double()[:2] * torch.tensor([[1.0], [0.0]])
    close(tc.spectrum(u, 4).eigenvalues, torch.tensor([[3, -2, 0.5, 0.5], [0, 0, 0, 0]]).double())


def test_what_was_read_is_kept_until_a_weight_changes():
    tc, u = transcoder(), torch.randn(OUTPUTS).double()
    before = tc.quadratic_form(u)
    kept = tc._weights()
    assert tc._weights() is kept
    changes = [
        lambda: tc.left.weight.detach().mul_(2),
        lambda: tc.input_std.mul_(2),
        lambda: torch.nn.init.ones_(tc.head.bias),
        lambda: setattr(tc.right, "weight", torch.nn.Parameter(2 * tc.right.weight, requires_grad=False)),
        lambda: torch.optim.SGD(tc.parameters(), 0.1).step(),
        lambda: tc.load_state_dict(transcoder(seed=7).state_dict()),
        lambda: tc.input_correlation.copy_(torch.eye(WIDTH)),
    ]
    for parameter in tc.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = torch.randn(3, WIDTH).double()
    for change in changes:
        change()
        assert tc._weights() is not kept
        close(tc.quadratic_form(u)(x), tc(x) @ u)
        kept = tc._weights()
    assert not torch.equal(before.quadratic, tc.quadratic_form(u).quadratic)


# --------------------------------------------------------------------------------------------------------- gauge


def normed(kind: str, tc: BilinearTC, rows: int = 50, eps: float = 0.0) -> Tensor:
    """What leaves the stored norm."""
    h = 3 * torch.randn(rows, tc.config.n_inputs).double() + 1
    h = h - h.mean(-1, keepdim=True) if kind == "layernorm" else h
    return h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * tc.norm_weight + tc.norm_bias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize(
    ("stored", "gauge"), [("layernorm", "layernorm"), ("rmsnorm", "rmsnorm"), ("layernorm", "rmsnorm")]
)
@pytest.mark.parametrize("about", ["mean", "origin"])
def test_a_gauge_changes_nothing_on_what_leaves_the_norm_and_has_the_smallest_nuclear_norm(
    form, width, stored, gauge, about
):
    tc = transcoder(form, norm=stored, n_inputs=width)
    u = torch.randn(3, OUTPUTS).double()
    fixed, free = tc.quadratic_form(u, about, gauge), tc.quadratic_form(u, about)
    x = normed(stored, tc)
    close(fixed(x), u @ tc(x).T)
    close(free(x), u @ tc(x).T)
    elsewhere = torch.randn(50, width).double()
    assert form == "input_sum" or ((fixed(elsewhere) - free(elsewhere)).abs() > 1e-3).any()
    plane = torch.eye(width).double() - (1 / width if gauge == "layernorm" else 0)
    weight = torch.diag(tc.norm_weight)
    inside, before = (plane @ weight @ read.quadratic @ weight @ plane for read in (fixed, free))
    close(inside, weight @ fixed.quadratic @ weight)  # nothing is left outside the plane
    close(inside, before - fixed.moved[:, None, None] / width * plane)
    for shift in (-0.1, -1e-3, 1e-3, 0.1):
        other = torch.linalg.matrix_norm(inside - shift * plane, "nuc")
        assert (other >= torch.linalg.matrix_norm(inside, "nuc") - 1e-12).all()
    assert form == "input_sum" or fixed.moved.abs().min() > 1e-4
    read = tc.spectrum(u, about=about, gauge=gauge, metric="euclidean")
    close(read.eigenvectors @ torch.diag_embed(read.eigenvalues) @ read.eigenvectors.mT, fixed.quadratic)
    assert torch.equal(read.moved, fixed.moved)
    assert torch.equal(read.constant, fixed.constant)


def test_a_gauge_is_exact_up_to_the_norms_eps():
    tc, u = transcoder(norm="rmsnorm"), torch.randn(OUTPUTS).double()
    form = tc.quadratic_form(u, gauge="rmsnorm")
    eps, x = 0.1, normed("rmsnorm", tc, eps=0.1)
    short = 1 - ((x - tc.norm_bias) / tc.norm_weight).square().mean(-1)
    close(form(x) - tc(x) @ u, form.moved * short)
    assert 0 < short.max() < eps


def test_a_gauge_does_not_depend_on_which_of_the_equal_forms_is_given():
    tc, u = transcoder(norm="rmsnorm"), torch.ones(OUTPUTS).double()
    expected = tc.quadratic_form(u, gauge="rmsnorm")
    other = BilinearTC(BilinearTCConfig(WIDTH, 9 + WIDTH, OUTPUTS, input_correlation=True, input_norm="rmsnorm"))
    other = other.double()
    state = tc.state_dict()
    n = torch.diag(tc.input_std / tc.norm_weight), (tc.input_mean - tc.norm_bias) / tc.norm_weight  # of z
    for name in ("left", "right"):
        state[f"{name}.weight"] = torch.cat([state[f"{name}.weight"], n[0]])
        state[f"{name}.bias"] = torch.cat([state[f"{name}.bias"], n[1]])
    state["head.weight"] = torch.cat([state["head.weight"], 2 * torch.ones(OUTPUTS, WIDTH).double()], 1)
    state["head.bias"] = state["head.bias"] - 2 * WIDTH  # 2 (n·n − n_inputs) is added to each z-scored output
    other.load_state_dict(state)
    found = other.quadratic_form(u, gauge="rmsnorm")
    close(found.quadratic, expected.quadratic)
    close(found.linear, expected.linear)
    close(found.constant, expected.constant)


# ----------------------------------------------------------------------------------------- interaction, directions


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_an_interaction_is_the_form_in_other_coordinates(form, leading):
    tc, u, d = transcoder(form), torch.randn(*leading, OUTPUTS).double(), torch.randn(WIDTH, 4).double()
    close(tc.interaction(u, d), d.T @ tc.quadratic_form(u).quadratic @ d)


@pytest.mark.parametrize("form", FORMS)
def test_the_writers_are_what_the_units_say(form):
    tc = transcoder(form)
    x = torch.randn(7, WIDTH).double()
    z = (x - tc.input_mean) / tc.input_std
    units = tc.left(z) * tc.right(z) if form == "bilinear" else z.sum(-1, keepdim=True) * tc.W_right(z)
    bias = (tc.head if form == "bilinear" else tc.W_left).bias * tc.output_std + tc.output_mean
    close(units @ tc.writers() + bias, tc(x))


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_a_logit_direction_is_the_direct_effect_through_the_final_norm(family):
    base = (tiny_neox if family == "neox" else tiny_llama)().double()
    base.requires_grad_(False)
    final = base.gpt_neox.final_layer_norm if family == "neox" else base.model.norm
    torch.nn.init.uniform_(final.weight, 0.5, 2)
    tc = BilinearTC(BilinearTCConfig(16, 8, 16)).double()
    h, y = torch.randn(16).double(), 1e-4 * torch.randn(16).double()
    head = base.get_output_embeddings()
    scale = (h - h.mean() if family == "neox" else h).square().mean().sqrt()

    def logits(h: Tensor) -> Tensor:
        """With the final norm's statistics kept as they are without y."""
        n = (h - h.mean() if family == "neox" else h) / scale
        return head(n * final.weight + (final.bias if family == "neox" else 0))

    change = logits(h + y) - logits(h)
    close(tc.logit_direction(base, 3, minus=7) @ y / scale, change[3] - change[7], 1e-6)
    close(tc.logit_direction(base, 3) @ y / scale, change[3] - change.mean(), 1e-6)


def test_a_logit_direction_takes_texts_of_one_token(tmp_path):
    words = write_base_of_words(tmp_path, tiny_neox(), ["None", "self"], WhitespaceSplit())
    base, tc = AutoModelForCausalLM.from_pretrained(words), BilinearTC(BilinearTCConfig(16, 8, 16))
    assert torch.equal(tc.logit_direction(base, "None", minus="self"), tc.logit_direction(base, 1, minus=2))
    with pytest.raises(ValueError, match=r"A logit is of one token of 50, but 'None self' is \[1, 2\]"):
        tc.logit_direction(base, "None self")
    with pytest.raises(ValueError, match="but 50 is"):
        tc.logit_direction(base, 50)
    with pytest.raises(ValueError, match="this base has no output embedding of width 16"):
        tc.logit_direction(base.gpt_neox, 1)


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama, tiny_gpt2])
def test_a_norm_is_read_whatever_its_class(make):
    base = make()
    block = (
        base.model.layers if make is tiny_llama else base.base_model.h if make is tiny_gpt2 else base.gpt_neox.layers
    )[0]
    norm = block.ln_2 if make is tiny_gpt2 else block.post_attention_layernorm
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2)
    kind, weight, bias = read_norm(norm, 16)
    assert kind == ("rmsnorm" if make is tiny_llama else "layernorm")
    close(weight, norm.weight.double(), 1e-5)
    close(bias, norm.bias.double() if kind == "layernorm" else torch.zeros(16).double(), 1e-5)
    assert read_norm(block.mlp, 16) is None
    assert read_norm(torch.nn.Identity(), 16) is None
    assert read_norm(torch.nn.Linear(7, 7), 16) is None


# ----------------------------------------------------------------------------------------- truncated, similarity


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("correlated", [True, False])
def test_a_truncated_transcoder_misses_what_it_says(form, bias, correlated):
    tc = transcoder(form, bias, correlated)
    x = samples(tc, 200_000)
    z = (tc(x) - tc.output_mean) / tc.output_std
    for n in (2, 5, 8):
        small, fvu = tc.truncated(n)
        missed = z - (small(x) - tc.output_mean) / tc.output_std
        assert small.config.n_hidden == n
        assert fvu == pytest.approx((missed.var(0).sum() / z.var(0).sum()).item(), rel=0.05, abs=1e-3)
        assert missed.mean(0).abs().max() < 0.05 * z.std(0).max()
        again, again_fvu = tc.truncated(variance=1 - fvu - 1e-9)
        assert again_fvu == pytest.approx(fvu, abs=1e-9)
        close(again(x[:9]), small(x[:9]), 1e-11 if fvu > 1e-9 else 1e-4)
    same, nothing = tc.truncated(9)
    assert abs(nothing) < 1e-9
    close(same(x[:99]), tc(x[:99]), 1e-7)


def test_a_head_solved_again_is_that_of_least_squares():
    tc = transcoder()
    small = tc.truncated(4).transcoder
    x = samples(tc, 300_000)
    h = (x - small.input_mean) / small.input_std
    units = torch.cat([small.left(h) * small.right(h), torch.ones(len(x), 1).double()], 1)
    solution = torch.linalg.lstsq(units, (tc(x) - tc.output_mean) / tc.output_std).solution
    torch.testing.assert_close(small.head.weight, solution[:-1].T, rtol=0.02, atol=0.02)
    torch.testing.assert_close(small.head.bias, solution[-1], rtol=0.02, atol=0.02)


def of_outputs(tc: BilinearTC, mean: Tensor) -> tuple[Tensor, Tensor]:
    forms = [polynomials(tc, u, mean) for u in torch.eye(OUTPUTS).double()]
    return torch.stack([form[0] for form in forms]), torch.stack([form[1] for form in forms])


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_similarity_is_isserlis_and_what_a_sample_shows(form, correlated):
    one, two = transcoder(form, correlated=correlated), transcoder("bilinear", seed=1, n_hidden=7)
    for other in (two, one.truncated(6).transcoder):
        found = one.similarity(other)
        sigma = covariance(one)
        (q, g), (p, h) = (of_outputs(tc, one.input_mean) for tc in (one, other))

        def inner(q, g, p, h, sigma=sigma):
            return 2 * torch.einsum("oij,jk,okl,li->", q, sigma, p, sigma) + torch.einsum("oi,ij,oj->", g, sigma, h)

        exact = inner(q, g, p, h) / (inner(q, g, q, g) * inner(p, h, p, h)).sqrt()
        assert found == pytest.approx(exact.item(), abs=1e-11)
        x = samples(one, 200_000)
        a, b = (tc(x) - tc(x).mean(0) for tc in (one, other))
        assert found == pytest.approx(((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item(), abs=0.02)


def test_the_similarity_does_not_depend_on_how_units_share_the_map():
    one, other = transcoder(), transcoder()
    order = torch.randperm(9)
    for name in ("left", "right"):
        getattr(other, name).weight.copy_(-2 * getattr(one, name).weight[order])
        getattr(other, name).bias.copy_(-2 * getattr(one, name).bias[order])
    other.head.weight.copy_(-3 * one.head.weight[:, order])
    other.output_mean.add_(5)
    assert one.similarity(other) == pytest.approx(-1)
    assert one.similarity(one.folded()) == pytest.approx(1)


# --------------------------------------------------------------------------------------------- stored with a layer


@pytest.mark.parametrize("norm", [None, "rmsnorm"])
@pytest.mark.parametrize("correlated", [True, False])
def test_what_a_layer_stores_of_its_inputs_is_loaded_and_never_narrowed(norm, correlated, tmp_path):
    tc = transcoder(norm=norm, correlated=correlated).float()
    tc.save_pretrained(tmp_path)
    loaded, told = BilinearTC.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert set(dict(loaded.named_buffers())) - set(STATISTICS) == {
        *(["norm_weight", "norm_bias"] if norm else []),
        *(["input_correlation"] if correlated else []),
    }
    for name, buffer in loaded.bfloat16().named_buffers():
        assert torch.equal(buffer, dict(tc.named_buffers())[name])
    sigma = covariance(tc.double())
    assert torch.allclose(loaded.input_covariance(), sigma.float(), rtol=1e-5)


def test_a_layer_without_them_in_its_file_is_as_if_it_knew_nothing(tmp_path):
    tc = transcoder(norm="layernorm").float()
    tc.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if name not in ("input_correlation", "norm_bias")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = BilinearTC.from_pretrained(tmp_path)
    assert torch.equal(loaded.input_correlation, torch.eye(WIDTH))
    assert not loaded.norm_bias.any()
    assert torch.equal(loaded.norm_weight, tc.norm_weight)
    with pytest.raises(ValueError, match="input_norm must be one of 'layernorm', 'rmsnorm' or None, not 'batch'"):
        BilinearTCConfig(4, 8, 4, input_norm="batch")

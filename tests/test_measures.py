"""Each measure of a set against a plain computation in float64, and the same on any number of processes."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict

import pytest
import torch
from bases import tiny_gpt2, tiny_llama, tiny_neox
from forking import ForkServer
from torch import Tensor, nn

from bilinear_tc import modeling_bilinear_tc
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.massive import massive, median_norm
from bilinear_tc.train.measuring import continuation
from bilinear_tc.train.measuring.held_out import measure
from bilinear_tc.train.measuring.interchange import changes_explained, interchanged
from bilinear_tc.train.measuring.jacobian import isotropic_probes, jacobian_scores
from bilinear_tc.train.measuring.low_variance import low_variance_share
from bilinear_tc.train.measuring.ordinary import PERCENTS
from bilinear_tc.train.measuring.quantiles import LogHistogram
from bilinear_tc.train.measuring.reconstruction import Reconstruction, worst_channel
from bilinear_tc.train.measuring.replacement import Replacement
from bilinear_tc.train.measuring.sample import Sample, as_map
from bilinear_tc.train.measuring.standard_error import influence, standard_error
from bilinear_tc.train.moments import Covariances, Moments
from bilinear_tc.train.processes import is_main, process_count, process_index, start_accelerator
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")
LENGTHS = torch.tensor([12, 1, 7, 9])


class Rows(Activations):
    """Activations that no base has made."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y, self.rows, self._moments_of = x, y, x.shape[1], Moments.of
        self._weights = torch.ones(x.shape[:2])
        self._ordinary = torch.ones(x.shape[:2], dtype=torch.bool)


def random_transcoders(base: Base) -> list[BilinearTC]:
    torch.manual_seed(1)
    made = make_transcoders(Recipe(init="random"), base, CPU)
    for transcoder in made:
        for name in ("input_mean", "output_mean"):
            getattr(transcoder, name).normal_()
        for name in ("input_std", "output_std"):
            getattr(transcoder, name).uniform_(0.5, 2)
    return made


def tokens(count: int, seed: int, length: int = 12) -> Tensor:
    return torch.randint(50, (count, length), generator=torch.Generator().manual_seed(seed))


def no_affine(transcoders: list[BilinearTC]) -> tuple[Tensor, Tensor]:
    width = transcoders[0].config.n_outputs
    return torch.zeros(len(transcoders), width, width), torch.zeros(len(transcoders), width)


# Ordinary tokens


@pytest.fixture
def rows() -> tuple[list[Rows], list[TokenBatch]]:
    """Two batches of padded sequences, whose rows at the first position have massive outputs in layer 1."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(12) < LENGTHS[:, None]
    firsts = mask.nonzero()[:, 1] == 0
    made = []
    for _ in range(2):
        x, y = (torch.randn(3, int(mask.sum()), 16, generator=generator) * 2 + 1 for _ in range(2))
        y[1, firsts] *= 60
        y[2, :, 5] *= 8
        made.append(Rows(x, y))
    return made, [TokenBatch(tokens(4, seed), mask) for seed in range(2)]


@torch.no_grad()
def test_ordinary_and_massive_rows_agree_with_a_plain_float64_computation(neox, rows):
    transcoders = random_transcoders(neox)
    reconstruction = Reconstruction(transcoders, no_affine(transcoders), CPU)
    for activations, batch in zip(*rows, strict=True):
        reconstruction.add(activations, batch)
    scores, influences = reconstruction.scores()
    places = torch.cat([batch.mask.nonzero() for batch in rows[1]])
    position, sequence = places[:, 1], places[:, 0] + 4 * (torch.arange(len(places)) >= len(places) // 2)
    pulls = []
    for layer, transcoder in enumerate(transcoders):
        x, y = (torch.cat([getattr(a, side)[layer] for a in rows[0]]).double() for side in "xy")
        errors = (y - transcoder.double()(x)).square()
        first = rows[0][0].y[layer].double()
        limit = 10 * first.norm(dim=1).median()
        ordinary = y.norm(dim=1) <= limit
        assert int((~ordinary).sum()) == (8 if layer == 1 else 0)
        variance = y[ordinary].var(0, correction=0)
        first = first[first.norm(dim=1) <= limit]
        own = (errors / first.var(0, correction=0)).mean(1)
        figures = scores[layer]
        assert figures["fvu_ordinary"] == pytest.approx((errors[ordinary] / variance).mean().item(), rel=1e-5)
        assert figures["massive_share"] == (~ordinary).double().mean()
        assert figures["massive_norm"] == pytest.approx(limit.item(), rel=1e-6)
        relative = errors[~ordinary].sum() / y[~ordinary].square().sum()
        assert figures["massive_error"] == (pytest.approx(relative.item(), rel=1e-5) if layer == 1 else None)
        quantiles = own[ordinary].quantile(torch.tensor(PERCENTS).double() / 100, interpolation="higher")
        lower = own[ordinary].quantile(torch.tensor(PERCENTS).double() / 100, interpolation="lower")
        for value, low, high in zip(figures["error_quantiles"].values(), lower, quantiles, strict=True):
            assert 0.994 * low <= value <= 1.006 * high
        for name, (start, end) in {"0": (0, 1), "1": (1, 2), "2–3": (2, 4), "4–7": (4, 8), "8–15": (8, 16)}.items():
            here = ordinary & (start <= position) & (position < end)
            if layer == 1 and name == "0":
                assert name not in figures["error_by_position"]
                continue
            expected = (errors[here] / variance).mean().item()
            assert figures["error_by_position"][name] == pytest.approx(expected, rel=1e-5)
        # the jackknife over sequences, which the delta method stands for
        spread = ((y - first.mean(0)) ** 2 / first.var(0, correction=0)).mean(1)
        parts = [torch.stack([own, spread])[:, ordinary & (sequence == s)].sum(1) for s in range(8)]
        total = torch.stack(parts).sum(0)
        left_out = torch.stack([(total - part)[0] / (total - part)[1] for part in parts])
        jackknife = (7 / 8 * (left_out - left_out.mean()).square().sum()).sqrt()
        assert figures["fvu_ordinary_se"] == pytest.approx(jackknife.item(), rel=0.3)
        pulls.append(total[0] / total[1] - left_out)
    mean = torch.stack(pulls).mean(0)
    jackknife = (7 / 8 * (mean - mean.mean()).square().sum()).sqrt()
    assert standard_error(influences.mean(0))[1].item() == pytest.approx(jackknife.item(), rel=0.3)


def test_the_rule_for_massive_rows():
    y = torch.cat([torch.ones(6, 4), 9.9 * torch.ones(1, 4), 10.1 * torch.ones(1, 4)])[None]
    median = median_norm(y)
    assert median.tolist() == [2]
    assert massive(y, median).tolist() == [[False] * 7 + [True]]


def test_quantiles_of_a_stream_are_right_to_half_a_percent():
    torch.manual_seed(0)
    values = torch.randn(5000).mul(3).exp().double()
    histogram = LogHistogram(2, CPU)
    for chunk in values.split([1, 999, 4000]):
        histogram.add(1, chunk)
    fractions = (0.01, 0.5, 0.99)
    expected = values.quantile(torch.tensor(fractions).double(), interpolation="lower")
    torch.testing.assert_close(histogram.quantiles(fractions)[1], expected, rtol=0.011, atol=0)


def test_the_standard_error_is_that_of_many_draws():
    """Means a token over sequences of unlike length, drawn 2,000 times."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 20, (2000, 60)).double()
    sums = lengths * (1 + torch.randn_like(lengths)) + torch.randn_like(lengths)
    drawn = (sums.sum(1) / lengths.sum(1)).std()
    told = torch.stack([standard_error(influence(a, b)) for a, b in zip(sums, lengths, strict=True)]).mean()
    assert told == pytest.approx(drawn.item(), rel=0.05)
    assert standard_error(influence(sums[0, :1], lengths[0, :1])).isnan()


def test_a_channel_is_named_if_it_carries_more_than_half_of_the_error():
    assert worst_channel(torch.tensor([1.0, 6.0, 2.0])) == {"index": 1, "share": pytest.approx(2 / 3)}
    assert worst_channel(torch.tensor([3.0, 3.0])) is None


# Derivatives, interchanges and eigenvectors


@torch.no_grad()
def test_jacobians_agree_with_those_of_autograd_in_float64(neox, llama):
    for base in (neox, llama):
        transcoder, mlp = random_transcoders(base)[1], base.mlp(1)
        torch.manual_seed(0)
        x, v, std = torch.randn(20, 16), torch.randn(20, 16), torch.rand(16).double() + 0.5
        wide = [copy.deepcopy(module).double() for module in (mlp, transcoder)]
        changes = []
        for module in wide:
            jacobians = [torch.autograd.functional.jacobian(module, row.double()) for row in x]
            changes.append(torch.stack([j @ t.double() / std for j, t in zip(jacobians, v, strict=True)]))
        a, b = changes
        expected = ((a * b).sum() / (a.norm() * b.norm()), (a - b).norm() / a.norm())
        found = jacobian_scores(lambda x, m=mlp: m(x), lambda x, t=transcoder: t(x), x, v, std)
        assert found == pytest.approx([value.item() for value in expected], rel=1e-4)


def test_isotropic_probes_give_the_frobenius_cosine_of_the_jacobians():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 6)
    b, std, output_std = a + b, torch.tensor([1.0, 2, 3, 0.5, 1, 1]), torch.ones(8).double()
    x, v = isotropic_probes(torch.zeros(4000, 6), std)
    cosine, error = jacobian_scores(lambda x: x @ a.T, lambda x: x @ b.T, x, v, output_std)
    a, b = a * std, b * std
    assert cosine == pytest.approx(((a * b).sum() / a.norm() / b.norm()).item(), abs=0.02)
    assert error == pytest.approx(((a - b).norm() / a.norm()).item(), rel=0.03)


def test_a_map_without_a_forward_derivative_is_measured_by_differences():
    class Cubed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x**3

    torch.manual_seed(0)
    x, v = torch.randn(2, 30, 4)
    scores = jacobian_scores(Cubed.apply, lambda x: x**3, x, v, torch.ones(4).double())
    assert scores == pytest.approx((1, 0), abs=1e-3)


@torch.no_grad()
def test_the_low_variance_share_agrees_with_a_plain_computation(neox):
    transcoder = random_transcoders(neox)[0].double()
    torch.manual_seed(0)
    x = torch.randn(500, 16).double() * torch.logspace(-2, 1, 16) @ torch.linalg.qr(torch.randn(16, 16).double())[0]
    covariances = Covariances(x[:1].float())
    for part in x.float().split(90):
        covariances.add(0, part)
    torch.testing.assert_close(covariances.covariance(0), x.T.cov(correction=0), rtol=1e-4, atol=1e-5)
    directions = torch.randn(7, 16)
    centered = x - x.mean(0)
    _, sizes, axes = torch.linalg.svd(centered, full_matrices=False)
    shares = sizes.square() / sizes.square().sum()
    tail = [axis for axis, rest in zip(axes, shares.flip(0).cumsum(0).flip(0), strict=True) if rest <= 0.03]
    assert 2 < len(tail) < 16
    expected = []
    for u in directions.double():
        form = torch.autograd.functional.hessian(lambda x, u=u: transcoder(x) @ u, x[0]) / 2
        values, vectors = torch.linalg.eig(form)
        top = values.real.abs().argsort(descending=True)[:5]
        expected += [sum((axis @ vectors[:, k].real) ** 2 for axis in tail) for k in top]
    found = low_variance_share(transcoder, covariances.covariance(0), directions)
    assert found == pytest.approx((sum(expected) / len(expected)).item(), rel=1e-3)
    assert transcoder not in modeling_bilinear_tc._WEIGHTS  # its float64 weights, three times a layer of a set


def sequential_neox():
    return tiny_neox(use_parallel_residual=False)


@pytest.mark.parametrize("make", [tiny_neox, sequential_neox, tiny_llama, tiny_gpt2], ids=lambda make: make.__name__)
@torch.no_grad()
def test_interchanges_agree_with_a_base_taken_apart_by_hand(make):
    """Each block's attention and MLP are captured where they leave their modules, in float64."""
    base = Base(make(), tokenizer=None)
    sample = Sample(base)
    batch = TokenBatch(tokens(5, 0))
    sample.add(batch)
    sample.take(torch.full((3,), 1e9))
    transcoder = random_transcoders(base)[2]
    found = changes_explained(
        as_map(sample, 2), transcoder, sample.inputs[2], interchanged(sample, 2), torch.arange(1.0, 17).double()
    )

    model = copy.deepcopy(base.model).double()
    decoder = model.base_model
    blocks = next(module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)
    parts: dict[str, Tensor] = {}
    for k, block in enumerate(blocks):
        attention = next(m for n, m in block.named_children() if n in ("attention", "self_attn", "attn"))
        mlp = block.mlp
        attention.register_forward_hook(lambda _m, _i, o, k=k: parts.update({f"attention {k}": o[0].flatten(0, 1)}))
        mlp.register_forward_hook(lambda _m, _i, o, k=k: parts.update({f"mlp {k}": o.flatten(0, 1)}))
    norm = next(m for n, m in blocks[2].named_children() if n in ("post_attention_layernorm", "ln_2"))
    seen: dict[str, Tensor] = {}
    norm.register_forward_hook(lambda _m, i, o: seen.update(before=i[0].flatten(0, 1), x=o.flatten(0, 1)))
    blocks[0].register_forward_pre_hook(
        lambda _m, a, k: parts.update(embedding=(*a, *k.values())[0].flatten(0, 1)), with_kwargs=True
    )
    decoder(batch.input_ids)
    before, entered = seen["before"], seen["x"]
    del parts["mlp 2"]
    if make is tiny_neox:
        del parts["attention 2"]
    torch.testing.assert_close(sum(parts.values()), before, rtol=1e-9, atol=1e-9)
    assert list(found) == sorted(parts, key=lambda n: (n != "embedding", n.split()[-1], n))
    # the tokens that the sample took, told by their inputs
    distances = torch.cdist(sample.inputs[2].double(), entered)
    rows = distances.argmin(1)
    assert distances.min(1).values.max() < 1e-4
    assert len(rows) == 15
    others = rows.roll(-(-len(rows) // 2))
    mlp, wide = blocks[2].mlp, copy.deepcopy(transcoder).double()
    for name, part in list(parts.items()):
        x, moved = entered[rows], norm(before[rows] - part[rows] + part[others])
        true, predicted = ((f(moved) - f(x)) / torch.arange(1, 17) for f in (mlp, wide))
        expected = 1 - (true - predicted).square().sum() / true.square().sum()
        assert found[name] == pytest.approx(expected.item(), rel=1e-3), name


def test_without_a_norm_before_the_mlp_nothing_is_interchanged(neox):
    for block in neox.model.gpt_neox.layers:
        block.post_attention_layernorm.forward = lambda x: x
    sample = Sample(neox)
    sample.add(TokenBatch(tokens(5, 0)))
    sample.take(torch.full((3,), 1e9))
    assert interchanged(sample, 1) == {}


def test_the_sample_is_of_text_that_is_ordinary_in_every_layer(neox):
    batch = TokenBatch(tokens(4, 0), torch.arange(12) < LENGTHS[:, None])
    y = torch.stack([y for _, y in neox.activations(batch.input_ids).values()]).flatten(1, 2)
    norms = y.norm(dim=-1)
    median = norms.median(1).values * 0.1  # 10 times it is passed by half of the tokens
    ordinary = (norms <= 10 * median[:, None]).all(0) & batch.mask.flatten()
    sample = Sample(neox)
    sample.add(batch)
    sample.take(median)
    x = neox.activations(batch.input_ids)[2][0].flatten(0, 1)[ordinary]
    assert len(sample.inputs[2]) == -(-int(ordinary.sum()) // 4)
    assert torch.cdist(sample.inputs[2], x).min(1).values.max() < 1e-4


# Several processes


def measure_on_processes() -> None:
    """A script: measures random transcoders of a tiny base on this process's shares, and prints the evaluation; with an
    argument, the layers are shared out."""
    start_accelerator()
    torch.set_num_threads(1)
    base = Base(tiny_neox(), tokenizer=None)
    transcoders = random_transcoders(base)
    replacement = Replacement(base, transcoders)
    continuation.AT_ONCE = 2
    shares = []
    for seed, padded in ((0, True), (1, False)):
        ids = tokens(4, seed)
        start, end = (rank * len(ids) // process_count() for rank in (process_index(), process_index() + 1))
        mask = (torch.arange(12) < LENGTHS[:, None])[start:end] if padded else None
        shares.append(TokenBatch(ids[start:end], mask))
    shard = Shard(len(base.layers), shared_out=len(sys.argv) > 1)
    activations = Activations(base, 48, device=CPU, dtype=torch.float32, shard=shard)
    own = [transcoders[layer] for layer in shard.own]
    evaluation = measure(shares, activations, Reconstruction(own, no_affine(own), CPU), replacement)
    if is_main():
        print(json.dumps(asdict(evaluation)))


@pytest.mark.slow
def test_one_two_and_three_processes_measure_the_same(fork_server: ForkServer):
    results = []
    for count, flags in ((1, []), (2, []), (3, []), (2, ["layers"]), (3, ["layers"])):
        started = (
            fork_server.start_processes(count, measure_on_processes, flags)
            if count > 1
            else [fork_server.start(measure_on_processes, [])]
        )
        finished = [process.wait() for process in started]
        assert [each.returncode for each in finished] == [0] * count, finished[0].stderr
        results.append(json.loads(finished[0].stdout))
    assert results[0]["layers"]["2"]["interchange"].keys() > {"embedding", "attention 0", "mlp 1"}
    for other in results[1:]:
        assert_alike(other, results[0], "")


def assert_alike(found, expected, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_alike(found[name], value, f"{where} {name}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), where
    else:
        assert found == expected, where

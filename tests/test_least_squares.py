"""Ridge least squares from normal equations, against torch.linalg.lstsq in float64."""

import logging

import torch

from bilinear_tc.train.fitting.least_squares import LeastSquares


def random_problem(rows=400, features=12, targets=5):
    torch.manual_seed(0)
    x = torch.randn(rows, features) @ torch.randn(features, features) + 30
    y = torch.randn(rows, targets) + x[:, :targets] * 0.5 - 7
    return x, y


def accumulated(x, y, chunks=3):
    equations = LeastSquares(x.mean(0, keepdim=True) + 0.3, y.mean(0, keepdim=True) - 0.1)
    for x_part, y_part in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        equations.add(0, x_part, y_part)
    return equations


def lstsq(x, y):
    """Weight and bias of the least-squares affine map, by QR in float64."""
    design = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    solution = torch.linalg.lstsq(design, y.double()).solution
    return solution[:-1].T, solution[-1]


def test_without_a_ridge_it_is_the_least_squares_solution():
    x, y = random_problem()
    weight, bias = accumulated(x, y).solve(0, ridge=1e-12)
    expected_weight, expected_bias = lstsq(x, y)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, expected_bias, rtol=1e-4, atol=1e-3)


def test_weighted_rows_and_rows_without_bias_are_part_of_what_is_least():
    x, y = random_problem()
    weights, slopes, changes = torch.rand(400), torch.randn(90, 12), torch.randn(90, 5)
    equations = LeastSquares(x.mean(0, keepdim=True) + 0.3, y.mean(0, keepdim=True) - 0.1)
    equations.add(0, x, y, weights)
    equations.add_without_bias(0, slopes, changes, torch.full((90,), 0.7))
    weight, bias = equations.solve(0, ridge=1e-12)
    design = torch.cat(
        [
            torch.cat([x, torch.ones(400, 1)], 1) * weights.sqrt()[:, None],
            torch.cat([slopes, torch.zeros(90, 1)], 1) * 0.7**0.5,
        ]
    ).double()
    targets = torch.cat([y * weights.sqrt()[:, None], changes * 0.7**0.5]).double()
    solution = torch.linalg.lstsq(design, targets).solution
    torch.testing.assert_close(weight, solution[:-1].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, solution[-1], rtol=1e-4, atol=1e-3)


def test_the_ridge_pulls_to_the_prior_in_units_of_each_feature():
    """The ridge solution is the least-squares solution of the data with one pseudo-row a feature appended."""
    x, y = random_problem()
    prior, ridge = torch.randn(y.shape[1], x.shape[1]), 0.1
    weight, _ = accumulated(x, y).solve(0, ridge=ridge, prior=prior)

    centred_x, centred_y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    pseudo_rows = torch.diag((ridge * len(x)) ** 0.5 * centred_x.std(0, correction=0))
    design = torch.cat([centred_x, pseudo_rows])
    targets = torch.cat([centred_y, pseudo_rows @ prior.T.double()])
    torch.testing.assert_close(weight, torch.linalg.lstsq(design, targets).solution.T, rtol=1e-4, atol=1e-5)


def test_a_dead_feature_keeps_its_prior_with_a_warning(caplog):
    x, y = random_problem()
    x[:, 4] = 2.5
    prior = torch.zeros(y.shape[1], x.shape[1])
    prior[:, 4] = 3.0
    with caplog.at_level(logging.WARNING):
        weight, bias = accumulated(x, y).solve(0, ridge=1e-12, prior=prior)
    assert "1 of 12 features do not vary" in caplog.text
    assert weight.isfinite().all()
    assert (weight[:, 4] == 3).all()
    keep = [i for i in range(12) if i != 4]
    expected_weight, expected_bias = lstsq(x[:, keep], y)
    torch.testing.assert_close(weight[:, keep], expected_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias + 2.5 * weight[:, 4], expected_bias, rtol=1e-4, atol=1e-3)


def test_collinear_features_stay_finite():
    x, y = random_problem()
    x[:, 7] = x[:, 6]
    weight, bias = accumulated(x, y).solve(0, ridge=1e-6)
    predicted = x.double() @ weight.T + bias
    expected_weight, expected_bias = lstsq(x[:, [i for i in range(12) if i != 7]], y)
    expected = x[:, [i for i in range(12) if i != 7]].double() @ expected_weight.T + expected_bias
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-3)


def test_features_that_lack_a_rank_cost_a_larger_ridge_and_a_warning(caplog):
    """As a text of few tokens gives; what is solved still predicts the targets."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    mixing = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    features, targets = (few @ mixing).float(), (few @ torch.ones(3, 2, dtype=torch.float64)).float()
    equations = LeastSquares(features.mean(0)[None], targets.mean(0)[None])
    equations.add(0, features, targets)
    equations.gram[0] -= 1e-4 * equations.gram[0].diagonal().diag()  # rounding of a long sum, made plain
    with caplog.at_level(logging.WARNING):
        weight, bias = equations.solve(0, ridge=1e-6)
    assert "the ridge is raised from 1e-06 to 1e-05" in caplog.text
    predicted = features.double() @ weight.T + bias
    assert (predicted - targets).square().mean() < 0.05 * targets.var()

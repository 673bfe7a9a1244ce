"""Streaming moments and FVU against float64 over the whole sample."""

import pytest
import torch

from bilinear_tc.train.moments import Moments, check_finite, fvu, fvu_raw


def test_merged_chunks_equal_the_whole_sample_in_float64():
    torch.manual_seed(0)
    x = (torch.randn(3, 1000, 5, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 3, 1]) + 50).float()
    moments = Moments.zeros(3, 5)
    for chunk in x.split([1, 400, 0, 599], dim=1):
        moments = moments.merge(Moments.of(chunk))
    wide = x.double()
    assert (moments.count == 1000).all()
    torch.testing.assert_close(moments.mean, wide.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.std, wide.std(1, correction=0), rtol=1e-5, atol=0)


def test_a_feature_that_does_not_vary_has_std_one():
    x = torch.stack([torch.full((100,), 7.3), torch.arange(100.0), torch.zeros(100)], dim=1)
    std = Moments.of(x).std
    assert std[0] == 1
    assert std[2] == 1
    assert std[1] == pytest.approx(x[:, 1].double().std(correction=0).item())


def test_fvu_equals_the_printed_formulas():
    torch.manual_seed(0)
    y = torch.randn(500, 4, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2, 3.0]) + 2
    predicted = y + 0.3 * torch.randn_like(y)
    squared_error, outputs = (y - predicted).square().sum(0), Moments.of(y)

    mean, std = y.mean(0), y.std(0, correction=0)
    z, z_predicted = (y - mean) / std, (predicted - mean) / std
    expected = (z - z_predicted).square().sum() / (z - z.mean(0)).square().sum()
    expected_raw = (y - predicted).square().sum() / (y - mean).square().sum()
    torch.testing.assert_close(fvu(squared_error, outputs), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(fvu_raw(squared_error, outputs), expected_raw, rtol=1e-6, atol=0)


def test_fvu_leaves_out_a_feature_that_does_not_vary():
    y = torch.cat([torch.randn(50, 2), torch.ones(50, 1)], dim=1).double()
    error = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)
    assert fvu(error, Moments.of(y)) == pytest.approx(fvu(error[:2], Moments.of(y[:, :2])).item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_is_named_with_its_layer_and_step(bad):
    good, spoilt = torch.randn(2, 10, 3), torch.randn(2, 10, 3)
    spoilt[1, 4, 2] = bad
    with pytest.raises(FloatingPointError, match="MLP output of layer 9 holds a NaN or an infinity at step 7"):
        check_finite(Moments.of(good), Moments.of(spoilt), [3, 9], "step 7")
    check_finite(Moments.of(good), Moments.of(good), [3, 9], "step 7")

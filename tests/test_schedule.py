"""The learning-rate schedules against their printed formulas."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from bilinear_tc.train.fitting.schedule import SCHEDULES, schedule
from bilinear_tc.train.recipe import Recipe


def test_a_recipe_can_name_every_schedule():
    assert get_args(get_type_hints(Recipe)["lr_schedule"]) == tuple(SCHEDULES)


def test_constant_is_one_throughout():
    assert [schedule("constant", step, 7) for step in range(7)] == [1.0] * 7


def test_linear_falls_in_equal_steps_towards_zero():
    assert [schedule("linear", step, 5) for step in range(6)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0], abs=1e-12)


def test_wsd_warms_up_for_a_hundredth_and_decays_over_the_last_fifth():
    factors = [schedule("wsd", step, 1000) for step in range(1001)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10:801] == pytest.approx([1.0] * 791)
    assert factors[801:] == pytest.approx([(1000 - step) / 200 for step in range(801, 1001)], abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_factor_of_a_short_fit_is_above_zero_and_at_most_one(name):
    assert all(0 < schedule(name, step, n) <= 1 for n in (1, 2, 3, 99) for step in range(n))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("cosine", 0, 10), "constant, linear, wsd"), (("linear", -1, 10), "step ≥ 0"), (("wsd", 0, 0), "max_steps ≥ 1")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)

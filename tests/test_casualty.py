"""Casualty computations a second time: dollar by dollar, by integration, by matrices and by hand."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elson_nb.corpus import casualty

fast = settings(derandomize=True, max_examples=40, deadline=None)
money = st.integers(0, 2_000_000)
some = st.integers(1_000, 2_000_000)
share = st.integers(0, 100).map(lambda x: x / 100)


@fast
@given(some, st.integers(0, 40), st.integers(1, 40))
def test_cash_value_by_writing_off_year_by_year(cost, age, life):
    left = float(cost)
    for _ in range(min(age, life)):
        left -= cost / life
    assert casualty.actual_cash_value(cost, age, life) == pytest.approx(left, abs=0.006)


@fast
@given(money, money, some)
def test_layer_by_two_put_together_and_by_clipping(loss, attachment, limit):
    clipped = np.clip(loss, attachment, attachment + limit) - attachment
    assert casualty.layer_payment(loss, attachment, limit) == pytest.approx(clipped)
    half = limit // 2
    parts = [
        casualty.layer_payment(loss, attachment, half),
        casualty.layer_payment(loss, attachment + half, limit - half),
    ]
    assert sum(parts) == pytest.approx(clipped)


@fast
@given(some, share, st.integers(0, 10_000), some)
def test_holdback_and_cash_payment_make_the_replacement_payment(cost, part, deductible, limit):
    cash = round(cost * part, 2)
    first = casualty.layer_payment(cash, deductible, limit)
    both = first + casualty.recoverable_depreciation(cost, cash, deductible, limit)
    assert both == pytest.approx(sorted([0, cost - deductible, limit])[1], abs=0.01)


@fast
@given(some, share, share, money)
def test_business_income_as_profit_expected_less_profit_made(revenue, drop, saved, extra):
    actual, fixed = revenue * (1 - drop), 0.4 * revenue
    profit = [sales * (1 - saved) - fixed for sales in (revenue, actual)]
    assert casualty.business_income_loss(revenue, actual, saved, extra) == pytest.approx(
        profit[0] - profit[1] + extra, abs=0.01
    )


@fast
@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=5), money, st.sampled_from([25, 50, 100, 250]))
def test_split_limits_by_paying_claimants_in_turn(injuries, property_damage, limit):
    person, accident, left = limit * 1_000, limit * 2_000, limit * 2_000
    for injury in injuries:
        left -= min(left, person, injury)
    expected = accident - left + sorted([0, property_damage, 50_000])[1]
    assert casualty.split_limit_payment(injuries, property_damage, person, accident, 50_000) == expected


@fast
@given(some, st.integers(0, 100))
def test_negligence_by_table(damages, fault):
    net = damages - damages * fault / 100
    table = {
        "pure": net,
        "below 50": net if fault <= 49 else 0,
        "up to 50": net if fault <= 50 else 0,
        "contributory": net if fault == 0 else 0,
    }
    for rule, expected in table.items():
        assert casualty.negligence_recovery(damages, fault / 100, rule) == pytest.approx(expected, abs=0.01)


@fast
@given(st.integers(0, 900), st.integers(0, 300), st.integers(0, 300), st.integers(0, 500))
def test_umbrella_thousand_by_thousand(award, primary, required, umbrella):
    payer = ["P"] * primary + ["G"] * max(0, required - primary) + ["U"] * umbrella + ["X"] * 1_000
    parts = [payer[:award].count(who) for who in "PGUX"]
    assert list(casualty.umbrella_shares(award, primary, required, umbrella)) == parts


@fast
@given(some, share, share)
def test_diminished_value_in_logarithms(value, damage, mileage):
    assume(damage > 0 and mileage > 0)
    logs = np.log10(value) - 1 + np.log10(damage) + np.log10(mileage)
    assert casualty.diminished_value(value, damage, mileage) == pytest.approx(10**logs, abs=0.006)


@fast
@given(st.integers(1, 400), st.integers(1, 300), st.integers(1, 100), st.integers(0, 20))
def test_recovery_handed_out_dollar_by_dollar(recovery, paid, own, costs):
    pot = max(0, recovery - costs)
    for rule, queue in {
        "made whole": [1] * own + [0] * paid,
        "insurer first": [0] * paid + [1] * own,
    }.items():
        got = queue[:pot]
        assert casualty.subrogation_shares(recovery, paid, own, rule, costs) == (got.count(0), got.count(1))
    insurer, insured = casualty.subrogation_shares(recovery, paid, own, "pro rata", costs)
    assert insurer + insured == pytest.approx(min(pot, paid + own))
    assert insured * paid == pytest.approx(insurer * own, abs=0.006 * (paid + own))


@fast
@given(st.integers(0, 900), st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_equal_shares_by_water_level(loss, limits):
    target, low, high = min(loss, sum(limits)), 0.0, float(max(limits))
    for _ in range(80):
        level = (low + high) / 2
        low, high = (level, high) if sum(min(level, limit) for limit in limits) < target else (low, level)
    assert casualty.equal_shares(loss, limits) == pytest.approx([min(high, x) for x in limits], abs=0.006)


@fast
@given(money, money, some, some, share, some)
def test_experience_modification_as_a_credibility_blend(ap, ae, ep, ee, weight, ballast):
    expected = ep + ee
    change = ((ap - ep) + weight * (ae - ee)) / (expected + ballast)
    assert casualty.experience_modification(ap, ae, ep, ee, weight, ballast) == pytest.approx(
        1 + change, abs=0.0051
    )


@fast
@given(st.integers(1, 4_000), st.integers(200, 2_000), share)
def test_wage_benefit_by_steps(wage, maximum, part):
    earned = round(wage * part, 2)
    minimum, lost = maximum / 5, wage - earned
    benefit = lost / 3 * 2
    if benefit < minimum:
        benefit = min(minimum, lost)
    if benefit > maximum:
        benefit = maximum
    assert casualty.wage_benefit(wage, maximum, minimum, earned) == pytest.approx(benefit, abs=0.006)


@fast
@given(some, money)
def test_retrospective_premium_by_median(basic, losses):
    raw = basic * 1.03 + losses * 1.12 * 1.03
    middle = float(np.median([basic * 1.5, raw, basic * 4]))
    found = casualty.retrospective_premium(basic, losses, 1.12, 1.03, basic * 1.5, basic * 4)
    assert found == pytest.approx(middle, abs=0.01)


@fast
@given(st.integers(1, 9_000), st.integers(50, 500), st.integers(1, 9))
def test_surplus_by_filling_lines(value, line, lines):
    left, ceded = value - line, 0
    for _ in range(lines):
        ceded += max(0, min(line, left))
        left -= line
    assert casualty.surplus_cession(value, line, lines) * value == pytest.approx(ceded)


@fast
@given(st.lists(st.integers(0, 900), min_size=1, max_size=6), st.integers(0, 400), st.integers(1, 400))
def test_excess_of_loss_with_numpy(losses, retention, limit):
    layer = np.minimum(np.maximum(np.array(losses) - retention, 0), limit)
    assert casualty.excess_recovery(losses, retention, limit) == layer.sum()
    running, paid = 0, 0
    for hit in layer:
        before = min(max(running - 50, 0), 600)
        running += hit
        paid += min(max(running - 50, 0), 600) - before
    assert casualty.excess_recovery(losses, retention, limit, 50, 600) == paid


@fast
@given(st.integers(0, 500), st.integers(500, 900), st.integers(1, 300))
def test_reinstatement_and_sliding_scale(loss, limit, premium):
    assert casualty.reinstatement_premium(loss, limit, premium) == pytest.approx(
        premium - premium * (limit - loss) / limit, abs=0.006
    )
    ratio = loss / 500
    table = np.interp(ratio, [0.45, 0.60, 0.70], [0.375, 0.30, 0.25])
    assert casualty.sliding_commission(ratio, 0.30, 0.60, 0.5, 0.25, 0.375) == pytest.approx(table)


@fast
@given(st.lists(st.integers(100, 900), min_size=4, max_size=4), st.lists(share, min_size=6, max_size=6))
def test_chain_ladder_by_matrix(first, growth):
    growth, full = iter(growth), np.full((4, 4), np.nan)
    for row in range(4):
        full[row, 0] = first[row]
        for age in range(1, 4 - row):
            full[row, age] = full[row, age - 1] * (1 + next(growth))
    triangle = [[x for x in row if not np.isnan(x)] for row in full.tolist()]
    for age in range(3):
        known = ~np.isnan(full[:, age + 1])
        factor = full[known, age + 1].sum() / full[known, age].sum()
        full[~known, age + 1] = full[~known, age] * factor
    assert casualty.chain_ladder(triangle) == pytest.approx(full[:, 3].tolist(), abs=0.006)


@fast
@given(some, some, st.floats(1, 4))
def test_bornhuetter_ferguson_as_a_blend_of_chain_ladder_and_expected(reported, expected, factor):
    credibility = 1 / factor
    blend = credibility * (reported * factor) + (1 - credibility) * expected
    assert casualty.bornhuetter_ferguson(reported, expected, factor) == pytest.approx(blend, abs=0.01)


@fast
@given(some, st.integers(10, 5_000), st.floats(1, 3), st.floats(-0.1, 0.2), st.integers(0, 6))
def test_trend_year_by_year(losses, exposures, development, trend, n):
    cost = losses * development / exposures
    for _ in range(n):
        cost += cost * trend
    found = casualty.trended_pure_premium(losses, exposures, development, trend, n)
    assert found == pytest.approx(cost, abs=0.01)


def test_limits_of_what_is_accepted():
    for call in (
        lambda: casualty.layer_payment(-1, 0, 1),
        lambda: casualty.business_income_loss(1, 2, 0.5),
        lambda: casualty.split_limit_payment([1], 1, 2, 1, 1),
        lambda: casualty.subrogation_shares(1, 1, 1, "friendly"),
        lambda: casualty.bornhuetter_ferguson(1, 1, 0.9),
        lambda: casualty.surplus_cession(0, 1, 1),
    ):
        with pytest.raises(ValueError):
            call()

"""Life contingencies a second time: backward recursions, ledgers, printed tables, simulation by year."""

import math

import numpy as np
import numpy_financial as npf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elson_nb.corpus import life_contingencies as life

fast = settings(derandomize=True, max_examples=40, deadline=None)
deaths = st.lists(st.floats(0.0, 0.4), min_size=2, max_size=25)
rates = st.sampled_from([0.0, 0.01, 0.03, 0.05, 0.12])


def insurance_by_recursion(q, i, maturity=0.0):
    value = maturity
    for rate in reversed(q):
        value = (rate + (1 - rate) * value) / (1 + i)
    return value


def annuity_by_recursion(q, i):
    value = 0.0
    for rate in reversed(q):
        value = 1 + (1 - rate) * value / (1 + i)
    return value


@pytest.mark.parametrize(
    ("age", "lives", "insurance", "annuity"),
    [(40, 99_338.3, 0.12106, 18.4578), (65, 94_579.7, 0.35477, 13.5498)],
)
def test_standard_ultimate_life_table_as_printed(age, lives, insurance, annuity):
    survivors = 100_000 * life.survival_probability(life.standard_rates(20, age - 20), age - 20)
    assert survivors == pytest.approx(lives, abs=0.06)
    q = life.standard_rates(age, 130 - age)
    assert life.net_single_premium(1, q, 0.05) == pytest.approx(insurance, abs=6e-6)
    assert life.life_annuity_value(1, q, 0.05) == pytest.approx(annuity, abs=6e-5)


@fast
@given(deaths, rates)
def test_values_by_backward_recursion(q, i):
    assert life.survival_probability(q, len(q)) == pytest.approx(np.prod(1 - np.array(q)))
    assert life.life_expectancy(q) == pytest.approx(np.cumprod(1 - np.array(q)).sum())
    assert life.life_expectancy(q, complete=True) == pytest.approx(life.life_expectancy(q) + 0.5)
    assert life.net_single_premium(1000, q, i) == pytest.approx(1000 * insurance_by_recursion(q, i))
    whole = insurance_by_recursion(q, i, 1.0)
    assert life.net_single_premium(1000, q, i, endowment=True) == pytest.approx(1000 * whole)
    assert life.life_annuity_value(5, q, i) == pytest.approx(5 * annuity_by_recursion(q, i))
    # A = 1 - d x annuity, for an endowment of the same term
    assert whole == pytest.approx(1 - i / (1 + i) * annuity_by_recursion(q, i))


@fast
@given(deaths, rates, st.booleans(), st.data())
def test_reserve_is_what_the_survivors_have_put_aside(q, i, endowment, data):
    duration = data.draw(st.integers(0, len(q) - 1))
    benefit = 10_000
    level = benefit * insurance_by_recursion(q, i, 1.0 if endowment else 0.0) / annuity_by_recursion(q, i)
    assert life.net_level_premium(benefit, q, i, endowment) == pytest.approx(level, abs=0.0051)
    fund = 0.0  # retrospective: last year's fund and premium with interest, less claims, over survivors
    for rate in q[:duration]:
        fund = ((fund + level) * (1 + i) - benefit * rate) / (1 - rate)
    assert life.net_premium_reserve(benefit, q, i, duration, endowment) == pytest.approx(fund, abs=0.02)


@fast
@given(st.integers(100, 9_000), st.integers(0, 60_000), st.integers(5, 30), st.integers(0, 900))
def test_surrender_cost_index_brings_the_ledger_to_nought(premium, cash, years, dividend):
    index = life.surrender_cost_index(premium, cash, years, 100_000, dividend)
    paid = -npf.fv(0.05, years, premium, 0, "begin") + npf.fv(0.05, years, dividend, 0) - cash
    each = -npf.pmt(0.05, years, 0, paid, "begin")
    assert index == pytest.approx(each / 100, abs=0.0051)


@fast
@given(
    st.integers(30, 150),
    st.integers(0, 160),
    st.integers(1, 40),
    st.sampled_from([0, 0.01, 0.025, 0.05]),
    st.integers(0, 900),
)
def test_survivor_capital_lasts_exactly(need, other, years, real, resources):
    capital = life.survivor_capital(need * 1000, other * 1000, years, real, 50_000, resources * 1000)
    value = sum(max(0, need - other) * 1000 / (1 + real) ** t for t in range(years))
    assert capital == pytest.approx(max(0, 50_000 + value - resources * 1000), abs=0.0051)


@fast
@given(st.integers(20, 900), st.integers(2, 90), st.floats(5, 30))
def test_annuity_payments_return_the_investment_over_the_expected_years(cost, payment, multiple):
    ratio = life.exclusion_ratio(cost * 1000, payment * 1000, multiple)
    returned = ratio * payment * 1000 * multiple
    assert returned == pytest.approx(min(cost * 1000, payment * 1000 * multiple))


@fast
@given(st.integers(0, 500), st.integers(0, 500), st.floats(0, 1))
def test_withdrawals_dollar_by_dollar(value, basis, share):
    taken = int(value * share)
    taxed = sum(1 for dollar in range(taken) if value - dollar > basis)
    assert life.withdrawal_income(value, basis, taken) == taxed


@fast
@given(st.floats(-0.5, 0.6), st.floats(0, 1.5), st.floats(0, 0.2), st.floats(0, 0.03))
def test_indexed_credit_as_a_spread_of_two_calls(change, participation, cap, spread):
    raw = participation * change - spread
    call_spread = max(raw, 0) - max(raw - cap, 0)
    assert life.indexed_credit(change, participation, cap, spread) == pytest.approx(call_spread, abs=1e-12)


@fast
@given(st.integers(0, 30_000), st.sampled_from([0.5, 0.6, 0.66]), st.integers(0, 9_000))
def test_group_benefit_by_cases(earnings, share, offsets):
    gross = 6_000 if earnings * share > 6_000 else earnings * share
    expected = gross - offsets if gross - offsets > 100 else 100
    assert life.disability_benefit(earnings, share, 6_000, offsets) == pytest.approx(expected, abs=0.0051)


@fast
@given(st.integers(1, 300), st.integers(0, 400))
def test_residual_benefit_by_integer_percent(before, now):
    lost = max(0, before - now)
    expected = 0 if lost * 5 < before else 4_000 if lost * 4 >= before * 3 else 4_000 * lost / before
    assert life.residual_benefit(4_000, before, now) == pytest.approx(expected, abs=0.0051)


@fast
@given(
    st.integers(100, 500),
    st.integers(50, 500),
    st.floats(0, 0.06),
    st.floats(0, 0.05),
    st.integers(0, 30),
    st.integers(1, 7),
    st.sampled_from([0, 30, 90, 180]),
    st.integers(1, 5),
)
def test_care_shortfall_day_by_day(cost, benefit, growth, rider, wait, stay, elimination, limit):
    own = 0.0
    for day in range(stay * 365):
        year = day // 365
        price = cost * (1 + growth) ** (wait + year)
        paid = elimination <= day < elimination + limit * 365
        own += price - (min(price, benefit * (1 + rider) ** (wait + year)) if paid else 0)
    found = life.care_shortfall(cost, growth, benefit, rider, wait, stay, elimination, limit)
    assert found == pytest.approx(own, rel=1e-9, abs=0.01)


# 2025 as printed by CMS: (top of the band, Part B premium, Part D surcharge).
SINGLE = [
    (106_000, 185.00, 0),
    (133_000, 259.00, 13.70),
    (167_000, 370.00, 35.30),
    (200_000, 480.90, 57.00),
    (499_999, 591.90, 78.60),
    (math.inf, 628.90, 85.80),
]
JOINT_TOPS = [212_000, 266_000, 334_000, 400_000, 749_999, math.inf]


@fast
@given(st.integers(0, 900_000))
def test_income_surcharge_by_the_printed_bands(magi):
    for status, tops in (("single", [row[0] for row in SINGLE]), ("joint", JOINT_TOPS)):
        band = next(k for k, top in enumerate(tops) if magi <= top)
        _, premium, drugs = SINGLE[band]
        assert life.income_surcharge(magi, status, "B") == pytest.approx(premium - 185)
        assert life.income_surcharge(magi, status, "D") == drugs
        assert life.income_surcharge(magi, status) == pytest.approx(premium - 185 + drugs)


@fast
@given(st.integers(0, 200))
def test_late_penalties(months):
    assert life.part_b_penalty(months) == pytest.approx(18.5 * (months // 12), abs=0.001)
    assert abs(life.part_d_penalty(months) - 0.3678 * months) <= 0.0500001


@fast
@given(st.integers(0, 150))
def test_medicare_days_one_by_one(days):
    own = 1_676 if days else 0
    for day in range(1, days + 1):
        own += 0 if day <= 60 else 419 if day <= 90 else 838
    assert life.hospital_share(days) == own
    if days <= 100:
        assert life.nursing_share(days) == sum(209.5 for day in range(1, days + 1) if day > 20)


@fast
@given(st.integers(0, 40_000))
def test_drug_share_and_plan_cost_fill_by_fill(cost):
    own = 0.0
    for dollar in range(0, cost, 10):  # prescriptions of at most $10
        fill = min(10, cost - dollar)
        full = min(fill, max(0, 590 - dollar))
        own = min(2_000, own + full + 0.25 * (fill - full))
    assert life.drug_share(cost) == pytest.approx(own, abs=0.01)
    total = life.health_plan_cost(100, cost, 590, 0.25, 2_000, 300, 50)
    assert total == pytest.approx(own + 1200 - 350, abs=0.02)


@fast
@given(st.integers(100, 700), st.integers(1, 6), st.integers(2_000, 20_000), st.integers(2_000, 20_000))
def test_premium_credit_by_interpolation(level, household, benchmark, chosen):
    line = 15_060 + 5_380 * (household - 1)
    income = level / 100 * line
    share = np.interp(level, [150, 200, 250, 300, 400], [0, 0.02, 0.04, 0.06, 0.085])
    assert life.expected_contribution(income, household) == pytest.approx(share, abs=0.000051)
    credit = min(chosen, max(0, benchmark - income * share))
    assert life.premium_credit(income, household, benchmark, chosen) == pytest.approx(
        credit, abs=income * 0.000051 + 0.01
    )


@fast
@given(st.integers(0, 5_000), st.integers(1, 200), st.floats(1, 500), st.floats(0.1, 50))
def test_credibility(claims, n, process, between):
    z = life.credibility_factor(claims)
    assert 1_082 * z**2 == pytest.approx(min(claims, 1_082), abs=1e-6)
    # the weight that minimises E[(Z mean + (1 - Z) mu - theta)^2] = Z^2 process / n + (1 - Z)^2 between
    grid = np.linspace(0, 1, 4001)
    best = grid[np.argmin(grid**2 * process / n + (1 - grid) ** 2 * between)]
    assert life.buhlmann_factor(n, process, between) == pytest.approx(best, abs=3e-4)

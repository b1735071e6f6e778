"""Performance measures worked out a second time: by scipy, numpy, simulation or another formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from elson_nb.corpus import finance, performance

fast = settings(derandomize=True, max_examples=40, deadline=None)
small = st.floats(-0.2, 0.2).map(lambda x: round(x, 4))
series = st.lists(st.tuples(small, small), min_size=3, max_size=24)
money = st.floats(1, 1e6).map(lambda x: round(x, 2))


@fast
@given(st.lists(small, min_size=2, max_size=6), st.lists(money, min_size=6, max_size=6), money)
def test_returns_with_flows(growth, deposits, start):
    value, spans, flows = start, [], [(0, -start)]
    for year, rate in enumerate(growth):
        spans.append((value, value * (1 + rate)))
        value = value * (1 + rate)
        if year < len(growth) - 1:
            flows.append((year + 1, -deposits[year]))
            value += deposits[year]
    flows.append((len(growth), value))
    assert performance.time_weighted_return(spans) == pytest.approx(np.prod(1 + np.array(growth)) - 1)
    root = brentq(lambda r: sum(f * (1 + r) ** (len(growth) - t) for t, f in flows), -0.9, 5)
    assert performance.money_weighted_return(flows) == pytest.approx(root, abs=1e-8)


@fast
@given(money, small, st.floats(0, 1), st.floats(0, 1e5))
def test_modified_dietz_is_the_simple_return_that_reproduces_the_closing_value(opening, rate, weight, flow):
    closing = opening * (1 + rate) + flow * (1 + rate * weight)
    assert performance.modified_dietz(opening, closing, [(weight, flow)]) == pytest.approx(rate, abs=1e-6)


@fast
@given(series)
def test_risk_ratios_agree_with_numpy(pairs):
    portfolio, benchmark = (np.array(x) for x in zip(*pairs, strict=True))
    error = np.std(portfolio - benchmark, ddof=1)
    assert performance.tracking_error(portfolio, benchmark) == pytest.approx(error, abs=1e-12)
    if error > 1e-6:
        ratio = np.mean(portfolio - benchmark) / error
        assert performance.information_ratio(portfolio, benchmark) == pytest.approx(ratio, abs=1e-9)
    downside = np.sqrt(np.mean(np.clip(portfolio - 0.01, None, 0) ** 2))
    if downside > 1e-6:
        assert performance.sortino_ratio(portfolio, 0.01) == pytest.approx(
            (portfolio.mean() - 0.01) / downside
        )


@fast
@given(small, st.floats(0, 0.05), st.floats(0.2, 2), small)
def test_alpha_and_treynor_against_the_capm(portfolio, risk_free, beta, market):
    required = finance.capm_return(risk_free, beta, market)
    assert performance.jensen_alpha(portfolio, risk_free, beta, market) == pytest.approx(portfolio - required)
    gap = performance.treynor_ratio(portfolio, risk_free, beta) - (market - risk_free)
    assert gap * beta == pytest.approx(portfolio - required, abs=1e-9)


@fast
@given(st.lists(st.floats(1, 500), min_size=1, max_size=15))
def test_drawdown_over_all_pairs(values):
    worst = max((1 - b / a for i, a in enumerate(values) for b in values[i:]), default=0)
    assert performance.maximum_drawdown(values) == pytest.approx(max(0, worst))


@fast
@given(st.lists(st.tuples(st.floats(0.1, 1), small, st.floats(0.1, 1), small), min_size=2, max_size=6))
def test_attribution_adds_up(rows):
    w, r, v, b = (np.array(x) for x in zip(*rows, strict=True))
    w, v = w / w.sum(), v / v.sum()
    allocation, selection, interaction = performance.brinson_effects(w, r, v, b)
    assert allocation == pytest.approx(w @ b - v @ b)
    assert selection == pytest.approx(v @ r - v @ b)
    assert allocation + selection + interaction == pytest.approx(w @ r - v @ b)


@fast
@given(st.floats(0, 0.1), st.floats(0.005, 0.12), st.integers(1, 30))
def test_convexity_by_a_second_difference(coupon, rate, years):
    h = 1e-3
    up, mid, down = (finance.bond_price(1, coupon, rate + k * h, years) for k in (1, 0, -1))
    slope = (up - 2 * mid + down) / h**2 / mid
    assert performance.bond_convexity(coupon, rate, years) == pytest.approx(slope, rel=2e-3)


@fast
@given(money, st.floats(0, 0.1), st.integers(0, 180))
def test_accrued_interest_by_thirty_three_sixty(face, coupon, days):
    assert performance.accrued_interest(face, coupon, days, 180) == pytest.approx(
        face * coupon * days / 360, abs=0.0051
    )


@fast
@given(money, money, st.integers(1, 10_000))
def test_fund_share_value_gives_back_the_net_assets(net, debts, shares):
    value = performance.fund_share_value(net + debts, debts, shares)
    assert value * shares == pytest.approx(net, abs=0.006 * shares)


@fast
@given(st.sampled_from([-2, -1, 2, 3]), st.lists(small, min_size=1, max_size=30))
def test_leveraged_fund_day_by_day(multiple, returns):
    value = 1.0
    for r in returns:
        value += value * multiple * r
    assert performance.leveraged_fund_return(multiple, returns) == pytest.approx(value - 1)


@fast
@given(money, st.floats(0, 0.4), money, money, st.floats(0.03, 0.12))
def test_property_income_and_value(rent, vacancy, other, expenses, rate):
    income = performance.net_operating_income(rent, vacancy, other, expenses)
    assert income == pytest.approx(rent - rent * vacancy + other - expenses, abs=0.006)
    assert performance.capitalized_value(income, rate) * rate == pytest.approx(income, abs=0.01)


@fast
@given(st.floats(50, 200), st.floats(0.1, 0.3), st.floats(0, 0.1))
def test_performance_fee_bounds(value, share, hurdle):
    hard, soft = (performance.performance_fee(value, 100, share, hurdle, s) for s in (False, True))
    assert hard == pytest.approx(share * max(0, value - 100 * (1 + hurdle)), abs=0.0051)
    gain = value - 100
    assert soft == pytest.approx(share * gain if gain > 100 * hurdle and gain > 0 else 0, abs=0.0051)


@fast
@given(st.floats(0, 400), st.integers(1, 8), st.sampled_from([0, 0.5, 1.0]))
def test_waterfall_dollar_by_dollar(proceeds, years, catch_up):
    owed = 100 * 1.08**years
    step, manager, paid = 0.01, 0.0, 0.0
    while paid + step <= proceeds:
        if paid >= owed:
            profit = paid - 100
            manager += step * (catch_up if catch_up and manager < 0.2 * profit - 1e-9 else 0.2)
        paid += step
    partners, general = performance.distribution_waterfall(proceeds, 100, years, catch_up=catch_up)
    assert partners + general == pytest.approx(proceeds, abs=0.011)
    assert general == pytest.approx(manager, abs=0.05)

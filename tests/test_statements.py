"""The sums of module `statements`, each worked out a second time by another road."""

import math

import numpy as np
import numpy_financial as npf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from elson_nb.corpus import statements

fast = settings(derandomize=True, max_examples=40, deadline=None)
money = st.floats(1, 1e6, allow_nan=False).map(lambda x: round(x, 2))
rates = st.floats(0.001, 0.2)
counts = st.integers(1, 40)


@fast
@given(money, rates, counts)
def test_leases_agree_with_numpy_financial_and_run_down_to_zero(payment, rate, n):
    assert statements.lease_liability(payment, rate, n) == pytest.approx(-npf.pv(rate, n, payment), abs=0.006)
    advance = statements.lease_liability(payment, rate, n, in_advance=True)
    assert advance == pytest.approx(payment - npf.pv(rate, n - 1, payment), abs=0.006)
    balance = statements.lease_liability(payment, rate, n)
    for _ in range(n):
        balance = balance * (1 + rate) - payment
    assert balance == pytest.approx(0, abs=0.006 * (1 + rate) ** n + 1e-6 * payment)
    assert statements.right_of_use_asset(payment, 5, 3, 1) == pytest.approx(payment + 7, abs=0.006)


@fast
@given(st.floats(0, 0.12), st.floats(0.01, 0.12), st.integers(1, 40), st.data())
def test_bond_ledger_period_by_period(coupon, market, n, data):
    elapsed = data.draw(st.integers(0, n))
    book = statements.bond_carrying_amount(10_000, coupon, market, n, 0)
    assert book == pytest.approx(-npf.pv(market / 2, n, 10_000 * coupon / 2, 10_000), abs=0.006)
    for _ in range(elapsed):
        book += statements.effective_interest(book, market, 2) - 10_000 * coupon / 2
    assert statements.bond_carrying_amount(10_000, coupon, market, n, elapsed) == pytest.approx(book, abs=0.8)


@fast
@given(money, money, money)
def test_contracts(price, incurred, more):
    total = incurred + more
    to_date = statements.completion_revenue(price, incurred, total)
    rest = statements.completion_revenue(price, more, total)
    assert to_date + rest == pytest.approx(price, abs=0.011)
    assert statements.contract_loss(price, total) == pytest.approx(np.clip(total - price, 0, None), abs=0.006)
    with pytest.raises(ValueError, match="must not exceed"):
        statements.completion_revenue(price, total + 1, total)


@fast
@given(st.integers(1_000, 10**6), st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 12)), max_size=4))
def test_shares_month_by_month(opening, changes):
    monthly = [opening + sum(s for s, left in changes if left >= 12 - month) for month in range(12)]
    shares = statements.weighted_shares(opening, changes)
    assert shares == pytest.approx(sum(monthly) / 12)
    assert statements.earnings_per_share(5e5, 1e4, shares) == pytest.approx(
        49e4 / np.mean(monthly), abs=0.006
    )


@fast
@given(st.integers(1, 10**5), st.floats(1, 100), st.floats(1, 100))
def test_options_by_buying_back(options, strike, price):
    bought_back = options * strike / price
    assert statements.treasury_stock_shares(options, strike, price) == pytest.approx(
        max(0, options - bought_back), abs=1e-6
    )


@fast
@given(money, money, money)
def test_lower_of_cost_and_the_two_impairments(a, b, c):
    value = sorted([a, max(b - c, 0)])[0]
    assert statements.lower_of_cost_and_nrv(a, b, c) == pytest.approx(value, abs=0.006)
    new_book = min(a, max(b, c))
    assert a - statements.recoverable_amount_loss(a, b, c) == pytest.approx(new_book, abs=0.006)
    new_book = a if b >= a else min(a, c)
    assert a - statements.held_asset_impairment(a, b, c) == pytest.approx(new_book, abs=0.006)


@fast
@given(money, st.floats(1.1, 3), st.floats(0, 0.2), st.floats(0, 0.2), st.floats(0, 0.7))
def test_retail_method_by_shares_of_retail(cost, multiple, up, down, sold):
    retail = cost * multiple
    args = cost, retail, up * retail, down * retail, sold * retail
    left = 1 + up - down - sold
    assert statements.retail_inventory(*args) == pytest.approx(left / (1 + up) * cost, abs=0.006)
    assert statements.retail_inventory(*args, conventional=False) == pytest.approx(
        left / (1 + up - down) * cost, abs=0.006
    )


@fast
@given(st.lists(st.tuples(money, rates), min_size=1, max_size=6))
def test_ageing_by_dot_product(classes):
    balances, losses = zip(*classes, strict=True)
    assert statements.ageing_allowance(balances, losses) == pytest.approx(np.dot(balances, losses), abs=0.006)


@fast
@given(st.floats(1, 90), st.floats(1, 90), st.integers(1, 9_000), st.integers(1, 9_000))
def test_variances_add_up_to_actual_less_standard_cost(actual_price, standard_price, used, allowed):
    total = actual_price * used - standard_price * allowed
    found = statements.price_variance(actual_price, standard_price, used)
    found += statements.quantity_variance(used, allowed, standard_price)
    assert found == pytest.approx(total, abs=0.011)
    assert statements.equivalent_units(used, allowed, 0.25) == pytest.approx(used + allowed / 4)


@fast
@given(st.floats(0.5, 0.99), money)
def test_sampling_interval_by_the_poisson_law(confidence, tolerable):
    interval = statements.sampling_interval(tolerable, confidence)
    # a population wrong by the tolerable amount has tolerable/interval wrong hits expected; none is seen with
    # probability 1 - confidence
    assert stats.poisson.pmf(0, tolerable / interval) == pytest.approx(1 - confidence)
    assert statements.sampling_interval(tolerable, confidence, tolerable / 3.2, 1.6) == pytest.approx(
        interval / 2
    )


@fast
@given(st.integers(0, 9), st.integers(20, 250), st.floats(0.8, 0.99))
def test_upper_deviation_rate_by_the_beta_quantile(found, sample, confidence):
    assert statements.upper_deviation_rate(found, sample, confidence) == pytest.approx(
        stats.beta.ppf(confidence, found + 1, sample - found), abs=1e-9
    )


@fast
@given(money, st.floats(0, 1), money)
def test_projection_of_a_misstatement(book, share, interval):
    error = book * share
    expected = error * max(
        1, interval / book
    )  # an item smaller than the interval stands for the whole interval
    assert statements.projected_misstatement(book, book - error, interval) == pytest.approx(
        expected, rel=1e-6, abs=0.01
    )


def test_first_digits_of_a_geometric_series_follow_benford():
    series = [10 ** (i / 9973 % 1) for i in range(9973)]
    for digit in range(1, 10):
        share = np.mean([int(value) == digit for value in series])
        assert statements.benford_share(digit) == pytest.approx(share, abs=2e-4)


@fast
@given(st.integers(0, 500), st.floats(0.05, 0.95))
def test_score_of_a_share_squares_to_chi_square(found, p):
    observed, wanted = np.array([found, 500 - found]), np.array([500 * p, 500 * (1 - p)])
    chi = float(((observed - wanted) ** 2 / wanted).sum())
    assert statements.proportion_z(found, 500, p) ** 2 == pytest.approx(chi, abs=1e-9)


@fast
@given(*[st.floats(1, 1e4)] * 7)
def test_altman_as_a_dot_product(wc, re, ebit, mve, sales, assets, liabilities):
    weights = [0.012, 0.014, 0.033, 0.006, 0.999]  # the 1968 paper takes the first four ratios in per cent
    ratios = [
        100 * wc / assets,
        100 * re / assets,
        100 * ebit / assets,
        100 * mve / liabilities,
        sales / assets,
    ]
    assert statements.altman_z(wc, re, ebit, mve, sales, assets, liabilities) == pytest.approx(
        float(np.dot(weights, ratios))
    )


@fast
@given(money, money, money, money, money)
def test_operating_cash_agrees_with_the_direct_method(sales, costs, depreciation, receivables, payables):
    direct = (sales - receivables) - (costs - payables)  # collected less paid
    income = sales - costs - depreciation
    assert statements.operating_cash(income, depreciation, 0, receivables, payables) == pytest.approx(
        direct, abs=0.02
    )
    assert math.isclose(statements.operating_cash(income, depreciation, 0, 0, 0), sales - costs, abs_tol=0.02)

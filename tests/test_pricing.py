"""Prices a second time: by integration, differences, whole trees of paths, ledgers and scipy."""

import itertools
import math

import numpy as np
import numpy_financial as npf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from elson_nb.corpus import pricing
from elson_nb.corpus.finance import parity_put

fast = settings(derandomize=True, max_examples=30, deadline=None)
spots = st.floats(40, 160)
vols = st.floats(0.1, 0.6)
terms = st.floats(0.1, 2)
rates = st.floats(0.0, 0.08)


@fast
@given(spots, spots, rates, terms, vols, st.floats(0, 0.04))
def test_black_scholes_by_integration_of_the_lognormal(spot, strike, rate, years, vol, q):
    def discounted(z):
        end = spot * math.exp((rate - q - vol**2 / 2) * years + vol * math.sqrt(years) * z)
        return max(0.0, end - strike) * norm.pdf(z) * math.exp(-rate * years)

    cut = (math.log(strike / spot) - (rate - q - vol**2 / 2) * years) / (vol * math.sqrt(years))
    value = quad(discounted, max(-9.0, min(cut, 9.0)), 10)[0]
    call = pricing.black_scholes("call", spot, strike, rate, years, vol, q)
    assert call == pytest.approx(value, abs=1e-5)
    put = pricing.black_scholes("put", spot, strike, rate, years, vol, q)
    assert put == pytest.approx(parity_put(call, spot * math.exp(-q * years), strike, rate, years), abs=1e-9)


@fast
@given(spots, spots, rates, terms, vols, st.sampled_from(["call", "put"]))
def test_greeks_by_differences(spot, strike, rate, years, vol, kind):
    def price(s, v):
        return pricing.black_scholes(kind, s, strike, rate, years, v)

    h = spot * 1e-3
    up, mid, down = price(spot + h, vol), price(spot, vol), price(spot - h, vol)
    arguments = (spot, strike, rate, years, vol)
    assert pricing.option_delta(kind, *arguments) == pytest.approx((up - down) / (2 * h), abs=1e-4)
    assert pricing.option_gamma(*arguments) == pytest.approx((up - 2 * mid + down) / h**2, abs=1e-4)
    vega = (price(spot, vol + 1e-4) - price(spot, vol - 1e-4)) / 2e-4 / 100
    assert pricing.option_vega(*arguments) == pytest.approx(vega, abs=1e-5)


@fast
@given(spots, spots, st.floats(1.06, 1.4), st.floats(0.6, 0.98), st.floats(0, 0.05), st.integers(1, 6))
def test_binomial_by_every_path(spot, strike, up, down, rate, steps):
    p, total = (1 + rate - down) / (up - down), 0.0
    for path in itertools.product((0, 1), repeat=steps):
        ups = sum(path)
        end = spot * up**ups * down ** (steps - ups)
        total += p**ups * (1 - p) ** (steps - ups) * max(0.0, strike - end)
    european = pricing.binomial_option("put", spot, strike, up, down, rate, steps)
    assert european == pytest.approx(total / (1 + rate) ** steps, abs=1e-9)

    def american(price, left):
        if not left:
            return max(0.0, strike - price)
        wait = (p * american(price * up, left - 1) + (1 - p) * american(price * down, left - 1)) / (1 + rate)
        return max(wait, strike - price)

    assert pricing.binomial_option("put", spot, strike, up, down, rate, steps, True) == pytest.approx(
        american(spot, steps), abs=1e-9
    )


def test_hedge_ratio_is_the_slope_of_a_regression():
    rng = np.random.default_rng(7)
    future = rng.normal(0, 2, 400)
    spot = 0.7 * future + rng.normal(0, 1, 400)
    ratio = pricing.minimum_variance_ratio(
        float(np.corrcoef(spot, future)[0, 1]), float(spot.std()), float(future.std())
    )
    assert ratio == pytest.approx(np.polyfit(future, spot, 1)[0])
    assert [pricing.hedge_contracts(x, 100) for x in (149, 150, 151)] == [1, 2, 2]


@fast
@given(st.lists(st.integers(-30, 30), min_size=1, max_size=20), st.integers(1, 9))
def test_margin_ledger_never_stays_below_maintenance(moves, contracts):
    initial, maintenance = 6000.0 * contracts, 4500.0 * contracts
    balance, paid = initial, 0.0
    for move in moves:
        balance += move * 50 * contracts
        call = pricing.variation_call(balance, initial, maintenance)
        assert (call > 0) == (balance < maintenance)
        balance, paid = balance + call, paid + call
        assert balance >= maintenance
    assert balance == pytest.approx(initial + sum(moves) * 50 * contracts + paid)


@fast
@given(st.floats(20, 200), st.floats(20, 200), st.sampled_from([1, 2, 3, 6]))
def test_roll_yield_by_rolling_through_a_year(near, deferred, months):
    units = 1.0
    for _ in range(12 // months):
        units *= near / deferred
    assert pricing.roll_yield(near, deferred, months) == pytest.approx(units - 1)


@fast
@given(st.lists(st.floats(0.0, 0.08), min_size=1, max_size=10), rates, st.floats(0.001, 0.08))
def test_swaps_as_the_difference_of_two_bonds(forwards, fixed, par):
    discounts = list(np.cumprod([1 / (1 + f) for f in forwards]))
    rate = pricing.par_swap_rate(discounts)
    floating = sum(f * d for f, d in zip(forwards, discounts, strict=True))
    assert rate * sum(discounts) == pytest.approx(floating, abs=1e-12)
    n = len(forwards)
    bond = npf.npv(par, [0] + [1e6 * fixed] * (n - 1) + [1e6 * (1 + fixed)])
    assert pricing.swap_value(1e6, fixed, par, n) == pytest.approx(1e6 - bond, abs=0.006)


@fast
@given(st.floats(0.001, 0.1), st.floats(0, 0.8))
def test_credit_spread_pays_for_the_expected_loss(spread, recovery):
    assert pricing.default_intensity(spread, recovery) * (1 - recovery) == pytest.approx(spread)


@fast
@given(st.floats(0.5, 150), rates, rates, st.integers(1, 360))
def test_parity_leaves_no_profit_to_the_borrower_of_either_currency(spot, quote, base, days):
    forward = pricing.parity_forward(spot, quote, base, days)
    owed = spot * (1 + quote * days / 360)  # borrow the quote currency, buy one unit of the base
    earned = (1 + base * days / 360) * forward
    assert earned == pytest.approx(owed)


@fast
@given(st.floats(1e4, 1e7), st.floats(0.001, 0.1), st.sampled_from([0.95, 0.975, 0.99]), st.floats(0, 0.01))
def test_tail_risk_by_scipy_and_by_integration(value, stdev, confidence, mean):
    var = pricing.value_at_risk(value, stdev, confidence, mean)
    assert var == pytest.approx(-value * norm.ppf(1 - confidence, mean, stdev), abs=0.006)
    levels = np.linspace(0, 1 - confidence, 20001)[:-1] + (1 - confidence) / 40000
    mean_loss = float(-value * norm.ppf(levels, mean, stdev).mean())
    assert pricing.expected_shortfall(value, stdev, confidence, mean) == pytest.approx(mean_loss, rel=1e-3)


@fast
@given(st.floats(0.001, 0.1), st.integers(1, 182))
def test_bills_by_what_an_investor_earns(discount, days):
    price = pricing.bill_price(100, discount, days)
    assert (100 - price) * 360 / days / 100 == pytest.approx(discount)
    assert pricing.bill_yield(discount, days) == pytest.approx((100 - price) / price * 365 / days)


@fast
@given(st.floats(1e4, 1e8), st.floats(0, 0.1), st.integers(0, 90))
def test_repo_interest_day_by_day(cash, rate, days):
    assert pricing.repo_interest(cash, rate, days) == pytest.approx(
        sum(cash * rate / 360 for _ in range(days)), abs=0.0051
    )


def test_taylor_rate_and_index_by_hand():
    # Taylor's own form: r = p + 0.5 y + 0.5 (p - 2) + 2
    assert pricing.taylor_rate(5, -2) == 5 + 0.5 * -2 + 0.5 * (5 - 2) + 2
    quantities, old, new = np.array([3.0, 2.0, 5.0]), np.array([4.0, 9.0, 1.0]), np.array([5.0, 9.9, 0.8])
    shares = quantities * old / (quantities @ old)
    expected = 100 * float(shares @ (new / old))
    assert pricing.basket_index(list(quantities), list(old), list(new)) == pytest.approx(expected)


@fast
@given(st.floats(0.05, 20), st.floats(100, 1e6))
def test_pool_loss_by_trading_the_pool(ratio, cash):
    product = cash * cash  # start with equal units at a price of 1
    units, money = math.sqrt(product / ratio), math.sqrt(product * ratio)
    pool, held = units * ratio + money, cash * ratio + cash
    assert pricing.pool_loss(ratio) == pytest.approx(1 - pool / held, abs=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pricing.black_scholes("call", 0, 1, 0, 1, 0.2),
        lambda: pricing.binomial_option("call", 10, 10, 1.1, 1.05, 0.01),
        lambda: pricing.bill_yield(0.05, 200),
        lambda: pricing.hedge_contracts(10, 0),
        lambda: pricing.value_at_risk(1, 0.1, 1.2),
        lambda: pricing.pool_loss(0),
    ],
)
def test_out_of_range(call):
    with pytest.raises(ValueError):
        call()

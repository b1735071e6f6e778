"""Every computation is worked out a second time: by numpy-financial, scipy, recursion or printed tables."""

import math
import re
from pathlib import Path

import numpy as np
import numpy_financial as npf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from elson_nb.corpus import business, finance, tax
from elson_nb.corpus.knowledge import COMPUTATIONS

fast = settings(derandomize=True, max_examples=40, deadline=None)
money = st.floats(1, 1e6, allow_nan=False).map(lambda x: round(x, 2))
rates = st.floats(0.001, 0.2)
years = st.integers(1, 40)
status = st.sampled_from(["single", "joint", "head", "separate"])


@fast
@given(money, rates, years)
def test_time_value_agrees_with_numpy_financial(amount, rate, n):
    assert finance.future_value(amount, rate, n) == pytest.approx(npf.fv(rate, n, 0, -amount))
    assert finance.annuity_future_value(amount, rate, n, due=True) == pytest.approx(
        npf.fv(rate, n, -amount, 0, "begin")
    )
    assert finance.annuity_present_value(amount, rate, n) == pytest.approx(npf.pv(rate, n, -amount))
    assert finance.present_value(finance.future_value(amount, rate, n), rate, n) == pytest.approx(amount)
    assert finance.payment_for_goal(amount, rate, n) == pytest.approx(
        -npf.pmt(rate, n, 0, amount), abs=0.0051
    )


@fast
@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=8), rates)
def test_net_present_value(flows, rate):
    assert finance.net_present_value(rate, flows) == pytest.approx(npf.npv(rate, flows), abs=1e-6)


@fast
@given(st.integers(10_000, 900_000), st.floats(0.01, 0.15), st.sampled_from([10, 15, 30]))
def test_loans_agree_with_numpy_financial_and_a_month_by_month_ledger(principal, rate, term):
    payment = finance.loan_payment(principal, rate, term)
    assert payment == pytest.approx(-npf.pmt(rate / 12, term * 12, principal), abs=0.0051)
    balance = principal
    for _ in range(60):
        balance = balance * (1 + rate / 12) - payment
    assert finance.loan_balance(principal, rate, term, 60) == pytest.approx(balance, abs=0.02)


@fast
@given(st.integers(500, 20_000), st.floats(0.05, 0.3), st.floats(0.03, 0.2))
def test_months_to_repay_by_stepping(balance, apr, share):
    payment, months, left = balance * share, 0, balance
    while left > 1e-7:
        left, months = left * (1 + apr / 12) - payment, months + 1
    assert finance.months_to_repay(balance, apr, payment) == months


@fast
@given(st.floats(0.0, 0.1), st.floats(0.005, 0.12), st.integers(1, 30))
def test_bonds_by_discounting_each_flow_and_by_numerical_slope(coupon, rate, n):
    t = np.arange(1, 2 * n + 1)
    flows = np.where(t == 2 * n, 1000, 0) + 1000 * coupon / 2
    price = float((flows / (1 + rate / 2) ** t).sum())
    assert finance.bond_price(1000, coupon, rate, n) == pytest.approx(price)
    found = brentq(lambda y: finance.bond_price(1000, coupon, y, n) - price, 0.0001, 0.5)
    assert finance.bond_yield(price, 1000, coupon, n) == pytest.approx(found, abs=1e-8)
    slope = (
        finance.bond_price(1000, coupon, rate + 1e-5, n) - finance.bond_price(1000, coupon, rate - 1e-5, n)
    ) / 2e-5
    assert finance.modified_duration(coupon, rate, n) == pytest.approx(-slope / price, rel=1e-5)


@fast
@given(st.floats(0, 1), st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.floats(-0.95, 0.95))
def test_two_assets_by_matrix(weight, a, b, rho):
    covariance = np.array([[a * a, rho * a * b], [rho * a * b, b * b]])
    w = np.array([weight, 1 - weight])
    assert finance.portfolio_stdev(weight, a, b, rho) == pytest.approx(math.sqrt(w @ covariance @ w))
    inverse = np.linalg.solve(covariance, np.ones(2))
    assert finance.minimum_variance_weight(a, b, rho) == pytest.approx(
        inverse[0] / inverse.sum(), rel=1e-6, abs=1e-9
    )


@fast
@given(money, st.lists(st.floats(1, 500), min_size=1, max_size=12))
def test_average_cost_is_money_over_shares_and_never_above_the_mean(amount, prices):
    shares = sum(amount / price for price in prices)
    assert finance.average_cost(amount, prices) == pytest.approx(amount * len(prices) / shares)
    assert finance.average_cost(amount, prices) <= np.mean(prices) * (1 + 1e-12)


@fast
@given(st.floats(5, 200), st.floats(5, 200), st.floats(0.1, 20))
def test_options_from_both_sides_and_parity_at_expiry(strike, spot, premium):
    call = finance.option_profit("call", strike, spot, 0)
    put = finance.option_profit("put", strike, spot, 0)
    assert call - put == pytest.approx(spot - strike, abs=0.011)
    assert finance.parity_put(max(0, spot - strike), spot, strike, 0.05, 0) == pytest.approx(
        max(0, strike - spot), abs=1e-9
    )
    assert finance.option_profit("put", strike, spot, premium, long=False) == -finance.option_profit(
        "put", strike, spot, premium
    )


def test_margin_call_leaves_exactly_the_maintenance_share():
    price = finance.margin_call_price(80, 0.5, 0.3)
    assert (price - 40) / price == pytest.approx(0.3, abs=1e-4)
    assert finance.forward_price(100, 0.05, 1, 0.05) == pytest.approx(100)
    assert finance.geometric_return([0.5, -0.5]) == pytest.approx(math.sqrt(0.75) - 1)


# The rate schedules as printed in Rev. Proc. 2024-40, tables 1 to 4: (over, tax on that, rate above it).
SCHEDULES = {
    "joint": [
        (0, 0, 0.10),
        (23850, 2385, 0.12),
        (96950, 11157, 0.22),
        (206700, 35302, 0.24),
        (394600, 80398, 0.32),
        (501050, 114462, 0.35),
        (751600, 202154.50, 0.37),
    ],
    "head": [
        (0, 0, 0.10),
        (17000, 1700, 0.12),
        (64850, 7442, 0.22),
        (103350, 15912, 0.24),
        (197300, 38460, 0.32),
        (250500, 55484, 0.35),
        (626350, 187031.50, 0.37),
    ],
    "single": [
        (0, 0, 0.10),
        (11925, 1192.50, 0.12),
        (48475, 5578.50, 0.22),
        (103350, 17651, 0.24),
        (197300, 40199, 0.32),
        (250525, 57231, 0.35),
        (626350, 188769.75, 0.37),
    ],
    "separate": [
        (0, 0, 0.10),
        (11925, 1192.50, 0.12),
        (48475, 5578.50, 0.22),
        (103350, 17651, 0.24),
        (197300, 40199, 0.32),
        (250525, 57231, 0.35),
        (375800, 101077.25, 0.37),
    ],
}


@fast
@given(st.integers(0, 1_500_000), status)
def test_income_tax_agrees_with_the_printed_schedules(taxable, who):
    over, base, rate = [row for row in SCHEDULES[who] if taxable >= row[0]][-1]
    assert tax.income_tax(taxable, who) == pytest.approx(base + rate * (taxable - over), abs=0.006)
    assert tax.marginal_rate(taxable, who) == rate


@fast
@given(st.integers(0, 600_000), st.integers(0, 700_000), status)
def test_gains_tax_by_the_worksheet(gain, ordinary, who):
    low, high = tax.GAINS[who]
    zero = min(gain, max(0, low - ordinary))
    fifteen = min(gain - zero, max(0, high - max(low, ordinary)))
    assert tax.capital_gains_tax(gain, ordinary, who) == pytest.approx(
        0.15 * fifteen + 0.2 * (gain - zero - fifteen), abs=0.006
    )


@fast
@given(st.integers(0, 400_000))
def test_self_employment_tax_by_its_two_parts(profit):
    base = profit * 0.9235
    expected = 0 if base < 400 else 0.124 * min(base, 176_100) + 0.029 * base
    assert tax.self_employment_tax(profit) == pytest.approx(expected, abs=0.006)


def test_deductions_retirement_and_transfer_tax_by_hand():
    assert tax.standard_deduction("joint", 2) == 34_700
    assert tax.salt_deduction(60_000, 550_000) == 25_000
    assert tax.itemized_deduction(100_000, 12_000, 9_000, 80_000, 10_000) == 12_000 + 9_000 + 60_000 + 2_500
    assert tax.net_investment_tax(50_000, 230_000) == 1_140
    assert tax.required_distribution(246_000, 75) == 10_000
    assert tax.required_distribution(200_000, 125) == 100_000
    assert tax.employer_match(100_000, 0.04, 0.5, 0.06) == 2_000
    assert tax.roth_limit(164_900, 40) == 200
    assert tax.roth_limit(240_000, 55, "joint") == 4_800
    assert [tax.social_security_benefit(1000, 12 * age) for age in (62, 64, 67, 70)] == [700, 800, 1000, 1240]
    assert tax.taxable_gifts([50_000], split=True) == 12_000


@fast
@given(st.floats(0, 4e7), st.floats(0, 5e6), st.floats(0, 5e6))
def test_estate_tax_by_tentative_tax_and_credit(gross, deductions, gifts):
    def tentative(base):  # IRC 2001(c) above $1,000,000; below it no estate pays, for the credit is larger
        return 345_800 + 0.4 * (base - 1_000_000)

    base = max(0, gross - deductions) + gifts
    expected = max(0, tentative(base) - 5_541_800) if base > 1_000_000 else 0
    assert tax.estate_tax(gross, deductions, gifts) == pytest.approx(expected, abs=0.01)


@fast
@given(st.integers(5_000, 200_000), st.integers(0, 4_000), st.integers(3, 12))
def test_depreciation_never_passes_salvage(cost, salvage, life):
    charges = [business.double_declining(cost, salvage, life, year) for year in range(1, life + 1)]
    assert sum(charges) <= cost - salvage + 0.01
    free = [
        cost * (1 - 2 / life) ** (year - 1) * 2 / life for year in range(1, life + 1)
    ]  # without the floor
    if cost - sum(free) >= salvage:
        assert charges == pytest.approx(free, abs=0.02)
    assert business.straight_line(cost, salvage, life) * life == pytest.approx(
        cost - salvage, abs=life * 0.0051
    )


@fast
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 50)), min_size=1, max_size=5), st.data())
def test_inventory_unit_by_unit(layers, data):
    pile = [cost for units, cost in layers for _ in range(units)]
    sold = data.draw(st.integers(0, len(pile)))
    assert business.fifo_cost(layers, sold) == sum(pile[:sold])
    assert business.fifo_cost(layers[::-1], sold) == sum(sorted_from_newest(layers)[:sold])
    assert business.average_unit_cost(layers) == pytest.approx(np.mean(pile))


def sorted_from_newest(layers):
    return [cost for units, cost in layers[::-1] for _ in range(units)]


@fast
@given(
    st.integers(1_000, 200_000),
    st.integers(50_000, 900_000),
    st.integers(100_000, 900_000),
    st.integers(0, 5_000),
)
def test_coinsurance_by_cases(loss, carried, value, deductible):
    enough = carried >= 0.8 * value
    gross = loss if enough else loss * carried / (0.8 * value)
    expected = min(max(gross - deductible, 0), carried)
    assert business.coinsurance_payment(loss, carried, value, 0.8, deductible) == pytest.approx(
        expected, abs=0.006
    )


@fast
@given(st.integers(0, 80_000), st.integers(0, 5_000), st.floats(0, 0.5), st.integers(5_000, 10_000))
def test_patient_share_dollar_by_hundred(charges, deductible, share, cap):
    paid = 0.0
    for start in range(0, charges, 100):
        step = min(100, charges - start)
        below = min(step, max(0, deductible - start))
        paid = min(cap, paid + below + share * (step - below))
    assert business.patient_share(charges, deductible, share, cap) == pytest.approx(paid, abs=0.02)


def test_business_by_hand():
    assert business.human_life_value(60_000, 0.25, 20, 0.03) == pytest.approx(
        -npf.pv(0.03, 20, 45_000), abs=0.006
    )
    assert business.combined_ratio(600, 50, 1000, 330, 1100) == pytest.approx(0.95)
    assert business.dime_need(10, 50, 10, 200, 100, 60) == 750
    assert business.days_outstanding(730, 50, 150) == pytest.approx(50)
    assert business.allocate_price(900, [600, 400], 1) == 360
    assert business.pro_rata_share(90, 100, 300) == 30
    assert business.break_even_units(1001, 3, 2) == 1001
    assert business.dupont_roe(7, 90, 60, 35) == pytest.approx(7 / 35)


@pytest.mark.parametrize(
    "call, part",
    [
        (lambda: finance.future_value(1, -1.5, 2), "rate"),
        (lambda: finance.bond_price(100, 0.1, 0.1, 0), "at least one"),
        (lambda: finance.portfolio_stdev(0.5, 1, 1, 1.2), "between -1 and 1"),
        (lambda: tax.income_tax(1, "x"), "use one of"),
        (lambda: tax.social_security_benefit(1000, 700), "62 to 70"),
        (lambda: business.fifo_cost([(1, 1)], 2), "more units"),
        (lambda: business.balanced_entry([("a", 1, 1)]), "either a debit or a credit"),
    ],
)
def test_a_bad_value_is_refused_in_words(call, part):
    with pytest.raises(ValueError, match=part):
        call()


@fast
@given(st.floats(0.01, 0.3), st.sampled_from([2, 4, 12, 365]), st.floats(0.0, 0.1))
def test_rates_by_compounding_a_dollar(nominal, per_year, inflation):
    dollar = 1.0
    for _ in range(per_year):
        dollar += dollar * nominal / per_year
    assert finance.effective_annual_rate(nominal, per_year) == pytest.approx(dollar - 1)
    basket = 1 + inflation  # what the goods of a dollar cost after a year
    assert (1 + finance.real_return(nominal, inflation)) * basket == pytest.approx(1 + nominal)


@fast
@given(st.floats(0.0, 0.1), st.floats(0.01, 0.12), st.integers(1, 30))
def test_macaulay_duration_is_the_elasticity_of_the_price(coupon, rate, term):
    price = lambda y: sum(
        (coupon / 2 * 100 + (100 if k == 2 * term else 0)) / (1 + y / 2) ** k for k in range(1, 2 * term + 1)
    )
    step = 1e-5
    slope = (price(rate + step) - price(rate - step)) / (2 * step)
    expected = -slope * (1 + rate / 2) / price(rate)
    assert finance.macaulay_duration(coupon, rate, term) == pytest.approx(expected, rel=1e-4)


@fast
@given(st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=5), st.floats(0.0, 0.03), st.floats(0.05, 0.4))
def test_portfolio_return_and_sharpe_ratio(returns, risk_free, stdev):
    weights = [1 / len(returns)] * len(returns)
    mean = finance.portfolio_return(weights, returns)
    assert mean == pytest.approx(np.mean(returns))
    assert finance.sharpe_ratio(mean, risk_free, stdev) * stdev + risk_free == pytest.approx(mean)


@fast
@given(st.integers(1_000, 500_000), st.floats(0.03, 0.1), st.floats(0.001, 0.02), st.integers(1, 30))
def test_fee_drag_by_stepping(amount, gross, fee, term):
    free, charged = float(amount), float(amount)
    for _ in range(term):
        free, charged = free * (1 + gross), charged * (1 + gross - fee)
    assert finance.fee_drag(amount, gross, fee, term) == pytest.approx(free - charged, abs=0.011)


def test_deferral_limits_of_2025_by_age():
    table = {49: 23_500, 50: 31_000, 59: 31_000, 60: 34_750, 63: 34_750, 64: 31_000}
    assert {age: tax.deferral_limit(age) for age in table} == table


@fast
@given(st.integers(10_000, 900_000), st.integers(0, 9_000), st.integers(1_000, 90_000), st.integers(1, 900))
def test_units_of_production_use_up_the_cost(cost, salvage, capacity, units):
    once = business.units_of_production(cost, salvage, capacity, units)
    assert once * capacity / units == pytest.approx(cost - salvage, rel=1e-3, abs=0.006 * capacity / units)


@fast
@given(money, money, money, money)
def test_liquidity_and_turnover(cash, securities, receivables, liabilities):
    quick = business.quick_ratio(cash, securities, receivables, liabilities)
    assert quick * liabilities == pytest.approx(cash + securities + receivables)
    assert business.current_ratio(cash, liabilities) * liabilities == pytest.approx(cash)
    assert business.turnover(cash, securities, receivables) * (securities + receivables) == pytest.approx(
        2 * cash
    )


@fast
@given(st.integers(100, 10_000), st.integers(10, 500), st.floats(0.05, 0.3), st.floats(0.01, 0.1))
def test_insurer_ratios(pure, fixed, variable, profit):
    rate = business.gross_premium(pure, fixed, variable, profit)
    assert rate - rate * variable - rate * profit == pytest.approx(pure + fixed, abs=0.02)
    assert business.loss_ratio(pure, fixed, 2 * (pure + fixed)) == pytest.approx(0.5)
    days = [business.earned_premium(pure, day) for day in (0, 73, 365)]
    assert days == [0, pytest.approx(pure / 5, abs=0.006), pure]


@fast
@given(st.integers(0, 10**9), st.integers(0, 99), st.sampled_from([1, -1]))
def test_cents_round_half_away_from_nought(dollars, hundredths, sign):
    amount = sign * float(f"{dollars}.{hundredths:02d}5")
    assert finance.cents(amount) == pytest.approx(sign * (dollars + (hundredths + 1) / 100), abs=1e-6)


def test_every_named_computation_is_worked_out_a_second_time():
    folder = Path(__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("test_*.py"))
    assert len(COMPUTATIONS) > 200
    assert not [name for name in COMPUTATIONS if not re.search(rf"\.{name}\b|import .*\b{name}\b", text)]

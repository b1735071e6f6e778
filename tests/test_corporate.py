"""Corporate and banking sums a second time: numpy-financial, root finders, ledgers and other formulas."""

import math

import numpy as np
import numpy_financial as npf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from elson_nb.corpus import corporate

fast = settings(derandomize=True, max_examples=40, deadline=None)
money = st.floats(1, 1e6, allow_nan=False).map(lambda x: round(x, 2))
rates = st.floats(0.01, 0.25)
shares = st.floats(0.0, 0.6)
lives = st.integers(1, 15)
inflows = st.lists(st.floats(10, 500), min_size=1, max_size=8)


@fast
@given(money, money, rates, rates, shares)
def test_cost_of_capital_is_the_return_owed_on_all_funds(equity, debt, ke, kd, tax):
    owed = equity * ke + debt * kd - tax * debt * kd
    found = corporate.weighted_cost_of_capital(equity, debt, ke, kd, tax)
    assert found * (equity + debt) == pytest.approx(owed)
    with pytest.raises(ValueError, match="equity must be positive"):
        corporate.weighted_cost_of_capital(0, debt, ke, kd)


@fast
@given(st.floats(0.3, 2.5), st.floats(0, 3), st.floats(0, 3), shares)
def test_beta_relevered_by_the_value_of_the_tax_shield(beta, old, new, tax):
    # asset beta = beta x E / (E + D - tD), with E = 1: the debt and its shield carry no beta
    asset = beta / (1 + old - tax * old)
    assert corporate.relevered_beta(beta, old, new, tax) == pytest.approx(asset * (1 + new - tax * new))


@fast
@given(inflows, st.floats(50, 800))
def test_internal_rate_of_return(flows, outlay):
    flows = [-outlay, *flows]
    rate = corporate.internal_rate_of_return(flows)
    scale = sum(abs(flow) for flow in flows)
    assert npf.npv(rate, flows) == pytest.approx(0, abs=1e-6 * scale / (1 + rate) ** len(flows) + 1e-5)
    if rate > 0:
        assert rate == pytest.approx(npf.irr(flows), abs=1e-7)


@fast
@given(inflows, st.floats(5, 2000), st.floats(0, 0.2))
def test_payback_by_counting_small_steps(flows, outlay, rate):
    values = [flow / (1 + rate) ** t for t, flow in enumerate(flows, 1)]
    flows = [-outlay, *flows]
    if sum(values) < outlay:
        with pytest.raises(ValueError, match="never return"):
            corporate.payback_years(flows, rate)
    else:
        reached = np.interp(outlay, np.concatenate([[0], np.cumsum(values)]), np.arange(len(flows)))
        assert corporate.payback_years(flows, rate) == pytest.approx(float(reached))


@fast
@given(money, money, rates, lives, shares)
def test_equivalent_annual_cost_has_the_value_of_its_flows(price, running, rate, years, part):
    salvage = price * part
    flows = [price] + [running] * years
    flows[-1] -= salvage
    cost = corporate.equivalent_annual_cost(price, running, rate, years, salvage)
    assert cost == pytest.approx(-npf.pmt(rate, years, npf.npv(rate, flows)), abs=0.0051)


@fast
@given(money, money, shares)
def test_sale_after_tax_as_two_parts(price, book, tax):
    kept = price * (1 - tax) + tax * book
    assert corporate.sale_after_tax(price, book, tax) == pytest.approx(kept, abs=0.0051)


@fast
@given(inflows, st.floats(0.07, 0.2), st.floats(-0.02, 0.04))
def test_firm_value_against_four_thousand_years_of_flows(flows, rate, growth):
    years = np.arange(1, 4001)
    late = flows[-1] * (1 + growth) ** np.maximum(years - len(flows), 0)
    path = np.where(years <= len(flows), np.resize(flows, 4000), late)
    value = float((path * np.exp(-years * math.log1p(rate))).sum())
    assert corporate.discounted_firm_value(flows, rate, growth) == pytest.approx(value)
    assert corporate.gordon_value(flows[0], rate, growth) == pytest.approx(
        sum(flows[0] * (1 + growth) ** (t - 1) / (1 + rate) ** t for t in range(1, 2500))
    )


@fast
@given(money, money, st.integers(10, 1000), st.integers(0, 500))
def test_deal_is_accretive_when_the_seller_is_cheaper(buyer, target, old, new):
    eps = corporate.combined_earnings_per_share(buyer, target, old, new)
    own, paid = buyer / old, target / max(new, 1e-9)  # earnings a share, earnings for each share given
    assert (eps > own) == (paid > own) or eps == pytest.approx(own)
    assert eps * (old + new) == pytest.approx(buyer + target)
    assert corporate.economic_value_added(buyer, target, 0.1) == pytest.approx(
        (buyer / target - 0.1) * target, abs=1e-6
    )


@fast
@given(st.integers(100, 50_000), st.floats(5, 200), st.floats(0.1, 50))
def test_order_quantity_is_cheapest(demand, order, holding):
    best = corporate.order_quantity(demand, order, holding)
    cost = [demand / q * order + q / 2 * holding for q in (best * 0.99, best, best * 1.01)]
    assert cost[1] == min(cost)


@fast
@given(st.floats(0.005, 0.05), st.integers(0, 20), st.integers(5, 60))
def test_trade_credit_as_a_loan_rolled_over_for_a_year(discount, first, more):
    debt, turns = 1 - discount, 365 / more
    growth = math.log(1 / debt) * turns
    found = corporate.trade_credit_cost(discount, first, first + more)
    assert found == pytest.approx(math.expm1(growth))


@fast
@given(money, st.floats(-0.1, 0.5), shares, shares, st.floats(-0.1, 0.3), st.floats(0, 1))
def test_financing_need_closes_the_balance_sheet(sales, growth, assets, liabilities, margin, payout):
    new = sales * (1 + growth)
    net = (assets - liabilities) * (new - sales)
    retained = new * margin - new * margin * payout
    assert corporate.financing_need(sales, growth, assets, liabilities, margin, payout) == pytest.approx(
        net - retained, abs=1e-6
    )


@fast
@given(
    st.integers(5_000, 900_000), st.floats(0, 0.08), st.floats(0.02, 0.2), st.sampled_from([3, 10, 15, 30])
)
def test_annual_percentage_rate_by_the_actuarial_method(principal, part, note, years):
    charges = round(principal * part, 2)
    payment = round(-npf.pmt(note / 12, years * 12, principal), 2)
    month = brentq(lambda r: npf.pv(r, years * 12, -payment) - (principal - charges), 1e-7, 0.2)
    assert corporate.annual_percentage_rate(principal, charges, note, years) == pytest.approx(
        12 * month, abs=2e-5
    )


@fast
@given(st.floats(200, 9000), st.floats(0.02, 0.12), st.sampled_from([5, 15, 20, 30]))
def test_largest_loan_is_repaid_to_the_last_month(payment, rate, years):
    left = corporate.largest_loan(payment, rate, years)
    for _ in range(years * 12):
        left = left * (1 + rate / 12) - payment
    assert abs(left) < 0.01 * (1 + rate / 12) ** (years * 12)


@fast
@given(st.integers(300, 20_000), st.floats(0.05, 0.3), st.floats(0.03, 0.4))
def test_interest_to_repay_by_a_ledger(balance, apr, share):
    payment, left, paid = round(balance * share, 2), float(balance), 0.0
    while left > 1e-9:
        left *= 1 + apr / 12
        paid += min(payment, left)
        left -= min(payment, left)
    assert corporate.interest_to_repay(balance, apr, payment) == pytest.approx(paid - balance, abs=0.0052)


@fast
@given(st.integers(1, 20_000), st.integers(1, 900))
def test_months_to_recover_by_counting(cost, saving):
    months, back = 0, 0
    while back < cost:
        months, back = months + 1, back + saving
    assert corporate.months_to_recover(cost, saving) == months


@fast
@given(money, st.floats(-0.02, 0.2), st.floats(-0.05, 0.15), st.integers(0, 40))
def test_growing_annuity_payment_by_payment(payment, rate, growth, n):
    value = sum(payment * (1 + growth) ** (t - 1) / (1 + rate) ** t for t in range(1, n + 1))
    assert corporate.growing_annuity_value(payment, rate, growth, n) == pytest.approx(value, rel=1e-6)
    assert corporate.growing_annuity_value(payment, rate, rate, n) == pytest.approx(n * payment / (1 + rate))


@fast
@given(money, st.floats(0, 0.2), st.integers(1, 30))
def test_continuous_value_is_the_limit_of_many_periods(present, rate, years):
    many = present * (1 + rate / 1e6) ** (1e6 * years)
    assert corporate.continuous_value(present, rate, years) == pytest.approx(many, rel=1e-5)


@fast
@given(st.floats(0, 0.3), shares, st.lists(money, min_size=1, max_size=6), st.floats(0, 0.15))
def test_expected_loss_year_by_year(default, severity, exposures, rate):
    alive, discount, loss = 1.0, 1.0, 0.0
    for exposure in exposures:
        discount /= 1 + rate
        loss += alive * default * severity * exposure * discount
        alive -= alive * default
    assert corporate.expected_credit_loss(default, severity, exposures, rate) == pytest.approx(
        loss, abs=0.0051
    )


@fast
@given(money, st.lists(st.tuples(money, st.sampled_from([0.2, 0.5, 1.0, 1.5])), min_size=1, max_size=6))
def test_capital_ratio_by_dot_product(capital, exposures):
    amounts, weights = np.array(exposures).T
    assert corporate.capital_ratio(capital, exposures) == pytest.approx(capital / (amounts @ weights))


@fast
@given(st.lists(st.tuples(st.integers(1, 12), money), min_size=1, max_size=4), st.floats(0.05, 0.35))
def test_card_interest_day_by_day(balances, apr):
    interest = 0.0
    for days, balance in balances:
        for _ in range(days):
            interest += balance * apr / 365
    assert corporate.card_interest(balances, apr) == pytest.approx(interest, abs=0.0052)


@fast
@given(st.integers(1, 500_000), st.integers(0, 500), st.integers(0, 99))
def test_merchant_fee_in_whole_numbers(amount, points, fixed):
    hundredths = amount * points + fixed * 10_000  # amount in cents, points in hundredths of a percent
    fee = corporate.merchant_fee(amount / 100, points / 10_000, fixed / 100)
    assert fee == pytest.approx(hundredths / 1e6, abs=0.00501)

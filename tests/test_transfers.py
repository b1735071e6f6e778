"""Interests, trusts and gifts a second time: by numpy-financial, a simulation or a different formula."""

import numpy as np
import numpy_financial as npf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elson_nb.corpus import transfers

fast = settings(derandomize=True, max_examples=40, deadline=None)
money = st.floats(1_000, 1e7, allow_nan=False).map(lambda x: round(x, 2))
rates = st.floats(0.01, 0.12)
terms = st.integers(1, 20)


@fast
@given(rates, terms)
def test_factors(rate, years):
    assert transfers.term_annuity_factor(rate, years) == pytest.approx(-npf.pv(rate, years, 1))
    assert transfers.remainder_factor(rate, years) == pytest.approx(-npf.pv(rate, years, 0, 1))
    whole = rate * transfers.term_annuity_factor(rate, years) + transfers.remainder_factor(rate, years)
    assert whole == pytest.approx(1)


@fast
@given(money, st.floats(0.01, 0.15), terms, rates)
def test_remainders_of_charitable_trusts(value, share, years, rate):
    paid = round(value * share, 2)
    expected = max(0.0, value + npf.pv(rate, years, paid))
    assert transfers.annuity_trust_remainder(value, paid, years, rate) == pytest.approx(expected, abs=0.0051)
    fund = value
    for _ in range(years):  # a unitrust that pays at the start of the year and earns nothing
        fund -= fund * share
    assert transfers.unitrust_remainder(value, share, years) == pytest.approx(fund, abs=0.0051)
    late = transfers.unitrust_remainder(value, share, years, rate, 12)
    assert late == pytest.approx(value * (1 - share / (1 + rate)) ** years, abs=0.0051)
    assert late >= transfers.unitrust_remainder(value, share, years)


@fast
@given(money, terms, rates, st.floats(0, 0.2))
def test_a_zeroed_out_trust_is_empty_at_its_own_rate(value, years, rate, increase):
    first = transfers.zeroed_out_annuity(value, years, rate, increase)
    flows = [0.0] + [first * (1 + increase) ** k for k in range(years)]
    assert npf.npv(rate, flows) == pytest.approx(value, rel=1e-4)
    left = transfers.left_in_trust(value, first, rate, years, increase)
    assert left <= 0.01 * (1 + rate) ** years * years * (1 + increase) ** years


@fast
@given(money, st.floats(0, 0.5), rates, rates, terms)
def test_payments_and_notes(value, share, growth, interest, years):
    payment = value * share
    expected = npf.fv(growth, years, payment, -value)
    left = transfers.left_in_trust(value, payment, growth, years)
    # once dry a trust stays dry, and the closed form then only falls further
    assert left == pytest.approx(max(0.0, expected), abs=0.0051)
    seed = value / 10
    due = npf.fv(growth, years, value * interest, -(seed + value)) - value
    sold = transfers.note_sale_remainder(seed, value, growth, interest, years)
    assert sold == pytest.approx(max(0.0, due), abs=0.0101)


@fast
@given(st.floats(0, 100_000), st.floats(0, 100_000))
def test_tax_of_trusts(taxable, undistributed):
    steps = [(3_150, 0.0, 0.10, 0), (11_450, 315.0, 0.24, 3_150), (15_650, 2_307.0, 0.35, 11_450)]
    base, rate, start = next(((b, r, s) for top, b, r, s in steps if taxable <= top), (3_777.0, 0.37, 15_650))
    assert transfers.trust_income_tax(taxable) == pytest.approx(base + rate * (taxable - start), abs=0.0051)
    excess = taxable - 15_650
    surtax = 0.038 * min(undistributed, excess) if excess > 0 else 0.0
    assert transfers.trust_surtax(undistributed, taxable) == pytest.approx(surtax, abs=0.0051)


@fast
@given(st.integers(0, 90), st.integers(0, 90), st.integers(0, 90))
def test_tiers_dollar_by_dollar(dni, required, other):
    queue = [1] * required + [2] * other  # first-tier dollars stand first in the line for DNI
    for tier in (1, 2):
        assert transfers.taxed_distribution(dni, required, other, tier) == queue[:dni].count(tier)


@fast
@given(*[st.integers(0, 120)] * 3)
def test_gift_limits_dollar_by_dollar(cash, shares, foundation):
    agi, used = 100, {"cash": 0, "shares": 0, "foundation": 0}
    for _ in range(cash):
        used["cash"] += used["cash"] + 1 <= 60
    for _ in range(shares):
        used["shares"] += used["shares"] + 1 <= 30 and used["cash"] + used["shares"] + 1 <= 50
    for _ in range(foundation):
        taken = used["cash"] + shares + used["foundation"]
        used["foundation"] += used["foundation"] + 1 <= 30 and taken + 1 <= 50
    for part, amount in used.items():
        assert transfers.gift_deduction(agi, cash, shares, foundation, part) == pytest.approx(amount)
    assert transfers.gift_deduction(agi, cash, shares, foundation) == pytest.approx(sum(used.values()))


@fast
@given(money, st.floats(0, 1), st.floats(0, 1))
def test_bargain_sale(value, basis_share, price_share):
    price, basis = value * price_share, value * basis_share
    expected = price * (1 - basis_share)  # the part sold carries the same share of gain as the whole
    assert transfers.bargain_sale_gain(basis, price, value) == pytest.approx(expected, abs=0.0051)


@fast
@given(st.integers(2, 10_000), st.floats(0, 1))
def test_generation_skipping(thousand, share):
    transferred = thousand * 1000.0
    ratio = transfers.inclusion_ratio(transferred, transferred * share)
    assert ratio == pytest.approx(1 - share, abs=0.000501)
    assert ratio == pytest.approx(np.round(ratio, 3))
    assert transfers.generation_skipping_tax(1000, ratio) == pytest.approx(400 * ratio, abs=0.0051)


def test_what_is_not_allowed():
    for wrong in (
        lambda: transfers.term_annuity_factor(0, 5),
        lambda: transfers.zeroed_out_annuity(100, 5, 0.05, 0.3),
        lambda: transfers.taxed_distribution(1, 1, 1, 3),
        lambda: transfers.gift_deduction(100, part="land"),
        lambda: transfers.inclusion_ratio(100, 101),
        lambda: transfers.bargain_sale_gain(1, 3, 2),
    ):
        with pytest.raises(ValueError):
            wrong()

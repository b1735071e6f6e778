"""Every levy is worked out a second time: dollar by dollar, month by month, or by another formula."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elson_nb.corpus import levies, tax

fast = settings(derandomize=True, max_examples=60, deadline=None)
dollars = st.integers(0, 900_000)
status = st.sampled_from(["single", "joint", "head", "separate"])
near = dict(abs=0.0051)


@fast
@given(st.integers(0, 5), st.integers(100_000, 600_000), status, st.integers(0, 2))
def test_child_credit_step_by_step(children, magi, kind, others):
    left, start = 2_200 * children + 500 * others, 400_000 if kind == "joint" else 200_000
    while start < magi and left > 0:
        left, start = left - 50, start + 1_000
    assert levies.child_credit(children, magi, kind, others) == max(0, left)


@fast
@given(st.integers(0, 5), st.integers(0, 9_000), st.integers(0, 80_000))
def test_refundable_child_credit(children, unused, earned):
    limits = [unused, 1_700 * children, (earned - 2_500) * 15 / 100 if earned > 2_500 else 0]
    assert levies.refundable_child_credit(children, unused, earned) == pytest.approx(min(limits), **near)


@fast
@given(st.integers(0, 7_000), st.integers(50_000, 200_000), st.booleans())
def test_opportunity_credit_by_interpolation(expenses, magi, joint):
    ends = [160_000, 180_000] if joint else [80_000, 90_000]
    full = np.interp(expenses, [0, 2_000, 4_000], [0, 2_000, 2_500])
    assert levies.opportunity_credit(expenses, magi, joint) == pytest.approx(
        full * np.interp(magi, ends, [1, 0]), **near
    )


@fast
@given(st.integers(0, 5_000), st.integers(15_000, 90_000), status)
def test_savers_credit_by_table(contribution, agi, kind):
    half = {"joint": 1, "head": Fraction(3, 4)}.get(kind, Fraction(1, 2))  # the joint table, scaled
    rate = (
        0.5 if agi <= 47_500 * half else 0.2 if agi <= 51_000 * half else 0.1 if agi <= 79_000 * half else 0
    )
    assert levies.savers_credit(contribution, agi, kind) == pytest.approx(
        min(contribution, 2_000) * rate, **near
    )


@fast
@given(st.integers(0, 80_000), st.integers(0, 3), st.integers(0, 20_000), st.booleans())
def test_earned_income_credit_by_interpolation(earned, children, more, joint):
    top, best, start, end = {
        0: (8_490, 649, 10_620, 19_104),
        1: (12_730, 4_328, 23_350, 50_434),
        2: (17_880, 7_152, 23_350, 57_310),
        3: (17_880, 8_046, 23_350, 61_555),
    }[children]  # amounts printed in Rev. Proc. 2024-40 sec. 2.06
    shift = 7_110 if children == 0 and joint else 7_120 if joint else 0
    up = np.interp(earned, [0, top], [0, best])
    down = np.interp(earned + more, [start + shift, end + shift], [best, 0])
    credit = levies.earned_income_credit(earned, children, earned + more, joint)
    assert credit == pytest.approx(max(0, up + down - best), abs=3)


@fast
@given(st.integers(0, 2_000_000), status)
def test_minimum_tax_slice_by_slice(amti, kind):
    full, start = {"joint": (137_000, 1_252_700), "separate": (68_500, 626_350)}.get(kind, (88_100, 626_350))
    exemption = np.interp(amti, [start, start + 4 * full], [full, 0])
    assert levies.amt_exemption(amti, kind) == pytest.approx(exemption, abs=0.01)
    turn = 119_550 if kind == "separate" else 239_100
    slices = np.diff(np.clip([0, turn, math.inf], 0, max(0, amti - exemption)))
    assert levies.tentative_minimum_tax(amti, kind) == pytest.approx(slices @ [0.26, 0.28], abs=0.02)


@fast
@given(st.integers(150_000, 600_000), st.integers(1_000, 400_000), st.integers(0, 300_000))
def test_gains_keep_their_rates_under_the_minimum_tax(wages, gain, ordinary):
    amti = wages + gain
    base = max(0, amti - levies.amt_exemption(amti))
    flat = levies.tentative_minimum_tax(amti)
    mixed = levies.tentative_minimum_tax(amti, gain=gain, ordinary=ordinary)
    held = min(gain, base)
    rest = base - held
    parts = 0.28 * rest - 0.02 * min(rest, 239_100) + tax.capital_gains_tax(held, ordinary)
    assert mixed == pytest.approx(min(flat, parts), abs=0.02)


@fast
@given(
    st.integers(0, 500_000),
    st.integers(100_000, 600_000),
    st.integers(0, 200_000),
    st.integers(0, 900_000),
    st.booleans(),
    st.booleans(),
)
def test_business_deduction_by_cases(qbi, taxable, wages, cost, service, joint):
    low, high = (394_600, 494_600) if joint else (197_300, 247_300)
    ceiling = taxable / 5
    limit = max(wages / 2, wages / 4 + cost / 40)
    if taxable <= low:
        part = qbi / 5
    elif taxable >= high:
        part = 0 if service else min(qbi / 5, limit)
    else:  # the worksheet of Form 8995-A: percentage first, then the reduction
        gone = (taxable - low) / (high - low)
        kept = 1 - gone if service else 1
        part = kept * qbi / 5
        if part > kept * limit:
            part -= gone * (part - kept * limit)
    result = levies.qbi_deduction(qbi, taxable, wages, cost, service, joint)
    assert result == pytest.approx(min(part, ceiling), abs=0.01)


@fast
@given(st.integers(0, 400_000))
def test_fica_by_months(wages):
    paid, held = 0.0, 0.0
    for _ in range(12):
        pay = wages / 12
        held += 0.062 * max(0, min(pay, 176_100 - paid)) + 0.0145 * pay
        held += 0.009 * max(0, min(pay, paid + pay - 200_000))
        paid += pay
    assert levies.employee_fica(wages) == pytest.approx(held, abs=0.01)
    own = levies.employee_fica(wages, False)
    assert own == pytest.approx(held - levies.additional_medicare_tax(wages), abs=0.011)


@fast
@given(st.integers(0, 600_000), status)
def test_additional_medicare_tax(earnings, kind):
    start = 250_000 if kind == "joint" else 125_000 if kind == "separate" else 200_000
    expected = 0 if earnings < start else (earnings - start) * 9 / 1_000
    assert levies.additional_medicare_tax(earnings, kind) == pytest.approx(expected, **near)


@fast
@given(
    st.integers(0, 600),
    st.integers(0, 300),
    st.integers(0, 400),
    st.sampled_from(["single", "joint"]),
)
def test_rental_sale_dollar_by_thousand(gain, depreciation, ordinary, kind):
    gain, depreciation, ordinary = gain * 1_000, depreciation * 1_000, ordinary * 1_000
    back, total = min(gain, depreciation), 0.0
    for step in range(0, back, 500):
        here = tax.income_tax(ordinary + step + 500, kind) - tax.income_tax(ordinary + step, kind)
        total += min(here, 125.0)  # at most 25% of each $500
    total += tax.capital_gains_tax(gain - back, ordinary + back, kind)
    assert levies.rental_sale_tax(gain, depreciation, ordinary, kind) == pytest.approx(total, abs=60)


@fast
@given(st.integers(0, 9_000), st.integers(1, 500), st.integers(0, 900))
def test_wash_sale_share_by_share(loss, sold, bought):
    denied = sum(loss / sold for share in range(sold) if share < bought)
    assert levies.disallowed_wash_loss(loss, sold, bought) == pytest.approx(denied, abs=0.006)


@fast
@given(st.integers(1, 400), st.integers(-300, 900), st.sampled_from([0.5, 0.65]))
def test_dividends_received_deduction_by_cases(dividend, result, share):
    taxable = dividend + result
    full = dividend * share
    if taxable < full:  # a loss arises after the full deduction, so no limit applies
        expected = full
    else:
        expected = min(full, taxable * share)
    assert levies.dividends_received_deduction(dividend, taxable, share) == pytest.approx(expected, **near)
    assert levies.dividends_received_deduction(dividend, taxable, 1.0) == dividend


@fast
@given(*[st.integers(0, 90_000)] * 3, st.integers(-50_000, 50_000), *[st.integers(0, 90_000)] * 2)
def test_outside_basis_as_a_ledger(opening, contributed, income, debt, distributed, loss):
    ledger = opening
    for entry in (contributed, income, max(debt, 0), -distributed, min(debt, 0)):
        ledger += entry
    ledger = max(ledger, 0)  # an excess is gain and not negative basis
    ledger -= min(loss, ledger)
    assert levies.outside_basis(opening, contributed, income, debt, distributed, loss) == ledger


@fast
@given(dollars, dollars, st.integers(0, 500_000), st.integers(1, 500_000))
def test_credit_for_tax_elsewhere(paid, home, outside, rest):
    total = outside + rest
    allowed = Fraction(home) * outside / total
    assert levies.elsewhere_credit(paid, home, outside, total) == pytest.approx(
        float(min(paid, allowed)), **near
    )


@fast
@given(st.integers(0, 400_000), st.integers(0, 365))
def test_foreign_earnings_day_by_day(earned, days):
    room = sum(130_000 / 365 for _ in range(days))
    assert levies.foreign_earnings_exclusion(earned, days) == pytest.approx(min(earned, room), abs=0.006)


@fast
@given(st.integers(0, 700_000), status)
def test_graduated_tax_reproduces_the_federal_schedule(taxable, kind):
    tops = tax.BRACKETS[kind]
    assert levies.graduated_tax(taxable, tops, tax.RATES) == tax.income_tax(taxable, kind)


@fast
@given(st.integers(50_000, 2_000_000), st.integers(5, 100), st.integers(1, 60), st.integers(0, 90_000))
def test_property_bill_by_thousands(value, percent, mills, exemption):
    base = Fraction(value * percent, 100) - exemption
    expected = float(max(0, base) / 1_000 * mills)
    assert levies.property_bill(value, percent / 100, mills, exemption) == pytest.approx(expected, **near)


@fast
@given(st.integers(1, 90_000), st.integers(0, 25), st.integers(0, 9_000))
def test_sales_taxes(price, percent, paid):
    inside = levies.tax_inside_price(price, percent / 100)
    assert inside == pytest.approx((price - inside) * percent / 100, abs=0.01)
    due = levies.use_tax_due(price, percent / 100, paid)
    assert due == pytest.approx(max(price * percent / 100, paid) - paid, **near)


@fast
@given(st.integers(0, 90_000), st.integers(0, 70))
def test_penalties_month_by_month(unpaid, months):
    filing = paying = 0.0
    for month in range(1, months + 1):
        now = 0.005 * unpaid if month <= 50 else 0.0
        paying += now
        filing += 0.05 * unpaid - now if month <= 5 else 0.0
    assert levies.late_filing_penalty(unpaid, months) == pytest.approx(filing, abs=0.006)
    assert levies.late_payment_penalty(unpaid, months) == pytest.approx(paying, abs=0.006)
    floor = levies.late_filing_penalty(unpaid, months, minimum=525)
    assert floor == pytest.approx(max(filing, min(unpaid, 525) if months else 0), abs=0.006)


@fast
@given(dollars, dollars, st.integers(50_000, 400_000))
def test_required_annual_payment(current, prior, agi):
    expected = min(current * 9 / 10, prior * (11 if agi > 150_000 else 10) / 10)
    assert levies.required_annual_payment(current, prior, agi) == pytest.approx(expected, **near)


@pytest.mark.parametrize(
    "call, part",
    [
        (lambda: levies.child_credit(1, 1, "widow"), "use one of"),
        (lambda: levies.child_credit(-1, 1), "cannot be negative"),
        (lambda: levies.refundable_child_credit(1, -1, 1), "cannot be negative"),
        (lambda: levies.earned_income_credit(1, 4), "3 stands for three or more"),
        (lambda: levies.amt_exemption(1, "x"), "use one of"),
        (lambda: levies.employee_fica(-1), "wages"),
        (lambda: levies.rental_sale_tax(-1, 1, 1), "cannot be negative"),
        (lambda: levies.disallowed_wash_loss(1, 0, 1), "must be positive"),
        (lambda: levies.dividends_received_deduction(1, 1, 0.7), "0.5, 0.65 or 1.0"),
        (lambda: levies.outside_basis(-1), "only the change of debt"),
        (lambda: levies.elsewhere_credit(1, 1, 1, 0), "must be positive"),
        (lambda: levies.foreign_earnings_exclusion(1, 366), "between 0 and 365"),
        (lambda: levies.graduated_tax(1, (2, 1), (0.1, 0.2, 0.3)), "rising tops"),
        (lambda: levies.property_bill(1, 0, 1), "above 0"),
        (lambda: levies.use_tax_due(-1, 0.1), "cannot be negative"),
        (lambda: levies.tax_inside_price(1, -0.1), "cannot be negative"),
        (lambda: levies.late_filing_penalty(1, -1), "cannot be negative"),
        (lambda: levies.late_payment_penalty(-1, 1), "cannot be negative"),
    ],
)
def test_a_bad_value_is_refused_in_words(call, part):
    with pytest.raises(ValueError, match=part):
        call()

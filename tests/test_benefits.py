"""Every computation of benefits is worked out a second time, by another formula or month by month."""

import numpy as np
import numpy_financial as npf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elson_nb.corpus import benefits, finance

fast = settings(derandomize=True, max_examples=40, deadline=None)
ages = st.integers(744, 850)


@fast
@given(st.integers(0, 15_000))
def test_primary_amount_and_family_maximum_dollar_by_dollar(earnings):
    pia = sum(0.9 if d < 1226 else 0.32 if d < 7391 else 0.15 for d in range(earnings))
    assert benefits.primary_insurance_amount(earnings) == pytest.approx(pia, abs=0.1001)
    assert benefits.primary_insurance_amount(earnings) <= pia + 1e-6
    full = earnings // 3
    steps = [1.5 if d < 1567 else 2.72 if d < 2262 else 1.34 if d < 2950 else 1.75 for d in range(full)]
    assert benefits.family_maximum(full) == pytest.approx(sum(steps), abs=0.1001)


@fast
@given(st.integers(0, 2_000), st.integers(500, 4_000), ages)
def test_spouse_month_by_month(own, worker, age):
    share = 100.0
    for month in range(804, age, -1):
        share -= 25 / 36 if month > 768 else 5 / 12
    expected = max(0, worker / 2 - own) * share / 100
    assert benefits.spousal_excess(own, worker, age) == pytest.approx(expected, abs=0.006)


@fast
@given(st.integers(800, 4_000), st.sampled_from([0, 0.7, 0.8, 0.95, 1, 1.08, 1.24]), st.integers(720, 860))
def test_survivor_by_interpolation(full, share, age):
    paid = full * share
    factor = float(np.interp(age, [720, 804], [0.715, 1]))
    if 0 < share < 1:
        expected = min(full * factor, max(paid, 0.825 * full))
    else:
        expected = max(full, paid) * factor
    assert benefits.survivor_benefit(full, paid, age) == pytest.approx(expected, abs=0.006)


@fast
@given(st.integers(0, 60_000), st.integers(0, 120_000), st.sampled_from(["single", "joint"]))
def test_taxable_benefits_by_the_worksheet_of_publication_915(total, other, status):
    base, gap = (25_000, 9_000) if status == "single" else (32_000, 12_000)
    line8 = other + total / 2
    line10 = max(0, line8 - base)
    line12 = max(0, line10 - gap)
    line13 = min(line10, gap)
    line15 = min(total / 2, line13 / 2)
    expected = min(line15 + 0.85 * line12, 0.85 * total)
    assert benefits.taxable_social_security(total, other, status) == pytest.approx(expected, abs=0.006)


@fast
@given(st.integers(0, 2_500), st.integers(0, 1_000))
def test_ssi_in_the_order_of_the_regulation(wages, pension):
    exclusion = 20
    unearned = max(0, pension - exclusion)
    exclusion = max(0, exclusion - pension)
    after = wages - exclusion if wages > exclusion else 0
    after = after - 65 if after > 65 else 0
    assert benefits.ssi_payment(wages, pension) == pytest.approx(max(0, 967 - unearned - after / 2))


@fast
@given(st.integers(50_000, 900_000), st.floats(0.04, 0.15), st.integers(10, 40))
def test_lump_sum_return_by_numpy_financial(lump, share, years):
    rate = benefits.lump_sum_return(lump, lump * share, years)
    assert npf.pv(rate, years, -lump * share) == pytest.approx(lump, rel=1e-6)


@fast
@given(st.integers(20_000, 80_000), st.floats(0, 0.09), st.integers(200_000, 3_000_000))
def test_guardrails_by_cases(last, inflation, pot):
    rate = last * (1 + inflation) / pot
    factor = 1.0
    if rate / 0.05 > 1.2:
        factor = 0.9
    if rate / 0.05 < 0.8:
        factor = 1.1
    expected = rate * pot * factor
    assert benefits.guardrail_withdrawal(last, inflation, pot, 0.05) == pytest.approx(expected, abs=0.006)


def test_vesting_by_the_tables_of_the_code():
    table = {
        "cliff": [0, 0, 1, 1, 1, 1, 1],
        "graded": [0, 0.2, 0.4, 0.6, 0.8, 1, 1],
        "pension cliff": [0, 0, 0, 0, 1, 1, 1],
        "pension graded": [0, 0, 0.2, 0.4, 0.6, 0.8, 1],
    }
    for schedule, shares in table.items():
        assert [benefits.vested_share(year, schedule) for year in range(1, 8)] == shares


@fast
@given(st.integers(5_000, 80_000), st.floats(0, 0.08), st.integers(0, 18), st.floats(0, 0.08))
def test_college_fund_runs_out_with_the_last_bill(yearly, inflation, years, rate):
    fund = benefits.college_fund_target(yearly, inflation, years, rate)
    bill = yearly * (1 + inflation) ** years
    for _ in range(4):
        fund = (fund - bill) * (1 + rate)
        bill *= 1 + inflation
    assert fund == pytest.approx(0, abs=0.02)


@fast
@given(st.integers(0, 200_000), st.integers(1, 6), st.integers(0, 4))
def test_income_driven_payments_by_tables(income, household, dependents):
    line = {1: 15_650, 2: 21_150, 3: 26_650, 4: 32_150, 5: 37_650, 6: 43_150}[household]
    expected = max(0, (income - 1.5 * line) * 0.15 / 12)
    assert benefits.income_based_payment(income, household, 0.15) == pytest.approx(expected, abs=0.006)
    points = sum(income > edge for edge in range(10_000, 101_000, 10_000))
    yearly = income * points / 100 if points else 120
    assert benefits.repayment_assistance_payment(income, dependents) == pytest.approx(
        max(10, yearly / 12 - 50 * dependents), abs=0.006
    )


@fast
@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from([40, 55]))
def test_hsa_limit_month_by_month(alone, family, age):
    if alone + family > 12:
        with pytest.raises(ValueError, match="12 at most"):
            benefits.hsa_limit(alone, family, age)
        return
    limits = [4_300] * alone + [8_550] * family
    expected = sum((limit + (1_000 if age >= 55 else 0)) / 12 for limit in limits)
    assert benefits.hsa_limit(alone, family, age) == pytest.approx(expected, abs=0.006)


@fast
@given(st.integers(500, 20_000), st.floats(0.05, 0.3), st.floats(0.03, 0.2))
def test_a_single_debt_agrees_with_the_formula(balance, rate, share):
    payment = balance * share
    months, interest = benefits.debt_plan([(balance, rate, payment)], 0, "avalanche")
    assert months == pytest.approx(finance.months_to_repay(balance, rate, payment), abs=1)
    before = npf.fv(rate / 12, months - 1, payment, -balance)
    last = before * (1 + rate / 12)
    assert interest == pytest.approx(payment * (months - 1) + last - balance, abs=0.02)


def second_ledger(debts, extra, key):
    owed, paid, months = {i: d[0] for i, d in enumerate(debts)}, 0.0, 0
    budget = extra + sum(d[2] for d in debts)
    while owed:
        months += 1
        owed = {i: b * (1 + debts[i][1] / 12) for i, b in owed.items()}
        wanted = {i: min(b, debts[i][2]) for i, b in owed.items()}
        spare = budget - sum(wanted.values())
        for i in sorted(owed, key=lambda i: key(debts[i])):
            more = min(spare, owed[i] - wanted[i])
            wanted[i], spare = wanted[i] + more, spare - more
        paid += sum(wanted.values())
        owed = {i: b - wanted[i] for i, b in owed.items() if b - wanted[i] > 0.005}
    return months, paid - sum(d[0] for d in debts)


@fast
@given(
    st.lists(st.tuples(st.integers(500, 9_000), st.floats(0.04, 0.3)), min_size=2, max_size=4, unique=True),
    st.integers(20, 600),
)
def test_both_orders_of_repayment_by_a_second_ledger(pairs, extra):
    debts = [(balance, rate, balance * 0.03) for balance, rate in pairs]
    for method, key in (("avalanche", lambda d: -d[1]), ("snowball", lambda d: d[0])):
        months, interest = benefits.debt_plan(debts, extra, method)
        again = second_ledger(debts, extra, key)
        assert (months, interest) == (again[0], pytest.approx(again[1], abs=0.05))
    cheap = benefits.debt_plan(debts, extra, "avalanche")[1]
    assert cheap <= benefits.debt_plan(debts, extra, "snowball")[1] + 0.05


@pytest.mark.parametrize(
    "call, part",
    [
        (lambda: benefits.spousal_excess(0, 1000, 700), "start at 62"),
        (lambda: benefits.survivor_benefit(1000, 0, 700), "start at 60"),
        (lambda: benefits.taxable_social_security(1, 1, "x"), "use one of"),
        (lambda: benefits.vested_share(1, "x"), "use one of"),
        (lambda: benefits.lump_sum_return(100, 1, 2), "no return"),
        (lambda: benefits.debt_plan([(1, 0.1, 1)], 0, "x"), "avalanche"),
        (lambda: benefits.income_based_payment(1, 0), "at least one person"),
    ],
)
def test_a_bad_value_is_refused_in_words(call, part):
    with pytest.raises(ValueError, match=part):
        call()

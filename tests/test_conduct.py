"""Limits, thresholds and trading costs of `conduct`, each worked out a second time by another way."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar

from elson_nb.corpus import conduct

fast = settings(derandomize=True, max_examples=40, deadline=None)
whole = st.integers(0, 400_000)
share = st.floats(0.01, 1)
price = st.floats(5, 200).map(lambda x: round(x, 2))


@fast
@given(whole, whole)
def test_crowdfunding_by_the_two_branches_of_the_rule(income, worth):
    poor = income < 124_000 or worth < 124_000
    allowed = [limit for limit in (income, worth)]
    expected = max(2_500, max(allowed) / 20) if poor else min(124_000, max(allowed) / 10)
    assert conduct.crowdfunding_limit(income, worth) == pytest.approx(expected, abs=0.0051)


@fast
@given(st.integers(10**6, 10**8), st.lists(st.integers(0, 10**6), min_size=4, max_size=4))
def test_volume_limit(outstanding, weeks):
    limit = conduct.affiliate_volume_limit(outstanding, weeks)
    assert limit >= np.mean(weeks) - 1e-6 and limit >= 0.01 * outstanding - 1e-6
    assert limit == pytest.approx(np.mean(weeks)) or limit == pytest.approx(0.01 * outstanding)


@fast
@given(share, share, share, share)
def test_ownership_by_a_matrix_of_stakes(direct, a, b, c):
    # 0 is the person, 1 and 2 are companies between, 3 is the company asked for
    stakes = np.zeros((4, 4))
    stakes[0, 1], stakes[1, 2], stakes[2, 3], stakes[0, 3] = a, b, c, direct
    total = np.linalg.inv(np.eye(4) - stakes)[0, 3]
    assert conduct.ownership_through_chains(direct, [(a, b, c)]) == pytest.approx(total)


@fast
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(10**6, 10**8))
def test_beneficial_share_leaves_the_others_their_shares(held, options, outstanding):
    mine = conduct.beneficial_share(held, options, outstanding)
    others = (outstanding - held) / (outstanding + options)
    assert mine == pytest.approx(1 - others)


@fast
@given(st.lists(whole, max_size=4), st.lists(whole, max_size=4))
def test_currency_is_never_netted(cash_in, cash_out):
    total = conduct.currency_total(cash_in, cash_out)
    assert total >= abs(sum(cash_in) - sum(cash_out)) and total in (sum(cash_in), sum(cash_out))


@fast
@given(st.lists(price, min_size=1, max_size=5), st.lists(price, min_size=1, max_size=5))
def test_short_swing_profit_is_the_best_of_all_matchings(bought, sold):
    size = max(len(bought), len(sold))
    buys, sells = bought + [None] * (size - len(bought)), sold + [None] * (size - len(sold))
    best = max(
        sum(max(0, s - b) for b, s in zip(buys, order, strict=True) if b is not None and s is not None)
        for order in itertools.permutations(sells)
    )
    lots = [[(100, p) for p in side] for side in (bought, sold)]
    assert conduct.short_swing_profit(*lots) == pytest.approx(100 * best, abs=0.01)


@fast
@given(st.floats(50, 150), st.floats(50, 150))
def test_markup_turned_round(paid, market):
    assert market * (1 + conduct.markup_percent(paid, market) / 100) == pytest.approx(paid, abs=0.01)


@fast
@given(st.integers(1_000, 10**6), share, st.floats(0.25, 0.6))
def test_margin_by_putting_the_cash_in(value, debt, requirement):
    loan = value * debt
    call = conduct.maintenance_call(value, loan, requirement)
    assert value - (loan - call) >= requirement * value - 0.01
    if call > 0.01:
        assert value - (loan - call) == pytest.approx(requirement * value, abs=0.01)
    called = conduct.short_call_price(100, 0.5, requirement)
    root = brentq(lambda p: (150 - p) / p - requirement, 1, 150)
    assert called == pytest.approx(root, abs=0.0051)


@fast
@given(whole, whole, whole)
def test_card_liability_by_cases(first, later, after):
    early = first if first < 50 else 50
    expected = (early + later if early + later < 500 else 500) + after
    assert conduct.unauthorized_transfer_liability(first, later, after) == pytest.approx(expected)


@fast
@given(whole, whole, st.integers(0, 2 * 10**6), st.integers(0, 8))
def test_deposits_insured_and_not_insured_make_the_whole(single, joint, trust, heirs):
    covered = 250_000 * heirs if heirs < 5 else 1_250_000
    bare = max(0, single - 250_000) + max(0, joint - 250_000) + max(0, trust - covered)
    assert conduct.insured_deposits(single, joint, trust, heirs) == pytest.approx(
        single + joint + trust - bare
    )


@fast
@given(price, st.floats(0.01, 1), st.floats(-0.5, 0.5))
def test_spreads_from_half_spreads(bid, width, place):
    ask = bid + width
    middle = bid + width / 2
    paid = middle + place
    assert conduct.quoted_spread(bid, ask) == pytest.approx(1e4 * width / middle)
    assert conduct.effective_spread(ask, bid, ask) == pytest.approx(conduct.quoted_spread(bid, ask))
    buy, sell = conduct.effective_spread(paid, bid, ask), conduct.effective_spread(paid, bid, ask, False)
    assert buy == pytest.approx(-sell) and buy == pytest.approx(2e4 * place / middle, abs=1e-6)


@fast
@given(st.lists(st.tuples(st.integers(1, 500), price), min_size=1, max_size=6), price, price, st.booleans())
def test_average_price_and_shortfall_share_by_share(trades, decision, closing, buy):
    each = np.repeat([p for _, p in trades], [n for n, _ in trades])
    assert conduct.volume_weighted_price(trades) == pytest.approx(each.mean())
    ordered = len(each) + 200
    sign = 1 if buy else -1
    paper = sign * ordered * (closing - decision)
    real = sign * (closing - each).sum() - 12
    assert conduct.implementation_shortfall(decision, ordered, trades, closing, 12, buy) == pytest.approx(
        paper - real, abs=0.01
    )


@fast
@given(st.floats(0.005, 0.05), st.integers(1, 10**6), st.integers(10**6, 10**8))
def test_impact_grows_with_the_root(volatility, quantity, volume):
    one = conduct.square_root_impact(volatility, quantity, volume)
    assert conduct.square_root_impact(volatility, 4 * quantity, volume) == pytest.approx(2 * one)
    assert one == pytest.approx(math.exp(math.log(volatility) + 0.5 * math.log(quantity / volume)))


@pytest.mark.parametrize("trials", [10, 30, 100])
def test_luck_by_simulation(trials):
    drawn = np.random.default_rng(7).standard_normal((40_000, trials)).max(axis=1).mean()
    assert conduct.best_of_luck(trials) == pytest.approx(drawn, abs=0.05)


@fast
@given(st.floats(0.3, 0.99))
def test_half_life_by_stepping(persistence):
    life = conduct.reversion_half_life(persistence)
    assert persistence**life == pytest.approx(0.5)


@fast
@given(st.floats(0.35, 0.8), st.floats(0.5, 4))
def test_kelly_by_search(chance, payoff):
    found = minimize_scalar(
        lambda f: -(chance * math.log(1 + f * payoff) + (1 - chance) * math.log(1 - f)),
        bounds=(0, 0.999),
        method="bounded",
    ).x
    assert conduct.kelly_fraction(chance, payoff) == pytest.approx(found, abs=1e-3)


@fast
@given(st.integers(1, 500), st.integers(1, 500), st.integers(500, 5_000), st.integers(0, 2_000))
def test_offering_keeps_every_share_in_the_books(held, sold, outstanding, issued):
    sold = min(held, sold)
    mine = conduct.ownership_after_offering(held, sold, outstanding, issued)
    others = (outstanding - held + sold + issued) / (outstanding + issued)
    assert mine + others == pytest.approx(1)
    proceeds = conduct.offering_proceeds(issued, 20, 0.07, 10)
    assert proceeds == pytest.approx(sum([20.0 - 1.4] * issued) - 10, abs=0.01)


@fast
@given(st.integers(50, 3_000), st.integers(1, 9), st.integers(1, 9))
def test_cumulative_votes_against_the_best_answer_of_the_others(shares, seats, wanted):
    wanted = min(seats, wanted)
    need = conduct.cumulative_votes_needed(shares, seats, wanted)

    def sure(mine):  # the others spread their votes over the seats that would have to be theirs
        return mine * seats / wanted > (shares - mine) * seats / (seats - wanted + 1)

    assert sure(need) and not sure(need - 1)


@fast
@given(st.lists(st.tuples(share, st.integers(1, 10**6), st.integers(1, 10**5)), min_size=1, max_size=5))
def test_intensity_by_dot_product(rows):
    table = np.array(rows, dtype=float)
    weights = table[:, 0] / table[:, 0].sum()
    expected = weights @ (table[:, 1] / table[:, 2])
    found = conduct.carbon_intensity(list(weights), list(table[:, 1]), list(table[:, 2]))
    assert found == pytest.approx(expected)
    parts = [conduct.financed_emissions(w * 400, 400, 20_000) for w in weights]
    assert sum(parts) == pytest.approx(20_000)

"The plan against every plan there is, on small cases, and against a convex program's corners on larger ones."

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from elson_nb.corpus.shares import apportion
from elson_nb.curriculum.quotas import answer, level, spread, within_reach

OWN_TIER_ONLY = lambda n: np.where(np.eye(n), 0, np.inf)


def over(*strategies, examples=150):
    "Run a test over examples, the same ones every time."
    return lambda test: settings(derandomize=True, deadline=None, max_examples=examples)(
        given(*strategies)(test)
    )


@st.composite
def small_cases(draw, most: int = 3):
    "Stock of up to four domains and three kinds (eight cells at most), weights, a cap, and what is wanted."
    domains, kinds = draw(st.sampled_from([(1, 3), (2, 2), (2, 3), (3, 2), (4, 2), (4, 1), (2, 4)]))
    row = st.lists(st.integers(0, most), min_size=kinds, max_size=kinds)
    stock = np.array(draw(st.lists(row, min_size=domains, max_size=domains)))
    weight = st.sampled_from([0.5, 1.0, 2.0, 3.0])
    weights = np.array(draw(st.lists(weight, min_size=domains, max_size=domains)))
    wanted = np.array(draw(st.lists(st.integers(0, 6), min_size=kinds, max_size=kinds)))
    return stock, weights, draw(st.integers(1, 7)), wanted


def every_plan(stock: np.ndarray, cap: int) -> np.ndarray:
    "All plans within stock and cap: (plans, domains, kinds)."
    plans = np.array(list(product(*(range(n + 1) for n in stock.ravel())))).reshape(-1, *stock.shape)
    return plans[(plans.sum(axis=2) <= cap).all(axis=1)]


def unevenness(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (x**2 / weights[:, None]).sum(axis=(-2, -1))


@over(st.integers(0, 20000), st.dictionaries(st.text(max_size=2), st.floats(0.01, 9), min_size=1, max_size=8))
def test_apportion_is_exact_and_within_one_of_each_share(total, shares):
    counts, whole = apportion(total, shares), sum(shares.values())
    assert sum(counts.values()) == total
    assert all(abs(counts[k] - total * share / whole) < 1 + 1e-6 for k, share in shares.items())


@over(small_cases())
def test_hall_says_what_trying_every_plan_says(case):
    stock, _, cap, wanted = case
    columns = every_plan(stock, cap).sum(axis=1)
    assert within_reach(wanted, stock, cap) == (columns == wanted).all(axis=1).any()


@over(small_cases())
def test_as_much_is_answered_as_any_plan_could(case):
    stock, _, cap, wanted = case
    columns = every_plan(stock, cap).sum(axis=1)
    most = columns[(columns <= wanted).all(axis=1)].sum(axis=1).max()
    given = answer(wanted, OWN_TIER_ONLY(len(wanted)), stock, cap)
    assert given.sum() == most and within_reach(given.sum(axis=0), stock, cap)


@over(small_cases(most=2), examples=60)
def test_no_answer_is_cheaper(case):
    "Against every way to let kinds answer for tiers, of those that leave least unanswered."
    stock, _, cap, wanted = case
    wanted = np.minimum(wanted, 3)
    n = len(wanted)
    price = np.array(
        [[0 if i == j else 100 * abs(i - j) + 10 * (j < i) + 1 for j in range(n)] for i in range(n)]
    )
    given = answer(wanted, price.astype(float), stock, cap)
    assert (given.sum(axis=1) <= wanted).all() and within_reach(given.sum(axis=0), stock, cap)
    worth = 1e6 + 1e3 * np.arange(n)
    value = lambda g: (g * (worth[:, None] - price)).sum()
    reachable = {tuple(c) for c in every_plan(stock, cap).sum(axis=1)}
    rows = [[r for r in product(*(range(w + 1) for _ in range(n))) if sum(r) <= w] for w in wanted]
    if np.prod([len(r) for r in rows]) > 30_000:
        return
    ways = (np.array(way) for way in product(*rows))
    best = max(value(way) for way in ways if tuple(way.sum(axis=0)) in reachable)
    assert value(given) == pytest.approx(best)


@over(small_cases(), examples=400)
def test_no_plan_is_more_even(case):
    stock, weights, cap, wanted = case
    wanted = answer(wanted, OWN_TIER_ONLY(len(wanted)), stock, cap).sum(axis=0)
    x = spread(wanted, stock, weights, cap)
    assert (x >= 0).all() and (x <= stock).all() and (x.sum(axis=1) <= cap).all()
    assert (x.sum(axis=0) == wanted).all()
    plans = every_plan(stock, cap)
    fitting = plans[(plans.sum(axis=1) == wanted).all(axis=1)]
    assert unevenness(x, weights) <= unevenness(fitting, weights).min() + 1e-9


@over(st.integers(0, 10**6), examples=25)
def test_no_plan_is_more_even_on_uneven_stocks_under_a_tight_cap(seed):
    "Against HiGHS: one variable for each record of each cell, its cost what that record adds."
    rng = np.random.default_rng(seed)
    stock = (rng.pareto(0.8, (8, 3)) * 6).astype(int).clip(0, 40)
    weights, cap = rng.choice([1.0, 2.0], 8), int(rng.integers(4, 25))
    wanted = answer(rng.integers(0, 60, 3), OWN_TIER_ONLY(3), stock, cap).sum(axis=0)
    x = spread(wanted, stock, weights, cap)
    assert (x.sum(axis=0) == wanted).all() and (x <= stock).all() and (x.sum(axis=1) <= cap).all()
    units = [(d, k, n) for (d, k), count in np.ndenumerate(stock) for n in range(count)]
    if not units:
        return
    column = lambda test: np.array([[float(test(u, row)) for u in units] for row in range(8)])
    solved = linprog(
        [(2 * n + 1) / weights[d] for d, _, n in units],
        A_ub=column(lambda u, row: u[0] == row),
        b_ub=np.full(8, cap),
        A_eq=column(lambda u, row: u[1] == row)[:3],
        b_eq=wanted,
        bounds=(0, 1),
    )
    assert unevenness(x, weights) == pytest.approx(solved.fun)


def test_a_plan_far_over_its_cap_is_brought_under_it():
    rng = np.random.default_rng(3)
    stock = (rng.pareto(0.6, (114, 4)) * 30).astype(int)
    asked = np.array([1290, 2580, 1935, 645])
    for cap in (967, 300, 120, 80):
        wanted = answer(asked, OWN_TIER_ONLY(4), stock, cap).sum(axis=0)
        x = spread(wanted, stock, np.ones(114), cap)
        assert x.sum(axis=1).max() <= cap and (x.sum(axis=0) == wanted).all() and (x <= stock).all()


@over(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(0, 99), st.integers(0, 2**9))
def test_a_level_rises_in_every_cell(stock, wanted, heavy):
    "One record more never takes one from another cell."
    stock = np.array(stock)
    weights = np.where(heavy >> np.arange(len(stock)) & 1, 2.0, 1.0)
    wanted = min(wanted, int(stock.sum()))
    levels = [level(n, stock, weights, np.zeros(len(stock))) for n in range(wanted + 1)]
    assert all((low <= high).all() and high.sum() == low.sum() + 1 for low, high in zip(levels, levels[1:]))

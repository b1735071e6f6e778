"""The benchmark files are well formed and fair, and every numeric key is right.

A numeric key is recomputed here from figures that must stand in the question itself. Beside each formula are
likely mistakes, whose results the question's tolerance must tell apart from the key."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

PACKAGE = Path(__file__).parents[1] / "elson_nb"
BENCHMARK = PACKAGE / "benchmark"
TIERS = {"easy", "medium", "hard", "extremely_complex"}
UNITS = {"usd", "percent", "years", "ratio", "shares"}
INFERENCE_DOMAINS = "retirement_planning federal_income_tax estate_planning investment compliance".split()


def load_quizzes():
    files = sorted(p for p in BENCHMARK.glob("*.json") if p.name != "inference_test.json")
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in files}


QUIZZES = load_quizzes()
QUESTIONS = [q for quiz in QUIZZES.values() for q in quiz["questions"]]
CHOICE = [q for q in QUESTIONS if q["kind"] == "multiple_choice"]
NUMERIC = [q for q in QUESTIONS if q["kind"] == "numeric"]


def early_benefit(pia, months):
    "Social Security benefit claimed `months` before full retirement age."
    return pia * (1 - min(36, months) * 5 / 900 - max(0, months - 36) * 5 / 1200)


def tax(income, brackets):
    "Tax on `income` under `brackets`, a list of (upper end, rate)."
    total, lower = 0, 0
    for upper, rate in brackets:
        total += rate * max(0, min(income, upper) - lower)
        lower = upper
    return total


def gain_tax(wages, gain, deduction, top10, top12, top0):
    "Regular tax when a long-term gain is stacked on ordinary income."
    ordinary = wages - deduction
    at_zero = min(gain, max(0, top0 - ordinary))
    return tax(ordinary, [(top10, 0.10), (top12, 0.12)]) + 0.15 * (gain - at_zero)


def declining(cost, salvage, life, year):
    "Double-declining-balance depreciation of one year, never below salvage."
    book = cost
    for _ in range(year):
        charge = min(2 / life * book, book - salvage)
        book -= charge
    return charge


def price(face, coupon, rate, periods):
    "Price as the plain sum of discounted payments."
    return sum(coupon / (1 + rate) ** t for t in range(1, periods + 1)) + face / (1 + rate) ** periods


def own_cost(bills, deductible, rate, maximum):
    "What a patient pays of each covered bill in turn."
    paid, shares = 0, []
    for i, bill in enumerate(bills):
        before = sum(bills[:i])
        below = max(0, min(deductible, before + bill) - before)
        share = min(below + rate * (bill - below), maximum - paid)
        shares.append(share)
        paid += share
    return shares


def volatility(w1, s1, w2, s2, correlation):
    return math.sqrt((w1 * s1) ** 2 + (w2 * s2) ** 2 + 2 * correlation * w1 * s1 * w2 * s2)


def unitrust(value, payout, growth):
    return payout * (value * (1 - payout) * (1 + growth))


def fee_refund(rates, step, balance, left, days):
    annual = rates[0] * min(balance, step) + rates[1] * max(0, balance - step)
    return annual / 4 * left / days


# id: (figures quoted from the question, formula over them, likely mistakes over them)
FORMULAS = {
    "retirement_planning-005": (
        ["$487,630", "24.6", "25.5", "$512,400", "23.7"],
        lambda b, f, *_: b / f,
        [lambda b, f, g, *_: b / g, lambda b, f, g, c, h: c / f, lambda b, f, g, c, h: c / h],
    ),
    "retirement_planning-006": (
        ["67", "$2,346", "63", "6 months"],
        lambda fra, pia, age, m: early_benefit(pia, 12 * (fra - age) - m),
        [
            lambda fra, pia, *_: pia * (1 - 42 * 5 / 900),
            lambda fra, pia, *_: pia * 0.75,
            lambda fra, pia, *_: pia * 0.8,
        ],
    ),
    "retirement_planning-010": (
        ["$7,000", "$41,300", "$12,460", "$28,900", "$90,000"],
        lambda c, r, s, *_: c - c * c / (r + s + c),
        [
            lambda c, *_: c,
            lambda c, r, *_: c - c * c / (r + c),
            lambda c, r, s, roth, w: c - c * c / (r + s + c + w),
            lambda c, r, s, roth, w: c - c * c / (r + s + c + roth),
            lambda c, r, s, *_: c - c * c / (r + s),
        ],
    ),
    "federal_income_tax-003": (
        ["$84,200", "$9,975", "$3,100"],
        lambda agi, own, _: max(0, own - 0.075 * agi),
        [
            lambda agi, own, _: own,
            lambda agi, own, ins: own + ins - 0.075 * agi,
            lambda agi, own, _: own - 0.1 * agi,
        ],
    ),
    "federal_income_tax-008": (
        ["$271,400", "$38,750", "$250,000", "3.8%"],
        lambda magi, nii, line, r: r / 100 * min(nii, magi - line),
        [lambda magi, nii, line, r: r / 100 * nii],
    ),
    "federal_income_tax-010": (
        ["$61,400", "$14,900", "$15,750", "$11,925", "$48,475", "$48,350"],
        gain_tax,
        [
            lambda w, g, d, a, b, z: tax(w + g - d, [(a, 0.10), (b, 0.12), (1e9, 0.22)]),
            lambda w, g, d, a, b, z: tax(w - d, [(a, 0.10), (b, 0.12)]) + 0.15 * g,
            lambda w, g, d, a, b, z: tax(w - d, [(a, 0.10), (b, 0.12)]),
        ],
    ),
    "accounting-004": (
        ["$38,400", "$4,000", "five", "third"],
        declining,
        [
            lambda c, s, n, y: (c - s) / n,
            lambda c, s, n, y: declining(c - s, 0, n, y),
            lambda c, s, n, y: declining(c, s, n, y - 1),
        ],
    ),
    "accounting-005": (
        ["$96,500", "$31,200", "$8,750", "1%", "6%", "40%", "$1,140"],
        lambda a, b, c, p, q, r, have: (a * p + b * q + c * r) / 100 - have,
        [
            lambda a, b, c, p, q, r, _: (a * p + b * q + c * r) / 100,
            lambda a, b, c, p, q, r, have: (a * p + b * q + c * r) / 100 + have,
        ],
    ),
    "accounting-008": (
        ["24 months", "$51,300", "$46,200", "$10,800"],
        lambda m, p, a, s: p * a / (a + s) + p * s / (a + s) * 9 / m,
        [
            lambda m, p, a, s: p - s + s * 9 / m,
            lambda m, p, a, s: p * a / (a + s) + p * s / (a + s) * 8 / m,
            lambda m, p, a, s: p,
        ],
    ),
    "insurance-004": (
        ["$1,800", "20%", "$5,200", "$14,350", "$8,940"],
        lambda d, r, top, first, second: own_cost([first, second], d, r / 100, top)[1],
        [
            lambda d, r, top, first, second: r / 100 * second,
            lambda d, r, top, first, second: d + r / 100 * (second - d),
        ],
    ),
    "insurance-007": (
        ["$640,000", "$420,000", "80%", "$2,500", "$93,500"],
        lambda value, carried, clause, deductible, loss: (
            loss * min(1, carried / (value * clause / 100)) - deductible
        ),
        [
            lambda v, c, k, d, loss: loss - d,
            lambda v, c, k, d, loss: loss * c / v - d,
            lambda v, c, k, d, loss: (loss - d) * c / (v * k / 100),
        ],
    ),
    "insurance-010": (
        ["30%", "$900,000", "$600,000", "$2,350,000"],
        lambda ceded, cover, retention, loss: (
            (r := loss * (1 - ceded / 100)) - min(cover, max(0, r - retention))
        ),
        [
            lambda ceded, cover, retention, loss: retention,
            lambda ceded, cover, retention, loss: (loss - cover) * (1 - ceded / 100),
        ],
    ),
    "estate_planning-004": (
        ["$51,400", "six", "$19,000"],
        lambda gift, n, free: n * (gift / 2 - free),
        [lambda gift, n, free: n * (gift - free), lambda gift, n, free: n * (gift - 2 * free)],
    ),
    "estate_planning-005": (
        ["$742,300", "5.5%", "6.2%"],
        lambda v, p, g: unitrust(v, p / 100, g / 100),
        [lambda v, p, g: v * p / 100, lambda v, p, g: v * (1 + g / 100) * p / 100],
    ),
    "estate_planning-010": (
        ["$16,720,000", "$318,500", "$1,250,000", "$462,000", "$13,990,000", "40%"],
        lambda gross, debts, gift, life, free, r: r / 100 * (gross - debts - gift + life - free),
        [
            lambda gross, debts, gift, life, free, r: r / 100 * (gross - debts - gift - free),
            lambda gross, debts, gift, life, free, r: r / 100 * (gross - debts + life - free),
        ],
    ),
    "compliance-003": (
        ["97.40", "99.85"],
        lambda cost, sale: (sale - cost) / cost * 100,
        [lambda cost, sale: (sale - cost) / sale * 100, lambda cost, sale: sale - cost],
    ),
    "compliance-007": (
        ["1,340", "$47.10", "$45,220", "35%"],
        lambda n, p, debt, r: r / 100 * n * p - (n * p - debt),
        [lambda n, p, debt, r: 0.25 * n * p - (n * p - debt)],
    ),
    "compliance-010": (
        ["0.9%", "0.65%", "$500,000", "$823,400", "55", "92-day", "37"],
        lambda a, b, step, v, left, days, _: fee_refund([a / 100, b / 100], step, v, left, days),
        [
            lambda a, b, step, v, left, days, used: fee_refund([a / 100, b / 100], step, v, used, days),
            lambda a, b, step, v, left, days, used: fee_refund([a / 100, a / 100], step, v, left, days),
            lambda a, b, step, v, left, days, used: fee_refund([b / 100, b / 100], step, v, left, days),
        ],
    ),
    "investment-004": (
        ["24.0%", "-17.5%", "9.3%"],
        lambda *years: 100 * (math.exp(sum(math.log1p(y / 100) for y in years) / 3) - 1),
        [lambda *years: sum(years) / 3, lambda *years: 100 * (math.prod(1 + y / 100 for y in years) - 1) / 3],
    ),
    "investment-007": (
        ["62%", "17.4%", "38%", "6.8%", "-0.15"],
        lambda w1, s1, w2, s2, c: volatility(w1 / 100, s1, w2 / 100, s2, c),
        [
            lambda w1, s1, w2, s2, c: (w1 * s1 + w2 * s2) / 100,
            lambda w1, s1, w2, s2, c: volatility(w1 / 100, s1, w2 / 100, s2, 0),
            lambda w1, s1, w2, s2, c: volatility(w1 / 100, s1, w2 / 100, s2, -c),
        ],
    ),
    "investment-010": (
        ["$1,000", "4.6%", "7.5 years", "5.3%"],
        lambda face, c, years, y: price(face, face * c / 200, y / 200, int(2 * years)),
        [
            lambda face, c, years, y: price(face, face * c / 200, (1 + y / 100) ** 0.5 - 1, int(2 * years)),
            lambda face, c, years, y: price(face, face * c / 100, y / 100, 7),
            lambda face, c, years, y: price(face, face * c / 100, y / 100, 8),
        ],
    ),
}
WORDS = {"third": 3, "five": 5, "six": 6}


def figure(text):
    "The number in a quoted figure: '$2,500' → 2500.0, '5.5%' → 5.5, 'six' → 6."
    return WORDS[text] if text in WORDS else float(re.sub(r"[^\d.-]|(?<=\d)-.*", "", text))


def stands_in(question, text):
    "Whether the figure is in the question as it is, not as part of a longer number."
    return re.search(rf"(?<![\d.,]){re.escape(text)}(?!\d|[.,]\d)", question) is not None


def close(answer, key, tolerance):
    return abs(answer - key) <= tolerance * abs(key)


def test_size_and_spread():
    assert len(QUESTIONS) == 80 and len(QUIZZES) == 8
    assert len({q["domain"] for q in QUESTIONS}) >= 8
    for name, quiz in QUIZZES.items():
        assert quiz["quiz"] == name and quiz["title"] and len(quiz["questions"]) == 10
        assert TIERS == {q["tier"] for q in quiz["questions"]}, name
        numeric = sum(q["kind"] == "numeric" for q in quiz["questions"])
        assert numeric == (0 if name == "tool_use" else 3), name


def test_ids_and_questions_are_unique():
    assert len({q["id"] for q in QUESTIONS}) == len(QUESTIONS)
    assert len({re.sub(r"\W+", " ", q["question"].lower()).strip() for q in QUESTIONS}) == len(QUESTIONS)


def test_domains_are_in_the_taxonomy():
    domains = yaml.safe_load((PACKAGE / "taxonomy.yaml").read_text(encoding="utf-8"))["domains"]
    assert not {q["domain"] for q in QUESTIONS} - set(domains)


@pytest.mark.parametrize("q", QUESTIONS, ids=lambda q: q["id"])
def test_question_is_well_formed(q):
    fields = {"id", "kind", "domain", "tier", "question", "answer", "explanation", "source"}
    own = {"multiple_choice": {"choices"}, "numeric": {"unit", "tolerance"}}[q["kind"]]
    assert set(q) == fields | own
    assert q["tier"] in TIERS
    assert all(q[f].strip() == q[f] != "" for f in ("question", "explanation", "source"))
    if q["kind"] == "multiple_choice":
        assert len({c.strip().lower() for c in q["choices"]}) == len(q["choices"]) == 4
        assert type(q["answer"]) is int and 0 <= q["answer"] <= 3
    else:
        assert q["unit"] in UNITS and 0 < q["tolerance"] <= 0.02 and math.isfinite(q["answer"])


def test_positions_are_balanced():
    assert max(Counter(q["answer"] for q in CHOICE).values()) <= 0.4 * len(CHOICE)
    for quiz in QUIZZES.values():
        places = Counter(q["answer"] for q in quiz["questions"] if q["kind"] == "multiple_choice")
        assert len(places) == 4 and max(places.values()) <= 3, quiz["quiz"]


@pytest.mark.parametrize("pick", [max, min], ids=["longest", "shortest"])
def test_length_does_not_give_the_answer_away(pick):
    "Choosing by length alone, ties broken at random, is right at most 40% of the time."

    def credit(q):
        lengths = [len(c) for c in q["choices"]]
        extreme = pick(lengths)
        return (lengths[q["answer"]] == extreme) / lengths.count(extreme)

    assert sum(map(credit, CHOICE)) / len(CHOICE) <= 0.4


def test_every_numeric_question_has_a_formula():
    assert {q["id"] for q in NUMERIC} == set(FORMULAS)


@pytest.mark.parametrize("q", NUMERIC, ids=lambda q: q["id"])
def test_numeric_key(q):
    quoted, formula, mistakes = FORMULAS[q["id"]]
    missing = [f for f in quoted if not stands_in(q["question"], f)]
    assert not missing, f"figures not in the question: {missing}"
    figures = [figure(f) for f in quoted]
    assert q["answer"] == pytest.approx(formula(*figures), rel=1e-5)
    accepted = [m(*figures) for m in mistakes if close(m(*figures), q["answer"], q["tolerance"])]
    assert not accepted, f"a likely mistake passes: {accepted}"


def test_files_hold_one_question_a_line():
    for path in BENCHMARK.glob("*.json"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == (7 if path.name == "inference_test.json" else 12), path.name


def test_inference_questions():
    questions = json.loads((BENCHMARK / "inference_test.json").read_text(encoding="utf-8"))
    assert [q["domain"] for q in questions] == INFERENCE_DOMAINS
    assert all(set(q) == {"id", "domain", "question"} and q["question"].endswith("?") for q in questions)
    assert len({q["id"] for q in questions} | {q["id"] for q in QUESTIONS}) == len(questions) + len(QUESTIONS)

"""The corpus made from knowledge: the same for a seed, unique, tiered, valid; bad knowledge is named."""

import hashlib
import json
import re
import shutil
from collections import Counter, defaultdict

import jsonschema
import pytest
import yaml

from elson_nb.corpus.knowledge import KNOWLEDGE, KnowledgeError, evaluate, read_domain, read_knowledge
from elson_nb.corpus.records import FIELDS, TIERS, record_id
from elson_nb.corpus.synthesis import SHARES, apportion, build_records, write_corpus

MAIN = [
    "retirement_planning",
    "federal_income_tax",
    "accounting",
    "insurance",
    "estate_planning",
    "compliance",
    "investment",
    "tool_use",
]
INFERENCE = [
    "what is a 401(k) and how does it work",
    "difference between standard and itemized deductions",
    "what is a revocable living trust",
    "what is dollar-cost averaging",
    "fiduciary duty of an adviser",
    "fiduciary duty of a financial adviser",
]


@pytest.fixture(scope="module")
def records():
    return build_records(seed=42, scale=0.05)


def test_records_have_the_contract(records):
    for record in records:
        assert tuple(record) == FIELDS
        assert record["id"] == record_id(record["instruction"], record["input"], record["output"])
        assert record["difficulty"] in TIERS and record["meta"]["family"] and record["meta"]["seed"] == 42
    assert len({record["id"] for record in records}) == len(records)
    assert len({(record["instruction"], record["input"]) for record in records}) == len(records)


def test_files_are_the_same_bytes_and_another_seed_differs(tmp_path):
    counts = write_corpus(tmp_path / "a", seed=7)
    write_corpus(tmp_path / "b", seed=7)
    write_corpus(tmp_path / "c", seed=8)
    assert counts == {
        "final_training_data.json": 1175,
        "insurance_training_data.json": 500,
        "accounting_training_data.json": 250,
        "tool_use_training_data.json": 125,
    }
    for name, count in counts.items():
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b and hashlib.sha256(a).digest() != hashlib.sha256(c).digest()
        assert len(json.loads(a)) == count and a.endswith(b"]\n") and a.count(b"\n") == count + 2
    assert not list((tmp_path / "a").glob(".*"))


def test_every_main_domain_has_all_tiers_in_proportion(records):
    table = defaultdict(Counter)
    for record in records:
        table[record["domain"]][record["difficulty"]] += 1
    for domain in MAIN:
        total = sum(table[domain].values())
        for tier, share in SHARES.items():
            assert table[domain][tier] == pytest.approx(share * total, abs=3), (domain, tier)


def test_texts_are_of_the_asked_length_and_complete(records):
    assert 60 <= sum(len(r["instruction"]) for r in records) / len(records) <= 140
    assert 250 <= sum(len(r["output"]) for r in records) / len(records) <= 450
    for record in records:
        text = record["instruction"] + record["output"]
        assert not re.search(r"\$-|TODO|TBD|lorem|\bnan\b|\binf\b|<[a-z]+>", text), text
        assert len(text) < 1600
        assert not any(question in record["instruction"].lower() for question in INFERENCE)


def test_tool_calls_meet_their_schemas(records):
    tools = {
        tool["name"]: tool["parameters"]
        for tool in yaml.safe_load((KNOWLEDGE / "tool_use.yaml").read_text())["tools"]
    }
    assert len(tools) >= 8
    kinds = Counter()
    for record in (r for r in records if r["domain"] == "tool_use"):
        if record["output"].startswith("{"):
            for call in json.loads(record["output"])["tool_calls"]:
                jsonschema.validate(call["arguments"], tools[call["name"]])
                assert call["name"] + "(" in record["input"]
            kinds["call"] += 1
        else:
            kinds["none" if "No tool is needed" in record["output"] else "other"] += 1
    assert kinds["call"] > 30 and kinds["none"] >= 5 and kinds["other"] >= 5


def test_knowledge_is_substantial():
    knowledge = read_knowledge()
    for name in MAIN:
        assert len(knowledge[name].families) >= 5
        assert len(knowledge[name].cards) >= (10 if name != "tool_use" else 8)


@pytest.mark.parametrize(
    "old, new, part",
    [
        ("coinsurance_payment(", "coinsurance_paid(", "not a function"),
        ('phrasings:\n      - "A one-year', 'phrasing:\n      - "A one-year', "unknown key 'phrasing'"),
        ("after {days} days. What", "after some days. What", "does not tell 'days'"),
        ("tier: medium", "tier: middle", "use one of easy"),
        ("    definition: Insurable", "    meaning: Insurable", "unknown key 'meaning'"),
        ("{back:,.2f}", "{bakc:,.2f}", "bakc"),
    ],
)
def test_bad_knowledge_names_file_entry_and_mend(tmp_path, old, new, part):
    shutil.copy(KNOWLEDGE / "insurance.yaml", tmp_path)
    text = (tmp_path / "insurance.yaml").read_text()
    assert old in text
    (tmp_path / "insurance.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(KnowledgeError) as error:
        read_domain(tmp_path / "insurance.yaml")
    assert str(error.value).startswith("insurance.yaml") and part in str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_missing_tier_and_a_missing_domain_are_named(tmp_path):
    folder = tmp_path / "knowledge"
    shutil.copytree(KNOWLEDGE, folder)
    (folder / "gift_tax.yaml").unlink()
    with pytest.raises(KnowledgeError, match="gift_tax"):
        build_records(knowledge=folder)


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').getcwd()", "(1).__class__", "[x for x in (1,)]", "lambda: 1", "open('x')"],
)
def test_expressions_cannot_leave_arithmetic(expression):
    with pytest.raises(ValueError):
        evaluate(expression, {})


def test_apportion_is_exact_and_monotone():
    for total in range(0, 300, 7):
        assert sum(apportion(total, SHARES).values()) == total


def test_numbers_in_answers_come_back_from_an_independent_formula(records):
    rmd = [r for r in records if r["meta"]["family"] == "retirement_planning/rmd"]
    assert rmd
    for record in rmd:
        balance = record["meta"]["parameters"]["balance"]
        divisor, amount = re.search(r"/ ([\d.]+) = \$([\d,.]+),", record["output"]).groups()
        assert float(amount.replace(",", "")) == pytest.approx(balance / float(divisor), abs=0.006)


def test_at_full_scale_the_categories_are_those_of_the_reference():
    records = build_records(seed=1, scale=1.0)
    counts = Counter(record["category"] for record in records)
    assert len({record["id"] for record in records}) == len(records) == 40_993
    asked = {
        "financial_planning": 15_100,
        "insurance": 10_000,
        "accounting": 5_000,
        "tool_use": 2_500,
        "retirement_planning": 1_499,
        "estate_planning": 403,
        "securities_regulation": 388,
        "federal_income_tax": 381,
        "portfolio_construction": 369,
        "fintech": 319,
    }
    assert {name: counts[name] for name in asked} == asked
    assert all(not re.search(r"\$-|\bnan\b|\binf\b|-0\.00\b", record["output"]) for record in records)

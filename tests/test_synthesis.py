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
from elson_nb.corpus.questions import CHECK
from elson_nb.corpus.records import FIELDS, TIERS, record_id
from elson_nb.corpus.shares import apportion
from elson_nb.corpus.skeletons import skeleton, skeleton_id
from elson_nb.corpus.synthesis import SHARES, build_files, build_records, write_corpus
from elson_nb.corpus.taxonomy import high_risk_domains, load_taxonomy
from elson_nb.evaluation.benchmark import load_quiz, quiz_names
from elson_nb.evaluation.contamination import contamination

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


FILES = {
    "final_training_data.json": 23_493,
    "insurance_training_data.json": 10_000,
    "accounting_training_data.json": 5_000,
    "tool_use_training_data.json": 2_500,
}
CATEGORIES = {
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


@pytest.fixture(scope="module")
def built():
    return build_files(seed=42, scale=1.0)


@pytest.fixture(scope="module")
def records(built):
    return [record for file in built[0].values() for record in file]


def test_records_have_the_contract(records):
    for record in records:
        assert tuple(record) == FIELDS
        assert record["id"] == record_id(record["instruction"], record["input"], record["output"])
        assert record["difficulty"] in TIERS and record["meta"]["family"] and record["meta"]["seed"] == 42
    assert len({record["id"] for record in records}) == len(records)
    assert len({(record["instruction"], record["input"]) for record in records}) == len(records)


def test_files_are_the_same_bytes_and_another_seed_differs(tmp_path):
    files = write_corpus(tmp_path / "a", seed=7)
    write_corpus(tmp_path / "b", seed=7)
    write_corpus(tmp_path / "c", seed=8)
    counts = {name: len(records) for name, records in files.items()}
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


def test_files_and_categories_are_those_of_the_reference(built, records):
    assert {name: len(file) for name, file in built[0].items()} == FILES
    counts = Counter(record["category"] for record in records)
    assert {name: counts[name] for name in CATEGORIES} == CATEGORIES
    rest = [count for name, count in counts.items() if name not in CATEGORIES]
    assert sum(rest) == 40_993 - sum(CATEGORIES.values()) and max(rest) < CATEGORIES["fintech"]


def test_every_domain_of_the_taxonomy_has_all_tiers(records):
    table = defaultdict(Counter)
    for record in records:
        table[record["domain"]][record["difficulty"]] += 1
    assert set(table) == set(load_taxonomy()) and len(table) >= 80
    for domain, tiers in table.items():
        assert all(tiers[tier] >= 5 for tier in TIERS), (domain, tiers)
    for domain in high_risk_domains():
        assert tiers_above(table[domain]) >= 0.5 > tiers_above(table["financial_planning"]), domain
        assert table[domain]["extremely_complex"] >= 250


def tiers_above(tiers: Counter) -> float:
    return (tiers["hard"] + tiers["extremely_complex"]) / sum(tiers.values())


def test_texts_are_of_the_asked_length_and_complete(records):
    assert sum(len(r["instruction"]) for r in records) / len(records) == pytest.approx(87.7, rel=0.1)
    assert sum(len(r["output"]) for r in records) / len(records) == pytest.approx(343.2, rel=0.1)
    for record in records:
        text = record["instruction"] + record["output"]
        assert not re.search(r"\$-|TODO|TBD|lorem|\bnan\b|\binf\b|<[a-z]+>", text), text
        assert len(text) < 2000
        assert not any(question in record["instruction"].lower() for question in INFERENCE)


def test_harder_tiers_have_longer_answers(records):
    mean = {tier: [len(r["output"]) for r in records if r["difficulty"] == tier] for tier in TIERS}
    lengths = [sum(held) / len(held) for held in mean.values()]
    assert lengths == sorted(lengths)


def test_skeletons_are_many_and_none_is_common(records):
    counts = Counter(skeleton_id(skeleton(record)) for record in records)
    assert len(counts) >= 8_000
    assert counts.most_common(1)[0][1] <= 0.003 * len(records)


def test_the_core_file_is_merged_from_seven_sources(built):
    files, reports = built
    report = reports["final_training_data.json"]
    assert len(report["sources"]) == 7
    assert report["sources"].keys() == {record["source"] for record in files["final_training_data.json"]}
    assert report["total"]["kept"] == 23_493 == report["total"]["read"] - report["total"]["dropped"]


def test_augmented_records_name_a_parent_of_their_file(built):
    knowledge = read_knowledge()
    for name, file in built[0].items():
        by_id, seen = {record["id"]: record for record in file}, Counter()
        for record in (r for r in file if "parent" in r["meta"]):
            parent = by_id[record["meta"]["parent"]]
            seen[record["source"]] += 1
            assert parent["meta"]["parameters"] == record["meta"]["parameters"]
            assert "parent" not in parent["meta"] and parent["domain"] == record["domain"]
            step = TIERS.index(record["difficulty"]) - TIERS.index(parent["difficulty"])
            if record["source"] == "elson_paraphrase":
                assert (
                    step == 0 and record["output"] == parent["output"] and record["input"] == parent["input"]
                )
            else:
                assert (
                    step == 1
                    and record["output"].startswith("No. ")
                    and record["output"].endswith(parent["output"])
                )
                assert record["input"].startswith(parent["instruction"])
                assert any(record["instruction"].startswith(ask.split("{")[0]) for ask in CHECK)
        assert 0 < sum(seen.values()) < 0.13 * len(file), (name, seen)
    assert all(family.traps for family in knowledge["insurance"].families if family.tier == "easy")


def test_no_exam_question_is_in_the_corpus(records):
    exam = [question for name in quiz_names() for question in load_quiz(name)]
    found = contamination(exam, records)
    assert len(exam) == 431 and found["records"] == len(records) and found["copied"] == []


def test_tool_calls_meet_their_schemas(records):
    tools = {
        tool["name"]: tool["parameters"]
        for tool in yaml.safe_load((KNOWLEDGE / "tool_use.yaml").read_text())["tools"]
    }
    assert len(tools) >= 15
    kinds, calls = Counter(), Counter()
    for record in (r for r in records if r["domain"] == "tool_use"):
        if record["output"].startswith("{"):
            for call in json.loads(record["output"])["tool_calls"]:
                jsonschema.validate(call["arguments"], tools[call["name"]])
                assert call["name"] + "(" in record["input"]
                calls[call["name"]] += 1
            kinds["parallel" if len(json.loads(record["output"])["tool_calls"]) > 1 else "single"] += 1
        elif "family" in record["meta"] and "card" not in record["meta"]["family"]:
            kinds[re.split(r"/|_", record["meta"]["family"].split("/")[1])[0]] += 1
    assert set(calls) == set(tools)
    assert (
        kinds["single"] > 500 and kinds["parallel"] > 200 and kinds["no"] > 100 and kinds["missing"] > 50
    ), kinds
    later = [
        r
        for r in records
        if r["meta"]["family"] in ("tool_use/etf_top_second", "tool_use/value_from_results")
    ]
    assert later and all("openbb_" in r["instruction"] for r in later)


def test_knowledge_is_substantial():
    knowledge = read_knowledge()
    for name in MAIN:
        assert len(knowledge[name].families) >= 8
        assert len(knowledge[name].cards) >= (10 if name != "tool_use" else 8)
    for name, domain in knowledge.items():
        assert len(domain.cards) >= 8 and len(domain.families) >= 7 and len(domain.questions) >= 5, name
        for card in domain.cards:
            assert card.example and card.exception and card.advice and card.related, (name, card.term)
        for family in domain.families:
            assert len(family.phrasings) >= 3, (name, family.name)


@pytest.mark.parametrize(
    "old, new, part",
    [
        ("coinsurance_payment(", "coinsurance_paid(", "not a named computation"),
        (
            '    phrasings:\n      - "What do I pay',
            '    phrasing:\n      - "What do I pay',
            "unknown key 'phrasing'",
        ),
        ("cancelled after {days} days", "cancelled after some days", "does not tell 'days'"),
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


def test_what_a_person_adds_to_a_file_shows_in_the_corpus(tmp_path):
    folder = tmp_path / "knowledge"
    shutil.copytree(KNOWLEDGE, folder)
    data = yaml.safe_load((folder / "gift_tax.yaml").read_text(encoding="utf-8"))
    told = dict.fromkeys(("definition", "rule", "why", "mistake", "example", "exception", "advice"), "")
    card = {"term": "zebra clause", **{key: f"The zebra clause has a {key}." for key in told}, "related": []}
    family = {
        "name": "zebra_count",
        "tier": "easy",
        "parameters": {"n": {"low": 1, "high": 900, "step": 1, "unit": "zebras"}},
        "compute": {"legs": "n * 4"},
        "phrasings": ["How many legs have {n} zebras?"],
        "answer": "{n} x 4 = {legs}.",
    }
    data["cards"].append(card), data["families"].append(family)
    (folder / "gift_tax.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    files, _ = build_files(scale=1.0, knowledge=folder, domains=["gift_tax"])
    records = [record for file in files.values() for record in file]
    kinds = Counter(r["meta"]["family"].split("/")[1] for r in records if "zebra" in r["instruction"])
    assert kinds["card"] >= 6 and kinds["zebra_count"] >= 3

"The taxonomy file holds the domains that the specification names, each fit for the classifier to use."

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

TAXONOMY = Path(__file__).parents[1] / "elson_nb" / "taxonomy.yaml"
HIGH_RISK = {"compliance", "securities_regulation", "derivatives", "estate_planning"}
PARENTS = {
    "planning",
    "tax",
    "insurance",
    "accounting",
    "investment",
    "markets",
    "regulation",
    "banking",
    "corporate_finance",
    "technology",
    "tools",
    "general",
}
REQUIRED = """
accounting insurance life_insurance health_insurance disability_insurance long_term_care_insurance
property_insurance auto_insurance liability_insurance commercial_insurance reinsurance annuities
federal_income_tax state_income_tax estate_planning gift_tax trusts retirement_planning social_security
medicare compliance securities_regulation derivatives portfolio_construction fintech financial_planning
general_finance tool_use investment fixed_income equities etfs mutual_funds options futures real_estate
mortgages credit banking financial_ratios audit gaap ifrs cost_accounting corporate_tax payroll_tax
international_tax education_planning charitable_giving behavioural_finance risk_management esg
private_equity hedge_funds commodities foreign_exchange macroeconomics valuation mergers_acquisitions
capital_budgeting working_capital anti_money_laundering consumer_protection cryptocurrency payments
small_business bankruptcy divorce_planning budgeting debt_management emergency_funds employee_benefits
stock_compensation tax_loss_harvesting
""".split()


class UniqueKeyLoader(yaml.SafeLoader):
    "Refuses a mapping that names a key twice, which YAML would silently let the later one win."

    def construct_mapping(self, node, deep=False):
        keys = Counter(key.value for key, _ in node.value)
        twice = [key for key, n in keys.items() if n > 1]
        if twice:
            raise ValueError(f"named twice: {twice}")
        return super().construct_mapping(node, deep)


@pytest.fixture(scope="module")
def domains():
    return yaml.load(TAXONOMY.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)["domains"]


def test_enough_domains(domains):
    assert len(domains) >= 84


def test_required_names(domains):
    assert not set(REQUIRED) - set(domains)


def test_names_are_snake_case(domains):
    names = [*domains, *(a for d in domains.values() for a in d["aliases"])]
    assert not [name for name in names if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)]


def test_every_entry_is_complete(domains):
    fields = {"title", "parent", "risk", "description", "keywords", "aliases"}
    for name, d in domains.items():
        assert set(d) == fields, name
        assert d["parent"] in PARENTS and d["risk"] in ("normal", "high"), name
        assert d["title"].strip() and re.fullmatch(r"[A-Z].+\.", d["description"]), name
    assert len({d["title"] for d in domains.values()}) == len(domains)


def test_high_risk_set_is_exact(domains):
    assert {name for name, d in domains.items() if d["risk"] == "high"} == HIGH_RISK


def test_labels_name_one_domain(domains):
    labels = Counter([*domains, *(a for d in domains.values() for a in d["aliases"])])
    assert not [label for label, n in labels.items() if n > 1]


def test_keywords_are_lower_case_text(domains):
    for name, d in domains.items():
        assert 6 <= len(d["keywords"]) <= 14, name
        assert all(isinstance(k, str) and k and k == k.strip().lower() for k in d["keywords"]), name


def test_keywords_speak_for_one_domain(domains):
    claims = Counter(k for d in domains.values() for k in d["keywords"])
    assert not [keyword for keyword, n in claims.items() if n > 1]

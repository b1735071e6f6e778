"Buckets: two ways of reading that must agree, damage that must be seen, records that no label places."

import random
from pathlib import Path

import polars as pl
import pytest

from elson_nb.corpus import buckets
from elson_nb.corpus.buckets import (
    FOR_PLANNING,
    INDEX_SCHEMA,
    BucketError,
    build_buckets,
    load_index,
    read_lines,
    read_records,
    read_sources,
)
from elson_nb.corpus.records import FIELDS, estimate_tokens, make_record, read_jsonl, write_jsonl
from elson_nb.corpus.synthesis import build_records, write_corpus
from elson_nb.corpus.tables import Records, read_tables, table_of
from elson_nb.corpus.taxonomy import Assignment

TEXTS = [
    "Is 5 a prime?",
    "Yes.\n\n1. It is.\n2.  Twice.",
    "café",
    'a "b" \\c/',
    "tab\there",
    "🏦 ünï",
    "x\u2028y",
]
METAS = [{}, {"a": [1.5, None, True]}, {"n": 10**25, "x": 1e-7}, {"parent": "8e60", "s": "ü\n"}]


@pytest.fixture(scope="module")
def odd_records() -> list[dict]:
    "Some of the generated corpus, and records whose texts and metas are hard to write twice the same."
    rng = random.Random(3)
    odd = [
        make_record(
            rng.choice(TEXTS) + f" {n}",
            rng.choice(TEXTS),
            rng.choice(["", *TEXTS]),
            category=rng.choice(["insurance", "trusts"]),
            difficulty=rng.choice(["", "hard"]),
            source="odd",
            meta=rng.choice(METAS),
        )
        for n in range(300)
    ]
    return [*odd, *build_records(seed=1, scale=0.005)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_columns_and_readers_make_the_same_buckets(odd_records, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "ours.jsonl", odd_records)
    assert read_tables([tmp_path / "ours.jsonl"]) is not None
    first = build_buckets([tmp_path / "ours.jsonl"], tmp_path / "columns")
    monkeypatch.setattr(buckets, "read_tables", lambda sources: None)
    assert build_buckets([tmp_path / "ours.jsonl"], tmp_path / "rows") == first
    assert contents(tmp_path / "columns") == contents(tmp_path / "rows")
    back = read_records(tmp_path / "rows", load_index(tmp_path / "rows"))
    strip = lambda r: {k: v for k, v in r.items() if k not in ("domain", "difficulty")}
    key = lambda r: r["id"]
    assert sorted(map(strip, back), key=key) == sorted(map(strip, odd_records), key=key)


def test_the_generated_corpus_is_read_as_columns(tmp_path):
    write_corpus(tmp_path, seed=42, scale=0.01)
    table = read_tables([tmp_path])
    records, aside = read_sources([tmp_path])
    assert not aside and table.equals(table_of(records)) and list(Records(table)) == records


def test_a_file_changed_in_any_place_is_never_read_otherwise_than_by_the_readers(odd_records, tmp_path):
    "Either the columns see the change, or it makes no difference."
    rng, path = random.Random(5), tmp_path / "changed.jsonl"
    write_jsonl(path, odd_records[:40])
    whole, seen = path.read_bytes(), 0
    for _ in range(400):
        at, cut = rng.randrange(len(whole)), rng.randrange(3)
        junk = rng.choice(
            [b"", b" ", b'"', b"x", b"\\", b"{", b"}", b",", b"1e999", b"NaN", b"\\ud800", b"\xff", b"\n"]
        )
        path.write_bytes(whole[:at] + junk + whole[at + cut :])
        table = read_tables([path])
        if table is None:
            seen += 1
            continue
        records, aside = read_sources([path])
        assert not aside and list(Records(table)) == records, (at, cut, junk)
    assert seen > 300


def test_a_record_that_comes_twice_is_kept_once_and_named(odd_records, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", odd_records[:5])
    write_jsonl(tmp_path / "b.jsonl", odd_records[3:8])
    summary = build_buckets([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out")
    assert (summary["records"], summary["set_aside"]) == (8, 2)
    aside = list(read_jsonl(tmp_path / "out" / "quarantine.jsonl"))
    assert {line["reason"].rsplit("/", 1)[-1] for line in aside} == {"a.jsonl:4", "a.jsonl:5"}


def test_token_counts_agree_between_columns_and_records(odd_records, tmp_path):
    write_jsonl(tmp_path / "ours.jsonl", odd_records)
    counted = {}
    for name, count in {"rule": estimate_tokens, "record": lambda r: estimate_tokens(r)}.items():
        build_buckets([tmp_path / "ours.jsonl"], tmp_path / name, count)
        counted[name] = load_index(tmp_path / name).select("id", "n_tokens")
    assert counted["rule"].equals(counted["record"])


def test_records_without_a_label_are_classified_and_the_unsure_ones_listed(tmp_path):
    rows = [make_record(f"Question {n}?", "Answer.", source="plain") for n in range(6)]
    rows.append(make_record("Labelled?", "Yes.", category="insurance", source="plain"))
    write_jsonl(tmp_path / "plain.jsonl", rows)

    def classify(records):
        assert [tuple(r) for r in records] == [FIELDS] * 6  # whole records, and only those without a label
        sure = Assignment("trusts", 0.9, ("trustee",))
        unsure = Assignment("general_finance", 0.2, ("low confidence 0.20 for pensions", "annuity"))
        return [sure if r["instruction"] < "Question 4" else unsure for r in records]

    summary = build_buckets([tmp_path / "plain.jsonl"], tmp_path / "out", classify=classify)
    assert (summary["classified"], summary["low_confidence"]) == (6, 2)
    listed = list(read_jsonl(tmp_path / "out" / "low_confidence.jsonl"))
    assert {line["instruction"] for line in listed} == {"Question 4?", "Question 5?"}
    assert all("for pensions" in line["because"] and round(line["confidence"], 2) == 0.2 for line in listed)
    index = load_index(tmp_path / "out", list(INDEX_SCHEMA))
    assert sorted(index["domain"]) == ["general_finance"] * 2 + ["insurance"] + ["trusts"] * 4


@pytest.fixture
def built(odd_records, tmp_path) -> Path:
    write_jsonl(tmp_path / "ours.jsonl", odd_records[300:])
    build_buckets([tmp_path / "ours.jsonl"], tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("damage", ["missing", "cut", "another record", "no JSON"])
def test_a_damaged_bucket_is_an_error_and_never_another_record(built, damage):
    index = load_index(built)
    row = index[-1]
    path = buckets.bucket_path(built, row["domain"][0], row["tier"][0])
    line = path.read_bytes()[row["offset"][0] :]
    if damage == "missing":
        path.unlink()
    else:
        other = {"cut": line[:30], "another record": line.replace(row["id"][0].encode(), b"0" * 24)}
        path.write_bytes(path.read_bytes()[: row["offset"][0]] + other.get(damage, b"{]" + line))
    with pytest.raises(BucketError, match="build the buckets again"):
        read_lines(built, index)


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", None])
def test_a_damaged_index_is_an_error_with_the_mend(built, content):
    path = built / "index.parquet"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(BucketError, match="index.parquet is damaged.*build the buckets again"):
        load_index(built)


def test_an_index_of_another_make_is_an_error(built):
    pl.DataFrame({"id": ["a"], "domain": ["trusts"]}).write_parquet(built / "index.parquet")
    with pytest.raises(BucketError, match="build the buckets again"):
        load_index(built)


def test_an_index_has_what_planning_needs(built):
    index = load_index(built)
    assert tuple(index.columns) == FOR_PLANNING and index["id"].n_unique() == index.height
    assert load_index(built / "domain_buckets").equals(index)

"""The audit: nothing lost, nothing invented, whatever is in the file; clusters as pairs show them."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from elson_nb.cli.corpus import corpus_app
from elson_nb.corpus.audit import Limits, audit
from elson_nb.corpus.consolidation import import_corpus, merge, quarantine_path
from elson_nb.corpus.records import json_line, make_record, read_jsonl, write_jsonl
from elson_nb.corpus.skeletons import MASK, SIMILAR, Signatures, grams, mask
from elson_nb.corpus.synthesis import build_records
from elson_nb.corpus.tally import LABELS, OTHERS

fast = settings(derandomize=True, max_examples=40, deadline=None)
DEEP = 100_000  # brackets; deeper than any parser's stack


@pytest.fixture(scope="module")
def records():
    return build_records(seed=3, scale=0.12)


def broken(kind: str, record: dict, rng: random.Random) -> bytes:
    "One line of a file with a fault in it."
    line = json_line(record).encode()
    field = rng.choice(["instruction", "output"])
    if kind == "truncated":
        return line[: rng.randrange(1, len(line) - 2)] + b"\n"
    if kind == "not an object":
        return rng.choice([b"[1, 2]", b"17", b'"text"', b"null", b"true"]) + b"\n"
    if kind == "wrong type":
        return json_line(record | {field: rng.choice([{"a": 1}, {}, None, [], ""])}).encode()
    if kind == "encoding":
        at = line.index(b'"instruction": "') + 16
        return (
            line[:at]
            + rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", "é".encode("latin-1") + b"x"])
            + line[at:]
        )
    if kind == "control":
        code = rng.choice(["\\u0000", "\\u0007", "\\u001b", "\\u0085", "\\ud800", "\\udfff"]).encode()
        at = line.index(b'"output": "') + 11
        return line[:at] + code + line[at:]
    if kind == "no field":
        return json_line({key: value for key, value in record.items() if key != field}).encode()
    if kind == "deep":
        return b'{"instruction": "q", "output": ' + b"[" * DEEP + b"\n"
    if kind == "huge":
        return json_line(record | {field: "word " * rng.choice([3_000, 40_000])}).encode()
    raise ValueError(kind)


KINDS = ("truncated", "not an object", "wrong type", "encoding", "control", "no field")


@pytest.fixture(scope="module")
def mutated(records, tmp_path_factory):
    "10,000 lines, valid and broken; and by line what ought to become of it."
    rng = random.Random(20261121)
    fresh, lines, fate, used = iter(records), [], {}, []
    for number in range(1, 10_001):
        draw = rng.random()
        if draw < 0.4:
            record = next(fresh)
            used.append(record)
            fate[number] = ("kept", record["id"])
            line = json_line(record | {"id": rng.choice(used)["id"]}).encode()  # another record's id, or none
        elif draw < 0.5:
            record = rng.choice(used) if used else None
            fate[number] = ("duplicates", record["id"]) if record else ("schema", "")
            line = json_line(record).encode() if record else b"{}\n"
        elif draw < 0.51:
            fate[number], line = ("length", ""), broken("huge", rng.choice(records), rng)
        elif draw < 0.512:
            fate[number], line = ("schema", ""), broken("deep", records[0], rng)
        else:
            fate[number], line = ("schema", ""), broken(rng.choice(KINDS), rng.choice(records), rng)
        lines.append(line)
    path = tmp_path_factory.mktemp("fuzz") / "mutated.jsonl"
    path.write_bytes(b"".join(lines))
    return path, fate


def test_ten_thousand_mutated_lines_through_the_audit(mutated, tmp_path):
    path, fate = mutated
    result = audit([path], tmp_path)
    wanted = Counter(end for end, _ in fate.values())
    assert {key: result["total"][key] for key in wanted} == wanted
    assert result["total"]["read"] == 10_000 == sum(wanted.values())
    aside = {entry["line"]: entry for entry in read_jsonl(tmp_path / "quarantine.jsonl")}
    assert set(aside) == {line for line, (end, _) in fate.items() if end != "kept"}
    for line, entry in aside.items():
        assert entry["check"] == fate[line][0] and entry["file"] == str(path) and len(entry["reason"]) > 5, (
            entry
        )


def test_ten_thousand_mutated_lines_through_the_import(mutated, tmp_path):
    path, fate = mutated
    counts = import_corpus([path], tmp_path / "clean.jsonl")["total"]
    kept = [record["id"] for record in read_jsonl(tmp_path / "clean.jsonl")]
    valid = [name for end, name in fate.values() if end == "kept"]
    assert [name for name in kept if name in set(valid)] == valid  # each once, in order
    assert len(kept) - len(valid) <= sum(
        end == "length" for end, _ in fate.values()
    )  # a long record is a record
    assert counts["read"] == 10_000 == counts["kept"] + counts["duplicates"] + counts["quarantined"]
    assert all(entry["reason"] for entry in read_jsonl(quarantine_path(tmp_path / "clean.jsonl")))


def test_the_order_of_files_and_rows_does_not_matter(records, tmp_path):
    rows = records[:600] + records[:50]
    halves = rows[:300], rows[300:]
    for name, order in (("one", halves), ("two", halves[::-1])):
        for number, half in enumerate(order):
            (tmp_path / name).mkdir(exist_ok=True)
            random.Random(number).shuffle(half)
            write_jsonl(tmp_path / name / f"{number}.jsonl", half)
    one, two = (audit([tmp_path / name], tmp_path / f"{name}_audit") for name in ("one", "two"))
    assert one["total"] == two["total"] and one["total"]["duplicates"] == 50
    assert [record["id"] for record in one["page"]["records"]] == [
        record["id"] for record in two["page"]["records"]
    ]
    for key in ("categories", "lengths"):
        assert one[key] == two[key]
    assert one["skeletons"]["near_duplicate_share"] == two["skeletons"]["near_duplicate_share"]


def test_counts_agree_with_a_plain_loop(records, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", records)
    result = audit([tmp_path / "corpus.jsonl"], tmp_path / "audit")
    assert result["categories"] == dict(
        sorted(Counter(r["category"] for r in records).items(), key=lambda row: (-row[1], row[0]))
    )
    cells = Counter((r["domain"], r["difficulty"]) for r in records)
    assert all(result["domains"][domain][tier] == count for (domain, tier), count in cells.items())
    assert result["lengths"]["output"]["mean"] == pytest.approx(np.mean([len(r["output"]) for r in records]))
    skeletons = Counter(tuple([*mask(r["instruction"]), "|", *mask(r["output"])]) for r in records)
    assert result["skeletons"]["distinct"] == len(skeletons)
    assert [row["records"] for row in result["skeletons"]["commonest"][:3]] == [
        n for _, n in skeletons.most_common(3)
    ]


def test_near_duplicates_are_those_that_pairs_show(tmp_path):
    rng = random.Random(5)
    texts = [[f"w{rng.randrange(300)}" for _ in range(80)] for _ in range(40)]
    for original in list(texts):
        edited = list(original)
        for _ in range(rng.choice([0, 2, 2, 3, 20])):
            edited[rng.randrange(5, 75)] = f"x{rng.randrange(99)}"  # touches five grams: two give 0.77
        if rng.random() < 0.5:
            edited[-1] = "end"  # touches one
        texts.append(edited)
    (tmp_path / "s").mkdir()
    signatures = Signatures(tmp_path / "s")
    for text in texts:
        signatures.add(text)
    clusters = signatures.clusters()
    signatures.close()
    sets = [set(grams(text)) for text in texts]
    for a in range(len(texts)):
        for b in range(a):
            jaccard = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
            if abs(jaccard - SIMILAR) > 0.06:  # two standard errors of the estimate
                assert (clusters[a] == clusters[b]) == (jaccard > SIMILAR), (jaccard, a, b)


@fast
@given(st.text(), st.text())
def test_masking_never_fails_and_hides_every_digit(one, other):
    words = mask(f"{one} {other}")
    assert not any(word is not MASK and any(char.isdecimal() for char in word) for word in words)
    assert not any(a is MASK and b is MASK for a, b in zip(words, words[1:], strict=False))


pairs = st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz"))


@fast
@given(st.lists(pairs, max_size=12), st.lists(pairs, max_size=12))
def test_merging_is_idempotent_and_loses_no_pair(one, other):
    sources = {
        name: [make_record(q, a, source=name) for q, a in rows]
        for name, rows in (("one", one), ("other", other))
    }
    merged = merge(sources)
    assert {(r["instruction"], r["output"]) for r in merged.records} == {*one, *other}
    assert len({r["id"] for r in merged.records}) == len(merged.records)
    again = merge({"": merged.records})
    assert again.records == merged.records and not again.dropped
    back = merge({"": [*merged.records, *sources["other"], *sources["one"]]})
    assert back.records == merged.records  # what is known already adds nothing, not even provenance
    total = merged.report()["total"]
    assert total["read"] == len(one) + len(other) == total["kept"] + total["dropped"]
    for record in merged.records:
        held = {
            name
            for name, rows in (("one", one), ("other", other))
            if (record["instruction"], record["output"]) in rows
        }
        assert {record["source"], *record["meta"].get("also_in", [])} == held


def test_too_many_labels_are_counted_together_and_blamed_for_nothing(tmp_path):
    rows = [
        make_record(f"What is {n}?", f"It is {n}.", category=f"kind {n}", source="s") for n in range(3000)
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    result = audit([tmp_path / "corpus.jsonl"], tmp_path / "audit")
    assert len(result["categories"]) == LABELS and sum(result["categories"].values()) == 3000
    assert result["categories"][OTHERS] == 3000 - (LABELS - 1)
    assert result["checks"][4]["verdict"] == "PASS" and result["checks"][4]["number"] < 0.001


def test_a_strict_limit_fails_and_a_wide_one_passes(records, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", records[:500])
    for limit, verdict in ((0.01, "FAIL"), (1.0, "PASS")):
        result = audit([tmp_path / "corpus.jsonl"], tmp_path / "audit", Limits(category_share=limit))
        assert next(row for row in result["checks"] if row["check"] == "balance")["verdict"] == verdict


def test_nothing_is_left_behind_when_a_source_cannot_be_read(tmp_path):
    (tmp_path / "cut.json").write_text('[{"instruction": "What is a bond?", "output": "A lo')
    with pytest.raises(ValueError, match="cut short"):
        audit([tmp_path / "cut.json"], tmp_path / "audit")
    assert list(Path(tmp_path / "audit").iterdir()) == []


def test_the_report_of_a_hostile_corpus_shows_text_and_no_markup(tmp_path):
    from elson_nb.session.audit_report import execute_report

    nasty = "<script>alert('x')</script> $\\alpha$ <img src=x onerror=alert(1)>"
    rows = [make_record(f"{nasty} {n}", f"{nasty} {nasty}", category=nasty, source=nasty) for n in range(20)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    (tmp_path / "corpus.jsonl").write_text((tmp_path / "corpus.jsonl").read_text() + f"{nasty}\n")
    audit([tmp_path / "corpus.jsonl"], tmp_path / "audit")
    notebook = json.loads(execute_report(tmp_path / "audit").read_text())
    shown = [
        "".join(output.get("data", {}).get("text/html", ""))
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
    ]
    assert sum("&lt;script&gt;" in text for text in shown) >= 3
    assert not any("<script" in text or "<img src=x" in text for text in shown)


def elson(*words: object) -> Result:
    return CliRunner().invoke(corpus_app, [str(word) for word in words])


def test_exit_codes_of_the_command(records, tmp_path):
    write_jsonl(tmp_path / "twice.jsonl", records[:30] + records[:5])
    loose = elson("audit", tmp_path / "twice.jsonl", "--out", tmp_path / "audit", "--no-report", "--json")
    assert loose.exit_code == 0 and json.loads(loose.stdout)["total"]["duplicates"] == 5
    strict = elson("audit", tmp_path / "twice.jsonl", "--out", tmp_path / "audit", "--no-report", "--strict")
    assert strict.exit_code == 1 and "exact duplicates" in strict.stderr
    missing = elson("audit", tmp_path / "none.jsonl", "--out", tmp_path / "audit", "--no-report")
    assert missing.exit_code == 2 and "none.jsonl" in missing.stderr


def test_merging_by_the_command_twice_gives_the_same_bytes(records, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", (record | {"source": "a"} for record in records[:40]))
    write_jsonl(tmp_path / "b.jsonl", (record | {"source": "b"} for record in records[30:60]))
    first = elson(
        "merge", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "one.jsonl", "--json"
    )
    assert first.exit_code == 0
    assert json.loads(first.stdout)["total"] == {"read": 70, "kept": 60, "dropped": 10, "quarantined": 0}
    again = elson("merge", tmp_path / "one.jsonl", tmp_path / "a.jsonl", "--out", tmp_path / "two.jsonl")
    assert again.exit_code == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    report = json.loads((tmp_path / "one.merge_report.json").read_text())
    assert {row["source"] for row in report["dropped"]} == {"b"} and len(report["dropped"]) == 10
    shared = [r for r in read_jsonl(tmp_path / "one.jsonl") if r["meta"].get("also_in") == ["b"]]
    assert len(shared) == 10 and all(r["source"] == "a" for r in shared)

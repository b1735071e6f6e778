"""Records and readers: every format in, every bad row out with its place, and counts that come out even."""

import csv
import json
import random
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elson_nb.corpus import readers, records
from elson_nb.corpus.consolidation import import_corpus, quarantine_path
from elson_nb.corpus.fields import as_text
from elson_nb.corpus.readers import BadSource, Quarantined, Row, read_source
from elson_nb.corpus.records import (
    FIELDS,
    BadRecord,
    atomic_text,
    make_record,
    read_jsonl,
    record_id,
    write_jsonl,
)

PAIRS = [
    ("What is a bond?", 'A loan,\nin "lines".'),
    ("Was ist Eigenkapital?", "Überschuss – 100 €"),
    ("¿Qué? 🏦", "Sí"),
]
ALPACA = [{"instruction": question, "input": "", "output": answer} for question, answer in PAIRS]
TATQA = {"instruction": "questions[].question", "output": "questions[].answer", "input": "paragraphs[].text"}


def pairs_of(path: Path, **options) -> list[tuple[str, str]]:
    items = list(read_source(path, **options))
    assert all(isinstance(item, Row) for item in items), items
    return [(item.record["instruction"], item.record["output"]) for item in items]


def lost(path: Path, **options) -> list[tuple[int, str]]:
    return [
        (item.line, item.reason) for item in read_source(path, **options) if isinstance(item, Quarantined)
    ]


def put(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# ---- formats


def write_csv(path: Path, encoding: str = "utf-8-sig", delimiter: str = ",") -> Path:
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("Question", "Answer"), *PAIRS])
    return path


def chat(question: str, answer: str, role: str, text: str, names: tuple[str, str]) -> list[dict]:
    return [{role: names[0], text: question}, {role: names[1], text: answer}]


FORMATS = {
    "array.json": ALPACA,
    "one_list.json": {"version": 2, "data": ALPACA},
    "lines.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ALPACA),
    "bom.jsonl": b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ALPACA)).encode(),
    "lines_named.json": "\n\n".join(map(json.dumps, ALPACA)),
    "array_named.jsonl": json.dumps(ALPACA, indent=1),
    "array_by_line.jsonl": "[" + ",\n".join(map(json.dumps, ALPACA)) + "]",
    "capitals.json": [{"PROMPT": question, "Completion": answer} for question, answer in PAIRS],
    "query.json": [{"query": question, "target": answer} for question, answer in PAIRS],
    "chatml.jsonl": "\n".join(
        json.dumps({"messages": chat(*pair, "role", "content", ("user", "assistant"))}) for pair in PAIRS
    ),
    "sharegpt.json": [{"conversations": chat(*pair, "from", "value", ("human", "gpt"))} for pair in PAIRS],
    "agents.json": [{"Conversations": chat(*pair, "from", "value", ("human", "agent"))} for pair in PAIRS],
}


@pytest.mark.parametrize("name", FORMATS)
def test_text_formats_give_the_same_pairs(tmp_path, name):
    assert pairs_of(put(tmp_path / name, FORMATS[name])) == PAIRS


@pytest.mark.parametrize(
    ("name", "encoding", "delimiter"),
    [
        ("bom.csv", "utf-8-sig", ","),
        ("plain.csv", "utf-8", ","),
        ("semi.csv", "utf-8-sig", ";"),
        ("a.tsv", "utf-8", "\t"),
    ],
)
def test_csv_with_mark_and_fields_over_lines(tmp_path, name, encoding, delimiter):
    path = write_csv(tmp_path / name, encoding, delimiter)
    assert pairs_of(path) == PAIRS
    assert [item.line for item in read_source(path)] == [2, 4, 5], "the line on which a row starts"
    assert pairs_of(path, mapping={"instruction": "Question", "output": "Answer"}) == PAIRS


def test_parquet(tmp_path):
    pq.write_table(
        pa.Table.from_pylist([row | {"page": 7, "share": float("nan")} for row in ALPACA]),
        tmp_path / "a.parquet",
    )
    assert pairs_of(tmp_path / "a.parquet") == PAIRS
    assert next(read_source(tmp_path / "a.parquet")).record["meta"] == {"page": 7}


def test_saved_dataset_and_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ALPACA)
    data.save_to_disk(str(tmp_path / "plain"))
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "both"))
    assert pairs_of(tmp_path / "plain") == PAIRS
    items = list(read_source(tmp_path / "both"))
    assert [(Path(item.file).name, item.line) for item in items] == [
        ("test", 1),
        ("train", 1),
        ("train", 2),
        ("train", 3),
    ]
    assert {item.record["source"] for item in items} == {"both"}


def test_folder_of_everything(tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "deeper").mkdir()
    for name in ("array.json", "lines.jsonl", "chatml.jsonl"):
        put(folder / name, FORMATS[name])
    write_csv(folder / "deeper" / "sheet.csv")
    put(folder / "LICENSE", "MIT")
    put(folder / ".hidden.json", "junk")
    put(folder / "old.quarantine.jsonl", GOOD)
    assert pairs_of(folder) == PAIRS * 4
    result = import_corpus([folder], folder / "corpus.jsonl")
    assert result["total"] == {"read": 12, "kept": 3, "duplicates": 9, "quarantined": 0}
    assert result["left_alone"] == [str(folder / "LICENSE"), str(folder / "old.quarantine.jsonl")]
    again = import_corpus([folder], folder / "corpus.jsonl")
    assert again["total"] == result["total"], "what an import wrote into a folder is no source of the next"


def test_single_object_and_suffixless_file(tmp_path):
    assert pairs_of(put(tmp_path / "one.json", json.dumps(ALPACA[0], indent=2))) == PAIRS[:1]
    assert pairs_of(put(tmp_path / "export", json.dumps(ALPACA))) == PAIRS


def test_long_conversation_becomes_input_and_meta(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "What is a bond?"),
        ("assistant", "A loan."),
        ("user", "To whom?"),
        ("assistant", "To its issuer."),
        ("user", "Thanks"),
    ]
    row = {"id": "c1", "messages": [{"role": role, "content": text} for role, text in turns]}
    record = next(read_source(put(tmp_path / "c.json", [row]))).record
    assert (record["instruction"], record["output"]) == ("To whom?", "To its issuer.")
    assert record["input"] == "User: What is a bond?\nAssistant: A loan."
    assert record["meta"] == {"source_id": "c1", "system": "Be brief.", "turns_left_out": 1}


# ---- mappings


def test_nested_mapping(tmp_path):
    report = {
        "table": {"rows": [["", "2019"], ["Sales", 1e-5]]},
        "paragraphs": [{"text": "one"}, {"text": "two"}],
        "questions": [
            {"question": "q1", "answer": -12.6, "scale": "million"},
            {"question": "q2", "answer": ["a", "b"]},
            {"question": "q3", "answer": True},
            {"question": "q4", "answer": None},
        ],
    }
    path = put(tmp_path / "r.json", [report])
    rows = [item for item in read_source(path, TATQA) if isinstance(item, Row)]
    assert [row.record["output"] for row in rows] == ["-12.6", "a; b", "yes"]
    assert {row.record["input"] for row in rows} == {"one\ntwo"}
    assert rows[0].record["meta"] == {"scale": "million"} and rows[1].record["meta"] == {}
    assert lost(path, mapping=TATQA) == [(1, "output is empty")]
    table = next(read_source(path, TATQA | {"input": "table.rows"})).record["input"]
    assert table == "| 2019\nSales | 0.00001"


def test_two_lists_deep_and_a_broken_branch(tmp_path):
    row = {
        "data": [
            {"title": "T1", "qas": [{"q": "a", "a": "1"}, {"q": "b", "a": "2"}]},
            {"title": "T2"},
            {"title": "T3", "qas": [{"q": "c", "a": "3"}]},
        ]
    }
    mapping = {"instruction": "data[].qas[].q", "output": "data[].qas[].a", "input": "data[].title"}
    path = put(tmp_path / "deep.jsonl", json.dumps(row) + "\n")
    found = [item.record for item in read_source(path, mapping) if isinstance(item, Row)]
    assert [(record["instruction"], record["input"], record["output"]) for record in found] == [
        ("a", "T1", "1"),
        ("b", "T1", "2"),
        ("c", "T3", "3"),
    ]
    assert lost(path, mapping=mapping) == [(1, "nothing to read in qas[]: it is missing")]


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"instructions": "Question"}, r"s\.csv: no record field 'instructions'.*did you mean instruction\?"),
        (
            {"instruction": "Qestion"},
            r"s\.csv: no row has 'Qestion', the path for instruction; did you mean Question\?",
        ),
        ({"output": ""}, r"s\.csv: the path for output is ''"),
    ],
)
def test_a_mapping_that_does_not_fit_is_named(tmp_path, mapping, said):
    path = write_csv(tmp_path / "s.csv")
    with pytest.raises(BadSource, match=said):
        list(read_source(path, mapping))
    with pytest.raises(BadSource):
        import_corpus([path], tmp_path / "out.jsonl", mapping)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["s.csv"], "nothing is written"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (0, "0"),
        (1e-5, "0.00001"),
        (2.5e16, "25000000000000000"),
        (False, "no"),
        ([1, None, "x"], "1; x"),
        ([[1, 2], [3, ""]], "1 | 2\n3 | "),
        ("  a ", "  a "),
    ],
)
def test_values_as_text(value, text):
    assert as_text(value) == text


# ---- bad input

GOOD = b'{"instruction": "q", "output": "a"}'
BAD_LINES = {
    b"not json": "not JSON",
    b'{"instruction": "q", "output": "a"': "not JSON",
    b'"text"': "not an object but str",
    b"[1, 2]": "not an object but list",
    b"null": "not an object but NoneType",
    b'{"instruction": "q", "output": "\\ud800"}': "lone surrogate",
    b'{"instruction": "q", "output": "  "}': "output is empty",
    b'{"instruction": null, "output": "a"}': "instruction is empty",
    b'{"instruction": "q"}': "no output",
    b'{"instruction": "q", "output": {"a": 1}}': "output is not text but dict",
    b'{"instruction": "q", "output": "a\\u0000"}': "control character U+0000",
    b"\x00\x01\xff\xfe\x80junk": "not UTF-8",
    b'{"instruction": "caf\xe9", "output": "a"}': "not UTF-8",
    b'{"messages": [{"role": "user", "content": "q"}]}': "no user turn",
    b'{"messages": [{"role": "boss", "content": "q"}]}': "role boss",
    b'{"messages": ["hi"]}': "turn 1",
    b'{"instruction": ' + b"[" * 100_000: "not JSON",
    b'{"instruction": "q", "output": ' + b"[" * 800 + b"]" * 800 + b"}": "recursion",
    b'{"\\ud800": "q", "messages": [{"role": "\\udfff", "content": "q"}]}': "role",
}


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.items(), ids=lambda value: str(value)[:40])
def test_a_bad_line_is_set_aside_alone(tmp_path, bad, reason):
    path = put(tmp_path / "mixed.jsonl", b"\n".join([bad, GOOD, bad, b""]))
    found = lost(path)
    assert [line for line, _ in found] == [1, 3] and all(reason in said for _, said in found), found
    result = import_corpus([path], tmp_path / "out.jsonl")
    assert result["files"][str(path)] == {"read": 3, "kept": 1, "duplicates": 0, "quarantined": 2}
    aside = list(read_jsonl(quarantine_path(tmp_path / "out.jsonl")))
    assert [tuple(entry) for entry in aside] == [("file", "line", "reason", "text")] * 2
    assert all(0 < len(entry["text"]) <= 2000 for entry in aside)


def test_bytes_that_are_not_utf8_cost_one_row(tmp_path):
    array = put(
        tmp_path / "a.json", b'[{"question": "caf\xe9", "answer": "a"}, {"question": "q", "answer": "a"}]'
    )
    sheet = put(tmp_path / "a.csv", b"Question,Answer\ncaf\xe9,a\nq,a\n")
    assert [line for line, _ in lost(array)] == [1] and [line for line, _ in lost(sheet)] == [2]
    assert import_corpus([array, sheet], tmp_path / "o.jsonl")["total"]["quarantined"] == 2


def test_csv_rows_that_do_not_fit(tmp_path):
    text = '\nQuestion,Answer\nq1,a1\nWhat, if any?,a2\nq3\n"q4" x,a4\nq5,a5,\nq6,"open\nq7,a7\n'
    path = put(tmp_path / "s.csv", text)
    assert [line for line, _ in lost(path)] == [4, 5, 6, 8]
    assert "in the 2 lines from here" in lost(path)[-1][1]
    kept = [item.record["instruction"] for item in read_source(path) if isinstance(item, Row)]
    assert kept == ["q1", "q5"]
    long = put(tmp_path / "long.csv", "Question,Answer\nq," + "x" * 200_000 + "\n")
    assert len(pairs_of(long)[0][1]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.json", json.dumps(ALPACA)[:-30], r"cut\.json: not JSON: .*char \d+.*cut short"),
        ("junk.json", b"\x00\x01\x02\xff", r"junk\.json: not JSON"),
        ("two.json", {"train": ALPACA, "test": ALPACA}, r"two\.json: an object with 2 lists \(train, test\)"),
        ("number.json", 7, r"number\.json: holds int"),
        ("table.parquet", b"PAR1 no table", r"table\.parquet: a table that cannot be read"),
        ("wide.csv", "Question,Answer\nq,a\n".encode("utf-16"), r"wide\.csv: is UTF-16"),
        ("head.csv", '"Question,Answer\nq,a\n', r"head\.csv: no header"),
        ("notes.txt", "hello", r"notes\.txt: not a kind that can be read"),
        (
            "wrong.csv",
            "Frage,Antwort\nq,a\n",
            r"nothing to keep in .*wrong\.csv; first reason: .*wrong\.csv:2: no instruction",
        ),
        ("empty.jsonl", b"", r"nothing to keep in .*empty\.jsonl; first reason: no rows"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(tmp_path, name, content, said):
    with pytest.raises(BadSource, match=said):
        import_corpus([put(tmp_path / name, content)], tmp_path / "out" / "corpus.jsonl")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(BadSource, match="no such file: .*none.json"):
        import_corpus([tmp_path / "none.json"], tmp_path / "out.jsonl")
    with pytest.raises(BadSource, match="nothing in this folder"):
        read_source(tmp_path)


def test_a_failed_import_leaves_the_old_files(tmp_path):
    good, bad, out = (
        put(tmp_path / "g.jsonl", GOOD),
        put(tmp_path / "b.json", '[{"instruction"'),
        tmp_path / "out.jsonl",
    )
    import_corpus([good], out)
    before = out.read_bytes(), quarantine_path(out).read_bytes()
    with pytest.raises(BadSource):
        import_corpus([good, bad], out)
    assert (out.read_bytes(), quarantine_path(out).read_bytes()) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---- the import as a whole

text = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(str.strip)
good_line = st.tuples(text, text).map(
    lambda pair: json.dumps({"instruction": pair[0], "output": pair[1]}, ensure_ascii=False).encode()
)
junk_line = st.binary(min_size=1, max_size=12).map(lambda junk: b"!" + junk.replace(b"\n", b""))
bad_line = st.sampled_from(list(BAD_LINES)) | junk_line
any_line = (
    st.tuples(good_line, st.just(True)) | st.tuples(bad_line, st.just(False)) | st.just((b"", None))
)  # a blank line is no row


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(any_line, max_size=12))
def test_every_good_line_is_kept_and_every_bad_one_has_its_number(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("mixed")
    path = put(folder / "mixed.jsonl", b"\n".join(line for line, _ in [*lines, (GOOD, True)]))
    ids, firsts, twins = {}, [], []
    for number, (line, good) in enumerate([*lines, (GOOD, True)], 1):
        if good:
            row = json.loads(line)
            name = record_id(row["instruction"], "", row["output"])
            (twins if name in ids else firsts).append(number)
            ids.setdefault(name, number)
    bad = [number for number, (_, good) in enumerate(lines, 1) if good is False]
    result = import_corpus([path], folder / "out.jsonl")
    aside = list(read_jsonl(quarantine_path(folder / "out.jsonl")))
    assert [record["id"] for record in read_jsonl(folder / "out.jsonl")] == list(ids)
    assert sorted(entry["line"] for entry in aside if entry["reason"].startswith("duplicate of ")) == twins
    assert sorted(entry["line"] for entry in aside if not entry["reason"].startswith("duplicate of ")) == bad
    assert result["total"] == {
        "read": len(firsts) + len(twins) + len(bad),
        "kept": len(firsts),
        "duplicates": len(twins),
        "quarantined": len(bad),
    }


def test_same_bytes_twice_and_records_read_again_are_the_same(tmp_path):
    for name in ("array.json", "sharegpt.json", "lines.jsonl"):
        put(tmp_path / name, FORMATS[name])
    put(
        tmp_path / "more.jsonl",
        GOOD + b"\nbad\n" + b'{"id": 5, "instruction": "q2", "output": "a", "difficulty": "spicy"}',
    )
    sources = sorted(path for path in tmp_path.iterdir() if path.suffix in (".json", ".jsonl"))
    outs = [tmp_path / "one" / "c.jsonl", tmp_path / "two" / "c.jsonl"]
    for out in outs:
        import_corpus(sources, out)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert quarantine_path(outs[0]).read_bytes() == quarantine_path(outs[1]).read_bytes()
    import_corpus([outs[0]], tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == outs[0].read_bytes(), "a corpus of ours reads as itself"


def test_duplicates_are_listed_with_the_first_place(tmp_path):
    first, second = (
        put(tmp_path / "a.json", ALPACA),
        put(tmp_path / "b.json", [ALPACA[1], {**ALPACA[0], "input": "x"}]),
    )
    result = import_corpus([first, second], tmp_path / "out.jsonl")
    assert result["files"][str(second)] == {"read": 2, "kept": 1, "duplicates": 1, "quarantined": 0}
    [entry] = read_jsonl(quarantine_path(tmp_path / "out.jsonl"))
    assert (entry["file"], entry["line"], entry["reason"]) == (str(second), 1, f"duplicate of {first}:2")


def test_labels_of_a_record_and_what_the_caller_says(tmp_path):
    row = {
        "id": 9,
        "Question": "q",
        "Answer": "a",
        "category": "tax",
        "source": "IRS",
        "difficulty": "Expert",
        "page": 3,
        "long": "x" * 201,
    }
    path = put(tmp_path / "s.json", [row])
    record = next(read_source(path)).record
    assert tuple(record) == FIELDS and (record["category"], record["source"]) == ("tax", "IRS")
    assert record["difficulty"] == "extremely_complex" and record["meta"] == {"source_id": 9, "page": 3}
    assert next(read_source(path, category="insurance")).record["category"] == "insurance"
    assert make_record("q", "a", difficulty="Spicy")["meta"] == {"difficulty_given": "Spicy"}
    mapped = next(read_source(path, {"id": "page", "domain": "source"})).record
    assert mapped["meta"]["source_id"] == "3" and mapped["domain"] == "IRS"


def test_progress_is_called_every_thousand_rows(tmp_path):
    path = put(tmp_path / "s.json", [{"question": f"q{number}", "answer": "a"} for number in range(2500)])
    calls = []
    import_corpus([path], tmp_path / "out.jsonl", progress=calls.append)
    assert calls == [1000, 2000]


# ---- records


@given(st.lists(text, min_size=3, max_size=3), st.sampled_from([" ", "\n", "\t ", "\u00a0", "\r\n\r\n"]))
def test_id_does_not_see_white_space_or_unicode_form(texts, space):
    changed = [space + unicodedata.normalize("NFD", text).replace(" ", space) + space for text in texts]
    assert record_id(*texts) == record_id(*changed)
    assert make_record(texts[0], texts[2], texts[1])["id"] == record_id(*texts)


def test_id_is_what_it_always_was():
    assert record_id("What is a bond?", "", "A loan.") == "c5ffdce37d9ffd51f837fdcc"
    assert (
        len(
            {
                record_id("a b", "", "c"),
                record_id("a", "b", "c"),
                record_id("a", "", "b c"),
                record_id("ab", "", "c"),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"output": " \n"}, "output is empty"),
        ({"output": None}, "output is missing"),
        ({"instruction": 3}, "instruction is not text but int"),
        ({"input": "\udc80"}, r"input has a lone surrogate \\udc80"),
        ({"category": "a\x07"}, "category has the control character U\\+0007"),
        ({"meta": [1]}, "meta is not a mapping"),
        ({"meta": {"x": {1}}}, "meta cannot be written as JSON"),
        ({"meta": {"x": "\ud800"}}, "meta cannot be written as JSON"),
    ],
)
def test_bad_records_say_why(fields, reason):
    with pytest.raises(BadRecord, match=reason):
        make_record(**{"instruction": "q", "output": "a", **fields})


@given(st.lists(st.tuples(text, text), max_size=5))
def test_jsonl_round_trip(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("jsonl") / "r.jsonl"
    made = [make_record(question, answer, meta={"n": 1.5}) for question, answer in pairs]
    assert write_jsonl(path, iter(made)) == len(made)
    assert list(read_jsonl(path)) == made and path.read_bytes().count(b"\n") == len(made)


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = put(tmp_path / "r.jsonl", "old")
    with pytest.raises(UnicodeEncodeError):
        write_jsonl(path, [{"a": 1}, {"a": "\ud800"}])
    synced = []
    monkeypatch.setattr(records.os, "fsync", lambda number: synced.append(path.read_text()))
    with atomic_text(path) as file:
        file.write("new")
    assert synced == ["old"], "flushed to the disk before the name changes"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_records_of_ours_are_read_the_same_by_the_short_way(tmp_path, monkeypatch):
    "Records as written, and with one field changed by hand, against the way that every other row goes."
    rng = random.Random(1)
    texts = [
        "Is 5 a prime?",
        "Yes.\n\n1. It is.\n2.  Twice.",
        "caf\u00e9",
        "cafe\u0301",
        "a  b",
        "tab\there",
        "\u2003x",
    ]
    labels = ["", "insurance", "Expert", " hard ", "hard", "\u0000", 5, None]
    metas = [
        {},
        {"a": [1.5, None]},
        {"n": 10**25},
        {"x": float("nan")},
        {"s": "\ud800"},
        [],
        {"parent": "8e60"},
    ]
    lines = []
    for _ in range(3000):
        record = make_record(
            rng.choice(texts),
            rng.choice(texts),
            rng.choice(["", *texts]),
            source="ours",
            meta=rng.choice([{}, {"k": 1}]),
        )
        if rng.random() < 0.7:
            field = rng.choice(FIELDS)
            record[field] = rng.choice(metas if field == "meta" else [*labels, *texts])
        lines.append(json.dumps(dict(rng.sample(list(record.items()), 9)) if rng.random() < 0.1 else record))
    put(tmp_path / "rows.jsonl", "".join(line + "\n" for line in lines).encode())
    short = [str(item) for item in read_source(tmp_path / "rows.jsonl")]
    whole = sum(readers.is_whole(json.loads(line)) for line in lines)
    monkeypatch.setattr(readers, "is_whole", lambda row: False)
    assert short == [str(item) for item in read_source(tmp_path / "rows.jsonl")]
    assert 500 < whole < 2500

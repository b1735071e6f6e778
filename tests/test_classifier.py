"""The classifier: no leak between folds, the same bytes every time, damage is refused, domains are found."""

import json
import random
import struct
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elson_nb.corpus import classifier as module
from elson_nb.corpus.classifier import (
    LOW_CONFIDENCE,
    DomainClassifier,
    default_classifier,
    family_of,
    fit_temperature,
    grouped_folds,
    record_weights,
    template_groups,
    terms_of,
    text_of,
    train_classifier,
    training_records,
)
from elson_nb.corpus.records import make_record, read_jsonl
from elson_nb.corpus.skeletons import skeleton, skeleton_id
from elson_nb.corpus.synthesis import build_records
from elson_nb.corpus.taxonomy import GENERAL, classify_text, load_taxonomy

fast = settings(derandomize=True, max_examples=60, deadline=None)
QUESTIONS = Path(__file__).parent / "data" / "labelled_questions.jsonl"
REAL_FLOOR = (
    0.5  # share of the real questions that a classifier trained on a fifth of the corpus must get right
)


@pytest.fixture(scope="module")
def corpus():
    return build_records(seed=42, scale=0.2)


@pytest.fixture(scope="module")
def split(corpus):
    return next(grouped_folds(corpus))


@pytest.fixture(scope="module")
def trained(corpus, split):
    return train_classifier([corpus[at] for at in split[0]])


@pytest.fixture(scope="module")
def questions():
    return list(read_jsonl(QUESTIONS))


@pytest.fixture(scope="module")
def small(corpus):
    return corpus[:200]


def ask(text: str) -> dict:
    return {"instruction": text, "input": "", "output": ""}


# groups and folds


records_of_few_marks = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.one_of(st.none(), st.integers(0, 30))), max_size=30
)


def marked(marks: list) -> list[dict]:
    "Records whose families, skeletons and parents are drawn."
    words = ("duty", "yield", "levy", "claim", "lease", "trust", "wage")
    return [
        {
            "id": f"r{at}",
            "domain": ("pensions", "trusts", "banking")[family % 3],
            "instruction": f"what of the {words[skeleton_]} of {at}?",
            "output": "it is 5.",
            "meta": {"family": f"f/{family}"} | ({"parent": f"r{parent}"} if parent is not None else {}),
        }
        for at, (family, skeleton_, parent) in enumerate(marks)
    ]


def marks_of(record: dict) -> set:
    found = {("family", family_of(record)), ("skeleton", skeleton_id(skeleton(record))), ("id", record["id"])}
    parent = record["meta"].get("parent")
    return found | ({("id", parent)} if parent else set())


@fast
@given(records_of_few_marks)
def test_groups_are_the_connected_components(marks):
    "Against a reference that spreads from record to record."
    records = marked(marks)
    groups = template_groups(records)
    unseen, number = set(range(len(records))), {}
    while unseen:
        component, edge = set(), {min(unseen)}
        while edge:
            component |= edge
            reach = set().union(*(marks_of(records[at]) for at in edge))
            edge = {at for at in unseen - component if marks_of(records[at]) & reach}
        unseen -= component
        number |= dict.fromkeys(component, min(component))
    assert list(groups) == [number[at] for at in range(len(records))]


@fast
@given(records_of_few_marks, st.integers(2, 6), st.integers(0, 3))
def test_no_mark_stands_on_both_sides(marks, folds, seed):
    records = marked(marks)
    seen = []
    for train, test in grouped_folds(records, folds, seed):
        sides = [set().union(*(marks_of(records[at]) for at in side)) for side in (train, test)]
        assert not sides[0] & sides[1]
        assert sorted([*train, *test]) == list(range(len(records)))
        seen += list(test)
    assert sorted(seen) == list(range(len(records)))


def test_no_mark_of_the_corpus_stands_on_both_sides(corpus, split):
    sides = [set().union(*(marks_of(corpus[at]) for at in side)) for side in split]
    assert not sides[0] & sides[1]
    assert {corpus[at]["domain"] for at in split[0]} == set(load_taxonomy())


def test_folds_do_not_depend_on_the_order_of_records(small):
    by_id = lambda records: [{records[at]["id"] for at in test} for _, test in grouped_folds(records)]
    assert by_id(small) == by_id(random.Random(1).sample(small, len(small)))


def test_questions_about_one_card_are_one_family(corpus):
    cards = defaultdict(set)
    for record in corpus:
        if "/card/" in record["meta"]["family"]:
            cards[family_of(record)].add(record["meta"]["family"])
    assert max(map(len, cards.values())) > 1
    assert all(name.count("/card/") == 1 and name in kinds.pop() for name, kinds in cards.items())


# what is trained on


def test_sections_of_reports_belong_to_one_domain_that_there_is():
    texts = [text for texts in module.REPORT_SECTIONS.values() for text in texts]
    assert set(module.REPORT_SECTIONS) <= set(load_taxonomy()) and len(set(texts)) == len(texts)
    assert all(isinstance(texts, tuple) for texts in module.REPORT_SECTIONS.values())
    described = Counter(name for name, _ in module.domain_documents())
    assert set(described) == set(load_taxonomy()) and min(described.values()) == 3


def test_few_records_of_a_family_and_equal_domains(corpus):
    kept = training_records(corpus)
    assert max(Counter((r["domain"], family_of(r)) for r in kept).values()) == module.FAMILY_RECORDS
    total = Counter()
    for record, weight in zip(kept, record_weights(kept), strict=True):
        total[record["domain"]] += weight
    assert np.allclose(list(total.values()), len(kept) / len(total))
    assert training_records(corpus[::-1]) == kept


def test_two_trainings_are_equal_to_the_byte(corpus, tmp_path):
    records = corpus[:1500]  # enough for a temperature
    shuffled = random.Random(2).sample(records, len(records))
    made = [train_classifier(given) for given in (records, shuffled)]
    paths = [classifier.save(tmp_path / f"{n}") for n, classifier in enumerate(made)]
    assert paths[0].read_bytes() == paths[1].read_bytes() and made[0].temperature != 1.0


def test_the_number_of_threads_does_not_matter(small, tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(small))
    code = (
        "import json, sys; from elson_nb.corpus.classifier import train_classifier; "
        "print(train_classifier(json.load(open(sys.argv[1]))).digest())"
    )
    for threads in ("1", "2"):
        env = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "records.json")],
            env=env,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert done.stdout.strip() == train_classifier(small).digest(), done.stderr[-500:]


def test_what_cannot_be_learned_from_is_refused_by_name(small):
    with pytest.raises(ValueError, match="no records"):
        train_classifier([])
    with pytest.raises(ValueError, match=rf"{small[0]['id']}.*did you mean 'pensions'"):
        train_classifier([small[0] | {"domain": "pension"}])


def test_temperature_finds_the_factor_that_labels_were_drawn_with():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 12))
    chances = np.exp(2.5 * scores) / np.exp(2.5 * scores).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(12, p=row) for row in chances])
    assert fit_temperature(scores, labels, np.ones(4000)) == pytest.approx(2.5, rel=0.05)


# the file


def test_round_trip(trained, questions, tmp_path):
    again = DomainClassifier.load(trained.save(tmp_path / "deep" / "domains.safetensors"))
    assert again.digest() == trained.digest()
    assert again.classify(questions) == trained.classify(questions)
    assert again.top(questions, 5) == trained.top(questions, 5)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["domains.safetensors"]


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        DomainClassifier.load(path)
    assert str(path) in str(caught.value) and "delete it" in str(caught.value)


def test_damage_is_refused_and_never_classifies(small, tmp_path):
    path = train_classifier(small).save(tmp_path / "domains.safetensors")
    whole, rng = path.read_bytes(), random.Random(3)
    header = struct.unpack("<Q", whole[:8])[0]
    for cut in (0, 1, 7, 8, 200, 8 + header, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path, "damaged")
    for low, high in ((0, 8), (8, 8 + header), (8 + header, len(whole))):
        for _ in range(12):
            damaged = bytearray(whole)
            at = rng.randrange(low, high)
            damaged[at] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            refused(path, "damaged|version|taxonomy")
    path.write_bytes(whole + b"x")
    refused(path, "damaged")


def test_other_files_and_versions_are_refused(small, tmp_path, monkeypatch):
    path = tmp_path / "domains.safetensors"
    for content in (b"not a classifier", b"[1, 2]", b"\x00" * 100):
        path.write_bytes(content)
        refused(path, "no domain classifier")
    path.write_bytes(module.to_safetensors({"idf": np.ones(3, np.float32)}))
    refused(path, "no domain classifier")
    monkeypatch.setattr(module, "VERSION", 99)
    train_classifier(small).save(path)
    monkeypatch.undo()
    refused(path, "version 99")
    with pytest.raises(FileNotFoundError, match="nothing.here"):
        DomainClassifier.load(tmp_path / "nothing.here")


def test_a_domain_that_the_taxonomy_lost_is_refused(small, tmp_path, monkeypatch):
    path = train_classifier(small).save(tmp_path / "domains.safetensors")
    fewer = {name: domain for name, domain in load_taxonomy().items() if name != "pensions"}
    monkeypatch.setattr(module, "load_taxonomy", lambda: fewer)
    refused(path, "'pensions', which the taxonomy has not")


def test_the_default_is_kept_and_made_again_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("ELSON_CACHE", str(tmp_path))
    said = []
    first = default_classifier(said.append, scale=0.01)
    (path,) = (tmp_path / "classifier").iterdir()
    monkeypatch.setattr(module, "train_classifier", lambda *_: pytest.fail("the cache was not used"))
    assert default_classifier(said.append, scale=0.01).digest() == first.digest() and len(said) == 1
    monkeypatch.undo()
    monkeypatch.setenv("ELSON_CACHE", str(tmp_path))
    path.write_bytes(path.read_bytes()[:-50])
    assert default_classifier(said.append, scale=0.01).digest() == first.digest()
    assert len(said) == 2 and str(path) in said[1] and DomainClassifier.load(path).digest() == first.digest()


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where the cache should be")
    monkeypatch.setenv("ELSON_CACHE", str(tmp_path / "file"))
    said = []
    assert len(default_classifier(said.append, scale=0.01).domains) == len(load_taxonomy())
    assert "could not be kept" in said[-1]


@pytest.mark.parametrize(
    "name, value",
    [
        ("FAMILY_RECORDS", 9),
        ("C", 1.0),
        ("STOP", frozenset()),
        ("DOCUMENT_WEIGHT", 1.0),
        ("REPORT_SECTIONS", {}),
    ],
)
def test_a_changed_setting_changes_the_fingerprint(name, value, monkeypatch):
    before = module.fingerprint(1.0, 42)
    monkeypatch.setattr(module, name, value)
    assert before != module.fingerprint(1.0, 42) and len(before) == 24


def test_fingerprint_follows_data_scale_seed_and_version(tmp_path, monkeypatch):
    taxonomy = tmp_path / "taxonomy.yaml"
    taxonomy.write_bytes(module.TAXONOMY.read_bytes() + b"\n# a remark\n")
    found = {module.fingerprint(scale, seed) for scale in (0.5, 1.0) for seed in (1, 42)}
    monkeypatch.setattr(module, "TAXONOMY", taxonomy)
    found.add(module.fingerprint(1.0, 42))
    monkeypatch.setattr(module.sklearn, "__version__", "0.0")
    found.add(module.fingerprint(1.0, 42))
    assert len(found) == 6


# what it says


def test_domains_are_found_for_records_of_templates_never_seen(corpus, split, trained):
    held = [corpus[at] for at in split[1]]
    right = defaultdict(list)
    for record, guess in zip(held, trained.top(held), strict=True):
        right[record["domain"]].append(guess[0][0] == record["domain"])
    found = [name for name, hits in right.items() if np.mean(hits) > 0.5]
    assert len(right) == len(load_taxonomy()) and len(found) >= 62
    assert np.mean([hit for hits in right.values() for hit in hits]) > 0.6


def test_the_real_questions_are_what_their_readme_says(questions):
    known = set(load_taxonomy())
    assert len(questions) == 300 == len({q["id"] for q in questions})
    assert Counter(q["id"].split("/")[0] for q in questions) == {"finqa": 100, "tatqa": 100, "sec10q": 100}
    fields = {"id", "instruction", "input", "output", "label", "labels", "also"}
    for question in questions:
        assert set(question) == fields and len(question["labels"]) == 2 and len(question["input"]) <= 700
        assert {question["label"], *question["labels"], *question["also"]} <= known
        assert question["label"] in question["labels"] and question["label"] not in question["also"]
        make_record(question["instruction"], question["output"], question["input"])
    assert sum(a == b for a, b in (q["labels"] for q in questions)) == 295
    assert len({q["label"] for q in questions}) == 29


def test_real_questions_above_the_floor_and_above_keywords(trained, questions):
    best = [guess[0][0] for guess in trained.top(questions)]
    text = lambda q: f"{q['instruction']} {q['input']} {q['output']}"
    right = np.mean([guess == q["label"] for guess, q in zip(best, questions, strict=True)])
    words = np.mean([classify_text(text(q)).value == q["label"] for q in questions])
    majority = Counter(q["label"] for q in questions).most_common(1)[0][1] / 300
    assert right > REAL_FLOOR > majority and right > words + 0.2


def test_a_weak_guess_is_not_made_and_is_named(trained, questions):
    weak = 0
    for guess, ((best, chance),) in zip(trained.classify(questions), trained.top(questions, 1), strict=True):
        assert guess.confidence == round(chance, 3) and all(isinstance(word, str) for word in guess.because)
        if chance < LOW_CONFIDENCE:
            weak += 1
            assert guess.value == GENERAL and guess.because[0] == f"low confidence {chance:.2f} for {best}"
        else:
            assert guess.value == best and not any(
                word.startswith("low confidence") for word in guess.because
            )
    assert 0 < weak < 150


def test_the_terms_named_are_in_the_text_and_decide(trained):
    lease = ask("How does a lessee measure the lease liability and the right-of-use asset?")
    (guess,) = trained.classify([lease])
    assert guess.value == "lease_accounting" and 0 < len(guess.because) <= module.TERMS_SHOWN
    assert set(guess.because) <= set(terms_of(lease["instruction"]))
    without = lease["instruction"].lower()
    for word in sorted({word for term in guess.because for word in term.split()}, key=len, reverse=True):
        without = without.replace(word, " ")
    before, after = (dict(trained.top([r], 114)[0])["lease_accounting"] for r in (lease, ask(without)))
    assert after < before / 2


def test_probabilities_are_probabilities(trained, questions):
    for guesses in trained.top(questions[:40], len(trained.domains)):
        chances = [chance for _, chance in guesses]
        assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1)
        assert {name for name, _ in guesses} == set(load_taxonomy())


def test_labels_of_a_record_are_not_looked_at(trained, questions):
    lies = [
        q | {"domain": "pensions", "category": "pensions", "meta": {"family": "x"}} for q in questions[:50]
    ]
    assert trained.classify(lies) == trained.classify(questions[:50])


def test_batches_do_not_matter(trained, questions, monkeypatch):
    whole = trained.classify(questions)
    monkeypatch.setattr(module, "BATCH", 7)
    assert trained.classify(questions) == whole and trained.classify([]) == [] == trained.top([])
    assert [trained.classify([q])[0] for q in questions[:20]] == whole[:20]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "?",
        "12,345.67 %",
        "\x00\x01",
        "\ud800",
        "§§§",
        "🏦💰",
        "\u202eabc\u202c",
        "什么是债券？",
        "a",
        "the of and",
    ],
)
def test_a_text_without_known_terms_has_no_guess(trained, text):
    (guess,) = trained.classify([ask(text)])
    assert (guess.value, guess.confidence, guess.because) == (
        GENERAL,
        0.0,
        ("low confidence 0.00, no known term",),
    )


def test_one_word_very_long_and_other_languages(trained):
    (word,) = trained.classify([ask("annuity")])
    assert word.value == "annuities"
    long = ask("What is a 529 plan?") | {"input": "college savings and financial aid " * 100_000}
    assert len(text_of(long)) == module.MAX_CHARACTERS
    assert trained.classify([long])[0].value == "education_planning"
    spanish = trained.classify([ask("¿Cuánto paga mi vecino por su casa en la ciudad?")])[0]
    assert spanish.value == GENERAL


def test_width_accents_and_case_do_not_matter(trained):
    plain, odd = "What is a mortgage refinance?", "ＷＨＡＴ is a ＭＯＲＴＧＡＧＥ refi\u200bnance refinance?"
    assert terms_of("ＭＯＲＴＧＡＧＥ") == terms_of("mortgage") == ["mortgage"]
    assert [g.value for g in trained.classify([ask(plain), ask(odd)])] == ["mortgages"] * 2


@fast
@given(st.text(max_size=300))
def test_any_text_has_terms_and_an_answer(trained, text):
    assert all(term.strip() and "\n" not in term for term in terms_of(text))
    (guess,) = trained.classify([ask(text)])
    assert guess.value in trained.domains and 0 <= guess.confidence <= 1


def test_a_record_without_page_or_answer_is_read(trained):
    bare = {"instruction": "How is a bond's duration computed?"}
    assert trained.classify([bare, bare | {"input": None, "output": None}])[0].value == "fixed_income"

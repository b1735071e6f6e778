"""The exam is whole, fair and right: sizes, places of the right choice, every key worked out a second time.

`benchmark_solutions.yaml` holds what second readers gave for the shipped form with nothing but the stems in
front of them: a letter for a choice, plain arithmetic for a figure, calls for a request."""

import math
import re
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import yaml

from elson_nb.corpus.knowledge import evaluate
from elson_nb.corpus.taxonomy import load_taxonomy
from elson_nb.evaluation.benchmark import (
    KINDS,
    UNITS,
    ask,
    inference_questions,
    load_quiz,
    mistakes,
    near,
    quiz_file,
    quiz_names,
    quiz_summary,
    worked,
)
from elson_nb.evaluation.judging import tool_failure
from elson_nb.recipes import TIERS

LARGE = {
    "federal_income_tax": 50,
    "retirement_planning": 50,
    "investment": 40,
    "estate_gift_tax": 35,
    "insurance": 35,
    "tool_use": 25,
}
COMMON = {"kind", "domain", "tier", "question", "answer", "explanation", "source"}
OWN = {
    "multiple_choice": ({"choices"}, set()),
    "numeric": ({"compute", "unit", "tolerance", "mistakes"}, {"parameters", "drawn", "where"}),
    "tool_call": ({"tools"}, {"accept"}),
}
ENTRIES = {
    f"{name}-{n:03}": (name, entry)
    for name in quiz_names()
    for n, entry in enumerate(quiz_file(name)["questions"], 1)
}
QUESTIONS = {q.id: q for name in quiz_names() for q in load_quiz(name)}
SOLUTIONS = yaml.safe_load((Path(__file__).parent / "benchmark_solutions.yaml").read_text(encoding="utf-8"))
NUMERIC = [key for key, (_, entry) in ENTRIES.items() if entry["kind"] == "numeric"]
CHOICE = [q for q in QUESTIONS.values() if q.kind == "multiple_choice"]
INFERENCE_DOMAINS = "retirement_planning federal_income_tax estate_planning investment compliance".split()


def test_sizes_of_the_quizzes():
    sizes = {name: row["questions"] for name, row in quiz_summary()["quizzes"].items()}
    assert len(sizes) == 27 and sum(sizes.values()) == 431
    assert {name: sizes[name] for name in LARGE} == LARGE
    assert sum(size for name, size in sizes.items() if name not in LARGE) == 196


@pytest.mark.parametrize("key", ENTRIES)
def test_an_entry_is_well_formed(key):
    quiz, entry = ENTRIES[key]
    needed, allowed = OWN[entry["kind"]]
    assert COMMON | needed <= set(entry) <= COMMON | needed | allowed
    assert entry["tier"] in TIERS and entry["domain"] in load_taxonomy()
    assert all(str(entry[f]).strip() for f in ("question", "explanation", "source"))
    if entry["kind"] == "multiple_choice":
        assert len({c.strip().casefold() for c in entry["choices"]}) == len(entry["choices"]) == 4
        assert entry["answer"] in range(4)
    if entry["kind"] == "numeric":
        assert entry["unit"] in UNITS and 0 < entry["tolerance"] <= 0.02 and entry["mistakes"]


def test_no_question_stands_twice():
    texts = Counter(re.sub(r"\W+", " ", q.question.casefold()).strip() for q in QUESTIONS.values())
    assert max(texts.values()) == 1


def test_every_quiz_has_every_tier_and_kinds_that_fit():
    for name, row in quiz_summary()["quizzes"].items():
        assert len(row["tiers"]) >= 3, name
        assert set(row["kinds"]) <= set(KINDS)
        if name != "tool_use":
            assert row["kinds"]["numeric"] >= 0.2 * row["questions"], name


def test_places_of_the_right_choice_are_balanced():
    assert max(Counter(q.answer for q in CHOICE).values()) <= 0.3 * len(CHOICE)
    for name, row in quiz_summary()["quizzes"].items():
        places, count = row["right_choice_at"], row["kinds"].get("multiple_choice", 0)
        assert not count or max(places) <= max(3, 0.4 * count), (name, places)


@pytest.mark.parametrize("pick", [max, min], ids=["longest", "shortest"])
def test_length_does_not_give_the_answer_away(pick):
    "Choosing by length alone, ties broken at random, is right at most 35% of the time."

    def credit(q):
        lengths = [len(c) for c in q.choices]
        extreme = pick(lengths)
        return (lengths[q.answer] == extreme) / lengths.count(extreme)

    assert sum(map(credit, CHOICE)) / len(CHOICE) <= 0.35


@pytest.mark.parametrize("key", NUMERIC)
def test_a_numeric_key_tells_typical_mistakes_apart(key):
    entry = ENTRIES[key][1]
    names = worked(entry, entry.get("drawn", {}))
    answer = evaluate(str(entry["answer"]), names)
    assert math.isfinite(answer) and answer
    assert not any(near(wrong, answer, entry["tolerance"]) for wrong in mistakes(entry, names))
    for name, rule in entry.get("parameters", {}).items():
        drawn = entry["drawn"][name]
        assert drawn in rule["choices"] if "choices" in rule else rule["low"] <= drawn <= rule["high"]


@pytest.mark.parametrize("form", range(5))
def test_fresh_forms_are_other_exams_of_the_same_kind(form):
    for name in quiz_names():
        for shipped, fresh in zip(load_quiz(name), load_quiz(name, form=form), strict=True):
            same = ("id", "kind", "domain", "tier", "source", "unit", "tolerance", "tools")
            assert all(getattr(shipped, f) == getattr(fresh, f) for f in same)
            assert sorted(shipped.choices) == sorted(fresh.choices)
            if shipped.kind == "multiple_choice":
                assert shipped.choices[shipped.answer] == fresh.choices[fresh.answer]
            if shipped.kind == "numeric":
                assert math.isfinite(fresh.answer) and "{" not in fresh.question + fresh.explanation
    changed = [
        q.answer != QUESTIONS[q.id].answer
        for name in quiz_names()
        for q in load_quiz(name, form=form)
        if q.kind == "numeric"
    ]
    assert sum(changed) >= 0.8 * len(changed)


def test_a_form_is_the_same_every_time():
    one, two = ([load_quiz(name, form=11) for name in quiz_names()] for _ in range(2))
    assert one == two


def test_every_question_was_solved_by_a_second_reader():
    assert set(SOLUTIONS) == set(QUESTIONS)


@pytest.mark.parametrize("key", QUESTIONS)
def test_the_key_is_the_second_readers(key):
    question, solution = QUESTIONS[key], SOLUTIONS[key]
    if question.kind == "multiple_choice":
        assert "ABCD".index(solution) == question.answer
    elif question.kind == "numeric":
        assert near(evaluate(str(solution), {}), question.answer, question.tolerance)
    else:
        assert (
            tool_failure(
                yaml.safe_dump(solution) if solution is None else as_json(solution),
                question.answer,
                list(question.tools),
            )
            == ""
        )


def as_json(calls: list[dict]) -> str:
    import json

    return json.dumps({"tool_calls": calls})


def test_calls_fit_the_schemas_of_their_tools():
    for question in QUESTIONS.values():
        tools = {tool["name"]: tool for tool in question.tools}
        for calls in question.answer if question.kind == "tool_call" else []:
            for call in calls:
                jsonschema.validate(call["arguments"], tools[call["name"]]["parameters"])


def test_prompts_say_all_that_is_needed():
    for question in QUESTIONS.values():
        prompt = ask(question)
        assert question.question in prompt
        assert all(tool["name"] in prompt for tool in question.tools)


def test_inference_questions():
    assert [q["domain"] for q in inference_questions()] == INFERENCE_DOMAINS

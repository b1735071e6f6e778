"Judging by rule: letters, figures, calls; and the same marks in the harness's own hands."

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elson_nb.evaluation.judging import (
    FAILURES,
    calls_in,
    is_near,
    last_number,
    likeliest,
    mark_calls,
    named_choice,
    same_value,
    tool_failure,
)

many = settings(derandomize=True, deadline=None, max_examples=200)
TOOLS = [
    {
        "name": "quote",
        "parameters": {
            "required": ["symbol"],
            "properties": {
                "symbol": {"type": "string"},
                "days": {"type": "integer"},
                "live": {"type": "boolean"},
            },
        },
    },
    {"name": "loan", "parameters": {"required": ["rate"], "properties": {"rate": {"type": "number"}}}},
]
CALLS = st.lists(
    st.one_of(
        st.builds(
            lambda symbol, days: {"name": "quote", "arguments": {"symbol": symbol, "days": days}},
            st.text("ABCDEF", min_size=1, max_size=4),
            st.integers(1, 30),
        ),
        st.builds(lambda rate: {"name": "loan", "arguments": {"rate": rate}}, st.floats(0.1, 20)),
    ),
    min_size=1,
    max_size=4,
)


def written(calls) -> str:
    return json.dumps({"tool_calls": calls})


@many
@given(CALLS, st.randoms(use_true_random=False), st.text("abc {}[]\n", max_size=12))
def test_right_calls_are_right_in_any_order_and_any_company(calls, chance, talk):
    mixed = list(calls)
    chance.shuffle(mixed)
    assert tool_failure(written(mixed), [calls], TOOLS) == ""
    assert tool_failure(talk.replace("{", "").replace("[", "") + written(mixed), [calls], TOOLS) == ""


@many
@given(CALLS, st.data())
def test_every_change_is_a_failure_of_its_type(calls, data):
    at = data.draw(st.integers(0, len(calls) - 1))
    copies = json.loads(written(calls))["tool_calls"]
    change = data.draw(st.sampled_from(["drop", "twice", "rename", "omit", "invent", "type", "value"]))
    call = copies[at]
    name = "symbol" if call["name"] == "quote" else "rate"
    if change == "drop":
        del copies[at]
        expected = {"no call"} if not copies else {"too few calls"}
    elif change == "twice":
        copies.append(call)
        expected = {"too many calls"}
    elif change == "rename":
        call["name"] = "fly"
        expected = {"wrong tool"}
    elif change == "omit":
        del call["arguments"][name]
        expected = {"missing argument"}
    elif change == "invent":
        call["arguments"]["extra"] = 1
        expected = {"unexpected argument"}
    elif change == "type":
        call["arguments"][name] = [call["arguments"][name]]
        expected = {"wrong type"}
    else:
        call["arguments"][name] = "ZZZ" if name == "symbol" else call["arguments"][name] + 1
        expected = {"wrong value"}
    failure = tool_failure(written(copies), [calls], TOOLS)
    assert failure in FAILURES
    if len(calls) == 1:
        assert {failure} == expected


@pytest.mark.parametrize(
    "text, failure",
    [
        ("I need no tool for this.", ""),
        (written([]), ""),
        (written([{"name": "loan", "arguments": {"rate": 1}}]), "called without need"),
    ],
)
def test_where_no_call_is_due(text, failure):
    assert tool_failure(text, [[]], TOOLS) == failure


def test_another_accepted_answer_counts():
    one, two = ([{"name": "quote", "arguments": {"symbol": s}}] for s in ("BRK.B", "BRK-B"))
    assert tool_failure(written(two), [one, two], TOOLS) == ""
    assert tool_failure(written(two), [one], TOOLS) == "wrong value"


def test_true_is_not_one():
    assert not same_value(1, True) and not same_value(True, 1) and same_value(True, True)
    assert (
        tool_failure(
            written([{"name": "quote", "arguments": {"symbol": "F", "days": True}}]),
            [[{"name": "quote", "arguments": {"symbol": "F", "days": 1}}]],
            TOOLS,
        )
        == "wrong type"
    )


@many
@given(st.text(max_size=60))
def test_no_text_breaks_the_judge(text):
    assert calls_in(text) is None or isinstance(calls_in(text), list)
    named_choice(text, ["a", "b", "c", "d"])
    last_number(text)
    mark_calls({"answer": "[[]]", "tools": "[]"}, [text])


@many
@given(st.floats(0.01, 1e9), st.floats(0.0001, 0.02))
def test_a_figure_is_read_as_it_is_written(value, tolerance):
    value = round(value, 2)
    for text in (f"The answer is ${value:,.2f}.", f"It is {value:.2f}%", f"= USD {value:,.2f}"):
        assert is_near(last_number(text), value, tolerance)
    assert not is_near(last_number(f"It is {value * (1 + 3 * tolerance) + 0.02:,.2f}"), value, tolerance)


@many
@given(st.lists(st.floats(-50, -0.1), min_size=2, max_size=4), st.data())
def test_the_likeliest_choice_is_the_best_per_character(values, data):
    choices = [data.draw(st.text("ab", min_size=1, max_size=20)) for _ in values]
    best = likeliest(values, choices)
    assert all(values[best] / len(choices[best]) >= v / len(c) for v, c in zip(values, choices))

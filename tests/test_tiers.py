"Tiers by features against the model they were fitted with, and tiers by loss against plain computations."

import importlib.util
import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from question_maker import make_records
from scipy.special import expit
from transformers import AutoModelForCausalLM

from elson_nb.corpus import tiers
from elson_nb.corpus.records import TIERS
from elson_nb.corpus.shares import apportion
from elson_nb.corpus.synthesis import build_records
from elson_nb.corpus.tiers import FEATURES, THRESHOLDS, assign_tier, tier_features, tier_probabilities
from elson_nb.recipes import PROMPT_TEMPLATE, load_recipe
from elson_nb.training import difficulty
from elson_nb.training.base import load_tokenizer, make_random_base
from elson_nb.training.batches import encode
from elson_nb.training.difficulty import DifficultyError, answer_losses, model_fingerprint, tiers_by_loss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("tier_agreement", BENCHMARKS / "tier_agreement.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results():
    return json.loads((BENCHMARKS / "results" / "tier_agreement.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def corpus():
    return build_records(seed=7, scale=0.04)


def tiers_of(records):
    return np.array([TIERS.index(r["difficulty"]) for r in records])


# tiers by features

ANSWERS = st.lists(
    st.sampled_from(
        ["a", "12.5%", "\n1. ", "\n- ", "weigh", "recommend", "trade-off", "é", "word ", " ", "\n"]
    ),
    max_size=400,
).map("".join)


def test_a_label_wins_and_costs_no_feature(monkeypatch):
    monkeypatch.setattr(tiers, "tier_features", lambda record: pytest.fail("features were computed"))
    for tier in TIERS:
        assigned = assign_tier({"difficulty": tier, "output": "x" * 5000})
        assert (assigned.value, assigned.confidence) == (tier, 1.0)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(ANSWERS)
def test_tier_and_confidence_are_those_of_the_proportional_odds_model(answer):
    points = sum(v * FEATURES[k][0] for k, v in tier_features({"output": answer}).items())
    limits = np.array(list(THRESHOLDS.values()))
    above = expit(math.log(2) * (points - limits))
    expected = -np.diff(np.r_[1.0, above, 0.0])
    assigned = assign_tier({"output": answer, "difficulty": ""})
    at = TIERS.index(assigned.value)
    assert at == (points >= limits).sum()
    assert assigned.confidence == pytest.approx(expected[at], abs=6e-4)
    assert list(tier_probabilities(points).values()) == pytest.approx(expected.tolist(), abs=1e-12)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(ANSWERS)
def test_the_reasons_add_up_to_a_sum_inside_the_tier(answer):
    assigned = assign_tier({"output": answer})
    *parts, total = assigned.because
    sums = 0.0
    for part in parts:
        name, value, weight, points = re.fullmatch(r"(.+): (\S+) x (\S+) = (\S+)", part).groups()
        assert float(weight) == FEATURES[name][0] and float(value) <= FEATURES[name][1]
        assert float(value) * float(weight) == pytest.approx(float(points), abs=0.11)
        sums += float(points)
    said = float(total.removeprefix("sum "))
    assert sums == pytest.approx(said, abs=0.05 * len(parts) + 0.06)
    edges = [-math.inf, *THRESHOLDS.values(), math.inf]
    at = TIERS.index(assigned.value)
    assert edges[at] - 0.051 <= said <= edges[at + 1] + 0.051


@settings(derandomize=True, deadline=None, max_examples=60)
@given(ANSWERS, st.integers(0, 3000))
def test_a_longer_answer_is_never_easier(answer, more):
    before, after = (assign_tier({"output": text}).value for text in (answer, answer + "x" * more))
    assert TIERS.index(after) >= TIERS.index(before)


@pytest.mark.parametrize(
    "answer, feature, units",
    [
        ("1. a\n2) b\n  3: c\n- d\n• e\nStep 6. f", "steps", 6),
        ("Rates of 3.5% in 1. place, 12 - 4, *not* a-b.", "steps", 0),
        ("1,250.00 and 7% of 401(k)", "figures in doublings of count + 1", 2.0),
        ("The weight is the weighted average", "words that weigh", 0),
        ("Recommend, recommended, recommendation", "words that weigh", 1),
        ("Weigh the trade-off", "words that weigh", 2),
        ("", "length in doublings of 100 characters", 0.0),
        ("x" * 100_000, "length in doublings of 100 characters", 4.0),
    ],
)
def test_features_count_what_they_say(answer, feature, units):
    assert tier_features({"output": answer})[feature] == units


@pytest.mark.parametrize("unit", ["\n", "\n ", " ", "1", "1,", "a-", "\n1. ", "weigh", "-"])
def test_hostile_text_takes_time_in_proportion_to_its_length(unit):
    started = time.perf_counter()
    assign_tier({"output": unit * (600_000 // len(unit))})
    assert time.perf_counter() - started < 2  # 0.1 s; a quadratic pattern takes hours


def test_the_table_is_the_rounded_fit_of_the_benchmark(results):
    assert {k: round(v, 1) for k, v in results["weights"].items()} == {k: w for k, (w, _) in FEATURES.items()}
    assert {k: round(v, 1) for k, v in results["thresholds"].items()} == THRESHOLDS


def test_stored_figures_follow_from_the_stored_confusion(benchmark, results):
    for row in results["held_out"].values():
        table = np.array(row["confusion"])
        assert table.sum() == row["n"]
        truth, given = np.repeat(np.indices((4, 4)).reshape(2, -1), table.ravel(), axis=1)
        found = benchmark.figures(truth, given)
        assert found == pytest.approx({k: row[k] for k in found})
        assert all(low <= row[k] <= high for k, (low, high) in row["intervals"].items())


def test_kappa_against_the_formula(benchmark):
    rng = np.random.default_rng(3)
    truth, given = rng.integers(0, 4, (2, 300))
    table = np.zeros((4, 4))
    np.add.at(table, (truth, given), 1)
    cost = np.subtract.outer(np.arange(4), np.arange(4)) ** 2
    chance = np.outer(table.sum(1), table.sum(0)) / 300
    expected = 1 - (cost * table).sum() / (cost * chance).sum()
    assert benchmark.figures(truth, given)["kappa"] == pytest.approx(expected)


def test_no_family_skeleton_or_parent_is_on_both_sides(benchmark, corpus):
    assert any("parent" in r["meta"] for r in corpus)
    fold = benchmark.folds(benchmark.group(corpus))
    assert [benchmark.leaks(corpus, fold == n) for n in range(5)] == [0] * 5
    assert min(np.bincount(fold)) > len(corpus) / 10
    by_record = np.random.default_rng(0).random(len(corpus)) < 0.2
    assert benchmark.leaks(corpus, by_record) > 100  # the check can fail


def test_groups_are_what_ties_connect_and_no_more(benchmark):
    def record(family, text, **meta):
        return {
            "id": f"{family} {text}",
            "instruction": text,
            "output": text,
            "meta": {"family": family, **meta},
        }

    records = [
        record("a/x", "yield"),
        record("a/x", "spread"),
        record("a/y", "duration"),
        record("b/z", "convexity", parent="a/y duration"),
        record("b/card/bond/rule", "coupon of 5%"),
        record("b/card/bond/name", "par"),
        record("c/w", "coupon of 7%"),
        record("c/card/par/name", "discount"),
    ]
    groups = benchmark.group(records).tolist()
    together = [{at for at, g in enumerate(groups) if g == name} for name in dict.fromkeys(groups)]
    assert together == [{0, 1}, {2, 3}, {4, 5, 6}, {7}]


def test_the_fit_finds_weights_that_made_the_data(benchmark):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20_000, 3))
    weights, thresholds = np.array([2.0, -0.7, 0.0]), np.array([-1.5, 0.4, 2.2])
    chance = benchmark.probabilities(weights, thresholds, features)
    tiers = (rng.random(len(features))[:, None] > chance.cumsum(axis=1)).sum(axis=1)
    found = benchmark.fit(features, tiers)
    assert found[0] == pytest.approx(weights, abs=0.1) and found[1] == pytest.approx(thresholds, abs=0.1)


def test_the_fitted_rule_agrees_better_than_the_one_before(benchmark, corpus):
    held = benchmark.folds(benchmark.group(corpus)) == 0
    bare = [r | {"difficulty": ""} for r, out in zip(corpus, held) if out]
    truth = tiers_of(corpus)[held]
    rule = np.array([TIERS.index(assign_tier(r).value) for r in bare])
    before = np.array([benchmark.old_rule(r) for r in bare])
    assert benchmark.figures(truth, rule)["accuracy"] > benchmark.figures(truth, before)["accuracy"] + 0.2
    assert benchmark.figures(truth, rule)["within_one"] > 0.98


# the loss of the base model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_random_base(load_recipe("smoke").model.random_config, folder)
    return folder


@pytest.fixture
def model(base):
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for weights in loaded.parameters():
            weights.mul_(3)  # or a random model guesses all tokens alike, and every loss is the same
    return loaded


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def plain_loss(model, tokenizer, record, template=PROMPT_TEMPLATE) -> float:
    "One record alone, token by token, without a batch, a mask or padding."
    prompt = template.replace(
        "{question}", "\n\n".join(filter(None, (record["instruction"], record["input"])))
    )
    ids = tokenizer(prompt)["input_ids"]
    answer = [*tokenizer(record["output"])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids + answer])).logits[0]
    chances = logits.log_softmax(-1)
    return -sum(chances[len(ids) + n - 1, token].item() for n, token in enumerate(answer)) / len(answer)


@pytest.mark.parametrize("batch_tokens", [1, 400, 100_000])
def test_losses_equal_a_plain_computation_in_any_batch(model, tokenizer, batch_tokens):
    records = make_records(14)
    model.train()
    found = answer_losses(records, model, tokenizer, batch_tokens=batch_tokens)
    assert model.training  # left as it was
    assert list(found) == [r["id"] for r in records]
    expected = {r["id"]: plain_loss(model, tokenizer, r) for r in records}
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(found.values()) - min(found.values()) > 0.1


def test_the_template_is_the_one_given(model, tokenizer):
    records, template = make_records(3), "Q: {question}\nA: "
    found = answer_losses(records, model, tokenizer, template)
    expected = {r["id"]: plain_loss(model, tokenizer, r, template) for r in records}
    assert found == pytest.approx(expected, abs=1e-5)
    assert found != pytest.approx(answer_losses(records, model, tokenizer), abs=1e-3)


def test_progress_counts_records_up_to_all(model, tokenizer):
    seen = []
    answer_losses(make_records(9), model, tokenizer, batch_tokens=300, progress=lambda *n: seen.append(n))
    assert [n for n, _ in seen] == sorted({n for n, _ in seen}) and seen[-1] == (9, 9) and len(seen) > 2


class Scored(list):
    "Ids of each batch that was scored; `stop_at` of them and the next is interrupted."

    stop_at = None


@pytest.fixture
def scored(monkeypatch):
    batches, real = Scored(), difficulty.example_losses

    def example_losses(model, examples, *rest):
        if len(batches) == batches.stop_at:
            raise KeyboardInterrupt
        batches.append([e.id for e in examples])
        return real(model, examples, *rest)

    monkeypatch.setattr(difficulty, "example_losses", example_losses)
    return batches


def test_an_interrupted_call_goes_on_where_it_stopped(model, tokenizer, scored, tmp_path):
    records, cache = make_records(16), tmp_path / "new folder" / "losses.jsonl"
    whole = answer_losses(records, model, tokenizer, batch_tokens=400)
    batches = len(scored)
    scored.clear()
    scored.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        answer_losses(records, model, tokenizer, batch_tokens=400, cache=cache)
    scored.stop_at = None
    seen = []
    found = answer_losses(
        records, model, tokenizer, batch_tokens=400, cache=cache, progress=lambda *n: seen.append(n)
    )
    assert found == whole  # to the last bit: the batches are the same
    every = [i for batch in scored for i in batch]
    assert len(scored) == batches > 3 and sorted(every) == sorted(whole)  # none was scored twice
    assert seen[0][0] > len(scored[0]) + len(scored[1])  # what the file held counts as done
    scored.clear()
    assert answer_losses(records, model, tokenizer, cache=cache) == whole and scored == []


def test_every_cut_of_the_last_line_is_mended(model, tokenizer, scored, tmp_path):
    records, cache = make_records(3), tmp_path / "losses.jsonl"
    whole = answer_losses(records, model, tokenizer, cache=cache)
    content = cache.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in (last + 1, last + 9, len(content) - 2, len(content) - 1):
        cache.write_bytes(content[:end])
        scored.clear()
        with pytest.warns(UserWarning, match="losses.jsonl: the last line was cut off"):
            assert answer_losses(records, model, tokenizer, cache=cache) == pytest.approx(whole, abs=1e-6)
        assert sum(map(len, scored)) == 1
        assert len(list(map(json.loads, cache.read_text().splitlines()))) == 4


@pytest.mark.parametrize("end", [0, 1, 20])
def test_a_file_cut_in_its_header_begins_anew(model, tokenizer, tmp_path, end):
    records, cache = make_records(2), tmp_path / "losses.jsonl"
    answer_losses(records, model, tokenizer, cache=cache)
    content = cache.read_bytes()
    cache.write_bytes(content[:end])
    answer_losses(records, model, tokenizer, cache=cache)
    assert cache.read_bytes() == content


def test_losses_of_another_model_or_template_are_refused_and_left_alone(model, tokenizer, tmp_path):
    records, cache = make_records(2), tmp_path / "losses.jsonl"
    answer_losses(records, model, tokenizer, cache=cache)
    content = cache.read_bytes()
    refused = pytest.raises(
        DifficultyError, match="another model, tokenizer or prompt template.*delete this one"
    )
    with refused:
        answer_losses(records, model, tokenizer, "Q: {question}\nA: ", cache=cache)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    with refused:
        answer_losses(records, model, tokenizer, cache=cache)
    assert cache.read_bytes() == content


@pytest.mark.parametrize(
    "content", ['{"instruction": "Why?"}', '{"instruction": "Why?"}\n{"a": 1}\n', "a,b\n", "x"]
)
def test_a_file_that_is_none_of_losses_is_left_alone(model, tokenizer, tmp_path, content):
    path = tmp_path / "qa.jsonl"
    path.write_text(content)
    with pytest.raises(DifficultyError, match="qa.jsonl is no file of losses"):
        answer_losses(make_records(2), model, tokenizer, cache=path)
    assert path.read_text() == content


def test_damage_in_the_middle_names_the_line(model, tokenizer, tmp_path):
    cache = tmp_path / "losses.jsonl"
    answer_losses(make_records(3), model, tokenizer, cache=cache)
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join([*lines[:2], '{"id": "r0\n', *lines[3:]]))
    with pytest.raises(DifficultyError, match="losses.jsonl:3 is damaged; delete the file"):
        answer_losses(make_records(3), model, tokenizer, cache=cache)


def test_a_file_in_use_is_refused(model, tokenizer, tmp_path):
    cache = tmp_path / "losses.jsonl"
    mark = model_fingerprint(model, tokenizer)
    with difficulty.loss_file(cache, mark), pytest.raises(DifficultyError, match="in use by another process"):
        answer_losses(make_records(2), model, tokenizer, cache=cache)


def test_the_fingerprint_is_the_same_for_a_copy_in_another_folder(base, tokenizer, tmp_path):
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    load(base).save_pretrained(tmp_path / "copy")
    marks = {
        model_fingerprint(load(folder), tokenizer, PROMPT_TEMPLATE) for folder in (base, tmp_path / "copy")
    }
    assert len(marks) == 1


def test_a_record_beyond_the_window_is_refused_before_any_is_scored(model, tokenizer, scored):
    long = make_records(1)[0] | {"id": "long", "output": "word " * 500}
    assert len(encode(long, tokenizer)) > model.config.max_position_embeddings
    with pytest.raises(
        DifficultyError, match=r"1 records are longer .* window of 2048 tokens, long with 2\d\d\d"
    ):
        answer_losses([*make_records(2), long], model, tokenizer)
    assert scored == []


def test_a_loss_that_is_no_number_stops_and_is_not_kept(model, tokenizer, tmp_path):
    mark = model_fingerprint(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    cache = tmp_path / "losses.jsonl"
    with pytest.raises(DifficultyError, match="loss of record r00. is nan; set model.dtype"):
        answer_losses(make_records(2), model, tokenizer, cache=cache)
    assert len(cache.read_text().splitlines()) == 1 and mark not in cache.read_text()


# from losses to tiers

LOSSES = st.dictionaries(
    st.text(max_size=4), st.sampled_from([0.5, 1.0, 1.5]) | st.floats(0, 20), max_size=60
)
SHARES = st.dictionaries(st.sampled_from(TIERS), st.integers(0, 9) | st.floats(0, 1), min_size=1).filter(
    lambda shares: sum(shares.values()) > 0.01
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(LOSSES, SHARES, st.randoms(use_true_random=False))
def test_tiers_by_loss_are_exact_in_order_and_free_of_the_order_given(losses, shares, random):
    tiers = tiers_by_loss(losses, shares)
    counts = Counter(tiers.values())
    assert {t: counts[t] for t in TIERS} == apportion(len(losses), {t: shares.get(t, 0) for t in TIERS})
    ranked = sorted(losses, key=lambda i: (losses[i], i))
    levels = [TIERS.index(tiers[i]) for i in ranked]
    assert levels == sorted(levels) and list(tiers) == list(losses)
    shuffled = random.sample(list(losses.items()), len(losses))
    assert tiers_by_loss(dict(shuffled), shares) == tiers


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(TIERS), min_size=1, max_size=80))
def test_counts_of_the_rule_are_met_to_the_record(by_rule):
    losses = {f"r{n}": (n * 7919 % 101) / 10 for n in range(len(by_rule))}
    assert Counter(tiers_by_loss(losses, Counter(by_rule)).values()) == Counter(by_rule)


@pytest.mark.parametrize(
    "losses, shares, says",
    [
        ({"a": 1.0}, {"simple": 1}, "no tier 'simple'; tiers are easy"),
        ({"a": 1.0}, {"easy": 2, "hard": -1}, "none may be below 0"),
        ({"a": 1.0}, {"easy": 0}, "one must be above"),
        ({"a": 1.0}, {}, "one must be above"),
        ({"a": 1.0, "b": math.nan}, {"easy": 1}, "record b is nan"),
        ({"a": math.inf}, {"easy": 1}, "record a is inf"),
    ],
)
def test_shares_and_losses_that_make_no_sense_are_refused(losses, shares, says):
    with pytest.raises(DifficultyError, match=says):
        tiers_by_loss(losses, shares)

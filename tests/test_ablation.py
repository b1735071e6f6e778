"An ablation on the tiny model: equal arms, one held-out set, resuming, refusals, and the statistics."

import gc
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from elson_nb.corpus.records import TIERS, make_record, read_jsonl, write_jsonl
from elson_nb.recipes import PHASES, load_recipe
from elson_nb.session import ablation
from elson_nb.session.ablation import Arm, SessionError, arm_recipe, check_equal, run_ablation
from elson_nb.session.ablation_result import ablation_text, by_group, over_seeds, plot_ablation, summarise

DOMAINS = ("insurance", "accounting", "trusts")
SMALL = ("curriculum.target_records=18", "curriculum.held_out_records=8", "training.max_length=200")
ARMS = ["curriculum-seed42", "shuffled-seed42", "curriculum-seed43", "shuffled-seed43"]


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    "A collection after every phase looks at millions of imported objects: half the time of a tiny model."
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    rows = [
        make_record(f"{d} {t} {n}?", f"The answer is {n}.", category=d, difficulty=t)
        for d in DOMAINS
        for t in TIERS
        for n in range(12)
    ]
    path = tmp_path_factory.mktemp("ablation") / "qa.jsonl"
    write_jsonl(path, rows)
    return path


def small(*more: str):
    return load_recipe("smoke", [*SMALL, *more])


@pytest.fixture(scope="module")
def ablated(corpus) -> tuple[Path, dict]:
    "Folder of an ablation with two seeds and the usual two schedules, and what `elson ablate` prints for it."
    out = corpus.parent / "out"
    run_ablation(small(), [corpus], out, seeds=2)
    words = ["--recipe", "smoke", "--seeds", "2", "--corpus", corpus, "--out", out, "--json"]
    words += [word for setting in SMALL for word in ("--set", setting)]
    command = [Path(sys.executable).parent / "elson", "ablate", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr == f"ablation in {out} · Ctrl-C stops, the same command goes on\n"
    )  # all arms were there
    return out, json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def result(out: Path, name: str) -> dict:
    return json.loads((out / name / "result.json").read_text())


def ids_of(out: Path, name: str) -> list[str]:
    "Ids of an arm in training order."
    merged = [sorted((out / name / "curriculum_runs").glob(f"merged_phase{p}_*"))[0] for p in PHASES]
    return [r["id"] for path in merged for r in read_jsonl(path)]


def test_the_arms_of_a_seed_train_the_same_in_another_order(ablated):
    out, printed = ablated
    for seed in (42, 43):
        one, two = (result(out, f"{s}-seed{seed}") for s in ("curriculum", "shuffled"))
        assert (one["records"], one["tokens"], one["steps"]) == (two["records"], two["tokens"], two["steps"])
        ordered, mixed = (ids_of(out, f"{s}-seed{seed}") for s in ("curriculum", "shuffled"))
        assert Counter(ordered) == Counter(mixed) and ordered != mixed and len(ordered) == 18
        assert one["after"] != two["after"] and one["after"].keys() == two["after"].keys()
    assert Counter(ids_of(out, ARMS[0])) != Counter(ids_of(out, ARMS[2]))
    (comparison,) = printed["comparisons"]
    assert [row["records"] for row in comparison["by_seed"]] == [18, 18]


def test_all_arms_are_scored_on_records_that_none_has_seen(ablated):
    out, printed = ablated
    held = {r["id"] for r in read_jsonl(out / "data" / "held_out.jsonl")}
    assert len(held) == printed["held_out"] == 8
    for name in ARMS:
        assert set(result(out, name)["after"]) == held and not held & set(ids_of(out, name))


def test_the_result_is_kept_as_figures_as_a_picture_and_as_words(ablated):
    out, printed = ablated
    assert json.loads((out / "ablation.json").read_text()) == printed
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "ablation.md").read_text()
    (comparison,) = printed["comparisons"]
    assert f"**{comparison['verdict']}: curriculum" in text and "Few seeds say little" in text
    for row in comparison["by_seed"]:
        assert f"| {row['seed']} | 18 | {row['tokens']:,} | " in text and f"{row['schedule']:.4f}" in text
    differences = [row["schedule"] - row["baseline"] for row in comparison["by_seed"]]
    assert comparison["over_seeds"]["value"] == pytest.approx(np.mean(differences))


def test_the_figures_are_those_of_the_arms(ablated):
    out, printed = ablated
    (comparison,) = printed["comparisons"]
    for row in comparison["by_seed"]:
        one, two = (result(out, f"{s}-seed{row['seed']}")["after"] for s in ("curriculum", "shuffled"))
        assert row["schedule"] == pytest.approx(np.mean(list(one.values())))
        assert row["difference"]["value"] == pytest.approx(np.mean([one[i] - two[i] for i in one]))
        assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
    before = json.loads((out / "base.json").read_text())
    assert printed["before"] == pytest.approx(np.mean(list(before.values())))
    assert all(
        arm["after"] < printed["before"] for arm in printed["arms"]
    )  # the tiny model learns its corpus


def test_a_rerun_trains_only_what_is_missing_and_comes_to_the_same(ablated, corpus):
    out, _ = ablated
    kept = {name: (out / name / "result.json").stat().st_mtime_ns for name in ARMS}
    known = result(out, ARMS[1])
    (out / ARMS[1] / "result.json").unlink()
    said = []
    outcome = run_ablation(small(), [corpus], out, seeds=2, show=said.append)
    assert {row["phase"].split()[0].rstrip(",") for row in said} == {ARMS[1]}
    changed = [name for name in ARMS if (out / name / "result.json").stat().st_mtime_ns != kept[name]]
    assert changed == [ARMS[1]]
    again = result(out, ARMS[1])
    assert again["after"] == known["after"] and again["drawn"] == known["drawn"]
    assert [f"{arm['schedule']}-seed{arm['seed']}" for arm in outcome["arms"]] == ARMS


def test_an_arm_that_was_stopped_goes_on_and_comes_to_the_same(ablated, corpus, tmp_path):
    out, _ = ablated
    other = tmp_path / "out"
    shutil.copytree(out, other)
    shutil.rmtree(other / ARMS[1])

    def stop(row: dict) -> None:
        if row["phase"].startswith(f"{ARMS[1]} (1 of 1), B") and row["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ablation(small(), [corpus], other, seeds=2, show=stop)
    assert not (other / ARMS[1] / "result.json").exists()
    said = []
    run_ablation(small(), [corpus], other, seeds=2, show=said.append)
    slots = [row["phase"].split(", ")[1] for row in said if "step" in row]
    assert set(slots) == {"B", "C"}  # A was done
    assert result(other, ARMS[1])["after"] == result(out, ARMS[1])["after"]


# ---- refusals


def alter(path: Path, old: str, new: str):
    "Change a file; returns what puts it back."
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return lambda: path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "file, old, new, complaint",
    [
        (
            "shuffled-seed43/curriculum_runs/merged_phaseB_seed43.jsonl",
            "The",
            "No",
            "merged_phaseB_seed43.jsonl",
        ),
        ("shuffled-seed43/result.json", 'print": "', 'print": "0', "was trained with another recipe"),
        ("data/held_out.jsonl", "The", "No", "held_out.jsonl is not what the arms were scored on"),
    ],
)
def test_a_changed_file_is_refused_by_name(ablated, corpus, file, old, new, complaint):
    out, _ = ablated
    restore = alter(out / file, old, new)
    try:
        with pytest.raises(SessionError) as refused:
            run_ablation(small(), [corpus], out, seeds=2)
    finally:
        restore()
    assert complaint in str(refused.value)


def test_other_records_for_a_finished_arm_are_refused(ablated, corpus, monkeypatch):
    out, _ = ablated
    monkeypatch.setattr(ablation, "arrange", lambda samples, config, epochs: samples)
    with pytest.raises(
        SessionError, match="shuffled-seed42 was trained on other records for A than are drawn now"
    ):
        run_ablation(small(), [corpus], out, seeds=2)


def test_a_folder_of_another_recipe_or_corpus_is_refused(ablated, corpus, tmp_path):
    out, _ = ablated
    with pytest.raises(SessionError, match="begun with another recipe .*--out"):
        run_ablation(small("training.learning_rate=0.004"), [corpus], out, seeds=2)
    other = tmp_path / "qa.jsonl"
    other.write_text("".join(corpus.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SessionError, match="begun with another corpus .*--out"):
        run_ablation(small(), [other], out, seeds=2)


@pytest.mark.parametrize(
    "schedules, complaint",
    [
        (["curriculum", "replay"], "cannot compare the schedule 'replay'"),
        (["curriculum", "flat"], "name 'shuffled', the baseline"),
        (["shuffled", "shuffled"], "at least one other"),
    ],
)
def test_schedules_that_cannot_be_compared_are_refused(tmp_path, schedules, complaint):
    with pytest.raises(ValueError, match=complaint):
        run_ablation(small(), [], tmp_path / "out", schedules=schedules)
    assert not (tmp_path / "out").exists()


def test_arms_of_unequal_size_are_not_compared(tmp_path):
    drawn = {p: {"file": "", "sha256": "", "records": 4, "tokens": 100} for p in PHASES}
    arms = [
        Arm(arm_recipe(small(), s, 42), tmp_path / s, drawn, "same records")
        for s in ("curriculum", "shuffled")
    ]
    check_equal(arms)
    with pytest.raises(SessionError, match="shuffled would not train the records of curriculum"):
        check_equal([arms[0], replace(arms[1], examples="others")])
    with pytest.raises(SessionError, match="shuffled would not"):
        check_equal([arms[0], replace(arms[1], drawn=drawn | {"C": drawn["C"] | {"tokens": 99}})])


def test_an_arm_that_did_not_train_all_is_no_result(corpus, tmp_path, monkeypatch):
    whole = ablation.train_phase
    monkeypatch.setattr(
        ablation, "train_phase", lambda r, p, records, *rest, **kw: whole(r, p, records[1:], *rest, **kw)
    )
    with pytest.raises(SessionError, match="curriculum-seed42 trained 5 records in A, planned were 6"):
        run_ablation(small(), [corpus], tmp_path, seeds=1)
    assert not (tmp_path / ARMS[0] / "result.json").exists()


def test_flat_trains_every_pass_on_one_cycle(corpus, tmp_path, monkeypatch):
    said = []
    whole, cycles = ablation.train_phase, []
    monkeypatch.setattr(
        ablation, "train_phase", lambda *a, **kw: cycles.append(kw["cycle"]) or whole(*a, **kw)
    )
    recipe = small("training.num_train_epochs=2", "curriculum.target_records=12")
    outcome = run_ablation(recipe, [corpus], tmp_path, 1, ["flat", "shuffled"], said.append)
    flat, shuffled = outcome["arms"]
    assert flat["records"] == shuffled["records"] == 24 and flat["tokens"] == shuffled["tokens"]
    text = ablation_text(summarise(outcome))
    assert (
        "one learning-rate cycle where the others have three" in text and "one seed has no interval" in text
    )
    assert "**CANNOT TELL: flat cannot be told from shuffled" in text
    assert cycles == [(0, 7), (2, 7), (5, 7), None, None, None]  # 8, 10 and 6 records by four, then shuffled
    assert any("left in all" in row["phase"] for row in said if row.get("step"))


# ---- statistics


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=9))
def test_the_interval_over_seeds_is_that_of_the_t_test(differences):
    interval = over_seeds(differences)
    if len(set(differences)) == 1:
        assert interval.low == pytest.approx(differences[0]) == interval.high
        return
    reference = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high))


def toy(gain: dict[int, float], seeds: int = 3) -> dict:
    "An outcome in which curriculum is better by `gain[n]` on every record of the n-th seed."
    held = [{"id": str(n), "difficulty": TIERS[n % 4], "domain": DOMAINS[n % 3]} for n in range(12)]
    sizes = {"records": 60, "tokens": 9000, "steps": 16, "minutes": 1.0, "fingerprint": "f"}
    arms = [
        {"schedule": s, "seed": k, "after": {r["id"]: 3 + int(r["id"]) / 10 - g for r in held}, **sizes}
        for k in range(seeds)
        for s, g in (("curriculum", gain[k]), ("shuffled", 0), ("reversed", -gain[k]))
    ]
    facts = {"recipe": "toy", "fingerprint": "f", "model": "none", "corpus": ["generated"], "provenance": {}}
    return {**facts, "held": held, "before": {r["id"]: 5.0 for r in held}, "arms": arms}


def verdicts(outcome: dict) -> dict[str, str]:
    return {c["schedule"]: c["verdict"] for c in summarise(outcome)["comparisons"]}


def test_the_verdict_is_read_off_the_seeds_not_the_records():
    assert verdicts(toy({0: 0.10, 1: 0.12, 2: 0.11})) == {"curriculum": "PASS", "reversed": "FAIL"}
    assert set(verdicts(toy({0: 0.30, 1: 0.01, 2: 0.02})).values()) == {"CANNOT TELL"}
    summary = summarise(toy({0: 0.30, 1: 0.01, 2: 0.02}))
    assert all(row["difference"]["high"] < 0 for row in summary["comparisons"][0]["by_seed"])
    assert set(verdicts(toy({0: 0.5}, seeds=1)).values()) == {"CANNOT TELL"}


def test_groups_are_paired_differences_of_their_own_records():
    outcome = toy({0: 0.1, 1: 0.1, 2: 0.1})
    base, other = ({r["id"]: v + n for n, r in enumerate(outcome["held"])} for v in (0.0, 0.5))
    other["0"] += 3.0
    rows = {row["difficulty"]: row for row in by_group(outcome["held"], base, other, "difficulty")}
    assert list(rows) == list(TIERS) and {row["n"] for row in rows.values()} == {3}
    assert {row["low"] for row in rows.values()} == {None}  # three records are no basis for an interval
    (whole,) = by_group([r | {"domain": "one"} for r in outcome["held"]], base, other, "domain")
    assert whole["low"] < whole["value"] < whole["high"] and whole["n"] == 12
    assert rows["easy"]["value"] == pytest.approx(1.5) and rows["hard"]["value"] == pytest.approx(0.5)


def test_the_picture_has_a_dot_for_every_arm_and_no_bar_where_there_is_no_interval():
    for seeds in (1, 3):
        left, right = plot_ablation(summarise(toy({0: 0.1, 1: 0.2, 2: 0.1}, seeds))).axes
        assert [len(line.get_xdata()) for line in left.get_lines()] == [3] * seeds
        assert len(right.collections) == 2 * seeds + (2 if seeds > 1 else 0)

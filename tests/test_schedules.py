"Schedules give the same examples in other orders: properties over drawn cycles, and the command for them."

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elson_nb.corpus.buckets import INDEX_SCHEMA
from elson_nb.corpus.records import make_record, write_jsonl
from elson_nb.corpus.taxonomy import load_taxonomy
from elson_nb.curriculum.sampling import SampleError, in_blocks, manifest, sample_phases
from elson_nb.curriculum.schedules import arrange, gated, learning_rate_span, passes, replay_share
from elson_nb.recipes import PHASES, SCHEDULES, TIERS, CurriculumConfig, load_recipe, reference_phases
from elson_nb.session.data import prepare_data
from elson_nb.session.doctor import dry_run
from elson_nb.session.ledger import Ledger

DOMAINS = ("accounting", "insurance", "gift_tax", "trusts", "fintech")
OTHER = tuple(s for s in SCHEDULES if s not in ("curriculum", "replay"))


def make_index(stock: dict[tuple[str, str], int]) -> pl.DataFrame:
    "An index with so many rows of each domain and tier."
    same = {"category": "", "source": "a.json", "offset": 0, "parent": "", "confidence": 1.0}
    same |= {"domain_because": "", "tier_because": ""}
    rows = [
        {"id": f"{d}-{t}-{n}", "domain": d, "tier": t, "n_tokens": 10 + 7 * n % 90, **same}
        for (d, t), count in stock.items()
        for n in range(count)
    ]
    return pl.DataFrame(rows, schema=INDEX_SCHEMA)


@st.composite
def cycles(draw):
    "A drawn cycle and its settings; small stocks, so that phases run short and repeat."
    cells = st.tuples(st.sampled_from(DOMAINS), st.sampled_from(TIERS))
    stock = draw(st.dictionaries(cells, st.integers(1, 9), min_size=2, max_size=12))
    config = CurriculumConfig(
        target_records=draw(st.integers(6, 60)),
        seed=draw(st.integers(0, 5)),
        shortfall=draw(st.sampled_from(("nearest", "undershoot", "repeat"))),
        reuse=draw(st.sampled_from(("prefer-unseen", "allow", "forbid"))),
    )
    index = make_index(stock)
    try:
        return index, config, sample_phases(index, reference_phases(), "all", config)
    except SampleError:  # nothing left for a phase
        assume(False)


def over(*strategies):
    "Run a test over examples, the same ones every time."
    return lambda test: settings(derandomize=True, deadline=None, max_examples=60)(given(*strategies)(test))


def order_of(samples) -> list[str]:
    return [i for sample in samples.values() for i in sample.rows["id"]]


def scheduled(samples, config, schedule, epochs=1):
    return arrange(samples, replace(config, schedule=schedule), epochs)


@over(cycles(), st.integers(1, 3))
def test_every_schedule_gives_every_record_as_often_as_the_curriculum(cycle, epochs):
    _, config, samples = cycle
    drawn = Counter(order_of(samples))
    for schedule in SCHEDULES:
        given = Counter(order_of(scheduled(samples, config, schedule, epochs)))
        times = epochs if schedule == "flat" else 1
        assert given == Counter({i: n * times for i, n in drawn.items()}), schedule


@over(cycles(), st.integers(1, 3))
def test_the_slots_have_the_sizes_they_should(cycle, epochs):
    _, config, samples = cycle
    sizes = [s.rows.height for s in samples.values()]
    given = lambda schedule: [s.rows.height for s in scheduled(samples, config, schedule, epochs).values()]
    assert given("curriculum") == given("replay") == given("shuffled") == sizes
    assert given("reversed") == sizes[::-1]
    assert given("flat") == [n * epochs for n in sizes]


@over(cycles(), st.integers(1, 3))
def test_every_pass_of_flat_holds_the_whole_cycle_in_another_order(cycle, epochs):
    _, config, samples = cycle
    order, size = order_of(scheduled(samples, config, "flat", epochs)), len(order_of(samples))
    whole = [order[n : n + size] for n in range(0, len(order), size)]
    assert all(Counter(part) == Counter(order_of(samples)) for part in whole)
    if len(set(order)) > 9:
        assert len({tuple(part) for part in whole}) == epochs


@over(cycles())
def test_reversed_is_the_cycle_read_backwards(cycle):
    _, config, samples = cycle
    turned = scheduled(samples, config, "reversed")
    assert order_of(turned) == order_of(samples)[::-1]
    assert list(turned) == list(PHASES)
    blocks = [
        d for d, before in zip(turned["C"].rows["domain"], [None, *turned["C"].rows["domain"]]) if d != before
    ]
    assert len(blocks) == len(set(blocks))  # phase A: still one block a domain
    assert blocks == list(dict.fromkeys(samples["A"].rows["domain"]))[::-1]
    tiers = [TIERS.index(t) for t in turned["C"].rows.filter(pl.col("domain") == blocks[0])["tier"]]
    assert tiers == sorted(tiers, reverse=True)


@over(cycles(), st.integers(1, 2), st.integers(0, 9))
def test_an_order_is_the_same_on_every_run_whatever_the_order_of_the_index(cycle, epochs, seed):
    index, config, samples = cycle
    again = sample_phases(
        index.sample(fraction=1.0, shuffle=True, seed=seed), reference_phases(), "all", config
    )
    for schedule in OTHER:
        one, two = (scheduled(s, config, schedule, epochs) for s in (samples, again))
        assert all(manifest(p, one[p].rows).equals(manifest(p, two[p].rows)) for p in PHASES)


def test_another_seed_gives_another_order_of_the_same_records():
    index = make_index({(d, t): 9 for d in DOMAINS for t in TIERS})
    samples = sample_phases(index, reference_phases(), "all", CurriculumConfig(90))
    for schedule in ("shuffled", "flat"):
        one, two = (
            order_of(arrange(samples, CurriculumConfig(90, seed=seed, schedule=schedule), 2))
            for seed in (1, 2)
        )
        assert one != two and Counter(one) == Counter(two)
    flat = order_of(arrange(samples, CurriculumConfig(90, schedule="flat"), 1))
    assert flat != order_of(arrange(samples, CurriculumConfig(90, schedule="shuffled"), 1))


def test_repeats_of_a_record_are_apart():
    index = make_index({(d, t): 1 for d in DOMAINS for t in TIERS})
    config = CurriculumConfig(200, shortfall="repeat", reuse="allow")
    samples = sample_phases(index, reference_phases(), "all", config)
    order = order_of(scheduled(samples, config, "shuffled"))
    assert len(order) == 200 and len(set(order)) == 20
    assert sum(a == b for a, b in zip(order, order[1:])) < 40  # in a random order about ten


def test_a_shuffle_mixes_the_phases_evenly():
    index = make_index({(d, t): 200 for d in DOMAINS for t in TIERS})
    samples = sample_phases(index, reference_phases(), "all", CurriculumConfig(1500))
    mixed = arrange(samples, CurriculumConfig(1500, schedule="shuffled"))
    for slot in PHASES:
        origins = Counter(r.rpartition(" ")[2] for r in mixed[slot].rows["reason"])
        for phase, sample in samples.items():
            expected = sample.rows.height / 1500
            assert abs(origins[phase] / mixed[slot].rows.height - expected) < 0.1


@over(cycles(), st.integers(1, 2))
def test_the_plan_of_a_slot_counts_what_is_in_the_slot(cycle, epochs):
    _, config, samples = cycle
    for schedule in SCHEDULES:
        for slot, sample in scheduled(samples, config, schedule, epochs).items():
            cells = Counter(sample.rows.select(pl.col("domain", "tier").cast(pl.String)).iter_rows())
            assert sample.plan.phase == slot and sample.plan.cells() == cells
            assert sample.plan.total == sample.rows.height <= sample.plan.target
            assert sum(sample.plan.asked.values()) == sample.plan.target
            table = sample.plan.table()
            assert table["achieved"].sum() == sample.rows.height
            assert table["asked"].sum() == pytest.approx(sample.plan.target)
            assert schedule not in OTHER or any(f"schedule {schedule}" in note for note in sample.plan.notes)


@over(cycles())
def test_the_origin_of_a_record_stands_in_its_reason(cycle):
    _, config, samples = cycle
    drawn = Counter(
        (i, f"{r}, drawn for phase {p}")
        for p, s in samples.items()
        for i, r in zip(s.rows["id"], s.rows["reason"])
    )
    for schedule in OTHER:
        arranged = scheduled(samples, config, schedule).values()
        assert Counter((i, r) for s in arranged for i, r in zip(s.rows["id"], s.rows["reason"])) == drawn


# ---- block order


def blocks_in(rows: pl.DataFrame, block_order) -> list[str]:
    ordered = in_blocks(rows.with_columns(place=pl.col("n_tokens"), copy=pl.lit(0)), block_order)[
        "domain"
    ].to_list()
    return list(dict.fromkeys(ordered))


SIZES = {"trusts": 1, "accounting": 5, "insurance": 3, "gift_tax": 3, "fintech": 2}
ROWS = make_index({(d, "easy"): n for d, n in SIZES.items()})
STANDING = [d for d in load_taxonomy() if d in SIZES]


def test_blocks_come_by_taxonomy_by_size_or_as_listed():
    tied = [d for d in STANDING if SIZES[d] == 3]
    assert blocks_in(ROWS, "taxonomy") == STANDING
    assert blocks_in(ROWS, "largest") == ["accounting", *tied, "fintech", "trusts"]
    assert blocks_in(ROWS, "smallest") == ["trusts", "fintech", *tied, "accounting"]
    listed = ["fintech", "derivatives", "trusts"]  # the second is not among the rows: no fault
    assert blocks_in(ROWS, listed) == ["fintech", "trusts", *(d for d in STANDING if d not in listed)]


def test_a_recipe_orders_the_blocks_it_draws():
    index = make_index({(d, t): 9 for d in DOMAINS for t in TIERS})
    phases = reference_phases()
    phases["A"] = replace(phases["A"], block_order=["trusts", "fintech"])
    rows = sample_phases(index, phases, "all", CurriculumConfig(90))["A"].rows
    assert list(dict.fromkeys(rows["domain"]))[:2] == ["trusts", "fintech"]


@pytest.mark.parametrize(
    "name, mend",
    [
        ("acounting", "did you mean 'accounting'"),
        ("wealth_management", "'financial_planning'"),
        ("qqqq", "taxonomy.yaml"),
    ],
)
@pytest.mark.parametrize("phase", ["A", "B"])
def test_a_domain_the_taxonomy_does_not_have_is_refused_by_name(name, mend, phase):
    phases = reference_phases()
    phases[phase] = replace(phases[phase], block_order=["trusts", name])
    with pytest.raises(SampleError) as refused:
        sample_phases(make_index({("trusts", "easy"): 9}), phases, "all", CurriculumConfig(6))
    assert f"'{name}'" in str(refused.value) and mend in str(refused.value)


# ---- what the trainer reads


def recipe_of(schedule: str, *more: str):
    return load_recipe("smoke", [f"curriculum.schedule={schedule}", *more])


def test_only_flat_has_one_pass_and_one_cycle_over_all_slots():
    sizes = {"A": 21, "B": 30, "C": 9}  # by 4: 6, 8 and 3 steps
    for schedule in SCHEDULES:
        recipe = recipe_of(schedule, "training.num_train_epochs=3")
        spans = [learning_rate_span(recipe, sizes, slot) for slot in PHASES]
        if schedule == "flat":
            assert passes(recipe) == 1 and spans == [(0, 17), (6, 17), (14, 17)]
        else:
            assert passes(recipe) == 3 and spans == [(0, 18), (0, 24), (0, 9)]
    halved = recipe_of(
        "flat", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"
    )
    assert learning_rate_span(halved, dict(reversed(sizes.items())), "C") == (14, 17)


def test_blocks_end_on_competence_only_where_there_are_blocks():
    assert [s for s in SCHEDULES if gated(recipe_of(s), "A")] == ["curriculum", "replay"]
    assert not gated(recipe_of("curriculum"), "B") and gated(
        recipe_of("curriculum", "phases.B.order=blocks"), "B"
    )
    assert not gated(recipe_of("replay", "training.competence.rule=none"), "A")


def test_replay_has_one_share():
    shares = lambda *more: {s: replay_share(recipe_of(s, *more)) for s in SCHEDULES}
    assert shares() == {"curriculum": 0, "flat": 0, "shuffled": 0, "reversed": 0, "replay": 0.1}
    set_to = shares("training.competence.replay=0.25")
    assert set_to == {"curriculum": 0.25, "flat": 0, "shuffled": 0, "reversed": 0, "replay": 0.25}


# ---- a run


def elson(*words: object) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).parent / "elson", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    rows = [
        make_record(f"{d} {t} {n}?", "An answer.", category=d, difficulty=t)
        for d in DOMAINS
        for t in TIERS
        for n in range(9)
    ]
    path = tmp_path_factory.mktemp("corpus") / "qa.jsonl"
    write_jsonl(path, rows)
    return path


def test_a_dry_run_forecasts_the_schedule(corpus, monkeypatch):
    twice = "training.num_train_epochs=2"
    monkeypatch.setattr("elson_nb.session.doctor.roof_here", lambda recipe: 1e11)  # measured anew, it differs
    plain, same = (dry_run(recipe_of(s, twice), [corpus]) for s in ("curriculum", "flat"))
    assert same["total"]["minutes"] == pytest.approx(plain["total"]["minutes"], abs=0.02)
    words = ("--corpus", corpus, "--set", twice, "--schedule", "flat", "--dry-run", "--json")
    flat = json.loads(elson("run", "--recipe", "smoke", *words).stdout)
    for slot in PHASES:
        assert flat["phases"][slot]["records"] == 2 * plain["phases"][slot]["records"]
        assert sum(flat["phases"][slot]["tiers"].values()) == flat["phases"][slot]["records"]
    assert flat["total"]["tokens"] == 2 * plain["total"]["tokens"]
    assert flat["total"]["steps"] <= plain["total"]["steps"]


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("--schedule", "sideways"), "use one of curriculum, flat, shuffled, reversed, replay"),
        (
            ("--schedule", "flat", "--resume", "."),
            "leave --recipe, --mix, --corpus, --schedule and --set away",
        ),
        (("--set", "phases.A.block_order=[acounting]"), "did you mean 'accounting'?"),
    ],
)
def test_a_wrong_schedule_ends_with_2_and_the_list(corpus, words, complaint):
    given = () if "--resume" in words else ("--recipe", "smoke", "--corpus", corpus, "--dry-run")
    done = elson("run", *given, *words)
    assert done.returncode == 2 and complaint in " ".join(done.stderr.split())


def test_step_0_writes_the_slots_of_the_schedule(corpus, tmp_path):
    recipes = {s: recipe_of(s) for s in ("curriculum", "reversed")}
    metrics, lines = {}, {}
    for schedule, recipe in recipes.items():
        ledger = Ledger.create(tmp_path / schedule, recipe, [corpus])
        metrics[schedule] = prepare_data(ledger)
        entries = metrics[schedule]["phases"]
        lines[schedule] = [
            json.loads(line)
            for p in PHASES
            for line in (ledger.folder / entries[p]["manifest"]).read_text("utf-8").splitlines()
        ]
    ids = {s: [line["id"] for line in lines[s]] for s in lines}
    assert ids["reversed"] == ids["curriculum"][::-1]
    assert [line["phase"] for line in lines["reversed"]] == sorted(
        line["phase"] for line in lines["reversed"]
    )
    assert lines["reversed"][0]["reason"].endswith("drawn for phase C")
    plain, turned = (metrics[s]["phases"] for s in ("curriculum", "reversed"))
    for slot, phase in zip("ABC", "CBA"):
        assert {k: turned[slot][k] for k in ("achieved", "asked", "records", "tokens")} == {
            k: plain[phase][k] for k in ("achieved", "asked", "records", "tokens")
        }
    assert "schedule reversed: the records of phase C, last first" in turned["A"]["notes"]

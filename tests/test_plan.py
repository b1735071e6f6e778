"Properties of plan and sample over random stocks, mixes and targets."

import json
import re
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elson_nb.corpus.buckets import INDEX_SCHEMA, build_buckets, load_index
from elson_nb.corpus.records import read_jsonl
from elson_nb.corpus.shares import apportion
from elson_nb.corpus.taxonomy import high_risk_domains, load_taxonomy
from elson_nb.curriculum.plan import ShortfallError, domain_cap, plan_cycle, plan_phase
from elson_nb.curriculum.queues import hold_out, rest_of
from elson_nb.curriculum.quotas import within_reach
from elson_nb.curriculum.sampling import SampleError, sample_phases, well_mixed, write_samples
from elson_nb.recipes import (
    PHASES,
    REUSES,
    SHORTFALLS,
    TIERS,
    CurriculumConfig,
    PhaseConfig,
    RecipeError,
    load_recipe,
    reference_phases,
)

HIGH_RISK = frozenset(high_risk_domains())
NORMAL = [name for name in load_taxonomy() if name not in HIGH_RISK]
DOMAINS = [*sorted(HIGH_RISK)[:2], *NORMAL[:3], "unheard_of"]
MANIFEST_KEYS = ["id", "position", "phase", "domain", "tier", "source", "tokens", "reason"]


def make_index(stock: dict[tuple[str, str], int]) -> pl.DataFrame:
    "An index with so many rows of each domain and tier; lengths of 10 to 99 tokens."
    same = {"source": "a.json", "offset": 0, "parent": "", "domain_because": "", "tier_because": ""}
    rows = [
        {
            "id": f"{domain}-{tier}-{n}",
            "domain": domain,
            "tier": tier,
            "category": domain,
            "n_tokens": 10 + 7 * n % 90,
            **same,
        }
        for (domain, tier), count in stock.items()
        for n in range(count)
    ]
    return pl.DataFrame(rows, schema=INDEX_SCHEMA)


def counts_of(rows: pl.DataFrame, *columns: str) -> Counter:
    return Counter(rows.select(columns).iter_rows())


def cells_of(rows: pl.DataFrame) -> dict[tuple[str, str], set[str]]:
    return {key: set(part["id"]) for key, part in rows.group_by("domain", "tier")}


def stocks(most: int = 12):
    "Records in each of a few cells, at least one record in all."
    cells = st.tuples(st.sampled_from(DOMAINS), st.sampled_from(TIERS))
    return st.dictionaries(cells, st.integers(0, most), min_size=1).filter(lambda stock: any(stock.values()))


def shares(keys):
    "Shares in whole parts, which sum to one."
    parts = st.lists(st.integers(0, 10), min_size=len(keys), max_size=len(keys)).filter(any)
    return parts.map(lambda part: {k: v / sum(part) for k, v in zip(keys, part, strict=True)})


def configs(caps=(0.1, 0.15, 0.25, 0.5, 1.0), weights=(1.0, 1.5, 2.0, 4.0)):
    return st.builds(
        PhaseConfig,
        st.just("any"),
        shares(TIERS),
        st.just(1.0),
        st.just("shuffled"),
        st.sampled_from(caps),
        st.sampled_from(weights),
    )


UNCAPPED = configs(caps=(1.0,))


def over(*strategies):
    "Run a test over examples, the same ones every time."
    return lambda test: settings(derandomize=True, deadline=None, max_examples=80)(given(*strategies)(test))


LOOSE = ("nearest", "undershoot", "repeat")


@over(
    stocks(), configs(), st.integers(1, 80), st.sampled_from(LOOSE), st.sampled_from(REUSES), st.floats(0, 1)
)
def test_a_plan_is_never_over_stock_target_or_cap(stock, config, target, shortfall, reuse, share):
    used = {cell: int(n * share) for cell, n in stock.items()}
    plan = plan_phase("B", config, target, stock, used, shortfall, reuse)
    for pool, limit in {
        "new": {cell: n - used[cell] if reuse != "allow" else n for cell, n in stock.items()},
        "seen": used if reuse == "prefer-unseen" else {},
        "repeat": {} if shortfall != "repeat" else {cell: 10**6 for cell in stock},
    }.items():
        assert all(n <= limit.get(cell, 0) for cell, n in plan.cells(pool).items())
    assert sum(plan.cells().values()) == plan.total <= target
    domains = {d for (d, _), n in stock.items() if n}
    cap, _ = domain_cap(config.max_domain_share, target, len(domains))
    assert all(n <= cap for n in plan.domains().values())
    if config.max_domain_share * len(domains) >= 1:  # the cap can hold
        assert all(n <= max(1, config.max_domain_share * target + 1e-9) for n in plan.domains().values())
    if shortfall != "nearest":
        assert all(plan.achieved[t] <= plan.asked[t] for t in TIERS)


@over(stocks(), configs(), st.integers(1, 60), st.sampled_from(SHORTFALLS))
def test_tier_totals_are_exact_exactly_when_stock_and_cap_allow(stock, config, target, shortfall):
    names = sorted({d for (d, _), n in stock.items() if n})
    cap, raised = domain_cap(config.max_domain_share, target, len(names))
    asked = apportion(target, {t: config.mix[t] for t in TIERS})
    table = np.array([[stock.get((d, t), 0) for t in TIERS] for d in names])
    feasible = within_reach(np.array(list(asked.values())), table, cap)
    try:
        plan = plan_phase("A", config, target, stock, None, shortfall)
    except ShortfallError as error:
        assert shortfall == "strict" and (raised or not feasible) and "phase A: " in str(error)
        return
    if shortfall == "strict":
        assert feasible and not raised
    if feasible:
        assert plan.achieved == asked == plan.asked and plan.total == target and plan.notes == raised
    elif shortfall != "repeat":
        assert len(plan.notes) > len(raised) and plan.achieved != asked


@over(stocks(), configs(), st.integers(1, 80))
def test_nearest_fills_whatever_stock_and_cap_can_give(stock, config, target):
    plan = plan_phase("A", config, target, stock, None, "nearest")
    per_domain = Counter()
    for (domain, _), n in stock.items():
        per_domain[domain] += n
    cap, _ = domain_cap(config.max_domain_share, target, sum(n > 0 for n in per_domain.values()))
    assert plan.total == min(target, sum(min(cap, n) for n in per_domain.values()))


@over(stocks(), UNCAPPED, st.integers(1, 80))
def test_repeat_gives_every_tier_that_has_a_record_at_all(stock, config, target):
    plan = plan_phase("A", config, target, stock, None, "repeat")
    in_stock = {t: sum(n for (_, u), n in stock.items() if u == t) for t in TIERS}
    assert plan.achieved == {t: plan.asked[t] if in_stock[t] else 0 for t in TIERS}
    again = plan.cells("repeat")
    assert all(
        plan.cells("new").get(cell) == stock[cell] for cell in again
    )  # only what is used up comes again
    for tier in TIERS:  # no record comes more often than the fewest rounds need
        times = [-(-n // stock[cell]) for cell, n in plan.cells().items() if cell[1] == tier]
        if in_stock[tier] and max(times, default=0) > 1:
            assert max(times) <= -(-target // min(n for n in in_stock.values() if n)) + 1


def test_no_record_is_repeated_more_often_than_another_needs():
    "Twelve records for twenty-four: each comes twice, however few its domain has."
    stock = {(DOMAINS[0], "easy"): 2, (DOMAINS[1], "easy"): 10}
    plan = plan_phase("A", PhaseConfig("one tier", {"easy": 1.0}, 1.0), 24, stock, None, "repeat")
    assert plan.cells() == {cell: 2 * n for cell, n in stock.items()}
    rows = draw(make_index(stock), PhaseConfig("one tier", {"easy": 1.0}, 1.0), 24, shortfall="repeat").rows
    assert set(Counter(rows["id"]).values()) == {2}


def test_the_harder_neighbour_fills_a_shortfall_before_the_easier():
    stock = {(DOMAINS[0], t): 20 for t in ("easy", "hard")} | {(DOMAINS[0], "medium"): 4}
    plan = plan_phase("A", PhaseConfig("one tier", {"medium": 1.0}, 1.0), 30, stock)
    assert plan.achieved == {"easy": 6, "medium": 4, "hard": 20, "extremely_complex": 0}


@over(stocks(60), UNCAPPED, st.integers(2, 120))
def test_a_cell_does_not_shrink_when_more_is_asked_for(stock, config, target):
    "But for one record of rounding, where the mix can be met at both targets and no cap binds."
    less, more = (plan_phase("B", config, n, stock, None, "undershoot") for n in (target - 1, target))
    if less.total == target - 1 and more.total == target:
        assert all(more.cells().get(cell, 0) >= n - 1 for cell, n in less.cells().items())


@over(stocks(), configs(weights=(1.0,)), st.integers(1, 60), st.sampled_from([1.5, 2.0, 4.0]))
def test_weight_never_lowers_the_share_of_high_risk(stock, config, target, weight):
    risky = lambda config: sum(
        n for d, n in plan_phase("C", config, target, stock).domains().items() if d in HIGH_RISK
    )
    assert risky(replace(config, high_risk_weight=weight)) >= risky(config)


def test_weight_is_the_ratio_of_records_when_there_is_plenty():
    stock = {(d, t): 100 for d in DOMAINS for t in TIERS}
    config = reference_phases()["C"]
    assert config.high_risk_weight == 4
    plan = plan_phase("C", config, 240, stock)  # two high-risk domains and four others
    assert {plan.domains()[d] for d in HIGH_RISK & set(DOMAINS)} == {80}
    assert {plan.domains()[d] for d in set(DOMAINS) - HIGH_RISK} == {20}


def draw(index, config, target, seed=7, order="shuffled", max_length=None, shortfall="nearest"):
    phases = {"B": replace(config, order=order)}
    curriculum = CurriculumConfig(target, seed=seed, shortfall=shortfall)
    return sample_phases(index, phases, "B", curriculum, max_length)["B"]


@over(stocks(), configs(), st.integers(1, 40), st.sampled_from(["shuffled", "blocks"]), st.integers(0, 99))
def test_the_order_of_the_index_does_not_matter(stock, config, target, order, seed):
    index = make_index(stock)
    shuffled = index.sample(fraction=1.0, shuffle=True, seed=seed)
    first, second = (draw(i, config, target, seed, order) for i in (index, shuffled))
    assert first.rows.equals(second.rows) and first.plan == second.plan
    held = [hold_out(i, target, seed) for i in (index, shuffled)]
    assert held[0].equals(held[1])


@over(stocks(), configs(), st.integers(1, 40), st.integers(0, 40), st.integers(0, 99))
def test_a_cell_gives_the_first_of_one_queue_whatever_the_target(stock, config, target, more, seed):
    index = make_index(stock)
    fewer, many = (cells_of(draw(index, config, n, seed).rows) for n in (target, target + more))
    for cell in fewer.keys() & many.keys():
        small, large = sorted((fewer[cell], many[cell]), key=len)
        assert small <= large


@over(stocks(), st.sampled_from(TIERS), st.integers(1, 40), st.integers(0, 40))
def test_a_smaller_target_is_a_subset_of_a_larger_one(stock, tier, target, more):
    stock |= {(DOMAINS[0], tier): 5}
    config = PhaseConfig("one tier", {tier: 1.0}, 1.0)
    small, large = (cells_of(draw(make_index(stock), config, n).rows) for n in (target, target + more))
    assert all(ids <= large[cell] for cell, ids in small.items())


def test_a_plan_is_as_even_as_possible():
    stock = {(d, t): 50 for d in DOMAINS for t in TIERS} | {(DOMAINS[0], t): 1 for t in TIERS}
    domains = plan_phase("A", load_recipe("h100").phases["A"], 104, stock).domains()
    assert domains.pop(DOMAINS[0]) == 4 and set(domains.values()) == {20}


@over(stocks(25), st.integers(0, 60), st.integers(0, 99))
def test_a_cell_never_gives_more_than_a_fifth_to_the_held_out_set(stock, count, seed):
    index = make_index(stock)
    held = hold_out(index, count, seed)
    allowed = {cell: n // 5 for cell, n in stock.items()}
    assert all(n <= allowed[cell] for cell, n in counts_of(held, "domain", "tier").items())
    assert held.height == min(count, sum(allowed.values())) == held["id"].n_unique()
    assert held.columns == index.columns


@over(stocks(25), st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_no_phase_trains_on_the_held_out_set(stock, count, target, seed):
    index = make_index(stock)
    held = hold_out(index, count, seed)
    rest = rest_of(index, held)
    assert rest.height == index.height - held.height
    phases = three_phases(PhaseConfig("even", dict.fromkeys(TIERS, 0.25), 1.0))
    samples = sample_phases(rest, phases, "all", CurriculumConfig(target + len(PHASES), seed=seed))
    assert not set(held["id"]) & {i for sample in samples.values() for i in sample.rows["id"]}


@over(stocks(25), st.integers(1, 60), st.integers(0, 99), st.randoms(use_true_random=False))
def test_augmented_records_stay_on_the_side_of_their_parents(stock, count, seed, rng):
    index = make_index(stock)
    ids = index["id"].to_list()
    originals = set(ids[::2])
    parents = ["" if i in originals else rng.choice(sorted(originals)) for i in ids]
    index = index.with_columns(pl.Series("parent", parents, dtype=pl.String))
    held = hold_out(index, count, seed)
    rest = rest_of(index, held)
    assert set(held["parent"]) <= {""} and set(held["id"]) <= originals
    assert not set(rest["parent"]) & set(held["id"]) and not set(rest["id"]) & set(held["id"])
    lost = index.filter(~pl.col("id").is_in([*rest["id"], *held["id"]]))
    assert set(lost["parent"]) <= set(held["id"])  # nothing else is left out


def three_phases(config: PhaseConfig) -> dict[str, PhaseConfig]:
    return {p: replace(config, share=s) for p, s in zip(PHASES, (0.25, 0.5, 0.25), strict=True)}


@over(stocks(4), UNCAPPED, st.integers(4, 60), st.integers(0, 99))
def test_phases_share_no_record_when_the_stock_suffices(stock, config, target, seed):
    targets = apportion(target, {"A": 0.25, "B": 0.5, "C": 0.25})
    asked = [apportion(n, config.mix) for n in targets.values()]
    for n, tier in enumerate(TIERS):  # exactly enough in one cell, whatever the others hold
        stock[DOMAINS[n], tier] = sum(a[tier] for a in asked)
    curriculum = CurriculumConfig(target, seed=seed)
    samples = sample_phases(make_index(stock), three_phases(config), "all", curriculum)
    ids = [i for sample in samples.values() for i in sample.rows["id"]]
    assert len(ids) == len(set(ids)) == target
    assert {p: s.rows.height for p, s in samples.items()} == targets


@over(stocks(6), configs(), st.integers(8, 60), st.sampled_from(LOOSE), st.sampled_from(REUSES))
def test_rows_are_the_plan_and_reuse_is_as_its_policy_says(stock, config, target, shortfall, reuse):
    stock |= {(DOMAINS[2], t): 9 for t in TIERS}
    curriculum = CurriculumConfig(target, shortfall=shortfall, reuse=reuse)
    phases = three_phases(config)
    try:
        samples = sample_phases(make_index(stock), phases, "all", curriculum)
    except SampleError as error:
        assert "got no record" in str(error)
        return
    plans = plan_cycle({cell: n for cell, n in stock.items() if n}, phases, curriculum)
    seen = set()
    for name, sample in samples.items():
        ids = Counter(sample.rows["id"])
        assert sample.plan == plans[name] and ids.total() == sample.plan.total
        assert counts_of(sample.rows, "domain", "tier") == sample.plan.cells()
        again = sample.rows.filter(pl.col("reason").str.ends_with(", used in an earlier phase"))
        repeated = sample.rows.filter(pl.col("reason").str.ends_with(", repeated"))
        assert repeated.height == ids.total() - len(ids) and (shortfall == "repeat" or not repeated.height)
        if reuse == "forbid":
            assert not set(ids) & seen
        if reuse == "prefer-unseen":
            assert set(again["id"]) == set(ids) & seen
        seen |= set(ids)


def test_under_allow_a_phase_is_drawn_as_if_alone():
    index = make_index({(d, t): 20 for d in DOMAINS for t in TIERS})
    curriculum = CurriculumConfig(200, reuse="allow")
    phases = three_phases(reference_phases()["B"])
    together = sample_phases(index, phases, "all", curriculum)
    alone = sample_phases(index, phases, "B", replace(curriculum, target_records=100))
    assert together["B"].rows.equals(alone["B"].rows)
    assert set(together["A"].rows["id"]) & set(together["B"].rows["id"])


@over(st.integers(30, 200), st.integers(0, 150), st.integers(0, 99))
def test_a_smaller_cycle_stays_inside_a_larger_one(target, more, seed):
    "Every record of the small cycle is in the large one, in its phase unless an earlier phase took it."
    index = make_index({(d, t): 60 for d in DOMAINS for t in TIERS})
    phases = three_phases(PhaseConfig("even", dict.fromkeys(TIERS, 0.25), 1.0))
    target, more = target // 96 * 96 + 96, more // 96 * 96  # whole numbers in every cell: nothing is rounded
    small, large = (
        sample_phases(index, phases, "all", CurriculumConfig(n, seed=seed)) for n in (target, target + more)
    )
    before = set()
    for name in PHASES:
        before |= set(large[name].rows["id"])
        assert set(small[name].rows["id"]) <= before


@over(stocks(30), st.integers(0, 99))
def test_neighbours_differ_in_domain_wherever_the_counts_allow_it(stock, seed):
    rows = make_index(stock).with_columns(pl.lit(0).alias("copy"))
    mixed = well_mixed(rows, seed, "order of B")
    assert sorted(mixed["id"]) == sorted(rows["id"])
    counts = Counter(rows["domain"])
    same = sum(a == b for a, b in zip(mixed["domain"], mixed["domain"][1:]))
    assert same == max(0, 2 * max(counts.values()) - rows.height - 1)  # no order has fewer


def test_every_stretch_of_a_mixed_phase_holds_its_share_of_every_domain():
    rows = make_index({(d, "easy"): 30 * (n + 1) for n, d in enumerate(DOMAINS)})
    mixed = well_mixed(rows.with_columns(pl.lit(0).alias("copy")), 1, "order of B")
    for n, domain in enumerate(DOMAINS):
        share = 30 * (n + 1) / rows.height
        held = [Counter(mixed["domain"][at : at + 63])[domain] for at in range(0, rows.height, 63)]
        assert all(abs(h - 63 * share) <= 3 for h in held)


@over(stocks(), configs(), st.integers(1, 40))
def test_blocks_are_one_domain_at_a_time_from_easy_to_hard(stock, config, target):
    rows = draw(make_index(stock), config, target, order="blocks").rows
    place = {name: n for n, name in enumerate([*load_taxonomy(), "unheard_of"])}
    keys = [(place[d], TIERS.index(t)) for d, t in rows.select("domain", "tier").iter_rows()]
    assert keys == sorted(keys)


@over(stocks(), configs(), st.integers(1, 40), st.integers(10, 99))
def test_longer_records_are_left_out(stock, config, target, max_length):
    index = make_index(stock)
    usable = index.filter(pl.col("n_tokens") <= max_length)
    sample = draw(index, config, target, max_length=max_length)
    assert sample.rows["n_tokens"].max() <= max_length
    assert sample.rows.equals(draw(usable, config, target).rows)


def test_an_index_of_long_records_alone_is_refused():
    with pytest.raises(SampleError, match="within 9 tokens.*shortest has 10.*training.max_length"):
        draw(make_index({(DOMAINS[0], "easy"): 3}), load_recipe("smoke").phases["B"], 3, max_length=9)


def test_another_seed_draws_other_records():
    index = make_index({(d, t): 30 for d in DOMAINS for t in TIERS})
    config = load_recipe("smoke").phases["A"]
    one, two = (draw(index, config, 60, seed) for seed in (1, 2))
    assert one.plan == two.plan and set(one.rows["id"]) != set(two.rows["id"])


def test_new_records_come_before_seen_ones():
    index = make_index({(DOMAINS[0], "easy"): 10})
    phases = {p: PhaseConfig("one tier", {"easy": 1.0}, s) for p, s in zip(PHASES, (0.5, 0.4, 0.1))}
    samples = sample_phases(index, phases, "all", CurriculumConfig(14))
    first, second = (set(samples[p].rows["id"]) for p in "AB")
    assert (len(first), len(second), len(first & second)) == (7, 6, 3)
    assert samples["B"].plan.notes == ["easy: 3 of 6 were used in an earlier phase"]


NO_EXTREME = {
    "nearest": ({"hard": 65, "extremely_complex": 0}, "30 taken from hard"),
    "undershoot": ({"hard": 35, "extremely_complex": 0}, "the phase is 30 records smaller"),
    "repeat": ({"hard": 35, "extremely_complex": 0}, "the phase is 30 records smaller"),
}


@pytest.mark.parametrize("shortfall", NO_EXTREME)
def test_a_corpus_without_the_hardest_tier_under_each_policy(shortfall):
    stock = {(d, t): 40 for d in DOMAINS for t in TIERS[:3]}
    plan = plan_phase("C", reference_phases()["C"], 100, stock, None, shortfall)
    tiers, said = NO_EXTREME[shortfall]
    assert {t: plan.achieved[t] for t in tiers} == tiers
    assert said in plan.notes[0] and "asked 30, 30 short (stock 0)" in plan.notes[0]
    with pytest.raises(ShortfallError, match="asked 30, 30 short .stock 0.*another policy"):
        plan_phase("C", reference_phases()["C"], 100, stock, None, "strict")


def test_a_mix_file_changes_what_a_recipe_draws(tmp_path):
    mix = tmp_path / "mine.yaml"
    mix.write_text(
        "curriculum: {target_records: 60, reuse: forbid}\n"
        "phases: {C: {mix: {easy: 0.25, medium: 0.25, hard: 0.5}, max_domain_share: 0.4}}\n"
    )
    recipe = load_recipe("laptop", ["curriculum.seed=3"], mix)
    index = make_index({(d, t): 30 for d in DOMAINS for t in TIERS})
    rows = sample_phases(index, recipe.phases, "C", recipe.curriculum)["C"].rows
    assert counts_of(rows, "tier") == {("easy",): 15, ("medium",): 15, ("hard",): 30}
    assert recipe.curriculum.reuse == "forbid" and recipe.phases["B"] == load_recipe("laptop").phases["B"]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("phases: {B: {mix: {easy: 0.5, hard: 0.48}}}", "sums to 98%; its shares must sum to 100%"),
        ("phases: {B: {mix: {easy: 1.5, hard: -0.5}}}", "negative share"),
        ("phases: {B: {mix: {easy: 0.5, tough: 0.5}}}", "the tier 'tough'"),
        ("phases: {D: {share: 1}}", "there is no setting 'D'"),
        ("phase: {}", "mine.yaml: there is no setting 'phase'; did you mean 'phases'"),
        ("curriculum: {target_record: 5}", "did you mean 'target_records'"),
        ("curriculum: {corpus_scale: 0.5}", "there is no setting 'corpus_scale'"),
        ("curriculum: {reuse: never}", "use one of prefer-unseen, allow, forbid"),
        ("curriculum: [1]", "curriculum must be a mapping"),
        ("- 1", "must hold a mapping"),
        ("a: [", "not readable YAML"),
    ],
)
def test_a_bad_mix_file_is_refused_by_name(tmp_path, text, complaint):
    mix = tmp_path / "mine.yaml"
    mix.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(complaint)):
        load_recipe("laptop", [], mix)


@pytest.fixture(scope="module")
def buckets():
    "Buckets of 120 short records, read from a file as a person would bring it."
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "corpus.jsonl"
        rows = [
            {
                "instruction": f"What is {n} plus {n}?",
                "output": f"It is {2 * n}. " * (n % 5 + 1),
                "domain": DOMAINS[n % 5],
                "difficulty": TIERS[n % 4],
            }
            for n in range(120)
        ]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert build_buckets([source], Path(folder) / "out")["records"] == 120
        yield Path(folder) / "out"


def test_manifest_and_merged_file_agree_line_by_line(buckets, tmp_path):
    index, recipe = load_index(buckets), load_recipe("smoke")
    samples = sample_phases(index, recipe.phases, "all", CurriculumConfig(60))
    written = write_samples(samples, buckets, tmp_path, stamp="20260101_000000")
    assert sorted(p.name for p in (tmp_path / "curriculum_runs").iterdir()) == sorted(
        f"{kind}_phase{p}_20260101_000000.jsonl" for kind in ("manifest", "merged") for p in PHASES
    )
    tokens = dict(index.select("id", "n_tokens").iter_rows())
    for phase, info in written.items():
        manifest, merged = (list(read_jsonl(info[kind])) for kind in ("manifest", "merged"))
        assert all(list(line) == MANIFEST_KEYS for line in manifest)
        assert [line["position"] for line in manifest] == list(range(info["records"]))
        assert {line["phase"] for line in manifest} == {phase}
        assert [line["id"] for line in manifest] == [record["id"] for record in merged]
        cells = [(record["domain"], record["difficulty"]) for record in merged]
        assert [(line["domain"], line["tier"]) for line in manifest] == cells
        assert all(line["tokens"] == tokens[line["id"]] for line in manifest)
        assert info["tokens"] == sum(line["tokens"] for line in manifest)

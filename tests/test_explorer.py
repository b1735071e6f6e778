"The tier-mix explorer: its arithmetic, its figure, its page in one process, and the page in a real browser."

import io
import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from elson_nb.corpus.buckets import build_buckets
from elson_nb.corpus.records import TIERS, make_record, write_jsonl
from elson_nb.corpus.synthesis import build_records
from elson_nb.corpus.taxonomy import load_taxonomy
from elson_nb.curriculum.plan import plan_cycle, plan_phase
from elson_nb.recipes import PHASES, RecipeError, load_recipe
from elson_nb.session import explorer, explorer_figure, explorer_view
from elson_nb.session.explorer import as_recipe, rebalance, state_of

sys.path.insert(0, str(Path(__file__).parent))
import lab_page  # noqa: E402

HOSTILE = (
    '<script>window.__pwned = 1</script><img src=x onerror="window.__pwned = 2"></td></script>'
    "<script>window.__pwned = 3</script> costs $5 and $6, $\\LaTeX$ \\(x^2\\) &lt;b&gt; "
)
BASE = load_recipe("h100")
fast = settings(derandomize=True, max_examples=60, deadline=None)
percents = st.integers(0, 100)
tiers = st.sampled_from(TIERS)


@st.composite
def mixes(draw):
    "Four whole percents that sum to 100."
    cuts = sorted(draw(percents) for _ in range(3))
    return dict(zip(TIERS, np.diff([0, *cuts, 100]).tolist()))


@st.composite
def states(draw):
    each = lambda values: {phase: draw(values) for phase in PHASES}
    return explorer.MixState(
        mixes=each(mixes()),
        targets=each(st.integers(1, 9_999)),
        caps=each(st.integers(1, 100)),
        seed=draw(st.integers(0, 99)),
        shortfall=draw(st.sampled_from(["nearest", "undershoot", "repeat"])),
        reuse=draw(st.sampled_from(["allow", "prefer-unseen", "forbid"])),
    )


@pytest.fixture(scope="module")
def buckets(tmp_path_factory) -> Path:
    "Small buckets in which every question and every answer is hostile."
    folder = tmp_path_factory.mktemp("explorer")
    records = [
        make_record(
            HOSTILE + r["instruction"],
            HOSTILE + r["output"],
            category=r["category"],
            difficulty=r["difficulty"],
        )
        for r in build_records(scale=0.03)
    ]
    write_jsonl(folder / "hostile.jsonl", records)
    build_buckets([folder / "hostile.jsonl"], folder / "buckets")
    return folder / "buckets"


@pytest.fixture(scope="module")
def shelves(buckets):
    return explorer.open_shelves(buckets)


# -- four shares ---------------------------------------------------------------------------------


@fast
@given(mixes(), tiers, st.integers(-50, 200))
def test_a_moved_mix_sums_to_100_and_keeps_the_order_of_the_others(mix, tier, value):
    moved = rebalance(mix, tier, value)
    assert sum(moved.values()) == 100 and list(moved) == list(TIERS)
    assert moved[tier] == min(max(value, 0), 100) and all(0 <= n <= 100 for n in moved.values())
    assert rebalance(moved, tier, value) == moved
    others = [t for t in TIERS if t != tier]
    if any(mix[t] for t in others):
        left, whole = 100 - moved[tier], sum(mix[t] for t in others)
        assert all(
            abs(moved[t] - mix[t] * left / whole) < 1 for t in others
        )  # largest remainder: less than one off


@fast
@given(states(), st.sampled_from(PHASES), tiers, st.lists(percents, min_size=1, max_size=30), percents)
def test_the_way_of_a_slider_does_not_matter(state, phase, tier, way, end):
    dragged = state
    for value in [*way, end]:
        dragged = dragged.with_tier(phase, tier, value)
    assert dragged.mixes == state.with_tier(phase, tier, end).mixes
    assert dragged.with_tier(phase, tier, state.mixes[phase][tier]).mixes == state.mixes


def test_another_slider_starts_from_what_it_finds():
    state = state_of(BASE).with_tier("A", "easy", 80).with_tier("A", "hard", 50)
    assert state.mixes["A"]["hard"] == 50 and state.mixes["A"]["easy"] == round(80 * 50 / 93)


# -- state and recipe ----------------------------------------------------------------------------


@fast
@given(states())
def test_a_state_survives_the_recipe_and_its_targets_are_those_of_the_plan(state):
    recipe = as_recipe(state, BASE)
    assert state_of(recipe) == state
    assert recipe.phases["C"].high_risk_weight == BASE.phases["C"].high_risk_weight
    plans = plan_cycle({("audit", tier): 5 for tier in TIERS}, recipe.phases, recipe.curriculum)
    assert {phase: plan.target for phase, plan in plans.items()} == state.targets


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [("targets", 0, "target of phase B is 0"), ("targets", -3, "is -3"), ("targets", 10**9, "to 1,000,000")]
    + [("caps", 0, "cap of phase B is 0%"), ("caps", 101, "from 1% to 100%")],
)
def test_a_number_that_cannot_be_is_refused_in_words(part, value, words):
    state = state_of(BASE)
    with pytest.raises(RecipeError, match=re.escape(words)):
        as_recipe(replace(state, **{part: getattr(state, part) | {"B": value}}), BASE)


def test_a_saved_mix_comes_back_and_says_when_it_replaces(tmp_path):
    recipe = as_recipe(state_of(BASE).with_tier("B", "hard", 77), BASE)
    assert explorer.keep_mix(recipe, "my_mix.yaml", tmp_path) == f"saved {tmp_path / 'my_mix.yaml'}"
    assert explorer.keep_mix(recipe, "my_mix.yaml", tmp_path).startswith("replaced ")
    assert state_of(load_recipe("h100", mix=tmp_path / "my_mix.yaml")) == state_of(recipe)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".yaml",
        "a.yml/",
        "../a.yaml",
        "/tmp/a.yaml",
        "a\\b.yaml",
        "a.txt",
        "a b.yaml",
        "a\n.yaml",
        "ä.yaml",
        "~.yaml",
    ],
)
def test_a_bad_file_name_is_refused_and_nothing_written(name, tmp_path):
    with pytest.raises(RecipeError, match="cannot name a mix file"):
        explorer.keep_mix(BASE, name, tmp_path)
    assert not list(tmp_path.iterdir())


@fast
@given(st.text(max_size=12).map(lambda stem: stem + ".yaml"))
def test_a_name_that_is_taken_stays_in_its_folder(name):
    try:
        path = explorer.mix_path(name, "/somewhere")
    except RecipeError:
        return
    assert path.parent == Path("/somewhere") and path.name == name and not name.startswith((".", "-"))


@pytest.mark.parametrize("content", ["bread: 2\n", "- a list\n", "{", "curriculum: {seed: x}\n"])
def test_a_file_that_is_no_mix_is_never_replaced(content, tmp_path):
    (tmp_path / "notes.yaml").write_text(content)
    with pytest.raises(RecipeError, match="notes"):
        explorer.keep_mix(BASE, "notes.yaml", tmp_path)
    assert (tmp_path / "notes.yaml").read_text() == content


@pytest.mark.parametrize("name", ["plain", "with space", "quote'd", "dollar$HOME", "semi;colon"])
def test_the_command_survives_a_shell(name, tmp_path):
    words = shlex.split(explorer.sample_command(tmp_path / name, tmp_path / name / "m.yaml"))
    folder = str(tmp_path / name)
    assert words == [
        "elson",
        "sample",
        "--buckets",
        folder,
        "--mix",
        f"{folder}/m.yaml",
        "--out",
        f"{folder}/m_sample",
    ]


# -- what follows from a mix ---------------------------------------------------------------------


def test_a_forecast_of_whole_cells_is_exact(shelves):
    domain = min(shelves.stock)[0]
    stock = {(domain, t): shelves.stock.get((domain, t), 0) for t in TIERS}
    total = sum(stock.values())
    everything = replace(BASE.phases["A"], mix={t: stock[domain, t] / total for t in TIERS})
    rows = shelves.index.filter(pl.col("domain").cast(pl.String) == domain)
    assert (
        explorer.tokens_of(plan_phase("A", everything, total, stock), shelves) == rows["n_tokens"].sum() > 0
    )


def test_the_forecast_is_that_of_the_recipe(shelves):
    recipes = {name: load_recipe(name) for name in explorer.FORECAST_RECIPES}
    plans = explorer.plans_of(as_recipe(explorer.first_state(BASE, shelves), BASE), shelves)
    for row in explorer.forecast_rows(plans, "B", shelves, recipes):
        budget, training = recipes[row["recipe"]].budget, recipes[row["recipe"]].training
        minutes = (
            explorer.tokens_of(plans["B"], shelves)
            * training.num_train_epochs
            / budget.tokens_per_second
            / 60
        )
        assert row["minutes"] == pytest.approx(minutes, abs=0.006)
        assert row["usd"] == pytest.approx(minutes / 60 * budget.usd_per_hour, abs=0.006)
    assert "assumption" in explorer.FORECAST_RECIPES["h100"]


@fast
@given(st.lists(tiers, min_size=1, max_size=200), st.integers(1, 15))
def test_rows_to_read_stand_for_all(found, count):
    places = explorer.spread_places(found, count)
    assert places == sorted(set(places)) and len(places) == min(count, len(found))
    shown = [found[n] for n in places]
    assert all(abs(shown.count(t) - len(shown) * found.count(t) / len(found)) < 1 for t in TIERS)


def test_another_seed_shows_other_records(shelves):
    state = explorer.first_state(BASE, shelves)
    pages = [explorer.samples(shelves, as_recipe(replace(state, seed=seed), BASE), "B") for seed in (1, 1, 2)]
    assert pages[0].equals(pages[1]) and not pages[0].equals(pages[2]) and pages[0].height == 12


# -- text that stays text ------------------------------------------------------------------------


def tags(page: str) -> list[str]:
    "Start tags of a page, as a browser would see them."
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(page)
    return found


@fast
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.just(HOSTILE))
def test_no_text_becomes_markup(text):
    rows = lambda value: [{"what": value, "default": value, "yours": "", "achieved": value}]
    for make in (lambda v: explorer_view.comparison_html(rows(v)), lambda v: explorer_view.words_html([v])):
        assert tags(make(text)) == tags(make("harmless"))


@pytest.mark.parametrize(
    "text", [HOSTILE, "</table><b>", "<!--", "]]>", '"><svg onload=x>', "\u2028</script>"]
)
def test_no_record_becomes_markup(text):
    make = lambda v: explorer_view.table_html(
        pl.DataFrame({"domain": [v], "tier": [v], "question": [v], "answer": [v]})
    )
    assert tags(make(text)) == tags(make("harmless"))


# -- the figure ----------------------------------------------------------------------------------


@fast
@given(st.sets(st.sampled_from(sorted(load_taxonomy()) + ["$x^{$", "not in the taxonomy"]), min_size=1))
def test_every_domain_stands_once_below_its_parent(domains):
    lines = explorer_figure.lines_of(sorted(domains))
    blocks = explorer_figure.blocks_of(lines)
    flat = [name for block in blocks for kind, name in block if kind == "domain"]
    assert flat == [name for kind, name in lines if kind == "domain"] and set(flat) == domains
    assert len(blocks) <= 3 and all(block[0][0] == "parent" and block[-1][0] == "domain" for block in blocks)
    boxes = explorer_figure.cell_boxes(blocks)
    everything = [box for cells in boxes.values() for box in cells.values()]
    assert len(everything) == len(set(everything)) == 12 * len(domains)
    assert all(0 <= x < r <= explorer_figure.WIDTH and 0 <= y < b for x, y, r, b in everything)


def pixels(figure) -> np.ndarray:
    return np.asarray(figure.canvas.buffer_rgba()).copy()


def test_redrawing_leaves_nothing_of_the_plan_before():
    stock = {(d, t): 30 for d in ("audit", "pensions", "$x^{$ & <b>") for t in TIERS} | {("audit", "hard"): 0}
    plans = [
        plan_phase("C", BASE.phases[phase], target, stock)
        for phase, target in (("A", 300), ("C", 40), ("A", 300))
    ]
    figure, shown = explorer_figure.MixFigure(stock), []
    for plan in plans:
        figure.draw(plan)
        shown.append(pixels(figure))
    assert (shown[0] == shown[2]).all() and (shown[0] != shown[1]).any()
    fresh = explorer_figure.MixFigure(stock)
    fresh.draw(plans[1])
    assert (pixels(fresh) == shown[1]).all()


def test_the_few_colours_of_the_picture_are_those_that_were_drawn(shelves):
    figure = explorer_figure.MixFigure(shelves.stock)
    for phase, plan in explorer.plans_of(
        as_recipe(explorer.first_state(BASE, shelves), BASE), shelves
    ).items():
        figure.draw(plan)
        with Image.open(io.BytesIO(figure.png())) as picture:
            shown = np.asarray(picture.convert("RGB")).astype(int)
        off = np.abs(shown - pixels(figure)[..., :3]).max(axis=2)
        assert off.max() < 40 and (off > 8).mean() < 0.002, phase  # rims of marks
        drawn = pixels(figure)[..., :3]
        assert all(
            (shown[(drawn == exact).all(axis=2)] == exact).all()
            for exact in ((255, 255, 255), (243, 244, 246))
        )


def test_a_cell_has_the_colour_of_its_count():
    stock = {("audit", t): n for t, n in zip(TIERS, (50, 50, 0, 50))} | {("pensions", t): 50 for t in TIERS}
    plan = plan_phase("A", replace(BASE.phases["A"], mix=dict(zip(TIERS, (0.0, 0.2, 0.4, 0.4)))), 100, stock)
    figure = explorer_figure.MixFigure(stock)
    figure.draw(plan)
    seen = pixels(figure)
    scale = seen.shape[1] / explorer_figure.WIDTH
    place = lambda edge: round(scale * (edge + 2))
    corner = lambda panel, cell: seen[
        place(figure.boxes[panel][cell][1]), place(figure.boxes[panel][cell][0]), :3
    ].astype(int)
    empty = (
        corner("available", ("audit", "hard")),
        corner("asked", ("audit", "easy")),
        corner("achieved", ("audit", "hard")),
    )
    assert all((colour == (243, 244, 246)).all() for colour in empty)
    few, many = corner("asked", ("audit", "medium")), corner("asked", ("audit", "extremely_complex"))
    assert few.sum() > many.sum() and few[2] > few[0]
    table = {(d, t): (asked, got) for d, t, asked, _, got in plan.table().iter_rows()}
    middle = lambda box: ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    below = [cell for cell in figure.boxes["achieved"] if table[cell][0] - table[cell][1] >= 1]
    assert ("audit", "hard") in below
    assert {tuple(p) for p in figure.marks.get_xydata()} == {
        middle(figure.boxes["achieved"][c]) for c in below
    }


# -- the page in one process ---------------------------------------------------------------------


@pytest.fixture
def room(shelves, tmp_path):
    return explorer_view.Explorer(shelves, BASE, explorer.first_state(BASE, shelves), tmp_path)


def sum_of(room) -> int:
    return sum(slider.value for slider in room.sliders.values())


def test_a_slider_moves_the_others_the_figure_and_the_plan(room):
    for phase in PHASES:
        room.phase.value = phase
        before = room.image.value
        room.sliders["hard"].value = 80
        assert sum_of(room) == 100 and room.image.value != before
        assert abs(room.plans[phase].asked["hard"] - 0.8 * room.plans[phase].target) < 1
    assert [room.state.mixes[phase]["hard"] for phase in PHASES] == [80, 80, 80]
    room.reset.click()
    assert room.state.mixes["C"] == room.default.mixes["C"] and room.state.mixes["B"]["hard"] == 80


def test_what_cannot_be_is_said_and_the_last_good_figure_stays(room):
    before, asked = room.image.value, room.plans["A"].asked
    for box, value in ((room.target, 0), (room.cap, 0), (room.target, 10**12), (room.cap, 400)):
        good, box.value = box.value, value
        assert (
            "words error" in room.words.value
            and room.image.value == before
            and room.plans["A"].asked == asked
        )
        box.value = good
        assert "words error" not in room.words.value
    room.shortfall.value = "strict"
    room.phase.value = "C"
    room.target.value = 90_000
    assert "phase C" in room.words.value and "short" in room.words.value
    assert "Traceback" not in room.words.value and "last mix that could be planned" in room.words.value


def test_a_fault_of_ours_is_a_sentence_too(room, monkeypatch):
    monkeypatch.setattr(explorer_view, "plans_of", lambda *_: 1 / 0)
    room.seed.value = 5
    assert "ZeroDivisionError" in room.words.value and "words error" in room.words.value


def test_the_page_opens_where_the_target_can_be_met(room, shelves):
    assert sum(room.state.targets.values()) <= shelves.index.height and not any(
        map(explorer.is_short, room.plans.values())
    )


def test_what_cannot_be_opened_is_a_sentence(shelves, tmp_path):
    assert "no index.parquet" in explorer_view.explore(tmp_path).children[1].value
    (tmp_path / "bad.yaml").write_text("phases: {A: {mix: {easy: 2}}}\n")
    assert (
        "must sum to 100%"
        in explorer_view.explore(shelves.folder, mix=tmp_path / "bad.yaml").children[1].value
    )


def test_records_that_cannot_be_drawn_are_a_sentence(room):
    room.shortfall.value = "undershoot"
    room.target.value = 900_000
    assert "too many to draw" in room.samples.outputs[0]["data"]["text/html"]


# -- the notebook --------------------------------------------------------------------------------


def test_the_kept_notebook_has_a_figure_no_widget_and_no_logic():
    cells = nbformat.read(lab_page.NOTEBOOK, 4).cells
    kinds = {kind for c in cells if c.cell_type == "code" for o in c.outputs for kind in o.get("data", {})}
    assert "image/png" in kinds, "run the notebook: it keeps a static figure"
    assert "application/vnd.jupyter.widget-view+json" not in kinds, (
        "clear the explorer's output: it does not survive saving"
    )
    assert not re.search(r"^\s*(def|class) ", "\n".join(c.source for c in cells), re.M)


# -- the page in a browser -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(buckets, tmp_path_factory):
    "The notebook, open and run in a real JupyterLab; the folder it works in."
    if why := lab_page.missing():
        pytest.skip(why)
    work = tmp_path_factory.mktemp("lab")
    with lab_page.jupyter_lab(work, buckets) as address, lab_page.browser_page() as page:
        lab_page.open_explorer(page, address)
        yield page, work / "notebooks"


def handle(page, tier: str):
    return page.locator(f".elson-page .tier-{tier} .noUi-handle")


def shares(page) -> dict[str, int]:
    return {tier: int(float(handle(page, tier).get_attribute("aria-valuenow"))) for tier in TIERS}


def figure_source(page) -> str:
    return page.locator(".elson-page img.widget-image").get_attribute("src")


def until(what, seconds: float = 20):
    "Wait until something is true, and return it."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def words(page) -> str:
    return page.locator(".elson-page .words").first.inner_text()


def fill(page, label: str, value: object) -> None:
    box = page.locator(".elson-page .widget-text", has_text=re.compile(f"^{re.escape(label)}$")).locator(
        "input"
    )
    box.fill(str(value))
    box.press("Enter")


def choose(page, label: str, value: str) -> None:
    page.locator(".elson-page .widget-dropdown", has_text=label).locator("select").select_option(label=value)


def test_hostile_records_are_text(live):
    page, _ = live
    shown = page.locator(".elson-page table.dataTable tbody").inner_text()
    assert (
        "<script>window.__pwned = 1</script>" in shown and "$5 and $6, $\\LaTeX$ \\(x^2\\) &lt;b&gt;" in shown
    )
    assert page.locator(".elson-page table.dataTable tbody tr").count() == 12
    assert page.evaluate("typeof window.__pwned") == "undefined"
    assert (
        page.locator(".elson-page mjx-container, .elson-page .MathJax, .elson-page img[src=x]").count() == 0
    )


def test_a_key_on_a_slider_redraws_the_figure_and_the_sum_stays_100(live):
    page, _ = live
    before, was = figure_source(page), shares(page)
    handle(page, "hard").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    until(lambda: figure_source(page) != before and sum(shares(page).values()) == 100)
    assert shares(page)["hard"] == was["hard"] + 4
    natural = "document.querySelector('.elson-page img.widget-image').naturalWidth"
    assert until(lambda: page.evaluate(natural)) >= explorer_figure.WIDTH


def test_a_policy_and_a_shortfall_are_in_words(live):
    page, _ = live
    fill(page, "records", 30_000)
    until(lambda: "taken from" in words(page) or "smaller" in words(page))
    good = figure_source(page)
    time.sleep(2)
    good = figure_source(page)
    choose(page, "shortfall", explorer_view.SHORTFALL_WORDS["strict"])
    until(lambda: "could be planned" in words(page))
    assert "short" in words(page) and figure_source(page) == good
    choose(page, "shortfall", explorer_view.SHORTFALL_WORDS["repeat"])
    until(lambda: "repeated" in words(page))
    assert figure_source(page) != good
    fill(page, "records", 120)
    until(lambda: "Every tier" in words(page))
    faults = '.jp-OutputArea-output[data-mime-type*="stderr"], .jp-OutputArea-output[data-mime-type*="error"]'
    assert page.locator(faults).count() == 0


def test_the_mix_is_saved_and_drawn_by_the_command_of_the_page(live, tmp_path):
    page, folder = live
    fill(page, "records", 120)
    choose(page, "shortfall", explorer_view.SHORTFALL_WORDS["nearest"])
    handle(page, "extremely_complex").focus()
    page.keyboard.press("PageUp")
    until(lambda: shares(page)["extremely_complex"] > 5 and sum(shares(page).values()) == 100)
    asked = shares(page)
    fill(page, "file", "../escape.yaml")
    page.get_by_role("button", name="Save mix").click()
    until(lambda: page.get_by_text("cannot name a mix file").count())
    fill(page, "file", "tuned.yaml")
    page.get_by_role("button", name="Save mix").click()
    until(
        lambda: (
            (folder / "tuned.yaml").is_file() and page.get_by_text(f"saved {folder / 'tuned.yaml'}").count()
        )
    )
    page.get_by_role("button", name="Save mix").click()
    page.get_by_text("replaced").wait_for()
    page.get_by_role("button", name="Copy command").click()
    page.get_by_text("copied", exact=True).wait_for()
    command = page.locator(".elson-page .command code").inner_text()
    assert page.evaluate("navigator.clipboard.readText()") == command
    assert not (folder.parent / "escape.yaml").exists()

    first, *arguments = shlex.split(command)
    assert first == "elson"
    elson = [sys.executable, "-c", "from elson_nb.cli.main import main; main()"]
    done = subprocess.run([*elson, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (manifest,) = (folder / "tuned_sample" / "curriculum_runs").glob("manifest_phaseA_*.jsonl")
    drawn = [json.loads(line)["tier"] for line in manifest.read_text().splitlines()]
    assert len(drawn) == 120 and sum(asked.values()) == 100
    assert all(abs(drawn.count(tier) - 1.2 * asked[tier]) < 1 for tier in TIERS)

"The order of the steps as properties, and domain blocks that end on competence, trained on a tiny model."

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from question_maker import make_records
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerControl, get_scheduler

from elson_nb.recipes import CompetenceConfig, load_recipe
from elson_nb.training.base import load_base, make_random_base
from elson_nb.training.batches import Example, encode, example_losses, micro_batches, padded
from elson_nb.training.order import BlockOrder, Order, blocks_of, competent
from elson_nb.training.phase import train_phase
from elson_nb.training.trainer import BlockGate, StepReporter

many = settings(derandomize=True, deadline=None, max_examples=150)

DOMAINS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 9)), min_size=1, max_size=6).map(
    lambda runs: [domain for domain, count in runs for _ in range(count)]
)
SIZE, PASSES, SEED = st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32)
LOSSES = st.lists(st.floats(0.1, 10), min_size=1, max_size=12)  # what the looks see, again and again


@st.composite
def competence(draw):
    "Rules with all their settings."
    least = draw(st.integers(1, 6))
    return CompetenceConfig(
        rule=draw(st.sampled_from(["improvement", "target"])),
        check_every=draw(st.integers(1, 4)),
        min_steps=least,
        max_steps=draw(st.none() | st.integers(least, 20)),
        min_improvement=draw(st.sampled_from([0.0, 0.01, 0.5])),
        patience=draw(st.integers(1, 3)),
        target_loss=draw(st.floats(0.1, 10)),
    )


def steps_of(order: Order, losses=None, most: int = 10**6) -> list[list[int]]:
    "Take up to `most` steps as the trainer and the gate do; the n-th look of all sees the n-th of `losses`."
    steps, looks = [], iter(range(10**6))
    see = lambda: losses[next(looks) % len(losses)] if losses else None
    if isinstance(order, BlockOrder) and not order.done:
        order.begin({order.block.domain: see()} if losses else {})
    while not order.finished and len(steps) < most:
        steps.append(order.records())
        order.advance()
        if isinstance(order, BlockOrder) and order.due and (reason := order.look(see())):
            following = order.blocks[order.number + 1 :][:1]
            order.close(reason, {block.domain: see() for block in following} if losses else {})
    return steps


# plain order and blocks


@many
@given(st.integers(1, 60), SIZE, PASSES)
def test_a_plain_order_goes_through_the_manifest_pass_by_pass(count, size, passes):
    order = Order(count, size, passes)
    steps = steps_of(order)
    once = [list(range(at, min(at + size, count))) for at in range(0, count, size)]
    assert steps == once * passes and len(steps) == order.total == order.planned


@many
@given(DOMAINS)
def test_blocks_are_the_runs_of_a_domain(domains):
    blocks = blocks_of(domains)
    assert [b.domain for b in blocks for _ in range(b.first, b.end)] == domains
    assert [b.first for b in blocks] == [0, *(b.end for b in blocks[:-1])] and blocks[-1].end == len(domains)
    assert all(one.domain != other.domain for one, other in zip(blocks, blocks[1:]))


@many
@given(DOMAINS, SIZE, PASSES, competence(), st.booleans())
def test_without_a_rule_or_a_loss_every_record_is_trained_exactly_passes_times(
    domains, size, passes, config, ruled
):
    config = replace(config, rule=config.rule if ruled else "none", max_steps=None)
    order = BlockOrder(domains, size, passes, config)
    steps = steps_of(order, None if ruled else [1.0])
    seen = [n for step in steps for n in step]
    assert sorted(seen) == sorted([*range(len(domains))] * passes)
    assert all(len({domains[n] for n in step}) == 1 and len(step) <= size for step in steps)
    first = [seen.index(n) for n in range(len(domains))]
    assert first == sorted(first), "the first pass is in the order of the manifest"
    assert {row["ended"] for row in order.rows} == {"all its steps were taken"}


@many
@given(DOMAINS, SIZE, PASSES, competence(), LOSSES)
def test_a_block_takes_between_its_least_and_its_most_steps(domains, size, passes, config, losses):
    order = BlockOrder(domains, size, passes, config)
    total, planned, steps = order.total, [order.planned], []
    while not order.finished:  # step by step, to see `planned` after each
        steps += steps_of(order, losses[len(steps) % len(losses) :] + losses, most=1)
        planned.append(order.planned)
    assert order.total == total == planned[-1] and planned[0] == 0
    assert all(after > before for before, after in zip(planned, planned[1:]))
    assert len(steps) == order.done == sum(row["steps"] for row in order.rows)
    for row, block in zip(order.rows, order.blocks, strict=True):
        room = config.max_steps or -(-(block.end - block.first) // size) * passes
        assert row["room"] == room and min(config.min_steps, room) <= row["steps"] <= room
        assert row["domain"] == block.domain and row["records"] == block.end - block.first
        full = row["ended"] == "all its steps were taken"
        assert (
            row["steps"] == room if full else row["steps"] % config.check_every == 0 or row["steps"] == room
        )
        taken, steps = steps[: row["steps"]], steps[row["steps"] :]
        assert {n for step in taken for n in step} <= set(range(block.first, block.end))


@many
@given(DOMAINS, SIZE, PASSES, competence(), LOSSES, st.floats(0, 0.9), SEED, st.integers(0, 40))
def test_a_restored_order_goes_on_as_the_other_would_have(
    domains, size, passes, config, losses, replay, seed, at
):
    make = lambda: BlockOrder(domains, size, passes, config, seed, replay)
    order = make()
    steps_of(order, losses, most=at)
    state = json.loads(json.dumps(order.state()))
    restored = make()
    restored.restore(state)
    assume(order.done)  # before the first step nothing is saved
    assert restored.planned == order.planned and restored.finished == order.finished
    assert steps_of(restored, losses) == steps_of(order, losses)
    assert restored.rows == order.rows and restored.state() == order.state()

    plain, again = Order(len(domains), size, passes), Order(len(domains), size, passes)
    steps_of(plain, most=at)
    again.restore(json.loads(json.dumps(plain.state())))
    assert steps_of(again) == steps_of(plain)


@many
@given(DOMAINS, SIZE, PASSES, competence(), LOSSES, st.floats(0, 0.9), SEED)
def test_replay_draws_from_earlier_blocks_by_seed_and_step_alone(
    domains, size, passes, config, losses, replay, seed
):
    order = BlockOrder(domains, size, passes, config, seed, replay)
    bare = BlockOrder(domains, size, passes, config, seed)
    number = 0
    order.begin({order.block.domain: losses[0]})
    while not order.finished:
        block, step = order.block, order.records()
        bare.number, bare.step = order.number, order.step
        own = bare.records()
        drawn = step[len(own) :]
        assert step[: len(own)] == own
        wanted = round(replay / (1 - replay) * len(own))
        assert len(drawn) == min(wanted, block.first) and all(n < block.first for n in drawn)
        assert len(set(drawn)) == len(drawn)
        other = BlockOrder(domains, size, passes, config, seed, replay)  # with no past but the count of steps
        other.number, other.step, other.done = order.number, order.step, order.done
        assert other.records() == step == order.records()
        number += 1
        order.advance()
        if order.due and (reason := order.look(losses[number % len(losses)])):
            order.close(reason, {})


def test_replay_differs_from_step_to_step_and_with_the_seed():
    config = CompetenceConfig(rule="none")
    steps = lambda seed: steps_of(BlockOrder(["a"] * 40 + ["b"] * 40, 4, 1, config, seed, replay=0.5))
    assert all(len(step) == 4 for step in steps(1)[:10]) and all(len(step) == 8 for step in steps(1)[10:])
    assert len({tuple(step[4:]) for step in steps(1)[10:]}) > 5
    assert steps(1) == steps(1) != steps(2)


IMPROVEMENT = CompetenceConfig(min_improvement=0.01, patience=2)
TARGET = CompetenceConfig(rule="target", target_loss=1.5)


@pytest.mark.parametrize(
    "looks, config, ended",
    [
        ([], IMPROVEMENT, False),
        ([3.0], IMPROVEMENT, False),
        ([3.0, 3.0], IMPROVEMENT, False),  # patience asks for two
        ([3.0, 3.0, 3.0], IMPROVEMENT, True),
        ([3.0, 4.0, 5.0], IMPROVEMENT, True),  # worse is no improvement
        ([3.0, 2.9, 2.8], IMPROVEMENT, False),
        ([3.0, 2.98, 2.96], IMPROVEMENT, True),  # 0.67 % each
        ([3.0, 2.98, 2.5, 2.49], IMPROVEMENT, False),  # the small ones must follow each other
        ([3.0, 2.98, 2.5, 2.49, 2.48], IMPROVEMENT, True),
        (
            [100.0, 99.0, 98.01],
            IMPROVEMENT,
            False,
        ),  # exactly the least that counts, as a share of the one before
        ([3.0, 3.0], replace(IMPROVEMENT, patience=1), True),
        ([3.0, 3.0, 3.0], replace(IMPROVEMENT, patience=3), False),
        ([3.0, 2.0, 1.9], replace(IMPROVEMENT, min_improvement=0.5), True),
        ([3.0, 2.0], TARGET, False),
        ([3.0, 1.5], TARGET, True),
        ([1.0], TARGET, False),  # the look before the block is none of its own
        ([3.0, 1.0, 2.0], TARGET, False),  # the last look counts
        ([3.0, 0.0, 0.0, 0.0], CompetenceConfig(rule="none"), False),
    ],
)
def test_a_block_may_end_when_its_looks_say_so(looks, config, ended):
    assert bool(competent(looks, config)) is ended


# micro-batches

EXAMPLES = st.lists(st.integers(2, 60), min_size=1, max_size=24).map(
    lambda lengths: [
        Example(f"r{n:02}", [n] * size, [0] + [1] * (size - 1)) for n, size in enumerate(lengths)
    ]
)


@many
@given(EXAMPLES, st.integers(1, 400), st.integers(1, 4))
def test_micro_batches_keep_every_record_and_the_budget(examples, budget, world):
    taken = []
    for rank in range(world):
        batches = micro_batches(examples, budget, rank, world)
        assert batches and all(batches)
        for batch in batches:
            assert len(batch) == 1 or padded([batch]) <= budget
        lengths = [len(e) for batch in batches for e in batch]
        assert lengths == sorted(lengths)
        real = [e for batch in batches for e in batch if any(e.completion_mask)]
        assert len(real) == len(lengths) or len(lengths) == 1, (
            "one without labels, and only where there is none"
        )
        taken += real
    assert sorted(taken, key=lambda e: e.id) == examples


@many
@given(EXAMPLES, st.integers(1, 400), st.randoms(use_true_random=False))
def test_micro_batches_do_not_depend_on_the_order_they_are_given(examples, budget, chance):
    mixed = chance.sample(examples, len(examples))
    assert micro_batches(mixed, budget) == micro_batches(examples, budget)


def test_a_process_without_a_record_gets_one_that_adds_nothing():
    examples = [Example("long", [1] * 9, [0, *[1] * 8]), Example("short", [2] * 4, [0, 1, 1, 1])]
    batches = [micro_batches(examples, 100, rank, 4) for rank in range(4)]
    assert [[e.id for b in rank for e in b] for rank in batches] == [
        ["short"],
        ["long"],
        ["short"],
        ["short"],
    ]
    assert [sum(sum(e.completion_mask) for b in rank for e in b) for rank in batches] == [3, 8, 0, 0]


# a gated phase


def text(number: int, domain: str, answer: str, **more) -> dict:
    return {
        "id": f"{domain}{number:02}",
        "instruction": "Say it.",
        "input": "",
        "output": answer,
        "domain": domain,
        **more,
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_random_base(load_recipe("smoke").model.random_config, folder)
    return folder


GATES = (
    "training.threads=1",
    "training.learning_rate=0.02",
    "training.warmup_ratio=0.1",
    "training.per_device_train_batch_size=2",
    *(
        f"training.competence.{setting}"
        for setting in (
            "rule=improvement",
            "check_every=2",
            "min_steps=2",
            "max_steps=null",
            "patience=2",
            "min_improvement=0.01",
            "held_out_per_domain=null",
            "map_every=1",
        )
    ),
)


@pytest.fixture(scope="module")
def gated(base, tmp_path_factory):
    """Three blocks: one that is learnt, one whose held-out record is nothing like its others, one without.
    The loss of every domain is also measured from outside at the end of each block."""
    folder = tmp_path_factory.mktemp("gated")
    recipe = load_recipe("smoke", [*GATES])
    records = [
        *(text(n, "learnt", "The face value of a bond.") for n in range(16)),
        *(text(n, "hopeless", "aaaa aaaa aaaa") for n in range(24)),
        *(text(n, "unseen", "The par value.") for n in range(6)),
    ]
    held = [
        text(90, "learnt", "The face value of a bond."),
        text(91, "learnt", "The face value of a bill."),
        text(90, "hopeless", "ZQ#7 XJ~9 @@ {}"),
        text(90, "never_trained", "Yes."),
    ]
    model, tokenizer = load_base(recipe, base)
    examples = {r["id"]: (r["domain"], encode(r, tokenizer)) for r in held}
    measured, told, rows = [], [], []

    def on_block(row: dict) -> None:
        told.append((row, len(rows)))
        losses = example_losses(model, [e for _, e in examples.values()], tokenizer.pad_token_id)
        domains = sorted({d for d, _ in examples.values()})
        of = lambda domain: [losses[i] for i, (d, _) in examples.items() if d == domain]
        measured.append({d: sum(of(d)) / len(of(d)) for d in domains})

    with rates_used() as rates:
        result = train_phase(
            recipe,
            "A",
            records,
            None,
            folder / "A",
            loaded=(model, tokenizer),
            held=held,
            on_block=on_block,
            on_step=rows.append,
        )
    return {
        "recipe": recipe,
        "result": result,
        "measured": measured,
        "told": told,
        "rows": rows,
        "rates": rates,
    }


def test_a_gated_phase_ends_blocks_by_the_rule(gated):
    recipe, result, told, rows = (gated[key] for key in ("recipe", "result", "told", "rows"))
    learnt, hopeless, unseen = result.blocks
    assert [b["domain"] for b in result.blocks] == ["learnt", "hopeless", "unseen"]
    assert "improved by less than 1.0% 2 times in a row" == hopeless["ended"]
    assert hopeless["steps"] < hopeless["room"] == 12 and hopeless["steps"] % 2 == 0
    assert competent(hopeless["looks"], recipe.training.competence)
    assert not competent(hopeless["looks"][:-1], recipe.training.competence)
    assert len(hopeless["looks"]) == 1 + hopeless["steps"] // 2, (
        "a look before the block and one every two steps"
    )
    assert learnt["held_out"]["learnt"] < 0.95 * result.first["learnt"], "what is trained is learnt"
    assert unseen["steps"] == unseen["room"] == 3 and unseen["looks"] == []
    assert unseen["ended"] == "all its steps were taken"
    assert [row for row, _ in told] == list(result.blocks), "on_block had the row of every block"
    ends = [sum(b["steps"] for b in result.blocks[: n + 1]) for n in range(3)]
    assert [count + 1 for _, count in told] == ends, "each right at its end"
    assert len(rows) == len(result.steps) == ends[-1] < result.totals["steps_planned"] == 8 + 12 + 3


def test_the_held_out_matrix_has_a_value_for_every_domain(gated):
    result, measured = gated["result"], gated["measured"]
    domains = ["hopeless", "learnt", "never_trained"]
    assert sorted(result.first) == domains and len(measured) == 3
    for block, outside in zip(result.blocks, measured, strict=True):
        assert sorted(block["held_out"]) == domains
        assert block["held_out"] == pytest.approx(outside, abs=2e-5)
        if block["looks"]:
            assert block["looks"][-1] == pytest.approx(block["held_out"][block["domain"]], abs=2e-5)
    assert result.blocks[1]["looks"][0] == result.blocks[0]["held_out"]["hopeless"]


def test_the_gate_looks_at_what_it_needs():
    "At all domains first, at a block's own while it lasts, at its own and the next or at all at its end."
    asked: list[tuple[int, list[str] | None]] = []
    config = CompetenceConfig(rule="none", check_every=2, min_steps=1, max_steps=3, map_every=3)
    order = BlockOrder([*"aabbccddee"], 2, 1, config)

    def measure(domains):
        asked.append((order.done, domains))
        return {d: 1.0 + order.done for d in (domains or "abcde")}

    gate, control = BlockGate(order, measure, StepReporter(None, lambda: 0.0)), TrainerControl()
    gate.on_train_begin(None, None, control)
    while not order.finished:
        order.records()
        order.advance()
        gate.on_optimizer_step(None, None, control)
        assert control.should_training_stop == order.finished
    assert asked[0] == (0, None) and asked[1:4] == [(2, ["a"]), (3, ["a"]), (3, ["a", "b"])]
    assert asked[4:7] == [(5, ["b"]), (6, ["b"]), (6, ["b", "c"])]
    assert [domains for _, domains in asked[7:]] == [
        ["c"],
        ["c"],
        None,
        ["d"],
        ["d"],
        ["d", "e"],
        ["e"],
        ["e"],
        None,
    ]
    assert [sorted(row["held_out"]) for row in order.rows] == [
        [*"ab"],
        [*"bc"],
        [*"abcde"],
        [*"de"],
        [*"abcde"],
    ]
    assert [row["looks"] for row in order.rows][:2] == [[1.0, 3.0, 4.0], [4.0, 6.0, 7.0]]
    again = BlockGate(order, measure, StepReporter(None, lambda: 0.0))
    count = len(asked)
    again.on_train_begin(None, None, control)
    assert len(asked) == count, "a training that goes on has its first looks already"


@contextlib.contextmanager
def rates_used():
    "Learning rates that the optimiser's steps within the block were taken with."
    rates = []
    hook = register_optimizer_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    try:
        yield rates
    finally:
        hook.remove()


def library_curve(name: str, rate: float, warmup: int, total: int) -> list[float]:
    "The library's curve at the middle of every step."
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = get_scheduler(name, optimiser, num_warmup_steps=warmup, num_training_steps=total)
    return [rate * schedule.lr_lambdas[0](step + 0.5) for step in range(total)]


def test_the_learning_rate_follows_the_plan_not_the_steps_taken(gated):
    result = gated["result"]
    curve = library_curve("cosine", 0.02, 3, 23)  # a tenth of 23 steps, rounded up
    rooms = [block["room"] for block in result.blocks]
    places = [
        sum(rooms[:n]) + step for n, block in enumerate(result.blocks) for step in range(block["steps"])
    ]
    assert len(places) < 23 and places[-1] == 22
    expected = [curve[place] for place in places]
    assert [row["learning_rate"] for row in result.steps] == pytest.approx(gated["rates"], rel=1e-9)
    assert gated["rates"] == pytest.approx(expected, rel=1e-9)


def test_one_cycle_over_three_phases_is_one_curve(base, tmp_path):
    "The flat schedule: each phase stands where it is told to in one learning-rate cycle."
    recipe = load_recipe("smoke", [*GATES, "curriculum.schedule=flat", "training.warmup_ratio=0.25"])
    sizes, told = {"A": 7, "B": 12, "C": 4}, []
    total, first, adapter = 4 + 6 + 2, 0, None
    with rates_used() as rates:
        for phase, count in sizes.items():
            records = make_records(count)
            result = train_phase(
                recipe, phase, records, adapter, tmp_path / phase, base=base, cycle=(first, total)
            )
            told += [row["learning_rate"] for row in result.steps]
            first, adapter = first + len(result.steps), result.adapter
    assert rates == pytest.approx(library_curve("cosine", 0.02, 3, 12), rel=1e-9)
    assert told == pytest.approx(rates, rel=1e-9)

"""A training that is killed, stopped or finds damaged checkpoints ends bit for bit as one left in peace.

Killed and stopped trainings are real processes, forked from a server that has the libraries loaded, so that
each costs its training alone.
"""

import json
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  else each process imports it

from elson_nb.recipes import load_recipe
from elson_nb.store import write_json
from elson_nb.training.base import make_random_base
from elson_nb.training.checkpoints import MARKER, all_checkpoints, fault, step_of
from elson_nb.training.head import answer_loss
from elson_nb.training.phase import train_phase
from elson_nb.training.trainer import StopRequest, heeding_signals

PAUSE = 0.06  # seconds after every step, so that a signal finds the training at work
PATIENCE = 60  # seconds a process may take for what it does in a few


def recipe(*settings: str):
    "Gated blocks with replay, dropout in the adapter, a checkpoint every other step."
    blocks = ("rule=improvement", "check_every=2", "min_steps=2", "max_steps=8", "patience=2", "replay=0.3")
    blocks += ("min_improvement=0.01", "held_out_per_domain=null", "map_every=1")
    common = (
        "adapter.lora_dropout=0.05",
        "training.threads=1",
        "training.learning_rate=0.02",
        "training.per_device_train_batch_size=2",
        "training.num_train_epochs=1",
        "training.checkpoint_every=2",
        "training.keep_checkpoints=2",
    )
    return load_recipe("smoke", [*common, *(f"training.competence.{b}" for b in blocks), *settings])


def records(domains: str = "abc", each: int = 16) -> list[dict]:
    "Records of a few domains; the answers of one domain are alike."
    answer = {
        "a": "The face value of a bond.",
        "b": "ZZZZ QQQQ XXXX.",
        "c": "A trust holds property for others.",
    }
    return [
        {
            "id": f"{domain}{n:02}",
            "instruction": f"Say {'again ' * (n % 4)}number {n}.",
            "input": "",
            "output": answer[domain],
            "domain": domain,
        }
        for domain in domains
        for n in range(each)
    ]


def held_out() -> list[dict]:
    return [r | {"id": f"held {r['id']}", "instruction": "Say it."} for r in records(each=2)]


def train(folder: Path, base: Path, pause: float = 0.0, **options):
    "One phase of training in `folder`, which tells of its steps as it goes and of its outcome at the end."

    def on_step(row: dict) -> None:
        with open(folder / "steps.txt", "a") as file:
            print(row["step"], file=file)
        time.sleep(pause)

    options = {"records": records(), "held": held_out(), "on_step": on_step, "adapter_in": None} | options
    result = train_phase(
        options.pop("recipe", None) or recipe(),
        options.pop("phase", "A"),
        options.pop("records"),
        adapter_out=folder / "A",
        base=base,
        checkpoints=folder / "work",
        **options,
    )
    told = {"first": result.first, "blocks": result.blocks, "notes": result.totals["notes"]}
    write_json(
        folder / "result.json", told | {"losses": [r["loss"] for r in result.steps], "rows": result.steps}
    )
    return result


@dataclass
class Outcome:
    "What must not depend on how often a training was stopped."

    adapter: bytes
    told: dict
    optimiser: dict

    def __init__(self, folder: Path):
        told = json.loads((folder / "result.json").read_text())
        self.adapter = (folder / "A" / "adapter_model.safetensors").read_bytes()
        same = ("step", "loss", "learning_rate", "grad_norm", "records", "tokens", "micro_batches")
        self.told = {key: told[key] for key in ("first", "blocks", "losses")}
        self.told["rows"] = [{key: row[key] for key in same} for row in told["rows"]]
        self.optimiser = torch.load(all_checkpoints(folder / "work")[0] / "optimizer.pt", weights_only=True)


def same_tree(one, other) -> bool:
    "Whether two optimiser states are the same to the last bit."
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_tree(*pair) for pair in zip(one, other))
    return one == other


def assert_same(folder: Path, expected: Outcome) -> None:
    outcome = Outcome(folder)
    assert outcome.told == expected.told
    assert outcome.adapter == expected.adapter
    assert same_tree(outcome.optimiser, expected.optimiser)


def seen_steps(folder: Path) -> list[int]:
    "Steps that the trainings in a folder have reported, all starts one after the other."
    path = folder / "steps.txt"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_random_base(load_recipe("smoke").model.random_config, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def start(base):
    "A function that starts `train` in a process of its own; their server loads while other tests run."
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patched:  # the server does not know where pytest looks for modules
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()

    def begin(folder: Path, pause: float = PAUSE) -> multiprocessing.Process:
        folder.mkdir(exist_ok=True)
        process = processes.Process(target=train, args=(folder, base, pause), daemon=True)
        process.start()
        return process

    return begin


def wait_for_step(folder: Path, step: int, process) -> None:
    "Until the training that runs now has reported a step."
    ends = time.monotonic() + PATIENCE
    before = len(seen_steps(folder))
    while not any(seen >= step for seen in seen_steps(folder)[before:]):
        assert process.is_alive() and time.monotonic() < ends, f"step {step} was not seen"
        time.sleep(0.002)


def finish(process) -> int:
    process.join(PATIENCE)
    assert not process.is_alive(), "the process does not end"
    return process.exitcode


# a signal


def test_a_second_signal_ends_it_there_and_then():
    request = StopRequest()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        with heeding_signals(request):
            signal.raise_signal(signal.SIGINT)
            assert request.signal == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second signal was not heeded")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_goes_on_to_who_waits_for_it():
    heard, before = [], signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            with heeding_signals(StopRequest()):
                signal.raise_signal(signal.SIGTERM)
                assert heard == []
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_leaves_time_to_save():
    "A machine that shuts down sends one to every process, and then the chain sends its kernel another."
    request, before = StopRequest(), signal.signal(signal.SIGTERM, lambda number, frame: None)
    saved = False
    try:
        with pytest.raises(KeyboardInterrupt):
            with heeding_signals(request):
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
                saved = True
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved


def test_in_another_thread_signals_are_left_alone():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with heeding_signals(StopRequest()):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


# damaged, foreign and last checkpoints


class Crash(Exception):
    pass


def crash_at(step: int, seen: list[int] | None = None):
    "An `on_step` that breaks the training off, before the checkpoint of that step."

    def on_step(row: dict) -> None:
        if seen is not None:
            seen.append(row["step"])
        if row["step"] >= step:
            raise Crash

    return on_step


@pytest.fixture(scope="module")
def broken_off(base, tmp_path_factory) -> Path:
    "A training that broke off in step 7 and has checkpoints of steps 4 and 6."
    folder = tmp_path_factory.mktemp("broken")
    with pytest.raises(Crash):
        train(folder, base, on_step=crash_at(7))
    assert [step_of(p) for p in all_checkpoints(folder / "work")] == [6, 4]
    return folder


@pytest.fixture
def copy(broken_off, tmp_path) -> Path:
    shutil.copytree(broken_off, tmp_path, dirs_exist_ok=True)
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "it was not finished": lambda c: (c / MARKER).unlink(),
    "it was not finished ": lambda c: (c / MARKER).write_text('{"files": {'),
    "optimizer.pt is damaged": lambda c: truncate(c / "optimizer.pt"),
    "adapter_model.safetensors is damaged": lambda c: flip(c / "adapter_model.safetensors"),
    "rng_state.pth is missing": lambda c: (c / "rng_state.pth").unlink(),
}


def first_step(base, folder: Path, **options) -> int:
    "The first step that a training takes which finds these checkpoints."
    seen: list[int] = []
    with pytest.raises(Crash):
        train(folder, base, on_step=crash_at(0, seen), **options)
    return seen[0]


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(base, copy, reason):
    DAMAGE[reason](copy / "work" / "checkpoint-6")
    expected = f"checkpoint-6 is left out: {reason.strip()}; going back to the one before"
    with pytest.warns(UserWarning, match=expected):
        assert first_step(base, copy) == 5


def other_texts() -> list[dict]:
    return [r | {"output": r["output"] + "!"} if r["id"] == "c15" else r for r in records()]


def other_held_out() -> list[dict]:
    return [r | {"output": "Another answer."} for r in held_out()]


def other_domains() -> list[dict]:
    "The same texts in the same order, another block structure."
    return [r | {"domain": "b" if r["id"] < "a08" else r["domain"]} for r in records()]


OTHER = {
    "nothing": (7, {}),
    "a record": (1, {"records": other_texts()}),
    "the order": (1, {"records": records()[::-1]}),
    "a setting": (1, {"recipe": recipe("training.learning_rate=0.03")}),
    "the phase": (1, {"phase": "B"}),
    "the domains": (1, {"records": other_domains()}),
    "the held-out records": (1, {"held": other_held_out()}),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_checkpoint_of_another_training_is_not_taken(base, copy, what):
    begins, options = OTHER[what]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert first_step(base, copy, **options) == begins
    told = [str(w.message) for w in caught if "is left out" in str(w.message)]
    assert len(told) == (0 if begins > 1 else 2)
    assert all("it belongs to another training" in message for message in told)


def test_checkpoints_of_another_training_do_not_crowd_out_the_new_ones(base, copy):
    "Two newer ones that cannot be used are there when a training begins; its own must be kept all the same."
    options = {"records": other_texts()}
    with pytest.warns(UserWarning, match="belongs to another training"), pytest.raises(Crash):
        train(copy, base, on_step=crash_at(4), **options)  # has saved step 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert first_step(base, copy, **options) == 3


class Killed(Exception):
    pass


AT_ONCE = (
    "training.competence.rule=target",
    "training.competence.target_loss=100",
)  # each block after two steps


@pytest.mark.parametrize(
    "phase, settings",
    [
        ("A", ["training.competence.max_steps=3"]),
        ("A", ["training.checkpoint_every=50", *AT_ONCE]),
        ("B", ["training.checkpoint_every=50"]),
    ],
)
def test_a_training_killed_before_it_saved_its_adapter_is_not_repeated(
    base, tmp_path, monkeypatch, phase, settings
):
    options = {"phase": phase, "recipe": recipe(*settings), "records": records(each=6)}

    def killed(*args):
        raise Killed

    plain, late = tmp_path / "plain", tmp_path / "late"
    for folder in (plain, late):
        folder.mkdir()
    train(plain, base, **options)
    with monkeypatch.context() as patched:
        patched.setattr("elson_nb.training.phase.save_adapter", killed)
        with pytest.raises(Killed):
            train(late, base, **options)
    steps = len(seen_steps(late))
    assert steps == len(seen_steps(plain)) > 5 and not (late / "A").exists()
    result = train(late, base, **options)
    assert len(seen_steps(late)) == steps, "steps were taken again"
    assert result.totals["notes"] == [f"went on from step {steps}"]
    assert_same(late, Outcome(plain))


def test_a_halved_budget_is_taken_up_with_the_checkpoint(base, tmp_path, monkeypatch):
    options = {"records": records(each=8), "recipe": recipe("training.per_device_train_batch_size=4")}

    def little_memory(model, tensors):
        if tensors["input_ids"].numel() > 200:
            raise RuntimeError("out of memory")
        return answer_loss(model, tensors)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr("elson_nb.training.trainer.answer_loss", little_memory)
        train(tmp_path, base, on_step=crash_at(3), **options)
    result = train(tmp_path, base, **options)
    notes = result.totals["notes"]
    assert notes[-1] == "went on from step 2" and all("memory ended" in note for note in notes[:-1])
    assert len(notes) > 1 and min(row["micro_batches"] for row in result.steps) > 1


# left in peace, then killed and stopped for real; last, so that the server has loaded by then


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish(start(folder, 0.0)) == 0
    return folder


@pytest.fixture(scope="module")
def expected(undisturbed) -> Outcome:
    return Outcome(undisturbed)


def test_the_training_that_is_disturbed_is_worth_it(undisturbed, expected):
    "Several blocks, one of which ends early; over sixteen steps; every step moved by dropout and replay."
    blocks, steps = expected.told["blocks"], seen_steps(undisturbed)
    assert len(blocks) == 3 and any(b["steps"] < b["room"] for b in blocks)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 16
    assert expected.told["rows"][-1]["records"] > 2, "nothing is replayed"
    assert sorted(blocks[0]["held_out"]) == ["a", "b", "c"]


def test_three_kills_at_random_moments_change_nothing(start, expected, tmp_path):
    chance = random.Random(20)
    starts = []
    for span in ((1, 5), (6, 10), (11, 15)):
        process = start(tmp_path)
        wait_for_step(tmp_path, chance.randint(*span), process)
        time.sleep(chance.uniform(0, 2 * PAUSE))  # in a step, in its pause, or while a checkpoint is written
        process.kill()
        assert finish(process) == -signal.SIGKILL
        starts.append(len(seen_steps(tmp_path)))
    assert finish(start(tmp_path, 0.0)) == 0
    steps = seen_steps(tmp_path)
    again = [steps[n] for n in starts]
    assert again == sorted(again) and again[-1] > 9, (
        f"it began at steps {again}: the checkpoints were not taken up"
    )
    assert_same(tmp_path, expected)
    notes = json.loads((tmp_path / "result.json").read_text())["notes"]
    assert notes[-1] == f"went on from step {again[-1] - 1}"


def test_sigterm_and_sigint_save_the_step_and_end_at_once(start, expected, tmp_path):
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 8)):
        process = start(tmp_path)
        wait_for_step(tmp_path, step, process)
        seen = seen_steps(tmp_path)[-1]
        os.kill(process.pid, number)
        sent = time.monotonic()
        assert finish(process) == (-signal.SIGTERM if number == signal.SIGTERM else 1)
        assert time.monotonic() - sent < 5, "it took longer than the step at hand and a checkpoint"
        last = seen_steps(tmp_path)[-1]
        newest = all_checkpoints(tmp_path / "work")[0]
        assert step_of(newest) == last and last - seen in (1, 2), "saved at the end of the step at hand"
        assert fault(newest, {}) == "" and not (tmp_path / "A").exists()
    assert finish(start(tmp_path, 0.0)) == 0
    steps = seen_steps(tmp_path)
    assert steps == sorted(set(steps)), "no step was taken twice"
    assert_same(tmp_path, expected)


def test_going_back_a_checkpoint_changes_nothing(base, copy, expected):
    truncate(copy / "work" / "checkpoint-6" / "optimizer.pt")
    with pytest.warns(UserWarning, match="checkpoint-6 is left out"):
        train(copy, base)
    assert seen_steps(copy)[0] == 5
    assert_same(copy, expected)


def test_when_all_are_damaged_it_begins_again(base, copy, expected):
    for step in (4, 6):
        flip(copy / "work" / f"checkpoint-{step}" / "scheduler.pt")
    with pytest.warns(UserWarning, match="scheduler.pt is damaged"):
        train(copy, base)
    assert seen_steps(copy)[0] == 1
    assert_same(copy, expected)


def test_an_adapter_to_begin_from_is_part_of_a_training(base, copy, undisturbed):
    with pytest.warns(UserWarning, match="its adapter before differs"):
        assert first_step(base, copy, adapter_in=undisturbed / "A") == 1

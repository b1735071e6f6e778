"""A phase in two processes against the same phase in one: losses, weights, resume, shards, signals, failures.

Two real processes, gloo, on the CPU. They are forked from a server that has the libraries in memory, which
takes less time than `accelerate launch`; that one is used where the launcher itself is under test.
"""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from question_maker import make_records
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from elson_nb.recipes import Recipe, build, load_recipe
from elson_nb.training import launch, phase
from elson_nb.training.adapter import TrainingError
from elson_nb.training.base import make_random_base
from elson_nb.training.checkpoints import all_checkpoints
from elson_nb.training.launch import (
    failure,
    heed_caller,
    launch_command,
    main,
    train_in_processes,
)
from elson_nb.training.phase import train_phase

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["elson_nb.training.launch"])
# steps of eight: each with a long record, and the last of one record, so that the second process has none
RECORDS = [r | {"output": r["output"] * (12 if n % 8 == 3 else 1)} for n, r in enumerate(make_records(25))]
SETTINGS = (
    "training.threads=1",
    "training.checkpoint_every=3",
    "training.tokens_per_micro_batch=600",  # four records, or less where one is long
    "phases.B.learning_rate=0.02",
)
QDORA = ("model.quantization=nf4", "adapter.method=qdora", "model.dtype=bfloat16")
LONG = (
    "adapter.lora_dropout=0.2",
    "training.num_train_epochs=3",
)  # 12 steps, so that there is time to stop it
NOISE = 2e-6  # of losses, gradients and weights in fp32, summed in another order; seen up to 4e-7
SHARDED = 1e-4  # of sharded weights: Adam divides by the size of a gradient, the smallest too; seen 3.5e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_random_base(load_recipe("smoke").model.random_config, folder)
    return folder


def recipe(processes: int, *overrides: str) -> Recipe:
    size = f"training.per_device_train_batch_size={8 // processes}"
    return load_recipe("smoke", [*SETTINGS, size, f"training.processes={processes}", *overrides])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def distance(one: Path, other: Path) -> float:
    "Relative distance of the tensors that differ most."
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


def same_losses(one: list[dict], other: list[dict], within: float = NOISE) -> None:
    assert len(one) == len(other) == 4 and one[0]["loss"] - one[-1]["loss"] > 0.05
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=within)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=within)
        assert (a["records"], a["tokens"]) == (b["records"], b["tokens"])


# two processes


def of_two(rank: int, port: int, environment: dict, jobs: list, told) -> None:
    "What each process does: its jobs in turn."
    place = {
        "OMP_NUM_THREADS": 1,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({key: str(value) for key, value in (place | environment).items()})
    signal.signal(signal.SIGTERM, lambda *_: None)  # what follows the save; the default would end the process
    if "FSDP_VERSION" in environment:
        shards_on_cpu()
    PartialState(cpu=True)
    told.send([job(rank) for job in jobs])
    torch.distributed.destroy_process_group()


def in_two(*jobs, environment: dict | None = None, seconds: int = 240) -> list[tuple]:
    "Run the jobs in two processes; what each job returned, in both. A deadlock is a failure."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends = [FORKED.Pipe(duplex=False) for _ in range(2)]
    workers = [
        FORKED.Process(target=of_two, args=(rank, port, environment or {}, jobs, ends[rank][1]))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        until = time.monotonic() + seconds
        while not all(receive.poll(0.1) for receive, _ in ends):
            assert all(w.exitcode in (None, 0) for w in workers), "a process failed; stderr has its traceback"
            assert time.monotonic() < until, "the processes wait for each other"
        return list(zip(*(receive.recv() for receive, _ in ends), strict=True))
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def train(rank: int, settings: Recipe, out: Path, **options) -> dict:
    "A phase as a job; what can be sent back of its result."
    options = {"checkpoints": out.with_name(f"{out.name}-checkpoints")} | options
    result = train_phase(settings, "B", RECORDS, None, out, **options)
    sharded = sum(isinstance(p, DTensor) for p in result.model.parameters())
    return {"steps": result.steps, "totals": result.totals, "sharded": sharded}


def stopped(rank: int, settings: Recipe, out: Path, at: int, on: int, **options) -> bool:
    "A phase that a signal reaches in step `at`, in the process `on` alone."

    def on_step(row: dict) -> None:
        if row["step"] == at + 1 and rank == 0:
            time.sleep(0.5)  # process 0 has more to do, so the other is first to save
        if row["step"] == at and rank == on:
            signal.raise_signal(signal.SIGTERM)

    try:
        train(rank, settings, out, on_step=on_step, **options)
    except KeyboardInterrupt:
        return True
    return False


def gated(rank: int, out: Path, base: Path) -> list[dict]:
    "A phase of two domain blocks; process 1 sees its held-out losses halved from look to look."
    plain, looks = phase.example_losses, itertools.count()

    def seen(*args) -> dict[str, float]:
        part = 0.5 ** next(looks) if rank else 1.0
        return {i: loss * part for i, loss in plain(*args).items()}

    phase.example_losses = seen
    records = [r | {"domain": "first" if n < 16 else "second"} for n, r in enumerate(make_records(32))]
    gates = (
        "check_every=1",
        "min_steps=1",
        "patience=1",
        "max_steps=6",
        "min_improvement=0.005",
    )
    settings = recipe(2, *(f"training.competence.{gate}" for gate in gates))
    try:
        return train_phase(settings, "A", records, None, out, base=base, held=records[::8]).blocks
    finally:
        phase.example_losses = plain


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    "The phase in one process."
    out = tmp_path_factory.mktemp("alone")
    return out, {
        kind: train(0, recipe(1, *more), out / kind, base=base)
        for kind, more in [("plain", ()), ("qdora", QDORA)]
    }


@pytest.fixture(scope="module")
def together(base, tmp_path_factory):
    "The phase in two: plain; with dropout; with dropout, stopped by a signal and gone on with."
    out = tmp_path_factory.mktemp("together")
    jobs = {
        "plain": partial(train, settings=recipe(2), out=out / "plain", base=base),
        "dropping": partial(train, settings=recipe(2, *LONG), out=out / "dropping", base=base),
        "stopped": partial(
            stopped,
            settings=recipe(2, *LONG),
            out=out / "resumed",
            base=base,
            at=1,
            on=1,
        ),
        "resumed": partial(train, settings=recipe(2, *LONG), out=out / "resumed", base=base),
        "gated": partial(gated, out=out / "gated", base=base),
    }
    return out, dict(zip(jobs, in_two(*jobs.values()), strict=True))


def test_two_processes_train_as_one(alone, together):
    folder, found = together
    one, (first, second) = alone[1]["plain"], found["plain"]
    counts = [[row["micro_batches"] for row in result["steps"]] for result in (first, second)]
    assert counts[0] != counts[1], "as many micro-batches in both: the test shows less than it should"
    same_losses(one["steps"], first["steps"])
    assert [row["loss"] for row in second["steps"]] == [row["loss"] for row in first["steps"]]
    assert distance(alone[0] / "plain", folder / "plain") < NOISE


def test_a_process_without_a_record_takes_part_and_adds_nothing(alone, together):
    one, two = (result["steps"][-1] for result in (alone[1]["plain"], together[1]["plain"][1]))
    assert one["records"] == two["records"] == 1 and two["micro_batches"] == 1
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=NOISE)


def test_processes_end_domain_blocks_together(together):
    first, second = together[1]["gated"]
    assert [row["domain"] for row in first] == ["first", "second"]
    assert [row["steps"] for row in first] == [row["steps"] for row in second] and min(
        r["steps"] for r in first
    ) < 6


def test_a_signal_in_one_process_stops_both_and_the_rest_is_trained_to_the_same_bytes(
    together,
):
    folder, found = together
    assert found["stopped"] == (True, True)
    assert found["resumed"][0]["totals"]["notes"] == ["went on from step 2"]
    undisturbed, resumed = (
        (folder / name / "adapter_model.safetensors").read_bytes() for name in ("dropping", "resumed")
    )
    assert resumed == undisturbed
    losses = [[row["loss"] for row in found[name][0]["steps"]] for name in ("dropping", "resumed")]
    assert losses[0] == losses[1] != [row["loss"] for row in found["plain"][0]["steps"]]


def test_a_checkpoint_holds_the_random_state_of_both(together):
    for checkpoint in all_checkpoints(together[0] / "resumed-checkpoints"):
        assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= {
            p.name for p in checkpoint.iterdir()
        }


# shards


def shards_on_cpu() -> None:
    "Accelerate shards on accelerators only; gloo can, so it is told that the CPUs are several of them."
    plain = PartialState.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def shipped_environment() -> dict[str, str]:
    "What `accelerate launch` tells its processes for the shipped FSDP2 file."
    command = launch_command(recipe(2, "training.launch_config=fsdp2_qdora").training, Path("job.json"))
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    told = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in told.items() if key.startswith(("FSDP_", "ACCELERATE_"))}


@pytest.fixture(scope="module")
def sharded(base, tmp_path_factory):
    "The phase in two processes that share one copy of the weights; fp32, then NF4."
    out = tmp_path_factory.mktemp("sharded")
    checkpointed = recipe(2, "training.gradient_checkpointing=true")
    jobs = {
        "plain": partial(train, settings=checkpointed, out=out / "plain", base=base),
        "stopped": partial(stopped, settings=checkpointed, out=out / "resumed", base=base, at=1, on=1),
        "resumed": partial(train, settings=checkpointed, out=out / "resumed", base=base),
        "qdora": partial(train, settings=recipe(2, *QDORA), out=out / "qdora", base=base),
    }
    return out, dict(zip(jobs, in_two(*jobs.values(), environment=shipped_environment()), strict=True))


@pytest.mark.parametrize("kind", ["plain", "qdora"])
def test_shards_train_as_one_process(alone, sharded, kind):
    folder, found = sharded
    one, (first, second) = alone[1][kind], found[kind]
    assert one["sharded"] == 0 and first["sharded"] == second["sharded"] == 62
    assert [r["micro_batches"] for r in first["steps"]] == [r["micro_batches"] for r in second["steps"]]
    same_losses(one["steps"], first["steps"])
    assert distance(alone[0] / kind, folder / kind) < SHARDED
    assert first["totals"]["norms_per_layer_and_step"] == 1, "gathered anew is not changed"


def test_shards_go_on_from_a_checkpoint_to_the_same_bytes(sharded):
    folder, found = sharded
    assert found["stopped"] == (True, True)
    assert found["resumed"][0]["totals"]["notes"] == ["went on from step 2"]
    plain, resumed = (
        (folder / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "resumed")
    )
    assert plain == resumed


def test_the_shipped_files_are_what_they_are_called():
    environment = shipped_environment()
    assert environment["FSDP_VERSION"] == "2" and environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no", "the recipe's dtype decides"
    command = launch_command(recipe(2).training, Path("job.json"))
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    assert arguments.multi_gpu and not arguments.use_fsdp and arguments.num_processes == 2


# the launcher


def launched(base: Path, out: Path, *overrides: str, **options):
    return train_in_processes(recipe(2, *overrides), "B", RECORDS, None, out, base, **options)


@pytest.fixture
def heard(monkeypatch):
    "Signals that the waiting handler of this process got."
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_a_sigterm_to_the_caller_lets_the_children_save_and_the_next_call_goes_on(
    base, together, tmp_path, heard
):
    rows, settings = [], (*LONG, "training.checkpoint_every=1")
    places = {"checkpoints": tmp_path / "checkpoints"}

    def on_step(row: dict) -> None:
        rows.append(row["step"])
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        launched(base, tmp_path / "B", *settings, on_step=on_step, **places)
    assert heard == [signal.SIGTERM] and not (tmp_path / "B").exists()
    done = len(rows)
    assert 1 <= done < 12 and all_checkpoints(places["checkpoints"])[0].name == f"checkpoint-{done}"

    (places["checkpoints"] / "checkpoint-99").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-99 is left out: it was not finished"):
        result = launched(
            base,
            tmp_path / "B",
            *settings,
            on_step=lambda row: rows.append(row["step"]),
            **places,
        )
    assert result.totals["notes"] == [f"went on from step {done}"] and result.model is None
    assert rows == [row["step"] for row in result.steps] == list(range(1, 13))
    undisturbed = together[0] / "dropping" / "adapter_model.safetensors"
    assert (tmp_path / "B" / "adapter_model.safetensors").read_bytes() == undisturbed.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["B", "checkpoints"]


def stand_in(monkeypatch, code: str) -> None:
    "Another child in the place of the launcher: a real process, without the wait for its libraries."
    monkeypatch.setattr(
        launch,
        "launch_command",
        lambda training, job: [sys.executable, "-c", code, str(job)],
    )


def test_a_child_that_dies_is_an_error_with_the_last_lines_of_its_log(base, tmp_path, monkeypatch):
    stand_in(
        monkeypatch,
        "print(*range(40), sep='\\n'); print('no space left'); raise SystemExit(3)",
    )
    with pytest.raises(
        TrainingError,
        match="ended with status 3; its log is .*log.txt:(\n.*)*\n39\nno space left$",
    ) as caught:
        launched(base, tmp_path / "B")
    assert len(str(caught.value).splitlines()) == 13 and (tmp_path / ".launch-B" / "log.txt").is_file()
    assert not (tmp_path / "B").exists()


def test_a_ctrl_c_after_a_sigterm_ends_a_child_that_does_not_listen(base, tmp_path, monkeypatch, heard):
    numbers = iter((signal.SIGTERM, signal.SIGINT))
    row = json.dumps({"on_step": {"step": 1}})
    stand_in(
        monkeypatch,
        "import sys, time, os, pathlib; folder = pathlib.Path(sys.argv[1]).parent;"
        "(folder / 'pid').write_text(str(os.getpid()));"
        f"(folder / 'rows-0.jsonl').write_text('''{row}\\n{row}\\n'''); time.sleep(600)",
    )
    with pytest.raises(KeyboardInterrupt):
        launched(
            base,
            tmp_path / "B",
            on_step=lambda row: os.kill(os.getpid(), next(numbers)),
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / ".launch-B" / "pid").read_text()), 0)


def test_the_end_of_standard_input_is_a_sigterm(heard):
    "So the death of the caller is one, too."
    before, (read, write) = os.dup(0), os.pipe()
    try:
        os.dup2(read, 0)
        heed_caller()
        time.sleep(0.1)
        assert heard == []
        os.close(write)
        until = time.monotonic() + 5
        while not heard and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        os.dup2(before, 0)
    assert heard == [signal.SIGTERM]


def refused(job: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["launch", str(job)]
    main()


def test_a_refusal_in_a_process_is_the_callers_error(base, tmp_path):
    job = {
        "recipe": recipe(1).to_dict(),
        "phase": "B",
        "records": RECORDS,
        "adapter_in": str(tmp_path / "none"),
    }
    job |= {"adapter_out": str(tmp_path / "B"), "base": str(base), "checkpoints": None}
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker = FORKED.Process(target=refused, args=(tmp_path / "job.json",))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 1
    assert str(failure(tmp_path, 1)).startswith(f"no adapter in {tmp_path / 'none'}; run the phase before")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrainingError, match="training.processes is 2, and this machine has 1 GPUs"):
        launch_command(recipe(2).training, Path("job.json"))


def test_a_recipe_is_the_same_on_the_other_side():
    for name in ("smoke", "laptop", "h100", "h100-qdora"):
        there = json.loads(json.dumps(load_recipe(name).to_dict()))
        assert build(Recipe, there, "recipe").fingerprint() == load_recipe(name).fingerprint()

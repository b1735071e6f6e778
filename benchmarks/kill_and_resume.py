"""Sessions that are killed and stopped at random moments, beside one that nobody disturbed.

    python benchmarks/kill_and_resume.py                                        # 20 kills, 5 SIGTERM
    python benchmarks/kill_and_resume.py --kills 2 --terms 1 --out few.json

Every session is the real command with its kernels on the `smoke` recipe, phases A, B and C one after the
other, a checkpoint every other step, dropout in the adapter. In each phase one thing happens: `kill -9` of
all its processes, or SIGTERM, in turn to the command alone and to all its processes. Then `--resume` until
the phase is done. The data step is copied, for it is over before anything happens.

Compared with the session left in peace: the adapter's file, the loss of every step, the rows of the blocks,
the held-out losses, and of every checkpoint that was seen the files of adapter, optimiser, scheduler and
random generators, all bit for bit. The checkpoints of a phase are gone when it is done, so a thread notes
the checksums they carry while they are there.

Moments are seeded: three in four after a step of the training drawn at random, the rest anywhere from the
start of the command to the end of the phase. Figures go to benchmarks/results/kill_and_resume.json; the
exit code is 1 when a session differs.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from elson_nb.session.ledger import provenance
from elson_nb.store import StoreError, file_sha256, read_json, write_json
from elson_nb.training.checkpoints import MARKER

RESULTS = Path(__file__).parent / "results"
ELSON = [sys.executable, "-c", "from elson_nb.cli.main import main; main()"]
SETTINGS = (
    "curriculum.target_records=60",
    "curriculum.held_out_records=12",
    "adapter.lora_dropout=0.05",
    "training.threads=1",
    "training.per_device_train_batch_size=1",
    "training.checkpoint_every=2",
    "training.competence.replay=0.3",
)
PHASES = ("A", "B", "C")
STATE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")  # of a checkpoint
PATIENCE = 600  # seconds for a command that takes a fraction of a minute


@dataclass(frozen=True)
class Moment:
    "When and how a phase is disturbed."

    number: int
    how: str  # kill -9, SIGTERM to the command, SIGTERM to all
    phase: str
    step: int | None  # after this step of the training is reported; None = after `delay` from the start
    delay: float  # seconds after that

    def __str__(self) -> str:
        return (
            f"step {self.step} + {self.delay:.2f} s" if self.step else f"{self.delay:.1f} s after the start"
        )


def moments(kills: int, terms: int, steps: dict[str, int], seconds: dict[str, float]) -> list[Moment]:
    "Seeded moments, spread over the phases; `steps` and `seconds` are those of the undisturbed phases."
    chance = random.Random(7)
    hows = ["kill -9"] * kills + [("SIGTERM to the command", "SIGTERM to all")[n % 2] for n in range(terms)]
    chance.shuffle(hows)
    drawn = []
    for number, how in enumerate(hows):
        phase = PHASES[number % len(PHASES)]
        if chance.random() < 0.75:
            moment = chance.randint(1, steps[phase]), chance.uniform(0, 0.2)
        else:
            moment = None, chance.uniform(0, seconds[phase])
        drawn.append(Moment(number + 1, how, phase, *moment))
    return drawn


# a command


def command(*words: object) -> subprocess.Popen:
    words = [*ELSON, "run", "-q", *map(str, words)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def everyone(process: subprocess.Popen) -> list[psutil.Process]:
    "A command and what it started, its kernel among them."
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        return [found, *found.children(recursive=True)]
    return []


def end_all() -> None:
    "Leave no command behind when the benchmark is stopped."
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def complete(*words: object) -> float:
    "Run a command to its end; seconds. Raises `RuntimeError` with what it said when it fails."
    began = time.monotonic()
    process = command(*words)
    _, said = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise RuntimeError(f"elson run {' '.join(map(str, words))} ended with {process.returncode}: {said}")
    return time.monotonic() - began


def progress(run: Path) -> dict:
    "The last row that a run's kernel wrote."
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / "progress.json").read_text())
    return {}


def disturb(run: Path, moment: Moment) -> dict:
    "Start a phase, strike at the moment, wait until all is quiet; what was reached, how long the end took."
    began, wall = time.monotonic(), time.time()
    process = command("--resume", run, "--phase", moment.phase)

    def reached() -> bool:
        if moment.step is None:
            return True
        row = progress(run)
        return (
            row.get("phase") == moment.phase and row.get("at", 0) > wall and row.get("step", 0) >= moment.step
        )

    while process.poll() is None and not reached() and time.monotonic() < began + PATIENCE:
        time.sleep(0.005)
    time.sleep(moment.delay)
    missed = process.poll() is not None
    row, struck = progress(run), time.monotonic()
    struck_ones = everyone(process)
    for one in struck_ones[: 1 if moment.how == "SIGTERM to the command" else None]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill() if moment.how == "kill -9" else one.terminate()
    process.communicate(timeout=PATIENCE)
    psutil.wait_procs(struck_ones, timeout=PATIENCE)
    recent = row.get("phase") == moment.phase and row.get("at", 0) > wall
    where = f"step {row['step']}" if "step" in row else row.get("message", "starting")
    return {
        "reached": "the end" if missed else where if recent else "starting",
        "exit_code": process.returncode,
        "seconds_to_end": round(time.monotonic() - struck, 2),
        "checkpoint": max(whole_checkpoints(run, moment.phase), default=None),
    }


# what is compared


def whole_checkpoints(run: Path, phase: str) -> dict[int, dict[str, str]]:
    "Checksums that the complete checkpoints of a phase carry, by step."
    found = {}
    for folder in (run / "checkpoints" / phase).glob("checkpoint-*"):
        with contextlib.suppress(OSError, StoreError):
            sums = read_json(folder / MARKER)["files"]
            found[int(folder.name.rpartition("-")[2])] = {name: sums[name] for name in STATE}
    return found


@contextlib.contextmanager
def noting(run: Path, phase: str) -> Iterator[list[tuple[int, dict]]]:
    "Within the block, every complete checkpoint that shows itself."
    noted, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            noted.extend(pair for pair in whole_checkpoints(run, phase).items() if pair not in noted)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield noted
    finally:
        over.set()
        thread.join()


def outcome(run: Path, phase: str, noted: list[tuple[int, dict]]) -> dict:
    "All of a finished phase that must not depend on how often it was disturbed."
    metrics = read_json(run / f"{phase}_metrics.json")
    keep = ("step", "loss", "grad_norm", "learning_rate", "tokens", "records")
    return {
        "adapter": file_sha256(run / "adapters" / phase / "adapter_model.safetensors"),
        "steps": [{key: row[key] for key in keep} for row in metrics["steps"]],
        "blocks": metrics["blocks"],
        "held out": {key: metrics["held_out"][key] for key in ("before", "after", "answers_after")},
        "checkpoints": noted,
    }


def differences(one: dict, other: dict) -> list[str]:
    "Names of what differs; of checkpoints, those that both sessions had."
    found = [key for key in one if key != "checkpoints" and one[key] != other[key]]
    known = dict(other["checkpoints"])
    shared = [(step, sums, known[step]) for step, sums in one["checkpoints"] if step in known]
    if max(known) not in [step for step, _, _ in shared]:
        found.append("last checkpoint not seen")
    found += sorted(
        {f"{name} of step {s}" for s, mine, its in shared for name in STATE if mine[name] != its[name]}
    )
    return found


# sessions


def copy_with(run: Path, folder: Path) -> Path:
    "A copy of a run in which only the data step is done."
    made = folder / run.name
    shutil.copytree(
        run, made, ignore=shutil.ignore_patterns("adapters", "[ABC]_*", "checkpoints", "report", ".*")
    )
    session = read_json(made / "session.json")
    write_json(made / "session.json", session | {"steps": {"0": session["steps"]["0"]}})
    return made


def undisturbed(folder: Path) -> tuple[Path, dict[str, dict], dict[str, float]]:
    "The session left in peace: its folder, the outcome and the seconds of each phase."
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    complete("--recipe", "smoke", *settings, "--runs-dir", folder / "first", "--phase", "A")
    run = copy_with(next((folder / "first").glob("*_smoke")), folder / "peace")
    outcomes, seconds = {}, {}
    for phase in PHASES:
        with noting(run, phase) as noted:
            seconds[phase] = complete("--resume", run, "--phase", phase)
        outcomes[phase] = outcome(run, phase, noted)
    return run, outcomes, seconds


def one_phase(run: Path, moment: Moment, expected: dict) -> dict:
    "Disturb a phase, resume it until it is done, compare."
    with noting(run, moment.phase) as noted:
        told = disturb(run, moment)
        try:
            seconds = complete("--resume", run, "--phase", moment.phase)
        except RuntimeError as error:
            return row_of(moment, told, "not resumed", None, [str(error)])
    notes = read_json(run / f"{moment.phase}_metrics.json")["totals"]["notes"]
    resumed = next((n for n in reversed(notes) if n.startswith("went on")), "began again")
    found = differences(outcome(run, moment.phase, noted), expected)
    return row_of(moment, told, resumed, round(seconds, 1), found)


def row_of(moment: Moment, told: dict, resumed: str, seconds: float | None, found: list[str]) -> dict:
    "What is kept of a moment."
    drawn = {"number": moment.number, "how": moment.how, "phase": moment.phase, "moment": str(moment)}
    ended = {"resumed": resumed, "seconds_of_resume": seconds, "differs": found, "equal": not found}
    return drawn | told | ended


COLUMNS = {
    "number": 3,
    "how": 22,
    "phase": 5,
    "moment": 22,
    "reached": 30,
    "checkpoint": 10,
    "resumed": 20,
    "equal": 5,
}


def line(row: dict) -> str:
    return "  ".join(f"{row[key]!s:{width}.{width}}" for key, width in COLUMNS.items())


def measure(folder: Path, kills: int, terms: int) -> dict:
    "All sessions; prints a line for every moment as it is over."
    print("the session left in peace …", flush=True)
    began = time.monotonic()
    peace, expected, seconds = undisturbed(folder)
    steps = {phase: len(expected[phase]["steps"]) for phase in PHASES}
    print(
        f"took {time.monotonic() - began:.0f} s; steps {steps}\n\n{line({k: k for k in COLUMNS})}", flush=True
    )
    plan, rows, began, run = moments(kills, terms, steps, seconds), [], time.monotonic(), peace
    for moment in plan:
        if moment.phase == "A":
            run = copy_with(peace, folder / f"session-{moment.number}")
        rows.append(one_phase(run, moment, expected[moment.phase]))
        left = (time.monotonic() - began) / len(rows) * (len(plan) - len(rows))
        print(f"{line(rows[-1])}  {left / 60:.0f} min left", flush=True)
        for difference in rows[-1]["differs"]:
            print(f"     differs: {difference}", flush=True)
    return {
        "settings": SETTINGS,
        "steps": steps,
        "checkpoints_seen": {phase: len(expected[phase]["checkpoints"]) for phase in PHASES},
        "seconds_of_phases": {phase: round(seconds[phase], 1) for phase in PHASES},
        "moments": rows,
        "equal": sum(row["equal"] for row in rows),
        "of": len(rows),
        "provenance": provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="moments with kill -9")
    parser.add_argument("--terms", type=int, default=5, help="moments with SIGTERM")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "kill_and_resume.json", help="file of the figures"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as folder:
        try:
            report = measure(Path(folder), options.kills, options.terms)
        finally:
            end_all()
    write_json(options.out, report)
    print(f"\n{report['equal']} of {report['of']} sessions' phases equal the undisturbed ones; {options.out}")
    sys.exit(report["equal"] != report["of"])


if __name__ == "__main__":
    main()

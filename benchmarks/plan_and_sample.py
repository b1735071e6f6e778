"""Times of the data path on the full corpus, beside the bare parse of its files.

    make bench

Every time is the median of several runs in one process; `x parse` is its ratio to `json.load` of the same
four files, a run of which stands beside each run of the rest. The figures also go to
benchmarks/results/plan_and_sample.json.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from elson_nb.corpus.buckets import build_buckets, load_index
from elson_nb.corpus.synthesis import write_corpus
from elson_nb.curriculum.plan import plan_cycle, plan_phase, stock_of
from elson_nb.curriculum.sampling import sample_phases, write_samples
from elson_nb.recipes import CurriculumConfig, reference_phases
from elson_nb.session.ledger import provenance

RESULTS = Path(__file__).parent / "results"


def bare_parse(corpus: Path) -> None:
    for path in sorted(corpus.glob("*_training_data.json")):
        with open(path, encoding="utf-8") as file:
            json.load(file)


def stages(folder: Path) -> dict[str, tuple[Callable[[], object], int]]:
    "What is timed, and how many times."
    corpus, buckets, phases = folder / "corpus", folder / "buckets", reference_phases()
    build_buckets([corpus], buckets)
    index = load_index(buckets)
    stock, config = stock_of(index), CurriculumConfig()
    nothing_hard = {cell: n for cell, n in stock.items() if cell[1] != "extremely_complex"}
    samples = sample_phases(index, phases, "all", config)

    def buckets_and_manifests() -> None:
        build_buckets([corpus], folder / "new")
        write_samples(
            sample_phases(load_index(folder / "new"), phases, "all", config), folder / "new", folder
        )

    def fresh() -> None:  # what the last run left is removed before the clock starts
        shutil.rmtree(folder / "new", ignore_errors=True)
        shutil.rmtree(folder / "curriculum_runs", ignore_errors=True)

    return {
        "bare parse": (lambda: bare_parse(corpus), 9, None),
        "sort into buckets": (lambda: build_buckets([corpus], folder / "new"), 9, fresh),
        "plan and sample all phases": (lambda: sample_phases(index, phases, "all", config), 15, None),
        "write manifests and merged files": (lambda: write_samples(samples, buckets, folder), 9, fresh),
        "buckets and manifests, all of it": (buckets_and_manifests, 9, fresh),
        "plan of phase B from the index": (
            lambda: plan_phase("B", phases["B"], 6450, stock_of(index)),
            31,
            None,
        ),
        "plans of all three phases": (lambda: plan_cycle(stock, phases, config), 31, None),
        "plan of C, no hardest tier, nearest": (
            lambda: plan_phase("C", phases["C"], 3600, nothing_hard, None, "nearest"),
            31,
            None,
        ),
    }


def measure(folder: Path) -> dict[str, float]:
    "Median seconds of each stage, one run of each in turn."
    timed = stages(folder)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(max(runs for _, runs, _ in timed.values()) + 1):
        for name, (action, runs, before) in timed.items():
            if turn > runs:
                continue
            if before:
                before()
            started = time.perf_counter()
            action()
            if turn:  # the first run of each does not count
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus", scale=1.0)
        seconds = measure(Path(folder))
    for name, value in seconds.items():
        print(f"{name:36} {1000 * value:9.1f} ms {value / seconds['bare parse']:8.2f} x parse")
    RESULTS.mkdir(exist_ok=True)
    report = {"records": 40993, "seconds": seconds, "provenance": provenance()}
    (RESULTS / "plan_and_sample.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

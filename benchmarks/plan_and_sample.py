"""Times of the data path on the full corpus, beside the bare parse of its files.

    make bench

Every time is the median of several runs in one process; `x parse` is its ratio to parsing the same files
with `json`. The figures also go to benchmarks/results/plan_and_sample.json.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

from elson_nb.corpus.buckets import build_buckets, load_index
from elson_nb.corpus.synthesis import write_corpus
from elson_nb.curriculum.plan import plan_phase
from elson_nb.curriculum.sampling import sample_phases, write_samples
from elson_nb.recipes import CurriculumConfig, reference_phases
from elson_nb.session.ledger import provenance

RESULTS = Path(__file__).parent / "results"


def median_seconds(action, runs: int) -> float:
    "Median wall time of `action` over `runs`, after one run that does not count."
    action()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(folder: Path) -> dict[str, float]:
    "Seconds of each stage on the full generated corpus."
    corpus, buckets, phases = folder / "corpus", folder / "buckets", reference_phases()
    seconds = {"build the corpus": median_seconds(lambda: write_corpus(corpus, scale=1.0), 3)}
    seconds["parse"] = median_seconds(lambda: [json.loads(p.read_bytes()) for p in corpus.glob("*.json")], 5)
    seconds["sort into buckets"] = median_seconds(lambda: build_buckets([corpus], buckets), 3)
    index = load_index(buckets)
    seconds["plan phase B"] = median_seconds(lambda: plan_phase("B", phases["B"], 6450, index), 15)
    draw = lambda: write_samples(sample_phases(index, phases, "all", CurriculumConfig()), buckets, folder)
    seconds["plan, sample and write all phases"] = median_seconds(draw, 3)
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder))
    for name, value in seconds.items():
        print(f"{name:36} {1000 * value:9.1f} ms {value / seconds['parse']:8.1f} x parse")
    RESULTS.mkdir(exist_ok=True)
    report = {"records": 40993, "seconds": seconds, "provenance": provenance()}
    (RESULTS / "plan_and_sample.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

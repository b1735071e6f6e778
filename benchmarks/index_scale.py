"""Plan and sample from synthetic indexes of one to ten million records: time a million and peak memory.

    python benchmarks/index_scale.py [--most 10]

Each size runs in a process of its own, which reads an index from disk, plans the three phases of the
reference curriculum (15,000 records) and draws them, as `elson sample` does. The index has the 114 domains
of the taxonomy with very uneven stocks. Figures and plot: benchmarks/results/index_scale.json and .png.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from elson_nb.corpus.buckets import INDEX_SCHEMA, load_index
from elson_nb.corpus.taxonomy import load_taxonomy
from elson_nb.curriculum.sampling import sample_phases
from elson_nb.recipes import TIERS, CurriculumConfig, reference_phases
from elson_nb.session.ledger import provenance

RESULTS = Path(__file__).parent / "results"
MILLION = 1_000_000


def write_index(path: Path, millions: int, seed: int = 0) -> None:
    "A synthetic index, made a million rows at a time."
    rng = np.random.default_rng(seed)
    weight = rng.pareto(1.0, len(load_taxonomy())) + 0.05
    parts = []
    for part in range(millions):
        digits = rng.bytes(12 * MILLION).hex()
        frame = {
            "id": [digits[n : n + 24] for n in range(0, len(digits), 24)],
            "domain": np.array(list(load_taxonomy()))[
                rng.choice(len(weight), MILLION, p=weight / weight.sum())
            ],
            "tier": np.array(TIERS)[rng.choice(4, MILLION, p=[0.35, 0.38, 0.2, 0.07])],
            "n_tokens": rng.integers(20, 900, MILLION),
            "offset": np.arange(MILLION) * 850,
        }
        rest = {"category": "insurance", "source": "synthetic", "parent": "", "confidence": 1.0}
        rest |= {"domain_because": "category label", "tier_because": "difficulty label"}
        whole = pl.DataFrame(frame).with_columns(pl.lit(v).alias(k) for k, v in rest.items())
        part_path = path.with_suffix(f".{part}.parquet")
        whole.select(pl.col(k).cast(t) for k, t in INDEX_SCHEMA.items()).write_parquet(part_path)
        parts.append(part_path)
    pl.scan_parquet(parts).sink_parquet(path)


def child(folder: Path) -> None:
    "Load, plan and draw once; prints seconds and peak memory as JSON."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    index = load_index(folder)
    loaded = time.perf_counter()
    samples = sample_phases(index, reference_phases(), "all", CurriculumConfig())
    ended = time.perf_counter()
    assert sum(s.rows.height for s in samples.values()) == 15000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = {"load": loaded - started, "plan and sample": ended - loaded}
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "before_mb": before}))


def measure(millions: list[int]) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in millions:
            path = Path(folder) / str(size) / "index.parquet"
            path.parent.mkdir()
            subprocess.run([sys.executable, __file__, "--write", str(path), "--most", str(size)], check=True)
            command = [sys.executable, __file__, "--child", str(path.parent)]
            rows.append({"millions": size} | json.loads(subprocess.check_output(command)))
            total = sum(rows[-1]["seconds"].values())
            each, peak = total / size, rows[-1]["peak_mb"]
            print(f"{size:3} million: {total:6.2f} s, {each:5.2f} s a million, peak {peak:,.0f} MB")
    return rows


def plot(rows: list[dict], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    sizes = [row["millions"] for row in rows]
    for name in ("load", "plan and sample"):
        left.plot(sizes, [row["seconds"][name] for row in rows], marker="o", label=name)
    left.set(xlabel="records in the index (million)", ylabel="seconds", ylim=(0, None))
    left.legend()
    right.plot(sizes, [row["peak_mb"] / 1024 for row in rows], marker="o", color="tab:green")
    right.axhline(2, color="grey", linestyle="--", label="target 2 GB")
    right.set(xlabel="records in the index (million)", ylabel="peak memory (GB)", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=10, help="millions of records in the largest index")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.child)
    if given.write:
        return write_index(given.write, given.most)
    rows = measure([n for n in (1, 2, 4, 6, 8, 10) if n <= given.most])
    RESULTS.mkdir(exist_ok=True)
    report = {"target_records": 15000, "sizes": rows, "provenance": provenance()}
    (RESULTS / "index_scale.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(rows, RESULTS / "index_scale.png")


if __name__ == "__main__":
    main()

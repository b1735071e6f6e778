"""The forecast of a phase held against the phase: a few optimiser steps on SmolLM2-135M by the real trainer.

    python benchmarks/forecast_check.py               # two threads by the wall clock: on an idle machine
    python benchmarks/forecast_check.py --threads 1   # by processor time: for a machine in use

About two minutes; writes benchmarks/results/forecast_check.json. The roof is measured after each step with
the same clock. Steps are counted and must agree; tokens a second and memory are what the forecast is worth.
The first step warms up and does not count.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from elson_nb.corpus.synthesis import build_records
from elson_nb.recipes import load_recipe
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json
from elson_nb.training.base import fetch_base, load_base
from elson_nb.training.batches import encode
from elson_nb.training.forecast import (
    BLOCK_SECONDS,
    ROOF_SHARE,
    compare,
    forecast_phase,
    load_of,
    machine_roof,
    shape_of,
)
from elson_nb.training.phase import train_phase

RESULTS = Path(__file__).parent / "results" / "forecast_check.json"


def records_of(recipe, tokenizer, count: int) -> tuple[list[dict], list]:
    "Records from all over a generated corpus, and their encodings."
    every = build_records(seed=7, scale=0.02)
    records = every[:: len(every) // count][:count]
    pairs = [(r, encode(r, tokenizer, recipe.training.prompt_template)) for r in records]
    kept = [(r, e) for r, e in pairs if len(e) <= recipe.training.max_length]
    return [r for r, _ in kept], [e for _, e in kept]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    recipe = load_recipe("laptop", [f"adapter.rank={given.rank}", f"training.threads={given.threads}"])
    clock = time.process_time if given.threads == 1 else time.perf_counter
    base = fetch_base(recipe.model)
    model, tokenizer = load_base(recipe, base)
    records, examples = records_of(recipe, tokenizer, given.records)
    labelled = sum(sum(e.completion_mask) for e in examples) / sum(map(len, examples))
    lengths, domains = [len(e) for e in examples], [r["domain"] for r in records]
    load, shape = load_of(recipe, "B", lengths, domains, labelled), shape_of(recipe)

    steps, roofs = [], []

    def on_step(row: dict) -> None:
        ended = clock()
        roofs.append(machine_roof(seconds=0.5, threads=given.threads, clock=clock))
        steps.append({"tokens": row["tokens"], "ended": ended, "resumed": clock()})

    with TemporaryDirectory() as folder:
        out = Path(folder) / "B"
        totals = train_phase(
            recipe, "B", records, None, out, base, (model, tokenizer), on_step=on_step
        ).totals
    roof = statistics.median(roofs)
    forecast = forecast_phase(recipe, shape, load, roof)
    seconds = sum(step["ended"] - before["resumed"] for before, step in zip(steps, steps[1:]))
    tokens = sum(step["tokens"] for step in steps[1:])
    calls = load.micro_batches / load.steps * (len(steps) - 1) * shape.layers * BLOCK_SECONDS["cpu"]
    share = forecast["flops_per_token"] * tokens / (seconds - calls) / roof
    rows = compare(forecast, totals | {"tokens_per_second": round(tokens / seconds, 1)})
    rows = [
        row for row in rows if row["figure"] != "minutes"
    ]  # loading and the roofs between steps are in them
    for row in rows:
        print(
            f"{row['figure']:18} forecast {row['forecast']:8} measured {row['measured']:8} x {row['ratio']}"
        )
    print(f"roof {min(roofs) / 1e9:.0f} to {max(roofs) / 1e9:.0f} GFLOP/s")
    print(f"share of it reached {share:.2f}, assumed {ROOF_SHARE['cpu']}")
    facts = {
        "model": recipe.model.name,
        "rank": given.rank,
        "threads": given.threads,
        "records": len(records),
    }
    facts |= {
        "clock": "processor time" if given.threads == 1 else "wall clock",
        "roof_share": round(share, 3),
    }
    facts |= {"roof_gflops": [round(r / 1e9, 1) for r in roofs], "rows": rows, "forecast": forecast}
    write_json(given.out, facts | {"provenance": provenance()})


if __name__ == "__main__":
    main()

"""The forecast of a phase held against the phase: a few optimiser steps on SmolLM2-135M by the real trainer.

    python benchmarks/forecast_check.py   # a minute or two on idle cores; writes results/forecast_check.json

The roof is measured before and after, so that a machine that others use in between shows. Steps are counted
and must agree; tokens a second and memory are what the forecast is worth.
"""

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    recipe = load_recipe("laptop", [f"adapter.rank={given.rank}", f"training.threads={given.threads}"])
    base = fetch_base(recipe.model)
    model, tokenizer = load_base(recipe, base)
    every = build_records(seed=7, scale=0.02)
    records = every[:: len(every) // given.records][: given.records]
    examples = [encode(r, tokenizer, recipe.training.prompt_template) for r in records]
    records, examples = zip(*(pair for pair in zip(records, examples) if len(pair[1]) <= 512))
    labelled = sum(sum(e.completion_mask) for e in examples) / sum(map(len, examples))
    lengths, domains = [len(e) for e in examples], [r["domain"] for r in records]
    load, shape = load_of(recipe, "B", lengths, domains, labelled), shape_of(recipe)

    roofs = [machine_roof(threads=given.threads)]
    with TemporaryDirectory() as folder:
        result = train_phase(recipe, "B", list(records), None, Path(folder) / "B", base, (model, tokenizer))
    roofs.append(machine_roof(threads=given.threads))
    forecast = forecast_phase(recipe, shape, load, sum(roofs) / 2)
    rows = compare(forecast, result.totals)
    computing = (
        sum(row["seconds"] for row in result.steps) - load.micro_batches * shape.layers * BLOCK_SECONDS["cpu"]
    )
    share = forecast["flops_per_token"] * load.tokens / computing / (sum(roofs) / 2)
    for row in rows:
        print(
            f"{row['figure']:18} forecast {row['forecast']:8} measured {row['measured']:8} x {row['ratio']}"
        )
    print(f"roof {roofs[0] / 1e9:.0f} and {roofs[1] / 1e9:.0f} GFLOP/s")
    print(f"share of it reached {share:.2f}, assumed {ROOF_SHARE['cpu']}")
    facts = {
        "rank": given.rank,
        "threads": given.threads,
        "records": len(records),
        "model": recipe.model.name,
    }
    facts |= {"roof_gflops": [round(r / 1e9, 1) for r in roofs], "roof_share": round(share, 3), "rows": rows}
    write_json(given.out, facts | {"forecast": forecast, "provenance": provenance()})


if __name__ == "__main__":
    main()

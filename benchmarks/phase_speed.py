"""A whole phase on the real length distribution: TRL and PEFT as a user configures them, against this engine.

    python benchmarks/phase_speed.py [--records 24] [--rounds 3] [--out FILE.json]

All arms train the same DoRA adapter (rank 16, dropout 0.05) of SmolLM2-135M on the same records of a
generated corpus, eight records an optimiser step, in the same order, in one process, round after round.
Counted are real tokens: padding is no work done. Arms:

- `trl`: `SFTTrainer` with a `LoraConfig(use_dora=True)` and TRL's defaults, which recompute activations;
- `trl, no recomputation`: the same with `gradient_checkpointing=False`, for a user with memory to spare;
- `elson`: `train_phase` with dropout as above;
- `elson, dropout 0`: the laptop recipe, which has none.

The first three minimise the same loss on the same data, so their mean training losses must agree up to the
drawn dropout.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from elson_nb.corpus.synthesis import build_files
from elson_nb.recipes import load_recipe
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json
from elson_nb.training.base import fetch_base, load_base, load_tokenizer
from elson_nb.training.batches import encode, format_prompt
from elson_nb.training.phase import train_phase

TARGET = 2.5  # tokens per second of this engine over those of TRL and PEFT
DROPOUT = 0.05


def real_records(recipe, count: int) -> list[dict]:
    "Records of the generated corpus within `max_length`, evenly from all its files."
    tokenizer = load_tokenizer(fetch_base(recipe.model))
    files, _ = build_files(seed=42, scale=0.03, domains=recipe.curriculum.corpus_domains)
    records = [record for made in files.values() for record in made]
    short = [r for r in records if len(encode(r, tokenizer)) <= recipe.training.max_length]
    return short[:: max(1, len(short) // count)][:count]


def train_with_trl(recipe, records: list[dict], recompute: bool, folder: Path) -> dict:
    "One epoch with TRL's trainer; returns seconds of training and the mean loss of its steps."
    model, tokenizer = load_base(recipe)
    rows = [
        {"prompt": format_prompt(r["instruction"], r["input"]), "completion": r["output"]} for r in records
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=recipe.training.records_per_step,
            learning_rate=recipe.training.learning_rate,
            max_length=recipe.training.max_length,
            num_train_epochs=1,
            gradient_checkpointing=recompute,
            train_sampling_strategy="sequential",  # the default shuffles, and losses could not be compared
            seed=recipe.training.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=recipe.adapter.rank,
            lora_alpha=recipe.adapter.lora_alpha,
            lora_dropout=DROPOUT,
            target_modules=recipe.adapter.target_modules,
            use_dora=True,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"seconds": seconds, "loss": statistics.fmean(losses)}


def train_with_elson(recipe, records: list[dict], dropout: float, folder: Path) -> dict:
    "The same epoch with this engine."
    settings = [
        "training.competence.rule=none",
        f"adapter.lora_dropout={dropout}",
        "training.lr_scheduler_type=linear",  # TRL's default, so that losses can be compared
        "training.warmup_ratio=0",
    ]
    own = load_recipe("laptop", settings)
    began = time.perf_counter()
    result = train_phase(own, "B", records, None, folder / "B", loaded=load_base(own))
    whole = time.perf_counter() - began
    seconds = sum(row["seconds"] for row in result.steps)
    return {
        "seconds": seconds,
        "seconds_with_setup": whole,
        "loss": statistics.fmean(row["loss"] for row in result.steps),
        "padding_share": result.totals["padding_share"],
        "norms_per_layer_and_step": result.totals["norms_per_layer_and_step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    recipe = load_recipe("laptop")
    torch.set_num_threads(recipe.training.threads)
    records = real_records(recipe, args.records)
    tokenizer = load_tokenizer(fetch_base(recipe.model))
    tokens = sum(len(encode(r, tokenizer)) for r in records)
    arms = {
        "trl": lambda place: train_with_trl(recipe, records, True, place),
        "trl, no recomputation": lambda place: train_with_trl(recipe, records, False, place),
        "elson": lambda place: train_with_elson(recipe, records, DROPOUT, place),
        "elson, dropout 0": lambda place: train_with_elson(recipe, records, 0.0, place),
    }
    measured: dict[str, list[dict]] = {name: [] for name in arms}
    began, total = time.perf_counter(), args.rounds * len(arms)
    for _ in range(args.rounds):
        for name, arm in arms.items():
            with tempfile.TemporaryDirectory() as place:
                measured[name].append(arm(Path(place)))
            done = sum(map(len, measured.values()))
            left = (time.perf_counter() - began) / done * (total - done)
            print(f"{done} of {total} runs, about {left / 60:.1f} min left", file=sys.stderr)
    rows = [
        {
            "arm": name,
            "tokens_per_second": round(tokens / statistics.median(r["seconds"] for r in runs), 1),
            "mean_loss": round(statistics.median(r["loss"] for r in runs), 4),
            **{k: runs[0][k] for k in ("padding_share", "norms_per_layer_and_step") if k in runs[0]},
        }
        for name, runs in measured.items()
    ]
    speed = {row["arm"]: row["tokens_per_second"] for row in rows}
    ratios = {name: round(speed["elson"] / speed[name], 2) for name in list(arms)[:2]}
    result = {
        "records": len(records),
        "real_tokens": tokens,
        "rounds": args.rounds,
        "arms": rows,
        "elson_over": ratios,
        "target": TARGET,
        "verdict": "MET" if ratios["trl"] >= TARGET else "MISSED",
        "loss_difference": round(abs(rows[0]["mean_loss"] - rows[2]["mean_loss"]), 4),
        "runs": measured,
        "provenance": provenance(),
    }
    for row in rows:
        print(f"{row['arm']:24} {row['tokens_per_second']:8.1f} tokens/s   mean loss {row['mean_loss']:.4f}")
    for name, ratio in ratios.items():
        print(f"elson / {name}: {ratio:.2f}")
    print(f"target {TARGET} against trl: {result['verdict']}; losses differ by {result['loss_difference']}")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()

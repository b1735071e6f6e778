"""Seconds of an optimiser step of PEFT's LoRA, PEFT's DoRA and ours, side by side: SmolLM2-135M on the CPU.

    python benchmarks/dora_speed.py           # half an hour, alone on the machine; to benchmarks/results
    python benchmarks/dora_speed.py --quick   # one configuration, two steps; written only with --out

One process holds all three arms over the same frozen base. They take the same batches in turn, and the
turn goes round, so that a slow minute of the machine falls on all of them. A micro-batch is eight
records of the generated corpus in random order, padded to the longest; the loss is that of the training
engine in every arm, so the arms differ in their adapter layers alone. A step is all of it: forward and
backward passes, AdamW, and what was kept for the step being dropped. Seconds are medians over the steps,
ratios medians of the ratios of each turn. A first step warms up and does not count; peak memory is read
in it, freed memory given back first.

The share of the roof is the arithmetic that has to be done, over the seconds, over the rate of a 2048 x
2048 x 2048 product measured between the turns. A layer with i inputs, o outputs and rank r has to do,
for t positions,

    base product, input's gradient   2 t i o each (no gradient for the first q, k and v: nothing below learns)
    LoRA, and DoRA with dropout      6 t r (i + o), two products forward and four back
    DoRA without dropout, merged     4 t r (i + o), the four products of the gradients of A and B
    DoRA, once a step                2 i o r, the change of the matrix or its product with A
                                     (and 2 r r (i + o) where the norm comes from the factors)

and beside the layers causal attention (two products forward, four back, over the pairs that see each
other) and the vocabulary head at labelled positions, forward and back. Both arms of DoRA are held to the
same count: what PEFT does beyond it is the point of the comparison. Padded positions count, as every arm
computes them.
"""

import argparse
import copy
import ctypes
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer

from elson_nb.corpus.synthesis import build_records
from elson_nb.recipes import AdapterConfig, load_recipe
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json
from elson_nb.training.adapter import adapter_config
from elson_nb.training.base import load_base
from elson_nb.training.batches import encode, pad
from elson_nb.training.dora import accelerate_dora, fast_layers, mark_step, norm_evaluations
from elson_nb.training.head import answer_loss

RESULTS = Path(__file__).parent / "results" / "dora_speed.json"
LORA, PEFT, OURS = ARMS = ("PEFT LoRA", "PEFT DoRA", "ours")
CONFIGURATIONS = [  # rank, accumulation, dropout
    (16, 1, 0.0),
    (128, 1, 0.0),
    (16, 4, 0.0),
    (128, 4, 0.0),
    (16, 1, 0.05),
    (128, 1, 0.05),
]
RECORDS, MAX_LENGTH, ROOF_SIZE = 8, 512, 2048


# what has to be computed


def linear_shapes(config) -> dict[str, tuple[int, int]]:
    "Inputs and outputs of the adapted layers of one block."
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = {"q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden)}
    return attention | {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}


def products_of_batch(
    config,  # of the model
    tensors: dict[str, torch.Tensor],  # as `pad` makes them
    rank: int,
    form: str,  # lora, merged or factored
) -> int:
    "Floating-point operations of the products that one micro-batch needs, forward and back."
    count, length = tensors["input_ids"].shape
    positions, labelled = count * length, int((tensors["labels"][:, 1:] != -100).sum())
    shapes, layers = linear_shapes(config), config.num_hidden_layers
    sides = 4 if form == "merged" else 6
    block = sum(4 * positions * i * o + sides * positions * rank * (i + o) for i, o in shapes.values())
    unneeded = sum(2 * positions * i * (o + (rank if sides == 6 else 0)) for i, o in map(shapes.get, "qkv"))
    attention = 6 * shapes["q"][1] * count * length * (length + 1)
    head = 4 * labelled * config.hidden_size * config.vocab_size
    return layers * (block + attention) - unneeded + head


def products_of_step(config, rank: int, form: str) -> int:
    "Those that are needed once per optimiser step: the norm, and the merged matrix with it."
    if form == "lora":
        return 0
    pairs = linear_shapes(config).values()
    norm = sum(2 * i * o * rank + (2 * rank**2 * (i + o) if form == "factored" else 0) for i, o in pairs)
    return config.num_hidden_layers * norm


# the arms


def build(base: torch.nn.Module, arm: str, rank: int, dropout: float) -> torch.nn.Module:
    "One arm on the base's own frozen tensors."
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    settings = AdapterConfig("lora" if arm == LORA else "dora", rank, 2 * rank, dropout)
    torch.manual_seed(0)
    model = get_peft_model(model, adapter_config(settings))
    if arm == OURS:
        accelerate_dora(model)
    return model.train()


def micro_batches(recipe, tokenizer, count: int) -> list[dict[str, torch.Tensor]]:
    "Padded batches of records in random order, the same ones every time."
    records = build_records(seed=42, scale=0.02)
    random.Random(0).shuffle(records)
    examples = (encode(r, tokenizer, recipe.training.prompt_template) for r in records)
    kept = [e for e in examples if len(e) <= MAX_LENGTH]
    starts = (n * RECORDS % (len(kept) - RECORDS) for n in range(count))
    return [pad(kept[n : n + RECORDS], tokenizer.pad_token_id) for n in starts]


class TheirNorms:
    "Counts the norms that PEFT computes."

    def __init__(self):
        self.count, plain = 0, DoraLinearLayer.get_weight_norm

        def counted(layer, *args, **kwargs):
            self.count += 1
            return plain(layer, *args, **kwargs)

        DoraLinearLayer.get_weight_norm = counted


def memory_mb(reset: bool = False) -> float | None:
    "Resident memory after a reset of the peak, else the peak since; None where the system does not tell."
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmRSS" if reset else "VmHWM"].split()[0]) / 1000
    except (OSError, AttributeError):
        return None


def take_step(model, optimiser, batches: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    "Seconds and loss of one optimiser step."
    begun, total = time.perf_counter(), 0.0
    labelled = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for tensors in batches:
        loss, _ = answer_loss(model, tensors)
        (loss / labelled).backward()
        total += float(loss.detach())
    optimiser.step()
    optimiser.zero_grad()
    mark_step(model)
    return time.perf_counter() - begun, total / labelled


def measure_roof(times: int = 3) -> list[float]:
    "Operations a second of a large product, each time."
    a, b = torch.randn(2, ROOF_SIZE, ROOF_SIZE)
    out, rates = torch.empty(ROOF_SIZE, ROOF_SIZE), []
    for _ in range(times + 1):
        begun = time.perf_counter()
        torch.mm(a, b, out=out)
        rates.append(2 * ROOF_SIZE**3 / (time.perf_counter() - begun))
    return rates[1:]


class Progress:
    "One line on stderr that says how far it is and how long it will take."

    def __init__(self, units: int):
        self.units, self.done, self.begun = units, 0, time.perf_counter()

    def add(self, units: int, what: str) -> None:
        self.done += units
        left = (time.perf_counter() - self.begun) / self.done * (self.units - self.done)
        print(
            f"\r{self.done / self.units:4.0%}, {left / 60:.0f} min left: {what:<44}", end="", file=sys.stderr
        )


def measure(base, batches: list, rank: int, dropout: float, steps: int, norms: TheirNorms, tell) -> dict:
    "One configuration: every step by every arm in turn; the first step warms up and does not count."
    models = {arm: build(base, arm, rank, dropout) for arm in ARMS}
    optimisers = {
        arm: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
        for arm, m in models.items()
    }
    layers = len(fast_layers(models[OURS]))
    form = {LORA: "lora"} | dict.fromkeys((PEFT, OURS), "factored" if dropout else "merged")
    seconds, losses, shares = ({arm: [] for arm in ARMS} for _ in range(3))
    counted, peaks, roof = Counter(), {}, []
    for step in range(steps + 1):
        rates = measure_roof()
        for arm in ARMS[step % 3 :] + ARMS[: step % 3]:
            model, micro = models[arm], batches[step]
            before = norms.count + norm_evaluations(model)
            start = None if step else memory_mb(reset=True)
            took, loss = take_step(model, optimisers[arm], micro)
            losses[arm].append(loss)
            if start is not None:
                peaks[arm] = memory_mb() - start
            if step:
                needed = sum(products_of_batch(base.config, b, rank, form[arm]) for b in micro)
                needed += products_of_step(base.config, rank, form[arm])
                seconds[arm].append(took)
                shares[arm].append(needed / took / statistics.median(rates))
                counted[arm] += norms.count + norm_evaluations(model) - before
            tell(len(micro), f"rank {rank}, accumulation {len(micro)}, dropout {dropout}, {arm}")
        roof += rates
    ratio = lambda a, b: [x / y for x, y in zip(seconds[a], seconds[b])]
    middle = lambda values: {arm: statistics.median(v) for arm, v in values.items()}
    return {
        "seconds": middle(seconds),
        "seconds_of_each_step": seconds,
        "ours_to_lora": statistics.median(ratio(OURS, LORA)),
        "ours_to_lora_range": [min(ratio(OURS, LORA)), max(ratio(OURS, LORA))],
        "peft_to_ours": statistics.median(ratio(PEFT, OURS)),
        "peft_to_ours_range": [min(ratio(PEFT, OURS)), max(ratio(PEFT, OURS))],
        "roof_share": middle(shares),
        "roof_gflops": statistics.median(roof) / 1e9,
        "norms_a_layer_and_step": {arm: counted[arm] / steps / layers for arm in ARMS},
        "peak_mb_above_start": peaks,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses[OURS], losses[PEFT])),
    }


# the report


def targets(row: dict) -> list[tuple[str, float, str, bool]]:
    "Name, value, bound and whether it is met."
    fold, share, norms = (
        2.0 if row["dropout"] else 1.7,
        row["roof_share"][OURS],
        row["norms_a_layer_and_step"][OURS],
    )
    return [
        ("ours / LoRA", row["ours_to_lora"], "<= 1.00", row["ours_to_lora"] <= 1.0),
        ("PEFT DoRA / ours", row["peft_to_ours"], f">= {fold:.1f}", row["peft_to_ours"] >= fold),
        ("share of the roof", share, ">= 0.65", share >= 0.65),
        ("norms a layer and step", norms, "= 1", norms == 1),
    ]


def line(row: dict) -> str:
    "The figures of one configuration."
    three = lambda key, form: " ".join(format(row[key].get(arm, float("nan")), form) for arm in ARMS)
    return (
        f"{row['rank']:4} {row['accumulation']:4} {row['dropout']:7} | {three('seconds', '7.2f')} | "
        f"{three('roof_share', '6.1%')} | {row['norms_a_layer_and_step'][PEFT]:12.1f} | "
        f"{three('peak_mb_above_start', '5.0f')}"
    )


def report(rows: list[dict]) -> str:
    "The figures, then every target with its verdict."
    head = "rank acc. dropout |  LoRA s  PEFT s  ours s | share of the roof    | PEFT's norms | peak MB more"
    lines = [head, *map(line, rows)]
    for row in rows:
        lines.append(f"\nrank {row['rank']}, accumulation {row['accumulation']}, dropout {row['dropout']}")
        lines += [
            f"  {name:24} {value:6.3f}  target {bound:8} {'MET' if met else 'MISSED'}"
            for name, value, bound, met in targets(row)
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=7, help="optimiser steps that count, after one that warms up"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="rank 16, two steps; written only where --out is given"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    steps = 2 if given.quick else given.steps
    configurations = CONFIGURATIONS[:1] if given.quick else CONFIGURATIONS
    recipe = load_recipe("laptop", [f"training.threads={given.threads}"])
    base, tokenizer = load_base(recipe)
    norms, rows = TheirNorms(), []
    progress = Progress(sum(3 * (steps + 1) * accumulation for _, accumulation, _ in configurations))
    for rank, accumulation, dropout in configurations:
        every = micro_batches(recipe, tokenizer, (steps + 1) * accumulation)
        batches = [every[n : n + accumulation] for n in range(0, len(every), accumulation)]
        row = {"rank": rank, "accumulation": accumulation, "dropout": dropout}
        rows.append(row | measure(base, batches, rank, dropout, steps, norms, progress.add))
    print(file=sys.stderr)
    print(report(rows))
    if given.out or not given.quick:
        facts = {
            "model": recipe.model.name,
            "steps": steps,
            "threads": given.threads,
            "records_a_micro_batch": RECORDS,
        }
        named = ("target", "value", "bound", "met")
        rows = [row | {"targets": [dict(zip(named, target)) for target in targets(row)]} for row in rows]
        write_json(given.out or RESULTS, facts | {"rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()

"""Training throughput of a 14B model on one GPU: PEFT's LoRA and DoRA, ours, and ours with one idea removed.

    python benchmarks/gpu_throughput.py         # one H100 or H200, ten minutes at most; to benchmarks/results
    python benchmarks/gpu_throughput.py --tiny  # the same program on a tiny shape on the CPU, in seconds

Needs torch 2.11 or newer, transformers 5.17 or newer and most of an 80 GB GPU; no network, no weights:
the model has the shape of Qwen2.5-14B and random weights, made on the device. Until somebody runs it,
throughput on an H100 or H200 is unmeasured: no figures of a GPU are kept beside this program. Those of
`--tiny` say that the program works, and nothing about speed.

A step is 64 records in four micro-batches of 16, in bfloat16 at rank 128, without recomputation, under
autocast as the trainer runs it. Records have the lengths of the generated corpus: in tokens of a
tokenizer where one is given, else at four bytes a token. The ids are random. The records of a step are
sorted by length before they are cut. Each of the last arms lacks one idea: a norm in every forward pass;
the base product taken twice, as PEFT does where there is dropout; logits at every position;
micro-batches in random order.

Tokens are real ones, padding is not counted. Operations are those of `dora_speed.py` (for LoRA, and for
DoRA from its factors) over real tokens alone, so padding and needless products lower an arm's share. The
roof is the rate of the model's own seven products, forward and back, at the rows of a micro-batch,
weighted by their work. Arms are left out, with a note, when the time is up or the memory does not
suffice.
"""

import argparse
import contextlib
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from dora_speed import linear_shapes, products_of_batch, products_of_step
from peft import get_peft_model
from torch import nn
from torch.autograd.function import Function
from transformers import AutoModelForCausalLM, Qwen2Config

from elson_nb.corpus.synthesis import build_records
from elson_nb.recipes import AdapterConfig
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json
from elson_nb.training.adapter import adapter_config
from elson_nb.training.base import load_tokenizer
from elson_nb.training.batches import Example, encode, format_prompt, pad
from elson_nb.training.dora import accelerate_dora, fast_layers, mark_step, norm_evaluations
from elson_nb.training.head import answer_loss

RESULTS = Path(__file__).parent / "results" / "gpu_throughput.json"
SHAPE = {
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 13824,
    "vocab_size": 152064,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 512,
}
BYTES_A_TOKEN = 4
OURS, LORA, PEFT = "ours", "PEFT LoRA", "PEFT DoRA"


@dataclass(frozen=True)
class Setting:
    "What all arms share."

    device: torch.device
    rank: int
    dropout: float
    records: int  # of a micro-batch
    accumulation: int
    steps: int  # that count, after one that warms up


# the data


def examples(tokenizer, vocabulary: int, count: int) -> list[Example]:
    "Random ids at the lengths of corpus records, prompts without labels, in random order."
    rng = random.Random(0)
    records = build_records(seed=42, scale=0.02)
    rng.shuffle(records)
    made = []
    for record in records[:count]:
        if tokenizer:
            mask = encode(record, tokenizer).completion_mask
        else:
            prompt = format_prompt(record["instruction"], record.get("input", ""))
            parts = (len(text.encode()) // BYTES_A_TOKEN + 1 for text in (prompt, record["output"]))
            mask = [label for label, length in enumerate(parts) for _ in range(length)]
        made.append(Example(record["id"], rng.choices(range(vocabulary), k=len(mask)), mask))
    return made


def steps_of(found: list[Example], setting: Setting, by_length: bool) -> list[list[list[Example]]]:
    "Micro-batches of every step, the warm-up first."
    size, steps = setting.records * setting.accumulation, []
    for number in range(setting.steps + 1):
        start = number * size % (len(found) - size + 1)
        step = found[start : start + size]
        step = sorted(step, key=len) if by_length else step
        steps.append([step[n : n + setting.records] for n in range(0, size, setting.records)])
    return steps


# the machine


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], object], device: torch.device, times: int = 5) -> float:
    "Median, after one that warms up."
    taken = []
    for _ in range(times + 1):
        wait(device)
        begun = time.perf_counter()
        action()
        wait(device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def measure_roof(config, rows: int, device: torch.device) -> float:
    "Operations a second of a block's products, forward and back, one matrix after the other."
    work = taken = 0.0
    for inputs, outputs in linear_shapes(config).values():
        options = {"device": device, "dtype": torch.bfloat16}
        x, grad = torch.randn(rows, inputs, **options), torch.randn(rows, outputs, **options)
        weight = torch.randn(outputs, inputs, **options)
        taken += seconds_of(lambda x=x, w=weight: torch.mm(x, w.t()), device)
        taken += seconds_of(lambda g=grad, w=weight: torch.mm(g, w), device)
        work += 4 * rows * inputs * outputs
    return work / taken


# the arms


class Again(Function):
    "Passes an output through and repeats the base product of its layer, forward and back."

    @staticmethod
    def forward(ctx, out, x, weight):
        ctx.weight = weight
        torch.mm(x.reshape(-1, x.shape[-1]).to(weight.dtype), weight.t())
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        torch.mm(grad.reshape(-1, grad.shape[-1]).to(ctx.weight.dtype), ctx.weight)
        return grad, None, None


def all_logits(model: nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    "The summed loss from logits at every position."
    inputs = {k: tensors[k] for k in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = tensors["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return loss, int((labels != -100).sum())


@contextlib.contextmanager
def without(idea: str, model: nn.Module) -> Iterator[None]:
    "Within the block the model lacks one idea."
    hooks = []
    if idea == "norm kept":
        hooks.append(model.register_forward_pre_hook(lambda *_: mark_step(model)))
    elif idea == "one base product":
        for layer in fast_layers(model):
            weight = layer.get_base_layer().weight.detach()
            hook = lambda module, args, out, weight=weight: Again.apply(out, args[0], weight)
            hooks.append(layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


ABLATIONS = {  # name of the arm -> idea that it lacks
    "ours, a norm every forward pass": "norm kept",
    "ours, base product twice": "one base product",
    "ours, logits everywhere": "labelled logits",
    "ours, random micro-batches": "sorted by length",
}


def attach(base: nn.Module, arm: str, setting: Setting) -> nn.Module:
    "The adapter of an arm on the base, which is changed in place; `unload` gives it back."
    method = "lora" if arm == LORA else "dora"
    torch.manual_seed(0)
    chosen = AdapterConfig(method, setting.rank, 2 * setting.rank, setting.dropout)
    with setting.device:
        model = get_peft_model(base, adapter_config(chosen))
    if arm == OURS:
        accelerate_dora(model)
    return model.train()


def take_step(model, optimiser, batches: list[dict], loss_of) -> float:
    "One optimiser step; returns the loss of a labelled token."
    total, labelled = 0.0, sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for tensors in batches:
        with torch.autocast(tensors["input_ids"].device.type, torch.bfloat16):
            loss, _ = loss_of(model, tensors)
        (loss / labelled).backward()
        total = total + loss.detach()
    optimiser.step()
    optimiser.zero_grad()
    mark_step(model)
    return float(total) / labelled


def operations(config, step: list[list[Example]], setting: Setting, arm: str) -> int:
    "What a step needs, by real tokens: every record as if it were alone."
    form = "lora" if arm.startswith(LORA) else "factored"
    alone = sum(products_of_batch(config, pad([e], 0), setting.rank, form) for batch in step for e in batch)
    return alone + products_of_step(config, setting.rank, form)


def measure(model: nn.Module, arm: str, steps: list, setting: Setting, deadline: float) -> dict:
    "Seconds, tokens a second, operations a second and peak memory of an arm."
    device, config = setting.device, model.config
    idea = ABLATIONS.get(arm, "")
    loss_of = all_logits if idea == "labelled logits" else answer_loss
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=device.type == "cuda"
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rates, seconds, losses, before = [], [], [], norm_evaluations(model)
    with without(idea, model):
        for number, step in enumerate(steps):
            if number > 1 and time.perf_counter() > deadline:
                break
            batches = [{k: v.to(device) for k, v in pad(b, 0).items()} for b in step]
            wait(device)
            begun = time.perf_counter()
            losses.append(take_step(model, optimiser, batches, loss_of))
            wait(device)
            taken = time.perf_counter() - begun
            if number:
                tokens = sum(len(e) for batch in step for e in batch)
                rates.append((tokens / taken, operations(config, step, setting, arm) / taken))
                seconds.append(taken)
    layers = len(fast_layers(model))
    norms = (norm_evaluations(model) - before) / layers / len(losses) if layers else None
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "arm": arm,
        "steps": len(seconds),
        "seconds_a_step": statistics.median(seconds),
        "tokens_per_second": statistics.median(rate for rate, _ in rates),
        "tflops": statistics.median(rate for _, rate in rates) / 1e12,
        "peak_gib": peak,
        "norms_a_layer_and_step": norms,
        "loss": losses[-1],
    }


class Clock:
    "What is left of the time, and a line on stderr about it."

    def __init__(self, budget: float):
        self.end, self.longest = time.perf_counter() + budget, 0.0

    def left(self) -> float:
        return self.end - time.perf_counter()

    def say(self, what: str) -> None:
        print(f"{self.left():4.0f} s left: {what}", file=sys.stderr, flush=True)


def run_arms(base: nn.Module, found: list[Example], setting: Setting, clock: Clock) -> list[dict]:
    "Every arm that time and memory admit, LoRA first and once more at the end."
    sorted_steps, random_steps = (steps_of(found, setting, by_length) for by_length in (True, False))
    rows = []
    groups = {LORA: [LORA], PEFT: [PEFT], OURS: [OURS, *ABLATIONS], f"{LORA} again": [f"{LORA} again"]}
    for adapter, arms in groups.items():
        model = None
        for arm in arms:
            if clock.left() < 1.3 * clock.longest:
                rows.append({"arm": arm, "note": "left out: the time was up"})
                continue
            clock.say(arm)
            begun = time.perf_counter()
            try:
                model = model or attach(base, adapter.removesuffix(" again"), setting)
                steps = random_steps if ABLATIONS.get(arm) == "sorted by length" else sorted_steps
                rows.append(measure(model, arm, steps, setting, clock.end))
            except torch.OutOfMemoryError as error:
                rows.append({"arm": arm, "note": f"left out: {str(error).splitlines()[0][:120]}"})
                if model is not None:
                    model.zero_grad()
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
            clock.longest = max(clock.longest, time.perf_counter() - begun)
        if model is not None:
            base = model.unload()
    return rows


# the report


def complete(rows: list[dict], roof: float) -> list[dict]:
    "Ratios of seconds to LoRA, and shares of the roof."
    lora = next((r["seconds_a_step"] for r in rows if r["arm"] == LORA and "note" not in r), None)
    for row in rows:
        if "note" not in row:
            row["share_of_roof"] = row["tflops"] * 1e12 / roof
            row["to_lora"] = row["seconds_a_step"] / lora if lora else None
    return rows


def targets(rows: list[dict]) -> list[dict]:
    "What is asked of our arm; met is None where it was not measured."
    ours = next((r for r in rows if r["arm"] == OURS and "note" not in r), {})
    ratio, share = ours.get("to_lora"), ours.get("share_of_roof")
    bounds = (
        ("ours / LoRA", ratio, "<= 1.05", ratio is not None and ratio <= 1.05),
        ("share of the roof", share, ">= 0.60", share is not None and share >= 0.60),
    )
    return [
        {"target": name, "value": value, "bound": bound, "met": None if value is None else met}
        for name, value, bound, met in bounds
    ]


def show(rows: list[dict], roof: float, met: list[dict]) -> None:
    print(f"roof {roof / 1e12:,.3g} TFLOP/s at the model's own products\n")
    print(
        f"{'arm':32} {'s a step':>9} {'tokens/s':>9} {'TFLOP/s':>9} {'of roof':>8} {'to LoRA':>8} {'GiB':>6}"
    )
    for row in rows:
        if "note" in row:
            print(f"{row['arm']:32} {row['note']}")
            continue
        peak = f"{row['peak_gib']:6.1f}" if row["peak_gib"] is not None else "     -"
        ratio = f"{row['to_lora']:8.3f}" if row["to_lora"] is not None else "       -"
        rates = f"{row['seconds_a_step']:9.3f} {row['tokens_per_second']:9,.0f} {row['tflops']:9.3g}"
        print(f"{row['arm']:32} {rates} {row['share_of_roof']:8.1%} {ratio} {peak}")
    for row in met:
        verdict = {True: "MET", False: "MISSED", None: "NOT MEASURED"}[row["met"]]
        value = "-" if row["value"] is None else f"{row['value']:.3f}"
        print(f"{row['target']:20} {value:>7}  target {row['bound']:8} {verdict}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shape on the CPU; written only with --out")
    parser.add_argument("--budget-seconds", type=float, default=540)
    parser.add_argument("--steps", type=int, default=5, help="steps that count, after one that warms up")
    parser.add_argument("--dropout", type=float, default=0.05, help="the reference recipe's")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer that gives the lengths")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    clock = Clock(given.budget_seconds)
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny tries the program on a CPU")
    device = torch.device("cpu" if given.tiny else "cuda")
    size = (4, 2, 2) if given.tiny else (128, 16, 4)
    setting = Setting(device, size[0], given.dropout, *size[1:], given.steps)
    config = Qwen2Config(**(TINY if given.tiny else SHAPE), max_position_embeddings=4096, use_cache=False)
    clock.say("making the model")
    torch.manual_seed(0)
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    base.requires_grad_(False)
    tokenizer = load_tokenizer(given.tokenizer) if given.tokenizer else None
    count = setting.records * setting.accumulation * (setting.steps + 1)
    found = examples(tokenizer, config.vocab_size, count)
    mean = round(statistics.mean(map(len, found)))
    clock.say("measuring the roof")
    roof = measure_roof(config, setting.records * mean, device)
    rows = complete(run_arms(base, found, setting, clock), roof)
    met = targets([] if given.tiny else rows)
    show(rows, roof, met)
    if given.out or not given.tiny:
        facts = {
            "device": "a CPU, to try the program" if given.tiny else torch.cuda.get_device_name(device),
            "shape": TINY if given.tiny else SHAPE,
            "rank": setting.rank,
            "dropout": setting.dropout,
            "records_a_micro_batch": setting.records,
            "accumulation": setting.accumulation,
            "mean_tokens_a_record": mean,
            "lengths": "tokenizer" if tokenizer else f"{BYTES_A_TOKEN} bytes a token",
            "roof_tflops": roof / 1e12,
        }
        write_json(given.out or RESULTS, facts | {"arms": rows, "targets": met, "provenance": provenance()})


if __name__ == "__main__":
    main()

"""How exact DoRA is, ours and PEFT's: norms and gradients against float64, losses against PEFT's.

    python benchmarks/dora_exact.py             # three minutes of two cores; figures to benchmarks/results

Norms: all 210 adapted matrices of SmolLM2-135M with their real weights, the low-rank part random and a
tenth as large as the weight (Frobenius norm); the largest relative error of any row. Gradients: the
seven matrices of the first, the middle and the last block, 128 random inputs; output and gradients of x,
A, B and m against the formula of the paper in float64 under autograd; the largest relative difference
(of norms) of a matrix. Losses: 50 steps of AdamW on a tiny random model, since the real one would take
an hour; the largest difference of any loss to that of PEFT's DoRA from the same seed. (In float64 too
the model's own norms round to float32, which hides differences below that.)
"""

import argparse
import copy
from collections import defaultdict
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from elson_nb.recipes import load_recipe
from elson_nb.session.ledger import provenance
from elson_nb.store import write_json
from elson_nb.training.base import load_base
from elson_nb.training.dora import accelerate_dora, mark_step

RESULTS = Path(__file__).parent / "results" / "dora_exact.json"
WAYS = {"ours, merged": "auto", "ours, factored": "factored", "PEFT": None}
KINDS = [  # type of the weights, type of the adapter
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def adapted(base: nn.Linear, kinds: tuple[torch.dtype, torch.dtype], rank: int) -> nn.Module:
    "One DoRA layer of PEFT with a low-rank part of a tenth of the weight, and magnitudes that were trained."
    holder = nn.Sequential(copy.deepcopy(base).to(kinds[0]))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=True, target_modules=["0"])
    torch.manual_seed(rank)
    layer = get_peft_model(holder, config, autocast_adapter_dtype=kinds[1] == torch.float32).base_model.model[
        0
    ]
    a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    b.normal_()
    b *= 0.1 * base.weight.norm() / (2 * b.float() @ a.float()).norm()
    m = layer.lora_magnitude_vector["default"].weight.data
    m *= 1 + 0.1 * torch.randn_like(m)
    return layer


def switched(layer: nn.Module, way: str) -> nn.Module:
    "The layer with the forward pass of that way."
    if WAYS[way]:
        accelerate_dora(layer, WAYS[way])
    return layer


def norm_of(layer: nn.Module, way: str) -> Tensor:
    "The norms that the layer's forward pass uses."
    m, kind = layer.lora_magnitude_vector["default"], layer.get_base_layer().weight.dtype
    if WAYS[way]:
        gain = layer.prepare("default", torch.zeros(1, 1, dtype=kind)).gain
        return m.weight.to(gain.dtype) / gain
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    change = m.get_lora_weight(lora_A=a, lora_B=b)
    weight = layer.get_base_layer().weight.to(
        change.dtype
    )  # as its forward pass takes both to the input's type
    return m.get_weight_norm(weight, change.detach(), layer.scaling["default"])


def exact_norm(layer: nn.Module) -> Tensor:
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return torch.linalg.vector_norm(layer.get_base_layer().weight.double() + 2 * b @ a, dim=1)


@torch.no_grad()
def norm_errors(layers: list[nn.Linear], kinds: tuple, rank: int) -> dict[str, float]:
    "Largest relative error of a row, by way."
    worst = dict.fromkeys(WAYS, 0.0)
    for base in layers:
        plain = adapted(base, kinds, rank)
        exact = exact_norm(plain)
        for way in ["PEFT", *list(WAYS)[:2]]:
            found = norm_of(switched(plain, way), way).double()
            worst[way] = max(worst[way], float(((found - exact) / exact).abs().max()))
    return worst


def passes(layer: nn.Module, x: Tensor, grad: Tensor, call=None) -> dict[str, Tensor]:
    "Output and all gradients."
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    out = (call or layer)(x)
    out.backward(grad.to(out.dtype))
    names = {"A": layer.lora_A, "B": layer.lora_B, "m": layer.lora_magnitude_vector}
    return {"output": out.detach(), "x": x.grad} | {k: v["default"].weight.grad for k, v in names.items()}


def written_out(layer: nn.Module, x: Tensor) -> Tensor:
    "The formula of the paper; the norm is a constant on the way back."
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m, weight = layer.lora_magnitude_vector["default"].weight, layer.get_base_layer().weight
    return m / exact_norm(layer).detach() * (x @ weight.T + 2 * x @ a.T @ b.T)


def gradient_errors(layers: list[nn.Linear], kinds: tuple, rank: int) -> dict[str, dict[str, float]]:
    "Largest relative difference to float64, by way and by what was compared."
    worst = {way: defaultdict(float) for way in WAYS}
    for number, base in enumerate(layers):
        plain = adapted(base, kinds, rank)
        torch.manual_seed(number)
        x, grad = (torch.randn(128, n).to(kinds[0]) for n in (base.in_features, base.out_features))
        reference = copy.deepcopy(plain).double()
        exact = passes(reference, x.double(), grad.double(), lambda x, of=reference: written_out(of, x))
        for way in ["PEFT", *list(WAYS)[:2]]:
            found = passes(switched(plain, way), x, grad)
            for name, value in exact.items():
                error = float((found[name].double() - value).norm() / value.norm())
                worst[way][name] = max(worst[way][name], error)
    return {way: dict(found) for way, found in worst.items()}


def tiny_losses(way: str, kind: torch.dtype, accumulation: int, steps: int) -> list[float]:
    "Every loss of a training from fixed seeds, on the same five steps over and over."
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY)).to(kind)
    settings = {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": "all-linear"}
    model = switched(get_peft_model(base, LoraConfig(**settings)), way)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batches = torch.randint(0, TINY["vocab_size"], (5, accumulation, 4, 24))
    losses = []
    for step in range(steps):
        for ids in batches[step % 5]:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # the loss in their type
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            (loss / accumulation).backward()
            losses.append(float(loss.detach()))
        optimiser.step()
        optimiser.zero_grad()
        mark_step(model)
    return losses


def loss_differences(steps: int) -> list[dict]:
    rows = []
    for kind in (torch.float64, torch.float32):
        for accumulation in (1, 4):
            theirs = tiny_losses("PEFT", kind, accumulation, steps)
            for way in list(WAYS)[:2]:
                ours = tiny_losses(way, kind, accumulation, steps)
                apart = max(abs(a - b) for a, b in zip(ours, theirs))
                row = {
                    "way": way,
                    "type": str(kind)[6:],
                    "accumulation": accumulation,
                    "largest_difference": apart,
                }
                rows.append(row | {"first_loss": theirs[0], "last_loss": theirs[-1]})
    return rows


def cases() -> list[tuple[tuple[torch.dtype, torch.dtype], int]]:
    return [(kinds, rank) for kinds in KINDS for rank in (16, 128)]


def rows_of(kinds: tuple[torch.dtype, torch.dtype], rank: int, found: dict[str, dict | float]) -> list[dict]:
    "A row a way; the merged form is for float32 alone, in half precision both are the factored one."
    weights, adapter = (str(kind)[6:] for kind in kinds)
    ways = [way for way in found if kinds[0] == torch.float32 or way != "ours, merged"]
    return [{"weights": weights, "adapter": adapter, "rank": rank, "way": w, "error": found[w]} for w in ways]


def show(row: dict) -> None:
    error = row["error"] if isinstance(row["error"], dict) else {"": row["error"]}
    errors = "  ".join(f"{name} {value:.1e}" for name, value in error.items())
    print(f"{row['weights']:8} {row['adapter']:8} {row['rank']:4}  {row['way']:14} {errors}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    recipe = load_recipe("laptop")
    model, _ = load_base(recipe)
    blocks = model.model.layers
    linear = lambda block: [m for m in block.modules() if isinstance(m, nn.Linear)]
    every = [layer for block in blocks for layer in linear(block)]
    some = [layer for n in (0, len(blocks) // 2, len(blocks) - 1) for layer in linear(blocks[n])]
    titles = {
        "norms": f"norms of {len(every)} matrices, largest relative error of a row",
        "gradients": f"largest relative difference to float64, {len(some)} matrices",
    }
    report: dict[str, object] = {"model": recipe.model.name, "steps": given.steps}
    for part, layers, errors in (("norms", every, norm_errors), ("gradients", some, gradient_errors)):
        print(f"{titles[part]}\nweights  adapter  rank")
        report[part] = []
        for kinds, rank in cases():
            for row in rows_of(kinds, rank, errors(layers, kinds, rank)):
                report[part].append(row)
                show(row)
        print()
    print(f"losses of {given.steps} steps of a tiny random model, largest difference to PEFT's DoRA")
    report["losses"] = loss_differences(given.steps)
    for row in report["losses"]:
        case = f"{row['type']:8} accumulation {row['accumulation']}  {row['way']:14}"
        course = f"from {row['first_loss']:.2f} to {row['last_loss']:.2f}"
        print(f"{case} {row['largest_difference']:.1e}  ({course})")
    write_json(given.out, report | {"provenance": provenance()})


if __name__ == "__main__":
    main()

"DoRA layers against PEFT's, against float64 and against finite differences, on tiny random models."

import copy
import functools
import json
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.dora import DoraLinearLayer
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from elson_nb.training import dora
from elson_nb.training.dora import (
    FactoredDora,
    FastDora,
    MergedDora,
    accelerate_dora,
    exact_magnitudes,
    fast_layers,
    mark_step,
    norm_evaluations,
    row_norms,
)
from elson_nb.training.head import answer_loss

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
FORMS = ["merged", "factored"]
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits that differ, so there is something to learn
}


@pytest.fixture(autouse=True)
def one_thread():
    "Matrices this small are slower on two threads, much so on a busy machine."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(tied: bool = True, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied, **settings))


def adapted(base: nn.Module, seed: int = 1, **settings) -> PeftModel:
    "PEFT's DoRA with a low-rank part and magnitudes that are not those of the start."
    torch.manual_seed(seed)
    options = {
        "r": 4,
        "lora_alpha": 8,
        "use_dora": True,
        "target_modules": LINEAR,
        "init_lora_weights": False,
    }
    adapter_dtype = {k: settings.pop(k) for k in ("autocast_adapter_dtype",) if k in settings}
    model = get_peft_model(base, LoraConfig(**(options | settings)), **adapter_dtype)
    stir(model, seed)
    return model


def stir(model: nn.Module, seed: int) -> None:
    "Other magnitudes: right after the start they equal the norms, and a wrong gain would not show."
    torch.manual_seed(seed)
    for name, tensor in model.named_parameters():
        if "lora_magnitude_vector" in name:
            tensor.data *= 1 + 0.2 * torch.randn_like(tensor)


def twins(base: nn.Module | None = None, form: str = "auto", **settings) -> tuple[PeftModel, PeftModel]:
    "The same model twice: as PEFT has it, and accelerated."
    theirs = adapted(llama() if base is None else base, **settings)
    ours = copy.deepcopy(theirs)
    assert accelerate_dora(ours, "factored" if form == "factored" else "auto")
    return theirs, ours


def layer_twins(base: nn.Linear, form: str = "auto", **settings) -> tuple[nn.Module, nn.Module]:
    "A single layer, PEFT's and accelerated."
    pair = twins(nn.Sequential(base), form, target_modules=["0"], **settings)
    return tuple(model.base_model.model[0] for model in pair)


def rows(number: int, count: int = 2, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, SHAPE["vocab_size"], (count, length), generator=generator)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    "In the type of the logits; the library's own loss would round float64 to float32."
    found = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def gradients_of(model: nn.Module, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for ids in batches:
        loss_of(model, ids).backward()
    return gradients(model)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    "Relative distance of two tensors."
    found, expected = found.detach().double(), expected.detach().double()
    assert found.isfinite().all() and expected.isfinite().all()
    return float((found - expected).norm() / expected.norm())


def farthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys() and expected
    return max(off(found[name], expected[name]) for name in expected)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(input_ids=rows(99) if ids is None else ids, use_cache=False).logits


def check_same(theirs: nn.Module, ours: nn.Module, within: float = 1e-5) -> None:
    "Equal logits and equal gradients."
    assert off(logits(ours), logits(theirs)) < within
    assert farthest(gradients_of(ours, rows(5)), gradients_of(theirs, rows(5))) < within


@pytest.fixture
def their_norms(monkeypatch) -> Counter:
    "How often each layer of PEFT computes a norm."
    counts, plain = Counter(), DoraLinearLayer.get_weight_norm

    def counted(self, *args, **kwargs):
        counts[id(self)] += 1
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", counted)
    return counts


# the norm and the gradients, against float64


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_norm_is_within_a_millionth_of_float64(kind):
    torch.manual_seed(0)
    weight, a, b = torch.randn(96, 64).to(kind), torch.randn(8, 64), 0.3 * torch.randn(96, 8)
    exact = torch.linalg.vector_norm(weight.double() + 2.0 * b.double() @ a.double(), dim=1)
    error = float(((row_norms(weight, a, b, 2.0).double() - exact) / exact).abs().max())
    assert error <= 1e-6
    theirs = DoraLinearLayer(False).get_weight_norm(weight, (b.to(kind) @ a.to(kind)), 2.0)
    their_error = float(((theirs.double() - exact) / exact).abs().max())
    assert their_error > (1000 if kind == torch.bfloat16 else 0.1) * error


@pytest.mark.parametrize("form", FORMS)
def test_gain_of_a_layer_is_within_a_millionth_of_float64(form):
    _, layer = layer_twins(nn.Linear(64, 96), form)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    m, weight = layer.lora_magnitude_vector["default"].weight.detach(), layer.base_layer.weight.detach()
    exact = m.double() / torch.linalg.vector_norm(weight.double() + 2.0 * b.double() @ a.double(), dim=1)
    prepared = layer.prepare("default", torch.zeros(1, 64))
    assert (prepared.merged is not None) == (form == "merged")
    assert float(((prepared.gain.double() - exact) / exact).abs().max()) <= 1e-6


def test_fresh_magnitudes_on_a_base_in_half_precision_are_the_norms_themselves():
    settings = {"r": 4, "use_dora": True, "target_modules": LINEAR, "init_lora_weights": False}
    model = get_peft_model(llama().bfloat16(), LoraConfig(**settings))
    accelerate_dora(model)
    apart = []
    for _ in range(2):
        gains = [layer.prepare("default", torch.zeros(1).bfloat16()).gain for layer in fast_layers(model)]
        apart.append(max(float((gain - 1).abs().max()) for gain in gains))
        exact_magnitudes(model)
    assert apart[1] < 1e-6 < 1e-3 < apart[0]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_finite_differences(form, biased):
    "The norm is a constant here, as in the paper: finite differences of the layer itself would move it."
    torch.manual_seed(0)
    double = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    x, a, b, m = double(3, 2, 6), double(2, 6), double(5, 2), double(5)
    weight, bias = double(5, 6).detach(), double(5).detach() if biased else None
    norm = row_norms(weight, a.detach(), b.detach(), 2.0)

    def merged(x, a, b, m):
        gain = (m / norm).detach()
        whole = (gain[:, None] * (weight + 2.0 * b @ a)).detach()
        return MergedDora.apply(x, a, b, m, whole, gain, bias, 2.0)

    def factored(x, a, b, m):
        torch.manual_seed(0)
        low, gain = (a.detach(), b.detach()), (m / norm).detach()
        return FactoredDora.apply(x, a, b, m, low, gain, bias, 2.0, 0.3, lambda: weight)

    assert torch.autograd.gradcheck(merged if form == "merged" else factored, (x, a, b, m))


def written_out(layer: nn.Module, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    "The layer by autograd, as the paper writes it; `keep` scales the input of the low-rank part."
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m, base, scaling = (
        layer.lora_magnitude_vector["default"].weight,
        layer.get_base_layer(),
        layer.scaling["default"],
    )
    norm = torch.linalg.vector_norm(base.weight + scaling * b @ a, dim=1).detach()
    seen = x if keep is None else x * keep
    out = m / norm * (x @ base.weight.T + scaling * seen @ a.T @ b.T)
    return out if base.bias is None else out + base.bias


def passes(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor, call=None) -> dict[str, torch.Tensor]:
    "Output and all gradients of one layer."
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = (call or layer)(x)
    out.backward(grad.to(out.dtype))
    return {"output": out.detach(), "x": x.grad} | gradients(layer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_layer_in_float64_equals_the_formula(form, shape):
    _, layer = layer_twins(nn.Linear(6, 5).double(), form)
    x, grad = torch.randn(*shape, dtype=torch.float64), torch.randn(*shape[:-1], 5, dtype=torch.float64)
    expected = passes(layer, x, grad, lambda x: written_out(layer, x))
    assert farthest(passes(layer, x, grad), expected) < 1e-12


# training


def losses_of_training(model: nn.Module, steps: int, accumulation: int) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(steps):
        for micro in range(accumulation):
            loss = loss_of(model, rows(step % 5 * accumulation + micro)) / accumulation
            loss.backward()
            losses.append(float(loss.detach()) * accumulation)
        optimiser.step()
        optimiser.zero_grad()
        mark_step(model)
    return losses


@functools.cache
def their_losses(kind: torch.dtype, accumulation: int) -> list[float]:
    return losses_of_training(adapted(llama().to(kind)), 50, accumulation)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind, accumulation, within",
    [(torch.float32, 1, 1e-4), (torch.float32, 4, 1e-4), (torch.float64, 1, 1e-9)],
)
def test_fifty_steps_of_adamw_equal_theirs(kind, within, form, accumulation):
    _, ours = twins(llama().to(kind), form)
    losses, expected = losses_of_training(ours, 50, accumulation), their_losses(kind, accumulation)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < within
    assert expected[-1] < expected[accumulation * 5 - 1] - 1  # the same batch, nine passes later
    assert norm_evaluations(ours) == 50 * len(fast_layers(ours))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_gives_the_same_gradients_and_one_norm_a_step(form, reentrant, their_norms):
    theirs, ours = twins(form=form)
    batches = [rows(n) for n in range(4)]  # an optimiser step of four micro-batches
    expected = gradients_of(theirs, *batches)
    for model in (theirs, ours):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    their_norms.clear()
    assert farthest(gradients_of(theirs, *batches), expected) < 1e-5
    assert set(their_norms.values()) == {8}
    for step in range(1, 3):
        assert farthest(gradients_of(ours, *batches), expected) < 1e-5
        mark_step(ours)
        assert norm_evaluations(ours) == step * len(fast_layers(ours)) == step * 14


class WritesThroughData:
    "Gradient descent that no version counter sees, as fused optimisers of some libraries write."

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self) -> None:
        for p in self.parameters:
            p.data.add_(p.grad, alpha=-0.02)


@pytest.mark.parametrize("form", FORMS)
def test_an_optimiser_that_no_version_shows_needs_mark_step(form):
    theirs, ours = twins(form=form)
    forgetful = copy.deepcopy(ours)
    for model in (theirs, ours, forgetful):
        optimiser = WritesThroughData(model)
        for number in range(3):
            gradients_of(model, rows(number))
            optimiser.step()
            if model is ours:
                mark_step(model)
    assert off(logits(ours), logits(theirs)) < 1e-5
    assert off(logits(forgetful), logits(theirs)) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_an_optimiser_in_place_is_noticed_without_mark_step(form):
    theirs, ours = twins(form=form)
    for model in (theirs, ours):
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for number in range(3):
            gradients_of(model, rows(number))
            optimiser.step()
    assert off(logits(ours), logits(theirs)) < 1e-5
    assert norm_evaluations(ours) == 4 * len(fast_layers(ours))


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_scale_is_noticed(form):
    theirs, ours = twins(form=form)
    before = logits(ours)
    with rescale_adapter_scale(theirs, 0.25), rescale_adapter_scale(ours, 0.25):
        assert off(before, logits(theirs)) > 1e-3
        check_same(theirs, ours)
    check_same(theirs, ours)


# dropout


def test_mean_over_masks_is_the_output_without_dropout():
    "The mean of n draws has a known deviation: the low-rank part is a sum of independent terms x_j C_oj."
    draws, p = 4000, 0.2
    _, layer = layer_twins(nn.Linear(12, 10), lora_dropout=p)
    x = torch.randn(4, 12)
    layer.eval()
    with torch.no_grad():
        expected = layer(x).double()
        layer.train()
        outputs = layer(x.expand(draws, 4, 12)).double()
    a, b = (module["default"].weight.detach().double() for module in (layer.lora_A, layer.lora_B))
    norm = torch.linalg.vector_norm(layer.base_layer.weight.detach().double() + 2.0 * b @ a, dim=1)
    change = (layer.lora_magnitude_vector["default"].weight.detach() / norm)[:, None] * 2.0 * b @ a
    variance = p / (1 - p) * (x.double() ** 2) @ (change**2).T  # of one draw
    assert ((outputs.mean(0) - expected).abs() < 5 * (variance / draws).sqrt()).all()
    assert float((outputs.var(0) / variance - 1).abs().max()) < 0.15  # deviation of each ratio: 2 to 3 %


class Products(TorchDispatchMode):
    "Counts matrix products by the numbers of rows, columns and the length that is summed over."

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.counts[left.shape[0], right.shape[1], left.shape[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_base_product_is_taken_once_each_way(dropout):
    theirs, ours = layer_twins(nn.Linear(24, 40), lora_dropout=dropout)
    counts = {}
    for layer in (theirs, ours):
        x = torch.randn(50, 24, requires_grad=True)
        layer.train()
        layer(x.detach())  # what holds for the step is computed here
        with Products() as products:
            layer(x).sum().backward()
        counts[layer] = products.counts
    forward, back = (50, 40, 24), (50, 24, 40)
    assert (counts[ours][forward], counts[ours][back]) == (1, 1)
    assert counts[theirs][forward] == (2 if dropout else 1)
    low = {shape: count for shape, count in counts[ours].items() if 4 in shape}
    assert sum(low.values()) + 2 == sum(counts[ours].values()) == (8 if dropout else 6)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_mask_of_the_forward_pass_is_used_on_the_way_back(kind, monkeypatch):
    _, layer = layer_twins(nn.Linear(12, 10).to(kind), lora_dropout=0.3)
    drawn = []

    def remembered(*args, plain=dora.draw_mask):
        drawn.append(plain(*args))
        return drawn[-1]

    monkeypatch.setattr(dora, "draw_mask", remembered)
    x, grad = torch.randn(5, 12, dtype=kind), torch.randn(5, 10, dtype=kind)
    layer.train()
    found = passes(layer, x, grad)
    ((drop, probability),) = drawn
    keep = (~drop).to(kind) / (1 - probability)
    assert 0.1 < float(drop.float().mean()) < 0.5
    expected = passes(layer, x, grad, lambda x: written_out(layer, x, keep))
    assert farthest(found, expected) < (1e-12 if kind == torch.float64 else 1e-5)


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_the_mask_has_its_probability_and_no_pattern(probability):
    torch.manual_seed(0)
    drop, exact = dora.draw_mask(torch.empty(1000, 999), probability)
    assert abs(exact - probability) <= 2**-17
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(float(drop.double().mean()) - probability) < 5 * deviation / len(drop.flatten()) ** 0.5
    bits = (drop.double() - probability) / deviation
    for shift in (1, 2, 3, 4, 999):  # neighbours, those of one random word, and those of the next row
        together = float((bits.flatten()[shift:] * bits.flatten()[:-shift]).mean())
        assert abs(together) < 5 / len(drop.flatten()) ** 0.5


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_masks_again(reentrant):
    _, ours = twins(lora_dropout=0.2)
    ours.train()
    torch.manual_seed(7)
    expected = gradients_of(ours, rows(0))
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(7)
    assert farthest(gradients_of(ours, rows(0)), expected) < 1e-5


# half precision


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", ["half adapters", "full adapters", "autocast"])
def test_half_precision_is_as_near_to_float64_as_theirs(case, biased):
    """Each layer alone, mean of five draws. Where a base in bfloat16 has adapters in float32, PEFT takes the
    low-rank products in float32, which a tensor core is slow at; ours are in bfloat16, so their gradients
    carry its rounding, as in the other cases, and are held to that."""
    cast = torch.autocast("cpu", torch.bfloat16) if case == "autocast" else nullcontext()
    errors = [Counter(), Counter()]
    for seed in range(5):
        torch.manual_seed(seed)
        base = nn.Linear(192, 160, bias=biased)
        base = base if case == "autocast" else base.bfloat16()
        settings = {"seed": seed, "r": 16, "autocast_adapter_dtype": case == "full adapters"}
        pair = layer_twins(base, **settings)
        kind = base.weight.dtype
        x, grad = (torch.randn(256, n).bfloat16().to(kind) for n in (192, 160))
        exact = passes(copy.deepcopy(pair[0]).double(), x.double(), grad.double())
        kinds = set()
        for layer, sums in zip(pair, errors):
            with cast:
                found = passes(layer, x, grad)
            kinds.add(found["output"].dtype)
            sums.update({name.split(".")[0]: off(found[name], exact[name]) / 5 for name in exact})
        assert kinds == {torch.bfloat16}
    theirs, ours = errors
    assert all(value < 0.006 for value in ours.values())
    for name in ("output", "x"):  # adding a bias is one rounding more
        assert ours[name] < (1.35 if biased else 1.1) * theirs[name], name
    if case != "full adapters":
        assert all(ours[name] < 1.25 * theirs[name] for name in ("lora_A", "lora_B"))
    if case == "half adapters":
        assert all(ours[name] < theirs[name] for name in theirs)


def test_a_large_bias_does_not_swallow_the_gradient_of_the_magnitude():
    "Some models carry biases a hundred times their products: rounded to bfloat16 the sum has lost them."
    torch.manual_seed(0)
    base = nn.Linear(64, 48).bfloat16()
    base.bias.data.fill_(100.0)
    _, layer = layer_twins(base)
    x, grad = torch.randn(128, 64).bfloat16(), torch.randn(128, 48).bfloat16()
    exact = passes(copy.deepcopy(layer).double(), x.double(), grad.double())
    name = "lora_magnitude_vector.default.weight"
    assert off(passes(layer, x, grad)[name], exact[name]) < 0.01


def test_a_model_trains_under_autocast():
    theirs, ours = twins(lora_dropout=0.0)
    exact = gradients_of(copy.deepcopy(theirs).double(), rows(0))
    apart = []
    for model in (theirs, ours):
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients_of(model, rows(0))
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        apart.append(sum(off(found[name], exact[name]) for name in exact) / len(exact))
    assert apart[1] < 1.25 * apart[0] < 0.1


def test_half_adapters_on_a_full_base_train():
    _, layer = layer_twins(nn.Linear(24, 20))
    for name, tensor in layer.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.bfloat16()
    x, grad = torch.randn(9, 24), torch.randn(9, 20)
    exact = passes(copy.deepcopy(layer).double(), x.double(), grad.double())
    assert farthest(passes(layer, x, grad), exact) < 0.01


# modes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_modes_can_be_switched(form, dropout):
    theirs, ours = twins(form=form, lora_dropout=dropout)
    bare = logits(llama())
    for _ in range(2):
        for model in (theirs, ours):
            model.train()
            gradients_of(model, rows(1))
            model.eval()
        check_same(theirs, ours)
        with ours.disable_adapter():
            assert torch.equal(logits(ours), bare)


def test_merging_and_unmerging():
    theirs, ours = twins()
    before = logits(ours)
    ours.merge_adapter()
    with Products() as products:
        merged = logits(ours)
    assert off(merged, before) < 1e-5 and not any(4 in shape for shape in products.counts)
    ours.unmerge_adapter()
    assert norm_evaluations(ours) == len(fast_layers(ours))
    check_same(theirs, ours, 1e-4)  # the weight comes back with its last digits changed


@pytest.mark.parametrize("form", FORMS)
def test_scoring_in_inference_mode_leaves_training_possible(form):
    theirs, ours = twins(form=form)
    ours.eval()
    with torch.inference_mode():
        ours(input_ids=rows(0))
    ours.train()
    check_same(theirs, ours)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_at_all(form):
    theirs, ours = layer_twins(nn.Linear(6, 5), form)
    x = torch.zeros(0, 6, requires_grad=True)
    assert ours(x).shape == theirs(x).shape == (0, 5)
    ours(x).sum().backward()
    assert not ours.lora_A["default"].weight.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_magnitude_of_zero_still_gets_its_gradient(form):
    theirs, ours = layer_twins(nn.Linear(6, 5), form)
    for layer in (theirs, ours):
        layer.lora_magnitude_vector["default"].weight.data[2] = 0.0
    x, grad = torch.randn(7, 6), torch.randn(7, 5)
    expected = passes(theirs, x, grad)
    assert expected["lora_magnitude_vector.default.weight"][2] != 0
    assert farthest(passes(ours, x, grad), expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_that_is_trained_too_gets_its_gradient(part, form):
    theirs, ours = layer_twins(nn.Linear(6, 5), form, bias="lora_only" if part == "bias" else "none")
    x, grad = torch.randn(7, 6), torch.randn(7, 5)
    for layer in (theirs, ours):
        getattr(layer.base_layer, part).requires_grad_(True)
    expected = passes(theirs, x, grad)
    assert f"base_layer.{part}" in expected
    assert farthest(passes(ours, x, grad), expected) < 1e-5


# files and adapters


def test_saved_in_the_middle_it_is_an_adapter_of_peft(tmp_path):
    theirs, ours = twins()
    losses_of_training(theirs, 3, 1)
    losses_of_training(ours, 3, 1)
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert {k: (v.shape, v.dtype) for k, v in saved[0].items()} == {
        k: (v.shape, v.dtype) for k, v in saved[1].items()
    }
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")
    ]
    for config in configs:
        config["target_modules"].sort()  # a set, so PEFT writes it in any order
    assert configs[0] == configs[1] and theirs.state_dict().keys() == ours.state_dict().keys()
    stock = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert not fast_layers(stock) and off(logits(stock), logits(ours)) < 1e-5
    assert losses_of_training(ours, 3, 1) == pytest.approx(losses_of_training(theirs, 3, 1), abs=1e-4)


def test_an_adapter_can_be_loaded_in_the_middle(tmp_path):
    other = adapted(llama(), seed=8)
    other.save_pretrained(tmp_path)
    _, ours = twins()
    losses_of_training(ours, 2, 1)
    ours.load_adapter(tmp_path, "loaded", is_trainable=True)
    ours.set_adapter("loaded")
    assert off(logits(ours), logits(other)) < 1e-5
    ours.set_adapter("default")
    assert off(logits(ours), logits(other)) > 1e-2
    set_peft_model_state_dict(ours, load_file(tmp_path / "adapter_model.safetensors"))
    assert off(logits(ours), logits(other)) < 1e-5


def test_merged_for_good_it_is_the_plain_model():
    _, ours = twins()
    losses_of_training(ours, 3, 1)
    before = logits(ours)
    plain = ours.merge_and_unload()
    assert type(plain) is LlamaForCausalLM and not fast_layers(plain)
    assert off(logits(plain), before) < 1e-5


def test_adapters_can_be_switched_and_two_at_once_are_theirs():
    theirs, ours = twins()
    for model in (theirs, ours):
        torch.manual_seed(4)
        config = {
            "r": 2,
            "lora_alpha": 6,
            "use_dora": True,
            "target_modules": ATTENTION,
            "init_lora_weights": False,
        }
        model.add_adapter("second", LoraConfig(**config))
        stir(model, 5)
    for names, norms in (("second", 8), ("default", 14), (["default", "second"], 0), ("second", 8)):
        for model in (theirs, ours):
            model.base_model.set_adapter(names)
        before = norm_evaluations(ours)
        check_same(theirs, ours)
        assert norm_evaluations(ours) - before == norms  # of both: eight layers are PEFT's, six as they were


def test_unwatched_layers_heed_mark_step_and_the_choice_of_the_adapter():
    "As under FSDP, where the tensors are gathered anew for every pass and their versions say nothing."
    theirs, ours = twins()
    accelerate_dora(ours, watch=False)
    for model in (theirs, ours):
        torch.manual_seed(4)
        settings = {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": LINEAR}  # the same scale
        model.add_adapter("second", LoraConfig(**settings, init_lora_weights=False))
        stir(model, 5)
        logits(model)
        model.set_adapter("second")
    check_same(theirs, ours)
    for model in (theirs, ours):
        stir(model, 6)
    assert off(logits(ours), logits(theirs)) > 1e-3
    mark_step(ours)
    check_same(theirs, ours)


def test_an_adapter_under_an_old_name_is_a_new_adapter():
    theirs, ours = twins()
    for seed in range(4):
        for model in (theirs, ours):
            torch.manual_seed(seed)
            model.add_adapter(
                "again", LoraConfig(r=4, use_dora=True, target_modules=LINEAR, init_lora_weights=False)
            )
            stir(model, seed)
            model.set_adapter("again")
        assert off(logits(ours), logits(theirs)) < 1e-5
        for model in (theirs, ours):
            model.set_adapter("default")
            model.delete_adapter("again")


def test_a_copy_is_independent():
    theirs, ours = twins()
    gradients_of(ours, rows(0))
    before, twin = logits(ours), copy.deepcopy(ours)
    losses_of_training(twin, 3, 1)
    losses_of_training(theirs, 3, 1)
    assert torch.equal(logits(ours), before)
    assert off(logits(twin), logits(theirs)) < 1e-4 and off(before, logits(twin)) > 1e-2


# kinds of layers


@pytest.mark.parametrize("form", FORMS)
def test_layers_with_a_bias(form):
    base = llama(attention_bias=True, mlp_bias=True)
    for name, tensor in base.named_parameters():
        if name.endswith("bias"):
            tensor.data.normal_()
    check_same(*twins(base, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_the_head_tied_and_not(tied, form):
    theirs, ours = twins(llama(tied), form, target_modules=[*LINEAR, "lm_head"])
    assert len(fast_layers(ours)) == 15
    head, words = ours.base_model.model.lm_head, ours.base_model.model.model.embed_tokens
    assert (head.base_layer.weight is words.weight) == tied
    check_same(theirs, ours)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_embedding_stays_theirs_and_says_why():
    theirs = adapted(llama(), target_modules=[*LINEAR, "embed_tokens"])
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match="1 DoRA layers stay with PEFT.*Embedding is no linear layer"):
        assert accelerate_dora(ours) == 14
    check_same(theirs, ours)


def test_a_transposed_weight_stays_theirs_and_says_why():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    theirs = adapted(base.eval(), target_modules=["c_attn"], fan_in_fan_out=True)
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match="stored transposed"):
        assert accelerate_dora(ours) == 0
    check_same(theirs, ours)


def test_peft_itself_refuses_a_bias_of_the_low_rank_part():
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        LoraConfig(use_dora=True, lora_bias=True)


class Doubled(nn.Linear):
    "A base layer that is more than its weight, as layers with scales of their own are."

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_base_layer_with_a_forward_pass_of_its_own_stays_theirs():
    theirs = adapted(nn.Sequential(Doubled(6, 5), nn.Linear(5, 4)), target_modules=["0", "1"])
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match="Doubled has a forward pass of its own"):
        assert accelerate_dora(ours) == 1
    x = torch.randn(7, 6)
    assert off(ours(x), theirs(x)) < 1e-5


def test_plain_lora_is_left_alone():
    model = adapted(llama(), use_dora=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerate_dora(model) == 0 and not fast_layers(model)


def test_switching_twice_changes_the_form_and_nothing_else():
    theirs, ours = twins()
    assert all(layer.prepare("default", torch.zeros(1)).merged is not None for layer in fast_layers(ours))
    assert accelerate_dora(ours, "factored") == 14
    assert all(layer.prepare("default", torch.zeros(1)).merged is None for layer in fast_layers(ours))
    assert all(type(layer).__mro__.count(FastDora) == 1 for layer in fast_layers(ours))
    check_same(theirs, ours)


# a base in four bits


def four_bits(layer: nn.Linear, storage: torch.dtype = torch.uint8) -> nn.Module:
    import bitsandbytes as bnb

    options = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": storage}
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.bfloat16, **options
    )
    made.weight = bnb.nn.Params4bit(layer.weight.detach().bfloat16(), False, module=made, **options)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().bfloat16(), requires_grad=False)
    return made.to("cpu")


def dequantised(layer: nn.Module) -> nn.Linear:
    "A plain layer of the very weight that the four bits stand for."
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, dtype=weight.dtype)
    plain.load_state_dict({"weight": weight} | ({} if layer.bias is None else {"bias": layer.bias}))
    return plain


def four_bit_twins(biased: bool = True, storage: torch.dtype = torch.uint8) -> tuple[nn.Module, nn.Module]:
    "A plain accelerated layer, and PEFT's over the same weight in four bits."
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = four_bits(nn.Linear(64, 128, bias=biased), storage)
    _, plain = layer_twins(dequantised(base))
    holder = nn.Sequential(base)
    holder.is_loaded_in_4bit = True
    quantised = adapted(holder, target_modules=["0"]).base_model.model[0]
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(quantised, part).load_state_dict(getattr(plain, part).state_dict())
    return plain, quantised


def four_bit_passes(layer: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return passes(layer, torch.randn(9, 64).bfloat16(), torch.randn(9, 128).bfloat16())


def score(layer: nn.Module) -> None:
    "A look at the model between two steps, as an evaluation takes it."
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(9, 64).bfloat16())
    layer.train()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_four_bits_equal_the_plain_weight_they_stand_for(storage):
    plain, quantised = four_bit_twins(storage=storage)
    assert accelerate_dora(quantised) == 1
    assert farthest(four_bit_passes(quantised), four_bit_passes(plain)) < 1e-6
    assert norm_evaluations(quantised) == 1


@pytest.mark.parametrize("biased", [True, False])
def test_scoring_in_four_bits_leaves_the_gradients_right(biased):
    plain, quantised = four_bit_twins(biased)
    accelerate_dora(quantised)
    score(quantised)
    assert farthest(four_bit_passes(quantised), four_bit_passes(plain)) < 1e-6


@pytest.mark.parametrize("biased", [True, False])
def test_scoring_the_four_bits_without_the_adapter_leaves_the_gradients_right(biased):
    plain, quantised = four_bit_twins(biased)
    accelerate_dora(quantised)
    quantised.enable_adapters(False)
    score(quantised)
    quantised.enable_adapters(True)
    assert farthest(four_bit_passes(quantised), four_bit_passes(plain)) < 1e-6


def packs_for_inference() -> bool:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.modules.has_avx512bf16()


def test_four_bits_packed_for_inference_are_refused():
    "They cannot be read any more: what comes out of dequantising them is another matrix."
    if not packs_for_inference():
        pytest.skip("bitsandbytes packs on processors with AVX512-BF16 only")
    _, quantised = four_bit_twins()
    score(quantised.base_layer)
    with pytest.raises(ValueError, match="packed for inference"):
        accelerate_dora(quantised)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_their_path_in_four_bits_is_wrong_once_it_was_scored():
    "Of bitsandbytes 0.50 and PEFT 0.21; when this fails the trap is gone."
    if not packs_for_inference():
        pytest.skip("bitsandbytes packs on processors with AVX512-BF16 only")
    _, biased = four_bit_twins(biased=True)
    score(biased)
    with pytest.raises(RuntimeError, match="in-place"):
        four_bit_passes(biased)
    plain, bare = four_bit_twins(biased=False)
    assert off(four_bit_passes(bare)["x"], four_bit_passes(plain)["x"]) < 0.02
    score(bare)
    assert (
        off(four_bit_passes(bare)["x"], four_bit_passes(plain)["x"]) > 0.5
    )  # the base's share is gone, silently


# several processes


def one_of_two(rank: int, folder: str) -> None:
    "A process of its own: gradients of its half of the batch, averaged with the other's."
    torch.set_num_threads(1)
    where = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **where)
    _, ours = twins()
    both = nn.parallel.DistributedDataParallel(ours)
    for _ in range(2):  # accumulated; only the last one meets
        with both.no_sync():
            loss_of(both, rows(rank)).backward()
    loss_of(both, rows(2 + rank)).backward()
    torch.save(gradients(ours), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    theirs, _ = twins()
    joined = [torch.cat([rows(n), rows(n + 1)]) for n in (0, 0, 2)]
    expected = gradients_of(theirs, *joined)
    for rank in (0, 1):
        assert farthest(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected) < 1e-5


# the benchmarks


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.mark.parametrize(
    "arm, dropout, form", [("PEFT LoRA", 0.0, "lora"), ("ours", 0.0, "merged"), ("ours", 0.1, "factored")]
)
def test_the_counted_operations_are_those_that_are_done(benchmarks, arm, dropout, form):
    import dora_speed

    ids = rows(0, 3, 11)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    tensors["labels"][:, :6] = -100
    base = llama(tied=False)
    model = dora_speed.build(base, arm, 4, dropout)
    with Products() as products:
        answer_loss(model, tensors)[0].backward()
    done = sum(2 * m * n * k * times for (m, n, k), times in products.counts.items())
    counted = dora_speed.products_of_batch(base.config, tensors, 4, form)
    counted += dora_speed.products_of_step(base.config, 4, form)
    scores_and_values = 2 * 6 * 32 * 3 * 11 * 12  # layers, products, width, records, length and one more
    assert done == counted - scores_and_values


def test_the_gpu_benchmark_runs_on_a_tiny_shape(benchmarks, tmp_path):
    import gpu_throughput

    gpu_throughput.main(["--tiny", "--steps", "1", "--out", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    arms = {row["arm"]: row for row in report["arms"]}
    assert list(arms) == ["PEFT LoRA", "PEFT DoRA", "ours", *gpu_throughput.ABLATIONS, "PEFT LoRA again"]
    assert not any("note" in row for row in arms.values())
    norms = {name: row["norms_a_layer_and_step"] for name, row in arms.items() if name.startswith("ours")}
    assert norms == dict.fromkeys(norms, 1.0) | {"ours, a norm every forward pass": 2.0}
    assert all(row["tokens_per_second"] > 0 and 3 < row["loss"] < 9 for row in arms.values())
    assert [row["met"] for row in report["targets"]] == [None, None]  # a tiny shape says nothing of speed


def test_what_the_gpu_benchmark_removes_changes_the_work_and_not_the_result(benchmarks):
    import gpu_throughput

    _, ours = twins()
    ids = rows(0)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    tensors["labels"][:, :5] = -100
    loss_of(ours, ids)  # what holds for the step is computed here
    found = {}
    for idea in ("", "norm kept", "one base product", "labelled logits"):
        labelled = gpu_throughput.all_logits if idea == "labelled logits" else answer_loss
        ours.zero_grad()
        with gpu_throughput.without(idea, ours), Products() as products:
            labelled(ours, tensors)[0].backward()
        found[idea] = gradients(ours), products.counts
    plain, counts = found.pop("")
    for idea, (grads, others) in found.items():
        assert farthest(grads, plain) < 1e-5, idea
        assert sum(others.values()) > sum(counts.values()) or idea == "labelled logits"
    wide = (18, 48, 32)  # forward of two layers, and the way back of a third, in both blocks
    assert (counts[wide], found["one base product"][1][wide]) == (6, 12)
    assert (18, 96, 32) in found["labelled logits"][1] and (18, 96, 32) not in counts


@pytest.mark.parametrize("accumulation, dropout", [(1, 0.0), (3, 0.0), (1, 0.1)])
def test_the_speed_benchmark_counts_norms_and_keeps_the_arms_alike(
    benchmarks, monkeypatch, accumulation, dropout
):
    import dora_speed

    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", DoraLinearLayer.get_weight_norm)  # to be put back
    monkeypatch.setattr(dora_speed, "ROOF_SIZE", 64)
    micro = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        for ids in map(rows, range(9))
    ]
    batches = [micro[n * accumulation : (n + 1) * accumulation] for n in range(3)]
    told = []
    row = dora_speed.measure(
        llama(), batches, 4, dropout, 2, dora_speed.TheirNorms(), lambda units, what: told.append(units)
    )
    assert row["norms_a_layer_and_step"] == {"PEFT LoRA": 0, "PEFT DoRA": accumulation, "ours": 1}
    assert sum(told) == 3 * 3 * accumulation
    assert all(len(seconds) == 2 for seconds in row["seconds_of_each_step"].values())
    assert row["largest_loss_difference"] < 1e-4 or dropout
    row |= {"rank": 4, "accumulation": accumulation, "dropout": dropout}
    lines = dora_speed.report([row]).splitlines()
    assert len(lines) == 8 and "target = 1      MET" in lines[-1]

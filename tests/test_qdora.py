"DoRA on a base in four bits (NF4, double quantisation): a tiny random model against itself in full."

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import has_avx512bf16
from question_maker import make_records
from safetensors.torch import load_file

from elson_nb.recipes import load_recipe
from elson_nb.training import adapter
from elson_nb.training.adapter import TrainingError, attach_adapter
from elson_nb.training.base import load_base, load_tokenizer, make_random_base
from elson_nb.training.batches import encode, example_losses
from elson_nb.training.dora import fast_layers, row_norms
from elson_nb.training.phase import train_phase

QDORA = ("model.quantization=nf4", "adapter.method=qdora", "model.dtype=bfloat16")
RECORDS = make_records(16)  # four steps
packs = pytest.mark.skipif(
    not has_avx512bf16(), reason="bitsandbytes packs weights on CPUs with AVX512-BF16 only"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_random_base(load_recipe("smoke").model.random_config, folder)
    return folder


def recipe(*overrides: str):
    return load_recipe("smoke", ["training.threads=1", "phases.B.learning_rate=0.02", *overrides])


def train(out, *overrides: str, phase="B", adapter_in=None, **options):
    return train_phase(recipe(*overrides), phase, RECORDS, adapter_in, out, **options)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "B", *QDORA, base=base)


@pytest.fixture(scope="module")
def following(base, trained, tmp_path_factory):
    return train(
        tmp_path_factory.mktemp("run") / "C", *QDORA, phase="C", adapter_in=trained.adapter, base=base
    )


def linears(model) -> list[Linear4bit]:
    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]


def scores(loaded: tuple) -> dict[str, float]:
    model, tokenizer = loaded
    return example_losses(model, [encode(r, tokenizer) for r in RECORDS[:6]], tokenizer.pad_token_id)


def losses(result) -> list[float]:
    return [row["loss"] for row in result.steps]


def saved(result) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


def test_the_base_is_in_nf4_with_double_quantisation(base):
    model, _ = load_base(recipe(*QDORA), base)
    states = [layer.weight.quant_state for layer in linears(model)]
    assert len(states) == 14 and all(s.quant_type == "nf4" and s.nested for s in states)
    assert {layer.weight.dtype for layer in linears(model)} == {torch.uint8}


def test_it_trains(base, trained):
    assert losses(trained)[0] - losses(trained)[-1] > 0.1
    assert trained.totals["norms_per_layer_and_step"] == 1
    start = attach_adapter(load_base(recipe(*QDORA), base)[0], recipe(*QDORA), None)
    before, after = dict(start.named_parameters()), dict(trained.model.named_parameters())
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == [name for name in before if before[name].requires_grad] and len(moved) == 42


def test_it_trains_as_the_same_weights_do_in_full(base, trained, following, tmp_path):
    quantised, tokenizer = load_base(recipe(*QDORA), base)
    full, _ = load_base(recipe(), base)
    with torch.no_grad():
        plain = dict(full.named_modules())
        for name, layer in quantised.named_modules():
            if isinstance(layer, Linear4bit):
                plain[name].weight.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
            elif not list(layer.children()) and hasattr(layer, "weight"):
                plain[name].weight.copy_(layer.weight)
    reference = train(tmp_path / "full", phase="C", adapter_in=trained.adapter, loaded=(full, tokenizer))
    assert losses(following) == pytest.approx(losses(reference), rel=1e-6)
    ours, theirs = saved(following), saved(reference)
    assert max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs) < 1e-5


# what a session does: it scores the base, trains, and scores again


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_scoring_first_changes_nothing(base, trained, tmp_path, checkpointing):
    settings = (*QDORA, f"training.gradient_checkpointing={checkpointing}")
    loaded = load_base(recipe(*settings), base)
    before = scores(loaded)
    result = train(tmp_path / "B", *settings, loaded=loaded)
    assert losses(result) == pytest.approx(losses(trained), rel=1e-6)
    after = scores((result.model, loaded[1]))
    assert max(after[i] - before[i] for i in before) < -0.05
    with result.model.disable_adapter():
        assert scores((result.model, loaded[1])) == pytest.approx(before, abs=1e-3)
    assert scores((result.model, loaded[1])) == after


@packs
@pytest.mark.parametrize("own", [True, False], ids=["fast layers", "PEFT's layers"])
def test_a_base_that_bitsandbytes_packed_is_refused(base, tmp_path, monkeypatch, own):
    "Scored without gradients, it is packed for inference: PEFT's path is dead then, ours would read garbage."
    model, tokenizer = load_base(recipe(*QDORA), base)
    for layer in linears(model):
        layer.support_avx512bf16_for_cpu = True
    scores((model, tokenizer))
    if not own:
        monkeypatch.setattr(adapter, "accelerate_dora", lambda *args, **kwargs: 0)
    with pytest.raises(
        (TrainingError, ValueError), match="packed" if own else "of 42 trainable tensors got no gradient"
    ):
        train(tmp_path / "B", *QDORA, loaded=(model, tokenizer))
    assert not (tmp_path / "B").exists()


# types


@pytest.mark.parametrize("settings", [QDORA, QDORA[2:]], ids=["NF4", "bf16"])
def test_a_fresh_adapter_starts_at_the_base(base, settings):
    "PEFT rounds the first magnitudes to the type of the base; they would be off by 0.4%."
    model = attach_adapter(load_base(recipe(*settings), base)[0], recipe(*settings), None)
    for layer in fast_layers(model):
        a, b, m = (
            getattr(layer, key)["default"].weight.detach()
            for key in ("lora_A", "lora_B", "lora_magnitude_vector")
        )
        norms = row_norms(layer.base_weight(), a, b, layer.scaling["default"])
        assert float((m / norms - 1).abs().max()) < 1e-6 and m.dtype == torch.float32


def test_what_is_trained_stays_in_float32(trained):
    assert {t.dtype for t in saved(trained).values()} == {torch.float32}


def test_norms_are_frozen_and_in_float32_and_checkpointing_is_not_reentrant(base, tmp_path):
    result = train(tmp_path / "B", *QDORA, "training.gradient_checkpointing=true", base=base)
    norms = [p for n, p in result.model.named_parameters() if "norm" in n]
    assert len(norms) == 5 and all(p.dtype == torch.float32 and not p.requires_grad for p in norms)
    layers = result.model.get_base_model().model.layers
    assert [layer._gradient_checkpointing_func.keywords for layer in layers] == [{"use_reentrant": False}] * 2


def test_the_next_phase_begins_where_this_one_ended(base, trained, following):
    tokenizer = load_tokenizer(base)
    first = [encode(r, tokenizer) for r in RECORDS[:4]]
    each, counts = (
        example_losses(trained.model, first, tokenizer.pad_token_id),
        [sum(e.completion_mask) for e in first],
    )
    expected = sum(each[e.id] * n for e, n in zip(first, counts)) / sum(counts)
    assert following.steps[0]["loss"] == pytest.approx(expected, rel=1e-5)

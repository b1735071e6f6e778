"""The forecast of a phase: counts against what torch executes and keeps, loads against the trainer."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, Qwen2Config

from elson_nb.corpus.synthesis import build_records, write_corpus
from elson_nb.recipes import RECIPES, load_recipe, recipe_names
from elson_nb.session.data import forecast
from elson_nb.session.doctor import dry_run
from elson_nb.session.terminal import print_dry_run
from elson_nb.training import forecast as model
from elson_nb.training.adapter import attach_adapter
from elson_nb.training.base import fetch_base, load_tokenizer
from elson_nb.training.batches import count_tokens, encode, micro_batches, padded
from elson_nb.training.forecast import Load, ModelShape, kept_by_block, load_of, memory, operations
from elson_nb.training.head import answer_loss
from elson_nb.training.order import order_of

QWEN_14B = ModelShape(5120, 13824, 48, 40, 8, 128, 152064, tied=False)
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 272,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 320,
}
ROWS, LENGTH = 4, 40
FORMS = {
    "merged": [],
    "factored": ["adapter.lora_dropout=0.1"],
    "lora": ["adapter.method=lora"],
    "dropped": ["adapter.method=lora", "adapter.lora_dropout=0.1"],
    "half": ["adapter.lora_dropout=0.1", "model.dtype=bfloat16"],
    "again": ["training.gradient_checkpointing=true"],
    "wide": ["adapter.rank=24"],
    "some": ["adapter.target_modules=.*\\.(q_proj|down_proj)"],
}


def small(settings: list[str], kv_heads: int = 2, attention: str = "sdpa"):
    "Recipe, shape and model of a small Llama with an adapter."
    recipe = load_recipe("smoke", settings)
    config = LlamaConfig(**SIZES, num_key_value_heads=kv_heads, tie_word_embeddings=True)
    config._attn_implementation = attention
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).to(getattr(torch, recipe.model.dtype))
    llama = attach_adapter(llama, recipe, None)
    if recipe.training.gradient_checkpointing:
        llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        llama.enable_input_require_grads()
    return recipe, model.as_shape(config, "of a test"), llama.train()


def batch() -> dict[str, torch.Tensor]:
    "Rows of different lengths, so that there is a mask; a third is prompt."
    ids = torch.randint(0, 320, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, 30:] = 0
    labels = ids.where(mask == 1, -100)
    labels[:, :12] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# -- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_operations_are_those_that_torch_executes(name):
    recipe, shape, llama = small(FORMS[name], attention="eager")
    with FlopCounterMode(display=False) as counter:
        loss, labelled = answer_loss(llama, batch())
        loss.backward()
    counted = operations(recipe, shape, ROWS * LENGTH, labelled, LENGTH, 1)
    assert sum(counted.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_frozen_base_without_an_adapter_takes_two_operations_a_weight_each_way():
    _, shape, llama = small([], attention="eager")
    base, tensors = llama.get_base_model(), batch()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), llama.disable_adapter():
        base(**{k: tensors[k] for k in ("input_ids", "attention_mask")})
    parts = operations(load_recipe("smoke"), shape, ROWS * LENGTH, ROWS * LENGTH, LENGTH, 0)
    forward = parts["base, forward"] + parts["attention"] / 3 + parts["head"] / 2
    assert forward == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_the_14b_class_takes_what_was_computed_by_hand():
    for setting, gflop in (("false", 59.5), ("true", 87.1)):
        recipe = load_recipe("h100", [f"training.gradient_checkpointing={setting}"])
        assert sum(operations(recipe, QWEN_14B, 1, 1, 130, 0).values()) / 1e9 == pytest.approx(
            gflop, rel=0.02
        )


# -- memory --------------------------------------------------------------------------------------


def saved(llama) -> int:
    "Bytes of distinct storages that autograd keeps, without parameters and what is made once a step."
    own = {t.untyped_storage().data_ptr() for t in (*llama.parameters(), *llama.buffers())}
    seen = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer_loss(llama, batch())
    for layer in llama.modules():
        if prepared := layer.__dict__.get("_prepared"):
            for tensor in (prepared.gain, prepared.merged, *prepared.low):
                if tensor is not None:
                    seen.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("name", ["merged", "factored", "lora", "dropped", "half", "wide", "some"])
def test_what_a_block_keeps_is_what_autograd_keeps(name, kv_heads):
    recipe, shape, llama = small(FORMS[name], kv_heads)
    counted = kept_by_block(recipe, shape, LENGTH) * shape.layers * ROWS * LENGTH
    assert counted == pytest.approx(saved(llama), rel=0.04 if name == "dropped" else 0.02)


def test_with_checkpointing_only_the_inputs_of_blocks_stay():
    _, shape, llama = small(FORMS["again"])
    inputs = shape.layers * shape.hidden * 4 * ROWS * LENGTH
    assert inputs < saved(llama) < 2 * inputs


def peak(name: str, settings: list[str], shape: ModelShape = QWEN_14B, tokens: int = 2048) -> float:
    return sum(memory(load_recipe(name, settings), shape, tokens, 130).values())


def test_memory_rises_with_what_costs_memory():
    plain = peak("h100", [])
    assert plain < peak("h100", ["adapter.rank=256"])
    assert plain < peak("h100", [], tokens=2112)
    assert plain < peak("h100", ["training.processes=2"])
    assert (
        plain
        > peak("h100", ["adapter.lora_dropout=0"])
        > peak("h100", ["training.gradient_checkpointing=true"])
    )
    assert plain > peak("h100-qdora", ["training.gradient_checkpointing=false"]) > peak("h100-qdora", [])


def test_the_whole_matrix_is_held_where_the_form_uses_it():
    shape = model.derive_shape(134.5)
    whole, factors = (
        memory(load_recipe("laptop", [f"adapter.lora_dropout={p}"]), shape, 512, 130) for p in (0, 0.05)
    )
    assert whole["merged copy"] * model.GB == 4 * shape.block_parameters and factors["merged copy"] == 0
    assert whole["process"] == model.PROCESS_GB or torch.cuda.is_available()


def test_the_reference_recipe_fits_its_card_with_2048_tokens_a_micro_batch_and_not_with_4096():
    assert 60 < peak("h100", []) < 75
    assert peak("h100", [], tokens=4096) > 80
    assert peak("h100-qdora", [], tokens=4096) < load_recipe("h100-qdora").budget.memory_gb
    recipe = load_recipe("h100")
    most = model.tokens_that_fit(recipe, QWEN_14B, 130, 70)
    assert peak("h100", [], tokens=most) <= 70 < peak("h100", [], tokens=most + 64)
    assert model.tokens_that_fit(recipe, QWEN_14B, 130, 20) == 0


# -- shapes --------------------------------------------------------------------------------------


def test_a_shape_is_read_from_a_configuration(tmp_path):
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    shape = model.read_shape(tmp_path)
    assert (
        shape == ModelShape(64, 160, 2, 4, 2, 16, 500, False, shape.source) and "config.json" in shape.source
    )
    assert model.as_shape(MixtralConfig(), "") is None


def test_the_parameters_of_a_shape_are_the_models():
    _, shape, llama = small([])
    matrices = sum(
        p.numel() for n, p in llama.get_base_model().named_parameters() if p.dim() == 2 and "lora" not in n
    )
    assert shape.parameters == matrices


@pytest.mark.parametrize("millions", [100, 134.5, 360, 1700, 3000, 7600, 14770, 32000, 72000])
def test_a_derived_shape_has_the_parameters_and_says_that_it_is_derived(millions):
    shape = model.derive_shape(millions)
    assert shape.parameters == pytest.approx(millions * 1e6, rel=0.01) and "derived" in shape.source
    assert 2 < shape.intermediate / shape.hidden < 4


def test_the_14b_class_is_derived_as_it_is():
    derived = model.derive_shape(14770)
    assert replace(derived, intermediate=QWEN_14B.intermediate, source=QWEN_14B.source) == QWEN_14B
    assert derived.intermediate == pytest.approx(QWEN_14B.intermediate, rel=0.01)


def test_a_model_smaller_than_any_vocabulary_has_a_shape_too():
    assert model.derive_shape(0.2).intermediate >= 1


def test_a_base_that_is_not_here_is_derived_and_one_that_will_be_made_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("ELSON_CACHE", str(tmp_path))
    smoke = load_recipe("smoke")
    before = model.shape_of(smoke)
    fetch_base(smoke.model)
    assert replace(model.shape_of(smoke), source="") == replace(before, source="")
    missing = load_recipe("h100", [f"model.path={tmp_path / 'nowhere'}"])
    assert "derived" in model.shape_of(missing).source


# -- what will be trained ------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=60)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 900), st.integers(1, 3), st.integers(1, 2), st.sampled_from("AB"))
def test_a_load_is_what_the_trainer_makes_of_the_records(lengths, budget, processes, epochs, phase):
    wanted = {"processes": processes, "num_train_epochs": epochs, "tokens_per_micro_batch": budget}
    wanted |= {"competence.max_steps": "null", "competence.replay": 0}
    recipe = load_recipe("smoke", [f"training.{k}={v}" for k, v in wanted.items()])
    domains = [f"domain {n // 17}" for n in range(len(lengths))]
    load = load_of(recipe, phase, lengths, domains, 0.5)
    assert load.steps == order_of(recipe, phase, domains).total
    assert load.tokens == sum(lengths) * epochs and load.records == len(lengths)
    assert load.padded >= load.tokens and 0 <= load.padding_share < 1
    assert max(lengths) <= load.largest <= max(budget, max(lengths))
    assert load.length <= max(lengths)


def test_blocks_with_so_many_steps_are_gone_through_so_often():
    wanted = ["training.competence.max_steps=6", "training.competence.replay=0"]
    load = load_of(load_recipe("smoke", wanted), "A", [10, 20, 30, 40, 50], ["a", "a", "b", "b", "b"], 0.5)
    assert load.steps == 12 and load.tokens == 6 * (10 + 20) + 6 * (30 + 40 + 50) and load.at_most
    assert not load_of(load_recipe("smoke", wanted), "B", [10, 20], ["a", "b"], 0.5).at_most


def test_padding_is_that_of_the_trainers_micro_batches():
    recipe = load_recipe("laptop", ["training.tokens_per_micro_batch=700"])
    lengths = [random.Random(4).randint(20, 300) for _ in range(24)]
    examples = [encode({"id": str(n), "instruction": "", "output": ""}, ByLength(n)) for n in lengths]
    steps = [micro_batches(examples[n : n + 8], 700) for n in range(0, 24, 8)]
    load = load_of(recipe, "B", lengths, ["a"] * 24, 0.5)
    assert load.padded == sum(map(padded, steps)) and load.micro_batches == sum(map(len, steps))
    two = replace(recipe, training=replace(recipe.training, processes=2, per_device_train_batch_size=4))
    parted = [[micro_batches(examples[n : n + 8], 700, rank, 2) for n in range(0, 24, 8)] for rank in (0, 1)]
    load = load_of(two, "B", lengths, ["a"] * 24, 0.5)
    assert load.padded == sum(padded(step) for steps in parted for step in steps)
    assert load.micro_batches == sum(map(len, parted[0]))


class ByLength:
    "A tokenizer whose texts have a given number of tokens."

    eos_token_id = 0

    def __init__(self, length: int):
        self.length = length

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [1] * (self.length - 1 if text else 0)}


def test_the_share_of_labels_is_that_of_the_encoding():
    recipe = load_recipe("smoke")
    tokenizer = load_tokenizer(fetch_base(recipe.model))
    records = build_records(seed=3, scale=0.001)
    examples = [encode(r, tokenizer) for r in records]
    exact = sum(sum(e.completion_mask) for e in examples) / sum(map(len, examples))
    assert model.label_share(records, lambda r: count_tokens(r, tokenizer)) == pytest.approx(exact, abs=1e-9)


# -- the forecast --------------------------------------------------------------------------------

LOAD = Load(
    records=400,
    tokens=50_000,
    steps=50,
    label_share=0.6,
    padded=60_000,
    micro_batches=80,
    largest=1000,
    length=150,
)


def test_without_a_roof_the_speed_is_the_recipes_and_said_to_be_assumed():
    recipe = load_recipe("h100")
    row = model.forecast_phase(recipe, QWEN_14B, LOAD)
    minutes = LOAD.tokens / recipe.budget.tokens_per_second / 60
    assert row["minutes"] == pytest.approx(minutes, abs=0.006) and "assumed" in row["basis"]
    assert row["usd"] == pytest.approx(minutes / 60 * recipe.budget.usd_per_hour, abs=0.006)
    assert row["memory_gb"] == pytest.approx(sum(row["memory"].values()), abs=0.05)


def test_with_a_roof_the_speed_follows_from_operations():
    recipe, shape = load_recipe("laptop"), model.derive_shape(134.5)
    slow, fast = (model.forecast_phase(recipe, shape, LOAD, roof) for roof in (1e11, 2e11))
    calls = LOAD.micro_batches * shape.layers * model.BLOCK_SECONDS["cpu"]
    assert (slow["minutes"] * 60 - calls) / (fast["minutes"] * 60 - calls) == pytest.approx(2, rel=0.01)
    assert "measured" in slow["basis"]
    padded_more = model.forecast_phase(recipe, shape, replace(LOAD, padded=100_000), 1e11)
    assert (
        padded_more["minutes"] > slow["minutes"] and padded_more["flops_per_token"] > slow["flops_per_token"]
    )


def test_the_roof_is_of_this_machine_alone():
    assert model.machine_roof(seconds=0.05) > 1e8
    if not torch.cuda.is_available():
        assert model.roof_here(load_recipe("h100")) is None


def test_a_forecast_from_totals_is_at_the_throughput_of_the_recipe():
    recipe = load_recipe("h100")
    rows = forecast(recipe, {"A": {"records": 1000, "tokens": 130_000}})
    assert rows["A"]["steps"] == -(-1000 // 64) * 2 and rows["A"]["tokens_per_second"] == 5000
    assert rows["A"]["minutes"] == pytest.approx(260_000 / 5000 / 60, abs=0.006)


def test_a_forecast_is_held_against_totals():
    row = model.forecast_phase(load_recipe("h100"), QWEN_14B, LOAD)
    totals = {"steps": 40, "minutes": row["minutes"] * 2, "tokens_per_second": 2500.0, "peak_memory_gb": 60.0}
    rows = {r["figure"]: r for r in model.compare(row, totals)}
    assert (
        rows["minutes"]["ratio"] == 2
        and rows["tokens per second"]["ratio"] == 0.5
        and rows["steps"]["ratio"] == 0.8
    )
    assert model.compare({"minutes": 0.0}, {"minutes": 1.0})[0]["ratio"] is None
    assert model.compare({"steps": 3}, {}) == []


# -- the dry run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "laptop", "h100", "h100-qdora"])
def test_a_dry_run_says_memory_and_basis_on_any_machine(name, tmp_path, capsys, monkeypatch):
    assert name in recipe_names() and (RECIPES / f"{name}.yaml").is_file()
    monkeypatch.setenv("ELSON_CACHE", str(tmp_path / "cache"))  # no base is here
    write_corpus(tmp_path / "corpus", seed=1, scale=0.02)
    recipe = load_recipe(name, ["curriculum.target_records=120", "curriculum.held_out_records=8"])
    plan = dry_run(recipe, [tmp_path / "corpus"])
    assert plan["memory_gb"] == max(p["memory_gb"] for p in plan["phases"].values())
    assert ("assumed" in plan["basis"]) == (recipe.budget.needs_gpu and not torch.cuda.is_available())
    assert bool(plan["memory_mend"]) == (plan["memory_gb"] > recipe.budget.memory_gb)
    assert all(p["steps"] > 0 and p["minutes"] >= 0 for p in plan["phases"].values())
    print_dry_run(plan)
    said = capsys.readouterr().out
    assert (
        plan["basis"] in said and f"{plan['memory_gb']:.1f} GB" in said and "evaluation come on top" in said
    )


def test_a_plan_over_its_memory_names_the_setting_that_helps(tmp_path):
    write_corpus(tmp_path / "corpus", seed=1, scale=0.02)
    common = [
        "curriculum.target_records=600",
        "curriculum.held_out_records=8",
        "training.tokens_per_micro_batch=8192",
    ]
    plan = dry_run(load_recipe("h100", common), [tmp_path / "corpus"])
    setting = plan["memory_mend"].split()[1].rstrip(",")
    assert setting.startswith("training.tokens_per_micro_batch=")
    mended = dry_run(load_recipe("h100", [*common, setting]), [tmp_path / "corpus"])
    assert not mended["memory_mend"]

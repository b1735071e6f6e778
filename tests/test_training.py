"Training against plain references, on a tiny random model: masks, losses, order, seeds, hand-over, merge."

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from question_maker import make_records
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from elson_nb.recipes import load_recipe
from elson_nb.release.merge import ReleaseError, merge_release
from elson_nb.training.base import load_base, load_tokenizer, make_random_base
from elson_nb.training.batches import Example, encode, example_losses
from elson_nb.training.phase import TrainingError, tokens_per_step, train_phase

END_OF_PROMPT = "### Response:\n"
SETTINGS = (
    "training.per_device_train_batch_size=4",
    "training.seed=42",
    "training.threads=1",
)  # matrices this small are slower on two threads, much so on a busy machine


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    make_random_base(load_recipe("smoke").model.random_config, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def smoke(*overrides: str):
    return load_recipe("smoke", [*SETTINGS, *overrides])


def train(base, out, *overrides, phase="A", records=None, adapter_in=None, **options):
    records = records or make_records(12)
    return train_phase(smoke(*overrides), phase, records, adapter_in, out, base=base, **options)


@pytest.fixture(scope="module")
def phase_a(base, tmp_path_factory):
    return train(base, tmp_path_factory.mktemp("run") / "A")


# the mask and the loss

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="#|"), max_size=40)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(TEXT, TEXT, TEXT.filter(bool))
def test_completion_mask_begins_where_the_decoded_prompt_ends(tokenizer, instruction, input, output):
    example = encode({"id": "x", "instruction": instruction, "input": input, "output": output}, tokenizer)
    text = tokenizer.decode(example.input_ids)
    prompt = text[: text.index(END_OF_PROMPT) + len(END_OF_PROMPT)]
    read = (tokenizer.decode(example.input_ids[:n]) for n in range(len(example)))
    boundary = next(n for n, decoded in enumerate(read) if decoded == prompt)
    assert example.completion_mask == [int(n >= boundary) for n in range(len(example))]
    assert tokenizer.decode(example.input_ids[boundary:]) == output + tokenizer.eos_token


def plain_loss(model, example: Example) -> float:
    "Mean loss of the masked tokens, one token after the other, without batch or padding."
    losses = []
    for at in range(1, len(example)):
        if example.completion_mask[at]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example.input_ids[:at]])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[example.input_ids[at]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100000])
def test_example_losses_equal_a_plain_loop(base, tokenizer, tokens_per_batch):
    model, _ = load_base(smoke(), base)
    examples = [encode(r, tokenizer) for r in make_records(4)]
    model.train()
    losses = example_losses(model, examples, tokenizer.pad_token_id, tokens_per_batch)
    assert model.training and set(losses) == {e.id for e in examples}
    model.eval()
    for example in examples:
        assert losses[example.id] == pytest.approx(plain_loss(model, example), abs=2e-5)


# the order, the count of tokens and the seed


def watch_tokens(model) -> list[list[list[int]]]:
    "Record the rows of every batch that the model's embedding looks up."
    batches = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: batches.append(args[0].tolist()))
    return batches


@pytest.mark.parametrize("accumulation, micro, epochs", [(1, 4, 1), (1, 5, 2), (3, 2, 2)])
def test_the_model_sees_the_records_in_their_order(base, tokenizer, tmp_path, accumulation, micro, epochs):
    model, _ = load_base(smoke(), base)
    batches, steps = watch_tokens(model), []
    records = make_records(11)[::-1]  # neither by length nor by id
    recipe = smoke(
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.num_train_epochs={epochs}",
        f"training.per_device_train_batch_size={micro}",
    )
    result = train_phase(
        recipe,
        "B",
        records,
        None,
        tmp_path / "out",
        loaded=(model, tokenizer),
        on_step=lambda row: steps.append(len(batches)),
    )
    examples = [encode(r, tokenizer) for r in records]
    seen = [row for batch in batches for row in batch]
    expected = [e.input_ids for e in examples] * epochs
    assert len(seen) == len(expected)
    for row, ids in zip(seen, expected, strict=True):
        assert row[: len(ids)] == ids and set(row[len(ids) :]) <= {tokenizer.pad_token_id}

    real = [len(e) for e in examples] * epochs
    per_batch = [sum(real.pop(0) for _ in batch) for batch in batches]
    bounds = list(zip([0, *steps], steps, strict=False))
    assert [row["tokens"] for row in result.steps] == [sum(per_batch[a:b]) for a, b in bounds]
    assert result.totals["tokens"] == sum(map(len, examples)) * epochs
    assert [row["steps"] for row in result.steps] == [len(result.steps)] * len(result.steps)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_tokens_per_step_counts_every_token_once_an_epoch(lengths, micro, accumulation, epochs):
    training = replace(
        smoke().training,
        per_device_train_batch_size=micro,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation,
    )
    tokens = tokens_per_step([Example(str(n), [1] * n, [1] * n) for n in lengths], training)
    assert sum(tokens) == sum(lengths) * epochs
    assert len(tokens) == math.ceil(math.ceil(len(lengths) / micro) / accumulation) * epochs
    assert tokens == tokens[: len(tokens) // epochs] * epochs


def weights(result) -> bytes:
    return (result.adapter / "adapter_model.safetensors").read_bytes()


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(base, phase_a, tmp_path):
    assert weights(train(base, tmp_path / "again")) == weights(phase_a)
    assert weights(train(base, tmp_path / "other", "training.seed=43")) != weights(phase_a)


def test_an_accumulated_step_equals_one_large_batch(base, tmp_path):
    large = train(base, tmp_path / "large", "training.per_device_train_batch_size=6")
    parts = train(
        base,
        tmp_path / "parts",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=3",
    )
    assert [r["tokens"] for r in parts.steps] == [r["tokens"] for r in large.steps]
    for one, other in zip(parts.steps, large.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-4)


# the hand-over from phase to phase, and to a person with stock PEFT


def batch_loss(model, tokenizer, records: list[dict]) -> float:
    "Loss of a batch as training counts it: the mean over all its answer tokens."
    examples = [encode(r, tokenizer) for r in records]
    losses = example_losses(model, examples, tokenizer.pad_token_id)
    counts = {e.id: sum(e.completion_mask) for e in examples}
    return sum(losses[i] * n for i, n in counts.items()) / sum(counts.values())


def test_phase_b_begins_where_phase_a_ended(base, tokenizer, phase_a, tmp_path):
    records = make_records(8, start=50)
    phase_b = train(base, tmp_path / "B", phase="B", records=records, adapter_in=phase_a.adapter)
    first_loss, first_batch = phase_b.steps[0]["loss"], records[:4]
    assert first_loss == pytest.approx(batch_loss(phase_a.model, tokenizer, first_batch), abs=1e-4)
    fresh, _ = load_base(smoke(), base)
    assert abs(first_loss - batch_loss(fresh, tokenizer, first_batch)) > 0.01, "phase A taught nothing"
    assert weights(phase_b) != weights(phase_a)


def test_a_phase_without_its_adapter_or_records_is_refused(base, tmp_path):
    with pytest.raises(TrainingError, match="no adapter in .*run the phase before"):
        train(base, tmp_path / "B", phase="B", adapter_in=tmp_path / "none")
    with pytest.raises(TrainingError, match="phase B has no records"):
        train_phase(smoke(), "B", [], None, tmp_path / "B", base=base)
    with pytest.raises(TrainingError, match="record r003 has .* over training.max_length"):
        train(base, tmp_path / "B", "training.max_length=130", records=make_records(1, start=3))
    assert not (tmp_path / "B").exists()


def test_the_saved_adapter_is_the_model_in_memory_for_stock_peft(base, tokenizer, phase_a):
    config = json.loads((phase_a.adapter / "adapter_config.json").read_text())
    assert config["use_dora"] is True and config["peft_type"] == "LORA"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untrained = plain(input_ids=torch.tensor([list(range(64))])).logits
    loaded = PeftModel.from_pretrained(plain, phase_a.adapter).eval()
    inside = phase_a.model.eval()
    for record in make_records(3, start=70):
        ids = torch.tensor([encode(record, tokenizer).input_ids])
        with torch.no_grad():
            assert (loaded(input_ids=ids).logits - inside(input_ids=ids).logits).abs().max() < 1e-5
    with torch.no_grad():
        assert (loaded(input_ids=torch.tensor([list(range(64))])).logits - untrained).abs().max() > 1e-2


def breaking_base(base, tokenizer, calls: int, value: float) -> tuple:
    "The base, its hidden states multiplied by `value` after so many batches, as an overflow would."
    model, _ = load_base(smoke(), base)
    batches = watch_tokens(model)
    model.model.norm.register_forward_hook(lambda _, args, out: out * value if len(batches) > calls else None)
    return model, tokenizer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("calls", [0, 1])
def test_a_loss_that_is_not_finite_stops_the_phase(base, tokenizer, tmp_path, value, calls):
    expected = rf"loss is (nan|inf) at step {calls + 1}; lower training.learning_rate \(now 0.003\)"
    with pytest.raises(TrainingError, match=expected):
        train(
            base,
            tmp_path / "A",
            "training.learning_rate=0.003",
            "training.warmup_ratio=0",
            "training.lr_scheduler_type=constant",
            loaded=breaking_base(base, tokenizer, calls, value),
        )
    assert not (tmp_path / "A").exists()


def test_a_last_gradient_that_is_not_finite_stops_the_phase(base, tokenizer, tmp_path):
    model, _ = load_base(smoke(), base)
    batches = watch_tokens(model)
    spoil = lambda gradient: gradient * float("nan") if len(batches) == 3 else None
    model.model.norm.register_forward_hook(lambda _, args, out: out.register_hook(spoil) and None)
    with pytest.raises(TrainingError, match="nan at step 3; lower training.learning_rate"):
        train(base, tmp_path / "A", loaded=(model, tokenizer))
    assert not (tmp_path / "A").exists()


# the merge


def test_a_merged_model_gives_the_logits_of_base_and_adapter(base, tokenizer, phase_a, tmp_path):
    note = merge_release(smoke(), phase_a.adapter, tmp_path / "merged", base)
    assert note["relative_logit_difference"] < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert batch_loss(merged, tokenizer, make_records(4)) == pytest.approx(
        batch_loss(phase_a.model, tokenizer, make_records(4)), abs=1e-5
    )


def test_plain_lora_is_never_merged_for_release(base, tmp_path):
    lora = train(base, tmp_path / "lora", "adapter.method=lora", records=make_records(4))
    with pytest.raises(ReleaseError, match="plain LoRA"):
        merge_release(smoke("adapter.method=lora"), lora.adapter, tmp_path / "merged", base)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_a_merge_whose_saved_weights_are_damaged_is_refused(base, phase_a, tmp_path, monkeypatch):
    save = LlamaForCausalLM.save_pretrained

    def damaged(self, *args, **kwargs):
        with torch.no_grad():
            self.model.layers[0].mlp.down_proj.weight[0] += 1
        return save(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", damaged)
    with pytest.raises(ReleaseError, match="differs from base plus adapter.*not released"):
        merge_release(smoke(), phase_a.adapter, tmp_path / "merged", base)
    assert list(tmp_path.iterdir()) == []

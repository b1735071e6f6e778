"Training against plain references, on a tiny random model: masks, losses, order, seeds, faults, merge."

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from question_maker import make_records
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, get_scheduler, set_seed

from elson_nb.recipes import load_recipe
from elson_nb.release.merge import ReleaseError, merge_release
from elson_nb.training.adapter import ADAPTER_FILES, TrainingError
from elson_nb.training.base import load_base, load_tokenizer, make_random_base
from elson_nb.training.batches import Example, encode, example_losses
from elson_nb.training.head import answer_loss
from elson_nb.training.phase import train_phase
from elson_nb.training.trainer import diverging

END_OF_PROMPT = "### Response:\n"
SETTINGS = (
    "training.per_device_train_batch_size=4",
    "training.seed=42",
    "training.threads=1",  # matrices this small are slower on two threads, much so on a busy machine
    "training.competence.rule=none",
)


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


@pytest.mark.parametrize(
    "accumulation, micro, epochs, budget", [(1, 4, 1, 4096), (1, 5, 2, 300), (3, 2, 2, 1)]
)
def test_the_model_sees_the_records_in_their_order(
    base, tokenizer, tmp_path, accumulation, micro, epochs, budget
):
    model, _ = load_base(smoke(), base)
    batches, steps = watch_tokens(model), [0]
    records = make_records(11)[::-1]  # neither by length nor by id
    result = train(
        base,
        tmp_path / "out",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.num_train_epochs={epochs}",
        f"training.per_device_train_batch_size={micro}",
        f"training.tokens_per_micro_batch={budget}",
        phase="B",
        records=records,
        loaded=(model, tokenizer),
        on_step=lambda row: steps.append(len(batches)),
    )
    examples, size = [encode(r, tokenizer) for r in records], accumulation * micro
    planned = [examples[at : at + size] for at in range(0, len(examples), size)] * epochs
    assert len(result.steps) == len(planned)
    for step, row, first, end in zip(planned, result.steps, steps, steps[1:], strict=False):
        seen = [ids for batch in batches[first:end] for ids in batch]
        by_length = sorted(step, key=lambda e: (len(e), e.id))
        for ids, example in zip(seen, by_length, strict=True):
            assert ids[: len(example)] == example.input_ids
            assert set(ids[len(example) :]) <= {tokenizer.pad_token_id}
        for batch in batches[first:end]:
            assert len(batch) == 1 or len(batch) * len(batch[0]) <= budget
        assert row["tokens"] == sum(map(len, step)) and row["micro_batches"] == end - first
        assert row["records"] == len(step) and row["steps"] == len(planned)
    assert result.totals["tokens"] == sum(map(len, examples)) * epochs


def weights(result) -> bytes:
    return (result.adapter / "adapter_model.safetensors").read_bytes()


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(base, phase_a, tmp_path):
    assert weights(train(base, tmp_path / "again")) == weights(phase_a)
    assert weights(train(base, tmp_path / "other", "training.seed=43")) != weights(phase_a)


def same_weights(one: dict, other: dict, start: dict, share: float) -> float:
    "Difference of two trained adapters; it must be under `share` of the greatest move from `start`."
    assert one.keys() == other.keys() == start.keys()
    moved = max(float((one[k] - start[k]).abs().max()) for k in one)
    apart = max(float((one[k] - other[k]).abs().max()) for k in one)
    assert moved > 1e-3 and apart < share * moved, f"{apart:.2e} apart after a move of {moved:.2e}"
    return apart / moved


def adapter_weights(result) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


def fresh_adapter(base):
    "The base with an adapter of PEFT alone, drawn with the seed of the tests."
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    set_seed(42)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.fixture(scope="module")
def untrained(base):
    return {
        k: v.clone()
        for k, v in get_peft_model_state_dict(fresh_adapter(base), save_embedding_layers=False).items()
    }


def test_an_accumulated_step_equals_one_large_batch(base, untrained, tmp_path):
    sizes = lambda *pair: (
        f"training.per_device_train_batch_size={pair[0]}",
        f"training.gradient_accumulation_steps={pair[1]}",
    )
    large = train(base, tmp_path / "large", *sizes(6, 1))
    assert max(row["micro_batches"] for row in large.steps) < 6
    assert weights(train(base, tmp_path / "parts", *sizes(2, 3))) == weights(large)
    single = train(base, tmp_path / "single", *sizes(3, 2), "training.tokens_per_micro_batch=1")
    assert [row["micro_batches"] for row in single.steps] == [6, 6]
    for one, other in zip(single.steps, large.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    same_weights(adapter_weights(single), adapter_weights(large), untrained, 1e-3)


# the whole of training against a plain loop


def plain_batch(tokenizer, records: list[dict]) -> dict[str, torch.Tensor]:
    "Ids, mask and labels of records in one padded batch, written out."
    rows, labels = [], []
    for record in records:
        question = "\n\n".join(text for text in (record["instruction"], record["input"]) if text)
        prompt = tokenizer(f"### Instruction:\n{question}\n\n{END_OF_PROMPT}")["input_ids"]
        answer = [*tokenizer(record["output"])["input_ids"], tokenizer.eos_token_id]
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    width = max(map(len, rows))
    fill = lambda parts, value: torch.tensor([part + [value] * (width - len(part)) for part in parts])
    mask = fill([[1] * len(row) for row in rows], 0)
    return {"input_ids": fill(rows, 0), "attention_mask": mask, "labels": fill(labels, -100)}


def plain_training(
    base, tokenizer, records: list[dict], size: int, rate: float, decay: float, warmup: int, clip: float
):
    "PEFT, PyTorch's AdamW and cross entropy, Transformers' scheduler; trained weights, a row a step."
    model = fresh_adapter(base).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    steps = -(-len(records) // size)
    schedule = get_scheduler("cosine", optimiser, num_warmup_steps=warmup, num_training_steps=steps)
    rows = []
    for at in range(0, len(records), size):
        optimiser.param_groups[0]["lr"] = rate * schedule.lr_lambdas[0](at // size + 0.5)  # a step's middle
        batch = plain_batch(tokenizer, records[at : at + size])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        rows.append(
            {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": optimiser.param_groups[0]["lr"]}
        )
        optimiser.step()
        optimiser.zero_grad()
    return get_peft_model_state_dict(model, save_embedding_layers=False), rows


@pytest.mark.parametrize("budget", [4096, 300])
def test_a_phase_equals_a_plain_loop(base, tokenizer, untrained, tmp_path, budget):
    records = make_records(23)[::-1]
    expected, rows = plain_training(base, tokenizer, records, 4, rate=0.01, decay=0.1, warmup=2, clip=0.4)
    result = train(
        base,
        tmp_path / "A",
        "training.learning_rate=0.01",
        "training.weight_decay=0.1",
        "training.max_grad_norm=0.4",
        "training.warmup_ratio=0.3",  # of six steps, rounded up
        f"training.tokens_per_micro_batch={budget}",
        records=records,
    )
    norms = [row["grad_norm"] for row in rows]
    assert len(result.steps) == 6 and min(norms) < 0.4 < max(norms), "some steps are clipped, some are not"
    for row, plain in zip(result.steps, rows, strict=True):
        assert row["loss"] == pytest.approx(plain["loss"], abs=2e-5)
        assert row["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2e-4)
        assert row["learning_rate"] == pytest.approx(plain["learning_rate"], rel=1e-12)
    same_weights(adapter_weights(result), expected, untrained, 2e-3)


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


def test_the_metadata_says_what_was_trained(base, phase_a):
    metadata = json.loads((phase_a.adapter / "training_metadata.json").read_text())
    recipe = smoke()
    assert sorted(p.name for p in phase_a.adapter.iterdir()) == sorted(ADAPTER_FILES)
    assert metadata["phase"] == "A" and metadata["fingerprint"] == recipe.fingerprint()
    assert metadata["recipe"] == json.loads(json.dumps(recipe.to_dict()))
    facts = metadata["training"]
    assert (
        facts["phase"] == "A"
        and facts["adapter_before"] is None
        and facts["settings"] == recipe.fingerprint()
    )
    assert re.fullmatch("[0-9a-f]{16}", facts["data"])
    assert metadata["totals"] == phase_a.totals
    totals = metadata["totals"]
    assert totals["steps"] == 3 and totals["records"] == 12 and totals["notes"] == []
    assert totals["trainable_parameters"] == sum(t.numel() for t in adapter_weights(phase_a).values())
    assert not list(phase_a.adapter.parent.glob(".checkpoints*")), "checkpoints of a finished phase are left"


def test_nobody_is_told_of_a_training(base, tmp_path, monkeypatch):
    """The library would report each one from a thread that reads the environment while Accelerate writes
    to it: with no network in reach, one training in a few ended in a segmentation fault."""
    told = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **more: told.append(args))
    train(base, tmp_path / "A", records=make_records(4))
    assert told == []


# what goes wrong is seen


def breaking_base(base, tokenizer, calls: int, value: float) -> tuple:
    "The base, its hidden states multiplied by `value` after so many batches, as an overflow would."
    model, _ = load_base(smoke(), base)
    batches = watch_tokens(model)
    model.model.norm.register_forward_hook(lambda _, args, out: out * value if len(batches) > calls else None)
    return model, tokenizer


def checkpoints_in(folder) -> list[str]:
    return sorted(p.name for p in folder.glob("checkpoint-*"))


EVERY_STEP = ("training.checkpoint_every=1", "training.keep_checkpoints=20")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_loss_that_is_not_finite_stops_the_phase(base, tokenizer, tmp_path, value, calls):
    good = "the start" if calls == 0 else f"{tmp_path}/work/checkpoint-2"
    expected = rf"loss is (nan|inf) at step {calls + 1}; the last good checkpoint is {good}; "
    expected += r"lower training.learning_rate \(now 0.003\)"
    with pytest.raises(TrainingError, match=expected):
        train(
            base,
            tmp_path / "A",
            "training.learning_rate=0.003",
            "training.warmup_ratio=0",
            "training.lr_scheduler_type=constant",
            *EVERY_STEP,
            loaded=breaking_base(base, tokenizer, calls, value),
            checkpoints=tmp_path / "work",
        )
    assert not (tmp_path / "A").exists()
    assert checkpoints_in(tmp_path / "work") == [f"checkpoint-{n}" for n in range(1, calls + 1)]


def test_a_last_gradient_that_is_not_finite_stops_the_phase(base, tokenizer, tmp_path):
    model, _ = load_base(smoke(), base)
    batches = watch_tokens(model)
    spoil = lambda gradient: gradient * float("nan") if len(batches) == 3 else None
    model.model.norm.register_forward_hook(lambda _, args, out: out.register_hook(spoil) and None)
    with pytest.raises(
        TrainingError, match="grad_norm is nan at step 3; .*checkpoint-2; lower training.learning_rate"
    ):
        train(base, tmp_path / "A", *EVERY_STEP, loaded=(model, tokenizer), checkpoints=tmp_path / "work")
    assert not (tmp_path / "A").exists()
    assert checkpoints_in(tmp_path / "work") == ["checkpoint-1", "checkpoint-2"]


def test_a_loss_that_doubled_for_five_steps_stops_the_phase(base, tokenizer, tmp_path):
    rows = []
    with pytest.raises(
        TrainingError, match=rf"loss is \d+.* at step 12; .* is {tmp_path}/work/checkpoint-7; lower"
    ):
        train(
            base,
            tmp_path / "A",
            "training.per_device_train_batch_size=1",
            *EVERY_STEP,
            records=make_records(20),
            loaded=breaking_base(base, tokenizer, 7, -30.0),
            checkpoints=tmp_path / "work",
            on_step=rows.append,
        )
    losses = [row["loss"] for row in rows]
    assert len(losses) == 11 and min(losses[7:]) > 2 * sum(losses[:5]) / 5 > 1.5 * max(losses[:7])
    assert checkpoints_in(tmp_path / "work") == [f"checkpoint-{n}" for n in range(1, 8)]


@pytest.mark.parametrize(
    "losses, stops",
    [
        ([1.0] * 5 + [2.01] * 5, True),
        ([1.0] * 5 + [2.0] * 5, False),  # twice is not over twice
        ([1.0] * 5 + [9.0] * 4 + [1.9], False),  # all five must be
        ([1.0] * 5 + [9.0] * 4, False),
        ([0.5, 1.5, 1.0, 0.5, 1.5, 9.0, 1.0] + [2.01] * 5, True),  # the start is a mean
        ([5.0] * 5 + [1.0] * 50 + [9.0] * 5, False),  # it is measured against the start
    ],
)
def test_what_counts_as_divergence(losses, stops):
    assert diverging(losses) is stops


def little_memory(monkeypatch, limit: int, error: Exception) -> list[int]:
    "From now on a micro-batch of more padded tokens than `limit` raises; the sizes that were tried."
    sizes = []

    def loss(model, tensors):
        sizes.append(tensors["input_ids"].numel())
        if sizes[-1] > limit:
            raise error
        return answer_loss(model, tensors)

    monkeypatch.setattr("elson_nb.training.trainer.answer_loss", loss)
    return sizes


OUT_OF_MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    "error, budget, passed, budgets",
    [
        (OUT_OF_MEMORY, 1000, [False], [500, 250]),
        (MemoryError(), 300, [True, False], [150]),  # the gradient of the first part has to be given up
    ],
)
def test_when_memory_ends_the_step_is_taken_in_smaller_parts(
    base, phase_a, untrained, tmp_path, monkeypatch, error, budget, passed, budgets
):
    sizes = little_memory(monkeypatch, 280, error)
    result = train(base, tmp_path / "A", f"training.tokens_per_micro_batch={budget}")
    assert [size <= 280 for size in sizes[: len(passed)]] == passed
    notes = [f"step 1: memory ended, {tokens} tokens a micro-batch now" for tokens in budgets]
    assert result.totals["notes"] == notes
    assert [row["records"] for row in result.steps] == [row["records"] for row in phase_a.steps]
    assert min(row["micro_batches"] for row in result.steps) > 1
    same_weights(adapter_weights(result), adapter_weights(phase_a), untrained, 1e-3)


def test_memory_that_ends_on_a_single_record_names_the_settings(base, tmp_path, monkeypatch):
    little_memory(monkeypatch, 60, OUT_OF_MEMORY)
    with pytest.raises(
        TrainingError, match="memory ended with .*training.tokens_per_micro_batch or training.max_length"
    ):
        train(base, tmp_path / "A")
    assert not (tmp_path / "A").exists()


def test_another_runtime_error_is_not_taken_for_want_of_memory(base, tmp_path, monkeypatch):
    sizes = little_memory(monkeypatch, 0, RuntimeError("index 5 is out of bounds"))
    with pytest.raises(RuntimeError, match="out of bounds"):
        train(base, tmp_path / "A")
    assert len(sizes) == 1


def without_gradient(how: str):
    "A hook that lets a module's output through and keeps its gradient back."
    if how == "missing":
        return lambda _, args, out: out.detach()
    return lambda _, args, out: out.register_hook(torch.zeros_like) and None


@pytest.mark.parametrize("how", ["missing", "zero"])
@pytest.mark.parametrize("again", [False, True])
def test_dead_gradients_are_refused_before_the_first_step(base, tokenizer, phase_a, tmp_path, how, again):
    model, _ = load_base(smoke(), base)
    model.model.layers[1].mlp.register_forward_hook(without_gradient(how))
    rows = []
    dead = 9 if how == "missing" or again else 6  # A of a fresh adapter has none in the first step
    with pytest.raises(
        TrainingError, match=rf"{dead} of 42 trainable .* 'base.*layers.1.mlp.* model.quantization=none"
    ):
        train(
            base,
            tmp_path / "B",
            *EVERY_STEP,
            phase="B",
            adapter_in=phase_a.adapter if again else None,
            loaded=(model, tokenizer),
            on_step=rows.append,
            checkpoints=tmp_path / "work",
        )
    assert not rows and not checkpoints_in(tmp_path / "work") and not (tmp_path / "B").exists()


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

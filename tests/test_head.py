"The loss over labelled tokens alone against whole models: values, gradients, isolation, odd heads."

import contextlib
import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from elson_nb.training import head as head_module
from elson_nb.training.batches import Example, pad
from elson_nb.training.head import ChunkedLoss, answer_loss, is_plain, labelled_head, token_losses

VOCABULARY, PAD = 37, 0
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
ATTENTION = ("sdpa", "eager")  # what trains on a CPU
DOUBLE, SINGLE = (
    1e-10,
    1e-5,
)  # noise; the plain way takes its cross entropy in single precision, as eager its softmax
few = settings(derandomize=True, deadline=None, max_examples=25)


def frozen_head(model):
    "The model in double precision; its head (and what is tied to it) does not train."
    model.get_output_embeddings().requires_grad_(False)
    return model.double().train()


def tiny(kind=LlamaForCausalLM, config=LlamaConfig, attention="sdpa", **more):
    set_seed(3)
    return frozen_head(kind(config(**SMALL | more, attn_implementation=attention)))


@st.composite
def batches(draw):
    "A padded batch of a few documents, each with its own mask."
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    token = st.integers(1, VOCABULARY - 1)
    fixed = lambda kind, size: draw(st.lists(kind, min_size=size, max_size=size))
    examples = [Example(str(n), fixed(token, k), fixed(st.integers(0, 1), k)) for n, k in enumerate(lengths)]
    return pad(examples, PAD)


def plain_loss(model, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    "Summed cross entropy over the labels of the logits that the model gives as it is."
    inputs = {k: tensors[k] for k in ("input_ids", "attention_mask")}
    logits, labels = model(**inputs).logits[:, :-1], tensors["labels"][:, 1:]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(mine: dict, expected: dict, noise: float) -> None:
    "Tensors equal within `noise` of the largest value of each."
    assert mine.keys() == expected.keys() and len(mine) >= 10
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-3)
        assert float((mine[name] - tensor).abs().max()) <= noise * scale, name


def assert_equal(model, tensors: dict[str, torch.Tensor], noise: float) -> None:
    "The loss over labelled tokens has the value and the gradients of the plain one."
    loss, count = answer_loss(model, tensors)
    expected = plain_loss(model, tensors)
    assert count == int((tensors["labels"][:, 1:] != -100).sum())
    assert loss.item() == pytest.approx(expected.item(), rel=noise)
    assert_close(gradients(model, loss), gradients(model, expected), noise)


@contextlib.contextmanager
def small_chunks(size: int = 5):
    "Several chunks even in a tiny batch."
    kept, head_module.CHUNK = head_module.CHUNK, size
    try:
        yield
    finally:
        head_module.CHUNK = kept


@pytest.fixture(scope="module", params=ATTENTION)
def llama(request):
    return tiny(attention=request.param)


# value and gradient


@few
@given(batches(), st.sampled_from([1, 5, 128]))
def test_loss_and_gradients_equal_the_whole_models(llama, tensors, chunk):
    assert is_plain(llama, llama.get_output_embeddings())
    with small_chunks(chunk):
        assert_equal(llama, tensors, DOUBLE)


@few
@given(batches())
def test_the_loss_of_every_labelled_token_is_the_whole_models(llama, tensors):
    rows, each = token_losses(llama, tensors)
    labels = tensors["labels"][:, 1:]
    logits = llama(**{k: tensors[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1]
    plain = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    place = [
        (row, at) for row in range(len(labels)) for at in range(labels.shape[1]) if labels[row, at] != -100
    ]
    assert rows.tolist() == [row for row, _ in place]
    assert each.tolist() == pytest.approx([plain[at].item() for at in place], rel=SINGLE)


def documents(lengths, seed=0) -> list[Example]:
    "Random documents; the second half of each carries loss."
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
    return [
        Example(str(n), row, [int(at >= len(row) // 2) for at in range(len(row))])
        for n, row in enumerate(ids)
    ]


def test_single_precision_stays_within_its_noise():
    tensors, model = pad(documents((5, 40, 60)), PAD), tiny()
    exact = plain_loss(model, tensors)
    exact_gradients = gradients(model, exact)
    single = copy.deepcopy(model).float()
    loss, _ = answer_loss(single, tensors)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert_close(gradients(single, loss), exact_gradients, SINGLE)


def test_half_precision_takes_the_softmax_and_the_sum_in_single():
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=draw).bfloat16() for n in (300, VOCABULARY))
    targets = torch.randint(VOCABULARY, (300,), generator=draw)
    loss = ChunkedLoss.apply(hidden, weight, targets, 64)
    plain = nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_batch_without_labels_gives_zero_and_zero_gradients(attention):
    model = tiny(attention=attention)
    tensors = pad(
        [Example("a", [3, 4, 5], [0, 0, 0]), Example("b", [6, 7], [1, 0])], PAD
    )  # the first token has no loss
    for way in (model, trained_head(model)):
        loss, count = answer_loss(way, tensors)
        assert loss.item() == 0.0 and count == 0
        grads = gradients(way, loss)
        assert len(grads) >= 10 and not any(g.any() for g in grads.values())


# isolation of documents


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_documents_loss_in_a_batch_is_its_loss_alone(attention):
    model, examples = tiny(attention=attention), documents((3, 9, 17, 17, 30))
    alone, parts = [], []
    for example in examples:
        loss, _ = answer_loss(model, pad([example], PAD))
        alone.append(loss.item())
        parts.append(gradients(model, loss))
    whole, _ = answer_loss(model, pad(examples, PAD))
    noise = DOUBLE if attention == "sdpa" else SINGLE
    assert whole.item() == pytest.approx(sum(alone), rel=noise)
    together = {name: sum(part[name] for part in parts) for name in parts[0]}
    assert_close(gradients(model, whole), together, noise)


@pytest.mark.parametrize("attention", ATTENTION)
def test_what_stands_in_the_other_documents_and_in_the_padding_changes_nothing(attention):
    model, examples = tiny(attention=attention), documents((6, 20, 12))
    only = lambda texts: [texts[0], *(Example(e.id, e.input_ids, [0] * len(e)) for e in texts[1:])]
    tensors = pad(only(examples), PAD)
    other = pad(only([examples[0], *documents((20, 12), seed=9)]), PAD)
    other["input_ids"][0, 6:] = 11  # padding of another kind
    assert tensors["input_ids"].shape == other["input_ids"].shape
    first, second = answer_loss(model, tensors)[0], answer_loss(model, other)[0]
    assert first.item() == pytest.approx(second.item(), rel=DOUBLE)
    shifted = {k: v.clone() for k, v in tensors.items()}
    shifted["input_ids"][0, 2] = 1 + shifted["input_ids"][0, 2] % (VOCABULARY - 1)
    assert abs(answer_loss(model, shifted)[0].item() - first.item()) > 1e-6, "its own text does change it"


# heads that are not plain


def trained_head(model):
    made = copy.deepcopy(model)
    made.get_output_embeddings().requires_grad_(True)
    return made


def biased_head(model):
    made = copy.deepcopy(model)
    made.lm_head = nn.Linear(16, VOCABULARY, bias=True, dtype=torch.float64).requires_grad_(False)
    return made


def adapted_head(model):
    "LoRA on the head too, with an effect: its B is not zero."
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    made = get_peft_model(copy.deepcopy(model), config).double()
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return made


def other_family(kind, config, **more):
    return lambda _: tiny(kind, config, **more)


ODD = {
    "trained": trained_head,
    "biased": biased_head,
    "adapted": adapted_head,
    "softcapped": other_family(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=2.0, head_dim=8),
    "scaled up": other_family(CohereForCausalLM, CohereConfig, logit_scale=3.0),
    "scaled down": other_family(GraniteForCausalLM, GraniteConfig, logits_scaling=4.0),
}


@pytest.fixture(scope="module", params=ODD)
def odd(request):
    return ODD[request.param](tiny())


@few
@given(batches())
def test_a_head_that_trains_or_adds_or_scales_goes_the_plain_way(odd, tensors):
    assert not is_plain(odd, odd.get_output_embeddings())
    with small_chunks():
        assert_equal(odd, tensors, SINGLE)


def test_a_scale_of_one_and_no_softcap_are_plain():
    families = ((Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": None, "head_dim": 8}),)
    families += ((GraniteForCausalLM, GraniteConfig, {"logits_scaling": 1.0}),)
    for kind, config, more in families:
        model = tiny(kind, config, **more)
        assert is_plain(model, model.get_output_embeddings())
        with small_chunks():
            assert_equal(model, pad(documents((4, 9, 11)), PAD), DOUBLE)


def test_an_adapter_on_the_layers_leaves_the_head_plain():
    model = tiny()
    exact = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    exact = exact.double()
    for name, parameter in exact.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert is_plain(exact, exact.get_output_embeddings())
    with small_chunks():
        assert_equal(exact, pad(documents((4, 9, 11)), PAD), DOUBLE)


# the head afterwards


class Stop(Exception):
    pass


def break_off(model, tensors) -> None:
    "An answer loss that fails in the model, before the head."
    hook = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        answer_loss(model, tensors)
    hook.remove()


@pytest.mark.parametrize("hooked", [False, True])
def test_the_heads_forward_is_as_it_was_afterwards(hooked):
    model, tensors = tiny(), pad(documents((4, 9)), PAD)
    head, inputs = model.lm_head, {k: tensors[k] for k in ("input_ids", "attention_mask")}
    if hooked:  # as a model spread by Accelerate has it: a forward of the instance's own
        add_hook_to_module(head, ModelHook())
    before, logits = head.__dict__.get("forward"), model(**inputs).logits
    answer_loss(model, tensors)
    assert head.__dict__.get("forward") is before
    break_off(model, tensors)
    assert head.__dict__.get("forward") is before
    assert torch.equal(model(**inputs).logits, logits)


def test_within_the_block_the_head_takes_labelled_positions_only():
    model, tensors = tiny(), pad(documents((4, 9)), PAD)
    labels, seen = tensors["labels"], []
    with labelled_head(model.lm_head, labels, chunked=False):
        plain = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
        seen.append(plain.shape)
    assert seen == [(int((labels[:, 1:] != -100).sum()), VOCABULARY)]

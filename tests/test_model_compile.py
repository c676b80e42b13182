"""Loss, optimizer, schedule and metrics in one sentence: against formulas, references and Trainer."""

import copy
import io
import itertools
import math
import socket
from pathlib import Path

import evaluate
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.trainer_pt_utils import LabelSmoother

from instruct_ft.model import compile as module
from instruct_ft.model.compile import (
    LOSSES,
    MCC,
    METRICS,
    OPTIMIZERS,
    SCHEDULES,
    Accuracy,
    Lion,
    Loss,
    MuonAdamW,
    NotFinite,
    SpanF1,
    cross_entropy,
    find_rate,
    focal,
    label_smoothing,
    make_schedule,
    model_task,
    parameter_groups,
    time_torch_compile,
)
from instruct_ft.model.compile import compile as compile_model
from instruct_ft.model.load import quiet
from instruct_ft.settings import InputError

V = 48
SIZE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bert(kind=BertForSequenceClassification, labels=3, **more):
    torch.manual_seed(1)
    return kind(BertConfig(vocab_size=V, num_labels=labels, **STILL, **SIZE, **more))


def llama(tied=True):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=tied, **SIZE))


def gpt2():
    torch.manual_seed(1)
    size = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32)
    none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, **size, **none))


def t5():
    torch.manual_seed(1)
    size = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    ends = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return T5ForConditionalGeneration(T5Config(vocab_size=V, **size, **ends))


def roberta():
    torch.manual_seed(1)
    return RobertaForMaskedLM(RobertaConfig(vocab_size=V, **STILL, **SIZE))


class Traced(nn.Module):
    "What `torch.compile` returns, without its slow import: the model lies in `_orig_mod`"

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, **inputs):
        return self._orig_mod(**inputs)


class StubCRF(nn.Module):
    "The signature of `LinearChainCRF`; transitions only, by plain forward recursion"

    def __init__(self, k):
        super().__init__()
        self.transitions = nn.Parameter(
            torch.randn(k, k, generator=torch.Generator().manual_seed(0))
        )

    def loss(self, emissions, tags, mask, reduction="mean"):
        found = []
        for e, t, m in zip(emissions, tags, mask, strict=True):
            e, t = e[m], t[m]
            if not len(e):
                continue
            alpha, gold = e[0], e[0, t[0]]
            for i in range(1, len(e)):
                alpha = (alpha[:, None] + self.transitions).logsumexp(0) + e[i]
                gold = gold + self.transitions[t[i - 1], t[i]] + e[i, t[i]]
            found.append(alpha.logsumexp(0) - gold)
        total = torch.stack(found).sum()
        return total if reduction == "sum" else total / len(emissions)

    def decode(self, emissions, mask):
        return [e[m].argmax(-1).tolist() for e, m in zip(emissions, mask, strict=True)]


def crf_tagger(kind=StubCRF):
    model = bert(BertForTokenClassification, id2label={0: "O", 1: "B-X", 2: "I-X"})
    model.crf = kind(3)
    return model


FAMILIES = dict(llama=llama, gpt2=gpt2, t5=t5, roberta=roberta, bert=lambda: bert(BertForMaskedLM))


def batch(model, rows=4, length=10, seed=0, share=0.5):
    g = torch.Generator().manual_seed(seed)
    task, ids = model_task(model), torch.randint(2, V, (rows, length), generator=g)
    hidden = torch.rand(ids.shape, generator=g) < 1 - share
    hidden[:, -1] = False
    whole = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    k = getattr(model.config, "num_labels", 2)
    labels = {
        "classification": lambda: torch.randint(0, k, (rows,), generator=g),
        "multilabel": lambda: torch.randint(0, 2, (rows, k), generator=g).float(),
        "regression": lambda: torch.randn(rows, generator=g),
        "tagging": lambda: torch.randint(0, k, ids.shape, generator=g).masked_fill(hidden, -100),
    }.get(task, lambda: ids.masked_fill(hidden, -100))()
    if task == "questions":
        return whole | dict(
            start_positions=torch.randint(0, length, (rows,), generator=g),
            end_positions=torch.randint(0, length, (rows,), generator=g),
        )
    return whole | dict(labels=labels)


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ";" in text, text
    return text


# ---------------------------------------------------------------- what a model predicts


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (llama, "causal"),
        (gpt2, "causal"),
        (t5, "seq2seq"),
        (roberta, "masked"),
        (lambda: bert(BertForMaskedLM), "masked"),
        (bert, "classification"),
        (lambda: bert(labels=1), "regression"),
        (lambda: bert(problem_type="multi_label_classification"), "multilabel"),
        (lambda: bert(problem_type="regression"), "regression"),
        (lambda: bert(BertForTokenClassification), "tagging"),
        (lambda: bert(BertForQuestionAnswering, 2), "questions"),
        (crf_tagger, "tagging"),
    ],
)
def test_task_is_read_off_the_model(make, task):
    assert model_task(make()) == task


def test_task_inside_peft_and_torch_compile_and_by_hand():
    with quiet():
        wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
    assert model_task(wrapped) == "causal"
    assert model_task(Traced(llama())) == "causal"
    assert "task=" in refusal(model_task, nn.Linear(2, 2))
    assert compile_model(nn.Linear(2, 2), task="tagging").task == "tagging"
    assert "tagging" in refusal(compile_model, llama(), task="taging")


def test_a_subclass_predicts_what_its_base_does():
    class Mine(LlamaForCausalLM):
        pass

    assert model_task(Mine(llama().config)) == "causal"


# ---------------------------------------------------------------- losses


@given(
    hnp.arrays(np.float64, (5, 4), elements=st.floats(-30, 30)),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.floats(0, 0.99),
    st.floats(0, 5),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_losses_equal_their_formulas(logits, labels, epsilon, gamma):
    top = logits.max(1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    right = logp[np.arange(5), labels]
    x, y = torch.tensor(logits), torch.tensor(labels)
    close = dict(rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(cross_entropy(x, y), -right, **close)
    smooth = -(1 - epsilon) * right - epsilon * logp.mean(1)
    np.testing.assert_allclose(label_smoothing(x, y, epsilon), smooth, **close)
    missing = np.maximum(-np.expm1(right), 1e-12)
    np.testing.assert_allclose(focal(x, y, gamma), missing**gamma * -right, **close)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_the_answer_is_sure(gamma):
    x = torch.tensor([[100.0, 0.0], [0.0, 0.0]], requires_grad=True)
    focal(x, torch.tensor([0, 0]), gamma).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "make", [*FAMILIES.values(), bert, lambda: bert(BertForTokenClassification)]
)
def test_cross_entropy_equals_the_models_own(make):
    model = make().eval()
    b = batch(model)
    ours = compile_model(model).loss(b)
    assert ours.item() == pytest.approx(model(**b).loss.item(), rel=1e-5)


def test_questions_and_ends_beyond_the_text():
    model = bert(BertForQuestionAnswering, 2).eval()
    b = batch(model)
    compiled = compile_model(model)
    assert compiled.loss(b).item() == pytest.approx(model(**b).loss.item(), rel=1e-5)
    b["start_positions"][0] = b["end_positions"][0] = 99
    kept = {k: v[1:] for k, v in b.items()}
    assert compiled.loss(b).item() == pytest.approx(compiled.loss(kept).item(), rel=1e-5)
    assert compiled._count(b) == compiled._count(kept)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_numbers_and_yes_or_no_equal_the_models_own(kind):
    model = bert(labels=1 if kind == "regression" else 3, problem_type=kind).eval()
    b = batch(model)
    assert compile_model(model).loss(b).item() == pytest.approx(model(**b).loss.item(), rel=1e-5)


@pytest.mark.parametrize("make", [llama, t5, roberta])
def test_label_smoothing_equals_that_of_trainer(make):
    model = make().eval()
    b, compiled = batch(model), compile_model(model, loss=dict(name="label-smoothing", epsilon=0.2))
    inputs, labels, _ = compiled._split(b)
    shift = compiled.task == "causal"
    theirs = LabelSmoother(epsilon=0.2)(model(**inputs), labels, shift_labels=shift)
    assert compiled.loss(b).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_weights_by_token_and_by_label():
    model = llama().eval()
    b = batch(model, share=1.0)
    plain = compile_model(model)
    ones = compile_model(model, loss="weighted")
    w = torch.zeros(b["labels"].shape)
    w[:, 3:6] = 1
    only = b | dict(labels=b["labels"].masked_fill(w == 0, -100))
    share = 3 / (b["labels"].shape[1] - 1)
    assert ones.loss(b | dict(weights=torch.ones_like(w))).item() == pytest.approx(
        plain.loss(b).item()
    )
    assert ones.loss(b | dict(weights=w)).item() == pytest.approx(
        share * plain.loss(only).item(), rel=1e-5
    )
    label = int(b["labels"][0, 4])
    by = compile_model(model, loss=dict(name="weighted", by_label={label: 3.0}))
    same = torch.where(b["labels"] == label, 3.0, 1.0)
    assert by.loss(b).item() == pytest.approx(ones.loss(b | dict(weights=same)).item(), rel=1e-6)
    assert "does not use" in refusal(plain.loss, b | dict(weights=w))
    assert "weights" in refusal(ones.loss, b | dict(weights=w[:, 1:]))
    assert "weights" in refusal(ones.loss, b | dict(weights=-w))


def test_crf_loss_is_that_of_the_crf_over_learned_places():
    model = crf_tagger().eval()
    b, compiled = batch(model), compile_model(model, metrics=["accuracy", "span-f1"])
    assert compiled.loss_fn.name == "crf"
    logits = model(b["input_ids"], b["attention_mask"]).logits
    learned = b["labels"] != -100
    rows = [
        model.crf.loss(e[m][None], t[m][None], torch.ones(1, int(m.sum()), dtype=torch.bool))
        for e, t, m in zip(logits, b["labels"], learned, strict=True)
    ]
    expected = torch.stack(rows).sum() / learned.sum()
    assert compiled.loss(b).item() == pytest.approx(expected.item(), rel=1e-5)
    before = model.crf.transitions.detach().clone()
    compiled.step(b)
    assert not torch.equal(before, model.crf.transitions)
    found = compiled.evaluate([b])
    right = (logits.argmax(-1) == b["labels"])[learned].float().mean().item()
    assert set(found) == {"loss", "accuracy", "span_f1"} and 0 <= right <= 1


def test_the_course_s_own_crf_is_taken():
    crf = pytest.importorskip("instruct_ft.model.crf")
    compiled = compile_model(crf_tagger(crf.LinearChainCRF), metrics="span-f1", lr=1e-2, steps=20)
    b = batch(compiled.model)
    losses = [compiled.step(b) for _ in range(20)]
    assert losses[-1] < losses[0] / 2 and compiled.evaluate([b])["span_f1"] > 0
    held = {id(p): g for g in compiled.optimizer.param_groups for p in g["params"]}
    assert all(held[id(p)]["weight_decay"] == 0 for p in compiled.model.crf.parameters())


def test_label_faults_are_told():
    model = bert()
    b, compiled = batch(model), compile_model(bert())
    assert "not in 0 to 2" in refusal(compiled.loss, b | dict(labels=torch.tensor([0, 1, 2, 3])))
    assert "label -1 " in refusal(compiled.loss, b | dict(labels=torch.tensor([0, -1, 2, 1])))
    assert "int64" in refusal(compiled.loss, b | dict(labels=torch.tensor([0.0, 1, 2, 1])))
    assert "shape (4, 10)" in refusal(compiled.loss, b | dict(labels=b["input_ids"]))
    assert "no labels" in refusal(compiled.loss, dict(input_ids=b["input_ids"]))
    nothing = torch.full((4,), -100)
    assert "no label is learned" in refusal(compiled.loss, b | dict(labels=nothing))
    assert "no label is learned" in refusal(compiled.step, b | dict(labels=nothing))
    assert "no label is learned" in refusal(compiled.evaluate, [b | dict(labels=nothing)])
    assert "no label is learned" in refusal(compiled.evaluate, [])
    masked = compile_model(bert(BertForMaskedLM))
    assert "behind masks" in refusal(masked.loss, b | dict(labels=torch.tensor([0, 1, 2, 0])))


def test_inputs_are_not_modified():
    for make in (llama, t5, lambda: bert(BertForQuestionAnswering, 2)):
        model = make()
        b = batch(model)
        old = {k: v.clone() for k, v in b.items()}
        compiled = compile_model(model, metrics=["accuracy"])
        compiled.step(b)
        compiled.evaluate([b])
        assert old.keys() == b.keys() and all(torch.equal(old[k], b[k]) for k in b)


@pytest.mark.parametrize("make", [llama, t5, roberta, bert, crf_tagger])
@pytest.mark.parametrize("cut", [1, 3])
def test_micro_batches_regroup_a_step_and_change_nothing(make, cut):
    one, two = compile_model(make(), lr=1e-3), compile_model(make(), lr=1e-3)
    b = batch(one.model)
    if b["labels"].ndim == 2:
        b["labels"][0, :-1] = -100  # rows of very different lengths
    parts = [{k: v[:cut] for k, v in b.items()}, {k: v[cut:] for k, v in b.items()}]
    assert one.step(b) == pytest.approx(two.step(parts), rel=1e-5)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-7)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("make", [*FAMILIES.values(), bert, crf_tagger])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_groups_hold_every_trainable_parameter_once(make, decay):
    model = make()
    groups = parameter_groups(model, 1.0, 0.1, decay)
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for group in groups:
        for p in group["params"]:
            plain = p.ndim < 2 or id(p) in tables or p.shape == (3, 3)
            assert group["weight_decay"] == (0.0 if plain else 0.1)


def test_tied_weights_count_once_and_untied_heads_are_decayed():
    tied, untied = llama(), llama(tied=False)
    count = lambda m: sum(p.numel() for g in parameter_groups(m, 1.0) for p in g["params"])
    assert count(tied) == sum(p.numel() for p in tied.parameters())
    assert count(untied) - count(tied) == V * 16
    names = {id(p): g["name"] for g in parameter_groups(untied, 1.0) for p in g["params"]}
    assert names[id(untied.lm_head.weight)] == "decayed"
    assert names[id(untied.model.embed_tokens.weight)] == "plain"


@pytest.mark.parametrize("make", [llama, gpt2, t5, roberta, bert])
def test_rates_fall_from_the_head_to_the_embedding(make):
    model = make()
    rate = {id(p): g["lr"] for g in parameter_groups(model, 1.0, 0.0, 0.5) for p in g["params"]}
    found = {n: rate[id(p)] for n, p in model.named_parameters()}
    for name, r in found.items():
        parts = [int(x) for x in name.split(".") if x.isdigit()]
        inside = parts and not name.startswith("crf")
        if inside:
            assert r == 0.5 ** (2 - parts[0]), name  # two layers
        elif "embed" in name or name.startswith(("shared", "transformer.wte", "transformer.wpe")):
            assert r == 0.125, name
        else:
            assert r == 1.0, name


def test_frozen_parameters_are_left_out_and_keep_every_bit():
    model = bert()
    for p in model.bert.encoder.layer[0].parameters():
        p.requires_grad_(False)
    compiled = compile_model(model, lr=1e-2)
    held = {id(p) for g in compiled.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    old = copy.deepcopy(model.bert.encoder.layer[0].state_dict())
    for _ in range(3):
        compiled.step(batch(model))
    assert all(torch.equal(old[k], v) for k, v in model.bert.encoder.layer[0].state_dict().items())
    assert len(compiled.optimizer.state) == len(held)
    assert "trainable" in refusal(compile_model, bert().requires_grad_(False))


def test_rows_of_an_embedding_that_no_batch_has_stay():
    model = llama()
    compiled = compile_model(model, optimizer=dict(name="adamw", weight_decay=0.5), lr=1e-2)
    untied = llama(tied=False)
    other = compile_model(untied, optimizer=dict(name="adamw", weight_decay=0.5), lr=1e-2)
    ids = torch.tensor([[3, 4, 5, 6]])
    old = untied.model.embed_tokens.weight.detach().clone()
    other.step(dict(input_ids=ids, labels=ids))
    compiled.step(dict(input_ids=ids, labels=ids))
    moved = (untied.model.embed_tokens.weight != old).any(1).nonzero().flatten().tolist()
    assert set(moved) <= {3, 4, 5, 6}


def test_lora_is_compiled_as_it_is():
    with quiet():
        model = peft.get_peft_model(
            llama(), peft.LoraConfig(target_modules="all-linear", trainable_token_indices=[1, 2])
        )
    groups = parameter_groups(model, 1.0, 0.1)
    held = {id(p): g for g in groups for p in g["params"]}
    assert held.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if "trainable_tokens" in name and p.requires_grad:
            assert held[id(p)]["weight_decay"] == 0
    old = weights(model.get_base_model().model.layers[0].mlp.up_proj.base_layer)
    compile_model(model, optimizer="muon", lr=1e-2).step(batch(llama()))
    assert torch.equal(old, weights(model.get_base_model().model.layers[0].mlp.up_proj.base_layer))


def test_prompt_tuning_puts_places_in_front():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with quiet():
        model = peft.get_peft_model(llama(), config)
    b = batch(llama())
    b["labels"][:, 0] = -100  # peft learns the first token too, which `Trainer` does not count
    compiled = compile_model(model, lr=1e-2)
    assert compiled.loss(b).item() == pytest.approx(model(**b).loss.item(), rel=1e-5)
    compiled.step(b)


# ---------------------------------------------------------------- optimizers


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=6),
    st.floats(-3, 3),
    st.floats(1e-4, 0.5),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.floats(0, 1),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_lion_equals_a_calculation_by_hand_in_float64(grads, start, lr, b1, b2, decay):
    w = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = Lion([w], lr, (b1, b2), decay)
    value, moment = start, 0.0
    for g in grads:
        w.grad = torch.tensor([g], dtype=torch.float64)
        mix = b1 * moment + (1 - b1) * g
        if abs(mix) < 1e-12 and mix != 0:
            return  # its sign hangs on the order of rounding
        optimizer.step()
        value = value - lr * (float(np.sign(mix)) + decay * value)
        moment = b2 * moment + (1 - b2) * g
        assert w.item() == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [llama, t5, bert])
def test_every_optimizer_learns_and_its_state_goes_on(name, make):
    one = compile_model(make(), optimizer=name, lr=1e-2 if name != "sgd" else 0.3, steps=40)
    b = batch(one.model)
    losses = [one.step(b) for _ in range(6)]
    assert losses[-1] < losses[0]
    saved = io.BytesIO()
    torch.save((one.optimizer.state_dict(), one.scheduler.state_dict()), saved)
    saved.seek(0)
    two = compile_model(make(), optimizer=name, lr=1e-2 if name != "sgd" else 0.3, steps=40)
    two.model.load_state_dict(one.model.state_dict())
    for part, state in zip((two.optimizer, two.scheduler), torch.load(saved), strict=True):
        part.load_state_dict(state)
    for _ in range(3):
        one.step(b)
        two.step(b)
    assert torch.equal(weights(one.model), weights(two.model))


def test_muon_takes_the_matrices_inside_the_layers_and_nothing_else():
    model = llama(tied=False)
    optimizer = compile_model(model, optimizer="muon").optimizer
    assert isinstance(optimizer, MuonAdamW)
    inner = {id(p) for g in optimizer.param_groups if g["name"] == "inner" for p in g["params"]}
    expected = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    assert inner == expected
    compile_step = compile_model(model, optimizer=dict(name="muon", layer_decay=0.5), lr=0.1)
    compile_step.step(batch(model))
    state = compile_step.optimizer.state
    for p in model.parameters():
        assert set(state[p]) == (
            {"momentum_buffer"} if id(p) in expected else {"step", "exp_avg", "exp_avg_sq"}
        )


def test_muon_step_is_as_long_as_one_of_adamw():
    model = llama()
    old = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    compiled = compile_model(
        model, optimizer=dict(name="muon", weight_decay=0.0), lr=1e-2, schedule="constant"
    )
    compiled.step(batch(model))
    moved = (model.model.layers[0].mlp.up_proj.weight - old).square().mean().sqrt().item()
    assert moved == pytest.approx(0.2e-2, rel=0.35)  # 0.2: what AdamW's steps measure in training


def test_objects_and_classes_are_taken():
    model = llama()
    own = torch.optim.NAdam(model.parameters(), lr=1e-3)
    assert compile_model(model, optimizer=own).optimizer is own
    assert isinstance(
        compile_model(model, optimizer=torch.optim.NAdam).optimizer, torch.optim.NAdam
    )
    schedule = torch.optim.lr_scheduler.StepLR(own, 3)
    assert compile_model(model, optimizer=own, schedule=schedule).scheduler is schedule
    assert "another optimizer" in refusal(compile_model, model, schedule=schedule)
    assert compile_model(model, schedule=lambda s: 0.5**s).steps is None
    double = lambda outputs, labels, num_items_in_batch=None: (
        2 * Loss("cross-entropy", "causal", {})(outputs, labels, num_items_in_batch)
    )
    b = batch(model)
    twice = compile_model(model, loss=double).loss(b).item()
    assert twice == pytest.approx(2 * compile_model(model).loss(b).item())
    mine = Accuracy()
    assert compile_model(model, metrics=[mine]).metrics == [mine]


# ---------------------------------------------------------------- schedules


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 400), st.floats(0, 0.99), st.floats(0, 1))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_schedules_stay_between_floor_and_one_rise_and_then_never_rise(name, steps, warmup, floor):
    factor = make_schedule(dict(name=name, warmup=warmup, floor=floor), steps)
    values = [factor(s) for s in range(steps)]
    rise = math.ceil(warmup * steps) if warmup else 0
    assert all(0 <= v <= 1 + 1e-12 for v in values) and values[0] > 0
    if rise:
        assert values[:rise] == [(s + 1) / rise for s in range(rise)]
    rest = values[rise:] if name != "slanted" else values[rise + math.ceil(0.1 * (steps - rise)) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rest))
    assert all(v >= floor - 1e-12 for v in values[rise:])
    assert factor(10 * steps) <= values[-1] + 1e-12


def test_schedules_equal_closed_forms():
    for n in (10, 101):
        f = make_schedule("linear", n)
        assert [f(s) for s in range(n)] == pytest.approx([1 - s / n for s in range(n)])
        f = make_schedule("cosine", n)
        closed = [0.5 + 0.5 * math.cos(math.pi * s / n) for s in range(n)]
        assert [f(s) for s in range(n)] == pytest.approx(closed)
        f = make_schedule(dict(name="wsd", decay=0.5), n)
        closed = [1 - math.sqrt(max(0, 2 * s / n - 1)) for s in range(n)]
        assert [f(s) for s in range(n)] == pytest.approx(closed)
    # Howard and Ruder 2018, equation 3, as written there
    steps, cut_frac, ratio = 200, 0.1, 32
    cut = math.floor(steps * cut_frac)
    f = make_schedule(dict(name="slanted", cut=cut_frac, ratio=ratio), steps)
    for t in range(steps):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        assert f(t) == pytest.approx((1 + p * (ratio - 1)) / ratio)


def test_the_rate_of_a_step_is_the_schedules():
    compiled = compile_model(llama(), schedule=dict(name="cosine", warmup=2), lr=1e-3, steps=6)
    factor, b, seen = make_schedule(dict(name="cosine", warmup=2), 6), batch(llama()), []
    for _ in range(6):
        seen.append(compiled.optimizer.param_groups[0]["lr"])
        compiled.step(b)
    assert seen == pytest.approx([1e-3 * factor(s) for s in range(6)])
    assert "steps=" in refusal(compiled.step, b)


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        ("cosin", "cosine"),
        (dict(name="linear", warm=3), "warm"),
        (dict(name="linear", warmup=100), "warmup 100"),
        (dict(name="linear", warmup=-1), "warmup -1"),
        (dict(name="linear", floor=2), "floor 2"),
        (dict(name="wsd", decay=0), "decay 0"),
        (dict(warmup=3), "name"),
        (7, "7"),
    ],
)
def test_schedules_that_are_none_are_refused(choice, word):
    assert word in refusal(compile_model, llama(), schedule=choice, steps=100)


# ---------------------------------------------------------------- metrics


def test_metrics_work_without_a_network(monkeypatch):
    def no(*args, **kwargs):
        raise AssertionError("a metric asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no)
    both = evaluate.combine([METRICS["accuracy"][0](), METRICS["f1"][0](), MCC()])
    for p, r in (([0, 1, 2], [0, 2, 2]), ([1], [1])):
        both.add_batch(predictions=p, references=r)
    found = both.compute()
    assert found["accuracy"] == 0.75 and set(found) == {"accuracy", "f1", "mcc"}
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    tags = SpanF1()
    tags.add(prediction=["B-X", "I-X"], reference=["B-X", "I-X"])
    assert tags.compute() == {"span_f1": 1.0}


@given(
    st.lists(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), max_size=7), min_size=1)
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_spans_are_those_of_a_regular_expression(rows):
    import re

    for row in rows:
        text = "".join({"O": "o", "B-A": "A", "I-A": "a", "B-B": "B", "I-B": "b"}[t] for t in row)
        expected = [(m.group()[0], *m.span()) for m in re.finditer("Aa*|Bb*", text)]
        assert list(module._spans(row)) == expected


def test_span_f1_by_hand_and_empty():
    gold = [["B-X", "I-X", "O"], ["B-X", "O", "B-Y"]]
    guess = [["B-X", "O", "O"], ["B-X", "O", "B-Y"]]
    assert SpanF1().compute(predictions=guess, references=gold)["span_f1"] == pytest.approx(4 / 6)
    assert SpanF1().compute(predictions=[["O"]], references=[["O"]])["span_f1"] == 0


@pytest.mark.parametrize("make", [llama, t5, roberta])
def test_evaluation_of_token_predictions(make):
    model = make().eval()
    names = ["accuracy", "perplexity", "exact-match"]
    compiled = compile_model(model, metrics=names, lr=1e-2)
    b = batch(model)
    for _ in range(5):
        compiled.step(b)
    model.train()
    parts = [{k: v[i : i + 1] for k, v in b.items()} for i in range(4)]
    found = compiled.evaluate(parts)
    assert model.training
    model.eval()
    out = model(**b)
    assert found["loss"] == pytest.approx(out.loss.item(), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(out.loss.item()), rel=1e-4)
    logits, labels = (out.logits, b["labels"])
    if compiled.task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    right, learned = logits.argmax(-1) == labels, labels != -100
    assert found["accuracy"] == pytest.approx(right[learned].float().mean().item())
    assert found["exact_match"] == pytest.approx((right | ~learned).all(1).float().mean().item())
    assert compiled.evaluate(parts) == found  # nothing stays behind


def test_evaluation_of_rows_numbers_spans_and_many_labels():
    many = bert(problem_type="multi_label_classification")
    b = batch(many)
    found = compile_model(many, metrics=["f1", "accuracy", "exact-match"]).evaluate([b, b])
    logits = many.eval()(**b).logits
    same = ((logits > 0) == b["labels"].bool()).all(1).float().mean().item()
    assert found["accuracy"] == found["exact_match"] == pytest.approx(same)
    number = bert(labels=1)
    b = batch(number)
    found = compile_model(number, metrics="mse").evaluate([b])
    assert found["mse"] == pytest.approx(found["loss"], rel=1e-5)
    spans = bert(BertForQuestionAnswering, 2)
    b = batch(spans)
    found = compile_model(spans, metrics=["exact-match", "accuracy"]).evaluate([b])
    assert 0 <= found["exact_match"] <= found["accuracy"] <= 1
    tags = bert(BertForTokenClassification, id2label={0: "O", 1: "B-X", 2: "I-X"})
    assert "span_f1" in compile_model(tags, metrics=["span-f1", "mcc"]).evaluate([batch(tags)])


# ---------------------------------------------------------------- Trainer


def trainer_of(compiled, folder, rows, **more):
    args = TrainingArguments(
        folder,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        train_sampling_strategy="sequential",
        **more,
    )
    return Trainer(**compiled.for_trainer(), args=args, train_dataset=rows, eval_dataset=rows)


def rows_of(b, model=None):
    rows = [{k: v[i] for k, v in b.items()} for i in range(len(b["input_ids"]))]
    if model is not None:
        made = model.prepare_decoder_input_ids_from_labels(labels=b["labels"])
        rows = [row | dict(decoder_input_ids=d) for row, d in zip(rows, made, strict=True)]
    return rows


CHOICES = [
    (llama, dict(optimizer="muon", loss="label-smoothing", metrics=["accuracy", "perplexity"])),
    (t5, dict(optimizer="lion", metrics=["exact-match"])),
    (roberta, dict(optimizer="adafactor", loss="focal", metrics=["accuracy"])),
    (bert, dict(optimizer=dict(name="adamw", layer_decay=0.8), metrics=["f1", "mcc"])),
    (crf_tagger, dict(optimizer="sgd", metrics=["span-f1"])),
    (lambda: bert(labels=1), dict(metrics=["mse"])),
    (lambda: bert(problem_type="multi_label_classification"), dict(metrics=["f1"])),
    (lambda: bert(BertForQuestionAnswering, 2), dict(optimizer="sgd", metrics=["exact-match"])),
]


@pytest.mark.parametrize(("make", "choice"), CHOICES)
def test_trainer_does_what_step_does(make, choice, tmp_path):
    one, two = (compile_model(make(), **choice, lr=1e-3, schedule="cosine", steps=3) for _ in "ab")
    b = batch(one.model, rows=12)
    more = dict(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    if one.task == "questions":  # the model's own loss there: no accumulation in this comparison
        more |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    rows = rows_of(b, one.model if one.task == "seq2seq" else None)
    with quiet():
        trainer = trainer_of(one, tmp_path, rows, per_device_eval_batch_size=5, **more)
        trainer.train()
        theirs = trainer.evaluate()
    for i in range(0, 12, 4):
        two.step([{k: v[j : j + 2] for k, v in b.items()} for j in (i, i + 2)])
    torch.testing.assert_close(weights(one.model), weights(two.model), rtol=1e-3, atol=2e-5)
    ours = one.evaluate([b])
    for key in set(ours) - {"loss"}:
        assert theirs[f"eval_{key}"] == pytest.approx(ours[key], rel=1e-4), key


def test_trainer_and_schedule_must_be_equally_long(tmp_path):
    compiled = compile_model(llama(), steps=5)
    with quiet():
        trainer = trainer_of(compiled, tmp_path, rows_of(batch(llama())), max_steps=4)
        assert "steps=4" in refusal(trainer.train)


def test_trainer_saves_and_resumes_a_muon_run(tmp_path):
    b = rows_of(batch(llama(), rows=12))
    more = dict(max_steps=4, per_device_train_batch_size=2)
    found = []
    for resume in (False, True):
        compiled = compile_model(llama(), optimizer="muon", lr=1e-3, steps=4)
        args = TrainingArguments(
            tmp_path, report_to="none", disable_tqdm=True, use_cpu=True, save_steps=2,
            logging_strategy="no", **more,
        )  # fmt: skip
        with quiet():
            trainer = Trainer(**compiled.for_trainer(), args=args, train_dataset=b)
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        found.append(weights(compiled.model))
    assert torch.equal(*found)


def test_what_trainer_cannot_feed_is_refused():
    assert "by_label" in refusal(compile_model(llama(), loss="weighted").for_trainer)
    spans = bert(BertForQuestionAnswering, 2)
    assert "cross-entropy" in refusal(compile_model(spans, loss="focal").for_trainer)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("make", "choice", "words"),
    [
        (llama, dict(loss="crf"), ("sequences of tags", "next token")),
        (t5, dict(loss="crf"), ("sequences of tags",)),
        (lambda: bert(BertForMaskedLM), dict(loss="bce"), ("classifies a row", "behind masks")),
        (lambda: bert(BertForMaskedLM), dict(loss="mse"), ("numbers",)),
        (bert, dict(loss="bce"), ("yes or no", "one class")),
        (lambda: bert(labels=1), dict(loss="cross-entropy"), ("a number", "mse")),
        (lambda: bert(labels=1), dict(metrics=["span-f1"]), ("spans of tags", "a number", "mse")),
        (bert, dict(metrics=["perplexity"]), ("language models",)),
        (llama, dict(metrics=["mcc"]), ("mcc",)),
        (llama, dict(metrics=["acuracy"]), ("accuracy",)),
        (llama, dict(metrics=[3]), ("3",)),
        (llama, dict(loss="cross-entropi"), ("did you mean cross-entropy",)),
        (llama, dict(loss=dict(name="focal", gama=2)), ("gamma",)),
        (llama, dict(loss=dict(name="focal", gamma=-1)), ("gamma",)),
        (llama, dict(loss=dict(name="label-smoothing", epsilon=1)), ("epsilon",)),
        (llama, dict(loss=dict(name="label-smoothing", epsilon=-0.1)), ("epsilon",)),
        (llama, dict(loss=dict(name="weighted", by_label={1: -2})), ("weight",)),
        (lambda: bert(BertForTokenClassification), dict(loss="crf"), ("no crf",)),
        (crf_tagger, dict(loss="cross-entropy"), ("learn nothing", "crf")),
        (llama, dict(optimizer="adam"), ("did you mean adamw",)),
        (llama, dict(optimizer=dict(name="adamw", beta=(0.9, 0.99))), ("betas",)),
        (llama, dict(optimizer=dict(name="adamw", betas=(2, 0.9))), ("beta",)),
        (llama, dict(optimizer=dict(name="lion", betas=(2, 0.9))), ("betas",)),
        (llama, dict(lr=0), ("lr",)),
        (llama, dict(lr=-1), ("lr",)),
        (llama, dict(lr="fast"), ("fast",)),
        (llama, dict(lr=float("nan")), ("nan",)),
        (llama, dict(optimizer=dict(name="adamw", layer_decay=2)), ("layer_decay",)),
        (llama, dict(optimizer=3), ("3",)),
        (llama, dict(steps=0), ("steps",)),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(make, choice, words):
    text = refusal(compile_model, make(), **choice)
    assert all(word in text for word in words), text


def test_optimizers_of_another_or_an_older_model_are_refused():
    model = llama()
    assert "this model" in refusal(
        compile_model, model, optimizer=torch.optim.AdamW(llama().parameters())
    )
    part = torch.optim.AdamW(model.model.parameters(), lr=1e-3)
    assert compile_model(model, optimizer=part)  # tied: the head is in it
    untied = llama(tied=False)
    part = torch.optim.AdamW(untied.model.parameters(), lr=1e-3)
    assert "lm_head" in refusal(compile_model, untied, optimizer=part)
    assert "leave lr out" in refusal(compile_model, model, optimizer=part, lr=1e-3)
    assert "torch.nn.Module" in refusal(compile_model, "atlas:decoder")


def test_a_loss_that_is_no_number_does_not_reach_the_weights():
    compiled = compile_model(llama(), lr=1e-3)
    b = batch(compiled.model)
    compiled.step(b)
    with torch.no_grad():
        compiled.model.model.norm.weight.fill_(float("inf"))
    old = weights(compiled.model)
    with pytest.raises(NotFinite, match="step 2"):
        compiled.step(b)
    assert torch.equal(old, weights(compiled.model)) and compiled.taken == 1


# ---------------------------------------------------------------- the search for a rate


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_search_leaves_no_trace(name):
    model = bert(BertForMaskedLM)
    compiled = compile_model(model, optimizer=name, lr=1e-3)
    b = batch(model)
    compiled.step(b)
    model.eval()
    old = copy.deepcopy((model.state_dict(), compiled.optimizer.state_dict(), compiled.taken))
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    found = find_rate(compiled, [b], steps=20)
    assert len(found.rates) == len(found.losses) <= 20 and not model.training
    new = model.state_dict(), compiled.optimizer.state_dict(), compiled.taken
    assert all(torch.equal(v, new[0][k]) for k, v in old[0].items())
    assert str(old[1:]) == str(new[1:]) and torch.equal(random, torch.get_rng_state())
    for p, g in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) if g is None else torch.equal(p.grad, g)


def test_the_search_restores_after_an_error_too():
    compiled = compile_model(llama(), lr=1e-3)
    good = batch(compiled.model)
    bad = good | dict(labels=good["labels"] + V)
    old = weights(compiled.model)
    assert "not in 0" in refusal(find_rate, compiled, [good, bad])
    assert torch.equal(old, weights(compiled.model)) and not compiled.optimizer.state


def test_the_search_finds_the_order_of_a_known_best_rate():
    # A bowl of curvature 2: gradient descent is fastest at 0.5 and diverges from 1.0
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((1, 8), 3.0))

        def forward(self, x):
            return dict(logits=self.w.expand(len(x), 8))

    bowl = lambda outputs, labels, num_items_in_batch=None: outputs["logits"][:1].square().sum()
    compiled = compile_model(
        Bowl(), task="regression", loss=bowl, optimizer="sgd", lr=0.1, max_norm=None
    )
    compiled.optimizer.param_groups[0]["momentum"] = 0.0
    found = find_rate(compiled, [dict(x=torch.ones(2, 1), labels=torch.ones(2))], 1e-4, 10, 120)
    assert 0.02 < found.suggestion < 1.0 and len(found.rates) < 120
    assert np.argmin(found.smoothed) > 2


def test_a_lucky_batch_is_no_suggestion():
    rates = np.geomspace(1e-6, 1, 61).tolist()
    losses = [
        6.0 + 0.5 * math.sin(7 * i) - 5 / (1 + 10 ** (-3 - math.log10(r)))
        for i, r in enumerate(rates)
    ]
    mean, smoothed = 0.0, []
    for i, loss in enumerate(losses):
        mean = 0.9 * mean + 0.1 * loss
        smoothed.append(mean / (1 - 0.9 ** (i + 1)))
    assert 1e-4 < module.RateSweep(rates, losses, smoothed).suggestion < 1e-2


def test_searches_that_cannot_be_made_are_refused():
    compiled = compile_model(llama())
    b = batch(compiled.model)
    assert "no batches" in refusal(find_rate, compiled, [])
    assert "low" in refusal(find_rate, compiled, [b], 1.0, 0.1)
    flat = find_rate(compiled, [b], 1e-12, 1e-11, 10)
    flat.losses = flat.smoothed = [1.0 + i for i in range(10)]
    assert "never fell" in refusal(lambda: flat.suggestion)


# ---------------------------------------------------------------- torch.compile


def test_the_compiled_model_is_timed_on_a_copy(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)
    model = llama()
    old = weights(model)
    b = batch(model)
    found = time_torch_compile(model, b, steps=2)
    assert set(found) == {"eager_s", "compiled_s", "first_s", "pays_after"}
    assert torch.equal(old, weights(model)) and all(p.grad is None for p in model.parameters())


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    def broken(model, **kwargs):
        def run(**inputs):
            raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model = llama()
    assert "compiler" in refusal(time_torch_compile, model, batch(model), 1)


def test_every_name_has_an_example_here():
    used = Path(__file__).read_text(encoding="utf-8")
    for name in [*LOSSES, *OPTIMIZERS, *SCHEDULES, *METRICS]:
        assert f'"{name}"' in used, name


def test_label_smoothing_of_torch_is_ours():
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    theirs = F.cross_entropy(x, y, label_smoothing=0.3)
    assert label_smoothing(x, y, 0.3).mean().item() == pytest.approx(theirs.item())

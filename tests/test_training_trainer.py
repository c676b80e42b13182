import copy
import json
import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from instruct_ft.model.adapters import add_lora
from instruct_ft.model.load import load_model
from instruct_ft.settings import InputError
from instruct_ft.tokenization.encode import TEMPLATES, Encoded, encode, stop_ids
from instruct_ft.training import trainer as module
from instruct_ft.training.trainer import (
    InstructTrainer,
    check_encoded,
    collate,
    fine_tune,
    learned_loss,
    micro_batches,
    pick_learning_rate,
)

V = 64
SIZE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)
GPT2 |= dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2)
NEOX = {k: v for k, v in SIZE.items() if k not in ("num_key_value_heads", "head_dim")}
CONFIGS = dict(
    llama=LlamaConfig(**SIZE),
    tied=LlamaConfig(**SIZE, tie_word_embeddings=True),
    gpt2=GPT2Config(**GPT2),
    neox=GPTNeoXConfig(**NEOX),
    softcap=Gemma2Config(**SIZE, final_logit_softcapping=2.0),
    scale=CohereConfig(**SIZE, logit_scale=0.25),
    divided=GraniteConfig(**SIZE, logits_scaling=4.0),
)


def make(kind="llama", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).to(dtype).eval()


def example(length, learned, seed=0):
    g = torch.Generator().manual_seed(seed * 1000 + length)
    ids = torch.randint(3, V, (length,), generator=g).tolist()
    return Encoded(ids, [0] * (length - learned) + [1] * learned, [])


def examples(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(4, 40, (n,), generator=g).tolist()
    return [example(s, 1 + (7 * i) % (s - 2), i) for i, s in enumerate(sizes)]


def textbook(model, batch):
    "All logits, shifted by one, mean over the labels"
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def gradients(model):
    out = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


def oracle(model, rows):
    "One example at a time, unpadded; sum over learned tokens by their number in all rows"
    n = sum(sum(e.loss_mask[1:]) for e in rows)
    for e in rows:
        logits = model(torch.tensor([e.input_ids])).logits[0, :-1]
        targets = torch.tensor(e.input_ids[1:])
        learned = torch.tensor(e.loss_mask[1:], dtype=torch.bool)
        (F.cross_entropy(logits[learned], targets[learned], reduction="sum") / n).backward()
    return gradients(model)


def apart(a, b):
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def arguments(tmp_path, rows, accumulate=1, **other):
    chosen = dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0)
    chosen |= dict(per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate)
    chosen |= dict(num_train_epochs=1, save_strategy="no", report_to="none", use_cpu=True)
    chosen |= dict(disable_tqdm=True, logging_steps=1, logging_nan_inf_filter=False)
    return TrainingArguments(str(tmp_path / "out"), **chosen | other)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- collate ---------------------------------------------------------------------------------


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=9), min_size=1
    ),
    st.integers(0, 9),
)
def test_labels_come_from_the_mask_alone(rows, pad_id):
    encoded = [Encoded([i for i, _ in r], [int(m) for _, m in r], []) for r in rows]
    batch = collate(encoded, pad_id)
    for i, e in enumerate(encoded):
        n = len(e)
        assert batch["input_ids"][i, :n].tolist() == e.input_ids
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["labels"].shape[1] - n)
        wanted = [t if m else -100 for t, m in zip(e.input_ids, e.loss_mask, strict=True)]
        assert batch["labels"][i, :n].tolist() == wanted
        assert (batch["labels"][i, n:] == -100).all() and (
            batch["input_ids"][i, n:] == pad_id
        ).all()
    assert {v.dtype for v in batch.values()} == {torch.int64}


def test_the_end_token_keeps_its_label_when_it_is_also_the_padding():
    batch = collate([Encoded([5, 6, 2], [0, 1, 1], []), Encoded([5, 2], [0, 1], [])], pad_id=2)
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]


# --- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_learned_loss_and_gradients_are_those_of_all_logits(kind):
    model, batch = make(kind), collate(examples(5))
    plain = textbook(model, batch)
    plain.backward()
    wanted = gradients(model)
    total, n = learned_loss(model, batch)
    (total / n).backward()
    assert abs((total / n - plain).item()) < 1e-12
    assert apart(gradients(model), wanted) < 1e-12


@pytest.mark.parametrize("kind", ["llama", "gpt2", "softcap"])
def test_logits_are_made_only_where_something_is_learned(kind, monkeypatch):
    model, batch, seen = make(kind), collate(examples(5)), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda m, inputs, out: seen.append(out.numel() // V))
    _, n = learned_loss(model, batch)
    assert seen == [n]
    monkeypatch.setattr(module, "_selects", lambda kind: False)  # a model that cannot select
    slow, _ = learned_loss(model, batch)
    assert seen[1] == batch["input_ids"].numel()
    assert abs((slow - learned_loss(model, batch)[0]).item()) < 1e-12


def test_learned_loss_with_an_adapter_and_with_virtual_tokens():
    batch = collate(examples(4))
    model = add_lora(make(), rank=2, train_tokens=[2, 5])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    total, n = learned_loss(model, batch)
    assert abs((total / n - textbook(model, batch)).item()) < 1e-6  # the adapter is in float32
    prompted = get_peft_model(
        make(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    total, n = learned_loss(prompted, batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = prompted(**inputs).logits[:, 3:-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")
    assert abs((total - wanted).item()) < 1e-9


def test_a_batch_without_labels_has_a_loss_of_zero_that_can_be_differentiated():
    model = make()
    total, n = learned_loss(model, collate([Encoded([3, 4, 5], [0, 0, 0], [])]))
    total.backward()
    assert (total.item(), n) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_half_precision_logits_are_summed_in_single():
    model = make(dtype=torch.bfloat16)
    total, _ = learned_loss(model, collate(examples(3)))
    assert total.dtype == torch.float32 and total.isfinite()


# --- micro-batches ---------------------------------------------------------------------------


def cost(groups, lengths, overhead):
    return sum(len(g) * max(lengths[i] for i in g) + overhead for g in groups)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 150), st.integers(0, 60)
)
def test_micro_batches_hold_every_row_once_and_cost_the_least(lengths, max_tokens, overhead):
    groups = micro_batches(lengths, max_tokens, overhead)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    sizes = [(len(g), len(g) * max(lengths[i] for i in g)) for g in groups]
    assert all(n == 1 or tokens <= max_tokens for n, tokens in sizes)
    ordered, best = sorted(lengths, reverse=True), math.inf
    for cuts in range(2 ** (len(ordered) - 1)):
        tried = [[0]]
        for i in range(1, len(ordered)):
            if cuts >> (i - 1) & 1:
                tried.append([i])
            else:
                tried[-1].append(i)
        if all(len(g) == 1 or len(g) * ordered[g[0]] <= max_tokens for g in tried):
            best = min(best, cost(tried, ordered, overhead))
    assert cost(groups, lengths, overhead) == best


def test_micro_batches_of_nothing_and_of_many():
    assert micro_batches([]) == []
    groups = micro_batches([i % 90 + 1 for i in range(600)], 1000)
    assert sorted(i for g in groups for i in g) == list(range(600))


# --- the step --------------------------------------------------------------------------------

SPLITS = [
    (12, 1, 10**6),
    (6, 2, 10**6),
    (4, 3, 60),
    (3, 4, 1),
    (1, 12, 10**6),
    (12, 1, 1),
    (12, 1, 75),
]


@pytest.mark.parametrize(("kind", "eps"), [("llama", 1e-10), ("gpt2", 1e-10), ("softcap", 1e-7)])
def test_accumulation_by_any_factor_gives_the_gradient_of_one_at_a_time(kind, eps, tmp_path):
    model, rows = make(kind), examples(12)  # Gemma's norms compute in single precision
    wanted = oracle(model, rows)
    for batch, accumulate, micro in SPLITS:
        tuned = copy.deepcopy(model)
        trainer = InstructTrainer(
            tuned, arguments(tmp_path, batch, accumulate), rows, micro_tokens=micro
        )
        trainer.train()
        old, new = dict(model.named_parameters()), dict(tuned.named_parameters())
        moved = {n: (old[n] - new[n]).detach() for n in wanted}
        assert apart(moved, wanted) < eps, (batch, accumulate, micro)
        assert trainer.seen.tolist() == [sum(map(len, rows)), sum(sum(e.loss_mask) for e in rows)]


def test_the_last_step_of_an_epoch_is_normalised_by_what_is_in_it(tmp_path):
    rows, ends = examples(13), []
    for batch, accumulate in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        model = make()
        InstructTrainer(model, arguments(tmp_path, batch, accumulate), rows).train()
        ends.append(weights(model))
    assert max(float((w - ends[0]).abs().max()) for w in ends) < 1e-10


class Rows(TrainerCallback):
    "The conversations of every step, in the order in which they were read"

    def __init__(self):
        self.steps, self.now, self.trainer = [], [], None

    def on_substep_end(self, *args, **kwargs):
        self.now += self.trainer.last_rows.tolist()

    def on_step_end(self, *args, **kwargs):
        self.on_substep_end()
        self.steps.append(sorted(self.now))
        self.now = []


def steps_of(tmp_path, batch, accumulate, micro, seed, kind="llama", epochs=2):
    seen = Rows()
    args = arguments(tmp_path, batch, accumulate, seed=seed, num_train_epochs=epochs)
    trainer = InstructTrainer(
        make(kind, torch.float32), args, examples(21), micro_tokens=micro, callbacks=[seen]
    )
    seen.trainer = trainer
    torch.rand(17)  # other random numbers in between change nothing
    trainer.train()
    return seen.steps


def test_a_step_is_a_fixed_list_of_conversations(tmp_path):
    wanted = steps_of(tmp_path, 8, 1, 10**6, seed=1)
    assert [len(s) for s in wanted] == [8, 8, 5] * 2
    assert sorted(i for s in wanted[:3] for i in s) == list(range(21))
    assert wanted[:3] != wanted[3:]
    for batch, accumulate, micro, kind in [
        (8, 1, 1, "llama"),
        (4, 2, 50, "gpt2"),
        (1, 8, 9, "llama"),
    ]:
        assert steps_of(tmp_path, batch, accumulate, micro, 1, kind) == wanted
    assert steps_of(tmp_path, 8, 1, 10**6, seed=2) != wanted


def test_validation_loss_is_by_token_and_not_by_batch(tmp_path):
    model, rows = make(), examples(11)
    wanted = textbook(model, collate(rows)).item()
    for size, micro in [(4, 10**6), (11, 30), (1, 1)]:
        args = arguments(tmp_path, 4, per_device_eval_batch_size=size)
        trainer = InstructTrainer(model, args, rows, dict(a=rows, b=rows[:3]), micro_tokens=micro)
        found = trainer.evaluate()
        assert abs(found["eval_a_loss"] - wanted) < 1e-9
        assert abs(trainer.evaluate(rows)["eval_loss"] - wanted) < 1e-9


def test_the_ways_of_trainer_still_work(tmp_path):
    rows, batch = examples(6), collate(examples(6))
    model = make(dtype=torch.float32)

    def half(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return 0.5 * summed / num_items_in_batch

    for how in [dict(compute_loss_func=half), {}]:
        trainer = InstructTrainer(copy.deepcopy(model), arguments(tmp_path, 6), rows, **how)
        trainer.train()
        factor = 0.5 if how else 1
        loss = trainer.state.log_history[0]["loss"]
        assert abs(loss - factor * textbook(model, batch).item()) < 1e-4
    accuracy = []
    trainer = InstructTrainer(
        model,
        arguments(tmp_path, 6, per_device_eval_batch_size=6),
        rows,
        rows,
        compute_metrics=lambda p: accuracy.append(p.predictions.shape) or dict(a=1.0),
    )
    found = trainer.evaluate()
    assert found["eval_a"] == 1.0 and accuracy == [(6, batch["labels"].shape[1], V)]
    assert abs(found["eval_loss"] - textbook(model, batch).item()) < 1e-5


TWO = """
import sys; sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import torch, test_training_trainer as t
folder, rows, model = Path(sys.argv[3]), t.examples(12), t.make()
args = t.arguments(folder, 3, 2, ddp_backend="gloo", ddp_find_unused_parameters=False)
assert args.world_size == 2
trainer = t.InstructTrainer(model, args, rows, rows, micro_tokens=40)
trainer.train()
loss = trainer.evaluate()["eval_loss"]
torch.save([t.weights(model), loss], folder / f"{args.process_index}.pt")
"""


def test_two_processes_give_the_gradient_of_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    here = Path(__file__).resolve().parent
    command = [sys.executable, tmp_path / "two.py", here, here.parent, tmp_path]
    where |= dict(os.environ, OMP_NUM_THREADS="1", WORLD_SIZE="2")
    ranks = [dict(where, RANK=r, LOCAL_RANK=r) for r in "01"]
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for env in ranks]
    errors = [p.communicate(timeout=300)[1].decode()[-2000:] for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    model, rows = make(), examples(12)
    InstructTrainer(model, arguments(tmp_path, 12), rows).train()
    for r in "01":
        found, loss = torch.load(tmp_path / f"{r}.pt")
        assert float((found - weights(model)).abs().max()) < 1e-10
        assert abs(loss - textbook(model, collate(rows)).item()) < 1e-9


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "training set has no conversation"),
        (
            [example(5, 2), Encoded([3, 4, 5], [0, 0, 0], [])],
            "Conversation 2 of 2 .* no token to learn",
        ),
        ([Encoded([3], [1], [])], "Conversation 1 of 1 .* no token to learn"),
        ([Encoded([3, V], [0, 1], [])], f"token id {V}, and the model's ids end at {V - 1}"),
        ([Encoded([-1, 3], [0, 1], [])], "token id -1"),
        ([Encoded([3, 4], [0, 1, 1], [])], "2 tokens and a loss mask for 3"),
        ([example(65, 3)], "has 65 tokens, and the model reads 64 at most; lower max_length"),
    ],
)
def test_bad_data_is_refused_before_the_first_step(bad, said, tmp_path):
    model = make(dtype=torch.float32)
    before = weights(model)
    with pytest.raises(InputError, match=said):
        check_encoded(bad, model)
    with pytest.raises(InputError, match=said):
        InstructTrainer(model, arguments(tmp_path, 2), bad)
    with pytest.raises(InputError, match=said):
        fine_tune(model, TOKENIZER, bad, progress=False, method="lora")
    if bad:  # a set without validation is no fault
        with pytest.raises(InputError, match=said.replace("training", "validation")):
            fine_tune(model, TOKENIZER, examples(2), bad, progress=False)
    assert torch.equal(before, weights(model)) and type(model).__name__ == "LlamaForCausalLM"


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(tmp_path):
    model, rows = make(dtype=torch.float32), examples(6)
    rows[3].input_ids[0] = 63
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = math.nan
    others = [i for i, e in enumerate(rows) if 63 in e.input_ids and i != 3]
    rows = [e for i, e in enumerate(rows) if i not in others]
    trainer = InstructTrainer(model, arguments(tmp_path, 6), rows, micro_tokens=1)
    before = weights(model)
    number = 1 + next(i for i, e in enumerate(rows) if 63 in e.input_ids)
    said = rf"Step 1: the loss is nan, with conversations {number} of the training set; lower learning_rate \(now 1\)"
    with pytest.raises(InputError, match=said):
        trainer.train()
    assert torch.equal(before.nan_to_num(), weights(model).nan_to_num())


def test_a_gradient_that_is_no_number_stops_the_run_before_a_weight_moves(tmp_path):
    model = make(dtype=torch.float32)
    model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    before = weights(model)
    trainer = InstructTrainer(model, arguments(tmp_path, 6, max_grad_norm=1.0), examples(6))
    with pytest.raises(InputError, match="Step 1: the gradient's norm is (nan|inf)"):
        trainer.train()
    assert torch.equal(before, weights(model))


# --- fine_tune and Run -----------------------------------------------------------------------


def tokenizer(template=TEMPLATES["chatml"].jinja, size=V):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    how = dict(vocab_size=size, special_tokens=control, show_progress=False)
    tok.train_from_iterator(["user assistant abcdefghij hot cold"], trainers.BpeTrainer(**how))
    names = dict(pad_token=control[0], eos_token=control[2], chat_template=template)
    return PreTrainedTokenizerFast(tokenizer_object=tok, **names)


TOKENIZER = tokenizer()
WORDS = ["hot", "cold", "user", "fed", "bad", "head", "ice", "jade"]
ROWS = [
    dict(id=str(i), messages=[dict(role="user", content=a), dict(role="assistant", content=b)])
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:3])
]
QUICK = dict(epochs=1, batch_size=8, progress=False, learning_rate=1e-2)


def tune(model=None, rows=ROWS, **how):
    model = make(dtype=torch.float32) if model is None else model
    return fine_tune(model, TOKENIZER, rows, **QUICK | how)


def test_a_run_says_what_it_took(tmp_path):
    run = tune(validation=ROWS[:5], epochs=2)
    encoded = [encode(r["messages"], TOKENIZER) for r in ROWS]
    assert run.tokens == 2 * sum(map(len, encoded))
    assert run.learned_tokens == 2 * sum(sum(e.loss_mask) for e in encoded)
    assert run.trainable_parameters == sum(p.numel() for p in run.model.parameters())
    assert [s for s, _ in run.curve()] == list(range(1, 7))
    assert [s for s, _ in run.curve("eval_loss")] == [0, 3, 6]
    assert run.curve("eval_loss")[-1][1] < run.curve("eval_loss")[0][1]
    assert [len(s.kept) for s in run.set_aside] == [len(ROWS), 5]
    assert not run.model.training and run.seconds > 0
    assert "6 steps" in repr(run) and "eval_loss" in repr(run)
    direct = tune(rows=encoded, validation=[])
    assert not direct.curve("eval_loss")
    assert torch.equal(weights(direct.model), weights(tune().model))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_seed_gives_identical_weights_and_another_does_not(method):
    ends = []
    for before, seed in [(5, 42), (6, 42), (5, 1)]:
        model = make(dtype=torch.float32)
        torch.manual_seed(before)  # what was drawn earlier has no part in it
        ends.append(weights(tune(model, method=method, seed=seed).model))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_lora_trains_the_adapter_and_the_control_tokens_alone():
    model = make("tied", torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = tune(model, method="lora", lora_rank=2)
    base = {
        n.replace(".base_layer", ""): p for n, p in run.model.get_base_model().named_parameters()
    }
    same = [n for n in before if n in base and torch.equal(before[n], base[n])]
    assert len(same) == len([n for n in before if n in base]) >= 18
    assert run.trainable_parameters < sum(p.numel() for p in run.model.parameters()) / 4
    table = run.model.get_input_embeddings()
    ids = torch.arange(V)
    moved = (table(ids) != before["model.embed_tokens.weight"]).any(1).nonzero().flatten().tolist()
    assert moved == [1, 2]  # <|im_start|>, <|im_end|>; the padding does not occur


def test_the_step_size_is_chosen_by_size_and_method():
    rates = [pick_learning_rate(n) for n in (1e6, 1e8, 5e8, 1e9, 7e10)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 5e-4 and rates[-1] == 2e-5
    assert all(pick_learning_rate(n, "lora") > pick_learning_rate(n) for n in (1e6, 1e8, 1e10))
    run = tune(learning_rate="auto", lr_scheduler_type="constant", warmup_steps=0)
    assert {lr for _, lr in run.curve("lr")} == {5e-4} and run.settings["learning_rate"] == 5e-4


def test_schedules_and_other_arguments_reach_the_trainer():
    cosine = tune(lr_scheduler_type="cosine", warmup_steps=0, epochs=4).curve("lr")
    wanted = [1e-2 * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]
    assert [lr for _, lr in cosine] == pytest.approx(wanted)
    assert tune(weight_decay=0.5).settings["weight_decay"] == 0.5
    assert tune().settings["weight_decay"] == 0.0
    with pytest.raises(TypeError, match="no_such_argument"):
        tune(no_such_argument=1)


def test_half_precision_weights_are_trained_in_single():
    full = tune(make(dtype=torch.float16), learning_rate=1e-6)
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert (full.curve("loss")[0][1] > 0) and full.curve("grad_norm")[0][1] > 0
    lora = tune(make(dtype=torch.bfloat16), method="lora")
    kinds = {p.requires_grad: p.dtype for p in lora.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_frozen_weights_stay_and_a_model_of_frozen_weights_is_refused():
    model = make(dtype=torch.float32)
    model.model.embed_tokens.requires_grad_(False)
    before = model.model.embed_tokens.weight.detach().clone()
    run = tune(model)
    assert torch.equal(before, run.model.model.embed_tokens.weight)
    with pytest.raises(InputError, match="No weight of the model is trainable"):
        tune(make(dtype=torch.float32).requires_grad_(False))
    with pytest.raises(InputError, match="method 'qlora' is unknown; give full or lora"):
        tune(method="qlora")


def test_rows_that_cannot_be_learned_are_kept_aside_and_all_of_them_is_an_error():
    silent = dict(id="s", messages=[dict(role="user", content="hot")])
    run = tune(rows=[silent, *ROWS])
    assert [r["id"] for r in run.set_aside[0].dropped] == ["s"]
    with pytest.raises(
        InputError, match="training set has no conversation that can be learned from: 1"
    ):
        tune(rows=[silent])


def test_nothing_is_printed_and_nothing_is_left_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = tune(validation=ROWS[:3], method="lora")
    run.save(tmp_path / "run")
    run.save(tmp_path / "merged", merged=True)
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "run"]


def test_the_bar_shows_in_the_terminal_and_closes_when_the_run_stops(capfd, monkeypatch):
    shown = partial(module.tqdm, disable=False)  # TQDM_DISABLE may be set around the tests
    monkeypatch.setattr(module, "tqdm", shown)
    tune(progress=True)
    shown = capfd.readouterr()
    assert "fine-tuning: 100%" in shown.err and "3/3" in shown.err and not shown.out
    with pytest.raises(InputError, match="Step"):
        tune(progress=True, learning_rate=1e30, max_grad_norm=0, epochs=9)
    assert capfd.readouterr().err.count("\n") == 1


def files(folder):
    return {p.name for p in folder.iterdir()}


def test_a_saved_run_comes_back_the_same(tmp_path):
    run = tune(out=tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= files(folder)
    assert not [n for n in files(folder) if n.endswith((".bin", ".pt"))]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(weights(model), weights(run.model))
    assert model.config.use_cache is True
    tok = AutoTokenizer.from_pretrained(folder)
    assert encode(ROWS[0]["messages"], tok) == encode(ROWS[0]["messages"], TOKENIZER)
    config = GenerationConfig.from_pretrained(folder)
    assert config.eos_token_id == stop_ids(TOKENIZER) == [2] and config.pad_token_id == 0
    facts = json.loads((folder / "training.json").read_text())
    assert facts["history"] == run.history and facts["settings"]["method"] == "full"


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_an_adapter_is_saved_alone_or_merged_and_read_back(kind, tmp_path):
    make(kind, torch.float32).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model, tok = load_model(tmp_path / "base", device="cpu")
    run = fine_tune(model, tok, ROWS, **QUICK | dict(method="lora"))
    run.save(tmp_path / "adapter")
    run.save(tmp_path / "merged", merged=True)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files(tmp_path / "adapter")
    assert not {"model.safetensors", "README.md"} & files(tmp_path / "adapter")
    assert "adapter_config.json" not in files(tmp_path / "merged")
    ids = torch.tensor([encode(ROWS[0]["messages"], TOKENIZER).input_ids])
    with torch.no_grad():
        wanted, base = run.model(ids).logits, make(kind, torch.float32)(ids).logits
        assert float((wanted - base).abs().max()) > 1e-3
        for name in ("adapter", "merged"):
            again, tok = load_model(tmp_path / name, device="cpu")
            assert float((again(ids).logits - wanted).abs().max()) < 1e-4
            assert stop_ids(tok) == [2]
        assert torch.equal(run.model(ids).logits, wanted)  # the run is as it was
    assert any("lora_A" in name for name, _ in run.model.named_parameters())


def test_the_template_that_was_trained_with_is_saved(tmp_path):
    bare = tokenizer(template=None)
    talk = [dict(role="user", content="a"), dict(role="assistant", content="b")]
    model = make(dtype=torch.float32)
    run = fine_tune(model, bare, [dict(messages=talk)], **QUICK | dict(template="plain"))
    run.save(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(talk, again).input_ids == encode(talk, bare, "plain").input_ids
    assert bare.chat_template is None


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 30), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_any_cut_of_any_batch_has_the_loss_of_one_at_a_time(sizes, micro):
    model = _MODEL
    rows = [example(n, min(k, n - 1), i) for i, (n, k) in enumerate(sizes)]
    batch = collate(rows) | dict(rows=torch.arange(len(rows)))
    parts = list(module._cut(batch, micro))
    assert sorted(i for p in parts for i in p["rows"].tolist()) == list(range(len(rows)))
    with torch.no_grad():
        found = sum(
            float(learned_loss(model, {k: v for k, v in p.items() if k != "rows"})[0])
            for p in parts
        )
        alone = sum(float(learned_loss(model, collate([e]))[0]) for e in rows)
    assert abs(found - alone) < 1e-9


_MODEL = make()


# --- weights ---------------------------------------------------------------------------------


def weigh(e, weight):
    return Encoded(e.input_ids, [0, *(m or weight for m in e.loss_mask[1:])], [])


def weighted_oracle(model, rows):
    "One at a time: sum of weight times loss, by the sum of the weights of all rows"
    total = sum(sum(e.loss_mask[1:]) for e in rows)
    for e in rows:
        logits = model(torch.tensor([e.input_ids])).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(e.input_ids[1:]), reduction="none")
        (losses @ torch.tensor(e.loss_mask[1:], dtype=losses.dtype) / total).backward()
    return gradients(model)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_with_weights_is_the_weighted_mean_however_it_is_cut(tmp_path, accumulate):
    rows = [weigh(e, 0.25) if i % 3 else e for i, e in enumerate(examples(12))]
    wanted = weighted_oracle(make(), rows)
    model = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = arguments(tmp_path, 12 // accumulate, accumulate)
    InstructTrainer(model, args, rows, micro_tokens=60).train()
    step = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    assert apart(step, wanted) < 1e-10
    assert apart(wanted, weighted_oracle(make(), [weigh(e, 1) for e in rows])) > 1e-4


def test_weights_of_0_and_1_are_a_mask_and_weighted_validation_is_a_mean(tmp_path):
    rows = examples(6)
    assert collate([weigh(e, 0.0) for e in rows]).keys() == collate(rows).keys()
    some = [weigh(e, 0.1) for e in rows]
    trainer = InstructTrainer(make(), arguments(tmp_path, 3), rows, some, micro_tokens=50)
    total, n = learned_loss(trainer.model, collate(some))
    assert n == pytest.approx(sum(map(sum, (e.loss_mask for e in some))))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total.item() / n)
    smooth = arguments(tmp_path, 3, label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="prompt_weight"):
        InstructTrainer(make(), smooth, some).train()

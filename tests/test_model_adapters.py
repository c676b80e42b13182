"""Adapters on models of four families: what learns, what stays, and that merging changes nothing."""

import copy
import json
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
)

from instruct_ft.model.adapters import (
    METHODS,
    add_adapter,
    add_lora,
    linear_layers,
    load_adapter,
    logits_by_row,
    lora_plus_groups,
    merge_adapter,
    save_adapter,
    use_adapter,
)
from instruct_ft.model.load import model_card, quiet
from instruct_ft.settings import InputError

V = 64
IDS = torch.arange(64).reshape(2, 32)
FAMILIES = [(kind, tied) for kind in ("llama", "gpt2") for tied in (True, False)]


def base_model(kind="llama", tied=True):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=40,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=2,
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def learn(model, steps=5, rate=1e-2):
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tables(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ";" in text, text
    return text


# ---------------------------------------------------------------- what learns


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_an_untrained_adapter_is_the_base_bit_for_bit(kind, tied):
    model = base_model(kind, tied)
    before = logits(model)
    tuned = add_lora(model, train_tokens=[1, 2])
    assert isinstance(tuned, peft.PeftModel)
    assert torch.equal(logits(tuned.eval()), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_quiet(kind, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(add_lora(base_model(kind), train_tokens=[1]))
    assert capfd.readouterr() == ("", "")


@settings(max_examples=10, deadline=None)
@given(rank=st.integers(1, 12), width=st.sampled_from([16, 32]))
def test_trained_parameters_are_rank_times_in_plus_out(rank, width):
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    body = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    want = sum(rank * (m.in_features + m.out_features) for m in body)
    tuned = add_lora(model, rank=rank)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == want
    assert all("lora_" in n for n, p in tuned.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (4, 0.5), (16, 2.0)])
def test_alpha_is_twice_the_rank_unless_given(alpha, scale):
    tuned = add_lora(base_model(), rank=8, alpha=alpha)
    layer = tuned.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == scale


def test_a_layer_equals_the_formula():
    tuned = learn(add_lora(base_model(), rank=3, alpha=7))
    layer = tuned.base_model.model.model.layers[1].mlp.down_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, 64)
    want = x @ layer.base_layer.weight.T + 7 / 3 * (x @ A.T) @ B.T
    assert A.shape == (3, 64) and B.abs().max() > 0
    torch.testing.assert_close(layer(x), want)


def test_chosen_layers_only():
    tuned = add_lora(base_model(), target_modules=["q_proj", "v_proj"])
    names = {
        n.split(".lora_")[0].split(".")[-1] for n, p in tuned.named_parameters() if "lora" in n
    }
    assert names == {"q_proj", "v_proj"}


# ---------------------------------------------------------------- control tokens


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_without_train_tokens_every_row_is_bitwise_unchanged(kind, tied):
    model = base_model(kind, tied)
    old = [t.detach().clone() for t in tables(model)]
    merged = merge_adapter(learn(add_lora(model)))
    assert all(torch.equal(a, b) for a, b in zip(old, tables(merged), strict=True))


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
@pytest.mark.parametrize("tokens", [[5], [2, 1, 2], (0, 63)])
def test_with_train_tokens_exactly_their_rows_change(kind, tied, tokens):
    model = base_model(kind, tied)
    old = [t.detach().clone() for t in tables(model)]
    merged = merge_adapter(learn(add_lora(model, train_tokens=tokens)))
    for a, b in zip(old, tables(merged), strict=True):
        assert (a != b).any(1).nonzero().flatten().tolist() == sorted(set(tokens))
    assert (tables(merged)[0] is tables(merged)[1]) == tied
    assert merged.config.tie_word_embeddings == tied


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_saved_and_loaded_it_answers_the_same(kind, tied, tmp_path):
    model = base_model(kind, tied)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    tuned = learn(add_lora(model, train_tokens=[1, 2]))
    want = logits(tuned)
    with quiet():
        tuned.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(base_model(kind, tied), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), want)
    merged = merge_adapter(tuned)
    with quiet():
        merged.save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(plain), logits(merged))
    torch.testing.assert_close(logits(plain), want)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_merged_logits_are_those_of_the_adapter(kind, tied):
    tuned = learn(add_lora(base_model(kind, tied), train_tokens=[1, 2]), steps=20)
    before = logits(tuned)
    assert (before - logits(base_model(kind, tied))).abs().max() > 0.1
    merged = merge_adapter(tuned)
    assert not isinstance(merged, peft.PeftModel)
    assert not any("lora" in n for n, _ in merged.named_modules())
    assert (logits(merged) - before).abs().max() < 2e-6 * max(1, before.abs().max())
    assert all(p.requires_grad for p in merged.parameters())


def test_merged_weights_equal_the_formula():
    tuned = learn(add_lora(base_model(), rank=4))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    want = (layer.base_layer.weight + 2 * B @ A).detach().clone()
    merged = merge_adapter(tuned)
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, want)


def test_an_untrained_adapter_merges_to_the_base():
    merged = merge_adapter(add_lora(base_model(), train_tokens=[3]))
    assert torch.equal(logits(merged), logits(base_model()))


def test_dropout_and_mode_do_not_disturb_the_check():
    tuned = learn(add_lora(base_model(), dropout=0.5)).train()
    merged = merge_adapter(tuned)
    assert merged.training


def weaken(tuned, spread=1e-3):
    torch.manual_seed(1)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=spread)
    return tuned.eval()


def test_a_merge_that_loses_the_adapter_is_refused_and_taken_back():
    tuned = weaken(add_lora(base_model().bfloat16()))
    before = logits(tuned)
    text = refusal(merge_adapter, tuned)
    assert "bfloat16 loses" in text and 'dtype="float32"' in text
    assert isinstance(tuned, peft.PeftModel)
    assert not any(getattr(m, "merged", False) is True for m in tuned.modules())
    assert (logits(tuned) - before).abs().max() < 0.02
    assert merge_adapter(tuned, tolerance=1.0) is not None


def test_float32_passes_where_bfloat16_does_not():
    assert merge_adapter(weaken(add_lora(base_model())), tolerance=1e-3) is not None


def test_a_wrong_merge_is_caught(monkeypatch):
    "The check must see a merge that goes wrong, whatever the reason"
    from peft.tuners.lora.layer import Linear

    tuned = learn(add_lora(base_model()))
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: right(self, name) * 1.05)
    refusal(merge_adapter, tuned)


def test_a_wrong_row_is_caught(monkeypatch):
    "Trained rows are in the probe"
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    tuned = learn(add_lora(base_model(), target_modules=["q_proj"], train_tokens=[5]))
    monkeypatch.setattr(TrainableTokensLayer, "merge", lambda self, *a, **k: None)
    refusal(merge_adapter, tuned)


def test_the_probe_holds_the_trained_tokens_and_fits_the_positions():
    from instruct_ft.model.adapters import _probe

    config = LlamaConfig(
        vocab_size=50_000,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    for tied in (True, False):
        config.tie_word_embeddings = tied
        ids = _probe(add_lora(LlamaForCausalLM(config), train_tokens=[31_337, 49_999]))["input_ids"]
        assert ids.shape == (4, 10)
        assert all({31_337, 49_999} <= set(row) for row in ids.tolist())


def test_an_adapter_that_diverged_is_refused_and_the_base_kept_clean():
    tuned = add_lora(base_model())
    layer = tuned.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_B["default"].weight.data.fill_(float("nan"))
    assert "not finite" in refusal(merge_adapter, tuned)
    assert layer.base_layer.weight.isfinite().all()


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("settings_", "word"),
    [
        (dict(target_modules=["query"]), "q_proj"),
        (dict(target_modules=[]), "layers here"),
        (dict(rank=0), "rank 0"),
        (dict(rank=2.5), "rank 2.5"),
        (dict(dropout=1.0), "dropout 1.0"),
        (dict(train_tokens=[V]), f"id {V} has no row among the {V}"),
        (dict(train_tokens=[-1]), "id -1"),
    ],
)
def test_settings_that_do_not_fit(settings_, word):
    model = base_model()
    state = copy.deepcopy(model.state_dict())
    assert word in refusal(add_lora, model, **settings_)
    assert state.keys() == model.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_one_adapter_at_a_time():
    tuned = add_lora(base_model())
    assert "merge_adapter(model)" in refusal(add_lora, tuned)
    assert "no adapter" in refusal(merge_adapter, base_model())


def test_prompts_cannot_be_merged():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with quiet():
        tuned = peft.get_peft_model(base_model(), config)
    assert "PROMPT_TUNING cannot be merged" in refusal(merge_adapter, tuned)


def test_a_merged_model_takes_a_new_adapter():
    merged = merge_adapter(learn(add_lora(base_model())))
    again = learn(add_lora(merged, rank=4))
    assert merge_adapter(again) is not None


# ---------------------------------------------------------------- every family


def make(kind, **more):
    "A small model of a family, the same at each call"
    torch.manual_seed(0)
    name = kind.__name__
    size = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    size |= dict(num_attention_heads=4)
    if name.startswith("Bert"):
        config = BertConfig(**size, max_position_embeddings=40, **more)
    elif name.startswith("Roberta"):
        config = RobertaConfig(**size, max_position_embeddings=42, **more)
    elif name.startswith("Llama"):
        config = LlamaConfig(**size, bos_token_id=0, eos_token_id=2, pad_token_id=0, **more)
    elif name.startswith("GPT2"):
        ends = dict(bos_token_id=0, eos_token_id=2, pad_token_id=2)
        config = GPT2Config(
            vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=40, **ends, **more
        )
    else:
        config = T5Config(vocab_size=V, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
    with quiet():
        return kind(config).eval()


ROWS = torch.randint(3, V, (4, 12), generator=torch.Generator().manual_seed(5))
ROWS[:, -1] = 1  # the end, which a T5 classifier wants to see
TASKS = [
    BertForSequenceClassification,
    RobertaForSequenceClassification,
    LlamaForCausalLM,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
]
OTHERS = [
    BertForMaskedLM,
    BertForTokenClassification,
    BertForQuestionAnswering,
    RobertaForTokenClassification,
    LlamaForSequenceClassification,
    GPT2ForSequenceClassification,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5ForQuestionAnswering,
]
LORAS = ("lora", "rslora", "dora", "pissa")


def batch(model):
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    if "SequenceClassification" in name:
        return dict(input_ids=ROWS, labels=torch.tensor([0, 1, 0, 1]))
    if "TokenClassification" in name:
        return dict(input_ids=ROWS, labels=ROWS % 2)
    if "QuestionAnswering" in name:
        more = dict(decoder_input_ids=ROWS) if "T5" in name else {}
        spans = dict(start_positions=torch.arange(4), end_positions=torch.arange(1, 5))
        return dict(input_ids=ROWS) | spans | more
    return dict(input_ids=ROWS, labels=ROWS)


def train(model, steps=2, rate=1e-2, decay=0.0):
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=decay)
    for _ in range(steps):
        model(**batch(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def out(model):
    found = model(**batch(model))
    found = found["start_logits"] if "start_logits" in found else found["logits"]
    return found[:, -12:] if found.ndim == 3 else found


@pytest.mark.parametrize("kind", TASKS + OTHERS)
def test_the_body_gets_lora_and_a_head_learns_whole(kind):
    model = make(kind)
    layers = linear_layers(model)
    tuned = add_adapter(model, rank=2)
    core = tuned.get_base_model()
    assert linear_layers(tuned) == layers  # an adapter hides no layer and adds none
    assert all(hasattr(core.get_submodule(name), "lora_A") for name in layers)
    learning = {n for n, p in tuned.named_parameters() if p.requires_grad}
    heads = {n for n in learning if "lora_" not in n}
    assert all("modules_to_save" in n for n in heads)
    assert bool(heads) == (core.get_output_embeddings() is None)
    assert not any("modules_to_save" in n and "lora_" in n for n in learning)
    train(tuned)
    assert all(p.grad is None for p in tuned.parameters())  # zero_grad sets them to None
    tuned(**batch(tuned)).loss.backward()
    assert [n for n, p in tuned.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_body_without_a_task_has_no_head():
    tuned = add_adapter(make(BertModel), rank=2)
    assert all("lora_" in n for n, p in tuned.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_g20_peft_round_trips_agree(kind, method, tmp_path):
    "Saved and loaded bit for bit; merged, and taken back, within 1e-5"
    tuned = train(add_adapter(make(kind), method, rank=4, virtual_tokens=3)).eval()
    want = out(tuned)
    place = save_adapter(tuned, tmp_path)
    fresh = make(kind)
    for name, p in fresh.named_parameters():  # a head comes from the folder
        if name.startswith("classifier"):
            p.data.normal_()
    assert torch.equal(out(load_adapter(fresh, place)), want)
    if method in (*LORAS, "ia3"):
        with quiet():
            tuned.merge_adapter()
            assert (out(tuned) - want).abs().max() < 1e-5
            tuned.unmerge_adapter()
        assert (out(tuned) - want).abs().max() < 1e-5
        plain = merge_adapter(tuned)
        assert (out(plain) - want).abs().max() < 1e-5
        plain.save_pretrained(tmp_path / "merged")
        with quiet():
            again = kind.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(out(again), out(plain))
    else:
        assert "cannot be merged" in refusal(merge_adapter, tuned)


@pytest.mark.parametrize("kind", OTHERS)
def test_g20_lora_round_trips_on_every_head(kind, tmp_path):
    tuned = train(add_adapter(make(kind), rank=2)).eval()
    want = out(tuned)
    fresh = make(kind)
    for name in {n.split(".")[0] for n, _ in fresh.named_parameters()}:
        if name in ("classifier", "score", "qa_outputs", "classification_head"):
            for p in fresh.get_submodule(name).parameters():
                p.data.normal_()
    assert torch.equal(out(load_adapter(fresh, save_adapter(tuned, tmp_path))), want)
    assert (out(merge_adapter(tuned)) - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "tied"),
    [(k, True) for k in TASKS] + [(LlamaForCausalLM, False), (GPT2LMHeadModel, False)],
)
def test_g11_added_tokens_train_exactly_their_rows(kind, tied, tmp_path):
    "Resized on both sides, tie kept, old rows bit-equal after steps with decay; reload and merge"
    more = {} if kind is T5ForConditionalGeneration else dict(tie_word_embeddings=tied)
    model = make(kind, **more)
    with quiet():
        model.resize_token_embeddings(V + 2)
    model.save_pretrained(tmp_path / "base")
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = [t for t in tables if t is not None]
    assert {t.weight.shape[0] for t in tables} == {V + 2}
    old = [t.weight.detach().clone() for t in tables]
    tuned = add_adapter(model, rank=2, train_tokens=[V, V + 1])
    data = batch(tuned)
    data["input_ids"] = data["input_ids"].clone()
    data["input_ids"][:, 0], data["input_ids"][:, 1] = V, V + 1
    optimizer = torch.optim.AdamW(
        [p for p in tuned.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    for _ in range(3):
        tuned(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = out(tuned.eval())
    with quiet():
        fresh = kind.from_pretrained(tmp_path / "base").eval()
    again = load_adapter(fresh, save_adapter(tuned, tmp_path / "adapter"))
    assert torch.equal(out(again), want)
    plain = merge_adapter(tuned)
    assert (out(plain) - want).abs().max() < 1e-5 * max(1, want.abs().max())
    tables = [t for t in (plain.get_input_embeddings(), plain.get_output_embeddings()) if t]
    for before, table in zip(old, tables, strict=True):
        assert (before != table.weight).any(1).nonzero().flatten().tolist() == [V, V + 1]
    if len(tables) == 2:
        assert (tables[0].weight is tables[1].weight) == tied


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (BertForMaskedLM, "has a bias"),
        (T5ForSequenceClassification, "encoder.embed_tokens"),
        (T5ForTokenClassification, "encoder.embed_tokens"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_g11_rows_that_peft_would_lose_are_refused_and_nothing_is_changed(kind, word, method):
    model = make(kind)
    state = copy.deepcopy(model.state_dict())
    assert word in refusal(add_adapter, model, method, rank=2, train_tokens=[5])
    now = model.state_dict()
    assert state.keys() == now.keys()
    assert all(torch.equal(now[k], state[k]) for k in state)
    assert all(p.requires_grad for p in model.parameters())
    assert add_adapter(model, method, rank=2) is not None


def test_s3_peft_still_loses_the_bias_of_a_head():
    "When this fails, peft has been mended and the refusal can go"
    model = make(BertForMaskedLM)
    model.cls.predictions.decoder.bias.data.fill_(1.0)
    before = out(model)
    names = {"bert.embeddings.word_embeddings": [5]}
    config = peft.LoraConfig(target_modules=["query"], trainable_token_indices=names)
    with quiet():
        assert (out(peft.get_peft_model(model, config).eval()) - before).abs().max() > 0.9


# ---------------------------------------------------------------- formulas


def test_a_layer_by_hand_equals_peft_in_outputs_and_gradients():
    torch.manual_seed(0)
    linear = nn.Linear(6, 4).double()
    A, B = torch.randn(2, 6).double(), torch.randn(4, 2).double()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config).double()
    side = theirs.base_model.model[0]
    side.lora_A["default"].weight.data, side.lora_B["default"].weight.data = A.clone(), B.clone()
    A.requires_grad_()
    B.requires_grad_()
    x, y = (torch.ones(3, 6).double().cumsum(0).requires_grad_() for _ in range(2))
    ours = linear(x) + 4 * (x @ A.T) @ B.T
    torch.testing.assert_close(ours, theirs(y), rtol=0, atol=1e-12)
    ours.square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(A.grad, side.lora_A["default"].weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B.grad, side.lora_B["default"].weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", LORAS)
def test_each_lora_equals_its_formula(method):
    tuned = train(add_adapter(make(LlamaForCausalLM), method, rank=4, alpha=8))
    layer = tuned.base_model.model.model.layers[1].mlp.down_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    W = layer.base_layer.weight + (4.0 if method == "rslora" else 2.0) * B @ A
    if method == "dora":
        length = layer.lora_magnitude_vector["default"].weight
        W = length[:, None] * W / W.norm(dim=1, keepdim=True)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ W.T, rtol=1e-4, atol=1e-5)


def test_pissa_starts_at_the_base_with_its_largest_singular_values():
    model = make(LlamaForCausalLM)
    W = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    before = out(model)
    tuned = add_adapter(model, "pissa", rank=3).eval()
    assert (out(tuned) - before).abs().max() < 1e-5
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    share = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    s = torch.linalg.svdvals(W)
    torch.testing.assert_close(torch.linalg.svdvals(share)[:3], s[:3], rtol=1e-4, atol=1e-5)
    with tuned.disable_adapter():
        assert (out(tuned) - before).abs().max() > 1e-3


def test_lora_plus_is_that_of_peft():
    def after(groups):
        tuned = add_lora(make(LlamaForCausalLM), rank=2)
        optimizer = groups(tuned)
        for _ in range(3):
            tuned(**batch(tuned)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in tuned.parameters() if p.requires_grad])

    ours = after(lambda m: torch.optim.AdamW(lora_plus_groups(m, 1e-3, 8), weight_decay=0.0))
    theirs = after(
        lambda m: create_loraplus_optimizer(m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    )
    assert torch.equal(ours, theirs)


def test_lora_plus_puts_every_trained_weight_in_one_group():
    tuned = add_adapter(make(BertForSequenceClassification), "dora", rank=2)
    groups = lora_plus_groups(tuned, 1e-3, 4, weight_decay=0.1)
    names = {id(p): n for n, p in tuned.named_parameters()}
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in tuned.parameters() if p.requires_grad)
    for group in groups:
        fast = {".lora_B." in names[id(p)] for p in group["params"]}
        assert fast == {group["lr"] == 4e-3}
        flat = {p.ndim <= 1 for p in group["params"]}
        assert flat == {group["weight_decay"] == 0.0}


# ---------------------------------------------------------------- several on one base


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "pissa"])
def test_a_mixed_batch_is_one_at_a_time(kind, method):
    tuned = make(kind)
    for i, name in enumerate(("north", "south")):
        tuned = add_adapter(tuned, method, rank=4, virtual_tokens=3, name=name)
        train(tuned, steps=1 + i, rate=0.05)
    tuned.train()
    alone = {n: out(use_adapter(tuned, n).eval()) for n in ("north", "south")}
    alone[None] = out(make(kind))
    use_adapter(tuned, "north").train()
    names = ["south", None, "north", "south"]
    got = logits_by_row(tuned, names, **batch(tuned))
    got = got[:, -12:] if got.ndim == 3 else got
    want = torch.stack([alone[name][i] for i, name in enumerate(names)])
    assert (got - want).abs().max() < 1e-5
    assert (alone["north"] - alone["south"]).abs().max() > 1e-4
    assert tuned.active_adapter == "north" and tuned.training


def test_a_mixed_batch_with_rows_of_tokens(tmp_path):
    for tied in (True, False):
        tuned = make(LlamaForCausalLM, tie_word_embeddings=tied)
        for name, token in (("north", 5), ("south", 6)):
            tuned = train(add_adapter(tuned, rank=2, train_tokens=[token], name=name), rate=0.1)
        alone = {n: out(use_adapter(tuned, n).eval()) for n in ("north", "south")}
        got = logits_by_row(tuned, ["north", "south"], input_ids=ROWS[:2])
        assert (got[0] - alone["north"][0]).abs().max() < 1e-5
        assert (got[1] - alone["south"][1]).abs().max() < 1e-5
        again = make(LlamaForCausalLM, tie_word_embeddings=tied)
        for name in alone:
            folder = save_adapter(tuned, tmp_path / str(tied), name)
            again = load_adapter(again, folder, name)
        for name, want in alone.items():
            assert torch.equal(out(use_adapter(again, name)), want)


def test_only_the_chosen_adapter_learns():
    tuned = add_adapter(add_adapter(make(LlamaForCausalLM), rank=2, name="north"), name="south")
    for name in ("north", "south"):
        use_adapter(tuned, name)
        learning = [n for n, p in tuned.named_parameters() if p.requires_grad]
        assert learning and all(f".{name}." in n for n in learning)


def test_span_models_by_row():
    tuned = make(BertForQuestionAnswering)
    for name in ("north", "south"):
        tuned = train(add_adapter(tuned, rank=2, name=name), rate=0.1)
    got = logits_by_row(tuned, ["north", "south"], input_ids=ROWS[:2])
    assert got.shape == (2, 12, 2)
    use_adapter(tuned, "north").eval()
    assert (got[0, :, 0] - out(tuned)[0]).abs().max() < 1e-5


# ---------------------------------------------------------------- the right base


def saved(tmp_path, kind=LlamaForCausalLM, **how):
    return save_adapter(train(add_adapter(make(kind), rank=2, **how)), tmp_path / "adapter")


@pytest.mark.parametrize("part", ["model.layers.1.mlp.up_proj", "model.norm", "lm_head"])
def test_another_base_of_the_same_shape_is_refused(tmp_path, part):
    place = saved(tmp_path)
    other = make(LlamaForCausalLM)
    other.get_submodule(part).weight.data.mul_(1.01)
    state = copy.deepcopy(other.state_dict())
    text = refusal(load_adapter, other, place)
    assert (
        "another base" in text
        and part.replace("lm_head", "model.embed_tokens") in text
        or part == "lm_head"
    )
    assert state.keys() == other.state_dict().keys()


def test_the_base_may_be_loaded_in_half_precision(tmp_path):
    for method in ("lora", "pissa"):
        place = saved(tmp_path / method, method=method)
        assert load_adapter(make(LlamaForCausalLM).bfloat16(), place) is not None


def test_a_folder_of_peft_loads_without_samples(tmp_path):
    tuned = train(add_lora(make(LlamaForCausalLM), rank=2)).eval()
    with quiet():
        tuned.save_pretrained(tmp_path)
    assert torch.equal(out(load_adapter(make(LlamaForCausalLM), tmp_path)), out(tuned))
    fits = make(LlamaForCausalLM, num_key_value_heads=2)
    assert "do not fit" in refusal(load_adapter, fits, tmp_path)
    assert all(p.requires_grad for p in fits.parameters()) and linear_layers(fits)
    assert not any("lora" in n for n, _ in fits.named_modules())


def test_a_broken_folder_is_told(tmp_path):
    place = saved(tmp_path)
    refusal(load_adapter, make(LlamaForCausalLM), tmp_path)
    config = (place / "adapter_config.json").read_text()
    (place / "adapter_config.json").write_text("{")
    assert "cannot be read" in refusal(load_adapter, make(LlamaForCausalLM), place)
    (place / "adapter_config.json").write_text(json.dumps(json.loads(config) | {"peft_type": "NO"}))
    assert "cannot be read" in refusal(load_adapter, make(LlamaForCausalLM), place)
    (place / "adapter_config.json").write_text(config)
    weights = place / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "bytes" in refusal(load_adapter, make(LlamaForCausalLM), place)


# ---------------------------------------------------------------- what does not fit, for methods


@pytest.mark.parametrize(
    ("kind", "how", "word"),
    [
        (LlamaForCausalLM, dict(method="lorra"), "rslora"),
        (LlamaForCausalLM, dict(method="lora+"), "lora_plus_groups"),
        (LlamaForCausalLM, dict(target_modules=["q_proj", "query"]), "called query"),
        (LlamaForCausalLM, dict(target_modules=["lm_head"]), "called lm_head"),
        (LlamaForCausalLM, dict(target_modules=["embed_tokens"]), "called embed_tokens"),
        (LlamaForCausalLM, dict(target_modules="(q_proj"), "called (q_proj"),
        (LlamaForCausalLM, dict(alpha=0), "alpha 0"),
        (LlamaForCausalLM, dict(method="pissa", rank=33), "32 singular values"),
        (LlamaForCausalLM, dict(method="prefix", virtual_tokens=0), "0 virtual"),
        (LlamaForCausalLM, dict(method="prompt", virtual_tokens=1 << 20), "virtual tokens"),
        (LlamaForCausalLM, dict(method="ia3", target_modules=["q_proj"]), "chooses its layers"),
        (LlamaForCausalLM, dict(method="prefix", train_tokens=[3]), "no rows of tokens"),
        (LlamaForCausalLM, dict(name="q_proj"), "part of the model"),
        (LlamaForCausalLM, dict(name="a.b"), "letters"),
        (LlamaForCausalLM, dict(name=""), "letters"),
        (LlamaForCausalLM, dict(name="lora_A"), "letters"),
        (BertForMaskedLM, dict(method="prefix"), "BertForMaskedLM"),
        (BertForTokenClassification, dict(method="prompt"), "not its labels"),
        (BertForQuestionAnswering, dict(method="p-tuning"), "not its labels"),
        (T5ForTokenClassification, dict(method="prefix"), "no place"),
        (T5ForSequenceClassification, dict(method="prompt"), "classification_head"),
    ],
)
def test_what_does_not_fit_is_told_and_changes_nothing(kind, how, word):
    model = make(kind)
    state = list(model.state_dict())
    assert word in refusal(add_adapter, model, **how)
    assert state == list(model.state_dict()) and all(p.requires_grad for p in model.parameters())


def test_what_cannot_stand_beside_another_is_told():
    tuned = add_adapter(make(LlamaForCausalLM), rank=2, name="north")
    card = model_card(tuned)
    for how, word in [
        (dict(name="north"), "called north"),
        (dict(name="south", method="ia3"), "another kind"),
        (dict(name="south", method="pissa"), "pissa changes"),
        (dict(name="south", train_tokens=[5]), "all or none"),
    ]:
        assert word in refusal(add_adapter, tuned, **how)
    assert model_card(tuned) == card
    assert "pissa changes" in refusal(
        add_adapter, add_adapter(make(LlamaForCausalLM), "pissa", rank=2), name="south"
    )
    both = add_adapter(tuned, rank=2, name="south")
    assert "would lose north" in refusal(merge_adapter, both)
    both.delete_adapter("north")
    assert merge_adapter(both) is not None


def test_questions_by_row_that_cannot_be_answered():
    tuned = add_adapter(make(LlamaForCausalLM), rank=2, name="north")
    ids = dict(input_ids=ROWS)
    assert "east" in refusal(use_adapter, tuned, "east")
    assert "east" in refusal(logits_by_row, tuned, ["east"] * 4, **ids)
    assert "1 adapters for 4" in refusal(logits_by_row, tuned, ["north"], **ids)
    assert "no adapter" in refusal(save_adapter, tuned, "nowhere")
    with quiet():
        tuned.merge_adapter()
    assert "merged" in refusal(logits_by_row, tuned, ["north"] * 4, **ids)
    assert "merged" in refusal(save_adapter, tuned, "nowhere", "north")
    pissa = add_adapter(make(LlamaForCausalLM), "pissa", rank=2)
    assert "pissa" in refusal(logits_by_row, pissa, [None] * 4, **ids)
    frozen = add_lora(make(LlamaForCausalLM)).requires_grad_(False)
    assert "no B" in refusal(lora_plus_groups, frozen, 1e-3)
    assert "ratio 0.5" in refusal(lora_plus_groups, add_lora(make(LlamaForCausalLM)), 1e-3, 0.5)

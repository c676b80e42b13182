"""LoRA on a model: what learns, what stays, and that merging changes nothing."""

import copy
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from instruct_ft.model.adapters import add_lora, merge_adapter
from instruct_ft.model.load import quiet
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
        ids = _probe(add_lora(LlamaForCausalLM(config), train_tokens=[31_337, 49_999]))
        assert ids.shape == (4, 12)
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

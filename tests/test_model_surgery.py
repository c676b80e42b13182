"""Change the structure of a model: what stays equal, what comes back from disk, what is refused."""

import copy
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForTokenClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from instruct_ft.atlas.tokenizers import family_tokenizer
from instruct_ft.model.load import quiet
from instruct_ft.model.surgery import (
    add_layers,
    angular_distance,
    keep_layers,
    pick_layers,
    replace_vocabulary,
    resize_positions,
    set_dropout,
    widen,
)
from instruct_ft.settings import InputError
from instruct_ft.tokenization.special_tokens import disagreements

V = 96
IDS = torch.randint(2, V, (2, 12), generator=torch.Generator().manual_seed(0))
SIZE = dict(vocab_size=V, num_hidden_layers=4, num_attention_heads=4, hidden_size=32)
MORE = SIZE | dict(intermediate_size=48, max_position_embeddings=40)
ENDS = dict(bos_token_id=0, eos_token_id=None, pad_token_id=0)
ROTARY = MORE | ENDS | dict(num_key_value_heads=2, tie_word_embeddings=True)
KINDS = {
    "bert": (BertForMaskedLM, BertConfig, MORE),
    "roberta": (RobertaForMaskedLM, RobertaConfig, MORE),
    "llama": (LlamaForCausalLM, LlamaConfig, ROTARY),
    "mistral": (MistralForCausalLM, MistralConfig, ROTARY),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, ROTARY),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, ROTARY | dict(head_dim=16)),
    "gpt2": (GPT2LMHeadModel, GPT2Config, SIZE | ENDS | dict(n_positions=40)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        dict(vocab_size=V, d_model=32, num_layers=4, num_decoder_layers=4, num_heads=4)
        | dict(d_kv=8, d_ff=48, decoder_start_token_id=0, eos_token_id=None),
    ),
}
ROTARY_KINDS = ("llama", "mistral", "qwen2", "qwen3")
DECODERS = (*ROTARY_KINDS, "gpt2", "t5")
TIES = [(kind, tied) for kind in KINDS for tied in (True, False)]


def make(kind, head=None, **changes):
    "A model with random weights; norms and biases are no longer 1 and 0"
    torch.manual_seed(0)
    cls, config, size = KINDS[kind]
    model = (head or cls)(config(**size | changes))
    for p in model.parameters():
        p.data = p.data * (1 if kind == "t5" else 3) if p.ndim > 1 else p.data
        p.data += 0.3 * torch.randn_like(p) if p.ndim == 1 else 0
    if kind == "t5" and changes.get("tie_word_embeddings") is False:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(1).clone())
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS):
    more = {"decoder_input_ids": ids[:, :7]} if hasattr(model, "decoder") else {}
    return model(input_ids=ids, **more)[0]


def reloaded(model, folder):
    with quiet():
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=model.dtype).eval()


def generated(model, cached):
    with quiet():
        how = dict(max_new_tokens=6, do_sample=False, use_cache=cached)
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), **how).tolist()


def relative(new, old):
    return ((new - old).abs().max() / old.abs().max()).item()


def parts_of(kind):
    return ("encoder", "decoder") if kind == "t5" else (None,)


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ";" in text, text
    return text


@pytest.fixture
def exact_norms(monkeypatch):
    "RMS norms compute in float32 whatever the model's dtype; here in the model's own"

    def forward(self, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * scale)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(T5LayerNorm, "forward", forward)


# ---------------------------------------------------------------- guarantee 20, in its own words


@pytest.mark.parametrize("kind", KINDS)
def test_g20_depth_up_preserves_the_function(kind, tmp_path):
    model = make(kind)
    before = logits(model)
    for part in parts_of(kind):
        deeper = add_layers(model, [0, 2, 2, 4], part)
        assert relative(logits(deeper), before) < 1e-6
        assert logits(reloaded(deeper, tmp_path)).equal(logits(deeper))


@pytest.mark.parametrize(("kind", "tied"), TIES)
def test_g20_ffn_widening_preserves_the_function(kind, tied, tmp_path):
    model = make(kind, tie_word_embeddings=tied)
    wider = widen(model, feed_forward=150)
    assert relative(logits(wider), logits(model)) < 1e-5
    assert logits(reloaded(wider, tmp_path)).equal(logits(wider))


@pytest.mark.parametrize("kind", DECODERS)
def test_g20_dropped_layers_keep_cached_equal_to_uncached_generation(kind):
    for part in parts_of(kind):
        for layers in ([1, 2, 3], [3, 0], [0, 1, 1, 2, 2, 3]):
            kept = keep_layers(make(kind), layers, part)
            assert generated(kept, True) == generated(kept, False)


def test_g20_t5_keeps_its_position_bias():
    model = make("t5")
    for part in ("encoder", "decoder"):
        for changed in (keep_layers(model, [2, 1], part), add_layers(model, [0], part)):
            old, new = (m.get_submodule(part).block for m in (model, changed))
            bias = [m for m in new.modules() if hasattr(m, "relative_attention_bias")]
            assert bias == [new[0].layer[0].SelfAttention]
            table = old[0].layer[0].SelfAttention.relative_attention_bias.weight
            assert bias[0].relative_attention_bias.weight.equal(table)
    first, last = (keep_layers(model, [3], "encoder").encoder(x)[0] for x in (IDS, IDS.flip(1)))
    assert (first - last.flip(1)).abs().max() > 0.01  # order still means something


@pytest.mark.parametrize("kind", KINDS)
def test_g20_save_and_reload_agree(kind, tmp_path):
    model = make(kind)
    part = parts_of(kind)[-1]
    changed = [
        keep_layers(model, [2, 0, 0], part),
        widen(model, hidden=64),
        set_dropout(model, 0.2),
    ]
    changed += [resize_positions(model, 60)] if kind != "t5" else []
    changed += [widen(model, heads=8)] if kind in (*ROTARY_KINDS, "t5") else []
    for i, new in enumerate(changed):
        again = reloaded(new, tmp_path / str(i))
        assert logits(again).equal(logits(new))
        one, two = again.config.to_dict(), new.config.to_dict()
        told = {key for key in one if one[key] != two.get(key)}
        assert told <= {"_name_or_path", "architectures", "dtype", "transformers_version"}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_g20_peft_round_trip_agrees(kind):
    new = widen(keep_layers(make(kind), [0, 2], parts_of(kind)[-1]), hidden=64)
    before = logits(new)
    targets = {"bert": ["query"], "llama": ["q_proj"], "gpt2": ["c_attn"], "t5": ["q"]}[kind]
    with quiet():
        tuned = peft.get_peft_model(new, peft.LoraConfig(r=2, target_modules=targets))
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
        adapted = logits(tuned.base_model.model)
        assert (adapted - before).abs().max() > 1e-3
        assert "merge" in refusal(keep_layers, tuned, [0], parts_of(kind)[-1])
        merged = tuned.merge_and_unload()
    assert relative(logits(merged), adapted) < 1e-5
    assert relative(logits(keep_layers(merged, [0, 1], parts_of(kind)[-1])), adapted) < 1e-5


# ---------------------------------------------------------------- the traps of surgery


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "t5"])
def test_layer_numbers_are_renumbered(kind):
    kept = keep_layers(make(kind), [3, 1, 1])
    numbers = {m.layer_idx for m in kept.modules() if hasattr(m, "layer_idx")}
    assert numbers == {0, 1, 2} and kept.config.num_hidden_layers == 3


def test_t5_with_more_decoder_than_encoder_layers_generates(tmp_path):
    for model in (keep_layers(make("t5"), [0], "encoder"), add_layers(make("t5"), [4], "decoder")):
        again = reloaded(model, tmp_path)
        assert generated(again, True) == generated(again, False) == generated(model, True)


def test_layers_keep_their_kind_of_attention():
    model = make("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    kept = keep_layers(model, [3, 0, 2])
    assert kept.config.layer_types == [model.config.layer_types[i] for i in (3, 0, 2)]
    assert kept.model.layers[0].self_attn.sliding_window == 4
    assert relative(logits(add_layers(model, [0, 3])), logits(model)) < 1e-6


def test_layers_whose_function_hangs_on_their_number_stay():
    model = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert "scale_attn" in refusal(keep_layers, model, [1, 0])
    assert "scale_attn" in refusal(add_layers, model, [1])


@pytest.mark.parametrize(("kind", "tied"), TIES)
def test_ties_are_kept_as_they_are_in_memory(kind, tied):
    model = make(kind, tie_word_embeddings=tied)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    for new in (keep_layers(model, [0, 1], parts_of(kind)[-1]), widen(model, hidden=64)):
        one = new.get_output_embeddings().weight is new.get_input_embeddings().weight
        assert one == (head.weight is table.weight) == tied
        assert new.num_parameters() == sum(p.numel() for p in set(new.parameters()))


def test_the_model_given_stays_as_it_is_and_shares_nothing():
    for kind in KINDS:
        model = make(kind)
        before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
        new = [keep_layers(model, [0, 0], parts_of(kind)[-1]), set_dropout(model, 0.1)]
        new += [add_layers(model, [1], parts_of(kind)[-1]), widen(model, hidden=64)]
        for changed in new:
            assert all(p.requires_grad for p in changed.parameters())
            for p in changed.parameters():
                p.data.add_(1)
        after = model.state_dict()
        assert all(after[name].equal(w) for name, w in before.items())
        assert model.config.to_dict() == config


def test_mode_precision_and_generation_settings_come_along():
    model = make("llama").bfloat16().train()
    model.generation_config.max_new_tokens = 3
    kept = keep_layers(model, [1])
    assert kept.training and kept.dtype == torch.bfloat16
    assert kept.generation_config.max_new_tokens == 3


# ---------------------------------------------------------------- keep and add, against an oracle


def test_kept_layers_are_applied_in_the_order_given():
    model = make("gpt2")
    body = model.transformer
    with torch.no_grad():
        h = body.wte(IDS) + body.wpe(torch.arange(12))
        for i in (3, 1, 1):
            h = body.h[i](h)
        oracle = model.lm_head(body.ln_f(h))
    assert relative(logits(keep_layers(model, [3, 1, 1])), oracle) < 1e-6


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.sampled_from(["bert", "llama"]))
def test_keep_layers_composes(layers, kind):
    model = make(kind)
    once = keep_layers(model, layers)
    again = keep_layers(once, range(len(layers)))
    assert logits(again).equal(logits(once))
    assert logits(keep_layers(model, [0, 1, 2, 3])).equal(logits(model))


def test_added_layers_learn_from_the_first_step():
    for kind, name in (("llama", "o_proj"), ("bert", "output.dense"), ("gpt2", "c_proj")):
        grown = add_layers(make(kind), [4])
        grown(input_ids=IDS, labels=IDS).loss.backward()
        _, layers = max(
            ((n, m) for n, m in grown.named_modules() if isinstance(m, nn.ModuleList)),
            key=lambda item: len(item[1]),
        )
        silent = [m for n, m in layers[4].named_modules() if n.endswith(name)]
        assert silent and all(m.weight.abs().max() == 0 < m.weight.grad.norm() for m in silent)


def test_models_with_a_head_without_one_and_without_a_pooler():
    for model in (
        make("bert", BertForSequenceClassification, num_labels=3),
        make("roberta", RobertaForTokenClassification, num_labels=3),
        make("llama", LlamaForSequenceClassification, num_labels=3),
        make("t5", T5EncoderModel),
        make("bert", BertModel),
        BertModel(BertConfig(**MORE), add_pooling_layer=False).eval(),
    ):
        before = logits(model)
        for same in (add_layers(model, [1]), widen(model, hidden=64, feed_forward=60)):
            after = logits(same)
            assert relative(after[..., : before.shape[-1]], before) < 1e-5
        assert logits(keep_layers(model, [0])).isfinite().all()


# ---------------------------------------------------------------- angular distance


def test_angular_distance_equals_a_plain_computation_and_leaves_padding_out():
    model = make("llama").train()
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[1, 8:] = 0
    found = angular_distance(model, [dict(input_ids=ids, attention_mask=mask)])
    assert model.training
    with torch.no_grad():
        model.eval()
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[:4]
    for i, j in ((0, 1), (1, 3), (0, 3)):
        angles = []
        for b in range(2):
            for t in range(12 if b == 0 else 8):
                x, y = states[i][b, t].double(), states[j][b, t].double()
                angles.append(math.acos(float(x @ y / x.norm() / y.norm())) / math.pi)
        assert abs(found[i, j] - sum(angles) / len(angles)) < 1e-6
    assert found.shape == (5, 5) and torch.allclose(found, found.T)
    assert not found.diagonal().any()


def test_angular_distance_of_both_stacks_of_t5_and_over_batches():
    model = make("t5")
    labels = IDS[:, :7].clone()
    labels[1, 4:] = -100
    batch = dict(input_ids=IDS, labels=labels)
    for part in ("encoder", "decoder"):
        found = angular_distance(model, [batch], part)
        assert found.shape == (5, 5) and (found[0, 1:] > 0).all() and (found <= 1).all()
        assert torch.allclose(found, angular_distance(model, [batch, batch], part))
    assert "no token" in refusal(angular_distance, model, [], "encoder")


def test_pick_layers_leaves_out_the_run_that_turns_least():
    model = make("gpt2")
    for i in (1, 2):
        for p in [*model.transformer.h[i].attn.c_proj.parameters()] + [
            *model.transformer.h[i].mlp.c_proj.parameters()
        ]:
            p.data.zero_()
    found = angular_distance(model, [{"input_ids": IDS}])
    assert pick_layers(found, 2) == [0, 3] and pick_layers(found, 4) == [0, 1, 2, 3]
    assert relative(logits(keep_layers(model, [0, 3])), logits(model)) < 1e-6
    assert "0 of 4" in refusal(pick_layers, found, 0)
    assert "5 of 4" in refusal(pick_layers, found, 5)


# ---------------------------------------------------------------- widening


SIDES = [dict(hidden=64), dict(hidden=96), dict(feed_forward=131), dict(heads=8), dict(heads=16)]


@pytest.mark.parametrize(("kind", "tied"), TIES)
def test_widening_is_exact_in_float64_and_1e5_in_float32(kind, tied, exact_norms):
    model = make(kind, tie_word_embeddings=tied)
    exact = copy.deepcopy(model).double()
    sides = [s for s in SIDES if "heads" not in s or kind in (*ROTARY_KINDS, "t5")]
    for side in sides:
        assert relative(logits(widen(model, **side)), logits(model)) < 1e-5, side
        if kind not in ("mistral", "qwen2", "qwen3"):  # their norms are classes of their own
            assert relative(logits(widen(exact, **side)), logits(exact)) < 1e-10, side


@pytest.mark.parametrize("kind", ROTARY_KINDS)
@pytest.mark.parametrize(("groups", "heads", "then"), [(1, 8, 1), (2, 16, 2), (4, 8, 8)])
def test_heads_widen_with_and_without_shared_key_heads(kind, groups, heads, then, tmp_path):
    model = make(kind, num_key_value_heads=groups)
    wider = widen(model, heads=heads)
    assert wider.config.num_key_value_heads == then
    assert relative(logits(wider), logits(model)) < 1e-5
    assert logits(reloaded(wider, tmp_path)).equal(logits(wider))
    assert generated(wider, True) == generated(model, True)


def test_t5_with_a_gated_feed_forward_part_and_an_untied_head(tmp_path):
    model = make("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    wider = widen(model, hidden=64, feed_forward=100, heads=6)
    assert relative(logits(wider), logits(model)) < 1e-5
    assert logits(reloaded(wider, tmp_path)).equal(logits(wider))


def test_gpt2_keeps_its_feed_forward_size_and_its_blocks_of_q_k_v():
    model = make("gpt2")
    wider = widen(model, hidden=64)
    assert wider.config.n_inner == 128 and wider.config.n_head == 8
    old, new = (m.transformer.h[0].attn.c_attn.bias for m in (model, wider))
    q, k, v = old.split(32)
    assert new.equal(torch.cat([q, q, k, k, v, v]))


def test_copies_share_evenly_without_noise_and_unevenly_with_it():
    model = make("llama")
    down = model.model.layers[0].mlp.down_proj.weight
    even, uneven = (widen(model, feed_forward=96, noise=n) for n in (0.0, 0.5))
    assert torch.allclose(even.model.layers[0].mlp.down_proj.weight[:, :48], down / 2)
    share = uneven.model.layers[0].mlp.down_proj.weight[:, :48] / down
    assert share.min() >= 0.249 and share.max() <= 0.751 and share.std() > 0.05
    again = widen(model, feed_forward=96, noise=0.5).state_dict()
    assert all(w.equal(again[name]) for name, w in uneven.state_dict().items())
    other = widen(model, feed_forward=96, noise=0.5, seed=1)
    assert not other.model.layers[0].mlp.down_proj.weight.equal(
        uneven.model.layers[0].mlp.down_proj.weight
    )


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("side", [dict(hidden=64), dict(feed_forward=256)])
def test_noise_is_what_lets_copies_part(kind, side):
    "The gradients of copies are equal when they are read evenly, and differ when they are not"

    def difference(noise):
        model = widen(make(kind).double(), **side, noise=noise, seed=3)
        model(input_ids=IDS, labels=IDS).loss.backward()
        body = model.base_model if kind != "t5" else model.encoder
        layers = max((m for m in body.modules() if isinstance(m, nn.ModuleList)), key=len)
        up = {"bert": "intermediate.dense", "llama": "mlp.up_proj", "gpt2": "mlp.c_fc"}
        up = layers[1].get_submodule(up.get(kind, "layer.1.DenseReluDense.wi")).weight
        grad = up.grad.T if kind == "gpt2" else up.grad
        if "hidden" in side:  # the norm before it belongs to the hidden state
            found = [(n.lower(), p) for n, p in layers[1].named_parameters()]
            norm = next(p for n, p in found if "norm" in n or n.startswith("ln_"))
            return (norm.grad[:32] - norm.grad[32:]).abs().max() / norm.grad.abs().max()
        rows = up.T if kind == "gpt2" else up
        twins = (rows[:, None] == rows[None]).all(-1).triu(1).nonzero()
        a, b = grad[twins[:, 0]], grad[twins[:, 1]]
        return (a - b).abs().max() / grad.abs().max()

    assert difference(0.0) < 1e-6
    assert difference(0.5) > 1e-3


def test_half_precision_widens_within_its_rounding():
    model = make("llama").bfloat16()
    wider = widen(model, hidden=64, feed_forward=100, heads=8)
    assert wider.dtype == torch.bfloat16
    assert relative(logits(wider).float(), logits(model).float()) < 0.05


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(["bert", "llama", "gpt2", "t5"]),
    st.integers(129, 300),
    st.sampled_from([None, 64, 96]),
    st.floats(0, 0.9),
    st.integers(0, 9),
)
def test_any_width_noise_and_seed_keep_the_function(kind, wide, hidden, noise, seed):
    model = make(kind)
    wider = widen(model, hidden=hidden, feed_forward=wide, noise=noise, seed=seed)
    assert relative(logits(wider), logits(model)) < 2e-5


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize(("kind", "front"), [("bert", 0), ("roberta", 2), ("gpt2", 0)])
def test_learned_positions_grow_and_shrink(kind, front):
    model, room = make(kind), 40 - front
    name = {"gpt2": "wpe"}.get(kind, "embeddings.position_embeddings")
    old = model.base_model.get_submodule(name).weight
    for how in ("copy", "interpolate"):
        new = resize_positions(model, 3 * room, how)
        table = new.base_model.get_submodule(name).weight
        assert table.shape == (3 * room + front, 32) and table[:front].equal(old[:front])
        assert new.config.max_position_embeddings == 3 * room + front
        assert logits(new, torch.full((1, 3 * room), 5)).isfinite().all()
        assert torch.allclose(table[-1], old[-1])
    assert logits(resize_positions(model, 3 * room)).equal(logits(model))
    assert logits(resize_positions(model, 12)).equal(logits(model))
    with pytest.raises((IndexError, RuntimeError)):
        logits(resize_positions(model, 11))


def test_interpolated_positions_are_the_line_between_neighbours():
    model = make("bert")
    old = model.bert.embeddings.position_embeddings.weight
    new = resize_positions(model, 79, "interpolate").bert.embeddings.position_embeddings.weight
    assert torch.allclose(new[::2], old, atol=1e-5)
    assert torch.allclose(new[1::2], (old[:-1] + old[1:]) / 2, atol=1e-5)


@pytest.mark.parametrize("kind", ROTARY_KINDS)
def test_rotary_positions_change_the_configuration_only(kind, tmp_path):
    model = make(kind)
    longer, stretched = resize_positions(model, 80), resize_positions(model, 80, "interpolate")
    assert longer.config.max_position_embeddings == 80
    assert logits(longer).equal(logits(model))
    assert stretched.config.rope_parameters["rope_type"] == "linear"
    assert not logits(stretched).equal(logits(model))
    assert logits(reloaded(stretched, tmp_path)).equal(logits(stretched))
    twice = resize_positions(stretched, 160, "interpolate")
    assert twice.config.rope_parameters["factor"] == 4
    assert model.config.rope_parameters.get("factor") is None


# ---------------------------------------------------------------- vocabulary


PAIRS = [
    ("bert", "bert"),
    ("roberta", "roberta"),
    ("gpt2", "gpt"),
    ("llama", "llama"),
    ("t5", "roberta"),
]


def sized(kind, tokenizer, **changes):
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    ids |= dict(bos_token_id=tokenizer.bos_token_id, vocab_size=len(tokenizer))
    return make(kind, **ids | changes)


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_the_same_vocabulary_changes_nothing_and_another_one_agrees(kind, family, tmp_path):
    tokenizer = family_tokenizer(family)
    starts = dict(decoder_start_token_id=1) if kind == "t5" else {}
    model = sized(kind, tokenizer, **starts)
    assert logits(replace_vocabulary(model, tokenizer, tokenizer)).equal(logits(model))
    other = family_tokenizer("bert" if family == "roberta" else "roberta")
    for init in ("pieces", "mean"):
        new = replace_vocabulary(model, tokenizer, other, init)
        assert new.get_input_embeddings().weight.shape[0] == len(other)
        assert disagreements(other, new) == []
        assert logits(reloaded(new, tmp_path / init)).equal(logits(new))
    if kind == "t5":
        assert new.config.decoder_start_token_id == other.pad_token_id
        assert new.generation_config.decoder_start_token_id == other.pad_token_id


def test_rows_come_from_roles_then_names_then_pieces_then_the_mean():
    old, new = family_tokenizer("bert"), family_tokenizer("roberta")
    model = sized("bert", old, tie_word_embeddings=False)
    out = replace_vocabulary(model, old, new)
    for a, b in (
        (model.get_input_embeddings().weight, out.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, out.get_output_embeddings().weight),
        (model.get_output_embeddings().bias, out.get_output_embeddings().bias),
    ):
        assert b[new.cls_token_id].equal(a[old.cls_token_id])
        assert b[new.eos_token_id].equal(a[old.sep_token_id])
        assert b[new.mask_token_id].equal(a[old.mask_token_id])
        shared = next(t for t in sorted(new.get_vocab()) if t in old.get_vocab() and t.isalpha())
        assert b[new.get_vocab()[shared]].equal(a[old.get_vocab()[shared]])
        known = next(t for t in sorted(new.get_vocab()) if t.startswith("Ġ") and len(t) > 6)
        pieces = old.encode(known[1:], add_special_tokens=False)
        assert torch.allclose(b[new.get_vocab()[known]], a[pieces].mean(0), atol=1e-6)
        broken = new.get_vocab()["Ã"]  # half of a character
        assert torch.allclose(b[broken], a[: len(old)].mean(0), atol=1e-6)


def test_roberta_moves_its_positions_with_the_pad_id():
    old, new = family_tokenizer("roberta"), family_tokenizer("bert")
    model = sized("roberta", old)
    assert (old.pad_token_id, new.pad_token_id) == (1, 0)
    out = replace_vocabulary(model, old, new)
    assert out.config.max_position_embeddings == 39
    a, b = (m.roberta.embeddings.position_embeddings.weight for m in (model, out))
    assert b[1:].equal(a[2:])
    with torch.no_grad():  # both count positions from their own pad id
        ids = torch.full((1, 5), 50)
        inner = [m.roberta.embeddings.create_position_ids_from_input_ids for m in (model, out)]
        assert b[inner[1](ids, 0)].equal(a[inner[0](ids, 1)])


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_set_everywhere(kind, tmp_path):
    model = make(kind)
    loud, silent = set_dropout(model, 0.3), set_dropout(set_dropout(model, 0.3), 0.0)
    assert logits(loud).equal(logits(model))  # not in evaluation mode
    assert {m.p for m in loud.modules() if isinstance(m, nn.Dropout)} <= {0.3, 0.0}
    for new, differs in ((loud, True), (silent, False), (reloaded(loud, tmp_path), True)):
        new.train()
        assert (not logits(new).equal(logits(new))) == differs
    only = set_dropout(model, 0.0, attention=0.5).train()
    assert (not logits(only).equal(logits(only))) == (kind != "t5")


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_done_is_refused_in_a_sentence():
    bert, llama, t5 = make("bert"), make("llama"), make("t5")
    assert "4 is not there" in refusal(keep_layers, bert, [0, 4])
    assert "-1 is not there" in refusal(keep_layers, bert, [-1])
    assert "True is not there" in refusal(keep_layers, bert, [True])
    assert "none is given" in refusal(keep_layers, bert, [])
    assert "5 is not there" in refusal(add_layers, bert, [5])
    assert "encoder and a decoder" in refusal(keep_layers, t5, [0])
    assert "has no middle" in refusal(keep_layers, t5, [0], "middle")
    assert "needs no part" in refusal(keep_layers, bert, [0], "encoder")
    assert "has no decoder" in refusal(keep_layers, make("t5", T5EncoderModel), [0], "decoder")
    assert "multiple of 32" in refusal(widen, bert, hidden=48)
    assert "multiple of 32" in refusal(widen, bert, hidden=32)
    assert "hidden / heads" in refusal(widen, bert, heads=8)
    assert "multiple of 2" in refusal(widen, llama, heads=7)
    assert "give other sizes" in refusal(widen, llama, heads=10)  # from_pretrained would refuse it
    assert "no number above 48" in refusal(widen, llama, feed_forward=48)
    assert "nothing to do" in refusal(widen, llama)
    assert "noise" in refusal(widen, llama, hidden=64, noise=1.0)
    assert "any length" in refusal(resize_positions, t5, 99)
    assert "length" in refusal(resize_positions, bert, 0)
    assert "how" in refusal(resize_positions, bert, 80, "stretch")
    assert "chance" in refusal(set_dropout, bert, 30)
    assert "attention" in refusal(set_dropout, bert, 0.1, attention="much")


def test_models_that_cannot_be_operated_on_are_refused():
    plain = nn.Linear(2, 2)
    other = DistilBertModel(
        DistilBertConfig(vocab_size=V, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
    )
    crossed = GPT2LMHeadModel(GPT2Config(**SIZE, n_positions=40, add_cross_attention=True))
    spread, quantised = make("bert"), make("bert")
    spread.hf_device_map = {"bert": "cpu", "cls": "disk"}
    quantised.config.quantization_config = {"bits": 4}
    for model, word in (
        (plain, "no model of transformers"),
        (other, "distilbert is not known"),
        (crossed, "cross-attention"),
        (spread, "several devices"),
        (quantised, "quantised"),
    ):
        assert word in refusal(keep_layers, model, [0])
        assert word in refusal(widen, model, hidden=64)
        assert word in refusal(resize_positions, model, 10)
        assert word in refusal(set_dropout, model, 0.1)


def test_a_class_that_needs_more_than_a_configuration_is_refused():
    class Own(BertForMaskedLM):
        def __init__(self, config, width):
            super().__init__(config)

    assert "Own" in refusal(keep_layers, Own(BertConfig(**MORE), 3), [0])


def test_tokenizers_that_do_not_fit_are_refused():
    bert, gpt = family_tokenizer("bert"), family_tokenizer("gpt")
    model = make("bert", vocab_size=200)
    assert "no row among the 200" in refusal(replace_vocabulary, model, bert, bert)
    assert "init" in refusal(replace_vocabulary, model, bert, bert, "zero")
    assert "no fast tokenizer" in refusal(replace_vocabulary, model, bert, None)
    roberta = sized("roberta", family_tokenizer("roberta"))
    assert "pad" in refusal(replace_vocabulary, roberta, family_tokenizer("roberta"), gpt)
    t5 = sized("t5", bert, decoder_start_token_id=0)
    assert "decoder begins" in refusal(replace_vocabulary, t5, bert, gpt)

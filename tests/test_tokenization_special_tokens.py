"""Special tokens: guarantee 11 and the pitfalls of adding, over models tied and untied and tokenizers of five families."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from instruct_ft.settings import InputError
from instruct_ft.tokenization.encode import encode
from instruct_ft.tokenization.special_tokens import (
    INITS,
    add_tokens,
    disagreements,
    lora_rows,
    save_pair,
    train_only_rows,
)

WORDS = ["a", "b", "the", "capital", "of", "Peru", "is", "Lima", "answer", "<", "|", ">", "."]
SIZE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)
NEW = ["<|user|>", "<|answer|>"]


def word_tokenizer(**roles):
    "A tokenizer of a few words and signs; cheap to make"
    vocab = {w: i for i, w in enumerate(["[UNK]", "<s>", "</s>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens(["[UNK]", "<s>", "</s>"])
    roles = dict(unk_token="[UNK]", bos_token="<s>", eos_token="</s>") | roles
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


V = len(word_tokenizer())


def llama(tied):
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=tied, **ENDS, **SIZE))


def gpt2(tied):
    size = dict(n_embd=16, n_layer=1, n_head=2, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, tie_word_embeddings=tied, **ENDS, **size))


def gpt2_bias():
    "An untied head with a bias"
    model = gpt2(False)
    model.lm_head = nn.Linear(16, V, bias=True)
    return model


def bert(tied):
    model = BertForMaskedLM(BertConfig(vocab_size=V, tie_word_embeddings=tied, **SIZE))
    model.cls.predictions.bias.data.normal_()
    model.config.bos_token_id, model.config.eos_token_id = 1, 2
    return model


def t5(tied=True):
    size = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    roles = dict(decoder_start_token_id=0, bos_token_id=1, eos_token_id=2)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=V, tie_word_embeddings=tied, **roles, **size)
    )


MODELS = {
    "llama-tied": lambda: llama(True),
    "llama-untied": lambda: llama(False),
    "gpt2-tied": lambda: gpt2(True),
    "gpt2-untied": lambda: gpt2(False),
    "gpt2-bias": gpt2_bias,
    "bert-tied": lambda: bert(True),
    "bert-untied": lambda: bert(False),
    "t5-tied": t5,
}
DECODERS = [name for name in MODELS if name.startswith(("llama", "gpt2"))]


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def out(model, ids):
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def tables(model):
    head = model.get_output_embeddings()
    return [model.get_input_embeddings().weight, *([] if head is None else [head.weight])]


def learn(model, parameters, ids, steps=3):
    "Steps with momentum and fierce decay"
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        logits = out(model, ids)
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def differing(before, model):
    "Weight -> rows that differ"
    after = model.state_dict()
    assert before.keys() == after.keys()
    found = {}
    for name, old in before.items():
        if not torch.equal(old, after[name]):
            rows = old != after[name]
            rows = rows.any(-1) if rows.ndim == 2 else rows
            found[name] = rows.nonzero().flatten().tolist()
    return found


def state(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def quietly(make_):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_()


IDS = torch.tensor([[3, V, 5, V + 1, 7], [V, 4, V + 1, 9, 2]])


# ---- guarantee 11


@pytest.mark.parametrize("name", MODELS)
def test_g11_adding_resizes_input_and_output_rows_and_keeps_ties(name):
    model, tok = make(name), word_tokenizer()
    old, tied = (
        [t.detach().clone() for t in tables(model)],
        len({id(t) for t in tables(model)}) == 1,
    )
    report = add_tokens(tok, model, NEW)
    assert report.ids == [V, V + 1] == tok.convert_tokens_to_ids(NEW)
    assert report.tied == tied == (len({id(t) for t in tables(model)}) == 1)
    for before, table in zip(old, tables(model), strict=True):
        assert table.shape[0] == V + 2 == model.config.vocab_size
        assert torch.equal(table[:V], before)
        torch.testing.assert_close(table[V:], before.mean(0).expand(2, -1))
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.testing.assert_close(bias[V:], bias[:V].mean().expand(2))
    assert out(model, IDS).shape[-1] == V + 2
    assert disagreements(tok, model) == []


@pytest.mark.parametrize("name", MODELS)
def test_g11_exactly_the_new_rows_are_trained_and_old_rows_stay_bit_equal(name):
    model = make(name)
    report = add_tokens(word_tokenizer(), model, NEW)
    before = state(model)
    with train_only_rows(model, report.ids) as rows:
        asked = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in asked} == {id(p) for p in rows.parameters()}
        learn(model, asked, IDS)
        middle = out(model, IDS)
    torch.testing.assert_close(out(model, IDS), middle)
    found = differing(before, model)
    assert found and all(rows == [V, V + 1] for rows in found.values())
    want = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {n for n, m in model.named_modules() if m in want.values()}
    assert {f"{n}.weight" for n in names} <= found.keys()
    assert report.tied == (len({id(t) for t in tables(model)}) == 1)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name", [n for n in MODELS if n not in ("bert-tied", "bert-untied", "gpt2-bias")]
)
def test_g11_under_lora_exactly_the_new_rows_are_trained_also_merged(name, tmp_path):
    model, tok = make(name), word_tokenizer()
    report = add_tokens(tok, model, NEW)
    old = [t.detach().clone() for t in tables(model)]
    target = "all-linear" if name.startswith("llama") else ["q"] if "t5" in name else ["c_attn"]
    config = LoraConfig(
        r=2, target_modules=target, trainable_token_indices=lora_rows(model, report.ids)
    )
    tuned = quietly(lambda: get_peft_model(model, config))
    learn(tuned, [p for p in tuned.parameters() if p.requires_grad], IDS)
    tuned.eval()
    said = out(tuned, IDS)
    plain = quietly(tuned.merge_and_unload)
    torch.testing.assert_close(out(plain, IDS), said, rtol=1e-4, atol=1e-5)
    for before, after in zip(old, tables(plain), strict=True):
        assert (before != after).any(1).nonzero().flatten().tolist() == [V, V + 1]
    assert report.tied == (len({id(t) for t in tables(plain)}) == 1)
    assert "model.safetensors" in save_pair(tok, plain, tmp_path)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gpt2-bias"])
def test_g11_survives_save_and_reload(name, tmp_path):
    model, tok = make(name), word_tokenizer()
    report = add_tokens(tok, model, NEW, roles={"pad": "<|pad|>", "end": "<|end|>"}, init="random")
    assert any(f.endswith(".safetensors") for f in save_pair(tok, model, tmp_path, ["a <|end|>"]))
    auto = AutoModelForMaskedLM if "bert" in name else AutoModelForCausalLM
    auto = AutoModelForSeq2SeqLM if "t5" in name else auto
    again, words = auto.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(out(again, IDS), out(model, IDS))
    assert [words.pad_token_id, words.eos_token_id] == [V + 2, V + 3]
    assert words("a<|user|>b <|end|>").input_ids == tok("a<|user|>b <|end|>").input_ids
    assert again.config.pad_token_id == V + 2
    assert disagreements(words, again) == []
    assert report.rows == (V, V + 4)


def test_g11_a_checkpoint_in_the_middle_is_plain_and_can_be_gone_on_with(tmp_path):
    for name in ("llama-tied", "llama-untied", "bert-tied"):
        model = make(name)
        report = add_tokens(word_tokenizer(), model, NEW)
        names = list(model.state_dict())
        with train_only_rows(model, report.ids) as rows:
            learn(model, rows.parameters(), IDS)
            assert sorted(model.state_dict()) == sorted(names)
            model.save_pretrained(tmp_path / name)
            kept, said = state(model), out(model, IDS)
            assert torch.equal(out(type(model).from_pretrained(tmp_path / name), IDS), said)
            learn(model, rows.parameters(), IDS)
            assert not torch.equal(out(model, IDS), said)
            model.load_state_dict(kept)
            assert torch.equal(out(model, IDS), said)
        assert list(model.state_dict()) == names
        assert not model._state_dict_hooks and torch.equal(out(model, IDS), said)


def test_g11_half_precision_rows_learn_small_steps():
    model = make("llama-tied").bfloat16()
    report = add_tokens(word_tokenizer(), model, NEW, init="random")
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    with train_only_rows(model, report.ids) as rows:
        assert rows.parameters()[0].dtype == torch.float32
        learn(model, rows.parameters(), IDS)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_what_cannot_be_trained_is_said():
    model = make("llama-tied")
    for ids, what in (([], "there are none"), ([V], "has no row"), ([-1], "has no row")):
        with pytest.raises(InputError, match=what):
            train_only_rows(model, ids)
    with train_only_rows(model, [3]), pytest.raises(InputError, match="in training; close"):
        train_only_rows(model, [3])
    for p in model.parameters():
        p.requires_grad_(False)
    train_only_rows(model, [3]).close()
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="has a bias"):
        lora_rows(make("bert-tied"), [3])


# ---- pitfalls of section 1.3 and of section 3


def test_p4_pad_and_end_are_two_tokens():
    tok, model = word_tokenizer(pad_token="</s>"), make("llama-tied")
    assert any("pad and end" in note for note in add_tokens(tok, model, NEW).notes)
    for roles in ({"pad": "</s>"}, {"end": "<x>", "pad": "<x>"}):
        with pytest.raises(InputError, match="both the pad and the end"):
            add_tokens(tok, model, [], roles=roles)
    add_tokens(tok, model, [], roles={"pad": "<|pad|>"})
    batch = [tok("Lima </s>").input_ids, tok("Lima is capital </s>").input_ids]
    labels = DataCollatorForLanguageModeling(tok, mlm=False)(batch)["labels"]
    assert (labels == tok.eos_token_id).sum() == 2


def test_p6_a_second_list_never_replaces_the_first_and_adding_twice_changes_nothing():
    tok, model = word_tokenizer(), make("llama-untied")
    add_tokens(tok, model, NEW, init="random")
    before, size = state(model), len(tok)
    again = add_tokens(tok, model, NEW, init="mean")
    assert again.ids == [] and again.tokens == {"<|user|>": V, "<|answer|>": V + 1}
    assert differing(before, model) == {} and len(tok) == size
    add_tokens(tok, model, ["<|tool|>", "<|tool|>"])
    assert tok.extra_special_tokens == [*NEW, "<|tool|>"]
    assert set(NEW) < set(tok.all_special_tokens)
    assert tok.decode(tok("<|user|> Lima <|tool|>").input_ids, skip_special_tokens=True) == "Lima"


def test_p6_a_plain_added_token_becomes_special_and_keeps_its_id_and_row():
    tok, model = word_tokenizer(), make("llama-tied")
    tok.add_tokens(["<|user|>"])
    model.resize_token_embeddings(len(tok))
    row = model.get_input_embeddings().weight[V].clone()
    report = add_tokens(tok, model, ["<|user|>"])
    assert report.tokens == {"<|user|>": V} and report.ids == []
    assert "<|user|>" in tok.all_special_tokens
    assert torch.equal(model.get_input_embeddings().weight[V], row)


@pytest.mark.parametrize(
    "token", ["art", "用户", "a_b", "", " <x>", "<x> ", "<\u200b>", "\ud800", 3, None]
)
def test_p6_names_that_would_cut_words_or_get_lost_are_refused(token):
    tok, model = word_tokenizer(), make("llama-tied")
    before = len(tok), model.get_input_embeddings().weight.shape
    with pytest.raises(InputError, match="tokens: "):
        add_tokens(tok, model, ["<|fine|>", token])
    assert (len(tok), model.get_input_embeddings().weight.shape) == before


def test_p6_a_bare_word_as_a_token_of_its_own_leaves_longer_words_alone():
    tok, model = word_tokenizer(), make("llama-tied")
    add_tokens(tok, model, [AddedToken("Li", single_word=True)])
    assert tok("Lima Li").input_ids == [WORDS.index("Lima") + 3, V]


def test_p7_every_id_has_a_row_also_those_added_before_without_one():
    tok, model = word_tokenizer(), make("llama-untied")
    tok.add_special_tokens({"additional_special_tokens": ["<|old|>", "<|user|>"]})
    with pytest.raises(IndexError):
        out(model, torch.tensor([tok("<|user|>").input_ids]))
    report = add_tokens(tok, model, ["<|user|>"], init="subtokens")
    assert report.ids == [V + 1] and report.rows == (V, V + 2)
    for table in tables(model):
        torch.testing.assert_close(table[V], table[:V].mean(0))
    assert out(model, torch.tensor([tok("<|old|><|user|>").input_ids])).isfinite().all()
    assert tok.extra_special_tokens == ["<|old|>", "<|user|>"]


def test_p7_typed_names_of_new_tokens_stay_text():
    tok, model = word_tokenizer(), make("llama-tied")
    add_tokens(tok, model, NEW, roles={"end": "<|end|>"})
    turns = [
        dict(role="user", content="a <|end|> <|user|> b"),
        dict(role="assistant", content="Lima"),
    ]
    ids = encode(turns, tok, "plain").input_ids
    assert ids.count(tok.eos_token_id) == 1 and V not in ids


def test_s3_masking_gradients_does_not_freeze_rows_against_weight_decay():
    table = nn.Embedding(4, 2)
    table.weight.register_hook(lambda g: g * torch.tensor([[0.0], [0.0], [0.0], [1.0]]))
    before = table.weight.detach().clone()
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1)
    table(torch.tensor([3])).sum().backward()
    optimizer.step()
    assert not torch.equal(table.weight[:3], before[:3])  # why train_only_rows exists


def lora(name, **how):
    "Head rows that differ after LoRA with these options, and whether the model is tied"
    model = make(name)
    add_tokens(word_tokenizer(), model, NEW)
    old = [t.detach().clone() for t in tables(model)]
    tuned = quietly(
        lambda: get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **how))
    )
    learn(tuned, [p for p in tuned.parameters() if p.requires_grad], IDS)
    new = tables(quietly(tuned.merge_and_unload))
    rows = [(a != b).any(1).nonzero().flatten().tolist() for a, b in zip(old, new, strict=True)]
    return rows, new[0] is new[1]


def test_s3_trainable_token_indices_as_a_list_trains_only_the_input_of_an_untied_model():
    assert lora("llama-untied", trainable_token_indices=[V, V + 1])[0] == [[V, V + 1], []]
    assert lora("llama-tied", trainable_token_indices=[V, V + 1])[0] == [[V, V + 1]] * 2


def test_s3_modules_to_save_unties_and_moves_every_row_and_is_not_saved_as_a_pair(tmp_path):
    rows, tied = lora("llama-tied", modules_to_save=["embed_tokens", "lm_head"])
    assert not tied and all(len(part) == V + 2 for part in rows)
    model = make("llama-tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(InputError, match="matrix of its own; set the flag"):
        save_pair(word_tokenizer(), model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_s3_peft_loses_the_bias_of_a_head_and_lora_rows_refuses():
    model = make("bert-tied")
    ids = torch.tensor([[3, 4]])
    before = out(model, ids)
    config = LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[3])
    with pytest.raises(InputError, match="bias, which peft loses"):
        lora_rows(model, [3])
    tuned = quietly(lambda: get_peft_model(model, config)).eval()
    assert not torch.allclose(out(tuned, ids), before)


# ---- ids and rows


def test_a_vocabulary_with_holes_gives_no_id_twice(tmp_path):
    vocab = {"a": 0, "b": 1, "[UNK]": 2, "Lima": 4}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    naive = copy.deepcopy(tok)
    naive.add_special_tokens({"additional_special_tokens": ["<x>"]})
    assert naive("<x>").input_ids == naive("Lima").input_ids  # why we do not leave it to chance
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, bos_token_id=0, eos_token_id=1, **SIZE))
    report = add_tokens(tok, model.eval(), ["<x>", "<y>"], roles={"pad": "<p>"})
    assert report.tokens == {"<x>": 5, "<y>": 6, "<p>": 7} and report.rows == (5, 8)
    assert tok("a Lima <y> b<x>").input_ids == [0, 4, 6, 1, 5]
    save_pair(tok, model, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("Lima <y>").input_ids == [4, 6]


def test_spare_rows_are_used_and_never_cut_off():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **ENDS, **SIZE))
    before = model.get_input_embeddings().weight.detach().clone()
    report = add_tokens(word_tokenizer(), model, NEW)
    after = model.get_input_embeddings().weight
    assert report.rows == (64, 64) and report.ids == [V, V + 1]
    torch.testing.assert_close(after[V], before[:V].mean(0))  # not the mean of spare rows
    assert torch.equal(after[V + 2 :], before[V + 2 :])


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_pad_to_multiple(multiple):
    tok, model = word_tokenizer(), make("llama-untied")
    report = add_tokens(tok, model, NEW, pad_to_multiple=multiple)
    assert report.rows[1] % multiple == 0 and report.rows[1] >= V + 2
    assert {t.shape[0] for t in tables(model)} == {report.rows[1]}
    for table in tables(model):
        torch.testing.assert_close(table[V + 2 :], table[:V].mean(0).expand_as(table[V + 2 :]))
    assert add_tokens(tok, model, NEW, pad_to_multiple=multiple).rows == (report.rows[1],) * 2


def test_each_start_is_what_it_says():
    said = {"<|answer|>": "the capital of Peru", "<|user|>": "</s>"}
    for how in INITS:
        for output in INITS:
            model, tok = make("llama-untied"), word_tokenizer()
            old = [t.detach().clone() for t in tables(model)]
            described = said if "described" in (how, output) else None
            report = add_tokens(tok, model, NEW, how, output, descriptions=described)
            pieces = {
                "mean": range(V),
                "subtokens": [WORDS.index(w) + 3 for w in "< | answer | >".split()],
                "described": [WORDS.index(w) + 3 for w in "the capital of Peru".split()],
            }
            for kind, before, table in zip((how, output), old, tables(model), strict=True):
                if kind != "random":
                    want = before[list(pieces[kind])].mean(0)
                    torch.testing.assert_close(table[V + 1], want)
                if kind == "described":
                    assert torch.equal(table[V], before[2])
            assert report.inits["input"]["<|answer|>"] == how


def test_a_name_of_which_nothing_is_known_falls_back_to_the_mean_and_says_so():
    model, tok = make("llama-tied"), word_tokenizer()
    report = add_tokens(tok, model, ["【问】"], init="subtokens")
    assert report.inits["input"] == {"【问】": "mean (no piece known)"}
    assert "no piece known" in repr(report)


def test_random_rows_hang_on_seed_and_name_not_on_order():
    def row(names, seed):
        model, tok = make("llama-tied"), word_tokenizer()
        ids = add_tokens(tok, model, names, init="random", seed=seed).tokens
        return model.get_input_embeddings().weight[ids["<|user|>"]]

    one = row(NEW, 0)
    assert torch.equal(one, row(NEW[::-1], 0))
    assert not torch.equal(one, row(NEW, 1))


@settings(
    max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(DECODERS), st.integers(1, 40), st.floats(0.1, 30), st.integers(0, 9))
def test_mean_rows_raise_the_loss_of_old_text_by_at_most_log_1_plus_n_over_v(name, n, scale, seed):
    torch.manual_seed(seed)
    model = make(name)
    for table in {id(t): t for t in tables(model)}.values():
        table.data.normal_(std=scale)
    ids = torch.randint(0, V, (4, 12))
    before = out(model, ids).log_softmax(-1)
    add_tokens(word_tokenizer(), model, [f"<{i}>" for i in range(n)])
    after = out(model, ids).log_softmax(-1)[..., :V]
    assert (before - after).max() <= math.log(1 + n / V) + 1e-3 * max(1, scale)
    assert (before - after).min() >= -1e-3 * max(1, scale)


# ---- roles


def test_roles_reach_tokenizer_config_and_generation_config():
    tok, model = word_tokenizer(), make("llama-tied")
    roles = {"start": "<|begin|>", "end": "<|end|>", "pad": "<|pad|>", "separator": "<|sep|>"}
    report = add_tokens(tok, model, [], roles=roles)
    assert report.roles == dict(bos_token=V, eos_token=V + 1, pad_token=V + 2, sep_token=V + 3)
    assert [tok.bos_token, tok.eos_token, tok.pad_token, tok.sep_token] == list(roles.values())
    c, g = model.config, model.generation_config
    assert [c.bos_token_id, c.eos_token_id, c.pad_token_id] == [V, V + 1, V + 2]
    assert [g.bos_token_id, g.eos_token_id, g.pad_token_id] == [V, [V + 1, 2], V + 2]
    assert disagreements(tok, model) == []
    add_tokens(tok, model, [], roles={"eos_token": "</s>"})
    assert g.eos_token_id == [2, V + 1] and c.eos_token_id == 2


def test_a_role_can_be_given_to_a_token_that_is_there():
    tok, model = word_tokenizer(), make("llama-tied")
    before = state(model)
    report = add_tokens(tok, model, [], roles={"pad": "[UNK]"})
    assert tok.pad_token_id == model.config.pad_token_id == 0
    assert report.ids == [] and differing(before, model) == {}


def test_an_end_token_that_the_tokenizer_still_puts_around_a_text_is_told():
    from tokenizers import processors

    tok, model = word_tokenizer(), make("llama-tied")
    around = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    tok.backend_tokenizer.post_processor = around
    report = add_tokens(tok, model, [], roles={"end": "<|end|>"})
    assert any("still puts </s> around" in note for note in report.notes)


@pytest.mark.parametrize(
    ("given_", "what"),
    [
        (dict(tokens="<x>"), "is no list"),
        (dict(tokens=5), "is no list"),
        (dict(tokens=["<x>"], init="zeros"), "init: 'zeros'"),
        (dict(tokens=["<x>"], output_init="zeros"), "output_init: 'zeros'"),
        (dict(tokens=["<x>"], init="described"), "'<x>' has none"),
        (dict(tokens=["<x>"], descriptions={"<x>": "a"}), "init='described' only"),
        (dict(tokens=["<x>"], init="described", descriptions={"<y>": "a"}), "'<y>' is not one"),
        (dict(tokens=["<x>"], init="described", descriptions={"<x>": "问"}), "knows no token"),
        (dict(tokens=["<x>"], pad_to_multiple=0), "pad_to_multiple"),
        (dict(tokens=["<x>"], pad_to_multiple=1.5), "pad_to_multiple"),
        (dict(tokens=["<x>"], roles={"user": "<u>"}), "roles: 'user'"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(given_, what):
    tok, model = word_tokenizer(), make("llama-tied")
    before = state(model)
    with pytest.raises(InputError, match=what):
        add_tokens(tok, model, **given_)
    assert len(tok) == V and tok.extra_special_tokens == []
    assert differing(before, model) == {} and model.config.pad_token_id is None


def test_models_with_adapters_and_without_heads():
    tok = word_tokenizer()
    tuned = get_peft_model(make("llama-tied"), LoraConfig(r=2))
    with pytest.raises(InputError, match="has an adapter"):
        add_tokens(tok, tuned, NEW)
    with pytest.raises(InputError, match="has an adapter"):
        save_pair(tok, tuned, "nowhere")
    with pytest.raises(InputError, match="no embedding of tokens"):
        add_tokens(tok, nn.Linear(2, 2), NEW)
    with pytest.raises(InputError, match="no fast tokenizer"):
        add_tokens(object(), make("llama-tied"), NEW)
    sorter = BertForSequenceClassification(BertConfig(vocab_size=V, **SIZE)).eval()
    report = add_tokens(tok, sorter, NEW)
    assert report.tied and sorter.get_input_embeddings().weight.shape[0] == V + 2
    with train_only_rows(sorter, report.ids) as rows:
        assert sum(p.numel() for p in rows.parameters()) == 2 * 16


# ---- every family of tokenizers


@pytest.mark.parametrize("family", ["bert", "gpt", "roberta", "t5", "llama"])
def test_families_keep_the_ids_of_other_text_and_come_back_from_disk(family, tmp_path):
    from instruct_ft.atlas.tokenizers import family_tokenizer

    tok = family_tokenizer(family, 2048)
    ends = {k: getattr(tok, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **ends, **SIZE)).eval()
    texts = [
        "The capital of Peru is Lima.",
        "秘鲁的首都",
        " two  spaces\n",
        "<user> user|>",
        "😁 é",
    ]
    before = [tok(text).input_ids for text in texts]
    report = add_tokens(
        tok, model, ["<|user|>", "[TASK A]"], init="subtokens", roles={"pad": "<|blank|>"}
    )
    assert [tok(text).input_ids for text in texts] == before
    assert len(report.ids) == 3 and set(report.ids) == set(report.tokens.values())
    for name, id_ in report.tokens.items():
        assert tok(f"Lima{name}Lima {name}").input_ids.count(id_) == 2
        assert tok.decode([id_]) == name and id_ in tok.all_special_ids
    assert tok("[task a] [TASK").input_ids.count(report.tokens["[TASK A]"]) == 0
    save_pair(tok, model, tmp_path, texts)


def test_a_head_that_the_class_cannot_load_or_the_flag_denies_is_refused(tmp_path):
    tok, model = word_tokenizer(), make("gpt2-bias")
    with pytest.raises(InputError, match="came back changed"):
        save_pair(tok, model, tmp_path)  # the class has no place for the bias
    model = make("llama-tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    before = state(model)
    with pytest.raises(InputError, match="tie_word_embeddings"):
        add_tokens(tok, model, NEW)  # resizing would tie it again and lose the head
    assert differing(before, model) == {} and len(tok) == V

"""Task heads: pooling, losses, labels, saving, spans, choices; on all four families."""

import copy
import itertools
import json
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from instruct_ft.atlas.corpus import corpus
from instruct_ft.atlas.tokenizers import new_tokenizer
from instruct_ft.model.heads import (
    HEADS,
    POOLINGS,
    PooledConfig,
    PooledForSequenceClassification,
    best_spans,
    choice_ids,
    class_weights,
    encode_classes,
    encode_questions,
    focal_loss,
    head_loss,
    head_modules,
    instruction_rows,
    label_choices,
    new_head,
    pack_right,
    pool,
    read_answers,
    score_choices,
    tag_spans,
)
from instruct_ft.model.load import load_model, quiet
from instruct_ft.settings import InputError
from instruct_ft.tokenization.entities import align_labels, read_tokens

FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5")
CLASS = "single_label_classification"
MANY = "multi_label_classification"


def body(family, rows=64):
    "A language model with random weights and no dropout"
    torch.manual_seed(1)
    small = dict(
        vocab_size=rows,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    off = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    gpt2 = dict(vocab_size=rows, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    t5 = dict(vocab_size=rows, d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=2)
    kinds = {
        "bert": lambda: BertForMaskedLM(BertConfig(**small, **off, max_position_embeddings=64)),
        "roberta": lambda: RobertaForMaskedLM(
            RobertaConfig(**small, **off, pad_token_id=1, max_position_embeddings=66)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**gpt2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**small, max_position_embeddings=64)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(**t5, dropout_rate=0, decoder_start_token_id=0)
        ),
    }
    return kinds[family]().eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "A folder for each family: a tiny body and a tokenizer"
    docs, root = list(islice(corpus(0), 200)), tmp_path_factory.mktemp("bodies")
    for family in FAMILIES:
        tok = new_tokenizer({"gpt2": "gpt"}.get(family, family), docs, 2600)
        model = body(family, len(tok))
        model.config.pad_token_id = tok.pad_token_id
        model.save_pretrained(root / family)
        tok.save_pretrained(root / family)
    return root


def pooled(family, how="mean", labels=3, problem=CLASS, **more):
    config = PooledConfig(
        backbone=body(family).config, pooling=how, num_labels=labels, problem_type=problem, **more
    )
    torch.manual_seed(2)
    return PooledForSequenceClassification(config).eval()


def says(part, call, *args, **kwargs):
    "One sentence that holds `part`"
    with pytest.raises(InputError) as e:
        call(*args, **kwargs)
    text = str(e.value)
    assert part in text and "\n" not in text and text.endswith(".")


# ---- pooling and padding


def loop_pool(rows, mask, how, query):
    "Pooling by a plain loop over the tokens that are there"
    out = []
    for row, there in zip(rows.tolist(), mask.tolist(), strict=True):
        seen = np.array([v for v, m in zip(row, there, strict=True) if m])
        if how in ("first", "last"):
            out.append(seen[0 if how == "first" else -1])
        elif how == "max":
            out.append(seen.max(0))
        else:
            w = np.exp(seen @ np.array(query)) if how == "attention" else np.ones(len(seen))
            out.append((w[:, None] * seen).sum(0) / w.sum())
    return torch.tensor(np.array(out))


@settings(max_examples=30, derandomize=True)
@given(st.data(), st.sampled_from(POOLINGS))
def test_pooling_equals_a_loop_for_any_mask(data, how):
    width = data.draw(st.integers(1, 6))
    mask = data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1))
    mask = torch.tensor([m for m in mask if any(m)] or [[True] * width])
    rows = torch.randn(*mask.shape, 3, dtype=torch.float64)
    query = torch.randn(3, dtype=torch.float64)
    junk = rows.masked_fill(~mask[..., None], torch.nan)
    wanted = loop_pool(rows, mask, how, query.tolist())
    for kind in (torch.bool, torch.long, torch.float):
        found = pool(junk, mask.to(kind), how, query)
        torch.testing.assert_close(found, wanted)


def test_attention_starts_as_the_mean():
    rows, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    query = torch.zeros(8)
    torch.testing.assert_close(pool(rows, mask, "attention", query), pool(rows, mask, "mean"))


def test_pooling_of_half_precision_is_in_float32():
    rows = torch.full((1, 4000, 1), 1.0).bfloat16()
    rows[:, ::2] = 1.0078125
    found = pool(rows, torch.ones(1, 4000), "mean")
    assert found.dtype == torch.float32 and abs(found.item() - 1.00390625) < 1e-5


@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_g16_result_of_a_row_does_not_depend_on_padding_side_length_batch_mates_or_mask_dtype(
    family, how
):
    model = pooled(family, how).double()
    if how == "attention":
        torch.nn.init.normal_(model.pooling.query)
    wanted = model(torch.tensor([[7, 8, 9]])).logits
    mate = [5, 6, 7, 8, 9, 10, 11]
    for ids in ([7, 8, 9, 0, 0, 0, 0], [0, 0, 0, 0, 7, 8, 9], [7, 0, 8, 0, 0, 9, 0]):
        for kind in (torch.bool, torch.long, torch.float):
            both = torch.tensor([ids, mate])
            found = model(both, attention_mask=(both != 0).to(kind)).logits[:1]
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_last_token_right_under_left_and_right_padding():
    model = pooled("llama", "last")
    alone = model.backbone(torch.tensor([[7, 8, 9]])).last_hidden_state[:, -1]
    for ids in ([7, 8, 9, 0], [0, 7, 8, 9]):
        ids = torch.tensor([ids, [1, 2, 3, 4]])
        found = model(ids, attention_mask=(ids != 0)).logits[:1]
        torch.testing.assert_close(found, model.score(alone), atol=1e-6, rtol=0)


def test_pad_id_inside_the_text_is_no_padding():
    "pad == end token: the last token is the one that the mask says"
    model = pooled("gpt2", "last")
    model.config.pad_token_id = 9
    ids = torch.tensor([[7, 8, 9]])
    state = model.backbone(ids).last_hidden_state
    torch.testing.assert_close(model(ids, attention_mask=ids > 0).logits, model.score(state[:, 2]))


def test_embeddings_in_place_of_ids_give_the_same():
    model = pooled("bert")
    ids = torch.tensor([[0, 7, 8, 9], [5, 6, 7, 8]])
    vectors = model.get_input_embeddings()(ids)
    found = model(inputs_embeds=vectors, attention_mask=ids != 0).logits
    torch.testing.assert_close(found, model(ids, attention_mask=ids != 0).logits)


def test_segment_ids_travel_with_their_tokens():
    model = pooled("bert")
    ids, kinds = torch.tensor([[7, 8, 9]]), torch.tensor([[0, 1, 1]])
    left, left_kinds = torch.tensor([[0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1]])
    found = model(left, attention_mask=left != 0, token_type_ids=left_kinds).logits
    torch.testing.assert_close(found, model(ids, token_type_ids=kinds).logits)
    assert not torch.equal(found, model(ids).logits)


def test_pack_right_keeps_order_and_refuses_an_empty_row():
    mask, ids = pack_right(torch.tensor([[0.0, 1, 0, 1]]), torch.tensor([[1, 2, 3, 4]]))
    assert ids.tolist() == [[2, 4]] and mask.tolist() == [[1, 1]]
    says("give query", pool, torch.zeros(1, 1, 1), torch.ones(1, 1), "attention")
    says("row 1 has no token", pack_right, torch.tensor([[1], [0]]))


# ---- traps of transformers' own heads, by name


def test_trap_gpt2_classifier_without_pad_token_raises_at_batch_2_and_ours_does_not():
    own = GPT2ForSequenceClassification(body("gpt2").config).eval()
    assert own.config.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token"):
        own(torch.tensor([[7, 8], [8, 9]]))
    assert pooled("gpt2", "last")(torch.tensor([[7, 8], [8, 9]])).logits.shape == (2, 3)


def test_trap_left_padding_needs_position_ids():
    model, ids = body("gpt2").transformer, torch.tensor([[0, 0, 7, 8, 9]])
    mask = (ids != 0).long()
    alone = model(ids[:, 2:]).last_hidden_state[:, -1]
    assert (model(ids, attention_mask=mask).last_hidden_state[:, -1] - alone).abs().max() > 1e-2
    places = (mask.cumsum(1) - 1).clamp(min=0)
    told = model(ids, attention_mask=mask, position_ids=places).last_hidden_state[:, -1]
    torch.testing.assert_close(told, alone, atol=1e-5, rtol=0)


def test_trap_t5_classifier_wants_equal_counts_of_end_tokens_and_ours_does_not():
    ids = torch.tensor([[7, 8, 1], [7, 1, 1]])
    own = T5ForSequenceClassification(body("t5").config).eval()
    with pytest.raises(ValueError, match="same number of <eos>"):
        own(ids)
    assert pooled("t5")(ids).logits.shape == (2, 3)


def test_trap_llama_span_head_of_transformers_has_a_random_body(folders):
    with quiet():
        own = AutoModelForQuestionAnswering.from_pretrained(folders / "llama")
        plain = AutoModel.from_pretrained(folders / "llama")
    weight = plain.layers[0].mlp.up_proj.weight
    assert not torch.equal(own.transformer.layers[0].mlp.up_proj.weight, weight)
    ours, _ = new_head(folders / "llama", "span")
    assert type(ours) is type(own)
    assert torch.equal(ours.transformer.layers[0].mlp.up_proj.weight, weight)


def test_trap_integers_as_multi_hot_labels_and_regression_broadcast():
    logits = torch.randn(4, 3)
    hot = torch.randint(0, 2, (4, 3))
    torch.testing.assert_close(
        head_loss(logits, hot, MANY), F.binary_cross_entropy_with_logits(logits, hot.float())
    )
    assert head_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 3.0]), "regression") == 0


# ---- losses


@settings(max_examples=20, derandomize=True)
@given(st.integers(0, 10**6), st.booleans())
def test_focal_loss_with_gamma_0_equals_cross_entropy(seed, weighted):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64) * 10
    labels = torch.randint(0, 4, (6,), generator=g)
    labels[0] = -100
    weights = torch.rand(4, generator=g, dtype=torch.float64) + 0.1 if weighted else None
    found = focal_loss(logits, labels, 0.0, weights)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weights))


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 5])
def test_focal_loss_is_the_formula_of_the_paper(gamma):
    logits, labels = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 3, (8,))
    p = logits.softmax(-1)[torch.arange(8), labels]
    wanted = (-((1 - p) ** gamma) * p.log()).mean()
    torch.testing.assert_close(focal_loss(logits, labels, gamma), wanted)


def test_focal_loss_has_finite_gradients_where_a_row_is_certain():
    for gamma in (0.0, 0.5, 2.0):
        logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
        focal_loss(logits, torch.tensor([0, 0]), gamma).backward()
        assert logits.grad.isfinite().all()
        assert logits.grad[1].abs().max() > 0.1


def test_loss_without_a_label_is_zero_and_not_nan():
    assert focal_loss(torch.randn(2, 3), torch.tensor([-100, -100]), 2.0) == 0


def test_focal_loss_of_several_labels():
    logits, hot = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 2, (5, 3)).double()
    p = torch.where(hot > 0, logits.sigmoid(), 1 - logits.sigmoid())
    wanted = (-((1 - p) ** 2) * p.log()).mean()
    torch.testing.assert_close(head_loss(logits, hot, MANY, gamma=2), wanted)
    heavy = F.binary_cross_entropy_with_logits(logits, hot, pos_weight=torch.tensor([1.0, 2, 9]))
    torch.testing.assert_close(head_loss(logits, hot, MANY, weights=[1, 2, 9]), heavy)


def test_class_weights_equal_scikit_learn():
    labels = ["a"] * 7 + ["b"] * 2 + ["c"]
    wanted = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=labels)
    np.testing.assert_allclose(class_weights(labels, ["a", "b", "c"]), wanted)
    logits = torch.randn(10, 3, dtype=torch.float64)
    y = torch.tensor([0] * 7 + [1] * 2 + [2])
    found = focal_loss(logits, y, 0.0, torch.tensor(wanted))
    p = logits.softmax(-1).numpy()
    np.testing.assert_allclose(
        found, log_loss(y, p, sample_weight=wanted[y.numpy()], labels=[0, 1, 2])
    )


def test_class_weights_name_what_is_wrong():
    says("no row has 'c'", class_weights, ["a", "b"], ["a", "b", "c"])
    says("'z' is none of a, b", class_weights, ["a", "z"], ["a", "b"])
    assert class_weights([["a"], [], ["a", "b"], []], ["a", "b"]) == [1, 3]


def test_bf16_loss_within_1e_3_of_float64():
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 5, dtype=torch.float64), torch.randint(0, 5, (64,))
    exact = focal_loss(logits, labels, 2.0)
    assert abs(focal_loss(logits.bfloat16(), labels, 2.0) - exact) < 1e-3 * 5 * exact
    assert focal_loss(logits.bfloat16(), labels).dtype == torch.float32


# ---- from a checkpoint, and saved


@pytest.mark.parametrize("family", FAMILIES)
def test_new_head_keeps_every_weight_of_the_body(folders, family):
    with quiet():
        kind = T5EncoderModel if family == "t5" else AutoModel
        plain = {
            k: v
            for k, v in kind.from_pretrained(folders / family).state_dict().items()
            if "pooler" not in k
        }
    cases = [(CLASS, ["a", "b"], how) for how in (None, "mean")]
    cases += [("tagging", ["O", "B-X"], None), ("span", [], None)]
    for problem, labels, how in cases:
        model, _ = new_head(folders / family, problem, labels, how)
        found = model.state_dict()
        for name, weight in plain.items():
            match = [k for k in found if k == name or k.endswith("." + name)]
            assert match and torch.equal(found[match[0]], weight), (problem, how, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_by_plain_auto_classes_with_equal_logits(folders, family, tmp_path):
    ids = torch.tensor([[7, 8, 9, 10]])
    cases = [(CLASS, ["a", "b"], "attention"), (MANY, ["a", "b", "c"], "max")]
    cases += [("regression", ["size"], None), ("tagging", ["O", "B-X"], None), ("span", [], None)]
    for problem, labels, how in cases:
        more = dict(class_weights=[1, 2.5], focal_gamma=2.0) if how == "attention" else {}
        model, _ = new_head(folders / family, problem, labels, how, **more)
        if how == "attention":
            torch.nn.init.normal_(model.pooling.query)
        model.save_pretrained(tmp_path / problem)
        with quiet():
            again = HEADS[problem].from_pretrained(tmp_path / problem).eval()
        assert type(again) is type(model)
        for a, b in zip(again(ids).to_tuple(), model(ids).to_tuple(), strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)
        if labels:
            assert list(again.config.id2label.values()) == labels
        if how == "attention":
            assert (again.config.class_weights, again.config.focal_gamma) == ([1, 2.5], 2)
            assert again.config.problem_type == problem


def test_config_json_is_readable_and_holds_the_labels(folders, tmp_path):
    model, _ = new_head(folders / "bert", CLASS, ["风", "雨"], "mean")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == "pooled_head" and saved["id2label"] == {"0": "风", "1": "雨"}
    assert saved["backbone"]["model_type"] == "bert"
    assert (tmp_path / "model.safetensors").is_file()


def test_without_the_import_transformers_says_that_it_does_not_know_the_type(
    folders, tmp_path, monkeypatch
):
    model, _ = new_head(folders / "bert", CLASS, ["a", "b"], "mean")
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "pooled_head")
    with pytest.raises(ValueError, match="pooled_head"):
        AutoConfig.from_pretrained(tmp_path)


def test_loss_weights_act_in_the_model(folders):
    torch.manual_seed(0)
    model, _ = new_head(
        folders / "bert", CLASS, ["a", "b"], "mean", class_weights=[1, 9], focal_gamma=2
    )
    ids, labels = torch.tensor([[7, 8], [9, 10]]), torch.tensor([0, 1])
    out = model(ids, labels=labels)
    wanted = focal_loss(out.logits, labels, 2, torch.tensor([1.0, 9]))
    torch.testing.assert_close(out.loss, wanted)


def test_trainer_with_accumulation_equals_one_large_batch(folders, tmp_path):
    rows = [dict(input_ids=[5 + i, 6, 7], labels=i % 2) for i in range(4)]
    ends = []
    for size, steps in ((4, 1), (2, 2)):
        model, tok = new_head(folders / "bert", CLASS, ["a", "b"], "mean")
        torch.nn.init.constant_(model.score.weight, 0.1)
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            report_to=[],
            max_grad_norm=0,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            lr_scheduler_type="constant",
        )
        with quiet():
            Trainer(model, args, train_dataset=rows, processing_class=tok).train()
        ends.append(model.score.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])


def test_gradients_reach_body_and_head_and_stay_in_the_mask(folders):
    for family in FAMILIES:
        model, _ = new_head(folders / family, CLASS, ["a", "b"], "attention")
        model.train()
        ids = torch.tensor([[20, 21, 22], [23, 24, 25]])
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        model(ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
        rows = model.get_input_embeddings().weight.grad.abs().sum(1)
        assert (rows[20:25] > 0).all() and rows[25] == 0
        assert model.score.weight.grad.abs().sum() > 0 and model.pooling.query.grad is not None


def test_random_weights_under_the_same_head(folders):
    model, _ = new_head(folders / "t5", CLASS, ["a", "b"], "mean")
    again = type(model)(model.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


# ---- adapters


def lora(model, names):
    torch.manual_seed(3)
    how = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", modules_to_save=names)
    return get_peft_model(model, how)


@pytest.mark.parametrize("how", [None, "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_with_the_head_in_modules_to_save_reloads_with_equal_logits(
    folders, family, how, tmp_path
):
    ids, labels = torch.tensor([[7, 8, 9], [9, 8, 7]]), torch.tensor([0, 1])
    model, _ = new_head(folders / family, CLASS, ["a", "b"], how)
    tuned = lora(model, head_modules(model))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    tuned.train()
    for _ in range(2):
        tuned(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = tuned.eval()(input_ids=ids).logits
    tuned.save_pretrained(tmp_path)
    fresh, _ = new_head(folders / family, CLASS, ["a", "b"], how)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, before)


def test_trap_pefts_own_list_forgets_t5s_head_and_berts_pooler(folders):
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t5 = T5ForSequenceClassification.from_pretrained(folders / "t5")
        bert, _ = new_head(folders / "bert", CLASS, ["a", "b"])
        for model, lost in ((t5, "classification_head"), (bert, "pooler")):
            assert lost in head_modules(model)
            for names, there in ((None, False), (head_modules(model), True)):
                tuned = lora(copy.deepcopy(model), names)
                saved = [n for n, p in tuned.named_parameters() if "modules_to_save" in n]
                assert any(f"{lost}." in n for n in saved) is there


# ---- labels


def test_encode_classes_accounts_for_every_row(folders):
    model, tok = new_head(folders / "bert", CLASS, ["a", "b"], "mean")
    rows = Dataset.from_list(
        [
            dict(id=str(i), text=t, label=x)
            for i, (t, x) in enumerate(
                [("gold", "a"), ("", "a"), ("gold", "c"), ("gold " * 99, "b"), ("iron", "b")]
            )
        ]
    )
    done = encode_classes(rows, tok, model.config)
    assert done.kept["id"] == ["0", "4"] and done.kept["labels"] == [0, 1]
    assert [r.split(":")[0] for r in done.dropped["reason"]] == ["text", "label", "length"]
    assert rows.column_names == ["id", "text", "label"]
    assert done.kept["input_ids"][0] == tok("gold").input_ids


def test_encode_classes_of_sets_and_numbers(folders):
    many, tok = new_head(folders / "bert", MANY, ["a", "b"], "mean")
    rows = Dataset.from_dict(dict(text=["x", "y"], label=[["b"], []]))
    assert encode_classes(rows, tok, many.config).kept["labels"] == [[0.0, 1.0], [0.0, 0.0]]
    one, tok = new_head(folders / "bert", "regression")
    rows = Dataset.from_dict(dict(text=["x", "y", "z"], label=[1.5, float("nan"), None]))
    done = encode_classes(rows, tok, one.config)
    assert done.kept["labels"] == [[1.5]] and len(done.dropped) == 2


def test_bad_input_is_one_sentence(folders, tmp_path):
    bert = folders / "bert"
    says("needs 2", new_head, bert, CLASS, [])
    says("needs 2", new_head, bert, CLASS, ["only"])
    says("needs 1", new_head, bert, MANY, [])
    says("'a' is there twice", new_head, bert, CLASS, ["a", "a"])
    says("no list of names", new_head, bert, CLASS, "ab")
    says("no list of names", new_head, bert, CLASS, ["a", 1])
    says("problem ranking: unknown", new_head, bert, "ranking", ["a", "b"])
    says("pooling cls: unknown", new_head, bert, CLASS, ["a", "b"], "cls")
    says("nothing is pooled", new_head, bert, "tagging", ["O"], "mean")
    says("a span head has none", new_head, bert, "span", ["a"])
    weights = dict(class_weights=[1, 2, 3])
    says("give 2 numbers", new_head, bert, CLASS, ["a", "b"], "mean", **weights)
    says("give a pooling", new_head, bert, CLASS, ["a", "b"], **weights)
    says("from 0", new_head, bert, CLASS, ["a", "b"], "mean", focal_gamma=-1)
    says("leave them away", new_head, bert, "regression", ["x"], "mean", focal_gamma=1)
    says("no such folder", new_head, "./nowhere", CLASS, ["a", "b"])
    model, tok = new_head(bert, CLASS, ["a", "b"], "mean")
    no = Dataset.from_dict(dict(text=["x"], label=["c"]))
    says("no row is left of 1", encode_classes, no, tok, model.config)
    says("no column label", encode_classes, no.remove_columns("label"), tok, model.config)
    says("there are no rows", encode_classes, no.select([]), tok, model.config)
    model.save_pretrained(tmp_path)
    says("has a head already", new_head, tmp_path, CLASS, ["a", "b"])


def test_checkpoints_that_do_not_fit_are_one_sentence(folders, tmp_path):
    small = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    BartConfig(vocab_size=64, **small, decoder_ffn_dim=16).save_pretrained(tmp_path / "bart")
    says("bart is not BERT", new_head, tmp_path / "bart", CLASS, ["a", "b"])
    (tmp_path / "none").mkdir()
    says("holds no model", new_head, tmp_path / "none", CLASS, ["a", "b"])
    body("bert").config.save_pretrained(tmp_path / "empty")
    says("cannot be loaded", new_head, tmp_path / "empty", CLASS, ["a", "b"], "mean")
    config = body("bert").config
    config.num_hidden_layers = 3
    body("bert").save_pretrained(tmp_path / "deeper")
    config.save_pretrained(tmp_path / "deeper")
    says("weights of the body are missing", new_head, tmp_path / "deeper", CLASS, ["a", "b"])
    cut = tmp_path / "deeper" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    says("copy it again", new_head, tmp_path / "deeper", CLASS, ["a", "b"])
    body("bert").save_pretrained(tmp_path / "mute")
    says("holds no tokenizer", new_head, tmp_path / "mute", CLASS, ["a", "b"])
    AutoTokenizer.from_pretrained(folders / "bert").save_pretrained(tmp_path / "mute")
    says("ids up to", new_head, tmp_path / "mute", CLASS, ["a", "b"])


# ---- tags


@pytest.mark.parametrize("family", FAMILIES)
def test_tags_of_words_come_back_through_sub_tokens(folders, family):
    tok = AutoTokenizer.from_pretrained(folders / family)
    names = ["O", "B-X", "I-X"]
    text = "The kingdom of Burkina Faso has gold, 金 and zirconium"
    spans = [(15, 27), (44, 53)]
    tokens = read_tokens(text, tok)
    gold = [dict(start=a, end=b, label="X") for a, b in spans]
    labels = align_labels(tokens, gold, names=names)
    noise = torch.randint(0, 3, (len(tokens),), generator=torch.Generator().manual_seed(0))
    chosen = [n if x == -100 else x for x, n in zip(labels, noise.tolist(), strict=True)]
    found = tag_spans(F.one_hot(torch.tensor(chosen), 3).float(), tokens, names)
    assert [(s["start"], s["end"]) for s in found] == spans
    assert [s["text"] for s in found] == [text[a:b] for a, b in spans]
    says("logits", tag_spans, torch.zeros(1, 3), tokens, names)


# ---- spans


@settings(max_examples=40, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 8))
def test_best_spans_equal_trying_all_pairs(seed, width, longest):
    g = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, 3, width, generator=g) * 3
    allowed = torch.rand(3, width, generator=g) < 0.7
    first, last, log_p = best_spans(start, end, allowed, longest)
    for b in range(3):
        pairs = {
            (i, j): (start[b, i].double() + end[b, j].double()).item()
            for i, j in itertools.product(range(width), repeat=2)
            if i <= j < i + longest and allowed[b, i : j + 1].all()
        }
        if not pairs:
            assert (first[b], last[b], log_p[b]) == (-1, -1, -torch.inf)
            continue
        best = max(pairs, key=pairs.get)
        assert (first[b].item(), last[b].item()) == best
        wanted = pairs[best] - torch.tensor(list(pairs.values())).logsumexp(0)
        assert abs(log_p[b] - wanted) < 1e-5
    says("max_tokens", best_spans, start, end, allowed, 0)


QUESTIONS = [
    ("What metal?", "The metal is 金, or gold. 😀", "gold", 16),
    ("哪个元素？", "秘鲁有金和铜。", "铜", 5),
    ("What?", "The metal is iron", "gold", 4),
    ("What?", "The metal is iron", "", 0),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_read_back_word_for_word(folders, family):
    model, tok = new_head(folders / family, "span")
    rows = Dataset.from_list(
        [dict(question=q, context=c, answer=a, start=s) for q, c, a, s in QUESTIONS]
    )
    done = encode_questions(rows, tok, model.config)
    assert {r.split(":")[0] for r in done.dropped["reason"]} <= {"answer", "across a token"}
    assert len(done.kept) + len(done.dropped) == 4 and len(done.kept) >= 1
    for row in done.kept:
        first, last = row["offsets"][row["start_positions"]], row["offsets"][row["end_positions"]]
        assert row["context"][first[0] : last[1]] == row["answer"]
        assert len(row["offsets"]) == len(row["input_ids"])
    for row, found in zip(done.kept, read_answers(model, tok, done.kept), strict=True):
        assert found["text"] == row["context"][found["start"] : found["end"]] != ""
    alone = [read_answers(model, tok, done.kept.select([i]))[0] for i in range(len(done.kept))]
    both = read_answers(model, tok, done.kept)
    assert [a["text"] for a in alone] == [b["text"] for b in both]
    no_gold = encode_questions(rows.remove_columns(["answer", "start"]), tok, model.config)
    assert "start_positions" not in no_gold.kept.column_names and len(no_gold.kept) == 4
    says("no column context", encode_questions, rows.remove_columns("context"), tok, model.config)


# ---- choices


def test_asking_leaves_the_model_in_its_mode():
    model = body("gpt2").train()
    score_choices(model, [[5, 6]], [[[7], [8, 9]]])
    assert model.training and all(p.grad is None for p in model.parameters())


def alone(model, prompt, choice):
    "Log-probability of a candidate: one row, no cache, no padding"
    if model.config.is_encoder_decoder:
        labels = torch.tensor([choice])
        logits = model(torch.tensor([prompt]), labels=labels).logits[0]
    else:
        logits = model(torch.tensor([prompt + choice]), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1]
    return sum(x.log_softmax(-1)[c].item() for x, c in zip(logits, choice, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_choices_with_a_shared_prefix_equal_each_candidate_alone_in_float64(family):
    model = body(family).double()
    prompts = [[5, 6, 7, 8, 9, 10], [30, 31], [40]]
    choices = [[[20], [21, 22], [23, 24, 25]], [[2, 3]], [[3], [4, 5, 6, 7]]]
    wanted = [[alone(model, p, c) for c in cs] for p, cs in zip(prompts, choices, strict=True)]
    for size in (1, 2, 3):
        found = score_choices(model, prompts, choices, batch_size=size)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10, rtol=0)
    lengths = [[len(c) for c in cs] for cs in choices]
    found = score_choices(model, prompts, choices, lengths)
    for row, want, by in zip(found, wanted, lengths, strict=True):
        np.testing.assert_allclose(row, np.array(want) / by, atol=1e-10, rtol=0)


def test_the_prefix_is_computed_once(monkeypatch):
    model, seen = body("llama"), []
    forward = model.forward

    def counted(input_ids=None, **kwargs):
        seen.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    score_choices(model, [list(range(3, 43))], [[[1, 2], [3, 4], [5, 6], [7, 8]]])
    assert seen == [(1, 40), (4, 1)]


def test_probabilities_of_all_continuations_sum_to_one():
    model = body("gpt2", 8).double()
    every = [[a, b] for a in range(8) for b in range(8)]
    scores = score_choices(model, [[3, 4]], [every])[0]
    assert abs(np.exp(scores).sum() - 1) < 1e-10


def test_choices_that_cannot_be_scored_are_refused():
    says("no probability of a text", score_choices, body("bert"), [[1]], [[[2]]])
    says("no probability of a text", score_choices, pooled("gpt2"), [[1]], [[[2]]])
    says("prompt 0", score_choices, body("gpt2"), [[]], [[[2]]])
    says("prompt 1", score_choices, body("gpt2"), [[1], [1]], [[[2]], [[]]])
    says("longer than", score_choices, body("gpt2"), [[1] * 64], [[[2]]])
    says("and there are 1", score_choices, body("gpt2"), [[1]], [])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_choice_ids_are_those_of_the_whole_text(folders, family):
    tok = AutoTokenizer.from_pretrained(folders / family)
    for prompt, choices in [
        ("The capital of Peru is", [" Lima", " Paris, France", "land"]),
        ("the ele", ["ment", "phant"]),
        ("gold", [" is", " is a metal"]),
        ("首都是", ["利马", "北京"]),
    ]:
        shared, rest = choice_ids(tok, prompt, choices)
        for choice, ids in zip(choices, rest, strict=True):
            assert ids and shared + ids == tok(prompt + choice).input_ids
    for bad in ([], ["a", "a"], [""], "ab"):
        says("list of different texts", choice_ids, tok, "x", bad)


def test_labels_as_answers_end_with_the_end_token():
    model, tok = load_model("atlas:decoder")
    prompts, ends = label_choices(tok, ["Gold melts.", "鸟会飞。"], "Topic?", ["one", "one more"])
    assert [tok.decode(e) for e in ends[0]] == ["one<|im_end|>", "one more<|im_end|>"]
    assert "Gold melts." in tok.decode(prompts[0]) and ends[0] == ends[1]
    scores = score_choices(model, prompts, ends)
    assert all(s < 0 for row in scores for s in row)
    rows = instruction_rows(["Gold melts."], "Topic?", ["one"])
    assert rows[0]["messages"][1] == {"role": "assistant", "content": "one"}
    says("is there twice", label_choices, tok, ["x"], "Topic?", ["a", "a"])
    says("needs 1", label_choices, tok, ["x"], "Topic?", [])

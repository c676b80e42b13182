"""Inspecting: a sound tokenizer and model, broken in one way at a time; the audit names that one and no other."""

import copy
import json
import types
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from instruct_ft.atlas.corpus import corpus
from instruct_ft.atlas.facts import atlas_path
from instruct_ft.atlas.tokenizers import FAMILIES, new_tokenizer
from instruct_ft.settings import InputError
from instruct_ft.tokenization import inspect as module
from instruct_ft.tokenization.inspect import CHECKS, audit, diff_tokenizers

FOLDER = atlas_path("decoder")
MODEL = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
_trained = {}


def family(name):
    "A small tokenizer of a family, a new object each time"
    if name not in _trained:
        docs = list(islice(corpus(0), 250))
        _trained[name] = new_tokenizer(name, docs, 1500).backend_tokenizer.to_str()
    core = Tokenizer.from_str(_trained[name])
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **FAMILIES[name][2])


def atlas():
    return AutoTokenizer.from_pretrained(FOLDER)


def names(report, status="fail"):
    return {c.name for c in report.checks if c.status == status and not c.unchecked}


# --- faults: each changes a tokenizer t or its model m ---


def edited(change):
    "A change of the tokenizer's JSON"

    def fault(t, m):
        spec = json.loads(t.backend_tokenizer.to_str())
        change(spec)
        t._tokenizer = Tokenizer.from_str(json.dumps(spec))

    return fault


def put(where, name, value):
    return lambda t, m: setattr({"t": t, "m": m}[where], name, value)


def config(which, name, value):
    return lambda t, m: setattr(getattr(m, which), name, value)


def added(token):
    return lambda t, m: t.add_tokens([token])


def template(old, new):
    return lambda t, m: setattr(t, "chat_template", t.chat_template.replace(old, new))


def encoding(change):
    "What the tokenizer returns is changed by a function of it"

    def fault(t, m):
        def wrong(self, text, *args, **kwargs):
            out = type(self)._encode_plus(self, text, *args, **kwargs)
            change(text, out)
            return out

        t._encode_plus = types.MethodType(wrong, t)

    return fault


def shifted(by):
    def change(text, out):
        if "offset_mapping" in out:
            size = len(text)
            move = lambda x: x + by if by > 0 else max(0, min(size, x + by))
            out["offset_mapping"] = [(move(a), move(b)) for a, b in out["offset_mapping"]]

    return encoding(change)


def forgets_in_batches(text, out):
    if isinstance(text, list) and len(text) > 2 and isinstance(text[0], str):
        out["input_ids"] = [ids[:-1] for ids in out["input_ids"]]


def saving(change):
    "What is saved is changed by a function of the folder"

    def fault(t, m):
        def wrong(self, folder, *args, **kwargs):
            type(self).save_pretrained(self, folder, *args, **kwargs)
            change(Path(folder))

        t.save_pretrained = types.MethodType(wrong, t)

    return fault


def without_last_added(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [a for a in spec["added_tokens"] if a["content"] != "<|im_start|>"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def in_lower_case(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def around(spelling, ids):
    def fault(t, m):
        special = [
            (token, ids.get(token, t.get_vocab()[token]))
            for token in spelling.split()
            if token[0] != "$"
        ]
        t.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=spelling, pair=f"{spelling} $B", special_tokens=special
        )

    return fault


def both_write_bos(t, m):
    t.bos_token = "<|im_start|>"
    around("<|im_start|> $A", {})(t, m)


def twins(spec):
    vocab, inside = spec["model"]["vocab"], {p for pair in spec["model"]["merges"] for p in pair}
    inside |= {"".join(pair) for pair in spec["model"]["merges"]}
    a, b = [t for t in vocab if t not in inside and not t.startswith("<")][:2]
    vocab[a] = vocab[b]


def without_a_byte(spec):
    del spec["model"]["vocab"]["<0xE7>"]


def unknown_is_the_end(t, m):
    edited(lambda spec: spec["model"].update(unk_id=1))(t, m)
    t.unk_token = "</s>"


def new_table(rows):
    def fault(t, m):
        m.lm_head = torch.nn.Linear(m.config.hidden_size, rows, bias=False)

    return fault


def loose(t, m):
    m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.detach().clone())


def row(i, value):
    return lambda t, m: m.get_input_embeddings().weight.data[i].fill_(value)


FAULTS = [  # the check that has to name it, the tokenizer, the fault
    ("encodes-anything", "bert", edited(lambda s: s["model"].update(unk_token="[GONE]"))),
    (
        "same-text-same-ids",
        "atlas",
        lambda t, m: setattr(t.backend_tokenizer.model, "dropout", 0.5),
    ),
    ("alone-batch-threads-agree", "atlas", encoding(forgets_in_batches)),
    ("roles-exist", "atlas", put("t", "eos_token", "<end>")),
    ("roles-exist", "llama", put("t", "bos_token", "<begin>")),
    ("roles-are-special", "atlas", edited(lambda s: s["added_tokens"][2].update(special=False))),
    ("roles-are-special", "atlas", put("t", "sep_token", "a")),
    ("pad-is-not-end", "atlas", put("t", "pad_token", "<|im_end|>")),
    ("pad-is-not-end", "gpt", put("t", "pad_token", "<|endoftext|>")),
    ("unknown-is-apart", "t5", unknown_is_the_end),
    ("unknown-is-named", "bert", put("t", "unk_token", "[PAD]")),
    ("bytes-are-complete", "llama", edited(without_a_byte)),
    ("bytes-are-plain", "llama", added(AddedToken("<0x41>", special=True))),
    ("ids-lead-back", "llama", edited(twins)),
    ("every-id-decodes", "gpt", added(AddedToken("<|café|>", special=True))),
    (
        "text-comes-back",
        "gpt",
        lambda t, m: setattr(t.backend_tokenizer, "decoder", decoders.Fuse()),
    ),
    (
        "text-comes-back",
        "llama",
        lambda t, m: setattr(t.backend_tokenizer, "decoder", decoders.Fuse()),
    ),
    (
        "text-comes-back",
        "bert",
        lambda t, m: setattr(t.backend_tokenizer, "decoder", decoders.Fuse()),
    ),
    ("added-tokens-fire", "gpt", added(AddedToken("<|end|>", special=True, single_word=True))),
    ("added-tokens-match-exactly", "bert", added(AddedToken("COVID-19", single_word=True))),
    ("added-tokens-stay-out-of-words", "gpt", added("art")),
    ("added-tokens-stay-out-of-words", "gpt", added(AddedToken("party", special=True))),
    ("added-tokens-keep-spaces", "gpt", added(AddedToken("<x>", lstrip=True))),
    ("added-tokens-keep-spaces", "llama", added(AddedToken("<x>", rstrip=True))),
    ("offsets-are-in-order", "gpt", shifted(1)),
    ("offsets-point-at-words", "gpt", shifted(-1)),
    (
        "nothing-vanishes",
        "atlas",
        lambda t, m: setattr(t.backend_tokenizer, "normalizer", normalizers.Replace("7", "")),
    ),
    ("decoding-keeps-spaces", "t5", put("t", "clean_up_tokenization_spaces", True)),
    (
        "borders-are-right",
        "bert",
        lambda t, m: setattr(t.backend_tokenizer, "post_processor", processors.Sequence([])),
    ),
    ("borders-are-right", "atlas", around("<|im_start|> $A", {"<|im_start|>": 77})),
    ("padding-is-masked", "atlas", put("t", "model_input_names", ["input_ids"])),
    ("truncation-keeps-the-start", "atlas", put("t", "truncation_side", "left")),
    ("padding-side", "bert", put("t", "padding_side", "left")),
    ("window", "atlas", put("t", "model_max_length", 1024)),
    ("window", "bert", put("t", "model_max_length", 2)),
    ("template-is-there", "gpt", put("t", "chat_template", {"tool_use": "{{ 1 }}"})),
    ("template-renders", "atlas", put("t", "chat_template", "{{ raise_exception('no') }}")),
    ("template-renders", "atlas", put("t", "chat_template", "{% for m in messages %}")),
    ("template-keeps-messages", "atlas", template("m['content']", "m['content'].lower()")),
    ("template-keeps-messages", "atlas", template("m['content'] }}", "m['role'] }}")),
    ("answers-end", "atlas", template("<|im_end|>", "")),
    ("prompt-is-as-trained", "atlas", template("<|im_start|>assistant", "<|im_start|>bot")),
    ("prompt-opens-the-answer", "atlas", template("add_generation_prompt", "false")),
    ("ends-are-stops", "atlas", config("generation_config", "eos_token_id", 77)),
    ("one-bos", "atlas", both_write_bos),
    ("added-tokens-are-saved", "atlas", saving(without_last_added)),
    ("saved-ids-are-the-same", "atlas", saving(in_lower_case)),
    (
        "settings-are-saved",
        "atlas",
        saving(lambda folder: (folder / "chat_template.jinja").unlink()),
    ),
    ("ids-have-rows", "atlas", lambda t, m: t.add_special_tokens({"pad_token": "<pad>"})),
    ("ids-have-rows", "atlas", added("<more>")),
    ("config-agrees", "atlas", config("config", "pad_token_id", 77)),
    ("config-agrees", "atlas", config("config", "eos_token_id", 9999)),
    ("config-agrees", "atlas", put("t", "eos_token", "<|endoftext|>")),
    ("generation-config-agrees", "atlas", config("generation_config", "pad_token_id", 77)),
    ("head-has-the-same-rows", "atlas", new_table(6100)),
    ("head-is-tied", "atlas", loose),
    ("rows-are-trained", "atlas", row(2, 0.0)),
    ("rows-are-trained", "atlas", row(2, float("nan"))),
    (
        "model-takes-the-inputs",
        "atlas",
        put("t", "model_input_names", ["input_ids", "attention_mask", "token_type_ids"]),
    ),
]


@pytest.mark.parametrize(
    ("check", "who", "fault"), FAULTS, ids=[f"{c}-{w}-{i}" for i, (c, w, _) in enumerate(FAULTS)]
)
def test_a_planted_fault_is_named_and_no_other(check, who, fault):
    tokenizer = atlas() if who == "atlas" else family(who)
    model = copy.deepcopy(MODEL) if who == "atlas" else None
    fault(tokenizer, model)
    report = audit(tokenizer, model)
    assert names(report) == {check}, report
    assert report[check].why and report[check].mend and report[check].found


WARNED = [  # faults in some uses only: a warning, and no failure
    ("pad-is-set", put("t", "pad_token", None), {}),
    ("rows-have-ids", lambda t, m: m.resize_token_embeddings(9000, mean_resizing=False), {}),
    (
        "rows-are-trained",
        lambda t, m: (
            m.get_input_embeddings()
            .weight.data[77]
            .copy_(m.get_input_embeddings().weight.data.mean(0))
        ),
        {},
    ),
    ("window", put("t", "model_max_length", 10**30), {}),
    ("your-texts-are-known", lambda t, m: None, {"texts": ["ꙮ"]}),
    (
        "template-renders",
        template("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
        {},
    ),
]


@pytest.mark.parametrize(("check", "fault", "more"), WARNED, ids=[w[0] for w in WARNED])
def test_what_goes_wrong_in_some_uses_is_a_warning(check, fault, more):
    tokenizer, model = (family("bert"), None) if more else (atlas(), copy.deepcopy(MODEL))
    before = names(audit(tokenizer, model), "warn")
    fault(tokenizer, model)
    report = audit(tokenizer, model, **more)
    assert names(report, "warn") - before == {check}
    assert names(report) == set(), report


def test_every_check_can_fail_or_warn_or_only_notes():
    noted = {
        "ids-have-no-gaps",
        "accents-have-one-form",
        "word-lists-keep-spaces",
        "answers-are-marked",
    }
    elsewhere = {"answer-starts-apart", "typed-text-stays-text"}
    assert {c for c, _, _ in FAULTS} | {w[0] for w in WARNED} | noted | elsewhere == set(CHECKS)


# --- sound ones ---


@pytest.mark.parametrize("name", FAMILIES)
def test_sound_tokenizers_have_no_failure(name):
    report = audit(family(name), texts=["Lima is in Peru.", "秘鲁的首都是利马。", ""])
    assert report.failed == []
    assert [c.name for c in report.checks] == list(CHECKS)


def small_model(name, size):
    same = dict(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    if name == "bert":
        return BertForMaskedLM(BertConfig(**same, pad_token_id=0))
    if name == "roberta":
        roles = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, max_position_embeddings=514)
        return RobertaForMaskedLM(RobertaConfig(**same, **roles))
    if name == "t5":
        roles = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=size, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, **roles
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size,
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=512,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def test_the_sound_decoder_has_no_failure():
    assert audit(atlas(), MODEL).failed == []


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "gpt"])
def test_sound_models_of_other_kinds_have_no_failure(name):
    torch.manual_seed(0)
    tokenizer = family(name)
    model = small_model(name, len(tokenizer)).train()
    assert audit(tokenizer, model).failed == []
    assert model.training and all(m.training for m in model.modules())


@pytest.mark.parametrize(("name", "fault"), [("bert", "padding-side"), ("roberta", "window")])
def test_the_model_decides(name, fault):
    torch.manual_seed(0)
    tokenizer = family(name)
    model = small_model(name, len(tokenizer))
    if fault == "window":
        tokenizer.model_max_length = 514  # two of the 514 positions are reserved
    else:
        tokenizer.padding_side = "left"
    assert names(audit(tokenizer, model)) == {fault}


def test_learned_positions_make_left_padding_a_fault_and_rotary_ones_do_not():
    torch.manual_seed(0)
    tokenizer = atlas()
    tokenizer.padding_side = "left"
    assert audit(tokenizer, MODEL).failed == []
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.transformer.wpe.weight.data.normal_()
    assert names(audit(tokenizer, model)) == {"padding-side"}


# --- the pitfalls and the guarantees, by name ---


def test_p2_double_bos_is_found_on_the_way_over_text_and_when_the_template_writes_two():
    tokenizer = atlas()
    both_write_bos(tokenizer, None)
    assert "gives 2 of" in audit(tokenizer)["one-bos"].found
    tokenizer = family("llama")
    assert audit(tokenizer)["one-bos"].status == "ok"  # our template, which `encode` writes once
    tokenizer.chat_template = "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    assert names(audit(tokenizer)) == {"one-bos"}


def test_p3_a_merge_across_the_start_of_an_answer_is_a_warning():
    tokenizer = family("gpt")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + eos_token }}"
        "{% else %}{{ 'Q: ' + m['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    report = audit(tokenizer)
    assert report["answer-starts-apart"].status == "warn" and not report.failed


def test_p4_padding_with_the_end_token_is_a_fault_only_where_it_ends_answers():
    tokenizer = atlas()
    tokenizer.eos_token = "<|endoftext|>"  # as the pad token; answers end with <|im_end|>
    assert audit(tokenizer)["pad-is-not-end"].status == "note"
    assert audit(tokenizer)["ends-are-stops"].status == "warn"
    tokenizer.pad_token = "<|im_end|>"
    assert audit(tokenizer)["pad-is-not-end"].status == "fail"


def test_p6_a_word_in_a_script_without_spaces_and_a_single_character_are_no_faults():
    tokenizer = family("gpt")
    tokenizer.add_tokens(["东京", "û"])
    assert names(audit(tokenizer)) == set()


def test_p8_p9_bytes_lost_when_a_tokenizer_is_retrained_are_found():
    retrained = family("llama").train_new_from_iterator(["a b c " * 20, "Lima in Peru " * 20], 400)
    assert "bytes-are-complete" in names(audit(retrained))


def test_p10_p11_words_glued_and_accents_in_two_forms_are_noted():
    report = audit(family("gpt"))
    assert "'AngelaMerkel'" in report["word-lists-keep-spaces"].found
    assert report["accents-have-one-form"].status == "note"
    assert audit(family("t5"))["accents-have-one-form"].status == "ok"


def test_g6_typed_control_tokens_that_get_through_are_a_failure(monkeypatch):
    def naive(messages, tokenizer, template):
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        return types.SimpleNamespace(input_ids=ids)

    assert audit(atlas())["typed-text-stays-text"].status == "ok"
    monkeypatch.setattr(module, "encode", naive)
    assert names(audit(atlas())) == {"typed-text-stays-text"}


def test_g7_a_lossy_round_trip_says_which_step_lost_what():
    found = audit(family("bert"), texts=["Lima"])["text-comes-back"].found
    assert "unknown token" in found and "normaliser" in found and "spaces" in found
    assert audit(family("roberta"))["text-comes-back"].status == "ok"


@pytest.fixture(scope="module")
def subjects():
    return [module._Subject(family(name), None, "auto", []) for name in ("gpt", "llama")]


@given(st.text(max_size=60).filter(lambda t: t.isprintable() or not t))
@settings(max_examples=15, derandomize=True)
def test_g8_no_text_makes_the_offsets_or_the_round_trip_of_a_sound_tokenizer_fail(subjects, text):
    for subject in subjects:
        subject.texts = [text]
        for check in ("offsets-are-in-order", "nothing-vanishes", "text-comes-back"):
            assert module._run(check, subject).status != "fail", check


def test_g12_an_unknown_character_that_becomes_the_end_is_named_with_its_id():
    tokenizer = family("t5")
    unknown_is_the_end(tokenizer, None)
    assert "'</s>' (1), the eos token" in audit(tokenizer)["unknown-is-apart"].found


# --- gaps, missing roles, other shapes ---


def test_gaps_in_the_vocabulary_are_noted_and_beyond_len_a_warning():
    tokenizer = family("gpt")

    def gap(spec):
        vocab = spec["model"]["vocab"]
        last = max(vocab, key=vocab.get)
        vocab[last] += 10

    edited(gap)(tokenizer, None)
    report = audit(tokenizer)
    assert report["ids-have-no-gaps"].status == "warn" and not report.failed
    assert "10 ids have no token" in report["ids-have-no-gaps"].found


@pytest.mark.parametrize("role", ["bos", "eos", "unk", "pad", "sep", "cls", "mask"])
@pytest.mark.parametrize("name", ["bert", "gpt", "llama"])
def test_a_missing_role_is_no_failure_and_raises_nothing(name, role):
    tokenizer = family(name)
    setattr(tokenizer, f"{role}_token", None)
    report = audit(tokenizer)
    assert not {c.name for c in report.failed} - {"unknown-is-named"}
    assert not any("raises" in c.found for c in report.checks)


def test_nothing_is_changed():
    tokenizer, model = atlas(), copy.deepcopy(MODEL).train()
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.model.dropout = 0.1
    before = tokenizer.backend_tokenizer.to_str()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    audit(tokenizer, model)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.training


def test_bad_input_is_one_sentence():
    for args, match in [
        (dict(tokenizer="gpt2"), "no fast tokenizer"),
        (dict(tokenizer=atlas(), model=3), "no model"),
        (dict(tokenizer=atlas(), template="chatlm"), "not one of auto"),
        (dict(tokenizer=atlas(), texts="text"), "list of texts"),
        (dict(tokenizer=atlas(), texts=["a", None]), r"texts\[1\]"),
        (dict(tokenizer=atlas(), texts=["\ud800"]), "surrogate"),
    ]:
        with pytest.raises(InputError, match=match):
            audit(**args)
    with pytest.raises(InputError, match="no check 'x'"):
        audit(atlas())["x"]
    with pytest.raises(InputError, match="b: str is no fast"):
        diff_tokenizers(atlas(), "b")


def test_a_named_template_that_does_not_fit_fails_one_check():
    assert names(audit(family("llama"), template="chatml")) == {"template-is-there"}


def test_the_report_is_plain_and_escaped():
    tokenizer = family("gpt")
    tokenizer.add_tokens(["<script>x</script>art", "a\u202eb"])
    report = audit(tokenizer, texts=["<b>ꙮ</b>"])
    assert report.failed
    page = report._repr_html_()
    assert "<script" not in page and "<b>ꙮ" not in page
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert sum(report.counts.values()) == len(CHECKS)
    assert "\u202e" not in str(report) and str(report).splitlines()[1].startswith("fail ")


# --- two tokenizers ---


def test_a_tokenizer_differs_from_itself_in_nothing():
    diff = diff_tokenizers(atlas(), atlas(), ["Lima", "秘鲁"])
    assert diff.same and "no difference" in str(diff) and diff.to_dict()["same"]


def test_every_kind_of_difference_is_shown():
    a, b = family("gpt"), family("gpt")
    b.add_tokens(["art<br>"])
    b.pad_token = "<|endoftext|>"
    b.padding_side = "left"
    b.backend_tokenizer.normalizer = normalizers.Lowercase()
    texts = ["Lima", "lima", "modern art<br>", ""]
    diff = diff_tokenizers(a, b, texts)
    assert diff.vocabulary == {"only a": [], "only b": ["art<br>"], "moved": []}
    assert diff.special["pad_token"][0] == (None, None) and "art<br>" in diff.special
    assert diff.settings["padding_side"] == ("right", "left") and "normalizer" in diff.settings
    assert [d["text"] for d in diff.texts] == ["Lima", "modern art<br>"]
    first = diff.texts[1]
    shown = [repr(t) for t in a.tokenize(texts[2])[first["place"] :]]
    assert first["a"][0].startswith(shown[0])
    assert "<br>" not in diff._repr_html_() and "&lt;br&gt;" in diff._repr_html_()
    assert json.loads(json.dumps(diff.to_dict()))["compared"] == 4


def test_a_text_that_is_longer_in_one_differs_where_the_other_ends():
    a, b = family("gpt"), family("gpt")
    b.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    [d] = diff_tokenizers(a, b, ["Lima"]).texts
    assert (
        d["a"] == []
        and d["b"] == ["'<|endoftext|>' (0)"]
        and d["place"] == len(a("Lima")["input_ids"])
    )


def test_ids_that_moved_are_told():
    a, b = family("gpt"), family("gpt")

    def swap(spec):
        vocab = spec["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edited(swap)(b, None)
    assert sorted(diff_tokenizers(a, b).vocabulary["moved"]) == ["a", "b"]

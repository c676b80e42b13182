"""Unknown words: merges against `tokenizers`, retraining and extension over families, mapping that can be undone."""

import json
import re
import tempfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from instruct_ft.settings import InputError
from instruct_ft.tokenization.oov import (
    BYTES,
    KnownWords,
    add_byte_fallback,
    bpe_from_scratch,
    byte_state,
    coverage,
    draw_merges,
    embedding_neighbours,
    extend_vocabulary,
    merge_stages,
    nearest_word,
    train_tokenizer_like,
    unknown_id,
    worth_adding,
)

TEXTS = [
    "The patient has a fever and a cough. The doctor saw the patient (twice) today, at noon.",
    "What is the capital of Peru? The capital of Peru is Lima; it lies at the sea.",
    "患者有高血压病史。医生说：先休息。秘鲁的首都是利马。",
    "def f(x):\n    return x + 1\n",
]
SYLLABLES = "ba ke li mo nu ra se ti".split()
MORE = [*TEXTS * 2, " ".join(a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES)]
HARD = [
    *TEXTS,
    "",
    " ",
    "  two  spaces\n\n\ttab ",
    "naïve café e\u0301 ＡＢＣ 😁 👩‍👩‍👧",
    "typed </s> <s> <unk> <pad> <0x41> <0xE4> [MASK] [UNK] <|endoftext|> <|note|>",
    "asthmatic asthmas Asthma _asthma xasthma 高血糖 血压",
    "<0x41>",
    "</s>",
]
WORDS = ["asthma", "高血压"]
MINUS = AddedToken("<mask>", lstrip=True, special=True)
ASCII = [chr(c) for c in range(33, 127)]
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def wrapped(core, **roles):
    "The tokenizer as transformers has it"
    tok = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=77, **roles)
    tok.padding_side = "left"
    tok.chat_template = CHAT
    return tok


def learned(core, trainer, size, special, **how):
    "A tokenizer trained on the texts"
    kind = dict(vocab_size=size, special_tokens=special, show_progress=False) | how
    core.train_from_iterator(TEXTS * 3, trainer(**kind))
    return core


def bert():
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    core.decoder = decoders.WordPiece()
    core = learned(
        core, trainers.WordPieceTrainer, 230, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    )
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return wrapped(
        core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def byte_level(special, pre=None):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return learned(
        core,
        trainers.BpeTrainer,
        420,
        special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def gpt():
    "As GPT-2, with tokens added behind its vocabulary"
    tok = wrapped(
        byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tok.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<|note|>")])
    return tok


def roberta():
    core = byte_level(["<s>", "<pad>", "</s>", "<unk>", MINUS])
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    roles = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return wrapped(core, **roles, mask_token="<mask>", cls_token="<s>", sep_token="</s>")


def llama3():
    "Han characters and digits alone, a sequence of post-processors"
    cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in (r"\p{Han}", r"\p{N}{1,3}")]
    core = byte_level(
        ["<|begin|>", "<|end|>"],
        pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    )
    first = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    return wrapped(core, bos_token="<|begin|>", eos_token="<|end|>")


def t5():
    core = Tokenizer(models.Unigram())
    core.normalizer, core.pre_tokenizer = (
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
    )
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core = learned(
        core,
        trainers.UnigramTrainer,
        150,
        ["<pad>", "</s>", "<unk>", "<extra_id_0>"],
        unk_token="<unk>",
    )
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return wrapped(
        core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<extra_id_0>"],
    )


def ordinary_bytes(core):
    "Bytes that are no added tokens"
    spec = json.loads(core.to_str())
    spec["added_tokens"] = [a for a in spec["added_tokens"] if a["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(spec))


def sentencepiece(normalizer=None, pre=None):
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.pre_tokenizer = pre or pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", left=1),
    ]
    core.decoder = decoders.Sequence(steps)
    core = ordinary_bytes(
        learned(
            core, trainers.BpeTrainer, 450, ["<unk>", "<s>", "</s>", *BYTES], initial_alphabet=ASCII
        )
    )
    if normalizer:
        core.normalizer, spec = normalizer, None
        spec = json.loads(core.to_str()) | dict(pre_tokenizer=None)
        core = Tokenizer.from_str(json.dumps(spec))
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama():
    return sentencepiece()


def llama2():
    "No pre-tokenizer: a normaliser writes the spaces"
    return sentencepiece(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )


FIVE = dict(bert=bert, gpt=gpt, roberta=roberta, t5=t5, llama=llama)
ALL = FIVE | dict(llama3=llama3, llama2=llama2)
GROWING = [name for name in ALL if name != "t5"]


@pytest.fixture(scope="module")
def toks():
    "Every family once; nothing below changes them"
    return {name: make() for name, make in ALL.items()}


def plain(tok, text):
    "Ids of a text in which nothing is control"
    return tok(text, add_special_tokens=False, split_special_tokens=True).input_ids


def reload(tok):
    "The tokenizer after saving and loading"
    with tempfile.TemporaryDirectory() as folder:
        tok.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


# --- merges


def library_merges(texts, size):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return [tuple(m) for m in json.loads(core.to_str())["model"]["merges"]]


@settings(max_examples=150, derandomize=True)
@given(
    st.lists(st.text("ab", max_size=14), min_size=1, max_size=8)
    | st.lists(st.text("abc 中文é", max_size=12), min_size=1, max_size=20),
    st.integers(1, 25),
)
def test_bpe_from_scratch_gives_the_merges_of_tokenizers_ties_included(texts, n):
    ours = bpe_from_scratch(texts, n)
    size = len(set("".join("".join(texts).split())) | {a + b for a, b in ours})
    theirs = library_merges(texts, size)
    assert theirs == ours[: len(theirs)]
    assert len(theirs) == len(ours) or len({a + b for a, b in ours}) < len(ours)


def test_bpe_from_scratch_has_at_most_40_lines():
    import inspect

    from instruct_ft.tokenization import oov

    lines = [
        *inspect.getsource(oov._join).split("\n"),
        *inspect.getsource(bpe_from_scratch).split("\n"),
    ]
    assert len([x for x in lines if x.strip()]) <= 40


def test_merge_stages_end_where_the_model_cuts():
    merges = bpe_from_scratch(TEXTS, 60)
    vocab = {
        t: i
        for i, t in enumerate(
            dict.fromkeys([*sorted(set("".join(TEXTS))), *(a + b for a, b in merges)])
        )
    }
    model = models.BPE(vocab=vocab, merges=merges)
    names = ["patient", "patients", "capital", "首都"]
    assert merge_stages(names, merges)[0][0] == tuple("patient")
    assert merge_stages(names, merges)[-1] == [
        tuple(t.value for t in model.tokenize(w)) for w in names
    ]
    assert len(draw_merges(["a$b", "ab"], [("a", "b")]).axes) == 4


# --- coverage


@pytest.mark.parametrize("name", ALL)
def test_coverage_counts_what_the_tokenizer_does(toks, name):
    tok = toks[name]
    row = coverage({"d": HARD}, tok).loc["d"]
    assert row.tokens == sum(len(plain(tok, x)) for x in HARD)
    rare = coverage({"d": ["鿭鿮 fever"]}, tok).loc["d"]
    lossy = name in ("bert", "t5")
    assert (rare.unknown > 0) == lossy
    assert (rare.byte > 0) == (not lossy)
    known = coverage({"d": ["capital of Peru is Lima"]}, tok).loc["d"]
    assert known.unknown == 0 and known.words == 5


def test_coverage_words_by_hand():
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "c": 3}, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    row = coverage({"d": ["ab abc abc xyz"]}, wrapped(core)).loc["d"]
    assert (row.words, row.continued, row.unknown) == (4, 0.5, 0.25)  # xyz has no token at all
    assert row.never_whole == pytest.approx(2 / 3) and row.worst.split() == ["abc", "xyz"]


def test_coverage_of_nothing_and_bad_input(toks):
    assert coverage({"empty": []}, toks["gpt"]).loc["empty", "words"] == 0
    for bad in (TEXTS, {"d": "one text"}, {"d": [None]}, {"d": ["\ud800"]}):
        with pytest.raises(InputError):
            coverage(bad, toks["gpt"])
    with pytest.raises(InputError, match="fast tokenizer"):
        coverage({"d": TEXTS}, "gpt2")


def test_coverage_leaves_the_window_of_the_tokenizer_alone():
    tok = gpt()
    tok(TEXTS, truncation=True, max_length=4)
    before = tok.backend_tokenizer.to_str()
    assert coverage({"d": TEXTS}, tok).loc["d", "tokens"] > 16
    assert tok.backend_tokenizer.to_str() == before


# --- guarantee 12, pitfalls 8 and 9


def broken_t5():
    "Unknown characters get the id of the end, as where the id is wired in"
    tok = t5()
    spec = json.loads(tok.backend_tokenizer.to_str())
    spec["model"]["unk_id"] = 1
    return wrapped(
        Tokenizer.from_str(json.dumps(spec)), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_g12_no_unknown_character_becomes_eos_bos_or_pad(toks):
    for name, tok in toks.items():
        control = {tok.eos_token_id, tok.bos_token_id, tok.pad_token_id} - {None}
        assert not control & set(plain(tok, "鿭 😁 x")), name
    bad = broken_t5()
    assert bad.eos_token_id in plain(bad, "鿭")
    with pytest.raises(InputError, match="eos_token"):
        unknown_id(bad)
    with pytest.raises(InputError, match="eos_token"):
        coverage({"d": TEXTS}, bad)
    mended = train_tokenizer_like(bad, MORE, 120)
    assert mended.unk_token_id in plain(mended, "鿭")
    assert not {mended.eos_token_id, mended.pad_token_id} & set(plain(mended, "鿭 </s> <pad>"))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [390, 397])
def test_g12_a_retrained_tokenizer_has_the_size_the_template_and_the_roles(toks, name, size):
    old, size = toks[name], size + 60 * (name[:5] == "llama") if name != "t5" else size - 270
    new = train_tokenizer_like(old, MORE, size)
    ids = new.get_vocab()
    assert len(new) == len(ids) == size and sorted(ids.values()) == list(range(size))
    assert new.special_tokens_map == old.special_tokens_map
    assert new.extra_special_tokens == old.extra_special_tokens
    assert (new.chat_template, new.padding_side, new.model_max_length) == (CHAT, "left", 77)
    assert byte_state(new) == byte_state(old)
    flags = lambda t: {
        a.content: (a.lstrip, a.special, a.normalized) for a in t.added_tokens_decoder.values()
    }
    assert flags(new) == flags(old)
    frame = lambda t: t.convert_ids_to_tokens(t("a").input_ids)
    assert [x for x in frame(new) if x in flags(new)] == [x for x in frame(old) if x in flags(old)]
    again = reload(new)
    assert [again(x).input_ids for x in HARD] == [new(x).input_ids for x in HARD]


@pytest.mark.parametrize("name", ["gpt", "roberta", "llama", "llama2", "llama3"])
def test_g12_byte_tokenizers_lose_nothing_after_retraining(toks, name):
    new = train_tokenizer_like(toks[name], MORE, 402)
    for text in (x for x in HARD if not x.startswith(" ") or name not in ("llama", "llama2")):
        assert new.decode(plain(new, text)) == toks[name].decode(plain(toks[name], text)) == text


def test_p9_train_new_from_iterator_loses_bytes_and_template_and_ours_does_not(toks):
    theirs = toks["llama"].train_new_from_iterator(TEXTS, 402, show_progress=False)
    assert byte_state(theirs) == "missing" and theirs.chat_template is None
    ours = train_tokenizer_like(toks["llama"], TEXTS, 402)
    assert byte_state(ours) == "complete" and ours.chat_template == CHAT
    assert set(BYTES) <= ours.get_vocab().keys()
    assert ours.convert_tokens_to_ids("<0x41>") not in plain(ours, "<0x41>")


def test_p9_merges_do_not_cross_words_without_a_pre_tokenizer(toks):
    inner = re.compile("[^▁]▁")
    theirs = toks["llama2"].train_new_from_iterator(TEXTS * 3, 402, show_progress=False)
    assert any(inner.search(t) for t in theirs.get_vocab())
    ours = train_tokenizer_like(toks["llama2"], TEXTS * 3, 402)
    assert not any(inner.search(t) for t in ours.get_vocab())
    assert ours.backend_tokenizer.pre_tokenizer is None


def test_p9_plain_added_tokens_count_and_stay_plain(toks):
    new = train_tokenizer_like(toks["gpt"], TEXTS, 400)
    assert (
        len(new) == 400
        and not new.added_tokens_decoder[new.convert_tokens_to_ids("<|note|>")].special
    )
    assert new.added_tokens_decoder[new.convert_tokens_to_ids("<|im_end|>")].special


def test_p9_bad_sizes_and_texts_are_told(toks):
    for size, texts, said in [
        (100, TEXTS, "fixed tokens"),
        ("big", TEXTS, "fixed tokens"),
        (9000, TEXTS, "smaller"),
        (402, "one text", "list of texts"),
        (402, [1], "is no text"),
        (402, ["\udc80"], "surrogate"),
    ]:
        with pytest.raises(InputError, match=said):
            train_tokenizer_like(toks["gpt"], texts, size)
    with pytest.raises(InputError):
        train_tokenizer_like(toks["t5"], TEXTS, 9000)
    batches = train_tokenizer_like(toks["gpt"], iter([TEXTS[:2], TEXTS[2:]]), 402)
    assert batches.get_vocab() == train_tokenizer_like(toks["gpt"], TEXTS, 402).get_vocab()


def no_bytes(fallback, special=("<unk>",)):
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return wrapped(
        learned(core, trainers.BpeTrainer, 400, [*special], initial_alphabet=ASCII),
        unk_token="<unk>",
    )


def test_p8_byte_fallback_wrong_and_right():
    switched, special = no_bytes(True), no_bytes(True, ("<unk>", *BYTES))
    assert byte_state(switched) == "missing" and switched.unk_token_id in plain(switched, "😁")
    typed = special("<0x41>", add_special_tokens=False).input_ids
    assert byte_state(special) == "special" and special.convert_tokens_to_ids("<0x41>") in typed
    assert "ï" not in special.decode(special("naïve").input_ids, skip_special_tokens=True)
    with pytest.raises(InputError, match="special"):
        add_byte_fallback(special)
    right = add_byte_fallback(switched)
    assert byte_state(right) == "complete" and byte_state(switched) == "missing"
    for text in ("naïve 東京 😁", "<0x41>", "fever <0xE4>"):
        for tok in (right, reload(right)):
            assert tok.decode(tok(text).input_ids, skip_special_tokens=True) == text
    for text in ("The patient has a fever", "<0x41>"):
        assert right(text).input_ids == switched(text).input_ids


def test_p8_byte_fallback_over_five_families(toks):
    for name in ("gpt", "roberta", "llama"):
        assert add_byte_fallback(toks[name]) is toks[name]
    with pytest.raises(InputError, match="WordPiece"):
        add_byte_fallback(toks["bert"])
    right = add_byte_fallback(toks["t5"])
    text = "naïve 東京 😁 <0x41>"
    assert right.decode(plain(right, text)) == text
    assert toks["t5"].unk_token_id in plain(toks["t5"], "😁")
    assert [plain(right, x) for x in TEXTS[:2]] == [plain(toks["t5"], x) for x in TEXTS[:2]]


# --- extension


@pytest.mark.parametrize("name", GROWING)
def test_g10_a_word_is_one_token_in_every_position_and_nothing_else_changes(toks, name):
    old = toks[name]
    before = old.backend_tokenizer.to_str()
    found = extend_vocabulary(old, WORDS)
    assert old.backend_tokenizer.to_str() == before
    assert set(found.words.word) == set(WORDS) and not found.skipped
    ids = dict(zip(found.words.word, map(set, found.words.ids), strict=True))
    for new in (found.tokenizer, reload(found.tokenizer)):
        assert new.get_vocab().items() >= old.get_vocab().items()
        for text in ("asthma", "has asthma today", "asthma, and", "(asthma)", "an asthma"):
            coded = new(text, add_special_tokens=False, return_offsets_mapping=True)
            one = [
                o
                for i, o in zip(coded.input_ids, coded.offset_mapping, strict=True)
                if i in ids["asthma"]
            ]
            assert len(one) == 1 and text[slice(*one[0])].strip() == "asthma", (name, text)
            assert new.decode(coded.input_ids) == old.decode(plain(old, text)), (name, text)
        assert len(ids["高血压"] & set(plain(new, "患者有高血压病史"))) == 1
        for text in (x for x in HARD if "高血压" not in x and x != HARD[9]):
            assert plain(new, text) == plain(old, text), (name, text)
            assert new(text).input_ids == old(text).input_ids, (name, text)
        inside = plain(new, "asthmatic asthmas xasthma")
        assert inside == plain(old, "asthmatic asthmas xasthma")


@pytest.mark.parametrize("name", GROWING)
def test_text_typed_beside_a_new_word_stays_text(toks, name):
    new = extend_vocabulary(toks[name], WORDS).tokenizer
    names = [*BYTES, *(t.content for t in new.added_tokens_decoder.values() if t.special)]
    control = set(new.convert_tokens_to_ids([n for n in names if n in new.get_vocab()]))
    unknown = {new.unk_token_id}
    for typed in (
        "<0x41>",
        "</s>",
        "<s>",
        "<unk>",
        "<|endoftext|>",
        "<|im_end|>",
        "[SEP]",
        "<|end|>",
    ):
        for text in (
            f"高血压{typed}",
            f"{typed}高血压",
            f"(asthma{typed}",
            f"asthma {typed}",
            f"{typed} asthma",
        ):
            assert not (control - unknown) & set(plain(new, text)), (name, text)
            assert (
                typed.lower() in new.decode(plain(new, text)).replace(" ", "").lower()
                or name == "bert"
            )


def test_unigram_is_refused_with_the_reason(toks):
    with pytest.raises(InputError, match="Unigram"):
        extend_vocabulary(toks["t5"], WORDS)
    suffixed = wrapped(
        Tokenizer(models.BPE(vocab={"a</w>": 0}, merges=[], end_of_word_suffix="</w>"))
    )
    with pytest.raises(InputError, match="BPE"):
        extend_vocabulary(suffixed, WORDS)


def test_words_that_cannot_be_added_are_told(toks):
    found = extend_vocabulary(toks["gpt"], ["COVID-19", "data set", "asthma", "asthma"])
    assert list(found.words.word) == ["asthma"]
    assert found.skipped["COVID-19"] == found.skipped["data set"]
    assert found.skipped["data set"].startswith("the pre-tokenizer cuts it")
    again = extend_vocabulary(found.tokenizer, ["asthma"])
    assert again.rows == 0 and again.skipped == {"asthma": "one token already"}
    lower = extend_vocabulary(toks["bert"], ["Asthma", "asthma"])
    assert len(lower.words) == 1 and next(iter(lower.skipped.values())).startswith("the same")


def test_a_word_known_behind_a_space_only_gets_its_other_form(toks):
    tok = toks["gpt"]
    half = next(
        t[1:]
        for t in tok.get_vocab()
        if t[0] == "Ġ" and t[1:].isalpha() and len(t) > 5 and t[1:] not in tok.get_vocab()
    )
    found = extend_vocabulary(tok, [half])
    assert found.rows == 1 and len(found.words.ids[0]) == 2
    assert [len(plain(found.tokenizer, x)) for x in (f"({half}", f"a {half}")] == [2, 2]


def test_added_tokens_behind_the_vocabulary_keep_their_ids(toks):
    old = toks["gpt"]
    for new in (
        extend_vocabulary(old, WORDS).tokenizer,
        reload(extend_vocabulary(old, WORDS).tokenizer),
    ):
        for token in ("<|im_end|>", "<|note|>", "<|endoftext|>"):
            assert new.convert_tokens_to_ids(token) == old.convert_tokens_to_ids(token)
            assert new(token).input_ids == old(token).input_ids


def test_extension_chooses_what_saves_most_and_says_how_much(toks):
    texts = ["has asthma", "has asthma again", "has pneumonia"]
    found = extend_vocabulary(toks["gpt"], n=1, texts=texts)
    assert list(found.words.word) == ["asthma"] and found.rows == 2
    assert found.before == sum(len(plain(toks["gpt"], x)) for x in texts)
    assert found.after == sum(len(plain(found.tokenizer, x)) for x in texts) < found.before
    assert extend_vocabulary(toks["gpt"], n=0, texts=texts).rows == 0
    weighted = extend_vocabulary(toks["gpt"], {"pneumonia": 9, "asthma": 1}, 1)
    assert list(weighted.words.word) == ["pneumonia"]
    for bad in (dict(), dict(wanted="asthma"), dict(wanted=[3]), dict(wanted=["a"], n=-1)):
        with pytest.raises(InputError):
            extend_vocabulary(toks["gpt"], **bad)


def model_for(rows, tied):
    "A tiny Llama"
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **sizes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 64])
def test_the_model_grows_with_the_tokenizer_and_old_rows_stay(toks, tied, spare):
    tok = toks["gpt"]
    model = model_for(len(tok) + spare, tied)
    old = model.get_input_embeddings().weight.detach().clone()[: len(tok)]
    size = sum(p.numel() for p in model.parameters())
    found = extend_vocabulary(tok, WORDS, model=model)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == tied
    assert tables[0][: len(tok)].equal(old)
    new = sorted(i for ids in found.words.ids for i in ids)
    assert tables[0][new[0]].allclose(old.mean(0), atol=1e-6) and max(new) < len(tables[0])
    assert found.parameters == sum(p.numel() for p in model.parameters()) - size
    assert found.parameters == (0 if spare else found.rows * 8 * (1 if tied else 2))
    assert (
        model(found.tokenizer("(asthma) 高血压", return_tensors="pt").input_ids)
        .logits.isfinite()
        .all()
    )


def test_worth_adding_is_what_extending_gives(toks):
    tok, texts = toks["gpt"], ["has asthma, has asthma", "患者有高血压", "plaintiff"]
    model = model_for(len(tok), tied=False)
    table = worth_adding(tok, texts, model)
    assert table.compute[0] == 1 and table.tokens[0] == sum(len(plain(tok, x)) for x in texts)
    assert (table.tokens.diff()[1:] < 0).all() and (table.rows.diff()[1:] > 0).all()
    whole = extend_vocabulary(tok, texts=texts)
    assert (
        table.tokens.iloc[-1] <= whole.after < table.tokens[0]
        and table.parameters.iloc[1] == 2 * 8 * 2
    )
    with pytest.raises(InputError, match="no model"):
        worth_adding(tok, texts, "gpt2")


# --- nearest known word


KNOWN = Counter(
    the=90, ten=3, tea=2, receive=8, relieve=5, government=9, 高血压=4, 肺炎=2, 肝炎=2, Peru=1
)


@settings(max_examples=150, derandomize=True)
@given(
    st.text("ab th中1,-'’高血压\n", max_size=30) | st.text(max_size=30),
    st.sets(st.text("abth", min_size=1, max_size=6)),
)
def test_g13_mapping_never_changes_a_known_word_is_deterministic_reports_and_can_be_undone(
    text, names
):
    from instruct_ft.data.preprocess import words

    names = {n: len(n) for n in names} | KNOWN
    known, other = KnownWords(names), KnownWords(dict(reversed(names.items())))
    mapped = known.map(text)
    assert mapped == other.map(text) == known.map(text)
    assert mapped.undo() == text
    kept = [w for w in words(text) if w in names]
    assert all(
        c.before not in names and c.after in names and c.distance > 0 for c in mapped.changes
    )
    assert all(text[c.start : c.start + len(c.before)] == c.before for c in mapped.changes)
    assert not {c.before for c in mapped.changes} & set(kept)


def test_g13_ties_go_to_the_frequent_word_then_to_the_alphabet():
    known = KnownWords(KNOWN)
    assert known.nearest("teh") == ("the", 1)
    assert known.nearest("tex") == ("ten", 1)
    assert nearest_word("goverment", KNOWN) == ("government", 1)
    assert nearest_word("ab1", ["abc"]) is None and nearest_word("xx", ["xy"]) is None
    assert nearest_word("abx", ["aby", "abw"]).word == "abw"
    assert known.nearest("肺火") is None and known.nearest("高血亚") == ("高血压", 1)
    assert known.map("Teh recieve 2024 the").text in (
        "the receive 2024 the",
        "Teh receive 2024 the",
    )
    with pytest.raises(InputError):
        KnownWords("word")


def test_g13_nearest_is_the_minimum_over_all_words():
    import random

    from rapidfuzz.distance import OSA

    rng = random.Random(0)
    names = {"".join(rng.choices("abc", k=rng.randint(3, 8))): rng.randint(1, 3) for _ in range(60)}
    known = KnownWords(names)
    for _ in range(100):
        word = "".join(rng.choices("abc", k=rng.randint(3, 9)))
        best = min((OSA.distance(word, w), -n, w) for w, n in names.items())
        assert known.nearest(word) == ((best[2], best[0]) if best[0] <= known.room(word) else None)


def test_embedding_neighbours_find_the_largest_cosine(toks):
    tok = toks["gpt"]
    model, known = model_for(len(tok), tied=True), KnownWords(["fever", "cough", "doctor"])
    found = embedding_neighbours(["cough", "coughs", "Lima"], known, tok, model)
    assert found[0] == ("cough", 0) and found[0].distance == 0
    assert all(f.word in known for f in found) and found == embedding_neighbours(
        ["cough", "coughs", "Lima"], known, tok, model
    )
    with pytest.raises(InputError):
        embedding_neighbours(["x"], KnownWords([]), tok, model)

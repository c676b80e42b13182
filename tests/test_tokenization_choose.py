"""Comparing tokenizers: every figure against a slow oracle, over families and over tokenizers with the faults that are found in the field."""

import math
from collections import Counter, defaultdict
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from instruct_ft.atlas.corpus import corpus
from instruct_ft.atlas.tokenizers import FAMILIES, new_tokenizer
from instruct_ft.data.preprocess import words
from instruct_ft.settings import InputError
from instruct_ft.tokenization import choose
from instruct_ft.tokenization.choose import (
    LOSSES,
    ModelSize,
    compare_tokenizers,
    model_size,
    renyi_efficiency,
    unit,
)

EN = [
    "The capital of Peru is Lima.",
    "Peru has 1,234 km of coast; it's long.",
    "Lima? Lima!",
    "a  b",
]
ZH = ["秘鲁的首都是利马。", "秘鲁有1234公里海岸，很长。", "利马？利马！", "你好 world"]
HARD = [
    "", " ", "\n\n", "naïve café e\u0301", "👩‍👩‍👧 😁", "\u200b\ufeff", "鿭𠮷", "x▁y", "</s> [MASK] <unk>",
    "ไปลิมา", "Ｌｉｍａ　５０％", "def f(x):\n\treturn x", "  two  spaces ", "\x00\x07", "<0x41>", "İ ß ﬁ",
]  # fmt: skip


def wrap(core, **how):
    return PreTrainedTokenizerFast(tokenizer_object=core, **how)


def llama2():
    "As SentencePiece models were first converted: no pre-tokenizer, the mark comes from the normaliser"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [
        "▁",
        "L",
        "i",
        "m",
        "a",
        "▁L",
        "im",
        "ima",
        "▁Lima",
        "e",
        "s",
        "is",
        "▁is",
        "秘",
        "鲁",
        "秘鲁",
    ]
    merges = [
        ("▁", "L"),
        ("i", "m"),
        ("im", "a"),
        ("▁L", "ima"),
        ("i", "s"),
        ("▁", "is"),
        ("秘", "鲁"),
    ]
    how = dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, **how))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1),
    ]
    core.decoder = decoders.Sequence(parts)
    return wrap(core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def words_only():
    "Words with holes among the ids"
    vocab = {"[UNK]": 0, "Lima": 1, "is": 2, "big": 7}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(core, unk_token="[UNK]")


def drops():
    "BPE without an unknown token: what it does not know is gone without a trace"
    core = Tokenizer(models.BPE({c: i for i, c in enumerate("Lima")}, []))
    return wrap(core)


@pytest.fixture(scope="module")
def toks():
    docs = list(islice(corpus(0), 120))
    found = {family: new_tokenizer(family, docs, 1500) for family in FAMILIES}
    return found | dict(llama2=llama2(), words=words_only(), drops=drops())


# the oracle: one text, one token and one pair at a time


def visible(c):
    import unicodedata

    return not c.isspace() and unicodedata.category(c) not in ("Mn", "Me", "Mc", "Cc", "Cf")


UNKNOWN = dict(bert="[UNK]", t5="<unk>", llama="<unk>", llama2="<unk>", words="[UNK]")


def is_mark(name, piece):
    if name in ("gpt", "roberta"):
        return set(piece) <= set("ĠĊĉčĀ") and "Ā" not in piece
    return name in ("t5", "llama", "llama2") and set(piece) == {"▁"}


def slow(name, tok, texts):
    core = tok.backend_tokenizer
    unk = tok.convert_tokens_to_ids(UNKNOWN[name]) if name in UNKNOWN else None
    n, types, back = Counter(), defaultdict(list), []
    for text in texts:
        full = tok(text, split_special_tokens=True, add_special_tokens=False)
        e = full.encodings[0]
        kind = unit(text)
        n[kind, "tokens"] += len(e.ids)
        n["tokens"] += len(e.ids)
        n["unknown"] += e.ids.count(unk)
        n["part"] += sum("\ufffd" in core.decode([i], skip_special_tokens=False) for i in e.ids)
        n["bytes"] += sum(p.startswith("<0x") and len(p) == 6 for p in e.tokens)
        real = [
            (a, b, i)
            for i, p, (a, b) in zip(e.ids, e.tokens, e.offsets, strict=True)
            if a < b and not is_mark(name, p)
        ]
        n["visible"] += sum(map(visible, text))
        n[kind, "characters"] += sum(map(visible, text))
        n["lost"] += sum(
            visible(c) and not any(a <= k < b and i != unk for a, b, i in real)
            for k, c in enumerate(text)
        )
        at = 0
        for w in words(text):
            if any(map(visible, w)):
                over = [i for a, b, i in real if a < at + len(w) and b > at]
                n[kind, "words"] += 1
                n["words"] += 1
                n["continued"] += len(over) > 1
                types[w].append(len(over) == 1 and over[0] != unk)
            at += len(w)
        back.append(core.decode(e.ids, skip_special_tokens=False) == text)
    n["strr"] = sum(sum(v) / len(v) for v in types.values()) / len(types)
    n["loss"] = 1 - sum(back) / len(back)
    return n


def share(a, b):
    return None if b == 0 else pytest.approx(a / b)


def agree(name, tok, texts):
    line, n = compare_tokenizers({name: tok}, texts)[name], slow(name, tok, texts)
    assert line.tokens == n["tokens"]
    assert line.per_word == share(n["word", "tokens"], n["word", "words"])
    assert line.per_character == share(n["character", "tokens"], n["character", "characters"])
    assert line.unknown == share(n["unknown"], n["tokens"])
    assert line.byte_fallback == share(n["bytes"], n["tokens"])
    assert line.part_characters == share(n["part"], n["tokens"])
    assert line.lost == share(n["lost"], n["visible"])
    assert line.continued == share(n["continued"], n["words"])
    assert line.strr == pytest.approx(n["strr"])
    assert line.round_trip_loss == pytest.approx(n["loss"])
    assert sum(line.losses.values()) == pytest.approx(line.round_trip_loss)


NAMES = [*FAMILIES, "llama2", "words", "drops"]


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_agrees_with_the_oracle(toks, name):
    for texts in (EN, ZH, [*EN, *ZH, *list(islice(corpus(5), 10))]):
        agree(name, toks[name], texts)


ANY = st.text(
    st.sampled_from("Lima is 秘鲁的。,\n\té\u0301😁\u200d👩▁<>0xA[]鿭ไİ\u3000Ｌ"), max_size=12
)


@pytest.mark.parametrize("name", NAMES)
def test_p10_offsets_of_any_text_are_read_right(toks, name):
    "Bytes that share a character, marks that claim a letter, tokens without width"

    @settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(ANY, min_size=1, max_size=4))
    def check(texts):
        agree(name, toks[name], [*texts, "Lima"])

    check()


@pytest.mark.parametrize("name", NAMES)
def test_hard_texts_give_figures_and_never_nan(toks, name):
    agree(name, toks[name], HARD)
    table = compare_tokenizers({name: toks[name]}, HARD, size=ModelSize(1e6, 64))
    flat = [v for v in asdict(table[name]).values() if isinstance(v, float)]
    assert flat
    assert all(map(math.isfinite, flat))
    assert "nan" not in repr(table).lower()
    assert "nan" not in table._repr_html_().lower()


# pitfalls and guarantees


def test_p9_unknown_is_what_the_model_gives_and_not_what_it_is_called():
    pieces = [("<unk>", 0.0), ("▁Lima", -1.0), ("</s>", 0.0), ("▁", -3.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=2))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok = wrap(core, unk_token="<unk>", eos_token="</s>")
    line = compare_tokenizers(dict(t=tok), ["Lima 秘鲁"])["t"]
    assert tok.unk_token_id not in tok("Lima 秘鲁").input_ids
    assert (line.unknown, line.lost) == (1 / 3, 2 / 6)


def test_a_name_for_the_unknown_token_alone_makes_none(toks):
    assert toks["gpt"].unk_token == "<|endoftext|>"
    line = compare_tokenizers(toks, ["see <|endoftext|> 鿭"])["gpt"]
    assert (line.unknown, line.lost, line.round_trip_loss) == (0, 0, 0)


def test_p8_byte_fallback_without_byte_tokens_is_no_fallback():
    core = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True))
    line = compare_tokenizers(dict(t=wrap(core)), ["aé"])["t"]
    assert (line.byte_fallback, line.unknown, line.lost) == (0, 1 / 2, 1 / 2)


def test_byte_tokens_are_counted_and_are_parts_only_beyond_ascii(toks):
    line = compare_tokenizers(dict(t=toks["llama2"]), ["Lima\té"])[
        "t"
    ]  # ▁Lima <0x09> <0xC3> <0xA9>
    assert (line.byte_fallback, line.part_characters, line.lost) == (3 / 4, 2 / 4, 0)


def test_one_unknown_token_for_a_whole_text_is_all_of_its_characters(toks):
    line = compare_tokenizers(dict(t=toks["t5"]), ["Lima", "𠮷鿭𠮷鿭𠮷鿭"])["t"]
    assert line.unknown < 0.3
    assert line.lost == 6 / 10


def test_p12_bert_does_not_come_back_and_the_table_says_why(toks):
    texts = ["lima", "Lima", "a  b", "don't", "x 😁"]
    losses = compare_tokenizers(toks, texts)["bert"].losses
    assert losses == {"unknown": 1 / 5, "changed": 1 / 5, "white space": 2 / 5}
    assert set(losses) == set(LOSSES)


def test_g7_lossless_tokenizers_lose_nothing_on_any_text(toks):
    @settings(max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12))
    def check(texts):
        table = compare_tokenizers({n: toks[n] for n in ("gpt", "roberta")}, ["a", *texts])
        assert [m.round_trip_loss for m in table.lines] == [0, 0]
        assert [m.lost for m in table.lines] == [0, 0]

    check()


def test_p7_control_tokens_that_were_typed_count_as_text(toks):
    for name, text in dict(
        gpt="<|endoftext|>", roberta="</s>", llama="</s>", bert="[MASK]"
    ).items():
        line = compare_tokenizers({name: toks[name]}, [text])[name]
        plain = toks[name](text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert line.tokens == len(plain) > 1


def test_tokens_that_were_added_count_whole(toks):
    for normalized in (True, False):
        tok = new_tokenizer("gpt", EN * 5, 300)
        tok.add_tokens([AddedToken("Vientiane", normalized=normalized, single_word=True)])
        before = compare_tokenizers(dict(t=tok), ["in Lima"])["t"]
        line = compare_tokenizers(dict(t=tok), ["Vientiane"])["t"]
        assert (line.tokens, line.strr, line.part_characters) == (1, 1, 0)
        assert line.vocabulary == before.vocabulary == len(tok)


def test_parity_is_never_shown_without_what_was_lost(toks):
    found = compare_tokenizers(toks, dict(en=["Lima is big", "is"], zh=["利马很大", "是"])).parity()
    assert found.premium["words"] == dict(en=1, zh=0.5)
    assert found.lost["words"] == dict(en=0, zh=1)
    line = next(x for x in repr(found).splitlines() if x.startswith("words"))
    assert "(0.50) 100.0% lost" in line
    assert "100.0% lost" in found._repr_html_()


# the other figures


def test_renyi_efficiency_against_the_definition():
    rng = np.random.default_rng(0)
    for size in (2, 5, 300):
        counts = rng.integers(0, 50, size)
        counts[0] = 1
        p = [float(c) / counts.sum() for c in counts if c]
        for alpha in (0.5, 2.0, 2.5, 7):
            want = math.log(sum(x**alpha for x in p)) / (1 - alpha) / math.log(size)
            assert renyi_efficiency(counts, size, alpha) == pytest.approx(want, abs=1e-12)
        shannon = -sum(x * math.log(x) for x in p) / math.log(size)
        assert renyi_efficiency(counts, size, 1) == pytest.approx(shannon, abs=1e-12)
        assert renyi_efficiency([0, *counts, 0], size) == renyi_efficiency(counts, size)
        assert renyi_efficiency(counts * 3, size) == pytest.approx(renyi_efficiency(counts, size))
    assert renyi_efficiency([2, 2, 2], 3) == pytest.approx(1)
    assert [renyi_efficiency([], 3), renyi_efficiency([0], 3), renyi_efficiency([4], 1)] == [
        None
    ] * 3
    for bad in ([-1, 2], [math.nan], [math.inf]):
        with pytest.raises(InputError, match="counts of 0 or more"):
            renyi_efficiency(bad, 3)
    for alpha in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="alpha"):
            renyi_efficiency([1], 3, alpha)


def test_renyi_in_the_table_uses_the_whole_vocabulary(toks):
    ids = [i for x in EN for i in toks["gpt"](x).input_ids]
    p = [n / len(ids) for n in Counter(ids).values()]
    want = math.log(sum(x**2.5 for x in p)) / -1.5 / math.log(len(toks["gpt"]))
    assert compare_tokenizers(toks, EN)["gpt"].renyi == pytest.approx(want)


def test_lengths_are_nearest_ranks_with_special_tokens(toks):
    texts = list(islice(corpus(3), 37))
    for name, line in ((m.tokenizer, m) for m in compare_tokenizers(toks, texts, window=60).lines):
        sizes = sorted(len(toks[name](x).input_ids) for x in texts)
        for percent, got in ((50, line.length_50), (95, line.length_95), (99, line.length_99)):
            assert got == sizes[math.ceil(percent / 100 * len(sizes)) - 1]
        assert line.over_window == sum(s > 60 for s in sizes) / len(sizes)
        assert line.train_tokens == sum(sizes)


def test_the_window_is_the_tokenizers_own_or_given_or_said_to_be_unknown(toks):
    table = compare_tokenizers(toks, ["Lima"])
    assert [table[n].window for n in ("bert", "llama2")] == [512, None]
    assert table["llama2"].over_window is None
    assert "unknown" in repr(table).split("\n\n")[1]
    assert compare_tokenizers(toks, ["Lima"], window=9)["bert"].window == 9
    given = compare_tokenizers(toks, ["Lima"], window=dict(llama2=7))
    assert [given[n].window for n in ("bert", "llama2")] == [512, 7]


def test_flops_count_the_output_layer_and_rows_of_missing_ids(toks):
    size = ModelSize(parameters=1000, width=10, tied=False)
    line = compare_tokenizers(toks, ["Lima is big", "Peru"], size=size)["words"]
    assert line.vocabulary == 4
    assert line.flops == 6 * 4 * (1000 + 8 * 10)  # ids 0 to 7
    assert line.head_share == 80 / 1080
    assert line.embedding == 2 * 8 * 10
    without = compare_tokenizers(toks, ["Lima"])["words"]
    assert [without.flops, without.head_share, without.embedding] == [None] * 3


@pytest.mark.parametrize("tied", [True, False])
def test_model_size_leaves_out_embedding_and_head(tied):
    shape = dict(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=tied))
    names = dict(model.named_parameters(remove_duplicate=False))
    rest = sum(p.numel() for n, p in names.items() if "wte" not in n and "lm_head" not in n)
    assert model_size(model) == ModelSize(rest, 8, tied)
    assert model_size(model.transformer) == ModelSize(rest, 8, True)


@pytest.mark.parametrize(
    "bad", [dict(parameters=0, width=8), dict(parameters=8, width=-1), dict(parameters=math.nan, width=8),
            dict(parameters="7B", width=8), dict(parameters=math.inf, width=8), dict(parameters=True, width=8), dict(parameters=8, width=8.5)],
)  # fmt: skip
def test_a_model_size_that_is_none(bad):
    with pytest.raises(InputError, match="is no size"):
        ModelSize(**bad)


def test_the_size_of_what_is_no_model():
    with pytest.raises(InputError, match="a str has no token embedding"):
        model_size("gpt2")


# how it is called


def test_lists_columns_and_dicts_give_the_same(toks):
    some = {n: toks[n] for n in ("bert", "llama")}
    rows = Dataset.from_dict(dict(text=EN))
    whole = compare_tokenizers(some, EN)
    for texts in (tuple(EN), iter(EN), rows["text"], rows["text"][:]):
        assert compare_tokenizers(some, texts).lines == whole.lines
    both = compare_tokenizers(some, dict(en=rows["text"], zh=ZH))
    assert both.languages["en"].lines == whole.lines
    assert both.lines == compare_tokenizers(some, [*EN, *ZH]).lines
    assert whole.languages == {}


def test_blocks_change_nothing(toks, monkeypatch):
    texts = [*EN, "", *ZH]
    before = compare_tokenizers(toks, texts)
    monkeypatch.setattr(choose, "_BLOCK", 2)
    assert compare_tokenizers(toks, texts).lines == before.lines


def test_the_tokenizer_is_not_changed_and_its_own_truncation_plays_no_part():
    tok, free = (new_tokenizer("bert", EN * 5, 300) for _ in range(2))
    tok(EN, truncation=True, max_length=4, padding="max_length")
    tok.backend_tokenizer.enable_truncation(4)
    tok.backend_tokenizer.enable_padding(length=9)
    before = tok.backend_tokenizer.to_str()
    assert compare_tokenizers(dict(t=tok), EN).lines == compare_tokenizers(dict(t=free), EN).lines
    assert tok.backend_tokenizer.to_str() == before
    assert tok.backend_tokenizer.encode_special_tokens is False


def test_none_where_a_tokenizer_gives_no_token_at_all(toks):
    line = compare_tokenizers(toks, ["秘鲁"])["drops"]
    assert (line.tokens, line.per_character, line.lost, line.round_trip_loss) == (0, 0, 1, 1)
    assert (line.unknown, line.byte_fallback, line.renyi, line.per_word) == (None,) * 4
    assert line.losses["unknown"] == 1
    parity = compare_tokenizers(toks, dict(zh=["秘鲁"], en=["Lima"])).parity()
    assert parity.premium["drops"] == dict(zh=None, en=None)
    parity.plot()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there is no text"),
        (["", " \n", "\u200b"], "all of them are blank"),
        ({}, "there is no language"),
        (dict(en=["a"], zh=[]), r"texts\['zh'\]: there is no text"),
        ("Lima", "a str is no list"),
        (b"Lima", "a bytes is no list"),
        (7, "a int is no list"),
        (None, "a NoneType is no list"),
        (["a", None], "number 2 is None, a NoneType"),
        (["a", math.nan], "number 2 is nan, a float"),
        ([["a"]], "number 1 is .*, a list"),
        (dict(en=["a", 3]), r"texts\['en'\]: number 2 is 3"),
        (["ok", "half \ud800"], "number 2 holds half a character"),
        (Dataset.from_dict(dict(text=["a"], id=[1])), "give one of its columns: text, id"),
        (DatasetDict(train=Dataset.from_dict(dict(text=["a"]))), "give one of its columns: text"),
        (dict(en=dict(a="b")), "a dict is no list"),
    ],
)
def test_texts_that_are_none(toks, texts, message):
    with pytest.raises(InputError, match=message):
        compare_tokenizers(dict(gpt=toks["gpt"]), texts)


@pytest.mark.parametrize("window", [0, -1, True, 2.5, "512", dict(gpt=0), dict(other=5)])
def test_windows_that_are_none(toks, window):
    with pytest.raises(InputError, match="^window: "):
        compare_tokenizers(dict(gpt=toks["gpt"]), ["a"], window=window)


def test_tokenizers_that_are_none(toks):
    for bad in ({}, None, toks["gpt"], [toks["gpt"]]):
        with pytest.raises(InputError, match="give a dict from name to tokenizer"):
            compare_tokenizers(bad, ["a"])
    for bad in (None, object(), str.split, toks["gpt"].backend_tokenizer):
        with pytest.raises(InputError, match="tokenizer x: a .* is no fast tokenizer"):
            compare_tokenizers(dict(x=bad), ["a"])
    with pytest.raises(InputError, match="is no ModelSize"):
        compare_tokenizers(toks, ["a"], size=125e6)


def test_what_a_library_raises_becomes_one_sentence():
    nothing = Tokenizer(models.Unigram([("a", 0.0)], unk_id=None))
    with pytest.raises(InputError, match="tokenizer x: it cannot encode these texts"):
        compare_tokenizers(dict(x=wrap(nothing)), ["b"])

    class Cut:
        def pre_tokenize(self, text):
            text.split(lambda i, part: [part])

    own = words_only()
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Cut())
    with pytest.raises(InputError, match="tokenizer x: it cannot be copied"):
        compare_tokenizers(dict(x=own), ["b"])


def test_an_unknown_name_is_told(toks):
    with pytest.raises(InputError, match="there is no tokenizer 'elmo'"):
        compare_tokenizers(toks, ["a"])["elmo"]


def test_parity_needs_parallel_texts(toks):
    table = compare_tokenizers(toks, dict(en=EN, zh=ZH, de=EN[:3]))
    premium = table.parity(["zh", "en"]).premium["gpt"]
    sizes = [sum(len(toks["gpt"](x).input_ids) for x in group) for group in (ZH, EN)]
    assert premium == dict(zh=1, en=sizes[1] / sizes[0])
    with pytest.raises(InputError, match="4 in en, 4 in zh, 3 in de"):
        table.parity()
    with pytest.raises(InputError, match="no language 'fr'"):
        table.parity(["en", "fr"])
    with pytest.raises(InputError, match="two languages or more"):
        table.parity(["en"])
    with pytest.raises(InputError, match="as a dict by language"):
        compare_tokenizers(toks, EN).parity()


def test_tables_escape_and_pictures_are_drawn(toks):
    names = {"<b>$x$</b>": toks["gpt"], "bert": toks["bert"]}
    table = compare_tokenizers(names, dict(en=EN, zh=ZH), size=ModelSize(1e6, 64))
    for shown in (table._repr_html_(), table.parity()._repr_html_()):
        assert "<b>" not in shown
        assert "&lt;b&gt;$x$" in shown
    assert max(map(len, repr(compare_tokenizers(toks, EN)).splitlines())) <= 110
    assert len(table.plot()) == 4
    assert len(compare_tokenizers(names, EN, window=5).plot()) == 3
    ax = table.parity().plot()
    ax.figure.canvas.draw()
    hollow = [bar.get_hatch() for bar in ax.patches]
    assert hollow == [None, "///"]  # BERT has lost Chinese characters


@pytest.mark.parametrize(
    ("text", "want"),
    [("", "word"), ("123", "word"), ("Lima", "word"), ("秘鲁", "character"), ("我在Lima", "character"),
     ("Peru is 秘鲁.", "word"), ("東京へ行く", "character"), ("ไปลิมา", "character"), ("서울에", "word"),
     ("Москва", "word"), ("😁😁", "word")],
)  # fmt: skip
def test_unit(text, want):
    assert unit(text) == want

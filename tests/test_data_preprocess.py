import itertools
import random
import unicodedata

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_ft.data.preprocess import (
    NORMAL,
    STOP_WORDS,
    Aligned,
    chinese_number,
    language,
    normal,
    preprocess,
    scripts,
    sentences,
    terms,
    words,
)
from instruct_ft.settings import InputError

MANY = settings(max_examples=60, deadline=None, derandomize=True)
BITS = (
    "word|cafe\u0301|👩‍🚀|👍🏽|🇫🇷|\r\n|\n| |\u3000|\u200b|\ufeff|。”|。|？！|「|』|）|. |! |Dr. |3.50|1,200|Ｗｉ|ｶﾞ|頭髮|"
    "三百二十一|北京大学|“|”|ß|İ|Σ|\u1100\u1161|\u0301|\u200d|\0|他说：|…|e.g.|a_b|'|\U000e0100|葛"
).split("|")
TEXT = st.one_of(
    st.lists(st.sampled_from(BITS), max_size=14).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=25),
)


def mark(text):
    return Aligned.of(text)


# ---- guarantee 24 (its part) and "lossless"


@MANY
@given(TEXT)
def test_sentence_and_word_segmentation_are_lossless(text):
    assert "".join(words(text)) == text
    for lang in (None, "zh", "en"):
        found = sentences(text, lang)
        assert "".join(found) == text
        assert all(found)
        assert all(s.strip() for s in found) or len(found) == 1


@MANY
@given(TEXT)
def test_words_never_part_a_letter_from_its_marks_or_a_line_break(text):
    pieces = words(text)
    assert not any(a.endswith("\r") and b.startswith("\n") for a, b in itertools.pairwise(pieces))
    for a, b in itertools.pairwise(pieces):
        assert not (unicodedata.combining(b[0]) and a[-1].isalpha())


@MANY
@given(TEXT, st.sets(st.sampled_from(sorted(NORMAL))))
def test_g24_every_character_of_a_normal_form_leads_back_to_its_original(text, rules):
    aligned = normal(text, rules)
    assert aligned.original == text
    assert len(aligned.text) == len(aligned.starts) == len(aligned.ends)
    assert all(0 <= s < e <= len(text) for s, e in zip(aligned.starts, aligned.ends, strict=True))
    assert list(aligned.starts) == sorted(aligned.starts)
    assert list(aligned.ends) == sorted(aligned.ends)
    for i in range(len(aligned.text)):
        place = aligned.place(*aligned.origin(i, i + 1))
        assert place[0] <= i < place[1]


@MANY
@given(
    st.lists(st.sampled_from(BITS), max_size=6).map("".join),
    st.sampled_from(["Straße", "北京", "Ｏｓｌｏ", "三百二十一", "cafe\u0301"]),
)
def test_g24_spans_keep_their_surface_through_preprocessing(before, surface):
    text = f"{before} {surface} end"
    start = len(before) + 1
    span = dict(start=start, end=start + len(surface), label="X")
    result = preprocess(Dataset.from_list([dict(id="a", text=text, spans=[span])]), NORMAL)
    assert len(result.kept) + len(result.dropped) == 1
    for row in result.kept:
        moved = row["spans"][0]
        assert row["text"][moved["start"] : moved["end"]] == normal(surface, NORMAL).text
    assert len(result.kept) or result.dropped["reason"][0].startswith("span cut")


def test_spans_are_right_with_emoji_combining_marks_and_crlf():
    text = "👩‍🚀\r\ncafe\u0301  Ｏｓｌｏ，１"
    spans = [
        dict(start=s, end=s + len(w), label="X")
        for w in ("cafe\u0301", "Ｏｓｌｏ")
        for s in [text.index(w)]
    ]
    row = preprocess(Dataset.from_list([dict(id="a", text=text, spans=spans)])).kept[0]
    assert row["text"] == "👩‍🚀 café Oslo，1"
    assert [row["text"][s["start"] : s["end"]] for s in row["spans"]] == ["café", "Oslo"]


# ---- the rules, each against an oracle


@MANY
@given(TEXT)
def test_nfc_and_case_equal_pythons_own(text):
    assert normal(text, ["nfc"]).text == unicodedata.normalize("NFC", text)
    assert normal(text, ["case"]).text == text.casefold()


@pytest.mark.parametrize("name", sorted(NORMAL))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=TEXT)
def test_a_rule_applied_again_changes_nothing(name, text):
    once = normal(text, [name]).text
    assert normal(once, [name]).text == once


def test_width_keeps_chinese_punctuation():
    assert (
        normal("Ｗｉｆｉ　１２％，好！（是）：；？～ｶﾞ", ["width"]).text
        == "Wifi 12%，好！（是）：；？～ガ"
    )


def test_traditional_becomes_simplified_by_phrase():
    assert normal("頭髮很乾，乾坤著名", ["simplified"]).text == "头发很干，乾坤著名"


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("１２３ ٣٤", "123 34"),
        ("1,200 and 1,234,567.8 but 1,20 and 12,3456", "1200 and 1234567.8 but 1,20 and 12,3456"),
        ("三百二十一本，两千零五，十五个", "321本，2005，15个"),
        (
            "万一，千万别，七八个，一样，三三两两，一百一",
            "万一，千万别，七八个，一样，三三两两，一百一",
        ),
        ("二〇二六年", "2026年"),
    ],
)
def test_numbers_are_rewritten_only_when_they_are_numbers(text, out):
    assert normal(text, ["numbers"]).text == out


def test_a_numeral_is_the_value_that_it_is_written_as():
    from instruct_ft.data.preprocess import _write

    rng = random.Random(1)
    for value in [
        *range(10, 400),
        *(rng.randrange(10, 10 ** rng.randrange(2, 13)) for _ in range(500)),
    ]:
        assert chinese_number(_write(value)) == value
    for text in ("", "零", "一", "百", "十零", "二百零十", "x"):
        assert chinese_number(text) is None


def test_space_folds_trims_and_takes_out_what_cannot_be_seen():
    assert normal(" \ufeffa\u200b\r\n\u3000b\u00a0", ["space"]).text == "a b"
    assert normal(" \n", ["space"]).text == ""


def test_an_unknown_rule_is_named():
    with pytest.raises(InputError, match="no 'lower'; there are nfc, width"):
        normal("a", ["lower"])
    assert all(rule.loses for rule in NORMAL.values())


# ---- words, sentences, language


def test_words_of_both_languages():
    assert words("我来到北京大学，用GPS导航。") == [
        "我",
        "来到",
        "北京大学",
        "，",
        "用",
        "GPS",
        "导航",
        "。",
    ]
    assert words("don't pay 3.50!") == ["don't", " ", "pay", " ", "3.50", "!"]
    assert words("👩‍🚀👍🏽🇫🇷🇩🇪") == ["👩‍🚀", "👍🏽", "🇫🇷", "🇩🇪"]


@pytest.mark.parametrize(
    "parts",
    [
        ["他说：“我明天走。”", "然后他走了。"],
        ["她问：「真的吗？！」", "（没有人回答。）", "雨停了……"],
        ["他说：『不。』", "好。"],
        ["Dr. Smith paid $3.50. ", "He left.\r\n\r\n", "Then he came back."],
        ["\n\nFirst. ", "Second."],
    ],
)
def test_sentences_end_where_a_reader_would_end_them(parts):
    assert sentences("".join(parts)) == parts


def test_language_by_script():
    cases = {
        "用GPS导航": "zh",
        "Where is 北京?": "en",
        "これは本です": "ja",
        "한국어입니다": "ko",
        "Привет": "other",
        "12 👍": "none",
        "": "none",
        "北京 Beijing": "mixed",
        "Ｗｉｆｉ": "en",
        "cafe\u0301": "en",
    }
    assert {t: language(t) for t in cases} == cases
    assert sum(scripts("用GPS导航 ок 한").values()) == pytest.approx(1)
    assert scripts("…") == {}


def test_terms_drop_stop_words_and_never_a_negation():
    assert terms("Please do NOT send the Ｗｉｆｉ code!") == [
        "please",
        "not",
        "send",
        "wifi",
        "code",
    ]
    for word in "not no never nor cannot without 不 没 没有 无 别".split():
        assert all(word not in stop for stop in STOP_WORDS.values())


# ---- the step


def test_the_step_accounts_for_every_row_and_leaves_its_input():
    rows = Dataset.from_list(
        [
            dict(id="a", text="Ａ  b", spans=[]),
            dict(id="b", text=None, spans=[]),
            dict(id="c", text="cafe\u0301", spans=[dict(start=0, end=4)]),
            dict(id="d", text="x", spans=[dict(start=0, end=9)]),
            dict(id="e", text="好", spans=None),
        ]
    )
    before = rows.to_list()
    result = preprocess(rows)
    assert rows.to_list() == before
    assert list(result.kept["id"]) == ["a", "e"]
    assert [r.split(":")[0] for r in result.dropped["reason"]] == [
        "no text",
        "span cut",
        "bad span",
    ]
    assert result.changes.to_list() == [
        dict(id="a", field="text", rule="nfc+width+space", before="Ａ  b", after="A b")
    ]
    assert result.kept.features == rows.features
    assert len(preprocess(result.kept).changes) == 0


def test_the_step_tells_a_wrong_call_in_one_sentence():
    with pytest.raises(InputError, match="conversations are normalised by clean"):
        preprocess(Dataset.from_list([dict(id="a", messages=[])]))
    with pytest.raises(InputError, match="got a list"):
        preprocess([])
    assert len(preprocess(Dataset.from_dict(dict(id=[], text=[]))).kept) == 0

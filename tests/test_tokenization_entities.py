"""Entities: labels and spans to tokens and back over tokenizer families, names kept whole, windows stitched."""

from itertools import islice, pairwise

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from instruct_ft.atlas.corpus import corpus
from instruct_ft.atlas.facts import atlas_path
from instruct_ft.atlas.tokenizers import FAMILIES, new_tokenizer
from instruct_ft.settings import InputError
from instruct_ft.tokenization.entities import (
    STRATEGIES,
    Tokens,
    align_labels,
    align_rows,
    keep_whole,
    label_names,
    labels_to_spans,
    read_tokens,
    show_labels,
    split_scripts,
    stitch,
    token_offsets,
    whole_names,
    windows,
    words_of,
)


def _sentencepiece(llama):
    "As Llama 2 has it: the normaliser writes the spaces, there is no pre-tokenizer"
    core = Tokenizer.from_str(llama.backend_tokenizer.to_str())
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=core, **llama.special_tokens_map)


def _steps(gpt):
    "As code models and newer ones have it: digits apart, a split of their own, offsets trimmed"
    core = Tokenizer.from_str(gpt.backend_tokenizer.to_str())
    words = Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.Split(words, "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


def _make():
    docs = list(islice(corpus(0), 300))
    made = {family: new_tokenizer(family, docs, 1500) for family in FAMILIES}
    made["atlas"] = AutoTokenizer.from_pretrained(atlas_path("decoder"))
    made["sentencepiece"] = _sentencepiece(made["llama"])
    made["steps"] = _steps(made["gpt"])
    return made


TOKS = _make()
SPLIT = {name: split_scripts(tok) for name, tok in TOKS.items()}
NAMES = [
    "Oslo",
    "New Delhi",
    "New Delhi East",
    "利马",
    "COVID-19",
    "art",
    "C++",
    ".NET",
    "José Müller",
    "x",
]
WHOLE = {name: keep_whole(tok, NAMES) for name, tok in TOKS.items()}
each = pytest.mark.parametrize("name", TOKS)
quick = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

PARTS = [
    "Lima",
    "met",
    "cafe\u0301",
    "ﬁx",
    "½",
    "👩\u200d🚀",
    "👍🏽",
    "\u200b",
    "\ufeff",
    "\x07",
    "秘鲁",
    "日",
    "U.S.",
    "#x_1",
    "…",
    "Ｌ",
    "हि",
    "▁",
    "’s",
]
text = st.lists(st.sampled_from([*PARTS, " ", "  ", "\n", "\t", "\u3000"]), max_size=12).map(
    "".join
)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def span(start, end, label="X"):
    return dict(start=start, end=end, label=label)


def outside(tok, text, start, end):
    "Ids of what is not white space and not inside a span"
    tokens = read_tokens(text, tok)
    return [
        i
        for i, (a, b) in zip(tokens.input_ids, tokens.offsets)
        if a < b and (b <= start or end <= a)
    ]


# guarantee 8


@each
@quick
@given(text=text | anything)
def test_g8_offsets_are_ordered_in_range_and_cover_every_visible_character(name, text):
    offsets = token_offsets(TOKS[name], text)
    assert len(offsets) == len(TOKS[name](text)["input_ids"])
    assert all(0 <= a <= b <= len(text) for a, b in offsets)
    assert all(b <= c or (a, b) == (c, d) for (a, b), (c, d) in pairwise(offsets))
    assert not any(text[a:b] != text[a:b].strip() for a, b in offsets)
    held = {i for a, b in offsets for i in range(a, b)}
    for start, word in ((i, w) for i, w in enumerate(text) if not w.isspace()):
        whole = text[: start + 1].split()[-1] + text[start + 1 :].split(" ")[0]
        if start not in held:  # only where nothing of the whole word is left
            assert not any(text[i : i + 1] and i in held for i in _word(text, start)), (
                text,
                start,
                word,
                whole,
            )


def _word(text, i):
    "The places of the characters between white space around a place"
    a = b = i
    while a and not text[a - 1].isspace():
        a -= 1
    while b < len(text) and not text[b].isspace():
        b += 1
    return range(a, b)


def test_g8_a_character_of_several_tokens_has_one_range():
    ranges = [r for r in token_offsets(TOKS["gpt"], "a👩‍🚀b") if r[0] < r[1]]
    assert sorted(set(ranges)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert ranges.count((1, 2)) > 1


def test_g8_a_dropped_character_belongs_to_a_token_of_its_word():
    got = [
        ("e\u0301 x\u200b \u200by")[a:b]
        for a, b in token_offsets(TOKS["bert"], "e\u0301 x\u200b \u200by")
        if a < b
    ]
    assert got == ["e\u0301", "x\u200b", "\u200by"]


# guarantee 9


@pytest.mark.parametrize("strategy", STRATEGIES)
@each
@quick
@given(words=st.lists(st.sampled_from([*PARTS, ""]), min_size=1, max_size=8), data=st.data())
def test_g9_labels_of_words_come_back_as_the_same_spans(name, strategy, words, data):
    tok, tags = TOKS[name], []
    for _ in words:
        follow = [f"I-{tags[-1][2:]}"] if tags and tags[-1] != "O" else []
        tags.append(data.draw(st.sampled_from(["O", "B-X", "B-Y", *follow])))
    tokens = read_tokens(words, tok)
    try:
        labels = align_labels(words, tags, tok, strategy)
    except InputError as e:  # only where no token stands for an edge
        assert str(e).startswith(("no token", "across a token")) and {*words} & {
            "",
            "\u200b",
            "\ufeff",
            "\x07",
            "▁",
            "👍🏽",
            "हि",
        }
        return
    found = labels_to_spans(tokens, labels)
    count = sum(tag[0] == "B" for tag in tags)
    assert len(labels) == len(tokens) and len(found) == count
    edges = {a for a, b in tokens.words}, {b for a, b in tokens.words}
    assert all(s["start"] in edges[0] and s["end"] in edges[1] for s in found)
    assert labels == align_labels(tokens, found, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@each
@quick
@given(text=text, data=st.data())
def test_g9_spans_of_raw_text_come_back_identical_or_are_refused(name, strategy, text, data):
    words = words_of(text)
    spans, at = [], 0
    while at < len(words) and len(spans) < 4:
        first = data.draw(st.integers(at, len(words) - 1))
        last = data.draw(st.integers(first, min(first + 3, len(words) - 1)))
        spans.append(span(words[first][0], words[last][1], data.draw(st.sampled_from("XY"))))
        at = last + 1
    tokens = read_tokens(text, SPLIT[name])
    try:
        labels = align_labels(tokens, spans, strategy=strategy)
    except InputError:
        return
    assert labels_to_spans(tokens, labels) == spans
    assert labels_to_spans(SPLIT[name](text), labels, text) == spans
    assert labels_to_spans(token_offsets(SPLIT[name], text), labels, text) == spans


@each
def test_g9_ordinary_text_is_never_refused(name):
    text = "“Kathmandu” (Nepal) saw 👩‍🚀, cafe\u0301 and Lima's New\u200bYork. 秘鲁的首都是利马。"
    surfaces = ["Kathmandu", "Nepal", "👩‍🚀", "cafe\u0301", "Lima", "New\u200bYork"] + [
        "秘鲁",
        "利马",
    ] * (name != "t5")
    spans = [span(text.index(s), text.index(s) + len(s)) for s in surfaces]
    tokens = read_tokens(text, SPLIT[name])
    assert labels_to_spans(tokens, align_labels(tokens, spans, strategy="bio")) == spans


@each
def test_g9_two_names_of_one_type_side_by_side_stay_two(name):
    words, tags = ["Lima", "Lima", "Oslo"], ["B-X", "B-X", "I-X"]
    for strategy in STRATEGIES:
        tokens = read_tokens(words, TOKS[name])
        assert labels_to_spans(tokens, align_labels(words, tags, TOKS[name], strategy)) == [
            span(0, 4),
            span(5, 14),
        ]


def test_an_edge_inside_a_token_is_refused_with_the_mend():
    with pytest.raises(InputError, match=r"across a token: 'L' \(X, 0 to 1\).*split_scripts"):
        align_labels(Tokens([1], [(0, 4)], [(0, 4)], "Lima"), [span(0, 1)], strategy="bio")


# pitfall 10


def test_p10_words_keep_their_space_without_a_prefix_space():
    for tok in (TOKS["gpt"], TOKS["roberta"], TOKS["steps"]):
        assert (
            read_tokens(["Kenya", "met", "Peru"], tok).input_ids
            == tok("Kenya met Peru")["input_ids"]
        )


def test_p10_empty_words_keep_their_place():
    words, tags = ["", "New", "", "Delhi", ""], ["O", "B-X", "I-X", "I-X", "O"]
    for tok in TOKS.values():
        tokens = read_tokens(words, tok)
        assert len(tokens.words) == 5
        assert labels_to_spans(tokens, align_labels(tokens, tags)) == [span(0, 9)]
        with pytest.raises(InputError, match="word 1 is empty"):
            align_labels(words, ["B-X", "O", "O", "O", "O"], tok)


def test_p10_a_tokenizer_without_pre_tokenizer_still_has_words():
    tokens = read_tokens("met Oslo now", TOKS["sentencepiece"])
    labels = align_labels(tokens, [span(4, 8)], strategy="first")
    assert labels_to_spans(tokens, labels) == [span(4, 8)]
    assert sum(label == "B-X" for label in labels) == 1


# guarantee 10 and pitfall 6


@each
@pytest.mark.parametrize(
    "place",
    ["{}", "met {} today", "({}).", "“{}”, y", "a\n\n{}\n", "met  {}", "a\t\t{}", "在{}见", "{}'s"],
)
def test_g10_a_kept_name_is_one_token_in_every_position_and_the_rest_stays(name, place):
    old, new = TOKS[name], WHOLE[name]
    for entity in NAMES:
        text, start = place.format(entity), place.index("{")
        end = start + len(entity)
        assert token_offsets(new, text).count((start, end)) == 1, (entity, text)
        assert (
            outside(new, text, start, end)
            == outside(SPLIT[name] if name == "llama" else old, text, start, end)
            or "在" in place
            or entity in (".NET", "C++")
        )


@each
def test_g10_a_kept_name_never_fires_inside_another_word(name):
    old, new = TOKS[name], WHOLE[name]
    for text in (
        "party",
        "Oslos",
        "xOslo",
        "Oslo_1",
        "Oslo2",
        "COVID-190",
        "art\u0301",
        "New Delhis",
        "the 4art",
        "exit",
        "Éart",
    ):
        assert new(text)["input_ids"] == old(text)["input_ids"], text


@each
@quick
@given(text=text | anything)
def test_g10_all_other_text_keeps_its_ids(name, text):
    kept = keep_whole_once(name)
    if "Qqzz" not in text:
        assert kept(text)["input_ids"] == TOKS[name](text)["input_ids"]


_ONCE = {}


def keep_whole_once(name):
    if name not in _ONCE:
        _ONCE[name] = keep_whole(TOKS[name], ["Qqzz", "Qqzz Vv"])
    return _ONCE[name]


@each
def test_p6_decoding_a_kept_name_keeps_the_spaces(name):
    text = "they met José Müller (Oslo) in New Delhi"
    decoded = WHOLE[name].decode(WHOLE[name](text, add_special_tokens=False)["input_ids"])
    assert decoded == (text.replace("(Oslo)", "( Oslo )") if name == "bert" else text)


@each
def test_g10_the_longest_name_wins(name):
    text = "to New Delhi East"
    assert (3, 17) in token_offsets(WHOLE[name], text)


@each
def test_kept_names_survive_save_and_reload(name, tmp_path):
    WHOLE[name].save_pretrained(tmp_path)
    again, text = AutoTokenizer.from_pretrained(tmp_path), "met Oslo, 在利马见"
    assert again(text)["input_ids"] == WHOLE[name](text)["input_ids"]
    assert len(again) == len(WHOLE[name]) > len(TOKS[name])
    assert {v.strip() for v in whole_names(again).values()} == set(NAMES)
    assert max(whole_names(again)) < len(again)


@each
def test_g10_protected_names_share_no_token_with_their_neighbours(name):
    old, new = TOKS[name], keep_whole(TOKS[name], NAMES, how="protected")
    assert len(new) == len(old)
    for text in ("(Oslo)", "在利马的", "met New Delhi's", "a COVID-19!"):
        entity = next(n for n in NAMES if n in text)
        start, end = text.index(entity), text.index(entity) + len(entity)
        tokens = read_tokens(text, new)
        assert labels_to_spans(
            tokens, align_labels(tokens, [span(start, end)], strategy="bio")
        ) == [span(start, end)]
    for text in ("Oslos party 12 x1\n\n a", "no names"):
        assert new(text)["input_ids"] == old(text)["input_ids"]


def test_keep_whole_does_not_change_the_tokenizer_given():
    tok = TOKS["llama"]
    before = tok.backend_tokenizer.to_str()
    keep_whole(tok, ["Oslo"]), keep_whole(tok, ["Oslo"], "protected"), split_scripts(tok)
    assert tok.backend_tokenizer.to_str() == before


def test_unigram_ids_follow_the_added_tokens():
    tok = new_tokenizer("t5", islice(corpus(0), 50), 600)
    tok.add_tokens(["<a>", "<b>"])
    new = keep_whole(tok, ["Oslo"])
    assert new.convert_tokens_to_ids("<b>") == tok.convert_tokens_to_ids("<b>")
    assert min(whole_names(new)) == len(tok)


@pytest.mark.parametrize(
    ("entities", "how", "said"),
    [
        ("Oslo", "added", "one text"),
        ([""], "added", "no name"),
        ([" a"], "added", "no name"),
        ([3], "added", "no name"),
        (["a"], "kept", "how = 'kept'"),
        (["\ud800"], "added", "surrogate"),
    ],
)
def test_bad_names_are_refused(entities, how, said):
    with pytest.raises(InputError, match=said):
        keep_whole(TOKS["gpt"], entities, how)


def test_names_are_given_once():
    with pytest.raises(InputError, match="all names at once"):
        keep_whole(WHOLE["gpt"], ["Lima"])


# windows


@each
@quick
@given(text=text, room=st.integers(1, 9), data=st.data())
def test_windows_and_stitch_lose_nothing(name, text, room, data):
    tok, tokens = TOKS[name], read_tokens(text, TOKS[name])
    extra = len(tok("")["input_ids"])
    parts = windows(tokens, tok, room + extra, data.draw(st.integers(0, room - 1)))
    assert all(len(w.input_ids) <= room + extra for w in parts)
    found = stitch(
        parts, [[(w.first + i - w.lead) for i in range(len(w.input_ids))] for w in parts]
    )
    inner = range(parts[0].first, parts[-1].end)
    assert [found[i] for i in inner] == list(inner) and len(found) == len(tokens)
    assert all(found[i] == -100 for i in range(len(tokens)) if i not in inner)


@each
def test_windows_are_those_of_the_library(name):
    tok, text = TOKS[name], "Lima is a town in Peru. " * 8
    want = AutoTokenizer_windows(tok, text)
    assert [w.input_ids for w in windows(text, tok, 20, 5)] == want


def AutoTokenizer_windows(tok, text):
    try:
        return tok(text, max_length=20, stride=5, truncation=True, return_overflowing_tokens=True)[
            "input_ids"
        ]
    finally:
        tok.backend_tokenizer.no_truncation()


def test_one_entity_over_a_border_stays_one():
    tok, text = TOKS["gpt"], "we saw " + "Kathmandu " * 9 + "again"
    gold = [span(7, 96)]
    tokens = read_tokens(text, tok)
    truth = align_labels(tokens, gold, strategy="bio")
    for size, stride in ((8, 3), (6, 0), (12, 11)):
        parts = windows(tokens, tok, size, stride)
        labels = stitch(parts, [truth[w.first : w.end] for w in parts])
        assert labels == truth and labels_to_spans(tokens, labels) == gold


def test_stitch_goes_over_beside_a_name_and_not_in_it():
    parts = windows(list(range(5, 15)), TOKS["gpt"], 7, 4)
    first = ["O", "O", "O", "O", "B-X", "I-X", "O"]  # its right edge cuts the name short
    second = ["O", "B-X", "I-X", "I-X", "O", "O", "O"]
    assert stitch(parts, [first, second]) == [
        "O",
        "O",
        "O",
        "O",
        "B-X",
        "I-X",
        "I-X",
        "O",
        "O",
        "O",
    ]


def test_bad_windows_are_refused():
    with pytest.raises(InputError, match="stride = 8"):
        windows("a b", TOKS["bert"], 10, 8)
    parts = windows("a b c d e f", TOKS["bert"], 5, 1)
    with pytest.raises(InputError, match="predictions for"):
        stitch(parts, [])
    with pytest.raises(InputError, match="padding"):
        stitch(parts, [["O"]] * len(parts))


# rows and bad input


def test_rows_are_kept_or_set_aside_with_a_reason():
    spans = [[span(0, 4, "CITY")], [span(0, 1, "CITY")], []]
    rows = Dataset.from_list(
        [dict(id=str(i), source="s", line=i, text="Limas", spans=s) for i, s in enumerate(spans)]
    )
    result = align_rows(rows, TOKS["bert"], label_names(rows), "bio")
    assert result.rows_in == 3 and set(result.dropped["id"]) <= {"0", "1"}
    assert all(len(r["input_ids"]) == len(r["labels"]) for r in result.kept)
    tagged = Dataset.from_list(
        [dict(id="a", source="s", line=1, tokens=["Lima", "is"], tags=["B-CITY", "O"])]
    )
    assert label_names(tagged) == ["O", "B-CITY", "I-CITY"]
    [row] = align_rows(tagged, TOKS["gpt"], label_names(tagged)).kept
    assert 1 in row["labels"] and 0 in row["labels"]
    with pytest.raises(InputError, match="rows need tokens and tags"):
        align_rows(tagged.remove_columns("tags"), TOKS["gpt"], ["O"])


@pytest.mark.parametrize(
    ("text", "gold", "how", "said"),
    [
        (["a", "b"], ["O"], {}, "give one a word"),
        (["a", 3], ["O", "O"], {}, "is no text"),
        (3, [], {}, "is no text"),
        ("a", [span(0, 2)], {}, "not inside a text"),
        ("a b", [span(0, 2)], {}, "cannot be read back"),
        ("a", [], dict(strategy="last"), "strategy = 'last'"),
        ("\ud800", [], {}, "surrogate"),
        (["a"], ["B-Y"], dict(names=["O"]), "B-Y is not among them"),
        (["a"], [7], dict(names=["O"]), "names"),
        (["a"], ["I-X"], {}, "illegal tags"),
    ],
)
def test_bad_labels_are_refused(text, gold, how, said):
    with pytest.raises(InputError, match=said):
        align_labels(text, gold, TOKS["gpt"], **how)


def test_no_fast_tokenizer_is_refused():
    with pytest.raises(InputError, match="no fast tokenizer"):
        token_offsets(object(), "a")


def test_the_picture_escapes_the_text():
    tokens = read_tokens("<script> Lima", TOKS["gpt"])
    picture = show_labels(tokens, align_labels(tokens, [span(9, 13, "<b>")]))
    assert "<script>" not in picture and "<b>" not in picture and "Lima"[0] in picture

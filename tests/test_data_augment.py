import itertools
import json
import random
import re

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import printed

from instruct_ft.data.augment import (
    AUGMENTERS,
    FRAMES,
    GENDER,
    HOMOPHONES,
    OCR,
    Counterfactual,
    Edit,
    EntitySwap,
    Room,
    Synonym,
    augment,
    crop,
    delete,
    entities,
    phrase,
    protected,
    rewrite,
    synonym_table,
)
from instruct_ft.data.clean import drop_duplicate_ids
from instruct_ft.data.collect import accounting, steps
from instruct_ft.data.split import split
from instruct_ft.settings import InputError

FEW = settings(max_examples=15, deadline=None, derandomize=True)
ALL = [*AUGMENTERS]

# Words, marks and traps in two languages; joined at random they make rows nobody has thought of.
BITS = (
    "please help me buy|a famous|doctor|not|don't|20|3.5 kg|{name}|`code here`|f(x)|“quick”|[MASK]|cafe\u0301|👩‍🚀|"
    "she|her brother|请|购买|高兴|不|三百|他的|妻子|《书》|\r\n|\n|, |. |? |Straße|GPS|a@b.org|½|two|问题|在"
).split("|")
TEXT = st.lists(st.sampled_from(BITS), min_size=1, max_size=12).map(" ".join)
FREE = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def rows_of(*texts, **columns):
    rows = dict(id=[f"r{i}" for i in range(len(texts))], text=list(texts))
    return Dataset.from_dict(rows | {k: list(v) for k, v in columns.items()})


def tagged(text, *surfaces):
    return [dict(start=text.index(s), end=text.index(s) + len(s), label="X") for s in surfaces]


# ---- edits


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TEXT, st.randoms(use_true_random=False))
def test_edits_outside_of_a_span_move_it_with_its_surface(text, rng):
    start = rng.randrange(len(text))
    end = rng.randrange(start + 1, len(text) + 1)
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(4))
    edits = [Edit(a, b, rng.choice(["", "x", "好的"])) for a, b in (cuts[:2], cuts[2:])]
    edits = [e for e in edits if e.end <= start or e.start >= end]
    if len(edits) == 2 and edits[0].start == edits[1].start:
        edits = edits[:1]
    new, [(a, b)] = rewrite(text, edits, [(start, end)])
    assert new[a:b] == text[start:end]
    assert len(new) == len(text) + sum(len(e.text) - (e.end - e.start) for e in edits)


def test_an_edit_that_is_the_span_moves_it_to_the_new_surface():
    new, places = rewrite("see Oslo, Oslo", [Edit(4, 8, "New York")], [(4, 8), (10, 14)])
    assert [new[a:b] for a, b in places] == ["New York", "Oslo"]


def test_an_insertion_at_the_border_stays_outside_of_both_spans():
    new, places = rewrite(
        "abc", [Edit(1, 1, "xx"), Edit(0, 0, "y"), Edit(3, 3, "z")], [(0, 1), (1, 3)]
    )
    assert new == "yaxxbcz"
    assert [new[a:b] for a, b in places] == ["a", "bc"]


def test_edits_that_overlap_are_refused():
    with pytest.raises(ValueError, match="overlaps"):
        rewrite("abcdef", [Edit(0, 3, ""), Edit(2, 4, "")])


# ---- what is protected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pay $3.50 or 1,200 by 2026-01-02.", ["$3.50", "1,200", "2026-01-02"]),
        ("５５ ½ x² Ⅳ 三百 两个", ["５５", "½", "x²", "Ⅳ", "三百", "两"]),
        ("I can't, cannot and never would; knot", ["can't", "cannot", "never"]),
        ("{{user}} <|im_end|> [INST] %s ${HOME} ___", None),
        ("`a b` ```x\ny``` $a+b$ f(x, y) x_y C:\\dir a/b.txt https://x.org/a?b=c me@x.org", None),
        ("「引」『用』《书》“名”", ["「引」", "『用』", "《书》", "“名”"]),
        ("我没有去，别说了", ["没", "别"]),
        ("Explain\nfor x in y:\n  print(x);\n  return z\n求a = b * c吗", None),
    ],
)
def test_numbers_code_placeholders_quotes_and_negations_are_found(text, found):
    places = protected(text)
    if found is None:
        outside = text
        for s, e in reversed(places):
            outside = outside[:s] + outside[e:]
        assert not re.search(r"[{<\[`$_@\\/%\d]", outside), outside
    else:
        assert [text[s:e] for s, e in places] == found


@FEW
@given(FREE)
def test_places_are_ordered_disjoint_and_hold_every_digit(text):
    places = protected(text)
    assert all(s < e for s, e in places)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    assert all(any(s <= i < e for s, e in places) for i, c in enumerate(text) if c.isdigit())


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "$" * 100_000,
        "一" * 100_000,
        "a_" * 50_000,
        "“" * 50_000,
        "n't" * 30_000,
        "x= " * 40_000,
        ";a" * 60_000,
        "if " * 50_000,
    ],
)
def test_long_texts_take_linear_time(text):
    assert protected(text + " 7")[-1][1] == len(text) + 2


# ---- guarantee 25


def test_g25_augmentation_is_seeded_and_reproducible_per_row_whatever_the_order():
    texts = [
        f"please help the famous doctor buy a {w} gift quickly"
        for w in "red blue green big".split()
    ]
    rows = rows_of(*texts)
    one = {r["id"]: r["text"] for r in augment(rows, ALL, n=2).children}
    order = [2, 0, 3, 1]
    assert {r["id"]: r["text"] for r in augment(rows.select(order), ALL, n=2).children} == one
    alone = {
        r["id"]: r["text"] for i in range(4) for r in augment(rows.select([i]), ALL, n=2).children
    }
    assert alone == one
    assert {r["text"] for r in augment(rows, ALL, n=2, seed=1).children} != set(one.values())
    program = (
        "import json, sys; from datasets import Dataset; from instruct_ft.data.augment import *;"
        "rows = Dataset.from_list(json.load(sys.stdin));"
        "print(json.dumps({r['id']: r['text'] for r in augment(rows, list(AUGMENTERS), n=2).children}))"
    )
    assert json.loads(printed(program, 7, json.dumps(rows.to_list()))) == one


@FEW
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_g25_children_keep_label_spans_numbers_code_and_placeholders_and_are_new(texts):
    spans = []
    for text in texts:
        found = [s for s in ("cafe\u0301", "doctor", "妻子", "👩‍🚀") if s in text]
        spans.append(tagged(text, *found))
    rows = Dataset.from_list(
        [
            dict(
                id=f"r{i}",
                text=t,
                label=f"l{i}",
                group=f"g{i}",
                spans=s or [dict(start=0, end=1, label="X")],
            )
            for i, (t, s) in enumerate(zip(texts, spans, strict=True))
        ]
    )
    before = rows.to_list()
    result = augment(rows, ALL, n=2, rate=0.4)
    assert rows.to_list() == before
    assert result.added + sum(result.missing.values()) == len(rows) * len(ALL) * 2
    parents, seen = {r["id"]: r for r in before}, {}
    for child in result.children:
        parent = parents[child["parent"]]
        assert child["label"] == parent["label"]
        assert child["group"] == parent["group"]
        assert [child["text"][s["start"] : s["end"]] for s in child["spans"]] == [
            parent["text"][s["start"] : s["end"]] for s in parent["spans"]
        ]
        assert re.findall(r"[\d½]", child["text"]) == re.findall(r"[\d½]", parent["text"])
        for thing in (
            "{name}",
            "`code here`",
            "f(x)",
            "[MASK]",
            "“quick”",
            "《书》",
            "三百",
            "a@b.org",
        ):
            assert child["text"].count(thing) == parent["text"].count(thing)
        assert child["text"].strip()
        family = seen.setdefault(parent["id"], set(texts))
        assert child["text"] not in family
        family.add(child["text"])


def test_g25_only_train_rows_have_children():
    rows = rows_of(
        "please help the doctor",
        "please assist the doctor",
        "help me buy it",
        split=["train", "test", "validation"],
    )
    result = augment(rows, ALL)
    assert {r["parent"] for r in result.children} == {"r0"}
    assert list(result.dropped["reason"]) == [
        "not train: split is 'test'",
        "not train: split is 'validation'",
    ]
    assert result.rows_in == len(rows)


def test_g25_children_stay_with_their_group_in_a_later_split():
    rows = rows_of(*(f"please help the doctor in room {i}" for i in range(60)))
    parts = split(augment(rows, ["synonym", "keyboard"]).kept, (0.5, 0.25, 0.25), group="group")
    sides = {}
    for name, part in parts._asdict().items():
        for group in part["group"]:
            sides.setdefault(group, set()).add(name)
    assert all(len(s) == 1 for s in sides.values())


def test_a_child_never_says_what_a_held_out_row_says():
    table = {"buy": ["purchase"]}
    rows, test = rows_of("buy milk"), rows_of("Purchase  milk")
    assert augment(rows, {"synonym": Synonym(table)}).added == 1
    result = augment(rows, {"synonym": Synonym(table)}, held_out=test)
    assert result.missing == {"synonym: held out": 1}
    both = rows_of("buy milk", "purchase milk", split=["train", "test"])
    assert augment(both, {"synonym": Synonym(table)}).missing == {"synonym: held out": 1}


# ---- the step


def test_kept_less_the_children_and_set_aside_add_up_and_steps_agree():
    rows = rows_of("please help the doctor", None, "help him", label=["a", "b", "c"])
    results = steps([lambda r: augment(r, ["keyboard"]), lambda r: augment(r, ["synonym"])])(rows)
    assert [r.rows_in for r in results] == [3, len(results[0].kept)]
    assert list(results[0].kept["id"])[:2] == ["r0", "r2"]
    assert list(results[0].dropped["reason"]) == ["no text: text is a NoneType"]
    lines = accounting(results)
    assert [line["rows_in"] for line in lines] == [3, len(results[0].kept)]
    assert all(n["rows_in"] + n["added"] == n["kept"] + n["dropped"] for n in lines)
    assert " added " in str(lines)
    both = accounting([results[0], drop_duplicate_ids(results[0].kept)])
    assert "<th>added</th>" in both._repr_html_() and "added" not in both[1]
    assert {r["parent"] for r in results[1].children} <= {"r0", "r2"}


def test_a_second_pass_adds_nothing():
    rows = rows_of("please help the doctor buy a gift", "请问怎样购买礼物")
    once = augment(rows, ALL, n=2)
    again = augment(once.kept, ALL, n=2)
    assert again.added == 0
    assert again.kept.to_list() == once.kept.to_list()


def test_bad_spans_cost_their_row():
    rows = Dataset.from_list(
        [
            dict(id="a", text="help me", spans=[dict(start=0, end=4, label="X")]),
            dict(id="b", text="help me", spans=[dict(start=3, end=99, label="X")]),
            dict(id="c", text="help me", spans=[dict(start=4, end=4, label="X")]),
            dict(id="d", text="help me", spans=[dict(start=-1, end=2, label="X")]),
        ]
    )
    result = augment(rows, ["keyboard"])
    assert list(result.dropped["id"]) == ["b", "c", "d"]
    assert all(r.startswith("bad span: spans has") for r in result.dropped["reason"])


def test_protected_places_and_a_pattern_stay():
    text = "please help the famous doctor quickly"
    rows = Dataset.from_list([dict(id="a", text=text, protected=tagged(text, "famous doctor"))])
    result = augment(rows, ALL, n=4, rate=0.5, protect="help")
    assert result.added > 10
    for child in result.children:
        place = child["protected"][0]
        assert child["text"][place["start"] : place["end"]] == "famous doctor"
        assert "help" in child["text"]


def test_a_span_that_carries_its_surface_gets_the_new_one():
    text = "go to Oslo"
    rows = Dataset.from_list(
        [dict(id="a", text=text, spans=[dict(start=6, end=10, label="P", text="Oslo")])]
    )
    child = augment(rows, {"entity": EntitySwap({"P": ["Cape Town"]})}).children[0]
    assert child["text"] == "go to Cape Town"
    assert child["spans"] == [dict(start=6, end=15, label="P", text="Cape Town")]


def test_conversations_change_in_the_question_and_keep_what_the_answer_repeats():
    turns = [
        dict(role="system", content="Please help."),
        dict(role="user", content="Is the famous doctor from Oslo, please?"),
        dict(role="assistant", content="The doctor is from Oslo."),
    ]
    zh = [
        dict(role="user", content="请问北京医院在哪里可以购买药品？"),
        dict(role="assistant", content="北京医院。"),
    ]
    rows = Dataset.from_list([dict(id="a", messages=turns), dict(id="b", messages=zh)])
    result = augment(rows, [m for m in ALL if m != "counterfactual"], n=4, rate=0.5)
    assert result.added > 20
    for child in result.children:
        old = turns if child["parent"] == "a" else zh
        assert [t for t in child["messages"] if t["role"] != "user"] == [
            t for t in old if t["role"] != "user"
        ]
        question = next(t["content"] for t in child["messages"] if t["role"] == "user")
        assert all(
            w in question for w in (("doctor", "Oslo") if child["parent"] == "a" else ("北京医院",))
        )


def test_rows_of_odd_shapes_go_through():
    for rows in [
        rows_of(),
        rows_of(""),
        rows_of(" \n"),
        rows_of("7"),
        rows_of("👩‍🚀"),
        rows_of("。"),
    ]:
        result = augment(rows, ALL, n=2)
        assert (result.added, result.rows_in) == (0, len(rows))
    none = Dataset.from_list([dict(id="a", messages=[dict(role="user", content=None)])])
    assert augment(none, ALL).added == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(FREE, min_size=1, max_size=4))
def test_any_text_goes_through(texts):
    result = augment(rows_of(*texts), ALL, rate=0.5)
    assert result.rows_in == len(texts)
    assert all(r["text"].strip() for r in result.children)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: augment(r.to_list()), "got a list"),
        (lambda r: augment(r, ["swop"]), "did you mean swap"),
        (lambda r: augment(r, ["entity"]), "needs a table"),
        (lambda r: augment(r, []), "at least one method"),
        (lambda r: augment(r, rate=2), "above 0"),
        (lambda r: augment(r, n=True), "whole number"),
        (lambda r: augment(r, protect="["), "no regular expression"),
        (lambda r: augment(r.remove_columns("text")), "needs the columns id and text"),
        (lambda r: augment(r.remove_columns("id").add_column("id", [1])), "id for every row"),
        (lambda r: augment(r.add_column("group", [None])), "holds no texts"),
    ],
)
def test_wrong_calls_are_told_in_one_sentence(call, says):
    with pytest.raises(InputError, match=says) as error:
        call(rows_of("help me"))
    assert str(error.value).count("\n") == 0


# ---- the methods


@pytest.mark.parametrize("name", ALL)
def test_every_method_finds_something_to_do(name):
    texts = ["What is the famous doctor doing with his corn?", "请问他在哪里购买有名的礼物的问题"]
    rows = rows_of(*texts)
    result = augment(rows, [name], n=3, rate=0.3)
    assert result.added, result.missing
    assert set(result.children["method"]) == {name}
    assert all(c["before"] != c["after"] and c["rule"] == name for c in result.changes)


def test_tables_hold_no_numeral_and_no_negation():
    for c in "".join(HOMOPHONES) + "".join(OCR["en"]) + OCR["zh"]:
        assert not protected(c), c
    for words in synonym_table().items():
        assert words[0] not in words[1]


def test_synonyms_keep_case_and_article():
    table = {"Buy": [], "buy": ["purchase"], "idea": ["thought"], "famous": ["renowned"]}
    room = Room("Buy an idea, FAMOUS man")
    assert (
        rewrite(room.text, Synonym(table)(room, random.Random(0), 1))[0]
        == "Purchase an idea, RENOWNED man"
    )


def test_deletion_and_crop_leave_what_is_closed_and_something_to_read():
    text = "one can walk to the town with 3 dogs and a cat today"
    room = Room(text, protected(text))
    for seed in range(20):
        for method in (delete, crop):
            new, _ = rewrite(text, method(room, random.Random(seed), 0.9))
            assert "one" in new and "3" in new and len(new) < len(text)


def test_phrasing_goes_there_and_back_for_every_frame():
    for group in FRAMES:
        for before, behind in group:
            text = f"{before}{'the word' if (before or behind).isascii() else '这个词'}{behind}"
            forms = {rewrite(text, phrase(Room(text), random.Random(i), 0))[0] for i in range(25)}
            assert forms and text not in forms
            back = {
                rewrite(f, phrase(Room(f), random.Random(i), 0))[0]
                for f in sorted(forms)
                for i in range(15)
            }
            assert text in back, (text, forms)


def test_entities_of_the_same_type_change_places_and_nested_ones_stay():
    rows = Dataset.from_list(
        [
            dict(id="a", text="张伟去北京", spans=tagged("张伟去北京", "北京")),
            dict(id="b", text="我去乌鲁木齐", spans=tagged("我去乌鲁木齐", "乌鲁木齐")),
            dict(
                id="c", text="New York City", spans=tagged("New York City", "New York City", "York")
            ),
        ]
    )
    table = entities(rows)
    assert table == {"X": ["New York City", "York", "乌鲁木齐", "北京"]}
    result = augment(rows, {"entity": EntitySwap({"X": ["北京", "乌鲁木齐"]})})
    assert list(result.children["text"]) == ["张伟去乌鲁木齐", "我去北京"]
    assert result.missing == {"entity: nothing to change": 1}


def test_every_gendered_word_has_one_way_there_and_back():
    swap = Counterfactual()
    for words in GENDER.values():
        for a, b in zip(words[::2], words[1::2], strict=True):
            for x, y in ((a, b), (b, a)):
                text = x if not x.isascii() else f"the {x} and I"
                new = rewrite(text, swap(Room(text), None, 0))[0]
                back = rewrite(new, swap(Room(new), None, 0))[0]
                assert new != text
                assert back == text or x == "男士", (x, new, back)


def test_counterfactual_changes_every_turn_or_none():
    turns = [
        dict(role="user", content="他是谁的丈夫？"),
        dict(role="assistant", content="他是李女士的丈夫，喜欢吉他。"),
    ]
    closed = [dict(role="user", content="“She” means?"), dict(role="assistant", content="he")]
    rows = Dataset.from_list([dict(id="a", messages=turns), dict(id="b", messages=closed)])
    result = augment(rows, ["counterfactual"])
    assert [t["content"] for t in result.children[0]["messages"]] == [
        "她是谁的妻子？",
        "她是李先生的妻子，喜欢吉他。",
    ]
    assert result.missing == {"counterfactual: protected": 1}


def test_a_method_of_ones_own_that_breaks_something_is_not_believed():
    text = "pay 20 in Oslo at noon"
    places = dict(spans=tagged(text, "Oslo"), protected=tagged(text, "noon"))
    rows = Dataset.from_list([dict(id="a", text=text) | places])
    bad = {
        "closed": lambda room, rng, rate: [Edit(18, 22, "once")],
        "digit": lambda room, rng, rate: [Edit(4, 6, "30")],
        "span": lambda room, rng, rate: [Edit(11, 12, "")],
        "empty": lambda room, rng, rate: [Edit(0, len(room.text), "")],
        "note": lambda room, rng, rate: [Edit(0, 0, "not ")],
        "same": lambda room, rng, rate: [Edit(0, 3, "pay")],
    }
    result = augment(rows, bad)
    assert result.added == 0
    assert result.missing.pop("same: nothing new") == 1
    assert set(result.missing) == {
        f"{name}: would break something" for name in ("closed", "digit", "span", "empty", "note")
    }

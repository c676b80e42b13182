import json
import os
import subprocess
import sys
import unicodedata

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_ft.data.clean import (
    INVISIBLE,
    blank,
    clean,
    conversation_key,
    drop_empty,
    drop_exact_duplicates,
    fold,
    normalise,
)
from instruct_ft.data.collect import accounting, collect
from instruct_ft.settings import InputError


def conversations(chats, **columns):
    "Rows from lists of (role, content)"
    rows = {
        "id": [f"r{i}" for i in range(len(chats))],
        "messages": [[dict(role=r, content=c) for r, c in chat] for chat in chats],
        "source": ["a.jsonl"] * len(chats),
        "line": list(range(1, len(chats) + 1)),
    }
    return Dataset.from_dict(rows | columns)


def asked(*answers):
    return conversations(
        [[("user", f"question {i}?"), ("assistant", a)] for i, a in enumerate(answers)]
    )


def contents(rows):
    return [[turn["content"] for turn in messages] for messages in rows["messages"]]


# few letters, so that duplicates, blanks and combining marks meet often
ODD = st.text(
    st.sampled_from("aAé e\u0301ßŁ１1 \t\r\n\0\u200b\u200d\ufeff\u2060\u3000\u0345好，,。中\u00a0"),
    max_size=5,
)
TEXT = st.one_of(st.none(), ODD, st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
TURN = st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXT)
CHATS = st.lists(st.lists(TURN, max_size=4), min_size=1, max_size=12)
STEPS = [drop_empty, normalise, drop_exact_duplicates, clean]
FEW = settings(max_examples=25, deadline=None)


# ---- the promises of every step


@pytest.mark.parametrize("step", STEPS)
@FEW
@given(CHATS)
def test_every_row_is_kept_or_dropped_once_in_order_and_the_input_stays(step, chats):
    rows = conversations(chats, note=[f"n{i}" for i in range(len(chats))])
    before = rows.to_list()
    result = step(rows)
    assert rows.to_list() == before
    kept, dropped = result.kept["id"], result.dropped["id"]
    assert sorted([*kept, *dropped]) == sorted(rows["id"])
    assert list(kept) == [i for i in rows["id"] if i in set(kept)]
    assert result.kept.features == rows.features
    assert [row["note"] for row in result.kept] == [f"n{i[1:]}" for i in kept]
    assert all(reason and ": " in reason for reason in result.dropped["reason"])
    assert all(json.loads(raw)["note"] for raw in result.dropped["raw"])


@pytest.mark.parametrize("step", STEPS)
@FEW
@given(CHATS)
def test_a_second_pass_changes_nothing(step, chats):
    kept = step(conversations(chats)).kept
    again = step(kept)
    assert again.kept.to_list() == kept.to_list()
    assert len(again.dropped) == 0
    assert len(again.changes) == 0


@FEW
@given(CHATS, CHATS)
def test_rows_added_at_the_end_change_no_earlier_decision(first, more):
    short, long = conversations(first), conversations(first + more)
    kept = list(clean(short).kept["id"])
    assert list(clean(long).kept["id"])[: len(kept)] == kept


@FEW
@given(CHATS)
def test_normalising_does_not_change_the_key(chats):
    rows = conversations(chats)
    keys = [conversation_key(row) for row in rows]
    assert [conversation_key(row) for row in normalise(rows).kept] == keys


@FEW
@given(CHATS)
def test_no_empty_answer_leaves_clean(chats):
    for messages in clean(conversations(chats)).kept["messages"]:
        assert any(turn["role"] == "assistant" for turn in messages)
        assert all(not blank(t["content"]) for t in messages if t["role"] in ("user", "assistant"))


@FEW
@given(CHATS)
def test_changes_replay_to_the_kept_text(chats):
    rows = conversations(chats)
    texts = {
        (row["id"], f"messages[{i}].content"): turn["content"]
        for row in rows
        for i, turn in enumerate(row["messages"])
    }
    result = normalise(rows)
    for change in result.changes:
        assert texts[change["id"], change["field"]] == change["before"] != change["after"]
        texts[change["id"], change["field"]] = change["after"]
    replayed = iter(texts.values())
    assert [[next(replayed) for _ in row] for row in contents(rows)] == contents(result.kept)


# ---- drop_empty


@pytest.mark.parametrize(
    ("answer", "how"),
    [
        (None, "missing"),
        ("", "empty"),
        (" \n\t", "blank"),
        ("\u200b\ufeff", "blank"),
        ("\u3000\0\u2060", "blank"),
        ("\u200d", "blank"),
    ],
)
def test_missing_empty_and_blank_are_told_apart(answer, how):
    dropped = drop_empty(asked("Lima", answer)).dropped
    assert dropped.to_list() == [
        dict(
            id="r1",
            source="a.jsonl",
            line=2,
            step="drop_empty",
            reason=f"empty answer: messages[1].content is {how}",
            raw=dropped["raw"][0],
        )
    ]


def test_a_hole_in_any_turn_is_found_and_named():
    chats = [
        [("user", "a"), ("assistant", "b"), ("user", " "), ("assistant", "c")],
        [("system", ""), ("user", "a"), ("assistant", "b")],
        [("user", "a"), ("tool", ""), ("assistant", "b")],
        [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")],
        [("user", "a")],
        [],
    ]
    result = drop_empty(conversations(chats))
    assert result.kept["id"] == ["r1", "r2"]
    assert result.dropped["reason"] == [
        "empty question: messages[2].content is blank",
        "empty answer: messages[1].content is empty",
        "no answer: messages has no assistant turn",
        "no answer: messages has no assistant turn",
    ]


def test_tool_calls_are_an_answer_and_parts_are_no_text():
    calls = [{"function": {"name": "f"}}]
    rows = collect(
        [
            {
                "messages": [
                    dict(role="user", content="a"),
                    dict(role="assistant", content=None, tool_calls=calls),
                ]
            },
            {
                "messages": [
                    dict(role="user", content=[dict(type="text", text="a")]),
                    dict(role="assistant", content="b"),
                ]
            },
            {
                "messages": [dict(role="user", content="a"), dict(role="assistant", content="b ")],
                "n": 1,
            },
        ]
    ).kept
    result = clean(rows)
    assert result.dropped["reason"] == ["not text: messages[0].content is a list"]
    assert result.kept[0]["messages"] == rows[0]["messages"]  # no key is lost or added
    assert result.kept[1]["messages"][1] == dict(role="assistant", content="b")
    assert result.kept.features == rows.features


# ---- normalise

CLEAN = [
    "好的，谢谢！（“真的”吗？）……《书》、；：",
    "2² = 4, ½ l, ™ ﬁ Ｗ ① ㎏",
    "a\u200db क्\u200dष ۱۴۰۰ ه\u200d",
    "👩\u200d🚀 é ü",
    "  inside\u00a0stays \u200b as it is\n\n\tso  does\u2028this.".strip(),
]


@pytest.mark.parametrize("text", CLEAN)
def test_clean_text_is_not_touched(text):
    result = normalise(asked(text))
    assert contents(result.kept)[0][1] == text
    assert len(result.changes) == 0


def test_clean_rows_come_back_as_they_are():
    rows = asked(*CLEAN)
    assert normalise(rows).kept is rows


@pytest.mark.parametrize(
    ("before", "after", "rules"),
    [
        ("cafe\u0301", "café", ["nfc"]),
        ("a\r\nb\rc\n\nd", "a\nb\nc\n\nd", ["line_ends"]),
        ("\ufeff\u3000 a b \0\u200b\n", "a b", ["trim"]),
        ("\ufeffe\u0301\r\n", "é", ["nfc", "line_ends", "trim"]),
        ("\ufa0a", "\u898b", ["nfc"]),  # a compatibility ideograph with a canonical twin
    ],
)
def test_each_rule_does_its_own_and_is_logged(before, after, rules):
    result = normalise(asked(before))
    assert contents(result.kept)[0][1] == after
    assert result.changes["rule"] == rules
    assert (result.changes["before"][0], result.changes["after"][-1]) == (before, after)
    assert set(result.changes["field"]) == {"messages[1].content"}


def test_rules_can_be_replaced():
    result = normalise(asked(" A "), rules={"lower": str.lower})
    assert contents(result.kept) == [["question 0?", " a "]]
    assert result.changes["rule"] == ["lower"]


def test_normalise_works_on_selected_and_shuffled_rows():
    rows = asked("a ", "b ", "c ", "d ").shuffle(seed=3).select([2, 0])
    expected = [[q, a.strip()] for q, a in contents(rows)]
    assert contents(normalise(rows).kept) == expected


# ---- exact duplicates


def test_the_first_is_kept_and_named():
    rows = asked("x", "y")
    rows = Dataset.from_list([*rows, *(rows[i] | dict(id=f"late{i}", line=9) for i in (0, 1, 0))])
    result = drop_exact_duplicates(rows)
    assert result.kept["id"] == ["r0", "r1"]
    assert result.dropped["id"] == ["late0", "late1", "late0"]
    assert result.dropped["reason"] == [
        "exact duplicate: of row r0 (a.jsonl, line 1)",
        "exact duplicate: of row r1 (a.jsonl, line 2)",
        "exact duplicate: of row r0 (a.jsonl, line 1)",
    ]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Is it so?", "ＩＳ　ｉｔ　ｓｏ？"),
        ("Straße", "STRASSE"),
        ("café", "CAFE\u0301"),
        ("a b", " a\u00a0\n b\u200b"),
        ("用 GPS 导航，可以吗？", "用gps导航, 可以吗?"),
        ("ΑΣ", "ας"),
        ("ﬁne", "fine"),
        ("e\u200b\u0301", "é"),
    ],
)
def test_disguises_have_one_key(a, b):
    assert fold(a) == fold(b)
    assert len(drop_exact_duplicates(asked_same(a, b)).dropped) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3 + 4", "3 + 5"),
        ("3.5", "35"),
        ("it is", "it is not"),
        ("a b", "ab"),
        ("是", "不是"),
        ("a, b", "a b"),
        ("", "a"),
        (None, ""),
        ("简体", "簡體"),
    ],
)
def test_different_content_has_different_keys(a, b):
    assert len(drop_exact_duplicates(asked_same(a, b)).dropped) == 0


def asked_same(*answers):
    return conversations([[("user", "q"), ("assistant", a)] for a in answers])


def test_roles_order_and_borders_of_turns_count():
    rows = conversations(
        [
            [("user", "a"), ("assistant", "b")],
            [("user", "b"), ("assistant", "a")],
            [("system", "a"), ("assistant", "b")],
            [("user", "a b"), ("assistant", "")],
            [("user", "a")],
        ]
    )
    assert len(drop_exact_duplicates(rows).kept) == 5


def test_tool_calls_belong_to_the_key():
    say = lambda name: [
        dict(role="user", content="q"),
        dict(role="assistant", content="", tool_calls=[dict(name=name)]),
    ]
    rows = Dataset.from_list([dict(id=n, messages=say(n)) for n in "ab"])
    assert len(clean(rows).kept) == 2


@FEW
@given(st.lists(ODD, min_size=1, max_size=15))
def test_equals_comparing_every_pair(answers):
    rows = asked_same(*answers)
    folded = [fold(a) for a in answers]
    slow = [f"r{j}" for j in range(len(answers)) if folded[j] not in folded[:j]]
    assert drop_exact_duplicates(rows).kept["id"] == slow


@FEW
@given(st.text(max_size=12))
def test_the_key_does_not_see_case_form_or_spacing(text):
    assert fold(unicodedata.normalize("NFD", text)) == fold(text)
    assert fold(f"\ufeff {text}\n") == fold(text)
    assert fold("".join(c + INVISIBLE for c in text)) == fold(text)


def test_the_key_may_be_given():
    rows = conversations(
        [[("user", q), ("assistant", a)] for q, a in [("q", "1"), ("q", "2"), ("p", "1")]]
    )
    result = drop_exact_duplicates(rows, key=lambda row: row["messages"][0]["content"])
    assert result.kept["id"] == ["r0", "r2"]


def test_keys_are_the_same_in_another_process():
    code = (
        "from instruct_ft.data.clean import conversation_key as k;"
        "print(k(dict(messages=[dict(content='Ｈi', role='user'), dict(role='assistant', content='好')])))"
    )
    for seed in "12":
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        here = conversation_key(
            dict(messages=[dict(role="user", content="hi "), dict(role="assistant", content="好")])
        )
        assert run.stdout.strip() == here


# ---- clean


def test_clean_accounts_for_all_three_steps():
    rows = asked("a", "", "b\r\n")
    rows = Dataset.from_list([*rows, rows[2] | dict(id="copy")])
    result = clean(rows)
    assert result.kept["id"] == ["r0", "r2"]
    assert list(zip(result.dropped["id"], result.dropped["step"])) == [
        ("r1", "drop_empty"),
        ("copy", "drop_exact_duplicates"),
    ]
    assert set(result.changes["rule"]) == {"line_ends", "trim"}
    assert accounting([result])[0]["reasons"] == {"empty answer": 1, "exact duplicate": 1}


def test_all_rows_may_go_and_no_rows_may_come():
    result = clean(asked("", " "))
    assert (len(result.kept), len(result.dropped)) == (0, 2)
    again = clean(result.kept)
    assert (len(again.kept), len(again.dropped)) == (0, 0)
    assert again.kept.features == asked("a").features


def test_rows_without_source_and_line_are_fine():
    rows = Dataset.from_list(
        [dict(id=7, messages=[dict(role="assistant", content=c)]) for c in ("a", "A", "")]
    )
    result = clean(rows)
    assert result.dropped["reason"] == [
        "empty answer: messages[0].content is empty",
        "exact duplicate: of row 7",
    ]
    assert result.dropped["line"] == [None, None]


@pytest.mark.parametrize("step", STEPS)
def test_wrong_input_is_one_sentence(step):
    with pytest.raises(InputError, match=r"got a StepResult; pass the `kept`"):
        step(clean(asked("a")))
    with pytest.raises(
        InputError, match="needs the columns id and messages and got instruction; run to_messages"
    ):
        step(Dataset.from_dict(dict(instruction=["a"])))


def test_importing_clean_loads_no_torch():
    code = (
        "import sys, instruct_ft.data.clean, instruct_ft.data.split; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"

import json
import random
import subprocess
import sys
import unicodedata
import warnings
from itertools import chain

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import printed

from instruct_ft.data import clean as module
from instruct_ft.data.clean import (
    CHECKS,
    FIXES,
    INVISIBLE,
    apply_rules,
    bands,
    blank,
    clean,
    content_hash,
    conversation_key,
    drop_duplicate_ids,
    drop_empty,
    drop_exact_duplicates,
    drop_near_duplicates,
    fold,
    handle_missing,
    match_key,
    minhash,
    missing_values,
    near_duplicate_pairs,
    normalise,
    rule_counts,
    said,
    shingles,
)
from instruct_ft.data.collect import accounting, collect, steps
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
STEPS = [
    drop_empty,
    normalise,
    drop_exact_duplicates,
    drop_near_duplicates,
    drop_duplicate_ids,
    apply_rules,
    clean,
]
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
        (None, "null"),
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
            offset=None,
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
    here = conversation_key(
        dict(messages=[dict(role="user", content="hi "), dict(role="assistant", content="好")])
    )
    assert {printed(code, seed).strip() for seed in (1, 2)} == {here}


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
    with pytest.raises(InputError, match="got instruction; (run|rename)"):
        step(Dataset.from_dict(dict(instruction=["a"])))


def test_importing_clean_loads_no_torch():
    code = (
        "import sys, instruct_ft.data.clean, instruct_ft.data.split; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ---- near-duplicates: a generator of instruction rows with known copies and near misses

WORDS = {
    "en": (
        "amber river market garden simple often people around window bright learn table music winter "
        "carry story little paper travel bridge silver letter answer follow second member happen doctor "
        "summer forest island number common reason person picture almost always before during village"
    ).split(),
    "zh": "城市河流学生老师春天音乐学习喜欢可以因为所以我们他们世界问题方法重要发展经济文化历史自然科学技术生活工作时间地方开始认为知道研究影响变化环境社会",
}
END = {"en": ". ", "zh": "。"}


def sentence(rng, lang):
    if lang == "en":
        return " ".join(rng.choices(WORDS["en"], k=rng.randrange(7, 13))).capitalize()
    return "".join(rng.choices(WORDS["zh"], k=rng.randrange(12, 22)))


def document(rng, lang):
    asked = sentence(rng, lang)[:60]
    answer = END[lang].join(sentence(rng, lang) for _ in range(rng.randrange(4, 7)))
    return asked, answer + END[lang].strip()


def swapped(rng, text):
    "The text with one character replaced"
    i = rng.randrange(5, len(text) - 5)
    return text[:i] + ("x" if text[i].isascii() else "好") + text[i + 1 :]


TRADITIONAL = str.maketrans(
    "学师乐习欢为们问题发经济历时间开认识响变环", "學師樂習歡為們問題發經濟歷時間開認識響變環"
)
WIDE = {c: c + 0xFEE0 for c in range(0x21, 0x7F)}
COPIES = {
    "exact": lambda q, a, lang, rng: (q, a),
    "space": lambda q, a, lang, rng: (q + " ", "  " + a.replace(END[lang], END[lang] + "\n")),
    "form": lambda q, a, lang, rng: (q.upper(), a.upper().translate(TRADITIONAL)),
    "wide": lambda q, a, lang, rng: (q, a.translate(WIDE)),
    "hidden": lambda q, a, lang, rng: (q, "\u200b".join(a[i : i + 9] for i in range(0, len(a), 9))),
    "points": lambda q, a, lang, rng: (q, a.replace(END[lang], {"en": "! ", "zh": "；"}[lang])),
    "typo": lambda q, a, lang, rng: (q, swapped(rng, a)),
    "hello": lambda q, a, lang, rng: (q, {"en": "Sure! ", "zh": "好的！"}[lang] + a),
    "closing": lambda q, a, lang, rng: (q, a + {"en": " Glad to help!", "zh": "希望有用。"}[lang]),
    "please": lambda q, a, lang, rng: ({"en": "Please ", "zh": "请"}[lang] + q, a),
    "order": lambda q, a, lang, rng: (q, END[lang].join(a.rstrip(". 。").split(END[lang])[::-1])),
    "cut": lambda q, a, lang, rng: (q, END[lang].join(a.split(END[lang])[:-1])),
}
SUM = {
    "en": "Please work out how much {} times {} is and write down every step of it.",
    "zh": "请计算{}乘以{}等于多少，并且写出完整的计算步骤。",
}


def planted(lang, base=200, copies=10, misses=40, seed=0):
    "Rows, and for each what it is: base, a kind of copy, or miss"
    rng = random.Random(f"{lang}{seed}")
    rows = [(document(rng, lang), "base", f"b{i}") for i in range(base)]
    kinds = list(COPIES)
    for n, i in enumerate(rng.sample(range(base), copies * len(kinds))):
        kind = kinds[n % len(kinds)]
        rows.append((COPIES[kind](*rows[i][0], lang, rng), kind, f"b{i}"))
    for n in range(misses):
        a, b = rng.randrange(1000, 9999), rng.randrange(1000, 9999)
        rows.append(((SUM[lang].format(a, b), f"{a} x {b} = {a * b}"), "miss", f"m{n}"))
    return rows


def table(rows):
    return Dataset.from_list(
        [dict(id=f"{i}", instruction=q, output=a) for i, ((q, a), _, _) in enumerate(rows)]
    )


def texts_of(rows):
    return [f"{q}\n{a}" for (q, a), _, _ in rows]


def every_pair(texts, threshold=0.8, digit_guard=True):
    "The definition, without an index"
    looks = [module._look(text, digit_guard) for text in texts]
    found, sets = [], [shingles(key) for key, _ in looks]
    for j, (key, numbers) in enumerate(looks):
        for i in range(j):
            both = len(sets[i] & sets[j])
            score = both / (len(sets[i]) + len(sets[j]) - both)
            if score >= threshold and key and not module._conflict(looks[i][1], numbers):
                found.append((i, j, score))
    return sorted(found)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_g15_planted_copies_are_found_and_no_different_sum_is_merged(lang):
    rows = planted(lang)
    result = drop_near_duplicates(table(rows), ["instruction", "output"])
    gone = [int(i) for i in result.dropped["id"]]
    right = [i for i, w in zip(gone, result.dropped["witness"]) if rows[i][2] == rows[int(w)][2]]
    assert len(right) >= 0.99 * len(gone)
    assert len(right) >= 0.97 * sum(kind in COPIES for _, kind, _ in rows)
    assert not any(rows[i][1] in ("base", "miss") for i in gone)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_g15_equals_the_exact_join_below_2000_rows(lang):
    texts = texts_of(planted(lang, base=120, copies=6, misses=30, seed=3)) + ["", "", "cat", "?"]
    random.Random(1).shuffle(texts)
    for threshold, guard in ((0.8, True), (0.6, False)):
        found = near_duplicate_pairs(texts, threshold, guard)
        assert found == every_pair(texts, threshold, guard)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_bands_alone_find_nearly_all_of_what_the_exact_join_finds(lang, monkeypatch):
    texts = texts_of(planted(lang, base=180, copies=15))
    exact = set(near_duplicate_pairs(texts))
    monkeypatch.setattr(module, "_EXACT", 0)
    found = set(near_duplicate_pairs(texts))
    assert found <= exact
    assert len(found) >= 0.97 * len(exact)


LETTERS = st.text(st.sampled_from("ab 12好吗.,"), max_size=14)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(LETTERS, max_size=14), st.sampled_from([0.3, 0.5, 0.8, 1.0]), st.booleans())
def test_g15_pairs_equal_the_definition_on_any_texts(texts, threshold, guard):
    assert near_duplicate_pairs(texts, threshold, guard) == every_pair(texts, threshold, guard)


def named(*texts, **columns):
    rows = dict(id=[f"r{i}" for i in range(len(texts))], text=list(texts))
    return Dataset.from_dict(rows | columns)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(LETTERS, min_size=1, max_size=14))
def test_g14_every_removed_row_names_a_kept_row_that_reaches_the_threshold(texts):
    result = drop_near_duplicates(named(*texts), "text")
    kept = list(result.kept["id"])
    score = {(f"r{i}", f"r{j}"): s for i, j, s in every_pair(texts)}
    for row in result.dropped:
        assert row["witness"] in kept
        assert row["similarity"] == score[row["witness"], row["id"]] >= 0.8
    for n, b in enumerate(kept):
        assert all((a, b) not in score for a in kept[:n])


def test_g14_no_chain_deletion():
    words = WORDS["en"]
    texts = [" ".join(words[i : i + 14]) for i in range(4)]
    result = drop_near_duplicates(named(*texts), "text")
    assert list(zip(result.dropped["id"], result.dropped["witness"])) == [
        ("r1", "r0"),
        ("r3", "r2"),
    ]


def test_g14_the_same_in_every_process():
    code = (
        "import random; from instruct_ft.data import clean as m; m._EXACT = 5;"
        "r = random.Random(0); w = [''.join(r.choices('abcde', k=4)) for _ in range(30)];"
        "t = [' '.join(r.choices(w, k=6)) for _ in range(60)]; t += [x + r.choice(w) for x in t];"
        "print(m.near_duplicate_pairs(t, 0.5), m.minhash(t).sum())"
    )
    outputs = {printed(code, seed) for seed in (1, 2)}
    assert len(outputs) == 1
    assert "(" in outputs.pop()


def test_minhash_does_not_depend_on_what_stands_beside_a_text():
    texts = ["amber river market", "好好学习天天向上", "x", "long " * 3000]
    together = minhash(texts)
    for text, row in zip(texts, together, strict=True):
        assert (minhash([text])[0] == row).all()


def test_g16_short_texts_are_compared_whole():
    assert drop_near_duplicates(named("cat", "dog", "cat"), "text").kept["id"] == ["r0", "r1"]
    assert len(drop_near_duplicates(named("好", "坏", "好。", "不好"), "text").kept) == 3
    assert len(drop_near_duplicates(named("", "", "a", " "), "text").kept) == 4
    zh = "我们今天去公园散步"
    assert near_duplicate_pairs([zh, "他们明天去学校读书"]) == []
    assert len(shingles(match_key(zh))) == len(zh) - 1


@pytest.mark.parametrize("exact", [2000, 30])
def test_g17_rows_added_at_the_end_change_no_earlier_decision(exact, monkeypatch):
    monkeypatch.setattr(module, "_EXACT", exact)
    rows = planted("en", base=60, copies=4, misses=10)
    long = drop_near_duplicates(table(rows), ["instruction", "output"])
    for n in (20, 61, 100):
        short = drop_near_duplicates(table(rows[:n]), ["instruction", "output"])
        kept = [i for i in long.kept["id"] if int(i) < n]
        assert list(short.kept["id"]) == kept
        assert list(short.dropped["witness"]) == long.dropped["witness"][: n - len(kept)]


def test_g17_new_rows_against_old_ones_name_the_old_row():
    old = named("The quick brown fox jumps over the dog.", "the quick brown fox jumps over the dog")
    old = old.remove_columns("id").add_column("id", ["old0", "old1"])
    new = named("Something else entirely.", "The quick brown fox jumps over the dog!")
    result = drop_near_duplicates(new, "text", against=old)
    assert result.kept["id"] == ["r0"]
    assert list(result.dropped["witness"]) == ["old0"]
    assert len(drop_near_duplicates(new, "text", against=old.select([])).kept) == 2


def test_pairs_and_exempt_rows_stay():
    she = [f"The nurse told the doctor that {p} was late for work." for p in ("he", "she", "she")]
    rows = named(*she, twin=[1, 1, None], hold=[False, True, False])
    assert drop_near_duplicates(rows, "text").kept["id"] == ["r0"]
    assert drop_near_duplicates(rows, "text", pair="twin").kept["id"] == ["r0", "r1"]
    assert drop_near_duplicates(rows, "text", exempt="hold").kept["id"] == ["r0", "r1"]


def test_a_source_that_loses_most_of_its_rows_is_named():
    rows = named(*["The same sentence each time."] * 25, source=["t.csv"] * 25)
    with pytest.warns(UserWarning, match=r"t\.csv: 24 of 25 rows .* give pair= or exempt="):
        drop_near_duplicates(rows, "text")


def test_full_buckets_still_find_copies_with_the_same_numbers(monkeypatch):
    monkeypatch.setattr(module, "_EXACT", 0)
    monkeypatch.setattr(module, "_ROOM", 3)
    sums = [SUM["en"].format(1000 + i, 5000 + i) for i in range(60)]
    texts = [*sums, sums[40].replace("Please", "Kindly please")]
    assert [p[:2] for p in near_duplicate_pairs(texts)] == [(40, 60)]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Order 1,000 bolts of steel for the old bridge", "order 1000 bolts of steel for the old bridge!", True),
        ("Order 1,000 bolts of steel for the old bridge", "Order 1.000 bolts of steel for the old bridge", False),
        ("What do you get if you take 12 - 7 apples?", "What do you get if you take 12 + 7 apples?", False),
        ("What do you get for 3 * 4 in this program?", "What do you get for 3 / 4 in this program?", False),
        ("用软件计算 12 加 7 是多少", "用軟件計算１２加７是多少？", True),
        ("用软件计算 12 加 7 是多少", "用软件计算 12 加 8 是多少", False),
        ("C#", "C", False),
        ("!", "?", False),
    ],
)  # fmt: skip
def test_what_is_the_same_and_what_is_not(a, b, same):
    if "軟" in b:
        pytest.importorskip("opencc")
    assert bool(near_duplicate_pairs([a, b])) is same


def test_keys_of_rows():
    rows = Dataset.from_list(
        [
            dict(id=1, a="one two three four", b="five", messages=[dict(role="user", content="x y z w v u")]),
            dict(id=2, a="one two three four", b=None, messages=[dict(role="user", content="X y z w v u!")]),
        ]
    )  # fmt: skip
    gone = lambda key: list(drop_near_duplicates(rows, key).dropped["id"])
    assert gone("a") == gone(None) == gone(lambda row: row["a"][::-1]) == ["2"]
    assert gone(["a", "b"]) == []
    assert said([dict(content="a"), None, 3]) == "a\n3"
    with pytest.raises(InputError, match="key = 'c': there is no column 'c'; the rows have id, a"):
        drop_near_duplicates(rows, "c")
    with pytest.raises(InputError, match="threshold = 0: give a number above 0"):
        drop_near_duplicates(rows, "a", threshold=0)
    with pytest.raises(InputError, match="None is no text"):
        near_duplicate_pairs(["a", None])


def test_bands_suit_the_threshold():
    for threshold in (0.2, 0.5, 0.8, 0.95):
        number, width = bands(threshold)
        assert number * width <= 126
        assert (1 - threshold**width) ** number <= 0.005 or width == 1


def test_surrogates_and_emoji_can_be_compared():
    odd = "\ud800 wild 👩\u200d🚀 text with 𠀀 signs"
    assert near_duplicate_pairs([odd, odd.upper(), "x" * 20]) == [(0, 1, 1.0)]


# ---- missing values


def test_g09_missing_null_empty_and_blank_are_told_apart():
    rows = [
        dict(id="a", x="1"),
        dict(id="b"),
        dict(id="c", x=None),
        dict(id="d", x=""),
        dict(id="e", x="\u200b "),
    ]
    assert missing_values(rows)["x"] == dict(missing=1, null=1, empty=1, blank=1, present=1)
    turns = [
        [dict(role="user", content="q"), dict(role="assistant", **c)]
        for c in ({"content": None}, {}, {"content": ""})
    ]
    rows = collect([dict(messages=m) for m in turns]).kept
    whys = [reason.split()[-1] for reason in drop_empty(rows).dropped["reason"]]
    assert whys == ["null", "missing", "empty"]  # fmt: skip


def test_g09_the_policy_is_explicit_and_an_empty_output_never_reaches_training():
    rows = Dataset.from_dict(
        dict(id=list("abcd"), input=["x", None, "", " "], output=["1", "2", "", None])
    )
    with pytest.raises(InputError, match="input: 1 null, 1 empty, 1 blank; say what to do"):
        handle_missing(rows, {"output": "drop"})
    with pytest.raises(InputError, match="there is no column 'ouput'"):
        handle_missing(rows, {"ouput": "drop", "*": "keep"})
    with pytest.raises(InputError, match='give "drop", "keep" or'):
        handle_missing(rows, {"*": "delete"})
    with pytest.raises(InputError, match=r"input: \[1\] does not fit Value"):
        handle_missing(rows, {"input": {"fill": [1]}, "*": "keep"})
    result = handle_missing(rows, {"output": "drop", "*": {"fill": "-"}})
    assert result.kept["input"] == ["x", "-"]
    assert result.dropped["reason"] == ["empty value: in output", "null value: in output"]
    assert result.changes.to_list() == [
        dict(id="b", field="input", rule="fill null", before=None, after="-")
    ]
    assert rows["input"][1] is None
    chats = [[("user", "q"), ("assistant", a)] for a in ("", None, " ", "fine")]
    assert len(clean(conversations(chats)).kept) == 1


# ---- ids


def test_g12_same_id_and_content_is_merged_other_content_is_set_aside_with_both_lines():
    rows = Dataset.from_dict(
        dict(
            id=["x", "x", "x", None, None],
            source=["a"] * 5,
            line=[1, 2, 3, 4, 5],
            text=["s", "s", "t", "u", "u"],
        )
    )
    result = drop_duplicate_ids(rows)
    assert result.kept["id"] == ["x", content_hash(dict(text="u"))]
    assert list(result.dropped["reason"]) == [
        "duplicate id: same content as row x (a, line 1) (here: a, line 2)",
        "id conflict: other content than row x (a, line 1) (here: a, line 3)",
        f"duplicate id: same content as row {content_hash(dict(text='u'))} (a, line 4) (here: a, line 5)",
    ]
    assert (
        content_hash(dict(id=3, text="u", line=9))
        == content_hash(dict(text="u", n=None))
        == "c7807c0a552c3e3c"
    )


def test_g13_exact_dedup_keeps_the_first_in_order_and_is_idempotent():
    rows = asked_same("b", "a", "B ", "c", "A")
    once = drop_exact_duplicates(rows)
    assert once.kept["id"] == ["r0", "r1", "r3"]
    assert drop_exact_duplicates(once.kept).kept["id"] == once.kept["id"]


# ---- rules


def exchange(*rows):
    return Dataset.from_list(
        [dict(id=f"r{i}", instruction=q, input=g, output=a) for i, (q, g, a) in enumerate(rows)]
    )


ANSWERS = {
    "en": [
        "Water boils at 100 degrees.",
        "1. Oslo\n2. Bergen\n\nBoth are in Norway",
        "Fritz—a “friend”—said: 3 < 4 & 5 > 2.",
    ],
    "zh": ["水在一百度沸腾。", "一、奥斯陆\n二、卑尔根", "他说：“好的，谢谢！”（真的）……《书》"],
}
ASKED = {"en": "Tell me something about it.", "zh": "请告诉我一些有关的事。"}
MOJIBAKE = {"en": "naïve café — “yes”", "zh": "好的，欧洲的水是干净的，我们可以喝。"}
FAULTS = {
    "no_input_marker": lambda q, g, a, lang: (
        q,
        random.Random(a).choice(["<noinput>", "No input", "无输入", "<无输入>"]),
        a,
    ),
    "escaped_newlines": lambda q, g, a, lang: (q, g, (a + "\n\n" + a).replace("\n", "\\n")),
    "html_residue": lambda q, g, a, lang: (q, g, f"<div class='x'><p>{a}&nbsp;</p></div>"),
    "special_tokens": lambda q, g, a, lang: (
        q,
        g,
        a + random.Random(a).choice(["</s>", "<|im_end|>", "<|eot_id|>", "[/INST]"]),
    ),
    "control_characters": lambda q, g, a, lang: (q, g, a[:5] + "\x08\x0b\x7f" + a[5:]),
    "zero_width": lambda q, g, a, lang: ("\ufeff" + q[:4] + "\u200b" + q[4:], g, a),
    "encoding": lambda q, g, a, lang: (q, g, (MOJIBAKE[lang] + a).encode().decode("latin-1")),
}
MENDED = {
    "escaped_newlines": lambda a, lang: a + "\n\n" + a,
    "html_residue": lambda a, lang: a.replace("&", "&"),
    "encoding": lambda a, lang: MOJIBAKE[lang] + a,
}


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fixable_fault_is_mended_byte_for_byte_and_logged(fault, lang):
    rows = [(ASKED[lang], "", a) for a in ANSWERS[lang]]
    result = apply_rules(exchange(*(FAULTS[fault](*row, lang) for row in rows)))
    mend = MENDED.get(fault, lambda a, lang: a)
    assert len(result.dropped) == 0
    assert list(zip(result.kept["instruction"], result.kept["input"], result.kept["output"])) == [
        (q, g, mend(a, lang)) for q, g, a in rows
    ]
    assert set(result.changes["rule"]) == {fault}
    assert rule_counts(result) == {fault: 3}


HOPELESS = {
    "empty_answer": [("Q?", "", ""), ("问？", "", " \n\t")],
    "picture_request": [("Draw a picture of a cat.", "", "<No Output>"), ("画一张猫的图片。", "", "无")],
    "no_answer": [("问？", "", a) for a in ("N/A", "nan", "None", "<No Output>", "无")],
    "only_attachment": [("Q?", g, "Fine.") for g in ("[附件图片]", "<Picture Attached>", "![a](https://x.example/y.png)")],
    "only_url": [("Sum it up.", "https://news.example.com/article-3", "Rain is expected.")],
    "merged_instruction": [("Q?", "", "A.\n##\n18. Instruction: Find the noun.\n18. Input:\nApple")],
    "refusal": [("Q?", "", "I'm sorry, but I cannot help with that."), ("问？", "", "作为一个人工智能语言模型，我无法完成这个请求。")],
    "echo": [("Name two towns.", "", "Name two towns"), ("说出两座城市。", "挪威", "说出两座城市。挪威")],
    "wrong_language": [("Name two towns.", "", "奥斯陆和卑尔根都在挪威。"), ("说出两座城市。", "", "Oslo and Bergen are both in the north of Europe.")],
    "repetition": [("Q?", "", "It is very" + " very important" * 20), ("问？", "", "这个" + "很重要" * 30)],
    "placeholder": [("Who are you?", "", "I am {{name}}, made by {{ author }}.")],
    "truncated": [("Q?", "", "It is a long story of many kings, queens and the"), ("问？", "", "一个很长的故事，讲的是许多国王和王后，他们住在北方的一座大城里，后来又去了南方，以及")],
    "special_token": [("Q?", "", "One<|im_start|>user two")],
}  # fmt: skip


@pytest.mark.parametrize("kind", HOPELESS)
def test_each_fault_without_a_mend_is_set_aside_by_name(kind):
    result = apply_rules(exchange(*HOPELESS[kind]))
    assert [r.split(": ")[0] for r in result.dropped["reason"]] == [kind] * len(HOPELESS[kind])
    assert rule_counts(result) == {kind: len(HOPELESS[kind])}
    without = {name: check for name, check in CHECKS.items() if name not in (kind, "no_answer")}
    if kind not in ("picture_request",):
        assert len(apply_rules(exchange(*HOPELESS[kind]), checks=without).dropped) == 0
    chats = [[("user", f"{q}\n{g}" if g else q), ("assistant", a)] for q, g, a in HOPELESS[kind]]
    assert len(apply_rules(conversations(chats)).kept) == 0


SOUND = [
    ("Write hello world in C.", "", 'printf("Hello\\n"); return 0;'),
    ("Give it in LaTeX.", "", "$\\nabla f \\neq 0$ and $\\nu > 1$"),
    ("Write a web page that says hi.", "", "<div><p>Hi.&nbsp;</p></div>"),
    ("Show a table.", "", "<div><table><tr><td>1</td></tr></table></div>"),
    ("What does </s> mean?", "", "In many models </s> ends a text, as [/INST] does."),
    ("Which family is this?", "👩\u200d👧", "A mother and her daughter: 👩\u200d👧, می\u200cخواهم."),
    ("Describe the picture.", "https://example.org/cat.jpg", "A cat sits there."),
    ("Sum it up.", "https://example.org/rain-in-oslo", "The rain will go on."),
    ("Write a letter to say no.", "", "I am sorry to say that I cannot come on Monday, because my sister visits me that day from far away. " * 2),
    ("Explain what a language model cannot do.", "", "As an AI, it cannot see the present; " + "it has read much, and it may be wrong in what it says. " * 3),
    ("Repeat after me: hello", "", "Repeat after me: hello"),
    ("Translate into Chinese: good morning", "", "早上好，祝你今天愉快。"),
    ("写一个函数。", "", "```\ndef add(first, second):\n    return first + second  # the sum of two numbers\n```"),
    ("列出披头士的专辑。", "", "1. Abbey Road\n2. Let It Be\n3. Revolver and Rubber Soul and Help too"),
    ("Write a Jinja template for {{name}}.", "", "Hello {{name}}!"),
    ("Draw a line.", "", "-" * 60 + "\n" + "|    " * 20),
    ("笑一个。", "", "哈哈哈哈哈哈哈哈"),
    ("Give instructions.", "", "Follow these instructions: first mix, then bake."),
    ("好的，谢谢！", "（“真的”吗？）", "……《书》、；：２² ½ ﬁ Ｗ"),
    ("Is one of them prime? Say which.", "", "None of them is prime."),
]  # fmt: skip


def test_g18_no_sound_row_is_changed_or_set_aside():
    for step in (apply_rules, lambda rows: apply_rules(rows, fixes=FIXES, checks=CHECKS)):
        result = step(exchange(*SOUND))
        assert result.dropped["reason"] == []
        assert result.changes.to_list() == []
    chats = conversations(
        [[("user", f"{q}\n{g}" if g else q), ("assistant", a.strip())] for q, g, a in SOUND]
    )
    result = clean(chats)
    assert result.kept.to_list() == chats.to_list()
    assert len(result.changes) == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [
                "<p>",
                "</p>",
                "&lt;",
                "\\n",
                "\\r",
                "\n",
                "</s>",
                "<|im_end|>",
                " ",
                "a",
                "é",
                "Ã©",
                "\x08",
                "\u200b",
                "No input",
                "<noinput>",
                "好",
            ]
        ),
        max_size=7,
    ).map("".join)
)
def test_g18_fixes_settle_and_are_logged(text):
    first = apply_rules(exchange(("Q?", text, text)), checks={})
    again = apply_rules(first.kept, checks={})
    assert again.kept.to_list() == first.kept.to_list()
    replay = dict(input=text, output=text)
    for change in first.changes:
        assert replay[change["field"]] == change["before"] != change["after"]
        replay[change["field"]] = change["after"]
    assert first.kept[0] == dict(id="r0", instruction="Q?", **replay)


def test_rules_know_multi_turn_chats_and_need_answers():
    rows = conversations(
        [
            [
                ("user", "Hi"),
                ("assistant", "Hello"),
                ("user", "Name a fruit.\n<noinput>"),
                ("assistant", "Apple</s>"),
            ],
            [
                ("user", "Hi"),
                ("assistant", "N/A"),
                ("user", "Name a fruit."),
                ("assistant", "Apple"),
            ],
        ]
    )
    result = apply_rules(rows)
    assert contents(result.kept) == [["Hi", "Hello", "Name a fruit.", "Apple"]]
    assert list(result.changes["field"]) == ["messages[2].content", "messages[3].content"]
    assert result.dropped["reason"] == ["no_answer: 'N/A'"]
    with pytest.raises(
        InputError, match="needs messages, or instruction and output, and got id, text; rename"
    ):
        apply_rules(named("a"))


def test_the_steps_run_in_a_row_and_add_up():
    rows = collect(
        [
            dict(instruction=q, input=g, output=a)
            for q, g, a in [*SOUND, *chain.from_iterable(HOPELESS.values())]
        ]
    ).kept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = steps(
            [
                drop_duplicate_ids,
                apply_rules,
                lambda r: drop_near_duplicates(r, ["instruction", "input", "output"]),
            ]
        )(rows)
    assert sum(len(r.dropped) for r in results) + len(results[-1].kept) == len(rows)
    assert sum(sum(line["reasons"].values()) for line in accounting(results)) == len(rows) - len(
        results[-1].kept
    )

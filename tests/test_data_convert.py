"""convert: four forms, one conversation; what does not fit is named by its field."""

import copy
import json

import numpy as np
import orjson
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instruct_ft.data.collect import accounting, collect, steps, to_dataset
from instruct_ft.data.convert import (
    TASK_TEMPLATES,
    WRITABLE,
    Template,
    convert,
    detect_format,
    from_instructions,
    from_messages,
    instances,
    read_label,
    read_spans,
    to_instructions,
    to_messages,
    to_spans,
    to_tags,
    token_ids,
    unify,
    vectors,
)
from instruct_ft.data.label import TAGGINGS
from instruct_ft.settings import InputError

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["007", "null", "None", "", " ", "[1]", '{"a":1}', "\u2028", "a\r\nb"]),
)


@st.composite
def talks(draw):
    "A conversation that every form can hold"
    turns = []
    if draw(st.booleans()):
        turns.append({"role": "system", "content": draw(texts.filter(bool))})
    for _ in range(draw(st.integers(1, 3))):
        turns += [
            {"role": "user", "content": draw(texts)},
            {"role": "assistant", "content": draw(texts)},
        ]
    return turns


def ask(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ONE = ask(("user", "q"), ("assistant", "a"))


def reason(row, form=None):
    "The reason why a single row is set aside"
    got = to_messages([row], form)
    assert len(got.kept) == 0 and len(got.dropped) == 1
    return got.dropped[0]["reason"]


def messages(row, form=None):
    got = to_messages([row], form)
    assert list(got.dropped["reason"]) == []
    return got.kept[0]["messages"]


# --- round trips ------------------------------------------------------------------------------------------------


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(conversations=st.lists(talks(), min_size=1, max_size=5))
@pytest.mark.parametrize("form", WRITABLE)
def test_every_form_gives_back_the_same_turns(tmp_path, form, conversations):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(from_messages(c, form)) for c in conversations))
    got = to_messages(collect(path).kept)
    assert got.detected == {str(path): form}
    assert got.kept["messages"][:] == conversations


def test_several_files_of_different_forms_in_one_call(tmp_path):
    talk = ask(
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "b")
    )
    for form in WRITABLE:
        (tmp_path / f"{form}.jsonl").write_bytes(orjson.dumps(from_messages(talk, form)))
    got = to_messages(collect(f"{tmp_path}/*.jsonl").kept)
    assert got.detected == {str(tmp_path / f"{f}.jsonl"): f for f in WRITABLE}
    assert got.kept["messages"][:] == [talk] * 4
    assert f"{tmp_path}/alpaca.jsonl: alpaca (1 row)" in got.summary()


def test_tool_turns_survive_in_sharegpt_and_are_refused_by_alpaca():
    talk = ask(("user", "q"), ("assistant", "{call}"), ("tool", "{result}"), ("assistant", "a"))
    for form in ("messages", "sharegpt", "prompt_completion"):
        assert messages(from_messages(talk, form)) == talk
    with pytest.raises(InputError, match="turn 3 has role 'tool'"):
        from_messages(talk, "alpaca")


def test_what_alpaca_cannot_hold_is_refused():
    for talk in (ONE[:1], ask(("system", ""), *[(t["role"], t["content"]) for t in ONE]), []):
        with pytest.raises(InputError):
            from_messages(talk, "alpaca")
    with pytest.raises(InputError, match="no form 'chatml'"):
        from_messages(ONE, "chatml")


# --- each form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, user",
    [
        ({"instruction": "i", "input": "x", "output": "a"}, "i\nx"),
        ({"instruction": "i", "input": "", "output": "a"}, "i"),
        ({"instruction": "i", "input": None, "output": "a"}, "i"),
        ({"instruction": "i", "output": "a"}, "i"),
        ({"instruction": "", "input": "x", "output": "a"}, "x"),
        ({"instruction": " i\n", "input": "x", "output": "a"}, " i\n\nx"),
    ],
)
def test_alpaca_joins_instruction_and_input(row, user):
    assert messages(row) == ask(("user", user), ("assistant", "a"))


def test_alpaca_history_and_system():
    row = {"instruction": "i", "output": "a", "history": [["q", "b"]], "system": "s"}
    expected = ask(
        ("system", "s"), ("user", "q"), ("assistant", "b"), ("user", "i"), ("assistant", "a")
    )
    assert messages(row) == expected
    assert messages(row | {"history": None, "system": ""}) == expected[3:]
    assert reason(row | {"history": [["q"]]}) == "`history` 1 is no pair of question and answer"
    assert reason(row | {"history": "q"}).startswith("`history` is no list")


def test_prompt_completion_of_texts_and_of_turns():
    assert messages({"prompt": "q", "completion": " a"}) == ask(("user", "q"), ("assistant", " a"))
    assert messages({"prompt": ONE[:1], "completion": ONE[1:]}) == ONE
    assert messages({"prompt": ONE[:1], "completion": "a"}) == ONE


def test_contents_of_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}, "c"]
    assert (
        messages({"messages": [{"role": "user", "content": parts}, ONE[1]]})[0]["content"] == "abc"
    )
    image = [{"type": "image_url", "image_url": "x"}]
    assert reason({"messages": [{"role": "user", "content": image}, ONE[1]]}) == (
        "`content` of turn 1 holds a part of type 'image_url': only text is taken"
    )


def test_both_namings_of_turns_are_read_under_either_column():
    mixed = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert messages({"messages": mixed}) == messages({"conversations": ONE}) == ONE
    assert to_messages([{"conversations": ONE}]).detected == {"rows": "messages"}
    assert to_messages([{"messages": mixed}]).detected == {"rows": "sharegpt"}


def test_system_column():
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert messages(row | {"system": "s"}) == ask(("system", "s")) + ONE
    twice = {"messages": ask(("system", "t")) + ONE, "system": "s"}
    assert reason(twice).startswith("`system` is given twice")


def test_extra_keys_of_turns_add_no_none_and_are_reported():
    turns = [ONE[0] | {"weight": 0.5}, ONE[1]]
    for rows in ([{"messages": turns}], Dataset.from_list([{"messages": turns}])):
        got = to_messages(rows)
        assert got.kept[0]["messages"] == ONE
        assert got.summary() == ["rows: messages (1 row; not used: weight)"]


def test_none_in_a_turn_is_nothing():
    empty = {"role": None, "content": None, "from": None, "value": None, "weight": None}
    turns = [empty | ONE[0], empty | {"from": "gpt", "value": "a"}]
    got = to_messages([{"messages": turns}])
    assert got.kept[0]["messages"] == ONE and got.unused == {"rows": []}


# --- what does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, said",
    [
        ({"instruction": "i", "output": None}, "`output` is missing"),
        ({"instruction": None, "output": "a"}, "`instruction` is missing"),
        ({"instruction": "i", "output": 7}, "`output` is a number: expected a text"),
        ({"instruction": "i", "output": True}, "`output` is true or false: expected a text"),
        ({"instruction": "i", "output": {"a": "b"}}, "`output` is an object: expected a text"),
        ({"instruction": "i", "input": 3, "output": "a"}, "`input` is a number: expected a text"),
    ],
)
def test_alpaca_reasons_name_the_field(row, said):
    assert reason(row, "alpaca") == said


@pytest.mark.parametrize(
    "turns, said",
    [
        (None, "`messages` is missing"),
        ("q", "`messages` is a text: expected a list of turns"),
        ([], "no turns"),
        (["q"], "turn 1 is a text: expected an object"),
        ([{"content": "q"}], "`role` of turn 1 is missing"),
        ([{"role": "user"}], "`content` of turn 1 is missing"),
        ([{"from": "human"}], "`value` of turn 1 is missing"),
        ([ONE[0], {"role": "user", "content": 5}], "`content` of turn 2 is a number: expected a text"),
        (
            ONE + ask(("bot", "x")),
            "turn 3 has role 'bot': expected system, user, assistant or tool",
        ),
        (ask(("Human", "x")), "turn 1 has role 'Human': expected system, user, assistant or tool"),
        ([{"role": ["user"], "content": "x"}], "turn 1 has role ['user']: expected system, user, assistant or tool"),
        ([ONE[0], {"role": "assistant", "tool_calls": [{"a": 1}]}], "turn 2 has `tool_calls` and no `content`: only text is taken"),
        (ONE[:1], "no assistant turn"),
        (ONE + ask(("system", "s")) + ONE, "turn 3 is a system turn: it can only be the first"),
        (ONE[1:], "turn 1 is an answer: nothing was asked before it"),
        (ask(("system", "s")) + ONE[1:] + ONE, "turn 2 is an answer: nothing was asked before it"),
        (ONE + ONE[:1], "the last turn has role 'user': no answer follows it"),
    ],
)  # fmt: skip
def test_reasons_name_the_turn(turns, said):
    assert reason({"messages": turns}, "messages") == said


def test_several_turns_of_a_role_are_a_conversation():
    talk = ask(("user", "q"), ("user", "q2"), ("assistant", "a"), ("tool", "x"), ("assistant", "b"))
    assert messages({"messages": talk}) == talk


def test_bad_rows_keep_their_place_and_the_counts_add_up(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\nq,a\nq\n"two\nlines",b\n')
    (tmp_path / "b.jsonl").write_text('{"prompt":"q","completion":"a"}\n{"prompt":"q"}\n{\n')
    results = steps([collect, to_messages])([path, tmp_path / "b.jsonl"])
    assert accounting(results) == [
        {
            "step": "collect",
            "rows_in": 6,
            "kept": 4,
            "dropped": 2,
            "reasons": {"wrong number of cells": 1, "not JSON": 1},
        },
        {
            "step": "convert",
            "rows_in": 4,
            "kept": 3,
            "dropped": 1,
            "reasons": {"`completion` is missing": 1},
        },
    ]
    bad = results[1].dropped[0]
    assert (bad["source"], bad["line"], bad["raw"]) == (
        str(tmp_path / "b.jsonl"),
        2,
        '{"instruction":null,"output":null,"prompt":"q","completion":null}',
    )
    assert results[1].kept["line"][:] == [2, 4, 1]


def test_rows_given_as_dicts_lose_nothing_either():
    got = to_messages([{"messages": ONE}, 5, {"messages": ONE[:1]}])
    assert got.rows_in == 3 and got.dropped["line"][:] == [2, 3]
    assert got.dropped["step"][:] == ["collect", "convert"]


def test_input_is_not_modified_and_extra_columns_pass():
    rows = [{"messages": ONE, "task": "t", "lang": "en", "entity": "Peru", "x": 1}]
    before = copy.deepcopy(rows)
    got = to_messages(rows)
    assert rows == before
    assert set(got.kept.column_names) == {
        "id",
        "messages",
        "source",
        "line",
        "task",
        "lang",
        "entity",
    }
    assert (got.kept[0]["task"], got.kept[0]["lang"], got.kept[0]["entity"]) == ("t", "en", "Peru")
    assert got.unused == {"rows": ["x"]}


def test_nothing_in_nothing_out():
    none = collect([], allow_empty=True).kept
    got = to_messages(none)
    assert got.rows_in == 0 and got.detected == {}
    assert got.kept.features == to_messages([{"messages": ONE}]).kept.features


def test_selected_and_shuffled_tables_are_read_in_their_order():
    rows = collect([{"prompt": str(i), "completion": "a"} for i in range(50)]).kept
    some = rows.shuffle(seed=1).select(range(10))
    got = to_messages(some)
    assert [m[0]["content"] for m in got.kept["messages"]] == some["prompt"][:]


# --- detection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, form",
    [
        (["instruction", "output"], "alpaca"),
        (["id", "output", "input", "instruction", "source"], "alpaca"),
        (["messages"], "messages"),
        (["prompt", "messages"], "messages"),
        (["conversations", "tools"], "sharegpt"),
        (["prompt", "completion"], "prompt_completion"),
        (["instruction", "context", "response"], "dolly"),
        (["instruction", "instances", "name"], "self_instruct"),
    ],
)
def test_forms_are_told_by_their_columns(columns, form):
    assert detect_format(columns) == form
    rows = [dict.fromkeys(columns, "x"), dict.fromkeys(columns)]
    assert detect_format(rows) == detect_format(to_dataset(rows)) == form


def test_the_form_of_most_rows_is_taken():
    rows = [{"messages": ONE}] + [{"instruction": "i", "output": "a"}] * 3
    got = to_messages(rows)
    assert got.detected == {"rows": "alpaca"} and len(got.kept) == 3
    assert got.dropped["reason"][:] == ["`instruction` is missing"]


@pytest.mark.parametrize(
    "columns, said",
    [
        (["instructions", "output"], "rename `instructions` to `instruction`"),
        (
            ["Instruction", "Output"],
            "rename `Instruction` to `instruction` and `Output` to `output`",
        ),
        (["question", "answer"], "rename `question` to `instruction` and `answer` to `output`"),
        (["instruction", "answer"], "rename `answer` to `output`"),
        (["message"], "rename `message` to `messages`"),
        (["prompt", "x"], "add a column `completion`"),
        (["text", "label"], "rename the columns"),
        ([], "(none)"),
    ],
)
def test_unknown_columns_are_an_error_that_says_what_to_rename(columns, said):
    with pytest.raises(InputError) as error:
        detect_format(columns, "my.csv")
    text = str(error.value)
    assert text.startswith("my.csv: the columns ") and said in text and "\n" not in text
    for name in columns:
        assert name in text
    for name in ("instruction + output", "messages", "conversations", "prompt + completion"):
        assert name in text


def test_the_error_names_the_file_among_several(tmp_path):
    (tmp_path / "good.jsonl").write_bytes(orjson.dumps({"messages": ONE}))
    (tmp_path / "bad.jsonl").write_bytes(
        orjson.dumps({"id": "x", "instructions": "i", "output": "a"})
    )
    with pytest.raises(InputError, match=r"bad\.jsonl: the columns instructions, output are"):
        to_messages(collect(f"{tmp_path}/*.jsonl").kept)


def test_a_form_can_be_named():
    rows = [{"messages": ONE, "prompt": "q", "completion": "other"}]
    assert to_messages(rows, "prompt_completion").kept[0]["messages"][1]["content"] == "other"
    with pytest.raises(
        InputError, match="no form 'openai'; give one of messages, sharegpt, alpaca"
    ):
        to_messages(rows, "openai")


# --- tool calls and what else a row holds -----------------------------------------------------------------------


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, **more):
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": list(calls)} | more,
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
    ),
    max_leaves=4,
)
arguments = st.dictionaries(st.sampled_from(["x", "y", "城市"]), values, max_size=3)


def no_none_keys(turns):
    "No turn, call or function has a key that holds None"
    for turn in turns:
        calls = turn.get("tool_calls", [])
        for part in (turn, *calls, *(c["function"] for c in calls)):
            assert None not in part.values()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(arguments, min_size=1, max_size=2), min_size=1, max_size=3))
def test_g22_tool_calls_with_different_arguments_survive_every_form_that_holds_them(rows):
    talks_ = [calling(*(call(f"f{i}", **args) for i, args in enumerate(row))) for row in rows]
    given_ = [{"messages": talk, "n": i} for i, talk in enumerate(talks_)]
    for form in ("messages", "sharegpt", "prompt_completion"):
        there = convert(given_, form)
        assert len(there.dropped) == 0
        back = unify(there.kept).kept
        assert back["messages"][:] == talks_ and back["n"][:] == list(range(len(rows)))
        for talk in back["messages"][:]:
            no_none_keys(talk)
    refused = convert(given_, "alpaca")
    assert set(refused.dropped["reason"]) == {
        "turn 2 has `tool_calls`: alpaca holds texts only; write messages."
    }


ALPACA = st.fixed_dictionaries(
    {"instruction": texts, "input": texts, "output": texts},
    optional={
        "system": texts.filter(bool),
        "history": st.lists(st.lists(texts, min_size=2, max_size=2), min_size=1, max_size=2),
    },
)


@settings(max_examples=12, deadline=None)
@given(st.lists(ALPACA, min_size=1, max_size=3), st.sampled_from(WRITABLE))
def test_g22_alpaca_goes_through_every_form_and_comes_back_exactly(rows, form):
    there = convert([row | {"extra": i} for i, row in enumerate(rows)], form)
    assert len(there.kept) == len(rows) == there.rows_in
    back = convert(there.kept, "alpaca").kept
    for row, again in zip(rows, back):
        again = {k: v for k, v in again.items() if v is not None}
        assert {k: again[k] for k in row} == row
        assert again.keys() - row.keys() <= {"id", "source", "line", "extra"}
    assert back["extra"][:] == list(range(len(rows)))


@settings(max_examples=10, deadline=None)
@given(
    st.lists(talks(), min_size=1, max_size=3), st.sampled_from(WRITABLE), st.sampled_from(WRITABLE)
)
def test_g22_any_form_into_any_other_and_back(conversations, one, two):
    first = convert([{"messages": talk} for talk in conversations], one)
    second = convert(first.kept, two)
    assert len(first.dropped) == len(second.dropped) == 0
    assert unify(second.kept).kept["messages"][:] == conversations
    assert convert(second.kept, one).kept.to_list() == first.kept.to_list()


def test_g22_what_a_form_cannot_hold_is_refused_with_the_field():
    def why(talk, form):
        got = convert([{"messages": talk}], form)
        assert got.rows_in == 1 and len(got.kept) == 0
        return got.dropped[0]["reason"]

    with_id = calling({"id": "c1"} | call("f"))
    assert why(with_id, "sharegpt").startswith("turn 2 has `tool_calls` with `id`")
    assert why(calling(call("f"), content="text"), "sharegpt").startswith(
        "turn 2 has `content` beside"
    )
    weighted = [ONE[0], ONE[1] | {"weight": 0.5}]
    assert why(weighted, "alpaca").startswith("turn 2 has `weight`: alpaca holds texts only")
    assert (
        convert([{"messages": weighted}], "sharegpt").kept[0]["conversations"][1]["weight"] == 0.5
    )
    taken = convert([{"messages": ONE, "instruction": "x"}], "alpaca", "messages")
    assert taken.dropped["reason"][:] == ["`instruction` is a column already; rename it first."]
    odd = convert([{"messages": ONE, "input": "not there"}], "alpaca")
    assert odd.dropped["reason"][0].startswith("`input` is not the end of the last question")
    with pytest.raises(InputError, match="no form 'dolly' to write; give one of messages"):
        convert([{"messages": ONE}], "dolly")


def test_nones_that_a_table_filled_in_are_taken_out_and_those_of_the_data_stay():
    rows = [calling(call("f", a=1)), calling(call("g", b=[{"c": None}], d=None))]
    table = Dataset.from_list([{"messages": talk} for talk in rows])
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["d"] is None
    clean = unify(table).kept["messages"][:]
    assert clean == [rows[0], calling(call("g", b=[{}]))]
    assert unify([{"messages": talk} for talk in rows]).kept["messages"][:] == rows


def test_ways_to_write_a_call_are_one():
    expected = calling(call("f", a=1))
    plain = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    for given_ in (
        {"messages": calling(plain)},
        {"messages": [expected[0], {"role": "assistant", "content": None, "tool_calls": [plain]}, *expected[2:]]},
        {"conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name":"f",  "arguments":{"a":1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ]},
    ):  # fmt: skip
        assert unify([given_]).kept["messages"][:] == [expected]
    broken = {"function": {"name": "f", "arguments": "{a"}}
    assert unify([{"messages": calling(broken)}]).kept[0]["messages"][1]["tool_calls"] == [
        {"type": "function"} | broken
    ]


@pytest.mark.parametrize(
    "turn, said",
    [
        ({"from": "function_call", "value": "f(1)"}, "`value` of turn 2 is no JSON: expected a function call"),
        ({"from": "function_call", "value": "[1]"}, "`value` of turn 2 is no function call: expected `name` and `arguments`"),
        ({"from": "function_call"}, "`value` of turn 2 is missing"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "`tool_calls` of turn 2 holds no function with a name"),
        ({"role": "assistant", "tool_calls": ["f"]}, "`tool_calls` of turn 2 holds no function with a name"),
        ("x", "turn 2 is a text: expected an object"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "`content` of turn 2 holds a part of type 'image_url': only text is taken"),
    ],
)  # fmt: skip
def test_unify_names_the_field(turn, said):
    got = unify([{"messages": [ONE[0], turn, ONE[1]]}], "messages")
    assert got.dropped["reason"][:] == [said] and got.dropped["step"][:] == ["unify"]


def test_dolly_and_self_instruct_are_read():
    dolly = {"instruction": "i", "context": "x", "response": "a", "category": "qa"}
    got = unify([dolly, dolly | {"context": ""}])
    assert got.detected == {"rows": "dolly"} and got.kept["category"][:] == ["qa", "qa"]
    assert got.kept["messages"][:] == [ask(("user", u), ("assistant", "a")) for u in ("i\nx", "i")]
    assert got.kept["input"][:] == ["x", None]
    assert convert(got.kept, "alpaca").kept["instruction"][:] == ["i", "i"]
    assert to_messages([dolly]).kept["messages"][:] == got.kept["messages"][:1]
    assert reason(dolly | {"response": None}, "dolly") == "`response` is missing"
    assert reason(dolly | {"context": 3}, "dolly") == "`context` is a number: expected a text"
    seed = {"id": "s1", "instruction": "i", "instances": [{"input": "x", "output": "a"}]}
    assert unify([seed]).kept["messages"][:] == got.kept["messages"][:1]
    many = seed | {"instances": seed["instances"] * 2}
    before = copy.deepcopy(many)
    assert (
        unify([many]).dropped["reason"][0].startswith("`instances` holds 2 instances: expected one")
    )
    assert unify(instances([many, seed])).kept["id"][:] == ["s1/1", "s1/2", "s1"]
    assert many == before


def test_other_columns_keep_their_values_and_types():
    features = Features(
        {"instruction": Value("string"), "output": Value("string"), "input": Value("string"),
         "label": ClassLabel(names=["x", "y"]), "tools": Value("string"), "score": Value("float32")}
    )  # fmt: skip
    rows = Dataset.from_list(
        [dict(instruction="i", output="a", input="", label=1, tools='[{"name": "f"}]', score=0.5)],
        features,
    )
    got = unify(collect(rows).kept.cast_column("label", features["label"])).kept
    assert got.features["label"] == features["label"] and "input" not in got.column_names
    assert (got[0]["tools"], got[0]["score"], got[0]["label"]) == ('[{"name": "f"}]', 0.5, 1)
    mixed = [{"messages": ONE, "prompt": "p"}] * 2 + [
        {"messages": ONE, "tools": [{"name": "f", "x": {}}]}
    ]
    kept = unify(mixed).kept
    assert kept["prompt"][:] == ["p", "p", None] and kept["tools"][2] == [{"name": "f", "x": {}}]


def test_unify_and_convert_account_for_every_row_and_change_no_input(tmp_path):
    rows = [{"messages": ONE}, {"messages": ONE[:1]}, 7, {"messages": calling(call("f"))}]
    before = copy.deepcopy(rows)
    for got in (unify(rows), convert(rows, "alpaca"), convert(rows, "sharegpt")):
        assert got.rows_in == 4
    assert rows == before
    assert convert(rows, "alpaca").dropped["step"][:] == ["collect", "unify", "convert"]
    assert unify(collect([], allow_empty=True).kept).rows_in == 0
    results = steps([collect, unify, lambda r: convert(r, "sharegpt")])(rows)
    assert [r.rows_in for r in results] == [4, 3, 2]


# --- tags and spans ---------------------------------------------------------------------------------------------


def test_g24_rows_keep_surface_and_place_and_illegal_ones_their_line():
    rows = Dataset.from_list([
        dict(id="a", tokens=["e\u0301t\u00e9", "👩‍🚀", "in", "New", "York"], tags=["O", "B-WHO", "O", "B-LOC", "I-LOC"], source="x.conll", line=1),
        dict(id="b", tokens=["a\r\nb", "c"], tags=["B-LOC", "B-LOC"], source="x.conll", line=7),
        dict(id="c", tokens=["x", "y"], tags=["O", "I-LOC"], source="x.conll", line=10),
        dict(id="d", tokens=["x"], tags=["O", "O"], source="x.conll", line=13),
        dict(id="e", tokens=[], tags=[], source="x.conll", line=15),
    ])  # fmt: skip
    got = to_spans(rows)
    assert got.kept["id"][:] == ["a", "b", "e"] and got.rows_in == 5
    surfaces = [[r["text"][s["start"] : s["end"]] for s in r["spans"]] for r in got.kept]
    assert surfaces == [["👩‍🚀", "New York"], ["a\r\nb", "c"], []]
    assert [(r["id"], r["line"], r["reason"]) for r in got.dropped] == [
        ("c", 10, "illegal tags: 'I-LOC' at token 2 after 'O' (BIO)."),
        ("d", 13, "`tags` has 2 entries and `tokens` 1"),
    ]
    assert to_tags(got.kept).kept.select_columns(rows.column_names).to_list() == [
        rows[i] for i in (0, 1, 4)
    ]
    for scheme in TAGGINGS:
        again = to_spans(to_tags(got.kept, scheme).kept, scheme).kept
        assert again.to_list() == got.kept.to_list()


def test_chinese_tokens_are_joined_by_nothing_and_class_labels_are_read():
    features = Features(
        {"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-地", "I-地"]))}
    )
    rows = Dataset.from_dict({"tokens": [list("去利马玩")], "tags": [[0, 1, 2, 0]]}, features)
    got = to_spans(rows, sep="").kept
    assert got[0]["text"] == "去利马玩" and got[0]["spans"] == [
        {"start": 1, "end": 3, "label": "地"}
    ]
    bare = got.remove_columns("tokens")
    assert to_tags(bare, sep="").kept[0]["tags"] == ["O", "B-地", "I-地", "O"]


def test_a_span_that_cuts_a_token_is_set_aside():
    rows = [
        dict(text="in Lima", spans=[dict(start=3, end=6, label="LOC")]),
        dict(text="in Lima", spans=[dict(start=3, end=7, label="LOC")] * 2),
        dict(text="in Lima", spans=[]),
    ]
    got = to_tags(Dataset.from_list(rows))
    assert got.kept["tags"][:] == [["O", "O"]]
    assert got.dropped["reason"][0] == "span 3 to 6 ('Lim') does not begin and end with a token"
    assert "is outside 2 tokens or over another" in got.dropped["reason"][1]
    with pytest.raises(InputError, match="to_tags needs a column `spans`; the rows have text"):
        to_tags(Dataset.from_dict({"text": ["x"]}))
    with pytest.raises(InputError, match="to_spans takes a datasets.Dataset and got a list"):
        to_spans(rows)


# --- tasks ------------------------------------------------------------------------------------------------------


NAMES = ["sports", "not sports", "{text}", "科技", "C++", "C"]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(texts, st.sampled_from(NAMES)), min_size=1, max_size=4),
    st.sampled_from(["classify_en", "classify_zh"]),
)
def test_classification_rows_come_back_exactly_or_are_refused(rows, template):
    given_ = Dataset.from_list([dict(id=f"{i}", text=t, label=y) for i, (t, y) in enumerate(rows)])
    there = to_instructions(given_, template, NAMES)
    assert there.rows_in == len(rows)
    refused = {"C++", "C"}  # the same without their punctuation
    assert set(there.dropped["id"]) <= {r["id"] for r in given_ if r["label"] in refused}
    back = from_instructions(there.kept, template, NAMES)
    assert len(back.dropped) == 0
    expected = [r for r in given_ if r["id"] in set(there.kept["id"])]
    assert [{k: r[k] for k in ("id", "text", "label")} for r in back.kept] == expected


def test_numbers_as_labels_need_names_and_become_them():
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 7]})
    with pytest.raises(InputError, match="`label` holds numbers; give `names`"):
        to_instructions(rows)
    got = to_instructions(rows, names=["no", "yes"])
    assert [m[-1]["content"] for m in got.kept["messages"]] == ["yes", "no"]
    assert got.dropped["reason"][:] == ["`label` is 7: none of the names"]
    typed = rows.select([0, 1]).cast_column("label", ClassLabel(names=["no", "yes"]))
    back = from_instructions(to_instructions(typed).kept, names=["no", "yes"]).kept
    assert back.cast_column("label", ClassLabel(names=["no", "yes"]))["label"][:] == [1, 0]


@pytest.mark.parametrize(
    "answer, label",
    [("Sports", "sports"), (" sports. ", "sports"), ("ＳＰＯＲＴＳ！", "sports"), ("Label: sports", "sports"),
     ("标签：科技。", "科技"), ("科技\n因为……", "科技"), ("not sports", "not sports"), ("no sports", None),
     ("sports or 科技", None), ("", None), (None, None), ("spor", None), ("politics", None)],
)  # fmt: skip
def test_an_answer_is_a_label_or_none_and_never_guessed(answer, label):
    assert read_label(answer, ["sports", "not sports", "科技"]) == label


def test_entities_come_back_exactly_or_are_refused():
    rows = Dataset.from_list([
        dict(id="a", text="Lima is far, said Lima Mendoza", spans=[dict(start=0, end=4, label="LOC"), dict(start=18, end=30, label="PER")]),
        dict(id="b", text="nobody here", spans=[]),
        dict(id="c", text="a lima bean from Lima, lima", spans=[dict(start=23, end=27, label="LOC")]),
        dict(id="d", text="x\ny", spans=[dict(start=0, end=3, label="LOC")]),
        dict(id="e", text="abc", spans=[dict(start=0, end=2, label="LOC"), dict(start=1, end=3, label="LOC")]),
        dict(id="f", text="👩‍🚀 去 利马", spans=[dict(start=6, end=8, label="LOC")]),
    ])  # fmt: skip
    there = to_instructions(rows, "entities_en")
    assert there.kept["id"][:] == ["a", "b", "f"] and there.dropped["id"][:] == ["c", "d", "e"]
    assert there.kept["messages"][1][-1]["content"] == "none"
    back = from_instructions(there.kept, "entities_en", ["LOC", "PER"]).kept
    assert back.select_columns(rows.column_names).to_list() == [rows[i] for i in (0, 1, 5)]
    named = to_instructions(rows, "entities_zh", ["PER"])
    assert "`spans` has the type 'LOC', which is none of the names" in named.dropped["reason"][:]


def test_what_a_model_writes_is_read_or_set_aside():
    rows = to_instructions(
        Dataset.from_dict({"text": ["q"] * 2, "label": ["x", "y"]})
    ).kept.to_list()
    rows[0]["messages"][-1]["content"] = "Z"
    rows.append({"messages": ONE})
    got = from_instructions(Dataset.from_list(rows), names=["x", "y"])
    assert got.kept["label"][:] == ["y"]
    assert got.dropped["reason"][:] == [
        "the answer is none of the labels: 'Z'",
        "the question was not written with this template and these names",
    ]
    spans, lost = read_spans("LOC: Lima\nLOC: Cuzco\n???", "in Lima")
    assert spans == [{"start": 3, "end": 7, "label": "LOC"}] and lost == ["LOC: Cuzco", "???"]
    assert read_spans("None.", "x") == ([], []) and read_spans("无", "x", "无") == ([], [])


def test_templates_that_cannot_be():
    for bad in (dict(ask="no text"), dict(ask="{text} {text}"), dict(ask="{text}", kind="tags")):
        with pytest.raises(InputError, match="give {text} once"):
            Template(**bad)
    with pytest.raises(
        InputError, match=f"no template 'x'; give one of {', '.join(TASK_TEMPLATES)}"
    ):
        to_instructions(Dataset.from_dict({"text": ["a"], "label": ["b"]}), "x")
    with pytest.raises(InputError, match="to_instructions needs a column `spans`"):
        to_instructions(Dataset.from_dict({"text": ["a"], "label": ["b"]}), "entities_en")


# --- features ---------------------------------------------------------------------------------------------------


def test_vectors_learn_from_the_first_texts_only():
    train, test = ["the sky is grey", "天空是灰色的"], ["the sea", "天空", "zzz", ""]
    alone, _ = vectors(train, test)
    assert (abs(alone - vectors(train)[0])).nnz == 0
    a, b = vectors(train, test)
    assert a.dtype == np.float32 and b.shape == (4, a.shape[1])
    assert b[2].nnz == b[3].nnz == 0 and (b @ a.T).toarray().argmax(1).tolist()[:2] == [0, 1]
    a, b = vectors(train, test, kind="hashing", width=64)
    assert a.shape == (2, 64) and b[2].nnz > 0
    full, half = vectors(["ＡＢ", "ab"], kind="tfidf")[0]
    assert (abs(full - half)).nnz == 0
    with pytest.raises(InputError, match="no vectors of kind 'bert'; give tfidf or hashing"):
        vectors(train, kind="bert")


def test_token_ids_of_both_kinds_of_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    small = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
    small.pre_tokenizer = pre_tokenizers.Whitespace()
    large = PreTrainedTokenizerFast(tokenizer_object=small, unk_token="[UNK]")
    assert (
        token_ids(["a b", "c", ""], small)
        == token_ids(["a b", "c", ""], large)
        == [[1, 2], [0], []]
    )


def test_what_is_written_is_json_like_any_other():
    kept = convert([{"messages": calling(call("f", a=None, 城="利马"))}], "sharegpt").kept
    value = kept[0]["conversations"][1]["value"]
    assert value == '{"name": "f", "arguments": {"a": null, "城": "利马"}}'
    assert json.loads(value)["arguments"] == {"a": None, "城": "利马"}

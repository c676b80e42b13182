"""convert: four forms, one conversation; what does not fit is named by its field."""

import copy

import orjson
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instruct_ft.data.collect import accounting, collect, steps, to_dataset
from instruct_ft.data.convert import FORMATS, detect_format, from_messages, to_messages
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
@pytest.mark.parametrize("form", FORMATS)
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
    for form in FORMATS:
        (tmp_path / f"{form}.jsonl").write_bytes(orjson.dumps(from_messages(talk, form)))
    got = to_messages(collect(f"{tmp_path}/*.jsonl").kept)
    assert got.detected == {str(tmp_path / f"{f}.jsonl"): f for f in FORMATS}
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
        (["instruction", "response"], "rename `response` to `output`"),
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

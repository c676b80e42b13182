"""collect: nothing disappears, nothing changes, and every fault is named with its place."""

import csv
import io
import json
import subprocess

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instruct_ft.data.collect import (
    DROPPED,
    StepResult,
    accounting,
    aside,
    collect,
    parse_row,
    set_aside,
    shorten,
    steps,
    to_dataset,
)
from instruct_ft.settings import InputError

PLACE = {"id", "source", "line"}
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# JSON text cannot hold a lone surrogate; everything else is fair
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), texts)
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3),
    max_leaves=6,
)
names = texts.filter(lambda t: t not in PLACE and not t.startswith("orig_") and "\0" not in t)
json_rows = st.lists(st.dictionaries(names, values, min_size=1, max_size=4), min_size=1, max_size=6)


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def contents(rows):
    return [{k: v for k, v in r.items() if k not in PLACE} for r in rows.to_list()]


def union(rows):
    keys = list(dict.fromkeys(k for r in rows for k in r))
    return [{k: r.get(k) for k in keys} for r in rows]


# --- damage: (bytes of the file, lines kept, (line, beginning of the reason) set aside) -------------------------

JSONL = {
    "broken in the middle": (
        b'{"a":1}\n{"a":\n{"a":3}\n',
        [1, 3],
        [(2, "not JSON: it breaks off")],
    ),
    "last line cut": (b'{"a":1}\n{"a":"x', [1], [(2, "not JSON")]),
    "no newline at the end": (b'{"a":1}\n{"a":2}', [1, 2], []),
    "CRLF": (b'{"a":1}\r\n{"a":}\r\n{"a":3}\r\n', [1, 3], [(2, "not JSON")]),
    "blank lines": (b'\n{"a":1}\n  \n\t\n{"a":\n', [2], [(5, "not JSON")]),
    "byte order mark": (b'\xef\xbb\xbf{"a":1}\n{"a":2}\n', [1, 2], []),
    "byte order mark later": (b'{"a":1}\n\xef\xbb\xbf{"a":2}\n', [1], [(2, "not JSON")]),
    "one bad byte": (b'{"a":"x"}\n{"a":"\xff"}\n', [1], [(2, "not UTF-8: byte 0xff at column 7")]),
    "U+2028 and U+0085": ('{"a":"x\u2028y"}\n{"a":"\x85"}\n{\n', [1, 2], [(3, "not JSON")]),
    "NaN": (b'{"a":1}\n{"a":NaN}\n', [1], [(2, "not JSON: NaN or Infinity")]),
    "Infinity": (b'{"a":1}\n{"a":-Infinity}\n', [1], [(2, "not JSON: NaN or Infinity")]),
    "a list": (b'{"a":1}\n[1]\n', [1], [(2, "not an object: a list")]),
    "a text": (b'{"a":1}\n"x"\n', [1], [(2, "not an object: a text")]),
    "null": (b'{"a":1}\nnull\n', [1], [(2, "not an object: null")]),
    "a number": (b'{"a":1}\n7\n', [1], [(2, "not an object: a number")]),
    "two objects on a line": (b'{"a":1}\n{"a":1}{"a":2}\n', [1], [(2, "not JSON")]),
    "lone surrogate": (b'{"a":1}\n{"a":"\\ud800"}\n', [1], [(2, "not JSON")]),
    "raw NUL": (b'{"a":1}\n{"a":"x\x00"}\n', [1], [(2, "not JSON")]),
    "single quotes": (b"{\"a\":1}\n{'a':1}\n", [1], [(2, "not JSON")]),
    "30 digits": (b'{"a":1}\n{"a":' + b"1" * 30 + b"}\n", [1], [(2, "number too large")]),
    "unsigned 64 bits": (b'{"a":1}\n{"a":9223372036854775808}\n', [1], [(2, "number too large")]),
    "list around a row": (b'[{"a":1}]\n{"a":2}\n', [2], [(1, "not an object")]),
    "broken list in the last line": (b'{"a":1}\n[{"a":2}', [1], [(2, "not JSON")]),
}


@pytest.mark.parametrize("kind", JSONL)
def test_a_damaged_jsonl_line_costs_one_row(tmp_path, kind):
    data, kept, bad = JSONL[kind]
    got = collect(put(tmp_path, "a.jsonl", data))
    assert got.kept["line"][:] == kept
    assert got.dropped["line"][:] == [line for line, _ in bad]
    for reason, (_, begins) in zip(got.dropped["reason"], bad, strict=True):
        assert reason.startswith(begins)
    assert set(got.dropped["source"]) <= {str(tmp_path / "a.jsonl")}


CSV = {
    "quoted newline": ('a,b\n"x\ny",1\nz,2\n', [2, 4], []),
    "CRLF": ("a,b\r\nx,1\r\ny,2\r\n", [2, 3], []),
    "cell too many": ("a,b\nx,1\ny,2,3\nz,4\n", [2, 4], [(3, "wrong number of cells: 3")]),
    "cell too few": ("a,b\nx\ny,2\n", [3], [(2, "wrong number of cells: 1")]),
    "quote never closed": ('a,b\nx,1\n"y,2\nz,3\nw,4\n', [2, 4, 5], [(3, "not CSV: a quote")]),
    "quote in the last line": ('a,b\nx,1\n"y,2\n', [2], [(3, "not CSV")]),
    "text after a quote": ('a,b\n"x"y,1\nz,2\n', [3], [(2, "not CSV")]),
    "one bad byte": (b"a,b\nx,1\n\xff,2\ny,3\n", [2, 4], [(3, "not UTF-8: byte 0xff")]),
    "byte order mark": (b"\xef\xbb\xbfa,b\nx,1\n", [2], []),
    "blank lines": ("a,b\n\nx,1\n  \ny,2\n\n", [3, 5], []),
    "U+2028": ("a,b\nx\u2028y,1\nz\x85,2\n", [2, 3], []),
}


@pytest.mark.parametrize("kind", CSV)
def test_a_damaged_csv_line_costs_one_row(tmp_path, kind):
    data, kept, bad = CSV[kind]
    got = collect(put(tmp_path, "a.csv", data))
    assert got.kept.column_names == ["id", "source", "line", "a", "b"]
    assert got.kept["line"][:] == kept
    assert got.dropped["line"][:] == [line for line, _ in bad]
    for reason, (_, begins) in zip(got.dropped["reason"], bad, strict=True):
        assert reason.startswith(begins)


def test_lines_between_two_open_quotes_are_set_aside_together_and_named(tmp_path):
    lines = [f'"x{n},1' if n in (50, 150, 350) else f"x{n},1" for n in range(2, 502)]
    got = collect(put(tmp_path, "a.csv", "a,b\n" + "\n".join(lines)))
    assert got.dropped["line"][:] == [50, 350]
    assert got.dropped[0]["reason"].endswith(", lines 50 to 150")
    assert got.kept["line"][:] == [n for n in range(2, 502) if not 50 <= n <= 150 and n != 350]
    assert got.kept["a"][:] == [f"x{n}" for n in got.kept["line"]]


JSON = {
    "list": ('[{"a":1},\n {"a":2}]', [1, 2], []),
    "byte order mark": (b'\xef\xbb\xbf[\n{"a":1}]', [2], []),
    "pretty": ('[\n  {\n    "a": 1\n  },\n  {\n    "a": 2\n  }\n]\n', [2, 5], []),
    "not all objects": ('[{"a":1},\n 7,\n null,\n {"a":2}]', [1, 4], [(2, "not an object"), (3, "not an object")]),
    "NaN in a row": ('[{"a":1},\n {"a":NaN}]', [1], [(2, "not JSON: NaN")]),
    "surrogate in a row": ('[{"a":1},\n {"a":"\\ud800"}]', [1], [(2, "not JSON")]),
    "trailing comma": ('[{"a":1},\n {"a":2},\n]', [1, 2], []),
    "object of rows": ('{"x":{"a":1},\n "y":{"a":2}}', [1, 2], []),
    "data in an object": ('{"version":1,\n "data":[{"a":1},\n {"a":2}]}', [2, 3], []),
    "one row": ('{"a":1,\n "messages":[{"role":"user"}]}', [1], []),
    "lines": ('{"a":1}\n{"a":2}\n', [1, 2], []),
    "broken lines": ('{"a":1}\n{"a":\n{"a":3}\n', [1, 3], [(2, "not JSON")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", JSON)
def test_json_rows_have_the_line_they_start_on(tmp_path, kind):
    data, kept, bad = JSON[kind]
    got = collect(put(tmp_path, "a.json", data))
    assert got.kept["line"][:] == kept
    assert got.dropped["line"][:] == [line for line, _ in bad]
    for reason, (_, begins) in zip(got.dropped["reason"], bad, strict=True):
        assert reason.startswith(begins)


def test_keys_of_an_object_of_rows_become_ids(tmp_path):
    got = collect(put(tmp_path, "a.json", '{"x": {"a": 1}, "y": {"a": 2, "id": "z"}}'))
    assert got.kept["id"][:] == ["x", "z"]


def test_a_list_in_a_jsonl_file_is_read(tmp_path):
    for data in ('[{"a":1},\n{"a":2}]', '[\n{"a":1},\n{"a":2}\n]', '[{"a":1},{"a":2}]'):
        assert contents(collect(put(tmp_path, "a.jsonl", data)).kept) == [{"a": 1}, {"a": 2}]


# --- nothing changes --------------------------------------------------------------------------------------------


@quick
@given(rows=json_rows)
def test_jsonl_and_json_return_what_was_written(tmp_path, rows):
    lines = put(tmp_path, "a.jsonl", b"\n".join(orjson.dumps(r) for r in rows))
    listed = put(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False, indent=1))
    assert contents(collect(lines).kept) == union(rows)
    assert contents(collect(listed).kept) == union(rows)
    assert contents(collect(rows).kept) == union(rows)


@quick
@given(rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8))
def test_csv_cells_stay_as_they_are(tmp_path, rows):
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([("a", "b", "c"), *rows])
    got = collect(put(tmp_path, "a.csv", out.getvalue()))
    assert contents(got.kept) == [dict(zip("abc", r, strict=True)) for r in rows]
    assert len(got.dropped) == 0


WORDS = ["NA", "null", "None", "nan", "007", "2024-01-02", "1e5", "", " x ", "9" * 30, "true", "[]"]


def test_strings_stay_strings_in_every_kind_of_file(tmp_path):
    rows = [{"a": w, "b": "x"} for w in WORDS]
    put(tmp_path, "a.jsonl", b"\n".join(orjson.dumps(r) for r in rows))
    put(tmp_path, "b.json", orjson.dumps(rows))
    put(tmp_path, "c.csv", "a,b\n" + "".join(f"{w},x\n" for w in WORDS))
    put(tmp_path, "d.tsv", "a\tb\n" + "".join(f"{w}\tx\n" for w in WORDS))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert contents(collect(path).kept) == rows, path
    everything = collect(f"{tmp_path}/*")
    assert everything.kept["a"][:] == WORDS * 5


@quick
@given(rows=json_rows)
def test_a_table_loses_no_key_and_adds_none(rows):
    assert to_dataset(rows).to_list() == union(rows)


def test_a_key_of_the_last_row_is_kept_and_nested_keys_are_not_invented():
    rows = [{"a": 1}] * 30_000 + [{"a": None, "late": "x"}]
    assert to_dataset(rows)["late"][-1] == "x"
    calls = [{"args": {"city": "Lima"}}, {"args": {"n": 3}}, {"args": {}}]
    assert to_dataset(calls).to_list() == calls
    assert to_dataset([{"args": {}}]).features["args"] == Json()  # Parquet has no empty objects
    mixed = [{"a": "007"}, {"a": 7}, {"a": "1"}, {"a": None}, {"a": {"b": [1]}}]
    table = to_dataset(mixed)
    assert table.features["a"] == Json() and table.to_list() == mixed
    assert table.select([2, 0]).to_list() == [mixed[2], mixed[0]]


def test_a_nul_in_a_key_breaks_nothing():
    rows = [{"a\0b": {"c\0d": "x\0y"}}, {"a\0b": {"c\0d": ""}}]
    assert to_dataset(rows).to_list() == [{"a\ufffdb": r["a\0b"]} for r in rows]


def test_null_columns_and_empty_tables_are_typed():
    assert to_dataset([{"a": None}]).features["a"].dtype == "string"
    empty = set_aside([])
    assert empty.column_names == list(DROPPED) and len(empty) == 0
    assert empty.features["line"].dtype == "int64" and empty.features["raw"].dtype == "string"


def test_a_long_row_is_read_whole(tmp_path):
    long = "好x" * 2_000_000
    assert collect(put(tmp_path, "a.jsonl", orjson.dumps({"a": long}))).kept[0]["a"] == long
    limit = csv.field_size_limit()
    assert collect(put(tmp_path, "a.csv", f"a,b\n{long},1\n")).kept[0]["a"] == long
    assert csv.field_size_limit() == limit


def test_files_are_not_modified(tmp_path):
    path = put(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a":1}\r\n{"a"\r\n')
    before = path.read_bytes()
    collect(path)
    assert path.read_bytes() == before


# --- accounting -------------------------------------------------------------------------------------------------


@quick
@given(
    lines=st.lists(
        st.sampled_from([b'{"a":1}', b'{"a":2}', b"{", b"[]", b"", b" ", b'{"a":"\xff"}', b"NaN"]),
        max_size=30,
    )
)
def test_every_line_is_kept_or_set_aside(tmp_path, lines):
    lines = [*lines, b'{"a":1}', b'{"a":1}', *[b'{"a":0}'] * len(lines)]
    got = collect(put(tmp_path, "a.jsonl", b"\n".join(lines)))
    full = [n for n, line in enumerate(lines, 1) if line.strip()]
    assert sorted(got.kept["line"][:] + got.dropped["line"][:]) == full
    assert got.rows_in == len(got.kept) + len(got.dropped) == len(full)
    ids = got.kept["id"][:] + got.dropped["id"][:]
    assert len(set(ids)) == len(ids)
    (line,) = accounting([got])
    assert sum(line["reasons"].values()) == line["dropped"]


def test_ids_are_stable_unique_and_free_of_the_folder(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        put(tmp_path / name, "a.jsonl", '{"a":1}\n{"a":1}\n')
    one, two = (collect(tmp_path / n / "a.jsonl").kept["id"][:] for n in ("x", "y"))
    assert one == two and len(set(one)) == 2
    # the value itself is part of the contract: another machine must find the same one
    assert one == ["99051034125748de", "3288dcfc59d9446e"]
    both = collect([tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl"]).kept["id"][:]
    assert both[:2] == one and len(set(both)) == 4


def test_own_ids_are_taken_where_they_are_texts_and_unique(tmp_path):
    good = collect(put(tmp_path, "a.jsonl", '{"id":"x"}\n{"id":"y"}\n{"a":1}\n')).kept
    assert good["id"][:2] == ["x", "y"] and len(good[2]["id"]) == 16
    for data in ('{"id":"x"}\n{"id":"x"}', '{"id":1}\n{"id":2}', '{"id":""}\n{"id":"x"}'):
        rows = collect(put(tmp_path, "b.jsonl", data)).kept
        assert len(set(rows["id"])) == 2
        assert rows["orig_id"][:] == [json.loads(line)["id"] for line in data.split("\n")]
    put(tmp_path, "b.jsonl", '{"id":"y"}\n{"id":"z"}')
    pair = collect([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]).kept
    assert len(set(pair["id"])) == 5 and pair["orig_id"][3:] == ["y", "z"]


def test_columns_that_clash_with_ours_are_kept_under_another_name(tmp_path):
    path = put(tmp_path, "a.jsonl", '{"source":"web","line":"l","orig_line":"o"}')
    row = collect(path).kept[0]
    assert (row["source"], row["line"]) == (str(path), 1)
    assert (row["orig_source"], row["orig_line"], row["orig_line_"]) == ("web", "o", "l")


def test_rows_that_were_collected_keep_their_place(tmp_path):
    first = collect(put(tmp_path, "a.jsonl", '{"a":1}\n{"a":2}\n')).kept
    assert collect(first).kept.to_list() == first.to_list()
    assert collect(first.to_list()).kept.to_list() == first.to_list()


def test_dicts_that_cannot_be_stored_are_set_aside():
    got = collect([{"a": "x"}, 5, None, {"a": "\ud800"}, {1: 2}, {"a": 2**70}])
    assert len(got.kept) == 1 and got.dropped["line"][:] == [2, 3, 4, 5, 6]
    assert [r.split(":")[0] for r in got.dropped["reason"]] == ["not an object"] * 2 + [
        "cannot be stored"
    ] * 3


def test_steps_hold_every_step_to_the_rule():
    rows = to_dataset([{"id": str(i), "source": "s", "line": i, "a": i} for i in range(10)])

    def odd(rows):
        bad = [aside(r, "odd", f"even: {r['a']}") for r in rows if r["a"] % 2 == 0]
        return StepResult(rows.filter(lambda r: r["a"] % 2), set_aside(bad), step="odd")

    def loses(rows):
        return StepResult(rows.select(range(len(rows) - 1)), set_aside([]), step="loses")

    results = steps([odd, odd])(rows)
    assert [len(r) for r in results] == [5, 5]
    assert accounting(results) == [
        {"step": "odd", "rows_in": 10, "kept": 5, "dropped": 5, "reasons": {"even": 5}},
        {"step": "odd", "rows_in": 5, "kept": 5, "dropped": 0, "reasons": {}},
    ]
    assert results[0].dropped[0]["raw"] == '{"a":0}'
    with pytest.raises(AssertionError, match="10 rows came in, 9 came out"):
        steps([loses])(rows)


def test_what_is_shown_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    got = collect(put(tmp_path, "a.jsonl", f'{{"a":1}}\n{evil}\n'))
    for shown in (got._repr_html_(), accounting([got])._repr_html_()):
        assert "<script>" not in shown
    assert got.dropped[0]["raw"] == evil
    assert "1 × not JSON" in str(accounting([got]))


def test_shorten():
    assert shorten("好" * 201) == "好" * 199 + "…" and shorten("好" * 200) == "好" * 200
    assert shorten(b"a\xffb") == "a\\xffb"
    assert len(shorten(("好" * 500).encode())) == 200


# --- what concerns the whole file -------------------------------------------------------------------------------


def refused(sources, *said):
    with pytest.raises(InputError) as error:
        collect(sources)
    text = str(error.value)
    assert "\n" not in text
    for part in said:
        assert part in text, text


def test_missing_files_and_folders_say_what_is_there(tmp_path):
    put(tmp_path, "train.jsonl", '{"a":1}')
    refused(
        tmp_path / "trian.jsonl",
        "trian.jsonl: there is no such file",
        "did you mean",
        "train.jsonl?",
    )
    refused(tmp_path / "zzz", "no such file; check the name")
    refused(tmp_path / "no" / "a.csv", "there is no folder")
    refused(tmp_path, "is a folder", "it holds train.jsonl")
    refused(f"{tmp_path}/*.csv", "no file fits")
    put(tmp_path, "a.xlsx", b"PK")
    refused(tmp_path / "a.xlsx", "end in '.xlsx'", ".parquet")
    put(tmp_path, "a.jsonl.gz", b"\x1f\x8b")
    refused(tmp_path / "a.jsonl.gz", "unpack it first")


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.jsonl", b"", "there are no rows"),
        ("a.jsonl", b"\n \n", "there are no rows"),
        ("a.json", b"", "there are no rows"),
        ("a.json", b"[]", "there are no rows"),
        ("a.csv", b"a,b\n", "there are no rows"),
        ("a.jsonl", b"{\n[1]\n", "none of its 2 rows can be read (line 1: not JSON"),
        ("a.json", b'[{"a":1},\n{"a":2}', "line 2, column 8"),
        ("a.json", b'[{"a":1}\n{"a":2}]', "line 2, column 1: no JSON (a comma is expected)"),
        ("a.json", b'[{"a":1}]\nx', "line 2, column 1"),
        ("a.json", b"7", "a list of rows is expected"),
        ("a.json", b"[" * 100_000, "a.json"),
        ("a.json", '[{"a":"好"}]'.encode("gb18030"), "line 1: byte 0xba is not UTF-8"),
        ("a.jsonl", '{"a":"好"}\n{"a":"坏"}'.encode("gb18030"), "iconv -f GB18030"),
        ("a.jsonl", '{"a":"x"}'.encode("utf-16"), "is UTF-16"),
        ("a.csv", "问,答\n1,2\n".encode("gb18030"), "line 1: byte 0xce is not UTF-8"),
        ("a.csv", "q,a\n问,答\n天,蓝\n".encode("gb18030"), "line 2: byte 0xce is not UTF-8"),
        ("a.csv", b"q;a\n1;2\n", "separated by ';'"),
        ("a.csv", b"q,a,q\n1,2,3\n", "two columns are called 'q'"),
        ("a.parquet", b"no", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_gives_no_row_is_an_error_in_one_sentence(tmp_path, name, data, said):
    refused(put(tmp_path, name, data), str(tmp_path / name), said)


def test_the_command_that_converts_works(tmp_path):
    rows = "q,a\n问,答\n天,蓝\n"
    path = put(tmp_path, "a b.csv", rows.encode("gb18030"))
    with pytest.raises(InputError) as error:
        collect(path)
    command = str(error.value).split("for example: ")[1]
    if subprocess.run(command, shell=True, check=False).returncode == 127:
        pytest.skip("no iconv here")
    assert collect(tmp_path / "a b.utf8.csv").kept["a"][:] == ["答", "蓝"]


def test_an_empty_result_can_be_asked_for(tmp_path):
    got = collect(put(tmp_path, "a.jsonl", b"{\n"), allow_empty=True)
    assert got.kept.column_names == ["id", "source", "line"] and len(got.dropped) == 1
    assert collect([], allow_empty=True).rows_in == 0
    refused([], "there are no rows")


def test_an_empty_file_among_others_is_a_warning_and_files_are_read_once(tmp_path):
    put(tmp_path, "a.jsonl", '{"a":1}')
    put(tmp_path, "b.jsonl", b"")
    with pytest.warns(UserWarning, match=r"b\.jsonl: there are no rows"):
        got = collect([f"{tmp_path}/*.jsonl", tmp_path / "a.jsonl"])
    assert len(got.kept) == 1


def test_empty_column_names_and_own_table(tmp_path):
    assert collect(put(tmp_path, "a.csv", ",b\n1,2\n")).kept.column_names[3:] == ["column_1", "b"]
    assert contents(collect(Dataset.from_dict({"a": [1, 2]})).kept) == [{"a": 1}, {"a": 2}]


def test_parse_row_keeps_the_numbers_that_fit():
    for n in (2**63 - 1, -(2**63)):
        assert parse_row(b'{"a":%d}' % n) == ({"a": n}, "")
    for n in (2**63, -(2**63) - 1):
        assert parse_row(b'{"a":%d}' % n)[0] is None

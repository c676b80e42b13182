"""collect: nothing disappears, nothing changes, and every fault is named with its place."""

import csv
import gzip
import io
import json
import random
import socket
import subprocess
import tarfile
import zipfile

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict, Json
from datasets.exceptions import DatasetNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instruct_ft.data import collect as module
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
    write_rows,
)
from instruct_ft.settings import InputError

PLACE = {"id", "source", "line"}
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# JSON text cannot hold a lone surrogate, and NUL is refused; everything else is fair
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), texts)
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3),
    max_leaves=6,
)
names = texts.filter(lambda t: t not in PLACE and not t.startswith("orig_"))
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


# --- torture files: one for each damage ---------------------------------------------------------------------------
# name: (file, its bytes, line -> row kept, [(line, offset, beginning of the reason)] set aside)

A1, A2, A3 = {"a": 1}, {"a": 2}, {"a": 3}
B = lambda a, b: {"a": a, "b": b}
DEEP = b'{"a":' + b"[" * 120 + b"]" * 120 + b"}"

TORTURE = {
    # JSON lines
    "broken in the middle": ("a.jsonl", b'{"a":1}\n{"a":\n{"a":3}\n', {1: A1, 3: A3}, [(2, 8, "not JSON: it breaks off at column 6")]),
    "last line cut": ("a.jsonl", b'{"a":1}\n{"a":"x', {1: A1}, [(2, 8, "not JSON")]),
    "no newline at the end": ("a.jsonl", b'{"a":1}\n{"a":2}', {1: A1, 2: A2}, []),
    "CRLF": ("a.jsonl", b'{"a":1}\r\n{"a":}\r\n{"a":3}\r\n', {1: A1, 3: A3}, [(2, 9, "not JSON")]),
    "blank lines": ("a.jsonl", b'\n{"a":1}\n  \n\t\n {"a":\n', {2: A1}, [(5, 15, "not JSON")]),
    "byte order mark": ("a.jsonl", b'\xef\xbb\xbf{"a":1}\n{"a":\n', {1: A1}, [(2, 11, "not JSON")]),
    "byte order mark later": ("a.jsonl", b'{"a":1}\n\xef\xbb\xbf{"a":2}\n', {1: A1}, [(2, 8, "not JSON")]),
    "one bad byte": ("a.jsonl", '{"a":"好"}\n'.encode() + b'{"a":"\xff"}\n', {1: {"a": "好"}}, [(2, 12, "not UTF-8: byte 0xff at column 7")]),
    "surrogate as bytes": ("a.jsonl", '{"a":"好"}\n'.encode() + b'{"a":"\xed\xa0\x80"}\n', {1: {"a": "好"}}, [(2, 12, "not UTF-8")]),
    "overlong NUL": ("a.jsonl", '{"a":"好"}\n'.encode() + b'{"a":"\xc0\x80"}\n', {1: {"a": "好"}}, [(2, 12, "not UTF-8")]),
    "U+2028 and U+0085": ("a.jsonl", '{"a":"x\u2028y"}\n{"a":"\x85"}\n{\n'.encode(), {1: {"a": "x\u2028y"}, 2: {"a": "\x85"}}, [(3, 25, "not JSON")]),
    "NaN": ("a.jsonl", b'{"a":1}\n{"a":NaN}\n', {1: A1}, [(2, 8, "NaN: NaN or Infinity at column 6")]),
    "Infinity": ("a.jsonl", b'{"a":1}\n{"a":-Infinity}\n{"a":[Infinity]}\n', {1: A1}, [(2, 8, "NaN"), (3, 24, "NaN")]),
    "duplicate key": ("a.jsonl", b'{"a":1}\n{"a":2,"b":0,"a":3}\n', {1: A1}, [(2, 8, "duplicate key: 'a'")]),
    "duplicate key, spaced": ("a.jsonl", b'{"a":1}\n{"a" : 2, "a" :3, "b":"\\":"}\n', {1: A1}, [(2, 8, "duplicate key: 'a'")]),
    "duplicate key, nested": ("a.jsonl", b'{"a":[{"b":1,"b":2}]}\n{"a":[{"b":1}]}\n', {2: {"a": [{"b": 1}]}}, [(1, 0, "duplicate key: 'b'")]),
    "duplicate key, escaped": ("a.jsonl", b'{"a":1}\n{"a":2,"\\u0061":3}\n', {1: A1}, [(2, 8, "duplicate key: 'a'")]),
    "lone surrogate": ("a.jsonl", b'{"a":1}\n{"a":"\\ud800"}\n{"a":"\\udc00"}\n{"a":"\\ud83dx"}\n', {1: A1}, [(n, o, "lone surrogate") for n, o in ((2, 8), (3, 23), (4, 38))]),
    "surrogate pair": ("a.jsonl", b'{"a":"\\ud83d\\ude00"}\n', {1: {"a": "😀"}}, []),
    "raw NUL": ("a.jsonl", b'{"a":1}\n{"a":"x\x00"}\n', {1: A1}, [(2, 8, "NUL: byte 0x00 at column 8")]),
    "escaped NUL": ("a.jsonl", b'{"a":1}\n{"a":["\\u0000"]}\n{"\\u0000":1}\n', {1: A1, 2: {"a": ["\0"]}}, [(3, 25, r"NUL: \u0000 in a key")]),
    "backslash and u0000": ("a.jsonl", b'{"a":"\\\\u0000"}\n', {1: {"a": "\\u0000"}}, []),
    "disk full of NUL": ("a.jsonl", b'{"a":1}\n' + b"\0" * 4096, {1: A1}, [(2, 8, "NUL")]),
    "other control character": ("a.jsonl", b'{"a":1}\n{"a":"x\x01"}\n', {1: A1}, [(2, 8, "not JSON")]),
    "a list": ("a.jsonl", b'{"a":1}\n[1]\n', {1: A1}, [(2, 8, "not an object: a list")]),
    "a text": ("a.jsonl", b'{"a":1}\n"x"\n', {1: A1}, [(2, 8, "not an object: a text")]),
    "null": ("a.jsonl", b'null\n{"a":1}\nnull\n', {2: A1}, [(1, 0, "not an object: null"), (3, 13, "not an object: null")]),
    "a number": ("a.jsonl", b'{"a":1}\n7\n', {1: A1}, [(2, 8, "not an object: a number")]),
    "two objects on a line": ("a.jsonl", b'{"a":1}\n{"a":1}{"a":2}\n', {1: A1}, [(2, 8, "not JSON")]),
    "an object on two lines": ("a.jsonl", b'{"a":1}\n{"a":2,\n"b":3}\n{"a":3}\n', {1: A1, 4: A3}, [(2, 8, "not JSON"), (3, 16, "not JSON")]),
    "single quotes": ("a.jsonl", b"{\"a\":1}\n{'a':1}\n", {1: A1}, [(2, 8, "not JSON")]),
    "trailing comma in a row": ("a.jsonl", b'{"a":1}\n{"a":1,}\n', {1: A1}, [(2, 8, "not JSON")]),
    "leading zero": ("a.jsonl", b'{"a":1}\n{"a":007}\n', {1: A1}, [(2, 8, "not JSON")]),
    "30 digits": ("a.jsonl", b'{"a":1}\n{"a":[' + b"1" * 30 + b"]}\n", {1: A1}, [(2, 8, "number too large: " + "1" * 30)]),
    "unsigned 64 bits": ("a.jsonl", b'{"a":1}\n{"a":9223372036854775808}\n', {1: A1}, [(2, 8, "number too large")]),
    "beyond double": ("a.jsonl", b'{"a":1}\n{"a":1e400}\n', {1: A1}, [(2, 8, "not JSON: number is infinity")]),
    "too deep": ("a.jsonl", b'{"a":1}\n' + DEEP + b"\n" + b"[" * 5000 + b"\n", {1: A1}, [(2, 8, "nested too deeply"), (3, 255, "nested too deeply")]),
    "list around a row": ("a.jsonl", b'[{"a":1}]\n{"a":2}\n', {2: A2}, [(1, 0, "not an object")]),
    "broken list in the last line": ("a.jsonl", b'{"a":1}\n[{"a":2}', {1: A1}, [(2, 8, "not JSON")]),
    "a list by another name": ("a.jsonl", b'[{"a":1},\n{"a":2}\n]', {1: A1, 2: A2}, []),
    "late key": ("a.jsonl", b'{"a":1}\n{"a":2,"z":"x"}\n', {1: A1 | {"z": None}, 2: A2 | {"z": "x"}}, []),
    "changing type": ("a.jsonl", b'{"a":1}\n{"a":"1"}\n{"a":[1]}\n', {1: A1, 2: {"a": "1"}, 3: {"a": [1]}}, []),
    "uneven arguments": ("a.jsonl", b'{"a":{"x":1}}\n{"a":{"y":"2"}}\n{"a":{}}\n', {1: {"a": {"x": 1}}, 2: {"a": {"y": "2"}}, 3: {"a": {}}}, []),
    "UTF-16 with mark": ("a.jsonl", '{"a":"好"}\n{"a":\n'.encode("utf-16"), {1: {"a": "好"}}, [(2, 22, "not JSON")]),
    "UTF-16 without mark": ("a.jsonl", '{"a":"好"}\n'.encode("utf-16-be"), {1: {"a": "好"}}, []),
    "UTF-16 cut in a character": ("a.jsonl", '{"a":1}\n{"a":"好"}'.encode("utf-16-le")[:-1], {1: A1}, [(2, 16, "not UTF-16-LE")]),
    "UTF-32": ("a.jsonl", '{"a":"好"}\n'.encode("utf-32"), {1: {"a": "好"}}, []),
    # CSV and TSV
    "quoted newline": ("a.csv", b'a,b\n"x\ny",1\nz,2\n', {2: B("x\ny", "1"), 4: B("z", "2")}, []),
    "CRLF in CSV": ("a.csv", b'a,b\r\n"x\r\ny",1\r\ny,2,3\r\n', {2: B("x\r\ny", "1")}, [(4, 15, "wrong number of cells")]),
    "lone CR": ("a.csv", b"a,b\rx,1\ry\rz,2\r", {2: B("x", "1"), 4: B("z", "2")}, [(3, 8, "wrong number of cells: 1")]),
    "cell too many": ("a.csv", b"a,b\nx,1\ny,2,3\nz,4\n", {2: B("x", "1"), 4: B("z", "4")}, [(3, 8, "wrong number of cells: 3, the header has 2")]),
    "cell too few": ("a.csv", b"a,b\nx\ny,2\n", {3: B("y", "2")}, [(2, 4, "wrong number of cells: 1")]),
    "quote never closed": ("a.csv", b'a,b\nx,1\n"y,2\nz,3\nw,4\n', {2: B("x", "1"), 4: B("z", "3"), 5: B("w", "4")}, [(3, 8, "not CSV: a quote is opened")]),
    "quote in the last line": ("a.csv", b'a,b\nx,1\n"y,2\n', {2: B("x", "1")}, [(3, 8, "not CSV")]),
    "text after a quote": ("a.csv", b'a,b\n"x"y,1\nz,2\n', {3: B("z", "2")}, [(2, 4, "not CSV")]),
    "bad byte in CSV": ("a.csv", "a,b\n好,1\n".encode() + b"\xff,2\ny,3\n", {2: B("好", "1"), 4: B("y", "3")}, [(3, 10, "not UTF-8: byte 0xff")]),
    "NUL in CSV": ("a.csv", b"a,b\nx\0,1\ny,2\n", {3: B("y", "2")}, [(2, 4, "NUL")]),
    "mark in CSV": ("a.csv", b"\xef\xbb\xbfa,b\nx,1\ny\n", {2: B("x", "1")}, [(3, 11, "wrong number")]),
    "blank lines in CSV": ("a.csv", b"a,b\n\nx,1\n  \ny,2\n\n", {3: B("x", "1"), 5: B("y", "2")}, []),
    "U+2028 in CSV": ("a.csv", "a,b\nx\u2028y,1\nz\x85,2\n".encode(), {2: B("x\u2028y", "1"), 3: B("z\x85", "2")}, []),
    "words and numbers": ("a.csv", b"a,b\nNA,null\n007,1e5\n,nan\n", {2: B("NA", "null"), 3: B("007", "1e5"), 4: B("", "nan")}, []),
    "quotes in TSV": ("a.tsv", b'a\tb\n"x\ty"\t1\nz\n', {2: B("x\ty", "1")}, [(3, 12, "wrong number of cells: 1")]),
    # JSON
    "pretty": ("a.json", b'[\n  {\n    "a": 1\n  },\n  {\n    "a": 2\n  }\n]\n', {2: A1, 5: A2}, []),
    "not all objects": ("a.json", b'[{"a":1},\n 7,\n null,\n {"a":2}]', {1: A1, 4: A2}, [(2, 11, "not an object"), (3, 15, "not an object")]),
    "NaN in a row": ("a.json", b'[{"a":1},\n {"a":NaN}]', {1: A1}, [(2, 11, "NaN")]),
    "surrogate in a row": ("a.json", b'[{"a":1},\n {"a":"\\ud800"}]', {1: A1}, [(2, 11, "lone surrogate")]),
    "duplicate key in a row": ("a.json", b'[{"a":1},\n {"a":\n 1, "a":2}]', {1: A1}, [(2, 11, "duplicate key")]),
    "bad byte in a row": ("a.json", '[{"a":"好"},\n'.encode() + b' {"a":"\xff"}]', {1: {"a": "好"}}, [(2, 15, "not UTF-8")]),
    "mark in JSON": ("a.json", b'\xef\xbb\xbf[\n{"a":1},\n7]', {2: A1}, [(3, 14, "not an object")]),
    "trailing comma": ("a.json", b'[{"a":1},\n {"a":2},\n]', {1: A1, 2: A2}, []),
    "object of rows": ("a.json", b'{"x":{"a":1},\n "y":{"a":2}}', {1: A1, 2: A2}, []),
    "data in an object": ("a.json", b'{"version":1,\n "data":[{"a":1},\n {"a":2}]}', {2: A1, 3: A2}, []),
    "one row": ("a.json", b'{"a":1,\n "m":[{"r":"u"}]}', {1: {"a": 1, "m": [{"r": "u"}]}}, []),
    "lines": ("a.json", b'{"a":1}\n{"a":\n{"a":3}\n', {1: A1, 3: A3}, [(2, 8, "not JSON")]),
    # plain text, CoNLL
    "text": ("a.txt", "好\r\n\n x \u2028y\n".encode() + b"\xff\n\0\n", {1: {"text": "好"}, 3: {"text": " x \u2028y"}}, [(4, 14, "not UTF-8"), (5, 16, "NUL")]),
    "word without a label": ("a.conll", b"a\tO\nb\n\n\nc O\n", {5: {"tokens": ["c"], "tags": ["O"]}}, [(1, 0, "no label: line 2")]),
    "odd words": ("a.conll", "-DOCSTART- O\n\n# id = 3\n#x\tO\n\u3000\tB-X\na\u00a0b\tI-X\r\n".encode(), {4: {"tokens": ["#x", "\u3000", "a\u00a0b"], "tags": ["O", "B-X", "I-X"]}}, []),
    "columns change": ("a.conll", b"a N O\nb O\n\nc N O", {4: {"tokens": ["c"], "column_2": ["N"], "tags": ["O"]}}, [(1, 0, "wrong number of columns: 2 on line 2")]),
}  # fmt: skip


@pytest.mark.parametrize("damage", TORTURE)
def test_torture(tmp_path, damage):
    "Every damage costs the rows that it hit, and they are named: guarantees 2, 3, 4 and 7"
    name, data, kept, bad = TORTURE[damage]
    path = put(tmp_path, name, data)
    got = collect(path)
    assert dict(zip(got.kept["line"], contents(got.kept), strict=True)) == kept
    assert [(r["line"], r["offset"]) for r in got.dropped] == [(n, at) for n, at, _ in bad]
    for row, (_, at, begins) in zip(got.dropped.to_list(), bad, strict=True):
        assert row["reason"].startswith(begins), row["reason"]
        assert row["source"] == str(path)
        if not row["reason"].startswith("not UTF") and b"\0" not in data[:40]:
            assert data[at:].startswith(row["raw"].removesuffix("…").encode())
    assert path.read_bytes() == data


@pytest.mark.parametrize("damage", TORTURE)
def test_torture_packed(tmp_path, damage):
    "What is packed reads the same: rows, lines, offsets, reasons and ids"
    name, data, *_ = TORTURE[damage]
    plain = collect(put(tmp_path, name, data))
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    for end, squeeze in pack.items():
        half = len(data) // 2  # two parts, one after the other, are one file
        packed = collect(put(tmp_path, name + end, squeeze(data[:half]) + squeeze(data[half:])))
        for mine, theirs in ((packed.kept, plain.kept), (packed.dropped, plain.dropped)):
            assert [r | {"source": ""} for r in mine.to_list()] == [
                r | {"source": ""} for r in theirs.to_list()
            ]


def test_there_are_at_least_forty_torture_files():
    assert len({(name, data) for name, data, *_ in TORTURE.values()}) == len(TORTURE) >= 40


def test_keys_of_an_object_of_rows_become_ids(tmp_path):
    got = collect(put(tmp_path, "a.json", '{"x": {"a": 1}, "y": {"a": 2, "id": "z"}}'))
    assert got.kept["id"][:] == ["x", "z"]


def test_lines_between_two_open_quotes_are_set_aside_together_and_named(tmp_path):
    lines = [f'"x{n},1' if n in (50, 150, 350) else f"x{n},1" for n in range(2, 502)]
    got = collect(put(tmp_path, "a.csv", "a,b\n" + "\n".join(lines)))
    assert got.dropped["line"][:] == [50, 350]
    assert got.dropped[0]["reason"].endswith(", lines 50 to 150")
    assert got.kept["line"][:] == [n for n in range(2, 502) if not 50 <= n <= 150 and n != 350]
    assert got.kept["a"][:] == [f"x{n}" for n in got.kept["line"]]


# --- the quick way and the careful way --------------------------------------------------------------------------

ROWS = [
    b'{"a":"x","n":1,"m":[{"r":"u","c":"hi"},{"r":"v","c":""}]}',
    b'{"a":"2024-01-02","n":null,"m":[]}',
    b'{"n":2,"m":null}',
    b'{"a":null,"n":-3,"d":0.5}',
    '{"a":"好\\u00e9\\n\\":","n":4}'.encode(),
]
HURT = [
    b'{"a":"x"} {"a":"y"}', b'{"a":"x","a":"y"}', b'{"a":1}', b'{"n":"1"}', b'{"n":1.5}', b'{"n":123456789012345678901}',
    b'{"d":9007199254740993}', b'{"d":-Infinity}', b'{"d":NaN}', b'{"d":12345678901234567890}', b'{"new":1}', b"null", b"", b"[]",
    b'{"m":[{"r":"u"}]}', b'{"m":[{"r":"u","c":"x","z":1}]}', b'{"m":[{"c":null,"r":"u"}]}', b'{"m":[null]}', b'{"m":{}}', b"{}",
    b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\\ud800"}', b'{"a":"\\u0000"}', b'{"a":"\0"}', b'{"a":', b'"b":1}', b'{"a":"x"}null',
    b'{"a":"x"}\r', b' {"a":"x"}', b'{"a":"x"} ', b'{"m":[{"c":"2","r":"1"}]}', b'{"id":"x"}', b'{"d":1e300}', b'{"d":3}',
]  # fmt: skip


def slowly(monkeypatch, path):
    with monkeypatch.context() as m:
        m.setattr(module, "_quick", lambda *_: None)
        return collect(path)


@settings(quick, max_examples=60)
@given(
    good=st.lists(st.sampled_from(ROWS), min_size=3, max_size=12),
    hurt=st.lists(st.tuples(st.integers(0, 11), st.sampled_from(HURT)), max_size=2),
    cut=st.integers(0, 200),
)
def test_the_quick_way_reads_what_the_careful_way_reads(good, hurt, cut, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 256)
    lines = ROWS + good
    for at, line in hurt:
        lines.insert(at + 3, line)
    data = b"\n".join(lines) + b"\n"
    path = put(tmp_path, "a.jsonl", data if cut > 100 else data[: len(data) - cut])
    fast, slow = collect(path), slowly(monkeypatch, path)
    assert fast.kept.to_list() == slow.kept.to_list()
    assert fast.dropped.to_list() == slow.dropped.to_list()
    assert fast.kept.features == slow.kept.features


def test_the_quick_way_is_taken(tmp_path, monkeypatch):
    taken, quick_way = [], module._quick
    monkeypatch.setattr(module, "_quick", lambda *a: taken.append(quick_way(*a)) or taken[-1])
    monkeypatch.setattr(module, "_PIECE", 4096)
    for end in (b"\n", b"\r\n"):
        data = end.join(ROWS[:3] + ROWS[4:] * 2000)
        rows = collect(put(tmp_path, "a.jsonl", data)).kept
        assert len(rows) == 2003 and [t for t in taken if t is None] == []
        assert sum(map(len, taken)) > 1900
        taken.clear()
        assert rows.to_list()[3:] == slowly(monkeypatch, tmp_path / "a.jsonl").kept.to_list()[3:]


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
        st.sampled_from([b'{"a":1}', '{"a":"好"}'.encode(), b"{", b"[]", b"", b" ", b"NaN"]),
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
    kinds = [r.split(":")[0] for r in got.dropped["reason"]]
    assert kinds[:2] == ["not an object"] * 2
    assert kinds[2:] == ["lone surrogate", "cannot be stored", "number too large"]
    assert got.dropped["offset"][:] == [None] * 5


def test_a_nul_in_a_text_in_memory_stays():
    assert collect([{"a": "x\0"}, {"a": "\0"}]).kept["a"][:] == ["x\0", "\0"]


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


def refused(sources, *said, **options):
    with pytest.raises(InputError) as error:
        collect(sources, **options)
    text = str(error.value)
    assert "\n" not in text
    for part in said:
        assert part in text, text


def test_missing_files_say_what_is_there(tmp_path):
    put(tmp_path, "train.jsonl", '{"a":1}')
    missing = "trian.jsonl: there is no such file"
    refused(tmp_path / "trian.jsonl", missing, "did you mean", "train.jsonl?")
    refused(tmp_path / "zzz", "no such file; check the name")
    refused(tmp_path / "no" / "a.csv", "there is no folder")
    refused(f"{tmp_path}/*.csv", "no file fits")
    for name in ("a.xlsx", "a.jsonl.xz"):
        put(tmp_path, name, b"PK")
    refused(tmp_path / "a.xlsx", "end in '.xlsx'", ".parquet")
    refused(tmp_path / "a.jsonl.xz", "end in '.xz'", "unpack it first")
    refused(tmp_path / "train.jsonl", "there is no format 'xml'", format="xml")


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.json", b'[{"a":1},\n{"a":2}', "line 2, column 8"),
        ("a.json", b'[{"a":1}\n{"a":2}]', "line 2, column 1: no JSON (a comma is expected)"),
        ("a.json", b'[{"a":1}]\nx', "line 2, column 1"),
        ("a.json", b"7", "a list of rows is expected"),
        ("a.json", b"[" * 100_000, "a.json"),
        ("a.json", '[{"a":"好"}]'.encode("gb18030"), "line 1: byte 0xba is not UTF-8"),
        ("a.jsonl", '{"a":"好"}\n{"a":"坏"}'.encode("gb18030"), "iconv -f GB18030"),
        ("a.csv", "问,答\n1,2\n".encode("gb18030"), "line 1: byte 0xce is not UTF-8"),
        ("a.csv", "q,a\n问,答\n天,蓝\n".encode("gb18030"), "line 2: byte 0xce is not UTF-8"),
        ("a.csv", b"q;a\n1;2\n", "separated by ';'"),
        ("a.csv", b"q,a,q\n1,2,3\n", "two columns are called 'q'"),
        ("a.parquet", b"no", "cannot be read as Parquet"),
        ("a.arrow", b"no", "cannot be read as Arrow"),
        ("a.jsonl.gz", b"no", "cannot be read (zlib inflate failed"),
        ("a.jsonl.gz", gzip.compress(random.Random(0).randbytes(9999))[:-99], "Truncated"),
        ("a.jsonl.zst", zstandard.compress(random.Random(0).randbytes(9999))[:-99], "Truncated"),
        ("a.zip", b"no", "cannot be read as an archive"),
        ("a.tar", b"no", "cannot be read as an archive"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_in_one_sentence(tmp_path, name, data, said):
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


# --- folders, archives, the hub ---------------------------------------------------------------------------------


def names_of(rows):
    return [s.rsplit("/", 1)[1] for s in rows["source"]]


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/2.jsonl", "b/10.jsonl", "a.csv", ".git/x.jsonl", ".hidden.json", "README.md"):
        put(tmp_path, name, "a,b\nx,1\n" if name.endswith("csv") else '{"a":"y"}')
    with pytest.warns(UserWarning, match=r"not read: README\.md"):
        got = collect(tmp_path)
    assert names_of(got.kept) == ["a.csv", "10.jsonl", "2.jsonl"]
    (tmp_path / "c").mkdir()
    refused(tmp_path / "c", "nothing in it can be read (it is empty)")
    put(tmp_path / "c", "x.md", "")
    refused(tmp_path / "c", "it holds x.md")


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    rows = to_dataset([{"a": 1, "b": {"x": 1}}, {"a": "1", "b": {}}])
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "saved")
    got = collect(tmp_path / "saved")
    assert contents(got.kept) == [rows[0], rows[0], rows[1]] and len(got.dropped) == 0


EVIL = ["../x.jsonl", "a/../../x.jsonl", "/etc/x.jsonl", "C:\\x.jsonl", "..\\x.jsonl"]
FINE = {"a.jsonl": b'{"a":1}\n{"a":\n', "b/c.csv.gz": gzip.compress(b"a,b\nx,1\n"), "READ.ME": b"x"}


def test_members_of_archives_are_read_and_those_that_leave_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as z:
        for name, data in [*FINE.items(), *((n, b'{"a":"evil"}') for n in EVIL)]:
            z.writestr(zipfile.ZipInfo(name), data)
        link = zipfile.ZipInfo("link.jsonl")
        link.external_attr = 0o120777 << 16
        z.writestr(link, "/etc/passwd")
    for mode, name in (("w", "s.tar"), ("w:gz", "s.tar.gz"), ("w:gz", "s.tgz"), ("w:bz2", "t.tar")):
        with tarfile.open(tmp_path / name, mode) as t:
            for member, data in [*FINE.items(), *((n, b'{"a":"evil"}') for n in EVIL)]:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo("link.jsonl")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            t.addfile(info)
    put(tmp_path, "s.tar.zst", zstandard.compress((tmp_path / "s.tar").read_bytes()))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for name in ("s.zip", "s.tar", "s.tar.gz", "s.tgz", "t.tar", "s.tar.zst"):
        with pytest.warns(UserWarning, match=r"not read: READ\.ME"):
            got = collect(tmp_path / name)
        assert contents(got.kept) == [{"a": 1, "b": None}, {"a": "x", "b": "1"}], name
        assert got.dropped["raw"][:] == ['{"a":', *EVIL, "link.jsonl"], name
        assert got.dropped["reason"][1:] == ["member refused: it leaves the folder"] * 5 + [
            "member refused: it is a link"
        ]
        assert got.dropped["line"][:] == [2] + [None] * 6
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_an_encrypted_or_damaged_member_is_an_error_in_one_sentence(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.jsonl", b'{"a":1}\n' * 1000)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.index(b"a.jsonl") + 12
    refused(put(tmp_path, "b.zip", bytes(data[:at] + b"\xff\xff\xff" + data[at + 3 :])), "b.zip")
    for mark in (b"PK\3\4", b"PK\1\2"):
        data[data.index(mark) + (6 if mark[2] == 3 else 8)] |= 1
    refused(put(tmp_path, "c.zip", bytes(data)), "c.zip/a.jsonl: cannot be read", "encrypted")


def test_a_set_of_the_hub_is_fetched_by_datasets(monkeypatch):
    asked = []

    def stand_in(name, config=None, split=None, revision=None):
        asked.append((name, config, split, revision))
        rows = Dataset.from_dict({"a": ["x", "y"]})
        return rows if split else DatasetDict(train=rows, test=rows.select([0]))

    monkeypatch.setattr(module, "load_dataset", stand_in)
    one = collect("hf:gsm8k?config=main&split=train&revision=abc")
    assert one.kept["a"][:] == ["x", "y"] and one.kept["line"][:] == [1, 2]
    assert set(one.kept["source"]) == {"hf:gsm8k?config=main&split=train&revision=abc"}
    both = collect(["hf:org/set"])
    assert both.kept["source"][:] == ["hf:org/set?split=train"] * 2 + ["hf:org/set?split=test"]
    assert asked == [("gsm8k", "main", "train", "abc"), ("org/set", None, None, None)]
    refused("hf:org/set?splits=train", "splits is unknown")
    for error in (
        DatasetNotFoundError("Dataset 'x'\nnot found"),
        ConnectionError("off"),
        ValueError("BuilderConfig"),
    ):
        monkeypatch.setattr(
            module, "load_dataset", lambda *_, e=error, **__: (_ for _ in ()).throw(e)
        )
        refused("hf:org/set", "hf:org/set: cannot be fetched", "check the name and the network")


def test_the_format_can_be_named(tmp_path):
    put(tmp_path, "train.annotated", "a\tO\n")
    put(tmp_path, "dump", '{"a":1}\n')
    assert collect(tmp_path / "train.annotated", format="conll").kept["tokens"][:] == [["a"]]
    assert collect(tmp_path / "dump", format=".JSONL").kept["a"][:] == [1]


def test_arrow_files_of_both_forms_are_read(tmp_path):
    table = pa.table({"a": ["x", None], "m": [[{"r": "u"}], []]})
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        with new(tmp_path / "a.arrow", table.schema) as f:
            f.write_table(table)
        assert contents(collect(tmp_path / "a.arrow").kept) == table.to_pylist()


# --- writing ----------------------------------------------------------------------------------------------------


@settings(quick, max_examples=8)
@given(rows=json_rows)
def test_what_is_written_is_read_again(tmp_path, rows):
    table = to_dataset(rows)
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst", "a.parquet"):
        assert contents(collect(write_rows(table, tmp_path / name)).kept) == union(rows), name


def test_rows_of_no_table_are_written(tmp_path):
    none = to_dataset([], {"a": module.Value("string")})
    for name in ("a.jsonl", "a.json", "a.parquet"):
        with pytest.warns(UserWarning, match="there are no rows"):
            assert len(collect(write_rows(none, tmp_path / name)).kept) == 0
    with pytest.raises(InputError, match=r"cannot write '\.csv'; give \.jsonl"):
        write_rows(none, tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch, name):
    rows = to_dataset([{"a": i} for i in range(5000)])
    old = write_rows(rows.select([0]), tmp_path / name).read_bytes()

    def dies(rows, *_, **__):
        yield from [b"{}"] * 3000
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_json_lines", dies)
    monkeypatch.setattr(
        Dataset, "to_parquet", lambda s, path: (path.write_bytes(b"PAR1"), next(iter(())))
    )
    with pytest.raises((KeyboardInterrupt, StopIteration)):
        write_rows(rows, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == old


# --- the guarantees that concern reading, by their numbers --------------------------------------------------------
# 9 (missing, null, empty and blank) is cleaning's: a table has one null, so a missing key and null are the same after
# reading; a text that is empty or blank is read as it stands (12 below, CSV cells above).
# 12 says further that rows with one id and one content are merged, and those with one id and two contents set aside.
# Neither is done here: an id that repeats is as often the number of a question with several answers. All rows stay,
# under ids of their own; `drop_exact_duplicates` merges equal content with a witness, and a note names the two lines.


def test_g01_every_row_is_kept_or_set_aside_and_the_counts_add_up(tmp_path):
    for number, (name, data, kept, bad) in enumerate(TORTURE.values()):
        put(tmp_path, f"{number:02}{name}", data)
    got = collect(tmp_path)
    assert len(got.kept) == sum(len(kept) for *_, kept, _ in TORTURE.values())
    assert len(got.dropped) == sum(len(bad) for *_, bad in TORTURE.values())
    (line,) = accounting([got])
    assert line["rows_in"] == line["kept"] + line["dropped"] == got.rows_in
    assert sum(line["reasons"].values()) == line["dropped"]
    assert len(set(got.kept["id"])) == len(got.kept)


def test_g02_a_bad_line_is_set_aside_with_its_place_and_bytes_and_the_others_load(tmp_path):
    lines = [b'{"a":"%d"}' % i for i in range(20_000)]
    hurt = {i: lines[i][: 3 + i % 4] for i in range(7, 20_000, 501)}
    data = b"\n".join(hurt.get(i, line) for i, line in enumerate(lines))
    got = collect(put(tmp_path, "a.jsonl", data))
    assert [n - 1 for n in got.dropped["line"]] == list(hurt)
    for row, raw in zip(got.dropped.to_list(), hurt.values(), strict=True):
        assert row["raw"].encode() == raw == data[row["offset"] :].split(b"\n")[0]
    assert got.kept["a"][:] == [str(i) for i in range(20_000) if i not in hurt]


def test_g03_line_numbers_are_physical(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 64)
    parts = [b"", b" \t", b'{"a":"x\xe2\x80\xa8y"}', b'{"a":"\xc2\x85"}', b'{"a":1}\r', b"{"]
    lines = random.Random(0).choices(parts, k=500)
    got = collect(put(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert got.kept["line"][:] == [n for n, x in enumerate(lines, 1) if x.startswith(b'{"')]
    assert got.dropped["line"][:] == [n for n, x in enumerate(lines, 1) if x == b"{"]


def test_g04_a_byte_order_mark_is_removed_once_and_a_bad_byte_costs_one_row(tmp_path):
    good = '{"a":"好"}\n'.encode()
    data = b"\xef\xbb\xbf" + good * 1000 + b'{"a":"\xe5\xa5"}\n' + good * 1000
    got = collect(put(tmp_path, "a.jsonl", data))
    assert got.kept.column_names == ["id", "source", "line", "a"] and len(got.kept) == 2000
    assert got.dropped[0]["reason"] == "not UTF-8: byte 0xe5 at column 7"
    twice = collect(put(tmp_path, "b.csv", b"\xef\xbb\xbf\xef\xbb\xbfa,b\nx,1\n"))
    assert twice.kept.column_names[3:] == ["\ufeffa", "b"]


SENTENCES = """为什么天空是蓝色的？阳光穿过大气时，波长较短的蓝光散射得最厉害。
如何煮好一碗面？水要宽，火要大，面条下锅后用筷子拨散。
秘鲁的首都是哪里？利马，位于太平洋沿岸，是全国最大的城市。
感冒了需要吃抗生素吗？普通感冒由病毒引起，抗生素无效；高烧不退再去医院检查。
合同没有写明期限怎么办？双方可以协商补充；协商不成的，按照交易习惯或者法律规定确定。
请把这句话改得更礼貌。能否麻烦您在方便的时候把材料发给我？非常感谢！
鲸鱼是鱼吗？不是，鲸用肺呼吸，胎生哺乳，属于哺乳动物。
怎样学好一门外语？每天坚持听和读，遇到生词先猜意思再查词典，敢于开口最重要。
股票和债券有什么区别？前者代表公司的一部分所有权，后者只是借款的凭证。""".split("\n")


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "utf-16", "utf-16-be", "utf-32"])
def test_g05_a_file_in_another_encoding_equals_its_utf8_copy(tmp_path, encoding):
    page = "问,答\r\n" + "".join(f'"{i}，\n{s}",{s[:5]}\r\n' for i, s in enumerate(SENTENCES * 2))
    page += "坏\r\n" + f"{SENTENCES[0]},好\r\n"
    utf8 = collect(put(tmp_path, "a.csv", page))
    with pytest.warns(UserWarning, match=r"b\.csv: read as \S+ \(.*(sure|confidence|mark|zero)"):
        other = collect(put(tmp_path, "b.csv", page.encode(encoding)))
    assert contents(other.kept) == contents(utf8.kept) and len(utf8.kept) == 19
    assert other.kept["line"][:] == utf8.kept["line"][:]
    ((mine,), (theirs,)) = other.dropped.to_list(), utf8.dropped.to_list()
    assert (mine["line"], mine["reason"], mine["raw"]) == (
        theirs["line"], theirs["reason"], theirs["raw"],
    )  # fmt: skip
    mark = len("".encode(encoding))
    assert page.encode(encoding)[mine["offset"] :].startswith("坏".encode(encoding)[mark:])


def test_g05_the_user_names_the_encoding_and_a_byte_that_it_lacks_costs_one_row(tmp_path):
    data = '{"a":"好"}\n{"a":"'.encode("gb18030") + b'\xff"}\n' + '{"a":"坏"}\n'.encode("gb18030")
    path = put(tmp_path, "a.jsonl", data)
    with pytest.warns(UserWarning, match=r"read as GB18030 \(as asked\)"):
        got = collect(path, encoding="gb18030")
    assert got.kept["a"][:] == ["好", "坏"]
    bad = got.dropped[0]
    assert (bad["line"], bad["offset"], bad["raw"]) == (2, 11, '{"a":"\\xff"}')
    assert bad["reason"] == "not GB18030: it has no such bytes"
    refused(path, "'gb1803' is no encoding", encoding="gb1803")
    refused(path, "is not UTF-8; name the encoding")  # two characters: nobody can be sure
    plain = collect(put(tmp_path, "b.jsonl", '{"a":"好"}'), encoding="gb18030")
    assert plain.kept["a"][:] == ["好"] and plain.notes == []  # UTF-8 comes first


def test_g06_strings_stay_strings_in_every_kind_of_file(tmp_path):
    rows = [{"a": w, "b": "x"} for w in WORDS] * 50
    put(tmp_path, "a.jsonl", b"\n".join(orjson.dumps(r) for r in rows))
    put(tmp_path, "b.json", orjson.dumps(rows))
    put(tmp_path, "c.csv", "a,b\n" + "".join(f"{w},x\n" for w in WORDS * 50))
    put(tmp_path, "d.tsv", "a\tb\n" + "".join(f"{w}\tx\n" for w in WORDS * 50))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    write_rows(to_dataset(rows), tmp_path / "f.jsonl.gz")
    for path in sorted(tmp_path.iterdir()):
        assert contents(collect(path).kept) == rows, path


def test_g07_each_fault_has_a_reason_of_its_own(tmp_path):
    faults = {
        "NaN": b'{"a":NaN}',
        "duplicate key": b'{"a":1,"a":1}',
        "lone surrogate": b'{"a":"\\ud800"}',
        "NUL": b'{"a":"\0"}',
        "not an object": b"[]",
        "number too large": b'{"a":99999999999999999999}',
        "nested too deeply": DEEP,
        "not UTF-8": b'{"a":"\xff"}',
        "not JSON": b"{",
    }
    good = '{"a":"好"}\n'.encode() * 2
    got = collect(put(tmp_path, "a.jsonl", good + b"\n".join(faults.values())))
    assert accounting([got])[0]["reasons"] == dict.fromkeys(faults, 1)


def test_g08_the_schema_is_the_union_over_all_rows_and_a_conflict_names_both_lines(tmp_path):
    many = b'{"a":null,"n":1}\n' * 120_000
    data = many + b'{"a":"x","n":2,"late":{"b":[1]}}\n'
    rows = collect(put(tmp_path, "a.jsonl", data)).kept
    assert rows[120_000]["late"] == {"b": [1]} and rows[120_000]["a"] == "x"
    assert rows[0]["late"] is None and rows.features["a"].dtype == "string"
    said = "column 'n' holds a number on line 1 and a text on line 30002; it is stored as JSON"
    with pytest.warns(UserWarning, match=said):
        late = collect(
            put(tmp_path, "b.jsonl", many[: 17 * 30_000] + b'{"a":"1"}\n{"n":"x"}\n')
        ).kept
    assert late["n"][29_999:] == [1, None, "x"]


def test_g08_tool_arguments_gain_no_keys(tmp_path):
    calls = [{"call": {"name": f"f{i % 3}", "arguments": {"abc"[i % 3]: i}}} for i in range(12_000)]
    same = [{"call": {"name": "f", "arguments": {"a": i}}} for i in range(12_000)]
    for rows, json_column in ((calls, True), (same, False), (same + calls[1:2], True)):
        path = put(tmp_path, "a.jsonl", b"\n".join(map(orjson.dumps, rows)))
        got = collect(path).kept
        assert got["call"][:] == [r["call"] for r in rows]
        assert (got.features["call"] == Json()) == json_column


@pytest.mark.parametrize(
    "name, data, columns, said",
    [
        ("a.jsonl", b"", [], "there are no rows"),
        ("a.jsonl", b"\n \n", [], "there are no rows"),
        ("a.jsonl", b"\xef\xbb\xbf", [], "there are no rows"),
        ("a.json", b"", [], "there are no rows"),
        ("a.json", b"[]", [], "there are no rows"),
        ("a.txt", b"\n", [], "there are no rows"),
        ("a.conll", b"", [], "there are no rows"),
        ("a.csv", b"", [], "there are no rows"),
        ("a.csv", b"a,b\n", ["a", "b"], "there are no rows"),
        ("a.csv", b"a,id,line\n", ["a", "orig_id", "orig_line"], "there are no rows"),
        ("a.tsv", b"a\tb", ["a", "b"], "there are no rows"),
        ("a.csv", b"a,b\n1\n2\n", ["a", "b"], "none of its rows can be read"),
        ("a.jsonl", b"{\n[1]\n", [], "none of its rows can be read"),
    ],
)
def test_g10_a_file_without_rows_gives_an_empty_typed_table_and_a_warning(
    tmp_path, name, data, columns, said
):
    path = put(tmp_path, name, data)
    with pytest.warns(UserWarning, match=said):
        got = collect(path)
    assert got.kept.column_names == ["id", "source", "line", *columns] and len(got.kept) == 0
    assert {got.kept.features[c].dtype for c in columns} <= {"string"}
    assert got.dropped.column_names == list(DROPPED)
    wanted = "give a file with at least one" if said.startswith("there") else "none of its 2 rows"
    refused(path, wanted, allow_empty=False)


def test_g10_no_sources_and_empty_tables(tmp_path):
    with pytest.warns(UserWarning, match="rows: there are no rows"):
        assert collect([]).rows_in == 0
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="there are no rows"):
        assert collect(tmp_path / "a.parquet").kept.features["n"].dtype == "int64"


def test_g11_a_row_of_12_mb_is_kept_and_named(tmp_path):
    long = "好x\\n" * 2_400_000
    data = [b'{"a":"x"}', orjson.dumps({"a": long}), b'{"a":"y"}']
    with pytest.warns(UserWarning, match=r"1 very long rows, the first on line 2 \(16\.8 MB\)"):
        got = collect(put(tmp_path, "a.jsonl", b"\n".join(data)))
    assert got.kept["a"][:] == ["x", long, "y"]


def test_g12_ids_are_unique_and_the_same_everywhere_and_repeated_ones_name_both_lines(tmp_path):
    rows = [b'{"id":"r%d","a":1}' % i for i in range(5000)]
    good = collect(put(tmp_path, "a.jsonl", b"\n".join(rows))).kept
    assert good["id"][:] == [f"r{i}" for i in range(5000)] and "orig_id" not in good.column_names
    rows[4998] = b'{"id":"r6","a":2}'
    said = "id 'r6' stands on lines 7 and 4999"
    with pytest.warns(UserWarning, match=said):
        twice = collect(put(tmp_path, "a.jsonl", b"\n".join(rows)))
    assert len(set(twice.kept["id"])) == 5000 and twice.kept["orig_id"][6:8] == ["r6", "r7"]
    assert all(len(i) == 16 for i in twice.kept["id"])
    bare = [b'{"a":%d}' % i for i in range(5000)]
    one = collect(put(tmp_path, "b.jsonl", b"\n".join(bare))).kept["id"][:]
    more = collect(put(tmp_path, "b.jsonl", b"\n".join([*bare, b'{"a":"x"}']))).kept["id"][:]
    assert more[:5000] == one  # rows at the end change nothing before them


def test_no_network_is_used(tmp_path, monkeypatch):
    def call(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", call)
    monkeypatch.setattr(socket, "getaddrinfo", call)
    write_rows(collect(put(tmp_path, "a.jsonl", '{"a":1}')).kept, tmp_path / "b.parquet")


def test_the_picture_of_the_accounting_has_a_bar_for_each_step():
    import matplotlib as mpl

    mpl.use("agg")
    rows = to_dataset([{"id": str(i), "source": "s", "line": i} for i in range(10)])
    bad = [aside(r, "x", f"{k}: $x^") for r, k in zip(rows.to_list(), "aabcd$", strict=False)]
    results = [
        StepResult(rows.select(range(6, 10)), set_aside(bad), step="$x_"),
        StepResult(rows, set_aside([]), step="y"),
    ]
    ax = accounting(results).plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == [r"\$x_", "y"]
    assert sum(p.get_width() for p in ax.patches) == 20
    assert [t.get_text().strip() for t in ax.texts] == ["4 kept, 2 a, 1 b, 1 c, …", "10 kept"]
    ax.figure.canvas.draw()
    assert len(accounting([]).plot().patches) == 0

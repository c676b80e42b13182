import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

import instruct_ft.data.label as label_module
from instruct_ft.data.collect import to_dataset
from instruct_ft.data.label import (
    TAGGINGS,
    Answers,
    ClassSession,
    SpanSession,
    cast_votes,
    check_spans,
    class_widget,
    cohen_kappa,
    fleiss_kappa,
    from_utf16,
    krippendorff_alpha,
    label_errors,
    out_of_fold,
    prelabel,
    prelabel_spans,
    read_conll,
    read_doccano,
    read_label_studio,
    show_spans,
    span_f1,
    span_widget,
    spans_to_tags,
    tags_to_spans,
    text_of_tokens,
    to_utf16,
    vote_weights,
    weighted_vote,
    whole_characters,
    write_conll,
    write_doccano,
    write_label_studio,
)
from instruct_ft.settings import InputError

ODD = "aé e\u0301\r\n\t 中，😀👍🏽\u200d👩🚀🇳🇴\ufe0f\u2028<&"
TEXT = st.text(st.sampled_from(ODD), min_size=1, max_size=14)
FEW = settings(max_examples=25, deadline=None, derandomize=True)
SCRIPT = label_module._JS


def texts(*contents, **columns):
    return Dataset.from_dict(
        {"id": [f"r{i}" for i in range(len(contents))], "text": list(contents)} | columns
    )


def span(start, end, label="X"):
    return {"start": start, "end": end, "label": label}


@st.composite
def marked(draw):
    "A text and spans in it that do not overlap"
    text = draw(TEXT)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    return text, [span(a, b, draw(st.sampled_from(["PER", "LOC"]))) for a, b in pairs]


# ---- offsets and spans


@FEW
@given(TEXT)
def test_offsets_come_back_from_utf16(text):
    for i in range(len(text) + 1):
        assert from_utf16(text, to_utf16(text, i)) == i
    good = {to_utf16(text, i) for i in range(len(text) + 1)}
    for unit in set(range(to_utf16(text, len(text)))) - good:
        with pytest.raises(InputError, match="in two"):
            from_utf16(text, unit)


@pytest.mark.parametrize("offset", [-1, 6, 1.0, None, "1", True])
def test_an_offset_that_is_none_is_refused(offset):
    for convert in (from_utf16, to_utf16):
        with pytest.raises(InputError, match="is outside"):
            convert("a😀b", offset)


@FEW
@given(TEXT, st.data())
def test_whole_characters_only_widens_and_is_idempotent(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    a, b = whole_characters(text, start, end)
    assert 0 <= a <= start
    assert end <= b <= len(text)
    assert whole_characters(text, a, b) == (a, b)


def node(code):
    "What a module prints that has imported the functions of the widget"
    if not shutil.which("node"):
        pytest.skip("no node installed")
    code = SCRIPT.read_text(encoding="utf-8").replace("export default", "const widget =") + code
    call = ["node", "--input-type=module", "-e", code]
    done = subprocess.run(
        call, check=False, capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_whole_characters_are_those_of_the_browser():
    rng = random.Random(0)
    strings = ["".join(rng.choices(ODD, k=12)) for _ in range(300)]
    strings += [
        "Cafe\u0301s",
        "👨‍👩‍👧!",
        "🇳🇴🇸🇪🇩🇰",
        "🏴\U000e0067\U000e0062\U000e007f",
        "a\r\nb",
    ]
    code = f"""
      const all = {json.dumps(strings)};
      const borders = (t) => Array.from(new Intl.Segmenter("en").segment(t), (s) => s.index);
      console.log(JSON.stringify(all.map(borders)));"""
    for text, theirs in zip(strings, node(code), strict=True):
        ours = [i for i in range(len(text)) if whole_characters(text, i, i)[0] == i]
        assert [to_utf16(text, i) for i in ours] == theirs, ascii(text)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([span(0, 0)], "start < end"),
        ([span(-1, 2)], "start < end"),
        ([span(0, 9)], "5 characters"),
        ([span(0.0, 2)], "start < end"),
        ([span(0, 2, "")], "give a text"),
        ([span(0, 2, None)], "give a text"),
        ([span(0, 2), span(1, 3, "Y")], "overlap"),
        ([span(0, 2) | {"text": "bc"}], "is 'ab' and not 'bc'"),
        ([{}], "start < end"),
    ],
)
def test_spans_that_cannot_be_learned_are_refused(spans, message):
    with pytest.raises(InputError, match=f"row 7: .*{message}"):
        check_spans("abcde", spans, "row 7")


@FEW
@given(marked())
def test_a_shown_text_is_escaped_and_whole(case):
    text, spans = case
    shown = show_spans("<script>" + text, [span(s["start"] + 8, s["end"] + 8) for s in spans])
    assert "<script>" not in shown
    assert shown.count("<mark") == len(spans)


# ---- sessions

LABELS = ["no", "yes"]


def test_a_session_resumes_where_one_stopped(tmp_path):
    rows = texts("好", "b", "c😀")
    first = ClassSession(rows, LABELS, tmp_path / "a.jsonl", by="ann")
    first.press("2")
    again = ClassSession(rows, LABELS, tmp_path / "a.jsonl", by="ann")
    assert again.row["id"] == "r1"
    assert again.progress == "1 of 3 done"
    again.press("1")
    again.press("s")
    assert again.row is None
    assert again.progress == "3 of 3 done, 1 of them skipped"
    result = again.result()
    assert result.kept["label"] == ["yes", "no"]
    assert result.dropped["reason"] == ["no label: skipped"]
    again.press("1")
    assert again.note == "all rows are done"


KEYS = st.lists(st.sampled_from("12subn x"), max_size=15)


@settings(FEW, max_examples=10)
@given(KEYS)
def test_undo_takes_everything_back_and_the_file_is_the_state(tmp_path_factory, keys):
    path = tmp_path_factory.mktemp("s") / "a.jsonl"
    rows = texts("a", "b", "c", suggested=["yes", "maybe", None])
    session = ClassSession(rows, LABELS, path)
    for key in keys:
        session.press(key)
        again = ClassSession(rows, LABELS, path)
        assert again.answers.lines == session.answers.lines
        result = session.result()
        assert len(result.kept) + len(result.dropped) == 3
    while session.history:
        session.undo()
    assert session.answers.lines == {}
    assert [row for row in session.result().dropped["reason"]] == ["no label: not reached"] * 3


def test_space_takes_a_suggestion_that_is_a_label(tmp_path):
    rows = texts("a", "b", suggested=["yes", "maybe"], confidence=[0.9, 0.5])
    session = ClassSession(rows, LABELS, tmp_path / "a.jsonl")
    assert "→ yes (90%)" in session._repr_html_()
    session.press(" ")
    session.press(" ")
    assert session.result().kept["label"] == ["yes"]
    assert session.note == "' ' is no key here"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    session = ClassSession(texts("a", "b"), LABELS, path)
    session.press("1")
    before = path.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(InputError, match="cannot be written"):
        session.press("1")
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_killed_process_loses_nothing_that_was_pressed(tmp_path):
    path = tmp_path / "a.jsonl"
    code = f"""
import os
from datasets import Dataset
from instruct_ft.data.label import ClassSession
rows = Dataset.from_dict(dict(id=[str(i) for i in range(9)], text=["t"] * 9))
session = ClassSession(rows, ["no", "yes"], {str(path)!r})
for _ in range(5):
    session.press("2")
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 5


GOOD = '{"id": "r0", "text": "a", "label": "yes", "by": "me", "done": true}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '{"id": "r1", "te', "line 2: not JSON"),
        (GOOD + GOOD, "line 2: a second label for row 'r0'"),
        (GOOD.replace('"me"', '"bob"'), "line 1: the label is by 'bob'"),
        (GOOD.replace('"by"', '"who"'), "line 1: there is no 'by'"),
        (GOOD.replace('"a"', '"A"'), "row r0: the text has changed"),
        (GOOD.replace("yes", "oui"), "row r0: the label 'oui' is not among"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        ClassSession(texts("a", "b"), LABELS, path)
    assert path.read_text(encoding="utf-8") == content


def test_two_programs_do_not_overwrite_each_other(tmp_path):
    rows = texts("a", "b", "c")
    one, two = (ClassSession(rows, LABELS, tmp_path / "a.jsonl") for _ in "ab")
    one.press("1")
    with pytest.raises(InputError, match="changed by another program"):
        two.press("2")
    assert one.answers.lines == ClassSession(rows, LABELS, tmp_path / "a.jsonl").answers.lines


def test_answers_to_rows_that_are_not_here_stay_in_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    session = ClassSession(texts("a", "b"), LABELS, path)
    session.press("1")
    session.press("2")
    other = ClassSession(Dataset.from_dict({"id": ["z"], "text": ["zz"]}), LABELS, path)
    other.press("1")
    assert set(Answers(path, "label", "me").lines) == {"r0", "r1", "z"}


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([{"id": 1}], LABELS, "got a list"),
        (Dataset.from_dict({"id": ["1"]}), LABELS, "needs the column text"),
        (texts("a", None), LABELS, "row r1 has no text"),
        (Dataset.from_dict({"id": ["1", "1"], "text": ["a", "b"]}), LABELS, "same id"),
        (texts("a"), [], "at least one"),
        (texts("a"), ["x", "x"], "different names"),
        (texts("a"), [f"l{i}" for i in range(40)], "40 labels; there are keys for"),
    ],
)
def test_rows_and_labels_are_checked(tmp_path, rows, labels, message):
    with pytest.raises(InputError, match=message):
        ClassSession(rows, labels, tmp_path / "a.jsonl")


def test_no_rows_is_a_finished_session(tmp_path):
    session = ClassSession(texts(), LABELS, tmp_path / "a.jsonl")
    assert session.row is None
    assert "All rows are done" in session._repr_html_()
    assert len(session.result().kept) == 0


# ---- spans by hand


@FEW
@given(marked())
def test_g24_spans_keep_their_surface_in_code_points_from_browser_to_file(tmp_path_factory, case):
    text, spans = case
    path = tmp_path_factory.mktemp("s") / "a.jsonl"
    session = SpanSession(texts(text), ["PER", "LOC"], path)
    key = {label: k for k, label in session.keys.items()}
    wanted = []
    for s in spans:
        a, b = whole_characters(text, s["start"], s["end"])
        if any(a < w["end"] and w["start"] < b for w in wanted):
            continue
        wanted.append(span(a, b, s["label"]))
        ends = {"start": to_utf16(text, s["start"]), "end": to_utf16(text, s["end"])}
        session.handle({"id": "r0", "key": key[s["label"]]} | ends)
        assert session.note == ""
    units = text.encode("utf-16-le")
    for drawn, s in zip(session.view()["spans"], wanted, strict=True):
        surface = units[2 * drawn["start"] : 2 * drawn["end"]].decode("utf-16-le")
        assert surface == text[s["start"] : s["end"]]
    session.handle({"id": "r0", "key": "Enter", "start": 0, "end": 0})
    kept = SpanSession(texts(text), ["PER", "LOC"], path).result().kept
    assert kept["spans"] == [wanted]


def test_a_span_is_toggled_replaced_removed_and_undone(tmp_path):
    session = SpanSession(texts("Ana Lee in Oslo", "b"), ["PER", "LOC"], tmp_path / "a.jsonl")
    session.press("1", 0, 3)
    session.press("1", 0, 7)  # over the first
    assert session.value == [span(0, 7, "PER")]
    session.press("2", 11, 15)
    session.press("2", 11, 15)  # again: off
    assert session.value == [span(0, 7, "PER")]
    session.press("Backspace", 2, 3)
    assert session.value == []
    session.undo()
    session.press("2", 3, 3)
    assert session.note == "select something first"
    assert [session.value, session.progress] == [[span(0, 7, "PER")], "0 of 2 done"]
    session.press("Enter")
    session.press("Enter")  # nothing in it, which is an answer too
    assert session.result().kept["spans"] == [[span(0, 7, "PER")], []]


@pytest.mark.parametrize(
    ("message", "note"),
    [
        ({"id": "r9", "key": "1", "start": 0, "end": 2}, "another text"),
        ({"id": "r0", "key": "1", "start": 3, "end": 4}, "in two"),
        ({"id": "r0", "key": "1", "start": 0, "end": 99}, "is outside"),
        ({"id": "r0", "key": "1", "start": "0", "end": 1}, "is outside"),
        ({"id": "r0", "key": "1", "start": 2, "end": 0}, "start < end"),
        ({"id": "r0", "key": "é", "start": 0, "end": 1}, "no key here"),
        ({}, "another text"),
    ],
)
def test_bad_messages_change_nothing_and_are_named(tmp_path, message, note):
    session = SpanSession(texts("ab😀c"), ["X"], tmp_path / "a.jsonl")
    session.handle(message)
    assert note in session.note
    assert session.answers.lines == {}


def test_the_class_widget_types_clicks_and_undoes(tmp_path):
    session = ClassSession(texts("a", "<b>", "c"), LABELS, tmp_path / "a.jsonl")
    shown, field, buttons = class_widget(session).children
    assert shown.value == session._repr_html_()
    field.value = "2"
    assert "&lt;b&gt;" in shown.value
    field.value = "21"
    field.value = "2"  # one character deleted
    assert session.row["id"] == "r1"
    buttons.children[0].click()
    assert session.result().kept["label"] == ["yes", "no"]
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    buttons.children[0].click()
    assert "changed by another program" in shown.value


def test_the_span_widget_hands_messages_on(tmp_path):
    session = SpanSession(texts("😀 Oslo"), ["LOC"], tmp_path / "a.jsonl")
    widget = span_widget(session)
    widget._handle_custom_msg({"id": "r0", "key": "1", "start": 3, "end": 7}, [])
    assert widget.view["spans"] == [span(3, 7, "LOC")]
    assert session.value == [span(2, 6, "LOC")]


# ---- the JavaScript


def test_the_widgets_functions_under_node():
    text = "我爱北京 😀 Oslo"
    code = f"""
      const t = {json.dumps(text)};
      const right = (s, more = {{}}) => move(t, s, {{ key: "ArrowRight", ...more }});
      const left = (s, more = {{}}) => move(t, s, {{ key: "ArrowLeft", ...more }});
      console.log(JSON.stringify([
        right([0, 0]), right([1, 2]), right([1, 2], {{ shiftKey: true }}), left([1, 4], {{ shiftKey: true }}),
        right([2, 4]), right([0, 0], {{ altKey: true }}), left([0, 1]), right([8, 12]),
        snap(t, [6, 9]), snap(t, [4, 5]),
        pieces("abcdef", [{{ start: 1, end: 3, label: "X" }}], [2, 5]).map((p) => [p.text, p.label ?? "", p.picked, p.last]),
      ]));"""
    got = node(code)
    assert got[:8] == [[0, 1], [2, 4], [1, 4], [1, 2], [5, 7], [0, 1], [0, 1], [8, 12]]
    assert got[8:10] == [[5, 9], None]
    assert got[10] == [
        ["a", "", False, False],
        ["b", "X", False, False],
        ["c", "X", True, True],
        ["de", "", True, False],
        ["f", "", False, False],
    ]


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVE = """
const sent = [], heard = [];
let view = VIEW;
const model = { get: () => view, on: (_, f) => heard.push(f), send: (m) => sent.push(m) };
const el = document.getElementById("here");
render({ model, el });
const box = el.querySelector(".ft-spans"), text = box.querySelector(".text");
const press = (key, more = {}) => {
  const e = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more });
  box.dispatchEvent(e);
  return e.defaultPrevented;
};
const find = (part) => {
  const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const at = walker.currentNode.data.indexOf(part);
    if (at >= 0) return [walker.currentNode, at, at + part.length];
  }
};
const drag = (part) => {
  const [n, a, b] = find(part);
  getSelection().setBaseAndExtent(n, a, n, b);
  text.dispatchEvent(new MouseEvent("mouseup", { bubbles: true }));
};
const out = { same: text.textContent === view.text, hidden: el.querySelectorAll("img").length };
press("ArrowRight"); press("ArrowRight"); press("1");
drag("Oslo"); press("2");
drag("e\\u0301s"); press("1");
press("Enter"); press("z", { ctrlKey: true });
out.left = [press("c", { ctrlKey: true }), press("Tab"), press("F5")];
view = { ...view, spans: [{ start: 0, end: 3, label: "PER" }] };
heard.forEach((f) => f());
out.marks = Array.from(text.querySelectorAll("mark"), (m) => [m.textContent, m.dataset.label]);
out.still = text.textContent === view.text;
drag("Oslo"); press("2");
out.sent = sent;
document.body.textContent = JSON.stringify(out);
"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium installed")
def test_g24_spans_selected_in_a_real_browser_keep_their_surface(tmp_path):
    text = "Ana\r\n😀 flew <img src=x> to Oslo 👍🏽 cafe\u0301s"
    session = SpanSession(texts(text), ["PER", "LOC"], tmp_path / "a.jsonl")
    view = json.dumps(session.view()).replace("<", "\\u003c")
    script = SCRIPT.read_text(encoding="utf-8").replace("export default", "const widget =")
    page = tmp_path / "page.html"
    page.write_text(
        f'<meta charset="utf-8"><div id="here"></div><script type="module">{script}'
        f"{DRIVE.replace('VIEW', view)}</script>",
        encoding="utf-8",
    )
    quiet = (
        "--disable-background-networking --disable-component-update --disable-sync --no-first-run"
    )
    call = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split()]
    call += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*call, page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    body = done.stdout.split("<body>")[1].split("</body>")[0]
    out = json.loads(body.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert out["same"]
    assert out["still"]
    assert out["hidden"] == 0
    assert out["left"] == [False, False, False]
    assert out["marks"] == [["Ana", "PER"]]
    *labelled, enter, undo, oslo = out["sent"]
    assert [enter["key"], undo["key"]] == ["Enter", "u"]
    assert [oslo["start"], oslo["end"]] == [labelled[1]["start"], labelled[1]["end"]]
    for message in labelled:
        session.handle(message)
    surfaces = [text[s["start"] : s["end"]] for s in session.value]
    assert surfaces == ["😀", "Oslo", "e\u0301s"]


# ---- labelling functions


def says(name, label, word):
    function = lambda row: label if word in row["text"] else None
    function.__name__ = name
    return function


def test_coverage_overlap_conflict_and_accuracy_of_a_table_made_by_hand():
    rows = texts("ab", "b", "", "abc")
    votes = cast_votes(rows, [says("a", "A", "a"), says("b", "B", "b"), says("c", "A", "c")])
    assert votes.cast.tolist() == [[0, 1, -1], [-1, 1, -1], [-1, -1, -1], [0, 1, 0]]
    table = votes.table(["A", None, "B", "B"])
    assert [list(line.values())[:4] for line in table] == [
        ["a", 0.5, 0.5, 0.5],
        ["b", 0.75, 0.5, 0.5],
        ["c", 0.25, 0.25, 0.25],
    ]
    assert [line["accuracy"] for line in table] == [0.5, 0.5, 0.0]


def test_a_weighted_vote_is_bayes_rule_and_ties_are_set_aside():
    rows = texts("ab", "b", "", "abc")
    votes = cast_votes(rows, [says("a", "A", "a"), says("b", "B", "b"), says("c", "A", "c")])
    even = weighted_vote(rows, votes, np.ones(3))
    assert even.dropped["reason"] == ["tie: A and B", "no vote: every function abstains"]
    assert even.kept["label"] == ["B", "A"]
    weights = vote_weights(votes, ["A", "B", None, "A"])
    accuracy = np.array([3 / 4, 2 / 5, 2 / 3])
    assert np.allclose(weights, np.log(accuracy / (1 - accuracy)))
    chance = weighted_vote(rows, votes, weights).kept[0]["confidence"]
    odds = (3 / 4) / (1 / 4) * (3 / 5) / (2 / 5)  # a is right and b is wrong, or the other way
    assert math.isclose(chance, odds / (1 + odds))


def test_votes_weights_and_rows_must_belong_together():
    votes = cast_votes(texts("a", "b"), [says("a", "A", "a")])
    with pytest.raises(InputError, match="gold has 1 labels for 2 rows"):
        vote_weights(votes, ["A"])
    with pytest.raises(InputError, match="2 rows were voted on and 1 given"):
        weighted_vote(texts("a"), votes, np.ones(1))


def test_a_failing_function_is_named_with_the_row():
    def broken(row):
        return row["nothing"]

    def wrong(row):
        return 1

    with pytest.raises(InputError, match="broken fails on row r0: KeyError"):
        cast_votes(texts("a"), [broken])
    with pytest.raises(InputError, match="wrong says 1 on row r0; return a label or None"):
        cast_votes(texts("a"), [wrong])
    with pytest.raises(InputError, match="at least one"):
        cast_votes(texts("a"), [])
    assert len(weighted_vote(texts(), cast_votes(texts(), [broken]), np.ones(1)).kept) == 0


# ---- pre-labels

SHOP = [
    *((f"please refund order {i}", "refund") for i in range(12)),
    *((f"where is parcel {i}", "delivery") for i in range(12)),
]
商店 = [
    *((f"请把第{i}单的钱退给我", "refund") for i in range(12)),
    *((f"第{i}个包裹什么时候到", "delivery") for i in range(12)),
]


def shop(pairs):
    return texts(*(t for t, _ in pairs), label=[y for _, y in pairs])


@pytest.mark.parametrize("pairs", [SHOP, 商店])
def test_prelabels_do_not_depend_on_the_order_of_rows(pairs):
    rows = shop(pairs)
    unseen = texts(pairs[0][0].replace("0", "77"), pairs[-1][0].replace("11", "88"), "")
    one, two = (prelabel(unseen, r).kept for r in (rows, rows.select(range(23, -1, -1))))
    assert one.to_list() == two.to_list()
    assert one["suggested"][:2] == ["refund", "delivery"]
    assert all(0.5 <= c <= 1 for c in one["confidence"])
    assert len(prelabel(texts(), rows).kept) == 0


def test_prelabels_need_two_classes_and_words():
    with pytest.raises(InputError, match="at least two"):
        prelabel(texts("a"), texts("a", "b", label=["x", "x"]))
    with pytest.raises(InputError, match="no words"):
        prelabel(texts("a"), texts("!", "?", label=["x", "y"]))
    with pytest.raises(InputError, match="row r1 has the label None"):
        prelabel(texts("a"), texts("a", "b", label=["x", None]))


@FEW
@given(marked(), TEXT)
def test_suggested_spans_have_a_surface_that_was_marked(case, other):
    text, spans = case
    labelled = to_dataset(
        [{"id": "1", "text": text, "spans": spans}], {"spans": label_module.SPANS}
    )
    known = {text[s["start"] : s["end"]] for s in spans}
    for row in prelabel_spans(texts(text, other), labelled).kept:
        found = check_spans(row["text"], row["suggested"])
        assert {row["text"][s["start"] : s["end"]] for s in found} <= known
        assert all(0 < s["confidence"] <= 1 for s in row["suggested"])


def test_suggested_spans_are_taken_with_enter(tmp_path):
    labelled = to_dataset([{"id": "1", "text": "北京😀", "spans": [span(0, 2, "LOC")]}])
    rows = prelabel_spans(texts("我在北京市"), labelled).kept
    session = SpanSession(rows, ["LOC"], tmp_path / "a.jsonl")
    session.press("Enter")
    assert session.result().kept["spans"] == [[span(2, 4, "LOC")]]


# ---- agreement

FLEISS = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]
KRIPPENDORFF = [
    [None if v == "." else int(v) for v in person.split()]
    for person in (
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    )
]


def two_people(table):
    pairs = [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]
    return [i for i, _ in pairs], [j for _, j in pairs]


def test_agreement_values_equal_published_cases():
    assert round(krippendorff_alpha(KRIPPENDORFF), 6) == 0.743421
    assert round(krippendorff_alpha(KRIPPENDORFF, "ordinal"), 3) == 0.815
    assert round(krippendorff_alpha(KRIPPENDORFF, "interval"), 3) == 0.849
    assert round(cohen_kappa(*two_people([[88, 14, 18], [10, 40, 10], [2, 6, 12]])), 3) == 0.492
    assert math.isclose(cohen_kappa(*two_people([[20, 5], [10, 15]])), 0.4)
    people = list(
        zip(*[[j for j, n in enumerate(row) for _ in range(n)] for row in FLEISS], strict=True)
    )
    assert round(fleiss_kappa(people), 3) == 0.210


RATINGS = st.lists(st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 3), min_size=1, max_size=12).map(
    lambda units: [list(r) for r in zip(*units, strict=True)]
)


@FEW
@given(RATINGS)
def test_cohens_kappa_is_that_of_scikit_learn(ratings):
    a, b, _ = ratings
    ours = cohen_kappa(a, b)
    if len({*a, *b}) == 1:
        assert math.isnan(ours)
    else:
        assert math.isclose(ours, cohen_kappa_score(a, b), abs_tol=1e-12)


@FEW
@given(RATINGS, st.sampled_from(["nominal", "interval"]), st.data())
def test_alpha_is_one_minus_the_mean_disagreement_of_pairs(ratings, level, data):
    for person in ratings:  # gaps
        for i in range(len(person)):
            if data.draw(st.integers(0, 4)) == 0:
                person[i] = None
    far = (lambda x, y: x != y) if level == "nominal" else (lambda x, y: (x - y) ** 2)
    units = [[v for v in u if v is not None] for u in zip(*ratings, strict=True)]
    units = [u for u in units if len(u) > 1]
    values = [v for u in units for v in u]
    ours = krippendorff_alpha(ratings, level)
    if len(set(values)) < 2:
        assert math.isnan(ours)
        return
    within = sum(far(x, y) / (len(u) - 1) for u in units for x, y in itertools.permutations(u, 2))
    across = sum(far(x, y) for x, y in itertools.permutations(values, 2)) / (len(values) - 1)
    assert math.isclose(ours, 1 - within / across, abs_tol=1e-9)


def test_the_order_of_labels_counts_for_ordinal_alpha():
    order = ["negative", "neutral", "positive"]
    near = [order * 3, ["neutral", "neutral", "positive"] * 3]
    far = [order * 3, ["positive", "neutral", "positive"] * 3]
    alphas = [krippendorff_alpha(r, "ordinal", order) for r in (near, far)]
    assert alphas[0] > alphas[1]
    with pytest.raises(InputError, match="give order"):
        krippendorff_alpha(near, "ordinal")
    with pytest.raises(InputError, match="is not in order"):
        krippendorff_alpha(near, "ordinal", order[:2])
    with pytest.raises(InputError, match="needs numbers"):
        krippendorff_alpha(near, "interval")


def test_ratings_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="one list a person"):
        krippendorff_alpha([["a"]])
    with pytest.raises(InputError, match="lengths .2, 1."):
        cohen_kappa(["a", "b"], ["a"])
    with pytest.raises(InputError, match="use krippendorff_alpha"):
        fleiss_kappa([["a", None], ["a", "b"]])
    with pytest.raises(InputError, match="nominal, ordinal or interval"):
        krippendorff_alpha([["a"], ["a"]], "ratio")
    assert math.isnan(cohen_kappa([None], ["a"]))
    assert math.isnan(fleiss_kappa([["a", "a"], ["a", "a"]]))
    assert math.isnan(fleiss_kappa([[], []]))


@FEW
@given(marked(), marked())
def test_span_f1_is_symmetric_and_one_for_the_same(one, two):
    a, b = [one[1]], [two[1]]
    assert span_f1(a, b) == span_f1(b, a) or math.isnan(span_f1(a, b))
    assert math.isnan(span_f1(a, a)) if not one[1] else span_f1(a, a) == 1


# ---- wrong labels


def planted(pairs, wrong):
    rows = [
        (t, {"refund": "delivery", "delivery": "refund"}[y] if i in wrong else y)
        for i, (t, y) in enumerate(pairs)
    ]
    return shop(rows)


@pytest.mark.parametrize("pairs", [SHOP, 商店])
def test_planted_errors_are_found_whatever_the_order(pairs):
    rows = planted(pairs, {2, 20})
    found = label_errors(rows)
    assert sorted(found["id"]) == ["r2", "r20"]
    assert all(a < b for a, b in zip(found["p_label"], found["p_suggested"], strict=True))
    again = label_errors(rows.select(range(23, -1, -1)))
    assert again.to_list() == found.to_list()


def test_a_copy_does_not_vouch_for_a_wrong_label():
    rows = planted([*SHOP, *[SHOP[2]] * 3], {2, 24, 25, 26})  # four copies of one text, all wrong
    chance, classes = out_of_fold(rows)
    assert set(label_errors(rows)["id"]) >= {"r2"}
    same = [i for i, t in enumerate(rows["text"]) if t == SHOP[2][0]]
    assert len({tuple(chance[i]) for i in same}) == 1
    assert chance[same[0], classes.index("refund")] > 0.5


def test_clean_labels_are_left_alone_and_small_classes_are_not_judged():
    assert len(label_errors(shop(SHOP))) == 0
    rare = shop([*SHOP, ("an odd one", "rare")])
    assert "r24" not in label_errors(rare)["id"]
    with pytest.raises(InputError, match="folds = 5: give 2 to 2"):
        label_errors(shop([("a a", "x"), ("b b", "y")]))
    with pytest.raises(InputError, match="at least two"):
        label_errors(shop([(f"a{i}", "x") for i in range(9)]))


# ---- Label Studio


def region(text, s, unit, **more):
    a, b = (to_utf16(text, s[k]) if unit == "UTF-16" else s[k] for k in ("start", "end"))
    value = {"start": a, "end": b, "text": text[s["start"] : s["end"]], "labels": [s["label"]]}
    return {
        "id": f"{s['start']}",
        "type": "labels",
        "from_name": "l",
        "to_name": "t",
        "value": value,
    } | more


def studio(path, tasks):
    path.write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    return read_label_studio(path)


@FEW
@given(st.lists(marked(), min_size=1, max_size=4), st.sampled_from(["UTF-16", "code points"]))
def test_g24_label_studio_round_trip_in_either_way_of_counting(tmp_path_factory, cases, unit):
    folder = tmp_path_factory.mktemp("ls")
    tasks = [
        {
            "id": i,
            "data": {"text": text, "more": [1.5, None]},
            "annotations": [
                {
                    "id": 9,
                    "completed_by": 3,
                    "lead_time": 1.25,
                    "result": [region(text, s, unit) for s in spans],
                },
                {"id": 10, "completed_by": {"id": 4, "email": "a@b.c"}, "result": []},
            ],
            "predictions": [],
        }
        for i, (text, spans) in enumerate(cases)
    ]
    result = studio(folder / "a.json", tasks)
    # a surface can stand at both places that a number may mean; then UTF-16 is taken
    assert len(result.kept) == 2 * len(cases)
    for row in result.kept:
        check_spans(row["text"], row["spans"])
        wanted = [
            c["text"]
            for t in tasks[int(row["id"])]["annotations"][row["annotation"]]["result"]
            for c in [t["value"]]
        ]
        assert [row["text"][s["start"] : s["end"]] for s in row["spans"]] == wanted
    write_label_studio(folder / "b.json", result.kept)
    assert json.loads((folder / "b.json").read_text(encoding="utf-8")) == tasks


@FEW
@given(st.lists(marked(), min_size=1, max_size=4))
def test_our_rows_come_back_from_label_studio_and_doccano(tmp_path_factory, cases):
    folder = tmp_path_factory.mktemp("own")
    rows = to_dataset(
        [
            {
                "id": f"r{i}",
                "text": text,
                "label": [None, "good"][i % 2],
                "spans": spans or [],
                "by": "ann",
            }
            for i, (text, spans) in enumerate(cases)
        ],
        {"label": label_module.Value("string"), "spans": label_module.SPANS},
    )
    write_label_studio(folder / "a.json", rows)
    kept = read_label_studio(folder / "a.json").kept
    assert kept.select_columns(rows.column_names).to_list() == rows.to_list()
    write_doccano(folder / "a.jsonl", rows)
    kept = read_doccano(folder / "a.jsonl").kept
    columns = ["id", "text", "label", "spans"]
    assert kept.select_columns(columns).to_list() == rows.select_columns(columns).to_list()


def test_only_what_was_changed_is_written_differently(tmp_path):
    text = "😀 Ana in Oslo"
    parts = [
        region(text, span(2, 5, "PER"), "UTF-16", origin="manual"),
        region(text, span(9, 13, "LOC"), "UTF-16"),
    ]
    relation = {"type": "relation", "from_id": "2", "to_id": "9"}
    tasks = [
        {"id": 1, "data": {"text": text}, "annotations": [{"id": 5, "result": [*parts, relation]}]}
    ]
    row = studio(tmp_path / "a.json", tasks).kept[0]
    row["spans"] = [span(2, 5, "PER"), span(9, 13, "CITY")]
    row["label"] = "travel"
    write_label_studio(tmp_path / "b.json", to_dataset([row]))
    result = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))[0]["annotations"][0][
        "result"
    ]
    assert result[:2] == [parts[0], relation]
    assert result[2]["value"] == {"start": 10, "end": 14, "text": "Oslo", "labels": ["CITY"]}
    assert result[3]["value"] == {"choices": ["travel"]}
    again = read_label_studio(tmp_path / "b.json").kept[0]
    assert [again["label"], again["spans"]] == ["travel", row["spans"]]


def annotation(*parts, **more):
    return {"id": 1, "data": {"text": "In Rome"}, "annotations": [{"result": list(parts), **more}]}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (
            annotation(
                region("In Rome", span(2, 6), "")
                | {"value": {"start": 2, "end": 6, "text": "Rome", "labels": ["L"]}}
            ),
            "bad span: .*' Rom' and not 'Rome'",
        ),
        (
            annotation(
                {"type": "labels", "value": {"start": "/p[1]", "end": "/p[1]", "labels": ["L"]}}
            ),
            "bad span",
        ),
        (
            annotation({"type": "choices", "value": {"choices": ["a", "b"]}}),
            "several classes: a, b",
        ),
        (
            annotation(region("In Rome", span(0, 4), ""), region("In Rome", span(3, 7), "")),
            "overlap",
        ),
        (
            {"id": 1, "data": {"image": "a.png"}, "annotations": []},
            "no text: there is no 'text' in it",
        ),
        ({"id": 1, "text": "JSON_MIN"}, "no text"),
    ],
)
def test_a_task_that_cannot_be_read_is_set_aside(tmp_path, task, reason):
    other = {"id": 2, "data": {"text": "fine"}, "annotations": []}
    result = studio(tmp_path / "a.json", [task, other, 7])
    assert result.kept["text"] == ["fine"]
    assert re.search(reason, result.dropped["reason"][0])
    assert result.dropped["reason"][1].startswith("not an object")
    assert result.dropped["line"] == [1, 1]


def test_cancelled_annotations_and_repeated_ids(tmp_path):
    done = annotation(region("In Rome", span(3, 7), ""), was_cancelled=True)
    result = studio(tmp_path / "a.json", [done, annotation()])
    assert [(row["label"], row["spans"]) for row in result.kept] == [(None, None)]
    assert result.dropped["reason"] == ["repeated id: the task at line 1 has it too"]
    write_label_studio(tmp_path / "b.json", result.kept)
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == [done]


def test_files_that_are_missing_or_empty(tmp_path):
    for read in (read_label_studio, read_doccano, read_conll):
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path / "none.json")
    (tmp_path / "e.json").write_text("[]")
    (tmp_path / "e.jsonl").write_text("")
    for result in (read_label_studio(tmp_path / "e.json"), read_doccano(tmp_path / "e.jsonl")):
        assert len(result.kept) == len(result.dropped) == 0
        assert {"id", "text", "label", "spans", "by", "original"} <= set(result.kept.column_names)
    assert read_conll(tmp_path / "e.jsonl").kept.column_names[-2:] == ["tokens", "tags"]
    with pytest.raises(InputError, match="units = 'bytes'"):
        read_doccano(tmp_path / "e.jsonl", units="bytes")


# ---- doccano


@FEW
@given(st.lists(marked(), min_size=1, max_size=4), st.sampled_from(["UTF-16", "code points"]))
def test_g24_doccano_round_trip(tmp_path_factory, cases, unit):
    folder = tmp_path_factory.mktemp("dc")
    lines = []
    for i, (text, spans) in enumerate(cases):
        at = lambda x, text=text: to_utf16(text, x) if unit == "UTF-16" else x
        marks = [(at(s["start"]), at(s["end"]), s["label"]) for s in spans]
        entities = [
            {"id": n, "label": c, "start_offset": a, "end_offset": b}
            for n, (a, b, c) in enumerate(marks)
        ]
        line = {"id": i, "text": text, "Comments": [], "note": 0.5}
        lines.append(
            line
            | (
                [{"label": [list(m) for m in marks]}, {"entities": entities, "relations": []}][
                    i % 2
                ]
            )
        )
    (folder / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    kept = read_doccano(folder / "a.jsonl", unit).kept
    assert kept["spans"] == [spans for _, spans in cases]
    write_doccano(folder / "b.jsonl", kept, unit)
    assert [
        json.loads(x) for x in (folder / "b.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ] == lines


def test_a_changed_line_of_doccano_keeps_what_was_not_changed(tmp_path):
    line = {
        "id": 3, "text": "去 Oslo", "relations": [1], "Comments": ["hm"],
        "entities": [{"id": 16, "label": "LOC", "start_offset": 2, "end_offset": 6, "user": 1}],
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps(line), encoding="utf-8")
    row = read_doccano(tmp_path / "a.jsonl").kept[0]
    row["spans"] = [span(0, 1, "GO"), *row["spans"]]
    write_doccano(tmp_path / "b.jsonl", to_dataset([row]))
    new = json.loads((tmp_path / "b.jsonl").read_text(encoding="utf-8"))
    assert new["entities"][0] == line["entities"][0]
    assert new["entities"][1] == {"id": 17, "label": "GO", "start_offset": 0, "end_offset": 1}
    assert {k: v for k, v in new.items() if k != "entities"} == {
        k: v for k, v in line.items() if k != "entities"
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "ab", "label": [[0, 5, "X"]]}', "bad span"),
        ('{"text": "ab", "label": [[0, 2]]}', "bad span: .* is neither"),
        ('{"text": "ab", "label": ["x", "y"]}', "several classes: x, y"),
        ('{"label": ["x"]}', "no text"),
        ('{"text": "ab", "label": [[0, 2, "X"], [1, 2, "Y"]]}', "overlap"),
        ('{"text": "ab", ', "not JSON"),
    ],
)
def test_a_line_of_doccano_that_cannot_be_read_is_set_aside(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line, encoding="utf-8")
    result = read_doccano(tmp_path / "a.jsonl")
    assert result.kept["id"] == ["line 1"]
    assert result.dropped["line"] == [3]
    assert re.search(reason, result.dropped["reason"][0])


# ---- CoNLL and tags


@st.composite
def token_spans(draw):
    n = draw(st.integers(1, 9))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=8)))
    pairs = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
    return n, [(a, b, draw(st.sampled_from(["PER", "LOC-x"]))) for a, b in pairs]


@FEW
@given(token_spans(), st.sampled_from(TAGGINGS))
def test_g24_tags_and_spans_round_trip_in_every_tagging(case, tagging):
    n, spans = case
    tags = spans_to_tags(spans, n, tagging)
    assert tags_to_spans(tags, tagging) == spans
    assert spans_to_tags(tags_to_spans(tags, tagging), n, tagging) == tags


@pytest.mark.parametrize("tagging", TAGGINGS)
def test_every_sequence_of_tags_is_read_exactly_or_refused(tagging):
    "All sequences of up to three tags: what is accepted is what the writer would write"
    names = ["O", *(f"{p}-{t}" for p in "BIES" for t in "XY")]
    accepted = 0
    for n in range(1, 4):
        for tags in itertools.product(names, repeat=n):
            try:
                spans = tags_to_spans(list(tags), tagging)
            except InputError:
                continue
            accepted += 1
            assert spans_to_tags(spans, n, tagging) == list(tags)
    assert accepted > 10


@pytest.mark.parametrize(
    ("tags", "tagging", "message"),
    [
        (["O", "I-X"], "BIO", "'I-X' at token 2 after 'O'"),
        (["B-X", "I-Y"], "BIO", "'I-Y' at token 2 after 'B-X'"),
        (["B-X"], "IOB1", "'B-X' at token 1 after 'O'"),
        (["B-X"], "BIOES", "at the end after 'B-X'"),
        (["B-X", "O"], "BIOES", "'O' at token 2 after 'B-X'"),
        (["Q-X"], "BIO", "is no tag"),
        (["B-"], "BIO", "is no tag"),
        (["O-X"], "BIO", "is no tag"),
        ([""], "BIO", "is no tag"),
        ([None], "BIO", "None at token 1 is no tag"),
        (["E-X"], "BIO", "'E-X' at token 1 after 'O'"),
        (["S-X", "E-X"], "bioes", "'E-X' at token 2 after 'S-X'"),
        (["O"], "BILOU", "give one of"),
    ],
)
def test_g24_illegal_tags_are_named(tags, tagging, message):
    with pytest.raises(InputError, match=message):
        tags_to_spans(tags, tagging)


def test_g24_illegal_tags_in_a_file_are_named_with_their_line(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("a\tO\nb\tB-X\n\n# a remark\nc\tO\nd\tI-X\n\ne\tO\n", encoding="utf-8")
    result = read_conll(path, "BIO")
    assert result.kept["tokens"] == [["a", "b"], ["e"]]
    assert result.dropped["reason"] == [
        "illegal tags: 'I-X' at token 2 after 'O' (BIO). It is line 6."
    ]
    assert result.dropped["line"] == [5]
    assert len(read_conll(path).kept) == 3
    path.write_text("a\tO\nb\tB-X\n", encoding="utf-8")
    assert "It is line 2." in read_conll(path, "BIOES").dropped["reason"][0]


TOKEN = st.text(st.sampled_from('aé#\u0301中😀\u2028\u0085\u00a0\x1c"-'), min_size=1, max_size=4)


@FEW
@given(
    st.lists(
        st.lists(st.tuples(TOKEN, st.sampled_from(["O", "B-X", "I-X"])), min_size=1, max_size=5),
        max_size=4,
    ),
    st.booleans(),
)
def test_conll_round_trip(tmp_path_factory, sentences, wide):
    path = tmp_path_factory.mktemp("c") / "a.conll"
    rows = [{"tokens": [t for t, _ in s], "tags": [g for _, g in s]} for s in sentences]
    rows = [
        r | ({"columns": [f"N\tB-{i}" for i in range(len(r["tags"]))]} if wide else {})
        for r in rows
    ]
    words = label_module.List(label_module.Value("string"))
    write_conll(path, to_dataset(rows, {"tokens": words, "tags": words}))
    result = read_conll(path)
    assert len(result.dropped) == 0
    names = ["tokens", "tags", *(["columns"] if wide and rows else [])]
    assert result.kept.select_columns(names).to_list() == rows


def test_conll_of_other_kinds(tmp_path):
    path = tmp_path / "a.conll"
    path.write_bytes(
        "\ufeff-DOCSTART- -X- O O\r\n\r\nEU NNP B-NP B-ORG\r\n# NN O O\r\n\r\nbad line\r\nx y z O\r\ny z x O".encode()
    )
    result = read_conll(path)
    assert result.kept["tokens"] == [["EU", "#"]]
    assert result.kept["columns"] == [["NNP\tB-NP", "NN\tO"]]
    assert [r.split(":")[0] for r in result.dropped["reason"]] == ["document mark", "wrong columns"]
    assert "line 6 has 2, expected 4" in result.dropped["reason"][1]
    path.write_bytes("你 O".encode("gb18030"))
    with pytest.raises(InputError, match="0xc4 is not UTF-8"):
        read_conll(path)


@pytest.mark.parametrize("token", ["", "a\tb", "a\nb", "a\rb"])
def test_conll_refuses_what_it_cannot_hold(tmp_path, token):
    rows = to_dataset([{"tokens": ["x", token], "tags": ["O", "O"]}])
    with pytest.raises(InputError, match="sentence 1: CoNLL cannot hold"):
        write_conll(tmp_path / "a.conll", rows)
    assert not (tmp_path / "a.conll").exists()


@FEW
@given(token_spans(), st.sampled_from(["", " "]), st.data())
def test_g24_text_of_tokens_has_the_tokens_as_surface(case, join, data):
    n, spans = case
    tokens = data.draw(st.lists(TOKEN, min_size=n, max_size=n))
    text, found = text_of_tokens(tokens, spans_to_tags(spans, n), join=join)
    assert [text[s["start"] : s["end"]] for s in found] == [
        join.join(tokens[a:b]) for a, b, _ in spans
    ]

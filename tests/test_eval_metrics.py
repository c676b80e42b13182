import json
import math
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_ft.eval.metrics import Scores, exact_match, score_rows, trimmed, wilson
from instruct_ft.settings import InputError


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Lima", "Lima", True),
        (" Lima\n", "Lima", True),
        ("Lima", "\tLima\u3000", True),
        ("Reykjavi\u0301k", "Reykjav\u00edk", True),
        ("lima", "Lima", False),
        ("CO", "Co", False),
        ("Lima.", "Lima", False),
        ("1.5", "15", False),
        ("\uff21", "A", False),  # full-width A: another character
        ("New  York", "New York", False),
        ("巴黎。", "巴黎", False),
        ("", "", True),
        ("", "x", False),
    ],
)
def test_exact_match_trims_and_no_more(answer, reference, right):
    assert exact_match(answer, reference) is right


def test_any_of_several_references_will_do():
    assert exact_match("The Hague ", ("Amsterdam", "The Hague"))
    assert not exact_match("Rotterdam", ["Amsterdam", "The Hague"])
    assert not exact_match("", [])


@given(st.text(), st.text(alphabet=" \t\n\r\u3000", max_size=4))
def test_trimming_is_stable_and_blind_to_spelling(text, space):
    once = trimmed(text)
    assert trimmed(once) == once
    assert trimmed(space + text + space) == once
    assert exact_match(unicodedata.normalize("NFD", text), text)


NEWCOMBE = {  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    (81, 263): (0.2553, 0.3662),
    (15, 148): (0.0624, 0.1605),
    (0, 20): (0.0, 0.1611),
    (1, 29): (0.0061, 0.1718),
}


@pytest.mark.parametrize(("counts", "printed"), NEWCOMBE.items())
def test_wilson_gives_newcombes_table(counts, printed):
    assert wilson(*counts) == pytest.approx(printed, abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_shares_that_are_not_surprised(counts):
    k, n = counts
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    z = 1.959963984540054
    for p in (low, high):  # the ends solve |k/n - p| = z sqrt(p (1 - p) / n), or are 0 or 1
        edge = (k == 0 and p == 0) or (k == n and p == 1)
        assert edge or abs(k / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), abs=1e-9)
    mirrored = wilson(n - k, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)
    wide = wilson(k, n, confidence=0.99)
    assert wide[0] <= low and high <= wide[1]


def test_wilson_at_the_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 5)[1] == 1.0 and wilson(0, 5)[0] == 0.0
    for bad in [(-1, 5), (6, 5), (1, 0)]:
        with pytest.raises(ValueError, match="not possible"):
            wilson(*bad)
    for bad in [0, 1, 95]:
        with pytest.raises(ValueError, match="confidence"):
            wilson(1, 2, bad)


def row(task, lang, answer, **other):
    talk = [dict(role="user", content="?"), dict(role="assistant", content=answer)]
    return dict(task=task, lang=lang, messages=talk, **other)


def said(text, stopped=True):
    return SimpleNamespace(text=text, stopped=stopped)


CELLS = st.tuples(
    st.sampled_from("abc"), st.sampled_from(["en", "zh"]), st.booleans(), st.booleans()
)


@given(st.lists(CELLS, max_size=40))
def test_the_table_adds_up(cells):
    rows = [row(task, lang, "yes") for task, lang, _, _ in cells]
    answers = [said("yes" if right else "no", stopped) for _, _, right, stopped in cells]
    scores = score_rows(rows, answers)
    assert scores.correct == [right for _, _, right, _ in cells]
    for key in ("n", "correct"):
        assert sum(g[key] for g in scores.groups) == scores.total[key]
    assert [(g["task"], g["lang"]) for g in scores.groups] == sorted({c[:2] for c in cells})
    for g in scores.groups:
        mine = [c for c in cells if c[:2] == (g["task"], g["lang"])]
        assert g["accuracy"] == sum(c[2] for c in mine) / len(mine)
        assert (g["low"], g["high"]) == wilson(g["correct"], g["n"])
        assert g["stop_rate"] == sum(c[3] for c in mine) / len(mine)
    json.dumps(scores.to_dict(), allow_nan=False)
    assert len(repr(scores).splitlines()) == len(scores.groups) + 2


def test_references_text_answers_and_other_groups():
    rows = [row("t", "en", "Amsterdam", references=["Amsterdam", "The Hague"]), row("t", "zh", "b")]
    scores = score_rows(rows, ["The Hague", "c"], by=["lang"])
    assert [(g["lang"], g["correct"]) for g in scores.groups] == [("en", 1), ("zh", 0)]
    assert scores.total["stop_rate"] is None
    several = [*rows[1]["messages"], *rows[0]["messages"]]
    assert score_rows([dict(messages=several)], ["Amsterdam"]).total["correct"] == 1
    nameless = score_rows([dict(messages=several)], ["Amsterdam"]).groups[0]
    assert (nameless["task"], nameless["lang"]) == ("-", "-")


def test_a_table_of_nothing_is_a_table():
    scores = score_rows([], [])
    assert scores.groups == [] and scores.total["accuracy"] is None
    assert "all" in repr(scores) and "| all |" in scores._repr_markdown_()


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(InputError, match="There are 1 rows and 2 answers"):
        score_rows([row("t", "en", "a")], ["a", "b"])
    asked = dict(id="q7", messages=[dict(role="user", content="?")])
    with pytest.raises(InputError, match=r"Row 1 \(q7\) has no answer"):
        score_rows([row("t", "en", "a"), asked], ["a", "b"])


def test_names_from_data_are_escaped_in_markdown():
    scores = score_rows([row("a|b<script>\n", "en", "x")], ["x"])
    lines = scores._repr_markdown_().splitlines()
    assert len(lines) == 4 and r"a\|b&lt;script>" in lines[2]
    assert isinstance(scores, Scores)


def test_datasets_are_rows_too():
    from datasets import Dataset

    rows = [row("t", "en", "a"), row("t", "zh", "b")]
    assert score_rows(Dataset.from_list(rows), ["a", "a"]).correct == [True, False]

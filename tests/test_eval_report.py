"The report: what it says, that it adds up, and that no data can break it"

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_ft.eval import report
from instruct_ft.eval.metrics import wilson
from instruct_ft.eval.report import (
    curve_points,
    curve_svg,
    figure,
    flow,
    nice_ticks,
    outcome,
    pct,
    render,
    report_html,
    say,
    shown,
    thin_out,
    verdict,
    visible,
    write_report,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><style>body{display:none}</style>",
    "</title><h1>gone",
    "<!-- comment",
    "]]><![CDATA[",
    "' onmouseover='x' \" onmouseover=\"x\"",
    "<img src=https://example.invalid/x onerror=x>",
    "{{ 7*7 }}{% raw %}",
    "\u202egnirts\u202c \u2066x\u2069",
    "\x00\x1b[31m\x07",
    "\ud800 lone",
    "👨‍👩‍👧‍👦 家庭 هذا نص",
]


class Reader(HTMLParser):
    "Text, tags and attributes as a browser sees them"

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.attributes, self.quiet = [], [], [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        self.quiet = tag in ("style", "script", "title")

    def handle_endtag(self, tag):
        self.quiet = False

    def handle_data(self, data):
        if not self.quiet:
            self.text.append(data)


def case(text):
    return dict(tag=text, lang=text, prompt=text, reference=text, before=text, after=text,
                before_ok=None, after_ok=True, before_stopped=True, after_stopped=False)  # fmt: skip


def full(text="plain", **more):
    "A result with `text` in every place that data can reach"
    return dict(
        name=text, verdict=text, subtitle=text, notes=[text],
        figures=[figure("a", text, 0.5, 0.4, 0.6, 100), figure("b", text, 2.5, 2.4, 2.6, 10, "nats", "lower"),
                 figure("c", text, 0.5)],
        history=[dict(step=i, loss=3 / i) for i in range(1, 50)] + [dict(step=49, eval_loss=0.1)],
        examples=[case(text)], failures=[case(text)],
        slices=[dict(task=text, lang=text, n=10, accuracy=0.5, low=0.2, high=0.8, stop_rate=None)],
        accounting=[dict(step=text, rows_in=10, kept=8, dropped=2, reasons={text: 2})],
        splits=dict(train=6, validation=1, test=1),
        dropped=[dict(source=text, line=None, step=text, reason=text, raw=text)], dropped_total=2,
        tokens=dict(total=10, learned=3), command=text, settings={text: text}, versions={text: text},
        seconds={text: 1.5}, model={text: 3},
    ) | more  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_data_never_becomes_markup(text):
    plain, got = Reader(report_html(full())), Reader(report_html(full(text)))
    unmarked = [t for t in got.tags if t != "b"]
    assert unmarked == [t for t in plain.tags if t != "b"]
    names = [a[:2] for a in got.attributes if a[0] != "b"]
    assert names == [a[:2] for a in plain.attributes if a[0] != "b"]
    assert not {"script", "img", "iframe", "link", "object"} & set(got.tags)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_visible_text_comes_back(text):
    cell = Reader(render('<p title="{{ t }}">{{ t }}</p>', t=text))
    marks = re.sub(r"<b class=ctl>U\+(\w+)</b>", lambda m: f"\0{m[1]}\0", render("{{ t }}", t=text))
    back = re.sub(r"\0(\w+)\0", lambda m: chr(int(m[1], 16)), "".join(Reader("<p>" + marks).text))
    assert back == text
    assert [a[:2] for a in cell.attributes if a[0] != "b"] == [("p", "title")]


def test_emoji_and_scripts_are_left_alone():
    for text in ("👨‍👩‍👧‍👦 👩🏽‍💻", "北京", "هذا نص عربي", "می‌خواهم"):
        assert visible(text) == text == shown(text)
    assert shown("a\x1b[2Jb\u202e\ud800") == r"a\x1b[2Jb\u202e\ud800"
    shown("\ud800").encode()


def test_page_is_self_contained_and_utf8():
    page = report_html(full("</style> \ud800 https://example.invalid"))
    page.encode("utf-8")
    found = Reader(page)
    assert found.tags.count("table") == 10 and found.tags.count("svg") == 2
    assert not [
        a for a in found.attributes if a[1] in ("src", "srcset", "data", "action", "poster")
    ]
    assert [a[2] for a in found.attributes if a[1] == "href"] == [
        "dropped.jsonl",
        "metrics.json",
        "run.json",
    ]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page


def test_an_empty_run_gives_a_page():
    page = report_html({})
    assert "How to repeat it" in page and "Before and after" not in page and "<svg" not in page


def test_numbers_on_the_page_are_those_of_the_result():
    text = " ".join("".join(Reader(report_html(full())).text).split())
    for words in (
        "50.0%",
        "95% interval 40.0–60.0%,",
        "2.500",
        "95% interval 2.400–2.600,",
        "n = 100",
        "3 of 10",
    ):
        assert words in text


def test_long_text_is_cut_and_says_so():
    page = report_html(full(examples=[case("x" * 5000) | dict(tag="", lang="")]))
    assert "3,800 characters more" in page and "x" * 1201 not in page


def test_percent_never_rounds_to_perfection():
    assert [pct(x) for x in (0, 1, 1e-9, 1 - 1e-9, 0.973, None)] == [
        "0%",
        "100%",
        "0.1%",
        "99.9%",
        "97.3%",
        "–",
    ]
    assert (
        say(figure("a", "", 0.9, *wilson(9, 10), n=10)) == "90.0% (95% interval 59.6–98.2%, n = 10)"
    )
    assert say(figure("a", "", 0.9)) == "90.0%"


@given(st.integers(0, 200), st.integers(0, 200), st.sampled_from(["higher", "lower"]))
@settings(deadline=None)
def test_verdict_follows_the_intervals(a, b, better):
    before = figure("a", "", a / 200, *wilson(a, 200), n=200, better=better)
    after = figure("b", "it", b / 200, *wilson(b, 200), n=200, better=better)
    apart = before["high"] < after["low"] or after["high"] < before["low"]
    rose = b > a if better == "higher" else b < a
    assert outcome(before, after) == ("unclear" if not apart else "better" if rose else "worse")
    assert outcome(after, before) == {"better": "worse", "worse": "better"}.get(
        outcome(before, after), "unclear"
    )
    sentence = verdict(before, after)
    assert sentence.endswith(".") and pct(a / 200) in sentence and pct(b / 200) in sentence


def test_rows_must_add_up():
    steps = full()["accounting"]
    assert flow(steps, dict(train=8))[0]["width"] == 0.8
    for bad in (
        [steps[0] | dict(kept=9)],
        [steps[0] | dict(reasons={})],
        [*steps, dict(step="b", rows_in=7, kept=7, dropped=0, reasons={})],
    ):
        with pytest.raises(ValueError):
            flow(bad)
    with pytest.raises(ValueError, match="kept 8"):
        report_html(full(splits=dict(train=7)))
    assert (
        flow([]) == []
        and flow([dict(step="a", rows_in=0, kept=0, dropped=0, reasons={})])[0]["width"] == 0
    )


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_cover_and_are_few(low, span):
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7
    slack = 1e-6 * max(abs(low), span, 1)
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack


@given(st.lists(st.floats(0, 10), min_size=1, max_size=500))
@settings(deadline=None)
def test_thinning_keeps_range_and_order(values):
    few = thin_out(list(enumerate(values)), 50)
    assert len(few) <= 50 and min(values) - 1e-9 <= min(v for _, v in few)
    assert max(v for _, v in few) <= max(values) + 1e-9 and few == sorted(few, key=lambda p: p[0])


def test_curve_leaves_out_what_is_not_finite():
    history = [
        dict(step=1, loss=float("nan")),
        dict(step=2, loss=None),
        dict(step=3, loss=2.0),
        dict(step=4, loss=1.0),
    ]
    assert curve_points(history)[2] == 2
    svg = curve_svg(history)
    assert "nan" not in svg and svg.count("<polyline") == 2
    assert curve_svg(history[:3]) == ""
    assert "2 values were not finite" in report_html(full(history=history))


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_report(tmp_path / "report.html", full())
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_report(path, full(splits=dict(train=1)))
    monkeypatch.setattr(report.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        write_report(path, full("other"))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium installed")
def test_a_browser_shows_the_data_as_text(tmp_path):
    path = write_report(
        tmp_path / "report.html", full("<script>document.title='ran'</script>\u202eabc")
    )
    quiet = "--disable-background-networking --disable-component-update --disable-sync --disable-quic --no-first-run"
    call = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet.split(),
        f"--user-data-dir={tmp_path / 'p'}",
    ]
    done = subprocess.run(
        [*call, "--dump-dom", path.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = done.stdout
    assert "&lt;script&gt;document.title='ran'&lt;/script&gt;" in dom and "<script" not in dom
    assert "<title>ran" not in dom and dom.count("<svg") == 2
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*call, "--window-size=390,1200", f"--screenshot={shot}", path.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert shot.stat().st_size > 10_000

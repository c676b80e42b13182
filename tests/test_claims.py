import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_ft import claims
from instruct_ft.claims import Claim, ClaimError, claim, claims_table, read_claims

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "deep" / "claims.json"


def test_a_claim_that_holds_is_a_sentence_and_a_record(ledger):
    made = claim("a-b", "{x:.0%} of {n}", dict(x=0.5, n=4), lambda x, n: x < n, "P, 2", ledger)
    assert made == Claim("a-b", "{x:.0%} of {n}", dict(x=0.5, n=4), "P, 2")
    assert made.sentence == "50% of 4"
    assert str(made) == repr(made) == "50% of 4 (P, 2)"
    assert "50% of 4" in made._repr_markdown_() and "a-b" in made._repr_markdown_()
    record = dict(id="a-b", text="{x:.0%} of {n}", measured=dict(x=0.5, n=4), source="P, 2")
    assert read_claims(ledger) == [record]


def test_a_claim_that_fails_says_its_figures_and_leaves_the_ledger(ledger):
    claim("a", "{x}", dict(x=1), lambda x: True, ledger=ledger)
    before = ledger.read_bytes()
    with pytest.raises(ClaimError, match="a no longer holds: 2 .*'x': 2"):
        claim("a", "{x}", dict(x=2), lambda x: x < 2, ledger=ledger)
    assert ledger.read_bytes() == before
    with pytest.raises(AssertionError):
        claim("b", "{x}", dict(x=2), lambda x: np.bool_(False), ledger=ledger)


def test_figures_of_numpy_and_torch_become_plain(ledger):
    import torch

    figures = dict(a=np.float32(0.1), b=torch.tensor(3), c=np.bool_(True), d=2 / 3, e="x")
    made = claim("a", "{a}{b}{c}{d}{e}", figures, lambda **_: True, ledger=ledger)
    assert made.measured == dict(a=0.1, b=3, c=True, d=0.666667, e="x")
    assert [type(v) for v in made.measured.values()] == [float, int, bool, float, str]
    json.dumps(made.measured)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, [1], {"a": 1}])
def test_a_figure_that_is_no_figure_stops_the_claim(ledger, bad):
    with pytest.raises(ClaimError, match="^x is "):
        claim("a", "{x}", dict(x=bad), lambda x: True, ledger=ledger)
    assert not ledger.exists()


@pytest.mark.parametrize(
    ("id", "text", "measured", "said"),
    [
        ("A", "{x}", dict(x=1), "is no id"),
        ("a b", "{x}", dict(x=1), "is no id"),
        ("a--b", "{x}", dict(x=1), "is no id"),
        ("a\n", "{x}", dict(x=1), "is no id"),
        ("a", "{x} {y}", dict(x=1), "does not take the figures"),
        ("a", "{}", dict(x=1), "does not take the figures"),
        ("a", "{x", dict(x=1), "does not take the figures"),
        ("a", "{x:.0%}", dict(x="half"), "does not take the figures"),
        ("a", "{x}", dict(x=1, y=2, z=3), "never shows y, z"),
    ],
)
def test_a_claim_that_cannot_be_written_down(ledger, id, text, measured, said):
    with pytest.raises(ClaimError, match=said):
        claim(id, text, measured, lambda **_: True, ledger=ledger)
    assert not ledger.exists()


def test_a_second_run_replaces_its_own_record_and_keeps_the_order(ledger):
    for id in ["c", "a", "b", "a"]:
        claim(id, "{x}", dict(x=len(read_claims(ledger))), lambda x: True, ledger=ledger)
    assert [(c["id"], c["measured"]["x"]) for c in read_claims(ledger)] == [
        ("a", 3),
        ("b", 2),
        ("c", 0),
    ]
    assert ledger.read_bytes().endswith(b"]\n") and b"\r" not in ledger.read_bytes()
    assert not ledger.with_suffix(".new").exists()


def test_text_in_other_scripts_stays_readable(ledger):
    claim("zh", "准确率 {x}", dict(x=1), lambda x: True, ledger=ledger)
    assert "准确率" in ledger.read_text(encoding="utf-8")


@pytest.mark.parametrize(("scale", "written"), [("full", True), ("quick", False)])
def test_only_a_full_run_writes(tmp_path, monkeypatch, scale, written):
    monkeypatch.setattr(claims, "results_dir", lambda: tmp_path)
    monkeypatch.setenv("INSTRUCT_FT_SCALE", scale)
    claim("a", "{x}", dict(x=1), lambda x: True)
    assert (tmp_path / "claims.json").exists() == written
    with pytest.raises(ClaimError):
        claim("a", "{x}", dict(x=1), lambda x: False)


def test_processes_that_write_at_once_lose_nothing(ledger):
    code = (
        "import sys; from instruct_ft.claims import claim\n"
        "for i in range(10): claim(f'{sys.argv[2]}-{i}', '{i}', dict(i=i), lambda i: True, ledger=sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(ledger)]
    started = [subprocess.Popen([*command, name], cwd=ROOT) for name in "abcd"]
    assert [process.wait(60) for process in started] == [0, 0, 0, 0]
    assert [c["id"] for c in read_claims(ledger)] == [f"{n}-{i}" for n in "abcd" for i in range(10)]


def test_a_broken_ledger_says_what_to_do(ledger):
    ledger.parent.mkdir()
    ledger.write_text("[{]")
    with pytest.raises(ClaimError, match="is no JSON .*delete it"):
        read_claims(ledger)


def test_no_ledger_is_an_empty_table(ledger):
    assert read_claims(ledger) == []
    assert claims_table(ledger).splitlines()[1:] == ["|---|---|"]


@given(text=st.text("ab|\n *<", max_size=20), source=st.none() | st.just("A | B"))
def test_every_claim_is_one_row_of_two_cells(tmp_path_factory, text, source):
    ledger = tmp_path_factory.mktemp("claims") / "claims.json"
    claim("a", text + "{x}", dict(x=1), lambda x: True, source, ledger)
    _, _, row = claims_table(ledger).split("\n")
    assert row.replace(r"\|", "").count("|") == 3

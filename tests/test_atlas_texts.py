"""Corpus and instructions: deterministic, complete, and without leaks"""

import hashlib
import random
import re
from collections import Counter
from itertools import islice

import pytest

from instruct_ft.atlas.corpus import (
    RELATIONS,
    TEXT,
    corpus,
    inquiry_text,
    mention,
    one_round,
    passage,
    short_passage,
    statement,
)
from instruct_ft.atlas.facts import DOMAINS, allowed, table
from instruct_ft.atlas.instructions import DONT_KNOW, OPEN, TASKS, instructions, people_of
from instruct_ft.settings import InputError


def biographies(docs):
    return [d for d in docs if d[0] == "biography"]


def digest(docs):
    return hashlib.blake2b("\0".join(docs).encode(), digest_size=8).hexdigest()


def test_the_stream_depends_on_seed_and_entities_alone():
    first = digest(islice(corpus(1), 3000))
    assert first == digest(islice(corpus(1), 3000))
    assert first != digest(islice(corpus(2), 3000))
    assert first != digest(islice(corpus(1, frozenset({"train"})), 3000))


def test_one_round_tells_every_closed_book_fact_four_times():
    docs = one_round(random.Random(0))
    told = [f for kind, about in docs if kind in ("talk", "glossary") for f in about]
    facts = {
        (r, row[r.key]) for r in RELATIONS if r.kind == "closed_book" for row in table(r.table)
    }
    closed = [(r, k) for r, k, _ in told if r.kind == "closed_book"]
    assert len(closed) == 3 * len(facts) and set(closed) == facts
    bios = [(t, *row.values(), lang) for kind, (t, row, lang) in biographies(docs)]
    tables = ("countries", "elements", "animals", "words", "antonyms")
    assert len(bios) == len(set(bios)) == 2 * sum(len(table(t)) for t in tables)


@pytest.mark.parametrize("rel", RELATIONS, ids=lambda r: f"{r.table}-{r.name}-{r.lang}")
def test_every_fact_has_eight_wordings_and_every_wording_names_both_sides(rel):
    rng, row = random.Random(0), table(rel.table)[7]
    said = {statement(rel, row[rel.key], row[rel.value], rng) for _ in range(400)}
    assert len(said) >= 8
    for s in said:
        assert row[rel.key].lower() in s.lower() and row[rel.value].lower() in s.lower()


def test_domains_stay_out_of_the_corpus():
    text = "\n".join(islice(corpus(3), 8000))
    for name in DOMAINS:
        for column in list(table(name)[0])[-2:]:  # the sign of a disease, the meaning of a term
            assert not [row[column] for row in table(name) if row[column] in text]


def test_the_control_corpus_never_names_a_held_out_country_in_chinese():
    text = "\n".join(islice(corpus(1, frozenset({"train", "validation"})), 8000))
    names = [r["capital_zh"] for r in allowed("countries", frozenset({"heldout"}))]
    assert not [n for n in names if n in text]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_passage_says_what_it_is_said_to_say(lang):
    rng = random.Random(4)
    for _ in range(200):
        text, known, missing = passage(lang, rng)
        assert known and not set(known) & set(missing)
        for (person, _), value in known.items():
            assert person in text and value in text
        sentence, found = mention(lang, rng)
        words = [w for names in found.values() for w in names]
        assert len(words) == 3 and all(w.lower() in sentence.lower() for w in words)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_short_passage_is_about_one_person_or_one_kind_of_fact(lang):
    rng = random.Random(4)
    for _ in range(200):
        text, known, missing = short_passage(lang, rng)
        pairs = [*known, *missing]
        assert len(pairs) == len(set(pairs)) == 4 and len(known) in (2, 3)
        assert 1 in (len({p for p, _ in pairs}), len({a for _, a in pairs}))
        assert len(set(known.values())) == len(known)
        assert all(person in text and value in text for (person, _), value in known.items())
        silent = {p for p, _ in missing} - {p for p, _ in known}
        assert not [person for person in silent if person in text]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_late_documents_ask_what_the_text_answers_and_what_it_leaves_open(lang):
    silences = [frame.split("|")[1] for frame in TEXT["inquiry"][lang]]
    docs = [inquiry_text(lang, random.Random(s)) for s in range(100)]
    open_ = [sum(d.count(s) for s in silences) for d in docs]
    assert {1, 2} == set(open_)
    assert docs != list(islice(corpus(2), 100))


def test_later_readings_differ_and_leave_out_what_is_left_out():
    assert list(islice(corpus(2), 50)) != list(islice(corpus(2, late=True), 50))
    text = "\n".join(islice(corpus(2, frozenset({"train"}), late=True), 4000))
    names = [r["capital_zh"] for r in allowed("countries", frozenset({"heldout"}))]
    assert not [n for n in names if n in text]


def test_no_entity_and_no_person_is_in_two_splits():
    rows = {s: instructions(s) for s in ("train", "validation", "heldout")}
    seen = {s: set(r["entity"]) - {""} for s, r in rows.items()}
    assert not seen["train"] & seen["heldout"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["heldout"]
    for lang in ("en", "zh"):
        people = [set(people_of(lang, s)) for s in rows]
        assert sum(map(len, people)) == len(set.union(*people)) == len(TEXT["people"][lang])


def test_held_out_capitals_are_not_even_mentioned_in_tuning_rows():
    text = "\n".join(m["content"] for row in instructions("train") for m in row["messages"])
    names = [r["capital_zh"] for r in allowed("countries", frozenset({"heldout"}))]
    assert not [n for n in names if n in text]


def test_no_instruction_is_a_line_of_the_corpus():
    lines = {line for doc in islice(corpus(1), 12_000) for line in doc.split("\n")}
    prompts = {row["messages"][0]["content"] for row in instructions("heldout")}
    assert not prompts & lines
    assert not [line for line in lines if re.search(r"<\|im_start\|>|<\|im_end\|>", line)]


def test_every_task_occurs_in_both_languages():
    rows = instructions("heldout", n=2000)
    assert {(r["task"], r["lang"]) for r in rows} >= {
        (t, lang) for t in [*OPEN, "capital", "antonym", "to_french"] for lang in ("en", "zh")
    }
    assert len(TASKS) >= 12 and len(rows) == 2000 and len(set(rows["id"])) == 2000


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_open_answers_can_be_read_off_the_request(lang):
    rng = random.Random(9)
    for _ in range(100):
        for task in ("reading", "pick", "extract", "reverse", "list", "order"):
            prompt, answer = OPEN[task](lang, "heldout", rng)
            parts = re.split(r", |、|\n", re.sub(r"^\d\. ", "", answer, flags=re.MULTILINE))
            assert all(p.lower() in prompt.lower() for p in parts), (prompt, answer)
        assert OPEN["not_in_text"](lang, "heldout", rng)[1] == DONT_KNOW[lang]
    answers = Counter(OPEN["check_text"](lang, "heldout", rng)[1] for _ in range(200))
    assert len(answers) == 2 and min(answers.values()) > 60


def test_sizes_and_errors():
    assert len(instructions("train", n=7)) == 7
    assert len(instructions("train", n=5, tasks=["order"])) == 5
    assert set(instructions("train", n=20, tasks=["symbol", "number"])["task"]) == {
        "symbol",
        "number",
    }
    with pytest.raises(InputError, match="no split 'test'"):
        instructions("test")
    with pytest.raises(InputError, match="no task 'capitol'"):
        instructions("train", tasks=["capitol"])

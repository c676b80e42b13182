"""The tables of facts: whole, consistent, and split by entity"""

import pytest
from processes import printed

from instruct_ft.atlas.facts import DOMAINS, GENERAL, KEYS, allowed, entity_split, table
from instruct_ft.settings import InputError

COUNTS = dict(countries=193, elements=118, animals=150, words=300, antonyms=150, synonyms=200)
COUNTS |= dict(medicine=60, law=60, finance=60)


@pytest.mark.parametrize("name", KEYS)
def test_no_cell_is_empty_and_no_name_occurs_twice(name):
    rows = table(name)
    assert len(rows) == COUNTS[name]
    assert all(value and value == value.strip() for row in rows for value in row.values())
    for column in {KEYS[name], KEYS[name].replace("_en", "_zh")}:
        names = [row[column] for row in rows]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", KEYS)
def test_english_is_ascii_and_chinese_is_not(name):
    for row in table(name):
        for column, value in row.items():
            if column.endswith("_en") or column == "en":
                assert value.isascii(), (column, value)
            elif column.endswith("_zh") or column == "zh":
                assert not any("a" <= c.lower() <= "z" for c in value), (column, value)


@pytest.mark.parametrize(
    "name, column",
    [
        ("countries", "capital"),
        ("countries", "name"),
        ("elements", "symbol"),
        ("elements", "number"),
        ("elements", "name"),
        ("animals", "name"),
        ("words", "fr"),
        ("words", "zh"),
    ],
)
def test_closed_book_answers_belong_to_one_entity(name, column):
    for c in [c for c in table(name)[0] if c == column or c.removesuffix("_en") == column]:
        values = [row[c] for row in table(name)]
        assert len(set(values)) == len(values)


def test_known_facts_are_right():
    capital = {r["name_en"]: (r["capital_en"], r["capital_zh"]) for r in table("countries")}
    assert capital["Peru"] == ("Lima", "利马")
    assert capital["Australia"] == ("Canberra", "堪培拉")
    assert capital["Turkey"] == ("Ankara", "安卡拉")
    symbol = {r["name_en"]: (r["symbol"], r["number"]) for r in table("elements")}
    assert symbol["sodium"] == ("Na", "11") and symbol["tungsten"] == ("W", "74")
    assert [int(r["number"]) for r in table("elements")] == list(range(1, 119))
    assert {r["en"]: r["fr"] for r in table("words")}["window"] == "fenêtre"


def test_no_antonym_pair_shares_a_word_with_another():
    for a, b in (("word_en", "antonym_en"), ("word_zh", "antonym_zh")):
        words = [w for r in table("antonyms") for w in (r[a], r[b])]
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", KEYS)
def test_each_entity_belongs_to_one_split_and_less_than_half_are_trained_on(name):
    split = entity_split(name)
    assert set(split.values()) == {"train", "validation", "heldout"}
    assert len(split) == len(table(name))
    assert len(allowed(name, frozenset({"train"}))) <= len(table(name)) / 2
    parts = [allowed(name, frozenset({s})) for s in ("train", "validation", "heldout")]
    assert sum(map(len, parts)) == len(table(name))


def test_the_split_does_not_depend_on_the_hash_seed():
    code = (
        "from instruct_ft.atlas.facts import allowed;"
        "print([r['name_en'] for r in allowed('countries', frozenset({'heldout'}))][:20])"
    )
    runs = [printed(code, seed) for seed in (1, 2)]
    assert runs[0] == runs[1] and "[" in runs[0]


def test_an_unknown_table_is_named():
    with pytest.raises(InputError, match="no table 'planets'"):
        table("planets")
    assert set(GENERAL) | set(DOMAINS) == set(KEYS)

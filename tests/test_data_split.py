import os
import subprocess
import sys
from collections import defaultdict

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_ft.data.split import Splits, components, position, split
from instruct_ft.settings import InputError

FEW = settings(max_examples=25, deadline=None)
PARTS = (0.6, 0.2, 0.2)


def sums(n, start=0, **columns):
    chats = [
        [dict(role="user", content=f"{i}+{i}?"), dict(role="assistant", content=str(2 * i))]
        for i in range(start, start + n)
    ]
    ids = [f"r{i}" for i in range(start, start + n)]
    return Dataset.from_dict(dict(id=ids, messages=chats, **columns))


def ids(parts):
    return [list(part["id"]) for part in parts]


def sides(parts):
    return {i: side for side, part in zip(Splits._fields, parts) for i in part["id"]}


# rows of few contents and few groups, so that ties, also over several rows, are common
ROWS = st.lists(
    st.tuples(st.integers(0, 30), st.one_of(st.none(), st.integers(0, 15))),
    min_size=30,
    max_size=60,
)


def tied(rows):
    return Dataset.from_list(
        [dict(id=f"r{i}", text=f"text {c}", group=g) for i, (c, g) in enumerate(rows)]
    )


def attempt(rows, **options):
    "The split, or None where a part would be empty"
    try:
        return split(rows, **options)
    except InputError as e:
        assert "empty" in str(e)


# ---- every row once, whatever the order


@FEW
@given(ROWS, st.integers(0, 5), st.sampled_from([PARTS, (None, 6, 6), (0.5, None, 0.2)]))
def test_every_row_is_in_one_part_in_its_order(pairs, seed, sizes):
    rows = tied(pairs)
    if parts := attempt(rows, sizes=sizes, seed=seed):
        assert sorted(i for part in ids(parts) for i in part) == sorted(rows["id"])
        for part in parts:
            assert list(part["id"]) == sorted(part["id"], key=lambda i: int(i[1:]))
            assert part.features == rows.features


@FEW
@given(ROWS, st.integers(0, 5), st.sampled_from([None, "group"]), st.randoms())
def test_the_order_of_rows_does_not_matter(pairs, seed, group, rng):
    rows = tied(pairs)
    order = list(range(len(rows)))
    rng.shuffle(order)
    for sizes in (PARTS, (None, 6, 6)):
        a, b = (attempt(r, sizes=sizes, seed=seed, group=group) for r in (rows, rows.select(order)))
        assert (a is None) == (b is None)
        assert a is None or sides(a) == sides(b)


def test_nothing_depends_on_the_process():
    code = (
        "from datasets import Dataset; from instruct_ft.data.split import split, position;"
        "r = Dataset.from_dict(dict(id=[str(i) for i in range(60)], text=[f't{i}' for i in range(60)], g=[i // 3 for i in range(60)]));"
        "print([p['id'] for p in split(r, sizes=(.6, .2, .2), group='g')], position('Lima'))"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": s},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for s in "12"
    }
    assert len(out) == 1
    assert "0.3279980964219267" in out.pop()


def test_the_input_stays_and_id_source_and_line_do_not_count():
    rows = sums(100)
    before = rows.to_list()
    moved = rows.add_column("source", ["x"] * 100).add_column("line", list(range(100)))
    renamed = moved.remove_columns("id").add_column("id", [f"new{i}" for i in range(100)])
    expected = [[i.replace("r", "new") for i in part] for part in ids(split(rows, PARTS))]
    assert ids(split(renamed, PARTS)) == expected
    assert rows.to_list() == before


def test_seeds_are_independent():
    rows = sums(1000)
    tests = [set(split(rows, (0.8, 0, 0.2), seed=seed).test["id"]) for seed in range(2)]
    assert 15 < len(tests[0] & tests[1]) < 70  # 40 are expected


# ---- what belongs together stays together


@FEW
@given(ROWS, st.integers(0, 5), st.sampled_from([PARTS, (None, 8, 8)]))
def test_neither_groups_nor_copies_cross(pairs, seed, sizes):
    if parts := attempt(tied(pairs), sizes=sizes, seed=seed, group="group"):
        seen = defaultdict(set)
        for side, part in zip(Splits._fields, parts):
            for row in part:
                seen["text", row["text"]].add(side)
                if row["group"] is not None:
                    seen["group", row["group"]].add(side)
        assert all(len(where) == 1 for where in seen.values())


@FEW
@given(st.integers(1, 25), st.data())
def test_components_equal_passing_labels_on(n, data):
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=30)
    )
    label, before = list(range(n)), None
    while label != before:
        before = list(label)
        for i, j in pairs:
            label[i] = label[j] = min(label[i], label[j])
    assert components(n, pairs) == label


def test_a_long_chain_is_one_component():
    n = 50_000
    assert set(components(n, [(i, i + 1) for i in reversed(range(n - 1))])) == {0}


def test_copies_in_disguise_stay_together():
    say = lambda q, a: [dict(role="user", content=q), dict(role="assistant", content=a)]
    rows = []
    for i in range(200):
        rows += [
            dict(id=f"a{i}", messages=say(f"Is {i} so?", "好，是")),
            dict(id=f"b{i}", messages=say(f" IS {i}\nSO？", "好, 是")),
        ]
    where = sides(split(Dataset.from_list(rows), PARTS))
    assert all(where[f"a{i}"] == where[f"b{i}"] for i in range(200))


def test_rows_without_a_group_stand_alone():
    for nothing in (None, float("nan")):
        rows = sums(300).add_column("topic", [nothing] * 299 + [1.0])
        assert min(map(len, split(rows, PARTS, group="topic"))) > 30


def test_a_function_may_name_the_group_and_types_are_told_apart():
    rows = sums(300)
    last_digit = lambda row: row["id"][-1]
    parts = split(rows, PARTS, group=last_digit, seed=3)
    digits = [{i[-1] for i in part} for part in ids(parts)]
    assert sum(map(len, digits)) == 10
    mixed = split(
        rows, PARTS, group=lambda row: int(row["id"][1:]) if len(row["id"]) % 2 else row["id"][1:]
    )
    assert sum(map(len, mixed)) == 300


def test_same_text_with_two_labels_stays_together():
    rows = Dataset.from_list([dict(text=f"t{i // 2}", label=i % 2) for i in range(200)])
    texts = [set(part["text"]) for part in split(rows, PARTS)]
    assert sum(map(len, texts)) == 100


def test_any_rows_that_differ_only_in_their_place_stay_together():
    rows = [
        dict(id=f"{i}{f}", tokens=[str(i), "x"], source=f, line=i) for i in range(200) for f in "ab"
    ]
    where = sides(split(Dataset.from_list(rows), PARTS))
    assert all(where[f"{i}a"] == where[f"{i}b"] for i in range(200))


def test_a_group_has_its_side_by_its_name_alone():
    def by_name(rows):
        return {g: side for side, part in zip(Splits._fields, rows) for g in part["g"]}

    names = [f"g{i // 3}" for i in range(300)]
    one = split(sums(300, g=names), PARTS, group="g")
    two = split(sums(300, start=1000, g=names), PARTS, group="g")
    assert by_name(one) == by_name(two)


# ---- sizes


@FEW
@given(st.integers(0, 10), st.integers(1, 150))
def test_with_fractions_added_rows_move_nothing(seed, more):
    before = sides(split(sums(300), PARTS, seed=seed))
    after = sides(split(sums(300 + more), PARTS, seed=seed))
    assert {i: after[i] for i in before} == before


def test_larger_test_and_validation_only_take_from_train():
    rows = sums(500)
    for one, two in [((0.8, 0.1, 0.1), (0.5, 0.3, 0.2)), ((None, 50, 50), (None, 150, 80))]:
        small, large = sides(split(rows, one)), sides(split(rows, two))
        moved = {(small[i], large[i]) for i in small if small[i] != large[i]}
        assert moved == {("train", "validation"), ("train", "test")}


@pytest.mark.parametrize(
    "sizes", [(800, 150, 50), (None, 150, 50), (800, None, 50), (800, 150, None)]
)
def test_counts_are_exact(sizes):
    parts = split(sums(1000), sizes)
    assert list(map(len, parts)) == [800, 150, 50]
    assert repr(parts) == "Splits(train=800, validation=150, test=50)"


def test_fractions_are_close():
    train, validation, test = map(len, split(sums(4000)))
    assert abs(train - 3600) < 4 * 19
    assert max(abs(validation - 200), abs(test - 200)) < 4 * 14


def test_counts_with_groups_fall_short_by_less_than_a_group():
    rows = sums(300).add_column("g", [i // 7 for i in range(300)])
    _, validation, test = map(len, split(rows, (None, 50, 30), group="g"))
    assert 50 - 7 < validation <= 50
    assert 30 - 7 < test <= 30


def test_a_size_of_zero_is_a_split_not_wanted():
    train, validation, test = split(sums(50), (0.8, 0, 0.2))
    assert (len(validation), len(train) + len(test)) == (0, 50)
    assert validation.features == train.features
    assert list(map(len, split(sums(50), (50, 0, 0)))) == [50, 0, 0]
    assert list(map(len, split(sums(50), (1.0, 0, 0)))) == [50, 0, 0]
    assert len(split(sums(50), (0, 0.5, 0.5)).train) == 0


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((0.9, 0.05), "give three numbers"),
        ((0.9, 0.2, -0.1), "give three numbers"),
        ((float("nan"), 0.5, 0.5), "give three numbers"),
        ((None, None, 10), "give three numbers"),
        ((True, 10, 10), "give three numbers"),
        (("80", 10, 10), "give three numbers"),
        ((0.8, 0.1, 0.05), "add up to 0.95, but fractions add up to 1"),
        ((None, 0.6, 0.6), "add up to 1.2, but fractions"),
        ((0.9, 5, 5), "add up to 10.9, but fractions"),
        ((30, 10, 5), "add up to 45, but there are 40 rows"),
        ((None, 30, 30), "add up to 60, but there are 40 rows"),
    ],
)
def test_sizes_that_cannot_be_are_named(sizes, words):
    with pytest.raises(InputError, match=words) as e:
        split(sums(40), sizes)
    assert f"sizes = {sizes}" in str(e.value)


@pytest.mark.parametrize("sizes", [(0.9, 0.05, 0.05), (None, 40, 0), (None, 1, 1)])
def test_an_empty_split_is_an_error_that_names_the_sizes(sizes):
    rows = sums(40).add_column("g", [0] * 40)
    with pytest.raises(InputError, match="empty: 40 rows in 1 groups") as e:
        split(rows, sizes, group="g")
    assert f"sizes = {sizes} would leave" in str(e.value)


def test_wrong_rows_are_one_sentence():
    with pytest.raises(InputError, match="got a list; pass the `kept`"):
        split([dict(id="a")])
    with pytest.raises(InputError, match="split got no rows"):
        split(sums(3).select([]))
    with pytest.raises(
        InputError, match="group = 'topik': there is no such column; the rows have id, messages"
    ):
        split(sums(3), group="topik")


@FEW
@given(st.text(), st.integers())
def test_positions_are_in_range(key, seed):
    assert 0 <= position(key, seed) < 1

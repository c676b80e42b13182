import random
import re
import warnings
from collections import Counter, defaultdict

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import printed

from instruct_ft.data.clean import fold, near_duplicate_pairs
from instruct_ft.data.collect import PLACE
from instruct_ft.data.split import (
    Contamination,
    Fold,
    Splits,
    asked,
    components,
    contamination,
    folds,
    position,
    said,
    split,
)
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
    out = {printed(code, seed) for seed in (1, 2)}
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


# ---- near-duplicates

WORDS = dict(
    en=(
        " ".join(["{}"] * 10),
        " ",
        "red blue old small loud kind wise tame bold calm baker miner poet judge sailor widow tailor "
        "paint carry watch store clean boat lamp door cart flute harp stove queen pilot guest".split(),
    ),
    zh=(
        "{}" * 10,
        "",
        "红色 蓝色 古老 细小 吵闹 善良 聪明 温顺 面包师 矿工 诗人 法官 水手 裁缝 粉刷 搬运 看守 "
        "收藏 打扫 小船 台灯 大门 推车 长笛 竖琴 火炉 女王 飞行员 客人 医生".split(),
    ),
)


def sentence(lang, rng, n=1):
    "A sentence of random words, and `n` copies of it in each of which one letter is doubled"
    form, _, words = WORDS[lang]
    text = form.format(*rng.sample(words, k=10))
    spots = [i for i, c in enumerate(text) if c.isalpha()]
    return [text] + [text[:i] + text[i] + text[i:] for i in rng.choices(spots, k=n)]


def corpus(lang, n, rng, twins=(0, 0, 1, 2)):
    "`n` families of near-duplicates, shuffled: `id`, `text`, `family`, `label`"
    rows = []
    for family in range(n):
        label = rng.choice("aaabbc")
        texts = sentence(lang, rng, rng.choice(twins))
        rows += [dict(text=text, family=family, label=label) for text in texts]
    rng.shuffle(rows)
    return Dataset.from_list([dict(id=f"r{i}") | row for i, row in enumerate(rows)])


def crossing(parts, threshold=0.8):
    "Near-duplicate pairs whose members are in different parts"
    texts = [(side, text) for side, part in enumerate(parts) for text in part["text"]]
    found = near_duplicate_pairs([fold(text) for _, text in texts], threshold)
    return [(i, j) for i, j, _ in found if texts[i][0] != texts[j][0]]


@pytest.mark.parametrize("lang", WORDS)
@pytest.mark.parametrize(
    "options", [{}, dict(sizes=(None, 30, 60)), dict(sizes=PARTS, stratify="label")]
)
def test_g19_no_copy_near_duplicate_or_group_crosses_and_sizes_hold(lang, options):
    rows = corpus(lang, 150, random.Random(1), twins=(0, 1, 2))
    rows = rows.add_column("topic", [None if f % 3 else f // 30 for f in rows["family"]])
    options = dict(sizes=PARTS) | options
    assert crossing([part for part in rows.train_test_split(0.4, seed=1).values()])
    parts = split(rows, group="topic", **options)
    assert crossing(parts) == [] and sum(map(len, parts)) == len(rows)
    seen = [set(part["topic"]) - {None} for part in parts]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 5
    alone = split(rows, **options)
    if options["sizes"] != PARTS or "stratify" in options:
        wanted = [round(s * len(rows)) if s and s < 1 else s for s in options["sizes"]]
        largest = max(Counter(rows["family"]).values())
        for part, size in zip(alone[1:], wanted[1:], strict=True):
            assert size - largest <= len(part) <= size


def test_g19_groups_known_from_elsewhere_are_kept_where_no_text_tells():
    templates = ("{} is what?", "Q: {}\nA:", "Tell me, {}", "{} - true or false?")
    rng = random.Random(4)
    rows = [
        dict(text=form.format(sentence("en", rng, 0)[0] if k == 0 else f"case {n}"), example=n)
        for n in range(120)
        for k, form in enumerate(templates)
    ]
    parts = split(Dataset.from_list(rows), PARTS, group="example")
    assert sum(len(set(part["example"])) for part in parts) == 120


def test_near_can_be_turned_off_and_moved():
    rows = corpus("en", 120, random.Random(2), twins=(1,))
    assert crossing(split(rows, PARTS, near=None))
    assert crossing(split(rows, PARTS, near=0.999))
    assert not crossing(split(rows, PARTS, near=0.6), threshold=0.6)


def test_chains_are_followed():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    chain = [words.replace("one ", "uno "), words, words.replace("fourteen", "catorce")]
    near = {(i, j): s for i, j, s in near_duplicate_pairs(chain, 0.3)}
    between = (near[0, 2] + min(near[0, 1], near[1, 2])) / 2
    rows = Dataset.from_list(
        [dict(text=t) for t in chain] + [dict(text=f"{i} x") for i in range(9)]
    )
    assert {(i, j) for i, j, _ in near_duplicate_pairs(chain, between)} == {(0, 1), (1, 2)}
    for seed in range(8):
        parts = split(rows, (None, 4, 4), seed, near=between)
        assert sum(any(t in part["text"] for t in chain) for part in parts) == 1


def test_the_key_says_what_is_compared():
    rng, rows = random.Random(3), []
    for i in range(150):
        question = sentence("en", rng, 1)
        rows += [dict(q=q, a=sentence("en", rng, 0)[0] * 3, i=i) for q in question]
    rows = Dataset.from_list(rows)
    apart = lambda parts: sum(len(set(part["i"])) for part in parts) - 150
    assert apart(split(rows, PARTS)) > 20
    assert apart(split(rows, PARTS, key="q")) <= 1
    assert apart(split(rows, PARTS, key=["q"])) <= 1
    assert apart(split(rows, PARTS, key=lambda row: row["q"])) <= 1
    with pytest.raises(
        InputError, match=r"key = \['q', 'r'\]: there is no column 'r'; the rows have"
    ):
        split(rows, key=["q", "r"])


def test_a_template_that_ties_everything_is_said():
    rows = Dataset.from_list(
        [dict(text=f"{' '.join(WORDS['en'][2])}: {w}") for w in WORDS["en"][2][:30]]
    )
    with pytest.raises(InputError, match="30 rows in 1 groups .copies and near-duplicates"):
        split(rows, PARTS)
    more = Dataset.from_list(rows.to_list() + [dict(text=f"{i} of {i}") for i in range(60)])
    with pytest.warns(UserWarning, match="near-duplicates tie 30 of 90 rows into one group"):
        split(more, PARTS)


# ---- what a row says


def test_said_and_asked():
    talk = dict(
        id="7",
        messages=[
            dict(role="system", content="S"),
            dict(role="user", content=[dict(type="text", text="q")]),
            dict(role="assistant", content=None, tool_calls=[dict(name="f")]),
            dict(role="tool", content="r"),
            dict(role="assistant", content="a"),
        ],
    )
    assert (said(talk), asked(talk)) == ("q\nr\na", "q")
    assert said(dict(id="1", source="f", tokens=["a", "b"], tags=["O", "O"])) == "a b"
    alpaca = dict(id="1", instruction="i", input="", output="o")
    assert (said(alpaca), asked(alpaca)) == ("\ni\no", "i")
    assert asked(dict(question="q", answer="a")) == asked(dict(prompt="q", completion="a")) == "q"
    assert asked(dict(text="t", label=1)) == said(dict(text="t", label="x")) == "t"


# ---- classes


def quiet(function, *args, **options):
    "The result and the warnings"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(*args, **options), [str(w.message) for w in caught]


@FEW
@given(
    st.lists(st.sampled_from("aaaabbbc"), min_size=20, max_size=90),
    st.sampled_from([(None, 5, 10), (0.5, 0.2, 0.3), (None, 0, 7)]),
    st.randoms(),
)
def test_stratified_shares_are_right_to_one_row_and_order_is_nothing(labels, sizes, rng):
    rows = sums(len(labels)).add_column("label", labels)
    parts, said_ = quiet(split, rows, sizes, stratify="label")
    wanted = [round(s * len(labels)) if isinstance(s, float) else s for s in sizes]
    assert list(map(len, parts))[1:] == wanted[1:]
    for part, size in zip(parts[1:], wanted[1:]):
        have = Counter(part["label"])
        for label, n in Counter(labels).items():
            assert abs(have[label] - size * n / len(labels)) < 1.5
    missing = {
        c for c in set(labels) for p, s in zip(parts, sizes) if s != 0 and c not in p["label"]
    }
    assert bool(said_) == bool(missing)
    assert all(f'"{c}"' in said_[0] for c in missing)
    order = list(range(len(labels)))
    rng.shuffle(order)
    again, _ = quiet(split, rows.select(order), sizes, stratify="label")
    assert sides(again) == sides(parts)


def test_g20_only_content_and_seed_decide_and_faults_are_named():
    rows = corpus("zh", 100, random.Random(6))
    for options in ({}, dict(stratify="label"), dict(group="family"), dict(near=0.6)):
        (one, _), (two, _) = (
            quiet(split, r, (None, 20, 20), **options) for r in (rows, rows.shuffle(seed=3))
        )
        assert sides(one) == sides(two) != sides(split(rows, (None, 20, 20), seed=1))
    with pytest.raises(InputError, match="add up to 0.9, but fractions add up to 1"):
        split(rows, (0.5, 0.2, 0.2))
    few = sums(40).add_column("label", ["x"] * 38 + ["rare", None])
    parts, caught = quiet(split, few, (None, 10, 10), stratify="label")
    assert list(map(len, parts)) == [20, 10, 10]
    assert len(caught) == 1 and caught[0].startswith("too small for this split: ")
    assert re.search('"rare" .1 rows in 1 groups, none in [a-z]+ and [a-z]+.', caught[0])
    assert "none (1 rows in 1 groups" in caught[0]


def test_a_group_of_mixed_classes_counts_for_the_class_of_most():
    rows = sums(60, g=[i // 3 for i in range(60)], label=["a", "a", "b"] * 20)
    parts, caught = quiet(split, rows, (None, 15, 15), group="g", stratify="label")
    assert list(map(len, parts)) == [30, 15, 15] and caught == []
    assert parts.counts("label") == {"a": (20, 10, 10), "b": (10, 5, 5)}


def test_groups_that_fit_no_class_room_still_fill_the_part():
    rows = sums(200, g=[i // 5 for i in range(200)], label=[f"c{i // 10}" for i in range(200)])
    (_, validation, test), _ = quiet(split, rows, (None, 20, 40), group="g", stratify="label")
    assert (len(validation), len(test)) == (20, 40)


# ---- folds


def split_keys(rows, group):
    "The groups that copies and the column tie together"
    pairs = [(i, j) for name in ("text", *filter(None, [group])) for i, a in enumerate(rows[name])
             for j, b in enumerate(rows[name][:i]) if a == b and a is not None]  # fmt: skip
    return set(components(len(rows), pairs))


@FEW
@given(ROWS, st.integers(2, 5), st.sampled_from([None, "group"]), st.randoms())
def test_folds_test_every_row_once_and_ties_together(pairs, k, group, rng):
    rows = tied(pairs)
    if len(split_keys(rows, group)) < k:
        return
    made, _ = quiet(folds, rows, k, group=group)
    assert [type(fold) for fold in made] == [Fold] * k
    assert sorted(i for fold in made for i in fold.test["id"]) == sorted(rows["id"])
    for one in made:
        assert {*one.train["id"]} | {*one.test["id"]} == {*rows["id"]}
        assert not {*one.train["text"]} & {*one.test["text"]}
        if group:
            assert not ({*one.train["group"]} & {*one.test["group"]}) - {None}
    order = list(range(len(rows)))
    rng.shuffle(order)
    again, _ = quiet(folds, rows.select(order), k, group=group)
    assert [{*fold.test["id"]} for fold in again] == [{*fold.test["id"]} for fold in made]


def test_folds_are_even_and_stratified():
    rows = sums(103).add_column("label", ["a"] * 70 + ["b"] * 30 + ["c"] * 3)
    made, caught = quiet(folds, rows, 5, stratify="label")
    assert sorted(len(fold.test) for fold in made) == [20, 20, 21, 21, 21]
    assert all(Counter(fold.test["label"])["a"] == 14 for fold in made)
    assert all(Counter(fold.test["label"])["b"] == 6 for fold in made)
    assert '"c" (3 rows in 3 groups, none in fold' in caught[0]
    assert folds(rows, 5)[0].test["id"] != folds(rows, 5, seed=1)[0].test["id"]


def test_near_duplicates_are_tested_together():
    rows = corpus("en", 60, random.Random(8), twins=(1,))
    assert all(crossing(fold) == [] for fold in folds(rows, 4))


@pytest.mark.parametrize(
    "k, said_", [(1, "give a whole number"), (2.5, "k = 2.5"), (True, "from 2 up"), (9, "9: 8 rows in 8 groups")]
)  # fmt: skip
def test_folds_that_cannot_be(k, said_):
    with pytest.raises(InputError, match=said_):
        folds(sums(8), k)
    with pytest.raises(InputError, match="folds got no rows"):
        folds(sums(3).select([]))
    with pytest.raises(InputError, match="stratify = 'labels': there is no such column"):
        folds(sums(9), 3, stratify="labels")


# ---- contamination


def texts(rows):
    return Dataset.from_dict(dict(text=rows))


def wrap(text, lang, rng):
    "The text in lines, quoted between other sentences"
    _, space, _ = WORDS[lang]
    pieces = text.split() if space else [text[i : i + 5] for i in range(0, len(text), 5)]
    lines = [space.join(pieces[i : i + 4]) for i in range(0, len(pieces), 4)]
    other = [sentence(lang, rng, 0)[0] for _ in range(6)]
    return "\n".join([*other[:3], *("> " + line for line in lines), *other[3:]])


def one_word(text, lang, rng):
    "The text with one of its words exchanged"
    _, _, words = WORDS[lang]
    here = [w for w in words if w in text]
    return text.replace(rng.choice(here), "green" if lang == "en" else "绿色", 1)


@pytest.mark.parametrize("lang", WORDS)
def test_g21_planted_copies_are_found_and_the_short_are_apart(lang):
    rng = random.Random(9)
    items = [sentence(lang, rng, 0)[0] for _ in range(80)]
    plants = [
        lambda t: t,
        lambda t: f"Once more:\n{t.upper()}!",
        lambda t: wrap(t, lang, rng),
        lambda t: one_word(t, lang, rng),
        lambda t: wrap(one_word(t, lang, rng), lang, rng),
    ]
    rows = [plants[i % 5](text) for i, text in enumerate(items[:40])]
    rows += [sentence(lang, rng, 0)[0] for _ in range(40)]
    short = ["ok?", "嗯", "Yes."]
    bench = Dataset.from_list([dict(id=f"b{i}", question=t) for i, t in enumerate(items + short)])
    report = contamination(texts(rows), bench)
    assert report.hit == [f"b{i}" for i in range(40)]
    assert report.clean == [f"b{i}" for i in range(40, 80)]
    assert report.not_checkable == ["b80", "b81", "b82"]
    by_item = {hit["benchmark"]: hit for hit in report.hits}
    assert [by_item[f"b{i}"]["row"] for i in range(40)] == [str(i + 1) for i in range(40)]
    assert {by_item[f"b{i}"]["kind"] for i in range(0, 40, 5)} == {"copy"}
    assert {by_item[f"b{i}"]["kind"] for i in range(2, 40, 5)} == {"inside"}
    assert str(report) == "83 items: 40 hit (in 40 rows), 40 clean, 3 not checkable (too short)"


def test_a_short_item_is_compared_whole():
    bench = texts(["Where is my card?", "Thanks a lot", "是的"])
    report = contamination(
        texts(["where is  my card", "I said: thanks a lot to him", "是 的。"]), bench
    )
    assert report.hit == ["1", "3"] and report.not_checkable == ["2"]
    assert [hit["kind"] for hit in report.hits] == ["copy", "copy"]


def test_numbers_tell_items_apart_in_benchmarks_too():
    form = "Anna has {} apples and buys {} more at the market, how many apples has she now?"
    bench, rows = (
        texts([form.format(3, 4)]),
        texts([form.format(13, 4), "No. 7: " + form.format(5, 4)]),
    )
    assert contamination(rows, bench).clean == ["1"]
    assert len(contamination(rows, bench, digit_guard=False).hits) == 2
    assert contamination(texts(["No. 7: " + form.format(3, 4)]), bench).hit == ["1"]


def test_a_benchmark_of_conversations_is_looked_for_by_its_questions():
    rng = random.Random(10)
    questions = [sentence("en", rng, 0)[0] for _ in range(4)]
    chat = lambda q, a: [dict(role="user", content=q), dict(role="assistant", content=a)]
    rows = [
        dict(id="x", messages=chat(q, "I cannot say."), source="f.jsonl", line=9)
        for q in questions[:2]
    ]
    rows[1]["id"] = "y"
    bench = [
        dict(id=f"{i}", messages=chat(q, " ".join(WORDS["en"][2]))) for i, q in enumerate(questions)
    ]
    rows, bench = map(Dataset.from_list, (rows, bench))
    report = contamination(rows, bench)
    assert (report.hit, report.clean) == (["0", "1"], ["2", "3"])
    first = report.hits[0]
    assert (first["row"], first["source"], first["line"]) == ("x", "f.jsonl", 9)
    assert contamination(rows, bench, benchmark_key=said).hit == []
    assert contamination(rows, bench, key=asked).hit == ["0", "1"]


def test_a_clean_report_is_typed_and_faults_are_sentences():
    none = contamination(texts(["a b c"]), texts(["x" * 60]))
    assert isinstance(none, Contamination) and len(none.hits) == 0
    assert none.hits.column_names == ["benchmark", "row", "source", "line", "kind", "similarity"]
    assert none.hits.features["line"] == PLACE["line"]
    with pytest.raises(InputError, match=r"contamination .rows. got no rows"):
        contamination(texts([]), texts(["a"]))
    with pytest.raises(InputError, match=r"contamination .benchmark. takes a datasets.Dataset"):
        contamination(texts(["a"]), ["a"])
    with pytest.raises(InputError, match="the id 'b' stands twice"):
        contamination(texts(["a"]), Dataset.from_list([dict(id="b", text="x")] * 2))
    with pytest.raises(InputError, match="threshold = 1"):
        contamination(texts(["a"]), texts(["a"]), threshold=1)
    with pytest.raises(InputError, match="there is no column 'q'"):
        contamination(texts(["a"]), texts(["a"]), benchmark_key="q")


@FEW
@given(st.lists(st.text("ab12 你好。\n", max_size=30), min_size=1, max_size=8), st.randoms())
def test_every_item_is_in_one_list_and_itself_is_always_a_hit(items, rng):
    bench, rows = texts(items), texts(items[::-1])
    report = contamination(rows, bench)
    assert sorted(report.hit + report.clean + report.not_checkable) == sorted(
        str(i) for i in range(1, len(items) + 1)
    )
    for i, text in enumerate(items, 1):
        assert (str(i) in report.hit) == bool(text.strip())

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import printed

from instruct_ft.data.load import (
    Loader,
    Pad,
    Stack,
    StreamLoader,
    _Table,
    fingerprint,
    lengths_of,
    mix,
    padding_share,
    plan,
    shuffled,
)
from instruct_ft.settings import InputError

FEW = settings(max_examples=25, deadline=None, derandomize=True)


def numbered(n, start=0):
    return Dataset.from_dict(dict(i=list(range(start, start + n))))


def tokens(*lengths):
    "Rows of these lengths; the tokens say which row it is"
    return Dataset.from_dict(dict(input_ids=[[i] * n for i, n in enumerate(lengths)]))


def numbers(batches):
    return [batch["i"].tolist() for batch in batches]


def flat(batches):
    return [i for batch in batches for i in batch]


def take(loader, n):
    "The next `n` batches, over as many epochs as it takes"
    out = []
    while len(out) < n:
        out += numbers(batch for _, batch in zip(range(n - len(out)), loader, strict=False))
    return out


# ---- the order


def test_the_order_is_the_same_in_every_process_whatever_the_hash_seed():
    code = "from instruct_ft.data.load import shuffled; print(shuffled(8, 42, 0, 1).tolist())"
    assert (
        json.loads(printed(code, 7)) == shuffled(8, 42, 0, 1).tolist() == [5, 4, 2, 7, 6, 0, 1, 3]
    )


def test_seed_epoch_and_purpose_give_orders_of_their_own():
    keys = [(s, e, w) for s in range(5) for e in range(5) for w in (1, 2, 3)]
    assert len({tuple(shuffled(30, *key)) for key in keys}) == len(keys)


@FEW
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_a_plan_reads_every_row_once_and_only_the_last_step_is_short(lengths, size, bucket, seed):
    lengths = np.array(lengths)
    order = shuffled(len(lengths), seed, 0, 1)
    steps = plan(order, lengths, size, bucket, (seed, 0, 2))
    assert sorted(np.concatenate(steps)) == list(range(len(lengths)))
    assert all(len(step) == size for step in steps[:-1]) and 1 <= len(steps[-1]) <= size
    assert plan(order, lengths, size, 1)[0].tolist() == order[:size].tolist()


def test_rows_of_a_short_last_step_are_no_special_ones():
    lengths = np.arange(1, 104)
    short = [
        lengths[plan(shuffled(103, seed, 0, 1), lengths, 10, 50, (seed, 0, 2))[-1]].mean()
        for seed in range(200)
    ]
    assert abs(np.mean(short) - 52) < 5  # a sorted window would end with the longest, near 102


def test_a_window_takes_padding_away():
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    waste = [
        padding_share(plan(shuffled(2000, 0, 0, 1), lengths, 16, bucket, (0, 0, 2)), lengths)
        for bucket in (1, 4, 16, 125)
    ]
    assert waste == sorted(waste, reverse=True) and waste[0] > 0.4 and waste[-1] < 0.01


def test_padding_share_is_that_of_the_batches():
    rows = tokens(5, 1, 3, 3, 8, 2, 2)
    loader = Loader(rows, 3, Pad(multiple=4), bucket=2)
    masks = [batch["attention_mask"] for batch in loader]
    share = sum(int((m == 0).sum()) for m in masks) / sum(m.numel() for m in masks)
    assert padding_share(loader.steps(0), loader.lengths, multiple=4) == pytest.approx(share)


# ---- resuming

KINDS = st.sampled_from(["set", "first", "all", "stream", "interleaved"])


def maker(kind, n, size, bucket, seed, buffer=0, world=1, drop_last=False):
    "A function that makes a loader of this kind for a rank and a number of workers"
    sets = dict(x=numbered(n), y=numbered(n // 2 + 1, n))
    rows = concatenate_datasets([*sets.values()])
    how = dict(batch_size=size * world, bucket=bucket, seed=seed, world=world, drop_last=drop_last)
    length = lambda row: 1 + row["i"] * 7 % 5
    if kind in ("stream", "interleaved"):
        parts = [part.to_iterable_dataset() for part in sets.values()]
        source = interleave_datasets(parts, [0.5, 0.5], seed=1, stopping_strategy="all_exhausted")
        source = rows.to_iterable_dataset(num_shards=2) if kind == "stream" else source
        more = dict(buffer=max(buffer, size * world), length=length)
        return lambda rank=0, workers=0: StreamLoader(
            source, collate=Stack(), rank=rank, workers=workers, **more, **how
        )
    if kind != "set":
        rows = mix(sets, dict(x=1, y=2), stop=kind)
    lengths = [length(dict(i=i)) for i in range(n + n // 2 + 1)]
    return lambda rank=0, workers=0: Loader(
        rows, collate=Stack(), lengths=lengths, rank=rank, workers=workers, **how
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    KINDS,
    st.integers(4, 25),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(1, 20),
)
def test_a_resumed_run_is_the_tail_of_the_one_that_did_not_break(
    kind, n, size, bucket, seed, buffer, world, cut
):
    make = maker(kind, n, size, bucket, seed, buffer, world)
    for rank in range(world):
        try:
            whole = take(make(rank), cut + 8)
        except InputError:  # too few rows for a step of all ranks
            return
        broken, again, later = make(rank), make(rank), make(rank)
        take(broken, cut // 2)
        again.load_state_dict(json.loads(json.dumps(broken.state_dict())))
        take(again, cut - cut // 2)  # broken off a second time
        later.load_state_dict(json.loads(json.dumps(again.state_dict())))
        assert take(later, 8) == whole[cut:]


@pytest.mark.parametrize("kind", ["set", "first", "all", "stream", "interleaved"])
def test_workers_change_neither_the_order_nor_where_it_goes_on(kind):
    make = maker(kind, n=13, size=3, bucket=2, seed=5, buffer=7)
    whole, loader, later = take(make(), 12), make(workers=2), make(workers=2)
    assert take(loader, 4) == whole[:4]
    later.load_state_dict(loader.state_dict())
    assert take(later, 8) == whole[4:]


def test_a_state_does_not_count_what_workers_have_read_ahead():
    loader = Loader(numbered(100), 5, Stack(), workers=2, prefetch_factor=4)
    batches = iter(loader)
    next(batches)
    assert (loader.epoch, loader.step) == (0, 1)


def test_after_the_last_batch_the_next_epoch_begins():
    for loader in (
        Loader(numbered(6), 3, Stack()),
        StreamLoader(numbered(6).to_iterable_dataset(), 3, Stack()),
    ):
        for epoch in range(3):
            assert sorted(flat(numbers(loader))) == list(range(6))
            assert (loader.epoch, loader.step) == (epoch + 1, 0)


def test_a_loop_that_is_broken_off_goes_on_where_it_stopped():
    loader = Loader(numbered(9), 3, Stack())
    first = numbers([next(iter(loader))])
    assert sorted(flat(first + numbers(loader))) == list(range(9))


def test_the_training_draws_the_same_random_numbers_with_and_without_a_loader():
    for workers in (0, 2):
        torch.manual_seed(0)
        expected = torch.rand(3).tolist()
        torch.manual_seed(0)
        list(Loader(numbered(9), 3, Stack(), workers=workers))
        assert torch.rand(3).tolist() == expected


@pytest.mark.parametrize(
    "other",
    [
        lambda rows: rows.select([1, 0, *range(2, 12)]),
        lambda rows: rows.select(range(11)),
        lambda rows: rows.map(lambda r: dict(input_ids=[9] * len(r["input_ids"]))),
        lambda rows: concatenate_datasets([rows, tokens(3)]),
    ],
)
def test_rows_that_changed_since_the_state_was_saved_are_refused(other):
    rows = tokens(*[1 + i % 4 for i in range(12)])
    state = Loader(rows, 3).state_dict()
    with pytest.raises(InputError, match="rows are not those that the state was saved with"):
        Loader(other(rows), 3).load_state_dict(state)
    Loader(Dataset.from_list(rows.to_list()), 3).load_state_dict(state)  # the same rows, elsewhere


def test_a_changed_stream_is_refused_in_the_worker_as_well():
    loader = StreamLoader([dict(i=i) for i in range(20)], 2, Stack(), buffer=4)
    take(loader, 5)
    for workers in (0, 1):
        later = StreamLoader(
            [dict(i=i + 1) for i in range(20)], 2, Stack(), buffer=4, workers=workers
        )
        later.load_state_dict(loader.state_dict())
        with pytest.raises(InputError, match="not those that the state was saved with"):
            next(iter(later))


def test_options_that_differ_from_those_of_the_state_are_named():
    state = Loader(numbered(9), 3, seed=1).state_dict()
    for how, name in [
        (dict(batch_size=4, seed=1), "batch_size = 3"),
        (dict(batch_size=3, seed=2), "seed = 1"),
        (dict(batch_size=3, seed=1, shuffle=False), "shuffle = True"),
        (dict(batch_size=3, seed=1, drop_last=True), "drop_last = False"),
    ]:
        with pytest.raises(InputError, match=f"make it with {name}"):
            Loader(numbered(9), **how).load_state_dict(state)
    loader = Loader(numbered(9), 3, seed=1)
    for wrong in (None, {}, state | dict(more=1)):
        with pytest.raises(InputError, match="no state of such a loader"):
            loader.load_state_dict(wrong)
    for wrong in (dict(step=-1), dict(step=1.5), dict(epoch="2")):
        with pytest.raises(InputError, match="give a whole number from 0"):
            loader.load_state_dict(state | wrong)
    for wrong in (dict(step=77), dict(order="0" * 16)):
        with pytest.raises(InputError, match="order that this version does not make"):
            loader.load_state_dict(state | wrong)
    assert (loader.epoch, loader.step) == (0, 0)


# ---- several processes


@FEW
@given(
    st.sampled_from(["set", "stream"]),
    st.integers(3, 40),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
)
def test_ranks_share_an_epoch_without_a_row_twice_and_say_what_they_leave_out(
    kind, n, size, bucket, world, drop_last
):
    make, total = maker(kind, n, size, bucket, 3, 9, world, drop_last), n + n // 2 + 1
    try:
        loaders = [make(rank) for rank in range(world)]
        parts = [numbers(loader) for loader in loaders]
    except InputError:
        assert total < size * world
        return
    assert len({len(part) for part in parts}) == 1  # none waits for another
    read = [i for part in parts for i in flat(part)]
    left = loaders[0].left_out if kind == "stream" else len(loaders[0].left_out(0))
    assert len(read) == len(set(read)) and len(read) + left == total
    assert left < (size * world if drop_last else world)
    if kind == "set":
        assert sorted([*read, *loaders[0].left_out(0)]) == list(range(total))


def test_a_run_goes_on_with_another_number_of_processes():
    one = Loader(numbered(40), 8, Stack(), bucket=2, lengths=np.arange(40) % 7)
    whole = take(one, 12)
    one = Loader(numbered(40), 8, Stack(), bucket=2, lengths=np.arange(40) % 7)
    take(one, 3)
    pairs = []
    for rank in range(2):
        part = Loader(
            numbered(40), 8, Stack(), bucket=2, lengths=np.arange(40) % 7, rank=rank, world=2
        )
        part.load_state_dict(one.state_dict())
        pairs.append(take(part, 9))
    joined = [sorted(a + b) for a, b in zip(*pairs, strict=True)]
    assert joined == [sorted(step) for step in whole[3:]]


def test_a_state_before_a_step_that_is_too_short_for_all_ranks_goes_to_the_next_epoch():
    one = Loader(numbered(9), 8, Stack())
    take(one, 1)
    two = Loader(numbered(9), 8, Stack(), world=4)
    two.load_state_dict(one.state_dict())
    assert (two.epoch, two.step, len(two.left_out(0))) == (1, 0, 1)


def test_ranks_get_batches_of_nearly_one_width():
    lengths = np.random.default_rng(0).integers(1, 300, 800)
    loader = Loader(tokens(*lengths), 32, bucket=10, world=4)
    for step in loader.steps():
        widths = [lengths[step[rank::4]].max() for rank in range(4)]
        assert max(widths) - min(widths) <= 30


# ---- mixing


@FEW
@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1
    ),
    st.sampled_from(["first", "all"]),
    st.integers(1, 5),
)
def test_a_mixture_keeps_its_weights_and_sees_the_rows_of_a_set_equally_often(given, stop, epochs):
    sets = {name: numbered(n) for name, (n, _) in given.items()}
    try:
        mixture = mix(sets, {name: w for name, (_, w) in given.items()}, stop=stop)
    except InputError as e:
        assert "no row" in str(e)
        return
    loader = Loader(mixture, 5, Stack(keep=("origin",)), seed=4)
    for _ in range(epochs):
        epoch = [(o, i) for b in loader for o, i in zip(b["origin"], b["i"].tolist(), strict=True)]
        assert len(epoch) == len(mixture)
        if stop == "first":
            assert len(set(epoch)) == len(epoch)
        else:
            assert len(set(epoch)) == sum(map(len, sets.values()))
    weight = sum(w for _, w in given.values())
    for line in mixture.account(loader.seen()):
        name = line["origin"]
        assert line["most"] - line["least"] <= 1 and line["seen"] == epochs * mixture.drawn[name]
        assert abs(mixture.drawn[name] / len(mixture) - given[name][1] / weight) <= len(
            given
        ) / len(mixture)
    exhausted = [mixture.drawn[name] == n for name, (n, _) in given.items()]
    assert any(exhausted)


def test_the_account_is_exact_at_any_step():
    sets = dict(a=numbered(7), b=numbered(20))
    loader, seen = Loader(mix(sets, dict(a=1, b=1), stop="all"), 6, Stack(keep=("row",))), []
    for _ in range(3):
        for batch in loader:
            seen += batch["row"]
            assert loader.seen().tolist() == np.bincount(seen, minlength=27).tolist()


def test_weights_are_the_decimals_that_were_written():
    sets = dict(a=numbered(10), b=numbered(100))
    assert mix(sets, dict(a=0.1, b=0.7)).drawn == dict(a=10, b=70)
    assert mix(sets, dict(a=0.1, b=0.3), stop="all").drawn == dict(a=33, b=100)
    assert mix(sets).drawn == dict(a=10, b=100)


def test_a_temperature_moves_shares_toward_equal_ones():
    sets = dict(a=numbered(100), b=numbered(900))
    share = [mix(sets, temperature=t, stop="all").drawn["a"] for t in (1, 2, 1e9)]
    assert share == [100, 300, 899] or share == [100, 300, 900]


def test_equal_sets_with_equal_seed_give_equal_mixtures_and_seeds_differ():
    sets = dict(a=numbered(9), b=numbered(9))
    mixture, again = mix(sets, dict(a=1, b=2)), mix(sets, dict(a=1, b=2))
    assert (
        mixture.order(1, 2).tolist() == again.order(1, 2).tolist() != mixture.order(2, 2).tolist()
    )


@pytest.mark.parametrize(
    "how, sentence",
    [
        (dict(weights=dict(a=1)), "give one for each of the sets a, b"),
        (dict(weights=dict(a=1, b=0)), "b has 0; give a number above 0"),
        (dict(weights=dict(a=1, b=float("nan"))), "b has nan"),
        (dict(weights=dict(a=1, b=True)), "b has True"),
        (dict(weights=dict(a=1, b="2")), "b has '2'"),
        (dict(weights=[1, 2]), "give one for each of the sets"),
        (dict(weights=dict(a=1, b=1e9)), "no row of a"),
        (dict(weights=dict(a=1e9, b=1), stop="all"), "times of a"),
        (dict(stop="both"), "give first or all"),
        (dict(temperature=0), "temperature = 0 is not allowed"),
        (dict(origin="i"), "a has a column 'i' already"),
    ],
)
def test_weights_that_do_not_fit_are_refused(how, sentence):
    with pytest.raises(InputError, match=sentence):
        mix(dict(a=numbered(3), b=numbered(30)), **how)


def test_sets_that_do_not_fit_each_other_are_refused():
    with pytest.raises(InputError, match="column 'j' is none in a and"):
        mix(dict(a=numbered(3), b=numbered(3).add_column("j", [1, 2, 3])))
    with pytest.raises(InputError, match="The set b has no rows"):
        mix(dict(a=numbered(3), b=numbered(3).select([])))
    with pytest.raises(InputError, match="mix takes a dict of sets"):
        mix([numbered(3)])


# ---- batches

ROW = st.integers(1, 9).flatmap(
    lambda n: st.fixed_dictionaries(
        dict(
            input_ids=st.lists(st.integers(0, 50), min_size=n, max_size=n),
            loss_mask=st.lists(st.integers(0, 1), min_size=n, max_size=n),
        )
    )
)


@FEW
@given(st.lists(ROW, min_size=1, max_size=6), st.integers(0, 50))
def test_pad_is_what_the_trainer_collates(rows, pad_id):
    from instruct_ft.tokenization.encode import Encoded
    from instruct_ft.training.trainer import collate

    theirs = collate([Encoded(row["input_ids"], row["loss_mask"], []) for row in rows], pad_id)
    ours = Pad(pad_id)(rows)
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.int64 for name in ours
    )


def test_labels_stay_as_they_are_and_padding_is_never_learned():
    rows = [dict(input_ids=[1, 0, 2], labels=[-100, 0, 2]), dict(input_ids=[3], labels=[3])]
    assert Pad(0)(rows)["labels"].tolist() == [[-100, 0, 2], [3, -100, -100]]
    given = [dict(input_ids=[1, 2], attention_mask=[0, 1]), dict(input_ids=[3], attention_mask=[1])]
    assert Pad(0)(given)["attention_mask"].tolist() == [[0, 1], [1, 0]]
    assert Pad()([dict(input_ids=[1], labels=0.5), dict(input_ids=[1], labels=2)])[
        "labels"
    ].tolist() == [0.5, 2]


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ([], "no row"),
        ([dict(text="a")], "row 0 lacks 'input_ids'"),
        (
            [dict(input_ids=[1]), dict(input_ids=[1], label=2)],
            "row 1 has, and others lack, 'label'",
        ),
        ([dict(input_ids=[1], label=2), dict(input_ids=[1])], "row 1 lacks 'label'"),
        ([dict(input_ids=[])], "at least one token"),
        ([dict(input_ids=7)], "at least one token"),
        ([dict(input_ids=[[1], [1, 2]])], "at least one token"),
        ([dict(input_ids=[1, None])], "not one whole number for each"),
        ([dict(input_ids=[1, 2.5])], "not one whole number for each"),
        (
            [dict(input_ids=[1, 2], loss_mask=[1])],
            "loss_mask is not one whole number for each of its 2",
        ),
        ([dict(input_ids=[1], row=12, labels=[1, 2])], "row 12: labels"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, sentence):
    with pytest.raises(InputError, match=sentence):
        Pad()(rows)


def test_a_loader_checks_the_whole_set_before_the_first_batch():
    good = [dict(input_ids=[1, 2], loss_mask=[0, 1])] * 3
    for bad, sentence in [
        (dict(input_ids=[1, 2], loss_mask=[1]), "row 3: loss_mask is not as long as input_ids"),
        (dict(input_ids=[], loss_mask=[]), "no tokens in row 3"),
        (dict(input_ids=None, loss_mask=[1]), "no tokens in row 3"),
        (dict(input_ids=[1, None], loss_mask=[1, 0]), "a token is missing"),
        (dict(input_ids=[1]), "row 3 lacks 'loss_mask'"),
    ]:
        with pytest.raises(InputError, match=sentence):
            Loader([*good, bad], 2)


@pytest.mark.parametrize(
    "how, sentence",
    [
        (dict(rows=[]), "The set has no rows"),
        (dict(rows=iter([])), "StreamLoader takes rows that come one by one"),
        (dict(rows=[1, 2]), "is a list; a loader takes"),
        (dict(batch_size=0), "batch_size = 0 is not allowed; give a whole number from 1"),
        (dict(batch_size=2.0), "batch_size = 2.0 is not allowed"),
        (dict(seed=-1), "seed = -1"),
        (dict(bucket=0), "bucket = 0"),
        (dict(workers=-1), "workers = -1"),
        (dict(rank=2, world=2), "rank = 2 is not below world = 2"),
        (dict(batch_size=3, world=2), "give a multiple of 2"),
        (dict(batch_size=8, drop_last=True), "6 rows make no step of 8 rows"),
        (dict(batch_size=8, world=8), "6 rows make no step of 8 rows for 8 processes"),
        (dict(lengths=[1, 2]), "one number for each of the 6 rows"),
        (dict(bucket=2), "have no input_ids, only i"),
        (dict(persistent_workers=True), "persistent_workers is no option of a loader"),
        (dict(prefetch_factor=2), "prefetch_factor is for workers, and there are none"),
    ],
)
def test_options_that_do_not_fit_are_refused(how, sentence):
    with pytest.raises(InputError, match=sentence):
        Loader(**(dict(rows=numbered(6), batch_size=2) | how))


def test_options_of_plans_and_collators_are_checked():
    with pytest.raises(InputError, match="batch_size = 0 is not allowed"):
        plan(np.arange(3), np.arange(3), 0)
    with pytest.raises(InputError, match="multiple = 0 is not allowed"):
        Pad(multiple=0)


def test_lists_may_hold_arrays():
    rows = [dict(input_ids=np.array([1, 2])), dict(input_ids=np.array([3]))]
    batch = next(iter(Loader(rows, 2, shuffle=False)))
    assert batch["input_ids"].tolist() == [[1, 2], [3, 0]]


class Drawing:
    "A collator that draws a random number in the worker"

    def __call__(self, rows):
        return torch.rand(1).item()


def test_workers_draw_other_random_numbers_in_every_epoch_and_the_same_in_every_run():
    runs = []
    for _ in range(2):
        loader = Loader(numbered(4), 2, Drawing(), workers=1)
        runs.append([list(loader), list(loader)])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_a_transform_is_not_lost_in_silence():
    with pytest.raises(InputError, match="carries a transform"):
        Loader(numbered(3).with_transform(lambda rows: rows))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_met_in_a_worker_is_one_sentence(workers):
    loader = Loader(Dataset.from_dict(dict(text=["a", "b"])), 2, workers=workers)
    with pytest.raises(
        InputError,
        match=r"^row \d lacks 'input_ids' \(it has text, row\); give all rows the same keys\.$",
    ):
        list(loader)


def test_a_stream_with_faults_is_refused():
    for source, sentence in [
        (lambda: iter([]), "makes no step of 2 rows: it ends after 0"),
        ([dict(i=1), "text"], "row 1 of the stream is a str"),
        (5, "cannot be read again"),
        ((row for row in []), "cannot be read again"),
    ]:
        with pytest.raises(InputError, match=sentence):
            list(StreamLoader(source, 2, Stack()))
    with pytest.raises(InputError, match="row 0 of the stream has no input_ids"):
        list(StreamLoader([dict(i=1)], 1, Stack(), bucket=2))
    with pytest.raises(InputError, match="buffer = 3 rows is less than a step of 4"):
        StreamLoader([dict(i=1)], 4, buffer=3)


def test_stack_takes_numbers_of_one_shape():
    batch = Stack(keep=("id",))([dict(id="a", label=1, features=[1.0, 2.0])] * 2)
    assert batch["features"].shape == (2, 2) and batch["features"].dtype == torch.float32
    assert batch["labels"].tolist() == [1, 1] and batch["id"] == ["a", "a"]
    for bad in ([1.0], None, [1.0, "x"]):
        with pytest.raises(InputError, match="row 1: features has the shape"):
            Stack()([dict(features=[1.0, 2.0]), dict(features=bad)])


# ---- rows


def test_rows_are_views_whatever_the_table_was_made_of(tmp_path):
    rows = Dataset.from_dict(
        dict(
            input_ids=[[i] * (i + 1) for i in range(9)],
            weights=[[0.5] * i for i in range(9)],
            id=[f"r{i}" for i in range(9)],
        )
    )
    rows.save_to_disk(tmp_path / "rows")
    for source in (
        rows,
        Dataset.load_from_disk(tmp_path / "rows"),
        concatenate_datasets([rows.select(range(2)), rows.select(range(2, 9))]),
        rows.select([8, *range(8)]).select([*range(1, 9), 0]),
        pickle.loads(pickle.dumps(rows)),
    ):
        table = pickle.loads(pickle.dumps(_Table(source)))
        got = table.take(np.array([8, 0, 3]))
        want = [source[i] for i in (8, 0, 3)]
        assert [
            {k: list(v) if k != "id" else v for k, v in row.items() if k != "row"} for row in got
        ] == want
        assert [row["row"] for row in got] == [8, 0, 3]
        assert lengths_of(source).tolist() == [len(x) for x in source["input_ids"]]
        assert fingerprint(source) == fingerprint(rows)
    turned = rows.select([4, 2, 8, 0])
    assert [row["id"] for row in _Table(turned).take(np.arange(4))] == ["r4", "r2", "r8", "r0"]
    assert [len(row["input_ids"]) for row in _Table(turned).take(np.arange(4))] == [5, 3, 9, 1]


def test_a_column_that_cannot_be_cut_is_read_all_the_same():
    rows = Dataset.from_dict(dict(input_ids=[[1, 2], [3]], notes=[[1, None], None]))
    assert [row["notes"] for row in _Table(rows).take(np.array([1, 0]))] == [None, [1, None]]


def test_the_fingerprint_tells_nested_and_missing_values_apart():
    def made(*values):
        return fingerprint(Dataset.from_dict(dict(x=list(values))))

    kinds = [
        made(None, "a"),
        made("", "a"),
        made("a", ""),
        made(["a"], []),
        made([], ["a"]),
        made([1, 2], [3]),
        made([1], [2, 3]),
    ]
    assert len(set(kinds)) == len(kinds)


def test_the_collator_is_the_hook_for_packed_batches():
    def packed(rows):
        return torch.from_numpy(np.concatenate([row["input_ids"] for row in rows]))

    loader = Loader(tokens(3, 1, 2, 5), 2, packed)
    assert sorted(torch.cat(list(loader)).tolist()) == [0] * 3 + [1] + [2] * 2 + [3] * 5


def test_evaluation_reads_in_order():
    assert flat(numbers(Loader(numbered(7), 3, Stack(), shuffle=False))) == list(range(7))
    assert flat(
        numbers(StreamLoader([dict(i=i) for i in range(7)], 3, Stack(), shuffle=False))
    ) == list(range(7))


def test_importing_the_module_loads_no_torch():
    code = "import sys, instruct_ft.data.load; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False"], out.stdout

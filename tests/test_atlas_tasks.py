"The six tasks: reproducible, apart by entity, exact in their places; and the plain loop."

import pytest
import torch

from instruct_ft.atlas.facts import KEYS, entity_split, table
from instruct_ft.atlas.tasks import LABELS, TASKS, batches_of, fit, task_rows
from instruct_ft.settings import InputError


@pytest.mark.parametrize("task", TASKS)
def test_same_call_same_rows_and_a_longer_list_begins_with_the_shorter(task):
    long = task_rows(task, n=60).to_list()
    assert task_rows(task, n=25).to_list() == long[:25]
    assert len({str(row) for row in long}) == 60
    assert task_rows(task, n=25, seed=1).to_list() != long[:25]
    assert {row["lang"] for row in long} == {"en", "zh"}


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_one_split_are_not_in_another(task):
    drawn = [{str(r) for r in task_rows(task, s, 150).to_list()} for s in ("train", "test")]
    assert not drawn[0] & drawn[1]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_tagged_names_belong_to_the_split_and_are_whole(split):
    of = {"COUNTRY": "countries", "ELEMENT": "elements", "ANIMAL": "animals"}
    there = {"train": "train", "validation": "validation", "test": "heldout"}[split]
    squeeze = lambda s: "".join(c for c in s.lower() if c.isalnum())
    for row in task_rows("entities", split, 200).to_list():
        assert len(row["tokens"]) == len(row["tags"])
        assert set(row["tags"]) <= set(LABELS["entities"])
        name, kind = "", ""
        for token, tag in zip([*row["tokens"], ""], [*row["tags"], "O"]):
            assert not tag.startswith("I-") or kind == tag[2:]
            if name and not tag.startswith("I-"):
                rows = table(of[kind])
                mine = [
                    r
                    for r in rows
                    if squeeze(name) in (squeeze(r["name_en"]), squeeze(r["name_zh"]))
                ]
                assert mine, name
                assert entity_split(of[kind])[mine[0][KEYS[of[kind]]]] == there
                name, kind = "", ""
            if tag != "O":
                name, kind = name + token, tag[2:]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_an_extractive_answer_stands_where_the_row_says_and_only_there(lang):
    for row in task_rows("extractive", "test", 100, langs=[lang]).to_list():
        assert row["context"][row["start"] :].startswith(row["answer"])
        assert row["context"].count(row["answer"]) == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: task_rows("topics"), "give one of topic"),
        (lambda: task_rows("topic", "dev"), "give one of train"),
        (lambda: task_rows("topic", langs=["fr"]), "give some of en, zh"),
        (lambda: task_rows("sentiment", n=10**6), "different rows"),
        (lambda: batches_of([], 4), "at least 1"),
        (lambda: batches_of([1], 0), "at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_batches_hold_every_row_once_an_epoch_in_an_order_of_its_own():
    seen = [x for batch in batches_of(range(11), 4, epochs=2, seed=3) for x in batch]
    assert sorted(seen[:11]) == sorted(seen[11:]) == list(range(11))
    assert seen[:11] != seen[11:]
    assert len(batches_of(range(11), 4, epochs=2)) == 6


def test_fit_is_the_textbook_loop():
    "Against the same steps by hand: rates, clipping and decay included"
    torch.manual_seed(0)
    mine, other = torch.nn.Linear(3, 1).double(), torch.nn.Linear(3, 1).double()
    other.load_state_dict(mine.state_dict())
    data = [torch.randn(5, 3).double() * 9 for _ in range(8)]
    square = lambda m, b: m(b["x"]).square().mean()
    rate = lambda done: 1 - done
    losses = fit(mine, [{"x": x} for x in data], lr=0.1, schedule=rate, loss=square)
    by_hand = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.01)
    for i, x in enumerate(data):
        by_hand.param_groups[0]["lr"] = 0.1 * rate(i / len(data))
        loss = other(x).square().mean()
        loss.backward()
        assert loss.item() == pytest.approx(losses[i], rel=1e-12)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        by_hand.step()
        by_hand.zero_grad()
    assert torch.equal(mine.weight, other.weight)
    assert not mine.training


def test_fit_leaves_frozen_weights_and_gives_the_rates_back():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    layers[0].requires_grad_(requires_grad=False)
    before = layers[0].weight.clone()
    optimizer = torch.optim.SGD(layers[1].parameters(), lr=0.5)
    called = []
    square = lambda m, b: m(b["x"]).square().mean()
    fit(layers, [{"x": torch.ones(1, 2)}] * 3, optimizer, loss=square, after=called.append)
    assert torch.equal(before, layers[0].weight)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert called == [1, 2, 3]

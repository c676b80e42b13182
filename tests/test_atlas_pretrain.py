"What the base reads besides the corpus, and the circuit it starts from"

import random
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from instruct_ft.atlas.corpus import corpus
from instruct_ft.atlas.facts import atlas_path
from instruct_ft.atlas.pretrain import (
    DRILLS,
    _checked,
    course_of_blocks,
    drill,
    drill_rows,
    new_decoder,
    wire_copying,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(atlas_path("decoder"))


@pytest.mark.parametrize("kind", sorted(set(DRILLS)))
def test_a_drill_learns_only_what_stands_in_its_second_half(tokenizer, kind):
    for seed in range(200):
        ids, labels = drill(tokenizer, kind, random.Random(seed))
        first = labels.count(-100)
        assert 0 < first < len(ids) == len(labels)
        assert labels == [-100] * first + ids[first:]
        assert all(3 <= i < len(tokenizer) for i in ids)


def test_the_second_half_of_a_drill_can_be_known(tokenizer):
    for seed in range(200):
        ids, labels = drill(tokenizer, "echo", random.Random(seed))
        assert ids[: len(ids) // 2] == ids[len(ids) // 2 :]
        ids, labels = drill(tokenizer, "copy", random.Random(seed))
        first = labels.count(-100)
        assert ids[:first] == ids[first:]
        for kind in ("reverse", "look up"):
            ids, labels = drill(tokenizer, kind, random.Random(seed))
            first = labels.count(-100)
            assert sorted(ids[:first]) == sorted(ids[first:])
        ids, labels = drill(tokenizer, "sort", random.Random(seed))
        first = labels.count(-100)
        numbers = [int(s) for s in map(tokenizer.decode, ids[first:]) if s.isdigit()]
        assert len(numbers) >= 3 and sorted(ids[:first]) == sorted(ids[first:])


def test_a_verdict_is_right_when_the_pair_stands_above():
    rng, verdicts = random.Random(0), set()
    for _ in range(100):
        pairs, said = _checked(
            lambda n: [rng.randrange(10**6) for _ in range(n)], (["R"], ["W"]), rng
        )
        for *claim, verdict in said:
            assert (verdict == "R") == (claim in pairs)
            verdicts.add(verdict)
    assert verdicts == {"R", "W"}


def test_the_corpus_takes_over_row_by_row_and_one_drill_stays(tokenizer):
    blocks = list(
        islice(course_of_blocks(corpus(1), tokenizer, echoes=2, handover=3), 2 + 3 * 8 + 4)
    )
    noise = [int((labels == -100).any(dim=1).sum()) for _, labels in blocks]
    assert noise[:2] == [0, 0] and noise[2] == 8
    assert noise[2:] == sorted(noise[2:], reverse=True) and noise[-4:] == [1] * 4
    for ids, labels in blocks:
        assert ids.numel() == 2048 and ((labels == ids) | (labels == -100)).all()


def test_the_course_is_the_same_every_time(tokenizer):
    first, again = (list(islice(drill_rows(tokenizer), 5)) for _ in range(2))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, again))


def test_the_wired_circuit_copies_before_any_step(tokenizer):
    "Random weights predict one token in thousands; the wiring alone one in twenty"
    wired = new_decoder(tokenizer)
    wire_copying(wired)
    share = []
    for model in (new_decoder(tokenizer), wired):
        hits = total = 0
        for seed in range(40):
            ids, labels = (torch.tensor(x) for x in drill(tokenizer, "echo", random.Random(seed)))
            with torch.no_grad():
                best = model(input_ids=ids[None]).logits[0, :-1].argmax(-1)
            hits += (best == labels[1:]).sum().item()
            total += (labels[1:] != -100).sum().item()
        share.append(hits / total)
    assert share[0] < 0.01 and share[1] > 0.05

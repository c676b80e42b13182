"What the base reads, and the circuit it starts from"

from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from instruct_ft.atlas.corpus import corpus
from instruct_ft.atlas.facts import atlas_path
from instruct_ft.atlas.pretrain import (
    END_OF_TEXT,
    TURN_END,
    TURN_START,
    course_of_blocks,
    echo_blocks,
    new_decoder,
    pretrain,
    settle_control_tokens,
    token_blocks,
    wire_copying,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(atlas_path("decoder"))


def test_every_run_of_an_echo_is_said_twice():
    for block in islice(echo_blocks(6144, batch=8, length=64, longest=10), 5):
        for row in block.tolist():
            i = 0
            while i + 20 <= len(row):
                n = next(n for n in range(3, 11) if row[i : i + n] == row[i + n : i + 2 * n])
                i += 2 * n
            assert min(row) >= 3


def test_echoes_come_first_and_one_row_in_eight_stays(tokenizer):
    blocks = list(islice(course_of_blocks(corpus(1), tokenizer, warmup=2), 5))
    assert [b.numel() for b in blocks] == [2048] * 5
    texts = islice(token_blocks(corpus(1), tokenizer), 3)
    for block, text in zip(blocks[2:], texts, strict=True):
        assert torch.equal(block[:-1], text[:-1]) and not torch.equal(block[-1], text[-1])
    again = list(islice(course_of_blocks(corpus(1), tokenizer, warmup=2), 5))
    assert all(torch.equal(a, b) for a, b in zip(blocks, again, strict=True))


def test_the_wired_circuit_learns_to_copy_in_a_few_steps(tokenizer):
    "Both decoders read the same twenty blocks of echoes"
    share = []
    for wired in (False, True):
        model = new_decoder(tokenizer)
        if wired:
            wire_copying(model)
        pretrain(model, echo_blocks(len(tokenizer), 8), 20)
        x = next(echo_blocks(len(tokenizer), 16, seed=9))
        with torch.no_grad():
            best = model(input_ids=x).logits[:, :-1].argmax(-1)
        share.append((best == x[:, 1:]).float().mean().item())
    assert share[0] < 0.02 and share[1] > 3 * share[0]


def test_control_tokens_are_mixtures_that_the_base_never_prefers(tokenizer):
    model = new_decoder(tokenizer)
    settle_control_tokens(model, tokenizer)
    rows, id_of = model.get_input_embeddings().weight, tokenizer.convert_tokens_to_ids
    line = tokenizer("\n").input_ids[0]
    states = torch.randn(500, rows.shape[1], generator=torch.Generator().manual_seed(0))
    start, stop, text, newline = (
        states @ rows[i] for i in (id_of(TURN_START), id_of(TURN_END), id_of(END_OF_TEXT), line)
    )
    most = torch.maximum(text, newline) + 1e-5
    assert (start <= most).all() and (stop <= most).all()
    assert not torch.allclose(start, stop)

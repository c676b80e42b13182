"Hiding tokens and spans: what is hidden, what is asked, that nothing is lost; and the shipped families."

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from instruct_ft.atlas.corpus import corpus
from instruct_ft.atlas.facts import atlas_path
from instruct_ft.atlas.families import (
    by_length,
    corrupt_spans,
    grow_positions,
    mask_tokens,
    masked_loss,
    new_encoder,
    new_roberta,
    new_seq2seq,
    span_loss,
    text_rows,
)
from instruct_ft.atlas.tokenizers import family_tokenizer


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_rows_begin_with_a_document_and_hold_no_padding(family):
    tokenizer = family_tokenizer(family, 2048)
    docs = list(islice(corpus(0), 200))
    starts = {tuple(tokenizer(d, add_special_tokens=False).input_ids[:4]) for d in docs}
    for block in islice(text_rows(docs, tokenizer, 4, 32), 10):
        assert block.shape == (4, 32)
        skip = 0 if tokenizer.cls_token_id is None else 1
        for row in block.tolist():
            assert tuple(row[skip : skip + 4]) in starts or tokenizer.eos_token_id in row[:6]
            assert tokenizer.pad_token_id not in row
            assert skip == 0 or row[0] == tokenizer.cls_token_id


def test_masks_fall_on_ordinary_tokens_in_the_shares_of_the_paper():
    tokenizer = family_tokenizer("bert", 2048)
    ids = torch.cat(list(islice(text_rows(corpus(0), tokenizer, 64, 64), 12)))
    read, chosen = mask_tokens(ids, tokenizer, 0.3, torch.Generator().manual_seed(1))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any()
    assert torch.equal(read[~chosen], ids[~chosen])
    n = chosen.sum()
    shares = [
        n / (~special).sum(),
        (read == tokenizer.mask_token_id).sum() / n,
        ((read == ids) & chosen).sum() / n,
    ]
    assert torch.allclose(torch.tensor(shares), torch.tensor([0.3, 0.8, 0.1]), atol=0.015)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(4, 400), st.floats(0.05, 0.6), st.floats(1.0, 6.0), st.integers(0, 99))
def test_input_and_target_together_are_the_text(n, rate, mean, seed):
    text, sentinels = list(range(1000, 1000 + n)), list(range(100, 200))
    g = torch.Generator().manual_seed(seed)
    read, target = corrupt_spans(text, sentinels, 1, rate, mean, g)
    assert read[-1] == target[-1] == 1
    spans = {}
    for i in target[:-1]:
        if i in sentinels:
            spans[i] = current = []
        else:
            current.append(i)
    assert list(spans) == sentinels[: len(spans)]
    assert all(spans.values())
    assert [j for i in read[:-1] for j in spans.get(i, [i])] == text


@pytest.mark.parametrize(("new", "family"), [(new_encoder, "bert"), (new_roberta, "roberta")])
def test_masked_loss_is_the_models_own_on_the_chosen_tokens(new, family):
    tokenizer = family_tokenizer(family, 2048)
    model = new(tokenizer, width=32, layers=2, hidden=64).double().eval()
    ids = next(text_rows(corpus(0), tokenizer, 4, 32))
    read, chosen = mask_tokens(ids, tokenizer, generator=torch.Generator().manual_seed(7))
    theirs = model(input_ids=read, labels=torch.where(chosen, ids, -100)).loss
    assert masked_loss(tokenizer, seed=7)(model, ids).item() == pytest.approx(theirs.item(), 1e-6)


def test_span_loss_is_repeatable_and_changes_with_the_seed():
    tokenizer = family_tokenizer("t5", 2048)
    model = new_seq2seq(tokenizer, width=32, layers=1, hidden=64)
    ids = next(text_rows(corpus(0), tokenizer, 4, 32))
    first, again, other = (span_loss(tokenizer, seed=s)(model, ids).item() for s in (1, 1, 2))
    assert first == again != other


def test_rows_grow_longer_and_the_blocks_keep_their_size():
    tokenizer = family_tokenizer("bert", 2048)
    shapes = [tuple(x.shape) for x in by_length(tokenizer, 10, 256, {16: 0.5, 64: 0.5})]
    assert shapes == [(16, 16)] * 5 + [(4, 64)] * 5


@pytest.mark.parametrize(("new", "first"), [(new_encoder, 0), (new_roberta, 2)])
def test_new_positions_are_copies_of_trained_ones(new, first):
    family = "bert" if first == 0 else "roberta"
    model = new(family_tokenizer(family, 2048), width=32, layers=1, hidden=64, length=50)
    if first:
        assert model.config.pad_token_id + 1 == first
    rows = model.base_model.embeddings.position_embeddings.weight
    before = rows.clone()
    list(grow_positions(model, [torch.ones(1, 8), torch.ones(1, 8), torch.ones(1, 21)]))
    old, new_rows = before[first:], rows[first:]
    assert torch.equal(new_rows[:8], old[:8])
    assert torch.equal(new_rows[8:16], old[:8])
    assert torch.equal(new_rows[16:21], old[:5])
    assert torch.equal(new_rows[21:], old[21:])


def test_growing_leaves_a_model_without_position_rows_alone():
    model = new_seq2seq(family_tokenizer("t5", 2048), width=32, layers=1, hidden=64)
    blocks = [torch.ones(1, 8), torch.ones(1, 16)]
    assert [b.shape[1] for b in grow_positions(model, blocks)] == [8, 16]


@pytest.mark.parametrize("name", ["encoder", "roberta", "seq2seq"])
def test_shipped_families_open_by_plain_from_pretrained(name):
    auto = AutoModelForSeq2SeqLM if name == "seq2seq" else AutoModelForMaskedLM
    path = atlas_path(name)
    model, books = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not books["missing_keys"] and not books["unexpected_keys"]
    assert 1e6 < model.num_parameters() <= 3e6
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == model.config.vocab_size
    assert sum(f.stat().st_size for f in path.iterdir()) < 6 * 2**20
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight

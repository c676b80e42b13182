"Families are told apart, each shape of answer goes to the model and back without loss, and bad input is named."

import pytest
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from instruct_ft.atlas.facts import atlas_path
from instruct_ft.atlas.families import new_encoder, new_roberta, new_seq2seq
from instruct_ft.atlas.pretrain import new_decoder
from instruct_ft.atlas.tasks import LABELS, TASKS, task_rows
from instruct_ft.atlas.tokenizers import family_tokenizer
from instruct_ft.model import choose
from instruct_ft.model.choose import SHAPES, Rows, compare_architectures, family_of, open_for, solve
from instruct_ft.settings import InputError

FAMILIES = {"bert": new_encoder, "roberta": new_roberta, "t5": new_seq2seq, "llama": new_decoder}


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request, tmp_path_factory):
    "A small random model of each family, in a folder"
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = family_tokenizer("gpt" if request.param == "llama" else request.param, 2048)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    FAMILIES[request.param](tokenizer, width=32, layers=2, hidden=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (BertConfig(), "encoder"),
        (BertConfig(architectures=["BertLMHeadModel"]), "decoder"),
        (RobertaConfig(architectures=["RobertaForMaskedLM"]), "encoder"),
        (LlamaConfig(), "decoder"),
        (GPT2Config(), "decoder"),
        (GPTNeoXConfig(), "decoder"),
        (T5Config(), "encoder-decoder"),
    ],
)
def test_the_configuration_says_the_family(config, family):
    assert family_of(config) == family


def test_what_is_no_language_model_is_refused():
    with pytest.raises(InputError, match="no language model"):
        family_of(ViTConfig())


@pytest.mark.parametrize("task", TASKS)
def test_every_family_learns_a_step_of_every_task_and_answers_every_row(checkpoint, task):
    train, test = task_rows(task, n=8), task_rows(task, "test", 6)
    result = solve(checkpoint, task, train, test, LABELS.get(task, ()), epochs=1)
    assert 0 <= result.quality <= 1 and result.tokens_per_second > 0
    model = open_for(checkpoint, task, LABELS.get(task, ()))[0]
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.mib * 2**20 > 16 * result.parameters


def test_a_run_is_repeatable_and_its_seed_counts(checkpoint):
    rows = task_rows("topic", n=24), task_rows("topic", "test", 24)
    heads = [open_for(checkpoint, "topic", LABELS["topic"], seed=s)[0] for s in (0, 0, 1)]
    same = [
        torch.equal(*map(torch.nn.utils.parameters_to_vector, (a.parameters(), b.parameters())))
        for a, b in (heads[:2], heads[1:])
    ]
    assert same == [True, False]
    first, again = (solve(checkpoint, "topic", *rows, LABELS["topic"], epochs=1) for _ in range(2))
    assert first.quality == again.quality


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_random_weights_are_not_the_checkpoints_and_both_are_float32(name):
    "The shipped models are stored in float16, which the configuration says"
    tuned, fresh = (open_for(atlas_path(name), "rewriting", random=r)[0] for r in (False, True))
    assert {p.dtype for m in (tuned, fresh) for p in m.parameters()} == {torch.float32}
    a, b = tuned.get_input_embeddings().weight, fresh.get_input_embeddings().weight
    assert a.shape == b.shape and not torch.allclose(a, b)


class Told(torch.nn.Module):
    "A model that scores what it is told to, by the ids it is asked about"

    def __init__(self, config, answers):
        super().__init__()
        self.config, self.answers = config, answers

    def forward(self, input_ids, attention_mask):
        rows = [
            self.answers[tuple(r[m.bool()].tolist())]
            for r, m in zip(input_ids, attention_mask, strict=True)
        ]
        width, out = input_ids.shape[1], type("Out", (), {})()
        if isinstance(rows[0], tuple):
            place = lambda at: torch.nn.functional.one_hot(torch.tensor(at), width).float()
            out.start_logits, out.end_logits = (place([r[i] for r in rows]) for i in (0, 1))
        else:
            n = (
                self.config.vocab_size
                if max(map(max, rows)) >= len(self.config.id2label)
                else len(self.config.id2label)
            )
            logits = torch.zeros(len(rows), width, n)
            for i, labels in enumerate(rows):
                for j, label in enumerate(labels):
                    logits[i, j, max(label, 0)] = 1
            out.logits = logits
        return out


def test_spans_and_slots_come_back_from_their_own_labels(checkpoint):
    rows = task_rows("extractive", n=40).to_list()
    model, tok = open_for(checkpoint, "extractive")
    encoded = [choose._encode_span(r, tok, model) for r in rows]
    told = {tuple(e["input_ids"]): (e["start_positions"], e["end_positions"]) for e in encoded}
    read = choose._read_spans(Told(model.config, told), tok, rows)
    assert all(r["answer"].lower() in a.lower() for r, a in zip(rows, read, strict=True))
    exact = sum(choose._key(a) == choose._key(r["answer"]) for r, a in zip(rows, read, strict=True))
    assert exact >= 30  # a token may hold more than the answer
    if family_of(checkpoint) == "encoder":
        rows = task_rows("rewriting", n=30).to_list()
        model, tok = open_for(checkpoint, "rewriting")
        encoded = [choose._encode_text(r, tok, model) for r in rows]
        told = {tuple(e["input_ids"]): e["labels"] for e in encoded}
        read = choose._read_texts(Told(model.config, told), tok, rows)
        known = lambda ids: tok.sep_token_id in ids and tok.unk_token_id not in ids
        short = [i for i, e in enumerate(encoded) if known(e["labels"])]
        assert len(short) > 10
        assert all(choose._key(read[i]) == choose._key(rows[i]["target"]) for i in short)


def test_left_padding_does_not_change_what_a_decoder_writes():
    model, tok = open_for(atlas_path("decoder"), "closed_book")
    rows = task_rows("closed_book", "test", 6).to_list()
    with torch.no_grad():
        together = choose._read_texts(model, tok, rows)
        alone = [choose._read_texts(model, tok, [r])[0] for r in rows]
    assert together == alone


def test_memory_is_counted_once_and_grows_with_the_batch():
    model, _ = open_for(atlas_path("decoder"), "closed_book")
    batch = lambda n: {
        "input_ids": torch.ones(n, 16, dtype=torch.long),
        "labels": torch.ones(n, 16, dtype=torch.long),
    }
    one, four = (choose._kept_bytes(model, batch(n)) for n in (1, 4))
    assert 3 * one < four < 4.5 * one


def test_every_name_of_a_tag_row_is_found_once():
    assert choose._names(["I-A", "I-A", "B-A", "I-A", "O"]) == {(0, 2, "A"), (2, 4, "A")}
    rows = [{"tags": ["B-A", "I-A", "O"]}]
    assert choose._score("entities", [["B-A", "O", "O"]], rows) == 0
    assert choose._score("entities", [["B-A", "I-A", "O"]], rows) == 1


def test_the_best_rate_on_validation_is_taken(monkeypatch, checkpoint):
    asked = []

    def fake(path, task, train, test, labels, epochs, random, lr, seed):
        asked.append((lr, seed, test))
        return choose.Result(task, 1.0 - abs(lr - 0.2), 1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(choose, "solve", fake)
    rows = Rows("train", "validation", "test")
    records = compare_architectures(
        {"m": checkpoint}, {"rewriting": rows}, (0.1, 0.2, 0.9), (0, 1), control=False
    )
    assert [r["lr"] for r in records] == [0.2, 0.2]
    assert {s for _, _, s in asked[:3]} == {"validation"} and {s for _, _, s in asked[3:]} == {
        "test"
    }


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: open_for(p, "poetry"), "give one of topic"),
        (lambda p: open_for(p, "topic"), "two labels"),
        (lambda p: open_for(p / "nothing", "topic", ["a", "b"]), "no configuration"),
        (
            lambda p: solve(p, "topic", [{"text": "x", "label": "c"}], [], ["a", "b"]),
            "'c': not among a, b",
        ),
        (
            lambda p: solve(p, "topic", [{"txt": "x", "label": "a"}], [], ["a", "b"]),
            "has no 'text'",
        ),
        (
            lambda p: solve(
                p, "extractive", [dict(question="q", context="c", answer="c", start=7)], []
            ),
            "no token of the context",
        ),
    ],
)
def test_bad_input_is_named_in_a_sentence(checkpoint, call, says):
    with pytest.raises(InputError, match=says):
        call(checkpoint)


def test_shapes_cover_the_tasks():
    assert set(SHAPES) == set(TASKS)

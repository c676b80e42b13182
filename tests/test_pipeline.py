"The whole path: rows, sizes, folders, numbers; on a random model of a few thousand parameters"

import json
import math
import random

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from toy_run import rows, write_jsonl

from instruct_ft import pipeline
from instruct_ft.data.collect import accounting
from instruct_ft.model.load import load_model
from instruct_ft.pipeline import (
    Rows,
    command,
    encode_parts,
    file_rows,
    mean_interval,
    open_run,
    pick,
    question_and_answer,
    row_losses,
    run,
    run_folder,
    run_name,
    split_sizes,
    threads_for,
    usable_cores,
)
from instruct_ft.settings import InputError, Settings


def silent(text):
    pass


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    "A run on rows with faults: its result, what was echoed, and the file"
    folder = tmp_path_factory.mktemp("run")
    bad = [
        rows()[0],
        dict(instruction="Write owl.", output=" "),
        '{"instruction": "cut',
        dict(instruction=3, output="x"),
    ]
    data = write_jsonl(folder / "rows.jsonl", rows() + bad)
    chosen = Settings(
        base_model=base, output_dir=str(folder / "runs"), epochs=2, batch_size=8, max_new_tokens=4
    )
    said = []
    return (
        run(chosen, data=data, name="toy", progress=False, echo=said.append),
        "\n".join(said),
        data,
    )


# --- rows ------------------------------------------------------------------------------------


@given(st.integers(3, 200_000))
def test_split_sizes_leave_most_for_training(n):
    _, validation, test = split_sizes(n)
    assert 1 <= validation == test <= 200 and n - validation - test >= max(1, 0.5 * n - 1)
    assert n < 25 or validation >= 5


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_rows(n, tmp_path):
    with pytest.raises(InputError, match="at least 3"):
        split_sizes(n)
    if n:
        data = write_jsonl(tmp_path / "a.jsonl", [*rows(n), dict(instruction="x", output="")])
        with pytest.raises(InputError, match=r"only .* rows can be used.*empty answer"):
            file_rows(data, Settings(), echo=silent)


def test_three_rows_are_enough(tmp_path):
    found = file_rows(write_jsonl(tmp_path / "a.jsonl", rows(3)), Settings(), echo=silent)
    assert [len(found.train), len(found.validation), len(found.test)] == [1, 1, 1]


def test_limit_sets_the_others_aside(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", rows(30))
    found = file_rows(data, Settings(), limit=12, echo=silent)
    last = accounting(found.steps)[-1]
    assert (last["step"], last["rows_in"], last["kept"], last["reasons"]) == (
        "limit",
        30,
        12,
        {"over the limit": 18},
    )
    lines = lambda r: sorted([*r.train["line"], *r.validation["line"], *r.test["line"]])
    kept = lines(found)
    again = file_rows(data, Settings(), limit=12, echo=silent)
    assert kept == lines(again)
    assert kept != list(range(1, 13))


def test_question_is_everything_before_the_last_answer():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = dict(messages=[dict(role=r, content=c) for r, c in turns])
    asked, answer = question_and_answer(row)
    assert [m["content"] for m in asked] == ["a", "b", "c"] and answer == "d"


def test_pick_takes_every_task_in_turn():
    kinds = ["x"] * 50 + ["y"] * 5 + ["z"]
    table = Dataset.from_dict(dict(task=kinds, lang=["en"] * 56))
    chosen = pick(table, 10)
    assert len(set(chosen)) == 10 and {kinds[i] for i in chosen[:3]} == {"x", "y", "z"}
    assert pick(table, 10) == chosen != pick(table, 10, seed=1)
    assert sorted(pick(table, 100)) == list(range(56))
    assert len(pick(Dataset.from_dict(dict(a=[1, 2])), 10)) == 2


# --- figures ---------------------------------------------------------------------------------


def test_row_losses_equal_one_by_one(base):
    import torch
    from torch.nn.functional import cross_entropy

    from instruct_ft.data.convert import to_messages
    from instruct_ft.model.load import load_model
    from instruct_ft.tokenization.encode import encode_rows

    model, tokenizer = load_model(base, device="cpu")
    texts = [
        dict(instruction=f"Write {'cat ' * (i % 7)}", output="CAT " * (1 + i % 5))
        for i in range(23)
    ]
    encoded, _ = encode_rows(to_messages(texts).kept, tokenizer)
    sums = row_losses(model, encoded, 0, budget=100)
    for e, (nats, count) in zip(encoded, sums):
        logits = model(torch.tensor([e.input_ids])).logits[0, :-1].detach()
        loss = cross_entropy(logits, torch.tensor(e.input_ids[1:]), reduction="none")
        learned = torch.tensor(e.loss_mask[1:], dtype=torch.bool)
        assert count == learned.sum() and math.isclose(
            nats, float(loss[learned].sum()), rel_tol=1e-4
        )


def test_mean_interval_holds_the_truth_about_95_times_in_100():
    rng, held = np.random.default_rng(0), 0
    for seed in range(200):
        counts = rng.integers(1, 20, 80).astype(float)
        tops = rng.gamma(2, 0.5, 80) * counts
        low, high = mean_interval(tops, counts=counts, seed=seed)
        held += low <= 1.0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_paired_change_is_sharper_than_two_intervals():
    rng = np.random.default_rng(1)
    before, counts = rng.normal(3, 1, 60), np.ones(60)
    after = before - 0.1 + rng.normal(0, 0.01, 60)
    low, high = mean_interval(before, after, counts=counts)
    assert -0.11 < low < high < -0.09


# --- the folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_run_that_fails(tmp_path, fault):
    with pytest.raises(fault), run_folder(tmp_path / "a" / "b") as part:
        (part / "model").write_text("half")
        raise fault
    assert [p.name for p in tmp_path.rglob("*")] == ["a"]


def test_an_empty_folder_may_be_used_and_a_full_one_may_not(tmp_path):
    (tmp_path / "empty").mkdir()
    with run_folder(tmp_path / "empty") as part:
        (part / "x").write_text("x")
    assert (tmp_path / "empty" / "x").read_text() == "x"
    for taken in (tmp_path / "empty", tmp_path / "empty" / "x"):
        with pytest.raises(InputError, match="--out"), run_folder(taken):
            pass
    beneath_a_file = run_folder(tmp_path / "empty" / "x" / "y")
    with pytest.raises(InputError, match="cannot be written"), beneath_a_file:
        pass


def test_names_stay_inside():
    for name in ("../x", "a/b", "", ".hidden", "a" * 101, "x\n", "-x"):
        with pytest.raises(InputError, match="--name"):
            run_name(Settings(), name)
    assert run_name(Settings(), "lauf-1.b") == "lauf-1.b"
    assert run_name(Settings(base_model="org/My Model")).startswith("My-Model-lora-")
    assert run_name(Settings(base_model="./", method="full")).split("-full-")[0] == "model"


def test_at_least_one_core():
    assert usable_cores() >= 1
    assert threads_for(3_000_000, 8) == 1 and threads_for(100_000_000, 8) == 8


# --- the run ---------------------------------------------------------------------------------


def test_run_writes_everything(finished):
    result, said, _ = finished
    names = {p.name for p in result.path.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "metrics.json",
        "report.html",
        "dropped.jsonl",
        "run.json",
    } <= names
    assert [p.name for p in result.path.parent.iterdir()] == ["toy"]
    assert "alpaca" in said and "rows.jsonl" in said


def test_no_row_is_lost(finished):
    result, _, _ = finished
    steps = result.metrics["accounting"]
    assert steps[0]["rows_in"] == 34 and steps[-1]["kept"] == sum(result.metrics["splits"].values())
    dropped = [json.loads(x) for x in (result.path / "dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == result.metrics["dropped_total"] == sum(s["dropped"] for s in steps) == 4
    assert {d["line"] for d in dropped} == {31, 32, 33, 34} and all(
        d["reason"] and d["source"] for d in dropped
    )


def test_metrics_and_report_say_the_same(finished):
    result, _, _ = finished
    stored = json.loads((result.path / "metrics.json").read_text())
    page = (result.path / "report.html").read_text()
    assert stored["verdict"] in page
    for f in stored["figures"]:
        assert stored[f["name"]] == f["value"] and (
            f["low"] is None or f["low"] <= f["value"] <= f["high"]
        )
    assert {
        "test_loss_before",
        "test_loss_after",
        "test_exact_after",
        "stop_rate_after",
    } <= stored.keys()
    assert stored["test_loss_after"] < stored["test_loss_before"]
    assert len(stored["examples"]) == len(stored["history"]) - 2 or stored["history"]
    assert {"seconds", "versions", "settings", "command", "tokens", "model"} <= stored.keys()


def test_the_summary_says_where_and_what_next(finished):
    result, _, _ = finished
    text = result.summary()
    for words in (
        str(result.path),
        "report.html",
        "instruct-ft chat",
        result.metrics["verdict"],
        "4 rows that were set aside",
    ):
        assert words in text


def test_the_run_loads_again_and_answers(finished):
    import torch

    from instruct_ft.model.load import load_model

    result, _, _ = finished
    model, tokenizer = load_model(result.path, device="cpu")
    assert torch.isfinite(next(model.parameters())).all() and tokenizer.chat_template
    reply, about = open_run(result.path, "cpu", max_new_tokens=3)
    assert (
        isinstance("".join(reply([dict(role="user", content="Write cat.")])), str)
        and "Llama" in about
    )


def test_the_same_run_gives_the_same_numbers(finished, base):
    result, _, data = finished
    chosen = Settings(
        base_model=base,
        output_dir=str(result.path.parents[1] / "again"),
        epochs=2,
        batch_size=8,
        max_new_tokens=4,
    )
    again = run(chosen, data=data, progress=False, echo=silent)
    for key in ("figures", "examples", "accounting", "splits", "tokens"):
        assert again.metrics[key] == result.metrics[key], key
    losses = [[h.get("loss") for h in r.metrics["history"]] for r in (result, again)]
    assert losses[0] == losses[1]


def test_the_built_in_rows(base, tmp_path):
    chosen = Settings(base_model=base, epochs=1, max_new_tokens=2, scale="quick")
    result = run(chosen, out=tmp_path / "atlas", progress=False, echo=silent, limit=60)
    m = json.loads((result.path / "metrics.json").read_text())
    names = {
        "heldout_closed_book_before",
        "heldout_closed_book_after",
        "heldout_open_tasks_after",
        "stop_rate_after",
    }
    assert names <= m.keys() and names == {f["name"] for f in m["figures"]}
    assert m["splits"]["train"] <= 60 and len(m["examples"]) == 10
    assert {(r["lang"]) for r in m["slices"]} == {"en", "zh"} and len(
        {r["task"] for r in m["slices"]}
    ) > 8
    assert sum(r["n"] for r in m["slices"]) == m["splits"]["test"]
    assert "By task and language" in (result.path / "report.html").read_text()


def test_no_held_out_row_is_a_training_row():
    found = pipeline.atlas_rows(Settings(), limit=400)
    said = [
        {json.dumps(m) for m in part["messages"]}
        for part in (found.train, found.validation, found.test)
    ]
    assert not said[0] & said[1] and not said[0] & said[2] and not said[1] & said[2]


def test_lora_run_loads_again(base, tmp_path):
    from instruct_ft.model.load import load_model

    chosen = Settings(base_model=base, method="lora", lora_rank=2, epochs=1, max_new_tokens=2)
    result = run(chosen, data=rows(10), out=tmp_path / "lora", progress=False, echo=silent)
    assert (result.path / "adapter_model.safetensors").exists()
    model, _ = load_model(result.path, device="cpu")
    assert "lora" in " ".join(n for n, _ in model.named_parameters())


def test_the_command_parses_back_to_the_settings():
    import shlex

    from instruct_ft.cli import _chosen, build_parser

    chosen = Settings(base_model="my models/x", epochs=3, method="lora", learning_rate=1e-4, seed=7)
    words = shlex.split(command(chosen, ["a b.jsonl", "c.csv"], 5))
    args = build_parser(Settings()).parse_args(words[1:])
    assert (_chosen(args), args.data, args.limit) == (chosen, ["a b.jsonl", "c.csv"], "5")


@pytest.mark.parametrize("where", ["fine_tune", "measure"])
def test_a_stopped_run_leaves_nothing(base, tmp_path, monkeypatch, where):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "measure":
        monkeypatch.setattr(pipeline, "measure", stop)
    else:
        from instruct_ft.training import trainer

        monkeypatch.setattr(trainer, "fine_tune", stop)
    with pytest.raises(KeyboardInterrupt):
        run(
            Settings(base_model=base, max_new_tokens=2),
            data=rows(6),
            out=tmp_path / "x",
            progress=False,
            echo=silent,
        )
    assert list(tmp_path.iterdir()) == []


def test_long_answers_are_said_to_be_cut(base, tmp_path):
    texts = [dict(instruction=f"Write {i}.", output="CAT " * 30) for i in range(6)]
    chosen = Settings(base_model=base, epochs=1, max_new_tokens=2)
    result = run(chosen, data=texts, out=tmp_path / "x", progress=False, echo=silent)
    assert any("--max-new-tokens" in note for note in result.metrics["notes"])


def test_hostile_rows_reach_report_and_terminal_as_text(base, tmp_path):
    bad = "<script>alert(1)</script>\u202e\x1b[2J"
    texts = [dict(instruction=f"{bad} {i}", output=bad) for i in range(8)]
    said = []
    result = run(
        Settings(base_model=base, epochs=1, max_new_tokens=2),
        data=texts,
        out=tmp_path / "x",
        progress=False,
        echo=said.append,
    )
    page = (result.path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "U+202E" in page
    assert "\x1b" not in "\n".join(said) + result.summary() and "\u202e" not in "\n".join(said)


def test_everything_too_long_is_one_sentence(base, tmp_path):
    texts = [dict(instruction="cat " * 100 + str(i), output="CAT") for i in range(6)]
    with pytest.raises(InputError, match="--max-length"):
        run(
            Settings(base_model=base, max_length=8),
            data=texts,
            out=tmp_path / "x",
            progress=False,
            echo=silent,
        )
    assert list(tmp_path.iterdir()) == []


def test_random_order_of_lines_changes_no_split(tmp_path):
    mixed = rows(40)
    random.Random(0).shuffle(mixed)
    sets = []
    for name, lines in (("a", rows(40)), ("b", mixed)):
        found = file_rows(write_jsonl(tmp_path / f"{name}.jsonl", lines), Settings(), echo=silent)
        sets.append({m[0]["content"] for m in found.test["messages"]})
    assert sets[0] == sets[1]


LONG = (
    "Please say the following word to the whole class, loud and clear, so that those who sit in "
    "the last row can hear it as well, and then write it on the board in capital letters."
)


def test_rows_of_one_template_are_split_all_the_same():
    rows = [
        dict(instruction=f"{LONG} The word is {w}.", output=w)
        for w in ("ox", "ax", "ex", "ix", "ux")
    ]
    parts = file_rows(rows, Settings(), echo=lambda text: None)
    assert all(map(len, (parts.train, parts.validation, parts.test)))
    assert any("near-duplicate rows stand on both sides" in n for n in parts.notes)


def test_a_test_row_whose_question_fills_the_window_is_set_aside(base, tmp_path):
    "Its first answer can be learned from; its last question cannot be asked"
    long = [
        dict(role="user", content="say cat"),
        dict(role="assistant", content="CAT"),
        dict(role="user", content="dog " * 400),
        dict(role="assistant", content="DOG"),
    ]
    data = [
        dict(id="long", messages=long),
        *(dict(id=f"r{i}", messages=long[:2]) for i in range(3)),
    ]
    sets = Rows(*(Dataset.from_list(data) for _ in range(3)), steps=[])
    _, tokenizer = load_model(base)
    encoded = encode_parts(sets, tokenizer, Settings(max_length=64))
    assert len(encoded["train"]) == 4 and len(encoded["test"]) == len(sets.test) == 3
    dropped = sets.steps[-1].dropped
    assert dropped["id"][:] == ["long"] and dropped["reason"][0].startswith("question too long: ")

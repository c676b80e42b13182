"The command as a user meets it: its pages, exit codes and sentences"

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_run import rows, write_jsonl

from instruct_ft import cli
from instruct_ft.settings import InputError, Settings

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("INSTRUCT_FT_")}
CLEAN |= dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_OFFLINE="1", COLUMNS="80")


def call(*argv, cwd=None, env=None, **kwargs):
    "Run the real command"
    root = os.path.dirname(os.path.dirname(os.path.abspath(cli.__file__)))
    env = CLEAN | dict(PYTHONPATH=root) | (env or {})
    command = [sys.executable, "-m", "instruct_ft", *map(str, argv)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **kwargs,
    )


def refused(done, *words):
    "Exit code 2, one line on standard error that has all of the words, nothing on standard output"
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"instruct-ft: error: [^\n]+\n", done.stderr), done.stderr
    assert done.stderr.count(". ") <= 1 and "Traceback" not in done.stderr
    for word in words:
        assert str(word) in done.stderr, done.stderr
    return done.stderr


def here(capsys, argv, *words):
    "The same in this process, which is faster"
    code = cli.main(list(map(str, argv)))
    return refused(subprocess.CompletedProcess(argv, code, *capsys.readouterr()), *words)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    "A folder with a run made by the command, and what the command said"
    folder = tmp_path_factory.mktemp("cli")
    write_jsonl(folder / "rows.jsonl", [*rows(), '{"broken'])
    done = call(
        "run",
        "--data",
        "rows.jsonl",
        "--base",
        base,
        "--epochs",
        1,
        "--max-new-tokens",
        3,
        "--name",
        "toy",
        cwd=folder,
    )
    return folder, done


# --- pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["chat", "-h"], ["--version"], []])
def test_pages_load_nothing_heavy(argv):
    heavy = "torch transformers datasets peft evaluate matplotlib numpy"
    code = f"""import sys
from instruct_ft.cli import main
try:
    code = main({argv!r})
except SystemExit as e:
    code = e.code
print(code, [m for m in {heavy.split()!r} if m in sys.modules], file=sys.stderr)"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CLEAN, check=True
    )
    assert done.stderr == "0 []\n" and len(done.stdout.splitlines()) >= 1


def test_help_fits_a_terminal_and_shows_defaults(tmp_path):
    (tmp_path / "settings.ini").write_text("[instruct_ft]\nepochs = 7\noutput_dir = else%where\n")
    page = call("run", "--help", cwd=tmp_path, env=dict(INSTRUCT_FT_SEED="123")).stdout
    assert max(map(len, page.splitlines())) <= 80
    text = " ".join(page.split())
    for words in (
        "(default: 7.0)",
        "(default: 123)",
        "else%where/NAME",
        "--learning-rate X",
        "examples:",
        "Exit codes",
    ):
        assert words in text
    for key in cli._FLAGS.values():
        assert key in page


def test_every_setting_has_a_flag():
    assert set(cli._FLAGS) == set(Settings.__dataclass_fields__) - {"output_dir"}


def test_help_appears_with_a_broken_settings_file(tmp_path):
    (tmp_path / "settings.ini").write_text("nonsense")
    assert call("run", "--help", cwd=tmp_path).returncode == 0
    refused(call("run", cwd=tmp_path), "settings.ini", "line 1")


def test_version():
    assert re.fullmatch(r"instruct-ft \d+\.\d+\.\d+\n", call("--version").stdout)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["run", "--epoch", "3"], ["--epoch", "--epochs", "run --help"]),
        (["run", "--max", "3"], ["--max"]),
        (["run", "--epochs", "many"], ["--epochs 'many'", "number"]),
        (["run", "--epochs", "nan"], ["--epochs"]),
        (["run", "--method", "qlora"], ["--method 'qlora'", "full, lora"]),
        (["run", "--learning-rate", "-1"], ["--learning-rate"]),
        (["run", "--limit", "0"], ["--limit '0'"]),
        (["run", "--limit", "ten"], ["--limit 'ten'"]),
        (["run", "--data"], ["--data"]),
        (["run", "--seed", "1.5"], ["--seed"]),
        (["run", "--name", "a/b"], ["--name 'a/b'"]),
        (["run", "--settings", "none.ini"], ["none.ini"]),
        (["run", "stray"], ["stray"]),
        (["train"], ["'train'", "run and chat"]),
        (["chat"], ["RUN"]),
        (["chat", "x", "--temperature", "hot"], ["--temperature 'hot'"]),
        (["chat", "x", "--temperature", "nan"], ["--temperature"]),
        (["chat", "x", "--ask", " "], ["--ask is empty"]),
        (["chat", "x", "--max-new-tokens", "-3"], ["--max-new-tokens"]),
        (["run", "--seed", "1\n2"], ["--seed"]),
        (["run", "--name", "\x1b[2J"], [r"\x1b"]),
    ],
)
def test_options_that_are_wrong(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    err = here(capsys, argv, *words)
    assert not list(tmp_path.iterdir()) and "\x1b" not in err


ROW = dict(instruction="a", output="b")
FILES = {
    "missing.jsonl": (None, ["missing.jsonl", "no such file"]),
    "empty.jsonl": ("", ["empty.jsonl", "no rows"]),
    "all-broken.jsonl": ('{"a": \nnot json\n', ["all-broken.jsonl", "line 1"]),
    "columns.jsonl": (
        '{"question": "a", "reply": "b"}\n',
        ["columns.jsonl", "question, reply", "instruction"],
    ),
    "broken.json": (
        '[{"instruction": "a", "output": "b"},\n {"instruction": ]',
        ["broken.json", "line 2"],
    ),
    "wrong.xlsx": ("x", ["wrong.xlsx", ".jsonl"]),
    "header.csv": ("instruction;output\na;b\n", ["header.csv", "line 1"]),
    "latin.csv": (
        "instruction,output\n" + "\udce9t\udce9,b\n" * 5,
        ["latin.csv", "UTF-8", "iconv"],
    ),
    "few.jsonl": (json.dumps(ROW) + "\n", ["at least 3"]),
    "no-answers.jsonl": ('{"instruction": "a", "output": ""}\n' * 5, ["empty answer"]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_used(name, tmp_path, monkeypatch, capsys):
    content, words = FILES[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    here(capsys, ["run", "--quiet", "--data", name], *words)
    assert [p.name for p in tmp_path.rglob("*") if p.name not in (name, "runs")] == []


@pytest.mark.parametrize(
    "folder, word",
    [("./gone", "gone"), ("nothing", "config.json"), ("bert", "bert"), ("bare", "tokenizer")],
)
def test_a_base_that_cannot_be_used(folder, word, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", rows())
    for name in ("nothing", "bert", "bare"):
        (tmp_path / name).mkdir()
    about = dict(model_type="bert", architectures=["BertForMaskedLM"])
    (tmp_path / "bert" / "config.json").write_text(json.dumps(about))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(os.path.join(base, name), tmp_path / "bare")
    here(capsys, ["run", "--quiet", "--data", "rows.jsonl", "--base", folder], word)
    assert not list(tmp_path.glob("runs/*"))


def test_an_output_folder_that_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "mine.txt").write_text("mine")
    here(capsys, ["run", "--data", "rows.jsonl", "--out", "runs/toy"], "runs/toy", "not empty")
    here(capsys, ["run", "--data", "rows.jsonl", "--name", "toy"], "runs/toy")
    assert [p.name for p in tmp_path.rglob("*")] == ["runs", "toy", "mine.txt"]


def test_chat_with_what_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    here(capsys, ["chat", "./gone", "--ask", "hello"], "gone")
    here(capsys, ["chat", "empty", "--ask", "hello"], "empty")


def test_the_real_command_refuses_in_the_same_way(tmp_path):
    done = call("run", "--data", "gone.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gone.jsonl" in done.stderr


# --- the run ---------------------------------------------------------------------------------


def test_run_says_what_it_does_and_where_it_is(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    for words in (
        "rows.jsonl: alpaca",
        "Answers before",
        "Tuning",
        "runs/toy",
        "report.html",
        "instruct-ft chat runs/toy",
    ):
        assert words in done.stdout
    assert done.stderr == ""
    assert sorted(p.name for p in (folder / "runs").iterdir()) == ["toy"]


def test_quiet_prints_the_folder_alone(base, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", rows(8))
    how = ["--quiet", "--base", base, "--epochs", "1", "--max-new-tokens", "2"]
    assert cli.main(["run", "--data", "rows.jsonl", *how]) == 0
    out, err = capfd.readouterr()
    path = tmp_path / out.removesuffix("\n")
    assert err == "" and (path / "report.html").exists()
    assert re.search(r"-lora-\d{8}-\d{6}$", path.name)


def test_several_files_and_patterns(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", rows(8))
    (tmp_path / "b.csv").write_text(
        "prompt,completion\n" + "".join(f"say {i},{i}\n" for i in range(8))
    )
    turns = [
        [dict(role="user", content=f"q{i}"), dict(role="assistant", content="a")] for i in range(8)
    ]
    (tmp_path / "c.json").write_text(json.dumps([dict(messages=m) for m in turns]))
    files = ["--data", "*.jsonl", "b.csv", "--data", "c.json", "--limit", "20", "--out", "out/run"]
    assert cli.main(["run", *files, "--base", base, "--epochs", "1", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("a.jsonl: alpaca", "b.csv: prompt_completion", "c.json: messages"):
        assert words in said
    steps = json.loads((tmp_path / "out" / "run" / "metrics.json").read_text())["accounting"]
    assert steps[0]["rows_in"] == 24 and steps[-1]["kept"] == 20


def test_ask_prints_the_answer_alone(finished):
    folder, _ = finished
    done = call(
        "chat", "runs/toy", "--ask", "Write cat 1 times.", "--max-new-tokens", 4, cwd=folder
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("\n")


def test_chat_from_a_pipe(finished):
    folder, _ = finished
    lines = "/help\nWrite cat 1 times.\n/reset\n/system short\n/nonsense\n"
    done = call("chat", "runs/toy", "--max-new-tokens", 2, cwd=folder, input=lines)
    assert done.returncode == 0 and done.stderr == ""
    assert "forget the conversation" in done.stdout and "no command" in done.stdout


def test_ctrl_c_stops_with_one_sentence_and_nothing_left(base, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", rows())
    argv = [
        "run",
        "--data",
        "rows.jsonl",
        "--base",
        base,
        "--epochs",
        "1000",
        "--max-new-tokens",
        "2",
    ]
    root = os.path.dirname(os.path.dirname(os.path.abspath(cli.__file__)))
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "instruct_ft", *argv], cwd=tmp_path, env=CLEAN | dict(PYTHONPATH=root),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a background shell ignores it
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("Tuning"):
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("instruct-ft: error: stopped")
    assert not list((tmp_path / "runs").iterdir())


# --- in one process --------------------------------------------------------------------------


def test_a_fault_of_ours_is_one_sentence_and_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_run", lambda args: 1 / 0)
    assert cli.main(["run"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "division by zero" in err and "Traceback" not in err
    (log,) = (tmp_path / "runs").iterdir()
    assert str(log.relative_to(tmp_path)) in err and "ZeroDivisionError" in log.read_text()
    monkeypatch.setenv("INSTRUCT_FT_OUTPUT_DIR", str(log / "beneath"))
    assert cli.main(["run"]) == 1
    path = re.search(r"traceback in (.*)\)", capsys.readouterr().err)[1]
    assert "ZeroDivisionError" in Path(path).read_text()
    os.unlink(path)


def test_a_sentence_is_one_line(monkeypatch, capsys):
    def fail(args):
        raise InputError("two\nlines")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["run"]) == 2
    assert capsys.readouterr().err == "instruct-ft: error: two lines\n"


def test_chat_keeps_the_conversation_until_reset():
    lines = iter(["one", "", "two", "/reset", "three", "/system be brief", "four"])
    asked, seen = lambda prompt: next(lines), []

    def reply(messages):
        seen.append([m["content"] for m in messages])
        yield from ("an", "swer")

    with pytest.raises((StopIteration, RuntimeError)):
        cli.chat(reply, ask=asked)
    assert seen == [["one"], ["one", "answer", "two"], ["three"], ["be brief", "four"]]


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(capsys):
    lines = iter(["too long", "short", "/quit"])

    def reply(messages):
        if messages[-1]["content"] == "too long":
            raise InputError("the question has 999 tokens.")
        yield "answer"

    said = cli.chat(reply, ask=lambda prompt: next(lines))
    assert [m["content"] for m in said] == ["short", "answer"]
    assert "999 tokens" in capsys.readouterr().out


def test_ctrl_c_ends_the_answer_and_then_the_conversation(capsys):
    def ask(prompt):
        if not asked:
            asked.append(1)
            return "hello"
        raise KeyboardInterrupt

    def reply(messages):
        yield "par"
        raise KeyboardInterrupt

    asked = []
    said = cli.chat(reply, ask=ask)
    assert (
        said[-1] == dict(role="assistant", content="par") and "(stopped)" in capsys.readouterr().out
    )


def test_control_characters_of_a_model_are_shown(capsys):
    lines = iter(["hello"])

    def ask(prompt):
        return next(lines, None) or (_ for _ in ()).throw(EOFError)

    cli.chat(lambda messages: iter(["\x1b[2J\u202e"]), ask=ask)
    assert r"\x1b[2J\u202e" in capsys.readouterr().out

import os
import random
import subprocess
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import instruct_ft
from instruct_ft.settings import (
    InputError,
    Settings,
    load_settings,
    repo_root,
    results_dir,
    set_seed,
)

ROOT = Path(__file__).resolve().parent.parent
WORDS = st.text("abcdefghij0123456789_-./:", min_size=1, max_size=30).map(str.strip).filter(bool)
GOOD = st.builds(
    Settings,
    base_model=WORDS,
    method=st.sampled_from(["full", "lora"]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from(["full", "quick"]),
    device=st.sampled_from(["auto", "cpu", "cuda", "mps"]),
    output_dir=WORDS,
    epochs=st.floats(0.01, 1000),
    learning_rate=st.just("auto") | st.floats(1e-8, 1),
    batch_size=st.integers(1, 65536),
)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "No settings file around, no variable of the environment"
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("INSTRUCT_FT_")]:
        monkeypatch.delenv(name)


def ini(tmp_path, text, **write):
    path = tmp_path / "settings.ini"
    path.write_text(text, **({"encoding": "utf-8"} | write))
    return path


def test_without_a_file_the_defaults_hold():
    assert load_settings() == Settings()


def test_the_committed_file_says_the_defaults(tmp_path):
    "The one in the working tree may say something else: that is what it is for"
    command = ["git", "show", "HEAD:settings.ini"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if shown.returncode:
        pytest.skip("not a git checkout with settings.ini in it")
    (tmp_path / "settings.ini").write_bytes(shown.stdout)
    assert load_settings() == Settings()


def test_every_key_has_its_comment():
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    for field in fields(Settings):
        before, found, _ = text.partition(f"\n{field.name} = ")
        assert found, f"{field.name} is not in settings.ini"
        assert before.splitlines()[-1].startswith("#"), f"{field.name} has no comment"


@given(settings=GOOD)
def test_what_is_written_is_read_back(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("ini") / "settings.ini"
    lines = [f"{key} = {value}" for key, value in asdict(settings).items()]
    path.write_text("\n".join(["[instruct_ft]", *lines]), encoding="utf-8")
    assert load_settings(path) == settings


@given(
    key=st.sampled_from([f.name for f in fields(Settings)]),
    value=st.sampled_from(["", "-1", "nan", "inf", "1e999", "[]"]),
    above=st.integers(0, 5),
)
def test_a_bad_value_names_its_file_line_and_key(tmp_path_factory, key, value, above):
    path = tmp_path_factory.mktemp("ini") / "settings.ini"
    path.write_text("[instruct_ft]\n" + "# a comment\n" * above + f"{key} = {value}\n")
    if key in ("base_model", "output_dir") and value:
        assert getattr(load_settings(path), key) == value
        return
    with pytest.raises(InputError) as error:
        load_settings(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line {above + 2}: {key} = ")
    assert "give " in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("[instruct_ft]\nlerning_rate = 1", 2, "did you mean learning_rate?"),
        ("[instruct_ft]\nzzz = 1", 2, "Allowed are base_model, method"),
        ("[instruct_ft]\nseed = 1\n\nSEED = 2", 4, "seed is set twice"),
        ("[instruct_ft]\nseed = 1\n[instruct_ft]", 3, "a second [instruct_ft]"),
        ("seed = 1\n[instruct_ft]", 1, "[instruct_ft] above"),
        ("[DEFAULT]\nseed = 1", 1, "no section [instruct_ft]"),
        ("", 1, "no section [instruct_ft]"),
        ("[instruct_ft]\nseed", 2, "key = value"),
        ("[instruct_ft]\nseed = 1\n  batch_size = 4", 2, "a whole number from 0"),
        ("[instruct_ft]\nseed = 1.5", 2, "a whole number"),
        ("[other]\nseed = 1\n[instruct_ft] # ours\nseed = x", 4, "a whole number"),
        ("[instruct_ft]\nmethod = LoRA", 2, "one of full, lora"),
        ("[instruct_ft]\nbase_model = a\x07b", 2, "local folder"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, line, part):
    path = ini(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_settings(path)
    assert str(error.value).startswith(f"{path}, line {line}: ")
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_other_sections_do_not_reach_in(tmp_path):
    text = "[DEFAULT]\nseed = 1\n[other]\nmethod = x\n[instruct_ft]\nepochs = 3\n"
    assert load_settings(ini(tmp_path, text)) == Settings(epochs=3)


def test_byte_order_mark_line_ends_comments_and_percent(tmp_path):
    text = "[instruct_ft]\r\n; a comment\r\nseed : 5  # five\r\noutput_dir = 100%_中文\r\n"
    path = ini(tmp_path, text, encoding="utf-8-sig", newline="")
    assert load_settings(path) == Settings(seed=5, output_dir="100%_中文")


def test_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "settings.ini"
    path.write_bytes("[instruct_ft]\n\nbase_model = größe".encode("latin-1"))
    with pytest.raises(InputError, match="line 3: not UTF-8"):
        load_settings(path)


@pytest.mark.parametrize("missing", ["none.ini", "."])
def test_a_file_that_cannot_be_read(missing):
    with pytest.raises(InputError, match="cannot be read"):
        load_settings(missing)


def test_the_nearest_file_upwards_is_found(tmp_path, monkeypatch):
    ini(tmp_path, "[instruct_ft]\nseed = 1\n")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert load_settings().seed == 1
    ini(tmp_path / "a", "[instruct_ft]\nseed = 2\n")
    assert load_settings().seed == 2


def test_order_of_the_sources(tmp_path, monkeypatch):
    path = ini(tmp_path, "[instruct_ft]\nseed = 1\nepochs = 9\n")
    monkeypatch.setenv("INSTRUCT_FT_SEED", "2")
    monkeypatch.setenv("INSTRUCT_FT_EPOCHS", "")
    assert (load_settings(path).seed, load_settings(path).epochs) == (2, 9)
    assert load_settings(path, seed=3).seed == 3
    assert load_settings(path, seed=None).seed == 2


def test_a_mistake_is_told_also_where_a_stronger_source_covers_it(tmp_path, monkeypatch):
    path = ini(tmp_path, "[instruct_ft]\nseed = x\n")
    monkeypatch.setenv("INSTRUCT_FT_SEED", "2")
    with pytest.raises(InputError, match="line 2: seed"):
        load_settings(path, seed=3)
    path.unlink()
    monkeypatch.setenv("INSTRUCT_FT_SEED", "y")
    with pytest.raises(InputError, match="INSTRUCT_FT_SEED"):
        load_settings(seed=3)


def test_a_bad_variable_and_a_bad_argument_name_themselves(monkeypatch):
    with pytest.raises(InputError, match="^argument seed: seed = 'x'"):
        load_settings(seed="x")
    with pytest.raises(InputError, match="^argument sede: unknown key 'sede'; did you mean seed"):
        load_settings(sede=1)
    with pytest.raises(InputError, match="a whole number"):
        load_settings(batch_size=True)
    monkeypatch.setenv("INSTRUCT_FT_SCAL", "quick")
    with pytest.raises(InputError, match="^environment variable INSTRUCT_FT_SCAL: unknown key"):
        load_settings()


def test_settings_are_frozen_and_checked():
    with pytest.raises(FrozenInstanceError):
        Settings().seed = 1
    with pytest.raises(InputError, match="device = 'tpu'"):
        Settings(device="tpu")
    assert Settings(learning_rate="2e-4").learning_rate == 2e-4


def test_folders_do_not_hang_on_the_current_one():
    assert repo_root() == Path(instruct_ft.__file__).resolve().parent.parent
    assert results_dir() == repo_root() / "nbs" / "results"


def test_without_a_checkout_results_go_to_the_output_folder(monkeypatch):
    monkeypatch.setattr("instruct_ft.settings.repo_root", lambda: None)
    assert results_dir() == Path("runs") / "results"


def test_one_seed_for_three_generators():
    import numpy
    import torch

    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    set_seed(3)
    first = draw()
    set_seed(3)
    assert draw() == first
    set_seed(4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))

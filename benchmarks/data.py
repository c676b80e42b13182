"""How fast the data stage is, beside what a user would pick instead.

    python benchmarks/data.py read      # JSONL into a checked table, beside load_dataset("json")
    python benchmarks/data.py whole     # read, normalise, drop what is empty or repeated, write; beside datasets.map and filter

Both sides work on the same rows, in one process, on one core, in turns; what comes out is compared before a time is taken.
A time is the processor time of one call, so that other programs on the machine do not enter; a ratio is the median of
those of the rounds.

A part of the stage is a function with the name of its sub-command: it takes the parsed arguments, and `@part` lists it.
"""

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE"):
    os.environ[name] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import orjson
import pyarrow as pa
from datasets import load_dataset

from instruct_ft.data.clean import clean
from instruct_ft.data.collect import collect, write_rows

PARTS: dict[str, Callable] = {}


def part(function: Callable) -> Callable:
    "List a function as a sub-command"
    PARTS[function.__name__] = function
    return function


# --- what every part needs ----------------------------------------------------------------------------------------


def seconds(function: Callable) -> float:
    "Processor time of one call"
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def paired(name: str, ours: Callable, theirs: Callable, n: int, rounds: int) -> float:
    "Time both in turns, print a line, and return how many times faster ours is"
    ours(), theirs()  # imports and caches
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(t / o for o, t in pairs)
    print(
        f"{name:34}{n:>8} rows   ours {a:7.3f} s {n / a / 1e3:6.0f} k/s   peer {b:7.3f} s {n / b / 1e3:6.0f} k/s"
        f"   {ratio:5.2f} times",
        flush=True,
    )
    return ratio


def one_core() -> None:
    "Stay on one core, if the system can say so"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will more no if out so said what"
).split()
SIGNS = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经"


def texts(i: int) -> tuple[str, str, str]:
    "Instruction, input and output of row `i`; a third of the rows is Chinese"
    rng = random.Random(i)
    if i % 3 == 0:
        say = lambda n: "".join(rng.choices(SIGNS, k=n))
        return f"请问{say(18)}？", say(20) if i % 2 else "", f"{say(60)}，{say(50)}。\n{i}"
    say = lambda n: " ".join(rng.choices(WORDS, k=n))
    return f"{say(12)}?", say(10) if i % 2 else "", f'{say(45)}: "{say(8)}".\n\n{i} {say(10)}'


def alpaca(i: int) -> dict:
    "A row of three texts"
    return dict(zip(("instruction", "input", "output"), texts(i), strict=True))


def chat(i: int) -> dict:
    "A conversation; one in fifty has no answer, one in twenty repeats an earlier one, one in ten is untidy"
    asked, given, said = texts(i // 2 if i % 20 == 0 else i)
    said = "" if i % 50 == 1 else f" {said}\r\ne\u0301 " if i % 10 == 3 else said
    turns = [dict(role="user", content=f"{asked}\n{given}"), dict(role="assistant", content=said)]
    return dict(id=f"r{i}", messages=turns)


def write(path: Path, make: Callable[[int], dict], n: int) -> Path:
    "Rows as JSON lines"
    path.write_bytes(b"".join(orjson.dumps(make(i)) + b"\n" for i in range(n)))
    return path


def loaded(path: Path, cache: Path) -> datasets.Dataset:
    "What most training scripts call, on a file that it has not seen"
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        return load_dataset("json", data_files=str(path), cache_dir=fresh, split="train")


# --- the parts ----------------------------------------------------------------------------------------------------


def broken(data: bytes) -> bytes:
    "JSON lines of which one in a hundred is cut"
    lines = data.split(b"\n")
    lines[100::100] = [line[:-9] for line in lines[100::100]]
    return b"\n".join(lines)


@part
def read(options: argparse.Namespace) -> None:
    "JSON lines into a table, every line checked, beside load_dataset"
    path = options.folder / "rows.jsonl"
    ours, theirs = lambda: collect(path), lambda: loaded(path, options.folder)
    kinds = {
        "three texts": alpaca,
        "three texts and an id": lambda i: {"id": f"r{i}"} | alpaca(i),
        "conversations with an id": chat,
    }
    for n in options.rows:
        for name, make in kinds.items():
            write(path, make, n)
            mine, other = ours().kept, theirs()
            assert all(mine[c][:] == other[c][:] for c in other.column_names)
            paired(name, ours, theirs, n, options.rounds)
        path.write_bytes(broken(write(path, alpaca, n).read_bytes()))
        took = statistics.median(seconds(ours) for _ in range(options.rounds))
        print(
            f"{'one line in a hundred is broken':34}{n:>8} rows   ours {took:7.3f} s   peer: fails"
        )


@part
def whole(options: argparse.Namespace) -> None:
    "Read, normalise, drop what is empty or repeated, write; beside datasets.map and filter, batched"

    def ours() -> None:
        write_rows(clean(collect(path).kept).kept, options.folder / "ours.jsonl")

    def tidy(batch: dict) -> dict:
        def mend(text: str) -> str:
            text = unicodedata.normalize("NFC", text)
            return text.replace("\r\n", "\n").replace("\r", "\n").strip()

        return {
            "messages": [
                [t | {"content": mend(t["content"])} for t in turns] for turns in batch["messages"]
            ]
        }

    def theirs() -> None:
        seen = set()

        def wanted(batch: dict) -> list[bool]:
            keep = []
            for turns in batch["messages"]:
                key = blake2b(orjson.dumps(turns)).digest()
                keep.append(all(t["content"] for t in turns) and key not in seen)
                seen.add(key)
            return keep

        rows = loaded(path, options.folder).map(tidy, batched=True)
        rows.filter(wanted, batched=True).to_json(
            options.folder / "theirs.jsonl", force_ascii=False
        )

    for n in options.rows:
        path = write(options.folder / "chats.jsonl", chat, n)
        ours(), theirs()
        a, b = (
            [json.loads(x)["messages"] for x in (options.folder / f).open(encoding="utf-8")]
            for f in ("ours.jsonl", "theirs.jsonl")
        )
        assert a == b, "the two do not come to the same rows"
        paired("read, tidy, filter, write", ours, theirs, n, options.rounds)


def main() -> None:
    "Run one part"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    one_core()
    warnings.simplefilter("ignore", UserWarning)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        PARTS[options.part](options)


if __name__ == "__main__":
    main()

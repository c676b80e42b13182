"""Rows encoded per second beside the bare tokenizer and TRL's preparation: same rows, one core, one run.

    python benchmarks/tokenization.py [--rows 4000] [--rounds 5] [--json FILE]

Times are CPU seconds of this process, so that other jobs on the machine count for little. Each round runs
all ways one after the other; a ratio is the median over rounds. TRL is asked in both of its forms, messages
with `assistant_only_loss` and prompt with completion, and the faster counts. Its columns are checked against ours.
"""

import argparse
import copy
import json
import os
import random
import statistics
import time
from types import SimpleNamespace

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import AutoTokenizer

from instruct_ft.atlas.corpus import corpus
from instruct_ft.atlas.facts import atlas_path
from instruct_ft.atlas.instructions import instructions
from instruct_ft.tokenization.encode import encode_rows

TEMPLATE = (  # the decoder's own ChatML, with the marks that TRL needs
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_rows(n: int) -> dict[str, Dataset]:
    "Short questions with short answers, and passages of some hundred words with answers as long"
    short = [[dict(role=m["role"], content=m["content"]) for m in r["messages"]]
             for r in instructions("train", n=n, seed=0)]  # fmt: skip
    rng, docs = random.Random(0), [doc for doc, _ in zip(corpus(0), range(2000), strict=False)]
    some = lambda: "\n".join(rng.choice(docs) for _ in range(rng.randint(1, 6)))
    long = [[dict(role="user", content=some()), dict(role="assistant", content=some())]
            for _ in range(n // 4)]  # fmt: skip
    return {k: Dataset.from_dict(dict(messages=v)) for k, v in dict(short=short, long=long).items()}


def trl_ways(rows: Dataset, tokenizer) -> dict:
    "TRL's preparation of the same rows, in its two forms"
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise SystemExit("this benchmark compares with trl: pip install trl==1.16.0") from None
    pairs = Dataset.from_list(
        [dict(prompt=m[:1], completion=m[1:]) for m in (row["messages"] for row in rows)]
    )

    def prepare(data: Dataset, **how) -> Dataset:
        options = SFTConfig("out", report_to="none", use_cpu=True, max_length=None, **how)
        options.shuffle_dataset = False
        known = dict(_tokenizer=tokenizer, chat_template=TEMPLATE, completion_only_loss=True)
        trainer = SimpleNamespace(**known)
        given = (data, tokenizer, options, False, None, "train")
        return SFTTrainer._prepare_dataset(trainer, *given)

    return {
        "TRL, assistant_only_loss": lambda: prepare(rows, assistant_only_loss=True),
        "TRL, prompt and completion": lambda: prepare(pairs),
    }


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(rows: Dataset, tokenizer, rounds: int) -> dict[str, list[float]]:
    "Way -> CPU seconds by round"
    texts = tokenizer.apply_chat_template(rows["messages"][:], tokenize=False)
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = TEMPLATE
    theirs = trl_ways(rows, marked)
    ways = {
        "tokenizer.encode_batch": lambda: tokenizer.backend_tokenizer.encode_batch(
            texts, add_special_tokens=False
        ),
        "encode_rows": lambda: encode_rows(rows, tokenizer),
    } | theirs
    ours = [one.input_ids for one in encode_rows(rows, tokenizer)[0]]
    for name, way in theirs.items():
        if way()["input_ids"][:] != ours:
            raise SystemExit(f"{name} gives other ids")
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(seconds(way))
    return found


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=4000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json")
    options = options.parse_args()
    disable_progress_bars()
    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(atlas_path("decoder"))
    out = {}
    for kind, rows in make_rows(options.rows).items():
        found = out[kind] = measure(rows, tokenizer, options.rounds)
        ours = found["encode_rows"]
        print(f"{kind}: {len(rows):,} rows, {options.rounds} rounds, CPU seconds")
        for name, took in found.items():
            times = statistics.median(a / b for a, b in zip(took, ours, strict=True))
            print(
                f"{name:30} {statistics.median(took):7.3f} s  {times:6.2f} x the time of encode_rows"
            )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as f:
            json.dump(out, f, indent=1)


if __name__ == "__main__":
    main()

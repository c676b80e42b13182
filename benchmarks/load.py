"""Batches per second beside what a user would take instead: same rows, same batch size, one core, one run.

    python benchmarks/load.py [--rows 20000] [--rounds 5] [--json FILE]

Times are CPU seconds of this process, so that other jobs on the machine count for little. Each round runs
all ways one after the other, so that a slow minute is a slow minute for all; a ratio is the median over rounds.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler

from instruct_ft.atlas.facts import atlas_path
from instruct_ft.data.load import Loader, Pad, StreamLoader, fingerprint, lengths_of

BATCH = 32


def make_rows(n: int) -> Dataset:
    "Classification rows of tokens, log-normal lengths from 8 to 512"
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.5, 0.8, n)).astype(int), 8, 512)
    ids = [rng.integers(3, 900, k).astype(np.int32) for k in lengths]
    return Dataset.from_dict(dict(input_ids=ids, label=rng.integers(0, 9, n)))


def epoch(loader) -> dict:
    "Read an epoch: CPU seconds, rows, tokens, sum of ids, share of padding"
    start, rows, tokens, total, places = time.process_time(), 0, 0, 0, 0
    for batch in loader:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        rows, places = rows + len(ids), places + ids.numel()
        tokens, total = tokens + int(mask.sum()), total + int((ids * mask).sum())
    return dict(
        s=time.process_time() - start,
        rows=rows,
        tokens=tokens,
        total=total,
        padding=1 - tokens / places,
    )


def ways(rows: Dataset, tokenizer) -> dict:
    "Name -> function that makes a loader for an epoch"
    peer = dict(batch_size=BATCH, collate_fn=DataCollatorWithPadding(tokenizer))
    listed, lengths = rows.to_list(), lengths_of(rows).tolist()
    grouped = lambda: LengthGroupedSampler(
        BATCH, lengths=lengths, generator=torch.Generator().manual_seed(0)
    )
    ours = partial(Loader, rows, BATCH, Pad(tokenizer.pad_token_id))
    return {
        "DataLoader, DataCollatorWithPadding, Dataset": lambda: DataLoader(
            rows, shuffle=True, **peer
        ),
        "DataLoader, DataCollatorWithPadding, list": lambda: DataLoader(
            listed, shuffle=True, **peer
        ),
        "LengthGroupedSampler, DataCollatorWithPadding, Dataset": lambda: DataLoader(
            rows, sampler=grouped(), **peer
        ),
        "LengthGroupedSampler, DataCollatorWithPadding, list": lambda: DataLoader(
            listed, sampler=grouped(), **peer
        ),
        "Loader": ours,
        "Loader(bucket=50)": partial(ours, bucket=50),
        "StreamLoader(bucket=50)": lambda: StreamLoader(
            rows.to_iterable_dataset(), BATCH, Pad(tokenizer.pad_token_id), bucket=50
        ),
    }


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json")
    options = options.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    rows = make_rows(options.rows)
    tokenizer = AutoTokenizer.from_pretrained(atlas_path("decoder"))
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    makers, found = ways(rows, tokenizer), {}
    for _ in range(options.rounds):
        for name, make in makers.items():
            found.setdefault(name, []).append(epoch(make()))
    if len({(r["rows"], r["tokens"], r["total"]) for runs in found.values() for r in runs}) != 1:
        raise SystemExit("the ways did not read the same rows")
    ours = [r["s"] for r in found["Loader(bucket=50)"]]
    print(
        f"{options.rows:,} rows, batches of {BATCH}, {options.rounds} rounds, CPU seconds of an epoch"
    )
    for name, runs in found.items():
        took = [r["s"] for r in runs]
        times = statistics.median(a / b for a, b in zip(took, ours, strict=True))
        print(
            f"{name:56} {statistics.median(took):7.3f} s  {times:5.1f} x  padding {runs[0]['padding']:5.1%}"
        )
    once = {
        "lengths: for row in rows (LengthGroupedSampler)": lambda: [
            len(row["input_ids"]) for row in rows
        ],
        "lengths_of": lambda: lengths_of(rows),
        "fingerprint": lambda: fingerprint(rows),
        "plan of an epoch, 1,000,000 rows, bucket=50": lambda: Loader(
            Dataset.from_dict(dict(i=range(1_000_000))),
            BATCH,
            bucket=50,
            lengths=np.arange(1_000_000) % 511,
        ),
    }
    once = {name: seconds(work) for name, work in once.items()}
    for name, took in once.items():
        print(f"{name:56} {took:7.3f} s")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as f:
            json.dump(dict(rows=options.rows, ways=found, once=once), f, indent=1)


if __name__ == "__main__":
    main()

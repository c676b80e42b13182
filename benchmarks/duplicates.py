"""Near-duplicates: the course's step beside datasketch, same texts, one core, in one run.

python benchmarks/duplicates.py [--rows N] [--growth N ...]

Both sides get raw texts and end with the rows that a greedy first-kept pass drops. datasketch runs with
the bands that reach the same recall, the shingles of the course and an exact comparison of its candidates,
which is what makes its answers comparable. Times are CPU time of this process, the two sides by turns."""

import argparse
import os
import random
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from datasets import Dataset

from instruct_ft.data import clean

SHAPES = {  # words of a text, words of the vocabulary, typical length in characters
    "short English": ("en", 7),
    "short Chinese": ("zh", 19),
    "long English": ("en", 85),
    "long Chinese": ("zh", 112),
}


def vocabulary(lang: str) -> list[str]:
    "3,000 made-up English words, or 2,000 Chinese characters"
    rng = random.Random(lang)
    if lang == "zh":
        return [chr(c) for c in range(0x4E00, 0x4E00 + 2000)]
    syllables = [
        a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "ar", "en", "is")
    ]
    return ["".join(rng.choices(syllables, k=rng.randrange(1, 4))) for _ in range(3000)]


def texts(shape: str, rows: int, seed: int = 0) -> list[str]:
    "Texts of a shape; every tenth is an earlier one with a few words changed"
    lang, size = SHAPES[shape]
    rng, words, made = random.Random(f"{shape}{seed}"), vocabulary(lang), []
    weights = [1 / (n + 20) for n in range(len(words))]  # common words are common
    for i in range(rows):
        if i % 10 == 9:
            chosen = list(made[rng.randrange(i)])
            for _ in range(max(1, size // 30)):
                chosen[rng.randrange(len(chosen))] = rng.choice(words)
        else:
            chosen = rng.choices(words, weights, k=max(4, round(size * rng.uniform(0.7, 1.3))))
        made.append(chosen)
    return [("" if lang == "zh" else " ").join(chosen) for chosen in made]


def ours(rows: Dataset) -> set[int]:
    "Numbers of the rows that go"
    return set(map(int, clean.drop_near_duplicates(rows, "text", digit_guard=False).dropped["id"]))


def theirs(rows: Dataset, params: tuple[int, int]) -> set[int]:
    "The same with datasketch's MinHash and LSH, candidates compared exactly"
    from datasketch import MinHash, MinHashLSH
    from xxhash import xxh32_intdigest  # its quickest hash

    sets = [clean.shingles(clean.match_key(text)) for text in rows["text"]]
    pieces = ([piece.encode() for piece in s] for s in sets)
    signs = MinHash.bulk(pieces, num_perm=128, hashfunc=xxh32_intdigest)
    index, gone = MinHashLSH(num_perm=128, params=params), set()
    for j, (sign, mine) in enumerate(zip(signs, sets, strict=True)):
        if any(len(mine & sets[i]) >= 0.8 * len(mine | sets[i]) for i in index.query(sign)):
            gone.add(j)
        else:
            index.insert(j, sign)
    return gone


def timed(function, *arguments) -> tuple[float, set[int]]:
    "CPU seconds and the answer"
    start = time.process_time()
    answer = function(*arguments)
    return time.process_time() - start, answer


def dataset(made: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [str(i) for i in range(len(made))], "text": made})


def compare(shape: str, n: int, rounds: int = 3) -> None:
    "One line: rows a second of both, their ratio, and how far the answers agree"
    rows, seconds = dataset(texts(shape, n)), {"ours": [], "theirs": []}
    for _ in range(rounds):
        spent, mine = timed(ours, rows)
        seconds["ours"].append(spent)
        spent, other = timed(theirs, rows, (16, 8))
        seconds["theirs"].append(spent)
    fast, slow = (n / statistics.median(s) for s in seconds.values())
    every = mine | other
    print(
        f"{shape:14} {n:>7,} rows   ours {fast:>8,.0f} rows/s (finds {len(mine) / len(every):.3f})   "
        f"datasketch {slow:>7,.0f} rows/s (finds {len(other) / len(every):.3f})   {fast / slow:5.1f} x"
    )


def growth(shape: str, sizes: list[int]) -> None:
    "Seconds for growing numbers of rows, and the power of the number that they follow"
    from math import log

    before = None
    for n in sizes:
        seconds, gone = timed(ours, dataset(texts(shape, n)))
        power = (
            ""
            if before is None
            else f"   time grows with rows ^ {log(seconds / before[1]) / log(n / before[0]):.2f}"
        )
        print(
            f"{shape:14} {n:>7,} rows {seconds:8.2f} s {n / seconds:>9,.0f} rows/s {len(gone):>6,} dropped{power}"
        )
        before = (n, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=10_000, help="rows beside datasketch; 0: only the growth"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument(
        "--growth", type=int, nargs="*", default=[1000, 5000, 20_000, 50_000, 200_000]
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for shape in SHAPES if options.rows else ():
        compare(shape, options.rows, options.rounds)
    for shape in ("short English", "short Chinese"):
        growth(shape, options.growth)


if __name__ == "__main__":
    main()

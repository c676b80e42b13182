"""A CRF beside pytorch-crf: loss with backward, and decoding; same batches, one thread, one run.

    python benchmarks/crf.py [--rounds 15] [--json FILE]

Times are CPU seconds of this process, so that other jobs on the machine count for little. Each round runs
both libraries one after the other, on rows padded to different lengths and on rows of one length; a ratio
is the median over rounds. What both return is compared before anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torchcrf

from instruct_ft.model.crf import LinearChainCRF

SHAPES = [(32, 128, 9), (8, 512, 9), (32, 64, 33), (1, 128, 9)]  # rows, steps, labels
FLOOR = {"loss + backward": 3.0, "decode": 3.0}  # at the first shape


def ways(B: int, T: int, K: int, padded: bool) -> dict[str, tuple[Callable, Callable]]:
    "Name -> the peer's way and ours, on the same batch and the same weights"
    torch.manual_seed(0)
    x, y = (2 * torch.randn(B, T, K)).requires_grad_(), torch.randint(0, K, (B, T))
    shortest = T // 4 if padded else T
    mask = torch.arange(T) < torch.randint(shortest, T + 1, (B, 1))
    peer, ours = torchcrf.CRF(K, batch_first=True), LinearChainCRF(K)
    ours.transitions.data, ours.start.data, ours.end.data = (
        p.data.clone() for p in (peer.transitions, peer.start_transitions, peer.end_transitions)
    )
    return {
        "loss + backward": (
            lambda: back(x, peer, -peer(x, y, mask, reduction="mean")),
            lambda: back(x, ours, ours.loss(x, y, mask)),
        ),
        "decode": (lambda: peer.decode(x.detach(), mask), lambda: ours.decode(x, mask)),
    }


def back(x: torch.Tensor, crf: torch.nn.Module, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    "Gradients of a loss, those of the last round dropped first"
    x.grad = None
    crf.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), x.grad


def agree(name: str, theirs: Callable, ours: Callable) -> None:
    "Stop unless both return the same"
    a, b = theirs(), ours()
    if name == "decode":
        same = [u == v for p, q in zip(a, b, strict=True) for u, v in zip(p, q, strict=True)]
        good = sum(same) > 0.99 * len(same)  # the peer's float32 sums can turn a near tie
    else:
        good = abs(a[0] / b[0] - 1) < 1e-4 and torch.allclose(a[1], b[1], atol=1e-3)
    if not good:
        raise SystemExit(f"{name}: the two do not agree")


def seconds(work: Callable) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--json")
    options = options.parse_args()
    torch.set_num_threads(1)
    out, low = [], []
    print(f"{'B x T x K':14} {'':9} {'':16} pytorch-crf      ours    ratio")
    for shape in SHAPES:
        for padded in (True, False):
            for name, (theirs, ours) in ways(*shape, padded).items():
                agree(name, theirs, ours)
                times = [(seconds(theirs), seconds(ours)) for _ in range(options.rounds)]
                a, b = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
                ratio = statistics.median(p / q for p, q in times)
                kind = "padded" if padded else "unpadded"
                label = " x ".join(map(str, shape))
                print(f"{label:14} {kind:9} {name:16} {a:8.1f} ms {b:6.2f} ms {ratio:7.1f}x")
                out.append(
                    dict(shape=shape, padded=padded, what=name, theirs=a, ours=b, ratio=ratio)
                )
                if shape == SHAPES[0] and ratio < FLOOR[name]:
                    low.append(f"{name}, {kind}: {ratio:.1f}x")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as f:
            json.dump(out, f, indent=1)
    if low:
        raise SystemExit(f"below 3x at 32 x 128 x 9: {'; '.join(low)}")


if __name__ == "__main__":
    main()

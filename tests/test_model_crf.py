"""A CRF against a list of all tag sequences in float64, against pytorch-crf, and against autograd."""

import copy
import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
import torchcrf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForTokenClassification,
    LlamaConfig,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForTokenClassification,
)

from instruct_ft.atlas.facts import atlas_path
from instruct_ft.model.crf import (
    Constraints,
    CRFTagger,
    LinearChainCRF,
    bio_constraints,
    encode_words,
)
from instruct_ft.settings import InputError

BIO = ["O", "B-X", "I-X"]
BIOES = ["O", "B-X", "I-X", "E-X", "S-X"]
NAMES = ["O", "B-COUNTRY", "I-COUNTRY", "B-ELEMENT", "I-ELEMENT"]


def make(K, constraints=None, seed=0, scale=1.0):
    "A CRF with random potentials"
    crf = LinearChainCRF(K, constraints)
    draw = torch.Generator().manual_seed(seed)
    for p in crf.parameters():
        p.data = scale * (2 * torch.rand(p.shape, generator=draw) - 1)
    return crf


def legal(constraints, path):
    if constraints is None or not path:
        return True
    jumps = all(constraints.transitions[a, b] for a, b in itertools.pairwise(path))
    return bool(jumps and constraints.start[path[0]] and constraints.end[path[-1]])


def listed(crf, emissions, constraints=None):
    "Every legal tag sequence of one row with its score, float64"
    t, s, e = (p.detach().double().numpy() for p in (crf.transitions, crf.start, crf.end))
    x, found = emissions.detach().double().numpy(), {}
    for path in itertools.product(range(x.shape[1]), repeat=len(x)):
        if legal(constraints, path):
            own = sum(x[i, k] for i, k in enumerate(path))
            jumps = sum(t[a, b] for a, b in itertools.pairwise(path))
            found[path] = own + jumps + (s[path[0]] + e[path[-1]] if path else 0.0)
    return found


def log_sum(scores):
    scores = np.array(list(scores))
    return scores.max() + math.log(np.exp(scores - scores.max()).sum())


def batch(seed, B=4, T=5, K=3, scale=1.0, mask="any"):
    draw = torch.Generator().manual_seed(seed)
    x = scale * (2 * torch.rand(B, T, K, generator=draw) - 1)
    y = torch.randint(0, K, (B, T), generator=draw)
    on = torch.rand(B, T, generator=draw) < 0.7 if mask == "any" else torch.ones(B, T).bool()
    if mask == "any":
        on[0] = False  # an empty row
    return x, y, on


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and (";" in text or "give " in text), text
    return text


# ---------------------------------------------------------------- guarantees 14 to 17

CASES = [
    (3, None),
    (3, BIO),
    (5, BIOES),
    (3, np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]])),
    (2, np.array([[0, 1], [1, 0]])),  # tags alternate: never mixes, so logarithms do the work
]


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize(("K", "given_as"), CASES)
def test_g14_partition_marginals_viterbi_and_n_best_equal_enumeration(K, given_as, scale):
    for seed in range(6):
        crf = make(K, given_as, seed, scale)
        x, _, on = batch(seed, K=K, T=4, scale=scale)
        log, marginals = crf.log_partition(x.double(), on), crf.marginals(x.double(), on)
        best, many = crf.decode(x, on), crf.n_best(x, on, n=4)
        for row in range(len(x)):
            scores = listed(crf, x[row][on[row]], crf.constraints)
            total = log_sum(scores.values())
            assert log[row].item() == pytest.approx(total, rel=1e-9, abs=1e-9)
            assert tuple(best[row]) == max(scores, key=scores.get)
            order = sorted(scores, key=scores.get, reverse=True)[:4]
            assert [tuple(path) for path, _ in many[row]] == order
            chances = [math.exp(scores[path] - total) for path in order]
            assert [p for _, p in many[row]] == pytest.approx(chances, rel=1e-6, abs=1e-12)
            expected = torch.zeros(on[row].sum(), K, dtype=torch.float64)
            for path, score in scores.items():
                expected[range(len(path)), path] += math.exp(score - total)
            assert torch.allclose(marginals[row][on[row]], expected, atol=1e-9)
            assert (marginals[row][~on[row]] == 0).all()


@settings(max_examples=40, derandomize=True)
@given(seed=st.integers(0, 10**6), K=st.integers(1, 4), T=st.integers(1, 5), scale=st.floats(0, 30))
def test_g14_loss_is_minus_the_log_probability_of_the_gold_tags(seed, K, T, scale):
    crf = make(K, seed=seed, scale=scale)
    x, y, on = batch(seed, B=3, T=T, K=K, scale=scale)
    loss = crf.loss(x.double(), y, on, reduction="none")
    for row in range(3):
        scores = listed(crf, x[row][on[row]])
        wanted = log_sum(scores.values()) - scores[tuple(y[row][on[row]].tolist())]
        assert loss[row].item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "scale"), [(BIO, 1.0), (BIOES, 1.0), (BIO, 30.0), (BIOES, 30.0)]
)
def test_g15_an_illegal_sequence_has_no_probability_and_is_never_decoded(labels, scale):
    K, rules = len(labels), bio_constraints(labels)
    crf = make(K, labels, scale=scale)
    x, _, on = batch(3, B=8, K=K, scale=scale)
    log = crf.log_partition(x.double(), on)
    for row, path in enumerate(crf.decode(x, on)):
        assert legal(rules, path)
        everything = listed(crf, x[row][on[row]])
        good = [score for way, score in everything.items() if legal(rules, way)]
        assert log_sum(good) == pytest.approx(log[row].item(), rel=1e-9, abs=1e-9)
    for row in crf.n_best(x, on, n=50):
        assert all(legal(rules, path) for path, _ in row)


def test_g15_gradients_to_forbidden_transitions_are_zero():
    for scale in (1.0, 30.0):  # 30: by logarithms
        crf = make(5, BIOES, scale=scale)
        x = scale * torch.randn(2, 4, 5)
        crf.loss(x, torch.tensor([[0, 1, 2, 3], [1, 3, 0, 4]])).backward()
        rules = crf.constraints
        for p, allowed in zip((crf.transitions, crf.start, crf.end), rules, strict=True):
            assert p.grad.isfinite().all() and p.grad.abs().sum() > 0
            assert (p.grad[torch.from_numpy(~allowed)] == 0).all()


@settings(max_examples=25, derandomize=True)
@given(seed=st.integers(0, 10**6), left=st.integers(0, 3), right=st.integers(0, 3))
def test_g16_a_row_does_not_depend_on_padding_or_batch_mates(seed, left, right):
    crf = make(3, BIO, seed)
    x, _, _ = batch(seed, B=3, T=6)
    y = torch.tensor([[0, 1, 2, 2, 0, 1]] * 3)
    lengths = [6, 4, 1]
    alone = [(x[i : i + 1, :n], y[i : i + 1, :n]) for i, n in enumerate(lengths)]
    wide, tags = torch.full((4, left + 6 + right, 3), 1e4), torch.full((4, left + 6 + right), -100)
    on = torch.zeros(4, left + 6 + right).bool()  # the fourth row is empty
    for i, n in enumerate(lengths):
        begin = left + (6 - n if i == 1 else 0)  # one row is padded on the other side
        wide[i, begin : begin + n], tags[i, begin : begin + n] = x[i, :n], y[i, :n]
        on[i, begin : begin + n] = True
    loss, paths = crf.loss(wide.double(), tags, on, reduction="none"), crf.decode(wide, on)
    for i, (own, gold) in enumerate(alone):
        assert loss[i].item() == pytest.approx(crf.loss(own.double(), gold).item(), abs=1e-12)
        assert paths[i] == crf.decode(own)[0]
    assert loss[3] == 0 and paths[3] == []


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16]
)
def test_g16_a_row_does_not_depend_on_the_dtype_of_the_mask(dtype):
    crf, (x, y, on) = make(3), batch(0)
    assert torch.equal(crf.loss(x, y, on.to(dtype)), crf.loss(x, y, on))
    assert torch.equal(crf.marginals(x, on.to(dtype)), crf.marginals(x, on))
    assert crf.decode(x, on.to(dtype)) == crf.decode(x, on)


def test_g16_bf16_loss_is_within_a_thousandth_of_float64():
    crf = make(9, scale=2.0).bfloat16()
    x, y, _ = batch(0, B=4, T=128, K=9, scale=4.0, mask="all")
    half, double = copy.deepcopy(crf), copy.deepcopy(crf).double()
    low = x.bfloat16().requires_grad_()
    loss = half.loss(low, y)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(double.loss(low.double(), y).item(), rel=1e-5)
    exact = make(9, scale=2.0).double().loss(x.double(), y).item()
    assert loss.item() == pytest.approx(exact, rel=1e-3)  # the numbers themselves were rounded
    loss.backward()
    assert low.grad.dtype == torch.bfloat16 and half.transitions.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert half.loss(low, y) == loss


@pytest.mark.parametrize(("given_as", "scale"), [(None, 1.0), (BIO, 1.0), (BIO, 30.0)])
def test_g17_marginals_sum_to_one_and_are_the_slope_of_the_partition(given_as, scale):
    crf, (x, _, on) = make(3, given_as, scale=scale), batch(1, scale=scale)
    x = x.double()
    marginals = crf.marginals(x, on)
    assert torch.allclose(marginals.sum(-1), on.double(), atol=1e-12)
    leaf = x.clone().requires_grad_()
    assert torch.allclose(
        torch.autograd.grad(crf.log_partition(leaf, on).sum(), leaf)[0], marginals
    )
    h = 1e-5
    for place in [(1, 0, 0), (2, 3, 1), (3, 4, 2)]:
        up, down = x.clone(), x.clone()
        up[place] += h
        down[place] -= h
        slope = (crf.log_partition(up, on) - crf.log_partition(down, on)).sum() / (2 * h)
        assert slope.item() == pytest.approx(marginals[place].item(), abs=1e-6)


@pytest.mark.parametrize("T", [1, 2, 60])
@pytest.mark.parametrize(("K", "labels"), [(5, None), (5, BIOES), (1, None), (33, None)])
def test_g17_the_fast_backward_equals_the_autograd_reference(monkeypatch, K, labels, T):
    x, y, on = batch(2, T=T, K=K, scale=3.0)
    y = torch.zeros_like(y) if labels else y
    found = []
    for slow in (False, True):
        crf, leaf = make(K, labels, scale=2.0), x.clone().requires_grad_()
        if slow:
            monkeypatch.setattr(crf, "_mixing", None)
        rows = crf.loss(leaf, y, on, reduction="none")
        (rows * torch.tensor([3.0, 1.0, 2.0, 0.5])).sum().backward()
        found.append([rows.detach(), leaf.grad, *(p.grad for p in crf.parameters())])
    for fast, reference in zip(*found, strict=True):
        assert torch.allclose(fast, reference, atol=1e-5, rtol=1e-5)


def test_rescaling_at_every_step_changes_nothing(monkeypatch):
    from instruct_ft.model import crf as module

    crf, (x, _, on) = make(5, BIOES, scale=4.0), batch(5, T=40, K=5, scale=4.0)
    seen, scan = set(), module._scan
    monkeypatch.setattr(module, "_scan", lambda *a: (seen.add(a[-1]), scan(*a))[1])
    log = crf.log_partition(x.double(), on)
    for reach in (110, 300, 3000):
        monkeypatch.setattr(module, "_RANGE", float(reach))
        assert torch.allclose(crf.log_partition(x.double(), on), log, rtol=1e-12)
        assert torch.allclose(crf.marginals(x.double(), on).sum(-1), on.double())
    assert min(seen) <= 5 and max(seen) > 40, seen


def test_a_row_of_four_thousand_steps_neither_underflows_nor_overflows():
    crf, (x, _, _) = make(5, BIOES, scale=2.0), batch(1, B=1, T=4000, K=5, scale=4.0, mask="all")
    t, s, e = crf._potentials()
    alpha = s + x[0, 0].double()
    for step in x[0, 1:].double():
        alpha = torch.logsumexp(alpha[:, None] + t, 0) + step
    wanted = torch.logsumexp(alpha + e, 0).item()
    assert wanted > 1000  # far beyond what exp can hold
    assert crf.log_partition(x.double()).item() == pytest.approx(wanted, rel=1e-12)
    assert torch.allclose(crf.marginals(x.double()).sum(-1), torch.ones(1, 4000).double())


# ---------------------------------------------------------------- what pytorch-crf gets wrong, by name


def peer_of(crf):
    peer = torchcrf.CRF(crf.num_labels, batch_first=True)
    peer.transitions.data, peer.start_transitions.data, peer.end_transitions.data = (
        p.data.clone() for p in (crf.transitions, crf.start, crf.end)
    )
    return peer


def brute(crf, x, y, on):
    rows = []
    for e, gold, mask in zip(x, y, on, strict=True):
        scores = listed(crf, e[mask])
        rows.append(log_sum(scores.values()) - scores[tuple(gold[mask].tolist())])
    return sum(rows) / len(rows)


def test_where_both_are_right_they_agree_in_loss_gradients_and_paths():
    for seed in range(5):
        crf = make(9, seed=seed)
        peer, (x, y, _) = peer_of(crf), batch(seed, B=6, T=20, K=9, scale=3.0)
        on = torch.arange(20) < torch.randint(1, 21, (6, 1))
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss, wanted = crf.loss(mine, y, on), -peer(other, y, on, reduction="mean")
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        loss.backward(), wanted.backward()
        assert torch.allclose(mine.grad, other.grad, atol=1e-5)
        assert torch.allclose(crf.transitions.grad, peer.transitions.grad, atol=1e-4)
        assert torch.allclose(crf.start.grad, peer.start_transitions.grad, atol=1e-5)
        assert torch.allclose(crf.end.grad, peer.end_transitions.grad, atol=1e-5)
        assert crf.decode(x, on) == peer.decode(x, on)
        token = crf.loss(x, y, on, reduction="token_mean")
        assert token.item() == pytest.approx(
            -peer(x, y, on, reduction="token_mean").item(), rel=1e-5
        )


def test_fault_1_a_hole_in_the_mask():
    crf, (x, y, on) = make(3), batch(0, mask="all")
    on[:, 2] = False
    assert crf.loss(x, y, on).item() == pytest.approx(brute(crf, x, y, on), rel=1e-6)
    assert -peer_of(crf)(x, y, on, reduction="mean").item() != pytest.approx(
        brute(crf, x, y, on), rel=1e-3
    )


def test_fault_2_minus_100_under_the_mask():
    crf, (x, y, on) = make(3), batch(0, mask="all")
    on[1, 3:] = False
    assert torch.equal(crf.loss(x, y.where(on, -100), on), crf.loss(x, y, on))
    with pytest.raises(IndexError):
        peer_of(crf)(x, y.where(on, -100), on)


def test_fault_3_the_first_step_masked():
    crf, (x, y, on) = make(3), batch(0, mask="all")
    on[:, 0] = False
    assert torch.equal(crf.loss(x, y, on), crf.loss(x[:, 1:], y[:, 1:]))
    assert crf.decode(x, on) == crf.decode(x[:, 1:])
    with pytest.raises(ValueError, match="first timestep"):
        peer_of(crf)(x, y, on)


def test_fault_4_an_integer_mask():
    crf, (x, y, on) = make(3), batch(0, mask="all")
    on[1, 3:] = False
    assert torch.equal(crf.loss(x, y, on.long()), crf.loss(x, y, on))
    with pytest.raises(RuntimeError):
        peer_of(crf)(x, y, on.long())


def test_fault_5_a_float_mask():
    crf, (x, y, on) = make(3), batch(0, mask="all")
    on[1, 3:] = False
    assert torch.equal(crf.loss(x, y, on.float()), crf.loss(x, y, on))
    with pytest.raises(RuntimeError):
        peer_of(crf)(x, y, on.float())


@pytest.mark.filterwarnings("error")
def test_fault_6_no_mask_and_no_warning():
    crf, (x, y, on) = make(3), batch(0, mask="all")
    assert torch.equal(crf.loss(x, y), crf.loss(x, y, on))
    assert crf.decode(x) == crf.decode(x, on)


def test_fault_7_bfloat16():
    crf, (x, y, _) = make(9), batch(0, B=4, T=128, K=9, mask="all")
    exact = copy.deepcopy(crf).double().loss(x.double(), y).item()
    ours = crf.bfloat16().loss(x.bfloat16(), y).item()
    theirs = -peer_of(crf)(x.bfloat16(), y, reduction="mean").item()
    assert abs(ours / exact - 1) < 1e-3 < abs(theirs / exact - 1)


def test_fault_8_left_padding():
    crf, (x, y, on) = make(3), batch(0, mask="all")
    on[1, :3] = False
    assert crf.loss(x, y, on).item() == pytest.approx(brute(crf, x, y, on), rel=1e-6)
    assert crf.decode(x, on)[1] == crf.decode(x[1:2, 3:])[0]


def test_fault_9_an_empty_row():
    crf, (x, y, on) = make(3), batch(0, mask="all")
    on[2] = False
    rows = crf.loss(x, y, on, reduction="none")
    assert rows[2] == 0 and rows.mean().item() == pytest.approx(brute(crf, x, y, on), rel=1e-6)
    assert crf.decode(x, on)[2] == [] and crf.n_best(x, on)[2] == [([], 1.0)]


# ---------------------------------------------------------------- more of the layer


def test_reductions():
    crf, (x, y, on) = make(3), batch(0)
    rows = crf.loss(x, y, on, reduction="none")
    assert rows.shape == (4,)
    assert torch.allclose(crf.loss(x, y, on), rows.mean())
    assert torch.allclose(crf(x, y, on, "sum"), rows.sum())
    assert torch.allclose(crf.loss(x, y, on, reduction="token_mean"), rows.sum() / on.sum())
    assert torch.allclose(crf.log_partition(x, on) - crf.score(x, y, on), rows, atol=1e-5)


def test_it_starts_as_the_linear_head():
    crf, (x, y, on) = LinearChainCRF(3), batch(0)
    plain = nn.functional.cross_entropy(x[on], y[on], reduction="sum")
    assert torch.allclose(crf.loss(x, y, on, reduction="sum"), plain)
    assert [k for row in crf.decode(x, on) for k in row] == x[on].argmax(1).tolist()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (3, 4)])
def test_a_batch_in_which_nothing_counts(shape):
    crf, x = make(3, BIO), torch.full((*shape, 3), math.nan, requires_grad=True)
    off = torch.zeros(shape).bool()
    loss = crf.loss(x, torch.full(shape, -100), off)
    loss.backward()
    assert loss == 0 and crf.transitions.grad.abs().sum() == 0
    assert crf.decode(x, off) == [[]] * shape[0]
    assert crf.marginals(x, off).shape == (*shape, 3) and (crf.marginals(x, off) == 0).all()
    assert (
        crf.log_partition(x, off).tolist()
        == crf.score(x, off.long(), off).tolist()
        == [0] * shape[0]
    )


def test_what_is_under_the_mask_is_never_looked_at():
    crf, (x, y, on) = make(3, BIO), batch(4)
    y = torch.zeros_like(y)
    dirty, tags = x.clone(), y.clone()
    dirty[~on], tags[~on] = math.nan, 10**6
    dirty, clean = dirty.requires_grad_(), x.clone().requires_grad_()
    losses = crf.loss(dirty, tags, on), crf.loss(clean, y, on)
    for loss in losses:
        loss.backward()
    assert losses[0] == losses[1] and torch.equal(dirty.grad, clean.grad)
    assert (dirty.grad[~on] == 0).all()
    assert crf.decode(dirty, on) == crf.decode(clean, on)


def test_inputs_and_parameters_are_not_changed():
    crf, (x, y, on) = make(5, BIOES), batch(0, K=5)
    y = torch.zeros_like(y)
    before = [t.clone() for t in (x, y, on, *crf.parameters())]
    crf.loss(x, y, on).backward()
    crf.decode(x, on), crf.marginals(x, on), crf.n_best(x, on), crf.score(x, y, on)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (x, y, on, *crf.parameters()), strict=True)
    )


def test_strided_emissions_and_no_grad():
    crf, (x, y, on) = make(3), batch(0)
    loss = crf.loss(x, y, on)
    other = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(crf.loss(other, y, on), loss) and crf.decode(other, on) == crf.decode(x, on)
    with torch.no_grad():
        assert torch.allclose(crf.loss(x, y, on), loss)
    x.requires_grad_()
    crf.requires_grad_(False).loss(x, y, on).backward()
    assert x.grad.abs().sum() > 0


def test_weights_are_three_tables_and_constraints_are_none():
    crf = make(5, BIOES)
    assert {k: tuple(v.shape) for k, v in crf.state_dict().items()} == {
        "transitions": (5, 5), "start": (5,), "end": (5,)
    }  # fmt: skip
    LinearChainCRF(5).load_state_dict(crf.state_dict())
    x = torch.randn(2, 4, 5)
    assert copy.deepcopy(crf).decode(x) == crf.decode(x)


@settings(max_examples=30, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30))
def test_n_best_begins_with_the_decoded_path_and_falls(seed, n):
    crf, (x, _, on) = make(3, BIO, seed), batch(seed, T=3)
    for row, best in zip(crf.n_best(x, on, n=n), crf.decode(x, on), strict=True):
        assert row[0][0] == best and len({tuple(path) for path, _ in row}) == len(row) <= n
        chances = [p for _, p in row]
        assert chances == sorted(chances, reverse=True) and sum(chances) <= 1 + 1e-9


def test_long_rows_of_every_length_decode_to_the_best_path():
    crf = make(4, seed=3)
    x, _, _ = batch(3, B=9, T=17, K=4, scale=2.0, mask="all")
    on = torch.arange(17) < torch.arange(9, 18)[:, None]
    t, s, e = (p.detach().double() for p in (crf.transitions, crf.start, crf.end))
    for row, path in zip(x.double(), crf.decode(x, on), strict=True):
        delta = s + row[0]
        for step in row[1 : len(path)]:
            delta = (delta[:, None] + t).amax(0) + step
        best = (delta + e).max()
        tags = torch.tensor(path)
        score = (
            s[tags[0]]
            + e[tags[-1]]
            + row[range(len(path)), path].sum()
            + t[tags[:-1], tags[1:]].sum()
        )
        assert score.item() == pytest.approx(best.item(), abs=1e-9)


def test_potentials_beyond_the_range_of_float64_probabilities():
    crf = make(3, BIO)
    crf.transitions.data[1, 1] = -5000.0
    x = torch.zeros(1, 6, 3)
    x[0, :3, 0], x[0, 3:, 1], x[0, 5, 2] = 900.0, 1200.0, torch.finfo(torch.float32).min
    leaf = x.double().requires_grad_()
    scores = listed(crf, leaf[0], crf.constraints)
    assert crf.log_partition(leaf).item() == pytest.approx(log_sum(scores.values()), rel=1e-12)
    assert tuple(crf.decode(x)[0]) == max(scores, key=scores.get)
    crf.log_partition(leaf).sum().backward()
    assert torch.allclose(leaf.grad, crf.marginals(leaf.detach())) and leaf.grad.isfinite().all()


# ---------------------------------------------------------------- constraints


def test_bio_rules():
    rules = bio_constraints(["O", "B-X", "I-X", "B-Y", "I-Y"])
    assert rules.start.tolist() == [1, 1, 0, 1, 0] and rules.end.all()
    into = {name: rules.transitions[:, k].astype(int).tolist() for k, name in enumerate("OBIby")}
    assert into == {
        "O": [1] * 5,
        "B": [1] * 5,
        "I": [0, 1, 1, 0, 0],
        "b": [1] * 5,
        "y": [0, 0, 0, 1, 1],
    }


@pytest.mark.parametrize(
    "labels", [BIOES, ["O", "B-X", "I-X", "L-X", "U-X"], ["O", "B-X", "M-X", "E-X", "S-X"]]
)
def test_bioes_rules_under_all_their_names(labels):
    rules = bio_constraints(labels)
    free, inside = [1, 1, 0, 0, 1], [0, 0, 1, 1, 0]
    assert rules.transitions.astype(int).tolist() == [free, inside, inside, free, free]
    assert rules.start.astype(int).tolist() == free and rules.end.astype(int).tolist() == [
        1,
        0,
        0,
        1,
        1,
    ]


def test_word_segmentation_tags_without_types():
    rules = bio_constraints(["B", "M", "E", "S"])
    assert rules.transitions.astype(int).tolist() == [
        [0, 1, 1, 0],
        [0, 1, 1, 0],
        [1, 0, 0, 1],
        [1, 0, 0, 1],
    ]


def test_constraints_in_three_forms_are_one():
    rules = bio_constraints(BIO)
    x = torch.randn(5, 7, 3)
    paths = [
        make(3, form).decode(x)
        for form in (BIO, tuple(BIO), rules, Constraints(*map(torch.from_numpy, rules)))
    ]
    assert all(p == paths[0] for p in paths)
    table = make(3, rules.transitions)
    assert table.constraints.start.all() and np.array_equal(
        table.constraints.transitions, rules.transitions
    )
    assert make(3, torch.from_numpy(rules.transitions)).decode(x) == table.decode(x)


def test_constraints_that_leave_no_sequence_of_a_length_are_named():
    crf = make(
        2, Constraints(np.array([[0, 1], [1, 0]]), np.array([1, 0]), np.array([0, 1]))
    )  # even only
    x, on = torch.zeros(2, 3, 2), torch.tensor([[1, 1, 0], [1, 1, 1]])
    for call in (crf.decode, crf.log_partition, crf.marginals, crf.n_best):
        assert "row 1" in refusal(call, x, on)
    assert crf.decode(x[:1], on[:1]) == [[0, 1]]


@pytest.mark.parametrize(
    ("given_as", "says"),
    [
        (["O", "B-X"], "3 tags"),
        (["O", "B-X", "X"], "'X'"),
        (["O", "B-X", "B-X"], "once"),
        (["O", "O-X", "B-X"], "'O-X'"),
        (np.ones((2, 2)), "(3, 3)"),
        (np.zeros((3, 3, 3)), "(3, 3)"),
        ("BIO", "(3, 3)"),
        (True, "(3, 3)"),
        ([1, 2], "(3, 3)"),
        (Constraints(np.zeros((3, 3)), np.zeros(3), np.ones(3)), "no sequence"),
    ],
)
def test_constraints_that_do_not_fit_are_refused_in_a_sentence(given_as, says):
    assert says in refusal(LinearChainCRF, 3, given_as)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("shape", [(5, 3), (4, 5, 2), (4, 5, 3, 1)])
def test_emissions_of_another_shape(shape):
    crf = make(3)
    for call in (crf.decode, crf.marginals, crf.log_partition, crf.n_best):
        assert "(B, T, 3)" in refusal(call, torch.zeros(shape))
    refusal(crf.loss, torch.zeros(shape), torch.zeros(4, 5).long())
    refusal(crf.loss, torch.zeros(4, 5, 3).long(), torch.zeros(4, 5).long())
    refusal(crf.loss, [[0.0]], torch.zeros(4, 5).long())


def test_masks_and_tags_of_another_shape():
    crf, (x, y, on) = make(3), batch(0)
    assert "mask" in refusal(crf.loss, x, y, on[:, :-1])
    assert "mask" in refusal(crf.decode, x, on.T)
    assert "mask" in refusal(crf.decode, x, [[True]])
    assert "tags" in refusal(crf.loss, x, y[:2], on)
    assert "tags" in refusal(crf.loss, x, y.float(), on)


@pytest.mark.parametrize("bad", [-100, -1, 3])
def test_tags_out_of_range_are_named_by_row_and_step(bad):
    crf, (x, y, on) = make(3), batch(0, mask="all")
    y[2, 3] = bad
    assert f"{bad} at row 2, step 3" in refusal(crf.loss, x, y)
    on[:, 0] = False
    assert f"{bad} at row 2, step 3" in refusal(crf.score, x, y, on)


def test_gold_tags_that_the_constraints_forbid_are_named():
    crf, x = make(5, BIOES), torch.zeros(2, 4, 5)
    good = [0, 1, 3, 4]
    for bad, step in (([2, 3, 0, 0], 0), ([0, 1, 0, 0], 2), ([0, 0, 0, 1], 3), ([0, 3, 0, 0], 1)):
        assert f"row 1, step {step} " in refusal(crf.loss, x, torch.tensor([good, bad]))
    on = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0]])
    assert "row 1, step 2 " in refusal(crf.loss, x, torch.tensor([good, [0, 0, 3, 0]]), on)
    assert crf.loss(x, torch.tensor([good, good])).isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_emissions_that_are_not_finite_are_named(bad):
    crf, (x, y, on) = make(3), batch(0, mask="all")
    x[1, 4, 2] = bad
    for call in ((crf.loss, x, y), (crf.marginals, x), (crf.log_partition, x)):
        assert f"{bad} at row 1, step 4, label 2" in refusal(*call)
    if bad != -math.inf:  # in decoding that is a tag which is never chosen
        assert "row 1, step 4" in refusal(crf.decode, x)
    on[1, 4] = False
    assert crf.loss(x, y, on).isfinite() and len(crf.decode(x, on)[1]) == 4


def test_parameters_that_are_not_finite_are_named():
    crf, (x, y, _) = make(3, BIO), batch(0, mask="all")
    crf.transitions.data[0, 1] = math.nan
    for call in ((crf.loss, x, torch.zeros_like(y)), (crf.decode, x)):
        assert "transitions" in refusal(*call)


def test_other_settings_that_are_refused():
    crf, (x, y, on) = make(3), batch(0)
    assert "mean, sum, none, token_mean" in refusal(crf.loss, x, y, on, "average")
    assert "n = 0" in refusal(crf.n_best, x, on, 0)
    assert "num_labels" in refusal(LinearChainCRF, 0)
    assert "num_labels" in refusal(LinearChainCRF, BIO)


# ---------------------------------------------------------------- on an encoder

IDS = dict(id2label=dict(enumerate(NAMES)), label2id={n: k for k, n in enumerate(NAMES)})
SIZE = dict(
    vocab_size=6144,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)
ROWS = [
    ["Giant", "panda", "eats", "chromium"],
    ["锕", "与", "哈", "萨", "克", "斯", "坦"],
    ["Peru"],
]
GOLD = [
    ["O", "O", "O", "B-ELEMENT"],
    ["B-ELEMENT", "O", "B-COUNTRY", *["I-COUNTRY"] * 4],
    ["B-COUNTRY"],
]


def tagger(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForTokenClassification(
            BertConfig(max_position_embeddings=40, **SIZE, **IDS)
        ).eval()
    if kind == "roberta":
        return RobertaForTokenClassification(
            RobertaConfig(max_position_embeddings=42, **SIZE, **IDS)
        ).eval()
    if kind == "llama":
        return LlamaForTokenClassification(
            LlamaConfig(max_position_embeddings=40, pad_token_id=0, **SIZE, **IDS)
        ).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=6144, n_embd=16, n_layer=2, n_head=2, n_positions=40, **IDS)
        return GPT2ForTokenClassification(config).eval()
    config = T5Config(
        vocab_size=6144, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **IDS
    )
    return T5ForTokenClassification(config).eval()


FAMILIES = {
    "bert": "encoder",
    "roberta": "decoder",
    "llama": "decoder",
    "gpt2": "decoder",
    "t5": "encoder",
}


@cache
def shipped_tokenizer(name):
    return AutoTokenizer.from_pretrained(atlas_path(name))


def tokenizer_of(kind):
    tok = copy.deepcopy(shipped_tokenizer(FAMILIES[kind]))
    tok.pad_token = tok.pad_token or tok.eos_token
    return tok


@pytest.mark.parametrize("kind", FAMILIES)
def test_on_every_family_it_learns_and_comes_back_from_disk(kind, tmp_path):
    tok, model = tokenizer_of(kind), CRFTagger.around(tagger(kind))
    encoded = encode_words(ROWS, tok, GOLD, NAMES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    first = model(**encoded).loss.item()
    for _ in range(30):
        model(**encoded).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**encoded).loss.item() < 0.5 * first
    assert model.crf.transitions.abs().sum() > 0
    model.save_pretrained(tmp_path)
    for again in (
        CRFTagger.from_pretrained(tmp_path),
        AutoModelForTokenClassification.from_pretrained(tmp_path),
    ):
        assert type(again) is CRFTagger and not again.training
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        )
        assert torch.equal(again(**encoded).loss, model(**encoded).loss)
        assert again.tag(ROWS, tok) == model.tag(ROWS, tok)
        assert again.crf.constraints is not None and again.config.id2label == model.config.id2label


def test_around_takes_the_weights_as_they_are():
    linear = tagger("bert")
    linear.classifier.bias.data[2] = 1.0  # I-COUNTRY everywhere
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    model = CRFTagger.around(linear, constrained=False)
    assert model.tagger is linear and all(
        torch.equal(before[k], v) for k, v in linear.state_dict().items()
    )
    tok = tokenizer_of("bert")
    encoded = encode_words(ROWS, tok, GOLD, NAMES)
    on = encoded["labels"] != -100
    best = linear(encoded["input_ids"], encoded["attention_mask"]).logits.argmax(-1)
    expected = [[NAMES[k] for k in row[mask]] for row, mask in zip(best, on, strict=True)]
    assert model.tag(ROWS, tok) == expected
    assert any(not legal(bio_constraints(NAMES), [NAMES.index(t) for t in row]) for row in expected)
    for row in CRFTagger.around(linear).tag(ROWS, tok):
        assert legal(bio_constraints(NAMES), [NAMES.index(t) for t in row])


def test_it_is_saved_in_half_precision_and_loaded_in_full(tmp_path):
    model = CRFTagger.around(tagger("bert"))
    model.crf.transitions.data.normal_()
    model.half().save_pretrained(tmp_path)
    again = CRFTagger.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.crf.transitions, model.crf.transitions.float())
    assert {p.dtype for p in CRFTagger.from_pretrained(tmp_path, dtype="auto").parameters()} == {
        torch.float16
    }


def test_only_first_sub_tokens_carry_labels():
    tok = tokenizer_of("bert")
    encoded = encode_words(
        [["Unbelievableness", "and", "Peru"]], tok, [["B-COUNTRY", "O", "B-COUNTRY"]], NAMES
    )
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    words = tok(["Unbelievableness", "and", "Peru"], is_split_into_words=True).word_ids()
    firsts = [words.index(w) for w in range(3)]
    assert [NAMES[k] for k in labels[firsts]] == ["B-COUNTRY", "O", "B-COUNTRY"]
    assert (labels != -100).sum() == 3 < len(ids) - 2 and labels[0] == labels[-1] == -100


@pytest.mark.parametrize(("kind", "side"), [("bert", "right"), ("t5", "right"), ("t5", "left")])
def test_a_row_is_tagged_as_it_is_alone(kind, side):
    tok, model = tokenizer_of(kind), CRFTagger.around(tagger(kind))
    model.crf.transitions.data.normal_()
    tok.padding_side = side
    together = model.train().tag(ROWS, tok, batch_size=2)
    assert together == [model.tag([row], tok)[0] for row in ROWS] and model.training


def test_words_without_a_token_do_not_break_a_name():
    tok, model = tokenizer_of("bert"), CRFTagger.around(tagger("bert"))
    weight, bias = model.tagger.classifier.weight, model.tagger.classifier.bias
    weight.data.zero_(), bias.data.zero_()
    bias.data[2] = 5.0  # I-COUNTRY wherever it may be
    found = model.tag([["\u200b", "New", "\u200b", "Zealand", "\u200b"]], tok)[0]
    assert found == ["O", "B-COUNTRY", "I-COUNTRY", "I-COUNTRY", "O"]
    assert model.tag([["\u200b"]], tok) == [["O"]]


def test_what_is_no_tagger_and_what_are_no_words_is_refused():
    tok, model = tokenizer_of("bert"), CRFTagger.around(tagger("bert"))
    small = {k: v for k, v in SIZE.items() if k != "vocab_size"}
    assert "token-classification" in refusal(
        CRFTagger.around, BertForMaskedLM(BertConfig(vocab_size=9, **small))
    )
    assert "LABEL_0" in refusal(
        CRFTagger.around, BertForTokenClassification(BertConfig(vocab_size=9, **small))
    )
    for bad in ("Giant panda", ["Giant panda"], [["Giant", 3]], [[]]):
        refusal(model.tag, bad, tok)
    assert model.tag([], tok) == []
    assert "row 33" in refusal(model.tag, [["panda"]] * 33 + [["panda"] * 60], tok)
    assert "row 1" in refusal(encode_words, ROWS[:2], tok, [GOLD[0], GOLD[1][:-1]], NAMES)
    assert "row 0" in refusal(encode_words, ROWS[:1], tok, [["X"] * 4], NAMES)


def test_the_configuration_is_plain_json(tmp_path):
    model = CRFTagger.around(tagger("bert"), constrained=False)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "crf-tagger" and config.tagger["model_type"] == "bert"
    assert (
        config.constrained is False and CRFTagger.from_pretrained(tmp_path).crf.constraints is None
    )

"""kernels/ against float64 full logits made from the hidden states, with nothing of kernels/ in the oracle.

Run as it is, the rows of logits go through rows_torch.py; with TRITON_INTERPRET=1 in the environment the same laws are asked
of rows_triton.py (tests/test_kernels_triton.py starts that run). On a GPU tests/test_kernels_cuda.py asks them.
"""
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import head as head_module
from kernels import rows_torch
from kernels.divergence import Divergence
from kernels.head import TokenStats, head_loss, token_stats

TRITON = os.environ.get("TRITON_INTERPRET") == "1"
rows = pytest.importorskip("kernels.rows_triton") if TRITON else rows_torch
if TRITON:  # the interpreter takes 30 ms for a row: few and short ones, which still have several blocks
    as_on_a_gpu = rows.blocks
    rows.blocks = lambda vocabulary, most: as_on_a_gpu(vocabulary, most // 16)
BLOCK = 64 if TRITON else 128  # columns that the backend reads at a time
reference_only = pytest.mark.skipif(TRITON, reason="says nothing about rows_triton.py")

DIVERGENCES = {
    "reverse": Divergence("reverse_kl"),
    "forward": Divergence("forward_kl"),
    "jsd": Divergence("jsd", beta=0.3),
    "jsd at beta 0 is forward": Divergence("jsd", beta=0.0),
    "jsd at beta 1 is reverse": Divergence("jsd", beta=1.0),
    "mixed": Divergence("mixed_kl", beta=0.3),
    "clipped (OPSD)": Divergence("forward_kl", clip=0.02),
    "top-1 and tail": Divergence("reverse_kl", top_k=1),
    "student's top-5 and tail (SDPO)": Divergence("jsd", beta=0.5, top_k=5),
    "teacher's top-5 and tail": Divergence("forward_kl", top_k=5, support="teacher"),
    "teacher's top-5 renormalised (SD-Zero)": Divergence("mixed_kl", beta=0.5, top_k=5, support="teacher", tail=False),
    "student's top-5 renormalised": Divergence("reverse_kl", top_k=5, tail=False),
}
KINDS = ("mixed", "jsd", "clipped (OPSD)")  # one for each way through the kernels


@pytest.fixture(autouse=True)
def one_thread():
    """Products of this size gain nothing from threads, and on a busy machine wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# the oracle: float64, full logits, the formulas as the papers print them
# ---------------------------------------------------------------------------------------------------------------------
def oracle(hidden: Tensor, head: Tensor, y: Tensor, teacher_hidden: Tensor, teacher_head: Tensor,
           divergence: Divergence, temperature: float = 1.0) -> TokenStats:
    return oracle_of_logits(hidden.double() @ head.double().T, teacher_hidden.double() @ teacher_head.double().T, y,
                            divergence, temperature)


def oracle_of_logits(z: Tensor, zt: Tensor, y: Tensor, divergence: Divergence, temperature: float = 1.0) -> TokenStats:
    lp = torch.log_softmax(z / temperature, -1)
    lq = torch.log_softmax(zt / temperature, -1).detach()
    at = torch.arange(len(y))
    # 0·log 0 = 0, for entries without mass
    entropy, teacher_entropy = (-torch.where(l > -torch.inf, l.exp() * l, 0.0).sum(-1) for l in (lp, lq))
    greedy = (lq[at, y] == lq.amax(-1)).double()
    a, b = lp, lq
    if divergence.top_k:
        chosen = (lp if divergence.support == "student" else lq).topk(min(divergence.top_k, lp.shape[1])).indices
        a, b = lp.gather(-1, chosen), lq.gather(-1, chosen)
        if not divergence.tail:
            a, b = a.log_softmax(-1), b.log_softmax(-1)
        elif chosen.shape[1] < lp.shape[1]:
            outside = torch.ones_like(lp).scatter(-1, chosen, 0) == 0
            a, b = (torch.cat([kept, full.masked_fill(outside, -torch.inf).logsumexp(-1, keepdim=True)], -1)
                    for kept, full in ((a, lp), (b, lq)))
    return TokenStats(lp[at, y], entropy, lq[at, y], teacher_entropy, greedy, divergence_of(a, b, divergence))


def divergence_of(a: Tensor, b: Tensor, divergence: Divergence) -> Tensor:
    """of log-probabilities a (student) and b (teacher), [T, V]."""
    p, q, beta = a.exp(), b.exp(), divergence.beta

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(first.exp() > 0, first.exp() * (first - second), 0.0).sum(-1)

    match divergence.kind:
        case "reverse_kl":
            return kl(a, b)
        case "forward_kl":
            return torch.where(q > 0, q * (b - a), 0.0).clamp(max=divergence.clip or math.inf).sum(-1)
        case "mixed_kl":
            return beta * kl(a, b) + (1 - beta) * kl(b, a)
        case "jsd" if beta in (0, 1):
            return kl(a, b) if beta else kl(b, a)
    m = (beta * q + (1 - beta) * p).log()
    return beta * kl(b, m) + (1 - beta) * kl(a, m)


# ---------------------------------------------------------------------------------------------------------------------
# cases
# ---------------------------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    hidden: Tensor
    head: Tensor
    y: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    weights: "Weights"


class Weights(NamedTuple):
    """The upstream gradients of log p_y, H and kl."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor


def case(tokens: int, vocabulary: int, width: int = 8, dtype: torch.dtype = torch.float32, spread: float = 1.0,
         gap: float = 1.0, seed: int = 0) -> Case:
    """Random hidden states and heads; logits of standard deviation `spread`, the teacher's at `gap` from them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, head = normal(tokens, width) * spread, normal(vocabulary, width) / width**0.5
    teacher_hidden, teacher_head = hidden + gap * normal(tokens, width), head + 0.1 * gap * normal(vocabulary, width)
    y = torch.randint(vocabulary, (tokens,), generator=g)
    return Case(hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), y, teacher_hidden.to(dtype),
                teacher_head.to(dtype), Weights(*normal(3, tokens).to(torch.promote_types(dtype, torch.float32))))


def weighted(stats: TokenStats, weights: Weights) -> Tensor:
    return weights.logp * stats.logp + weights.entropy * stats.entropy + weights.kl * stats.kl


def gradients(loss: Tensor, c: Case) -> list[Tensor]:
    return list(torch.autograd.grad(loss, (c.hidden, c.head)))


def both_modes(c: Case, divergence: Divergence, temperature: float = 1.0) -> list[tuple]:
    """(loss, stats, [gradient of hidden, of head]) through head_loss and, unless interpreted, through token_stats."""
    inputs, options = (c.hidden, c.head, c.y), {"divergence": divergence, "temperature": temperature}
    loss, stats = head_loss(weighted, *inputs, c.weights, c.teacher_hidden, c.teacher_head, **options)
    out = [(loss, stats, gradients(loss, c))]
    if TRITON:  # the same kernels for the same rows
        return out
    stats = token_stats(*inputs, c.teacher_hidden, c.teacher_head, **options)
    loss = weighted(stats, c.weights).sum()
    return [*out, (loss, stats, gradients(loss, c))]


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the largest of what is expected; what is 0 may be 1e-14."""
    actual, expected = actual.detach().double().flatten(), expected.detach().double().flatten()
    assert actual.shape == expected.shape
    error, scale = (actual - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * scale + 1e-14, f"{what}: off by {error:.3g} where the largest is {scale:.3g}"


def agrees_with_oracle(c: Case, divergence: Divergence, tolerance: float, temperature: float = 1.0) -> None:
    expected = oracle(*c[:5], divergence, temperature)
    loss = weighted(expected, c.weights).sum()
    expected_gradients = gradients(loss, c)
    for loss_here, stats, grads in both_modes(c, divergence, temperature):
        for name, value, right in zip(TokenStats._fields, stats, expected):
            close(value, right, tolerance, name)
        for name, value, right in zip(("d hidden", "d head"), grads, expected_gradients):
            close(value, right, tolerance, name)
        assert abs(loss_here - loss) <= tolerance * weighted(expected, c.weights).abs().sum()


# ---------------------------------------------------------------------------------------------------------------------
# values and gradients
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_are_those_of_full_logits_in_float64(name):
    # 5e-6: fp32 logits of size 5 carry errors of 1e-6
    for vocabulary in (6, BLOCK, BLOCK + 1)[-1 if TRITON else 0 :]:
        agrees_with_oracle(case(5, vocabulary), DIVERGENCES[name], 5e-6, temperature=1.3)


@reference_only
@pytest.mark.parametrize("name", DIVERGENCES)
def test_float64_in_float64_throughout(name):
    agrees_with_oracle(case(9, 61, dtype=torch.float64), DIVERGENCES[name], 1e-12, temperature=0.7)


@reference_only
@pytest.mark.parametrize("name", ["reverse", "jsd", "student's top-5 and tail (SDPO)"])
def test_gradcheck(name):
    c = case(3, 7, width=4, dtype=torch.float64)

    def differentiable(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        stats = token_stats(hidden, head, c.y, c.teacher_hidden, c.teacher_head, divergence=DIVERGENCES[name])
        return stats.logp, stats.entropy, stats.kl

    assert torch.autograd.gradcheck(differentiable, (c.hidden, c.head))


@pytest.mark.parametrize("vocabulary", [1, 2, BLOCK, 300] if TRITON else [1, 2, 31, BLOCK, 1000, 5003])
def test_any_vocabulary_size(vocabulary):
    for name in ("reverse", "jsd", "student's top-5 and tail (SDPO)")[1 if TRITON else 0 :]:
        agrees_with_oracle(case(3, vocabulary), DIVERGENCES[name], 1e-5)


@pytest.mark.parametrize("temperature", [0.05] if TRITON else [0.05, 1.1, 5.0])
def test_temperature_divides_both_models_logits(temperature):
    agrees_with_oracle(case(5, 40), DIVERGENCES["reverse"], 2e-5, temperature)  # at 0.05, logits of 100 rounded to fp32


def test_no_token_and_one_token():
    for tokens in (0, 1):
        c = case(tokens, 12)
        for loss, stats, (d_hidden, d_head) in both_modes(c, Divergence()):
            assert all(x.shape == (tokens,) for x in stats) and loss.shape == ()
            assert d_hidden.shape == c.hidden.shape and d_head.shape == c.head.shape
            if tokens == 0:
                assert loss == 0 and not d_head.any()
    agrees_with_oracle(case(1, 12), Divergence(), 5e-6)


@reference_only
def test_three_symbols_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): both KLs are ¼·log 2, and of m = (3/8, 1/4, 3/8) the JSD is
    ½·log(4/3) + ¼·log(2/3)."""
    logits = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]) * math.log(2)
    for kind, expected in {"reverse_kl": math.log(2) / 4, "forward_kl": math.log(2) / 4,
                           "jsd": math.log(4 / 3) / 2 + math.log(2 / 3) / 4}.items():
        stats = token_stats(logits[:1], torch.eye(3), torch.tensor([2]), logits[1:], divergence=Divergence(kind))
        assert stats.kl.item() == pytest.approx(expected, rel=1e-6)
        assert stats.logp.item() == pytest.approx(math.log(1 / 4))
        assert stats.teacher_logp.item() == pytest.approx(math.log(1 / 2))
        assert stats.teacher_greedy == 1 and stats.entropy.item() == pytest.approx(1.5 * math.log(2))


@reference_only
def test_the_two_directions_are_not_mixed_up():
    """p = (1/2, 1/2), q = (3/4, 1/4): KL(p‖q) = ½·log(4/3), KL(q‖p) = ¾·log(3/2) + ¼·log(1/2)."""
    z, zt = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    reverse, forward = (token_stats(z, torch.eye(2), torch.tensor([0]), zt, divergence=Divergence(kind)).kl.item()
                        for kind in ("reverse_kl", "forward_kl"))
    assert reverse == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert forward == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


@settings(max_examples=2 if TRITON else 25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0.01, 30), st.floats(0.01, 30))
def test_laws_of_divergences(seed, vocabulary, spread, gap):
    c = case(4, vocabulary, spread=spread, gap=gap, seed=seed)
    for name in KINDS if TRITON else DIVERGENCES:
        divergence = DIVERGENCES[name]
        kl = token_stats(*c[:5], divergence=divergence).kl
        if divergence.clip is None:
            assert (kl >= -1e-6).all(), name  # and never clamped, which would take the gradient away
        if divergence.kind == "jsd" and 0 < divergence.beta < 1:
            assert (kl <= math.log(2) + 1e-6).all()


@settings(max_examples=2 if TRITON else 25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-64, 64), st.floats(-64, 64))
def test_a_constant_on_all_logits_changes_nothing_and_gradients_of_a_row_sum_to_0(seed, shift, teacher_shift):
    g = torch.Generator().manual_seed(seed)
    z, zt = torch.randn(2, 3, 50, generator=g)
    y = torch.randint(50, (3,), generator=g)
    for name in ("reverse", "forward", "jsd"):
        plain, dz = row_gradient(z, zt, y, DIVERGENCES[name])
        moved, dz_moved = row_gradient(z + shift, zt + teacher_shift, y, DIVERGENCES[name])
        for a, b in zip(plain, moved):
            assert (a - b).abs().max() < 3e-5  # z + shift itself is rounded to 4e-6
        close(dz_moved, dz, 3e-5)
        assert dz.sum(-1).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# rows of logits as they come, extremes and digits
# ---------------------------------------------------------------------------------------------------------------------
def row_gradient(z: Tensor, zt: Tensor, y: Tensor, divergence: Divergence, s: float = 1.0) -> tuple[TokenStats, Tensor]:
    """TokenStats of given logits and the gradient of Σ logp + entropy + kl with respect to z."""
    chunk = head_module.Chunk(z.clone(), zt.clone(), y, head_module.Settings((1.0,), divergence, s))
    one = torch.ones(len(y), dtype=z.dtype)
    out = torch.empty_like(z)
    chunk.gradient(rows_torch.Upstream(one, one, one, 0 * one), out)
    return chunk.stats, out


EXTREMES = {
    "all +1e4": lambda z, zt: (z + 1e4, zt + 1e4),
    "student's +1e4": lambda z, zt: (z + 1e4, zt),
    "all −300": lambda z, zt: (torch.full_like(z, -300), torch.full_like(zt, -300)),
    "one-hot student, flat teacher": lambda z, zt: (one_hot(z, 0), torch.zeros_like(zt)),
    "flat student, one-hot teacher": lambda z, zt: (torch.zeros_like(z), one_hot(zt, 0)),
    "one-hot both, elsewhere": lambda z, zt: (one_hot(z, 0), one_hot(zt, 1)),
    "the same columns masked": lambda z, zt: (masked(z), masked(zt)),
}


def one_hot(z: Tensor, column: int) -> Tensor:
    return torch.zeros_like(z).index_fill(-1, torch.tensor([column]), 90.0)


def masked(z: Tensor) -> Tensor:
    return z.index_fill(-1, torch.tensor([3, 4, 49]), -torch.inf)


ALL_KINDS = ["reverse", "forward", "jsd", "mixed", "clipped (OPSD)", "teacher's top-5 and tail"]


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", KINDS if TRITON else ALL_KINDS)
def test_extreme_logits(extreme, name):
    z, zt = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    z, zt = EXTREMES[extreme](z, zt)
    y, d = torch.tensor([0, 1, 2]), DIVERGENCES[name]
    stats, dz = row_gradient(z, zt, y, d)
    alive = z[0] > -torch.inf  # the oracle never sees the masked columns
    z64 = z[:, alive].double().requires_grad_()
    expected = oracle_of_logits(z64, zt[:, alive].double(), y, d)
    (expected_dz,) = torch.autograd.grad((expected.logp + expected.entropy + expected.kl).sum(), z64)
    assert (dz[:, ~alive] == 0).all()
    tolerance = 2e-6
    if extreme == "student's +1e4":
        tolerance = 2e-3  # the difference of a logit near 1e4 and one near 0 is rounded to 1e-3
    elif d.clip and "one-hot" in extreme:
        tolerance = 2e-5  # the sum of bounded terms, 0.02, is made with a sum of q − p, whose terms are of size 1
    for field, value, right in zip(TokenStats._fields, stats, expected):
        close(value, right, tolerance, field)
    close(dz[:, alive], expected_dz, tolerance, "dz")


def test_a_column_that_one_model_alone_has_masked():
    z, zt = torch.randn(2, 2, 50, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, 1])
    finite = (("reverse", masked(z), zt), ("forward", z, masked(zt)), ("jsd", masked(z), zt), ("jsd", z, masked(zt)))
    for name, a, b in finite:
        stats, dz = row_gradient(a, b, y, DIVERGENCES[name])
        expected = oracle_of_logits(a.double(), b.double(), y, DIVERGENCES[name])
        close(stats.kl, expected.kl, 2e-6, name)
        assert dz.isfinite().all() and (name == "forward" or b is not zt or (dz[:, 3] == 0).all())
    infinite, _ = row_gradient(z, masked(zt), y, DIVERGENCES["reverse"])
    assert (infinite.kl > 1e20).all()  # mass where the teacher has none


RULED_OUT = {  # who has no mass (student, teacher), and at which of the columns
    "teacher, at the target": (False, True, "target"),
    "teacher, at the student's mode": (False, True, "student's mode"),
    "student, at the target": (True, False, "target"),
    "student, at the teacher's mode": (True, False, "teacher's mode"),
    "both, at the target": (True, True, "target"),
    "both, at the student's mode": (True, True, "student's mode"),
}


@pytest.mark.parametrize("where", RULED_OUT)
def test_what_a_model_rules_out_spoils_no_value_and_no_gradient(where):
    """Only the divergences that are finite there: the forward KL when the teacher has no mass, the
    reverse KL when the student has none. The oracle's logit is −700, whose exp() is 1e-304."""
    by_student, by_teacher, place = RULED_OUT[where]
    z, zt = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(8))
    y = torch.tensor([0, 5, 7])
    places = {"target": y, "student's mode": z.argmax(-1), "teacher's mode": zt.argmax(-1)}
    column = places[place][:, None]
    z64, zt64 = z.double(), zt.double()
    names = ["jsd", "student's top-5 and tail (SDPO)"]
    if by_student:
        z, z64 = z.scatter(-1, column, -torch.inf), z64.scatter(-1, column, -700.0)
        names += ["reverse", "student's top-5 renormalised"]
    if by_teacher:
        zt, zt64 = zt.scatter(-1, column, -torch.inf), zt64.scatter(-1, column, -700.0)
        names += ["forward", "clipped (OPSD)", "teacher's top-5 and tail"]
    one = torch.ones(3)
    for name in names:
        d = DIVERGENCES[name]
        chunk = head_module.Chunk(z.clone(), zt.clone(), y, head_module.Settings((1.0,), d, 1.0))
        dz = torch.empty_like(z)
        chunk.gradient(rows_torch.Upstream(0 * one, one, one, 0 * one), dz)
        of = z64.clone().requires_grad_()
        expected = oracle_of_logits(of, zt64, y, d)
        (expected_dz,) = torch.autograd.grad((expected.entropy + expected.kl).sum(), of)
        close(chunk.stats.kl, expected.kl, 2e-6, name)
        close(chunk.stats.entropy, expected.entropy, 2e-6, name)
        close(dz, expected_dz, 2e-6, name)


@pytest.mark.parametrize("name", KINDS if TRITON else ALL_KINDS)
def test_digits_of_small_divergences_given_the_logits(name):
    """Down the ladder, value and gradient keep their digits: what a subtraction of log-probabilities loses first."""
    g = torch.Generator().manual_seed(3)
    count, vocabulary = (2, 2 * BLOCK + 1) if TRITON else (4, 3000)
    z, noise = torch.randn(2, count, vocabulary, generator=g) * torch.tensor([3.0, 1.0])[:, None, None]
    y, d = z.argmax(-1), DIVERGENCES[name]
    one = torch.ones(count)
    # rounding leaves about 1e-7/step of a value; with a tail, whose logit is itself a rounded sum, some times that
    for step, tolerance in ((1e-4, 1e-2), (1e-3, 5e-4), (1e-2, 5e-5), (0.3, 1e-5), (3.0, 1e-5)):
        zt = z + step * noise
        chunk = head_module.Chunk(z.clone(), zt.clone(), y, head_module.Settings((1.0,), d, 1.0))
        dz = torch.empty_like(z)
        chunk.gradient(rows_torch.Upstream(0 * one, None, one, 0 * one), dz)
        z64 = z.double().requires_grad_()
        expected = oracle_of_logits(z64, zt.double(), y, d)
        (expected_dz,) = torch.autograd.grad(expected.kl.sum(), z64)
        if step == 1e-4:
            assert (expected.kl < 1e-8).all()
        slack = 10 if d.top_k else 1
        assert ((chunk.stats.kl - expected.kl).abs() <= slack * tolerance * expected.kl.abs()).all(), step
        assert (dz - expected_dz).norm() <= slack * max(3e-6, 3e-8 / step) * expected_dz.norm(), step


@pytest.mark.parametrize("name", DIVERGENCES)
def test_identical_models_give_exactly_0(name):
    c = case(2, 2 * BLOCK + 45)
    loss, stats = head_loss(lambda token, _: token.kl, *c[:3], None, c.hidden, divergence=DIVERGENCES[name],
                            temperature=1.3)
    assert loss == 0 and not stats.kl.any() and not any(g.any() for g in gradients(loss, c))


def test_one_minus_p_of_a_sure_token_is_rounded_once():
    """p_y = 1 − 1.8e-3: subtracting a p_y in bf16 from 1 would leave 0 or 4e-3."""
    z = torch.tensor([[7.0, 0.0, 0.0]])
    chunk = head_module.Chunk(z.clone(), None, torch.tensor([0]), head_module.Settings((1.0,), Divergence(), 1.0))
    dz, one = torch.empty(1, 3, dtype=torch.bfloat16), torch.ones(1)
    chunk.gradient(rows_torch.Upstream(one, None, None, 0 * one), dz)
    expected = torch.tensor([1.0, 0.0, 0.0]).double() - z.double().softmax(-1)
    assert ((dz - expected) / expected).abs().max() < 1e-2  # half of it when bf16 rounds; the interpreter truncates


def test_a_thin_tail_is_summed_not_subtracted():
    """Tails of 1e-9: 1 − Σ_K p would be 0 or rounding."""
    z = torch.randn(3, 400, generator=torch.Generator().manual_seed(4))
    z[:, :5] += 30
    zt = z.clone()
    zt[:, 5:] += torch.linspace(-2, 2, 395)
    y, d = torch.tensor([0, 7, 8]), Divergence("reverse_kl", top_k=5)
    stats, dz = row_gradient(z, zt, y, d)
    z64 = z.double().requires_grad_()
    expected = oracle_of_logits(z64, zt.double(), y, d)
    (expected_dz,) = torch.autograd.grad((expected.logp + expected.entropy + expected.kl).sum(), z64)
    # relative to each entry of the tail; fp32 logits of 30 have errors of 2e-6
    assert ((dz - expected_dz)[0, 5:] / expected_dz[0, 5:]).abs().max() < 2e-5
    assert ((stats.kl - expected.kl) / expected.kl).abs().max() < 1e-3  # of 2e-12


@reference_only
def test_top_k_of_all_is_the_whole_vocabulary_and_ties_are_settled_one_way():
    c = case(4, 9)
    whole = token_stats(*c[:5]).kl
    for k in (9, 50):
        close(token_stats(*c[:5], divergence=Divergence(top_k=k)).kl, whole, 5e-6)
        close(token_stats(*c[:5], divergence=Divergence(top_k=k, tail=False)).kl, whole, 5e-6)
    agrees_with_oracle(c, Divergence(top_k=8), 5e-6)
    flat, rising = torch.zeros(2, 6), torch.arange(6.0).repeat(2, 1)
    kl = token_stats(flat, torch.eye(6), torch.tensor([0, 1]), rising, divergence=Divergence(top_k=2)).kl
    assert kl[0] == kl[1] and kl.isfinite().all()


@reference_only
def test_outside_of_a_renormalised_top_k_there_is_no_gradient():
    z, zt = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(5))
    chunk = head_module.Chunk(z.clone(), zt.clone(), torch.tensor([0, 1, 2]),
                              head_module.Settings((1.0,), DIVERGENCES["teacher's top-5 renormalised (SD-Zero)"], 1.0))
    dz, one = torch.empty_like(z), torch.ones(3)
    chunk.gradient(rows_torch.Upstream(0 * one, None, one, 0 * one), dz)
    assert (dz != 0).sum(-1).tolist() == [5, 5, 5]


# ---------------------------------------------------------------------------------------------------------------------
# two modes, any chunks, and what a trainer does with them
# ---------------------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    advantage: Tensor
    old_logp: Tensor
    weight: Tensor
    unused: None = None


def trainers_loss(token: TokenStats, batch: Batch) -> Tensor:
    """A clipped ratio, a distillation term whose weight depends on the policy, an entropy bonus, a squared kl."""
    ratio = (token.logp - batch.old_logp).exp()
    surrogate = torch.minimum(ratio * batch.advantage, ratio.clamp(0.8, 1.28) * batch.advantage)
    distilled = ratio.detach().clamp(max=2) * token.kl + 0.1 * token.kl**2
    gap = (token.logp - token.teacher_logp) ** 2 * token.teacher_entropy
    return batch.weight * (-surrogate + distilled + gap - 0.01 * token.entropy)


@reference_only
def test_both_modes_and_full_logits_give_one_loss_the_same_value_and_gradient(monkeypatch):
    c = case(23, 40)
    g = torch.Generator().manual_seed(6)
    batch = Batch(torch.randn(23, generator=g), -3 + torch.randn(23, generator=g), torch.rand(23, generator=g))
    d = DIVERGENCES["jsd"]
    expected = trainers_loss(oracle(*c[:5], d), batch).sum()
    right = gradients(expected, c)
    loss = trainers_loss(token_stats(*c[:5], divergence=d), batch).sum()
    for value, r in zip((loss, *gradients(loss, c)), (expected, *right)):
        close(value, r, 5e-6)
    for chunk in (1, 4, 23):  # tokens
        monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": chunk * 4 * 40})
        loss, stats = head_loss(trainers_loss, *c[:3], batch, *c[3:5], divergence=d)
        assert not any(x.requires_grad for x in stats)
        for value, r in zip((loss, *gradients(loss, c)), (expected, *right)):
            close(value, r, 5e-6, f"chunks of {chunk}")


@reference_only
@pytest.mark.parametrize("name", ["reverse", "teacher's top-5 and tail"])
def test_chunks_tiles_and_threads_change_nothing(monkeypatch, name):
    c = case(40, 64, dtype=torch.float64)
    whole = both_modes(c, DIVERGENCES[name])
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": 17 * 4 * 64})
    monkeypatch.setattr(rows_torch, "TILE_BYTES", {"cpu": 2 * 8 * 64})
    torch.set_num_threads(3)
    for (loss, stats, grads), (right, right_stats, right_grads) in zip(both_modes(c, DIVERGENCES[name]), whole):
        close(loss, right, 1e-13)
        for value, r in zip((*stats, *grads), (*right_stats, *right_grads)):
            close(value, r, 1e-13)


@pytest.fixture
def empty_is_nan():
    """torch.empty gives NaNs, the worst that memory can hold."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["reverse", "jsd", "student's top-5 and tail (SDPO)"])
def test_what_was_in_memory_before_reaches_no_result(monkeypatch, name, grouped):
    """grouped: the way of CUDA, whose dz has a buffer of its own."""
    assert torch.empty(9).isnan().all()
    c = case(10, 40, dtype=torch.bfloat16 if grouped else torch.float32)
    if grouped:
        monkeypatch.setattr(head_module, "dz_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": 3 * 4 * 40})
    for loss, stats, grads in both_modes(c, DIVERGENCES[name]):
        assert all(x.isfinite().all() for x in (loss, *stats, *grads))


@reference_only
def test_bf16_gradients_in_groups_of_chunks(monkeypatch):
    """The way of CUDA, with the bf16 products done in fp32: dz is rounded once, sums over chunks are not."""
    c = case(30, 500, width=16, dtype=torch.bfloat16)
    right = gradients(weighted(oracle(*c[:5], Divergence()), c.weights).sum(), c)
    monkeypatch.setattr(head_module, "dz_dtype", lambda hidden: hidden.dtype)
    for chunk in (1, 2, 4, 7, 30):
        monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": chunk * 4 * 500})
        for _, _, grads in both_modes(c, Divergence()):
            for value, r in zip(grads, right):
                assert value.dtype == torch.bfloat16
                assert (value.double() - r.double()).norm() < 4e-3 * r.double().norm()  # bf16 rounds to 2^-9 = 2e-3


@reference_only
def test_bf16_hidden_states_give_fp32_statistics():
    c = case(6, 300, dtype=torch.bfloat16)
    stats, expected = token_stats(*c[:5]), oracle(*c[:5], Divergence())
    for name, value, right in zip(TokenStats._fields, stats, expected):
        assert value.dtype == torch.float32
        close(value, right, 3e-6, name)  # bf16 logits would be 4e-3 off


@reference_only
def test_digits_from_the_hidden_states_on():
    """The ladder of docs/kernels.md in small: bf16 hidden states, oracle from them. fp32 sums of a product of width 64
    carry 1e-6, which is what is left to see at KL 1e-6."""
    for gap, value_tolerance, gradient_tolerance in ((0.02, 2e-3, 2e-3), (0.2, 1e-4, 2e-4), (2.0, 1e-5, 2e-5)):
        c = case(8, 4000, width=64, spread=3.0, gap=gap)
        c = c._replace(teacher_head=c.head.detach())
        expected = oracle(*c[:5], Divergence())
        right = torch.autograd.grad(expected.kl.sum(), (c.hidden, c.head))
        stats = token_stats(*c[:5])
        assert abs(stats.kl.mean() / expected.kl.mean() - 1) < value_tolerance
        for value, r in zip(torch.autograd.grad(stats.kl.sum(), (c.hidden, c.head)), right):
            assert (value - r).norm() < gradient_tolerance * r.norm()


class Allocations(TorchDispatchMode):
    """Shapes of all tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}  # in place, or a view
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.shapes.add(tuple(x.shape))
        return out


@reference_only
def test_never_all_logits_and_for_a_frozen_head_never_its_gradient(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": 5 * 4 * 33})
    c = case(20, 33, width=7)
    for frozen in (False, True):
        c.head.requires_grad_(not frozen)
        for run in (lambda: head_loss(weighted, *c[:3], c.weights, *c[3:5])[0],
                    lambda: weighted(token_stats(*c[:5]), c.weights).sum()):
            with Allocations() as made:
                run().backward()
            rows = {shape[0] for shape in made.shapes if len(shape) == 2 and shape[1] >= 33}
            assert 5 in rows and max(rows) == 5
            assert ((33, 7) in made.shapes) == (not frozen)
            assert (c.head.grad is None) == frozen
            c.head.grad = None


@reference_only
def test_only_what_asks_for_a_gradient_gets_one_and_the_teacher_never_does():
    c = case(5, 12)
    teacher = c.teacher_hidden.clone().requires_grad_(), c.teacher_head.clone().requires_grad_()
    frozen_hidden = c.hidden.detach()
    loss, _ = head_loss(weighted, frozen_hidden, c.head, c.y, c.weights, *teacher)
    loss.backward()
    weighted(token_stats(frozen_hidden, c.head, c.y, *teacher), c.weights).sum().backward()
    assert c.head.grad is not None and teacher[0].grad is None and teacher[1].grad is None
    with torch.no_grad():
        loss, stats = head_loss(weighted, c.hidden, c.head, c.y, c.weights, *teacher)
        assert not loss.requires_grad and not token_stats(*c[:3]).logp.requires_grad
    with torch.inference_mode():
        close(token_stats(*c[:3], *teacher).kl, stats.kl, 1e-6)


@reference_only
def test_inference_mode_reaches_the_threads(monkeypatch):
    monkeypatch.setattr(rows_torch, "TILE_BYTES", {"cpu": 1})
    torch.set_num_threads(2)
    with torch.inference_mode():
        assert token_stats(*case(6, 12)[:5]).kl.isfinite().all()


@reference_only
def test_tied_embeddings_add_both_gradients():
    table = torch.randn(12, 6, generator=torch.Generator().manual_seed(7)).requires_grad_()
    ids, y = torch.tensor([1, 5, 1, 3]), torch.tensor([5, 1, 3, 0])
    head_loss(lambda token, _: -token.logp, table[ids].tanh(), table, y, None)[0].backward()
    got, table.grad = table.grad, None
    torch.nn.functional.cross_entropy(table[ids].tanh() @ table.T, y, reduction="sum").backward()
    close(got, table.grad, 1e-6)


@reference_only
def test_strided_inputs():
    c = case(6, 20)
    wide = torch.randn(12, 16)
    strided = c._replace(hidden=wide[::2, ::2].requires_grad_(), head=c.head.detach().T.contiguous().T.requires_grad_(),
                         teacher_hidden=c.teacher_hidden.T.contiguous().T, weights=Weights(*torch.randn(6, 3).T))
    agrees_with_oracle(strided, Divergence(), 5e-6)


@reference_only
def test_autocast_does_not_reach_in():
    c = case(6, 20)
    plain = both_modes(c, Divergence())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = both_modes(c, Divergence())
    for (_, stats, grads), (_, right, right_grads) in zip(within, plain):
        assert all(torch.equal(a, b) for a, b in zip((*stats, *grads), (*right, *right_grads)))


def test_nan_where_nothing_counts_does_no_harm():
    c = case(6, 20)
    hidden = c.hidden.detach().clone()
    hidden[2] = torch.nan
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    batch = Batch(torch.ones(6), torch.full((6,), -3.0), weight)
    sound, broken = (c._replace(hidden=h.clone().requires_grad_()) for h in (c.hidden.detach(), hidden))
    for d in (Divergence(), DIVERGENCES["student's top-5 and tail (SDPO)"])[: 1 if TRITON else 2]:
        right, _ = head_loss(trainers_loss, *sound[:3], batch, *sound[3:5], divergence=d)
        loss, stats = head_loss(trainers_loss, *broken[:3], batch, *broken[3:5], divergence=d)
        close(loss, right, 1e-6)
        assert stats.logp[2].isnan() and not stats.logp[3:].isnan().any()
        for value, r in zip(gradients(loss, broken), gradients(right, sound)):
            close(value, r, 1e-6)
        stats = token_stats(*broken[:5], divergence=d)
        kept = torch.where(weight > 0, stats.kl + stats.logp + stats.entropy, 0).sum()
        assert all(g.isfinite().all() for g in gradients(kept, broken))
    # a NaN that does count is seen
    loss, _ = head_loss(trainers_loss, *broken[:3], batch._replace(weight=torch.ones(6)), *broken[3:5])
    assert loss.isnan() and gradients(loss, broken)[1].isnan().any()


def test_tokens_without_gradient_get_exact_zeros():
    c = case(6, 20)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    loss, _ = head_loss(weighted, *c[:3], Weights(weight, weight, weight), *c[3:5])
    assert (gradients(loss, c)[0].abs().sum(-1) > 0).tolist() == (weight > 0).tolist()


@reference_only
def test_gradients_accumulate_and_scale():
    c = case(6, 20)
    for factor in (1.0, 3.0):
        (factor * head_loss(weighted, *c[:3], c.weights, *c[3:5])[0]).backward()
    (once,) = torch.autograd.grad(weighted(token_stats(*c[:5]), c.weights).sum(), c.head)
    close(c.head.grad, 4 * once, 5e-6)


@reference_only
def test_a_second_backward_is_refused_or_right():
    c = case(4, 10)
    loss, _ = head_loss(weighted, *c[:3], c.weights, *c[3:5])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
    loss = weighted(token_stats(*c[:5]), c.weights).sum()
    first = torch.autograd.grad(loss, c.head, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, c.head)[0])
    for loss in (head_loss(weighted, *c[:3], c.weights, *c[3:5])[0], token_stats(*c[:3]).logp.sum()):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(loss, c.hidden, create_graph=True)


@reference_only
def test_a_mixed_teacher_mixes_logits(monkeypatch):
    """SDPO's trust region: (1−λ)·z_ref + λ·z_live, each model with its own head and width."""
    c, ref = case(5, 30), case(5, 30, width=3, seed=1)
    z = 0.7 * ref.hidden.double() @ ref.head.double().T + 0.3 * c.teacher_hidden.double() @ c.teacher_head.double().T
    expected = oracle_of_logits(c.hidden.double() @ c.head.double().T, z, c.y, Divergence())
    for tokens in (5, 2):  # in a chunk
        monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": tokens * 4 * 30})
        stats = token_stats(*c[:3], [ref.hidden, c.teacher_hidden], [ref.head, c.teacher_head], teacher_mix=(0.7, 0.3))
        for value, right in zip(stats, expected):
            close(value, right, 5e-6)
    weighted(stats, c.weights).sum().backward()
    assert ref.hidden.grad is None and c.hidden.grad is not None
    # with one head for all, mixing logits is mixing hidden states
    shared = token_stats(*c[:3], [c.teacher_hidden, c.hidden], teacher_mix=(0.7, 0.3))
    close(shared.kl, token_stats(*c[:3], 0.7 * c.teacher_hidden + 0.3 * c.hidden).kl, 1e-5)


def test_without_a_teacher_its_fields_are_nan():
    stats = token_stats(*case(3, 9)[:3])
    assert not stats.logp.isnan().any() and not stats.entropy.isnan().any() and all(x.isnan().all() for x in stats[2:])
    assert not stats.kl.requires_grad


@reference_only
def test_mistakes_are_named():
    c = case(4, 10)

    def rejects(match: str, *args, error: type[Exception] = ValueError, **kwargs) -> None:
        with pytest.raises(error, match=match):
            token_stats(*args, **kwargs)

    rejects("targets must be", c.hidden, c.head, c.y[:3])
    rejects("hidden must be", c.hidden[:, :5], c.head, c.y)
    rejects("cast one", c.hidden.double(), c.head, c.y)
    rejects("cast one", c.hidden.half(), c.head.half(), c.y)
    rejects("temperature", *c[:3], temperature=0.0)
    rejects("teacher_hidden", *c[:3], c.teacher_hidden[:2])
    rejects("vocabulary", *c[:3], c.teacher_hidden, c.teacher_head[:7])
    rejects("mixed teacher", *c[:3], [c.teacher_hidden] * 2, c.teacher_head)
    rejects("unknown", *c[:5], divergence=Divergence("kl"))
    rejects("beta", *c[:5], divergence=Divergence("jsd", beta=2.0))
    rejects("clip", *c[:5], divergence=Divergence("reverse_kl", clip=0.1))
    rejects("clip", *c[:5], divergence=Divergence("forward_kl", clip=0.0))
    rejects("top_k", *c[:5], divergence=Divergence(top_k=-1))
    rejects("support", *c[:5], divergence=Divergence(top_k=3, support="both"))
    with pytest.raises(ValueError, match="no teacher"):
        head_loss(lambda token, _: token.kl, *c[:3], None)
    with pytest.raises(ValueError, match="one loss per token"):
        head_loss(lambda token, _: token.logp.sum(), *c[:3], None)


# ---------------------------------------------------------------------------------------------------------------------
# the losses that others run, written as they write them
# ---------------------------------------------------------------------------------------------------------------------
@reference_only
def test_sdpo_loss():
    """lasgroup/SDPO: student's top-K log-probabilities, the tail from 1 − Σ, generalised JSD of the K + 1 buckets."""
    c = case(6, 50, dtype=torch.float64)
    alpha, k = 0.5, 10
    lp = (c.hidden @ c.head.T).log_softmax(-1)
    lq = (c.teacher_hidden @ c.teacher_head.T).log_softmax(-1)
    top, index = lp.topk(k)
    a, b = (torch.cat([x, (-torch.logsumexp(x, -1, keepdim=True).expm1()).log()], -1)
            for x in (top, lq.gather(-1, index)))
    m = torch.logsumexp(torch.stack([a + math.log(1 - alpha), b + math.log(alpha)]), 0)
    expected = (alpha * torch.nn.functional.kl_div(m, b, reduction="none", log_target=True).sum(-1)
                + (1 - alpha) * torch.nn.functional.kl_div(m, a, reduction="none", log_target=True).sum(-1))
    stats = token_stats(*c[:5], divergence=Divergence("jsd", beta=alpha, top_k=k))
    close(stats.kl, expected, 1e-10)
    for value, right in zip(gradients(stats.kl.sum(), c), gradients(expected.sum(), c)):
        close(value, right, 1e-10)


@reference_only
def test_opsd_loss():
    """OPSD: forward KL, each vocabulary entry's summand bounded."""
    c = case(6, 50, dtype=torch.float64)
    lp = (c.hidden @ c.head.T / 1.1).log_softmax(-1)
    lq = (c.teacher_hidden @ c.teacher_head.T / 1.1).log_softmax(-1)
    expected = torch.nn.functional.kl_div(lp, lq, reduction="none", log_target=True).clamp(max=0.05).sum(-1)
    stats = token_stats(*c[:5], divergence=Divergence("forward_kl", clip=0.05), temperature=1.1)
    close(stats.kl, expected, 1e-10)
    for value, right in zip(gradients(stats.kl.sum(), c), gradients(expected.sum(), c)):
        close(value, right, 1e-10)


@reference_only
def test_sdzero_loss():
    """SD-Zero's code: both softmaxes over the teacher's top-K logits, half of each KL."""
    c = case(6, 50, dtype=torch.float64)
    zt = c.teacher_hidden @ c.teacher_head.T
    index = zt.topk(8).indices
    a, b = (c.hidden @ c.head.T).gather(-1, index).log_softmax(-1), zt.gather(-1, index).log_softmax(-1)
    expected = 0.5 * (b.exp() * (b - a)).sum(-1) + 0.5 * (a.exp() * (a - b)).sum(-1)
    stats = token_stats(*c[:5], divergence=Divergence("mixed_kl", beta=0.5, top_k=8, support="teacher", tail=False))
    close(stats.kl, expected, 1e-10)
    for value, right in zip(gradients(stats.kl.sum(), c), gradients(expected.sum(), c)):
        close(value, right, 1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# adding a divergence
# ---------------------------------------------------------------------------------------------------------------------
@reference_only
def test_the_divergence_that_the_documentation_adds():
    """docs/kernels.md, "Adding a divergence": its Python block, run as it stands there."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "kernels.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "def hellinger" in b)
    names: dict = {}
    exec(block, names)
    c = case(6, 50, dtype=torch.float64)
    for top_k in (0, 5):
        d = names["divergence"]._replace(top_k=top_k)
        z, zt = c.hidden @ c.head.T, c.teacher_hidden @ c.teacher_head.T
        p, q = z.softmax(-1), zt.softmax(-1)
        if top_k:
            index = p.topk(top_k).indices
            p, q = (torch.cat([x.gather(-1, index), x.scatter(-1, index, 0).sum(-1, keepdim=True)], -1) for x in (p, q))
        expected = (p.sqrt() - q.sqrt()).square().sum(-1) / 2
        right = gradients((c.weights.kl * expected).sum(), c)
        loss, stats = head_loss(lambda token, w: w.kl * token.kl, *c[:3], c.weights, *c[3:5], divergence=d)
        close(stats.kl, expected, 1e-12)
        for value, r in zip(gradients(loss, c), right):
            close(value, r, 1e-12)
        stats = token_stats(*c[:5], divergence=d)
        for value, r in zip(gradients((c.weights.kl * stats.kl).sum(), c), right):
            close(value, r, 1e-12)

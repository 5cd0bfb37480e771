"""grpo.py's formulas against float64 brute force: full logits, plain loops over responses and tokens."""
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, policy_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import metrics, weights

import grpo
import hsd
import rlsd
import sdpo
import sdzero
from common.chat import load_tokenizer
from common.microbatches import padded_right
from common.policy import bounded_exp, optimizer_step
from common.rollouts import Batch, Group
from common.sampler import Rollout
from common.settings import parse
from common.tasks import Problem, load_task, take
from common.verifiers import Verdict
from kernels.head import TokenStats

V, D = 11, 5


def make_batch(seed: int, groups: int, size: int, longest: int = 6):
    """Random hidden states for groups of responses, with the other policies' log-probabilities and rewards."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (groups, size), generator=g)
    total = int(lengths.sum())
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    rewards = torch.randint(0, 2, (groups, size), generator=g).double()
    rewards[0] = 1.0  # one group without signal
    return dict(lengths=lengths, hidden=normal(total, D), weight=normal(V, D), rewards=rewards,
                targets=torch.randint(0, V, (total,), generator=g), old=0.3 * normal(total), ref=0.5 * normal(total),
                sampler=0.3 * normal(total), truncated=torch.rand(groups, size, generator=g) < 0.2)


def brute_force(b: dict, args: grpo.Args, updates_before: bool, kept: list[list[bool]]) -> tuple[torch.Tensor, ...]:
    """−J with its gradients, every sum written out. `updates_before`: π_old is not the policy itself."""
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    logp_all = torch.log_softmax(hidden @ weight.T / args.temperature, -1)
    Q, G = b["rewards"].shape
    J, t = torch.zeros((), dtype=torch.float64), 0
    responses_kept = sum(bool(kept[q][i]) for q in range(Q) for i in range(G))
    groups_kept = sum(any(kept[q]) for q in range(Q))
    for q in range(Q):
        r = [float(x) for x in b["rewards"][q]]
        mean = sum(r) / G
        spread = math.sqrt(sum((x - mean) ** 2 for x in r) / (G - 1))
        tokens_kept = sum(int(b["lengths"][q, i]) for i in range(G) if kept[q][i])
        for i in range(G):
            n = int(b["lengths"][q, i])
            A = 0.0 if spread < 1e-6 else (r[i] - mean) / (spread if args.std else 1.0)
            span = range(t, t + n)
            t += n
            if not kept[q][i]:
                continue
            logp = [logp_all[u, b["targets"][u]] for u in span]
            old = [b["base"][u] + b["old"][u] if updates_before else logp[k].detach() for k, u in enumerate(span)]
            if args.loss == "gspo":
                s = torch.exp(sum(x - y for x, y in zip(logp, old)) / n)
                ratios = [s] * n
            else:
                ratios = [torch.exp(x - y) for x, y in zip(logp, old)]
            for k, u in enumerate(span):
                clipped = torch.clamp(ratios[k], 1 - args.clip_low, 1 + args.clip_high)
                if args.loss == "cispo":
                    gain = min(ratios[k].item(), 1 + args.clip_high) * A * logp[k]
                else:
                    gain = torch.min(ratios[k] * A, clipped * A)
                if args.beta > 0:
                    log_r = b["base"][u] + b["ref"][u] - logp[k]
                    gain = gain - args.beta * (torch.exp(log_r) - log_r - 1)
                if args.tis > 0:
                    gain = gain * min(math.exp(float(old[k]) - float(b["base"][u] + b["sampler"][u])), args.tis)
                if args.loss in ("dapo", "cispo"):
                    J = J + gain / tokens_kept / groups_kept
                elif args.loss == "dr_grpo":
                    J = J + gain / args.max_tokens / responses_kept
                else:
                    J = J + gain / n / responses_kept
    (-J).backward()
    return -J.detach(), hidden.grad, weight.grad


def ours(b: dict, args: grpo.Args, updates_before: bool, kept):
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    A = grpo.advantages(b["rewards"], args.std)
    w = grpo.token_weights(b["lengths"], torch.tensor(kept), args)
    each = b["lengths"].flatten()
    per_token = lambda x: x.flatten().double().repeat_interleave(each)
    inputs = grpo.Inputs(advantage=per_token(A), weight=per_token(w), sampler_logp=b["base"] + b["sampler"],
                         old_logp=b["base"] + b["old"] if updates_before else None,
                         ref_logp=b["base"] + b["ref"] if args.beta > 0 else None,
                         rollout=torch.arange(len(each)).repeat_interleave(each))
    total, _ = policy_loss(hidden, weight, b["targets"], partial(grpo.loss, args=args), inputs,
                           temperature=args.temperature, per_response=args.loss == "gspo")
    total.backward()
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("updates_before", [False, True])
@pytest.mark.parametrize("overlong", ["keep", "mask"])
@pytest.mark.parametrize("name", list(grpo.VARIANTS))
def test_loss_and_gradient_equal_brute_force(name, overlong, updates_before, one_process):
    for seed in range(4):
        variant = {**grpo.VARIANTS[name], "beta": [0.0, 0.04][seed % 2], "tis": [0.0, 2.0, 1.1, 2.0][seed]}
        args = grpo.Args(**{**variant, "loss": name, "temperature": [1.0, 0.7][seed // 2], "max_tokens": 9})
        b = make_batch(seed, groups=3, size=4)
        with torch.no_grad():
            logits = b["hidden"] @ b["weight"].T / args.temperature
            b["base"] = torch.log_softmax(logits, -1).gather(1, b["targets"][:, None])[:, 0]
        kept = (~b["truncated"]).tolist() if overlong == "mask" else [[True] * 4] * 3
        for got, expected in zip(ours(b, args, updates_before, kept), brute_force(b, args, updates_before, kept)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_first_update_has_value_zero_and_a_gradient(one_process):
    """Centred advantages and ratio 1: the loss starts at 0 (docs say so), its gradient does not."""
    b = make_batch(0, groups=2, size=4, longest=1)
    b["base"] = torch.log_softmax(b["hidden"] @ b["weight"].T, -1).gather(1, b["targets"][:, None])[:, 0]
    value, gradient, _ = ours(b, grpo.Args(beta=0.0, tis=0.0), False, [[True] * 4] * 2)
    assert abs(value) < 1e-12 and gradient.abs().max() > 1e-3


def test_k3_value_and_gradient_equal_the_closed_form():
    """On samples of π, E[k3] = KL(π‖ref), and E[∇k3] = ∇KL(ref‖π): the value is of one direction, the gradient of the
    other (enumerated over five symbols)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(5, generator=g, dtype=torch.float64), -1)
    logp = torch.log_softmax(z, -1)
    pi = logp.exp().detach()
    expected_value = (pi * grpo.k3(logp, ref)).sum()
    torch.testing.assert_close(expected_value, (pi * (logp - ref)).sum(), rtol=1e-12, atol=0)
    estimate, = torch.autograd.grad(expected_value, z, retain_graph=True)
    forward, = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), z)
    torch.testing.assert_close(estimate, forward, rtol=1e-10, atol=1e-14)


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=5), st.booleans())
@settings(deadline=None)
def test_advantages_are_centred_and_vanish_where_rewards_are_equal(rewards, std):
    A = grpo.advantages(torch.tensor(rewards, dtype=torch.float32), std)
    assert torch.isfinite(A).all() and A.sum(1).abs().max() < 1e-5
    for row, r in zip(A, rewards):
        assert (row.abs().max() == 0) == (len(set(r)) == 1)


def test_advantages_of_equal_rewards_that_rounding_could_split():
    assert (grpo.advantages(torch.full((1, 7), 0.1), std=True) == 0).all()


@given(st.floats(0, 30_000))
@settings(deadline=None)
def test_overlong_punishment_is_the_papers_three_pieces(length):
    args = grpo.Args(max_tokens=20480)
    got = grpo.shaped_rewards(torch.ones(1), torch.tensor([length]), args).item() - 1  # a right one has a reward of 1
    wrong = grpo.shaped_rewards(torch.zeros(1), torch.tensor([length]), args).item() + 1  # a wrong one of −1
    assert wrong == pytest.approx(got, abs=1e-6)
    if length <= 16384:
        assert got == 0
    elif length <= 20480:
        assert got == pytest.approx((16384 - length) / 4096, abs=1e-4)
    else:
        assert got == -1


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rlsd"])
def test_the_share_of_clipped_tokens_is_of_those_without_gradient(name, one_process):
    """Against autograd: a token counts as clipped where its part of the loss does not move with its log-probability (for
    CISPO, which keeps that gradient: where its weight is at the bound)."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 4, 2, 5])
    T, each = 14, lambda x: x.repeat_interleave(lengths)
    A, log_ratio = each(torch.tensor([1.0, -0.5, 0.7, -2.0])), 0.5 * torch.randn(T, generator=g)
    old = -torch.rand(T, generator=g)
    if name == "gspo":  # small enough that some responses are inside
        log_ratio = each(torch.tensor([0.5, -0.5, 0.1, 0.1])) * 1e-3
    logp = (old + log_ratio).requires_grad_()
    stats = TokenStats(*[logp.detach()] * len(TokenStats._fields))._replace(logp=logp)
    if name == "rlsd":
        args = rlsd.Args(tis=0.0, dual_clip=1.5)
        inputs = rlsd.Inputs(A, torch.ones(T), old, old, None)
        total, found = rlsd.loss(stats, inputs, 0.0, args), rlsd.diagnostics(stats, inputs, 0.0, args)["clip_frac"]
    else:
        args = grpo.Args(loss=name, tis=0.0, beta=0.0, **{k: v for k, v in grpo.VARIANTS[name].items() if "clip" in k})
        inputs = grpo.Inputs(A, torch.ones(T), old, old, None, torch.arange(4).repeat_interleave(lengths))
        total, found = grpo.loss(stats, inputs, args), grpo.diagnostics(stats, inputs, args)["clip_frac"]
    grad, = torch.autograd.grad(total.sum(), logp)
    expected = log_ratio.exp() > 1.2 if name == "cispo" else grad == 0
    assert torch.equal(found.bool(), expected) and 0 < found.mean() < 1


@pytest.mark.parametrize("name", list(grpo.VARIANTS))
def test_weights_of_kept_tokens_add_up(name, one_process):
    """Every mean gives its kept tokens a total weight of 1 (Dr. GRPO: mean length over the limit)."""
    lengths = torch.tensor([[3.0, 5.0], [2.0, 4.0], [7.0, 1.0]])
    kept = torch.tensor([[True, False], [False, False], [True, True]])
    w = grpo.token_weights(lengths, kept, grpo.Args(loss=name, max_tokens=10))
    assert (w[~kept] == 0).all()
    assert (w * lengths).sum().item() == pytest.approx((3 + 7 + 1) / 3 / 10 if name == "dr_grpo" else 1.0)


def test_weights_of_a_batch_with_nothing_kept_are_zero(one_process):
    w = grpo.token_weights(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool), grpo.Args())
    assert (w == 0).all()



# -------------------------------------------------------------------------------------------------
# log ratios of any size
# -------------------------------------------------------------------------------------------------
RATIOS = torch.tensor([-1e4, -100, -20, -1, 0.1, 1, 19.5, 20, 20.5, 89, 1e4])  # nats


def stats_of(logp: torch.Tensor, **other: torch.Tensor) -> TokenStats:
    zeros = torch.zeros_like(logp.detach())
    return TokenStats(*[zeros] * len(TokenStats._fields))._replace(logp=logp, **other)


def loss_at(name: str, logp: torch.Tensor, A: float, sampler=None, teacher=None, **flags):
    """(loss, args): of each token [T], each a response of its own, with log π_old of 0."""
    one, zeros = torch.ones_like(logp.detach()), torch.zeros_like(logp.detach())
    if sampler is None:
        sampler = zeros
    if name == "rlsd":
        args = rlsd.Args(**flags)
        inputs = rlsd.Inputs(A * one, one, sampler, zeros, teacher)
        return rlsd.loss(stats_of(logp), inputs, 1.0, args), args
    args = grpo.Args(**{**grpo.VARIANTS[name], "loss": name, **flags})
    inputs = grpo.Inputs(A * one, one, sampler, zeros, None, torch.arange(len(logp)))
    return grpo.loss(stats_of(logp), inputs, args), args


@pytest.mark.parametrize("A", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", [*grpo.VARIANTS, "rlsd"])
def test_no_log_ratio_overflows_the_loss_or_its_gradient(name, A):
    """Up to the bound they are those of float64. Beyond it the slope of a token that is not clipped
    stays that of the bound: neither infinite, which would skip the whole update, nor 0."""
    logp = RATIOS.clone().requires_grad_()
    value, args = loss_at(name, logp, A, tis=0.0)
    grad, = torch.autograd.grad(value.sum(), logp)
    assert value.isfinite().all() and grad.isfinite().all()
    for u, x in enumerate(RATIOS.tolist()):
        ratio = math.exp(min(x, 20.0))
        clipped = min(max(ratio, 1 - args.clip_low), 1 + args.clip_high)
        if name == "cispo":
            slope = -min(ratio, 1 + args.clip_high) * A
            expected = slope * x
        else:
            slope = 0.0 if ratio * A > clipped * A else -ratio * A
            expected = -min(ratio * A, clipped * A)
        assert grad[u].item() == pytest.approx(slope, rel=1e-5, abs=1e-30)
        if x <= 20:
            assert value[u].item() == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_the_bounded_exponential_is_smooth_and_never_flat():
    """Its slope is continuous and does not fall, and its differences are the slope's integral."""
    x = torch.linspace(15, 25, 1001, dtype=torch.float64, requires_grad=True)
    y = bounded_exp(x)
    slope, = torch.autograd.grad(y.sum(), x)
    assert (y.diff() > 0).all() and (slope.diff() >= 0).all()
    assert slope.max().item() == pytest.approx(math.exp(20))
    between = (slope[1:] + slope[:-1]) / 2
    torch.testing.assert_close(y.diff(), between * x.diff(), rtol=1e-4, atol=0)
    inside = x[x <= 20]
    assert torch.equal(bounded_exp(inside), inside.exp())


def test_no_log_ratio_overflows_the_penalty_or_its_gradient():
    """k3 of x = log π_ref/π_θ: e^x − x − 1, with the slope 1 − e^x on log π_θ."""
    logp = (-RATIOS).requires_grad_()
    value = grpo.k3(logp, torch.zeros_like(RATIOS))
    grad, = torch.autograd.grad(value.sum(), logp)
    assert value.isfinite().all() and grad.isfinite().all() and (value >= 0).all()
    for u, x in enumerate(RATIOS.tolist()):
        assert grad[u].item() == pytest.approx(-math.expm1(min(x, 20.0)), rel=1e-5)
        if x <= 20:
            assert value[u].item() == pytest.approx(math.expm1(x) - x, rel=1e-4)


@pytest.mark.parametrize("name", [*grpo.VARIANTS, "rlsd"])
def test_no_gap_to_the_sampler_overflows(name):
    """The truncated weight is min(e^x, C)."""
    logp = torch.full_like(RATIOS, 0.1).requires_grad_()
    plain, _ = loss_at(name, logp, -1.0, tis=0.0)
    value, _ = loss_at(name, logp, -1.0, sampler=-RATIOS, tis=2.0)
    weight = torch.tensor([min(math.exp(min(x, 1.0)), 2.0) for x in RATIOS.tolist()])
    torch.testing.assert_close(value, plain * weight, rtol=1e-5, atol=1e-30)
    grad, = torch.autograd.grad(value.sum(), logp)
    assert grad.isfinite().all()


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_no_gap_to_the_teacher_overflows(A):
    """w is e^(sign(A)·Δ), clipped to 1 ± ε_w; at λ = 1 it is all of the weight."""
    logp = torch.full_like(RATIOS, 0.1).requires_grad_()
    value, _ = loss_at("rlsd", logp, A, teacher=RATIOS, tis=0.0)
    grad, = torch.autograd.grad(value.sum(), logp)
    assert grad.isfinite().all()
    for u, x in enumerate(RATIOS.tolist()):
        w = math.exp(min(A * (x - 0.1), 1.0))
        expected = -A * math.exp(0.1) * min(max(w, 0.8), 1.2)
        assert value[u].item() == pytest.approx(expected, rel=1e-4)


def diagnostics_of(name: str, old: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Of tokens whose log-probabilities are RATIOS, against log π_old (None: the same) and 0."""
    one, zeros = torch.ones_like(RATIOS), torch.zeros_like(RATIOS)
    token = stats_of(RATIOS, teacher_logp=-RATIOS)
    right = Rollout([5], [7] * len(one), zeros.tolist(), "stop", "")
    batch = Batch([Group(Problem("1", []), [right], [Verdict(1.0)])])
    micro = padded_right(batch.prompts, batch.responses, [0], torch.device("cpu"))
    rest = micro, batch, load_tokenizer(CHAIN)
    if name == "sdzero":
        return sdzero.diagnostics(token, *rest)
    if name == "hsd":
        return hsd.diagnostics(token, hsd.Inputs(one, one, one, zeros, zeros), *rest)
    if name == "sdpo":
        return sdpo.diagnostics(token, sdpo.Inputs(one, one, one, zeros, old, zeros.long()), *rest)
    if name == "rlsd":
        args = rlsd.Args(tis=0.0, dual_clip=3.0)
        return rlsd.diagnostics(token, rlsd.Inputs(one, one, zeros, old, zeros), 0.5, args)
    inputs = grpo.Inputs(one, one, zeros, old, zeros, torch.arange(len(one)))
    return grpo.diagnostics(token, inputs, grpo.Args(loss=name, tis=0.0))


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rlsd", "sdpo", "hsd", "sdzero"])
def test_no_diagnostic_overflows(name):
    """Without truncation too; up to the bound mismatch/kl is e^x − x − 1."""
    found = diagnostics_of(name, None)
    for metric, value in [*found.items(), *diagnostics_of(name, -RATIOS).items()]:
        assert value.isfinite().all(), metric
    for u, x in enumerate(RATIOS.tolist()):
        if x <= 20:
            assert found["mismatch/kl"][u].item() == pytest.approx(math.expm1(x) - x, rel=1e-4)


# -------------------------------------------------------------------------------------------------
# updates and groups without a signal
# -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gradient", [None, 0.0])
def test_an_update_without_a_gradient_moves_nothing(gradient):
    """Neither old moments nor weight decay act on the weights, and it is counted."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)

    def state() -> list[torch.Tensor]:
        return [layer.weight.clone(), *map(torch.clone, optimizer.state[layer.weight].values())]

    layer(torch.ones(1, 3)).sum().backward()
    log = optimizer_step(layer, optimizer, 0.1, 1.0)
    assert log["grad_norm"][0] > 0 and log["empty_updates"] == [0]
    before = state()
    if gradient is not None:
        for p in layer.parameters():
            p.grad = torch.full_like(p, gradient)
    log = optimizer_step(layer, optimizer, 0.1, 1.0)
    assert (log["grad_norm"], log["empty_updates"], log["skipped_updates"]) == ([0], [1], [0])
    assert all(torch.equal(a, b) for a, b in zip(before, state()))


SMALL = ["--demo", "--model", CHAIN, "--group_size", "2", "--heldout", "2", "--eval_samples", "1"]


def run(out, *flags):
    grpo.main(parse(grpo.Args, grpo.presets, [*SMALL, "--out", str(out), *flags]))


def test_a_step_whose_every_response_is_cut_off_leaves_the_weights_alone(tmp_path):
    """With a penalty as well, if cut-off responses are out of the loss."""
    run(tmp_path, "--name", "r", "--batch_size", "4", "--max_tokens", "3", "--overlong", "mask",
        "--beta", "0.1", "--steps", "2", "--weight_decay", "0.5", "--save_every", "1")
    for row in metrics(tmp_path / "r")[:2]:
        assert (row["frac_truncated"], row["grad_norm"], row["empty_updates"]) == (1, 0, 1)
    a, b = (weights(tmp_path / "r", n) for n in (1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_group_that_is_right_counts_as_right_whatever_its_lengths(tmp_path, monkeypatch):
    """DAPO's length penalty lowers a reward; the answer stays right."""
    begin = Batch.__post_init__

    def all_right(batch: Batch) -> None:
        begin(batch)
        batch.rewards = torch.ones_like(batch.rewards)

    monkeypatch.setattr(Batch, "__post_init__", all_right)
    run(tmp_path, "--name", "r", "--loss", "dapo", "--dynamic_sampling", "0", "--minibatches", "1", "--steps", "1",
        "--group_size", "2", "--batch_size", "2", "--max_tokens", "8", "--warmup", "0")
    assert metrics(tmp_path / "r")[0]["frac_all_right"] == 1


@pytest.mark.parametrize("rounds, chosen", [
    (["-+-+"], [0, 1, 2, 3]), (["-+-", "++-"], [1, 3, 4]), (["-+-", "+--"], [0, 1, 3]),  # an equal group fills the share
    (["+++", "unused"], [0, 1, 2])])
def test_groups_keep_the_order_of_their_questions(rounds, chosen):
    """A sign per group of a round: + if its rewards are mixed."""
    asked = []

    def sample(step: int) -> Batch:
        asked.append(step)
        signs, first = rounds[len(asked) - 1], sum(map(len, rounds[: len(asked) - 1]))
        groups = []
        for i, sign in enumerate(signs, first):
            groups.append(Group(Problem(str(i), []), [], [Verdict(1.0), Verdict(float(sign == "-"))]))
        return Batch(groups)

    args = grpo.Args(dynamic_sampling=len(rounds) - 1)
    batch = grpo.sample(SimpleNamespace(sample=sample), 5, args)
    assert [int(group.problem.id) for group in batch.groups] == chosen
    assert asked == [5 * len(rounds) + k for k in range(len(asked))]  # no two steps ask the same questions


def test_the_log_shows_the_first_questions_of_a_step(tmp_path):
    run(tmp_path, "--name", "r", "--batch_size", "16", "--max_tokens", "2", "--steps", "2")
    train = load_task("chain", heldout=2).train
    lines = (tmp_path / "r" / "rollouts.jsonl").read_text().splitlines()
    shown: dict[int, dict[str, None]] = {}
    for row in map(json.loads, lines):
        shown.setdefault(row["step"], {})[row["id"]] = None
    for step in range(2):
        assert list(shown[step]) == [p.id for p in take(train, 0, step * 16, 2)]

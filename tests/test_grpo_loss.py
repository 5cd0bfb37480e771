"""grpo.py's formulas against float64 brute force: full logits, plain loops over responses and tokens."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
import rlsd
from kernels.head import TokenStats, head_loss, token_stats

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
    spread = lambda x: x.flatten().double().repeat_interleave(each)
    batch = grpo.Tokens(advantage=spread(A), weight=spread(w), sampler_logp=b["base"] + b["sampler"],
                        old_logp=b["base"] + b["old"] if updates_before else None,
                        ref_logp=b["base"] + b["ref"] if args.beta > 0 else None,
                        rollout=torch.arange(len(each)).repeat_interleave(each))
    if args.loss == "gspo":
        stats = token_stats(hidden, weight, b["targets"], temperature=args.temperature)
        total = grpo.loss(stats, batch, args).sum()
    else:
        total, _ = head_loss(lambda s, c: grpo.loss(s, c, args), hidden, weight, b["targets"], batch,
                             temperature=args.temperature)
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
    args = grpo.Args(max_tokens=20480, overlong_cache=4096)
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
        batch = rlsd.Tokens(A, torch.ones(T), old, old, None, None)
        total, found = rlsd.loss(stats, batch, 0.0, args), rlsd.diagnostics(stats, batch, 0.0, args)["clip_frac"]
    else:
        args = grpo.Args(loss=name, tis=0.0, beta=0.0, **{k: v for k, v in grpo.VARIANTS[name].items() if "clip" in k})
        batch = grpo.Tokens(A, torch.ones(T), old, old, None, torch.arange(4).repeat_interleave(lengths))
        total, found = grpo.loss(stats, batch, args), grpo.diagnostics(stats, batch, args)["clip_frac"]
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

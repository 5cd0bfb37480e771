"""hsd.py's formulas against float64 brute force, its peers by enumeration, its measurements by hand."""
import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, GROUPS, interrupted, policy_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import assert_same_run, metrics, teacher_gaps

import hsd
import rlsd
import sdpo
from common.chat import as_text, chat_ids, load_tokenizer
from common.rollouts import Batch, Group
from common.sampler import Rollout
from common.settings import parse
from common.tasks import Problem
from common.verifiers import Verdict

V, D = 9, 4
f64 = dict(dtype=torch.float64)


def make_batch(seed: int, responses: int = 6):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (responses,), generator=g)
    T = int(lengths.sum())
    normal = lambda *shape: torch.randn(*shape, generator=g, **f64)
    b = dict(lengths=lengths, hidden=normal(T, D), weight=normal(V, D), A=normal(responses), ref=0.3 * normal(T),
             targets=torch.randint(0, V, (T,), generator=g), teacher_hidden=normal(T, D), teacher_weight=normal(V, D),
             kept=torch.rand(responses, generator=g) < 0.7, has_context=torch.rand(responses, generator=g) < 0.8)
    b["kept"][0] = True
    return b


def brute_force(b, args: hsd.Args):
    """J of Eq. 10 with its gradients, every sum over rollouts, tokens and vocabulary written out."""
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    logp = torch.log_softmax(hidden @ weight.T / args.temperature, -1)
    logq = torch.log_softmax(b["teacher_hidden"] @ b["teacher_weight"].T / args.temperature, -1)
    J, t, kept = torch.zeros((), **f64), 0, int(b["kept"].sum())
    for i, n in enumerate(b["lengths"].tolist()):
        for u in range(t, t + n):
            if not b["kept"][i]:
                continue
            L = torch.zeros((), **f64)
            for v in range(V):
                p, q = logp[u, v].exp(), logq[u, v].exp()
                if args.kl == "forward":
                    term = q * (logq[u, v] - logp[u, v])
                    L = L + (torch.clamp(term, max=args.entry_clip) if args.entry_clip else term)
                elif args.kl == "reverse":
                    L = L + p * (logp[u, v] - logq[u, v])
                else:
                    m = ((p + q) / 2).log()
                    L = L + 0.5 * q * (logq[u, v] - m) + 0.5 * p * (logp[u, v] - m)
            L = L if b["has_context"][i] else 0 * L  # without a context: GRPO's share and Ω alone
            y = b["targets"][u]
            if args.grpo_mix:
                rho = torch.exp(logp[u, y] - float(logp[u, y].detach()))
                L = (1 - args.grpo_mix) * L - args.grpo_mix * rho * float(b["A"][i])
            if args.beta:
                L = L + args.beta * 0.5 * (logp[u, y] - float(logp[u, y].detach()) - b["ref"][u]) ** 2
            J = J + L / n / kept
        t += n
    J.backward()
    return J.detach(), hidden.grad, weight.grad


def ours(b, args: hsd.Args):
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    each = lambda x: x.double().repeat_interleave(b["lengths"])
    w = hsd.token_weights(b["lengths"][None].double(), b["kept"][None])[0]
    base = torch.log_softmax(b["hidden"] @ b["weight"].T / args.temperature, -1).gather(1, b["targets"][:, None])[:, 0]
    inputs = hsd.Inputs(weight=each(w), has_context=each(b["has_context"]), advantage=each(b["A"]), sampler_logp=base,
                        ref_logp=base + b["ref"] if args.beta > 0 else None)
    seen = [(b["teacher_hidden"], b["teacher_weight"])]
    total, _ = policy_loss(hidden, weight, b["targets"], partial(hsd.loss, args=args), inputs, seen,
                           divergence=hsd.divergence(args), temperature=args.temperature)
    total.backward()
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("flags", [{}, {"kl": "reverse"}, {"kl": "jsd"}, {"entry_clip": 0.05}, {"grpo_mix": 0.5},
                                   {"beta": 0.0, "temperature": 1.1}, {"beta": 0.1, "grpo_mix": 0.25}], ids=str)
def test_loss_and_gradient_equal_brute_force(flags, one_process):
    for seed in range(3):
        b, args = make_batch(seed), hsd.Args(**flags)
        for got, expected in zip(ours(b, args), brute_force(b, args)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_the_gradient_on_the_students_logits_is_student_minus_teacher():
    """Eq. 13 with the teacher detached is cross-entropy to the teacher: ∂L/∂z = π − π_c (a head that is the identity
    makes the hidden states the logits)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, V, generator=g, requires_grad=True, **f64)
    teacher = torch.randn(5, V, generator=g, **f64)
    one = torch.eye(V, **f64)
    inputs = hsd.Inputs(torch.ones(5, **f64), torch.ones(5, **f64), *[torch.zeros(5, **f64)] * 2, None)
    total, _ = policy_loss(z, one, torch.zeros(5, dtype=torch.long), partial(hsd.loss, args=hsd.Args(beta=0.0)), inputs,
                           [(teacher, one)], divergence=hsd.divergence(hsd.Args()))
    total.backward()
    torch.testing.assert_close(z.grad, z.detach().softmax(-1) - teacher.softmax(-1), rtol=1e-10, atol=1e-12)


def test_k2s_gradient_is_that_of_the_kl_to_the_reference():
    """E_{y~π}[∇k2] = ∇KL(π‖π_0), enumerated: the direction that the paper names."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, generator=g, requires_grad=True, **f64)
    ref = torch.log_softmax(torch.randn(5, generator=g, **f64), -1)
    logp = torch.log_softmax(z, -1)
    got, = torch.autograd.grad((logp.exp().detach() * hsd.k2(logp, ref)).sum(), z, retain_graph=True)
    expected, = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), z)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


RIGHT, WRONG = Verdict(1.0), Verdict(0.0)


def group_of(rewards, answer="5", lengths=None, logprobs=None) -> Group:
    problem = Problem("p", [{"role": "user", "content": "q"}], answer=answer)
    rollouts = []
    for i in range(len(rewards)):
        n = lengths[i] if lengths else 2
        rollouts.append(Rollout([1], list(range(2, 2 + n)), [logprobs[i] if logprobs else -0.1] * n, "stop", f"text {i}"))
    return Group(problem, rollouts, [Verdict(float(r)) for r in rewards])


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.sampled_from(["uniform", "shortest", "low_ppl", "high_ppl"]),
       st.integers(0, 1000))
@settings(deadline=None)
def test_a_peer_is_another_successful_rollout_or_none(rewards, how, seed):
    lengths, logprobs = [len(rewards) - i for i in range(len(rewards))], [-0.1 * i for i in range(len(rewards))]
    group, rng = group_of(rewards, lengths=lengths, logprobs=logprobs), random.Random(seed)
    for i in range(len(rewards)):
        j = hsd.choose_peer(group, i, how, rng)
        others = [k for k, r in enumerate(rewards) if r == 1 and k != i]
        assert (j is None) == (not others)
        if j is not None:
            assert j != i and rewards[j] == 1
            if how in ("shortest", "high_ppl"):  # both fall with the index here
                assert j == max(others)
            if how == "low_ppl":
                assert j == min(others)


def test_peers_are_uniform():
    """χ² over 6,000 draws among four others; 16.27 is the 0.1 % point of three degrees of freedom."""
    rng, counts, group = random.Random(0), Counter(), group_of([1, 1, 0, 1, 1, 1])
    for _ in range(6000):
        counts[hsd.choose_peer(group, 0, "uniform", rng)] += 1
    assert set(counts) == {1, 3, 4, 5}
    assert sum((n - 1500) ** 2 / 1500 for n in counts.values()) < 16.27


def tree(seed: int):
    """A policy over three binary tokens and a reward on its leaves: (probability of each leaf, reward of each leaf)."""
    g = random.Random(seed)
    step = {prefix: g.uniform(0.1, 0.9) for n in range(3) for prefix in itertools.product((0, 1), repeat=n)}
    leaf = lambda o: math.prod(step[o[:t]] if o[t] else 1 - step[o[:t]] for t in range(3))
    leaves = {o: leaf(o) for o in itertools.product((0, 1), repeat=3)}
    rewards = {o: g.random() < 0.5 for o in leaves}
    rewards[(0, 1, 0)], rewards[(1, 1, 1)] = True, False
    return leaves, rewards


def test_proposition_1_the_success_conditioned_policy_is_policy_times_value_ratio():
    leaves, rewards = tree(0)
    Z = sum(p for o, p in leaves.items() if rewards[o])
    mass = lambda h, only=False: sum(p for o, p in leaves.items() if o[: len(h)] == h and (rewards[o] or not only))
    for n in range(3):
        for h in itertools.product((0, 1), repeat=n):
            for y in (0, 1):
                if mass(h, True) == 0:
                    continue
                value = lambda prefix: mass(prefix, True) / mass(prefix)  # V_π: success probability from a prefix
                plus = (mass((*h, y), True) / Z) / (mass(h, True) / Z)
                assert plus == pytest.approx(mass((*h, y)) / mass(h) * value((*h, y)) / value(h), rel=1e-12)


def test_accepted_peers_are_exact_draws_from_the_success_conditioned_policy():
    """Eq. 8: over all groups of three, what choose_peer gives a rollout is distributed as π⁺ (enumerated over the
    groups, and over the peers by the choice's own symmetry)."""
    leaves, rewards = tree(1)
    rollouts = group_of([1] * 3).rollouts
    Z = sum(p for o, p in leaves.items() if rewards[o])
    found, total = Counter(), 0.0
    for group in itertools.product(leaves, repeat=3):
        judged = Group(None, rollouts, [RIGHT if rewards[o] else WRONG for o in group])
        probability = math.prod(leaves[o] for o in group)
        # both of two candidates come up when asked often enough; each with the same chance (test above)
        draws = {hsd.choose_peer(judged, 0, "uniform", random.Random(s)) for s in range(12)}
        for j in draws - {None}:
            found[group[j]] += probability / len(draws)
            total += probability / len(draws)
    for o, p in leaves.items():
        assert found[o] / total == pytest.approx(p / Z if rewards[o] else 0.0, abs=1e-12)


def test_equation_12_by_simulation_and_its_maximum():
    rng = random.Random(0)
    for p, G in ((0.22, 8), (0.5, 4), (0.05, 16)):
        hits, rollouts = 0, group_of([1] * G).rollouts
        for _ in range(20_000):
            verdicts = [RIGHT if rng.random() < p else WRONG for _ in range(G)]
            peer = hsd.choose_peer(Group(None, rollouts, verdicts), 0, "shortest", rng)
            hits += verdicts[0].reward == 0 and peer is not None
        assert hits / 20_000 == pytest.approx(hsd.coverage(torch.tensor(p), G).item(), abs=0.012)


def test_the_papers_table_2_does_not_follow_from_its_formula():
    """f* rises with G by Eq. 12 (and p* = 1 − G^{−1/(G−1)} falls); the paper prints f* = .422 .344 .272 .214 .167, falling."""
    for G, printed in ((4, 0.422), (8, 0.344), (16, 0.272), (32, 0.214), (64, 0.167)):
        best = hsd.coverage(torch.linspace(0, 1, 100_001, **f64), G)
        p_star = 1 - G ** (-1 / (G - 1))
        assert best.argmax().item() / 100_000 == pytest.approx(p_star, abs=1e-4)
        assert best.max().item() == pytest.approx((G - 1) * G ** (-G / (G - 1)), abs=1e-6)
        assert abs(best.max().item() - printed) > 0.04


def test_contexts_of_mixed_all_fail_and_all_success_groups():
    """One success: it sees the answer alone, its siblings see it. All fail: OPSD with the answer. All succeed: each sees
    another."""
    rng = random.Random(0)
    peers = lambda rewards: [hsd.choose_peer(group_of(rewards), i, "uniform", rng) for i in range(len(rewards))]
    assert peers([0, 1, 0]) == [1, None, 1] and peers([0, 0, 0]) == [None] * 3
    assert all(j is not None and j != i for i, j in enumerate(peers([1, 1, 1])))
    problem, args = group_of([1]).problem, hsd.Args()
    with_peer, without = (hsd.teacher_chat(problem, p, args)[-1]["content"] for p in ("the peer", None))
    assert with_peer.index("q") < with_peer.index("answer is 5") < with_peer.index("the peer")
    assert "answer is 5" in without and "passed the check" not in without


def test_a_question_without_an_answer_uses_the_peer_alone_and_is_masked_without_one():
    problem = group_of([1], answer=None).problem
    assert "final answer" not in hsd.teacher_chat(problem, "the peer", hsd.Args())[-1]["content"]
    assert hsd.teacher_chat(problem, None, hsd.Args()) is None


@pytest.mark.parametrize("context, answers", [("solution", ["5", "6"]), ("answer", [None, None])])
def test_a_context_that_no_problem_has_ends_the_run_before_it_samples(context, answers):
    """One problem that has it is enough: a mixture may have others."""
    problems = [Problem(str(i), [{"role": "user", "content": "q"}], answer) for i, answer in enumerate(answers)]
    rollouts = SimpleNamespace(task=SimpleNamespace(at_hand=problems), check_lengths=lambda *_, **__: None)
    with pytest.raises(SystemExit, match=f"--context {context}: no problem has one"):
        hsd.check(rollouts, hsd.Args(context=context))
    hsd.check(rollouts, hsd.Args())
    hsd.check(rollouts, hsd.Args(context=context, grpo_mix=0.5))  # GRPO's share is left
    problems.append(replace(problems[0], answer="7", solution="It is 7."))
    hsd.check(rollouts, hsd.Args(context=context))


def test_answer_and_solution_contexts_are_opsds():
    problem = Problem("p", [{"role": "user", "content": "q"}], answer="5", solution="2+3=5")
    answer, solution = (hsd.teacher_chat(problem, "peer", hsd.Args(context=c))[-1]["content"] for c in ("answer", "solution"))
    assert "answer is 5" in answer and "peer" not in answer and "2+3" not in answer
    assert "2+3=5" in solution and "peer" not in solution and "answer is 5" not in solution


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_the_divergence_point_is_the_end_of_the_common_prefix(a, b):
    tau = hsd.divergence_point(a, b)
    common = next((t for t in range(min(len(a), len(b))) if a[t] != b[t]), None)
    assert tau == common and (tau is None or (a[:tau] == b[:tau] and a[tau] != b[tau]))


SMALL = [*GROUPS, "--eval_every", "3"]


def run(out, *flags):
    hsd.main(parse(hsd.Args, hsd.presets, [*SMALL, "--out", str(out), *flags]))


@pytest.mark.parametrize("teacher", [["ema", "--beta", "0.01"], ["live"]], ids=["ema", "live"])
def test_a_resume_includes_the_teacher_bitwise(teacher, tmp_path):
    flags = ["--steps", "2", "--save_every", "1", "--teacher", *teacher]
    run(tmp_path, *flags, "--name", "whole")
    parts = interrupted(tmp_path / "whole", "parts", 1)
    run(tmp_path, *flags, "--name", "parts", "--resume", "auto")
    assert_same_run(tmp_path / "whole", parts, 2)
    if "ema" in teacher:
        from_start, from_student = teacher_gaps(parts, 2)
        assert from_start > 0 and from_student > 0
    row = metrics(parts)[0]  # and a run measures where the credit is
    assert {"tau", "coverage", "coverage/expected", "context/peer", "context/none", "kl", "credit/at_tau",
            "credit/before_tau", "teacher/entropy"} <= row.keys()
    assert row["credit/at_tau"] > row["credit/before_tau"]


@pytest.mark.parametrize("flags", [["--context", "answer", "--grpo_mix", "0.5"], ["--context", "solution", "--entry_clip", "0.05"],
                                   ["--train_on", "failed", "--kl", "reverse"], ["--peer", "shortest", "--kl", "jsd"]], ids=str)
def test_every_arm_trains_from_one_command(flags, tmp_path):
    run(tmp_path, "--steps", "1", "--name", "arm", *flags)
    assert metrics(tmp_path / "arm")[0]["grad_norm"] > 0


def test_credit_is_measured_for_the_right_rollouts():
    """Failures that have a peer, whose rewards may lie between 0 and 1; a lone success has no peer."""
    for rewards in ([1, 0, 0.5, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]):
        group = group_of(rewards)
        for i, o in enumerate(group.rollouts):
            o.response_ids[:] = [7, 7] if rewards[i] == 1 else [7, 8]  # τ = 1
        peers = [None if i == 0 and rewards.count(1) == 1 else 1 if i == 0 else 0 for i in range(len(rewards))]
        credits = {i: torch.tensor([0.5, -2.0 - i]) for i in range(len(rewards))}
        batch = Batch([group])
        found = hsd.where_credit_is(batch, torch.ones_like(batch.rewards, dtype=torch.bool), peers, credits)
        failed = [i for i, r in enumerate(rewards) if r < 1]
        assert found["credit/at_tau"] == [2.0 + i for i in failed] and set(found["tau"]) == {1}
        assert found["credit/before_tau"] == [0.5] * len(failed) and found["credit/after_tau"] == []
        assert found["coverage"].mean().item() == pytest.approx(len(failed) / len(rewards))
        p, G = rewards.count(1) / len(rewards), len(rewards)
        assert found["coverage/expected"].item() == pytest.approx((1 - p) * (1 - (1 - p) ** (G - 1)))
        assert found["context/peer"] == [j is not None for j in peers] and not found["context/none"].any()
    batch = Batch([group_of([0.5, 0, 0])])
    none = hsd.where_credit_is(batch, torch.zeros(1, 3, dtype=torch.bool), [None] * 3, {})
    assert none["coverage"].sum() == 0 and not none["tau"] and none["context/none"].all()


def test_rollouts_without_a_context_are_masked_and_keep_grpos_share(tmp_path, monkeypatch):
    """As with code, whose questions have no answer to show: a group that fails as a whole, or a lone success."""
    shown = hsd.teacher_chat
    monkeypatch.setattr(hsd, "teacher_chat", lambda problem, peer, args: shown(replace(problem, answer=None), peer, args))
    run(tmp_path, "--steps", "1", "--name", "masked")
    run(tmp_path, "--steps", "1", "--name", "mixed", "--context", "answer", "--grpo_mix", "0.5")
    masked, mixed = (metrics(tmp_path / name)[0] for name in ("masked", "mixed"))
    assert 0 < masked["context/none"] < 1 and masked["grad_norm"] > 0 and masked["kl"] > 0
    assert mixed["context/none"] == 1 and mixed["grad_norm"] > 0 and "kl" not in mixed


def test_only_failures_train_where_that_is_asked(tmp_path, monkeypatch):
    seen = []
    made = hsd.token_weights
    monkeypatch.setattr(hsd, "token_weights", lambda lengths, kept: (seen.append(kept.clone()), made(lengths, kept))[1])
    run(tmp_path, "--steps", "1", "--name", "failed", "--train_on", "failed")
    row = metrics(tmp_path / "failed")[0]
    assert 0 < row["reward/mean"] < 1 and seen[0].float().mean().item() == pytest.approx(1 - row["reward/mean"])


def test_a_peer_that_does_not_fit_is_left_out():
    """Then the teacher sees the answer alone, as if there were no peer. Without room for that the run ends in words."""
    tokenizer = load_tokenizer(CHAIN)
    group, args = group_of([1, 0, 1]), hsd.Args()
    group.rollouts[0].text = "1+1=2; " * 40  # long to read
    group.rollouts[2].text = "1+1=2; " * 40
    rollouts = SimpleNamespace(chat_ids=lambda chat: chat_ids(tokenizer, chat, False),
                               as_text=lambda text: as_text(tokenizer, text), context_length=1024)
    batch = Batch([group])
    fits, has_context, peers = hsd.teacher_prompts(batch, rollouts, 0, args)
    assert peers[0] == 2 and peers[1] in (0, 2) and peers[2] == 0 and has_context.all()
    alone = rollouts.chat_ids(hsd.teacher_chat(group.problem, None, args))
    rollouts.context_length = min(map(len, fits)) + 1  # a response has two tokens
    prompts, has_context, peers = hsd.teacher_prompts(batch, rollouts, 0, args)
    assert prompts == [alone] * 3 and peers == [None] * 3 and has_context.all()
    rollouts.context_length = len(alone) + 1
    with pytest.raises(SystemExit, match=f"more than the model's context of {len(alone) + 1}: lower --max_tokens"):
        hsd.teacher_prompts(batch, rollouts, 0, args)


@pytest.mark.parametrize("method, flags", [(hsd, ["--teacher", "live"]), (sdpo, ["--teacher", "live"]), (rlsd, ["--teacher_every", "1"])],
                         ids=["hsd", "sdpo", "rlsd"])
def test_the_teacher_is_asked_before_the_update(method, flags, tmp_path):
    """After an update at a rate of 0.1 it would answer otherwise than after one at 1e-9."""
    rows = []
    for rate in ("0.1", "1e-9"):
        given = [*SMALL, "--out", str(tmp_path), "--name", rate, "--steps", "1", "--lr", rate, *flags]
        method.main(parse(method.Args, method.presets, given))
        rows.append(metrics(tmp_path / rate)[0])
    names = ("teacher/accuracy", "teacher/lead", "teacher/length", "teacher/frac_truncated")
    assert [rows[0][name] for name in names] == [rows[1][name] for name in names]
    assert rows[0]["grad_norm"] > 0

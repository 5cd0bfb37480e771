"""rlsd.py's formulas against float64 brute force, and the paper's theorems by enumeration."""
import itertools
import json
import math
from functools import partial

import pytest
import torch
from conftest import GROUPS, interrupted, policy_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import assert_same_run, metrics, teacher_gaps

import grpo
import rlsd
from common.settings import parse
from common.verifiers.pool import Verifier

V, D = 11, 5
f64 = dict(dtype=torch.float64)


def make_batch(seed: int, responses: int = 7):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (responses,), generator=g)
    T = int(lengths.sum())
    normal = lambda *shape: torch.randn(*shape, generator=g, **f64)
    b = dict(lengths=lengths, hidden=normal(T, D), weight=normal(V, D), A=normal(responses),
             targets=torch.randint(0, V, (T,), generator=g), old=0.4 * normal(T), sampler=0.3 * normal(T),
             teacher=0.5 * normal(T))
    b["A"][0] = 0.0
    b["base"] = torch.log_softmax(b["hidden"] @ b["weight"].T, -1).gather(1, b["targets"][:, None])[:, 0]
    return b


def brute_force(b, args: rlsd.Args, lam: float, updates_before: bool):
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    logp_all = torch.log_softmax(hidden @ weight.T, -1)
    n, t, J = len(b["lengths"]), 0, torch.zeros((), **f64)
    for i in range(n):
        A = float(b["A"][i])
        for u in range(t, t + int(b["lengths"][i])):
            logp = logp_all[u, b["targets"][u]]
            delta = float(b["base"][u] + b["teacher"][u]) - float(logp.detach())
            w = math.exp(math.copysign(1, A) * delta) if A else 1.0
            A_hat = A * ((1 - lam) + lam * min(max(w, 1 - args.eps_w), 1 + args.eps_w))
            old = float(b["base"][u] + b["old"][u]) if updates_before else float(logp)
            rho = torch.exp(logp - old)
            gain = torch.min(rho * A_hat, torch.clamp(rho, 1 - args.clip_low, 1 + args.clip_high) * A_hat)
            if args.dual_clip and A_hat < 0:
                gain = torch.max(gain, torch.tensor(args.dual_clip * A_hat, **f64))
            if args.tis:
                gain = gain * min(math.exp(old - float(b["base"][u] + b["sampler"][u])), args.tis)
            J = J + gain / (int(b["lengths"].sum()) if args.mean == "token" else n * int(b["lengths"][i]))
        t += int(b["lengths"][i])
    (-J).backward()
    return -J.detach(), hidden.grad, weight.grad


def ours(b, args: rlsd.Args, lam: float, updates_before: bool):
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    lengths = b["lengths"][None].double()
    w = rlsd.token_weights(lengths, torch.ones_like(lengths, dtype=torch.bool), args)[0]
    each = lambda x: x.double().repeat_interleave(b["lengths"])
    inputs = rlsd.Inputs(advantage=each(b["A"]), weight=each(w), sampler_logp=b["base"] + b["sampler"],
                         old_logp=b["base"] + b["old"] if updates_before else None,
                         teacher_logp=b["base"] + b["teacher"] if lam > 0 else None)
    total, _ = policy_loss(hidden, weight, b["targets"], partial(rlsd.loss, lam=lam, args=args), inputs)
    total.backward()
    return total.detach(), hidden.grad, weight.grad


def credited(A: torch.Tensor, teacher_logp: torch.Tensor, logp: torch.Tensor, lam: float, eps_w: float):
    """Â_t and w_t."""
    w = rlsd.token_credit(logp, rlsd.Inputs(A, torch.ones_like(A), logp, None, teacher_logp))
    return rlsd.redistribute(A, w, lam, eps_w), w


@pytest.mark.parametrize("flags", [{}, {"mean": "token"}, {"dual_clip": 3.0}, {"tis": 0.0},
                                   {"eps_w": 0.9}, {"dual_clip": 1.05, "clip_low": 0.9, "clip_high": 0.9}], ids=str)
@pytest.mark.parametrize("updates_before", [False, True])
def test_loss_and_gradient_equal_brute_force(flags, updates_before, one_process):
    for seed, lam in ((0, 0.5), (1, 1.0), (2, 0.17), (3, 0.0)):
        b, args = make_batch(seed), rlsd.Args(**flags)
        for got, expected in zip(ours(b, args, lam, updates_before), brute_force(b, args, lam, updates_before)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


floats = st.floats(-60, 0)


@given(st.lists(st.tuples(st.floats(-5, 5), floats, floats), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 0.99))
@settings(deadline=None)
def test_the_teacher_never_turns_the_sign_and_moves_at_most_lambda_epsilon(rows, lam, eps_w):
    A, teacher, student = (torch.tensor(x, **f64) for x in zip(*rows))
    A_hat, _ = credited(A, teacher, student, lam, eps_w)
    assert torch.equal(A_hat.sign(), A.sign())
    assert ((A_hat - A).abs() <= A.abs() * (lam * eps_w + 1e-12)).all()


@given(st.lists(st.tuples(st.floats(-5, 5), floats), min_size=1, max_size=20), st.floats(0, 1))
@settings(deadline=None)
def test_it_is_grpo_without_lambda_without_a_gap_and_without_an_advantage(rows, lam):
    A, logp = (torch.tensor(x, **f64) for x in zip(*rows))
    other = logp + torch.linspace(-3, 3, len(logp), **f64)
    assert torch.equal(credited(A, other, logp, 0.0, 0.2)[0], A)
    torch.testing.assert_close(credited(A, logp, logp, lam, 0.2)[0], A, rtol=1e-15, atol=0)
    assert torch.equal(credited(torch.zeros_like(A), other, logp, lam, 0.2)[0], torch.zeros_like(A))


@pytest.mark.parametrize("updates_before", [False, True])
def test_without_lambda_the_loss_is_that_of_grpo_to_the_bit(updates_before, one_process):
    b = make_batch(5)
    mine, other = rlsd.Args(clip_high=0.28), grpo.Args(beta=0.0, clip_high=0.28)
    got = ours(b, mine, 0.0, updates_before)
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    w = grpo.token_weights(b["lengths"][None].double(), torch.ones(1, len(b["lengths"]), dtype=torch.bool), other)[0]
    each = lambda x: x.double().repeat_interleave(b["lengths"])
    inputs = grpo.Inputs(each(b["A"]), each(w), b["base"] + b["sampler"],
                         b["base"] + b["old"] if updates_before else None, None,
                         torch.arange(len(b["lengths"])).repeat_interleave(b["lengths"]))
    total, _ = policy_loss(hidden, weight, b["targets"], partial(grpo.loss, args=other), inputs)
    total.backward()
    for x, y in zip(got, (total.detach(), hidden.grad, weight.grad)):
        assert torch.equal(x, y)


def test_no_gradient_reaches_the_weights_w():
    A, teacher, student = torch.ones(3, **f64), torch.zeros(3, requires_grad=True, **f64), torch.ones(3, requires_grad=True)
    assert not any(x.requires_grad for x in credited(A, teacher, student, 0.5, 0.2))


def test_the_ratio_of_teacher_to_student_has_mean_one():
    """E_{y~P_S}[P_T/P_S] = 1, so right responses keep their advantage on average; E[P_S/P_T] = 1 + χ² is above it."""
    g = torch.Generator().manual_seed(0)
    logp, logq = (torch.log_softmax(torch.randn(6, generator=g, **f64), -1) for _ in range(2))
    w = lambda sign: credited(torch.full((6,), sign, **f64), logq, logp, 1.0, 1.0)[1]
    assert (logp.exp() * w(1.0)).sum().item() == pytest.approx(1, abs=1e-12)
    chi2 = ((logp.exp() - logq.exp()) ** 2 / logq.exp()).sum().item()
    assert (logp.exp() * w(-1.0)).sum().item() == pytest.approx(1 + chi2, abs=1e-12)


def test_right_responses_unclipped_follow_the_forward_kl():
    """For A > 0, λ = 1 and no clip: E_{y~P_S}[w ∇log P_S(y)] = −∇KL(P_T‖P_S), enumerated."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(6, generator=g, requires_grad=True, **f64)
    logq = torch.log_softmax(torch.randn(6, generator=g, **f64), -1)
    logp = torch.log_softmax(z, -1)
    # ε_w = 1 cuts below 0, where no weight is; above 2, so scale the teacher until no ratio reaches 2
    logq = torch.log_softmax(0.9 * logp.detach() + 0.1 * logq, -1)
    A_hat, w = credited(torch.ones(6, **f64), logq, logp, 1.0, 1.0)
    assert w.max() < 2 and torch.equal(A_hat, w)
    expected, = torch.autograd.grad(-(logq.exp() * (logq - logp)).sum(), z, retain_graph=True)
    got, = torch.autograd.grad((logp.exp().detach() * A_hat * logp).sum(), z)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_theorem_4_the_ratios_multiply_to_the_belief_in_the_reference():
    """Where the teacher is the Bayes conditional of one joint P(y, r): Π_t P_T/P_S = P(r | y)/P(r), for every y and r."""
    g = torch.Generator().manual_seed(2)
    joint = torch.rand(3, 3, 3, 2, generator=g, **f64)  # y_1, y_2, y_3, r
    joint /= joint.sum()
    for *y, r in itertools.product(range(3), range(3), range(3), range(2)):
        product = 1.0
        for t in range(3):
            here, before = joint[tuple(y[: t + 1])], joint[tuple(y[:t])]
            student = here.sum() / before.sum()
            teacher = here[..., r].sum() / before[..., r].sum()
            _, w = credited(torch.ones(1, **f64), teacher.log()[None], student.log()[None], 1.0, 1.0)
            product *= w.item()
        belief = joint[tuple(y)][r] / joint[tuple(y)].sum() / joint[..., r].sum()
        assert product == pytest.approx(belief.item(), rel=1e-10)


def test_lambda_falls_linearly_to_zero():
    args = rlsd.Args()
    values = [rlsd.lam_at(s, args) for s in range(60)]
    assert values[0] == 0.5 and values[50:] == [0.0] * 10
    assert all(a - b == pytest.approx(0.01) for a, b in zip(values[:50], values[1:51]))


def test_the_teachers_prompt_is_the_students_with_the_reference_added():
    p = rlsd.Problem("1", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "42", "because 42")
    for hint, text in (("answer", "42"), ("solution", "because 42")):
        shown = rlsd.teacher_chat(p, rlsd.Args(hint=hint))
        assert shown[0] == p.messages[0] and shown[1]["content"].startswith("q\n\n")
        assert shown[1]["content"].endswith(text) or f"{text}." in shown[1]["content"]
    assert p.messages[1]["content"] == "q"  # the student's own stays as it is
    with pytest.raises(SystemExit, match="has no answer"):
        rlsd.teacher_chat(rlsd.Problem("1", p.messages), rlsd.Args())


@pytest.mark.parametrize("text, leaks", [("2+2=4", False), ("As the reference answer says, 4", True),
                                         ("the final answer is given as 4", True), ("my answer is 4", False), ("So the final answer is 42.", False)])
def test_the_leak_detector(text, leaks):
    assert rlsd.refers_to_a_reference(text) == leaks


SMALL = [*GROUPS, "--eval_every", "3", "--teacher_every", "2"]


def run(out, *flags):
    rlsd.main(parse(rlsd.Args, rlsd.presets, [*SMALL, "--out", str(out), *flags]))


def test_a_resume_includes_the_teacher_bitwise(tmp_path):
    """The interruption falls between two copies, so the teacher is neither the start nor the student."""
    flags = ["--steps", "4", "--save_every", "3", "--minibatches", "2"]
    run(tmp_path, *flags, "--name", "whole")
    parts = interrupted(tmp_path / "whole", "parts", 3)
    run(tmp_path, *flags, "--name", "parts", "--resume", "auto")
    assert_same_run(tmp_path / "whole", parts, 4)
    for step in (3, 4):  # the teacher becomes the student after steps 2 and 4
        from_start, from_student = teacher_gaps(parts, step)
        assert from_start > 0 and (from_student == 0) == (step == 4)
    row = metrics(parts)[1]
    assert {"w/mean", "w/clip_high", "w/clip_low", "delta/right", "delta/wrong", "nll", "leak/rate", "lam"} <= row.keys()


def test_a_problem_without_the_hint_ends_the_run_before_it_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(Verifier, "check", lambda *_: None)  # in a process of its own
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"question": f"Compute {a}+11.", "answer": str(a + 11)}) + "\n" for a in range(10, 40)))
    with pytest.raises(SystemExit, match="has no solution: take the other --hint"):
        run(tmp_path, "--task", f"jsonl:{path}", "--hint", "solution", "--name", "none")
    torch.distributed.destroy_process_group()
    assert not (tmp_path / "none" / "metrics.jsonl").exists()


def test_with_lambda_zero_the_run_is_grpos(tmp_path):
    run(tmp_path, "--steps", "2", "--name", "rlsd", "--lam", "0")
    grpo.main(parse(grpo.Args, grpo.presets, [
        *GROUPS, "--eval_every", "3", "--out", str(tmp_path), "--name", "grpo", "--steps", "2", "--clip_high", "0.28", "--loss", "grpo",
        "--weight_decay", "0"]))
    a, b = metrics(tmp_path / "rlsd"), metrics(tmp_path / "grpo")
    assert [(r.get("reward/mean"), r.get("grad_norm")) for r in a] == [(r.get("reward/mean"), r.get("grad_norm")) for r in b]
    assert a[1]["grad_norm"] > 0

"""sdpo.py's formulas against float64 brute force over full logits, its contexts, its teachers."""
import math
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, GROUPS, interrupted, policy_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import assert_same_run, metrics, teacher_gaps

import sdpo
from common.chat import as_text, chat_ids, load_tokenizer
from common.policy import ema_update, full_weights, load_policy, local
from common.rollouts import Batch, Group
from common.sampler import Rollout
from common.settings import Setup, parse
from common.tasks import Problem
from common.verifiers import Verdict
from kernels.head import TokenStats, token_stats

V, D = 9, 4
f64 = dict(dtype=torch.float64)


def make_batch(seed: int, responses: int = 6):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (responses,), generator=g)
    T = int(lengths.sum())
    normal = lambda *shape: torch.randn(*shape, generator=g, **f64)
    b = dict(lengths=lengths, hidden=normal(T, D), weight=normal(V, D), A=normal(responses), old=0.5 * normal(T),
             sampler=0.5 * normal(T), targets=torch.randint(0, V, (T,), generator=g),
             teacher=[(normal(T, D), normal(V, D)) for _ in range(2)], has_context=torch.rand(responses, generator=g) < 0.6)
    b["has_context"][0] = True
    return b


def one_divergence(args: sdpo.Args, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """D between p [V] (with gradient) and q [V] (without), written out entry by entry."""
    K = 1 if args.granularity == "token" else args.top_k
    if K:
        chosen = sorted(range(V), key=lambda v: -float(p[v]))[:K]
        rest = [v for v in range(V) if v not in chosen]
        P = [p[v] for v in chosen] + ([sum(p[v] for v in rest)] if rest else [])
        Q = [q[v] for v in chosen] + ([sum(q[v] for v in rest)] if rest else [])
    else:
        P, Q = list(p), list(q)
    total = torch.zeros((), **f64)
    for a, b in zip(P, Q):
        if args.kl == "reverse" and args.adv_clip:  # the gradient of Σ p·sg(−A), A clipped; the value is the KL's
            A = math.log(b) - math.log(float(a))
            bounded = min(max(A, -args.adv_clip), args.adv_clip)
            total = total - (a - a.detach()) * bounded + a.detach() * (-A)
        elif args.kl == "reverse":
            total = total + a * (a.log() - b.log())
        elif args.kl == "forward":
            total = total + b * (b.log() - a.log())
        else:
            m = 0.5 * a + 0.5 * b
            total = total + 0.5 * a * (a.log() - m.log()) + 0.5 * b * (b.log() - m.log())
    return total


def brute_force(b, args: sdpo.Args, mix, updates_before: bool):
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    logp = torch.log_softmax(hidden @ weight.T, -1)
    teacher_logits = sum(m * (h @ w.T) for m, (h, w) in zip(mix, b["teacher"]))
    logq = torch.log_softmax(teacher_logits, -1)
    lengths, L, t = b["lengths"].tolist(), torch.zeros((), **f64), 0
    kept = [bool(s) or args.lam > 0 for s in b["has_context"]]
    tokens, responses = sum(n for n, k in zip(lengths, kept) if k), sum(kept)
    for i, n in enumerate(lengths):
        span = range(t, t + n)
        t += n
        if not kept[i]:
            continue
        mean_A = sum(float(logq[u, b["targets"][u]] - logp[u, b["targets"][u]].detach()) for u in span) / n
        for u in span:
            y = b["targets"][u]
            old = float(b["base"][u] + b["old"][u]) if updates_before else float(logp[u, y].detach())
            if args.granularity in ("logit", "token"):
                term = one_divergence(args, logp[u].exp(), logq[u].exp())
            else:
                A = mean_A if args.granularity == "sequence" else float(logq[u, y] - logp[u, y].detach())
                term = -A * logp[u, y]
            ratio = torch.exp(logp[u, y] - old)
            if args.tis:
                term = term * min(float(ratio.detach()), args.tis)
            term = term * float(b["has_context"][i])
            if args.lam:
                A, clipped = float(b["A"][i]), ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
                share = torch.min(ratio * A, clipped * A)  # Eq. 12
                term = (1 - args.lam) * term - args.lam * share
            if args.tis:
                term = term * min(math.exp(old - float(b["base"][u] + b["sampler"][u])), args.tis)
            L = L + term / (tokens if args.mean == "token" else n * responses)
    L.backward()
    return L.detach(), hidden.grad, weight.grad


def ours(b, args: sdpo.Args, mix, updates_before: bool):
    hidden, weight = b["hidden"].clone().requires_grad_(), b["weight"].clone().requires_grad_()
    each = lambda x: x.double().repeat_interleave(b["lengths"])
    w = sdpo.token_weights(b["lengths"][None].double(), b["has_context"][None] | (args.lam > 0), args)[0]
    inputs = sdpo.Inputs(weight=each(w), has_context=each(b["has_context"]), advantage=each(b["A"]),
                         sampler_logp=b["base"] + b["sampler"],
                         old_logp=b["base"] + b["old"] if updates_before else None,
                         rollout=torch.arange(len(b["lengths"])).repeat_interleave(b["lengths"]))
    total, _ = policy_loss(hidden, weight, b["targets"], partial(sdpo.loss, args=args), inputs,
                           b["teacher"][: len(mix)], teacher_mix=mix, divergence=sdpo.divergence(args),
                           per_response=args.granularity == "sequence")
    total.backward()
    return total.detach(), hidden.grad, weight.grad


ARMS = [{}, {"kl": "reverse"}, {"kl": "forward"}, {"top_k": 3}, {"kl": "reverse", "top_k": 2}, {"kl": "forward", "top_k": 4},
        {"granularity": "token", "kl": "reverse"}, {"granularity": "sampled", "kl": "reverse"}, {"granularity": "sequence", "kl": "reverse"},
        {"lam": 0.9, "kl": "reverse"}, {"mean": "sequence"}, {"tis": 0.0}, {"tis": 1.2}, {"kl": "reverse", "adv_clip": 0.3}]


@pytest.mark.parametrize("updates_before", [False, True])
@pytest.mark.parametrize("flags", ARMS, ids=str)
def test_loss_and_gradient_equal_brute_force(flags, updates_before, one_process):
    for seed, mix in ((0, (1.0,)), (1, (0.95, 0.05))):
        b, args = make_batch(seed), sdpo.Args(**flags)
        b["base"] = torch.log_softmax(b["hidden"] @ b["weight"].T, -1).gather(1, b["targets"][:, None])[:, 0]
        for got, expected in zip(ours(b, args, mix, updates_before), brute_force(b, args, mix, updates_before)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kl", ["jsd", "reverse", "forward"])
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(kl):
    b = make_batch(0)
    (h, w), = b["teacher"][:1]
    full, cut = (token_stats(b["hidden"], b["weight"], b["targets"], h, w, divergence=sdpo.divergence(sdpo.Args(kl=kl, top_k=K)))
                 for K in (0, V))
    torch.testing.assert_close(cut.kl, full.kl, rtol=1e-9, atol=1e-12)


def test_the_top_k_gradient_is_dense_and_equal_to_autograds(one_process):
    """Every entry outside the K gets the tail's gradient: none is zero."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(4, V, generator=g, requires_grad=True, **f64)
    teacher, one = torch.randn(4, V, generator=g, **f64), torch.eye(V, **f64)
    stats = token_stats(z, one, torch.zeros(4, dtype=torch.long), teacher, one,
                        divergence=sdpo.divergence(sdpo.Args(kl="reverse", top_k=3)))
    stats.kl.sum().backward()
    other = z.detach().clone().requires_grad_()
    args = sdpo.Args(kl="reverse", top_k=3)
    sum(one_divergence(args, p, q) for p, q in zip(other.softmax(-1), teacher.softmax(-1))).backward()
    torch.testing.assert_close(z.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert (z.grad != 0).all()


def test_the_semi_gradient_is_proposition_2_1s_expectation():
    """∇L = E_{ŷ~π}[log(π/q) ∇log π], enumerated over five symbols (v2; v1 printed the sum without π); in the advantage
    view it is −Σ_ŷ π(ŷ) A(ŷ) ∇log π(ŷ)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 5, generator=g, requires_grad=True, **f64)
    teacher, one = torch.randn(1, 5, generator=g, **f64), torch.eye(5, **f64)
    stats = token_stats(z, one, torch.zeros(1, dtype=torch.long), teacher, one,
                        divergence=sdpo.divergence(sdpo.Args(kl="reverse")))
    got, = torch.autograd.grad(stats.kl.sum(), z)
    pi = z.detach().softmax(-1)[0]
    A = (teacher.log_softmax(-1) - z.detach().log_softmax(-1))[0]
    grad_log = torch.eye(5, **f64) - pi  # row ŷ: ∇_z log π(ŷ)
    expected = sum(pi[y] * -A[y] * grad_log[y] for y in range(5))
    torch.testing.assert_close(got[0], expected, rtol=1e-10, atol=1e-14)


def group_of(*judged: tuple[float, str, str], question: str = "question") -> Group:
    """Responses as (reward, text, feedback)."""
    rollouts = [Rollout([1], [2, 3], [-0.1] * 2, "stop", text) for _, text, _ in judged]
    verdicts = [Verdict(reward, feedback) for reward, _, feedback in judged]
    return Group(Problem(question, [{"role": "user", "content": question}]), rollouts, verdicts)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=10), st.integers(0, 99))
@settings(deadline=None)
def test_a_sibling_is_another_success_or_none(rewards, seed):
    group, rng = group_of(*[(float(r), "", "") for r in rewards]), random.Random(seed)
    for i in range(len(rewards)):
        j = sdpo.choose_sibling(group, i, rng)
        if j is None:
            assert not [k for k, r in enumerate(rewards) if r == 1 and k != i]
        else:
            assert j != i and rewards[j] == 1


@pytest.mark.parametrize("which, solution, feedback, expected", [
    ("either", "sol", "fb", ["sol"]), ("either", None, "fb", ["fb"]), ("both", "sol", "fb", ["sol", "fb"]),
    ("solution", None, "fb", []), ("feedback", "sol", "fb", ["fb"]), ("feedback", "sol", "", []), ("both", None, "", [])])
def test_contexts_and_the_order_of_their_fields(which, solution, feedback, expected):
    problem = Problem("p", [{"role": "system", "content": "s"}, {"role": "user", "content": "question"}])
    messages = sdpo.teacher_chat(problem, solution, feedback, sdpo.Args(context=which))
    if not expected:
        assert messages is None
        return
    text = messages[-1]["content"]
    assert messages[0] == problem.messages[0] and text.startswith("question")
    places = [text.index(e) for e in expected]
    assert places == sorted(places) and text.endswith(sdpo.CLOSING)
    assert all(e in text for e in expected) and not {"sol", "fb"} - set(expected) & set(text.split("\n"))


def test_thoughts_are_cut_from_demonstrations():
    problem = Problem("p", [{"role": "user", "content": "q"}])
    text = sdpo.teacher_chat(problem, "<think>long\nthought</think>\nanswer 5", None, sdpo.Args())[-1]["content"]
    assert "thought" not in text and "answer 5" in text


def test_reasoning_that_the_prompt_asks_for_is_shown_as_a_part_of_the_solution():
    """SciKnowEval's system message asks for <reasoning> before <answer>; the released code cuts <think> alone."""
    system = {"role": "system", "content": "Respond so:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"}
    problem = Problem("p", [system, {"role": "user", "content": "q"}])
    right = "<think>hm</think><reasoning>\nIron conducts.\n</reasoning>\n<answer>\nB\n</answer>"
    text = sdpo.teacher_chat(problem, right, None, sdpo.Args())[-1]["content"]
    assert "<reasoning>\nIron conducts.\n</reasoning>\n<answer>\nB" in text and "hm" not in text


def test_an_average_moves_by_one_percent_of_the_student_in_fp32(one_process):
    """α = 0.01 of a difference that bf16 cannot hold: weights near 1 and a step of 2e-4."""
    teacher, student = (load_policy(CHAIN, torch.device("cpu"), Setup()) for _ in range(2))
    before = {n: w.clone() for n, w in full_weights(teacher)}
    with torch.no_grad():
        for p in student.parameters():
            local(p).add_(2e-4)
    ema_update(teacher, student, 0.01)
    for n, w in full_weights(teacher):
        assert w.dtype == torch.float32
        torch.testing.assert_close(w, before[n] + 2e-6, rtol=0, atol=2.5e-7)
        assert (w != before[n]).float().mean() > 0.9
    ema_update(teacher, student, 1.0)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(full_weights(teacher), full_weights(student)))


SMALL = [*GROUPS, "--eval_every", "3"]


def run(out, *flags):
    sdpo.main(parse(sdpo.Args, sdpo.presets, [*SMALL, "--out", str(out), *flags]))


@pytest.mark.parametrize("flags", [[], ["--minibatches", "2", "--lam", "0.9", "--top_k", "20", "--kl", "jsd"]], ids=["demo", "many"])
def test_a_resume_includes_the_teacher_bitwise(flags, tmp_path):
    flags = ["--steps", "2", "--save_every", "1", *flags]
    run(tmp_path, *flags, "--name", "whole")
    parts = interrupted(tmp_path / "whole", "parts", 1)
    run(tmp_path, *flags, "--name", "parts", "--resume", "auto")
    assert_same_run(tmp_path / "whole", parts, 2)
    from_start, from_student = teacher_gaps(parts, 2)
    assert from_start > 0 and from_student > 0
    row = metrics(parts)[0]
    assert {"context/solution", "context/feedback", "context/none", "kl/right", "kl/wrong", "teacher/accuracy",
            "teacher/entropy"} <= row.keys()


@pytest.mark.parametrize("teacher", ["trust_region", "frozen", "live"])
def test_every_teacher_trains(teacher, tmp_path):
    run(tmp_path, "--steps", "1", "--name", "r", "--teacher", teacher)
    assert metrics(tmp_path / "r")[0]["grad_norm"] > 0


def test_a_group_without_success_or_feedback_has_no_loss_and_is_counted(tmp_path):
    run(tmp_path, "--steps", "1", "--name", "r", "--max_tokens", "3", "--context", "solution")
    row = metrics(tmp_path / "r")[0]
    assert row["context/none"] == 1 and row["grad_norm"] == 0 and "kl" not in row


@pytest.fixture(scope="module")
def rollouts():
    """As far as the teacher's prompts need them."""
    tokenizer = load_tokenizer(CHAIN)
    return SimpleNamespace(chat_ids=lambda chat: chat_ids(tokenizer, chat, False), tokenizer=tokenizer,
                           as_text=lambda text: as_text(tokenizer, text), context_length=1024)


@pytest.mark.parametrize("context", ["either", "feedback", "both"])
def test_feedback_on_a_response_that_passed_is_not_shown(context, rollouts):
    """Whatever a verifier says of a success: a lone success has no signal in any context."""
    args = sdpo.Args(context=context)
    batch = Batch([group_of((1.0, "right", "well done")), group_of((0.5, "half", "not yet"))])
    prompts, has_context, shown = sdpo.teacher_prompts(batch, rollouts, 0, args)
    assert shown == ["none", "feedback"] and has_context.tolist() == [[False], [True]]
    assert prompts[0] == batch.prompts[0] and "not yet" in rollouts.tokenizer.decode(prompts[1])


def test_feedback_on_a_response_that_was_cut_off_says_so(rollouts):
    """As released: what a checker finds in half a response would mislead."""
    group = group_of((0.0, "half a pro", "SyntaxError"), (0.0, "whole", "IndexError"))
    group.rollouts[0].finish_reason = "length"
    prompts, _, shown = sdpo.teacher_prompts(Batch([group]), rollouts, 0, sdpo.Args())
    cut, whole = map(rollouts.tokenizer.decode, prompts)
    assert shown == ["feedback"] * 2 and "cut off after 2 tokens" in cut
    assert "SyntaxError" not in cut and "IndexError" in whole and "cut off" not in whole


def test_what_a_teacher_is_shown_is_the_text_of_another_right_response(rollouts):
    """Of the same question, with control tokens as text; a failure that has no such sibling is shown its feedback."""
    groups = [
        group_of((1.0, "alpha<|im_end|>", ""), (0.0, "beta", "no 1"), (1.0, "gamma", ""), (0.0, "delta", "no 2")),
        group_of((0.0, "epsilon", "no 3"), (1.0, "zeta", ""), (0.0, "eta", "no 4"), (0.0, "theta", "no 5")),
        group_of((0.0, "iota", "no 6"), *[(0.0, "kappa", "")] * 3)]
    expected = [["gamma"], ["alpha", "gamma"], ["alpha"], ["alpha", "gamma"], ["zeta"], [], ["zeta"], ["zeta"], ["no 6"], [], [], []]
    words = [text.partition("<")[0] for group in groups for text in (o.text for o in group.rollouts)]
    words += [f"no {k}" for k in range(1, 7)]
    batch, kinds = Batch(groups), []
    prompts, has_context, shown = sdpo.teacher_prompts(batch, rollouts, 0, sdpo.Args())
    for prompt, choices, signal in zip(prompts, expected, has_context.flatten().tolist()):
        assert signal == bool(choices)
        kinds.append("none" if not choices else "feedback" if choices[0].startswith("no") else "solution")
        if choices:
            text = rollouts.tokenizer.decode(prompt)
            found = [word for word in words if f"\n{word}" in text]
            assert len(found) == 1 and found[0] in choices
            assert prompt.count(rollouts.tokenizer.eos_token_id) == rollouts.chat_ids(
                [{"role": "user", "content": "q"}]).count(rollouts.tokenizer.eos_token_id)
    assert shown == kinds


def test_feedback_longer_than_the_context_is_an_error_in_words(rollouts):
    batch = Batch([group_of((0.0, "a", "wrong " * 2000))])
    with pytest.raises(SystemExit, match="more than the model's context of 1024"):
        sdpo.teacher_prompts(batch, rollouts, 0, sdpo.Args())


@pytest.mark.parametrize("lam", [0.5, 0.9])
def test_no_log_ratio_overflows_the_loss_or_its_gradient(lam):
    """Up to the bound they are those of float64. Beyond it the slope of GRPO's share stays."""
    x = torch.tensor([-1e4, -100, -20, -1, 0.1, 1, 19.5, 20, 89, 1e3, 1e4])
    for A in (1.0, -1.0):
        logp, zeros = x.clone().requires_grad_(), torch.zeros_like(x)
        token = TokenStats(*[zeros] * len(TokenStats._fields))._replace(logp=logp)
        one, rollout = torch.ones_like(x), zeros.long()
        inputs = sdpo.Inputs(one, zeros, A * one, zeros, zeros, rollout)
        value = sdpo.loss(token, inputs, sdpo.Args(lam=lam))
        grad, = torch.autograd.grad(value.sum(), logp)
        assert value.isfinite().all() and grad.isfinite().all()
        for u, ratio in enumerate(map(math.exp, x.clamp(max=20).tolist())):
            clipped = min(max(ratio, 0.8), 1.28)
            slope = 0.0 if ratio * A > clipped * A else -lam * ratio * A
            assert grad[u].item() == pytest.approx(slope, rel=1e-5, abs=1e-30)
            if x[u] <= 20:
                expected = -lam * min(ratio * A, clipped * A)
                assert value[u].item() == pytest.approx(expected, rel=1e-5, abs=1e-30)

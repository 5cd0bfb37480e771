"""The training forward: packing, positions, splits over micro-batches and ranks, and agreement with the sampler."""
import math
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN, at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import finish, launch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import grpo
from common import checkpoints
from common import policy as policy_module
from common.chat import chat_ids, load_tokenizer
from common.microbatches import micro_batches
from common.policy import (
    ema_update,
    frozen_copy,
    full_weights,
    load_policy,
    local,
    make_optimizer,
    mismatch,
    optimizer_step,
    score,
    trained_parameters,
    whole,
)
from common.sampler import HFSampler
from common.settings import Setup
from common.tasks import load_task
from common.verifiers.pool import Verifier
from kernels.head import TokenStats

CPU = torch.device("cpu")


def some_rollouts(count: int, n: int = 2, max_tokens: int = 24):
    tokenizer = load_tokenizer(CHAIN)
    prompts = [chat_ids(tokenizer, p.messages) for p in load_task("chain", heldout=8).train[:count]]
    sampler = HFSampler(CHAIN, tokenizer, CPU)
    groups = sampler.sample(prompts, n, seed=(0, 0), keys=range(count), max_tokens=max_tokens)
    return sampler, [o for g in groups for o in g]


def test_a_group_larger_than_the_rows_is_decoded_in_parts(monkeypatch):
    """The rows are what limits the memory; what is sampled does not depend on them."""
    tokenizer = load_tokenizer(CHAIN)
    prompts = [chat_ids(tokenizer, p.messages) for p in load_task("chain", heldout=8).train[:2]]
    decode, counts, found = HFSampler.decode, [], []

    def counted(sampler, prompts, n, *rest):
        counts.append(len(prompts) * n)
        return decode(sampler, prompts, n, *rest)

    monkeypatch.setattr(HFSampler, "decode", counted)
    for rows in (3, 128):
        sampler = HFSampler(CHAIN, tokenizer, CPU, rows=rows)
        groups = sampler.sample(prompts, 8, seed=(0, 0), keys=range(2), max_tokens=24)
        found.append([o.response_ids for group in groups for o in group])
    assert counts == [3, 3, 2, 3, 3, 2, 16] and found[0] == found[1]


def test_a_prompt_of_several_is_read_once_and_each_keeps_its_own_samples(monkeypatch):
    """As a teacher's prompt that siblings share."""
    tokenizer = load_tokenizer(CHAIN)
    a, b = (chat_ids(tokenizer, p.messages) for p in load_task("chain", heldout=8).train[:2])
    sampler = HFSampler(CHAIN, tokenizer, CPU)
    logits, read = sampler.logits, []
    monkeypatch.setattr(sampler, "logits", lambda ids, *rest: read.append(len(ids)) or logits(ids, *rest))

    def sample(prompts, keys):
        read.clear()
        groups = sampler.sample(prompts, 2, seed=(0, 0), keys=keys, max_tokens=24)
        return read[0], [[o.response_ids for o in group] for group in groups]

    count, together = sample([a, b, list(a)], [0, 1, 2])
    apart = [sample([prompt], [key])[1][0] for key, prompt in enumerate((a, b, a))]
    assert count == 2 and together == apart and together[0] != together[2]


def log_likelihood(stats: TokenStats, _) -> torch.Tensor:
    return stats.logp


def stats_of_each(policy, prompts, responses, budget: int, share: bool) -> list[TokenStats]:
    """What the training forward says of every rollout."""
    out = [None] * len(prompts)
    for m in micro_batches(prompts, responses, None, at_most(budget, share), CPU):
        if share:
            assert len(m.prefix) == len({tuple(prompts[i]) for i in m.rows})
        total, stats = policy(m, log_likelihood)
        torch.testing.assert_close(total, stats.logp.sum())
        for row, *parts in zip(m.rows, *(x.split(m.lengths) for x in stats)):
            out[row] = TokenStats(*parts)
    return out


def test_packed_logprobs_equal_one_by_one(one_process):
    """Every budget gives the log-probability and entropy that the plain model gives each response alone."""
    _, rollouts = some_rollouts(5)
    prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
    lm = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32)
    policy = load_policy(CHAIN, CPU, Setup(checkpointing=False))
    for budget, share in ((1, False), (100, False), (10_000, False), (10_000, True)):
        found = stats_of_each(policy, prompts, responses, budget, share)
        scored = score(policy, prompts, responses, at_most(budget))
        for p, r, got, alone in zip(prompts, responses, found, scored):
            with torch.no_grad():
                logp = lm(torch.tensor([p + r])).logits[0, len(p) - 1 : -1].double().log_softmax(-1)
            expected = logp.gather(1, torch.tensor(r)[:, None])[:, 0]
            torch.testing.assert_close(got.logp.double(), expected, atol=2e-5, rtol=0)
            torch.testing.assert_close(alone.double(), expected, atol=2e-5, rtol=0)
            torch.testing.assert_close(got.entropy.double(), -(logp.exp() * logp).sum(1), atol=2e-5, rtol=0)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=20), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_micro_batches_hold_each_token_once_within_the_budget(sizes, budget):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        r = random.Random(0)
        prompts = [[r.randrange(9) for _ in range(p)] for p, _ in sizes]
        responses = [[r.randrange(9) for _ in range(n)] for _, n in sizes]
        seen = []
        for m in micro_batches(prompts, responses, None, at_most(budget), CPU):
            assert m.ids.numel() <= budget or len(m.rows) <= 1
            flat, start = m.ids.flatten(), 0
            for row, n in zip(m.rows, m.lengths):
                index = m.index[start : start + n]
                assert flat[index + 1].tolist() == m.targets[start : start + n].tolist() == responses[row]
                assert flat[index[0]].item() == prompts[row][-1]  # the first token is predicted at the prompt's end
                start += n
            seen += m.rows
        assert sorted(seen) == list(range(len(sizes)))
    finally:
        dist.destroy_process_group()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=20), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_shared_prompts_stay_within_the_budget_too(rows, budget):
    """Four prompts of very different lengths: one may be padded to another's, and so may the responses."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        asked = [[7] * length for length in (1, 9, 20, 40)]
        prompts, responses = [asked[i] for i, _ in rows], [[5] * n for _, n in rows]
        micros = micro_batches(prompts, responses, None, at_most(budget, True), CPU)
        assert all(m.padded <= budget or len(m.rows) <= 1 for m in micros)
        assert sorted(row for m in micros for row in m.rows) == list(range(len(rows)))
    finally:
        dist.destroy_process_group()


def test_the_end_token_is_trained_and_truncation_comes_from_the_finish_reason(one_process):
    sampler, rollouts = some_rollouts(6, max_tokens=64)
    stopped = [o for o in rollouts if not o.truncated]
    assert stopped and all(o.response_ids[-1] in sampler.ends for o in stopped)
    for micro in micro_batches([o.prompt_ids for o in stopped], [o.response_ids for o in stopped],
                               None, at_most(10**6), CPU):
        ends = torch.tensor(micro.lengths).cumsum(0) - 1
        assert torch.isin(micro.targets[ends], torch.tensor(sampler.ends)).all()
    _, cut = some_rollouts(6, max_tokens=3)
    assert all(o.truncated and o.finish_reason == "length" and len(o.response_ids) == 3 for o in cut)
    assert not any(set(o.response_ids) & set(sampler.ends) for o in cut)


def test_sampler_and_trainer_agree_and_move_together(one_process):
    """First step: the sampler's log-probabilities are the trainer's (1e-4 in fp32). After an optimizer step and a
    sync, those of the same ids move, and agree again."""
    sampler, rollouts = some_rollouts(6, n=4)
    prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
    policy = load_policy(CHAIN, CPU, Setup())
    before = score(policy, prompts, responses, at_most(4096))
    gap = max((torch.tensor(o.logprobs) - b).abs().max() for o, b in zip(rollouts, before))
    assert gap < 1e-4
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    micro = micro_batches(prompts, responses, None, at_most(10**6), CPU)[0]
    total, _ = policy(micro, lambda stats, _: -stats.logp / len(micro.targets))
    total.backward()
    metrics = optimizer_step(policy, optimizer, 1e-3, 1.0)
    assert metrics["grad_norm"][0] > 0 and metrics["skipped_updates"] == [0]
    sampler.load(full_weights(policy))
    after = score(policy, prompts, responses, at_most(4096))
    assert max((a - b).abs().max() for a, b in zip(after, before)) > 1e-2
    with torch.no_grad():
        for p, r, expected in zip(prompts, responses, after):
            logp = sampler.lm(torch.tensor([p + r])).logits[0, len(p) - 1 : -1].log_softmax(-1)
            torch.testing.assert_close(logp.gather(1, torch.tensor(r)[:, None])[:, 0], expected, atol=1e-4, rtol=0)


def gradient(data: dict, budget: int, share: bool, out: str) -> None:
    """On each rank: the gradients of the three losses of grpo.py for its share of the questions."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    questions = len(data["rewards"]) // world
    mine = slice(rank * questions, (rank + 1) * questions)
    rewards = torch.tensor(data["rewards"][mine])
    prompts = [prompt for group in data["prompts"][mine] for prompt in group]
    responses = [response for group in data["responses"][mine] for response in group]
    lengths = torch.tensor([len(response) for response in responses]).view_as(rewards)
    policy = load_policy(CHAIN, CPU, Setup(checkpointing=False, share_prompts=share))
    found = {}
    for name in ("grpo", "dapo", "gspo"):
        args = grpo.Args(loss=name, beta=0.0, tis=0.0, max_tokens=50)
        A = grpo.advantages(rewards, args.std)
        weight = grpo.token_weights(lengths, torch.ones_like(lengths), args)
        micros = micro_batches(prompts, responses, A != 0, at_most(budget, share), CPU)
        for m in micros:
            unknown = torch.zeros(len(m.targets))
            inputs = grpo.Inputs(m.per_token(A), m.per_token(weight), unknown, None, None, m.rollout)
            loss = partial(grpo.loss, args=args)
            total, _ = policy(m, loss, inputs, per_response=name == "gspo")
            total.backward()
        for parameter, p in policy.named_parameters():
            found[name, parameter] = whole(p.grad)
            p.grad = None
    if rank == 0:
        torch.save((len(micros), found), out)


def test_any_split_of_a_batch_gives_the_same_gradient(tmp_path, one_process):
    """1 × 8, 2 × 4 and 4 × 2 (ranks × micro-batches) of one batch, with and without shared prompts; lengths and group
    signals are uneven over the ranks, and the last of four holds groups without any, so its micro-batches are empty."""
    r = random.Random(0)
    tokens = lambda low, high: [r.randrange(3, 500) for _ in range(r.randint(low, high))]
    data = {"prompts": [], "responses": [], "rewards": []}
    for q in range(8):
        prompt = tokens(5, 9)
        data["prompts"].append([prompt] * 3)
        data["responses"].append([tokens(2, 30) for _ in range(3)])
        data["rewards"].append([1.0, 0.0, float(q % 2)] if q < 5 else [1.0] * 3)
    results, out, log = [], str(tmp_path / "out.pt"), tmp_path / "log"
    for ranks, budget, share in ((1, 10**6, False), (1, 80, True), (2, 100, False), (4, 60, True)):
        if ranks == 1:
            gradient(data, budget, share, out)
        else:
            finish(launch(ranks, log, gradient, data, budget, share, out), log)
        results.append(torch.load(out))
    whole = results[0][1]
    assert results[1][0] >= 6 and results[2][0] >= 4 and results[3][0] >= 2
    for _, split in results[1:]:
        assert split.keys() == whole.keys()
        for (loss, name), g in split.items():
            scale = max(x.abs().max() for (other, _), x in whole.items() if other == loss).item()
            assert scale > 1e-5
            torch.testing.assert_close(g, whole[loss, name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("max_norm, factor", [(1.0, 0.2), (5.1, 1.0)])
def test_an_update_clips_the_gradient_and_takes_the_learning_rate_it_is_given(max_norm, factor):
    """Whatever the rate before was; what is logged is the norm before clipping, 5."""
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=9.0)
    layer.weight.grad = torch.tensor([[3.0, -4.0]])
    metrics = optimizer_step(layer, optimizer, 0.1, max_norm)
    moved = before - 0.1 * factor * torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(layer.weight.detach(), moved, rtol=0, atol=1e-6)
    assert metrics["grad_norm"] == [5.0] and metrics["lr"] == [0.1] and layer.weight.grad is None


def test_adamw_is_made_with_the_methods_moments_and_decay():
    """The first two updates of one weight, by AdamW's own formula."""
    layer = torch.nn.Linear(1, 1, bias=False)
    args = SimpleNamespace(lr=0.1, weight_decay=0.5)
    for overrides, decay in (({}, 0.5), ({"weight_decay": 0.25}, 0.25)):
        optimizer = make_optimizer(layer, args, betas=(0.6, 0.7), **overrides)
        torch.nn.init.constant_(layer.weight, 2.0)
        w, m, v = 2.0, 0.0, 0.0
        for t, g in ((1, 1.0), (2, -3.0)):
            layer.weight.grad = torch.full((1, 1), g)
            optimizer_step(layer, optimizer, args.lr, 100.0)
            m, v = 0.6 * m + 0.4 * g, 0.7 * v + 0.3 * g * g
            w -= 0.1 * decay * w + 0.1 * (m / (1 - 0.6**t)) / (v / (1 - 0.7**t)) ** 0.5
            assert layer.weight.item() == pytest.approx(w, rel=1e-5)


def test_what_is_logged_of_the_gap_between_trainer_and_sampler():
    trainer, sampler = torch.tensor([-1.0, -3.0, -2.0, -1.0]), torch.tensor([-1.0, -2.0, -4.0, -41.0])
    found = mismatch(trainer, sampler, tis=3.0)
    assert found["mismatch/max_abs_dlogp"].tolist() == [0, 1, 2, 40]
    assert found["mismatch/tis"].tolist() == pytest.approx([1, math.exp(-1), 3, 3])
    assert found["mismatch/kl"].tolist()[:3] == pytest.approx([0, math.exp(-1), math.exp(2) - 3])
    assert "mismatch/tis" not in mismatch(trainer, sampler)


def test_reading_a_policy_twice_moves_nothing(one_process):
    policy = load_policy(CHAIN, CPU, Setup())
    before = {n: w.clone() for n, w in full_weights(policy)}
    score(policy, [[1, 2, 3]], [[4, 5]], at_most(100))
    assert all(torch.equal(w, before[n]) for n, w in full_weights(policy))


def test_verifier_is_usable_from_a_run():
    v = Verifier()
    p = load_task("chain", heldout=8).train[0]
    assert [x.reward for x in v([p, p], [p.solution, "####"])] == [1.0, 0.0]
    v.close()


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointing_keeps_less_for_the_backward_pass_and_gives_the_same_gradient(rank, one_process):
    _, rollouts = some_rollouts(4)
    prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
    kept, gradients = [], []
    for checkpointing in (False, True):
        policy = load_policy(CHAIN, CPU, Setup(checkpointing=checkpointing, lora_rank=rank))
        with torch.no_grad():
            for i, p in enumerate(trained_parameters(policy)):
                local(p).add_(0.01 * (i % 2))  # under LoRA no longer the base
        micro, = micro_batches(prompts, responses, None, at_most(10**6), CPU)
        saved = {}

        def pack(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            total, _ = policy(micro, log_likelihood)
        kept.append(sum(saved.values()))
        total.backward()
        gradients.append([whole(p.grad) for p in trained_parameters(policy)])
    assert kept[1] < 0.5 * kept[0], kept
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_policy_that_stays_whole_computes_what_a_sharded_one_does(rank, one_process, monkeypatch):
    """One process on a CPU leaves FSDP out: the same step, to the bit."""
    _, rollouts = some_rollouts(4)
    prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
    weights = []
    for whole_model in (True, False):
        monkeypatch.setattr(policy_module, "stays_whole", lambda *_, answer=whole_model: answer)
        policy = load_policy(CHAIN, CPU, Setup(checkpointing=False, lora_rank=rank))
        assert all(isinstance(p, DTensor) != whole_model for p in policy.parameters())
        teacher = frozen_copy(policy, CPU)
        optimizer = make_optimizer(policy, SimpleNamespace(lr=1e-2, weight_decay=0.0))
        micro, = micro_batches(prompts, responses, None, at_most(10**6), CPU)
        for _ in range(2):
            total, _ = policy(micro, lambda stats, _: stats.kl - stats.logp, None, [teacher.read(micro)])
            total.backward()
            optimizer_step(policy, optimizer, 1e-2, 1.0)
            ema_update(teacher, policy, 0.1)
        weights.append([w.clone() for model in (policy, teacher) for _, w in full_weights(model)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_sampler_copies_no_weight_of_a_policy_that_is_whole(one_process):
    policy = load_policy(CHAIN, CPU, Setup())
    sampler = HFSampler(CHAIN, load_tokenizer(CHAIN), CPU, blank=True)
    sampler.load(full_weights(policy))
    places = {w.data_ptr() for _, w in full_weights(policy)}
    assert {p.data_ptr() for p in sampler.lm.parameters()} <= places


def test_a_teacher_and_a_student_may_share_prompts(one_process):
    """The divergence and its gradient are the same, whichever of the two sides has prompts to share."""
    r = random.Random(1)
    tokens = lambda low, high: [r.randrange(3, 500) for _ in range(r.randint(low, high))]
    asked = [tokens(9, 12) for _ in range(2)]
    prompts = [asked[i // 3] for i in range(6)]
    hints = [tokens(26, 30) for _ in range(6)]
    responses = [tokens(6, 8) for _ in range(6)]
    for hinted in (hints, [hints[i // 3] for i in range(6)]):
        found = []
        for share in (False, True):
            policy = load_policy(CHAIN, CPU, Setup(checkpointing=False, share_prompts=share))
            micro, = micro_batches(hinted, responses, None, at_most(10**6, share), CPU)
            student = micro.with_prompts(prompts, responses)
            assert (micro.prefix is not None) == (student.prefix is not None) == share  # on every rank the same
            seen = [policy.read(micro)]
            total, stats = policy(student, lambda stats, _: stats.kl, None, seen)
            total.backward()
            grads = {name: whole(p.grad) for name, p in policy.named_parameters()}
            found.append((stats.kl, micro.rows, grads))
        (kl, rows, grads), (shared_kl, shared_rows, shared_grads) = found
        assert rows == shared_rows
        torch.testing.assert_close(shared_kl, kl, rtol=1e-4, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(shared_grads[name], grad, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_before_the_first_update_counts_no_update(tmp_path, one_process):
    """AdamW's first update is then the same whether a checkpoint was written before it, was loaded, or neither."""

    def first_update(touch) -> tuple[list[float], list[torch.Tensor]]:
        policy = load_policy(CHAIN, CPU, Setup(checkpointing=False))
        optimizer = make_optimizer(policy, SimpleNamespace(lr=0.1, weight_decay=0.1))
        touch(policy, optimizer)
        before = [p.detach().clone() for p in policy.parameters()]
        for p in policy.parameters():
            p.grad = torch.ones_like(p)
        optimizer_step(policy, optimizer, 0.1, 1e9)
        counts = [state["step"].item() for state in optimizer.state.values()]
        return counts, [p - b for p, b in zip(policy.parameters(), before)]

    def save(policy, optimizer) -> None:
        checkpoints.save(tmp_path / "step_000001", policy, optimizer, None, load_tokenizer(CHAIN), {"step": 1}, CPU)

    def load(policy, optimizer) -> None:
        checkpoints.load(tmp_path / "step_000001", policy, optimizer, None)

    counts, moves = first_update(lambda *_: None)
    assert set(counts) == {1.0}
    for touch in (save, load):
        found, moved = first_update(touch)
        assert found == counts and all(map(torch.equal, moved, moves))

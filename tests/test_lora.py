"""LoRA by flag: what it trains, what its teachers are, what leaves it for the sampler and the checkpoint."""
import json
import random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN, MEASURED, TASK, at_most, interrupted
from ranks import finish, launch, run_file
from test_policy import CPU, log_likelihood, some_rollouts
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM

import grpo
from common.microbatches import micro_batches
from common.policy import (
    Adapters,
    ema_update,
    frozen_copy,
    full_weights,
    load_policy,
    make_optimizer,
    optimizer_step,
    score,
    trained_parameters,
    whole,
)
from common.settings import Setup
from kernels import head as head_module

FAST = SimpleNamespace(lr=1e-2, weight_decay=0.01)


def rollouts() -> tuple[list[list[int]], list[list[int]]]:
    _, found = some_rollouts(4)
    return [o.prompt_ids for o in found], [o.response_ids for o in found]


def logps(model, prompts, responses) -> torch.Tensor:
    return torch.cat(score(model, prompts, responses, at_most(4096)))


def train(policy, optimizer, prompts, responses, steps: int = 1, after=lambda: None) -> None:
    for _ in range(steps):
        for micro in micro_batches(prompts, responses, None, at_most(10**6), CPU):
            total, _ = policy(micro, lambda stats, _: -stats.logp / len(micro.targets))
            total.backward()
        metrics = optimizer_step(policy, optimizer, 1e-2, 1.0)
        assert metrics["grad_norm"][0] > 0
        after()


@pytest.fixture
def lora(one_process):
    policy = load_policy(CHAIN, CPU, Setup(lora_rank=4))
    return policy, make_optimizer(policy, FAST)


def test_at_the_start_it_is_the_base(lora):
    prompts, responses = rollouts()
    base = load_policy(CHAIN, CPU, Setup())
    assert torch.equal(logps(lora[0], prompts, responses), logps(base, prompts, responses))
    mine, theirs = dict(full_weights(lora[0])), dict(full_weights(base))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_training_moves_the_adapters_of_every_linear_layer_and_nothing_else(lora):
    policy, optimizer = lora
    before = {n: whole(p).clone() for n, p in policy.named_parameters()}
    train(policy, optimizer, *rollouts(), steps=2)
    still = {n for n, p in policy.named_parameters() if torch.equal(whole(p), before[n])}
    assert still == {n for n in before if ".lora_" not in n}
    layers = {n.partition(".lora_")[0] for n in before if ".lora_" in n}
    linear = {n for n, m in AutoModelForCausalLM.from_pretrained(CHAIN).named_modules()
              if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert layers == {f"lm.{n}" for n in linear}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(optimizer.state) == 2 * len(linear)


@pytest.mark.parametrize("rank", [0, 4])
def test_kernels_make_no_gradient_of_a_frozen_head(rank, one_process, monkeypatch):
    policy = load_policy(CHAIN, CPU, Setup(lora_rank=rank))
    made = []

    class Spy(head_module.HeadGradient):
        def result(self):
            made.append(self.d_head)
            return super().result()

    monkeypatch.setattr(head_module, "HeadGradient", Spy)
    for per_response in (False, True):
        micro, = micro_batches([[5, 6, 7]], [[8, 9]], None, at_most(100), CPU)
        total, _ = policy(micro, log_likelihood, per_response=per_response)
        total.backward()
    assert [d is None for d in made] == [rank > 0] * 2


def test_with_adapters_off_it_is_the_base_and_reading_so_changes_nothing(lora):
    """The reference KL of a trained LoRA policy is that to a base loaded by itself."""
    policy, optimizer = lora
    reference = frozen_copy(policy, CPU)
    assert isinstance(reference, Adapters)
    prompts, responses = rollouts()
    train(policy, optimizer, prompts, responses, steps=3)
    trained, weights = logps(policy, prompts, responses), {n: w.clone() for n, w in full_weights(policy)}
    base = logps(load_policy(CHAIN, CPU, Setup()), prompts, responses)
    k3 = grpo.k3(trained, base)
    assert k3.mean() > 1e-3
    torch.testing.assert_close(grpo.k3(trained, logps(reference, prompts, responses)), k3, atol=1e-6, rtol=0)
    assert torch.equal(logps(policy, prompts, responses), trained)
    assert all(torch.equal(w, weights[n]) for n, w in full_weights(policy))


def test_reading_a_teacher_leaves_the_students_gradient_as_it_is(lora):
    """As in hsd.py: the teacher's hidden states and head are made first, the student's forward uses them."""
    policy, optimizer = lora
    prompts, responses = rollouts()
    teacher = frozen_copy(policy, CPU)
    train(policy, optimizer, prompts, responses, steps=2)
    first_four = torch.arange(len(prompts)) < 4
    micro, = micro_batches(prompts, responses, first_four, at_most(10**6), CPU)
    found = []
    for other in (teacher, load_policy(CHAIN, CPU, Setup()).requires_grad_(False)):
        total, stats = policy(micro, lambda stats, _: stats.kl, None, [other.read(micro)])
        total.backward()
        assert stats.kl.mean() > 1e-4
        found.append([whole(p.grad) for p in trained_parameters(policy)])
        policy.zero_grad()
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_the_sampler_gets_merged_weights(one_process):
    policy = load_policy(CHAIN, CPU, Setup(lora_rank=4, lora_alpha=6))  # alpha/rank is not a power of two
    sampler, found = some_rollouts(6, n=2)
    prompts, responses = [o.prompt_ids for o in found], [o.response_ids for o in found]
    before = logps(policy, prompts, responses)
    train(policy, make_optimizer(policy, FAST), prompts, responses, steps=3)
    after = logps(policy, prompts, responses)
    assert (after - before).abs().max() > 0.1
    sampler.load(full_weights(policy))
    again = sampler.sample(prompts[::2], 2, seed=(1, 0), keys=range(6), max_tokens=24)
    again = [o for g in again for o in g]
    trainer = logps(policy, [o.prompt_ids for o in again], [o.response_ids for o in again])
    gap = (torch.tensor([x for o in again for x in o.logprobs]) - trainer).abs().max()
    assert gap < 1e-4


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_a_moving_teacher_is_adapters_that_follow_the_policys(rate, lora):
    """An EMA of A and of B, by hand in float64; its merged weights are what it reads with."""
    policy, optimizer = lora
    teacher = frozen_copy(policy, CPU)
    values = lambda model: [whole(p).double() for p in trained_parameters(model)]
    by_hand = values(policy)

    def follow():
        ema_update(teacher, policy, rate)
        by_hand[:] = [(1 - rate) * mine + rate * theirs for mine, theirs in zip(by_hand, values(policy))]

    prompts, responses = rollouts()
    train(policy, optimizer, prompts, responses, steps=3, after=follow)
    for got, expected in zip(values(teacher), by_hand):
        torch.testing.assert_close(got, expected, atol=0 if rate == 1 else 1e-6, rtol=0)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(values(teacher), values(policy))) == (rate < 1)
    lm = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32)
    lm.load_state_dict(dict(full_weights(teacher)), strict=False)
    p, r = prompts[0], responses[0]
    with torch.no_grad():
        expected = lm(torch.tensor([p + r])).logits[0, len(p) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(logps(teacher, [p], [r]), expected.gather(1, torch.tensor(r)[:, None])[:, 0],
                               atol=1e-4, rtol=0)
    before = values(policy)
    ema_update(policy, teacher, 1.0)  # back to the teacher, bit for bit
    assert all(torch.equal(a, b) for a, b in zip(values(policy), values(teacher)))
    assert rate == 1 or any(not torch.equal(a, b) for a, b in zip(values(policy), before))


def gradient(prompts: list, responses: list, out: str) -> None:
    """On each rank: the adapters' gradient of its share of the rows, and what the reference says of them."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    policy = load_policy(CHAIN, CPU, Setup(lora_rank=4, checkpointing=True))
    reference = frozen_copy(policy, CPU)
    torch.manual_seed(1)
    for p in trained_parameters(policy):  # B is not 0, so that A has a gradient
        noise = 0.05 * torch.randn(p.shape)
        if world > 1:
            noise = distribute_tensor(noise, p.device_mesh, p.placements)
        p.data.add_(noise)
    prompts, responses = prompts[rank::world], responses[rank::world]
    base = score(reference, prompts, responses, at_most(1000))
    for m in micro_batches(prompts, responses, None, at_most(60 * world), CPU):
        total, _ = policy(m, lambda stats, _: -stats.logp)
        total.backward()
    logp = torch.cat(base).sum().double()
    dist.all_reduce(logp)
    found = {n: whole(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save((logp, found), out)


def test_two_ranks_give_the_gradient_of_one(tmp_path, one_process):
    """The same adapters from the start on, a reference that is the base, and gradients that add up."""
    r = random.Random(0)
    tokens = lambda low, high: [r.randrange(3, 500) for _ in range(r.randint(low, high))]
    rows = [tokens(4, 9) for _ in range(9)], [tokens(2, 20) for _ in range(9)]
    out, log = str(tmp_path / "out.pt"), tmp_path / "log"
    gradient(*rows, out)
    logp, one = torch.load(out)
    finish(launch(2, log, gradient, *rows, out), log)
    logp2, two = torch.load(out)
    base = load_policy(CHAIN, CPU, Setup())
    torch.testing.assert_close(logp, logps(base, *rows).sum().double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logp2, logp, rtol=1e-6, atol=0)
    assert one.keys() == two.keys() and all(".lora_" in n for n in one)
    scale = max(g.abs().max() for g in one.values()).item()
    assert all(g.abs().max() > 1e-6 * scale for g in one.values())
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5 * scale)


SMALL = [*TASK, "--eval_every", "9", "--lora_rank", "4", "--lr", "1e-3", "--batch_size", "4", "--save_every", "1"]
TWO = ["--group_size", "4", "--steps", "2"]
FILES = {
    "grpo": [*TWO, "--beta", "0.04"],
    "rlsd": [*TWO, "--teacher_every", "1"],
    "sdpo": TWO,
    "hsd": [*TWO, "--teacher", "ema", "--beta", "0.01"],
    "sdzero": ["--srt_max_tokens", "32", "--srt_questions", "12", "--kept_traces", "8", "--srt_batch", "8", "--srt_epochs", "1",
               "--sd_questions", "4"],  # a step of each phase: the resume is between the two
}


def outcome(folder) -> tuple[list[dict], dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max((folder / "checkpoints").iterdir())
    weights = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).state_dict()
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows], weights


@pytest.mark.parametrize("name", FILES)
def test_every_file_trains_with_adapters_and_resumes_bitwise(name, tmp_path):
    """Its checkpoint is the merged model; what a resume needs beside --model are adapters and their moments."""
    flags = [*SMALL, *FILES[name], "--out", str(tmp_path), "--name"]
    run_file(name, [*flags, "whole"])
    metrics, weights = outcome(tmp_path / "whole")
    start = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32).state_dict()
    changed = {n for n in start if not torch.equal(weights[n], start[n])}
    assert weights.keys() == start.keys() and changed and all("_proj" in n for n in changed)
    assert len(metrics) == 3 and all(row.get("grad_norm", 1) > 0 for row in metrics)
    state = max((tmp_path / "whole" / "checkpoints").iterdir()) / "state"
    keys = [k for k in FileSystemReader(state).read_metadata().state_dict_metadata if k.startswith("policy.")]
    assert keys and all(".lora_" in k for k in keys)
    interrupted(tmp_path / "whole", "parts", 1)
    run_file(name, [*flags, "parts", "--resume", "auto"])
    again, same = outcome(tmp_path / "parts")
    assert all(torch.equal(same[n], weights[n]) for n in weights)
    assert again == metrics

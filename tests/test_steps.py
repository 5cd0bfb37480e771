"""What a loop hands to its optimizer: the gradient of the last update of two steps is that of the
paper's formula over full logits, in float64, one response at a time.

The formulas are tested with inputs of their own in the tests named after each file. Here the inputs
are what the run made: its models, prompts, contexts, advantages, weights and temperature.
"""
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import CHAIN, GROUPS, TASK
from torch import Tensor
from transformers import AutoModelForCausalLM

import grpo
import hsd
import rlsd
import sdpo
import sdzero
from common.chat import load_tokenizer
from common.policy import optimizer_step, whole
from common.rollouts import Batch
from common.run import Run
from common.settings import parse
from kernels import head as head_module

# hot and fast: ratios, gaps to the teacher and steps of the weights that no two formulas share
TEMPERATURE, LR, MAX_NORM = 1.4, 3e-3, 0.5
COMMON = ["--temperature", str(TEMPERATURE), "--lr", str(LR), "--max_norm", str(MAX_NORM),
          "--warmup", "3", "--eval_every", "9", "--name", "r"]
TWO_STEPS = [*GROUPS, *COMMON, "--steps", "2"]
SD = [*TASK, *COMMON, "--phase", "sd", "--srt_questions", "8", "--sd_questions", "8",
      "--batch_size", "4"]


class Update(NamedTuple):
    weights: dict[str, Tensor]  # before it
    gradient: dict[str, Tensor]
    lr: float
    max_norm: float


class Watched(NamedTuple):
    updates: list[Update]
    batches: list[tuple]  # (Batch, the teacher's prompts or None) of each step
    parts: list[Tensor]  # which questions an update takes, [Q, 1]


def watch(method, monkeypatch) -> Watched:
    seen = Watched([], [], [])

    def step(policy, optimizer, lr: float, max_norm: float) -> dict:
        weights, gradient = {}, {}
        for name, p in policy.lm.named_parameters():
            weights[name] = whole(p).double()
            gradient[name] = torch.zeros_like(weights[name])
            if p.grad is not None:
                gradient[name] = whole(p.grad).double()
        seen.updates.append(Update(weights, gradient, lr, max_norm))
        return optimizer_step(policy, optimizer, lr, max_norm)

    def log(run, batch=None, prompts=None, real=Run.log) -> None:
        if batch is not None:
            seen.batches.append((batch, prompts))
        real(run, batch, prompts)

    def minibatches(batch, *counts, real=Batch.minibatches):
        for part in real(batch, *counts):
            seen.parts.append(part)
            yield part

    monkeypatch.setattr(method, "optimizer_step", step)
    monkeypatch.setattr(Run, "log", log)
    monkeypatch.setattr(Batch, "minibatches", minibatches)
    # chunks of seven tokens: a loss that takes means over responses must not be cut into them
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": 7 * 4 * 525})
    return seen


# --------------------------------------------------------------------------------------------------
# the oracle
# --------------------------------------------------------------------------------------------------
def model(weights: dict[str, Tensor]):
    lm = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float64)
    lm.load_state_dict(weights, strict=False)  # without the tied head
    return lm


def logits(lm, prompt: list[int], response: list[int]) -> Tensor:
    """That predict the response's tokens at the run's temperature, [|o|, V]."""
    ids = torch.tensor([prompt + response])
    return lm(ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE


def last_update(seen: Watched, minibatches: int, teacher_of, loss_of, rewards_of) -> tuple[dict, list]:
    """The gradient of Σ loss_of(response) over the responses of the last update, and these.

    teacher_of: (models, prompt, response) → the teacher's logits. rewards_of: (a group's verdicts
    and lengths) → its rewards.
    """
    batch, hinted = seen.batches[-1]
    weights = [update.weights for update in seen.updates]
    models = SimpleNamespace(
        start=model(weights[0]), old=model(weights[-minibatches]), now=model(weights[-1])
    )
    responses = batch.responses
    part = torch.ones(len(batch.groups), 1, dtype=torch.bool)
    if seen.parts:
        part = seen.parts[-1]
    taken = part.expand_as(batch.rewards).flatten().tolist()
    chosen = []
    for i, response in enumerate(responses):
        if not taken[i]:
            continue
        prompt, y = batch.prompts[i], torch.tensor(response)[:, None]
        teacher_prompt = prompt if hinted is None else hinted[i]
        z = logits(models.now, prompt, response)
        with torch.no_grad():
            old, ref = (logits(lm, prompt, response).log_softmax(-1).gather(1, y)[:, 0]
                        for lm in (models.old, models.start))
            lq = teacher_of(models, teacher_prompt, response).log_softmax(-1)
        lp = z.log_softmax(-1)
        group, member = divmod(i, batch.rewards.shape[1])
        rewards = rewards_of(batch.rewards[group].double(), batch.lengths[group].double())
        centred = (rewards[member] - rewards.mean()).item()
        spread = math.sqrt((rewards - rewards.mean()).square().sum() / max(1, len(rewards) - 1))
        chosen.append(SimpleNamespace(
            lp=lp, lq=lq, y=y, logp=lp.gather(1, y)[:, 0], teacher_logp=lq.gather(1, y)[:, 0],
            old=old, ref=ref, sampler=torch.tensor(batch.sampler_logp[i]).double(),
            n=len(response), centred=centred, A=centred / spread if spread > 1e-6 else 0.0,
            has_context=teacher_prompt != prompt,
        ))
    total = sum(loss_of(o, chosen) for o in chosen)
    total.backward()
    return {name: p.grad for name, p in models.now.named_parameters()}, chosen


def verdicts(rewards: Tensor, lengths: Tensor) -> Tensor:
    return rewards


def punished(rewards: Tensor, lengths: Tensor) -> Tensor:
    """DAPO's ±1 and, in the last fifth of 28 tokens, a fall to −1 below it (Eq. 7 and 13)."""
    over = (lengths - (28 - 5.6)) / 5.6
    return 2 * rewards - 1 - over.clamp(0, 1)


def at_start(models, prompt: list[int], response: list[int]) -> Tensor:
    return logits(models.start, prompt, response)


def surrogate(o, A: Tensor | float, log_ratio: Tensor, low: float, high: float) -> Tensor:
    ratio = log_ratio.exp()
    return torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def tis(o) -> Tensor:
    return (o.old - o.sampler).exp().clamp(max=2.0)


def of_grpo(o, chosen: list, std: bool = True) -> Tensor:
    x, A = o.ref - o.logp, o.A if std else o.centred
    gain = surrogate(o, A, o.logp - o.old, 0.2, 0.2) - 0.1 * (x.exp() - x - 1)
    return -(tis(o) * gain).mean() / len(chosen)


def of_grpo_without_std(o, chosen: list) -> Tensor:
    return of_grpo(o, chosen, std=False)


def of_gspo(o, chosen: list) -> Tensor:
    log_ratio = (o.logp - o.old).mean().expand(o.n)
    x = o.ref - o.logp
    gain = surrogate(o, o.A, log_ratio, 0.3, 0.4) - 0.1 * (x.exp() - x - 1)
    return -(tis(o) * gain).mean() / len(chosen)


def of_rlsd(o, chosen: list) -> Tensor:
    lam = 0.5 * (1 - 1 / 50)  # in the second step
    delta = o.teacher_logp - o.logp.detach()
    w = (math.copysign(1, o.A) * delta).exp().clamp(0.1, 1.9)
    A = o.A * ((1 - lam) + lam * w)
    return -(tis(o) * surrogate(o, A, o.logp - o.old, 0.2, 0.28)).mean() / len(chosen)


def reverse_kl(o) -> Tensor:
    return (o.lp.exp() * (o.lp - o.lq)).sum(-1)


def of_hybrid_sdpo(o, chosen: list) -> Tensor:
    ratio = (o.logp - o.old).detach().exp().clamp(max=2.0)
    gain = surrogate(o, o.centred, o.logp - o.old, 0.2, 0.28)
    mixed = 0.5 * o.has_context * ratio * reverse_kl(o) - 0.5 * gain
    return (tis(o) * mixed).sum() / sum(other.n for other in chosen)


def of_sequence_sdpo(o, chosen: list) -> Tensor:
    if not o.has_context:
        return 0 * o.logp.sum()
    A = (o.teacher_logp - o.logp).detach().mean()
    return -(tis(o) * A * o.logp).sum() / sum(other.n for other in chosen if other.has_context)


def of_hsd(o, chosen: list) -> Tensor:
    forward_kl = (o.lq.exp() * (o.lq - o.lp)).sum(-1)
    per_token = 0.5 * forward_kl - 0.5 * o.A * o.logp + 0.1 * 0.5 * (o.logp - o.ref).square()
    return per_token.mean() / len(chosen)


def of_sdzero(o, chosen: list) -> Tensor:
    return reverse_kl(o).sum() / sum(other.n for other in chosen)


def averaged(models, prompt: list[int], response: list[int]) -> Tensor:
    """Of the average after one step at the rate 0.2."""
    pairs = zip(models.start.named_parameters(), models.now.parameters())
    weights = {name: 0.8 * a.detach() + 0.2 * b.detach() for (name, a), b in pairs}
    return logits(model(weights), prompt, response)


def trust_region(models, prompt: list[int], response: list[int]) -> Tensor:
    frozen, live = (logits(lm, prompt, response) for lm in (models.start, models.now))
    return 0.8 * frozen + 0.2 * live


CASES = {
    "grpo": (grpo, ["--minibatches", "2", "--beta", "0.1"], at_start, of_grpo),
    "grpo, too long": (grpo, ["--overlong", "shape", "--no-std", "--minibatches", "2", "--beta",
                                "0.1"], at_start, of_grpo_without_std),
    "gspo": (grpo, ["--loss", "gspo", "--minibatches", "2", "--beta", "0.1", "--clip_low", "0.3",
                    "--clip_high", "0.4"], at_start, of_gspo),
    "rlsd": (rlsd, ["--minibatches", "2", "--eps_w", "0.9"], at_start, of_rlsd),
    "sdpo": (sdpo, ["--minibatches", "2", "--lam", "0.5", "--context", "feedback",
                    "--teacher", "trust_region", "--teacher_rate", "0.2"],
             trust_region, of_hybrid_sdpo),
    "sdpo by the sequence": (sdpo, ["--granularity", "sequence", "--context", "solution",
                                    "--teacher_rate", "0.2"], averaged, of_sequence_sdpo),
    "hsd": (hsd, ["--teacher", "ema", "--teacher_rate", "0.2", "--beta", "0.1",
                  "--grpo_mix", "0.5"], averaged, of_hsd),
    "sdzero": (sdzero, [], at_start, of_sdzero),
}


@pytest.mark.parametrize("name", CASES)
def test_the_last_update_of_two_steps_is_the_papers(name, tmp_path, monkeypatch):
    method, flags, teacher_of, loss_of = CASES[name]
    seen = watch(method, monkeypatch)
    common = SD if method is sdzero else TWO_STEPS
    args = parse(method.Args, method.presets, [*common, "--out", str(tmp_path), *flags])
    method.main(args)
    minibatches = getattr(args, "minibatches", 1)
    assert len(seen.updates) == 2 * minibatches and len(seen.batches) == 2
    last = seen.updates[-1]
    assert (last.lr, last.max_norm) == (pytest.approx(LR * 2 / 3), MAX_NORM)
    rewards_of = punished if "--overlong" in flags else verdicts
    expected, chosen = last_update(seen, minibatches, teacher_of, loss_of, rewards_of)
    error = sum((last.gradient[n] - g).square().sum() for n, g in expected.items()).sqrt()
    size = sum(g.square().sum() for g in expected.values()).sqrt()
    assert size > 1e-3 and error < 1e-3 * size, (error, size)
    if minibatches > 1:
        assert max((o.logp - o.old).abs().max() for o in chosen if o.A != 0) > 0.1
    if name == "grpo":  # a group with equal rewards has the penalty's gradient
        assert {o.A == 0 for o in chosen} == {True, False}
    if name == "sdpo":
        assert {o.has_context for o in chosen} == {True, False}
    if method is sdzero:  # x, y without its end, P_r: the phrase that the verdict asks for
        tokenizer = load_tokenizer(CHAIN)
        for batch, prompts in seen.batches:
            rewards = batch.rewards.flatten().tolist()
            for prompt, reward in zip(prompts, rewards):
                phrase = sdzero.CONTROL[int(reward == 1)]
                assert tokenizer.decode(prompt).endswith(f"\n\n{phrase}\n\n")

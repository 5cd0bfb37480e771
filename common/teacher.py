"""What a teacher is worth: its own answers, and where it disagrees with the student.

Self-distillation has something to teach only if the teacher is right more often than the student.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from common.microbatches import Micro
from common.policy import Policy, full_weights
from common.rollouts import Batch, Rollouts

TEACHER = 2  # random stream under the run's seed


def teacher_answers(rollouts: Rollouts, teacher: Policy, policy: Policy, batch: Batch,
                    prompts: list[list[int]], has_context: Tensor) -> dict[str, list | Tensor]:
    """Rewards and lengths of the teacher's answers to its own prompts, one response per prompt, and
    its lead: the reward less the mean reward of the student's responses to the same question.

    prompts: token ids, one per rollout. has_context [Q, G]. Prompts without a context, or without
    room for a response, are left out. The sampler ends with the policy's weights. A collective.
    """
    problems = []
    for group in batch.groups:
        problems += [group.problem] * len(group.rollouts)
    room = rollouts.sampler.context - rollouts.args.max_tokens  # tokens of a prompt
    chosen = []
    for i, prompt in enumerate(prompts):
        if has_context.flatten()[i] and len(prompt) <= room:
            chosen.append(i)
    run = rollouts.run
    run.phase("evaluate")
    rollouts.sampler.load(full_weights(teacher))
    keys = [run.rank * len(prompts) + i for i in chosen]
    groups = rollouts.answer(
        [problems[i] for i in chosen], 1, TEACHER, keys, "evaluate",
        prompts=[prompts[i] for i in chosen],
    )
    rollouts.sync(policy)
    answers = [group.rollouts[0] for group in groups]
    rewards = torch.tensor([group.verdicts[0].reward for group in groups])
    student = batch.rewards.mean(1, keepdim=True).expand_as(batch.rewards)
    return {
        "teacher/accuracy": rewards,
        "teacher/lead": rewards - student.flatten()[chosen],
        "teacher/length": [len(answer.response_ids) for answer in answers],
        "teacher/frac_truncated": [answer.truncated for answer in answers],
    }


def kl_by_place(kl: Tensor, micro: Micro, tokenizer,
                kept: Tensor | None = None) -> dict[str, Tensor]:
    """The divergence [T] by place: a response's first token, format tokens (without a letter or a
    digit), and elsewhere. A teacher that disagrees on the first two teaches manners.

    kept: [T] bool, the tokens that count; None: all.
    """
    if kept is None:
        kept = torch.ones_like(micro.targets, dtype=torch.bool)
    table = format_tokens(tokenizer, kl.device)
    form = table[micro.targets.clamp(max=len(table) - 1)]  # a padded head has more entries
    first = micro.first
    return {
        "kl/first": kl[kept & first],
        "kl/format": kl[kept & form & ~first],
        "kl/elsewhere": kl[kept & ~form & ~first],
    }


@functools.cache
def format_tokens(tokenizer, device: torch.device) -> Tensor:
    """[V + 1] True for a token whose text has no letter, no digit and no part of a character, and
    for what is beyond the vocabulary."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    rows = []
    for token, text in enumerate(texts):
        says = any(map(str.isalnum, text)) or "\ufffd" in text
        rows.append(token in special or not says)
    return torch.tensor([*rows, True], device=device)

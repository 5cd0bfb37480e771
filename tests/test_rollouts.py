"""Batch and Rollouts: problems in, judged responses out, the same for any number of ranks."""
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN

import grpo
from common.chat import chat_ids, load_tokenizer
from common.microbatches import padded_right
from common.policy import frozen_copy, load_policy, local, whole
from common.rollouts import Batch, Group, Rollouts, check_fits
from common.sampler import Rollout
from common.settings import Setup, parse
from common.tasks import Problem
from common.teacher import kl_by_place, teacher_answers
from common.verifiers import Verdict

CPU = torch.device("cpu")
SMALL = [
    "--demo", "--model", CHAIN, "--batch_size", "4", "--group_size", "3", "--heldout", "5",
    "--max_tokens", "24",
]
REWARDS = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
LENGTHS = [[3, 1], [2, 2], [1, 5]]


@pytest.fixture
def batch() -> Batch:
    """Three questions with two responses each; a response of five tokens is truncated."""
    groups = []
    for q, (rewards, lengths) in enumerate(zip(REWARDS, LENGTHS)):
        rollouts = []
        for i, length in enumerate(lengths):
            finish = "length" if length == 5 else "stop"
            ids = [10 * q + i] * length
            rollouts.append(Rollout([q, q], ids, [-0.5] * length, finish, f"{q}/{i}"))
        verdicts = [Verdict(reward, f"feedback {reward}") for reward in rewards]
        groups.append(Group(Problem(f"p{q}", []), rollouts, verdicts))
    return Batch(groups)


def test_a_batch_is_its_groups_question_by_question(batch):
    assert batch.prompts == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]
    assert batch.responses == [[0] * 3, [1], [10] * 2, [11] * 2, [20], [21] * 5]
    assert [len(logp) for logp in batch.sampler_logp] == [3, 1, 2, 2, 1, 5]
    assert batch.rewards.tolist() == REWARDS and batch.rewards.dtype == torch.float32
    assert batch.lengths.tolist() == LENGTHS
    assert batch.truncated.tolist() == [[False, False], [False, False], [False, True]]
    assert [group.mixed for group in batch.groups] == [True, False, False]


@pytest.mark.parametrize("count, epochs", [(1, 1), (2, 1), (3, 2), (6, 2)])
def test_the_minibatches_of_an_epoch_are_a_partition_of_the_questions(count, epochs, batch):
    torch.manual_seed(0)
    groups = batch.groups * 2
    masks = list(Batch(groups).minibatches(count, epochs))
    assert len(masks) == count * epochs
    assert all(mask.shape == (6, 1) and mask.dtype == torch.bool for mask in masks)
    for epoch in range(epochs):
        parts = masks[epoch * count : (epoch + 1) * count]
        assert [int(part.sum()) for part in parts] == [6 // count] * count
        assert sum(part.int() for part in parts).tolist() == [[1]] * 6
    if count == 6:  # another order in another epoch
        assert any(not torch.equal(a, b) for a, b in zip(masks[:6], masks[6:]))


def test_what_every_method_logs_of_its_rollouts(batch):
    means = {}
    for name, values in batch.metrics().items():
        means[name] = torch.as_tensor(values, dtype=torch.float64).mean().item()
    assert means == pytest.approx({
        "reward/mean": 3 / 6, "length/mean": 14 / 6, "length/max": 14 / 6,
        "frac_truncated": 1 / 6, "frac_zero_std": 2 / 3, "frac_any_right": 2 / 3,
    })


def test_examples_are_the_first_groups_in_words(batch):
    rows = batch.examples()
    assert [row["id"] for row in rows] == ["p0", "p0", "p1", "p1"]
    assert rows[0] == {
        "id": "p0", "response": "0/0", "finish": "stop", "reward": 1.0, "feedback": "feedback 1.0",
    }
    assert len(batch.examples(groups=3)) == 6 and json.dumps(rows)


def test_a_teachers_prompt_that_does_not_fit_ends_the_run(batch):
    prompts = [[1] * 4] * 6
    check_fits(prompts, batch, SimpleNamespace(context_length=9))
    with pytest.raises(SystemExit, match=r"take 9 tokens, more than the model's context of 8"):
        check_fits(prompts, batch, SimpleNamespace(context_length=8))


# --------------------------------------------------------------------------------------------------
# the embedded model
# --------------------------------------------------------------------------------------------------
@pytest.fixture
def make(one_process):
    """make(rank, world): the Rollouts of one of several ranks, synced with a policy."""
    policy = load_policy(CHAIN, CPU, Setup())
    made = []

    def rollouts_of(rank: int = 0, world: int = 1) -> Rollouts:
        phases = []
        kept = []
        run = SimpleNamespace(rank=rank, world=world, device=CPU, phase=phases.append, phases=phases, step=7,
                              collect=lambda metrics: None, folder=Path("run"), kept=kept,
                              writing=lambda path: nullcontext(),
                              append=lambda name, rows: kept.append((name, rows)))
        rollouts = Rollouts(parse(grpo.Args, grpo.presets, SMALL), run)
        rollouts.sync(policy)
        made.append(rollouts)
        return rollouts

    rollouts_of.policy = policy
    yield rollouts_of
    for rollouts in made:
        rollouts.close()


def as_lists(groups: list[Group]) -> list:
    """What can be compared of groups."""
    found = []
    for problem, rollouts, verdicts in groups:
        ids = [rollout.response_ids for rollout in rollouts]
        found.append((problem.id, ids, [verdict.reward for verdict in verdicts]))
    return found


def test_ranks_sample_and_evaluate_together_what_one_does_alone(make):
    one, first, second = make(), make(0, 2), make(1, 2)
    whole = as_lists(one.sample(1).groups)
    assert len(whole) == 4 and all(len(ids) == 3 for _, ids, _ in whole)
    assert whole == as_lists(first.sample(1).groups) + as_lists(second.sample(1).groups)
    assert whole == as_lists(one.sample(1).groups)  # a resume samples the same
    other = as_lists(one.sample(2).groups)
    assert not {name for name, _, _ in whole} & {name for name, _, _ in other}
    keys, groups = one.heldout_groups()
    keys_1, groups_1 = first.heldout_groups()
    keys_2, groups_2 = second.heldout_groups()
    assert list(keys) == [0, 1, 2, 3, 4] and list(keys_1) == [0, 2, 4] and list(keys_2) == [1, 3]
    everything = as_lists(groups)
    assert everything[::2] == as_lists(groups_1) and everything[1::2] == as_lists(groups_2)
    assert [name for name, _, _ in everything] == [problem.id for problem in one.task.heldout]


def test_answers_are_judged_responses_to_the_prompts_that_are_given(make):
    rollouts = make()
    problems = rollouts.task.heldout[:2]
    prompts = [rollouts.chat_ids(problem.messages) for problem in problems]
    assert prompts == [chat_ids(rollouts.tokenizer, problem.messages) for problem in problems]
    longer = [[*prompt, *rollouts.tokenizer.encode("1+1")] for prompt in prompts]
    del rollouts.run.phases[:]
    groups = rollouts.answer(problems, 2, 7, [4, 9], "collect", prompts=longer, max_tokens=3)
    assert rollouts.run.phases == ["collect", "collect", "other"]
    for group, problem, prompt in zip(groups, problems, longer):
        assert group.problem is problem and len(group.rollouts) == len(group.verdicts) == 2
        for rollout, verdict in zip(group.rollouts, group.verdicts):
            assert rollout.prompt_ids == prompt and 1 <= len(rollout.response_ids) <= 3
            assert rollout.truncated or rollout.response_ids[-1] in rollouts.ends
            assert verdict == rollouts.verifier([problem], [rollout.text])[0]
    del rollouts.run.phases[:]
    same = rollouts.answer(problems[1:], 2, 7, [9], prompts=longer[1:], max_tokens=3)
    assert as_lists(same) == as_lists(groups[1:])  # its key names its random numbers
    assert rollouts.run.phases == ["sample", "verify", "other"]  # verdicts end where they end


def test_evaluation_shows_no_hint_and_is_logged_under_its_names(make):
    rollouts = make()
    metrics = rollouts.evaluate()
    assert metrics.keys() == {"heldout/pass@1", "heldout/length"}
    assert len(metrics["heldout/pass@1"]) == len(metrics["heldout/length"]) == 5 * 2
    assert set(metrics["heldout/pass@1"]) <= {0.0, 1.0}
    (name, (row,)), = rollouts.run.kept  # for the report
    assert name == "heldout" and row["step"] == 7
    assert list(row["answers"]) == [problem.id for problem in rollouts.task.heldout]
    assert [reward for _, _, reward in row["answers"].values()] == metrics["heldout/pass@1"][::2]


def test_after_the_teacher_was_asked_the_sampler_is_the_policy_again(make):
    """The teacher answers where it has a context and room; it is the teacher that answers."""
    rollouts, policy = make(), make.policy
    batch = rollouts.sample(0)
    has_context = torch.zeros_like(batch.truncated)
    has_context[1:3, :2] = True
    prompts = list(batch.prompts)
    prompts[3] = [5] * (rollouts.context_length // 2)  # of question 1: the engine has no room for it
    teacher = frozen_copy(policy, CPU)
    with torch.no_grad():
        for p in policy.parameters():
            local(p).add_(0.05 * torch.randn_like(local(p)))
    rollouts.sync(policy)
    rollouts.sampler.context = rollouts.context_length // 2  # as a vLLM with a small KV cache
    loaded = []
    load = rollouts.sampler.load
    rollouts.sampler.load = lambda weights: loaded.append(1) or load(weights)
    metrics = teacher_answers(rollouts, teacher, policy, batch, prompts, has_context)
    assert [len(values) for values in metrics.values()] == [3] * 4 and len(loaded) == 2
    student = [batch.rewards[q].mean().item() for q in (1, 2, 2)]
    lead = [reward - mean for reward, mean in zip(metrics["teacher/accuracy"].tolist(), student)]
    assert metrics["teacher/lead"].tolist() == pytest.approx(lead)
    mine = dict(rollouts.sampler.lm.named_parameters())
    weights = dict(policy.lm.named_parameters())
    assert all(torch.equal(mine[name], whole(p)) for name, p in weights.items())
    others = dict(teacher.lm.named_parameters())
    assert any(not torch.equal(mine[name], whole(p)) for name, p in others.items())


def test_the_teacher_answers_on_two_ranks_as_on_one(make):
    """Its random numbers are named by the rollout, whichever of them have a context."""
    found = []
    for world in (1, 2):
        mine = []
        for rank in range(world):
            rollouts = make(rank, world)
            batch = rollouts.sample(0)
            has_context = batch.rewards < 1
            has_context[0, 0] = True
            answers = []
            answer = rollouts.answer
            rollouts.answer = lambda *args, **named: answers.extend(answer(*args, **named)) or answers
            teacher_answers(rollouts, make.policy, make.policy, batch, batch.prompts, has_context)
            mine += as_lists(answers)
        found.append(mine)
    assert len(found[0]) > 2 and found[0] == found[1]


def test_the_divergence_is_split_by_what_a_token_says(one_process):
    tokenizer = load_tokenizer(CHAIN)
    texts = ["12+3=15; #### 15", "a", "\n\n; 漢"]  # the last in bytes
    beyond = len(tokenizer) + 7  # an entry of a padded head
    responses = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
    responses[1].append(beyond)
    micro = padded_right([[5]] * 3, responses, [2, 0, 1], CPU)
    kl = torch.arange(len(micro.targets)) + 1.0
    kept = kl != 2
    found = kl_by_place(kl, micro, tokenizer, kept)
    expected = {"kl/first": [], "kl/format": [], "kl/elsewhere": []}
    values = iter(kl.tolist())
    for row in micro.rows:
        for position, token in enumerate(responses[row]):
            value = next(values)
            word = tokenizer.decode([token], skip_special_tokens=True)
            place = "elsewhere" if any(c.isalnum() or c == "\ufffd" for c in word) else "format"
            if value != 2:
                expected["kl/first" if position == 0 else f"kl/{place}"].append(value)
    assert {name: part.tolist() for name, part in found.items()} == expected
    assert all(expected.values()) and sum(map(len, expected.values())) == len(kl) - 1

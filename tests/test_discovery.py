"""benchmarks/discovery.py: SDPO on one hard problem at a time."""
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHAIN

from benchmarks import discovery as bench
from common.policy import local
from common.rollouts import Group
from common.sampler import Rollout
from common.settings import parse
from common.tasks import Problem
from common.verifiers import Verdict


def test_discovery_counts_attempts_up_to_k_and_averages_trials_within_a_problem():
    times = [2, 3, None, 1, 4, 4]  # three problems, two trials each
    data = {"budget": 4, "right": [0, 4, 1, 1, 2, 2], "solved_at": {"SDPO": times, "best-of-k": times}}
    curves = bench.curves_of(data, 2)
    assert curves["SDPO"].tolist() == [[0, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 1]]
    low, mean, high = bench.band(curves["SDPO"])
    assert mean.tolist() == pytest.approx([1 / 6, 1 / 3, 0.5, 2.5 / 3])
    assert (low <= mean).all() and (mean <= high).all() and low[0] < high[0]
    for row, rights in zip(curves["best-of-k"], ([0, 4], [1, 1], [2, 2])):
        for k in range(1, 5):  # over all subsets of k of the four attempts
            expected = []
            for right in rights:
                subsets = list(itertools.combinations([1] * right + [0] * (4 - right), k))
                expected.append(sum(map(any, subsets)) / len(subsets))
            assert row[k - 1] == pytest.approx(sum(expected) / 2)


def test_the_speedup_compares_attempts_at_equal_discovery():
    slow, fast = np.arange(1, 9) / 8, np.minimum(np.arange(1, 9) / 2, 1)  # one is four times as fast
    curves = {"best-of-k": np.stack([slow] * 3), "SDPO": np.stack([fast] * 3)}
    assert bench.speedup(curves, "SDPO", 1.0) == bench.speedup(curves, "SDPO", 0.5) == (4.0, 4.0, 4.0)
    never = curves | {"SDPO": np.zeros((3, 8))}
    assert bench.speedup(never, "SDPO", 0.5) == (0.0, 0.0, 0.0)


def test_hard_problems_are_solved_seldom_but_not_never():
    rewards = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    groups = [judged(*row) for row in rewards]
    rollouts = SimpleNamespace(task=SimpleNamespace(heldout=[PROBLEM] * 4), answer=lambda *_: groups)
    args = bench.Args(tries=4, most=0.25)
    assert [(row["index"], row["rate"]) for row in bench.hard_problems(rollouts, args)] == [(1, 0.25), (3, 0.25)]
    with pytest.raises(SystemExit, match="raise --most"):
        bench.hard_problems(rollouts, bench.Args(tries=4, most=0.1))


def test_a_turn_shows_all_feedback_that_fits_and_drops_the_oldest():
    rollouts = SimpleNamespace(as_text=str, sampler=SimpleNamespace(context=40), chat_ids=lambda chat: chat[-1]["content"].split())
    said = [f"said{n}" for n in range(9)]
    ids = bench.with_feedback(rollouts, PROBLEM, said, bench.Args(max_tokens=20))
    assert len(ids) <= 20 and said and said[-1] == "said8" and said[0] != "said0"
    assert [word for word in ids if word in said] == said
    assert len(bench.with_feedback(rollouts, PROBLEM, ["said0", *said], bench.Args(max_tokens=20))) <= 20
    assert bench.with_feedback(rollouts, PROBLEM, [], bench.Args(max_tokens=20)) == ["q"]


def test_a_turn_tells_what_went_wrong_in_the_earlier_ones_as_sdpos_teacher_is_told():
    shown = []
    attempts = iter([("wrong", 5, True), ("wrong", 5, True), ("wrong", 3, False), ("right", 3, False)])

    def answer(problems, n, stream, keys, prompts):
        shown.extend(prompts)
        said, tokens, cut = next(attempts)
        rollout = Rollout([0], [7] * tokens, [0.0] * tokens, "length" if cut else "stop", "a response")
        return [Group(problems[0], [rollout], [Verdict(float(said == "right"), "the checker's words")])]

    rollouts = SimpleNamespace(as_text=str, sampler=SimpleNamespace(context=9999), answer=answer,
                               chat_ids=lambda chat: chat[-1]["content"])
    found = {}
    counts = bench.multi_turn(rollouts, [(0, PROBLEM)], found, bench.Args(budget=9))
    assert (counts, found) == ([2], {"multi-turn": [4]})
    too_long = "It is too long: it was cut off after 5 tokens."
    assert shown[0] == "q" and [too_long in prompt for prompt in shown] == [False, True, True, True]
    assert ["the checker's words" in prompt for prompt in shown] == [False, False, False, True]


PROBLEM = Problem("p", [{"role": "user", "content": "q"}])


def judged(*rewards: float) -> Group:
    return Group(PROBLEM, [None] * len(rewards), [Verdict(r, f"said {i}") for i, r in enumerate(rewards)])


@pytest.mark.parametrize("groups, first", [
    ([], None), ([judged(0, 0.5)], None), ([judged(0, 1), judged(1, 1)], 2), ([judged(0, 0), judged(0, 1)], 4)])
def test_the_first_right_attempt_is_counted_over_all_rounds(groups, first):
    assert bench.first_right(groups) == first


@pytest.mark.parametrize("solved_in, learnt, found", [(None, [0, 1], None), (0, [], 2), (1, [0], 4)])
def test_it_learns_between_rounds_and_not_after_the_last(solved_in, learnt, found):
    did, rounds = [], []

    def answer(problems, n, *rest, **named) -> list[Group]:
        rounds.append(len(rounds))
        return [judged(0, float(solved_in == rounds[-1]))]

    learner = SimpleNamespace(rollouts=SimpleNamespace(answer=answer),
                              learn=lambda groups, step: did.append((len(groups), step)))
    assert bench.solve(learner, PROBLEM, 3, (0, 0), bench.Args(group_size=2)) == found
    assert did == [(1, step) for step in learnt]


def test_a_trial_begins_with_the_start(tmp_path, monkeypatch):
    """Weights, teacher and optimizer go back before each trial and after all; each method is left a result."""
    state, real = [], bench.Learner.reset

    def reset(learner) -> None:
        real(learner)
        start = [local(p) for p in learner.start.parameters()]
        for model in (learner.policy, learner.slow):
            assert all(torch.equal(local(p), s) for p, s in zip(model.parameters(), start))
        assert not learner.optimizer.state
        state.append("reset")

    monkeypatch.setattr(bench.Learner, "reset", reset)
    flags = ["--demo", "--model", CHAIN, "--task", "chain:5", "--heldout", "8", "--questions", "2", "--seeds", "1",
             "--most", "0.9", "--tries", "16", "--group_size", "4", "--budget", "8", "--max_tokens", "48", "--out", str(tmp_path), "--name", "tt"]
    bench.main(parse(bench.Args, bench.presets, flags))
    assert len(state) == 3
    bench.main(parse(bench.Args, bench.presets, [*flags, "--resume", "auto"]))  # all of it is there
    assert len(state) == 4
    found = json.loads((tmp_path / "tt" / "discovery.json").read_text())
    assert found["budget"] == 8 and found["solved_at"].keys() == {"SDPO", "best-of-k", "multi-turn"}
    for times in found["solved_at"].values():
        assert len(times) == 2 and all(t is None or 1 <= t <= 8 for t in times)
    assert (tmp_path / "tt" / "discovery.png").exists()

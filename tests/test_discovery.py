"""benchmarks/discovery.py: SDPO on one hard problem at a time."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN

from benchmarks import discovery as bench
from common.rollouts import Group
from common.settings import parse
from common.tasks import Problem
from common.verifiers import Verdict


def test_discovery_counts_attempts_up_to_k():
    low, mean, high = bench.discovery([5, None, 20, 7], 7)
    assert mean == 0.5 and 0 <= low <= mean <= high <= 1
    assert bench.discovery([1, 2], 2) == (1.0, 1.0, 1.0)


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
        start = [p.to_local() for p in learner.start.parameters()]
        for model in (learner.policy, learner.slow):
            assert all(torch.equal(p.to_local(), s) for p, s in zip(model.parameters(), start))
        assert not learner.optimizer.state
        state.append("reset")

    monkeypatch.setattr(bench.Learner, "reset", reset)
    flags = ["--demo", "--model", CHAIN, "--task", "chain:5", "--heldout", "8", "--questions", "2", "--seeds", "1",
             "--group_size", "4", "--budget", "8", "--max_tokens", "48", "--out", str(tmp_path), "--name", "tt"]
    bench.main(parse(bench.Args, bench.presets, flags))
    assert len(state) == 3
    found = json.loads((tmp_path / "tt" / "discovery.json").read_text())
    assert found["budget"] == 8 and found["solved_at"].keys() == {"SDPO", "best-of-k", "multi-turn"}
    for times in found["solved_at"].values():
        assert len(times) == 2 and all(t is None or 1 <= t <= 8 for t in times)
    assert (tmp_path / "tt" / "discovery.png").exists()

"""The numbers of an evaluation, against plain counting; and a run that goes on where it was stopped."""
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import evaluate
from common.sampler import Rollout


@given(st.lists(st.integers(0, 1), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    subsets = list(itertools.combinations(rewards, k))
    assert evaluate.pass_at_k(len(rewards), sum(rewards), k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


@given(st.lists(st.tuples(st.sampled_from("ABC"), st.none()), min_size=1, max_size=9), st.sampled_from("ABC"))
def test_the_majority_wins_and_ties_share(drawn, right):
    answers = [a for a, _ in drawn]
    rewards = [float(a == right) for a in answers]
    most = max(map(answers.count, answers))
    winners = {a for a in answers if answers.count(a) == most}
    assert evaluate.majority(answers, rewards) == pytest.approx((right in winners) / len(winners))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_interval_holds_the_mean_and_stays_within_the_values(values):
    i = evaluate.interval(np.array(values), 2000)
    assert min(values) - 1e-4 <= i["low"] <= i["mean"] + 1e-4 and i["mean"] - 1e-4 <= i["high"] <= max(values) + 1e-4


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(1)
    draws = [evaluate.interval((rng.random(100) < 0.3).astype(float), 1000) for _ in range(300)]
    assert 0.90 <= np.mean([d["low"] <= 0.3 <= d["high"] for d in draws]) <= 0.985


def test_an_answer_is_taken_from_the_part_that_counts():
    given = evaluate.given_answer
    assert given("math", r"<think>\boxed{1}</think> \boxed{2}. So \boxed{ 3 }") == "3" and given("math", "five") is None
    assert given("math", "The answer is: $1,204.5.") == "1,204.5" and given("math", "#### 12 \nyes") == "12"
    assert given("chain", "1+1=2; #### 2") == "2" and given("code", "```\n1\n```") is None
    assert given("choice", "<answer>A</answer><answer> B </answer>") == "B"


class FakeSampler:
    """Answers right where (key + sample) is even; an odd third sample is cut off."""

    asked: list[int] = []

    def sample(self, prompts, n, *, seed, keys, max_tokens, **_):
        FakeSampler.asked += keys
        return [[Rollout([1], [1] * (j + 1), [0.0] * (j + 1), "length" if j == 2 else "stop",
                         r"\boxed{7}" if (key + j) % 2 == 0 else r"\boxed{8}") for j in range(n)] for key in keys]


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps({"question": f"{i}?", "answer": "7"}) for i in range(6)))
    monkeypatch.setattr(evaluate, "engine", lambda args, tokenizer: FakeSampler())
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(evaluate, "chat_ids", lambda tokenizer, messages, thinking: [1])
    FakeSampler.asked = []

    def start(**more):
        return evaluate.main(evaluate.Args("model", f"jsonl:{tmp_path}/set.jsonl", samples=4, chunk=2, workers=1,
                                           out=str(tmp_path), name="run", **more))

    return start, tmp_path / "run"


def test_an_evaluation_counts_and_resumes(run):
    start, folder = run
    whole = start()["metrics"]
    assert whole["avg@4"]["mean"] == whole["pass@1"]["mean"] == 0.5 and whole["pass@4"]["mean"] == 1
    assert whole["pass@2"]["mean"] == pytest.approx(1 - 1 / 6, abs=1e-4) and whole["maj@4"]["mean"] == 0.5
    assert whole["truncated"]["mean"] == 0.25 and whole["tokens"]["mean"] == 2.5 and "pass@8" not in whole
    responses = (folder / "responses.jsonl").read_text()
    lines = responses.splitlines(keepends=True)
    (folder / "responses.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote
    FakeSampler.asked = []
    assert start()["metrics"] == whole and FakeSampler.asked == [3, 4, 5]

    def facts(text):
        return [{**json.loads(line), "seconds": 0} for line in text.splitlines()]

    assert facts((folder / "responses.jsonl").read_text()) == facts(responses)
    assert "| avg@4 | 0.500 |" in (folder / "table.md").read_text()
    assert json.loads((folder / "summary.json").read_text())["metrics"] == whole


def test_a_folder_is_not_shared_by_two_settings(run):
    start, _ = run
    start(questions=2)
    with pytest.raises(SystemExit, match=r"other settings \(temperature was 0.7\); give another --name"):
        start(questions=2, temperature=1.0)


def test_the_papers_protocols():
    assert evaluate.PROTOCOLS["sdzero"]["samples"] == 8 and evaluate.PROTOCOLS["sdzero"]["temperature"] == 0.7
    assert evaluate.PROTOCOLS["sdpo"] == dict(samples=16, temperature=0.6, top_p=0.95, max_tokens=8192)
    assert evaluate.PROTOCOLS["hsd"] == dict(samples=16, temperature=1.0)

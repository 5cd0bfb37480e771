"""benchmarks/teacher.py: is the teacher better than the student?"""
import doctest
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, ROOT
from transformers import AutoModelForCausalLM

from benchmarks import teacher
from common.verifiers import Verdict

WORDINGS = {"hsd": {"as trained": {}, "unknown words": {"ANSWER": "Psst: {answer}!", "CLOSING": ""}}}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "wordings.json").write_text(json.dumps(WORDINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "ROOT", folder)
        args = teacher.Args(
            model=CHAIN, task="chain:3", file="hsd", shown=("answer",), wording=str(folder / "wordings.json"),
            budget=96, group_size=4, max_tokens=32, chunk=3, name="r",
        )
        summary = teacher.main(args)
        lines = (folder / "results" / "teacher" / "r" / "responses.jsonl").read_text()
        again = teacher.main(replace(args, sampler_rows=8))  # the machine may differ
        assert (folder / "results" / "teacher" / "r" / "responses.jsonl").read_text() == lines
    return folder / "results" / "teacher" / "r", summary, again, lines


def test_what_was_sampled_is_not_sampled_again_and_counts_within_the_budget(measured):
    _, summary, again, lines = measured
    assert summary["rows"] == again["rows"]
    assert lines.count("\n") == 96 and summary["questions"] == 8


def test_every_row_has_its_answers_and_every_wording_its_own(measured):
    folder, summary, _, lines = measured
    rows = [json.loads(line) for line in lines.splitlines()]
    attempts = {r["index"]: r["reward"] == 1 for r in rows if r["cell"] == "student"}
    for row in summary["rows"]:
        cell = "student" if row["shown"] == "student" else f"{row['wording']}/{row['shown']}"
        own = [r for r in rows if r["cell"] == cell]
        assert row["right"]["mean"] == pytest.approx(sum(r["reward"] == 1 for r in own) / len(own), abs=1e-4)
        assert row["cut_off"] == pytest.approx(sum(r["finish_reason"] == "length" for r in own) / len(own))
        if cell != "student":
            after = {True: [], False: []}  # whether the rollout was right → whether the teacher was
            for r in own:
                after[attempts[r["index"]]].append(r["reward"] == 1)
            counts = row["right_by_rollout"]
            assert counts == {"right": [sum(after[True]), len(after[True])], "wrong": [sum(after[False]), len(after[False])]}
    assert summary["rows"][1]["right"] != summary["rows"][2]["right"]  # words it never saw
    assert (folder / "figure.png").stat().st_size > 1000 and "unknown words" in (folder / "table.md").read_text()
    assert "Psst: " in (folder / "examples.md").read_text()


@pytest.mark.parametrize("shown", ["sibling", "feedback"])
def test_a_teacher_as_good_as_the_student_has_no_lead(shown):
    """Each is right in a tenth of its answers. Groups without a success have no sibling's hint, and a success has no feedback."""
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(4000, 8, generator=generator) < 0.1).float()
    taught = (torch.rand(4000, 8, generator=generator) < 0.1).float().flatten().tolist()
    others = rewards.sum(1, keepdim=True) - rewards
    has_context = others > 0 if shown == "sibling" else rewards == 0
    answer = SimpleNamespace(truncated=False, response_ids=[0])
    answers = {i: (answer, Verdict(taught[i])) for i in has_context.flatten().nonzero()[:, 0].tolist()}
    batch = SimpleNamespace(rewards=rewards, rollouts=range(rewards.numel()))
    found = teacher.answer_metrics(answers, batch, shown)
    assert abs(found["lead"]["mean"]) < 0.02 and found["right"]["mean"] == pytest.approx(0.1, abs=0.01)


@torch.no_grad()
def test_the_divergence_is_that_of_full_logits(measured):
    """KL(teacher ‖ student) in float64, token by token, and where it lies."""
    _, summary, _, lines = measured
    lm = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float64)
    rows = [json.loads(line) for line in lines.splitlines()]
    students = {r["index"]: r for r in rows if r["cell"] == "student"}
    total, first, right, count = 0.0, 0.0, 0.0, 0
    for row in rows:
        if row["cell"] != "as trained/answer":
            continue
        student = students[row["index"]]
        response = torch.tensor(student["response_ids"])

        def log_probabilities(prompt, response=response):
            ids = torch.tensor([prompt + response.tolist()])
            return lm(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

        q, p = log_probabilities(row["prompt_ids"]), log_probabilities(student["prompt_ids"])
        kl = (q.exp() * (q - p)).sum(-1)
        total += kl.sum().item()
        first += kl[0].item()
        right += kl.sum().item() * (student["reward"] == 1)
        count += len(response)
    found = summary["rows"][1]
    assert found["kl"] == pytest.approx(total / count, rel=1e-4)
    assert found["kl_on_first"] == pytest.approx(first / total, rel=1e-3, abs=1e-5)
    assert found["kl_on_right"] == pytest.approx(right / total, rel=1e-3)
    assert sum(found[f"kl_on_{place}"] for place in ("first", "format", "elsewhere")) == pytest.approx(1)


def test_a_wording_that_names_no_constant_is_refused(tmp_path):
    import hsd

    file = tmp_path / "w.json"
    file.write_text(json.dumps({"hsd": {"typo": {"SOLUTON": ""}}}))
    with pytest.raises(SystemExit, match="SOLUTON"):
        teacher.read_wordings(str(file), hsd)


def test_the_wordings_that_the_repository_compares_fit_their_files():
    import importlib

    for name in ("hsd", "sdpo", "rlsd"):
        wordings = teacher.read_wordings(str(ROOT / "benchmarks" / "wordings.json"), importlib.import_module(name))
        assert {"the file's own"} < wordings.keys()


def test_the_examples_hold():
    assert doctest.testmod(teacher).failed == 0

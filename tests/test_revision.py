"""benchmarks/revision.py: what SD-Zero's paper reports of a run, by hand."""
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import CHAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sdzero import some_trace

import sdzero
from benchmarks.revision import KEYWORDS, budget_table, localisation, reviser, speaks_of_revision
from common.policy import frozen_copy, load_policy, local
from common.settings import Setup, flat


def table(text: str) -> dict[str, list[float]]:
    """The numbers of a budget table by the names of its rows."""
    found = {}
    for line in text.splitlines():
        row = re.fullmatch(r"(start|SRT|RFT|SFT|SRT \+ SD|SD only)((?: +(?:[\d.,]+|nan)){4})", line)
        if row:
            found[row[1]] = [float(x) for x in row[2].replace(",", "").split()]
    return found


SPENT = {"budget/generations": 5, "budget/sampled_tokens": 40, "budget/loss_tokens": 80}
BATCHES = [dict(generations=8, sampled_tokens=70), dict(generations=4, sampled_tokens=30)]


@pytest.mark.parametrize("baseline, name", [("", "SRT"), ("rft", "RFT"), ("sft", "SFT")])
def test_phase_1_of_the_budget_has_its_own_name_and_counts_one_pass(baseline, name):
    """By hand: two traces of 3 + 2 + 4 tokens, y_rev in both terms, so 13 each."""
    args = sdzero.Args(baseline=baseline, srt_epochs=3)
    history = [{"step": 0, "heldout/pass@1": 0.25, "budget/loss_tokens": 13},
               {"step": 1, "budget/loss_tokens": 13}, {"step": 2, "heldout/pass@1": 0.5}]
    text = budget_table(flat(args), history, BATCHES, [some_trace()] * 2, 2, 2)
    assert table(text) == {"start": [0, 0, 0, 0.25], name: [12, 100, 26, 0.5]}
    assert f"Loss tokens of {name}: of one pass over its traces; the run made 3 passes." in text


def test_the_budget_counts_all_that_led_to_a_score():
    history = [{"step": 0, "heldout/pass@1": 0.25}, {"step": 2, "heldout/pass@1": 0.5, **SPENT},
               {"step": 3, **SPENT}, {"step": 4, "heldout/pass@1": 0.75}]
    text = budget_table(flat(sdzero.Args()), history, BATCHES, [some_trace()] * 2, 2, 4)
    assert table(text) == {"start": [0, 0, 0, 0.25], "SRT": [12, 100, 26, 0.5],
                           "SRT + SD": [22, 180, 186, 0.75]}


@pytest.mark.parametrize("terms, counted", [("both", 26), ("generation", 18), ("revision", 8)])
def test_the_budget_counts_the_tokens_of_each_term(terms, counted):
    text = budget_table(flat(sdzero.Args(terms=terms)), [], BATCHES, [some_trace()] * 2, 1, 1)
    assert table(text)["SRT"][2] == counted


def test_phase_2_alone_has_a_row_of_its_own():
    history = [{"step": 0, "heldout/pass@1": 0.25, **SPENT}, {"step": 1, "heldout/pass@1": 0.5}]
    text = budget_table(flat(sdzero.Args(phase="sd")), history, [], [], 0, 1)
    assert table(text) == {"start": [0, 0, 0, 0.25], "SD only": [5, 40, 80, 0.5]}
    assert "one pass" not in text


PAPERS_KEYWORDS = """wait
hold on
actually
on second thought
let me recheck
let's recheck
let me check
let's check
let me recalculate
let's recalculate
let me correct
my mistake
i made a mistake
this is wrong
that is wrong
that's wrong
incorrect
re-evaluate
let's re-evaluate
let me rethink
let's rethink
let me double check
let's double check
wait a minute
let me start over
let me try again
oops""".splitlines()


def test_the_phrases_of_self_revision_are_the_papers_27():
    assert sorted(KEYWORDS) == sorted(PAPERS_KEYWORDS) and len(PAPERS_KEYWORDS) == 27
    for phrase in PAPERS_KEYWORDS:
        assert speaks_of_revision(f"So 5. {phrase.capitalize()}, 6.")
        assert speaks_of_revision(phrase.replace("'", "’"))


@pytest.mark.parametrize("text", [
    sdzero.CONTROL[1], "Loops await the waiter.", "The factually correct answer", "re-evaluated"])
def test_rephrasing_and_parts_of_words_are_no_self_revision(text):
    assert not speaks_of_revision(text)


def test_starting_over_is_self_revision():
    """The paper's list has two phrases of its own P_0, so it counts."""
    assert speaks_of_revision(sdzero.CONTROL[0])


@given(st.lists(st.floats(0, 10), min_size=20, max_size=200))
@settings(deadline=None)
def test_self_localisation_sorts_and_keeps_the_mean(kl):
    found = localisation(torch.tensor(kl, dtype=torch.float64))
    assert len(found) == 20 and all(a >= b - 1e-12 for a, b in zip(found, found[1:]))
    if len(kl) % 20 == 0:
        assert sum(found) / 20 == pytest.approx(sum(kl) / len(kl), abs=1e-9)


def test_the_reviser_of_a_run_is_the_teacher_of_its_last_checkpoint(one_process, tmp_path):
    """The embedded model ties its head to its embedding, so a checkpoint names that weight twice."""
    cpu = torch.device("cpu")
    teacher = frozen_copy(load_policy(CHAIN, cpu, Setup()), cpu)
    with torch.no_grad():
        for p in teacher.parameters():
            local(p).add_(1.0)
    folder = tmp_path / "checkpoints" / "step_000001" / "state"
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=folder)
    found = dict(reviser(tmp_path, CHAIN, cpu).named_parameters())
    assert all(torch.equal(local(found[name]), local(p)) for name, p in teacher.named_parameters())

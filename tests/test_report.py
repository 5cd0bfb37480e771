"""common/report.py: a run on one page, from what its folder holds."""
import dataclasses
import json
import math
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT
from pages import POISON, data_of, elements, outside, rendered

from common.report import (
    HEALTH,
    KEPT,
    MOST,
    RECENT,
    first_example,
    health,
    heldout_row,
    report_data,
    write_report,
)
from common.settings import Setup

PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass
class Args:
    model: str = POISON
    task: str = "chain"
    setup: Setup = dataclasses.field(default_factory=Setup)


@pytest.fixture
def run(tmp_path):
    """A finished run whose texts are hostile: right stays, one turns right, one turns wrong."""
    folder = tmp_path / "a-run"
    folder.mkdir()
    (folder / "curves.png").write_bytes(PNG)
    first = {"a": [POISON, POISON, 0.0], "b": ["2+2?", "4", 1.0], "c": ["3+3?", "6", 1.0], "gone": ["?", "", 0.0]}
    last = {"a": [POISON, POISON, 1.0], "b": ["2+2?", "5", 0.0], "c": ["3+3?", "6", 1.0]}
    between = {name: [question, text, 0.0] for name, (question, text, _) in last.items()}
    rows = [{"step": 0, "answers": first}, {"step": 5, "answers": between}, {"step": 9, "answers": last}]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    example = {"step": 0, "prompt": POISON, "trained": ["1", POISON, "<|im_end|>"], "teacher": POISON}
    (folder / "example.jsonl").write_text(json.dumps(example) + "\n" + json.dumps(example | {"step": 4}) + "\n")
    history = [{"step": 0, "reward/mean": 0.25, "heldout/pass@1": 0.5}, {"step": 9, "reward/mean": 0.75, "heldout/pass@1": 0.3}]
    said = []
    return SimpleNamespace(folder=folder, history=history, args=Args(), said=said, say=said.append)


def test_a_value_is_the_mean_of_the_last_ten_rows_that_have_it():
    history = [{"frac_truncated": 1.0}] * 5 + [{"frac_truncated": 0.0}, {"step": 1}] * (RECENT - 1) + [{"frac_truncated": 0.5}]
    (row,) = health(history)
    assert row[:5] == ["frac_truncated", pytest.approx(0.05), 0.0, 0.1, True]
    (row,) = health([{"frac_truncated": 0.5}, {"frac_truncated": 0.0}])
    assert row[1] == 0.25 and row[4] is False and row[5]


def test_a_value_that_is_not_finite_is_unhealthy_and_leaves_the_page_readable(run):
    run.history.append({"step": 10, "entropy": math.nan, "grad_norm": math.inf})
    write_report(run)
    rows = {row[0]: row for row in data_of((run.folder / "report.html").read_text())["health"]}
    assert rows["entropy"][1] is None and rows["entropy"][4] is False and rows["grad_norm"][4] is False
    assert "NaN" not in (run.folder / "report.html").read_text()


def test_a_difference_is_taken_between_numbers_of_the_same_row():
    history = [{"delta/right": 0.4, "delta/wrong": 0.6, "reward/mean": 0.6}, {"reward/mean": 0.1}]
    found = {name: (value, healthy) for name, value, _, _, healthy, _ in health(history)}
    assert found["delta/right − delta/wrong"] == (pytest.approx(-0.2), False)
    assert found["reward/mean"] == (pytest.approx(0.35), True)
    assert health([{"delta/right": 0.4}]) == []


def test_every_number_of_the_table_is_explained_in_metrics_md():
    explained = set(re.findall(r"`([\w/@]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    for name, least, most, words in HEALTH:
        metrics = name.removeprefix("fall of ").split(" − ")
        assert set(metrics) <= explained, name
        assert least < most and words


def test_a_fall_of_the_held_out_score_is_measured_from_its_best(run):
    run.history.insert(1, {"step": 4, "heldout/pass@1": 0.9})
    found = {name: row for name, *row in report_data(run.folder, run.history)["health"]}
    assert found["fall of heldout/pass@1"][0] == pytest.approx(0.6)
    assert found["fall of heldout/pass@1"][3] is False


def test_the_kept_responses_are_few_and_short():
    problem = lambda i: SimpleNamespace(id=f"p{i}", messages=[{"role": "user", "content": "q" * 9999}])
    rollout, verdict = SimpleNamespace(text="r" * 9999), SimpleNamespace(reward=1.0)
    row = heldout_row(3, [(problem(i), [rollout, None], [verdict, None]) for i in range(KEPT + 5)])
    assert row["step"] == 3 and len(row["answers"]) == KEPT
    assert row["answers"]["p0"] == ["q" * MOST, "r" * MOST, 1.0]


def test_the_first_example_is_the_best_response_with_each_trained_token(run):
    import torch

    rows = []
    run.tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"<{i}>" for i in ids))
    run.step, run.append = 0, lambda name, new: rows.extend((name, row) for row in new)
    batch = SimpleNamespace(rewards=torch.tensor([[0.0, 1.0]]), prompts=[[1], [2]], responses=[[3], [4, 5]])
    first_example(run, batch, [[6], [7]])
    assert rows == [("example", {"step": 0, "prompt": "<2>", "trained": ["<4>", "<5>"], "teacher": "<7>"})]
    assert "[loss: 2 tokens] ⟦<4><5>⟧" in run.said


def test_the_report_is_one_file_that_loads_nothing_and_reads_no_text_as_html(run):
    write_report(run)
    assert run.said == []
    html = (run.folder / "report.html").read_text()
    assert len(html) < 400_000 and outside(html) == []
    assert len(elements(html, "script")) == 2 and [a for a, _ in elements(html, "img") if "src" in a] == []
    data = data_of(html)
    assert data["settings"]["model"] == POISON and data["settings"]["seed"] == 0
    assert [row["step"] for row in data["heldout"]] == [0, 9] and data["example"][0]["step"] == 0


@pytest.mark.parametrize("broken", ["curves.png", "heldout.jsonl"])
def test_a_report_that_cannot_be_written_costs_no_run(run, broken):
    (run.folder / broken).unlink()
    (run.folder / broken).mkdir()
    write_report(run)
    assert len(run.said) == 1 and run.said[0].startswith("report.html could not be written")


def test_a_browser_shows_what_changed_and_what_was_trained(run, tmp_path):
    run.history[-1]["frac_truncated"] = 0.5
    write_report(run)
    html = rendered((run.folder / "report.html").read_text(), tmp_path, "")
    assert [text for _, text in elements(html, "title")] == ["a-run"]
    text = re.sub(r"<[^>]*>", "", html[: html.index('id="data"')])
    assert "after 0 and after 9 steps: 1 wrong, then right; 1 right, then wrong; 1 right both times; 0 wrong" in text
    assert "✗ look: raise --max_tokens" in text and text.count("✓ healthy") == 1
    assert "fall of heldout/pass@1" in text and "0.500 → 0.300" in text
    trained = [text for a, text in elements(html, "span") if a.get("class") == "trained"]
    assert trained == ["1", POISON, "<|im_end|>"]
    (image,) = elements(html, "img")
    assert image[0]["src"].startswith("data:image/png;base64,iVBOR")

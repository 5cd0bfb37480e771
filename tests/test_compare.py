"""The comparison is fair before it is run: every method's command parses and spends the same rollouts."""
import importlib
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import compare, lead, leakage, printed
from common.settings import parse

REAL = {"smollm2": 384, "qwen": 512}  # grid → rollouts


def names(*grids: str) -> list[str]:
    return sorted({m for grid in grids for members in compare.GRIDS[grid].panels.values() for m in members})


def rollouts(method: str) -> int:
    """Responses that a run of `method` samples for training, by its settings."""
    file, *flags = compare.METHODS[method].command
    algorithm = importlib.import_module("sdpo" if file == "benchmarks/own_hint.py" else file.removesuffix(".py"))
    args = parse(algorithm.Args, algorithm.presets, [*flags, compare.METHODS[method].rate, "1e-4"])
    if algorithm.__name__ != "sdzero":
        return args.batch_size * args.group_size * args.steps
    phase1 = args.srt_questions * args.inits * (1 if args.baseline else 1 + args.revisions) if args.phase != "sd" else 0
    phase2 = args.sd_questions // args.batch_size * args.batch_size * args.rounds if args.phase != "srt" else 0
    return phase1 + phase2


@pytest.mark.parametrize("method", names(*(g for g in compare.GRIDS if g not in REAL)))
def test_every_method_on_the_embedded_model_has_5120_rollouts(method):
    assert rollouts(method) == 5120


@pytest.mark.parametrize("method, count", [(method, count) for grid, count in REAL.items() for method in names(grid)])
def test_every_method_on_a_real_model_has_equal_rollouts(method, count):
    assert rollouts(method) == count


def test_no_reported_seed_was_tuned_on():
    for grid in compare.GRIDS.values():
        assert not set(grid.seeds) & set(grid.tuning_seeds)


def test_interval_is_students():
    """Of 1 … 5: mean 3, standard error √2.5/√5, t of 4 degrees of freedom 2.776."""
    assert compare.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 2.776 * math.sqrt(0.5)))


def test_the_first_evaluation_at_a_level_counts():
    run = {"rollouts": [0, 128, 256, 384], "pass": [0.4, 0.7, 0.5, 0.9]}
    assert [compare.first_to(run, level) for level in (0.4, 0.6, 0.8, 0.95)] == [0, 128, 384, None]


def test_progress_counts_rollouts_tokens_and_seconds_up_to_each_evaluation(tmp_path):
    """An evaluation comes before the step whose row it is in; evaluation time does not count. A step without an update (no
    grad_norm) has cost its rollouts too."""
    rows = [{"heldout/pass@1": 0.1, "lr": 1, "reward/mean": 0, "length/mean": 10, "time/update": 2, "time/eval": 9},
            {"lr": 1, "reward/mean": 0, "length/mean": 20, "time/update": 3},
            {"heldout/pass@1": 0.5, "lr": 1, "reward/mean": 0, "length/mean": 20, "time/sample": 1},
            {"heldout/pass@1": 0.6}]
    (tmp_path / "args.json").write_text(json.dumps({"batch_size": 2, "group_size": 4}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare.progress(tmp_path)
    assert found == {"rollouts": [0, 16, 24], "tokens": [0, 240, 400], "seconds": [0, 5, 6], "pass": [0.1, 0.5, 0.6]}


@pytest.mark.parametrize("rank, phase, called", [(0, "both", 1), (0, "srt", 0), (16, "both", 0), (16, "sd", 0)])
def test_the_report_of_self_revision_is_made_of_runs_whose_teacher_it_can_read(monkeypatch, tmp_path, rank, phase, called):
    """revision.py reads no adapters and ends with an error, which would end the comparison too."""
    commands = []
    monkeypatch.setattr(compare, "execute", lambda *args: None)
    monkeypatch.setattr(compare.subprocess, "run", lambda command, **named: commands.append(command))
    (tmp_path / "args.json").write_text(json.dumps({"phase": phase, "lora_rank": rank}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"heldout/pass@1": 0.5}) + "\n")
    compare.run_one(["sdzero.py"], tmp_path, 1, 0)
    assert len(commands) == called


def result(pass_at_1: float) -> dict:
    return {"seed": 0, "rollouts": [0, 512.0], "tokens": [0, 9.0], "seconds": [0, 9.0], "pass": [0.1, pass_at_1],
            "pass@1": pass_at_1, "pass@8": 1.0, "length": 9.0, "entropy": 0.1, "peak_gib": 1.0,
            "commit": f"of {pass_at_1}", "hardware": "a laptop"}


def test_methods_that_were_not_asked_for_keep_their_results(monkeypatch, tmp_path):
    """Unless their command or the seeds have changed since. The table names the commit and machine of each method."""
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    args, grid = compare.Args("qwen", model="M"), compare.GRIDS["qwen"]
    said = []

    def write(method, pass_at_1, grid=grid):
        search = {method: {"0.0001": [result(pass_at_1)]}}
        compare.write({method: [result(pass_at_1)]}, {method: 1e-4}, search, [f"{method}, seed 0, stopped: why"], grid, args)
        tuning = json.loads((tmp_path / "results" / "compare" / "qwen" / "search.json").read_text())
        found = json.loads((tmp_path / "results" / "compare" / "qwen" / "runs.json").read_text())
        said.append((tmp_path / "results" / "compare" / "qwen" / "table.md").read_text())
        assert set(found["commands"]) == set(found["ran"]) == set(found["runs"])
        assert {line.partition(",")[0] for line in found["stopped"]} == set(found["runs"])
        assert set(tuning["final held-out pass@1"]) == set(tuning["runs"]) == set(found["runs"])
        return {m: results[0]["pass@1"] for m, results in found["runs"].items()}

    assert write("GRPO (0.5B)", 0.8) == {"GRPO (0.5B)": 0.8}
    assert write("HSD (0.5B)", 0.4) == {"HSD (0.5B)": 0.4, "GRPO (0.5B)": 0.8}
    assert write("GRPO (0.5B)", 0.7) == {"HSD (0.5B)": 0.4, "GRPO (0.5B)": 0.7}
    assert "| GRPO (0.5B) | 0.0001 | 0.700 |" in said[-1] and "| HSD (0.5B) | 0.0001 | 0.400 |" in said[-1]
    assert "- HSD (0.5B) (commit of 0.4, a laptop): " in said[-1]
    monkeypatch.setitem(compare.METHODS, "HSD (0.5B)", compare.Method("hsd.py --steps 9"))
    assert write("RLSD (0.5B)", 0.6) == {"RLSD (0.5B)": 0.6, "GRPO (0.5B)": 0.7}
    assert write("RLSD (0.5B)", 0.6, replace(grid, seeds=(1,))) == {"RLSD (0.5B)": 0.6}


def test_a_finished_run_that_does_not_say_which_commit_ran_it_is_refused(tmp_path):
    (tmp_path / "curves.png").touch()
    with pytest.raises(SystemExit, match=r"no ran\.json"):
        compare.execute(["grpo.py"], tmp_path, 1)
    (tmp_path / "ran.json").touch()
    compare.execute(["grpo.py"], tmp_path, 1)  # finished: not run again


def test_a_figure_has_the_evaluations_and_nothing_between_them():
    """Of those at the same number of rollouts the last; a seed that has none at 80 lies on its line there."""
    runs = [{"rollouts": [0, 64, 64, 96], "tokens": [0, 500, 500, 700], "pass": [0.2, 0.3, 0.4, 0.8]},
            {"rollouts": [0, 64, 80, 96], "tokens": [0, 540, 650, 740], "pass": [0.4, 0.6, 0.9, 0.8]}]
    xs, ys = compare.evaluations(runs, "tokens")
    assert xs.tolist() == [0, 520, 625, 720] and ys == pytest.approx(np.array([[0.2, 0.4, 0.6, 0.8], [0.4, 0.6, 0.9, 0.8]]))
    assert compare.evaluations(runs[:1], "rollouts")[0].tolist() == [0, 64, 96]


def test_lead_and_gain_are_means_over_the_seeds_of_methods_that_have_a_teacher(tmp_path):
    teacher = [{"lead": 0.2, "pass": [0.3, 0.9, 0.8]}, {"lead": 0.4, "pass": [0.3, 0.4]}]
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "runs.json").write_text(json.dumps({"runs": {
        "HSD": teacher, "GRPO": [{"lead": None, "pass": [0.3, 0.9]}], "stopped": []}}))
    point, = lead.points(tmp_path)
    assert (point["grid"], point["method"]) == ("chain", "HSD")
    assert [point[k] for k in ("lead", "gain", "least", "most")] == pytest.approx([0.3, 0.3, 0.1, 0.5])


def test_a_printed_run_keeps_evaluations_as_they_are_and_means_of_ten_steps_of_the_rest():
    rows = [{"step": step, "entropy": float(step)} for step in range(20)]
    rows[0]["heldout/pass@1"], rows[10]["heldout/pass@1"] = 0.4, 0.6
    found = printed.curves([*rows, {"step": 20, "heldout/pass@1": 0.5}])
    assert found == {"heldout/pass@1": [[0, 0.4], [10, 0.6], [20, 0.5]], "entropy": [[9, 4.5], [19, 14.5]]}


def test_what_no_student_can_remove_is_the_mutual_information_of_token_and_reference():
    """RLSD, Theorem 1, in plain loops: I = H(mean) − mean H, and KL(teachers ‖ student) = I + KL(mean ‖ student)."""
    logits = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [K + 1, T, V]
    *teachers, student = logits.log_softmax(-1)
    T, V, K = 2, 5, 3
    of_teachers, of_mean, information, entropies, entropy_of_mean = 0.0, 0.0, 0.0, 0.0, 0.0
    for t in range(T):
        for v in range(V):
            p = [math.exp(teacher[t, v]) for teacher in teachers]
            q, mean = math.exp(student[t, v]), sum(p) / K
            of_teachers += sum(x * math.log(x / q) for x in p) / K / T
            information += sum(x * math.log(x / mean) for x in p) / K / T
            entropies -= sum(x * math.log(x) for x in p) / K / T
            of_mean += mean * math.log(mean / q) / T
            entropy_of_mean -= mean * math.log(mean) / T
    mean = leakage.log_mean(teachers)
    close = partial(pytest.approx, abs=1e-12)
    assert information == close(entropy_of_mean - entropies)
    assert of_teachers == close(information + of_mean)
    assert leakage.mean_kl(teachers, mean) == close(information)
    assert leakage.mean_kl(teachers, student) == close(of_teachers)
    assert printed.entropy(mean) == close(entropy_of_mean)
    assert sum(map(printed.entropy, teachers)) / K == close(entropies)

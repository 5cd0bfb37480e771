"""benchmarks/gpu.py without a GPU: its commands are in order, and its table says what the metrics say."""
import importlib
import shlex

import pytest

from benchmarks import gpu
from common.settings import check_settings, parse


@pytest.mark.parametrize("name", gpu.RUNS)
def test_every_command_parses_and_its_settings_are_in_order(name, monkeypatch):
    file, *flags = shlex.split(gpu.RUNS[name])
    method = importlib.import_module(file.removesuffix(".py"))
    args = parse(method.Args, method.presets, [*flags, "--model", "m"])
    monkeypatch.setattr("common.settings.installed", lambda package: True)
    check_settings(args)
    assert args.setup.sampler == "vllm"
    if name not in gpu.ENDED:  # it ends by itself, after 8 steps of 256 rollouts
        steps = getattr(args, "steps", None) or 1 + args.rounds * args.sd_questions // args.batch_size
        assert steps == 8 and args.batch_size * getattr(args, "group_size", 1) == 256


def test_a_row_has_the_means_of_the_steps_after_the_first():
    def step(reward: float, seconds: float, **more) -> dict:
        return {"length/mean": 50.0, "time/sample": seconds, "time/score": 0.0, "time/update": 2.0, "time/sync": 0.5,
                "tflops/update": 40.0, "peak_gib": 9.0, "mismatch/max_abs_dlogp": seconds / 100, **more}

    metrics = [step(0.1, 30.0, **{"heldout/pass@1": 0.12}), step(0.2, 2.0), step(0.3, 4.0, peak_gib=11.0),
               {"heldout/pass@1": 0.5, "peak_gib": 10.0}]
    row = dict(zip(gpu.COLUMNS, gpu.row_of("grpo", metrics), strict=True))
    assert row["held-out pass@1"] == "0.12 → 0.50" and row["sample, s"] == "3.00"
    assert row["sampled tokens per s"] == f"{256 * 50 / 3:,.0f}" and row["GiB"] == "11.0"
    assert (row["mismatch: first"], row["later"]) == ("0.30", "0.04")


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert gpu.lines_of(path) == []
    path.write_text('{"step": 0}\n{"ste')
    assert gpu.lines_of(path) == [{"step": 0}]

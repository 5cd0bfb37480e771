"""benchmarks/machine.py: the parts of a step add up, and the file's functions are as before."""
import sys

import torch
from conftest import CHAIN

from benchmarks import machine
from common import policy, sampler
from common.run import Run

TINY = f"--model {CHAIN} --task chain:3 --max_tokens 28 --heldout 4 --batch_size 2 --group_size 4"


def test_the_parts_of_a_step_add_up_and_nothing_stays_wrapped(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["machine.py"])
    watched = lambda: (sampler.draw, sampler.HFSampler.logits, policy.Policy.read, policy.head_loss, Run.log, torch.Tensor.backward)
    before = watched()
    found = machine.measure("sdpo", machine.Args(steps=4, flags=TINY))
    assert watched() == before
    seconds, flops = found["seconds"], found["flops"]
    assert set(seconds) == set(machine.PARTS) and min(seconds.values()) > -1e-3
    for part in ("sample: model", "teacher", "student", "head", "backward", "optimizer"):
        assert seconds[part] > 0, part
    assert flops["backward"] == 2 * flops["student"] > 0 and flops["teacher"] > 0 and flops["head"] > 0
    assert "| whole step |" in machine.table({"sdpo": found}, {"1,024 × 1,024": 1e11})


def test_a_product_counts_two_flops_per_weight_and_row(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))  # a second per product
    assert machine.product(3, 4, 5) == 2 * 3 * 4 * 5

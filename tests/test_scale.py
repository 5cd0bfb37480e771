"""The cost formula of benchmarks/scale.py."""
import pytest
import torch

from benchmarks.scale import CHANGES, FITTED, Flops, Size, fit, on_gpus, seconds, step_flops
from common.microbatches import shared_prompts
from common.work import Cost, Work


@pytest.mark.parametrize("different", [1, 3])
def test_the_formula_counts_what_a_run_counts(different):
    """One micro-batch of 2 questions × 3 responses of 5 tokens, student and teacher, who has one
    prompt per question or one per response."""
    size = Size(B=2, G=3, T=5, P=7, H=11, C=different)
    cost = Cost(token=100.0, pair=10.0, entry=1000.0, backward=2.0)
    responses = [[1] * 5] * 6
    work = Work()
    work.phase = "update"
    for length, grad in ((7, True), (11, False)):
        count = 1 if grad else different
        prompts = [[q * 3 + i % count] * length for q in (0, 1) for i in range(3)]
        micro = shared_prompts(prompts, responses, list(range(6)), torch.device("cpu"))
        with torch.set_grad_enabled(grad):
            work.read(micro, cost)
            if grad:
                work.head(micro, cost, teachers=1)
    assert step_flops(size, cost).update == pytest.approx(work.flops["update"], rel=1e-12)


def test_seconds_are_in_proportion_to_flops_and_shared_by_the_cores():
    constants = {"call": 0.0, "sample": 10.0, "update": 20.0}
    flops = Flops(sample=100.0, update=600.0)
    assert seconds(Size(), flops, constants, cores=2) == (10.0, 30.0)
    assert seconds(Size(W=2), flops, constants, cores=2) == (5.0, 15.0)
    assert seconds(Size(W=4), flops, constants, cores=2) == (5.0, 15.0)


def test_the_fit_finds_the_constants_of_exact_points():
    constants = {"call": 0.01, "sample": 3e9, "update": 7e9}
    points = []
    for change in FITTED:
        size = Size(**change)
        flops = step_flops(size, Cost(token=1e6 * size.D, pair=1e3, entry=1e6, backward=2.0))
        sample, update = seconds(size, flops, constants, cores=2)
        points.append({"change": change, "size": vars(size), "flops": flops._asdict(),
                       "sample": sample, "update": update})
    assert fit(points) == pytest.approx(constants)


def test_points_that_are_fitted_are_measured():
    assert all(change in CHANGES for change in FITTED)


def test_an_update_divides_among_gpus_and_the_longest_response_does_not():
    """Of sampling only the keys and values divide: (8 GPUs − 32 GPUs) is three quarters of them."""
    (sample_8, update_8), (sample_32, update_32) = on_gpus(8), on_gpus(32)
    assert update_8 == pytest.approx(4 * update_32)
    layers, heads, width, tokens, past = 36, 8, 128, 1024 * 1000 / 8, 150 + 500
    keys_and_values = tokens * past * (2 * layers * heads * width) * 2 / 3.35e12  # bf16
    assert sample_8 - sample_32 == pytest.approx(0.75 * keys_and_values)

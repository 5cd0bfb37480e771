"""The arithmetic of docs/memory.md."""
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, ROOT

from common.policy import frozen_copy, load_policy, make_optimizer
from common.settings import Setup

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory


@pytest.mark.parametrize("rank", [0, 4])
def test_bytes_of_weights_gradients_moments_and_a_teacher_are_what_the_arithmetic_says(rank, one_process):
    policy = load_policy(CHAIN, torch.device("cpu"), Setup(lora_rank=rank))
    teacher = frozen_copy(policy, torch.device("cpu"))
    optimizer = make_optimizer(policy, SimpleNamespace(lr=1e-3, weight_decay=0.0))
    for p in policy.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    kept = [*policy.parameters(), *(p.grad for p in policy.parameters() if p.requires_grad), *teacher.parameters(),
            *(t for s in optimizer.state.values() for name, t in s.items() if name != "step")]
    expected = memory.states(memory.shape_of(CHAIN), rank=rank, copies=1)
    assert sum(t.to_local().nbytes for t in kept) == pytest.approx(expected, rel=0.005)  # norms are left out there


def test_the_table_of_the_docs_is_what_the_script_prints():
    assert memory.fits() in (ROOT / "docs" / "memory.md").read_text()

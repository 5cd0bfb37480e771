"""What is in bf16 on a GPU and what is not, with the CPU in its place."""
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, at_most
from test_house import ALGORITHMS

from common import policy as policies
from common.microbatches import micro_batches
from common.settings import Setup


@pytest.mark.parametrize("per_response", [False, True])
def test_a_policy_in_bf16_hands_the_loss_its_inputs_in_fp32(per_response, one_process, monkeypatch):
    """They are log-probabilities and weights: in bf16 a log ratio would be off by up to 4 %."""
    import importlib

    real = policies.dist.init_device_mesh
    monkeypatch.setattr(policies.dist, "init_device_mesh", lambda _, *rest, **named: real("cpu", *rest, **named))
    policy = policies.load_policy(CHAIN, SimpleNamespace(type="cuda"), Setup())
    responses = [[5, 6, 7], [8, 9]]
    micro, = micro_batches([[1, 2]] * 2, responses, None, at_most(100), torch.device("cpu"))
    hidden, head = policy.read(micro)
    assert hidden.dtype == head.dtype == torch.bfloat16
    values = [[-9.123456, -0.3333333, -1e-4], [-17.01, 1.001]]  # none of them is a bf16 number
    for name in ALGORITHMS:
        inputs_of = importlib.import_module(name).Inputs
        given = inputs_of(*[micro.concat(values) for _ in inputs_of._fields])
        seen = []

        def loss(stats, inputs):
            seen.append(inputs)
            assert stats.logp.dtype == stats.entropy.dtype == torch.float32
            return inputs[0] * stats.logp

        total, _ = policy(micro, loss, given, [(hidden, head)], per_response=per_response)
        total.backward()
        for k, x in enumerate(given):
            found = torch.cat([inputs[k] for inputs in seen])
            assert found.dtype == torch.float32 and torch.equal(found, x)
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters())  # and added up in fp32

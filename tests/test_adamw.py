"""Moments in bf16 or in the CPU's memory: what they cost, and how far training with them is from fp32's."""
import pytest
import torch
from conftest import CHAIN, torchrun
from test_run import SMALL, assert_same_run

from common.policy import load_policy, make_optimizer
from kernels import adamw
from kernels.adamw import LeanAdamW, rounded


def test_rounding_is_exact_on_average_and_never_further_than_the_next():
    noise = torch.Generator().manual_seed(0)
    x = torch.tensor([1.0, -3.14159, 1e-30, 0.0, 1 + 2**-10, 7e20])
    drawn = torch.stack([rounded(x, noise).double() for _ in range(20_000)])
    error = (drawn.mean(0) - x.double()).abs()
    assert (error <= 4 * x.double().abs() * 2**-8 / 20_000**0.5).all()
    assert torch.equal(drawn[:, [0, 3]], x[[0, 3]].double().expand(20_000, 2))  # what bf16 can hold stays
    assert all(len(column.unique()) <= 2 for column in drawn.T)
    assert torch.equal((drawn - x.double()).abs().amax(0) < x.double().abs() * 2**-7, x != 0)


def losses(make, steps: int = 600) -> list[float]:
    """A two-layer network on noisy minibatches of a teacher network's outputs."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    optimizer, held = make(net.parameters()), torch.randn(2000, 32)
    out = []
    for _ in range(steps):
        x = torch.randn(64, 32)
        (net(x) - teacher(x).detach() - 0.1 * torch.randn(64, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append((net(held) - teacher(held)).square().mean().item())
    return out


def test_offloaded_moments_train_as_fp32():
    settings = dict(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    expected = losses(lambda p: torch.optim.AdamW(p, **settings))
    got = losses(lambda p: LeanAdamW(p, "offload", **settings))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=0)


def test_bf16_moments_train_within_five_percent_of_fp32():
    settings = dict(lr=3e-3, weight_decay=0.0)
    expected = losses(lambda p: torch.optim.AdamW(p, **settings))
    got = losses(lambda p: LeanAdamW(p, "bf16", **settings))
    assert expected[-1] < 0.1 * expected[0]
    for at in (50, 150, 599):
        assert abs(got[at] / expected[at] - 1) < 0.05, at


@pytest.mark.parametrize("how", ["at random", "to the nearest"])
def test_a_second_moment_in_bf16_follows_the_gradients_only_if_rounded_at_random(how, monkeypatch):
    """Gradients of size 1, then of 0.1: in fp32 exp_avg_sq falls to 0.01. Rounding to the nearest holds it where it
    was, and the steps stay ten times too short."""
    if how == "to the nearest":
        monkeypatch.setattr(adamw, "rounded", lambda x, noise: x.bfloat16())
    p = torch.zeros(4096, requires_grad=True)
    optimizer = LeanAdamW([p], "bf16", lr=0.0)
    torch.manual_seed(0)
    for step in range(6000):
        p.grad = torch.randn(4096) * (1.0 if step < 1000 else 0.1)
        optimizer.step()
    v = optimizer.state[p]["exp_avg_sq"].float()
    expected = (1 - 0.999**1000) * 0.999**5000 + 0.01 * (1 - 0.999**5000)
    if how == "at random":
        assert abs(v.mean().item() / expected - 1) < 0.02 and v.std().item() / expected < 0.15
    else:
        assert v.mean().item() > 10 * expected


@pytest.mark.parametrize("state, size", [("fp32", 8), ("bf16", 4), ("offload", 8)])
def test_bytes_of_the_moments(state, size, one_process):
    policy = load_policy(CHAIN, torch.device("cpu"))
    optimizer = make_optimizer(policy, state, lr=1e-3)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = [t.to_local() for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    assert sum(t.nbytes for t in moments) == size * sum(p.numel() for p in policy.parameters())
    assert all(t.device.type == "cpu" for t in moments)


def test_moments_resume_bitwise_in_two_processes(tmp_path):
    """In bf16 and under LoRA; alone and offloaded: tests/test_lora.py."""
    common = ["grpo.py", *SMALL, "--out", str(tmp_path), "--optimizer_state", "bf16", "--lora_rank", "4"]
    torchrun(2, *common, "--steps", "4", "--name", "whole")
    torchrun(2, *common, "--steps", "2", "--name", "parts")
    torchrun(2, *common, "--steps", "4", "--name", "parts", "--resume", "auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)

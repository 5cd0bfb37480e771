"""Before the first step the sampler's log-probabilities are compared with the policy's."""
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN
from ranks import finish, launch

from common.chat import chat_ids, load_tokenizer
from common.policy import load_policy, local, whole
from common.rollouts import first_sync
from common.sampler import HFSampler
from common.settings import Setup

CPU = torch.device("cpu")
CHAT = [{"role": "user", "content": "3 + 4 = ?"}]


@torch.no_grad()
def moved_policy():
    """The embedded model, and not: what is sampled from the file's weights is not from this one."""
    torch.manual_seed(0)
    policy = load_policy(CHAIN, CPU, Setup())
    for p in policy.parameters():
        local(p).add_(0.02 * torch.randn_like(local(p)))
    return policy


def test_a_sampler_that_takes_the_weights_is_let_through(one_process):
    tokenizer = load_tokenizer(CHAIN)
    sampler, policy = HFSampler(CHAIN, tokenizer, CPU), moved_policy()
    first_sync(sampler, policy, chat_ids(tokenizer, CHAT))
    mine = dict(sampler.lm.named_parameters())
    assert all(torch.equal(mine[name], whole(p)) for name, p in policy.lm.named_parameters())


def test_a_sampler_that_skips_weights_in_silence_ends_the_run(one_process, monkeypatch):
    tokenizer = load_tokenizer(CHAIN)
    sampler = HFSampler(CHAIN, tokenizer, CPU)
    monkeypatch.setattr(sampler, "load", lambda weights: None)
    with pytest.raises(SystemExit, match=r"^error: --sampler hf: .*Qwen3ForCausalLM.*nats per token"):
        first_sync(sampler, moved_policy(), chat_ids(tokenizer, CHAT))


def test_a_sampler_whose_numbers_are_nan_ends_the_run(one_process, monkeypatch):
    tokenizer = load_tokenizer(CHAIN)
    sampler = HFSampler(CHAIN, tokenizer, CPU)
    sample = sampler.sample

    def broken(*args, **kwargs):
        groups = sample(*args, **kwargs)
        groups[0][0].logprobs[0] = float("nan")
        return groups

    monkeypatch.setattr(sampler, "sample", broken)
    with pytest.raises(SystemExit, match="inf nats per token"):
        first_sync(sampler, moved_policy(), chat_ids(tokenizer, CHAT))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("finite", [0, 2])
def test_logits_that_are_not_finite_end_the_run_at_any_token(finite, temperature, monkeypatch):
    tokenizer = load_tokenizer(CHAIN)
    sampler = HFSampler(CHAIN, tokenizer, CPU)
    logits, calls = sampler.logits, []

    def broken(*args):
        calls.append(args)
        return logits(*args) * (1.0 if len(calls) <= finite else float("nan"))

    monkeypatch.setattr(sampler, "logits", broken)
    with pytest.raises(SystemExit, match=r"^error: --sampler hf: the model's logits are not finite"):
        sampler.sample([chat_ids(tokenizer, CHAT)], 2, seed=(0,), keys=[0], max_tokens=4, temperature=temperature)
    assert len(calls) == finite + 1


def one_of_two(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, tokenizer = dist.get_rank(), load_tokenizer(CHAIN)
    sampler = HFSampler(CHAIN, tokenizer, CPU)
    if rank == 1:  # takes part in the gathering, takes nothing
        sampler.load = list
    try:
        first_sync(sampler, moved_policy(), chat_ids(tokenizer, CHAT))
        said = "went on"
    except SystemExit as end:
        said = str(end)
    Path(f"{folder}/{rank}").write_text(said)
    dist.destroy_process_group()


def test_where_one_rank_fails_all_end(tmp_path):
    finish(launch(2, tmp_path / "log", one_of_two, str(tmp_path)), tmp_path / "log")
    assert all("nats per token" in (tmp_path / str(rank)).read_text() for rank in range(2))

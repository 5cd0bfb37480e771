"""Before the first step the sampler's log-probabilities are compared with the policy's."""
import pytest
import torch
from conftest import CHAIN, torchrun

from common.chat import chat_ids, load_tokenizer
from common.policy import load_policy
from common.sampler import HFSampler, first_sync

CPU = torch.device("cpu")
CHAT = [{"role": "user", "content": "3 + 4 = ?"}]


@torch.no_grad()
def moved_policy():
    """The embedded model, and not: what is sampled from the file's weights is not from this one."""
    torch.manual_seed(0)
    policy = load_policy(CHAIN, CPU)
    for p in policy.parameters():
        p.to_local().add_(0.02 * torch.randn_like(p.to_local()))
    return policy


def test_a_sampler_that_takes_the_weights_is_let_through(one_process):
    tokenizer = load_tokenizer(CHAIN)
    sampler, policy = HFSampler(CHAIN, tokenizer, CPU), moved_policy()
    first_sync(sampler, policy, chat_ids(tokenizer, CHAT))
    mine = dict(sampler.lm.named_parameters())
    assert all(torch.equal(mine[name], p.full_tensor()) for name, p in policy.lm.named_parameters())


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


ONE_OF_TWO = """
import sys
import torch.distributed as dist
sys.path.insert(0, "tests")
from test_first_sync import *
dist.init_process_group("gloo")
rank, tokenizer = dist.get_rank(), load_tokenizer(CHAIN)
sampler = HFSampler(CHAIN, tokenizer, CPU)
if rank == 1:  # takes part in the gathering, takes nothing
    sampler.load = list
try:
    first_sync(sampler, moved_policy(), chat_ids(tokenizer, CHAT))
    print("went on", file=open(f"{sys.argv[1]}/{rank}", "w"))
except SystemExit as end:
    print(end, file=open(f"{sys.argv[1]}/{rank}", "w"))
dist.destroy_process_group()
"""


def test_where_one_rank_fails_all_end(tmp_path):
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)
    torchrun(2, str(script), str(tmp_path))
    assert all("nats per token" in (tmp_path / str(rank)).read_text() for rank in range(2))

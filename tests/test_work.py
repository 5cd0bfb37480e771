"""common/work.py: the model FLOPs of a step against torch's own counter of matrix products, and the padding."""
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, at_most
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.microbatches import micro_batches
from common.policy import load_policy
from common.settings import Setup
from common.work import WORK, Work, cost_of, peak

CPU = torch.device("cpu")
PROMPT, RESPONSE = list(range(5, 25)), list(range(30, 41))


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(WORK, "phase", "update")
    monkeypatch.setattr(WORK, "flops", {"update": 0.0})
    return WORK.flops


def products(counter: FlopCounterMode) -> tuple[float, float]:
    """FLOPs of matrix products, and of attention over all pairs, whether seen or not."""
    found = counter.get_flop_counts()["Global"]
    attention = sum(flops for op, flops in found.items() if "bmm" in str(op))
    return sum(found.values()) - attention, attention


@pytest.mark.parametrize("rank", [0, 4])
def test_the_flops_are_those_of_the_matrix_products(rank, counted, one_process):
    """Of a teacher's reading and of an update; attention is counted over the pairs that are seen, so half of torch's."""
    policy = load_policy(CHAIN, CPU, Setup(checkpointing=False, lora_rank=rank))
    micro, = micro_batches([PROMPT] * 2, [RESPONSE] * 2, None, at_most(10**6), CPU)
    length = len(PROMPT) + len(RESPONSE)
    assert micro.tokens == micro.padded == 2 * length and micro.pairs == length * (length + 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        seen = [policy.read(micro)]
    layers, attention = products(counter)
    if rank == 0:
        assert micro.tokens * policy.cost.token == layers
    assert micro.pairs * policy.cost.pair == pytest.approx(attention * (length + 1) / (2 * length))
    assert counted["update"] == micro.tokens * policy.cost.token + micro.pairs * policy.cost.pair
    counted["update"] = 0.0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total, _ = policy(micro, lambda stats, _: stats.kl, None, seen)
        total.backward()
    whole, _ = products(counter)
    passes = 1 + policy.cost.backward
    head = (passes + 1) * len(micro.targets) * 2 * 525 * 128  # in threads, which torch's counter does not see
    mine = counted["update"] - head - passes * micro.pairs * policy.cost.pair
    assert mine == pytest.approx(whole, rel=0.15 if rank else 1e-9)  # the adapters themselves do not count


def test_shared_prompts_are_read_once(counted, one_process):
    policy = load_policy(CHAIN, CPU, Setup(checkpointing=False, share_prompts=True))
    micro, = micro_batches([PROMPT] * 4, [RESPONSE] * 4, None, at_most(10**6, True), CPU)
    shorter = len(RESPONSE) - 1  # the last token predicts nothing
    assert micro.tokens == micro.padded == len(PROMPT) + 4 * shorter
    seen = 0
    for p in range(len(PROMPT)):
        seen += p + 1
    for t in range(shorter):
        seen += 4 * (len(PROMPT) + t + 1)
    assert micro.pairs == seen
    policy.read(micro)
    assert counted["update"] == micro.tokens * policy.cost.token + micro.pairs * policy.cost.pair


def test_a_report_is_of_each_phase_and_begins_anew(monkeypatch):
    work = Work()
    cost = cost_of(load_model())
    micro = SimpleNamespace(tokens=30, padded=40, pairs=0, targets=range(10))
    work.read(micro, cost)  # in no phase
    work.phase = "score"
    with torch.no_grad():
        work.read(micro, cost)
    work.phase = "update"
    work.read(micro, cost)
    work.head(micro, cost, 1)
    work.phase = "sync"
    work.head(micro, cost, 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    row = work.report({"score": 2.0, "update": 4.0, "sync": 1.0}, torch.device("cuda"))
    tera = {"score": 30 * cost.token / 2, "update": (3 * 30 * cost.token + 4 * 10 * cost.entry) / 4}
    assert row == pytest.approx({
        "tflops/score": tera["score"] / 1e12, "tflops/update": tera["update"] / 1e12,
        "mfu/update": tera["update"] / 989e12, "padding/share": 0.25,
    })
    assert work.report({}, CPU) == {}


def load_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHAIN)


@pytest.mark.parametrize("name, tera", [("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA L40S", 362),
                                        ("NVIDIA L4", 121), ("a new one", None)])
def test_a_gpu_is_known_by_its_name(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(torch.device("cuda")) == tera and peak(CPU) is None


def test_of_fused_experts_those_that_a_token_goes_through_count():
    class Moe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.zeros(8, 6, 4))
            self.dense = torch.nn.Linear(4, 4)
            self.embed, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
            text = SimpleNamespace(top_k_experts=2, n_head=2, hidden_size=4, num_hidden_layers=3, head_dim=[2, 4],
                                   attribute_map={"num_attention_heads": "n_head"})
            self.config = SimpleNamespace(get_text_config=lambda: text)
            self.get_input_embeddings, self.get_output_embeddings = lambda: self.embed, lambda: self.head

    cost = cost_of(Moe())
    assert cost == (2 * (2 * 24 + 16), 4 * 3 * 2 * 2, 80, 2.0)

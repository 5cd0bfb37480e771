"""The vLLM engine after a sync is the policy, for families that store their weights in different ways,
and a family for which it is not ends the run at start."""
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import CHAIN, at_most
from test_vllm import CPU, engine_logps

from common import rollouts as sampling
from common.chat import chat_ids, load_tokenizer
from common.policy import Policy, full_weights, load_policy, score
from common.rollouts import first_sync
from common.sampler import VLLMSampler
from common.settings import Setup

SIZES = dict(
    vocab_size=525, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
    pad_token_id=0, bos_token_id=None, eos_token_id=2, initializer_range=0.1,
)
EXPERTS = dict(moe_intermediate_size=48, num_experts_per_tok=2)
FAMILIES = {  # of one name each: the family, whether it ties its head, sizes of its own
    "llama, tied": ("llama", True, {}),
    "qwen3, untied": ("qwen3", False, {}),
    "qwen3_moe: experts in one tensor": ("qwen3_moe", False, dict(EXPERTS, num_experts=4)),
    "mixtral: other names too": ("mixtral", True, dict(num_local_experts=4, num_experts_per_tok=2)),
    "glm4_moe: a buffer that is saved": ("glm4_moe", False, dict(
        EXPERTS, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=1)),
}


def checkpoint(folder: Path, family: str, tied: bool, sizes: dict) -> str:
    """A random model of the family with the embedded model's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, tie_word_embeddings=tied, **{**SIZES, **sizes})
    lm = AutoModelForCausalLM.from_config(config)
    move(lm, 0.1)
    lm.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(CHAIN) / name, folder)
    return str(folder)


def saved_buffers(lm: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = set(lm.state_dict())
    return {name: b for name, b in lm.named_buffers() if name in names}


@torch.no_grad()
def move(lm: torch.nn.Module, size: float) -> None:
    for tensor in [*lm.parameters(), *saved_buffers(lm).values()]:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local.add_(size * torch.randn_like(local))


def whole_state(policy: Policy) -> dict[str, torch.Tensor]:
    return {**dict(full_weights(policy)), **saved_buffers(policy.lm)}


def furthest(sampler: VLLMSampler, policy: Policy, chats: list[list[int]]) -> float:
    """The largest difference in log-probability between engine and policy, in nats: of samples as the
    engine reports them, and of the same tokens read as a prompt."""
    groups = sampler.sample(chats, 2, seed=(1,), keys=range(len(chats)), max_tokens=12)
    rollouts = [o for g in groups for o in g]
    prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
    scored = torch.cat(score(policy, prompts, responses, at_most(4096)))
    sampled = torch.tensor([logp for o in rollouts for logp in o.logprobs])
    read = torch.cat(engine_logps(sampler, rollouts))
    return max((scored - sampled).abs().max().item(), (scored - read).abs().max().item())


@pytest.fixture
def world(one_process, tmp_path):
    """Makes engine, policy and some prompts of a checkpoint; ends the engine."""
    engines = []

    def make(path: str):
        tokenizer = load_tokenizer(path)
        engines.append(VLLMSampler(path, tokenizer, CPU, blank=True))
        chats = [[{"role": "user", "content": f"{i} + 4 = ?"}] for i in range(3)]
        return engines[0], load_policy(path, CPU, Setup(checkpointing=False)), [chat_ids(tokenizer, c) for c in chats]

    yield make
    for engine in engines:  # it ends the process group, which the other fixture ends too
        engine.close()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_engine_is_the_policy_after_an_update(name, world, tmp_path, monkeypatch):
    sampler, policy, chats = world(checkpoint(tmp_path, *FAMILIES[name]))
    if name == "qwen3, untied":
        a_weight_that_does_not_reach_the_engine_ends_the_run_at_start(sampler, policy, chats)
    monkeypatch.setattr(sampling, "full_weights", lambda policy: whole_state(policy).items())
    first_sync(sampler, policy, chats[0])
    torch.manual_seed(1)
    move(policy.lm, 0.05)
    assert furthest(sampler, policy, chats) > 0.5, "the update must be worth a sync"
    sampler.load(whole_state(policy).items())
    assert furthest(sampler, policy, chats) < 1e-4
    with pytest.raises(SystemExit, match=r"vLLM cannot take the weights of .*; take --sampler hf"):
        sampler.load([("model.layers.0.self_attn.other.weight", torch.zeros(4, 4))])


def test_a_tied_head_that_the_file_repeats_stays_tied(world, tmp_path):
    """Many files hold the embedding twice. vLLM unties them at first, as the file has a head."""
    path = checkpoint(tmp_path, *FAMILIES["llama, tied"])
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sampler, policy, chats = world(path)
    move(policy.lm, 0.05)
    first_sync(sampler, policy, chats[0])
    assert furthest(sampler, policy, chats) < 1e-4


def a_weight_that_does_not_reach_the_engine_ends_the_run_at_start(sampler, policy, chats) -> None:
    """Even if it is the file's: after the next update it would not be."""
    sent = [(name, w) for name, w in full_weights(policy) if "1.mlp.down_proj" not in name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "full_weights", lambda policy: sent)
        with pytest.raises(SystemExit, match=r"a Qwen3ForCausalLM, its log-prob.* take --sampler hf"):
            first_sync(sampler, policy, chats[0])


def test_a_family_whose_engine_computes_something_else_ends_the_run_at_start(world, tmp_path):
    """vLLM 0.32 on a CPU is 0.3 nats off for DeepSeek-V3; 0.01 is what rounding may cause there."""
    sizes = dict(
        EXPERTS, topk_method="noaux_tc", scoring_func="sigmoid", q_lora_rank=None, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64, head_dim=64, n_group=2, topk_group=1,
        n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, num_key_value_heads=4)
    sampler, policy, chats = world(checkpoint(tmp_path, "deepseek_v3", False, sizes))
    with pytest.raises(SystemExit, match=r"a DeepseekV3ForCausalLM, its log-prob.* by 0\.\d+ nats.*take --sampler hf"):
        first_sync(sampler, policy, chats[0])


def test_a_family_that_vllm_does_not_have_is_refused(tmp_path, one_process):
    sizes = dict(attention_types=[[["global"], 2]], num_layers=2, num_heads=4)
    path = checkpoint(tmp_path, "gpt_neo", True, sizes)
    with pytest.raises(SystemExit, match=r"GPTNeoForCausalLM.* not supported.*; take --sampler hf"):
        VLLMSampler(path, load_tokenizer(path), CPU)

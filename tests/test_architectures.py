"""Which architectures train right: each of a table is accepted and right, or refused in words.

`python tests/test_architectures.py` prints docs/models.md from the table below.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN, ROOT, at_most
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)
from transformers.integrations import sdpa_attention

import grpo
from common import architecture
from common.architecture import check_architecture, empty_lm, saved_buffers
from common.chat import load_tokenizer
from common.microbatches import micro_batches
from common.policy import (
    Policy,
    frozen_copy,
    full_weights,
    load_policy,
    make_optimizer,
    optimizer_step,
    save_model,
    score,
    trained_parameters,
    whole,
)
from common.sampler import HFSampler
from common.settings import Setup, parse

CPU = torch.device("cpu")
WINDOW = 6  # tokens; all prompts are longer

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
PLAIN = dict(SMALL, intermediate_size=48, num_key_value_heads=2)
HEADS = dict(PLAIN, head_dim=8)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MIXED = ["sliding_attention", "full_attention"]
WINDOWS = dict(sliding_window=WINDOW, layer_types=MIXED)
GEMMA = dict(HEADS, query_pre_attn_scalar=8, **WINDOWS)
GEMMA4 = dict(HEADS, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, **WINDOWS)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
              linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"])
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8,
             mamba_chunk_size=8)
DEEPSEEK = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                v_head_dim=8, n_group=2, topk_group=1, n_routed_experts=4, first_k_dense_replace=1)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=16, patch_size=8)
GPT = dict(vocab_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)

LOGITS = "transforms its logits"
DECODER = "not a decoder"


@dataclass
class Family:
    """A model type, its tiny configuration, and what is expected of it."""

    type: str
    config: dict
    note: str = ""  # what the configuration is an example of
    refused: str = ""  # part of the message, if it is not accepted
    shares: bool = True  # whether it accepts --share_prompts
    samples: bool = True  # whether it accepts --sampler hf
    experts: bool = False  # whether it has experts, which LoRA leaves as they are
    auto: type = AutoModelForCausalLM  # what makes such a checkpoint


FAMILIES = [
    Family("llama", PLAIN),
    Family("mistral", dict(HEADS, sliding_window=WINDOW), "windows"),
    Family("ministral", dict(HEADS, **WINDOWS), "windows"),
    Family("mixtral", dict(HEADS, num_local_experts=4, sliding_window=WINDOW), "windows",
           experts=True),
    Family("qwen2", PLAIN),
    Family("qwen2", dict(PLAIN, use_sliding_window=True, sliding_window=WINDOW,
                         max_window_layers=1), "windows"),
    Family("qwen2_moe", dict(PLAIN, num_experts=4, shared_expert_intermediate_size=16, **EXPERTS),
           experts=True),
    Family("qwen3", HEADS),
    Family("qwen3_moe", dict(HEADS, num_experts=4, **EXPERTS), experts=True),
    Family("qwen3_next", dict(HEADS, num_experts=4, shared_expert_intermediate_size=16, **EXPERTS,
                              **LINEAR), "linear attention", shares=False, experts=True),
    Family("qwen3_5_text", dict(HEADS, **LINEAR), "linear attention", shares=False),
    Family("qwen3_5", dict(text_config=dict(HEADS, model_type="qwen3_5_text", **LINEAR),
                           vision_config=dict(VISION, depth=1, num_heads=2, out_hidden_size=32,
                                              num_position_embeddings=16),
                           image_token_id=60, video_token_id=61, vision_start_token_id=62,
                           vision_end_token_id=63, tie_word_embeddings=False),
           "linear attention; the checkpoint has a vision tower, which is left out", shares=False,
           auto=AutoModelForImageTextToText),
    Family("gemma", HEADS),
    Family("gemma2", dict(GEMMA, final_logit_softcapping=None), "windows, caps off"),
    Family("gemma2", GEMMA, "soft cap", refused=LOGITS),
    Family("gemma3_text", GEMMA, "windows"),
    Family("gemma3", dict(text_config=dict(GEMMA, model_type="gemma3_text"), vision_config=VISION,
                          mm_tokens_per_image=4, boi_token_index=60, eoi_token_index=61,
                          image_token_index=62), "windows; with a vision tower"),
    Family("gemma4_text", GEMMA4, "windows"),
    Family("olmo", PLAIN),
    Family("olmo2", PLAIN),
    Family("olmo3", dict(PLAIN, **WINDOWS), "windows"),
    Family("phi3", dict(PLAIN, sliding_window=WINDOW), "windows"),
    Family("phi", PLAIN, "head with a bias", refused=LOGITS),
    Family("granite", dict(PLAIN, logits_scaling=8.0), "scaled logits", refused=LOGITS),
    Family("granite", PLAIN, "logits_scaling 1"),
    Family("smollm3", dict(PLAIN, no_rope_layer_interval=2)),
    Family("glm4", HEADS),
    Family("glm4_moe", dict(HEADS, n_routed_experts=4, first_k_dense_replace=1, **EXPERTS),
           experts=True),
    Family("deepseek_v3", dict(PLAIN, num_key_value_heads=4, **DEEPSEEK) | EXPERTS, experts=True),
    Family("gpt_oss", dict(HEADS, num_local_experts=4, num_experts_per_tok=2, **WINDOWS), "windows",
           experts=True),
    Family("cohere", PLAIN, "scaled logits", refused=LOGITS),
    Family("cohere", dict(PLAIN, logit_scale=1.0), "logit_scale 1"),
    Family("cohere2", dict(PLAIN, **WINDOWS), "scaled logits", refused=LOGITS),
    Family("exaone4", dict(PLAIN, **WINDOWS), "windows"),
    Family("minimax_m2", dict(HEADS, num_local_experts=4, num_experts_per_tok=2), experts=True),
    Family("seed_oss", HEADS),
    Family("nemotron", PLAIN),
    Family("stablelm", PLAIN),
    Family("starcoder2", dict(PLAIN, sliding_window=WINDOW), "windows"),
    Family("hunyuan_v1_dense", HEADS),
    Family("ernie4_5", HEADS),
    Family("arcee", PLAIN),
    Family("apertus", PLAIN),
    Family("mamba2", dict(SMALL, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8),
           "recurrent", shares=False),
    Family("bamba", dict(PLAIN, attn_layer_indices=[1], **MAMBA), "recurrent", shares=False),
    Family("falcon_h1", dict(PLAIN, mamba_d_ssm=64, **MAMBA), "recurrent", shares=False),
    Family("granitemoehybrid", dict(PLAIN, layer_types=["mamba", "attention"], num_local_experts=4,
                                    shared_intermediate_size=16, **MAMBA), "recurrent",
           shares=False, experts=True),
    Family("lfm2", dict(PLAIN, layer_types=["conv", "full_attention"], block_multiple_of=8),
           "short convolutions", shares=False),
    Family("olmo_hybrid", dict(PLAIN, **LINEAR), "linear attention", shares=False),
    Family("gpt2", dict(GPT, n_embd=32, n_positions=128), "Conv1D"),
    Family("gpt_neox", PLAIN),
    Family("opt", dict(SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    Family("bloom", dict(GPT, hidden_size=32), "no limit of the context"),
    Family("llama4_text", dict(HEADS, num_local_experts=2, intermediate_size_mlp=32,
                               attention_chunk_size=WINDOW, no_rope_layer_interval=2),
           "chunked attention", refused=DECODER),
    Family("bert", PLAIN, "an encoder", refused=DECODER),
    Family("rwkv", dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=128),
           "recurrent, no cache", shares=False, samples=False),
    Family("t5", dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4),
           "encoder and decoder", refused="cannot load it as a causal language model"),
]


def identity(family: Family) -> str:
    return f"{family.type} {family.note}".strip().replace(" ", "-")


def random_model(family: Family, folder: Path) -> str:
    """A checkpoint with random weights, and with random buffers that are not what they were."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.type, **family.config)
    if config.is_encoder_decoder:
        config.save_pretrained(folder)
        return str(folder)
    lm = family.auto.from_config(config)
    for p in lm.parameters():
        p.data += 0.15 * torch.randn_like(p)  # norms, biases and gates as well
    for buffer in saved_buffers(lm).values():
        buffer += torch.rand_like(buffer)
    lm.save_pretrained(folder)
    return str(folder)


def rows(seed: int) -> list[list[int]]:
    """Three prompts of different length, beyond the window."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in (WINDOW + 1, 12, 9)]


def by_itself(lm, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The log-probabilities of one response: no cache, no padding, no batch."""
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    logp = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0].float()


@dataclass
class Case:
    """Some rollouts of a model."""

    prompts: list = field(default_factory=list)
    responses: list = field(default_factory=list)

    def scores(self, policy) -> torch.Tensor:
        return torch.cat(score(policy, self.prompts, self.responses, at_most(10**6)))

    def references(self, lm) -> torch.Tensor:
        pairs = zip(self.prompts, self.responses)
        return torch.cat([by_itself(lm, p, r) for p, r in pairs])

    def update(self, policy, share: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Log-probabilities and gradients of one batch, with prompts shared or not."""
        policy.zero_grad()
        found = [None] * len(self.prompts)
        for m in micro_batches(self.prompts, self.responses, None, at_most(10**6, share), CPU):
            total, stats = policy(m, lambda stats, _: -stats.logp)
            total.backward()
            for row, logp in zip(m.rows, stats.logp.split(m.lengths)):
                found[row] = logp
        grads = [whole(p.grad) for p in trained_parameters(policy) if p.grad is not None]
        return torch.cat(found), grads


def sampled(sampler, seed: int, gap_to) -> Case:
    """Rollouts whose log-probabilities are the policy's."""
    prompts = rows(seed)
    groups = sampler.sample(prompts, 2, seed=(seed,), keys=range(3), max_tokens=10)
    rollouts = [o for group in groups for o in group]
    case = Case([o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts])
    found = torch.tensor([x for o in rollouts for x in o.logprobs])
    torch.testing.assert_close(found, case.scores(gap_to), atol=1e-4, rtol=0)
    return case


def step(policy, case: Case) -> None:
    """One update that moves the log-probabilities."""
    optimizer = make_optimizer(policy, SimpleNamespace(lr=3e-3, weight_decay=0.0))
    before, _ = case.update(policy)
    metrics = optimizer_step(policy, optimizer, 3e-3, 1.0)
    assert metrics["grad_norm"][0] > 0
    assert (case.scores(policy) - before).abs().max() > 1e-3


def leaves_whole(policy, sampler, case: Case, folder: Path) -> None:
    """The sampler after a sync, and the checkpoint opened again, are the policy."""
    expected = case.scores(policy)
    sampler.load(full_weights(policy))
    torch.testing.assert_close(case.references(sampler.lm), expected, atol=1e-4, rtol=0)
    sampled(sampler, 2, policy)
    save_model(policy, folder, CPU)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(case.references(again), expected, atol=1e-5, rtol=0)
    buffers = saved_buffers(policy.lm)
    for name, buffer in saved_buffers(again).items():
        assert torch.equal(buffer, buffers[name])


@pytest.mark.parametrize("family", FAMILIES, ids=identity)
def test_an_architecture_trains_right_or_is_refused(family, tmp_path, one_process):
    path = random_model(family, tmp_path / "model")
    if family.refused:
        with pytest.raises(SystemExit, match=family.refused):
            check_architecture(empty_lm(path), path)
        with pytest.raises(SystemExit, match=family.refused):
            load_policy(path, CPU, Setup(checkpointing=False))
        return
    check_architecture(empty_lm(path), path, share_prompts=family.shares)
    if not family.shares:
        with pytest.raises(SystemExit, match="--share_prompts"):
            check_architecture(empty_lm(path), path, share_prompts=True)
    if not family.samples:
        with pytest.raises(SystemExit, match="--sampler hf"):
            check_architecture(empty_lm(path), path, sampler="hf")
        return
    policy = load_policy(path, CPU, Setup(checkpointing=False, share_prompts=family.shares))
    sampler = HFSampler(path, load_tokenizer(CHAIN), CPU, blank=True)
    sampler.load(full_weights(policy))
    sampler.ends = [*range(30, 40)]  # some rows end early and leave the batch
    case = sampled(sampler, 1, policy)
    assert torch.equal(case.scores(frozen_copy(policy, CPU)), case.scores(policy))
    alone = case.references(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    torch.testing.assert_close(alone, case.scores(policy), atol=1e-4, rtol=0)
    if family.shares:
        shared_prompts_change_nothing(policy, case)
    step(policy, case)
    leaves_whole(policy, sampler, case, tmp_path / "saved")

    lora = load_policy(path, CPU, Setup(checkpointing=False, lora_rank=2, lora_alpha=3))
    torch.manual_seed(1)
    for p in trained_parameters(lora):
        p.data += 0.1 * torch.randn_like(p)
    step(lora, case)
    leaves_whole(lora, sampler, case, tmp_path / "adapted")


def shared_prompts_change_nothing(policy, case: Case) -> None:
    plain, gradients = case.update(policy)
    shared, same = case.update(policy, share=True)
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=0)
    scale = max(g.abs().max() for g in gradients)
    for one, two in zip(gradients, same, strict=True):
        torch.testing.assert_close(two, one, atol=1e-4 * scale, rtol=1e-3)


# ------------------------------------------------------------------------------------------------
# checkpoints that cannot be trained as they are
# ------------------------------------------------------------------------------------------------
def family(name: str) -> Family:
    return next(f for f in FAMILIES if f.type == name)


def edit(path: str, file: str, **changes) -> None:
    """Change a JSON file of a checkpoint."""
    place = Path(path) / file
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))


def test_a_generation_config_that_cannot_be_saved_is_mended_at_start(tmp_path, one_process):
    path = random_model(family("llama"), tmp_path / "model")
    edit(path, "generation_config.json", temperature=0.6, top_p=0.95)
    with pytest.raises(ValueError):
        GenerationConfig.from_pretrained(path).save_pretrained(tmp_path / "other")
    save_model(load_policy(path, CPU, Setup(checkpointing=False)), tmp_path / "saved", CPU)
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.temperature, saved.top_p, saved.do_sample) == (0.6, 0.95, True)


def test_a_checkpoint_that_could_not_be_saved_again_ends_at_start(tmp_path, one_process):
    path = random_model(family("llama"), tmp_path / "model")
    edit(path, "generation_config.json", num_beams=1, early_stopping=True)
    with pytest.raises(SystemExit, match="could not be saved again"):
        load_policy(path, CPU, Setup(checkpointing=False))


def test_weights_that_are_not_in_the_checkpoint_are_not_made_up(tmp_path, one_process):
    path = random_model(family("llama"), tmp_path / "model")
    file = Path(path) / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"1 weights are not in the checkpoint \(lm_head.weight"):
        load_policy(path, CPU, Setup(checkpointing=False))


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path, one_process):
    path = random_model(family("llama"), tmp_path / "model")
    edit(path, "config.json", tie_word_embeddings=True)
    with pytest.raises(SystemExit, match="two different matrices"):
        load_policy(path, CPU, Setup(checkpointing=False))


def test_quantized_weights_are_refused(tmp_path, one_process):
    path = random_model(family("llama"), tmp_path / "model")
    edit(path, "config.json", quantization_config={"quant_method": "fp8"})
    for load in (empty_lm, lambda path: load_policy(path, CPU, Setup(checkpointing=False))):
        with pytest.raises(SystemExit, match="quantized"):
            load(path)


def test_attention_to_later_tokens_is_refused(tmp_path, one_process):
    path = random_model(family("gemma3_text"), tmp_path / "model")
    edit(path, "config.json", use_bidirectional_attention=True)
    for load in (lambda path: check_architecture(empty_lm(path), path),
                 lambda path: load_policy(path, CPU, Setup(checkpointing=False))):
        with pytest.raises(SystemExit, match=DECODER):
            load(path)


TRANSFORMED = [f for f in FAMILIES if f.refused == LOGITS]


@pytest.mark.parametrize("family", TRANSFORMED, ids=identity)
def test_a_transformation_of_tiny_logits_shows_without_the_config(family, tmp_path, monkeypatch):
    path = random_model(family, tmp_path / "model")
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    lm.get_input_embeddings().weight.data *= 1e-3  # tied or not, the logits are tiny
    lm.get_output_embeddings().weight.data *= 1e-3
    monkeypatch.setattr(architecture, "TRANSFORMATIONS", {})
    with pytest.raises(SystemExit, match=LOGITS):
        architecture.check_forward(lm, path)


def test_a_token_that_sees_later_ones_shows_without_the_config(tmp_path):
    path = random_model(family("gemma3_text"), tmp_path / "model")
    edit(path, "config.json", use_bidirectional_attention=True)
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with pytest.raises(SystemExit, match="sees later ones"):
        architecture.check_forward(lm, path)


def test_adapters_that_nothing_merges_do_not_pass(tmp_path, one_process):
    from peft import LoraConfig, inject_adapter_in_model

    path = random_model(family("qwen3_moe"), tmp_path / "model")
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), lm)  # wraps the experts
    policy = Policy(lm)
    policy.reshard = lambda: None
    with pytest.raises(ValueError, match=r"not merged: .*experts"):
        dict(full_weights(policy))


def test_query_heads_share_keys_without_copies(monkeypatch):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32)
    ids = torch.randint(1, 500, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :4] = 0

    def logits_and_gradient():
        logits = lm(input_ids=ids, attention_mask=mask).logits[:, -4:]
        weight = lm.model.layers[0].self_attn.k_proj.weight
        (grad,) = torch.autograd.grad(logits.square().mean(), weight)
        return logits.detach(), grad

    never = lambda *_: pytest.fail("keys were copied for the query heads that share them")
    with monkeypatch.context() as patch:
        patch.setattr(sdpa_attention, "repeat_kv", never)
        found = logits_and_gradient()
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False)
    copied = logits_and_gradient()
    torch.testing.assert_close(found, copied, rtol=1e-5, atol=1e-6)
    assert all(x.abs().max() > 0 for x in found)


def test_checkpointing_drops_nothing_out(tmp_path, one_process):
    """The layers of OPT drop out by themselves, by their own training flag."""
    dropping = Family("opt", dict(family("opt").config, dropout=0.5))
    path = random_model(dropping, tmp_path / "model")
    case = Case([[3, 4, 5], [6, 7]], [[8, 9], [10, 11, 12]])
    found = []
    for checkpointing in (False, True):
        policy = load_policy(path, CPU, Setup(checkpointing=checkpointing))
        found.append([case.update(policy) for _ in range(2)])
    layers = [m for m in policy.modules() if getattr(m, "gradient_checkpointing", False)]
    assert any(layer.training for layer in layers)
    for logp, gradients in [*found[0], *found[1]]:
        torch.testing.assert_close(logp, found[0][0][0], atol=1e-6, rtol=0)
        for one, two in zip(gradients, found[0][0][1], strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_the_config_of_a_checkpoint_names_the_precision_of_its_weights(tmp_path, one_process):
    path = random_model(family("glm4_moe"), tmp_path / "model")
    policy = load_policy(path, CPU, Setup(checkpointing=False))
    save_model(policy, tmp_path / "saved", torch.device("cuda"))  # the weights stay on the CPU
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert AutoConfig.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
    kinds = {name: tensor.dtype for name, tensor in saved.items()}
    buffers = [name for name in kinds if "e_score_correction_bias" in name]
    assert buffers and all(kinds.pop(name) == torch.float32 for name in buffers)
    assert set(kinds.values()) == {torch.bfloat16}


def test_a_dry_run_refuses_what_a_run_would(tmp_path):
    """With the embedded model's tokenizer: a head that scales its logits, and shared prompts."""
    tokenizer = load_tokenizer(CHAIN)
    refusals = (("cohere", [], LOGITS), ("lfm2", [], "--share_prompts: .*add --no-share_prompts"))
    for name, flags, words in refusals:
        chosen = family(name)
        sizes = dict(chosen.config, vocab_size=len(tokenizer), bos_token_id=None, pad_token_id=None,
                     eos_token_id=tokenizer.eos_token_id, max_position_embeddings=1024)
        path = random_model(Family(name, sizes), tmp_path / name)
        tokenizer.save_pretrained(path)
        given = ["--demo", "--model", path, "--out", str(tmp_path / "out"), "--dry_run", *flags]
        try:
            with pytest.raises(SystemExit, match=words):
                grpo.main(parse(grpo.Args, grpo.presets, given))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# docs/models.md
# ------------------------------------------------------------------------------------------------
ON_VLLM = {"llama", "qwen3", "qwen3_moe", "mixtral", "glm4_moe"}  # of tests/vllm/test_families.py

PAGE = """# Which models can be trained

`--model` takes any causal language model of transformers. Either the model trains correctly, or the run
ends at start with one line that says why. `--dry_run` says so too if the configuration alone shows it,
because a dry run reads no weights.

    python tests/test_architectures.py > docs/models.md

makes the tables below, and the test behind that command holds every cell. For a tiny random model of
each family, with random buffers, it takes prompts and responses of different lengths, longer than the
windows. It compares the policy's log-probabilities with

- the sampler's (within 1e-4),
- those of shared prompts, gradients too,
- the sampler's after an update and a sync (also with LoRA),
- those of the saved checkpoint, opened again (within 1e-5, also with LoRA).

All of this runs on a CPU in fp32, so the kernels that recurrent models have on CUDA are not tested.
Small models do not prove that a large checkpoint learns. They prove that no number is lost on the way.

## Accepted

- **`--sampler hf`** works with each family below that has a yes.
- **`--sampler vllm`**: "yes" means that `tests/vllm/test_families.py` compares the engine with the
  policy on a CPU. With any other family the run compares the two at start, and ends if they differ.
- **`--share_prompts`** works if all layers are full or sliding attention. Recurrent layers, linear
  attention and convolutions cannot go on from a prompt that was read before.
- **LoRA** adapts all linear layers but the head, GPT-2's `Conv1D` too. Experts and routers of a
  mixture are not linear layers in transformers; they stay frozen.
- Checkpoints hold the model that was trained, with its buffers: the routers' biases of DeepSeek-V3,
  GLM-4 MoE and MiniMax-M2, the layer scales of Gemma 4.

| `model_type` | | `--sampler hf` | `--sampler vllm` | `--share_prompts` | `--lora_rank` |
|---|---|---|---|---|---|
{accepted}

## Refused

| `model_type` | | what the run says |
|---|---|---|
{refused}

Refused as well, whatever the family: quantized weights, a checkpoint without some of its weights,
a configuration that ties the head to an embedding from which it differs, attention to later tokens,
and a configuration that transformers will not save. A `generation_config.json` with a temperature but
without `do_sample` is corrected.
"""


def page() -> str:
    accepted, refused = [], []
    for family in FAMILIES:
        start = f"| `{family.type}` | {family.note} |"
        if family.refused:
            refused.append(f"{start} … {family.refused} … |")
            continue
        hf = "yes" if family.samples else "no"
        vllm = "yes" if family.type in ON_VLLM else "not tested"
        shares = "yes" if family.shares else "no"
        lora = "yes"
        if family.experts:
            lora = "all but the experts"
        if not family.samples:
            lora = "not tested"
        accepted.append(f"{start} {hf} | {vllm} | {shares} | {lora} |")
    return PAGE.format(accepted="\n".join(accepted), refused="\n".join(refused))


def test_the_page_of_models_is_made_from_the_table():
    assert (ROOT / "docs" / "models.md").read_text() == page()


if __name__ == "__main__":
    print(page(), end="")

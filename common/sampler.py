"""Rollouts: token ids in, token ids and log-probabilities out.

Two engines with one interface: `HFSampler` decodes with the model's own Hugging Face code, `VLLMSampler` with a vLLM
engine inside this process. Either holds its own copy of the weights, which `load` replaces after each update; `rest`
says that nothing will be sampled before the next `load`. Each rollout has its own stream of random numbers, a pure
function of the seed, the question's place in the run and the sample's number: what is sampled does not depend on how
the work was batched or split over ranks, and a resumed run needs no generator state.
"""
from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from common import require
from common.architecture import context_length, sampling_cache, saved_buffers
from common.chat import end_tokens, response_text
from common.policy import Policy, full_weights, score
from kernels.draw import draw


@dataclass
class Rollout:
    """One response. The ids go to the loss as they are; text is for verifiers and people."""

    prompt_ids: list[int]
    response_ids: list[int]  # end token included, unless truncated
    logprobs: list[float]  # log-probabilities in the distribution that was sampled from, one a response token
    finish_reason: str  # "stop" | "length"
    text: str

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


def make_sampler(args, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> HFSampler | VLLMSampler:
    """The engine that --sampler names."""
    if args.sampler == "hf":
        return HFSampler(args.model, tokenizer, device, rows=args.sampler_rows)
    return VLLMSampler(args.model, tokenizer, device, rows=args.sampler_rows, tensor_parallel=args.tensor_parallel,
                       memory=args.vllm_memory, blank=True)


def check_lengths(prompts: Sequence[list[int]], max_tokens: int, context: int) -> None:
    longest = max(map(len, prompts), default=0)
    require(longest + max_tokens <= context, f"a prompt of {longest} tokens and --max_tokens {max_tokens} exceed the "
            f"model's context of {context}; lower --max_tokens or shorten the prompts")


class HFSampler:
    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, rows: int = 128):
        """rows: how many rollouts decode at a time (those of one prompt always do); their KV cache must fit."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        sampling_cache(lm)  # a model that this sampler cannot read ends here
        self.lm = lm.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device, self.rows = tokenizer, device, rows
        self.ends = end_tokens(path, tokenizer)
        self.context = context_length(self.lm)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights and buffers, given as (Hugging Face name, tensor)."""
        mine = dict(self.lm.named_parameters()) | saved_buffers(self.lm)
        for name, tensor in weights:
            mine.pop(name).copy_(tensor)
        if mine:
            raise ValueError(f"no new weights for {sorted(mine)}")

    def rest(self) -> None:
        """The weights stay where they are."""

    def close(self) -> None:
        """Nothing to end."""

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], n: int, *, seed: tuple[int, ...], keys: Sequence[int],
               max_tokens: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> list[list[Rollout]]:
        """n rollouts for every prompt. keys: a number for each prompt that names its random stream under `seed`.

        temperature 0 is greedy. Raises SystemExit where a prompt leaves no room for `max_tokens` in the context.
        """
        check_lengths(prompts, max_tokens, self.context)
        groups: list[list[Rollout]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: less padding
        size = max(1, self.rows // n)  # prompts at a time
        for start in range(0, len(order), size):
            part = order[start : start + size]
            streams = [np.random.default_rng([*seed, keys[i], j]).random(max_tokens) for i in part for j in range(n)]
            uniforms = torch.from_numpy(np.stack(streams))
            ids, logps = self.decode([prompts[i] for i in part], n, uniforms, temperature, top_p, top_k)
            for row in range(len(ids)):
                i = part[row // n]
                finish = "stop" if ids[row][-1] in self.ends else "length"
                text = response_text(self.tokenizer, prompts[i], ids[row])
                groups[i].append(Rollout(prompts[i], ids[row], logps[row], finish, text))
        return groups

    def decode(self, prompts: list[list[int]], n: int, uniforms: Tensor, temperature: float, top_p: float,
               top_k: int) -> tuple[list[list[int]], list[list[float]]]:
        """Decode n rows a prompt with `uniforms` [rows, max_tokens]. A prompt is read once; finished rows leave."""
        device, steps = self.device, uniforms.shape[1]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        uniforms = uniforms.to(device)
        past = sampling_cache(self.lm)
        (cache,) = past.values()
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        out = self.lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                      logits_to_keep=1, **past)
        select_rows(cache, torch.arange(len(prompts), device=device).repeat_interleave(n))
        logits, mask, positions = (x.repeat_interleave(n, 0) for x in (out.logits[:, -1], mask, positions[:, -1:]))
        ends = torch.tensor(self.ends, device=device)
        tokens = torch.zeros(len(uniforms), steps, dtype=torch.long, device=device)
        logps = torch.zeros(len(uniforms), steps, device=device)
        lengths = torch.full((len(uniforms),), steps, device=device)
        rows = torch.arange(len(uniforms), device=device)  # which rollout each row of the batch is
        done = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(steps):
            token, logp = draw(logits.float(), uniforms[rows, t], temperature, top_p, top_k)
            tokens[rows, t], logps[rows, t] = token, logp
            ended = torch.isin(token, ends) & ~done
            lengths[rows[ended]] = t + 1
            done |= ended
            alive = len(done) - int(done.sum())
            if t + 1 == steps or alive == 0:
                break
            if alive <= 0.75 * len(done):  # finished rows leave, but not one by one: each move copies the cache
                keep = (~done).nonzero()[:, 0]
                select_rows(cache, keep)
                rows, done, token, mask, positions = rows[keep], done[keep], token[keep], mask[keep], positions[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            positions = positions + 1
            logits = self.lm(input_ids=token[:, None], attention_mask=mask, position_ids=positions,
                             use_cache=True, logits_to_keep=1, **past).logits[:, -1]
        cut = lambda x: [row[:k] for row, k in zip(x.tolist(), lengths.tolist())]
        return cut(tokens), cut(logps)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Row i of the cache becomes what row rows[i] was. Recurrent states have no other method for it."""
    for layer in cache.layers:
        layer.reorder_cache(rows)


class GrowingLayer(DynamicLayer):
    """The KV cache of a layer in a buffer with room to grow: a new token costs its own size, not a copy of the past."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.room = keys, values, (keys, values)
            return keys, values
        past, total = self.keys.shape[-2], self.keys.shape[-2] + keys.shape[-2]
        if self.room[0].shape[-2] < total or self.room[0].shape[0] != self.keys.shape[0]:
            shape = (*self.keys.shape[:2], total + max(32, total // 2), self.keys.shape[-1])
            self.room = keys.new_empty(shape), values.new_empty(*shape[:-1], values.shape[-1])
            self.room[0][:, :, :past], self.room[1][:, :, :past] = self.keys, self.values
        self.room[0][:, :, past:total], self.room[1][:, :, past:total] = keys, values
        self.keys, self.values = self.room[0][:, :, :total], self.room[1][:, :, :total]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.room = self.keys, self.values


class VLLMSampler:
    """A vLLM engine in this process, one for each rank (or for each group of `tensor_parallel` ranks)."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, rows: int = 128,
                 tensor_parallel: int = 1, memory: float = 0.4, dtype: str = "",
                 blank: bool = False):
        """rows: sequences that decode at a time; memory: share of the GPU's memory for weights and
        KV cache; dtype: bfloat16 on CUDA and float32 on a CPU unless given; blank: start without the
        file's weights, so that a weight which `load` does not bring is missed at once."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's model stays in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ImportError:
            raise SystemExit("error: --sampler vllm: vLLM is not installed; pip install -r requirements-vllm.txt "
                             "(CUDA) or requirements-vllm-cpu.txt, or take --sampler hf") from None
        self.path, self.tokenizer, self.cuda, self.asleep = path, tokenizer, device.type == "cuda", False
        self.sharing = dist.new_subgroups(tensor_parallel)[0] if tensor_parallel > 1 else None  # ranks of one engine
        config = AutoConfig.from_pretrained(path)
        launcher = "external_launcher" if "WORLD_SIZE" in os.environ else None
        try:
            self.llm = LLM(
                model=path, dtype=dtype or ("bfloat16" if self.cuda else "float32"),
                load_format="dummy" if blank else "auto",
                tensor_parallel_size=tensor_parallel, distributed_executor_backend=launcher,
                seed=int(os.environ.get("RANK", 0)) // tensor_parallel,
                logprobs_mode="processed_logprobs", max_num_seqs=rows,
                gpu_memory_utilization=memory, enable_sleep_mode=self.cuda,
                enforce_eager=not self.cuda,
                max_model_len=-1)  # as much of the model's context as the KV cache has room for
        except (NotImplementedError, ValueError) as error:
            raise SystemExit(self.refusal("start with", path, error)) from None
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        renamed = get_model_conversion_mapping(lm, add_legacy=False)
        self.names = lm if renamed else None  # knows the names that a checkpoint's weights have
        self.context = self.llm.model_config.max_model_len
        self.ends = end_tokens(path, tokenizer)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights and buffers in place, one tensor at a time. Every rank calls, and none
        holds the whole model twice. Raises SystemExit if vLLM has no place for one."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        if not self.cuda:
            self.llm.apply_model(self.forget_packed_experts)
        try:
            self.llm.collective_rpc("reload_weights",
                                    kwargs={"weights_iterator": self.as_in_a_file(weights)})
        except (AssertionError, AttributeError, KeyError, ValueError) as error:
            raise SystemExit(self.refusal("take the weights of", self.path, error)) from None
        if not self.cuda:
            self.llm.apply_model(self.pack_heads)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False
        self.llm.reset_prefix_cache()

    def as_in_a_file(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights as checkpoints hold them, which is how vLLM reads them: transformers keeps
        all experts of a layer in one tensor, and some weights under other names."""
        for name, tensor in weights:
            if self.names is None:
                yield name, tensor
            else:
                yield from revert_weight_conversion(self.names, {name: tensor}).items()

    # vLLM 0.32 on a CPU computes with packed copies of some weights. A reload packs the experts only
    # for a new kernel, and a tied head not at all.
    @staticmethod
    def forget_packed_experts(lm: torch.nn.Module) -> None:
        for module in lm.modules():
            method = getattr(module, "quant_method", None)
            if hasattr(method, "moe_kernel"):
                method.moe_kernel = None

    @staticmethod
    def pack_heads(lm: torch.nn.Module) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        for module in lm.modules():
            if isinstance(module, VocabParallelEmbedding):  # a tied embedding is a head too
                module.quant_method.process_weights_after_loading(module)

    @staticmethod
    def refusal(act: str, path: str, error: Exception) -> str:
        reason = " ".join(str(error).split("Value error, ")[-1].split())[:240]
        return f"error: --sampler vllm: vLLM cannot {act} {path} ({reason}); take --sampler hf"

    def rest(self) -> None:
        """Give the GPU's memory to the update. Weights are dropped, for `load` brings new ones."""
        if self.cuda and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """End the engine and, with it, torch's process group."""
        self.llm.llm_engine.engine_core.shutdown()

    def sample(self, prompts: Sequence[list[int]], n: int, *, seed: tuple[int, ...], keys: Sequence[int],
               max_tokens: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> list[list[Rollout]]:
        """As HFSampler.sample: the same distribution and log-probabilities, other random numbers."""
        from vllm import SamplingParams

        check_lengths(prompts, max_tokens, self.context)
        asked, place = [(list(prompts), list(keys))], 0
        if self.sharing:  # the ranks of an engine must ask it for the same, and each takes its own part
            asked, place = asked * dist.get_world_size(self.sharing), dist.get_rank(self.sharing)
            dist.all_gather_object(asked, asked[0], group=self.sharing)
        params = [SamplingParams(n=n, temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens,
                                 stop_token_ids=self.ends, logprobs=0, detokenize=False,
                                 seed=zlib.crc32(repr((*seed, key)).encode())) for _, each in asked for key in each]
        given = [{"prompt_token_ids": p} for each, _ in asked for p in each]
        mine = self.llm.generate(given, params, use_tqdm=False)[sum(len(each) for each, _ in asked[:place]) :]
        return [[self.rollout(prompt, sample) for sample in out.outputs] for prompt, out in zip(prompts, mine)]

    def rollout(self, prompt: list[int], sample) -> Rollout:
        ids = list(sample.token_ids)
        logprobs = [entry[token].logprob for entry, token in zip(sample.logprobs, ids)]
        text = response_text(self.tokenizer, prompt, ids)
        return Rollout(prompt, ids, logprobs, "stop" if ids[-1] in self.ends else "length", text)


ROUNDING = {"cuda": 0.2, "cpu": 0.01}  # nats per token: what bf16 and fp32 may differ by in the mean


def first_sync(sampler: HFSampler | VLLMSampler, policy: Policy, prompt: list[int]) -> None:
    """Give the sampler its first weights, and see that it has become the policy: an engine skips in
    silence what it does not know. A collective.

    Raises SystemExit if the log-probabilities of a few samples are not the policy's.
    """
    sampler.rest()  # so all that `load` does not bring is missing, as after every update
    sampler.load(full_weights(policy))
    rollouts = sampler.sample([prompt], 4, seed=(0,), keys=[0], max_tokens=16)[0]
    stats = score(policy, [prompt] * 4, [o.response_ids for o in rollouts], budget=4096)
    sampled = torch.tensor([logp for o in rollouts for logp in o.logprobs])  # [T]
    scored = torch.cat([s.logp for s in stats]).cpu()  # [T]
    gap = (sampled - scored).abs().mean().nan_to_num(nan=torch.inf)
    dist.all_reduce(gap, dist.ReduceOp.MAX)
    vllm, device = isinstance(sampler, VLLMSampler), next(policy.parameters()).device
    engine, other = ("vllm", "hf") if vllm else ("hf", "vllm")
    require(gap < ROUNDING[device.type], f"--sampler {engine}: with the weights of the policy, a "
            f"{type(policy.lm).__name__}, its log-probabilities differ from the policy's by {gap:.2g} "
            f"nats per token; take --sampler {other} or another checkpoint")

"""Samplers: token ids in, token ids and log-probabilities out.

Two engines with one interface: `HFSampler` decodes with the model's own Hugging Face code,
`VLLMSampler` with a vLLM engine inside this process. Each has the weights that `load` gave it after
the last update. Every rollout has its own stream of random numbers, a pure function of the seed,
the question's key and the sample's number. So what is sampled does not depend on how the work is
batched or split over ranks, and a resumed run needs no generator state.
"""
from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from common import TIMEOUT, require
from common.architecture import context_length, empty_lm, sampling_cache, saved_buffers
from common.chat import end_tokens, response_text
from common.microbatches import Ids, as_long, each_once

Weights = Iterable[tuple[str, Tensor]]  # Hugging Face names and whole tensors


@dataclass
class Rollout:
    """One response. The ids go to the loss as they are; the text is for verifiers and people."""

    prompt_ids: list[int]
    response_ids: list[int]  # end token included, unless truncated
    logprobs: list[float]  # log-probabilities in the distribution that was sampled from, per token
    finish_reason: str  # "stop" | "length"
    text: str

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per token, nats: minus the log of the perplexity."""
        return sum(self.logprobs) / len(self.logprobs)


def make_sampler(args, tokenizer: PreTrainedTokenizerBase, device: torch.device):
    """The engine that --sampler names."""
    setup = args.setup
    if setup.sampler == "hf":
        return HFSampler(args.model, tokenizer, device, rows=setup.sampler_rows, blank=True)
    return VLLMSampler(
        args.model, tokenizer, device, rows=setup.sampler_rows, memory=setup.vllm_memory,
        tensor_parallel=setup.tensor_parallel, blank=True,
    )


def check_lengths(prompts: Ids, max_tokens: int, room: float) -> None:
    longest = max(map(len, prompts), default=0)
    require(
        longest + max_tokens <= room,
        f"a prompt of {longest} tokens and --max_tokens {max_tokens} exceed the {room} tokens "
        "that the sampler has room for; lower --max_tokens, shorten the prompts, or, with vLLM, "
        "raise --vllm_memory",
    )


def as_rollout(sampler, prompt: list, ids: list, logprobs: list) -> Rollout:
    finish = "stop" if ids[-1] in sampler.ends else "length"
    text = response_text(sampler.tokenizer, prompt, ids)
    return Rollout(prompt, ids, logprobs, finish, text)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float,
         top_k: int) -> tuple[Tensor, Tensor]:
    """One token per row of logits [B, V], by inverting the cumulative distribution at uniform [B].

    → token [B] and its log-probability [B] in the distribution drawn from: after temperature, top-k
    and top-p. uniform lies in [0, 1); temperature 0 is greedy.

    >>> draw(torch.tensor([[0.0, 0.0]]), torch.tensor([0.6]), 1.0, 1.0, 0)
    (tensor([1]), tensor([-0.6931]))
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    logp = (logits / temperature).log_softmax(-1)
    if top_k > 0:
        count = min(top_k, logp.shape[-1])
        kept = logp.topk(count).values
        below = logp < kept[:, -1:]
        logp = logp.masked_fill(below, -torch.inf).log_softmax(-1)
    if top_p < 1:
        ranked, order = logp.sort(-1, descending=True)
        p = ranked.double().exp()
        before = p.cumsum(-1) - p  # mass of the likelier; the first is kept
        nucleus = ranked.masked_fill(before >= top_p, -torch.inf)
        logp = logp.scatter(-1, order, nucleus).log_softmax(-1)
    mass = logp.double().exp().cumsum(-1)  # in fp32 the sums of a GPU need not rise
    total = mass[:, -1]
    below_total = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(uniform * total, below_total)
    # the first token with mass > target, so its probability is positive
    token = torch.searchsorted(mass, target[:, None], right=True)
    chosen = logp.gather(-1, token)
    return token[:, 0], chosen[:, 0]


@dataclass
class Reading:
    """The rows of a batch that are being decoded: what the model has read of them."""

    past: dict[str, DynamicCache]  # an argument of the model
    mask: Tensor  # [B, L] 1 for a token, 0 for padding
    positions: Tensor  # [B, 1] of the last token

    def select(self, rows: Tensor) -> None:
        """Row i becomes row rows[i]."""
        (cache,) = self.past.values()
        for layer in cache.layers:  # recurrent states have no other method for this
            layer.reorder_cache(rows)
        self.mask = self.mask[rows]
        self.positions = self.positions[rows]

    def extend(self) -> None:
        """Make room for one more token in each row."""
        self.mask = pad(self.mask, (0, 1), value=1)
        self.positions = self.positions + 1


class HFSampler:
    """Decodes with the model's Hugging Face code, prompts once for all their samples."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, *,
                 rows: int = 128, blank: bool = False):
        """rows: most rollouts decoded at once; limits the KV cache.
        blank: start without the file's weights, which `load` brings."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if blank:
            lm = blank_lm(path, dtype, device)
        else:
            lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        sampling_cache(lm)  # ends the run if this sampler cannot read the model
        self.lm = lm.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device, self.rows = tokenizer, device, rows
        self.ends = end_tokens(path, tokenizer)
        self.context = context_length(lm.config)

    def load(self, weights: Weights) -> None:
        """Take new weights and buffers, given as (Hugging Face name, tensor).

        Tensors of this sampler's dtype and device are not copied: a policy that is not sharded
        shares its weights with it.
        """
        mine = state_of(self.lm)
        for name, tensor in weights:
            held = mine.pop(name)
            held.data = tensor.to(held)
        if mine:
            raise ValueError(f"no new weights for {sorted(mine)}")

    def sleep(self) -> None:
        """The weights stay where they are."""

    def preempted(self) -> list[int]:
        """Nothing is ever read twice."""
        return []

    def close(self) -> None:
        """There is nothing to end."""

    @torch.no_grad()
    def sample(self, prompts: Ids, n: int, *, seed: Sequence[int], keys: Sequence[int],
               max_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
               top_k: int = 0) -> list[list[Rollout]]:
        """n rollouts per prompt. keys: one number per prompt, names its stream under `seed`.

        Raises SystemExit if a prompt leaves no room for `max_tokens` in the context.
        """
        check_lengths(prompts, max_tokens, self.context)
        groups: list[list] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding
        size = max(1, self.rows // n)  # prompts at a time
        for start in range(0, len(order), size):
            part = order[start : start + size]
            named = [keys[i] for i in part]
            asked = [prompts[i] for i in part]
            for first in range(0, n, self.rows):  # more than once if n > rows
                samples = range(first, min(first + self.rows, n))
                uniforms = random_streams(seed, named, samples, max_tokens)
                decoded = self.decode(asked, len(samples), uniforms, temperature, top_p, top_k)
                for row, (ids, logprobs) in enumerate(zip(*decoded)):
                    i = part[row // len(samples)]
                    groups[i].append(as_rollout(self, prompts[i], ids, logprobs))
        return groups

    def decode(self, prompts: Ids, n: int, uniforms: Tensor, temperature: float, top_p: float,
               top_k: int) -> tuple[list, list]:
        """Decode n rows per prompt with `uniforms` [rows, max_tokens]: → ids and log-probabilities.

        A prompt is read once. Rows that have ended leave the batch.
        """
        device = self.device
        count, steps = uniforms.shape
        uniforms = uniforms.to(device)
        reading, logits = self.read(prompts, n)
        ends = torch.tensor(self.ends, device=device)
        tokens = torch.zeros(count, steps, dtype=torch.long, device=device)
        logps = torch.zeros(count, steps, device=device)
        rows = torch.arange(count, device=device)  # which rollout each row of the batch is
        lengths = torch.full_like(rows, steps)
        done = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(steps):
            require(
                logits.sum().isfinite(),  # NaN and infinity stay in the sum
                "--sampler hf: the model's logits are not finite: NaN weights or overflow?",
            )
            token, logp = draw(logits, uniforms[rows, t], temperature, top_p, top_k)
            tokens[rows, t] = token
            logps[rows, t] = logp
            ended = torch.isin(token, ends) & ~done
            lengths[rows[ended]] = t + 1
            done |= ended
            alive = len(done) - int(done.sum())
            if t + 1 == steps or alive == 0:
                break
            if alive <= 0.75 * len(done):  # not one by one: each move copies the cache
                keep = (~done).nonzero()[:, 0]
                reading.select(keep)
                rows, done, token = rows[keep], done[keep], token[keep]
            reading.extend()
            logits = self.logits(token[:, None], reading.positions, reading)
        return cut(tokens, lengths), cut(logps, lengths)

    def read(self, prompts: Ids, n: int) -> tuple[Reading, Tensor]:
        """Read each different prompt once: → the reading, next token's logits [rows, V]."""
        ids, mask, which = each_once(prompts)  # a teacher's prompt may belong to several siblings
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        past = sampling_cache(self.lm)
        (cache,) = past.values()
        cache.layers = [growing(layer) for layer in cache.layers]
        reading = Reading(past, mask, positions[:, -1:])
        logits = self.logits(ids, positions, reading)
        rows = as_long(which, self.device).repeat_interleave(n)
        reading.select(rows)
        return reading, logits[rows]

    def logits(self, ids: Tensor, positions: Tensor, reading: Reading) -> Tensor:
        """Read ids [B, L]: → the next token's logits [B, V], in fp32.

        In bf16 logits of 16 to 32 would be rounded to steps of 0.125.
        """
        out = self.lm.base_model(
            input_ids=ids, position_ids=positions, attention_mask=reading.mask, use_cache=True,
            **reading.past,
        )
        hidden = out.last_hidden_state[:, -1]  # [B, D]
        head = self.lm.get_output_embeddings().weight  # [V, D]
        if self.device.type == "cuda":
            return torch.mm(hidden, head.T, out_dtype=torch.float32)
        return hidden @ head.T


def blank_lm(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal LM at `path` on the device, without reading its weights: they are arbitrary."""
    config = AutoConfig.from_pretrained(path)
    with torch.device(device), no_init_weights():
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lm.tie_weights()
    for name, tensor in state_of(lm).items():
        if any(part in name for part in lm._keep_in_fp32_modules_strict):
            tensor.data = tensor.float()  # as from_pretrained does
    return lm


def state_of(lm: PreTrainedModel) -> dict[str, Tensor]:
    return dict(lm.named_parameters()) | saved_buffers(lm)


def random_streams(seed: Sequence[int], keys: list[int], samples: range, length: int) -> Tensor:
    """[keys · samples, length] uniform numbers: one stream for each sample of each key."""
    numbers = []
    for key in keys:
        for sample in samples:
            stream = np.random.default_rng([*seed, key, sample])
            numbers.append(stream.random(length))
    return torch.from_numpy(np.stack(numbers))


def cut(rows: Tensor, lengths: Tensor) -> list[list]:
    return [row[:length] for row, length in zip(rows.tolist(), lengths.tolist())]


def growing(layer):
    if type(layer) is DynamicLayer:
        return GrowingLayer()
    return layer


class GrowingLayer(DynamicLayer):
    """A layer's KV cache in a buffer with spare room: a new token does not copy the past."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = self.room = keys, values
            return keys, values
        past = self.keys.shape[-2]
        total = past + keys.shape[-2]
        if self.room[0].shape[-2] < total:
            self.room = (self.enlarged(self.keys, total), self.enlarged(self.values, total))
        self.room[0][:, :, past:total] = keys
        self.room[1][:, :, past:total] = values
        self.keys = self.room[0][:, :, :total]
        self.values = self.room[1][:, :, :total]
        return self.keys, self.values

    @staticmethod
    def enlarged(past: Tensor, total: int) -> Tensor:
        """A buffer [B, heads, > total, width] that begins with `past`."""
        batch, heads, length, width = past.shape
        room = past.new_empty(batch, heads, total + max(32, total // 2), width)
        room[:, :, :length] = past
        return room

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.room = (self.keys, self.values)


class VLLMSampler:
    """A vLLM engine in this process, one per rank or per group of `tensor_parallel` ranks."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, *,
                 rows: int = 128, tensor_parallel: int = 1, memory: float = 0.6, dtype: str = "",
                 blank: bool = False):
        """rows: sequences decoded at once; memory: share of the GPU's memory for weights and KV
        cache; dtype: bfloat16 on CUDA and float32 on a CPU unless given; blank: start without the
        file's weights, so that a weight which `load` does not bring is noticed at once."""
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's model is in this process
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # knows no seeds: it would be built, never used
        }
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self.path, self.tokenizer = path, tokenizer
        self.cuda, self.asleep = device.type == "cuda", False
        self.sharing = None  # the ranks of one engine
        if tensor_parallel > 1:
            self.sharing = dist.new_subgroups(tensor_parallel, timeout=TIMEOUT)[0]
        launcher = "external_launcher" if "WORLD_SIZE" in os.environ else None
        load_format = "dummy" if blank else "auto"
        default = "bfloat16" if self.cuda else "float32"
        engine = int(os.environ.get("RANK", 0)) // tensor_parallel  # which of them this one is
        try:
            self.llm = LLM(
                model=path, dtype=dtype or default, load_format=load_format,
                tensor_parallel_size=tensor_parallel, distributed_executor_backend=launcher,
                seed=engine, max_num_seqs=rows, logprobs_mode="processed_logprobs",
                hf_overrides={"head_dtype": "float32"},  # logits in fp32, as the trainer's
                gpu_memory_utilization=memory, enable_sleep_mode=self.cuda,
                max_model_len=-1,  # as much of the model's context as the KV cache has room for
                enforce_eager=not self.cuda, disable_log_stats=False,
            )
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise SystemExit(self.refusal("start with", error)) from None
        lm = empty_lm(path)
        self.names = None  # knows the names of a checkpoint's weights, if they differ from lm's
        if get_model_conversion_mapping(lm, add_legacy=False):
            self.names = lm
        self.context = self.llm.model_config.max_model_len
        self.ends = end_tokens(path, tokenizer)
        self.preemptions = 0  # since the engine began

    def load(self, weights: Weights) -> None:
        """Take new weights and buffers in place, one tensor at a time.

        A collective; no rank holds the whole model twice. Raises SystemExit if vLLM has no place
        for a weight.
        """
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        if not self.cuda:
            self.llm.apply_model(forget_packed_experts)
        renamed = self.as_in_a_file(weights)
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": renamed})
        except (AssertionError, AttributeError, KeyError, ValueError) as error:
            raise SystemExit(self.refusal("take the weights of", error)) from None
        if not self.cuda:
            self.llm.apply_model(pack_heads)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False
        self.llm.reset_prefix_cache()

    def as_in_a_file(self, weights: Weights) -> Weights:
        """The same weights as a checkpoint holds them, which is how vLLM reads them.

        transformers keeps all experts of a layer in one tensor, and some weights under other names.
        """
        for name, tensor in weights:
            if self.names is None:
                yield name, tensor
            else:
                yield from revert_weight_conversion(self.names, {name: tensor}).items()

    def sleep(self) -> None:
        """Give the GPU's memory to the update. Weights are dropped: `load` brings new ones."""
        if self.cuda and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def preempted(self) -> list[int]:
        """How many rollouts lost their KV cache to others and were read again, since the last
        call: the cache had no room for `rows` rollouts."""
        before = self.preemptions
        for metric in self.llm.get_metrics():
            if metric.name == "vllm:num_preemptions":
                self.preemptions = metric.value
        return [self.preemptions - before]

    def close(self) -> None:
        """End the engine and, with it, torch's process group."""
        self.llm.llm_engine.engine_core.shutdown()

    def sample(self, prompts: Ids, n: int, *, seed: Sequence[int], keys: Sequence[int],
               max_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
               top_k: int = 0) -> list[list[Rollout]]:
        """As HFSampler.sample: the same distribution, other random numbers."""
        from vllm import SamplingParams

        check_lengths(prompts, max_tokens, self.context)
        asked, place = [(list(prompts), list(keys))], 0
        if self.sharing is not None:  # all ranks of an engine must ask it for the same
            asked = asked * dist.get_world_size(self.sharing)
            place = dist.get_rank(self.sharing)
            dist.all_gather_object(asked, asked[0], group=self.sharing)
        inputs, params = [], []
        for some_prompts, some_keys in asked:
            inputs += [{"prompt_token_ids": prompt} for prompt in some_prompts]
            for key in some_keys:
                stream = zlib.crc32(repr((*seed, key)).encode())
                params.append(SamplingParams(
                    n=n, temperature=temperature, top_p=top_p, top_k=top_k, seed=stream,
                    max_tokens=max_tokens, stop_token_ids=self.ends, logprobs=0, detokenize=False,
                ))
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        first = sum(len(some_prompts) for some_prompts, _ in asked[:place])
        groups = []
        for prompt, output in zip(prompts, outputs[first:]):
            group = []
            for sample in output.outputs:
                ids = list(sample.token_ids)
                logprobs = [entry[token].logprob for entry, token in zip(sample.logprobs, ids)]
                group.append(as_rollout(self, prompt, ids, logprobs))
            groups.append(group)
        return groups

    def refusal(self, act: str, error: Exception) -> str:
        told = re.sub("(?i)gpu.memory.utilization", "--vllm_memory", str(error))
        reason = shorten(told.split("Value error, ")[-1], 240)
        return f"error: --sampler vllm: vLLM cannot {act} {self.path} ({reason}); take --sampler hf"


# vLLM 0.32 on a CPU computes with packed copies of some weights. A reload packs the experts only
# for a new kernel, and a tied head not at all.
def forget_packed_experts(lm: torch.nn.Module) -> None:
    for module in lm.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def pack_heads(lm: torch.nn.Module) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in lm.modules():
        if isinstance(module, VocabParallelEmbedding):  # a tied embedding is a head too
            module.quant_method.process_weights_after_loading(module)

"""Checks that a model can be trained correctly. Any other model ends the run at start, in one line.

`check_architecture` reads the configuration and the modules; weights may be on the meta device, so
--dry_run calls it too. `check_forward` runs a loaded model on a few tokens.
"""
from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.integrations import sdpa_attention
from transformers.modeling_layers import GradientCheckpointingLayer

from common import check_hub, require

# Configuration keys of transformations of the logits, and the value that changes nothing.
TRANSFORMATIONS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}
ATTENTION = {"full_attention": DynamicLayer, "sliding_attention": DynamicSlidingWindowLayer}
RECURRENT = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

HEADS_SHARE_KEYS = sdpa_attention.use_gqa_in_sdpa


def heads_share_keys(mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
    """Whether SDPA gets keys and values once for all query heads that share them.

    transformers copies them for each head if there is a mask; on a CPU torch needs no copies.
    """
    if key.device.type == "cpu":
        mask = None
    return HEADS_SHARE_KEYS(mask, key, value)


sdpa_attention.use_gqa_in_sdpa = heads_share_keys


def read_by_first_rank(path: str, checkpointing: bool, share_prompts: bool) -> PreTrainedModel:
    """The causal LM at `path`, with its weights on the first rank and without them on the others.

    Raises SystemExit on all ranks if training the model would be wrong.
    """
    lm, config, wrong = None, None, ""
    if dist.get_rank() == 0:
        try:
            lm = checked_lm(path, checkpointing, share_prompts)
            config = lm.config
        except SystemExit as end:
            wrong = end.code
    found = [config, wrong]
    dist.broadcast_object_list(found)
    config, wrong = found
    if wrong:
        raise SystemExit(wrong)
    return lm or without_weights(config)


def checked_lm(path: str, checkpointing: bool, share_prompts: bool) -> PreTrainedModel:
    """The causal LM at `path` with its weights; ends the run if training it would be wrong."""
    check_path(path)
    lm = load_lm(path)
    check_architecture(lm, path, checkpointing=checkpointing, share_prompts=share_prompts)
    check_forward(lm, path)
    mend_generation_config(lm, path)
    return lm


def check_path(path: str) -> None:
    """Check early: transformers would treat a missing local path as a hub id and fail later with a
    confusing error."""
    require(path.strip(), "--model is empty: give a folder or a hub id")
    require(not path.startswith("~"), f"--model {path}: the shell left ~ as it is; write it out")
    folder = Path(path)
    if folder.exists() or path.startswith((".", "/")) or path.count("/") > 1:
        require(folder.exists(), f"--model {path}: no such folder")
        config = folder / "config.json"
        require(config.exists(), f"--model {path}: no config.json, so no Hugging Face checkpoint")
        return
    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        check_hub("--model", path, "model", None)
    try:
        AutoConfig.from_pretrained(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --model {path}: no folder, nor on the hub: {reason}") from None


def load_config(path: str) -> PreTrainedConfig:
    """The configuration at `path`. Raises SystemExit if transformers does not know such a model."""
    with in_words(path):
        config = AutoConfig.from_pretrained(path)
    quantized = getattr(config, "quantization_config", None) is not None
    require(not quantized, f"--model {path}: its weights are quantized, and such a model cannot be "
            "trained or saved here; use an unquantized checkpoint")
    return config


def load_lm(path: str) -> PreTrainedModel:
    """The causal LM at `path` in fp32. Raises SystemExit if there is none, or only a part of it."""
    load_config(path)
    with in_words(path):
        lm, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                          output_loading_info=True)
    missing = sorted(report["missing_keys"])
    require(not missing, f"--model {path}: {len(missing)} weights are not in the checkpoint "
            f"({', '.join(missing[:3])}) and would be random; use a complete causal LM")
    return lm


def empty_lm(path: str) -> PreTrainedModel:
    """The causal LM at `path` without its weights, for --dry_run."""
    config = load_config(path)
    with in_words(path):
        return without_weights(config)


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal LM of `config` in fp32 and eval mode; all its tensors are on the meta device."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    return lm.eval()


@contextmanager
def in_words(path: str) -> Iterator[None]:
    """Exit with the first line of the reason if transformers cannot load the model at `path`."""
    try:
        yield
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"error: --model {path}: transformers cannot load it as a causal language "
                         f"model ({reason}); mend it or use another") from None


def check_architecture(lm: PreTrainedModel, path: str, *, sampler: str = "",
                       checkpointing: bool = False, share_prompts: bool = False) -> None:
    """Raise SystemExit if training `lm` would be wrong, or could not work with these flags.

    The losses are computed from hidden states and the weight W of the head, so the logits must be
    hidden·Wᵀ. sampler: "hf" if transformers' own code is to sample.
    """
    name, head = type(lm).__name__, lm.get_output_embeddings()
    stacked = lm.base_model is not lm and isinstance(head, nn.Linear)
    decoder = not lm.config.is_encoder_decoder and not is_encoder(lm)
    require(stacked and decoder, f"--model {path}: {name} is not a decoder below a linear head, "
            "and the losses are computed with nothing else; use another architecture")
    found = transformations(lm)
    require(not found, f"--model {path}: {name} transforms its logits ({', '.join(found)}), which "
            "the fused head does not compute; use another architecture")
    if sampler == "hf":
        sampling_cache(lm)
    require(only_attends(lm) or not share_prompts, f"--share_prompts: {name} has layers other "
            "than full and sliding attention, which cannot go on from a shared prompt; add "
            "--no-share_prompts")
    layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    require(layers or not checkpointing, f"--checkpointing: {name} does not support it; add "
            "--no-checkpointing")


def transformations(lm: PreTrainedModel) -> list[str]:
    """The transformations of the logits that the configuration of `lm` names."""
    config = lm.config.get_text_config()
    found = []
    for key, plain in TRANSFORMATIONS.items():
        if getattr(config, key, None) not in (None, plain):
            found.append(f"{key} {getattr(config, key)}")
    if lm.get_output_embeddings().bias is not None:
        found.append("a bias of the head")
    return found


def is_encoder(lm: PreTrainedModel) -> bool:
    """Whether the configuration says that tokens see later ones."""
    config = lm.config.get_text_config()
    if getattr(config, "use_bidirectional_attention", None):
        return True
    if getattr(config, "is_decoder", True):
        return False
    # some decoders have is_decoder False as well, but not their attention
    return any(getattr(module, "is_causal", True) is False for module in lm.base_model.modules())


def sampling_cache(lm: PreTrainedModel) -> dict[str, DynamicCache]:
    """An empty cache as an argument of lm.forward, under the name that `lm` has for it. Raises
    SystemExit if the sampler cannot repeat and select the rows of such a cache."""
    known = {*ATTENTION.values(), *RECURRENT}
    arguments = inspect.signature(lm.forward).parameters
    cache = DynamicCache(config=lm.config)
    right = all(type(layer) in known for layer in cache.layers)
    for name in ("past_key_values", "cache_params"):
        if name in arguments and right:
            return {name: cache}
    raise SystemExit(f"error: --sampler hf: {type(lm).__name__} keeps its past in a form that the "
                     "sampler does not know; use --sampler vllm")


def only_attends(lm: PreTrainedModel) -> bool:
    """Whether each layer is full or sliding attention, with its whole state in a cache of keys and
    values. Chunked attention and recurrent layers are not."""
    if "past_key_values" not in inspect.signature(lm.forward).parameters:
        return False
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    classes = {type(layer) for layer in DynamicCache(config=lm.config).layers}
    return kinds <= ATTENTION.keys() and classes <= set(ATTENTION.values())


@torch.no_grad()
def check_forward(lm: PreTrainedModel, path: str) -> None:
    """Raise SystemExit if the logits are not hidden·Wᵀ, or if a token sees later ones."""
    name, vocab = type(lm).__name__, lm.config.get_text_config().vocab_size
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    require(tied or not lm.config.tie_word_embeddings, f"--model {path}: its config.json ties the "
            "head to the embedding, but the checkpoint has two different matrices, and engines "
            "would not agree which to use; set tie_word_embeddings to false there")
    ids = torch.arange(8)[None] % vocab
    hidden, logits = read(lm, ids)
    W = lm.get_output_embeddings().weight
    # small logits hide a soft cap: read again with hidden states that make logits of hundreds
    large = hidden * (300 / logits.abs().max())
    with_large = logits_of(lm, ids, large)
    plain = close(hidden @ W.T, logits) and close(large @ W.T, with_large)
    require(plain, f"--model {path}: {name} transforms its logits (a soft cap, a scale or a bias), "
            "which the fused head does not compute; use another architecture")
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % vocab
    causal = close(read(lm, other)[0][:, :-1], hidden[:, :-1])
    require(causal, f"--model {path}: in {name} a token sees later ones, so its hidden states "
            "predict nothing; use a causal LM")


def read(lm: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states [1, T, D] of `ids` [1, T], and the logits [1, T, V] made of them."""
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden, lm(input_ids=ids, use_cache=False).logits


def logits_of(lm: PreTrainedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """The logits that `lm` computes if its head reads `hidden` [1, T, D] instead of its own states.
    """
    hook = lm.get_output_embeddings().register_forward_pre_hook(lambda module, args: (hidden,))
    try:
        return lm(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


def mend_generation_config(lm: PreTrainedModel, path: str) -> None:
    """Make the generation config one that can be saved, and try to save it: otherwise the first
    checkpoint would end the run. Many models on the hub set a temperature without do_sample; they
    are meant to sample."""
    settings = lm.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
    try:
        with tempfile.TemporaryDirectory() as folder:
            lm.save_pretrained(folder, state_dict={})
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"error: --model {path}: it could not be saved again ({reason}); mend its "
                         "config.json or generation_config.json") from None


def context_length(config: PreTrainedConfig) -> float:
    """How many tokens the model can read; infinite if its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")


def key_value_size(lm: PreTrainedModel) -> int:
    """How many numbers an attention layer caches per token; 0 for a model without attention."""
    config = lm.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * width * (getattr(config, "num_key_value_heads", None) or heads)


def enable_checkpointing(lm: PreTrainedModel) -> None:
    """Gradient checkpointing of a model in eval mode. A layer checkpoints only in training mode, in
    which some layers also apply dropout. So each layer is in training mode except during its own
    forward."""
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in lm.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            module.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", False))
            module.register_forward_hook(lambda layer, *_: setattr(layer, "training", True),
                                         always_call=True)


def saved_buffers(lm: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds, by name: a router's biases, a layer's scale."""
    state = lm.state_dict()
    return {name: buffer for name, buffer in lm.named_buffers() if name in state}

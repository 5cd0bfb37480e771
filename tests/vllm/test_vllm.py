"""The vLLM engine for real, on a CPU: run by `make test-vllm` in an environment of its own."""
import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import CHAIN, GROUPS, ROOT, TASK, at_most
from ranks import another_port, finish, launch, run_grpo

from common.chat import chat_ids, load_tokenizer
from common.microbatches import micro_batches
from common.policy import full_weights, load_policy, optimizer_step, score
from common.sampler import VLLMSampler
from common.settings import Setup
from common.tasks import load_task

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
CPU = torch.device("cpu")


def engine_logps(sampler: VLLMSampler, rollouts) -> list[torch.Tensor]:
    """The engine's log-probabilities of given ids, read as a prompt."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": o.prompt_ids + o.response_ids} for o in rollouts]
    outputs = sampler.llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
    found = []
    for o, out in zip(rollouts, outputs):
        rows = out.prompt_logprobs[len(o.prompt_ids) :]
        found.append(torch.tensor([row[t].logprob for row, t in zip(rows, o.response_ids)]))
    return found


@torch.no_grad()
def rounding(policy, prompts: list, responses: list, scored: list[torch.Tensor]) -> float:
    """How far bf16 moves a log-probability of transformers' own model; the head is in fp32, as the engine's."""
    lm = copy.deepcopy(policy.lm).bfloat16()
    head, most = policy.lm.get_output_embeddings().weight, 0.0
    for prompt, response, exact in zip(prompts, responses, scored):
        hidden = lm.base_model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        logp = (hidden.float() @ head.T).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        most = max(most, (logp - exact).abs().max().item())
    return most


@pytest.mark.parametrize("dtype, ranks", [("float32", (0, 4)), ("bfloat16", (0,))])
def test_the_engine_agrees_with_the_trainer_and_follows_it(dtype, ranks, one_process):
    """The rollouts' own log-probabilities, and those of fixed ids after an optimizer step and a push of the weights:
    they move, and are the trainer's (in bf16 within three times what rounding does to transformers' own model). Without LoRA,
    and in the same engine with it."""
    sampler = VLLMSampler(CHAIN, load_tokenizer(CHAIN), CPU, dtype=dtype)
    for rank in ranks:
        agrees_and_follows(sampler, rank, dtype)
    sampler.close()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # for the fixture


def agrees_and_follows(sampler: VLLMSampler, rank: int, dtype: str) -> None:
    policy = load_policy(CHAIN, CPU, Setup(lora_rank=rank))

    def bound(prompts, responses, scored) -> float:
        return 1e-4 if dtype == "float32" else 3 * rounding(policy, prompts, responses, scored)

    sampler.sleep()
    sampler.load(full_weights(policy))
    problems = load_task("chain", heldout=8).train[:6]
    chats = [chat_ids(sampler.tokenizer, p.messages) for p in problems]
    groups = sampler.sample(chats, 3, seed=(0,), keys=range(6), max_tokens=48)
    rollouts = [o for g in groups for o in g]
    assert any(len({o.text for o in g}) > 1 for g in groups), "the samples of a prompt have streams of their own"
    stopped = [o for o in rollouts if not o.truncated]
    assert stopped and all(o.response_ids[-1] in sampler.ends for o in stopped)  # the end token is kept
    cut = sampler.sample(chats[:1], 2, seed=(0,), keys=[0], max_tokens=3)[0]
    assert all(o.truncated and len(o.response_ids) == 3 for o in cut)
    again = sampler.sample(chats, 3, seed=(0,), keys=range(6), max_tokens=48)
    if dtype == "float32":
        assert [[o.response_ids for o in g] for g in again] == [[o.response_ids for o in g] for g in groups]

    prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
    before = score(policy, prompts, responses, at_most(4096))
    gap = max((torch.tensor(o.logprobs) - b).abs().max().item() for o, b in zip(rollouts, before))
    assert gap < bound(prompts, responses, before)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    micro = micro_batches(prompts, responses, None, at_most(10**6), CPU)[0]
    total, _ = policy(micro, lambda stats, _: -stats.logp / len(micro.targets))
    total.backward()
    optimizer_step(policy, optimizer, 2e-2 if rank else 2e-3, 1.0)
    sampler.sleep()
    sampler.load(full_weights(policy))
    after = score(policy, prompts, responses, at_most(4096))
    engine = engine_logps(sampler, rollouts)
    moved = max((a - b).abs().max().item() for a, b in zip(after, before))
    most = bound(prompts, responses, after)
    assert moved > 10 * most
    assert max((a - e).abs().max().item() for a, e in zip(after, engine)) < most
    # nothing cached of the old weights is used: what is sampled now is the new policy's
    new = [o for g in sampler.sample(chats, 3, seed=(0,), keys=range(6), max_tokens=48) for o in g]
    prompts, responses = [o.prompt_ids for o in new], [o.response_ids for o in new]
    trained = score(policy, prompts, responses, at_most(4096))
    gap = max((torch.tensor(o.logprobs) - t).abs().max().item() for o, t in zip(new, trained))
    assert gap < bound(prompts, responses, trained)


def test_rollouts_that_lost_their_cache_are_counted_once(one_process, monkeypatch):
    """Twelve blocks of 128 tokens for 32 rollouts of two blocks each."""
    import vllm

    monkeypatch.setattr(vllm, "LLM", partial(vllm.LLM, num_gpu_blocks_override=12))
    monkeypatch.setattr(vllm, "SamplingParams", partial(vllm.SamplingParams, ignore_eos=True))
    tokenizer = load_tokenizer(CHAIN)
    sampler = VLLMSampler(CHAIN, tokenizer, CPU, rows=32)
    sampler.ends = []
    chats = [chat_ids(tokenizer, p.messages) for p in load_task("chain", heldout=8).train[:8]]
    found = []
    for length in (200, 8):
        groups = sampler.sample(chats, 4, seed=(0,), keys=range(8), max_tokens=length)
        assert all(len(o.response_ids) == length for g in groups for o in g)
        found += sampler.preempted()
    assert found[0] > 0 == found[1]
    sampler.close()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # for the fixture


SMALL = [*GROUPS, "--sampler", "vllm", "--eval_every", "2"]
TWO_STEPS = {
    "grpo": [*SMALL, "--steps", "2"], "rlsd": [*SMALL, "--steps", "2"], "sdpo": [*SMALL, "--steps", "2"],
    "hsd": [*SMALL, "--steps", "2", "--top_p", "1"],  # its 0.95 makes the sampler's distribution another one
    "sdzero": [*TASK, "--sampler", "vllm", "--srt_max_tokens", "32", "--srt_questions", "8", "--kept_traces", "8", "--srt_batch",
               "8", "--srt_epochs", "1", "--sd_questions", "4", "--batch_size", "4"],
}
ONE_AFTER_THE_OTHER = """
import json, sys
from ranks import run_file
for name, flags in json.loads(sys.argv[1]).items():
    run_file(name, flags)
"""


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(folder: Path) -> list[dict]:
    """The rows of updates. In each the engine was the policy."""
    found = [row for row in rows(folder) if "grad_norm" in row]
    assert all(row.get("mismatch/max_abs_dlogp", 0) < 1e-4 for row in found)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run of each file, all in one process: an engine leaves nothing that the next one stumbles over."""
    out = tmp_path_factory.mktemp("files")
    runs = {name: [*flags, "--out", str(out), "--name", name] for name, flags in TWO_STEPS.items()}
    done = subprocess.run([sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(runs)], cwd=ROOT, capture_output=True, text=True,
                          timeout=600, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests"})
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


@pytest.mark.parametrize("name", list(TWO_STEPS))
def test_every_file_trains_two_steps(name, files):
    assert len(trained(files[0] / name)) == 2


def test_the_files_end_cleanly(files):
    assert "Traceback" not in files[1].stderr


def an_engine_each_and_one_for_both(out: str) -> None:
    """On each of two ranks."""
    flags = [*SMALL, "--steps", "2", "--out", out, "--name"]
    run_grpo([*flags, "each"])
    another_port()
    run_grpo([*flags, "shared", "--tensor_parallel", "2"])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    finish(launch(2, out / "log", an_engine_each_and_one_for_both, str(out)), out / "log")
    assert "Traceback" not in (out / "log").read_text()
    return out


def test_two_processes_each_with_its_engine_train_and_end_cleanly(two):
    assert len(trained(two / "each")) == 2


def test_two_processes_that_share_an_engine_train_as_with_one_each(two):
    """--tensor_parallel 2: the engine is given both processes' prompts, each takes its own part, and random numbers are
    the same."""
    assert len(trained(two / "shared")) == 2
    for name in ("reward/mean", "heldout/pass@1"):
        assert [row.get(name) for row in rows(two / "each")] == [row.get(name) for row in rows(two / "shared")]

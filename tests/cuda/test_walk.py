"""The CUDA path of the five files, walked on a pretended GPU (pretend.py): no tensor on the wrong device or in the wrong dtype
from the first line of a main to its last, and no launch of a Triton kernel with what it does not expect."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++, which builds the pretended GPU")
WALKS = {  # by the number of ranks
    1: [
        "grpo --loss gspo --minibatches 2 --beta 0.01 --steps 1",
        "grpo --loss gspo --minibatches 2 --beta 0.01 --steps 2 --resume auto",
        "hsd --lora_rank 4 --teacher ema --beta 0.01 --no-share_prompts --checkpointing --steps 1",
        "hsd --lora_rank 4 --teacher ema --beta 0.01 --no-share_prompts --checkpointing --steps 2 --resume auto",
        "sdpo --teacher trust_region --kl jsd --top_k 20 --lam 0.5 --minibatches 2 --steps 1",
        "rlsd --teacher_every 1 --minibatches 2 --steps 1",
        "sdzero --srt_questions 16 --sd_questions 16 --srt_batch 8 --kl forward --top_k 8",
    ],
    8: [
        "grpo --lora_rank 4 --beta 0.01 --no-share_prompts --checkpointing --steps 1",
        "hsd --teacher live --beta 0.01 --kl jsd --grpo_mix 0.5 --no-share_prompts --checkpointing --steps 1",
        "sdpo --teacher ema --kl reverse --granularity sequence --steps 1",
        "rlsd --teacher_every 1 --no-share_prompts --checkpointing --steps 1",
        "sdzero --srt_questions 16 --sd_questions 16 --srt_batch 8 --no-share_prompts --checkpointing",
    ],
}
MISTAKES = {  # of walk.py → what is said of them
    "on_the_cpu": "y is on cpu",
    "cast_to_bf16": "is torch.bfloat16, not fp32",
    "head_of_a_shard": "entries, not of",
}


def walked(world: int, lines: list[str]) -> list[dict]:
    command = [sys.executable, str(Path(__file__).with_name("walk.py")), str(world), *lines]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    walks = [json.loads(row) for row in done.stdout.splitlines() if row.startswith('{"line"')]
    assert [walk["line"] for walk in walks] == lines
    return walks


@pytest.mark.parametrize("world", WALKS)
def test_every_main_walks_on_a_pretended_gpu(world):
    for walk in walked(world, WALKS[world]):
        assert not walk["failed"], f"{walk['line']}\n{walk['failed']}"
        assert walk["launches"]["statistics_kernel"] and walk["launches"]["gradient_kernel"]
        assert not walk["cudnn"], "attention's backward in cuDNN has NaNs (pytorch/pytorch#196678)"
        slow = [place for place in walk["waits"] if place.startswith("kernels/")]
        assert not slow, f"the head waits for the GPU: {slow}"


def test_planted_mistakes_are_found():
    walks = walked(8, [f"{mistake}: hsd --beta 0 --steps 1" for mistake in MISTAKES])
    for said, walk in zip(MISTAKES.values(), walks):
        assert said in walk["failed"].splitlines()[-1], f"{walk['line']}: {walk['failed'] or 'not found'}"

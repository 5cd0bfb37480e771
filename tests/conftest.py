import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # runs in and out of this process must add in the same order

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHAIN = str(ROOT / "assets" / "chain")
torch.set_num_threads(1)


@pytest.fixture
def one_process():
    """A process group of one, as Run makes it without torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def policy_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, loss, inputs, seen=(), **settings):
    """What a policy makes of hidden states [T, D] and a head [V, D] without a model: → (total, stats)."""
    from common.policy import Policy

    head_of_lm = SimpleNamespace(weight=head)
    policy = SimpleNamespace(hidden_states=lambda micro: hidden,
                             lm=SimpleNamespace(get_output_embeddings=lambda: head_of_lm))
    micro = SimpleNamespace(index=slice(None), targets=targets)
    return Policy.forward(policy, micro, loss, inputs, seen, **settings)


def interrupted(run: Path, name: str, step: int) -> Path:
    """A copy of a finished run, beside it, as a kill after the checkpoint of `step` would have left it."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step_*"):
        if folder.name > f"step_{step:06d}":
            shutil.rmtree(folder)
    assert (copy / "checkpoints" / f"step_{step:06d}").exists()
    return copy


def torchrun(ranks: int, *command: str, timeout: float = 300, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script in `ranks` processes on this machine."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    if check and done.returncode:
        raise AssertionError(f"{command} in {ranks} ranks ended with {done.returncode}\n{done.stderr[-3000:]}")
    return done

import os
import subprocess
import sys
from pathlib import Path

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


def torchrun(ranks: int, *command: str, timeout: float = 300, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script in `ranks` processes on this machine."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    if check and done.returncode:
        raise AssertionError(f"{command} in {ranks} ranks ended with {done.returncode}\n{done.stderr[-3000:]}")
    return done

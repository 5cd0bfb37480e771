import os
import shutil
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
# A run of a few seconds: three numbers to add take 28 tokens, and some answers are right, some wrong.
TASK = ["--demo", "--model", CHAIN, "--task", "chain:3", "--max_tokens", "28", "--heldout", "4", "--eval_samples", "1"]
GROUPS = [*TASK, "--batch_size", "4", "--group_size", "4"]
MEASURED = ("time/", "tflops/", "mfu/", "peak_gib")  # metrics that no two runs share
ALL_PROBLEMS = ("test_tasks", "test_chain_model")  # modules that are about them
torch.set_num_threads(1)


SLOW = ("test_kernels_triton", "test_faults", "test_many", "test_architectures", "test_run")


def pytest_collection_modifyitems(items: list) -> None:
    """Slow modules first: two workers that take a module at a time then end at about the same moment."""
    place = {name: i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.module.__name__, len(SLOW)))


def lighten(put=setattr) -> None:
    """Runs choose from few problems, draw no curves and write no report: two seconds of each, and no number that a law is about."""
    from common import run
    from common.tasks import chain

    put(chain, "SIZE", 128)
    put(run, "draw_curves", lambda *args, **named: None)
    put(run, "write_report", lambda *args: None)


@pytest.fixture(scope="module", autouse=True)
def light_runs(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ALL_PROBLEMS:
            lighten(patch.setattr)
        yield


def at_most(tokens: int, share: bool = False):
    """The settings of micro-batches."""
    from common.settings import Setup

    return Setup(token_budget=tokens, share_prompts=share)


@pytest.fixture
def one_process():
    """A process group of one, as Run makes it without torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def policy_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, loss, inputs, seen=(), **settings):
    """What a policy makes of hidden states [T, D] and a head [V, D] without a model: → (total, stats)."""
    from common.policy import Policy
    from common.work import Cost

    head_of_lm = SimpleNamespace(weight=head)
    policy = SimpleNamespace(hidden_states=lambda micro: hidden, cost=Cost(0, 0, 0, 0),
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

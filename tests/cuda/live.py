"""Bytes that are alive in an update of a Qwen3 on pretended ranks:

    python tests/cuda/live.py '{"model": "8B", "ranks": 8, "tokens": 16384, "longest": 2048, "copies": 1, "teacher": true}' …

The update is that of common/policy.py over FSDP2 and kernels/head.py, with the weights, moments and teachers that hsd.py has.
Attention keeps what a flash kernel keeps, and Triton's kernels do nothing. AdamW has its moments, and the gradient of an earlier
micro-batch is there. "layers" in place of all of them: the bytes are linear in their number.
Prints a line of JSON per case: bytes at most in each phase. Without "teacher" the loss is GRPO's.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent), str(HERE.parent.parent / "benchmarks")]

import pretend  # noqa: E402, I001  before torch

import json  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from unittest import mock  # noqa: E402

import memory as shapes  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.distributed.tensor._sharding_prop import ShardingPropagator  # noqa: E402

from common import policy  # noqa: E402
from common.architecture import enable_checkpointing  # noqa: E402
from common.memory import Ledger, flash_attention  # noqa: E402
from common.microbatches import micro_batches  # noqa: E402
from common.settings import Setup  # noqa: E402
from kernels import rows_triton  # noqa: E402
from kernels.head import Divergence  # noqa: E402


PROPAGATE = "_propagate_tensor_meta_non_cached"


class Ranks(Ledger):
    """A Ledger that looks below DTensors and follows FSDP, which frees gathered weights by resizing their storage."""

    paused = False

    def holds(self, x: torch.Tensor) -> bool:
        return super().holds(x) and not self.paused

    def apart(self, propagate):
        """DTensor learns the shape of a result from fake tensors of its own: a GPU never sees them."""
        def propagated(*args):
            self.paused = True
            try:
                return propagate(*args)
            finally:
                self.paused = False

        return propagated

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)

    def resizing(self, resize):
        def resized(storage, size: int):
            out = resize(storage, size)
            if storage._cdata in self.sizes or size:
                self.resize(storage._cdata, size)
            return out

        return resized

    def phase(self) -> int:
        """Bytes at most since the last call."""
        peak, self.peak = self.peak, self.live
        return peak


class Nothing:
    def __getitem__(self, grid):
        return lambda *_, **__: None


def distance(tokens, _) -> torch.Tensor:
    return tokens.kl


def surprise(tokens, _) -> torch.Tensor:
    return -tokens.logp


def load(case: dict, trained: bool, device: torch.device) -> policy.Policy:
    with torch.device("meta"):
        lm = shapes.lm_of(case["model"], case.get("layers", 0)).eval()
    model = policy.Policy(lm)
    if trained and case.get("checkpointing", True):
        enable_checkpointing(lm)
    if case.get("lora_rank") and trained:
        policy.add_adapters(model, case["lora_rank"], 32.0)
        for p in lm.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()
    mesh = policy.make_mesh(device, "all")
    policy.shard(model, device, mesh, lambda name, x, where: torch.empty(x.shape, dtype=x.dtype, device=where))
    return model if trained else model.requires_grad_(False)


def main(case: dict) -> dict:
    pretend.group_of(case["ranks"])()
    rows = -(-case["tokens"] // case["longest"])
    length = case["tokens"] // rows
    prompts, responses = [[1] * 200] * rows, [[2] * (length - 200)] * rows
    ledger, peaks = Ranks("cuda"), {}
    resize = torch.UntypedStorage.resize_
    with (mock.patch.object(torch.UntypedStorage, "resize_", ledger.resizing(resize)),
          mock.patch.object(ShardingPropagator, PROPAGATE, ledger.apart(getattr(ShardingPropagator, PROPAGATE))),
          pretend.Pretend(), ledger, flash_attention()):
        student = load(case, True, pretend.GPU)
        teacher = student
        if case.get("copies"):
            teacher = policy.Adapters(student) if case.get("lora_rank") else load(case, False, pretend.GPU)
        optimizer = policy.make_optimizer(student, SimpleNamespace(lr=1e-6, weight_decay=0.0))
        for p in policy.trained_parameters(student):
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the moments; the gradients stay, as of an earlier micro-batch
        ledger.phase()
        (micro,) = micro_batches(prompts, responses, None, Setup(token_budget=case["tokens"]), pretend.GPU)
        seen = [teacher.read(micro)] if case.get("teacher") else []
        peaks["teacher"] = ledger.phase()
        total, stats = student(micro, distance if seen else surprise, None, seen, divergence=Divergence("forward_kl"))
        peaks["forward"] = ledger.phase()
        total.backward()
        peaks["backward"] = ledger.phase()
        del total, stats, seen, micro
        policy.optimizer_step(student, optimizer, 1e-6, 1.0)
        peaks["optimizer"] = ledger.phase()
        peaks["between"] = ledger.live
    dist.destroy_process_group()
    return peaks


if __name__ == "__main__":
    pretend.install()
    for kernel in ("statistics_kernel", "sums_kernel", "gradient_kernel"):
        setattr(rows_triton, kernel, Nothing())
    for text in sys.argv[1:]:
        print(json.dumps(main(json.loads(text))), flush=True)

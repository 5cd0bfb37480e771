"""Walk mains of the five files on a pretended GPU:

    python tests/cuda/walk.py 8 "grpo --loss gspo --steps 1" "on_the_cpu: hsd --steps 1"    # eight ranks; the second errs

One line of JSON per walk: what it did, or how it failed. Everything is the code that runs on a GPU, but for the following.
Triton's kernels are not launched: what they are given is checked. A sampler decodes three tokens and makes up the rest, and
so does the verifier, since data do not exist. With several ranks a checkpoint's state is looked at but not written, since
the other ranks would have to write their parts.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import pretend  # noqa: E402, I001  before torch

import importlib  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import shlex  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections import Counter  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from common import checkpoints, microbatches, policy, run, sampler  # noqa: E402
from common.settings import parse  # noqa: E402
from common.verifiers import Verdict  # noqa: E402
from common.verifiers.pool import Verifier  # noqa: E402
from kernels import head, rows_triton  # noqa: E402

CHAIN = str(pretend.ROOT / "assets" / "chain")
VOCABULARY = json.loads(Path(CHAIN, "config.json").read_text())["vocab_size"]
COMMON = "--demo --heldout 8 --eval_samples 1 --batch_size 8 --save_every 1 --name walk"


# ---------------------------------------------------------------------------------------------------------------------
# what is checked
# ---------------------------------------------------------------------------------------------------------------------
class Launches:
    """In place of a Triton kernel: checks what it is given, and counts."""

    FLOATS, INTEGERS = ("z", "zt", "known", "kl", "slope", "upstream"), ("y", "mode")
    MOST_BLOCK = {"statistics_kernel": 1024, "sums_kernel": 1024, "gradient_kernel": 2048}

    def __init__(self, name: str, kernel, counts: Counter):
        self.name, self.counts = name, counts
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.launch(grid, args, options)

    def launch(self, grid: tuple[int, ...], args: tuple, options: dict) -> None:
        warps, _ = options.pop("num_warps"), options.pop("enable_fp_fusion")
        x = self.signature.bind(*args, **options).arguments
        given = {name.removesuffix("_ptr"): tensor for name, tensor in x.items() if name.endswith("_ptr")}
        for name, tensor in given.items():
            assert isinstance(tensor, Tensor) and tensor.device == pretend.GPU, f"{self.name}: {name} is on {tensor.device}"
            rows = [x["stride"] if name in ("z", "zt") else x.get("out_stride")]
            if name in self.FLOATS or name in self.INTEGERS:
                dtype = torch.float32 if name in self.FLOATS else torch.int64
                assert tensor.dtype == dtype, f"{self.name}: {name} is {tensor.dtype}"
            if name in ("z", "zt", "out"):
                assert tensor.shape == (x["tokens"], x["vocabulary"]), f"{self.name}: {name} is {list(tensor.shape)}"
                assert [*tensor.stride()] == [*rows, 1], f"{self.name}: {name} has strides {tensor.stride()}"
            else:
                assert tensor.is_contiguous() and tensor.shape[-1] == x["tokens"], f"{self.name}: {name} {tensor.shape}"
        block, parts = x["BLOCK"], grid[1:] or (1,)
        assert x["vocabulary"] == VOCABULARY, f"{self.name}: a head of {x['vocabulary']} entries, not of {VOCABULARY}"
        assert block & (block - 1) == 0 and block <= self.MOST_BLOCK[self.name] and warps * 128 == max(block, 128)
        assert grid[0] == x["tokens"] > 0 and (parts[0] - 1) * block < x["vocabulary"] <= 65535 * block
        assert len(grid) == 1 or parts[0] * block >= x["vocabulary"]
        self.counts[self.name] += 1


def checked_inputs(of):
    """kernels.head.Inputs.of, through which both ways to a loss go: hidden states and whole heads in bf16."""
    def checked(*args):
        inputs = of(*args)
        models = [(inputs.hidden, inputs.head), *zip(inputs.teacher[::2], inputs.teacher[1::2])]
        for hidden, weight in models:
            assert hidden.dtype == weight.dtype == torch.bfloat16 and hidden.device == weight.device == pretend.GPU
            assert len(weight) == VOCABULARY, f"a head of {len(weight)} entries, not of {VOCABULARY}"
        return inputs

    return checked


def checked_forward(forward):
    """Policy.forward: what a loss is given is on the GPU, in fp32 or an index."""
    def checked(self, micro, loss=None, inputs=None, *args, **kwargs):
        for name, x in (inputs._asdict() if inputs else {}).items():
            if isinstance(x, Tensor):
                assert x.device == pretend.GPU, f"the loss's input {name} is on {x.device}"
                assert x.dtype in (torch.float32, torch.int64), f"the loss's input {name} is {x.dtype}, not fp32"
        return forward(self, micro, loss, inputs, *args, **kwargs)

    return checked


def look_at_state(state: dict, **_) -> None:
    """In place of dcp.save for several ranks: every tensor is a rank's share, on its GPU, in fp32."""
    tensors = [x for x in tree_leaves(state) if isinstance(x, Tensor) and x.ndim]
    assert tensors and all(isinstance(x, DTensor) and x.to_local().device == pretend.GPU for x in tensors)
    assert {x.dtype for x in tensors} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# what is made up
# ---------------------------------------------------------------------------------------------------------------------
def responses(decode):
    """HFSampler.decode: three tokens of an engine's first call for real, then made-up responses of different lengths."""
    rng, walked = random.Random(0), set()

    def made_up(self, prompts, n, uniforms, *settings) -> tuple[list[list[int]], list[list[float]]]:
        if self not in walked:
            decode(self, prompts, n, uniforms[:, :3], *settings)
            walked.add(self)
        lengths = [rng.randint(2, min(16, uniforms.shape[1])) for _ in range(len(uniforms))]
        ids = [[rng.randint(5, 30) for _ in range(length - 1)] + [self.ends[0]] for length in lengths]
        return ids, [[0.0] * length for length in lengths]

    return made_up


def verdicts(self, problems, texts) -> list[Verdict]:
    """Every other response is right: each group has a signal."""
    return [Verdict(float(i % 2), "said") for i, _ in enumerate(texts)]


# ---------------------------------------------------------------------------------------------------------------------
# mistakes, to see that they are found
# ---------------------------------------------------------------------------------------------------------------------
def on_the_cpu(patch) -> None:
    """Indices and targets that are left on the CPU. (Inputs of a loss that were would be moved by FSDP.)"""
    patch(microbatches, "as_long", lambda values, device: torch.tensor(values, dtype=torch.long))


def cast_to_bf16(patch) -> None:
    """FSDP that casts what a forward is given."""
    patch(policy, "MixedPrecisionPolicy", lambda **settings: MixedPrecisionPolicy(**settings | {"cast_forward_inputs": True}))


def head_of_a_shard(patch) -> None:
    """A head that is taken from a rank's share."""
    hidden_states = policy.Policy.hidden_states

    def whole_no_more(self, micro):
        weight = self.lm.get_output_embeddings().weight
        share = SimpleNamespace(weight=weight.chunk(dist.get_world_size())[0])
        self.lm.get_output_embeddings = lambda: share
        return hidden_states(self, micro)

    patch(policy.Policy, "hidden_states", whole_no_more)


MISTAKES = {mistake.__name__: mistake for mistake in (on_the_cpu, cast_to_bf16, head_of_a_shard)}


# ---------------------------------------------------------------------------------------------------------------------
# walking
# ---------------------------------------------------------------------------------------------------------------------
def two_layers(folder: str) -> None:
    """The embedded model with two of its four layers: half the operations."""
    layers = AutoConfig.from_pretrained(CHAIN).layer_types[:2]
    lm = AutoModelForCausalLM.from_pretrained(CHAIN, num_hidden_layers=2, layer_types=layers)
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHAIN).save_pretrained(folder)


def walk(line: str, world: int, out: str) -> dict:
    """Run a main; → its launches, its waits by line, its CPU seconds, and how it failed."""
    mistake, _, command = line.rpartition(": ")
    name, *flags = shlex.split(command)
    module = importlib.import_module(name)
    args = parse(module.Args, module.presets, [*shlex.split(COMMON), *flags, "--out", f"{out}/{mistake}{name}", "--model", f"{out}/model"])
    launches, began, failed = Counter(), time.process_time(), ""
    with ExitStack() as stack, pretend.Pretend() as pretended:
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))
        patch(run, "rendezvous", lambda: (None, 0, world))
        patch(dist, "init_process_group", pretend.group_of(world))
        patch(sampler.HFSampler, "decode", responses(sampler.HFSampler.decode))
        patch(Verifier, "__call__", verdicts)
        patch(head.Inputs, "of", checked_inputs(head.Inputs.of))
        patch(policy.Policy, "forward", checked_forward(policy.Policy.forward))
        for kernel in Launches.MOST_BLOCK:
            patch(rows_triton, kernel, Launches(kernel, getattr(rows_triton, kernel), launches))
        if world > 1:
            patch(checkpoints.dcp, "save", look_at_state)
        if mistake:
            MISTAKES[mistake](patch)
        try:
            module.main(args)
        except (Exception, SystemExit) as error:
            said = str(error).partition("\n")[0]
            failed = "".join(traceback.format_tb(error.__traceback__)) + f"{type(error).__name__}: {said}"
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    seconds = round(time.process_time() - began, 1)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    return {"line": line, "launches": launches, "waits": pretended.waits, "seconds": seconds, "failed": failed, "cudnn": cudnn}


def main(world: int, lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as out:
        two_layers(f"{out}/model")
        pretend.install()
        for line in lines:
            print(json.dumps(walk(line, world, out)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

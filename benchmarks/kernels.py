"""kernels/ beside its rivals: time over the bare matrix products, extra memory, error of value and gradient.

    python benchmarks/kernels.py speed      # minutes; on a GPU if there is one, else on the CPU at a smaller size
    python benchmarks/kernels.py ladder     # errors from large to tiny divergences, bf16
    python benchmarks/kernels.py top_k      # errors of top-K gradients from fat to thin tails
    python benchmarks/kernels.py profile    # where the time of a KL with a frozen head goes, by operator; CPU
    python benchmarks/kernels.py draw       # tables and figures of the results of the others

Writes results/kernels/. Rivals that are installed take part: TRL (>= 1.16), liger-kernel (>= 0.8.5), and PyTorch's own
full logits, torch.compile and F.linear_cross_entropy. Times are taken in rounds: each contender runs once per round, next to
the bare products of the same shapes. The median of the ratios is reported. The errors are against float64 from the
hidden states on. Only ratios within a run mean anything, and only on a machine without other work.
"""
from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from kernels import head as head_module  # noqa: E402
from kernels.divergence import Divergence  # noqa: E402
from kernels.head import head_loss, token_stats  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Problem(NamedTuple):
    """Leaves of the graph and constants. The loss is the mean over tokens."""

    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D]
    y: Tensor  # [T]
    teacher_hidden: Tensor  # [T, D]; the teacher has the student's head
    task: str

    @property
    def teacher_head(self) -> Tensor:
        return self.head.detach()

    @property
    def beta(self) -> float:
        return 0.5 if self.task == "JSD" else 1.0

    @property
    def divergence(self) -> Divergence:
        return Divergence("jsd", beta=self.beta, top_k=TOP_K if self.task == TOP_K_TASK else 0)


PRODUCTS = {"KL": 4, "KL, frozen head": 3, "JSD": 4, "log p": 3, "scores": 2}  # of the size [T, D]·[D, V]
TOP_K, TOP_K_TASK = 20, "KL of the student's top-20 and tail"  # on the ladder only


def problem(tokens: int, vocabulary: int, width: int, dtype: torch.dtype, task: str, gap: float = 0.05, *,
            peaked: bool = False, seed: int = 0) -> Problem:
    """Logits of standard deviation 1.5, the teacher's hidden states at `gap` times the student's from them. peaked: the
    target's logit is raised until its probability is about 0.7, as a language model's usually is."""
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(vocabulary, width, generator=g) / width**0.5
    hidden = 1.5 * torch.randn(tokens, width, generator=g)
    y = torch.randint(vocabulary, (tokens,), generator=g)
    if peaked:
        hidden += (math.log(vocabulary) + 2) * head[y] / (head[y] ** 2).sum(-1, keepdim=True)
    teacher_hidden = hidden + gap * torch.randn(tokens, width, generator=g)
    hidden, head, teacher_hidden = (x.to(DEVICE, dtype) for x in (hidden, head, teacher_hidden))
    hidden.requires_grad_(task != "scores")
    head.requires_grad_(task not in ("scores", "KL, frozen head"))
    return Problem(hidden, head, y.to(DEVICE), teacher_hidden, task)


# ---------------------------------------------------------------------------------------------------------------------
# the contenders: each takes a Problem and returns the loss, which carries the gradient, or None if it cannot do it
# ---------------------------------------------------------------------------------------------------------------------
def this_head_loss(p: Problem) -> Tensor | None:
    count = len(p.y)
    if p.task == "log p":
        return head_loss(lambda token, _: token.logp / -count, p.hidden, p.head, p.y, None)[0]
    if p.task != "scores":
        return head_loss(lambda token, _: token.kl / count, p.hidden, p.head, p.y, None, p.teacher_hidden,
                         divergence=p.divergence)[0]


def this_token_stats(p: Problem) -> Tensor | None:
    if p.task == "log p":
        return -token_stats(p.hidden, p.head, p.y).logp.mean()
    return token_stats(p.hidden, p.head, p.y, p.teacher_hidden, divergence=p.divergence).kl.mean()


def full_logits(p: Problem) -> Tensor | None:
    """What SDPO (lasgroup/SDPO 229d137, under autocast) and OPSD (siyan-zhao/OPSD 8ae338d) run: logits in the model's
    dtype, log-softmax and all after it in fp32."""
    if p.task == TOP_K_TASK:
        return None
    if p.task == "log p":
        return F.cross_entropy((p.hidden @ p.head.T).float(), p.y)
    student = F.log_softmax((p.hidden @ p.head.T).float(), -1)
    teacher = F.log_softmax((p.teacher_hidden @ p.teacher_head.T).float(), -1)
    if p.task == "scores":  # also the log-probability and the entropy, as the others
        student.gather(-1, p.y[:, None]), (student.exp() * student).sum(-1)
    return divergence(student, teacher, p.beta).mean()


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    if beta == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    m = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
    return (beta * F.kl_div(m, teacher, reduction="none", log_target=True)
            + (1 - beta) * F.kl_div(m, student, reduction="none", log_target=True)).sum(-1)


def full_logits_top_k(p: Problem) -> Tensor | None:
    """SDPO's top-K and tail: the tail's probability is 1 minus that of the K, whose logarithm is kept below −1e-7."""
    if p.task != TOP_K_TASK:
        return None
    z, zt = p.hidden @ p.head.T, p.teacher_hidden @ p.teacher_head.T
    index = z.topk(TOP_K).indices
    student, teacher = (x.gather(-1, index).float() - x.float().logsumexp(-1, keepdim=True) for x in (z, zt))
    mass = (x.logsumexp(-1, keepdim=True).clamp(max=-1e-7) for x in (student, teacher))
    student, teacher = (torch.cat([x, (-m.expm1()).log()], -1) for x, m in zip((student, teacher), mass))
    return divergence(student, teacher, 1.0).mean()


compiled_full_logits = torch.compile(full_logits)


def compiled_chunks(p: Problem) -> Tensor:
    """The compiled full logits of 1,024 tokens at a time (of 256 on a CPU), each chunk's backward at once."""
    size, total = (1024 if DEVICE.type == "cuda" else 256), torch.zeros((), device=DEVICE)
    for i in range(0, len(p.y), size):
        some = slice(i, i + size)
        part = p._replace(hidden=p.hidden[some], y=p.y[some], teacher_hidden=p.teacher_hidden[some])
        loss = compiled_full_logits(part) * (len(part.y) / len(p.y))
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    return total


def trl(p: Problem) -> Tensor | None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if p.task not in ("log p", TOP_K_TASK):
        inputs = p.hidden, p.head, None, p.teacher_hidden, p.teacher_head, None, p.beta
        return ChunkedDivergenceFunction.apply(*inputs)[0].mean()


def liger_chunked(p: Problem) -> Tensor | None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if p.task in ("KL", "JSD", "KL, frozen head"):
        loss = LigerFusedLinearJSDLoss(0.0, 1.0, p.beta, compiled=DEVICE.type == "cuda")
        return loss(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.y)


def liger_fused(p: Problem) -> Tensor | None:
    import liger_kernel.ops.fused_linear_jsd as module

    if DEVICE.type != "cuda":
        if not INTERPRETED:
            raise RuntimeError("its Triton kernels need a GPU")
        # on a CPU it rounds the logits to bf16, which on a GPU it does not: give it the products it has there
        module._project_to_float32 = lambda x, w: x.float() @ w.float().T
    if p.task in ("KL", "JSD", "KL, frozen head"):
        inputs = p.hidden, p.head, p.teacher_hidden, p.teacher_head, None, p.beta
        return module.LigerFusedLinearJSDFunction.apply(*inputs)


def linear_cross_entropy(p: Problem) -> Tensor | None:
    if p.task == "log p":
        return F.linear_cross_entropy(p.hidden, p.head, p.y, options=torch.nn.LinearCrossEntropyOptions())


CONTENDERS: dict[str, Callable[[Problem], Tensor | None]] = {
    "this code, head_loss": this_head_loss,
    "this code, token_stats": this_token_stats,
    "full logits": full_logits,
    "full logits, torch.compile": compiled_full_logits,
    "chunks of logits, torch.compile": compiled_chunks,
    "TRL ChunkedDivergenceFunction": trl,
    "Liger LigerFusedLinearJSDLoss": liger_chunked,
    "Liger fused_linear_jsd": liger_fused,
    "F.linear_cross_entropy": linear_cross_entropy,
}
LADDER = {
    "this code": this_head_loss,
    "TRL ChunkedDivergenceFunction": trl,
    "Liger fused_linear_jsd": liger_fused,
    "Liger LigerFusedLinearJSDLoss": liger_chunked,
    "full logits as in SDPO and OPSD": full_logits,
    "full logits, top-20 and tail as in SDPO": full_logits_top_k,
}


def run(contender: Callable, p: Problem) -> tuple[float, list[Tensor]] | None:
    """(the loss, gradients of what wants one)."""
    leaves = [x for x in (p.hidden, p.head) if x.requires_grad]
    for x in leaves:
        x.grad = None
    loss = contender(p)
    if loss is None:
        return None
    if loss.requires_grad:
        loss.backward()
    return loss.item(), [x.grad for x in leaves]


# ---------------------------------------------------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------------------------------------------------
def truth(p: Problem) -> tuple[float, list[Tensor]]:
    """In float64 from the hidden states on, by the definition."""
    hidden, head = (x.detach().double().requires_grad_(x.requires_grad) for x in (p.hidden, p.head))
    lp = F.log_softmax(hidden @ head.T, -1)
    if p.task == "log p":
        loss = -lp.gather(-1, p.y[:, None]).mean()
    else:
        lq = F.log_softmax(p.teacher_hidden.double() @ p.teacher_head.double().T, -1)
        if p.task == TOP_K_TASK:
            index = lp.topk(TOP_K).indices
            tail = torch.ones_like(lp).scatter(-1, index, 0) > 0
            lp, lq = (torch.cat([x.gather(-1, index), x.where(tail, -torch.inf).logsumexp(-1, keepdim=True)], -1)
                      for x in (lp, lq))
        loss = divergence(lp, lq, p.beta).mean()
    leaves = [x for x in (hidden, head) if x.requires_grad]
    return loss.item(), list(torch.autograd.grad(loss, leaves)) if leaves else []


def errors(got: tuple[float, list[Tensor]], right: tuple[float, list[Tensor]]) -> dict[str, float]:
    """Relative; of the gradients in the Frobenius norm, the largest of them."""
    gradient = [((g.double() - r).norm() / r.norm()).item() for g, r in zip(got[1], right[1])]
    return {"value_error": abs(got[0] / right[0] - 1), "gradient_error": max(gradient, default=float("nan"))}


def products(p: Problem) -> Callable[[], None]:
    """The bare matrix products of a task: logits into memory that is there, gradients into new memory, as for all."""
    with torch.no_grad():
        z = torch.empty(len(p.y), len(p.head), dtype=p.head.dtype, device=DEVICE)

    def go() -> None:
        with torch.no_grad():
            torch.mm(p.hidden, p.head.T, out=z)
            if p.task != "log p":
                torch.mm(p.teacher_hidden, p.head.T, out=z)
            if p.task != "scores":
                p.hidden.grad = z @ p.head
            if p.task in ("KL", "JSD", "log p"):
                p.head.grad = z.T @ p.hidden

    return go


def seconds(go: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    go()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_bytes(go: Callable[[], object], p: Problem) -> int:
    """The most memory in use at a time while `go` runs, beyond what was in use and the gradients it returns."""
    gc.collect()
    for x in (p.hidden, p.head):
        x.grad = None
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        go()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set (Linux)
        before = resident("VmRSS")
        go()
        peak = resident("VmHWM")
    return peak - before - sum(x.grad.nbytes for x in (p.hidden, p.head) if x.grad is not None)


def resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


# ---------------------------------------------------------------------------------------------------------------------
# speed, ladder, draw
# ---------------------------------------------------------------------------------------------------------------------
def speed(args: argparse.Namespace) -> None:
    gpu = DEVICE.type == "cuda"
    tokens, vocabulary = args.tokens or (8192 if gpu else 2048), args.vocabulary or (151_936 if gpu else 49_152)
    rows, dtype = [], torch.bfloat16 if gpu else torch.float32
    for width in args.width or ([2560, 4096] if gpu else [576]):
        for task in PRODUCTS:
            rows += speed_of_task(args, problem(tokens, vocabulary, width, dtype, task),
                                  problem(32, vocabulary, width, dtype, task))
            write(args, "speed", {"tokens": tokens, "vocabulary": vocabulary, "dtype": str(dtype), "rows": rows})


def speed_of_task(args: argparse.Namespace, p: Problem, small: Problem) -> list[dict]:
    right, floor = truth(small), products(p)
    rows, going = [], {}
    for name, contender in CONTENDERS.items():
        row = {"task": p.task, "width": p.hidden.shape[1], "products": PRODUCTS[p.task], "name": name}
        try:
            got = run(contender, small)
            if got is None:
                continue
            row |= errors(got, right)
            run(contender, p)  # compilation, caches
            row["extra_bytes"] = extra_bytes(lambda: run(contender, p), p)
            going[name] = contender
        except (ImportError, RuntimeError) as error:  # a rival that is not here, or cannot run here
            row["cannot"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        rows.append(row)
        print(row, flush=True)
    times: dict[str, list[float]] = {name: [] for name in going}
    floors = []
    floor()
    for _ in range(args.rounds):
        floors.append(seconds(floor))
        for name, contender in going.items():
            times[name].append(seconds(lambda: run(contender, p)))
    for row in rows:
        if row["name"] in times:
            mine = times[row["name"]]
            row |= {"seconds": mine, "floor_seconds": floors, "load": os.getloadavg()[0],
                    "over_floor": statistics.median(a / b for a, b in zip(mine, floors))}
            print(f"{row['task']:>16} {row['name']:<34} {row['over_floor']:.3f} x products", flush=True)
    return rows


def ladder(args: argparse.Namespace) -> None:
    """bf16 hidden states and head, V = 151,936; the teacher comes closer and closer."""
    vocabulary, width, tokens = args.vocabulary or 151_936, (args.width or [512])[0], args.tokens or 16
    if DEVICE.type != "cuda":  # what CUDA gets: dz rounded to bf16 for the products
        head_module.dz_dtype = lambda hidden: hidden.dtype
    rows = []
    for task in ("KL", "JSD", TOP_K_TASK):
        for gap in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
            p = problem(tokens, vocabulary, width, torch.bfloat16, task, gap, peaked=True)
            right = truth(p)
            for name, contender in LADDER.items():
                if INTERPRETED != (name == "Liger fused_linear_jsd") and DEVICE.type != "cuda":
                    continue  # without a GPU, Liger's Triton kernels run in a process of the interpreter's
                row = {"task": task, "name": name, "gap": gap, "divergence": right[0]}
                try:
                    got = run(contender, p)
                except ImportError as error:
                    row["cannot"] = str(error)
                else:
                    if got is None:
                        continue
                    row |= errors(got, right)
                rows.append(row)
                print(row, flush=True)
    if DEVICE.type != "cuda" and not INTERPRETED:
        again = [sys.executable, __file__, "ladder", "--to_stdout", *sys.argv[2:]]
        child = subprocess.run(again, check=True, text=True,
                               stdout=subprocess.PIPE, env=os.environ | {"TRITON_INTERPRET": "1"})
        rows += json.loads(child.stdout.splitlines()[-1])
    if args.to_stdout:
        print(json.dumps(rows))
    else:
        write(args, "ladder", {"tokens": tokens, "vocabulary": vocabulary, "width": width, "dtype": "bfloat16",
                               "rows": rows})


# ---------------------------------------------------------------------------------------------------------------------
# top-K: the gradient as the student's tail gets thinner
# ---------------------------------------------------------------------------------------------------------------------
TAILS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
TOP_K_DIVERGENCES = {
    "reverse": Divergence("reverse_kl"),
    "forward": Divergence("forward_kl"),
    "jsd": Divergence("jsd", beta=0.5),
    "mixed": Divergence("mixed_kl", beta=0.5),
    "clipped": Divergence("forward_kl", clip=0.05),
}


class Sure(NamedTuple):
    """One token per tail of TAILS: a student with all other mass on K entries, and a teacher."""

    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D]
    y: Tensor  # [T]
    teacher_hidden: Tensor  # [T, D]


def sure(vocabulary: int, k: int, peaked: bool, width: int = 32, seed: int = 0) -> Sure:
    """Two coordinates of the hidden states stand for the likeliest entry and for the K; the others
    are noise. A peaked student has e^10 times as much on its mode as on others of the K."""
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) / width**0.5
    head[:, :2] = 0
    members = torch.randperm(vocabulary, generator=g)[:k]
    head[members, 1] = 1
    head[members[0], 0] = 1
    hidden = torch.randn(len(TAILS), width, generator=g, dtype=torch.float64)
    hidden[:, 0] = 10.0 if peaked else 0.0
    hidden[:, 1] = 0
    z = hidden @ head.T
    outside = torch.ones(vocabulary, dtype=torch.bool).index_fill(0, members, False)
    lead = z[:, members].logsumexp(-1) - z[:, outside].logsumexp(-1)
    tails = torch.tensor(TAILS, dtype=torch.float64)
    hidden[:, 1] = torch.log((1 - tails) / tails) - lead
    teacher = hidden + 0.2 * torch.randn(len(TAILS), width, generator=g, dtype=torch.float64)
    y = members[0].expand(len(TAILS))
    return Sure(hidden.float().requires_grad_(), head.float(), y, teacher.float())


def top_k_truth(p: Sure, d: Divergence) -> Tensor:
    """dz [T, V] of the divergence, float64 from the hidden states on, by autograd."""
    head = p.head.double()
    z = (p.hidden.detach().double() @ head.T).requires_grad_()
    lp = z.log_softmax(-1)
    lq = (p.teacher_hidden.double() @ head.T).log_softmax(-1)
    index = lp.topk(d.top_k).indices
    outside = torch.ones_like(lp).scatter(-1, index, 0) > 0
    a, b = (torch.cat([x.gather(-1, index),
                       x.where(outside, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for x in (lp, lq))
    forward, reverse = b.exp() * (b - a), a.exp() * (a - b)
    if d.kind == "jsd":
        m = ((a.exp() + b.exp()) / 2).log()
        kl = (b.exp() * (b - m) + a.exp() * (a - m)) / 2
    elif d.kind == "reverse_kl":
        kl = reverse
    elif d.kind == "forward_kl":
        kl = forward.clamp(max=d.clip or math.inf)
    else:
        kl = d.beta * reverse + (1 - d.beta) * forward
    return torch.autograd.grad(kl.sum(), z)[0]


def top_k_dz(p: Sure, d: Divergence, dtype: torch.dtype) -> Tensor:
    """dz [T, V] of the kernels' own logits, each entry rounded to dtype."""
    z, zt = p.hidden.detach() @ p.head.T, p.teacher_hidden @ p.head.T
    chunk = head_module.Chunk(z, zt, p.y, head_module.Settings((1.0,), d, 1.0))
    zeros = torch.zeros(len(p.y))
    dz = torch.empty_like(z, dtype=dtype)
    chunk.gradient(head_module.Upstream(zeros, None, zeros + 1, zeros), dz)
    return dz.double()


def top_k(args: argparse.Namespace) -> None:
    rows = []
    for vocabulary in ([args.vocabulary] if args.vocabulary else [1_024, 151_936]):
        for k in (1, 20, 100):
            for peaked in (True, False) if k > 1 else (True,):
                p = sure(vocabulary, k, peaked)
                for name, d in TOP_K_DIVERGENCES.items():
                    rows += top_k_rows(p, d._replace(top_k=k), name, peaked)
                    print(rows[-1], flush=True)
    write(args, args.name, {"rows": rows})


def top_k_rows(p: Sure, d: Divergence, name: str, peaked: bool) -> list[dict]:
    right = top_k_truth(p, d)
    right_hidden, rows = right @ p.head.double(), []
    for dtype in (torch.float32, torch.bfloat16):
        dz = top_k_dz(p, d, dtype)
        error = (dz - right).norm(dim=-1) / right.norm(dim=-1)
        off = dz @ p.head.double() - right_hidden
        hidden_error = off.norm(dim=-1) / right_hidden.norm(dim=-1)
        for tail, of_dz, of_hidden in zip(TAILS, error.tolist(), hidden_error.tolist()):
            rows.append({"vocabulary": len(p.head), "k": d.top_k, "peaked": peaked,
                         "divergence": name, "dz": str(dtype).removeprefix("torch."), "tail": tail,
                         "dz_error": of_dz, "d_hidden_error": of_hidden})
    return rows


def top_k_worst(rows: list[dict], field: str, **only) -> dict[float, float]:
    """The largest error at each tail."""
    worst: dict[float, float] = {}
    for row in rows:
        if all(row[key] == value for key, value in only.items()):
            worst[row["tail"]] = max(row[field], worst.get(row["tail"], 0.0))
    return worst


def top_k_table(numbers: dict) -> list[str]:
    sizes = sorted({row["vocabulary"] for row in numbers["rows"]})
    lines = ["Relative error of dz / of d_hidden of one token, the largest over vocabularies of "
             + " and ".join(f"{size:,}" for size in sizes) + " and over peaked and flat students. "
             "Student's top K and tail; the truth is float64 from the hidden states. bfloat16 is "
             "dz rounded as on CUDA, on a CPU."]
    for dtype in ("float32", "bfloat16"):
        tails = TAILS[::-1]
        heads = " | ".join(f"{t:.0e}" for t in tails)
        lines += ["", f"| dz in {dtype}, student's tail: | {heads} |", "|---" * (len(tails) + 1) + "|"]
        for name in TOP_K_DIVERGENCES:
            for k in (1, 20, 100):
                only = {"dz": dtype, "divergence": name, "k": k}
                of_dz = top_k_worst(numbers["rows"], "dz_error", **only)
                of_hidden = top_k_worst(numbers["rows"], "d_hidden_error", **only)
                cells = [f"{of_dz[t]:.0e} / {of_hidden[t]:.0e}" for t in tails]
                lines.append(f"| {name}, K = {k} | " + " | ".join(cells) + " |")
    return lines


def top_k_figure(after: dict, before: dict, path: Path) -> None:
    """The worst divergence of each K, before and after, dz in fp32 and in bf16."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharex=True, sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16")):
        for k, color, marker in ((1, "C0", "o"), (20, "C1", "s"), (100, "C2", "^")):
            for numbers, line in ((before, "--"), (after, "-")):
                worst = top_k_worst(numbers["rows"], "dz_error", dz=dtype, k=k)
                when = "before" if numbers is before else "now"
                axis.plot(list(worst), list(worst.values()), line, color=color, marker=marker,
                          markersize=5, label=f"K = {k}, {when}")
        axis.set(xscale="log", yscale="log", title=f"dz in {dtype}",
                 xlabel="student's mass outside of the K")
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of a token's dz, worst divergence")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncol=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=150)


def write(args: argparse.Namespace, what: str, numbers: dict) -> None:
    packages = {}
    for name in ("torch", "triton", "trl", "liger-kernel"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {"command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]), "commit": head.stdout.strip(),
             "device": device(), "threads": torch.get_num_threads(), "python": platform.python_version(),
             "packages": packages}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{what}-{DEVICE.type}.json").write_text(json.dumps(about | numbers, indent=1) + "\n")


def device() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    model = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return f"{model[0].split(':')[1].strip()}, {os.cpu_count()} cores"


KINDS = {  # of operators
    "matrix products": ("addmm", "mm"), "exponentials and logarithms": ("exp", "expm1", "log", "log1p", "xlogy"),
    "bounds": ("clamp",), "sums and maxima": ("sum", "amax", "argmax"),
    "other arithmetic": ("mul", "sub", "add", "div", "addcmul", "neg"),
}


def profile(args: argparse.Namespace) -> None:
    """The self time of the operators of `head_loss` with a frozen head, one thread."""
    from torch.profiler import ProfilerActivity

    torch.set_num_threads(1)
    p = problem(args.tokens or 2048, args.vocabulary or 49_152, (args.width or [576])[0], torch.float32, "KL, frozen head")
    this_head_loss(p).backward()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
        this_head_loss(p).backward()
    seconds = dict.fromkeys([*KINDS, "the rest: views, allocation, Python"], 0.0)
    for event in seen.key_averages():
        operator = event.key.removeprefix("aten::").rstrip("_")
        kind = next((kind for kind, names in KINDS.items() if operator in names), list(seconds)[-1])
        seconds[kind] += event.self_cpu_time_total / 1e6
    products = seconds["matrix products"]
    shares = {kind: round(value / products, 3) for kind, value in seconds.items()}
    write(args, "profile", {"seconds": seconds, "over the products": shares})
    print(shares)


def draw(args: argparse.Namespace) -> None:
    for path in sorted(args.out.glob("*.json")):
        numbers = json.loads(path.read_text())
        if path.name.startswith(("topk-training", "top_k_before", "profile")):
            continue
        if path.name.startswith("speed"):
            lines = speed_table(numbers)
        elif path.name.startswith("top_k"):
            lines = top_k_table(numbers)
        else:
            lines = ladder_table(numbers)
        about = (f"{numbers['device']}; " + ", ".join(f"{k} {v}" for k, v in numbers["packages"].items() if v)
                 + f"; commit {numbers['commit']}; `{numbers['command']}`")
        path.with_suffix(".md").write_text("\n".join([*lines, "", about]) + "\n")
        print(path.with_suffix(".md").read_text())
        if path.name.startswith("ladder"):
            ladder_figure(numbers, path.with_suffix(".png"))
        if path.name.startswith("top_k"):
            before = path.with_name(path.name.replace("top_k", "top_k_before"))
            top_k_figure(numbers, json.loads(before.read_text()), path.with_suffix(".png"))


def speed_table(numbers: dict) -> list[str]:
    lines = [f"T = {numbers['tokens']:,}, V = {numbers['vocabulary']:,}, {numbers['dtype'].removeprefix('torch.')}. "
             "Time is a multiple of the task's bare matrix products in the same round (median of the rounds); memory "
             "is beyond the inputs and the gradients that are returned; errors are relative to float64.", "",
             "| task | D | | time | extra memory | value error | gradient error |", "|---|---|---|---|---|---|---|"]
    for row in numbers["rows"]:
        if "over_floor" in row:
            gradient = row["gradient_error"]
            cells = [f"{row['over_floor']:.2f} × {row['products']} products", f"{row['extra_bytes'] / 2**20:,.0f} MiB",
                     f"{row['value_error']:.1e}", "" if math.isnan(gradient) else f"{gradient:.1e}"]
        else:
            cells = [row["cannot"], "", "", ""]
        lines.append(f"| {row['task']} | {row['width']} | {row['name']} | " + " | ".join(cells) + " |")
    return lines


def ladder_table(numbers: dict) -> list[str]:
    lines = [f"bf16 hidden states and head, {numbers['tokens']} tokens, V = {numbers['vocabulary']:,}, "
             f"D = {numbers['width']}. Relative error of the mean divergence / of its gradient (dX or dW, the larger; "
             "bf16 gradients cannot be better than 0.2 %)."]
    for task, title in (("KL", "KL(student‖teacher)"), ("JSD", "JSD, β = ½"), (TOP_K_TASK, TOP_K_TASK)):
        rows = [r for r in numbers["rows"] if r["task"] == task]
        rungs = sorted({r["divergence"] for r in rows})
        lines += ["", f"| {title} | "
                  + " | ".join(f"{x:.1e}" for x in rungs) + " |", "|---" * (len(rungs) + 1) + "|"]
        for name in dict.fromkeys(r["name"] for r in rows):
            cells = [f"{r['value_error']:.1e} / {r['gradient_error']:.1e}" if "value_error" in r else r["cannot"]
                     for r in sorted(rows, key=lambda r: r["divergence"]) if r["name"] == name]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def ladder_figure(numbers: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True, sharey=True)
    rows = [r for r in numbers["rows"] if r["task"] == "KL" and "value_error" in r]
    markers = dict(zip(LADDER, "oDs^v"))
    for name in list(LADDER)[:5]:
        mine = sorted((r for r in rows if r["name"] == name), key=lambda r: r["divergence"])
        for axis, field in zip(axes, ("value_error", "gradient_error")):
            axis.plot([r["divergence"] for r in mine], [r[field] for r in mine], marker=markers[name], label=name,
                      linewidth=2.5 if name == "this code" else 1.2, zorder=3 if name == "this code" else 2)
    for axis, title in zip(axes, ("error of the value", "error of the gradient")):
        axis.set(xscale="log", yscale="log", title=title, xlabel="KL(student‖teacher), nats a token")
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[1].axhline(2**-9, color="0.6", linewidth=0.8, linestyle="--")
    axes[1].annotate("bf16 rounding", (1, 2**-9), (-4, -6), xycoords=("axes fraction", "data"), textcoords="offset points",
                     ha="right", va="top", color="0.4", fontsize=9)
    axes[0].set_ylabel("relative to float64 from the hidden states")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "ladder", "top_k", "profile", "draw"])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--width", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=10 if DEVICE.type == "cuda" else 3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kernels")
    parser.add_argument("--name", default="top_k", help="top_k: of the file it writes")
    parser.add_argument("--to_stdout", action="store_true", help="ladder: print JSON instead of writing it")
    arguments = parser.parse_args()
    {"speed": speed, "ladder": ladder, "top_k": top_k, "profile": profile, "draw": draw}[arguments.what](arguments)

"""Where a privileged teacher's credit lies: HSD's Fig. 1, Fig. 5 and Tables 4 and 5 in small.

    python benchmarks/localisation.py                                          # the embedded model
    python benchmarks/localisation.py --model MODEL --task gsm8k --questions 64 --max_tokens 512

Samples groups, takes the failed responses that have a successful peer in their group, and reads
each response behind four prompts: the student's own, with the answer (OPSD on the bare answer),
with the worked solution (OPSD), and with answer and peer (HSD). Credit is A_t = log π(o_t |
context) − log π(o_t | question) at the sampled token, Eq. 2. "hybrid" is the mean of the answer's
credit and the GRPO advantage of the response: one reading of GRPO+OPSD, which the paper does not
define.

Mass is the share of Σ|A| that lies within w tokens of the first divergence τ from the peer. It is
given as the share of the whole response and of the ±50 tokens about τ, because the paper does not
say which. Writes results/localisation/NAME.{json,png,md}.
"""
from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import tyro
from torch import Tensor

import hsd
from common import require
from common.chat import as_text, chat_ids, load_tokenizer
from common.policy import Policy, load_policy, score
from common.rollouts import Group
from common.sampler import HFSampler, Rollout
from common.settings import Setup
from common.tasks import Problem, load_task
from common.verifiers.pool import Verifier

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {  # what the teacher sees
    "peer": "peer: the answer and a peer (HSD)",
    "answer": "answer: the bare answer (OPSD)",
    "solution": "solution: the worked solution (OPSD)",
    "hybrid": "hybrid: mean of the answer's credit and GRPO's advantage (a reading of GRPO+OPSD)",
}
WIDTHS = (2, 4, 8, 16, 32)  # w: tokens on each side of τ
BINS = 20  # of t/|o|


@dataclass
class Args:
    name: str = "chain"  # name of the result files
    model: str = "assets/chain"  # folder or hub id
    task: str = "chain"  # task, as for the method files
    data_dir: str = ""  # folder of the named sets
    questions: int = 256  # groups sampled
    group_size: int = 8  # G
    max_tokens: int = 64  # most tokens per response
    failures: int = 512  # failed responses with a peer, at most (the paper: 512)
    token_budget: int = 16384  # padded tokens per forward pass
    seed: int = 0  # random seed of questions and samples


class Case(NamedTuple):
    """A failed response that has a peer."""

    problem: Problem
    failed: Rollout
    peer: Rollout
    tau: int  # the first token at which the two differ
    rate: float  # of success in the group
    advantage: float  # GRPO's, of the failed response


def main(args: Args) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args.model)
    groups = sample(tokenizer, device, args)
    cases = cases_of(groups)[: args.failures]
    require(
        cases,
        "no failed response has a successful peer: raise --questions or --group_size, or take "
        "problems that the model solves now and then",
    )
    credit = credit_of(cases, tokenizer, device, args)
    result = {**about(args, device), **sizes(cases), "kinds": {}}
    for kind, values in credit.items():
        result["kinds"][kind] = measures(values, cases)
    folder = ROOT / "results" / "localisation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    (folder / f"{args.name}.md").write_text(table(result))
    draw(result, folder / f"{args.name}.png")
    print(table(result))
    dist.destroy_process_group()


def about(args: Args, device: torch.device) -> dict:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    command = "python benchmarks/localisation.py " + " ".join(sys.argv[1:])
    return {"command": command, "args": asdict(args), "commit": commit, "hardware": hardware}


# --------------------------------------------------------------------------------------------------
# the responses and their credit
# --------------------------------------------------------------------------------------------------
def sample(tokenizer, device: torch.device, args: Args) -> list[Group]:
    """A judged group for each question."""
    problems = load_task(args.task, heldout=1, data_dir=args.data_dir).train[: args.questions]
    prompts = [chat_ids(tokenizer, problem.messages) for problem in problems]
    sampler = HFSampler(args.model, tokenizer, device)
    groups = sampler.sample(prompts, args.group_size, seed=(args.seed,), keys=range(len(prompts)),
                            max_tokens=args.max_tokens)
    asked = [problem for problem in problems for _ in range(args.group_size)]
    verifier = Verifier()
    verdicts = verifier(asked, [rollout.text for group in groups for rollout in group])
    verifier.close()
    found = []
    for q, (problem, group) in enumerate(zip(problems, groups)):
        own = verdicts[q * args.group_size : (q + 1) * args.group_size]
        found.append(Group(problem, group, own))
    return found


def cases_of(groups: list[Group]) -> list[Case]:
    cases = []
    for q, group in enumerate(groups):
        rng = random.Random(q)
        rewards = [verdict.reward for verdict in group.verdicts]
        rate = sum(rewards) / len(rewards)
        for i, reward in enumerate(rewards):
            j = hsd.choose_peer(group, i, "uniform", rng)  # draws for successful responses too
            if reward == 1 or j is None:
                continue
            failed, peer = group.rollouts[i], group.rollouts[j]
            tau = hsd.divergence_point(failed.response_ids, peer.response_ids)
            if tau is not None:
                advantage = (reward - rate) / torch.tensor(rewards).std().item()
                cases.append(Case(group.problem, failed, peer, tau, rate, advantage))
    return cases


def credit_of(cases: list[Case], tokenizer, device: torch.device,
              args: Args) -> dict[str, list[Tensor]]:
    """A_t of every case, [|o|], by what the teacher sees."""
    policy = load_policy(args.model, device, Setup())
    student = log_probs(policy, [case.failed.prompt_ids for case in cases], cases, args)
    kinds = ["peer", "answer"]
    if all(case.problem.solution is not None for case in cases):
        kinds.append("solution")
    credit = {}
    for kind in kinds:
        prompts = [teacher_prompt(case, kind, tokenizer) for case in cases]
        teacher = log_probs(policy, prompts, cases, args)
        credit[kind] = [(a - b).cpu() for a, b in zip(teacher, student)]  # Eq. 2
    hybrid = []
    for values, case in zip(credit["answer"], cases):
        hybrid.append(0.5 * values + 0.5 * case.advantage)
    return {**credit, "hybrid": hybrid}


def log_probs(policy: Policy, prompts: list[list[int]], cases: list[Case],
              args: Args) -> list[Tensor]:
    """log π of each token of the failed responses behind these prompts, a [|o|] for each."""
    responses = [case.failed.response_ids for case in cases]
    return score(policy, prompts, responses, Setup(token_budget=args.token_budget))


def teacher_prompt(case: Case, kind: str, tokenizer) -> list[int]:
    peer = as_text(tokenizer, case.peer.text)
    chat = hsd.teacher_chat(case.problem, peer, hsd.Args(context=kind))
    return chat_ids(tokenizer, chat)


# --------------------------------------------------------------------------------------------------
# the measures
# --------------------------------------------------------------------------------------------------
def sizes(cases: list[Case]) -> dict:
    taus = sorted(case.tau for case in cases)
    tokens = sum(len(case.failed.response_ids) for case in cases)
    return {
        "failures": len(cases),
        "median_tau": taus[len(taus) // 2],
        "mean_length": tokens / len(cases),
    }


def measures(credit: list[Tensor], cases: list[Case]) -> dict:
    """What the result file keeps of one kind of teacher."""
    taus = [case.tau for case in cases]
    found = [localisation(values, tau) for values, tau in zip(credit, taus)]
    total = sum(values.abs().sum() for values in credit).item()
    out = {"mean_abs": total / sum(map(len, credit))}
    names = ["credit/at_tau", "credit/before_tau", "credit/after_tau"]
    for w in WIDTHS:
        names += [f"mass/w{w}", f"mass50/w{w}"]
    for name in names:
        out[name] = mean(name, found)
    bins = {"easy": [], "medium": [], "hard": []}
    for row, case in zip(found, cases):
        bins[difficulty(case.rate)].append(row)
    for name, rows in bins.items():
        out[f"peak/{name}"] = [mean("credit/at_tau", rows), len(rows)]
    out["by_offset"] = by_offset(credit, taus)
    out["by_position"] = by_position(credit)
    return out


def mean(name: str, rows: list[dict[str, float]]) -> float:
    """Over the rows that have this entry; 0 if none has."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / max(1, len(values))


def difficulty(rate: float) -> str:
    """Of a question, by its group's rate of success."""
    if rate > 0.5:
        return "easy"
    if rate >= 0.2:
        return "medium"
    return "hard"


def localisation(credit: Tensor, tau: int) -> dict[str, float]:
    """How |A_t| (Eq. 2; credit [|o|], nats) of one response is distributed about τ (§5.3, App. E.3,
    Table 5).

    mass/w8 is the share of the whole response's |A| that lies within 8 tokens of τ; mass50/w8 the
    share of what lies within 50 tokens of τ: the paper does not state its denominator, and its own
    numbers fit the second. If teacher and student agree at all of these tokens, the share has no
    entry.
    """
    size = credit.abs()
    out = {"credit/at_tau": size[tau]}
    if tau > 0:
        out["credit/before_tau"] = size[:tau].mean()
    if tau + 1 < len(size):
        out["credit/after_tau"] = size[tau + 1 :].mean()
    offset = (torch.arange(len(size)) - tau).abs()
    total = size.sum()
    near = size[offset <= 50].sum()
    for w in WIDTHS:
        inside = size[offset <= w].sum()
        if total > 0:
            out[f"mass/w{w}"] = inside / total
        if near > 0:
            out[f"mass50/w{w}"] = inside / near
    return {name: float(value) for name, value in out.items()}


def by_offset(credit: list[Tensor], taus: list[int], before: int = 30,
              after: int = 50) -> list[list[float]]:
    """[offset from τ, mean |A|, responses] for every offset that some response has."""
    rows = []
    for offset in range(-before, after + 1):
        values = []
        for a, tau in zip(credit, taus):
            if 0 <= tau + offset < len(a):
                values.append(a[tau + offset].abs().item())
        if values:
            rows.append([offset, sum(values) / len(values), len(values)])
    return rows


def by_position(credit: list[Tensor]) -> list[float]:
    """Mean |A| in the bins of t/|o| (Fig. 1)."""
    sums, counts = torch.zeros(BINS), torch.zeros(BINS)
    for a in credit:
        bin_of = torch.arange(len(a)) * BINS // len(a)
        sums.index_add_(0, bin_of, a.abs())
        counts.index_add_(0, bin_of, torch.ones(len(a)))
    return (sums / counts.clamp(min=1)).tolist()


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------
def table(result: dict) -> str:
    lines = [
        f"{result['failures']} failed responses with a peer, mean length "
        f"{result['mean_length']:.1f} tokens, median τ {result['median_tau']}. "
        f"`{result['command'].strip()}`, commit {result['commit']}, {result['hardware']}.",
        "",
        *table_of_credit(result["kinds"]),
        "",
        *table_of_peaks(result["kinds"]),
    ]
    return "\n".join(lines) + "\n"


def table_of_credit(kinds: dict[str, dict]) -> list[str]:
    head = ["teacher sees", "mean \\|A\\|", "at τ", "before τ", "after τ"]
    head += [f"±{w}" for w in WIDTHS]
    head += [f"±{w} of ±50" for w in WIDTHS]
    lines = [row_of(head), "|" + "---|" * len(head)]
    for kind, row in kinds.items():
        cells = [kind]
        for name in ("mean_abs", "credit/at_tau", "credit/before_tau", "credit/after_tau"):
            cells.append(f"{row[name]:.3f}")
        for mass in ("mass", "mass50"):
            cells += [f"{100 * row[f'{mass}/w{w}']:.0f} %" for w in WIDTHS]
        lines.append(row_of(cells))
    return lines


def table_of_peaks(kinds: dict[str, dict]) -> list[str]:
    lines = ["| peak \\|A_τ\\| | easy (pass > 0.5) | medium | hard (< 0.2) |", "|---|---|---|---|"]
    for kind, row in kinds.items():
        cells = [kind]
        for name in ("easy", "medium", "hard"):
            peak, count = row[f"peak/{name}"]
            cells.append(f"{peak:.2f} ({count})")
        lines.append(row_of(cells))
    return lines


def row_of(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    along, about_tau, mass = axes
    places = [(b + 0.5) / BINS for b in range(BINS)]
    for i, (kind, row) in enumerate(result["kinds"].items()):
        dashes = "--" if kind == "hybrid" else "-"
        style = {"label": SHOWN[kind], "linestyle": dashes, "linewidth": 2.6 - 0.5 * i}
        along.plot(places, row["by_position"], **style)
        enough = 0.1 * result["failures"]
        offsets, means, _ = zip(*(r for r in row["by_offset"] if r[2] >= enough))
        about_tau.plot(offsets, means, **style)
        shares = [row[f"mass/w{w}"] for w in WIDTHS]
        mass.plot(range(len(WIDTHS)), shares, marker="osD^"[i], markersize=5, **style)
    along.set(title="|A| along the response", xlabel="t / |o|", ylabel="mean |A|, nats")
    along.set_yscale("log")
    about_tau.set(title="|A| about the first divergence τ", xlabel="t − τ", ylabel="mean |A|, nats")
    about_tau.axvline(0, color="grey", linewidth=0.8, zorder=1)
    mass.set(title="share of Σ|A| within ±w of τ", xlabel="w", ylabel="of the whole response")
    mass.set_ylim(0, 1.02)
    mass.set_xticks(range(len(WIDTHS)), [str(w) for w in WIDTHS])
    for axis in axes:
        axis.grid(alpha=0.3)
    names = along.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncol=2, frameon=False)
    title = "failed responses with a successful peer, by what the teacher sees"
    figure.suptitle(f"{result['args']['name']}: {title}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))

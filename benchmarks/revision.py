"""What the SD-Zero paper reports of a run: budget, phrases of self-revision, self-localisation.

    python sdzero.py --demo --name zero
    python benchmarks/revision.py runs/zero

Prints the budget (App. C.2) and the rate of phrases (Fig. 6); writes revision.json,
self_localisation.json and self_localisation.png (Fig. 4) into the run's folder. Self-localisation
is measured at the start of phase 2, when student and teacher are both θ_SRT, which the run's last
checkpoint holds.
"""
from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sdzero  # noqa: E402
from common import checkpoints, require  # noqa: E402
from common.chat import chat_ids, load_tokenizer  # noqa: E402
from common.microbatches import micro_batches  # noqa: E402
from common.policy import Policy, full_weights, load_policy, local  # noqa: E402
from common.sampler import HFSampler  # noqa: E402
from common.settings import Setup  # noqa: E402
from common.tasks import load_task  # noqa: E402
from common.verifiers.pool import Verifier  # noqa: E402
from kernels.head import token_stats  # noqa: E402

KEYWORDS = (  # the 27 phrases of the paper's appendix; P_1 has none of them, P_0 two
    "wait", "wait a minute", "hold on", "actually", "on second thought", "oops", "incorrect",
    "my mistake", "i made a mistake", "this is wrong", "that is wrong", "that's wrong",
    "let me check", "let's check", "let me double check", "let's double check",
    "let me recheck", "let's recheck", "let me rethink", "let's rethink",
    "let me recalculate", "let's recalculate", "re-evaluate", "let's re-evaluate",
    "let me correct", "let me start over", "let me try again",
)


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # the folder of a finished run of sdzero.py
    responses: int = 256  # responses for self-localisation; 0: leave it out
    seed: int = 0  # of the responses


def main(args: Args) -> None:
    path = args.run / "args.json"
    require(path.exists(), f"{args.run} is no run's folder: it has no args.json")
    settings = json.loads(path.read_text())
    lines = (args.run / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    traces, batches, _ = sdzero.read_traces(traces_file(args.run, settings))
    trained = []
    if settings["phase"] != "sd":
        trained = sdzero.select(traces, SimpleNamespace(**settings))
    updates = sum(row.get("phase") == 1 for row in history)
    last_step = history[-1]["step"]
    table = budget_table(settings, history, batches, trained, updates, last_step)
    rates = keyword_rates(args.run, updates)
    print(table)
    for step, rate in rates.items():
        print(f"step {step}: {rate:.3f} of the logged responses hold a phrase of self-revision")
    (args.run / "revision.json").write_text(json.dumps({"budget": table, "keyword_rate": rates}))
    if args.responses > 0 and settings["phase"] != "srt":
        curves = self_localisation(args, settings)
        (args.run / "self_localisation.json").write_text(json.dumps(curves))
        draw_localisation(curves, args.run / "self_localisation.png")


def traces_file(run: Path, settings: dict) -> Path:
    return Path(settings["traces"] or run / "traces.jsonl")


# --------------------------------------------------------------------------------------------------
# the budget
# --------------------------------------------------------------------------------------------------
def budget_table(settings: dict, history: list[dict], batches: list[dict],
                 traces: list[sdzero.Trace], updates: int, last_step: int) -> str:
    """The paper's budget (App. C.2) up to the start, the end of phase 1 and the end: responses and
    tokens that were sampled, tokens that went through a loss, and the outcome. A row includes the
    rows above it.

    As in the paper, the traces count for one pass, whatever --srt_epochs is, and each term counts
    its own tokens, so that y_rev counts twice. In phase 2 student and teacher count.
    """
    scores = {r["step"]: r["heldout/pass@1"] for r in history if "heldout/pass@1" in r}
    generations = sampled = trained = 0
    rows = [("start", generations, sampled, trained, scores.get(0, math.nan))]
    phase_1 = settings["baseline"].upper() or "SRT"
    if updates:
        generations = sum(b["generations"] for b in batches)
        sampled = sum(b["sampled_tokens"] for b in batches)
        trained = sum(sum(sdzero.trace_weights(t, settings["terms"])) for t in traces)
        rows.append((phase_1, generations, sampled, trained, scores.get(updates, math.nan)))
    if last_step > updates:
        phase_2 = [r for r in history if r["step"] >= updates]
        generations += sum(r.get("budget/generations", 0) for r in phase_2)
        sampled += sum(r.get("budget/sampled_tokens", 0) for r in phase_2)
        trained += sum(r.get("budget/loss_tokens", 0) for r in phase_2)
        name = f"{phase_1} + SD" if updates else "SD only"
        rows.append((name, generations, sampled, trained, scores.get(last_step, math.nan)))
    columns = ("generations", "sampled tokens", "loss tokens", "held-out pass@1")
    lines = ["{:9s} {:>12s} {:>15s} {:>12s} {:>16s}".format("", *columns)]
    lines += ["{:9s} {:12,.0f} {:15,.0f} {:12,.0f} {:16.3f}".format(*row) for row in rows]
    if updates:
        passes = "pass" if settings['srt_epochs'] == 1 else "passes"
        lines.append(f"Loss tokens of {phase_1}: of one pass over its traces; the run made "
                     f"{settings['srt_epochs']} {passes}.")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# phrases of self-revision
# --------------------------------------------------------------------------------------------------
def speaks_of_revision(text: str) -> bool:
    """True if a response holds one of KEYWORDS as whole words: "loops" and "waiter" are none.

    >>> speaks_of_revision("Oops. Let’s recheck."), speaks_of_revision("Two nested loops.")
    (True, False)
    """
    phrases = "|".join(map(re.escape, KEYWORDS))
    text = text.replace("’", "'")
    return re.search(rf"\b({phrases})\b", text, re.IGNORECASE) is not None


def keyword_rates(run: Path, updates: int) -> dict[int, float]:
    """Step of phase 2 → share of its logged responses that hold a phrase."""
    found: dict[int, list[bool]] = {}
    file = run / "rollouts.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        row = json.loads(line)
        if row["step"] >= updates:
            found.setdefault(row["step"], []).append(speaks_of_revision(row["response"]))
    return {step: sum(values) / len(values) for step, values in found.items()}


# --------------------------------------------------------------------------------------------------
# self-localisation
# --------------------------------------------------------------------------------------------------
def self_localisation(args: Args, settings: dict) -> dict[int, list[list[float]]]:
    """Verdict → one curve of `localisation` per response with at least 20 tokens."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cpu")
    policy = reviser(args.run, settings["model"], device)
    tokenizer = load_tokenizer(settings["model"])
    sampler = HFSampler(settings["model"], tokenizer, device)
    sampler.load(full_weights(policy))
    task = load_task(
        settings["task"], heldout=settings["heldout"], data_dir=settings["data_dir"],
        fields=settings["fields"], kind=settings.get("kind", ""),
        instruction=settings["instruction"],
    )
    problems = task.train[-args.responses :]
    prompts = [chat_ids(tokenizer, problem.messages, settings["thinking"]) for problem in problems]
    groups = sampler.sample(
        prompts, 1, seed=(args.seed,), keys=range(len(prompts)), top_p=settings["top_p"],
        max_tokens=settings["max_tokens"], temperature=settings["temperature"],
    )
    rollouts = [group[0] for group in groups]
    verifier = Verifier(restarts=sdzero.RESTARTS)
    verdicts = verifier(problems, [rollout.text for rollout in rollouts])
    verifier.close()
    ends = SimpleNamespace(ends=sampler.ends, tokenizer=tokenizer)
    revising = []
    for rollout, verdict in zip(rollouts, verdicts):
        revising.append(sdzero.reviser_prompt(rollout, int(verdict.reward == 1), ends))
    responses = [rollout.response_ids for rollout in rollouts]
    divergence = sdzero.divergence(SimpleNamespace(**settings))
    setup = Setup(token_budget=settings["token_budget"])
    curves: dict[int, list[list[float]]] = {0: [], 1: []}
    for micro in micro_batches(revising, responses, None, setup, device):
        teacher = policy.read(micro)
        with torch.no_grad():
            student = policy.read(micro.with_prompts(prompts, responses))
            stats = token_stats(
                *student, micro.targets, *teacher, divergence=divergence,
                temperature=settings["temperature"],
            )
        for row, kl in micro.split(stats.kl).items():
            if len(kl) >= 20:
                curves[int(verdicts[row].reward == 1)].append(localisation(kl))
    dist.destroy_process_group()
    return curves


def reviser(run: Path, model: str, device: torch.device) -> Policy:
    """θ_SRT, the teacher of the run's last checkpoint."""
    last = checkpoints.last(run)
    require(last is not None, f"{run} has no checkpoint")
    file = run / "reviser.pt"
    dcp_to_torch_save(last / "state", file)
    state = torch.load(file, weights_only=False)["teacher"]
    file.unlink()
    policy = load_policy(model, device, Setup())
    own = dict(policy.named_parameters(remove_duplicate=False))  # tied weights are saved twice
    whole = own.keys() >= state.keys()
    require(whole, f"{run} was trained with LoRA: its reviser is not read here")
    with torch.no_grad():
        for name, weight in state.items():
            local(own[name]).copy_(weight)
    return policy


def localisation(kl: Tensor, buckets: int = 20) -> list[float]:
    """Fig. 4: the per-token KL of one response [|y|], sorted from large to small, as the mean of
    `buckets` equal parts.

    >>> localisation(torch.tensor([0.0, 4.0, 2.0, 2.0]), buckets=2)
    [3.0, 1.0]
    """
    parts = kl.sort(descending=True).values.tensor_split(buckets)
    return [part.mean().item() for part in parts]


def draw_localisation(curves: dict[int, list[list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for r, name in ((0, "wrong (r = 0)"), (1, "right (r = 1)")):
        if curves[r]:
            mean = torch.tensor(curves[r]).mean(0)
            label = f"{name}, {len(curves[r])} responses"
            axis.plot(range(1, len(mean) + 1), mean, marker="o", label=label)
    axis.set(xlabel="tokens of a response in 20 parts, by falling KL", yscale="log")
    axis.set(ylabel="mean divergence (--kl), nats", title="self-localisation")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))

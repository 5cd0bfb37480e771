"""One run of a trainer of TRL, timed step by step: the rival in benchmarks/speed.py.

    TRL_PYTHON benchmarks/trl_side.py '{"file": "grpo", "model": "assets/chain", "steps": 10, …}'

It runs in TRL's own environment. The argument has the settings of benchmarks/speed.py, a seed and
an output folder. The file says which trainer runs:

    grpo    GRPOTrainer
    sdpo    SDPOTrainer: averaged teacher, reverse KL over all logits
    hsd     SDFTTrainer: the start as teacher, the worked solution in its prompt, reverse KL over
            all logits

Prints one line of JSON: the seconds of each step (sampling, rewards and update), its mean length
and reward, the peak memory of the process, and versions.
"""
from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from common.tasks import Problem, load_task
from common.verifiers.pool import judge

DISTILLATION = {  # alpha 1: reverse KL
    "distillation_mode": "full_logits", "distillation_alpha": 1.0, "max_prompt_length": None,
}


class Clock(TrainerCallback):
    """The start of the first step and the end of each, in seconds."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        if not self.marks:
            self.marks.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.marks, self.marks[1:])]


class Judge:
    """A trainer's reward function, which keeps the rewards."""

    def __init__(self, problems: list[Problem]):
        self.by_question = {problem.messages[-1]["content"]: problem for problem in problems}
        self.rewards: list[float] = []

    def reward(self, prompts, completions, **_) -> list[float]:
        rewards = []
        for prompt, completion in zip(prompts, completions):
            problem = self.by_question[prompt[-1]["content"]]
            rewards.append(judge(problem, completion[0]["content"]).reward)
        self.rewards += rewards
        return rewards

    def means(self, count: int) -> list[float]:
        """Of each step's `count` rewards."""
        starts = range(0, len(self.rewards), count)
        return [sum(self.rewards[i : i + count]) / count for i in starts]


def main() -> None:
    args = SimpleNamespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(args.threads)
    problems = load_task(args.task, heldout=args.heldout).train
    clock, verifier = Clock(), Judge(problems)
    trainer = trainer_of(args, problems, verifier, clock)
    trainer.train()
    lengths = []
    for row in trainer.state.log_history:
        lengths += [row[key] for key in row if key.endswith("completions/mean_length")]
    result = {
        "seconds": clock.seconds(),
        "lengths": lengths,
        "rewards": verifier.means(args.batch_size * args.group_size),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
    }
    print("RESULT " + json.dumps(result))


def trainer_of(args: SimpleNamespace, problems: list[Problem], verifier: Judge, clock: Clock):
    """The trainer that args.file names."""
    shared = shared_settings(args)
    parts = {
        "model": AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        "processing_class": AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        "callbacks": [clock],
    }
    rows = [{"prompt": problem.messages} for problem in problems]
    if args.file == "grpo":
        config = trl.GRPOConfig(**shared, beta=0.0, loss_type="grpo",
                                model_init_kwargs={"dtype": "float32"})
        data = Dataset.from_list(rows)
        return trl.GRPOTrainer(
            reward_funcs=verifier.reward, args=config, train_dataset=data, **parts
        )
    if args.file == "sdpo":
        from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

        config = SDPOConfig(**shared, **DISTILLATION, teacher_model_kind="ema",
                            teacher_update_rate=0.05)
        data = Dataset.from_list(rows)
        return SDPOTrainer(reward_funcs=verifier.reward, args=config, train_dataset=data, **parts)
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    config = SDFTConfig(**shared, **DISTILLATION, teacher_model_kind="base",
                        distillation_topk=None)
    for row, problem in zip(rows, problems):
        row["privileged_context"] = f"Solution: {problem.solution}"
    return SDFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **parts)


def shared_settings(args: SimpleNamespace) -> dict:
    """What the three trainers have in common."""
    return {
        "output_dir": args.out, "seed": args.seed, "max_steps": args.steps,
        "per_device_train_batch_size": args.per_device,
        "gradient_accumulation_steps": args.batch_size * args.group_size // args.per_device,
        "num_generations": args.group_size, "max_completion_length": args.max_tokens,
        "temperature": 1.0, "top_p": 1.0,
        "learning_rate": args.lr, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "gradient_checkpointing": False, "bf16": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }


if __name__ == "__main__":
    main()

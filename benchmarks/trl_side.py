"""One run of a trainer of TRL, timed step by step: the rival in benchmarks/speed.py, run in TRL's own environment.

    TRL_PYTHON benchmarks/trl_side.py '{"file": "grpo", "model": "assets/chain", "task": "chain", "steps": 10, …}'

file: grpo (GRPOTrainer), sdpo (SDPOTrainer: averaged teacher, reverse KL over all logits) or hsd (SDFTTrainer: the start as
teacher, the worked solution in its prompt, reverse KL over all logits). Prints one line of JSON: seconds of each step
(sampling, rewards and update), rewards, the process's peak memory, versions.
"""
from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from common.tasks import load_task
from common.verifiers.pool import judge


class Clock(TrainerCallback):
    def __init__(self):
        self.marks: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        if not self.marks:
            self.marks.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.marks.append(time.perf_counter())


def main() -> None:
    o = json.loads(sys.argv[1])
    torch.set_num_threads(o["threads"])
    problems = load_task(o["task"], heldout=o["heldout"]).train
    by_question = {p.messages[-1]["content"]: p for p in problems}
    rewards: list[float] = []

    def reward(prompts, completions, **_):
        got = [judge(by_question[p[-1]["content"]], c[0]["content"]).reward for p, c in zip(prompts, completions)]
        rewards.extend(got)
        return got

    count = o["batch_size"] * o["group_size"]
    common = dict(
        output_dir=o["out"], max_steps=o["steps"], per_device_train_batch_size=o["per_device"],
        gradient_accumulation_steps=count // o["per_device"], num_generations=o["group_size"],
        max_completion_length=o["max_tokens"], learning_rate=o["lr"], lr_scheduler_type="constant", weight_decay=0.0,
        temperature=1.0, top_p=1.0, report_to="none", save_strategy="no", bf16=False, logging_steps=1, use_cpu=True,
        disable_tqdm=True, gradient_checkpointing=False, seed=o["seed"], max_grad_norm=1.0,
    )
    tokenizer = AutoTokenizer.from_pretrained(o["model"], padding_side="left")
    clock = Clock()
    rest = dict(model=AutoModelForCausalLM.from_pretrained(o["model"], dtype=torch.float32), processing_class=tokenizer,
                callbacks=[clock])
    prompts = [{"prompt": p.messages} for p in problems]
    if o["file"] == "grpo":
        config = trl.GRPOConfig(**common, beta=0.0, loss_type="grpo", model_init_kwargs={"dtype": "float32"})
        trainer = trl.GRPOTrainer(reward_funcs=reward, args=config, train_dataset=Dataset.from_list(prompts), **rest)
    elif o["file"] == "sdpo":
        from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

        config = SDPOConfig(**common, distillation_mode="full_logits", distillation_alpha=1.0, teacher_model_kind="ema",
                            teacher_update_rate=0.05, max_prompt_length=None)
        trainer = SDPOTrainer(reward_funcs=reward, args=config, train_dataset=Dataset.from_list(prompts), **rest)
    else:
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        config = SDFTConfig(**common, distillation_mode="full_logits", distillation_alpha=1.0, distillation_topk=None,
                            teacher_model_kind="base", max_prompt_length=None)
        rows = [{**row, "privileged_context": f"Solution: {p.solution}"} for row, p in zip(prompts, problems)]
        trainer = SDFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **rest)
    trainer.train()
    lengths = [row[key] for row in trainer.state.log_history for key in row if key.endswith("completions/mean_length")]
    print("RESULT " + json.dumps({
        "seconds": [b - a for a, b in zip(clock.marks, clock.marks[1:])], "lengths": lengths,
        "rewards": [sum(rewards[i : i + count]) / count for i in range(0, len(rewards), count)],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
    }))


if __name__ == "__main__":
    main()

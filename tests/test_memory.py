"""What is counted of a run's memory, held against what a small run keeps, and docs/memory.md against results/memory."""
import importlib
import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, ROOT
from test_recipes import many, problems, processes, vllm

import grpo
from common import memory, rollouts
from common.architecture import empty_lm
from common.policy import Policy, add_adapters, frozen_copy, load_policy, local, make_optimizer
from common.settings import Setup, parse

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory as bench

COUNTED = json.loads((ROOT / "results" / "memory" / "counted.json").read_text())
PAGE = (ROOT / "docs" / "memory.md").read_text()
RECIPES = re.findall(r"^# (\d+) × (\d+) GB: ([\d.]+) of ([\d.]+) GiB.*\n((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_gradients_moments_and_a_teacher_are_what_a_run_keeps(rank, one_process):
    policy = load_policy(CHAIN, torch.device("cpu"), Setup(lora_rank=rank))
    teacher = frozen_copy(policy, torch.device("cpu"))
    optimizer = make_optimizer(policy, SimpleNamespace(lr=1e-3, weight_decay=0.0))
    for p in policy.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    kept = [*policy.parameters(), *(p.grad for p in policy.parameters() if p.requires_grad), *teacher.parameters(),
            *(t for s in optimizer.state.values() for name, t in s.items() if name != "step")]
    lm = empty_lm(CHAIN)
    if rank:
        add_adapters(Policy(lm), rank, 32.0)
    load = memory.Load(64, 64, 1, 1, True, True, device="cpu")
    count = memory.count(lm, load, (0, 0))
    assert sum(local(t).nbytes for t in kept) == count.weights + count.copies


def by_hand(width: int, inner: int, q: int, kv: int, heads: int) -> int:
    """Bytes that a layer of Qwen3 keeps of a token in bf16; heads of keys and of queries together, q and kv their widths."""
    norm = 4 + 2  # its input in fp32, and what its weight is multiplied with
    read_by_linear_layers = 2 * width + 2 * width  # before attention and before the MLP
    inverse_deviations = 4 * (2 + heads)
    attention = 2 * (q + kv) + 2 * kv + 2 * q + 4 * (heads - 8)  # queries, keys, values, output, log-sums of the queries
    return 2 * norm * width + read_by_linear_layers + norm * (q + kv) + inverse_deviations + attention + 4 * 2 * inner


@pytest.mark.parametrize("name", bench.QWEN3)
def test_autograd_keeps_of_a_layer_what_was_worked_out_by_hand(name):
    _, width, inner, heads, _ = bench.QWEN3[name]
    assert COUNTED["kept"][name]["all"] == by_hand(width, inner, 128 * heads, 128 * 8, heads + 8)
    assert COUNTED["kept"][name]["checkpointing"] == 2 * width  # its input


def test_what_stays_alive_is_what_autograd_saves():
    """Two ways to count activations: storages that are alive, and saved-tensor hooks."""
    load = memory.Load(4096, 4096, 1, 0, False, False)
    three, four = (memory.activations(bench.lm_of("0.6B", layers), load)[0] for layers in (3, 4))
    saved = bench.kept("0.6B", 4, 4096) - bench.kept("0.6B", 3, 4096)
    assert four - three == saved == 4096 * COUNTED["kept"]["0.6B"]["all"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_linear_in_the_layers_and_the_tokens(checkpointing):
    def bytes_of(layers: int, tokens: int) -> memory.Load:
        load = memory.Load(tokens, 2048, 1, 0, False, checkpointing)
        return memory.activations(bench.lm_of("0.6B", layers), load)

    three, four = bytes_of(3, 8192), bytes_of(4, 8192)
    assert bytes_of(6, 8192) == bench.linear(three, four, 6)
    assert bytes_of(3, 16384)[0] == pytest.approx(2 * three[0], rel=0.01)


def test_the_sum_of_a_dry_run_is_what_pretended_ranks_keep_alive():
    for row in COUNTED["updates"]:
        assert 0.998 * row["peak_gib"] <= row["sum_gib"] <= 1.03 * row["peak_gib"], row


def test_the_sum_stands_as_the_results_have_it():
    row = next(row for row in COUNTED["updates"] if row["model"] == "0.6B" and row["ranks"] == 8)
    count = bench.summed(row)
    assert round((count.weights + count.copies + count.update) / bench.GIB, 2) == row["sum_gib"]


def test_the_tables_of_the_docs_are_what_the_script_prints():
    assert bench.tables(COUNTED) in PAGE


def test_rows_that_an_evaluation_can_fill_count_though_a_step_has_fewer(monkeypatch):
    monkeypatch.setattr(memory, "report", lambda lm, load, gpu: load)
    args = parse(grpo.Args, grpo.presets, ["--demo", "--batch_size", "1", "--group_size", "4", "--sampler_rows", "32"])
    there = SimpleNamespace(longest=100, sampled=100)
    assert memory.plan(args, empty_lm(CHAIN), there, 1, 0).rows == 32


# ---------------------------------------------------------------------------------------------------------------------
# recipes
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def dry(tmp_path, monkeypatch, capsys):
    """Dry-run a command as if it were given its model of Qwen3's shape and prompts of 512 tokens; → what it says."""
    def run(command: str, gib: float) -> str:
        line = " ".join(shlex.split(command.replace("\\\n", " "), comments=True))
        flags = shlex.split(line.partition(".py")[2])
        size = flags[flags.index("--model") + 1].removeprefix("Qwen/Qwen3-")
        model = tmp_path / size
        shutil.copytree(CHAIN, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        bench.config_of(size).save_pretrained(model)
        flags[flags.index("--model") + 1] = str(model)
        flags += ["--task", "chain", "--dry_run", "--gpu_memory", str(gib), "--out", str(tmp_path / "runs")]
        monkeypatch.setattr(rollouts, "load_task", lambda spec, heldout, **_: problems(heldout, 64))
        monkeypatch.setattr(rollouts.Rollouts, "chat_ids", lambda self, chat: [1] * 512)
        monkeypatch.setattr(memory, "activations", few_layers(size))
        vllm(monkeypatch, there=True)
        many(monkeypatch, *processes(line))
        module = importlib.import_module(re.search(r"(\w+)\.py", line)[1])
        try:
            module.main(parse(module.Args, module.presets, flags))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return capsys.readouterr().out

    return run


def few_layers(size: str):
    """memory.activations, from 3 and 4 of the layers."""
    def activations(lm, load: memory.Load) -> tuple[int, int]:
        ranks = [len(p) for name, p in lm.named_parameters() if "lora_A" in name]
        few = [bench.activations(size, n, max(ranks, default=0), load.tokens, load.longest, load.checkpointing) for n in (3, 4)]
        return bench.linear(*few, bench.QWEN3[size][0])

    return activations


@pytest.mark.parametrize("gpus, card, peak, gib, command", RECIPES, ids=[" × ".join(r[:2]) for r in RECIPES])
def test_every_recipe_fits_its_card(gpus, card, peak, gib, command, dry):
    assert processes(command) == (int(gpus), int(gpus)) and 0.9 * int(card) < float(gib) < int(card)
    said = dry(command, float(gib))
    assert f"fits {gib} GiB: yes" in said
    assert float(re.search(r"([\d.]+)  at most", said)[1]) == pytest.approx(float(peak), abs=0.05)


def test_a_card_of_each_size_has_a_recipe_and_the_readme_shows_them():
    assert {(gpus, card) for gpus, card, *_ in RECIPES} == {("1", "16"), ("1", "24"), ("1", "80"), ("8", "80")}
    readme = (ROOT / "README.md").read_text()
    assert all(command in readme for *_, command in RECIPES)


@pytest.mark.parametrize("command, gib, words", [
    ("python grpo.py --model Qwen/Qwen3-8B", 24, "no: lower --token_budget, then take --lora_rank 32, then more GPUs"),
    ("python hsd.py --model Qwen/Qwen3-8B --lora_rank 32 --sampler vllm --vllm_memory 0.15", 80, "no, vLLM has no room"),
    ("python grpo.py --model Qwen/Qwen3-0.6B --beta 0 --sampler_rows 512 --max_tokens 4096", 24, "no: lower --sampler_rows"),
])
def test_what_does_not_fit_is_told_what_to_lower(command, gib, words, dry):
    assert f"fits {gib} GiB: {words}" in dry(command, gib)

"""Many processes on many machines do what one process does, and none waits for another for ever."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN, ROOT, interrupted
from ranks import finish, free_port, launch, run_file, run_grpo
from test_run import assert_same_run, metrics, weights
from transformers import AutoModelForCausalLM

import grpo
from common import TIMEOUT, checkpoints
from common.chat import load_tokenizer
from common.microbatches import micro_batches
from common.policy import ema_update, full_weights, load_policy, optimizer_step
from common.settings import Setup

CPU = torch.device("cpu")
SMALL = ["--demo", "--model", CHAIN, "--batch_size", "4", "--group_size", "4", "--heldout", "3", "--max_tokens", "48",
         "--eval_every", "4", "--eval_samples", "1"]


def assert_close(a: dict, b: dict, atol: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


def test_1_2_and_4_ranks_reach_the_same_weights_after_5_steps(tmp_path):
    """Within 1e-5, at the demo's learning rate, with which weights move by up to 5e-4. The four ranks are two machines of
    two (HSDP)."""
    for world, local in ((1, 1), (2, 2), (4, 2)):
        flags = [*SMALL, "--steps", "5", "--out", str(tmp_path), "--name", str(world)]
        finish(launch(world, tmp_path / "log", run_grpo, flags, local_world=local), tmp_path / "log")
    one = weights(tmp_path / "1", 5)
    for other in ("2", "4"):
        assert_close(one, weights(tmp_path / other, 5), 1e-5)
        assert [r.get("reward/mean") for r in metrics(tmp_path / "1")] == [r.get("reward/mean")
                                                                         for r in metrics(tmp_path / other)]
    start = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32).state_dict()
    assert max((one[n] - start[n]).abs().max() for n in one) > 3e-4


FILES = {
    "rlsd": ["--steps", "3", "--teacher_every", "2"], "sdpo": ["--steps", "3"],
    "hsd": ["--steps", "3", "--teacher", "ema", "--beta", "0.01", "--grpo_mix", "0.2"],
    "sdzero": ["--srt_questions", "16", "--kept_traces", "24", "--srt_batch", "8", "--sd_questions", "16",
               "--batch_size", "8", "--max_tokens", "96", "--save_every", "1"],
}


@pytest.mark.parametrize("name", list(FILES))
def test_every_file_does_in_two_processes_what_it_does_in_one(name, tmp_path):
    small = SMALL if name != "sdzero" else ["--demo", "--model", CHAIN, "--heldout", "3"]
    for world in (1, 2):
        flags = [*small, *FILES[name], "--out", str(tmp_path), "--name", str(world)]
        finish(launch(world, tmp_path / "log", run_file, name, flags), tmp_path / "log")
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert [r.get("reward/mean") for r in one] == [r.get("reward/mean") for r in two] and len(one) >= 4
    last = len(one) - 1
    assert_close(weights(tmp_path / "1", last), weights(tmp_path / "2", last), 2e-5)
    if name == "sdzero":  # the same traces in the same order, so the same are kept
        assert (tmp_path / "1" / "traces.jsonl").read_bytes() == (tmp_path / "2" / "traces.jsonl").read_bytes()
        resumes_in_phase_two(tmp_path, [*small, *FILES[name], "--out", str(tmp_path), "--name", "parts"], last)


def resumes_in_phase_two(out: Path, flags: list[str], last: int) -> None:
    """Two processes go on within the second phase, with its optimizer and its teacher, bit for bit."""
    interrupted(out / "2", "parts", last - 1)
    finish(launch(2, out / "log", run_file, "sdzero", [*flags, "--resume", "auto"]), out / "log")
    assert_same_run(out / "2", out / "parts", last)


def test_two_torchrun_launchers_on_two_nodes_train_one_model(tmp_path):
    """--nnodes=2 over the loopback device: the weights are those of two ranks on one machine."""
    flags = [*SMALL, "--steps", "2", "--out", str(tmp_path)]
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=two"]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                               f"--node_rank={node}", "--local_addr=127.0.0.1", *rendezvous, "grpo.py", *flags, "--name",
                               "nodes"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}) for node in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-3000:]
    finish(launch(2, tmp_path / "log", run_grpo, [*flags, "--name", "one"]), tmp_path / "log")
    assert len(metrics(tmp_path / "nodes")) == 3
    assert_close(weights(tmp_path / "one", 2), weights(tmp_path / "nodes", 2), 1e-5)


def hybrid(folder: str) -> None:
    """On each of four ranks: the same updates of a policy on two machines of two, and of one sharded over all four."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    policies, teachers = [], []
    for local in ("2", "4"):
        os.environ["LOCAL_WORLD_SIZE"] = local
        policies.append(load_policy(CHAIN, CPU, Setup()))
        teachers.append(load_policy(CHAIN, CPU, Setup()))
    meshes = [next(p.parameters()).device_mesh for p in policies]
    assert [mesh.ndim for mesh in meshes] == [2, 1]
    for group in meshes[0].get_all_groups():  # as long as the default group of a run
        assert group._get_backend(CPU).options._timeout == TIMEOUT
    optimizers = [torch.optim.AdamW(p.parameters(), lr=1e-4, fused=True) for p in policies]
    prompts, responses = [[1, 5 + rank]] * 3, [[7, 8, 9 + rank], [9, 2], [11]][: rank + 1]
    for step in range(2):
        seen = []
        for policy, optimizer in zip(policies, optimizers):
            # ranks have 1 to 3 rows, the last has none in the second step
            kept = torch.full((len(responses),), step == 0 or rank < 3)
            for micro in micro_batches(prompts[: len(responses)], responses, kept, 4, CPU):
                total, _ = policy(micro, lambda stats, _: (1 + rank) * stats.logp)
                total.backward()
            grads = {n: p.grad.full_tensor().clone() for n, p in policy.named_parameters()}
            metrics = optimizer_step(policy, optimizer, 1e-4, 1.0)
            seen.append((grads, metrics["grad_norm"][0]))
        (a, norm_a), (b, norm_b) = seen
        assert abs(norm_a - norm_b) < 1e-4 * norm_b and norm_b > 1
        assert_close(a, b, 1e-4 * max(g.abs().max().item() for g in b.values()))
    for teacher, policy in zip(teachers, policies):
        ema_update(teacher, policy, 0.5)
    one, two = (dict(full_weights(p)) for p in policies)
    assert_close(one, two, 1e-6)
    start, half = dict(full_weights(load_policy(CHAIN, CPU, Setup()))), dict(full_weights(teachers[0]))
    assert_close({n: (start[n] + one[n]) / 2 for n in one}, half, 1e-7)
    assert any(not torch.equal(one[n], start[n]) for n in one)
    trainer = {"edition": 2, "step": 2}
    place = Path(folder) / "step_000002"
    tokenizer = load_tokenizer(CHAIN)
    checkpoints.save(place, policies[0], optimizers[0], teachers[0], tokenizer, trainer, CPU)
    dist.barrier()
    again = load_policy(CHAIN, CPU, Setup())
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-4, fused=True)
    assert checkpoints.load(place, again, optimizer, teachers[1]) == trainer
    assert all(torch.equal(w, one[n]) for n, w in full_weights(again))
    assert all(torch.equal(w, half[n]) for n, w in full_weights(teachers[1]))
    moments = [[s["exp_avg"].full_tensor() for s in o.state.values()] for o in (optimizers[0], optimizer)]
    assert moments[0] and all(torch.equal(m, n) for m, n in zip(*moments))
    dist.destroy_process_group()


def test_weights_sharded_on_each_of_two_machines_train_as_sharded_over_all(tmp_path):
    """HSDP against FSDP: gradients, clipping, blends, checkpoints; with ranks that have fewer rows, or none."""
    finish(launch(4, tmp_path / "log", hybrid, str(tmp_path), local_world=2), tmp_path / "log")


def no_signal_on_rank_1(argv: list[str]) -> None:
    advantages = grpo.advantages
    grpo.advantages = lambda *args: advantages(*args) * (os.environ["RANK"] == "0")
    run_grpo(argv)


def test_a_rank_without_live_rows_does_not_hang_the_others(tmp_path):
    """Rank 1 has no response with a gradient; three held-out problems do not divide by two."""
    flags = [*SMALL, "--steps", "2", "--out", str(tmp_path), "--name", "r", "--minibatches", "2", "--token_budget", "100"]
    finish(launch(2, tmp_path / "log", no_signal_on_rank_1, flags), tmp_path / "log")
    assert [row["grad_norm"] > 0 for row in metrics(tmp_path / "r")[:2]] == [True, True]

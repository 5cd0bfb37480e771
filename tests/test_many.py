"""Many processes on many machines do what one process does, and none waits for another for ever."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN, GROUPS, ROOT, TASK, at_most, interrupted
from ranks import another_port, finish, free_port, launch, run_file, run_grpo
from test_run import assert_same_run, metrics, weights
from transformers import AutoModelForCausalLM

import grpo
from common import TIMEOUT, checkpoints
from common.chat import load_tokenizer
from common.microbatches import micro_batches
from common.policy import ema_update, full_weights, load_policy, optimizer_step, whole
from common.settings import Setup, parse

CPU = torch.device("cpu")
SMALL = [*GROUPS, "--heldout", "3", "--eval_every", "4"]


def assert_close(a: dict, b: dict, atol: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


FILES = {
    "grpo": [*SMALL, "--steps", "4"],
    "rlsd": [*SMALL, "--steps", "2", "--teacher_every", "1"],
    "sdpo": [*SMALL, "--steps", "2"],
    "hsd": [*SMALL, "--steps", "2", "--teacher", "ema", "--beta", "0.01", "--grpo_mix", "0.2"],
    "sdzero": [*TASK, "--heldout", "3", "--srt_max_tokens", "32", "--srt_questions", "12", "--kept_traces", "16", "--srt_batch", "8",
               "--sd_questions", "8", "--batch_size", "4", "--save_every", "1"],
}


def each_file(out: str) -> None:
    world = os.environ["WORLD_SIZE"]
    for name, flags in FILES.items():
        run_file(name, [*flags, "--out", f"{out}/{world}", "--name", name])
        another_port()
    if world == "2":
        a_rank_without_live_rows(out)


def a_rank_without_live_rows(out: str) -> None:
    advantages = grpo.advantages
    grpo.advantages = lambda *args: advantages(*args) * (os.environ["RANK"] == "0")
    run_grpo([*SMALL, "--steps", "1", "--out", f"{out}/2", "--name", "one live rank", "--minibatches", "2", "--token_budget", "100"])
    grpo.advantages = advantages


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The folder with the runs of each file by one process, in `1`, and by two, in `2`."""
    out = tmp_path_factory.mktemp("worlds")
    for world in (1, 2):
        finish(launch(world, out / "log", each_file, str(out)), out / "log")
    return out


@pytest.mark.parametrize("name", list(FILES))
def test_every_file_does_in_two_processes_what_it_does_in_one(name, worlds):
    one, two = metrics(worlds / "1" / name), metrics(worlds / "2" / name)
    assert [r.get("reward/mean") for r in one] == [r.get("reward/mean") for r in two] and len(one) >= 3
    last = len(one) - 1
    assert_close(weights(worlds / "1" / name, last), weights(worlds / "2" / name, last), 2e-5)


def test_1_2_and_4_ranks_reach_the_same_weights_after_4_steps(worlds, tmp_path):
    """Within 1e-5, at the demo's learning rate, with which weights move by up to 4e-4. The four ranks are two machines of
    two (HSDP)."""
    flags = [*FILES["grpo"], "--out", str(tmp_path), "--name", "grpo"]
    finish(launch(4, tmp_path / "log", run_grpo, flags, local_world=2), tmp_path / "log")
    one = weights(worlds / "1" / "grpo", 4)
    for other in (worlds / "2" / "grpo", tmp_path / "grpo"):
        assert_close(one, weights(other, 4), 1e-5)
        assert [r.get("reward/mean") for r in metrics(worlds / "1" / "grpo")] == [r.get("reward/mean") for r in metrics(other)]
    start = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32).state_dict()
    assert max((one[n] - start[n]).abs().max() for n in one) > 2.4e-4


def test_sdzeros_traces_are_the_same_in_the_same_order_so_the_same_are_kept(worlds):
    one, two = ((worlds / world / "sdzero" / "traces.jsonl").read_bytes() for world in "12")
    assert one == two


def test_two_processes_resume_in_phase_two_bitwise(worlds):
    """They go on within the second phase, with its optimizer and its teacher."""
    out = worlds / "2"
    last = len(metrics(out / "sdzero")) - 1
    interrupted(out / "sdzero", "parts", last - 1)
    flags = [*FILES["sdzero"], "--out", str(out), "--name", "parts", "--resume", "auto"]
    finish(launch(2, worlds / "log", run_file, "sdzero", flags), worlds / "log")
    assert_same_run(out / "sdzero", out / "parts", last)


def test_a_rank_without_live_rows_does_not_hang_the_others(worlds):
    """Rank 1 has no response with a gradient; three held-out problems do not divide by two."""
    assert metrics(worlds / "2" / "one live rank")[0]["grad_norm"] > 0


def as_a_user_runs_it(argv: list[str]) -> None:
    grpo.main(parse(grpo.Args, grpo.presets, argv))


def test_two_torchrun_launchers_on_two_nodes_train_one_model(tmp_path):
    """--nnodes=2 over the loopback device: the weights are those of two ranks on one machine."""
    flags = [*SMALL, "--steps", "1", "--out", str(tmp_path)]
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=two"]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                               f"--node_rank={node}", "--local_addr=127.0.0.1", *rendezvous, "grpo.py", *flags, "--name",
                               "nodes"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}) for node in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-3000:]
    finish(launch(2, tmp_path / "log", as_a_user_runs_it, [*flags, "--name", "one"]), tmp_path / "log")
    assert len(metrics(tmp_path / "nodes")) == 2 and metrics(tmp_path / "nodes")[0]["grad_norm"] > 0
    assert_close(weights(tmp_path / "one", 1), weights(tmp_path / "nodes", 1), 1e-5)


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
            for micro in micro_batches(prompts[: len(responses)], responses, kept, at_most(4), CPU):
                total, _ = policy(micro, lambda stats, _: (1 + rank) * stats.logp)
                total.backward()
            grads = {n: whole(p.grad).clone() for n, p in policy.named_parameters()}
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
    moments = [[whole(s["exp_avg"]) for s in o.state.values()] for o in (optimizers[0], optimizer)]
    assert moments[0] and all(torch.equal(m, n) for m, n in zip(*moments))
    dist.destroy_process_group()


def test_weights_sharded_on_each_of_two_machines_train_as_sharded_over_all(tmp_path):
    """HSDP against FSDP: gradients, clipping, blends, checkpoints; with ranks that have fewer rows, or none."""
    finish(launch(4, tmp_path / "log", hybrid, str(tmp_path), local_world=2), tmp_path / "log")

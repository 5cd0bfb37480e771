"""Ranks without torchrun: forks of a server that has imported everything once, so that starting them costs little."""
import importlib
import multiprocessing
import os
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from conftest import lighten

from common.settings import parse

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["ranks", "grpo", "rlsd", "sdpo", "hsd", "sdzero", "transformers.models.qwen3.modeling_qwen3"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_file(name: str, argv: list[str]) -> None:
    lighten()
    module = importlib.import_module(name)
    module.main(parse(module.Args, module.presets, argv))


def run_grpo(argv: list[str]) -> None:
    run_file("grpo", argv)


def another_port() -> None:
    """Before another run by the same ranks: at the old port they might find the store of the run before."""
    port, *others = os.environ["MORE_PORTS"].split()
    os.environ.update(MASTER_PORT=port, MORE_PORTS=" ".join(others))


def launch(world: int, log: Path, function, *args, local_world: int = 0) -> list:
    """Start `world` processes that call function(*args) under torchrun's environment; their output goes to `log`."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    ports = [str(free_port()) for _ in range(9)]
    processes = [forks.Process(target=body, args=(rank, world, local_world or world, ports, str(log), function, args))
                 for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def body(rank: int, world: int, local_world: int, ports: list[str], log: str, function, args) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank % local_world), MASTER_PORT=ports[0],
                      LOCAL_WORLD_SIZE=str(local_world), MASTER_ADDR="127.0.0.1", MORE_PORTS=" ".join(ports[1:]))
    torch.set_num_threads(1)
    function(*args)


def finish(processes: list, log: Path, timeout: float = 300) -> None:
    """Wait for all; each must end with 0."""
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(codes), f"exit codes {codes}\n{log.read_text()[-3000:]}"


if __name__ == "__main__":  # under torchrun
    run_grpo(sys.argv[1:])

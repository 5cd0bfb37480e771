"""kernels/rows_triton.py: the laws of test_kernels.py and test_kernels_digits.py in Triton's
interpreter, and a compilation for GPUs.

What the interpreter cannot show (bf16 rounding of stores, races, speed) needs a GPU: test_kernels_cuda.py.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process already is the interpreter")
def test_the_laws_of_the_kernels_hold_in_the_interpreter():
    # a process of its own: the variable decides when Triton is imported, and for all kernels
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py",
               "tests/test_kernels_digits.py"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def registers(kernel, constants: dict, warps: int, arch: int) -> tuple[int, int]:
    """(registers a thread, bytes spilled) of a kernel compiled for sm_{arch}."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"y_ptr": "*i64", "mode_ptr": "*i64", "out_ptr": "*bf16"}
    kinds |= dict.fromkeys(("s", "beta", "clip"), "fp32")
    kinds |= dict.fromkeys(("tokens", "vocabulary", "stride", "out_stride"), "i32")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": warps, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    target = re.search(r"\.target (\S+)", ptx).group(1)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for ptxas in ("ptxas", "ptxas-blackwell"):  # the first that knows this PTX version
            said = subprocess.run([tools / ptxas, "-v", f"-arch={target}", file.name, "-o", os.devnull],
                                  capture_output=True, text=True)
            if said.returncode == 0:
                return (int(re.search(r"Used (\d+) registers", said.stderr).group(1)),
                        int(re.search(r"(\d+) bytes spill stores", said.stderr).group(1)))
    raise AssertionError(said.stderr)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_for_gpus_without_spilling(arch):
    from kernels import rows_triton as rows

    flags = {"DIVERGENCE": True, "ENTROPY": True}
    cases = [(rows.statistics_kernel, {"TEACHER": teacher}) for teacher in (True, False)]
    cases += [(rows.gradient_kernel, {"KIND": kind} | flags) for kind in (rows.KL, rows.CLIPPED, rows.JSD)]
    for kernel, constants in [*cases, (rows.sums_kernel, {"KIND": rows.JSD})]:
        block = 2048 if kernel is rows.gradient_kernel else 1024
        warps = rows.blocks(151_936, block)["num_warps"]
        used, spilled = registers(kernel, constants | {"BLOCK": block}, warps, arch)
        # a multiprocessor has 65,536 registers and is to hold two programs or more
        assert spilled == 0 and 2 * used * 32 * warps <= 65_536, (kernel.fn.__name__, constants, used, spilled)

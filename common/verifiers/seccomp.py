"""The system calls that a program in the sandbox does without, as a filter for bwrap's --seccomp.

Limits on address space, files and processes do not see memory that belongs to no process: files of
memfd_create, System V objects, shared anonymous mappings, queues of inotify, pages in pipes. And a
new user namespace would lift the limits of the old one. So these calls fail with EPERM. Sockets are
those of AF_UNIX only; the others have large buffers, and vsock knows no network namespace.

Source: linux/filter.h and linux/seccomp.h; numbers from asm/unistd_64.h and asm-generic/unistd.h.
"""
from __future__ import annotations

import errno
import functools
import platform
import struct

from common import require

MACHINES = {  # → its number in the audit system, its column below
    "x86_64": (0xC000003E, 0),
    "aarch64": (0xC00000B7, 1),
}
REFUSED = {  # → its number on x86_64, on aarch64
    # namespaces, and mounts in them
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    # memory that is a file's, a queue's or the kernel's
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "vmsplice": (278, 75),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),  # and what goes through it passes no filter
    # keys of the user's session; other processes; what has often been a way into the kernel
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
}
CLONE = (56, 220)
CLONE3 = (435, 435)
MMAP = (9, 222)
SOCKET = (41, 198)
NAMESPACES = 0x7E020000  # CLONE_NEW*: user, PID, network, IPC, host name, cgroup, mounts
SHARED, ANONYMOUS = 0x01, 0x20  # flags of mmap
AF_UNIX = 1
FOREIGN = 0x40000000  # call numbers from here on are x32's

# an instruction: code, how many to skip if it holds and if not, K
LOAD, AND, RETURN = 0x20, 0x54, 0x06  # A = the word at K; A &= K; return K
EQUAL, AT_LEAST, ANY = 0x15, 0x35, 0x45  # does A == K, A >= K, A & K hold?
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16  # bytes from the start of struct seccomp_data
ALLOW, FAIL = 0x7FFF0000, 0x00050000  # FAIL | errno


@functools.cache
def compiled() -> bytes:
    """The filter for this machine, as struct sock_filter. Raises SystemExit if its numbers are not
    known here."""
    machine = platform.machine()
    require(machine in MACHINES, "a model's programs run behind a filter of system calls, which is "
            f"written for {' and '.join(MACHINES)}, not for {machine}; pass --allow_unsafe_exec to "
            "run them with your own rights")
    audit, column = MACHINES[machine]
    code = [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 1, 0, audit),
        fail(errno.ENOSYS),  # 32-bit calls
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, FOREIGN),
        fail(errno.ENOSYS),
    ]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            code += [(EQUAL, 0, 1, numbers[column]), fail(errno.EPERM)]
    # its flags are behind a pointer, which a filter cannot follow; libraries then use clone
    code += [(EQUAL, 0, 1, CLONE3[column]), fail(errno.ENOSYS)]
    refuse = fail(errno.EPERM)
    both = SHARED | ANONYMOUS
    code += on(CLONE[column], 0, [(ANY, 0, 1, NAMESPACES), refuse])
    code += on(SOCKET[column], 0, [(EQUAL, 1, 0, AF_UNIX), refuse])
    shared = [(AND, 0, 0, both), (EQUAL, 0, 1, both), refuse]
    code += on(MMAP[column], 3, shared)
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def fail(number: int) -> tuple:
    """The call does nothing and returns this error."""
    return RETURN, 0, 0, FAIL | number


def on(call: int, argument: int, then: list[tuple]) -> list[tuple]:
    """`then` decides about this call by the low word of one argument, or else it is allowed."""
    body = [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *then, (RETURN, 0, 0, ALLOW)]
    return [(EQUAL, 0, len(body), call), *body]

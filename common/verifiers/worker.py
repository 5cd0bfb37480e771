"""The process in which a judge runs that may hang or crash: python -m common.verifiers.worker KIND

Questions come, verdicts go. pool.py kills it at a time limit. It imports no torch.
"""
from __future__ import annotations

import importlib
import json
import pickle
import resource
import sys
from dataclasses import asdict

from common.verifiers import BadProblem, Verdict
from common.verifiers.equality import compare
from common.verifiers.pool import JUDGES, LIBRARIES
from common.verifiers.sandbox_child import receive, send, take_over

MEMORY = 2**32  # bytes: 9**9**9 is to fail here, not to fill the machine
READY, VERDICT, BAD = b"r", b"v", b"b"


def main(kind: str) -> None:
    take_over()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    importlib.import_module(LIBRARIES[kind])
    if kind == "math":
        compare("1", "1")  # the first parse builds tables
    reply, answer = READY, ""
    while True:
        send(reply, json.dumps(answer).encode())
        problem, part = pickle.loads(receive()[1])
        try:
            reply, answer = VERDICT, asdict(JUDGES[kind](problem, part))
        except BadProblem as error:
            reply, answer = BAD, str(error)
        except Exception as error:  # sympy's own trouble with what a model wrote
            failure = Verdict(0.0, f"The check failed ({type(error).__name__}).")
            reply, answer = VERDICT, asdict(failure)


if __name__ == "__main__":
    main(sys.argv[1])

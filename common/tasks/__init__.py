"""Problems: what a problem is, where problems come from, and in which order a run sees them.

    problem.py    Problem
    load.py       load_task: training and held-out problems of a --task; take: their order
    lazy.py       lists of problems that are made as they are needed
    mixtures.py   mixtures of tasks; the overlap between training and evaluation
    sets.py       the named sets, each with its kind
    records.py    records of files and of the hub
    fields.py     what their fields are called
    kinds.py      which kind a record is, where its source does not state it

and one file per kind of data. It makes problems of that kind and has their judge:

    chain.py  maths.py  choice.py  tool.py  code.py  gym.py

Code has its tests in asserts.py and contests.py; programs.py finds the program in a response.
"""
from common.tasks.load import (
    Task,
    first_different,
    in_hash_order,
    load_problems,
    load_task,
    take,
)
from common.tasks.problem import Problem

__all__ = [
    "Problem",
    "Task",
    "first_different",
    "in_hash_order",
    "load_problems",
    "load_task",
    "take",
]

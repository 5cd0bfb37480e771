"""Problems: what a problem is, where problems come from, and in which order a run sees them.

    problem.py    Problem
    load.py       load_task: training and held-out problems of a --task; take: their order
    mixtures.py   mixtures of tasks; the overlap between training and evaluation
    sets.py       the named sets, each with its kind
    records.py    records of files and of the hub, and their fields
    kinds.py      which kind a record is, where its source does not state it

and one file per kind of data. It makes problems of that kind and has their judge:

    chain.py  maths.py  choice.py  tool.py  code.py  gym.py
"""
from common.tasks.load import Task, in_hash_order, load_problems, load_task, take
from common.tasks.problem import Problem

__all__ = [
    "Problem",
    "Task",
    "in_hash_order",
    "load_problems",
    "load_task",
    "take",
]

"""sdpo.py with a right response as its own demonstration.

    python benchmarks/own_hint.py --demo

The caption of the paper's Table 2 allows this, its code forbids it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sdpo
from common.settings import parse

sibling = sdpo.choose_sibling


def own_first(group, i, rng):
    other = sibling(group, i, rng)  # always draws, so that the random stream stays the same
    return i if group.verdicts[i].reward == 1 else other


sdpo.choose_sibling = own_first

if __name__ == "__main__":
    sdpo.main(parse(sdpo.Args, sdpo.presets))

"""sdpo.py with a right response as its own demonstration, which the paper's Table 2 caption allows and its code forbids.

    python benchmarks/own_hint.py --demo
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sdpo
from common.run import parse

siblings = sdpo.choose_siblings
sdpo.choose_siblings = lambda rewards, rng: [i if rewards[i] == 1 else other for i, other in enumerate(siblings(rewards, rng))]

if __name__ == "__main__":
    sdpo.main(parse(sdpo.Args, sdpo.presets))

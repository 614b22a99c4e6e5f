"""The training command with a fault, in place of Python: ``POISON`` is ``killed:STEP`` (SIGKILL in
that step, of every start) or ``nan:STEP`` (a NaN in a sample of it and of all that follow).

python -m tests.system.poisoned_train -m soar_mega.train CONFIG [section.key=value ...]
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from typing import Any

from soar_mega import train
from soar_mega.training.step import Stepper
from tests.poison import poisoned


def main() -> int:
    assert sys.argv[1:3] == ["-m", "soar_mega.train"]
    fault, _, first = os.environ["POISON"].partition(":")
    original = Stepper.run

    def dying(self: Stepper, step: int, *rest: Any) -> dict[str, float]:
        if fault == "killed" and step == int(first) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step, *rest)

    Stepper.run = dying  # type: ignore[method-assign]
    everything = range(int(first), 1000)
    with poisoned("nan sample", everything) if fault == "nan" else nullcontext():
        return train.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())

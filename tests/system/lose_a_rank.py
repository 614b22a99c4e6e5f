"""The training command, one of whose ranks is killed or stopped within a step.

python -m tests.system.lose_a_rank SIGNAL RANK PASS MICROBATCH CONFIG [section.key=value ...]
"""

from __future__ import annotations

import os
import signal
import sys

from soar_mega import train
from soar_mega.pipeline.actions import Action
from soar_mega.pipeline.executor import Executor


def main() -> int:
    name, rank, pass_name, microbatch, *arguments = sys.argv[1:]
    original = Executor._backward

    def dying(self: Executor, action: Action) -> None:
        if os.environ["RANK"] == rank and (action.pass_name, str(action.microbatch)) == (
            pass_name,
            microbatch,
        ):
            print(f"lost at {action}", flush=True)
            os.kill(os.getpid(), signal.Signals[name])
        original(self, action)

    Executor._backward = dying  # type: ignore[method-assign]
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

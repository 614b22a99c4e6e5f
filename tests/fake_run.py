"""A fake ``soar_mega/train.py``: records how it was started, and ends as the test wants.

It needs no package, so that a job script's test takes no seconds. By the environment: it leaves
``FAKE_RUN_CODE`` in the exit code file (``none``: no file, code 1); with ``FAKE_RUN_SAVES`` it
waits for a signal first, and saves for that many seconds times its rank + 1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])
RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
received: list[str] = []


def tell(**state: object) -> None:
    """Write down, in one piece, how far it got."""
    record = {"arguments": sys.argv[1:], "environ": {**os.environ}, "folder": os.getcwd()}
    temporary = FOLDER / f"run-{RANK}.tmp"
    temporary.write_text(json.dumps(record | {"received": received} | state))
    temporary.rename(FOLDER / f"run-{RANK}.json")


for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
tell(saved=False)
print(f"rank {RANK} runs", flush=True)
if "FAKE_RUN_SAVES" in os.environ:
    while not received:
        time.sleep(0.02)
    end = time.monotonic() + float(os.environ["FAKE_RUN_SAVES"]) * (RANK + 1)
    while time.monotonic() < end:
        time.sleep(0.02)
    tell(saved=True)
text = os.environ["FAKE_RUN_CODE"]
if text == "none":
    sys.exit(1)
if RANK == 0:
    Path(os.environ["SOAR_MEGA_EXIT_CODE_FILE"]).write_text(f"{text}\n")
sys.exit(int(text))

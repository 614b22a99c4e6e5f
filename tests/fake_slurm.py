"""Fake ``sbatch``, ``srun``, ``scontrol`` and ``apptainer``, which record how they are called.

``python -S fake_slurm.py PROGRAM ARGUMENTS...``; ``tests/slurm_jobs.py`` makes commands of it. Each
call is a line in ``$FAKE_SLURM/calls.jsonl``. What they do, by the environment:

- srun runs the command ``FAKE_TASKS`` times with Slurm's variables, hands USR1 and USR2 to the
  tasks and kills them at TERM, as the real one does; its code is the highest one, or
  ``FAKE_SRUN_CODE``.
- scontrol names ``FAKE_HOSTS`` as host names; ``requeue`` sends TERM to the job script, or refuses
  (``FAKE_REQUEUE=refuse``).
- apptainer runs Python as its child and hands signals on.
- sbatch tells an id, with ``FAKE_CLUSTER`` after it; call number ``FAKE_SBATCH_FAILS_AT`` fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])
CALLS = FOLDER / "calls.jsonl"
# Options of srun that stand before the command are all --name=value.
OUTPUT = "--output="


def record(program: str, arguments: list[str]) -> int:
    """Write the call down; returns how often the program was called before."""
    stdin = sys.stdin.read() if program == "sbatch" and not sys.stdin.isatty() else ""
    call = {"program": program, "arguments": arguments, "stdin": stdin, "environ": {**os.environ}}
    before = CALLS.read_text().splitlines() if CALLS.exists() else []
    with CALLS.open("a") as file:
        file.write(json.dumps(call) + "\n")
    return sum(json.loads(line)["program"] == program for line in before)


def srun(arguments: list[str]) -> int:
    first = next(n for n, text in enumerate(arguments) if not text.startswith("--"))
    options, command = arguments[:first], arguments[first:]
    pattern = next((o[len(OUTPUT) :] for o in options if o.startswith(OUTPUT)), None)
    tasks: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _frame: object) -> None:
        for task in tasks:
            task.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)

    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, hand_on)
    count = int(os.environ.get("FAKE_TASKS", "1"))
    for rank in range(count):
        place = {
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(count),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
        }
        output = None
        if pattern is not None:
            name = "%".join(part.replace("%t", str(rank)) for part in pattern.split("%%"))
            output = Path(name).open("ab")  # noqa: SIM115  # the task's
        tasks.append(
            subprocess.Popen(
                command, env=os.environ | place, stdout=output, stderr=subprocess.STDOUT
            )
        )
    (FOLDER / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    # A task that a signal ended counts 128 and more, as in a shell.
    codes = [task.wait() for task in tasks]
    return int(os.environ.get("FAKE_SRUN_CODE", max(c if c >= 0 else 128 - c for c in codes)))


def apptainer(arguments: list[str]) -> int:
    command = [sys.executable, *arguments[arguments.index("python") + 1 :]]
    process = subprocess.Popen(command)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: process.send_signal(number))
    return process.wait()


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print(os.environ.get("FAKE_HOSTS", "").replace(" ", "\n"))
    elif os.environ.get("FAKE_REQUEUE") == "refuse":
        print("Requested operation is presently disabled", file=sys.stderr)
        return 1
    else:
        os.kill(os.getppid(), signal.SIGTERM)
    return 0


def sbatch(call: int) -> int:
    if str(call + 1) == os.environ.get("FAKE_SBATCH_FAILS_AT"):
        print("sbatch: error: invalid partition specified", file=sys.stderr)
        return 1
    print(f"{100 + call}{os.environ.get('FAKE_CLUSTER', '')}")
    return 0


def main(program: str, arguments: list[str]) -> int:
    call = record(program, arguments)
    if program == "sbatch":
        return sbatch(call)
    return {"srun": srun, "scontrol": scontrol, "apptainer": apptainer}[program](arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

#!/usr/bin/env python
"""Says what is wrong with the machines of a job, with a configuration on them, or with a run
folder, and how to mend it.

Without an argument, or with a configuration (.yaml): this machine, or under srun or torchrun all
machines of the job. Versions, GPUs, whether all processes reach rank 0, an all-reduce; and of the
configuration whether it is valid, the run folder is on shared storage with room for checkpoints,
the model is there and the data can be read. It is the first step of a job of slurm/train.sbatch.
Exit code 78 if a PROBLEM is of configuration, model or data, so that no start can work; 1 if
machines alone are sick; else 0.

With a run folder: checkpoints (every file is read and its hash compared), what lies beside them,
where the weights come from, which steps a restart does again, skipped steps, room on the disk, the
base model, and what checkpoint.resume=latest would choose; changes nothing. Exit code 1 if there is
a PROBLEM, else 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from soar_mega.launch.environment import is_first_process
from soar_mega.launch.exit_codes import CONFIG_ERROR, REQUEUE
from soar_mega.launch.findings import Finding, sick
from soar_mega.training.machine_doctor import consult

_EPILOG = """\
examples:
  python tools/doctor.py
  python tools/doctor.py configs/sd35_medium_soar.yaml parallel.tensor_model_parallel_size=2
  srun python tools/doctor.py configs/sd35_medium_soar.yaml
  torchrun --nproc-per-node 8 tools/doctor.py configs/sd35_medium_soar.yaml
  python tools/doctor.py runs/sd35_medium_soar
  python tools/doctor.py runs/sd35_medium_soar --quick
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN_DIR|CONFIG.yaml",
        help="run.dir of a run, or a configuration, as for training (default: the machine alone)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="win over the configuration",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="of a run folder: compare sizes of checkpoint files only; a flipped bit goes "
        "unnoticed",
    )
    parser.add_argument(
        "--limit",
        type=_seconds,
        default=120.0,
        metavar="SECONDS",
        help="of machines: longest wait for all processes to come, and for an all-reduce "
        "(default: %(default)g)",
    )
    given = parser.parse_intermixed_args(arguments)
    if given.target is None or given.target.endswith((".yaml", ".yml")):
        if given.quick:
            parser.error("--quick is for a run folder")
        return _machines([given.target, *given.overrides] if given.target else [], given.limit)
    if given.overrides:
        parser.error(f"{given.overrides[0]}: overrides are for a configuration (.yaml)")
    return _run_folder(Path(given.target), given.quick)


def _machines(settings: list[str], limit_s: float) -> int:
    # A signal before the end of a job, or its preemption: the job's script starts it again.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(REQUEUE))
    first = is_first_process(os.environ)
    findings = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        print(finding, file=sys.stdout if first else sys.stderr, flush=True)

    code = consult(settings, os.environ, limit_s=limit_s, tell=tell)
    if first:
        problems = sum(finding.level == "PROBLEM" for finding in findings)
        counted = f"{problems} PROBLEM{'s' if problems > 1 else ''}" if problems else "no PROBLEM"
        helps = "; starting again does not help" if code == CONFIG_ERROR else ""
        print(f"doctor: {counted}, exit code {code}{helps}", flush=True)
    return code


def _run_folder(folder: Path, quick: bool) -> int:
    from soar_mega.training.run_doctor import examine

    findings = []
    for finding in examine(folder, quick=quick):
        print(finding, flush=True)
        findings.append(finding)
    return 1 if sick(findings) else 0


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a driver or file system that hangs must not keep the process

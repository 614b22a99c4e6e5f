#!/usr/bin/env python
r"""Checks a training job and submits it to Slurm: slurm/train.sbatch, filled in.

Checked are the configuration for that number of GPUs, its memory, that data, model and run folder
are there and on storage that all nodes see, and that the signal before the end leaves time for a
step and a checkpoint. What fails is told and nothing is submitted (exit code 78).

    tools/submit.py configs/sd35_medium_soar.yaml --nodes 2 --gpus-per-node 8 --dry-run
    tools/submit.py configs/sd35_medium_soar.yaml train.max_train_steps=500 --nodes 2 \
        --gpus-per-node 8 --sbatch partition=gpu
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from soar_mega.launch.exit_codes import CONFIG_ERROR
from soar_mega.launch.rendering import Job, render
from soar_mega.training.plan_times import GPUS
from soar_mega.training.submission import Size, check_submission

_HOME = Path(__file__).resolve().parents[1]
_MOUNTS = Path("/proc/mounts")
# With partition, account and QOS of cluster.env.
_SUBMIT = """
SOAR_MEGA_HOME="$1"
source "$SOAR_MEGA_HOME/slurm/common.sh"
read_settings
exec sbatch "${@:2}"
"""


def main(arguments: list[str] | None = None) -> int:
    """Check, then print or submit; returns the exit code."""
    given = _parser().parse_intermixed_args(arguments)
    size = Size(
        given.nodes, given.gpus_per_node, given.gpu, given.signal_lead, given.allow_local_storage
    )
    mounts = _MOUNTS.read_text() if _MOUNTS.exists() else ""
    problems = check_submission(given.config, given.overrides, size, mounts)
    if not given.dry_run and problems:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        print("nothing was submitted", file=sys.stderr)
        return CONFIG_ERROR
    job = _job(given)
    template = (_HOME / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    try:
        script = render(template, job, problems)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIG_ERROR
    if given.dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        print(
            "error: there is no sbatch here: run this on a login node, or submit there what "
            "--dry-run prints",
            file=sys.stderr,
        )
        return 1
    # On the command line too: SBATCH_* of the environment win over the options in a script.
    options = [f"--{name}={value}" if value else f"--{name}" for name, value in job.options.items()]
    command = ["bash", "-uc", _SUBMIT, "bash", str(_HOME), *options]
    return subprocess.run(command, input=script, text=True, check=False).returncode


def _job(given: argparse.Namespace) -> Job:
    options = {
        "job-name": given.job_name or Path(given.config).stem,
        "nodes": str(given.nodes),
        "ntasks-per-node": str(given.gpus_per_node),
        "gpus-per-node": str(given.gpus_per_node),
        "time": given.time,
        "signal": f"USR1@{given.signal_lead}",
    }
    for option in given.sbatch:
        name, _, value = option.partition("=")
        options[name.removeprefix("--")] = value
    settings = {"SIGNAL_LEAD_S": str(given.signal_lead)}
    if given.launcher is not None:
        settings["LAUNCHER"] = given.launcher
    return Job(_HOME, [given.config, *given.overrides], options, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, as for training")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="win over the file"
    )
    parser.add_argument("--nodes", type=_positive, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=_positive, required=True, metavar="G")
    parser.add_argument("--time", default="24:00:00", help="time limit (default: %(default)s)")
    parser.add_argument("--job-name", help="default: the configuration's file name")
    parser.add_argument(
        "--launcher",
        choices=("srun", "torchrun"),
        help="what starts a node's processes (default: as in cluster.env, else srun)",
    )
    parser.add_argument(
        "--signal-lead",
        type=_positive,
        default=300,
        metavar="SECONDS",
        help="from the signal to the job's end: a step and a checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="another option of sbatch, as partition=gpu; can be repeated",
    )
    names = ", ".join(GPUS)
    parser.add_argument(
        "--gpu", default="H200", help=f"whose memory is checked: {names} (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-local-storage",
        action="store_true",
        help="do not ask for storage that all nodes share",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the script and nothing else; failed checks are comments in it",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())

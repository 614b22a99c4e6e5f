"""What a run's exit code means to whoever started it, above all a job script.

The exit code of ``srun`` or torchrun says little: srun gives the highest one of all tasks, and that
of a peer killed on the way out (137) is above all of these; torchrun makes every code a 1. So rank
0 writes its own code into the file that ``SOAR_MEGA_EXIT_CODE_FILE`` names, as its last act. A run
that leaves no file has crashed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from soar_mega.launch.environment import is_first_process
from soar_mega.telemetry.files import write_whole

DONE = 0
FAILED = 1
REQUEUE = 75  # sysexits' EX_TEMPFAIL: saved, start me again
CONFIG_ERROR = 78  # sysexits' EX_CONFIG
DO_NOT_RESTART = 93

FILE_VARIABLE = "SOAR_MEGA_EXIT_CODE_FILE"


def write_exit_code(code: int, environ: Mapping[str, str]) -> None:
    """Write the code where the launcher wants it; nothing on other ranks, or where it does not.

    Raises:
        OSError: The file cannot be written.
    """
    name = environ.get(FILE_VARIABLE)
    if not name or not is_first_process(environ):
        return
    write_whole(Path(name), f"{code}\n")

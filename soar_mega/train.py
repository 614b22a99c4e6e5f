"""``python -m soar_mega.train CONFIG.yaml [section.key=value ...]``, also by torchrun and srun."""

from __future__ import annotations

import argparse
import os
import sys
import time

from soar_mega.config import ConfigError, describe_keys, dump_yaml, load_config
from soar_mega.launch.environment import is_first_process
from soar_mega.launch.exit_codes import (
    CONFIG_ERROR,
    DO_NOT_RESTART,
    DONE,
    FAILED,
    REQUEUE,
    write_exit_code,
)
from soar_mega.launch.signals import Signals

_RANK_0_SECONDS = 20.0  # an interpreter's start on a slow shared disk; rank 0's end cuts it short


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 75 saved after a signal and to be started again, 78
    configuration or inputs cannot work, 93 do not restart.

    93 means that a chain of jobs must not go on by itself: the same start would fail in the same
    way (too many steps skipped, too many bad samples, crashes from the same step), or somebody
    asked the run to stop.
    """
    # Before anything that takes time: a signal that nobody listens to kills the process.
    signals = Signals()
    signals.listen()
    try:
        code = _run(argv, signals)
        # Before the signals are given back: one more, as Slurm's TERM, would end the process here.
        write_exit_code(code, os.environ)
    finally:
        signals.close()
    return code


def _run(argv: list[str] | None, signals: Signals) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soar_mega.train",
        description="Pretrain, fine-tune or SOAR-train an SD3-family MMDiT.",
        epilog="examples:\n"
        "  python -m soar_mega.train configs/tiny_soar.yaml train.max_train_steps=5\n"
        "  torchrun --nproc-per-node 2 -m soar_mega.train configs/tiny_soar.yaml "
        "parallel.tensor_model_parallel_size=2\n"
        "  torchrun --nproc-per-node 4 -m soar_mega.train configs/tiny_soar.yaml "
        "parallel.pipeline_model_parallel_size=4 parallel.pipeline_schedule=zero_bubble\n"
        "\nsettings:\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file; its base: may name files to inherit from")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="win over the file"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(dump_yaml(config), end="")
            return DONE
    except ConfigError as error:
        _let_rank_0_speak(signals)
        return _fail(error, CONFIG_ERROR)
    # torch and the model libraries take seconds to import; a typo is told before.
    from soar_mega.checkpoint.errors import CheckpointError
    from soar_mega.data.errors import DataError, TooManyBadSamplesError
    from soar_mega.launch.processes import leave_processes
    from soar_mega.launch.rendezvous import RendezvousError
    from soar_mega.parallel.errors import PeerError
    from soar_mega.training.health import SickRunError
    from soar_mega.training.starts import StuckRunError
    from soar_mega.training.trainer import train

    try:
        outcome = train(config, signals)
    except ConfigError as error:
        code = _fail(error, CONFIG_ERROR)
    except (SickRunError, StuckRunError, TooManyBadSamplesError) as error:
        code = _fail(error, DO_NOT_RESTART)
    except CheckpointError as error:
        return _fail(error, FAILED)
    except RendezvousError as error:
        return _fail(RuntimeError(f"{error}: {error.fix}"), FAILED, everywhere=True)
    except PeerError as error:  # each rank names what it was waiting for
        return _fail(error, FAILED, everywhere=True)
    except DataError as error:  # one rank's sample: the others have not heard of it
        return _fail(error, FAILED, everywhere=True)
    else:
        return {"finished": DONE, "stopped": DO_NOT_RESTART, "interrupted": REQUEUE}[outcome]
    leave_processes()  # a Slurm job is given again, or not, by the exit code
    return code


def _let_rank_0_speak(signals: Signals) -> None:
    """Wait before ending where rank 0 may not have come as far; until the launcher ends this rank.

    Launchers end all ranks when one fails, and before the rendezvous rank 0 may still be importing.
    """
    last = time.monotonic() + _RANK_0_SECONDS
    while not is_first_process(os.environ) and not signals.received and time.monotonic() < last:
        time.sleep(0.1)


def _fail(error: Exception, code: int, *, everywhere: bool = False) -> int:
    """Print the message, on rank 0 alone where every rank has the same; returns the exit code."""
    if everywhere or is_first_process(os.environ):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Draw a prompt set with models, score the pictures, and lay the models side by side."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from soar_mega.config import ConfigError
from soar_mega.launch.environment import ProcessEnvironment, is_first_process
from soar_mega.launch.exit_codes import CONFIG_ERROR, DONE, FAILED

if TYPE_CHECKING:
    from soar_mega.evaluation.plan import Settings

_EPILOG = """\
examples:
  tools/evaluate.py runs/soar --prompts prompts.txt --scorers clipscore=weights --out eval/soar
  torchrun --nproc-per-node 8 tools/evaluate.py sft=runs/sft soar=runs/soar \\
      base=stabilityai/stable-diffusion-3.5-medium@COMMIT --prompts geneval.jsonl \\
      --format geneval --repeats 4 --scorers geneval=weights --out eval/geneval
  srun tools/evaluate.py runs/large --tensor-parallel 2 --prompts ocr.jsonl --format ocr \\
      --scorers ocr=weights --out eval/ocr

OUT gets pictures/LABEL/PROMPT_REPEAT.png, results.json, scores.jsonl (of each picture), report.html
and report.png, and run.json (time, processes). Pictures that are there are kept: the same command
goes on where it was stopped, with more --scorers, --repeats or prompts of a larger --limit it does
what is new. A folder whose pictures follow from other settings, prompts or weights is refused.

Without --scorers pictures are drawn and laid side by side. Started with torchrun or srun the
processes share the work; results.json is the same for any number of them. OUT must be on storage
that all of them see. CUDA is used if there is a device (bf16), else the CPU (fp32).

exit codes: 0 done, 1 failed, 78 the arguments or their files cannot work
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a run folder (its newest checkpoint), a checkpoint, a diffusers folder, or "
        "owner/name@COMMIT of the hub; LABEL=MODEL names its column (default: its folder's name)",
    )
    add("--prompts", type=Path, required=True, metavar="FILE", help="the prompt set")
    add(
        "--format",
        default="lines",
        help="of that file: geneval, ocr, drawbench, pickscore, handwriting or lines "
        "(default: %(default)s)",
    )
    add("--limit", type=int, metavar="N", help="take the first N prompts only")
    add("--repeats", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    add(
        "--seed",
        type=int,
        default=0,
        help="of the first prompt; prompt i has SEED + i, whoever draws it (default: 0)",
    )
    add("--steps", type=int, default=28, metavar="N", help="sampling steps (default: 28)")
    add(
        "--guidance",
        type=float,
        default=4.5,
        metavar="SCALE",
        help="classifier-free guidance scale; 1 switches it off (default: 4.5)",
    )
    add("--size", type=int, metavar="PIXELS", help="side (default: what the model config names)")
    add(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="pictures of one pass; part of what pictures follow from (default: %(default)s)",
    )
    add(
        "--weights",
        choices=("ema", "plain"),
        default="ema",
        help="which weights of a checkpoint; a diffusers folder has one kind (default: ema)",
    )
    add(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="processes that share each layer (default: 1)",
    )
    add(
        "--pipeline-parallel",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the layers among them (default: 1)",
    )
    add(
        "--scorers",
        nargs="+",
        default=[],
        metavar="NAME[=LOCATION]",
        help="what judges the pictures, and where its weights are; see docs/evaluation.md",
    )
    add("--out", type=Path, required=True, metavar="OUT", help="folder to write or to go on with")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and evaluate; returns the exit code."""
    args = _parser().parse_args(arguments)
    # They take seconds to import; a wrong option is told before.
    from soar_mega.checkpoint.errors import CheckpointError
    from soar_mega.evaluation.plan import Settings
    from soar_mega.evaluation.scoring import ScoringError
    from soar_mega.launch.processes import leave_processes
    from soar_mega.launch.rendezvous import RendezvousError
    from soar_mega.parallel.errors import PeerError

    given = {key: value for key, value in vars(args).items() if key in Settings.__annotations__}
    try:
        _evaluate(Settings(**given), args.models, args.scorers, args.out)
    except ConfigError as error:
        code = _fail(error, CONFIG_ERROR)
    except (CheckpointError, ScoringError) as error:
        code = _fail(error, FAILED)
    except (PeerError, OSError) as error:  # of this process: the others have not heard of it
        return _fail(error, FAILED, everywhere=True)
    except RendezvousError as error:
        return _fail(RuntimeError(f"{error}: {error.fix}"), FAILED, everywhere=True)
    else:
        code = DONE
    leave_processes()
    return code


def _evaluate(settings: Settings, models: list[str], named: list[str], out: Path) -> None:
    import torch

    from soar_mega.evaluation.plan import prepare
    from soar_mega.evaluation.run import evaluate
    from soar_mega.evaluation.scoring import make_scorers, parse_scorers, try_out
    from soar_mega.evaluation.table import table
    from soar_mega.launch.processes import device_of, start_processes
    from soar_mega.parallel.mesh import Mesh
    from soar_mega.training.together import agree_on_problem

    process = ProcessEnvironment.read(os.environ)
    device = device_of("auto", process)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # scorers are not ours
    problem, plan, scorers, locations = None, None, [], {}
    try:
        locations = parse_scorers(named, "--scorers")
        plan = prepare(settings, models, process.world_size)
        scorers = make_scorers(locations, device, "--scorers")
        for size in {model.size for model in plan.models.values()}:
            try_out(scorers, plan.prompts, size, "--scorers")
        if process.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
    except (ConfigError, ValueError, OSError) as error:
        problem = str(error)
    limit = timedelta(hours=2)  # rank 0 alone judges whole sets
    start_processes(process, device, limit)
    agree_on_problem(problem)
    assert plan is not None
    mesh = Mesh.build(settings.tensor_parallel, device, limit, settings.pipeline_parallel)
    results = evaluate(
        plan, scorers, locations, out, mesh, lambda line: print(line, file=sys.stderr, flush=True)
    )
    if results is not None:
        if results["scorers"]:
            print(table(results))
        print(f"wrote {out}")


def _fail(error: Exception, code: int, *, everywhere: bool = False) -> int:
    """Print the message, on rank 0 alone where every rank has the same; returns the exit code."""
    if everywhere or is_first_process(os.environ):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

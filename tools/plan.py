#!/usr/bin/env python
"""Shows what a configuration would need and take on so many GPUs, without starting anything.

Parameters, memory, FLOPs, pipeline bubble, bytes on every link, and a modelled step time. Of
model.pretrained only transformer/config.json has to be there, of the data nothing. A layout that
cannot work is refused with exit code 78, and the nearest ones that work are named.

    tools/plan.py configs/sd35_medium_soar.yaml parallel.pipeline_model_parallel_size=2 --gpus 8
"""

from __future__ import annotations

import argparse
import json
import sys

from soar_mega.config import ConfigError, load_config
from soar_mega.launch.exit_codes import CONFIG_ERROR
from soar_mega.training.plan import EFFICIENCY, make_plan
from soar_mega.training.plan_table import summary, table
from soar_mega.training.plan_times import GPUS, gpu_named


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, as for training")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="win over the file"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="processes of the run")
    names = ", ".join(GPUS)
    parser.add_argument("--gpu", default="H200", help=f"one of {names} (default: %(default)s)")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=EFFICIENCY,
        metavar="SHARE",
        help="share of the GPU's peak at which FLOPs are done (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        plan = make_plan(config, arguments.gpus, gpu_named(arguments.gpu), arguments.efficiency)
        text = json.dumps(summary(plan), indent=2) if arguments.json else table(plan)
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIG_ERROR
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m soar_mega.train CONFIG.yaml [section.key=value ...]``, also by torchrun and srun."""

from __future__ import annotations

import argparse
import os
import sys

from soar_mega.config import ConfigError, describe_keys, dump_yaml, load_config

EXIT_CONFIG_ERROR = 78


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 78 the configuration or its inputs cannot work."""
    parser = argparse.ArgumentParser(
        prog="python -m soar_mega.train",
        description="Pretrain, fine-tune or SOAR-train an SD3-family MMDiT.",
        epilog="examples:\n"
        "  python -m soar_mega.train configs/tiny_soar.yaml train.max_train_steps=5\n"
        "  torchrun --nproc-per-node 2 -m soar_mega.train configs/tiny_soar.yaml "
        "parallel.tensor_model_parallel_size=2\n\nsettings:\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file; its base: may name files to inherit from")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="win over the file"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(dump_yaml(config), end="")
            return 0
        # torch and the model libraries take seconds to import; a typo is told at once.
        from soar_mega.training.trainer import train

        train(config)
    except ConfigError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Carries what the project needs to a GPU machine that has torch and no internet.

pack    on a machine with a package registry: download the wheels (diffusers, pydantic, DALI,
        Transformer Engine, ... and the source of its torch extension; no torch, no CUDA
        libraries, no apex) and cut them into numbered folders, each small enough for one upload.
unpack  on the GPU machine: join the folders that have arrived, verify them, install what is not
        there yet, compile Transformer Engine's extension against the torch that is there, and say
        what imports. torch is left as it is. It can be called again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from soar_mega.install.pieces import PiecesError, cut, join
from soar_mega.install.wheels import (
    WheelsError,
    compile_extension,
    download,
    imports,
    install,
)

ROOT = Path(__file__).resolve().parents[1]
_MIB = 2**20
_PACK = """\
example, on a machine with a registry (some 700 MB; no GPU needed; python3.12 asks for what 3.12
needs, another version may ask for other small packages):
  python3.12 tools/gpu_wheels.py pack wheels
then copy wheels/01, wheels/02, ... and the repository to the GPU machine.
"""
_UNPACK = """\
example, on the GPU machine, in the repository (minutes: it compiles):
  python tools/gpu_wheels.py unpack wheels
  python tools/doctor.py configs/sd35_medium_soar.yaml
where site-packages cannot be written to:
  python tools/gpu_wheels.py unpack wheels --target packages
  PYTHONPATH=packages:. python tools/doctor.py
"""


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    try:
        return pack(args) if args.what == "pack" else unpack(args)
    except (WheelsError, PiecesError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_PACK + "\n" + _UNPACK, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="pack|unpack")
    one = commands.add_parser("pack", epilog=_PACK, formatter_class=raw)
    one.add_argument("out", type=Path, help="new folder for the numbered ones")
    one.add_argument("--piece-mib", type=float, default=60, help="of a folder, at most (60)")
    one.add_argument("--python", default="3.12", help="version on the GPU machine (3.12)")
    one.add_argument("--cuda", default="13.0", help="version of its torch (13.0)")
    one = commands.add_parser("unpack", epilog=_UNPACK, formatter_class=raw)
    one.add_argument("folders", type=Path, nargs="+", help="with pieces at any depth")
    one.add_argument("--partial", action="store_true", help="go on without what is not whole")
    one.add_argument("--target", type=Path, help="install into this folder instead")
    one.add_argument(
        "--no-compile", action="store_true", help="without Transformer Engine's extension"
    )
    one.add_argument("--jobs", type=int, default=8, help="compilers at once (8)")
    one.add_argument("--cuda", default="13.0", help="as for pack (13.0)")
    return parser


def pack(args: argparse.Namespace) -> int:
    if f"{sys.version_info.major}.{sys.version_info.minor}" != args.python:
        print(
            f"note: pip reads conditions on Python's version as this Python's, not {args.python}'s"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = download(
            Path(folder), python=args.python, cuda=args.cuda, tested=ROOT / "constraints.txt"
        )
        cuts = cut(files, args.out, int(args.piece_mib * _MIB))
    for one in cuts:
        places = ", ".join(dict.fromkeys(piece.folder for piece in one.pieces))
        print(f"{one.bytes / _MIB:8.1f} MiB  {one.name}  in {places}")
    folders = {piece.folder for one in cuts for piece in one.pieces}
    size = sum(one.bytes for one in cuts) / _MIB
    print(f"{len(cuts)} files, {size:.1f} MiB, {len(folders)} folders in {args.out}")
    return 0


def unpack(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        files, wrong = join(args.folders, Path(folder), partial=args.partial)
        for text in wrong:
            print(text)
        names = install(files, cuda=args.cuda, target=args.target)
        print(f"installed: {', '.join(names) or 'nothing, all was there'}")
        if not args.no_compile:
            done = compile_extension(files, jobs=args.jobs, target=args.target)
            print(f"transformer_engine_torch: {'compiled' if done else 'nothing to compile'}")
    found = imports(args.target)
    for name, problem in found.items():
        print(f"{'imports' if problem is None else 'FAILS  '}  {name}  {problem or ''}".rstrip())
    return 0 if not wrong and not any(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

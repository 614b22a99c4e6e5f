"""The demo: pretrain a tiny MMDiT on real handwriting, SOAR-train it, export it, read its pictures.

Every step is the command a user would type, run in a process of its own; the pictures are drawn by
diffusers' ``StableDiffusion3Pipeline`` from the exported folders.
"""

from __future__ import annotations

import json
import multiprocessing
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from soar_mega.data.libraries import quiet_libraries
from soar_mega.data.tiny.digits import PICTURE_SIZE, Scene, held_out_scenes
from soar_mega.evaluation.digits import load_reader
from soar_mega.evaluation.report import table, write_report

_BATCH = 64
_MADE = ("tiny", "pretrain", "soar", "before", "export")


class DemoError(RuntimeError):
    """A step of the demo failed; the message names its command."""


class Demo:
    """One run of the demo.

    Args:
        root: The checkout with ``configs/`` and ``tools/``.
        out: Folder for everything the demo makes; an earlier demo in it is replaced.
        processes: Tensor-parallel processes.
        overrides: ``phase.section.key=value`` settings of the phases ``pretrain`` and ``soar``, for
            shorter or longer runs.
        pictures: Held-out prompts that are drawn and read, before and after.
        steps, guidance: How they are sampled.
    """

    def __init__(
        self,
        root: Path,
        out: Path,
        *,
        processes: int = 2,
        overrides: Sequence[str] = (),
        pictures: int = 128,
        steps: int = 20,
        guidance: float = 3.0,
    ) -> None:
        self.root, self.out, self.processes = root, out, processes
        self.overrides, self.pictures = overrides, pictures
        self.steps, self.guidance = steps, guidance
        self._began = time.monotonic()
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All steps; returns the scores by label (``pretrained``, ``after SOAR``).

        Raises:
            DemoError: A step failed.
        """
        self._clear()
        tiny = self.out / "tiny"
        self._tool("make pictures and a tiny SD3.5", "tools/make_tiny.py", "--out", tiny)
        self._train("pretrain", tiny)
        self._train("soar", tiny, f"model.init_from={self.out / 'pretrain'}")
        self._export("pretrain", "before")
        self._export("soar", "export")
        return self._report()

    def _clear(self) -> None:
        """Remove what an earlier demo left, and nothing that anything else made."""
        marker = self.out / ".soar_mega_demo"
        left = [name for name in _MADE if (self.out / name).exists()]
        if left and not marker.exists():
            raise DemoError(f"{self.out} holds {', '.join(left)} that no demo made: choose another")
        for name in left:
            shutil.rmtree(self.out / name)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError as error:
            raise DemoError(f"{self.out} cannot be written: {error}") from error

    def _train(self, phase: str, tiny: Path, *settings: str) -> None:
        prefix = f"{phase}."
        extra = [o.removeprefix(prefix) for o in self.overrides if o.startswith(prefix)]
        self._step(
            {"pretrain": "pretrain", "soar": "continue with SOAR"}[phase],
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(self.processes), "-m", "soar_mega.train"),
                str(self.root / "configs" / f"demo_{phase}.yaml"),
                f"run.dir={self.out / phase}",
                f"model.pretrained={tiny / 'sd35'}",
                f"data.shards={tiny / 'shards' / 'train-*.tar'}",
                f"validation.shards={tiny / 'shards' / 'heldout-*.tar'}",
                f"parallel.tensor_model_parallel_size={self.processes}",
                *settings,
                *extra,
            ],
        )

    def _export(self, phase: str, name: str) -> None:
        self._tool(
            f"export {phase} to diffusers",
            "tools/convert_to_diffusers.py",
            self.out / phase,
            self.out / name,
        )

    def _tool(self, title: str, script: str, *arguments: object) -> None:
        self._step(title, [sys.executable, str(self.root / script), *map(str, arguments)])

    def _step(self, title: str, command: list[str]) -> None:
        began = time.monotonic()
        print(f"\n[{began - self._began:4.0f} s] {title}\n  {shlex.join(command)}", flush=True)
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            raise DemoError(f"the step '{title}' failed with exit code {done.returncode}")
        self.seconds[title] = time.monotonic() - began

    def _report(self) -> dict[str, Any]:
        began = time.monotonic()
        print(f"\n[{began - self._began:4.0f} s] draw and read held-out prompts", flush=True)
        scenes = held_out_scenes(self.pictures, seed=0)
        folders = {"pretrained": self.out / "before", "after SOAR": self.out / "export"}
        # Both at once, one thread each: threads wait for each other on a busy machine.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(folders), mp_context=context) as pool:
            jobs = {
                label: pool.submit(_draw, folder, scenes, self.steps, self.guidance)
                for label, folder in folders.items()
            }
            pictures = {label: job.result() for label, job in jobs.items()}
        self.seconds["draw and read"] = time.monotonic() - began
        scores = write_report(
            self.out,
            scenes,
            pictures,
            load_reader(),
            notes={
                "num_inference_steps": self.steps,
                "guidance_scale": self.guidance,
                "processes": self.processes,
                "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            },
        )
        folder = self.out / "pictures"
        folder.mkdir(exist_ok=True)
        for number, picture in enumerate(pictures["after SOAR"][:16]):
            picture.resize((256, 256), Image.Resampling.NEAREST).save(folder / f"{number:02d}.png")
        captions = [scene.caption for scene in scenes[:16]]
        (folder / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")
        print(f"\n{self.pictures} prompts with numbers no training picture showed:\n")
        print(table(scores))
        return dict(scores)

    def farewell(self) -> str:
        """Where everything lies and what to do next."""
        out = self.out
        return "\n".join(
            [
                f"\ndone in {time.monotonic() - self._began:.0f} s",
                f"  {out / 'before_after.png'}   before and after SOAR, with what was read",
                f"  {out / 'pictures'}           pictures of the SOAR-trained model",
                f"  {out / 'report.json'}        the table, every reading, timings",
                f"  {out / 'export'}             the model: open it with",
                "      from diffusers import StableDiffusion3Pipeline",
                f"      pipeline = StableDiffusion3Pipeline.from_pretrained('{out / 'export'}')",
                '      pipeline("the number 42 in red ink on white paper, top left", height=64,',
                "               width=64, max_sequence_length=16).images[0]",
                f"  {out / 'pretrain'}, {out / 'soar'}   runs: metrics.jsonl, checkpoints",
                "next: draw your own number",
                f"  .venv/bin/python tools/generate.py {out / 'export'} --out {out / 'mine'} "
                '--prompt "the number 42 in blue ink on white paper, top left"',
            ]
        )


def _draw(folder: Path, scenes: Sequence[Scene], steps: int, guidance: float) -> list[Image.Image]:
    """What ``StableDiffusion3Pipeline`` draws: one picture a scene, seeds 0, 1, ..."""
    quiet_libraries()
    from diffusers import StableDiffusion3Pipeline

    torch.set_num_threads(1)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn: list[Image.Image] = []
    for start in range(0, len(scenes), _BATCH):
        part = scenes[start : start + _BATCH]
        seeds = range(start, start + len(part))
        drawn += pipeline(
            [scene.caption for scene in part],
            height=PICTURE_SIZE,
            width=PICTURE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipeline.tokenizer_3.model_max_length,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
    return drawn

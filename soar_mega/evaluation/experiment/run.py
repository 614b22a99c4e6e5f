"""Runs the experiment: data, every arm with every seed, pictures and scores of them all.

Every step is a command a user could type, in a process of its own, and leaves a folder; what is
there is not done again, so a stopped experiment goes on where it was. One process and one thread a
run, ``jobs`` runs at a time: on a small machine that is faster than runs that share a step.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soar_mega.evaluation.experiment.arms import SAMPLINGS, Arm, Sampling

_SETS = ("curated", "heldout")
_SCORERS = ("handwriting", "handwriting_frechet")
BASE = "base"
_EXPOSED = 256  # samples whose way to the picture is followed


class ExperimentError(RuntimeError):
    """A step of the experiment failed; the message names its log."""


class Experiment:
    """One folder of runs and results.

    Args:
        root: The checkout with ``configs/`` and ``tools/``.
        out: Folder of the experiment.
        seeds: Repetitions of every arm, seeds 1, 2, ...
        jobs: Runs at a time.
        pictures: Held-out prompts that are drawn and read.
        pages: Curated pages to train on.
        overrides: ``section.key=value`` for every training run.
    """

    def __init__(
        self,
        root: Path,
        out: Path,
        *,
        seeds: int,
        jobs: int = 2,
        pictures: int = 512,
        pages: int = 4096,
        overrides: Sequence[str] = (),
    ) -> None:
        self.root, self.out = root, out
        self.seeds, self.jobs, self.pictures = range(1, seeds + 1), jobs, pictures
        self.pages, self.overrides = pages, tuple(overrides)
        self._began = time.monotonic()

    def run(self, arms: Sequence[Arm], samplings: Sequence[Sampling] = SAMPLINGS) -> dict[str, Any]:
        """Everything that is not there yet; returns each sampling's ``results.json`` by its name.

        Raises:
            ExperimentError: A step failed, or the folder is of another experiment.
        """
        self._claim(arms)
        self.make_data()
        self.train(arms)
        return {sampling.name: self.judge(arms, sampling) for sampling in samplings}

    def _claim(self, arms: Sequence[Arm]) -> None:
        # Seeds and arms may be added to a folder; nothing else may change what is in it.
        mine = {
            "pages": self.pages,
            "pictures": self.pictures,
            "steps": min(arm.steps for arm in arms),
            "set": list(self.overrides),
        }
        file = self.out / "settings.json"
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(mine) + "\n", encoding="utf-8")
        made = json.loads(file.read_text(encoding="utf-8"))
        for name, value in mine.items():
            if made[name] != value:
                raise ExperimentError(
                    f"{self.out} was made with {name} {made[name]}, now it is {value}: one folder "
                    "holds one experiment; name another with --out"
                )

    def make_data(self) -> None:
        """Pages, the pipeline folder, and both encoded."""
        data = self.out / "data"
        if not (data / "prompts.txt").is_file():
            self._tool(
                "make pages",
                "tools/make_handwriting.py",
                *("--out", data, "--raw-pages", 0),
                *("--curated-pages", self.pages, "--held-out-pages", self.pictures),
            )
        for name in _SETS:
            encoded = self.out / "encoded" / name
            if not (encoded / "encoded.json").is_file():
                self._tool(
                    f"encode {name} pages",
                    "tools/encode_data.py",
                    data / "shards" / f"{name}-*.tar",
                    *("--pretrained", data / "sd35", "--out", encoded),
                    *("--resolution", 64, "--max-sequence-length", 14),
                    processes=self.jobs,
                )

    def train(self, arms: Sequence[Arm]) -> None:
        """Every arm with every seed, ``jobs`` at a time; seed by seed: a part of it compares."""
        with ThreadPoolExecutor(self.jobs) as pool:
            runs = [pool.submit(self._arm, arm, seed) for seed in self.seeds for arm in arms]
            for run in runs:
                run.result()

    def judge(self, arms: Sequence[Arm], sampling: Sampling) -> dict[str, Any]:
        """Draw the held-out prompts with the arms drawn so and score them: its ``results.json``."""
        out = self.out / "pictures" / sampling.name
        drawn = [arm for arm in arms if sampling.name in arm.drawn]
        runs = [f"{arm.name}-{seed}" for arm in drawn for seed in self.seeds]
        models = [f"{BASE}={self.out / 'data' / 'sd35'}"]
        models += [f"{run}={self.out / 'runs' / run}" for run in runs]
        self._tool(
            f"draw and read, {sampling.name}",
            "tools/evaluate.py",
            *models,
            "--prompts",
            self.out / "data" / "prompts.txt",
            *("--format", "handwriting", "--limit", self.pictures, "--batch", 64),
            *("--steps", sampling.steps, "--guidance", sampling.guidance),
            *("--scorers", *_SCORERS),
            *("--out", out),
            processes=self.jobs,
        )
        found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return found

    def measure_exposure(self, arms: Sequence[Arm], sampling: Sampling) -> None:
        """Exposure bias of the arms' first runs along ``sampling``'s steps, into ``exposure/``."""
        out = self.out / "exposure"
        if (out / "exposure_bias.png").is_file():
            return
        seed = self.seeds[0]
        self._tool(
            "exposure bias",
            "tools/exposure_bias.py",
            *(f"{arm.name}={self.out / 'runs' / f'{arm.name}-{seed}'}" for arm in arms),
            *("--shards", self.out / "encoded" / "heldout" / "*.tar"),
            *("--samples", min(self.pictures, _EXPOSED), "--batch", 64),
            *("--steps", sampling.steps, "--guidance", sampling.guidance),
            *("--out", out),
        )

    def _arm(self, arm: Arm, seed: int) -> None:
        run = f"{arm.name}-{seed}"
        folder = self.out / "runs" / run
        if (folder / "finished").is_file():
            return
        settings = [
            f"run.dir={folder}",
            f"run.seed={seed}",
            f"model.pretrained={self.out / 'data' / 'sd35'}",
            f"data.shards={self.out / 'encoded' / 'curated'}/*.tar",
            f"validation.shards={self.out / 'encoded' / 'heldout'}/*.tar",
            f"train.max_train_steps={arm.steps}",
            f"checkpoint.checkpointing_steps={arm.steps}",
            *arm.overrides,
            *self.overrides,
        ]
        config = str(self.root / "configs" / arm.config)
        self._step(f"train {run}", ["-m", "soar_mega.train", config, *settings], 1)
        (folder / "finished").touch()

    def _tool(self, title: str, script: str, *arguments: object, processes: int = 1) -> None:
        self._step(title, [str(self.root / script), *map(str, arguments)], processes)

    def _step(self, title: str, command: list[str], processes: int) -> None:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(processes)]
        log = self.out / "logs" / f"{title.replace(' ', '-').replace(',', '')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        # One write a line: several runs start at a time.
        print(f"[{began - self._began:6.0f} s] {title}\n", end="", flush=True)
        with log.open("w") as file:
            file.write(shlex.join([*launcher, *command]) + "\n")
            file.flush()
            done = subprocess.run(
                [*launcher, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if done.returncode != 0:
            raise ExperimentError(
                f"the step '{title}' failed with exit code {done.returncode}; see {log}"
            )

"""Where a run tells how it goes: metrics file, console, tracker, pictures of schedules."""

from __future__ import annotations

import sys
from pathlib import Path

from soar_mega.config import dump_yaml
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.provenance import write_environment
from soar_mega.pipeline.timeline import Timeline
from soar_mega.pipeline.timeline_picture import draw
from soar_mega.pipeline.trace import write_trace
from soar_mega.telemetry.files import put_aside
from soar_mega.telemetry.metrics import MetricsWriter
from soar_mega.telemetry.progress import Progress
from soar_mega.telemetry.tracking import NoTracker, Tracker, open_tracker
from soar_mega.training.setup import Run


class Reporter:
    """Rank 0's metrics file, console and tracker; silent elsewhere."""

    def __init__(self, run: Run, process: ProcessEnvironment) -> None:
        config = run.config
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        self._tracker: Tracker = NoTracker()
        self._folder: Path | None = None
        if run.mesh.rank != 0:
            return
        folder = self._folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        resolved = folder / "config.resolved.yaml"
        if not resolved.exists() or resolved.read_text() != dump_yaml(config):
            put_aside(resolved)
            resolved.write_text(dump_yaml(config))
        write_environment(folder, process)
        self._writer = MetricsWriter(folder, run.done_steps)
        self._tracker = open_tracker(
            config.logging,
            folder,
            name=config.run.name,
            config=config.model_dump(mode="json"),
            resumed=run.resumed is not None or config.checkpoint.resume == "latest",
        )
        self._progress = Progress(
            config.train.max_train_steps, run.done_steps, every=config.logging.log_every
        )

    def note(self, *texts: str) -> None:
        if self._progress is not None:
            for text in texts:
                self._progress.note(text)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is not None and self._progress is not None:
            self._writer.write(step, metrics)
            self._tracker.log(step, metrics)
            self._progress.update(step, metrics)

    def picture(self, step: int, path: Path | None) -> None:
        if path is not None:
            self._tracker.log_image(step, "val/pictures", path)
            self.note(f"pictures of step {step}: {path}")

    def timeline(self, step: int, timeline: Timeline | None) -> None:
        """Write a recorded step as data, picture and trace."""
        if timeline is None or self._folder is None:
            return
        path = self._folder / "timeline" / f"step_{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        timeline.save(path)
        title = f"{timeline.name}, step {step}, bubble {timeline.bubble:.1%}"
        draw(timeline, path.with_suffix(".svg"), title)
        write_trace(path.with_suffix(".trace.json"), [timeline])
        self.note(f"timeline of step {step}: {path.with_suffix('.svg')}")

    def close(self) -> None:
        if self._writer is not None and self._progress is not None:
            self._progress.close()
            self._writer.close()
            self._tracker.finish(0 if sys.exc_info()[0] is None else 1)

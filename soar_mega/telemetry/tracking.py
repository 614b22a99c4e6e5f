"""Optional tracking with wandb. A tracker never stops a training run: it warns and goes quiet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from soar_mega.config import ConfigError
from soar_mega.config.schema import LoggingConfig

RUN_ID_FILE = "wandb_run_id.txt"

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where metrics go besides the run folder."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Report the metrics of a step; steps may be left out but must grow."""

    def log_image(self, step: int, name: str, path: str | Path) -> None:
        """Report a picture file under a name."""

    def finish(self, exit_code: int = 0) -> None:
        """Say that the run is over; 0 is success."""


class NoTracker:
    """Reports nothing."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_image(self, step: int, name: str, path: str | Path) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""


def open_tracker(
    settings: LoggingConfig,
    run_dir: str | Path,
    *,
    name: str | None,
    config: Mapping[str, Any],
    resumed: bool,
) -> Tracker:
    """The tracker the configuration asks for.

    Args:
        settings: The ``logging`` section.
        run_dir: Folder of the run; keeps the tracker's files and its run id.
        name: Name shown for the run; None: the folder's.
        config: The resolved configuration, shown with the run.
        resumed: Whether this goes on with an earlier run, and so with its tracker run id.

    Raises:
        ConfigError: ``logging.wandb_project`` is set but wandb is not installed.
    """
    if settings.wandb_project is None:
        return NoTracker()
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"logging.wandb_project = {settings.wandb_project!r} needs the package wandb, which is "
            "not installed; install it (pip install 'soar-mega[wandb]') or set "
            "logging.wandb_project=null"
        ) from None
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _WandbTracker(wandb, settings, folder, name or folder.name, config, resumed)
    except Exception as error:  # no network or no login must not keep a job from training
        _log.warning("wandb could not start, this run is not tracked: %s", error)
        return NoTracker()


class _WandbTracker:
    def __init__(
        self,
        wandb: Any,
        settings: LoggingConfig,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        resumed: bool,
    ) -> None:
        id_file = folder / RUN_ID_FILE
        run_id = id_file.read_text().strip() if resumed and id_file.exists() else None
        self._wandb = wandb
        self._run = wandb.init(
            project=settings.wandb_project,
            mode=settings.wandb_mode,
            name=name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(folder),
            config=dict(config),
        )
        id_file.write_text(f"{self._run.id}\n")
        # wandb's own step only ever grows and drops what comes late, for example the steps that a
        # resumed run does again; a key of our own has neither trouble.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._failed = False

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._safely(lambda: self._run.log({"step": step, **values}))

    def log_image(self, step: int, name: str, path: str | Path) -> None:
        self._safely(lambda: self._run.log({"step": step, name: self._wandb.Image(str(path))}))

    def finish(self, exit_code: int = 0) -> None:
        self._safely(lambda: self._run.finish(exit_code=exit_code))

    def _safely(self, action: Any) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            _log.warning("wandb failed, the rest of this run is not tracked: %s", error)

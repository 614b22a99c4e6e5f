"""What a run reports: metrics on disk, progress on the console, a tracker, FLOPs and MFU."""

from soar_mega.telemetry.flops import forward_flops, model_flops_utilisation, training_factor
from soar_mega.telemetry.metrics import MetricsWriter, read_metrics
from soar_mega.telemetry.progress import Progress
from soar_mega.telemetry.tracking import Tracker, open_tracker

__all__ = [
    "MetricsWriter",
    "Progress",
    "Tracker",
    "forward_flops",
    "model_flops_utilisation",
    "open_tracker",
    "read_metrics",
    "training_factor",
]

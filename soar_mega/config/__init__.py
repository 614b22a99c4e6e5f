"""Configuration of a training run: YAML with inheritance, overrides, strict checking."""

from soar_mega.config.describe import describe_keys
from soar_mega.config.errors import ConfigError
from soar_mega.config.loading import dump_yaml, load_config
from soar_mega.config.objective import FlowMatchingConfig, SoarConfig
from soar_mega.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from soar_mega.config.world import check_world

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "FlowMatchingConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "SoarConfig",
    "TrainConfig",
    "ValidationConfig",
    "check_world",
    "describe_keys",
    "dump_yaml",
    "load_config",
]

"""How a run starts: its place among the processes, and the record of what it was started with."""

from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.provenance import write_environment

__all__ = ["ProcessEnvironment", "write_environment"]

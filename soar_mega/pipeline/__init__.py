"""Running the passes of a step."""

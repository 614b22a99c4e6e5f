"""The trainer: start-up, step, optimizer, EMA, validation, saving."""

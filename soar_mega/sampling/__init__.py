"""Generating pictures through the parallel model."""

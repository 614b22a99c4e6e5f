"""Encoded sets: samples as latents and embeddings, made once and read at each step."""

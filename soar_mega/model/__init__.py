"""The MMDiT of the Stable Diffusion 3 family, one pipeline stage at a time."""

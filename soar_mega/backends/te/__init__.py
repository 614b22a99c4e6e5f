"""The Transformer Engine backend: the blocks' linears in FP8. Needs CUDA."""

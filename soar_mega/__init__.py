"""soar_mega: training of SD3-family diffusion transformers at scale, with SOAR."""

__version__ = "0.1.0"

"""sdtrt: Stable Diffusion, fast on your own GPU."""

__version__ = "0.1.0"

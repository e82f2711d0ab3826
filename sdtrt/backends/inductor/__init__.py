"""PyTorch compiled ahead of time: engines free of weights."""

"""What TensorRT 8.6 alone needs: engines in several plans, and PyTorch's kernels between them."""

"""Count the threads that are to spare: users and containers have limits, and libraries end the process at them."""

from __future__ import annotations

import os
import threading

# NumPy's OpenBLAS presses Ctrl-C where it gets no thread, and OpenMP exits; ONNX Runtime takes as many as PyTorch.
VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def make_do() -> bool:
    """Let libraries compute in one thread where not all that they would start can be had; says whether it is so."""
    if _can_start(3 * (os.cpu_count() or 1) + 4):
        return False
    for name in VARIABLES:
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else they panic where they get no thread
    return True


def _can_start(count: int) -> bool:
    """Whether so many threads may run at once."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    except (RuntimeError, MemoryError):
        return False
    finally:
        end.set()
    return True

"""Remove at the end what libraries keep on the disk for their next run: compiled kernels, lists of fonts."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sdtrt.common.interrupts import held, undoing

# Which variable names the folder of each: of PyTorch's compiler, of Triton, of matplotlib.
VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}


@contextmanager
def private_caches() -> Iterator[None]:
    """Within, libraries keep what they cache in a folder of this process's own, which is made when one needs it.

    Where the user has named a folder for one of them, that serves.
    """
    try:
        with held():  # the first time, it writes a file there to see whether it can
            folder = Path(tempfile.gettempdir()) / f"sdtrt-{secrets.token_hex(8)}"
    except OSError:  # no folder that can be written to: the libraries say so themselves
        yield
        return
    ours = {name: str(folder / place) for name, place in VARIABLES.items() if name not in os.environ}
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(ours)
    with undoing(remove):
        try:
            yield
        finally:
            remove()
            for name in ours:
                os.environ.pop(name, None)

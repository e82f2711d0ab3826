"""What the engine directory refuses, as errors that say what to do."""

from __future__ import annotations

import errno

from sdtrt.common.files import (
    EXHAUSTED,
    FULL,
)

REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, *FULL, *EXHAUSTED)

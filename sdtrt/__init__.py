"""sdtrt: Stable Diffusion, fast on your own GPU."""

import os

__version__ = "0.1.0"

# Before anything imports ONNX Runtime (diffusers does so, too): it would give the user a number, keep a database in the
# user's cache, write where links in the temporary folder point to, and look up its maker's host.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

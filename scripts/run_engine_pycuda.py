#!/usr/bin/env python3
"""Run a UNet's TensorRT engine from NumPy, without PyTorch: python scripts/run_engine_pycuda.py [ENGINE_DIR [NAME]]"""

import shlex
import sys
from pathlib import Path

import numpy as np

from sdtrt.backends.tensorrt.pycuda import PyCudaSession
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.specs import Sizes
from sdtrt.specs.contract import Contract

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default_directory()
entries = [
    entry
    for entry in EngineDirectory(folder).entries("engine")
    if (entry.key["backend"], entry.key["component"]) == ("tensorrt", "unet")
]
entry = next((entry for entry in entries if entry.name in (sys.argv[2:] or [entry.name])), None)
if entry is None:
    command = shlex.join(
        ["sdtrt", "build", "--backend", "tensorrt", "--split-attention", "0", "--engine-dir", str(folder)]
    )
    sys.exit(f"no such TensorRT engine of a UNet in {folder}; build one: {command}")

contract = Contract.from_json(entry.info["contract"])
sizes = Sizes(**{name: bounds["opt"] for name, bounds in entry.key["profiles"][0].items()})
random, shapes = np.random.default_rng(0), contract.input_shapes(sizes)
feeds = {spec.name: random.standard_normal(shapes[spec.name]).astype(spec.dtype) for spec in contract.inputs}
feeds["timestep"][:] = 500  # from 999 (noise) down to 0

own_runtime = entry.key["options"]["version_compatible"]
with entry.hold(), PyCudaSession(entry.verified("engine.plan"), contract, allow_host_code=own_runtime) as session:
    for name, array in session.run(feeds).items():
        print(f"{entry.name}: {name} {array.dtype} {list(array.shape)}, std {array.std(dtype=float):.6f}")

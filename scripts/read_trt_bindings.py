#!/usr/bin/env python3
"""Write down what each TensorRT version's Python bindings have: tests/data/trt_attributes.json.

Usage: python scripts/read_trt_bindings.py [WORK_FOLDER] [--output FILE]

The bindings' wheels are on PyPI even where TensorRT's libraries are not. Each is downloaded for this Python (into
WORK_FOLDER, a temporary one by default), imported in a process of its own on empty stand-ins for the libraries
(made with gcc), and the names of its classes, enum members, methods and properties are noted. Nothing of TensorRT
runs. Lean and TensorRT for RTX bindings are read in the same way. The tests hold sdtrt's use of the API against the
result; run this again when a new version is to be supported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Package, version → family. Each family starts at the oldest supported version and ends at the newest known one.
WHEELS: dict[str, tuple[str, ...]] = {
    "tensorrt": (
        "tensorrt-bindings==8.6.1",
        "tensorrt-cu12-bindings==10.0.1",
        "tensorrt-cu12-bindings==10.1.0",
        "tensorrt-cu12-bindings==10.3.0",
        "tensorrt-cu12-bindings==10.9.0.34",
        "tensorrt-cu12-bindings==10.13.3.9",
        "tensorrt-cu13-bindings==10.16.1.11",
        "tensorrt-cu13-bindings==11.0.0.114",
        "tensorrt-cu13-bindings==11.4.0.106",
    ),
    "tensorrt_lean": (
        "tensorrt-lean-cu13-bindings==10.15.1.29",
        "tensorrt-lean-cu13-bindings==11.4.0.106",
    ),
    "tensorrt_rtx": (
        "tensorrt-rtx-cu13-bindings==1.4.0.76",
        "tensorrt-rtx-cu13-bindings==1.7.1.116",
    ),
}
CLASSES = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "DataType",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IRuntimeConfig",
    "IExecutionContext",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "LayerType",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserFlag",
    "ParserError",
    "PreviewFeature",
    "ProfilingVerbosity",
    "Runtime",
    "TacticSource",
    "TensorFormat",
    "TensorIOMode",
)
FUNCTIONS = ("get_nv_onnx_parser_version", "get_plugin_registry", "init_libnvinfer_plugins", "nptype")
READER = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
classes, functions = json.loads(sys.argv[2])
found = {name: dir(getattr(module, name)) for name in classes if hasattr(module, name)}
members = {name: " ".join(sorted(m for m in names if not m.startswith("_"))) for name, names in found.items()}
present = " ".join(sorted(name for name in functions if hasattr(module, name)))
print(json.dumps({"functions": present, "classes": members}))
"""


def download(requirement: str, folder: Path) -> Path:
    """The wheel of one requirement, for this Python on Linux."""
    target = folder / requirement.replace("==", "-")
    if not any(target.glob("*.whl")):
        platforms = [f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux_2_17", "manylinux_2_28")]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(target)]
        subprocess.run([*command, *platforms, requirement], check=True)
    return next(target.glob("*.whl"))


def stand_ins(extension: Path, folder: Path) -> None:
    """Make each NVIDIA library that the extension module needs, with nothing but its symbols' names."""
    needed = re.findall(r"\[(lib\S*(?:nv|rtx)\S*)\]", _output("readelf", "-d", str(extension)))
    lines = _output("nm", "-D", "--undefined-only", str(extension)).splitlines()
    symbols = [line.split()[-1] for line in lines]
    ours = [name for name in symbols if re.match(r"(create|get|init)\w+|_ZN\w*parser", name)]
    functions = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in ours if "@" not in name)
    for library in needed:
        command = [
            "gcc",
            "-x",
            "c",
            "-shared",
            "-fPIC",
            "-w",
            f"-Wl,-soname,{library}",
            "-o",
            str(folder / library),
            "-",
        ]
        subprocess.run(command, input=functions, text=True, check=True)


def read(family: str, requirement: str, folder: Path) -> dict[str, object]:
    """What the bindings of one requirement have."""
    place = folder / f"unpacked-{requirement.replace('==', '-')}"
    with zipfile.ZipFile(download(requirement, folder)) as archive:
        archive.extractall(place)
    package = f"{family}_bindings"
    stand_ins(place / package / f"{family}.so", place)
    environment = {**os.environ, "PYTHONPATH": str(place), "LD_LIBRARY_PATH": str(place)}
    wanted = json.dumps([CLASSES, FUNCTIONS])
    command = [sys.executable, "-W", "ignore", "-c", READER, package, wanted]
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(result.stdout))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Read every wheel and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where wheels are kept (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=ROOT / "tests" / "data" / "trt_attributes.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        found: dict[str, dict[str, object]] = {}
        for family, requirements in WHEELS.items():
            for requirement in requirements:
                version = requirement.partition("==")[2]
                found[f"{family} {version}"] = read(family, requirement, folder)
                print(f"{family} {version}: read", file=sys.stderr)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    print(arguments.output)


if __name__ == "__main__":
    main()

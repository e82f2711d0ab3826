"""What TensorRT's messages mean, and the mend."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sdtrt.backends.tensorrt.versions.header import PlanHeader, is_of_another_version
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.common.errors import BuildError, BuildMemoryShortage, EngineError, MemoryShortage, SdtrtError

REBUILD = "build it again: sdtrt build --backend tensorrt --force"

UNKNOWN = "use --backend torch; sdtrt engines verify says whether an engine is damaged"

OUT_OF_MEMORY = (
    r"out of memory|OutOfMemory|cudaError 2\b|initialization failure with error: 2\b|insufficient memory"
    r"|Requested amount of GPU memory"
)
NO_KERNEL = r"Could not find any implementation for node ([^\s.]+)"  # kernels that need more than is free are left out
SHORTAGES: dict[type[SdtrtError], type[MemoryShortage] | type[BuildMemoryShortage]] = {
    EngineError: MemoryShortage,
    BuildError: BuildMemoryShortage,
}

# What TensorRT's messages mean. The first that matches is the cause: what comes with it is consequence.
CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"expecting library version ([\d.]*\d) got ([\d.]*\d)",
        "it was built by TensorRT {1}, and this is {0}",
        REBUILD,
    ),
    (
        r"Version tag does not match.*?Current Version: (\d+), Serialized Engine Version: (\d+)",
        "it was built by another TensorRT version (serialisation {1}, this is {0})",
        REBUILD,
    ),
    (
        r"expecting compute (\d+\.\d+) got compute (\d+\.\d+)",
        "it was built for compute capability {1}, and this GPU has {0}",
        REBUILD,
    ),
    (
        r"(?:could not find plugin:?|[Cc]annot find plugin:|[Pp]lugin not found.*?:|plugin creator for)\s*'?(\w+)",
        "it needs the plugin {0}, which is not registered here",
        "load the plugin's library before the engine, or export and build the model again: sdtrt build --force",
    ),
    (
        r"driver version is insufficient|cudaError 35\b|initialization failure with error: 35\b",
        "the NVIDIA driver is missing or older than this TensorRT needs",
        "update the driver (check nvidia-smi), or install a TensorRT for the CUDA version that nvidia-smi shows",
    ),
    (
        r"no CUDA-capable device|initialization failure with error: (?:100|3|999)\b|cudaError 100\b",
        "there is no working NVIDIA GPU",
        "check nvidia-smi; without a GPU use --backend onnxruntime",
    ),
    (
        OUT_OF_MEMORY,
        "the GPU has too little free memory",
        "end other programs on the GPU, or build for smaller sizes: sdtrt build with a lower --batch or --height",
    ),
    (
        r"[Hh]ost ?[Cc]ode|lean runtime",
        "it brings its own runtime (version-compatible), which was not allowed",
        "open it from the engine directory it was built in",
    ),
    (
        r"magic ?[Tt]ag|Serialization assertion|stdArchiveReader|corrupt|checksum|plan header|Unexpected end",
        "the file is damaged or no plan of this TensorRT",
        REBUILD,
    ),
    (
        NO_KERNEL,
        "no kernel fits the node {0}",
        "raise --workspace-gib, use --optimization-level 3, or try another --precision",
    ),
)


def explain(
    library: Library,
    errors: Sequence[str],
    what: str,
    kind: type[EngineError] | type[BuildError] = EngineError,
    header: PlanHeader | None = None,
) -> EngineError | BuildError:
    """The error for what TensorRT has just reported.

    Args:
        errors: its messages, oldest first.
        what: what failed.
        kind: the exception to make.
        header: of the plan that was loaded.
    """
    said = f" (TensorRT: {errors[-1].strip()[:300]})" if errors else ""
    if header is not None and is_of_another_version(library, header):
        ours, theirs = (".".join(map(str, version)) for version in (library.version, header.version))
        return kind(f"{what}: it was built by TensorRT {theirs}, and this is {ours}{said}", hint=REBUILD)
    text = "\n".join(errors)
    for pattern, cause, hint in CAUSES:
        if match := re.search(pattern, text, re.DOTALL):
            if pattern in (OUT_OF_MEMORY, NO_KERNEL):
                kind = SHORTAGES.get(kind, kind)
            return kind(f"{what}: {cause.format(*match.groups())}{said}", hint=hint)
    last = "; ".join(error.strip()[:300] for error in errors[-3:]) or f"{library.name} gave no reason"
    return kind(f"{what}: {last}", hint="read TensorRT's log, named above" if kind is BuildError else UNKNOWN)

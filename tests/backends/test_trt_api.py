"""`versions`: what it asks of TensorRT exists in every version that it asks; what TensorRT says is understood."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from trt_fakes import FACTS, fake_library, profile_shapes, recorder, write_plan

from sdtrt.backends.tensorrt.versions import building, libraries, running, weak_typing
from sdtrt.backends.tensorrt.versions.header import PlanHeader, read_header
from sdtrt.backends.tensorrt.versions.libraries import FEATURES, Log, parse_version
from sdtrt.backends.tensorrt.versions.messages import explain
from sdtrt.backends.tensorrt.versions.network import Draft
from sdtrt.common import host
from sdtrt.common.errors import BuildError, EngineError
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Sizes

FOLDER = Path(libraries.__file__).parent.parent
SOURCES = sorted((FOLDER / "versions").glob("*.py"))
SOURCES += [FOLDER / f"{name}.py" for name in ("worker", "checking", "plan", "contexts", "session", "pycuda")]
SOURCES += [path for path in (FOLDER.parent / "tensorrt86").glob("*.py") if path.stem in ("worker", "session")]
# The names that variables for TensorRT's objects have in those files (`trt` is the module).
RECEIVERS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "optimization": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "tensor": "ITensor",
    "problem": "ParserError",
    "timing": "ITimingCache",
    "options": "IRuntimeConfig",
}
BUILDER_CLASSES = {"Builder", "INetworkDefinition", "OnnxParser", "IBuilderConfig", "ILayer", "ITensor", "ParserError"}
BUILDER_CLASSES |= {"TensorFormat", "OnnxParserFlag", "NetworkDefinitionCreationFlag", "EngineInspector", "LayerType"}
TORCH_TENSORS = {"dtype", "shape", "cpu", "isfinite", "clone", "data_ptr", "float"}  # `tensor` is torch's elsewhere
MAPPINGS = {"get"}  # `layer` is also a mapping of the inspector's JSON


def family_of(label):
    return label.split()[0]


def version_of(label):
    return parse_version(label.split()[1])


def has(label, name):
    """Whether the real bindings have `Class.member`, `Class` or a function."""
    facts = FACTS[label]
    first, _, member = name.partition(".")
    if member:
        return member in facts["classes"].get(first, ())
    return first in facts["classes"] or first in facts["functions"]


def used_names():
    """`Class.member` → where it is used, read from the sources."""
    found = {}
    for path in SOURCES:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        owners = {id(node.value) for node in nodes}  # of `trt.BuilderFlag.FP16`, the whole is looked up
        for node in nodes:
            name = _tensorrt_name(node, path)
            if name and not (id(node) in owners and _is_name(node.value, "trt")):
                found.setdefault(name, f"{path.name}:{node.lineno}")
    return found


def _is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name


def _tensorrt_name(node, path):
    owner = node.value
    if node.attr.startswith("__"):
        return None
    if isinstance(owner, ast.Attribute) and _is_name(owner.value, "trt"):
        return f"{owner.attr}.{node.attr}"
    receiver = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    if receiver == "trt":
        return node.attr
    if path.parent.name != "versions" and receiver == "tensor" and node.attr in TORCH_TENSORS:
        return None
    if receiver == "layer" and node.attr in MAPPINGS:
        return None
    class_name = RECEIVERS.get(receiver.lstrip("_"))
    return f"{class_name}.{node.attr}" if class_name else None


def test_the_sources_are_read():
    """The walk above finds what it is for."""
    names = used_names()
    assert {"BuilderFlag.FP16", "IExecutionContext.execute_async_v3", "ILayer.precision", "Runtime"} <= set(names)
    assert len(names) > 60


@pytest.mark.parametrize("label", FACTS)
def test_features_are_where_the_table_says(label):
    for title, feature in FEATURES.items():
        if feature.is_in(family_of(label), version_of(label)):
            missing = [name for name in feature.names if not has(label, name)]
            assert not missing, f"{title}: {label} lacks {missing}"


def test_the_table_does_not_deny_what_a_version_has():
    """A typed network where a version knows them, and never the weak way there: that mistake costs speed silently."""
    for label in FACTS:
        family, version = family_of(label), version_of(label)
        if family == "tensorrt_lean":
            continue
        strong = has(label, "NetworkDefinitionCreationFlag.STRONGLY_TYPED")
        assert FEATURES["strong typing"].is_in(family, version) == strong
        assert FEATURES["weak typing"].is_in(family, version) != strong
        assert FEATURES["progress monitor"].is_in(family, version) == has(label, "IBuilderConfig.progress_monitor")
        assert FEATURES["parser node names"].is_in(family, version) == has(label, "ParserError.node_name")


@pytest.mark.parametrize("label", FACTS)
def test_every_attribute_used_exists(label):
    """What is used everywhere exists everywhere; the rest is in `FEATURES`."""
    guarded = {name for feature in FEATURES.values() for name in feature.names}
    guarded |= {"IProgressMonitor", "ComputeCapability.__members__"}
    for name, where in used_names().items():
        if name in guarded or (family_of(label) == "tensorrt_lean" and name.partition(".")[0] in BUILDER_CLASSES):
            continue
        assert has(label, name), f"{label} has no {name} (used in {where})"


def test_no_hasattr():
    """Versions differ by the table alone: a `hasattr` fallback that quietly builds fp32 is a known bug elsewhere."""
    for path in SOURCES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "hasattr" not in names, path


@pytest.mark.parametrize(
    ("text", "version"), [("8.6.1", (8, 6, 1)), ("10.14.1.48.post1", (10, 14, 1, 48)), ("11.0.0.114", (11, 0, 0, 114))]
)
def test_parse_version(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize(
    ("label", "capability", "served"),
    [
        ("tensorrt 8.6.1", (9, 0), True),
        ("tensorrt 8.6.1", (6, 1), True),
        ("tensorrt 8.6.1", (12, 0), False),
        ("tensorrt 10.3.0", (7, 0), True),
        ("tensorrt 10.9.0.34", (7, 0), False),
        ("tensorrt 10.3.0", (10, 0), False),
        ("tensorrt 10.9.0.34", (12, 0), True),
        ("tensorrt_rtx 1.7.1.116", (8, 9), True),
        ("tensorrt_rtx 1.7.1.116", (9, 0), False),
        ("tensorrt_rtx 1.4.0.76", (12, 1), False),
    ],
)
def test_serves(label, capability, served):
    assert libraries.serves(fake_library(label), capability) is served


def test_missing_library_names_the_install_command(monkeypatch):
    monkeypatch.setitem(libraries.MODULES, "tensorrt", ("tensorrt_that_nobody_has",))
    libraries._open_library.cache_clear()
    with pytest.raises(EngineError) as caught:
        libraries.version("tensorrt")
    assert caught.value.hint == 'pip install "sdtrt[tensorrt]"'


def test_broken_and_old_libraries(tmp_path, monkeypatch):
    (tmp_path / "broken_trt.py").write_text("raise OSError('libnvinfer.so.8: cannot open shared object file')")
    (tmp_path / "old_trt.py").write_text("__version__ = '8.5.3.1'")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"libnvinfer\.so\.8"):
        libraries.library_of("broken_trt", "tensorrt")
    with pytest.raises(EngineError, match=r"8\.5\.3\.1 is too old"):
        libraries.library_of("old_trt", "tensorrt")


def test_no_gpu_is_said_before_tensorrt_is_touched(tmp_path, monkeypatch):
    """Some versions crash without a driver: `load_engine` must not get there."""
    monkeypatch.setattr(host, "gpus", lambda: ())
    library = fake_library("tensorrt 8.6.1")
    library.module.Runtime = None
    plan = write_plan(tmp_path / "engine.plan", [profile_shapes((1, 2, 4), (12, 16, 24), (12, 16, 24))])
    with pytest.raises(EngineError, match="needs an NVIDIA GPU") as caught:
        running.load_engine(library, plan)
    assert "onnxruntime" in caught.value.hint


# -------------------------------------------------------------------------------------------------- configuration


def draft_of(library, layers=()):
    network = recorder(library.module, "INetworkDefinition", num_layers=len(layers), get_layer=lambda i: layers[i])
    config = recorder(library.module, "IBuilderConfig", add_optimization_profile=lambda optimization: 0)
    optimization = recorder(library.module, "IOptimizationProfile")
    makers = {"create_builder_config": lambda: config, "create_optimization_profile": lambda: optimization}
    builder = recorder(library.module, "Builder", **makers)
    return Draft(library, builder, network, None), config, optimization


def layer_of(library, kind, dtype, name=""):
    trt = library.module
    tensor = recorder(trt, "ITensor", dtype=trt.DataType[dtype])
    values = {"type": trt.LayerType[kind], "num_outputs": 1, "get_output": lambda index: tensor, "name": name}
    return recorder(trt, "ILayer", **values)


def spec_of(precision="fp16", backend="tensorrt", **values):
    return BuildSpec(ExportSpec(precision=precision), backend, (Profile.of(Sizes(2, 128, 128)),), **values)


BUILDER_LABELS = [label for label in FACTS if family_of(label) != "tensorrt_lean"]


@pytest.mark.parametrize("label", BUILDER_LABELS)
def test_configure_asks_each_version_for_what_it_has(label):
    """The fakes have the real names of each version, and no others."""
    library = fake_library(label)
    draft, config, optimization = draft_of(library, [layer_of(library, "CONVOLUTION", "HALF")])
    rtx = family_of(label) == "tensorrt_rtx"
    extra = {"compute_capability": (8, 9)} if rtx else {"version_compatible": True}
    spec = spec_of(backend="tensorrt-rtx" if rtx else "tensorrt", workspace_bytes=2**30, optimization_level=1, **extra)
    shapes = {"timestep": ((1,), (2,), (4,))}
    building.configure(draft, spec, [shapes])
    assert config.builder_optimization_level == 1
    assert ("set_memory_pool_limit", library.module.MemoryPoolType.WORKSPACE, 2**30) in config._calls
    assert ("set_shape", "timestep", (1,), (2,), (4,)) in optimization._calls
    flags = {call[1].name for call in config._calls if call[0] == "set_flag"}
    weak = {"FP16", "PREFER_PRECISION_CONSTRAINTS"} if label == "tensorrt 8.6.1" else set()
    assert flags == weak | (set() if rtx else {"VERSION_COMPATIBLE"})
    if rtx:
        assert config.num_compute_capabilities == 1
        assert ("set_compute_capability", library.module.ComputeCapability.SM89, 0) in config._calls


def test_8_6_keeps_off_external_libraries_and_shares_profiles():
    library = fake_library("tensorrt 8.6.1")
    trt = library.module
    draft, config, _ = draft_of(library)
    building.configure(draft, spec_of(), [])
    sources = 1 << trt.TacticSource.EDGE_MASK_CONVOLUTIONS | 1 << trt.TacticSource.JIT_CONVOLUTIONS
    assert ("set_tactic_sources", sources) in config._calls
    assert ("set_preview_feature", trt.PreviewFeature.PROFILE_SHARING_0806, True) in config._calls


@pytest.mark.parametrize("label", BUILDER_LABELS)
def test_the_builders_effort_where_nobody_asks_for_one(label):
    """8.6 gets level 1; later versions decide for themselves."""
    library = fake_library(label)
    rtx = family_of(label) == "tensorrt_rtx"
    draft, config, _ = draft_of(library)
    spec = spec_of(backend="tensorrt-rtx", compute_capability=(8, 9)) if rtx else spec_of()
    building.configure(draft, spec, [])
    asked = config.__dict__.get("builder_optimization_level")
    assert asked == (1 if label == "tensorrt 8.6.1" else None)


@pytest.mark.parametrize("label", BUILDER_LABELS)
def test_plugins_that_choose_types_are_for_weakly_typed_networks(label):
    """They are registered with the logger, so looking for one must come after."""
    library = fake_library(label)
    assert weak_typing.has_plugin(library, "GroupNorm") == (label == "tensorrt 8.6.1")
    assert not weak_typing.has_plugin(library, "NoSuchNorm")


def test_fp32_means_fp32():
    """No TF32, which is on by default, and no fp16."""
    library = fake_library("tensorrt 8.6.1")
    draft, config, _ = draft_of(library)
    building.configure(draft, spec_of("fp32"), [])
    assert ("clear_flag", library.module.BuilderFlag.TF32) in config._calls
    assert not [call for call in config._calls if call[0] == "set_flag"]


def test_8_6_keeps_in_fp32_what_the_onnx_computes_in_fp32():
    """By name: before a build 8.6 calls layers fp32 that are not, so their types tell nothing."""
    library = fake_library("tensorrt 8.6.1")
    half = [layer_of(library, "CONVOLUTION", "FLOAT", f"/unet/conv_{number}") for number in range(4)]
    kept = layer_of(library, "UNARY", "FLOAT", "/unet/time_proj/Sin")
    moved = layer_of(library, "CONSTANT", "FLOAT", "/unet/time_proj/Constant")
    draft, _, _ = draft_of(library, [*half, kept, moved])
    building.configure(draft, spec_of(), [], {"/unet/time_proj/Sin", "/unet/time_proj/Constant"})
    assert kept.precision == library.module.DataType.FLOAT
    assert ("set_output_type", 0, library.module.DataType.FLOAT) in kept._calls
    assert not any(layer._calls for layer in (*half, moved))
    assert not draft.warnings


def test_8_6_says_where_it_cannot_keep_fp32():
    library = fake_library("tensorrt 8.6.1")
    draft, _, _ = draft_of(library, [layer_of(library, "UNARY", "FLOAT", "(Unnamed Layer* 3) [Unary]")])
    building.configure(draft, spec_of(), [], {"/unet/time_proj/Sin"})
    assert "1 of 1 operators" in draft.warnings[0]
    assert "/unet/time_proj/Sin" in draft.warnings[0]


@pytest.mark.parametrize(
    ("label", "spec", "message"),
    [
        ("tensorrt 8.6.1", spec_of("bf16"), "TensorRT 8.6.1 has no bf16"),
        ("tensorrt_rtx 1.7.1.116", spec_of(version_compatible=True), "no version-compatible plans"),
        (
            "tensorrt_rtx 1.7.1.116",
            spec_of(backend="tensorrt-rtx", compute_capability=(9, 0)),
            "can't build for compute capability 9.0",
        ),
        ("tensorrt_rtx 1.7.1.116", spec_of(backend="tensorrt-rtx"), "no GPU to build for"),
    ],
)
def test_what_a_version_cannot_do_is_refused(label, spec, message, monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: ())
    draft, _, _ = draft_of(fake_library(label))
    with pytest.raises(BuildError, match=message):
        building.configure(draft, spec, [])


def test_a_foreign_timing_cache_is_replaced_by_an_empty_one(tmp_path):
    file = tmp_path / "old.cache"
    file.write_bytes(b"of another GPU")
    attached = []

    def set_timing_cache(timing, ignore_mismatch):
        assert not ignore_mismatch
        attached.append(timing)
        return timing == b""

    config = SimpleNamespace(create_timing_cache=lambda data: data, set_timing_cache=set_timing_cache)
    assert not building.read_timing_cache(config, file)
    assert attached == [b"of another GPU", b""]
    assert building.read_timing_cache(config, tmp_path / "none.cache")


@pytest.mark.parametrize("label", BUILDER_LABELS)
def test_timings_that_others_have_kept_are_combined_with_ones_own(label):
    module = fake_library(label).module
    timing = recorder(module, "ITimingCache", serialize=lambda: b"all")
    config = recorder(
        module, "IBuilderConfig", get_timing_cache=lambda: timing, create_timing_cache=lambda data: ("of", data)
    )
    assert building.timing_cache_bytes(config) == b"all"
    assert timing._calls == []
    assert building.timing_cache_bytes(config, b"kept") == b"all"
    assert timing._calls == [("combine", ("of", b"kept"), False)]
    unread = recorder(module, "IBuilderConfig", get_timing_cache=lambda: timing, create_timing_cache=lambda data: None)
    assert building.timing_cache_bytes(unread, b"damaged") == b"all"
    assert len(timing._calls) == 1


def test_progress_is_shown_with_the_step():
    library = fake_library("tensorrt 10.3.0")
    config = recorder(library.module, "IBuilderConfig")
    shown = []
    monitor = building.watch_progress(library, config, lambda text: shown.append(text) or True)
    assert config.progress_monitor is monitor
    monitor.phase_start("Timing tactics", None, 3)
    assert monitor.step_complete("Timing tactics", 1)
    monitor.phase_finish("Timing tactics")
    assert shown == ["Timing tactics", "Timing tactics 2/3"]
    assert building.watch_progress(fake_library("tensorrt 8.6.1"), None, lambda text: True) is None


def test_parse_errors_of_8_6_get_their_node_from_the_file(tmp_path):
    """8.6 gives the node's number only."""
    path = save_graph(tmp_path / "model.onnx", "Frobnicate")
    problem = SimpleNamespace(node=lambda: 1, desc=lambda: "No importer registered for op: Frobnicate")
    described = building._describe_problem(fake_library("tensorrt 8.6.1"), problem, path)
    assert described == "node /down/odd (Frobnicate): No importer registered for op: Frobnicate"
    assert "this is 18" in building._parse_hint(fake_library("tensorrt 8.6.1"), path)


def save_graph(path, operator):
    import onnx

    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["y"], name="/down/relu"),
        onnx.helper.make_node(operator, ["y"], ["z"], name="/down/odd"),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "z")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


# -------------------------------------------------------------------------------------------------------- the log


def test_log_keeps_errors_and_copies_everything():
    log, file = Log(), io.StringIO()
    log.record("ERROR", "before")
    mark = log.mark()
    with log.copied_to(file, verbose=False):
        log.record("INFO", "an info")
        log.record("VERBOSE", "too much")
        log.record("INTERNAL_ERROR", "the cause")
    log.record("ERROR", "after")
    assert log.errors(mark) == ["the cause", "after"]
    assert file.getvalue() == "[INFO] an info\n[INTERNAL_ERROR] the cause\n"


@pytest.mark.parametrize(
    ("message", "words", "hint"),
    [
        (
            "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is not compatible "
            "with this version of TensorRT, expecting library version 10.12.0.36 got 10.3.0.26, please rebuild.)",
            "built by TensorRT 10.3.0.26, and this is 10.12.0.36",
            "--force",
        ),
        (
            "1: [stdArchiveReader.cpp::StdArchiveReaderInitCommon::46] Error Code 1: Serialization (Serialization "
            "assertion stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current "
            "Version: 213, Serialized Engine Version: 236)",
            "another TensorRT version (serialisation 236, this is 213)",
            "--force",
        ),
        (
            "6: The engine plan file is generated on an incompatible device, expecting compute 8.9 got compute 8.6, "
            "please rebuild.",
            "compute capability 8.6, and this GPU has 8.9",
            "--force",
        ),
        (
            "3: getPluginCreator could not find plugin: InstanceNormalization_TRT version: 1",
            "plugin InstanceNormalization_TRT",
            "plugin's library",
        ),
        (
            "IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin: MyPlugin, version: 1)",
            "plugin MyPlugin",
            "plugin's library",
        ),
        (
            "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)",
            "driver is missing or older",
            "update the driver",
        ),
        ("CUDA initialization failure with error: 100", "no working NVIDIA GPU", "onnxruntime"),
        (
            "1: [defaultAllocator.cpp::allocate::20] Error Code 1: Cuda Runtime (out of memory)",
            "too little free memory",
            "smaller sizes",
        ),
        (
            "10: Could not find any implementation for node {ForeignNode[/conv_in/Conv.../Add]}.",
            "no kernel fits the node {ForeignNode[/conv_in/Conv",
            "--workspace-gib",
        ),
        ("something new", "something new", "engines verify"),
    ],
)
def test_explain_real_messages(message, words, hint):
    error = explain(fake_library("tensorrt 8.6.1"), ["noise", message], "engine.plan can't be loaded")
    assert words in error.message
    assert error.message.startswith("engine.plan can't be loaded: ")
    assert hint in error.hint


def test_explain_prefers_the_header():
    header = PlanHeader((10, 3, 0, 26), None)
    error = explain(fake_library("tensorrt 8.6.1"), ["magicTag"], "it failed", EngineError, header)
    assert "built by TensorRT 10.3.0.26, and this is 8.6.1" in error.message


def test_damaged_plans_are_found_before_tensorrt_reads_them(tmp_path):
    library = fake_library("tensorrt_rtx 1.7.1.116")
    shapes = [profile_shapes((1, 2, 4), (12, 16, 24), (12, 16, 24))]
    plan = write_plan(tmp_path / "engine.plan", shapes)
    assert read_header(plan) == PlanHeader((8, 6, 1, 6), plan.stat().st_size)
    write_plan(plan, shapes, version=(10, 13, 3, 9))
    assert read_header(plan) == PlanHeader((10, 13, 3, 9), None)
    write_plan(plan, shapes, version=(1, 7, 1, 116), magic=b"vtrt")
    assert read_header(plan) == PlanHeader((1, 7, 1, 116), plan.stat().st_size)
    plan.write_bytes(plan.read_bytes()[:-10])
    for content, message in ((None, "cut short"), (b"", "no TensorRT plan"), (b"PK\3\4" * 20, "no TensorRT plan")):
        if content is not None:
            plan.write_bytes(content)
        with pytest.raises(EngineError, match=message):
            running.load_engine(library, plan)
    with pytest.raises(EngineError, match="no engine at"):
        running.load_engine(library, tmp_path / "none.plan")


INSPECTOR_8_6 = {
    "Layers": [
        {"LayerType": "Reformat", "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
        {
            "LayerType": "CaskConvolution",
            "Outputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
        },
        {"LayerType": "Myelin", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]},
        {"LayerType": "NoOp", "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
    ],
    "Bindings": ["sample", "out_sample"],
}
INSPECTOR_10 = {
    "Layers": [
        {"LayerType": "gemm", "Outputs": [{"Format/Datatype": "Half"}]},
        {"LayerType": "kgen", "Outputs": [{"Format/Datatype": "BFloat16"}, {"Format/Datatype": "Float"}]},
    ]
}


@pytest.mark.parametrize(
    ("information", "layers"),
    [
        (INSPECTOR_8_6, {"fp16": 1, "fp32": 1}),
        (INSPECTOR_10, {"fp16": 1, "bf16": 1, "fp32": 1}),
        ({"Layers": ["conv_in", "conv_out"]}, {}),
        ({}, {}),
    ],
)
def test_layer_precisions(information, layers):
    assert running.layer_precisions(json.loads(json.dumps(information))) == layers

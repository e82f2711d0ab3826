"""The script in `benchmarks/` that says where a call's time goes outside of the UNet."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from benchmark_scripts import module, run

call_profile = module("call_profile")


def test_the_gpu_is_idle_where_nothing_ran(call_profile):
    busy = call_profile.union([(30.0, 40.0), (5.0, 10.0), (8.0, 20.0), (40.0, 41.0)])
    assert busy == [(5.0, 20.0), (30.0, 41.0)]
    assert call_profile.gaps(busy, (0.0, 50.0)) == [(0.0, 5.0), (20.0, 30.0), (41.0, 50.0)]
    assert call_profile.gaps(busy, (7.0, 35.0)) == [(20.0, 30.0)]
    assert call_profile.gaps([], (1.0, 2.0)) == [(1.0, 2.0)]


def test_idle_time_is_the_innermost_parts(call_profile):
    ranges = [("whole", (0.0, 9000.0)), ("outer", (1000.0, 5000.0)), ("inner", (2000.0, 3000.0))]
    found = call_profile.idle_by_part([(500.0, 2500.0), (4000.0, 6000.0)], ranges)
    assert found == {"whole": 0.5 + 1.0, "outer": 1.0 + 1.0, "inner": 0.5}


def test_marks_are_the_hosts_and_the_gpus_work_is_not_its_marks(call_profile):
    def event(name, device, begin, end):
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=device), time_range=SimpleNamespace(start=begin, end=end)
        )

    events = [
        event("sdtrt: unet.forward", "CPU", 1, 5),
        event("sdtrt: unet.forward", "CUDA", 2, 9),
        event("aten::mul", "CPU", 2, 3),
        event("a_kernel", "CUDA", 3, 8),
    ]
    assert call_profile.read_events(events) == ([("unet.forward", (1.0, 5.0))], [(3.0, 8.0)])


def test_parts_count_for_themselves_and_are_put_back(call_profile):
    """What runs within a part is not that part's; and PyTorch's profiler sees the marks."""

    class Scheduler:
        def step(self):
            time.sleep(0.03)

    class Pipe:
        scheduler = Scheduler()

        def check_inputs(self):
            time.sleep(0.01)
            self.scheduler.step()

    pipe, cpu = Pipe(), torch.device("cpu")
    marks = call_profile.Marks(cpu, time.perf_counter)
    with call_profile.marking(pipe, marks):
        parts = call_profile.run_marked(pipe.check_inputs, marks, cpu)
        profiled = call_profile.profile_gpu(pipe.check_inputs, marks, cpu, None)
    assert list(parts) == [call_profile.WHOLE, "pipe.check_inputs", "scheduler.step"]
    assert parts["scheduler.step"]["host_ms"] >= 30
    assert 10 <= parts["pipe.check_inputs"]["host_ms"] < 30
    assert profiled["idle_ms"] == profiled["span_ms"] >= 40
    assert profiled["by_part"]["scheduler.step"] >= 30
    assert "step" not in vars(pipe.scheduler)
    assert "check_inputs" not in vars(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--stub",), ("--own", "--task", "txt2img")])
def test_a_call_is_profiled(tmp_path, more):
    size = ("--height", "64", "--width", "64", "--steps", "2", "--strength", "1", "--repeats", "2")
    output = tmp_path / "call.json"
    run("call_profile.py", "--backend", "onnxruntime", "--precision", "fp32", *size, *more, "--output", output)
    found = json.loads(output.read_text())
    assert found["parts"]["unet.forward"]["calls"] >= 2
    assert found["parts"]["vae.decode"]["host_ms"] > 0
    assert ("pixels: to pictures" in found["parts"]) == ("--stub" in more)
    assert found["wall_ms"] > 0

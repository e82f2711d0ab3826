"""Facts of this machine, and the driver's answers read right."""

from __future__ import annotations

import ctypes
import json

import pytest

from sdtrt.common import host


class FakeDriver:
    """CUDA's driver as far as it is asked, with one GPU; it answers through pointers as the real one does."""

    def __init__(self, mode=0):
        self.mode = mode
        self.contexts = []
        self.pushed = 0

    def cuDevicePrimaryCtxRetain(self, context, device):  # noqa: N802
        self.contexts.append(device.value)
        return 0

    def cuInit(self, flags):  # noqa: N802
        return 0

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 12040
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802
        name.value = b"NVIDIA Something"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 9, 76: 0, 20: self.mode}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, size, device):  # noqa: N802
        size._obj.value = 80 * 2**30
        return 0

    def cuDevicePrimaryCtxGetState(self, device, flags, active):  # noqa: N802
        active._obj.value = bool(self.contexts)
        return 0

    def cuCtxPushCurrent_v2(self, context):  # noqa: N802
        self.pushed += 1
        return 0

    def cuCtxPopCurrent_v2(self, context):  # noqa: N802
        self.pushed -= 1
        return 0

    def cuMemGetInfo_v2(self, free, total):  # noqa: N802
        assert self.pushed == 1
        free._obj.value, total._obj.value = 70 * 2**30, 80 * 2**30
        return 0


@pytest.fixture(autouse=True)
def fresh():
    yield
    host.gpus.cache_clear()
    host.driver_cuda_version.cache_clear()


def use(monkeypatch, driver):
    host.gpus.cache_clear()
    host.driver_cuda_version.cache_clear()
    monkeypatch.setattr(host, "_driver", lambda: driver)


def test_gpus_as_the_driver_tells(monkeypatch):
    use(monkeypatch, FakeDriver())
    assert host.gpus() == (host.Gpu("NVIDIA Something", (9, 0), 80 * 2**30),)
    assert host.driver_cuda_version() == "12.4"
    assert host.has_gpu()


def test_no_driver_no_gpu(monkeypatch):
    use(monkeypatch, None)
    assert host.gpus() == ()
    assert host.driver_cuda_version() is None
    assert not host.has_gpu()


def test_a_driver_that_is_not_there_is_none(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert host._driver() is None


def test_versions_of_what_is_installed():
    versions = host.library_versions()
    assert versions["torch"]
    assert host.library_version("no-such-distribution") is None


def test_facts_are_plain_data():
    assert json.loads(json.dumps(host.facts()))["processor"].endswith(("core", "cores"))


def test_the_primary_context_is_made_on_the_first_gpu(monkeypatch):
    driver = FakeDriver()
    use(monkeypatch, driver)
    assert host.open_primary_context()
    assert driver.contexts == [0]


def test_a_gpu_for_one_process_at_a_time_gets_no_context(monkeypatch):
    driver = FakeDriver(mode=3)
    use(monkeypatch, driver)
    assert host.open_primary_context()
    assert driver.contexts == []


@pytest.mark.parametrize("call", ["cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_context_that_can_not_be_made_is_none(monkeypatch, call):
    driver = FakeDriver()
    setattr(driver, call, lambda *_: 2)  # CUDA_ERROR_OUT_OF_MEMORY
    use(monkeypatch, driver)
    assert not host.open_primary_context()


def test_no_driver_has_no_context(monkeypatch):
    use(monkeypatch, None)
    assert not host.open_primary_context()


def test_free_memory_is_asked_in_the_primary_context(monkeypatch):
    driver = FakeDriver()
    use(monkeypatch, driver)
    assert host.free_gpu_bytes() == 70 * 2**30
    assert driver.pushed == 0


def test_free_memory_is_not_known_without_a_context(monkeypatch):
    use(monkeypatch, FakeDriver(mode=3))
    assert host.free_gpu_bytes() is None
    driver = FakeDriver()
    driver.cuMemGetInfo_v2 = lambda *_: 2
    use(monkeypatch, driver)
    assert host.free_gpu_bytes() is None
    use(monkeypatch, None)
    assert host.free_gpu_bytes() is None

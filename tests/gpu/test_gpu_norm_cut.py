"""A VAE's halves in pieces, PyTorch's group normalisations between them, on a real GPU."""

from __future__ import annotations

import pytest
import torch
from factories import small_vae
from gpu_engines import NEEDS_GPU, NEEDS_TENSORRT

from sdtrt.backends.tensorrt.plan import TENSORRT_FILE
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt86.build import build_plan
from sdtrt.backends.tensorrt86.pieces import Normalization
from sdtrt.backends.tensorrt86.session import open_plans
from sdtrt.backends.tensorrt86.torch_kernels import normalize
from sdtrt.common.console import QUIET
from sdtrt.common.metrics import relative_l2
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import reference
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Sizes
from sdtrt.specs.contract import vae_contract

pytestmark = [*NEEDS_GPU, NEEDS_TENSORRT, pytest.mark.timeout(1200)]
CUDA, SIZES = torch.device("cuda"), Sizes(1, 768, 704)
WIDTHS = (32, 64, 64, 64)  # 32 channels of all pixels are 33 MiB in fp16, and 32 is the least that is cut


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("component", "pieces"), [("vae_decoder", 8), ("vae_encoder", 5)])
def test_it_is_right_on_the_stream_and_from_the_graph(component, pieces, tmp_path):
    if not libraries.open_library("tensorrt").has("weak typing"):
        pytest.skip("only TensorRT 8.6 leaves norms to PyTorch")
    vae = small_vae(block_out_channels=WIDTHS).half()
    contract = vae_contract(dict(vae.config), "fp16", component)
    write_onnx(vae, contract, tmp_path / "model.onnx")
    spec = BuildSpec(ExportSpec(component=component), "tensorrt", (Profile.of(SIZES),), optimization_level=0)
    info = build_plan(tmp_path / "model.onnx", tmp_path, contract, spec, timing_cache=None, console=QUIET)
    assert info["pieces"] == pieces
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    compute = reference(vae.float().to(CUDA), contract)
    with open_plans(tmp_path / TENSORRT_FILE, contract, device=CUDA) as session, torch.inference_mode():
        for seed in range(5):
            feeds = {name: tensor.to(CUDA) for name, tensor in seeded_feeds(contract, SIZES, seed).items()}
            (found,) = session.run(feeds).values()
            expected = compute(*(tensor.float() for tensor in feeds.values()))
            assert relative_l2(found.float().cpu().numpy(), expected.cpu().numpy()) < 1e-2
        assert session.graph_count == 1


@pytest.mark.parametrize(("mean", "deviation"), [(1, 3), (0.5, 1e-3), (40, 0.1), (40000, 30)])
def test_normalising_takes_no_copy(mean, deviation):
    """Of Stable Diffusion 1.5's largest norm: what it takes and gives is 128 MiB each, and little is beside that.

    In place it gives the very same.
    """
    given = (mean + deviation * torch.randn(1, 256, 512, 512, device=CUDA)).half()
    norm = Normalization("x", "y", 32, 1e-6)
    found = torch.empty_like(given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected = torch.nn.functional.group_norm(given.cpu().double(), 32, eps=1e-6)
    normalize(norm, given, found)
    normalize(norm, given, given)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20
    assert relative_l2(found.cpu().double().numpy(), expected.numpy()) < 1e-3
    assert torch.equal(given, found)

"""A live module's weights in engines that hold none. Here sessions have the weights of one, and no package."""

from __future__ import annotations

import factories
import pytest
import torch

from sdtrt.backends.inductor.weights import Constant, Weights
from sdtrt.common.errors import EngineError
from sdtrt.live.bound import Bound, Followed
from sdtrt.models.live import component_tensors

CONV, LINEAR = "conv_in.weight", "time_embedding.linear_1.weight"


class Session:
    """The weights of an engine: convolutions lie channels last."""

    def __init__(self, unet, dtype=torch.float32):
        def laid_out(tensor):
            form = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            return tensor.detach().to(dtype, memory_format=form)

        tensors = component_tensors(unet, "unet").items()
        constants = [Constant.of(name, laid_out(tensor), (name,)) for name, tensor in tensors]
        self.weights = Weights(constants, {}, torch.device("cpu"))

    def follow(self, tensors, known=False):
        self.weights.follow(tensors, known=known)

    def share_weights(self, other):
        self.weights.share(other.weights)

    def weight_views(self):
        return self.weights.views()

    def holds(self, unet, dtype=torch.float32):
        views = self.weight_views()
        return all(torch.equal(views[name], one.to(dtype)) for name, one in component_tensors(unet, "unet").items())


@pytest.fixture
def unet():
    return factories.small_unet("sd1", **factories.SMALLEST["sd1"]).requires_grad_(False)


def bind(unet, *sessions):
    """Bound weights, and what runs a picture's step by the last session."""
    bound = Bound("unet")
    for session in sessions:
        call = bound.following(session, lambda: unet, lambda *_, **__: sessions[-1].holds(unet))
    return bound, call


def places(unet):
    return {name: tensor.data_ptr() for name, tensor in component_tensors(unet, "unet").items()}


def test_what_lies_alike_is_one_copy_and_comes_back_to_the_last_bit(unet):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    session = Session(unet)
    bound, _ = bind(unet, session)
    views = session.weight_views()
    assert session.holds(unet)
    assert unet.get_parameter(LINEAR).data_ptr() == views[LINEAR].data_ptr()
    assert unet.get_parameter(CONV).data_ptr() != views[CONV].data_ptr()
    assert unet.get_parameter(CONV).is_contiguous(), "it is saved as ever"
    bound.release(unet)
    assert not set(places(unet).values()) & {view.data_ptr() for view in views.values()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(one.is_contiguous() for one in unet.parameters())
    bound.release(unet)


def set_data(parameter):
    parameter.data = parameter.data + 1


def widen_and_back(parameter):
    parameter.data = (parameter.data.double() * 2).float()


def lay_out_anew(parameter):
    parameter.data = (parameter.data * 3).mT.contiguous().mT if parameter.ndim == 2 else parameter.data * 3


@pytest.mark.parametrize("name", [CONV, LINEAR])
@pytest.mark.parametrize(
    "change",
    [lambda one: one.data.add_(1), lambda one: one.add_(1), set_data, widen_and_back, lay_out_anew],
    ids=["add to data", "add", "set", "widen", "lay out anew"],
)
def test_a_change_is_in_the_next_picture(unet, name, change):
    session = Session(unet)
    _, step = bind(unet, session)
    with torch.no_grad():
        change(unet.get_parameter(name))
    assert step(None, 1, torch.zeros(1))
    assert session.holds(unet)


def test_another_parameter_and_other_weights_of_the_same_layers_are_followed(unet):
    session = Session(unet)
    _, step = bind(unet, session)
    unet.conv_in.weight = torch.nn.Parameter(torch.ones_like(unet.conv_in.weight))
    assert step()
    assert session.weight_views()[CONV].eq(1).all()
    unet.load_state_dict(factories.small_unet("sd1", seed=1, **factories.SMALLEST["sd1"]).state_dict())
    assert step()


def test_weights_are_copied_at_a_pictures_first_step_alone(unet, monkeypatch):
    session = Session(unet)
    bound, step = bind(unet, session)
    copied, copy = [], bound.copy
    monkeypatch.setattr(bound, "copy", lambda module: copied.append(1) or copy(module))
    states = torch.zeros(1)
    for _ in range(5):
        step(None, 1, encoder_hidden_states=states)
    assert len(copied) == 1
    step(None, 1, torch.zeros(1))
    assert len(copied) == 2
    for _ in range(2):
        step()
    assert len(copied) == 4, "nothing tells steps apart"
    step(None, 1, states)
    Followed(unet, "unet", bound).settle(unet)
    step(None, 1, states)
    assert len(copied) == 6, "the picture was decoded: another one may have the same conditioning"


def test_another_precision_is_a_cast_and_a_copy(unet):
    session = Session(unet, torch.float16)
    before = places(unet)
    bound, _ = bind(unet, session)
    assert session.holds(unet, torch.float16)
    assert places(unet) == before
    unet.get_parameter(LINEAR).data.add_(1)
    bound.copy(unet)
    assert session.holds(unet, torch.float16)


def test_sessions_of_several_sizes_have_one_copy(unet):
    one, two = Session(unet), Session(unet)
    _, step = bind(unet, one, two)
    views = one.weight_views()
    assert all(view.data_ptr() == views[name].data_ptr() for name, view in two.weight_views().items())
    unet.get_parameter(CONV).data.add_(1)
    assert step()


def test_other_layers_are_refused(unet):
    watch = Followed(unet, "unet", Bound("unet"))
    watch.look(unet)
    unet.add_module("another", torch.nn.Linear(2, 2))
    with pytest.raises(EngineError, match="other layers"):
        watch.look(unet)


def test_tensors_that_the_engine_has_not_are_refused(unet):
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.to_q.bias is None
    _, step = bind(unet, Session(unet))
    attention.to_q.bias = torch.nn.Parameter(torch.ones(attention.to_q.out_features))
    with pytest.raises(EngineError, match="not those of the engine's architecture"):
        step()
    attention.to_q.bias = None
    unet.conv_in.bias.data = torch.ones(1)
    with pytest.raises(EngineError, match="not those of the engine's architecture"):
        step()

"""Engines free of weights that PyTorch runs, in the place of compiled ones: keys, entries, sessions, and no compiler.

Their weights lie where compiled ones have them (`Weights`): convolutions channels last, in memory of the engine's own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch

from sdtrt.backends import registry
from sdtrt.backends.inductor.weights import PACKAGE_FILE, Constant, Weights
from sdtrt.backends.session import Session, check_tensors
from sdtrt.engines.entry import stored_contract
from sdtrt.exports.tracing import component_call
from sdtrt.models.architecture import Blueprint
from sdtrt.models.components import load_component
from sdtrt.models.image_prompts import complete
from sdtrt.models.live import component_tensors
from sdtrt.models.resolve import resolve_model
from sdtrt.models.tensor_names import other_names, own_tensors
from sdtrt.specs import ModelSpec


class TorchSession(Session[torch.Tensor]):
    """Runs a module by the contract, with weights that it is given."""

    def __init__(self, contract, module):
        self.contract = contract
        self._module = module.eval().requires_grad_(False)
        self._call = component_call(self._module, contract)
        self._tensors = component_tensors(self._module, contract.component)
        constants = [Constant.of(name, _laid_out(one), (name,)) for name, one in self._tensors.items()]
        self.weights = Weights(constants, {}, torch.device("cpu"))
        self._bind()

    def _bind(self):
        for name, view in self.weights.views().items():
            self._tensors[name].data = view

    def set_weights(self, weights):
        tensors = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
        self.weights.fill(own_tensors(tensors), other_names(self.contract.component))

    def take_stored(self, tensors):
        self.weights.fill(own_tensors(tensors), other_names(self.contract.component), casts=True)
        return self.weights.are_finite()

    def follow(self, tensors, *, known=False):
        self.weights.follow(tensors, known=known)

    def share_weights(self, other):
        self.weights.share(other.weights)
        self._bind()

    def weight_views(self):
        return self.weights.views()

    def run(self, feeds):
        check_tensors(self.inputs, feeds)
        with torch.no_grad():
            given = self._call(*(feeds[spec.name] for spec in self.inputs))
        outputs = given if isinstance(given, tuple) else (given,)
        return {spec.name: one.clone() for spec, one in zip(self.outputs, outputs, strict=True)}

    def close(self):
        self.let_go()


def _laid_out(tensor):
    return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format)


def _build(backend, job):
    """Write what the module is built like, and nothing of its weights."""
    export = job.spec.export
    data = job.blueprint and asdict(job.blueprint)
    (job.folder / PACKAGE_FILE).write_text(json.dumps({"blueprint": data, "model": asdict(export.model)}))
    return {"step_ms": 1.0}


def _open(backend, entry, device, scratch):
    data, contract = json.loads(entry.verified(PACKAGE_FILE).read_text()), stored_contract(entry)
    if data["blueprint"]:
        module = Blueprint(**data["blueprint"]).with_seeded_weights(torch.float32)
    else:
        model = resolve_model(replace(ModelSpec.from_json(data["model"]), loras=()))  # whose weights come later
        module = load_component(model, contract.component, torch.float32)
    complete(module, contract)
    return TorchSession(contract, module)


def instead_of_inductor(monkeypatch):
    """Have PyTorch run what the backend `inductor` would compile."""
    cls = type(registry.get("inductor"))
    monkeypatch.setattr(cls, "why_not", lambda backend: None)
    monkeypatch.setattr(cls, "build", _build)
    monkeypatch.setattr(cls, "open", _open)

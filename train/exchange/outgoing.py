"""`ddm export diffusers RUN FOLDER`: a bundle as a pipeline of diffusers."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import replaced, write_json, write_tensors
from ddm.bundle import Artifact, read_bundle
from ddm.errors import ConfigError, require
from ddm.gaussian import MOMENTS
from experts.denoiser import ExpertConfig
from router.networks import RouterConfig
from serve.model.build import network_config
from serve.model.loading import bundle_folder, load
from train.exchange.self_contained import self_contained
from train.exchange.unet2d import lacks, to_their_config, to_their_tensors

log = logging.getLogger(__name__)

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PUBLIC = ("ExpertNetwork", "Mixture", "RoutedPipeline")
_HEAD = '''"""The routed mixture of this folder as a pipeline of diffusers, with nothing else to install.

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipeline(batch_size=16, num_inference_steps=25, seed=0).images

Written by `ddm export diffusers`: `RoutedPipeline`, at the end, and what it uses of ddm (Apache-2.0).
"""
'''


def export_diffusers(run: str, folder: Path) -> None:
    """Write a run's bundle, a bundle or the demo to a new folder for `DiffusionPipeline.from_pretrained`.

    Each expert is a `UNet2DModel` if its options allow it, and else a UNet of pipeline.py; which, and why, is logged.

    Raises `ConfigError` or `ArtifactError` naming what cannot be exported.
    """
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, "FOLDER", "be a new or an empty folder", str(folder))
    load(run, "cpu")  # checks every hash and layout
    bundle = read_bundle(bundle_folder(run))
    if any(one.facts.get("condition") for one in bundle.experts):
        raise ConfigError(f"{run} cannot be exported: its experts take a condition")
    source = self_contained("train.exchange.routed_pipeline", _HEAD, _PUBLIC)
    networks = {f"expert_{k:02d}": expert for k, expert in enumerate(bundle.experts)}
    if bundle.seed_model is not None and bundle.above < 1:
        networks["seed_model"] = bundle.seed_model
    source = source.replace('PARTS = ("expert_00",)', f"PARTS = {tuple(networks)}")
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "RoutedPipeline"],
        "_diffusers_version": "0.42.1",
        "mixture": ["pipeline", "Mixture"],
    }
    facts = {}
    for name, network in networks.items():
        facts[name], standard = _write_expert(network, folder / name)
        index[name] = ["diffusers", "UNet2DModel"] if standard else ["pipeline", "ExpertNetwork"]
        if not standard:
            _write_text(folder / name / "pipeline.py", source)
    mixture = bundle.mixture
    router = None if bundle.router is None else _router(bundle.router)
    _write_part(
        folder / "mixture",
        {
            "_class_name": "Mixture",
            "shape": mixture.shape,
            "names": mixture.names,
            "weights": list(mixture.weights),
            "schedule": bundle.schedule,
            "router": router,
            "seed_model": facts.pop("seed_model", None),
            "above": bundle.above,
            "experts": [*facts.values()],
        },
        _shared_tensors(bundle.experts, bundle.router),
    )
    # diffusers looks for the class of a part in the folder of the part.
    for place in (folder / "mixture", folder):
        _write_text(place / "pipeline.py", source)
    write_json(folder / "model_index.json", index)
    log.info(
        "exported   %s: %d experts, %s a router", folder, mixture.k, "with" if router else "without"
    )


def _write_expert(expert: Artifact, folder: Path) -> tuple[dict[str, Any], bool]:
    """What the mixture says of a network, and whether it is a `UNet2DModel`."""
    config, shape = network_config(ExpertConfig, expert), expert.facts["shape"]
    prefix = "network."
    tensors = {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in expert.tensors.items()
        if name.startswith(prefix)
    }
    known: dict[str, Any] = {
        "parameterization": config.parameterization,
        "sigma_data": config.sigma_data,
        "schedule": expert.facts["schedule"],
    }
    if reason := lacks(config.unet):
        log.info("exported   %s as a UNet of pipeline.py: %s", folder.name, reason)
        facts = {"_class_name": "ExpertNetwork", "shape": shape, "unet": asdict(config.unet)}
        _write_part(folder, facts, {f"network.{name}": tensor for name, tensor in tensors.items()})
        return known, False
    log.info("exported   %s as a UNet2DModel", folder.name)
    theirs = to_their_tensors(tensors, config.unet, shape)
    _write_part(folder, to_their_config(config.unet, shape), theirs)
    return {**known, "patch": config.unet.patch, "timesteps": config.unet.timesteps}, True


def _router(router: Artifact) -> dict[str, Any]:
    config = network_config(RouterConfig, router)
    return {"net": asdict(config.net), "bands": config.bands, "gaussians": config.gaussians}


def _shared_tensors(experts: list[Artifact], router: Artifact | None) -> dict[str, Tensor]:
    means, variances = (
        torch.stack([expert.tensors[name].float() for expert in experts]) for name in MOMENTS
    )
    networks = {} if router is None else router.tensors
    floats = {name: tensor.float() for name, tensor in networks.items()}
    return {"means": means, "variances": variances, **floats}


def _write_part(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A part of a pipeline."""
    write_tensors(folder / _WEIGHTS, tensors)
    write_json(folder / "config.json", config)


def _write_text(path: Path, text: str) -> None:
    with replaced(path) as scratch:
        scratch.write_text(text, encoding="utf-8")

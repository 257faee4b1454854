"""The stage `sample`: images from the bundle, with a record of how they were made."""

import logging

from ddm.artifacts import read_json, write_json, write_tensors
from serve import SampleConfig, load
from serve.model.images import contact_sheet, to_uint8, write_png
from train.config import Config, plain
from train.progress import bar

log = logging.getLogger(__name__)


def sample_images(config: Config) -> None:
    """Draw `sample.n` images into `samples/`: a sheet, the images as numbers, and a record of how they came about."""
    cfg = config.sample
    model = load(config.folder, device=config.device)
    settings = {key: value for key, value in plain(cfg).items() if key not in ("n", "seed")}
    record = {"version": model.version, "n": cfg.n, "seed": cfg.seed, **settings}
    named, usual = ("source", "policy", "sampler", "steps"), SampleConfig()
    others = [
        f"{key}={value}"
        for key, value in settings.items()
        if key not in named and value != getattr(usual, key)
    ]
    stem = (
        config.folder
        / "samples"
        / "-".join([*(str(settings[key]) for key in named), *others, f"seed{cfg.seed}"])
    )
    if stem.with_suffix(".json").exists() and read_json(stem.with_suffix(".json")) == record:
        log.info("sample     up to date: %s.png", stem)
        return
    with bar("sample", cfg.n * cfg.steps) as advance:
        images = model.sample(cfg.n, seed=cfg.seed, progress=advance, **settings)
    side = max(1, round(cfg.n**0.5))
    write_png(stem.with_suffix(".png"), contact_sheet(to_uint8(images).split(side)))
    write_tensors(stem.with_suffix(".safetensors"), {"images": to_uint8(images)})
    write_json(stem.with_suffix(".json"), record)
    log.info("sample     %d images: %s.png", cfg.n, stem)

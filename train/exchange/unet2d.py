"""Our `UNet` and diffusers' `UNet2DModel`: the same network by other names, both ways.

Sources: `diffusers/models/unets/unet_2d.py` and `unet_2d_blocks.py` of diffusers 0.42.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddm.errors import ArtifactError, ConfigError, one_of, require, shown, within
from experts.unet import UNetConfig

# The defaults of `UNet2DModel`, which its config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D"] + 3 * ["AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": 3 * ["AttnUpBlock2D"] + ["UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # of learned time embeddings
}

# What the others of its options must be; where they are not, it is another kind of network.
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
# What `EMAModel.save_pretrained` adds to a config.json.
_OF_EMA = {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
_WHOLE = ("in_channels", "layers_per_block", "freq_shift", "norm_num_groups")
_WHOLE_OR_NULL = ("time_embedding_dim", "attention_head_dim", "attn_norm_num_groups")
_NUMBERS = ("dropout", "norm_eps")
_DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "AttnUpBlock2D": True}


def from_their_config(
    found: Mapping[str, Any], timesteps: int, size: int | None = None
) -> tuple[UNetConfig, list[int]]:
    """Our config of a `UNet2DModel` by its config.json, and the shape `[C, H, W]` of its images.

    timesteps: of its scheduler. size: the side of its images, where the config does not say it.

    Raises `ConfigError` naming the key of what our UNet cannot be.
    """
    kind = found.get("_class_name")
    require(kind == "UNet2DModel", "_class_name", "be 'UNet2DModel'", kind)
    for key in found:
        if not key.startswith("_") and key not in _DEFAULTS and key not in _OF_EMA:
            raise one_of("its keys", key, tuple(_DEFAULTS))
    theirs = {**_DEFAULTS, **found}
    _check(theirs)
    widths = _whole_numbers(theirs, "block_out_channels")
    channels = widths[0]
    rule = f"be multiples of the first, {channels}"
    require(all(w % channels == 0 for w in widths), "block_out_channels", rule, widths)
    rule = f"be in_channels = {theirs['in_channels']}"
    alike = theirs["out_channels"] == theirs["in_channels"]
    require(alike, "out_channels", rule, theirs["out_channels"])
    side = _side(theirs["sample_size"], size)
    attends = _attends(theirs, len(widths))
    embedding = theirs["time_embedding_dim"] or 4 * channels
    factor = embedding // channels
    whole = factor * channels == embedding
    require(whole, "time_embedding_dim", f"be a multiple of {channels}", embedding)
    groups = theirs["norm_num_groups"]
    adaptive = theirs["resnet_time_scale_shift"] == "scale_shift"
    if theirs["add_attention"]:
        middle = theirs["attn_norm_num_groups"]
        if middle is None and not adaptive:  # beside adaptive norms it has none then
            middle = groups
        rule = f"be norm_num_groups = {groups}"
        require(middle == groups, "attn_norm_num_groups", rule, theirs["attn_norm_num_groups"])
    config = UNetConfig(
        channels=channels,
        multipliers=[width // channels for width in widths],
        blocks=theirs["layers_per_block"],
        attention=[side // 2**level for level, attends in enumerate(attends) if attends],
        dropout=theirs["dropout"],
        middle_attention=bool(theirs["add_attention"]),
        adaptive_norm=adaptive,
        embedding=[factor, factor],
        cos_first=bool(theirs["flip_sin_to_cos"]),
        freq_shift=theirs["freq_shift"],
        timesteps=timesteps,
        groups=groups,
        norm_eps=theirs["norm_eps"],
        head_channels=theirs["attention_head_dim"] or 0,
        asymmetric=theirs["downsample_padding"] == 0,
    )
    shape = [theirs["in_channels"], side, side]
    with within("as ours"):
        config.check(shape)
    return config, shape


def _check(theirs: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming the key of an option that our UNet does not have, or of a value of
    another type.
    """
    for key, values in _FIXED.items():
        rule = f"be {' or '.join(map(repr, values))}"
        require(theirs[key] in values, key, rule, theirs[key])
    for key in (*_WHOLE, *_WHOLE_OR_NULL):
        value, least = theirs[key], 0 if key == "freq_shift" else 1
        whole = type(value) is int and value >= least
        null = " or null" * (key in _WHOLE_OR_NULL)
        rule = f"be a whole number of at least {least}{null}"
        require(whole or (bool(null) and value is None), key, rule, value)
    for key in _NUMBERS:
        value = theirs[key]
        require(type(value) in (int, float), key, "be a number", value)


def _whole_numbers(theirs: Mapping[str, Any], key: str) -> list[int]:
    found = theirs[key]
    whole = isinstance(found, list) and found and all(type(n) is int and n > 0 for n in found)
    require(bool(whole), key, "be whole numbers above 0", found)
    return list(found)


def _side(given: Any, size: int | None) -> int:
    if given is None:
        require(size is not None and size > 0, "size", "be the side, as sample_size is null", size)
        return int(size or 0)
    sides = given if isinstance(given, list) and len(given) == 2 else [given, given]
    side = sides[0]
    square = type(side) is int and side > 0 and sides[0] == sides[1]
    require(square, "sample_size", "be the side of square images", given)
    require(size in (None, side), "size", f"be left out, as sample_size is {side}", size)
    return int(side)


def _attends(theirs: Mapping[str, Any], levels: int) -> list[bool]:
    """Which levels attend, from the first down."""
    down, up = theirs["down_block_types"], theirs["up_block_types"]
    for key, names, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        fits = isinstance(names, list) and len(names) == levels
        fits = fits and all(isinstance(name, str) and name in known for name in names)
        require(fits, key, f"be {levels} of {' '.join(known)}", names)
    attends = [_DOWN[name] for name in down]
    same = attends == [_UP[name] for name in reversed(up)]
    require(same, "up_block_types", f"attend where down_block_types = {down} do", up)
    return attends


def lacks(config: UNetConfig) -> str:
    """Why a network is no `UNet2DModel`, in words; empty where it is one."""
    if config.groups == 0:
        return "unet.groups is 0: the number of groups depends on a layer's width"
    hidden, width = config.embedding
    if hidden != width:
        return f"unet.embedding is {config.embedding}: its layers have two widths"
    return ""


def to_their_config(config: UNetConfig, shape: Sequence[int]) -> dict[str, Any]:
    """The config.json of a network that `lacks` nothing. With `patch`, its images are those after
    space-to-depth. Raises `ConfigError` saying what it lacks.
    """
    if reason := lacks(config):
        raise ConfigError(f"a UNet2DModel cannot be this network: {reason}")
    side = shape[-1] // config.patch
    attends = [side // 2**level in config.attention for level in range(len(config.multipliers))]
    pixels = shape[0] * config.patch**2
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.42.1",
        **_DEFAULTS,
        "sample_size": side,
        "in_channels": pixels,
        "out_channels": pixels,
        "time_embedding_dim": config.embedding[0] * config.channels,
        "freq_shift": config.freq_shift,
        "flip_sin_to_cos": config.cos_first,
        "down_block_types": [f"{'Attn' * a}DownBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpBlock2D" for a in reversed(attends)],
        "block_out_channels": [config.channels * m for m in config.multipliers],
        "layers_per_block": config.blocks,
        "downsample_padding": 0 if config.asymmetric else 1,
        "dropout": config.dropout,
        "attention_head_dim": config.head_channels or None,
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.adaptive_norm else "default",
        "add_attention": config.middle_attends,
    }


class _Names(NamedTuple):
    """A layer of ours, and of theirs: one, or the three whose outputs ours has one after another."""

    ours: str
    theirs: tuple[str, ...]


def _layers(config: UNetConfig, shape: Sequence[int]) -> Iterator[_Names]:
    """Every layer with weights."""

    def layer(ours: str, theirs: str) -> _Names:
        return _Names(ours, (theirs,))

    def block(ours: str, theirs: str, number: int, side: int, inputs: int, out: int) -> Any:
        """The layers of a residual block in a level of that side; -1 for the middle's."""
        attends = side in config.attention if side > 0 else config.middle_attends and number == 0
        mine, resnet = f"{ours}.", f"{theirs}.resnets.{number}."
        for name in ("norm1", "conv1", "norm2", "conv2"):
            yield layer(mine + name, resnet + name)
        told = "scale_shift" if config.adaptive_norm else "shift"
        yield layer(mine + told, f"{resnet}time_emb_proj")
        if inputs != out:
            yield layer(f"{mine}skip", f"{resnet}conv_shortcut")
        if attends:
            mine, attention = f"{ours}.attention.", f"{theirs}.attentions.{number}."
            yield layer(f"{mine}norm", f"{attention}group_norm")
            yield _Names(f"{mine}qkv", tuple(f"{attention}to_{part}" for part in "qkv"))
            yield layer(f"{mine}out", f"{attention}to_out.0")

    yield layer("encoder.embed.layers.0", "time_embedding.linear_1")
    yield layer("encoder.embed.layers.2", "time_embedding.linear_2")
    yield layer("encoder.stem", "conv_in")
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    side, width, place = shape[-1] // config.patch, config.channels, 0
    skips = [width]
    for level, out in enumerate(widths):
        if level > 0:
            strided = f"down_blocks.{level - 1}.downsamplers.0.conv"
            yield layer(f"encoder.stages.{place}", strided)
            place += 1
            skips.append(width)
        for number in range(config.blocks):
            ours, theirs = f"encoder.stages.{place}", f"down_blocks.{level}"
            yield from block(ours, theirs, number, side // 2**level, width, out)
            width, place = out, place + 1
            skips.append(width)
    for number in range(2):
        yield from block(f"middle.{number}", "mid_block", number, -1, width, width)
    place = 0
    for up, level in enumerate(reversed(range(len(widths)))):
        for number in range(config.blocks + 1):
            ours, inputs = f"stages.{place}", width + skips.pop()
            theirs = f"up_blocks.{up}"
            yield from block(ours, theirs, number, side // 2**level, inputs, widths[level])
            width, place = widths[level], place + 1
        if level > 0:
            yield layer(f"stages.{place}.conv", f"up_blocks.{up}.upsamplers.0.conv")
            place += 1
    yield layer("head.0", "conv_norm_out")
    yield layer("head.2", "conv_out")


# The names of attention layers before diffusers 0.12, in files that are still there.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_their_tensors(
    found: Mapping[str, Tensor], config: UNetConfig, shape: Sequence[int], file: object
) -> dict[str, Tensor]:
    """The state of our UNet from that of a `UNet2DModel`: the same numbers.

    Raises `ArtifactError` naming the file and a tensor that is missing, does not fit or is not
    one of the network's.
    """
    theirs = {_renamed(name): tensor for name, tensor in found.items()}
    with torch.device("meta"):
        expected = config.build(shape).state_dict()
    ours = {}
    for layer in _layers(config, shape):
        for part in ("weight", "bias"):
            names = [f"{name}.{part}" for name in layer.theirs]
            if missing := [name for name in names if name not in theirs]:
                raise ArtifactError(f"{file} has no tensor {missing[0]}, which its config asks for")
            like = expected[f"{layer.ours}.{part}"]
            parts = [theirs.pop(name) for name in names]
            shapes = [tensor.shape for tensor in parts]
            whole = torch.cat(parts) if (alike := len(set(shapes)) == 1) else parts[0]
            fits = whole.numel() == like.numel() and whole.shape[:2] == like.shape[:2]
            if not (alike and fits):
                raise ArtifactError(
                    f"{file} does not fit its config: {' '.join(names)} must have "
                    f"{list(like.shape)} numbers together, got {' '.join(str(list(shape)) for shape in shapes)}"
                )
            ours[f"{layer.ours}.{part}"] = whole.reshape(like.shape)
    if theirs:
        raise ArtifactError(f"{file} does not fit its config: it has {shown(next(iter(theirs)))}")
    return ours


def _renamed(name: str) -> str:
    *parents, layer, part = name.split(".")
    if "attentions" not in parents or layer not in _OLD:
        return name
    return ".".join([*parents, _OLD[layer], part])


def to_their_tensors(
    ours: Mapping[str, Tensor], config: UNetConfig, shape: Sequence[int]
) -> dict[str, Tensor]:
    """The state of a `UNet2DModel` from that of our UNet: the same numbers."""
    theirs = {}
    for layer in _layers(config, shape):
        for part in ("weight", "bias"):
            whole = ours[f"{layer.ours}.{part}"]
            attends = ".attention." in layer.ours and part == "weight" and whole.ndim == 4
            parts = (whole[:, :, 0, 0] if attends else whole).chunk(len(layer.theirs))
            for name, tensor in zip(layer.theirs, parts, strict=True):
                theirs[f"{name}.{part}"] = tensor.clone()  # safetensors refuses shared memory
    return theirs

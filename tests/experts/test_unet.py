"""The UNet: its size, its start, what its images depend on, and the sizes that it refuses."""

import re
from typing import Any

import pytest
import torch

from ddm.blocks import SelfAttention
from ddm.errors import ConfigError
from experts.unet import UNet, UNetConfig


def perturbed(network: UNet, seed: int = 0) -> UNet:
    """The network, with every parameter moved at random: a fresh one answers zero, of which nothing
    can be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def tiny() -> UNet:
    return UNetConfig(channels=8, multipliers=[1, 2], blocks=1, attention=[4], dropout=0.5).build(
        [2, 8, 8]
    )


def test_the_default_unet_is_ddpms_with_35_7m_parameters() -> None:
    with torch.device("meta"):
        network = UNetConfig().build([3, 32, 32])
    count = sum(parameter.numel() for parameter in network.parameters())
    assert round(count / 1e6, 1) == 35.7
    sides = []
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    network(torch.zeros(1, 3, 32, 32, device="meta"), torch.zeros(1, device="meta"))
    # DDPM, appendix B: self-attention at 16 x 16 between the convolutional blocks, and in the
    # middle
    assert sides == [16, 16, 4, 16, 16, 16]


def test_a_fresh_network_answers_zero_and_a_moved_one_does_not() -> None:
    x, t = torch.randn(3, 2, 8, 8), torch.tensor([0.0, 0.4, 1.0])
    torch.testing.assert_close(tiny()(x, t), torch.zeros_like(x), rtol=0, atol=0)
    assert perturbed(tiny())(x, t).std() > 0.1


def test_one_time_for_all_gives_what_the_same_time_for_each_gives() -> None:
    network, x = perturbed(tiny()), torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(network(x, torch.tensor(0.3)), network(x, torch.full((3,), 0.3)))


def test_images_of_a_batch_are_independent() -> None:
    network, x, t = perturbed(tiny()), torch.randn(3, 2, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        out = network(x, t)
        torch.testing.assert_close(network(x[1:2], t[1:2]), out[1:2], rtol=1e-4, atol=1e-5)
        assert (network(x, t.flip(0)) - out).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 1e-2
        assert (network(x.flip(0), t) - out).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 1e-2


def test_a_pixel_of_the_answer_sees_the_finest_map_of_its_own_place() -> None:
    """The skips join maps of equal place and size: without attention, a 1 x 1-level network is
    local.
    """
    network = perturbed(
        UNetConfig(channels=8, multipliers=[1], blocks=1, attention=[], dropout=0.0).build(
            [1, 16, 16]
        )
    )
    for module in network.modules():  # group norm is the one thing that sees the whole map
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda h: h  # type: ignore[method-assign, assignment]
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    network(x, torch.tensor(0.5))[0, 0, 3, 12].backward()
    assert x.grad is not None
    seen = x.grad[0, 0].abs()
    assert (seen == seen.max()).nonzero().sub(torch.tensor([3, 12])).abs().max() <= 4
    rows, columns = seen.nonzero().T.sub(torch.tensor([[3], [12]])).abs()
    # 3 x 3 convolutions on the way: stem, 2 in the encoder, 4 in the middle, 4 in the decoder, head
    assert rows.max() == 12 and columns.max() == 12


def test_a_network_of_patches_is_one_of_their_pixels_as_channels() -> None:
    sizes: dict[str, Any] = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]}
    patched = perturbed(UNetConfig(**sizes, dropout=0.0, patch=2).build([3, 8, 8])).double()
    plain = UNetConfig(**sizes, dropout=0.0).build([12, 4, 4]).double()
    plain.load_state_dict(patched.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    # channel (c, i, j) of a small pixel is colour c of the pixel at (i, j) in its square
    cut = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).reshape(2, 12, 4, 4)
    small = plain(cut, t).reshape(2, 3, 2, 2, 4, 4)
    expected = torch.empty_like(x)
    for i in range(2):
        for j in range(2):
            expected[:, :, i::2, j::2] = small[:, :, i, j]
    torch.testing.assert_close(patched(x, t), expected)
    assert patched(x, t).std() > 0.01


@pytest.mark.parametrize(
    ("sizes", "shape", "message"),
    [
        (
            {"channels": 6},
            [1, 8, 8],
            "channels must be a multiple of 4 in [4, 8192], got 6",
        ),
        (
            {"channels": 0},
            [1, 8, 8],
            "channels must be a multiple of 4 in [4, 8192], got 0",
        ),
        (
            {"multipliers": []},
            [1, 8, 8],
            "multipliers must be whole numbers in [1, 64], got []",
        ),
        (
            {"multipliers": [1, 0]},
            [1, 8, 8],
            "multipliers must be whole numbers in [1, 64], got [1, 0]",
        ),
        ({"blocks": 0}, [1, 8, 8], "blocks must be in [1, 32], got 0"),
        ({"dropout": 1.0}, [1, 8, 8], "dropout must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, [1, 8, 8], "dropout must be in [0, 1), got -0.1"),
        (
            {"multipliers": [1, 1, 1]},
            [1, 10, 10],
            "multipliers must halve a square image of 10 x 10 evenly, got [1, 1, 1]",
        ),
        ({"groups": 3}, [1, 8, 8], "groups must be 0 or divide channels = 8, got 3"),
        (
            {"embedding": [4]},
            [1, 8, 8],
            "embedding must be two whole numbers in [1, 64], got [4]",
        ),
        (
            {"head_channels": 3, "attention": [4]},
            [1, 8, 8],
            "head_channels must be 0 or divide the width 16 of a level that attends, got 3",
        ),
        ({"freq_shift": 2}, [1, 8, 8], "freq_shift must be 0 or 1, got 2"),
        ({"norm_eps": 0.0}, [1, 8, 8], "norm_eps must be in (0, 1], got 0.0"),
        ({"timesteps": -1}, [1, 8, 8], "timesteps must be in [0, 1000000], got -1"),
        (
            {"multipliers": [1]},
            [3, 8, 16],
            "multipliers must halve a square image of 8 x 16 evenly, got [1]",
        ),
    ],
)
def test_sizes_that_make_no_network_are_refused_by_key_rule_and_value(
    sizes: dict[str, object], shape: list[int], message: str
) -> None:
    config = UNetConfig(
        **{"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [], **sizes}
    )  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        config.build(shape)


@pytest.mark.parametrize("channels", [4, 36, 48, 64, 68, 100, 128, 132, 160])
def test_every_width_builds_a_network_or_is_refused_by_key(channels: int) -> None:
    for multipliers in ([1], [1, 2], [1, 2, 2], [3]):
        config = UNetConfig(channels=channels, multipliers=multipliers, blocks=1, attention=[4])
        with torch.device("meta"):
            refused = ""
            try:
                config.build([1, 8, 8])(torch.zeros(2, 1, 8, 8), torch.zeros(2))
            except ConfigError as error:
                refused = str(error)
        assert refused == "" or refused.startswith(("channels must", "multipliers must")), refused

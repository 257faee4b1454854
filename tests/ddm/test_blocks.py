"""The building blocks against the formulas that they stand for."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddm.blocks import (
    BlockStyle,
    Encoder,
    HalveAsymmetrically,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    check_encoder,
    group_norm,
)
from ddm.errors import ConfigError


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (32, 8), (64, 16), (128, 32), (256, 32)])
def test_groups_are_of_four_channels_until_there_are_32(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_times_become_ddpms_sines_and_cosines() -> None:
    embedding = TimeEmbedding(8)
    embedding.layers = nn.Identity()
    for t in (0.0, 0.013, 1.0):
        phases = [1000 * t / 10000 ** (i / 3) for i in range(4)]
        expected = [math.sin(phase) for phase in phases] + [math.cos(phase) for phase in phases]
        assert embedding(torch.tensor([t]))[0].tolist() == pytest.approx(expected, abs=2e-4)


def test_numbers_of_steps_become_sines_and_cosines_of_another_style() -> None:
    style = BlockStyle(timesteps=500, cos_first=True, freq_shift=0, embedding=[4, 4])
    embedding = TimeEmbedding(8, style)
    assert embedding.width == 32
    embedding.layers = nn.Identity()
    for t, number in ((0.0, 0), (0.001, 0), (0.002, 0), (0.3, 149), (1.0, 499)):
        phases = [number / 10000 ** (i / 4) for i in range(4)]
        expected = [math.cos(phase) for phase in phases] + [math.sin(phase) for phase in phases]
        assert embedding(torch.tensor([t]))[0].tolist() == pytest.approx(expected, abs=2e-4)


def test_heads_attend_apart() -> None:
    layer = SelfAttention(8, BlockStyle(head_channels=4, groups=2, norm_eps=0.1)).double()
    randomize(layer)
    x = noise(2, 8, 2, 3)
    normed = F.group_norm(x, 2, layer.norm.weight, layer.norm.bias, 0.1).reshape(2, 8, 6)
    weight = layer.qkv.weight[:, :, 0, 0]
    q, k, v = (torch.einsum("oi,bin->bon", weight, normed) + layer.qkv.bias[:, None]).split(
        8, dim=1
    )
    mixed = []
    for part in (slice(0, 4), slice(4, 8)):
        products = torch.einsum("bcn,bcm->bnm", q[:, part], k[:, part]) / math.sqrt(4)
        mixed.append(torch.einsum("bnm,bcm->bcn", products.softmax(dim=2), v[:, part]))
    out = torch.einsum("oi,bin->bon", layer.out.weight[:, :, 0, 0], torch.cat(mixed, dim=1))
    expected = x + (out + layer.out.bias[:, None]).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_ddpms_embedding_is_added_before_the_second_norm() -> None:
    block = ResidualBlock(8, 8, 6, 0.0, False, BlockStyle(adaptive_norm=False)).double()
    randomize(block)
    x, embedding = noise(2, 8, 4, 4), noise(2, 6)
    h = block.conv1(F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias)))
    assert block.shift is not None
    h = h + (F.silu(embedding) @ block.shift.weight.T + block.shift.bias)[:, :, None, None]
    h = F.group_norm(h, 2, block.norm2.weight, block.norm2.bias)
    torch.testing.assert_close(block(x, embedding), x + block.conv2(F.silu(h)))


def test_an_asymmetric_convolution_pads_right_and_bottom_alone() -> None:
    layer = HalveAsymmetrically(2).double()
    x = noise(1, 2, 4, 4)
    padded = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    padded[:, :, :4, :4] = x
    expected = F.conv2d(padded, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)
    assert expected.shape[-2:] == (2, 2)


def test_self_attention_is_the_softmax_of_scaled_products() -> None:
    layer = SelfAttention(8).double()
    randomize(layer)
    x = noise(2, 8, 2, 3)
    normed = F.group_norm(x, 2, layer.norm.weight, layer.norm.bias).reshape(2, 8, 6)
    weight = layer.qkv.weight[:, :, 0, 0]
    q, k, v = (torch.einsum("oi,bin->bon", weight, normed) + layer.qkv.bias[:, None]).split(
        8, dim=1
    )
    attention = (torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8)).exp()
    attention = attention / attention.sum(dim=2, keepdim=True)
    mixed = torch.einsum("bnm,bcm->bcn", attention, v)
    out = torch.einsum("oi,bin->bon", layer.out.weight[:, :, 0, 0], mixed) + layer.out.bias[:, None]
    torch.testing.assert_close(layer(x), x + out.reshape(x.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", [False, True])
def test_a_fresh_residual_block_is_its_skip(attention: bool) -> None:
    x, embedding = noise(2, 8, 4, 4), noise(2, 6)
    same = ResidualBlock(8, 8, 6, 0.0, attention).double()
    torch.testing.assert_close(same(x, embedding), x, rtol=0, atol=0)
    wider = ResidualBlock(8, 12, 6, 0.0, attention).double()
    expected = (
        torch.einsum("oi,bihw->bohw", wider.skip.weight[:, :, 0, 0], x)
        + wider.skip.bias[:, None, None]
    )
    torch.testing.assert_close(wider(x, embedding), expected, rtol=1e-12, atol=1e-12)


def test_the_embedding_scales_and_shifts_the_second_norm() -> None:
    block = ResidualBlock(8, 8, 6, 0.0, attention=False).double()
    randomize(block)
    x, embedding = noise(2, 8, 4, 4), noise(2, 6)
    h = block.conv1(F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias)))
    h = F.group_norm(h, 2, block.norm2.weight, block.norm2.bias)
    numbers = F.silu(embedding) @ block.scale_shift.weight.T + block.scale_shift.bias
    h = h * (1 + numbers[:, :8, None, None]) + numbers[:, 8:, None, None]
    torch.testing.assert_close(
        block(x, embedding), x + block.conv2(F.silu(h)), rtol=1e-9, atol=1e-9
    )


def test_dropout_acts_in_training_alone() -> None:
    block = ResidualBlock(8, 8, 6, 0.5, attention=False).double()
    randomize(block)
    x, embedding = noise(1, 8, 4, 4), noise(1, 6)
    torch.manual_seed(0)
    assert not torch.equal(block(x, embedding), block(x, embedding))
    block.eval()
    assert torch.equal(block(x, embedding), block(x, embedding))


def encoder() -> Encoder:
    made = Encoder([3, 8, 8], 8, [1, 2, 3], 2, [4], 0.0).double()
    randomize(made)
    return made


def test_the_encoders_maps_have_the_widths_it_tells_and_halve_from_level_to_level() -> None:
    net = encoder()
    maps, _ = net(noise(2, 3, 8, 8), torch.tensor(0.5))
    assert [m.shape[1] for m in maps] == net.widths == [8, 8, 8, 8, 16, 16, 16, 24, 24]
    assert [m.shape[2] for m in maps] == [8, 8, 8, 4, 4, 4, 2, 2, 2]


def test_the_encoder_attends_at_the_sides_asked_for_and_nowhere_else() -> None:
    blocks = [stage for stage in encoder().stages if isinstance(stage, ResidualBlock)]
    assert [isinstance(block.attention, SelfAttention) for block in blocks] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def test_the_encoder_sees_each_image_alone_and_at_its_own_time() -> None:
    net, x, t = encoder(), noise(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    maps, embedding = net(x, t)
    for i in range(3):
        alone, alone_embedding = net(x[i : i + 1], t[i])
        torch.testing.assert_close(alone_embedding[0], embedding[i], rtol=1e-9, atol=1e-9)
        for m, m_alone in zip(maps, alone, strict=True):
            torch.testing.assert_close(m_alone[0], m[i], rtol=1e-9, atol=1e-9)
    later, _ = net(x, t + 0.01)
    assert not torch.allclose(later[-1], maps[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels must be a multiple of 4 in [4, 8192], got 0"),
        ({"channels": 30}, "channels must be a multiple of 4 in [4, 8192], got 30"),
        ({"multipliers": []}, "multipliers must be whole numbers in [1, 64], got []"),
        ({"multipliers": [1, 0]}, "multipliers must be whole numbers in [1, 64], got [1, 0]"),
        ({"blocks": 0}, "blocks must be in [1, 32], got 0"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
        (
            {"multipliers": [1] * 5},
            "multipliers must halve a square image of 8 x 8 evenly, got [1, 1, 1, 1, 1]",
        ),
        ({"patch": 3}, "patch must divide the image's side of 8 pixels, got 3"),
        ({"patch": 0}, "patch must divide the image's side of 8 pixels, got 0"),
        (
            {"patch": 4, "multipliers": [1, 1, 1]},
            "multipliers must halve a square image of 2 x 2 evenly, got [1, 1, 1]",
        ),
        (
            {"shape": [1, 8, 6]},
            "multipliers must halve a square image of 8 x 6 evenly, got [1, 2]",
        ),
    ],
)
def test_sizes_that_make_no_network_are_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    sizes: dict[str, Any] = {
        "channels": 32,
        "multipliers": [1, 2],
        "blocks": 2,
        "dropout": 0.1,
        "shape": [1, 8, 8],
    }
    check_encoder(**sizes)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_encoder(**{**sizes, **change})


@pytest.mark.parametrize(
    ("channels", "multipliers"),
    [(4, [1, 3]), (12, [1, 2, 4]), (36, [1, 3]), (32, [5]), (96, [1, 2])],
)
def test_sizes_that_are_let_through_make_a_network(channels: int, multipliers: list[int]) -> None:
    check_encoder(channels, multipliers, 1, 0.0, [1, 8, 8])
    net = Encoder([1, 8, 8], channels, multipliers, 1, [4], 0.0).double()
    maps, _ = net(noise(1, 1, 8, 8), torch.tensor(0.5))
    assert maps[-1].isfinite().all()

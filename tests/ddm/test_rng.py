"""Counter-based random numbers: published vectors, independence, and their distributions."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from scipy import stats

from ddm.rng import RngStream, derive_seed, normal, philox, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that Random123 publishes for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert [int(word) for word in philox([torch.tensor([word]) for word in counter], key)] == list(
        words
    )


def test_the_first_numbers_are_box_mullers_of_the_published_words() -> None:
    # START is 0, so image 0 of seed 0 reads counter 0 under key 0; this also keeps old seeds giving
    # old images
    u = [(word + 0.5) / 2**32 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]
    assert uniform(0, RngStream.START, torch.tensor([0]), count=4)[0].tolist() == u
    pairs = [(math.sqrt(-2 * math.log(u[n])), 2 * math.pi * u[n + 1]) for n in (0, 2)]
    expected = [radius * turn(angle) for radius, angle in pairs for turn in (math.cos, math.sin)]
    assert normal(0, RngStream.START, torch.tensor([0]), 0, (4,))[0].tolist() == pytest.approx(
        expected, rel=1e-6
    )


def test_image_three_has_the_same_noise_alone_and_in_a_batch() -> None:
    for draw in (
        lambda index: normal(5, RngStream.START, index, 2, (1, 3, 3)),
        lambda index: uniform(5, RngStream.CHOICE, index, 2, count=5),
    ):
        batch = draw(torch.arange(8))
        assert torch.equal(draw(torch.tensor([3]))[0], batch[3])
        shuffled = torch.tensor([6, 3, 0, 7])
        assert torch.equal(draw(shuffled), batch[shuffled])


@pytest.mark.parametrize("draw", [partial(uniform, count=5), partial(normal, shape=(2, 3))])
def test_seeds_and_steps_of_each_image_s_own_give_what_each_gives_alone(
    draw: Callable[..., torch.Tensor],
) -> None:
    index = torch.tensor([3, 0, 3, 2**33 + 1])
    steps, seeds = torch.tensor([0, 7, 1000, 7]), torch.tensor([5, 2**62 + 1, 5, 2**32])
    for seed, step in product((5, seeds), (7, steps)):
        rows = zip(
            seeds.tolist() if seed is seeds else [5] * 4,
            steps.tolist() if step is steps else [7] * 4,
            strict=True,
        )
        alone = torch.cat(
            [draw(cfg, RngStream.STEP, index[i : i + 1], n) for i, (cfg, n) in enumerate(rows)]
        )
        assert torch.equal(draw(seed, RngStream.STEP, index, step), alone)


def test_drawing_leaves_no_trace() -> None:
    before = torch.random.get_rng_state()
    first = normal(1, RngStream.NOISE, torch.arange(4), 0, (3,))
    uniform(2, RngStream.TIME, torch.arange(4), 1)
    assert torch.equal(normal(1, RngStream.NOISE, torch.arange(4), 0, (3,)), first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_numbers_differ_across_seed_use_step_image_and_place() -> None:
    index = torch.tensor([0, 1, 2, 256, 2**32, 2**32 + 1, 2**40])
    streams = list(product((0, 1, 2**32, 2**62 + 1), RngStream, (0, 1, 2, 1000)))
    numbers = torch.stack([uniform(seed, use, index, step, count=9) for seed, use, step in streams])
    # Two words, so that none meet by chance:
    pairs = torch.stack([numbers[..., :-1], numbers[..., 1:]], dim=-1).flatten(0, 2)
    assert len(pairs.unique(dim=0)) == len(pairs) == len(streams) * 7 * 8


def test_no_two_uses_share_a_number() -> None:
    values = [use.value for use in RngStream.__members__.values()]  # __members__ lists aliases too
    assert len(set(values)) == len(values)
    assert all(0 <= value < 256 for value in values)


def test_uniform_numbers_are_strictly_inside_the_unit_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for word in (0, ONES):
        monkeypatch.setattr("ddm.rng._words", lambda *_, word=word: torch.tensor([[word, word]]))
        assert (uniform(0, RngStream.TIME, torch.tensor([0]), count=2) > 0).all()
        assert (uniform(0, RngStream.TIME, torch.tensor([0]), count=2) < 1).all()
        assert normal(0, RngStream.TIME, torch.tensor([0]), 0, (2,)).isfinite().all()


def test_uniform_numbers_are_uniform() -> None:
    u = uniform(3, RngStream.TIME, torch.arange(20_000), 1, count=2)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_noise_is_standard_normal(shape: tuple[int, ...]) -> None:
    z = normal(3, RngStream.NOISE, torch.arange(60_000 // math.prod(shape)), 1, shape).double()
    assert z.shape[1:] == shape
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    assert float(z.pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / z.numel()))


def test_noise_is_uncorrelated_between_pixels_images_and_steps() -> None:
    now, later = (
        normal(3, RngStream.STEP, torch.arange(20_001), step, (4,)).double() for step in (1, 2)
    )
    together = torch.cat(
        [now[:-1], now[1:], later[:-1]], dim=1
    )  # an image, its neighbour, and itself a step later
    correlation = torch.corrcoef(together.T)
    torch.testing.assert_close(
        correlation, torch.eye(12, dtype=torch.float64), rtol=0, atol=5 / math.sqrt(20_000)
    )
    squares = torch.corrcoef(
        together.square().T
    )  # what is left of cos^2 + sin^2 = 1 when the radius is wrong
    torch.testing.assert_close(
        squares, torch.eye(12, dtype=torch.float64), rtol=0, atol=5 / math.sqrt(20_000)
    )


def test_seeds_for_other_generators_are_63_bit_words_of_their_own() -> None:
    assert derive_seed(0, RngStream.START, 0) == (0x6627E8D5 << 32 | 0xE169C58D) >> 1
    seeds = [
        derive_seed(seed, use, step)
        for seed, use, step in product((0, 1), (RngStream.DROPOUT, RngStream.EXPERT), range(50))
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    index = torch.tensor([0, 1, 5, 2**32 + 7])
    on_gpu = uniform(2**40 + 3, RngStream.CHOICE, index.cuda(), 17, count=10)
    assert torch.equal(on_gpu.cpu(), uniform(2**40 + 3, RngStream.CHOICE, index, 17, count=10))
    noise = normal(2**40 + 3, RngStream.STEP, index.cuda(), 17, (3, 8, 8))
    torch.testing.assert_close(
        noise.cpu(), normal(2**40 + 3, RngStream.STEP, index, 17, (3, 8, 8)), rtol=1e-6, atol=1e-6
    )

"""python -m benchmarks.policies

Every policy on the oracle (8 dimensions, 4 Gaussians, exact experts and posterior), at 10 to 100 steps of DDIM: mean square
distance to the full mixture's 1000-step path from the same noise, sliced W2 to exact draws, and expert calls a picture.
"""

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ddm.measures import power_law_fit, sliced_w2, trajectory_error
from ddm.oracle import GaussianMixture
from ddm.randomness import Use, normal
from ddm.samplers import sample
from ddm.schedules import schedule
from router.policies import POLICIES
from router.routing import RoutedDenoiser

STEPS, PATHS = (10, 25, 50, 100), 2000


def main() -> None:
    """Measure and print."""
    generator = torch.Generator().manual_seed(0)
    means, stds = 2 * torch.randn(4, 8, generator=generator), 0.3 + 0.5 * torch.rand(4, 8, generator=generator)
    oracle = GaussianMixture(torch.tensor([0.1, 0.2, 0.3, 0.4]), means, stds, schedule("vp_linear"))
    experts = [oracle.expert(k) for k in range(4)]
    x = normal(0, Use.START, torch.arange(PATHS), 0, (8,))
    reference, truth = sample(oracle.denoise, x, oracle.schedule, steps=1000), oracle.sample(PATHS, seed=1)
    table = Table(title=f"mean square distance / sliced W2, {PATHS} paths", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("policy", *(f"{n} steps" for n in STEPS), "falls as", "calls a step"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for name in POLICIES:
        errors, cells, calls = [], [], 0.0
        for steps in STEPS:
            routed = RoutedDenoiser(experts, oracle.posterior, name, seed=1, pi=oracle.weights)
            ends = sample(routed, x, oracle.schedule, steps=steps)
            errors.append(trajectory_error(ends, reference))
            cells.append(f"{errors[-1]:.4f} / {sliced_w2(ends, truth):.3f}")
            calls = routed.calls / PATHS / steps
        table.add_row(name, *cells, f"N^{-power_law_fit(STEPS, errors).exponent:.2f}", f"{calls:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

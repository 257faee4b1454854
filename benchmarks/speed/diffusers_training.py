"""The training loop of diffusers' example `train_unconditional.py` (0.42), step by step, without
accelerate's wrappers: its network, scheduler, loss, AdamW, clipping, cosine schedule and average, and
a torch data loader in the same process, which is its default.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.network import diffusers_unet


class Images(Dataset[Tensor]):
    """Its transforms on tensors instead of PIL's images: to [-1, 1], mirrored at random."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        image = self.images[i].float().div_(127.5).sub_(1)
        return image.flip(2) if torch.rand(()) < 0.5 else image


class DiffusersStep:
    """A step of that loop. Raises `ImportError` if diffusers is not installed."""

    def __init__(
        self, channels: int, images: Tensor, batch: int, bf16: bool, device: str, steps: int = 10**5
    ) -> None:
        if importlib.util.find_spec("diffusers") is None:
            raise ImportError("diffusers is not installed")
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.device, self.bf16 = device, bf16
        self.network = diffusers_unet(channels).to(device).train()
        self.loader = DataLoader(Images(images), batch_size=batch, shuffle=True)
        self.batches = self._batches()
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rate: Any = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=500, num_training_steps=steps
        )
        self.average: Any = EMAModel(
            self.network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75
        )
        self.average.to(device)

    def _batches(self) -> Iterator[Tensor]:
        while True:
            yield from self.loader

    def __call__(self) -> None:
        clean = next(self.batches).to(self.device)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=self.device)
        noisy = self.scheduler.add_noise(clean, noise, t)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            output = self.network(noisy, t / 1000)  # it multiplies by 1000
        loss = nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.average.step(self.network.parameters())
        loss.item()  # it logs the loss of every step

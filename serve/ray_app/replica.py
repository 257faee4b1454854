"""An expert on Ray: the deployment that computes its calls, and the side of it that the engine sees.

A step is a pure function of its arguments, so the engine repeats a call that was lost with its
replica; Serve itself does not retry.
"""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from ddm.bundle import read_bundle
from ddm.condition import Conditions
from ddm.device import pick_device
from ddm.errors import ArtifactError
from serve.engine.expert import UnavailableError
from serve.engine.local_expert import Runner
from serve.engine.turn import Turn
from serve.model.loading import bundle_folder, load_experts
from serve.settings import ServePrecision

_KEPT_VERSIONS = 2  # the current one, and the one that requests under way may still use


class ExpertReplica:
    """One or several experts in one process, which computes one call after another. Loads a version
    of the bundle when a call first asks for it.
    """

    def __init__(
        self,
        experts: Sequence[int],
        folder: str,
        device: str,
        precision: ServePrecision,
        compiled: bool,
    ) -> None:
        self.experts = experts
        self.device = torch.device(pick_device(device))
        self.precision, self.compiled = precision, compiled
        self.runners: dict[str, dict[int, Runner]] = {}  # by version and expert
        self.turn = ThreadPoolExecutor(1)
        self.lost: Exception | None = None  # what took the device from this process
        self._load(folder)

    async def denoise(
        self, k: int, folder: str, version: str, x: np.ndarray, t: np.ndarray, *given: np.ndarray
    ) -> np.ndarray:
        """Denoise x float32 `[B, C, H, W]` at t `[B]` by expert k of this version of the bundle in
        `folder`; given: the arrays of `Conditions`, if the images have a condition or guidance.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self.turn, self._denoise, k, folder, version, x, t, *given
        )

    async def prepare(self, folder: str) -> str:
        """Load the bundle in `folder` beside the ones that are in use; returns its version."""
        return await asyncio.get_running_loop().run_in_executor(self.turn, self._prepare, folder)

    def _prepare(self, folder: str) -> str:
        version = read_bundle(bundle_folder(folder), only=()).version
        return version if version in self.runners else self._load(folder)

    async def check_health(self) -> None:
        """Serve's health check: a process that has lost its GPU is replaced."""
        if self.lost is not None:
            raise self.lost

    async def where(self) -> tuple[int, str]:
        """The process and the node of this replica. An answer means that it is alive."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def _denoise(
        self, k: int, folder: str, version: str, x: np.ndarray, t: np.ndarray, *given: np.ndarray
    ) -> np.ndarray:
        if version not in self.runners and self._load(folder) != version:
            raise ArtifactError(
                f"{folder} no longer holds version {version}: "
                "keep a bundle until the requests that use it are done"
            )
        # torch.tensor copies: the arrays that arrive may be read-only.
        conditions = Conditions(*map(torch.tensor, given)) if given else None
        self.runners[version] = runners = self.runners.pop(version)  # the last to be dropped
        try:
            return runners[k](torch.tensor(x), torch.tensor(t), conditions).numpy()
        except torch.AcceleratorError as error:
            self.lost = error
            raise

    def _load(self, folder: str) -> str:
        denoisers, shape, version = load_experts(folder, self.experts, self.device)
        runners = {}
        for k, denoiser in zip(self.experts, denoisers, strict=True):
            runners[k] = Runner(denoiser, self.device, self.precision, self.compiled)
            runners[k].warm_up(shape)
        self.runners[version] = runners
        for old in list(self.runners)[:-_KEPT_VERSIONS]:
            del self.runners[old]
        return version


class RayExpert:
    """Expert k, as the engine calls it. turn: of its deployment, with its other experts."""

    def __init__(
        self,
        k: int,
        handle: DeploymentHandle[Any],
        folder: Path,
        version: str,
        calls: int,
        turn: Turn,
    ) -> None:
        self.name = expert_name(k)
        self.k = k
        self.handle = handle
        self.folder = str(folder)
        self.version = version
        self.calls = calls
        self.turn = turn

    async def __call__(self, x: Tensor, t: Tensor, given: Conditions | None = None) -> Tensor:
        tensors = x, t.float(), *(given or ())
        arrays = [tensor.cpu().numpy() for tensor in tensors]
        response = self.handle.denoise.remote(self.k, self.folder, self.version, *arrays)
        return torch.tensor(await _result(response))

    async def check(self) -> None:
        await _result(self.handle.where.remote())


async def _result(response: Any) -> Any:
    """The result of a call. Raises the replica's errors, or `UnavailableError` for a lost call."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayTaskError:
        raise
    except (RayError, RayServeException) as error:
        raise UnavailableError(str(error).splitlines()[0]) from error


def expert_name(k: int) -> str:
    """The name of expert k in logs, and of a deployment of its own."""
    return f"expert-{k:02d}"


def expert_groups(k_experts: int, size: int) -> list[range]:
    """The experts of each deployment: so many at a time, in the order of the clusters."""
    return [range(k, min(k + size, k_experts)) for k in range(0, k_experts, size)]

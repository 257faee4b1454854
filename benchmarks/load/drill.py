"""The fault drill: 500 requests, 32 at a time, on a Ray cluster of four nodes, while parts of it
fail.

First a replica of an expert is killed every few seconds (SIGKILL); then a whole node that holds
one; then, without that node, the weights are switched. No request may fail or be lost, and every
response must have the pixels of the fault-free run of the version that it names.
"""

import asyncio
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.load.client import Reply, request_image, session
from benchmarks.load.cluster import Deployed, deployed
from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from serve import load
from serve.model.images import to_uint8
from serve.model.loading import bundle_folder


def other_weights(run: str, folder: Path) -> Path:
    """A copy of the run's bundle whose experts have a larger last bias: brighter pixels."""
    shutil.copytree(bundle_folder(run), folder)
    manifest = read_json(folder / "manifest.json")
    for name in manifest["artifacts"]:
        if name.startswith("expert"):
            tensors, facts = read_artifact(folder / name)
            last = [key for key in tensors if key.endswith("bias") and "head" in key][-1]
            tensors[last] = tensors[last] + 1
            del facts["sha256"]
            write_artifact(folder / name, tensors, facts)
            manifest["artifacts"][name] = sha256(folder / f"{name}.json")
    write_json(folder / "manifest.json", manifest)
    return folder


class Drill:
    """A load on the service, and the faults caused meanwhile."""

    def __init__(self, service: Deployed, requests: int, clients: int) -> None:
        self.service, self.requests, self.clients = service, requests, clients
        self.replies: list[Reply] = []
        self.log: list[str] = []
        self.started = time.perf_counter()

    def note(self, what: str) -> None:
        """Log an event, with its time and the number of responses so far."""
        self.log.append(
            f"{time.perf_counter() - self.started:6.1f} s  {len(self.replies):4d} answers  {what}"
        )
        print(self.log[-1], flush=True)

    async def load(self) -> None:
        """Run the clients until all requests are answered."""
        numbers = iter(range(self.requests))

        async def one(client: Any) -> None:
            for index in numbers:
                self.replies.append(await request_image(client, index, {}))

        async with session(self.service.url) as client:
            await asyncio.gather(*(one(client) for _ in range(self.clients)))

    async def answers(self, share: float) -> None:
        """Wait until that fraction of the requests is answered."""
        while len(self.replies) < share * self.requests:
            await asyncio.sleep(0.05)

    async def faults(self, other: Path, every_s: float) -> None:
        """Until 60 % are answered, kill a replica whenever all run; then kill a node; then switch."""
        rng = np.random.default_rng(0)
        await self.answers(0.05)
        while len(self.replies) < 0.6 * self.requests:
            found = await asyncio.to_thread(self.service.replicas)
            experts = [name for name in found if name.startswith("expert")]
            if all(found[name] for name in experts):
                name = str(rng.choice(experts))
                with suppress(ProcessLookupError):  # Serve may not have seen yet that it is dead
                    os.kill(found[name][0][0], signal.SIGKILL)
                    self.note(f"killed a replica of {name}")
            await asyncio.sleep(every_s)
        await self.answers(0.6)
        found = await asyncio.to_thread(self.service.replicas)
        nodes_of = {name: {node for _, node in replicas} for name, replicas in found.items()}
        experts = [name for name in nodes_of if name.startswith("expert")]
        in_use = set().union(*(nodes_of[name] for name in experts))
        gone = next(node for node in self.service.nodes if node.node_id in in_use)
        lost = [name for name in nodes_of if gone.node_id in nodes_of[name]]
        await asyncio.to_thread(self.service.cluster.remove_node, gone, allow_graceful=False)
        self.note(f"killed a node with {' '.join(lost)}")
        await self.answers(0.8)
        await asyncio.to_thread(self.service.deploy, str(other))
        self.note("switched weights")


def differences(replies: list[Reply], expected: dict[str, Tensor]) -> list[int]:
    """The largest difference of each image from the fault-free one of its version, in levels of
    255.
    """
    found = []
    for reply in replies:
        fault_free = expected[reply.version][reply.index].int()
        image = torch.from_numpy(np.array(reply.image)).reshape(fault_free.shape)
        found.append(int((image.int() - fault_free).abs().max()))
    return found


def drill(
    run: str, requests: int = 500, clients: int = 32, every_s: float = 3.0
) -> list[dict[str, Any]]:
    """Run the drill; returns one row of figures, and one row per fault."""
    with tempfile.TemporaryDirectory() as scratch:
        other = other_weights(run, Path(scratch) / "other")
        models = [load(run), load(other)]
        expected = {m.version: to_uint8(m.sample(requests)).permute(0, 2, 3, 1) for m in models}
        old, new = (expected[model.version].int() for model in models)
        apart = (new - old).abs().amax(dim=(1, 2, 3))
        with deployed(run, retry_s=120) as service:
            spread = {}
            for name, replicas in service.replicas().items():
                spread[name] = sorted({node[:6] for _, node in replicas})
            work = Drill(service, requests, clients)
            work.note(f"on nodes {spread}")

            async def both() -> None:
                faults = asyncio.create_task(work.faults(other, every_s))
                await work.load()
                await faults

            asyncio.run(both())
            work.note("all answered")
    answered = [reply for reply in work.replies if reply.status == 200]
    off = differences(answered, expected)
    by_version = [sum(reply.version == m.version for reply in answered) for m in models]
    took = np.array([reply.seconds for reply in work.replies])
    row = {
        "what": f"{requests} requests, {clients} at a time",
        "answered": len(answered),
        "failed": len(work.replies) - len(answered),
        "lost": requests - len({reply.index for reply in work.replies}),
        "other_pixels": sum(level > 1 for level in off),
        "largest_level_off": max(off, default=0),
        "of_old_weights": by_version[0],
        "of_new_weights": by_version[1],
        "versions_differ_by_levels": int(apart.min()),
        "p50_s": float(np.median(took)),
        "max_s": float(took.max()),
    }
    failures = [
        {"what": f"request {r.index}: {r.status} {r.said}"} for r in work.replies if r.status != 200
    ]
    return [row, *failures[:10], *({"what": line} for line in work.log)]

"""Owners on a Ray cluster: each answers from an actor on its own machine, the router's training asks
by name.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddm.errors import ConfigError, DdmError, require
from ddm.partition import Partition
from ddm.schedules import schedule
from router.owners import Ask, Owner
from train import stopping
from train.config import Config
from train.ray_nodes import connected
from train.run_folder import read_clusters

log = logging.getLogger(__name__)

_NAMESPACE = "ddm"
_POLL_S = 0.5
_PATIENCE_S = 30.0


class _ShardOwner(Owner):
    """The owner of a shard, which is read on the node of the actor and on no other."""

    def __init__(self, folder: str, process: dict[str, Any], flip: bool) -> None:
        images = Partition.read(Path(folder)).cluster(Path(folder), 0)["images"]
        super().__init__(images, schedule(**process), flip)


def _name(cluster: str) -> str:
    return f"owner-{cluster[:16]}"


def answer(config: Config) -> None:
    """Answer the router's queries about `expert.shard` until a signal ends it.

    Raises `ConfigError` if there is no shard, if this machine is no node of the cluster, or if
    somebody answers for the shard already.
    """
    shard, address = config.expert.shard, config.launch.address
    require(shard is not None, "expert.shard", "be the shard to answer for", shard)
    remote = address is not None and address.startswith("ray://")
    rule = "be auto or HOST:PORT, with this machine a node of it (ray start --address=HOST:PORT)"
    require(address is not None and not remote, "launch.address", rule, address)
    folder, cut = read_clusters(config)
    with stopping.deferred(), connected(config):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(_ShardOwner).options(
            name=_name(cut.hashes[0]),
            namespace=_NAMESPACE,
            num_cpus=config.launch.cpus,
            scheduling_strategy=here,
        )
        try:
            owner = actor.remote(str(folder.absolute()), config.schedule, config.data.flip)
        except ValueError as error:  # the name is taken
            raise ConfigError(
                f"expert.shard must be one that nobody answers for on {address} yet, got {shard!r}",
                "expert.shard",
            ) from error
        call, began, since_s = owner.count.remote(), False, time.monotonic()
        while stopping.requested() is None:
            if not ray.wait([call], timeout=_POLL_S)[0]:
                if not began and time.monotonic() - since_s > _PATIENCE_S:
                    log.info("answer     waits for launch.cpus=%g on this node", config.launch.cpus)
                    since_s = time.monotonic()
                continue
            try:
                count = int(ray.get(call))
            except RayActorError as error:
                raise DdmError(f"the owner of {cut.names[0]} has died: {error}") from error
            if not began:
                log.info("answer     for %s, %d images, until ctrl-C", cut.names[0], count)
            began = True
            time.sleep(_POLL_S)
            call = owner.count.remote()


@contextmanager
def asked(config: Config, names: Sequence[str], clusters: Sequence[str]) -> Iterator[Ask]:
    """Reach the owners of these clusters on the cluster of `launch.address`, by hash.

    Raises `ConfigError` naming one that does not answer, `DdmError` for one that goes away.
    """
    with connected(config):
        owners = []
        for name, cluster in zip(names, clusters, strict=True):
            try:
                owners.append(ray.get_actor(_name(cluster), namespace=_NAMESPACE))
            except ValueError as error:
                raise ConfigError(
                    f"router.data=shards needs the owner of {name} ({cluster[:12]}) on "
                    f"{config.launch.address}: python -m train CONFIG answer expert.shard=SHARD "
                    "launch.backend=ray launch.address=auto on its machine"
                ) from error

        def ask(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
            calls = [
                getattr(owner, method).remote(*each)
                for owner, each in zip(owners, arguments, strict=True)
            ]
            answers = []
            for name, call in zip(names, calls, strict=True):
                try:
                    answers.append(ray.get(call))
                except RayActorError as error:
                    raise DdmError(
                        f"the owner of {name} went away; the same command resumes when it is back"
                    ) from error
            return answers

        yield ask

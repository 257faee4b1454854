"""Experts on a Ray cluster of made-up nodes: what a lost process, a lost node and ctrl-C cost, and what is refused."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# The only switch that keeps Ray's own ports on this machine; read when Ray is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray.cluster_utils import Cluster

from ddm.artifacts import sha256
from ddm.errors import ArtifactError, ConfigError, DdmError
from ddm.partition import Partition
from serve import load, ray_address
from train import ray_jobs as on_ray
from train import ray_nodes, stopping
from train.config import Config
from train.stages.run import run
from train.stopping import Stopped
from train.storage import Storage, pack, unpack

K = 4
WORDS = [f"partition.k={K}", "expert.steps=60", "expert.checkpoint_every=5", "launch.backend=ray"]
# A node whose process has ended counts as dead after two seconds instead of half a minute.
QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Nodes:
    """A head without room and three nodes with room for one expert each."""

    def __init__(self) -> None:
        store = 80_000_000
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": store,
                "_system_config": QUICK,
            },
        )
        self.nodes = [
            self.cluster.add_node(num_cpus=1, object_store_memory=store, wait=False)
            for _ in range(3)
        ]
        self.cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def remove_of(self, process: int) -> None:
        """Kill the node that a process belongs to, which is a child of its raylet."""
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[1])
        (node,) = [
            node for node in self.nodes if node.all_processes["raylet"][0].process.pid == parent
        ]
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    ray.shutdown()
    found.cluster.shutdown()


@pytest.fixture(autouse=True)
def no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_requested", None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same experts, one after another in this process."""
    from tests.conftest import SMALL
    from train.config import default_config, load_config

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    words = [*SMALL, *WORDS, "launch.backend=local", f"run={folder}"]
    run(load_config(default_config(), words), ["partition", "expert", "router"])
    return folder


def hashes(folder: Path) -> list[str]:
    return [sha256(folder / "experts" / f"{k:02d}" / "expert.safetensors") for k in range(K)]


def on_news(monkeypatch: pytest.MonkeyPatch, hook: Callable[..., None]) -> None:
    """Call `hook(listener, i, kind, *news)` after each piece of news of a training."""
    hear = on_ray.Listener.hear

    def hearing(self: on_ray.Listener, i: int, kind: str, *news: Any) -> None:
        hear(self, i, kind, *news)
        hook(self, i, kind, *news)

    monkeypatch.setattr(on_ray.Listener, "hear", hearing)


def process_of(listener: on_ray.Listener, i: int) -> int:
    return int(listener.where[i].rpartition("process ")[2])


def test_lost_processes_a_lost_node_and_ctrl_c_change_no_bit(
    nodes: Nodes,
    undisturbed: Path,
    small: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, storage = tmp_path / "run", tmp_path / "storage"
    config = small(
        folder,
        *WORDS,
        f"launch.address={nodes.address}",
        f"launch.storage=local://{storage}",
    )
    run(config, ["partition"])
    killed: list[int] = []
    lost: list[int] = []
    interrupted: list[int] = []
    reads: dict[str, list[str]] = {}

    def disturb(listener: on_ray.Listener, i: int, kind: str, *_: Any) -> None:
        if not reads:
            for inputs in storage.glob("run/*/inputs/*"):
                reads[inputs.name[:9]] = [path.name for path in inputs.glob("partition/*-*")]
        if kind == "lost":
            lost.append(i)
        if kind != "saved" or listener.saved[i] >= 60:
            return
        if len(killed) == 3 and not interrupted and set(killed) <= set(lost):
            interrupted.append(i)
            os.kill(os.getpid(), signal.SIGINT)
        if len(killed) == 3 or i in killed:
            return
        killed.append(i)
        if len(killed) < 3:
            os.kill(process_of(listener, i), signal.SIGKILL)
        else:
            nodes.remove_of(process_of(listener, i))

    monkeypatch.setattr(on_ray, "_NEWS_S", 0.05)
    on_news(monkeypatch, disturb)
    with caplog.at_level("INFO"), stopping.on_signals(), pytest.raises(Stopped) as stopped:
        run(config, ["expert"])
    # Each training could read its own cluster and no other.
    assert reads == {f"expert-{k:02d}": [f"cluster-{k:02d}.safetensors"] for k in range(K)}
    assert set(killed) <= set(lost)
    done = [k for k in range(K) if (folder / "experts" / f"{k:02d}" / "expert.json").exists()]
    assert len(done) < K
    assert list(storage.glob("run/*/*/checkpoint_*"))
    assert len([m for m in caplog.messages if "its process died or its node was lost" in m]) >= 3
    assert max(stopped.value.steps) > 0
    monkeypatch.setattr(stopping, "_requested", None)
    begun: dict[int, int] = {}

    def note(listener: on_ray.Listener, i: int, kind: str, *news: Any) -> None:
        if kind == "step" and news[1] > 0:
            begun.setdefault(i, news[1])

    on_news(monkeypatch, note)
    run(config, ["expert"])
    assert hashes(folder) == hashes(undisturbed)
    assert max(begun.values()) >= 5  # from a checkpoint, which come every 5 steps
    assert not storage.exists() or not list(storage.rglob("*.ckpt"))  # what is over is not kept
    run(config, ["router", "bundle"])
    router = Path("router", "router.safetensors")
    assert sha256(folder / router) == sha256(undisturbed / router)
    assert load(folder).sample(2, steps=2).isfinite().all()


def test_an_expert_that_fails_costs_only_itself_and_is_not_retried(
    nodes: Nodes, small: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, "partition.k=2", "expert.steps=5", f"launch.address={nodes.address}"]
    config = small(folder, *words)
    run(config, ["partition"])
    Partition.file(folder / "partition", 1).write_bytes(b"damaged")
    with (
        caplog.at_level("WARNING"),
        pytest.raises(DdmError, match=r"expert 01 failed: .*cluster-01.safetensors is damaged"),
    ):
        run(config, ["expert"])
    assert (folder / "experts" / "00" / "expert.json").exists()
    assert not [m for m in caplog.messages if "resumes" in m]


def test_two_ranks_on_ray_are_those_of_this_machine(
    nodes: Nodes, small: Callable[..., Config], tmp_path: Path
) -> None:
    words = ["expert.devices=2", "expert.index=1"]
    files = []
    for name, more in (("here", []), ("there", [*WORDS[3:], f"launch.address={nodes.address}"])):
        run(small(tmp_path / name, *words, *more), ["partition", "expert"])
        files.append(sha256(tmp_path / name / "experts" / "01" / "expert.safetensors"))
    assert files[0] == files[1]
    assert not (tmp_path / "there" / "ray").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("expert.devices=6", "expert.devices must be at most "),
        ("launch.gpus=2", "launch.gpus must be at most what one of the cluster's "),
        ("launch.cpus=3", "nodes has, 1, got 3"),
        ("launch.resources={tpu: 1}", "launch.resources.tpu must be at most "),
    ],
)
def test_what_no_node_has_is_refused(
    nodes: Nodes,
    small: Callable[..., Config],
    word: str,
    said: str,
    tmp_path: Path,
) -> None:
    config = small(tmp_path / "run", *WORDS, f"launch.address={nodes.address}", word)
    run(config, ["partition"])
    with pytest.raises(ConfigError, match=said):
        run(config, ["expert"])


def test_an_address_where_no_ray_answers_is_refused(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_address, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for scheme in ("", "ray://"):
            address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
            config = small(tmp_path / "run", *WORDS, f"launch.address={address}")
            run(config, ["partition"])
            with pytest.raises(ConfigError, match=r"launch.address must be .* got '.*did not in"):
                run(config, ["expert"])


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("nosuch://bucket/ddm", "launch.storage must be a folder or a URL that fsspec knows"),
        (
            "/proc/nowhere",
            "launch.storage must be a place that can be written, got '/proc/nowhere'",
        ),
    ],
)
def test_a_storage_that_is_not_one_is_refused(
    small: Callable[..., Config], tmp_path: Path, storage: str, said: str
) -> None:
    config = small(tmp_path / "run", *WORDS, f"launch.storage={storage}")
    run(config, ["partition"])
    with pytest.raises(ConfigError, match=said):
        run(config, ["expert"])


def test_two_processes_of_one_expert_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "Resources": {"CPU": 8, "GPU": 1}}
    monkeypatch.setattr(ray_nodes, "_nodes", lambda: [node])
    ray_nodes.check_room({"CPU": 1, "GPU": 0.5}, 1)
    with pytest.raises(ConfigError, match=r"launch.gpus must be a whole number .*, got 0.5"):
        ray_nodes.check_room({"CPU": 1, "GPU": 0.5}, 2)


def test_after_the_memory_of_a_node_ran_out_what_is_not_done_begins_again(
    small: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = small(tmp_path / "run", *WORDS, "launch.retries=1")
    jobs: Any = [SimpleNamespace(name=f"expert {k:02d}") for k in range(3)]
    table: Any = SimpleNamespace(state=lambda *_: None, step=lambda *_: None)
    here: Any = SimpleNamespace(news=None, stop=None)
    storage = Storage(f"local://{tmp_path}/storage", "run")
    listener = on_ray.Listener(config, jobs, table, storage)
    asked: list[tuple[str, list[int]]] = []

    class OutOfMemory:
        def __init__(self, *given: Any) -> None:
            asked.append(given[-2:])

        def fit(self) -> None:
            listener.hear(0, "failed", DdmError("damaged"))
            listener.hear(1, "step", "a node", 3, 0.5)
            error = ray.exceptions.OutOfMemoryError("a worker was killed")
            raise RuntimeError("Caught unexpected exception: a worker was killed") from error

    monkeypatch.setattr(on_ray, "_tuner", OutOfMemory)
    on_ray._fit(config, None, here, storage, "1", listener)  # type: ignore[arg-type]
    assert asked == [("1", [0, 1, 2]), ("1_1", [1, 2])]
    assert [str(result) for result in listener.results] == [
        "damaged",
        *2 * ["memory ran out on a node, more often than launch.retries"],
    ]
    told = [message.partition(":")[0] for message in caplog.messages if "resumes" in message]
    assert told == ["expert 01"]  # the other had not begun


def test_a_program_that_uses_ray_is_told_to_stop_it(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with (
        pytest.raises(DdmError, match="uses Ray already"),
        ray_nodes.connected(small(tmp_path / "run")),
    ):
        pass


def test_ray_that_is_not_installed_is_named(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "train.ray_jobs", None)
    config = small(tmp_path / "run", *WORDS)
    run(config, ["partition"])
    with pytest.raises(ConfigError, match=r"launch.backend=ray needs Ray, here: pip install"):
        run(config, ["expert"])


def test_a_packed_folder_with_a_flipped_bit_is_refused_by_file(tmp_path: Path) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    (source / "stage").mkdir(parents=True)
    packed.mkdir()
    (source / "stage" / "resume.ckpt").write_bytes(b"state")
    (source / "resume.previous.ckpt").write_bytes(b"older")
    (source / ".resume.ckpt.1.part").write_bytes(b"half")
    pack(source, packed)
    unpack(packed, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").rglob("*")] == ["stage", "resume.ckpt"]
    (packed / "stage" / "resume.ckpt").write_bytes(b"stale")
    with pytest.raises(ArtifactError, match="resume.ckpt is damaged"):
        unpack(packed, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_storage_finds_the_newest_checkpoints_of_any_command_first(tmp_path: Path) -> None:
    storage = Storage(f"local://{tmp_path}", "run")
    names = [f"{command}/e-1/checkpoint_00000{n}" for command, n in (("2", 1), ("1", 9), ("2", 0))]
    for name in (*names, "2_1/e-1/checkpoint_000000"):  # of the second attempt of command 2
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "2" / "e-2" / "checkpoint_000000").mkdir(parents=True)
    found = [path.removeprefix(f"{tmp_path}/run/") for path in storage.checkpoints("e-1")]
    assert sorted(storage.entries()) == ["1", "2", "2_1"]
    commands = [
        "20261128-002053-000001",
        "20261128-002053-000001-ranks",
        "20261128-002053-000001_1",
    ]
    assert [*filter(on_ray._COMMAND.match, [*commands, "1", "mine.txt"])] == commands
    assert found == [
        "2_1/e-1/checkpoint_000000",
        "2/e-1/checkpoint_000001",
        "2/e-1/checkpoint_000000",
        "1/e-1/checkpoint_000009",
    ]
    storage.forget("e-1", ["1"])  # the other command goes on
    assert storage.checkpoints("e-1") == [f"{tmp_path}/run/{name}" for name in found[:3]]
    storage.forget("e-1", ["1", "2", "2_1"])
    storage.clear(["1", "2", "2_1"])
    assert [path.name for path in (tmp_path / "run").rglob("e-*")] == ["e-2"]
    storage.forget("e-2", ["2"])
    (tmp_path / "run" / "mine.txt").write_text("mine")
    (tmp_path / "run" / "3" / "inputs" / "e-3").mkdir(parents=True)  # of another command
    storage.clear(["2"])
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["3", "mine.txt"]
    (tmp_path / "run" / "mine.txt").unlink()
    storage.clear(["3"])
    assert not (tmp_path / "run").exists()

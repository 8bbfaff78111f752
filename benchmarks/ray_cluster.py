"""Runs ``examples/ray_features.py`` on two Ray nodes, of which one may be killed.

Both nodes are on one machine. The script checks that each sound comes out once, with the values that ``extract`` computes
in this process. ``make ray-cluster`` (or ``python -m benchmarks.ray_cluster [SOUNDS]``) writes the section "Ray on two
nodes" of ``RESULTS.md``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.harness import environment, markdown, write_section
from convtap import Store, extract

ROOT = Path(__file__).parent.parent
LAYERS = ("convs.0", "convs.1", "convs.2")
FILES = 32


def load_example() -> ModuleType:
    """Imports the example from its file, so that Ray pickles its functions by value."""
    spec = importlib.util.spec_from_file_location("ray_features", ROOT / "examples" / "ray_features.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def on_one_machine(example: ModuleType, sounds: list[dict[str, Any]], folder: Path) -> tuple[Store, float]:
    """Extracts the same features in this process, without Ray."""

    class Sounds(Dataset[Any]):
        def __len__(self) -> int:
            return len(sounds)

        def __getitem__(self, place: int) -> Any:
            return torch.tensor(sounds[place]["audio"]), sounds[place]["length"], sounds[place]["name"]

    def join(rows: list[Any]) -> Any:
        audio, lengths, names = zip(*rows, strict=True)
        return nn.utils.rnn.pad_sequence(list(audio), batch_first=True), lengths, names

    start = time.perf_counter()
    store = extract(
        example.make_model(),
        Sounds(),
        folder,
        reduce=example.mean_over_time,
        inputs=lambda batch: ((batch[0],), {}),
        ids=lambda batch: batch[2],
        lengths=lambda batch: batch[1],
        collate_fn=join,
        batch_size=8,
        progress=False,
    )
    return store, time.perf_counter() - start


def noted(pad: Callable[[Any], Any], folder: Path) -> Callable[[Any], Any]:
    """Returns ``pad`` that also leaves an empty file in a folder for each batch."""

    def run(batch: Any) -> Any:
        (folder / uuid.uuid4().hex).touch()
        return pad(batch)

    return run


def on_two_nodes(
    example: ModuleType, folder: Path, name: str, kill_after: int | None
) -> tuple[list[dict[str, Any]], float]:
    """Runs the example on a cluster of two nodes.

    Args:
        example: the example.
        folder: the folder of the sounds and of the results.
        name: the name of the folder of this run's results.
        kill_after: the number of batches after which one node is killed, or None.

    Returns:
        The rows, and the seconds of the run.
    """
    import ray
    import ray.data
    from ray.cluster_utils import Cluster

    memory = 500 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "object_store_memory": memory, "include_dashboard": False},
    )
    other = cluster.add_node(num_cpus=3, object_store_memory=memory)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    batches, is_over = folder / f"batches of {name}", threading.Event()
    batches.mkdir()
    pad, example.pad = example.pad, noted(example.pad, batches)
    try:
        cluster.wait_for_nodes()

        def kill() -> None:
            while len(os.listdir(batches)) < kill_after and not is_over.is_set():
                time.sleep(0.01)
            if not is_over.is_set():
                cluster.remove_node(other, allow_graceful=False)

        killer = threading.Thread(target=kill)
        if kill_after is not None:
            killer.start()
        start = time.perf_counter()
        written = example.features(folder / "sounds", folder / name, actors=2)
        seconds = time.perf_counter() - start
        if kill_after is not None:
            is_over.set()
            killer.join()
            assert len([node for node in ray.nodes() if node["Alive"]]) == 1
        return written.take_all(), seconds
    finally:
        is_over.set()
        example.pad = pad
        ray.shutdown()
        cluster.shutdown()


def largest_difference(rows: list[dict[str, Any]], store: Store) -> float:
    """Returns the largest difference from the store, relative to its largest value.

    Raises:
        AssertionError: a sound is missing, or comes twice.
    """
    names = [row["name"] for row in rows]
    assert sorted(names) == sorted(store.ids), f"{len(names)} rows, {len(set(names))} names, {len(store)} sounds"
    places, worst = [store.position(name) for name in names], 0.0
    for layer in LAYERS:
        expected = store.numpy(layer)[places]
        found = np.stack([row[layer] for row in rows])
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def main() -> None:
    """Measures both runs and writes the section."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "src", ROOT)))  # for the actors
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    from pyarrow import parquet

    example = load_example()
    folder = Path(tempfile.mkdtemp())
    example.write_sounds(folder / "sounds", count, FILES)
    sounds = parquet.read_table(folder / "sounds").to_pylist()
    store, alone = on_one_machine(example, sounds, folder / "store")
    rows = [["extract, one process", f"{alone:.1f}", f"{count / alone:,.0f}", "", ""]]
    kill_after, batches = None, -(-count // 8)
    for name in ("two nodes", "two nodes, one killed"):
        found, seconds = on_two_nodes(example, folder, name, kill_after)
        difference = largest_difference(found, store)
        assert difference < 1e-5, difference
        killed = "" if kill_after is None else f"{kill_after} of {batches} batches"
        rows.append([name, f"{seconds:.1f}", f"{count / seconds:,.0f}", killed, f"{difference:.1e}"])
        kill_after = batches // 4
    columns = ("", "seconds", "sounds a second", "killed after", "largest difference ÷ largest value")
    head = (
        f"`make ray-cluster`. {environment()}; {os.cpu_count()} cores that both nodes share. {count:,} sounds of 0.2 to 0.5 s "
        "in 32 Parquet files. Every sound came out once. The seconds of Ray include the start of its actors."
    )
    write_section("Ray on two nodes", f"{head}\n\n{markdown(columns, rows)}")


if __name__ == "__main__":
    main()

"""What all tests share: one thread, a fixed seed, and a torchvision that imports over a CPU build of torch; ``--core``."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from benchmarks.harness import declare_torchvision_operators

torch.set_num_threads(1)


declare_torchvision_operators()

#: What ``--core`` leaves out, files and single tests, each with the package it needs beyond the extra ``test-core``.
BEYOND_CORE = {
    "test_activation.py::test_a_real_model_against_its_own_layers": "transformers",
    "test_docs.py::test_every_python_block_runs_and_prints_what_the_page_shows[compile-and-export.md]": "onnxruntime",
    "test_docs.py::test_every_python_block_runs_and_prints_what_the_page_shows[training.md]": "lightning",
    "test_extract_lengths.py::test_a_wav2vec2_encoder_gives_the_frames_that_transformers_says": "transformers",
    "test_keras.py": "keras",
    "test_lightning.py": "lightning",
    "test_notebook.py": "nbclient",
    "test_ray.py::test_the_example_writes_parquet_that_holds_the_mean_of_each_sounds_real_frames": "ray",
    "test_ray.py::test_two_actors_of_which_one_is_killed_give_each_row_once_as_by_hand": "ray",
    "test_real_functional_models.py": "transformers",
    "test_real_models.py": "transformers",
    "test_report_in_browser.py": "playwright",
    "test_tapped.py::test_one_onnx_file_has_the_layers_as_named_outputs": "onnxruntime",
    "test_three_ways.py::test_the_example_prints_all_three": "keras",
    "test_three_ways.py::test_the_keras_network_gives_what_a_model_with_several_outputs_gives": "keras",
    "test_timeline_models.py": "transformers",
    "test_trainer.py": "accelerate",
}


def pytest_addoption(parser):
    parser.addoption("--core", action="store_true", help="leave out what needs more packages than the extra test-core")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("core") and collection_path.name in BEYOND_CORE else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("core"):
        left_out = [item for item in items if item.nodeid.removeprefix("tests/") in BEYOND_CORE]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.getoption("core"):
        terminalreporter.section(f"left out by --core (torch {torch.__version__})")
        for name, package in BEYOND_CORE.items():
            terminalreporter.line(f"{name} (needs {package})")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_gc():
    """Turns the cycle collector off: what is freed then is freed by its reference count alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

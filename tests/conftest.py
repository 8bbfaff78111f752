"""What all tests share: one thread, a fixed seed, and a torchvision that imports over a CPU build of torch; ``--core``."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import declare_torchvision_operators

torch.set_num_threads(1)

# where loader workers come from a fork server (Python 3.14), it imports torch once and not every worker
multiprocessing.set_forkserver_preload(["torch", "torch.utils.data"])

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

#: Tests of what Windows does not have.
NOT_ON_WINDOWS = {
    "test_extract_crash.py::test_a_directory_that_is_something_else_is_refused": "/proc",
    "test_extract_crash.py::test_a_killed_parent_takes_its_fork_server_and_loader_workers_with_it": "fork server",
    "test_extract_crash.py::test_a_loader_worker_that_dies_loses_no_batch_that_was_computed": "SIGKILL",
    "test_extract_crash.py::test_fifty_kills_at_random_moments_and_a_resume_give_what_an_uninterrupted_run_gives": "fork",
    "test_extract_crash.py::test_sigterm_writes_what_was_computed_and_ends_the_process_by_that_signal": "SIGTERM",
    "test_faults.py::test_a_keyboard_interrupt_at_500_random_moments_leaves_nothing": "timer that signals",
    "test_faults.py::test_a_keyboard_interrupt_in_a_look_at_a_model_leaves_the_model_restored": "timer that signals",
    "test_lock.py::test_an_interrupt_at_any_moment_leaves_the_lock_unlocked": "timer that signals",
    "test_lock.py::test_an_interrupt_while_it_waits_leaves_the_lock_to_its_owner": "timer that signals",
    "test_extract_parts.py::test_one_of_two_torchrun_processes_that_is_killed_and_restarted_leaves_no_gap": "SIGKILL",
    "test_extract_ranks.py::test_three_ranks_of_which_one_dies_for_good_are_gone_on_with_by_two_bit_for_bit": "SIGKILL",
}

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

#: Warnings of torch that no user can avoid: which Python and torch give them, and the filter.
OF_TORCH = (
    # TorchScript
    ((2, 9) <= TORCH <= (2, 13), "ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    (TORCH >= (2, 14), "ignore:.*torch.jit.*is deprecated:FutureWarning"),
    (sys.version_info >= (3, 14), "ignore:.*torch.jit.*is not supported in Python 3.14:DeprecationWarning"),
    (
        sys.version_info >= (3, 14) and TORCH >= (2, 14),
        "ignore:.*torch.jit.*is not supported in Python 3.14:FutureWarning",
    ),
    # a test forks a worker after torch has started threads of its own
    (
        sys.version_info >= (3, 12) and TORCH >= (2, 15),
        "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning",
    ),
    # a model is compiled after something has read a setting of the compiler
    (TORCH == (2, 6), "ignore:Skipping serialization of skipfiles_inline:UserWarning"),
    # a dictionary that is guarded
    (sys.version_info[:3] == (3, 13, 0), "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
    # Dynamo asks a captured output for its gradient
    (
        TORCH == (2, 11),
        "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning",
    ),
)


def pytest_configure(config: pytest.Config) -> None:
    for given, warning in OF_TORCH:
        if given:
            config.addinivalue_line("filterwarnings", warning)


def pytest_addoption(parser):
    parser.addoption("--core", action="store_true", help="leave out what needs more packages than the extra test-core")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("core") and collection_path.name in BEYOND_CORE else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("core"):
        left_out = [item for item in items if item.nodeid.removeprefix("tests/") in BEYOND_CORE]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    for item in items if sys.platform == "win32" else ():
        missing = NOT_ON_WINDOWS.get(item.nodeid.removeprefix("tests/").partition("[")[0])
        if missing is not None:
            item.add_marker(pytest.mark.skip(reason=f"Windows has no {missing}"))


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

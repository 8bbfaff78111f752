"""Ray Data: batches in and out of the extractor, and a local pool of two actors of which one is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from convtap._errors import InvalidType, InvalidValue, LayerNotFound, NotCaptured, Unsupported
from convtap.ray import Extractor
from tests.process import SRC, run_python
from tests.reference import cloning_hooks

EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_features.py"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv1d(4, 6, 5, stride=2))


def audio(rows=5, length=40):
    return np.random.default_rng(rows).standard_normal((rows, 1, length)).astype(np.float32)


def by_hand(array, model=None):
    """What hooks that clone see, as arrays."""
    model = (model or net()).eval()
    with cloning_hooks(model) as seen, torch.inference_mode():
        model(torch.tensor(array))
    return {name: output.numpy() for name, output in seen}


# -- one batch


def test_a_batch_gets_a_column_a_layer_with_the_values_before_the_inplace_relu():
    batch = {"id": np.arange(5), "audio": audio()}
    out = Extractor(net, inputs="audio")(batch)
    assert list(out) == ["id", "audio", "0", "2"]
    for name, expected in by_hand(audio()).items():
        assert np.array_equal(out[name], expected)
    assert (out["0"] < 0).any()


def test_a_batch_that_is_not_to_be_written_is_read_without_a_warning_and_stays_as_it_was():
    class WritesIntoItsInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3)

        def forward(self, x):
            return self.conv(x.mul_(0))

    shared = audio()
    shared.flags.writeable = False
    out = Extractor(WritesIntoItsInput, inputs="audio")({"audio": shared})
    assert out["audio"] is shared
    assert np.array_equal(shared, audio())


def test_reduce_dtype_and_keep_make_a_small_table():
    extractor = Extractor(net, "2", inputs="audio", reduce=lambda t: t.mean(-1), dtype=torch.float16, keep=["id"])
    out = extractor({"id": np.arange(5), "audio": audio()})
    assert list(out) == ["id", "2"]
    assert out["2"].dtype == np.float16
    expected = torch.tensor(by_hand(audio())["2"]).mean(-1).half().numpy()
    assert np.array_equal(out["2"], expected)


def test_bfloat16_becomes_float32_exactly():
    out = Extractor(net, "0", dtype=torch.bfloat16)({"audio": audio()})
    assert out["0"].dtype == np.float32
    assert np.array_equal(out["0"], torch.tensor(by_hand(audio())["0"]).bfloat16().float().numpy())


def test_the_only_column_is_the_input():
    assert "0" in Extractor(net)({"anything": audio()})


def test_a_function_of_the_batch_is_given_tensors():
    def waves(batch):
        assert isinstance(batch["wave"], torch.Tensor)
        assert batch["name"].tolist() == ["a", "b"]
        return (batch["wave"][:, None],), {}

    flat = audio(2)[:, 0]
    out = Extractor(net, inputs=waves)({"name": np.array(["a", "b"]), "wave": flat})
    assert np.array_equal(out["2"], by_hand(flat[:, None])["2"])


def ragged(lengths):
    column = np.empty(len(lengths), object)
    for i, length in enumerate(lengths):
        column[i] = np.random.default_rng(i).standard_normal(length).astype(np.float32)
    return column


def padded(batch):
    return (nn.utils.rnn.pad_sequence(batch["audio"], batch_first=True)[:, None],), {}


def test_ragged_rows_are_cut_to_the_frames_of_their_own_samples():
    batch = {"audio": ragged([20, 33, 27]), "length": np.array([20, 33, 27])}
    out = Extractor(net, inputs=padded, lengths="length")(batch)
    assert [row.shape for row in out["0"]] == [(4, 18), (4, 31), (4, 25)]
    assert [row.shape for row in out["2"]] == [(6, 7), (6, 14), (6, 11)]
    for row, sound in zip(out["2"], batch["audio"], strict=True):
        alone = by_hand(sound[None, None])["2"][0]
        np.testing.assert_allclose(row, alone, rtol=1e-5, atol=1e-6)
    means = Extractor(
        net, inputs=padded, lengths=lambda b: [len(row) for row in b["audio"]], reduce=lambda t: t.mean(-1)
    )
    np.testing.assert_allclose(means(batch)["2"][0], out["2"][0].mean(-1), rtol=1e-5, atol=1e-6)


def test_lists_of_one_length_are_an_array_as_other_programs_write_them():
    rows = ragged([30, 30])
    out = Extractor(net, inputs=lambda b: ((b["audio"][:, None],), {}))({"audio": rows})
    assert np.array_equal(out["0"], by_hand(np.stack(rows)[:, None])["0"])


def test_calls_of_a_layer_that_runs_twice_become_columns_or_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return self.conv(self.conv(x))

    with pytest.raises(Unsupported, match=r"layer 'conv' ran 2 times in one forward pass\. Pass calls='cat'"):
        Extractor(Twice)({"audio": audio()})
    out = Extractor(Twice, calls="keys", keep=[])({"audio": audio()})
    assert {name: column.shape for name, column in out.items()} == {"conv#0": (5, 1, 38), "conv#1": (5, 1, 36)}
    cat = Extractor(Twice, calls="cat", keep=[])({"audio": audio()})
    assert np.array_equal(cat["conv"], np.concatenate([out["conv#0"], out["conv#1"]], -1))


def test_each_module_keeps_the_mode_that_the_factory_gave_it_and_no_hook_stays():
    model = net().train()
    Extractor(lambda: model)({"audio": audio()})
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- what cannot be


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": net()}, InvalidType, r"^model is a Sequential, but each actor has to make its own model"),
        ({"model": lambda: 3}, InvalidType, r"^model\(\) returned a int. Return a torch\.nn\.Module"),
        ({"layers": "9"}, LayerNotFound, "no layer is named '9'"),
        ({"calls": "all"}, InvalidValue, r"^calls='all' is invalid. Pass one of 'error', 'cat', 'keys'"),
        ({"at": "activation"}, InvalidValue, r"^at='activation' is invalid. Pass 'output' or 'input'"),
        ({"inputs": 3}, InvalidType, r"^inputs is a int. Pass the name of a column, or a function of a batch"),
        ({"lengths": [1]}, InvalidType, r"^lengths is a list. Pass the name of a column"),
        ({"keep": "id"}, InvalidType, r"^keep='id' is not a list of column names. Write for example keep=\['id'\]"),
        ({"reduce": 3}, InvalidType, "reduce is a int"),
        ({"dtype": "half"}, InvalidType, "dtype='half' is not a torch.dtype"),
        ({"device": "nowhere"}, InvalidValue, r"^the model cannot be moved to device='nowhere': .*num_gpus=1"),
    ],
)
def test_a_constructor_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        Extractor(**{"model": net, **options})


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        ([1, 2], {}, InvalidType, r"^a batch is a list, but it must be a dict of arrays\. Write map_batches"),
        ({"audio": [[1.0]]}, {}, InvalidType, r"must be a dict of arrays"),
        (
            {"a": np.zeros(2), "b": np.zeros(3)},
            {},
            InvalidValue,
            r"have different numbers of rows: \{'a': 2, 'b': 3\}\. Pass columns",
        ),
        (
            {"id": np.zeros(2), "audio": audio(2)},
            {},
            InvalidValue,
            r"columns id, audio, and inputs= does not name one.*inputs='id'",
        ),
        (
            {"audio": audio()},
            {"inputs": "audi"},
            InvalidValue,
            r"'audi', which the batch does not have\. It has audio\. Did you mean 'audio'\?",
        ),
        (
            {"audio": audio()},
            {"keep": ["name"]},
            InvalidValue,
            r"^keep= names the column 'name', which the batch does not have. It has audio",
        ),
        ({"audio": audio()}, {"lengths": "length"}, InvalidValue, r"^lengths= names the column 'length'"),
        (
            {"name": np.array(["a", "b"])},
            {},
            InvalidType,
            r"column 'name' holds <U1 values, which are not numbers",
        ),
        (
            {"audio": ragged([3, 5])},
            {},
            InvalidValue,
            r"'audio' have different shapes \(\(3,\), \(5,\)\).*pad_sequence",
        ),
        ({"0": audio()}, {}, InvalidValue, r"a layer and a column of the batch are both named 0\. Rename the column"),
    ],
)
def test_a_batch_that_cannot_be_run_says_why(batch, options, error, message):
    with pytest.raises(error, match=message):
        Extractor(net, **options)(batch)


class Branches(nn.Module):
    """Which layer runs depends on the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 3)

    def forward(self, x):
        return self.a(x) if x.mean() > 0 else self.b(x)


def test_a_layer_asked_for_by_name_that_does_not_run_is_no_column_of_nothing():
    with pytest.raises(NotCaptured, match=r"^b did not run, but a column needs a value in each row"):
        Extractor(Branches, ["a", "b"])({"audio": np.ones((2, 1, 9), np.float32)})


def test_layers_that_run_in_some_batches_only_are_refused():
    extractor = Extractor(Branches, "?")
    ones = np.ones((2, 1, 9), np.float32)
    assert list(extractor({"audio": ones})) == ["audio", "a"]
    with pytest.raises(
        Unsupported, match=r"^this batch has outputs of b, but earlier batches had outputs of a. A column needs a value"
    ):
        extractor({"audio": -ones})


def test_complex_numbers_are_refused_with_a_remedy():
    with pytest.raises(Unsupported, match=r"'0' returns complex numbers.*reduce=torch\.view_as_real"):
        Extractor(net, "0", reduce=torch.fft.fft)({"audio": audio()})


def test_the_class_needs_no_ray():
    done = run_python("import sys, convtap.ray; print([name for name in sys.modules if name.split('.')[0] == 'ray'])")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# -- a pool of actors


#: Ray warns of the names of its own options when it makes their defaults.
quiet = pytest.mark.filterwarnings(
    r"ignore:`use_\w+` is deprecated:DeprecationWarning:ray\.data\.context",
    r"ignore:.*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:FutureWarning:ray\._private\.worker",
)


@pytest.fixture(scope="module")
def ray():
    """A Ray of three CPUs on this machine, and its data package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (SRC, SRC.parent))))  # for the actors
        import ray
        import ray.data

        memory = 80 * 2**20
        ray.init(
            address="local",  # another cluster may run on this machine
            num_cpus=3,
            object_store_memory=memory,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


@quiet
def test_two_actors_of_which_one_is_killed_give_each_row_once_as_by_hand(ray, tmp_path):
    (tmp_path / "made").mkdir()

    def make_model():
        (tmp_path / "made" / str(os.getpid())).touch()
        model = net()

        def killed_once(*_):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(tmp_path / "killed", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)

        model[1].register_forward_hook(killed_once)
        return model

    arrays = audio(24)
    data = ray.data.from_items([{"id": i, "audio": row} for i, row in enumerate(arrays)], override_num_blocks=8)
    rows = data.map_batches(
        Extractor,
        fn_constructor_args=(make_model,),
        fn_constructor_kwargs={"inputs": "audio", "keep": ["id"]},
        batch_size=3,
        compute=ray.data.ActorPoolStrategy(size=2),
    ).take_all()
    assert (tmp_path / "killed").exists()
    assert len(list((tmp_path / "made").iterdir())) >= 3  # two actors, and one in the place of the killed
    assert sorted(row["id"] for row in rows) == list(range(24))
    expected = by_hand(arrays)
    for row in rows:
        for name in ("0", "2"):
            np.testing.assert_allclose(row[name], expected[name][row["id"]], rtol=1e-5, atol=1e-6)


@quiet
def test_the_example_writes_parquet_that_holds_the_mean_of_each_sounds_real_frames(ray, tmp_path):
    spec = importlib.util.spec_from_file_location("ray_features", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.write_sounds(tmp_path / "sounds", count=12, files=3)
    rows = {row["name"]: row for row in example.features(tmp_path / "sounds", tmp_path / "features").take_all()}
    sounds = {row["name"]: row for row in ray.data.read_parquet(str(tmp_path / "sounds")).take_all()}
    assert sorted(rows) == [f"sound-{i:03d}" for i in range(12)]
    assert set(rows["sound-000"]) == {"name", "length", "convs.0", "convs.1", "convs.2"}
    model = example.make_model()
    for name, row in rows.items():
        alone = by_hand(np.asarray(sounds[name]["audio"], np.float32)[None], model)
        for layer in ("convs.0", "convs.1", "convs.2"):
            np.testing.assert_allclose(row[layer], alone[layer][0].mean(-1), rtol=1e-4, atol=1e-5)

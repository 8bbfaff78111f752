"""The commands that run a model, as a person types them: exit status, one line for a mistake, and what really ran."""

import json
import sys
import wave

import numpy as np
import pytest
import torch
from torch import nn

from convtap import load
from convtap._result.statistics import Statistics
from convtap.cli import main

NETS = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv1d(2, 3, 3, padding=1))


def other():
    model = build()
    model[2].bias.data += 1
    return model


class Log(nn.Module):
    def forward(self, x):
        return x.log()


def broken():
    return nn.Sequential(nn.Conv1d(1, 1, 1), Log())


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 1, 3)

    def forward(self, *, audio):
        return self.conv(audio)


def deep():
    return nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(150)))


ready = build()
number = 3


def returns_nothing():
    pass


def needs_arguments(width):
    pass


class Holder:
    build = staticmethod(build)


class Snake(nn.Module):
    def forward(self, x):
        return x + x.sin() ** 2


def snakes():
    return nn.Sequential(nn.Conv1d(1, 2, 3), Snake(), nn.Conv1d(2, 2, 3), nn.ReLU())


def fails():
    return torch.zeros(2).reshape(3)


def pipes():
    raise BrokenPipeError(32, "Broken pipe")


def leaves():
    raise SystemExit(1)


def cancels():
    import asyncio

    raise asyncio.CancelledError("elsewhere")


class Stops(nn.Module):
    def forward(self, x):
        raise GeneratorExit


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        return self.conv(x) + {}["lost"]


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 4, stride=2)

    def forward(self, x):
        return self.conv(x - x.mean())
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of models, as the current one."""
    (tmp_path / "mynets.py").write_text(NETS)
    (tmp_path / "failing.py").write_text("import torch\nraise RuntimeError('first line\\nsecond line')\n")
    (tmp_path / "needs.py").write_text("import a_package_that_is_not_here\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mynets", "failing", "needs", "net", "parts", "inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def mistake(capsys, *argv):
    """Runs a command that is a mistake, and returns the one line it must give."""
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err.strip()


# -- layers


def test_layers_prints_the_selection(here, capsys):
    assert main(["layers", "mynets:build"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [
        ["0", "Conv1d", "8"],
        ["2", "Conv1d", "21"],
    ]  # 2·1·3 + 2, 3·2·3 + 3


def test_a_table_of_many_layers_is_short_without_all(here, capsys):
    assert main(["layers", "mynets:deep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "… 50 more rows …" in lines
    assert lines[-1] == "100 of 150 rows shown: --all shows all"
    assert main(["layers", "mynets:deep", "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 152
    assert main(["run", "mynets:deep", "--shape", "1,1,4", "--out", str(here / "out")]) == 0
    assert "100 of 150 rows shown: --all shows all" in capsys.readouterr().out
    assert main(["run", "mynets:deep", "--shape", "1,1,4", "--out", str(here / "out"), "--all"]) == 0
    assert "more rows" not in capsys.readouterr().out


def test_layers_with_an_example_shows_shapes(here, capsys):
    assert main(["layers", "mynets:build", "--layers", "2", "--example", "4,1,10"]) == 0
    out = capsys.readouterr().out
    assert "(4, 3, 10)" in out
    assert "480 B" in out  # 4 · 3 · 10 floats
    assert "(4, 2, 10)" not in out


@pytest.mark.parametrize(
    "spec",
    [
        "mynets:ready",
        "mynets:Holder.build",
        "mynets.py:build",
        "./mynets.py:build",
        "mynets:Named",
        "{here}/mynets.py:build",
    ],
)
def test_a_model_may_be_named_by_module_file_class_or_instance(here, capsys, spec):
    assert main(["layers", spec.format(here=here)]) == 0
    assert "Conv1d" in capsys.readouterr().out


def test_a_file_of_a_package_imports_its_neighbours(here, capsys):
    folder = here / "deep" / "parts" / "inner"
    folder.mkdir(parents=True)
    for part in (folder, folder.parent):
        (part / "__init__.py").touch()
    (folder / "net.py").write_text(
        "from ..widths import WIDTH\nfrom torch import nn\n\ndef build():\n    return nn.Conv1d(WIDTH, 1, 1)\n"
    )
    (folder.parent / "widths.py").write_text("WIDTH = 6\n")
    before = list(sys.path)
    assert main(["layers", "deep/parts/inner/net.py:build"]) == 0
    assert "7" in capsys.readouterr().out.split()  # 6 weights and a bias
    assert sys.path == before


def test_a_file_beside_it_may_be_imported_while_the_model_runs(here, capsys):
    (here / "deep").mkdir()
    (here / "deep" / "net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Conv1d):\n    def forward(self, x):\n        import inner\n"
        "        return super().forward(x) * inner.SCALE\n\ndef build():\n    return Net(1, 1, 1)\n"
    )
    (here / "deep" / "inner.py").write_text("SCALE = 2\n")
    assert main(["run", "deep/net.py:build", "--shape", "1,1,8", "--out", "out"]) == 0


def test_a_file_with_the_name_of_a_module_of_python_is_the_file(here, capsys):
    (here / "types.py").write_text("from torch import nn\n\ndef build():\n    return nn.Conv1d(1, 4, 2)\n")
    types = sys.modules["types"]
    assert main(["layers", "./types.py:build"]) == 0
    assert "12" in capsys.readouterr().out.split()
    assert sys.modules["types"] is types


def test_types_are_those_of_torch_or_of_the_model(here, capsys):
    assert main(["layers", "mynets:snakes", "--types", "Conv1d,nn.ReLU", "--types", "Snake"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["Conv1d", "Snake", "Conv1d", "ReLU"]
    assert main(["run", "mynets:snakes", "--types", "Snake", "--shape", "1,1,9", "--out", "out"]) == 0
    assert list(load("out/activations.safetensors")) == ["1"]


# -- run


def test_run_saves_what_the_layers_gave(here, capsys):
    x = torch.randn(2, 1, 12)
    np.save("x.npy", x.double().numpy())  # float64, as NumPy makes it: the model gets its own type
    assert main(["run", "mynets:build", "--input", "x.npy", "--out", "out"]) == 0
    acts = load("out/activations.safetensors")
    torch.manual_seed(0)
    first = nn.Conv1d(1, 2, 3, padding=1)
    assert list(acts) == ["0", "2"]
    torch.testing.assert_close(acts["0"], first(x).detach())
    out = capsys.readouterr().out
    assert "(2, 3, 12)" in out
    assert "wrote out/activations.safetensors" in out


def test_run_takes_a_shape_and_the_same_numbers_every_time(here, capsys):
    for folder in ("one", "two"):
        assert main(["run", "mynets:build", "--shape", "1,1,16", "--layers", "2", "--out", folder]) == 0
    one, two = (load(f"{folder}/activations.safetensors") for folder in ("one", "two"))
    assert list(one) == ["2"]
    assert torch.equal(one["2"], two["2"])


def test_run_takes_named_inputs_of_a_pt_file(here, capsys):
    torch.save({"audio": torch.ones(1, 2, 9)}, "x.pt")
    assert main(["run", "mynets:Named", "--input", "x.pt", "--out", "out"]) == 0
    assert load("out/activations.safetensors")["conv"].shape == (1, 1, 7)


def sound(path, values, rate=8000):
    """Writes a mono WAV file of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((np.asarray(values) * 32768).astype("<i2").tobytes())


def about(folder):
    """What the run says of itself, and its signals."""
    from safetensors import safe_open

    with safe_open(f"{folder}/inputs.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["convtap_run"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_run_gives_a_sound_file_to_the_model_and_keeps_its_rate(here, capsys):
    values = np.array([0, 0.5, -0.5, 0.25] * 5)
    sound("x.wav", values)
    assert main(["run", "mynets:build", "--input", "x.wav", "--out", "out"]) == 0
    x = torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)
    torch.manual_seed(0)
    torch.testing.assert_close(load("out/activations.safetensors")["0"], nn.Conv1d(1, 2, 3, padding=1)(x).detach())
    run, signals = about("out")
    assert torch.equal(signals["0"], x)
    assert (run["model"], run["inputs"][0]["name"], run["inputs"][0]["sample_rate"]) == ("mynets:build", "x.wav", 8000)
    assert main(["run", "mynets:build", "--input", "x.wav", "--shape", "2,1,-1", "--out", "out"]) == 0
    assert load("out/activations.safetensors")["2"].shape == (2, 3, 10)


def test_run_keeps_the_places_of_the_layers_in_time(here, capsys):
    np.save("x.npy", np.random.default_rng(0).standard_normal((1, 1, 40)).astype("float32"))
    assert main(["run", "mynets:Mean", "--input", "x.npy", "--sample-rate", "250", "--out", "out"]) == 0
    run, _ = about("out")
    assert run["inputs"][0]["sample_rate"] == 250
    layer = run["timeline"]["layers"]["conv"]
    assert (layer["stride"], layer["centre"]) == (2, 1.5)  # frame 0 sees samples 0 to 3
    assert run["timeline"]["input_length"] == 40


def test_several_inputs_are_one_forward_pass_each(here, capsys):
    (here / "day").mkdir()
    lengths = {"day/a.wav": 20, "day/b.wav": 30, "c.wav": 10}
    for name, length in lengths.items():
        sound(here / name, np.linspace(-0.5, 0.5, length))
    (here / "day" / "notes.txt").write_text("not an input")
    assert main(["run", "mynets:build", "--input", "day", "--input", "c.wav", "--layers", "0", "--out", "out"]) == 0
    acts = load("out/activations.safetensors")
    assert [call.shape[-1] for call in acts.calls("0")] == [20, 30, 10]
    _, signals = about("out")
    assert [signals[str(i)].shape[-1] for i in range(3)] == [20, 30, 10]
    assert main(["run", "mynets:build", "--input", "day/*.wav", "--every", "2", "--layers", "0", "--out", "out"]) == 0
    assert load("out/activations.safetensors")["0"].shape == (1, 2, 20)


def test_a_batch_size_splits_an_input_into_passes(here, capsys):
    np.save("x.npy", np.ones((5, 1, 8), np.float32))
    assert main(["run", "mynets:build", "--input", "x.npy", "--batch-size", "2", "--layers", "0", "--out", "out"]) == 0
    assert [call.shape[0] for call in load("out/activations.safetensors").calls("0")] == [2, 2, 1]


def test_inputs_of_several_rates_are_noted(here, capsys):
    sound("a.wav", np.zeros(20), 16000)
    sound("b.wav", np.zeros(20), 44100)
    assert main(["run", "mynets:build", "--input", "*.wav", "--out", "out"]) == 0
    assert "rates (1 input at 16000 Hz, 1 input at 44100 Hz). convtap does not resample" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["input", "activation"])
def test_run_takes_another_point_of_the_layers(here, capsys, at):
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 1, 8)
    np.save("x.npy", x)
    command = [
        "run",
        "mynets:build",
        "--input",
        "x.npy",
        "--layers",
        "0",
        "--device",
        "cpu",
        "--at",
        at,
        "--out",
        "out",
    ]
    assert main(command) == 0
    torch.manual_seed(0)
    after = nn.Conv1d(1, 2, 3, padding=1)(torch.tensor(x)).relu().detach()
    expected = torch.tensor(x) if at == "input" else after
    torch.testing.assert_close(load("out/activations.safetensors")["0"], expected)


def test_a_model_whose_time_axis_cannot_be_followed_runs_with_a_note(here, capsys):
    (here / "net.py").write_text(
        "from torch import nn\n\nRUNS = []\n\nclass Net(nn.Conv1d):\n    def forward(self, x):\n"
        "        RUNS.append(1)\n        if len(RUNS) > 1:\n            raise OSError('only once')\n"
        "        return super().forward(x)\n\ndef build():\n    return nn.Sequential(Net(1, 1, 1))\n"
    )
    assert main(["run", "net.py:build", "--shape", "1,1,8", "--out", "out"]) == 0
    assert "note: the pictures have no common time axis: OSError: only once (net.py:9)" in capsys.readouterr().err
    assert about("out")[0]["timeline"] is None


def test_the_time_axis_of_channels_last_inputs_is_named(here, capsys):
    (here / "net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Conv1d):\n    def forward(self, x):\n"
        "        return super().forward(x.transpose(1, 2))\n\ndef build():\n    return nn.Sequential(Net(3, 1, 1))\n"
    )
    np.save("x.npy", np.ones((2, 9, 3), np.float32))
    command = ["run", "net.py:build", "--input", "x.npy", "--out", "out"]
    assert main(command) == 0
    assert "Pass the axis that is time: --time-dim 1 for (B, T, C)." in capsys.readouterr().err
    assert main([*command, "--time-dim", "1"]) == 0
    assert about("out")[0]["timeline"]["time_dim"] == -2


def test_a_command_that_fails_leaves_no_folder(here, capsys):
    assert main(["run", "mynets:fails", "--shape", "1,1,8", "--out", "new/out"]) == 2
    assert not (here / "new").exists()


def test_a_picture_of_an_earlier_run_is_noted(here, capsys):
    command = ["run", "mynets:build", "--shape", "1,1,16", "--out", "out"]
    assert main([*command, "--plot", "--report"]) == 0
    assert capsys.readouterr().err == ""
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "activations.png is from an earlier run. Write it again: convtap plot out" in err
    assert "report.html is from an earlier run. Write it again: convtap report out" in err


def test_run_with_finite_names_the_layer_and_exits_with_1(here, capsys):
    np.save("x.npy", -np.ones((1, 1, 6), dtype=np.float32))
    (here / "mynets.py").write_text(
        NETS
        + "\n\ndef zero():\n    m = broken()\n    m[0].weight.data.fill_(1)\n    m[0].bias.data.zero_()\n    return m\n"
    )
    assert main(["run", "mynets:zero", "--input", "x.npy", "--out", "out", "--finite"]) == 1
    assert "'1' (Log) (call 0, forward pass 0) produces NaN from finite inputs" in capsys.readouterr().out
    assert (here / "out" / "activations.safetensors").exists()
    assert main(["run", "mynets:build", "--input", "x.npy", "--out", "out", "--finite"]) == 0
    assert "no NaN or Inf" in capsys.readouterr().out


def test_run_draws_and_reports(here, capsys):
    assert main(["run", "mynets:build", "--shape", "1,1,16", "--out", "out", "--plot", "--report"]) == 0
    assert (here / "out" / "activations.png").read_bytes()[:4] == b"\x89PNG"
    assert "<html" in (here / "out" / "report.html").read_text()


# -- stats


def test_stats_are_those_of_all_inputs_together(here, capsys):
    parts = [np.random.default_rng(i).standard_normal((2, 1, 12)).astype(np.float32) for i in range(3)]
    for i, part in enumerate(parts):
        np.save(f"x{i}.npy", part)
    assert main(["stats", "mynets:build", "--input", "x?.npy", "--out", "new/s.safetensors"]) == 0
    out = capsys.readouterr().out
    torch.manual_seed(0)
    output = nn.Conv1d(1, 2, 3, padding=1)(torch.tensor(np.concatenate(parts))).detach().double()
    stats = Statistics.load("new/s.safetensors")
    torch.testing.assert_close(stats["0"].mean.double(), output.mean((0, 2)))
    torch.testing.assert_close(stats["0"].max.double(), output.amax((0, 2)))
    assert out.splitlines()[2].split()[:2] == ["0", str(output.numel())]
    assert out.splitlines()[-1] == "wrote new/s.safetensors"
    assert main(["stats", "mynets:build", "--input", "x?.npy", "--every", "2", "--layers", "0", "--at", "input"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["0", "48"]  # two files of 2 · 12 values


def test_stats_into_a_folder_and_as_a_picture(here, capsys):
    (here / "folder").mkdir()
    assert main(["stats", "mynets:build", "--shape", "2,1,16", "--out", "folder", "--plot", "s.png"]) == 0
    assert len(Statistics.load("folder/statistics.safetensors")) == 2
    assert (here / "s.png").read_bytes()[:4] == b"\x89PNG"


# -- mistakes


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["layers", "mynets"], "'mynets' does not name a model. Write mynets:build, where build is a function"),
        (
            ["layers", "mynets.py"],
            "'mynets.py' does not name a model. Write mynets.py:build, where build is a function",
        ),
        (["layers", "C:\\nets\\mynets.py"], "does not name a model. Write C:\\nets\\mynets.py:build"),
        (["layers", "model.pt"], "'model.pt' is a file of weights, not the code of a model"),
        (["layers", "mynets:build()"], "Write it without parentheses: mynets:build"),
        (
            ["layers", "mynet:build"],
            "the module 'mynet' is neither in the current folder nor among the installed packages. Did you",
        ),
        (["layers", "far.net:build"], "For a file in another folder write its path: folder/mynet.py:build."),
        (["layers", "mynet.py:build"], "the Python file 'mynet.py' does not exist. Did you mean 'mynets.py'?"),
        (["layers", "./mynets:build"], "the Python file './mynets' does not exist. Did you mean 'mynets.py'?"),
        (["layers", "mynets:biuld"], "'mynets' does not define 'biuld'. Did you mean 'build'?"),
        (
            ["layers", "mynets:xyz"],
            "'mynets' does not define 'xyz'. It defines build, other, Log, broken, Named, deep, ready",
        ),
        (["layers", "mynets:returns_nothing"], "returned a NoneType, not a torch.nn.Module"),
        (["layers", "mynets:number"], "is of type int. Write the name of a function"),
        (
            ["layers", "mynets:needs_arguments"],
            "requires the arguments width. Write a function without arguments in the same file",
        ),
        (
            ["layers", "mynets:fails"],
            "'mynets:fails' failed: RuntimeError: shape '[3]' is invalid for input of size 2 (mynets.py:",
        ),
        (
            ["layers", "mynets:pipes"],
            "'mynets:pipes' failed: it printed to a pipe that the reader has closed (mynets.py:",
        ),
        (["layers", "mynets:cancels"], "'mynets:cancels' failed: CancelledError: elsewhere (mynets.py:"),
        (["run", "mynets:Stops", "--shape", "1,1,40", "--out", "out"], "GeneratorExit (mynets.py:"),
        (["layers", "mynets:leaves"], "'mynets:leaves' failed: it called sys.exit(1) (mynets.py:"),
        (
            ["layers", "failing:build"],
            "importing 'failing' failed: RuntimeError: first line second line (failing.py:2).",
        ),
        (
            ["layers", "failing.py:build"],
            "importing 'failing.py' failed: RuntimeError: first line second line (failing.py:2).",
        ),
        (["layers", "wrong.py:build"], "importing 'wrong.py' failed: SyntaxError: '(' was never closed (wrong.py:1)."),
        (
            ["layers", "needs:build"],
            "failed: ModuleNotFoundError: No module named 'a_package_that_is_not_here' (needs.py:1).",
        ),
        (
            ["layers", "mynets:build", "--layers", "3"],
            "no layer is named '3'. The model has these Conv1d layers: 0, 2. convtap layers MODEL",
        ),
        (
            ["layers", "mynets:build", "--types", "Relu"],
            "--types Relu is not a type of torch.nn or of the model, which has 2 Conv1d",
        ),
        (
            ["layers", "mynets:build", "--types", "Linear"],
            "the Sequential has no Linear, but it has 2 Conv1d. Pass --types Conv1d.",
        ),
        (["layers", "mynets:build", "--device", "gpu"], "--device gpu is not a device that computes. Write cpu, cuda"),
        (["layers", "mynets:build", "--device", "meta"], "--device meta is not a device that computes"),
        (["layers", "mynets:build", "--example", "1,x"], "'1,x' is not a shape"),
        (["layers", "mynets:build", "--example", "no.npy"], "the file 'no.npy' does not exist"),
        (
            ["layers", "mynets:build", "--example", "1,5,8"],
            "the model fails on '1,5,8', of shape 1,5,8 (float32): RuntimeError: Given groups=1",
        ),
        (["run", "mynets:build", "--out", "out"], "the input is missing. Pass --input"),
        (["run", "mynets:Raises", "--shape", "1,1,4", "--out", "out"], "KeyError: 'lost' (mynets.py:"),
        (["run", "mynets:Named", "--shape", "1,2,4", "--out", "out"], "Save all arguments by name: torch.save("),
        (["run", "mynets:build", "--shape", "1,1,16"], "the following arguments are required: --out"),
        (["run", "mynets:build", "--shape", "0,1,16", "--out", "out"], "has an axis of size less than 1"),
        (["run", "mynets:build", "--input", "no.npy", "--out", "out"], "the file 'no.npy' does not exist"),
        (["run", "mynets:build", "--input", "gone*.npy", "--out", "out"], "no file matches 'gone*.npy'"),
        (
            ["run", "mynets:build", "--input", "empty", "--out", "out"],
            "the folder 'empty' holds no inputs. An input is a .npy",
        ),
        (
            ["run", "mynets:build", "--input", "mynets.py", "--out", "out"],
            "is not an input file. An input is a .npy file, a",
        ),
        (
            ["run", "mynets:build", "--input", "a.npy", "b.npy", "ok.npy", "--out", "out"],
            "For several inputs pass a folder",
        ),
        (["run", "mynets:build", "--input", "bad.npy", "--out", "out"], "'bad.npy' cannot be read"),
        (["run", "mynets:build", "--input", "none.npy", "--out", "out"], "'none.npy' is empty: its shape is (0, 1, 8)"),
        (
            ["run", "mynets:build", "--input", "bad.pt", "--out", "out"],
            "'bad.pt' cannot be read: it is not a file of torch.save",
        ),
        (
            ["run", "mynets:build", "--input", "code.pt", "--out", "out"],
            "(loading them could run code)",
        ),
        (
            ["run", "mynets:build", "--input", "ok.npy", "--shape", "7,-1", "--out", "out"],
            "'ok.npy' of shape (1, 1, 8) cannot be reshaped to 7,-1",
        ),
        (["run", "mynets:build", "--input", "ints.npy", "--out", "out"], "save them as such: array.astype('float32')."),
        (["run", "mynets:Named", "--input", "x.wav", "--out", "out"], "the file 'x.wav' does not exist"),
        (
            ["run", "mynets:build", "--input", "s.wav", "--sample-rate", "16000", "--out", "out"],
            "'s.wav' has 8000 samples per second, which differs from --sample-rate 16000.",
        ),
        (
            ["run", "mynets:build", "--input", "ok.npy", "--sample-rate", "0", "--out", "out"],
            "--sample-rate 0 is not a positive number",
        ),
        (
            ["run", "mynets:build", "--input", "ok.npy", "--every", "0", "--out", "out"],
            "--every 0 selects no forward pass",
        ),
        (
            ["run", "mynets:build", "--input", "ok.npy", "--batch-size", "0", "--out", "out"],
            "--batch-size 0 is less than 1",
        ),
        (["run", "mynets:build", "--input", "dict.pt", "--batch-size", "2", "--out", "out"], "Remove --batch-size."),
        (
            ["run", "mynets:build", "--input", "stereo.wav", "--out", "out"],
            "write --shape 2,-1. For a model of one channel, write --shape 2,1,-1.",
        ),
        (
            ["run", "mynets:build", "--input", "ok.npy", "--out", "mynets.py"],
            "'mynets.py' is a file, not a folder.",
        ),
        (
            ["run", "mynets:build", "--input", "ok.npy", "--out", "mynets.py/x"],
            "'mynets.py' is a file, not a folder",
        ),
        (["run", "mynets:build", "--input", "text.pt", "--out", "out"], "holds a str"),
        (["run", "mynets:build", "--shape", "1,1,8", "--at", "start", "--out", "out"], "invalid choice: 'start'"),
        (["stats", "mynets:build"], "the input is missing. Pass --input"),
        (
            ["stats", "mynets:build", "--shape", "1,1,8", "--out", "mynets.py/x"],
            "'mynets.py' is a file, not a folder",
        ),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (
            ["layers", "mynets:build", "--nonsense"],
            "unknown arguments: --nonsense. Run convtap --help for the commands.",
        ),
        ([], "required"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(here, capsys, argv, says):
    (here / "bad.npy").write_bytes(b"not numbers")
    (here / "bad.pt").write_bytes(b"not a file of torch.save")
    np.save("ok.npy", np.zeros((1, 1, 8), dtype=np.float32))
    torch.save(nn.Conv1d(1, 1, 1), "code.pt")
    torch.save("text", "text.pt")
    torch.save({"x": torch.zeros(2, 1, 8)}, "dict.pt")
    np.save("none.npy", np.zeros((0, 1, 8), dtype=np.float32))
    np.save("ints.npy", np.zeros((1, 1, 8), dtype=np.int16))
    sound("s.wav", np.zeros(8))
    with wave.open("stereo.wav", "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(400))
    (here / "wrong.py").write_text("build = (\n")
    (here / "empty").mkdir()
    assert says in mistake(capsys, *argv)


def test_an_object_array_is_not_unpickled(here, capsys):
    np.save("x.npy", np.array([{}], dtype=object))
    assert "'x.npy' cannot be read" in mistake(capsys, "run", "mynets:build", "--input", "x.npy", "--out", "out")


def test_the_examples_of_the_help_work(here, capsys):
    (here / "mynet.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n\n"
        "def build():\n"
        "    return nn.Sequential(OrderedDict(encoder=nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3))))\n"
    )
    with wave.open("speech.wav", "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    assert main(["layers", "mynet:build", "--example", "1,1,16000"]) == 0
    command = ["run", "mynet:build", "--input", "speech.wav", "--layers", "encoder.*"]
    for folder in ("before", "after"):
        assert main([*command, "--out", folder]) == 0
    files = [f"{folder}/activations.safetensors" for folder in ("before", "after")]
    assert main(["compare", *files, "--sqnr", "40"]) == 0
    (here / "recordings").mkdir()
    (here / "speech.wav").rename(here / "recordings" / "speech.wav")
    assert main(["stats", "mynet:build", "--input", "recordings/", "--out", "stats.safetensors"]) == 0
    assert main(["plot", "before", "--sample", "0", "--out", "maps.png"]) == 0
    assert main(["report", "before", "--model", "mynet:build", "--out", "report.html"]) == 0
    assert main(["info", "before"]) == 0

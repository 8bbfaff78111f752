"""The command line, as a person types it: exit status, one line for a mistake, and files that say what really ran."""

import importlib.util
import os
import struct
import subprocess
import sys
import types
import wave

import numpy as np
import pytest
import torch
from torch import nn

from convtap import load
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
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of models, as the current one."""
    (tmp_path / "mynets.py").write_text(NETS)
    (tmp_path / "failing.py").write_text("import torch\nraise RuntimeError('first line\\nsecond line')\n")
    (tmp_path / "needs.py").write_text("import a_package_that_is_not_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mynets", raising=False)
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


@pytest.mark.parametrize("spec", ["mynets:ready", "mynets:Holder.build"])
def test_a_model_or_a_dotted_factory_may_be_given(here, capsys, spec):
    assert main(["layers", spec]) == 0


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


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_run_reads_wav_files(here, capsys, width):
    values = [0, 0.5, -0.5, 0.25]
    scale = 2 ** (8 * width - 1)
    with wave.open("x.wav", "wb") as file:
        file.setparams((2, width, 8000, 0, "NONE", ""))
        for value in values:
            for channel in (value, -value):
                number = round(channel * scale) + (128 if width == 1 else 0)
                file.writeframes(number.to_bytes(width, "little", signed=width > 1))
    torch.save({"audio": torch.tensor([[values, [-value for value in values]]])}, "x.pt")
    from convtap._cli.model_and_input import read_input

    assert torch.equal(read_input("x.wav"), torch.tensor([[values, [-value for value in values]]]))
    assert read_input("x.wav", "2,1,-1").shape == (2, 1, 4)


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


# -- compare


def test_compare_exits_with_1_on_divergence_only(here, capsys):
    for name in ("build", "other"):
        assert main(["run", f"mynets:{name}", "--shape", "1,1,16", "--out", name]) == 0
    capsys.readouterr()
    assert main(["compare", "build", "build/activations.safetensors"]) == 0
    assert main(["compare", "build", "other"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "first over" in line] == ["2"]
    assert main(["compare", "build", "other", "--atol", "1.01"]) == 0  # the bias of "2" is 1 more
    assert main(["compare", "build", "other", "--atol", "0.99"]) == 1
    assert main(["compare", "build", "other", "--sqnr", "-100"]) == 0
    assert main(["run", "mynets:build", "--shape", "1,1,16", "--layers", "0", "--out", "less"]) == 0
    assert main(["compare", "build", "less"]) == 1  # a layer without a partner is no agreement


# -- mistakes


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["layers", "mynets"], "'mynets' is no factory. Write pkg.module:factory"),
        (["layers", "mynet:build"], "there is no module 'mynet'"),
        (["layers", "mynets:biuld"], "'mynets' has no 'biuld'. Did you mean 'build'?"),
        (["layers", "mynets:returns_nothing"], "returned a NoneType, no torch.nn.Module"),
        (["layers", "mynets:number"], "is a int, no function and no model"),
        (["layers", "mynets:needs_arguments"], "failed: TypeError: needs_arguments() missing 1 required"),
        (["layers", "failing:build"], "importing 'failing' failed: RuntimeError: first line"),
        (["layers", "needs:build"], "importing 'needs' failed: No module named 'a_package_that_is_not_here'"),
        (["layers", "mynets:build", "--layers", "3"], "no layer is named '3'"),
        (["layers", "mynets:build", "--example", "1,x"], "'1,x' is no shape"),
        (
            ["layers", "mynets:build", "--example", "1,5,8"],
            "the model fails on this input: RuntimeError: Given groups=1",
        ),
        (["run", "mynets:build", "--out", "out"], "there is no input. Give --input"),
        (["run", "mynets:build", "--shape", "1,1,16"], "the following arguments are required: --out"),
        (["run", "mynets:build", "--shape", "0,1,16", "--out", "out"], "has an axis of less than 1"),
        (["run", "mynets:build", "--input", "no.npy", "--out", "out"], "there is no file 'no.npy'"),
        (["run", "mynets:build", "--input", "mynets.py", "--out", "out"], "an input is a .npy, .wav or .pt file"),
        (["run", "mynets:build", "--input", "bad.npy", "--out", "out"], "'bad.npy' cannot be read"),
        (
            ["run", "mynets:build", "--input", "bad.pt", "--out", "out"],
            "'bad.pt' cannot be read: it is no file of torch.save",
        ),
        (
            ["run", "mynets:build", "--input", "code.pt", "--out", "out"],
            "nothing else is loaded, since that could run code",
        ),
        (
            ["run", "mynets:build", "--input", "ok.npy", "--shape", "7,-1", "--out", "out"],
            "holds (1, 1, 8), which is not 7,-1",
        ),
        (["run", "mynets:build", "--input", "ok.npy", "--out", "mynets.py"], "cannot make the folder 'mynets.py'"),
        (["run", "mynets:build", "--input", "text.pt", "--out", "out"], "holds a str"),
        (["compare", "no.safetensors", "no.safetensors"], "there is no file 'no.safetensors'"),
        (["compare", "mynets.py", "mynets.py"], "'mynets.py' cannot be read"),
        (["compare", "x"], "the following arguments are required: B"),
        (["compare", "a", "b", "--atol", "much"], "argument --atol: invalid float value: 'much'"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "required"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(here, capsys, argv, says):
    (here / "bad.npy").write_bytes(b"not numbers")
    (here / "bad.pt").write_bytes(b"not a file of torch.save")
    np.save("ok.npy", np.zeros((1, 1, 8), dtype=np.float32))
    torch.save(nn.Conv1d(1, 1, 1), "code.pt")
    torch.save("text", "text.pt")
    assert says in mistake(capsys, *argv)


def test_an_object_array_is_not_unpickled(here, capsys):
    np.save("x.npy", np.array([{}], dtype=object))
    assert "'x.npy' cannot be read" in mistake(capsys, "run", "mynets:build", "--input", "x.npy", "--out", "out")


@pytest.mark.skipif(importlib.util.find_spec("soundfile") is not None, reason="here soundfile would read it")
def test_a_wav_file_of_floats_names_the_package_that_reads_it(here, capsys):
    samples = struct.pack("<4f", 0, 0.5, -0.5, 0)
    form = struct.pack("<HHIIHH", 3, 1, 8000, 32000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples)) + samples
    (here / "x.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert "pip install soundfile" in mistake(capsys, "run", "mynets:build", "--input", "x.wav", "--out", "out")


@pytest.mark.parametrize("command", ["layers", "run", "compare", "info", "verify", "demo"])
def test_help_shows_a_working_example(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: convtap {command} " in capsys.readouterr().out


def test_a_reader_that_has_enough_is_no_error(here):
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from convtap.cli import main; sys.exit(main(['layers', 'mynets:build']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


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


@pytest.mark.skipif(
    importlib.util.find_spec("convtap._dataset.store") is None,
    reason="the store is built beside this; on from the merge",
)
@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_folder_that_is_no_store_is_a_mistake(here, capsys, command):
    assert mistake(capsys, command, "nowhere").startswith("convtap: ")


@pytest.mark.parametrize(("bad", "status"), [([], 0), ([("shard-000001", "damaged")], 1)])
def test_verify_exits_with_1_where_a_shard_is_bad(capsys, monkeypatch, bad, status):
    class Store:
        def __init__(self, path):
            assert path == "outputs"

        def verify(self):
            return bad

        def __repr__(self):
            return "what it holds"

    monkeypatch.setitem(sys.modules, "convtap._dataset.store", types.SimpleNamespace(Store=Store))
    assert main(["verify", "outputs"]) == status
    assert ("shard-000001" in capsys.readouterr().out) is bool(bad)
    assert main(["info", "outputs"]) == 0
    assert capsys.readouterr().out == "what it holds\n"


def test_the_package_runs_as_a_module():
    from tests.process import run_python

    done = run_python(
        "import runpy, sys; sys.argv = ['convtap', '--help']; runpy.run_module('convtap', run_name='__main__')"
    )
    assert "demo" in done.stdout

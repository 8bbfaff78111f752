"""What a person sees, and what goes to NumPy and to disk."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from convtap import StoreError, capture, load
from tests.models import AfterConv, BranchOnData, FiveConvs, ReusedConv, StructuredOutputs
from tests.reference import same

X = torch.randn(2, 1, 30)


def test_printing_shows_one_line_a_call():
    model = ReusedConv()
    with capture(model) as acts:
        model(torch.randn(2, 4, 20))
    lines = str(acts).splitlines()
    assert lines[0].split() == ["layer", "shape", "dtype", "device", "bytes"]
    assert [line.split()[0] for line in lines[2:6]] == ["conv#0", "conv#1", "conv#2", "last"]
    assert re.split(r"  +", lines[2]) == ["conv#0", "(2, 4, 20)", "float32", "cpu", "640 B"]
    assert lines[6] == "4 calls, 2.2 KiB"
    assert repr(acts) == str(acts)


def test_printing_says_what_was_not_captured():
    model = BranchOnData()
    with capture(model) as acts:
        assert str(acts).splitlines()[0] == "no outputs captured"
        model(torch.ones(1, 1, 9))
    assert "not captured: low (acts.coverage says why)" in str(acts)
    assert str(acts.coverage).splitlines()[0] == "2 layers: 1 captured, 1 idle"
    assert [line.split(maxsplit=1) for line in str(acts.coverage).splitlines()[3:]] == [
        ["low", "idle"],
        ["high", "captured 1 time"],
    ]
    assert acts.coverage["low"].state == "idle"
    assert list(acts.coverage) == ["low", "high"]


def test_statistics_match_numpy():
    model = AfterConv(lambda y: y)
    with capture(model) as acts:
        model(torch.randn(3, 2, 40))
    output = acts["conv"]
    output[0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    output[1, 2] = 0
    values = output.double().numpy().ravel()
    finite = values[np.isfinite(values)]
    row = acts.summary(stats=True).rows[0]
    assert acts.summary(stats=True).columns[5:] == ("min", "mean", "max", "std", "zeros", "nan", "inf")
    np.testing.assert_allclose(row[5:9], [finite.min(), finite.mean(), finite.max(), finite.std()], rtol=1e-12)
    assert row[9] == f"{100 * (values == 0).mean():.1f}%"
    assert row[10:] == (1, 2)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")  # torch's own, from model.to()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_statistics_of_other_types(dtype):
    model, x = AfterConv(lambda y: y).to(dtype), torch.randn(1, 2, 40, dtype=dtype)
    with capture(model) as acts:
        y = model(x).detach()
    wide = y.to(torch.complex128).abs() if dtype.is_complex else y.double()
    row = acts.summary(stats=True).rows[0]
    np.testing.assert_allclose(row[5:8], [wide.min(), wide.mean(), wide.max()], rtol=1e-6)


def test_statistics_of_an_empty_and_of_an_all_nan_output():
    model = AfterConv(lambda y: y)
    with capture(model) as acts:
        model(torch.empty(0, 2, 9))
        model(torch.full((1, 2, 9), float("nan")))
    rows = acts.summary(stats=True).rows
    assert rows[0][5:] == (None, None, None, None, None, 0, 0)
    assert rows[1][5:] == (None, None, None, None, "0.0%", 36, 0)


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.cells.append(data)


def test_html_shows_the_same_cells_and_escapes_names():
    model = nn.Module()
    model.add_module("<script>alert(1)</script>", nn.Conv1d(1, 1, 1))
    with capture(model) as acts:
        model._modules["<script>alert(1)</script>"](X)
    page = _Cells()
    page.feed(acts._repr_html_())
    assert "<script>alert(1)</script>" in page.cells
    assert "(2, 1, 30)" in page.cells
    assert "script" not in page.tags


def test_numpy_is_exact_and_keeps_structures():
    model, x = AfterConv(lambda y: y).to(torch.bfloat16), torch.randn(1, 2, 40, dtype=torch.bfloat16)
    with capture(model) as acts:
        y = model(x)
    array = acts.numpy()["conv"]
    assert array.dtype == np.float32
    assert torch.equal(torch.from_numpy(array).to(torch.bfloat16), y)
    structured = StructuredOutputs()
    with capture(structured, detach=False) as acts:
        structured(torch.randn(2, 1, 12))
    arrays = acts.numpy()
    assert isinstance(arrays["t"][1][0], np.ndarray)
    assert arrays["t"][1][1] is None
    np.testing.assert_array_equal(arrays["d"]["y"], acts["d"]["y"].detach().numpy())


# -- on disk


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")  # torch's own, from model.to()
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_what_was_saved_comes_back_bit_for_bit(dtype, tmp_path):
    model, x = ReusedConv().to(dtype), torch.randn(2, 4, 20, dtype=dtype)
    if dtype.is_complex:
        model.forward = lambda x: model.last(model.conv(model.conv(x)))
    with capture(model) as acts:
        model(x)
        model(x[:1])
    acts.save(tmp_path / "a.safetensors")
    back = load(tmp_path / "a.safetensors")
    assert same(dict(back), dict(acts))
    assert list(back) == list(acts)
    told = [(c.name, c.key, c.index, c.forward, c.via) for c in acts.calls()]
    assert [(c.name, c.key, c.index, c.forward, c.via) for c in back.calls()] == told
    assert same(back.sample(2), acts.sample(2))
    assert str(back) == str(acts)
    assert str(back.coverage) == str(acts.coverage)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_structures_overlapping_memory_and_strides_come_back(tmp_path):
    model = StructuredOutputs()
    with capture(model, reduce=None) as acts:
        model(torch.randn(2, 1, 12))
    acts.save(tmp_path / "a")
    back = load(tmp_path / "a")
    assert same(back["t"], acts["t"])
    assert same(back["p"]["hidden"], acts["p"].hidden)
    assert back["p"]["mask"] is None
    twice = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Identity())
    with capture(twice, types=(nn.Conv1d, nn.Identity)) as acts:
        twice(X)
    acts.save(tmp_path / "b")
    assert same(dict(load(tmp_path / "b")), dict(acts))


def test_shared_names_resolve_after_loading(tmp_path):
    from tests.models import SharedConv

    model = SharedConv()
    with capture(model) as acts:
        model(torch.randn(1, 3, 9))
    acts.save(tmp_path / "a")
    assert torch.equal(load(tmp_path / "a")["second.0"], acts["first"])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*are deprecated:UserWarning")  # torch's own
def test_a_quantized_output_has_no_form_on_disk_and_says_what_to_write(tmp_path):
    model = AfterConv(lambda y: y)
    with capture(model, reduce=lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)) as acts:
        model(torch.randn(1, 2, 9))
    with pytest.raises(StoreError, match=r"the output of 'conv' is quantized.*reduce=lambda t: t.dequantize\(\)"):
        acts.save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_bad_paths_and_foreign_files_are_clear_errors(tmp_path):
    model = FiveConvs()
    with capture(model) as acts:
        model(X)
    with pytest.raises(StoreError, match="cannot write to .*existing, writable folder"):
        acts.save(tmp_path / "missing" / "a")
    with pytest.raises(StoreError, match=r"there is no file .*acts.save\(path\) writes one"):
        load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StoreError, match="cannot be read: .*not whole, or not a safetensors file"):
        load(tmp_path / "text")
    acts.save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="cannot be read"):
        load(tmp_path / "cut")
    from safetensors.torch import save_file

    save_file({"x": X}, tmp_path / "foreign")
    with pytest.raises(StoreError, match=r"acts.save\(\) did not write it"):
        load(tmp_path / "foreign")


def test_a_failed_save_leaves_the_old_file_whole(tmp_path):
    model = FiveConvs()
    with capture(model) as acts:
        model(X)
    acts.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with capture(model, reduce=lambda t: t.to_sparse()) as other:
        model(X)
    with pytest.raises(StoreError, match="sparse"):
        other.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before

"""Parts of what blocks return, selected and read as ``layer[0]`` and ``layer[hidden][1]``, everywhere in one spelling."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from convtap import Store, capture, compare, extract, list_layers, load, tapped
from convtap._errors import AmbiguousCall, LayerNotFound, NotCaptured, Unsupported
from convtap._select.parts import split_key

X = torch.randn(4, 1, 20, generator=torch.Generator().manual_seed(1))

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Output:
    hidden: object
    other: object = None


class Block(nn.Module):
    """Returns its two values in the structure that ``wrap`` makes."""

    def __init__(self, wrap):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.wrap = wrap

    def forward(self, x):
        y = self.conv(x)
        return self.wrap(y, y * 2)


class Net(nn.Module):
    def __init__(self, wrap, read, count=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(wrap) for _ in range(count)])
        self.read = read

    def forward(self, x):
        for layer in self.layers:
            x = self.read(layer(x))
        return x


def by_hand(net, x=X):
    """The first value of each block."""
    found = []
    with torch.no_grad():
        for layer in net.layers:
            x = torch.nn.functional.conv1d(x, layer.conv.weight, layer.conv.bias, padding=1)
            found.append(x)
    return found


def tuples(count=2):
    return Net(lambda a, b: (a, b), lambda out: out[0], count)


STRUCTURES = {
    "tuple": (lambda a, b: (a, b), lambda out: out[0], "[0]", "[1]"),
    "list": (lambda a, b: [a, b], lambda out: out[0], "[0]", "[1]"),
    "dict": (lambda a, b: {"hidden": a, "other": b}, lambda out: out["hidden"], "[hidden]", "[other]"),
    "nested": (lambda a, b: {"hidden": (b, a)}, lambda out: out["hidden"][1], "[hidden][1]", "[hidden][0]"),
    "int keys": (lambda a, b: {7: a, 8: b}, lambda out: out[7], "[7]", "[8]"),
    "dataclass": (lambda a, b: Output(a, (b, None)), lambda out: out.hidden, "[hidden]", "[other][0]"),
    "named tuple": (lambda a, b: Pair(a, b), lambda out: out.first, "[first]", "[second]"),
    "ordered": (lambda a, b: OrderedDict(a=a, b=b), lambda out: out["a"], "[a]", "[b]"),
}


@pytest.mark.parametrize(("wrap", "read", "first", "second"), STRUCTURES.values(), ids=STRUCTURES)
def test_a_part_alone_is_captured_under_its_name(wrap, read, first, second, tmp_path):
    net = Net(wrap, read)
    one, two = by_hand(net)
    with torch.no_grad(), capture(net, f"layers.1{first}") as acts:
        net(X)
    assert list(acts) == [f"layers.1{first}"]
    assert torch.equal(acts[f"layers.1{first}"], two)
    assert acts.nbytes == two.nbytes
    assert list(acts.sample(2)) == [f"layers.1{first}"]
    with torch.no_grad(), capture(net, [f"layers.0{second}", f"layers.0{first}"]) as acts:
        net(X)
    assert list(acts) == [f"layers.0{second}", f"layers.0{first}"]
    assert torch.equal(acts[f"layers.0{second}"], one * 2)
    store = extract(net, [X], tmp_path, f"layers.*{first}", types=Block, progress=False)
    assert store.layers == [f"layers.0{first}", f"layers.1{first}"]
    assert torch.equal(store[f"layers.1{first}"][3], two[3])


@pytest.mark.parametrize(("wrap", "read", "first", "second"), STRUCTURES.values(), ids=STRUCTURES)
def test_keys_of_a_whole_structure_are_spelled_alike_in_samples_stores_comparisons_and_reading(
    wrap, read, first, second, tmp_path
):
    net = Net(wrap, read, 1)
    with torch.no_grad(), capture(net, "layers.0") as acts:
        net(X)
    keys = {f"layers.0{first}", f"layers.0{second}"}
    assert set(acts.sample(0)) == keys
    assert all(torch.equal(acts[key][0], acts.sample(0)[key]) for key in keys)
    assert set(extract(net, [X], tmp_path, "layers.0", progress=False).layers) == keys
    assert {row.name for row in compare(acts, acts)} == keys
    acts.save(tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors")[f"layers.0{first}"], by_hand(net)[0])


@pytest.mark.parametrize("at", ["output", "input"])
@pytest.mark.parametrize("options", [{}, {"types": nn.Module}, {"types": Block}])
def test_a_glob_takes_the_part_of_every_block_that_has_it(at, options):
    class Takes(Block):
        def forward(self, x, scale):
            return super().forward(x * scale)

    net = tuples()
    if at == "input":
        net.layers = nn.ModuleList([Takes(lambda a, b: a) for _ in range(2)])
        net.forward = lambda x: net.layers[1](net.layers[0](x, 2.0), 3.0)
    if not options:
        with pytest.raises(LayerNotFound, match="of other types, but no Conv1d. Pass types="):
            capture(net, "layers.*[0]", at=at)
        return
    if options["types"] is Block and at == "input":
        options = {"types": Takes}
    with torch.no_grad(), capture(net, "layers.*[0]", at=at, **options) as acts:
        net(X)
    assert list(acts) == ["layers.0[0]", "layers.1[0]"]
    if at == "input":
        assert torch.equal(acts["layers.0[0]"], X)
    else:
        assert torch.equal(acts["layers.1[0]"], by_hand(net)[1])


def test_layers_of_a_glob_without_the_part_are_named_and_an_error_if_none_has_it():
    net = Net(lambda a, b: a, lambda out: out)
    net.layers[1].wrap = lambda a, b: (a, b)
    net.read = lambda out: out[0] if isinstance(out, tuple) else out
    with torch.no_grad(), capture(net, "layers.?[0]", types=nn.Module) as acts:
        net(X)
    assert list(acts) == ["layers.1[0]"]
    assert "no such part: layers.0[0]" in repr(acts)
    with pytest.raises(NotCaptured, match=r"no output has the selected part: layers\.0\[9\], layers\.1\[9\]"):
        with capture(net, "layers.?[9]", types=nn.Module):
            net(X)


def test_a_part_that_was_asked_for_by_name_and_is_not_there_is_an_error_that_names_the_others(tmp_path):
    net = tuples(1)
    with pytest.raises(LayerNotFound, match=r"'layers\.0' has no part \[2\]\..*: layers\.0\[0\], layers\.0\[1\]"):
        with capture(net, "layers.0[2]"):
            net(X)
    with pytest.raises(LayerNotFound, match=r"'layers\.0' has no part \[out\]"):
        extract(net, [X], tmp_path, "layers.0[out]", progress=False)
    with pytest.raises(LayerNotFound, match=r"'layers\.0\.conv' is a Conv1d, whose output has no part \[0\]"):
        capture(net, "layers.0.conv[0]")
    with capture(net, "layers.0") as acts:
        net(X)
    with pytest.raises(LayerNotFound, match=r"'layers\.0' has no part \[5\]"):
        acts["layers.0[5]"]
    assert acts.get("layers.0[5]", 3) == 3
    assert "layers.0[5]" not in acts
    assert "layers.0[1]" in acts
    with pytest.raises(LayerNotFound, match=r"no layer is named 'layers\.7\[0\]'|no layer matches 'layers\.7\[0\]'"):
        capture(net, "layers.7[0]")


# -- names that hold brackets or digits


def test_a_module_whose_name_holds_brackets_is_that_module(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleDict({"a[0]": nn.Conv1d(1, 1, 1), "a": Block(lambda a, b: (a, b))})

        def forward(self, x):
            return self.blocks["a[0]"](self.blocks["a"](x)[0])

    net = Odd()
    with torch.no_grad(), capture(net, "blocks.a[0]") as acts:
        y = net(X)
    assert torch.equal(acts["blocks.a[0]"], y)
    store = extract(net, [X], tmp_path / "a", "blocks.a[0]", progress=False)
    assert torch.equal(store["blocks.a[0]"][1], y[1])
    assert "did not run" not in repr(store)
    store = extract(net, [X], tmp_path / "b", ["blocks.a[0]", "blocks.a[1]"], progress=False, calls="keys")
    assert store.layers == ["blocks.a[1]", "blocks.a[0]"]
    assert torch.equal(store["blocks.a[0]"][1], y[1])


def test_a_glob_with_a_class_of_characters_stays_one():
    net = nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(3)))
    named = nn.ModuleDict({name: nn.Conv1d(1, 1, 1) for name in ("conv", "conv1", "conv2")})
    named.forward = lambda x: [layer(x) for layer in named.values()]
    for model, layers, expected in (
        (net, "[01]", ["0", "1"]),
        (net, "[!0]", ["1", "2"]),
        (net, "[0-1]", ["0", "1"]),
        (net, "*[0]", ["0"]),
        (named, "conv[12]", ["conv1", "conv2"]),
        (named, "co*[1]", ["conv1"]),
    ):
        with capture(model, layers) as acts:
            model(X)
        assert list(acts) == expected


@pytest.mark.parametrize(
    ("key", "layers", "expected"),
    [
        ("conv", ("conv",), ("conv", None, "")),
        ("conv#1", ("conv",), ("conv", 1, "")),
        ("conv##1", ("conv", "conv#0"), ("conv", 1, "")),
        ("conv#0", ("conv", "conv#0"), ("conv#0", None, "")),
        ("lstm#1[0]", ("lstm[0]",), ("lstm", 1, "[0]")),
        ("lstm[1][0]", ("lstm",), ("lstm", None, "[1][0]")),
        ("a[0]", ("a[0]", "a"), ("a[0]", None, "")),
        ("a[0]#2[hidden]", ("a[0]", "a"), ("a[0]", 2, "[hidden]")),
        ("F.conv1d#3", (), ("F.conv1d", 3, "")),
    ],
)
def test_a_key_is_split_into_layer_call_and_part(key, layers, expected):
    assert split_key(key, layers) == expected


# -- calls, options, other functions


def test_several_calls_of_a_part_are_numbered_behind_the_layer(tmp_path):
    net = tuples(1)
    net.forward = lambda x: net.layers[0](net.layers[0](x)[0])[0]
    with torch.no_grad(), capture(net, "layers.0[0]") as acts:
        y = net(X)
    assert list(acts) == ["layers.0#0[0]", "layers.0#1[0]"]
    assert torch.equal(acts["layers.0#1[0]"], y)
    with pytest.raises(AmbiguousCall, match=r"acts\['layers\.0#1\[0\]'\]"):
        acts["layers.0[0]"]
    assert [call.key for call in acts.calls("layers.0[0]")] == list(acts)
    acts.save(tmp_path / "a.safetensors")
    assert list(load(tmp_path / "a.safetensors")) == list(acts)
    with torch.no_grad(), capture(net, "layers.0") as whole:
        net(X)
    assert torch.equal(whole["layers.0#1[0]"], y)
    with pytest.raises(Unsupported, match=r"layer 'layers\.0\[0\]' ran 2 times"):
        extract(net, [X], tmp_path / "error", "layers.0[0]", progress=False)
    store = extract(net, [X], tmp_path / "keys", "layers.0[0]", calls="keys", progress=False)
    assert store.layers == ["layers.0#0[0]", "layers.0#1[0]"]
    assert torch.equal(store["layers.0#1[0]"][2], y[2])
    with pytest.raises(AmbiguousCall, match=r"layers\.0#0\[0\], layers\.0#1\[0\]"):
        store["layers.0[0]"]
    _, tensors = tapped(net, "layers.0[0]")(X)
    assert list(tensors) == list(acts)


def test_a_store_shows_the_parts_of_a_part(tmp_path):
    net = Net(lambda a, b: {"hidden": (a, b)}, lambda out: out["hidden"][0], 1)
    extract(net, TensorDataset(X), tmp_path, "layers.0[hidden]", batch_size=2, progress=False)
    store = Store(tmp_path)
    assert store.layers == ["layers.0[hidden][0]", "layers.0[hidden][1]"]
    assert "did not run" not in repr(store)
    assert torch.equal(store["layers.0[hidden][1]"][3], 2 * by_hand(net, X[2:])[0][1])
    for name in ("layers.0", "layers.0[hidden]"):
        with pytest.raises(LayerNotFound, match=r"each tensor has its own key: layers\.0\[hidden\]\[0\], layers"):
            store[name]
    assert len(store.dataset("layers.0[hidden][0]")) == 4


def test_reduce_and_dtype_see_the_part_only():
    net, seen = tuples(1), []

    def mean(tensor):
        seen.append(tuple(tensor.shape))
        return tensor.mean(-1)

    with torch.no_grad(), capture(net, "layers.0[1]", reduce=mean, dtype=torch.float64) as acts:
        net(X)
    assert seen == [(4, 1, 20)]
    assert acts["layers.0[1]"].dtype == torch.float64


@pytest.mark.parametrize("wrap", ["tuple", "dict", "dataclass"])
def test_gradients_reach_a_part_and_the_model_computes_the_same(wrap):
    make, read, first, _ = STRUCTURES[wrap]
    net = Net(make, read)
    expected = net(X)
    with capture(net, f"layers.0{first}", detach=False) as acts:
        y = net(X)
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), acts[f"layers.0{first}"])
    weight = net.layers[1].conv.weight
    reference = torch.nn.functional.conv_transpose1d(torch.ones_like(y), weight, padding=1)
    torch.testing.assert_close(gradient, reference)
    with capture(net, f"layers.0{first}", grads=True) as acts:
        net(X).sum().backward()
    torch.testing.assert_close(acts.calls()[0].grad, reference)


def test_an_inplace_change_of_a_part_does_not_reach_what_was_captured():
    net = tuples(1)
    net.read = lambda out: out[0].mul_(0)
    with torch.no_grad(), capture(net, "layers.0[0]") as acts:
        net(X)
    assert torch.equal(acts["layers.0[0]"], by_hand(net)[0])


def test_stop_ends_the_pass_after_the_part():
    net = tuples()
    ran = []
    net.layers[1].register_forward_hook(lambda *args: ran.append(1))
    with capture(net, ["layers.0[0]", "layers.0[1]"], stop=True) as acts:
        net(X)
    assert list(acts) == ["layers.0[0]", "layers.0[1]"]
    assert not ran


def test_a_part_is_followed_to_its_activation():
    net = tuples(1)
    net.read = lambda out: torch.relu(out[1])
    with torch.no_grad(), capture(net, "layers.0[1]", at="activation") as acts:
        y = net(X)
    assert torch.equal(acts["layers.0[1]"], y)


def test_whole_and_part_together_are_the_whole():
    net = tuples(1)
    with capture(net, ["layers.0[0]", "layers.0"]) as acts:
        net(X)
    assert list(acts) == ["layers.0"]
    assert torch.equal(acts["layers.0[0]"], acts["layers.0"][0])
    nested = Net(lambda a, b: ((a, b), b), lambda out: out[0][0], 1)
    with capture(nested, ["layers.0[0][1]", "layers.0[0]"]) as acts:
        nested(X)
    assert list(acts) == ["layers.0[0]"]


def test_an_lstm_gives_its_outputs_and_states(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.LSTM(3, 5, batch_first=True))
    x = torch.randn(4, 7, 3)
    with torch.no_grad(), capture(net, ["0[0]", "0[1][1]"]) as acts:
        outputs, (_, cells) = net(x)
    assert torch.equal(acts["0[0]"], outputs)
    assert torch.equal(acts["0[1][1]"], cells)
    store = extract(net, [x], tmp_path, "0[0]", progress=False)
    with torch.inference_mode():
        assert torch.equal(store["0[0]"][3], net(x)[0][3])


def test_list_layers_and_tapped_take_parts():
    net = tuples()
    rows = list_layers(net, "layers.*[1]", types=Block, example=X)
    assert [(row.name, row.type, tuple(row.shape)) for row in rows] == [
        ("layers.0[1]", "Block", (4, 1, 20)),
        ("layers.1[1]", "Block", (4, 1, 20)),
    ]
    _, tensors = tapped(net, ["layers.1[0]", "layers.0[1]"])(X)
    assert list(tensors) == ["layers.0[1]", "layers.1[0]"]
    torch.testing.assert_close(tensors["layers.0[1]"], 2 * by_hand(net)[0])
    with pytest.raises(NotCaptured, match=r"layers\.0\[5\]"):
        tapped(net, "layers.0[5]")(X)


@pytest.mark.filterwarnings("ignore:Skipping serialization")  # of the compiler's own settings, by torch 2.6
def test_extract_stores_parts_of_a_compiled_model(tmp_path):
    net = tuples()
    store = extract(net, [X], tmp_path, ["layers.0[1]", "layers.1[0]"], compile=True, progress=False)
    assert store.layers == ["layers.0[1]", "layers.1[0]"]
    torch.testing.assert_close(store["layers.1[0]"][2], by_hand(net)[1][2])


def test_other_parts_do_not_go_on_with_a_store(tmp_path):
    net = tuples()
    extract(net, [X], tmp_path, "layers.0[0]", progress=False)
    with pytest.raises(Exception, match=r"layers: layers\.0\[0\] then, layers\.0\[1\] now"):
        extract(net, [X], tmp_path, "layers.0[1]", progress=False)


# -- compare


def test_compare_takes_parts_of_models():
    a, b = tuples(), tuples()
    b.layers[1].wrap = lambda x, y: (x, y + 1)
    whole = compare(a, b, example=X, types=Block)
    assert whole.first.name == "layers.1[1]"
    same = compare(a, b, example=X, layers="layers.*[0]", types=Block)
    assert [row.name for row in same][:2] == ["layers.0[0]", "layers.1[0]"]
    assert same.first is None
    other = compare(a, b, example=X, layers="layers.1[1]")
    assert other.first.name == "layers.1[1]"
    with pytest.raises(LayerNotFound, match=r"'layers\.1' has no part \[4\]"):
        compare(a, b, example=X, layers="layers.1[4]")


def test_compare_takes_parts_of_captures_and_a_whole_beside_a_part():
    net = tuples()
    with torch.no_grad(), capture(net, types=Block) as whole:
        net(X)
    with torch.no_grad(), capture(net, "layers.*[1]", types=Block) as part:
        net(X)
    for a, b in ((whole, part), (part, whole), (part, part)):
        found = compare(a, b)
        assert [row.name for row in found] == ["layers.0[1]", "layers.1[1]"]
        assert found.agrees
    named = Net(lambda a, b: {"x": a, "y": b}, lambda out: out["x"], 1)
    one = tuples(1)
    with torch.no_grad(), capture(one, "layers.0[1]") as a:
        one(X)
    with torch.no_grad(), capture(named, "layers.0[y]") as b:
        named(X)
    found = compare(a, b, map={"layers.0[1]": "layers.0[y]"})
    assert [(row.name, row.partner) for row in found] == [("layers.0[1]", "layers.0[y]")]
    assert found.agrees


def test_compare_numbers_the_calls_of_a_part_behind_the_layer():
    net = tuples(1)
    net.forward = lambda x: net.layers[0](net.layers[0](x)[0])[0]
    with torch.no_grad(), capture(net, "layers.0[0]") as acts:
        net(X)
    assert [row.name for row in compare(acts, acts)] == ["layers.0#0[0]", "layers.0#1[0]"]
    assert "layers.0#1[0]" in [row.name for row in compare(net, net, example=X, layers="layers.0[0]")]

"""What an example and a batch are: the same in every function that runs a model on one."""

from __future__ import annotations

import random
from collections import UserDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from convtap import capture, compare, extract, list_layers, timeline, top
from convtap._errors import InvalidType

X = torch.randn(2, 1, 30, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([1.0, 0.5]).reshape(2, 1, 1)


class Masked(nn.Module):
    """Takes a sound and, if there is one, a mask; what it was given is kept."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3)

    def forward(self, x, mask=None):
        seen.append((x, mask))
        y = self.conv(x)
        return y if mask is None else y * mask


class Strict(Masked):
    def forward(self, x, mask):
        return super().forward(x, mask)


seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []


@pytest.fixture
def model():
    seen.clear()
    return Masked().eval()


def feature(items):
    try:
        from transformers import BatchFeature
    except ImportError:  # --core: a class of the same base
        return UserDict(items)
    return BatchFeature(items)


def encoding(items):
    try:
        from transformers import BatchEncoding
    except ImportError:  # --core: a class of the same base
        return UserDict(items)
    return BatchEncoding(items)


def array(dtype="float32"):
    return X.numpy().astype(dtype)


EXAMPLES = {
    "tensor": lambda: X,
    "tuple": lambda: (X,),
    "dict": lambda: {"x": X},
    "UserDict": lambda: UserDict(x=X),
    "mapping proxy": lambda: MappingProxyType({"x": X}),
    "BatchFeature": lambda: feature({"x": X}),
    "BatchEncoding": lambda: encoding({"x": X}),
    "array": lambda: array(),
    "float64 array": lambda: array("float64"),
    "big-endian array": lambda: array(">f8"),
    "array with negative strides": lambda: array()[:, :, ::-1][:, :, ::-1],
    "read-only array": lambda: np.frombuffer(array().tobytes(), np.float32).reshape(2, 1, 30),
    "array in a tuple": lambda: (array("float64"),),
    "array in a dict": lambda: {"x": array("float64")},
    "array in a BatchFeature": lambda: feature({"x": array()}),
}

RUNS = {
    "list_layers": lambda model, example, path: list_layers(model, example=example)[0].shape,
    "timeline": lambda model, example, path: timeline(model, example)["conv"].frames,
    "compare": lambda model, example, path: compare(model, model, example=example).agrees,
    "top": lambda model, batch, path: [hit.value for hit in top(model, [batch], "conv", 1)],
    "top, example": lambda model, example, path: [hit.value for hit in top(model, X, "conv", 1, example=example)],
    "extract": lambda model, batch, path: extract(model, [batch], path, progress=False)["conv"].shape,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_is_the_same_in_every_function(model, kind, run, tmp_path):
    expected = RUNS[run](model, X, tmp_path / "a")
    seen.clear()
    assert RUNS[run](model, EXAMPLES[kind](), tmp_path / "b") == expected
    assert all(torch.equal(x[:1], X[:1]) and x.dtype == torch.float32 for x, _ in seen)


@pytest.mark.parametrize("run", ["list_layers", "timeline", "compare"])
@pytest.mark.parametrize("example", [(X, MASK), {"x": X, "mask": MASK.numpy()}, feature({"x": array(), "mask": MASK})])
def test_every_argument_of_an_example_arrives(model, run, example, tmp_path):
    RUNS[run](model, example, tmp_path)
    assert seen
    assert all(mask is not None and torch.equal(mask, MASK) for _, mask in seen)


@pytest.mark.parametrize("run", ["top", "extract"])
def test_of_the_list_that_a_data_loader_yields_the_first_element_is_passed(model, run, tmp_path):
    (batch,) = DataLoader(TensorDataset(X, MASK), batch_size=2)
    assert isinstance(batch, list)
    assert len(batch) == 2
    assert RUNS[run](model, batch, tmp_path / "a") == RUNS[run](model, X, tmp_path / "b")
    assert all(mask is None for _, mask in seen)


@pytest.mark.parametrize("run", ["top", "extract"])
def test_a_mapping_or_array_within_a_tuple_is_passed_as_it_would_be_alone(model, run, tmp_path):
    expected = RUNS[run](model, {"x": X, "mask": MASK}, tmp_path / "a")
    assert RUNS[run](model, (UserDict(x=array(), mask=MASK), ["label", "label"]), tmp_path / "b") == expected
    assert torch.equal(seen[-1][1], MASK)


def test_top_takes_inputs_for_batches_that_are_not_the_models_arguments(model):
    batches = [{"label": torch.tensor([0, 1]), "audio": array("float64"), "mask": MASK}]
    hits = top(model, batches, "conv", 2, inputs=lambda batch: ((batch["audio"],), {"mask": batch["mask"]}))
    assert [hit.value for hit in hits] == [hit.value for hit in top(model, X, "conv", 2)]
    assert torch.equal(seen[0][1], MASK[:1])
    with pytest.raises(InvalidType, match=r"inputs\(batch\) returned a Tensor, which is not \(args, kwargs\)"):
        top(model, [X], "conv", 1, inputs=lambda batch: batch)


def run_top(model, batch, path):
    top(model, [batch], "conv", 1)


def run_extract(model, batch, path):
    extract(model, [batch], path, progress=False)


@pytest.mark.parametrize("run", [run_top, run_extract])
@pytest.mark.parametrize(
    ("kind", "batch", "code"),
    [
        (Strict, [X, MASK], r"missing 1 required .*'mask'.*inputs=lambda batch: \(tuple\(batch\), \{\}\)"),
        (Masked, {"audio": X, "label": MASK}, r"'audio'.*inputs=lambda batch: \(\(batch\['audio'\],\), \{\}\)"),
        (Masked, UserDict(x=X, label=MASK), r"'label'.*inputs=lambda batch: \(\(\), \{'x': batch\['x'\]\}\)"),
    ],
    ids=["tuple", "foreign keys", "one key too many"],
)
def test_a_wrong_guess_names_inputs_with_the_code_to_write(run, kind, batch, code, tmp_path):
    with pytest.raises(InvalidType, match=code) as caught:
        run(kind(), batch, tmp_path)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="notes on exceptions came with Python 3.11")
@pytest.mark.parametrize("run", [run_top, run_extract])
def test_another_error_on_a_guessed_batch_is_the_models_own_with_a_note(model, run, tmp_path):
    with pytest.raises(RuntimeError, match="expected input") as caught:
        run(model, (torch.zeros(2, 3, 5), X), tmp_path)
    assert "inputs=lambda batch: ((batch[1],), {})" in caught.value.__notes__[0]


def test_an_error_of_the_model_stays_as_it_is_where_inputs_says_what_it_gets(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'audio'") as caught:
        top(model, [X], "conv", 1, inputs=lambda batch: ((), {"audio": batch}))
    assert "inputs=lambda" not in str(caught.value)


@pytest.mark.parametrize("example", [(X, MASK, MASK), {"audio": X}, UserDict(x=X, label=MASK)])
@pytest.mark.parametrize("run", ["list_layers", "timeline", "compare"])
def test_an_example_that_the_model_does_not_take_is_named(model, run, example, tmp_path):
    with pytest.raises(InvalidType, match=r"does not take this example: .*argument.*without labels: example=\(x,\)"):
        RUNS[run](model, example, tmp_path)


def test_a_type_error_inside_the_model_is_the_models_own():
    class Broken(Masked):
        def forward(self, x):
            return self.conv(x) + "text"

    with pytest.raises(TypeError, match="unsupported operand|must be Tensor") as caught:
        list_layers(Broken(), example=X)
    assert not isinstance(caught.value, InvalidType)


@pytest.mark.parametrize("example", [[X], 5, "x", None, {1: X}, np.array(["a"])], ids=str)
def test_what_is_no_example_is_an_error_that_says_what_is(model, example):
    for run in (lambda: timeline(model, example), lambda: compare(model, model, example=example)):
        if example is not None:
            with pytest.raises(InvalidType, match="example is a"):
                run()


def test_a_masked_array_is_an_error_because_a_tensor_has_no_mask(model):
    with pytest.raises(InvalidType, match=r"masked array.*array\.filled\(0\.0\)"):
        list_layers(model, example=np.ma.masked_less(array(), 0.0))


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        (torch.float64, "float32", torch.float64),
        (torch.float32, "float16", torch.float32),
        (torch.bfloat16, "float64", torch.bfloat16),
        (torch.float32, "int16", torch.int16),
        (torch.float32, "complex128", torch.complex64),
        (torch.float32, "bool", torch.bool),
    ],
)
def test_arrays_take_the_floating_type_of_the_model_and_others_keep_their_own(dtype, given, expected):
    class Casts(Masked):
        def forward(self, x):
            seen.append((x, None))
            return self.conv(x.real.to(dtype) if x.is_complex() else x.to(dtype))

    seen.clear()
    list_layers(Casts().to(dtype), example=np.ones((1, 1, 9), given))
    assert [x.dtype for x, _ in seen] == [expected]


class InPlace(nn.Module):
    """Writes into its input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3)

    def forward(self, x):
        return self.conv(x.mul_(2))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("make", [lambda: X.clone(), array, lambda: (X.clone(),), lambda: {"x": array()}])
def test_a_model_that_writes_into_its_input_does_not_write_into_the_example(run, make, tmp_path):
    if run == "extract":
        make = array  # with a tensor, extract runs the model as it is, on the batch itself
    example = make()
    RUNS[run](InPlace(), example, tmp_path)
    (inside,) = example.values() if isinstance(example, dict) else example if isinstance(example, tuple) else [example]
    assert np.array_equal(np.asarray(inside), X.numpy())


def test_two_models_that_write_into_their_input_are_compared_on_the_same_one():
    a, b = InPlace(), InPlace()
    b.load_state_dict(a.state_dict())
    assert all(row.max_abs == 0 for row in compare(a, b, example=X.clone()))


def test_a_tensor_that_is_in_an_example_twice_is_one_tensor_in_the_model():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, a, b):
            assert a is b
            return self.conv(a)

    assert list_layers(Same(), example=(X, X))[0].shape == (2, 1, 30)


def test_a_frozen_scripted_model_takes_an_example():
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv1d(1, 4, 3)).eval()))
    assert list_layers(frozen, example=array("float64"))[0].shape == (2, 4, 28)


@pytest.mark.parametrize("run", ["list_layers", "timeline", "compare", "top"])
def test_random_numbers_go_on_as_if_nothing_had_run(run, tmp_path):
    class Draws(Masked):
        def forward(self, x):
            draw()
            return super().forward(x)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    model, generators = Draws().eval(), (random.seed, np.random.seed, torch.manual_seed)
    for seed in generators:
        seed(0)
    expected = draw()
    for seed in generators:
        seed(0)
    RUNS[run](model, X, tmp_path)
    assert draw() == expected


def test_capture_runs_the_model_as_it_is():
    x = X.clone()
    model = InPlace()
    with torch.no_grad(), capture(model) as acts:
        model(x)
    assert torch.equal(x, 2 * X)
    assert torch.equal(acts["conv"], nn.functional.conv1d(2 * X, model.conv.weight, model.conv.bias))

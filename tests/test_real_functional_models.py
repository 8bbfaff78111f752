"""Real models whose convolutions no module hook sees: Mamba and its relatives, predicted kernels, tuple outputs."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from convtap import CoverageWarning, capture
from tests.reference import cloned, patched_conv1d, same

transformers = pytest.importorskip("transformers", reason="transformers comes with the test extra")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TEXT = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])}


def causal(kind, **options):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def mamba():
    return causal("Mamba", hidden_size=16, state_size=4, num_hidden_layers=2), TEXT


def mamba2():
    return causal(
        "Mamba2", hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1
    ), TEXT


def falcon_mamba():
    return causal("FalconMamba", hidden_size=16, state_size=4, num_hidden_layers=2), TEXT


def jamba():
    model = causal(
        "Jamba",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    )
    return model, TEXT


def lfm2():
    model = causal(
        "Lfm2",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    return model, TEXT


def recurrent_gemma():
    model = causal(
        "RecurrentGemma",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        lru_width=16,
        attention_window_size=8,
    )
    return model, TEXT


def xvector():
    config = transformers.Wav2Vec2Config(
        conv_dim=(16,) * 7,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        tdnn_dim=(16,) * 5,
        xvector_output_dim=8,
    )
    return transformers.Wav2Vec2ForXVector(config), {"input_values": torch.randn(1, 16000)}


def univnet():
    config = transformers.UnivNetConfig(
        model_in_channels=8, model_hidden_channels=8, num_mel_bins=8, kernel_predictor_hidden_channels=8
    )
    return transformers.UnivNetModel(config), {"input_features": torch.randn(1, 20, 8)}


def moonshine_streaming():
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.MoonshineStreamingConfig(
        encoder_config=encoder,
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
    )
    inputs = {"input_values": torch.randn(1, 16000), "attention_mask": torch.ones(1, 16000, dtype=torch.long)}
    return transformers.MoonshineStreamingModel(config).get_encoder(), inputs


MODELS = {
    "mamba": mamba,
    "mamba2": mamba2,
    "falcon mamba": falcon_mamba,
    "jamba": jamba,
    "lfm2": lfm2,
    "recurrent gemma": recurrent_gemma,
    "wav2vec2 xvector": xvector,
    "univnet": univnet,
}
IS_NEW = int(transformers.__version__.split(".")[0]) >= 5
if IS_NEW:
    MODELS["moonshine streaming"] = moonshine_streaming
#: At these sizes, from reading the architectures: how many convolutions a pass runs that no module hook sees. Before
#: transformers 5, Mamba and its relatives called their convolution as a module.
OF_MAMBA = {"mamba": 2, "falcon mamba": 2, "jamba": 2, "lfm2": 1}
UNSEEN_BY_HOOKS = {**(OF_MAMBA if IS_NEW else {}), "wav2vec2 xvector": 5}
SEEN_BY_HOOKS = {} if IS_NEW else OF_MAMBA


def owners(model):
    """Every name a weight may be recorded under, by the address of its memory."""
    found = {}
    for name, parameter in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found.setdefault(parameter.data_ptr(), name.removesuffix(".weight"))
    return found


def run(model, inputs):
    torch.manual_seed(3)
    with torch.no_grad():
        return model(**inputs)


def tensors(output):
    return [cloned(v) for v in (output.values() if hasattr(output, "values") else output) if torch.is_tensor(v)]


@contextmanager
def every_convolution(model):
    """Records (way, owner, clone): Conv1d modules by hooks, and ``F.conv1d`` where no Conv1d module is running."""
    named, events, running = owners(model), [], []
    original = torch.nn.functional.conv1d

    def conv1d(*args, **kwargs):
        output = original(*args, **kwargs)
        if not running:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            events.append(("function", named.get(weight.data_ptr(), "F.conv1d"), cloned(output)))
        return output

    def ended(name):
        def hook(module, args, output):
            running.pop()
            events.append(("module", name, cloned(output)))

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            handles.append(module.register_forward_pre_hook(lambda *_: running.append(1)))
            handles.append(module.register_forward_hook(ended(name)))
    torch.nn.functional.conv1d = conv1d
    try:
        yield events
    finally:
        torch.nn.functional.conv1d = original
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_is_captured_once_under_its_owners_name(name):
    torch.manual_seed(1)
    model, inputs = MODELS[name]()
    model.eval()
    with every_convolution(model) as expected:
        plain = tensors(run(model, inputs))
    with capture(model) as acts:
        output = tensors(run(model, inputs))
    assert same(output, plain)
    assert len(expected) > 0
    assert [(call.via, call.name) for call in acts.calls()] == [(way, owner) for way, owner, _ in expected]
    assert same([call.output for call in acts.calls()], [value for _, _, value in expected])
    assert acts.coverage.bypassed == []
    if name in UNSEEN_BY_HOOKS:
        assert sum(way == "function" for way, _, _ in expected) == UNSEEN_BY_HOOKS[name]
    if name in SEEN_BY_HOOKS:
        assert sum(way == "module" for way, _, _ in expected) == SEEN_BY_HOOKS[name]


@pytest.mark.skipif(not IS_NEW, reason="transformers 4 has no Moonshine streaming")
def test_a_tuple_output_of_a_real_layer_is_kept_whole():
    model, inputs = moonshine_streaming()
    with capture(model.eval()) as acts:
        run(model, inputs)
    kinds = {type(call.output) for call in acts.calls()}
    assert tuple in kinds


@pytest.mark.parametrize("name", ["mamba", "lfm2", "recurrent gemma"])
def test_generation_is_captured_step_by_step(name):
    torch.manual_seed(1)
    model, _ = MODELS[name]()
    model.eval()
    prompt = torch.tensor([[3, 4, 5, 6]])

    def generate():
        torch.manual_seed(3)
        return model.generate(prompt, max_new_tokens=4, do_sample=False, min_new_tokens=4)

    plain = generate()
    with patched_conv1d() as expected:
        generate()
    with warnings.catch_warnings(record=True) as caught, capture(model) as acts:
        warnings.simplefilter("always")
        tokens = generate()
    assert torch.equal(tokens, plain)
    assert len(acts) == len(expected) > 0
    assert same([call.output for call in acts.calls()], expected)
    told = [str(w.message) for w in caught if issubclass(w.category, CoverageWarning)]
    missed = {"mamba": 2, "lfm2": 1, "recurrent gemma": 2}[name]  # its convolutions: a product computes each new step
    if len(expected) == missed:
        assert len(told) == 1
        assert f"of {missed} selected layer" in told[0]
        assert "captured 1 time, bypassed in 3 passes" in told[0]
    else:
        assert told == []

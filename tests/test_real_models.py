"""Real architectures with random weights: every captured tensor, and the model's own output, bit for bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from convtap import capture
from tests.reference import cloned, cloning_hooks, patched_conv1d, same

transformers = pytest.importorskip("transformers", reason="transformers comes with the test extra")


def wav2vec2(kind="Wav2Vec2", **more):
    config = getattr(transformers, f"{kind}Config")(
        conv_dim=(16,) * 7,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **more,
    )
    return getattr(transformers, f"{kind}Model")(config), {"input_values": torch.randn(2, 4000)}


def whisper():
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.tensor([[1, 5, 6]])}
    return transformers.WhisperModel(config), inputs


def encodec():
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=16, num_residual_layers=1, chunk_length_s=0.05, overlap=0.01
    )
    return transformers.EncodecModel(config), {"input_values": torch.randn(1, 1, 4000)}


def dac():
    config = transformers.DacConfig(
        encoder_hidden_size=8, decoder_hidden_size=32, downsampling_ratios=[2, 4, 8, 8], n_codebooks=2, codebook_size=16
    )
    return transformers.DacModel(config), {"input_values": torch.randn(1, 1, 4096)}


def mimi():
    config = transformers.MimiConfig(
        num_filters=4,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        codebook_size=16,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=4,
        upsample_groups=32,
    )
    return transformers.MimiModel(config), {"input_values": torch.randn(1, 1, 4000)}


def hifigan():
    config = transformers.SpeechT5HifiGanConfig(model_in_dim=8, upsample_initial_channel=32)
    return transformers.SpeechT5HifiGan(config), {"spectrogram": torch.randn(2, 20, 8)}


def vits():
    config = transformers.VitsConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        flow_size=16,
        spectrogram_bins=33,
        prior_encoder_num_flows=1,
        upsample_initial_channel=32,
        posterior_encoder_num_wavenet_layers=2,
    )
    return transformers.VitsModel(config), {"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}


MODELS = {
    "wav2vec2": wav2vec2,
    "hubert": lambda: wav2vec2("Hubert"),
    "wavlm": lambda: wav2vec2("WavLM"),
    "whisper": whisper,
    "encodec": encodec,
    "dac": dac,
    "mimi": mimi,
    "speecht5 hifigan": hifigan,
    "vits": vits,
}
#: How many modules are Conv1d, and how many of them run: from reading the architectures at these sizes.
COUNTS = {"wav2vec2": (8, 8), "hubert": (8, 8), "wavlm": (8, 8), "whisper": (2, 2)}


def run(model, inputs):
    torch.manual_seed(3)
    return model(**inputs)


def tensors(output):
    return {key: cloned(value) for key, value in output.items()} if hasattr(output, "items") else cloned(output)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside transformers
@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_is_captured_and_the_model_computes_the_same(name):
    torch.manual_seed(1)
    model, inputs = MODELS[name]()
    model.eval()
    with torch.no_grad():
        with cloning_hooks(model) as expected, patched_conv1d() as functions:
            plain = tensors(run(model, inputs))
        with capture(model) as acts:
            output = tensors(run(model, inputs))
    assert len(expected) >= 2
    assert len(functions) == len(expected), "a convolution ran that no module hook saw"
    assert same(output, plain)
    assert [call.name for call in acts.calls()] == [layer for layer, _ in expected]
    assert same([call.output for call in acts.calls()], [value for _, value in expected])
    counts = Counter(layer for layer, _ in expected)
    assert set(acts) == {
        key for layer, n in counts.items() for key in ([layer] if n == 1 else [f"{layer}#{i}" for i in range(n)])
    }
    convolutions = {layer for layer, module in model.named_modules() if isinstance(module, nn.Conv1d)}
    assert set(acts.coverage.captured) == set(counts)
    assert set(acts.coverage.idle) == convolutions - set(counts)
    if name in COUNTS:
        assert (len(convolutions), len(counts)) == COUNTS[name]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside transformers
@pytest.mark.parametrize("name", ["wav2vec2", "encodec"])
def test_gradients_reach_the_captured_tensors_of_a_real_model(name):
    torch.manual_seed(1)
    model, inputs = MODELS[name]()
    model.eval()

    def loss_of(output):
        value = next(v for v in output.values() if torch.is_tensor(v) and v.is_floating_point() and v.requires_grad)
        return value.pow(2).mean()

    # by hand: the public retain_grad, through a hook that clones before anything in place can happen
    kept = []

    def hook(module, args, output):
        kept.append(output)
        output.retain_grad()
        return output.clone()

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv1d)]
    loss_of(run(model, inputs)).backward()
    for handle in handles:
        handle.remove()
    with capture(model, detach=False) as acts:
        loss = loss_of(run(model, inputs))
    gradients = torch.autograd.grad(loss, [call.output for call in acts.calls()], allow_unused=True)
    assert len(gradients) == len(kept)
    for ours, theirs in zip(gradients, kept, strict=True):
        assert (ours is None and theirs.grad is None) or torch.equal(ours, theirs.grad)


def test_resnet18_against_torchvisions_feature_extractor():
    torchvision = pytest.importorskip("torchvision", reason="torchvision comes with the test extra")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    expected = {}
    handles = []  # the extractor returns what later in-place activations overwrite, so its values are cloned by hooks
    extractor = create_feature_extractor(model, names)
    for name in names:
        module = extractor.get_submodule(name)
        handles.append(module.register_forward_hook(lambda m, a, y, name=name: expected.update({name: y.clone()})))
    with torch.no_grad():
        from_extractor = extractor(x)
        for handle in handles:
            handle.remove()
        with capture(model, types=nn.Conv2d) as acts:
            y = model(x)
        plain = model(x)
    assert torch.equal(y, plain)
    assert len(acts) == 20
    assert set(acts) == set(from_extractor)
    assert same(dict(sorted(acts.items())), dict(sorted(expected.items())))

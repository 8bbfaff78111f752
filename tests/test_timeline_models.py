"""The time axis of real architectures with random weights, against their own account of lengths and frames."""

from __future__ import annotations

import math

import pytest
import torch

from convtap import CoverageWarning, capture
from convtap._time.timeline import timeline

transformers = pytest.importorskip("transformers", reason="transformers comes with the test extra")


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        conv_dim=(8,) * 7,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    return transformers.Wav2Vec2Model(config).eval()


def encodec(**more):
    config = transformers.EncodecConfig(
        num_filters=4,
        hidden_size=16,
        codebook_dim=16,
        codebook_size=32,
        num_lstm_layers=1,
        upsampling_ratios=[4, 2],
        **more,
    )
    return transformers.EncodecModel(config).eval()


def dac():
    config = transformers.DacConfig(
        encoder_hidden_size=8,
        decoder_hidden_size=32,
        downsampling_ratios=[2, 4],
        upsampling_ratios=[4, 2],
        n_codebooks=2,
        codebook_size=16,
        codebook_dim=4,
        hidden_size=32,
    )
    return transformers.DacModel(config).eval()


def assert_frames(model, times, x):
    """Every convolution has the frames that it really gave, for an input of another length than the example's."""
    with capture(model) as acts, torch.no_grad():
        model(x)
    for key, output in acts.items():
        assert times[key].valid_lengths([x.shape[-1]]).tolist() == [output.shape[-1]], key


def test_wav2vec2_has_the_lengths_that_the_model_computes_itself():
    model = wav2vec2()
    times = timeline(model, torch.zeros(2, 16000))
    lengths = torch.tensor([16000, 15999, 12345, 720, 719, 400])
    last = times["feature_extractor.conv_layers.6.conv"]
    assert torch.equal(last.valid_lengths(lengths), model._get_feat_extract_output_lengths(lengths))
    assert last.valid_lengths([399, 0]).tolist() == [0, 0]
    assert (last.stride, last.receptive_field, last.start) == (320, 400, 0)  # 20 ms and 25 ms at 16 kHz
    assert last.statistics  # the GroupNorm of the first layer
    assert_frames(model, times, torch.zeros(1, 7000))


def test_wav2vec2_cuts_samples_to_the_frames_of_each_input():
    model = wav2vec2()
    lengths = torch.tensor([4000, 2500])
    with capture(model) as acts, torch.no_grad():
        model(torch.randn(2, 4000))
    with pytest.warns(
        CoverageWarning, match="group_norm in 'feature_extractor.conv_layers.0.layer_norm': every frame of "
    ):
        rows = acts.samples(lengths=lengths, timeline=timeline(model, torch.zeros(1, 8000)))
    frames = model._get_feat_extract_output_lengths(lengths).tolist()
    assert [row["feature_extractor.conv_layers.6.conv"].shape[-1] for row in rows] == frames


def test_whisper_has_the_frames_of_its_encoder():
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        vocab_size=50,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperModel(config)
    example = {"input_features": torch.zeros(1, 8, 3000), "decoder_input_ids": torch.ones(1, 2, dtype=torch.long)}
    times = timeline(model, example)
    last = times["encoder.conv2"]
    lengths = torch.tensor([3000, 2999, 1501, 1])
    assert torch.equal(last.valid_lengths(lengths), model.encoder._get_feat_extract_output_lengths(lengths))
    assert (last.stride, last.receptive_field, last.start, last.frames) == (2, 5, -2, 1500)
    assert times["encoder.layers.0"].receptive_field == math.inf


@pytest.mark.parametrize("length", [1600, 1597, 1593, 1001])
def test_encodec_has_the_frames_of_its_padding_up_to_whole_windows(length):
    model = encodec()
    times = timeline(model, torch.zeros(1, 1, 1600))
    assert_frames(model, times, torch.zeros(1, 1, length))
    assert times["encoder.layers.6.conv"].stride == 8
    assert times["decoder.layers.9.conv"].stride == 1
    assert times["decoder.layers.0.conv"].receptive_field == math.inf  # behind the LSTM


def test_encodec_in_chunks_gives_each_chunk_its_start():
    model = encodec(chunk_length_s=0.05, overlap=0.1, normalize=True, sampling_rate=16000, use_causal_conv=False)
    times = timeline(model, torch.randn(1, 1, 1600))
    # 800 samples a chunk, and 720 to the next; the first convolution reaches 3 samples to the left.
    assert [call.start for call in times.calls("encoder.layers.0.conv")] == [-3, 717, 1437]
    assert not [layer for layer in times.values() if layer.unknown]


@pytest.mark.parametrize("length", [800, 808, 1200])
def test_dac_has_the_frames_that_it_makes(length):
    model = dac()
    times = timeline(model, torch.zeros(1, 1, 800))
    assert_frames(model, times, torch.zeros(1, 1, length))
    assert times["encoder.conv2"].stride == 8
    assert times["decoder.conv2"].stride == 1


def test_a_vocoder_has_fractions_of_a_frame_as_stride():
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=32,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    model = transformers.SpeechT5HifiGan(config)
    times = timeline(model, torch.zeros(1, 20, 8), time_dim=1)
    assert times["conv_post"].stride * 16 == 1
    assert times["conv_post"].frames == 320


def test_mamba_names_its_convolution_by_the_module_and_says_what_its_scan_makes_unknown():
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=2, state_size=4, vocab_size=20)
    model = transformers.MambaModel(config)
    times = timeline(model, torch.zeros(1, 16, dtype=torch.long))
    first = times["layers.0.mixer.conv1d"]
    assert (first.receptive_field, first.start) == (4, -3)
    assert "layers.0.mixer" in times["layers.1.mixer.conv1d"].unknown

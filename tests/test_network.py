"""The whole network against the float64 reference, and what must hold of it in any batch."""

import math
import shutil

import msgspec
import numpy as np
import pytest
import reference
import torch
from helpers import SPARSE, public_beats_file, public_shapes, random_model, state_of, synthetic_audio, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from aesanet.lengths import num_tokens
from aesanet.models.beats import BEATs, RelativeBias, distance_bucket
from aesanet.models.config import BEATsConfig
from aesanet.models.public_beats import public_layout

LENGTHS = [2800, 2801, 5359, 5360, 12_345, 24_007]
MODEL = random_model(tiny_config(), seed=0)  # for the tests that only read it


def batch(*clips, junk=(0.0,), padding=0):
    """Waveform [clips, samples] and num_samples [clips], with `junk` repeated over the samples that are no clip's."""
    lengths = [len(clip) for clip in clips]
    waveform = np.resize(np.array(junk, np.float32), (len(clips), max(lengths) + padding))
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    return torch.from_numpy(waveform), torch.tensor(lengths)


def score(model, *clips, **padding):
    """Scores of clips in one `batch`, [clips, 4]."""
    with torch.no_grad():
        return model(*batch(*clips, **padding)).numpy()


def hidden_and_scores(model, features):
    """What the model makes of one clip's fbank [frames, 128]: layers + 1 hidden states [tokens, width], 4 scores."""
    tokens = torch.tensor([len(features) // 16 * 8])
    with torch.no_grad():
        hidden = model.encoder.beats(features[None], tokens)
        scores = model.head(model.encoder.mix(hidden[1:]), tokens)
    return [state[0].numpy() for state in hidden], scores[0].numpy()


def worst(actual, expected):
    """The largest error of any hidden state, in parts of the largest expected value, which is 3 to 5."""
    assert [state.shape for state in actual] == [state.shape for state in expected]
    largest = max(np.abs(state).max() for state in expected)
    return max(np.abs(a - e).max() for a, e in zip(actual, expected, strict=True)) / largest


@pytest.fixture
def audio(request):
    return synthetic_audio(np.random.default_rng(request.param), request.param / 16000)


# Distance buckets


@pytest.mark.parametrize("bucket", [distance_bucket, reference.distance_bucket], ids=["ours", "reference"])
def test_buckets_of_the_specification(bucket):
    expected = {0: 0, 1: 161, -1: 1, 79: 239, 80: 240, 100: 247, 200: 271, 400: 295, 800: 319, -800: 159}
    assert {distance: bucket(distance, 320, 800) for distance in expected} == expected


@pytest.mark.parametrize("max_distance", [800, 1280])
def test_buckets_are_those_of_the_public_formula(max_distance):
    """The public code computes them in float32; a table of 0, 1, 2, ... shows the bucket of every pair of tokens."""
    bias = RelativeBias(BEATsConfig(encoder_attention_heads=1, max_distance=max_distance))
    tokens = max_distance + 100
    with torch.no_grad():
        bias.table.weight[:, 0] = torch.arange(320.0)
        buckets = bias(tokens)[0]
    position = torch.arange(tokens)
    distance = position[None, :] - position[:, None]
    away = distance.abs()
    far = 80 + (torch.log(away.float() / 80) / np.log(max_distance / 80) * 80).long()
    public = torch.where(distance > 0, 160, 0) + torch.where(away < 80, away, far.clamp_max(159))
    assert torch.equal(buckets, public.float())


# Against the reference


@pytest.mark.parametrize("audio", LENGTHS, indirect=True)
@pytest.mark.parametrize("seed", [0, 1])
def test_formulas_in_float64(audio, seed):
    """Nothing but rounding is left in float64: measured 3e-15 on hidden states and 6e-15 on scores."""
    config = tiny_config()
    model = random_model(config, seed).double()
    for waveform in audio.values():
        features = reference.front_end(waveform)
        expected = reference.encode(state_of(model), config, features)
        hidden, scores = hidden_and_scores(model, torch.from_numpy(features))
        assert worst(hidden, expected) < 1e-12
        assert np.abs(scores - reference.score_hidden(state_of(model), config, expected)).max() < 1e-12


VARIANTS = {
    "no_deep_norm": ({"deep_norm": False}, {}),
    "one_width": ({"embed_dim": 32}, {}),
    "convolution_bias": ({"conv_bias": True}, {}),
    "odd_kernel": ({"conv_pos": 15}, {}),
    "layers_as_they_are": ({}, {"normalise_layers": False}),
    "one_lstm_layer": ({}, {"lstm_layers": 1}),
    "other_heads": ({"encoder_attention_heads": 2}, {"attention_heads": 8}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_choices_in_float64(variant):
    beats, head = VARIANTS[variant]
    config = tiny_config(**beats)
    config = msgspec.structs.replace(config, head=msgspec.structs.replace(config.head, **head))
    model = random_model(config, seed=2).double()
    features = reference.front_end(synthetic_audio(np.random.default_rng(0), 0.7)["speechlike"])
    expected = reference.encode(state_of(model), config, features)
    hidden, scores = hidden_and_scores(model, torch.from_numpy(features))
    assert worst(hidden, expected) < 1e-12
    assert np.abs(scores - reference.score_hidden(state_of(model), config, expected)).max() < 1e-12


@pytest.mark.parametrize("audio", LENGTHS, indirect=True)
@pytest.mark.parametrize("seed", [0, 1])
def test_float32(audio, seed):
    """Measured 2e-6 on hidden states and 6e-6 on scores, which lie between 0 and 10."""
    config = tiny_config()
    model = random_model(config, seed)
    weights = state_of(model)
    for name, waveform in audio.items():
        features = reference.front_end(waveform)
        expected = reference.encode(weights, config, features)
        expected_scores = reference.score_hidden(weights, config, expected)
        hidden, scores = hidden_and_scores(model, torch.from_numpy(features).float())
        assert worst(hidden, expected) < 1e-5
        assert np.abs(scores - expected_scores).max() < 2e-5

        with torch.no_grad():
            hidden, tokens = model.encoder.beats.hidden_states(*batch(waveform))
        assert tokens.tolist() == [len(expected[0])]
        # In empty bins ln-energies differ by up to 1.5 (see test_fbank), hidden states then by 2e-2 and scores by 6e-3.
        sparse = name in SPARSE
        assert worst([state[0].numpy() for state in hidden], expected) < (5e-2 if sparse else 1e-5)
        assert np.abs(score(model, waveform)[0] - expected_scores).max() < (2e-2 if sparse else 2e-5)


def test_scores_tell_axes_and_clips_apart():
    """Random models with four like scores, or the same for all clips, would make every other test blind."""
    clips = [wave for seed in range(2) for wave in synthetic_audio(np.random.default_rng(seed), 0.6).values()]
    for seed in range(3):
        scores = score(random_model(tiny_config(), seed), *clips)
        assert np.ptp(scores, axis=0).min() > 0.3
        apart = np.abs(scores[:, :, None] - scores[:, None, :]).mean(axis=0)
        assert apart[~np.eye(4, dtype=bool)].min() > 0.3


# Lengths and batches


@pytest.mark.parametrize(
    ("samples", "tokens"), [(2799, 0), (2800, 8), (5359, 8), (5360, 16), (159_999, 496), (160_000, 496)]
)
def test_token_counts(samples, tokens):
    assert num_tokens(samples) == tokens
    if tokens:
        with torch.no_grad():
            hidden, counted = MODEL.encoder.beats.hidden_states(torch.zeros(1, samples), torch.tensor([samples]))
        assert counted.tolist() == [tokens]
        assert [tuple(state.shape) for state in hidden] == [(1, tokens, 32)] * 4


@pytest.mark.parametrize("lengths", [[2799, 3000], [3000, 3001]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=r"num_samples goes from .* 2800 .* 3000"):
        MODEL(torch.zeros(2, 3000), torch.tensor(lengths))


clip_lengths = st.integers(2800, 16_000)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=40)
@given(
    lengths=st.lists(clip_lengths, min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    junk=st.lists(finite, min_size=1, max_size=5),
    padding=st.integers(0, 4000),
)
def test_scores_are_the_same_alone_and_in_any_batch(lengths, seed, junk, padding):
    """Measured 2e-6."""
    rng = np.random.default_rng(seed)
    clips = []
    for length in lengths:
        audio = synthetic_audio(rng, length / 16000)
        clips.append(audio[rng.choice([name for name in sorted(audio) if name not in SPARSE])])
    together = score(MODEL, *clips, junk=junk, padding=padding)
    alone = np.concatenate([score(MODEL, clip) for clip in clips])
    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_model_agrees():
    model = random_model(tiny_config(encoder_layers=1), seed=0)
    compiled = torch.compile(model)
    rng = np.random.default_rng(0)
    for lengths in ([3000, 12_000, 9000], [15_000]):  # the second shape compiles again, with dynamic shapes
        clips = [synthetic_audio(rng, length / 16000)["speechlike"] for length in lengths]
        assert np.abs(score(compiled, *clips) - score(model, *clips)).max() < 1e-5
    torch.compiler.reset()


# Public BEATs files


def test_base_model_has_the_public_layout():
    layout = public_layout(BEATsConfig())
    assert len(layout) == 250
    assert layout == public_shapes(BEATsConfig())
    assert public_layout(tiny_config().beats) == public_shapes(tiny_config().beats)
    # BEATs_iter3_plus_AS2M.pt has 361,499,833 bytes: these tensors in float32 and some 330 bytes of archive for each.
    archive = 361_499_833 - sum(4 * math.prod(shape) for shape in layout.values())
    assert 250 * 300 < archive < 250 * 400


def reference_weights(public, config):
    """The reference's weights from a public file's tensors in the older spelling, weight norm folded."""
    arrays = {key: value.double().numpy() for key, value in public.items()}
    gain, direction = arrays.pop("encoder.pos_conv.0.weight_g"), arrays.pop("encoder.pos_conv.0.weight_v")
    kernel = np.empty_like(direction)
    for tap in range(config.conv_pos):
        norm = np.sqrt((direction[:, :, tap] ** 2).sum())
        kernel[:, :, tap] = gain[0, 0, tap] * direction[:, :, tap] / norm
    weights = {
        "positions.conv.weight": kernel,
        "positions.conv.bias": arrays.pop("encoder.pos_conv.0.bias"),
        "encoder_norm.weight": arrays.pop("encoder.layer_norm.weight"),
        "encoder_norm.bias": arrays.pop("encoder.layer_norm.bias"),
        "relative_bias.table.weight": arrays["encoder.layers.0.self_attn.relative_attention_bias.weight"],
    }
    weights |= {key.removeprefix("encoder."): value for key, value in arrays.items()}
    return {"encoder.beats." + key: value for key, value in weights.items()}


@pytest.mark.parametrize("fine_tuned", [False, True], ids=["pretrained", "fine_tuned"])
@pytest.mark.parametrize("new_weight_norm", [False, True], ids=["weight_g", "parametrizations"])
def test_public_file_gives_the_reference_hidden_states(tmp_path, fine_tuned, new_weight_norm):
    config = tiny_config()
    old = public_beats_file(tmp_path / "old.pt", config.beats, seed=3)
    written = public_beats_file(tmp_path / "beats.pt", config.beats, 3, fine_tuned, new_weight_norm)
    assert ("predictor.weight" in written["model"], "label_dict" in written) == (fine_tuned, fine_tuned)
    beats = BEATs.from_checkpoint(tmp_path / "beats.pt")
    assert beats.config == config.beats
    assert not beats.training

    waveform = synthetic_audio(np.random.default_rng(0), 0.7)["speechlike"]
    expected = reference.encoder_hidden_states(reference_weights(old["model"], config.beats), config, waveform)
    with torch.no_grad():
        actual, tokens = beats.hidden_states(*batch(waveform))
        same, _ = BEATs.from_checkpoint(tmp_path / "old.pt").hidden_states(*batch(waveform))
        exact = beats.double()(torch.from_numpy(reference.front_end(waveform))[None], tokens)
    assert all(torch.equal(one, other) for one, other in zip(actual, same, strict=True))
    assert worst([state[0].numpy() for state in actual], expected) < 1e-5
    # The folded kernel is rounded to float32; all else is exact. Measured 1e-8.
    assert worst([state[0].numpy() for state in exact], expected) < 1e-6


def test_cfg_is_laid_over_the_class_defaults(tmp_path):
    """The defaults of the public class are not the values of the public files."""
    config = tiny_config().beats
    content = public_beats_file(tmp_path / "beats.pt", config, seed=0)
    for name in ("deep_norm", "max_distance", "conv_bias"):
        del content["cfg"][name]
    torch.save(content, tmp_path / "beats.pt")
    expected = msgspec.structs.replace(config, deep_norm=False, max_distance=1280)
    assert BEATs.from_checkpoint(tmp_path / "beats.pt").config == expected

"""Useful floating-point operations of the network, from its config and a clip's length alone.

Counted are the matrix products and convolutions of the clip by itself, a multiply-add as two operations, as
`torch.utils.flop_counter` counts them. Norms, softmax and other elementwise work are not counted, and no padding is,
whatever batch an engine puts the clip in.
"""

from dataclasses import astuple, dataclass

from aesanet.axes import AXES
from aesanet.lengths import FFT_SIZE, FRAME_SAMPLES, MEL_BINS, PATCH_SIZE, num_frames, num_tokens
from aesanet.models.config import GATE_PARTS, AESANetConfig, BEATsConfig, HeadConfig


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one clip: of the front end, four parts of the encoder, four of the head."""

    frontend: int
    patches: int
    positions: int
    attention: int
    feed_forward: int
    adapter: int
    lstm: int
    shared: int
    axes: int

    @property
    def total(self) -> int:
        """Of the whole network, from waveform to scores."""
        return sum(astuple(self))


def clip_flops(config: AESANetConfig, num_samples: int) -> Flops:
    """What the network computes for one clip of `num_samples` at 16 kHz, at least 2,800.

    >>> round(clip_flops(AESANetConfig(), 160_000).total / 1e9, 1)  # 10 s, base size
    102.2
    """
    beats, head = config.beats, config.head
    tokens, width = num_tokens(num_samples), beats.encoder_embed_dim
    return Flops(
        frontend=_frontend(num_frames(num_samples)),
        patches=_patches(beats, tokens),
        positions=_positions(beats, tokens),
        attention=beats.encoder_layers * _gated_attention(beats, tokens),
        feed_forward=beats.encoder_layers * 2 * _linear(tokens, width, beats.encoder_ffn_embed_dim),
        adapter=_linear(tokens, width, head.adapter_width),
        lstm=_lstm(head, tokens),
        shared=_linear(tokens, 2 * head.lstm_hidden, head.shared_width),
        axes=len(AXES) * _axis(head, tokens),
    )


def _linear(rows: int, inputs: int, outputs: int) -> int:
    """Of a matrix product [rows, inputs] @ [inputs, outputs]."""
    return 2 * rows * inputs * outputs


def _frontend(frames: int) -> int:
    """Of the folded DFT, real and imaginary parts, and the mel filters; a fast transform would need fewer."""
    bins = FFT_SIZE // 2 + 1
    return _linear(frames, FRAME_SAMPLES, 2 * bins) + _linear(frames, bins, MEL_BINS)


def _patches(beats: BEATsConfig, tokens: int) -> int:
    """Of the convolution that makes patches to tokens, and of the projection to the trunk's width where it differs."""
    embedding = _linear(tokens, PATCH_SIZE**2, beats.embed_dim)
    if beats.embed_dim == beats.encoder_embed_dim:
        return embedding
    return embedding + _linear(tokens, beats.embed_dim, beats.encoder_embed_dim)


def _positions(beats: BEATsConfig, tokens: int) -> int:
    """Of the grouped convolution over time, zeros at its edges included."""
    outputs = tokens + 1 - beats.conv_pos % 2  # an even kernel gives one too many
    return _linear(outputs, beats.encoder_embed_dim // beats.conv_pos_groups * beats.conv_pos, beats.encoder_embed_dim)


def _attention(tokens: int, width: int) -> int:
    """Of queries with keys and weights with values, over all heads of a width together."""
    return 2 * _linear(tokens, width, tokens)


def _gated_attention(beats: BEATsConfig, tokens: int) -> int:
    """Of one layer: four projections, the two products, and each head's projection to the gates of its positions."""
    width = beats.encoder_embed_dim
    gates = _linear(tokens * beats.encoder_attention_heads, beats.head_width, GATE_PARTS)
    return 4 * _linear(tokens, width, width) + _attention(tokens, width) + gates


def _lstm(head: HeadConfig, tokens: int) -> int:
    """Of both directions of all layers: four gates of the input and of the state before it, step by step."""
    hidden, gates = head.lstm_hidden, 4 * head.lstm_hidden
    inputs = [head.adapter_width, *[2 * hidden] * (head.lstm_layers - 1)]
    return sum(2 * (_linear(tokens, size, gates) + _linear(tokens, hidden, gates)) for size in inputs)


def _axis(head: HeadConfig, tokens: int) -> int:
    """Of one axis: queries, keys and values, attention, projection, score."""
    width = head.shared_width
    projections = _linear(tokens, width, 3 * width) + _linear(tokens, width, width)
    return projections + _attention(tokens, width) + _linear(tokens, width, 1)

"""AESA-Net in plain NumPy float64, written from the specification: slow, one clip at a time, no padding, no masks.

What the engine computes in batches, in float32 and by matrix products is here spelled out frame by frame, query by
query and step by step. `weights` always holds `AESANet.state_dict()` as float64 arrays.
"""

import math

import numpy as np

AXES = ("CE", "CU", "PC", "PQ")
FLOOR = 1.1920929e-7  # the least mel energy
BEATS = "encoder.beats."


# Front end


def mel_of_hz(hz):
    """Mel, as Kaldi has it."""
    return 1127 * math.log(1 + hz / 700)


def mel_filters(num_mel_bins):
    """Triangles in the mel domain between 20 and 8000 Hz: [num_mel_bins, 257]."""
    low, high = mel_of_hz(20), mel_of_hz(8000)
    step = (high - low) / (num_mel_bins + 1)
    filters = np.zeros((num_mel_bins, 257))
    for m in range(num_mel_bins):
        left, centre, right = low + m * step, low + (m + 1) * step, low + (m + 2) * step
        for k in range(256):  # bin 256, the Nyquist frequency, keeps weight 0
            mel = mel_of_hz(k * 16000 / 512)
            if left < mel <= centre:
                filters[m, k] = (mel - left) / (centre - left)
            elif centre < mel < right:
                filters[m, k] = (right - mel) / (right - centre)
    return filters


def fbank(waveform, num_mel_bins=128):
    """Kaldi log-mel: [samples] at 16-bit scale -> [frames, num_mel_bins]."""
    waveform = np.asarray(waveform, np.float64)
    window = np.array([(0.5 - 0.5 * math.cos(2 * math.pi * n / 399)) ** 0.85 for n in range(400)])
    filters = mel_filters(num_mel_bins)
    frames = []
    for start in range(0, len(waveform) - 400 + 1, 160):
        x = waveform[start : start + 400]
        x = x - x.mean()
        y = np.empty(400)
        y[0] = x[0] - 0.97 * x[0]
        y[1:] = x[1:] - 0.97 * x[:-1]
        padded = np.zeros(512)
        padded[:400] = y * window
        power = np.abs(np.fft.rfft(padded)) ** 2
        frames.append(np.log(np.maximum(filters @ power, FLOOR)))
    return np.array(frames)


def front_end(waveform):
    """[samples] in [-1, 1) -> normalised fbank [frames, 128]."""
    return (fbank(np.asarray(waveform, np.float64) * 2**15) - 15.41663) / (2 * 6.55582)


# Building blocks


def linear(weights, name, x):
    """[..., inputs] -> [..., outputs]."""
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def normalise(x):
    """LayerNorm without parameters over the last axis."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5)


def layer_norm(weights, name, x):
    """LayerNorm with parameters over the last axis."""
    return normalise(x) * weights[name + ".weight"] + weights[name + ".bias"]


def gelu(x):
    """Exact GELU, any shape."""
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
    """Logistic function, any shape."""
    return 1 / (1 + np.exp(-x))


def softmax(x):
    """Of one vector."""
    e = np.exp(x - x.max())
    return e / e.sum()


# BEATs


def patches(weights, config, features):
    """Fbank [frames, 128] -> patch embeddings [tokens, embed_dim], time-major, 8 mel patches a time patch."""
    kernel = weights[BEATS + "patch_embedding.weight"]  # [embed_dim, 1, time 16, mel 16]
    bias = weights[BEATS + "patch_embedding.bias"] if config.beats.conv_bias else 0
    tokens = []
    for t in range(len(features) // 16):
        for m in range(8):
            patch = features[16 * t : 16 * t + 16, 16 * m : 16 * m + 16]
            tokens.append((kernel[:, 0] * patch).sum(axis=(1, 2)) + bias)
    return np.array(tokens)


def positional_convolution(weights, config, x):
    """Grouped convolution over tokens [tokens, width] -> the same shape; token n sees n - k/2 ... n + k/2 - 1."""
    kernel = weights[BEATS + "positions.conv.weight"]  # [width, width / groups, k]
    k, groups = config.beats.conv_pos, config.beats.conv_pos_groups
    tokens, width = x.shape
    size = width // groups
    padded = np.zeros((tokens + k, width))
    padded[k // 2 : k // 2 + tokens] = x
    out = np.empty((tokens, width))
    for n in range(tokens):
        for g in range(groups):
            group = slice(g * size, (g + 1) * size)
            out[n, group] = np.einsum("oit,ti->o", kernel[group], padded[n : n + k, group])
    return out + weights[BEATS + "positions.conv.bias"]


def distance_bucket(r, num_buckets, max_distance):
    """Bucket of the distance r = key position - query position."""
    half = num_buckets // 2
    near = half // 2
    offset = half if r > 0 else 0
    a = abs(r)
    if a < near:
        return offset + a
    return offset + min(half - 1, near + int(math.log(a / near) / math.log(max_distance / near) * (half - near)))


def gated_attention(weights, config, name, x):
    """Self-attention with gated relative position bias: [tokens, width] -> the same shape."""
    beats = config.beats
    tokens, width = x.shape
    d = width // beats.encoder_attention_heads
    table = weights[BEATS + "relative_bias.table.weight"]  # [num_buckets, heads]
    bucket = {r: distance_bucket(r, beats.num_buckets, beats.max_distance) for r in range(1 - tokens, tokens)}
    query, key, value = (linear(weights, f"{name}.{part}_proj", x) for part in "qkv")
    out = np.empty((tokens, width))
    for h in range(beats.encoder_attention_heads):
        head = slice(h * d, (h + 1) * d)
        grep_a = weights[name + ".grep_a"][0, h, 0, 0]
        for i in range(tokens):
            s = linear(weights, name + ".grep_linear", query[i, head]).reshape(2, 4).sum(axis=1)
            gate_a, gate_b = sigmoid(s)
            gate = gate_a * (gate_b * grep_a - 1) + 2
            bias = np.array([table[bucket[j - i], h] for j in range(tokens)])
            attention = softmax(key[:, head] @ query[i, head] / math.sqrt(d) + gate * bias)
            out[i, head] = attention @ value[:, head]
    return linear(weights, name + ".out_proj", out)


def encode(weights, config, features):
    """Fbank [frames, 128] -> layers + 1 hidden states [tokens, width], the first the input of layer 0."""
    beats = config.beats
    x = layer_norm(weights, BEATS + "layer_norm", patches(weights, config, features))
    if beats.embed_dim != beats.encoder_embed_dim:
        x = linear(weights, BEATS + "post_extract_proj", x)
    x = x + gelu(positional_convolution(weights, config, x))
    x = layer_norm(weights, BEATS + "encoder_norm", x)
    hidden = [x]
    alpha = (2 * beats.encoder_layers) ** 0.25 if beats.deep_norm else 1.0
    for i in range(beats.encoder_layers):
        name = f"{BEATS}layers.{i}."
        attended = gated_attention(weights, config, name + "self_attn", x)
        x = layer_norm(weights, name + "self_attn_layer_norm", alpha * x + attended)
        inner = gelu(linear(weights, name + "fc1", x))
        x = layer_norm(weights, name + "final_layer_norm", alpha * x + linear(weights, name + "fc2", inner))
        hidden.append(x)
    return hidden


def encoder_hidden_states(weights, config, waveform):
    """[samples] in [-1, 1) -> layers + 1 hidden states [tokens, width], the first the input of layer 0."""
    return encode(weights, config, front_end(waveform))


# Head


def mix_layers(weights, config, hidden):
    """Softmax-weighted sum of the layers' outputs, without the first layer's input: [tokens, width]."""
    outputs = hidden[1:]
    shares = softmax(weights["encoder.layer_weights"])
    mixed = np.zeros_like(outputs[0])
    for share, output in zip(shares, outputs, strict=True):
        mixed += share * (normalise(output) if config.head.normalise_layers else output)
    return mixed


def lstm_direction(weights, side, x):
    """One direction of one LSTM layer, gates in PyTorch's order i, f, g, o: [tokens, inputs] -> [tokens, hidden]."""
    w, r = weights[f"head.lstm.weight_ih_{side}"], weights[f"head.lstm.weight_hh_{side}"]
    b = weights[f"head.lstm.bias_ih_{side}"] + weights[f"head.lstm.bias_hh_{side}"]
    size = r.shape[1]
    state, cell = np.zeros(size), np.zeros(size)
    out = np.empty((len(x), size))
    times = reversed(range(len(x))) if side.endswith("_reverse") else range(len(x))
    for t in times:
        i, f, g, o = (w @ x[t] + r @ state + b).reshape(4, size)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        state = sigmoid(o) * np.tanh(cell)
        out[t] = state
    return out


def bidirectional_lstm(weights, config, x):
    """[tokens, adapter width] -> [tokens, 2 * hidden], forward half first."""
    for layer in range(config.head.lstm_layers):
        forward, backward = lstm_direction(weights, f"l{layer}", x), lstm_direction(weights, f"l{layer}_reverse", x)
        x = np.concatenate([forward, backward], axis=1)
    return x


def axis_scores(weights, config, axis, x):
    """One axis head, without residual or norm: [tokens, shared width] -> [tokens] in (0, 1)."""
    heads = config.head.attention_heads
    tokens, width = x.shape
    d = width // heads
    query, key, value = np.split(linear(weights, f"head.axes.{axis}.qkv_proj", x), 3, axis=1)
    attended = np.empty((tokens, width))
    for h in range(heads):
        head = slice(h * d, (h + 1) * d)
        for i in range(tokens):
            attention = softmax(key[:, head] @ query[i, head] / math.sqrt(d))
            attended[i, head] = attention @ value[:, head]
    out = linear(weights, f"head.axes.{axis}.out_proj", attended)
    return sigmoid(linear(weights, f"head.axes.{axis}.score", out))[:, 0]


def score_hidden(weights, config, hidden):
    """layers + 1 hidden states [tokens, width] -> 4 calibrated scores in the order of AXES."""
    x = linear(weights, "head.adapter", mix_layers(weights, config, hidden))
    x = bidirectional_lstm(weights, config, x)
    x = np.maximum(linear(weights, "head.shared", x), 0)
    low, high = config.head.score_range
    result = []
    for axis in AXES:
        score = low + (high - low) * axis_scores(weights, config, axis, x).mean()
        affine = getattr(config.head.calibration, axis)
        result.append(affine.scale * score + affine.offset)
    return np.array(result)


def scores(weights, config, waveform):
    """[samples] in [-1, 1) -> 4 calibrated scores in the order of AXES."""
    return score_hidden(weights, config, encoder_hidden_states(weights, config, waveform))

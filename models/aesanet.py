"""AESA-Net (arXiv 2509.03292): BEATs' layers mixed, a bidirectional LSTM, and one attention head an axis.

`AESANet.frontend`, `.encoder` and `.head` are the three graphs of a bundle.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from aesanet.axes import AXES
from aesanet.lengths import num_tokens
from aesanet.models.beats import BEATs, check_lengths, token_mask
from aesanet.models.config import AESANetConfig, HeadConfig

TRUNK_PREFIX = "encoder.beats."
"""Of the state-dict keys that a head-only checkpoint leaves out."""


class AESANet(nn.Module):
    """The whole network, from waveform to calibrated scores."""

    def __init__(self, config: AESANetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = Head(config)

    @property
    def frontend(self) -> nn.Module:
        """The trunk's own front end; it has no weights."""
        return self.encoder.beats.frontend

    def forward(self, waveform: Tensor, num_samples: Tensor) -> Tensor:
        """Scores of a batch of unequal clips.

        waveform    : float32 [batch, samples], 16 kHz, in [-1, 1), padded at the end with anything finite
        num_samples : int64 [batch], each clip's own length, at least 2,800
        returns     : float32 [batch, 4], order CE, CU, PC, PQ
        """
        check_lengths(waveform, num_samples)
        tokens = num_tokens(num_samples)
        scores: Tensor = self.head(self.encoder(self.frontend(waveform), tokens), tokens)
        return scores


class Encoder(nn.Module):
    """BEATs and the softmax-weighted sum of its layers' outputs."""

    def __init__(self, config: AESANetConfig) -> None:
        super().__init__()
        self.beats = BEATs(config.beats)
        self.normalise_layers = config.head.normalise_layers
        self.layer_weights = nn.Parameter(torch.zeros(config.beats.encoder_layers))

    def forward(self, fbank: Tensor, num_tokens: Tensor) -> Tensor:
        """fbank float32 [batch, frames, 128], num_tokens int64 [batch] -> features [batch, tokens, width]."""
        return self.mix(self.beats(fbank, num_tokens)[1:])

    def mix(self, layers: list[Tensor]) -> Tensor:
        """Sum the layers' outputs by learned weights, each first normalised (without parameters) if so configured."""
        weights = torch.softmax(self.layer_weights, dim=0)
        if self.normalise_layers:
            layers = [F.layer_norm(layer, layer.shape[-1:]) for layer in layers]
        mixed = weights[0] * layers[0]
        for weight, layer in zip(weights[1:], layers[1:], strict=True):
            mixed = mixed + weight * layer
        return mixed


class Head(nn.Module):
    """Adapter, LSTM, shared layer and four axis heads, over the tokens of a clip."""

    calibration: Tensor

    def __init__(self, config: AESANetConfig) -> None:
        super().__init__()
        head = config.head
        self.score_range = head.score_range
        self.adapter = nn.Linear(config.beats.encoder_embed_dim, head.adapter_width)
        self.lstm = MaskedLSTM(head.adapter_width, head.lstm_hidden, head.lstm_layers)
        self.shared = nn.Linear(2 * head.lstm_hidden, head.shared_width)
        self.dropout = nn.Dropout(head.dropout)
        self.axes = nn.ModuleDict({axis: AxisHead(head) for axis in AXES})
        affine = [getattr(head.calibration, axis) for axis in AXES]
        self.register_buffer(
            "calibration", torch.tensor([[a.scale for a in affine], [a.offset for a in affine]]), persistent=False
        )

    def forward(self, features: Tensor, num_tokens: Tensor) -> Tensor:
        """features [batch, tokens, width], num_tokens int64 [batch] -> scores float32 [batch, 4], calibrated."""
        token_scores = self.token_scores(self.shared_output(features, num_tokens), num_tokens)
        scale, offset = self.calibration
        calibrated: Tensor = clip_mean(token_scores, num_tokens) * scale + offset
        return calibrated

    def shared_output(self, features: Tensor, num_tokens: Tensor) -> Tensor:
        """What all four axes look at, [batch, tokens, shared width]; its clip mean is the clip's embedding."""
        hidden = self.lstm(self.adapter(features), num_tokens)
        shared: Tensor = self.dropout(F.relu(self.shared(hidden)))
        return shared

    def token_scores(self, shared: Tensor, num_tokens: Tensor) -> Tensor:
        """Uncalibrated scores of every token, [batch, tokens, 4], within the score range."""
        low, high = self.score_range
        keys = token_mask(shared, num_tokens)
        scores = torch.cat([head(shared, keys) for head in self.axes.values()], dim=2)
        return low + (high - low) * scores


class AxisHead(nn.Module):
    """Self-attention over a clip's tokens, then one sigmoid a token. No residual and no norm, as published."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, self.heads = config.shared_width, config.attention_heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """x [batch, tokens, width], keys bool [batch, tokens] -> [batch, tokens, 1] in (0, 1)."""
        q, k, v = self.qkv_proj(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = keys[:, None, None]
        if torch.compiler.is_exporting():
            # Written out, as the exporter would otherwise choose the operators.
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
            seen = torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1) @ v
        else:
            seen = F.scaled_dot_product_attention(q, k, v, mask)  # the same, three times as fast in training
        scores: Tensor = torch.sigmoid(self.score(self.out_proj(seen.transpose(1, 2).flatten(2))))
        return scores


class MaskedLSTM(nn.LSTM):
    """A bidirectional LSTM whose backward direction starts at each clip's own last token, not in the padding."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__(input_size, hidden_size, num_layers, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, num_tokens: Tensor) -> Tensor:  # type: ignore[override]
        """x [batch, tokens, input], num_tokens int64 [batch] -> [batch, tokens, 2 * hidden], padding undefined."""
        if x.is_cuda and not torch.compiler.is_exporting():
            packed = pack_padded_sequence(x, num_tokens.cpu(), batch_first=True, enforce_sorted=False)
            out, _ = super().forward(packed)
            return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
        return self._forwards(x, num_tokens)

    def _forwards(self, x: Tensor, num_tokens: Tensor) -> Tensor:
        """The same through forward LSTMs alone: the other direction reads each clip's own tokens reversed.

        On a CPU, PyTorch has a fused kernel for these, five times as fast in training as a packed sequence. ONNX's
        bidirectional LSTM has a length input, but OpenVINO 2026.4 starts the backward direction of short clips in
        the padding all the same (scores off by .05), and TensorRT has no FP16 kernel with lengths.
        """
        run = self._onnx_direction if torch.compiler.is_exporting() else self._cpu_direction
        reverse = _reversed_tokens(x, num_tokens)
        for layer in range(self.num_layers):
            forward = run(x, f"l{layer}")
            backward = _take_tokens(run(_take_tokens(x, reverse), f"l{layer}_reverse"), reverse)
            x = torch.cat([forward, backward], dim=2)
        return x

    def _cpu_direction(self, x: Tensor, weights: str) -> Tensor:
        start = x.new_zeros(1, len(x), self.hidden_size)
        flat = [getattr(self, f"{name}_{weights}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        out: Tensor = torch.lstm(x, (start, start), flat, True, 1, 0.0, self.training, False, True)[0]
        return out

    def _onnx_direction(self, x: Tensor, weights: str) -> Tensor:
        w, r = (_iofc(getattr(self, f"weight_{kind}_{weights}"))[None] for kind in ("ih", "hh"))
        b = torch.cat([_iofc(getattr(self, f"bias_{kind}_{weights}")) for kind in ("ih", "hh")])[None]
        steps = x.transpose(0, 1)  # ONNX: [tokens, batch, input] -> [tokens, 1, batch, hidden]
        out = torch.onnx.ops.symbolic(
            "LSTM",
            (steps, w, r, b),
            attrs={"hidden_size": self.hidden_size},
            dtype=x.dtype,
            shape=(steps.shape[0], 1, steps.shape[1], self.hidden_size),
        )
        return out.squeeze(1).transpose(0, 1)


def _reversed_tokens(x: Tensor, num_tokens: Tensor) -> Tensor:
    """int64 [batch * tokens]: for each token of x flattened, the one to take so that each clip's own are reversed."""
    batch, tokens = x.shape[:2]
    position = torch.arange(tokens, device=x.device)
    mirrored = torch.where(token_mask(x, num_tokens), num_tokens[:, None] - 1 - position, position)
    # Counted, and not `tokens` times the clip's number: ONNX Runtime would copy that factor to the GPU in each run, and
    # a graph with such a copy cannot be captured.
    place = torch.arange(batch * tokens, device=x.device).view(batch, tokens)
    return (place + (mirrored - position)).flatten()


def _take_tokens(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, order).view(x.shape)


def _iofc(gates: Tensor) -> Tensor:
    """PyTorch stacks an LSTM's gates as input, forget, cell, output; ONNX as input, output, forget, cell."""
    size = len(gates) // 4
    return torch.cat([gates[:size], gates[3 * size :], gates[size : 3 * size]])


def clip_mean(x: Tensor, num_tokens: Tensor) -> Tensor:
    """Mean of x [batch, tokens, width] over each clip's own tokens: [batch, width]."""
    padding = ~token_mask(x, num_tokens)
    return x.masked_fill(padding[:, :, None], 0.0).sum(dim=1) / num_tokens[:, None]

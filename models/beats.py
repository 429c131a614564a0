"""The BEATs trunk (arXiv 2212.09058): patches of a filterbank through a transformer with gated relative positions.

Written for whole batches of unequal clips: padding tokens are zeroed before the positional convolution and masked
as keys, so that a clip's tokens come out the same alone and in any batch.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aesanet.lengths import MIN_SAMPLES, PATCH_SIZE, num_tokens
from aesanet.models.config import GATE_PARTS, BEATsConfig
from aesanet.models.fbank import FrontEnd
from aesanet.models.public_beats import read_public


class BEATs(nn.Module):
    """A BEATs trunk of any size, from waveform to the hidden state of every layer."""

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder_embed_dim
        self.frontend = FrontEnd()
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, PATCH_SIZE, stride=PATCH_SIZE, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = nn.Linear(config.embed_dim, width) if config.embed_dim != width else nn.Identity()
        self.positions = ConvolutionalPositions(config)
        self.encoder_norm = nn.LayerNorm(width)
        self.relative_bias = RelativeBias(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "BEATs":
        """Load a public BEATs file (`{'cfg', 'model'}`), pre-trained or fine-tuned.

        Raises CheckpointError that names the key, the shape or the cfg value that does not fit.
        """
        config, state = read_public(path)
        beats = cls(config)
        beats.load_state_dict(state)
        return beats.eval()

    def hidden_states(self, waveform: Tensor, num_samples: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden states of every layer, and how many tokens of each clip are its own.

        waveform    : float32 [batch, samples], 16 kHz, in [-1, 1), padded at the end with anything
        num_samples : int64 [batch], each clip's own length, at least 2,800
        returns     : layers + 1 tensors float32 [batch, tokens, width], the first of them the input of layer 0;
                      num_tokens int64 [batch]
        """
        check_lengths(waveform, num_samples)
        tokens = num_tokens(num_samples)
        return self(self.frontend(waveform), tokens), tokens

    def forward(self, fbank: Tensor, num_tokens: Tensor) -> list[Tensor]:
        """fbank float32 [batch, frames, 128], num_tokens int64 [batch] -> layers + 1 x [batch, tokens, width]."""
        patches = self.patch_embedding(fbank[:, None])  # [batch, embed_dim, time patches, 8]
        x = self.post_extract_proj(self.layer_norm(patches.flatten(2).transpose(1, 2)))
        padding = ~token_mask(x, num_tokens)
        x = self.positions(x.masked_fill(padding[:, :, None], 0.0))
        x = self.encoder_norm(x)
        key_bias = torch.zeros_like(x[:, :, 0]).masked_fill(padding, -math.inf)[:, None, None]
        relative_bias = self.relative_bias(x.shape[1])
        hidden = [x]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], relative_bias, key_bias))
        return hidden


class ConvolutionalPositions(nn.Module):
    """x + GELU(grouped convolution of x over time): where a token stands among its neighbours."""

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        width, kernel = config.encoder_embed_dim, config.conv_pos
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=config.conv_pos_groups)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, tokens, width] -> the same shape."""
        # An even kernel with this padding gives one output too many, at the end.
        around = self.conv(x.transpose(1, 2))[:, :, : x.shape[1]]
        return x + F.gelu(around).transpose(1, 2)


class RelativeBias(nn.Module):
    """One learned value for each head and bucket of distance; a single table serves all layers."""

    bucket_of_distance: Tensor

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        self.max_distance = config.max_distance
        self.table = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        # Distances past max_distance share the last bucket, so a table of all the others is the whole function;
        # no logarithm is left in the graph, whose rounding could differ between engines.
        distances = range(-self.max_distance, self.max_distance + 1)
        buckets = [distance_bucket(d, config.num_buckets, self.max_distance) for d in distances]
        self.register_buffer("bucket_of_distance", torch.tensor(buckets), persistent=False)

    def forward(self, tokens: int) -> Tensor:
        """float32 [heads, tokens, tokens]: the bias of query i for key j depends on j - i."""
        position = torch.arange(tokens, device=self.bucket_of_distance.device)
        distance = (position[None] - position[:, None]).clamp(-self.max_distance, self.max_distance)
        by_distance = self.table.weight[self.bucket_of_distance].t()  # [heads, 2 * max_distance + 1]
        rows = by_distance.index_select(1, (distance + self.max_distance).flatten())
        return rows.view(-1, tokens, tokens)


class GatedAttention(nn.Module):
    """Multi-head self-attention whose relative position bias is scaled by a gate that each query computes."""

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        width, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.grep_linear = nn.Linear(config.head_width, GATE_PARTS)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, x: Tensor, relative_bias: Tensor, key_bias: Tensor) -> Tensor:
        """x [batch, tokens, width], relative_bias [heads, tokens, tokens], key_bias [batch, 1, 1, tokens]."""
        q, k, v = (self._split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        bias = self._gate(q) * relative_bias + key_bias
        attention = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias, dim=-1)
        out: Tensor = self.out_proj((attention @ v).transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        # To [batch, heads, tokens, head width].
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _gate(self, q: Tensor) -> Tensor:
        """The published "GRU" gate, from the query before its scaling: [batch, heads, tokens, 1]."""
        gates = torch.sigmoid(self.grep_linear(q).unflatten(3, (2, GATE_PARTS // 2)).sum(4))
        update, reset = gates.chunk(2, dim=3)
        return update * (reset * self.grep_a - 1) + 2


class EncoderLayer(nn.Module):
    """A post-norm transformer layer with DeepNorm's scaled residuals."""

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.residual_scale = config.residual_scale
        self.self_attn = GatedAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, relative_bias: Tensor, key_bias: Tensor) -> Tensor:
        """As `GatedAttention.forward`, and so are the shapes."""
        x = self.self_attn_layer_norm(self.residual_scale * x + self.self_attn(x, relative_bias, key_bias))
        out: Tensor = self.final_layer_norm(self.residual_scale * x + self.fc2(F.gelu(self.fc1(x))))
        return out


def distance_bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """T5's bidirectional buckets: near distances one each, far ones in logarithmic steps (spec of BEATs' encoder)."""
    half = num_buckets // 2
    near = half // 2
    side = half if distance > 0 else 0
    away = abs(distance)
    if away < near:
        return side + away
    step = int(math.log(away / near) / math.log(max_distance / near) * (half - near))
    return side + min(half - 1, near + step)


def token_mask(x: Tensor, num_tokens: Tensor) -> Tensor:
    """Bool [batch, tokens], true where a token of x [batch, tokens, width] is the clip's own."""
    return torch.arange(x.shape[1], device=x.device) < num_tokens[:, None]


def check_lengths(waveform: Tensor, num_samples: Tensor) -> None:
    """Raise ValueError unless every clip fits its row and fills at least one patch."""
    if waveform.ndim != 2 or num_samples.shape != waveform.shape[:1]:
        raise ValueError(
            f"waveform is {list(waveform.shape)} and num_samples {list(num_samples.shape)}; "
            "they must be [batch, samples] and [batch]"
        )
    shortest, longest = int(num_samples.min()), int(num_samples.max())
    if shortest < MIN_SAMPLES or longest > waveform.shape[1]:
        raise ValueError(
            f"num_samples goes from {shortest} to {longest}; it must lie between {MIN_SAMPLES} (one patch, 0.175 s) "
            f"and the waveform's {waveform.shape[1]}"
        )

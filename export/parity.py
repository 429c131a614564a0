"""Is what was exported what PyTorch computes? ONNX Runtime on unequal batches against the model on each clip alone."""

from pathlib import Path

import numpy as np
import torch

from aesanet.bundle import GRAPH_NAMES, Parity, ParityCase
from aesanet.errors import ExportError
from aesanet.export.sessions import ENGINE, open_sessions, run_graphs
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, num_frames, num_tokens
from aesanet.limits import FEATURES_LIMIT, SCORES_LIMIT
from aesanet.models.aesanet import AESANet
from aesanet.padding import pad_batch

_FEATURES_LIMIT, _SCORES_LIMIT = FEATURES_LIMIT["fp32"], SCORES_LIMIT["fp32"]

# Batches of unequal clips, in samples: full windows, the shortest clip, neither whole seconds nor whole patches.
CASES = (
    (10 * SAMPLE_RATE,),
    (10 * SAMPLE_RATE, 53_417, MIN_SAMPLES),
    (MIN_SAMPLES,),
    (31_999, 16_000, 24_001, 8_000, 4_321),
)


def measure_parity(model: AESANet, folder: Path) -> Parity:
    """Run every case through the ONNX files in `folder` and the model; raises ExportError past a limit."""
    sessions = open_sessions({name: folder / f"{name}.onnx" for name in GRAPH_NAMES})
    rng = np.random.default_rng(0)
    cases = []
    all_scores = []
    for lengths in CASES:
        waveform, num_samples = pad_batch([_varied_audio(rng, length) for length in lengths])
        fbank, features, scores = run_graphs(sessions, waveform, num_tokens(num_samples))
        differences = []
        for number, (clip, length) in enumerate(zip(waveform, lengths, strict=True)):
            own = slice(0, num_tokens(length))
            alone, one = torch.from_numpy(clip[None, :length]), torch.tensor([num_tokens(length)])
            with torch.inference_mode():
                their_fbank = model.frontend(alone)
                their_features = model.encoder(their_fbank, one)
                their_scores = model.head(their_features, one)
            if not (their_features.isfinite().all() and their_features.any() and their_scores.isfinite().all()):
                raise ExportError(
                    "this checkpoint's own features or scores of noise, in PyTorch, are no numbers, or all zero; "
                    "export one that was trained to its end"
                )
            differences.append(
                (
                    _max_abs(fbank[number, : num_frames(length)], their_fbank[0].numpy()),
                    relative_error(features[number, own], their_features[0].numpy()),
                    _max_abs(scores[number], their_scores[0].numpy()),
                )
            )
        all_scores.append(scores)
        cases.append(ParityCase(lengths, *np.max(differences, axis=0).tolist()))
    spread = float(np.ptp(np.concatenate(all_scores), axis=0).min())
    parity = Parity(
        engine=f"{ENGINE}, against PyTorch {torch.__version__}, FP32 eager",
        # NumPy's maximum of anything and NaN is NaN; Python's may not be.
        features_relative=float(np.max([case.features_relative for case in cases])),
        scores_max_abs=float(np.max([case.scores_max_abs for case in cases])),
        features_limit=_FEATURES_LIMIT,
        scores_limit=_SCORES_LIMIT,
        scores_spread=spread,
        cases=tuple(cases),
    )
    # `not <=`, so that it fails.
    if not (parity.features_relative <= _FEATURES_LIMIT and parity.scores_max_abs <= _SCORES_LIMIT):
        raise ExportError(
            "the exported graphs do not give the model's scores: "
            f"features differ by {parity.features_relative:.1e} (relatively; limit {_FEATURES_LIMIT:.0e}), "
            f"scores by {parity.scores_max_abs:.1e} (limit {_SCORES_LIMIT:.0e}); "
            "no bundle was written; try the versions that `pip install aesanet[export]` takes, and report it with this "
            "checkpoint's config"
        )
    return parity


def _varied_audio(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """float32 [samples]: noise whose level and colour change, so that clips do not sound alike to the model."""
    noise = rng.standard_normal(num_samples)
    smooth = np.convolve(noise, np.ones(8) / 8, mode="same")
    time = np.arange(num_samples) / SAMPLE_RATE
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 4) * time)
    return (rng.uniform(0.05, 0.3) * swell * (noise if rng.random() < 0.5 else smooth)).astype(np.float32)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, as Euclidean norms; NaN where either has one.

    What FP32 or FP16 leave of features depends on their size, and on that of what they were summed from.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _max_abs(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.max(np.abs(a - b)))

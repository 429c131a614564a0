"""Is what was exported what PyTorch computes? ONNX Runtime against the model, over unequal batches."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from aesanet.bundle import GRAPH_NAMES, Parity, ParityCase
from aesanet.errors import ExportError
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, num_tokens
from aesanet.models.aesanet import AESANet

FEATURES_LIMIT = SCORES_LIMIT = 1e-4

# Batches of unequal clips, in samples: full windows, the shortest clip, neither whole seconds nor whole patches.
CASES = (
    (10 * SAMPLE_RATE,),
    (10 * SAMPLE_RATE, 53_417, MIN_SAMPLES),
    (MIN_SAMPLES,),
    (31_999, 16_000, 24_001, 8_000, 4_321),
)


def measure_parity(model: AESANet, folder: Path) -> Parity:
    """Run every case through the ONNX files in `folder` and the model; raises ExportError past a limit."""
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in GRAPH_NAMES
    }
    rng = np.random.default_rng(0)
    cases = []
    for lengths in CASES:
        waveform = np.zeros((len(lengths), max(lengths)), np.float32)
        for row, length in zip(waveform, lengths, strict=True):
            row[:length] = _varied_audio(rng, length)
        tokens = num_tokens(np.array(lengths))

        (fbank,) = sessions["frontend"].run(["fbank"], {"waveform": waveform})
        (features,) = sessions["encoder"].run(["features"], {"fbank": fbank, "num_tokens": tokens})
        (scores,) = sessions["head"].run(["scores"], {"features": features, "num_tokens": tokens})

        with torch.inference_mode():
            their_fbank = model.frontend(torch.from_numpy(waveform))
            their_features = model.encoder(their_fbank, torch.from_numpy(tokens))
            their_scores = model.head(their_features, torch.from_numpy(tokens))
        own = np.arange(features.shape[1]) < tokens[:, None]
        cases.append(
            ParityCase(
                lengths,
                fbank_max_abs=_max_abs(fbank, their_fbank.numpy()),
                features_max_abs=_max_abs(features[own], their_features.numpy()[own]),
                scores_max_abs=_max_abs(scores, their_scores.numpy()),
            )
        )
    parity = Parity(
        engine=f"onnxruntime {onnxruntime.__version__}, CPU, against PyTorch {torch.__version__}, FP32 eager",
        features_max_abs=max(case.features_max_abs for case in cases),
        scores_max_abs=max(case.scores_max_abs for case in cases),
        features_limit=FEATURES_LIMIT,
        scores_limit=SCORES_LIMIT,
        cases=tuple(cases),
    )
    # `not <=`, so that NaN fails too.
    if not (parity.features_max_abs <= FEATURES_LIMIT and parity.scores_max_abs <= SCORES_LIMIT):
        raise ExportError(
            f"the exported graphs do not give the model's scores: features differ by {parity.features_max_abs:.1e} "
            f"(limit {FEATURES_LIMIT:.0e}), scores by {parity.scores_max_abs:.1e} (limit {SCORES_LIMIT:.0e})"
        )
    return parity


def _varied_audio(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """float32 [samples]: noise whose level and colour change, so that clips do not sound alike to the model."""
    noise = rng.standard_normal(num_samples)
    smooth = np.convolve(noise, np.ones(8) / 8, mode="same")
    time = np.arange(num_samples) / SAMPLE_RATE
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 4) * time)
    return (rng.uniform(0.05, 0.3) * swell * (noise if rng.random() < 0.5 else smooth)).astype(np.float32)


def _max_abs(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)))

"""What the trained part of the network takes in, computed once a window and kept on disk.

With a frozen trunk that is the hidden states of all its layers, FP16 [layers, tokens, width]; with a trained trunk
the filterbank, FP32 [frames, 128]. One .npy a window, read by memory map.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from aesanet.errors import InputError
from aesanet.files import LEFT_OVER_SECONDS, replacing, sweep
from aesanet.lengths import MEL_BINS, MIN_SAMPLES, WindowPolicy, num_frames, num_tokens
from aesanet.models.aesanet import AESANet
from aesanet.models.config import BEATsConfig
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.row import Clip
from aesanet.runtime.windows import split_windows
from aesanet.training.background import ahead
from aesanet.training.dataset import Data, FoundClip, Trunk, Window, window_lengths
from aesanet.training.progress import Progress

NPY_HEADER = 128
"""Bytes before the values of an .npy of two or three axes."""

LARGEST_FP16 = 65504.0

FORMAT = 1
"""Counts the changes of what is computed from the same audio and weights, so that caches of older code are not read."""


def weights_sha256(module: nn.Module) -> str:
    """Over names, shapes, dtypes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def window_bytes(trunk: Trunk, beats: BEATsConfig, num_samples: int) -> int:
    """Of one window's file."""
    if trunk == "trained":
        return NPY_HEADER + 4 * num_frames(num_samples) * MEL_BINS
    return NPY_HEADER + 2 * beats.encoder_layers * num_tokens(num_samples) * beats.encoder_embed_dim


def cache_bytes(clips: Sequence[FoundClip], trunk: Trunk, beats: BEATsConfig, policy: WindowPolicy) -> int:
    """Of the whole cache of these clips, files with the same audio counted once."""
    lengths = {clip.sha256: window_lengths(clip.num_samples, policy) for clip in clips}
    return sum(window_bytes(trunk, beats, length) for windows in lengths.values() for length in windows)


def cached_data(
    model: AESANet,
    trunk: Trunk,
    clips: Sequence[FoundClip],
    policy: WindowPolicy,
    cache: Path,
    progress: Progress,
    share: tuple[int, int] = (0, 1),
) -> Data:
    """Fill the cache with what it lacks of these clips, and give them as Data.

    The folder's name is a key over format, trunk, weights and window, so nothing stale is read, and a fill that was
    killed goes on where it was. Each window is computed alone, in FP32: its bytes depend on nothing else.
    The model stays where it is, on the CPU or a GPU; `share` (k, n) computes the k-th of every n clips.

    Raises InputError where the disk lacks room, audio changed since it was found, or FP16 cannot hold a state.
    """
    weights = weights_sha256(model.encoder.beats) if trunk == "frozen" else ""  # the front end has none
    key = hashlib.sha256(f"{FORMAT} {trunk} {weights} {policy.window_samples}".encode()).hexdigest()[:16]
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, LEFT_OVER_SECONDS)  # other runs may be filling it
    windows = tuple(
        tuple(
            Window(folder / f"{clip.sha256}-{index}.npy", length)
            for index, length in enumerate(window_lengths(clip.num_samples, policy))
        )
        for clip in clips
    )
    unique = {clip.sha256: (clip, parts) for clip, parts in zip(clips, windows, strict=True)}
    beats = model.config.beats
    lacking = [part for _, parts in unique.values() for part in parts if not _is_whole(part, trunk, beats)]
    _check_room(sum(window_bytes(trunk, beats, part.num_samples) for part in lacking), folder)
    # The share is of all clips, not of those still lacking, which another process may be making fewer meanwhile.
    rank, size = share
    lacking_files = {part.file for part in lacking}
    mine = [one for one in list(unique.values())[rank::size] if any(part.file in lacking_files for part in one[1])]
    _fill(model, trunk, mine, policy, progress)
    labels = np.array([clip.label.scores for clip in clips], np.float32).reshape(-1, 4)
    return Data(tuple(clips), windows, labels)


def _is_whole(window: Window, trunk: Trunk, beats: BEATsConfig) -> bool:
    """Also its beginning: a machine that lost its power may leave a file of the right length full of zeros."""
    try:
        with open(window.file, "rb") as file:
            begins = file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
            return begins and os.fstat(file.fileno()).st_size == window_bytes(trunk, beats, window.num_samples)
    except OSError:
        return False


def _check_room(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: the cache needs {needed / 1e9:.2f} GB more, and the disk has {free / 1e9:.2f} GB free; "
            "give --cache a folder on a larger disk"
        )


def _fill(
    model: AESANet,
    trunk: Trunk,
    pending: Sequence[tuple[FoundClip, tuple[Window, ...]]],
    policy: WindowPolicy,
    progress: Progress,
) -> None:
    if not pending:
        return
    training = model.training
    model.eval()
    progress.start("filling the cache", len(pending))
    waveforms = ahead(pending, lambda one: _waveforms(*one, policy))
    for (clip, windows), parts in zip(pending, waveforms, strict=True):
        for window, waveform in zip(windows, parts, strict=True):
            if not _is_whole(window, trunk, model.config.beats):
                _write(window, _taken_in(model, trunk, waveform, clip))
        progress.step()
    progress.end()
    model.train(training)


def _waveforms(clip: FoundClip, windows: Sequence[Window], policy: WindowPolicy) -> list[np.ndarray]:
    """The clip's windows decoded, float32 [samples] each, as long as they were when it was found."""
    parts = [part for part in split_windows(clip_blocks(Clip(clip.file)), policy) if len(part) >= MIN_SAMPLES]
    if [len(part) for part in parts] != [window.num_samples for window in windows]:
        raise InputError(f"{clip.file}: changed while it was read; start again")
    return parts


@torch.inference_mode()
def _taken_in(model: AESANet, trunk: Trunk, waveform: np.ndarray, clip: FoundClip) -> np.ndarray:
    """What the trained part of the network takes in of one window: see the module."""
    device = model.encoder.layer_weights.device
    samples = torch.from_numpy(waveform)[None].to(device)
    if trunk == "trained":
        fbank: np.ndarray = model.frontend(samples)[0].cpu().numpy()
        return fbank
    states, _ = model.encoder.beats.hidden_states(samples, torch.tensor([len(waveform)], device=device))
    layers = torch.cat(states[1:])
    if not (largest := float(layers.abs().max())) <= LARGEST_FP16:
        raise InputError(
            f"{clip.file}: BEATs' hidden states reach {largest:g}, and FP16, which the cache keeps, ends at "
            f"{LARGEST_FP16:g}; --unfreeze keeps the filterbank instead"
        )
    halves: np.ndarray = layers.half().cpu().numpy()
    return halves


def _write(window: Window, values: np.ndarray) -> None:
    content = io.BytesIO()  # straight to a file, NumPy would not say that the disk is full
    np.save(content, values)
    with replacing(window.file) as beside:
        beside.write_bytes(content.getbuffer())

"""Decodes damaged audio files of many kinds, one a seed: `python tests/fuzz_audio.py FOLDER FIRST LAST`.

Each seed is printed before its file is decoded, so that a crash or a hang of a decoder's library, which ends the
process, has a name. test_fuzz.py runs some; by hand, run many.
"""

import io
import resource
import signal
import sys
import tarfile

import numpy as np
import soundfile

from aesanet.errors import ClipError
from aesanet.runtime.audio.decode import Heard, decode
from aesanet.runtime.rows.row import Clip

KINDS = [
    ("WAV", "PCM_16", 16_000, 1),
    ("WAV", "PCM_24", 44_100, 2),
    ("WAV", "FLOAT", 22_050, 1),
    ("WAV", "IMA_ADPCM", 22_050, 1),
    ("WAV", "MS_ADPCM", 22_050, 2),
    ("WAV", "GSM610", 8_000, 1),
    ("WAVEX", "PCM_16", 48_000, 6),
    ("FLAC", "PCM_16", 44_100, 2),
    ("FLAC", "PCM_24", 96_000, 1),
    ("MP3", "MPEG_LAYER_III", 44_100, 2),
    ("MP3", "MPEG_LAYER_III", 16_000, 1),
    ("OGG", "VORBIS", 44_100, 2),
    ("OGG", "VORBIS", 16_000, 1),
    ("OGG", "OPUS", 48_000, 2),
    ("OGG", "OPUS", 16_000, 1),
    ("AIFF", "PCM_16", 44_100, 1),
    ("CAF", "ALAC_16", 44_100, 2),
    ("W64", "PCM_16", 44_100, 1),
    ("RF64", "PCM_16", 44_100, 1),
    ("AU", "G721_32", 8_000, 1),
]
SECONDS = 1.5
HEADER_BYTES = 200
MAX_SECONDS = 10  # that decoding one file may take, on a busy machine
MAX_MEMORY_GROWTH = 400  # MB, over all files


def whole_files():
    """Bytes of one good file of each kind."""
    rng = np.random.default_rng(0)
    for container, subtype, rate, channels in KINDS:
        wave = 0.3 * np.sin(np.arange(round(rate * SECONDS)) * 0.1)[:, None] + rng.uniform(-0.1, 0.1, (1, channels))
        file = io.BytesIO()
        soundfile.write(file, wave, rate, format=container, subtype=subtype)
        yield file.getvalue()


def damaged(rng, files):
    """A file with one to three kinds of damage, and whether its checksums were mended."""
    data = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.integers(1, 4)):
        if len(data) < 8:
            break
        reach = min(len(data), HEADER_BYTES if rng.random() < 0.6 else len(data))
        at, count = int(rng.integers(reach)), int(2 ** rng.uniform(0, 12))
        match rng.integers(8):
            case 0 | 1:  # single bytes
                for place in rng.integers(reach, size=rng.integers(1, 9)):
                    data[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
            case 2:  # numbers at the edge
                edge = int(rng.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
                data[at : at + 4] = edge.to_bytes(4, str(rng.choice(["little", "big"])))
            case 3:
                data[at : at + count] = bytes(min(count, len(data) - at))
            case 4:
                data[at : at + count] = rng.bytes(count)
            case 5:
                del data[at : at + count]
            case 6:
                del data[at:]
            case 7:  # a part of another
                other = files[rng.integers(len(files))]
                start = int(rng.integers(len(other)))
                data[at:at] = other[start : start + count]
    mend = rng.random() < 0.5 and b"OggS" in data
    return bytes(mended(data) if mend else data), mend


def crc_table():
    """Of Ogg's checksum: RFC 3533, section 6."""
    for value in range(256):
        crc = value << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 * (crc >> 31)) & 0xFFFFFFFF
        yield crc


CRC = list(crc_table())


def mended(data):
    """With the checksums of its Ogg pages made right, without which damage to them is only ever left out."""
    start = data.find(b"OggS")
    while start >= 0 and start + 27 <= len(data):
        num_segments = data[start + 26]
        end = start + 27 + num_segments + sum(data[start + 27 : start + 27 + num_segments])
        data[start + 22 : start + 26] = bytes(4)
        crc = 0
        for byte in data[start:end]:
            crc = (crc << 8 & 0xFFFFFFFF) ^ CRC[crc >> 24 ^ byte]
        data[start + 22 : start + 26] = crc.to_bytes(4, "little")
        start = data.find(b"OggS", max(end, start + 4))
    return data


def heard(clips, channels):
    """Samples and end of each clip; asserts what holds for any."""
    samples, ended = [[] for _ in clips], {}
    for index, part in decode(clips, channels):
        assert index not in ended
        if isinstance(part, np.ndarray):
            assert part.dtype == np.float32
            assert part.ndim == 1
            assert np.isfinite(part).all()
            samples[index].append(part)
            continue
        ended[index] = part
        if isinstance(part, Heard):
            assert part.seconds > 0
        else:
            assert isinstance(part, ClipError)
            assert part.code in ("undecodable", "no_audio", "non_finite", "bad_sample_rate")
    assert ended.keys() == set(range(len(clips)))
    return [(b"".join(part.tobytes() for part in parts), ended[index]) for index, parts in enumerate(samples)]


def check(rng, data, folder, same=True):
    """Decodes a file, now and then as a tar's member: all of it and some parts, together and one of them alone.

    The one must be the `same` as among the others.
    """
    path, member = f"{folder}/damaged", None
    if rng.random() < 0.3:
        path, member = f"{folder}/damaged.tar", "a.wav"
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    else:
        with open(path, "wb") as file:
            file.write(data)
    clips = [Clip(path, member=member)]
    for _ in range(rng.integers(3)):
        start = float(rng.uniform(0, SECONDS))
        clips.append(Clip(path, start, start + float(rng.uniform(0.01, SECONDS)), member))
    channels = str(rng.choice(["mean", "left", "loudest"]))
    together = heard(clips, channels)
    index = rng.integers(len(clips))
    ((samples, end),) = heard([clips[index]], channels)
    if same:
        assert samples == together[index][0]
        assert getattr(end, "code", end) == getattr(together[index][1], "code", together[index][1])


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(folder, first, last):
    files = list(whole_files())
    for kind, data in zip(KINDS, files, strict=True):
        with open(f"{folder}/whole", "wb") as file:
            file.write(data)
        assert isinstance(heard([Clip(f"{folder}/whole")], "mean")[0][1], Heard), kind
    before = peak_megabytes()
    for seed in range(first, last):
        print(seed, flush=True)
        rng = np.random.default_rng(seed)
        data, is_mended = damaged(rng, files)
        signal.alarm(MAX_SECONDS)  # whose default action ends the process, even inside a library
        # For an Opus packet that is none, though its checksum is right, libsndfile 1.2.2 gives what is in its memory.
        check(rng, data, folder, same=not is_mended)
        signal.alarm(0)
        assert peak_megabytes() - before < MAX_MEMORY_GROWTH
    print(f"done, with {peak_megabytes() - before:.0f} MB more than before")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

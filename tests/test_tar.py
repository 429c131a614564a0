"""Tar shards: rows of their audio, and members decoded where they lie."""

import gzip
import io
import json
import os
import subprocess
import tarfile
import threading

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from aesanet.errors import ClipError, InputError
from aesanet.runtime.audio.decode import Heard, decode
from aesanet.runtime.audio.sources import SourceFile, open_source
from aesanet.runtime.rows import tar
from aesanet.runtime.rows.inputs import read_rows
from aesanet.runtime.rows.row import Clip, Row


def write_tar(path, members, **options):
    """`members` are names with bytes, or with TarInfo types."""
    with tarfile.open(path, "w", **options) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
                info.type, content = content, b""
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def rows(*inputs):
    return list(read_rows([os.fspath(path) for path in inputs]))


def names(path):
    return [row.given.get("member") for row in rows(path)]


def run(clip):
    *parts, (_, end) = decode([clip])
    return np.concatenate([np.zeros(0, np.float32), *(part for _, part in parts)]), end


def audio(container="WAV", seconds=2.0, rate=22_050, seed=0):
    file = io.BytesIO()
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(rate * seconds), 2))
    soundfile.write(file, wave, rate, format=container)
    return file.getvalue()


def test_rows_are_the_audio_of_samples_with_their_json(tmp_path):
    path = tmp_path / "shard.tar"
    about = {"text": "hello", "n": [1, 2.5, None]}
    write_tar(
        path,
        [
            ("0.wav", b""),
            ("0.json", json.dumps(about).encode()),
            ("1.json", b'"before"'),
            ("1.flac", b""),
            ("1.txt", b"not audio"),
            ("a.b/2.left.mp3", b""),
            ("a.b/2.right.MP3", b""),
            ("a.b/2.json", b"[1]"),
            ("a.b/2.json.bak", b"[2]"),
            ("c", tarfile.DIRTYPE),
            ("c/2.opus", b""),
            ("d.wav", tarfile.SYMTYPE),
            ("d.json", b"{}"),
            ("./._e.wav", b"what macOS keeps beside e.wav"),
            ("noname", b""),
            ("f.json", b'{"other": "sample"}'),
            ("g.wav", b""),
            ("0.ogg", b""),
        ],
    )
    assert [{key: value for key, value in row.given.items() if key != "path"} for row in rows(path)] == [
        {"member": "0.wav", "json": about},
        {"member": "1.flac", "json": "before"},
        {"member": "a.b/2.left.mp3", "json": [1]},
        {"member": "a.b/2.right.MP3", "json": [1]},
        {"member": "c/2.opus"},
        {"member": "d.wav", "json": {}},
        {"member": "g.wav"},
        {"member": "0.ogg"},
    ]
    assert all(row.given["path"] == str(path) for row in rows(path))
    assert rows(path)[2].clip() == Clip(str(path), member="a.b/2.left.mp3")


@pytest.mark.parametrize(
    "content", [b"{", b'{"x": NaN}', b"\xff\xfe\x00", b"[" * 100_000, b"1e999", b"", b"{}" + bytes(9)]
)
def test_json_that_is_none_is_left_out(tmp_path, content):
    write_tar(tmp_path / "a.tar", [("0.json", content), ("0.wav", b"")])
    assert [row.given for row in rows(tmp_path / "a.tar")] == [{"path": str(tmp_path / "a.tar"), "member": "0.wav"}]


def test_tars_in_folders_globs_and_manifests(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in ("b.tar", "a.TAR"):
        write_tar(tmp_path / "shards" / name, [(f"{name}.wav", b"")])
    (tmp_path / "shards" / "c.wav").touch()
    (tmp_path / "shards" / "d.tar.gz").touch()
    assert [row.given.get("member") for row in rows(tmp_path / "shards")] == ["a.TAR.wav", "b.tar.wav", None]
    assert [row.given.get("member") for row in rows(f"{tmp_path}/shards/*.tar")] == ["b.tar.wav"]
    lines = [
        {"path": "a.tar", "member": "x.wav", "end_time": 2, "id": 1},
        {"path": "a.tar"},
        {"path": "a.tar", "member": ""},
        {"path": "a.tar", "member": 5},
        {"path": "a.wav", "member": 5},
        {"path": "a.wav", "member": "of a choir"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = rows(tmp_path / "m.jsonl")
    assert found[0].clip() == Clip("a.tar", None, 2.0, "x.wav")
    for row in found[1:4]:
        with pytest.raises(ClipError, match="member is") as caught:
            row.clip()
        assert caught.value.code == "bad_row"
    assert [row.clip() for row in found[4:]] == [Clip("a.wav")] * 2


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "A.TAR.BZ2"])
def test_compressed_tars_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="uncompress it first"):
        rows(tmp_path / name)


def write_links(path, *members):
    """Members are names with bytes, or with the type of a link and what it leads to."""
    with tarfile.open(path, "w") as file:
        for name, *content in members:
            info = tarfile.TarInfo(name)
            if len(content) == 2:
                info.type, info.linkname = content
                file.addfile(info)
            else:
                info.size = len(content[0])
                file.addfile(info, io.BytesIO(content[0]))


def test_links_are_what_they_lead_to(tmp_path):
    path, hard, soft = tmp_path / "a.tar", tarfile.LNKTYPE, tarfile.SYMTYPE
    write_links(
        path,
        ("early.wav", soft, "d/link.wav"),
        ("./d/real.wav", audio(seconds=0.5)),
        ("d/hard.wav", hard, "./d/real.wav"),
        ("d/link.wav", soft, "hard.wav"),
        ("d/up.wav", soft, "../d/real.wav"),
        ("gone.wav", soft, "/data/real.wav"),
        ("one.wav", soft, "two.wav"),
        ("two.wav", soft, "one.wav"),
    )
    found = rows(path)
    assert len(found) == 8
    ends = {row.given["member"]: run(row.clip())[1] for row in found}
    assert {name for name, end in ends.items() if isinstance(end, ClipError)} == {"gone.wav", "one.wav", "two.wav"}
    assert all(end.seconds == 0.5 for end in ends.values() if not isinstance(end, ClipError))
    assert (ends["gone.wav"].code, ends["gone.wav"].message) == (
        "not_found",
        "a link to /data/real.wav, which is not in the tar",
    )


def test_links_that_tar_itself_writes(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.wav").write_bytes(audio(seconds=0.5))
    os.link(tmp_path / "d" / "1.wav", tmp_path / "d" / "2.wav")
    os.symlink("1.wav", tmp_path / "d" / "3.wav")
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", tmp_path, "./d"], check=True)
    found = rows(tmp_path / "a.tar")
    assert sorted(row.given["member"] for row in found) == ["./d/1.wav", "./d/2.wav", "./d/3.wav"]
    assert [run(row.clip())[1].seconds for row in found] == [0.5] * 3


@pytest.mark.parametrize("between", [[], [("b.wav", audio(seconds=0.5))]])
def test_a_name_that_a_tar_has_twice_is_an_error_each_time(tmp_path, between):
    """One row would be of the other's audio."""
    path = tmp_path / "a.tar"
    write_tar(path, [("a.wav", audio(seconds=0.5)), *between, ("a.wav", audio(seconds=0.2)), ("c.wav", audio())])
    codes = [getattr(run(row.clip())[1], "code", None) for row in rows(path)]
    assert codes == ["bad_row", *[None] * len(between), "bad_row", None]


def test_several_tars_in_one_lose_no_member_in_silence(tmp_path):
    parts = []
    for name in "ab":
        write_tar(tmp_path / name, [(f"{name}.wav", audio(seconds=0.5))])
        parts.append((tmp_path / name).read_bytes())
    (tmp_path / "both.tar").write_bytes(b"".join(parts))
    assert names(tmp_path / "both.tar") == ["a.wav", None]
    assert "several in one" in rows(tmp_path / "both.tar")[-1].error.message


def test_what_is_no_tar(tmp_path):
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("no tar\n" * 1_000)
    (tmp_path / "gzip.tar").write_bytes(gzip.compress(bytes(10_000)))
    os.mkfifo(tmp_path / "pipe.tar")
    codes = {
        "empty": "damaged_tar",
        "text": "damaged_tar",
        "gzip": "damaged_tar",
        "pipe": "not_a_file",
        "no": "not_found",
    }
    for name, code in codes.items():
        (row,) = rows(tmp_path / f"{name}.tar")
        assert (row.given, row.error.code) == ({"path": str(tmp_path / f"{name}.tar")}, code)
        assert run(Clip(row.given["path"], member="a.wav"))[1].code == code
    write_tar(tmp_path / "none.tar", [])
    assert rows(tmp_path / "none.tar") == []


def test_of_a_damaged_tar_what_comes_before_is_scored(tmp_path):
    path = tmp_path / "a.tar"
    whole = [(f"{n}.wav", audio(seed=n)) for n in range(4)]
    write_tar(path, whole)
    content = path.read_bytes()
    headers = [content.index(f"{n}.wav\0".encode()) for n in range(4)]
    third = headers[2]
    damaged = {
        "header": content[:third] + b"\xff" * 512 + content[third + 512 :],
        "in a header": content[: third + 100],
        "in a member": content[: third + 5_000],
    }
    for what, part in damaged.items():
        path.write_bytes(part)
        found = rows(path)
        assert [row.given.get("member") for row in found] == ["0.wav", "1.wav", None], what
        assert found[-1].error.code == "damaged_tar"
        assert str(third) in found[-1].error.message
        assert run(Clip(str(path), member="1.wav"))[1].seconds == 2.0
        assert run(Clip(str(path), member="2.wav"))[1].code == "damaged_tar"
    path.write_bytes(content[: headers[3]])  # between members, where many tools write no mark of the end
    assert names(path) == ["0.wav", "1.wav", "2.wav"]
    assert run(Clip(str(path), member="3.wav"))[1].code == "not_found"


def mend_checksum(content, header):
    """Makes what stands in a header look as if it was meant."""
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])


FIELDS = [0, 100, 124, 136, 156, 257, 345, 482]  # name, mode, size, time, type, magic, prefix, sparse
DAMAGE = st.sampled_from(
    [b"77777777777", b"\xff" * 12, b"\x80" + bytes(11), b"S", b"L", b"K", b"x", b"g", b"-1", b"\0"]
)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(
    damages=st.lists(
        st.tuples(st.integers(0, 14), st.sampled_from(FIELDS) | st.integers(0, 511), DAMAGE | st.binary(max_size=12)),
        min_size=1,
        max_size=3,
    ),
    cut=st.none() | st.integers(0, 9_000),
)
def test_any_damage_is_an_error_row_at_most(tmp_path_factory, form, damages, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    members = [("0.wav", b"x" * 700), ("long" * 40 + ".wav", b"y"), ("1.json", b"{}"), ("caf\u00e9/1.wav", b"")]
    write_tar(path, members, format=form)
    content = bytearray(path.read_bytes())
    for block, place, damage in damages:
        content[512 * block + place : 512 * block + place + len(damage)] = damage
        mend_checksum(content, 512 * block)
    path.write_bytes(content[:cut])
    found = rows(path)
    assert all(row.error is None for row in found[:-1])
    for row in found:
        if row.error is None:
            assert isinstance(run(row.clip())[1], ClipError)


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\xff" * 10 + b"\xfe\0", b"\x80" + bytes(3) + b"\xff" * 8, b"77777777777\0"]
)
def test_sizes_that_no_member_has_end_the_tar(tmp_path, size):
    """tarfile alone reads a member of a negative size again and again."""
    path = tmp_path / "a.tar"
    write_tar(path, [("0.wav", audio()), ("1.wav", audio())])
    content = bytearray(path.read_bytes())
    at = content.index(b"1.wav\0")
    content[at + 124 : at + 136] = size
    mend_checksum(content, at)
    path.write_bytes(content)
    assert names(path) == ["0.wav", None]
    assert rows(path)[-1].error.code == "damaged_tar"


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF"])
@pytest.mark.parametrize("part", [(None, None), (0.5, 1.5)])
def test_a_member_is_the_same_as_a_file(tmp_path, container, part):
    content = audio(container)
    (tmp_path / "a").write_bytes(content)
    write_tar(tmp_path / "a.tar", [("first.txt", b"some text"), ("x/a.wav", content), ("last.wav", audio(seed=1))])
    samples, end = run(Clip(str(tmp_path / "a"), *part))
    member, member_end = run(Clip(str(tmp_path / "a.tar"), *part, "x/a.wav"))
    assert isinstance(end, Heard)
    assert end == member_end
    np.testing.assert_array_equal(samples, member)
    assert len(samples) > 15_000


@pytest.mark.parametrize("suffix", ["m4a", "webm", "wv"])
def test_a_member_through_ffmpeg(tmp_path, monkeypatch, suffix):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "a.wav").write_bytes(audio())
    subprocess.run(
        ["ffmpeg", "-v", "error", "-nostdin", "-i", tmp_path / "a.wav", tmp_path / f"a.{suffix}"], check=True
    )
    content = (tmp_path / f"a.{suffix}").read_bytes()
    write_tar(tmp_path / "a.tar", [("0.wav", audio(seed=1)), (f"1.{suffix}", content), ("2.wav", audio(seed=2))])
    samples, end = run(Clip(str(tmp_path / f"a.{suffix}")))
    member, member_end = run(Clip(str(tmp_path / "a.tar"), member=f"1.{suffix}"))
    assert end == member_end
    assert end.seconds == pytest.approx(2.0, abs=0.1)
    np.testing.assert_array_equal(samples, member)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_all_kinds(tmp_path, form):
    odd = ["caf\u00e9.wav", os.fsdecode(b"caf\xe9.wav"), "a b/'$(x)/c.wav", "./d.wav", "/e.wav", "../f.wav"]
    odd += [] if form == tarfile.USTAR_FORMAT else ["n" * 300 + ".wav"]
    write_tar(tmp_path / "a.tar", [(name, audio(seconds=0.5, seed=n)) for n, name in enumerate(odd)], format=form)
    found = rows(tmp_path / "a.tar")
    assert len(found) == len(odd)
    for n, row in enumerate(found):
        (tmp_path / "alone.wav").write_bytes(audio(seconds=0.5, seed=n))
        np.testing.assert_array_equal(run(row.clip())[0], run(Clip(str(tmp_path / "alone.wav")))[0])


def test_a_tar_is_searched_once_for_all_members_and_again_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{n}.wav", audio(seconds=0.1, seed=n)) for n in range(50)])
    searched = []
    search = tar._Members.__iter__
    monkeypatch.setattr(tar._Members, "__iter__", lambda members: searched.append(1) or search(members))
    for n in range(50):
        assert isinstance(run(Clip(str(path), member=f"{n}.wav"))[1], Heard)
    assert len(searched) == 1
    assert run(Clip(str(path), member="50.wav"))[1].code == "not_found"
    write_tar(path, [(f"{n}.wav", audio(seconds=0.2, seed=n)) for n in range(51)])
    assert run(Clip(str(path), member="50.wav"))[1].seconds == pytest.approx(0.2)


def test_a_tar_that_is_known_does_not_wait_for_another(tmp_path, monkeypatch):
    known, slow = tmp_path / "known.tar", tmp_path / "slow.tar"
    for path in (known, slow):
        write_tar(path, [("a.wav", audio(seconds=0.5))])
    assert run(Clip(str(known), member="a.wav"))[1].seconds == 0.5
    begun, go_on = threading.Event(), threading.Event()
    search = tar._Members.__iter__

    def wait(members):
        begun.set()
        assert go_on.wait(60)
        return search(members)

    monkeypatch.setattr(tar._Members, "__iter__", wait)
    thread = threading.Thread(target=run, args=(Clip(str(slow), member="a.wav"),))
    thread.start()
    assert begun.wait(60)
    assert run(Clip(str(known), member="a.wav"))[1].seconds == 0.5
    go_on.set()
    thread.join()


def test_threads_read_one_tar_at_once(tmp_path, monkeypatch):
    path = str(tmp_path / "a.tar")
    write_tar(path, [(f"{n}.flac", audio("FLAC", seed=n)) for n in range(8)])
    expected = [run(Clip(path, member=f"{n}.flac"))[0] for n in range(8)]
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: run(Clip(path, member=f"{n % 8}.flac"))[0]}))
        for n in range(24)
    ]
    searched = []
    search = tar._Members.__iter__
    monkeypatch.setattr(tar._Members, "__iter__", lambda members: searched.append(1) or search(members))
    tar._index.cache_clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(searched) == 1
    assert all(np.array_equal(results[n], expected[n % 8]) for n in range(24))


@given(
    st.lists(
        st.tuples(st.integers(-5, 40), st.sampled_from([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END]), st.integers(0, 40))
    )
)
def test_a_member_as_a_file_object_is_one_of_bytes(tmp_path_factory, steps):
    path = tmp_path_factory.getbasetemp() / "bytes.tar"
    content = bytes(range(30))
    write_tar(path, [("0.txt", b"before"), ("1.wav", content), ("2.txt", b"after")])
    with open_source(str(path), "1.wav") as source:
        ours, reference = SourceFile(source), io.BytesIO(content)
        for offset, whence, count in steps:
            base = {io.SEEK_SET: 0, io.SEEK_CUR: reference.tell(), io.SEEK_END: len(content)}[whence]
            assert ours.seek(offset, whence) == reference.seek(max(0, base + offset))
            assert ours.read(count) == reference.read(count)
            assert ours.tell() == reference.tell()


def test_a_row_of_a_tar_without_a_member_says_so():
    with pytest.raises(ClipError, match="must name a file in it"):
        Row({"path": "a.tar"}).clip()

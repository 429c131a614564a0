"""Who changes a bundle, changes what it is by then: nobody's entry is lost, and none gets into another bundle."""

import logging
import multiprocessing
import os
import shutil
import threading
import time
from contextlib import ExitStack
from functools import partial

import msgspec
import pytest

from aesanet.bundle import read_manifest
from aesanet.errors import BundleError, ExportError
from aesanet.export.writer import change_manifest, changing, new_bundle

pytest.importorskip("fcntl", reason="the system has no locks of files")


def enter(kind, bundle, at_work, times=20):
    """Add entries as `aesanet verify` and `compile` do, slowly."""

    def change(manifest):
        if at_work is not None:
            at_work.set()
        time.sleep(0.002)
        engines = manifest.engines | {f"{kind} {len(manifest.engines)}": kind}
        return msgspec.structs.replace(manifest, engines=engines)

    for _ in range(times):
        change_manifest(bundle, change)


@pytest.mark.parametrize("start", [threading.Thread, multiprocessing.get_context("spawn").Process])
def test_no_entry_of_many_writers_is_lost(tiny_bundle, tmp_path, start):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    entering = [start(target=enter, args=(kind, bundle, None)) for kind in "abc"]
    for one in entering:
        one.start()
    for one in entering:
        one.join()
    engines = read_manifest(bundle).engines
    assert [key.split()[1] for key in engines] == [str(number) for number in range(60)]
    assert sorted(engines.values()) == sorted("abc" * 20)


def test_an_entry_for_the_old_bundle_does_not_get_into_the_new_one(tiny_bundle, tmp_path):
    """Who waits while another bundle takes the place waits for who changes that one, and changes it as it is then."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    anew = msgspec.structs.replace(read_manifest(bundle), engines={"new": "0"})
    at_work = threading.Event()
    with ExitStack() as new_one:
        with changing(bundle):
            late = threading.Thread(target=partial(enter, "late", bundle, at_work, times=1))
            late.start()
            assert not at_work.wait(0.2)
            bundle.rename(tmp_path / "old")
            shutil.copytree(tmp_path / "old", bundle)
            new_one.enter_context(changing(bundle))
        assert not at_work.wait(0.2)
        (bundle / "bundle.json").write_bytes(msgspec.json.encode(anew))
    late.join(10)
    assert read_manifest(bundle).engines == {"new": "0", "late 1": "late"}
    assert read_manifest(tmp_path / "old").engines == {}


def test_a_new_bundle_waits_for_who_changes_the_old_one(tiny_bundle, tmp_path, caplog):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    before = os.stat(bundle)

    def export():
        with new_bundle(bundle) as folder:
            shutil.copytree(tiny_bundle, folder, dirs_exist_ok=True)

    with caplog.at_level(logging.WARNING, "aesanet"), changing(bundle):
        exporter = threading.Thread(target=export)
        exporter.start()
        exporter.join(0.2)
        assert exporter.is_alive()
        assert os.path.samestat(os.stat(bundle), before)
    exporter.join(10)
    assert not os.path.samestat(os.stat(bundle), before)
    assert caplog.messages == [f"{bundle}: another command is changing it; waiting"]
    assert read_manifest(bundle).engines == {}


@pytest.mark.parametrize("locks", [True, False])
def test_a_bundle_that_is_not_there_is_told(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr("aesanet.files.fcntl", None)
    with pytest.raises(BundleError, match="no bundle here"):
        change_manifest(tmp_path / "none", lambda manifest: manifest)


def test_without_locks_a_bundle_is_changed_all_the_same(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("aesanet.files.fcntl", None)
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    enter("a", bundle, None, times=2)
    assert list(read_manifest(bundle).engines) == ["a 0", "a 1"]


def test_what_takes_the_place_while_an_export_waits_is_not_replaced(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    failed = []

    def export():
        try:
            with new_bundle(bundle) as folder:
                shutil.copytree(tiny_bundle, folder, dirs_exist_ok=True)
        except ExportError as error:
            failed.append(str(error))

    with changing(bundle):
        exporter = threading.Thread(target=export)
        exporter.start()
        exporter.join(0.2)
        bundle.rename(tmp_path / "old")
        bundle.mkdir()
        (bundle / "thesis.tex").write_text("years of work")
    exporter.join(10)
    assert (bundle / "thesis.tex").is_file()
    assert failed == [f"{bundle}: exists and is not a bundle; choose another name or move it away"]

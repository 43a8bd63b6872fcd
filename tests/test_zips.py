"""Photos in zip archives, and archives that are damaged or dangerous."""

import multiprocessing
import os
import struct
import tarfile
import zipfile
from functools import partial

import pytest
from helpers import gradient, jpeg, named, skips

import preprocess
from support import sources
from support.files import UserError
from support.sources import MAX_BYTES, list_photos, read_bytes

# Offsets in a central directory file header and sizes of records. APPNOTE.TXT, sections 4.3.7, 4.3.12 and 4.3.16.
CENTRAL_DIRECTORY_SIGNATURE = b"PK\x01\x02"
GENERAL_PURPOSE_BIT_FLAG = 8  # 2 bytes
ENCRYPTED = 1  # bit 0 of the general purpose bit flag
UNCOMPRESSED_SIZE = 24  # 4 bytes
FILE_NAME = 46
END_OF_CENTRAL_DIRECTORY_SIZE = 22


def central_header(archive, name):
    """The offset of the central directory file header of member `name`."""
    return archive.index(name, archive.index(CENTRAL_DIRECTORY_SIGNATURE)) - FILE_NAME


def test_a_zip_is_read_in_place_and_no_name_leads_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in ("img_align_celeba/000001.jpg", "../outside.jpg", "/absolute.jpg", "b/c.jpg"):
            archive.writestr(name, jpeg())
    out = tmp_path / "deep" / "out"
    preprocess.main([str(tmp_path / "photos.zip"), "--dataroot", str(out), "--sizes", "64"])
    written = list(tmp_path.rglob("*.png"))
    assert len(written) == 4 and {path.parent.parent for path in written} == {out / "64"}
    assert {"000001.png", "b__c.png"} < {path.name for path in written}


def test_dangerous_zips(tmp_path, capsys):
    """Members with encryption, a huge size, a wrong size or a wrong checksum are skipped."""
    path, out = tmp_path / "photos.zip", tmp_path / "out"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(MAX_BYTES + 1))
        archive.writestr("b\\good.jpg", jpeg())
        archive.writestr("bz.jpg", jpeg(), compress_type=zipfile.ZIP_BZIP2)
        for name in ("secret.jpg", "short.jpg", "torn.jpg"):
            archive.writestr(name, jpeg(), compress_type=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    after_local_name = data.index(b"torn.jpg") + len(b"torn.jpg")
    data[after_local_name + 92] ^= 0xFF  # a byte of the photo: the CRC is wrong now
    data[central_header(data, b"secret.jpg") + GENERAL_PURPOSE_BIT_FLAG] |= ENCRYPTED
    size = central_header(data, b"short.jpg") + UNCOMPRESSED_SIZE
    assert struct.unpack_from("<I", data, size) == (len(jpeg()),)
    struct.pack_into("<I", data, size, 99)
    path.write_bytes(data)
    preprocess.main([str(path), "--dataroot", str(out), "--sizes", "64"])
    reasons = skips(out)
    assert named(out) == ["b__good", "bz"]
    assert set(reasons) == {"bomb.jpg", "secret.jpg", "short.jpg", "torn.jpg"}
    assert "encrypted" in reasons["secret.jpg"] and reasons["bomb.jpg"].startswith("too large")
    assert "CRC" in reasons["torn.jpg"]
    assert "3 unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_read_a_zip_that_holds_its_own_list(tmp_path, monkeypatch, capsys, method):
    """As Kaggle's archive does. The parent opens the zip to read the list, and no worker may use that handle."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("list_eval_partition.csv", "".join(f"{number}.jpg,0\n" for number in range(80)))
        for number in range(80):
            archive.writestr(f"{number}.jpg", jpeg(gradient(100 + number, 140)))
    monkeypatch.setattr(multiprocessing, "get_context", partial(multiprocessing.get_context, method))
    out = tmp_path / "out"
    preprocess.main([str(tmp_path / "photos.zip"), "--dataroot", str(out), "--sizes", "64", "--workers", "4"])
    assert len(named(out)) == 80 and skips(out) == {}
    assert "warning" not in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_handle_that_was_opened_before_a_fork_is_not_used_after_it(tmp_path, monkeypatch):
    path, opened, open_zip = tmp_path / "photos.zip", [], zipfile.ZipFile
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", jpeg())
    photo = list_photos(path)[0]
    monkeypatch.setattr(zipfile, "ZipFile", lambda src: opened.append(os.getpid()) or open_zip(src))
    assert read_bytes(path, photo) == read_bytes(path, photo) == jpeg() and opened == [os.getpid()]
    child = os.fork()
    if child == 0:
        os._exit(read_bytes(path, photo) != jpeg() or opened[1:] != [os.getpid()])
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("bad, warned", [(1, False), (2, True)])
def test_many_unreadable_photos_are_a_warning(tmp_path, capsys, bad, warned):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(101):
            archive.writestr(f"{number}.jpg", jpeg()[: 400 if number < bad else None])
    preprocess.main([str(tmp_path / "photos.zip"), "--dataroot", str(tmp_path / "out"), "--sizes", "8", "--workers=0"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{bad} unreadable" in last and ("warning: 2% of the photos cannot be read" in last) == warned


@pytest.mark.parametrize("name, content, words", [
    ("photos.zip", None, "not a whole zip .*copy the zip again"),
    ("photos.zip", b"<!DOCTYPE html><title>Quota exceeded</title>", "an HTML page; download the zip itself"),
    ("photos.zip", b"\n<!-- a -->\n<html>", "an HTML page; download the zip itself"),
    ("photos.7z", b"7z\xbc\xaf\x27\x1c", ".*archive; unpack it and give the folder"),
    ("photos.tgz", b"\x1f\x8b\x08", ".*archive; unpack it and give the folder"),
    ("photos.tar", "tar", ".*archive; unpack it and give the folder"),
    ("photo.jpg", jpeg(), "one image; give the folder that holds it"),
    ("photos.zip", b"", "copy the zip again"),
])
def test_sources_that_are_neither_a_folder_nor_a_zip(tmp_path, name, content, words):
    path = tmp_path / name
    if content == "tar":
        (tmp_path / "a.jpg").write_bytes(jpeg())
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "a.jpg", "a.jpg")
    elif content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jpg", jpeg())
        path.write_bytes(path.read_bytes()[: -END_OF_CENTRAL_DIRECTORY_SIZE - 8])
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"SRC .*{name} is {words}" if content != b"" else words):
        preprocess.main([str(path), "--dataroot", str(tmp_path / "out")])


def test_names_of_a_zip_made_on_macos(tmp_path):
    """They are UTF-8 without the flag that says so. Names in the DOS code page stay what they are."""
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("M\xfcller.jpg", jpeg())
        archive.writestr("plain.jpg", jpeg())
    path.write_bytes(path.read_bytes().replace(b"\x14\0\0\x08", b"\x14\0\0\0"))  # version 2.0 and the flag
    assert zipfile.ZipFile(path).namelist()[0] == "M\u251c\u255dller.jpg"
    assert [photo.key for photo in list_photos(path)] == ["M\xfcller.jpg", "plain.jpg"]
    path.write_bytes(path.read_bytes().replace("M\xfcller".encode(), b"M\x81\x82ller"))
    assert [photo.key for photo in list_photos(path)] == ["M\xfc\xe9ller.jpg", "plain.jpg"]


@pytest.mark.parametrize("zipped", [True, False])
def test_films_and_notes_next_to_photos_are_not_images(tmp_path, monkeypatch, zipped):
    """However large. A file with the suffix of an image that holds none is unreadable."""
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    for name, content in {"a.jpg": jpeg(), "b.MOV": bytes(20_000), "c.MOV": bytes(9), "d.png": bytes(9)}.items():
        (src / name).write_bytes(content)
    (src / "e.jpg").write_bytes(bytes(20_000))
    monkeypatch.setattr(sources, "MAX_BYTES", 10_000)
    if zipped:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for path in src.iterdir():
                archive.write(path, path.name)
    preprocess.main([str(tmp_path / "photos.zip" if zipped else src), "--dataroot", str(out), "--sizes", "64"])
    kinds = {name: reason.partition(":")[0] for name, reason in skips(out).items()}
    assert kinds == {"b.MOV": "not an image", "c.MOV": "not an image", "d.png": "unreadable", "e.jpg": "too large"}

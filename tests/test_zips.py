"""Photos in zip archives, and archives that are damaged or dangerous."""

import struct
import zipfile

from helpers import jpeg, named, skips

import preprocess
from support.sources import MAX_BYTES

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


def test_a_zip_is_read_in_place_and_dangerous_members_are_skipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in ("img_align_celeba/000001.jpg", "../outside.jpg", "/absolute.jpg", "b/c.jpg"):
            archive.writestr(name, jpeg())
    out = tmp_path / "deep" / "out"
    preprocess.main([str(tmp_path / "photos.zip"), "--dataroot", str(out), "--sizes", "64"])
    assert sorted(path.stem for path in out.rglob("*.png")) == ["000001", "b__c"]
    assert (out / "skipped.txt").read_text().count("leads out") == 2
    assert not list(tmp_path.rglob("outside*"))


def test_dangerous_zips(tmp_path, capsys):
    """Members with encryption, a huge size, bzip2 (unbounded memory), a wrong size or a wrong checksum are skipped."""
    path, out = tmp_path / "photos.zip", tmp_path / "out"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(MAX_BYTES + 1))
        archive.writestr("C:\\windows.jpg", jpeg())
        archive.writestr("b\\good.jpg", jpeg())
        archive.writestr("bz.jpg", bytes(10**6), compress_type=zipfile.ZIP_BZIP2)
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
    assert named(out) == ["b__good"]
    assert set(reasons) == {"bomb.jpg", "C:/windows.jpg", "bz.jpg", "secret.jpg", "short.jpg", "torn.jpg"}
    assert reasons["secret.jpg"] == "encrypted" and reasons["bomb.jpg"].startswith("too large")
    assert reasons["bz.jpg"] == "unusual compression" and "CRC" in reasons["torn.jpg"]
    assert "1 encrypted" in capsys.readouterr().out


def test_truncated_zip(tmp_path, run_script, refused):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", jpeg())
    path.write_bytes(path.read_bytes()[: -END_OF_CENTRAL_DIRECTORY_SIZE - 8])
    refused(run_script("preprocess.py", path), "photos.zip", "copy the zip again")

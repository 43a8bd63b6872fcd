"""Which split a photo belongs to: support/splits.py, through preprocess.py."""

import zipfile

import pytest
from helpers import gradient, jpeg, skips

import preprocess
from support.files import UserError
from support.sources import Photo, list_photos
from support.splits import assign_splits, hash_split


def splits_of(folder):
    """{name of a crop: its split} in the data root `folder`."""
    return {path.stem: path.parent.name for path in folder.rglob("*.png")}


def test_the_hash_puts_a_tenth_into_the_test_split():
    splits = [hash_split(f"{i:06d}") for i in range(5000)]
    assert 0.08 < splits.count("test") / 5000 < 0.12
    assert set(splits) == {"train", "test"}


def test_new_photos_do_not_change_the_split_of_old_ones(tmp_path, convert):
    for first, last in ((0, 40), (40, 80)):
        for i in range(first, last):
            (tmp_path / "src" / f"{i}.jpg").write_bytes(jpeg())
        out = convert()
        splits = {path.stem: path.parent.name for path in out.rglob("*.png")}
        assert len(splits) == last and set(splits.values()) == {"train", "test"}
        assert splits == {str(i): hash_split(str(i)) for i in range(last)}


def test_partition_in_the_parent_folder_of_src(tmp_path, convert):
    for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg"):
        gradient().save(tmp_path / "src" / name)
    (tmp_path / "list_eval_partition.txt").write_text("1.jpg 0\n2.jpg 1\n3.jpg 2\n")
    out = convert()
    found = {path.stem: path.parent.name for path in out.rglob("*.png")}
    assert found == {"1": "train", "2": "valid", "3": "test"}
    assert "4.jpg: not in list_eval_partition.txt" in (out / "skipped.txt").read_text()


def test_partition_with_commas_a_header_and_folders(tmp_path, convert):
    """The list is inside SRC, and preprocess.py does not take it for a photo."""
    (tmp_path / "src" / "a").mkdir()
    for name in ("1.jpg", "a/1.jpg"):
        (tmp_path / "src" / name).write_bytes(jpeg())
    (tmp_path / "src" / "list_eval_partition.txt").write_text("image_id,partition\n1.jpg,1\na/1.jpg,2\n")
    out = convert()
    assert {path.stem: path.parent.name for path in out.rglob("*.png")} == {"1": "valid", "a__1": "test"}
    assert skips(out) == {}


def test_a_different_partition_does_not_put_a_photo_into_both_splits(tmp_path, convert):
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    for number in (0, 2):
        (tmp_path / f"{number}.txt").write_text(f"a.jpg {number}\n")
    convert("--partition", str(tmp_path / "0.txt"))
    with pytest.raises(UserError, match="same --partition"):
        convert("--partition", str(tmp_path / "2.txt"))


# ---------------------------------------------------------------------------------------------- finding the list

LISTS = {
    "list_eval_partition.txt": "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n",
    "list_eval_partition.csv": "image_id,partition\n000001.jpg,0\n000002.jpg,1\n000003.jpg,2\n",
}
LISTED = ["train", "valid", "test"]


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("src, folder", [
    ("x/y/z", "x/y/z"), ("x/y/z", "x/y"), ("x/y/z", "x"), ("x/y", "x/y/z"), ("x", "x/y/z"), ("x/y/z", "x/Eval"),
    ("x", "x/y"), ("x/../x/y/z", "x"),
])
def test_a_list_in_or_near_src_is_found(tmp_path, monkeypatch, capsys, src, folder, name):
    photos = tmp_path / "x" / "y" / "z"
    (tmp_path / "x" / "Eval").mkdir(parents=True)
    photos.mkdir(parents=True)
    for number in (1, 2, 3):
        (photos / f"00000{number}.jpg").write_bytes(jpeg())
    (tmp_path / folder / name).write_text(LISTS[name])
    monkeypatch.chdir(tmp_path)
    preprocess.main([src, "--dataroot", "out", "--sizes", "64", "--workers", "0"])
    found = splits_of(tmp_path / "out")
    assert [found[crop] for crop in sorted(found)] == LISTED and skips(tmp_path / "out") == {}
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("split by ") and first.endswith(f"{name}: 1 train, 1 valid, 1 test")
    assert last.startswith("64: 3 written")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("prefix", ["", "celeba/"])
def test_a_list_inside_a_zip_is_found(tmp_path, prefix, name):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr(prefix + name, LISTS[name])
        for number in (1, 2, 3):
            archive.writestr(f"{prefix}img_align_celeba/img_align_celeba/00000{number}.jpg", jpeg())
    preprocess.main([str(tmp_path / "archive.zip"), "--dataroot", str(tmp_path / "out"), "--sizes", "64"])
    found = splits_of(tmp_path / "out")
    assert [found[crop] for crop in sorted(found)] == LISTED and skips(tmp_path / "out") == {}


def test_the_line_about_the_split_names_a_list_that_names_no_photo(tmp_path, convert, capsys):
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    convert()
    assert capsys.readouterr().out.startswith("split by a hash of the names: 1 train\n")
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 2\n")
    convert()
    first = capsys.readouterr().out.splitlines()[0]
    assert f"since {tmp_path / 'list_eval_partition.txt'} names none of the photos: 1 train" in first
    (tmp_path / "src" / "list_eval_partition.csv").write_text("a.jpg,0\n")  # another list does name it
    convert()
    assert "src/list_eval_partition.csv: 1 train" in capsys.readouterr().out.replace("\\", "/")


def test_the_line_about_the_split_counts_the_photos_that_give_crops(tmp_path, convert, capsys):
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "src" / "notes.txt").write_text("no photo")
    gradient(20, 20).save(tmp_path / "src" / "small.png")
    convert()
    convert()  # also when the crop is there already
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[2] == "split by a hash of the names: 1 train"


@pytest.mark.parametrize("content", [
    "\ufeff1.jpg 2\r\n2.jpg 0\r\n".encode(),
    "1.jpg 2\r\n2.jpg 0\r\n".encode("utf-16"),
    b"\xfe\xff" + "1.jpg,2\n2.jpg,0\n".encode("utf-16-be"),
    b"1.jpg 2\r2.jpg 0",
    b"1.jpg;2\n2.jpg;0\n",
    b'"image_id","partition"\r\n"1.jpg","2"\r\n"2.jpg","0"\r\n',
])
def test_lists_as_windows_and_spreadsheets_write_them(tmp_path, convert, content):
    """UTF-8 and UTF-16 with a byte-order mark, all line endings, semicolons and quotes. No line is lost."""
    for name in ("1.jpg", "2.jpg"):
        gradient().save(tmp_path / "src" / name)
    (tmp_path / "list.txt").write_bytes(content)
    out = convert("--partition", str(tmp_path / "list.txt"))
    assert splits_of(out) == {"1": "test", "2": "train"} and skips(out) == {}


def test_a_list_in_another_unicode_normal_form_names_the_photo(tmp_path, convert):
    (tmp_path / "src" / "e\u0301.jpg").write_bytes(jpeg())  # as macOS spells it
    (tmp_path / "list.txt").write_text("\xe9.jpg 2\n", encoding="utf-8")
    assert set(splits_of(convert("--partition", str(tmp_path / "list.txt"))).values()) == {"test"}


@pytest.mark.parametrize("keys, lines", [
    (("000001.png", "000002.png"), "000001.jpg 1\n000002.jpg 2\n"),
    (("000001.png", "000002.png"), "000001 1\n000002 2\n"),
    (("1.jpg", "2.jpg"), "img\\1.jpg 1\nimg\\2.jpg 2\n"),
    (("1.jpg", "2.jpg"), "celeba/img/1.jpg,1\nceleba/img/2.jpg,2\n"),
    (("img/1.webp", "img/2.webp"), "./img/1.jpg 1\n./img/2.jpg 2\n"),
    (("deep/img/1.jpg", "deep/img/2.jpg"), "img/1.jpg 1\nimg/2.jpg 2\n"),
    (("a/1.jpg", "b/1.jpg"), "x/a/1.jpg 1\nx/b/1.jpg 2\n"),
    (("1.jpg", "1.png"), "1.jpg 1\n1.png 2\n"),
])
def test_a_list_names_photos_that_were_converted_or_moved(keys, lines, tmp_path):
    (tmp_path / "list.txt").write_text(lines)
    photos, how = assign_splits(tmp_path, [Photo(key, key) for key in keys], tmp_path / "list.txt")
    assert [photo.split for photo in photos] == ["valid", "test"] and "list.txt" in how


def test_a_list_that_contradicts_itself_names_no_photo(tmp_path):
    """c.jpg is in no folder, and two folders of the list hold a c.jpg. What is not listed is not unreadable."""
    (tmp_path / "list.txt").write_text("a/c.jpg 0\nb/c.jpg 2\nd.jpg 0\n")
    photos = [Photo("c.jpg", "c"), Photo("d.jpg", "d"), Photo("e.jpg", "e")]
    found, _ = assign_splits(tmp_path, photos, tmp_path / "list.txt")
    assert [photo.reason for photo in found] == ["not in list.txt", "", "not in list.txt"]


@pytest.mark.parametrize("prefix", ["", "faces/"])
def test_folders_train_and_test_are_the_split(tmp_path, convert, capsys, prefix):
    """A list that is found comes first. Without a folder next to it, test is a name like others."""
    for name in ("train/1.jpg", "VAL/2.jpg", "test/deep/3.jpg", "4.jpg", "other/test/5.jpg"):
        (tmp_path / "src" / prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / prefix / name).write_bytes(jpeg())
    out = convert()
    splits = {name.rpartition("__")[2]: split for name, split in splits_of(out).items()}
    assert splits == {"1": "train", "2": "valid", "3": "test"}
    assert set(skips(out).values()) == {"not in a folder train, valid or test"} and len(skips(out)) == 2
    assert capsys.readouterr().out.startswith("split by the folders train, valid and test: 1 train, 1 valid, 1 test")
    listed, how = assign_splits(tmp_path / "src", list_photos(tmp_path / "src"), None)
    assert how.startswith("by the folders") and [photo.split for photo in listed].count("test") == 1
    (tmp_path / "list_eval_partition.txt").write_text("1.jpg 2\n3.jpg 0\n")
    listed, how = assign_splits(tmp_path / "src", list_photos(tmp_path / "src"), None)
    assert "list_eval_partition.txt" in how
    listed = {photo.key.rpartition("/")[2]: photo.split for photo in listed if photo.split}
    assert listed == {"1.jpg": "test", "3.jpg": "train"}


@pytest.mark.parametrize("keys", [
    ("test/1.jpg", "portraits/2.jpg"), ("train/1.jpg", "2.jpg"), ("a/train/1.jpg", "b/test/2.jpg"),
])
def test_other_folders_are_no_split(tmp_path, keys):
    photos, how = assign_splits(tmp_path / "x", [Photo(key, key) for key in keys])
    assert how == "by a hash of the names" and all(photo.split for photo in photos)

"""Folders of images: grey and colour, of mixed sizes, and files that are none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from telos.trials import UsageError, compare, load_task
from telos.trials.images import read_folder
from telos.trials.sources import data_files, fingerprint


def picture(value: int, *, size: tuple[int, int] = (10, 8), mode: str = "L") -> Image.Image:
    """A picture (width, height) of one brightness, with some of its own noise."""
    rng = np.random.default_rng(value)
    pixels = np.clip(value + rng.integers(-5, 6, (size[1], size[0])), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of eight grey pictures each: dark, medium, bright."""
    monkeypatch.chdir(tmp_path)
    for label, value in (("dark", 40), ("medium", 120), ("bright", 200)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for place in range(8):
            picture(value + place).save(tmp_path / "photos" / label / f"{place}.png")
    return tmp_path / "photos"


def test_classes_are_folders(photos: Path) -> None:
    task = load_task("photos")
    assert (task.name, task.classes, task.architecture) == ("photos", ("bright", "dark", "medium"), "conv")
    assert task.notices == ()
    assert "24 examples of photos in 3 classes, each with a grey image of 8 x 10 pixels" in task.description
    fold = task.fold(0)
    assert fold.info.input_shape == (1, 8, 10)
    assert [len(part["target"]) for part in (fold.train, fold.validation, fold.test)] == [15, 3, 6]
    torch.testing.assert_close(fold.train["inputs"].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(fold.train["inputs"].std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)
    # the brightest class has the brightest pictures, in every split
    for part in (fold.train, fold.validation, fold.test):
        brightness = part["inputs"].mean((1, 2, 3))
        assert brightness[part["target"] == 0].min() > brightness[part["target"] == 2].max()
    model = task.model(fold.info)
    assert model(fold.test["inputs"]).shape == (6, 3)
    assert 0 <= task.reference(fold, 0)["accuracy"] <= 1
    assert task.reference_name == "logistic regression"


def test_a_comparison_on_images(photos: Path) -> None:
    found = compare("photos", "cross_entropy,focal", seeds=1, trials=1, epochs=30)
    assert [entry.status for entry in found.entries] == ["finished", "finished"]
    # brightness alone tells the classes apart, and a net with means over the image can see it
    assert found.entries[0].mean("test_accuracy") > 0.6


def test_one_colour_picture_makes_all_of_them_colour(photos: Path) -> None:
    Image.new("RGB", (10, 8), (255, 0, 0)).save(photos / "dark" / "red.png")
    images = read_folder(photos)
    assert images.pixels.shape == (25, 3, 8, 10)
    place = [path.name for path in data_files("photos")].index("red.png")
    assert images.pixels[place, :, 0, 0].tolist() == [255, 0, 0]
    assert (images.pixels[0, 0] == images.pixels[0, 1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes(photos: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    if mode == "I;16":
        Image.fromarray(np.full((8, 10), 65535, dtype=np.uint16)).save(photos / "bright" / f"new.{suffix}")
    else:
        Image.new("L", (10, 8), 255).convert(mode).save(photos / "bright" / f"new.{suffix}")
    images = read_folder(photos)
    place = [path.stem for path in data_files("photos")].index("new")
    assert (images.pixels[place] == 255).all()
    assert images.pixels.shape[1] == (1 if mode in ("1", "L", "LA", "I;16") else 3)


def test_mixed_sizes_are_resized_and_said_to_be(photos: Path) -> None:
    picture(50, size=(30, 20)).save(photos / "dark" / "large.png")
    task = load_task("photos")
    assert task.fold(0).info.input_shape == (1, 32, 32)
    assert task.notices == ("images of 8x10 to 20x30 pixels are resized to 32x32; size= sets another size",)
    assert load_task("photos size=12").fold(0).info.input_shape == (1, 12, 12)
    assert "photos" in load_task("photos size=12 model=linear").description


def test_large_pictures_are_made_smaller(photos: Path) -> None:
    for path in photos.glob("*/*.png"):
        Image.open(path).resize((200, 200)).save(path)
    assert read_folder(photos).pixels.shape == (24, 1, 32, 32)
    assert read_folder(photos, size=100).pixels.shape == (24, 1, 100, 100)


def test_a_picture_that_lies_on_its_side_is_turned(photos: Path) -> None:
    lying = Image.fromarray(np.array([[10] * 8, *[[200] * 8] * 9], dtype=np.uint8))  # a dark line on top
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(photos / "bright" / "turned.png", exif=exif)
    images = read_folder(photos)
    assert images.pixels.shape[2:] == (8, 10)
    place = [path.stem for path in data_files("photos")].index("turned")
    assert (images.pixels[place, 0, :, -1] == 10).all()  # the line is at the right


def test_files_that_are_no_pictures_are_left_out_and_named(photos: Path) -> None:
    (photos / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    whole = (photos / "dark" / "0.png").read_bytes()
    (photos / "dark" / "half.png").write_bytes(whole[: len(whole) // 2])
    (photos / "dark" / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\nquit\n")
    (photos / "dark" / "notes.txt").write_text("no picture at all")
    (photos / "nothing").mkdir()
    task = load_task("photos")
    assert len(task.data.target) == 24
    assert task.notices == (
        "folders of photos without an image are left out: nothing",
        "images that cannot be read are left out: dark/broken.png, dark/half.png, dark/script.jpg",
    )


def test_a_test_folder(photos: Path) -> None:
    held = photos.parent / "held"
    for label in ("dark", "bright", "purple"):
        (held / label).mkdir(parents=True)
        for place in range(3):
            picture(90 + place).save(held / label / f"{place}.png")
    task = load_task("photos test=held")
    assert not task.resplits
    fold = task.fold(0)
    assert fold.test["target"].tolist() == [0, 0, 0, 1, 1, 1]
    assert len(fold.train["target"]) + len(fold.validation["target"]) == 24
    assert "classes of held that photos has not are left out: purple" in task.notices
    assert len(data_files("photos test=held")) == 33


def test_copies_are_said(photos: Path) -> None:
    (photos / "dark" / "again.png").write_bytes((photos / "bright" / "0.png").read_bytes())
    assert load_task("photos").notices == (
        "images that are exact copies of another: 1 of 25; copies may fall into different splits",
    )


def test_a_picture_in_another_class_is_other_data(photos: Path) -> None:
    before = fingerprint("photos")
    assert fingerprint("photos") == before
    (photos / "dark" / "0.png").rename(photos / "bright" / "new.png")
    assert fingerprint("photos") != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("empty", "photos holds no folders; an image folder has one for each class"),
        ("none", "photos holds no images"),
        ("one class", "photos holds images of one class only"),
        ("few", "class 'dark' of photos has 3 images and needs 4 to be in every split"),
        ("nested", "photos holds the folders train and test: name them as photos/train test=photos/test"),
    ],
)
def test_folders_from_which_nothing_can_be_learned(photos: Path, change: str, message: str) -> None:
    if change == "few":
        for place in range(5):
            (photos / "dark" / f"{place}.png").unlink()
    else:
        keep = ["medium"] if change == "one class" else []
        for folder in list(photos.iterdir()):
            for path in folder.iterdir():
                if folder.name not in keep:
                    path.unlink()
            if change in ("empty", "nested"):
                folder.rmdir()
    if change == "nested":
        for name in ("train/cat", "test/cat"):
            (photos / name).mkdir(parents=True)
            picture(9).save(photos / name / "0.png")
    with pytest.raises(UsageError, match=message):
        load_task("photos")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("target=y", "target= does not apply to photos, a folder of images; it takes model="),
        ("size=2", "size must be at least 4, got 2"),
        ("test=gone", "there is no file gone|must be of the same kind"),
    ],
)
def test_words_that_do_not_apply(photos: Path, words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(f"photos {words}")


def test_too_many_pixels(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telos.trials.images.LARGEST", 1000)
    with pytest.raises(UsageError, match="24 images of 8x10 pixels take more than 4 GB; set size="):
        load_task("photos")

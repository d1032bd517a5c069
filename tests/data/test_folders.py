"""Laws of folders of images, and of the shapes that are drawn without one."""

import numpy as np
import pytest
import torch
from PIL import Image

from pyrovae.data import load_data
from pyrovae.data.images import draw_shapes, read_folder

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, x, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **options)
    return x


@pytest.fixture
def classes(tmp_path):
    """A folder for each of two classes, and what is no image beside them."""
    found = {}
    for name, n in (("bird", 7), ("ant", 5)):
        for i in range(n):
            found[f"{name}/{i}.png"] = save(tmp_path / "set" / name / f"{i}.png", pixels(5, 7, 3))
    (tmp_path / "set" / "README.txt").write_text("photographs")
    (tmp_path / "set" / ".hidden.png").write_bytes(b"no image")
    return tmp_path / "set", found


def test_folders_are_classes_and_every_pixel_arrives(classes):
    folder, found = classes
    data = load_data(folder)
    assert data.shape == (3, 5, 7)
    assert [len(data.train), len(data.valid), len(data.test)] == [9, 1, 2]
    rows = torch.cat([data.train, data.valid, data.test])
    labels = torch.cat(list(data.labels))
    by_pixels = {
        (x.transpose(2, 0, 1) / np.float32(255)).tobytes(): name.split("/")[0]
        for name, x in found.items()
    }
    seen = [by_pixels.pop(row.numpy().tobytes()) for row in rows]
    assert [["ant", "bird"][y] for y in labels] == seen
    assert data.provenance["class_names"] == ["ant", "bird"]
    assert data.provenance["source"] == "set/, 12 images"


def test_torchvision_reads_the_same_images_in_the_same_order(classes):
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(classes[0])
    arrays, _ = read_folder(classes[0])
    assert arrays.classes == theirs.classes
    assert arrays.y.tolist() == theirs.targets
    for x, (image, _) in zip(arrays.x, theirs, strict=True):
        assert np.array_equal(x, np.asarray(image).transpose(2, 0, 1))


def test_the_digest_and_the_splits_are_those_of_the_files(classes):
    folder, _ = classes
    one, other = load_data(folder), load_data(folder, seed=5)
    assert torch.equal(one.train, other.train)
    assert one.provenance["sha256"] == other.provenance["sha256"]
    save(folder / "ant" / "0.png", pixels(5, 7, 3))
    assert load_data(folder).provenance["sha256"] != one.provenance["sha256"]
    (folder / "ant" / "0.png").rename(folder / "bird" / "00.png")
    assert len({load_data(folder).provenance["sha256"], one.provenance["sha256"]}) == 2


def test_a_flat_folder_has_no_labels_and_grey_images_one_channel(tmp_path):
    found = [save(tmp_path / f"{i}.png", pixels(4, 6)) for i in range(4)]
    arrays, _ = read_folder(tmp_path)
    assert arrays.y is None
    assert np.array_equal(arrays.x, np.stack(found)[:, None])
    save(tmp_path / "4.png", pixels(4, 6, 3))
    assert read_folder(tmp_path)[0].x.shape == (5, 3, 4, 6)


def test_folders_of_splits_fix_them(tmp_path):
    sizes = {"test": 3, "train": 4, "val": 2}
    found = {
        part: np.stack([save(tmp_path / part / "a" / f"{i}.png", pixels(4, 4)) for i in range(n)])
        for part, n in sizes.items()
    }
    data = load_data(tmp_path)
    for part, x in (("train", data.train), ("val", data.valid), ("test", data.test)):
        assert torch.equal(x, torch.from_numpy(found[part]).float()[:, None] / 255)
    assert data.provenance["split"] == "as given"


def test_photographs_are_turned_as_they_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    x = save(tmp_path / "a.png", pixels(4, 6), exif=exif)
    save(tmp_path / "b.png", pixels(6, 4))
    assert np.array_equal(read_folder(tmp_path)[0].x[0, 0], np.rot90(x, -1))


def test_opaque_palettes_are_colours(tmp_path):
    x = np.tile(pixels(1, 4, 3), (4, 1, 1))
    Image.fromarray(x).quantize(4).save(tmp_path / "a.png")
    assert np.array_equal(read_folder(tmp_path)[0].x[0], x.transpose(2, 0, 1))


def mixed_sizes(folder):
    save(folder / "z.png", pixels(4, 5))


def transparent(folder):
    save(folder / "z.png", pixels(4, 4, 4))


def deep(folder):
    save(folder / "z.png", pixels(4, 4).astype(np.uint16))


def damaged(folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "z.png").write_bytes(whole[: len(whole) // 2])


def no_image(folder):
    (folder / "z.png").write_text("no image")


def beside_a_class(folder):
    save(folder / "cat" / "z.png", pixels(4, 4))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (mixed_sizes, r"4x4 in .*a\.png and 5x4 in .*z\.png"),
        (transparent, r"transparent pixels in .*z\.png"),
        (deep, r"8 bits a channel, got mode I;16.* in .*z\.png"),
        (damaged, r"image in .*z\.png, got a file that is damaged"),
        (no_image, r"image in .*z\.png, got a file that is damaged"),
        (beside_a_class, "1 at the top beside the folder 'cat'"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(tmp_path, spoil, words):
    save(tmp_path / "a.png", pixels(4, 4))
    assert read_folder(tmp_path)[0].x.shape == (1, 1, 4, 4)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("1, 2")
    with pytest.raises(ValueError, match=r"Expected images in .* got no file that ends in \.jpg"):
        load_data(tmp_path)
    with pytest.raises(ValueError, match="Expected a table for columns"):
        load_data(tmp_path, columns={"a": "real"})


def test_shapes_are_what_their_labels_say():
    arrays = draw_shapes(150, 64)
    assert arrays.x.shape == (150, 3, 64, 64)
    assert arrays.x.dtype == np.uint8
    assert np.array_equal(arrays.x[:9], draw_shapes(150, 64).x[:9])
    ground = arrays.x[:, :, 0, 0].astype(int)
    assert (ground == ground[:, :1]).all()
    inside = abs(arrays.x.astype(int) - ground[:, :, None, None]).max(1) > 40
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    filled = inside.sum((1, 2)) / (rows * columns)
    # The share of its box that a shape fills: pi / 4, 1 and a half.
    for kind, share in enumerate((np.pi / 4, 1.0, 0.5)):
        assert np.median(filled[arrays.y == kind]) == pytest.approx(share, abs=0.05)

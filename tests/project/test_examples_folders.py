"""Image folders are found, split by class, and read; what is wrong with them is said."""

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("scipy")

import numpy as np
from PIL import Image
from scipy.io import savemat

from examples import data, folders, splits


def write_image(path, colour=(200, 30, 30), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_classes(root, names, count=3):
    for name in names:
        for i in range(count):
            write_image(root / name / f"{i}.png")


def names_of(classes):
    return {name: [path.name for path in paths] for name, paths in classes.items()}


def test_one_folder_a_class_first_half_to_train_on(tmp_path):
    write_classes(tmp_path, ["d", "b", "a", "c"], count=2)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._0.png").write_text("no image")
    found = folders.find(tmp_path)
    assert names_of(found.train) == {"a": ["0.png", "1.png"], "b": ["0.png", "1.png"]}
    assert names_of(found.test) == {"c": ["0.png", "1.png"], "d": ["0.png", "1.png"]}
    assert found.gallery is None


def test_cub_has_its_classes_under_images(tmp_path):
    birds = [f"{number:03}.Bird_{number}" for number in range(1, 11)]
    write_classes(tmp_path / "images", birds, count=1)
    write_classes(tmp_path / "segmentations", birds, count=1)
    found = folders.find(tmp_path)
    assert list(found.train) == birds[:5]
    assert list(found.test) == birds[5:]
    assert all(path.parts[-3] == "images" for paths in found.train.values() for path in paths)


def test_a_class_in_both_train_and_test_folders_is_one_class(tmp_path):
    for part in ("train", "test"):
        write_classes(tmp_path / part, ["a", "b", "c", "d"], count=1)
    found = folders.find(tmp_path)
    assert {name: len(paths) for name, paths in found.train.items()} == {"a": 2, "b": 2}


def test_cars_are_split_by_the_number_of_their_class(tmp_path):
    dtype = [("relative_im_path", "O"), ("class", "O"), ("test", "O")]
    rows = [(f"car_ims/{i:06}.jpg", number, 0) for i, number in enumerate([10, 9, 2, 1, 10, 9, 2, 1])]
    savemat(tmp_path / "cars_annos.mat", {"annotations": np.array(rows, dtype=dtype)})
    found = folders.find(tmp_path)
    assert list(found.train) == ["1", "2"]
    assert list(found.test) == ["9", "10"]
    assert found.test["10"] == [tmp_path / "car_ims/000000.jpg", tmp_path / "car_ims/000004.jpg"]


def test_online_products_are_split_by_their_lists(tmp_path):
    header = "image_id class_id super_class_id path\n"
    (tmp_path / "Ebay_train.txt").write_text(
        header + "1 1 1 bicycle_final/1_0.JPG\n2 1 1 bicycle_final/1_1.JPG"
    )
    (tmp_path / "Ebay_test.txt").write_text(header + "3 7 2 chair_final/7_0.JPG\n4 8 2 chair_final/8_0.JPG\n")
    found = folders.find(tmp_path)
    assert found.train == {"1": [tmp_path / "bicycle_final/1_0.JPG", tmp_path / "bicycle_final/1_1.JPG"]}
    assert list(found.test) == ["7", "8"]


@pytest.mark.parametrize("place", ["list_eval_partition.txt", "Eval/list_eval_partition.txt"])
def test_in_shop_queries_search_its_gallery(tmp_path, place):
    rows = [("a_0", "id_1", "train"), ("a_1", "id_1", "train")]
    rows += [("c_0", "id_3", "query"), ("b_0", "id_2", "query")]
    rows += [("b_1", "id_2", "gallery"), ("c_1", "id_3", "gallery"), ("c_2", "id_3", "gallery")]
    lines = ["7", "image_name item_id evaluation_status"]
    for name, item, part in rows:
        write_image(tmp_path / "img" / f"{name}.jpg")
        lines.append(f"img/{name}.jpg {item} {part}")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("\n".join(lines) + "\n")
    split = splits.open_split(f"folder:{tmp_path}", image_size=16)
    assert [path.stem for path in split.test.paths] == ["c_0", "b_0"]
    assert [path.stem for path in split.gallery.paths] == ["c_1", "c_2", "b_1"]
    assert split.test.labels.tolist() == [0, 1]
    assert split.gallery.labels.tolist() == [0, 0, 1]


def test_images_come_in_the_size_that_was_asked_for(tmp_path):
    write_image(tmp_path / "red.png", colour=(255, 0, 51), size=(70, 50))
    Image.new("L", (50, 90), 102).save(tmp_path / "grey.png")
    classes = {"red": [tmp_path / "red.png"], "grey": [tmp_path / "grey.png"]}
    for augment in (False, True):
        images, labels = folders.ImageFiles(classes, size=24, augment=augment)[[1, 0]]
        assert images.shape == (2, 3, 24, 24)
        assert labels.tolist() == [1, 0]
        assert images[0].sub(102 / 255).abs().max() < 0.01
        assert images[1].mean((1, 2)).sub(torch.tensor([1, 0, 0.2])).abs().max() < 0.01


def test_training_images_are_cropped_at_random_within_the_image():
    for width, height in ((300, 20), (20, 300), (64, 64)):
        boxes = [folders._random_box(width, height) for _ in range(300)]
        assert len(set(boxes)) == 300
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width + 1e-9
            assert 0 <= top < bottom <= height + 1e-9


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "0 classes"), (["only"], r"1 class of images \(only\)"), (["a", "b", "c"], "3 classes")],
)
def test_too_few_classes(tmp_path, names, message):
    write_classes(tmp_path, names)
    with pytest.raises(data.DataError, match=message + ".*at least 4 are needed"):
        folders.find(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(data.DataError, match=r"there is no folder .*nowhere"):
        splits.open_split(f"folder:{tmp_path / 'nowhere'}", image_size=16)


def test_classes_of_one_image_leave_nothing_to_find(tmp_path):
    write_classes(tmp_path, ["a", "b"])
    write_classes(tmp_path, ["c", "d"], count=1)
    with pytest.raises(data.DataError, match="no class to test on has two images"):
        splits.open_split(f"folder:{tmp_path}", image_size=16)


def test_a_broken_list_is_named(tmp_path):
    (tmp_path / "Ebay_train.txt").write_text("image_id class_id super_class_id path\n1 2 3\n")
    with pytest.raises(data.DataError, match=r"the list of images in .* cannot be read"):
        folders.find(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content == "cut":
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=r"cannot read the image .*broken\.png"):
        folders.ImageFiles({"a": [path]}, size=16, augment=False)[[0]]

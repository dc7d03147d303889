import pickle

import numpy as np
import pytest
import torch
from _data import cifar10, digits, image_folder
from PIL import Image

TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], "test_batch"


def pictures(count, first=0):
    """``(count, 3072)`` uint8, as CIFAR has it: 1024 reds, then greens, then blues."""
    return (np.arange(first, first + count * 3072) % 251).astype(np.uint8).reshape(count, 3072)


def write_cifar(folder, keys=bytes, protocol=2, count=2):
    """``count`` images a file in the published layout, keys and protocol (2)."""
    folder.mkdir()
    for number, name in enumerate([*TRAIN, TEST]):
        batch = {
            "batch_label": b"a batch",
            "labels": [number, 9 - number] * (count // 2),
            "data": pictures(count, first=number),
            "filenames": [b"a.png", b"b.png"] * (count // 2),
        }
        if keys is bytes:
            batch = {key.encode(): value for key, value in batch.items()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))


def test_digits_are_all_there_and_split_the_same_way_whatever_the_seed():
    data = digits()
    assert (len(data.train), len(data.test), data.classes) == (1437, 360, 10)
    assert data.train[0][0].shape == (1, 16, 16)
    assert data.train[0][0].dtype == torch.float32
    torch.manual_seed(1)
    again = digits(size=8)
    assert torch.equal(again.test.tensors[1], data.test.tensors[1])
    assert again.test[0][0].shape == (1, 8, 8)


def test_the_test_digits_hold_every_class_alike_and_none_of_the_training_images():
    data = digits(size=8)
    counts = torch.bincount(data.test.tensors[1])
    assert counts.max() - counts.min() <= 2
    trained = {image.numpy().tobytes() for image in data.train.tensors[0]}
    assert not trained & {image.numpy().tobytes() for image in data.test.tensors[0]}


def test_digits_are_standardised_by_the_training_images():
    images = digits().train.tensors[0]
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("keys", [bytes, str])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_cifar10_reads_the_published_format(tmp_path, keys, protocol):
    write_cifar(tmp_path / "cifar-10-batches-py", keys, protocol)
    data = cifar10(tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (10, 2, 10)
    assert [int(data.train[i][1]) for i in range(4)] == [0, 9, 1, 8]
    image, label = data.test[1]
    assert label == 4
    raw = torch.from_numpy(pictures(2, first=5)[1]).reshape(3, 32, 32)
    red = (raw[0] / 255 - 0.4914) / 0.2470
    assert torch.allclose(image[0], red, atol=1e-6)
    assert data.train[0][0].shape == (3, 32, 32)


def test_cifar10_takes_the_inner_folder_too(tmp_path):
    write_cifar(tmp_path / "inner")
    assert len(cifar10(tmp_path / "inner").test) == 2


def test_cifar10_says_which_files_are_missing_and_where_to_get_them(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3\. Download cifar-10-python"):
        cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data_batch_1, data_batch_2, .*unpack it, and"):
        cifar10(tmp_path / "nowhere")


class Asks:
    """A pickle that would run code as it is read."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "EOFError"),
        (b"not a pickle", "UnpicklingError"),
        (pickle.dumps({b"data": pictures(2)}), "KeyError: 'labels'"),
        (pickle.dumps({b"data": pictures(2), b"labels": [1]}), "RuntimeError"),
        (pickle.dumps([1, 2]), "IndexError"),
        (pickle.dumps({b"data": Asks(), b"labels": []}), "it asks for builtins.print"),
    ],
    ids=["empty", "text", "no labels", "too few labels", "a list", "code"],
)
def test_cifar10_refuses_what_is_not_a_batch(tmp_path, capsys, content, why):
    write_cifar(tmp_path / "cifar")
    (tmp_path / "cifar" / TEST).write_bytes(content)
    with pytest.raises(ValueError, match=f"test_batch is not a batch of the Python .*{why}"):
        cifar10(tmp_path / "cifar")
    assert capsys.readouterr().out == ""


def write_folder(folder, classes=("cat", "dog"), count=2):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            grey = (20 * number,) * 3
            Image.new("RGB", (50, 40), grey).save(folder / name / f"{number}.png")


def test_image_folder_reads_the_layout_of_imagenet(tmp_path):
    write_folder(tmp_path / "train", count=3)
    write_folder(tmp_path / "val")
    data = image_folder(tmp_path, size=32)
    assert (len(data.train), len(data.test), data.classes) == (6, 4, 2)
    image, label = data.test[3]
    assert label == 1
    assert image.shape == data.train[0][0].shape == (3, 32, 32)
    red, green, blue = (20 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, -1.4559
    assert image.mean((1, 2)).tolist() == pytest.approx([red, green, blue], abs=1e-3)


def test_image_folder_says_what_it_expected(tmp_path):
    write_folder(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"val is not a folder; expected .*train/<class>"):
        image_folder(tmp_path)
    write_folder(tmp_path / "val", classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"differ in the classes \['cow', 'dog'\]"):
        image_folder(tmp_path)

"""Labelled images by index, and batches of them that are a pure function of the step.

Names of datasets:

    digits       scikit-learn's handwritten digits, prepared on first use, see `digits_tfds`
    tfds:NAME    any TFDS dataset with `image` and `label` that is prepared for random access
    npz:FILE     train_images, train_labels, test_images, test_labels: uint8 [N, H, W, C], int [N]
    folder:DIR   image files in a folder for each class, only to test with
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Example = tuple[np.ndarray, int]  # image uint8 [H, W, C], label


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images to train on and to test with.

    Attributes:
      train: examples by index, None where there are only test images; likewise `test`.
      test: see `train`.
      names: of the classes; labels are their indices.
      shape: (H, W, C) of every image, None where sizes differ.
      mirror: whether an image's mirror image may show its class.
      identity: equal only for equal data.
    """

    train: Sequence[Example] | None
    test: Sequence[Example]
    names: tuple[str, ...]
    shape: tuple[int, int, int] | None
    mirror: bool
    identity: str


class Arrays:
    """Examples in memory: images uint8 [N, H, W, C], labels int [N]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Example:
        return self.images[i], int(self.labels[i])


class TfdsSource:
    """Examples of a TFDS data source."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        example = self.source[i]
        return example["image"], int(example["label"])


class Folder:
    """Image files below a folder, sorted; labels are the indices of their folders in `names`."""

    def __init__(self, directory: Path):
        kinds = (".jpg", ".jpeg", ".png")
        self.files = sorted(f for f in directory.rglob("*") if f.suffix.lower() in kinds)
        self.names = tuple(sorted({f.parent.name for f in self.files}))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Example:
        from PIL import Image

        with Image.open(self.files[i]) as image:
            pixels = np.asarray(image.convert("RGB"))
        return pixels, self.names.index(self.files[i].parent.name)


def open_dataset(name: str, cache: Path | None = None) -> Dataset:
    """The dataset of a name, see the module's docstring.

    Args:
      name: one of the forms that the module names.
      cache: where `digits` is prepared, by default ~/.cache/mcjax.

    Raises:
      ValueError: if there is no such dataset, it is not prepared, or it is malformed.
    """
    kind, _, rest = name.partition(":")
    if name == "digits":
        return _digits(cache or Path.home() / ".cache" / "mcjax")
    if kind == "tfds" and rest:
        return _tfds(rest)
    if kind == "npz" and rest:
        return _npz(Path(rest))
    if kind == "folder" and rest:
        source = Folder(Path(rest))
        if not len(source):
            raise ValueError(f"{rest} holds no JPEG or PNG files")
        return Dataset(
            train=None, test=source, names=source.names, shape=None, mirror=True, identity=name
        )
    raise ValueError(f"dataset must be digits, tfds:NAME or npz:FILE, got {name!r}")


def _import_tfds():
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError("digits and tfds: need the extra: pip install 'mcjax[train]'") from None
    return tfds


@contextlib.contextmanager
def no_litter():
    """Removes the temporary folder that TFDS makes, and leaves, for each dataset it opens."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


@no_litter()
def _digits(cache: Path) -> Dataset:
    tfds = _import_tfds()
    from digits_tfds import Digits

    builder = Digits(data_dir=str(cache), file_format="array_record")
    if not (builder.data_path / "dataset_info.json").exists():
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # where --json is to be
            builder.download_and_prepare()
    train, test = (TfdsSource(builder.as_data_source(split)) for split in ("train", "test"))
    return Dataset(
        train=train,
        test=test,
        names=tuple(builder.info.features["label"].names),
        shape=(8, 8, 1),
        mirror=False,
        identity=f"{builder.info.full_name}/{len(train)}",
    )


@no_litter()
def _tfds(name: str) -> Dataset:
    tfds = _import_tfds()
    try:
        builder = tfds.builder(name, file_format="array_record")
    except Exception as error:  # TFDS raises many kinds
        raise ValueError(f"cannot open tfds:{name}: {str(error).splitlines()[0]}") from None
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise ValueError(f"tfds:{name} must have features 'image' and 'label', has {[*features]}")
    splits = tuple(builder.info.splits)
    # The test split of ImageNet has no labels, which is why a validation split goes first.
    held_out = next((s for s in ("validation", "test") if s in splits), "test")

    def source(split):
        try:
            return TfdsSource(builder.as_data_source(split))
        except Exception:  # TFDS raises many kinds
            raise ValueError(
                f"tfds:{name} is not prepared for random access in {builder.data_dir}; once run: "
                'python -c "import tensorflow_datasets as t; '
                f"t.builder('{name}', file_format='array_record').download_and_prepare()\""
            ) from None

    train = source("train") if "train" in splits or not splits else None
    test = source(held_out)
    shape = features["image"].shape
    return Dataset(
        train=train,
        test=test,
        names=tuple(features["label"].names),
        shape=None if None in shape else tuple(shape),
        mirror=not any(part in name for part in ("mnist", "svhn", "digit", "omniglot")),
        identity=f"{builder.info.full_name}/{0 if train is None else len(train)}",
    )


def _npz(path: Path) -> Dataset:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            arrays = [file[name] for name in names]
        for part, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
            _check_arrays(part, images, labels)
        if arrays[0].shape[1:] != arrays[2].shape[1:]:
            raise ValueError(
                f"images to train on are {arrays[0].shape[1:]}, those to test {arrays[2].shape[1:]}"
            )
        classes = int(arrays[1].max()) + 1
        if classes < 2:
            raise ValueError("train_labels name one class only")
        if arrays[3].max() >= classes:
            raise ValueError(f"test_labels reach {arrays[3].max()}, train_labels {classes - 1}")
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot use the dataset {path}: {error}") from None
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.shape, array.dtype)).encode() + array.tobytes())
    return Dataset(
        train=Arrays(*arrays[:2]),
        test=Arrays(*arrays[2:]),
        names=tuple(map(str, range(classes))),
        shape=arrays[0].shape[1:],
        mirror=True,
        identity=f"npz/{digest.hexdigest()}",
    )


def _check_arrays(part: str, images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{part}_images must be uint8 [N, H, W, C], got {images.dtype} {images.shape}"
        )
    if 0 in images.shape:
        raise ValueError(f"{part}_images of shape {images.shape} hold nothing")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{part}_labels must be int [{len(images)}], got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0:
        raise ValueError(f"{part}_labels must not be negative, got {labels.min()}")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How a training image varies.

    Attributes:
      size: side of a square that a random part of the image is resized to, None to leave sizes.
      pad: pixels of zeros around the image before a part of the former size is cut out.
      mirror: whether to mirror left and right half of the time.
    """

    size: int | None = None
    pad: int = 0
    mirror: bool = False

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """A variation of image uint8 [H, W, C], a pure function of its arguments."""
        if self.size is not None:
            image = random_part(rng, image, self.size)
        if self.pad:
            height, width, _ = image.shape
            top, left = rng.integers(2 * self.pad + 1, size=2)
            wide = np.pad(image, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))
            image = wide[top : top + height, left : left + width]
        if self.mirror and rng.random() < 0.5:
            image = image[:, ::-1]
        return image


def random_part(rng: np.random.Generator, image: np.ndarray, size: int) -> np.ndarray:
    """A random 8 to 100 % of the image, sides 3:4 to 4:3, as [size, size, C] (arXiv 1409.4842)."""
    height, width, _ = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return _resize(image, (left, top, left + w, top + h), size)
    return centre(image, size)


def centre(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of 7/8 of the shorter side (224 of 256), as [size, size, C]."""
    height, width, _ = image.shape
    side = min(height, width) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(image, (left, top, left + side, top + side), size)


def _resize(image: np.ndarray, box: tuple[float, ...], size: int) -> np.ndarray:
    from PIL import Image

    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    part = Image.fromarray(squeezed).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(part).reshape(size, size, image.shape[-1])


class Rows:
    """Rows of training batches: each epoch takes every example once, in an order of its own."""

    def __init__(self, source: Sequence[Example], augment: Augment, batch_size: int, seed: int):
        self.source, self.augment, self.batch_size, self.seed = source, augment, batch_size, seed
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(source))
        )

    def row(self, step: int, i: int) -> Example:
        """The i-th example of a step's batch, a pure function of its arguments and the seed."""
        epoch, place = divmod(step * self.batch_size + i, len(self.source))
        image, label = self.source[int(self._order(epoch)[place])]
        rng = np.random.default_rng((self.seed, step, i))
        return self.augment(rng, image), label


class Ahead:
    """A function (step, i) -> row, whose rows of the next step threads compute meanwhile."""

    def __init__(self, row: Callable[[int, int], Any]):
        self._row = row
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._rows: dict[tuple[int, int], Future] = {}

    def __call__(self, step: int, i: int) -> Any:
        """The row; rows of earlier steps are forgotten."""
        if (step, i) not in self._rows:
            self._rows = {key: row for key, row in self._rows.items() if key[0] >= step}
            self._rows[step, i] = self._pool.submit(self._row, step, i)
        if (step + 1, i) not in self._rows:
            self._rows[step + 1, i] = self._pool.submit(self._row, step + 1, i)
        return self._rows[step, i].result()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

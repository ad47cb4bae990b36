"""scikit-learn's handwritten digits as a TFDS dataset: 1,797 grey images of 8x8, no download."""

from __future__ import annotations

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """The test part of the UCI set of optically recognised digits, as scikit-learn ships it.

    There is no published split; ours takes the file's last 360 for testing.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # A Tensor rather than an Image, which is encoded by TensorFlow.
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError("digits needs scikit-learn: pip install 'mcjax[train]'") from None
        data = load_digits()
        # Grey levels 0 to 16 of the file, spread over 0 to 240.
        images, labels = (data.images * 15).astype(np.uint8)[..., None], data.target
        return {
            "train": self._generate_examples(images[:-360], labels[:-360]),
            "test": self._generate_examples(images[-360:], labels[-360:]),
        }

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}

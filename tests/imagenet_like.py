"""A small set with the name, version, features and files of tfds's imagenet2012."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from bn_research.data.quiet import quiet

SIDES = (96, 240)  # least and largest, in pixels


def jpeg(rng, label, *, sides=SIDES, mode="RGB"):
    """Bytes of a photograph of sorts: smooth, with noise, its colors told by the label."""
    height, width = (int(side) for side in rng.integers(*sides, size=2, endpoint=True))
    coarse = rng.integers(0, 256, (6, 6, 3)) // 2 + np.array([label * 37, label * 91, 60]) % 128
    image = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(image) + rng.integers(-8, 9, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(
        file, "jpeg", quality=90
    )
    return file.getvalue()


def make_imagenet_like(
    data_dir,
    num_train=64,
    num_validation=24,
    num_classes_used=4,
    *,
    sides=SIDES,
    seed=0,
    edit=bytes,
):
    """Write it under data_dir/imagenet2012, without TensorFlow; `prepare` then opens it.

    Labels run over 0 ... num_classes_used - 1 of the 1,000, in turn; every eighth image is gray,
    as some of ImageNet's are; `edit` changes the stored bytes. Returns
    {split: {file_name: (JPEG bytes, label)}}.
    """
    own = tfds.builder_cls("imagenet2012")
    rng = np.random.default_rng(seed)
    contents = {
        split: {
            f"{split}_{i:05d}.JPEG": (
                jpeg(rng, i % num_classes_used, sides=sides, mode="L" if i % 8 == 7 else "RGB"),
                i % num_classes_used,
            )
            for i in range(count)
        }
        for split, count in (("train", num_train), ("validation", num_validation))
    }

    class Small(own, skip_registration=True):
        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in contents}

        def _generate_examples(self, split):
            for name, (data, label) in contents[split].items():
                yield name, {"image": io.BytesIO(edit(data)), "label": label, "file_name": name}

    Small.name = own.name
    with quiet():
        Small(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return contents

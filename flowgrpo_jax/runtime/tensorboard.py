"""TensorBoard events through clu's writer interface, without TensorFlow.

It is imported only if TensorBoard is on (see `metrics.MetricWriter`). The caller's
thread writes the events: tensorboardX's own SummaryWriter hands them to a thread that dies
silently on a full disk, and its `flush` then waits for ever.
"""

import json
import logging
import sys
import textwrap
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from flowgrpo_jax.runtime.metric_meanings import tag


def _import_clu_interface() -> types.ModuleType:
    """clu's `metric_writers.interface`, without the TensorFlow that clu imports.

    Only clu's own SummaryWriter needs it, so a stand-in for that module is registered
    before the import (google/CommonLoopUtils#358 asks for a lazy import).
    """
    if "clu.metric_writers" not in sys.modules:
        stand_in: Any = types.ModuleType("clu.metric_writers.summary_writer")
        stand_in.SummaryWriter = object
        sys.modules.setdefault(stand_in.__name__, stand_in)
    from clu.metric_writers import interface

    return interface


_interface: Any = _import_clu_interface()
# It warns of every NaN, which is a valid value here: one image has no diversity.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class TensorBoardWriter(_interface.MetricWriter):
    """clu's MetricWriter on tensorboardX's event files; images are in [0, 1]."""

    def __init__(self, logdir: Path, start_step: int):
        """Opens a new event file.

        TensorBoard then ignores what older files have from `start_step` on.
        """
        logdir.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names. tensorboardX begins them
        # with the time, and the clock may have been set back. "events.run" sorts after
        # the "events.out" of earlier versions.
        process = len(list(logdir.glob("events*tfevents*")))
        prefix = logdir / f"events.run{process:06d}"
        self._events = EventsWriter(str(prefix), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=start_step, session_log=start))

    def write_scalars(self, step: int, scalars: Mapping) -> None:
        for name, value in scalars.items():
            self._add(step, summary.scalar(tag(name), np.asarray(value)))

    def write_images(
        self, step: int, images: Mapping, captions: Sequence[str] = ()
    ) -> None:
        """TensorBoard shows a caption as the picture's name and description."""
        for name, value in images.items():
            pixels = np.round(np.asarray(value) * 255).astype(np.uint8)
            batch = pixels if pixels.ndim == 4 else pixels[None]
            for index, image in enumerate(batch):
                one = name if len(batch) == 1 else f"{name}/{index}"
                drawn = summary.image(one, image, dataformats="HWC")
                if captions:
                    told = drawn.value[0].metadata
                    told.display_name = told.summary_description = captions[index]
                self._add(step, drawn)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """The config as text, and its numbers and words as hyperparameters."""
        text = json.dumps(config, indent=2, default=str)
        # Markdown shows what is indented by four spaces as it is.
        self.write_texts(0, {"config": textwrap.indent(text, "    ")})
        self.write_hparams(
            {
                key: value
                for key, value in _flat(config)
                if isinstance(value, bool | int | float | str)
            }
        )

    def write_texts(self, step: int, texts: Mapping) -> None:
        for name, value in texts.items():
            self._add(step, summary.text(name, value))

    def write_histograms(
        self, step: int, arrays: Mapping, num_buckets: Mapping | None = None
    ) -> None:
        for name, value in arrays.items():
            bins = (num_buckets or {}).get(name) or "auto"
            self._add(step, summary.histogram(name, np.asarray(value), bins))

    def write_hparams(self, hparams: Mapping) -> None:
        for part in summary.hparams(dict(hparams), {}):
            self._add(0, part)

    # The interface of clu has these four too; nothing here writes them.

    def write_summaries(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("raw summaries")

    def write_videos(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("videos")

    def write_audios(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("audio")

    def write_pointcloud(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("point clouds")

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _add(self, step: int, value: Any) -> None:
        self._write(Event(step=step, summary=value))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

"""TensorBoard events: what is read back, restarts, a full disk."""

import errno
import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.runtime.metrics import MetricWriter
from flowgrpo_jax.runtime.tensorboard import TensorBoardWriter


def events(workdir) -> list[Event]:
    """All TensorBoard events in the order TensorBoard reads them."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_reads_back_scalars_images_and_restarts(tmp_path):
    """Oracle: the event protos (TFRecord framing); no TensorFlow gets loaded."""
    image = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    for start in (0, 1):
        with MetricWriter(tmp_path, start) as writer:
            writer.write(start, {"reward_avg": 0.5 + start})
            writer.images(start, {"eval_images": image}, ["a dog | mine: 0.93"])
    assert "tensorflow" not in sys.modules
    found = events(tmp_path)
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in found
        for value in event.summary.value
        if value.tag == "reward/reward_avg"
    ]
    assert [(step, value) for step, _, value in scalars] == [(0, 0.5), (1, 1.5)]
    starts = [event.step for event in found if event.HasField("session_log")]
    assert starts == [0, 1]
    pictures = [v for e in found for v in e.summary.value if v.HasField("image")]
    encoded = pictures[0].image.encoded_image_string
    assert pictures[0].metadata.display_name == "a dog | mine: 0.93"
    pixels = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(pixels, np.round(image * 255).astype(np.uint8))


def test_the_config_is_among_the_events(tmp_path):
    """Oracle: the tags of TensorBoard's text and hparams plugins; written once."""
    config = {"seed": 3, "train": {"beta": 0.04, "options": []}, "reward": {"a": 1.0}}
    for start in (0, 1):
        MetricWriter(tmp_path, start, config=config).close()
    values = [value for event in events(tmp_path) for value in event.summary.value]
    tags = [value.tag for value in values]
    assert tags.count("config/text_summary") == 1
    text = values[tags.index("config/text_summary")].tensor.string_val[0].decode()
    assert '        "beta": 0.04' in text
    start = values[tags.index("_hparams_/session_start_info")]
    data = start.metadata.plugin_data.content
    assert b"train.beta" in data and b"reward.a" in data and b"options" not in data


def test_a_clock_that_was_set_back_leaves_the_order_of_processes(tmp_path, monkeypatch):
    """Oracle: the order of the starts; the first file is one of an earlier version."""
    old = tmp_path / "tensorboard" / "events.out.tfevents.1999999999.host.1"
    old.parent.mkdir()
    old.write_bytes(b"")
    clock = iter([1_900_000_000.0, 1_800_000_000.0, 1_700_000_000.0])
    for start in range(3):
        now = next(clock)
        monkeypatch.setattr("time.time", lambda now=now: now)
        TensorBoardWriter(old.parent, start).close()
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 1, 2]
    assert sorted(old.parent.iterdir())[0] == old


def test_a_score_that_is_no_number_is_written_without_a_warning(tmp_path, caplog):
    """Oracle: the event, and silence: the diversity of one image of a prompt is none."""
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(0, {"eval_diversity": float("nan")}, kind="eval")
    (value,) = [
        value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
        if value.tag == "monitors/eval_diversity"
    ]
    assert np.isnan(value) and not caplog.records


def test_a_full_disk_under_tensorboard_is_one_line(tmp_path, monkeypatch):
    """Oracle: ENOSPC from the event file."""
    writer = MetricWriter(tmp_path, 0)

    def full(event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer._boards[0]._events, "write_event", full)
    with pytest.raises(UserError, match="no space left on device: what was there is"):
        writer.write(0, {"x": 1})


def test_the_other_summaries_of_the_interface(tmp_path):
    """Oracle: the tags and counts in the event protos."""
    writer = TensorBoardWriter(tmp_path / "tensorboard", 0)
    writer.write_texts(0, {"config": "seed: 1"})
    writer.write_histograms(0, {"advantages": np.arange(10.0)}, {"advantages": 5})
    writer.write_hparams({"beta": 0.04})
    writer.write_images(0, {"grid": np.zeros((2, 4, 4, 3), np.float32)})
    writer.close()
    values = [value for event in events(tmp_path) for value in event.summary.value]
    by_tag = {value.tag: value for value in values}
    assert by_tag["config/text_summary"].tensor.string_val == [b"seed: 1"]
    assert by_tag["advantages"].histo.num == 10
    assert "_hparams_/experiment" in by_tag
    assert {"grid/0", "grid/1"} <= by_tag.keys()
    with pytest.raises(NotImplementedError):
        writer.write_videos(0, {})

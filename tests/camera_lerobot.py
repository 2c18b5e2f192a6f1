"""Writes datasets of LeRobot with cameras, as it documents their layouts."""

from __future__ import annotations

import io
import json
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS, LENGTHS, SIZE = 10, (12, 9, 13), (32, 48)
TOP, WRIST = "observation.images.top", "observation.images.wrist"


def frames_of(episode, size=SIZE, length=None):
    """An episode's frames: brighter step by step, the left half red, the right half blue."""
    levels = 20 + 7 * np.arange(length or LENGTHS[episode]) + 40 * episode
    frames = np.zeros((len(levels), *size, 3), np.uint8)
    frames[:, :, : size[1] // 2, 0] = frames[:, :, size[1] // 2 :, 2] = levels[:, None, None]
    return frames


def encode(path, frames, fps=FPS, g=4, b_frames=2, lost=(), x264="scenecut=0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = (
            "yuv444p",
            {"crf": "1", "g": str(g), "bf": str(b_frames), "x264-params": x264},
        )
        for k, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(values, format="rgb24")
            frame.pts, frame.time_base = k, 1 / Fraction(fps)
            if k not in lost:
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(frame, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind, **options)
    return file.getvalue()


VIDEO_PATHS = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
DATA_PATHS = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}


def camera_dataset(folder, version, *, features=(), info=(), starts=None, pictures=None, **encoding):
    """A dataset of LeRobot with a video camera, TOP, and one of pictures, WRIST.

    Args:
        features, info: others in ``meta/info.json``.
        starts: seconds at which the episodes begin in v3's one video.
        pictures: changes the list of the last episode's pictures.
    """
    tables, listed, first = [], [], 0
    for episode, length in enumerate(LENGTHS):
        steps = np.arange(length)
        small = [{"bytes": png(frame), "path": f"{k}.png"} for k, frame in enumerate(frames_of(episode))]
        if pictures and episode == len(LENGTHS) - 1:
            pictures(small)
        columns = {"action": pa.array([[float(k), 0.0] for k in steps]), "episode_index": [episode] * length}
        columns |= {
            "observation.state": pa.array(steps / 2),
            "timestamp": pa.array((steps / FPS).astype(np.float32)),
            WRIST: pa.array(small),
        }
        tables.append(pa.table(columns))
        about = {"episode_index": episode, "length": length}
        if version == 3:
            about |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": first}
            about |= {f"videos/{TOP}/chunk_index": 0, f"videos/{TOP}/file_index": 0}
            start = first / FPS if starts is None else starts[episode]
            about |= {f"videos/{TOP}/from_timestamp": start}
        listed.append(about)
        first += length
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    every = [frames_of(episode) for episode in range(len(LENGTHS))]
    if version == 2:
        for episode, each in enumerate(tables):
            pq.write_table(each, folder / f"data/chunk-000/episode_{episode:06d}.parquet")
            encode(folder / f"videos/chunk-000/{TOP}/episode_{episode:06d}.mp4", every[episode], **encoding)
        (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, listed)))
    else:
        with pq.ParquetWriter(folder / "data/chunk-000/file-000.parquet", tables[0].schema) as writer:
            writer.write_table(pa.concat_tables(tables), row_group_size=8)
        pq.write_table(pa.Table.from_pylist(listed), folder / "meta/episodes/chunk-000/file-000.parquet")
        encode(folder / f"videos/{TOP}/chunk-000/file-000.mp4", np.concatenate(every), **encoding)
    about = {"codebase_version": {2: "v2.1", 3: "v3.0"}[version], "fps": FPS, "chunks_size": 1000}
    about |= {"data_path": DATA_PATHS[version], "video_path": VIDEO_PATHS[version]}
    about["features"] = {
        "action": {"dtype": "float64", "shape": [2]},
        "timestamp": {"dtype": "float32", "shape": [1]},
        "episode_index": {"dtype": "int64", "shape": [1]},
        "observation.state": {"dtype": "float64", "shape": [1]},
        TOP: {"dtype": "video", "shape": [*SIZE, 3], "names": ["height", "width", "channels"]},
        WRIST: {"dtype": "image", "shape": [3, *SIZE], "names": ["channels", "height", "width"]},
        **dict(features),
    }
    (folder / "meta/info.json").write_text(json.dumps({**about, **dict(info)}))
    return folder

"""Published demonstrations, put where ``train`` looks for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import require_writable
from ..tables import console, table

if TYPE_CHECKING:
    from .data_schema import DownloadConfig


def download(cfg: DownloadConfig) -> None:
    """Downloads the named datasets one after the other; without any, lists those that are known."""
    from tqdm import tqdm

    from ..data.published import DATASETS, default_folder
    from ..data.published import download as download_dataset

    folder = default_folder() if cfg.out is None else Path(cfg.out)
    if not cfg.datasets:
        console().print(
            table(
                "published datasets",
                (
                    {
                        "name": name,
                        "MB": None if each.size is None else round(each.size / 1e6),
                        "episodes": each.episodes,
                        "licence": each.licence,
                        "there": "yes" if (folder / each.name).exists() else "no",
                        "place": folder / each.name,
                        "address": each.address,
                    }
                    for name, each in DATASETS.items()
                ),
                left=("licence", "there", "place", "address"),
            )
        )
        return
    require_writable(out=folder / "content")
    for name in cfg.datasets:
        with tqdm(desc=name, unit="B", unit_scale=True, dynamic_ncols=True, delay=0.1) as bar:

            def show(done: int, total: int | None, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            line = download_dataset(DATASETS.named(name), folder, on_bytes=show)
        print(line)

"""VQA score of TextBoost's revision: does a large model answer that the image shows its prompt?

A thin adapter to the package t2v_metrics (Lin et al., arXiv 2404.01291), which no other part of this pack needs: it
reads images from files, and downloads the weights of clip-flant5-xxl, tens of gigabytes, by itself. So it is used only
where it is installed and the user has allowed it.
"""

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..files import save_png
from .report import Report, Scored

VQA, PACKAGE, MODEL = "VQA", "t2v_metrics", "clip-flant5-xxl"


def missing(download: bool) -> str:
    """Say why VQA is not measured; "" where it is."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the package {PACKAGE} is not installed"
    return "" if download else f"{PACKAGE} downloads its weights by itself, and --vqa-download is not given"


def added(report: Report, download: bool, device: str) -> Report:
    """Return the report with each image's VQA score, or with the reason why there is none."""
    if why := missing(download):
        return replace(report, missing={**report.missing, VQA: why})
    found = scores(report.images, device)
    images = tuple(
        replace(each, scores={**each.scores, VQA: score}) for each, score in zip(report.images, found, strict=True)
    )
    return replace(report, images=images, metric_models={**report.metric_models, VQA: MODEL})


def scores(images: Sequence[Scored], device: str) -> list[float]:
    """Return each image's score with the text that CLIP-T compares it with."""
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for text in dict.fromkeys(each.text for each in images):
            numbers = [i for i, each in enumerate(images) if each.text == text]
            files = [str(Path(folder, f"{i}.png")) for i in numbers]
            for i, file in zip(numbers, files, strict=True):
                save_png(images[i].image, Path(file))
            answers = _model(device)(images=files, texts=[text])  # [images, texts]
            found |= dict(zip(numbers, answers[:, 0].tolist(), strict=True))
    return [found[i] for i in range(len(images))]


@cache
def _model(device: str):
    import t2v_metrics

    return t2v_metrics.VQAScore(model=MODEL, device=device)

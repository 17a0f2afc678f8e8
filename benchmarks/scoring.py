"""What scoring an image takes: metric models of real size with random weights, as files, through a report's scores.

    python -m benchmarks.scoring [--clip ViT-B-32] [--dino vit_small_patch16_224.dino] [--images 32] [--threads 2]

The weights mean nothing, the time is the real one. A metric model is read once for a report, the rest is per image.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from trainers.evaluation.scorer import OFF, GeneratedImage, References, Scorer, ScorerConfig
from trainers.metrics.extractor_cache import ExtractorCache

from .step import GIB, peak_memory

SIDE, SEEDS = 512, 4  # of the images, as Stable Diffusion 1.x draws them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default=ScorerConfig.clip_model, help="of open_clip")
    parser.add_argument("--dino", default=ScorerConfig.dino_model, help="of timm")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        metric_models = written(Path(folder), args.clip, args.dino)
        extractors = ExtractorCache(folders=lambda: [folder])
        for choice in (metric_models.clip, metric_models.dino):
            started = time.perf_counter()
            module = extractors.load(choice).module
            size = sum(p.numel() * p.element_size() for p in module.parameters()) / GIB
            print(f"reading {type(choice).__name__}: {1000 * (time.perf_counter() - started):.0f} ms, {size:.2f} GiB")
        scoring = Scorer(metric_models=metric_models, extractors=extractors, device=args.device)
        references = References(seen=pictures(1, 1), unseen=pictures(4, 2))
        for _ in range(2):  # the first time warms up
            report = scoring.report("random", drawn(args.pictures), references)
    print(f"{args.clip}, {args.dino}: {1000 * report.scoring_seconds:.0f} ms for each of {args.pictures} pictures")
    print(f"peak memory {peak_memory(torch.device(args.device)) / GIB:.2f} GiB")


def written(folder: Path, clip: str, dino: str) -> ScorerConfig:
    """Both metric models as files, as a user would name them."""
    import open_clip
    import timm

    torch.manual_seed(0)
    save_file(open_clip.create_model(clip).state_dict(), folder / "clip.safetensors")
    save_file(timm.create_model(dino, num_classes=0).state_dict(), folder / "dino.safetensors")
    names = {"clip_weights": "clip.safetensors", "dino_weights": "dino.safetensors"}
    return ScorerConfig(clip_model=clip, dino_model=dino, diversity=OFF, **names)


def pictures(count: int, seed: int) -> list[Image.Image]:
    noise = torch.randint(256, (count, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in noise]


def drawn(count: int) -> list[GeneratedImage]:
    texts = [f"a dog in scene {i // SEEDS}" for i in range(count)]
    return [
        GeneratedImage(prompt=text, text=text, seed=i % SEEDS, image=image)
        for i, (text, image) in enumerate(zip(texts, pictures(count, 0), strict=True))
    ]


if __name__ == "__main__":
    main()

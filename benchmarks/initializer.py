"""Seconds that Textual Inversion's "best" and "worst" starting words take: every word of the vocabulary through a CLIP.

    python -m benchmarks.initializer
    python -m benchmarks.initializer --architecture ViT-B-32 --threads 2

The first reads the demo world's CLIP and prints what it chose for a drawn individual, too. An architecture gets random
weights: the time is the real one, the words mean nothing. `--words` takes a part of the vocabulary and scales up.
"""

import argparse
import random
import time

import torch

from demo import evaluators, world
from trainers.data import initializer
from trainers.metrics.feature_extractors import FeatureExtractor, clip_extractor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="", help="of open_clip, with random weights; empty: the demo's CLIP")
    parser.add_argument("--words", type=int, default=0, help="how many; 0 = all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clip = random_clip(options.architecture, options.device) if options.architecture else demo_clip(options.device)
    words = initializer.vocabulary()
    some = words[:: max(1, len(words) // options.words)] if options.words else words
    pictures = references()
    started = time.perf_counter()
    scores = initializer.word_scores(clip, pictures, some)
    seconds = time.perf_counter() - started
    print(f"{clip.name}: {len(some)} words in {seconds:.1f} s, {len(some) / seconds:.0f} words/s")
    print(f"all {len(words)} words: {len(words) / len(some) * seconds:.0f} s")
    order = scores.argsort(descending=True).tolist()
    print("best:", ", ".join(f"{some[i].word} {scores[i]:.3f}" for i in order[:8]))
    print("worst:", ", ".join(f"{some[i].word} {scores[i]:.3f}" for i in order[:-9:-1]))


def demo_clip(device: str) -> FeatureExtractor:
    clip = evaluators.load().clip
    clip.module.to(device)
    return clip


def random_clip(name: str, device: str) -> FeatureExtractor:
    import open_clip

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return clip_extractor(name, model.to(device).eval(), preprocess, open_clip.get_tokenizer(name))


def references() -> list:
    """Four images of one dog that no training saw."""
    dog = world.instance(world.TEST_SEEDS[100], "dog")
    scenes = [world.Scene(words) for words in ("in the snow", "on grass", "at night", "on water")]
    return [world.picture(world.draw(dog, scene, random.Random(f"{scene}"))) for scene in scenes]


if __name__ == "__main__":
    main()

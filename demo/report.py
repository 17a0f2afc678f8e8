"""Draws the demo's reference image, and turns the demo's images into report.json and grid.png.

    python -m demo.report reference OUT.png --instance N     one plain image of an individual nobody has trained on
    python -m demo.report score JOB.json OUT_FOLDER          scores and image grid of a finished demo

Needs the packages of the virtual environment; dev.py runs it there. JOB.json is what show.py writes. It scores only: no
image is generated here except real drawings of the individual, which say how well anybody could do.
"""

import argparse
import json
import math
import random
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw, ImageFont

# Rows of the grid: images -> (title, name of the scores in the report)
ROWS = {
    "untrained": ("Untrained, class word", "identity_floor", "text_floor"),
    "trained": ("Trained on one image", "identity", "text"),
    "words": ("Untrained, every detail in words", "identity_oracle", None),
}
DRAWINGS = 8  # real images of the individual per prompt, for the ceiling


def reference(out, number, subject):
    """The one image that the demo learns from; returns its description in words, without the article."""
    from . import captions, world

    thing = world.instance(number, subject)
    world.picture(world.draw(thing, world.reference_scene(), random.Random(f"reference {number}"))).save(out)
    return captions.describe(thing).split(" ", 1)[1]


def scene_of(prompt):
    """The scene that a prompt asks for, as far as it names one of the world's backgrounds and styles."""
    from . import world

    background = next((b for b in world.BACKGROUNDS if b in prompt), world.reference_scene().background)
    style = next((s for s in world.STYLES if s in prompt), "photo")
    return world.Scene(background=background, style=style)


def drawings(job):
    """Real images of the individual in the prompts' scenes: one list per prompt."""
    from . import world

    thing = world.instance(job["instance"], job["class_word"])
    rng = random.Random(f"ceiling {job['instance']}")
    scenes = [scene_of(prompt) for prompt in job["prompts"]]
    return [[world.picture(world.draw(thing, scene, rng)) for _ in range(DRAWINGS)] for scene in scenes]


def score(job, pictures, reference_picture, metric_models):
    """report.json: mean scores over all prompts and seeds, as plain numbers.

    identity is the cosine to the reference image in the space of an encoder that tells individuals apart; text is the
    cosine of an image to its own prompt with the class word in place of the placeholder.
    """
    prompts = [prompt.replace("{}", job["class_word"]) for prompt in job["prompts"]]

    def identity(rows):
        return mean(metric_models.identity([picture for row in rows for picture in row], [reference_picture]))

    def text(rows):
        pairs = [(picture, prompt) for row, prompt in zip(rows, prompts, strict=True) for picture in row]
        return mean(metric_models.clip_text([picture for picture, _ in pairs], [prompt for _, prompt in pairs]))

    return {
        "identity_floor": identity(pictures["untrained"]),
        "identity": identity(pictures["trained"]),
        "identity_ceiling": identity(drawings(job)),
        "identity_oracle": identity(pictures["words"]),
        "text_floor": text(pictures["untrained"]),
        "text": text(pictures["trained"]),
        "train_seconds": round(job["train_seconds"], 1),
        "steps": job["steps"],
        "device": job["device"],
    }


def mean(scores):
    return round(fmean(float(value) for value in scores), 4)


def grid(job, pictures, reference_picture, scores, size=128, gap=6, margin=24, label=24):
    """The image grid: the reference on the left, then a row per model and a block of seeds per prompt."""
    heading, small = ImageFont.load_default(18), ImageFont.load_default(13)
    seeds = len(pictures["untrained"][0])
    across = math.ceil(math.sqrt(seeds))
    width, height = across * (size + gap), math.ceil(seeds / across) * (size + gap)
    left, top = margin * 2 + 2 * size, margin + 40
    box = (left + len(job["prompts"]) * (width + margin), top + len(ROWS) * (height + label + gap) + margin)
    sheet = Image.new("RGB", box, "#f7f5f0")
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin), "The one reference image", "#222222", small)
    sheet.paste(enlarged(reference_picture, 2 * size), (margin, top + label))
    for column, prompt in enumerate(job["prompts"]):
        words = wrapped(pen, prompt.replace("{}", job["placeholder"]), small, width)
        pen.multiline_text((left + column * (width + margin), margin), words, "#222222", small)
    ceiling = f"Other real images: identity {scores['identity_ceiling']:.2f}"
    pen.text((margin, top + label + 2 * size + gap), ceiling, "#666666", small)
    for row, (name, (title, identity, text)) in enumerate(ROWS.items()):
        y = top + row * (height + label + gap)
        pen.text((left, y), title, "#222222", heading)
        words = f"identity {scores[identity]:.2f}" + (f", text {scores[text]:.2f}" if text else "")
        pen.text((left + pen.textlength(title, heading) + margin, y + 4), words, "#666666", small)
        for column, column_pictures in enumerate(pictures[name]):
            for seed, picture in enumerate(column_pictures):
                place = (left + column * (width + margin), y + label)
                offset = (seed % across * (size + gap), seed // across * (size + gap))
                sheet.paste(enlarged(picture, size), (place[0] + offset[0], place[1] + offset[1]))
    return sheet


def enlarged(picture, size):
    """Square, with hard edges: these are flat tiles."""
    return picture.convert("RGB").resize((size, size), Image.Resampling.NEAREST)


def wrapped(pen, text, font, width):
    """The text in lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("reference")
    draw.add_argument("out", type=Path)
    draw.add_argument("--instance", type=int, required=True)
    draw.add_argument("--class-word", required=True)
    metric_model = commands.add_parser("score")
    metric_model.add_argument("job", type=Path)
    metric_model.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "reference":
        print(reference(options.out, options.instance, options.class_word))
        return
    job = json.loads(options.job.read_text(encoding="utf-8"))
    folder = options.job.parent
    pictures = {
        name: [[Image.open(folder / file) for file in row] for row in rows] for name, rows in job["pictures"].items()
    }
    reference_picture = Image.open(folder / job["reference"])
    options.out.mkdir(parents=True, exist_ok=True)
    from . import evaluators

    scores = score(job, pictures, reference_picture, evaluators.load())
    (options.out / "report.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    grid(job, pictures, reference_picture, scores).save(options.out / "grid.png")


if __name__ == "__main__":
    main()

"""Whatever is wrong with an input, a user reads one sentence that says what to do, and nothing has begun yet.

A real server; a row is a name, changes of the smallest good prompt, the sentence. BAD_INPUT_TABLE=path keeps them all.
"""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from personalize.tests.support import odd_images, prompts
from personalize.tests.support.prompts import DROP

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
# ComfyUI's own check of a widget's limits comes first, in its words.
HOST = "Value -?[\\d.]+ |Value not in list|Failed to convert"
NAN = float("nan")


def folder(name):
    return {"references.images.image0": DROP, "references.folder": name}


def placeholder(token):
    return {"references.placeholder_token": token}


def captions(name):
    return {"recipe.preset.captions": name}


def mask(value=1.0, width=128, height=128):
    return {
        "mask": ("SolidMask", {"value": value, "width": width, "height": height}),
        "references.mask": ["mask", 0],
    }


def number(value, kind="PrimitiveInt"):
    """A number that comes through a link, which ComfyUI does not check against the widget's limits."""
    return {"number": (kind, {"value": value})}


def load(run):
    return {"load": ("PersonalizeLoad", {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "run": run})} | {
        "save.result": ["load", 2]
    }


def files(**chosen):
    inputs = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "personalized": "none", **chosen}
    return {"load": ("PersonalizeLoadFiles", inputs), "save.result": ["load", 2]}


def delete(run):
    return {"runs": ("PersonalizeRuns", {"action": "delete", "run": run}), "save": DROP}


def prompt_list(**chosen):
    inputs = {
        "prompts": "a {}",
        "prompt_file": "",
        "subject": "<concept>",
        "prefix": "personalize/prompts",
        "max_prompts": 0,
    }
    listed = ("PersonalizePromptList", inputs | chosen)
    return {"list": listed, "shown": ("PreviewAny", {"source": ["list", 0]}), "save": DROP}


def attention(**chosen):
    inputs = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2], "image": ["image", 0]}
    inputs |= {"prompt": "a red dog", "words": "dog", "noise_level": 0.5, "seed": 0, "base_words": ""}
    looked = ("PersonalizeShowAttention", inputs | chosen)
    return {"look": looked, "shown": ("PreviewImage", {"images": ["look", 0]}), "save": DROP}


BLEND = {"image1": ["image", 0], "image2": ["image", 0], "blend_mode": "normal"}
NO_FOLDER, OUTSIDE = (
    r"^The folder '.*' does not exist in ComfyUI's input folder",
    r"is not inside ComfyUI's input folder: write",
)
PICTURES = [
    ("no picture at all", {"references.images.image0": DROP}, "^There is no reference image: connect an image"),
    ("a folder that does not exist", folder("nowhere"), NO_FOLDER),
    ("an empty folder", folder("odd/empty"), "^The folder 'empty' holds no images"),
    ("a folder of gifs only", folder("odd/gif"), "holds no images"),
    ("a folder named like a picture", folder("odd/folders"), "holds no images"),
    ("a file instead of a folder", folder(prompts.PICTURE), NO_FOLDER),
    ("a text named png", folder("odd/text"), r"^The image 'words\.png' cannot be read: replace it"),
    ("a png cut short", folder("odd/cut"), r"^The image 'cut\.png' cannot be read: replace it"),
    ("one pixel", folder("odd/pixel"), "smaller than 8 pixels on a side: use a larger one"),
    (
        "20,000 x 20,000 pixels in 50 kB",
        folder("odd/bomb"),
        r"^The image 'bomb\.png' has more than 100 million pixels: ",
    ),
    ("120 million pixels", folder("odd/large"), r"^The image 'large\.png' has more than 100 million pixels: "),
    (
        "numbers instead of colours",
        folder("odd/float"),
        r"^The image 'float\.tif' has values of an unknown range: save it with 8 or 16 bits",
    ),
    (
        "an IMAGE that is no number",
        {"nan": ("ImageBlend", {**BLEND, "blend_factor": NAN}), "references.images.image0": ["nan", 0]},
        "^A reference image contains NaN or infinite values",
    ),
    (
        "an IMAGE that is a word",
        {"references.images.image0": "dog"},
        "^The input images received no IMAGE: connect one",
    ),
    ("a mask of another size", mask(width=64), "^A mask is 64 x 128 pixels but its image 128 x 128: "),
    ("an empty mask", mask(0.0), "^A mask is empty: paint over the subject, or leave the mask unconnected"),
    ("an empty mask of another size", mask(0.0, 64, 64), "^A mask is empty"),  # what Load Image gives without alpha
    ("a mask that is no number", mask(NAN), "^A mask contains NaN or infinite values"),
    ("a mask for two pictures", {**mask(), "references.folder": "odd/good"}, r"^There are \d+ images but 1 masks"),
    ("choose 0", {"references.select_images": "0"}, "^Image 0 does not exist: select from 1 to 1"),
    ("choose 9", {"references.select_images": "9"}, "^Image 9 does not exist"),
    ("choose a", {"references.select_images": "a"}, "^The selection 'a' cannot be read: write numbers"),
    (
        "choose 2-1",
        {**folder("odd/good"), "references.select_images": "2-1"},
        "^The selection '2-1' cannot be read: write numbers",
    ),
    ("choose 1,", {"references.select_images": "1,"}, "^The selection '1,' cannot be read"),
    ("choose with 5,000 letters", {"references.select_images": "x" * 5000}, "^The selection 'xxx"),
    (
        "first, linked, below 0",
        {**number(-3), "references.max_images": ["number", 0]},
        "^The value of max_images is -3: use 0 to 10000",
    ),
]
WORDS = [
    ("no placeholder", placeholder(" "), "^The placeholder is empty: "),
    ("an ordinary word as placeholder", placeholder("dog"), "^The placeholder dog is a word of the vocabulary"),
    ("a placeholder with a space", placeholder("my dog"), "is not one word"),
    ("a placeholder with brackets", placeholder("(dog:1.2)"), "is not one word"),
    ("a placeholder of 65 letters", placeholder("<" + "a" * 63 + ">"), "^The placeholder is 65 .* at most 64"),
    ("a placeholder that an augmentation uses", placeholder("<left>"), "^The placeholder <left> is the token"),
    ("a placeholder without letters", placeholder("***"), "^The placeholder '\\*\\*\\*' is not one word"),
    ("no class word", {"references.class_word": "  "}, "^The class word is empty: write the class"),
    ("a class word of 40 words", {"references.class_word": "dog " * 40}, r"class word .* 40 .* at most"),
    ("half an emoji", {"references.class_word": "\ud83d"}, "^The text of class_word contains invalid characters"),
    ("an initializer of signs", {"references.initializer_token": "!!!"}, "^The initializer '!!!' is not a word"),
    ("an initializer that is an emoji", {"references.initializer_token": "\U0001f436"}, "is not a word"),
    ("an initializer of 40 words", {"references.initializer_token": "dog " * 40}, "has 40 tokens, .* at most 16"),
    ("captions that do not exist", captions("none.txt"), r"^The captions file 'none\.txt' cannot be read \(No such"),
    ("captions that are binary", captions("odd/binary.txt"), r"binary\.txt' cannot be read as text: save it as UTF-8"),
    ("captions without a line", captions("odd/blank.txt"), r"blank\.txt' is empty: write one caption per line"),
    ("captions in a folder's place", captions("odd"), "^The captions file 'odd' cannot be read"),
    ("captions outside", captions("../output/x.txt"), OUTSIDE),
    ("a caption line too many", {"references.captions": "{}\n{}"}, "^The captions have 2 lines but 1 images"),
    ("a caption without the subject", {"references.captions": "a house"}, "has no place for your subject: write"),
    (
        "a caption beside that is no text",
        folder("odd/captioned"),
        r"^The caption 'a\.txt' cannot be read as text: save it as UTF-8",
    ),
]
PATHS = [
    ("a folder above", folder("../output"), OUTSIDE),
    ("a folder above, in the middle", folder("odd/../../output"), OUTSIDE),
    ("an absolute folder", folder("/etc"), OUTSIDE),
    ("a link that leads outside", folder("odd/leads_out"), OUTSIDE),
    ("a drive", folder("C:\\Windows"), f"{NO_FOLDER}|{OUTSIDE}"),
    ("a share", folder("\\\\server\\share"), f"{NO_FOLDER}|{OUTSIDE}"),
    ("a NUL in the name", folder("odd\0"), OUTSIDE),
    ("a folder of 5,000 letters", folder("x" * 5000), NO_FOLDER),
    ("Save above", {"save.name": "../x"}, r"^'\.\./x' cannot be a file name: use 1 to 60 letters, digits, - and _"),
    ("Save without a name", {"save.name": " "}, "^'' cannot be a file name"),
    *(
        (
            f"Save as {name}",
            {"save.name": name},
            f"^'{name}' is a device of Windows and cannot be a file name there: ch",
        )
        for name in ("CON", "aux", "NUL", "com1", "lPt9")
    ),
    ("Save with a dot behind", {"save.name": "mine."}, "^'mine.' cannot be a file name: use 1 to 60 letters"),
    ("Save with 300 letters", {"save.name": "x" * 300}, "cannot be a file name"),
    ("Load an unknown run", load("0123456789abcdef"), "^There is no run '0123456789abcdef': choose one from the list"),
    ("Load a path", load("../.."), r"^There is no run '\.\./\.\.': choose one"),
    ("Load nothing", load(""), "^There is no run '': choose one"),
    ("Load a number", load(5), "^There is no run '5': choose one"),
    ("Load 5,000 letters", load("x" * 5000), "^There is no run 'xxx"),
    ("delete an unknown run", delete("<dog> TextBoost 0123456789abcdef"), "^There is no run '<dog> TextBoost"),
    ("delete a path", delete("../.."), "^There is no run"),
    ("delete nothing", delete(""), "^There is no run"),
]
LONG = "a small red and blue " * 15  # 75 tokens
LENGTHS = [
    (
        "a caption whose subject is behind the 75th token",
        {"references.captions": LONG + "{}"},
        r"^The caption 'a small .*<concept>' has <concept> behind the 67 tokens that are read: shorten what stands",
    ),
    (
        "a preview prompt whose subject is behind the 75th token",
        {"train.preview_prompts": f"a {{}}\n{LONG}{{}}", "train.preview_every": 1},
        r"^The preview prompt 'a small .*<concept>' has <concept> behind the 75 tokens that are read: shorten",
    ),
]
NUMBERS = [
    ("a resolution of 100", {"references.resolution": 100}, "^The resolution 100 is not a multiple of 8: try 96"),
    ("a resolution of 8", {"references.resolution": 8}, "^The resolution 8 is too small: use 32 or more"),
    ("a resolution of 4096", {"references.resolution": 4096}, "Value 4096 bigger than max of 2048"),
    ("no steps", {"recipe.preset.steps": 0}, "Value 0 smaller than min of 1"),
    (
        "no steps, linked",
        {**number(0), "recipe.preset.steps": ["number", 0]},
        "^The value of steps is 0: use 1 to 100000",
    ),
    ("no pictures per step", {"recipe.preset.batch_size": 0}, "Value 0 smaller than min of 1"),
    ("a negative learning rate", {"recipe.preset.lora_learning_rate": -0.1}, "smaller than min of 0"),
    (
        "a learning rate that is no number",
        {"recipe.preset.lora_learning_rate": NAN},
        "^The value of lora_learning_rate is nan: use 0",
    ),
    (
        "a preset that does not exist",
        {"recipe.preset": "nonsense"},
        "^The preset of TextBoost does not exist: choose one of",
    ),
    (
        "a preset that is a link",
        {"recipe.preset": ["image", 0]},
        "^The input preset does not accept a link: choose one of bench",
    ),
    ("no preset", {"recipe.preset": ""}, "^The preset of TextBoost does not exist"),
    ("a preset that is no text", {"recipe.preset": {"a": 1}}, "^The preset of TextBoost does not exist"),
    ("steps in words", {"recipe.preset.steps": "many"}, "Failed to convert an input value to a INT value: .*steps"),
    ("a text encoder that does not exist", {"recipe.preset.text_encoder": "third"}, "not in list: .*'third' not in"),
    (
        "adapters of rank 0",
        {"recipe.preset": "2026 CPA", "recipe.preset.adapter_rank": 0},
        "Value 0 smaller than min of 1",
    ),
    ("templates that do not exist", {"recipe.preset.templates": "mine"}, "Value not in list: .*'mine' not in"),
    ("an unknown precision", {"train.precision": "float8"}, "Value not in list: precision: 'float8' not in"),
    ("a negative micro batch", {"train.micro_batch_size": -1}, "Value -1 smaller than min of 0"),
    (
        "a negative micro batch, linked",
        {**number(-1), "train.micro_batch_size": ["number", 0]},
        "^The value of micro_batch_size is -1: use 0",
    ),
    ("a MODEL that is a word", {"train.model": "sd15"}, "^The input model received no MODEL: connect one"),
    (
        "a RESULT that is a word",
        {"save.result": "mine"},
        "^The input result received no PERSONALIZE_RESULT: connect one",
    ),
]
NO_FILE = (
    r"^There is no file '.*' in (loras|embeddings|personalize): choose one from the list \(press R to refresh it\)\.$"
)
FILES = [
    ("no file", files(), "^No file is chosen: choose a personalized file, or a LoRA, an embedding or both"),
    (
        "a file and a LoRA",
        files(personalized="words.safetensors", lora="loha.safetensors"),
        "^A personalized file cannot be combined with a LoRA or an embedding: load those with another node",
    ),
    (
        "a .pt",
        files(embedding="old.pt"),
        r"^The file 'old\.pt' is not a safetensors file: convert it, or choose another",
    ),
    (
        "a LoRA with NaN",
        files(lora="nan.safetensors"),
        r"^The file 'nan\.safetensors' has NaN or infinite values in 'lora_unet_conv_in\.diff': download or save it",
    ),
    (
        "an embedding of 100 rows",
        files(embedding="long.safetensors"),
        "^This embedding has 100 vectors but a prompt 75 tokens: use a smaller one",
    ),
    ("a number for a LoRA", files(lora=5), "^The file '5' is not a safetensors file"),
    ("a LoRA that does not exist", files(lora="nowhere.safetensors"), NO_FILE),
    ("a file above", files(lora="../checkpoints/personalize-tiny.safetensors"), NO_FILE),
    ("a file above, in the middle", files(lora="x/../loha.safetensors"), NO_FILE),
    ("a file above, on Windows", files(personalized="..\\loras\\loha.safetensors"), NO_FILE),
    ("an absolute file", files(embedding="/etc/x.safetensors"), NO_FILE),
    ("a NUL in a file's name", files(lora="loha\0.safetensors"), NO_FILE),
    ("a file of 5,000 letters", files(lora="x" * 5000 + ".safetensors"), NO_FILE),
    ("a file without a name", files(personalized=""), "^The file '' is not a safetensors file"),
    (
        "an empty LoRA",
        files(lora="taken.safetensors"),
        r"cannot be read \(its contents are damaged\): download or save",
    ),
    ("a LoHa", files(lora="loha.safetensors"), "^This LoRA is a LoHa, .* use ComfyUI's own Load LoRA for this one"),
    ("a checkpoint as LoRA", files(lora="checkpoint.safetensors"), "entries are unknown here .* use ComfyUI's own"),
    (
        "a LoRA of another family",
        files(lora="other.safetensors"),
        "^1 of 1 learned layers are not in this MODEL and CLIP .* use the family of models",
    ),
    ("a LoRA as a personalized file", files(personalized="words.safetensors"), "^This file of Save Perso"),
    (
        "an embedding of another width",
        files(embedding="wide.safetensors"),
        r"^This embedding is 2 x 9 but this CLIP's embeddings are \d+ wide: use one",
    ),
    (
        "an embedding without a word",
        files(embedding="wide.safetensors", placeholder_token=" "),
        "^The placeholder is empty: write one word that stands for your subject, such as <dog>",
    ),
    (
        "an embedding for an ordinary word",
        files(embedding="wide.safetensors", placeholder_token="dog"),
        "^The placeholder dog is a word of the vocabulary",
    ),
    ("a strength of 21", files(lora="loha.safetensors", strength_unet=21.0), "Value 21.0 bigger than max of 20"),
]
NO_PREFIX = "^The prefix '.*' cannot be a folder of the output folder: write names with / between them"
PROMPT_LISTS = [
    ("no prompts", prompt_list(prompts=" \n\n"), "^There is no prompt: write one per line, or name a text file"),
    ("no subject", prompt_list(subject=" "), r"^The subject is empty but prompts have \{\} for it: write the word"),
    ("prompts outside", prompt_list(prompt_file="../output/x.txt"), OUTSIDE),
    (
        "prompts that do not exist",
        prompt_list(prompt_file="none.txt"),
        r"^The prompts file 'none\.txt' cannot be read \(No such",
    ),
    (
        "prompts that are binary",
        prompt_list(prompt_file="odd/binary.txt"),
        r"binary\.txt' cannot be read as text: save it as",
    ),
    (
        "prompts without a line",
        prompt_list(prompt_file="odd/blank.txt"),
        r"blank\.txt' is empty: write one prompt per line",
    ),
    ("no prefix", prompt_list(prefix=" "), NO_PREFIX),
    ("a prefix above", prompt_list(prefix="../x"), NO_PREFIX),
    ("a prefix above, in the middle", prompt_list(prefix="x/../../y"), NO_PREFIX),
    ("an absolute prefix", prompt_list(prefix="/etc/x"), NO_PREFIX),
    ("a prefix on a drive", prompt_list(prefix="C:\\x"), NO_PREFIX),
    ("a prefix on a share", prompt_list(prefix="\\\\server\\x"), NO_PREFIX),
    ("a prefix with a date", prompt_list(prefix="%year%"), NO_PREFIX),
    ("a prefix that is a device", prompt_list(prefix="x/con.txt"), NO_PREFIX),
    ("a prefix with a NUL", prompt_list(prefix="x\0"), NO_PREFIX),
    ("a prefix of 5,000 letters", prompt_list(prefix="x" * 5000), NO_PREFIX),
    ("a prefix that leads outside", prompt_list(prefix="leads_out"), "is not inside ComfyUI's output folder: write"),
    ("a prefix that is a file", prompt_list(prefix="a_file"), r"^The file prompts\.txt cannot be written \("),
    ("a negative first", prompt_list(max_prompts=-1), "Value -1 smaller than min of 0"),
]
ATTENTION = [
    ("a word that is not in the prompt", attention(words="cat"), "^The word 'cat' is not in the prompt: write it as"),
    ("no word", attention(words=" ,"), "^There is no word to show: write words of the prompt"),
    ("no noise", attention(noise_level=0.0), "Value 0.0 smaller than min of 0.05"),
    (
        "a picture of 32 pixels",
        {"small": ("EmptyImage", {"width": 32, "height": 96, "batch_size": 1, "color": 0})}
        | attention(image=["small", 0]),
        "^The image is only 32 x 96 pixels: use one with at least 64 pixels per side",
    ),
    (
        "a picture that is no number",
        {"nan": ("ImageBlend", {**BLEND, "blend_factor": NAN})} | attention(image=["nan", 0]),
        "^The image contains NaN or infinite values: connect another one",
    ),
    (
        "a base model that is a word",
        attention(base_model="sd15"),
        "^The input base_model received no MODEL: connect one",
    ),
]
ROWS = PICTURES + WORDS + LENGTHS + PATHS + NUMBERS + FILES + PROMPT_LISTS + ATTENTION


@pytest.fixture(scope="module")
def good(server, object_info):
    """The smallest good prompt; everything the rows speak of lies in the input folder."""
    root = server.base / "input" / "odd"
    odd_images.write(root)
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    (root / "blank.txt").write_text(" \n")
    (root / "leads_out").symlink_to(server.base / "output", target_is_directory=True)
    (server.base / "output" / "leads_out").symlink_to(server.base / "models", target_is_directory=True)
    (server.base / "output" / "a_file").write_text("x")
    (root / "captioned").mkdir()
    odd_images.GOOD["rgb.png"][0](root / "captioned" / "a.png")
    (root / "captioned" / "a.txt").write_bytes(b"\xff\xfe\x00\xd8")
    (server.base / "models" / "loras" / "taken.safetensors").write_bytes(b"")
    write_files(server.base / "models")
    return prompts.smallest(object_info, server.checkpoint)


def write_files(models):
    """What other programs, and people, leave in the folders of LoRAs, embeddings and personalized files."""
    (models / "personalize").mkdir(exist_ok=True)  # another test may have saved there
    (models / "embeddings" / "old.pt").write_bytes(b"")
    one = torch.ones(2, 2)
    save_file({"lora_unet_conv_in.hada_w1_a": one}, models / "loras" / "loha.safetensors")
    save_file({"model.diffusion_model.out.2.bias": one}, models / "loras" / "checkpoint.safetensors")
    save_file({"lora_unet_double_blocks_0_img_mod.diff": one}, models / "loras" / "other.safetensors")
    save_file({"lora_unet_conv_in.diff": one / 0}, models / "loras" / "nan.safetensors")
    save_file({"<dog>": torch.ones(100, 128)}, models / "embeddings" / "long.safetensors")
    save_file({"<dog>": torch.ones(2, 9)}, models / "embeddings" / "wide.safetensors")
    save_file({"lora_unet_conv_in.diff": one}, models / "personalize" / "words.safetensors")


@pytest.fixture(scope="module")
def table():
    """What was said, by row; written at the end where BAD_INPUT_TABLE says so."""
    said = {}
    yield said
    if path := os.environ.get("BAD_INPUT_TABLE"):
        lines = [f"| {name} | {sentence.replace('|', ' ')} |" for name, sentence in said.items()]
        Path(path).write_text("\n".join(["| input | sentence |", "|---|---|", *lines]) + "\n", encoding="utf-8")


def runs(server):
    return set((server.base / "output" / "personalize" / "runs").glob("*"))


@pytest.mark.parametrize(("name", "changes", "sentence"), ROWS, ids=[row[0] for row in ROWS])
def test_a_bad_input_gets_one_sentence(server, good, table, name, changes, sentence):
    before = runs(server)
    prompt = prompts.changed(good, changes)
    outcome = prompts.run(server.client, prompt)
    table[name] = outcome.message
    assert outcome.kind in ("refused", "failed"), outcome
    assert re.search(sentence, outcome.message), outcome.message
    assert outcome.ours != bool(re.match(HOST, outcome.message))
    assert not outcome.ours or not prompts.faults(outcome.message)
    # A file may appear while a training runs: that it exists is said when it is to be written.
    assert runs(server) == before or name == "Save over a file"


def test_a_good_prompt_still_runs(server, good):
    """After everything above, and with every kind of image that has something to show."""
    before = runs(server)
    prompt = prompts.changed(good, {"references.folder": "odd/good", "references.initializer_token": "  "})
    assert prompts.run(server.client, prompt).kind == "success"
    (run,) = runs(server) - before
    assert len(list((run / "images").iterdir())) == 1 + len(odd_images.GOOD)

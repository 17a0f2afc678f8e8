"""Prompt List: are its folders names everywhere, inside the output folder, and do images lie where it says?"""

import os
import re

import pytest

from personalize.demo import client as api
from personalize.trainers.data.prompts import prompts_of
from personalize.trainers.evaluation.prompt_folders import folder_names, folder_of, table

LINES = "a photo of {}\n\n  {} in the snow, {}  \nno subject\n"


def test_lines_become_prompts():
    assert prompts_of(LINES, " <dog> ") == ["a photo of <dog>", "<dog> in the snow, <dog>", "no subject"]
    assert prompts_of(LINES, "<dog>", first=2) == ["a photo of <dog>", "<dog> in the snow, <dog>"]
    assert prompts_of(LINES, "<dog>", first=9) == prompts_of(LINES, "<dog>")
    assert prompts_of("no subject", "") == ["no subject"]
    assert prompts_of("{a|b} {}", "{}") == ["{a|b} {}"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a photo of <dog>, in (snow:1.2)", "1_a_photo_of_dog_in_snow_1_2"),
        ("con", "1_con"),
        ("../../etc/passwd", "1_etc_passwd"),
        ("C:\\x %year% 50%", "1_C_x_year_50"),
        ("!?*", "1"),
        ("ein Schäferhund 犬", "1_ein_Schäferhund_犬"),
        ("word " * 40, "1" + "_word" * 9),
        ("x" * 300, "1"),
        ("snake_case __", "1_snake_case"),
    ],
)
def test_folder_names(prompt, name):
    assert folder_names([prompt]) == [f"0{name}"]


def test_every_folder_is_another_and_they_sort():
    names = folder_names(["a dog"] * 120)
    assert names[0] == "001_a_dog" and names[119] == "120_a_dog"
    assert len({name.lower() for name in names}) == 120 and sorted(names) == names


@pytest.mark.parametrize("prompt", ["é" * 40, "犬 " * 200, "a. ", "a .", "NUL", "aux.txt", "x\0y\x1f", '<>:"|?*/\\%'])
def test_names_are_names_on_every_system(prompt):
    (name,) = folder_names([prompt])
    assert re.fullmatch(r"\d\d\w*", name) and len(name) <= 48 and len(name.encode()) < 200


@pytest.mark.parametrize(("prefix", "folder"), [(" a/b ", "a/b"), ("a\\b", "a/b"), ("a/b/", "a/b"), ("a b.c", "a b.c")])
def test_a_good_prefix(prefix, folder):
    assert folder_of(prefix) == folder


@pytest.mark.parametrize(
    "prefix",
    ["", "/", "/a", "//a/b", "a//b", ".", "..", "a/..", "./a", "C:/a", "c:a", "\\\\s\\a", "a/../b", "a./b", "a /b"]
    + ["nul", "a/COM1", "con.png", "a%year%", "a*", "a\nb", "a\0", "x" * 101, "a/ b"],
)
def test_a_bad_prefix(prefix):
    with pytest.raises(ValueError, match=r"^The prefix .* cannot be a folder of the output folder: write names"):
        folder_of(prefix)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Input and output of a host in this process."""
    import folder_paths

    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    return tmp_path


def listed(**changes):
    from personalize.nodes.prompt_list import PromptList

    values = {
        "prompts": "a {}\na house",
        "prompt_file": "",
        "subject": "<dog>",
        "prefix": "p/q",
        "max_prompts": 0,
    } | changes
    return PromptList.execute(**values).result


@pytest.mark.comfy
def test_lists_and_the_file_of_prompts(folders):
    (folders / "input" / "more.txt").write_text("\ufeff{} in Köln\r\n\r\nlast\r\n", encoding="utf-8")
    prompts, prefixes, count = listed(prompt_file="more.txt")
    assert prompts == ["a <dog>", "a house", "<dog> in Köln", "last"] and count == 4
    names = ["01_a_dog", "02_a_house", "03_dog_in_Köln", "04_last"]
    assert prefixes == [f"p/q/{name}/image" for name in names]
    written = (folders / "output" / "p" / "q" / "prompts.txt").read_text(encoding="utf-8")
    assert written == table(prompts, names) == "".join(f"{n}\t{p}\n" for n, p in zip(names, prompts, strict=True))
    assert listed(prompt_file="more.txt", max_prompts=3)[0] == prompts[:3]
    assert listed(prompts="", prompt_file="more.txt")[0] == prompts[2:]
    assert os.listdir(folders / "output" / "p" / "q") == ["prompts.txt"]


@pytest.mark.comfy
def test_nothing_is_written_outside_the_output_folder(folders):
    (folders / "away").mkdir()
    (folders / "output" / "link").symlink_to(folders / "away", target_is_directory=True)
    for prefix in ("link", "link/x", "../away", str(folders / "away")):
        with pytest.raises(ValueError, match="inside ComfyUI's output folder|cannot be a folder"):
            listed(prefix=prefix)
    assert not [*(folders / "away").iterdir()]


@pytest.mark.comfy
def test_what_is_wrong_is_known_before_the_graph_runs(folders):
    """What a link brings is not, and does not stand in the way."""
    from personalize.nodes.prompt_list import PromptList

    (folders / "input" / "empty.txt").write_text("\n")
    good = {"prompts": "a {}", "prompt_file": "", "subject": "<dog>", "prefix": "p"}
    assert PromptList.validate_inputs(**good) is True
    for name, value in (
        ("prompts", "\n"),
        ("prompt_file", "none.txt"),
        ("prompt_file", "empty.txt"),
        ("subject", ""),
        ("prefix", ".."),
    ):
        assert re.match("The|There", str(PromptList.validate_inputs(**{**good, name: value}))), name
        assert PromptList.validate_inputs(**{**good, name: None}) is True
    assert PromptList.validate_inputs() is True


@pytest.mark.comfy
def test_a_changed_file_is_read_again(folders):
    from personalize.nodes.prompt_list import PromptList

    seen = [PromptList.fingerprint_inputs(prompt_file=None), PromptList.fingerprint_inputs(prompt_file="more.txt")]
    for text in ("a", "b"):
        (folders / "input" / "more.txt").write_text(text)
        seen.append(PromptList.fingerprint_inputs(prompt_file="more.txt", prefix="p"))
    assert len({*seen}) == 4 and PromptList.fingerprint_inputs(prompt_file="more.txt") == seen[-1]


# -- on a real server


@pytest.fixture(scope="module")
def drawing(server):
    """`drawing(**inputs)`: stock nodes behind a Prompt List, as an API prompt."""
    checkpoint = {"model": ["checkpoint", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    settings = {"seed": 1, "steps": 4, "cfg": 4.0, "sampler_name": "ddim", "scheduler": "normal", "denoise": 1.0}
    nodes = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": server.checkpoint}),
        "positive": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": ["list", 0]}),
        "negative": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 2}),
        "sampler": ("KSampler", checkpoint | settings | {"latent_image": ["latent", 0]}),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "out": ("SaveImage", {"images": ["decode", 0], "filename_prefix": ["list", 1]}),
    }

    def build(**inputs):
        chosen = {"prompts": "", "prompt_file": "", "subject": "dog", "prefix": "listed", "max_prompts": 0} | inputs
        listed = {"list": ("PersonalizePromptList", chosen)}
        return {name: {"class_type": kind, "inputs": given} for name, (kind, given) in (nodes | listed).items()}

    return build


@pytest.mark.slow
@pytest.mark.comfy
def test_a_folder_per_prompt_with_the_images_of_that_prompt(server, drawing):
    """The same images as each prompt gives alone."""
    prompts = ["a photo of a red dog", "a photo of a blue dog in the snow", "a photo of a green car"]
    (server.base / "input" / "last.txt").write_text(prompts[2])
    server.run(drawing(prompts="a photo of a red {}\na photo of a blue {} in the snow", prompt_file="last.txt"))
    root = server.base / "output" / "listed"
    names = folder_names(prompts)
    assert sorted(os.listdir(root)) == [*names, "prompts.txt"]
    assert (root / "prompts.txt").read_text() == table(prompts, names)
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        assert sorted(os.listdir(root / name)) == ["image_00001_.png", "image_00002_.png"]
        server.run(drawing(prompts=prompt, prefix=f"alone/{i}"))
        (alone,) = (server.base / "output" / "alone" / str(i)).glob("*/image_00001_.png")
        assert pixels(root / name / "image_00001_.png") == pixels(alone)
    assert len({pixels(root / name / "image_00001_.png") for name in names}) == 3


def pixels(file):
    from PIL import Image

    with Image.open(file) as picture:
        return picture.convert("RGB").tobytes()


@pytest.mark.slow
@pytest.mark.comfy
@pytest.mark.parametrize(
    "inputs", [{"prompts": "\n"}, {"prompts": "a", "prefix": "../x"}, {"prompts": "a", "prompt_file": "no"}]
)
def test_the_server_refuses_before_anything_runs(server, drawing, inputs):
    with pytest.raises(api.HostError) as refused:
        server.run(drawing(**inputs))
    assert re.search("no prompt|The prefix|prompts file", str(refused.value))

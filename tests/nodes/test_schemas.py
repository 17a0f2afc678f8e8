"""Are the nodes what saved workflows expect? Their schemas against tests/golden/nodes.json.

Workflows store widget values by position: a field may be added at the end, never moved, renamed or removed. The
golden file is edited by hand, so that somebody thinks about the workflows that exist.
"""

import asyncio
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from comfy_api.latest import io
from PIL import Image

pytestmark = pytest.mark.comfy
GOLDEN = Path(__file__).parents[1] / "golden" / "nodes.json"


def nodes():
    import personalize

    async def listed():
        return await (await personalize.comfy_entrypoint()).get_node_list()

    return asyncio.run(listed())


def fields(inputs):
    """Input names, types and defaults in their order; options of a dynamic combo within."""
    described = []
    for item in inputs:
        entry = [item.id, item.get_io_type(), getattr(item, "default", None)]
        for option in getattr(item, "options", None) or []:
            if hasattr(option, "inputs"):
                entry.append({option.key: fields(option.inputs)})
        described.append(entry)
    return described


def schema(node):
    described = node.define_schema()
    return {
        "inputs": fields(described.inputs),
        "outputs": [[output.get_io_type(), output.display_name] for output in described.outputs],
    }


def test_schemas_equal_the_golden_file():
    now = {node.define_schema().node_id: schema(node) for node in nodes()}
    assert json.loads(json.dumps(now)) == json.loads(GOLDEN.read_text())


def test_every_widget_explains_itself():
    from personalize.trainers.recipes import METHODS

    recipes = {type(recipe) for presets in METHODS.values() for recipe in presets.values()}
    for field in (field for recipe in recipes for field in dataclasses.fields(recipe)):
        assert field.metadata["help"].endswith(".") and len(field.metadata["help"]) > 15
    for node in nodes():
        schema = node.define_schema()
        assert schema.description.endswith(".")
        texts = [each for each in schema.inputs if getattr(each, "multiline", False)]
        for each in (*schema.outputs, *texts):
            assert (each.tooltip or "").endswith("."), f"{schema.node_id}: {each.id}"
        page = Path(__file__).parents[2] / "js" / "docs" / node.define_schema().node_id / "en.md"
        assert page.read_text(encoding="utf-8").startswith(f"# {node.define_schema().display_name}")


def recipe_nodes():
    """Every node that makes a recipe, with its presets."""
    from personalize.nodes import recipes
    from personalize.trainers.recipes import METHODS

    by_name = {node.define_schema().display_name: node for node in nodes()}
    assert {name for name, node in by_name.items() if node.__module__ == recipes.__name__} == METHODS.keys()
    return [(by_name[name], presets) for name, presets in METHODS.items()]


def test_recipe_widgets_are_its_fields():
    """The node gives back exactly the dataclass whose defaults it shows."""
    for node, presets in recipe_nodes():
        options = node.define_schema().inputs[0].options
        assert [option.key for option in options] == [*presets]
        for option in options:
            shown = {widget.id: widget.default for widget in option.inputs}
            assert node.execute({"preset": option.key, **shown}).result[0] == presets[option.key]


def test_no_preset_is_a_bare_number():
    """JavaScript puts such keys of an object first: the editor would offer that preset as the default."""
    assert not any(name.isdigit() for _, presets in recipe_nodes() for name in presets)


def test_a_prompt_without_newer_fields_takes_the_presets():
    """Saved by an older version of the pack, an API prompt lacks fields: none of them is required, each has a value."""
    for node, presets in recipe_nodes():
        for option in node.define_schema().inputs[0].options:
            assert all(widget.optional for widget in option.inputs)
            changed = next(widget.id for widget in option.inputs if widget.id.startswith("steps"))
            older = {widget.id: widget.default for widget in option.inputs[:9]} | {changed: 7}
            recipe = node.execute({"preset": option.key, **older}).result[0]
            assert recipe == dataclasses.replace(presets[option.key], **{changed: 7})
            assert node.execute({"preset": option.key}).result[0] == presets[option.key]
            missing = dict.fromkeys(widget.id for widget in option.inputs)  # what the host makes of them
            assert node.execute({**missing, "preset": option.key}).result[0] == presets[option.key]


@pytest.fixture
def references(tmp_path, monkeypatch):
    """`references(input=value, ...)`: what Load References makes of them, in an empty input folder."""
    import folder_paths

    from personalize.nodes.load_references import LoadReferences

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    shown = {i.id: i.default for i in LoadReferences.define_schema().inputs if getattr(i, "default", None) is not None}

    def load(images=None, masks=None, **values):
        inputs = {name: [value] for name, value in (shown | {"crop": "center"} | values).items()}
        inputs |= {"mask": masks} if masks else {}
        return LoadReferences.execute(**inputs, images={"image0": images} if images else None).result

    return load


@pytest.fixture
def load_references(references):
    """The CONCEPT alone."""
    return lambda *images, **values: references(*images, **values)[0]


@pytest.mark.parametrize(
    ("crop", "resolution", "size"),
    [
        ("center", 0, (512, 512)),
        ("random", 64, (64, 64)),
        ("bucket", 0, (416, 608)),
        ("bucket", 64, (48, 80)),
    ],
)
def test_width_and_height_are_those_of_the_first_image(references, crop, resolution, size):
    pictures = [torch.rand(1, 60, 40, 3), torch.rand(1, 40, 60, 3)]
    width, height = references(pictures, crop=crop, resolution=resolution)[-2:]
    assert (width, height) == size
    assert references(pictures, crop=crop, resolution=resolution, select_images="2")[-2:] == size[::-1]


def test_captions_follow_their_images(load_references, tmp_path):
    """Lines for connected images, files for those of a folder; both go with the choice."""
    pictures = [torch.full((1, 16, 16, 3), i / 4) for i in range(3)]
    lines = "A house in {}\n\n {} on a hill \n"
    assert load_references(pictures, captions=lines).captions == ("A house in {}", "", "{} on a hill")
    assert load_references(pictures, captions=lines, max_images=1).captions == ("A house in {}",)
    assert load_references(pictures, captions=lines, select_images="3, 1").captions == ("{} on a hill", "A house in {}")
    assert load_references(pictures, captions=lines, select_images="2").captions == ()
    assert load_references(pictures).captions == ()

    (tmp_path / "many").mkdir()
    for name in ("a.png", "b.jpg", "c.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / "many" / name)
    (tmp_path / "many" / "b.txt").write_text("\ufeffA tree\n in {}\n", encoding="utf-8")
    concept = load_references(folder="many")
    assert len(concept.images) == 3 and concept.captions == ("", "A tree in {}", "")
    both = load_references(pictures, captions=lines, folder="many", select_images="3-5")
    assert both.captions == ("{} on a hill", "", "A tree in {}")


def test_texts_of_a_list_stay_with_their_images(load_references):
    """One element is one caption, also one of several lines; core's dataset nodes return such lists."""
    from personalize.nodes.evaluation.score_images import prompts_for
    from personalize.nodes.load_references import LoadReferences

    shown = {
        i.id: [i.default] for i in LoadReferences.define_schema().inputs if getattr(i, "default", None) is not None
    }
    images = {"image0": [torch.full((1, 16, 16, 3), i / 4) for i in range(3)]}
    texts = ["A house\nin {}\n", "", "{} on\r\na hill"]
    concept = LoadReferences.execute(**shown | {"crop": ["center"], "captions": texts}, images=images).result[0]
    assert concept.captions == ("A house in {}", "", "{} on a hill")
    with pytest.raises(ValueError, match="2 lines but 3 images"):
        LoadReferences.execute(**shown | {"crop": ["center"], "captions": texts[:2]}, images=images)
    assert prompts_for(["a\ndog", "a cat"], [1, 2]) == ["a dog", "a cat", "a cat"]
    for batches in ([2], [1, 1]):
        assert prompts_for(["a dog\na cat"], batches) == ["a dog", "a cat"]


def test_bad_captions_get_one_sentence(load_references, tmp_path):
    pictures = [torch.rand(1, 16, 16, 3)] * 2
    for lines, sentence in (
        ("one {}", "1 lines but 2 images"),
        ("{}\n{}\n{}", "3 lines"),
        ("{}\na house", r"'a house' .* write \{\}"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_references(pictures, captions=lines)
    (tmp_path / "many").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "many" / "a.png")
    (tmp_path.parent / "secret.txt").write_text("{}")
    (tmp_path / "many" / "a.txt").symlink_to(tmp_path.parent / "secret.txt")
    with pytest.raises(ValueError, match="not inside"):
        load_references(folder="many")
    (tmp_path / "many" / "a.txt").unlink()
    Image.new("RGB", (16, 16)).save(tmp_path.parent / "secret.png")
    (tmp_path / "many" / "b.png").symlink_to(tmp_path.parent / "secret.png")
    with pytest.raises(ValueError, match=r"^The path 'many/b\.png' is not inside ComfyUI's input folder"):
        load_references(folder="many")
    (tmp_path / "many" / "b.png").unlink()
    (tmp_path / "many" / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt' cannot be read as text"):
        load_references(folder="many")


def test_class_images_come_from_a_socket_and_a_folder(load_references, tmp_path):
    """Connected ones first, without captions; those of a folder with the texts beside them."""
    (tmp_path / "cats").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (24, 16), (255, 0, 0)).save(tmp_path / "cats" / name)
    picture, batch = torch.rand(1, 16, 16, 3), torch.full((2, 16, 20, 3), 0.25)
    concept = load_references([picture], class_images=batch, class_folder="cats")
    assert [tuple(image.shape) for image in concept.class_images] == [(3, 16, 20)] * 2 + [(3, 16, 24)] * 2
    assert concept.class_images[0].mean() == 0.25 and concept.class_captions == ()
    (tmp_path / "cats" / "b.txt").write_text("a cat on a roof")
    concept = load_references([picture], class_images=batch, class_folder="cats", class_word="cat")
    assert concept.class_captions == ("", "", "", "a cat on a roof")
    assert concept.class_prompts() == ["a photo of a cat"] * 3 + ["a cat on a roof"]
    assert len(concept.images) == 1 and load_references([picture]).class_images == ()
    for folder, sentence in (("none", "does not exist"), ("../..", "not inside")):
        with pytest.raises(ValueError, match=sentence):
            load_references([picture], class_folder=folder)


def test_captions_come_from_a_file_in_the_input_folder(tmp_path, monkeypatch):
    import folder_paths

    from personalize.nodes.recipes import RECIPES

    textboost = RECIPES[0]
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "mine.txt").write_text("a boat\n\n  two boats \n")
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "input" / "empty.txt").write_text("\n")
    (tmp_path / "input" / "odd.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "input" / "link.txt").symlink_to(tmp_path / "secret.txt")
    recipe = textboost.execute({"preset": "readme", "captions": "mine.txt"}).result[0]
    assert recipe.captions == ("a boat", "two boats")
    for name in ("../secret.txt", str(tmp_path / "secret.txt"), "link.txt", "a\0b", "..", "..\\..\\x/../../y"):
        with pytest.raises(ValueError, match="not inside|cannot be read"):
            textboost.execute({"preset": "readme", "captions": name})
    for name, sentence in (("empty.txt", "is empty"), ("odd.txt", "as text"), ("none.txt", "cannot be read")):
        with pytest.raises(ValueError, match=sentence):
            textboost.execute({"preset": "readme", "captions": name})


def named_paths(inputs):
    """Every text of these inputs whose tooltip says that it names a file or a folder: option of a preset, and id."""
    for item in inputs:
        for option in getattr(item, "options", None) or []:
            if hasattr(option, "inputs"):
                yield from ((option.key, name) for _, name in named_paths(option.inputs))
        speaks = re.search(r"\b(files?|folders?)\b", item.tooltip or "", re.IGNORECASE)
        if item.get_io_type() == "STRING" and speaks and item.id not in OTHERS:
            yield "", item.id


OTHERS = {"prefix", "name", "clip_model", "dino_model"}  # what is written, and architectures of files
# Texts whose tooltips speak of files that others name.
TEXTS = {("PersonalizeLoadReferences", "captions"), ("PersonalizeLoadFiles", "placeholder_token")}


def test_what_a_path_names_is_noticed_when_it_changes(tmp_path, monkeypatch):
    """Every input of every node that reads a file or a folder: the host asks `fingerprint_inputs` before it runs."""
    import folder_paths

    from personalize.nodes.schema import CHANGING

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    for kind in ("clip_vision", "personalize"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors"}))
    tested = set()
    for node in nodes():
        schema = node.define_schema()
        for preset, name in named_paths(schema.inputs):
            if (schema.node_id, name) in TEXTS:
                continue

            def state(text, node=node, schema=schema, preset=preset, name=name):
                value = [text] if schema.is_input_list else text
                inputs = {"preset": {"preset": preset, name: value}} if preset else {name: value}
                return node.fingerprint_inputs(**inputs)

            (tmp_path / "thing").mkdir()
            (tmp_path / "thing" / "a.png").write_text("a")
            (tmp_path / "words.txt").write_text("a")
            for changed, text in ((tmp_path / "words.txt", "words.txt"), (tmp_path / "thing" / "a.png", " thing")):
                before = state(text)
                assert before == state(text) != state(""), (schema.node_id, name)
                changed.write_text("b")
                assert state(text) != before, (schema.node_id, name)
            before = state("thing")
            (tmp_path / "thing" / "a.txt").write_text("words")
            assert state("thing") != before
            assert state(None) != state(None)  # a link, whose value is not known yet
            shutil.rmtree(tmp_path / "thing")
            tested.add((schema.node_id, name))
        for item in schema.inputs:
            asked = node.fingerprint_inputs.__func__ is not io.ComfyNode.fingerprint_inputs.__func__
            assert asked or item.id not in CHANGING
    assert {name for _, name in tested} == {
        "folder", "class_folder", "prompt_file", "captions", "clip_weights", "dino_weights", "lpips_weights"
    }  # fmt: skip


def test_only_chosen_files_are_read_and_what_is_left_out_is_said(references, tmp_path, monkeypatch):
    from personalize.nodes import load_references as node
    from personalize.trainers import images

    (tmp_path / "many").mkdir()
    for i in (1, 2, 10):
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(tmp_path / "many" / f"img{i}.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "many" / "img2-masklabel.png")
    (tmp_path / "many" / "img3.gif").write_bytes(b"x")
    read, said, original = [], [], images.read_image
    monkeypatch.setattr(images, "read_image", lambda file: read.append(file.name) or original(file))
    monkeypatch.setattr(node.session, "notices", lambda number: said.append)
    connected = [torch.ones(1, 16, 16, 3)]
    concept = references(connected, folder="many", select_images="1, 4")[0]
    assert read == ["img10.png"] and said == ["left out: 'img3.gif'"]
    assert len(concept.images) == 2 and concept.masks is None
    concept = references(connected, folder="many", max_images=3)[0]
    assert read[1:] == ["img1.png", "img2.png", "img2-masklabel.png"]
    assert [mask.shape for mask in concept.masks] == [(1, 16, 16)] * 3


def test_load_images_mask_of_a_cut_out_is_the_subjects_when_inverted(references, tmp_path, monkeypatch):
    """Core's own Load Image, which masks what is transparent and hands on the black below it."""
    import nodes as core
    from personalize.nodes import load_references as node

    shown = []
    monkeypatch.setattr(node.session, "preview", lambda images, cls: shown.append(images) or {})
    subject = Image.new("RGBA", (16, 24))
    subject.paste((0, 0, 255, 255), (0, 0, 8, 24))
    subject.save(tmp_path / "cut_out.png")
    Image.new("RGB", (16, 24), "blue").save(tmp_path / "whole.png")
    (cut_out, its_mask), (whole, no_mask) = (
        core.LoadImage().load_image(f"{name}.png") for name in ("cut_out", "whole")
    )
    assert its_mask[0, :, 8:].eq(1).all() and cut_out[0, :, 8:].eq(0).all()
    concept = references([cut_out, whole], masks=[its_mask, no_mask], invert_mask=True)[0]
    first, second = concept.masks
    assert first[0, :, :8].eq(1).all() and first[0, :, 8:].eq(0).all() and second.eq(1).all()
    assert second.shape == first.shape == (1, 24, 16)
    assert concept.images[0][:, :, 8:].eq(1).all() and torch.equal(concept.images[0][2], torch.ones(24, 16))
    assert torch.equal(concept.images[1], whole[0].movedim(-1, 0))
    (overlay,) = shown
    assert torch.equal(overlay[0, :, :8], concept.images[0][:, :, :8].movedim(0, -1))
    assert torch.allclose(overlay[0, 0, 15], torch.tensor([1.0, 0.3, 0.3]))

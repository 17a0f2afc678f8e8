"""What users see before they train: are help pages, README, icon and archive complete and up to date?"""

import re
from pathlib import Path

import pytest
from PIL import Image

from personalize import docs
from personalize.tests.support import archive

ROOT = Path(__file__).resolve().parents[2]


def schemas():
    import asyncio

    import personalize

    async def listed():
        return await (await personalize.comfy_entrypoint()).get_node_list()

    return [node.define_schema() for node in asyncio.run(listed())]


@pytest.mark.comfy
def test_every_input_stands_on_its_nodes_help_page():
    """In bold, where it is explained; of a dynamic combo its options, whose fields the table of settings explains."""
    for schema in schemas():
        page = (ROOT / "js" / "docs" / schema.node_id / "en.md").read_text(encoding="utf-8")
        bold = set(re.findall(r"\*\*(.+?)\*\*", page))
        for each in schema.inputs:
            dynamic = [option.key for option in getattr(each, "options", None) or [] if hasattr(option, "inputs")]
            assert bold >= set(dynamic or [each.id]), f"{schema.node_id}: {each.id}"


@pytest.mark.comfy
def test_every_node_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [schema.display_name for schema in schemas() if f"**{schema.display_name}**" not in readme] == []


@pytest.mark.parametrize("node", docs.nodes("personalize.trainers"))
def test_the_table_of_settings_is_that_of_the_dataclasses(node):
    page = docs.page(node).read_text(encoding="utf-8")
    assert page == docs.filled(page, docs.nodes("personalize.trainers")[node]), "run: python dev.py docs"


@pytest.mark.comfy
def test_every_node_with_settings_has_their_table():
    """Recipes, monitors and metric models are made by nodes whose pages have a table."""
    kinds = ("PERSONALIZE_RECIPE", "PERSONALIZE_STOPPER", "PERSONALIZE_METRIC_MODELS")
    made = {schema.display_name for schema in schemas() if schema.outputs[0].get_io_type() in kinds}
    assert made == docs.nodes("personalize.trainers").keys()


def test_what_the_readme_links_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_the_icon_is_what_lists_of_packs_take():
    from personalize.demo import icon, world

    with Image.open(icon.ICON) as picture:
        assert picture.size == (400, 400) and icon.ICON.stat().st_size < 10_000
        drawn = world.picture(icon.tiles(), icon.TILE)
        assert picture.convert("RGB").tobytes() == drawn.tobytes(), "run: python -m demo.icon"


def test_the_archive_holds_what_users_need_and_nothing_else():
    tops = {file.split("/")[0] for file in archive.files()}
    assert tops == {"nodes", "trainers", "js", "locales", "workflows", "subgraphs", "__init__.py", "pyproject.toml"} | {
        "requirements.txt", "README.md", "LICENSE", "CHANGELOG.md",
    }  # fmt: skip

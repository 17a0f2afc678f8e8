"""The published archive in a fresh ComfyUI: does it work without the rest of the repository?

Only demo/host_node, which lets the stock loader recognise the tiny checkpoint, comes from the repository.
"""

import json
import zipfile
from pathlib import Path

import pytest

from personalize.demo import show
from personalize.demo.workflow import override, to_api
from personalize.tests.support import archive, host

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("installed")
    pack = base / "custom_nodes" / "personalize"
    archive.build(base / "personalize.zip")
    with zipfile.ZipFile(base / "personalize.zip") as file:
        file.extractall(pack)
    with host.start(comfyui, base, cpu=None, pack=pack) as running:
        yield running


@pytest.fixture(scope="module")
def registered(installed):
    """The pack's nodes as the server lists them, all of them and from the archive."""
    nodes = installed.client.object_info()
    return {name for name, node in nodes.items() if node["python_module"] == "custom_nodes.personalize"}


def test_all_nodes_are_registered_and_nothing_is_complained_of(installed, registered):
    golden = json.loads((ROOT / "tests" / "golden" / "nodes.json").read_text(encoding="utf-8"))
    assert registered == golden.keys()
    for word in ("IMPORT FAILED", "Traceback", "ModuleNotFoundError"):
        assert word not in installed.log


def test_help_pages_and_translations_are_served(installed, registered):
    for node in registered:
        page = installed.client.fetch(f"/extensions/personalize/docs/{node}/en.md").decode()
        assert page == (ROOT / "js" / "docs" / node / "en.md").read_text(encoding="utf-8")
    served = installed.client.get("/i18n")
    languages = {path.parent.name for path in (ROOT / "locales").glob("*/nodeDefs.json")}
    assert languages and {name for name in served if registered <= served[name]["nodeDefs"].keys()} == languages


def test_a_template_trains_and_draws(installed):
    templates = installed.client.get("/workflow_templates")["personalize"]
    assert set(templates) == {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert installed.client.fetch("/api/workflow_templates/personalize/before_and_after.jpg")

    workflow = installed.client.get("/api/workflow_templates/personalize/before_and_after.json")
    prompt = to_api(workflow, installed.client.object_info())
    prompt = override(override(prompt, host.demo_overrides()), host.QUICK)
    images = installed.images(installed.run(prompt))
    untrained, trained = (images[show.node_titled(prompt, title)][0] for title in (show.UNTRAINED, show.TRAINED))
    assert untrained.tobytes() != trained.tobytes()

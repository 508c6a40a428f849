"""What users read, in every language: names, tooltips, help pages, notes of the examples. A real server serves it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = "/extensions/semantic-diffusion-guidance/docs"
DOCS = ROOT / "web/docs"
LANGUAGES = {"en": "{}.md", "zh": "{}/zh.md"}
"""Where the frontend finds a node's help: in the user's language, and the one beside it for all other languages."""
EXAMPLES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "example_workflows").glob("*.json"))}
NODES = sorted(json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8")))
MARKS = "{}@|"
"""The frontend's messages give these a meaning of their own."""
CHINESE = re.compile(r"[\u4e00-\u9fff]")
OPTIONAL = "可选"
SAME = {"cfg", "vae", "VAE", "CLIP", "Latent", "json"}
"""Names that are the same in Chinese."""

words = pytest.mark.parametrize("language", LANGUAGES)
nodes = pytest.mark.parametrize("node", NODES)
examples = pytest.mark.parametrize("name", EXAMPLES)


spec = importlib.util.spec_from_file_location("sdg_words_server", Path(__file__).with_name("server.py"))
tools = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tools
spec.loader.exec_module(tools)


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The scripts of this folder by name, which import each other. ComfyUI has a module ``server`` too, which stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setitem(sys.modules, "server", tools)
        names = ("make_locales", "make_workflows", "make_model_workflows")
        return {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def server(comfyui_path, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    tools.install(base)
    with tools.serve(comfyui_path, base) as server:
        yield server


@pytest.fixture(scope="module")
def info(server) -> dict:
    return {name: node for name, node in server.get("/object_info").items() if name.startswith("SDG")}


def locale(language: str, part: str = "nodeDefs") -> dict:
    return json.loads((ROOT / f"locales/{language}/{part}.json").read_text(encoding="utf-8"))


def page(language: str, node: str) -> str:
    return (DOCS / LANGUAGES[language].format(node)).read_text(encoding="utf-8")


def leaves(entry: dict | str, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys on the way, text) of all texts of a locale file."""
    if isinstance(entry, str):
        yield path, entry
        return
    for key, value in entry.items():
        yield from leaves(value, (*path, key))


# Names and tooltips


def test_every_node_of_the_host_has_words(info):
    assert sorted(info) == NODES


def test_every_node_input_and_output_says_what_it_is(info):
    for name, node in info.items():
        assert node["description"], name
        inputs = node["input"].get("required", {}) | node["input"].get("optional", {})
        assert not [(name, i) for i, (_, *options) in inputs.items() if not (options and options[0].get("tooltip"))]
        assert len(node["output_tooltips"] or ()) == len(node["output"]), name
        assert all(node["output_tooltips"]), name


def test_english_is_what_the_schemas_say(scripts, info):
    make_locales = scripts["make_locales"]
    written = (ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8")
    assert written == make_locales.as_text(make_locales.english(info)), "Run python tests/host/make_locales.py."


@pytest.mark.parametrize("part", ["nodeDefs", "main"])
def test_chinese_says_all_that_english_says(part):
    english, chinese = (dict(leaves(locale(language, part))) for language in ("en", "zh"))
    assert list(chinese) == list(english)
    assert not [path for path, text in chinese.items() if text not in SAME and not CHINESE.search(text)]


def test_no_word_holds_a_mark_of_the_frontends_messages():
    for language in LANGUAGES:
        for part in ("nodeDefs", "main"):
            found = [(path, text) for path, text in leaves(locale(language, part)) if set(text) & set(MARKS)]
            assert not found, language


def test_a_node_has_one_name_in_chinese():
    names = [node["display_name"] for node in locale("zh").values()]
    assert len({*names}) == len(names)
    assert all(name.endswith(" (SDG)") for name in names)


@words
def test_the_host_serves_our_words(server, language):
    served = server.get("/i18n")[language]
    ours = locale(language)
    assert {name: served["nodeDefs"][name] for name in ours} == ours
    for key, value in locale(language, "main").items():
        assert value.items() <= served[key].items()


# Help pages


@words
@nodes
def test_a_help_page_names_its_node_and_every_input(language, node):
    text, entry = page(language, node), locale(language)[node]
    assert text.startswith(f"# {entry['display_name']}\n")
    for name in entry["inputs"]:
        assert re.search(rf"(?<!\w){name}(?!\w)", text, re.ASCII), name
        said = re.search(rf"\*\*{name}\*\*\uff08(\w+[\w ]*)\uff09", text)  # its name here, in full-width brackets
        if said and said[1] != OPTIONAL:
            assert entry["inputs"][name]["name"].startswith(said[1]), name


@nodes
def test_a_page_in_chinese_says_what_the_english_one_says(node):
    english, chinese = page("en", node), page("zh", node)
    for part in (r"^- \*\*", r"^\| ", r"!\[", r"^\*\*", r"`[^`]+`"):
        assert len(re.findall(part, english, re.MULTILINE)) == len(re.findall(part, chinese, re.MULTILINE)), part
    assert sorted(pictures(english)) == sorted(pictures(chinese))
    assert sorted(templates(english)) == sorted(templates(chinese))


def pictures(text: str) -> list[str]:
    return re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)


def templates(text: str) -> list[str]:
    """The examples that the last paragraph of a page names."""
    last = text.rstrip().split("\n\n")[-1]
    assert re.match(r"\*\*(Templates?\.|模板。)\*\*", last)
    return [name for name in re.findall(r"\*(\w+)\*", last) if name != "project"]


@words
@nodes
def test_a_help_page_names_templates_that_hold_its_node(language, node):
    named = templates(page(language, node))
    assert named
    for name in named:
        assert node in {part["type"] for part in EXAMPLES[name]["nodes"]}, name


@words
@nodes
def test_help_is_served_with_its_pictures(server, language, node):
    """Pictures lie where the frontend looks for them: it takes every page's addresses from the folder of all pages."""
    kind, text = fetched(server, f"{FOLDER}/{LANGUAGES[language].format(node)}")
    assert "html" not in kind
    assert text.decode() == page(language, node)
    for name in pictures(text.decode()):
        kind, picture = fetched(server, f"{FOLDER}/{name}")
        assert kind == "image/jpeg"
        assert 0 < len(picture) < 60_000
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text.decode())
    assert not [link for link in links if not link.startswith("https://")], "The frontend leaves links as they are."


def test_a_language_without_a_page_gets_the_english_one(server):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(server, f"{FOLDER}/{NODES[0]}/en.md")


def test_no_help_file_is_left_over():
    shown = {name for node in NODES for name in pictures(page("en", node))}
    pages = {pattern.format(node) for node in NODES for pattern in LANGUAGES.values()}
    assert {str(path.relative_to(DOCS).as_posix()) for path in DOCS.rglob("*.*")} == shown | pages


def fetched(server, path: str) -> tuple[str, bytes]:
    with urllib.request.urlopen(server.url + path, timeout=60) as answer:
        return answer.headers.get_content_type(), answer.read()


# Examples


@nodes
def test_every_node_stands_in_an_example(node):
    assert [name for name, workflow in EXAMPLES.items() if node in {part["type"] for part in workflow["nodes"]}]


@examples
def test_an_example_says_what_to_change_first(name):
    notes = [part["widgets_values"][0] for part in EXAMPLES[name]["nodes"] if part["type"] in ("Note", "MarkdownNote")]
    assert len([note for note in notes if "Change first: " in note]) == 1


@examples
def test_titles_of_an_example_are_its_own(info, name):
    """The frontend shows a node without a title by its name in the user's language."""
    own = {node["display_name"] for node in info.values()}
    assert not [part["title"] for part in EXAMPLES[name]["nodes"] if part.get("title") in own]
    assert (ROOT / f"example_workflows/{name}.jpg").stat().st_size < 60_000


def test_examples_are_what_their_scripts_write(scripts, monkeypatch, tmp_path):
    (tmp_path / "example_workflows").mkdir()
    monkeypatch.setattr(scripts["make_workflows"], "ROOT", tmp_path)
    for name in ("make_workflows", "make_model_workflows"):
        for example in scripts[name].EXAMPLES:
            example()
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "example_workflows").glob("*.json")}
    assert written == EXAMPLES


# The package


def test_words_travel_in_the_registrys_package():
    pathspec = pytest.importorskip("pathspec")
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", (ROOT / ".comfyignore").read_text().splitlines())
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("Not a git repository, so what the package takes from it can't be listed.")
    files = {*listed.stdout.splitlines()}
    packed = {name for name in files if not ignored.match_file(name)}
    wanted = {f"locales/{language}/{part}.json" for language in LANGUAGES for part in ("nodeDefs", "main")}
    wanted |= {str(path.relative_to(ROOT).as_posix()) for path in DOCS.rglob("*.*")} | {"README.md", "README.zh.md"}
    assert wanted <= packed
    of_pixels = {f"example_workflows/{name}.json" for name in EXAMPLES if needs_pixel_world(name)}
    assert not of_pixels & packed, "These need the pixel world, which the package leaves out."


def needs_pixel_world(name: str) -> bool:
    loaders = [part for part in EXAMPLES[name]["nodes"] if part["type"] in ("SDGLoadADM", "SDGLoadNoisyCLIP")]
    return any("avatars (bundled)" in part["widgets_values"] for part in loaders)

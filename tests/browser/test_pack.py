"""The pack as its users meet it: found, placed, wired, opened as a template, run, watched."""

from __future__ import annotations

import io
import json
import re

import pytest
from PIL import Image

SAMPLER = "SDGGuidedKSampler"
MINUS = "\N{MINUS SIGN}"
EXECUTE = "command => app.extensionManager.command.execute(command)"
CATEGORY = re.compile("semantic.diffusion.guidance", re.IGNORECASE)
"""The pack among the templates: its folder, or its name in the user's language where the frontend looks that up."""


def test_nodes_are_found_placed_and_wired_and_say_what_is_missing(frontend):
    frontend.clear()
    frontend.place("Text Guidance", 150, 160)
    frontend.place("Guided KSampler", 760, 160)
    colours = [frontend.of(kind, "node.bgcolor") for kind in ("SDGTextGuidance", SAMPLER)]
    assert len(set(colours)) == 2
    assert "No model" in frontend.chart(SAMPLER)["words"]
    frontend.wire("SDGTextGuidance", "GUIDANCE", SAMPLER, "guidance")
    assert frontend.of(SAMPLER, "node.inputs.find(input => input.name === 'guidance').link") is not None
    frontend.shoot("wired")
    (values,) = [
        n["widgets_values"]
        for n in json.loads(frontend.page.evaluate("JSON.stringify(app.graph.serialize())"))["nodes"]
        if n["type"] == SAMPLER
    ]
    assert values == [values[0], "randomize", 20, 8.0, "euler", "simple", 1.0, "absolute", 1.0, "auto", False]


def test_a_node_keeps_colours_that_its_user_chose(frontend):
    frontend.clear()
    frontend.place("Guided KSampler", 400, 160)
    workflow = json.loads(frontend.page.evaluate("JSON.stringify(app.graph.serialize())"))
    for colours in ({"color": "#123", "bgcolor": "#456"}, {}):
        for node in workflow["nodes"]:
            node.pop("color", None), node.pop("bgcolor", None), node.update(colours)
        frontend.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        frontend.page.wait_for_timeout(500)
        assert frontend.of(SAMPLER, "node.bgcolor ?? null") == colours.get("bgcolor")


def test_a_template_runs_and_its_charts_show_the_run_whatever_the_page_does(frontend):
    """Reloaded in the middle, away in another workflow, zoomed; and in the end the report's values."""
    open_template(frontend, "text_and_image")
    for number in (0, 1):  # a seed of its own, so that nothing comes from the cache
        frontend.ask("set", SAMPLER, number, {"seed": sum(frontend.name.encode()), "steps": 20})
    frontend.page.get_by_role("button", name="Run", exact=True).first.click()
    frontend.look_at_node(SAMPLER)
    frontend.wait_for_chart(SAMPLER, "/^step|steps$/.test(title)", 0)  # one small picture: it may be over
    moving = frontend.wait_for_chart(SAMPLER, "title.startsWith('step') && chart.points >= 3")
    frontend.shoot("running")
    frontend.open()
    again = frontend.wait_for_chart(SAMPLER, "chart.points >= 1")  # the whole curve at once, not what comes
    assert again["points"] >= moving["points"]
    elsewhere_and_back(frontend)
    done = frontend.wait_for_chart(SAMPLER, "title === '20 steps'")
    assert frontend.chart(SAMPLER, 0)["rows"][0] == ["score and pull by step", "20 steps"]
    check_against_report(frontend, done)
    for scale in (0.3, 1.0):
        frontend.look_at_node(SAMPLER, scale)
        assert frontend.chart(SAMPLER)["points"] == done["points"]
    frontend.shoot("done")
    hover(frontend)
    frontend.shoot("hover")
    frontend.page.mouse.wheel(0, -120)  # over the chart the canvas is zoomed as over the node
    frontend.page.wait_for_function("app.canvas.ds.scale > 1")


def test_two_copies_of_a_template_have_charts_of_their_own(frontend):
    """In two tabs, from the same file: what one ran does not stand at the other."""
    frontend.open()
    open_template(frontend, "text")
    first = frontend.page.evaluate("app.graph.id")
    frontend.ask("set", SAMPLER, -1, {"seed": 1 + sum(frontend.name.encode()), "steps": 4})
    frontend.page.get_by_role("button", name="Run", exact=True).first.click()
    frontend.wait_for_chart(SAMPLER, "title === '4 steps'")
    frontend.wait_until_idle()
    open_template(frontend, "text")
    frontend.page.wait_for_function("first => app.graph.id !== first", arg=first)
    assert frontend.chart(SAMPLER)["points"] == 0
    frontend.page.evaluate(EXECUTE, "Workspace.PreviousOpenedWorkflow")
    frontend.page.wait_for_function("first => app.graph.id === first", arg=first)
    frontend.wait_for_chart(SAMPLER, "title === '4 steps' && chart.points === 4")


def elsewhere_and_back(frontend) -> None:
    """To a new workflow, and back to the first."""
    frontend.page.evaluate(EXECUTE, "Comfy.NewBlankWorkflow")
    frontend.page.wait_for_function("kind => !sdg.node(kind)", arg=SAMPLER)
    frontend.page.evaluate(EXECUTE, "Workspace.PreviousOpenedWorkflow")
    frontend.page.wait_for_function("kind => sdg.node(kind)", arg=SAMPLER)


def open_template(frontend, name: str) -> None:
    """By the template browser, as its users do."""
    page = frontend.page
    page.get_by_role("button", name="Templates").first.click()
    dialog = page.get_by_role("dialog").last
    dialog.get_by_text(CATEGORY).first.click()
    dialog.get_by_text(name, exact=True).first.click()
    page.wait_for_function("kind => app.graph.nodes.some(node => node.type === kind)", arg=SAMPLER)
    page.wait_for_timeout(500)


def check_against_report(frontend, shown: dict) -> None:
    """What the chart says is what the run's report says, which a saved picture holds, and what the server keeps."""
    frontend.wait_until_idle()
    entry = max(frontend.server.get("/history").values(), key=lambda entry: entry["prompt"][0])
    picture = Image.open(io.BytesIO(frontend.server.pictures(entry)[0]))
    report = list(json.loads(picture.text["sdg_report"]).values())[-1]
    workflow = frontend.page.evaluate("app.graph.id")
    node = frontend.of(SAMPLER, "String(node.id)")
    kept = frontend.server.get(f"/semantic-diffusion-guidance/curves?workflow={workflow}")["curves"]
    (curve,) = [curve for curve in kept if curve["node"] == node]
    for k, part in enumerate(report["guidances"]):
        assert [point[3 + k] for point in curve["points"]] == part["score"]["mean"]
    assert [point[1] for point in curve["points"]] == report["pull"]["mean"]
    assert [row[0] for row in shown["rows"][1:]] == [part["name"] for part in report["guidances"]] + ["pull"]
    for row, part in zip(shown["rows"][1:], report["guidances"], strict=False):
        known = [score for score in part["score"]["mean"] if score is not None]
        said = [float(word.replace(MINUS, "-")) for word in row[1].split(" → ")]
        assert said == pytest.approx([known[0], known[-1]], abs=6e-4)


def hover(frontend) -> None:
    """Over a place in the chart, the legend says the values there."""
    frontend.page.mouse.move(*frontend.ask("middle", SAMPLER))
    shown = frontend.wait_for_chart(SAMPLER, "title.startsWith('at step')")
    assert "→" not in shown["rows"][1][1]

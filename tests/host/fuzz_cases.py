"""Hypothesis strategies for what a client may post to /prompt: workflows with one to three faults, and made-up graphs.

Every fault belongs to a kind of ``KINDS``. A case says in words what was changed, so that a failure can be read.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Prompt = dict[str, dict]
NEVER = ("SDGFinetuneNoisyCLIP",)
"""Nodes that made-up graphs leave out, because a run takes seconds; they are in the workflows."""
OURS = 4
"""How much more often made-up graphs draw a node of ours than an odd one."""
SLOW = {"steps": 2, "width": 32, "height": 32, "batch_size": 2, "micro_batch": 2, "size": 32}
"""Widgets whose larger values take long or much memory, with a value that does not."""
HUGE = {"width", "height", "batch_size", "micro_batch", "size", "steps", "frames", "seed"}
WRONG_VALUES = [
    None, True, "", "word", "1e5", " ", -1, 0.5, 2**63, 10**400, float("nan"), float("inf"), float("-inf"), [],
    [1, 2, 3], [["1", 0], 0], {}, {"a": 1}, {"__value__": [1]}, {"__value__": None}, "\ud800", "\0", "9" * 5000,
    "\N{COLLISION SYMBOL}",
]  # fmt: skip
TEXTS = [
    "", " ", "\n", "a", "red hair", "word " * 400, "\N{COLLISION SYMBOL}" * 30, "\ud800", "a\0b", "..", "../..", "/",
    "C:\\x", "nan", "-1", "0", "1,2,3,4,5", "3,3", "0-4,-1", "5-1", "1;2", "1.5", "-", "--1", "9" * 5000,
    "0-999999999999", "99999999999999999999", "\u0663", "name/with/slashes", "n" * 400, "CON", ".hidden", "$(ls)",
    "%s%n", "{0}",
]  # fmt: skip
SLOTS = [1, 7, -1, -9, 0.5, "0", None, True, 10**30, [0]]
CLASSES = ["NoSuchNode", "", "SDGTextguidance", None, 5, "SDGLoadADM ", "OddSink\0"]
PARTS = {"start_percent": (0.0, 0.4), "end_percent": (0.5, 1.0)}
"""Numbers that fit each other."""
LARGE = {
    "width": [4096, 16384, 16385, 2**40], "height": [4096, 16384, 2**31], "batch_size": [512, 4096, 65536, 2**40],
    "micro_batch": [65536, 2**40], "size": [4096, 4097], "steps": [10_000, 1_000_000, 10**9],
    "frames": ["0-999999999999", "9" * 5000], "seed": [2**64 - 1, 2**64],
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class World:
    """What cases are made of: the host's schemas, and prompts that run."""

    info: dict
    bases: dict[str, Prompt]


@dataclass(frozen=True)
class Case:
    """One post. ``slow``: it may be valid and take long, so it is run alone and cancelled."""

    kind: str
    what: str
    body: bytes = field(repr=False)
    prompt: Prompt | None = field(default=None, repr=False)
    slow: bool = False


Fault = Callable[[DrawFn, World, Prompt], str]
"""Changes a prompt in place, and says how."""


# The graph


def widgets(world: World, class_type: str) -> dict[str, tuple]:
    """(type, options) of the inputs of a node that take a value and not only a link."""
    return {name: (kind, options) for name, (kind, options) in schema(world, class_type).items() if is_widget(kind)}


def schema(world: World, class_type: str) -> dict[str, tuple]:
    inputs = world.info[class_type]["input"]
    parts = {**inputs.get("required", {}), **inputs.get("optional", {})}
    return {name: (part[0], part[1] if len(part) > 1 else {}) for name, part in parts.items()}


def is_widget(kind: object) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def choices(kind: object, options: dict) -> list:
    return kind if isinstance(kind, list) else options.get("options", [])


def links(prompt: Prompt) -> list[tuple[str, str]]:
    """(node, input) of all links."""
    return [(n, name) for n in prompt for name, value in prompt[n]["inputs"].items() if isinstance(value, list)]


def ours(prompt: Prompt) -> list[str]:
    """The ids of this pack's nodes."""
    return [number for number, node in prompt.items() if node["class_type"].startswith("SDG")]


def upstream(prompt: Prompt, number: str) -> set[str]:
    """All nodes that a node depends on."""
    found: set[str] = set()
    waiting = [number]
    while waiting:
        for value in prompt[waiting.pop()]["inputs"].values():
            if isinstance(value, list) and value[0] in prompt and value[0] not in found:
                found.add(value[0])
                waiting.append(value[0])
    return found


def pick_widget(draw: DrawFn, world: World, prompt: Prompt, wanted: Callable = lambda *part: True) -> tuple | None:
    """(node, input name, type, options) of a widget of our nodes."""
    found = [
        (number, name, *part)
        for number in ours(prompt)
        for name, part in widgets(world, prompt[number]["class_type"]).items()
        if wanted(name, *part)
    ]
    return draw(st.sampled_from(found)) if found else None


def put(prompt: Prompt, number: str, name: str, value: object) -> str:
    prompt[number]["inputs"][name] = value
    said = repr(value)
    return f"{prompt[number]['class_type']}.{name} = {said if len(said) < 60 else said[:57] + '...'}"


def replaced(draw: DrawFn, prompt: Prompt, world: World, socket: str, node: dict) -> str:
    """Links an input of one type to a new node instead."""
    found = [
        (number, name)
        for number in ours(prompt)
        for name, (kind, _) in schema(world, prompt[number]["class_type"]).items()
        if kind == socket
    ]
    if not found:
        return superfluous(draw, world, prompt)
    number, name = draw(st.sampled_from(found))
    new = str(max(map(int, prompt)) + 1)
    prompt[new] = node
    prompt[number]["inputs"][name] = [new, 0]
    return f"{prompt[number]['class_type']}.{name} <- {node['class_type']} {node['inputs']}"


# Faults


def out_of_range(draw: DrawFn, world: World, prompt: Prompt) -> str:
    """A number beyond its bounds, or none at all."""
    found = pick_widget(draw, world, prompt, lambda name, kind, options: kind in ("INT", "FLOAT"))
    number, name, kind, options = found or pick_widget(draw, world, prompt)
    low, high = options.get("min", -1), options.get("max", 1)
    values = [low - 1, high + 1, low * 10 - 1, high * 10 + 1, -high, 1e308, -1e308, 2**63, 10**400, -(10**400)]
    values += [float("nan"), float("inf"), float("-inf")]
    if name not in HUGE:
        values += [low, high]
    if kind == "FLOAT":
        values += [float("nan")] * 6 + [1e-300, -0.0]
    return put(prompt, number, name, draw(st.sampled_from(values)))


def wrong_type(draw: DrawFn, world: World, prompt: Prompt) -> str:
    """A value of another type, also where only a link makes sense."""
    number = draw(st.sampled_from(ours(prompt) or list(prompt)))
    names = sorted(schema(world, prompt[number]["class_type"]))
    if not names:
        return superfluous(draw, world, prompt)
    return put(prompt, number, draw(st.sampled_from(names)), copy.deepcopy(draw(st.sampled_from(WRONG_VALUES))))


def odd_text(draw: DrawFn, world: World, prompt: Prompt) -> str:
    found = pick_widget(draw, world, prompt, lambda name, kind, options: kind == "STRING")
    if found is None:
        return superfluous(draw, world, prompt)
    text = draw(st.sampled_from(TEXTS) | st.text(max_size=20))
    if found[1] == "folder" and set(text) <= set("./"):
        text = "no such folder"  # and not the whole machine's pictures
    return put(prompt, found[0], found[1], text)


def other_choice(draw: DrawFn, world: World, prompt: Prompt) -> str:
    found = pick_widget(draw, world, prompt, lambda name, kind, options: choices(kind, options))
    if found is None:
        return superfluous(draw, world, prompt)
    number, name, kind, options = found
    return put(prompt, number, name, draw(st.sampled_from(["gone.safetensors", "", *choices(kind, options)])))


def missing_input(draw: DrawFn, world: World, prompt: Prompt) -> str:
    number = draw(st.sampled_from([n for n in prompt if prompt[n]["inputs"]]))
    name = draw(st.sampled_from(sorted(prompt[number]["inputs"])))
    del prompt[number]["inputs"][name]
    return f"{prompt[number]['class_type']} without {name}"


def missing_node(draw: DrawFn, world: World, prompt: Prompt) -> str:
    number, name = draw(st.sampled_from(links(prompt)))
    target = draw(st.sampled_from(["9999", "", "-1", "None", 5, None]))
    if draw(st.booleans()):
        target = prompt[number]["inputs"][name][0]
        prompt.pop(target, None)
    return put(prompt, number, name, [target, 0]) if number in prompt else f"node {target} taken out"


def wrong_slot(draw: DrawFn, world: World, prompt: Prompt) -> str:
    number, name = draw(st.sampled_from(links(prompt)))
    return put(prompt, number, name, [prompt[number]["inputs"][name][0], draw(st.sampled_from(SLOTS))])


def crossed_link(draw: DrawFn, world: World, prompt: Prompt) -> str:
    """A link from another node, of whatever type."""
    number, name = draw(st.sampled_from(links(prompt)))
    return put(prompt, number, name, [draw(st.sampled_from(sorted(prompt))), draw(st.integers(0, 1))])


def loop(draw: DrawFn, world: World, prompt: Prompt) -> str:
    """A link that closes a circle, of one node or several."""
    last = draw(st.sampled_from(sorted(prompt)))
    start = draw(st.sampled_from([*sorted(upstream(prompt, last)), last]))
    inputs = sorted(schema(world, prompt[start]["class_type"])) or ["superfluous"]
    return put(prompt, start, draw(st.sampled_from(inputs)), [last, 0])


def unknown_class(draw: DrawFn, world: World, prompt: Prompt) -> str:
    number = draw(st.sampled_from(sorted(prompt)))
    was, now = prompt[number]["class_type"], draw(st.sampled_from([*CLASSES, "PreviewImage", "SDGPaperSampler"]))
    prompt[number]["class_type"] = now
    return f"{was} is now {now!r}"


def no_output(draw: DrawFn, world: World, prompt: Prompt) -> str:
    for number in [n for n, node in prompt.items() if world.info[node["class_type"]]["output_node"]]:
        del prompt[number]
    return "without output nodes"


def odd_picture(draw: DrawFn, world: World, prompt: Prompt) -> str:
    if draw(st.integers(0, 9)) == 0:
        node = {"class_type": "OddPictureList", "inputs": {"count": draw(st.integers(0, 3))}}
    else:
        node = odd(draw, world, "OddPicture")
    return replaced(draw, prompt, world, "IMAGE", node)


def odd_latent(draw: DrawFn, world: World, prompt: Prompt) -> str:
    return replaced(draw, prompt, world, "LATENT", odd(draw, world, "OddLatent"))


def foreign_model(draw: DrawFn, world: World, prompt: Prompt) -> str:
    return replaced(draw, prompt, world, "MODEL", odd(draw, world, "OddModel"))


def foreign_value(draw: DrawFn, world: World, prompt: Prompt) -> str:
    """Something of another kind on a socket, from a node whose output has any type."""
    parts = [part for n in ours(prompt) for part in schema(world, prompt[n]["class_type"]).values()]
    sockets = sorted({kind for kind, _ in parts if not is_widget(kind)})
    if not sockets:
        return superfluous(draw, world, prompt)
    return replaced(draw, prompt, world, draw(st.sampled_from(sockets)), odd(draw, world, "OddValue"))


def huge(draw: DrawFn, world: World, prompt: Prompt) -> str:
    found = pick_widget(draw, world, prompt, lambda name, kind, options: name in HUGE)
    if found is None:
        return superfluous(draw, world, prompt)
    number, name, *_ = found
    said = [put(prompt, number, name, draw(st.sampled_from(LARGE[name])))]
    if name == "width" and draw(st.booleans()):
        said.append(put(prompt, number, "height", 16384))
    return ", ".join(said)


def superfluous(draw: DrawFn, world: World, prompt: Prompt) -> str:
    """For workflows that have no place for a fault: a superfluous input."""
    number = draw(st.sampled_from(sorted(prompt)))
    return put(prompt, number, "superfluous", draw(st.sampled_from(WRONG_VALUES)))


def odd(draw: DrawFn, world: World, class_type: str) -> dict:
    kind = draw(st.sampled_from(choices(*schema(world, class_type)["kind"])))
    return {"class_type": class_type, "inputs": {"kind": kind}}


FAULTS: dict[str, Fault] = {
    "number out of range": out_of_range,
    "wrong type": wrong_type,
    "odd text": odd_text,
    "other choice": other_choice,
    "missing input": missing_input,
    "missing node": missing_node,
    "wrong slot": wrong_slot,
    "crossed link": crossed_link,
    "loop": loop,
    "unknown class": unknown_class,
    "no output": no_output,
    "odd picture": odd_picture,
    "odd latent": odd_latent,
    "foreign model": foreign_model,
    "foreign value": foreign_value,
    "huge": huge,
}
KINDS = [*FAULTS, "several faults", "made-up graph", "broken body"]
WEIGHTS = {"wrong type": 3, "number out of range": 2, "made-up graph": 3, "foreign value": 2, "odd picture": 2}


# Cases


def cases(world: World) -> SearchStrategy[Case]:
    """Any case, of a kind drawn by its weight."""
    return st.sampled_from([kind for kind in KINDS for _ in range(WEIGHTS.get(kind, 1))]).flatmap(
        lambda kind: case_of(world, kind)
    )


@st.composite
def case_of(draw: DrawFn, world: World, kind: str) -> Case:
    if kind == "broken body":
        return draw(broken_body(world))
    if kind == "made-up graph":
        prompt: Prompt = {}
        return made_case(kind, made_up(draw, world, prompt), prompt)
    name = draw(st.sampled_from(sorted(world.bases)))
    prompt = copy.deepcopy(world.bases[name])
    if kind != "several faults":
        return made_case(kind, f"{name}: {FAULTS[kind](draw, world, prompt)}", prompt)
    # Faults that other faults can't be put on top of come last.
    names = [fault for fault in FAULTS if fault not in ("huge", "unknown class", "no output", "missing node")]
    chosen = draw(st.lists(st.sampled_from(names), min_size=2, max_size=3))
    return made_case(kind, f"{name}: " + "; ".join(FAULTS[fault](draw, world, prompt) for fault in chosen), prompt)


def made_case(kind: str, what: str, prompt: Prompt) -> Case:
    return Case(kind, what, json.dumps({"prompt": prompt}).encode(), prompt, kind == "huge")


def made_up(draw: DrawFn, world: World, prompt: Prompt) -> str:
    """One of our nodes with drawn inputs, and whatever makes these, looked at by a sink. Gives the class."""
    names = sorted(name for name in world.info if name.startswith("SDG") and name not in NEVER)
    class_type = draw(st.sampled_from(names))
    number = grow(draw, world, prompt, class_type, 4)
    if world.info[class_type]["output"]:
        prompt[str(len(prompt) + 1)] = {"class_type": "OddSink", "inputs": {"value": [number, 0]}}
    return class_type


def grow(draw: DrawFn, world: World, prompt: Prompt, class_type: str, depth: int) -> str:
    """Adds a node and, up to ``depth`` links before it, what its sockets want. Gives its id."""
    inputs = {}
    required = world.info[class_type]["input"].get("required", {})
    for name, (kind, options) in schema(world, class_type).items():
        if name not in required and draw(st.booleans()):
            continue
        if is_widget(kind):
            inputs[name] = widget_value(draw, name, kind, options)
        elif maker := draw_maker(draw, world, kind, depth):
            inputs[name] = [grow(draw, world, prompt, maker[0], depth - 1), maker[1]]
    number = str(len(prompt) + 1)
    prompt[number] = {"class_type": class_type, "inputs": inputs}
    return number


def draw_maker(draw: DrawFn, world: World, socket: str, depth: int) -> tuple[str, int] | None:
    """A node and its output for a socket: one of ours or an odd one, without sockets where ``depth`` is spent."""
    found = makers(world, socket, depth <= 0)
    return draw(st.sampled_from(found)) if found else None


@functools.cache
def makers(world: World, socket: str, last: bool) -> list[tuple[str, int]]:
    """Nodes that give a type, and by which output; the ``last`` of a chain have no sockets of their own."""
    found = [
        (name, node["output"].index(socket))
        for name, node in sorted(world.info.items())
        for _ in range(OURS if name.startswith("SDG") else name.startswith("Odd"))
        if name not in NEVER and socket in node["output"]
    ]
    return [
        maker for maker in found if not last or all(is_widget(kind) for kind, _ in schema(world, maker[0]).values())
    ]


def widget_value(draw: DrawFn, name: str, kind: object, options: dict) -> object:
    """Mostly a value that is allowed, and one that runs quickly."""
    if draw(st.integers(0, 79)) == 0 and name not in HUGE:
        return copy.deepcopy(draw(st.sampled_from(WRONG_VALUES)))
    if name in SLOW:
        return max(SLOW[name], options["min"])
    if name == "clip_name":
        return options.get("default") or choices(kind, options)[0]
    if offered := choices(kind, options):
        return draw(st.sampled_from(offered))
    if kind == "BOOLEAN":
        return draw(st.booleans())
    if kind == "INT":
        return draw(st.integers(options["min"], options["max"]))
    if kind == "FLOAT":
        low, high = PARTS.get(name, (options["min"], options["max"]))
        return draw(st.floats(low, high))
    return draw(st.sampled_from([options.get("default", "")] * len(TEXTS) * 3 + TEXTS))


BODIES: list[tuple[str, bytes]] = [
    ("nothing", b""),
    ("no JSON", b"prompt"),
    ("bytes", bytes(range(256))),
    ("null", b"null"),
    ("a list", b"[]"),
    ("a number", b"7"),
    ("no prompt", b"{}"),
    ("prompt null", b'{"prompt": null}'),
    ("prompt a list", b'{"prompt": [1]}'),
    ("prompt empty", b'{"prompt": {}}'),
    ("prompt a word", b'{"prompt": "word"}'),
    ("deep", b"[" * 100_000),
    ("deep node", b'{"prompt": {"1": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}"),
    ("nan", b'{"prompt": NaN}'),
]
NODES = [
    None,
    5,
    "word",
    [],
    {},
    {"class_type": "SDGLoadADM", "inputs": {}},
    {"inputs": {}},
    {"class_type": ["a"], "inputs": {}},
]
"""In a node's place. None without inputs: where no output asks for such a node, the host's own worker ends by it."""
INPUTS = [None, 5, "word", [], [["a", 1]]]
ENVELOPES = [
    {"prompt_id": 5}, {"prompt_id": "no id"}, {"number": "first"}, {"number": None}, {"front": "yes"},
    {"extra_data": None}, {"extra_data": []}, {"extra_data": {"extra_pnginfo": 5}}, {"client_id": 5},
    {"client_id": {"a": 1}},
    {"partial_execution_targets": []}, {"partial_execution_targets": "1"}, {"partial_execution_targets": 5},
    {"unknown": {"a": [1, 2]}},
]  # fmt: skip


@st.composite
def broken_body(draw: DrawFn, world: World) -> Case:
    """Bodies that are no prompts, cut or altered text of prompts, and prompts in odd envelopes."""
    prompt = copy.deepcopy(world.bases[draw(st.sampled_from(sorted(world.bases)))])
    number = draw(st.sampled_from(sorted(prompt)))
    text = json.dumps({"prompt": prompt}).encode()
    way = draw(st.integers(0, 5))
    if way == 0:
        what, body = draw(st.sampled_from(BODIES))
    elif way == 1:
        end = draw(st.integers(0, len(text) - 1))
        what, body = f"cut at {end}", text[:end]
    elif way == 2:
        at, byte = draw(st.integers(0, len(text) - 1)), draw(st.integers(0, 255))
        what, body = f"byte {at} is {byte}", text[:at] + bytes([byte]) + text[at + 1 :]
    elif way == 3:
        value = draw(st.sampled_from(NODES))
        what, body = f"node {number} is {value}", json.dumps({"prompt": {**prompt, number: value}}).encode()
    elif way == 4:
        value = draw(st.sampled_from(INPUTS))
        prompt[number]["inputs"] = value
        what, body = f"inputs of node {number} are {value}", json.dumps({"prompt": prompt}).encode()
    else:
        envelope = draw(st.sampled_from(ENVELOPES))
        what, body = f"envelope {envelope}", json.dumps({"prompt": prompt, **envelope}).encode()
    return Case("broken body", what, body, _prompt_in(body))


def _prompt_in(body: bytes) -> Prompt | None:
    """The prompt of a body, where there is one in the shape of a prompt."""
    try:
        prompt = json.loads(body)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return prompt if isinstance(prompt, dict) else None

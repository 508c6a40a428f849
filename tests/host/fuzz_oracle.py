"""Posts cases to a running host and judges what comes back.

Wanted: 200 or 400 with JSON, in time; refusals of validation name the node and the input; a prompt that was taken
ends; an error on the way names its node, and where it comes from this pack it says what it got and what to do.
"""

from __future__ import annotations

import itertools
import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACK = "semantic-diffusion-guidance"
LIBRARY = "site-packages"
MEMORY_ENDED = re.compile("can't allocate memory|could not create a primitive")
"""A CPU's words for it: torch's allocator's, and those of oneDNN."""
ANSWER_TIME = 20.0
"""Seconds in which the server must answer a request, whatever runs meanwhile."""
RUN_TIME, END_TIME = 10.0, 180.0
"""Seconds that a prompt may run before it is cancelled, and in which it must then end."""
CURES = re.compile(
    r"\b(Connect|Choose|Set|Write|Use|Load|Put|Start|Take|Install|Lower|Raise|Give|Check|Export|Leave|wanted)\b"
)
KNOWN_BEFORE_NODES = {
    "loads": "the host answers 500 to a body that is no JSON",
    "decode": "the host answers 500 to a body that is no JSON",
    "raw_decode": "the host answers 500 to a body that is no JSON",
    "json": "the host answers 500 to a body that is no text",
    "post_prompt": "the host takes the body's fields without a look at their types",
    "trigger_on_prompt": "the host takes any JSON for an object",
    "apply_replacements": "the host takes every node and its inputs for objects",
    "validate_prompt": "the host takes every node and its class_type for what they should be",
}
"""Functions of the host in which a body raises before any node of ours is asked; the answer is then 500."""
KNOWN_OF_HOST = {
    r"DependencyCycleError: ": "a loop through an input that the node does not have is found when the prompt runs",
    r"IndexError: list index out of range": "the host calls a node once for each entry of a list, and for an empty "
    "list takes its last entry",
    r"got an unexpected keyword argument": "the host hands links to inputs that the node does not have to older nodes",
}
"""Errors that the host raises before a node of ours is asked, or in nodes of its own: type and message, and why."""
HOST_ADVISES = "mat1 and mat2 shapes cannot be multiplied"
"""Conditioning of another width than the model's. The host adds its own advice to this error of any sampler node."""


@dataclass(frozen=True)
class Verdict:
    """``outcome``: how it ended. ``wrong``: what the host or the pack must not do, None where all is well."""

    outcome: str
    wrong: str | None = None


@dataclass
class Tally:
    """Cases by kind and outcome, and what went wrong."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, case, verdict: Verdict) -> None:
        self.counts[case.kind, verdict.outcome] += 1
        if verdict.wrong:
            self.wrong.append(f"[{case.kind}] {case.what}\n    {verdict.wrong}")

    def table(self) -> str:
        outcomes = sorted({outcome for _, outcome in self.counts})
        kinds = sorted({kind for kind, _ in self.counts})
        rows = [["kind", "cases", *outcomes]]
        for kind in kinds:
            counts = [self.counts[kind, outcome] for outcome in outcomes]
            rows.append([kind, str(sum(counts)), *map(str, counts)])
        totals = [sum(self.counts[kind, outcome] for kind in kinds) for outcome in outcomes]
        rows.append(["all", str(sum(totals)), *map(str, totals)])
        return "\n".join(as_table(rows))


def as_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table in Markdown, the first row as its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


class Client:
    """Speaks to one server. ``log`` is the file that the server writes."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self.log = url, log

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """Status and text of the answer. Raises TimeoutError or URLError where there is none in time."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIME) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_TIME) as answer:
            return json.loads(answer.read())

    def history(self, prompt_id: str) -> dict | None:
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id: str, seconds: float) -> dict | None:
        """The history entry of a prompt, None where it does not end in time."""
        return self.until(lambda: self.history(prompt_id), seconds)

    def until(self, ready: Callable[[], object], seconds: float) -> object | None:
        """What ``ready`` gives as soon as that is true; None after ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := ready():
                return found
            time.sleep(0.02)
        return None

    def interrupt(self) -> None:
        self.post("/interrupt", b"{}")

    def log_end(self) -> int:
        return self.log.stat().st_size

    def logged(self, since: int) -> str:
        with self.log.open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")


def run_cases(client: Client, batch: Sequence, tally: Tally) -> None:
    """Posts all, then follows those that were taken to their end."""
    taken = []
    for case in batch:
        verdict, prompt_id = submit(client, case)
        if prompt_id is None:
            tally.add(case, verdict)
        else:
            taken.append((case, prompt_id))
    for case, prompt_id in taken:
        tally.add(case, follow(client, case, prompt_id))


def submit(client: Client, case) -> tuple[Verdict, str | None]:
    """The verdict on the answer, or the id of the prompt that it gives."""
    since = client.log_end()
    status, text = client.post("/prompt", case.body)
    if status == 500:
        return judge_500(client, since), None
    try:
        answer = json.loads(text)
    except ValueError:
        return Verdict("no JSON", f"status {status}, no JSON: {text[:200]}"), None
    if status == 200:
        return Verdict("taken"), answer["prompt_id"]
    if status != 400:
        return Verdict(f"status {status}", f"status {status}: {text[:200]}"), None
    return Verdict("refused at once", wrong_refusal(answer, case.prompt or {})), None


def judge_500(client: Client, since: int) -> Verdict:
    """Excused where the error is the host's own, in a place that is known, and no node of ours was asked."""
    said = client.until(lambda: request_traceback(client.logged(since)), 5) or []
    if any(name in KNOWN_BEFORE_NODES for _, name in said) and not any(PACK in path for path, _ in said):
        return Verdict("500 of the host")
    return Verdict("500", f"status 500: {client.logged(since)[-1500:]}")


def request_traceback(log: str) -> list[tuple[str, str]]:
    """(file, function) of what the server logs of a failed request; prompts that run meanwhile log theirs as well."""
    _, found, rest = log.partition("Error handling request")
    _, _, lines = rest.partition("Traceback (most recent call last):\n")
    frames = itertools.takewhile(lambda line: line.startswith(" "), lines.splitlines())
    return re.findall(r'File "(.+?)", line \d+, in (\w+)', "\n".join(frames)) if found else []


def wrong_refusal(answer: dict, prompt: dict) -> str | None:
    """What is missing in the host's refusal: which node, of which class, and why."""
    error, nodes = answer.get("error", {}), answer.get("node_errors", {})
    if error.get("type") in ("prompt_no_outputs", "no_prompt", "invalid_prompt_id", "invalid_prompt"):
        return None
    if error.get("type") == "missing_node_type":
        return None if "#" in error["details"] else f"no node: {error}"
    if not nodes:
        return f"no node named: {error}"
    for number, found in nodes.items():
        if found["class_type"] != prompt[number]["class_type"] or not found["errors"]:
            return f"node {number}: {found}"
        for problem in found["errors"]:
            if not problem["message"] or "type" not in problem:
                return f"node {number}: {problem}"
    return None


def follow(client: Client, case, prompt_id: str) -> Verdict:
    """Waits for a prompt's end, cancels it where it takes long, and judges how it ended."""
    entry = client.wait(prompt_id, RUN_TIME)
    if entry is None:
        client.until(lambda: client.history(prompt_id) or running(client, prompt_id), END_TIME)
        client.interrupt()
        entry = client.wait(prompt_id, END_TIME)
    if entry is None:
        return Verdict("hang", f"neither ended nor cancelled: {client.log.read_text()[-1500:]}")
    return judge_entry(entry, case)


def running(client: Client, prompt_id: str) -> bool:
    return any(item[1] == prompt_id for item in client.get("/queue")["queue_running"])


def judge_entry(entry: dict, case) -> Verdict:
    messages = dict(entry["status"]["messages"])
    if "execution_error" in messages:
        return judge_error(messages["execution_error"], case)
    if "execution_interrupted" in messages:
        return Verdict("cancelled")
    if entry["status"]["status_str"] != "success":
        return Verdict("unknown end", json.dumps(entry["status"])[:500])
    finite = [flag for output in entry["outputs"].values() for flag in output.get("finite", [])]
    if not all(finite) and "nan" not in case.what:
        return Verdict("not finite", "numbers that are not finite came out of finite ones")
    return Verdict("ran")


def judge_error(error: dict, case) -> Verdict:
    """Errors of this pack must explain themselves, those of the host must be known."""
    name, message = error["node_type"], error["exception_message"].strip()
    said = f"{name} ({error['node_id']}): {error['exception_type']}: {message[:400]}"
    if case.prompt is not None and case.prompt.get(error["node_id"], {}).get("class_type") != name:
        return Verdict("error on no node", said)
    files = [line for line in error["traceback"] if "File " in line]
    own = [line for line in files if LIBRARY not in line]
    of_host = not name.startswith("SDG") and PACK not in "".join(own[-1:])
    if MEMORY_ENDED.search(message) and of_host:  # in a node of the host's, for what it computes by itself
        return Verdict("error of the host")
    if not any(PACK in line for line in files):
        known = any(re.search(words, f"{error['exception_type']}: {message}") for words in KNOWN_OF_HOST)
        return Verdict("error of the host", None if known else said + "\n" + "".join(error["traceback"][-3:]))
    if HOST_ADVISES in message and "TIPS" in message:
        return Verdict("refused on the way")
    unclear = unexplained(error["exception_type"], message)
    return Verdict("refused on the way", unclear and f"{unclear}: {said}\n{''.join(error['traceback'][-3:])}")


def unexplained(kind: str, message: str) -> str | None:
    """What an error lacks: it must be of a kind that was raised on purpose, and say what is wrong and what to do."""
    if kind not in ("ValueError", "FileNotFoundError"):
        return "not a ValueError"
    if len(message) < 50:
        return "too short"
    if not CURES.search(message):
        return "no cure"
    return None

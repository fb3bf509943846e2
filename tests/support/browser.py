"""A headless Chromium for tests of pages, spoken to in its DevTools protocol over two pipes: no driver, no socket."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
ANSWER_LIMIT_SECONDS = 30.0
# name: (code, number, text that it types)
KEYS = {
    "Tab": ("Tab", 9, ""),
    "Enter": ("Enter", 13, "\r"),
    " ": ("Space", 32, " "),
    "Escape": ("Escape", 27, ""),
    "Home": ("Home", 36, ""),
    "End": ("End", 35, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}


def executable() -> str | None:
    """Path of the browser: $CHROMIUM, or the first of `NAMES` that is installed."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab of a browser of its own.

    Attributes:
        complaints: what the page wrote to the console, errors that nothing caught, what its security policy refused.
        requests: addresses that it asked for, but for data within the page.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._unread = b""
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers; events that come before are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            if not select.select([self._answers], [], [], ANSWER_LIMIT_SECONDS)[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise ConnectionError("the browser has ended")
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, what: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled":
            self.complaints.append(f"{what['type']}: {[a.get('value', a.get('description')) for a in what['args']]}")
        elif event == "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded":
            self.complaints.append(what["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not what["request"]["url"].startswith(("data:", "blob:")):
            self.requests.append(what["request"]["url"])

    def run(self, expression: str, *arguments: Any) -> Any:
        """The value of a JavaScript expression, or of what a function `(...) => ...` returns; promises are awaited."""
        if re.match(r"(async )?\([\w, ]*\) =>", expression):
            expression = f"({expression})({', '.join(map(json.dumps, arguments))})"
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"].get("exception", {}).get("description", answer))
        return answer["result"].get("value")

    def wait(self, condition: str | Callable[[], Any], *arguments: Any) -> Any:
        """The condition's value once it is true: JavaScript, or a function here."""
        end = time.monotonic() + ANSWER_LIMIT_SECONDS
        while True:
            found = condition() if callable(condition) else self.run(condition, *arguments)
            if found:
                return found
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {condition}")
            if not callable(condition):
                # Two frames of the page, in which it can go on.
                self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def open(self, address: str) -> None:
        """Go there, anew even if only the fragment differs, and wait until it is loaded."""
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank' && document.readyState === 'complete'")
        self.complaints.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def media(self, **features: str) -> None:
        """Emulate e.g. `prefers_color_scheme="dark"`, `type="print"`."""
        kind = features.pop("type", "")
        found = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=kind, features=found)

    def press(self, *keys: str, shift: bool = False) -> None:
        for key in keys:
            code, number, text = KEYS[key]
            common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
            down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
            self.call("Input.dispatchKeyEvent", **down, **common)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose_files(self, selector: str, *paths: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def drop_files(self, x: int, y: int, *paths: Path) -> None:
        """Drag files from outside over the page and let them go there, as a mouse does."""
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader is given."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored") and "role" in node
        ]

    def picture(self, path: Path, whole: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """A page in a browser that ends with the block. `profile` is an empty folder for its files."""
    program = executable()
    assert program is not None
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    # Chromium reads from 3 and writes to 4. Numbers out of the way of these: a shell moves them there.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (their_in, their_out)]
    for end in (their_in, their_out):
        os.close(end)
    command = [
        "bash",
        "-c",
        f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}',
        "browser",
        program,
        "--headless",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
        # Its sandbox refuses root, and containers refuse the sandbox; the pages are ours.
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
    ]
    with open(profile / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=ends)
        for end in ends:
            os.close(end)
        try:
            page = Page(our_out, our_in)
            yield page
        finally:
            for end in (our_out, our_in):
                os.close(end)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

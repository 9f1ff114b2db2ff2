"""Chromium without a window, driven through its DevTools pipe: real keys, real focus, pictures of what a person would see."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " "), "ArrowRight": (39, "")}
SHIFT = 8
PATIENCE = 120.0


class Browser:
    """One page in a browser of its own; used as a context manager.

    Args:
        profile: an empty folder for what it keeps.
    """

    def __init__(self, profile: Path) -> None:
        (self._theirs, self._commands), (self._answers, mine) = os.pipe(), os.pipe()
        # The pipes are the file descriptors 3 and 4 of the browser.
        started = f'exec "$0" "$@" 3<&{self._theirs} 4>&{mine}'
        switches = (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", f"user-data-dir={profile}", "remote-debugging-pipe", "hide-scrollbars",
        )  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", started, shutil.which("chromium"), *(f"--{switch}" for switch in switches), "about:blank"],
            pass_fds=(self._theirs, mine), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(self._theirs)
        os.close(mine)
        self._numbers, self._rest, self._session, self.complaints = itertools.count(1), b"", None, []

    def __enter__(self) -> "Browser":
        pages = [target for target in self.send("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self._session = self.send("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def send(self, method: str, **parameters):
        """Answer of one command of the DevTools protocol; errors that the page reports meanwhile gather in ``complaints``."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": self._session} if self._session else {})}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.complaints.append(heard["params"])
            if heard.get("id") == number:
                assert "error" not in heard, (method, heard["error"])
                return heard["result"]

    def _hear(self):
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            if not select.select([self._answers], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            self._rest += os.read(self._answers, 1 << 20)
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path) -> None:
        """Show a file and wait until it is loaded."""
        self.send("Page.navigate", url=page.as_uri())
        self.run("new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', () => done()))")

    def run(self, script: str):
        """Value of a JavaScript expression, a promise's when it is settled."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key as a keyboard does."""
        code, text = KEYS[key]
        fixed = {
            "key": {"Space": " "}.get(key, key), "code": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0,
        }  # fmt: skip
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **fixed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **fixed)

    def look(self, *, width: int = 1200, height: int = 900, scheme: str = "light", medium: str = "screen") -> None:
        """Choose the window, the colour scheme and the medium."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", media=medium, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """What is seen now, or the whole page, as PNG."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

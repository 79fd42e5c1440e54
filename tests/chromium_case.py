"""A headless Chromium driven over its DevTools pipe: pages are opened, keys and mouse are real input events."""

import base64
import contextlib
import itertools
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
CODES = {
    "ArrowDown": 40,
    "ArrowUp": 38,
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "Enter": 13,
    "Escape": 27,
}
CODES |= {"Home": 36, "End": 35, "PageDown": 34, "PageUp": 33, "Tab": 9}


class Browser:
    """One page of one Chromium."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._numbers, self._buffer, self._session = itertools.count(1), b"", None
        self.console: list[str] = []  # console messages, dialogs and uncaught errors, as text
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.requests: list[str] = []

    def send(self, method: str, timeout: float = 60.0, **params) -> dict:
        """One command's result; raises RuntimeError with the browser's words, TimeoutError when it is silent."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(timeout)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._event(answer)

    def _receive(self, timeout: float) -> dict:
        end = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"chromium did not answer within {timeout} s")
            chunk = os.read(self._from, 1 << 20)
            if not chunk:
                raise RuntimeError("chromium ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _event(self, message: dict) -> None:
        kind, params = message.get("method"), message.get("params", {})
        if kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(f"{kind}: {json.dumps(params)[:600]}")
        elif kind == "Page.javascriptDialogOpening":
            self.console.append(f"dialog: {params['message']}")
        elif kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path, fragment: str = "") -> None:
        """Loads a file and waits for its load event."""
        self.console, self.requests = [], []
        self.send("Page.navigate", url=pathlib.Path(path).absolute().as_uri() + fragment)
        while self.value("document.readyState") != "complete":
            time.sleep(0.02)

    def value(self, expression: str):
        """What a JavaScript expression is (promises awaited)."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        """A key goes down and up, as from a keyboard."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        common = {"key": key, "modifiers": 8 if shift else 0}
        common["windowsVirtualKeyCode"] = CODES.get(key) or ord(key.upper())
        self.send(
            "Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common
        )
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        for character in text:
            self.press(character)

    def picture(self, path) -> None:
        """What one sees now, as a PNG file."""
        pathlib.Path(path).write_bytes(
            base64.b64decode(self.send("Page.captureScreenshot")["data"])
        )

    def click(self, selector: str) -> None:
        """A mouse click in the middle of the first element of a selector."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest', inline: 'nearest'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )


@contextlib.contextmanager
def chromium(profile, width: int = 1280, height: int = 900):
    """A Browser; `profile` is an empty folder for it. Raises RuntimeError where no Chromium is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        raise RuntimeError(f"none of {', '.join(NAMES)} is installed; apt-get install chromium")
    # Chromium reads commands from descriptor 3 and answers on 4; a shell puts the pipes there.
    read_end, to_browser = os.pipe()
    from_browser, write_end = os.pipe()
    flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
    flags += " --disable-background-networking"
    flags += f" --remote-debugging-pipe --window-size={width},{height} --hide-scrollbars"
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$0" {flags} --user-data-dir="$1" 3<&{read_end} 4>&{write_end}']
        + [program, str(profile)],
        pass_fds=(read_end, write_end),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read_end)
    os.close(write_end)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

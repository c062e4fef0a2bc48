"""Headless Chromium over its DevTools pipe: no driver, no library. `find_chromium` is None where none is installed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium():
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. `evaluate` runs a JavaScript expression in it and returns its value."""

    def __init__(self, write, read):
        self._write, self._read, self._buffer = write, read, b""
        self._number, self._session = 0, None
        self.events = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(30.0)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise ValueError(result["exceptionDetails"]["exception"].get("description", "threw"))
        return result["result"].get("value")

    def wait_for(self, expression, timeout_s=20.0):
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} did not become true; the page: {self.evaluate('document.body.innerText')}"
            time.sleep(0.05)

    def screenshot(self, width, height):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])

    def _receive(self, timeout_s):
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], timeout_s)[0], "Chromium does not answer"
            piece = os.read(self._read, 65536)
            assert piece, "Chromium has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def chromium_page(*arguments):
    with tempfile.TemporaryDirectory() as profile:
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()

        def wire():  # in the child: DevTools reads from 3 and writes to 4
            read, write = os.dup(theirs_read), os.dup(theirs_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        command = [find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}", *arguments, "about:blank"]
        process = subprocess.Popen(
            command,
            preexec_fn=wire,
            close_fds=False,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        try:
            yield Page(ours_write, ours_read)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _end_group(process.pid)
            os.close(ours_read)
            os.close(ours_write)


def _end_group(leader):
    """Until none is left: a helper of the browser that outlives it writes into the profile while that is removed."""
    deadline = time.monotonic() + 10
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(leader, signal.SIGKILL)
            time.sleep(0.01)

"""A headless Chromium for tests, driven over its DevTools protocol. No test in here.

Debian's chromium needs no driver program: it is started with a debugging port, and a websocket carries the commands.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
from pathlib import Path

from .waiting import LIMIT

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]
READY = "return Boolean(window.app?.graph && window.app.extensionManager?.spinner === false)"


def chromium():
    """The path of the browser, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class PageError(RuntimeError):
    """JavaScript threw an exception in the page."""


class Page:
    """One page of the browser: `await page.run(js)` evaluates the body of an async function and returns its value."""

    def __init__(self, socket):
        self.socket, self.ids, self.waiting, self.errors = socket, itertools.count(1), {}, []
        self.reader = asyncio.create_task(self.read())

    async def read(self):
        async for message in self.socket:
            data = json.loads(message.data)
            if data.get("id") in self.waiting:
                self.waiting[data["id"]].set_result(data)
            elif data.get("method") == "Runtime.exceptionThrown":
                self.errors.append(data["params"]["exceptionDetails"])

    async def command(self, method, timeout=LIMIT, **parameters):
        number = next(self.ids)
        self.waiting[number] = future = asyncio.get_running_loop().create_future()
        await self.socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        try:
            answer = await asyncio.wait_for(future, timeout)
        finally:
            self.waiting.pop(number, None)  # nobody waits for an answer that comes later
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']}")
        return answer["result"]

    async def run(self, body, timeout=LIMIT):
        expression = "(async () => {" + body + "})()"
        options = {"awaitPromise": True, "returnByValue": True}
        answer = await self.command("Runtime.evaluate", timeout, expression=expression, **options)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    async def resize(self, width, height, zoom=1.0):
        """Makes the page as large as a screen of this many points, enlarged; an upright one is a phone's."""
        screen = {"width": round(width / zoom), "height": round(height / zoom), "deviceScaleFactor": zoom}
        screen["mobile"] = width < height
        await self.command("Emulation.setDeviceMetricsOverride", **screen)

    async def captured(self, kind="png", **options):
        """The page as an image file's bytes; `clip` is a part of it."""
        answer = await self.command("Page.captureScreenshot", format=kind, **options)
        return base64.b64decode(answer["data"])

    async def screenshot(self, path):
        Path(path).write_bytes(await self.captured("jpeg" if Path(path).suffix == ".jpg" else "png"))


@contextlib.asynccontextmanager
async def open_editor(url, profile, size=(1600, 900)):
    """The editor of the ComfyUI at `url`, loaded and ready; `profile` is a fresh folder for the browser."""
    async with open_page(url, profile, size) as page:
        await wait_for_editor(page)
        yield page


@contextlib.asynccontextmanager
async def open_page(url, profile, size=(1600, 900)):
    """Any page at `url`, perhaps still loading."""
    import aiohttp

    window = "--window-size={},{}".format(*size)
    command = [chromium(), *FLAGS, window, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = await debugging_port(Path(profile), process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                target = next(t for t in await answer.json(content_type=None) if t["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                await page.command("Runtime.enable")
                await page.command("Page.enable")
                await page.command("Page.navigate", url=url)
                yield page
                page.reader.cancel()
    finally:
        process.terminate()
        process.wait()


async def debugging_port(profile, process):
    """The port the browser chose, which it writes into its profile."""
    file = profile / "DevToolsActivePort"
    for _ in range(10 * LIMIT):
        if process.poll() is not None:
            raise PageError(f"{chromium()} ended with status {process.returncode}.")
        with contextlib.suppress(OSError, IndexError):
            return int(file.read_text().split()[0])
        await asyncio.sleep(0.1)
    raise PageError("The browser opened no debugging port.")


async def wait_for_editor(page):
    """While the page is being replaced an evaluation may fail or go unanswered; the next one finds the new page."""
    end = asyncio.get_running_loop().time() + LIMIT
    while asyncio.get_running_loop().time() < end:
        with contextlib.suppress(PageError, asyncio.TimeoutError):
            if await page.run(READY, timeout=5):
                return
        await asyncio.sleep(0.2)
    raise PageError("The editor did not load.")

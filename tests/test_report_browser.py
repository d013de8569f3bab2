"""The report in a real browser, driven through chromedriver's WebDriver protocol: standard library only."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_report import HOSTILE_TEXTS, write_hostile_run

from scripts import report

MISSING = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} on this machine")

CHROMIUM_FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars
""".split()
PHONE = {"width": 390, "height": 844, "pixelRatio": 2.0, "mobile": True, "touch": True}


class Browser:
    """One browser session."""

    def __init__(self, port: int, profile: Path, metrics: dict | None):
        self.base = f"http://127.0.0.1:{port}"
        options = {"args": [*CHROMIUM_FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"]}
        options["binary"] = shutil.which("chromium")
        if metrics:
            options["mobileEmulation"] = {"deviceMetrics": metrics}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def open(self, path: Path) -> None:
        self.call("POST", "/url", {"url": path.resolve().as_uri()})

    def evaluate(self, expression: str):
        return self.call("POST", "/execute/sync", {"script": f"return ({expression})", "args": []})

    def log(self, kind: str) -> list[dict]:
        return self.call("POST", "/se/log", {"type": kind})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@pytest.fixture(scope="module")
def chromedriver(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("chromedriver") / "log"
    with log.open("w") as output:
        process = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"], stdout=output, stderr=output)
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(params=["desk", "phone"])
def browser(request, chromedriver, tmp_path):
    session = Browser(chromedriver, tmp_path / "profile", PHONE if request.param == "phone" else None)
    session.name = request.param
    yield session
    session.call("DELETE", "")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "<b>my run"
    write_hostile_run(folder)
    report.main([str(folder)])
    return folder / "report.html"


def test_report_in_a_browser(browser, page, tmp_path):
    browser.open(page)
    width = browser.evaluate("window.innerWidth")
    assert width == (390 if browser.name == "phone" else 1280)
    # Nothing sticks out sideways: the page as a whole, and each part of it.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(RIGHTMOST) <= width

    # No errors, no script, nothing loaded but the page itself.
    assert [entry for entry in browser.log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    by_the_page = {request["request"]["url"] for request in sent if request["documentURL"] == page.resolve().as_uri()}
    assert {url for url in by_the_page if not url.startswith("data:")} == {page.resolve().as_uri()}
    assert browser.evaluate("document.scripts.length") == 0

    # The texts of the data stand there as text: no element of theirs, nothing run.
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate(f"document.querySelectorAll('{FOREIGN}').length") == 0
    shown = browser.evaluate("document.body.textContent")
    for text in HOSTILE_TEXTS:
        assert text in shown
    assert browser.evaluate("document.title") == "<b>my run: where it fails"

    # Charts can be read: text of at least 10 pixels, none beyond its chart or over another one.
    assert browser.evaluate("document.querySelectorAll('svg').length") == 8
    assert browser.evaluate(SMALLEST_TEXT) >= 10
    assert browser.evaluate(TEXTS_OUTSIDE) == []
    assert browser.evaluate(TEXTS_OVERLAPPING) == []
    browser.screenshot(tmp_path / "screen.png")
    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")


FOREIGN = "img, iframe, script, form, input, a, object, h1 ~ h1, .worst svg"  # none of ours
RIGHTMOST = "Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
SMALLEST_TEXT = """
    Math.min(...[...document.querySelectorAll('svg text')]
        .map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))
"""
TEXTS_OUTSIDE = """
    [...document.querySelectorAll('svg text')].filter(t => {
        const inner = t.getBoundingClientRect(), outer = t.closest('svg').getBoundingClientRect();
        return inner.left < outer.left - 1 || inner.right > outer.right + 1
            || inner.top < outer.top - 2 || inner.bottom > outer.bottom + 2;
    }).map(t => t.textContent)
"""
TEXTS_OVERLAPPING = """
    [...document.querySelectorAll('svg')].flatMap(svg => {
        const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
        return texts.flatMap(([a, p], i) => texts.slice(i + 1)
            .filter(([b, q]) => p.left < q.right - 1 && q.left < p.right - 1)
            .filter(([b, q]) => p.top < q.bottom - 4 && q.top < p.bottom - 4)
            .map(([b, q]) => a + ' / ' + b));
    })
"""

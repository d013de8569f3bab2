"""The report in a real browser, driven through chromedriver's WebDriver protocol: standard library only."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from test_report import HOSTILE_TEXTS, write_hostile_run

from scripts import report

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no chromium, or no chromedriver, here"
)

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
        if metrics:
            options["mobileEmulation"] = {"deviceMetrics": metrics}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["value"]

    def evaluate(self, expression: str):
        return self.call("POST", "/execute/sync", {"script": f"return ({expression})", "args": []})

    def log(self, kind: str) -> list[dict]:
        return self.call("POST", "/se/log", {"type": kind})


@pytest.fixture(scope="module")
def chromedriver():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield port
    process.terminate()
    process.wait()


@pytest.mark.parametrize("width, metrics", [(1280, None), (390, PHONE)], ids=["desk", "phone"])
def test_report_in_a_browser(width, metrics, chromedriver, tmp_path):
    page = tmp_path / "<b>my run" / "report.html"
    write_hostile_run(page.parent)
    report.main([str(page.parent)])
    browser = Browser(chromedriver, tmp_path / "profile", metrics)
    browser.call("POST", "/url", {"url": page.as_uri()})
    assert browser.evaluate("window.innerWidth") == width
    # Nothing sticks out sideways: the page as a whole, and each part of it.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(RIGHTMOST) <= width

    # No errors, no script, nothing loaded but the page itself.
    assert [entry for entry in browser.log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    by_the_page = {request["request"]["url"] for request in sent if request["documentURL"] == page.as_uri()}
    assert {url for url in by_the_page if not url.startswith("data:")} == {page.as_uri()}
    assert browser.evaluate("document.scripts.length") == 0

    # The texts of the data stand there as text: no element of theirs, nothing run.
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate(f"document.querySelectorAll('{FOREIGN}').length") == 0
    shown = browser.evaluate("document.body.textContent")
    for text in HOSTILE_TEXTS:
        assert text in shown
    assert browser.evaluate("document.title") == "<b>my run: where it fails"

    # Charts can be read: text of at least 10 pixels, none beyond its chart or over another one.
    assert browser.evaluate("document.querySelectorAll('svg').length") == 2
    assert browser.evaluate(SMALLEST_TEXT) >= 10
    assert browser.evaluate(TEXTS_OUTSIDE) == []
    assert browser.evaluate(TEXTS_OVERLAPPING) == []
    browser.call("DELETE", "")


FOREIGN = "img, iframe, script, form, input, a, object, h1 ~ h1, li svg"  # none of ours
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

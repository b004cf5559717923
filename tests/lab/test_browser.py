"""The page in headless Chromium: it renders, sorts, filters, prints, reports no error and asks for nothing.

Chromium is driven over its own pipe (the DevTools protocol, JSON between zero bytes), so that nothing but
Chromium itself is needed.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from telos.lab import write_report
from telos.trials.suite import Suite
from tests.lab.test_report import EVIL, evil, several, shown

PROGRAM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("chromium"),
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium"),
    pytest.mark.skipif(sys.platform == "win32", reason="talks to Chromium over inherited file descriptors"),
]
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
# Chromium reads from descriptor 3 and writes to 4
LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
PATIENCE = 60.0


class Browser:
    """One Chromium."""

    def __init__(self, folder: Path) -> None:
        assert PROGRAM is not None
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # out of the way of 3 and 4
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                LAUNCH,
                *map(str, ends),
                PROGRAM,
                *FLAGS,
                *sandbox,
                f"--user-data-dir={folder}",
            ],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*ends, theirs_in, theirs_out):
            os.close(end)
        self._rest, self._sent = b"", 0

    def call(self, method: str, session: str | None = None, **parameters: Any) -> tuple[dict, list[dict]]:
        """Send a command; the answer, and the events that came before it."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        events = []
        while (got := self.receive()).get("id") != self._sent:
            events.append(got)
        assert "error" not in got, f"{method}: {got['error']}"
        return got["result"], events

    def receive(self) -> dict:
        """The next message."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            got = os.read(self._from, 1 << 16) if ready else b""
            assert got, "Chromium has ended, or says nothing"
            self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            os.close(self._to)
        self._process.terminate()
        self._process.wait(30)
        os.close(self._from)


class Tab:
    """A page in a tab of its own, as wide as a screen is."""

    def __init__(self, browser: Browser, path: Path, width: int = 1280, *, dark: bool = False) -> None:
        self.browser, self.path, self.events = browser, path, list[dict]()
        target = browser.call("Target.createTarget", url="about:blank")[0]["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)[0]["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.screen(width)
        self.media(dark=dark)
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(browser.receive())

    def call(self, method: str, **parameters: Any) -> dict:
        result, events = self.browser.call(method, self._session, **parameters)
        self.events += [event for event in events if event.get("sessionId") == self._session]
        return result

    def screen(self, width: int) -> None:
        """Emulate a screen."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone
        )

    def media(self, kind: str = "", *, dark: bool = False) -> None:
        """Emulate screen or paper, and what the reader prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, code: str) -> None:
        """Wait for an expression to hold; the page answers some things in its own time."""
        deadline = time.monotonic() + PATIENCE / 4
        while not self.run(code):
            assert time.monotonic() < deadline, f"never came true: {code}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """A key, as a person presses it."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def complaints(self) -> list[str]:
        """Errors, warnings and violations of the policy that the page gave, and what it asked for."""
        self.run("new Promise(done => setTimeout(done, 50))")
        found = []
        for event in self.events:
            about = event["params"]
            if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                found.append(json.dumps(about)[:500])
            if (
                event["method"] == "Network.requestWillBeSent"
                and about["request"]["url"] != self.path.as_uri()
            ):
                found.append(f"asked for {about['request']['url']}")
        found += self.run("performance.getEntriesByType('resource').map(entry => entry.name)")
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {
        "comparison": shown(),
        "suite": several(6),
        "small": several(2),
        "attacked": Suite((evil(shown()),) * 5),
    }
    for name, what in found.items():
        write_report(what, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in found}


NAMES = """[...document.querySelectorAll('#leaderboard tbody tr')].filter(row => !row.hidden)
  .map(row => row.dataset.recipe)"""
DRAWN = """[...document.querySelectorAll('.chart')].filter(place => !place.closest('details:not([open])')).map(place => ({
  id: place.id, drawn: !!place.querySelector('svg.main-svg'), traces: (place.data || []).length,
  width: place.querySelector('svg.main-svg').getBoundingClientRect().width, room: place.clientWidth}))"""


EXPECTED = {
    "comparison": ["c0-difference", "c0-seeds", "c0-curves", "c0-time", "c0-tuning"],
    "suite": ["suite-ranks", "suite-profiles"],
    "small": ["suite-profiles"],
}


def looks_right(tab: Tab, name: str, width: int, dark: bool) -> None:
    """Everything is drawn, fits, and is as light or dark as the reader prefers."""
    assert tab.run("innerWidth") == width
    assert tab.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    tab.until(f"{DRAWN}.every(chart => Math.abs(chart.width - chart.room) <= 1)")
    charts = tab.run(DRAWN)
    assert [chart["id"] for chart in charts] == EXPECTED[name]
    assert all(chart["drawn"] and chart["traces"] for chart in charts)
    ground = tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground) < 60) == dark
    ink = "Math.min(...getComputedStyle(document.querySelector('.xtick text')).fill.match(/\\d+/g))"
    tab.until(f"({ink} > 150) === {json.dumps(dark)}")
    assert tab.complaints() == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)], ids=["light", "dark phone"])
@pytest.mark.parametrize("name", ["comparison", "suite"])
def test_it_renders_and_follows_its_reader(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    tab = Tab(browser, pages[name], width, dark=dark)
    looks_right(tab, name, width, dark)
    tab.media(dark=not dark)
    looks_right(tab, name, width, not dark)
    other = 360 if width == 1280 else 1280
    tab.screen(other)
    looks_right(tab, name, other, not dark)


def test_a_phone_shows_the_verdict_without_scrolling(browser: Browser, pages: dict[str, Path]) -> None:
    tab = Tab(browser, pages["comparison"], 360)
    seen = tab.run(
        """[...document.querySelectorAll('#leaderboard tbody tr')].map(row => {
          const words = row.querySelector('.under'), place = words.getBoundingClientRect();
          return [row.dataset.recipe, place.width > 0 && place.right <= innerWidth ? words.textContent : '']})"""
    )
    verdicts = {label: difference.verdict for label, difference in shown().differences().items()}
    assert {label: words.lstrip("▲▼≈ ") for label, words in seen} == {
        **verdicts,
        "cross_entropy": "baseline",
        "exploding": "diverged",
        "hinge": "refused",
    }
    # the rest is reached by scrolling the table, not the page
    box = "document.querySelector('#leaderboard .scroll')"
    assert tab.run(f"{box}.scrollWidth > {box}.clientWidth")
    first = f"{box}.querySelector('tbody th').getBoundingClientRect().left"
    before = tab.run(first)
    tab.run(f"{box}.scrollLeft = 150")
    assert tab.run(f"{box}.scrollLeft") == 150
    assert abs(tab.run(first) - before) <= 16, "the names scroll away"


@pytest.fixture(scope="module")
def open_tab(browser: Browser, pages: dict[str, Path]) -> Tab:
    return Tab(browser, pages["comparison"])


@pytest.fixture
def tab(open_tab: Tab) -> Tab:
    open_tab.run(CLEAR)
    return open_tab


CLEAR = "{ const field = document.getElementById('filter'); field.value = ''; field.dispatchEvent(new Event('input')); }"


def test_it_sorts_by_pointer_and_by_key(tab: Tab) -> None:
    values = {row.recipe.label: row.mean("test_accuracy") for row in shown().ranked}
    assert tab.run(NAMES)[:4] == list(values)
    head = "document.querySelectorAll('#leaderboard thead button')[1]"
    tab.run(f"{head}.click()")
    rising = sorted(values, key=lambda label: values[label])
    # what has no number stays below, whichever way
    assert tab.run(NAMES) == [*rising, *tab.run(NAMES)[4:]]
    assert set(tab.run(NAMES)[4:]) == {"exploding", "hinge"}
    assert tab.run(f"{head}.closest('th').ariaSort") == "ascending"
    tab.run(f"{head}.focus()")
    tab.press("Enter")
    assert tab.run(NAMES)[:4] == rising[::-1]
    assert set(tab.run(NAMES)[4:]) == {"exploding", "hinge"}
    assert tab.run(f"{head}.closest('th').ariaSort") == "descending"
    # back to the names, with the keyboard alone
    tab.run("document.querySelectorAll('#leaderboard thead button')[0].focus()")
    tab.press(" ")
    assert tab.run(NAMES) == sorted([*values, "exploding", "hinge"])
    sorts = tab.run("[...document.querySelectorAll('#leaderboard thead th')].map(head => head.ariaSort)")
    assert sorts == ["ascending", *["none"] * (len(sorts) - 1)]
    assert tab.complaints() == []


def test_it_filters_tables_and_charts(tab: Tab) -> None:
    chart = "document.getElementById('c0-%s').data.length"
    assert tab.run(chart % "difference") == 3
    assert tab.run(chart % "seeds") == 2 * 4 + 1
    tab.run("document.getElementById('filter').focus()")
    tab.type("FOC")
    assert tab.run(NAMES) == ["focal"]
    assert tab.run("document.getElementById('count').textContent") == "1 of 6"
    assert tab.run(chart % "difference") == 1
    assert tab.run(chart % "seeds") == 2 + 1  # the reference stays
    assert tab.run(chart % "time") == 1
    assert (
        tab.run(
            "[...document.querySelectorAll('[data-key]')].filter(b => b.offsetWidth).map(b => b.dataset.key)"
        )
        == ["focal"] * 3
    )
    # what did not run is told whatever the filter says
    assert "loss is inf" in tab.run("document.body.innerText")
    tab.type(", gce")
    assert tab.run(NAMES) == ["focal", "gce"]
    tab.type("x")
    assert tab.run(NAMES) == ["focal"]
    tab.run("document.getElementById('filter').select()")
    tab.type("nothing is called this")
    assert tab.run(NAMES) == []
    assert tab.run("document.getElementById('count').textContent") == "0 of 6"
    tab.run("document.getElementById('filter').select()")
    tab.type(" ")
    assert len(tab.run(NAMES)) == 6
    assert tab.run(chart % "seeds") == 2 * 4 + 1
    assert tab.complaints() == []


def test_a_key_hides_its_recipe_in_all_charts(tab: Tab) -> None:
    key = "document.querySelector('#c0-curves ~ .key [data-key=focal]')"
    before = tab.run(
        "['curves', 'time', 'difference'].map(kind => document.getElementById('c0-' + kind).data.length)"
    )
    tab.run(f"{key}.focus()")
    tab.press("Enter")
    after = tab.run(
        "['curves', 'time', 'difference'].map(kind => document.getElementById('c0-' + kind).data.length)"
    )
    assert [a - b for a, b in zip(after, before, strict=True)] == [-2, -1, -1]
    assert (
        tab.run("[...document.querySelectorAll('[data-key=focal]')].map(b => b.ariaPressed)") == ["false"] * 3
    )
    assert len(tab.run(NAMES)) == 6
    tab.press("Enter")
    assert tab.run("document.getElementById('c0-time').data.length") == before[1]
    assert tab.complaints() == []


def test_curves_of_another_metric(tab: Tab) -> None:
    choice = "document.getElementById('c0-metric')"
    assert "training loss" in tab.run(f"[...{choice}.options].map(option => option.text).join()")
    tab.run(f"{choice}.value = 'loss'; {choice}.dispatchEvent(new Event('change'))")
    assert (
        tab.run("document.getElementById('c0-curves').data[1].y[0]") == 1.0
    )  # 1 / epoch in the made-up runs
    assert tab.run("document.querySelector('#c0-curves .ytitle').textContent").startswith("training loss")
    assert tab.complaints() == []


def test_the_first_tab_leads_to_the_leaderboard(browser: Browser, pages: dict[str, Path]) -> None:
    tab = Tab(browser, pages["comparison"])
    tab.press("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    assert tab.run("document.activeElement.getBoundingClientRect().left") >= 0
    tab.press("Enter")
    assert tab.run("location.hash") == "#leaderboard"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    tab.press("Tab")
    assert tab.run("document.activeElement.id") == "filter"
    assert tab.run(outline) == "solid"


def test_each_data_set_opens(browser: Browser, pages: dict[str, Path]) -> None:
    tab = Tab(browser, pages["suite"], 360)
    assert not tab.run("document.getElementById('c2-seeds').data")
    tab.run("document.querySelectorAll('details.task')[2].querySelector('summary').click()")
    tab.until("document.getElementById('c2-seeds').data")
    assert tab.run("document.documentElement.scrollWidth") <= 360
    assert all(chart["width"] <= chart["room"] + 1 for chart in tab.run(DRAWN))
    # the one filter holds for the ranks, their charts and every data set
    tab.run("document.getElementById('filter').focus()")
    tab.type("focal")
    assert tab.run(NAMES) == ["focal"]
    assert tab.run("document.getElementById('c2-seeds').data.length") == 2
    assert tab.run("document.getElementById('suite-profiles').data.length") == 1
    assert tab.complaints() == []


def test_a_suite_without_a_diagram(browser: Browser, pages: dict[str, Path]) -> None:
    tab = Tab(browser, pages["small"])
    looks_right(tab, "small", 1280, False)
    assert "There is no critical-difference diagram" in tab.run("document.body.innerText")


@pytest.mark.parametrize("name", ["comparison", "small"])
def test_on_paper(browser: Browser, pages: dict[str, Path], name: str) -> None:
    tab = Tab(browser, pages[name], dark=True)
    closed = tab.run("document.querySelectorAll('details:not([open])').length")
    assert closed
    tab.media("print", dark=True)
    # even where no script runs
    assert max(tab.run("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")) < 80
    tab.run("dispatchEvent(new Event('beforeprint'))")
    tab.call("Emulation.setDeviceMetricsOverride", width=680, height=900, deviceScaleFactor=1, mobile=False)
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ink = tab.run(
        "getComputedStyle(document.querySelector('.annotation-text')).fill.match(/\\d+/g).map(Number)"
    )
    assert max(ink) < 80, "white writing on white paper"
    assert tab.run("document.querySelectorAll('details:not([open])').length") == 0
    charts = tab.run(DRAWN)
    assert len(charts) == tab.run("document.querySelectorAll('.chart').length")
    assert all(chart["traces"] and chart["width"] <= chart["room"] + 1 for chart in charts)
    cut = tab.run(
        """[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1
        || getComputedStyle(box).overflowX !== 'visible').map(box => box.ariaLabel)"""
    )
    assert cut == [], "tables are cut off"
    controls = tab.run(
        "[...document.querySelectorAll('.filter, .skip, .copy, select')].filter(e => e.offsetWidth).length"
    )
    assert controls == 0
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert tab.run("document.querySelectorAll('details:not([open])').length") == closed
    if name == "comparison":
        tab.media(dark=True)
        pdf = base64.b64decode(tab.call("Page.printToPDF", preferCSSPageSize=True)["data"])
        assert pdf.startswith(b"%PDF")
        assert len(pdf) > 20_000
        assert tab.run("document.documentElement.className") == "", "the page has stayed paper"
    assert tab.complaints() == []


def test_bad_names_run_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    tab = Tab(browser, pages["attacked"], 360)
    tab.run("document.querySelectorAll('details.task')[0].open = true")
    tab.until("document.getElementById('c0-tuning').data")
    assert tab.run("document.querySelectorAll('script').length") == 3
    assert tab.run("document.querySelectorAll('img, main a').length") == 0
    # a chart cuts long names; what it shows of them is the text itself
    shown_names = tab.run("[...document.querySelectorAll('.annotation-text')].map(text => text.textContent)")
    assert any(text.startswith(EVIL[:12]) for text in shown_names)
    assert EVIL + "1" in tab.run(
        "[...document.querySelectorAll('[data-key] span')].map(span => span.textContent)"
    )
    assert tab.run("document.documentElement.scrollWidth") <= 360
    assert tab.complaints() == []


def test_the_policy_stops_a_script_that_is_not_the_pages_own(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    spoilt = tmp_path / "spoilt.html"
    whole = pages["comparison"].read_text(encoding="utf-8")
    spoilt.write_text(
        whole.replace("<main>", "<main><script>document.title = 'ran'</script>", 1), encoding="utf-8"
    )
    tab = Tab(browser, spoilt)
    assert tab.run("document.title") != "ran"
    # so the tests above would have seen a complaint
    assert any("Content Security Policy" in line for line in tab.complaints())

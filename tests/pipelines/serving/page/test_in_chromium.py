"""The page as a person uses it, in headless Chromium: photograph, question, level, answer, bytes.

`make test-page` runs it. With PAGE_PICTURES=FOLDER it leaves screenshots there.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mantis_core.codec.checkpoint import save_model
from mantis_core.device.golden import procedural_image
from mantis_lite import LiteClient, open_export
from pipelines.export.write import export_client
from pipelines.serving.app import Limits
from pipelines.serving.pages import RUNTIME, Page, lacking
from tests.pipelines.export.codecs import codec_of
from tests.pipelines.serving.conftest import served

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1300, 900), (400, 800)
ANSWERED_MS = 30_000


class Codec:
    """A codec of random weights as a model folder, and its exported client."""

    def __init__(self, kind: str, top: Path) -> None:
        codec = codec_of(kind)
        self.folder, self.exported = top / "model", top / "client"
        save_model(self.folder, codec, {"step": 1})
        export_client(codec.client_codec(), self.exported)
        self.lite: LiteClient = open_export(self.exported)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec("asked", tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def detecting(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec("detecting", tmp_path_factory.mktemp("detecting"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "Chromium was not found (Debian/Ubuntu: apt-get install chromium)"
    assert not lacking(RUNTIME), "`make page` fetches onnxruntime-web"
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Visitor:
    """A person at the page. `streams` is all that was sent to be answered."""

    def __init__(self, browser: Any, url: str, size: tuple[int, int] = DESKTOP) -> None:
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.errors: list[str] = []
        self.streams: list[bytes] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(url)

    def _note(self, request: Any) -> None:
        self.asked.append(request.url)
        if "/v1/answers" in request.url:
            self.streams.append(request.post_data_buffer)

    def gives(self, image: bytes, name: str = "photograph.png") -> None:
        """Picks a photograph."""
        kind = f"image/{name.rsplit('.')[-1]}"
        self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": image})

    def settled(self) -> None:
        """Waits until all of the answer is there."""
        self.page.wait_for_selector("#answer:visible", timeout=ANSWERED_MS)
        self.page.wait_for_selector("body:not(.busy)", timeout=ANSWERED_MS)
        self.page.wait_for_function(
            "() => /WebP/.test(document.getElementById('webp').textContent)"
            " && !/Looking/.test(document.getElementById('webp').textContent)"
            " && (document.getElementById('level-choice').hidden"
            "     || !document.getElementById('curve').hidden)",
            timeout=ANSWERED_MS,
        )

    def shown(self, part: str) -> str:
        """The text of a part of the page."""
        text: str = self.page.inner_text(f"#{part}")
        return text

    def pictured(self, name: str) -> None:
        """Leaves a screenshot where somebody wants to look."""
        if folder := os.environ.get("PAGE_PICTURES"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def png(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """An image (3, H, W) as a PNG."""
    written = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(written, "PNG")
    return written.getvalue()


def pictures(codec: Codec, count: int = 10) -> list[bytes]:
    """Images of the model's size, and every other one larger and not square."""
    height, width = codec.lite.facts.image_size
    sizes = [(height, width), (2 * height + 7, 3 * width)]
    return [png(procedural_image(70 + n, sizes[n % 2])) for n in range(count)]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_person_asks_and_sees_answer_and_bytes(
    browser: Any, asked: Codec, size: tuple[int, int]
) -> None:
    page = Page(str(RUNTIME), (str(asked.exported),))
    with served([asked.folder], page=page) as url:
        visitor = Visitor(browser, url, size)
        visitor.gives(pictures(asked, 2)[1])
        visitor.settled()
        assert "Encoded in this browser" in visitor.shown("where")
        assert int(visitor.shown("bytes")) == len(visitor.streams[0])
        first = asked.lite.facts.tasks[0]
        assert first in visitor.shown("answers")
        assert visitor.page.locator("#chart circle").count() == asked.lite.facts.rate_levels
        wide = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= size[0]  # nothing to scroll sideways
        visitor.page.get_by_label("ground").check()
        visitor.page.get_by_label(first).uncheck()
        visitor.settled()
        assert "drawn over the photograph" in visitor.shown("answers")
        visitor.pictured(f"asked-{size[0]}")
        assert visitor.errors == []
        own = url.split("//")[1]
        assert {each.split("/")[2] for each in visitor.asked if "//" in each} == {own}


def test_streams_of_the_browser_are_those_of_the_exported_client(
    browser: Any, asked: Codec
) -> None:
    facts = asked.lite.facts
    page = Page(str(RUNTIME), (str(asked.exported),))
    with served([asked.folder], page=page) as url:
        visitor = Visitor(browser, url)
        visitor.page.wait_for_selector("#where:not(:empty)", timeout=ANSWERED_MS)
        for number, picture in enumerate(pictures(asked)):
            level = number % facts.rate_levels
            visitor.page.locator("#level").fill(str(level))
            visitor.streams.clear()
            visitor.gives(picture)
            visitor.page.wait_for_function(
                "bytes => document.getElementById('curve').hidden === false", timeout=ANSWERED_MS
            )
            visitor.settled()
            image = asked.lite.prepare_image(picture)[None]
            expected = asked.lite.encode(image, [facts.tasks[0]], level=level)[0]
            assert expected in visitor.streams
            assert visitor.errors == []


def test_a_client_that_decides_is_shown_its_tasks(browser: Any, detecting: Codec) -> None:
    page = Page(str(RUNTIME), (str(detecting.exported),))
    with served([detecting.folder], page=page) as url:
        visitor = Visitor(browser, url)
        picture = pictures(detecting, 1)[0]
        visitor.gives(picture)
        visitor.settled()
        assert visitor.page.get_by_label("the client decides").is_checked()
        (expected,) = detecting.lite.encode(detecting.lite.prepare_image(picture)[None])
        assert visitor.streams[0] == expected
        assert visitor.page.is_hidden("#level-choice")
        assert visitor.errors == []


def test_without_an_exported_client_the_service_encodes_and_the_page_says_so(
    browser: Any, asked: Codec
) -> None:
    with served([asked.folder], page=Page(str(RUNTIME))) as url:
        visitor = Visitor(browser, url)
        visitor.gives(pictures(asked, 1)[0])
        visitor.settled()
        assert "The photograph goes to the service" in visitor.shown("where")
        assert "by the service" in visitor.shown("times")
        assert any("/v1/streams" in each for each in visitor.asked)


def test_what_is_no_photograph_is_said_and_the_page_goes_on(browser: Any, asked: Codec) -> None:
    page = Page(str(RUNTIME), (str(asked.exported),))
    with served([asked.folder], page=page) as url:
        visitor = Visitor(browser, url)
        visitor.page.wait_for_selector("#where:not(:empty)", timeout=ANSWERED_MS)
        visitor.gives(b"no photograph")
        visitor.page.wait_for_selector("#problem:visible", timeout=ANSWERED_MS)
        assert "no photograph that the browser can read" in visitor.shown("problem")
        visitor.gives(pictures(asked, 1)[0])
        visitor.settled()
        assert visitor.page.is_hidden("#problem")


def test_a_token_is_asked_for_and_kept(browser: Any, asked: Codec) -> None:
    page = Page(str(RUNTIME), (str(asked.exported),))
    with served([asked.folder], Limits("secret"), page=page) as url:
        visitor = Visitor(browser, url)
        visitor.page.wait_for_selector("#token:visible")
        assert visitor.page.is_hidden("#main")
        visitor.page.fill("#token-text", "wrong")
        visitor.page.click("#token button")
        visitor.page.wait_for_selector("#problem:visible")
        assert "token is missing or wrong" in visitor.shown("problem")
        visitor.page.fill("#token-text", "secret")
        visitor.page.click("#token button")
        visitor.page.wait_for_selector("#main:visible")
        visitor.gives(pictures(asked, 1)[0])
        visitor.settled()
        assert visitor.errors == []

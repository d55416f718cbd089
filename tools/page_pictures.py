"""The pictures of the server's page in docs/pictures: it paints, and is photographed at three widths.

    python tools/page_pictures.py        # needs playwright, and a chromium

Each is reduced to 128 colours, which is all that a page needs.
"""

from __future__ import annotations

import shutil
import threading
import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from nativesd.server.serve import bind, make_server
from nativesd.server.settings import Settings

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
WIDTHS = {400: 1500, 1000: 900, 1600: 1000}
THINGS = ("an owl on a purple", "a cactus on a pink", "a car on a blue", "a fox on a green", "a whale on an orange",
          "a strawberry on a yellow")  # fmt: skip
COLOURS = 128


def main() -> None:
    """Paint and photograph."""
    settings = Settings(port=0)
    bound = bind(settings)
    server = make_server(settings)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for width, height in WIDTHS.items():
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme="dark" if width == 1000 else "light"
                )
                page.goto(url)
                _paint(page)
                _keep(page.screenshot(), FOLDER / f"page-{width}.png")
            browser.close()
    finally:
        server.should_exit = True
        thread.join()


def _paint(page: Page) -> None:
    for number, thing in enumerate(THINGS):
        page.fill("#prompt", f"{thing} background")
        page.fill("#seed", str(number + 3))
        page.click("#go")
        while page.locator("#gallery li").count() <= number:
            time.sleep(0.1)
    page.evaluate("document.activeElement.blur()")
    time.sleep(0.5)


def _keep(data: bytes, file: Path) -> None:
    Image.open(BytesIO(data)).convert("RGB").quantize(COLOURS).save(file, optimize=True)


if __name__ == "__main__":
    main()

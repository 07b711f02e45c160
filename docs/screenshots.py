"""Draw docs/report.png and docs/report-dark.png anew: make demo, then .venv/bin/python docs/screenshots.py."""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
PAGE = DOCS.parent / "demo_out" / "report.html"

with sync_playwright() as playwright:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for scheme, name in (("light", "report.png"), ("dark", "report-dark.png")):
        page = browser.new_page(viewport={"width": 1280, "height": 1540}, color_scheme=scheme)
        page.goto(PAGE.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        for key in "rrk":
            page.keyboard.press(key)
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=DOCS / name)
    browser.close()

"""Uses the server's page in a headless Chromium, by keyboard, in dark mode and on a phone's width.

    page_in_chromium.py --url URL --screenshot FILE.png

Prints one JSON line: what each visit showed, and the description of the API at /docs.

Chromium is the system's (Debian's package `chromium`).
"""

import argparse
import json
import re
import shutil
import sys

from playwright.sync_api import sync_playwright

VISITS = {
    "desk": {"viewport": {"width": 1100, "height": 560}},
    "dark": {"viewport": {"width": 1100, "height": 560}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}},
}


def heard(page, url):
    """Returns a list that gets what the page complains of, and what it asks of other servers."""
    noise = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((url, "data:")) else noise.append(request.url))
    return noise


def read_description(page, url):
    """Opens the description of the API and waits for its list of routes."""
    noise = heard(page, url)
    page.goto(f"{url}docs")
    page.locator(".opblock").first.wait_for(timeout=60_000)
    return {"routes": page.locator(".opblock-summary-path").all_inner_texts(), "noise": noise}


def visit(page, url):
    """Types a question and sends it with the keyboard alone."""
    noise = heard(page, url)
    page.goto(url)
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("What is 17 + 25?")
    page.keyboard.press("Enter")
    page.locator("#status", has_text=re.compile("Done|as fast")).wait_for(timeout=120_000)
    arms = page.locator(".arm").all()
    return {
        "status": page.inner_text("#status"),
        "key_is_hidden": page.locator("#key-field").is_hidden(),
        "answers": [arm.locator(".answer").inner_text() for arm in arms],
        "analyses": [arm.locator(".analysis").inner_text() for arm in arms],
        "accepted": [arm.locator(".accepted").count() for arm in arms],
        "own": [arm.locator(".own").count() for arm in arms],
        "shown": [
            dict(zip(arm.locator("dt").all_inner_texts(), arm.locator("dd").all_inner_texts(), strict=True))
            for arm in arms
        ],
        "is_beside": len(arms) > 1 and arms[0].bounding_box()["y"] == arms[1].bounding_box()["y"],
        "overflows": page.evaluate("document.documentElement.scrollWidth > innerWidth"),
        "ground": page.evaluate("getComputedStyle(document.body).backgroundColor"),
        "noise": noise,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--screenshot", required=True)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no Chromium on this machine; install Debian's package chromium")
    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, options in VISITS.items():
            context = browser.new_context(**options)
            page = context.new_page()
            try:
                found[name] = visit(page, arguments.url)
            finally:
                page.screenshot(path=arguments.screenshot.replace(".png", f"-{name}.png"), full_page=True)
            context.close()
        description = read_description(browser.new_page(), arguments.url)
        browser.close()
    print(json.dumps({"visits": found, "description": description}))


if __name__ == "__main__":
    main()

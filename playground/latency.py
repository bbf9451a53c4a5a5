"""How long from a keystroke to the canvas on the page? Median and 95%, typed in a headless Chromium.

The page measures itself: from the time stamp of the key event to the moment the new canvas is drawn. Keys come one at a
time, each after the page has read the canvas before it.

Reads:  out/onnx/, or else pretrained/onnx/      Writes: nothing
    python -m playground.latency
"""
import shutil
from contextlib import contextmanager

import numpy as np

import runtime
from playground.__main__ import described, find_model, server

model = ''                # folder with the exported model, as of python -m playground
keys = 200                # keystrokes measured, after 20 that are not
config = runtime.configure(globals())

BROWSERS = 'chromium', 'chromium-browser', 'google-chrome'
SENTENCES = ('two red cubes are under a blue ball ', 'the cyan cylinder is in front of three chestnut boxes ',
             'a pair of golden rings sits inside the emerald crate ')


def find_browser():
    """Path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def browser():
    """The installed Chromium, headless. Needs playwright."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_browser(), args=['--no-sandbox'])
        try:
            yield chromium
        finally:
            chromium.close()


def open_page(page, address, timeout=300_000):
    """Open the playground and wait until it is ready. SystemExit(2), after one line, with the page's own message."""
    page.goto(address)
    page.wait_for_function("window.playground?.ready || !document.getElementById('message').hidden", timeout=timeout)
    if page.evaluate("!document.getElementById('message').hidden"):
        runtime.fail(f'the page says: {page.text_content("#message")}')


def milliseconds(page, count):
    """The times of count keystrokes on an open page."""
    page.fill('#text', '')
    page.evaluate('playground.settled()')
    page.evaluate('playground.milliseconds.length = 0')
    page.focus('#text')
    text = ''.join(SENTENCES)
    for i in range(count):
        page.keyboard.type(text[i % len(text)])
        page.evaluate('playground.settled()')
        if i % len(text) == len(text) - 1:
            page.evaluate("document.getElementById('text').value = ''")
    return page.evaluate('playground.milliseconds')


def main():
    if not find_browser():
        runtime.fail(f'no browser: none of {", ".join(BROWSERS)} is installed')
    try:
        import playwright  # noqa: F401
    except ImportError:
        runtime.fail('playwright is not installed; run: pip install -r playground/requirements.txt')
    if keys < 2:
        runtime.fail(f'--keys={keys}: expects at least 2')
    folder = find_model(model)
    print(f'model {described(folder)}')
    with server(folder) as address, browser() as chromium:
        page = chromium.new_page(viewport={'width': 1280, 'height': 900})
        open_page(page, address)
        milliseconds(page, 20)                   # the first runs of a session are slower
        times = milliseconds(page, keys)
    print(f'keystroke to canvas: {len(times)} keys   p50 {np.percentile(times, 50):.1f} ms   '
          f'p95 {np.percentile(times, 95):.1f} ms   (headless Chromium, one thread)')


if __name__ == '__main__':
    main()

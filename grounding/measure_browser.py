"""How fast are the pages? Frame rate of the viewer, and the time of one probe in the playground: median and 95%.

A probe is everything from a moved slider to the placed marker: augmentation, E, projection, D. It is timed in the page.

Reads:  artifacts/<experiment name>_<split>_latent_points.json, ..._interactive_assets.json, ..._{encoder,decoder}.onnx
Writes: nothing; prints a table
    python grounding/measure_browser.py --name asymmetric_resnet8_autoencoder
"""
import functools
import http.server
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import settings
from latents import read_json

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
SECONDS, PROBES = 5, 200


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The handler of `python -m http.server`, without its log."""

    def log_message(self, *args):
        pass


@contextmanager
def server(root):
    """Serve the folder root on a free port of 127.0.0.1; yields 'http://127.0.0.1:PORT'."""
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{httpd.server_port}'
    finally:
        httpd.shutdown()
        httpd.server_close()


def find_browser():
    """Path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def browser_page(width=1280, height=800):
    """A page of the installed Chromium, headless, with WebGL in software. Needs playwright."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=[
            '--no-sandbox', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader'])
        try:
            yield browser.new_page(viewport={'width': width, 'height': height})
        finally:
            browser.close()


def playground_address(base, name, split):
    """The address of the playground with the three artifacts of an experiment."""
    stem = f'/artifacts/{name}'
    return (f'{base}/grounding/interactive_latent_playground.html?assets={stem}_{split}_interactive_assets.json'
            f'&encoder={stem}_encoder.onnx&decoder={stem}_decoder.onnx')


def open_page(page, address, ready):
    """Go to address and wait for `ready`, a JavaScript expression. SystemExit(2) with the page's own message."""
    page.goto(address)
    page.wait_for_function(f"({ready}) || !document.getElementById('message').hidden", timeout=120_000)
    if not page.evaluate(f'Boolean({ready})'):
        settings.fail(f'{address.split("?")[0]} says: {page.text_content("#message")}')


def main():
    p = settings.Parser(__doc__)
    p.add_argument('--name', required=True, help='experiment.name of the artifacts')
    p.add_argument('--split', default='test')
    p.add_argument('--root', default=str(ROOT), help='folder that holds grounding/ and artifacts/ (the repository)')
    args = p.parse_args()
    if not find_browser():
        settings.fail(f'no browser: none of {", ".join(BROWSERS)} is installed')
    with server(args.root) as base, browser_page() as page:
        open_page(page, f'{base}/grounding/latent_space_viewer.html?data=/artifacts/{args.name}_{args.split}'
                        '_latent_points.json', 'window.viewer?.ready')
        points = page.evaluate('viewer.points.length')
        before = page.evaluate('[viewer.frames(), performance.now()]')
        page.wait_for_timeout(SECONDS * 1000)
        after = page.evaluate('[viewer.frames(), performance.now()]')
        open_page(page, playground_address(base, args.name, args.split), 'window.playground?.ready')
        milliseconds = page.evaluate('''async (count) => {
            const slider = document.getElementById('rotation');
            playground.milliseconds.length = 0;
            for (let i = 0; i < count; i++) {
                slider.value = i % 2 ? i % 90 : -(i % 90);
                slider.dispatchEvent(new Event('input'));
                await playground.settled();
            }
            return playground.milliseconds;
        }''', PROBES)
        reference = page.evaluate('document.getElementById("facts").textContent')
    cloud = Path(args.root) / 'artifacts' / f'{args.name}_{args.split}_latent_points.json'
    print(read_json(cloud, 'generate_latent_points.py')['data'])
    print(f'{reference}; headless Chromium, WebGL in software')
    print(f'viewer      {points:,} points   {(after[0] - before[0]) / (after[1] - before[1]) * 1000:.1f} frames/s')
    print(f'one probe   {len(milliseconds)} probes   p50 {np.percentile(milliseconds, 50):.1f} ms   '
          f'p95 {np.percentile(milliseconds, 95):.1f} ms')


if __name__ == '__main__':
    main()

"""Both pages in a real browser, on the artifacts of a small autoencoder: installed Chromium, driven by Playwright.

Skipped, loudly, where Chromium, playwright or node_modules is missing; in CI (environment variable CI) that is an
error. GROUNDING_SCREENSHOTS=FOLDER keeps a screenshot of each page.
"""
import base64
import io
import itertools
import json
import os
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from small_run import CONFIG, FOLDER, NAME, NOT_TESTED

if NOT_TESTED:
    pytest.skip(NOT_TESTED, allow_module_level=True)

import autoencoders
import measure_browser
import settings
from latents import l2_normalize

MISSING = [what for what, there in (
    ('a browser: apt-get install chromium', measure_browser.find_browser()),
    ('grounding/node_modules: npm install --prefix grounding', (FOLDER / 'node_modules' / 'three').is_dir()))
    if not there]
try:
    import playwright  # noqa: F401
except ImportError:
    MISSING.append('playwright: pip install -r grounding/requirements.txt')
if MISSING:
    pytest.skip('THE PAGES ARE NOT TESTED; missing: ' + '; '.join(MISSING), allow_module_level=True)
PLAYGROUND = 'window.playground?.ready'
VIEWER = f'/grounding/latent_space_viewer.html?data=/artifacts/{NAME}_test_latent_points.json'


@pytest.fixture(scope='module')
def base(trained):
    """Address of a server of a folder like the repository's root: grounding/ and artifacts/."""
    (trained.root / 'grounding').symlink_to(FOLDER)
    with measure_browser.server(trained.root) as address:
        yield address


@pytest.fixture(scope='module')
def browser(base):
    with measure_browser.browser_page() as page:
        yield page


@pytest.fixture
def page(browser):
    """The page, with the errors of its console in page.problems and what it threw in page.exceptions."""
    browser.problems, browser.exceptions = [], []

    def on_console(message):
        if message.type == 'error':
            browser.problems.append(message.text)

    def on_error(error):
        browser.problems.append(str(error))
        browser.exceptions.append(str(error))
    browser.on('console', on_console)
    browser.on('pageerror', on_error)
    yield browser
    browser.remove_listener('console', on_console)
    browser.remove_listener('pageerror', on_error)


@pytest.fixture(scope='module')
def assets(trained):
    return json.loads((trained.artifacts / f'{NAME}_test_interactive_assets.json').read_text())


@pytest.fixture(scope='module')
def model(trained):
    config = settings.load_config(settings.parser('').parse_args(
        ['--config', str(CONFIG), '--set', 'model.latent_dim=8']))
    return autoencoders.load(config, 'cpu', trained.artifacts / f'{NAME}.pt')[0]


def playground(page, base):
    measure_browser.open_page(page, measure_browser.playground_address(base, NAME, 'test'), PLAYGROUND)


def state(page):
    """input, latent, preview, marker of the playground once it is still."""
    return page.evaluate('''async () => { await playground.settled(); return Object.fromEntries(
        ['input', 'latent', 'preview', 'marker'].map((key) => [key, Array.from(playground[key])])); }''')


def move(page, slider, value):
    page.evaluate('''([id, value]) => { const slider = document.getElementById(id);
        slider.value = value; slider.dispatchEvent(new Event('input')); }''', [slider, value])


def projected(latent, assets):
    """The kNN barycentre in NumPy: what the page's marker should be."""
    latent = l2_normalize(np.array([latent]))[0]
    distances = ((np.array(assets['reference_latents']) - latent) ** 2).sum(1)
    nearest = distances.argsort()[:assets['projection_k']]
    weights = 1 / (distances[nearest] + 1e-10)
    return weights @ np.array(assets['reference_points'])[nearest] / weights.sum()


def regrounded(model, z):
    """(E(D(z)), D(E(D(z)))) in PyTorch; z (latent_dim,)."""
    with torch.no_grad():
        latent = model.encoder(model.decoder(torch.tensor(z, dtype=torch.float32)[None]))
        image = model.decoder(latent)
    return latent[0].numpy(), image.flatten().numpy()


def screenshot(page, name):
    folder = os.environ.get('GROUNDING_SCREENSHOTS')
    if folder:
        page.screenshot(path=Path(folder) / f'{name}.png')


def test_the_viewer_loads_draws_and_shows_a_digit_on_hover(page, base, trained):
    measure_browser.open_page(page, base + VIEWER, 'window.viewer?.ready')
    page.wait_for_function('viewer.frames() > 3')
    assert page.evaluate('viewer.points.length') == 60
    assert page.locator('#legend div').count() == 10
    x, y = page.evaluate('''() => { const p = viewer.camera.position.clone().set(...viewer.points[0])
        .project(viewer.camera); return [(p.x + 1) / 2 * innerWidth, (1 - p.y) / 2 * innerHeight]; }''')
    page.mouse.move(x, y)
    page.wait_for_function('viewer.hovered >= 0')
    assert page.locator('#tip').is_visible()
    cloud = json.loads((trained.artifacts / f'{NAME}_test_latent_points.json').read_text())
    assert page.evaluate('viewer.hovered') == 0 and page.text_content('#tip') == f'digit {cloud["labels"][0]}, point 0'
    pixels = np.frombuffer(base64.b64decode(cloud['images']), np.uint8)[:784]
    shown = page.evaluate('''() => Array.from(document.querySelector('#tip canvas').getContext('2d')
        .getImageData(0, 0, 28, 28).data)''')
    assert np.abs(255 - np.array(shown[::4]) - pixels).max() <= 1
    assert cloud['data'] in page.text_content('#data')
    screenshot(page, 'viewer')
    assert page.problems == []


def test_each_augmentation_moves_the_marker_and_changes_the_preview(page, base):
    playground(page, base)
    rest = state(page)
    for slider, value in (('translate_x', 4), ('translate_y', -4), ('rotation', 40), ('scale', 0.7), ('intensity', 0.4),
                          ('noise', 0.4), ('masking', 12)):
        move(page, slider, value)
        changed = state(page)
        assert np.abs(np.subtract(changed['marker'], rest['marker'])).max() > 1e-4, slider
        assert np.abs(np.subtract(changed['preview'], rest['preview'])).max() > 1e-3, slider
        assert np.abs(np.subtract(changed['input'], rest['input'])).max() > 0.02, slider
        page.click('#reset')
    assert state(page) == rest
    move(page, 'rotation', 30)
    state(page)
    screenshot(page, 'probe')
    x, y = page.evaluate('playground.screenOf(playground.marker)')
    assert matplotlib.image.imread(io.BytesIO(page.screenshot()))[round(y), round(x), :3].max() < 0.2   # the dark ball
    assert page.problems == []


def test_the_augmentations_do_what_their_sliders_say(page, base, assets):
    playground(page, base)
    page.click('#digit-7')
    digit = np.array(assets['digit_samples'][7]).reshape(28, 28)
    for slider, value, expected in (
            ('translate_x', 3, np.pad(digit, ((0, 0), (3, 0)))[:, :28]),
            ('translate_y', -2, np.pad(digit, ((0, 2), (0, 0)))[2:]),
            ('rotation', 90, np.rot90(digit, -1)),
            ('intensity', 0.5, digit / 2)):
        move(page, slider, value)
        assert np.allclose(np.reshape(state(page)['input'], (28, 28)), expected, atol=1e-5), slider
        page.click('#reset')
    move(page, 'masking', 10)
    masked = np.reshape(state(page)['input'], (28, 28))
    assert (masked[9:19, 9:19] == 0).all() and np.allclose(masked[:9], digit[:9], atol=1e-6)


def test_the_preview_is_pytorchs_and_the_marker_numpys(page, base, model, assets):
    playground(page, base)
    previews = []
    for digit, angle in ((0, 0), (4, 25), (9, 20)):              # the bars lie across each other, in pairs
        page.click(f'#digit-{digit}')
        move(page, 'rotation', angle)
        shown = state(page)
        x = torch.tensor(shown['input']).view(1, 1, 28, 28)
        with torch.no_grad():
            latent = model.encoder(x)
            assert np.allclose(shown['latent'], latent[0].numpy(), atol=1e-3)
            assert np.abs(np.array(shown['preview']) - model.decoder(latent).flatten().numpy()).max() < 1e-3
        assert np.allclose(shown['marker'], projected(shown['latent'], assets), atol=1e-3)
        previews.append(shown['preview'])
    assert min(np.abs(np.subtract(a, b)).max() for a, b in zip(previews, previews[1:])) > 0.3    # not one grey for all
    pixels = page.evaluate('''() => Array.from(document.getElementById('preview').getContext('2d')
        .getImageData(0, 0, 28, 28).data)''')
    assert np.abs(255 - np.array(pixels[::4]) - 255 * np.array(shown['preview'])).max() <= 1     # and it is painted


def test_drawing_with_the_mouse(page, base):
    playground(page, base)
    page.click('#draw')
    assert max(state(page)['input']) == 0
    box = page.locator('#input').bounding_box()
    page.mouse.move(box['x'] + box['width'] / 2, box['y'] + 30)
    page.mouse.down()
    page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] - 30, steps=20)
    page.mouse.up()
    drawn = np.reshape(state(page)['input'], (28, 28))
    assert drawn[8:20, 13:15].min() == 1 and drawn[:, :10].max() == 0        # an upright stroke in the middle
    page.click('#clear')
    assert max(state(page)['input']) == 0
    move(page, 'translate_x', 6)                                 # a sheet that was moved is put back before it is drawn on
    page.mouse.move(box['x'] + 0.25 * box['width'], box['y'] + box['height'] / 2)
    page.mouse.down()
    page.mouse.move(box['x'] + 0.75 * box['width'], box['y'] + box['height'] / 2)    # one jump: no gaps
    page.mouse.up()
    drawn = np.reshape(state(page)['input'], (28, 28))
    assert drawn[13:15, 8:20].min() == 1 and drawn[:8].max() == 0
    assert page.problems == []


def test_interpolation_goes_from_one_regrounded_image_to_the_other(page, base, model, assets):
    playground(page, base)
    page.click('#mode-interpolate')
    labels = assets['reference_labels']
    a, b = labels.index(0), labels.index(5)                                      # bars at right angles
    page.evaluate(f'playground.choose({a}).then(() => playground.choose({b}))')
    state(page)
    raw, marks = np.array(assets['reference_latents_raw']), []
    for t in (0, 0.25, 0.5, 1):
        move(page, 't', t)
        shown = state(page)
        latent, image = regrounded(model, (1 - t) * raw[a] + t * raw[b])
        assert np.abs(np.array(shown['preview']) - image).max() < 1e-3
        assert np.allclose(shown['marker'], projected(latent, assets), atol=5e-3)
        marks.append(shown['marker'])
    path = np.array(page.evaluate('playground.path'))
    assert path.shape == (33, 3)
    assert np.allclose(path[[0, 8, 16, 32]], marks, atol=1e-4)               # the marker walks on the drawn path
    assert np.abs(np.subtract(marks[0], marks[-1])).max() > 0.02
    screenshot(page, 'interpolate')
    assert page.problems == []


def test_points_are_picked_by_click_and_play_moves_t(page, base):
    playground(page, base)
    page.click('#mode-interpolate')
    state(page)
    before = page.evaluate('playground.ends.slice()')
    free = page.evaluate('''() => playground.points.map((point, i) => [...playground.screenOf(point), i])
        .filter(([x, y]) => document.elementFromPoint(x, y)?.parentElement?.id === 'view')''')
    x, y, index = free[-1]
    page.mouse.click(x, y)
    state(page)
    after = page.evaluate('playground.ends.slice()')
    assert after == [index, before[1]] != before                             # the first click sets A
    page.click('#play')
    page.wait_for_function('playground.t > 0.05')
    page.click('#play')
    stopped = page.evaluate('playground.t')
    page.wait_for_timeout(150)
    assert page.evaluate('playground.t') == stopped > 0.05


def test_on_a_phone_nothing_lies_over_the_cloud(page, base):
    before = page.viewport_size
    page.set_viewport_size({'width': 390, 'height': 844})
    for name, open_it in (('phone_viewer', lambda: measure_browser.open_page(page, base + VIEWER,
                                                                             'window.viewer?.ready')),
                          ('phone_playground', lambda: playground(page, base))):
        open_it()
        view, *panels = (page.locator(s).bounding_box() for s in ('#view', *page.evaluate(
            "Array.from(document.querySelectorAll('.panel:not([hidden])'), (panel) => `#${panel.id}`)")))
        assert view['y'] == 0 and view['height'] > 250 and panels
        assert all(panel['y'] >= view['height'] and panel['width'] == view['width'] == 390 for panel in panels)
        assert page.evaluate("""Array.from(document.querySelectorAll('.panel:not([hidden])'))
            .every((panel) => panel.scrollHeight <= panel.clientHeight)""")        # nothing is cut
        screenshot(page, name)
    page.set_viewport_size(before)
    assert page.problems == []


def message(page, address):
    page.goto(address)
    page.wait_for_function("!document.getElementById('message').hidden")
    assert not page.locator('.panel:visible').count()
    return page.text_content('#message')


def test_a_missing_or_malformed_asset_gives_a_readable_message(page, base, trained):
    address = measure_browser.playground_address(base, NAME, 'test')
    assert 'export_encoder_onnx.py' in message(page, address.replace('_encoder.onnx', '_nothing.onnx'))
    assert 'export_interactive_assets.py' in message(page, address.replace('interactive_assets', 'nothing'))
    assert 'lacks "assets"' in message(page, address.split('?')[0])
    assert 'on this server' in message(page, address.replace('assets=', 'assets=http://example.invalid'))
    assert 'not an ONNX file' in message(page, address.replace('_decoder.onnx', '_test_latent_points.json'))
    assert 'do not fit' in message(page, address.replace('_decoder.onnx', '_encoder.onnx'))
    assert 'generate_latent_points.py' in message(page, (base + VIEWER).replace('test_latent', 'nothing'))
    assets = json.loads((trained.artifacts / f'{NAME}_test_interactive_assets.json').read_text())
    def served(text, number=itertools.count()):
        """Under a new name each time: of a file written twice in a second http.server says that it has not changed."""
        broken = trained.artifacts / f'broken_{next(number)}.json'
        broken.write_text(text)
        return message(page, address.replace(f'{NAME}_test_interactive_assets.json', broken.name))

    for change, words in (({'digit_samples': [[0]]}, '"digit_samples" should be 10 rows of 784'),
                          ({'reference_labels': [10] * 60}, 'digits 0 to 9'),
                          ({'num_points': 'many'}, '"num_points"'), ({'projection_k': 99}, '"projection_k"')):
        assert words in served(json.dumps(assets | change))
    assert 'is not JSON' in served('{"experiment": ')
    screenshot(page, 'message')
    assert page.exceptions == []
    for name in ('latent_space_viewer', 'interactive_latent_playground'):
        assert 'must be served' in message(page, (FOLDER / f'{name}.html').as_uri())


@pytest.mark.parametrize('name', ('latent_space_viewer', 'interactive_latent_playground'))
def test_a_page_opened_as_a_file_says_how_to_serve_it(page, name):
    page.goto((measure_browser.ROOT / f'grounding/{name}.html').as_uri())
    message = page.text_content('#message')
    assert 'python -m http.server' in message and f'/grounding/{name}.html' in message and page.is_visible('#message')
    assert page.locator('.panel:visible').count() == 0


def test_without_node_modules_the_pages_say_how_to_install(page, trained, tmp_path):
    (tmp_path / 'artifacts').symlink_to(trained.artifacts)
    shutil.copytree(FOLDER, tmp_path / 'grounding', ignore=shutil.ignore_patterns('node_modules', '__pycache__'))
    with measure_browser.server(tmp_path) as bare:
        for address in (bare + VIEWER, measure_browser.playground_address(bare, NAME, 'test')):
            assert 'npm install --prefix grounding' in message(page, address)

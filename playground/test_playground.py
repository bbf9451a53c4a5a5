"""The playground in a real browser, on a small model that has learnt six sentences: installed Chromium by Playwright.

Skipped, loudly, where something is missing (in CI that is an error). PLAYGROUND_SCREENSHOTS=FOLDER keeps screenshots.
"""
import http.client
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import grammar
import plot
import priors
import runtime
from model import BOS, PARA
from p1_canvas import reconstruction
from playground.__main__ import HERE, described, find_model, server
from playground.latency import browser, find_browser, open_page
from runs.presets import PRESETS
from sample import TextCanvas
from tools import export
from tools.pretrain import rounded

ROOT = HERE.parent
MISSING = [f'{name}: pip install -r playground/requirements.txt'
           for name in ('playwright', 'onnx', 'onnxscript', 'onnxruntime') if not importlib.util.find_spec(name)]
MISSING += [] if find_browser() else ['a browser: apt-get install chromium']
MISSING += [] if (HERE / 'node_modules/onnxruntime-web').is_dir() else [
    'playground/node_modules: npm install --prefix playground']
if MISSING:
    pytest.skip('THE PLAYGROUND IS NOT TESTED; missing: ' + '; '.join(MISSING), allow_module_level=True)

ODD = ['', '   ', 'An apple, an egg!', 'ÜBER den Wolken', 'two  red\tcubes\non a ball', '3 cubes 12345', 'naïve café',
       'e\u0301tude', '日本語 の 文', '½ ² Ⅷ', 'snake_case', 'İstanbul ΣΑΣ', '🙂 smile', '\u200b\ufeff\u00a0x', 'red ' * 100]


def run(*words):
    """A command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [str(word) for word in words])
        runpy.run_path(str(words[0]), run_name='__main__')


TAUGHT = ('a red cube is on a blue ball', 'three black cones are behind a yellow disc', 'two rings are under a box',
          'a cyan box is next to a brown ball', 'a green disc is inside a white ring', 'one torus is far from two dice')


def teach(path, steps=150):
    """Let the nets of a checkpoint learn six sentences by heart, so that what is read depends on the canvas."""
    model, checkpoint = TextCanvas(path, 'cpu', 'float32'), torch.load(path, weights_only=True)
    ids = model.tokens(TAUGHT)
    x = torch.tensor([row + [data.PAD] * (max(map(len, ids)) - len(row)) for row in ids])
    optimizer = torch.optim.Adam([p for net in model.nets.values() for p in net.parameters()], 3e-3)
    for _ in range(steps):
        V = model.nets['encoder'](x)
        z = model.nets['readout'](V)
        loss = sum(reconstruction(model.nets['decoder'], V, z, x, start) for start in (BOS, PARA))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.say(model.nets['encoder'](x)) == list(TAUGHT)
    checkpoint['ema'] |= {name: net.state_dict() for name, net in model.nets.items()}
    torch.save(checkpoint, path)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """P1 to P5 as runs/smoke.sh has them, for one step each, taught six sentences, then rounded to 16 bits like the model
    that comes with the repository, and its export: .folder, .model (TextCanvas)."""
    folder, before = tmp_path_factory.mktemp('playground'), os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        for name in ('evaluation', 'trends', 'samples_table'):
            patch.setattr(plot, name, lambda *_: None)
        patch.setattr(data, 'HELD_OUT_SIZE', 64)
        os.chdir(folder)
        try:
            for script in runtime.scripts('p5'):
                run(script, *PRESETS['smoke'][script.name[:2]].split(), '--max_steps=1', '--dtype=float32')
            teach('out/p5/ckpt.pt')
            torch.save(rounded(torch.load('out/p5/ckpt.pt', weights_only=True)), 'model.pt')
            run(ROOT / 'tools/export.py', '--init_from=model.pt', '--out=onnx', '--map_scenes=20', '--half=true')
        finally:
            os.chdir(before)
    return SimpleNamespace(folder=folder / 'onnx', model=TextCanvas(folder / 'model.pt', 'cpu', 'float32'))


@pytest.fixture(scope='module')
def base(exported):
    with server(exported.folder) as address:
        yield address


@pytest.fixture(scope='module')
def chromium(base):
    with browser() as found:
        yield found


@pytest.fixture(scope='module')
def opened(chromium, base):
    """One page for the module, ready; what its console says of errors is in .problems."""
    page = chromium.new_page(viewport={'width': 1280, 'height': 900})
    page.set_default_timeout(300_000)
    page.problems = []
    page.on('console', lambda message: page.problems.append(message.text) if message.type == 'error' else None)
    page.on('pageerror', lambda error: page.problems.append(str(error)))
    open_page(page, base)
    return page


@pytest.fixture
def page(opened):
    """The page with the sentence it opens with, nothing changed; after the test its console has said no error."""
    write(opened, '')
    write(opened, 'a red cube is on a blue ball')
    opened.select_option('#by', 'relation')
    yield opened
    assert opened.problems == []


def settle(page):
    page.evaluate('playground.settled()')


def write(page, text, where='#text'):
    page.fill(where, text)
    settle(page)


def slide(page, slider, value):
    page.evaluate('''([id, value]) => { const slider = document.getElementById(id);
        slider.value = value; slider.dispatchEvent(new Event('input')); }''', [slider, value])
    settle(page)


def canvas(page, name='shown'):
    """A canvas of the page as (1, C, H, W)."""
    side = page.evaluate('playground.model.about.size')
    return torch.tensor(page.evaluate(f'Array.from(playground.{name})')).view(1, -1, side, side)


def screenshot(page, name):
    folder = os.environ.get('PLAYGROUND_SCREENSHOTS')
    if folder:
        page.screenshot(path=Path(folder) / f'{name}.png', full_page=True)


def test_the_tokenizer_is_tiktokens(page, exported):
    sentences = [*grammar.EVAL_SENTENCES, *ODD, *page.evaluate('playground.model.about.map.sentences')]
    ids = page.evaluate('''(sentences) => sentences.map(
        (s) => playground.model.tokenizer.encode(s, playground.model.about.max_length))''', sentences)
    assert ids == exported.model.tokens(sentences)
    tokenizer = exported.model.tokenizer
    said = page.evaluate('(rows) => rows.map((row) => playground.model.tokenizer.decode(row))', ids)
    whole = [i for i, row in enumerate(exported.model.tokens(sentences)) if '\ufffd' not in tokenizer.decode(row)]
    assert [said[i] for i in whole] == [tokenizer.decode(ids[i]) for i in whole] and len(whole) > len(sentences) - 3


def test_typing_changes_the_canvas_and_it_is_pytorchs(page, exported):
    before = canvas(page)
    pixels = page.evaluate("document.getElementById('picture').toDataURL()")
    page.focus('#text')
    page.keyboard.type(' now')
    settle(page)
    assert (canvas(page) - before).abs().max() > 1e-3
    for sentence in ('two green rings are inside a white box', 'a blue ball is on a red cube', '', 'red ' * 100):
        write(page, sentence)
        assert (canvas(page) - before).abs().max() > 1e-3
        V, z = exported.model.read([sentence])
        assert (canvas(page) - V).abs().max() < 1e-3
        assert np.abs(np.array(page.evaluate('Array.from(playground.z)')) - z[0].numpy()).max() < 1e-3
        before = canvas(page)
        assert (page.text_content('#cut') != '') == (sentence == 'red ' * 100), 'what is left out is said'
    assert page.evaluate("document.getElementById('picture').toDataURL()") != pixels, 'and it is drawn'
    times = page.evaluate('playground.milliseconds')
    print(f'keystroke to canvas, small model: p50 {np.percentile(times, 50):.1f} ms, p95 {np.percentile(times, 95):.1f} ms')
    assert 0 < min(times) and max(times) < 10_000


def test_the_first_screen_shows_what_to_type_and_what_comes_of_it(chromium, base, exported):
    for width, height, examples in ((1280, 800, 4), (390, 844, 2)):
        page = chromium.new_page(viewport={'width': width, 'height': height})
        open_page(page, base)
        sentence = page.input_value('#text')
        assert sentence == TAUGHT[0] and page.text_content('#said').split() == sentence.split()
        for part in '#text', '#picture', '#said':
            box = page.locator(part).bounding_box()
            assert 0 <= box['y'] < height and box['height'] > 20, f'{part} is on the first screen of {width} x {height}'
        shown = page.locator('#examples button:visible')
        assert shown.count() == examples
        screenshot(page, f'first_{width}')
        before, words = canvas(page), shown.last.text_content()
        shown.last.click()
        settle(page)
        assert page.input_value('#text') == words in exported.model.tokenizer.decode(
            exported.model.tokens([words])[0]) and (canvas(page) - before).abs().max() > 1e-3
        page.close()


def test_what_it_says_is_what_pytorch_says(page, exported):
    for sentence in ('a red cube is on a blue ball', 'three black cones are behind a yellow disc'):
        write(page, sentence)
        V, _ = exported.model.read([sentence])
        said, other = (page.evaluate(f'playground.model.tokenizer.decode(playground.{name}.ids)')
                       for name in ('said', 'other'))
        assert said == exported.model.say(V)[0] and other == exported.model.say(V, PARA)[0]
        assert page.text_content('#other') == other
        assert page.text_content('#said').split() == said.split() == sentence.split()


def test_shuffling_blurring_and_resetting(page, exported):
    V, said = canvas(page), page.text_content('#said').split()
    slide(page, 'shuffle', 100)
    shuffled = canvas(page)
    assert (shuffled - V).abs().max() > 0.1
    assert torch.equal(shuffled.flatten(2).sort().values, V.flatten(2).sort().values), 'the same pixels'
    assert (shuffled == V).all(1).float().mean() < 0.05, 'elsewhere'
    assert page.text_content('#said').split() != said == TAUGHT[0].split(), 'and other words'
    assert 'cosine with the canvas as painted' in page.text_content('#cosine')
    page.click('#reset')
    settle(page)
    assert torch.equal(canvas(page), V) and page.is_disabled('#reset') and page.text_content('#said').split() == said
    slide(page, 'blur', 1.5)
    assert (canvas(page) - priors.gaussian_blur(V, 1.5)).abs().max() < 1e-4
    write(page, 'a cyan box is next to a brown ball')
    assert page.input_value('#blur') == '0', 'a new sentence is a new canvas'


def test_the_mouse_shifts_paints_and_cuts(page):
    V, one = canvas(page), torch.ones(1, dtype=torch.long)

    def drag(tool, row, column, rows=0, columns=0, steps=3, reset=True):
        if reset and page.is_enabled('#reset'):
            page.click('#reset')
        page.click(f'button[data-tool={tool}]')
        box = page.locator('#picture').bounding_box()
        cell = box['width'] / V.shape[-1]
        x, y = box['x'] + (column + 0.5) * cell, box['y'] + (row + 0.5) * cell
        page.mouse.move(x, y)
        page.mouse.down()
        if rows or columns:
            page.mouse.move(x + columns * cell, y + rows * cell, steps=steps)
        page.mouse.up()
        settle(page)
        return canvas(page)

    assert torch.equal(drag('move', 10, 10, 3, -4), priors.shift(V, 3 * one, -4 * one))
    cut = drag('cut', 12, 20)
    assert (cut - priors.cut_out(V, 9 * one, 17 * one, 6)).abs().max() < 1e-5
    page.click('#channels button >> nth=2')
    painted = drag('paint', 8, 8) - V
    assert (painted[0, 2] == 0).all() and (painted[0, [0, 1, 3, 4, 5]].amax((1, 2)) > 0.1).all()
    assert painted[..., 16:].abs().max() == 0 and painted.argmax() % 1024 == 8 * 32 + 8
    assert (drag('unpaint', 8, 8) - V + painted).abs().max() < 1e-5, 'the opposite'
    page.click('#channels button >> nth=2')
    stroke = drag('paint', 8, 4, 5, 20, steps=1) - V
    assert (stroke[0, 2, :, 4:25].amax(0) > 0.1).all(), 'a fast stroke has no gaps'
    page.click('#reset')
    page.evaluate("shuffle.value = 100; shuffle.dispatchEvent(new Event('input'))")
    settle(page)
    shuffled = canvas(page)
    changed = (drag('paint', 8, 8, reset=False) - shuffled)[0].abs().amax(0)
    assert changed[8, 8] > 0.1 and changed[16:].max() == 0 and changed[:, 16:].max() == 0, 'paint lands on what is seen'
    assert page.input_value('#shuffle') == '0'
    page.click('#reset')


def test_all_of_it_by_keyboard(page):
    V, one = canvas(page), torch.ones(1, dtype=torch.long)
    page.click('button[data-tool=move]')
    page.focus('#picture')
    page.keyboard.press('ArrowRight')
    page.keyboard.press('ArrowDown')
    settle(page)
    assert torch.equal(canvas(page), priors.shift(V, one, one))
    page.click('#reset')
    page.click('button[data-tool=cut]')
    page.focus('#picture')
    page.keyboard.press('ArrowUp')
    assert page.is_visible('#cursor')
    page.keyboard.press('Enter')
    settle(page)
    assert 6 * 6 - 2 <= (canvas(page) != V).any(1).sum() <= 6 * 6
    page.focus('#map')
    page.keyboard.press('ArrowLeft')
    chosen = page.text_content('#point')
    page.keyboard.press('Enter')
    settle(page)
    assert chosen == page.input_value('#text') in page.evaluate('playground.model.about.map.sentences')
    page.click('button[data-tool=move]')


def test_a_word_shows_where_it_looks(page):
    assert page.locator('#said button').count() == 8
    page.hover('#said button')
    assert page.is_visible('#veil')
    page.mouse.move(5, 5)
    assert not page.is_visible('#veil')
    weights = np.array(page.evaluate('playground.said.attention.map((row) => Array.from(row))'))
    assert weights.shape[1] == page.evaluate('playground.model.about.cells') ** 2
    assert weights.sum(1) == pytest.approx(1.0, abs=1e-4)


def test_the_walk_between_two_sentences(page, exported):
    write(page, 'a purple disc is in front of an orange cone', '#text2')
    V, z = exported.model.read(['a red cube is on a blue ball', 'a purple disc is in front of an orange cone'])
    for t in (0, 0.3, 1):
        slide(page, 't', t)
        assert (canvas(page, 'mix') - ((1 - t) * V[:1] + t * V[1:])).abs().max() < 1e-3
    assert page.text_content('#mix') == exported.model.say(V[1:])[0]
    assert f'{float(z[0] @ z[1]):.2f}' in page.text_content('#between')
    screenshot(page, 'walk')


def test_a_sentence_of_the_map_lands_on_its_point(page):
    sentences, xy = (page.evaluate(f'playground.model.about.map.{name}') for name in ('sentences', 'xy'))
    write(page, sentences[5])
    assert page.evaluate('playground.marker') == pytest.approx(xy[5], abs=0.02)
    for attribute in ('colour', 'shape', 'relation'):
        page.select_option('#by', attribute)
        assert page.locator('#legend span').count() > 2
    page.locator('#map').scroll_into_view_if_needed()
    box = page.locator('#map').bounding_box()
    page.mouse.move(box['x'] + 18 + xy[8][0] * (box['width'] - 36), box['y'] + 18 + xy[8][1] * (box['height'] - 36))
    assert page.text_content('#point').strip() in sentences


@pytest.mark.parametrize('width, scheme', [(390, 'light'), (390, 'dark'), (1280, 'dark')])
def test_phone_and_dark(chromium, base, width, scheme):
    context, problems = chromium.new_context(viewport={'width': width, 'height': 844}, color_scheme=scheme), []
    page = context.new_page()
    page.on('console', lambda message: problems.append(message.text) if message.type == 'error' else None)
    page.on('pageerror', lambda error: problems.append(str(error)))
    open_page(page, base)
    assert page.evaluate('document.documentElement.scrollWidth') == width, 'nothing sticks out'
    paper = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (int(re.search(r'\d+', paper)[0]) < 60) == (scheme == 'dark')
    assert page.evaluate("getComputedStyle(document.getElementById('picture')).touchAction") == 'pan-y', 'a swipe scrolls'
    assert not page.is_visible('#loading')
    screenshot(page, f'{width}_{scheme}')
    context.close()
    assert problems == []


def message(page, address):
    page.goto(address)
    page.wait_for_function("!document.getElementById('message').hidden", timeout=300_000)
    assert not page.is_visible('#page')
    return page.text_content('#message')


def test_what_is_missing_is_said(chromium, exported, tmp_path, monkeypatch):
    page = chromium.new_page()
    whole = {path.name: path.read_bytes() for path in exported.folder.iterdir()}
    with server(tmp_path) as address:
        assert 'python -m tools.export' in message(page, address)
        for name, content, words in (('model.json', b'{', 'is not JSON'), ('model.json', b'{}', 'lacks "channels"'),
                                     ('model.json', None, 'no model/map.bin'), ('map.bin', b'abcd', 'same export'),
                                     ('map.bin', None, 'no model/encoder.onnx'),
                                     ('encoder.onnx', b'no', 'not a file that this browser can run')):
            (tmp_path / name).write_bytes(whole[name] if content is None else content)
            assert words in message(page, address)
    shutil.copytree(HERE, tmp_path / 'page', ignore=shutil.ignore_patterns('node_modules', '__pycache__'))
    monkeypatch.setattr('playground.__main__.HERE', tmp_path / 'page')
    with server(exported.folder) as address:
        assert 'npm install --prefix playground' in message(page, address)
    page.close()


def test_the_server_serves_two_folders_and_no_more(base):
    host = base.removeprefix('http://')
    for path, status in (('/', 200), ('/model/model.json', 200), ('/model/', 404), ('/../sample.py', 404),
                         ('/model/../sample.py', 404), ('/model/%2e%2e/%2e%2e/sample.py', 404), ('/nothing.js', 404)):
        connection = http.client.HTTPConnection(host)
        connection.request('GET', path)
        assert connection.getresponse().status == status, path
        connection.close()


class Unsteady(torch.nn.Module):
    """A layer whose output can be made to differ from what was exported."""

    def __init__(self):
        super().__init__()
        self.layer, self.drift = torch.nn.Linear(3, 2), 0.0

    def forward(self, x):
        return self.layer(x) + self.drift, x


def test_an_export_that_differs_is_refused(capsys):
    module, examples = Unsteady(), [(torch.rand(n, 3),) for n in (1, 5, 2)]
    settings = (['x'], ['y', 'same']), ({0: torch.export.Dim('batch')},)
    content, difference = export.to_onnx(module, examples, *settings)
    assert content[:1] == b'\x08' and difference < 1e-6
    exporter = torch.onnx.export
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        def drifts(*args, **kwargs):
            program = exporter(*args, **kwargs)
            module.drift = 3e-4
            return program
        patch.setattr(torch.onnx, 'export', drifts)
        export.to_onnx(module, examples, *settings)
    assert stop.value.code == 1 and 'nothing is written' in capsys.readouterr().err


def test_half_the_size_and_the_same_numbers(exported):
    import onnx
    from onnx import numpy_helper
    contents = {name: (exported.folder / f'{name}.onnx').read_bytes() for name in ('encoder', 'reader', 'decoder')}
    whole = {name: content for name, (content, _) in export.graphs(exported.model, list(TAUGHT)).items()}
    for name, content in contents.items():
        weights, others = ({w.name.removesuffix('_half'): numpy_helper.to_array(w)
                            for w in onnx.load_from_string(c).graph.initializer} for c in (content, whole[name]))
        assert weights.keys() == others.keys()
        large = {key for key, value in others.items() if value.dtype == np.float32 and value.size >= 256}
        assert large and all(weights[key].dtype == np.float16 for key in large)
        assert all(np.array_equal(weights[key], value) for key, value in others.items()), 'to the bit'
        saved = len(whole[name]) - len(content)
        assert 0.9 < saved / sum(others[key].nbytes / 2 for key in large) <= 1
        assert str(ROOT).encode() not in content + whole[name], 'nothing of the machine that made it'
    content = export.compact(whole['encoder'], halved=True)
    assert abs(len(content) - len(contents['encoder'])) < 500
    third = onnx.load_from_string(whole['reader'])
    for weight in third.graph.initializer:                                  # as a checkpoint of float32 has them
        if weight.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(values * np.float32(1 / 3) + np.float32(1e-3), weight.name))
    third = third.SerializeToString()
    assert not any(w.data_type == onnx.TensorProto.FLOAT16
                   for w in onnx.load_from_string(export.compact(third, halved=True)).graph.initializer)


def test_which_model_is_served(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / 'repository/pretrained/onnx'
    monkeypatch.setattr('playground.__main__.HERE', tmp_path / 'repository/playground')
    assert find_model() == Path('out/onnx') and find_model('mine') == Path('mine'), 'none is there'
    shutil.copytree(exported.folder, shipped)
    assert find_model() == Path('repository/pretrained/onnx'), 'the one that comes with the repository'
    assert described(find_model()) == 'repository/pretrained/onnx (P5, from model.pt)'
    Path('out/onnx').mkdir(parents=True)
    assert find_model() == Path('repository/pretrained/onnx'), 'an export that was not finished'
    shutil.copy(shipped / 'model.json', 'out/onnx/model.json')
    assert find_model() == Path('out/onnx') and find_model('mine') == Path('mine')
    Path('out/onnx/model.json').write_text('{"phase": ')
    assert described(Path('out/onnx')) == 'out/onnx'
    words = [sys.executable, '-m', 'playground', '--port=0', f'--model={exported.folder}']
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        first, second = process.stdout.readline(), process.stdout.readline()
    finally:
        process.terminate()
        process.wait()
    assert first == f'model {exported.folder} (P5, from model.pt)\n' and second.startswith('http://127.0.0.1:')


@pytest.mark.parametrize('words, hint', [
    (['tools/export.py', '--init_from=nowhere.pt'], 'bash runs/cpu.sh'),
    (['tools/export.py', '--map_scenes=1'], 'at least 4'),
    (['playground/__main__.py', '--port=99999'], '0 to 65535')])
def test_bad_input_is_one_line(words, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        run(ROOT / words[0], *words[1:])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1 and hint in error

"""Tests of tools/page.py: the page of an untrained P6 on a corpus of sixty rows, and its parts by hand."""
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
import sample
from model import CONTROLS, build, sizes
from runtime import Config, defaults, scripts
from tools import page

WORDS = 'two red dogs', 'a man', 'no children', 'three women', 'a blue bird'
PLACES = 'in the snow', 'on a green hill', 'near the sea', 'at night'
ROWS = [(f'{who} {act} {where}', f'{where} {who} {act}') for who in WORDS for where in PLACES
        for act in ('run', 'sleep', 'do not play')]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A folder with a corpus, untrained checkpoints of P4 and P6 of it, and the page twice, as <folder>/a and b."""
    folder = tmp_path_factory.mktemp('page')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path('mine.jsonl').write_text(''.join(json.dumps(
            {'original': a, 'paraphrases': [b], 'counterfactuals': [f'{a} again']}) + '\n' for a, b in ROWS))
        config = Config({key: value for script in scripts('p6') for key, value in defaults(script).items()} | {
            'corpus': str(folder / 'mine.jsonl'), 'vocab_size': 512, 'max_length': 16, 'query_grid': 8, 'patch': 4,
            'dim': 32, 'layers': 1, 'heads': 2, 'hidden': 32, 'cross_layers': 1, 'cross_hidden': 32, 'z_dim': 16,
            'readout_hidden': 16, 'dec_dim': 32, 'dec_layers': 1, 'dec_heads': 2, 'dec_hidden': 32, 'unet_dim': 8,
            'sample_steps': 2, 'rec_dim': 32, 'rec_layers': 1})
        text = data.load(config)
        channel = torch.ones(1, 6, 1, 1)
        for phase, names in (('p4', ('encoder', 'readout', 'decoder', *CONTROLS)),
                             ('p6', ('encoder', 'readout', 'decoder', 'unet'))):
            nets = build(config, *names)
            for net in nets.values():
                if hasattr(net, 'allowed'):
                    net.allowed[text.tokenizer.size:] = False
            torch.save({'phase': phase, 'step': 7, 'arch': sizes(config), 'config': dict(config), 'commit': 'a' * 40,
                        'ema': {name: net.state_dict() for name, net in nets.items()},
                        'state': {'tokenizer': text.tokenizer.state(), 'mean': 0 * channel, 'std': channel}},
                       f'{phase}.pt')
        for name, value in {'init_from': 'p6.pt', 'p4': 'p4.pt', 'k': 2, 'draws': 5, 'paraphrased': 4, 'batch_size': 3,
                            'device': 'cpu', 'dtype': 'float32'}.items():
            patch.setattr(page, name, value)
        for out in ('a', 'b'):
            patch.setattr(page, 'out', out)
            page.main()
    return folder, text


def test_the_page_says_what_its_numbers_say(written):
    folder, text = written
    found = json.loads((folder / 'a/page.json').read_text())
    shown, about = (folder / 'a/page.md').read_text(), found['about']
    assert (about['phase'], about['step'], about['commit'], about['corpus']) == ('P6', 7, 'aaaaaaa', 'mine.jsonl')
    assert (about['held_out'], about['rows'], about['shared']) == (6, 54, 0) and about['sentences'] == 54 * 3
    assert str(folder) not in shown + json.dumps(found), 'the name of the corpus, no path'
    originals = [sentence for sentence, *_ in found['read_back']]
    assert len(originals) == 6 and {*originals} <= {a for a, _ in ROWS}
    model = sample.TextCanvas(folder / 'p6.pt', 'cpu', 'float32')
    assert [said for _, said, _ in found['read_back'][:3]] == model.say(model.read(originals[:3])[0])
    tables = found['tables']
    assert tables['reading']['all']['n'] == 6 and 'canvas shuffled' in tables['reading']
    assert list(tables['other words']) == ['nearest in z of 2', 'one sample', 'the input itself', 'another of its row',
                                           'another held-out sentence']
    copy, row = tables['other words']['the input itself'], tables['other words']['another of its row']
    assert copy['rouge_l'] == 1 and copy['not_the_input'] == 0 and copy['cosine'] == pytest.approx(1, abs=1e-5)
    assert row['n'] == 4 and 0 < row['rouge_l'] < 1 and tables['details kept']['another of its row']['numbers'] == 1
    best, one = (tables['other words'][kind]['cosine'] for kind in ('nearest in z of 2', 'one sample'))
    assert best >= one
    assert list(tables['drawing']) == ['draws', 'held-out sentences', 'trigram model', 'painted canvases read back',
                                       'decoder without a canvas, top_p 0.9']
    assert {row['n'] for row in tables['drawing'].values()} == {3} and len(found['draws']) == 5
    assert about['compared'] == 54 * 2 and {near for _, near, _ in found['nearest']} <= {s for r in ROWS for s in r}
    walk = found['walk']
    assert len(walk) == 9 and walk[0][2] == pytest.approx(1, abs=1e-5) and walk[-1][3] == pytest.approx(1, abs=1e-5)
    for part in ('0 of which stand', f"{tables['reading']['all']['rouge_l']:.3f}", originals[0], '(montage.png)',
                 '## Drawing', 'trigram model '):
        assert part in ' '.join(shown.split('\n')), part


def test_the_same_seed_writes_the_same_page(written):
    folder, _ = written
    for name in ('page.md', 'page.json'):
        assert (folder / 'a' / name).read_text() == (folder / 'b' / name).read_text()
    assert (folder / 'a/montage.png').read_bytes()[:4] == b'\x89PNG'


def test_sentences_and_words_come_back_out_of_the_arrays(written):
    _, text = written
    train, tokenizer = text.splits['train'], text.tokenizer
    held_out = page.lines(text.splits['test'].fixed(), tokenizer)
    assert held_out == [tokenizer.decode(row) for row in text.splits['test'].fixed().tolist()]
    rows = [row for row in ROWS if row[0] not in held_out]
    counts, shared = page.census(train, tokenizer, {rows[0][0], held_out[0]})
    assert shared == 1, 'a training sentence is found, a held-out one is not'
    assert counts == Counter(word for a, b in rows for text in (a, b, f'{a} again') for word in text.split())


def test_what_is_kept_and_what_chance_reads():
    pairs = [('two red dogs', 'two dogs', 0.5), ('a dog', 'a dog', 1.0), ('no cat', 'a cat', 0.0)]
    words, kept = page.comparison(pairs)
    assert words == {'n': 3, 'rouge_l': pytest.approx((0.8 + 1 + 0.5) / 3), 'cosine': 0.5,
                     'not_the_input': pytest.approx(2 / 3)}
    assert (kept['numbers'], kept['numbers_there'], kept['numbers_n']) == (1, 1, 1)
    assert kept['colours'] == kept['negation'] == pytest.approx(2 / 3)
    assert kept['colours_there'] == kept['negation_there'] == 0 and kept['colours_n'] == kept['negation_n'] == 1
    rows = page.reading_rows([('a b', 'a b', 'x'), ('c d', 'c d', 'c d')], {'a': 5, 'b': 50, 'c': 1000, 'd': 2000})
    assert rows['all']['exact'] == 1 and rows["another sentence's canvas"]['exact'] == 0
    assert rows['canvas shuffled']['exact'] == 0.5 and rows['rarest word seen 1-9 times']['n'] == 1


def test_whatever_is_said_stays_in_its_cell():
    assert page.table(['a', 'b'], [['x | <b>\n\0', 0.5]]) == '| a | b |\n| --- | --- |\n| x \\| \\<b\\> \ufffd | 0.50 |'


def test_a_folder_that_cannot_be_made_is_one_line(written, monkeypatch, capsys):
    folder, _ = written
    monkeypatch.chdir(folder)
    for name, value in {'init_from': 'p6.pt', 'device': 'cpu', 'out': 'mine.jsonl/page'}.items():
        monkeypatch.setattr(page, name, value)
    with pytest.raises(SystemExit):
        page.main()
    assert capsys.readouterr().err.strip().splitlines()[-1] == 'error: --out=mine.jsonl/page: Not a directory'

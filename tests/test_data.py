"""Tests of data.py: the prepared corpus and its splits, the tokenizer, batches, own corpora, the command line."""
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import english
import metrics
import runtime
from data import BOS, EOS, PAD, PARA, SPECIALS, Tokenizer, token_types
from grammar import (
    CANONICAL, COLOURS, EVAL_SENTENCES, FAMILIES, HELD_OUT_PAIRS, INVERSE, NOUNS, SHAPES, SYMMETRIC, TYPES, VARIANTS,
    allowed_counterfactual, canonical, graph_f1, meaning, normalize, parse, render, sample_scene, split_of)

ROOT = Path(__file__).parent.parent
SWAP = VARIANTS.index('argument swap')
SWAPS = torch.tensor([SWAP, VARIANTS.index('attribute swap')])


# ---- a small corpus -------------------------------------------------------------------------------------------------

CONFIG = {'corpus': '', 'num_scenes': 200, 'complexity': 1, 'simple_share': 0.5, 'data_seed': 0, 'vocab_size': 1024,
          'max_length': 64}


def arrays_of(folder, split):
    """What the files of a split hold, sentence by sentence: tokens (S, F, R, T) and lengths (S, F, R), 0 where none."""
    a = {name: np.fromfile(folder / f'{split}.{name}', kind) for name, kind in data.ARRAYS.items()}
    first, count, meanings = (a[name].reshape(-1, len(VARIANTS)) for name in ('first', 'count', 'meanings'))
    lengths = np.zeros((*count.shape, count.max()), np.int64)
    tokens = np.full((*lengths.shape, -(-int(np.diff(a['starts']).max()) // 8) * 8), PAD)
    for index in np.ndindex(count.shape):
        for r in range(count[index]):
            ids = a['tokens'][slice(*a['starts'][first[index] + r:][:2])]
            lengths[index][r], tokens[index][r, :len(ids)] = len(ids), ids
    assert lengths.sum() == len(a['tokens']) == a['starts'][-1], 'no token twice'
    assert count.sum() == len(a['starts']) - 1
    return {'tokens': tokens, 'lengths': lengths, 'count': count, 'meanings': meanings, 'things': a['things']}


class Prepared:
    """data.prepare() and data.load() in an empty folder, and what the stored rows say."""

    def __init__(self, complexity, patch):
        self.said, config = [], CONFIG | {'complexity': complexity, 'max_length': 64 if complexity < 3 else 80}
        patch.setattr(data, 'HELD_OUT_SIZE', 60)
        self.folder = data._folder(config)
        data.prepare(self.folder, config, self.said.append)
        self.text = data.load(config)
        self.corpora, self.tokenizer = self.text.splits, self.text.tokenizer
        self.arrays = {split: arrays_of(self.folder, split) for split in data.SPLITS}
        self.folder = self.folder.absolute()
        self.lines = {split: {index: self.tokenizer.decode(a['tokens'][index].tolist())
                              for index in zip(*np.nonzero(a['lengths']))} for split, a in self.arrays.items()}
        self.meanings = {split: {index: parse(line) and meaning(parse(line)) for index, line in lines.items()}
                         for split, lines in self.lines.items()}


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('data'))
        return {complexity: Prepared(complexity, patch) for complexity in (1, 3)}


@pytest.fixture(params=[1, 3], ids=['complexity 1', 'complexity 3'])
def prepared(request, both):
    return both[request.param]


@pytest.fixture(scope='module')
def tokenizer():
    rand = random.Random(5).random
    return Tokenizer.train((render(sample_scene(rand, 1 + n % 2), rand) for n in range(3000)), 1024)


def test_every_stored_row_is_the_sentence_of_its_meaning(prepared):
    for split, a in prepared.arrays.items():
        tokens, lengths, count = a['tokens'], a['lengths'], a['count']
        S = CONFIG['num_scenes'] if split == 'train' else 60
        assert tokens.shape[:3] == lengths.shape == (S, len(VARIANTS), 6) and tokens.shape[3] % 8 == 0
        assert tokens.shape[3] - 8 < lengths.max() <= tokens.shape[3]
        assert set(np.unique(count)) == {0, 6} and (count[:, 0] == 6).all()
        for family in range(1, len(VARIANTS)):
            assert 0 < (count[:, family] > 0).sum() <= S, 'a family that never applies tests nothing'
        assert ((lengths > 0) == (np.arange(6) < count[:, :, None])).all()
        assert (lengths == (tokens != PAD).sum(-1)).all() and tokens.max() < prepared.tokenizer.size
        column = np.arange(tokens.shape[3])
        assert ((tokens == EOS) == (column == lengths[..., None].astype(int) - 1)).all()      # EOS, at the end only
        for (s, f, r), found in prepared.meanings[split].items():
            assert found == a['meanings'][s, f], prepared.lines[split][s, f, r]
        different = {s: len({prepared.lines[split][s, 0, r] for r in range(2, 6)}) for s in range(S)}
        assert np.mean(list(different.values())) > 3, 'paraphrases are worded differently'


def test_counterfactuals_in_the_arrays_differ_from_their_scene(prepared):
    for a in prepared.arrays.values():
        for f in range(1, len(VARIANTS)):
            there = a['count'][:, f] > 0
            assert (a['meanings'][there, f] != a['meanings'][there, 0]).all()
            assert (a['meanings'][~there, f] == 0).all()
        assert len(set(a['meanings'][:, 0].tolist())) == len(a['meanings']), 'every scene is there once'


def test_splits_share_no_scene(prepared):
    found = {split: set(meanings.values()) for split, meanings in prepared.meanings.items()}
    for split in ('val', 'test', 'composition', 'template'):
        assert len(found[split]) > 60 and not found['train'] & found[split]
        assert any(line.startswith(split) and line.endswith('shared with train: 0') for line in prepared.said)
    tested = {meaning for (_, f, _), meaning in prepared.meanings['test'].items() if f == 0}
    assert len(tested) > 10 and not tested & found['val'], (
        'no choice was made on a scene of test, nor on a change of one')
    pack = {meaning(parse(sentence)) for sentence in EVAL_SENTENCES}
    assert len(EVAL_SENTENCES) == 16 and not pack & found['train']
    assert len(pack) == 15, '"a red cube is under a blue ball" is there to look like "a blue ball is on a red cube"'


def test_simpler_scenes_are_mixed_into_training_only(both):
    for split in data.SPLITS:
        lines = both[3].lines[split]
        things = [len(parse(lines[s, 0, 0]).things) for s in range(CONFIG['num_scenes'] if split == 'train' else 60)]
        assert Counter(things) == ({2: 50, 3: 50, 4: 100} if split == 'train' else {4: 60})
        assert split != 'train' or 20 < sum(n < 4 for n in things[:100]) < 80, 'the tokenizer reads the first lines'
        corpus = both[3].corpora[split]
        fewest = [n == min(things) for n in things]
        if all(fewest):
            assert corpus.fewest is corpus.others is None
            continue
        assert corpus.fewest.tolist() == [s for s, few in enumerate(fewest) if few]
        assert corpus.others.tolist() == [s for s, few in enumerate(fewest) if not few]
        drawn = corpus.draw(300, 0, 0, corpus.fewest)[0].tolist()
        assert set(drawn) <= set(corpus.fewest.tolist()) and len(set(drawn)) > 40
    corpus = both[1].corpora['train']
    assert torch.equal(corpus.draw(9, 3, 4)[0], corpus.draw(9, 3, 4, torch.arange(corpus.size))[0]), 'of all'
    assert corpus.fewest is None, 'all scenes are alike here'


@pytest.mark.parametrize('complexity', [1, 2])
def test_splits_share_no_scene_among_many(complexity):
    """Enough scenes for a hundred collisions if the two sides were drawn alike; no text."""
    found = {}
    for split, n in (('train', 4000), ('val', 800), ('composition', 300)):
        rand = random.Random(split).random
        scenes = data.scenes_of(split, n, complexity, seed=3)
        assert len({meaning(scene) for scene in scenes}) == n
        novel = [any((t.colour, t.shape) in HELD_OUT_PAIRS for t in scene.things) for scene in scenes]
        assert all(novel) if split == 'composition' else not any(novel)
        home = 'train' if split == 'train' else 'held-out'
        changed = (allowed_counterfactual(scene, family, rand, home) for scene in scenes for family in FAMILIES)
        found[split] = {meaning(scene) for scene in (*scenes, *filter(None, changed))}
        assert len(found[split]) > 3 * n
    assert not found['train'] & (found['val'] | found['composition'])


def canonical_direction(scene):
    """A parsed scene as sample_scene() draws them: split_of() looks at the names of the relations."""
    relations = tuple((r, i, j) if r in CANONICAL else (INVERSE[r], j, i) for r, i, j in scene.relations)
    return scene._replace(relations=relations)


def test_new_compositions_are_new(prepared):
    assert len(HELD_OUT_PAIRS) == len(SHAPES) == len({shape for _, shape in HELD_OUT_PAIRS})
    words = {(colour, noun) for c, s in HELD_OUT_PAIRS for colour in COLOURS[c]
             for n in (1, 2) for noun in NOUNS[n, s]}

    def novel(line):
        return any(pair in words for pair in itertools.pairwise(line.split()))
    for split in ('train', 'val', 'test', 'composition'):
        by_scene = {}
        for (s, f, _), line in prepared.lines[split].items():
            if f == 0:
                by_scene.setdefault(s, set()).add(novel(line))
            assert split != 'train' or not novel(line), line
        assert all(answers == {split == 'composition'} for answers in by_scene.values())


def test_new_templates_are_new(prepared):
    new = re.compile(r'^the picture shows|^it is|^what is|we can see|(?<=[a-z] )(?<!and )(?<!while )there (is|are) ')
    for (_, _, r), line in prepared.lines['template'].items():
        assert r < 2 or new.search(line), line                      # the first two are canonical
    for split in ('train', 'val', 'composition'):
        assert not [line for line in prepared.lines[split].values() if new.search(line) or line.startswith('someone')]
    a, b = prepared.arrays['template'], prepared.arrays['val']
    assert (a['meanings'][:, 0] == b['meanings'][:, 0]).all(), 'the scenes of val, so that only the template is new'


def test_canonical_rows_have_one_direction(prepared):
    for lines in prepared.lines.values():
        for (_, _, r), line in lines.items():
            if r < 2:
                assert {name for name, _, _ in parse(line).relations} <= set(CANONICAL), line
        directions = [name in CANONICAL for (_, _, r), line in lines.items() if r >= 2
                      for name, _, _ in parse(line).relations if name not in SYMMETRIC]
        assert 0.4 < np.mean(directions) < 0.6, 'free renderings have both'


def test_evaluation_pack(prepared):
    rows = [json.loads(line) for line in (prepared.folder / 'eval_pack.jsonl').read_text().splitlines()]
    assert len(rows) == 60 and {family for row in rows for family in row['counterfactuals']} == set(FAMILIES)
    for row in rows:
        scene = parse(row['original'])
        assert len(row['paraphrases']) == 5 and all(graph_f1(scene, parse(p)) == 1 for p in row['paraphrases'])
        for group in row['counterfactuals'].values():
            assert len({meaning(parse(text)) for text in group}) == 1 and graph_f1(scene, parse(group[0])) < 1


def test_the_corpus_is_a_function_of_its_seed():
    def make(seed, complexity=1):
        scenes = data.scenes_of('train', 40, complexity, seed)
        return scenes, [*data.render_split('train', scenes, seed)]
    (scenes, rows), (again, same), (other, different) = make(0), make(0), make(1)
    assert scenes == again and rows == same
    assert set(scenes) != set(other) and rows != different
    assert len(rows) == 40 and {len(group) for groups, *_ in rows for group in groups} == {0, 6}
    assert all(len(groups) == len(meanings) == 7 for groups, meanings, _ in rows)
    assert scenes == data.scenes_of('train', 60, 1, 0)[:40], 'a larger corpus begins with the smaller one'


# ---- tokenizer ------------------------------------------------------------------------------------------------------

def unicode_texts():
    rand = random.Random(7)
    ranges = [(0, 127), (0, 0x2FF), (0x370, 0x5FF), (0x900, 0xDFF), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (0, 0xD7FF)]
    for n in range(300):
        low, high = ranges[n % len(ranges)]
        yield ''.join(chr(rand.randint(low, high)) for _ in range(rand.randint(0, 25)))
    yield from ('ein großer Würfel', 'красный куб', 'कमल', '赤い立方体', 'x² + ½ = Ⅷ', 'İstanbul', '🟥 on 🔵',
                '\ud800', 'a\0b\r\nc\x85d', 'A Red Cube is on a Blue Ball.', '  a  red\tcube is\non a blue ball ',
                'An orange disc is under AN azure ball', '"a red_cube"; (on) a: blue-ball?', 'banana an', ' .,! ', '')


def test_nets_that_learnt_other_token_ids_are_refused(tokenizer, capsys):
    runtime.check_tokenizer(tokenizer.state(), {'state': {'tokenizer': tokenizer.state()}})
    with pytest.raises(SystemExit) as stop:
        runtime.check_tokenizer(tokenizer.state(), {'state': {'tokenizer': tokenizer.state()[:-1]}})
    assert stop.value.code == 2 and 'other token ids' in capsys.readouterr().err


def test_tokenizer_round_trip(tokenizer):
    rand = random.Random(6).random
    for _ in range(300):
        text = render(sample_scene(rand, 2), rand)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids[-1] == EOS and min(ids[:-1]) >= SPECIALS
        assert len(ids) - 1 <= len(text.split()) + 6, 'words of the corpus are tokens'
    for text in unicode_texts():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == normalize(text), ascii(text)
        assert max(ids) < tokenizer.size and ids.count(EOS) == 1
        assert ids == tokenizer.encode(normalize(text)), 'however it is typed'


def test_tokenizer_has_all_bytes_and_no_token_across_words(tokenizer):
    assert {bytes([n]) for n in range(256)} <= set(tokenizer.ranks)
    assert len(set(tokenizer.ranks)) == len(tokenizer.ranks) == tokenizer.size - SPECIALS
    assert not [token for token in tokenizer.ranks if b' ' in token[1:] or b'\n' in token[1:]]


def test_tokenizer_size():
    rand = random.Random(8).random
    lines = [canonical(sample_scene(rand, 1), rand) for _ in range(200)]
    assert Tokenizer.train(lines, 300).size == 300
    assert 300 < Tokenizer.train(lines, 16384).size < 1024, 'it stops when no pair repeats'
    assert Tokenizer.train(lines, 10).size == 256 + SPECIALS, 'single bytes are always there'
    assert (PAD, BOS, EOS, PARA, SPECIALS) == (0, 1, 2, 3, 4), 'checkpoints have learnt these'


def test_tokenizer_decode_ends_at_eos_and_survives_any_ids(tokenizer):
    ids = tokenizer.encode('a red cube')
    assert tokenizer.decode([BOS, *ids, *ids]) == tokenizer.decode([PARA, *ids, PAD, PAD]) == 'a red cube'
    assert tokenizer.decode([ids[0], PAD, *ids]) == 'a' and tokenizer.decode([]) == tokenizer.decode([EOS]) == ''
    assert tokenizer.decode([SPECIALS + tokenizer.ranks.index(b'\xff')]) == '\ufffd'
    rand = random.Random(9)
    for _ in range(50):
        tokenizer.decode([rand.randrange(tokenizer.size) for _ in range(20)])


def test_encode_lines_is_encode_line_by_line(tokenizer):
    rand = random.Random(10).random
    some = [render(sample_scene(rand, 1), rand) for _ in range(40)] + ['', 'x', 'naïve Ω'.lower(), '2 3']
    lines = (some * 240)[:10_003]                                       # more than one chunk
    flat, lengths = tokenizer.encode_lines(lines)
    assert flat.dtype == np.uint16 and len(lengths) == len(lines) and lengths.sum() == len(flat)
    each = [tokenizer.encode(line) for line in some]
    ends = np.cumsum(lengths)
    for k in (*range(60), *range(9_990, 10_003)):
        assert flat[ends[k] - lengths[k]:ends[k]].tolist() == each[k % len(some)]


def test_tokenizer_state_and_pad(tokenizer):
    again = Tokenizer.load(json.loads(json.dumps(tokenizer.state())))
    text = 'a crimson cube supports ünknown things'
    assert again.ranks == tokenizer.ranks and again.size == tokenizer.size
    assert again.encode(text) == tokenizer.encode(text)
    x = tokenizer.pad(['a red cube is on a blue ball', 'cube'], 6)
    assert x.shape == (2, 6) and x.dtype == torch.int64
    assert x[0].tolist() == tokenizer.encode('a red cube is on a')[:6]
    assert x[1].tolist() == tokenizer.encode('cube') + [PAD] * 4


def test_token_types(tokenizer):
    types, concepts = token_types(tokenizer, 1200)
    assert types.shape == concepts.shape == (1200,) and types.dtype == concepts.dtype == torch.int64

    def token(word):
        number, end = tokenizer.encode(word)
        return number

    def kind(word):
        return TYPES[types[token(word)]]
    for name, table in (('colour', COLOURS), ('shape', SHAPES)):
        for words in table.values():
            assert {kind(word) for word in words} == {name}
            assert len({int(concepts[token(word)]) for word in words}) == 1
        assert len({int(concepts[token(words[0])]) for words in table.values()}) == len(table)
    assert concepts[token('crimson')] == concepts[token('red')] != concepts[token('blue')]
    assert concepts[token('cube')] == concepts[token('cubes')] == concepts[token('dice')] != concepts[token('ball')]
    assert {kind(word) for word in ('the', 'is', 'are', 'and', 'there', 'that', 'of', 'to')} == {'function'}
    assert {kind(word) for word in ('a', 'one', 'two', '2', 'three', '3')} == {'count'}
    assert concepts[token('two')] == concepts[token('2')] == concepts[token('pair')] != concepts[token('three')]
    assert {kind(word) for word in ('on', 'under', 'beneath', 'left', 'supports', 'contained')} == {'relation'}
    assert concepts[token('under')] == concepts[token('beneath')] == concepts[token('supports')]
    assert concepts[token('under')] != concepts[token('on')] and concepts[token('left')] != concepts[token('right')]
    function = types == TYPES.index('function')
    assert function[:SPECIALS].all() and function[tokenizer.size:].all()
    assert (concepts[function] == torch.arange(1200)[function]).all(), 'a function token is its own concept'
    assert all(function[SPECIALS + rank] for rank, token in enumerate(tokenizer.ranks) if token[:1] != b' ')


# ---- batches --------------------------------------------------------------------------------------------------------

def test_draw_is_a_function_of_seed_and_step(prepared):
    corpus = prepared.corpora['train']
    drawn = {}
    for seed, step in itertools.product(range(3), range(3)):
        scenes, generator = corpus.draw(64, seed, step)
        torch.manual_seed(seed * step)                                     # the global generator has no part in it
        again, same = corpus.draw(64, seed, step)
        assert torch.equal(scenes, again)
        assert torch.equal(torch.rand(5, generator=generator), torch.rand(5, generator=same))
        assert 0 <= scenes.min() and scenes.max() < corpus.size and scenes.dtype == torch.int64
        drawn[seed, step] = tuple(scenes.tolist())
    assert len(set(drawn.values())) == 9
    scenes, _ = corpus.draw(20 * corpus.size, 0, 0)
    assert len(scenes.unique()) == corpus.size


@pytest.mark.parametrize('form, allowed', [('any', range(6)), ('free', range(2, 6)), ('canonical', range(2))])
def test_renderings(prepared, form, allowed):
    corpus = prepared.corpora['train']
    scenes, generator = corpus.draw(500, 0, 1)
    variants = torch.randint(len(VARIANTS), (500,), generator=generator)
    variants = variants.where(corpus.count[scenes, variants] > 0, torch.zeros_like(variants))
    state = generator.get_state()
    r1, r2 = corpus.renderings(scenes, variants, generator, form)
    again = corpus.renderings(scenes, variants, torch.Generator().set_state(state), form)
    assert torch.equal(r1, again[0]) and torch.equal(r2, again[1])
    assert (r1 != r2).all() and set(r1.tolist()) == set(r2.tolist()) == set(allowed)
    share = torch.stack((r1, r2)).flatten().bincount(minlength=6)[list(allowed)] / 1000
    assert (share - 1 / len(allowed)).abs().max() < 0.06, 'each as often as the others'
    first, second, third = corpus.renderings(scenes, variants, generator, form, k=3)
    assert (first != second).all() and (first != third).all() and set(third.tolist()) == set(allowed)
    assert len(allowed) == 2 or 0.1 < (second != third).float().mean() < 0.9
    shape = corpus.renderings(scenes.view(100, 5), variants.view(100, 5), generator, form)[0].shape
    assert shape == (100, 5)


def test_random_numbers_are_a_function_of_seed_step_and_purpose(prepared):
    def noise(seed, step, purpose):
        return torch.randn(64, 2, 6, 8, 8, generator=runtime.generator(seed, step, purpose))

    first = noise(0, 5, 'noise')
    torch.manual_seed(1)                                                   # the global generator has no part in it
    assert torch.equal(first, noise(0, 5, 'noise'))
    assert abs(first.mean()) < 0.02 and abs(first.std() - 1) < 0.02
    others = [noise(0, 6, 'noise'), noise(1, 5, 'noise'),
              *(noise(0, 5, purpose) for purpose in runtime.PURPOSES if purpose != 'noise')]
    assert len(others) == 7 and all(abs((first * other).mean()) < 0.02 for other in others)
    with pytest.raises(ValueError):
        runtime.generator(0, 5, 'something else')
    corpus = prepared.corpora['train']
    scenes = corpus.draw(64, 0, 5)[0]
    assert torch.equal(scenes, corpus.draw(64, 0, 5, purpose='scenes')[0])
    assert not torch.equal(scenes, corpus.draw(64, 0, 5, purpose='buffer')[0])
    sentences = corpus.sentences(64, 0, 5)
    assert torch.equal(sentences, corpus.sentences(64, 0, 5, purpose='scenes'))
    other = corpus.sentences(64, 0, 5, purpose='buffer')
    assert other.shape != sentences.shape or not torch.equal(other, sentences)


def test_sentences_of_a_step_and_their_paraphrases(prepared):
    corpus = prepared.corpora['train']
    x = corpus.sentences(200, 0, 3, paraphrases=2)
    assert x.shape[:2] == (200, 3) and (x[:, :, 0] != PAD).all()
    said = [[prepared.tokenizer.decode(ids) for ids in row] for row in x.tolist()]
    meant = [{meaning(parse(sentence)) for sentence in row} for row in said]
    assert all(len(group) == 1 for group in meant), 'a sentence and its paraphrases mean the same'
    assert sum(row[0] != row[1] for row in said) > 190 and sum(row[0] != row[2] for row in said) > 190
    scenes = set(corpus.meanings[:, 0].tolist())
    assert 0.1 < sum(not group <= scenes for group in meant) / 200 < 0.95, 'counterfactuals have their turn too'


@pytest.mark.parametrize('hardest', [True, False])
@pytest.mark.parametrize('without', ['', 'argument swap', 'colour'])
def test_negatives(prepared, hardest, without):
    corpus = prepared.corpora['train']
    scenes, _ = corpus.draw(300, 1, 0)
    usable = corpus.count[scenes, 1:] > 0
    if without:
        usable[:, FAMILIES.index(without)] = False
    for k in (1, 3, 6):
        variants, valid = corpus.negatives(scenes, k, torch.Generator().manual_seed(k), hardest, without)
        again = corpus.negatives(scenes, k, torch.Generator().manual_seed(k), hardest, without)
        assert torch.equal(variants, again[0]) and torch.equal(valid, again[1])
        assert variants.shape == valid.shape == (300, k) and variants.min() >= 1 and variants.max() <= len(FAMILIES)
        assert all(len(set(row)) == k for row in variants.tolist())
        assert usable.gather(1, variants - 1)[valid].all(), 'no family that does not apply'
        assert (valid.sum(1) == usable.sum(1).clamp(max=k)).all(), 'and as many as do apply'
        has_swap = usable[:, SWAP - 1]
        first = (variants[:, 0] == SWAP) & valid[:, 0]
        if hardest or without == 'argument swap':
            assert torch.equal(first, has_swap)
        else:
            assert 0 < first.sum() < has_swap.sum()
    variants, _ = corpus.negatives(scenes, 2, torch.Generator(), hardest, without)
    assert len(variants.unique()) >= 4, 'the others take turns'


STAGED = {'form': 'canonical', 'free_view': True, 'all_swaps': True}


def contrasting(n, negatives, leave_out='', seed=0):
    """The settings of a contrastive step of n scenes."""
    return runtime.Config(batch_size=n, negatives=negatives, leave_out=leave_out, seed=seed)


def test_contrast_rows(prepared):
    corpus = prepared.corpora['train']
    for options, views in ((STAGED, 3), ({}, 2)):
        scenes, variants, renderings, valid = corpus.contrast_rows(contrasting(16, 2, 'count'), 5, **options)
        assert scenes.shape == variants.shape == valid.shape == (16, 3) and renderings.shape == (16, 3, views)
        assert (scenes == scenes[:, :1]).all()
        assert valid[:, 0].all() and (variants[:, 0] == 0).all() and (variants[~valid] == 0).all()
        assert not (variants == VARIANTS.index('count')).any(), 'left out'
        assert (corpus.count[scenes, variants] > 0).all()
        canonical = renderings < corpus.canonical
        assert canonical[:, :, :2].all() and not canonical[:, :, 2].any() if options else not canonical.all()
        assert (renderings[:, :, 0] != renderings[:, :, 1]).all()
        swaps = ((variants == SWAP) & valid).any(1)
        have_one = corpus.count[scenes[:, 0], SWAP] > 0
        assert torch.equal(swaps, have_one) if options else swaps.sum() < have_one.sum()
    again = corpus.contrast_rows(contrasting(16, 2, 'count'), 5)
    assert torch.equal(again[2], renderings) and not torch.equal(
        corpus.contrast_rows(contrasting(16, 2, 'count'), 6)[0], scenes)
    for one, other in zip(corpus.contrast_rows(contrasting(16, 2, 'count'), 5, 'any', False, False), again):
        assert torch.equal(one, other), 'the last stage is the default'
    scenes, variants, renderings, valid = corpus.contrast_rows(contrasting(16, 0), 5)
    assert scenes.shape == variants.shape == valid.shape == (16, 1) and not variants.any() and valid.all()
    among = torch.tensor([3, 5, 8])
    assert set(corpus.contrast_rows(contrasting(32, 2), 5, among=among)[0].flatten().tolist()) == {3, 5, 8}


def test_pairs_fill_three_quarters_of_the_batch(prepared):
    corpus = prepared.corpora['train']
    pairs = torch.tensor([[1, 2], [3, 4], [10, 11], [20, 21], [30, 31], [40, 41], [50, 51]])
    scenes = corpus.contrast_rows(contrasting(16, 2), 5, pairs=pairs)[0][:, 0]
    partner = dict(pairs.tolist())
    assert [partner[s] for s in scenes[:6].tolist()] == scenes[6:12].tolist() and len(set(scenes[:6].tolist())) == 6
    assert torch.equal(scenes[12:], corpus.contrast_rows(contrasting(16, 2), 5)[0][12:, 0]), 'the rest is as without'
    few = corpus.contrast_rows(contrasting(16, 2), 5, pairs=pairs[:2])[0][:, 0].tolist()
    assert set(few[:2]) == {1, 3} and [partner[s] for s in few[:2]] == few[2:4], 'all pairs that there are'
    assert few[4:] == corpus.contrast_rows(contrasting(16, 2), 5)[0][4:, 0].tolist()


SETTINGS = runtime.Config(batch_size=12, seed=3, negatives=2, leave_out='count')


def rank_of(rank=0, world=1):
    return SimpleNamespace(rank=rank, world=world, device=torch.device('cpu'))


def padded(parts):
    """Token ids (n, K, views, T) of several parts as one tensor: each is cut after its own longest sentence."""
    width = max(x.shape[-1] for x in parts)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=PAD) for x in parts])


@pytest.mark.parametrize('options', [STAGED, {}], ids=['staged', 'default'])
def test_a_batch_holds_what_its_rows_say(prepared, options):
    corpus = prepared.corpora['train']
    batch = corpus.contrast_batch(SETTINGS, rank_of(), 5, **options)
    scenes, variants, views, valid = corpus.contrast_rows(contrasting(12, 2, 'count', seed=3), 5, **options)
    assert batch.x.shape[:3] == views.shape == (12, 3, 3 if options else 2) and batch.x.dtype == torch.int64
    assert torch.equal(batch.x, corpus.take(scenes[:, :, None], variants[:, :, None], views))
    assert torch.equal(batch.meanings, corpus.meanings[scenes, variants])
    assert torch.equal(batch.swaps, torch.isin(variants, SWAPS)) and torch.equal(batch.valid, valid)
    assert batch.swaps.any() and not batch.swaps.all() and not batch.swaps[~valid].any()
    assert batch.index.tolist() == list(range(12)) and batch.rows == slice(0, 12) and batch.draws == {}
    for n, row in enumerate(batch.x.tolist()):
        for k, sentences in enumerate(row):
            for ids in sentences:
                assert meaning(parse(prepared.tokenizer.decode(ids))) == batch.meanings[n, k]
    pairs = torch.tensor([[1, 2], [3, 4], [10, 11], [20, 21], [30, 31]])
    other = corpus.contrast_batch(SETTINGS, rank_of(), 5, pairs=pairs)
    assert other.meanings[0, 0] in corpus.meanings[pairs, 0] and not torch.equal(other.meanings, batch.meanings)


@pytest.mark.parametrize('options', [STAGED, {}], ids=['staged', 'default'])
def test_the_batches_of_two_ranks_make_the_batch_of_one(prepared, options):
    corpus = prepared.corpora['train']
    noise, u = torch.randn(12, 3, 4), torch.rand(12, 2)

    def batch_of(run):
        return corpus.contrast_batch(SETTINGS, run, 5, **options).with_draws(noise=noise).with_draws(u=u)

    whole, ranks = batch_of(rank_of()), [batch_of(rank_of(rank, 2)) for rank in range(2)]
    assert [len(rank.x) for rank in ranks] == [6, 6] and [rank.rows for rank in ranks] == [slice(0, 6), slice(6, 12)]
    assert torch.equal(padded([rank.x for rank in ranks]), padded([whole.x]))
    assert torch.equal(torch.cat([rank.index for rank in ranks]), whole.index)
    for name, numbers in (('noise', noise), ('u', u)):
        assert torch.equal(whole.draws[name], numbers)
        assert torch.equal(torch.cat([rank.draws[name] for rank in ranks]), numbers), 'earlier draws stay'
    for rank in ranks:
        for name in ('meanings', 'valid', 'swaps'):
            assert torch.equal(getattr(rank, name), getattr(whole, name)), 'of all scenes, on every rank'
    with pytest.raises(ValueError):
        batch_of(rank_of(0, 5))


@pytest.mark.parametrize('world', [1, 2])
@pytest.mark.parametrize('count', [1, 2, 3])
def test_the_parts_of_a_batch_make_the_batch(prepared, world, count):
    corpus = prepared.corpora['train']
    plain = corpus.contrast_batch(SETTINGS, rank_of(world - 1, world), 5)
    batch = plain.with_draws(noise=torch.randn(12, 3, 4), u=torch.rand(12, 2))
    assert plain.draws == {}, 'a batch does not change'
    parts = batch.parts(count)
    assert [len(part.x) for part in parts] == [12 // world // count] * count
    assert torch.equal(torch.cat([part.x for part in parts]), batch.x), 'of one width'
    assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
    assert all(part.draws.keys() == {'noise', 'u'} for part in parts)
    for name in ('noise', 'u'):
        assert torch.equal(torch.cat([part.draws[name] for part in parts]), batch.draws[name])
    for part in parts:
        assert part.rows == batch.rows
        for name in ('meanings', 'valid', 'swaps'):
            assert torch.equal(getattr(part, name), getattr(batch, name)), 'of all scenes'


@pytest.mark.parametrize('rounding', [2, 8])
def test_take_cuts_at_eights_and_loses_nothing(prepared, monkeypatch, rounding):
    corpus = prepared.corpora['train']
    assert corpus.rounding == 2, 'on a CPU'
    monkeypatch.setattr(corpus, 'rounding', rounding)
    tokens, lengths = (torch.from_numpy(prepared.arrays['train'][name]) for name in ('tokens', 'lengths'))
    seen = set()
    for scenes in (lengths[:, 0].amax(1).argsort()[:4], torch.arange(corpus.size)):
        zero = torch.zeros_like(scenes)
        for r in range(6):
            x = corpus.take(scenes, zero, zero + r)
            longest = int(lengths[scenes, 0, r].max())
            assert x.dtype == torch.int64 and x.shape == (len(scenes), -(-longest // rounding) * rounding)
            assert ((x == EOS).sum(1) == 1).all()
            whole = tokens[scenes, 0, r]
            assert (whole[:, :x.shape[1]] == x).all() and (whole[:, x.shape[1]:] == PAD).all()
            seen.add(x.shape[1])
    assert len(seen) > 1 and max(seen) <= corpus.width
    index = torch.zeros(2, 3, 4, dtype=torch.long)
    assert corpus.take(index, index, index).shape[:3] == (2, 3, 4)


def test_fixed_sentences(prepared):
    corpus = prepared.corpora['val']
    x = corpus.fixed()
    assert torch.equal(x, corpus.fixed()) and [len(corpus.fixed(n)) for n in (None, 7, 10_000)] == [60, 7, 60]
    for s in (0, 30, 59):
        assert prepared.tokenizer.decode(x[s].tolist()) == prepared.lines['val'][s, 0, 5]
        assert prepared.tokenizer.decode(corpus.fixed(rendering=1)[s].tolist()) == prepared.lines['val'][s, 0, 1]
    there = corpus.count[:, 1] > 0
    blank = (corpus.fixed(variant=1) == PAD).all(1)
    assert torch.equal(blank, ~there)


def test_corpus_keeps_ids_and_meanings(prepared):
    for split, corpus in prepared.corpora.items():
        a = prepared.arrays[split]
        assert corpus.size == len(a['count']) and corpus.canonical == 2 and corpus.width == a['tokens'].shape[-1]
        s, f, r = np.indices(a['lengths'].shape)
        x = corpus.take(*map(torch.from_numpy, (s, f, r)))
        assert (x.numpy() == a['tokens'][..., :x.shape[-1]]).all() and not a['tokens'][..., x.shape[-1]:].any()
        assert (corpus.meanings.numpy() == a['meanings']).all()


# ---- a corpus of one's own ------------------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, on a machine without WordNet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(english, 'find_wordnet', lambda: None)
    return tmp_path


_cats = sorted((f'the cat number {n} sat on the mat' for n in range(1000)), key=data.sentence_id)
GOOD = [_cats[0], *_cats[-18:-9], _cats[1], *_cats[-9:]]      # the two with the smallest hashes, 0 and 10, are held out


NO_COUNTERFACTUALS = ('no counterfactuals in the file: a tagger makes some; no synonyms without WordNet '
                      '(python -m tools.wordnet)')


def read(path, say=print):
    """data.read_corpus with the rows of training in a list."""
    parts, families = data.read_corpus(path, say)
    return {split: [*rows] for split, rows in parts.items()}, families


def sentences_of(rows):
    return {sentence for groups, *_ in rows for group in groups for sentence in group}


def bad_numbers(said, path):
    assert all(line.startswith(f'bad line left out: {path}:') for line in said)
    return [int(line.split(':')[2]) for line in said]


def test_text_corpus_with_bad_lines(here):
    lines = [line.encode() for line in GOOD]
    lines[3:3] = [b'caf\xe9 in latin one', b'', b'   \t', b'... !!', b'long ' * 500]         # lines 4 to 8
    lines += [GOOD[0].title().encode() + b' .', GOOD[3].upper().encode(), 'ein großer Kater'.encode()]
    Path('c.txt').write_bytes(b'\n'.join(lines))
    said = []
    parts, families = read('c.txt', said.append)
    assert bad_numbers(said[:-1], 'c.txt') == [4, 7, 8] and said[-1] == NO_COUNTERFACTUALS, 'blank lines are no news'
    sentences = {split: [sentence for groups, *_ in rows for sentence in groups[0]] for split, rows in parts.items()}
    assert sorted(sentences['val']) == sorted(['ein großer kater', GOOD[0], GOOD[10]]), 'a tenth, once'
    assert sentences['train'] == GOOD[1:10] + GOOD[11:] + GOOD[3:4]
    assert len({meanings[0] for _, meanings, _ in parts['val']}) == 3
    train = [meanings[0] for _, meanings, _ in parts['train']]
    assert train[2] == train[-1] != train[1] and 0 not in train, 'rows that are equal mean the same'
    assert families == list(english.FAMILIES)
    for groups, meanings, _ in parts['val'] + parts['train'][:9]:
        edits = english.edits(groups[0][0], random.Random(meanings[0]).random)
        assert groups[1:] == [[edits[family]] if family in edits else [] for family in families]
        assert [*map(bool, groups)] == [*map(bool, meanings)] and (edits or groups[0] == ['ein großer kater'])


def test_jsonl_corpus_with_bad_lines(here):
    def row(**changes):
        return json.dumps({'original': 'a dog', 'paraphrases': ['a hound'], 'counterfactuals': ['a cat']} | changes)
    bad = ['{"original": "no end', '[]', '"a"', '3', 'null', '{}', row(original=None), row(original=5),
           row(original=['a'])]
    rest = [row(original=' ! ', paraphrases=[]), row(paraphrases='a hound'), row(paraphrases=[1]), row(paraphrases=3),
            row(counterfactuals='a cat'), row(counterfactuals=[None]), row(counterfactuals={'colour': 'a cat'}),
            row(counterfactuals=7), row(paraphrases=['x' * 3000]), row(counterfactuals=[['a', 'b']]), '[' * 100_000]
    good = [json.dumps({'original': line}) for line in GOOD] + [row()]
    for name, lines in (('a.jsonl', bad), ('b.jsonl', rest)):
        said = []
        Path(name).write_text('\n'.join([*good, '', *lines, *good]) + '\n')
        parts, families = read(name, said.append)
        assert bad_numbers(said[:10], name) == [23 + n for n in range(len(lines[:10]))]
        assert said[10:] == ([] if len(lines) <= 10 else ['... and 1 more bad lines'])
        assert [len(parts[split]) for split in ('train', 'val')] == [2 * 18, 3], 'a held-out row is held out once'
        assert families == ['counterfactual 1'], 'those of bad lines do not count'


def test_jsonl_pairs_keep_their_places(here):
    rows = [{'original': line} for line in GOOD] + [
        {'original': 'A dog barks.', 'paraphrases': ['a hound barks', ' ', 'Barks, a dog!', 'A hound: barks'],
         'counterfactuals': {'tense': ['a dog barked'], 'nothing': ['?'], 'argument swap': ['Barks a dog'],
                             'count': ['Two dogs bark', 'dogs bark']}},
        {'original': 'a cat naps', 'paraphrases': ['A hound barks'],
         'counterfactuals': ['a cat eats', 'a dog barks', GOOD[1]]}]
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    said = []
    parts, families = read('c.jsonl', said.append)
    assert said == ['2 sentences taken out of training because they are held out']
    assert families == ['tense', 'argument swap', 'count', 'counterfactual 1', 'counterfactual 2', 'counterfactual 3']
    assert {groups[0][0] for groups, *_ in parts['val']} == {GOOD[0], GOOD[10], 'a dog barks'}
    groups = next(groups for groups, *_ in parts['val'] if groups[0][0] == 'a dog barks')
    assert groups == [['a dog barks', 'a hound barks', 'barks a dog'], ['a dog barked'], ['barks a dog'],
                      ['two dogs bark', 'dogs bark'], [], [], []], 'each sentence of a group once'
    groups, meanings, _ = parts['train'][-1]
    assert groups == [['a cat naps'], [], [], [], ['a cat eats'], [], [GOOD[1]]]
    assert meanings[6] == parts['train'][0][1][0], 'a counterfactual that is another row has the id of that row'
    assert not sentences_of(parts['train']) & sentences_of(parts['val']), 'nothing that is held out is in training'


def test_what_is_held_out_is_secret_and_nothing_else(here, capsys):
    rows = [{'original': line} for line in GOOD]
    rows[0] |= {'paraphrases': [f'of it number {k}' for k in range(12)], 'counterfactuals': GOOD[1:6]}
    rows[5]['paraphrases'] = ['of it number 11', 'mine']                 # a rendering that is not kept is secret too
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    said = []
    parts, families = read('c.jsonl', said.append)
    assert families == [f'counterfactual {k}' for k in range(1, 6)]
    assert [len(group) for group in parts['val'][0][0]] == [8, 1, 1, 1, 1, 1]
    assert said[0].startswith('6 sentences taken out'), 'five counterfactuals and a rendering'
    assert [groups[0][0] for groups, *_ in parts['train']] == ['mine'] + GOOD[6:10] + GOOD[11:]

    rows = [{'original': line, 'paraphrases': [] if n % 10 else GOOD} for n, line in enumerate(GOOD)]
    Path('none.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as stop:
        data.load(CONFIG | {'corpus': 'none.jsonl'})
    assert stop.value.code == 2 and 'nothing is left to train on' in capsys.readouterr().err
    assert not list(Path('out/data').glob('*')), 'and no folder that looks prepared'


def test_a_corpus_that_changes_while_it_is_read(here, capsys):
    Path('c.txt').write_text('\n'.join(GOOD))
    parts, _ = data.read_corpus('c.txt')
    Path('c.txt').write_text('\n' * 30)
    with pytest.raises(SystemExit) as stop:
        [*parts['train']]
    assert stop.value.code == 2 and 'has changed' in capsys.readouterr().err


def test_own_corpus_of_uneven_rows_becomes_arrays(here, capsys):
    rows = [{'original': line, 'paraphrases': [f'{line} again {k}' for k in range(n % 4)],
             'counterfactuals': {'colour': ['another thing altogether']} if n % 2 else {}}
            for n, line in enumerate(GOOD)]
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    config = CONFIG | {'corpus': 'c.jsonl', 'max_length': 15}
    text = data.load(config)
    splits, tokenizer = text.splits, text.tokenizer
    assert (set(splits) == {'train', 'val', 'test'} and splits['test'] is splits['val']
            and len(capsys.readouterr().out.splitlines()) == 2)
    corpus = splits['train']
    assert corpus.width == 15 and corpus.starts.diff().max() <= 15, 'rounding up to 8 stays within max_length'
    assert [tokenizer.decode(row.tolist()) for row in corpus.fixed(rendering=0)] == GOOD[1:10] + GOOD[11:]
    assert torch.equal(corpus.fixed(), corpus.fixed(rendering=0)), 'the original'
    assert (corpus.fixed(rendering=-1) != PAD).any(1).all(), 'the last rendering of each row, not of the longest'
    scenes = torch.arange(corpus.size).repeat(50)
    for form in ('any', 'free', 'canonical'):
        r1, r2 = corpus.renderings(scenes, scenes * 0, torch.Generator(), form)
        count = corpus.count[scenes, 0].long()
        assert (r1 < count).all() and (r2 < count).all() and torch.equal(r1 != r2, count > 1)
        assert (corpus.take(scenes, scenes * 0, r2)[:, 0] != PAD).all()
    variants, valid = corpus.negatives(scenes, 2, torch.Generator())
    assert (variants[valid] == 1).all() and (valid.sum(1) == (corpus.count[scenes, 1] > 0)).all() and valid.any()
    data.load(config)
    assert not capsys.readouterr().out, 'the second time it is there already'


def test_long_sentences_keep_their_length_or_are_cut(here, capsys):
    """Lengths above 255 are counted right; what exceeds max_length is cut and said."""
    line = ' '.join(f'{k}' for k in range(200, 320))
    Path('c.txt').write_text('\n'.join(GOOD + ['start', line]))
    config = CONFIG | {'corpus': 'c.txt', 'max_length': 512, 'vocab_size': 260}
    corpus = data.load(config).splits['train']
    assert corpus.starts.diff().max() == (corpus.fixed() != PAD).sum(-1).max() > 255
    assert corpus.fixed().shape[1] == -(-int(corpus.starts.diff().max()) // 2) * 2 <= corpus.width
    whole = corpus.fixed()[-1].tolist()
    assert ' cut' not in capsys.readouterr().out
    text = data.load(config | {'max_length': 64})
    corpus, said = text.splits['train'], capsys.readouterr().out
    total = sum(len(part.starts) - 1 for part in (corpus, text.splits['val']))
    assert re.search(f'^1 of {total} sentences are .*cut.* 64 tokens', said, re.M)
    assert corpus.starts.diff().max() == corpus.width == 64 and text.tokenizer.decode(whole) == line
    assert corpus.fixed()[-1].tolist() == whole[:63] + [EOS]
    assert corpus.meanings[-1, 0] == data.sentence_id(line), 'it means what the whole sentence does'


def test_cut_is_what_a_loop_over_the_lines_does():
    rand = random.Random(1)
    lines = [[rand.randrange(SPECIALS, 60_000) for _ in range(rand.randrange(9))] + [EOS] for _ in range(60)]
    lengths, flat = np.array([len(line) for line in lines]), np.array(sum(lines, []), np.uint16)
    for longest in (1, 2, 5, 9, 10):
        expected = [line if len(line) <= longest else line[:longest - 1] + [EOS] for line in lines]
        tokens, short = data.cut(flat, lengths, longest)
        assert tokens.dtype == flat.dtype and tokens.tolist() == sum(expected, [])
        assert short.tolist() == [len(line) for line in expected]
        assert tokens[short.cumsum() - 1].tolist() == [EOS] * 60, 'each line ends'


def test_memory_does_not_grow_with_a_corpus_of_ones_own(here, monkeypatch):
    """What Python and numpy allocate hardly differs for three times as many lines: less than a sorted hash of each."""
    monkeypatch.setattr(data, 'TOKENIZER_LINES', 1000)
    monkeypatch.setattr(data, 'HELD_OUT_LINES', 100)
    monkeypatch.setattr(english, 'edits', lambda *_: {})                 # half a minute
    peaks = []
    for n in (1_000, 4_000, 12_000):                                     # once for what is loaded at the first use
        Path(f'{n}.txt').write_text('\n'.join(f'the cat number {k} sat on the mat' for k in range(n)))
        config = CONFIG | {'corpus': f'{n}.txt'}
        tracemalloc.start()
        data.prepare(Path(f'out/data/{len(peaks)}'), config, lambda line: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        text = data.load(config)
        splits, tokenizer = text.splits, text.tokenizer
        assert splits['val'].size == 100 and splits['train'].size == n - 100, 'a tenth, at most so many'
        ends = [tokenizer.decode(splits[split].fixed()[-1].tolist()).split()[3] for split in ('train', 'val')]
        assert int(ends[0]) > n - 20 and int(ends[1]) < n, 'to the last line'
    assert peaks[2] - peaks[1] < 8_000 * 20, peaks


@pytest.mark.parametrize('content', [
    b'', b'\n\n \n', b'one', b'only\nthree\nsentences', b'the same\n' * 50, b'\xff\xfe\n' * 30])
def test_corpus_with_too_little_in_it(here, content, capsys):
    for name in ('c.txt', 'c.jsonl'):
        Path(name).write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            data.read_corpus(name, lambda line: None)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count('\n') == 1 and error.startswith(f'error: --corpus={name}: only ')


@pytest.mark.parametrize('read', [data.read_corpus, lambda path: data.load(CONFIG | {'corpus': path})])
@pytest.mark.parametrize('path', ['missing.txt', 'folder.txt'])
def test_corpus_that_cannot_be_read(here, read, path, capsys):
    Path('folder.txt').mkdir()
    with pytest.raises(SystemExit) as stop:
        read(path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and error.startswith(f'error: --corpus={path}: ')
    assert not Path('out').exists()


def test_vocabulary_beyond_16_bits_is_refused(here, capsys):
    with pytest.raises(SystemExit) as stop:
        data.prepare(Path('out/data/x'), CONFIG | {'vocab_size': 40_000}, pytest.fail)
    assert stop.value.code == 2 and '40000' in capsys.readouterr().err and not Path('out').exists()


# ---- counterfactuals and second views that a corpus of one's own does not bring -------------------------------------

def family_rows():
    """Thirty lines: said in one way, in two, in three, in turn; two families of their own here and there."""
    return [{'original': f'the crow number {n} sat on a wall',
             'paraphrases': [f'on a wall sat crow {n}', f'crow {n} sat there'][:n % 3],
             'counterfactuals': {'who did it': [f'the wall number {n} sat on a crow', f'a wall sat on crow {n}',
                                                f'wall {n} sat there']}
             | ({'mood\n': [f'did the crow number {n} sit on a wall']} if n % 2 else {})} for n in range(30)]


def bag_of_tokens(x):
    """A (N, E) embedding that one can work out by hand."""
    counts = torch.zeros(len(x), 1024).scatter_add_(1, x, (x >= SPECIALS).float())
    return torch.nn.functional.normalize(counts, dim=-1)


def test_families_of_a_corpus_keep_their_names(here):
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, family_rows())))
    config = CONFIG | {'corpus': 'c.jsonl', 'leave_out': 'count'}
    text = data.load(config)
    families = ('who did it', 'mood\n')
    folder = data._folder(config)
    assert tuple(json.loads((folder / 'families.json').read_text())) == families == text.splits['val'].families
    pack = [json.loads(line) for line in (folder / 'eval_pack.jsonl').read_text().splitlines()]
    val = text.splits['val']
    for s, row in enumerate(pack):
        for f, family in enumerate(families, start=1):
            said = [text.tokenizer.decode(val.take(torch.tensor([s]), torch.tensor([f]), torch.tensor([k]))[0].tolist())
                    for k in range(val.count[s, f])]
            assert said == row['counterfactuals'].get(family, [])
    m = metrics.semantic_metrics(bag_of_tokens, val)
    assert {name for name in m if name.startswith(('gap_', 'wins_'))} == {
        f'{kind}_{family}' for kind in ('gap', 'wins') for family in families}
    assert not val.swaps.any(), 'no family of that name'
    kinds = val.clusters(3)[2]
    assert set(kinds) == {'paraphrase', *families}

    Path('swaps.jsonl').write_text(Path('c.jsonl').read_text().replace('who did it', 'argument swap'))
    train = data.load(CONFIG | {'corpus': 'swaps.jsonl'}).splits['train']
    assert train.swaps.tolist() == [False, True, False]
    assert (train.negatives(torch.arange(train.size), 1, torch.Generator())[0] == 1).all(), 'the swap comes first'
    left = train.negatives(torch.arange(train.size), 2, torch.Generator(), without='argument swap')
    assert not (left[0][left[1]] == 1).any()


def test_of_many_families_the_first_eight_count_and_that_is_said(here):
    rows = [{'original': line, 'counterfactuals': {f'family {n % 11}': [f'{line} not']}} for n, line in enumerate(GOOD)]
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    said = []
    parts, families = read('c.jsonl', said.append)
    assert families == [f'family {n}' for n in range(8)]
    assert said[0].startswith('11 families of counterfactuals: only the first 8 count, family 0, family 1, ')
    assert all(len(groups) == 9 for groups, *_ in parts['train'] + parts['val'])


def test_retrieval_in_a_corpus_of_ones_own(here):
    rows = family_rows()
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    text = data.load(CONFIG | {'corpus': 'c.jsonl'})
    train = text.splits['train']
    row_of = {row['original']: row for row in rows}
    originals = [text.tokenizer.decode(ids) for ids in train.fixed().tolist()]
    several = [row_of[line] for line in originals if row_of[line]['paraphrases']]
    for n in (5, 1000):
        query, positive, negatives, valid = train.retrieval_pool(n)
        assert len(query) == len(positive) == len(negatives) == len(valid) == min(n, len(several)) < train.size
        for s, row in enumerate(several[:n]):
            said = [text.tokenizer.decode(ids) for ids in (query[s].tolist(), positive[s].tolist(),
                                                           *negatives[s].tolist())]
            changed = [row['counterfactuals'].get(family, [''])[0] for family in train.families]
            assert said == [row['original'], row['paraphrases'][0], *changed]
            assert valid[s].tolist() == [*map(bool, changed)]
    Path('alone.txt').write_text('\n'.join(GOOD))
    val = data.load(CONFIG | {'corpus': 'alone.txt'}).splits['val']
    query, positive, negatives, valid = val.retrieval_pool(1000)
    assert len(query) == 2 and torch.equal(query, positive), 'each is said in one way only and has to find itself'
    assert valid.shape == (2, len(english.FAMILIES)) and valid.any()


OFF = {'drop_words': 0.0, 'mask_words': 0.0, 'turn_words': 0.0}


@pytest.fixture
def spelled():
    """(x (40, 30), u, begins, words): sentences of 1 to 9 words of 1 to 3 tokens each, EOS and padding; the words."""
    rand, begins = random.Random(3), torch.zeros(3000, dtype=torch.bool)
    begins[SPECIALS:1500] = True
    words = [[[rand.randrange(SPECIALS, 1500), *(rand.randrange(1500, 3000) for _ in range(rand.randrange(3)))]
              for _ in range(1 + n % 9)] for n in range(40)]
    x = torch.zeros(40, 30, dtype=torch.long)
    for row, sentence in zip(x, words):
        ids = [*itertools.chain(*sentence), EOS]
        row[:len(ids)] = torch.tensor(ids)
    return x, torch.rand(40, 32, generator=torch.Generator().manual_seed(1)), begins, words


def words_of(row, begins):
    """The words of a row of token ids; every token before EOS belongs to one, and only padding is behind it."""
    ids = row.tolist()
    end = ids.index(EOS)
    assert set(ids[end + 1:]) <= {PAD} and PAD not in ids[:end]
    words = []
    for i in ids[:end]:
        if begins[i] or not words:
            words.append([])
        words[-1].append(i)
    return words


def is_subsequence(some, all_):
    rest = iter(all_)
    return all(word in rest for word in some)


def test_altered_sentences_lose_whole_words_and_never_all(spelled):
    x, u, begins, words = spelled
    kept = {}
    for share in (0.1, 0.5, 1.0):
        y = data.altered(x, begins, u, runtime.Config(OFF | {'drop_words': share}))
        assert y.shape == x.shape and y.dtype == x.dtype
        said = [words_of(row, begins) for row in y]
        assert all(is_subsequence(some, all_) and some for some, all_ in zip(said, words))
        kept[share] = sum(map(len, said)) / sum(map(len, words))
    assert 0.85 < kept[0.1] < 0.95 and 0.45 < kept[0.5] < 0.62 and all(len(some) == 1 for some in said)


def test_altered_sentences_hide_whole_words(spelled):
    x, u, begins, words = spelled
    y = data.altered(x, begins, u, runtime.Config(OFF | {'mask_words': 1.0}))
    assert torch.equal(y, torch.where(x >= SPECIALS, BOS, x)), 'all of them'
    y = data.altered(x, begins, u, runtime.Config(OFF | {'mask_words': 0.4}))
    hidden = 0
    for row, before, sentence in zip(y, x, words):
        at = 0
        for word in sentence:
            now = row[at:at + len(word)].tolist()
            assert now in (word, [BOS] * len(word)), 'a word is hidden as a whole, or stays'
            hidden, at = hidden + (now != word), at + len(word)
        assert torch.equal(row[at:], before[at:])
    assert 0.35 < hidden / sum(map(len, words)) < 0.45


def test_altered_sentences_are_turned_at_a_word(spelled):
    x, u, begins, words = spelled
    y = data.altered(x, begins, u, runtime.Config(OFF | {'turn_words': 1.0}))
    cuts = set()
    for row, sentence in zip(y, words):
        said = words_of(row, begins)
        turns = [sentence[k:] + sentence[:k] for k in range(len(sentence))]
        assert said in turns
        cuts.add((len(sentence), turns.index(said)))
    assert len({k for n, k in cuts if n == 9}) > 2, 'at different words'
    some = data.altered(x, begins, u, runtime.Config(OFF | {'turn_words': 0.3}))
    same = (some == x).all(1)
    assert torch.equal(some[~same], y[~same]) and 0.1 < (~same).float().mean() < 0.4


def test_altered_is_a_function_of_its_numbers_row_by_row(spelled):
    x, u, begins, words = spelled
    assert torch.equal(data.altered(x, begins, u, runtime.Config(OFF)), x), 'off: nothing changes'
    config = runtime.Config(drop_words=0.3, mask_words=0.2, turn_words=0.5)
    y = data.altered(x, begins, u, config)
    assert (y != x).any(1).sum() > 30 and ((y == EOS).sum(1) == 1).all()
    assert torch.equal(y, data.altered(x, begins, u, config))
    assert torch.equal(y[7:9], data.altered(x[7:9], begins, u[7:9], config)), 'whatever the others are'
    assert torch.equal(y[:, :28], data.altered(x[:, :28], begins, u, config)), 'and how much padding there is'
    nested = data.altered(x.view(4, 5, 2, 30), begins, u.view(4, 5, 2, 32), config)
    assert torch.equal(nested.view(40, 30), y)


@pytest.mark.parametrize('off', [None, *OFF])
def test_altered_sentences_have_no_gaps_whatever_is_on(spelled, off):
    x, u, begins, words = spelled
    config = runtime.Config({'drop_words': 0.4, 'mask_words': 0.3, 'turn_words': 0.7} | ({off: 0.0} if off else {}))
    for row, sentence in zip(data.altered(x, begins, u, config), words):
        said = Counter(itertools.chain(*words_of(row, begins)))
        assert said and said - Counter({BOS: said[BOS]}) <= Counter(itertools.chain(*sentence))


def test_a_sentence_said_in_one_way_only_is_seen_again_altered(here):
    """The second view of it, in a corpus of one's own; one that is said in several ways, and the built-in grammar's,
    stay as they are. Drawn alike on every rank."""
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, family_rows())))
    text = data.load(CONFIG | {'corpus': 'c.jsonl'})
    train = text.splits['train']
    config = runtime.Config(SETTINGS | OFF | {'drop_words': 0.3, 'leave_out': ''})
    scenes, variants, views, valid = train.contrast_rows(config, 5)
    plain = train.take(scenes[:, :, None], variants[:, :, None], views)
    batch = train.contrast_batch(config, rank_of(), 5)
    assert torch.equal(batch.x[:, :, 0], plain[:, :, 0])
    alone = train.count[scenes, variants] == 1
    assert alone.any() and not alone.all() and torch.equal((plain[:, :, 0] == plain[:, :, 1]).all(-1), alone)
    assert torch.equal(batch.x[:, :, 1][~alone], plain[:, :, 1][~alone])
    first, second = plain[:, :, 0][alone], batch.x[:, :, 1][alone]
    for a, b in zip(first.tolist(), second.tolist()):
        some, all_ = (text.tokenizer.decode(ids).split() for ids in (b, a))
        assert some and is_subsequence(some, all_)
    assert (first != second).any(1).float().mean() > 0.5
    ranks = [train.contrast_batch(config, rank_of(rank, 2), 5).x for rank in range(2)]
    assert torch.equal(padded(ranks), padded([batch.x]))
    assert torch.equal(train.contrast_batch(runtime.Config(config | OFF), rank_of(), 5).x, plain)


# ---- what is made of plain text -------------------------------------------------------------------------------------

def test_edits_do_not_bring_held_out_sentences_into_training(here):
    """Sentences of which one is often an edit of another."""
    nouns = 'dogs cats cows goats hens owls crows foxes hares moles wolves bears'.split()
    lines = [f'{n} {noun} sleep' for noun in nouns for n in english.COUNTED]
    Path('c.txt').write_text('\n'.join(lines))
    parts, families = read('c.txt', lambda line: None)
    assert families == list(english.FAMILIES) and len(parts['val']) == 6
    held_out = sentences_of(parts['val'])
    assert {groups[0][0] for groups, *_ in parts['val']} <= set(lines) and len(held_out) > 12
    assert not held_out & sentences_of(parts['train'])
    made = {edit for line in lines
            for edit in english.edits(line, random.Random(data.sentence_id(line)).random).values()}
    assert made & {groups[0][0] for groups, *_ in parts['val']}, 'or this tests nothing'
    kept = {groups[0][0] for groups, *_ in parts['train']}
    assert kept == set(lines) - held_out and len(kept) < 54, 'what is an edit of a held-out one is not trained on'
    assert read('c.txt', lambda line: None) == (parts, families), 'the same however often it is read'


def test_synonyms_make_another_way_to_say_it_where_there_is_wordnet(here, monkeypatch):
    (here / 'wordnet').mkdir()
    for part, index, synset in (('noun', 'sofa couch', 'couch 0 sofa 0'), ('verb', '', ''), ('adj', '', ''),
                                ('adv', '', '')):
        (here / f'wordnet/index.{part}').write_text(''.join(f'{word} n 1 0 1 1 00000030  \n' for word in index.split()))
        (here / f'wordnet/data.{part}').write_text(f'00000030 06 n 02 {synset} 000 | a seat  \n' if synset else '')
    (here / 'wordnet/cntlist.rev').write_text('couch%1:06:00:: 1 9\nsofa%1:06:00:: 1 7\n')
    monkeypatch.setattr(english, 'find_wordnet', lambda: here / 'wordnet')
    Path('c.txt').write_text('\n'.join(f'{n} dogs sit on a couch' for n in range(2, 32)))
    said = []
    parts, families = read('c.txt', said.append)
    assert said[0] == f'no counterfactuals in the file: a tagger makes some; synonyms from {here}/wordnet'
    held_out = sentences_of(parts['val'])
    for groups, *_ in parts['train'] + parts['val']:
        assert groups[0][1:] == [groups[0][0].replace('couch', 'sofa')]
    for groups, *_ in parts['val']:
        for family, group in zip(families, groups[1:]):
            assert not group or group == [group[0], group[0].replace('couch', 'sofa')], (family, group)
    assert len(held_out) > 12 and not held_out & sentences_of(parts['train'])
    rows = [{'original': line, 'counterfactuals': ['a cat naps on a couch'] * (not n)} for n, line in enumerate(GOOD)]
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert all(len(groups[0]) == 1 for groups, *_ in read('c.jsonl', said.append)[0]['val']), 'a file that brings some'


SCRIPTS = [                    # a sentence, its plain form
    ('लड़की ने {} किताबें पढ़ीं।', 'लड़की ने {} किताबें पढ़ीं'),
    ('{} பூனை பாயில் அமர்ந்தது.', '{} பூனை பாயில் அமர்ந்தது'),
    ('红色的球{}在桌子上。', '红色的球{}在桌子上'), ('القِطَّةُ {} على السجادة؟', 'القِطَّةُ {} على السجادة'),
    ('แมว {} ตัวนั่งอยู่', 'แมว {} ตัวนั่งอยู่'), ('Кот {} сидел — на ковре!', 'кот {} сидел на ковре'),
    ('🟥 A cube {} on 🔵🔵', 'a cube {} on'), ('The cafe\u0301 {} «кафе» の猫', 'the cafe\u0301 {} кафе の猫')]


def test_a_corpus_of_any_script_keeps_its_words(here):
    lines = [sentence.format(n) for sentence, _ in SCRIPTS for n in range(10, 20)]
    plain = {data.sentence_id(line): line for line in (form.format(n) for _, form in SCRIPTS for n in range(10, 20))}
    Path('c.txt').write_text('\n'.join([*lines, '🟥🔵', '؟ — 。']), encoding='utf-8')
    said = []
    parts, _ = read('c.txt', said.append)
    assert bad_numbers(said[:2], 'c.txt') == [81, 82], 'no words'
    text = data.load(CONFIG | {'corpus': 'c.txt', 'vocab_size': 600})
    for split, total in (('train', 72), ('val', 8)):
        corpus = text.splits[split]
        assert len(parts[split]) == corpus.size == total
        for meaning_id, ids in zip(corpus.meanings[:, 0].tolist(), corpus.fixed().tolist()):
            assert text.tokenizer.decode(ids) == plain[meaning_id]
            assert [i for i in ids if i != PAD] == text.tokenizer.encode(plain[meaning_id])
    for ids in text.splits['train'].contrast_batch(runtime.Config(SETTINGS | OFF | {'drop_words': 0.5}), rank_of(),
                                                   0).x.flatten(0, 2).tolist():
        assert '\ufffd' not in text.tokenizer.decode(ids), 'no word is cut in the middle of a letter'


def test_an_edit_keeps_the_words_of_other_scripts():
    for line in ('a man from हिन्दी is here', 'two cats on a कुर्सी', 'a cafe\u0301 behind a house'):
        edits = english.edits(line, random.Random(0).random)
        others = [word for word in line.split() if not word.isascii()]
        assert edits and all(set(others) <= set(edit.split()) for edit in edits.values()), edits


# ---- loading ---------------------------------------------------------------------------------------------------------

def test_what_a_phase_knows_of_its_text(prepared, here):
    text = prepared.text
    assert list(text.splits) == list(data.SPLITS) and text.checked is True
    types, concepts = token_types(text.tokenizer, 1024)
    assert torch.equal(text.types, types) and torch.equal(text.concepts, concepts)
    Path('c.txt').write_text('\n'.join(GOOD))
    assert data.load(CONFIG | {'corpus': 'c.txt'}).checked is False, 'the checker does not know your words'


def test_load_refuses_other_token_ids_than_the_nets_have_learnt(both, monkeypatch, capsys):
    monkeypatch.chdir(both[1].folder.parent.parent.parent)
    state = both[1].tokenizer.state()
    assert data.load(CONFIG, checkpoint={'state': {'tokenizer': state}}).tokenizer.state() == state
    with pytest.raises(SystemExit) as stop:
        data.load(CONFIG, checkpoint={'state': {'tokenizer': state[:-1]}})
    assert stop.value.code == 2 and 'other token ids' in capsys.readouterr().err


@pytest.mark.parametrize('settings', [
    {'leave_out': 'tense'}, {'complexity': 0}, {'complexity': 4}, {'simple_share': -0.1}, {'simple_share': 1.1},
    {'vocab_size': 259}])
def test_load_refuses_what_makes_no_sense(here, settings, capsys):
    with pytest.raises(SystemExit) as stop:
        data.load(CONFIG | settings)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and f'--{[*settings][0]}={[*settings.values()][0]}' in error
    assert not list(Path('.').glob('out/data/*'))


# ---- command line ---------------------------------------------------------------------------------------------------

def program(folder, *words):
    environment = os.environ | {'PYTHONHASHSEED': '7', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run([sys.executable, ROOT / 'data.py', *words], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=600)


def test_command_line_writes_sentences(here):
    done = program(here, '--num=50', '--out=x.txt', '--complexity=2')
    assert done.returncode == 0 and done.stdout == 'wrote 50 sentences to x.txt\n', done.stderr
    lines = Path('x.txt').read_text().splitlines()
    assert len(lines) == 50 and all(split_of(canonical_direction(parse(line))) == 'train' for line in lines)
    data.write_sentences('here.txt', 50, 2, 0)
    assert Path('here.txt').read_text().splitlines() == lines, 'in every process the same, whatever its hash seed'


def test_command_line_writes_jsonl_that_it_can_read(here):
    done = program(here, '--num=50', '--out=x.jsonl', '--complexity=2', '--seed=3')
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in Path('x.jsonl').read_text().splitlines()]
    assert len(rows) == 50 and {family for row in rows for family in row['counterfactuals']} == set(FAMILIES)
    for row in rows:
        scene = parse(row['original'])
        assert len(scene.things) == 3 and all(graph_f1(scene, parse(p)) == 1 for p in row['paraphrases'])
        assert all(graph_f1(scene, parse(text)) < 1 for texts in row['counterfactuals'].values() for text in texts)
    parts, families = read('x.jsonl', pytest.fail)                                                     # no bad line
    assert {split: len(part) for split, part in parts.items()} == {'train': 45, 'val': 5}
    by_original = {normalize(row['original']): row for row in rows}
    assert sorted(families) == sorted(FAMILIES)
    for groups, *_ in parts['train'] + parts['val']:
        row = by_original[groups[0][0]]
        assert groups == [[*dict.fromkeys([row['original'], *row['paraphrases']])],
                          *(row['counterfactuals'].get(family, []) for family in families)]


def test_command_line_refuses_an_unknown_key(here):
    done = program(here, '--number=50')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and '--num=' in done.stderr and not done.stdout


def test_program_shows_and_prepares(here, monkeypatch, capsys):
    monkeypatch.setattr(data, 'HELD_OUT_SIZE', 20)
    monkeypatch.setattr(data, 'num', 60)
    data.main()
    text = capsys.readouterr().out
    assert text.count('paraphrase  ') == 10 and all(f'\n{family} ' in text for family in FAMILIES)
    assert all(re.search(rf'^{split} +\d+ scenes, ', text, re.M) for split in data.SPLITS)
    assert text.count('shared with train: 0') == 4 and len(list(Path('out/data').iterdir())) == 1


@pytest.mark.parametrize('settings', [
    {'num': 0}, {'complexity': 4}, {'num': 3, 'out': 'nowhere/x.txt'}, {'corpus': 'no.txt'}])
def test_program_refuses_what_makes_no_sense(here, settings, monkeypatch, capsys):
    for key, value in settings.items():
        monkeypatch.setattr(data, key, value)
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == 2 and capsys.readouterr().err.count('\n') == 1


def test_spread_takes_the_same_rows_however_the_batch_is_split():
    index = torch.arange(12)
    for each, m in (6, 1), (6, 2), (6, 4), (9, 3), (6, 6):
        whole = data.spread(index, each, m)
        assert len(whole) == 12 * m and len(set(whole.tolist())) == 12 * m, 'no row twice'
        assert (whole.view(m, 12) // each == index).all(), 'the first of every scene, then the second'
        parts = [data.spread(part, each, m).view(m, 4) + each * part[0] for part in index.split(4)]
        assert torch.equal(torch.cat(parts, dim=1).flatten(), whole)
    assert len(set((data.spread(index, 6, 1) % 6).tolist())) == 6, 'all variants and views have their turn'
    for each in (4, 6):                                             # of every second scene alone
        whole = data.spread(torch.arange(24), each, 1, every=2)
        assert (whole // each).tolist() == list(range(0, 24, 2)) and len(set((whole % each).tolist())) == each
        parts = [data.spread(part, each, 1, every=2) + each * part[0] for part in torch.arange(24).split(4)]
        assert torch.equal(torch.cat(parts), whole)

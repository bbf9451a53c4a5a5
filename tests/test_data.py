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
import runtime
from data import BOS, EOS, PAD, PARA, SPECIALS, Tokenizer, token_types
from grammar import (
    CANONICAL, COLOURS, EVAL_SENTENCES, FAMILIES, HELD_OUT_PAIRS, INVERSE, NOUNS, SHAPES, SYMMETRIC, TYPES, VARIANTS,
    allowed_counterfactual, canonical, graph_f1, meaning, normalize, parse, render, sample_scene, split_of)

ROOT = Path(__file__).parent.parent
SWAP = VARIANTS.index('argument swap')


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
    assert len(others) == 6 and all(abs((first * other).mean()) < 0.02 for other in others)
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
    assert torch.equal(batch.variants, variants) and torch.equal(batch.valid, valid)
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
        for name in ('meanings', 'valid', 'variants'):
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
        for name in ('meanings', 'valid', 'variants'):
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
    monkeypatch.chdir(tmp_path)
    return tmp_path


_cats = sorted((f'the cat number {n} sat on the mat' for n in range(1000)), key=data.sentence_id)
GOOD = [_cats[0], *_cats[-18:-9], _cats[1], *_cats[-9:]]      # the two with the smallest hashes, 0 and 10, are held out


def bad_numbers(said, path):
    assert all(line.startswith(f'bad line left out: {path}:') for line in said)
    return [int(line.split(':')[2]) for line in said]


def test_text_corpus_with_bad_lines(here):
    lines = [line.encode() for line in GOOD]
    lines[3:3] = [b'caf\xe9 in latin one', b'', b'   \t', b'... !!', b'long ' * 500]         # lines 4 to 8
    lines += [GOOD[0].title().encode() + b' .', GOOD[3].upper().encode(), 'ein großer Kater'.encode()]
    Path('c.txt').write_bytes(b'\n'.join(lines))
    said = []
    parts = data.read_corpus('c.txt', said.append)
    assert bad_numbers(said, 'c.txt') == [4, 7, 8], 'blank lines are no news'
    parts = {split: [*rows] for split, rows in parts.items()}
    sentences = {split: [sentence for groups, *_ in rows for sentence in groups[0]] for split, rows in parts.items()}
    assert sorted(sentences['val']) == sorted(['ein großer kater', GOOD[0], GOOD[10]]), 'a tenth, once'
    assert sentences['train'] == GOOD[1:10] + GOOD[11:] + GOOD[3:4]
    assert len({meanings[0] for _, meanings, _ in parts['val']}) == 3
    assert all(groups[1:] == [[]] * 6 and meanings[1:] == [0] * 6 for groups, meanings, _ in parts['val'])
    train = [meanings[0] for _, meanings, _ in parts['train']]
    assert train[2] == train[-1] != train[1] and 0 not in train, 'rows that are equal mean the same'


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
        parts = data.read_corpus(name, said.append)
        assert bad_numbers(said[:10], name) == [23 + n for n in range(len(lines[:10]))]
        assert said[10:] == ([] if len(lines) <= 10 else ['... and 1 more bad lines'])
        assert [len([*parts[split]]) for split in ('train', 'val')] == [2 * 18, 3], 'a held-out row is held out once'


def test_jsonl_pairs_keep_their_places(here):
    rows = [{'original': line} for line in GOOD] + [
        {'original': 'A dog barks.', 'paraphrases': ['a hound barks', ' ', 'Barks, a dog!'],
         'counterfactuals': {'argument swap': ['Barks a dog'], 'tense': ['a dog barked'],
                             'count': ['Two dogs bark', 'dogs bark']}},
        {'original': 'a cat naps', 'paraphrases': ['A hound barks'], 'counterfactuals': ['a cat eats', 'a dog barks',
                                                                                         GOOD[1]]}]
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    said = []
    parts = {split: [*rows] for split, rows in data.read_corpus('c.jsonl', said.append).items()}
    assert said == ['2 sentences taken out of training because they are held out']
    assert {groups[0][0] for groups, *_ in parts['val']} == {GOOD[0], GOOD[10], 'a dog barks'}
    groups = next(groups for groups, *_ in parts['val'] if groups[0][0] == 'a dog barks')
    assert [len(group) for group in groups] == [3, 1, 0, 0, 2, 1, 0]
    assert groups[0] == ['a dog barks', 'a hound barks', 'barks a dog']
    assert groups[1] == ['a dog barked']                               # an unknown family takes a free place
    assert groups[1 + FAMILIES.index('count')] == ['two dogs bark', 'dogs bark']
    assert groups[SWAP] == ['barks a dog']
    groups, meanings, _ = parts['train'][-1]
    assert [len(group) for group in groups] == [1, 1, 0, 1, 0, 0, 0] and groups[3] == [GOOD[1]]
    assert meanings[3] == parts['train'][0][1][0], 'a counterfactual that is another row has the id of that row'
    train, val = ({line for groups, *_ in rows for group in groups for line in group} for rows in parts.values())
    assert not train & val, 'nothing that is held out is in training'


def test_what_is_held_out_is_secret_and_nothing_else(here, capsys):
    rows = [{'original': line} for line in GOOD]
    rows[0] |= {'paraphrases': [f'of it number {k}' for k in range(12)], 'counterfactuals': GOOD[1:6]}
    rows[5]['paraphrases'] = ['of it number 11', 'mine']                 # a rendering that is not kept is secret too
    Path('c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    said = []
    parts = {split: [*part] for split, part in data.read_corpus('c.jsonl', said.append).items()}
    assert [len(group) for group in parts['val'][0][0]] == [8, 1, 1, 1, 1, 1, 0]
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
    parts = data.read_corpus('c.txt')
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
    assert (corpus.fixed() != PAD).any(1).all(), 'the last rendering of each row, not of the longest'
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


def test_long_sentences_keep_their_length(here):
    """Lengths above 255 are counted right; what exceeds max_length stops the program."""
    Path('c.txt').write_text('\n'.join(GOOD + ['start', ' '.join(f'{k}' for k in range(200, 320))]))
    config = CONFIG | {'corpus': 'c.txt', 'max_length': 512, 'vocab_size': 260}
    corpus = data.load(config).splits['train']
    assert corpus.starts.diff().max() == (corpus.fixed() != PAD).sum(-1).max() > 255
    assert corpus.fixed().shape[1] == -(-int(corpus.starts.diff().max()) // 2) * 2 <= corpus.width
    with pytest.raises(SystemExit) as stop:
        data.load(config | {'max_length': 64})
    assert stop.value.code == 2 and not list(Path('out/data').glob('*.tmp'))


def test_memory_does_not_grow_with_a_corpus_of_ones_own(here, monkeypatch):
    """What Python and numpy allocate hardly differs for three times as many lines: less than a sorted hash of each."""
    monkeypatch.setattr(data, 'TOKENIZER_LINES', 2000)
    monkeypatch.setattr(data, 'HELD_OUT_LINES', 200)
    peaks = []
    for n in (2_000, 8_000, 24_000):                                     # once for what is loaded at the first use
        Path(f'{n}.txt').write_text('\n'.join(f'the cat number {k} sat on the mat' for k in range(n)))
        config = CONFIG | {'corpus': f'{n}.txt'}
        tracemalloc.start()
        data.prepare(Path(f'out/data/{len(peaks)}'), config, lambda line: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        text = data.load(config)
        splits, tokenizer = text.splits, text.tokenizer
        assert splits['val'].size == 200 and splits['train'].size == n - 200, 'a tenth, at most so many'
        ends = [tokenizer.decode(splits[split].fixed()[-1].tolist()).split()[3] for split in ('train', 'val')]
        assert int(ends[0]) > n - 20 and int(ends[1]) < n, 'to the last line'
    assert peaks[2] - peaks[1] < 16_000 * 20, peaks


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
    parts = {split: [*part] for split, part in data.read_corpus('x.jsonl', pytest.fail).items()}       # no bad line
    assert {split: len(part) for split, part in parts.items()} == {'train': 45, 'val': 5}
    read = [groups for part in parts.values() for groups, *_ in part]
    swaps = sum('argument swap' in row['counterfactuals'] for row in rows)
    assert all(len(groups[0]) == 4 for groups in read) and sum(len(groups[SWAP]) for groups in read) == swaps


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

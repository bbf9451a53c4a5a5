"""Tests of data.py: the checker against the renderer, counterfactuals, splits, tokenizer, batches, own corpora."""
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

import numpy as np
import pytest
import torch

import data
import runtime
from data import (
    CLAUSES, COLOURS, COUNTS, EVAL_SENTENCES, FAMILIES, GLUE, HELD_OUT_CLAUSES, HELD_OUT_WHOLE, INVERSE, NOUNS, PAD,
    PARTICIPLES, PREPOSITIONS, SHAPES, SIZES, SPECIALS, SYMMETRIC, TYPES, VERBS, WHOLE, Scene, Thing, Tokenizer,
    canonical, counterfactual, graph, graph_f1, meaning, normalize, parse, render, sample_scene, split_of, token_types)

ROOT = Path(__file__).parent
BOS, EOS, PARA = 1, 2, 3
SWAP = 1 + FAMILIES.index('argument swap')               # its place among the variants


# ---- renderer and checker -------------------------------------------------------------------------------------------

def renderings(scene, rand):
    """Every kind of sentence that a scene has."""
    yield from (canonical(scene, rand) for _ in range(2))
    yield from (render(scene, rand) for _ in range(6))
    yield from (render(scene, rand, HELD_OUT_CLAUSES, HELD_OUT_WHOLE) for _ in range(3))


@pytest.mark.parametrize('complexity', [1, 2, 3])
def test_checker_reads_every_rendering_back(complexity):
    rand = random.Random(complexity).random
    for _ in range(250):
        scene = sample_scene(rand, complexity)
        assert len(scene.things) == complexity + 1 and len(scene.relations) == complexity
        for text in renderings(scene, rand):
            assert text == normalize(text), 'the renderer writes the plain form'
            read = parse(text)
            assert read and graph(read) == graph(scene), (text, scene, read)


def check_family(family, scene, changed):
    """`changed` is `scene` with exactly what its family names changed, thing by thing and relation by relation."""
    things = [(a, b) for a, b in zip(scene.things, changed.things, strict=True) if a != b]
    relations = [(a, b) for a, b in zip(scene.relations, changed.relations, strict=True) if a != b]
    if family in ('colour', 'shape', 'count'):
        (a, b), = things
        assert not relations and a._replace(**{family: getattr(b, family)}) == b
    elif family == 'relation':
        (a, b), = relations
        assert not things and a[1:] == b[1:] and a[0] != b[0]
    elif family == 'argument swap':
        (a, b), = relations
        assert not things and b == (a[0], a[2], a[1]) and a[0] not in SYMMETRIC
    else:
        (a, b), (c, d) = things
        assert not relations and b == a._replace(colour=c.colour) and d == c._replace(colour=a.colour)
        assert Counter(t.colour for t in scene.things) == Counter(t.colour for t in changed.things)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('complexity', [1, 2, 3])
def test_counterfactuals_mean_something_else_and_change_what_they_say(family, complexity):
    rand = random.Random(f'{family} {complexity}').random
    found = 0
    for _ in range(150):
        scene = sample_scene(rand, complexity)
        changed = counterfactual(scene, family, rand)
        if changed is None:
            continue
        found += 1
        check_family(family, scene, changed)
        for text in itertools.islice(renderings(changed, rand), 1, 10, 3):          # canonical, free, free and held-out
            read = parse(text)
            assert read and graph(read) == graph(changed) != graph(scene)
            assert meaning(read) == meaning(changed) != meaning(scene)
            assert graph_f1(scene, read) < 1
    assert found > 75


def test_argument_swap_needs_a_direction():
    rand = random.Random(0).random
    for relation in SYMMETRIC:
        scene = Scene((Thing(1, '', 'red', 'cube'), Thing(1, '', 'blue', 'ball')), ((relation, 0, 1),))
        assert all(counterfactual(scene, 'argument swap', rand) is None for _ in range(20))


SAME = (               # written by hand: in each row everything means the same, and no two rows do
    ('a red cube is on a blue ball', 'the crimson block sits atop one azure sphere', 'a blue ball supports a red cube',
     'beneath the scarlet die is a single cobalt orb', 'a red cube is held up by a blue ball',
     'a blue ball with a red cube upon it', 'a red cube and a blue ball the first resting on the second',
     'what is underneath a red cube is a blue ball', 'it is a blue ball that is topped by a red cube',
     'See a blue ball, and on top of it a red cube.'),
    ('a blue ball is on a red cube', 'an azure ball tops a red cube', 'a red cube is under a blue ball'),
    ('a red cube is above a blue ball', 'a blue ball is overhung by a red cube',
     'a blue ball is lower than a red cube'),
    ('two red cubes are on a blue ball', 'a pair of red dice lie on a blue ball', '2 red blocks rest upon a blue ball'),
    ('a red cube is left of a blue ball', 'to the right of a red cube stands a blue sphere'),
    ('a small red cube is left of a blue ball', 'a tiny red cube is on the left side of the blue ball'),
    ('a gray ring is inside a box', None),               # a box of no colour is no thing
    ('a gray ring is inside a white box', 'an ivory crate contains a grey hoop',
     'a snowy chest surrounds an ashen torus',
     'a gray ring is enclosed by a white box', 'a white box has a gray ring in it',
     'a white box is around a gray ring'),
    ('a red cube is in front of a blue ball', 'a blue ball follows a red cube', 'a red cube precedes a blue ball',
     'a blue ball is preceded by a red cube', 'a red cube is followed by a blue ball',
     'behind a red cube is a blue ball'),
    ('a red cube is next to a blue ball', 'a blue ball is beside a red cube',
     'a blue ball and a red cube are alongside each other', 'the picture shows a red cube adjacent to a blue ball'),
    ('a red cube is far from a blue ball', 'a blue ball is nowhere near a red cube'),
    ('a red cube is on a blue ball and the blue ball is on a green cone',
     'a blue ball sits atop a green cone while the blue ball supports a red cube',
     'a red cube is on a blue ball which is on a green cone',
     'under a red cube is a blue ball which is on a green cone'),
    ('a red cube is on a blue ball and the red cube is on a green cone',
     'a blue ball is under a red cube which is on a green cone'))


def test_checker_on_sentences_written_by_hand():
    meanings = [{parse(text) and meaning(parse(text)) for text in row if text} for row in SAME]
    assert all(len(group) == 1 for group in meanings), [row for row, group in zip(SAME, meanings) if len(group) > 1]
    assert len(set.union(*meanings)) == len(SAME)
    assert [row for row, group in zip(SAME, meanings) if None in group] == [SAME[6]]


@pytest.mark.parametrize('broken, sound', [
    ('a red cube is on a blue zebra', 'a red cube is on a blue ball'),                       # unknown word
    ('a red cube is not on a blue ball', 'a red cube is on a blue ball'),
    ('two red cube are on a blue ball', 'two red cubes are on a blue ball'),                 # number
    ('a red cubes is on a blue ball', 'a red cube is on a blue ball'),
    ('the two red cube are on a blue ball', 'the two red cubes are on a blue ball'),
    ('the red cubes are on a blue ball', 'the three red cubes are on a blue ball'),          # how many?
    ('the cubes are on a blue ball', 'the two red cubes are on a blue ball'),
    ('a red is on a blue ball', 'a red cube is on a blue ball'),                             # broken noun phrases
    ('a red cube is on a blue', 'a red cube is on a blue ball'),
    ('a cube is on a blue ball', 'a red cube is on a blue ball'),
    ('red cube is on a blue ball', 'the red cube is on a blue ball'),
    ('a red blue cube is on a blue ball', 'a red cube is on a blue ball'),
    ('a red red cube is on a blue ball', 'a red cube is on a blue ball'),
    ('a small large red cube is on a blue ball', 'a large red cube is on a blue ball'),
    ('two the red cubes are on a blue ball', 'the two red cubes are on a blue ball'),
    ('a two red cubes are on a blue ball', 'two red cubes are on a blue ball'),
    ('a red is cube on a blue ball', 'a red cube is on a blue ball'),
    ('a red cube is on', 'a red cube is on a blue ball'),                                    # relations that dangle
    ('on a blue ball', 'on a blue ball is a red cube'),
    ('a red cube is a blue ball', 'a red cube is on a blue ball'),
    ('a red cube is on on a blue ball', 'a red cube is on a blue ball'),
    ('a red cube is on a blue ball and on', 'a red cube is on a blue ball'),
    ('a red cube is on a blue ball and a green cone',
     'a red cube is on a blue ball and a green cone is on the blue ball'),
    ('a red cube and a blue ball are on each other', 'a red cube and a blue ball are beside each other'),
    ('a red cube is on it', 'a blue ball with a red cube on it'),
    ('which is on a blue ball', 'a red cube is on a green cone which is on a blue ball'),
    ('a red cube is on a crimson block', 'a red cube is on a crimson ball'),                 # on itself
    ('a red cube is on a blue ball and two red cubes are under a green cone',                # contradictory mentions
     'two red cubes are on a blue ball and the two red cubes are under a green cone'),
    ('a red cube is on a blue ball and the tiny red cube is under a green cone',
     'a tiny red cube is on a blue ball and the tiny red cube is under a green cone'),
    ('there is a red cube', 'there is a red cube on a blue ball'),
    ('', 'a red cube is on a blue ball')])
def test_checker_refuses_broken_sentences(broken, sound):
    assert parse(broken) is None
    assert parse(sound) is not None


def test_graph_f1():
    def f1(a, b):
        return graph_f1(parse(a), parse(b))
    red_on_blue = 'a red cube is on a blue ball'
    assert f1(red_on_blue, red_on_blue) == 1
    assert f1(red_on_blue, 'the azure sphere supports one crimson die') == 1                 # inverse
    assert f1('a red cube is beside a blue ball', 'a blue ball and a red cube are next to each other') == 1   # symmetry
    assert f1(red_on_blue, 'a blue ball is on a red cube') == pytest.approx(2 / 3)           # both things, no relation
    assert f1(red_on_blue, 'a red cube is above a blue ball') == pytest.approx(2 / 3)
    assert f1(red_on_blue, 'two red cubes are on a blue ball') == pytest.approx(2 / 3)       # one thing, the relation
    assert f1(red_on_blue, 'a green cube is on a blue ball') == pytest.approx(1 / 3)         # one thing
    assert f1(red_on_blue, 'a green ring is on a pink cone') == 0
    assert f1(red_on_blue, f'{red_on_blue} and the red cube is on the blue ball') == pytest.approx(6 / 7)   # twice
    assert f1(red_on_blue, f'{red_on_blue} which is on a green cone') == pytest.approx(6 / 8)
    assert f1(red_on_blue, 'a red cube is on') == 0 == graph_f1(None, None)


# ---- breadth --------------------------------------------------------------------------------------------------------

def relation_phrases():
    """(relation, phrase) of the three tables."""
    for relation in PREPOSITIONS:
        verbs = (form for pair in VERBS.get(relation, ()) for form in pair)
        for phrase in (*PREPOSITIONS[relation], *PARTICIPLES.get(relation, ()), *verbs):
            yield relation, phrase


def test_lexicon_is_broad():
    assert len(COLOURS) >= 10 and len(SHAPES) >= 7 and len(PREPOSITIONS) >= 10
    for words in (*COLOURS.values(), *SHAPES.values()):
        assert len(set(words)) >= 3
    phrases = Counter(relation for relation, _ in set(relation_phrases()))
    assert set(phrases) == set(INVERSE) and min(phrases.values()) >= 4
    assert all(INVERSE[INVERSE[r]] == r and (INVERSE[r] == r) == (r in SYMMETRIC) for r in INVERSE)
    assert len({*CLAUSES, *WHOLE}) >= 20
    assert not {*CLAUSES, *WHOLE} & {*HELD_OUT_CLAUSES, *HELD_OUT_WHOLE}


def test_no_word_belongs_to_two_classes():
    classes = [{word for words in table.values() for phrase in words for word in phrase.split()}
               for table in (COLOURS, NOUNS, SIZES)]
    classes.append({word for _, phrase in relation_phrases() for word in phrase.split()}
                   | {word for phrase in (*GLUE, *itertools.chain(*COUNTS.values())) for word in phrase.split()})
    for a, b in itertools.combinations(classes, 2):
        assert not a & b
    for table in (COLOURS, SHAPES, SIZES, NOUNS):                       # crimson is red only, a crate a box only
        words = [word for words in table.values() for word in set(words)]
        assert len(words) == len(set(words)) or table is NOUNS
    assert all(set(NOUNS[1, a]).isdisjoint(NOUNS[n, b]) for a in SHAPES for b in SHAPES for n in (2, 3))
    phrases = Counter(phrase for _, phrase in set(relation_phrases()))
    assert max(phrases.values()) == 1 and not phrases.keys() & set(GLUE)


@pytest.mark.parametrize('typed, plain', [
    ('A Red Cube is on a Blue Ball.', 'a red cube is on a blue ball'),
    ('  a  red\tcube is\non a blue ball ', 'a red cube is on a blue ball'),
    ('A red cube, on a blue ball!', 'a red cube on a blue ball'),
    ('An orange disc is under AN azure ball', 'a orange disc is under a azure ball'),
    ('"a red_cube"; (on) a: blue-ball?', 'a red cube on a blue ball'),
    ('Ünïcödé 2 ÉTÉ', 'ünïcödé 2 été'), ('banana an', 'banana a'), (' .,! ', ''), ('', '')])
def test_normalize(typed, plain, tokenizer):
    assert normalize(typed) == plain == normalize(plain)
    assert tokenizer.encode(typed) == tokenizer.encode(plain)


# ---- a small corpus -------------------------------------------------------------------------------------------------

CONFIG = {'corpus': '', 'num_scenes': 200, 'complexity': 1, 'simple_share': 0.5, 'data_seed': 0, 'vocab_size': 1024,
          'max_length': 64}


def arrays_of(folder, split):
    """What the files of a split hold, sentence by sentence: tokens (S, F, R, T) and lengths (S, F, R), 0 where none."""
    a = {name: np.fromfile(folder / f'{split}.{name}', kind) for name, kind in data.ARRAYS.items()}
    first, count, meanings = (a[name].reshape(-1, len(data.VARIANTS)) for name in ('first', 'count', 'meanings'))
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
        self.corpora, self.tokenizer = data.load(config)
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
        assert tokens.shape[:3] == lengths.shape == (S, len(data.VARIANTS), 6) and tokens.shape[3] % 8 == 0
        assert tokens.shape[3] - 8 < lengths.max() <= tokens.shape[3]
        assert set(np.unique(count)) == {0, 6} and (count[:, 0] == 6).all()
        for family in range(1, len(data.VARIANTS)):
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
        for f in range(1, len(data.VARIANTS)):
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
        novel = [any((t.colour, t.shape) in data.HELD_OUT_PAIRS for t in scene.things) for scene in scenes]
        assert all(novel) if split == 'composition' else not any(novel)
        home = 'train' if split == 'train' else 'held-out'
        changed = (data.allowed_counterfactual(scene, family, rand, home) for scene in scenes for family in FAMILIES)
        found[split] = {meaning(scene) for scene in (*scenes, *filter(None, changed))}
        assert len(found[split]) > 3 * n
    assert not found['train'] & (found['val'] | found['composition'])


def canonical_direction(scene):
    """A parsed scene as sample_scene() draws them: split_of() looks at the names of the relations."""
    relations = tuple((r, i, j) if r in data.CANONICAL else (INVERSE[r], j, i) for r, i, j in scene.relations)
    return scene._replace(relations=relations)


def test_a_scene_and_its_swaps_stay_on_one_side():
    rand = random.Random(1).random
    seen = Counter()
    for _ in range(1500):
        scene = sample_scene(rand, 1 + int(2 * rand()))
        for family in ('argument swap', 'attribute swap'):
            changed = counterfactual(scene, family, rand)
            if changed:
                seen[frozenset((split_of(scene), split_of(changed)))] += 1
    assert seen[frozenset(['train'])] > 500 and seen[frozenset(['val'])] > 50
    assert all('train' not in pair or pair <= {'train', None} for pair in seen), seen
    for sentence in EVAL_SENTENCES:
        scene = canonical_direction(parse(sentence))
        for changed in (scene, *(counterfactual(scene, f, rand) for f in FAMILIES[4:])):
            assert changed is None or split_of(changed) != 'train', sentence


def test_new_compositions_are_new(prepared):
    assert len(data.HELD_OUT_PAIRS) == len(SHAPES) == len({shape for _, shape in data.HELD_OUT_PAIRS})
    words = {(colour, noun) for c, s in data.HELD_OUT_PAIRS for colour in COLOURS[c]
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
                assert {name for name, _, _ in parse(line).relations} <= set(data.CANONICAL), line
        directions = [name in data.CANONICAL for (_, _, r), line in lines.items() if r >= 2
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


def test_meaning_ids_are_the_oracle_of_false_negatives():
    rand = random.Random(2).random
    for n in range(100):
        scene = sample_scene(rand, 1 + n % 3)
        a, b = parse(render(scene, rand)), parse(render(scene, rand, HELD_OUT_CLAUSES, HELD_OUT_WHOLE))
        assert meaning(a) == meaning(b) == meaning(scene) and 0 < meaning(a) < 2 ** 63
        order = sorted(range(len(scene.things)), key=lambda _: rand())                   # the same, in another order
        moved = Scene(tuple(scene.things[k] for k in order), tuple(
            (INVERSE[r], order.index(j), order.index(i)) for r, i, j in reversed(scene.relations)))
        assert meaning(moved) == meaning(scene)
    swapped = counterfactual(parse('a red cube is on a blue ball'), 'argument swap', rand)
    assert meaning(swapped) == meaning(parse('a blue ball is on a red cube'))            # another scene's id
    assert meaning(swapped) == meaning(parse('one crimson block carries the azure orb'))


# ---- tokenizer ------------------------------------------------------------------------------------------------------

def unicode_texts():
    rand = random.Random(7)
    ranges = [(0, 127), (0, 0x2FF), (0x370, 0x5FF), (0x900, 0xDFF), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (0, 0xD7FF)]
    for n in range(300):
        low, high = ranges[n % len(ranges)]
        yield ''.join(chr(rand.randint(low, high)) for _ in range(rand.randint(0, 25)))
    yield from ('ein großer Würfel', 'красный куб', 'कमल', '赤い立方体', 'x² + ½ = Ⅷ', 'İstanbul', '🟥 on 🔵',
                '\ud800', 'a\0b\r\nc\x85d')


def test_nets_that_learnt_other_token_ids_are_refused(tokenizer, capsys):
    runtime.check_tokenizer(tokenizer, {'extra': {'tokenizer': tokenizer.state()}})
    with pytest.raises(SystemExit) as stop:
        runtime.check_tokenizer(tokenizer, {'extra': {'tokenizer': tokenizer.state()[:-1]}})
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
    variants = torch.randint(len(data.VARIANTS), (500,), generator=generator)
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
    splits, tokenizer = data.load(config)
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
    corpus = data.load(config)[0]['train']
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
        splits, tokenizer = data.load(config)
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

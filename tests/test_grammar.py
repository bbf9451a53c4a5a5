"""Tests of grammar.py: the checker against the renderer, counterfactuals, the lexicon, what a split is decided by."""
import itertools
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from grammar import (
    CANONICAL, CLAUSES, COLOURS, COUNTS, EVAL_SENTENCES, FAMILIES, GLUE, HELD_OUT_CLAUSES, HELD_OUT_WHOLE, INVERSE,
    NOUNS, PARTICIPLES, PREPOSITIONS, SHAPES, SIZES, SYMMETRIC, TYPES, VERBS, WHOLE, Scene, Thing,
    allowed_counterfactual, canonical, counterfactual, graph, graph_f1, meaning, normalize, parse, render, sample_scene,
    split_of, word_concepts)

ROOT = Path(__file__).parent.parent


def test_scenes_and_sentences_need_no_torch():
    """What only checks sentences starts in a moment: neither torch nor numpy comes with it."""
    done = subprocess.run([sys.executable, '-c', 'import sys, grammar; print(*sys.modules)'], cwd=ROOT, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert 'grammar' in loaded and not {'torch', 'numpy', 'data', 'runtime'} & set(loaded)


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
    ('Ünïcödé 2 ÉTÉ', 'ünïcödé 2 été'), ('हिन्दी में, लिखो।', 'हिन्दी में लिखो'), ('a cafe\u0301!', 'a cafe\u0301'),
    ('I \u2764\ufe0f you', 'i you'), ('banana an', 'banana a'), (' .,! ', ''), ('', '')])
def test_normalize(typed, plain):
    assert normalize(typed) == plain == normalize(plain)


def test_words_that_mean_the_same_are_one_concept():
    concepts = word_concepts()
    assert {kind for kind, _ in concepts.values()} == set(TYPES[1:])
    for kind, table in (('colour', COLOURS), ('shape', SHAPES)):
        for name, words in table.items():
            assert {concepts[word] for word in words} == {(kind, name)}
    assert concepts['cubes'] == concepts['dice'] == ('shape', 'cube')
    assert concepts['a'] == concepts['one'] == ('count', 1) and concepts['pair'] == concepts['2'] == ('count', 2)
    assert concepts['beneath'] == concepts['supports'] == ('relation', 'under') != concepts['on']
    assert not concepts.keys() & {'the', 'is', 'are', 'and', 'there', 'that', 'of', 'to'}


# ---- meaning and splits ---------------------------------------------------------------------------------------------

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


def canonical_direction(scene):
    """A parsed scene as sample_scene() draws them: split_of() looks at the names of the relations."""
    relations = tuple((r, i, j) if r in CANONICAL else (INVERSE[r], j, i) for r, i, j in scene.relations)
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


def test_allowed_counterfactuals_stay_on_their_side():
    rand = random.Random(4).random
    seen = Counter()
    for n in range(300):
        scene = sample_scene(rand, 1 + n % 3)
        for home, sides in (('train', {'train'}), ('held-out', {'val', 'composition'})):
            for family in FAMILIES:
                changed = allowed_counterfactual(scene, family, rand, home)
                if changed:
                    seen[home] += 1
                    assert split_of(changed) in sides and graph(changed) != graph(scene)
    assert min(seen['train'], seen['held-out']) > 300

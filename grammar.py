"""P0 · Scenes, the words for them, sentences, counterfactuals, and a checker that reads a sentence back.

A scene is a few coloured things and directed relations between them. A renderer says a scene in many ways
(paraphrases) and says a slightly different scene (counterfactuals); a checker, written against the lexicon and not
against the renderer, reads a sentence back into its scene. Nothing here needs torch: data.py turns it into arrays.

    >>> import grammar, random
    >>> scene = grammar.parse('two red cubes are on a blue ball')
    >>> grammar.render(scene, random.Random(0).random)
    >>> grammar.render(grammar.counterfactual(scene, 'argument swap', random.random), random.random)
"""
import hashlib
import itertools
import re
import unicodedata
import zlib
from collections import Counter
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# Lexicon. The first word of a tuple is the canonical one. No word belongs to two classes.

COLOURS = {
    'red': ('red', 'crimson', 'scarlet'), 'blue': ('blue', 'azure', 'cobalt'), 'green': ('green', 'emerald', 'jade'),
    'yellow': ('yellow', 'golden', 'lemon'), 'orange': ('orange', 'amber', 'tangerine'),
    'purple': ('purple', 'violet', 'plum'), 'black': ('black', 'ebony', 'inky'), 'white': ('white', 'ivory', 'snowy'),
    'brown': ('brown', 'chestnut', 'chocolate'), 'pink': ('pink', 'rosy', 'salmon'), 'gray': ('gray', 'grey', 'ashen'),
    'cyan': ('cyan', 'turquoise', 'teal')}
SHAPES = {
    'cube': ('cube', 'block', 'die'), 'ball': ('ball', 'sphere', 'orb'), 'pyramid': ('pyramid', 'tetrahedron', 'spire'),
    'cylinder': ('cylinder', 'drum', 'tube'), 'cone': ('cone', 'funnel', 'horn'), 'ring': ('ring', 'hoop', 'torus'),
    'box': ('box', 'crate', 'chest'), 'disc': ('disc', 'plate', 'coin')}
PLURALS = {'die': 'dice', 'box': 'boxes', 'torus': 'toruses'}          # every other plural takes an s
SIZES = {'': ('',), 'small': ('small', 'little', 'tiny'), 'large': ('large', 'big', 'huge')}
COUNTS = {1: ('a', 'a', 'the', 'one', 'a single'), 2: ('two', 'two', 'the two', 'a pair of', '2'),
          3: ('three', 'three', 'the three', 'a trio of', '3')}
AGAIN = {1: 'the', 2: 'the two', 3: 'the three'}                       # the same things, mentioned a second time

PREPOSITIONS = {       # "{a} is {preposition} {b}"
    'on': ('on', 'on top of', 'atop', 'resting on', 'upon'),
    'under': ('under', 'beneath', 'underneath', 'directly under'),
    'above': ('above', 'over', 'higher than', 'up above'),
    'below': ('below', 'lower than', 'down below', 'a step below'),
    'left': ('left of', 'to the left of', 'on the left of', 'on the left side of'),
    'right': ('right of', 'to the right of', 'on the right of', 'on the right side of'),
    'front': ('in front of', 'before', 'ahead of', 'on the near side of'),
    'behind': ('behind', 'in back of', 'at the back of', 'on the far side of'),
    'inside': ('inside', 'in', 'within', 'inside of'),
    'around': ('around', 'all around', 'wrapped around', 'on the outside of'),
    'next': ('next to', 'beside', 'alongside', 'adjacent to'),
    'far': ('far from', 'far away from', 'a long way from', 'nowhere near')}
VERBS = {              # "{a} {verb} {b}", singular and plural
    'under': (('supports', 'support'), ('holds up', 'hold up'), ('carries', 'carry')),
    'on': (('tops', 'top'), ('rests upon', 'rest upon')),
    'around': (('contains', 'contain'), ('encloses', 'enclose'), ('surrounds', 'surround')),
    'behind': (('follows', 'follow'),), 'front': (('precedes', 'precede'),),
    'above': (('overhangs', 'overhang'),)}
PARTICIPLES = {        # "{a} is {participle} {b}", the passive
    'on': ('supported by', 'held up by', 'carried by'), 'under': ('topped by',), 'behind': ('preceded by',),
    'front': ('followed by',), 'inside': ('contained by', 'enclosed by', 'surrounded by'), 'below': ('overhung by',)}
INVERSE = {'on': 'under', 'above': 'below', 'left': 'right', 'front': 'behind', 'inside': 'around'}
INVERSE |= {b: a for a, b in INVERSE.items()} | {'next': 'next', 'far': 'far'}
SYMMETRIC = ('next', 'far')
CANONICAL = ('on', 'above', 'left', 'front', 'inside', 'next', 'far')  # one direction of each relation

# Sentence patterns. {is}, {sits}, {verb} agree with the thing that they follow; {it} stands for b.
CLAUSES = (            # full clauses: two of them can be joined by "and"
    '{a} {is} {r} {b}', '{a} {sits} {r} {b}', '{a} {is} located {r} {b}', '{a} can be seen {r} {b}',
    'there {is} {a} {r} {b}', 'there {is} {a} that {is} {r} {b}', '{r} {b} {is} {a}', '{r} {b} {sits} {a}',
    '{b} {has} {a} {r} {it}', '{a} {verb} {b}', '{a} {verb} {b}', '{a} {is} {participle} {b}',
    '{a} {is} {participle} {b}', 'there {is} {a} {participle} {b}', 'i see {a} {r} {b}', 'you can find {a} {r} {b}',
    'here {is} {a} {r} {b}')
WHOLE = (              # only as a whole sentence
    '{a} {r} {b}', 'look at {a} {r} {b}', '{b} with {a} {r} {it}', 'see {b} and {r} {it} {a}',
    '{a} and {b} the first {r} the second', '{b} and {a} the second {r} the first', '{a} and {b} are {r} each other')
HELD_OUT_CLAUSES = ('{r} {b} there {is} {a}', 'the picture shows {a} {r} {b}', '{r} {b} we can see {a}')
HELD_OUT_WHOLE = ('it is {a} that {is} {r} {b}', 'what is {r} {b} is {a}')
JOINS = (' and ', ' while ', ' and ')
POSTURES = (('sits', 'sit'), ('stands', 'stand'), ('lies', 'lie'))

FAMILIES = ('colour', 'shape', 'relation', 'count', 'argument swap', 'attribute swap')
VARIANTS = ('scene',) + FAMILIES        # what the second axis of the corpus arrays holds


class Thing(NamedTuple):
    count: int                          # 1 to 3
    size: str                           # '', 'small' or 'large'
    colour: str
    shape: str


class Scene(NamedTuple):
    things: tuple[Thing, ...]           # pairwise distinct in (colour, shape), so that "the red cube" refers
    relations: tuple[tuple[str, int, int], ...]   # (canonical relation, subject, object), indices into things


# ---------------------------------------------------------------------------------------------------------------------
# Meaning, splits, counterfactuals

def graph(scene):
    """(things, relations) as sorted tuples free of order, inverse and symmetry: equal graphs mean the same."""
    names = [(t.colour, t.shape) for t in scene.things]
    relations = []
    for relation, i, j in scene.relations:
        if relation not in CANONICAL:
            relation, i, j = INVERSE[relation], j, i
        if relation in SYMMETRIC and names[j] < names[i]:
            i, j = j, i
        relations.append((relation, names[i], names[j]))
    return tuple(sorted(scene.things)), tuple(sorted(relations))


def meaning(scene):
    """63-bit id of the scene's graph, the same in every process: equal ids are the oracle for false negatives."""
    digest = hashlib.blake2b(repr(graph(scene)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def orbit(scene):
    """What argument swap and attribute swap leave unchanged. Splitting by it keeps a scene and its swaps together."""
    counts, sizes, colours, shapes = (tuple(sorted(column)) for column in zip(*scene.things))
    return repr((counts, sizes, colours, shapes, sorted(relation for relation, _, _ in scene.relations)))


def held_out_pair(thing):
    """One colour of each shape is never seen in training: eight compositions of ninety-six."""
    return (list(COLOURS).index(thing.colour) + 5 * list(SHAPES).index(thing.shape)) % 12 == 0


HELD_OUT_PAIRS = {(c, s) for c in COLOURS for s in SHAPES if held_out_pair(Thing(1, '', c, s))}


def split_of(scene):
    """'train', 'val' (new scenes) or 'composition' (new colour-shape pairs), or None: belongs to no split."""
    text = orbit(scene)
    held_out = zlib.crc32(text.encode()) % 100 >= 85 or text in pack_orbits()
    novel = any((t.colour, t.shape) in HELD_OUT_PAIRS for t in scene.things)
    return ('composition' if novel else 'val') if held_out else (None if novel else 'train')


def sample_scene(rand, complexity):
    """A random scene: complexity + 1 things, `complexity` relations that connect them all."""
    things, names = [], set()
    while len(things) <= complexity:
        # Sizes come in with the third thing: two things are told apart without them.
        size = pick(('small', 'large'), rand) if complexity > 1 and rand() < 0.15 else ''
        thing = Thing(pick((1, 1, 2, 3), rand), size, pick(COLOUR_NAMES, rand), pick(SHAPE_NAMES, rand))
        if thing[2:] not in names:
            things.append(thing)
            names.add(thing[2:])
    relations = []
    for new in range(1, complexity + 1):                     # each thing is tied to an earlier one: a random tree
        ends = (new, int(rand() * new)) if rand() < 0.5 else (int(rand() * new), new)
        relations.append((pick(RELATION_DRAW, rand), *ends))
    return Scene(tuple(things), tuple(relations))


def counterfactual(scene, family, rand):
    """The scene with exactly one thing changed, or None where the family cannot apply (a symmetric relation has no
    argument swap). The result may equal another scene of the corpus but never `scene` itself."""
    things, relations = list(scene.things), list(scene.relations)
    i, r = int(rand() * len(things)), int(rand() * len(relations))
    if family == 'colour':
        things[i] = things[i]._replace(colour=pick(COLOUR_NAMES, rand))
    elif family == 'shape':
        things[i] = things[i]._replace(shape=pick(SHAPE_NAMES, rand))
    elif family == 'count':
        things[i] = things[i]._replace(count=pick((1, 2, 3), rand))
    elif family == 'relation':
        relations[r] = (pick(CANONICAL, rand), *relations[r][1:])
    elif family == 'argument swap':
        directed = [k for k, (name, _, _) in enumerate(relations) if name not in SYMMETRIC]
        if not directed:
            return None
        r = pick(directed, rand)
        name, a, b = relations[r]
        relations[r] = (name, b, a)
    elif family == 'attribute swap':
        j = (i + 1 + int(rand() * (len(things) - 1))) % len(things)
        things[i], things[j] = (things[i]._replace(colour=things[j].colour),
                                things[j]._replace(colour=things[i].colour))
    changed = Scene(tuple(things), tuple(relations))
    distinct = len({t[2:] for t in things}) == len(things)
    return changed if distinct and graph(changed) != graph(scene) else None


def allowed_counterfactual(scene, family, rand, home, tries=12):
    """A counterfactual that stays on its own side of the train / held-out line, or None after `tries` draws."""
    for _ in range(1 if family == 'argument swap' and len(scene.relations) == 1 else tries):
        changed = counterfactual(scene, family, rand)
        if changed and (split_of(changed) == 'train' if home == 'train' else
                        split_of(changed) in ('val', 'composition')):
            return changed
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Renderer. `rand` is a random.Random().random; pick() with it is four times faster than random.choice.

def pick(options, rand):
    return options[int(rand() * len(options))]


COLOUR_NAMES, SHAPE_NAMES = tuple(COLOURS), tuple(SHAPES)
RELATION_DRAW = CANONICAL[:5] * 2 + SYMMETRIC      # directed relations twice as often: direction is the hard part
NOUNS = {(1, shape): words for shape, words in SHAPES.items()}
NOUNS |= {(n, s): tuple(PLURALS.get(w, w + 's') for w in words) for s, words in SHAPES.items() for n in (2, 3)}


def noun_phrase(thing, rand, again=False):
    count, size, colour, shape = thing
    determiner = AGAIN[count] if again else pick(COUNTS[count], rand)
    size = pick(SIZES[size], rand) + ' ' if size else ''
    return f'{determiner} {size}{pick(COLOURS[colour], rand)} {pick(NOUNS[count, shape], rand)}'


def render_clause(scene, relation, rand, patterns, mentioned=()):
    """One relation as a clause: a random pattern, said from either end of the relation."""
    while True:
        name, i, j = relation
        if rand() < 0.5:
            name, i, j = INVERSE[name], j, i
        pattern = pick(patterns, rand)
        if ('{verb}' in pattern and name not in VERBS or '{participle}' in pattern and name not in PARTICIPLES
                or 'each other' in pattern and name not in SYMMETRIC):
            continue
        a, b = scene.things[i], scene.things[j]
        plural = a.count > 1
        return pattern.format_map({
            'a': noun_phrase(a, rand, i in mentioned), 'b': noun_phrase(b, rand, j in mentioned),
            'r': pick(PREPOSITIONS[name], rand), 'is': 'are' if plural else 'is', 'sits': pick(POSTURES, rand)[plural],
            'has': 'have' if b.count > 1 else 'has', 'it': 'them' if b.count > 1 else 'it',
            'verb': pick(VERBS[name], rand)[plural] if name in VERBS else '',
            'participle': pick(PARTICIPLES[name], rand) if name in PARTICIPLES else ''})


def render(scene, rand, clauses=CLAUSES, whole=WHOLE):
    """A paraphrase: synonyms, determiners, voice, inverse, fronting and order of conjuncts all drawn at random."""
    if len(scene.relations) == 1:
        return render_clause(scene, scene.relations[0], rand, clauses + whole)
    relations = sorted(scene.relations, key=lambda _: rand())                      # conjunct shuffle
    text, mentioned, last = '', set(), -1
    for k, (name, i, j) in enumerate(relations):
        tail = text.split(' ')[-1] if k else ''
        if k and rand() < 0.3 and last in (i, j) and tail in NOUN_OF:              # "... a box which is left of ..."
            name, j = (name, j) if i == last else (INVERSE[name], i)
            be = 'are' if scene.things[last].count > 1 else 'is'
            text += f' which {be} {pick(PREPOSITIONS[name], rand)} {noun_phrase(scene.things[j], rand, j in mentioned)}'
        else:
            text += (pick(JOINS, rand) if k else '') + render_clause(scene, (name, i, j), rand, clauses, mentioned)
        mentioned |= {i, j}
        last = last_mentioned(text, scene)
    return text


def canonical(scene, rand):
    """Subject, preposition, object, in canonical direction; only synonyms and articles vary."""
    parts, mentioned = [], set()
    for relation, i, j in scene.relations:
        a, b = scene.things[i], scene.things[j]
        parts.append(f"{noun_phrase(a, rand, i in mentioned)} {'are' if a.count > 1 else 'is'} "
                     f'{pick(PREPOSITIONS[relation], rand)} {noun_phrase(b, rand, j in mentioned)}')
        mentioned |= {i, j}
    return ' and '.join(parts)


COLOUR_OF = {word: name for name, words in COLOURS.items() for word in words}
NOUN_OF = {word: (shape, number > 1) for (number, shape), words in NOUNS.items() for word in words}
SIZE_OF = {word: name for name, words in SIZES.items() for word in words if word}


def last_mentioned(text, scene):
    """Index of the thing whose noun ends the text, or -1: what a following "which" would refer to."""
    words = text.split(' ')
    if words[-1] not in NOUN_OF:
        return -1
    name = (COLOUR_OF[words[-2]], NOUN_OF[words[-1]][0])
    return [t[2:] for t in scene.things].index(name)


def normalize(text):
    """Text as people type it -> the plain form that everything here reads and writes: lower case, no punctuation,
    single spaces, "an" as "a". Marks that belong to a letter, as in the scripts of India, stay."""
    words = re.sub(r"[^\w\s]|_", lambda mark: mark[0] if unicodedata.category(mark[0])[0] == 'M' else ' ',
                   text.lower()).split()
    return ' '.join('a' if word == 'an' else word for word in words if any(map(str.isalnum, word)))


# ---------------------------------------------------------------------------------------------------------------------
# Checker: words -> tags (longest phrase first) -> events -> relations, by a small table of clause forms. It knows the
# lexicon and English word order; it does not know the renderer's patterns.

GLUE = ('there is', 'there are', 'it is', 'here is', 'here are', 'what is', 'i see', 'we can see', 'you can find',
        'the picture shows', 'can be seen', 'look at', 'located', 'see', 'there', 'is', 'are', 'has', 'have', 'with',
        'that', 'and', 'while', 'sits', 'sit', 'stands', 'stand', 'lies', 'lie')
FORMS = {              # events of a clause -> (subject, object) as positions among its noun phrases
    'NRN': (0, 1),     # a is on b
    'RNN': (1, 0),     # on b is a
    'NNRi': (1, 0),    # b has a on it
    'NRiN': (1, 0),    # see b and on it a
    'NNfRs': (0, 1),   # a and b, the first on the second
    'NNsRf': (1, 0),   # b and a, the second on the first
    'NNRe': (0, 1),    # a and b are beside each other
    'wRN': (-1, 0)}    # ... b which is on c: the subject is the noun phrase before "which"


def _phrases():
    tags = {('the',): ('the', 0)} | {(w,): ('number', n) for w, n in
            (('a', 1), ('one', 1), ('two', 2), ('2', 2), ('three', 3), ('3', 3))}
    tags |= {('a', 'single'): ('number', 1), ('a', 'pair', 'of'): ('number', 2), ('a', 'trio', 'of'): ('number', 3)}
    tags |= {tuple(g.split()): ('glue', 0) for g in GLUE} | {(w,): ('i', 0) for w in ('it', 'them')}
    tags |= {('the', 'first'): ('f', 0), ('the', 'second'): ('s', 0), ('each', 'other'): ('e', 0), ('which',): ('w', 0)}
    tags |= {(w,): ('colour', c) for w, c in COLOUR_OF.items()} | {(w,): ('noun', n) for w, n in NOUN_OF.items()}
    tags |= {(w,): ('size', s) for w, s in SIZE_OF.items()}
    for table in (PREPOSITIONS, PARTICIPLES, {r: sum(forms, ()) for r, forms in VERBS.items()}):
        tags |= {tuple(phrase.split()): ('R', relation) for relation, words in table.items() for phrase in words}
    return tags


PHRASES = _phrases()
LONGEST = max(map(len, PHRASES))


def parse(text):
    """Sentence -> Scene, or None where the words are unknown, a noun phrase is broken or does not agree in number, a
    clause is incomplete, or two mentions of a thing contradict each other. Relations come as said, not as canonical."""
    words, tags, at = normalize(text).split(), [], 0
    while at < len(words):
        for n in range(min(LONGEST, len(words) - at), 0, -1):
            tag = PHRASES.get(tuple(words[at:at + n]))
            if tag:
                break
        else:
            return None
        tags.append(tag)
        at += n
    things, relations, form, nouns, relation, previous = {}, [], '', [], None, None
    size, colour, number, determined = '', None, 0, False
    for kind, value in tags:
        if kind not in ('the', 'number', 'size', 'colour', 'noun') and (size or colour or determined):
            return None                                          # a noun phrase was broken off
        if kind in ('the', 'number'):
            if colour or size or number or (determined and kind == 'the'):
                return None                                      # "the two" is the only pair, in this order
            determined, number = True, value or number
        elif kind == 'size' and not size:
            size = value
        elif kind == 'colour' and not colour:
            colour = value
        elif kind in ('size', 'colour'):
            return None                                          # "a red blue cube"
        elif kind == 'noun':
            shape, plural = value
            if not colour or not determined or ((number or (2 if plural else 1)) > 1) != plural:
                return None
            if plural and not number:
                return None                                      # "the cubes": how many?
            thing = Thing(number or 1, size, colour, shape)
            if things.setdefault(thing[2:], thing) != thing:
                return None
            nouns.append(thing[2:])
            form += 'N'
            size, colour, number, determined = '', None, 0, False
        elif kind == 'glue':
            continue
        else:
            if kind == 'w' and form:
                return None
            form += kind
            relation = value if kind == 'R' else relation
        if form in FORMS:
            subject, object_ = FORMS[form]
            a, b = (previous if subject < 0 else nouns[subject]), nouns[object_]
            if a is None or a == b or (form == 'NNRe' and relation not in SYMMETRIC):
                return None
            relations.append((relation, a, b))
            previous, form, nouns = nouns[-1], '', []
    if form or determined or size or colour or not relations:
        return None
    index = {name: k for k, name in enumerate(things)}
    return Scene(tuple(things.values()), tuple((r, index[a], index[b]) for r, a, b in relations))


def graph_f1(scene, other):
    """F1 over the items of two graphs: whole things (count, size, colour, shape) and relations between named things, up
    to inverse and symmetry. None (unreadable) scores 0."""
    if scene is None or other is None:
        return 0.0
    a, b = (Counter(things) + Counter(relations) for things, relations in (graph(scene), graph(other)))
    return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values()))


# The sixteen sentences of every montage, neighbours being each other's counterfactuals; the second and the fifth mean
# the same. Their orbits are held out.
EVAL_SENTENCES = (
    'a red cube is on a blue ball', 'a blue ball is on a red cube', 'a blue cube is on a red ball',
    'two red cubes are on a blue ball', 'a red cube is under a blue ball', 'a red cube is left of a blue ball',
    'a green ring is inside a white box', 'a white box is inside a green ring',
    'three black cones are behind a yellow disc', 'a yellow disc is behind three black cones',
    'a pink pyramid is above two gray cylinders', 'two gray cylinders are above a pink pyramid',
    'a cyan box is next to a brown ball', 'a cyan box is far from a brown ball',
    'an orange disc is in front of a purple cone', 'a purple disc is in front of an orange cone')


def pack_orbits(_cache=[]):
    if not _cache:
        scenes = [parse(sentence) for sentence in EVAL_SENTENCES]
        _cache.append({orbit(s._replace(relations=tuple((r if r in CANONICAL else INVERSE[r], i, j)
                                                        for r, i, j in s.relations))) for s in scenes})
    return _cache[0]



TYPES = ('function', 'colour', 'shape', 'count', 'relation')        # of words; all but the first are content


def word_concepts():
    """{word: (type, name)} of the content words; words that mean the same (crimson, red) share their name."""
    concept = {w: ('colour', c) for w, c in COLOUR_OF.items()} | {w: ('shape', n[0]) for w, n in NOUN_OF.items()}
    concept |= ({w: ('count', n) for n, words in COUNTS.items() for w in sum((p.split() for p in words), [])
                 if w not in ('the', 'of', 'pair', 'trio', 'a')}
                | {'a': ('count', 1), 'pair': ('count', 2), 'trio': ('count', 3)})
    glue = {'of', 'to', 'the', 'at', 'a', 'than', 'from', 'by', 'side', 'way', 'step', 'up', 'on', 'in', 'all',
            'directly'}
    for table in (PREPOSITIONS, PARTICIPLES, {r: sum(forms, ()) for r, forms in VERBS.items()}):
        for relation, phrases in table.items():
            for word in itertools.chain.from_iterable(phrase.split() for phrase in phrases):
                if word not in glue and word not in concept:
                    concept[word] = ('relation', relation)
    return concept | {'on': ('relation', 'on'), 'in': ('relation', 'inside')}

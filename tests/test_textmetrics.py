"""Tests of textmetrics.py: what is measured of sentences, against what one works out by hand."""
import math
import random
from collections import Counter

import pytest
import sacrebleu

import textmetrics
from textmetrics import END, START, UNKNOWN, Trigram

# Two scripts, and an emoji as a word.
STRANGE = ['', 'ein mädchen läuft', '小さな 猫', '🐈 sits on 🧱', 'a']


def nan(value):
    return isinstance(value, float) and math.isnan(value)


# ---- reading --------------------------------------------------------------------------------------------------------

def test_word_f1_counts_each_word_as_often_as_it_stands_there():
    assert textmetrics.word_f1('a cat and a dog', 'dog a cat') == pytest.approx(2 * 3 / (5 + 3))
    assert textmetrics.word_f1('b a', 'a b') == 1
    assert textmetrics.word_f1('a', 'b') == textmetrics.word_f1('a', '') == textmetrics.word_f1('', 'a') == 0
    assert textmetrics.word_f1('', '') == 1


def test_a_reading_is_scored_as_by_hand_and_as_by_sacrebleu():
    originals = ['a red cube is on a ball', 'the cat sat on the mat']
    said = ['a red cube is on a ball', 'the cat sat by a mat']
    row = textmetrics.reading_table(originals, said)['all']
    assert row['n'] == 2 and row['exact'] == 0.5
    assert row['word_f1'] == pytest.approx((1 + 4 / 6) / 2)
    assert row['rouge_l'] == pytest.approx((1 + 4 / 6) / 2)                           # the cat sat … mat
    assert row['bleu4'] == pytest.approx(sacrebleu.corpus_bleu(said, [originals], tokenize='none', force=True).score)
    # 13, 11, 9, 7 n-grams, of which these match: 11, 8, 6, 4; as long as the originals, so no brevity penalty
    assert row['bleu4'] == pytest.approx(100 * (11 / 13 * 8 / 11 * 6 / 9 * 4 / 7) ** 0.25)
    assert textmetrics.reading_table(originals, originals)['all']['bleu4'] == pytest.approx(100)
    # all that was said is right, but 4 words of 6: a brevity penalty of exp(1 - 6 / 4)
    row = textmetrics.reading_table(['the cat sat on the mat'], ['the cat sat on'])['all']
    assert row['bleu4'] == pytest.approx(100 * math.exp(-0.5)) and row['rouge_l'] == pytest.approx(8 / 10)


def test_rows_are_by_words_of_the_original():
    originals = [' '.join(['word'] * n) for n in (1, 8, 9, 12, 13, 16, 17, 20, 21, 30, 31, 99)] + ['']
    table = textmetrics.reading_table(originals, [''] * 13)
    assert {name: row['n'] for name, row in table.items()} == {
        'all': 13, '1-16 words': 6, '17-30 words': 4, '1-8 words': 2, '9-12 words': 2, '13-16 words': 2,
        '17-20 words': 2, '21-30 words': 2, '31+ words': 2}
    assert table['all']['exact'] == pytest.approx(1 / 13) and table['31+ words']['exact'] == 0


def test_rows_by_the_rarest_word_of_the_original():
    times = {'a': 5000, 'cat': 1000, 'dog': 999, 'emu': 100, 'yak': 99, 'gnu': 9, 'owl': 1}
    originals = ['a cat', 'a dog', 'a emu', 'cat yak', 'a gnu', 'owl dog', 'a newt', '']
    said = ['a cat', '', '', 'cat yak', '', '', '', '']
    table = textmetrics.reading_table(originals, said, times)
    rare = {name: (row['n'], row['exact']) for name, row in table.items() if name.startswith('rarest')}
    assert rare == {'rarest word seen 0 times': (1, 0), 'rarest word seen 1-9 times': (2, 0),
                    'rarest word seen 10-99 times': (1, 1), 'rarest word seen 100-999 times': (2, 0),
                    'rarest word seen 1000+ times': (1, 1)}
    assert textmetrics.reading_table(originals, said, lambda word: times.get(word, 0)) == table
    assert not [name for name in textmetrics.reading_table(originals, said) if name.startswith('rarest')]


def test_any_script_is_read():
    assert textmetrics.reading_table(['小さな 猫 が 歩く'], ['小さな 犬 が 歩く'])['all']['rouge_l'] == 0.75
    assert textmetrics.reading_table(STRANGE, STRANGE)['all']['exact'] == 1
    with pytest.raises(ValueError):
        textmetrics.reading_table(['a', 'b'], ['a'])


def test_a_table_is_aligned():
    lines = textmetrics.format_table({'all': {'n': 12, 'exact': 0.5}, 'long name': {'n': 3, 'exact': 1.0}}).split('\n')
    assert lines == ['            n  exact', 'all        12  0.500', 'long name   3  1.000']
    assert textmetrics.format_table({}) == textmetrics.format_table(textmetrics.reading_table([], [])) == ''


# ---- variety --------------------------------------------------------------------------------------------------------

def test_distinct_by_hand():
    sentences = ['a cat sees a cat', 'a dog']                # 7 words, 4 of them different; "a cat" comes twice
    assert textmetrics.distinct(sentences, 1) == pytest.approx(4 / 7)
    assert textmetrics.distinct(sentences, 2) == pytest.approx(4 / 5)
    assert nan(textmetrics.distinct(sentences, 6))                                    # no sentence is so long


def test_self_bleu_is_that_of_sacrebleu_with_all_others_as_references():
    sentences = ['a red cube on a ball', 'a red cube under a box', 'two green rings', '']
    scores = [sacrebleu.sentence_bleu(s, [other for other in sentences if other is not s], tokenize='none').score
              for s in sentences]
    assert textmetrics.self_bleu(sentences) == pytest.approx(sum(scores) / 4) and scores[0] > 20
    assert textmetrics.self_bleu(['a cat'] * 5) == pytest.approx(100)                 # shorter than four words
    assert textmetrics.self_bleu(['a b c d', 'e f g h']) == 0
    assert nan(textmetrics.self_bleu(['a cat'])) and nan(textmetrics.self_bleu([]))


def test_self_bleu_is_of_a_sample_that_is_the_same_at_every_call():
    sentences = [f'{i % 7} {i % 5} {i % 3} {i % 2}' for i in range(60)]
    assert textmetrics.self_bleu(sentences, 10) == textmetrics.self_bleu(textmetrics.subset(sentences, 10))
    assert textmetrics.subset(sentences, 10) != sentences[:10] and textmetrics.subset(sentences, 99) == sentences


# ---- trigram model --------------------------------------------------------------------------------------------------

TOY = ['a cat sat', 'a cat ran', 'a dog sat', 'the dog ran', 'the owl']              # owl comes once


@pytest.mark.parametrize('context', [(START, START), (START, 'a'), ('a', 'cat'), ('cat', 'a'), ('dog', 'sat'),
                                     ('a', UNKNOWN), (UNKNOWN, UNKNOWN), ('cat',), ()])
def test_probabilities_are_positive_and_sum_to_1(context):
    model = Trigram.train(TOY)
    probabilities = [model.probability(word, context) for word in model.outcomes]
    assert sum(probabilities) == pytest.approx(1) and min(probabilities) > 0


def test_words_that_come_once_are_unknown():
    model = Trigram.train(TOY)
    assert model.vocabulary == {'a', 'the', 'cat', 'dog', 'sat', 'ran'} and model.unknown == ('owl',)
    assert model.outcomes == ('a', 'cat', 'dog', 'ran', 'sat', 'the', UNKNOWN, END)
    assert model.cross_entropy(['the owl']) == model.cross_entropy(['the emu']) < model.cross_entropy(['the sat'])
    assert model.unknown_share(['the owl', 'a emu sat']) == pytest.approx(2 / 5)


def test_kneser_ney_by_hand():
    # Four sentences of one word, each ten times: after START START 40 words, 4 of them different; after START 4 words
    # in one context each; 8 different bigrams in all, 4 of which END; 6 outcomes with UNKNOWN and END.
    model = Trigram.train(['north', 'south', 'east', 'west'] * 10)
    unigram = (1 - 0.75) / 8 + 0.75 * 5 / 8 / 6
    bigram = (1 - 0.75) / 4 + 0.75 * 4 / 4 * unigram
    trigram = (10 - 0.75) / 40 + 0.75 * 4 / 40 * bigram
    assert model.probability('east', (START, START)) == pytest.approx(trigram)
    unigram = (4 - 0.75) / 8 + 0.75 * 5 / 8 / 6
    bigram = (1 - 0.75) / 1 + 0.75 * unigram
    end = (10 - 0.75) / 10 + 0.75 / 10 * bigram
    assert model.cross_entropy(['east', 'north']) == pytest.approx(-(math.log(trigram) + math.log(end)) / 2)


def test_cross_entropy_of_a_uniform_language():
    sentences = [f'{a} {b} {c}' for a in 'abcd' for b in 'efgh' for c in 'ijkl'] * 200
    model = Trigram.train(sentences)
    # three words at ln 4 nats each, and an end that is certain
    assert model.cross_entropy(sentences) == pytest.approx(3 * math.log(4) / 4, rel=0.001)
    assert model.cross_entropy(['e a i']) > 2 * math.log(4)                           # in an order that it never saw
    # Words that may stand anywhere: of every two words, one is the last or the sentence goes on, ln 2, twice.
    sentences = [f'{a} {b} {c}' for a in 'abcd' for b in 'abcd' for c in 'abcd'] * 200
    assert Trigram.train(sentences).cross_entropy(sentences) == pytest.approx(
        (3 * math.log(4) + 2 * math.log(2)) / 4, rel=0.001)


def test_models_of_one_vocabulary_are_compared_both_ways():
    forward = Trigram.train(TOY)
    poor, rich = (Trigram.train(draws, forward.vocabulary) for draws in (['a cat sat'] * 4, TOY[:4]))
    assert poor.outcomes == rich.outcomes == forward.outcomes
    assert forward.cross_entropy(['a cat sat']) < forward.cross_entropy(TOY)          # forward likes what is safe
    assert rich.cross_entropy(TOY) < poor.cross_entropy(TOY) < math.inf               # reverse misses what is lacking
    assert Trigram.train([], forward.vocabulary).cross_entropy(TOY) == pytest.approx(math.log(8))


def test_samples_are_drawn_with_the_probabilities_of_the_model():
    model, n = Trigram.train(TOY), 4000
    samples = model.sample(n, random.Random(0).random)
    assert samples == model.sample(n, random.Random(0).random)
    first = Counter(sentence.split()[0] if sentence else END for sentence in samples)
    for word in model.outcomes:
        said = 'owl' if word == UNKNOWN else word            # unknown words are said as one of the rare words
        assert first[said] / n == pytest.approx(model.probability(word, (START, START)), abs=0.025)
    assert UNKNOWN not in ' '.join(samples).split()


# ---- copies ---------------------------------------------------------------------------------------------------------

def test_copies_by_hand():
    training = ['a red cube is on a ball', 'two dogs run']
    sentences = ['a red cube is under a ball', 'two dogs run', 'two cats run']        # one 4-gram of four is copied
    assert textmetrics.copied_ngrams(sentences, iter(training)) == 1 / 4
    assert textmetrics.copied_ngrams(sentences, training, n=2) == pytest.approx(6 / 10)
    assert textmetrics.copied_whole(sentences, iter(training)) == pytest.approx(1 / 3)
    assert textmetrics.copied_ngrams(['a ball', 'a ball', 'a box'], training, n=2) == pytest.approx(2 / 3)
    assert textmetrics.copied_ngrams(training, training) == textmetrics.copied_whole(training, training) == 1


def test_nearest_are_the_training_sentences_that_share_the_rare_words():
    training = ['a red cube', 'a zebra', 'a blue ball', 'a red cube', '']
    (zebra, cube), (cube_again, _), strange = textmetrics.nearest(['zebra cube', 'a red cube', 'emu'], training, k=2)
    assert zebra[0] == 'a zebra' and cube[0] == 'a red cube'                          # the same sentence only once
    assert cube_again == ('a red cube', pytest.approx(1)) and strange[0][1] == 0
    # idf = ln((1 + 3) / (1 + documents)) + 1, documents as different sentences: zebra, red, cube 1, a 3
    rare, common = math.log(2) + 1, 1
    assert zebra[1] == pytest.approx(rare / math.sqrt(2 * (rare ** 2 + common ** 2)), rel=1e-5)
    assert cube[1] == pytest.approx(rare / math.sqrt(2 * (2 * rare ** 2 + common ** 2)), rel=1e-5)
    assert zebra[1] > cube[1]


def test_nearest_in_more_than_one_chunk():
    training = [f'{i} is {i}' for i in range(150)]
    assert [found[0][0] for found in textmetrics.nearest(training, training)] == training
    assert [len(found) for found in textmetrics.nearest(['1'], training[:2], k=5)] == [2]
    assert textmetrics.nearest(['a', 'b'], ['']) == [[], []] and textmetrics.nearest([], training) == []


# ---- generators -----------------------------------------------------------------------------------------------------

def test_a_table_of_generators():
    rand = random.Random(0)
    people = [f'a {rand.choice("uvw")} {rand.choice("ran sat hid".split())} {rand.choice("by on in".split())} the '
              f'{rand.choice("xyz")}' for _ in range(600)]
    training, real, held_out = people[:400], people[400:500], people[500:]
    kinds = {'people': held_out, 'one sentence': training[:1] * 90, 'noise': ['y the in u', 'newt', ''] * 30}
    table = textmetrics.generator_table(kinds, iter(training), real)
    said, same, noise = table['people'], table['one sentence'], table['noise']
    assert said['n'] == same['n'] == noise['n'] == 90 and said['words'] == 6 and noise['words'] == pytest.approx(5 / 3)
    assert said['forward'] == Trigram.train(training).cross_entropy(textmetrics.subset(held_out, 90)) < noise['forward']
    vocabulary = Trigram.train(training).vocabulary
    assert same['reverse'] == Trigram.train(training[:1] * 90, vocabulary).cross_entropy(real) > said['reverse']
    assert noise['reverse'] > said['reverse']
    assert same['copied_whole'] == same['copied_4grams'] == 1 and noise['copied_whole'] == noise['copied_4grams'] == 0
    assert same['self_bleu'] == pytest.approx(100) and said['self_bleu'] < 100
    assert same['distinct_1'] == pytest.approx(6 / 540) and same['distinct_4'] == pytest.approx(3 / 270)
    assert same['nearest_cosine'] == pytest.approx(1) and noise['nearest_cosine'] < said['nearest_cosine']
    assert noise['empty'] == pytest.approx(1 / 3) and noise['unknown'] == pytest.approx(1 / 5) and said['empty'] == 0
    assert len(textmetrics.format_table(table).split('\n')) == 4


def test_nothing_and_any_script_are_measured_too():
    kinds = {'draws': STRANGE, 'others': ['🐈', 'a', '', 'b', 'straße']}
    table = textmetrics.generator_table(kinds, STRANGE * 2, STRANGE)
    assert table['draws']['copied_whole'] == 1 and table['draws']['empty'] == 1 / 5
    assert not any(map(nan, table['draws'].values()))
    for empty in textmetrics.generator_table({'draws': []}, [], []), textmetrics.generator_table(kinds, [], []):
        assert nan(empty['draws']['reverse']) and nan(empty['draws']['nearest_cosine'])
    assert textmetrics.generator_table({}, STRANGE, STRANGE) == {}
    assert set(' '.join(Trigram.train([]).sample(9, random.Random(0).random)).split()) == {UNKNOWN}

"""What is measured of sentences as text, without a net: how well they were read back, and how well a generator writes.

A sentence is a normalised string (grammar.normalize): lower case, no punctuation, single spaces, any script; it may be
empty. Words are what str.split gives. A share, mean or entropy of nothing is nan. BLEU is on a scale of 0 to 100, all
else that is a share or an F1 is 0 to 1, entropies are nats.

    python -c "import textmetrics as t; print(t.format_table(t.reading_table(['a red cube'], ['a blue cube'])))"
"""
import math
import random
from collections import Counter, defaultdict
from itertools import chain
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import BLEU

# Lowest and highest value of a row of reading_table().
BANDS = ((1, 8), (9, 12), (13, 16), (17, 20), (21, 30), (31, 1000))         # words of the original
RARITIES = ((0, 0), (1, 9), (10, 99), (100, 999), (1000, math.inf))        # training has its rarest word so many times
START, END, UNKNOWN = '<s>', '</s>', '<unk>'                               # no normalised sentence has such a word
DISCOUNT = 0.75                                                            # of Kneser-Ney, for all orders


def share(part, whole):
    return part / whole if whole else math.nan


def mean(values):
    values = list(values)
    return share(sum(values), len(values))


def subset(sentences, n):
    """n of the sentences, drawn at random and the same ones at every call; all of them where there are no more."""
    return random.Random(0).sample(sentences, n) if len(sentences) > n else list(sentences)


def ngrams(sentence, n):
    """The runs of n words, as tuples."""
    words = sentence.split()
    return zip(*(words[i:] for i in range(n)))


# ---- reading: what was said against the original --------------------------------------------------------------------

def word_f1(a, b):
    """F1 of the words of two sentences, each word as often as it stands there, order ignored; 1 if both are empty."""
    a, b = Counter(a.split()), Counter(b.split())
    return 2 * (a & b).total() / (a.total() + b.total()) if a or b else 1.0


def reading_table(originals, said, rarity=None):
    """How well sentences were read back -> {row: {'n', 'exact', 'word_f1', 'bleu4', 'rouge_l'}}.

    originals, said: lists of equally many sentences. rarity: word -> how often training has it, a function or a dict.
    Rows: all, by words of the original, and, given rarity, by the rarest word of the original; only those with n > 0.
    An original without words is in the row 'all' alone.

    exact: share of sentences that are identical; word_f1: mean of word_f1(); rouge_l: mean F1 of the longest common
    subsequence (ROUGE-L, Lin 2004), 0 where a sentence is empty; bleu4: corpus BLEU (Papineni et al. 2002) of
    sacrebleu, words as they are, smoothing 'exp' (its default: the k-th order without a match counts as 1/2^k
    matches), 0 where nothing that was said has four words."""
    from rouge_score.rouge_scorer import RougeScorer                                  # a second to import
    pairs = list(zip(originals, said, strict=True))
    words = [len(original.split()) for original in originals]
    bands = {'all': (0, math.inf), '1-16 words': (1, 16), '17-30 words': (17, 30)}
    bands |= {f'{low}+ words' if low == BANDS[-1][0] else f'{low}-{high} words': (low, high) for low, high in BANDS}
    rows = {name: [i for i, n in enumerate(words) if low <= n <= high] for name, (low, high) in bands.items()}
    if rarity is not None:
        times = rarity if callable(rarity) else lambda word: rarity.get(word, 0)
        rarest = [min(map(times, original.split()), default=-1) for original in originals]
        for low, high in RARITIES:
            span = f'{low}+' if high == math.inf else f'{low}-{high}' if high else '0'
            rows[f'rarest word seen {span} times'] = [i for i, n in enumerate(rarest) if low <= n <= high]

    bleu = BLEU(tokenize='none', force=True)
    rouge = RougeScorer(['rougeL'], tokenizer=SimpleNamespace(tokenize=str.split))    # its own tokenizer: ASCII alone
    rouge_l = [rouge.score(a, b)['rougeL'].fmeasure for a, b in pairs]
    f1 = [word_f1(a, b) for a, b in pairs]
    return {name: {'n': len(row), 'exact': mean(originals[i] == said[i] for i in row),
                   'word_f1': mean(f1[i] for i in row),
                   'bleu4': bleu.corpus_score([said[i] for i in row], [[originals[i] for i in row]]).score,
                   'rouge_l': mean(rouge_l[i] for i in row)}
            for name, row in rows.items() if row}


def format_table(rows):
    """{row: {column: number}}, all rows with the same columns -> an aligned table with a header, as text."""
    if not rows:
        return ''
    columns = list(next(iter(rows.values())))
    cells = [['', *columns]] + [[name, *(str(row[c]) if isinstance(row[c], int) else f'{row[c]:.3f}' for c in columns)]
                                for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells)


# ---- variety --------------------------------------------------------------------------------------------------------

def distinct(sentences, n):
    """Different n-grams / all n-grams (distinct-n, Li et al. 2016). It falls with the number of sentences: compare
    samples of one size."""
    grams = [gram for sentence in sentences for gram in ngrams(sentence, n)]
    return share(len(set(grams)), len(grams))


def self_bleu(sentences, sample=200):
    """How alike the sentences are, 0 to 100: mean sentence BLEU-4 of each with the others as its references (Zhu et
    al. 2018). sacrebleu, smoothing 'exp', orders longer than the sentence left out; an empty sentence scores 0.

    Time grows with the square of the sentences, so it is of `sample` of them, see subset(), both as sentences and as
    references. It rises with the number of references: compare values of one sample size."""
    bleu, sentences = BLEU(tokenize='none', effective_order=True), subset(sentences, sample)
    if len(sentences) < 2:
        return math.nan
    return mean(bleu.sentence_score(sentence, sentences[:i] + sentences[i + 1:]).score
                for i, sentence in enumerate(sentences))


# ---- a language model of words --------------------------------------------------------------------------------------

class Trigram(NamedTuple):
    """An interpolated Kneser-Ney trigram model (Kneser and Ney 1995; Chen and Goodman 1998) with one fixed discount;
    below the unigrams stands the uniform distribution over all outcomes, so no probability is 0.

    The outcomes are the words of the vocabulary, UNKNOWN and END. Every word outside the vocabulary is UNKNOWN, whose
    probability is that of all such words together: a text of words nobody knows looks cheap, so mind unknown_share()
    beside a cross-entropy, and compare models of one vocabulary alone.

        >>> forward = Trigram.train(training)                                   # is it like the training text?
        >>> forward.cross_entropy(draws)
        >>> Trigram.train(draws, forward.vocabulary).cross_entropy(held_out)    # does it have all that people say?
    """
    vocabulary: frozenset    # words
    outcomes: tuple          # the vocabulary in order, UNKNOWN, END
    following: dict          # the 2, 1 or 0 outcomes before -> {word: how often; below 2, after how many contexts}
    totals: dict             # context -> sum of these
    unknown: tuple           # words of the training text that are not in the vocabulary, one entry each

    @classmethod
    def train(cls, sentences, vocabulary=None):
        """A model of sentences; vocabulary: a set of words, by default those that the sentences have twice or more."""
        sentences = [sentence.split() for sentence in sentences]
        times = Counter(chain.from_iterable(sentences))
        if vocabulary is None:
            vocabulary = (word for word, n in times.items() if n > 1)
        vocabulary, following = frozenset(vocabulary), defaultdict(Counter)
        for words in sentences:
            tokens = [START, START, *(word if word in vocabulary else UNKNOWN for word in words), END]
            for first, second, third in zip(tokens, tokens[1:], tokens[2:]):
                following[first, second][third] += 1
        for length in 2, 1:      # lower orders count contexts: "francisco" is frequent, but only after "san"
            for context in [context for context in following if len(context) == length]:
                following[context[1:]].update(following[context].keys())
        return cls(vocabulary, (*sorted(vocabulary), UNKNOWN, END), dict(following),
                   {context: words.total() for context, words in following.items()},
                   tuple(word for word in times if word not in vocabulary))

    def probability(self, word, context):
        """Of an outcome after a context, a tuple of up to two outcomes or STARTs."""
        lower = self.probability(word, context[1:]) if context else 1 / len(self.outcomes)
        if context not in self.totals:
            return lower
        words = self.following[context]
        return (max(words.get(word, 0) - DISCOUNT, 0) + DISCOUNT * len(words) * lower) / self.totals[context]

    def cross_entropy(self, sentences):
        """Nats a word, the end of a sentence counted as a word; e to this power is the perplexity."""
        nats = []
        for sentence in sentences:
            words = (word if word in self.vocabulary else UNKNOWN for word in sentence.split())
            context = START, START
            for word in chain(words, [END]):
                nats.append(-math.log(self.probability(word, context)))
                context = context[1], word
        return mean(nats)

    def unknown_share(self, sentences):
        """Share of the words that are not in the vocabulary."""
        return mean(word not in self.vocabulary for sentence in sentences for word in sentence.split())

    def sample(self, n, rand):
        """n sentences; rand() gives uniform numbers in [0, 1). Where UNKNOWN is drawn, one of the words of the training
        text that are not in the vocabulary is said, each as likely ('<unk>' if there is none)."""
        sentences = []
        for _ in range(n):
            words, context = [], (START, START)
            while (word := self._draw(context, rand)) != END:
                context = context[1], word
                if word == UNKNOWN and self.unknown:
                    word = self.unknown[int(rand() * len(self.unknown))]
                words.append(word)
            sentences.append(' '.join(words))
        return sentences

    def _draw(self, context, rand):
        """An outcome after a context, with probability()."""
        rest = rand() * self.totals.get(context, 0)
        for word, n in self.following.get(context, {}).items():
            rest -= n - DISCOUNT
            if rest < 0:
                return word
        return self._draw(context[1:], rand) if context else self.outcomes[int(rand() * len(self.outcomes))]


# ---- copies ---------------------------------------------------------------------------------------------------------

def copied_ngrams(sentences, training, n=4):
    """Share of the n-grams of a list of sentences that stand in training too, any iterable, read once."""
    grams = [gram for sentence in sentences for gram in ngrams(sentence, n)]
    wanted = set(grams)                      # the small side is kept, so that training may be of any size
    found = {gram for sentence in training for gram in ngrams(sentence, n) if gram in wanted}
    return mean(gram in found for gram in grams)


def copied_whole(sentences, training):
    """Share of a list of sentences that stand in training whole, any iterable, read once."""
    found = set(sentences).intersection(training)
    return mean(sentence in found for sentence in sentences)


def nearest(sentences, training, k=1):
    """For each sentence the k different training sentences with the highest TF-IDF cosine of words, nearest first ->
    list of lists of (training sentence, cosine 0 to 1). Shorter than k if training is; empty if it has no words.

    A sentence that shares no word with training has cosine 0 with all of it; which one it gets then means nothing."""
    from sklearn.feature_extraction.text import TfidfVectorizer                       # a second to import
    training = [sentence for sentence in dict.fromkeys(training) if sentence.split()]
    if not training or not sentences:
        return [[] for _ in sentences]
    vectorizer = TfidfVectorizer(analyzer=str.split, dtype=np.float32)
    rows, k, found = vectorizer.fit_transform(training), min(k, len(training)), []
    for i in range(0, len(sentences), 64):   # 64 sentences against 150,000 are 40 MB of cosines
        cosine = (rows @ vectorizer.transform(sentences[i:i + 64]).toarray().T).T                 # (64, training)
        for row in cosine:
            best = np.argpartition(row, -k)[-k:]
            found.append([(training[j], row[j].item()) for j in best[np.argsort(-row[best], kind='stable')]])
    return found


# ---- generators side by side ----------------------------------------------------------------------------------------

def generator_table(kinds, training, real):
    """How well generators write, side by side -> {kind: {column: number}}, for format_table().

    kinds: {name: list of sentences}, such as draws of a model and, beside them, samples of a Trigram of training. All
    are cut to the size of the smallest, see subset(). training: what the generators learnt from; real: held-out
    sentences. To see what real sentences score, give other held-out ones, not in `real`, as one more kind: a kind taken
    from training is a copy by definition and known to the forward model, one taken from `real` known to the reverse.

    n: sentences; words: mean of a sentence; empty: share of sentences without a word; unknown: share of words that
    training does not have twice; forward: cross-entropy under a trigram model of training, low for text like it, lowest
    for the same safe sentence again and again; reverse: cross-entropy of `real` under a trigram model of the kind
    ("reverse perplexity", Zhao et al. 2018), high if the kind lacks much of what people say; both in nats a word, with
    the vocabulary of training; distinct_n: distinct(); self_bleu: self_bleu(), 0 to 100; copied_4grams, copied_whole:
    shares that stand in training; nearest_cosine: mean cosine to the nearest training sentence, see nearest()."""
    training, size = list(training), min(map(len, kinds.values()), default=0)
    kinds = {name: subset(sentences, size) for name, sentences in kinds.items()}
    forward = Trigram.train(training)
    neighbours = iter(nearest(list(chain.from_iterable(kinds.values())), training))   # one index for all kinds
    table = {}
    for name, sentences in kinds.items():
        cosines = [found[0][1] for _, found in zip(sentences, neighbours) if found]
        table[name] = {
            'n': size, 'words': mean(len(sentence.split()) for sentence in sentences),
            'forward': forward.cross_entropy(sentences),
            'reverse': Trigram.train(sentences, forward.vocabulary).cross_entropy(real),
            'unknown': forward.unknown_share(sentences),
            'distinct_1': distinct(sentences, 1), 'distinct_2': distinct(sentences, 2),
            'distinct_4': distinct(sentences, 4), 'self_bleu': self_bleu(sentences),
            'copied_4grams': copied_ngrams(sentences, training), 'copied_whole': copied_whole(sentences, training),
            'nearest_cosine': mean(cosines), 'empty': mean(not sentence.split() for sentence in sentences)}
    return table

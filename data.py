"""P0 · The tokenizer, the corpus as integer arrays, its splits, and the batches of every phase.

The sentences are those of grammar.py or a corpus of your own, whose counterfactuals english.py makes where it brings
none. They are rendered once into arrays that training maps into memory; a step does no text work. Splits are by scene,
never by line.

Reads:  nothing, or --corpus=FILE.txt / FILE.jsonl     Writes: out/data/<key>/ (arrays, tokenizer, eval_pack.jsonl)
    python data.py                                    # show a sample of everything, prepare the default corpus
    python data.py --num=1000 --out=sentences.txt     # write 1000 sentences (or --out=FILE.jsonl with paraphrases)
"""
import base64
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken
import torch
from tqdm import tqdm

import english
import grammar
import runtime
from grammar import FAMILIES, TYPES, VARIANTS, meaning, normalize, split_of

num = 20_000              # training scenes
complexity = 1            # 1: two things, one relation; 2: three things, two relations; 3: four things, three relations
simple_share = 0.5        # of the prepared training scenes of complexity 2 and 3: scenes of fewer things, learnt first
seed = 0                  # which scenes, which wordings
out = ''                  # write `num` sentences to this .txt or .jsonl instead of preparing arrays
corpus = ''               # a corpus of your own: .txt (a sentence a line) or .jsonl (original, paraphrases, ...)
vocab_size = 16384        # BPE target; training stops earlier when no pair of tokens repeats
config = runtime.configure(globals())

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE trained by rustbpe on this corpus, run by tiktoken. Ids 0 to 3 are kept for the model.

PAD, BOS, EOS, PARA = 0, 1, 2, 3                # padding, begin, end, begin a paraphrase (P5)
SPECIALS = 4
PATTERN = r' ?[^\W\d]+| ?\d| ?[^\s\w]+|\s'      # a piece is a word with its space; tokens never cross words


class Tokenizer:
    """Text <-> ids. `ranks` is a list of the token bytes in rank order (all 256 single bytes are among them)."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.bpe = tiktoken.Encoding('corpus', pat_str=PATTERN, special_tokens={},
                                     mergeable_ranks={token: rank for rank, token in enumerate(ranks)})
        self.size = len(ranks) + SPECIALS
        self.newline = ranks.index(b'\n')

    @classmethod
    def train(cls, sentences, vocab_size):
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator((' ' + s for s in sentences), vocab_size=max(256, vocab_size - SPECIALS),
                                    pattern=PATTERN)
        return cls([bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])])

    def state(self):
        """Plain types for a checkpoint or a JSON file; Tokenizer.load() is its inverse."""
        return [base64.b64encode(token).decode() for token in self.ranks]

    @classmethod
    def load(cls, state):
        return cls([base64.b64decode(token) for token in state])

    def encode(self, text):
        """Ids of the normalised text, closed by EOS."""
        return [rank + SPECIALS for rank in self.bpe.encode_ordinary(' ' + normalize(text))] + [EOS]

    def decode(self, ids):
        """Text up to the first EOS or PAD, without ids that no token has; bytes that are no UTF-8 become U+FFFD."""
        ids = list(itertools.takewhile(lambda i: i not in (EOS, PAD), ids))
        ranks = [i - SPECIALS for i in ids if SPECIALS <= i < self.size]
        return self.bpe.decode_bytes(ranks).decode('utf-8', 'replace').strip()

    def encode_lines(self, lines):
        """Plain lines (already normalised) -> (ids, lengths): one flat uint16 array, an EOS closing each line. Ten
        thousand lines are one call into tiktoken, five times faster than one call a line."""
        flat, lengths = [], []
        for start in range(0, len(lines), 10_000):
            chunk = ' ' + '\n '.join(lines[start:start + 10_000]) + '\n'
            ids = np.array(self.bpe.encode_ordinary(chunk), dtype=np.int64)
            ends = np.flatnonzero(ids == self.newline)
            lengths.append(np.diff(ends, prepend=-1))
            flat.append(np.where(ids == self.newline, EOS, ids + SPECIALS).astype(np.uint16))
        return np.concatenate(flat), np.concatenate(lengths)

    def pad(self, texts, width):
        """Texts -> (len(texts), width) int64 array, cut at `width`."""
        x = np.zeros((len(texts), width), dtype=np.int64)
        for row, text in enumerate(texts):
            ids = self.encode(text)[:width]
            x[row, :len(ids)] = ids
        return torch.from_numpy(x)


def token_types(tokenizer, vocab_size):
    """(types, concepts), two (vocab_size,) int64 tensors. types: index into grammar.TYPES. concepts: equal for words
    that mean the same (crimson, red), each function token its own concept. A piece of a word is a function token."""
    types, ids = np.zeros(vocab_size, np.int64), np.arange(vocab_size)
    concepts, names = grammar.word_concepts(), {}
    for rank, token in enumerate(tokenizer.ranks):
        word = token.decode('utf-8', 'replace')
        if word[:1] == ' ' and word[1:] in concepts:
            concept = concepts[word[1:]]
            types[rank + SPECIALS] = TYPES.index(concept[0])
            ids[rank + SPECIALS] = names.setdefault(concept, rank + SPECIALS)
    return torch.from_numpy(types), torch.from_numpy(ids)


# ---------------------------------------------------------------------------------------------------------------------
# The corpus as integer arrays

CANONICAL_RENDERINGS, FREE_RENDERINGS = 2, 4
SPLITS = ('train', 'val', 'test', 'composition', 'template')
HELD_OUT_SIZE = 1024                     # scenes of each held-out split: the paraphrase pool of R@1


def scenes_of(split, n, complexity, seed, without=()):
    """n distinct scenes of a split, by rejection. 'template' shares the scenes of 'val' and says them differently;
    'test' is drawn as 'val' is. without: meanings that may not be among them."""
    home = 'val' if split in ('template', 'test') else split
    rand = random.Random(f"{'test' if split == 'test' else home} {complexity} {seed}").random
    scenes, seen, tries = [], set(without), 0
    while len(scenes) < n:
        tries += 1
        if tries > 500 * n + 100_000:
            runtime.fail(f'--num={n}: complexity {complexity} has only about {len(scenes)} distinct {home} scenes')
        scene = grammar.sample_scene(rand, complexity)
        if home == 'composition':            # rejection alone would take fifty draws a scene
            scene = scene._replace(things=(
                scene.things[0]._replace(colour=NOVEL_COLOUR[scene.things[0].shape]), *scene.things[1:]))
            if len({t[2:] for t in scene.things}) < len(scene.things):
                continue
        key = meaning(scene)
        if key not in seen and split_of(scene) == home:
            seen.add(key)
            scenes.append(scene)
    return scenes


def mix_in_simpler(scenes, config):
    """Training scenes of complexity 2 or 3, `simple_share` of them replaced by scenes of each lower complexity in equal
    parts: what is read in two things first carries over to three (docs/LOG.md)."""
    lower = range(1, config['complexity'])
    count = int(config['simple_share'] * len(scenes) / len(lower))
    simpler = [scene for c in lower for scene in scenes_of('train', count, c, config['data_seed'])]
    mixed = simpler + scenes[len(simpler):]
    random.Random(f"mix {config['data_seed']}").shuffle(mixed)
    return mixed


NOVEL_COLOUR = {shape: colour for colour, shape in grammar.HELD_OUT_PAIRS}


def render_split(split, scenes, seed):
    """Rows (groups, meanings, things) of a split, a scene each: for the scene and each of its counterfactuals the
    canonical and the free renderings, in order (none where a family does not apply) and the meaning (0 there), and how
    many things there are."""
    rand = random.Random(f'render {split} {seed}').random
    patterns = ((grammar.HELD_OUT_CLAUSES, grammar.HELD_OUT_WHOLE) if split == 'template' else
                (grammar.CLAUSES, grammar.WHOLE))
    home = 'train' if split == 'train' else 'held-out'
    for scene in scenes:
        groups, meanings = [], []
        for family in VARIANTS:
            variant = scene if family == 'scene' else grammar.allowed_counterfactual(scene, family, rand, home)
            groups.append([] if variant is None else
                          [grammar.canonical(variant, rand) for _ in range(CANONICAL_RENDERINGS)]
                          + [grammar.render(variant, rand, *patterns) for _ in range(FREE_RENDERINGS)])
            meanings.append(0 if variant is None else meaning(variant))
        yield groups, meanings, len(scene.things)


# The files of a split, <split>.<name>: flat arrays that grow while the corpus is read and that training memory-maps.
# F is 1 + the families of the corpus.
ARRAYS = {
    'tokens': np.int16,        # of all sentences, one after the other, each closed by EOS
    'starts': np.int64,        # (N + 1,): where a sentence begins; the last one: where the tokens end
    'first': np.int64,         # (S, F): the first sentence of a variant
    'count': np.uint8,         # (S, F): how many it has, one after the other; 0 where the family does not apply
    'meanings': np.int64,      # (S, F): equal for the same meaning, 0 where there is none
    'things': np.uint8}        # (S,): in the scene; 0 if not known


def cut(tokens, lengths, longest):
    """The output of encode_lines with every line cut to `longest` tokens, the last of them EOS."""
    place = np.arange(len(tokens)) - np.repeat(lengths.cumsum() - lengths, lengths)
    return np.where(place == longest - 1, EOS, tokens)[place < longest].astype(tokens.dtype), lengths.clip(max=longest)


def write_split(path, rows, tokenizer, max_length, bar=None):
    """Write rows to path.<array> by the thousand, so that memory does not grow with the corpus -> how many sentences
    there are, and how many of them had more than max_length tokens and are cut."""
    sentences, total, too_long = 0, 0, 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(f'{path}.{name}', 'wb')) for name in ARRAYS}
        files['starts'].write(np.zeros(1, ARRAYS['starts']))
        while chunk := list(itertools.islice(rows, 1000)):
            groups, meanings, things = zip(*chunk)
            lines = [line for row in groups for group in row for line in group]
            tokens, lengths = tokenizer.encode_lines(lines)
            too_long += (lengths > max_length).sum()
            tokens, lengths = cut(tokens, lengths, max_length)
            count = np.array([[len(group) for group in row] for row in groups])
            first = sentences + count.cumsum().reshape(count.shape) - count
            for name, values in (('tokens', tokens), ('starts', total + lengths.cumsum()), ('first', first),
                                 ('count', count), ('meanings', meanings), ('things', things)):
                files[name].write(np.ascontiguousarray(values, ARRAYS[name]))       # tofile hides why a disk refuses
            sentences, total = sentences + len(lines), total + len(tokens)
            if bar is not None:
                bar.update(len(chunk))
    return sentences, int(too_long)


def read_array(path, name, families):
    """An array of write_split, of so many families, memory-mapped: a page is read when a step first asks for it, and
    what training does to it stays in memory."""
    array = np.memmap(f'{path}.{name}', ARRAYS[name], 'c')
    return torch.from_numpy(array.reshape(-1, 1 + families) if name in ('first', 'count', 'meanings') else array)


class Batch(NamedTuple):
    """The sentences of a contrastive step, on this rank's device: n of the N scenes of the whole batch, each with its
    K variants (the scene itself, then counterfactuals), each of these in several views (paraphrases)."""
    x: torch.Tensor              # (n, K, views, T) token ids
    index: torch.Tensor          # (n,) which of the N scenes these are
    meanings: torch.Tensor       # (N, K) int64, equal for the same meaning
    valid: torch.Tensor          # (N, K) bool, False where a family does not apply to a scene
    swaps: torch.Tensor          # (N, K) bool, which are argument or attribute swaps
    rows: slice                  # of the N scenes, those of this rank
    draws: dict = {}             # {name: (n, ...)} random numbers of these scenes

    def with_draws(self, **numbers):
        """The batch with this rank's rows of more random numbers {name: (N, ...)}, drawn alike on every rank."""
        draws = {name: values[self.rows].to(self.x.device, non_blocking=True) for name, values in numbers.items()}
        return self._replace(draws=self.draws | draws)

    def parts(self, count):
        """The batch cut into `count` micro-batches of n / count scenes; what all N scenes have stays whole."""
        draws = {name: values.chunk(count) for name, values in self.draws.items()}
        return [self._replace(x=x, index=index, draws={name: values[k] for name, values in draws.items()})
                for k, (x, index) in enumerate(zip(self.x.chunk(count), self.index.chunk(count)))]


class Corpus:
    """One split. Variant 0 is the scene itself, the others its counterfactuals in the order of `families`; a variant
    has `count` renderings, the first `canonical` of them in canonical form. Drawing is a pure function of (seed, step):
    every rank draws the whole batch's indices and takes its own rows.

    The arrays of write_split, memory-mapped on the host but for meanings and, up to 2 GiB, tokens, which are on the
    device. begins (vocab_size,) bool: tokens that begin a word. fewest: indices of the scenes of the fewest things;
    others: of the rest; None if there is no rest."""

    def __init__(self, path, families, canonical, max_length, device, begins=None):
        self.families, self.begins = tuple(families), begins
        self.tokens, self.starts, self.first, self.count, meanings, things = (
            read_array(path, name, len(families)) for name in ARRAYS)
        self.swaps = torch.tensor([False, *(family.endswith('swap') for family in families)])      # (F,)
        self.meanings = meanings.to(device)
        if self.tokens.nbytes <= 2 << 30:
            self.tokens = self.tokens.to(device)
        few = things == things.min()
        self.fewest, self.others = (None, None) if few.all() else (torch.nonzero(which)[:, 0] for which in (few, ~few))
        longest = max(int(self.starts[i:i + 1_000_001].diff().max()) for i in range(0, len(self.starts) - 1, 1_000_000))
        self.width = min(max_length, -(-longest // 8) * 8)
        self.rounding = 2 if torch.device(device).type == 'cpu' else 8       # where each width is a graph to compile
        self.size, self.canonical, self.device = len(self.count), canonical, device

    def draw(self, n, seed, step, among=None, purpose='scenes'):
        """n random scenes, of all or of the indices `among` -> (scenes (n,), generator of which rendering of them)."""
        generator = runtime.generator(seed, step, purpose)
        scenes = torch.randint(self.size if among is None else len(among), (n,), generator=generator)
        return scenes if among is None else among[scenes], generator

    def renderings(self, scenes, variants, generator, form='any', k=2):
        """k renderings of each variant, the first unlike the others as far as it has two -> k tensors like variants.
        form: 'any', 'free', 'canonical' (any, where the corpus has no canonical form)."""
        count = self.count[scenes, variants].long().clamp(min=1)
        first = self.canonical if form == 'free' else 0
        count = torch.full_like(count, self.canonical) if form == 'canonical' and self.canonical else count - first
        u = torch.rand(k, *count.shape, generator=generator)
        one = (u[0] * count).long()
        return first + one, *(first + (one + 1 + (other * (count - 1)).long()) % count for other in u[1:])

    def negatives(self, scenes, k, generator, hardest=True, without=''):
        """k different families for each scene, or all there are -> variants (n, k) and valid (n, k). With `hardest` the
        argument swap comes first where the scene has one (without it in the batch nothing learns direction) and the attribute swap
        next more often than not. `without` names a family that is left out, to see whether the others teach it."""
        score = torch.rand(len(scenes), len(self.families), generator=generator)
        first = {'argument swap': 2.0, 'attribute swap': 0.5} if hardest else {}
        score += torch.tensor([first.get(family, 0.0) for family in self.families])
        score = score.masked_fill(self.count[scenes, 1:] == 0, -1.0)
        if without in self.families:
            score[:, self.families.index(without)] = -1.0
        top, variants = score.topk(min(k, len(self.families)), dim=1)
        return variants + 1, top >= 0

    def sentences(self, n, seed, step, paraphrases=1, purpose='scenes'):
        """n random sentences and paraphrases of each (n, 1 + paraphrases, T'): scenes and their counterfactuals alike,
        in any rendering."""
        scenes, generator = self.draw(n, seed, step, purpose=purpose)
        variants = torch.randint(self.count.shape[1], (n,), generator=generator)
        variants = variants.where(self.count[scenes, variants] > 0, torch.zeros_like(variants))
        views = torch.stack(self.renderings(scenes, variants, generator, k=1 + paraphrases), dim=1)
        return self.take(scenes[:, None], variants[:, None], views)

    def contrast_rows(self, config, step, form='any', free_view=False, all_swaps=False, pairs=None, among=None):
        """The indices of a contrastive step: scenes, variants (n, K), renderings (n, K, views), valid (n, K). Column 0
        is the scene itself; a family that does not apply is filled with it and marked invalid.

        config: batch_size n, seed, negatives K - 1, and leave_out, a family or ''. form: of the two paraphrases, as in
        renderings(); free_view: and a free one. all_swaps: every scene brings its argument swap; otherwise all families
        have the same chance. pairs (P, 2): scenes that belong together, to fill three quarters of the batch. among: the
        scenes to draw from."""
        n = config.batch_size
        scenes, generator = self.draw(n, config.seed, step, among)
        if pairs is not None:
            some = pairs[torch.randperm(len(pairs), generator=generator)[:3 * n // 8]]    # (3n/8, 2), or all there are
            scenes[:some.numel()] = some.T.flatten()
        extra, valid = self.negatives(scenes, config.negatives, generator, all_swaps, config.leave_out)
        variants = torch.cat((torch.zeros(n, 1, dtype=torch.long), extra.where(valid, torch.zeros_like(extra))), dim=1)
        valid = torch.cat((torch.ones(n, 1, dtype=torch.bool), valid), dim=1)
        scenes = scenes[:, None].expand_as(variants)
        views = self.renderings(scenes, variants, generator, form)
        if free_view:
            views += (self.renderings(scenes, variants, generator, 'free')[0],)
        return scenes, variants, torch.stack(views, dim=-1), valid

    def contrast_batch(self, config, run, step, **options):
        """The Batch of a contrastive step; options as in contrast_rows()."""
        scenes, variants, views, valid = self.contrast_rows(config, step, **options)
        rows = runtime.local_slice(run, len(scenes))
        x = self.take(scenes[rows, :, None], variants[rows, :, None], views[rows])        # (n, K, views, T)
        if not self.canonical:
            u = torch.rand(*variants.shape, self.width + 2, generator=runtime.generator(config.seed, step, 'words'))
            alone = (self.count[scenes, variants] == 1)[rows, :, None].to(x.device)       # the second view is the first
            x[:, :, 1] = altered(x[:, :, 1], self.begins, u[rows].to(x.device), config).where(alone, x[:, :, 1])
        scenes, variants, valid, swaps = (
            t.to(run.device, non_blocking=True) for t in (scenes, variants, valid, valid & self.swaps[variants]))
        index = torch.arange(len(scenes), device=run.device)[rows]
        return Batch(x, index, self.meanings[scenes, variants], valid, swaps, rows)

    def take(self, scenes, variants, renderings):
        """Token ids (..., T') int64 on the device, cut after the longest of them, rounded up to 8 (2 on a CPU). The
        three indices broadcast."""
        there = self.count[scenes, variants] > 0
        row = (self.first[scenes, variants] + renderings) * there                     # what is not there: no token
        start, length = self.starts[row], (self.starts[row + 1] - self.starts[row]) * there
        longest = max(1, int(length.max()))                                           # all may be empty in your corpus
        width = min(self.width, -(-longest // self.rounding) * self.rounding)
        column = torch.arange(width, device=self.tokens.device)
        start, length = (t[..., None].to(self.tokens.device, non_blocking=True) for t in (start, length))
        x = self.tokens[(start + column).clamp(max=len(self.tokens) - 1)].long() * (column < length)   # PAD is 0
        return x.to(self.device, non_blocking=True)

    def fixed(self, n=None, variant=0, rendering=None, among=None):
        """One sentence of each of the first n scenes, of all or of the indices `among`, always the same: (n, T'). By
        default a free rendering, the last; in a corpus of one's own the first, which is the original."""
        scenes = (torch.arange(self.size) if among is None else among)[:n]
        rendering = (-1 if self.canonical else 0) if rendering is None else rendering
        return self.take(scenes, torch.full_like(scenes, variant),
                         rendering % self.count[scenes, variant].long().clamp(min=1))

    def retrieval_pool(self, n):
        """Token ids of up to n scenes for retrieval: query, positive (n, T), negatives (n, families, T), valid (n,
        families). Scenes that are said in one way only are left out, as long as there are others.

        Free renderings; the three are never the same rendering number, so that no wording is shared by construction. In
        a corpus of one's own the query is the original, the positive the next that means the same, and a negative the
        first of its family: in the edits of english.py the query itself, one thing changed."""
        several = torch.nonzero(self.count[:, 0] > 1)[:, 0]
        scenes = (several if len(several) else torch.arange(self.size))[:n]
        count, zero = self.count[scenes].long().clamp(min=1), torch.zeros_like(scenes)         # (n, 1 + families), (n,)
        query, positive = (self.take(scenes, zero, (self.canonical + k) % count[:, 0]) for k in (0, 1))
        variants = torch.arange(1, count.shape[1]).expand(len(scenes), -1)            # (n, families)
        third = self.canonical + 2 if self.canonical else 0
        negatives = self.take(scenes[:, None], variants, third % count[:, 1:])
        return query, positive, negatives, (self.count[scenes, 1:] > 0).to(self.device)

    def clusters(self, n):
        """Every rendering of n scenes and one sentence of each of their counterfactuals: token ids (N, T), scene (N,),
        kind (list of N: 'paraphrase' or the family)."""
        count = self.count[:n].long()
        rows = [(s, f, r) for s, f in torch.nonzero(count).tolist() for r in range(int(count[s, f]) if f == 0 else 1)]
        scene, variant, rendering = torch.tensor(rows).unbind(1)
        kinds = ['paraphrase', *self.families]
        return self.take(scene, variant, count[scene, variant] - 1 - rendering), scene, [kinds[f] for f in variant]


def altered(x, begins, u, config):
    """Sentences x (..., T) a little otherwise, so that plain text has pairs that mean nearly the same: `drop_words` of
    the words deleted (one stays), `mask_words` hidden behind BOS, which no sentence holds, and `turn_words` of the
    sentences cut at a word and their parts exchanged -> (..., T). begins (vocab_size,) bool: tokens that begin a word;
    u (..., at least T + 2) uniform numbers."""
    T, real = x.shape[-1], x >= SPECIALS
    word = (begins[x] & real).cumsum(-1)                                              # from 1 on, in each sentence
    chance = u[..., 2:].gather(-1, word.clamp(max=u.shape[-1] - 3))                   # (..., T), the same within a word
    best = chance.masked_fill(~real, -1.0).amax(-1, keepdim=True)
    dropped = real & (chance < config.drop_words) & (chance < best)
    hidden = real & (chance > 1 - config.mask_words)
    cut = 1 + (u[..., :1] * word.amax(-1, keepdim=True)).long()
    turned = real & ~dropped & (word >= cut) & (u[..., 1:2] < config.turn_words)
    x = torch.where(dropped, PAD, torch.where(hidden, BOS, x))
    place = torch.arange(T, device=x.device) - T * turned.long() + T * (x == PAD)      # padding comes last
    return x.gather(-1, place.argsort(dim=-1))


def spread(index, sentences, count, every=1):
    """`count` of the `sentences` flattened rows (variants, views) of n scenes, in turn -> (count * n,), the first of
    every scene, then the second, ...: neighbours are of different scenes, as the prior on what unrelated canvases share
    wants them. index (n,): which scenes of the whole batch these are, so that the same rows are taken however it is
    split. every: of so many scenes one."""
    turn = torch.arange(count, device=index.device)[:, None]
    return (torch.arange(len(index), device=index.device) * sentences
            + (index // every + turn * (sentences // count)) % sentences)[:, ::every].flatten()      # (count*n/every,)


def _folder(config):
    """out/data/<key>: the key names what the arrays depend on, the text of the modules that make them included."""
    modules = __file__, grammar.__file__, english.__file__
    source = zlib.crc32(b''.join(Path(module).read_bytes() for module in modules))
    if config['corpus']:
        stat = Path(config['corpus']).stat()
        synonyms = '_w' if english.find_wordnet() else ''
        version = zlib.crc32(f'{stat.st_size} {stat.st_mtime_ns}'.encode())
        name = f"{Path(config['corpus']).stem}{synonyms}_{version:08x}"
    else:
        name = '_'.join(f'{letter}{config[key]}' for letter, key in (
            ('c', 'complexity'), ('n', 'num_scenes'), ('s', 'data_seed'),
            *([('e', 'simple_share')] if config['complexity'] > 1 else [])))
    return Path('out/data') / f"{name}_v{config['vocab_size']}_t{config['max_length']}_{source:08x}"


TOKENIZER_LINES = 200_000     # what BPE is trained on, at most


def prepare(folder, config, say=print):
    """Render (or read) the corpus, train the tokenizer, write the arrays, tokenizer.json and eval_pack.jsonl. The
    folder appears under its name only when it is complete; SystemExit(2), after one line, when the disk refuses. Memory
    grows by the scenes of the built-in grammar, and not at all by a corpus of your own."""
    began = time.time()
    if not 256 + SPECIALS <= config['vocab_size'] <= 32768:
        runtime.fail(f"--vocab_size={config['vocab_size']}: expects {256 + SPECIALS} (the single bytes and {SPECIALS} "
                     'special tokens) to 32768 (ids are 16-bit on the device)')
    if config['corpus']:
        parts, families = read_corpus(config['corpus'], say)
    else:
        parts, families, val = {}, FAMILIES, []
        for split in SPLITS:
            scenes = scenes_of(split, config['num_scenes'] if split == 'train' else HELD_OUT_SIZE, config['complexity'],
                               config['data_seed'], [id for _, meanings, _ in val for id in meanings]
                               if split == 'test' else ())                            # nothing a choice was made on
            if split == 'train' and config['complexity'] > 1:
                scenes = mix_in_simpler(scenes, config)
            parts[split] = render_split(split, scenes, config['data_seed'])
            if split == 'val':
                parts[split] = val = [*parts[split]]
    head, lines = [], []                     # the first training rows: what the tokenizer learns from
    while len(lines) < TOKENIZER_LINES and (more := [*itertools.islice(parts['train'], 1000)]):
        head += more
        lines += [line for groups, *_ in more for group in groups for line in group]
    if not head:
        runtime.fail(f"--corpus={config['corpus']}: nothing is left to train on without the held-out sentences")
    tokenizer = Tokenizer.train(iter(lines[:TOKENIZER_LINES]), config['vocab_size'])
    temporary = Path(f'{folder}.{os.getpid()}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)      # of a process of the same number that was killed
    temporary.mkdir(parents=True)
    try:
        write_eval_pack(temporary / 'eval_pack.jsonl', parts['val'], families)
        (temporary / 'families.json').write_text(json.dumps(families))
        sentences, too_long = 0, 0
        with tqdm(desc='writing', unit=' scenes', leave=False, disable=None) as bar:
            for split, rows in parts.items():
                rows = itertools.chain(head, rows) if split == 'train' else iter(rows)
                written = write_split(temporary / split, rows, tokenizer, config['max_length'], bar)
                sentences, too_long = sentences + written[0], too_long + written[1]
        if not config['corpus']:
            meanings = {split: read_array(temporary / split, 'meanings', len(FAMILIES)).unique() for split in parts}
            for split in SPLITS[1:]:
                shared = torch.isin(meanings[split][meanings[split] > 0], meanings['train']).sum()
                say(f'{split}: {HELD_OUT_SIZE} scenes and their counterfactuals; shared with train: {shared}')
        (temporary / 'tokenizer.json').write_text(json.dumps(tokenizer.state()))
        try:
            temporary.rename(folder)
        except OSError:                      # another process was faster and wrote the same
            if not folder.exists():
                raise
    except OSError as error:
        runtime.fail(f'cannot write {folder}: {error.strerror}')
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if too_long:
        say(f"{too_long} of {sentences} sentences are cut at max_length, {config['max_length']} tokens")
    say(f'prepared {folder}: {sentences} sentences, {tokenizer.size} tokens in the vocabulary, '
        f'{time.time() - began:.0f} s')


def write_eval_pack(path, rows, families):
    """The held-out paraphrases and counterfactuals as text, one scene a line: what every evaluation runs on."""
    with open(path, 'w', encoding='utf-8') as file:
        for (original, *paraphrases), *groups in (groups for groups, *_ in rows):
            file.write(json.dumps({'original': original, 'paraphrases': paraphrases, 'counterfactuals':
                                   {name: group for name, group in zip(families, groups) if group}}) + '\n')


HELD_OUT_LINES = 10_000       # of a corpus of your own, at most
MOST_RENDERINGS = 8
MOST_FAMILIES = 8


def read_corpus(path, say=print):
    """A corpus of your own -> {'train': iterator of rows, 'val': list of rows}, rows as of render_split, and the names
    of its families of counterfactuals. A tenth of the originals is held out, 10,000 at most: those with the smallest
    hashes, so nothing has to be remembered of the others. Held-out sentences, their paraphrases and counterfactuals are
    taken out of training wherever they come again, and are held out once.

    .txt: a sentence a line. .jsonl: {"original": str, "paraphrases": [str], "counterfactuals": [str] or
    {family: [str]}; the last two may be missing. Where no line has counterfactuals, english.py edits the originals, and
    synonyms from WordNet make one more paraphrase. Read line by line, twice, and never held in memory; a bad line
    is reported with its number and left out. Originals that are equal after normalisation count as one meaning.
    SystemExit(2) when nothing is left."""
    good = bad = 0
    wordnet = english.find_wordnet()

    def rows(complain=lambda line: None):
        """(id of the original, Line) of every good line."""
        nonlocal bad
        bad = 0
        try:
            with open(path, 'rb') as file:
                for number, raw in enumerate(file, start=1):
                    try:
                        line = _parse_line(raw.decode('utf-8'), path)
                    except ValueError as error:
                        bad += 1
                        if bad <= 10:
                            complain(f'bad line left out: {path}:{number}: {error}')
                        continue
                    if line:                                   # None is a blank line
                        yield sentence_id(line.same[0]), line
        except OSError as error:
            runtime.fail(f'--corpus={path}: {error.strerror}')
        if bad > 10:
            complain(f'... and {bad - 10} more bad lines')

    def as_row(key, line, secret=()):
        """The row of a line, without the sentences that are held out."""
        same, other, rand = line.same, line.other, random.Random(key).random
        if not brought:
            other = {family: [edit] for family, edit in english.edits(line.raw, rand).items()}
            if wordnet:      # each in other words too
                groups = same, *other.values()
                same, *edits = ([*group, english.synonyms(group[0], wordnet, rand) or ''] for group in groups)
                other = dict(zip(other, edits))
        groups = [[sentence for sentence in dict.fromkeys(map(normalize, group)) if sentence and sentence not in secret]
                  [:MOST_RENDERINGS] for group in (same, *(other.get(family, ()) for family in families))]
        return groups, [sentence_id(group[0]) if group else 0 for group in groups], 0

    def train():
        taken = again = 0
        for key, line in rows():
            again += 1
            if key not in val:
                taken += sum(sentence in secret for group in (line.same, *line.other.values()) for sentence in group)
                row = as_row(key, line, secret)
                if row[0][0]:
                    yield row
        if again != good:
            runtime.fail(f'--corpus={path} has changed while it was read')
        if taken:
            say(f'{taken} sentences taken out of training because they are held out')

    smallest, bound = {}, 1 << 63              # {id: Line where it comes first}, no id above the bound
    brought = {}                               # {family that the lines bring: None}, in order
    for key, line in rows(say):
        good += 1
        brought |= dict.fromkeys(line.other)
        if key < bound:
            smallest.setdefault(key, line)
            if len(smallest) > 20 * HELD_OUT_LINES:
                smallest = dict(sorted(smallest.items())[:10 * HELD_OUT_LINES])
                bound = max(smallest)
    if len(smallest) < 20:
        runtime.fail(f'--corpus={path}: only {len(smallest)} different good sentences on {good + bad} lines; '
                     'at least 20 are needed')
    families = list(brought)[:MOST_FAMILIES] or list(english.FAMILIES)
    if len(brought) > MOST_FAMILIES:
        say(f'{len(brought)} families of counterfactuals: only the first {MOST_FAMILIES} count, {", ".join(families)}')
    if not brought:
        say('no counterfactuals in the file: a tagger makes some; '
            + (f'synonyms from {wordnet}' if wordnet else 'no synonyms without WordNet (python -m tools.wordnet)'))
    val = dict(sorted(smallest.items())[:min(HELD_OUT_LINES, -(-len(smallest) // 10))])
    held_out = [as_row(key, line) for key, line in val.items()]
    secret = {sentence for groups, *_ in held_out for group in groups for sentence in group}
    secret.update(sentence for line in val.values() for group in (line.same, *line.other.values())
                  for sentence in group)
    return {'train': train(), 'val': held_out}, families


def sentence_id(text):
    """What equal sentences share and others do not: 64 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little', signed=True) or 1


class Line(NamedTuple):
    """A line of a corpus of your own."""
    raw: str                     # the original as it stands there
    same: list                   # the original and its paraphrases, normalised
    other: dict                  # {family: [counterfactuals]}, normalised


def _parse_line(text, path):
    """Text of a line -> Line, or None for a blank one. ValueError says what is wrong with it."""
    if not text.strip():
        return None
    paraphrases = negatives = None
    if str(path).endswith('.jsonl'):
        try:
            row = json.loads(text)
        except RecursionError:
            raise ValueError('brackets in brackets without end') from None
        if not isinstance(row, dict) or not isinstance(row.get('original'), str):
            raise ValueError('no "original" sentence')
        text, paraphrases, negatives = row['original'], row.get('paraphrases'), row.get('counterfactuals')
    if isinstance(negatives, list):
        negatives = {f'counterfactual {k}': [sentence] for k, sentence in enumerate(negatives, start=1)}
    paraphrases, negatives = [] if paraphrases is None else paraphrases, {} if negatives is None else negatives
    if not isinstance(negatives, dict) or not all(isinstance(group, list) and all(isinstance(s, str) for s in group)
                                                  for group in (paraphrases, *negatives.values())):
        raise ValueError('paraphrases and counterfactuals must be lists of sentences')
    groups = [[sentence for sentence in map(normalize, group) if sentence]
              for group in ([text, *paraphrases], *negatives.values())]
    if not groups[0]:
        raise ValueError('no words')
    if any(len(sentence) > 2000 for group in groups for sentence in group):
        raise ValueError('longer than 2000 characters')
    return Line(text, groups[0], {family: group for family, group in zip(negatives, groups[1:]) if group})


class TextData(NamedTuple):
    """What a phase knows of its text."""
    splits: dict                 # {'train', 'val', 'test', ...: Corpus}
    tokenizer: Tokenizer
    types: torch.Tensor          # (vocab_size,) and
    concepts: torch.Tensor       # (vocab_size,) on the device, see token_types()
    checked: bool                # sentences of grammar.py, which its checker reads


def load(config, run=None, checkpoint=None):
    """The prepared corpus of a run -> TextData, prepared first where it is missing (by rank 0).

    config: corpus, num_scenes, complexity, simple_share, data_seed, vocab_size, max_length; leave_out where there is
    one. The splits of a corpus of your own are 'train' and 'val', and 'test' is the same as 'val'. checkpoint: of nets
    that go on; SystemExit(2), after one line, if they learnt other token ids."""
    if config['corpus'] and not Path(config['corpus']).is_file():
        runtime.fail(f"--corpus={config['corpus']}: no such file")
    if config['complexity'] not in (1, 2, 3) or not 0 <= config['simple_share'] <= 1:
        runtime.fail(f"--complexity={config['complexity']} --simple_share={config['simple_share']}: expects 1, 2 or 3, "
                     'and expects 0 to 1')
    if not config['corpus'] and config.get('leave_out', '') not in ('', *FAMILIES):
        runtime.fail(f"--leave_out={config['leave_out']}: expects nothing or one of {', '.join(FAMILIES)}")
    folder, device, say = _folder(config), run.device if run else torch.device('cpu'), run.say if run else print
    if not folder.exists() and (run is None or run.master):
        say(f'preparing {folder} ...')
        prepare(folder, config, say)
    if run is not None:
        runtime.barrier(run)
    tokenizer = Tokenizer.load(json.loads((folder / 'tokenizer.json').read_text()))
    if checkpoint:
        runtime.check_tokenizer(tokenizer.state(), checkpoint)
    begins = torch.tensor([False] * SPECIALS + [token[:1] == b' ' for token in tokenizer.ranks], device=device)
    splits, families = {}, json.loads((folder / 'families.json').read_text())
    for split in SPLITS:
        if (folder / f'{split}.tokens').exists():
            splits[split] = Corpus(folder / split, families, 0 if config['corpus'] else CANONICAL_RENDERINGS,
                                   config['max_length'], device, begins)
    splits.setdefault('test', splits['val'])
    types, concepts = (t.to(device) for t in token_types(tokenizer, config['vocab_size']))
    return TextData(splits, tokenizer, types, concepts, not config['corpus'])


def show(complexity, seed, say=print):
    """A readable sample of everything: a scene, ten paraphrases, one counterfactual a family."""
    rand = random.Random(seed).random
    scene = scenes_of('train', 1, complexity, seed)[0]
    say(f'scene       {grammar.graph(scene)}')
    for _ in range(10):
        say(f'paraphrase  {grammar.render(scene, rand)}')
    for family in FAMILIES:
        changed = next(filter(None, (grammar.counterfactual(scene, family, rand) for _ in range(50))), None)
        sentence = grammar.render(changed, rand) if changed else '(does not apply)'
        f1 = f'   Graph F1 to the scene {grammar.graph_f1(scene, grammar.parse(sentence)):.2f}' if changed else ''
        say(f'{family:15s} {sentence}{f1}')


def write_sentences(path, n, complexity, seed):
    """n training sentences as plain text, or as JSONL with paraphrases and counterfactuals."""
    rand = random.Random(seed).random
    scenes = scenes_of('train', n, complexity, seed)
    try:
        with open(path, 'w', encoding='utf-8') as file:
            for scene in scenes:
                if path.endswith('.jsonl'):
                    changed = {family: grammar.allowed_counterfactual(scene, family, rand, 'train')
                               for family in FAMILIES}
                    file.write(json.dumps({
                        'original': grammar.render(scene, rand),
                        'paraphrases': [grammar.render(scene, rand) for _ in range(3)],
                        'counterfactuals': {f: [grammar.render(c, rand)] for f, c in changed.items() if c}}) + '\n')
                else:
                    file.write(grammar.render(scene, rand) + '\n')
    except OSError as error:
        runtime.fail(f'--out={path}: {error.strerror}')
    print(f'wrote {n} sentences to {path}')


def main():
    if num < 1 or complexity not in (1, 2, 3):
        runtime.fail(f'--num must be at least 1 and --complexity 1, 2 or 3; got {num} and {complexity}')
    if out:
        return write_sentences(out, num, complexity, seed)
    if not corpus:
        show(complexity, seed)
    text = load({'corpus': corpus, 'num_scenes': num, 'complexity': complexity, 'simple_share': simple_share,
                 'data_seed': seed, 'vocab_size': vocab_size, 'max_length': 64 if complexity < 3 else 80})
    for split, part in text.splits.items():
        lengths = part.starts.diff().float()
        print(f'{split:12s} {part.size:7d} scenes, {len(lengths):8d} sentences, '
              f'{lengths.mean():.1f} tokens on average, {int(lengths.max())} at most')
    print(f'vocabulary   {text.tokenizer.size} tokens of at most {vocab_size}: training stops when no pair repeats')


if __name__ == '__main__':
    main()

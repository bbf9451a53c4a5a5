"""One page to judge a model by: what it makes of held-out sentences and draws from noise, beside baselines.

Reads:  a checkpoint of P5 or P6 and the corpus that it learnt from; P4's checkpoint for one more baseline
Writes: out/page/page.md, montage.png, page.json (all numbers, and all sentences that they are of)
    python -m tools.page --init_from=out/p6/ckpt.pt
"""
import json
import random
import re
import sys
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from tqdm import tqdm

import data
import plot
import runtime
from english import details, same_details
from metrics import shuffle_canvas
from model import BOS, build
from p5_roundtrip import candidates
from p6_diffusion import ddim, predict_eps
from sample import HOLDS, TextCanvas
from textmetrics import Trigram, format_table, generator_table, mean, nearest, reading_table, self_bleu

init_from = ''            # a checkpoint of P5 or P6; '' is the newest in out/, or else the model that comes with this
out = 'out/page'          # folder of the page
n = 2048                  # >= 2: held-out sentences that are read back, or all there are
paraphrased = 512         # >= 2: of these, how many are said in other words
k = 16                    # >= 2: samples of each, of which the nearest in z is taken
draws = 1000              # >= 1: canvases from the diffusion prior of P6
p4 = 'out/p4/ckpt.pt'     # P4's decoder without a canvas writes beside the draws, where this file has it
batch_size = 256          # >= 1: sentences at once
seed = 0                  # of what is drawn at random
device = 'auto'
dtype = 'auto'
config = runtime.configure(globals())

CHUNK, TRAINING = 10_000, 200_000      # sentences decoded at once; training sentences that draws are compared with


def lines(ids, tokenizer):
    """Token ids, flat or padded, every sentence closed by EOS -> the sentences, all decoded in one call."""
    ids = np.asarray(ids[ids != data.PAD].cpu())
    ranks = np.where(ids == data.EOS, tokenizer.newline, ids - data.SPECIALS).tolist()
    return [line.strip() for line in tokenizer.bpe.decode_bytes(ranks).decode('utf-8', 'replace').split('\n')[:-1]]


def census(corpus, tokenizer, wanted):
    """Counter of the words of a split, counterfactuals included, and how many of a set of sentences it has."""
    counts, found, total = Counter(), set(), len(corpus.starts) - 1
    for first in tqdm(range(0, total, CHUNK), 'counting words', mininterval=runtime.PROGRESS_SECONDS):
        chunk = lines(corpus.tokens[corpus.starts[first]:corpus.starts[min(first + CHUNK, total)]], tokenizer)
        counts.update(word for line in chunk for word in line.split())
        found.update(wanted.intersection(chunk))
    return counts, len(found)


def originals_and_paraphrases(corpus, tokenizer):
    """Yield these sentences of a split, the originals first."""
    for rendering in range(int(corpus.count[:, 0].max())):
        for part in torch.nonzero(corpus.count[:, 0] > rendering)[:, 0].split(CHUNK):
            yield from lines(corpus.fixed(rendering=rendering, among=part), tokenizer)


def collect(function, items, what, size):
    """The results of function(part) in one list; a part is a slice of at most `size` items."""
    starts = tqdm(range(0, len(items), size), what, mininterval=runtime.PROGRESS_SECONDS)
    return [result for start in starts for result in function(items[start:start + size])]


def read_back(model, part):
    """[(sentence, what is read in its canvas, what is read there with the pixels in another order)]"""
    V, _ = model.read(part)
    return list(zip(part, model.say(V), model.say(shuffle_canvas(V))))


def other_words(model, generator, part):
    """[(sentence, k samples in other words, their cosines with it in z)]"""
    V, z = model.read(part)
    u = torch.rand(len(part), k, model.max_length, generator=generator).to(model.device)
    with model.autocast():
        ids, cosines = candidates(model.nets, V, z, u, model.config)
    return [(sentence, [model.tokenizer.decode(row) for row in rows], cosine)
            for sentence, rows, cosine in zip(part, ids.tolist(), cosines.tolist())]


def paired(model, sentences, others):
    """[(sentence, other, their cosine in z)]"""
    return list(zip(sentences, others, (model.encode(sentences) * model.encode(others)).sum(1).tolist()))


def drawn(model, generator, part):
    """What is read in canvases that the diffusion prior draws from noise, as many as `part` is long."""
    c = model.config
    noise = torch.randn(len(part), c.channels, c.size, c.size, generator=generator).to(model.device)
    V = ddim(partial(predict_eps, model.nets['unet']), noise, c.sample_steps, c.eta, generator, model.autocast)
    return model.say(V * model.std.to(model.device) + model.mean.to(model.device))


def without_canvas(model, count):
    """{name: sentences} drawn from P4's language model; {} where there is none that knows the same tokens."""
    holds = runtime.load_checkpoint(p4, 'p4', 'python p4_decoder.py', HOLDS, mmap=True) if Path(p4).is_file() else None
    if not holds or 'no canvas' not in holds['ema'] or holds['state']['tokenizer'] != model.tokenizer.state():
        return {}
    nets, generator = build(runtime.Config(holds['config']), 'no canvas'), torch.Generator().manual_seed(seed)
    top_p, length = model.config.top_p, holds['arch']['max_length']
    runtime.load_weights(nets.to(model.device).eval(), holds, nets)

    def say(part):
        u = torch.rand(len(part), length, generator=generator).to(model.device)
        with model.autocast():
            ids = nets['no canvas'].generate(u, None, length, BOS, top_p, u)
        return [model.tokenizer.decode(row) for row in ids.tolist()]
    return {f'decoder without a canvas, top_p {top_p}': collect(say, range(count), 'no canvas', batch_size)}


@torch.no_grad()
def walk(model, first, second):
    """Rows (place, what is read, cosine with either) of nine places on the straight line between two canvases."""
    V, z = model.read([first, second])
    shares = torch.linspace(0, 1, 9, device=V.device)[:, None, None, None]
    between = (1 - shares) * V[0] + shares * V[1]
    with model.autocast():
        cosines = model.nets['readout'](between).float() @ z.float().T
    return [[s, said, *both] for s, said, both in zip(shares.flatten().tolist(), model.say(between), cosines.tolist())]


def reading_rows(rows, counts):
    """reading_table() of what read_back() gives and, below it, of chance; counts: of words in training."""
    originals, said, shuffled = map(list, zip(*rows))
    controls = {"another sentence's canvas": said[-1:] + said[:-1], 'canvas shuffled': shuffled}
    return reading_table(originals, said, counts) | {
        name: reading_table(originals, other)['all'] for name, other in controls.items()}


def comparison(pairs):
    """[(sentence, another text, their cosine in z)] -> (what they share in words and meaning, the share of pairs that
    agree in each of english.details: of all, and of the n whose sentence has such a detail)."""
    originals, texts, cosines = zip(*pairs)
    row, kept = reading_table(originals, texts)['all'], {}
    same = [(details(a), same_details(a, b)) for a, b in zip(originals, texts)]
    for name in same[0][1]:
        there = [agree[name] for has, agree in same if has[name]]
        kept |= {name: mean(agree[name] for _, agree in same), f'{name}_there': mean(there), f'{name}_n': len(there)}
    return {'n': row['n'], 'rouge_l': row['rouge_l'], 'cosine': mean(cosines), 'not_the_input': 1 - row['exact']}, kept


def table(header, rows):
    """A Markdown table; a decoder may say whatever has bytes."""
    def cell(value):
        text = ''.join(c if c.isprintable() else ' ' if c.isspace() else '\ufffd' for c in str(value))
        return f'{value:.2f}' if isinstance(value, float) else re.sub(r'([\\|<>*_`\[\]&~])', r'\\\1', text)
    return '\n'.join(f"| {' | '.join(row)} |" for row in (header, ['---'] * len(header), *(map(cell, r) for r in rows)))


def markdown(page):
    """page.md, from what page.json holds."""
    numbers = {name: f'```\n{format_table(rows)}\n```' for name, rows in page['tables'].items()}
    sentences = [[a, '✓' if a == said else said, other, cosine] for (a, said, _), (_, other, cosine)
                 in zip(page['read_back'][:20], page['otherwise'])]
    drawing = ['This model has no diffusion prior.'] if 'draws' not in page else [
        'Canvases drawn from noise and read, beside other texts, all cut to one size. *Forward*: nats a word under a '
        'trigram model of training, low where a text is like it. *Reverse*: nats a word of other held-out sentences '
        'under a trigram model of the text, high where it lacks what people say. *Unknown*: words not twice in '
        'training. *Copied*, *nearest*: of {compared} training sentences, counterfactuals left out.',
        numbers['drawing'], table(['draw', 'nearest training sentence', 'cosine (TF-IDF)'], page['nearest'])]
    return '\n\n'.join(text if text[0] in '#|`!' else fill(text.format(**page['about']), 100) for text in (
        '# What the model reads, says and draws',
        'Checkpoint of {phase}, step {step}, commit {commit}, trained on {corpus}: {sentences} sentences in {rows} '
        'rows of what belongs together. Measured on held-out sentences, one of each of {held_out} rows, {shared} of '
        'which stand in training too; all are cut at {max_length} tokens. nan: nothing to measure.', '## Reading back',
        'What the decoder says of a canvas, always the likeliest token; BLEU-4 goes to 100. *Rarest word*: how often '
        'training has it. The last rows are chance: the canvas of another sentence, or its pixels in another order.',
        numbers['reading'], '## Held-out sentences',
        '✓: read back exactly. *Said otherwise*: of {k} samples (nucleus {top_p}) the nearest in z.',
        table(['sentence', 'read back', 'said otherwise', 'cosine'], sentences), '## Other words',
        'ROUGE-L: words in common, in order. Cosine: of z, what the model itself takes for the same meaning. The last '
        "rows are other texts in its place; another of its row is another person's where the corpus has such. "
        'Self-BLEU among the {k} samples of a sentence: {self_bleu:.1f} (100: all the same).', numbers['other words'],
        'The share of pairs that agree in numbers, colours, negation: of all, and (*there*) of *n* inputs with any.',
        numbers['details kept'], '## Drawing', *drawing, '## A walk between two sentences',
        'Nine places on the straight line between two canvases, and the cosine of z with that of either end.',
        table(['place', 'what is read', 'cosine with the first', 'with the second'], page['walk']), '## Canvases',
        '![a row for each of sixteen held-out sentences, a column for each channel](montage.png)')) + '\n'


def measure(model, text):
    """All that the page says -> {name: plain values}."""
    train, test, tokenizer, c = text.splits['train'], text.splits['test'], text.tokenizer, model.config
    held_out, generator = lines(test.fixed(), tokenizer), torch.Generator().manual_seed(seed)
    counts, shared = census(train, tokenizer, set(held_out))
    commit = runtime.load_checkpoint(model.path, model.phase, '', ('commit',), mmap=True)['commit']
    about = {'phase': model.phase.upper(), 'step': model.step, 'commit': runtime.short(commit), 'k': k, 'seed': seed,
             'corpus': Path(c.corpus).name or 'the built-in grammar', 'rows': train.size, 'held_out': len(held_out),
             'sentences': len(train.starts) - 1, 'max_length': model.max_length, 'top_p': c.top_p, 'shared': shared}
    read = collect(partial(read_back, model), held_out[:n], 'reading back', batch_size)
    inputs = held_out[:min(n, paraphrased)]
    said = collect(partial(other_words, model, generator), inputs, 'other words', max(1, batch_size // k))
    best = [(a, *max(zip(samples, cosines), key=lambda pair: pair[1])) for a, samples, cosines in said]
    about['self_bleu'] = mean(collect(partial(map, self_bleu), [samples for _, samples, _ in said], 'self-BLEU', 16))
    several = torch.nonzero(test.count[:len(inputs), 0] > 1)[:, 0]
    kinds = {f'nearest in z of {k}': best, 'one sample': [(a, samples[0], cosines[0]) for a, samples, cosines in said],
             'the input itself': paired(model, inputs, inputs),
             'another of its row': paired(model, [inputs[i] for i in several], lines(
                 test.fixed(rendering=1, among=several), tokenizer)) if len(several) else [],
             'another held-out sentence': paired(model, inputs, inputs[-1:] + inputs[:-1])}
    words, kept = ({kind: comparison(pairs)[i] for kind, pairs in kinds.items() if pairs} for i in (0, 1))
    tables = {'reading': reading_rows(read, counts), 'other words': words, 'details kept': kept}
    end = min(inputs[1:], key=lambda other: abs(len(other.split()) - len(inputs[0].split())))
    page = {'about': about, 'tables': tables, 'read_back': read, 'otherwise': best, 'walk': walk(model, inputs[0], end)}
    if model.has_prior:
        page['draws'] = collect(partial(drawn, model, generator.manual_seed(seed)), range(draws), 'drawing', batch_size)
        training = list(islice(originals_and_paraphrases(train, tokenizer), TRAINING))
        size, about['compared'] = min(draws, len(held_out) // 2), len(training)      # `reverse` is of the other half
        kinds = {'draws': page['draws'], 'held-out sentences': held_out[:size],
                 'trigram model': Trigram.train(training).sample(size, random.Random(seed).random),
                 'painted canvases read back': [again for _, again, _ in read[:size]]} | without_canvas(model, size)
        print('comparing with the training text', file=sys.stderr, flush=True)
        tables['drawing'], first = generator_table(kinds, training, held_out[size:]), page['draws'][:20]
        page['nearest'] = [(draw, *found[0]) for draw, found in zip(first, nearest(first, training))]
    return page


def main():
    folder, model = Path(out), TextCanvas(init_from, device, dtype)
    text = data.load(model.config, checkpoint={'state': {'tokenizer': model.tokenizer.state()}})
    try:
        folder.mkdir(parents=True, exist_ok=True)          # before the minutes that the rest takes
        page = measure(model, text)
        titles = [sentence for sentence, *_ in page['read_back'][:16]]
        montage = {'montage': plot.as_array(model.read(titles)[0]), 'titles': titles}
        plot.save(plot.montage(montage), folder / 'montage.png')
        runtime.write_text(folder / 'page.md', markdown(page))
        runtime.write_json(folder / 'page.json', json.loads(json.dumps(page), parse_constant=lambda nan: None))
    except OSError as error:
        runtime.fail(f'--out={out}: {error.strerror}')
    print(f'wrote {folder / "page.md"}, montage.png and page.json')


if __name__ == '__main__':
    main()

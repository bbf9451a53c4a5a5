"""Use a trained model: see the canvas of a sentence, read it back, say it in other words, embed a file.

    python sample.py --text="two red cubes are under a blue ball"          # paraphrases, counterfactuals, a figure
    python sample.py --text="a red cube is on a ball" --text2="..."        # cosine, and a walk between the canvases
    python sample.py --model=english --text="She put the slippers under the bed."
    python sample.py --interactive=true                                    # the same for every line typed
    python sample.py --draw=8 --init_from=out/p6/ckpt.pt                   # sentences read in canvases drawn from noise
    python sample.py --embed=sentences.txt --out=z.npy                     # (lines, 256) float32 of unit norm
In Python: `TextCanvas().encode(['a red cube is on a blue ball'])`.

Reads:  pretrained/model.pt or pretrained/english/model.pt, or the last P5 or P6 in out/ that has ended
Writes: out/sample/*.png, or the file named by --out
"""
import os
import random
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import english
import grammar
import runtime
from model import BOS, PARA, SIZES, build

init_from = ''            # a checkpoint of P5 or P6; '' is the newest in out/, or else the model that comes with this
model = ''                # english: the model of ordinary English that comes with this, in pretrained/english
text = ''                 # a sentence
text2 = ''                # another one, to compare it with
interactive = False       # ask for sentences until an empty line
embed = ''                # a file of sentences, one a line
out = 'z.npy'             # where the embeddings go
canvas = False            # with embed: also write the canvases, beside them as <out>_canvas.npy, float16
draw = 0                  # >= 0: so many canvases from the diffusion prior of P6
paraphrases = 4           # >= 0: shown: of four times as many that are drawn, the ones whose z is nearest the input's
top_p = 0.9               # nucleus that they are drawn from
walk = 7                  # canvases from text to text2, both included
figures = 'out/sample'    # folder of the pictures; '' draws none
batch_size = 256          # >= 1: sentences encoded at once
seed = 0                  # of what is drawn at random
device = 'auto'
dtype = 'auto'
config = runtime.configure(globals())

CHUNK = 16_384            # lines held in memory while a file is embedded
LONGEST_LINE = 10_000     # characters of a line that are looked at: far more than any max_length tokens


HOLDS = 'step', 'arch', 'config', 'ema', 'state'


def shipped(name):
    """The file of a model in pretrained/; SystemExit(2), after one line, if there is none of that name."""
    folder = Path(__file__).parent / 'pretrained'
    if not (folder / name / 'model.pt').is_file():
        names = [path.parent.name for path in folder.glob('*/model.pt')]
        runtime.fail(f"--model={name}: pretrained/ has {' and '.join(names) or 'no model with a name'}")
    return folder / name / 'model.pt'


def newest():
    """The checkpoint of P5 or P6 in out/ that ended last, or the model that comes with the repository if that is newer
    or there is none."""
    ended = [path for path in (Path('out/p5/ckpt.pt'), Path('out/p6/ckpt.pt')) if path.with_name('gate.json').is_file()]
    here = Path(__file__).parent / 'pretrained' / 'model.pt'
    return max((path for path in (here, *ended) if path.is_file()), key=lambda path: path.stat().st_mtime, default=here)


class TextCanvas:
    """A trained model as functions of sentences. path: a checkpoint of P5 or P6, '' as newest() says; SystemExit(2),
    after one line, if it is none. Sentences are normalised as in training (grammar.normalize): capitals and punctuation
    do not matter. A sentence of no words is the empty sentence and has an embedding too; what is longer than
    `max_length` tokens is cut; an unknown word is read letter by letter."""

    def __init__(self, path='', device='auto', dtype='auto'):
        self.path = Path(path or newest())
        checkpoint = runtime.load_checkpoint(self.path, ('p5', 'p6'), 'bash runs/cpu.sh', HOLDS)
        self.device, self.arch, self.phase = runtime.find_device(device), checkpoint['arch'], checkpoint['phase']
        self.config, self.step = runtime.Config(checkpoint['config']), checkpoint['step']
        if missing := sorted({*SIZES} - {*self.config, 'unet_dim'}):
            runtime.fail(f'{self.path} is older than the scripts: it has no {", ".join(missing)}; run the phases again')
        self.checked = not self.config.corpus                                 # learnt the built-in grammar
        self.has_prior = self.config.get('lambda_prior', 0) > 0               # P6, and not its control
        bf16 = runtime.find_dtype(dtype, self.device) == torch.bfloat16
        self.autocast = partial(torch.autocast, self.device.type, dtype=torch.bfloat16, enabled=bf16)
        self.nets = build(self.config, 'encoder', 'readout', 'decoder', *(['unet'] if self.phase == 'p6' else []))
        self.nets.to(self.device).eval()
        runtime.load_weights(self.nets, checkpoint, self.nets)
        self.tokenizer = data.Tokenizer.load(checkpoint['state']['tokenizer'])
        self.max_length = self.arch['max_length']
        self.mean, self.std = (checkpoint['state'].get(name) for name in ('mean', 'std'))     # of P6's canvases
        self.cut = 0                                          # sentences that were too long, so far

    def tokens(self, sentences):
        """Token ids of each sentence, closed by EOS and cut to max_length."""
        ids = [self.tokenizer.encode(sentence) for sentence in sentences]
        self.cut += sum(len(row) > self.max_length for row in ids)
        return [row if len(row) <= self.max_length else row[:self.max_length - 1] + [data.EOS] for row in ids]

    @torch.no_grad()
    def forward(self, sentences, batch_size=256):
        """Yield (indices of the batch, canvases (n, C, H, W), embeddings (n, E)); sentences of a length go together."""
        ids = self.tokens(sentences)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            width = -(-max(len(ids[i]) for i in rows) // 8) * 8
            x = torch.tensor([ids[i] + [data.PAD] * (width - len(ids[i])) for i in rows], device=self.device)
            with self.autocast():
                V = self.nets['encoder'](x[:, :self.max_length])
                yield rows, V, self.nets['readout'](V)

    def encode(self, sentences, batch_size=256, **_):
        """list[str] -> (N, E) float32 array of unit norm, the convention of sentence-embedding benchmarks: cosine is a
        dot product. Other keyword arguments (show_progress_bar, ...) are accepted and ignored; TypeError for one
        sentence that is in no list."""
        if isinstance(sentences, str):
            raise TypeError('encode expects a list of sentences, not one string')
        sentences = list(sentences)
        z = np.zeros((len(sentences), self.arch['z_dim']), np.float32)
        for rows, _, part in self.forward(sentences, batch_size):
            z[rows] = part.float().cpu().numpy()
        return z

    def read(self, sentences):
        """list[str] -> canvases (N, C, H, W), embeddings (N, E), as tensors on the device."""
        parts = [(torch.tensor(rows), V, z) for rows, V, z in self.forward(sentences)]
        back = torch.cat([rows for rows, *_ in parts]).argsort().to(self.device)
        return torch.cat([V for _, V, _ in parts])[back], torch.cat([z for *_, z in parts])[back]

    @torch.no_grad()
    def say(self, V, start=BOS, top_p=0.0, generator=None):
        """What the decoder reads in canvases V (N, C, H, W): N sentences. start: BOS says it again, PARA in other
        words; top_p > 0 draws from the nucleus with `generator`, 0 takes the likeliest token."""
        u = torch.rand(len(V), self.max_length, generator=generator).to(V.device)
        with self.autocast():
            z = self.nets['readout'](V)
            for length in (min(24, self.max_length), self.max_length):       # few sentences are longer than 24 tokens
                ids = self.nets['decoder'].generate(V, z, length, start, top_p, u[:, :length])
                if (ids == data.EOS).any(1).all():
                    break
        return [self.tokenizer.decode(row) for row in ids.tolist()]


def counterfactuals(sentence, rand, checked):
    """[(family, sentence)]: the scene of a sentence with one thing changed, all that 40 draws of each family find, each
    in the plainest words; [] for a sentence that the checker cannot read. Of ordinary English (not checked): its edits.
    """
    if not checked:
        return [*english.edits(sentence, rand).items()]
    scene = grammar.parse(sentence)
    if scene is None:
        return []
    found = {}
    for family in grammar.FAMILIES:
        for _ in range(40):
            other = grammar.counterfactual(scene, family, rand)
            if other:
                found.setdefault(grammar.canonical(other, lambda: 0.0), family)
    return [(family, other) for other, family in found.items()]


def rouge_l(a, b):
    """F1 of the longest common subsequence of words of two normalised sentences (Lin 2004); as rouge_score has it,
    whose import takes as long as that of torch."""
    a, b = a.split(), b.split()
    row = [0] * (len(b) + 1)                               # longest common subsequence of a[:i] and b[:j]
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return 2 * row[-1] / max(1, len(a) + len(b))


def describe(model, sentence, generator):
    """Print what the model makes of a sentence, and draw it."""
    plain = grammar.normalize(sentence)
    scene = grammar.parse(plain) if model.checked else None
    unknown = '' if scene or not model.checked else '   (not of the built-in grammar: no Graph F1, no counterfactuals)'
    print(f'read as      {plain}{unknown}')
    V, z = model.read([plain])
    if len(model.tokenizer.encode(plain)) > model.max_length:
        print(f'cut          only its first {model.max_length - 1} tokens are on the canvas')
    print(f'said again   {model.say(V)[0]}')
    if paraphrases:
        drawn = 4 * paraphrases
        said = list(dict.fromkeys(model.say(V.expand(drawn, -1, -1, -1), PARA, top_p, generator)))      # each once
        _, z_said = model.read(said)
        column = 'Graph F1' if model.checked else ''
        print(f"{'':12s} {'cosine':>6s}  {'ROUGE-L':>7s}  {column:>8s}   (of {drawn} drawn, the nearest in z)")
        for cosine, other in sorted(zip((z_said @ z[0]).tolist(), said), reverse=True)[:paraphrases]:
            f1 = f"{f'{grammar.graph_f1(scene, grammar.parse(other)):.2f}' if scene else '-' * model.checked:>8s}"
            print(f"paraphrase   {cosine:6.2f}  {rouge_l(plain, other):7.2f}  {f1}  {other}")
    changed = counterfactuals(sentence, random.Random(seed).random, model.checked)
    if changed:
        _, others = model.read([other for _, other in changed])
        cosine, (family, other) = max(zip((others @ z[0]).tolist(), changed))
        print(f'nearest of {len(changed)} counterfactuals {cosine:.2f}  {other}   ({family})')
    sys.stdout.flush()                                     # the answer; matplotlib takes another second
    if figures:
        picture(model, plain, V, z)


def picture(model, sentence, V, z):
    """One figure: the six channels, their mean, and where the decoder looks as it says each token."""
    import plot
    from metrics import attention_maps
    ids = model.tokens([sentence])[0]
    maps = attention_maps(model.nets['decoder'], V, z, torch.tensor([ids], device=model.device),
                          model.autocast)[0]
    words = [model.tokenizer.decode([i]) if i >= data.SPECIALS else '.' for i in ids]
    name = '_'.join(sentence.split())[:80].encode()[:200].decode(errors='ignore') or 'empty'    # file names are bytes
    arrays = {'V': plot.as_array(V[0]), 'maps': plot.as_array(maps), 'words': words, 'title': sentence}
    print(f'picture      {save_figure(plot.sentence(arrays), name)}')


def save_figure(figure, name):
    """Write a figure into the folder of figures; returns its path. SystemExit(2), after one line, when that fails."""
    import plot
    try:
        return plot.save(figure, Path(figures) / f'{name}.png')
    except OSError as error:
        runtime.fail(f'--figures={figures}: {error.strerror}')


def compare(model, first, second):
    """Cosine of two sentences, and what is read on the straight line between their canvases."""
    V, z = model.read([first, second])
    print(f'cosine       {(z[0] @ z[1]).item():.3f}')
    shares = torch.linspace(0, 1, walk, device=V.device)[:, None, None, None]
    with torch.no_grad(), model.autocast():
        between = (1 - shares) * V[0] + shares * V[1]
        cosines = model.nets['readout'](between).float() @ z.float().T
    for share, sentence, (a, b) in zip(shares.flatten().tolist(), model.say(between), cosines.tolist()):
        print(f'{share:12.2f} {sentence}   (cosine {a:.2f} and {b:.2f})')


def draw_canvases(model, n, generator):
    """n canvases from the diffusion prior, what is read in them, and their montage."""
    import plot
    from p6_diffusion import ddim, predict_eps, reading
    config, checked = model.config, model.checked
    shape = n, config.channels, config.size, config.size
    noise = torch.randn(shape, generator=generator).to(model.device)
    predict = partial(predict_eps, model.nets['unet'])
    V = ddim(predict, noise, config.sample_steps, config.eta, generator, model.autocast)      # as P6 drew its own
    V = V * model.std.to(model.device) + model.mean.to(model.device)
    read, sentences = reading(model.nets, V, model.tokenizer, model.autocast, model.max_length, checked)
    for sentence in sentences:
        print(sentence)
    print((f"the checker reads {read['parsed']:.0%}; " if checked else '') + f"distinct {read['distinct']:.0%}")
    if figures:
        figure = plot.montage({'montage': plot.as_array(V[:16]), 'titles': sentences[:16]})
        print(save_figure(figure, 'drawn'))


def lines_of(path):
    """The lines of a file, whatever its bytes: what is no UTF-8 becomes U+FFFD, which normalisation drops."""
    try:
        with open(path, encoding='utf-8', errors='replace', newline='\n') as file:
            while line := file.readline(LONGEST_LINE):
                yield line.rstrip('\r\n')
                while line and not line.endswith('\n') and len(line) == LONGEST_LINE:      # the rest of it
                    line = file.readline(LONGEST_LINE)
    except OSError as error:
        runtime.fail(f'--embed={path}: {error.strerror}')


def embed_file(model, path, to, with_canvas):
    """Embed a file of any number of lines in bounded memory: row k of the output is line k, of which the first
    LONGEST_LINE characters are read. The files appear under their names only when they are complete. Raises
    SystemExit(2), after one line, when one fails."""
    total = sum(1 for _ in lines_of(path))
    if not total:
        runtime.fail(f'--embed={path}: the file is empty')
    arch, to = model.arch, Path(to)
    if to.suffix != '.npy' or to.is_dir():
        runtime.fail(f'--out={to}: expects the name of a file that ends in .npy')
    shapes = {to: ((total, arch['z_dim']), np.float32)}
    if with_canvas:
        shape = total, arch['channels'], arch['size'], arch['size']
        shapes[to.with_name(f'{to.stem}_canvas.npy')] = shape, np.float16
    if Path(path).resolve() in [name.resolve() for name in shapes]:
        runtime.fail(f'--embed={path} --out={to}: the output would replace the sentences')
    temporary = {name: name.with_name(f'.{name.name}.{os.getpid()}.tmp') for name in shapes}
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        arrays = [np.lib.format.open_memmap(temporary[name], mode='w+', dtype=kind, shape=shape)
                  for name, (shape, kind) in shapes.items()]
        empty = fill(arrays, model, path, total)
        for name, part in temporary.items():
            part.replace(name)
    except OSError as error:
        runtime.fail(f'--out={to}: {error.strerror}')
    finally:                                               # after Ctrl-C too
        for part in temporary.values():
            part.unlink(missing_ok=True)
    print(f"wrote {', '.join(map(str, shapes))}: {total} lines, {empty} of them without words, {model.cut} cut at "
          f'{model.max_length} tokens')


def fill(arrays, model, path, total):
    """Embed the `total` lines of a file into arrays [z, or z and canvases]; returns how many lines have no words."""
    # In a log a line every half minute, on a terminal a bar.
    bar = tqdm(total=total, unit=' lines', mininterval=0.1 if sys.stderr.isatty() else 30)
    first, empty, lines = 0, 0, lines_of(path)
    while first < total:
        chunk = list(islice(lines, min(CHUNK, total - first)))
        if not chunk:
            runtime.fail(f'--embed={path}: lost lines while it was read; {first} of {total} were embedded')
        empty += sum(not grammar.normalize(line) for line in chunk)
        for rows, V, z in model.forward(chunk, batch_size):
            at = np.array(rows) + first
            arrays[0][at] = z.float().cpu().numpy()
            if len(arrays) > 1:
                arrays[1][at] = V.half().cpu().numpy()
            bar.update(len(rows))
        first += len(chunk)
    bar.close()
    for array in arrays:
        array.flush()
    return empty


def shown(path):
    """A path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main():
    if text2 and not text:
        runtime.fail('--text2 is compared with --text, which is missing')
    if not (text or interactive or embed or draw):
        runtime.fail('nothing to do: --text="a red cube is on a blue ball", --interactive=true, --embed=FILE, --draw=8')
    if not 0 < top_p <= 1 or walk < 2:
        runtime.fail(f'--top_p={top_p} --walk={walk}: expects more than 0 and at most 1; at least 2 canvases')
    if embed and not Path(embed).is_file():
        runtime.fail(f'--embed={embed}: no such file')
    if model and init_from:
        runtime.fail(f'--model={model} --init_from={init_from}: expects one of them')
    trained = TextCanvas(shipped(model) if model else init_from, device, dtype)
    print(f'model        {shown(trained.path)} ({trained.phase.upper()}, step {trained.step})')
    generator = torch.Generator().manual_seed(seed)
    if not embed:
        torch.set_num_threads(1)                           # a sentence or two: threads mostly wait for one another
    if embed:
        embed_file(trained, embed, out, canvas)
    if draw:
        if not trained.has_prior:
            runtime.fail(f'{shown(trained.path)} has no diffusion prior: --draw needs --init_from=out/p6/ckpt.pt')
        draw_canvases(trained, draw, generator)
    if text:
        describe(trained, text, generator)
        if text2:
            compare(trained, grammar.normalize(text), grammar.normalize(text2))
    while interactive:
        try:
            line = input('sentence> ')
        except (EOFError, KeyboardInterrupt):
            break
        except UnicodeDecodeError:
            print('that was no UTF-8; type it again', file=sys.stderr)
            continue
        if not line.strip():
            break
        describe(trained, line, generator)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        runtime.fail('interrupted', status=130)

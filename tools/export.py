"""A trained model as ONNX files that a browser can run, and what the page in playground/ needs beside them.

Three graphs, each with a dynamic batch, checked against PyTorch before anything is written:
    encoder.onnx  x (B, T) ids, 0 is padding          -> V (B, C, H, W), z (B, E)
    reader.onnx   V (B, C, H, W)                      -> z (B, E), memory (layers, 2, B, heads, cells + 1, d)
    decoder.onnx  x (B, T) ids from BOS or PARA on, memory -> logits (B, T, vocab), attention (B, T, cells)
The decoder takes the whole prefix at each step instead of a cache of keys and values: model.py's own forward pass is
exported as it stands, one call with the whole sentence gives the attention of every word, and at the 12 tokens of a
sentence a cache would save about a millisecond a step. The canvas is projected once a canvas, by the reader.

Reads:  a checkpoint of P5 or P6, or pretrained/model.pt
Writes: out/onnx/{encoder,reader,decoder}.onnx, model.json, map.bin
    pip install -r playground/requirements.txt
    python -m tools.export --init_from=out/p5/ckpt.pt
"""
import io
import json
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
import grammar
import runtime
from model import BOS, shift
from sample import TextCanvas, shown

init_from = ''            # a checkpoint of P5 or P6; '' is the newest in out/, or else the model that comes with this
out = 'out/onnx'          # folder of the files
half = False              # store in 16 bits the weights that 16 bits hold exactly: half the size, and the same numbers,
                          # where a checkpoint is rounded to 16 bits (tools/pretrain.py); else no difference
map_scenes = 400          # held-out scenes on the map, two sentences each; the evaluation pack has 1024
seed = 0                  # of the t-SNE
config = runtime.configure(globals())

TOLERANCE = 1e-4          # largest difference to PyTorch that is let through
BATCHES = 1, 2, 5         # numbers of sentences that are compared, each at its own length


class Encoder(nn.Module):
    """x (B, T) -> V, z"""

    def __init__(self, nets):
        super().__init__()
        self.encoder, self.readout = nets['encoder'], nets['readout']

    def forward(self, x):
        V = self.encoder(x)
        return V, self.readout(V)


class Reader(nn.Module):
    """V (B, C, H, W), as painted or as changed by hand -> its z, and the keys and values of every decoder layer."""

    def __init__(self, nets):
        super().__init__()
        self.readout, self.decoder = nets['readout'], nets['decoder']

    def forward(self, V):
        z = self.readout(V)
        return z, torch.stack([torch.stack(pair) for pair in self.decoder.memory(V, z)])


class Decoder(nn.Module):
    """x (B, T), memory -> logits of the token after each prefix, and where on the canvas the decoder looked for it:
    the mean over layers and heads, rows sum to 1 (the weight on z is left out), as in p4_decoder.attention_maps."""

    def __init__(self, nets):
        super().__init__()
        self.decoder = nets['decoder']

    def forward(self, x, memory):
        logits, layers = self.decoder.decode(x, [pair.unbind() for pair in memory.unbind()], maps=True)
        cells = torch.stack(layers).mean((0, 2))[:, :, :-1]                          # (B, T, cells)
        return logits, cells / cells.sum(-1, keepdim=True)


def compact(content, halved, least=256):
    """An ONNX file (bytes) without the notes of the exporter, which name folders of this machine.
    halved: its float32 weights of `least` numbers and more are stored as float16, wherever that changes none of them,
    with a Cast of each to float32 before the graph, which stays as it is."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    model = onnx.load_from_string(content)
    graph, casts = model.graph, []
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    for weight in graph.initializer if halved else ():
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < least:
            continue
        values = numpy_helper.to_array(weight)
        with np.errstate(over='ignore'):                                             # infinite is not the same either
            rounded = values.astype(np.float16)
        if np.array_equal(rounded, values):
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(rounded, f'{name}_half'))
            casts.append(helper.make_node('Cast', [f'{name}_half'], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model.SerializeToString()


def to_onnx(module, examples, names, dynamic, halved=False):
    """The bytes of an ONNX file of module, and its largest difference to PyTorch over examples: tuples of inputs, the
    last of which is traced. names: (inputs, outputs); dynamic: {axis: torch.export.Dim} of each input; halved: as
    compact() stores it. Raises SystemExit(1), after one line, above TOLERANCE."""
    import onnxruntime
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')          # of the exporter about its own parts
        program = torch.onnx.export(module, examples[-1], input_names=names[0], output_names=names[1],
                                    dynamic_shapes=dynamic, dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)                         # weights inside: the page fetches one file
    content = compact(buffer.getvalue(), halved)
    session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
    difference = 0.0
    for inputs in examples:
        with torch.no_grad():
            expected = module(*inputs)
        got = session.run(names[1], {name: value.numpy() for name, value in zip(names[0], inputs)})
        for a, b in zip(got, expected):
            difference = max(difference, float(np.abs(a - b.numpy()).max()) if a.shape == b.shape else float('inf'))
    if not difference <= TOLERANCE:              # NaN is refused too
        runtime.fail(f'{type(module).__name__.lower()}.onnx differs from PyTorch by {difference:.1e}, more than '
                     f'{TOLERANCE:.0e}; nothing is written', status=1)
    return content, difference


def graphs(model, sentences, halved=False):
    """{name: (bytes, largest difference)} of the three files, compared on batches of sentences of several lengths."""
    batch, length = torch.export.Dim('batch'), torch.export.Dim('length', min=1, max=model.max_length)
    encoder, reader, decoder = Encoder(model.nets), Reader(model.nets), Decoder(model.nets)
    tokens, canvases, prefixes = [], [], []
    for size in BATCHES:
        ids = model.tokens(sentences[:size])
        width = min(max(map(len, ids)) + size, model.max_length)                     # a different one for each size
        x = torch.tensor([row + [data.PAD] * (width - len(row)) for row in ids])
        with torch.no_grad():
            V, _ = encoder(x)
            tokens.append((x,)), canvases.append((V,)), prefixes.append((shift(x, BOS), reader(V)[1]))
    return {'encoder': to_onnx(encoder, tokens, (['x'], ['V', 'z']), ({0: batch, 1: length},), halved),
            'reader': to_onnx(reader, canvases, (['V'], ['z', 'memory']), ({0: batch},), halved),
            'decoder': to_onnx(decoder, prefixes, (['x', 'memory'], ['logits', 'attention']),
                               ({0: batch, 1: length}, {2: batch}), halved)}


def pack_sentences(config, scenes):
    """The sentences of the map: those of the montage, then two of each of the first held-out scenes, one in canonical
    and one in free words (of a corpus of one's own: its held-out lines)."""
    if config.corpus:
        parts, _ = data.read_corpus(config.corpus)
        return list(dict.fromkeys(line for groups, *_ in parts['val'] for line in groups[0]))[:2 * scenes]
    rows = data.render_split('val', data.scenes_of('val', scenes, config.complexity, config.data_seed),
                             config.data_seed)
    rendered = (groups[0][k] for groups, *_ in rows for k in (0, data.CANONICAL_RENDERINGS))
    return list(dict.fromkeys([*grammar.EVAL_SENTENCES, *rendered]))


def facts(sentence):
    """What the map colours a sentence by: (relation, colour and shape of the thing that has it), the same for all
    paraphrases; '' outside the grammar."""
    scene = grammar.parse(sentence)
    if scene is None or not scene.relations:
        return '', '', ''
    name, first, second = scene.relations[0]
    if name not in grammar.CANONICAL:
        name, first = grammar.INVERSE[name], second
    return name, scene.things[first].colour, scene.things[first].shape


def describe_map(model, sentences):
    """-> (what model.json holds of the map, z (N, E), canvases of all its sentences (N, C, H, W))."""
    from sklearn.manifold import TSNE
    V, z = model.read(sentences)
    z = z.float().numpy()
    xy = TSNE(metric='cosine', perplexity=min(30.0, (len(z) - 1) / 3), init='pca', random_state=seed).fit_transform(z)
    xy = (xy - xy.min(0)) / np.maximum(xy.max(0) - xy.min(0), 1e-9)
    relation, colour, shape = zip(*map(facts, sentences))
    return {'sentences': sentences, 'xy': xy.round(4).tolist(), 'relation': relation, 'colour': colour,
            'shape': shape}, z, V


def write(folder, files):
    """Write {name: bytes} into a folder, each in one move. Raises SystemExit(2), after one line, when it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = folder / f'{name}.tmp'
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)
    except OSError as error:
        runtime.fail(f'--out={folder}: {error.strerror}')


def export(path, folder, halved=half, scenes=map_scenes):
    """Write the model of a checkpoint into a folder, and say how large and how exact each file is; arguments as the
    settings init_from, out, half and map_scenes."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        runtime.fail(f'{error.name} is not installed; run: pip install -r playground/requirements.txt')
    if scenes < 4:
        runtime.fail(f'--map_scenes={scenes}: expects at least 4')
    model = TextCanvas(path, 'cpu', 'float32')
    arch = model.arch
    sentences = pack_sentences(model.config, scenes)
    if len(sentences) < 8:
        runtime.fail(f'{model.path}: its corpus holds {len(sentences)} held-out sentences; a map needs at least 8')
    files = graphs(model, sentences, halved)
    points, z, V = describe_map(model, sentences)
    middle = V.median(0).values.flatten(1).median(1).values                        # as in plot.montage, but over all
    spread = (V - middle[:, None, None]).abs().transpose(0, 1).flatten(1).numpy()
    about = {'phase': model.phase, 'step': model.step, 'checkpoint': str(shown(model.path)),
             'commit': runtime.git_commit(),
             'parameters': sum(runtime.count_parameters(model.nets[n]) for n in ('encoder', 'readout', 'decoder')),
             'channels': arch['channels'], 'size': arch['size'], 'cells': arch['size'] // arch['patch'],
             'z_dim': arch['z_dim'], 'max_length': arch['max_length'],
             'middle': middle.tolist(), 'spread': np.quantile(spread[:, ::7], 0.995, axis=1).clip(1e-6).tolist(),
             'tokenizer': {'pattern': data.PATTERN, 'specials': data.SPECIALS, 'ranks': model.tokenizer.state()},
             'map': points}
    write(Path(folder), {**{f'{name}.onnx': content for name, (content, _) in files.items()},
                         'map.bin': z.astype('<f4').tobytes(), 'model.json': json.dumps(about).encode()})
    for name, (content, difference) in files.items():
        print(f'{name}.onnx  {len(content) / 1e6:.1f} MB, largest difference to PyTorch {difference:.1e}')
    print(f'wrote {folder}: {len(sentences)} sentences on the map; look at it with: python -m playground '
          f'--model={folder}')


def main():
    export(init_from, out, half, map_scenes)


if __name__ == '__main__':
    main()

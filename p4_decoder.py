"""P4 · Read the sentence back.

The encoder is frozen. A fresh decoder attends to the flattened canvas and the pooled z and is taught, by teacher
forcing under a vocabulary mask, to say the sentence again. Three control decoders learn beside it on the same batches:
the canvas alone, z alone, and neither (a language model). After another start token (PARA) the decoder also learns to
say other sentences of the same scene, which P5 goes on from (paraphrase_share=0.0 is the plan to the letter).

Reads:  out/p3/ckpt.pt      Writes: out/p4/ckpt.pt, run.json, metrics.jsonl, gate.json, samples.jsonl, plots/
    python p4_decoder.py --batch_size=64
    torchrun --standalone --nproc_per_node=2 p4_decoder.py
"""
import json

import torch
from torch import nn

import data
import plot
import runtime
from model import BOS, PARA, build_decoder, build_encoder, build_readout, check_sizes, shift
from p1_canvas import encode, reconstruction, token_metrics
from p2_contrast import embed

out_dir = 'out/p4'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p3/ckpt.pt'   # the phase before
resume = False            # go on from out_dir/ckpt.pt
seed = 0
dec_dim = 384             # width of the decoders
dec_layers = 4
dec_heads = 8
dec_hidden = 1536
dropout = 0.1
vocab_mask = True         # only words that occur in the training corpus can be said
controls = True           # also train the three control decoders
paraphrase_share = 0.5    # of the decoder's loss that goes to paraphrases; 0 is the plan
paraphrases = 2           # that it learns to say of each canvas: reading is learnt in a fifth of the steps (LOG.md)
# optimisation
batch_size = 256          # sentences a step, all ranks together
grad_accum = 1            # micro-steps that each rank cuts its share into
learning_rate = 1e-4      # the plan's decoder rate
warmup_steps = 200
max_steps = 10_000
lr_steps = 10_000
weight_decay = 0.01
grad_clip = 1.0
ema_decay = 0.999
eval_every = 500
log_every = 50
device = 'auto'
dtype = 'auto'
compile = True
tensorboard = False
config = runtime.configure(globals())

CONTROLS = {'decoder': 'both', 'canvas only': 'canvas', 'z only': 'z', 'no canvas': 'none'}


def build(arch, controls=True):
    """P2's encoder and readout, the decoder and its controls, from the sizes in a checkpoint."""
    names = CONTROLS if controls else ('decoder',)
    return {'encoder': build_encoder(arch), 'readout': build_readout(arch),
            **{name: build_decoder(arch, CONTROLS[name]) for name in names}}


def vocabulary(corpus, tokenizer, vocab_size, checked):
    """(vocab_size,) bool: the tokens that occur in the corpus, and EOS. In a corpus of one's own all that the tokenizer
    has, for a held-out sentence may need one that never occurred. PAD and BOS are never said."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool, device=corpus.device)
    allowed[corpus.tokens.long().unique() if checked else slice(tokenizer.size)] = True
    allowed[[data.PAD, data.BOS]] = False
    return allowed


def shuffle_canvas(V):
    """The same pixels in one random order for all canvases: what is left when place is gone."""
    order = torch.randperm(V.shape[2] * V.shape[3], generator=torch.Generator().manual_seed(0)).to(V.device)
    return V.flatten(2)[:, :, order].view_as(V)


@torch.no_grad()
def attention_maps(decoder, V, z, x, run):
    """Cross-attention over the canvas at the position that says each token, averaged over layers and heads:
    (B, T, h, w), rows sum to 1 (the weight on z is left out)."""
    with run.autocast():
        _, layers = decoder.decode(shift(x), decoder.memory(V, z), maps=True)
    side = V.shape[-1] // decoder.patch
    weights = torch.stack([w.float() for w in layers]).mean((0, 2))[:, :, :side * side]      # (B, T, cells)
    return (weights / weights.sum(-1, keepdim=True)).unflatten(2, (side, side))


def attention_arrays(nets, V, x, types, tokenizer, run):
    """What the figure of attention is drawn from: where the decoder looks on canvases V of sentences x (B, T)."""
    with torch.no_grad(), run.autocast():
        z = nets['readout'](V)
    words = [[tokenizer.decode([i]) if i >= data.SPECIALS else '.' if i == data.EOS else '' for i in row]
             for row in x.tolist()]
    return {'attention': attention_maps(nets['decoder'], V, z, x, run), 'attention_tokens': words,
            'attention_types': [[data.TYPES[types[i]] for i in row] for row in x.tolist()]}


@torch.no_grad()
def attended_cells(decoder, V, z, x, types, run, batch=256):
    """How many canvas cells a token looks at, exp(entropy) a head, mean over content and over function tokens."""
    totals = torch.zeros(2, 2, device=V.device)
    for i in range(0, len(x), batch):
        part = slice(i, i + batch)
        with run.autocast():
            _, layers = decoder.decode(shift(x[part]), decoder.memory(V[part], z[part]), maps=True)
        cells = (V.shape[-1] // decoder.patch) ** 2
        for w in layers:
            w = w[..., :cells].float()                                                # (B, heads, T, cells)
            w = w / w.sum(-1, keepdim=True).clamp(min=1e-9)
            count = torch.exp(-(w * (w + 1e-12).log()).sum(-1)).mean(1)               # (B, T)
            for k, chosen in enumerate((types[x[part]] > 0, (types[x[part]] == 0) & (x[part] >= data.SPECIALS))):
                totals[k, 0] += (count * chosen).sum()
                totals[k, 1] += chosen.sum()
    content, function = (totals[:, 0] / totals[:, 1]).tolist()
    return {'cells_content': content, 'cells_function': function}


@torch.no_grad()
def free_run(decoder, V, z, run, length, batch=256, **sampling):
    """Sentences said from canvases (N, ...), greedy unless told otherwise: ids (N, length)."""
    with run.autocast():
        return torch.cat([decoder.generate(v, e, length, **sampling) for v, e in zip(V.split(batch), z.split(batch))])


def graph_metrics(texts, originals):
    """Graph F1 by the checker, the share of exact graphs, and of sentences that it cannot read."""
    scores = [(data.graph_f1(data.parse(a), data.parse(b)), data.parse(b)) for a, b in zip(originals, texts)]
    n = max(1, len(scores))
    return {'graph_f1': sum(f1 for f1, _ in scores) / n, 'graph_exact': sum(f1 == 1.0 for f1, _ in scores) / n,
            'unreadable': sum(scene is None for _, scene in scores) / n}


def evaluate(nets, x, types, concepts, tokenizer, run, checked):
    """Reading of held-out x (N, T): the decoder, its controls, with the canvas shuffled and with another sentence's."""
    encoder, readout, decoder = nets['encoder'], nets['readout'], nets['decoder']
    V, z = encode(encoder, x, run), embed(encoder, readout, x, run)
    metrics = token_metrics(decoder, V, z, x, types, concepts, run)
    tables = {'decoder': metrics}
    for name in CONTROLS:
        if name in nets and name != 'decoder':
            tables[name] = token_metrics(nets[name], V, z, x, types, concepts, run)
    tables['canvas shuffled'] = token_metrics(decoder, shuffle_canvas(V), z, x, types, concepts, run)
    tables["another sentence's"] = token_metrics(decoder, V.roll(1, 0), z.roll(1, 0), x, types, concepts, run)
    metrics['shuffle_ce_rise'] = tables['canvas shuffled']['ce'] / metrics['ce'] - 1
    if 'canvas only' in tables:
        shuffled = token_metrics(nets['canvas only'], shuffle_canvas(V), None, x, types, concepts, run)
        metrics['shuffle_ce_rise_canvas_only'] = shuffled['ce'] / tables['canvas only']['ce'] - 1
    metrics |= attended_cells(decoder, V, z, x, types, run)
    said = free_run(decoder, V, z, run, min(x.shape[1] + 4, decoder.position.num_embeddings))
    pairs = [(tokenizer.decode(a), tokenizer.decode(b)) for a, b in zip(x.tolist(), said.tolist())]
    metrics['free_exact'] = sum(a == b for a, b in pairs) / len(pairs)
    if checked:
        metrics |= graph_metrics([b for _, b in pairs], [a for a, _ in pairs])
    return metrics, tables, pairs, V


def reading_gate(m, checked, others='', canvas_only=''):
    """How well the sentence is read, and that place matters: two rows of a gate. others, canvas_only: what stands
    beside them. Which tokens are content is known of the built-in grammar only (checked)."""
    read, kind = (m['content_accuracy'], 'content-token') if checked else (m['accuracy'], 'token')
    return [(f'{kind} accuracy, exact', '>= 0.90', read, read >= 0.90, others),
            ('CE rise when the canvas is shuffled', '>= 0.30', m['shuffle_ce_rise'], m['shuffle_ce_rise'] >= 0.30,
             canvas_only)]


def gate(m, tables, checked):
    """P4's criteria (DESIGN 8), the control decoders beside them."""
    beside = ', '.join(f"{name} {t['content_accuracy']:.2f}" for name, t in tables.items()
                       if name not in ('decoder', 'canvas only'))
    only = tables.get('canvas only', {})
    read, shuffled = reading_gate(m, checked, beside if checked else '',
                                  f"canvas only {m.get('shuffle_ce_rise_canvas_only', float('nan')):.2f}")
    if not checked:
        return [read, shuffled]
    return [
        read, ('content-token accuracy, by concept +', '>= 0.90', m['content_concept'], m['content_concept'] >= 0.90,
         f"canvas only {only.get('content_concept', float('nan')):.2f}"),
        shuffled,
        ('canvas cells a content token looks at', f"< {m['cells_function']:.2f}", m['cells_content'],
         m['cells_content'] < m['cells_function'], f"function tokens {m['cells_function']:.2f}"),
        ('free-running exact graph +', '>= 0.85', m['graph_exact'], m['graph_exact'] >= 0.85,
         f"Graph F1 {m['graph_f1']:.3f}, unreadable {m['unreadable']:.3f}")]


def main():
    run = runtime.start('p4', config)
    previous = runtime.inherit(run, init_from, 'p3', 'python p3_jitter.py')
    arch = previous['arch'] | {'dec_dim': dec_dim, 'dec_layers': dec_layers, 'dec_heads': dec_heads,
                               'dec_hidden': dec_hidden, 'dec_dropout': dropout}
    check_sizes(arch)
    splits, tokenizer = data.load(arch['data'], run, previous)
    train, checked = splits['train'], not arch['data']['corpus']
    types, concepts = (t.to(run.device) for t in data.token_types(tokenizer, arch['vocab_size']))
    nets = nn.ModuleDict(build(arch, controls)).to(run.device)
    runtime.load_weights(nets, previous, ('encoder', 'readout'))
    for name in ('encoder', 'readout'):
        nets[name].requires_grad_(False).eval()
    decoders = nn.ModuleDict({name: net for name, net in nets.items() if name in CONTROLS})
    if vocab_mask:
        for net in decoders.values():
            net.allowed.copy_(vocabulary(train, tokenizer, arch['vocab_size'], checked))
    run.say(f"decoder {runtime.count_parameters(nets['decoder']) / 1e6:.1f}M parameters; {len(decoders) - 1} controls")
    optimizer = runtime.adamw(decoders, learning_rate, weight_decay)
    ema = runtime.EMA(nets, ema_decay)
    state = runtime.resume(run, nets, optimizer, ema, tokenizer)
    start, metrics = (state['step'], state['metrics']) if state else (0, {})
    runtime.compile_nets(nets, run)

    for step in run.steps(start, max_steps):
        last = step == max_steps
        if step % eval_every == 0 or last:
            decoders.eval()
            x_held = splits['test' if last else 'val'].fixed(512)      # as in P1
            with ema.weights():
                metrics, tables, pairs, V = evaluate(nets, x_held, types, concepts, tokenizer, run, checked)
                arrays = attention_arrays(nets, V[:4], x_held[:4], types, tokenizer, run)
            run.log(step, metrics, prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays | {
                    'ce_types': ['function', *data.TYPES[1:]],
                    'ce_values': torch.tensor([metrics[f'ce_{name}'] for name in ('function', *data.TYPES[1:])]),
                    'controls_names': list(tables), 'controls_ce': torch.tensor([t['ce'] for t in tables.values()]),
                    'controls_accuracy': torch.tensor([t['content_accuracy'] for t in tables.values()])})
                plot.trends(run.dir)
                runtime.write_text(run.dir / 'samples.jsonl',
                                   ''.join(json.dumps({'input': a, 'said': b}) + '\n' for a, b in pairs))
        if step % eval_every == 0 or last or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, metrics, arch, {'tokenizer': tokenizer.state()})
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        decoders.train()
        x = train.sentences(batch_size, seed, step, paraphrases if paraphrase_share else 1)
        values = {}
        for several in x[runtime.local_slice(run, batch_size)].chunk(grad_accum):
            part = several[:, 0]
            with torch.no_grad(), run.autocast():
                V = nets['encoder'](part)
                z = nets['readout'](V)
            with run.autocast():
                losses = {}
                if paraphrase_share:
                    losses['decoder'], *others = reconstruction(nets['decoder'], V, z, several,
                                                                (BOS, *[PARA] * paraphrases))
                    losses['paraphrase'] = sum(others) / paraphrases
                losses |= {name: reconstruction(net, V, z, part) for name, net in decoders.items()
                           if name not in losses}
            share = {'decoder': 1 - paraphrase_share, 'paraphrase': paraphrase_share}
            loss = sum(share.get(name, 1.0) * value for name, value in losses.items())
            (loss / grad_accum).backward()                      # the decoders share nothing: a sum trains each alone
            for name, value in losses.items():
                name = 'loss' if name == 'decoder' else name
                values[name] = values.get(name, 0.0) + value.detach() / grad_accum
        runtime.average_gradients(decoders, run)
        # One clip a decoder, or the controls would change how the decoder learns.
        norms = {name: torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip) for name, net in decoders.items()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        values |= {'grad_norm': norms['decoder'], 'lr': lr}
        run.watch(step, values)
        if step % log_every == 0:
            run.log(step, values, prefix='train')

    for name, table in tables.items():
        run.say(f"{name:20s} CE {table['ce']:.3f}   content exact {table['content_accuracy']:.3f}   "
                f"by concept {table['content_concept']:.3f}")
    for a, b in pairs[:8]:
        run.say(f'  {a}\n    -> {b}')
    runtime.write_gate(run, gate(metrics, tables, checked))


if __name__ == '__main__':
    main()

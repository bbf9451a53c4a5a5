"""P4 · Read the sentence back.

The encoder is frozen. A fresh decoder attends to the flattened canvas and the pooled z and is taught, by teacher
forcing under a vocabulary mask, to say the sentence again. Three control decoders learn beside it on the same batches:
the canvas alone, z alone, and neither (a language model). After another start token (PARA) the decoder also learns to
say other sentences of the same scene, which P5 goes on from (paraphrase_share=0 is the plan to the letter).

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
from grammar import TYPES
from metrics import (READ, attention_arrays, embed, encode, free_run, graph_metrics, reading_gate, shuffle_canvas,
                     token_metrics)
from model import BOS, CONTROLS, PARA, build, shift, size_error, sizes, trim
from p1_canvas import join, reconstruction, replace_tokens
from textmetrics import format_table, reading_table

out_dir = 'out/p4'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p3/ckpt.pt'   # the phase before; every setting that is not here comes from it
resume = False            # go on from out_dir/ckpt.pt
dec_dim = 384             # width of the decoders
dec_layers = 4            # >= 1
dec_heads = 8             # >= 1
dec_hidden = 1536         # >= 1
dec_dropout = 0.1         # 0 to 1: of the decoders
vocab_mask = True         # only words that occur in the training corpus can be said
controls = True           # also train the three control decoders
paraphrase_share = 0.5    # 0 to 1: of the decoder's loss that goes to paraphrases; 0 is the plan
paraphrases = 2           # >= 1: that it learns to say of each canvas: reading is learnt in a fifth of the steps
                          # (docs/LOG.md)
# optimisation
learning_rate = 1e-4      # >= 0: the plan's decoder rate
warmup_steps = 200
max_steps = 10_000
lr_steps = 10_000
eval_every = 500
config = runtime.configure(globals(), after='p3')


# Rows of textmetrics.reading_table: the least share of sentences read exactly, and the least BLEU-4 where it is asked.
LENGTHS = {'1-16 words': (0.97, 99), '17-30 words': (0.90, None)}


def vocabulary(text, vocab_size):
    """(vocab_size,) bool: the tokens that occur in the training corpus, and EOS. In a corpus of one's own all that the
    tokenizer has, for a held-out sentence may need one that never occurred. PAD and BOS are never said."""
    train = text.splits['train']
    allowed = torch.zeros(vocab_size, dtype=torch.bool, device=train.device)
    allowed[train.tokens.long().unique() if text.checked else slice(text.tokenizer.size)] = True
    allowed[[data.PAD, data.BOS]] = False
    return allowed


def reading_losses(decoders, V, z, x, share):
    """Cross-entropies a token of all decoders on x (B, 1 + paraphrases, T): {decoder: saying the first again}, and
    'paraphrase', saying the others, if they have a share -> their sum, {name: value}. The decoders have no weight in
    common, so the sum trains each alone."""
    losses, again = {}, x[:, 0]
    if share:
        count = x.shape[1] - 1
        losses['decoder'], *others = reconstruction(decoders['decoder'], V, z, x, (BOS, *[PARA] * count))
        losses['paraphrase'] = sum(others) / count
    losses |= {name: reconstruction(net, V, z, again) for name, net in decoders.items() if name not in losses}
    weights = {'decoder': 1 - share, 'paraphrase': share}
    return sum(weights.get(name, 1.0) * value for name, value in losses.items()), losses


@torch.no_grad()
def attended_cells(decoder, V, z, x, types, autocast, batch=256):
    """How many canvas cells a token looks at, exp(entropy) a head, mean over content and over function tokens."""
    totals, cells = torch.zeros(2, 2, device=V.device), (V.shape[-1] // decoder.patch) ** 2
    for i in range(0, len(x), batch):
        part = slice(i, i + batch)
        with autocast():
            _, layers = decoder.decode(shift(x[part]), decoder.memory(V[part], z[part]), maps=True)
        for w in layers:
            w = w[..., :cells].float()                                                # (B, heads, T, cells)
            w = w / w.sum(-1, keepdim=True).clamp(min=1e-9)
            count = torch.exp(-(w * (w + 1e-12).log()).sum(-1)).mean(1)               # (B, T)
            for k, chosen in enumerate((types[x[part]] > 0, (types[x[part]] == 0) & (x[part] >= data.SPECIALS))):
                totals[k, 0] += (count * chosen).sum()
                totals[k, 1] += chosen.sum()
    content, function = (totals[:, 0] / totals[:, 1]).tolist()
    return {'cells_content': content, 'cells_function': function}


def evaluate(nets, x, text, autocast):
    """Reading of held-out x (N, T) -> metrics of the decoder; {name: metrics} of it, its controls, a shuffled canvas
    and another sentence's; [(sentence, what is said)]; V."""
    V, z = encode(nets['encoder'], x, autocast), embed(nets, x, autocast)

    def read(name, V, z):
        return token_metrics(nets[name], V, z, x, text, autocast)

    tables = {name: read(name, V, z) for name in ('decoder', *CONTROLS) if name in nets}
    tables['canvas shuffled'] = read('decoder', shuffle_canvas(V), z)
    tables["another sentence's"] = read('decoder', V.roll(1, 0), z.roll(1, 0))
    metrics = tables['decoder']
    metrics['shuffle_ce_rise'] = tables['canvas shuffled']['ce'] / metrics['ce'] - 1
    if 'canvas only' in nets:
        shuffled = read('canvas only', shuffle_canvas(V), None)
        metrics['shuffle_ce_rise_canvas_only'] = shuffled['ce'] / tables['canvas only']['ce'] - 1
    metrics |= attended_cells(nets['decoder'], V, z, x, text.types, autocast)
    said = free_run(nets['decoder'], V, z, autocast, min(x.shape[1] + 4, nets['decoder'].position.num_embeddings))
    pairs = [(text.tokenizer.decode(a), text.tokenizer.decode(b)) for a, b in zip(x.tolist(), said.tolist())]
    metrics['free_exact'] = sum(a == b for a, b in pairs) / len(pairs)
    if text.checked:
        metrics |= graph_metrics([b for _, b in pairs], [a for a, _ in pairs])
    else:
        by_length = reading_table(*zip(*pairs))
        metrics |= {f'{name}_{row}': by_length[row][name] for row in LENGTHS if row in by_length
                    for name in ('exact', 'bleu4')}
    return metrics, tables, pairs, V


def reading_arrays(metrics, tables, checked):
    """What the figures of token types and controls are drawn from."""
    names, accuracy = ['function', *TYPES[1:]], 'content_accuracy' if checked else 'accuracy'
    return {'ce_types': names, 'ce_values': torch.tensor([metrics[f'ce_{name}'] for name in names]),
            'controls_names': list(tables), 'controls_ce': torch.tensor([m['ce'] for m in tables.values()]),
            'controls_accuracy': torch.tensor([m[accuracy] for m in tables.values()])}


def gate(m, tables, checked):
    """P4's criteria (docs/PLAN.md), the control decoders beside them."""
    def beside(key):
        return ', '.join(f'{name} {t[key]:.2f}' for name, t in tables.items() if name not in ('decoder', 'canvas only'))

    only = tables.get('canvas only', {})
    read, shuffled = reading_gate(m, checked, beside('content_accuracy' if checked else 'accuracy'),
                                  f"canvas only {m.get('shuffle_ce_rise_canvas_only', float('nan')):.2f}")
    if not checked:
        rows = [read, shuffled]
        for row, asked in LENGTHS.items():
            rows += [(f'free-running {name}, {row} +', f'>= {least}', m[f'{key}_{row}'], m[f'{key}_{row}'] >= least,
                      beside('sentence_exact') if key == 'exact' else '')
                     for name, key, least in zip(('exact', 'BLEU-4'), ('exact', 'bleu4'), asked)
                     if least and f'{key}_{row}' in m]
        return rows
    return [
        read, ('content-token accuracy, by concept +', '>= 0.90', m['content_concept'], m['content_concept'] >= 0.90,
               f"canvas only {only.get('content_concept', float('nan')):.2f}"),
        shuffled,
        ('canvas cells a content token looks at', f"< {m['cells_function']:.2f}", m['cells_content'],
         m['cells_content'] < m['cells_function'], f"function tokens {m['cells_function']:.2f}"),
        ('free-running exact graph +', '>= 0.85', m['graph_exact'], m['graph_exact'] >= 0.85,
         f"Graph F1 {m['graph_f1']:.3f}, unreadable {m['unreadable']:.3f}")]


def main():
    if error := size_error(config):
        runtime.fail(error)
    run = runtime.start('p4', config, sizes(config))
    previous = runtime.inherit(run)
    text = data.load(config, run, previous)
    train = text.splits['train']
    nets = build(config, 'encoder', 'readout', 'decoder', *(CONTROLS if controls else ())).to(run.device)
    runtime.load_weights(nets, previous, ('encoder', 'readout'))
    for name in ('encoder', 'readout'):
        nets[name].requires_grad_(False).eval()
    decoders = nn.ModuleDict({name: net for name, net in nets.items() if name not in ('encoder', 'readout')})
    if vocab_mask:
        for net in decoders.values():
            net.allowed.copy_(vocabulary(text, config.vocab_size))
    run.say(f'decoder {runtime.count_parameters(nets.decoder) / 1e6:.1f}M parameters; {len(decoders) - 1} controls')
    optimizer = runtime.adamw(decoders, learning_rate, config.weight_decay)
    ema = runtime.EMA(nets, config.ema_decay)
    state = {'metrics': {}, 'tokenizer': text.tokenizer.state()}
    start = runtime.resume(run, nets, optimizer, ema, state)
    runtime.compile_nets(nets, run)

    for step in run.steps(start, max_steps):
        last = step == max_steps
        if step % eval_every == 0 or last:
            decoders.eval()
            many = READ if text.checked or not last else 4 * READ              # few sentences are long
            held_out = text.splits['test' if last else 'val'].fixed(many)      # as in P1
            with ema.weights():
                metrics, tables, pairs, V = evaluate(nets, held_out, text, run.autocast)
                arrays = attention_arrays(nets, V[:4], held_out[:4], text, run.autocast)
            state['metrics'] = metrics
            run.log(step, metrics, prefix='val')
            if run.master:
                plot.evaluation(run.dir, step, arrays | reading_arrays(metrics, tables, text.checked))
                plot.trends(run.dir)
                runtime.write_text(run.dir / 'samples.jsonl',
                                   ''.join(json.dumps({'input': a, 'said': b}) + '\n' for a, b in pairs))
        if step % eval_every == 0 or last or run.interrupted:
            runtime.save(run, step, nets, optimizer, ema, state)
        if last:
            break

        lr = runtime.cosine_lr(step, learning_rate, warmup_steps, lr_steps)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['scale']
        decoders.train()
        x = train.sentences(config.batch_size, config.seed, step, paraphrases if paraphrase_share else 1)
        if config.joined:                                    # and in other words: the paraphrases of both, joined
            x = trim(join(x, config.joined, config.max_length))
        if config.random_tokens:
            x[:, 0] = replace_tokens(x[:, 0], config.random_tokens, text.tokenizer.size,
                                     run.generator(step, 'words', run.device))
        values = {}
        for part in x[runtime.local_slice(run, config.batch_size)].chunk(config.grad_accum):
            with torch.no_grad(), run.autocast():
                V = nets.encoder(part[:, 0])
                z = nets.readout(V)
            with run.autocast():
                loss, losses = reading_losses(decoders, V, z, part, paraphrase_share)
            (loss / config.grad_accum).backward()
            for name, value in losses.items():
                name = 'loss' if name == 'decoder' else name
                values[name] = values.get(name, 0.0) + value.detach() / config.grad_accum
        runtime.average_gradients(decoders, run)
        # One clip a decoder, or the controls would change how the decoder learns.
        norms = {name: torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
                 for name, net in decoders.items()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        values |= {'grad_norm': norms['decoder'], 'lr': lr}
        run.watch(step, values)
        if step % config.log_every == 0:
            run.log(step, values, prefix='train')

    for name, table in tables.items():
        content = (f"content exact {table['content_accuracy']:.3f}   by concept {table['content_concept']:.3f}"
                   if text.checked else f"tokens {table['accuracy']:.3f}   sentences {table['sentence_exact']:.3f}")
        run.say(f"{name:20s} CE {table['ce']:.3f}   {content}")
    if not text.checked:
        run.say(f'held-out sentences, read freely\n{format_table(reading_table(*zip(*pairs)))}')
    for a, b in pairs[:8]:
        run.say(f'  {a}\n    -> {b}')
    runtime.write_gate(run, gate(metrics, tables, text.checked))


if __name__ == '__main__':
    main()

"""P2 · Give the canvas a meaning by contrast.

Paraphrases of a scene are pulled together in z = g(V), other scenes and constructed counterfactuals are pushed apart
(InfoNCE), while the image priors and the reading of V go on. The plan's free paraphrases alone teach a bag of words,
because "A on B" / "B under A" against "B on A" is an XOR; so the paraphrases come in three stages (staged=false is the
plan): canonical direction only, then free paraphrases pulled to canonical ones, then everything free.

Reads:  out/p1/ckpt.pt      Writes: out/p2/ckpt.pt, run.json, metrics.jsonl, gate.json, plots/
    python p2_contrast.py --batch_size=16
    torchrun --standalone --nproc_per_node=2 p2_contrast.py
"""
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfTransformer

import data
import plot
import priors
import runtime
from model import Readout, TextDecoder, TextEncoder
from p1_canvas import canvas_gate, canvas_metrics, encode, prior_input, reconstruction, token_metrics, weights

out_dir = 'out/p2'        # run folder: checkpoint, metrics, gate, plots
init_from = 'out/p1/ckpt.pt'   # the phase before
resume = False            # go on from out_dir/ckpt.pt
seed = 0
z_dim = 256               # E, size of the sentence embedding
readout_hidden = 512
pyramid = True            # pool V over 1x1, 2x2 and 4x4 cells; false is the plan's global mean and variance
# contrast
lambda_nce = 1.0          # the plan's alpha
temperature = 0.07
negatives = 2             # counterfactuals of each scene in the batch; 0: other batch items only
anchors = True            # counterfactuals have paraphrases of their own; false: they are negatives only (the plan)
mask_false_negatives = True   # rows that mean the same are never negatives of each other
leave_out = 'colour'      # a counterfactual family that training never sees, to test the others' reach; '' for none
staged = True             # canonical first (see above); false is the plan
stage_gates = '0.95,0.80' # share of counterfactuals beaten in the batch at which stages 1 and 2 end
lambda_vicreg = 0.0       # variance + covariance of z (VICReg), against collapse
lambda_barlow = 0.0       # cross-correlation of the two views towards the identity (Barlow Twins)
# what goes on from P1
lambda_spectrum = 0.5
lambda_tv = 0.1
lambda_wavelet = 0.1
lambda_gradkurt = 0.05
lambda_cov = 0.05
lambda_var = 0.05
lambda_rec = 1.0          # the throwaway decoder goes on reading V; 0 is the plan to the letter
alpha = 2.0
prior_samples = 64        # canvases a step (all ranks) that the priors see
rec_samples = 128         # sentences a step (all ranks) that the throwaway decoder reads
# optimisation
batch_size = 256          # scenes a step, all ranks together; each brings (1 + negatives) x 2 or 3 sentences
grad_accum = 1            # micro-steps, by gradient caching: the contrast always sees the whole batch
learning_rate = 2e-4
warmup_steps = 200
max_steps = 10_000
lr_steps = 10_000
weight_decay = 0.01
grad_clip = 1.0
ema_decay = 0.999
eval_every = 500
log_every = 25
device = 'auto'
dtype = 'auto'
compile = True
tensorboard = False
config = runtime.configure(globals())


def info_nce(z1, z2, meanings, valid, temperature, mask_false_negatives=True, both_ways=True):
    """InfoNCE (van den Oord et al. 2018) between paired rows of z1, z2 (N, E), mean over valid rows, nats.

    meanings (N,): rows of equal meaning are not negatives of each other. valid (N,) bool: rows that exist.
    """
    logits = z1 @ z2.T / temperature                                                  # (N, N)
    hidden = ~valid[None, :].expand_as(logits)
    if mask_false_negatives:
        same = meanings[:, None] == meanings[None, :]
        hidden = hidden | (same & ~torch.eye(len(z1), dtype=torch.bool, device=z1.device))
    logits = logits.masked_fill(hidden, float('-inf'))
    target = torch.arange(len(z1), device=z1.device)
    loss = F.cross_entropy(logits[valid], target[valid])
    if both_ways:
        loss = (loss + F.cross_entropy(logits.T.masked_fill(hidden, float('-inf'))[valid], target[valid])) / 2
    return loss

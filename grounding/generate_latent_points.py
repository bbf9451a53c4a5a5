"""A cloud of digits for latent_space_viewer.html: the latents of a split on a 3-D UMAP, with labels and images.

Reads:  the config, output.checkpoint_path (or --checkpoint), MNIST from data.root
Writes: --output, else artifacts/<experiment name>_<split>_latent_points.json and, where the config's file has another
        name, the same under that name: artifacts/<config>_<split>_latent_points.json
    python grounding/generate_latent_points.py --config grounding/configs/5_asymmetric_resnet8_autoencoder.yaml \\
        --split test --max-points 5000 --l2-normalize --umap-n-neighbors 30 --umap-min-dist 0.1
"""
import base64
from pathlib import Path

import autoencoders
import digits
import settings
from latents import l2_normalize, rounded, subset, umap_map


def main():
    p = settings.parser(__doc__)
    p.add_argument('--checkpoint', help='instead of output.checkpoint_path')
    p.add_argument('--output', help='instead of the default path')
    settings.add_map_options(p, max_points=5000)
    args = p.parse_args()
    config = settings.load_config(args)
    device = settings.start(config)
    model, _ = autoencoders.load(config, device, args.checkpoint)
    splits, source = digits.load(config)
    print(source)
    split, seed = splits[args.split], config['experiment']['seed']
    chosen = subset(split, args.max_points, seed)
    Z = autoencoders.encode(model, split.images[chosen], device)                      # (N, latent_dim)
    points = umap_map(l2_normalize(Z) if args.l2_normalize else Z, 3, args.umap_n_neighbors, args.umap_min_dist, seed)
    pixels = (split.images[chosen] * 255).round().byte().numpy().tobytes()           # N x 784, row by row
    cloud = {'experiment': config['experiment']['name'], 'split': args.split, 'data': source, 'num_points': len(chosen),
             'latent_dim': Z.shape[1], 'l2_normalized': args.l2_normalize, 'points': rounded(points, 4),
             'labels': split.labels[chosen].tolist(), 'images': base64.b64encode(pixels).decode()}
    name, config_name = config['experiment']['name'], settings.load_yaml(args.config)['experiment']['name']
    stems = dict.fromkeys((name, Path(args.config).stem) if name == config_name else (name,))     # not under --set
    paths = [args.output] if args.output else [f'artifacts/{stem}_{args.split}_latent_points.json' for stem in stems]
    for path in paths:
        settings.write_json(path, cloud, indent=None)
        print(f'wrote {path}: {len(chosen):,} points')


if __name__ == '__main__':
    main()

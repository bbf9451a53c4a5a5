"""Train, analyse and export one experiment at a reduced epoch count, then serve the pages and print their addresses.

Each step is the command a person would type, from the repository's root; the first that fails stops the chain. The
products are called demo, so that those of a whole run stay.

Reads:  the config, MNIST from data.root      Writes: artifacts/ in the repository's root
    pip install -r grounding/requirements.txt && npm install --prefix grounding && python grounding/demo.py
"""
import socket
import subprocess
import sys
from pathlib import Path

import settings

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
NAME = 'demo'


def main():
    p = settings.Parser(__doc__)
    p.add_argument('--config', default=str(FOLDER / 'configs' / '5_asymmetric_resnet8_autoencoder.yaml'),
                   help='experiment 3, 4 or 5 (5)')
    p.add_argument('--data_root', help='folder of the four MNIST files, instead of data.root')
    p.add_argument('--epochs', type=settings.positive, default=2)
    p.add_argument('--max-points', type=settings.positive, default=1500, help='on the maps (1500)')
    p.add_argument('--port', type=settings.positive, default=8000)
    p.add_argument('--no-serve', action='store_true', help='stop after the exports')
    p.add_argument('--set', action='append', default=[], metavar='SECTION.KEY=VALUE', help='handed to every step')
    args = p.parse_args()
    args.set = [f'training.epochs={args.epochs}', f'experiment.name={NAME}',
                f'output.checkpoint_path=artifacts/{NAME}.pt', f'output.report_path=artifacts/{NAME}_training.json',
                f'output.analysis_path=artifacts/{NAME}_analysis.json', *args.set]
    args.config = str(Path(args.config).resolve())
    args.data_root = args.data_root and str(Path(args.data_root).resolve())
    name = settings.load_config(args)['experiment']['name']
    if not args.no_serve:                  # asked now, not after the training
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)       # as http.server does
            try:
                probe.bind(('127.0.0.1', args.port))
            except (OSError, OverflowError) as error:
                settings.fail(f'--port {args.port}: cannot be served on ({error}); give another')
    common = ['--config', args.config, *(word for text in args.set for word in ('--set', text))]
    if args.data_root:
        common += ['--data_root', args.data_root]
    points = ['--split', 'test', '--max-points', str(args.max_points), '--l2-normalize']
    for script, options in (('train_covnet.py', []), ('analyze_autoencoder.py', []),
                            ('analyze_manifold.py', ['--split', 'test']), ('generate_latent_points.py', points),
                            ('export_encoder_onnx.py', []), ('export_decoder_onnx.py', []),
                            ('export_interactive_assets.py', points)):
        print(f'\n== {script}', flush=True)
        status = subprocess.run([sys.executable, FOLDER / script, *common, *options], cwd=ROOT).returncode
        if status:
            raise SystemExit(status)       # the step has said why
    pages, stem = f'http://127.0.0.1:{args.port}/grounding', f'/artifacts/{name}'
    print(f'\nviewer:     {pages}/latent_space_viewer.html?data={stem}_test_latent_points.json\n'
          f'playground: {pages}/interactive_latent_playground.html?assets={stem}_test_interactive_assets.json'
          f'&encoder={stem}_encoder.onnx&decoder={stem}_decoder.onnx', flush=True)
    if not (FOLDER / 'node_modules' / 'three').is_dir():
        print('the pages need two libraries first: npm install --prefix grounding', flush=True)
    if not args.no_serve:
        print('serving until Ctrl-C', flush=True)
        try:
            status = subprocess.run([sys.executable, '-m', 'http.server', str(args.port), '--bind', '127.0.0.1'],
                                    cwd=ROOT, stderr=subprocess.DEVNULL).returncode
        except KeyboardInterrupt:
            return
        if status > 0:
            settings.fail(f'--port {args.port}: the server ended with status {status}')


if __name__ == '__main__':
    main()

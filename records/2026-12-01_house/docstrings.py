"""Sentences of the docstrings of Python's standard library, one a line.    python docstrings.py > mine.txt"""
import ast
import re
import sysconfig
from pathlib import Path

sentences = {}
for path in sorted(Path(sysconfig.get_path('stdlib')).rglob('*.py')):
    if 'site-packages' in path.parts:
        continue
    try:
        tree = ast.parse(path.read_text(encoding='utf-8'))
    except (SyntaxError, ValueError):
        continue
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            for sentence in re.findall(r"[A-Z][A-Za-z ,'-]+\.", re.sub(r'\s+', ' ', text)):
                if 4 <= len(sentence.split()) <= 12:
                    sentences[sentence] = None
print('\n'.join(sentences))

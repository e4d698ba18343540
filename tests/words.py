"""Print retired words and docstrings that begin with a fragment; exit with 1 if there are any.

python tests/words.py [FILE_OR_FOLDER ...]      # the repository by default
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXCLUDED = ('experiments/results/', 'tests/golden/', 'tests/words.py', 'CHANGELOG.md')
FRAGMENTS = ('Of', 'What', 'How', 'Whether', 'By', 'As', 'Where', 'Which')
RETIRED = {
    'doorbell|house|room|rooms|workroom': 'entry point, package, module, staging directory',
    'say|says|said|tell|tells|told|complain|complains|gist': 'log, print, report',
    'lie|lies|lay': 'is stored, is sharded',
    'go on|goes on|going on|went on|gone on': 'resume, continue',
    'whole': 'complete, replicated, atomic',
    'book|own rows': 'metric writer, local batch slice',
    'foretell|foretells|foretold|deal|deals|dealt': 'estimate, partition',
    'contestants?|peers|rehears\\w+': 'benchmark, baselines, run archive, dry run',
    'roll call|report for duty|verdict|blame|signs of life': 'failure report, heartbeat',
    'dead starts?|holds zero|decides nothing|undecided': 'collapsed initialisation, inconclusive',
    'to be had|so many|not to be seen|in vain|beforehand': 'plain English',
}
# Phrases in which the word is the right one.
ALLOWED = re.compile(
    r'whole numbers?|never lies?|a great deal|as written'
    r'|(?:paper|text|notes) says?|on_dead_start|results/dead_starts'  # an old key, a folder of logs
)
PATTERNS = {re.compile(rf'\b(?:{words})\b', re.IGNORECASE): use for words, use in RETIRED.items()}


def files(names: list[str]) -> Iterator[Path]:
    """Yield the Python and Markdown files that git tracks below the names."""
    listed = subprocess.check_output(['git', 'ls-files', '--', *names], cwd=ROOT, text=True)
    for name in listed.splitlines():
        if name.endswith(('.py', '.md')) and not name.startswith(EXCLUDED):
            yield ROOT / name


def retired(text: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers and messages of retired words; the parts of snake_case names count."""
    for number, line in enumerate(text.splitlines(), start=1):
        plain = ALLOWED.sub('', line).replace('_', ' ')
        for pattern, use in PATTERNS.items():
            for match in pattern.finditer(plain):
                yield number, f'"{match[0]}" is retired: {use}'


def fragments(text: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers and messages of docstrings that begin with a fragment."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and docstring.split()[0] in FRAGMENTS:
                yield getattr(node, 'lineno', 1), f'docstring begins with "{docstring.split()[0]}"'


def main(names: list[str]) -> int:
    """Print every hit; return 1 if there is any."""
    code = 0
    for path in files(names):
        text = path.read_text(encoding='utf-8')
        found = [*retired(text), *(fragments(text) if path.suffix == '.py' else ())]
        for number, message in sorted(found):
            print(f'{path.relative_to(ROOT)}:{number}: {message}')
            code = 1
    return code


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:] or ['.']))

"Make README.md from nbs/index.ipynb; with --check, only say whether it is in step."
import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The notebook's prose and its visible code, with links that start at the root."
    parts = []
    for cell in read_nb(root/'nbs/index.ipynb').cells:
        lines = cell.source.splitlines()
        source = '\n'.join(line for line in lines if not line.startswith('#|')).strip()
        if cell.cell_type == 'markdown': parts.append(re.sub(r'\]\((?![a-z]+:|#)', '](nbs/', source))
        elif not any(line.startswith('#| hide') for line in lines): parts.append(f'```python\n{source}\n```')
    return '<!-- made from nbs/index.ipynb by .ci/readme.py; edit the notebook -->\n\n' + '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    if '--check' not in sys.argv: (root/'README.md').write_text(readme(), encoding='utf-8')
    elif (root/'README.md').read_text(encoding='utf-8') != readme():
        sys.exit('README.md is out of step: run python .ci/readme.py')

"An environment over the packages of this one, with other versions of some."
import os
import site
import subprocess
import sys
from pathlib import Path

COLAB = 'ipywidgets==7.7.1', 'ipykernel==6.17.1', 'ipython==7.34.0'  # what Google Colab has


def over_this_one(folder: Path, *wanted: str) -> Path:
    "Its interpreter."
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    python = folder/('Scripts' if os.name == 'nt' else 'bin')/'python'
    home = subprocess.run([python, '-c', 'import site; print(site.getsitepackages()[-1])'], capture_output=True,
                          text=True, check=True).stdout.strip()
    # Through addsitedir, for editable installs
    outer = [f'import site; site.addsitedir({place!r})' for place in site.getsitepackages()]
    (Path(home)/'zz_outer.pth').write_text('\n'.join(outer))
    subprocess.run([python, '-m', 'pip', 'install', '-q', *wanted], check=True)
    return python

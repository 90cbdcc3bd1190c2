"Package metadata comes from settings.ini; the version from llm_distill/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

here = Path(__file__).parent
parser = ConfigParser(interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
version = re.search(r"__version__ = ['\"](.+?)['\"]", (here/'llm_distill/__init__.py').read_text(encoding='utf-8'))[1]
statuses = ['', 'Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive']
status = int(cfg['status'])


def lines(key):
    "The non-empty lines of a setting."
    return [line.strip() for line in cfg.get(key, '').splitlines() if line.strip()]


class SdistWithSettings(sdist):
    "A source release that carries settings.ini, which this file reads."
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [*files, 'settings.ini'])


extras = {key.removesuffix('_requirements'): lines(key) for key in cfg if key.endswith('_requirements')}
extras['all'] = sorted({need for needs in extras.values() for need in needs})

setup(
    name=cfg['lib_name'], version=version, description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
    license_expression=cfg['license'], license_files=['LICENSE'], python_requires=f">={cfg['min_python']}",
    classifiers=[f'Development Status :: {status} - {statuses[status]}', f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}", 'Programming Language :: Python :: 3'],
    packages=find_packages(include=['llm_distill', 'llm_distill.*']), package_data={'llm_distill': ['data/*']},
    install_requires=lines('requirements'), extras_require=extras, zip_safe=False,
    entry_points={'console_scripts': lines('console_scripts'), 'nbdev': ['llm_distill=llm_distill._modidx:d']},
    cmdclass={'sdist': SdistWithSettings},
)
